"""Debians in folders, and the release put into them: what the programs that prove it there share."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]

# $0 is the tree; then pairs of an outer file and the inner one that it lies over, --, and the command. The
# tree becomes a mount, as a system's root is one; and the shell stays, for process 1 is deaf to signals.
_MOUNTS: Final = """
mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount -t sysfs -o ro sysfs "$0/sys" &&
mount -t tmpfs tmpfs "$0/run" || exit
while [ "$1" != -- ]; do mount --bind "$1" "$0$2" && shift 2 || exit; done
shift
chroot "$0" "$@"
exit $?
"""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GLIBCS: Final = (28, 27, 26, 24, 17, 12, 5)  # what pip is told a Debian of today can run
_PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


class MissingError(Exception):
    """Something that this program needs is not on this machine."""


class Proof:
    """What was checked, and whether it held."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.n_checks = 0

    def check(self, what: str, holds: bool, shown: object = "") -> None:
        """Notes and prints one check."""
        self.n_checks += 1
        if not holds:
            self.failed.append(what)
        print(f"{'ok    ' if holds else 'FAILED'}  {what}{f': {shown}' if shown != '' else ''}", flush=True)


class Tree:
    """A Debian in a folder; commands run in it without network, in namespaces of their own.

    Args:
        folder: Where it lies.
        environment: What its commands find in their environment besides path and language.
        over: Files of the tree (paths inside) that other files lie over while a command runs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        over: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.environment = {"PATH": _PATH, "LANG": "C.UTF-8", **(environment or {})}
        self._over = [text for inside, outside in (over or {}).items() for text in (str(outside), inside)]

    def command(self, *command: str) -> list[str]:
        """The command that runs a command in the tree; its environment must be `environment`."""
        return [
            *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", _MOUNTS, str(self.folder), *self._over, "--", *command),
        ]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the tree; its output is kept, stderr with stdout."""
        return subprocess.run(
            self.command(*command),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment,
        )

    def path(self, inside: str) -> Path:
        """A path of the tree, as it is outside."""
        return self.folder / inside.lstrip("/")


def need(*programs: str, packages: Mapping[str, str] | None = None) -> None:
    """Raises MissingError where something is not here; `packages`: those not named as their program."""
    if os.geteuid() != 0:
        raise MissingError("it needs root")
    for program in programs:
        if shutil.which(program) is None:
            raise MissingError(f"it needs {program} (apt install {(packages or {}).get(program, program)})")


@contextmanager
def temporary_folder(*, kept: bool) -> Iterator[Path]:
    """A folder on a file system that lets programs run and devices be made."""
    folder = Path(tempfile.mkdtemp(prefix="rbc-edge-debian-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        if kept:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def make_tree(folder: Path, suite: str, mirror: str, packages: Sequence[str], *options: str) -> Tree:
    """Bootstraps a Debian of a few packages; `options` are debootstrap's."""
    print(f"debootstrap {' '.join((*options, suite))}, {' '.join(packages)}", flush=True)
    with (folder / "debootstrap.log").open("w") as log:
        done = subprocess.run(
            [
                *("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", *options),
                *(suite, str(folder / "tree"), mirror),
            ],
            check=False,
            stdout=log,
            stderr=log,
        )
    if done.returncode != 0:
        sys.exit((folder / "debootstrap.log").read_text()[-2000:])
    return Tree(folder / "tree")


def for_python(version: str, machine: str) -> list[str]:
    """pip's options for another Python than its own.

    Args:
        version: Such as 3.11.
        machine: As `platform.machine` has it there.
    """
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in _GLIBCS]
    platforms.append(f"--platform=manylinux2014_{machine}")
    constraint = f"--constraint={ROOT / 'constraints.txt'}"
    return ["--only-binary=:all:", f"--python-version={version}", constraint, *platforms]


def pip(*arguments: str) -> None:
    """Runs the pip of this Python."""
    subprocess.run([*_PIP, *arguments], check=True)


def put_release(tree: Tree, folder: Path, *, machine: str = "") -> str:
    """Builds the wheel, fetches what it needs for the tree's Python, and puts all into the tree.

    Args:
        tree: The tree; a release that was put there before goes.
        folder: A folder to build in.
        machine: The tree's, as `platform.machine` has it there; this one's when empty.

    Returns:
        The wheel's name; it lies in ``/root/release``, what it needs in ``wheels`` there.
    """
    release = tree.path("/root/release")
    shutil.rmtree(release, ignore_errors=True)
    release.mkdir()
    # A copy: building writes into the folder it builds.
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "data", "dist", "build", "__pycache__")
    )
    pip("wheel", "--no-deps", f"--wheel-dir={release}", str(source))
    (wheel,) = release.glob("rbc_edge-*.whl")
    version = tree.run("python3", "-c", "import sys; print('{}.{}'.format(*sys.version_info))").stdout.strip()
    options = for_python(version, machine or platform.machine())
    pip("download", f"--dest={release / 'wheels'}", *options, str(wheel))
    shutil.copytree(ROOT / "deploy", release / "deploy")
    return wheel.name

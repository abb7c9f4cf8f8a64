"""Makes a Debian system in a folder and puts the release into it. Shared by the programs that test there."""

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

# $0 is the tree. Then come pairs of an outer file and the inner file that it covers, --, and the command. The
# tree becomes a mount, as the root of a system is one. The shell stays process 1, because process 1 ignores
# signals.
_MOUNTS: Final = """
mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount -t sysfs -o ro sysfs "$0/sys" &&
mount -t tmpfs tmpfs "$0/run" || exit
while [ "$1" != -- ]; do mount --bind "$1" "$0$2" && shift 2 || exit; done
shift
chroot "$0" "$@"
exit $?
"""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GLIBCS: Final = (28, 27, 26, 24, 17, 12, 5)  # versions that a Debian of today can run
_PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


class MissingError(Exception):
    """This machine lacks something that the program needs."""


class Proof:
    """Counts checks and keeps those that failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.n_checks = 0

    def check(self, what: str, holds: bool, shown: object = "") -> None:
        """Prints one check and keeps its result."""
        self.n_checks += 1
        if not holds:
            self.failed.append(what)
        print(f"{'ok    ' if holds else 'FAILED'}  {what}{f': {shown}' if shown != '' else ''}", flush=True)


class Tree:
    """A Debian system in a folder. Commands run in it without network, in namespaces of their own.

    Args:
        folder: The folder.
        environment: Environment variables of its commands, besides path and language.
        over: Files of the tree (paths inside) that other files cover while a command runs.
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
        """The command line that runs a command in the tree. Start it with `environment`."""
        return [
            *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", _MOUNTS, str(self.folder), *self._over, "--", *command),
        ]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the tree. Returns its output, stderr with stdout."""
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
        """The path outside of a path in the tree."""
        return self.folder / inside.lstrip("/")


def need(*programs: str, packages: Mapping[str, str] | None = None) -> None:
    """Raises MissingError without root or one of the programs. `packages`: packages with other names."""
    if os.geteuid() != 0:
        raise MissingError("it needs root")
    for program in programs:
        if shutil.which(program) is None:
            raise MissingError(f"it needs {program} (apt install {(packages or {}).get(program, program)})")


@contextmanager
def temporary_folder(*, kept: bool) -> Iterator[Path]:
    """A folder on a file system that allows programs and devices."""
    folder = Path(tempfile.mkdtemp(prefix="rbc-edge-debian-", dir="/var/tmp"))
    try:
        yield folder
    finally:
        if kept:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def make_tree(folder: Path, suite: str, mirror: str, packages: Sequence[str], *options: str) -> Tree:
    """Bootstraps a Debian with a few packages. `options` are options of debootstrap."""
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
    """Options of pip for another Python than its own.

    Args:
        version: Such as 3.11.
        machine: `platform.machine` there.
    """
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in _GLIBCS]
    platforms.append(f"--platform=manylinux2014_{machine}")
    constraint = f"--constraint={ROOT / 'constraints.txt'}"
    return ["--only-binary=:all:", f"--python-version={version}", constraint, *platforms]


def pip(*arguments: str) -> None:
    """Runs pip with this Python."""
    subprocess.run([*_PIP, *arguments], check=True)


def put_release(tree: Tree, folder: Path, *, machine: str = "") -> str:
    """Builds the wheel, downloads what it needs for the Python of the tree, and puts all into the tree.

    Args:
        tree: The tree. An older release in it is removed.
        folder: A folder to build in.
        machine: `platform.machine` of the tree. Empty: the same as here.

    Returns:
        The name of the wheel. It is in ``/root/release``, and what it needs in ``/root/release/wheels``.
    """
    release = tree.path("/root/release")
    shutil.rmtree(release, ignore_errors=True)
    release.mkdir()
    # A copy, because building writes into its folder.
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

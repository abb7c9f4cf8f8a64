"""Writes the lists of libraries that install.sh installs: exact versions, with the hashes of their wheels.

``python -m tests.deploy.lock`` asks the package index for the wheels of every supported Python and processor,
with the versions of constraints.txt. pip reads their metadata and hashes from the index and installs nothing.
It takes two minutes. Run it after every change of constraints.txt or of the dependencies in pyproject.toml.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.debian import ROOT, for_python

STATION: Final = ROOT / "deploy" / "requirements.txt"
EXTRAS: Final = {name: ROOT / "deploy" / f"requirements-{name}.txt" for name in ("prometheus", "review")}
PYTHONS: Final = ("3.11", "3.12", "3.13", "3.14")
MACHINES: Final = ("x86_64", "aarch64")

Lock = dict[str, tuple[str, frozenset[str]]]
"""Version and SHA-256 hashes by name of a package."""

_HEAD: Final = f"""\
# {{what}}, for install.sh. pip refuses every file with another hash.
# Made from constraints.txt by: python -m tests.deploy.lock
# For Linux ({", ".join(MACHINES)}) and Python {", ".join(PYTHONS)}.
"""


def canonical(name: str) -> str:
    """The name of a package as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(needs: Sequence[str], python: str, machine: str) -> Lock:
    """What pip installs on another computer, with the versions of constraints.txt.

    Args:
        needs: Requirements as in pyproject.toml.
        python: Such as 3.11.
        machine: `platform.machine` there.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pip",
                    "--disable-pip-version-check",
                    "--quiet",
                    "install",
                    "--dry-run",
                ),
                *("--ignore-installed", f"--target={folder}/none", f"--report={report}"),
                *for_python(python, machine),
                *needs,
            ],
            check=True,
        )
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    lock: Lock = {}
    for package in found:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lock[canonical(name)] = (version, frozenset({digest}))
    return lock


def merged(locks: Sequence[Lock]) -> Lock:
    """One list for all computers.

    Raises:
        ValueError: The computers need different packages or versions.
    """
    versions = [{name: version for name, (version, _) in lock.items()} for lock in locks]
    if any(other != versions[0] for other in versions):
        raise ValueError(f"one list cannot serve all computers: {versions}")
    return {
        name: (version, frozenset[str]().union(*(lock[name][1] for lock in locks)))
        for name, version in versions[0].items()
    }


def text(what: str, lock: Lock) -> str:
    """The file of a list."""
    lines = [_HEAD.format(what=what)]
    for name, (version, digests) in sorted(lock.items()):
        hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(digests))
        lines.append(f"{name}=={version} \\\n{hashes}\n")
    return "".join(lines)


def read(file: Path) -> Lock:
    """A list from its file."""
    joined = file.read_text(encoding="utf-8").replace("\\\n", " ")
    lock: Lock = {}
    for line in joined.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            name, version = pin.split("==")
            lock[name] = (version, frozenset(word.removeprefix("--hash=sha256:") for word in hashes))
    return lock


def main() -> None:
    """Writes all lists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    computers = [(python, machine) for machine in MACHINES for python in PYTHONS]
    station = merged([resolve(project["dependencies"], *computer) for computer in computers])
    STATION.write_text(text("The libraries of the station", station), encoding="utf-8")
    print(f"{len(station)} packages in {STATION.name}")
    for name, file in EXTRAS.items():
        needs = [*project["dependencies"], *project["optional-dependencies"][name]]
        everything = merged([resolve(needs, *computer) for computer in computers])
        extra = {package: found for package, found in everything.items() if package not in station}
        file.write_text(text(f"What the extra `{name}` needs besides", extra), encoding="utf-8")
        print(f"{len(extra)} packages in {file.name}")


if __name__ == "__main__":
    main()

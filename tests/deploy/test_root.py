"""What runs as root or as the service runs no Python file that lies in the folder of the caller."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.test_unit import DEPLOY, SCRIPTS, directives

PLANTED = ("platform.py", "struct.py", "pip.py", "venv.py", "json.py", "ensurepip.py", "rbc_edge/__init__.py")
"""Names of modules that the scripts and the service import."""

_CALL = re.compile(r'(?:"\$python"|"\$release/bin/python"|\bpython3?)\s+-')
_ISOLATED = re.compile(r'(?:"\$python"|"\$release/bin/python") -I (?:- |-m (?:pip|venv) )')


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with Python files that write ``ran`` into it when something imports them."""
    folder = tmp_path / "downloads"
    for name in PLANTED:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r} + '\\n')\n")
    return folder


def programs(folder: Path, **scripts: str) -> str:
    """Makes programs that stand in for those of the system. Returns a PATH that begins with them."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}:/usr/sbin"


def test_the_planted_files_would_run(planted: Path) -> None:
    """Python without -I imports them, so the tests below can fail."""
    subprocess.run([sys.executable, "-m", "platform"], cwd=planted, check=True, stdout=subprocess.DEVNULL)
    assert (planted / "ran").read_text() == "platform.py\n"


def test_install_runs_nothing_from_the_folder_of_the_caller(planted: Path, tmp_path: Path) -> None:
    """Up to the first change of the system: there the stand-in for flock stops the script."""
    log = tmp_path / "log"
    path = programs(
        tmp_path / "bin",
        id="echo 0",
        flock="exit 1",
        getent="exit 0",
        useradd="exit 0",
        groupadd="exit 0",
        runuser="exit 0",
        dirname=f'printf "dirname in %s\\n" "$PWD" >>{log}\nexec /usr/bin/dirname "$@"',
        station_python=f'printf "python %s in %s\\n" "$*" "$PWD" >>{log}\n'
        f'exec {shlex.quote(sys.executable)} "$@"',
    )
    (planted / "rbc_edge-0.1.0-py3-none-any.whl").touch()
    (planted / "wheels").mkdir()
    # The script may not take the real lock: /run is not writable for everybody.
    script = (DEPLOY / "install.sh").read_text().replace("/run/rbc-edge-install.lock", str(tmp_path / "lock"))
    copy = planted / "deploy"
    (copy / "systemd").mkdir(parents=True)
    (copy / "install.sh").write_text(script)
    for name in ("requirements.txt", "requirements-prometheus.txt", "requirements-review.txt"):
        (copy / name).touch()
    for name in ("rbc-edge.service", "rbc-edge-review.service", "config.toml"):
        (copy / "systemd" / name).touch()

    said = subprocess.run(
        [
            *("sh", "deploy/install.sh", "rbc_edge-0.1.0-py3-none-any.whl"),
            *("--wheels", "wheels", "--python", "../bin/station_python"),
        ],
        cwd=planted,
        env={"PATH": path, "PYTHONPATH": str(planted), "PYTHONHOME": "/nowhere"},
        check=False,
        capture_output=True,
        text=True,
    )

    assert not (planted / "ran").exists(), (planted / "ran").read_text()
    lines = log.read_text().splitlines()
    assert "python -I - in /" in lines, said.stderr
    assert all(line.endswith(" in /") for line in lines)
    # Paths of the caller are still found, and a Python in a home folder is refused before the lock.
    assert "another install.sh is running" in said.stderr or "in a home folder" in said.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_call_of_python_is_isolated(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    calls = [line for line in lines if _CALL.search(line)]
    assert [line for line in calls if not _ISOLATED.search(line)] == []
    assert len(calls) == {"install.sh": 5, "uninstall.sh": 0}[script.name]
    # `as_service` runs a program of the release, with the environment of the service and in /.
    ours = [line for line in lines if re.search(r"\$release/bin/(?!python)", line)]
    assert all("as_service" in line for line in ours)
    assert "cd /" in lines[: next(i for i, line in enumerate(lines) if "()" in line)]


def test_the_service_runs_nothing_from_its_working_directory(planted: Path) -> None:
    """The service starts its child process with `python -m rbc_edge`."""
    (line,) = directives()["Service.Environment"]
    environment = dict(word.split("=", 1) for word in line.split() if word.startswith("PYTHON"))
    said = subprocess.run(
        [sys.executable, "-m", "rbc_edge", "--version"],
        cwd=planted,
        env={"PATH": os.environ["PATH"], **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert not (planted / "ran").exists()
    assert (said.returncode, said.stdout.split()[0]) == (0, "rbc-edge")

"""Tests the shipped unit, the example of the settings and the scripts."""

import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from rbc_edge.config import Settings, example, load
from tests.docs.test_docs import PROGRAM, parse

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "rbc-edge.service"
REVIEW = DEPLOY / "systemd" / "rbc-edge-review.service"
EXAMPLE = DEPLOY / "systemd" / "config.toml"
SCRIPTS = [DEPLOY / "install.sh", DEPLOY / "uninstall.sh"]

HIGHEST_EXPOSURE = 15
"""Tenths: `systemd-analyze security` says 1.5 or less."""


def directives(unit: Path = UNIT) -> dict[str, list[str]]:
    """The values of a unit by section.key. A key can come more than once."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not here (Debian: apt install systemd)")
    return subprocess.run([program, *arguments], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("shipped", [UNIT, REVIEW], ids=lambda unit: unit.stem)
def test_verify_is_clean(tmp_path: Path, shipped: Path) -> None:
    # The program is not installed where tests run. Apart from that there must be no complaint.
    unit, program = tmp_path / shipped.name, "^ExecStart=/opt/rbc-edge/current/bin/rbc-edge "
    text, n_replaced = re.subn(program, "ExecStart=/bin/true ", shipped.read_text(), flags=re.M)
    assert n_replaced == 1
    unit.write_text(text)

    said = analyze("verify", "--man=no", str(unit))

    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_exposure_is_low() -> None:
    said = analyze("security", "--offline=true", f"--threshold={HIGHEST_EXPOSURE}", "--no-pager", str(UNIT))

    assert said.returncode == 0, said.stdout + said.stderr
    overall = re.search(r"Overall exposure level for rbc-edge.service: ([0-9.]+)", said.stdout)
    assert overall is not None
    assert float(overall[1]) <= HIGHEST_EXPOSURE / 10


def test_the_review_page_has_the_sandbox_of_the_service_and_only_the_loopback() -> None:
    service, page = directives(), directives(REVIEW)
    sandbox = [
        key for key in service if re.search("Protect|Private|Restrict|System|Lock|Deny|Amb|Bound", key)
    ]
    other = {key for key in sandbox if service[key] != page.get(key)}
    assert other == {"Service.PrivateNetwork", "Service.RestrictAddressFamilies"}
    assert (page["Service.IPAddressDeny"], page["Service.IPAddressAllow"]) == (["any"], ["localhost"])
    assert page["Service.User"] == service["Service.User"]
    assert page["Unit.AssertPathExists"] == ["/etc/rbc-edge/review.password"]  # off until it has one
    parse(PROGRAM, page["Service.ExecStart"][0].split()[1:])


def test_exposure_is_measured(tmp_path: Path) -> None:
    """A unit without a sandbox is above the threshold, so the check above can fail."""
    unit = tmp_path / UNIT.name
    unit.write_text("[Service]\nExecStart=/bin/true\n")

    said = analyze("security", "--offline=true", f"--threshold={HIGHEST_EXPOSURE}", "--no-pager", str(unit))

    assert said.returncode != 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Service.Type", "notify"),
        ("Service.NotifyAccess", "main"),
        ("Service.ExecReload", "/bin/sh -c 'kill -HUP $MAINPID'"),
        ("Service.RestartPreventExitStatus", "2 4"),
        ("Service.OOMPolicy", "continue"),
        ("Service.ProtectSystem", "strict"),
        ("Service.PrivateNetwork", "yes"),
        ("Service.UMask", "0027"),
        ("Service.User", "rbc-edge"),
        ("Install.WantedBy", "multi-user.target"),
    ],
)
def test_promises_of_the_documentation(key: str, value: str) -> None:
    assert directives()[key] == [value]


def test_limits_are_set() -> None:
    assert {"Service.MemoryMax", "Service.CPUQuota", "Service.WatchdogSec", "Service.TimeoutStopSec"} <= set(
        directives()
    )


def test_every_relaxation_says_why() -> None:
    """Each line that relaxes the sandbox has a comment above it."""
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    relaxed = [i for i, line in enumerate(lines) if re.match("ProcSubset=all|SystemCallFilter=sched", line)]
    assert relaxed
    assert all(lines[i - 1].startswith("# ") for i in relaxed)


def test_the_example_is_valid_and_names_every_key(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    named = re.findall("^#?([a-z_]+) = ", text, flags=re.M)
    assert sorted(named) == sorted(f.name for f in fields(Settings))

    file = tmp_path / "config.toml"
    file.write_text(text)
    load({}, file=file, env={})


def test_the_example_is_what_config_init_writes() -> None:
    # After a change: rbc-edge config init --file - --source /srv/camera --out /var/lib/rbc-edge
    assert EXAMPLE.read_text(encoding="utf-8") == example(
        source=Path("/srv/camera"), out=Path("/var/lib/rbc-edge")
    )


def test_what_the_example_calls_default_is_the_default() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    default = Settings()
    lines = re.findall("^#([a-z_]+ = .*)$", text, flags=re.M)
    assert len(lines) > 8
    for line in lines:
        ((key, value),) = tomllib.loads(line).items()
        value = tuple(value) if isinstance(value, list) else value
        above = text[: text.index(f"#{line}\n")]
        comment = above[above.rindex("\n\n") :]
        assert getattr(default, key) == (None if "(no default" in comment else value), key


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not here (Debian: apt install shellcheck)")
    said = subprocess.run([program, script], check=False, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("install.sh", [], "no wheel given"),
        ("install.sh", ["a.whl", "b.whl"], "one wheel, not two"),
        ("install.sh", ["--source"], "--source needs a value"),
        ("install.sh", ["--sorce", "/srv"], "unknown option --sorce"),
        ("uninstall.sh", ["--results"], "unknown argument --results"),
    ],
)
def test_wrong_usage_is_exit_2(script: str, arguments: list[str], says: str) -> None:
    said = subprocess.run(["sh", DEPLOY / script, *arguments], check=False, capture_output=True, text=True)
    assert said.returncode == 2
    assert says in said.stderr

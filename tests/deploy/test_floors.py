"""The lowest versions that pyproject.toml allows are those that `.ci/lowest` installs and tests."""

import os
import re

from tests.debian import ROOT
from tests.docs.test_repository import PROJECT as REPOSITORY

PROJECT = REPOSITORY["project"]
LOWEST = ROOT / ".ci" / "lowest"


def test_every_library_of_the_station_has_a_floor_and_nothing_else() -> None:
    """`.ci/lowest` compares the installed version with the floor, so nothing else may stand there."""
    needs = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["prometheus"]]
    assert [need for need in needs if not re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", need)] == []


def test_the_checks_of_a_change_call_it() -> None:
    assert os.access(LOWEST, os.X_OK)
    assert re.search(r"^\.ci/lowest\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    text = LOWEST.read_text(encoding="utf-8")
    assert "--resolution lowest-direct" in text
    named = re.findall(r"tests/edge\S*", text)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_floors_that_did_not_work_stay_out() -> None:
    """Versions with which the tests fail, or with which `rbc-edge run --help` ends with an error."""
    lowest = dict(need.split(">=") for need in PROJECT["dependencies"])
    floors = {name: tuple(int(part) for part in floor.split(".")) for name, floor in lowest.items()}
    assert floors["opencv-python-headless"] > (4, 12)
    assert floors["typer"] > (0, 17)
    assert floors["pillow"] > (11, 0)

"""The lists of libraries for install.sh agree with constraints.txt, and hold a hash for every computer."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy import lock
from tests.docs.test_repository import PROJECT, pinned

STATION = lock.read(lock.STATION)
EXTRAS = {name: lock.read(file) for name, file in lock.EXTRAS.items()}
EVERY = [*STATION.items(), *(item for extra in EXTRAS.values() for item in extra.items())]
COMPILED = ("numpy", "onnxruntime", "pillow", "markupsafe")
"""Packages with a wheel for each Python and each processor."""


def closure(needs: list[str]) -> set[str]:
    """All packages that requirements need, by the metadata of the installed ones."""
    found: set[str] = set()
    left = [Requirement(need) for need in needs]
    while left:
        need = left.pop()
        name = lock.canonical(need.name)
        if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
            found.add(name)
            left += [Requirement(more) for more in distribution(name).requires or []]
    return found


def test_versions_are_those_of_the_constraints() -> None:
    pins = {lock.canonical(name): version for name, version in pinned().items()}
    assert STATION
    for name, (version, _) in EVERY:
        assert (name, version) == (name, pins[name])


def test_they_hold_everything_that_the_station_needs_and_nothing_else() -> None:
    project = PROJECT["project"]
    needs = project["dependencies"]
    assert set(STATION) == closure(needs)
    for name, extra in EXTRAS.items():
        assert set(extra) == closure(project["optional-dependencies"][name]) - closure(needs), name


def test_every_package_has_its_hashes() -> None:
    for name, (_, digests) in EVERY:
        assert digests, name
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests), name
    for name in COMPILED:
        assert len(STATION[name][1]) == len(lock.PYTHONS) * len(lock.MACHINES), name


@pytest.mark.parametrize("file", [lock.STATION, *lock.EXTRAS.values()], ids=lambda file: file.name)
def test_they_name_no_index_and_are_as_written(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search("://|index-url|find-links|trusted-host", text)
    what = (
        text.splitlines()[0]
        .removeprefix("# ")
        .removesuffix(", for install.sh. pip refuses every file with another hash.")
    )
    assert lock.text(what, lock.read(file)) == text


def test_pins_that_differ_between_computers_are_an_error() -> None:
    with pytest.raises(ValueError, match="one list cannot serve"):
        lock.merged([{"a": ("1", frozenset("x"))}, {"a": ("2", frozenset("y"))}])
    assert lock.merged([{"a": ("1", frozenset("x"))}, {"a": ("1", frozenset("y"))}]) == {
        "a": ("1", frozenset("xy"))
    }


def test_install_takes_them_from_the_network_with_hashes() -> None:
    text = (lock.STATION.parent / "install.sh").read_text(encoding="utf-8")
    assert "pip install --require-hashes --only-binary :all:" in text
    assert {file.name for file in (lock.STATION, *lock.EXTRAS.values())} <= set(
        re.findall(r"[\w-]+\.txt", text)
    )

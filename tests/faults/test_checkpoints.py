import importlib
import inspect
from functools import reduce

import pytest

from tests.faults.checkpoints import CHECKPOINTS, resolved
from tests.faults.kills import STEPS


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_is_a_public_function_that_is_there(name: str) -> None:
    module, _, path = CHECKPOINTS[name].at.partition(":")
    found = reduce(getattr, path.split("."), importlib.import_module(module))
    assert callable(found)
    assert not inspect.isgeneratorfunction(found)  # nothing happens in its call
    parts = [*module.split("."), *path.split(".")]
    assert not any(part.startswith("_") for part in parts if part != "__init__")
    assert CHECKPOINTS[name].what


def test_every_checkpoint_is_a_step_of_the_kills() -> None:
    assert {step.at for step in STEPS} == CHECKPOINTS.keys()


def test_a_fault_brings_its_own_match_or_takes_the_checkpoints() -> None:
    assert resolved({"at": "table renamed", "do": "kill"}) == {
        "at": "os:replace",
        "do": "kill",
        "match": r"\.csv\.tmp$",
    }
    assert resolved({"at": "table renamed", "match": "x"})["match"] == "x"
    with pytest.raises(KeyError):
        resolved({"at": "os:replace"})

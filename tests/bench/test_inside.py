import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from bench.children import module, run
from bench.inside import Probe
from rbc_edge.ops import synthetic


class Ticks:
    """A clock that goes only when told."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def works(self, seconds: float) -> None:
        self.s += seconds


def test_a_stage_is_its_own_time() -> None:
    clock = Ticks()
    probe = Probe(clock)
    inner = probe.around("inner", lambda: clock.works(2))

    def both() -> None:
        clock.works(1)
        inner()
        clock.works(4)

    probe.around("outer", both)()
    clock.works(100)
    inner()
    assert probe.seconds == {"outer": 5.0, "inner": 4.0}


def test_a_whole_stage_keeps_what_it_calls() -> None:
    clock = Ticks()
    probe = Probe(clock)
    inner = probe.around("inner", lambda: clock.works(2))

    def both() -> None:
        clock.works(1)
        inner()
        inner()

    probe.around("whole", both, whole=True)()
    inner()
    assert probe.seconds == {"whole": 5.0, "inner": 2.0}


def test_a_stage_that_raises_is_timed_too() -> None:
    clock = Ticks()
    probe = Probe(clock)

    def fails() -> None:
        clock.works(3)
        raise ValueError

    with pytest.raises(ValueError):
        probe.around("fails", fails)()
    clock.works(5)
    probe.around("next", lambda: clock.works(1))()
    assert probe.seconds == {"fails": 3.0, "next": 1.0}


def test_a_stage_is_timed_wherever_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> str:
        return "done"

    home, user = SimpleNamespace(work=work, __name__="home"), SimpleNamespace(also=work)
    monkeypatch.setitem(sys.modules, "rbc_edge_user_of_it", user)
    probe = Probe()
    probe.attach("work", home, "work")
    assert home.work() == user.also() == "done"
    assert home.work is user.also is not work
    with pytest.raises(SystemExit, match="has no gone"):
        probe.attach("gone", home, "gone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    fields = synthetic.draw_slide(
        np.random.default_rng(5), 2, width_px=320, height_px=256, cell_diameter_px=60.0
    )
    for i, field in enumerate(fields):
        (folder / f"{i}.jpg").write_bytes(cv2.imencode(".jpg", field.image[:, :, ::-1])[1].tobytes())
    return folder


def test_the_stages_are_those_of_the_program(folder: Path) -> None:
    told = run(module("inside", "stages", folder), threads=1).json()
    assert told["n"] == 2
    wanted = {"decode", "scale", "detect", "suppress", "crop", "classify", "ledger", "CSV"}
    assert wanted <= {stage for stage, ms in told["ms"].items() if ms > 0}
    assert 0 < told["elapsed_ms"] <= sum(told["ms"].values()) * 1.5  # most of the time has a name


def test_the_floor_runs_what_was_prepared(folder: Path, tmp_path: Path) -> None:
    prepared = run(module("inside", "prepare", folder, tmp_path / "ready.npz"), threads=1).json()
    assert prepared["n"] == 2
    assert prepared["cells"] >= prepared["crops"] > 4
    floor = json.loads(run(module("inside", "floor", tmp_path / "ready.npz"), threads=1).output)
    assert floor["n"] == 2
    assert floor["ms"] == min(floor["ways"].values())
    assert all(ms > 0 for ms in floor["parts"].values())

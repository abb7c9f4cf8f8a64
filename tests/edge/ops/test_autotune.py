import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from stand_in import write_disks

from rbc_edge.errors import ExitCode, UnavailableError, UsageError
from rbc_edge.ops import autotune
from rbc_edge.ops.autotune import Setup, Speed, best, measure, settings_of, setups
from rbc_edge.station.session import CountOptions, Summary
from rbc_edge.views.tables import summarize
from rbc_edge.vision.bundle import CLASSIFIER, CLASSIFIER_FP32, DETECTOR, DETECTOR_FP32, Bundle, write
from rbc_edge.vision.counting import EdgeRule

Rbc = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    for i in range(6):
        write_disks(tmp_path / "camera" / f"s{i % 2}" / f"{i}.png", 4 + i, seed=i)
    return tmp_path / "camera"


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "BUDGET_S", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def speed(threads: int, fields_per_s: float, precision: str = "int8") -> Speed:
    return Speed(
        Setup(threads, precision),
        fields_per_s,
        fields_per_s,
        fields_per_s,
        cells_per_s=20 * fields_per_s,
        n_rounds=3,
    )


def test_all_threads_of_a_small_machine_are_tried(toy_bundle_path: Path) -> None:
    bundle = Bundle.open(toy_bundle_path)
    assert [w.threads for w in setups(bundle, 3)] == [1, 2, 3]
    assert [w.threads for w in setups(bundle, 6)] == [1, 2, 3, 4, 6]
    assert max(w.threads for w in setups(bundle, 500)) == 64  # what the settings take
    assert {w.precision for w in setups(bundle, 1)} == {"int8"}  # the toy bundle has no other


def test_the_best_is_the_fastest_and_a_thread_has_to_gain() -> None:
    assert best([speed(1, 10), speed(2, 19), speed(3, 19.2), speed(4, 19.5)]).setup.threads == 2
    assert best([speed(1, 10), speed(2, 9)]).setup.threads == 1
    assert best([speed(1, 10), speed(2, 20), speed(1, 10, "fp32"), speed(2, 20.5, "fp32")]).setup == Setup(
        2, "int8"
    )
    assert best([speed(1, 10), speed(2, 20), speed(1, 15, "fp32"), speed(2, 25, "fp32")]).setup == Setup(
        2, "fp32"
    )


def test_a_precision_is_written_where_there_was_a_choice() -> None:
    both = [speed(1, 10), speed(1, 9, "fp32")]
    assert settings_of(both, both[0]) == {"threads": 1, "precision": "int8"}
    assert settings_of(both[:1], both[0]) == {"threads": 1}


def test_the_other_detector_is_tried_and_its_counts_are_other_counts(
    toy_bundle_path: Path, tmp_path: Path, rbc: Rbc, camera: Path
) -> None:
    toy = Bundle.open(toy_bundle_path)
    files = {name: toy_bundle_path / name for name in toy.manifest.files}
    files |= {DETECTOR_FP32: files[DETECTOR], CLASSIFIER_FP32: files[CLASSIFIER]}
    both = write(tmp_path / "both", files, toy.manifest)
    assert [w.precision for w in setups(both, 2)] == ["int8", "int8", "fp32", "fp32"]
    out = tmp_path / "out"
    for precision, stands in (("int8", both.bundle_id), ("fp32", f"{both.bundle_id}+fp32")):
        arguments = ("run", camera, "--out", out, "--bundle", both.path, "--precision", precision, "--json")
        code, said, _ = rbc(*arguments)
        assert code == ExitCode.OK
        assert json.loads(said)["n_counted"] == 6
        assert f",{stands}," in (out / "s0.csv").read_text()
        assert json.loads(rbc(*arguments)[1])["n_counted"] == 0
    code, _, said = rbc("run", camera, "--out", out, "--bundle", toy_bundle_path, "--precision", "fp32")
    assert code == ExitCode.BUNDLE
    assert "holds no detector-fp32.onnx" in said
    assert rbc("run", camera, "--out", out, "--precision", "fp16")[0] == ExitCode.USAGE


def test_every_setup_has_its_turn_in_every_round(
    toy_bundle_path: Path, camera: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[int, int]] = []
    now_s = 0.0

    def count_once(paths: Sequence[Path], options: CountOptions) -> Summary:
        nonlocal now_s
        options.recipe.make()
        turns.append((options.workers, len(paths)))
        now_s += 0.5 if len(turns) % 2 else 1.0
        return Summary(len(paths), slides=[summarize("s", [], EdgeRule.ALL)])

    monkeypatch.setattr(autotune, "count_once", count_once)
    said: list[str] = []
    monkeypatch.setattr(autotune, "BUDGET_S", 6.0)
    monkeypatch.setattr(autotune, "monotonic", lambda: now_s)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    speeds = measure(Bundle.open(toy_bundle_path), camera, said.append)
    # One to warm up, and three rounds: a fourth would end after six seconds.
    assert turns == [(1, 6), *[(1, 6), (2, 6)] * 3]
    assert [s.setup.threads for s in speeds] == [1, 2]
    assert [s.n_rounds for s in speeds] == [len(said)] * 2 == [3, 3]
    assert [s.fields_per_s for s in speeds] == [6.0, 12.0]


@pytest.mark.usefixtures("in_a_hurry")
def test_a_missing_folder_is_reported(toy_bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nowhere"):
        measure(Bundle.open(toy_bundle_path), tmp_path / "nowhere")


@pytest.mark.usefixtures("in_a_hurry")
def test_images_that_cannot_be_counted_are_refused(toy_bundle_path: Path, camera: Path) -> None:
    (camera / "s0" / "0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="1 of 6 images cannot be counted"):
        measure(Bundle.open(toy_bundle_path), camera)
    (camera / "empty").mkdir()
    with pytest.raises(UnavailableError, match="no image found"):
        measure(Bundle.open(toy_bundle_path), camera / "empty")


def test_the_command(
    toy_bundle_path: Path, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rbc: Rbc
) -> None:
    monkeypatch.setattr(autotune, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(autotune, "_TURN_S", 0.0)

    before = sorted(p.stat().st_mtime_ns for p in camera.rglob("*"))
    code, out, err = rbc("bench", camera, "--bundle", toy_bundle_path, "--json", "--apply")
    told = json.loads(out)
    threads = told["best"]["threads"]
    assert code == ExitCode.OK
    assert [t["threads"] for t in told["tried"]] == [
        w.threads for w in setups(Bundle.open(toy_bundle_path), len(os.sched_getaffinity(0)))
    ]
    assert (tmp_path / "xdg" / "rbc-edge" / "config.toml").read_text() == f"threads = {threads}\n"
    assert f"threads = {threads} written to" in err
    assert sorted(p.stat().st_mtime_ns for p in camera.rglob("*")) == before

    file = tmp_path / "mine.toml"
    file.write_text("cells = true\n")
    monkeypatch.setattr(autotune, "measure", lambda *_, **__: [speed(1, 5.0), speed(2, 9.0)])
    code, out, _ = rbc("bench", camera, "--bundle", toy_bundle_path, "--write-config", file)
    assert code == ExitCode.OK
    assert "best: threads = 2 (9.0 fields a second" in out
    assert file.read_text() == "cells = true\nthreads = 2\n"

    assert rbc("bench", camera, "--apply", "--write-config", file)[0] == ExitCode.USAGE
    assert rbc("bench", camera, "--bundle", tmp_path)[0] == ExitCode.BUNDLE
    file.write_text("bad = 1\n")
    code, out, err = rbc("bench", "--write-config", file)
    assert (code, out) == (ExitCode.USAGE, "")  # reported before the measurement
    assert "bad" in err

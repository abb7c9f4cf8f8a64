"""The demo: drawn slides with known counts, counted like any slide."""

import contextlib
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rbc_edge.errors import BundleError, UnavailableError
from rbc_edge.ops import demo
from rbc_edge.station.session import Summary, count_once
from rbc_edge.values import Counts


def run(out: Path | None, bundle: Path, *, seed: int = 0, json_output: bool = False) -> int:
    return demo.run_demo(out, bundle=bundle, threads=1, seed=seed, json_output=json_output)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def shown(toy_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo with the toy bundle: its folder, and its JSON."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(out, toy_bundle_path, json_output=True) == 0
    return out, json.loads(printed.getvalue())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer fields: what is not about counts needs no more."""
    monkeypatch.setattr(demo, "_SLIDES", tuple(replace(slide, n_fields=2) for slide in demo._SLIDES))


@pytest.mark.usefixtures("short")
def test_without_a_folder_it_leaves_nothing_behind(
    toy_bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(None, toy_bundle_path) == 0
    said = capsys.readouterr().out
    assert "--out DIR" in said and str(tmp_path) not in said
    assert list(tmp_path.iterdir()) == []


def test_it_names_its_folder(shown: tuple[Path, dict[str, Any]]) -> None:
    out, said = shown
    assert said["out"] == str(out)
    assert said["results"] == str(out / "results")
    assert (out / "results" / "slides.csv").exists()


def test_it_counts_near_the_truth_even_with_a_toy(shown: tuple[Path, dict[str, Any]]) -> None:
    for slide in shown[1]["slides"]:
        assert slide["n_rbc"]["truth"] > 100
        assert abs(slide["n_rbc"]["error"]) < 0.2
        diameter = slide["cell_diameter_px"]
        assert 0.8 < diameter["estimated"] / diameter["truth"] < 1.25


def test_the_truth_adds_up(shown: tuple[Path, dict[str, Any]]) -> None:
    out, said = shown
    fields = rows(out / "truth.csv")
    assert len(fields) == sum(slide["n_fields"] for slide in said["slides"])
    for row in fields:
        assert int(row["n_rbc"]) == int(row["n_rbc_single"]) + int(row["n_rbc_overlapping"])
    for column in ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets"):
        assert sum(int(row[column]) for row in fields) == said["all"][column]["truth"]
        assert said["all"][column]["truth"] == sum(slide[column]["truth"] for slide in said["slides"])
        assert said["all"][column]["counted"] == sum(slide[column]["counted"] for slide in said["slides"])


def test_what_it_says_is_what_the_tables_say(shown: tuple[Path, dict[str, Any]]) -> None:
    out, said = shown
    by_slide = {row["slide_id"]: row for row in rows(out / "results" / "slides.csv")}
    assert set(by_slide) == {slide["slide_id"] for slide in said["slides"]}
    for slide in said["slides"]:
        row = by_slide[slide["slide_id"]]
        assert int(row["n_fov_ok"]) == slide["n_fields"]
        for column in ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets"):
            assert int(row[column]) == slide[column]["counted"]
        images = list((out / "images" / slide["slide_id"]).iterdir())
        assert len(images) == slide["n_fields"]


def test_slides_differ_in_size_and_format(shown: tuple[Path, dict[str, Any]]) -> None:
    out, said = shown
    diameters = [slide["cell_diameter_px"]["truth"] for slide in said["slides"]]
    assert max(diameters) > 1.3 * min(diameters)
    assert {file.suffix for file in (out / "images").rglob("*.*")} == {".jpg", ".png"}


@pytest.mark.usefixtures("short")
def test_table_on_the_screen_and_a_second_seed_in_the_same_folder(
    toy_bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, toy_bundle_path, seed=1) == 0
    first = capsys.readouterr().out
    assert run(tmp_path, toy_bundle_path, seed=2) == 0
    second = capsys.readouterr().out
    assert first != second, "the second seed's images must be counted again"
    for text in (first, second):
        truth, counted = re.search(r"\nall +\d+ +red cells +(\d+) +(\d+) +[-+]\d+\.\d%\n", text).groups()  # type: ignore[union-attr]
        assert 0.75 < int(counted) / int(truth) < 1.2
    assert str(tmp_path / "results") in second
    assert (tmp_path / "results" / "reports" / "index.html").exists()
    assert f"Open {tmp_path / 'results' / 'reports' / 'index.html'}" in second
    all_truth = sum(int(row["n_rbc"]) for row in rows(tmp_path / "truth.csv"))
    assert f" {all_truth} " in second


@pytest.mark.usefixtures("short")
def test_same_seed_draws_the_same_bytes(tmp_path: Path) -> None:
    truth = [demo._draw(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    a, b, c = (
        [file.read_bytes() for file in sorted((tmp_path / name).rglob("*.*"))] for name in ("a", "b", "c")
    )
    assert len(a) == 2 * 3 + 1
    assert a == b
    assert all(one != other for one, other in zip(a, c, strict=True))
    assert truth[0] == truth[1] != truth[2]


def test_without_a_bundle_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        run(tmp_path / "out", tmp_path / "no bundle here")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("short")
def test_an_output_folder_that_cannot_be_made_is_named(toy_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UnavailableError, match="file") as caught:
        run(tmp_path / "file", toy_bundle_path)
    assert caught.value.exit_code == 5


@pytest.mark.usefixtures("short")
def test_a_stopped_demo_compares_nothing(
    toy_bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped_at_once(*args: Any, stop: Any, **kwargs: Any) -> Summary:
        stop.signal = 15
        return count_once(*args, stop=stop, **kwargs)

    monkeypatch.setattr(demo, "count_once", stopped_at_once)
    assert run(tmp_path, toy_bundle_path) == 143
    said = capsys.readouterr()
    assert said.out == ""
    assert "stopped" in said.err


def test_what_could_not_be_counted_is_no_zero() -> None:
    truth = demo._sum([Counts(3, 2, 1, 0), Counts(1, 0, 0, 0)])
    assert truth == Counts(4, 2, 1, 0)
    assert demo._sum_if_all([truth, None]) is None
    unknown, wrong, right = (
        demo._Compared("s", 1, truth, counted) for counted in (None, Counts(3, 3, 1, 2), truth)
    )
    assert unknown.as_lines()[0] == ("s", "1", "red cells", "6", "-", "-")
    assert wrong.as_lines()[-1] == ("", "", "platelets", "0", "2", "-")
    assert wrong.as_json()["n_rbc_single"] == {"truth": 4, "counted": 3, "error": pytest.approx(-0.25)}
    assert right.as_json()["n_rbc"] == {"truth": 6, "counted": 6, "error": 0}

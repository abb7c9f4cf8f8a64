"""``forget``, ``exclude`` and ``set`` from the command line, on a folder that was counted."""

import csv
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import TOY_BUNDLE

Rbc = Callable[..., tuple[int, str, str]]


@pytest.fixture
def out(rbc: Rbc, camera: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    assert rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)[0] == 0
    return out


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_forgotten_and_back(rbc: Rbc, camera: Path, out: Path) -> None:
    before = table(out, "s1"), table(out, "slides")
    code, said, _ = rbc("forget", "s1", "1", "--out", out)
    assert (code, said) == (0, "s1: 1 field forgotten; --undo brings them back\n")
    assert [row["fov"] for row in table(out, "s1")] == ["0", "2"]
    assert table(out, "slides")[0]["n_fov_ok"] == "2"
    again = rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    assert again[0] == 0
    assert "0 counted now, 2 counted before, 0 duplicates, 0 failed, 1 excluded" in again[1]
    assert len(table(out, "s1")) == 2
    assert rbc("forget", "s1", "--out", out)[0] == 0
    assert (out / "s1.csv").exists() is False
    assert table(out, "slides") == []
    assert rbc("forget", "s1", "--undo", "--out", out)[0] == 0
    assert (table(out, "s1"), table(out, "slides")) == before


def test_excluded_says_why(rbc: Rbc, out: Path) -> None:
    before = table(out, "s1")
    assert rbc("exclude", "s1", "0", "--reason", "=blurred", "--out", out)[0] == 0
    row = table(out, "s1")[0]
    assert [row[name] for name in ("status", "reason", "n_rbc", "overlap_fraction")] == [
        *("excluded", "'=blurred", "", "")
    ]
    assert table(out, "slides")[0]["n_fov_ok"] == "2"
    assert rbc("exclude", "s1", "--undo", "--out", out)[0] == 0
    assert table(out, "s1") == before


def test_a_scale_that_was_set_comes_before_all_others(rbc: Rbc, camera: Path, out: Path) -> None:
    code, said, _ = rbc("set", "s1", "--um-per-px", 0.15, "--out", out)
    assert (code, said) == (0, "s1: a red cell is 50 px wide; 3 fields to be counted again\n")
    rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    assert {(r["cell_diameter_px"], r["scale_source"]) for r in table(out, "s1")} == {("50.00", "um-per-px")}
    rbc("set", "s1", "--undo", "--out", out)
    rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    assert {r["cell_diameter_px"] for r in table(out, "s1")} == {"40.00"}


@pytest.mark.parametrize("command", ["forget", "exclude", "retry", "report", "set --undo"])
def test_an_unknown_slide_is_told_in_the_same_words_everywhere(rbc: Rbc, out: Path, command: str) -> None:
    code, _, complained = rbc(*command.split(), "nosuch", "--out", out)
    first = "rbc-edge: no slide 'nosuch' in the ledger\n"
    assert (code, complained[: len(first)]) == (2, first)
    assert "s1" in complained[len(first) :]
    if command != "report" and "set" not in command:
        code, _, complained = rbc(*command.split(), "s1", "nosuch", "--out", out)
        assert (code, "no field of view 'nosuch' in slide 's1'" in complained) == (2, True)


def test_status_tells_how_many_images_are_gone(rbc: Rbc, camera: Path, out: Path) -> None:
    assert "no longer" not in rbc("status", "--out", out)[1]
    next(camera.rglob("*.png")).unlink()
    assert (
        "gone           1 counted image no longer in the folder; their counts stay"
        in rbc("status", "--out", out)[1]
    )
    assert json.loads(rbc("status", "--json", "--out", out)[1])["n_gone"] == 1


@pytest.mark.parametrize(
    "words",
    ["forget nosuch", "forget s1 nosuch", "exclude s1 nosuch", "set s1", "set s1 --undo --um-per-px 1"],
)
def test_what_cannot_be_done_is_wrong_usage(rbc: Rbc, out: Path, words: str) -> None:
    before = table(out, "s1")
    assert rbc(*words.split(), "--out", out)[0] == 2
    assert table(out, "s1") == before


@pytest.mark.parametrize("content", ["guess", b"\xff\x00"])
def test_a_damaged_edge_rule_is_said_and_stops_nothing(rbc: Rbc, out: Path, content: object) -> None:
    with sqlite3.connect(out / "ledger.sqlite3") as db:
        db.execute("UPDATE note SET content = ? WHERE name = 'edges'", (content,))
    db.close()
    for words in ("forget s1 0", "report"):
        code, _, said = rbc(*words.split(), "--out", out)
        assert (code, "edge rule of the tables is damaged" in said) == (0, words == "forget s1 0")
    assert [row["fov"] for row in table(out, "s1")] == ["1", "2"]


def test_pages_and_overlays_that_exist_follow_a_decision(rbc: Rbc, camera: Path, out: Path) -> None:
    counting = ("--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    assert rbc("run", camera, *counting, "--report", "--overlays")[0] == 0
    page, overlay = out / "reports" / "s1.html", out / "overlays" / "s1" / "0_overlay.jpg"
    before = page.read_text()
    assert rbc("exclude", "s1", "0", "--out", out)[0] == 0
    assert not overlay.exists()
    assert page.read_text() != before

"""Results: pages are made of sections, sections of what was found, and nothing else."""

import json
import math
from pathlib import Path

import pytest

from rbc_edge.errors import UnavailableError
from rbc_train import results
from rbc_train.results import Chart, Section, Table


def section(name: str = "metrics", **changes: object) -> Section:
    given: dict[str, object] = {
        "name": name,
        "page": "results",
        "title": name.upper(),
        "command": f"do {name}",
    }
    return Section(**{**given, **changes})  # type: ignore[arg-type]


def test_json_has_no_nan() -> None:
    figures = {"a": {"b": math.nan, "c": 0.1234567, "d": 3}, "e": math.inf, "f": [math.nan, (1.0,)], 3: "x"}
    rounded = {"a": {"b": None, "c": 0.12346, "d": 3}, "e": None, "f": [None, [1.0]], "3": "x"}
    assert results.plain(figures) == rounded
    json.dumps(results.plain(figures), allow_nan=False)


def test_a_page_holds_its_sections_in_the_order_of_the_house(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "results"
    table = Table("Counts", ("who", "n"), (("a|b", "1.5 %"), ("c", "2")))
    results.publish(section("scale", text=("Some words.",)), folder)
    page = results.publish(section("metrics", tables=(table,), data={"x": 0.25}), folder)
    results.publish(section("paper", page="paper"), folder)
    assert page == tmp_path / "docs" / "results.md"
    text = page.read_text(encoding="utf-8")
    assert (
        text.index("## METRICS")
        < text.index("`do metrics`")
        < text.index("## SCALE")
        < text.index("Some words.")
    )
    assert "| who | n |\n| --- | --: |\n| a\\|b | 1.5 % |\n| c | 2 |\n" in text
    assert "PAPER" not in text
    assert "## PAPER" in (tmp_path / "docs" / "paper.md").read_text(encoding="utf-8")
    assert results.read_section("metrics", folder) == {"x": 0.25}


def test_running_a_command_again_renews_its_section_only(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    results.publish(section("scale", text=("before",)), folder)
    results.publish(section("metrics", text=("kept",)), folder)
    page = results.publish(section("scale", text=("after",)), folder).read_text(encoding="utf-8")
    assert "before" not in page and "after" in page and "kept" in page
    assert not list(tmp_path.rglob("*.tmp"))


def test_pictures_are_linked_from_the_page_and_must_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    drawn = section(pictures=(Chart("metrics-roc.png", "ROC of two networks"),))
    with pytest.raises(UnavailableError, match="was not drawn"):
        results.publish(drawn, folder)
    folder.mkdir()
    (folder / "metrics-roc.png").write_bytes(b"png")
    text = results.publish(drawn, folder).read_text(encoding="utf-8")
    assert "![ROC of two networks](results/metrics-roc.png)" in text


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not a section of results"):
        results.read_section("metrics", tmp_path)


def test_mistakes_of_ours_are_caught() -> None:
    with pytest.raises(ValueError, match="no page has a place"):
        section("unheard-of")
    with pytest.raises(ValueError, match="2 cells in a row of 1"):
        Table("t", ("a",), (("1", "2"),))

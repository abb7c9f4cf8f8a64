"""Results: pages are made of sections, sections of what was found, and nothing else."""

import json
import math
from pathlib import Path
from typing import get_args

import jinja2
import pytest

from rbc_edge.errors import UnavailableError
from rbc_train import results
from rbc_train.results import Chart, Section, Table


def section(name: str = "metrics", **changes: object) -> Section:
    return Section(**{"name": name, "command": f"do {name}", **changes})  # type: ignore[arg-type]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short templates in place of ours."""
    one = (
        "{{% if {0} %}}\n## {1}\n\n`{{{{ {0}.command }}}}`\n\n"
        "{{{{ {0}.data.said }}}}\n\n{{{{ {0} | shown }}}}\n{{% endif %}}\n"
    )
    pages = {
        "results.md": one.format("metrics", "METRICS") + one.format("scale", "SCALE"),
        "paper.md": one.format("paper", "PAPER"),
    }
    monkeypatch.setattr(results, "_LOADER", jinja2.DictLoader(pages))


def test_json_has_no_nan() -> None:
    figures = {"a": {"b": math.nan, "c": 0.1234567, "d": 3}, "e": math.inf, "f": [math.nan, (1.0,)], 3: "x"}
    rounded = {"a": {"b": None, "c": 0.12346, "d": 3}, "e": None, "f": [None, [1.0]], "3": "x"}
    assert results.plain(figures) == rounded
    json.dumps(results.plain(figures), allow_nan=False)


@pytest.mark.usefixtures("words")
def test_a_page_holds_its_sections_in_the_order_of_its_template(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "results"
    table = Table("Counts", ("who", "n"), (("a|b", "1.5 %"), ("c", "2")))
    results.publish(section("scale", data={"said": "Some words."}), folder)
    page = results.publish(section("metrics", tables=(table,), data={"said": "", "x": 0.25}), folder)
    results.publish(section("paper", data={"said": ""}), folder)
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
    assert results.read_section("metrics", folder) == {"said": "", "x": 0.25}


@pytest.mark.usefixtures("words")
def test_running_a_command_again_renews_its_section_only(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    results.publish(section("scale", data={"said": "before"}), folder)
    results.publish(section("metrics", data={"said": "kept"}), folder)
    page = results.publish(section("scale", data={"said": "after"}), folder).read_text(encoding="utf-8")
    assert "before" not in page and "after" in page and "kept" in page
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("words")
def test_charts_are_linked_from_the_page_and_must_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    drawn = section(data={"said": ""}, charts=(Chart("metrics-roc.png", "ROC of two networks"),))
    with pytest.raises(UnavailableError, match="was not drawn"):
        results.publish(drawn, folder)
    folder.mkdir()
    (folder / "metrics-roc.png").write_bytes(b"png")
    text = results.publish(drawn, folder).read_text(encoding="utf-8")
    assert "![ROC of two networks](results/metrics-roc.png)" in text


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not a section of results"):
        results.read_section("metrics", tmp_path)


@pytest.mark.usefixtures("words")
def test_a_section_that_is_older_than_the_words_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="older than its words"):
        results.publish(section("scale"), tmp_path / "results")


@pytest.mark.parametrize("page", get_args(results.Page))
def test_the_pages_in_docs_are_what_their_sections_give(page: results.Page) -> None:
    """Else somebody edited a page, or a template without `python -m rbc_train pages`."""
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / f"{page}.md").read_text(encoding="utf-8") == results.render(page, docs / "results")


def test_mistakes_of_ours_are_caught() -> None:
    with pytest.raises(ValueError, match="no page has a place"):
        section("unheard-of")
    with pytest.raises(ValueError, match="2 cells in a row of 1"):
        Table("t", ("a",), (("1", "2"),))

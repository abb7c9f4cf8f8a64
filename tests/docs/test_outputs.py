"""The outputs that README and docs/ show are those that the commands print now."""

import importlib.util
import platform
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_outputs", ROOT / "docs" / "outputs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


outputs = _script()


def comparable(text: str) -> str:
    """The text. Without its numbers where int8 networks round in another way (docs/hardware.md)."""
    return text if platform.machine() == "x86_64" else re.sub(r"[-+]?\d[\d.%]*| +", " ", text)


@pytest.mark.slow
@pytest.mark.parametrize("page", outputs.pages(), ids=lambda page: page.name)
def test_shown_outputs_are_printed_now(page: Path) -> None:
    only = outputs.places(page) - outputs.NEED_DATA
    assert comparable(outputs.made(page, only)) == comparable(page.read_text(encoding="utf-8"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not outputs.DATA.is_dir(), reason="no public data: ../shared or RBC_DATA")
@pytest.mark.parametrize("page", outputs.pages(), ids=lambda page: page.name)
def test_shown_outputs_of_photographs_are_printed_now(page: Path) -> None:
    only = outputs.places(page) & outputs.NEED_DATA
    assert comparable(outputs.made(page, only)) == comparable(page.read_text(encoding="utf-8"))


def test_every_shown_output_is_marked() -> None:
    """A block with a command and what it prints has a mark, so that the script makes it."""
    for page in [ROOT / "README.md", ROOT / "docs" / "first-slide.md"]:
        text = page.read_text(encoding="utf-8")
        shown = re.findall(r"^((?:<!-- .* -->\n)?)```\w*\n(\$ .*?)^```$", text, re.M | re.S)
        for mark, body in shown:
            if any(not line.startswith("$ ") for line in body.splitlines()):
                assert mark.startswith("<!-- output: "), f"{page.name}: {body.splitlines()[0]}"


def test_places_exist() -> None:
    assert set().union(*map(outputs.places, outputs.pages())) == set(outputs.PLACES)


def test_make_demo_is_the_command_that_is_run_for_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo: .*\n\t\$\(BIN\)/rbc-edge demo --out demo\n\n", makefile, re.M)


def test_rows_come_from_the_page_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(
        "**Targets; by hand**\n\n| x | n | m |\n|---|---|---|\n| p | 1 | 2 |\n"
    )
    monkeypatch.setattr(outputs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- rows: a.md, Targets -->\n| what | m |\n|---|---|\n| p | 7 |\n<!-- end -->\n")
    assert "| p | 2 |" in outputs.made(page, ())
    page.write_text("<!-- rows: a.md, Targets -->\n| what | m |\n|---|---|\n| q | 7 |\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="nothing is called"):
        outputs.made(page, ())

from pathlib import Path

import pytest
from command_line import Run
from stand_in import TOY_BUNDLE

pytestmark = pytest.mark.usefixtures("own_settings")


def test_run_makes_pictures_and_pages_and_report_names_them(rbc: Run, camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    counting = ("--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    code, said, complained = rbc("run", camera, "--out", out, *counting, "--overlays", "--report")
    assert (code, complained) == (0, "")
    assert said.endswith(f"Open {out / 'reports' / 'index.html'} to look at them\n")
    assert len(list((out / "overlays" / "s1").iterdir())) == 3
    assert {p.name for p in (out / "reports").iterdir()} == {"index.html", "s1.html"}
    assert "score at least" in (out / "reports" / "s1.html").read_text()
    page, index = out / "reports" / "s1.html", out / "reports" / "index.html"
    page.unlink()
    code, said, complained = rbc("report", "--out", out, "--bundle", TOY_BUNDLE)
    assert (code, said.splitlines(), complained) == (0, [str(page), str(index)], "")
    assert page.exists()
    code, said, _ = rbc("report", "s1", "--out", out, "--images", 1)
    assert code == 0 and page.read_text().count("<figure ") == 1


def test_report_counts_as_the_tables_beside_it_unless_told_otherwise(
    rbc: Run, camera: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40, "--edges", "inside")
    rbc("report", "--out", out)
    assert "inside: cells that touch" in (out / "reports" / "s1.html").read_text()
    rbc("report", "--out", out, "--edges", "all")
    assert "all: every cell counts" in (out / "reports" / "s1.html").read_text()


def test_report_says_what_is_missing(rbc: Run, camera: Path, tmp_path: Path) -> None:
    code, _, complained = rbc("report", "--out", tmp_path / "nothing")
    assert code == 5 and "no ledger.sqlite3 there" in complained
    assert not (tmp_path / "nothing").exists()
    out = tmp_path / "out"
    rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    code, _, complained = rbc("report", "s2", "--out", out)
    assert code == 2 and "no slide 's2'" in complained and "did you mean s1?" in complained
    code, said, complained = rbc("report", "--out", out, "--bundle", tmp_path / "no-bundle")
    assert code == 0 and "the thresholds cannot be shown" in complained and said

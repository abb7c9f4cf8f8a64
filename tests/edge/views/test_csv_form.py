"""Tables that a double click in Excel opens rightly."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import Cells, Detections, FovResult, InboxFile, Scale, ScaleSource
from rbc_edge.views.csv_form import CsvForm
from rbc_edge.views.tables import Tables

# Ids that Excel takes for a number, a date, a time, a truth value or a formula.
NAMES = ("007", "17", "1-2", "MAR1", "1E5", "2024-05-01", "1/2", "1.5", "1,5", "TRUE", "=1+1", "a;=2", "žába")


def a_result() -> FovResult:
    boxes = np.array([[1, 2, 41.5, 42], [60, 2, 99, 42], [60, 60, 99, 99]], np.float32)
    cells = Cells(
        Detections(boxes, np.full(3, 0.98768, np.float32), np.zeros(3, np.int64)),
        np.array([0.25, 0.75, 0.25], np.float32),
        np.array([False, True, False]),
        np.array([0, 1, 0], np.int64),
        np.zeros((3, 4), np.bool_),
    )
    return FovResult(640, 480, Scale(40.126, ScaleSource.SLIDE), cells, ("blurred", "dark"))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path) as opened:
        for i, name in enumerate(NAMES):
            for fov in (name, "other"):
                file = InboxFile(Path("/in") / f"{i}" / f"{fov.replace('/', '_')}.png", name, fov, 1, 1)
                look = Look(
                    file, f"sha{i}{fov[0].isalpha()}{fov == name}", elapsed_ms=12.34, result=a_result()
                )
                opened.record(look, Version("1234567812345678", "estimated"), "2025-01-02T03:04:05Z")
        yield opened


def as_excel_reads(path: Path, separator: str) -> list[dict[str, str]]:
    """The cells, after a reading as Excel does it: in UTF-8 only with a BOM, split at its own separator."""
    data = path.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(data.decode("utf-8-sig").splitlines(), delimiter=separator))
    assert {len(row) for row in rows} == {len(rows[0])}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def everything(out: Path, form: CsvForm) -> dict[str, list[dict[str, str]]]:
    return {
        str(path.relative_to(out)): as_excel_reads(path, form.separator)
        if form is not CsvForm.PLAIN
        else list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        for path in sorted(out.rglob("*.csv"))
    }


@pytest.mark.parametrize("form", [CsvForm.EXCEL_COMMA, CsvForm.EXCEL_POINT])
def test_a_table_for_excel_holds_the_same(ledger: Ledger, tmp_path: Path, form: CsvForm) -> None:
    Tables(tmp_path, ledger, cells=True).write()
    plain = everything(tmp_path, CsvForm.PLAIN)
    Tables(tmp_path, ledger, cells=True, form=form).write()
    shown = everything(tmp_path, form)
    assert len(shown) == 2 * len(NAMES) + 1

    def undone(column: str, text: str) -> str:
        return text[1:] if text.startswith("\t") else text if "_at" in column else text.replace(",", ".")

    as_plain = {
        name: [{k: undone(k, v) for k, v in row.items()} for row in rows] for name, rows in shown.items()
    }
    assert as_plain == plain
    has_comma = any("," in row["overlap_fraction"] for row in shown["slides.csv"])
    assert has_comma is (form is CsvForm.EXCEL_COMMA)


def test_ids_are_text_and_no_formula_begins_a_cell(ledger: Ledger, tmp_path: Path) -> None:
    for form in (CsvForm.EXCEL_COMMA, CsvForm.EXCEL_POINT):
        Tables(tmp_path, ledger, cells=True, form=form).write()
        for rows in everything(tmp_path, form).values():
            for row in rows:
                ids = [row[k] for k in ("slide_id", "fov", "path", "sha256", "bundle_id") if k in row]
                assert all(text.startswith("\t") for text in ids)
                cells = [part for cell in row.values() for part in cell.split(";")]
                assert not any(cell.strip(' "\t').startswith(("=", "+", "-", "@")) for cell in cells)


def test_all_tables_are_written_again_when_the_form_changes(ledger: Ledger, tmp_path: Path) -> None:
    Tables(tmp_path, ledger, cells=True).write()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    Tables(tmp_path, ledger, form=CsvForm.EXCEL_COMMA).write()
    assert all(path.read_bytes().startswith(b'\xef\xbb\xbf"schema";"slide_id";') for path in before)
    Tables(tmp_path, ledger).write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.csv")} == before


@pytest.mark.parametrize(
    ("env", "form"),
    [
        ({"LANG": "de_DE.UTF-8"}, CsvForm.EXCEL_COMMA),
        ({"LANG": "en_US.UTF-8", "LC_NUMERIC": "cs_CZ"}, CsvForm.EXCEL_COMMA),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "C.UTF-8"}, CsvForm.EXCEL_POINT),
        ({"LANG": "de_CH.UTF-8"}, CsvForm.EXCEL_POINT),
        ({"LANG": "es_MX@euro"}, CsvForm.EXCEL_POINT),
        ({"LANG": "", "LC_ALL": ""}, CsvForm.EXCEL_POINT),
        ({}, CsvForm.EXCEL_POINT),
    ],
)
def test_the_decimal_sign_is_that_of_the_language(env: dict[str, str], form: CsvForm) -> None:
    assert CsvForm.of(env, excel=True) is form
    assert CsvForm.of(env, excel=False) is CsvForm.PLAIN

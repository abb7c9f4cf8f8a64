"""The workbook and the JSON document hold what the tables hold."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import Cells, Detections, FovResult, InboxFile, Scale, ScaleSource
from rbc_edge.views import document
from rbc_edge.views.document import ALL, Document
from rbc_edge.views.tables import Tables
from rbc_edge.vision.counting import EdgeRule

openpyxl = pytest.importorskip("openpyxl")
pytest.importorskip("xlsxwriter")

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def a_result(n_single: int, n_overlapping: int) -> FovResult:
    n = n_single + n_overlapping
    overlapping = np.arange(n) < n_overlapping
    cells = Cells(
        Detections(
            np.tile(np.array([[1.26, 2, 41.04, 42]], np.float32), (n, 1)),
            np.full(n, 0.98768, np.float32),
            np.zeros(n, np.int64),
        ),
        np.full(n, 0.25, np.float32),
        overlapping,
        np.where(overlapping, 1, 0).astype(np.int64),
        np.zeros((n, 4), np.bool_),
    )
    return FovResult(640, 480, Scale(40.126, ScaleSource.SLIDE), cells, ("blurred",))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path) as opened:
        rng = np.random.default_rng(3)
        for slide_id in ("s103", "s17", "=1+1", "007"):
            for i in range(12):
                file = InboxFile(Path("/in") / slide_id / f"{i}.png", slide_id, f"{i}", 1, 1)
                n_single, n_overlapping = rng.integers(0, 20, 2).tolist()
                look = Look(
                    file, f"{slide_id} {i}", elapsed_ms=12.34, result=a_result(n_single, n_overlapping)
                )
                if i == 5:
                    look = replace(look, result=None, failure="truncated", message="cut short")
                opened.record(look, Version("1e5", "estimated"), f"2025-01-02T03:04:{i:02d}Z")
        opened.commit()
        Tables(tmp_path, opened, cells=True).write()
        yield opened


def a_document(ledger: Ledger, edges: EdgeRule = EdgeRule.ALL) -> Document:
    return Document(ledger.reader, edges, now=NOW, about={"settings": "{}"})


def sheet(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a sheet, as openpyxl reads them. No cell is a formula or a link."""
    rows = openpyxl.load_workbook(path)[name]
    assert all(cell.data_type != "f" and cell.hyperlink is None for row in rows.iter_rows() for cell in row)
    head, *others = rows.iter_rows(values_only=True)
    return [dict(zip(head, row, strict=True)) for row in others]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def same(shown: Any, text: str) -> bool:
    """Whether a cell shows what the table's text says, as its type."""
    if isinstance(shown, str | None):
        return bool((shown or "") == text)
    return bool(float(text) == shown)


def test_a_workbook_read_back_holds_the_numbers_of_the_tables(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "results.xlsx"
    a_document(ledger).write_workbook(path)
    assert openpyxl.load_workbook(path).sheetnames == ["slides", "fields", "shapes", "provenance"]
    *slides, sums = sheet(path, "slides")
    expected = table(tmp_path / "slides.csv")
    assert [list(row) for row in slides] == [list(row) for row in expected]
    pairs = [(row[k], text) for row, texts in zip(slides, expected, strict=True) for k, text in texts.items()]
    assert all(same(*pair) for pair in pairs)
    assert [row["slide_id"] for row in slides] == ["007", "'=1+1", "s17", "s103"]
    fields = sheet(path, "fields")
    names = ("007", "=1+1", "s17", "s103")
    of_slides = [row for name in names for row in table(tmp_path / f"{name}.csv")]
    for row, texts in zip(fields, of_slides, strict=True):
        assert all(same(row[k], text) for k, text in texts.items())
        local = datetime.fromisoformat(texts["analyzed_at"]).astimezone().replace(tzinfo=None)
        assert row["analyzed_at_local"] == local
    assert isinstance(fields[0]["bundle_id"], str) and isinstance(fields[0]["cell_diameter_px"], float)
    assert (sums["slide_id"], sums["n_rbc"]) == (ALL, sum(row["n_rbc"] for row in slides))
    assert (sums["n_fov_ok"], sums["n_fov_failed"]) == (44, 4)
    n = [row["n_rbc"] for row in fields if row["n_rbc"] is not None]
    assert sums["n_rbc_per_fov_mean"] == pytest.approx(np.mean(n), abs=0.005)
    assert sums["n_rbc_per_fov_low"] < sums["n_rbc_per_fov_mean"] < sums["n_rbc_per_fov_high"]
    about = {row["what"]: row["value"] for row in sheet(path, "provenance")}
    assert (about["made_at"], about["edges"], about["settings"]) == ("2026-01-02T03:04:05Z", "all", "{}")


def test_a_json_document_holds_the_numbers_of_the_tables(ledger: Ledger, tmp_path: Path) -> None:
    found = json.loads("".join(a_document(ledger).json_parts(cells=True)))
    for name, texts in (
        ("slides", table(tmp_path / "slides.csv")),
        ("fields", [r for s in ("007", "=1+1", "s17", "s103") for r in table(tmp_path / f"{s}.csv")]),
        (
            "cells",
            [r for s in ("007", "=1+1", "s17", "s103") for r in table(tmp_path / "cells" / f"{s}.csv")],
        ),
    ):
        assert len(found[name]) == len(texts)
        pairs = [
            (row[k], text) for row, line in zip(found[name], texts, strict=True) for k, text in line.items()
        ]
        assert all(same(*pair) for pair in pairs)
    assert found["all_slides"]["n_fov_ok"] == 44
    assert "cells" not in json.loads("".join(a_document(ledger).json_parts()))


def test_a_document_of_nothing_is_a_document(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        a_document(ledger).write_workbook(tmp_path / "a.xlsx")
        found = json.loads("".join(a_document(ledger).json_parts(cells=True)))
    (sums,) = sheet(tmp_path / "a.xlsx", "slides")
    assert (sums["n_fov_ok"], sums["n_rbc"], sums["n_rbc_per_fov_mean"]) == (0, None, None)
    assert (found["slides"], found["fields"], found["cells"]) == ([], [], [])


def test_one_state_is_shown_while_a_service_counts(ledger: Ledger) -> None:
    parts = a_document(ledger).json_parts()
    head = next(parts)
    file = InboxFile(Path("/in/new.png"), "new", "a", 1, 1)
    with Ledger(ledger.database.path.parent) as other:
        other.record(
            Look(file, "new", result=a_result(1, 1)), Version("b", "estimated"), "2025-01-02T03:04:05Z"
        )
        other.commit()
    found = json.loads(head + "".join(parts))
    assert sum(row["n_rbc"] or 0 for row in found["fields"]) == found["all_slides"]["n_rbc"]
    assert "new" not in [row["slide_id"] for row in found["slides"]]


@pytest.mark.parametrize("name", ["ledger.sqlite3", "slides.csv", "workbook"])
def test_no_other_file_is_overwritten(ledger: Ledger, tmp_path: Path, name: str) -> None:
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(UsageError, match=r"ends in \.xlsx"):
        a_document(ledger).write_workbook(tmp_path / name)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_what_a_sheet_cannot_hold_is_said(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "_MAX_ROWS", 40)
    with pytest.raises(UsageError, match="holds 39 rows, and fields are more"):
        a_document(ledger).write_workbook(tmp_path / "a.xlsx")
    assert not (tmp_path / "a.xlsx").exists()


def test_a_workbook_that_cannot_be_written_leaves_the_old_one(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").mkdir()
    with pytest.raises(UnavailableError, match=r"a\.xlsx: cannot write it"):
        a_document(ledger).write_workbook(tmp_path / "a.xlsx")
    assert not list(tmp_path.glob(".*.tmp"))

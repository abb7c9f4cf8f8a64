"""Damaged rows: never shown, repaired where something sound says how, else counted again."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.store import schema
from rbc_edge.store.decisions import decide, give_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.store.recovery import damage, mend
from rbc_edge.store.rows import FieldRow, Look, RowError, SlideScale, Status, Version
from rbc_edge.store.schema import FILE_NAME
from rbc_edge.store.slide_scale import give_by_run, inherit, keep, keep_measures, settle
from rbc_edge.values import Cells, Detections, FovResult, InboxFile, Measure, Scale, ScaleSource

VERSION = Version("bundle-1", "estimated")
WHEN = "2025-01-02T03:04:05Z"
COLUMNS = (
    *("fov", "path", "size_bytes", "sha256", "status", "failure", "message", "width_px", "height_px"),
    *("cell_diameter_px", "scale_source", "quality_flags", "captured_at", "analyzed_at", "bundle_id"),
    *("elapsed_ms", "counts", "n_refused", "checksum"),
)


def cells(n: int) -> Cells:
    box = np.tile(np.array([[1, 2, 30, 40]], np.float32), (n, 1))
    zeros = np.zeros(n, np.int64)
    return Cells(
        Detections(box, np.full(n, 0.5, np.float32), zeros),
        np.full(n, 0.1, np.float32),
        np.zeros(n, np.bool_),
        zeros,
        np.zeros((n, 4), np.bool_),
    )


def given_to_another(ledger: Ledger) -> None:
    give_by_run(ledger, ["other"], Scale(80.0, ScaleSource.CELL_DIAMETER))
    inherit(ledger, "s", "other")
    assert ledger.reader.given_scale("s") == Scale(80.0, ScaleSource.CELL_DIAMETER)


class Out:
    """Fields of a slide: `a` with 3 cells, `b` with 5, and one that failed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for fov in "abc":
            (folder / f"{fov}.png").touch()
        with Ledger(folder) as ledger:
            for fov in "abc":
                self.record(ledger, fov)
            keep(ledger, "s", SlideScale(Scale(41.25, ScaleSource.SLIDE), "bundle-1", 2))
            ledger.commit()
            self.before = list(ledger.reader.fields("s"))

    def look(self, fov: str) -> Look:
        file = InboxFile(self.folder / f"{fov}.png", "s", fov, 10, 1)
        if fov == "c":
            return Look(file, "cc", failure="truncated", message="cut short")
        n = 3 if fov == "a" else 5
        result = FovResult(640, 480, Scale(41.25, ScaleSource.SLIDE), cells(n), ("dark",), {}, n)
        return Look(file, fov * 2, result=result, elapsed_ms=n)

    def record(self, ledger: Ledger, fov: str) -> FieldRow:
        recorded = ledger.record(self.look(fov), VERSION, WHEN)
        assert recorded is not None
        return recorded.row

    def alter(self, sql: str, *values: object) -> None:
        with sqlite3.connect(self.folder / FILE_NAME) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            db.execute(sql, values)
        db.close()


@pytest.fixture
def out(tmp_path: Path) -> Out:
    return Out(tmp_path)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("fov", ["a", "c"])
def test_a_damaged_value_of_a_row_is_never_shown(out: Out, fov: str, column: str) -> None:
    value = "x" if column in ("fov", "path") else 7
    out.alter(f"UPDATE field SET {column} = ? WHERE fov = ?", value, fov)
    with Reader.open(out.folder) as reader:
        assert reader.damage()
        with pytest.raises(RowError, match="damaged") as raised:
            list(reader.fields("s"))
    assert "counts the image again" in raised.value.advice
    with Ledger(out.folder) as ledger:
        (said,) = mend(ledger.database, deep=True)
        assert "slide s" in said
        assert damage(ledger.database) == ""
        assert [row for row in ledger.reader.fields("s") if row.fov == "b"] == [out.before[1]]
        file = out.look(fov).file
        if file not in ledger.plan([file], VERSION).done:
            (row,) = (row for row in ledger.reader.fields("s") if row.fov in (fov, "x"))
            assert (row.status, row.failure, row.counts) == (Status.FAILED, "damaged-row", {})
            out.record(ledger, fov)
        assert list(ledger.reader.fields("s")) == out.before
        assert mend(ledger.database, deep=True) == []


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    ("column", "value"),
    [("counts", b"\7" * 48), ("counts", b"\0"), ("scale_source", "none"), ("width_px", 1)],
)
def test_counts_come_back_from_the_cells_and_what_fields_share_from_the_others(
    out: Out, column: str, value: object, is_there: bool
) -> None:
    if not is_there:
        (out.folder / "a.png").unlink()
    out.alter(f"UPDATE field SET {column} = ? WHERE fov = 'a'", value)
    with Ledger(out.folder) as ledger:
        (said,) = mend(ledger.database, deep=False)
        assert said == "slide s: the ledger's row of a was damaged: repaired"
        assert list(ledger.reader.fields("s")) == out.before


def test_a_row_of_no_slide_is_new_again(out: Out) -> None:
    out.alter("UPDATE field SET slide_key = 99 WHERE fov = 'a'")
    with Ledger(out.folder) as ledger:
        assert len(mend(ledger.database, deep=False)) == 1
        out.record(ledger, "a")
        assert list(ledger.reader.fields("s")) == out.before


def test_a_row_without_a_checksum_is_believed_and_gets_one_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Out(tmp_path)
    out.alter("UPDATE field SET checksum = NULL")
    with Ledger(tmp_path) as ledger:
        assert mend(ledger.database, deep=True) == []
        assert list(ledger.reader.fields("s")) == out.before
        (out.folder / "a.png").rename(out.folder / "d.png")
        look = Look(InboxFile(out.folder / "d.png", "s", "d", 10, 1), "aa")
        assert ledger.record(look, VERSION, WHEN) is not None
        query = "SELECT fov FROM field WHERE checksum IS NOT NULL"
        assert list(ledger.database.rows(query)) == [("d",)]
        assert damage(ledger.database) == ""


def test_a_row_of_before_with_a_value_that_cannot_be_is_counted_again(out: Out) -> None:
    out.alter("UPDATE field SET checksum = NULL, scale_source = 'guess' WHERE fov = 'a'")
    with Ledger(out.folder) as ledger:
        assert len(mend(ledger.database, deep=False)) == 1
        assert ledger.reader.fields("s").__next__().failure == "damaged-row"


def test_cells_that_are_damaged_are_counted_again_and_their_counts_stand(out: Out) -> None:
    out.alter("UPDATE cells SET packed = x'00' WHERE field_key = 1")
    with Ledger(out.folder) as ledger:
        assert damage(ledger.database)
        assert len(mend(ledger.database, deep=True)) == 1
        assert damage(ledger.database) == ""
        assert [row.counts for row in ledger.reader.fields("s")] == [row.counts for row in out.before]
        assert out.look("a").file in ledger.plan([out.look("a").file], VERSION).to_do


@pytest.mark.parametrize("column", ["cell_diameter_px", "scale_source", "scale_bundle_id", "scale_fields"])
def test_a_damaged_scale_of_a_slide_is_estimated_again(out: Out, column: str) -> None:
    out.alter(f"UPDATE slide SET {column} = 7")
    with Ledger(out.folder) as ledger:
        assert ledger.reader.slide_scale("s") is None


@pytest.mark.parametrize(
    "change",
    ["given_diameter_px = 7", "given_source = NULL", "given_source = 'guess'", "given_by_run = 1"],
)
def test_a_damaged_scale_that_a_person_gave_is_dropped_and_said(out: Out, change: str) -> None:
    with Ledger(out.folder) as ledger:
        give_scale(ledger, "s", Scale(95.0, ScaleSource.CELL_DIAMETER))
        ledger.commit()
        assert damage(ledger.database) == ""
    out.alter(f"UPDATE slide SET {change}")
    with Ledger(out.folder) as ledger:
        with pytest.raises(RowError):
            ledger.reader.given_scale("s")
        with pytest.raises(RowError):
            ledger.plan([out.look("a").file], VERSION)
        assert damage(ledger.database)
        assert mend(ledger.database, deep=False) == [
            "slide s: the scale given for it was damaged: give it again"
        ]
        assert ledger.reader.given_scale("s") is None
        assert damage(ledger.database) == ""


@pytest.mark.parametrize("change", ["cell_diameter_px = 7", "cell_diameter_px = NULL", "n_cells = 'x'"])
def test_a_damaged_measure_is_made_again(out: Out, change: str) -> None:
    measures = {"aa": Measure(41.0, 9, 300), "bb": Measure(float("nan"), 0, 300)}
    with Ledger(out.folder) as ledger:
        keep_measures(ledger, "bundle-1", 0, measures)
        ledger.commit()
        assert ledger.reader.measures(["aa", "bb"], "bundle-1", 0).keys() == measures.keys()
    out.alter(f"UPDATE measure SET {change} WHERE sha256 = 'aa'")
    with Ledger(out.folder) as ledger:
        assert ledger.reader.measures(["aa", "bb"], "bundle-1", 0).keys() == {"bb"}


def test_a_damaged_row_whose_image_is_gone_stays_and_its_slide_is_unsettled(out: Out) -> None:
    out.alter("DELETE FROM cells WHERE field_key = 1")
    out.alter("UPDATE field SET captured_at = 'x', width_px = 1 WHERE fov = 'a'")
    (out.folder / "a.png").unlink()
    with Ledger(out.folder) as ledger:
        mend(ledger.database, deep=False)
        assert ledger.drop_gone({"s"}) == set()
        row = ledger.reader.field("s", "a")
        assert row is not None
        assert row.failure == "damaged-row"
        assert "its image is gone" in row.message
        assert ledger.reader.lost() == {"s": 1}
        assert ledger.reader.unsettled() == ["s"]


def test_a_damaged_scale_that_was_given_is_not_replaced_by_that_of_another_slide(out: Out) -> None:
    with Ledger(out.folder) as ledger:
        give_scale(ledger, "s", Scale(95.0, ScaleSource.CELL_DIAMETER))
        give_by_run(ledger, ["other"], Scale(80.0, ScaleSource.CELL_DIAMETER))
        ledger.commit()
    out.alter("UPDATE slide SET given_source = NULL WHERE slide_id = 's'")
    with Ledger(out.folder) as ledger:
        inherit(ledger, "s", "other")
        with pytest.raises(RowError):
            ledger.reader.given_scale("s")


@pytest.mark.parametrize(
    "change",
    [
        *("kind = 'guess'", "kind = 7", "kind = 'forgotten'", "reason = x'ff'", "reason = 'y'"),
        *("content = x'ff'", "content = 'guess'", "slide_key = 99"),
    ],
)
def test_a_damaged_decision_is_dropped_and_said(out: Out, change: str) -> None:
    with Ledger(out.folder) as ledger:
        decide(ledger, "s", ["a"], Status.EXCLUDED, reason="bubble")
        ledger.commit()
    out.alter(f"UPDATE decision SET {change}")
    with Ledger(out.folder) as ledger:
        assert damage(ledger.database)
        (said,) = mend(ledger.database, deep=False)
        assert "exclude or forget the field again" in said
        assert list(ledger.reader.fields("s")) == out.before
        assert damage(ledger.database) == ""


@pytest.mark.parametrize("name", ["x'ff00'", "7.5", "'guess'"])
@pytest.mark.parametrize("table", ["field", "slide"])
def test_a_damaged_name_is_never_shown(out: Out, table: str, name: str) -> None:
    where = {"field": "fov = {} WHERE fov = 'a'", "slide": "slide_id = {}"}[table]
    out.alter(f"UPDATE {table} SET {where.format(name)}")
    with Ledger(out.folder) as ledger:
        assert mend(ledger.database, deep=False)
        assert damage(ledger.database) == ""
        if table == "field":
            assert list(ledger.reader.fields("s")) == out.before
        else:
            assert all(not row.counts for row in ledger.reader.all_fields())


@pytest.mark.parametrize("value", ["x'ff00'", "'guess'", "7"])
def test_cells_of_any_kind_of_damage_are_found(out: Out, value: str) -> None:
    out.alter(f"UPDATE cells SET packed = {value}")
    with Ledger(out.folder) as ledger:
        assert damage(ledger.database)
        with pytest.raises(RowError):
            dict(ledger.reader.cells("s"))
        assert mend(ledger.database, deep=True)
        assert damage(ledger.database) == ""


def test_cells_that_are_lost_are_counted_again_and_that_is_said_once(out: Out) -> None:
    out.alter("DELETE FROM cells WHERE field_key = 1")
    with Ledger(out.folder) as ledger:
        (said,) = mend(ledger.database, deep=False)
        assert "the cells of 1 field were damaged" in said
        assert mend(ledger.database, deep=True) == []
        assert next(iter(ledger.reader.fields("s"))).counts == out.before[0].counts


def test_fields_without_cells_are_not_damaged(out: Out) -> None:
    with Ledger(out.folder) as ledger:
        empty = FovResult(640, 480, Scale(41.25, ScaleSource.SLIDE), cells(0), (), {}, 0)
        file = InboxFile(out.folder / "d.png", "s", "d", 10, 1)
        assert ledger.record(Look(file, "dd", result=empty), VERSION, WHEN)
        assert mend(ledger.database, deep=True) == []


def test_a_damaged_path_hides_no_status(out: Out) -> None:
    out.alter("UPDATE field SET path = 7")
    with Ledger(out.folder) as ledger:
        assert ledger.reader.n_gone() == 0


def test_an_excluded_row_that_is_damaged_stays_excluded(out: Out) -> None:
    with Ledger(out.folder) as ledger:
        decide(ledger, "s", ["a"], Status.EXCLUDED, reason="bubble")
        ledger.commit()
    out.alter("UPDATE field SET captured_at = 'x' WHERE fov = 'a'")
    with Ledger(out.folder) as ledger:
        mend(ledger.database, deep=True)
        row = ledger.reader.field("s", "a")
        assert row is not None
        assert (row.status, row.reason) == (Status.EXCLUDED, "bubble")


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: ledger.retry(),
        lambda ledger: keep(ledger, "s", SlideScale(Scale(9, ScaleSource.SLIDE), "b", 1)),
        lambda ledger: keep(ledger, "s", SlideScale(Scale(float("nan"), ScaleSource.NONE), "b", None)),
        lambda ledger: give_by_run(ledger, ["s"], Scale(95, ScaleSource.CELL_DIAMETER)),
        lambda ledger: give_by_run(ledger, ["s", "new"], None),
        lambda ledger: settle(ledger, "s"),
        given_to_another,
        lambda ledger: give_scale(ledger, "s", Scale(95, ScaleSource.CELL_DIAMETER)),
        lambda ledger: give_scale(ledger, "s", None),
        lambda ledger: decide(ledger, "s", [], Status.FORGOTTEN),
    ],
)
def test_what_the_program_changes_is_no_damage(out: Out, change: Callable[[Ledger], object]) -> None:
    with Ledger(out.folder) as ledger:
        change(ledger)
        assert damage(ledger.database) == ""
        assert mend(ledger.database, deep=True) == []


def test_a_broken_structure_is_left_alone(out: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    out.alter("UPDATE field SET width_px = 1 WHERE fov = 'a'")
    monkeypatch.setattr("rbc_edge.store.recovery._broken_structure", lambda _: "page 3 is malformed")
    with Ledger(out.folder) as ledger:
        assert mend(ledger.database, deep=True) == []


def test_a_ledger_of_the_version_before_keeps_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = next(i for i, some in enumerate(schema.MIGRATIONS) if any("ADD COLUMN checksum" in s for s in some))
    with monkeypatch.context() as before:
        before.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:n])
        Ledger(tmp_path).close()
    out = Out.__new__(Out)
    out.folder = tmp_path
    out.alter(
        "INSERT INTO slide (slide_id, given_diameter_px, given_source) VALUES ('s', 90, 'cell-diameter')"
    )
    with Ledger(tmp_path) as ledger:
        assert ledger.reader.given_scale("s") == Scale(90.0, ScaleSource.CELL_DIAMETER)
        assert mend(ledger.database, deep=True) == []

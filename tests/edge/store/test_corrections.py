"""Corrections of cells: counted, found again by place, undone, and safe from damage."""

import csv
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbc_edge.errors import UsageError
from rbc_edge.store.corrections import MIN_IOU, NOT_A_CELL, Corrected, Correction, Kind, corrected, match
from rbc_edge.store.decisions import correct, decide, undo
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.store.recovery import damage, mend
from rbc_edge.store.rows import FieldRow, Look, RowError, Status, Version
from rbc_edge.store.schema import FILE_NAME
from rbc_edge.values import (
    CellClass,
    Cells,
    Counts,
    Detections,
    FovResult,
    InboxFile,
    Label,
    Morphology,
    Scale,
    ScaleSource,
)
from rbc_edge.views.overlay import row_key
from rbc_edge.views.tables import Tables
from rbc_edge.vision.boxes import iou, touches_edge
from rbc_edge.vision.counting import EdgeRule, counted, groups

WHEN = "2025-01-02T03:04:05Z"
LATER = "2025-01-03T03:04:05Z"


def some_cells(boxes: list[list[float]], labels: list[Label] | None = None) -> Cells:
    """Cells at these boxes, in this order; single where nothing is said."""
    n = len(boxes)
    labels = labels or [Label.RBC_SINGLE] * n
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    kind = {Label.WBC: CellClass.WBC, Label.PLATELET: CellClass.PLATELET}
    class_id = np.array([kind.get(label, CellClass.RBC) for label in labels], np.int64)
    overlapping = np.array([label is Label.RBC_OVERLAPPING for label in labels], np.bool_)
    return Cells(
        Detections(xyxy, np.full(n, 0.9, np.float32), class_id),
        np.where(class_id == 0, 0.4, nan).astype(np.float32),
        overlapping,
        groups(xyxy, class_id, overlapping),
        touches_edge(xyxy, 640, 480, 40.0),
    )


BOXES: list[list[float]] = [[0, 10, 40, 50], [100, 10, 140, 50], [132, 10, 172, 50], [300, 300, 340, 340]]
LABELS = [Label.RBC_SINGLE, Label.RBC_OVERLAPPING, Label.RBC_OVERLAPPING, Label.RBC_SINGLE]


class Desk:
    """A ledger with one slide, and its tables."""

    def __init__(self, out: Path, ledger: Ledger) -> None:
        self.out, self.ledger = out, ledger

    def count(self, cells: Cells, fov: str = "a", bundle: str = "b1", slide: str = "s", **look: Any) -> None:
        file = look.pop("file", InboxFile(self.out / slide / f"{fov}.png", slide, fov, 1, 1))
        result = FovResult(640, 480, Scale(40.0, ScaleSource.SLIDE), cells)
        self.ledger.record(
            Look(file, f"sha of {fov}", result=result, **look), Version(bundle, "estimated"), WHEN
        )

    def row(self, fov: str = "a") -> FieldRow:
        row = self.ledger.reader.field("s", fov)
        assert row is not None
        assert row == next(row for row in self.ledger.reader.fields("s") if row.fov == fov)
        assert row == next(row for row in self.ledger.reader.all_fields() if row.fov == fov)
        return row

    def cells(self, fov: str = "a") -> Corrected:
        ((_, found),) = self.ledger.reader.corrected("s", fov)
        return found

    def say(self, i: int, what: str, kind: Kind = Kind.LABEL, fov: str = "a") -> Correction:
        x0, y0, x1, y1 = self.cells(fov).cells.detections.xyxy[i].tolist()
        return self.correct(kind, what, (x0, y0, x1, y1), fov)

    def correct(self, kind: Kind, what: str = "", box: Any = None, fov: str = "a") -> Correction:
        return correct(self.ledger, "s", fov, f"sha of {fov}", kind, what, box, who="Ana", at=LATER)

    def table(self, name: str) -> list[dict[str, str]]:
        Tables(self.out, self.ledger, cells=True).write()
        with (self.out / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Ledger(tmp_path) as ledger:
        made = Desk(tmp_path, ledger)
        made.count(some_cells(BOXES, LABELS))
        yield made


def test_every_edge_rule_counts_what_the_person_says(desk: Desk) -> None:
    assert desk.row().counts[EdgeRule.INSIDE] == Counts(1, 2)
    desk.say(0, Label.RBC_OVERLAPPING)  # the border cuts it
    desk.say(1, Label.RBC_SINGLE)
    desk.say(2, NOT_A_CELL)
    desk.say(3, Label.WBC)
    desk.correct(Kind.ADDED, Label.PLATELET, (200, 200, 220.5, 222))
    row = desk.row()
    assert row.counts == {
        EdgeRule.ALL: Counts(1, 1, 1, 1),
        EdgeRule.TWO_SIDES: Counts(1, 1, 1, 1),
        EdgeRule.INSIDE: Counts(1, 0, 1, 1),
    }
    assert (row.n_corrected, row.n_lost) == (5, 0)
    desk.say(1, Label.RBC_OVERLAPPING)  # what the bundle had said
    assert desk.row().n_corrected == 4
    assert damage(desk.ledger.database) == ""  # the bundle's row is as it was


def test_tables_show_corrected_counts_and_the_models_own_labels(desk: Desk) -> None:
    desk.count(some_cells(BOXES[:1]), "b")
    desk.say(1, Label.RBC_SINGLE)
    desk.say(2, NOT_A_CELL)
    desk.correct(Kind.ADDED, Label.RBC_OVERLAPPING, (600, 200, 640, 240))
    desk.correct(Kind.REVIEWED)
    first, second = desk.table("s.csv")
    names = ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_corrected", "reviewed")
    assert [first[name] for name in names] == ["4", "3", "1", "3", "Ana"]
    assert [second[name] for name in names] == ["1", "1", "0", "0", ""]
    (slide,) = desk.table("slides.csv")
    assert [slide[name] for name in names[:4]] == ["5", "4", "1", "3"]
    found = [[row[n] for n in ("cell", "label", "model_label", "group")] for row in desk.table("cells/s.csv")]
    assert found == [
        ["1", "rbc_single", "rbc_single", ""],
        ["2", "rbc_single", "rbc_overlapping", ""],
        ["3", "not_a_cell", "rbc_overlapping", ""],
        ["4", "rbc_single", "rbc_single", ""],
        ["5", "rbc_overlapping", "", "1"],
        ["1", "rbc_single", "rbc_single", ""],
    ]
    added = desk.table("cells/s.csv")[4]
    assert [added[n] for n in ("det_score", "overlap_score", "touches_edge")] == ["", "", "right"]
    assert len(next(desk.ledger.reader.cells("s"))[1]) == 4  # pictures show what is counted


def test_what_is_no_red_cell_has_no_form(desk: Desk) -> None:
    columns = (np.full(len(BOXES), x, np.float32) for x in (0.9, 1200.0, 1.1, 0.98, 0.1))
    form = Morphology(np.zeros(len(BOXES), np.int64), next(columns), np.ones(len(BOXES), np.bool_), *columns)
    inside = np.zeros((len(BOXES), 4), np.bool_)
    desk.count(replace(some_cells(BOXES), morphology=form, touches_edge=inside), bundle="b2")
    desk.say(0, NOT_A_CELL)
    desk.say(1, Label.WBC)
    desk.say(2, "target", Kind.SHAPE)
    white = desk.say(2, Label.PLATELET)
    names = ("shape", "shape_judged", "area_px", "pallor")
    nothing = [""] * len(names)
    shown = [[row[name] for name in names] for row in desk.table("cells/s.csv")]
    assert shown == [nothing, nothing, nothing, ["normal", "yes", "1200.0", "0.100"]]
    assert {row["n_judged"] for row in desk.table("shapes/s.csv")} == {"1"}  # as `cells/` says
    undo(desk.ledger, white.key, who="", at=LATER)
    assert [row["shape"] for row in desk.table("cells/s.csv")] == ["", "", "target", "normal"]


def test_corrections_survive_another_bundle_by_their_place(desk: Desk) -> None:
    desk.say(0, Label.RBC_OVERLAPPING)
    desk.say(3, NOT_A_CELL)
    desk.correct(Kind.ADDED, Label.RBC_SINGLE, (200, 200, 240, 240))
    desk.correct(Kind.REVIEWED)
    # Another order, boxes a little elsewhere. It finds what was missed, and no more what was none.
    moved: list[list[float]] = [[203, 201, 242, 239], [98, 12, 141, 49], [2, 9, 41, 52]]
    desk.count(some_cells(moved, [Label.RBC_OVERLAPPING, Label.RBC_SINGLE, Label.RBC_SINGLE]), bundle="b2")
    found, row = desk.cells(), desk.row()
    assert [found.label(i) for i in range(3)] == ["rbc_single", "rbc_single", "rbc_overlapping"]
    assert [found.model_label(i) for i in range(3)] == ["rbc_overlapping", "rbc_single", "rbc_single"]
    assert row.counts[EdgeRule.ALL] == Counts(2, 1)
    assert [(lost.what, lost.was, lost.bundle_id) for lost in found.lost] == [
        (NOT_A_CELL, "rbc_single", "b1")
    ]
    assert (row.n_corrected, row.n_lost, row.reviewed_by) == (2, 1, "")  # nobody has seen these cells
    desk.say(2, Label.WBC)  # the place of its first correction
    desk.count(some_cells(BOXES, LABELS), bundle="b1")
    assert desk.cells().label(0) == "wbc"
    assert (desk.row().n_lost, desk.row().reviewed_by) == (0, "Ana")


def test_everything_can_be_undone_and_nothing_is_deleted(desk: Desk) -> None:
    desk.table("s.csv")
    before = (desk.out / "s.csv").read_bytes(), (desk.out / "cells" / "s.csv").read_bytes()
    plain = desk.row()
    made = [
        desk.say(0, Label.RBC_OVERLAPPING),
        desk.say(0, NOT_A_CELL),
        desk.correct(Kind.ADDED, Label.RBC_SINGLE, (200, 200, 240, 240)),
        desk.say(4, Label.RBC_OVERLAPPING),
        desk.say(1, "target", Kind.SHAPE),
        desk.correct(Kind.REVIEWED),
    ]
    assert [each.was for each in made[:5]] == ["rbc_single", "rbc_overlapping", "", "rbc_single", ""]
    assert desk.cells().shape == {1: "target"}
    assert desk.row().counts[EdgeRule.ALL] == Counts(1, 3)
    for each in reversed(made):
        assert undo(desk.ledger, each.key, who="Bo", at=LATER) == "s"
    assert desk.row() == plain
    desk.table("s.csv")
    assert ((desk.out / "s.csv").read_bytes(), (desk.out / "cells" / "s.csv").read_bytes()) == before
    (kept,) = desk.ledger.reader.corrections(undone=True).values()
    assert [(each.key, each.undone_by, each.undone_at) for each in kept] == [
        (each.key, "Bo", LATER) for each in made
    ]
    with pytest.raises(UsageError, match="no correction"):
        undo(desk.ledger, made[0].key, who="Bo", at=LATER)


def test_what_cannot_be_is_refused_with_advice(desk: Desk) -> None:
    cell = tuple(BOXES[0])
    desk.say(1, Label.PLATELET)
    for kind, what, box in (
        (Kind.LABEL, "rbc", cell),
        (Kind.LABEL, Label.WBC, (1.0, 10.0, 40.0, 50.0)),
        (Kind.LABEL, Label.WBC, None),
        (Kind.SHAPE, "bogus", cell),
        (Kind.SHAPE, "", cell),
        (Kind.SHAPE, "target", tuple(BOXES[1])),
        (Kind.ADDED, NOT_A_CELL, (200.0, 200.0, 240.0, 240.0)),
        (Kind.ADDED, Label.WBC, (600.0, 200.0, 641.0, 240.0)),
        (Kind.ADDED, Label.WBC, (240.0, 200.0, 200.0, 240.0)),
        (Kind.ADDED, Label.WBC, (nan, 200.0, 200.0, 240.0)),
        (Kind.ADDED, Label.WBC, None),
        (Kind.ADDED, Label.WBC, cell),
    ):
        with pytest.raises(UsageError) as raised:
            desk.correct(kind, what, box)
        assert raised.value.advice
    with pytest.raises(UsageError, match="another image"):
        correct(desk.ledger, "s", "a", "other", Kind.REVIEWED, who="", at=LATER)
    with pytest.raises(UsageError, match="field of view"):
        desk.correct(Kind.REVIEWED, fov="z")
    decide(desk.ledger, "s", ["a"], Status.EXCLUDED)
    with pytest.raises(UsageError, match="not counted"):
        desk.correct(Kind.REVIEWED)
    assert sum(map(len, desk.ledger.reader.corrections(undone=True).values())) == 1  # the platelet


def test_an_excluded_field_keeps_its_corrections(desk: Desk) -> None:
    desk.say(0, NOT_A_CELL)
    decide(desk.ledger, "s", ["a"], Status.EXCLUDED)
    assert (desk.row().counts, desk.row().n_corrected) == ({}, 0)
    decide(desk.ledger, "s", ["a"], None)
    assert desk.row().counts[EdgeRule.ALL] == Counts(1, 2)


def test_corrections_move_with_their_content_to_another_slide(desk: Desk) -> None:
    desk.say(0, NOT_A_CELL)
    new = desk.out / "t" / "x.png"
    new.parent.mkdir()
    new.touch()
    desk.ledger.record(Look(InboxFile(new, "t", "x", 1, 1), "sha of a"), Version("b1", "estimated"), WHEN)
    (row,) = desk.ledger.reader.fields("t")
    assert row.counts[EdgeRule.ALL] == Counts(1, 2)
    assert list(desk.ledger.reader.corrections()) == [("t", "sha of a")]


def test_a_picture_is_drawn_again_where_corrections_leave_the_counts(desk: Desk) -> None:
    plain = row_key(desk.row(), EdgeRule.ALL)
    first = desk.say(0, Label.RBC_OVERLAPPING)
    second = desk.say(1, Label.RBC_SINGLE)
    assert desk.row().counts[EdgeRule.ALL] == Counts(2, 2)
    assert row_key(desk.row(), EdgeRule.ALL) != plain
    undo(desk.ledger, first.key, who="", at=LATER)
    undo(desk.ledger, second.key, who="", at=LATER)
    assert row_key(desk.row(), EdgeRule.ALL) == plain


@pytest.mark.parametrize("column", ["what", "x_min_px", "kind", "who", "undone_at", "content"])
def test_a_damaged_correction_is_never_counted(desk: Desk, column: str) -> None:
    desk.say(0, NOT_A_CELL)
    desk.ledger.commit()
    desk.ledger.database.connection.execute(
        f"UPDATE correction SET {column} = ?", (7 if column == "x_min_px" else "wbc",)
    )
    if column != "undone_at":  # one that seems to be undone is not read
        with pytest.raises(RowError, match="correction"):
            list(desk.ledger.reader.fields("s"))
    assert "correction" in damage(desk.ledger.database)
    (said,) = mend(desk.ledger.database, deep=False)
    assert said == "slide s: a correction was damaged: make it again"
    assert damage(desk.ledger.database) == ""
    assert desk.row().counts[EdgeRule.ALL] == Counts(2, 2)


def test_corrections_outlive_the_process_and_are_read_without_it(desk: Desk) -> None:
    desk.say(0, NOT_A_CELL)
    desk.ledger.commit()
    with Reader.open(desk.out) as reader:
        (row,) = reader.fields("s")
        assert row.counts[EdgeRule.ALL] == Counts(1, 2)
    with sqlite3.connect(desk.out / FILE_NAME) as db:  # who, when, and what it was
        rows = db.execute("SELECT who, at, was, bundle_id, what FROM correction").fetchall()
    db.close()
    assert rows == [("Ana", LATER, "rbc_single", "b1", "not_a_cell")]


# -- what always holds ----------------------------------------------------------------------------------

_boxes = st.lists(
    st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 30)] * 2).map(
        lambda b: [float(v) for v in (b[0], b[1], b[0] + b[2], b[1] + b[3])]
    ),
    max_size=12,
)


@given(_boxes, _boxes)
@settings(deadline=None)
def test_places_and_cells_are_matched_one_to_one_and_the_most_alike_first(
    a: list[list[float]], b: list[list[float]]
) -> None:
    places, boxes = (np.array(each, np.float32).reshape(-1, 4) for each in (a, b))
    found, alike = match(places, boxes), iou(places, boxes)
    assert len(set(found.values())) == len(found)
    assert all(alike[p, i] >= MIN_IOU for p, i in found.items())
    taken = set(found.values())
    for p, i in np.argwhere(alike >= MIN_IOU):
        # None that could go together is left, unless one of the two has a partner that is as much alike.
        mine = alike[p, found[p]] if p in found else 0
        its = max((alike[q, i] for q in found if found[q] == i), default=0) if i in taken else 0
        assert max(mine, its) >= alike[p, i]


@given(
    _boxes,
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from([*Label, NOT_A_CELL])), max_size=20),
    _boxes,
)
@settings(deadline=None)
def test_counts_are_those_of_the_labels_whatever_is_said(
    boxes: list[list[float]], said: list[tuple[int, str]], added: list[list[float]]
) -> None:
    cells = some_cells(boxes)
    about = [
        Correction(n, "x", Kind.LABEL, str(what), tuple(boxes[i % len(boxes)]), "", "", "", "")  # type: ignore[arg-type]
        for n, (i, what) in enumerate(said, 1)
        if boxes
    ]
    about += [
        Correction(100 + n, "x", Kind.ADDED, "rbc_single", tuple(box), "", "", "", "")  # type: ignore[arg-type]
        for n, box in enumerate(added)
    ]
    found = corrected(cells, about, 100, 100, 20.0)
    assert not found.lost
    labels = [found.label(i) for i in range(len(found.cells))]
    for rule, counts in found.counts().items():
        kept = counted(found.cells, rule) & found.is_cell
        shown = [label for label, keep in zip(labels, kept, strict=True) if keep]
        assert [shown.count(label) for label in Label] == [
            *(counts.n_rbc_single, counts.n_rbc_overlapping, counts.n_wbc, counts.n_platelets)
        ]
    assert len(found.kept) == len(labels) - labels.count(NOT_A_CELL)
    assert bool((found.kept.group > 0).any()) == ("rbc_overlapping" in labels)
    assert (
        corrected(cells, about[:0]).counts()
        == replace(found, cells=cells, is_cell=np.ones(len(cells), np.bool_)).counts()
    )

"""What a person says of single cells, and how a count reads with it.

A correction is about a place in a content: a box in pixels of the field. The rows of the bundle stay as they
are. Corrections are put on them when they are read, so they hold for every later count, also of another
bundle: a place belongs to the cell with the most similar box, one to one. What finds no cell is listed.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import nan
from typing import Any, Final

import numpy as np

from rbc_edge.store.rows import RowError, checksum, counts_by_rule
from rbc_edge.values import (
    SHAPES,
    Bool,
    CellClass,
    Cells,
    Counts,
    Detections,
    Float32,
    Int64,
    Label,
    Morphology,
    Shape,
)
from rbc_edge.vision.boxes import iou, touches_edge
from rbc_edge.vision.counting import EdgeRule, groups

MIN_IOU: Final = 0.5
"""Boxes that are less alike are not one cell."""

NOT_A_CELL: Final = "not_a_cell"
LABELS: Final = (*map(str, Label), NOT_A_CELL)
COLUMNS: Final = (
    "correction_key, content, kind, what, x_min_px, y_min_px, x_max_px, y_max_px, who, at, was,"
    " correction.bundle_id, undone_by, undone_at, correction.checksum"
)
_CLASS_OF: Final = {Label.WBC: CellClass.WBC, Label.PLATELET: CellClass.PLATELET}

Box = tuple[float, float, float, float]


class Kind(StrEnum):
    """What a correction is about."""

    LABEL = "label"  # a cell is another kind of cell, or none
    SHAPE = "shape"  # a red cell has another shape
    ADDED = "added"  # a cell was missed
    REVIEWED = "reviewed"  # the field was looked at whole, and accepted


@dataclass(frozen=True, slots=True)
class Correction:
    """One row of the table ``correction``."""

    key: int
    content: str  # SHA-256 of the field
    kind: Kind
    what: str  # one of `LABELS`, or the name of a shape. Empty for a review.
    box: Box | None  # its place: left, top, right, bottom, pixels of the field. None for a review.
    who: str  # as they gave their name
    at: str  # ISO 8601, UTC
    was: str  # the label or shape until then. Empty: no cell was there. Of a review: `cells_id`.
    bundle_id: str  # the bundle that had counted it
    undone_by: str = ""
    undone_at: str = ""  # empty: it holds

    def values(self) -> tuple[object, ...]:
        """Returns what the database holds of it, without key and checksum."""
        return (
            *(self.content, str(self.kind), self.what, *(self.box or (None,) * 4), self.who, self.at),
            *(self.was, self.bundle_id, self.undone_by, self.undone_at),
        )

    def checksum(self) -> int:
        """Returns the checksum of the row. The slide is not in it: a content may move to another one."""
        return checksum(self.key, *self.values())


def correction_of(row: tuple[Any, ...], slide_id: str) -> Correction:
    """Makes a correction of its `COLUMNS`. Raises `RowError` where it is damaged."""
    key, content, kind, what, *box, who, at, was, bundle_id, undone_by, undone_at, expected = row
    try:
        place = None if box[0] is None else (box[0], box[1], box[2], box[3])
        about = (who, at, was, bundle_id, undone_by, undone_at)
        found = Correction(key, content, Kind(kind), what, place, *about)
    except ValueError as error:
        raise RowError(slide_id, "a correction") from error
    if found.checksum() != expected:
        raise RowError(slide_id, "a correction")
    return found


def cells_id(cells: Cells) -> str:
    """Returns a text that is the same for another count of the field only where it found the same cells."""
    of = cells.detections
    parts = (of.xyxy.astype("<f4"), of.class_id.astype("u1"), cells.overlapping.astype("u1"))
    return f"{zlib.crc32(b''.join(part.tobytes() for part in parts)):08x}"


@dataclass(frozen=True, slots=True, eq=False)
class Corrected:
    """The cells of a field as they are counted, and what the bundle said of them.

    The bundle's cells come first and keep their numbers. Cells that were added follow in order of time. They
    have no scores (NaN).
    """

    model: Cells  # as the bundle found them
    cells: Cells  # with the labels of the person
    is_cell: Bool  # bool (N,). False: the person says that it is no cell
    shape: dict[int, str]  # by cell, where a person said it
    place: dict[int, Box]  # by cell, the place of its corrections
    lost: tuple[Correction, ...] = ()  # that find no cell in this count
    reviewed_by: str = ""
    digest: int = 0  # changes with the corrections. 0: there is none

    @property
    def n_corrected(self) -> int:
        """How many cells read otherwise than the bundle said, with those added and taken out."""
        return sum(
            self.label(i) != self.model_label(i) or bool(self.shape.get(i)) for i in range(len(self.cells))
        )

    def label(self, i: int) -> str:
        """Returns the label of cell `i` in the tables."""
        return str(self.cells.label(i)) if self.is_cell[i] else NOT_A_CELL

    def model_label(self, i: int) -> str:
        """Returns the bundle's own label. Empty for a cell that was added."""
        return str(self.model.label(i)) if i < len(self.model) else ""

    @property
    def kept(self) -> Cells:
        """What is a cell."""
        if self.is_cell.all():
            return self.cells
        return self.cells.take(self.is_cell)

    def counts(self) -> dict[EdgeRule, Counts]:
        """Counts them under each edge rule."""
        return counts_by_rule(self.kept)


def corrected(
    cells: Cells,
    said: Sequence[Correction] = (),
    width_px: int = 0,
    height_px: int = 0,
    diameter_px: float | None = None,
) -> Corrected:
    """Puts corrections on what a bundle found in a field of this size.

    Args:
        cells: As the bundle found them.
        said: The corrections that hold for the field, in order of time. The last one of a place counts.
        width_px: Of the field.
        height_px: Of the field.
        diameter_px: Of a red cell, to tell which added cells the border cuts. None: unknown.
    """
    if not said:
        return Corrected(cells, cells, np.ones(len(cells), np.bool_), {}, {})
    by_place: dict[Box, list[Correction]] = {}
    for each in said:
        if each.box is not None:
            by_place.setdefault(each.box, []).append(each)
    matched = match(np.array(list(by_place), np.float32).reshape(-1, 4), cells.detections.xyxy)
    place: dict[int, Box] = {}
    added: list[Box] = []
    lost: list[Correction] = []
    for n, (box, about) in enumerate(by_place.items()):
        if n in matched:
            place[matched[n]] = box
        elif any(each.kind is Kind.ADDED for each in about):
            place[len(cells) + len(added)] = box
            added.append(box)
        else:
            lost += about
    every = _with(cells, added, width_px, height_px, diameter_px)
    class_id, overlapping = every.detections.class_id.copy(), every.overlapping.copy()
    is_cell = np.ones(len(every), np.bool_)
    shape = {}
    for i, box in place.items():
        for each in by_place[box]:
            if each.kind is Kind.SHAPE:
                shape[i] = each.what
            elif each.what == NOT_A_CELL:
                is_cell[i] = False
            else:
                is_cell[i] = True
                class_id[i] = _CLASS_OF.get(Label(each.what), CellClass.RBC)
                overlapping[i] = each.what == Label.RBC_OVERLAPPING
    group: Int64 = np.zeros(len(every), np.int64)
    group[is_cell] = groups(every.detections.xyxy[is_cell], class_id[is_cell], overlapping[is_cell])
    found = replace(every.detections, class_id=class_id)
    form = every.morphology
    if shape:
        numbers, score, is_sure = form.shape.copy(), form.shape_score.copy(), form.shape_sure.copy()
        for i, name in shape.items():  # a person needs no probability to be sure
            numbers[i], score[i], is_sure[i] = SHAPES.index(Shape(name)), nan, True
        form = replace(form, shape=numbers, shape_score=score, shape_sure=is_sure)
    if not (is_red := is_cell & (class_id == CellClass.RBC)).all():  # what is no red cell has no form
        n = len(form)
        form = Morphology.joined([form, Morphology.unknown(1)]).take(np.where(is_red, np.arange(n), n))
    reviews = [each for each in said if each.kind is Kind.REVIEWED and each.was == cells_id(cells)]
    return Corrected(
        cells,
        replace(
            every,
            detections=found,
            overlapping=overlapping,
            group=group if place else cells.group,
            morphology=form,
        ),
        is_cell,
        shape,
        place,
        tuple(lost),
        reviews[-1].who if reviews else "",
        checksum(*(each.key for each in said)) or 1,
    )


def match(places: Float32, boxes: Float32) -> dict[int, int]:
    """Finds the box for each place, float32 (P, 4) and (N, 4): the most alike first, one to one.

    Returns index of the box by index of the place, where they are as alike as `MIN_IOU`.
    """
    alike = iou(places, boxes)
    pairs = np.argwhere(alike >= MIN_IOU)
    order = np.argsort(-alike[pairs[:, 0], pairs[:, 1]], kind="stable")
    found: dict[int, int] = {}
    taken: set[int] = set()
    for p, i in pairs[order].tolist():
        if p not in found and i not in taken:
            found[p] = i
            taken.add(i)
    return found


def _with(
    cells: Cells, added: Iterable[Box], width_px: int, height_px: int, diameter_px: float | None
) -> Cells:
    """Returns cells and, after them, boxes that were added, without a class yet."""
    xyxy = np.array(list(added), np.float32).reshape(-1, 4)
    n = len(xyxy)
    nothing, zeros = np.full(n, nan, np.float32), np.zeros(n, np.int64)
    return Cells(
        Detections.joined([cells.detections, Detections(xyxy, nothing, zeros)]),
        np.concatenate([cells.overlap_score, nothing]),
        np.concatenate([cells.overlapping, np.zeros(n, np.bool_)]),
        np.concatenate([cells.group, zeros]),
        np.concatenate([cells.touches_edge, touches_edge(xyxy, width_px, height_px, diameter_px or 0.0)]),
        Morphology.joined([cells.morphology, Morphology.unknown(n)]),
    )

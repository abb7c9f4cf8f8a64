"""What a slide's cells say of shapes and sizes: which cells may be judged, shares, intervals.

A form is believed only of a single cell that no border cuts, in a field without a flag that spoils forms.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from rbc_edge.config import CELL_DIAMETER_UM
from rbc_edge.store.rows import FieldRow
from rbc_edge.values import SHAPES, Bool, CellClass, Cells, Float32, Int64, ScaleSource, Shape
from rbc_edge.vision.statistics import median, overlap_interval

SPOILS: Final = frozenset(
    (
        *("blurred", "colours", "dark", "empty-boxes", "faint", "overexposed", "scale-mismatch"),
        *("scale-out-of-range", "uneven-light", "unfamiliar", "unsure-overlaps"),
    )
)
"""Flags of a field of which no form is judged. The others are about cells that are missing in the count."""

ICSH_NAMES: Final = {
    Shape.NORMAL: "normal red cell",
    Shape.MACROCYTE: "macrocyte",
    Shape.MICROCYTE: "microcyte",
    Shape.SPHEROCYTE: "spherocyte",
    Shape.TARGET: "target cell",
    Shape.STOMATOCYTE: "stomatocyte",
    Shape.OVALOCYTE: "ovalocyte",
    Shape.TEARDROP: "teardrop cell",
    Shape.BURR: "echinocyte",
    Shape.SCHISTOCYTE: "schistocyte",
    Shape.UNCATEGORISED: "",
    Shape.HYPOCHROMIC: "hypochromic cell",
    Shape.ELLIPTOCYTE: "elliptocyte",
}
"""Names in the recommendations of the ICSH (Palmer and others 2015, doi 10.1111/ijlh.12327)."""

LETTERS: Final = {shape: shape.value[:2].capitalize() for shape in Shape}
"""Two letters for each shape, in pictures."""

ENOUGH: Final = 1000
"""Red cells that the ICSH asks for where a share is given (Zini and others 2012 and 2021, schistocytes)."""

# Textbooks call red cells of 6 to 8 micrometres normal: a seventh of the middle, 7, to either side.
SMALL: Final = (6 / 7) ** 2  # of the slide's median area
LARGE: Final = (8 / 7) ** 2
# A middle half as wide as the cell. A third is normal. Of single cells of Chula that were labelled normal,
# 7 in 100 are above it, of hypochromic ones 59, of target cells 53.
PALE: Final = 0.25  # of the area
_IN_UM: Final = (ScaleSource.UM_PER_PX, ScaleSource.METADATA)


class ShapeLine(NamedTuple):
    """A shape of a slide (a row of ``shapes/<slide>.csv``)."""

    shape: Shape
    n: int
    n_judged: int  # cells of all shapes
    interval: tuple[float, float] | None  # 95 %, of the share. None where no cell is judged

    @property
    def share(self) -> float | None:
        """Share of the judged cells, 0..1. None where there are none."""
        return self.n / self.n_judged if self.n_judged else None


@dataclass(frozen=True, slots=True)
class SlideForms:
    """Sizes and shapes of a slide. Sizes are of all cells that may be judged, sure of their shape or not."""

    lines: tuple[ShapeLine, ...] = ()  # in the order of `SHAPES`
    n_judged: int = 0
    n_measured: int = 0
    area_mean: float | None = None  # square micrometres. None where a field's scale is not known in them
    area_sd: float | None = None
    area_cv: float | None = None  # SD over mean, 1 = 100 %. None with fewer than two cells
    pale_share: float | None = None  # None without a cell, as the next two
    small_share: float | None = None
    large_share: float | None = None


def name(shape: Shape) -> str:
    """Returns the name of a shape on pages: that of the ICSH, where there is one."""
    return ICSH_NAMES[shape] or shape.value


def is_spoiled(row: FieldRow) -> bool:
    """Tells whether no form of a field is judged."""
    return not SPOILS.isdisjoint(row.quality_flags)


def um_per_px(row: FieldRow) -> float | None:
    """Returns the scale of a field in micrometres, where it is known and not only estimated."""
    if row.scale is None or row.scale.source not in _IN_UM:
        return None
    return CELL_DIAMETER_UM / row.scale.cell_diameter_px


def whole(cells: Cells) -> Bool:
    """Tells which cells are single red cells that no border cuts: bool (N,)."""
    red = cells.detections.class_id == CellClass.RBC
    return np.asarray(red & ~cells.overlapping & ~cells.touches_edge.any(axis=1), np.bool_)


def judged(cells: Cells, row: FieldRow) -> list[str]:
    """Says of each cell ``yes``, or why its shape is not judged. Empty where it has none."""
    form = cells.morphology
    reason = np.full(len(cells), "yes", dtype="<U11")
    # The first reason that holds stands.
    if is_spoiled(row):
        reason[:] = "flagged"
    reason[~form.shape_sure] = "unsure"
    reason[cells.touches_edge.any(axis=1)] = "cut"
    reason[cells.overlapping] = "overlapping"
    reason[form.shape < 0] = ""
    return [str(each) for each in reason]


def areas(cells: Cells, row: FieldRow) -> Float32:
    """Returns the areas of cells, float32 (N,), in squares of the diameter of a red cell: any scale."""
    diameter_px = row.scale.cell_diameter_px if row.scale else np.nan
    return np.asarray(cells.morphology.area_px / np.float32(diameter_px) ** 2, np.float32)


def of_slide(fields: Iterable[tuple[FieldRow, Cells]], known: Collection[Shape] = ()) -> SlideForms:
    """Sums up a slide's counted fields. `known` are the shapes that its bundle names.

    Of other shapes there is a line only where they were seen. A shape that could not be seen has no 0.
    """
    n_fields: list[Int64] = []
    seen = set(known)
    sizes, pallor, in_um = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)], True
    for row, cells in fields:
        form, ok = cells.morphology, whole(cells)
        seen.update(SHAPES[i] for i in np.unique(form.shape[form.shape >= 0]).tolist())
        if is_spoiled(row):
            continue
        named = form.shape[ok & form.shape_sure & (form.shape >= 0)]
        if len(named):
            n_fields.append(np.bincount(named, minlength=len(SHAPES)).astype(np.int64))
        measured = ok & ~np.isnan(form.area_px)
        if measured.any():
            sizes.append(areas(cells, row)[measured])
            pallor.append(form.pallor[measured])
            in_um &= um_per_px(row) is not None
    by_field = np.array(n_fields, np.int64).reshape(-1, len(SHAPES))
    n_judged = by_field.sum(axis=1)
    lines = tuple(
        ShapeLine(
            shape, int(by_field[:, i].sum()), int(n_judged.sum()), overlap_interval(by_field[:, i], n_judged)
        )
        for i, shape in enumerate(SHAPES)
        if shape in seen
    )
    return _sizes(lines, int(n_judged.sum()), np.concatenate(sizes), np.concatenate(pallor), in_um)


def _sizes(
    lines: tuple[ShapeLine, ...], n_judged: int, sizes: Float32, pallor: Float32, in_um: bool
) -> SlideForms:
    n = len(sizes)
    if not n:
        return SlideForms(lines, n_judged)
    mean = float(sizes.mean(dtype=np.float64))
    sd = float(sizes.std(ddof=1, dtype=np.float64)) if n > 1 else None
    um2, usual = CELL_DIAMETER_UM**2, median(sizes)
    return SlideForms(
        lines,
        n_judged,
        n,
        area_mean=mean * um2 if in_um else None,
        area_sd=sd * um2 if in_um and sd is not None else None,
        area_cv=None if sd is None else sd / mean,
        pale_share=float((pallor > PALE).mean()),
        small_share=float((sizes < SMALL * usual).mean()),
        large_share=float((sizes > LARGE * usual).mean()),
    )


def kept(text: str) -> tuple[Shape, ...]:
    """Reads a list of shapes, joined with commas. A shape that this version does not know is left out."""
    return tuple(shape for shape in SHAPES if shape in text.split(","))

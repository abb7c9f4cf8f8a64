"""Compares the tables of two processors for the same fields of view."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

COLUMNS: Final = ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets")
_SAME_CELL: Final = 0.15  # of a cell diameter, as in `rbc-edge bundle verify`


@dataclass(frozen=True, slots=True)
class Cell:
    """A row of a table of cells.

    Attributes:
        kind: ``rbc``, ``wbc`` or ``platelet``.
        overlapping: The decision of the classifier.
        xyxy: Box, pixels of the field of view.
        det_score: Detector's score, 0..1.
        overlap_score: Classifier's score, 0..1. NaN for cells that are not red.
    """

    kind: str
    overlapping: bool
    xyxy: tuple[float, float, float, float]
    det_score: float
    overlap_score: float


@dataclass(frozen=True, slots=True)
class Field:
    """The result of one processor for one field of view.

    Attributes:
        sha256: Digest of the image.
        status: As in the table.
        counts: In the order of `COLUMNS`.
        cell_diameter_px: Scale. NaN where there is none.
        cells: All cells.
        elapsed_ms: Time it took, ms.
    """

    sha256: str
    status: str
    counts: tuple[int, ...]
    cell_diameter_px: float
    cells: tuple[Cell, ...]
    elapsed_ms: float


def read(results: Path) -> dict[tuple[str, str], Field]:
    """Reads the tables of ``rbc-edge run --cells``. The keys are slide and field of view."""
    cells: dict[tuple[str, str], list[Cell]] = {}
    for table in sorted((results / "cells").glob("*.csv")):
        for row in _rows(table):
            kind, _, overlap = row["label"].partition("_")
            box = [float(row[f"{side}_px"]) for side in ("x_min", "y_min", "x_max", "y_max")]
            cell = Cell(
                kind,
                overlap == "overlapping",
                (box[0], box[1], box[2], box[3]),
                float(row["det_score"]),
                float(row["overlap_score"] or "nan"),
            )
            cells.setdefault((row["slide_id"], row["fov"]), []).append(cell)
    return {
        (row["slide_id"], row["fov"]): Field(
            row["sha256"],
            row["status"],
            tuple(int(row[column] or -1) for column in COLUMNS),
            float(row["cell_diameter_px"] or "nan"),
            tuple(cells.get((row["slide_id"], row["fov"]), ())),
            float(row["elapsed_ms"] or "nan"),
        )
        for table in sorted(results.glob("*.csv"))
        if table.name != "slides.csv"
        for row in _rows(table)
    }


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences in one field of view.

    Attributes:
        name: Slide and field of view.
        ours: Counts on this processor, by `COLUMNS`.
        theirs: Counts on the other one.
        only_one: Cells that only one of them sees.
        crowded: For each of these, its largest iou with another cell that the same processor sees.
        turned: Pairs of the same red cell, single on one and overlapping on the other.
    """

    name: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    only_one: tuple[Cell, ...]
    crowded: tuple[float, ...]
    turned: tuple[tuple[Cell, Cell], ...]

    def __str__(self) -> str:
        """One line: the counts, then the scores of the cells that differ."""
        counts = ", ".join(
            f"{column} {ours} -> {theirs}"
            for column, ours, theirs in zip(COLUMNS, self.ours, self.theirs, strict=True)
            if ours != theirs
        )
        why = [
            f"{cell.kind} of score {cell.det_score:.3f}, iou {iou:.2f} with another, seen by one only"
            for cell, iou in zip(self.only_one, self.crowded, strict=True)
        ]
        why += [f"overlap score {a.overlap_score:.3f} -> {b.overlap_score:.3f}" for a, b in self.turned]
        return f"{self.name}: {counts or 'same counts'} ({'; '.join(why) or 'same cells'})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of the tables of two processors for the same images.

    Attributes:
        n_fields: Number of fields of view.
        ours: Sums on this processor, by `COLUMNS`.
        theirs: Sums on the other one.
        differences: Fields with a difference in any count or cell.
        scale_error: Largest relative difference of a cell diameter.
        box_error_px: Largest difference of the box of a cell that both see.
        det_error: Largest difference of a detector's score.
        det_shift: Mean difference of the detector's scores, theirs minus ours. A wrong kernel shifts all of
            them. A kernel that only rounds differently does not.
        overlap_error: Largest difference of an overlap score.
    """

    n_fields: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    differences: tuple[Difference, ...]
    scale_error: float
    box_error_px: float
    det_error: float
    det_shift: float
    overlap_error: float

    @property
    def n_changes(self) -> int:
        """Number of cells that only one sees, or that turn from single to overlapping or back."""
        return sum(len(d.only_one) + len(d.turned) for d in self.differences)

    @property
    def worst(self) -> int:
        """Largest difference of any count of any field of view, cells."""
        return max(
            (abs(a - b) for d in self.differences for a, b in zip(d.ours, d.theirs, strict=True)), default=0
        )

    def clearest(self, threshold: float, disputed_iou: float) -> float:
        """Highest score above the threshold among the red cells that only one of them sees.

        White cells and platelets are left out: their score alone says little. A box has the class
        with the best score. Where that turns from white to red, it falls below the threshold of red cells.

        Args:
            threshold: Least score of a red cell.
            disputed_iou: A box with a larger iou with another is left out, because the suppression decides
                whether it stays, and not its score.
        """
        return max(
            (
                cell.det_score - threshold
                for difference in self.differences
                for cell, iou in zip(difference.only_one, difference.crowded, strict=True)
                if cell.kind == "rbc" and iou < disputed_iou
            ),
            default=0.0,
        )

    def off(self, column: str) -> float:
        """Relative difference of a sum."""
        at = COLUMNS.index(column)
        return abs(self.theirs[at] - self.ours[at]) / max(1, self.ours[at])


def compare(ours: dict[tuple[str, str], Field], theirs: dict[tuple[str, str], Field]) -> Comparison:
    """Compares two results, field by field and cell by cell.

    Raises:
        ValueError: The images are not the same, or one of them failed.
    """
    if not ours or {k: f.sha256 for k, f in ours.items()} != {k: f.sha256 for k, f in theirs.items()}:
        raise ValueError("the tables are not of the same images")
    failed = sorted("/".join(k) for k, f in (*ours.items(), *theirs.items()) if f.status != "ok")
    if failed:
        raise ValueError(f"not counted: {', '.join(failed)}")
    differences = []
    pairs: list[tuple[Cell, Cell]] = []
    scale_error = 0.0
    for key, field in ours.items():
        other = theirs[key]
        matched, *lone = _match(field, other)
        only_one = (*lone[0], *lone[1])
        crowded = tuple(
            _crowding(cell, who) for who, cells in zip((field, other), lone, strict=True) for cell in cells
        )
        turned = tuple((a, b) for a, b in matched if a.overlapping != b.overlapping)
        if field.counts != other.counts or only_one or turned:
            differences.append(
                Difference("/".join(key), field.counts, other.counts, only_one, crowded, turned)
            )
        pairs += matched
        if field.cell_diameter_px != other.cell_diameter_px and not (
            math.isnan(field.cell_diameter_px) and math.isnan(other.cell_diameter_px)
        ):
            error = abs(other.cell_diameter_px / field.cell_diameter_px - 1)
            scale_error = max(scale_error, math.inf if math.isnan(error) else error)
    overlap_errors = [abs(a.overlap_score - b.overlap_score) for a, b in pairs if a.kind == "rbc"]
    return Comparison(
        len(ours),
        _sums(list(ours.values())),
        _sums(list(theirs.values())),
        tuple(differences),
        scale_error,
        max((_apart_px(a, b) for a, b in pairs), default=0.0),
        max((abs(a.det_score - b.det_score) for a, b in pairs), default=0.0),
        sum(b.det_score - a.det_score for a, b in pairs) / max(1, len(pairs)),
        max(overlap_errors, default=0.0),
    )


def _sums(fields: Sequence[Field]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*(field.counts for field in fields), strict=True))


def _apart_px(a: Cell, b: Cell) -> float:
    return max(abs(p - q) for p, q in zip(a.xyxy, b.xyxy, strict=True))


def _crowding(cell: Cell, field: Field) -> float:
    """Largest iou of the box of a cell with that of another."""
    return max((_iou(cell.xyxy, other.xyxy) for other in field.cells if other is not cell), default=0.0)


def _iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area_a + area_b - width * height)


def _match(field: Field, other: Field) -> tuple[list[tuple[Cell, Cell]], list[Cell], list[Cell]]:
    """Pairs the cells of two results, nearest first. Returns the pairs, and the cells left in each."""
    reach_px = _SAME_CELL * field.cell_diameter_px
    near = sorted(
        (_apart_px(a, b), i, j)
        for i, a in enumerate(field.cells)
        for j, b in enumerate(other.cells)
        if a.kind == b.kind and _apart_px(a, b) <= reach_px
    )
    free, free_other = set(range(len(field.cells))), set(range(len(other.cells)))
    pairs = []
    for _, i, j in near:
        if i in free and j in free_other:
            free.remove(i)
            free_other.remove(j)
            pairs.append((field.cells[i], other.cells[j]))
    return pairs, [field.cells[i] for i in sorted(free)], [other.cells[j] for j in sorted(free_other)]

"""Completes the boxes of photographs where cells have a point, or nothing at all, instead of a box.

A detector learns to overlook what has no box. So a photograph may teach it only when every cell has one. A
teacher (a bundle) proposes boxes at three scales. A point of an expert says which of the unsure ones are
cells. A point that no box holds gets the box of the dark spot under it. Where a photograph has boxes already,
only cells are added of which the teacher is sure. The result is a table, so that it can be looked at before
it teaches, and made again with a better teacher (self-training).
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, CellClass, Detections, Float32, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.boxes import iou, shared_area
from rbc_train.data import (
    CLASS_NAMES,
    COMPLETED_COLUMNS,
    Box,
    Photograph,
    labelled_diameter_px,
    source_diameters_px,
)

_SCALES: Final = (1.0, 0.8, 1.25)
_LEAST: Final = np.array([0.10, 0.30, 0.30], np.float32)
_SURE: Final = 0.35  # without a point, a box of a photograph without boxes must reach this score
# Of 81 white cells that a teacher found in Chula, 29 were red cells, with holes or dark: these vary by less
# than 0.26, but for three small ones with low scores. White cells, of which the nucleus is dark, vary more.
_NUCLEUS: Final = 0.255
_SURE_WHITE: Final = 0.6
_ADDED: Final = 0.55  # and a box beside those of an annotator this one
_NEW_IOU: Final = 0.45  # a box of another scale shows a cell of its own when it shares less with all others
_SAME_IOU: Final = 0.85  # two boxes of an annotator that share more are one cell
_BESIDE_IOU: Final = 0.3
_HOLLOW: Final = 0.25  # a box with less foreground shows no cell
_VIVID: Final = 90  # grey levels of green over the weaker of red and blue
_INKED: Final = 0.08  # a box with more burned-in pixels shows a pointer or letters
_COVERED: Final = 0.5  # share of a box or spot that others hold already
_SPOT: Final = (0.3, 1.6)  # sides of a spot that can be one cell, cell diameters


def complete(photograph: Photograph, analyzer: Analyzer, diameter_px: float) -> list[Box]:
    """Completes the boxes of one photograph.

    Args:
        photograph: With boxes of an annotator, or with points.
        analyzer: The teacher.
        diameter_px: Of its red cells, pixels of the photograph.

    Returns:
        Every cell.
    """
    view = photograph.view(diameter_px)
    mask = foreground(view.image)
    found = _candidates(analyzer, view, diameter_px)
    boxes, seen = found.xyxy, found.xyxy / view.px
    filled = (_share(mask, seen) >= _HOLLOW) & (_share(_ink(view.image), seen) < _INKED)
    if photograph.complete:
        return _beside(photograph, found, filled)
    points = np.array([(p.x, p.y) for p in photograph.points], np.float32).reshape(-1, 2)
    owner = _deal_points(points, boxes)
    pointed = np.zeros(len(boxes), np.bool_)
    pointed[owner[owner >= 0]] = True
    white = found.class_id == CellClass.WBC
    flat = _uneven(view.image, seen) < _NUCLEUS
    sure = np.where(white & ~flat, found.score >= _SURE_WHITE, found.score >= _SURE)
    keep = pointed | (sure & filled)
    # An expert's point is on a red cell, whatever the teacher says. And what has no nucleus is no white cell.
    red = pointed | (found.class_id == CellClass.RBC) | (white & flat)
    made = [
        Box(
            _corners(box),
            CellClass.RBC if is_red else CellClass(kind),
            "pointed" if has_point else "found",
        )
        for box, is_red, kind, has_point in zip(
            boxes[keep],
            red[keep].tolist(),
            found.class_id[keep].tolist(),
            pointed[keep].tolist(),
            strict=True,
        )
    ]
    held = boxes[keep]
    for point in points[owner < 0]:
        box, origin = _box_of_point(point, mask, view, diameter_px, held)
        if box is not None:
            made.append(Box(_corners(box), CellClass.RBC, origin))
            held = np.concatenate([held, box[None]])
    return made


def foreground(image: UInt8) -> Bool:
    """Tells which pixels of a balanced field are cells: darker than the glass, pale middles filled.

    Args:
        image: uint8 (H, W, 3) RGB, after `preprocess.balance`.

    Returns:
        bool (H, W).
    """
    grey = cv2.GaussianBlur(image.min(axis=2), (0, 0), 1.0)
    level, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY_INV | cv2.THRESH_OTSU)
    # Between cells and glass, also where nearly all is glass, or nearly all cells.
    level = float(np.clip(level, 0.6 * preprocess.BACKGROUND_LEVEL, 0.93 * preprocess.BACKGROUND_LEVEL))
    dark = np.asarray(grey < level, np.uint8)
    return np.asarray(_without_holes(dark) > 0, np.bool_)


def _uneven(image: UInt8, boxes: Float32) -> Float32:
    """How much the absorbance of green varies inside each box, as standard deviation: float32 (N,)."""
    depth = -np.log(np.maximum(image[:, :, 1], 5) / np.float32(preprocess.BACKGROUND_LEVEL))
    parts = (
        depth[max(y0, 0) : y1, max(x0, 0) : x1]
        for x0, y0, x1, y1 in np.round(boxes).astype(np.int64).tolist()
    )
    return np.array([part.std() if part.size else 0.0 for part in parts], np.float32)


def _ink(image: UInt8) -> Bool:
    """Tells which pixels were burned in, in yellow, green or cyan: blood absorbs green the most."""
    red, green, blue = (image[:, :, i].astype(np.int16) for i in range(3))
    return np.asarray(green - np.minimum(red, blue) > _VIVID, np.bool_)


def _without_holes(dark: UInt8) -> UInt8:
    """Fills what the foreground encloses, as long as it is no larger than a pale middle can be."""
    n, number, stats, _ = cv2.connectedComponentsWithStats(1 - dark, connectivity=4)
    height, width = dark.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    inner = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    small = stats[:, cv2.CC_STAT_AREA] < height * width / 200
    hole = inner & small
    hole[0] = False  # component 0 is the foreground itself
    return np.asarray(dark | hole[number].astype(np.uint8), np.uint8) if n > 1 else dark


def _candidates(analyzer: Analyzer, view: preprocess.View, diameter_px: float) -> Detections:
    """What the teacher finds at any of its scales, down to low scores. The right scale comes first."""
    found = Detections.empty()
    for factor in _SCALES:
        more = analyzer.detector.detect(view, diameter_px * factor, score_threshold=_LEAST)
        shared = iou(more.xyxy, found.xyxy).max(axis=1, initial=0.0)
        new = more.take(np.asarray(shared < _NEW_IOU, np.bool_))
        found = Detections(
            np.concatenate([found.xyxy, new.xyxy]),
            np.concatenate([found.score, new.score]),
            np.concatenate([found.class_id, new.class_id]),
        )
    return found


def _beside(photograph: Photograph, found: Detections, filled: Bool) -> list[Box]:
    """The boxes of an annotator, each once, and the cells that they lack."""
    own, kinds = photograph.xyxy, photograph.class_id
    shared = iou(own, own)
    again = [bool(((shared[i, :i] > _SAME_IOU) & (kinds[:i] == kinds[i])).any()) for i in range(len(own))]
    made = [
        Box(_corners(box), CellClass(kind), "labelled")
        for box, kind, twice in zip(own, kinds.tolist(), again, strict=True)
        if not twice
    ]
    apart = (iou(found.xyxy, own).max(axis=1, initial=0.0) < _BESIDE_IOU) & (
        _held(found.xyxy, own) < _COVERED
    )
    sure = apart & filled & (found.score >= _ADDED)
    added = found.take(np.asarray(sure, np.bool_))
    return made + [
        Box(_corners(box), CellClass(kind), "found")
        for box, kind in zip(added.xyxy, added.class_id.tolist(), strict=True)
    ]


def _held(boxes: Float32, others: Float32) -> Float32:
    """The largest share of each box, float32 (N, 4), that lies in one of the others: float32 (N,)."""
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return np.asarray(
        shared_area(boxes, others).max(axis=1, initial=0.0) / np.maximum(area, 1e-6), np.float32
    )


def _deal_points(points: Float32, boxes: Float32) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Gives each point the box that holds it most centrally, each box at most one point. -1: none."""
    owner = np.full(len(points), -1, np.int64)
    if len(points) == 0 or len(boxes) == 0:
        return owner
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    off = np.abs(points[:, None] - centre[None]) / np.maximum(half[None], 1e-6)
    distance = off.max(axis=2)
    taken: set[int] = set()
    for flat in np.argsort(distance, axis=None).tolist():
        i, j = divmod(flat, len(boxes))
        if distance[i, j] > 1:
            break
        if owner[i] < 0 and j not in taken:
            owner[i] = j
            taken.add(j)
    return owner


def _box_of_point(
    point: Float32, mask: Bool, view: preprocess.View, diameter_px: float, held: Float32
) -> tuple[Float32 | None, str]:
    """The box of a point that the teacher did not see: the dark spot under it, or a disc. None: held."""
    seen = point / view.px[:2]
    size = np.array(view.size * 2, np.float32)
    x, y = (int(np.clip(seen[k], 0, mask.shape[1 - k] - 1)) for k in (0, 1))
    spot = _spot(mask, x, y, view.shown_px(diameter_px))
    if spot is not None:
        box = np.clip(spot * view.px, 0, size).astype(np.float32)
        if _held(box[None], held)[0] < _COVERED:
            return box, "spot"
    half = diameter_px / 2
    box = np.clip(np.array([*(point - half), *(point + half)], np.float32), 0, size)
    return (box, "disc") if _held(box[None], held)[0] < _COVERED else (None, "")


def _spot(mask: Bool, x: int, y: int, diameter: float) -> Float32 | None:
    """The box around the connected foreground at a pixel, where it can be one cell."""
    reach = round(_SPOT[1] * diameter) + 2
    x0, y0 = max(0, x - reach), max(0, y - reach)
    window = mask[y0 : y + reach, x0 : x + reach]
    _, number, stats, _ = cv2.connectedComponentsWithStats(window.astype(np.uint8), connectivity=4)
    own = int(number[y - y0, x - x0])
    if own == 0:
        return None
    left, top, width, height = (int(v) for v in stats[own, :4])
    if not all(_SPOT[0] * diameter <= side <= _SPOT[1] * diameter for side in (width, height)):
        return None
    return np.array([x0 + left, y0 + top, x0 + left + width, y0 + top + height], np.float32)


def _share(mask: Bool, boxes: Float32) -> Float32:
    """How much of each box, float32 (N, 4) in pixels of the mask, is foreground: float32 (N,), 0..1."""
    summed = cv2.integral(mask.astype(np.uint8)).astype(np.int64)
    limit = np.array([mask.shape[1], mask.shape[0]] * 2)
    x0, y0, x1, y1 = np.clip(np.round(boxes).astype(np.int64), 0, limit).T
    inside = summed[y1, x1] - summed[y0, x1] - summed[y1, x0] + summed[y0, x0]
    return np.asarray(inside / np.maximum((x1 - x0) * (y1 - y0), 1), np.float32)


def _corners(box: Float32) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (round(float(v), 2) for v in box)
    return x0, y0, x1, y1


def write(
    photographs: Sequence[Photograph],
    analyzer: Analyzer,
    file: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Completes photographs and writes their boxes as a table, a row a box.

    Args:
        photographs: Those of one collection: the size of the cells of a photograph without boxes is that of
            the others of its source.
        analyzer: The teacher.
        file: CSV to write: `COMPLETED_COLUMNS`.
        progress: Called with (photographs done, in all).

    Returns:
        How many boxes there are of each origin.
    """
    of_source = source_diameters_px(p for p in photographs if p.complete)
    counts: dict[str, int] = {}
    temporary = file.with_suffix(".tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COMPLETED_COLUMNS)
        for done, photograph in enumerate(photographs, start=1):
            for box in complete(photograph, analyzer, labelled_diameter_px(photograph, of_source)):
                writer.writerow((photograph.name, *box.xyxy, CLASS_NAMES[box.class_id], box.origin))
                counts[box.origin] = counts.get(box.origin, 0) + 1
            if progress:
                progress(done, len(photographs))
    temporary.replace(file)
    return counts

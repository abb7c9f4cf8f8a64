"""Sizes and shapes on a page: pictures of example cells, and the points of the figures."""

import base64
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from math import inf, isnan
from operator import attrgetter
from typing import Final, NamedTuple

import cv2
import numpy as np
from PIL import Image

from rbc_edge.errors import ImageError
from rbc_edge.store.rows import FieldRow
from rbc_edge.values import SHAPES, Cells, Float32, Shape, UInt8
from rbc_edge.views import shapes
from rbc_edge.views.gallery import EmbeddedPicture
from rbc_edge.views.overlay import digest
from rbc_edge.vision.image_file import load_field
from rbc_edge.vision.statistics import median

_SURE, _DOUBTFUL = 4, 2  # examples of each shape
_MAX_FIELDS: Final = 24  # of which the image is opened for examples
_SIDE_PX: Final = 80
_SIDE: Final = 1.6  # of a picture, in diameters of a red cell
_LEAST_AROUND: Final = 0.05  # of the longer side of the box, on each side
_QUALITY: Final = 80
_MAX_POINTS: Final = 600
_BINS: Final = range(30, 190, 10)  # per cent of the median area, the last ones together


class Example(NamedTuple):
    """A cell that is shown as an example of its shape."""

    shape: Shape
    score: float  # NaN: a person said it
    is_sure: bool
    fov: str
    key: str
    box: tuple[float, float, float, float]

    @property
    def says(self) -> str:
        """The probability, or that it is a person's word."""
        return "corrected" if isnan(self.score) else f"{self.score:.2f}"

    @property
    def rank(self) -> float:
        """Lowest first: the most certain, or the most doubtful. Nothing is surer than a person's word."""
        return -inf if isnan(self.score) else -self.score if self.is_sure else self.score


class Point(NamedTuple):
    """A cell in the figure: area over the median of the slide, aspect ratio, and the letters of its shape."""

    area: float
    aspect: float
    letters: str  # empty: normal, or no shape is judged


class Forms(NamedTuple):
    """What a page shows of sizes and shapes."""

    summary: shapes.SlideForms
    bars: dict[str, int]  # cells by area, per cent of the median
    points: list[Point]
    n_points: int  # of which `points` are a part
    examples: list[Example]

    def strips(self, pictures: Collection[str]) -> list[tuple[Shape, list[Example]]]:
        """Returns the examples that have a picture, by shape."""
        shown = [each for each in self.examples if each.key in pictures]
        return [(shape, list(some)) for shape, some in groupby(shown, key=attrgetter("shape"))]


def of_slide(fields: Sequence[tuple[FieldRow, Cells]], known: Iterable[Shape]) -> Forms:
    """Sums up a slide's counted fields for its page."""
    area, aspect, shape = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    found: dict[tuple[Shape, bool], list[Example]] = {}
    for row, cells in fields:
        form, whole = cells.morphology, shapes.whole(cells)
        if shapes.is_spoiled(row):
            continue
        measured = whole & ~np.isnan(form.area_px)
        area.append(shapes.areas(cells, row)[measured])
        aspect.append(form.aspect_ratio[measured])
        shape.append(np.where(form.shape_sure, form.shape, -1)[measured])
        for i in np.flatnonzero(whole & (form.shape >= 0)).tolist():
            sure, score = bool(form.shape_sure[i]), float(form.shape_score[i])
            x0, y0, x1, y1 = cells.detections.xyxy[i].tolist()
            key = f"{digest(row.sha256, x0, y0, x1, y1)}-{_SIDE_PX}"
            each = Example(SHAPES[int(form.shape[i])], score, sure, row.fov, key, (x0, y0, x1, y1))
            some = found.setdefault((each.shape, sure), [])
            some.append(each)
            # Most certain, or most doubtful, first. Only the best are kept.
            some.sort(key=lambda e: (e.rank, e.fov, e.box))
            del some[_SURE if sure else _DOUBTFUL :]
    examples = [e for s in SHAPES for sure in (True, False) for e in found.get((s, sure), ())]
    sizes, aspects, kinds = np.concatenate(area), np.concatenate(aspect), np.concatenate(shape)
    points, bars = [], {}
    if len(sizes):
        sizes = sizes / np.float32(median(sizes))
        bars = _bars(sizes)
        some_of = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), _MAX_POINTS)).astype(np.int64))
        points = [Point(float(sizes[i]), float(aspects[i]), _letters(int(kinds[i]))) for i in some_of]
    return Forms(shapes.of_slide(fields, tuple(known)), bars, points, len(sizes), examples)


def _bars(sizes: Float32) -> dict[str, int]:
    at = ((100 * sizes - _BINS[0]) // _BINS.step).clip(0, len(_BINS) - 1).astype(np.int64)
    n = np.bincount(at, minlength=len(_BINS)).tolist()
    return {str(start + _BINS.step // 2): n[i] for i, start in enumerate(_BINS)}


def _letters(shape: int) -> str:
    return "" if shape < 0 or SHAPES[shape] is Shape.NORMAL else shapes.LETTERS[SHAPES[shape]]


def pictures(
    rows: Mapping[str, FieldRow],
    examples: Sequence[Example],
    old: Mapping[str, EmbeddedPicture],
    keep_going: Callable[[], bool],
) -> dict[str, EmbeddedPicture] | None:
    """Cuts example cells out of their images: pictures by key. None where it was ended early.

    Old pictures are used again. A cell of an image that is gone, or that has changed, has none. So have cells
    of too many fields: opening an image takes as long as counting it.
    """
    made = {each.key: old[each.key] for each in examples if each.key in old}
    by_field: dict[str, list[Example]] = {}
    for each in examples:
        if each.key not in made:
            by_field.setdefault(each.fov, []).append(each)
    for fov, wanted in list(by_field.items())[:_MAX_FIELDS]:
        if not keep_going():
            return None
        row = rows[fov]
        try:
            field = load_field(row.path, row.slide_id, row.fov, row.page)
        except ImageError:
            continue
        if field.sha256 == row.sha256:
            diameter_px = row.scale.cell_diameter_px if row.scale else 0.0
            made |= {each.key: _cut(field.image, each, diameter_px) for each in wanted}
    return made


def _cut(image: UInt8, example: Example, diameter_px: float) -> EmbeddedPicture:
    """Cuts a cell out. All cells of a slide are shown at one scale, so that they can be compared."""
    x0, y0, x1, y1 = example.box
    side = max(2, round(max(_SIDE * diameter_px, (1 + 2 * _LEAST_AROUND) * max(x1 - x0, y1 - y0))))
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    # Single cells that no border cuts: hardly anything lies beyond the border.
    wide = image[max(top, 0) : max(top + side, 1), max(left, 0) : max(left + side, 1)]
    how = cv2.INTER_AREA if side > _SIDE_PX else cv2.INTER_LINEAR
    height, width = (max(1, round(n * _SIDE_PX / side)) for n in wide.shape[:2])
    shown = cv2.resize(wide, (width, height), interpolation=how)
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, "JPEG", quality=_QUALITY)
    return EmbeddedPicture(example.key, base64.b64encode(buffer.getvalue()).decode("ascii"), width, height)

"""The quality of a field's image: focus, light, crowding, scale, and whether it is a smear at all.

Everything is measured at model scale, where a red cell has the same size whatever the camera, and relative to
the field itself: an edge against its own cell's contrast, glass against the field's brightest. Flags warn and
never change a count. The bounds lie between the validation photographs as they are and the same photographs
with drawn defects (docs/quality.md).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, CellClass, Cells, Float32, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.statistics import median


@dataclass(frozen=True, slots=True)
class Rule:
    """A bound that raises a flag."""

    flag: str
    feature: str  # name of one of the `Features`
    above: bool  # whether it is raised above the bound, or below
    bound: float  # in the feature's unit

    def is_broken(self, features: "Features") -> bool:
        """Tells whether a field breaks the rule. A feature that could not be measured does not."""
        value: float = getattr(features, self.feature)
        return value > self.bound if self.above else value < self.bound  # NaN compares false


RULES: Final = (
    Rule("blurred", "edge_width", True, 0.145),
    Rule("crowded", "glass", False, 0.28),
    Rule("dark", "bright_level", False, 30.0),
    Rule("faint", "contrast", False, 0.07),
    Rule("overexposed", "clipped", True, 0.05),
    Rule("scale-out-of-range", "cell_diameter_px", False, 14.0),
    Rule("uneven-light", "unevenness", True, 0.60),
    Rule("unfamiliar", "confidence", False, 0.45),
    Rule("unfamiliar", "green", False, 0.31),
)
"""The bounds (docs/quality.md).

Three are more tolerant than the drawn defects alone suggest. Other laboratories' weaker stain (`contrast`)
and white glass (`clipped`) do no harm yet, and `green` is 1/3 for a monochrome camera. There is no bound for
large cells: photographs enlarged five times give the same counts. The bound of `confidence` is for the
shipped bundle. Another detector may have other scores.
"""

FLAGS: Final[Mapping[str, str]] = {
    "blurred": "The outlines of the cells are washed out: out of focus, or the stage moved. Focus again and "
    "take the field once more. In a strongly blurred field cells are missed.",
    "clump": "A group of cells could not be taken apart, and cells of it are missing from the count. Look at "
    "the field. If this happens often, move to where cells lie side by side.",
    "crowded": "Hardly any glass shows between the cells: the thick part of the smear. Cells that lie under "
    "others are not counted. Move to where cells lie side by side.",
    "dark": "Too little light: details are lost, and overlaps are no longer found. Turn up the lamp, open "
    "the aperture, or expose longer.",
    "faint": "The cells hardly differ from the glass: weak stain, or too much light. Cells are missed. Stain "
    "again or reduce the light.",
    "no-red-cells": "No red cell was found. Either the field is empty, or the models do not know this kind "
    "of image. Look at it.",
    "overexposed": "Parts of the cells are as white as the camera can show, and other cells may have "
    "vanished. Reduce light or exposure until the glass is just below white.",
    "scale-mismatch": "The cells have clearly another size than the scale that was given. Check "
    "--cell-diameter or --um-per-px, and whether another objective was used.",
    "scale-out-of-range": "The cells are too small in pixels: no gap shows between neighbours, and single "
    "cells are called overlapping. Use a stronger objective, or do not shrink the images.",
    "uneven-light": "One side or the corners are less than half as bright as the rest. Centre the lamp and "
    "the condenser. Cells in the dark part are the first to be missed.",
    "unfamiliar": "The models are unsure about this image, or its colour is not that of a stained smear. It "
    "may be no blood smear, or have an unknown stain. Look at it before you trust the counts.",
}
"""Every flag of the column ``quality_flags``: what it means and what to do."""

_SATURATED: Final = 250  # JPEG and averaging leave a few levels below 255
_CORE: Final = 0.6  # share of a box's sides that shows its cell and no glass
_POINTS: Final = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2), axis=-1).reshape(-1, 2)
_COLOUR_PIXELS: Final = 4_000  # enough for a percentile
_BRIGHT_SHARE: Final = 0.95  # the level of glass, as in `preprocess.balance`
_UNSCALED_SIDE_PX: Final = 192  # a field without cells has no scale
_MAX_CELLS: Final = 48  # so many outlines are measured
_ANGLES: Final = np.arange(16) * (2 * np.pi / 16)
_RADII: Final = np.linspace(0.55, 1.45, 19)  # of the box's half sides
# Points on rays, in half sides of the box from its middle: x and y, each float32 (angles, radii).
_RAYS: Final = tuple(np.outer(f(_ANGLES), _RADII).astype(np.float32) for f in (np.cos, np.sin))
_MAX_REMAP_PX: Final = 32766  # OpenCV reaches no further
_MIN_RAYS: Final = 8
_RAY_CONTRAST: Final = 0.03  # of the bright level: a ray with less crosses no outline
_BLOCK: Final = 1 / 8  # of a cell
_MAX_BLOCKS: Final = 20_000
_GLASS: Final = 0.9  # of the brightest: darker is a cell
_MIN_FIT: Final = 6  # blocks
_RIDGE: Final = 1e-3  # keeps the fit finite where all glass lies in one place
_FIT_OFF: Final = 0.15  # blocks this far from the fit are not glass
_MIN_COLOUR: Final = 0.02  # absorbance below which a colour is noise


@dataclass(frozen=True, slots=True)
class Features:
    """What was measured in one field of view. NaN where it could not be measured."""

    bright_level: float  # grey level of the glass, 0..255, before `preprocess.balance`
    clipped: float  # share of the red cells' middles (without any: of the field) that is all white, 0..1
    contrast: float  # how much darker a red cell's outline is than its surroundings, share of `bright_level`
    edge_width: float  # width of an outline from dark to bright, cell diameters
    unevenness: float  # how much light the darkest place of the glass lacks, 0..1
    glass: float  # share of the field that is as bright as glass, 0..1
    cell_diameter_px: float  # the scale, pixels of the field of view
    confidence: float  # median detector score of the red cells, 0 at the bundle's threshold, 1 at most
    # Share of green in the red cells' absorbance, 0..1. Eosin and haemoglobin absorb green most. A monochrome
    # camera gives 1/3.
    green: float


def measure(
    view: preprocess.View, cells: Cells, cell_diameter_px: float, *, model_px: float, min_score: float
) -> Features:
    """Measures a field of view, by its view and the cells that were found.

    `cell_diameter_px` is the scale they were found at, pixels of the field, NaN when there is none. The
    bundle says `model_px` (its `cell_diameter_px`) and `min_score` (its threshold of red cells).
    """
    height, width = view.plain.shape[:2]
    diameter = view.shown_px(cell_diameter_px)
    is_scaled = not math.isnan(cell_diameter_px)
    # Enlarging shows nothing more.
    factor = min(1.0, model_px / diameter if is_scaled else _UNSCALED_SIDE_PX / min(height, width))
    # Averaging all three channels takes as long as everything else here, and colour does not need it.
    grey = preprocess.rescale(np.asarray(cv2.cvtColor(view.plain, cv2.COLOR_RGB2GRAY), np.uint8), factor)
    found, seen = cells.detections, cells.detections.xyxy / view.px
    boxes = seen * np.array([grey.shape[1] / width, grey.shape[0] / height] * 2, np.float32)
    red = found.class_id == CellClass.RBC
    bright = _bright_level(grey)
    outlines = _outlines(grey, boxes[red], bright)
    block_px = _BLOCK * (diameter * factor if is_scaled else model_px)
    light = _light(grey, boxes, max(1, round(block_px)))
    score = found.score[red]
    confidence = (median(score) - min_score) / (1 - min_score) if len(score) else math.nan
    clipped, green = _colour(view.plain, seen[red])
    return Features(bright, clipped, *outlines, *light, cell_diameter_px, confidence, green)


def flags(features: Features) -> tuple[str, ...]:
    """Returns the flags that a field's features raise, sorted.

    >>> fine = Features(210, 0.0, 0.3, 0.09, 0.1, 0.45, 88.0, 0.8, 0.44)
    >>> flags(fine)
    ()
    >>> from dataclasses import replace
    >>> flags(replace(fine, edge_width=0.3, bright_level=12.0, green=math.nan))
    ('blurred', 'dark')
    """
    return tuple(sorted({rule.flag for rule in RULES if rule.is_broken(features)}))


def _bright_level(grey: UInt8) -> float:
    """Returns the grey level that 5 % of the pixels reach."""
    seen = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().cumsum()
    return float(np.searchsorted(seen, _BRIGHT_SHARE * grey.size))


def _outlines(grey: UInt8, boxes: Float32, bright: float) -> tuple[float, float]:
    """Measures along rays from inside to outside each box. Returns the contrast and the edge width."""
    if len(boxes) > _MAX_CELLS:
        boxes = boxes[np.linspace(0, len(boxes) - 1, _MAX_CELLS).astype(np.int64)]
    if len(boxes) == 0:
        return math.nan, math.nan
    grey = grey[:_MAX_REMAP_PX, :_MAX_REMAP_PX]
    height, width = grey.shape
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = (centre[:, i, None] + half[:, i, None] * _RAYS[i].reshape(1, -1) for i in (0, 1))
    seen = cv2.remap(grey, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    shape = (len(boxes), *_RAYS[0].shape)
    end_x, end_y = x.reshape(shape)[:, :, -1], y.reshape(shape)[:, :, -1]
    # Rays are straight and start inside: if the end is inside, all of it is.
    inside = (end_x >= 0) & (end_x <= width - 1) & (end_y >= 0) & (end_y <= height - 1)
    rays = seen.reshape(shape)[inside].astype(np.float32)
    if len(rays) < _MIN_RAYS:
        return math.nan, math.nan
    depth = rays.max(axis=1) - rays.min(axis=1)
    contrast = median(depth) / max(bright, 1.0)
    rise = (rays[:, 1:] - rays[:, :-1]).max(axis=1)
    crosses = (depth > _RAY_CONTRAST * bright) & (rise > 0)
    if np.count_nonzero(crosses) < _MIN_RAYS:
        return contrast, math.nan
    step = float(_RADII[1] - _RADII[0]) / 2  # of a diameter
    return contrast, median(depth[crosses] / rise[crosses]) * step


def _light(grey: UInt8, boxes: Float32, block_px: int) -> tuple[float, float]:
    """Fits the lamp to the glass between the boxes. Returns its unevenness, and how much glass there is."""
    height, width = grey.shape
    rows, columns = height // block_px, width // block_px
    if min(rows, columns) < 4:
        return math.nan, math.nan
    level = np.asarray(cv2.resize(grey, (columns, rows), interpolation=cv2.INTER_AREA), np.float32)
    under = np.zeros((rows, columns), np.uint8)
    scale = np.array([columns / width, rows / height] * 2, np.float32)
    for x0, y0, x1, y1 in np.round(boxes * scale).astype(np.int64).tolist():
        under[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = 1
    step = max(1, math.isqrt(rows * columns // _MAX_BLOCKS))  # a sample is enough
    level, under = level[::step, ::step], under[::step, ::step]
    lamp = _lamp(level, under == 0)
    if lamp is None:
        return math.nan, float((level > _GLASS * _bright_level(grey)).mean())
    # Relative to the brightest places: darker blocks pull the fit down a little.
    flat = level / np.maximum(lamp, 1.0)
    rank = int(_BRIGHT_SHARE * (flat.size - 1))
    brightest = float(np.partition(flat, rank, axis=None)[rank])
    unevenness = 1 - float(max(lamp.min(), 0.0)) / max(float(lamp.max()), 1.0)
    return unevenness, float((flat > _GLASS * brightest).mean())


def _lamp(level: Float32, free: Bool) -> Float32 | None:
    """Fits a plane and a bowl (vignetting grows with the square of the radius) to blocks without cells.

    `level` and the result are float32 (h, w), `free` is bool (h, w). None where too little glass is free.
    """
    terms = _terms(*level.shape)
    fitted = None
    for _ in range(2):  # the second time without blocks that are not glass
        known = terms[free]
        if len(known) < _MIN_FIT:
            return fitted
        # Some of OpenBLAS's kernels for Arm raise floating point flags on finite numbers.
        with np.errstate(all="ignore"):
            product = known.T @ known + _RIDGE * np.eye(4, dtype=np.float32)
            fitted = np.asarray(terms @ np.linalg.solve(product, known.T @ level[free]), np.float32)
        free = free & (np.abs(level - fitted) < _FIT_OFF * np.abs(fitted))
    return fitted


@functools.lru_cache(maxsize=8)
def _terms(rows: int, columns: int) -> Float32:
    """Returns float32 (rows, columns, 4): 1, x, y and the squared radius, x and y from -1 to 1."""
    x, y = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-1, 1, rows))
    terms = np.stack([np.ones_like(x), x, y, x * x + y * y], axis=-1).astype(np.float32)
    terms.flags.writeable = False  # threads share it
    return terms


def _colour(image: UInt8, boxes: Float32) -> tuple[float, float]:
    """Returns how much of the red cells is clipped, and green's share of their absorbance, from points."""
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // _COLOUR_PIXELS))
    some = image[::step, ::step].reshape(-1, 3)
    if len(boxes) == 0:
        return float((some.min(axis=1) >= _SATURATED).mean()), math.nan
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * _CORE
    place = np.floor(centre[:, None] + half[:, None] * _POINTS).astype(np.int64)  # (N, P, 2)
    x, y = (np.clip(place[..., i], 0, image.shape[1 - i] - 1) for i in (0, 1))
    seen = image[y, x]  # (N, P, 3)
    clipped = float((seen.min(axis=2) >= _SATURATED).mean())
    glass = np.array(preprocess.percentile(some[:, None], 100 * _BRIGHT_SHARE))
    absorbance = np.median(np.log(np.maximum(glass, 1.0) / np.maximum(seen.mean(axis=1), 1.0)), axis=0)
    total = float(absorbance.sum())
    return clipped, float(absorbance[1]) / total if total > _MIN_COLOUR else math.nan

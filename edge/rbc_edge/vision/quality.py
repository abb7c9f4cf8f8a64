"""The quality of a field's image: focus, light, crowding, scale, and whether it is a smear at all.

Everything is measured at model scale, where a red cell has the same size whatever the camera, and relative to
the field itself: an edge against its own cell's contrast, glass against the field's brightest. Flags warn and
never change a count. The bounds of what a defect changes lie between the validation photographs as they are
and the same photographs with drawn defects. Those of what a wrong count shows (`missed`, `hollow`, `doubt`,
`confidence`) lie between fields that are right and fields that are wrong, of laboratories that were left out
of the training (docs/quality.md).
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, CellClass, Cells, Float32, Int64, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import touching_pairs
from rbc_edge.vision.statistics import median


@dataclass(frozen=True, slots=True)
class Rule:
    """A bound that raises a flag."""

    flag: str
    feature: str  # name of one of the `Features`
    above: bool  # whether it is raised above the bound, or below
    bound: float  # in the feature's unit
    also: "Rule | None" = None  # must be broken too

    def is_broken(self, features: "Features") -> bool:
        """Tells whether a field breaks the rule. A feature that could not be measured does not."""
        value: float = getattr(features, self.feature)
        broken = value > self.bound if self.above else value < self.bound  # NaN compares false
        return broken and (self.also is None or self.also.is_broken(features))


RULES: Final = (
    Rule("blurred", "edge_width", True, 0.155),
    Rule("colours", "exchanged", True, 0.085),
    Rule("colours", "tint", True, 0.45),
    Rule("colours", "grain", True, 0.035),
    Rule("crowded", "glass", False, 0.28, also=Rule("crowded", "piled", True, 0.04)),
    Rule("dark", "bright_level", False, 30.0),
    Rule("empty-boxes", "hollow", True, 0.15),
    Rule("faint", "contrast", False, 0.07),
    Rule("missed-cells", "missed", True, 0.06),
    Rule("overexposed", "clipped", True, 0.05),
    Rule("scale-out-of-range", "cell_diameter_px", False, 14.0),
    Rule("uneven-light", "unevenness", True, 0.60),
    Rule("unfamiliar", "confidence", False, 0.55),
    Rule("unfamiliar", "green", False, 0.31),
    Rule("unsure-overlaps", "doubt", True, 0.18),
)
"""The bounds (docs/quality.md).

Three are more tolerant than the drawn defects alone suggest. Other laboratories' weaker stain (`contrast`)
and white glass (`clipped`) do no harm yet, and `green` is 1/3 for a monochrome camera. There is no bound for
large cells: photographs enlarged five times give the same counts. Little glass alone is no thick smear, cells
may lie side by side. The bounds of `confidence` and `doubt` are for the shipped bundle. Other networks may
have other scores.
"""

FLAGS: Final[Mapping[str, str]] = {
    "blurred": "The outlines of the cells are washed out: out of focus, or the stage moved. Focus again and "
    "take the field once more. In a strongly blurred field cells are missed.",
    "clump": "A group of cells could not be taken apart, and cells of it are missing from the count. Look at "
    "the field. If this happens often, move to where cells lie side by side.",
    "colours": "The colours are not those of a camera: red and blue are exchanged, one colour drowns the "
    "others, or the image is dithered to few colours. Check the program that saves the images.",
    "crowded": "Hardly any glass shows between the cells: the thick part of the smear. Cells that lie under "
    "others are not counted. Move to where cells lie side by side.",
    "dark": "Too little light: details are lost, and overlaps are no longer found. Turn up the lamp, open "
    "the aperture, or expose longer.",
    "empty-boxes": "Some of the red cells that were counted are empty glass. The count is too high. Look at "
    "the overlay. The models may not know this stain or camera.",
    "faint": "The cells hardly differ from the glass: weak stain, or too much light. Cells are missed. Stain "
    "again or reduce the light.",
    "missed-cells": "Something as dark as cells lies outside all boxes, or red cells are called white cells "
    "or platelets. The count is too low. Look at the overlay. The models may not know this stain or camera.",
    "no-red-cells": "No red cell was found. Either the field is empty, or the models do not know this kind "
    "of image. Look at it.",
    "overexposed": "Parts of the cells are as white as the camera can show, and other cells may have "
    "vanished. Reduce light or exposure until the glass is just below white.",
    "pixel-size": "A note, no warning: the file says another size of its pixels than the cells show. It was "
    "not used. Check which objective the camera's program believes in, or whether the image was resized.",
    "round-field": "A note, no warning: a black surround (an eyepiece, or bars) is left out. Cells that its "
    "rim cuts are cut cells, and nothing at the rim is counted as a white cell. A little optical zoom, or a "
    "telephone nearer to the eyepiece, leaves fewer cut cells.",
    "scale-mismatch": "The cells have clearly another size than the scale that was given. Check "
    "--cell-diameter or --um-per-px, and whether another objective was used.",
    "scale-out-of-range": "The cells are too small in pixels: no gap shows between neighbours, and single "
    "cells are called overlapping. Use a stronger objective, or do not shrink the images.",
    "uneven-light": "One side or the corners are less than half as bright as the rest. Centre the lamp and "
    "the condenser. Cells in the dark part are the first to be missed.",
    "unfamiliar": "The models are unsure about this image, or its colour is not that of a stained smear. It "
    "may be no blood smear, or have an unknown stain. Look at it before you trust the counts.",
    "unsure-overlaps": "For many cells the models cannot tell whether they overlap, or they call cells "
    "overlapping that lie alone. The overlapping share may be wrong. Look at the overlay.",
}
"""Every flag of the column ``quality_flags``: what it means and what to do."""

NOTES: Final = frozenset({"pixel-size", "round-field"})
"""Flags that only inform. A field with no other flag is not flagged."""


def warnings(flags: Iterable[str]) -> tuple[str, ...]:
    """Returns the flags that are more than a note, in their order.

    >>> warnings(("dark", "round-field"))
    ('dark',)
    """
    return tuple(flag for flag in flags if flag not in NOTES)


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
_DARKEST: Final = 0.5  # of glass: darker is a nucleus
_BOUND_RANGE: Final = (0.75, 0.95)  # of glass, for the bound below which it is dark
_GROWTH: Final = 0.08  # of a box's side: the rim of a cell reaches a little over its box
_WHITE_GROWTH: Final = 0.15  # a white cell's pale rim further
_SMALL_WHITE: Final = 1.4  # of a red cell's side
_LARGE_PLATELET: Final = 0.65
_TOLERATED: Final = 2  # cells: a count that is off by two is no wrong count
_TOLERATED_AREA: Final = 0.5  # cells: dust, and slivers at the border
_INSIDE: Final = 0.95  # share of a box's sides that is searched for a cell
_EMPTY: Final = 0.1  # of the points in a box: with fewer dark ones it holds no cell
_BLACK: Final = 0.02  # of glass: what lets less light pass is black
_TWO_CELLS: Final = 1.5  # times the usual absorbance: light passed more than one cell
_ALONE: Final = 0.05  # iou: boxes of cells that overlap share more
_NUCLEI: Final = 0.98  # of the pixels are brighter than nuclei
_NOT_RED: Final = -0.02  # log of red to blue in the light of the cells: true red cells are redder
_DEEP_PURPLE: Final = -0.17  # log of blue to red in their stain: below it they are purple for certain
_PURPLE: Final = (
    -0.12
)  # the same, share of their absorbance: below it they are purple, as in some laboratories,
_NO_NUCLEI: Final = -0.03  # unless there are nuclei that are less purple than they by this share
_GRAIN_PIXELS: Final = 60_000
_NOISY: Final = 100.0  # grey level
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
    piled: float  # share of what is darker than glass that is as dark as cells over each other, 0..1
    exchanged: float  # how much the field looks as if red and blue were exchanged, log of a ratio of light
    tint: float  # how much darker the glass is in its darkest channel than in its brightest, 0..1
    grain: float  # mean difference between neighbouring pixels that is no edge, share of the brightest
    missed: float  # share of the cells that no box of a red cell seems to cover, 0..1
    hollow: float  # share of the boxes of red cells that hold glass, less `_TOLERATED` of them, 0..1
    doubt: float  # share of the red cells of which it is in doubt whether they overlap, less as many, 0..1


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
    lit = None if view.lit is None else _shrunk(view.lit, grey.shape)
    found, seen = cells.detections, cells.detections.xyxy / view.px
    boxes = seen * np.array([grey.shape[1] / width, grey.shape[0] / height] * 2, np.float32)
    red = found.class_id == CellClass.RBC
    bright = _bright_level(grey if lit is None else grey[lit][None])
    contrast, edge_width = _outlines(grey, boxes[red], bright, lit)
    block_px = _BLOCK * (diameter * factor if is_scaled else model_px)
    blocks = _Blocks.of(grey, boxes, max(1, round(block_px)), bright, lit)
    unevenness, glass = (math.nan, math.nan) if blocks is None else _light(blocks)
    score = found.score[red]
    confidence = (median(score) - min_score) / (1 - min_score) if len(score) else math.nan
    clipped, green, exchanged, tint = _colour(view.plain, seen[red], view.lit)
    piled = missed = hollow = math.nan
    if blocks is not None and is_scaled and red.any():
        piled, missed, hollow = _coverage(blocks, boxes, found.class_id, diameter * factor)
    return Features(
        bright_level=bright, clipped=clipped, contrast=contrast, edge_width=edge_width, unevenness=unevenness,
        glass=glass, cell_diameter_px=cell_diameter_px, confidence=confidence, green=green, piled=piled,
        exchanged=exchanged, tint=tint, grain=_grain(view.plain, bright), missed=missed, hollow=hollow,
        doubt=_doubt(cells),
    )  # fmt: skip


def flags(features: Features) -> tuple[str, ...]:
    """Returns the flags that a field's features raise, sorted.

    >>> fine = Features(210, 0.0, 0.3, 0.09, 0.1, 0.45, 88.0, 0.8, 0.44, 0.01, 0, 0, 0.01, 0, 0, 0.1)
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


def _shrunk(lit: Bool, shape: tuple[int, ...]) -> Bool:
    """Returns which pixels of a smaller image, or blocks, are lit in full and are not next to the rim."""
    mean = cv2.resize(lit.astype(np.uint8) * 255, shape[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.erode((mean == 255).astype(np.uint8), np.ones((3, 3), np.uint8)), np.bool_)


def _outlines(grey: UInt8, boxes: Float32, bright: float, lit: Bool | None) -> tuple[float, float]:
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
    if lit is not None:
        inside &= lit[end_y.clip(0, height - 1).astype(np.int64), end_x.clip(0, width - 1).astype(np.int64)]
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


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """How bright a field's blocks are, and the lamp's light. Every `step`-th block is a sample of them."""

    level: Float32  # (h, w), grey levels
    step: int
    lamp: Float32 | None  # of the sample, grey levels. None where too little glass is free
    glass: float  # level of the glass: of the lamp's light, or without lamp grey levels
    px: Float32  # (2,), blocks in a pixel of the grey image, for x and y
    lit: Bool  # of the sample: what is no black surround

    @classmethod
    def of(
        cls, grey: UInt8, boxes: Float32, block_px: int, bright: float, lit: Bool | None
    ) -> "_Blocks | None":
        """Fits the lamp to the glass between the boxes. None for a field of hardly any blocks."""
        height, width = grey.shape
        rows, columns = height // block_px, width // block_px
        if min(rows, columns) < 4:
            return None
        level = np.asarray(cv2.resize(grey, (columns, rows), interpolation=cv2.INTER_AREA), np.float32)
        step = max(1, math.isqrt(rows * columns // _MAX_BLOCKS))  # a sample is enough
        px = np.array([columns / width, rows / height], np.float32)
        sample = level[::step, ::step]
        seen = np.ones(sample.shape, np.bool_) if lit is None else _shrunk(lit, level.shape)[::step, ::step]
        lamp = _lamp(sample, ~_under(level.shape, boxes, px)[::step, ::step] & seen)
        if lamp is None or not seen.any():
            return cls(level, step, None, bright, px, seen)
        # Relative to the brightest places: darker blocks pull the fit down a little.
        flat = (sample / np.maximum(lamp, 1.0))[seen]
        rank = int(_BRIGHT_SHARE * (flat.size - 1))
        return cls(level, step, lamp, float(np.partition(flat, rank)[rank]), px, seen)

    def flat(self) -> Float32:
        """Returns how much light passes each block of the sample, glass at about 1."""
        return self._relative(self.level[:: self.step, :: self.step], self.lamp)

    def flat_at(self, y: Int64, x: Int64) -> Float32:
        """Returns the same of single blocks, whether they are in the sample or not."""
        lamp = None if self.lamp is None else self.lamp[y // self.step, x // self.step]
        return self._relative(self.level[y, x], lamp)

    def _relative(self, level: Float32, lamp: Float32 | None) -> Float32:
        glass = np.float32(max(self.glass, 1e-6))
        return np.asarray(level / (glass if lamp is None else np.maximum(lamp, 1.0) * glass), np.float32)

    def under(self, boxes: Float32, growth: float) -> Bool:
        """Tells which blocks of the sample lie under a box, grown on each side by a share of its own."""
        grow = (boxes[:, 2:] - boxes[:, :2]) * growth
        grown = np.concatenate([boxes[:, :2] - grow, boxes[:, 2:] + grow], axis=1)
        return _under(self.level.shape, grown, self.px)[:: self.step, :: self.step]


def _under(shape: tuple[int, ...], boxes: Float32, px: Float32) -> Bool:
    under = np.zeros(shape, np.bool_)
    for x0, y0, x1, y1 in np.round(boxes * np.tile(px, 2)).astype(np.int64).tolist():
        under[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return under


def _light(blocks: _Blocks) -> tuple[float, float]:
    """Returns the unevenness of the light, and how much glass there is."""
    if not blocks.lit.any():
        return math.nan, math.nan
    glass = float((blocks.flat()[blocks.lit] > _GLASS).mean())
    if blocks.lamp is None:
        return math.nan, glass
    lamp = blocks.lamp[blocks.lit]
    return 1 - float(max(lamp.min(), 0.0)) / max(float(lamp.max()), 1.0), glass


def _coverage(blocks: _Blocks, boxes: Float32, class_id: Int64, cell_px: float) -> tuple[float, float, float]:
    """Compares the boxes with what is darker than glass. Returns `piled`, `missed` and `hollow`.

    A cell is missed where dark blocks lie outside all boxes. A white cell as small as a red cell, or a
    platelet as large, is most likely a red cell of an unknown stain, and missed too.
    """
    is_red, is_white = class_id == CellClass.RBC, class_id == CellClass.WBC
    n_red = int(np.count_nonzero(is_red))
    flat, no_white = blocks.flat(), blocks.lit & ~blocks.under(boxes[is_white], _WHITE_GROWTH)
    bound = _bound(flat[no_white])
    dark = (flat < bound) & blocks.lit
    n_dark = max(int(np.count_nonzero(dark)), 1)
    absorbance = -np.log(np.maximum(flat[dark & no_white], _BLACK))
    piled = float((absorbance > _TWO_CELLS * np.median(absorbance)).mean()) if len(absorbance) else math.nan
    reach = 2 * round(cell_px * float(blocks.px[0]) / blocks.step) + 1
    # A white cell that the rim cuts is not counted, and is not missed.
    far = cv2.erode(blocks.lit.astype(np.uint8), np.ones((reach, reach), np.uint8))
    free = int(np.count_nonzero(dark & (far > 0) & ~blocks.under(boxes, _GROWTH)))
    cell = math.pi / 4 * cell_px**2 * float(np.prod(blocks.px)) / blocks.step**2  # blocks of the sample
    side = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    side /= median(side[is_red])
    mistaken = is_white & (side < _SMALL_WHITE) | (class_id == CellClass.PLATELET) & (side > _LARGE_PLATELET)
    n_mistaken = max(int(np.count_nonzero(mistaken)) - _TOLERATED, 0)
    missed = max(free - _TOLERATED_AREA * cell, 0.0) / n_dark + n_mistaken / (n_red + n_mistaken)
    x, y = _places(boxes[is_red] * np.tile(blocks.px, 2), blocks.level.shape, _INSIDE)
    n_empty = int(np.count_nonzero((blocks.flat_at(y, x) < bound).mean(axis=1) < _EMPTY))
    return piled, missed, max(n_empty - _TOLERATED, 0) / n_red


def _bound(flat: Float32) -> float:
    """Returns the bound between glass and cells, by Otsu's method, of blocks relative to glass."""
    # Nuclei and dirt are no measure of how dark red cells are.
    level = np.round((np.clip(flat, _DARKEST, 1.0) - _DARKEST) * (255 / (1 - _DARKEST))).astype(np.uint8)
    split = cv2.threshold(level, 0, 255, cv2.THRESH_OTSU)[0] if level.size else 255.0
    return min(max(split * (1 - _DARKEST) / 255 + _DARKEST, _BOUND_RANGE[0]), _BOUND_RANGE[1])


def _doubt(cells: Cells) -> float:
    """Returns the share of the red cells whose verdict is in doubt.

    How many verdicts are wrong, the overlap scores say themselves. Cells that are called overlapping and lie
    alone are added.
    """
    found = cells.detections
    red = found.class_id == CellClass.RBC
    n_red = int(np.count_nonzero(red))
    if n_red == 0:
        return math.nan
    score = cells.overlap_score[red]
    wrong = float(np.minimum(score, 1 - score).sum())
    alone = red & cells.overlapping & ~cells.touches_edge.any(axis=1)
    alone &= _shared(found.xyxy, found.class_id != CellClass.PLATELET) < _ALONE
    return max(wrong + int(np.count_nonzero(alone)) - _TOLERATED, 0.0) / n_red


def _shared(xyxy: Float32, solid: Bool) -> Float32:
    """Returns the largest iou, float32 (N,), of each box with a `solid` one. 0 for the others."""
    shared, at = np.zeros(len(xyxy), np.float32), np.flatnonzero(solid)
    a, b = (at[pair] for pair in touching_pairs(xyxy[at].astype(np.float64)))
    sides = np.minimum(xyxy[a, 2:], xyxy[b, 2:]) - np.maximum(xyxy[a, :2], xyxy[b, :2])
    both = np.prod(np.maximum(sides, 0), axis=1)
    area = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    iou = both / np.maximum(area[a] + area[b] - both, 1e-9)
    np.maximum.at(shared, a, iou)
    np.maximum.at(shared, b, iou)
    return shared


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


def _colour(image: UInt8, boxes: Float32, lit: Bool | None) -> tuple[float, float, float, float]:
    """Measures the red cells' colours from points. Returns `clipped`, `green`, `exchanged` and `tint`."""
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // _COLOUR_PIXELS))
    some = image[::step, ::step]
    some = some.reshape(-1, 3) if lit is None else some[lit[::step, ::step]]
    glass = np.maximum(preprocess.percentile(some[:, None], 100 * _BRIGHT_SHARE), 1.0)
    tint = 1 - float(glass.min() / glass.max())
    if len(boxes) == 0:
        return float((some.min(axis=1) >= _SATURATED).mean()), math.nan, math.nan, tint
    x, y = _places(boxes, image.shape, _CORE)
    seen = image[y, x]  # (N, P, 3)
    clipped = float((seen.min(axis=2) >= _SATURATED).mean())
    absorbance = np.median(np.log(glass / np.maximum(seen.mean(axis=1), 1.0)), axis=0)
    total = float(absorbance.sum())
    if total <= _MIN_COLOUR:
        return clipped, math.nan, math.nan, tint
    darkest = np.log(glass / np.maximum(some, 1.0))
    rank = int(_NUCLEI * (len(some) - 1))
    darkest = darkest[np.argpartition(darkest.sum(axis=1), rank)[rank:]].mean(axis=0)
    # Red against blue: in the light that the cells let pass, in their stain, and in that of nuclei beside it.
    # A bluish lamp shows in the light too, so the light counts half.
    stain = float(absorbance[2] - absorbance[0])
    light = stain + math.log(glass[0] / glass[2])
    nuclei = float((darkest[0] - darkest[2]) / max(darkest.sum(), _MIN_COLOUR)) + stain / total
    is_purple = stain < _DEEP_PURPLE or (stain / total < _PURPLE and nuclei > _NO_NUCLEI)
    may_be = light < _NOT_RED and not is_purple
    return clipped, float(absorbance[1]) / total, -(light / 2 + stain + nuclei) if may_be else 0.0, tint


def _grain(image: UInt8, bright: float) -> float:
    """Measures what dithering does to an image, and edges do not: each pixel differs from all its neighbours.

    Rows are taken in pairs, as many as are needed.
    """
    rows = max(16, _GRAIN_PIXELS // image.shape[1])
    step = max(2, image.shape[0] // rows)
    upper, lower = (image[i : image.shape[0] - 1 + i : step, :_GRAIN_PIXELS].astype(np.int16) for i in (0, 1))
    across = upper - lower
    twice = np.abs(across[:, 1:] - across[:, :-1])
    if twice.size == 0:
        return math.nan
    # Noise in a dark image is no grain.
    return max(cv2.mean(twice)[:3]) / max(bright, _NOISY)


def _places(boxes: Float32, shape: tuple[int, ...], share: float) -> tuple[Int64, Int64]:
    """Returns x and y, int64 (N, P), of points in the middle of each box: in this share of its sides."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * share
    place = np.floor(centre[:, None] + half[:, None] * _POINTS).astype(np.int64)  # (N, P, 2)
    x, y = (np.clip(place[..., i], 0, shape[1 - i] - 1) for i in (0, 1))
    return x, y

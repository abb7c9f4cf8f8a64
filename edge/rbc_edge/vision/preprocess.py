"""From a field of view to what the networks are shown: light, scale, tiles, crops.

This is the only preprocessing. Training and export use it too, so a model is trained on, calibrated on and
given the same pixels. The way of an image is `view`, then `detector_input`, then `cell_crops`.

Every image in memory is uint8 (H, W, 3), RGB. Boxes are float32 (N, 4), xyxy.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, Decoded, Float32, UInt8
from rbc_edge.vision import surround
from rbc_edge.vision.image_file import max_reduction

CROP_PX: Final = 64  # side of a crop (Gurav et al. 2025, method step 1)
PAD_VALUE: Final = 114  # grey outside the image, in tiles and crops, as ultralytics pads in training
MIN_PAD_PX: Final = 4  # on each side of a detector input
STRIDE_PX: Final = 32  # the detector's coarsest stride: sides of its input are multiples of it
SNUG: Final = 1.05  # a field may be shown smaller by this factor where that saves padding (`snug`)
TILE_PX: Final = 640  # largest side of one detector input, pixels at model scale
TILE_OVERLAP_PX: Final = 128  # more than a white cell (about twice a red cell of 40 px)
BACKGROUND_LEVEL: Final = 230.0  # grey level of the glass between the cells after `balance`
_BRIGHT_PERCENTILE: Final = 95
_BALANCE_PIXELS: Final = 20_000  # enough for a percentile
_GAIN_RANGE: Final = (0.6, 4.0)
_LINEAR: Final = cv2.INTER_LINEAR_EXACT  # INTER_LINEAR rounds otherwise on Arm
_SLIGHT: Final = 1.6  # up to here a linear resize misses no pixel


def balance(image: UInt8) -> UInt8:
    """Makes the background of a field neutral and bright, whatever the lamp, the stain and the exposure.

    A gain for each channel brings the field's bright level (the glass between the cells) to
    `BACKGROUND_LEVEL`. A black surround (`surround`) is no part of it. It becomes `PAD_VALUE`, as all beyond
    the field is. Returns a new array.
    """
    return _balanced(image, surround.lit(image))


def _balanced(image: UInt8, lit: Bool | None) -> UInt8:
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // _BALANCE_PIXELS))
    some = image[::step, ::step]
    level = np.array(
        percentile(some if lit is None else some[lit[::step, ::step]][:, None], _BRIGHT_PERCENTILE)
    )
    # A black field has no background to go by: its noise must not become cells.
    gain = np.clip(BACKGROUND_LEVEL / np.maximum(level, 1.0), *_GAIN_RANGE)
    table = np.clip(np.arange(256)[:, None] * gain + 0.5, 0, 255).astype(np.uint8)
    balanced = np.asarray(cv2.LUT(image, table[None]), dtype=np.uint8)
    if lit is not None:
        balanced[~lit] = PAD_VALUE
    return balanced


def percentile(image: UInt8, percent: float) -> list[float]:
    """Computes np.percentile for each channel of uint8 (H, W, C), by counting instead of sorting."""
    image = np.ascontiguousarray(image)
    rank = percent / 100 * (image.shape[0] * image.shape[1] - 1)
    ranks = [math.floor(rank), math.ceil(rank)]
    levels = []
    for channel in range(image.shape[2]):
        seen = cv2.calcHist([image], [channel], None, [256], [0, 256])
        # In int64: from 2^24 on, single precision cannot add one.
        low, high = np.searchsorted(seen.astype(np.int64).cumsum(), ranks, side="right").tolist()
        levels.append(low + (high - low) * (rank - ranks[0]))
    return levels


def rescale(image: UInt8, factor: float) -> UInt8:
    """Resizes an image by one factor on both axes, to at least 1x1. Returns the image itself for factor 1."""
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    if size == (width, height):
        return image
    # Area averaging keeps thin gaps between cells when shrinking. Slight shrinking keeps them without it, in
    # a third of the time.
    how = cv2.INTER_AREA if factor * _SLIGHT < 1 else _LINEAR if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=how), dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What the networks are shown of a field: its light balanced, and shrunk where its cells are large."""

    image: UInt8
    plain: UInt8  # the same before its light was balanced
    px: Float32  # (4,), pixels of the field in a pixel of the view, for x, y, x, y
    size: tuple[int, int]  # width and height of the field, pixels
    lit: Bool | None = None  # (h, w), which pixels are no black surround. None: all of them

    @classmethod
    def of(cls, image: UInt8) -> "View":
        """Returns an image as a view of itself, already balanced."""
        return cls(image, image, np.ones(4, np.float32), (image.shape[1], image.shape[0]))

    def part(self, xyxy: Float32) -> tuple["View", Float32]:
        """Cuts a box, float32 (4,), pixels of the field, out as a view of its own.

        The box must show a part of the field. Returns the view, and its left upper corner in the field,
        float32 (4,), as x, y, x, y: to be added to boxes of the part.
        """
        low, high = np.maximum(np.floor(xyxy[:2] / self.px[:2]), 0), np.ceil(xyxy[2:] / self.px[2:])
        (x0, y0), (x1, y1) = low.astype(np.int64).tolist(), high.astype(np.int64).tolist()
        image, plain = self.image[y0:y1, x0:x1], self.plain[y0:y1, x0:x1]
        width, height = np.ceil(np.array(image.shape[1::-1]) * self.px[:2]).astype(np.int64).tolist()
        return View(image, plain, self.px, (width, height)), np.tile(low * self.px[:2], 2).astype(np.float32)

    def shown_px(self, length_px: float) -> float:
        """Returns a length of the field, pixels of the field, in pixels of the view."""
        return length_px / float(np.sqrt(self.px[0] * self.px[1]))


def view(image: UInt8 | Decoded, cell_diameter_px: float) -> View:
    """Balances a field (`balance`), and shrinks it by a whole number if its cells are larger than needed.

    The mean of 2x2 pixels is a cheap first step. All that follows (light, resizing, crops) then has a quarter
    of the work. Cells keep at least `image_file.MIN_CELL_PX`, so both networks still get them shrunk, not
    enlarged. A field that was decoded at a part of its size is shrunk by the rest.

    The diameter is in pixels of the field. NaN: unknown, nothing is shrunk.
    """
    field = image if isinstance(image, Decoded) else Decoded.of(image)
    left = max_reduction(cell_diameter_px) / field.reduction
    small = rescale(field.pixels, 1 / left) if left > 1 else field.pixels
    height, width = field.pixels.shape[:2]
    px = np.array([width / small.shape[1], height / small.shape[0]] * 2, np.float32) * field.reduction
    lit = surround.lit(small)
    return View(_balanced(small, lit), small, px, (field.width_px, field.height_px), lit)


def detector_input(view: View, cell_diameter_px: float, model_diameter_px: float) -> UInt8:
    """Resizes a view so that its cells are about as large as the detector knows them (see `snug`).

    `cell_diameter_px` is in pixels of the field, `model_diameter_px` is the bundle's. The detector's `tiles`
    are cut from the result.
    """
    factor = model_diameter_px / view.shown_px(cell_diameter_px)
    return rescale(view.image, snug(view.image.shape[1], view.image.shape[0], factor))


def cell_crops(view: View, xyxy: Float32, *, margin: float) -> UInt8:
    """Cuts boxes (pixels of the field) out of a view for the classifier, with the bundle's margin.

    A black surround becomes glass. A curved grey rim looks to the classifier like another cell: with it, more
    than half of the single cells that a rim cut were called overlapping, with glass one in twenty.
    """
    image = view.image
    if view.lit is not None:
        image = image.copy()
        image[~view.lit] = round(BACKGROUND_LEVEL)
    return crops(image, xyxy / view.px, margin=margin)


@dataclass(frozen=True, slots=True)
class Tile:
    """One window of a field at model scale. All numbers are pixels at model scale."""

    x0: int
    y0: int
    x1: int  # exclusive
    y1: int
    # The part, x0, y0, x1, y1, of which the cells (by their centre) belong to this tile. The cores of a
    # field's tiles cover it without overlap. At the field's border a core reaches to infinity.
    core: tuple[float, float, float, float]


def tiles(
    width: int, height: int, *, tile_px: int = TILE_PX, overlap_px: int = TILE_OVERLAP_PX
) -> list[Tile]:
    """Cuts a field at model scale into windows of at most `tile_px` that overlap by at least `overlap_px`.

    Returns tiles in reading order, of nearly equal size. A field that fits into one window is not cut.
    """
    return [
        Tile(x0, y0, x1, y1, (core_x0, core_y0, core_x1, core_y1))
        for y0, y1, core_y0, core_y1 in _intervals(height, tile_px, overlap_px)
        for x0, x1, core_x0, core_x1 in _intervals(width, tile_px, overlap_px)
    ]


def _intervals(length: int, tile_px: int, overlap_px: int) -> list[tuple[int, int, float, float]]:
    if length <= tile_px:
        return [(0, length, -math.inf, math.inf)]
    n = math.ceil((length - overlap_px) / (tile_px - overlap_px))
    # As few windows as possible, each as small as possible: what two windows show is analyzed twice.
    size = math.ceil((length + (n - 1) * overlap_px) / n)
    size = min(tile_px, _padded(size) - 2 * MIN_PAD_PX)
    starts = [round(i * (length - size) / (n - 1)) for i in range(n)]
    # Neighbours meet in the middle of what both see.
    seams = pairwise([-math.inf, *((a + size + b) / 2 for a, b in pairwise(starts)), math.inf])
    return [(start, start + size, *core) for start, core in zip(starts, seams, strict=True)]


def snug(width: int, height: int, factor: float) -> float:
    """Lowers a resizing factor a little where that makes the detector's input a stride smaller.

    A field 253 pixels wide needs an input of 288, one of 248 an input of 256. A fifth of the pixels, and of
    the detector's time, would be padding. A few per cent of scale do not change what the detector finds.

    Returns the factor between ``factor / SNUG`` and `factor` that gives the fewest input pixels, and of those
    the largest. Of fields that do not fit into one tile, `factor`.

    >>> round(snug(640, 480, 40 / 101.1), 4), round(snug(640, 480, 0.38), 4)
    (0.3833, 0.38)
    """
    if max(width, height) * factor > TILE_PX:
        return factor

    def input_pixels(f: float) -> int:
        return _padded(max(1, round(width * f))) * _padded(max(1, round(height * f)))

    # At these factors a side just fits into an input that is a stride smaller.
    tight = [(_padded(round(side * factor)) - STRIDE_PX - 2 * MIN_PAD_PX) / side for side in (width, height)]
    candidates = [factor, *(f for f in tight if factor / SNUG <= f < factor)]
    return min(candidates, key=lambda f: (input_pixels(f), -f))


def _padded(side: int) -> int:
    """Returns the side of a detector input for `side` pixels of a field."""
    return -(-(side + 2 * MIN_PAD_PX) // STRIDE_PX) * STRIDE_PX


def pad_to_stride(image: UInt8) -> tuple[UInt8, int, int]:
    """Pads an image on all sides, by at least `MIN_PAD_PX`, to sides that are multiples of `STRIDE_PX`.

    In training every photograph has grey around it. The detector recognises a cell at the image border only
    with some grey beyond it. With padding on two sides only, the error of the count was a tenth larger.

    Returns the padded image, and how many columns on the left and rows on top are padding (`PAD_VALUE`).
    """
    height, width = image.shape[:2]
    down, right = _padded(height) - height, _padded(width) - width
    top, left = down // 2, right // 2
    return _bordered(image, top, down - top, left, right - left), left, top


def _bordered(image: UInt8, top: int, bottom: int, left: int, right: int) -> UInt8:
    grey = (PAD_VALUE,) * 3
    padded = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey)
    return np.asarray(padded, dtype=np.uint8)


def crops(image: UInt8, xyxy: Float32, *, margin: float, size_px: int = CROP_PX) -> UInt8:
    """Cuts each box out of the field, with a margin, and resizes it to a square.

    The margin, a share of the box's side on each of its four sides, shows whether background lies around the
    cell. Width and height are stretched separately. Pixels outside the field are `PAD_VALUE`. Returns
    uint8 (N, size_px, size_px, 3).
    """
    out = np.empty((len(xyxy), size_px, size_px, 3), np.uint8)
    height, width = image.shape[:2]
    grow = (xyxy[:, 2:] - xyxy[:, :2]) * margin
    low = np.floor(xyxy[:, :2] - grow).astype(np.int64)
    high = np.maximum(np.ceil(xyxy[:, 2:] + grow).astype(np.int64), low + 1)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        window = image[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            if window.size == 0:
                out[i] = PAD_VALUE
                continue
            top, left = max(-y0, 0), max(-x0, 0)
            bottom, right = (y1 - y0) - top - window.shape[0], (x1 - x0) - left - window.shape[1]
            window = _bordered(window, top, bottom, left, right)
        how = cv2.INTER_AREA if max(window.shape[:2]) > _SLIGHT * size_px else _LINEAR
        cv2.resize(window, (size_px, size_px), dst=out[i], interpolation=how)
    return out

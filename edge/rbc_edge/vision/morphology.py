"""The form of single red cells, measured on their outline: size, elongation, roundness, paleness.

The outline is a threshold half-way between the glass around the cell and its rim, in green light, which red
cells take most of. All that it encloses is the cell, so a pale middle does not open it.
"""

import math
from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rbc_edge.values import Bool, Float32, Morphology, UInt8
from rbc_edge.vision import preprocess

_SIDE: Final = 48  # of a cell's window, pixels
_AROUND: Final = 0.3  # of the box's longer side, on each side: glass, and what a short box leaves out
_POINTS: Final = 96  # of an outline
_AT_ONCE: Final = 256  # cells: bounds memory
_LEAST_CONTRAST: Final = 8.0  # grey levels between glass and rim: less is no outline
_LEAST: Final = 0.2  # of its box: a smaller outline is not that of the cell. Fragments fill little of theirs
_OFF_CENTRE: Final = 8  # pixels of the window: an outline further off is another cell's
_PALE: Final = 2 / 3  # of the absorbance of the rim: what absorbs less is pale
_NO_PALLOR: Final = 0.02  # share of the area
N_SIGNS: Final = 10
"""What `signs` says of a cell."""
_CORE: Final = np.ones((5, 5), np.uint8)  # the edge is blurred, not pale

_Float64 = npt.NDArray[np.float64]
_Outline = cv2.typing.MatLike


def measured(known: Morphology, view: preprocess.View, xyxy: Float32, wanted: Bool) -> Morphology:
    """Adds to what is known of N cells the measures of those that are `wanted`, bool (N,).

    `xyxy`, float32 (N, 4), are their boxes, pixels of the field. A cell stays NaN where no outline is found:
    it reaches out of its window, or it hardly differs from the glass.
    """
    values = np.full((len(wanted), 4), np.nan)
    index = np.flatnonzero(wanted)
    green = np.asarray(cv2.extractChannel(view.image, 1), np.uint8)
    for start in range(0, len(index), _AT_ONCE):
        some = index[start : start + _AT_ONCE]
        values[some] = _measure(green, xyxy[some] / view.px)
    values[:, 0] *= view.px[0] * view.px[1]
    return Morphology(known.shape, known.shape_score, known.shape_sure, *values.T.astype(np.float32))


def signs(form: Morphology, cell_diameter_px: float) -> Float32:
    """Returns what the measures say of the shape of N cells: float32 (N, `N_SIGNS`). NaN: not measured.

    A crop is stretched to a square, so it does not show how long a cell is. Of the elliptocytes of experts,
    95 in 100 are longer than 1.38 times their width, of normal cells 5 in 100 longer than 1.24.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        longer = np.log(form.aspect_ratio)
        larger = np.log(form.area_px / np.float32(math.pi / 4 * cell_diameter_px**2))
    pallor = form.pallor
    unpaled = np.where(np.isnan(pallor), pallor, pallor < _NO_PALLOR)
    columns = (
        *(longer, longer**2, pallor, pallor**2, form.circularity, larger, larger**2, longer * larger),
        *(unpaled, unpaled * larger),
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _measure(green: UInt8, boxes: Float32) -> _Float64:
    """Returns (N, 4): area in pixels of the image, aspect ratio, circularity, pallor of cells."""
    windows, step = _windows(green, boxes)
    n = len(windows)
    glass, rim = _levels(windows)
    inside = (windows < np.ceil((glass + rim) / 2).astype(np.uint8)[:, None, None]).view(np.uint8)
    inside[:, [0, -1]] = 0  # the windows lie one below the other: their cells must not hang together
    least = _LEAST * np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / step**2
    least[glass - rim < _LEAST_CONTRAST] = math.inf
    outlines = _middle_ones(inside.reshape(-1, _SIDE), least)
    values = np.full((n, 4), np.nan)
    if not outlines:
        return values
    ok, contours = list(outlines), list(outlines.values())
    values[ok, :3] = _forms(_smooth(contours))
    values[ok, 0] *= step[ok] ** 2
    filled: UInt8 = np.zeros((n * _SIDE, _SIDE), np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    core = np.asarray(cv2.erode(filled, _CORE), np.uint8).reshape(windows.shape)
    pale_level = glass * (rim.clip(1) / glass.clip(1)) ** _PALE
    is_pale = (windows > np.ceil(pale_level).astype(np.uint8)[:, None, None]) & core.view(np.bool_)
    n_pale = is_pale.reshape(n, -1).sum(axis=1, dtype=np.int64)
    values[ok, 3] = n_pale[ok] / (values[ok, 0] / step[ok] ** 2)
    return values


def _windows(green: UInt8, boxes: Float32) -> tuple[UInt8, _Float64]:
    """Cuts a square around each box: uint8 (N, 48, 48), and pixels of the image in one of its, (N,)."""
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    sides = np.ceil(longer * (1 + 2 * _AROUND)).astype(np.int64).clip(2)
    corners = np.round((boxes[:, :2] + boxes[:, 2:] - sides[:, None]) / 2).astype(np.int64)
    beyond = int(sides.max())  # the glass at the border goes on
    wide = cv2.copyMakeBorder(green, *(beyond,) * 4, cv2.BORDER_REPLICATE)
    windows = np.empty((len(boxes), _SIDE, _SIDE), np.uint8)
    for i, ((x, y), side) in enumerate(zip((corners + beyond).tolist(), sides.tolist(), strict=True)):
        how = cv2.INTER_AREA if side > 3 * _SIDE else cv2.INTER_LINEAR_EXACT
        windows[i] = cv2.resize(wide[y : y + side, x : x + side], (_SIDE, _SIDE), interpolation=how)
    return windows, sides / _SIDE


def _levels(windows: UInt8) -> tuple[_Float64, _Float64]:
    """Returns the medians of what is brighter and of what is darker than Otsu's threshold: glass and rim."""
    n, some = len(windows), windows[:, ::2, ::2]  # a quarter of the pixels is enough
    places = some.reshape(n, -1) + np.arange(0, n * 256, 256)[:, None]
    seen = np.bincount(places.ravel(), minlength=n * 256).reshape(n, 256)
    below, sums = seen.cumsum(axis=1), (seen * np.arange(256)).cumsum(axis=1)
    total = below[:, -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[:, -1:] * below / total - sums) ** 2 / (below * (total - below))
    cut = np.nan_to_num(between, posinf=0.0).argmax(axis=1)
    n_dark = below[np.arange(n), cut]
    dark, bright = n_dark / 2, (n_dark + total[:, 0]) / 2
    glass, rim = ((below <= rank[:, None]).sum(axis=1).clip(max=255) for rank in (bright, dark))
    return glass.astype(np.float64), rim.astype(np.float64)


def _middle_ones(stack: UInt8, least: _Float64) -> dict[int, _Outline]:
    """Returns the outline in the middle of windows that lie one below the other, by window.

    None that reaches out of its window, or has an area below `least`.
    """
    found: dict[int, tuple[float, _Outline]] = {}
    contours, _ = cv2.findContours(stack, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        i, y = divmod(y, _SIDE)
        if min(x, y - 1) < 1 or max(x + width, y + height + 1) >= _SIDE:
            continue
        if max(abs(2 * x + width - _SIDE), abs(2 * y + height - _SIDE)) > 2 * _OFF_CENTRE:
            continue
        area = cv2.contourArea(contour)
        if area >= least[i] and area > found.get(i, (0.0,))[0]:
            found[i] = area, contour
    return {i: contour for i, (_, contour) in sorted(found.items())}


def _smooth(contours: Sequence[_Outline]) -> Float32:
    """Returns outlines as (N, 96, 2), without the stairs of the pixels.

    They run through the middles of the outermost pixels, so they are moved out by half a pixel.
    """
    n = np.array([len(contour) for contour in contours])
    start, at = (np.cumsum(n) - n)[:, None], np.arange(_POINTS) * (n[:, None] / _POINTS)
    first = at.astype(np.int64)
    known = np.concatenate(contours)[:, 0].astype(np.float32)
    here, there = known[start + first], known[start + (first + 1) % n[:, None]]
    points = here + (there - here) * (at - first).astype(np.float32)[..., None]
    for _ in range(2):
        points = (np.roll(points, 1, axis=1) + 2 * points + np.roll(points, -1, axis=1)) / 4
    along = np.roll(points, -1, axis=1) - np.roll(points, 1, axis=1)
    along /= np.hypot(along[..., 0], along[..., 1])[..., None].clip(1e-9)
    # OpenCV goes round against the clock as seen on the screen, so this is outwards.
    out = np.stack([-along[..., 1], along[..., 0]], axis=-1)
    return np.asarray(points + np.float32(0.5) * np.abs(out).max(axis=-1, keepdims=True) * out, np.float32)


def _forms(outlines: Float32) -> Float32:
    """Returns (N, 3): area, aspect ratio and circularity of outlines (N, P, 2).

    The aspect ratio is that of the ellipse with the same second moments: that of the smallest rectangle
    follows every bump of the outline.
    """
    points = outlines - outlines.mean(axis=1, keepdims=True)
    after = np.roll(points, -1, axis=1)
    (x, y), (x1, y1) = np.moveaxis(points, 2, 0), np.moveaxis(after, 2, 0)
    cross = x * y1 - x1 * y
    area = cross.sum(axis=1) / 2
    mean_x, mean_y = (((a + b) * cross).sum(axis=1) / (6 * area) for a, b in ((x, x1), (y, y1)))
    xx = ((x * x + x * x1 + x1 * x1) * cross).sum(axis=1) / (12 * area) - mean_x**2
    yy = ((y * y + y * y1 + y1 * y1) * cross).sum(axis=1) / (12 * area) - mean_y**2
    xy = ((x * y1 + 2 * x * y + 2 * x1 * y1 + x1 * y) * cross).sum(axis=1) / (24 * area) - mean_x * mean_y
    spread = np.hypot(xx - yy, 2 * xy)
    aspect = np.sqrt((xx + yy + spread) / (xx + yy - spread).clip(1e-9))
    length = np.hypot(x1 - x, y1 - y).sum(axis=1)
    circularity = (4 * np.pi * np.abs(area) / length**2).clip(max=1)
    return np.asarray(np.stack([np.abs(area), aspect, circularity], axis=1), np.float32)

"""How large a red cell is when the user does not say: the detector itself measures it.

The detector knows red cells at one size, and finds them up to a factor of about 1.5 away from it. So it is
shown a field as if its cells were 10, 15, 22, ... 385 px wide. At the right guess it finds the most cells,
and the sizes of their boxes measure the guess. This works for any stain, camera or resolution that the
detector works on, and needs no second rule about what a cell looks like.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from rbc_edge.values import CellClass, Detections, Scale, ScaleSource, UInt8
from rbc_edge.vision import image_file, preprocess
from rbc_edge.vision.detector import Detector
from rbc_edge.vision.statistics import median

_STEP: Final = 1.5
GUESSES_PX: Final = tuple(10.0 * _STEP**k for k in range(10))  # of the field: 10 to 384
AGREES: Final = 1.25  # a field has its own scale where its cells differ from the slide's by a larger factor
BLIND: Final = 1.8  # beyond this factor the detector finds few cells, and these cannot contradict the scale
_MIN_CELLS: Final = 5
_GUESS_CELLS: Final = 9  # side of the window that is tried, in guessed cells: bounds the cost
_WINDOW_CELLS: Final = 14
_BORDER: Final = 0.03  # of a cell: a box this near to the border counts as cut by it
_FAR: Final = 2.25  # the square of `_STEP`: one guess covers a step to either side
_ROUNDS: Final = 4
_FIRST_FIELDS: Final = 3  # if these agree, the other fields start from their scale
_CONVERGED: Final = 1.02


def measured_diameter_px(found: Detections, width_px: int, height_px: int) -> tuple[float, int]:
    """Measures the red cells that the border of a field does not cut.

    Returns the median of the geometric mean sides of their boxes, pixels (NaN without any), and their number.
    """
    xyxy = found.xyxy[found.class_id == CellClass.RBC]
    sides = np.sqrt(np.clip(np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1), 0, None))
    margin = np.maximum(1.0, _BORDER * sides)[:, None]
    size = np.array([width_px, height_px], np.float32)
    whole = ((xyxy[:, :2] > margin) & (xyxy[:, 2:] < size - margin)).all(axis=1)
    n = int(np.count_nonzero(whole))
    return (median(sides[whole]) if n else math.nan), n


def estimate_field(image: UInt8, detector: Detector) -> tuple[float, int]:
    """Estimates the red-cell diameter of one field, uint8 (H, W, 3) RGB, balanced.

    Returns it in pixels of the field (NaN when no guess finds red cells), and the number of cells measured.
    """
    return _searched(image, detector, GUESSES_PX)


def look_elsewhere(
    image: UInt8, detector: Detector, found: Detections, cell_diameter_px: float
) -> tuple[float, int]:
    """Tries whether a field with few cells shows more of them at a very different scale.

    The guesses are coarser than those of `estimate_field` and take half the time. A guess must explain more
    than what was `found` at the field's scale, `cell_diameter_px` (pixels of the field). Returns as
    `estimate_field`: NaN and 0 when no other scale explains more.
    """
    far = [cell_diameter_px * _FAR**k for k in range(-6, 7) if k]
    guesses = [g for g in far if GUESSES_PX[0] / AGREES < g < GUESSES_PX[-1] * AGREES]
    return _searched(image, detector, guesses, least=_evidence(found, cell_diameter_px, image))


def _searched(
    image: UInt8, detector: Detector, guesses_px: Sequence[float], *, least: float = 0.0
) -> tuple[float, int]:
    """Refines the guess with the most evidence. NaN and 0 when none has more than `least`."""
    best_evidence, best = least, math.nan
    for guess in guesses_px:
        window = _window(image, guess, _GUESS_CELLS)
        evidence = _evidence(detector.detect(window, guess), guess, window)
        if evidence > best_evidence:
            best_evidence, best = evidence, guess
    return (math.nan, 0) if math.isnan(best) else _refined(image, detector, best)


def _refined(image: UInt8, detector: Detector, best: float) -> tuple[float, int]:
    """Replaces a guess by the size of the boxes found with it, until both agree."""
    count = 0
    for _ in range(_ROUNDS):
        window = _window(image, best, _WINDOW_CELLS)
        measured, n = measured_diameter_px(detector.detect(window, best), window.shape[1], window.shape[0])
        if n == 0:
            break
        change, best, count = _ratio(measured, best), measured, n
        if change < _CONVERGED:
            break
    return best, count


def _ratio(a: float, b: float) -> float:
    """Returns how many times the larger one is as large as the other."""
    return max(a / b, b / a)


def estimate_slide(images: Sequence[UInt8], detector: Detector, *, threads: int = 1) -> Scale:
    """Estimates the red-cell diameter of a slide from some of its fields, each uint8 (H, W, 3) RGB.

    `threads` fields are analyzed at the same time, large fields one by one. Returns the median over cells of
    the fields' estimates, with source ``estimated-slide``. NaN and ``none`` when no field shows red cells.
    """

    def measured(image: UInt8, near: float = math.nan) -> tuple[float, int]:
        balanced = preprocess.balance(image)
        return estimate_field(balanced, detector) if math.isnan(near) else _refined(balanced, detector, near)

    is_large = any(image.shape[0] * image.shape[1] >= image_file.LARGE_PIXELS for image in images)
    with ThreadPoolExecutor(1 if is_large else threads) as pool:
        first = sorted({0, len(images) // 2, len(images) - 1}) if images else []
        estimates = list(pool.map(lambda i: measured(images[i]), first))
        near = _agreed([d for d, n in estimates if n >= _MIN_CELLS])
        rest = [image for i, image in enumerate(images) if i not in first]
        estimates += pool.map(lambda image: measured(image, near), rest)
    usable = sorted((d, n) for d, n in estimates if n > 0)
    # Fields with few cells say little. They are used only when there is nothing better.
    usable = [e for e in usable if e[1] >= _MIN_CELLS] or usable
    if not usable:
        return Scale(math.nan, ScaleSource.NONE)
    up_to = np.cumsum([n for _, n in usable])
    return Scale(usable[int(np.searchsorted(up_to, up_to[-1] / 2))][0], ScaleSource.SLIDE)


def _agreed(estimates_px: Sequence[float]) -> float:
    """Returns the diameter to start from in a slide's other fields. NaN unless the first fields agree.

    This saves ten guesses in each of them, which take as long as counting eight fields.
    """
    if len(estimates_px) < _FIRST_FIELDS or max(estimates_px) > AGREES * min(estimates_px):
        return math.nan
    return sorted(estimates_px)[len(estimates_px) // 2]


def disagrees(found: Detections, width_px: int, height_px: int, cell_diameter_px: float) -> bool | None:
    """Tells whether the median size of a field's cells contradicts the scale they were found at.

    None: too few whole cells are found to judge. The field is sparse, or the scale is far from the truth.
    """
    measured, n = measured_diameter_px(found, width_px, height_px)
    return None if n < _MIN_CELLS else _ratio(measured, cell_diameter_px) > AGREES


def blind_at(cell_diameter_px: float, own_px: float, n_cells: int) -> bool:
    """Tells whether a scale hides a field's cells, by the field's own estimate from `n_cells` cells."""
    return n_cells >= _MIN_CELLS and _ratio(own_px, cell_diameter_px) > BLIND


def _window(image: UInt8, guess: float, n_cells: float) -> UInt8:
    """Cuts out the middle of the field, at most `n_cells` guessed cells wide and high."""
    side = math.ceil(n_cells * guess)
    height, width = image.shape[:2]
    y0, x0 = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return image[y0 : y0 + side, x0 : x0 + side]


def _evidence(found: Detections, guess: float, window: UInt8) -> float:
    """Returns the window's share under red cells, weighted by score and by agreement in size."""
    rbc = found.class_id == CellClass.RBC
    xyxy, score = found.xyxy[rbc], found.score[rbc]
    area = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    ratio = np.log(np.sqrt(np.maximum(area, 1e-6)) / guess)
    agreement = np.exp(-0.5 * (ratio / math.log(1.4)) ** 2)
    return float((score**2 * agreement * area).sum() / (window.shape[0] * window.shape[1]))

"""How large a red cell is when the user does not say: the detector itself measures it.

The detector knows red cells at one size, and finds them up to a factor of about 1.5 away from it. So it is
shown a field as if its cells were 10, 15, 22, ... 577 px wide. At the right guess it finds the most cells,
and the sizes of their boxes measure the guess. This works for any stain, camera or resolution that the
detector works on, and needs no second rule about what a cell looks like.

What is not blood must not decide. Blank bars are cut off, a window shows something, and a guess from a small
part of the field must show cells elsewhere too. One field of a slide weighs no more than the others.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rbc_edge.values import Bool, CellClass, Detections, Measure, Scale, ScaleSource, UInt8
from rbc_edge.vision import image_file, preprocess, surround
from rbc_edge.vision.detector import Detector
from rbc_edge.vision.statistics import median

_STEP: Final = 1.5
GUESSES_PX: Final = tuple(10.0 * _STEP**k for k in range(11))  # of the field: 10 to 577
AGREES: Final = 1.25  # a field has its own scale where its cells differ from the slide's by a larger factor
MAX_FIELDS: Final = 8  # of a slide that are measured
MAX_PIXELS: Final = 30e6  # no more fields are measured past this: a few 20-megapixel ones hold enough cells
FIRST_FIELDS: Final = 3  # if two of these agree, the other fields start from their scale
BLIND: Final = 1.8  # beyond this factor the detector finds few cells, and these cannot contradict the scale
_MIN_CELLS: Final = 5
_GUESS_CELLS: Final = 9  # side of the window that is tried, in guessed cells: bounds the cost
_WINDOW_CELLS: Final = 14
_BORDER: Final = 0.03  # of a cell: a box this near to the border counts as cut by it
_FAR: Final = 2.25  # the square of `_STEP`: one guess covers a step to either side
_ROUNDS: Final = 4
_START_STEP: Final = 1.1  # the start is rounded to a power of it, so that it rarely changes
_CONVERGED: Final = 1.02
_LIKE: Final = 1.6  # a box that differs from its guess by a larger factor is a letter, or a part of a cell
_BLANK_LEVELS: Final = 6  # grey levels between which a blank row stays, JPEG's noise included
_SAMPLE_PX: Final = 256  # side of the sample in which blank and dark places are looked for
_DARK: Final = 0.9  # of the glass: darker is a cell, or writing
_SMALL_WINDOW: Final = 0.25  # of the field: what it shows must be confirmed elsewhere
_EMPTY_WINDOW: Final = 0.2  # of the dark that another window shows: with less it is moved


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
    field = _Field.of(image)

    def evidence_in(place: _Place, guess: float) -> float:
        window = field.image[place]
        return _evidence(detector.detect(window, guess), guess, window)

    found = [(evidence_in(field.windows(guess, _GUESS_CELLS)[0], guess), guess) for guess in guesses_px]
    found = sorted((f for f in found if f[0] > least), key=lambda f: -f[0])
    best_evidence, best = least, found[0][1] if found else math.nan
    for seen, guess in found:
        if seen <= best_evidence:
            break
        first, *others = field.windows(guess, _GUESS_CELLS)
        everywhere = [seen]
        if field.image[first].size < _SMALL_WINDOW * field.image.size:
            everywhere += [evidence_in(place, guess) for place in others]
        confirmed = sorted(everywhere)[len(everywhere) // 2]
        if confirmed > best_evidence:
            best_evidence, best = confirmed, guess
    return (math.nan, 0) if math.isnan(best) else _refined(field, detector, best)


def _refined(field: "_Field", detector: Detector, best: float) -> tuple[float, int]:
    """Replaces a guess by the size of the boxes found with it, until both agree."""
    count = 0
    for _ in range(_ROUNDS):
        place = field.windows(best, _WINDOW_CELLS)[0]
        window = field.image[place]
        found = detector.detect(window, best)
        side = np.sqrt(np.prod(found.xyxy[:, 2:] - found.xyxy[:, :2], axis=1)) / best
        like = np.asarray((side > 1 / _LIKE) & (side < _LIKE), np.bool_)
        if field.lit is not None:
            like &= ~surround.sides(found.xyxy, field.lit[place]).any(axis=1)
        measured, n = measured_diameter_px(found.take(like), window.shape[1], window.shape[0])
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

    Returns what `of_slide` makes of them. `threads` is that of `measure`.
    """
    first = sorted({0, len(images) // 2, len(images) - 1}) if images else []
    measures = measure([images[i] for i in first], detector, threads=threads)
    rest = [image for i, image in enumerate(images) if i not in first]
    return of_slide([*measures, *measure(rest, detector, start(measures), threads=threads)])


def measure(
    images: Sequence[UInt8], detector: Detector, start: int = 0, *, threads: int = 1
) -> list[Measure]:
    """Measures fields of a slide, each uint8 (H, W, 3) RGB and each on its own.

    A field's measure depends on the field and on `start` alone (see the function `start`). 0: all guesses are
    tried. `threads` fields are measured at the same time, large fields one by one.
    """

    def measured(image: UInt8) -> Measure:
        balanced = preprocess.balance(image)
        if start:
            px, n = _refined(_Field.of(balanced), detector, _START_STEP**start)
        else:
            px, n = estimate_field(balanced, detector)
        return Measure(px if n else math.nan, n, image.shape[0] * image.shape[1])

    is_large = any(image.shape[0] * image.shape[1] >= image_file.LARGE_PIXELS for image in images)
    with ThreadPoolExecutor(1 if is_large else threads) as pool:
        return list(pool.map(measured, images))


def start(first: Sequence[Measure]) -> int:
    """Returns where the search begins in a slide's other fields. 0 unless two of the first three agree.

    It saves all guesses in each of them, which take as long as counting eight fields.
    """
    estimates_px = sorted(m.cell_diameter_px for m in first if m.n_cells >= _MIN_CELLS)
    pairs = [(b / a, a) for a, b in pairwise(estimates_px)]
    if not pairs or min(pairs)[0] > AGREES:
        return 0
    return round(math.log(min(pairs)[1], _START_STEP))


def of_slide(measures: Sequence[Measure]) -> Scale:
    """Returns the scale of a slide, from the measures of some fields, in any order.

    It is the median over cells, with source ``estimated-slide``, and NaN and ``none`` when no field shows red
    cells. It is rounded, by at most 1.25 %, which changes no count: one field more then rarely makes another
    scale, with which the whole slide has to be counted again.
    """
    usable = sorted((m.cell_diameter_px, m.n_cells) for m in measures if m.n_cells > 0)
    # Fields with few cells say little. They are used only when there is nothing better.
    usable = [e for e in usable if e[1] >= _MIN_CELLS] or usable
    if not usable:
        return Scale(math.nan, ScaleSource.NONE)
    # An overview among the fields shows more cells than all the others. It has no more say than one of them.
    most = sorted(n for _, n in usable)[len(usable) // 2]
    up_to = np.cumsum([min(n, most) for _, n in usable])
    return Scale(_rounded(usable[int(np.searchsorted(up_to, up_to[-1] / 2))][0]), ScaleSource.SLIDE)


def _rounded(diameter_px: float) -> float:
    """Rounds to steps of 1 to 2.5 per cent: 10, 10.2, ... 20, 20.5, ... 50, 51, ... 100, 102, ..."""
    decade = 10.0 ** math.floor(math.log10(diameter_px))
    lead = diameter_px / decade
    steps_a_unit = 50 if lead < 2 else 20 if lead < 5 else 10
    return round(round(lead * steps_a_unit) / steps_a_unit * decade, 6)


def agree(one_px: float, other_px: float) -> bool:
    """Tells whether two diameters are the same scale. False for NaN."""
    return _ratio(one_px, other_px) <= AGREES


def disagrees(found: Detections, width_px: int, height_px: int, cell_diameter_px: float) -> bool | None:
    """Tells whether the median size of a field's cells contradicts the scale they were found at.

    Where few cells are whole, the longer sides of those that the border cuts may confirm the scale. None: too
    few cells are found to judge. The field is sparse, or the scale is far from the truth.
    """
    measured, n = measured_diameter_px(found, width_px, height_px)
    if n >= _MIN_CELLS:
        return _ratio(measured, cell_diameter_px) > AGREES
    xyxy = found.xyxy[found.class_id == CellClass.RBC]
    longer = (xyxy[:, 2:] - xyxy[:, :2]).max(axis=1)
    is_confirmed = len(longer) > _MIN_CELLS and _ratio(median(longer), cell_diameter_px) <= AGREES
    return False if is_confirmed else None


def blind_at(cell_diameter_px: float, own_px: float, n_cells: int) -> bool:
    """Tells whether a scale hides a field's cells, by the field's own estimate from `n_cells` cells."""
    return n_cells >= _MIN_CELLS and _ratio(own_px, cell_diameter_px) > BLIND


_Place = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True, slots=True, eq=False)
class _Field:
    """A field without blank bars, and where something is to be seen in it."""

    image: UInt8
    lit: Bool | None  # (H, W), as `preprocess.View.lit`
    dark: npt.NDArray[np.int32]  # (h + 1, w + 1), integral of what is darker than glass, in a sample
    step: int  # every so many-th row and column is in the sample

    @classmethod
    def of(cls, image: UInt8) -> "_Field":
        """Cuts off blank rows and columns at the border of a balanced field."""
        step = max(1, max(image.shape[:2]) // _SAMPLE_PX)
        green = image[::step, ::step, 1]
        rows, columns = (_shown(np.ptp(green, axis=a), step) for a in (1, 0))
        image = image[rows, columns]
        # `preprocess.balance` has painted a surround.
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        has_surround = (corners == preprocess.PAD_VALUE).all(axis=1).any()
        lit = (image != preprocess.PAD_VALUE).any(axis=2) if has_surround else None
        green = image[::step, ::step, 1]
        dark = (green < _DARK * preprocess.BACKGROUND_LEVEL) & (green != preprocess.PAD_VALUE)
        return cls(image, lit, np.asarray(cv2.integral(dark.astype(np.uint8)), np.int32), step)

    def windows(self, guess: float, n_cells: float) -> "list[_Place]":
        """Returns three windows of at most `n_cells` guessed cells: the middle first, then where most is.

        Where next to nothing is to be seen in the middle, it comes last.
        """
        side = math.ceil(n_cells * guess)
        height, width = self.image.shape[:2]
        free = max(0, height - side), max(0, width - side)
        thirds = [(free[0] * i // 2, free[1] * j // 2) for i in range(3) for j in range(3)]
        middle = free[0] // 2, free[1] // 2
        share = {at: self._dark(*at, side) for at in thirds}
        most = sorted(set(thirds) - {middle}, key=lambda at: (-share[at], at))[:2]
        places = [middle, *most]
        if most and share[middle] < _EMPTY_WINDOW * share[most[0]]:
            places = [*most, middle]
        return [(slice(y, y + side), slice(x, x + side)) for y, x in places]

    def _dark(self, y: int, x: int, side: int) -> float:
        y0, x0, far = y // self.step, x // self.step, side // self.step
        y1, x1 = min(y0 + far, self.dark.shape[0] - 1), min(x0 + far, self.dark.shape[1] - 1)
        return float(self.dark[y1, x1] - self.dark[y0, x1] - self.dark[y1, x0] + self.dark[y0, x0])


def _shown(spread: UInt8, step: int) -> slice:
    """Returns which rows of a field are not blank at its border, by the spread of levels in its sample."""
    shown = np.flatnonzero(spread > _BLANK_LEVELS)
    if not len(shown):
        return slice(None)
    first, last = int(shown[0]), int(shown[-1])
    return slice(first * step, None if last == len(spread) - 1 else last * step + 1)


def _evidence(found: Detections, guess: float, window: UInt8) -> float:
    """Returns the window's share under red cells, weighted by score and by agreement in size."""
    rbc = found.class_id == CellClass.RBC
    xyxy, score = found.xyxy[rbc], found.score[rbc]
    area = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    ratio = np.log(np.sqrt(np.maximum(area, 1e-6)) / guess)
    agreement = np.exp(-0.5 * (ratio / math.log(1.4)) ** 2)
    return float((score**2 * agreement * area).sum() / (window.shape[0] * window.shape[1]))

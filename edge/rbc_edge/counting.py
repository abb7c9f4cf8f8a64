"""What counts, what belongs together, and how sure a fraction is: arithmetic on cells, no I/O."""

from enum import StrEnum
from math import sqrt

import numpy as np

from rbc_edge.values import Bool, CellClass, Cells, Counts, Float32, Int64

EDGE_MARGIN = 1 / 40
"""A box that ends so near to the border, in cell diameters, is taken to be cut by it.

The detector's boxes stop short by about a pixel of what it is shown. With this margin as many red cells of
the validation photographs touch a border as have a label that does (``python -m rbc_train evaluate``).
"""

# Cells that touch have boxes that just meet, and box regression is a few per cent short as often as long.
_GROWTH = 0.05

# Pairs looked at in one go; bounds the memory of a field whose boxes all share their x range.
_PAIRS_AT_ONCE = 2_000_000

LIKENESS = 0.2
"""How much two cells of one field resemble each other in overlapping (intraclass correlation), where a slide
cannot say. Measured between the photographs of a source: 0.10 to 0.19 (``python -m rbc_train coverage``)."""

SAYS_LITTLE = 0.10
"""Half a 95 % interval of the overlap fraction from which on a slide has too few fields or cells."""

_MANY = 1_000_000  # degrees of freedom of what is known

_Z_95 = 1.959963984540054
# Student t, two-sided 95 %, 1..30 degrees of freedom.
_T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


class EdgeRule(StrEnum):
    """Which cells at the image border are counted."""

    ALL = "all"
    TWO_SIDES = "two-sides"  # the counting-chamber rule: right and lower border are out
    INSIDE = "inside"


def touches_edge(xyxy: Float32, width_px: int, height_px: int, cell_diameter_px: float) -> Bool:
    """Tells which boxes reach the image border.

    Args:
        xyxy: float32 (N, 4), pixels of the field of view.
        width_px: Width of the field of view.
        height_px: Height of the field of view.
        cell_diameter_px: Diameter of a red cell in it, pixels.

    Returns:
        bool (N, 4): left, top, right, bottom; a side counts as reached from `EDGE_MARGIN` on.
    """
    x_min, y_min, x_max, y_max = xyxy.T
    m = EDGE_MARGIN * cell_diameter_px
    return np.stack([x_min <= m, y_min <= m, x_max >= width_px - m, y_max >= height_px - m], axis=1).astype(
        np.bool_
    )


def median(values: Float32) -> float:
    """What np.median gives for float32 (N,), N > 0, in a tenth of its time where N is small.

    >>> median(np.array([4, 1, 3, 2], np.float32))
    2.5
    """
    ranked = np.sort(values, axis=None)
    middle = len(ranked) // 2
    return float(ranked[middle]) if len(ranked) % 2 else float(ranked[middle - 1] + ranked[middle]) / 2


def iou(a: Float32, b: Float32) -> Float32:
    """Intersection over union of every box with every other.

    Args:
        a: float32 (N, 4), xyxy.
        b: float32 (M, 4), xyxy, same frame.

    Returns:
        float32 (N, M), 0..1.

    >>> iou(np.array([[0, 0, 2, 2]], np.float32), np.array([[1, 0, 3, 2]], np.float32)).round(3).tolist()
    [[0.3330000042915344]]
    """
    width, height = (
        np.minimum(a[:, None, k + 2], b[None, :, k + 2]) - np.maximum(a[:, None, k], b[None, :, k])
        for k in (0, 1)
    )
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    area_a = np.prod(a[:, 2:] - a[:, :2], axis=1)
    area_b = np.prod(b[:, 2:] - b[:, :2], axis=1)
    union = area_a[:, None] + area_b[None] - shared
    return np.asarray(shared / np.maximum(union, 1e-9), np.float32)


def groups(xyxy: Float32, class_id: Int64, overlapping: Bool) -> Int64:
    """Numbers the groups of overlapping cells.

    A group is a connected component of overlapping red cells and the white cells they lie against; two
    cells are linked when their boxes, grown by 5 %, intersect. An overlapping red cell that links to no
    one still gets a number of its own: its partner was missed, or lies outside the field.

    Args:
        xyxy: float32 (N, 4), pixels of the field of view.
        class_id: int64 (N,), values of `CellClass`.
        overlapping: bool (N,), the classifier's verdict; ignored for cells that are not red.

    Returns:
        int64 (N,): 1..G in order of each group's first cell; 0 for a cell in no group.
    """
    red = overlapping & (class_id == CellClass.RBC)
    member = np.flatnonzero(red | (class_id == CellClass.WBC))
    is_red = red[member]
    a, b = _touching_pairs(xyxy[member].astype(np.float64))
    linked = is_red[a] | is_red[b]  # two white cells side by side are no group of overlapping red cells
    root = _components(len(member), a[linked], b[linked])
    has_red = np.zeros(len(member), np.bool_)
    has_red[root[is_red]] = True

    group = np.zeros(len(xyxy), np.int64)
    grouped = has_red[root]
    # The root is the smallest index of its component, so sorted roots are in order of the first cell.
    group[member[grouped]] = np.unique(root[grouped], return_inverse=True)[1].reshape(-1) + 1
    return group


def _touching_pairs(boxes: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[Int64, Int64]:
    """Returns the index pairs (a, b), each once, of the boxes float64 (N, 4) that intersect when grown."""
    grow = (boxes[:, 2:] - boxes[:, :2]) * (_GROWTH / 2)
    low, high = boxes[:, :2] - grow, boxes[:, 2:] + grow
    order = np.argsort(low[:, 0], kind="stable")
    low, high = low[order], high[order]
    # Sweep along x: partners of i start after i and begin before i ends.
    first = np.arange(1, len(boxes) + 1)
    n_candidates = np.maximum(np.searchsorted(low[:, 0], high[:, 0], side="right") - first, 0)
    ends = np.cumsum(n_candidates)
    found_a, found_b = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    start = 0
    while start < len(boxes):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        n = n_candidates[start:stop]
        a = np.repeat(np.arange(start, stop), n)
        b = a + 1 + np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        hit = (low[b, 1] <= high[a, 1]) & (low[a, 1] <= high[b, 1])
        found_a.append(order[a[hit]])
        found_b.append(order[b[hit]])
        start = stop
    return np.concatenate(found_a), np.concatenate(found_b)


def _components(n: int, a: Int64, b: Int64) -> Int64:
    """Returns int64 (n,): for each node the smallest node of its connected component."""
    root = np.arange(n, dtype=np.int64)
    while True:
        before = root.copy()
        lowest = np.minimum(root[a], root[b])
        np.minimum.at(root, before[a], lowest)  # hook the whole trees, not just the two nodes
        np.minimum.at(root, before[b], lowest)
        while not np.array_equal(root, root[root]):
            root = root[root]
        if np.array_equal(root, before):
            return root


def counted(cells: Cells, rule: EdgeRule) -> Bool:
    """Tells which cells the edge rule counts.

    Args:
        cells: N cells of one field of view.
        rule: The edge rule.

    Returns:
        bool (N,).
    """
    keep = np.ones(len(cells), np.bool_)
    match rule:
        case EdgeRule.ALL:
            pass
        case EdgeRule.TWO_SIDES:
            keep[np.any(cells.touches_edge[:, 2:], axis=1)] = False
        case EdgeRule.INSIDE:
            keep[np.any(cells.touches_edge, axis=1)] = False
    return keep


def count(cells: Cells, rule: EdgeRule = EdgeRule.ALL) -> Counts:
    """Counts the cells of one field of view, cells and never groups, under an edge rule."""
    keep = counted(cells, rule)
    class_id = cells.detections.class_id[keep]
    red = class_id == CellClass.RBC
    n_overlapping = int(np.count_nonzero(red & cells.overlapping[keep]))
    return Counts(
        n_rbc_single=int(np.count_nonzero(red)) - n_overlapping,
        n_rbc_overlapping=n_overlapping,
        n_wbc=int(np.count_nonzero(class_id == CellClass.WBC)),
        n_platelets=int(np.count_nonzero(class_id == CellClass.PLATELET)),
    )


def overlap_interval(n_overlapping: Int64, n_rbc: Int64) -> tuple[float, float] | None:
    """Gives a 95 % interval of a slide's overlap fraction, with the fields of view as the units.

    Cells of one field resemble each other (a crowded field has many overlaps), so the interval comes from
    the spread between fields: the variance of the ratio estimator (Cochran 1977, *Sampling Techniques*,
    chapter 2, theorem 2.5) turned into an effective number of cells, with Student t for few fields (Korn &
    Graubard 1998, *Survey Methodology* 24), put into Wilson's interval (Wilson 1927, *JASA* 22), which
    stays within 0..1. The effective number never exceeds the real number of cells: fields that agree by
    chance do not make the interval narrower than independent cells would.

    With one field there is no spread to see, nor where no cell, or every cell, overlaps; then cells are
    taken to resemble each other a little more than they do in any source we measured (`LIKENESS`). How
    often the interval holds the truth, ``python -m rbc_train coverage`` measures.

    Args:
        n_overlapping: int64 (F,), overlapping red cells by field.
        n_rbc: int64 (F,), red cells by field.

    Returns:
        Low and high end, 0..1; None without red cells.
    """
    n = float(n_rbc.sum())
    if n == 0:
        return None
    fraction = float(n_overlapping.sum()) / n
    effect, degrees = _design_effect(n_overlapping, n_rbc)
    return _wilson(fraction, _effective_cells(n, effect, degrees))


def fields_needed(n_overlapping: Int64, n_rbc: Int64, *, half_width: float = 0.02) -> int | None:
    """Says how many more fields of view make a slide's overlap fraction sure.

    The fields to come are taken to be like those that are there; from a few fields the answer is a rough
    one (``python -m rbc_train coverage`` measures how rough).

    Args:
        n_overlapping: int64 (F,), overlapping red cells by field.
        n_rbc: int64 (F,), red cells by field.
        half_width: Half of the 95 % interval that is wanted: 0.02 for plus or minus two points.

    Returns:
        How many fields more than F; 0 when there are enough; None without red cells.

    >>> fields_needed(np.array([8, 5, 11, 2]), np.array([20, 20, 20, 20]))
    358
    """
    n, n_fields = float(n_rbc.sum()), len(n_rbc)
    if n == 0:
        return None
    fraction = float(n_overlapping.sum()) / n
    now = overlap_interval(n_overlapping, n_rbc)
    if now is not None and now[1] - now[0] <= 2 * half_width:
        return 0
    effect, _ = _design_effect(n_overlapping, n_rbc)

    def enough(total: int) -> bool:
        low, high = _wilson(fraction, _effective_cells(n * total / n_fields, effect, total - 1))
        return high - low <= 2 * half_width

    too_few, many = n_fields, 2 * n_fields
    while not enough(many):
        too_few, many = many, 2 * many
    while many - too_few > 1:
        middle = (too_few + many) // 2
        too_few, many = (too_few, middle) if enough(middle) else (middle, many)
    return many - n_fields


def says_little(interval: tuple[float, float] | None) -> bool:
    """Tells whether an overlap interval is so wide that its slide has too few fields to say anything.

    >>> says_little((0.31, 0.58)), says_little((0.40, 0.50)), says_little(None)
    (True, False, True)
    """
    return interval is None or interval[1] - interval[0] > 2 * SAYS_LITTLE


def _design_effect(n_overlapping: Int64, n_rbc: Int64) -> tuple[float, int]:
    """Returns the fraction's variance over that of independent cells, and its degrees of freedom.

    They are `_MANY` where the number comes from `LIKENESS` and not from these fields.
    """
    n, n_fields = float(n_rbc.sum()), len(n_rbc)
    fraction = float(n_overlapping.sum()) / n
    if n_fields > 1 and 0 < fraction < 1:
        residual = n_overlapping - fraction * n_rbc
        squares = float((residual**2).sum())
        return n_fields / (n_fields - 1) * squares / (n * fraction * (1 - fraction)), n_fields - 1
    of_a_field = float((n_rbc.astype(np.float64) ** 2).sum()) / n  # as the mean cell sees it
    return 1 + (of_a_field - 1) * LIKENESS, _MANY


def _effective_cells(n: float, effect: float, degrees: int) -> float:
    """Returns how many independent cells say as much as these `n` do; at most as many."""
    return min(n, n / max(effect, 1e-9) * (_Z_95 / _student_t_95(degrees)) ** 2)


def _wilson(fraction: float, n: float) -> tuple[float, float]:
    centre = (fraction + _Z_95**2 / (2 * n)) / (1 + _Z_95**2 / n)
    half = _Z_95 / (1 + _Z_95**2 / n) * sqrt(fraction * (1 - fraction) / n + _Z_95**2 / (4 * n**2))
    # Rounding must not put the estimate itself outside (fraction 0 or 1).
    return min(max(centre - half, 0.0), fraction), max(min(centre + half, 1.0), fraction)


def _student_t_95(degrees: int) -> float:
    """Two-sided 95 % point of Student t (beyond the table: Abramowitz & Stegun 26.7.5, error < 1e-5)."""
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = _Z_95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)

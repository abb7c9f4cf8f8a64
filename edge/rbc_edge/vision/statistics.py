"""Statistics of a slide's fields of view: the overlap interval, and how many fields to add."""

from bisect import bisect_left
from math import sqrt

import numpy as np

from rbc_edge.values import Float32, Int64

# How alike cells of one field are in overlapping (intraclass correlation), where a slide cannot say. Between
# the photographs of a source we measured 0.10 to 0.19.
LIKENESS = 0.2
# A slide has too few fields or cells where half the 95 % interval of its overlap fraction is larger.
SAYS_LITTLE = 0.10
_MANY = 1_000_000  # degrees of freedom of a known number

_Z_95 = 1.959963984540054
# Student t, two-sided 95 %, 1..30 degrees of freedom.
_T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def median(values: Float32) -> float:
    """Computes np.median of float32 (N,), N > 0, in a tenth of its time where N is small.

    >>> median(np.array([4, 1, 3, 2], np.float32))
    2.5
    """
    ranked = np.sort(values, axis=None)
    middle = len(ranked) // 2
    return float(ranked[middle]) if len(ranked) % 2 else float(ranked[middle - 1] + ranked[middle]) / 2


def overlap_interval(n_overlapping: Int64, n_rbc: Int64) -> tuple[float, float] | None:
    """Computes a 95 % interval of a slide's overlap fraction, with the fields of view as the units.

    Cells of one field are alike (a crowded field has many overlaps), so the interval comes from the spread
    between fields. The variance of the ratio estimator (Cochran 1977, *Sampling Techniques*, chapter 2,
    theorem 2.5) gives an effective number of cells, with Student t for few fields (Korn & Graubard 1998,
    *Survey Methodology* 24). Wilson's interval (Wilson 1927, *JASA* 22) for this number stays within 0..1.
    The effective number is never larger than the number of cells: fields that agree by chance do not make the
    interval narrower than independent cells would.

    One field has no spread, and so have fields where no cell or every cell overlaps. Then `LIKENESS` is used,
    which is a little more than in any source we measured.

    Of int64 (F,), overlapping red cells and red cells by field, it returns the low and the high end, 0..1.
    None without red cells.
    """
    n = float(n_rbc.sum())
    if n == 0:
        return None
    fraction = float(n_overlapping.sum()) / n
    effect, degrees = _design_effect(n_overlapping, n_rbc)
    return _wilson(fraction, _effective_cells(n, effect, degrees))


def mean_interval(n_rbc: Int64) -> tuple[float, float] | None:
    """Computes a 95 % interval of the mean number of red cells in a field, of int64 (F,).

    Student t on the counts of the fields. A bootstrap of so few fields, as there often are, is too narrow: it
    knows only the counts that it has. Fields that agree by chance make the interval no narrower than cells
    that lie at random would (score interval of a Poisson mean). It never goes below 0. None with fewer than
    two fields.

    >>> [round(end, 1) for end in mean_interval(np.array([18, 25, 22, 27])) or ()]
    [16.8, 29.2]
    """
    n = len(n_rbc)
    if n < 2:
        return None
    mean = float(n_rbc.mean())
    half = _student_t_95(n - 1) * float(n_rbc.std(ddof=1)) / sqrt(n)
    centre, by_chance = mean + _Z_95**2 / (2 * n), _Z_95 * sqrt(mean / n + _Z_95**2 / (4 * n**2))
    return max(min(mean - half, centre - by_chance), 0.0), max(mean + half, centre + by_chance)


def fields_needed(n_overlapping: Int64, n_rbc: Int64, *, half_width: float = 0.02) -> int | None:
    """Computes how many more fields of view narrow a slide's overlap interval to a wanted width.

    New fields are assumed to be like the fields that exist. From a few fields the answer is rough.
    A `half_width` of 0.02 means plus or minus two percentage points. Returns how many fields more than F: 0
    when there are enough, None without red cells.

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

    many = 2 * n_fields
    while not enough(many):
        many *= 2
    return bisect_left(range(many), True, lo=many // 2 + 1, key=enough) - n_fields


def says_little(interval: tuple[float, float] | None) -> bool:
    """Tells whether an overlap interval is so wide that its slide has too few fields.

    >>> says_little((0.31, 0.58)), says_little((0.40, 0.50)), says_little(None)
    (True, False, True)
    """
    return interval is None or interval[1] - interval[0] > 2 * SAYS_LITTLE


def _design_effect(n_overlapping: Int64, n_rbc: Int64) -> tuple[float, int]:
    """Returns the fraction's variance over that of independent cells, and its degrees of freedom.

    The degrees are `_MANY` where the variance comes from `LIKENESS` and not from these fields.
    """
    n, n_fields = float(n_rbc.sum()), len(n_rbc)
    fraction = float(n_overlapping.sum()) / n
    if n_fields > 1 and 0 < fraction < 1:
        residual = n_overlapping - fraction * n_rbc
        squares = float((residual**2).sum())
        return n_fields / (n_fields - 1) * squares / (n * fraction * (1 - fraction)), n_fields - 1
    of_a_field = float((n_rbc.astype(np.float64) ** 2).sum()) / n  # of the average cell
    return 1 + (of_a_field - 1) * LIKENESS, _MANY


def _effective_cells(n: float, effect: float, degrees: int) -> float:
    """Returns how many independent cells give the same certainty as these `n`. At most `n`."""
    return min(n, n / max(effect, 1e-9) * (_Z_95 / _student_t_95(degrees)) ** 2)


def _wilson(fraction: float, n: float) -> tuple[float, float]:
    centre = (fraction + _Z_95**2 / (2 * n)) / (1 + _Z_95**2 / n)
    half = _Z_95 / (1 + _Z_95**2 / n) * sqrt(fraction * (1 - fraction) / n + _Z_95**2 / (4 * n**2))
    # Rounding must not leave the estimate itself outside (fraction 0 or 1).
    return min(max(centre - half, 0.0), fraction), max(min(centre + half, 1.0), fraction)


def _student_t_95(degrees: int) -> float:
    """Two-sided 95 % point of Student t (beyond the table: Abramowitz & Stegun 26.7.5, error < 1e-5)."""
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = _Z_95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)

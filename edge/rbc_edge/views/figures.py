"""The figures of a page: which fields differ from the others, and what the charts show."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isnan, nan, sqrt
from typing import Final, NamedTuple

import numpy as np

from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.text import natural_key
from rbc_edge.values import Cells, Counts
from rbc_edge.views.gallery import EmbeddedPicture
from rbc_edge.vision.counting import EdgeRule

MAX_GROUP: Final = 12  # larger groups are counted with groups of this size
_MAX_COLUMNS: Final = 240
_MAX_BINS: Final = 16
_OUTLIER: Final = 3.5  # modified z-score: Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers
_MAD_TO_SD: Final = 1.4826
_MIN_FOR_OUTLIERS: Final = 8
_MIN_CELLS: Final = 10  # with fewer red cells a share says nothing


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a person should look at a field of view."""

    kind: str  # ``failed``, ``flag``, ``count`` (unusual number of red cells) or ``overlap`` (unusual share)
    text: str = ""  # the failure in words, or the name of the flag
    value: float = nan
    usual: float = nan  # the median of the slide


@dataclass(slots=True)
class PageField:
    """A field of view as the page shows it. `crowding` is red cells by area, in areas of a red cell."""

    number: int
    name: str
    path: str
    row: FieldRow
    counts: Counts | None
    reasons: tuple[Reason, ...]
    crowding: float
    picture: EmbeddedPicture | None = None
    note: str = ""
    overlay: str = ""
    is_in_gallery: bool = False
    is_printed: bool = False
    outlines: Mapping[str, str] = field(default_factory=dict)  # as `gallery.outlines`


class StripColumn(NamedTuple):
    """A field along the slide, or the means of several neighbours."""

    first: str
    last: str
    n_counted: int
    n_single: float
    n_overlapping: float
    is_flagged: bool
    is_failed: bool


class Cluster(NamedTuple):
    """A part of the slide, from one field to another, with most of the fields that need a look."""

    first: str
    last: str
    n_inside: int
    n_everywhere: int


def outliers(values: Sequence[float], *, floor: float) -> list[float]:
    """Gives each value its modified z-score if that is beyond 3.5, else 0. NaN gets 0.

    A standard deviation of at least `floor` is assumed, so that nearly equal values have no outliers.
    """
    known = np.array([v for v in values if not isnan(v)], np.float64)
    if len(known) < _MIN_FOR_OUTLIERS:
        return [0.0] * len(values)
    middle = float(np.median(known))
    spread = max(float(np.median(np.abs(known - middle))) * _MAD_TO_SD, floor)
    scores = [0.0 if isnan(v) else (v - middle) / spread for v in values]
    return [score if abs(score) > _OUTLIER else 0.0 for score in scores]


def overlap_share(counts: Counts | None) -> float:
    """Returns the overlapping share of the red cells, 0..1. NaN with fewer than 10 of them."""
    if counts is None or counts.overlap_fraction is None or counts.n_rbc < _MIN_CELLS:
        return nan
    return counts.overlap_fraction


def unusual_fields(rows: Iterable[FieldRow], edges: EdgeRule) -> dict[str, tuple[Reason, ...]]:
    """Says of fields of view, by name, how they differ from the others of their slide."""
    counted = {row.fov: row.counts[edges] for row in rows if row.counts}
    reasons: dict[str, tuple[Reason, ...]] = dict.fromkeys(counted, ())
    n_rbc = [float(counts.n_rbc) for counts in counted.values()]
    for kind, values in (("count", n_rbc), ("overlap", list(map(overlap_share, counted.values())))):
        known = [v for v in values if not isnan(v)]
        usual = float(np.median(known)) if known else 0.0
        # Counts vary at least by their square root (Poisson).
        floor = max(1.0, sqrt(usual)) if kind == "count" else 0.05
        for fov, value, score in zip(counted, values, outliers(values, floor=floor), strict=True):
            if score:
                reasons[fov] += (Reason(kind, value=value, usual=usual),)
    return reasons


def histogram(values: Sequence[int]) -> dict[str, int]:
    """Counts whole numbers in bins of a round width: as many as the Rice rule allows, 4 to 16."""
    if not values:
        return {}
    low, high = min(values), max(values)
    n_bins = min(max(ceil(2 * len(values) ** (1 / 3)), 4), _MAX_BINS)
    widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < n_bins)
    bins = Counter(value // width for value in values)
    return {
        str(start) if width == 1 else f"{start}-{start + width - 1}": bins[start // width]
        for start in range(low // width * width, high + 1, width)
    }


def group_sizes(cells: Iterable[Cells]) -> dict[int, int]:
    """Counts groups by their number of cells, those of 12 and more together."""
    sizes: Counter[int] = Counter()
    for each in cells:
        sizes.update(np.minimum(np.bincount(each.group)[1:], MAX_GROUP).tolist())
    return {size: sizes[size] for size in range(1, max(sizes, default=0) + 1)}


def in_order(fields: Iterable[PageField]) -> tuple[list[PageField], str]:
    """Orders fields by ``capture``, or by ``name`` if a file does not say when it was captured.

    Numbers in names are compared as numbers.
    """
    known = [field for field in fields if field.row.status in (Status.OK, Status.FAILED)]
    is_known = all(field.row.captured_at for field in known)
    known.sort(key=lambda f: (f.row.captured_at if is_known else "", natural_key(f.row.fov)))
    return known, "capture" if is_known else "name"


def strip(fields: Sequence[PageField]) -> list[StripColumn]:
    """Shows the fields along the slide, several in a column if there are more than 240."""
    together = max(ceil(len(fields) / _MAX_COLUMNS), 1)
    return [_column(fields[i : i + together]) for i in range(0, len(fields), together)]


def _column(fields: Sequence[PageField]) -> StripColumn:
    counts = [f.counts for f in fields if f.counts]
    n = max(len(counts), 1)
    means = sum(c.n_rbc_single for c in counts) / n, sum(c.n_rbc_overlapping for c in counts) / n
    is_flagged = any(f.row.status is Status.OK and f.reasons for f in fields)
    is_failed = any(f.row.status is Status.FAILED for f in fields)
    return StripColumn(fields[0].name, fields[-1].name, len(counts), *means, is_flagged, is_failed)


def cluster(fields: Sequence[PageField]) -> Cluster | None:
    """Returns the tenth of the slide with twice its share of the fields that need a look, or more."""
    bad = np.array([bool(field.reasons) for field in fields], np.float64)
    n_tenth, n_bad = max(3, len(fields) // 10), int(bad.sum())
    if n_bad < 3 or len(fields) < 3 * n_tenth:
        return None
    sums = np.convolve(bad, np.ones(n_tenth), "valid")
    start, n_inside = int(sums.argmax()), int(sums.max())
    if n_inside < 3 or n_inside / n_tenth < 2 * n_bad / len(fields):
        return None
    return Cluster(fields[start].name, fields[start + n_tenth - 1].name, n_inside, n_bad)

"""One page a slide, and an index of the slides: HTML files that stand alone, a view of the ledger.

``reports/<slide>.html`` holds its pictures inside itself and asks for nothing: no script, no font, no
request. What needs a look comes first. The templates lie in ``templates/``.
"""

import base64
import hashlib
import io
import logging
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from math import ceil, isnan, nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import numpy as np
from PIL import Image

from rbc_edge import __version__
from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.store.ledger import FieldRow, Ledger, Status
from rbc_edge.store.outdir import replacing
from rbc_edge.text import path_text
from rbc_edge.values import Cells, FieldOfView, ScaleSource
from rbc_edge.views.names import REPORTS, file_names, on_disk, overlay_paths, page_name
from rbc_edge.views.overlay import draw, row_key, threshold_texts
from rbc_edge.views.tables import SlideSummary, summarize
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import load_field
from rbc_edge.vision.quality import FLAGS

if TYPE_CHECKING:
    from jinja2 import Environment

log = logging.getLogger(__name__)

IMAGES: Final = 400
"""Pictures in a slide's page where nothing else is asked for."""

_SCALE_WORDS: Final = {
    ScaleSource.CELL_DIAMETER: "given (--cell-diameter)",
    ScaleSource.UM_PER_PX: "given (--um-per-px)",
    ScaleSource.SLIDE: "estimated from the slide",
    ScaleSource.FIELD: "estimated from the field alone",
    ScaleSource.NONE: "unknown",
}
_EDGE_WORDS: Final = {
    EdgeRule.ALL: "every cell counts, also those that the border cuts",
    EdgeRule.TWO_SIDES: "cells that touch the right or lower border are not counted",
    EdgeRule.INSIDE: "cells that touch the border are not counted",
}

_PAGE: Final = 1  # the version of the pages; another one makes all anew
_PICTURES_BYTES: Final = 22_000_000  # of a page, as base64
_BYTES_A_PIXEL: Final = 0.18  # of such pictures at _QUALITY, as base64
_QUALITY: Final = 72
_SIDES_PX: Final = (1600, 1280, 960, 800, 640, 560, 480)
_CACHED: Final = re.compile(
    rb'data-key="([0-9a-f]{16}-[0-9]+)" src="data:image/jpeg;base64,([A-Za-z0-9+/=]+)"'
)
_CONTENT: Final = re.compile(rb'<meta name="rbc-edge-content" content="([0-9a-f]{16})">')
_HEAD_BYTES: Final = 2048
_MOST_TABLE_ROWS: Final = 3000
_MOST_FIRST: Final = 60  # of what is to be looked at first; the others stand in the table
_MOST_COLUMNS: Final = 240
_MOST_BINS: Final = 16
_LARGEST_GROUP: Final = 12
_OUTLIER: Final = 3.5  # modified z-score: Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers
_MAD_TO_SD: Final = 1.4826
_LEAST_FOR_OUTLIERS: Final = 8
_LEAST_CELLS: Final = 10  # fewer make no fraction


@dataclass(frozen=True, slots=True)
class Bar:
    """A column of a histogram or of the strip; heights as shares of the highest, 0..1."""

    label: str
    title: str
    height: float
    value: int = 0
    upper: float = 0.0
    is_flagged: bool = False
    is_failed: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG as text, and its size in pixels."""

    key: str
    base64: str
    width_px: int
    height_px: int


@dataclass(slots=True)
class Field:
    """A field of view as the page shows it."""

    number: int
    name: str
    path: str
    row: FieldRow
    overlap: str
    reasons: tuple[str, ...]
    crowding: float
    counts_text: str = ""
    picture: Picture | None = None
    note: str = ""
    overlay: str = ""
    is_in_gallery: bool = False


@dataclass(frozen=True, slots=True)
class SlideLine:
    """A slide as the index shows it."""

    name: str
    page: str
    summary: SlideSummary
    n_flagged: int
    reasons: tuple[str, ...]


class Reports:
    """Keeps the pages of one output folder up to date.

    A page is replaced whole or not at all, and is not touched while it shows what the ledger says. Pictures
    are taken over from the page of before, so that a page whose slide grows by one field costs one picture.

    Args:
        out: The output folder.
        ledger: The ledger to show; may be one for reading.
        edges: Edge rule of the counts.
        images: Most pictures in a page.
        manifest: A bundle, for the thresholds of the fields it counted; None: they are not shown.
        now: Gives the time of day.
    """

    def __init__(
        self,
        out: Path,
        ledger: Ledger,
        *,
        edges: EdgeRule = EdgeRule.ALL,
        images: int = IMAGES,
        manifest: Manifest | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._out = out
        self._ledger = ledger
        self._edges = edges
        self._images = images
        self._manifest = manifest
        self._now = now
        self._lines: dict[str, SlideLine] = {}

    @property
    def index(self) -> Path:
        """Where the index lies."""
        return self._out / REPORTS / "index.html"

    def write(
        self, slide_ids: Collection[str] | None = None, *, keep_going: Callable[[], bool] = lambda: True
    ) -> list[Path]:
        """Writes pages of slides, and the index.

        Args:
            slide_ids: The slides to write; None: all. The index shows all of them in any case.
            keep_going: Asked between two pictures; may end the work early, with the pages of before.

        Returns:
            The pages of those slides.

        Raises:
            UsageError: The ledger knows no such slide.
            UnavailableError: The pages cannot be written; those of before are intact.
        """
        names = file_names(self._ledger.slide_ids())
        for slide_id in slide_ids or ():
            if slide_id not in names:
                raise UsageError(f"no slide {slide_id!r} in the ledger", _known_slides(slide_id, list(names)))
        pages: list[Path] = []
        folder = self._out / REPORTS
        try:
            for slide_id, name in names.items():
                page = folder / on_disk(page_name(name))
                wanted = slide_ids is None or slide_id in slide_ids
                if not wanted and slide_id in self._lines:
                    continue
                rows = list(self._ledger.fields(slide_id))
                if not rows:  # its images belong to another slide now
                    self._lines.pop(slide_id, None)
                    page.unlink(missing_ok=True)
                    continue
                if wanted:
                    if not self._write_slide(slide_id, name, rows, page, keep_going):
                        return pages
                    pages.append(page)
                self._lines[slide_id] = self._line(slide_id, name, rows)
            self._write_index()
        except OSError as error:
            raise UnavailableError(
                f"{path_text(folder)}: cannot write the reports: {error.strerror or error}",
                "check permissions and free space; the counts are kept in the ledger",
            ) from error
        return pages

    # -- a slide --------------------------------------------------------------------------------------

    def _write_slide(
        self, slide_id: str, name: str, rows: list[FieldRow], page: Path, keep_going: Callable[[], bool]
    ) -> bool:
        summary = summarize(slide_id, rows, self._edges)
        outliers = _outlier_words(rows, self._edges)
        fields = [self._field(i, row, outliers.get(row.fov, ())) for i, row in enumerate(rows, 1)]
        shown, n_left_out = self._chosen(fields)
        side_px = _side_px(len(shown))
        overlays = overlay_paths(self._out, name, [row.fov for row in rows if row.status is Status.OK])
        for field in shown:
            field.is_in_gallery = True
            overlay = overlays[field.row.fov]
            if overlay.exists():
                field.overlay = _url(f"../{path_text(overlay.relative_to(self._out))}")
        key = self._key(rows, shown, side_px)
        if _content_key(page) == key:
            return True

        with _Cached(page) as cached:
            if not self._put_pictures(slide_id, shown, side_px, cached, keep_going):
                return False
        left_out = [field for field in shown if field.note == _TOO_MUCH]
        shown = [field for field in shown if field.note != _TOO_MUCH]
        for field in left_out:
            field.is_in_gallery = False
        sizes: Counter[int] = Counter()
        for _, cells in self._ledger.cells(slide_id):
            sizes.update(np.bincount(cells.group)[1:].tolist())
        first = [field for field in fields if field.reasons]
        first.sort(key=lambda f: (f.row.status is not Status.FAILED, -len(f.reasons), f.number))
        flags = Counter(flag for row in rows for flag in row.quality_flags)
        in_order, order = _in_order(fields)
        n_rbc = [row.counts[self._edges].n_rbc for row in rows if row.counts]
        context = {
            "title": _shown(slide_id),
            "edges": self._edges,
            "content_key": key,
            "summary": summary,
            "n_flagged": sum(bool(row.quality_flags) for row in rows),
            "n_duplicates": sum(row.status is Status.DUPLICATE for row in rows),
            "first": first[:_MOST_FIRST],
            "n_first": len(first),
            "flags": [(flag, FLAGS.get(flag, ""), n) for flag, n in flags.most_common()],
            "n_rbc_bars": _histogram(n_rbc),
            "group_bars": _group_bars(sizes),
            "n_groups": sum(n for size, n in sizes.items() if size > 1),
            "strip": _strip(in_order, self._edges) if n_rbc else [],
            "order": order,
            "drop": _drop(in_order),
            "gallery": sorted(shown, key=lambda f: (-f.crowding, f.number)),
            "n_left_out": n_left_out + len(left_out),
            "side_px": side_px,
            "table": fields[:_MOST_TABLE_ROWS],
            "n_fields": len(fields),
            "csv": _url(f"../{name}.csv"),
            "facts": self._facts(slide_id, rows, summary),
        }
        self._render("slide.html.j2", page, context)
        return True

    def _field(self, number: int, row: FieldRow, outlier: tuple[str, ...]) -> Field:
        counts = row.counts.get(self._edges)
        reasons: tuple[str, ...] = ()
        if row.status is Status.FAILED:
            reasons = (_shown(row.message.removeprefix(f"{path_text(row.path)}: ")),)
        crowding = 0.0
        if counts is not None:
            crowding = float(counts.n_rbc)
            if row.scale and not isnan(row.scale.cell_diameter_px) and row.width_px and row.height_px:
                crowding *= row.scale.cell_diameter_px**2 / (row.width_px * row.height_px)
            reasons = (*(FLAGS.get(flag, flag) for flag in row.quality_flags), *outlier)
        field = Field(
            number=number,
            name=_shown(row.fov),
            path=_shown(path_text(row.path)),
            row=row,
            overlap=_percent(counts.overlap_fraction) if counts else "",
            reasons=reasons,
            crowding=crowding,
        )
        if counts is not None:
            field.counts_text = (
                f"{counts.n_rbc} red cells: {counts.n_rbc_single} single, {counts.n_rbc_overlapping}"
                f" overlapping; {counts.n_wbc} white, {counts.n_platelets}"
                f" platelet{'s' * (counts.n_platelets != 1)}"
            )
        return field

    def _chosen(self, fields: Sequence[Field]) -> tuple[list[Field], int]:
        """Returns the fields that get a picture, those to look at and the crowded; and how many do not."""
        counted = [field for field in fields if field.row.status is Status.OK]
        counted.sort(key=lambda f: (not f.reasons, -f.crowding, f.number))
        return counted[: self._images], len(counted) - len(counted[: self._images])

    def _put_pictures(
        self,
        slide_id: str,
        shown: Sequence[Field],
        side_px: int,
        cached: "_Cached",
        keep_going: Callable[[], bool],
    ) -> bool:
        left_bytes = _PICTURES_BYTES
        missing = {}
        for field in shown:
            key = f"{row_key(field.row, self._edges)}-{side_px}"
            field.picture = cached.picture(key)
            if field.picture is None:
                missing[field.row.fov] = key
        cells = {fov: c for fov, c in self._ledger.cells(slide_id) if fov in missing} if missing else {}
        for field in shown:
            if not keep_going():
                return False
            if field.picture is None:
                found = cells.get(field.row.fov, Cells.empty())
                field.picture, field.note = _picture(field.row, found, missing[field.row.fov], side_px)
            if field.picture is not None:
                left_bytes -= len(field.picture.base64)
                if left_bytes < 0:
                    field.picture, field.note = None, _TOO_MUCH
        return True

    def _key(self, rows: Sequence[FieldRow], shown: Sequence[Field], side_px: int) -> str:
        """Returns 16 hex digits that change when the page has to."""
        digest = hashlib.sha256()
        thresholds = sorted(
            {t for row in rows for t in threshold_texts(row.version.bundle_id, self._manifest)}
        )
        digest.update(repr((_PAGE, __version__, self._edges, self._images, side_px, thresholds)).encode())
        for row in rows:
            state = (row_key(row, self._edges), row.status, row.message, row.captured_at, path_text(row.path))
            digest.update(repr(state).encode("utf-8", "backslashreplace"))
        for field in shown:
            digest.update(repr((field.number, field.overlay, field.row.path.exists())).encode())
        return digest.hexdigest()[:16]

    def _facts(
        self, slide_id: str, rows: Sequence[FieldRow], summary: SlideSummary
    ) -> list[tuple[str, list[str]]]:
        """Says what the counts come from, as pairs of name and lines."""
        counted = [row for row in rows if row.status is Status.OK]
        scales: Counter[str] = Counter()
        for row in counted:
            if row.scale is not None:
                size = row.scale.cell_diameter_px
                shown = "" if isnan(size) else f"{size:.1f} px, "
                scales[f"red cell {shown}{_SCALE_WORDS[row.scale.source]}"] += 1
        many = len(scales) > 1
        lines = [f"{text} ({n} field{'s' * (n != 1)})" if many else text for text, n in scales.most_common(6)]
        if len(scales) > len(lines):
            lines.append(f"and {len(scales) - len(lines)} more")
        thresholds = []
        for bundle_id in summary.bundle_ids:
            texts = threshold_texts(bundle_id, self._manifest)
            thresholds.append(
                "; ".join(texts) if texts else f"of bundle {bundle_id}: it is not installed here"
            )
        sizes = Counter(f"{row.width_px} x {row.height_px} px" for row in counted)
        analyzed = sorted(row.analyzed_at for row in rows)
        folders = sorted({_shown(path_text(row.path.parent)) for row in rows})
        kept = self._ledger.slide_scale(slide_id)
        n_fields = kept.n_fields if kept and kept.scale.source is ScaleSource.SLIDE else None
        if n_fields:
            lines.append(f"the slide's estimate is from {n_fields} field{'s' * (n_fields != 1)}")
        captured = [summary.first_captured_at, summary.last_captured_at]
        ms = [row.elapsed_ms for row in counted]
        return [
            ("Bundle", list(summary.bundle_ids) or ["none has counted yet"]),
            ("Thresholds", thresholds or ["-"]),
            ("Scale", lines or ["unknown"]),
            ("Edge rule", [f"{self._edges}: {_EDGE_WORDS[self._edges]}"]),
            ("Image size", [text for text, _ in sizes.most_common(4)] or ["-"]),
            ("Captured", [_span(captured) if captured[0] else "the files do not say"]),
            ("Counted", [_span([analyzed[0], analyzed[-1]])]),
            ("Time a field", [f"{sum(ms) / len(ms):.0f} ms on average, reading included"] if ms else ["-"]),
            (
                "Images",
                [*folders[:4], *([f"and {len(folders) - 4} more folders"] if len(folders) > 4 else [])],
            ),
            ("Program", [f"rbc-edge {__version__}"]),
            ("Page made", [self._now().astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")]),
        ]

    # -- the index ------------------------------------------------------------------------------------

    def _line(self, slide_id: str, name: str, rows: Sequence[FieldRow]) -> SlideLine:
        summary = summarize(slide_id, rows, self._edges)
        n_flagged = sum(bool(row.quality_flags) for row in rows)
        return SlideLine(_shown(slide_id), page_name(name), summary, n_flagged, ())

    def _write_index(self) -> None:
        lines = [line for _, line in sorted(self._lines.items())]
        overlap = _outliers([_fraction(line.summary) for line in lines], floor=0.02)
        per_field = _outliers(
            [nan if (m := line.summary.n_rbc_per_fov_mean) is None else m for line in lines], floor=1.0
        )
        shown = []
        for i, line in enumerate(lines):
            reasons = []
            if line.summary.n_fov_failed:
                reasons.append(f"{line.summary.n_fov_failed} failed")
            if overlap[i]:
                reasons.append(f"{'more' if overlap[i] > 0 else 'less'} overlap than the other slides")
            if per_field[i]:
                reasons.append(
                    f"{'more' if per_field[i] > 0 else 'fewer'} cells a field than the other slides"
                )
            if line.n_flagged:
                reasons.append(f"{line.n_flagged} flagged")
            page = self._out / REPORTS / on_disk(f"{line.page}")
            url = _url(f"{line.page}") if page.exists() else ""
            shown.append(SlideLine(line.name, url, line.summary, line.n_flagged, tuple(reasons)))
        shown.sort(
            key=lambda s: (
                not s.summary.n_fov_failed,
                not any("than the other" in reason for reason in s.reasons),
                -s.n_flagged / max(s.summary.n_fov_ok, 1),
                s.name,
            )
        )
        totals = [line.summary for line in lines]
        context = {
            "title": "Slides",
            "slides": shown,
            "n_ok": sum(s.n_fov_ok for s in totals),
            "n_failed": sum(s.n_fov_failed for s in totals),
            "n_rbc": sum(s.counts.n_rbc for s in totals if s.counts),
            "edges": f"{self._edges}: {_EDGE_WORDS[self._edges]}",
            "made": self._now().astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "version": __version__,
            "content_key": hashlib.sha256(repr((_PAGE, shown)).encode("utf-8", "replace")).hexdigest()[:16],
        }
        if _content_key(self.index) != context["content_key"]:
            self._render("index.html.j2", self.index, context)

    def _render(self, template: str, page: Path, context: Mapping[str, Any]) -> None:
        with replacing(page) as file:
            for part in _environment().get_template(template).generate(context):
                file.write(part.encode("utf-8", "backslashreplace"))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  0.1 s, and few need it

    environment = Environment(
        loader=PackageLoader("rbc_edge.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = _percent
    return environment


# -- pictures -------------------------------------------------------------------------------------------

_TOO_MUCH: Final = "left out: the page would become too large"


def _picture(row: FieldRow, cells: Cells, key: str, side_px: int) -> tuple[Picture | None, str]:
    """Draws a field of view; or says why it cannot."""
    try:
        field = load_field(row.path, row.slide_id, row.fov)
    except ImageError as error:
        if error.reason == "vanished":
            return None, f"no picture: the image is no longer at {_shown(path_text(row.path))}"
        return None, f"no picture: {_shown(str(error))}"
    if not _matches(field, row):
        return None, "no picture: the file holds another image by now, which is counted in its turn"
    drawn = draw(field.image, cells, longest_px=side_px)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(key, text, drawn.shape[1], drawn.shape[0]), ""


def _matches(field: FieldOfView, row: FieldRow) -> bool:
    return field.sha256 == row.sha256


class _Cached:
    """The pictures that a page of before holds."""

    def __init__(self, page: Path) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._map: mmap.mmap | None = None
        with suppress(OSError, ValueError), page.open("rb") as file:  # ValueError: it is empty
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for match in _CACHED.finditer(self._map):
                self._places[match[1].decode("ascii")] = match.span(2)

    def __enter__(self) -> "_Cached":
        return self

    def __exit__(self, *_: object) -> None:
        if self._map is not None:
            self._map.close()

    def picture(self, key: str) -> Picture | None:
        """Returns a picture; None where there is none, or it is not whole."""
        place = self._places.get(key)
        if place is None or self._map is None:
            return None
        text = self._map[place[0] : place[1]]
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["JPEG"]) as image:
                return Picture(key, text.decode("ascii"), image.width, image.height)
        except (ValueError, OSError):
            return None


def _side_px(n_pictures: int) -> int:
    """Returns the longest side at which so many pictures fit into a page, pixels.

    In steps, so that the pictures of a page need not be drawn anew for each field that comes.
    """
    pixels = _PICTURES_BYTES / max(n_pictures, 1) / _BYTES_A_PIXEL
    fitting = (side for side in _SIDES_PX if side * side * 0.75 <= pixels)
    return next(fitting, _SIDES_PX[-1])


def _content_key(page: Path) -> str:
    with suppress(OSError), page.open("rb") as file:
        match = _CONTENT.search(file.read(_HEAD_BYTES))
        if match:
            return match[1].decode("ascii")
    return ""


# -- numbers --------------------------------------------------------------------------------------------


def _outliers(values: Sequence[float], *, floor: float) -> list[float]:
    """Gives each value its modified z-score where that is beyond 3.5, else 0; NaN are passed over.

    Args:
        values: The values.
        floor: Least standard deviation that is believed: values that are nearly alike have no outliers.
    """
    known = np.array([v for v in values if not isnan(v)], np.float64)
    if len(known) < _LEAST_FOR_OUTLIERS:
        return [0.0] * len(values)
    middle = float(np.median(known))
    spread = max(float(np.median(np.abs(known - middle))) * _MAD_TO_SD, floor)
    scores = [0.0 if isnan(v) else (v - middle) / spread for v in values]
    return [score if abs(score) > _OUTLIER else 0.0 for score in scores]


def _outlier_words(rows: Sequence[FieldRow], edges: EdgeRule) -> dict[str, tuple[str, ...]]:
    """Says of fields of view, by name, how they differ from the others of their slide."""
    counted = [(row, row.counts[edges]) for row in rows if row.counts]
    n_rbc = [float(counts.n_rbc) for _, counts in counted]
    # Counts scatter by their root at least (Poisson).
    by_count = _outliers(n_rbc, floor=max(1.0, sqrt(float(np.median(n_rbc))) if n_rbc else 1.0))
    fractions = [
        nan if counts.overlap_fraction is None or counts.n_rbc < _LEAST_CELLS else counts.overlap_fraction
        for _, counts in counted
    ]
    by_overlap = _outliers(fractions, floor=0.05)
    usual_count = float(np.median(n_rbc)) if n_rbc else 0.0
    known = [fraction for fraction in fractions if not isnan(fraction)]
    usual_fraction = float(np.median(known)) if known else 0.0
    words = {}
    for i, (row, counts) in enumerate(counted):
        said = []
        if by_count[i]:
            said.append(
                f"far {'more' if by_count[i] > 0 else 'fewer'} red cells than the slide's other fields:"
                f" {counts.n_rbc}, not about {usual_count:.0f}"
            )
        if by_overlap[i]:
            said.append(
                f"far {'more' if by_overlap[i] > 0 else 'less'} overlap than the slide's other fields:"
                f" {_percent(fractions[i])}, not about {_percent(usual_fraction)}"
            )
        words[row.fov] = tuple(said)
    return words


def _histogram(values: Sequence[int]) -> list[Bar]:
    """Counts whole numbers in bins of a round width: as many as the Rice rule allows, 4 to 16."""
    if not values:
        return []
    low, high = min(values), max(values)
    n_bins = min(max(ceil(2 * len(values) ** (1 / 3)), 4), _MOST_BINS)
    widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < n_bins)
    bins = Counter(value // width for value in values)
    most = max(bins.values())
    bars = []
    for i in range(low // width, high // width + 1):
        label = str(i * width) if width == 1 else f"{i * width}-{(i + 1) * width - 1}"
        n = bins[i]
        title = f"{label} red cells: {n} field{'s' * (n != 1)}"
        bars.append(Bar(label, title, n / most, n))
    return bars


def _group_bars(sizes: Mapping[int, int]) -> list[Bar]:
    """Counts groups by their number of cells, those of 12 and more together."""
    bins: Counter[int] = Counter()
    for size, n in sizes.items():
        if size:
            bins[min(size, _LARGEST_GROUP)] += n
    if not bins:
        return []
    most = max(bins.values())
    bars = []
    for size in range(1, max(bins) + 1):
        label = f"{size}+" if size == _LARGEST_GROUP else str(size)
        n = bins[size]
        title = f"{n} group{'s' * (n != 1)} of {label} cell{'s' * (size != 1)}"
        bars.append(Bar(label, title, n / most, n))
    return bars


def _in_order(fields: Iterable[Field]) -> tuple[list[Field], str]:
    """Orders fields as they were captured; where a file does not say, by name, with numbers as numbers."""
    known = [field for field in fields if field.row.status is not Status.DUPLICATE]
    is_said = all(field.row.captured_at for field in known)
    in_order = sorted(known, key=lambda f: (f.row.captured_at if is_said else "", _natural(f.row.fov)))
    return in_order, "capture" if is_said else "name"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _strip(fields: Sequence[Field], edges: EdgeRule) -> list[Bar]:
    """Shows the fields along the slide, several to a column where there are more than 240."""
    together = -(-len(fields) // _MOST_COLUMNS) or 1
    columns = [fields[i : i + together] for i in range(0, len(fields), together)]
    counts = [[f.row.counts[edges] for f in column if f.row.counts] for column in columns]
    most = max((sum(c.n_rbc for c in of) / len(of) for of in counts if of), default=0) or 1
    bars = []
    for column, of in zip(columns, counts, strict=True):
        n = max(len(of), 1)
        single, overlapping = sum(c.n_rbc_single for c in of) / n, sum(c.n_rbc_overlapping for c in of) / n
        names = column[0].name if len(column) == 1 else f"{column[0].name} to {column[-1].name}"
        said = f"{single + overlapping:.0f} red cells, {overlapping:.0f} overlapping" if of else "not counted"
        bars.append(
            Bar(
                label=names,
                title=f"{names}: {said}{' a field' if len(column) > 1 else ''}",
                height=overlapping / most,
                upper=single / most,
                is_flagged=any(f.row.status is Status.OK and f.reasons for f in column),
                is_failed=any(f.row.status is Status.FAILED for f in column),
            )
        )
    return bars


def _drop(fields: Sequence[Field]) -> str:
    """Says in words where along the slide most of what needs a look lies; empty where it lies nowhere."""
    bad = np.array([bool(field.reasons) for field in fields], np.float64)
    n_tenth = max(3, len(fields) // 10)
    n_bad = int(bad.sum())
    if n_bad < 3 or len(fields) < 3 * n_tenth:
        return ""
    sums = np.convolve(bad, np.ones(n_tenth), "valid")
    start = int(sums.argmax())
    worst = int(sums[start])
    if worst < 3 or worst / n_tenth < 2 * n_bad / len(fields):
        return ""
    return (
        f"Most lies between {fields[start].name} and {fields[start + n_tenth - 1].name}:"
        f" {worst} of the {n_bad} fields are among these {n_tenth}."
    )


# -- words ----------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _fraction(summary: SlideSummary) -> float:
    counts = summary.counts
    if counts is None or counts.overlap_fraction is None or counts.n_rbc < _LEAST_CELLS:
        return nan
    return counts.overlap_fraction


def _span(times: Sequence[str]) -> str:
    first, last = times
    return first if first == last else f"{first} to {last}"


def _shown(text: str) -> str:
    """Makes a name visible: control characters, and those that turn text around, by their escapes."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _url(path: str) -> str:
    return quote(os.fsencode(path) if path.isascii() else path, safe="/.-_~")


def _known_slides(wanted: str, slide_ids: Sequence[str]) -> str:
    import difflib  # noqa: PLC0415  for a mistake

    near = difflib.get_close_matches(wanted, slide_ids, n=3, cutoff=0.3) or sorted(slide_ids)[:5]
    return f"did you mean {', '.join(near)}?" if near else "the ledger is empty"

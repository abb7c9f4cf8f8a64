"""The CSV files. They show the ledger and can always be written again.

To add a column, add its line to `FIELD_TABLE`, `SLIDE_TABLE`, `CELL_TABLE` or `SHAPE_TABLE`. Header, rows and
``docs/tables.md`` (``python docs/make_tables.py``) follow from these declarations.

UTF-8, comma, RFC 4180 quoting, LF (other forms: `csv_form`), one line for each row, stable order. An unknown
value is empty, never 0.
"""

import csv
import errno
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, astuple, dataclass, field, replace
from io import BytesIO, StringIO
from itertools import chain, compress, groupby
from math import isnan, nan
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Final, Generic, NamedTuple, TypeVar

import numpy as np

from rbc_edge.errors import BROKEN_DISK, UnavailableError
from rbc_edge.store.corrections import Corrected
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import replacing
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.text import count_text, in_order, path_text
from rbc_edge.values import SHAPES, Counts, Float32, Scale, Shape
from rbc_edge.views import shapes
from rbc_edge.views.csv_form import CsvForm, Value, typed
from rbc_edge.views.names import file_names, old_files, on_disk
from rbc_edge.vision.boxes import iou, touching_pairs
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.quality import NOTES, warnings
from rbc_edge.vision.statistics import fields_needed, mean_interval, overlap_interval, says_little

log = logging.getLogger(__name__)

SCHEMA: Final = "3"
_EDGES_NOTE: Final = "edges"  # name of the note in the ledger that keeps the edge rule of the tables
_FORM_NOTE: Final = "form"  # and of the one that keeps their form
_HELD: Final = frozenset({errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY, errno.EISDIR})
_BLOCK_BYTES: Final = 1 << 20
_SIDES: Final = ("left", "top", "right", "bottom")
# The start of a formula at the start of a cell. Where lists are separated by semicolons, each begins a cell.
_FORMULA: Final = re.compile(r"""(^|;)(["\s]*[=+\-@＝＋－＠﹦﹢﹣﹫])""")
_Row = TypeVar("_Row")


class HeldError(UnavailableError):
    """One table cannot be replaced, though its folder can be written: another program has it open."""


@dataclass(frozen=True, slots=True)
class SlideSummary:
    """A row of ``slides.csv``."""

    slide_id: str
    n_fov_ok: int  # fields of view counted, without duplicates
    n_fov_failed: int
    counts: Counts | None  # cells of all fields, under the edge rule
    overlap_interval: tuple[float, float] | None  # 95 %, of the overlap fraction. None without red cells.
    n_rbc_per_fov_mean: float | None  # None without a field
    n_rbc_per_fov_sd: float | None  # of the sample. None with fewer than two fields.
    n_rbc_per_fov_interval: tuple[float, float] | None  # 95 %, of the mean. None with fewer than two fields.
    first_captured_at: str  # ISO 8601, or empty when no file says it
    last_captured_at: str
    bundle_ids: tuple[str, ...]  # the bundles that counted, sorted
    n_corrected: int  # cells that a person corrected, added or took out
    # The others are no columns.
    n_fov_more: int | None = None  # more fields for an interval of ±2 points. None without red cells.
    flags: Mapping[str, int] = field(default_factory=dict)  # fields with each flag, the most frequent first
    n_fov_flagged: int = 0  # fields with at least one flag
    notes: Mapping[str, int] = field(default_factory=dict)  # the same of flags that only inform
    forms: shapes.SlideForms = field(
        default_factory=shapes.SlideForms
    )  # columns, too. `summarize` leaves it empty

    @property
    def too_few_fields(self) -> bool:
        """The overlap interval is so wide that it says little, or there is none."""
        return says_little(self.overlap_interval)

    @property
    def advice_on_fields(self) -> str:
        """What a person should know of a slide with too few fields. Empty where there are enough."""
        if not self.too_few_fields or self.n_fov_more is None or self.counts is None:
            return ""
        low, high = self.overlap_interval or (0.0, 1.0)
        counted = f"{count_text(self.n_fov_ok, 'field')} with {count_text(self.counts.n_rbc, 'red cell')}"
        return (
            f"{counted}. The overlap can be anything from {low:.0%} to {high:.0%}. Count about"
            f" {count_text(self.n_fov_more, 'more field')} to know it within 2 percentage points."
        )

    @property
    def contradicts_scale(self) -> bool:
        """In most fields the cells do not have the size that the given scale says."""
        return self.flags.get("scale-mismatch", 0) > self.n_fov_ok / 2


class Table(Generic[_Row]):
    """The columns of a kind of CSV file, in order: name, function that makes the text from a row, meaning.

    The meaning is one line of Markdown, for ``docs/tables.md``.
    """

    def __init__(self, *columns: tuple[str, Callable[[_Row], str], str]) -> None:
        self.names = tuple(name for name, _, _ in columns)
        self.meanings = {name: meaning for name, _, meaning in columns}
        self._texts = tuple(text for _, text, _ in columns)

    def texts(self, row: _Row) -> list[str]:
        """Returns the cells of a row."""
        return [text(row) for text in self._texts]

    def values(self, row: _Row) -> dict[str, Value]:
        """Returns the cells of a row by their columns, numbers as numbers. An empty cell is None."""
        return {name: typed(name, text) for name, text in zip(self.names, self.texts(row), strict=True)}

    def lines(self, rows: Iterable[_Row], form: CsvForm = CsvForm.PLAIN) -> Iterator[bytes]:
        """Returns the header and a line for each row."""
        buffer = StringIO()
        buffer.write(form.start)
        writer = csv.writer(buffer, delimiter=form.separator, quoting=form.quoting, lineterminator="\n")
        for cells in chain([self.names], (form.cells(self.names, self.texts(row)) for row in rows)):
            writer.writerow(cells)
            yield buffer.getvalue().encode()
            buffer.seek(0)
            buffer.truncate()


# -- cells of a table -----------------------------------------------------------------------------------


def _number(value: float | None, decimals: int = 0) -> str:
    """Formats a number. It is empty when unknown (None or NaN)."""
    return "" if value is None or isnan(value) else f"{value:.{decimals}f}"


def _text(value: str) -> str:
    """Makes a name safe in a cell: one line, and nothing that a spreadsheet would run as a formula."""
    odd = {c for c in value if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    value = "".join(c.encode("unicode_escape").decode() if c in odd else c for c in value)
    return _FORMULA.sub(r"\1'\2", value)


def _count(counts: Counts | None, of: str) -> str:
    return "" if counts is None else str(getattr(counts, of))


def _share(counts: Counts | None) -> str:
    return _number(counts.overlap_fraction if counts else None, 4)


def _end(interval: tuple[float, float] | None, i: int, decimals: int) -> str:
    return _number(interval and interval[i], decimals)


def _diameter(scale: Scale | None) -> str:
    return _number(scale.cell_diameter_px if scale else None, 2)


class _Fov(NamedTuple):
    row: FieldRow
    counts: Counts | None  # under the edge rule


class _Cell(NamedTuple):
    slide: str
    fov: str
    number: int
    label: str
    model_label: str
    box: list[float]
    score: float
    overlap_score: float
    group: int
    edges: list[bool]
    shape: int
    shape_score: float
    shape_judged: str
    area_px: float
    area_um2: float
    aspect_ratio: float
    circularity: float
    pallor: float
    max_iou: float


def _cells(slide_id: str, fields: Iterable[tuple[FieldRow, Corrected]]) -> Iterator[_Cell]:
    slide = _text(slide_id)
    for row, of in fields:
        cells, numbers = of.cells, range(len(of.cells))
        name, found, form = _text(row.fov), cells.detections, cells.morphology
        labels = zip(map(of.label, numbers), map(of.model_label, numbers), strict=True)
        um = np.float32(shapes.um_per_px(row) or nan)
        columns = (
            *(found.xyxy, found.score, cells.overlap_score, cells.group, cells.touches_edge),
            *(form.shape, form.shape_score, np.array(shapes.judged(cells, row), np.str_), form.area_px),
            *(form.area_px * um**2, form.aspect_ratio, form.circularity, form.pallor, _max_iou(found.xyxy)),
        )
        values = zip(labels, *(c.tolist() for c in columns), strict=True)
        for i, (both, *each) in enumerate(values, 1):
            yield _Cell(slide, name, i, *both, *each)


def _max_iou(xyxy: Float32) -> Float32:
    """Returns the largest iou of each box with another, float32 (N,)."""
    a, b = touching_pairs(xyxy.astype(np.float64))
    most = np.zeros(len(xyxy), np.float32)
    shared = iou(xyxy[a, None], xyxy[b, None])[:, 0]
    np.maximum.at(most, a, shared)
    np.maximum.at(most, b, shared)
    return most


class _Shape(NamedTuple):
    slide: str
    line: shapes.ShapeLine


# -- the columns ----------------------------------------------------------------------------------------

SLIDE_TABLE: Final = Table[SlideSummary](
    ("schema", lambda _: SCHEMA, f"version of the table, {SCHEMA}"),
    (
        "slide_id",
        lambda s: _text(s.slide_id),
        "the slide: its folder's name, or what `--slide-pattern` finds",
    ),
    ("n_fov_ok", lambda s: str(s.n_fov_ok), "fields of view that are counted"),
    ("n_fov_failed", lambda s: str(s.n_fov_failed), "images that could not be counted"),
    ("n_rbc", lambda s: _count(s.counts, "n_rbc"), "red cells in all fields together"),
    ("n_rbc_single", lambda s: _count(s.counts, "n_rbc_single"), "single red cells"),
    ("n_rbc_overlapping", lambda s: _count(s.counts, "n_rbc_overlapping"), "overlapping red cells"),
    ("overlap_fraction", lambda s: _share(s.counts), "share of the red cells that overlap, 0 to 1"),
    ("overlap_low", lambda s: _end(s.overlap_interval, 0, 4), "lower end of the 95 % interval of this share"),
    ("overlap_high", lambda s: _end(s.overlap_interval, 1, 4), "upper end of this interval"),
    ("n_wbc", lambda s: _count(s.counts, "n_wbc"), "white cells"),
    ("n_platelets", lambda s: _count(s.counts, "n_platelets"), "platelets"),
    ("n_corrected", lambda s: str(s.n_corrected), "cells that a person corrected, added or took out"),
    ("n_rbc_per_fov_mean", lambda s: _number(s.n_rbc_per_fov_mean, 2), "red cells in a field: mean"),
    ("n_rbc_per_fov_sd", lambda s: _number(s.n_rbc_per_fov_sd, 2), "their standard deviation between fields"),
    (
        "n_rbc_per_fov_low",
        lambda s: _end(s.n_rbc_per_fov_interval, 0, 2),
        "lower end of the 95 % interval of this mean. Empty with one field",
    ),
    ("n_rbc_per_fov_high", lambda s: _end(s.n_rbc_per_fov_interval, 1, 2), "upper end of this interval"),
    ("first_captured_at", lambda s: _text(s.first_captured_at), "when the first image was taken"),
    ("last_captured_at", lambda s: _text(s.last_captured_at), "when the last image was taken"),
    ("bundle_id", lambda s: "+".join(s.bundle_ids), "the bundle that counted. Several are joined with `+`"),
    (
        "area_mean",
        lambda s: _number(s.forms.area_mean, 2),
        "area of a red cell: mean, square micrometres. Empty where the scale is not known in micrometres",
    ),
    ("area_sd", lambda s: _number(s.forms.area_sd, 2), "its standard deviation, square micrometres"),
    (
        "area_cv",
        lambda s: _number(s.forms.area_cv, 4),
        "standard deviation over mean of the area, 0.1 is 10 %. Needs no scale in micrometres",
    ),
    (
        "pale_share",
        lambda s: _number(s.forms.pale_share, 4),
        f"share of the red cells with a pale middle of more than {shapes.PALE:.0%} of the area".replace(
            "%", " %"
        ),
    ),
    (
        "small_share",
        lambda s: _number(s.forms.small_share, 4),
        "share of the red cells with a diameter below 6/7 of the slide's median cell",
    ),
    (
        "large_share",
        lambda s: _number(s.forms.large_share, 4),
        "share of the red cells with a diameter above 8/7 of the slide's median cell",
    ),
)

FIELD_TABLE: Final = Table[_Fov](
    ("schema", lambda _: SCHEMA, f"version of the table, {SCHEMA}"),
    ("slide_id", lambda f: _text(f.row.slide_id), "the slide"),
    (
        "fov",
        lambda f: _text(f.row.fov),
        "the field of view: name of the file without its suffix, and `#2` for its second page",
    ),
    ("path", lambda f: _text(path_text(f.row.path)), "the file"),
    (
        "sha256",
        lambda f: f.row.sha256,
        "checksum of the file, and `#2` for its second page. Empty if it could not be read",
    ),
    ("status", lambda f: f.row.status, "`ok`, `failed`, `duplicate` or `excluded`"),
    ("failure", lambda f: f.row.failure, "why it failed, in one word"),
    ("reason", lambda f: _text(f.row.reason), "why a person excluded it (`rbc-edge exclude`)"),
    ("width_px", lambda f: _number(f.row.width_px), "width of the image"),
    ("height_px", lambda f: _number(f.row.height_px), "height of the image"),
    ("cell_diameter_px", lambda f: _diameter(f.row.scale), "diameter of a red cell in the image"),
    ("scale_source", lambda f: f.row.scale.source if f.row.scale else "", "where this diameter comes from"),
    ("n_rbc", lambda f: _count(f.counts, "n_rbc"), "red cells"),
    ("n_rbc_single", lambda f: _count(f.counts, "n_rbc_single"), "single red cells"),
    ("n_rbc_overlapping", lambda f: _count(f.counts, "n_rbc_overlapping"), "overlapping red cells"),
    ("n_wbc", lambda f: _count(f.counts, "n_wbc"), "white cells"),
    ("n_platelets", lambda f: _count(f.counts, "n_platelets"), "platelets"),
    (
        "n_refused",
        lambda f: _number(f.row.n_refused),
        "boxes that hold no single red cell. They are no cells",
    ),
    ("overlap_fraction", lambda f: _share(f.counts), "share of the red cells that overlap, 0 to 1"),
    (
        "n_corrected",
        lambda f: "" if f.counts is None else str(f.row.n_corrected),
        "cells that a person corrected, added or took out (`rbc-edge review`). The counts are with it",
    ),
    (
        "reviewed",
        lambda f: _text(f.row.reviewed_by),
        "who looked at the whole field and accepted it. Empty again when other cells are found in it",
    ),
    ("quality_flags", lambda f: _text(";".join(f.row.quality_flags)), "quality warnings, joined with `;`"),
    ("captured_at", lambda f: _text(f.row.captured_at), "when the image was taken (EXIF)"),
    ("analyzed_at", lambda f: f.row.analyzed_at, "when it was counted, UTC"),
    ("bundle_id", lambda f: f.row.version.bundle_id, "the bundle that counted"),
    ("elapsed_ms", lambda f: _number(f.row.elapsed_ms, 1), "how long it took, milliseconds"),
)

CELL_TABLE: Final = Table[_Cell](
    ("schema", lambda _: SCHEMA, f"version of the table, {SCHEMA}"),
    ("slide_id", lambda c: c.slide, "the slide"),
    ("fov", lambda c: c.fov, "the field of view"),
    ("cell", lambda c: str(c.number), "number of the cell in its field, from 1"),
    (
        "label",
        lambda c: c.label,
        "`rbc_single`, `rbc_overlapping`, `wbc` or `platelet`. `not_a_cell`: not counted, a person says so",
    ),
    ("model_label", lambda c: c.model_label, "what the bundle says. Empty for a cell that a person added"),
    ("x_min_px", lambda c: _number(c.box[0], 1), "left side of the cell's box, pixels from the left border"),
    ("y_min_px", lambda c: _number(c.box[1], 1), "upper side, pixels from the upper border"),
    ("x_max_px", lambda c: _number(c.box[2], 1), "right side"),
    ("y_max_px", lambda c: _number(c.box[3], 1), "lower side"),
    ("det_score", lambda c: _number(c.score, 4), "how sure the detector is that a cell is there, 0 to 1"),
    ("overlap_score", lambda c: _number(c.overlap_score, 4), "probability that it overlaps, 0 to 1"),
    ("group", lambda c: str(c.group or ""), "number of its group of overlapping cells. Empty: in no group"),
    (
        "touches_edge",
        lambda c: "+".join(compress(_SIDES, c.edges)),
        "image borders that the cell touches: `left`, `top`, `right`, `bottom`, joined with `+`",
    ),
    (
        "shape",
        lambda c: "" if c.shape < 0 else SHAPES[c.shape],
        "most probable shape of a red cell. Empty where the bundle names no shapes or did not see a red cell",
    ),
    ("shape_score", lambda c: _number(c.shape_score, 4), "probability of this shape, 0 to 1"),
    (
        "shape_judged",
        lambda c: c.shape_judged,
        "`yes`, or why this shape is in no share: `overlapping`, `cut`, `unsure` or `flagged`",
    ),
    ("area_px", lambda c: _number(c.area_px, 1), "area inside the outline, square pixels"),
    (
        "area_um2",
        lambda c: _number(c.area_um2, 2),
        "the same in square micrometres. Empty where the scale is not known in micrometres",
    ),
    ("aspect_ratio", lambda c: _number(c.aspect_ratio, 3), "length over width of the outline, 1 for a disc"),
    ("circularity", lambda c: _number(c.circularity, 3), "how round the outline is: 1 for a disc, else less"),
    ("pallor", lambda c: _number(c.pallor, 3), "share of the area that is pale, 0 to 1"),
    ("max_iou", lambda c: _number(c.max_iou, 3), "largest iou of the cell's box with another box, 0 to 1"),
)

SHAPE_TABLE: Final = Table[_Shape](
    ("schema", lambda _: SCHEMA, f"version of the table, {SCHEMA}"),
    ("slide_id", lambda s: s.slide, "the slide"),
    ("shape", lambda s: s.line.shape, "the shape, as in the column `shape` of the cells"),
    ("icsh_name", lambda s: shapes.ICSH_NAMES[s.line.shape], "its name in the recommendations of the ICSH"),
    ("n_judged", lambda s: str(s.line.n_judged), "red cells of the slide of which the shape is judged"),
    ("n", lambda s: str(s.line.n), "those of them that have this shape"),
    ("share", lambda s: _number(s.line.share, 4), "their share, 0 to 1"),
    (
        "share_low",
        lambda s: _number(s.line.interval and s.line.interval[0], 4),
        "lower end of the 95 % interval of this share",
    ),
    (
        "share_high",
        lambda s: _number(s.line.interval and s.line.interval[1], 4),
        "upper end of this interval",
    ),
    (
        "enough",
        lambda s: "yes" if s.line.n_judged >= shapes.ENOUGH else "no",
        f"whether {shapes.ENOUGH:,} cells are judged, the number that the ICSH asks for",
    ),
)


# -- the files ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Tables:
    """Writes the CSV files of one output folder, with counts under one edge rule.

    A file is replaced completely or not at all. It is not touched when its content stays the same.
    ``cells/<slide>.csv`` is written where `cells` is true, and ``shapes/<slide>.csv`` where its bundle names
    shapes, too. Existing ones are always kept up to date. A table that another program holds stays as it is,
    until a later `write` can replace it: see `held`. The manifest is that of the bundle at work.
    """

    out: Path
    ledger: Ledger
    _: KW_ONLY
    edges: EdgeRule = EdgeRule.ALL
    cells: bool = False
    manifest: Manifest | None = None
    form: CsvForm = CsvForm.PLAIN
    held: dict[str, str] = field(default_factory=dict, init=False)  # what waits, by slide; "": slides.csv
    _summaries: dict[str, tuple[SlideSummary, bytes]] = field(default_factory=dict, init=False)
    _names: dict[str, str] = field(default_factory=dict, init=False)
    is_renamed: bool = field(default=False, init=False)  # the last `write` gave some slides other names
    _has_new_names: bool = field(default=True, init=False)  # since the last `write`; at first, maybe

    def __post_init__(self) -> None:
        for folder in (self.out, self.out / "cells", self.out / "shapes"):
            for left_over in folder.glob(".*.csv.tmp"):  # of a process that was killed while writing
                with suppress(OSError):
                    left_over.unlink()

    def write_slide(self, slide_id: str) -> None:
        """Writes one slide's tables, so that they can be read while others are being counted."""
        if name := self._file_names().get(slide_id):  # else the ledger does not know the slide yet
            self._write_slide(slide_id, name, self.ledger.reader.fields(slide_id))

    def write(self, slide_ids: Collection[str] | None = None) -> list[SlideSummary]:
        """Writes the tables of slides that have changed (None: all may have), and ``slides.csv``.

        Notes in the ledger that the tables are up to date, where none is held. Returns the rows of
        ``slides.csv``. Raises `UnavailableError` where the output folder cannot be written: the old tables
        are intact.
        """
        if self.manifest and (named := self.manifest.shapes):
            # What a later program needs that has another bundle, or none: `rbc-edge forget`.
            self.ledger.keep_note(_shapes_note(self.manifest.bundle_id), ",".join(named))
        names = self._file_names()
        if slide_ids is None:
            self._summaries.clear()
            # One query for all slides, however many files need nothing.
            for slide_id, fields in groupby(self.ledger.reader.all_fields(), key=attrgetter("slide_id")):
                self._write_slide(slide_id, names[slide_id], fields)
        for slide_id, name in names.items():
            if slide_id not in self._summaries or slide_id in (slide_ids or ()):
                self._write_slide(slide_id, name, self.ledger.reader.fields(slide_id))
        self.is_renamed, self._has_new_names = self._has_new_names, False
        if self.is_renamed:
            folders = (self.out, self.out / "cells", self.out / "shapes")
            for old in chain.from_iterable(old_files(folder, names, ".csv") for folder in folders):
                with _explained(old):
                    old.unlink()
        known = [self._summaries[slide_id] for slide_id in in_order(names)]
        known = [k for k in known if k[0].n_fov_ok or k[0].n_fov_failed]
        lines = chain(SLIDE_TABLE.lines([], self.form), (line for _, line in known))
        with self._holding(""):
            _write(self.out / "slides.csv", lines)
        self.ledger.keep_note(_EDGES_NOTE, self.edges)
        self.ledger.keep_note(_FORM_NOTE, self.form)
        if self.held:
            self.ledger.commit()  # the next run, too, knows that tables are out of date
        else:
            self.ledger.tables_written()
        return [summary for summary, _ in known]

    def look_again(self) -> None:
        """Forgets what was read, because another process has changed the ledger."""
        self._summaries.clear()

    def _file_names(self) -> dict[str, str]:
        slide_ids = self.ledger.reader.slide_ids()
        if slide_ids != list(self._names):  # for a thousand slides, names take longer than a table
            before, self._names = self._names, file_names(slide_ids)
            for slide_id, name in before.items():
                if self._names.get(slide_id) != name:
                    self._summaries.pop(slide_id, None)
                    self._has_new_names = True
        return self._names

    def _write_slide(self, slide_id: str, name: str, fields: Iterator[FieldRow]) -> None:
        """Writes the tables of a slide from its rows, and keeps its line of ``slides.csv``."""
        file_name = on_disk(f"{name}.csv")
        path, *others = (self.out / folder / file_name for folder in ("", "cells", "shapes"))
        cells_path, shapes_path = others
        sums = _Sums(self.edges)
        first = next(fields, None)
        known = fields if first is None else chain([first], fields)
        rows = (_Fov(row, row.counts.get(self.edges)) for row in sums.added(known))
        with self._holding(slide_id):
            if first is None:  # its images are in another slide now: an old table would count them twice
                for old in (path, *others):
                    with _explained(old):
                        old.unlink(missing_ok=True)
            else:
                _write(path, FIELD_TABLE.lines(rows, self.form))
                if self.cells or cells_path.exists():
                    cells = _cells(slide_id, _formed(self.ledger.reader, slide_id, sums.rows))
                    _write(cells_path, CELL_TABLE.lines(cells, self.form))
        for _ in rows:  # the rest, of a table that is held, for the sums
            pass
        summary = sums.summary(slide_id)
        summary = _with_forms(summary, self.ledger.reader, sums.rows)
        if slide_id not in self.held and (shapes_path.exists() or (self.cells and summary.forms.lines)):
            with self._holding(slide_id):
                lines = (_Shape(_text(slide_id), line) for line in summary.forms.lines)
                _write(shapes_path, SHAPE_TABLE.lines(lines, self.form))
        _, line = SLIDE_TABLE.lines([summary], self.form)
        self._summaries[slide_id] = summary, line

    @contextmanager
    def _holding(self, slide_id: str) -> Iterator[None]:
        """Notes that a table of a slide is held, or that none is."""
        try:
            yield
            self.held.pop(slide_id, None)
        except HeldError as error:
            self.held[slide_id] = str(error)


def known_shapes(reader: Reader, bundle_id: str) -> tuple[Shape, ...]:
    """Returns the shapes that a bundle names, where it counted and they were noted."""
    return shapes.kept(reader.note(_shapes_note(bundle_id)))


def _shapes_note(bundle_id: str) -> str:
    return f"shapes of {bundle_id.partition('+')[0]}"


def form_of(reader: Reader) -> CsvForm:
    """Returns the form of the tables of a ledger. Plain, where the note of it is damaged."""
    with suppress(ValueError):
        return CsvForm(reader.note(_FORM_NOTE) or CsvForm.PLAIN)
    return CsvForm.PLAIN


def edges_of(reader: Reader) -> EdgeRule | None:
    """Returns the edge rule of the tables of a ledger. None: there are none, or the note of it is damaged."""
    if note := reader.note(_EDGES_NOTE):
        with suppress(ValueError):
            return EdgeRule(note)
        log.warning(
            "the edge rule of the tables is damaged in the ledger; run again with the --edges you want"
        )
    return None


def summarize(
    slide_id: str, fields: Iterable[FieldRow], edges: EdgeRule, *, forms_of: Reader | None = None
) -> SlideSummary:
    """Sums up a slide's fields under an edge rule, with the forms of its cells where they are read."""
    sums = _Sums(edges)
    for _ in sums.added(fields):
        pass
    summary = sums.summary(slide_id)
    return _with_forms(summary, forms_of, sums.rows) if forms_of else summary


def _with_forms(summary: SlideSummary, reader: Reader, counted: Mapping[str, FieldRow]) -> SlideSummary:
    named = {shape for b in summary.bundle_ids for shape in known_shapes(reader, b)}
    formed = _formed(reader, summary.slide_id, counted)
    return replace(summary, forms=shapes.of_slide(((row, of.kept) for row, of in formed), named))


def _formed(
    reader: Reader, slide_id: str, counted: Mapping[str, FieldRow]
) -> Iterator[tuple[FieldRow, Corrected]]:
    """Yields the cells of fields of a slide that count, by their names."""
    for fov, of in reader.corrected(slide_id):
        if row := counted.get(fov):
            yield row, of


def shown_fields(fields: Iterable[FieldRow], edges: EdgeRule) -> Iterator[dict[str, Value]]:
    """Yields what the table of a slide shows of its fields (`Table.values`)."""
    return (FIELD_TABLE.values(_Fov(row, row.counts.get(edges))) for row in fields)


def shown_cells(slide_id: str, reader: Reader) -> Iterator[dict[str, Value]]:
    """Yields what the table of cells shows of a slide (`Table.values`)."""
    counted = {row.fov: row for row in reader.fields(slide_id) if row.status is Status.OK}
    return map(CELL_TABLE.values, _cells(slide_id, _formed(reader, slide_id, counted)))


def shown_shapes(summary: SlideSummary) -> Iterator[dict[str, Value]]:
    """Yields what the table of shapes shows of a slide (`Table.values`)."""
    return (SHAPE_TABLE.values(_Shape(_text(summary.slide_id), line)) for line in summary.forms.lines)


@dataclass(slots=True)
class _Sums:
    """Sums up a slide's fields while they pass by on their way into a table."""

    edges: EdgeRule
    n_failed: int = 0
    rows: dict[str, FieldRow] = field(default_factory=dict)  # those that count
    n_corrected: int = 0
    ok: list[tuple[Counts, str, str, tuple[str, ...]]] = field(default_factory=list)

    def added(self, fields: Iterable[FieldRow]) -> Iterator[FieldRow]:
        """Yields the rows, and adds each."""
        for row in fields:
            self.n_failed += row.status is Status.FAILED
            self.n_corrected += row.n_corrected
            if row.status is Status.OK:
                self.rows[row.fov] = row
                counts = row.counts[self.edges]
                self.ok.append((counts, row.version.bundle_id, row.captured_at, row.quality_flags))
            yield row

    def summary(self, slide_id: str) -> SlideSummary:
        """Returns the sums of the rows so far."""
        ok = self.ok
        captured = [when for _, _, when, _ in ok if when]
        flags = Counter(chain.from_iterable(each for *_, each in ok)).most_common()
        cells = np.array([astuple(counts) for counts, *_ in ok], np.int64).reshape(len(ok), 4)
        n_overlapping, n_rbc = cells[:, 1], cells[:, 0] + cells[:, 1]
        return SlideSummary(
            slide_id=slide_id,
            n_fov_ok=len(ok),
            n_fov_failed=self.n_failed,
            counts=Counts(*cells.sum(axis=0).tolist()) if ok else None,
            overlap_interval=overlap_interval(n_overlapping, n_rbc),
            n_rbc_per_fov_mean=float(n_rbc.mean()) if ok else None,
            n_rbc_per_fov_sd=float(n_rbc.std(ddof=1)) if len(ok) > 1 else None,
            n_rbc_per_fov_interval=mean_interval(n_rbc),
            first_captured_at=min(captured, default=""),
            last_captured_at=max(captured, default=""),
            bundle_ids=tuple(sorted({bundle_id for _, bundle_id, *_ in ok})),
            n_corrected=self.n_corrected,
            n_fov_more=fields_needed(n_overlapping, n_rbc),
            flags={flag: n for flag, n in flags if flag not in NOTES},
            n_fov_flagged=sum(bool(warnings(each)) for *_, each in ok),
            notes={flag: n for flag, n in flags if flag in NOTES},
        )


def _write(path: Path, lines: Iterator[bytes]) -> None:
    """Brings a table up to date. Both versions are read as streams, so memory stays small."""
    with _explained(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("rb") if path.is_file() else BytesIO() as old:  # a pipe of that name would block
            n_same, line = _compare(old, lines)
            if line is None:
                return
            old.seek(0)
            with replacing(path, durable=True) as new:
                for start in range(0, n_same, _BLOCK_BYTES):
                    new.write(old.read(min(_BLOCK_BYTES, n_same - start)))
                new.writelines(chain([line], lines))


def _compare(old: BinaryIO, lines: Iterator[bytes]) -> tuple[int, bytes | None]:
    """Returns how many bytes of the old table stay, and the first new line that differs.

    The line is None when nothing differs, and empty when the old table is only longer.
    """
    n_same = 0
    for line in lines:
        if old.read(len(line)) != line:
            return n_same, line
        n_same += len(line)
    return n_same, b"" if old.read(1) else None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{path_text(path.parent)}: cannot write {path_text(path.name)}: {error.strerror}"
        advice = "check the permissions of the output folder; the counts are kept in the ledger"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free space and run again: the counts are kept in the ledger"
        elif error.errno == errno.EIO:
            advice = f"{BROKEN_DISK}; the counts are kept in the ledger"
        if error.errno in _HELD and _takes_files(path.parent):
            advice = "close the program that has it open; the counts are kept in the ledger"
            raise HeldError(message, advice) from error
        raise UnavailableError(message, advice) from error


def _takes_files(folder: Path) -> bool:
    with suppress(OSError), TemporaryFile(dir=folder):
        return True
    return False

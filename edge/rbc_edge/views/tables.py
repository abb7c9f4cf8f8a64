"""The CSV files. They show the ledger and can always be written again.

To add a column, add its line to `FIELD_TABLE`, `SLIDE_TABLE` or `CELL_TABLE`. Header, rows and
``docs/tables.md`` (``python docs/make_tables.py``) follow from these three declarations.

UTF-8, comma, RFC 4180 quoting, LF, one line for each row, stable order. An unknown value is empty, never 0.
"""

import csv
import errno
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, astuple, dataclass, field
from io import BytesIO, StringIO
from itertools import chain, compress, groupby
from math import isnan
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Final, Generic, NamedTuple, TypeVar

import numpy as np

from rbc_edge.errors import BROKEN_DISK, UnavailableError
from rbc_edge.store.corrections import Corrected
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import replacing
from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.text import path_text
from rbc_edge.values import Counts, Scale
from rbc_edge.views.names import file_names, on_disk
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.quality import NOTES, warnings
from rbc_edge.vision.statistics import fields_needed, overlap_interval, says_little

SCHEMA: Final = "2"
EDGES_NOTE: Final = "edges"  # name of the note in the ledger that keeps the edge rule of the tables
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
    first_captured_at: str  # ISO 8601, or empty when no file says it
    last_captured_at: str
    bundle_ids: tuple[str, ...]  # the bundles that counted, sorted
    n_corrected: int  # cells that a person corrected, added or took out
    # The others are no columns.
    n_fov_more: int | None = None  # more fields for an interval of ±2 points. None without red cells.
    flags: Mapping[str, int] = field(default_factory=dict)  # fields with each flag, the most frequent first
    n_fov_flagged: int = 0  # fields with at least one flag
    notes: Mapping[str, int] = field(default_factory=dict)  # the same of flags that only inform

    @property
    def too_few_fields(self) -> bool:
        """The overlap interval is so wide that it says little, or there is none."""
        return says_little(self.overlap_interval)

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

    def lines(self, rows: Iterable[_Row]) -> Iterator[bytes]:
        """Returns the header and a line for each row."""
        buffer = StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        for cells in chain([self.names], ([text(row) for text in self._texts] for row in rows)):
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


def _end(summary: SlideSummary, i: int) -> str:
    return _number(summary.overlap_interval and summary.overlap_interval[i], 4)


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


def _cells(slide_id: str, fields: Iterable[tuple[str, Corrected]]) -> Iterator[_Cell]:
    slide = _text(slide_id)
    for fov, of in fields:
        cells = of.cells
        name, found, numbers = _text(fov), cells.detections, range(len(cells))
        labels = zip(map(of.label, numbers), map(of.model_label, numbers), strict=True)
        columns = (found.xyxy, found.score, cells.overlap_score, cells.group, cells.touches_edge)
        for i, (both, *values) in enumerate(zip(labels, *(c.tolist() for c in columns), strict=True), 1):
            yield _Cell(slide, name, i, *both, *values)


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
    ("overlap_low", lambda s: _end(s, 0), "lower end of the 95 % interval of this share"),
    ("overlap_high", lambda s: _end(s, 1), "upper end of this interval"),
    ("n_wbc", lambda s: _count(s.counts, "n_wbc"), "white cells"),
    ("n_platelets", lambda s: _count(s.counts, "n_platelets"), "platelets"),
    ("n_corrected", lambda s: str(s.n_corrected), "cells that a person corrected, added or took out"),
    ("n_rbc_per_fov_mean", lambda s: _number(s.n_rbc_per_fov_mean, 2), "red cells in a field: mean"),
    ("n_rbc_per_fov_sd", lambda s: _number(s.n_rbc_per_fov_sd, 2), "their standard deviation between fields"),
    ("first_captured_at", lambda s: _text(s.first_captured_at), "when the first image was taken"),
    ("last_captured_at", lambda s: _text(s.last_captured_at), "when the last image was taken"),
    ("bundle_id", lambda s: "+".join(s.bundle_ids), "the bundle that counted. Several are joined with `+`"),
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
)


# -- the files ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Tables:
    """Writes the CSV files of one output folder, with counts under one edge rule.

    A file is replaced completely or not at all. It is not touched when its content stays the same.
    ``cells/<slide>.csv`` is written where `cells` is true. Existing ones are always kept up to date. A table
    that another program holds stays as it is, until a later `write` can replace it: see `held`.
    """

    out: Path
    ledger: Ledger
    _: KW_ONLY
    edges: EdgeRule = EdgeRule.ALL
    cells: bool = False
    held: dict[str, str] = field(default_factory=dict, init=False)  # what waits, by slide; "": slides.csv
    _summaries: dict[str, tuple[SlideSummary, bytes]] = field(default_factory=dict, init=False)
    _names: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for folder in (self.out, self.out / "cells"):
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
        names = self._file_names()
        if slide_ids is None:
            self._summaries.clear()
            # One query for all slides, however many files need nothing.
            for slide_id, fields in groupby(self.ledger.reader.all_fields(), key=attrgetter("slide_id")):
                self._write_slide(slide_id, names[slide_id], fields)
        for slide_id, name in names.items():
            if slide_id not in self._summaries or slide_id in (slide_ids or ()):
                self._write_slide(slide_id, name, self.ledger.reader.fields(slide_id))
        known = [self._summaries[slide_id] for slide_id in sorted(names)]
        known = [k for k in known if k[0].n_fov_ok or k[0].n_fov_failed]
        with self._holding(""):
            _write(self.out / "slides.csv", chain(SLIDE_TABLE.lines([]), (line for _, line in known)))
        self.ledger.keep_note(EDGES_NOTE, self.edges)
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
            self._names = file_names(slide_ids)
        return self._names

    def _write_slide(self, slide_id: str, name: str, fields: Iterator[FieldRow]) -> None:
        """Writes the tables of a slide from its rows, and keeps its line of ``slides.csv``."""
        file_name = on_disk(f"{name}.csv")
        path, cells_path = self.out / file_name, self.out / "cells" / file_name
        sums = _Sums(self.edges)
        first = next(fields, None)
        known = fields if first is None else chain([first], fields)
        rows = (_Fov(row, row.counts.get(self.edges)) for row in sums.added(known))
        with self._holding(slide_id):
            if first is None:  # its images are in another slide now: an old table would count them twice
                for old in (path, cells_path):
                    with _explained(old):
                        old.unlink(missing_ok=True)
            else:
                _write(path, FIELD_TABLE.lines(rows))
                if self.cells or cells_path.exists():
                    _write(
                        cells_path, CELL_TABLE.lines(_cells(slide_id, self.ledger.reader.corrected(slide_id)))
                    )
        for _ in rows:  # the rest, of a table that is held, for the sums
            pass
        summary = sums.summary(slide_id)
        _, line = SLIDE_TABLE.lines([summary])
        self._summaries[slide_id] = summary, line

    @contextmanager
    def _holding(self, slide_id: str) -> Iterator[None]:
        """Notes that a table of a slide is held, or that none is."""
        try:
            yield
            self.held.pop(slide_id, None)
        except HeldError as error:
            self.held[slide_id] = str(error)


def summarize(slide_id: str, fields: Iterable[FieldRow], edges: EdgeRule) -> SlideSummary:
    """Sums up a slide's fields of view under an edge rule."""
    sums = _Sums(edges)
    for _ in sums.added(fields):
        pass
    return sums.summary(slide_id)


@dataclass(slots=True)
class _Sums:
    """Sums up a slide's fields while they pass by on their way into a table."""

    edges: EdgeRule
    n_failed: int = 0
    n_corrected: int = 0
    ok: list[tuple[Counts, str, str, tuple[str, ...]]] = field(default_factory=list)

    def added(self, fields: Iterable[FieldRow]) -> Iterator[FieldRow]:
        """Yields the rows, and adds each."""
        for row in fields:
            self.n_failed += row.status is Status.FAILED
            self.n_corrected += row.n_corrected
            if row.status is Status.OK:
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

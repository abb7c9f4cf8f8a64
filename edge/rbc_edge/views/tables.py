"""The CSV files: a view of the ledger that can always be written again (design, section 5).

UTF-8, comma, RFC 4180 quoting, LF, one line a row, stable order. What is not known is empty, never 0.
"""

import csv
import errno
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from math import isnan
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from rbc_edge.errors import UnavailableError
from rbc_edge.store.ledger import FieldRow, Ledger, Status
from rbc_edge.text import path_text
from rbc_edge.values import Cells, Counts
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.statistics import fields_needed, overlap_interval, says_little

SCHEMA: Final = "1"
EDGES_NOTE: Final = "edges"
"""Name of the note, in the ledger, of the edge rule that the tables were written under."""

FIELD_COLUMNS: Final = (
    *("schema", "slide_id", "fov", "path", "sha256", "status", "failure", "width_px", "height_px"),
    *("cell_diameter_px", "scale_source", "n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc"),
    *("n_platelets", "overlap_fraction", "quality_flags", "captured_at", "analyzed_at", "bundle_id"),
    "elapsed_ms",
)
SLIDE_COLUMNS: Final = (
    *("schema", "slide_id", "n_fov_ok", "n_fov_failed", "n_rbc", "n_rbc_single", "n_rbc_overlapping"),
    *("overlap_fraction", "overlap_low", "overlap_high", "n_wbc", "n_platelets", "n_rbc_per_fov_mean"),
    *("n_rbc_per_fov_sd", "first_captured_at", "last_captured_at", "bundle_id"),
)
CELL_COLUMNS: Final = (
    *("schema", "slide_id", "fov", "cell", "label", "x_min_px", "y_min_px", "x_max_px", "y_max_px"),
    *("det_score", "overlap_score", "group", "touches_edge"),
)

_RESERVED: Final = frozenset({"slides"})
_LONGEST_NAME_BYTES: Final = 120  # leaves room for prefix, hash and suffix below every file system's 255
_SIDES: Final = ("left", "top", "right", "bottom")


@dataclass(frozen=True, slots=True)
class SlideSummary:
    """A row of ``slides.csv``.

    Attributes:
        slide_id: The slide.
        n_fov_ok: Fields of view counted; duplicates are not among them.
        n_fov_failed: Fields of view that could not be counted.
        counts: Cells of all fields, under the edge rule.
        overlap_interval: 95 % interval of the overlap fraction over fields, 0..1; None without red cells.
        n_rbc_per_fov_mean: Red cells per field of view; None without a field.
        n_rbc_per_fov_sd: Their sample standard deviation; None with less than two fields.
        first_captured_at: ISO 8601, or empty when no file says.
        last_captured_at: ISO 8601, or empty when no file says.
        bundle_ids: The bundles that counted, sorted.
        n_fov_more: How many more fields would make the overlap fraction sure to 2 percentage points either
            way; None without red cells. Not a column.
        flags: How many fields raise each quality flag, the most frequent first. Not a column.
        n_fov_flagged: Fields that raise any. Not a column.
    """

    slide_id: str
    n_fov_ok: int
    n_fov_failed: int
    counts: Counts | None
    overlap_interval: tuple[float, float] | None
    n_rbc_per_fov_mean: float | None
    n_rbc_per_fov_sd: float | None
    first_captured_at: str
    last_captured_at: str
    bundle_ids: tuple[str, ...]
    n_fov_more: int | None = None
    flags: Mapping[str, int] = field(default_factory=dict)
    n_fov_flagged: int = 0

    @property
    def too_few_fields(self) -> bool:
        """The overlap interval is so wide that it says little, or there is none."""
        return says_little(self.overlap_interval)

    @property
    def contradicts_scale(self) -> bool:
        """In most fields the cells do not have the size that the given scale says."""
        return self.flags.get("scale-mismatch", 0) > self.n_fov_ok / 2


class Tables:
    """Writes the CSV files of one output folder.

    A file is replaced whole or not at all, and is not touched when its content would not change.

    Args:
        out: The output folder.
        ledger: The ledger to show.
        edges: Edge rule of the counts. A view: another rule needs no new analysis.
        cells: Also write ``cells/<slide>.csv``. Those that exist are kept up to date in any case.
    """

    def __init__(
        self, out: Path, ledger: Ledger, *, edges: EdgeRule = EdgeRule.ALL, cells: bool = False
    ) -> None:
        self._out = out
        self._ledger = ledger
        self._edges = edges
        self._cells = cells
        self._summaries: dict[str, tuple[SlideSummary, bytes]] = {}  # and their line of slides.csv
        self._names: dict[str, str] = {}
        for folder in (out, out / "cells"):
            for left_over in folder.glob(".*.csv.tmp"):  # of a process that was killed while writing
                with suppress(OSError):
                    left_over.unlink()

    def summary(self, slide_id: str) -> SlideSummary:
        """Returns a slide's row of ``slides.csv``, from the ledger."""
        return summarize(slide_id, self._ledger.fields(slide_id), self._edges)

    def write_slide(self, slide_id: str) -> None:
        """Writes one slide's tables.

        Raises:
            UnavailableError: The output folder cannot be written; the table of before is intact.
        """
        name = self._file_names().get(slide_id)
        if name is not None:  # else nothing of it is in the ledger yet
            self._write_slide(slide_id, name)

    def write(self, slide_ids: Collection[str] | None = None) -> list[SlideSummary]:
        """Writes every table, and notes in the ledger that they are up to date.

        Args:
            slide_ids: The slides that have changed since; None: any may have.

        Returns:
            The rows of ``slides.csv``.

        Raises:
            UnavailableError: The output folder cannot be written; the tables of before are intact.
        """
        if slide_ids is None:
            self._summaries.clear()
        names = self._file_names()
        for slide_id, name in names.items():
            if slide_ids is None or slide_id in slide_ids:
                self._write_slide(slide_id, name)
            if slide_id not in self._summaries or slide_id in (slide_ids or ()):
                summary = self.summary(slide_id)
                self._summaries[slide_id] = summary, next(_lines([_slide_row(summary)]))
        known = [self._summaries[slide_id] for slide_id in sorted(names)]
        known = [k for k in known if k[0].n_fov_ok or k[0].n_fov_failed]
        _write(self._out / "slides.csv", chain(_lines([SLIDE_COLUMNS]), (line for _, line in known)))
        self._ledger.keep_note(EDGES_NOTE, self._edges)
        self._ledger.tables_written()
        return [summary for summary, _ in known]

    def look_again(self) -> None:
        """Forgets what was read: somebody else changed the ledger."""
        self._summaries.clear()

    def _file_names(self) -> dict[str, str]:
        slide_ids = self._ledger.slide_ids()
        if slide_ids != list(self._names):  # of a thousand slides it takes longer than the table of one
            self._names = file_names(slide_ids)
        return self._names

    def _write_slide(self, slide_id: str, name: str) -> None:
        file_name = os.fsdecode(f"{name}.csv".encode())  # UTF-8 on disk, whatever the locale
        path, cells_path = self._out / file_name, self._out / "cells" / file_name
        fields = self._ledger.fields(slide_id)
        first = next(fields, None)
        if (
            first is None
        ):  # its images belong to another slide now: a table left behind would count them twice
            _remove(path)
            _remove(cells_path)
            return
        rows = (_field_row(row, self._edges) for row in chain([first], fields))
        _write(path, _lines(chain([FIELD_COLUMNS], rows)))
        if self._cells or cells_path.exists():
            cells = _cell_rows(slide_id, self._ledger.cells(slide_id))
            _write(cells_path, _lines(chain([CELL_COLUMNS], cells)))


def summarize(slide_id: str, fields: Iterable[FieldRow], edges: EdgeRule) -> SlideSummary:
    """Sums up a slide's fields of view under an edge rule."""
    ok: list[Counts] = []
    n_failed = 0
    captured: list[str] = []
    bundle_ids: set[str] = set()
    flags: Counter[str] = Counter()
    n_flagged = 0
    for row in fields:
        n_failed += row.status is Status.FAILED
        if row.status is Status.OK:
            ok.append(row.counts[edges])
            bundle_ids.add(row.version.bundle_id)
            flags.update(row.quality_flags)
            n_flagged += bool(row.quality_flags)
            if row.captured_at:
                captured.append(row.captured_at)
    n_rbc = np.array([c.n_rbc for c in ok], np.int64)
    n_overlapping = np.array([c.n_rbc_overlapping for c in ok], np.int64)
    return SlideSummary(
        slide_id=slide_id,
        n_fov_ok=len(ok),
        n_fov_failed=n_failed,
        counts=Counts(
            n_rbc_single=sum(c.n_rbc_single for c in ok),
            n_rbc_overlapping=sum(c.n_rbc_overlapping for c in ok),
            n_wbc=sum(c.n_wbc for c in ok),
            n_platelets=sum(c.n_platelets for c in ok),
        )
        if ok
        else None,
        overlap_interval=overlap_interval(n_overlapping, n_rbc),
        n_rbc_per_fov_mean=float(n_rbc.mean()) if ok else None,
        n_rbc_per_fov_sd=float(n_rbc.std(ddof=1)) if len(ok) > 1 else None,
        first_captured_at=min(captured, default=""),
        last_captured_at=max(captured, default=""),
        bundle_ids=tuple(sorted(bundle_ids)),
        n_fov_more=fields_needed(n_overlapping, n_rbc),
        flags=dict(flags.most_common()),
        n_fov_flagged=n_flagged,
    )


def file_names(slide_ids: Sequence[str]) -> dict[str, str]:
    """Gives each slide a file name (without suffix) that every file system takes, no two alike.

    Names go by order of first sight, so that a slide keeps its name when others come.

    Args:
        slide_ids: Slides in order of first sight.

    Returns:
        File name by slide; one that is too long, reserved, or differs from an earlier one only by case or
        by characters that a file name cannot have, ends in a hash of the slide_id.
    """
    names: dict[str, str] = {}
    taken = set(_RESERVED)
    for slide_id in slide_ids:
        name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", slide_id)
        name = re.sub(r"^[.\-~]+|[. ]+$", "_", name) or "_"
        digest = hashlib.sha256(slide_id.encode()).hexdigest()
        length = 8
        short = name
        if len(name.encode()) > _LONGEST_NAME_BYTES:
            short = name.encode()[:_LONGEST_NAME_BYTES].decode("utf-8", "ignore")
            name = f"{short}-{digest[:length]}"
        while _folded(name) in taken:
            name = f"{short}-{digest[:length]}"
            length += 8
        taken.add(_folded(name))
        names[slide_id] = name
    return names


def _folded(name: str) -> str:
    """What a file system that knows no case, and one that composes accents, take `name` for."""
    return unicodedata.normalize("NFC", name).casefold()


# -- rows -----------------------------------------------------------------------------------------------


def _field_row(row: FieldRow, edges: EdgeRule) -> Iterator[str]:
    counts = row.counts.get(edges)
    yield from (SCHEMA, _text(row.slide_id), _text(row.fov), _text(path_text(row.path)), row.sha256)
    yield from (row.status, row.failure, _number(row.width_px), _number(row.height_px))
    yield _number(row.scale.cell_diameter_px if row.scale else None, 2)
    yield row.scale.source if row.scale else ""
    yield from _counts(counts)
    yield _number(counts.overlap_fraction if counts else None, 4)
    yield from (_text(";".join(row.quality_flags)), _text(row.captured_at), row.analyzed_at)
    yield from (row.version.bundle_id, _number(row.elapsed_ms, 1))


def _slide_row(slide: SlideSummary) -> Iterator[str]:
    low, high = slide.overlap_interval or (None, None)
    counts = list(_counts(slide.counts))
    yield from (SCHEMA, _text(slide.slide_id), str(slide.n_fov_ok), str(slide.n_fov_failed), *counts[:3])
    yield _number(slide.counts.overlap_fraction if slide.counts else None, 4)
    yield from (_number(low, 4), _number(high, 4), *counts[3:])
    yield from (_number(slide.n_rbc_per_fov_mean, 2), _number(slide.n_rbc_per_fov_sd, 2))
    yield from (_text(slide.first_captured_at), _text(slide.last_captured_at), "+".join(slide.bundle_ids))


def _cell_rows(slide_id: str, fields: Iterable[tuple[str, Cells]]) -> Iterator[Iterable[str]]:
    slide = _text(slide_id)
    for fov, cells in fields:
        name = _text(fov)
        boxes, scores = cells.detections.xyxy.tolist(), cells.detections.score.tolist()
        overlap_scores, groups = cells.overlap_score.tolist(), cells.group.tolist()
        edges = cells.touches_edge.tolist()
        for i in range(len(cells)):
            yield (
                *(SCHEMA, slide, name, str(i + 1), cells.label(i)),
                *(_number(v, 1) for v in boxes[i]),
                *(_number(scores[i], 4), _number(overlap_scores[i], 4)),
                str(groups[i]) if groups[i] else "",
                "+".join(side for side, touched in zip(_SIDES, edges[i], strict=True) if touched),
            )


def _counts(counts: Counts | None) -> Iterator[str]:
    if counts is None:
        yield from [""] * 5
    else:
        yield from map(str, (counts.n_rbc, counts.n_rbc_single, counts.n_rbc_overlapping))
        yield from map(str, (counts.n_wbc, counts.n_platelets))


def _number(value: float | None, decimals: int = 0) -> str:
    """Formats a number; empty when unknown (None or NaN)."""
    if value is None or isnan(value):
        return ""
    return f"{value:.{decimals}f}"


def _text(value: str) -> str:
    """Makes a name safe in a cell: one line, and nothing that a spreadsheet would run as a formula."""
    value = "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c
        for c in value
    )
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value


# -- files ----------------------------------------------------------------------------------------------


def _lines(rows: Iterable[Iterable[str]]) -> Iterator[bytes]:
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow(row)
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()


def _write(path: Path, lines: Iterator[bytes]) -> None:
    """Brings a table up to date: untouched when nothing changes, else replaced whole and for good."""
    temporary = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(exist_ok=True)
        old: BinaryIO | None = None
        with suppress(FileNotFoundError):
            old = path.open("rb")
        try:
            n_same, differing = _compare(old, lines)
            if differing is None:
                return
            try:
                with temporary.open("wb") as new:
                    if old is not None:
                        old.seek(0)
                        _copy(old, new, n_same)
                    new.writelines(chain([differing], lines))
                    new.flush()
                    os.fsync(new.fileno())
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        finally:
            if old is not None:
                old.close()
        _sync_folder(path.parent)
    except OSError as error:
        raise _unavailable(path, error) from error


def _compare(old: BinaryIO | None, lines: Iterator[bytes]) -> tuple[int, bytes | None]:
    """Reads along the old table; returns how many bytes are the same and the first new line that is not.

    The line is None when nothing differs, and empty when the old table only has more at its end.
    """
    n_same = 0
    for line in lines:
        if old is None or old.read(len(line)) != line:
            return n_same, line
        n_same += len(line)
    return n_same, None if old is not None and not old.read(1) else b""


def _copy(old: BinaryIO, new: BinaryIO, n_bytes: int) -> None:
    while n_bytes:
        block = old.read(min(n_bytes, 1 << 20))
        new.write(block)
        n_bytes -= len(block)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _unavailable(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _unavailable(path: Path, error: OSError) -> UnavailableError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return UnavailableError(
        f"{path_text(path.parent)}: cannot write {path_text(path.name)}: {error.strerror}",
        "free space and run again: the counts are kept in the ledger"
        if full
        else "check the permissions of the output folder; the counts are kept in the ledger",
    )

"""What the ledger takes and gives: looks at files, rows, plans; and how cells and counts are packed."""

import os
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isnan, nan
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from rbc_edge.store.schema import DamagedError
from rbc_edge.text import one_line
from rbc_edge.values import (
    SHAPES,
    Cells,
    Counts,
    Detections,
    FovResult,
    InboxFile,
    Morphology,
    Scale,
    ScaleSource,
)
from rbc_edge.vision.counting import EdgeRule, count

_PLAIN: Final = (
    *("fov", "size_bytes", "mtime_ns", "sha256", "failure", "message", "width_px", "height_px"),
    *("captured_at", "analyzed_at", "elapsed_ms", "n_refused"),
)
_COLUMNS: Final = (
    *(*_PLAIN, "path", "status", "cell_diameter_px", "scale_source", "quality_flags"),
    *("bundle_id", "settings", "counts"),
)
# What the checksum of a row is made of: all but what only asks for another look. Append only, and only what
# is NULL in the rows of before.
_CHECKED: Final = ("slide_id", *(name for name in _COLUMNS if name not in ("mtime_ns", "settings")))
_checked_of: Final = itemgetter(*_CHECKED)
# The decision of a person about a row of ``field``, and what is true where there is one.
CONTENT: Final = "CASE field.sha256 WHEN '' THEN 'fov:' || field.fov ELSE field.sha256 END"
DECISION: Final = (
    f"LEFT JOIN decision ON decision.slide_key = field.slide_key AND decision.content = {CONTENT}"
)
IS_SHOWN: Final = "decision.kind IS NOT 'forgotten'"
SHOWN_STATUS: Final = "coalesce(decision.kind, field.status)"
# What `field_row` reads: of ``field JOIN slide``, and with the decisions of a person (`DECISION`).
_UNDECIDED: Final = "'' AS reason, NULL AS decided"
FIELD_COLUMNS: Final = ", ".join(
    ("slide_id", *(f"field.{name}" for name in _COLUMNS), "field.checksum", _UNDECIDED)
)
# Failures that are none: pictures of a field, which is counted by another image. Their status is duplicate.
OTHER_FORMAT: Final = "other-format"
NO_FIELDS: Final = ("overlay", "copy", OTHER_FORMAT)
ESTIMATED: Final = "estimated"  # settings of a version without a given scale
# What `given_of` reads of ``slide``.
GIVEN_COLUMNS: Final = "given_checksum, given_diameter_px, given_source, given_by_run"
SHOWN_COLUMNS: Final = FIELD_COLUMNS.replace(_UNDECIDED, "coalesce(decision.reason, ''), decision.kind")
_FLAG_SEPARATOR: Final = ";"
_PAGE: Final = b"\0"  # between a path and the number of a page: no path has it
_AFTER_PAGES: Final = b"\1"
_RULES: Final = (EdgeRule.ALL, EdgeRule.TWO_SIDES, EdgeRule.INSIDE)  # the order of `counts`; append only
_CELL: Final = np.dtype(
    [
        ("xyxy", "<f4", (4,)),
        ("score", "<f4"),
        ("overlap_score", "<f4"),
        ("group", "<i4"),
        ("class_id", "u1"),
        ("overlapping", "u1"),
        ("edges", "u1"),  # bits: left 1, top 2, right 4, bottom 8
    ]
)
_MEASURES: Final = ("shape_score", "area_px", "aspect_ratio", "circularity", "pallor")
_MORPHOLOGY: Final = np.dtype([("shape", "i1"), ("shape_sure", "u1"), *((name, "<f4") for name in _MEASURES)])
_EDGE_BITS: Final = np.array([1, 2, 4, 8], np.uint8)


class RowError(DamagedError):
    """The row of a field is damaged. The rest of the ledger may be whole: see `recovery.mend`."""

    def __init__(self, slide_id: str, fov: str = "") -> None:
        what = one_line(f"slide {slide_id}: the ledger's row of {fov or 'the slide'} is damaged")
        super().__init__(what, "`rbc-edge run` or the service repairs it, or counts the image again")


class Status(StrEnum):
    """What became of a field of view (column ``status``)."""

    OK = "ok"
    FAILED = "failed"
    DUPLICATE = "duplicate"  # the same content is counted under another name of the slide, or `NO_FIELDS`
    EXCLUDED = "excluded"  # a person took its content out of the counts; the row stays
    FORGOTTEN = "forgotten"  # a person took it out of the results; no table has it


@dataclass(frozen=True, slots=True)
class Version:
    """What a count depends on besides the image."""

    bundle_id: str  # the bundle that counted
    settings: str  # fingerprint of settings that change a count: not of the edge rule, it changes only tables

    @classmethod
    def of(cls, bundle_id: str, given: Scale | None) -> Self:
        """Returns the version of counts at a scale that was given. None: it is estimated."""
        return cls(bundle_id, f"{given.source}={given.cell_diameter_px!r}" if given else ESTIMATED)


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at one file gave: its cells, or why not. The pixels are not kept."""

    file: InboxFile  # as the scan saw it
    sha256: str = ""  # hex digest of its content; empty when it could not be read
    captured_at: str = ""  # ISO 8601, or empty when the file does not say
    result: FovResult | None = None  # None with no failure: not analyzed, because its content is known
    failure: str = ""  # short word for why it failed
    message: str = ""  # the same in words
    elapsed_ms: float = 0.0  # reading included


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One field of view as the ledger knows it, without its cells."""

    slide_id: str
    fov: str  # its name within the slide
    path: Path  # where the file was last seen
    size_bytes: int
    mtime_ns: int  # -1: the file is looked at again
    sha256: str  # hex digest of the content; empty when it could not be read
    status: Status
    failure: str  # short word for why it failed, else empty
    message: str  # the same in words
    width_px: int | None  # None unless ok, as the next two
    height_px: int | None
    scale: Scale | None
    quality_flags: tuple[str, ...]
    captured_at: str  # ISO 8601, or empty when the file does not say
    analyzed_at: str  # ISO 8601, UTC
    version: Version
    elapsed_ms: float  # reading included
    counts: dict[EdgeRule, Counts]  # empty unless ok
    n_refused: int | None  # boxes that hold no single red cell. None unless ok, and by a version without them
    reason: str = ""  # why a person excluded it
    page: int = 0  # as of `InboxFile`
    n_pages: int = 1
    # From here on: what a person said of its cells (`store.corrections`). The counts above are with it.
    n_corrected: int = 0  # cells
    n_lost: int = 0  # corrections that find no cell
    reviewed_by: str = ""  # who looked at it whole and accepted it
    corrections: int = 0  # another number when the corrections are others. 0: there is none


@dataclass(frozen=True, slots=True)
class Recorded:
    """What `Ledger.record` made of a look."""

    row: FieldRow  # what the ledger now says
    is_new: bool  # counted, or failed, now; an image that was renamed or touched is not new
    left: frozenset[str] = frozenset()  # slides that lost a row to this file
    is_unsettling: bool = False  # other rows of the slide may need another look
    moved_from: str = ""  # the slide where its content was
    is_renamed: bool = False  # its count came along, from there or from another name


@dataclass(frozen=True, slots=True)
class Attempt:
    """How often an image was begun and never recorded."""

    n: int  # by how many processes that are gone
    n_sandbox: int = 0  # in how many sandbox runs, in a row, of which no end is known


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done about files."""

    done: Mapping[InboxFile, Status]  # need no look
    to_do: tuple[InboxFile, ...]  # need one; in the order given
    interrupted: Mapping[InboxFile, Attempt]  # were being counted when a process died
    waiting: Collection[InboxFile] = ()  # are left for later


@dataclass(frozen=True, slots=True)
class SlideScale:
    """The scale estimated for a slide."""

    scale: Scale
    bundle_id: str  # the bundle that estimated it
    n_fields: int | None  # fields of view it was estimated from; None: by a version that did not say


@dataclass(frozen=True, slots=True)
class Tally:
    """The ledger in a few numbers."""

    n_ok: int  # fields of view
    n_failed: int
    n_duplicates: int
    n_slides: int  # with a field of view
    newest_analyzed_at: str  # when the newest row was written, ISO 8601, UTC; empty without a row
    n_excluded: int = 0


def place(field: InboxFile | FieldRow) -> bytes:
    """Returns where a field lies, as the ledger keeps it: the path, and which page of how many it is."""
    page = f"{field.page}/{field.n_pages}".encode()
    return os.fsencode(field.path) + (_PAGE + page if field.page else b"")


def places_in(path: Path) -> tuple[bytes, bytes]:
    """Returns between what the places in a file lie: the file as a whole, and all its pages."""
    return os.fsencode(path), os.fsencode(path) + _AFTER_PAGES


def place_of(kept: bytes) -> tuple[Path, int, int]:
    """Reads what `place` made: path, page and number of pages."""
    path, _, page = os.fsencode(kept).partition(_PAGE)
    number, _, n = page.partition(b"/")
    return Path(os.fsdecode(path)), int(number or 0), int(n or 1)


def scale_of(diameter: float | None, source: str) -> Scale:
    """Makes a scale of what the database holds. SQLite keeps NaN as NULL."""
    return Scale(nan if diameter is None else diameter, ScaleSource(source))


def scale_values(scale: Scale | None) -> tuple[float | None, str | None]:
    """Returns what the database holds of a scale: diameter and source."""
    if scale is None:
        return None, None
    return px_value(scale.cell_diameter_px), str(scale.source)


def px_value(diameter_px: float) -> float | None:
    """Returns what the database holds of a diameter: NULL for NaN."""
    return None if isnan(diameter_px) else float(diameter_px)


def given_of(
    slide_id: str, expected: int | None, diameter_px: float | None, source: str | None, by_run: int
) -> Scale | None:
    """Makes the scale given for a slide, or none, of its `GIVEN_COLUMNS`. Raises `RowError` where damaged."""
    try:
        if expected is None or expected == checksum(diameter_px, source, by_run):
            return None if source is None else scale_of(diameter_px, source)
    except ValueError as error:  # without a checksum
        raise RowError(slide_id) from error
    raise RowError(slide_id)


def raw_row(row: tuple[Any, ...]) -> dict[str, Any]:
    """Returns what a query of `FIELD_COLUMNS` gives, by name."""
    return dict(zip(("slide_id", *_COLUMNS, "checksum", "reason", "decided"), row, strict=True))


def is_sound(of: Mapping[str, Any]) -> bool:
    """Tells whether a raw row is what was written. A version that wrote no checksum is believed."""
    return of["checksum"] is None or of["checksum"] == checksum_of(of)


def checksum_of(of: Mapping[str, Any]) -> int:
    """Returns the checksum of a raw row."""
    return checksum(*_checked_of(of))


def checksum(*values: object) -> int:
    """Returns a checksum of values as the database gives them back. NULL counts as not there."""
    return zlib.crc32(ascii([value for value in values if value is not None]).encode())


def decision_values(*decision: object) -> tuple[object, ...]:
    """Returns what the table ``decision`` holds of slide key, content, kind and reason."""
    return *decision, checksum(*decision)


def field_row(row: tuple[Any, ...]) -> FieldRow:
    """Makes a row of what a query of `FIELD_COLUMNS` gives. Raises `RowError` where it is damaged."""
    of = raw_row(row)
    try:
        if is_sound(of):
            return _field_row(of)
    except (ValueError, TypeError) as error:  # without a checksum
        raise RowError(of["slide_id"], of["fov"]) from error
    raise RowError(of["slide_id"], of["fov"])


def _field_row(of: dict[str, Any]) -> FieldRow:
    of["status"] = of["decided"] or of["status"]
    if of["status"] == Status.EXCLUDED:
        of |= {"counts": None, "n_refused": None, "quality_flags": ""}
    source, flags, counts = of["scale_source"], of["quality_flags"], of["counts"]
    path, page, n_pages = place_of(of["path"])
    return FieldRow(
        slide_id=of["slide_id"],
        path=path,
        page=page,
        n_pages=n_pages,
        status=Status(of["status"]),
        scale=None if source is None else scale_of(of["cell_diameter_px"], source),
        quality_flags=tuple(flags.split(_FLAG_SEPARATOR)) if flags else (),
        version=Version(of["bundle_id"], of["settings"]),
        counts={} if counts is None else unpack_counts(counts),
        reason=of["reason"],
        **{name: of[name] for name in _PLAIN},
    )


def column_values(row: FieldRow) -> dict[str, object]:
    """Returns what the table ``field`` holds of a row, its slide apart."""
    diameter_px, source = scale_values(row.scale)
    of: dict[str, object] = {name: getattr(row, name) for name in _PLAIN} | {
        "elapsed_ms": float(row.elapsed_ms),
        "path": place(row),
        "status": str(row.status),
        "cell_diameter_px": diameter_px,
        "scale_source": source,
        "quality_flags": _FLAG_SEPARATOR.join(row.quality_flags),
        "bundle_id": row.version.bundle_id,
        "settings": row.version.settings,
        "counts": pack_counts(row.counts) if row.counts else None,
    }
    return of | {"checksum": checksum_of(of | {"slide_id": row.slide_id})}


def counts_by_rule(cells: Cells) -> dict[EdgeRule, Counts]:
    """Counts a field's cells under each edge rule."""
    return {rule: count(cells, rule) for rule in _RULES}


def pack_counts(counts: Mapping[EdgeRule, Counts]) -> bytes:
    """Little-endian int32 (rules, 4): single, overlapping, white, platelets under each edge rule."""
    by_rule = [counts[rule] for rule in _RULES]
    table = [(c.n_rbc_single, c.n_rbc_overlapping, c.n_wbc, c.n_platelets) for c in by_rule]
    return np.array(table, "<i4").tobytes()


def unpack_counts(packed: bytes) -> dict[EdgeRule, Counts]:
    """Reads what `pack_counts` made. Raises `ValueError` where it is not that."""
    table = np.frombuffer(packed, "<i4").reshape(-1, 4).tolist()
    return {rule: Counts(*row) for rule, row in zip(_RULES, table, strict=True)}


def pack_cells(cells: Cells) -> bytes:
    """A compressed array of `_CELL`, little-endian: exact, and readable on any machine."""
    packed = np.zeros(len(cells), _CELL)
    for name in ("xyxy", "score", "class_id"):
        packed[name] = getattr(cells.detections, name)
    for name in ("overlap_score", "overlapping", "group"):
        packed[name] = getattr(cells, name)
    packed["edges"] = (cells.touches_edge * _EDGE_BITS).sum(axis=1, dtype=np.uint8)
    return zlib.compress(packed.tobytes(), level=1)


def pack_morphology(morphology: Morphology) -> bytes:
    """A compressed array of `_MORPHOLOGY`. As that of the cells, it holds a checksum: that of zlib."""
    packed = np.zeros(len(morphology), _MORPHOLOGY)
    for name in ("shape", "shape_sure", *_MEASURES):
        packed[name] = getattr(morphology, name)
    return zlib.compress(packed.tobytes(), level=1)


def unpack_morphology(packed: bytes) -> Morphology:
    """Reads what `pack_morphology` made. Raises `ValueError` or `zlib.error` where it is not that."""
    table = np.frombuffer(zlib.decompress(packed), _MORPHOLOGY)
    shape, sure = table["shape"].astype(np.int64), table["shape_sure"].astype(np.bool_)
    if len(shape) and not -1 <= shape.min() <= shape.max() < len(SHAPES):
        raise ValueError("a shape that no version knows")
    return Morphology(shape, shape_sure=sure, **{name: table[name].astype(np.float32) for name in _MEASURES})


def unpack_cells(packed: bytes, morphology: bytes | None = None) -> Cells:
    """Reads what `pack_cells` and `pack_morphology` made (None: a version that did not measure).

    Raises `ValueError` or `zlib.error` where it is not that.
    """
    table = np.frombuffer(zlib.decompress(packed), _CELL)
    xyxy, score = table["xyxy"].astype(np.float32), table["score"].astype(np.float32)
    return Cells(
        Detections(xyxy, score, table["class_id"].astype(np.int64)),
        overlap_score=table["overlap_score"].astype(np.float32),
        overlapping=table["overlapping"].astype(np.bool_),
        group=table["group"].astype(np.int64),
        touches_edge=(table["edges"][:, None] & _EDGE_BITS) != 0,
        morphology=Morphology.unknown(len(table)) if morphology is None else unpack_morphology(morphology),
    )

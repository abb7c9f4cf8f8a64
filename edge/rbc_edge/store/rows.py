"""What the ledger takes and gives: looks at files, rows, plans; and how cells and counts are packed."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import nan
from pathlib import Path
from typing import Any, Final

import numpy as np

from rbc_edge.values import Bool, Cells, Counts, Detections, FovResult, InboxFile, Scale, ScaleSource
from rbc_edge.vision.counting import EdgeRule, count

FIELD_COLUMNS: Final = (
    "slide_id, fov, path, size_bytes, mtime_ns, sha256, status, failure, message, width_px, height_px,"
    " field.cell_diameter_px, field.scale_source, quality_flags, captured_at, analyzed_at, bundle_id,"
    " settings, elapsed_ms, counts"
)
"""What `field_row` reads, of ``field JOIN slide``."""

FLAG_SEPARATOR: Final = ";"

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
_EDGE_BITS: Final = np.array([1, 2, 4, 8], np.uint8)


class Status(StrEnum):
    """What became of a field of view (column ``status``)."""

    OK = "ok"
    FAILED = "failed"
    DUPLICATE = "duplicate"  # the same content is counted under another name of the slide


@dataclass(frozen=True, slots=True)
class Version:
    """What a count depends on besides the image.

    Attributes:
        bundle_id: The bundle that counted.
        settings: Fingerprint of the settings that change a count. The edge rule changes only tables, so it is
            not part of it.
    """

    bundle_id: str
    settings: str


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at one file gave: its cells, or why not. The pixels are not kept.

    Attributes:
        file: The file, as the scan saw it.
        sha256: Hex digest of its content. Empty when it could not be read.
        captured_at: ISO 8601, or empty when the file does not say.
        result: Its cells. None with no failure: it was not analyzed, because its content is known.
        failure: Short word for why it failed, else empty.
        message: The same in words.
        elapsed_ms: Time it took, reading included.
    """

    file: InboxFile
    sha256: str = ""
    captured_at: str = ""
    result: FovResult | None = None
    failure: str = ""
    message: str = ""
    elapsed_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One field of view as the ledger knows it, without its cells.

    Attributes:
        slide_id: Its slide.
        fov: Its name within the slide.
        path: Where the file was last seen.
        size_bytes: The file's size then.
        mtime_ns: The file's time of change then. -1: the file is looked at again.
        sha256: Hex digest of the content. Empty when it could not be read.
        status: What became of it.
        failure: Short word for why it failed, else empty.
        message: The same in words.
        width_px: Image width. None unless ok.
        height_px: Image height. None unless ok.
        scale: Scale it was counted at. None unless ok.
        quality_flags: Stable words.
        captured_at: ISO 8601, or empty when the file does not say.
        analyzed_at: ISO 8601, UTC.
        version: The bundle and settings that counted it.
        elapsed_ms: Time it took, reading included.
        counts: Counts under each edge rule. Empty unless ok.
    """

    slide_id: str
    fov: str
    path: Path
    size_bytes: int
    mtime_ns: int
    sha256: str
    status: Status
    failure: str
    message: str
    width_px: int | None
    height_px: int | None
    scale: Scale | None
    quality_flags: tuple[str, ...]
    captured_at: str
    analyzed_at: str
    version: Version
    elapsed_ms: float
    counts: dict[EdgeRule, Counts]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What `Ledger.record` made of a look.

    Attributes:
        row: What the ledger now says.
        is_new: The image was counted, or failed, now. One that was renamed or touched is not new.
        left: Slides that lost a row to this file.
        is_unsettling: Other rows of the slide may need another look.
    """

    row: FieldRow
    is_new: bool
    left: frozenset[str] = frozenset()
    is_unsettling: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """How often an image was begun and never recorded.

    Attributes:
        n: By how many processes that are gone.
        n_sandbox: In how many sandbox runs, in a row, of which no end is known.
    """

    n: int
    n_sandbox: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done about files.

    Attributes:
        done: Files that need no look, and what became of them.
        to_do: Files that need one, in the order given.
        interrupted: Those that a process was counting when it died.
    """

    done: Mapping[InboxFile, Status]
    to_do: tuple[InboxFile, ...]
    interrupted: Mapping[InboxFile, Attempt] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlideScale:
    """The scale estimated for a slide.

    Attributes:
        scale: The scale.
        bundle_id: The bundle that estimated it.
        n_fields: Fields of view it was estimated from. None: by a version that did not say.
    """

    scale: Scale
    bundle_id: str
    n_fields: int | None


@dataclass(frozen=True, slots=True)
class Tally:
    """The ledger in a few numbers.

    Attributes:
        n_ok: Fields of view counted.
        n_failed: Fields of view that could not be counted.
        n_duplicates: Images whose content is counted under another name of their slide.
        n_slides: Slides ever seen.
        newest_analyzed_at: When the newest row was written, ISO 8601, UTC. Empty without a row.
    """

    n_ok: int
    n_failed: int
    n_duplicates: int
    n_slides: int
    newest_analyzed_at: str


def scale_of(diameter: float | None, source: str) -> Scale:
    """Makes a scale of what the database holds. SQLite keeps NaN as NULL."""
    return Scale(nan if diameter is None else diameter, ScaleSource(source))


def field_row(row: tuple[Any, ...]) -> FieldRow:
    """Makes a row of what a query of `FIELD_COLUMNS` gives."""
    (slide_id, fov, path, size_bytes, mtime_ns, sha256, status, failure, message) = row[:9]
    (width_px, height_px, diameter, source, flags, captured_at, analyzed_at) = row[9:16]
    (bundle_id, settings, elapsed_ms, counts) = row[16:]
    return FieldRow(
        slide_id=slide_id,
        fov=fov,
        path=Path(os.fsdecode(path)),
        size_bytes=size_bytes,
        mtime_ns=mtime_ns,
        sha256=sha256,
        status=Status(status),
        failure=failure,
        message=message,
        width_px=width_px,
        height_px=height_px,
        scale=None if source is None else scale_of(diameter, source),
        quality_flags=tuple(flags.split(FLAG_SEPARATOR)) if flags else (),
        captured_at=captured_at,
        analyzed_at=analyzed_at,
        version=Version(bundle_id, settings),
        elapsed_ms=elapsed_ms,
        counts={} if counts is None else unpack_counts(counts),
    )


def counts_by_rule(cells: Cells) -> dict[EdgeRule, Counts]:
    """Counts a field's cells under each edge rule."""
    return {rule: count(cells, rule) for rule in _RULES}


def pack_counts(counts: Mapping[EdgeRule, Counts]) -> bytes:
    """Little-endian int32 (rules, 4): single, overlapping, white, platelets under each edge rule."""
    by_rule = [counts[rule] for rule in _RULES]
    table = [(c.n_rbc_single, c.n_rbc_overlapping, c.n_wbc, c.n_platelets) for c in by_rule]
    return np.array(table, "<i4").tobytes()


def unpack_counts(packed: bytes) -> dict[EdgeRule, Counts]:
    """Reads what `pack_counts` made.

    Raises:
        ValueError: It is not that.
    """
    table = np.frombuffer(packed, "<i4").reshape(-1, 4).tolist()
    return {rule: Counts(*row) for rule, row in zip(_RULES, table, strict=True)}


def pack_cells(cells: Cells) -> bytes:
    """A compressed array of `_CELL`, little-endian: exact, and readable on any machine."""
    found = cells.detections
    packed = np.zeros(len(cells), _CELL)
    packed["xyxy"] = found.xyxy
    packed["score"] = found.score
    packed["overlap_score"] = cells.overlap_score
    packed["group"] = cells.group
    packed["class_id"] = found.class_id
    packed["overlapping"] = cells.overlapping
    packed["edges"] = (cells.touches_edge * _EDGE_BITS).sum(axis=1, dtype=np.uint8)
    return zlib.compress(packed.tobytes(), level=1)


def unpack_cells(packed: bytes) -> Cells:
    """Reads what `pack_cells` made.

    Raises:
        ValueError, zlib.error: It is not that.
    """
    table = np.frombuffer(zlib.decompress(packed), _CELL)
    edges: Bool = (table["edges"][:, None] & _EDGE_BITS) != 0
    return Cells(
        Detections(
            table["xyxy"].astype(np.float32),
            table["score"].astype(np.float32),
            table["class_id"].astype(np.int64),
        ),
        overlap_score=table["overlap_score"].astype(np.float32),
        overlapping=table["overlapping"].astype(np.bool_),
        group=table["group"].astype(np.int64),
        touches_edge=edges,
    )

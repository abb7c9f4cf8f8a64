"""What has been counted: all SQL of the house, and the rules that no image counts twice or gets lost.

The ledger is one SQLite file in the output folder; every table is a view of it. Identity is content: an
image is its slide and the SHA-256 of its bytes, and its path and name are attributes that may change.
"""

import fcntl
import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from errno import ENOENT, ENOTDIR
from math import nan
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from rbc_edge.counting import EdgeRule, count
from rbc_edge.errors import UnavailableError
from rbc_edge.inbox import InboxFile, path_text
from rbc_edge.values import Bool, Cells, Counts, Detections, FovResult, Scale, ScaleSource

log = logging.getLogger(__name__)

FILE_NAME: Final = "ledger.sqlite3"
LOCK_NAME: Final = ".rbc-edge.lock"

_APPLICATION_ID: Final = 0x52424345  # "RBCE": tells our file from any other SQLite file
_BUSY_TIMEOUT_S: Final = 10.0

# One tuple of statements a schema version; each runs in one transaction. Never change one that was shipped.
_MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        """
        CREATE TABLE slide (
            slide_key INTEGER PRIMARY KEY,         -- in order of first sight: names of tables hang on it
            slide_id TEXT NOT NULL UNIQUE,
            cell_diameter_px REAL,                 -- the estimate kept for the slide; NULL: none seen
            scale_source TEXT,                     -- NULL: never estimated
            scale_bundle_id TEXT
        )
        """,
        """
        CREATE TABLE field (
            field_key INTEGER PRIMARY KEY,
            slide_key INTEGER NOT NULL REFERENCES slide,
            fov TEXT NOT NULL,
            path BLOB NOT NULL,                    -- bytes: a file name need not be text
            size_bytes INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,             -- -1: look at the file again
            sha256 TEXT NOT NULL,                  -- '' where the file could not be read
            status TEXT NOT NULL CHECK (status IN ('ok', 'failed', 'duplicate')),
            failure TEXT NOT NULL,
            message TEXT NOT NULL,
            width_px INTEGER,
            height_px INTEGER,
            cell_diameter_px REAL,
            scale_source TEXT,
            quality_flags TEXT NOT NULL,
            captured_at TEXT NOT NULL,
            analyzed_at TEXT NOT NULL,
            bundle_id TEXT NOT NULL,
            settings TEXT NOT NULL,
            elapsed_ms REAL NOT NULL,
            counts BLOB,                           -- int32 (rules, 4), see _pack_counts
            UNIQUE (slide_key, fov),
            CHECK ((status = 'ok') = (counts IS NOT NULL))
        )
        """,
        "CREATE INDEX field_content ON field (slide_key, sha256)",
        # The promise of the house, held by the database: a content is counted once in a slide.
        "CREATE UNIQUE INDEX counted_once ON field (slide_key, sha256) WHERE status = 'ok'",
        # Apart from the row, so that reading a hundred thousand rows does not read their cells.
        """
        CREATE TABLE cells (
            field_key INTEGER PRIMARY KEY REFERENCES field ON DELETE CASCADE,
            packed BLOB NOT NULL                   -- see _pack_cells
        )
        """,
        "CREATE TABLE flag (name TEXT PRIMARY KEY)",
    ),
)

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
_FLAG_SEPARATOR: Final = ";"
_EDGE_BITS: Final = np.array([1, 2, 4, 8], np.uint8)

_FIELD_COLUMNS: Final = (
    "slide_id, fov, path, size_bytes, mtime_ns, sha256, status, failure, message, width_px, height_px,"
    " field.cell_diameter_px, field.scale_source, quality_flags, captured_at, analyzed_at, bundle_id,"
    " settings, elapsed_ms, counts"
)


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
        settings: Fingerprint of the settings that change a count; the edge rule is a view and not among them.
    """

    bundle_id: str
    settings: str


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One field of view as the ledger knows it, without its cells.

    Attributes:
        slide_id: Its slide.
        fov: Its name within the slide.
        path: Where the file was last seen.
        size_bytes: The file's size then.
        mtime_ns: The file's time of change then; -1 to have it looked at again.
        sha256: Hex digest of the content; empty when it could not be read.
        status: What became of it.
        failure: Short word for why it failed, else empty.
        message: The same in words.
        width_px: Image width; None unless ok.
        height_px: Image height; None unless ok.
        scale: Scale it was counted at; None unless ok.
        quality_flags: Stable words.
        captured_at: ISO 8601, or empty when the file does not say.
        analyzed_at: ISO 8601, UTC.
        version: The bundle and settings that counted it.
        elapsed_ms: Time it took, reading included.
        counts: Counts under each edge rule; empty unless ok.
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
class SlideScale:
    """The scale estimated for a slide and the bundle that estimated it."""

    scale: Scale
    bundle_id: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One look at one file, about to be written down.

    Attributes:
        file: The file as the scan saw it.
        version: The bundle and settings at work.
        sha256: Hex digest of its content; empty when it could not be read.
        analyzed_at: ISO 8601, UTC.
        captured_at: ISO 8601, or empty when the file does not say.
        elapsed_ms: Time it took, reading included.
    """

    file: InboxFile
    version: Version
    sha256: str
    analyzed_at: str
    captured_at: str = ""
    elapsed_ms: float = 0.0


class Ledger:
    """The whole SQLite policy, and the rules of identity.

    One writer at a time (a lock on the output folder); others may read beside it. Writes gather in one
    transaction until `commit`; what was not committed when the process dies never happened. Every method
    leaves the rows consistent, so a commit may follow any of them.

    Attributes:
        path: The ledger's file.
    """

    def __init__(self, out: Path) -> None:
        """Opens, and where needed creates or migrates, the ledger of an output folder for writing.

        Args:
            out: The output folder; must exist.

        Raises:
            UnavailableError: Another run holds the folder, the folder cannot be written, or the file is no
                ledger, a damaged one, or one of a newer version.
        """
        self.path = out / FILE_NAME
        self._lock = _lock(out)
        try:
            with self._guard():
                self._db = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
                try:
                    self._prepare()
                except BaseException:
                    self._db.close()
                    raise
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was not committed and releases the output folder."""
        try:
            self._db.close()
        finally:
            os.close(self._lock)

    # -- policy ---------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        db = self._db
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        application = int(db.execute("PRAGMA application_id").fetchone()[0])
        is_empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if application != _APPLICATION_ID and not is_empty:
            raise UnavailableError(
                f"{path_text(self.path)} is a database of another program", "choose another output folder"
            )
        if version > len(_MIGRATIONS):
            raise UnavailableError(
                f"{path_text(self.path)} was written by a newer rbc-edge (ledger version {version}; this one"
                f" knows {len(_MIGRATIONS)})",
                "update rbc-edge, or choose another output folder",
            )
        # WAL with FULL: a committed count survives a power cut, and readers never wait for the writer.
        # Where the file system has no shared memory SQLite keeps its rollback journal, as safe but slower.
        db.execute("PRAGMA journal_mode = WAL").fetchone()
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        for number, statements in enumerate(_MIGRATIONS[version:], version + 1):
            db.execute("BEGIN IMMEDIATE")
            try:
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {number}")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk has rolled it back already
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turns what SQLite reports into an error that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            where = path_text(self.path)
            match getattr(error, "sqlite_errorcode", 0) & 0xFF:
                case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_FORMAT:
                    raise UnavailableError(
                        f"{where}: the ledger is damaged: {error}",
                        "move it aside and run again: the images are counted anew",
                    ) from error
                case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
                    raise UnavailableError(
                        f"{where}: cannot write: {error}",
                        "free space on the disk and run again: what was counted is kept",
                    ) from error
                case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                    raise UnavailableError(
                        f"{where}: cannot write: {error}", "check the permissions of the output folder"
                    ) from error
                case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                    raise UnavailableError(
                        f"{where}: another program holds the ledger", "close it and run again"
                    ) from error
            raise

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One change: joins the open transaction, and takes back only itself when it fails."""
        with self._guard():
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("SAVEPOINT change")
            try:
                yield self._db
                self._db.execute("INSERT OR IGNORE INTO flag VALUES ('tables-stale')")
                self._db.execute("RELEASE change")
            except BaseException:
                # A full disk rolls the whole transaction back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK TO change")
                    self._db.execute("RELEASE change")
                raise

    def _read(self, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
        with self._guard():
            yield from self._db.execute(sql, values)

    def commit(self) -> None:
        """Makes everything written so far last."""
        with self._guard():
            if self._db.in_transaction:
                self._db.execute("COMMIT")

    # -- slides ---------------------------------------------------------------------------------------

    def slide_ids(self) -> list[str]:
        """Returns every slide ever seen, in order of first sight, also those that have no fields now."""
        return [row[0] for row in self._read("SELECT slide_id FROM slide ORDER BY slide_key")]

    def slide_scale(self, slide_id: str) -> SlideScale | None:
        """Returns the scale estimated for a slide; None when it never was."""
        for diameter, source, bundle_id in self._read(
            "SELECT cell_diameter_px, scale_source, scale_bundle_id FROM slide"
            " WHERE slide_id = ? AND scale_source IS NOT NULL",
            slide_id,
        ):
            return SlideScale(_scale(diameter, source), bundle_id)
        return None

    def keep_slide_scale(self, slide_id: str, scale: Scale, bundle_id: str) -> None:
        """Keeps the scale estimated for a slide."""
        with self._write() as db:
            self._slide_key(slide_id)
            db.execute(
                "UPDATE slide SET cell_diameter_px = ?, scale_source = ?, scale_bundle_id = ?"
                " WHERE slide_id = ?",
                (scale.cell_diameter_px, scale.source, bundle_id, slide_id),
            )

    def _slide_key(self, slide_id: str) -> int:
        self._db.execute("INSERT OR IGNORE INTO slide (slide_id) VALUES (?)", (slide_id,))
        return int(
            self._db.execute("SELECT slide_key FROM slide WHERE slide_id = ?", (slide_id,)).fetchone()[0]
        )

    # -- fields ---------------------------------------------------------------------------------------

    def fields(self, slide_id: str) -> Iterator[FieldRow]:
        """Yields a slide's fields of view in order of their names."""
        for row in self._read(
            f"SELECT {_FIELD_COLUMNS} FROM field JOIN slide USING (slide_key) WHERE slide_id = ?"
            " ORDER BY fov",
            slide_id,
        ):
            yield _row(row)

    def field(self, slide_id: str, fov: str) -> FieldRow | None:
        """Returns one field of view; None when the ledger does not know it."""
        for row in self._read(
            f"SELECT {_FIELD_COLUMNS} FROM field JOIN slide USING (slide_key) WHERE slide_id = ? AND fov = ?",
            slide_id,
            fov,
        ):
            return _row(row)
        return None

    def cells(self, slide_id: str) -> Iterator[tuple[str, Cells]]:
        """Yields (fov, cells) of a slide's counted fields in order of their names."""
        for fov, packed in self._read(
            "SELECT fov, packed FROM cells JOIN field USING (field_key) JOIN slide USING (slide_key)"
            " WHERE slide_id = ? ORDER BY fov",
            slide_id,
        ):
            yield fov, _unpack_cells(packed)

    def counted(self, slide_id: str, sha256: str) -> FieldRow | None:
        """Returns the field of a slide that counts this content; None when none does."""
        for row in self._read(
            f"SELECT {_FIELD_COLUMNS} FROM field JOIN slide USING (slide_key)"
            " WHERE slide_id = ? AND sha256 = ? AND status = 'ok' ORDER BY fov",
            slide_id,
            sha256,
        ):
            return _row(row)
        return None

    def is_done(self, file: InboxFile, version: Version) -> bool:
        """Tells whether a file needs no look: nothing about it, the bundle or the settings has changed.

        A file of the same name elsewhere is looked at: the folder was moved, or it is another image that a
        camera's clock of two seconds and a format of one size make look the same.

        A failed image is not tried again until it changes, except where the failure was about access.
        """
        row = self.field(file.slide_id, file.fov)
        if row is None or (row.size_bytes, row.mtime_ns) != (file.size_bytes, file.mtime_ns):
            return False
        if os.fsencode(row.path) != os.fsencode(file.path):
            return False
        if row.version != version:
            return False
        match row.status:
            case Status.OK:
                return True
            case Status.FAILED:
                return row.failure not in ("unreadable", "vanished")
            case Status.DUPLICATE:
                original = self.counted(row.slide_id, row.sha256)
                return original is not None and original.version == version

    def claim_paths(self, files: tuple[InboxFile, ...]) -> set[str]:
        """Forgets rows whose file now goes by another slide or name (another slide pattern, another folder).

        One file is one field of view: left alone, such a row would count the file a second time.

        Args:
            files: Everything the scan found.

        Returns:
            The slides that lost rows.
        """
        name_of = {os.fsencode(f.path): (f.slide_id, f.fov) for f in files}
        lost = [
            (key, slide_id)
            for key, path, slide_id, fov in self._read(
                "SELECT field_key, path, slide_id, fov FROM field JOIN slide USING (slide_key)"
            )
            if name_of.get(path, (slide_id, fov)) != (slide_id, fov)
        ]
        if lost:
            with self._write() as db:
                db.executemany("DELETE FROM field WHERE field_key = ?", [(key,) for key, _ in lost])
        return {slide_id for _, slide_id in lost}

    def settle(self, entry: Entry, *, force: bool = False) -> FieldRow | None:
        """Settles a file whose content the slide knows already; applies the rules of identity.

        * Same name, same content: size and time are noted.
        * The other name's file is gone: it was renamed, and the count moves along.
        * The other name's file is there: the later name, in sort order, is the duplicate. Where that is the
          known one, its count moves to this file.

        Args:
            entry: The look at the file, with its digest.
            force: Take no count as valid.

        Returns:
            The row that settles the file; None when it has to be analyzed (`record_ok` follows).
        """
        file = entry.file
        original = self.counted(file.slide_id, entry.sha256)
        if original is None:
            return None
        if original.fov < file.fov and not _is_gone(original.path):
            with self._write():
                self._put(entry, Status.DUPLICATE, message=f"same content as {original.fov}")
        elif force or original.version != entry.version:
            return None
        else:
            with self._write() as db:
                slide_key = self._slide_key(file.slide_id)
                if original.fov != file.fov:
                    self._forget(file.slide_id, file.fov)
                    db.execute(
                        "UPDATE field SET fov = ? WHERE slide_key = ? AND fov = ?",
                        (file.fov, slide_key, original.fov),
                    )
                    self._pass_over(original, entry)
                db.execute(
                    "UPDATE field SET path = ?, size_bytes = ?, mtime_ns = ? WHERE slide_key = ? AND fov = ?",
                    (os.fsencode(file.path), file.size_bytes, file.mtime_ns, slide_key, file.fov),
                )
        return self.field(file.slide_id, file.fov)

    def record_ok(self, entry: Entry, result: FovResult) -> FieldRow:
        """Writes down what the analyzer found in a file that `settle` did not settle."""
        file = entry.file
        with self._write() as db:
            known = self.counted(file.slide_id, entry.sha256)
            self._forget(file.slide_id, file.fov)
            if known is not None and known.fov != file.fov:  # counted by another bundle under another name
                self._forget(known.slide_id, known.fov)
                self._pass_over(known, entry)
            key = self._put(entry, Status.OK, result=result)
            db.execute("INSERT INTO cells VALUES (?, ?)", (key, _pack_cells(result.cells)))
        row = self.field(file.slide_id, file.fov)
        assert row is not None
        return row

    def record_failed(self, entry: Entry, failure: str, message: str) -> FieldRow:
        """Writes down that a file could not be counted.

        A file that vanished between scan and reading leaves an earlier count of it alone.
        """
        file = entry.file
        row = self.field(file.slide_id, file.fov)
        if not (failure == "vanished" and row is not None and row.status is Status.OK):
            with self._write() as db:
                # The same broken file under its former name is not a second failure.
                for key, path in db.execute(
                    "SELECT field_key, path FROM field JOIN slide USING (slide_key) WHERE slide_id = ?"
                    " AND sha256 = ? AND sha256 <> '' AND status = 'failed' AND fov <> ?",
                    (file.slide_id, entry.sha256, file.fov),
                ).fetchall():
                    if _is_gone(Path(os.fsdecode(path))):
                        db.execute("DELETE FROM field WHERE field_key = ?", (key,))
                self._put(entry, Status.FAILED, failure=failure, message=message)
            row = self.field(file.slide_id, file.fov)
        assert row is not None
        return row

    def _pass_over(self, other: FieldRow, entry: Entry) -> None:
        """Makes `other`, whose count now has another name, a duplicate if its file is still there."""
        if not _is_gone(other.path):
            # mtime -1: it is looked at again when its turn comes, for it may hold something else by now.
            file = InboxFile(other.path, other.slide_id, other.fov, other.size_bytes, -1)
            self._put(
                replace(entry, file=file), Status.DUPLICATE, message=f"same content as {entry.file.fov}"
            )

    def _forget(self, slide_id: str, fov: str) -> None:
        self._db.execute(
            "DELETE FROM field WHERE fov = ?"
            " AND slide_key = (SELECT slide_key FROM slide WHERE slide_id = ?)",
            (fov, slide_id),
        )

    def _put(
        self,
        entry: Entry,
        status: Status,
        *,
        failure: str = "",
        message: str = "",
        result: FovResult | None = None,
    ) -> int:
        """Replaces the row of a slide and name; returns its key."""
        file = entry.file
        self._forget(file.slide_id, file.fov)
        values: dict[str, object] = {
            "slide_key": self._slide_key(file.slide_id),
            "fov": file.fov,
            "path": os.fsencode(file.path),
            "size_bytes": file.size_bytes,
            "mtime_ns": file.mtime_ns,
            "sha256": entry.sha256,
            "status": status,
            "failure": failure,
            "message": path_text(message),
            "quality_flags": "",
            "captured_at": entry.captured_at,
            "analyzed_at": entry.analyzed_at,
            "bundle_id": entry.version.bundle_id,
            "settings": entry.version.settings,
            "elapsed_ms": entry.elapsed_ms,
        }
        if result is not None:
            values |= {
                "width_px": result.width_px,
                "height_px": result.height_px,
                "cell_diameter_px": result.scale.cell_diameter_px,
                "scale_source": result.scale.source,
                "quality_flags": _FLAG_SEPARATOR.join(result.quality_flags),
                "counts": _pack_counts(result.cells),
            }
        cursor = self._db.execute(
            f"INSERT INTO field ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
            tuple(values.values()),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    # -- tables ---------------------------------------------------------------------------------------

    def tables_are_stale(self) -> bool:
        """Tells whether something changed since `tables_written`; also after the process was killed."""
        return any(self._read("SELECT 1 FROM flag WHERE name = 'tables-stale'"))

    def tables_written(self) -> None:
        """Notes, and commits, that every table shows the ledger as it is."""
        with self._guard():
            self._db.execute("DELETE FROM flag WHERE name = 'tables-stale'")
        self.commit()


def _lock(out: Path) -> int:
    """Locks an output folder for one writer; returns the descriptor that holds the lock."""
    path = out / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out)}: cannot write: {error.strerror}", "check permissions and free space"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UnavailableError(
            f"another rbc-edge is writing to {path_text(out)}",
            "wait until it has finished, or choose another output folder",
        ) from error
    except OSError as error:  # some network file systems have no locks; one writer is then the user's care
        log.warning("%s: cannot lock the output folder: %s", path_text(out), error.strerror)
    return descriptor


def _is_gone(path: Path) -> bool:
    """Tells that no file is there; a folder we may not look into hides its files, it does not lose them."""
    try:
        path.stat()
    except OSError as error:
        return error.errno in (ENOENT, ENOTDIR)
    return False


def _scale(diameter: float | None, source: str) -> Scale:
    return Scale(nan if diameter is None else diameter, ScaleSource(source))  # SQLite keeps NaN as NULL


def _row(row: tuple[Any, ...]) -> FieldRow:
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
        scale=None if source is None else _scale(diameter, source),
        quality_flags=tuple(flags.split(_FLAG_SEPARATOR)) if flags else (),
        captured_at=captured_at,
        analyzed_at=analyzed_at,
        version=Version(bundle_id, settings),
        elapsed_ms=elapsed_ms,
        counts={} if counts is None else _unpack_counts(counts),
    )


def _pack_counts(cells: Cells) -> bytes:
    """Little-endian int32 (rules, 4): single, overlapping, white, platelets under each edge rule."""
    by_rule = [count(cells, rule) for rule in _RULES]
    table = [(c.n_rbc_single, c.n_rbc_overlapping, c.n_wbc, c.n_platelets) for c in by_rule]
    return np.array(table, "<i4").tobytes()


def _unpack_counts(packed: bytes) -> dict[EdgeRule, Counts]:
    table = np.frombuffer(packed, "<i4").reshape(-1, 4).tolist()
    return {rule: Counts(*row) for rule, row in zip(_RULES, table, strict=True)}


def _pack_cells(cells: Cells) -> bytes:
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


def _unpack_cells(packed: bytes) -> Cells:
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

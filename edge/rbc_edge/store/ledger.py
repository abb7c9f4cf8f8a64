"""What has been counted: all SQL of the house, and the rules that no image counts twice or gets lost.

The ledger is one SQLite file in the output folder; every table is a view of it. Identity is content: an
image is its slide and the SHA-256 of its bytes, and its path and name are attributes that may change.
"""

import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from errno import ENOENT, ENOTDIR
from math import nan
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import numpy as np

from rbc_edge.errors import UnavailableError
from rbc_edge.text import path_text
from rbc_edge.values import Bool, Cells, Counts, Detections, FovResult, InboxFile, Scale, ScaleSource
from rbc_edge.vision.counting import EdgeRule, count

log = logging.getLogger(__name__)

FILE_NAME: Final = "ledger.sqlite3"

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
    (
        # How many fields the slide's scale was estimated from; NULL: by a version that did not say.
        "ALTER TABLE slide ADD COLUMN scale_fields INTEGER",
        "CREATE INDEX field_path ON field (path)",
        "CREATE INDEX field_status ON field (status, field_key)",
        # Images that a process has opened and not settled; one that is left here by a dead one is suspect.
        """
        CREATE TABLE attempt (
            path BLOB PRIMARY KEY,
            size_bytes INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            n INTEGER NOT NULL,                    -- processes that began it
            trials INTEGER NOT NULL,               -- trials begun since one ended alive
            process TEXT NOT NULL                  -- the last of them
        ) WITHOUT ROWID
        """,
        "CREATE TABLE note (name TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID",
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
_PROCESS: Final = uuid4().hex  # not its number: that comes again
_RECOUNT: Final = "scale changed"  # in place of a row's settings: no version is like it
_ACCESS_FAILURES: Final = ("unreadable", "vanished")  # the file may be as good as ever

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
    """The scale estimated for a slide.

    Attributes:
        scale: The scale.
        bundle_id: The bundle that estimated it.
        n_fields: Fields of view it was estimated from; None: by a version that did not say.
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
        newest_analyzed_at: When the newest row was written, ISO 8601, UTC; empty without a row.
    """

    n_ok: int
    n_failed: int
    n_duplicates: int
    n_slides: int
    newest_analyzed_at: str


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


@dataclass(frozen=True, slots=True)
class Attempt:
    """How often an image was begun and never settled.

    Attributes:
        n: By how many processes that are gone.
        n_trials: In how many trials, in a row, after which nobody could say how they ended.
    """

    n: int
    n_trials: int = 0


class DamagedError(UnavailableError):
    """The ledger's file is not what SQLite left there; `keep_aside` makes room for a new one."""


class Ledger:
    """The whole SQLite policy, and the rules of identity.

    One process at a time settles images (`outdir.writing`); others may read beside it, and change a row in
    a short transaction of their own (`retry`). Writes gather in one transaction until `commit`; what was
    not committed when the process dies never happened. Every method leaves the rows consistent, so a
    commit may follow any of them.

    Attributes:
        path: The ledger's file.
    """

    def __init__(self, out: Path) -> None:
        """Opens, and where needed creates or migrates, the ledger of an output folder for writing.

        Args:
            out: The output folder; must exist.

        Raises:
            DamagedError: The file is damaged.
            UnavailableError: The folder cannot be written, or the file is no ledger, or a newer version's.
        """
        self.path = out / FILE_NAME
        self._forced = True
        with self._guard():
            self._db = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    @classmethod
    def reading(cls, out: Path) -> Self:
        """Opens a ledger for reading only, beside whoever writes it.

        Raises:
            DamagedError: The file is damaged.
            UnavailableError: There is none, it cannot be read, or it is not one that this version reads.
        """
        ledger = cls.__new__(cls)
        ledger.path = out / FILE_NAME
        ledger._forced = True
        if _is_gone(ledger.path):
            raise UnavailableError(
                f"{path_text(out)}: no {FILE_NAME} there", "give the --out of a run or of the service"
            )
        with ledger._guard():
            uri = f"{ledger.path.absolute().as_uri()}?mode=ro"
            if not Path(f"{ledger.path}-wal").exists() and not os.access(out, os.W_OK):
                # Nobody has it open, and who may only read cannot make the log that SQLite wants beside it.
                uri += "&immutable=1"
            ledger._db = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            try:
                ledger._check_version(oldest=len(_MIGRATIONS))
            except BaseException:
                ledger._db.close()
                raise
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was not committed."""
        self._db.close()

    # -- policy ---------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        db = self._db
        self._check_version(oldest=0)
        # WAL with FULL: a committed count survives a power cut, and readers never wait for the writer.
        # Where the file system has no shared memory SQLite keeps its rollback journal, as safe but slower.
        db.execute("PRAGMA journal_mode = WAL").fetchone()
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        for number, statements in enumerate(_MIGRATIONS, 1):
            db.execute("BEGIN IMMEDIATE")
            try:
                # Asked inside: another process may have migrated while this one waited.
                if int(db.execute("PRAGMA user_version").fetchone()[0]) < number:
                    for statement in statements:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {number}")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk has rolled it back already
                    db.execute("ROLLBACK")
                raise

    def _check_version(self, *, oldest: int) -> None:
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
        if version < oldest:
            raise UnavailableError(
                f"{path_text(self.path)} was written by an older rbc-edge (ledger version {version})",
                "run `rbc-edge run` or the service on it once; that brings it up to date",
            )

    def damage(self) -> str:
        """Reads the whole ledger and returns what is wrong with it; empty when nothing is.

        SQLite's own check reads the structure; the packed cells and counts are read besides, because SQLite
        takes any bytes there.
        """
        try:
            found = str(self._db.execute("PRAGMA integrity_check(1)").fetchone()[0])
            if found != "ok":
                return found
            for (packed,) in self._db.execute("SELECT packed FROM cells"):
                _unpack_cells(packed)
            for (counts,) in self._db.execute("SELECT counts FROM field WHERE counts IS NOT NULL"):
                _unpack_counts(counts)
        except (sqlite3.DatabaseError, zlib.error, ValueError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR):
                raise
            return str(error)
        return ""

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turns what SQLite reports into an error that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            where = path_text(self.path)
            match getattr(error, "sqlite_errorcode", 0) & 0xFF:
                case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_FORMAT:
                    raise DamagedError(
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
                # Forced to the disk at the end, by `commit`; SQLite takes this only between transactions.
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("SAVEPOINT change")
            try:
                # First, so that a change may be to take it away.
                self._db.execute("INSERT OR IGNORE INTO flag VALUES ('tables-stale')")
                yield self._db
                self._db.execute("RELEASE change")
            except BaseException:
                # A full disk rolls the whole transaction back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK TO change")
                    self._db.execute("RELEASE change")
                raise

    def _read(self, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
        with self._guard():
            # Not `yield from`: that closes the cursor of a generator left early, maybe after the database.
            for row in self._db.execute(sql, values):  # noqa: UP028
                yield row

    def _first(self, sql: str, *values: object) -> tuple[Any, ...] | None:
        """Returns the first row; unlike a generator, nothing of it is left to be closed later."""
        with self._guard():
            cursor = self._db.execute(sql, values)
            row: tuple[Any, ...] | None = cursor.fetchone()
            cursor.close()
            return row

    def commit(self) -> None:
        """Makes everything written so far last, through a power cut."""
        with self._guard():
            if self._db.in_transaction:
                self._db.execute("COMMIT")
                self._forced = False
            if not self._forced:
                # One change that is forced to the disk takes everything before it along.
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("INSERT OR REPLACE INTO flag VALUES ('forced')")
                self._forced = True

    def rollback(self) -> None:
        """Takes back what was not committed."""
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def foreign_changes(self) -> int:
        """Returns a number that changes when another connection has changed the ledger."""
        version = self._first("PRAGMA data_version")
        return int(version[0]) if version else 0

    # -- attempts -------------------------------------------------------------------------------------

    def begin_attempts(self, files: Sequence[InboxFile]) -> None:
        """Says, before they are opened, that images are being tried; settling one takes its note away.

        Committed at once, so that it outlives the process, but not forced to the disk: an image that
        brings the process down leaves the system's memory alone, and a forced write an image would be the
        dearest step of all on a memory card.
        """
        with self._write() as db:
            db.executemany(
                "INSERT INTO attempt VALUES (?, ?, ?, 1, 0, ?) ON CONFLICT (path) DO UPDATE SET"
                " n = CASE WHEN size_bytes = excluded.size_bytes AND mtime_ns = excluded.mtime_ns"
                " THEN n + (process <> excluded.process) ELSE 1 END,"
                " size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns, process = excluded.process",
                [(os.fsencode(f.path), f.size_bytes, f.mtime_ns, _PROCESS) for f in files],
            )
        self._commit_lightly()

    def begin_trial(self, files: Sequence[InboxFile]) -> None:
        """Says that suspects are about to be tried in a process of their own; see `end_trial`."""
        with self._write() as db:
            db.executemany(
                "UPDATE attempt SET trials = trials + 1 WHERE path = ?",
                [(os.fsencode(f.path),) for f in files],
            )
        self._commit_lightly()

    def end_trial(self, files: Sequence[InboxFile]) -> None:
        """Says that the trial ended with its process alive."""
        with self._write() as db:
            db.executemany(
                "UPDATE attempt SET trials = 0 WHERE path = ?", [(os.fsencode(f.path),) for f in files]
            )

    def end_attempts(self, files: Sequence[InboxFile]) -> None:
        """Takes back `begin_attempts` for images that were left alone after all."""
        with self._write() as db:
            db.executemany("DELETE FROM attempt WHERE path = ?", [(os.fsencode(f.path),) for f in files])

    def attempts(self, files: Sequence[InboxFile]) -> dict[InboxFile, Attempt]:
        """Returns those of the images that other processes had begun and not settled."""
        left = {
            path: row
            for path, *row in self._read(
                "SELECT path, size_bytes, mtime_ns, n, trials FROM attempt WHERE process <> ?", _PROCESS
            )
        }
        if not left:
            return {}
        found = {}
        for file in files:
            size_bytes, mtime_ns, n, n_trials = left.get(os.fsencode(file.path), (None, None, 0, 0))
            if (size_bytes, mtime_ns) == (file.size_bytes, file.mtime_ns):
                found[file] = Attempt(n, n_trials)
        return found

    def _commit_lightly(self) -> None:
        """Makes everything written so far outlive this process, not yet a power cut."""
        with self._guard():
            self._db.execute("COMMIT")
            self._forced = False

    # -- notes ----------------------------------------------------------------------------------------

    def note(self, name: str) -> str:
        """Returns a note kept beside the counts; empty when there is none."""
        row = self._first("SELECT content FROM note WHERE name = ?", name)
        return "" if row is None else str(row[0])

    def keep_note(self, name: str, content: str) -> None:
        """Keeps a note beside the counts."""
        if self.note(name) != content:
            with self._write() as db:
                db.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, content))

    # -- slides ---------------------------------------------------------------------------------------

    def slide_ids(self) -> list[str]:
        """Returns every slide ever seen, in order of first sight, also those that have no fields now."""
        return [row[0] for row in self._read("SELECT slide_id FROM slide ORDER BY slide_key")]

    def slide_scale(self, slide_id: str) -> SlideScale | None:
        """Returns the scale estimated for a slide; None when it never was."""
        row = self._first(
            "SELECT cell_diameter_px, scale_source, scale_bundle_id, scale_fields FROM slide"
            " WHERE slide_id = ? AND scale_source IS NOT NULL",
            slide_id,
        )
        if row is None:
            return None
        diameter, source, bundle_id, n_fields = row
        return SlideScale(_scale(diameter, source), bundle_id, n_fields)

    def keep_slide_scale(self, slide_id: str, kept: SlideScale, *, recount: bool = False) -> None:
        """Keeps the scale estimated for a slide.

        Args:
            slide_id: The slide.
            kept: The scale, the bundle that estimated it, and from how many fields.
            recount: Also have the slide's fields counted again; their counts stand until they are.
        """
        with self._write() as db:
            slide_key = self._slide_key(slide_id)
            db.execute(
                "UPDATE slide SET cell_diameter_px = ?, scale_source = ?, scale_bundle_id = ?,"
                " scale_fields = ? WHERE slide_key = ?",
                (kept.scale.cell_diameter_px, kept.scale.source, kept.bundle_id, kept.n_fields, slide_key),
            )
            if recount:
                db.execute(
                    "UPDATE field SET settings = ? WHERE slide_key = ? AND status = 'ok'",
                    (_RECOUNT, slide_key),
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
        row = self._first(
            f"SELECT {_FIELD_COLUMNS} FROM field JOIN slide USING (slide_key) WHERE slide_id = ? AND fov = ?",
            slide_id,
            fov,
        )
        return None if row is None else _row(row)

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
        row = self._first(
            f"SELECT {_FIELD_COLUMNS} FROM field JOIN slide USING (slide_key)"
            " WHERE slide_id = ? AND sha256 = ? AND status = 'ok' ORDER BY fov",
            slide_id,
            sha256,
        )
        return None if row is None else _row(row)

    def digests(self, slide_id: str, version: Version) -> set[str]:
        """Returns the contents of a slide that are counted by this bundle and these settings."""
        return {
            row[0]
            for row in self._read(
                "SELECT sha256 FROM field JOIN slide USING (slide_key) WHERE slide_id = ? AND status = 'ok'"
                " AND bundle_id = ? AND settings = ?",
                slide_id,
                version.bundle_id,
                version.settings,
            )
        }

    def is_done(self, file: InboxFile, version: Version) -> bool:
        """Tells whether a file needs no look: nothing about it, the bundle or the settings has changed.

        A file of the same name elsewhere is looked at: the folder was moved, or it is another image that a
        camera's clock of two seconds and a format of one size make look the same.

        A failed image is not tried again until it changes, except where the failure was about access.
        """
        return self.done_as(file, version) is not None

    def done_as(self, file: InboxFile, version: Version) -> Status | None:
        """Returns what became of a file that needs no look (`is_done`); None where it needs one.

        A duplicate may need one later though nothing about it changes: when its original does.
        """
        row = self.field(file.slide_id, file.fov)
        if (
            row is None
            or (row.size_bytes, row.mtime_ns) != (file.size_bytes, file.mtime_ns)
            or os.fsencode(row.path) != os.fsencode(file.path)
            or row.version != version
            or (row.status is Status.FAILED and row.failure in _ACCESS_FAILURES)
        ):
            return None
        if row.status is Status.DUPLICATE:
            original = self.counted(row.slide_id, row.sha256)
            if original is None or original.version != version:
                return None
        return row.status

    def claim_paths(self, files: Sequence[InboxFile]) -> set[str]:
        """Forgets rows whose file now goes by another slide or name (another slide pattern, another folder).

        One file is one field of view: left alone, such a row would count the file a second time.

        Args:
            files: What the scan found, or those of it that are about to be settled.

        Returns:
            The slides that lost rows.
        """
        lost = [
            (key, slide_id)
            for file in files
            for key, slide_id, fov in self._read(
                "SELECT field_key, slide_id, fov FROM field JOIN slide USING (slide_key) WHERE path = ?",
                os.fsencode(file.path),
            )
            if (slide_id, fov) != (file.slide_id, file.fov)
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
                db.execute("DELETE FROM attempt WHERE path = ?", (os.fsencode(file.path),))
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
        if failure == "vanished" and row is not None and row.status is Status.OK:
            self.end_attempts([file])
        else:
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
        self._db.execute("DELETE FROM attempt WHERE path = ?", (os.fsencode(file.path),))
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
        return self._first("SELECT 1 FROM flag WHERE name = 'tables-stale'") is not None

    def tables_written(self) -> None:
        """Notes, and commits, that every table shows the ledger as it is."""
        with self._write() as db:
            db.execute("DELETE FROM flag WHERE name = 'tables-stale'")
        self.commit()

    # -- for people -----------------------------------------------------------------------------------

    def tally(self) -> Tally:
        """Sums up the ledger."""
        n = dict(self._read("SELECT status, count(*) FROM field GROUP BY status"))
        newest = self._first("SELECT analyzed_at FROM field ORDER BY field_key DESC LIMIT 1")
        slides = self._first("SELECT count(*) FROM slide")
        return Tally(
            n_ok=n.get(Status.OK, 0),
            n_failed=n.get(Status.FAILED, 0),
            n_duplicates=n.get(Status.DUPLICATE, 0),
            n_slides=int(slides[0]) if slides else 0,
            newest_analyzed_at=newest[0] if newest else "",
        )

    def failures(self, limit: int) -> list[FieldRow]:
        """Returns the fields of view that could not be counted, the newest first, at most `limit`."""
        return [
            _row(row)
            for row in self._read(
                f"SELECT {_FIELD_COLUMNS} FROM field JOIN slide USING (slide_key) WHERE status = 'failed'"
                " ORDER BY field_key DESC LIMIT ?",
                limit,
            )
        ]

    def failure_counts(self) -> dict[str, int]:
        """Returns how many fields of view failed for each reason, the most frequent first."""
        return dict(
            self._read(
                "SELECT failure, count(*) FROM field WHERE status = 'failed' GROUP BY failure"
                " ORDER BY count(*) DESC, failure"
            )
        )

    def retry(self, slide_id: str | None = None, fov: str | None = None) -> int:
        """Has failed fields of view looked at again, by the next run or the running service.

        Args:
            slide_id: Only of this slide; None: of all.
            fov: Only this one; None: all.

        Returns:
            How many.
        """
        with self._write() as db:
            return db.execute(
                "UPDATE field SET mtime_ns = -1 WHERE status = 'failed' AND (?1 IS NULL OR slide_key ="
                " (SELECT slide_key FROM slide WHERE slide_id = ?1)) AND (?2 IS NULL OR fov = ?2)",
                (slide_id, fov),
            ).rowcount


def keep_aside(out: Path, stamp: str) -> Path:
    """Moves a damaged ledger out of the way, with the tables of before; nothing is lost.

    Counts of images that are no longer in the camera's folder stand in those tables only. They go along
    because the new ledger knows nothing of them: left there, tables and ``slides.csv`` would disagree.

    Args:
        out: The output folder, whose ledger nobody has open.
        stamp: What to call it by; a time.

    Returns:
        The new folder that holds them.

    Raises:
        UnavailableError: The folder cannot be written.
    """
    try:
        aside = _new_folder(out / f"damaged-{stamp}")
        for table in [*out.glob("*.csv"), *out.glob("cells/*.csv")]:
            kept = aside / table.relative_to(out)
            kept.parent.mkdir(exist_ok=True)
            table.rename(kept)
        # The ledger last, and its log before it: a process killed in between finds it damaged again.
        for suffix in ("-shm", "-wal", "-journal", ""):
            with suppress(FileNotFoundError):
                Path(f"{out / FILE_NAME}{suffix}").rename(aside / f"{FILE_NAME}{suffix}")
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out)}: cannot keep the damaged ledger aside: {error.strerror}",
            "check permissions and free space",
        ) from error
    return aside


def _new_folder(path: Path) -> Path:
    for number in range(2, 1000):
        try:
            path.mkdir()
        except FileExistsError:
            path = path.with_name(f"{path.name.partition('_')[0]}_{number}")
        else:
            break
    return path


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

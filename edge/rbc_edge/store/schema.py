"""The ledger's file: its tables, its migrations, and the whole policy of SQLite in one class.

The policy: write-ahead log, so that readers never wait for the writer. Changes gather in one transaction. A
commit is forced to the disk and survives a power cut. A light commit survives only the death of the process.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOENT, ENOTDIR
from pathlib import Path
from typing import Any, Final, Self

from rbc_edge.errors import BROKEN_DISK, UnavailableError
from rbc_edge.text import natural_key, path_text

FILE_NAME: Final = "ledger.sqlite3"

_APPLICATION_ID: Final = 0x52424345  # "RBCE": tells our file from any other SQLite file
_BUSY_TIMEOUT_S: Final = 10.0

# One tuple of statements for each schema version, each in one transaction. Never change one that shipped.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE slide (
            slide_key INTEGER PRIMARY KEY,         -- in order of first sight: names of tables depend on it
            slide_id TEXT NOT NULL UNIQUE,
            cell_diameter_px REAL,                 -- the estimate kept for the slide; NULL: no cell seen
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
            counts BLOB,                           -- int32 (rules, 4), see rows.pack_counts
            UNIQUE (slide_key, fov),
            CHECK ((status = 'ok') = (counts IS NOT NULL))
        )
        """,
        "CREATE INDEX field_content ON field (slide_key, sha256)",
        # The promise of the ledger, held by the database: a content is counted once in a slide.
        "CREATE UNIQUE INDEX counted_once ON field (slide_key, sha256) WHERE status = 'ok'",
        # Apart from the row, so that reading a hundred thousand rows does not read their cells.
        """
        CREATE TABLE cells (
            field_key INTEGER PRIMARY KEY REFERENCES field ON DELETE CASCADE,
            packed BLOB NOT NULL                   -- see rows.pack_cells
        )
        """,
        "CREATE TABLE flag (name TEXT PRIMARY KEY)",
    ),
    (
        # How many fields the slide's scale was estimated from. NULL: by a version that did not say.
        "ALTER TABLE slide ADD COLUMN scale_fields INTEGER",
        "CREATE INDEX field_path ON field (path)",
        "CREATE INDEX field_status ON field (status, field_key)",
        # Images that a process has opened and not recorded. One that a dead process left here may have
        # killed it.
        """
        CREATE TABLE attempt (
            path BLOB PRIMARY KEY,
            size_bytes INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            n INTEGER NOT NULL,                    -- processes that began it
            trials INTEGER NOT NULL,               -- sandbox runs begun since one ended alive
            process TEXT NOT NULL                  -- the last of them
        ) WITHOUT ROWID
        """,
        "CREATE TABLE note (name TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID",
    ),
    (
        # Boxes that the second stage refused. NULL: not counted, or by a version that refused none.
        "ALTER TABLE field ADD COLUMN n_refused INTEGER",
    ),
    (
        # What a person said of a content (see `store.decisions`). The row of the field stays as it is.
        """
        CREATE TABLE decision (
            slide_key INTEGER NOT NULL REFERENCES slide,
            content TEXT NOT NULL,                 -- SHA-256; 'fov:' and the name of what cannot be read
            kind TEXT NOT NULL CHECK (kind IN ('excluded', 'forgotten')),
            reason TEXT NOT NULL,
            PRIMARY KEY (slide_key, content)
        ) WITHOUT ROWID
        """,
        # The scale that a person gave for the slide. It comes before every other.
        "ALTER TABLE slide ADD COLUMN given_diameter_px REAL",
        "ALTER TABLE slide ADD COLUMN given_source TEXT",
    ),
    (
        # A content is looked for in all slides: it may have moved.
        "CREATE INDEX field_sha256 ON field (sha256)",
        # Most files are told from all others by their size, without reading them.
        "CREATE INDEX field_size ON field (size_bytes)",
        # Counts of images that other images of the same name took the place of.
        """
        CREATE TABLE replaced (
            slide_id TEXT NOT NULL,
            fov TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            counts BLOB NOT NULL,                  -- as in field
            bundle_id TEXT NOT NULL,
            settings TEXT NOT NULL,
            analyzed_at TEXT NOT NULL,
            replaced_at TEXT NOT NULL
        )
        """,
    ),
    (
        # What a content says about the scale of its slide. The scale is made of the measures of the first
        # contents in order of their digests, so it does not depend on the order in which they came.
        """
        CREATE TABLE measure (
            sha256 TEXT NOT NULL,
            bundle_id TEXT NOT NULL,
            start INTEGER NOT NULL,                -- see `vision.scale.start`
            cell_diameter_px REAL,                 -- NULL: no red cell seen
            n_cells INTEGER NOT NULL,
            n_pixels INTEGER NOT NULL,
            PRIMARY KEY (sha256, bundle_id, start)
        ) WITHOUT ROWID
        """,
        # Its counted contents may have changed since its scale was chosen.
        "ALTER TABLE slide ADD COLUMN is_unsettled INTEGER NOT NULL DEFAULT 0",
        # The given scale is that of the last run, which a later run without it takes back.
        "ALTER TABLE slide ADD COLUMN given_by_run INTEGER NOT NULL DEFAULT 0",
    ),
    (
        # Of what is shown or decides about a count (see `rows.checksum`). NULL: by a version without them.
        "ALTER TABLE field ADD COLUMN checksum INTEGER",
        "ALTER TABLE slide ADD COLUMN scale_checksum INTEGER",
        "ALTER TABLE slide ADD COLUMN given_checksum INTEGER",
        "ALTER TABLE measure ADD COLUMN checksum INTEGER",
    ),
    (
        # The form of the cells (see `rows.pack_morphology`). NULL: by a version that did not measure it.
        "ALTER TABLE cells ADD COLUMN morphology BLOB",
    ),
    ("ALTER TABLE decision ADD COLUMN checksum INTEGER",),
    (
        # What a person said of a place in a content (see `store.corrections`). Nothing is deleted here.
        """
        CREATE TABLE correction (
            correction_key INTEGER PRIMARY KEY,    -- in order of time
            slide_key INTEGER NOT NULL REFERENCES slide,
            content TEXT NOT NULL,                 -- SHA-256 of the field
            kind TEXT NOT NULL,                    -- see `corrections.Kind`
            what TEXT NOT NULL,
            x_min_px REAL,                         -- NULL, as the other sides: about the whole field
            y_min_px REAL,
            x_max_px REAL,
            y_max_px REAL,
            who TEXT NOT NULL,
            at TEXT NOT NULL,
            was TEXT NOT NULL,
            bundle_id TEXT NOT NULL,
            undone_by TEXT NOT NULL,
            undone_at TEXT NOT NULL,               -- '': it holds
            checksum INTEGER NOT NULL
        )
        """,
        "CREATE INDEX correction_content ON correction (slide_key, content)",
    ),
)


class DamagedError(UnavailableError):
    """The ledger's file is damaged. `recovery.keep_aside` makes room for a new one."""


class Database:
    """One connection to a ledger's file."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection
        self._is_forced: bool | None = None  # nothing was committed since the last forced write
        self._is_full_sync: bool | None = None

    @classmethod
    def for_writing(cls, out: Path) -> Self:
        """Opens the ledger of an output folder, which exists, and creates or migrates it where needed.

        Raises `DamagedError` where the file is damaged, and `UnavailableError` where the folder cannot be
        written, or the file is no ledger, or a newer version's.
        """
        path = out / FILE_NAME
        with _guard(path):
            database = cls._connected(path, path)
            with database._closing_on_error():
                database._prepare()
        return database

    @classmethod
    def for_reading(cls, out: Path) -> Self:
        """Opens the ledger of an output folder for reading only, while another process may write it.

        Raises `DamagedError` where the file is damaged, and `UnavailableError` where there is none, it cannot
        be read, or this version does not read it.
        """
        path = out / FILE_NAME
        if is_gone(path):
            advice = "give the --out of a run or of the service"
            raise UnavailableError(f"{path_text(out)}: no {FILE_NAME} there", advice)
        with _guard(path):
            uri = f"{path.absolute().as_uri()}?mode=ro"
            if not Path(f"{path}-wal").exists() and not os.access(out, os.W_OK):
                # No process has it open, and SQLite cannot make its log in a folder that is read-only.
                uri += "&immutable=1"
            database = cls._connected(path, uri, uri=True)
            with database._closing_on_error():
                database._check_version(oldest=len(MIGRATIONS))
        return database

    @classmethod
    def _connected(cls, path: Path, name: str | Path, *, uri: bool = False) -> Self:
        connection = sqlite3.connect(name, uri=uri, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        connection.create_function("natural_key", 1, natural_key, deterministic=True)
        return cls(path, connection)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drops what was not committed."""
        self.connection.close()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turns what SQLite reports into an error that says what to do."""
        with _guard(self.path):
            yield

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One change. It joins the open transaction, and takes back all of it when it fails."""
        with self.guard():
            db = self.connection
            if not db.in_transaction:
                # Forced to the disk later, by `commit`. SQLite takes this only between transactions.
                self._sync(full=False)
                db.execute("BEGIN IMMEDIATE")
                # First, so that a change may take it away.
                db.execute("INSERT OR IGNORE INTO flag VALUES ('tables-stale')")
            try:
                yield db
            except BaseException:
                self.rollback()
                raise

    def commit(self) -> None:
        """Makes everything written so far last, through a power cut."""
        with self.guard():
            self.commit_lightly()
            if self._is_forced is None:
                # A process that was killed may have left changes that were not forced. It left this flag.
                self._is_forced = self.first("SELECT 1 FROM flag WHERE name = 'tables-stale'") is None
            if not self._is_forced:
                # One change that is forced to the disk takes everything before it along.
                self._sync(full=True)
                self.connection.execute("INSERT OR REPLACE INTO flag VALUES ('forced')")
                self._is_forced = True

    def commit_lightly(self) -> None:
        """Makes everything written so far outlive this process, not yet a power cut."""
        with self.guard():
            if self.connection.in_transaction:
                self.connection.execute("COMMIT")
                self._is_forced = False

    def rollback(self) -> None:
        """Takes back what was not committed."""
        with suppress(sqlite3.Error):  # a full disk has rolled it back already
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def rows(self, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """Yields the rows of a query."""
        with self.guard():
            # Not `yield from`: that closes the cursor of a generator left early, maybe after the database.
            for row in self.connection.execute(sql, values):  # noqa: UP028
                yield row

    def first(self, sql: str, *values: object) -> tuple[Any, ...] | None:
        """Returns the first row. Unlike a generator, nothing of it is left to be closed later."""
        with self.guard():
            cursor = self.connection.execute(sql, values)
            row: tuple[Any, ...] | None = cursor.fetchone()
            cursor.close()
            return row

    def _sync(self, *, full: bool) -> None:
        if full is not self._is_full_sync:
            self.connection.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._is_full_sync = full

    def _prepare(self) -> None:
        db = self.connection
        self._check_version(oldest=0)
        # Where the file system has no shared memory SQLite keeps its rollback journal, as safe but slower.
        db.execute("PRAGMA journal_mode = WAL").fetchone()
        self._sync(full=True)
        db.execute("PRAGMA foreign_keys = ON")
        while (version := self._pragma("user_version")) < len(MIGRATIONS):
            db.execute("BEGIN IMMEDIATE")
            try:
                # Asked again inside: another process may have migrated while this one waited.
                if self._pragma("user_version") == version:
                    for statement in MIGRATIONS[version]:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {version + 1}")
                db.execute("COMMIT")
            except BaseException:
                self.rollback()
                raise

    def _pragma(self, name: str) -> int:
        return int(self.connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _check_version(self, *, oldest: int) -> None:
        name, version = path_text(self.path), self._pragma("user_version")
        n_objects = self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if self._pragma("application_id") != _APPLICATION_ID and n_objects:
            raise UnavailableError(f"{name} is a database of another program", "choose another output folder")
        if version > len(MIGRATIONS):
            versions = f"ledger version {version}; this one knows {len(MIGRATIONS)}"
            advice = "update rbc-edge, or choose another output folder"
            raise UnavailableError(f"{name} was written by a newer rbc-edge ({versions})", advice)
        if version < oldest:
            what = f"{name} was written by an older rbc-edge (ledger version {version})"
            advice = "run `rbc-edge run` or the service on it once; that brings it up to date"
            raise UnavailableError(what, advice)


def is_gone(path: Path) -> bool:
    """Tells that no file is there. A folder that we may not read hides its files, it does not lose them."""
    try:
        path.stat()
    except OSError as error:
        return error.errno in (ENOENT, ENOTDIR)
    return False


def has_changed(path: Path, size_bytes: int, mtime_ns: int) -> bool:
    """Tells that a file is gone, or another one. False where we may not look."""
    try:
        status = path.stat()
    except OSError:
        return is_gone(path)
    return (status.st_size, status.st_mtime_ns) != (size_bytes, mtime_ns)


def error_kind(error: sqlite3.Error) -> int:
    """Returns SQLite's primary result code of an error; 0 where it has none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        kind, name = error_kind(error), path_text(path)
        if kind in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT):
            advice = "move it aside and run again: the images are counted again"
            raise DamagedError(f"{name}: the ledger is damaged: {error}", advice) from error
        if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what, advice = f"{name}: another program holds the ledger", "close it and run again"
            raise UnavailableError(what, advice) from error
        if kind == sqlite3.SQLITE_IOERR:
            advice = f"{BROKEN_DISK}; what was counted is kept"
            if error.sqlite_errorcode not in (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_FSYNC):
                advice = f"free space, or ask for a larger quota; if there is enough, {advice}"
        elif kind == sqlite3.SQLITE_FULL:
            advice = "free space on the disk and run again: what was counted is kept"
        elif kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            advice = "check the permissions of the output folder"
        else:
            raise
        raise UnavailableError(f"{name}: cannot write: {error}", advice) from error

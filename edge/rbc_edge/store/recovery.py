"""A ledger that is damaged: found by reading all of it, and moved aside without losing anything."""

import sqlite3
import zlib
from contextlib import suppress
from itertools import chain
from pathlib import Path

from rbc_edge.errors import unavailable
from rbc_edge.store.rows import unpack_cells, unpack_counts
from rbc_edge.store.schema import FILE_NAME, Database, error_kind
from rbc_edge.text import path_text


def damage(database: Database) -> str:
    """Reads the whole ledger and returns what is wrong with it. Empty when nothing is.

    SQLite's own check reads the structure. The packed cells and counts are read as well, because SQLite
    takes any bytes there. Raises `UnavailableError` where it cannot be read now.
    """
    db = database.connection
    with database.guard():
        try:
            found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
            if found != "ok":
                return found
            for (packed,) in db.execute("SELECT packed FROM cells"):
                unpack_cells(packed)
            for (counts,) in db.execute("SELECT counts FROM field WHERE counts IS NOT NULL"):
                unpack_counts(counts)
        except (sqlite3.DatabaseError, zlib.error, ValueError) as error:
            busy = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR)
            if isinstance(error, sqlite3.Error) and error_kind(error) in busy:
                raise
            return str(error)
    return ""


def keep_aside(out: Path, stamp: str) -> Path:
    """Moves a damaged ledger out of the way, with the tables made from it. Nothing is lost.

    Counts of images that are no longer in the camera's folder stand in those tables only. They go along
    because the new ledger knows nothing of them: left there, tables and ``slides.csv`` would disagree.

    No process may have the ledger open. `stamp` is a time, for the name of the new folder, which is returned.
    Raises `UnavailableError` where the output folder cannot be written.
    """
    what = f"{path_text(out)}: cannot keep the damaged ledger aside"
    with unavailable(what, "check permissions and free space"):
        aside = _new_folder(out / f"damaged-{stamp}")
        for table in [*out.glob("*.csv"), *out.glob("cells/*.csv")]:
            kept = aside / table.relative_to(out)
            kept.parent.mkdir(exist_ok=True)
            table.rename(kept)
        # The ledger last, and its log before it: a process killed in between finds it damaged again.
        for suffix in ("-shm", "-wal", "-journal", ""):
            with suppress(FileNotFoundError):
                Path(f"{out / FILE_NAME}{suffix}").rename(aside / f"{FILE_NAME}{suffix}")
    return aside


def _new_folder(path: Path) -> Path:
    names = chain([path.name], (f"{path.name}_{number}" for number in range(2, 1000)))
    for folder in map(path.with_name, names):
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    return path

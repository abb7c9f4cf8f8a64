"""A ledger that is damaged: found by reading all of it, and moved aside without losing anything."""

import re
import sqlite3
import zlib
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Final

from rbc_edge.errors import UnavailableError, unavailable
from rbc_edge.store.rows import FIELD_COLUMNS, field_row, unpack_cells
from rbc_edge.store.schema import FILE_NAME, Database, error_kind
from rbc_edge.text import path_text

_CODE: Final = re.compile(r"error code[ =]*([0-9]+)")  # of SQLite, in what its check says


def damage(database: Database) -> str:
    """Reads the whole ledger and returns what is wrong with it. Empty when nothing is.

    SQLite's own check reads the structure. The packed cells and the values of each row are read as well,
    because SQLite takes any bytes there. Raises `UnavailableError` where it cannot be read now: a disk that
    fails is no damaged ledger.
    """
    db = database.connection
    with database.guard():
        try:
            found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
            if any(int(code) & 0xFF == sqlite3.SQLITE_IOERR for code in _CODE.findall(found)):
                what = f"{path_text(database.path)}: cannot be read now: {found}"
                raise UnavailableError(what, "check the disk (dmesg); the ledger may be whole")
            if found != "ok":
                return found
            for row in db.execute(f"SELECT {FIELD_COLUMNS} FROM field JOIN slide USING (slide_key)"):
                field_row(row)
            for (packed,) in db.execute("SELECT packed FROM cells"):
                unpack_cells(packed)
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

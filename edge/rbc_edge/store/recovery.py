"""A ledger that is damaged: found by reading all of it, and moved aside without losing anything."""

import re
import sqlite3
import zlib
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final

from rbc_edge.errors import UnavailableError, unavailable
from rbc_edge.store import corrections
from rbc_edge.store.rows import (
    FIELD_COLUMNS,
    GIVEN_COLUMNS,
    RowError,
    Status,
    checksum,
    checksum_of,
    counts_by_rule,
    field_row,
    given_of,
    is_sound,
    pack_counts,
    place_of,
    raw_row,
    unpack_cells,
)
from rbc_edge.store.schema import FILE_NAME, Database, error_kind, is_gone
from rbc_edge.text import count_text, path_text
from rbc_edge.values import Cells

_FIELDS: Final = f"SELECT field_key, {FIELD_COLUMNS} FROM field LEFT JOIN slide USING (slide_key)"
_CELLS: Final = "SELECT field_key, packed, morphology FROM cells"
_SLIDES: Final = f"SELECT slide_id, {GIVEN_COLUMNS} FROM slide"
_DECISIONS: Final = (
    "SELECT slide_id, decision.checksum, decision.slide_key, content, kind, reason"
    " FROM decision LEFT JOIN slide USING (slide_key)"
)
_CORRECTIONS: Final = f"SELECT slide_id, {corrections.COLUMNS} FROM correction JOIN slide USING (slide_key)"
_WITHOUT_CELLS: Final = (
    "SELECT field_key FROM field WHERE status = 'ok' AND settings <> ?"
    " AND NOT EXISTS (SELECT 1 FROM cells WHERE cells.field_key = field.field_key)"
)
_NAMELESS: Final = "SELECT slide_key FROM slide WHERE typeof(slide_id) <> 'text'"
_RECOUNT: Final = "damaged"  # in place of a row's settings: no version is like it
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
            if found := _broken_structure(database):
                return found
            for _, *row in db.execute(_FIELDS):
                field_row(tuple(row))
            for row in db.execute(_SLIDES):
                given_of(*row)
            if not all(map(_is_decision, db.execute(_DECISIONS))):
                return "a decision about a field is damaged"
            if not all(map(_is_correction, db.execute(_CORRECTIONS))):
                return "a correction is damaged"
            if db.execute(_NAMELESS).fetchone():
                return "the name of a slide is damaged"
            for packed in db.execute("SELECT packed, morphology FROM cells"):
                unpack_cells(*packed)
        except (sqlite3.DatabaseError, zlib.error, ValueError, TypeError, RowError) as error:
            busy = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR)
            if isinstance(error, sqlite3.Error) and error_kind(error) in busy:
                raise
            return str(error)
    return ""


def mend(database: Database, *, deep: bool) -> list[str]:
    """Repairs damaged rows of a ledger whose file is whole. Returns what was found, a line each.

    A value is taken from the packed cells, or from another field of the slide, where the checksum of the row
    says that it is the right one. Else the field fails until its image is counted again, which the next
    session does where the image is still there. Packed cells that are damaged are dropped and counted again;
    the counts in their row stand. A damaged scale that a person gave is dropped.

    With `deep`, the structure of the file and all cells are read, too; a broken structure is left alone
    (`keep_aside`). Without it, that takes a second for 100,000 fields. Nothing is committed.
    """
    if deep and _broken_structure(database):
        return []
    with database.guard():
        nameless = list(database.rows(_NAMELESS))
        if nameless:
            with database.change() as db:
                for table in ("field", "decision", "slide"):
                    db.executemany(f"DELETE FROM {table} WHERE slide_key = ?", nameless)
        damaged = [(key, raw_row(tuple(row))) for key, *row in database.rows(_FIELDS) if not _is_row(row)]
        unread = [key for key, *packed in database.rows(_CELLS) if deep and _cells(*packed) is None]
        unread += [key for (key,) in database.rows(_WITHOUT_CELLS, _RECOUNT)]
        given = [row[0] for row in database.rows(_SLIDES) if not _is_given(row)]
        decided = [row for row in database.rows(_DECISIONS) if not _is_decision(row)]
        bad = [(row[1], row[0]) for row in database.rows(_CORRECTIONS) if not _is_correction(row)]
        lost = "the name of a slide was damaged in the ledger: counted again where the images are there"
        said = [lost] if nameless else []
        if damaged or unread or given or decided or bad:
            with database.change() as db:
                for slide_id, _, *key, _, _ in decided:
                    db.execute("DELETE FROM decision WHERE slide_key = ? AND content = ?", key)
                    what = f"slide {slide_id or 'unknown'}: what was decided about a field was damaged"
                    said.append(f"{what}: look at its table, and exclude or forget the field again")
                for key, slide_id in bad:
                    db.execute("DELETE FROM correction WHERE correction_key = ?", (key,))
                    said.append(f"slide {slide_id}: a correction was damaged: make it again")
                for slide_id in given:
                    db.execute(
                        "UPDATE slide SET given_diameter_px = NULL, given_source = NULL,"
                        " given_checksum = NULL, given_by_run = 0 WHERE slide_id = ?",
                        (slide_id,),
                    )
                    said.append(f"slide {slide_id}: the scale given for it was damaged: give it again")
                for key in unread:
                    db.execute("DELETE FROM cells WHERE field_key = ?", (key,))
                    db.execute("UPDATE field SET settings = ? WHERE field_key = ?", (_RECOUNT, key))
                if unread:
                    said.append(
                        f"the cells of {count_text(len(unread), 'field')} were damaged: counted again"
                    )
                for key, of in damaged:
                    what = f"slide {of['slide_id']}: the ledger's row of {of['fov']} was damaged"
                    said.append(f"{what}: {_mended(database, key, of)}")
    return said


def _is_place(kept: Any) -> bool:
    try:
        return bool(place_of(kept))
    except (TypeError, ValueError):
        return False


def _mended(database: Database, key: int, of: dict[str, Any]) -> str:
    """Repairs one row; inside a change. Returns how."""
    db = database.connection
    if of["slide_id"] is None or not _is_place(of["path"]):  # of no slide, or no file: its image is new
        db.execute("DELETE FROM field WHERE field_key = ?", (key,))
        return "counted again where the image is there"
    path = place_of(of["path"])[0]
    if not isinstance(of["fov"], str) and not is_sound(of | {"fov": path.stem}):
        db.execute("DELETE FROM field WHERE field_key = ?", (key,))
        return "counted again where the image is there"
    others: dict[str, set[Any]] = {}
    query = f"{_FIELDS} WHERE slide_id = ? AND field_key <> ?"
    for _, *row in db.execute(query, (of["slide_id"], key)):
        for name, value in raw_row(tuple(row)).items():
            others.setdefault(name, set()).add(value)
    packed = db.execute("SELECT packed FROM cells WHERE field_key = ?", (key,)).fetchone()
    cells = _cells(packed[0]) if packed else None
    if cells is not None:
        others["counts"] = {pack_counts(counts_by_rule(cells))}
    others["fov"] = {path.stem, path.name}
    for name in of.keys() & others.keys() - {"slide_id", "checksum", "reason", "decided"}:
        for value in others[name]:
            if of["checksum"] is not None and is_sound(of | {name: value}):
                db.execute(f"UPDATE field SET {name} = ? WHERE field_key = ?", (value, key))
                return "repaired"
    db.execute("DELETE FROM cells WHERE field_key = ?", (key,))
    becomes = "it is counted again where the image is there"
    if is_gone(path):
        becomes = "its count is lost, because its image is gone: put it back, or `rbc-edge forget` it"
    message = f"its row in the ledger was damaged; {becomes}"
    new = {
        **dict.fromkeys(("width_px", "height_px", "cell_diameter_px", "scale_source", "n_refused", "counts")),
        **dict.fromkeys(("quality_flags", "captured_at", "sha256"), ""),
        **dict(  # noqa: C408 -- keywords: the test of the documented failures looks for them
            status=str(Status.FAILED), failure="damaged-row", message=message, mtime_ns=-1, elapsed_ms=0.0
        ),
    }
    # A person decided about its content: so the digest is not what was damaged.
    query = "SELECT 1 FROM decision NATURAL JOIN field WHERE field_key = ? AND content = sha256"
    if db.execute(query, (key,)).fetchone():
        del new["sha256"]
    new["checksum"] = checksum_of(of | new)
    values = ", ".join(f"{name} = ?" for name in new)
    db.execute(f"UPDATE field SET {values} WHERE field_key = ?", (*new.values(), key))
    # It has one count less, maybe for good.
    db.execute("UPDATE slide SET is_unsettled = 1 WHERE slide_id = ?", (of["slide_id"],))
    return becomes


def _broken_structure(database: Database) -> str:
    """Returns what SQLite's own check finds. Raises `UnavailableError` where the file cannot be read now."""
    db = database.connection
    db.execute("PRAGMA ignore_check_constraints = ON")  # a value that cannot be is damage of its row
    found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    db.execute("PRAGMA ignore_check_constraints = OFF")
    if any(int(code) & 0xFF == sqlite3.SQLITE_IOERR for code in _CODE.findall(found)):
        what = f"{path_text(database.path)}: cannot be read now: {found}"
        raise UnavailableError(what, "check the disk (dmesg); the ledger may be whole")
    return "" if found == "ok" else found


def _is_row(row: list[Any]) -> bool:
    of = raw_row(tuple(row))
    with suppress(RowError):
        return is_sound(of) if of["checksum"] is not None else bool(field_row(tuple(row)))
    return False


def _is_given(row: tuple[Any, ...]) -> bool:
    with suppress(RowError):
        given_of(*row)
        return True
    return False


def _is_decision(row: tuple[Any, ...]) -> bool:
    slide_id, expected, *decision = row
    known = decision[2] in (Status.EXCLUDED, Status.FORGOTTEN) and isinstance(decision[3], str)
    return slide_id is not None and known and expected in (None, checksum(*decision))


def _is_correction(row: tuple[Any, ...]) -> bool:
    with suppress(RowError):
        corrections.correction_of(row[1:], row[0])
        return True
    return False


def _cells(packed: bytes, morphology: bytes | None = None) -> Cells | None:
    with suppress(ValueError, TypeError, zlib.error):
        return unpack_cells(packed, morphology)
    return None


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
        for table in chain.from_iterable(out.glob(f"{folder}*.csv") for folder in ("", "cells/", "shapes/")):
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

"""Reading the ledger: slides, fields, cells, sums. Nothing here changes a row."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Self

from rbc_edge.errors import UsageError
from rbc_edge.store import rows
from rbc_edge.store.recovery import damage
from rbc_edge.store.rows import FieldRow, SlideScale, Status, Tally, Version
from rbc_edge.store.schema import Database, is_gone
from rbc_edge.text import one_line
from rbc_edge.values import Cells, Scale

_TABLES = f"field JOIN slide USING (slide_key) {rows.DECISION}"
_FIELDS = f"SELECT {rows.SHOWN_COLUMNS} FROM {_TABLES} WHERE {rows.IS_SHOWN}"


@dataclass(frozen=True, slots=True)
class SlideContents:
    """What of a slide is known before it is counted."""

    counted: dict[int, frozenset[str]]  # digests of what the version asked for has counted, by file size
    failed: frozenset[str]  # names of the fields that failed


def _unknown(what: str, name: str, known: Collection[str]) -> UsageError:
    near = get_close_matches(name, known, n=3, cutoff=0.3)
    named = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(known)[:20])}"
    return UsageError(one_line(what), one_line(named) if known else "it is empty")


class Reader:
    """The queries of a ledger that is open for reading or writing."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self.path = database.path

    @classmethod
    def open(cls, out: Path) -> Self:
        """Opens the ledger of an output folder for reading only. Raises as `Database.for_reading`."""
        return cls(Database.for_reading(out))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def changes(self) -> int:
        """Returns a number that changes when another connection has changed the ledger."""
        version = self._db.first("PRAGMA data_version")
        return int(version[0]) if version else 0

    def note(self, name: str) -> str:
        """Returns a note kept with the counts. Empty when there is none."""
        row = self._db.first("SELECT content FROM note WHERE name = ?", name)
        return "" if row is None else str(row[0])

    def damage(self) -> str:
        """Reads the whole ledger and returns what is wrong with it (`recovery.damage`)."""
        return damage(self._db)

    def tables_are_stale(self) -> bool:
        """Tells whether something changed since `Ledger.tables_written`, also after a kill."""
        return self._db.first("SELECT 1 FROM flag WHERE name = 'tables-stale'") is not None

    def check_known(self, slide_id: str, fovs: Collection[str] = ()) -> None:
        """Raises `UsageError` for a slide, or fields of it, that no row is of. Forgotten ones are known."""
        if slide_id not in (slides := self.slide_ids()):
            raise _unknown(f"no slide {slide_id!r} in the ledger", slide_id, slides)
        query = "SELECT fov FROM field JOIN slide USING (slide_key) WHERE slide_id = ? ORDER BY fov"
        known = [row[0] for row in self._db.rows(query, slide_id)] if fovs else []
        for fov in fovs:
            if fov not in known:
                raise _unknown(f"no field of view {fov!r} in slide {slide_id!r}", fov, known)

    # -- slides and fields ------------------------------------------------------------------------------

    def slide_ids(self) -> list[str]:
        """Returns every slide ever seen, in order of first sight, also those that have no fields now."""
        return [row[0] for row in self._db.rows("SELECT slide_id FROM slide ORDER BY slide_key")]

    def slide_scale(self, slide_id: str) -> SlideScale | None:
        """Returns the scale estimated for a slide. None when it never was, or where its row is damaged."""
        query = "SELECT scale_checksum, cell_diameter_px, scale_source, scale_bundle_id, scale_fields"
        row = self._db.first(f"{query} FROM slide WHERE slide_id = ? AND scale_source IS NOT NULL", slide_id)
        if row is None or row[0] not in (None, rows.checksum(*row[1:])):
            return None
        with suppress(ValueError):  # without a checksum
            return SlideScale(rows.scale_of(*row[1:3]), *row[3:])
        return None

    def given_scale(self, slide_id: str) -> Scale | None:
        """Returns the scale that a person gave for a slide. None when nobody did.

        Raises `RowError` where it is damaged.
        """
        query = "SELECT given_checksum, given_diameter_px, given_source FROM slide WHERE slide_id = ?"
        row = self._db.first(f"{query} AND coalesce(given_source, given_checksum) IS NOT NULL", slide_id)
        if row is not None and row[0] not in (None, rows.checksum(*row[1:])):
            raise rows.RowError(slide_id)
        return None if row is None else rows.scale_of(*row[1:])

    def contents(self, slide_id: str, version: Version) -> SlideContents:
        """Returns what a slide holds: contents that this version has counted, and failures."""
        counted: dict[int, set[str]] = {}
        failed = set()
        columns = "fov, size_bytes, sha256, status, bundle_id, settings"
        query = f"SELECT {columns} FROM field JOIN slide USING (slide_key) WHERE slide_id = ?"
        for fov, size_bytes, sha256, status, bundle_id, settings in self._db.rows(query, slide_id):
            if status == Status.FAILED:
                failed.add(fov)
            elif status == Status.OK and (bundle_id, settings) == (version.bundle_id, version.settings):
                counted.setdefault(size_bytes, set()).add(sha256)
        return SlideContents({n: frozenset(found) for n, found in counted.items()}, frozenset(failed))

    def has_size_elsewhere(self, slide_id: str, size_bytes: int) -> bool:
        """Tells whether another slide has a counted file of this size: only then it may be the same one."""
        query = "SELECT 1 FROM field JOIN slide USING (slide_key) WHERE size_bytes = ? AND slide_id <> ?"
        return self._db.first(f"{query} AND status = 'ok' LIMIT 1", size_bytes, slide_id) is not None

    def moved(self, slide_id: str, digests: Collection[str], version: Version) -> frozenset[str]:
        """Returns those contents that the version has counted in another slide, where the file is gone."""
        found = set()
        columns = "sha256, path FROM field JOIN slide USING (slide_key)"
        query = f"SELECT {columns} WHERE sha256 = ? AND slide_id <> ? AND status = 'ok'"
        query += " AND bundle_id = ? AND settings = ?"
        for digest in digests:
            rows_ = self._db.rows(query, digest, slide_id, version.bundle_id, version.settings)
            found |= {sha256 for sha256, path in rows_ if is_gone(Path(os.fsdecode(path)))}
        return frozenset(found)

    def places(self, slide_id: str) -> list[tuple[str, Path, str]]:
        """Returns (fov, path, digest) of a slide's counted fields that are not forgotten."""
        query = f"SELECT fov, path, sha256 FROM {_TABLES} WHERE slide_id = ? AND status = 'ok'"
        found = self._db.rows(f"{query} AND {rows.IS_SHOWN}", slide_id)
        return [(fov, Path(os.fsdecode(path)), sha256) for fov, path, sha256 in found]

    def shared(self, slide_id: str) -> dict[str, int]:
        """Returns how many of a slide's counted contents are counted in each other slide, too."""
        query = (
            "SELECT slide.slide_id, count(*) FROM field"
            " JOIN slide AS this ON this.slide_key = field.slide_key"
            " JOIN field AS other ON other.sha256 = field.sha256 AND other.slide_key <> field.slide_key"
            " JOIN slide ON slide.slide_key = other.slide_key"
            f" {rows.DECISION} LEFT JOIN decision AS theirs"
            " ON theirs.slide_key = other.slide_key AND theirs.content = other.sha256"
            " WHERE this.slide_id = ? AND field.status = 'ok' AND other.status = 'ok'"
            " AND decision.kind IS NULL AND theirs.kind IS NULL GROUP BY slide.slide_key"
        )
        return dict(self._db.rows(query, slide_id))

    def fields(self, slide_id: str) -> Iterator[FieldRow]:
        """Yields a slide's fields of view in order of their names."""
        return map(rows.field_row, self._db.rows(f"{_FIELDS} AND slide_id = ? ORDER BY fov", slide_id))

    def all_fields(self) -> Iterator[FieldRow]:
        """Yields every field of view, slide by slide in order of first sight, in order of their names."""
        return map(rows.field_row, self._db.rows(f"{_FIELDS} ORDER BY field.slide_key, fov"))

    def field(self, slide_id: str, fov: str) -> FieldRow | None:
        """Returns one field of view. None when the ledger does not know it."""
        row = self._db.first(f"{_FIELDS} AND slide_id = ? AND fov = ?", slide_id, fov)
        return None if row is None else rows.field_row(row)

    def cells(self, slide_id: str) -> Iterator[tuple[str, Cells]]:
        """Yields (fov, cells) of a slide's counted fields in order of their names."""
        tables = f"cells JOIN {_TABLES.replace('JOIN', 'USING (field_key) JOIN', 1)}"
        query = f"SELECT fov, packed FROM {tables} WHERE slide_id = ? AND kind IS NULL ORDER BY fov"
        for fov, packed in self._db.rows(query, slide_id):
            yield fov, rows.unpack_cells(packed)

    # -- sums -------------------------------------------------------------------------------------------

    def tally(self) -> Tally:
        """Sums up the ledger."""
        query = f"SELECT {rows.SHOWN_STATUS}, count(*) FROM field {rows.DECISION} GROUP BY 1"
        n = dict(self._db.rows(query))
        newest = self._db.first("SELECT analyzed_at FROM field ORDER BY field_key DESC LIMIT 1")
        has_field = "EXISTS (SELECT 1 FROM field WHERE field.slide_key = slide.slide_key)"
        ((n_slides,),) = self._db.rows(f"SELECT count(*) FROM slide WHERE {has_field}")
        ok, failed, duplicates = (n.get(s, 0) for s in (Status.OK, Status.FAILED, Status.DUPLICATE))
        excluded = n.get(Status.EXCLUDED, 0)
        return Tally(ok, failed, duplicates, n_slides, newest[0] if newest else "", excluded)

    def n_gone(self) -> int:
        """Returns how many counted fields have no file any more. A folder that cannot be listed hides its."""
        names: dict[str, set[str]] = defaultdict(set)
        query = f"SELECT path FROM {_TABLES} WHERE status = 'ok' AND kind IS NULL"
        for (path,) in self._db.rows(query):
            folder, name = os.path.split(os.fsdecode(path))
            names[folder].add(name)
        n = 0
        for folder, known in names.items():  # one list is faster than many questions, on a share
            try:
                n += len(known.difference(os.listdir(folder)))  # noqa: PTH208
            except (FileNotFoundError, NotADirectoryError):
                n += len(known)
            except OSError:
                continue
        return n

    def failures(self, limit: int) -> list[FieldRow]:
        """Returns the fields of view that could not be counted, the newest first, at most `limit`."""
        query = f"{_FIELDS} AND status = 'failed' AND kind IS NULL ORDER BY field_key DESC LIMIT ?"
        return [rows.field_row(row) for row in self._db.rows(query, limit)]

    def failure_counts(self) -> dict[str, int]:
        """Returns how many fields of view failed for each reason, the most frequent first."""
        query = (
            f"SELECT failure, count(*) FROM field {rows.DECISION} WHERE status = 'failed' AND kind IS NULL"
        )
        query += " GROUP BY failure"
        return dict(self._db.rows(f"{query} ORDER BY count(*) DESC, failure"))

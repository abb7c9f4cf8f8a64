"""Reading the ledger: slides, fields, cells, sums. Nothing here changes a row."""

import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import nan
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from rbc_edge.errors import UsageError
from rbc_edge.store import corrections, rows
from rbc_edge.store.corrections import Corrected, Correction, corrected
from rbc_edge.store.recovery import damage
from rbc_edge.store.rows import FieldRow, RowError, SlideScale, Status, Tally, Version
from rbc_edge.store.schema import Database, is_gone
from rbc_edge.text import in_order, one_line
from rbc_edge.values import Cells, InboxFile, Measure, Scale

_T = TypeVar("_T")
_AT_A_TIME: Final = 100
_VALUES_A_QUERY: Final = 500  # SQLite takes 999 values in a statement, everywhere
_TABLES = f"field JOIN slide USING (slide_key) {rows.DECISION}"
_BY_NAME = "natural_key(fov), fov"  # 17 before 103
_FIELDS = f"SELECT {rows.SHOWN_COLUMNS} FROM {_TABLES} WHERE {rows.IS_SHOWN}"


def portions(values: Collection[_T]) -> Iterator[Sequence[_T]]:
    """Yields values, as many together as one query takes."""
    everything = list(values)
    for at in range(0, len(everything), _VALUES_A_QUERY):
        yield everything[at : at + _VALUES_A_QUERY]


@dataclass(frozen=True, slots=True)
class SlideContents:
    """What of a slide is known before it is counted."""

    counted: dict[int, frozenset[str]]  # digests of what the version asked for has counted, by file size
    failed: frozenset[str]  # digests of what failed


def _unknown(what: str, name: str, known: Collection[str]) -> UsageError:
    near = get_close_matches(name, known, n=3, cutoff=0.3)
    named = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(in_order(known)[:20])}"
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

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Shows one state of the ledger, while another process writes it."""
        with self._db.guard():
            self._db.connection.execute("BEGIN")
            self.slide_ids()  # the first reading begins it
        try:
            yield
        finally:
            self._db.rollback()

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
        query = f"SELECT fov FROM field JOIN slide USING (slide_key) WHERE slide_id = ? ORDER BY {_BY_NAME}"
        known = [row[0] for row in self._db.rows(query, slide_id)] if fovs else []
        for fov in fovs:
            if fov not in known:
                raise _unknown(f"no field of view {fov!r} in slide {slide_id!r}", fov, known)

    # -- slides and fields ------------------------------------------------------------------------------

    def slide_ids(self) -> list[str]:
        """Returns every slide ever seen, in order of their names. Those without fields stand last."""
        has_field = "EXISTS (SELECT 1 FROM field WHERE field.slide_key = slide.slide_key)"
        query = f"SELECT slide_id FROM slide ORDER BY NOT {has_field}, slide_id"
        return [row[0] for row in self._db.rows(query)]

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
        row = self._db.first(f"SELECT {rows.GIVEN_COLUMNS} FROM slide WHERE slide_id = ?", slide_id)
        return None if row is None else rows.given_of(slide_id, *row)

    def contents(self, slide_id: str, version: Version) -> SlideContents:
        """Returns what a slide holds: contents that this version has counted, and failures."""
        counted: dict[int, set[str]] = {}
        failed = set()
        columns = "size_bytes, sha256, status, bundle_id, settings"
        query = f"SELECT {columns} FROM field JOIN slide USING (slide_key) WHERE slide_id = ?"
        for size_bytes, sha256, status, bundle_id, settings in self._db.rows(query, slide_id):
            if status == Status.FAILED:
                failed.add(sha256)
            elif status == Status.OK and (bundle_id, settings) == (version.bundle_id, version.settings):
                counted.setdefault(size_bytes, set()).add(sha256)
        return SlideContents({n: frozenset(found) for n, found in counted.items()}, frozenset(failed))

    def n_pages(self, files: Sequence[InboxFile], bundle_id: str) -> dict[InboxFile, int]:
        """Returns how many fields files hold, where that is known: a file has not changed.

        A file without pages is known by what the bundle at work recorded: an older program knew no pages.
        """
        of_path = {rows.place(file): file for file in files}
        query = (
            f"WITH given (path) AS (VALUES {', '.join('(?)' for _ in of_path)})"
            " SELECT given.path, field.path, size_bytes, mtime_ns FROM given JOIN field"
            " ON field.path >= given.path AND field.path < CAST(given.path || x'01' AS BLOB)"
            " WHERE field.path <> given.path OR (failure <> 'unsupported' AND bundle_id = ?)"
        )
        known: dict[InboxFile, int] = {}
        for path, place, *about in self._db.rows(query, *of_path, bundle_id) if of_path else ():
            file = of_path[path]
            if about == [file.size_bytes, file.mtime_ns]:
                known[file] = rows.place_of(place)[2]
        return known

    def counted(self, slide_id: str, bundle_id: str) -> Iterator[tuple[str, InboxFile]]:
        """Yields what a bundle has counted in a slide, by digest in ascending order, with its file."""
        query = (
            "SELECT sha256, path, fov, size_bytes, mtime_ns FROM field JOIN slide USING (slide_key)"
            " WHERE slide_id = ? AND status = 'ok' AND bundle_id = ? AND sha256 > ? ORDER BY sha256 LIMIT ?"
        )
        sha256 = ""
        # Some at a time: the first few are enough, and the ledger may be written to meanwhile.
        while found := list(self._db.rows(query, slide_id, bundle_id, sha256, _AT_A_TIME)):
            for sha256, path, fov, size_bytes, mtime_ns in found:
                file, *page = rows.place_of(path)
                yield sha256, InboxFile(file, slide_id, fov, size_bytes, mtime_ns, *page)

    def measures(self, digests: Collection[str], bundle_id: str, start: int) -> dict[str, Measure]:
        """Returns what a few contents say about the scale of their slide, as far as they were measured.

        A damaged measure is left out: it is made again.
        """
        query = "SELECT checksum, sha256, cell_diameter_px, n_cells, n_pixels FROM measure"
        query += " WHERE bundle_id = ? AND start = ? AND sha256 IN"
        return {
            sha256: Measure(nan if px is None else px, *rest)
            for expected, sha256, px, *rest in self._among(query, digests, bundle_id, start)
            if expected == rows.checksum(sha256, bundle_id, start, px, *rest)
        }

    def unsettled(self) -> list[str]:
        """Returns the slides of which the scale has to be looked at again (`Ledger.settle`)."""
        query = "SELECT slide_id FROM slide WHERE is_unsettled ORDER BY slide_id"
        return [row[0] for row in self._db.rows(query)]

    def sizes_elsewhere(self, slide_id: str, sizes: Collection[int]) -> set[int]:
        """Returns those sizes of files that other slides have counted: only then may it be the same file."""
        query = "SELECT DISTINCT size_bytes FROM field JOIN slide USING (slide_key)"
        query += " WHERE slide_id <> ? AND status = 'ok' AND size_bytes IN"
        return {row[0] for some in portions(sizes) for row in self._among(query, some, slide_id)}

    def moved(self, slide_id: str, digests: Collection[str]) -> dict[str, tuple[str, Version]]:
        """Returns those contents that another slide has counted, where the file is gone.

        With that slide, and the version that counted.
        """
        query = "SELECT sha256, slide_id, bundle_id, settings, path FROM field JOIN slide USING (slide_key)"
        query += " WHERE slide_id <> ? AND status = 'ok' AND sha256 IN"
        return {
            sha256: (other, Version(*version))
            for some in portions(digests)
            for sha256, other, *version, path in self._among(query, some, slide_id)
            if is_gone(rows.place_of(path)[0])
        }

    def places(self, slide_id: str) -> list[tuple[str, Path, str]]:
        """Returns (fov, path, digest) of a slide's counted fields that are not forgotten."""
        query = f"SELECT fov, path, sha256 FROM {_TABLES} WHERE slide_id = ? AND status = 'ok'"
        found = self._db.rows(f"{query} AND {rows.IS_SHOWN}", slide_id)
        return [(fov, rows.place_of(path)[0], sha256) for fov, path, sha256 in found]

    def counted_at(self, paths: Sequence[Path]) -> list[InboxFile]:
        """Returns those files of which the ledger has a count, as it knows them."""
        found = []
        for some in portions([os.fsencode(path) for path in paths]):
            query = (
                f"WITH given (path) AS (VALUES {', '.join('(?)' for _ in some)})"
                " SELECT field.path, slide_id, fov, size_bytes, mtime_ns FROM given JOIN field"
                " ON field.path >= given.path AND field.path < CAST(given.path || x'01' AS BLOB)"
                " JOIN slide USING (slide_key) WHERE status = 'ok'"
            )
            for kept, *rest in self._db.rows(query, *some):
                path, *page = rows.place_of(kept)
                found.append(InboxFile(path, *rest, *page))
        return found

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
        return self._rows(f"{_FIELDS} AND slide_id = ? ORDER BY {_BY_NAME}", slide_id, of=slide_id)

    def all_fields(self) -> Iterator[FieldRow]:
        """Yields every field of view, slide by slide in order of first sight, in order of their names."""
        return self._rows(f"{_FIELDS} ORDER BY field.slide_key, {_BY_NAME}")

    def field(self, slide_id: str, fov: str) -> FieldRow | None:
        """Returns one field of view. None when the ledger does not know it."""
        return next(self._rows(f"{_FIELDS} AND slide_id = ? AND fov = ?", slide_id, fov, of=slide_id), None)

    def cells(self, slide_id: str) -> Iterator[tuple[str, Cells]]:
        """Yields (fov, cells) of a slide's counted fields in order of their names, as they are counted."""
        return ((fov, found.kept) for fov, found in self.corrected(slide_id))

    def corrected(self, slide_id: str, fov: str | None = None) -> Iterator[tuple[str, Corrected]]:
        """Yields (fov, cells with their corrections) of a slide's counted fields, or of one."""
        return self._corrected(self.corrections(slide_id), slide_id, fov)

    def corrections(
        self, slide_id: str | None = None, *, undone: bool = False
    ) -> dict[tuple[str, str], list[Correction]]:
        """Returns the corrections of a slide, or of all, by slide and digest, in order of time.

        With `undone`, those that were taken back, too. Raises `RowError` where one is damaged.
        """
        query = f"SELECT slide_id, {corrections.COLUMNS} FROM correction JOIN slide USING (slide_key) WHERE 1"
        query += "" if undone else " AND undone_at = ''"
        query += "" if slide_id is None else " AND slide_id = ?"
        found: dict[tuple[str, str], list[Correction]] = defaultdict(list)
        given = () if slide_id is None else (slide_id,)
        for slide, *row in self._db.rows(f"{query} ORDER BY correction_key", *given):
            each = corrections.correction_of(tuple(row), slide)
            found[slide, each.content].append(each)
        return dict(found)

    def _rows(self, query: str, *values: object, of: str | None = None) -> Iterator[FieldRow]:
        """Yields the rows of a query of `_FIELDS`, with the corrections of their cells."""
        said = self.corrections(of)
        for row in map(rows.field_row, self._db.rows(query, *values)):
            found = None
            if row.status is Status.OK and (row.slide_id, row.sha256) in said:
                # None: damaged cells were dropped, until they are counted again.
                found = next(self._corrected(said, row.slide_id, row.fov), None)
            yield row if found is None else _with_corrections(row, found[1])

    def _corrected(
        self, said: Mapping[tuple[str, str], Sequence[Correction]], slide_id: str, fov: str | None
    ) -> Iterator[tuple[str, Corrected]]:
        tables = f"cells JOIN {_TABLES.replace('JOIN', 'USING (field_key) JOIN', 1)}"
        columns = "packed, morphology, fov, sha256, width_px, height_px, field.cell_diameter_px"
        query = f"SELECT {columns} FROM {tables} WHERE slide_id = ? AND kind IS NULL"
        query += f" ORDER BY {_BY_NAME}" if fov is None else " AND fov = ?"
        given = (slide_id,) if fov is None else (slide_id, fov)
        for packed, form, name, sha256, *size_px in self._db.rows(query, *given):
            try:
                cells = rows.unpack_cells(packed, form)
            except (ValueError, TypeError, zlib.error) as error:
                raise RowError(slide_id, name) from error
            yield name, corrected(cells, said.get((slide_id, sha256), ()), *size_px)

    def _among(self, query: str, some: Collection[object], *values: object) -> Iterator[tuple[Any, ...]]:
        return self._db.rows(f"{query} ({', '.join('?' * len(some))})", *values, *some)

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
        query = f"SELECT path FROM {_TABLES} WHERE status = 'ok' AND kind IS NULL AND typeof(path) = 'blob'"
        for (path,) in self._db.rows(query):
            folder, name = os.path.split(rows.place_of(path)[0])
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

    def lost(self) -> dict[str, int]:
        """Returns how many counts each slide has lost: their rows were damaged, and their images are gone."""
        query = f"SELECT slide_id, path FROM {_TABLES} WHERE failure = 'damaged-row' AND kind IS NULL"
        places = self._db.rows(f"{query} ORDER BY slide_id")
        return dict(Counter(slide_id for slide_id, path in places if is_gone(rows.place_of(path)[0])))

    def failure_counts(self) -> dict[str, int]:
        """Returns how many fields of view failed for each reason, the most frequent first."""
        query = (
            f"SELECT failure, count(*) FROM field {rows.DECISION} WHERE status = 'failed' AND kind IS NULL"
        )
        query += " GROUP BY failure"
        return dict(self._db.rows(f"{query} ORDER BY count(*) DESC, failure"))


def _with_corrections(row: FieldRow, found: Corrected) -> FieldRow:
    return replace(
        row,
        counts=found.counts(),
        n_corrected=found.n_corrected,
        n_lost=len(found.lost),
        reviewed_by=found.reviewed_by,
        corrections=found.digest,
    )

"""What has been counted, and the rules that no image counts twice or gets lost.

The ledger is one SQLite file in the output folder. Every table is a view of it. Identity is content: an image
is its slide and the SHA-256 of its bytes. Its path and name are attributes that may change.

The way of the data: `plan` says what is to do, `begin` notes what is about to be opened, `record` writes down
what a look at a file gave, `commit` makes it last.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

from rbc_edge.store.queries import Reader, portions
from rbc_edge.store.rows import (
    DECISION,
    ESTIMATED,
    FIELD_COLUMNS,
    NO_FIELDS,
    OTHER_FORMAT,
    Attempt,
    FieldRow,
    Look,
    Plan,
    Recorded,
    Status,
    Version,
    column_values,
    counts_by_rule,
    decision_values,
    field_row,
    given_of,
    pack_cells,
    pack_counts,
    pack_morphology,
    place,
    place_of,
    places_in,
)
from rbc_edge.store.schema import Database, has_changed, is_gone
from rbc_edge.text import better_formats, path_text
from rbc_edge.values import InboxFile

_PROCESS: Final = uuid4().hex  # not its number: that comes again
RECOUNT: Final = "scale changed"  # in place of a row's settings: no version is like it
_ACCESS_FAILURES: Final = ("unreadable", "vanished")  # the file itself may be whole


class Ledger:
    """Plans, records, and nothing else changes a row.

    One process at a time records images (`outdir.writing`). Others may read at the same time, and change a
    row in a short transaction of their own (`retry`). Writes gather in one transaction until `commit`. What
    was not committed when the process dies never happened. Every method leaves the rows consistent, so a
    commit may follow any of them.

    The output folder must exist. The queries of `reader` see what is not committed yet.

    Raises:
        DamagedError: The file is damaged.
        UnavailableError: The folder cannot be written, or the file is no ledger, or a newer version's.
    """

    def __init__(self, out: Path) -> None:
        self.database = Database.for_writing(out)
        self.reader = Reader(self.database)
        self._recorded: list[bytes] = []  # paths, of which `attempt` is to be told before the next commit
        self._slide_keys: dict[str, int] = {}
        self._is_decided: bool | None = None  # about anything; None: to be asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was not committed."""
        self.database.close()

    # -- the way of the data ----------------------------------------------------------------------------

    def plan(self, files: Sequence[InboxFile], version: Version, *, force: bool = False) -> Plan:
        """Says which files need a look. One query for 500 files.

        A file needs none when nothing about it, the bundle or the settings has changed. A file of the same
        name elsewhere is looked at: the folder was moved, or it is another image that a camera's clock of two
        seconds and a format of one size make look the same. A failed image is not tried again until it
        changes, except where the failure was about access. A duplicate is looked at again when its original
        is gone, or is no longer counted by this version. Where a slide has a given scale, that one counts and
        not the version's. What a person has excluded or forgotten is done like the others. With `force`,
        every file needs a look. Raises `RowError` where a given scale is damaged.
        """
        done: dict[InboxFile, Status] = {}
        renamed: set[InboxFile] = set()  # known under another slide or name, too
        interrupted: dict[InboxFile, Attempt] = {}
        recorded = set(self._recorded)
        self._is_decided = None
        for portion in portions(files):
            of_path = {place(f): f for f in portion}
            for row in self._known(list(of_path)):
                file = of_path[row[0]]
                if not force and (status := _done_as(file, row, version)) is not None:
                    done[file] = status
                if row[1] is not None and row[1:3] != (file.slide_id, file.fov):
                    renamed.add(file)
                attempt = row[11:15]
                if attempt[:2] == (file.size_bytes, file.mtime_ns) and row[0] not in recorded:
                    interrupted[file] = Attempt(*attempt[2:])
        for file in renamed:
            done.pop(file, None)
        return Plan(done, tuple(f for f in files if f not in done), interrupted)

    def begin(self, files: Sequence[InboxFile], *, sandbox: bool = False) -> None:
        """Notes, before they are opened, that images are being tried. Recording one takes its note away.

        Committed at once, so that the note outlives the process, but not forced to the disk: an image that
        kills the process leaves the system's memory alone, and a forced write for each image would be the
        most expensive step on a memory card. With `sandbox`, they are about to be tried in a process of their
        own. That is rare, and forced, because the computer itself may go down.
        """
        with self.database.change() as db:
            self._take_notes_away()
            if sandbox:
                db.executemany("UPDATE attempt SET trials = trials + 1 WHERE path = ?", _paths(files))
            elif files:
                values = [(place(f), f.size_bytes, f.mtime_ns, 1, 0, _PROCESS) for f in files]
                db.execute(
                    f"INSERT INTO attempt VALUES {_places(values)} ON CONFLICT (path) DO UPDATE SET"
                    " n = CASE WHEN size_bytes = excluded.size_bytes AND mtime_ns = excluded.mtime_ns"
                    " THEN n + (process <> excluded.process) ELSE 1 END,"
                    " size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns,"
                    " process = excluded.process",
                    [value for row in values for value in row],
                )
        if sandbox:
            self.database.commit()
        else:
            self.database.commit_lightly()

    def end(self, files: Sequence[InboxFile], *, sandbox: bool = False) -> None:
        """Takes back `begin` for images that were left alone, or that a sandbox run survived."""
        done = "UPDATE attempt SET trials = 0" if sandbox else "DELETE FROM attempt"
        with self.database.change() as db:
            db.executemany(f"{done} WHERE path = ?", _paths(files))

    def record(
        self, look: Look, version: Version, analyzed_at: str, *, force: bool = False
    ) -> Recorded | None:
        """Writes down what a look at a file gave, and applies the rules of identity, in one change.

        * Same name, same content: size and time are noted.
        * The content is known under another name of the slide, of which the file is gone: it was renamed,
          and the count moves along.
        * The content is known in another slide, of which the file is gone: the count moves along, with what a
          person decided about it. Where the two slides have not the same scale, it is analyzed again.
        * The other name's file is there: the later name, in sort order, is the duplicate. Where that is the
          known one, its count moves to this file.
        * A failure of access leaves an earlier count alone when the file has vanished.

        `analyzed_at` is ISO 8601, UTC. With `force`, no count is taken as valid.

        Returns:
            What the ledger now says. None: the look gave no cells because the content was known, and what
            knew it does not count any more; the file has to be analyzed.
        """
        with self.database.change():
            recorded = _Record(self, look, version, analyzed_at, force=force).made()
            return recorded and self._as_decided(recorded)

    def commit(self) -> None:
        """Makes everything written so far last, through a power cut."""
        if self._recorded:
            with self.database.change():
                self._take_notes_away()
        self.database.commit()

    # -- beside the counts ------------------------------------------------------------------------------

    def drop_gone(self, slide_ids: Collection[str]) -> set[str]:
        """Takes out rows of slides that count nothing and have no file: deleted copies, unfinished files.

        An unfinished file often gets another name. What could never be read is taken out of every slide: it
        may be anything, anywhere. Returns the slides that lost a row.
        """
        query = "SELECT field_key, slide_id, sha256, path FROM field JOIN slide USING (slide_key)"
        query += " WHERE status IN ('failed', 'duplicate') AND failure NOT IN ('crash', 'damaged-row')"
        gone = [
            (key, slide_id)
            for key, slide_id, sha256, path in self.database.rows(query)
            if (slide_id in slide_ids or not sha256) and _has_left(place_of(path)[0])
        ]
        if gone:
            with self.database.change() as db:
                db.executemany("DELETE FROM field WHERE field_key = ?", [(key,) for key, _ in gone])
        return {slide_id for _, slide_id in gone}

    def keep_note(self, name: str, content: str) -> None:
        """Keeps a note with the counts."""
        if self.reader.note(name) != content:
            with self.database.change() as db:
                db.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, content))

    def tables_written(self) -> None:
        """Notes, and commits, that every table shows the ledger as it is."""
        if self.reader.tables_are_stale():
            with self.database.change() as db:
                db.execute("DELETE FROM flag WHERE name = 'tables-stale'")
        self.commit()

    def retry(self, slide_id: str | None = None, fov: str | None = None) -> int:
        """Has failed fields of view looked at again, of a slide or of all, by the next run or the service.

        Returns how many.
        """
        with self.database.change() as db:
            return db.execute(
                "UPDATE field SET mtime_ns = -1 WHERE status = 'failed' AND (?1 IS NULL OR slide_key ="
                " (SELECT slide_key FROM slide WHERE slide_id = ?1)) AND (?2 IS NULL OR fov = ?2)",
                (slide_id, fov),
            ).rowcount

    # -- inside -----------------------------------------------------------------------------------------

    def _known(self, paths: list[bytes]) -> list[tuple[Any, ...]]:
        """The plan's query: what is known of each path, its duplicate's original, and its open attempt."""
        return list(
            self.database.rows(
                f"WITH given (path) AS (VALUES {_places([(path,) for path in paths])})"
                " SELECT given.path, slide.slide_id, field.fov, field.size_bytes, field.mtime_ns,"
                " field.status, field.failure, field.bundle_id, field.settings,"
                " original.bundle_id, original.settings,"
                " attempt.size_bytes, attempt.mtime_ns, attempt.n, attempt.trials, decision.kind,"
                " original.path, slide.given_checksum, slide.given_diameter_px, slide.given_source,"
                " slide.given_by_run"
                " FROM given"
                f" LEFT JOIN field ON field.path = given.path {DECISION}"
                " LEFT JOIN slide ON slide.slide_key = field.slide_key"
                " LEFT JOIN field AS original ON field.status = 'duplicate' AND original.status = 'ok'"
                " AND original.slide_key = field.slide_key AND original.sha256 = field.sha256"
                " LEFT JOIN attempt ON attempt.path = given.path AND attempt.process <> ?",
                *paths,
                _PROCESS,
            )
        )

    def _as_decided(self, recorded: Recorded) -> Recorded:
        """Returns what was recorded, as a person has decided about its content."""
        if not self._has_decisions():
            return recorded
        row = recorded.row
        shown = self.database.first(
            f"SELECT kind FROM field JOIN slide USING (slide_key) {DECISION} WHERE slide_id = ? AND fov = ?",
            *(row.slide_id, row.fov),
        )
        if shown is None or shown[0] is None:
            return recorded
        return replace(recorded, row=replace(row, status=Status(shown[0])))

    def _has_decisions(self) -> bool:
        if self._is_decided is None:
            self._is_decided = self.database.first("SELECT 1 FROM decision") is not None
        return self._is_decided

    def _slide_key(self, slide_id: str) -> int:
        """Returns a slide's key; inside a change."""
        key = self._slide_keys.get(slide_id)
        if key is None:
            db = self.database.connection
            db.execute("INSERT OR IGNORE INTO slide (slide_id) VALUES (?)", (slide_id,))
            row = db.execute("SELECT slide_key FROM slide WHERE slide_id = ?", (slide_id,)).fetchone()
            key = self._slide_keys[slide_id] = int(row[0])
        return key

    def _take_notes_away(self) -> None:
        """Ends the attempts of images that were recorded; inside a change."""
        paths, self._recorded = list(dict.fromkeys(self._recorded)), []
        for some in portions(paths):
            self.database.connection.execute(f"DELETE FROM attempt WHERE path IN {_places([some])}", some)


_KeyedRow = tuple[int, FieldRow]


class _Record:
    """One call of `Ledger.record`, with the rows that the file has to do with."""

    def __init__(
        self, ledger: Ledger, look: Look, version: Version, analyzed_at: str, *, force: bool
    ) -> None:
        self._ledger = ledger
        self._db = ledger.database.connection
        self._look = look
        self._file = file = look.file
        self._version = version
        self._analyzed_at = analyzed_at
        self._force = force
        self._slide_key = ledger._slide_key(file.slide_id)
        self._here: _KeyedRow | None = None  # of the same name
        self._original: _KeyedRow | None = None  # of the same content, and counted
        self._elsewhere: _KeyedRow | None = None  # of the same content, counted in a slide that lost the file
        self._outdated: list[_KeyedRow] = []  # of the same file, or of the same broken one, by another name
        self._has_passed_over = False
        in_file = places_in(file.path)
        for key, decision, *values in self._db.execute(
            f"SELECT field_key, decision.kind, {FIELD_COLUMNS} FROM field JOIN slide USING (slide_key)"
            f" {DECISION} WHERE (field.slide_key = ?1 AND fov = ?2) OR sha256 = ?3"
            " OR (path >= ?4 AND path < ?5)",
            (self._slide_key, file.fov, look.sha256 or None, *in_file),
        ):
            row = field_row(tuple(values))
            is_same_file = in_file[0] <= place(row) < in_file[1]
            if is_same_file and row.page != file.page:
                # Another page of the file, or it had other pages than it has now.
                if not 0 < row.page <= file.n_pages or not file.page:
                    self._outdated.append((key, row))
                continue
            if row.slide_id != file.slide_id:
                has_left = is_same_file or is_gone(row.path)
                is_alike = bool(row.sha256) and row.sha256 == look.sha256
                if is_alike and row.status is Status.OK and not look.failure:
                    if has_left and decision != Status.FORGOTTEN:
                        self._elsewhere = key, row
                elif has_left:
                    self._outdated.append((key, row))
                continue
            is_here = (row.slide_id, row.fov) == (file.slide_id, file.fov)
            is_alike = row.slide_id == file.slide_id and bool(row.sha256) and row.sha256 == look.sha256
            if is_here:
                self._here = key, row
            if is_alike and row.status is Status.OK and not look.failure:
                self._original = key, row
            elif not is_here and (
                is_same_file
                # The same broken file under its former name is not a second failure.
                or (is_alike and row.status is Status.FAILED and is_gone(row.path))
            ):
                self._outdated.append((key, row))

    def made(self) -> Recorded | None:
        """Applies the rules; returns what the ledger now says."""
        look, file = self._look, self._file
        if look.failure:
            here = [row for _, row in (*([self._here] if self._here else []), *self._outdated)]
            kept = [row for row in here if row.status is Status.OK and row.slide_id == file.slide_id]
            if look.failure == "vanished" and kept:
                self._outdated.clear()
                return self._recorded(kept[0], is_new=False)
            status = Status.DUPLICATE if look.failure in NO_FIELDS else Status.FAILED
            return self._replaced(status, failure=look.failure, message=look.message)
        if (known_as := self._of_a_shot_that_left()) is not None:
            return self._replaced(Status.DUPLICATE, failure=OTHER_FORMAT, message=known_as.message)
        if self._original is None:
            if self._elsewhere is not None:
                moved = self._from_other_slide(*self._elsewhere)
                if moved is not None:
                    return moved
            return None if look.result is None else self._replaced(Status.OK)
        key, known = self._original
        is_elsewhere = known.path != file.path and not is_gone(known.path)
        if known.version == self._version:
            if known.fov < file.fov and is_elsewhere:
                return self._replaced(Status.DUPLICATE, message=f"same content as {known.fov}")
            if not self._force:
                return self._moved(key, known, is_elsewhere=is_elsewhere)
        if look.result is None:
            return None
        self._forget([self._original])
        if known.fov != file.fov and is_elsewhere:
            self._pass_over(known)
        return self._replaced(Status.OK)

    def _from_other_slide(self, key: int, known: FieldRow) -> Recorded | None:
        """Brings a count, or only what was decided about it, into this slide. None: it has to be analyzed."""
        old_key = self._ledger._slide_key(known.slide_id)
        old = (old_key, known.sha256)
        query = "SELECT kind, reason FROM decision WHERE slide_key = ? AND content = ?"
        if decision := self._db.execute(query, old).fetchone():
            values = decision_values(self._slide_key, known.sha256, *decision)
            self._db.execute("INSERT OR REPLACE INTO decision VALUES (?, ?, ?, ?, ?)", values)
            self._db.execute("DELETE FROM decision WHERE slide_key = ? AND content = ?", old)
        corrected = "UPDATE correction SET slide_key = ? WHERE slide_key = ? AND content = ?"
        self._db.execute(corrected, (self._slide_key, *old))
        self._ledger._is_decided = None
        if self._look.result is None and known.version == self._version and not self._force:
            columns = "given_diameter_px, given_source"
            if self._version.settings == ESTIMATED:
                columns += ", cell_diameter_px, scale_source"
            query = f"SELECT DISTINCT {columns} FROM slide WHERE slide_key IN (?, ?)"
            if len(self._db.execute(query, (old_key, self._slide_key)).fetchall()) == 1:
                return self._moved(key, known, is_elsewhere=False)
        if self._look.result is not None:
            self._outdated.append((key, known))
        return None

    def _moved(self, key: int, known: FieldRow, *, is_elsewhere: bool) -> Recorded:
        """Gives a count that is valid the name, path, size and time of this file."""
        file = self._file
        here = self._here if self._here and self._here[0] != key else None
        self._forget([*self._outdated, here])
        moved = replace(
            known,
            slide_id=file.slide_id,
            fov=file.fov,
            path=file.path,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            page=file.page,
            n_pages=file.n_pages,
        )
        values = (file.fov, place(file), file.size_bytes, file.mtime_ns)
        self._db.execute(
            "UPDATE field SET slide_key = ?, fov = ?, path = ?, size_bytes = ?, mtime_ns = ?, checksum = ?"
            " WHERE field_key = ?",
            (self._slide_key, *values, column_values(moved)["checksum"], key),
        )
        if known.fov != file.fov and is_elsewhere:
            self._pass_over(known)
        return self._recorded(moved, is_new=False, was=known)

    def _replaced(self, status: Status, *, failure: str = "", message: str = "") -> Recorded:
        """Writes a new row for this file, in the place of the old ones."""
        self._forget([*self._outdated, self._here])
        row = self._put(self._file, status, failure=failure, message=message)
        if status is Status.OK and self._ledger._has_decisions():
            self._keep_excluded(row)
        if status is not Status.DUPLICATE:
            for key, other in self._other_formats():
                if self._file.path.suffix.lower() in better_formats(other.path.suffix):
                    # Is it the same shot as this one, now?
                    self._db.execute("UPDATE field SET mtime_ns = -1 WHERE field_key = ?", (key,))
                    self._has_passed_over = True
        return self._recorded(row, is_new=status is not Status.DUPLICATE)

    def _keep_excluded(self, row: FieldRow) -> None:
        """Excludes a content that is excluded in a slide where it is no more: two folders swapped names.

        There, its row was replaced, or its file is another one now and is looked at later.
        """
        for reason, path, *about in self._db.execute(
            "SELECT decision.reason, path, size_bytes, mtime_ns FROM decision LEFT JOIN field"
            " ON field.slide_key = decision.slide_key AND sha256 = content"
            " WHERE content = ? AND decision.slide_key <> ? AND kind = 'excluded'",
            (row.sha256, self._slide_key),
        ).fetchall():
            if path is None or has_changed(place_of(path)[0], *about):
                values = decision_values(self._slide_key, row.sha256, "excluded", reason)
                self._db.execute("INSERT OR IGNORE INTO decision VALUES (?, ?, ?, ?, ?)", values)

    def _recorded(self, row: FieldRow, *, is_new: bool, was: FieldRow | None = None) -> Recorded:
        """Ends the attempt, and adds up what else has changed."""
        self._ledger._recorded.append(place(self._file))
        here = [] if self._here is None else [self._here]
        lost = [
            before
            for _, before in (*here, *self._outdated)
            if before.status is Status.OK
            and before.slide_id == row.slide_id
            and (row.status is not Status.OK or row.sha256 != before.sha256)
        ]
        for before in lost:
            if before.sha256 == row.sha256:
                continue
            self._db.execute(
                "INSERT INTO replaced VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(before.slide_id, before.fov, before.sha256, pack_counts(before.counts)),
                    *(before.version.bundle_id, before.version.settings, before.analyzed_at),
                    self._analyzed_at,
                ),
            )
        old = [*(row for _, row in self._outdated), *([was] if was else [])]
        left = frozenset(other.slide_id for other in old if other.slide_id != row.slide_id)
        for slide_id in left:
            self._db.execute("UPDATE slide SET is_unsettled = 1 WHERE slide_id = ?", (slide_id,))
        is_unsettling = bool(lost) or self._has_passed_over
        if row.status is Status.OK and was is None and self._elsewhere is not None:
            return Recorded(row, is_new, left, is_unsettling, moved_from=self._elsewhere[1].slide_id)
        if was is None or (was.slide_id, was.fov) == (row.slide_id, row.fov) or self._has_passed_over:
            return Recorded(row, is_new, left, is_unsettling)
        return Recorded(row, is_new, left, is_unsettling, moved_from=was.slide_id, is_renamed=True)

    def _other_formats(self) -> list[_KeyedRow]:
        """Returns the rows of this slide for files that differ from this one only in their ending.

        The scan gives such files names with their endings. One of them may have left.
        """
        path = self._file.path
        if self._file.page or not (self._file.fov.endswith(path.suffix) or self._here or self._outdated):
            return []
        stem = os.fsencode(path.with_suffix(""))
        rows = self._db.execute(
            f"SELECT field_key, {FIELD_COLUMNS} FROM field JOIN slide USING (slide_key)"
            " WHERE field.slide_key = ? AND path > ? AND path < ?",
            (self._slide_key, stem + b".", stem + b"/"),
        )
        found = [(key, field_row(tuple(values))) for key, *values in rows]
        return [each for each in found if each[1].path.stem == path.stem and each[1].path != path]

    def _of_a_shot_that_left(self) -> FieldRow | None:
        """Returns what is known of this file, where it is a shot that another file, now gone, counts for."""
        for _, row in (*([self._here] if self._here else []), *self._outdated):
            if (row.failure, row.sha256) == (OTHER_FORMAT, self._look.sha256):
                others = (other for _, other in self._other_formats() if other.status is Status.OK)
                return row if any(is_gone(other.path) for other in others) else None
        return None

    def _forget(self, rows: Sequence[_KeyedRow | None]) -> None:
        for key in {row[0] for row in rows if row is not None}:
            self._db.execute("DELETE FROM field WHERE field_key = ?", (key,))

    def _pass_over(self, other: FieldRow) -> None:
        """Makes a row, of which the count now has another name, a duplicate."""
        # mtime -1: it is looked at again when its turn comes, for it may hold something else by now.
        page = other.page, other.n_pages
        file = InboxFile(other.path, other.slide_id, other.fov, other.size_bytes, -1, *page)
        self._put(file, Status.DUPLICATE, message=f"same content as {self._file.fov}")
        self._has_passed_over = True

    def _put(self, file: InboxFile, status: Status, *, failure: str = "", message: str = "") -> FieldRow:
        """Writes the row of a name that is free."""
        look, result = self._look, self._look.result if status is Status.OK else None
        row = FieldRow(
            slide_id=file.slide_id,
            fov=file.fov,
            path=file.path,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            sha256=look.sha256,
            status=status,
            failure=failure,
            message=path_text(message),
            width_px=result.width_px if result else None,
            height_px=result.height_px if result else None,
            scale=result.scale if result else None,
            quality_flags=tuple(result.quality_flags) if result else (),
            captured_at=look.captured_at,
            analyzed_at=self._analyzed_at,
            version=self._version,
            elapsed_ms=look.elapsed_ms,
            counts=counts_by_rule(result.cells) if result else {},
            n_refused=result.n_refused if result else None,
            page=file.page,
            n_pages=file.n_pages,
        )
        values = {"slide_key": self._slide_key, **column_values(row)}
        cursor = self._db.execute(
            f"INSERT INTO field ({', '.join(values)}) VALUES {_places([tuple(values)])}",
            tuple(values.values()),
        )
        if result is not None:
            packed = pack_cells(result.cells), pack_morphology(result.cells.morphology)
            query = "INSERT INTO cells (field_key, packed, morphology) VALUES (?, ?, ?)"
            self._db.execute(query, (cursor.lastrowid, *packed))
        return row


def _done_as(file: InboxFile, row: tuple[Any, ...], version: Version) -> Status | None:
    """Returns what became of a file that needs no look; None where it needs one (`Ledger.plan`)."""
    status, failure, counted_as, original_as = row[5], row[6], row[7:9], row[9:11]
    original_path, *given_columns = row[16:21]
    if row[1] is not None and (given := given_of(row[1], *given_columns)) is not None:
        version = Version.of(version.bundle_id, given)
    counts_as = (version.bundle_id, version.settings)
    is_same = row[1:5] == (file.slide_id, file.fov, file.size_bytes, file.mtime_ns)
    if not is_same or counted_as != counts_as:
        return None
    if status == Status.FAILED and failure in _ACCESS_FAILURES:
        return None
    is_duplicate = status == Status.DUPLICATE and failure not in NO_FIELDS
    if is_duplicate and (original_as != counts_as or is_gone(place_of(original_path)[0])):
        return None
    return Status(row[15] or status)


def _has_left(path: Path) -> bool:
    """Tells that nothing is there, not even a link that points nowhere."""
    return is_gone(path) and not path.is_symlink()


def _paths(files: Sequence[InboxFile]) -> list[tuple[bytes]]:
    return [(place(f),) for f in files]


def _places(rows: Sequence[Sequence[object]]) -> str:
    """Returns the placeholders of a VALUES clause."""
    return ", ".join(f"({', '.join('?' * len(row))})" for row in rows)

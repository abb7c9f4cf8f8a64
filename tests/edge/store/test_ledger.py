import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from math import isnan, nan
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.store import ledger as ledger_module
from rbc_edge.store import schema, slide_scale
from rbc_edge.store.decisions import decide, give_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.store.recovery import damage, keep_aside, mend
from rbc_edge.store.rows import Attempt, FieldRow, Look, Recorded, SlideScale, Status, Tally, Version
from rbc_edge.store.schema import FILE_NAME, DamagedError, Database
from rbc_edge.values import (
    SHAPES,
    Cells,
    Counts,
    Detections,
    FovResult,
    InboxFile,
    Morphology,
    Scale,
    ScaleSource,
)
from rbc_edge.vision.counting import EdgeRule, count

VERSION = Version("bundle-1", "estimated")
WHEN = "2025-01-02T03:04:05Z"


def some_cells(n: int, seed: int = 0) -> Cells:
    rng = np.random.default_rng(seed)
    class_id = rng.integers(0, 3, n).astype(np.int64)
    score = rng.random(n).astype(np.float32)
    return Cells(
        Detections(rng.uniform(0, 700, (n, 4)).astype(np.float32), score, class_id),
        np.where(class_id == 0, rng.random(n), nan).astype(np.float32),
        ((class_id == 0) & (rng.random(n) < 0.5)).astype(np.bool_),
        rng.integers(0, 5, n).astype(np.int64),
        (rng.random((n, 4)) < 0.3).astype(np.bool_),
        Morphology(
            rng.integers(-1, len(SHAPES), n),
            rng.random(n).astype(np.float32),
            rng.random(n) < 0.5,
            *np.where(rng.random((4, n)) < 0.2, nan, rng.random((4, n))).astype(np.float32),
        ),
    )


def a_result(n: int = 5, seed: int = 0) -> FovResult:
    return FovResult(
        640, 480, Scale(41.25, ScaleSource.SLIDE), some_cells(n, seed), ("blurred", "dark"), {}, n
    )


class Desk:
    """One slide's files on disk and the ledger beside them."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder, self.ledger = folder, ledger

    def file(self, fov: str, mtime_ns: int = 1, slide_id: str = "s") -> InboxFile:
        path = self.folder / f"{fov}.png"
        path.touch()
        return InboxFile(path, slide_id, fov, 10, mtime_ns)

    def record(
        self,
        fov: str,
        sha256: str,
        *,
        version: Version = VERSION,
        analyzed_at: str = WHEN,
        force: bool = False,
        **changes: object,
    ) -> Recorded | None:
        look = replace(Look(self.file(fov), sha256, elapsed_ms=1.5), **changes)  # type: ignore[arg-type]
        return self.ledger.record(look, version, analyzed_at, force=force)

    def fail(self, fov: str, sha256: str, failure: str, message: str, **changes: object) -> FieldRow:
        recorded = self.record(fov, sha256, failure=failure, message=message, **changes)  # type: ignore[arg-type]
        assert recorded is not None
        return recorded.row

    def look(self, fov: str, sha256: str, **changes: object) -> str:
        """What a session does with a file that was read; returns what became of it."""
        recorded = self.record(fov, sha256, **changes)  # type: ignore[arg-type]
        if recorded is not None:
            assert not recorded.is_new
            return "recorded"
        recorded = self.record(fov, sha256, result=a_result(), **changes)  # type: ignore[arg-type]
        assert recorded is not None
        assert recorded.is_new
        assert recorded.row == self.ledger.reader.field(recorded.row.slide_id, recorded.row.fov)
        return "analyzed"

    def is_done(self, file: InboxFile, version: Version = VERSION) -> bool:
        plan = self.ledger.plan([file], version)
        assert (file in plan.done) == (file not in plan.to_do)
        return file in plan.done

    def interrupted(self, files: list[InboxFile]) -> dict[InboxFile, Attempt]:
        return dict(self.ledger.plan(files, VERSION).interrupted)

    def shown(self, slide_id: str = "s") -> dict[str, str]:
        return {row.fov: row.status.value for row in self.ledger.reader.fields(slide_id)}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    desk = Desk(tmp_path / "in", Ledger(tmp_path / "out"))
    yield desk
    desk.ledger.close()


@pytest.mark.parametrize("n", [0, 1, 700])
def test_cells_and_counts_come_back_exactly(desk: Desk, n: int) -> None:
    result = a_result(n, seed=n)
    recorded = desk.record("a", "x", captured_at="2024-05-06T07:08:09", result=result)
    assert recorded is not None
    row = desk.ledger.reader.field("s", "a")
    assert row == recorded.row
    assert row is not None
    assert (row.width_px, row.height_px, row.scale) == (640, 480, result.scale)
    assert (row.quality_flags, row.captured_at) == (("blurred", "dark"), "2024-05-06T07:08:09")
    assert (row.path, row.sha256, row.version) == (desk.file("a").path, "x", VERSION)
    assert (row.analyzed_at, row.elapsed_ms) == (WHEN, 1.5)
    assert row.counts == {rule: count(result.cells, rule) for rule in EdgeRule}
    assert row.n_refused == n
    ((fov, cells),) = desk.ledger.reader.cells("s")
    assert fov == "a"
    for name in ("overlap_score", "overlapping", "group", "touches_edge"):
        np.testing.assert_array_equal(getattr(cells, name), getattr(result.cells, name))
    for name in ("xyxy", "score", "class_id"):
        np.testing.assert_array_equal(getattr(cells.detections, name), getattr(result.cells.detections, name))
    for each in fields(Morphology):
        kept, given = (getattr(c.morphology, each.name) for c in (cells, result.cells))
        np.testing.assert_array_equal(kept, given)
        assert kept.dtype == given.dtype


def test_cells_of_a_version_that_did_not_measure_have_no_form(desk: Desk) -> None:
    desk.look("a", "x")
    with desk.ledger.database.change() as db:
        db.execute("UPDATE cells SET morphology = NULL")
    ((_, cells),) = desk.ledger.reader.cells("s")
    assert (cells.morphology.shape == -1).all() and np.isnan(cells.morphology.area_px).all()
    assert damage(desk.ledger.database) == ""


@pytest.mark.parametrize("harm", ["substr(morphology, 1, 20)", "zeroblob(30)"])
def test_a_damaged_form_is_noticed(desk: Desk, harm: str) -> None:
    desk.look("a", "x")
    with desk.ledger.database.change() as db:
        db.execute(f"UPDATE cells SET morphology = {harm}")
    assert damage(desk.ledger.database) != ""


def test_the_ledger_has_ten_public_methods() -> None:
    public = [name for name, value in vars(Ledger).items() if callable(value) and not name.startswith("_")]
    assert len(public) <= 10


def test_only_what_was_committed_lasts(desk: Desk, tmp_path: Path) -> None:
    desk.look("a", "x")
    desk.ledger.commit()
    desk.look("b", "y")
    desk.ledger.close()
    desk.ledger = Ledger(tmp_path / "out")
    assert desk.shown() == {"a": "ok"}


def test_done_is_done_until_file_bundle_or_settings_change(desk: Desk) -> None:
    desk.look("a", "x")
    file = desk.file("a")
    assert desk.is_done(file)
    assert not desk.is_done(replace(file, mtime_ns=2))
    assert not desk.is_done(replace(file, size_bytes=11))
    assert not desk.is_done(file, Version("bundle-2", "estimated"))
    assert not desk.is_done(file, Version("bundle-1", "cell-diameter=40.0"))
    assert not desk.is_done(desk.file("b"))
    elsewhere = file.path.parent / "moved" / file.path.name
    assert not desk.is_done(replace(file, path=elsewhere))


@pytest.mark.parametrize(
    ("failure", "is_done"), [("truncated", True), ("error", True), ("unreadable", False), ("vanished", False)]
)
def test_failed_is_tried_again_only_where_access_failed(desk: Desk, failure: str, is_done: bool) -> None:
    row = desk.fail("a", "", failure, "in words")
    assert (row.status, row.failure, row.message) == (Status.FAILED, failure, "in words")
    assert (row.counts, row.n_refused, row.width_px, row.scale) == ({}, None, None, None)
    assert desk.is_done(desk.file("a")) == is_done
    assert not desk.is_done(desk.file("a", mtime_ns=2))


def test_touched_file_is_not_analyzed_again(desk: Desk) -> None:
    desk.look("a", "x")
    assert desk.look("a", "x", file=desk.file("a", mtime_ns=7)) == "recorded"
    assert desk.is_done(desk.file("a", mtime_ns=7))
    assert len(list(desk.ledger.reader.cells("s"))) == 1


def test_new_content_replaces_the_old(desk: Desk) -> None:
    desk.look("a", "x")
    assert desk.look("a", "y") == "analyzed"
    assert [row.sha256 for row in desk.ledger.reader.fields("s")] == ["y"]
    assert len(list(desk.ledger.reader.cells("s"))) == 1


def test_renamed_file_keeps_its_count(desk: Desk) -> None:
    desk.look("a", "x")
    (desk.folder / "a.png").unlink()
    assert desk.look("b", "x") == "recorded"
    assert desk.shown() == {"b": "ok"}
    assert desk.is_done(desk.file("b"))
    assert [fov for fov, _ in desk.ledger.reader.cells("s")] == ["b"]
    assert desk.ledger.reader.field("s", "b").n_refused == 5  # type: ignore[union-attr]


def test_copy_is_a_duplicate_and_the_first_name_counts_whichever_came_first(desk: Desk) -> None:
    desk.look("b", "x")
    assert desk.look("c", "x") == "recorded"
    assert desk.shown() == {"b": "ok", "c": "duplicate"}
    assert desk.look("a", "x") == "recorded"
    assert desk.shown() == {"a": "ok", "b": "duplicate", "c": "duplicate"}
    assert [fov for fov, _ in desk.ledger.reader.cells("s")] == ["a"]
    assert not desk.is_done(desk.file("b"))  # it is looked at once more: it may have changed
    assert desk.look("b", "x") == "recorded"
    assert desk.is_done(desk.file("b"))
    assert desk.ledger.reader.field("s", "b").message == "same content as a"  # type: ignore[union-attr]


def test_duplicate_counts_itself_when_its_original_changes(desk: Desk) -> None:
    desk.look("a", "x")
    desk.look("b", "x")
    assert desk.is_done(desk.file("b"))
    desk.look("a", "y")
    assert not desk.is_done(desk.file("b"))
    assert desk.look("b", "x") == "analyzed"
    assert desk.shown() == {"a": "ok", "b": "ok"}


def test_two_files_that_swap_names_both_count(desk: Desk) -> None:
    desk.look("a", "x")
    desk.look("b", "y")
    desk.look("a", "y", file=desk.file("a", mtime_ns=5))
    desk.look("b", "x", file=desk.file("b", mtime_ns=5))
    assert {row.fov: (row.sha256, row.status) for row in desk.ledger.reader.fields("s")} == {
        "a": ("y", Status.OK),
        "b": ("x", Status.OK),
    }


def test_other_slide_may_hold_the_same_content(desk: Desk) -> None:
    desk.look("a", "x")
    other = desk.file("copy", slide_id="t")
    assert desk.look("copy", "x", file=other) == "analyzed"
    assert (desk.shown("s"), desk.shown("t")) == ({"a": "ok"}, {"copy": "ok"})


@pytest.mark.parametrize("gone", [False, True])
def test_new_bundle_counts_again_and_still_once(desk: Desk, gone: bool) -> None:
    desk.look("b", "x")
    if gone:
        (desk.folder / "b.png").unlink()
    new = Version("bundle-2", "estimated")
    assert desk.look("a", "x", version=new) == "analyzed"
    assert desk.shown() == ({"a": "ok"} if gone else {"a": "ok", "b": "duplicate"})
    assert desk.look("a", "x", version=new, force=True) == "analyzed"
    assert len(list(desk.ledger.reader.cells("s"))) == 1


def test_the_database_itself_refuses_to_count_a_content_twice(desk: Desk) -> None:
    desk.look("a", "x")
    desk.look("b", "y")
    desk.ledger.commit()
    with (
        sqlite3.connect(desk.ledger.database.path) as other,
        pytest.raises(sqlite3.IntegrityError, match="UNIQUE"),
    ):
        other.execute("UPDATE field SET sha256 = 'x'")
    other.close()


def test_vanished_file_leaves_its_count_and_a_renamed_failure_is_one(desk: Desk) -> None:
    desk.look("a", "x")
    assert desk.fail("a", "", "vanished", "gone").status is Status.OK
    desk.fail("b", "bad", "truncated", "cut")
    (desk.folder / "b.png").unlink()
    desk.fail("c", "bad", "truncated", "cut")
    desk.fail("d", "bad", "truncated", "cut")
    assert desk.shown() == {"a": "ok", "c": "failed", "d": "failed"}


def test_a_file_that_moves_to_another_slide_leaves_the_first(desk: Desk) -> None:
    desk.look("a", "x")
    desk.look("b", "y")
    moved = replace(desk.file("a"), slide_id="t")
    plan = desk.ledger.plan([moved, desk.file("b")], VERSION)
    assert (list(plan.done), plan.to_do) == ([desk.file("b")], (moved,))
    recorded = desk.record("a", "x", file=moved, result=a_result())
    assert recorded is not None
    assert recorded.left == {"s"}
    assert (desk.shown(), desk.shown("t")) == ({"b": "ok"}, {"a": "ok"})
    assert desk.ledger.plan([moved, desk.file("b")], VERSION).to_do == ()


def test_a_file_that_gets_another_name_in_its_slide_keeps_its_count(desk: Desk) -> None:
    """Its path is the same: another slide pattern names it otherwise."""
    desk.look("b", "x")
    renamed = replace(desk.file("b"), fov="c")
    assert desk.look("b", "x", file=renamed) == "recorded"
    assert desk.shown() == {"c": "ok"}
    desk.fail("b", "x", "truncated", "cut")
    assert desk.shown() == {"b": "failed"}


def test_slide_scale_is_kept_with_its_bundle(desk: Desk) -> None:
    assert desk.ledger.reader.slide_scale("s") is None
    desk.look("a", "x")
    assert desk.ledger.reader.slide_scale("s") is None
    slide_scale.keep(desk.ledger, "s", SlideScale(Scale(40.5, ScaleSource.SLIDE), "bundle-1", 3))
    kept = desk.ledger.reader.slide_scale("s")
    assert kept is not None
    assert kept == SlideScale(Scale(40.5, ScaleSource.SLIDE), "bundle-1", 3)
    slide_scale.keep(desk.ledger, "s", SlideScale(Scale(nan, ScaleSource.NONE), "bundle-2", 8))
    kept = desk.ledger.reader.slide_scale("s")
    assert kept is not None
    assert isnan(kept.scale.cell_diameter_px)
    assert desk.ledger.reader.slide_ids() == ["s"]


def test_tables_are_stale_after_a_change_until_written(desk: Desk) -> None:
    assert not desk.ledger.reader.tables_are_stale()
    desk.look("a", "x")
    assert desk.ledger.reader.tables_are_stale()
    desk.ledger.tables_written()
    assert not desk.ledger.reader.tables_are_stale()


def test_path_that_is_not_utf8_survives(desk: Desk) -> None:
    path = desk.folder / "\udcff.png"
    desk.record("a", "x", file=InboxFile(path, "s", "a", 1, 1), result=a_result())
    other = path.with_name("\udcfe.png")
    desk.fail("b", "", "empty", f"{path}: empty", file=InboxFile(other, "s", "b", 1, 1))
    first, second = desk.ledger.reader.fields("s")
    assert first.path == path
    assert second.message.endswith(r"\xff.png: empty")


def test_durability_policy(desk: Desk) -> None:
    pragma = desk.ledger.database.connection.execute
    assert pragma("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert pragma("PRAGMA synchronous").fetchone()[0] == 2
    assert pragma("PRAGMA foreign_keys").fetchone()[0] == 1


def alter(out: Path, statement: str) -> None:
    database = sqlite3.connect(out / FILE_NAME)
    database.execute(statement)
    database.commit()
    database.close()


def test_newer_ledger_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    alter(tmp_path, "PRAGMA user_version = 99")
    with pytest.raises(UnavailableError, match="newer rbc-edge"):
        Ledger(tmp_path)


def test_other_programs_database_is_refused_and_untouched(tmp_path: Path) -> None:
    alter(tmp_path, "CREATE TABLE theirs (x)")
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(UnavailableError, match="another program"):
        Ledger(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_file_that_is_no_database_and_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but long enough to be looked at " * 50)
    with pytest.raises(UnavailableError, match=r"damaged.*move it aside"):
        Ledger(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    ledger = Ledger(tmp_path)
    path = tmp_path / "x.png"
    for i in range(200):
        file = InboxFile(path.with_name(f"{i}.png"), "s", f"{i}", 1, 1)
        ledger.record(Look(file, f"{i}", result=a_result(50)), VERSION, WHEN)
    ledger.commit()
    ledger.close()
    data = bytearray((tmp_path / FILE_NAME).read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(UnavailableError, match="damaged"), Ledger(tmp_path) as damaged:
        list(damaged.reader.fields("s"))


# -- beside a service ------------------------------------------------------------------------------------


def test_an_attempt_outlives_its_process_and_not_its_image(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [desk.file(name) for name in "abc"]
    desk.ledger.begin(files)
    assert desk.interrupted(files) == {}  # our own are no suspects
    desk.ledger.close()  # as death does: nothing is committed on the way out
    desk.ledger = Ledger(tmp_path / "out")
    monkeypatch.setattr(ledger_module, "_PROCESS", "the next process")
    assert desk.interrupted(files) == dict.fromkeys(files, Attempt(1))
    assert desk.interrupted([replace(files[0], mtime_ns=5)]) == {}  # another content
    desk.look("a", "x")
    desk.fail("b", "y", "crash", "brings the program down")
    assert desk.interrupted(files) == {files[2]: Attempt(1)}
    desk.ledger.begin(files, sandbox=True)
    desk.ledger.begin(files, sandbox=True)
    assert desk.interrupted(files) == {files[2]: Attempt(1, 2)}
    desk.ledger.end(files, sandbox=True)
    assert desk.interrupted(files) == {files[2]: Attempt(1)}
    desk.ledger.begin(files[2:])
    desk.ledger.begin(files[2:])  # the same process again is no second death
    monkeypatch.setattr(ledger_module, "_PROCESS", "the third process")
    assert desk.interrupted(files) == {files[2]: Attempt(2)}
    desk.ledger.end(files)
    assert desk.interrupted(files) == {}


def test_a_commit_is_forced_to_the_disk_and_an_attempt_is_not(desk: Desk) -> None:
    said: list[str] = []
    desk.ledger.database.connection.set_trace_callback(said.append)
    desk.ledger.begin([desk.file("a")])
    assert "PRAGMA synchronous = NORMAL" in said
    assert "PRAGMA synchronous = FULL" not in said
    desk.ledger.commit()
    assert "PRAGMA synchronous = FULL" in said
    said.clear()
    desk.ledger.commit()
    assert said == []


def test_a_sandbox_run_is_noted_through_a_power_cut(desk: Desk) -> None:
    """The computer itself may go down in one."""
    desk.ledger.begin([desk.file("a")])
    said: list[str] = []
    desk.ledger.database.connection.set_trace_callback(said.append)
    desk.ledger.begin([desk.file("a")], sandbox=True)
    assert "PRAGMA synchronous = FULL" in said


def test_a_commit_forces_what_a_process_before_left(desk: Desk, tmp_path: Path) -> None:
    desk.look("a", "x")
    desk.ledger.begin([desk.file("b")])
    desk.ledger.close()
    desk.ledger = Ledger(tmp_path / "out")
    said: list[str] = []
    desk.ledger.database.connection.set_trace_callback(said.append)
    desk.ledger.commit()
    assert any(statement.startswith("INSERT OR REPLACE INTO flag") for statement in said)


def test_a_count_that_moves_ends_no_attempt_of_another_image(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.look("b", "x")
    desk.ledger.begin([desk.file("a"), desk.file("b")])
    desk.look("a", "x")
    assert desk.shown() == {"a": "ok", "b": "duplicate"}
    desk.ledger.commit()
    monkeypatch.setattr(ledger_module, "_PROCESS", "the next process")
    assert desk.interrupted([desk.file("a"), desk.file("b")]) == {desk.file("b"): Attempt(1)}


def test_an_image_that_fails_after_all_unsettles_its_copies(desk: Desk) -> None:
    desk.look("a", "x")
    desk.look("b", "x")
    recorded = desk.record("a", "x", failure="error", message="no memory")
    assert recorded is not None
    assert recorded.is_unsettling


def test_a_failure_that_was_renamed_and_counted_is_no_failure_any_more(desk: Desk) -> None:
    desk.fail("a", "x", "error", "no memory")
    (desk.folder / "a.png").unlink()
    assert desk.look("b", "x") == "analyzed"
    assert desk.shown() == {"b": "ok"}


def test_failed_images_are_tried_again_when_asked(desk: Desk) -> None:
    for fov, slide in (("a", "s"), ("b", "s"), ("c", "t")):
        file = replace(desk.file(fov), slide_id=slide)
        desk.fail(fov, fov, "truncated", "cut", file=file)
    desk.look("ok", "x")
    assert desk.is_done(desk.file("a"))
    assert desk.ledger.retry("s", "a") == 1
    assert not desk.is_done(desk.file("a"))
    assert desk.is_done(desk.file("b"))
    assert desk.ledger.retry("nobody") == 0
    assert desk.ledger.retry("s") == 2
    assert desk.ledger.retry() == 3
    assert desk.is_done(desk.file("ok"))


@pytest.mark.parametrize("kind", [Status.EXCLUDED, Status.FORGOTTEN])
def test_what_a_person_decided_holds_for_the_content_until_it_is_undone(desk: Desk, kind: Status) -> None:
    desk.look("a", "x")
    desk.look("b", "y")
    desk.fail("c", "", "empty", "empty")
    before = list(desk.ledger.reader.fields("s"))
    assert decide(desk.ledger, "s", ["a", "c"], kind, reason="blurred") == 2
    rest = {"a": "excluded", "c": "excluded"} if kind is Status.EXCLUDED else {}
    assert desk.shown() == rest | {"b": "ok"}
    assert [fov for fov, _ in desk.ledger.reader.cells("s")] == ["b"]
    tally = desk.ledger.reader.tally()
    assert (tally.n_ok, tally.n_failed, tally.n_excluded) == (1, 0, len(rest))
    assert (desk.ledger.reader.failures(9), desk.ledger.reader.failure_counts()) == ([], {})
    for row in desk.ledger.reader.fields("s"):
        assert row.status is Status.OK or (row.reason, row.counts, row.n_refused) == ("blurred", {}, None)
    # Its file is still there, it is renamed, another bundle counts it: it stays as decided.
    assert desk.ledger.plan([desk.file("a")], VERSION).done == {desk.file("a"): kind}
    new = Version("bundle-2", "estimated")
    recorded = desk.record("a", "x", version=new, result=a_result())
    assert recorded is not None
    assert recorded.row.status is kind
    (desk.folder / "a.png").unlink()
    desk.record("d", "x", version=new)
    assert desk.shown().get("d") == ("excluded" if rest else None)
    assert decide(desk.ledger, "s", [], None) == 3
    counts = [row.counts for row in before]
    assert [row.counts for row in desk.ledger.reader.fields("s")] == [counts[1], counts[2], counts[0]]


@pytest.mark.parametrize("excluded", ["s", "t"])
def test_two_slides_that_swap_names_keep_what_is_excluded(desk: Desk, tmp_path: Path, excluded: str) -> None:
    def put(slide_id: str, content: str) -> None:
        path = tmp_path / slide_id / "a"
        status = path.stat()
        file = InboxFile(path, slide_id, "a", status.st_size, status.st_mtime_ns)
        assert desk.ledger.record(Look(file, content, result=a_result(3)), VERSION, WHEN)

    for slide_id, content in (("s", "one"), ("t", "other")):
        (tmp_path / slide_id).mkdir()
        (tmp_path / slide_id / "a").write_text(content)
        put(slide_id, content)
    decide(desk.ledger, excluded, ["a"], Status.EXCLUDED, reason="bubble")
    (tmp_path / "s").rename(tmp_path / "x")
    (tmp_path / "t").rename(tmp_path / "s")
    (tmp_path / "x").rename(tmp_path / "t")
    desk.ledger.plan([], VERSION)
    put("s", "other")
    put("t", "one")
    shown = {slide_id: desk.ledger.reader.field(slide_id, "a") for slide_id in ("s", "t")}
    assert {slide_id for slide_id, row in shown.items() if row and row.reason} == {"s", "t"} - {excluded}


def test_other_content_under_an_excluded_name_counts(desk: Desk) -> None:
    desk.look("a", "x")
    decide(desk.ledger, "s", [], Status.EXCLUDED)
    desk.look("a", "y")
    assert desk.shown() == {"a": "ok"}


def test_nothing_is_decided_about_what_is_not_known(desk: Desk) -> None:
    desk.look("a", "x")
    desk.ledger.commit()
    with pytest.raises(UsageError, match="no slide 't'"):
        decide(desk.ledger, "t", [], Status.FORGOTTEN)
    with pytest.raises(UsageError, match="no field of view 'b' in slide 's'"):
        decide(desk.ledger, "s", ["a", "b"], Status.FORGOTTEN)
    assert desk.shown() == {"a": "ok"}
    with pytest.raises(UsageError, match="no slide 't'"):
        give_scale(desk.ledger, "t", None)


def test_the_ledger_in_a_few_numbers(desk: Desk) -> None:
    assert desk.ledger.reader.tally() == Tally(0, 0, 0, 0, "")
    desk.look("a", "x")
    desk.look("b", "x")
    desk.fail("c", "", "empty", "empty")
    desk.fail("d", "", "truncated", "cut", analyzed_at="2020-01-01T00:00:00Z")  # the clock was set back
    assert desk.ledger.reader.tally() == Tally(1, 2, 1, 1, "2020-01-01T00:00:00Z")
    assert [row.fov for row in desk.ledger.reader.failures(10)] == ["d", "c"]
    assert [row.fov for row in desk.ledger.reader.failures(1)] == ["d"]
    assert desk.ledger.reader.failure_counts() == {"empty": 1, "truncated": 1}


def test_counted_fields_without_a_file_are_told(desk: Desk, tmp_path: Path) -> None:
    for fov in "abc":
        desk.look(fov, fov)
    desk.fail("d", "", "empty", "empty")
    assert desk.ledger.reader.n_gone() == 0
    for fov in "ad":
        (desk.folder / f"{fov}.png").unlink()
    decide(desk.ledger, "s", ["b"], Status.EXCLUDED)
    assert desk.ledger.reader.n_gone() == 1
    desk.folder.rename(tmp_path / "archive")
    assert desk.ledger.reader.n_gone() == 2


def test_readers_work_beside_the_writer_and_change_nothing(desk: Desk, tmp_path: Path) -> None:
    desk.look("a", "x")
    with Reader.open(tmp_path / "out") as reader:
        assert reader.tally().n_ok == 0
        desk.ledger.commit()
        assert reader.tally().n_ok == 1
        read_only = reader._db
        with pytest.raises(UnavailableError, match="cannot write"), read_only.change() as db:
            db.execute("DELETE FROM field")
    with pytest.raises(UnavailableError, match=r"no ledger\.sqlite3 there"):
        Reader.open(tmp_path)


def test_foreign_changes_are_noticed_and_ones_own_are_not(desk: Desk, tmp_path: Path) -> None:
    before = desk.ledger.reader.changes()
    desk.look("a", "x")
    desk.ledger.commit()
    assert desk.ledger.reader.changes() == before
    with Ledger(tmp_path / "out") as other:
        other.retry()
        other.commit()
    assert desk.ledger.reader.changes() != before


def test_a_scale_that_got_better_has_the_slide_counted_again(desk: Desk) -> None:
    desk.look("a", "x")
    scale = SlideScale(Scale(40.0, ScaleSource.SLIDE), "bundle-1", 4)
    slide_scale.keep(desk.ledger, "s", replace(scale, scale=Scale(41.25, ScaleSource.SLIDE)))
    assert desk.is_done(desk.file("a"))  # it was counted at this one
    slide_scale.keep(desk.ledger, "s", scale)
    assert not desk.is_done(desk.file("a"))
    assert desk.shown() == {"a": "ok"}  # its count stands until then
    assert desk.look("a", "x") == "analyzed"
    assert desk.is_done(desk.file("a"))


def test_notes_are_kept(desk: Desk) -> None:
    assert desk.ledger.reader.note("source") == ""
    desk.ledger.keep_note("source", "/camera")
    desk.ledger.keep_note("source", "/other")
    assert desk.ledger.reader.note("source") == "/other"


def test_ledger_of_the_first_version_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first:
        first.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        Ledger(tmp_path).close()
    with pytest.raises(UnavailableError, match="older rbc-edge"):
        Reader.open(tmp_path)
    with Ledger(tmp_path) as ledger:
        assert ledger.reader.tally().n_ok == 0
        assert ledger.reader.note("x") == ""
    with Reader.open(tmp_path):
        pass


def test_a_ledger_that_0_1_0_wrote_opens_with_its_counts(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        db.executescript(Path(__file__).with_name("ledger_of_0_1_0.sql").read_text(encoding="utf-8"))
    with Ledger(tmp_path) as ledger:
        rows = list(ledger.reader.all_fields())
        found = {f"{row.slide_id}/{row.fov}": row.counts[EdgeRule.ALL] for row in rows if row.counts}
        assert found == {
            name: Counts(n, 0, 0, 0) for name, n in (("s1/a", 3), ("s1/b", 5), ("s1/c", 8), ("s2/a", 6))
        }
        assert {row.fov: row.status for row in rows if not row.counts} == {"b": "duplicate", "c": "failed"}
        assert {row.scale.cell_diameter_px for row in rows if row.scale} == {35.29411697387695}
        cells = dict(ledger.reader.cells("s1"))
        assert {fov: len(each) for fov, each in cells.items()} == {"a": 3, "b": 5, "c": 8}
        assert (damage(ledger.database), mend(ledger.database, deep=True)) == ("", [])
        # A run of the same bundle needs not look at what has not changed.
        kept = rows[0]
        file = InboxFile(kept.path, kept.slide_id, kept.fov, kept.size_bytes, kept.mtime_ns)
        assert ledger.plan([file], kept.version).done == {file: Status.OK}


def test_a_count_of_before_the_second_stage_refused_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:2])
        Ledger(tmp_path).close()
    alter(tmp_path, "INSERT INTO slide (slide_id) VALUES ('s')")
    known = {
        "slide_key": "1", "fov": "'a'", "path": "x'61'", "size_bytes": "1", "mtime_ns": "1", "sha256": "'x'",
        "status": "'ok'", "failure": "''", "message": "''", "width_px": "640", "height_px": "480",
        "quality_flags": "''", "captured_at": "''", "analyzed_at": f"'{WHEN}'", "bundle_id": "'b'",
        "settings": "''", "elapsed_ms": "1.5", "counts": f"x'{'02000000' * 12}'",
    }  # fmt: skip
    alter(tmp_path, f"INSERT INTO field ({', '.join(known)}) VALUES ({', '.join(known.values())})")
    with Ledger(tmp_path) as ledger:
        (row,) = ledger.reader.fields("s")
    assert row.n_refused is None
    assert row.counts[EdgeRule.ALL].n_rbc == 4


def test_damage_is_found_by_reading_everything(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for i in range(50):
            file = InboxFile(tmp_path / f"{i}", "s", f"{i}", 1, 1)
            ledger.record(Look(file, f"{i}", result=a_result(100, seed=i)), VERSION, WHEN)
        ledger.commit()
        assert damage(ledger.database) == ""
    whole = (tmp_path / FILE_NAME).read_bytes()
    n_pages = len(whole) // 4096
    missed = []
    for page in range(1, n_pages):
        data = bytearray(whole)
        data[page * 4096 : (page + 1) * 4096] = b"\x55" * 4096
        (tmp_path / FILE_NAME).write_bytes(data)
        try:
            with Ledger(tmp_path) as ledger:
                if not damage(ledger.database):
                    missed.append(page)
        except DamagedError:
            pass
    assert n_pages > 20
    assert missed == []


def test_a_damaged_ledger_is_kept_aside_with_the_tables_of_before(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for name in (FILE_NAME, f"{FILE_NAME}-wal", "s.csv", "slides.csv", "cells/s.csv"):
        (tmp_path / name).write_text(name)
    aside = keep_aside(tmp_path, "20250102T030405Z")
    assert aside == tmp_path / "damaged-20250102T030405Z"
    kept = {p.relative_to(aside).as_posix(): p.read_text() for p in aside.rglob("*") if p.is_file()}
    names = {FILE_NAME, f"{FILE_NAME}-wal", "s.csv", "slides.csv", "cells/s.csv"}
    assert kept == {name: name for name in names}
    assert not list(tmp_path.glob(f"{FILE_NAME}*"))
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []
    assert keep_aside(tmp_path, "20250102T030405Z").name == "damaged-20250102T030405Z_2"
    Ledger(tmp_path).close()


@pytest.mark.parametrize("change", ["scale_source = 'guess'", "counts = x'0102'"])
def test_a_value_that_cannot_be_is_damage_and_not_a_crash(tmp_path: Path, change: str) -> None:
    with Ledger(tmp_path) as ledger:
        look = Look(InboxFile(tmp_path / "a", "s", "a", 1, 1), "a", result=a_result(10))
        ledger.record(look, VERSION, WHEN)
        ledger.commit()
        assert damage(ledger.database) == ""
        ledger.database.connection.execute(f"UPDATE field SET {change}")
        assert damage(ledger.database)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path) -> None:
    class Failing:
        def execute(self, _: str) -> "Failing":
            return self

        def fetchone(self) -> tuple[str]:
            return ("*** in database main ***\nPage 3: unable to get the page. error code=266",)

    database = Database(tmp_path / FILE_NAME, cast(sqlite3.Connection, Failing()))
    with pytest.raises(UnavailableError, match="the ledger may be whole"):
        damage(database)

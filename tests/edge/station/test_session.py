import csv
import os
import signal
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import count
from math import isnan
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

import pytest
from stand_in import BUNDLE_ID, StandIn, disks, encoded, write_disks

from rbc_edge.errors import BundleError, UnavailableError, UsageError
from rbc_edge.station import job
from rbc_edge.station.inbox import scan
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import Clock, CountOptions, Session, Step, Summary, count_once
from rbc_edge.station.stop import Stop
from rbc_edge.store.decisions import decide, give_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import writing
from rbc_edge.store.rows import Status, unpack_counts
from rbc_edge.store.schema import FILE_NAME, Database
from rbc_edge.values import FieldOfView, FovResult, InboxFile, Measure, Scale, ScaleSource, UInt8
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.views.tables import SlideSummary, Tables
from rbc_edge.vision import image_file
from rbc_edge.vision.counting import EdgeRule

GIVEN = Scale(40.0, ScaleSource.CELL_DIAMETER)


@dataclass
class Station:
    """A camera folder, an output folder, and the last run's analyzer and steps."""

    source: Path
    out: Path
    analyzer: StandIn = field(default_factory=StandIn)
    steps: list[Step] = field(default_factory=list)

    def write(self, name: str, n: int, seed: int = 0) -> None:
        write_disks(self.source / name, n, seed=seed)

    def run(
        self,
        *paths: Path,
        bundle_id: str = BUNDLE_ID,
        analyzer: StandIn | None = None,
        stop: Stop | None = None,
        on_step: Callable[[Step], None] | None = None,
        survives: Callable[[Sequence[Path]], bool | None] | None = None,
        **options: object,
    ) -> Summary:
        self.analyzer, self.steps = analyzer or StandIn(), []
        looks = {name: options.pop(name) for name in ("edges", "cells") if name in options}
        asked = CountOptions(
            self.out,
            AnalyzerRecipe(bundle_id, lambda: self.analyzer),
            views=ViewOptions(**looks),  # type: ignore[arg-type]
            sandbox=None if survives is None else lambda paths, _: survives(paths),
            **options,  # type: ignore[arg-type]
        )
        return count_once(
            paths or (self.source,),
            asked,
            on_step=on_step or self.steps.append,
            stop=stop,
            clock=ticking(),
        )

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def counts(self, name: str) -> dict[str, str]:
        return {row["fov"]: row["n_rbc"] or row["status"] for row in self.table(name)}

    def everything(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.out)): p.read_bytes() for p in sorted(self.out.rglob("*.csv"))}


def ticking() -> Clock:
    """A clock of which every look takes a tenth of a second."""
    seconds = count(step=0.1)
    start = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
    return Clock(lambda: start + timedelta(seconds=int(next(seconds))), lambda: next(seconds))


@pytest.fixture
def station(tmp_path: Path) -> Station:
    station = Station(tmp_path / "camera", tmp_path / "results" / "deep")
    station.write("s1/a.png", 3)
    station.write("s1/b.png", 5)
    station.write("s2/a.png", 0)
    return station


def test_every_image_is_counted_into_its_slides_table(station: Station) -> None:
    summary = station.run(cells=True)
    assert (summary.n_images, summary.n_counted, summary.exit_code) == (3, 3, 0)
    assert (station.counts("s1"), station.counts("s2")) == ({"a": "3", "b": "5"}, {"a": "0"})
    assert [(row["slide_id"], row["n_rbc"]) for row in station.table("slides")] == [("s1", "8"), ("s2", "0")]
    assert [s.slide_id for s in summary.slides] == ["s1", "s2"]
    assert len(station.table("cells/s1")) == 8
    assert [(s.file.fov, s.n_done, s.n_total) for s in station.steps] == [
        ("a", 1, 3),
        ("b", 2, 3),
        ("a", 3, 3),
    ]
    row = station.table("s1")[0]
    assert (row["bundle_id"], row["path"]) == (BUNDLE_ID, str(station.source / "s1" / "a.png"))
    assert row["analyzed_at"].startswith("2025-01-02T03:04:")
    assert float(row["elapsed_ms"]) > 0


def test_again_does_nothing_and_changes_no_byte(station: Station) -> None:
    station.run(cells=True)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in station.out.rglob("*.csv")}

    def never() -> StandIn:
        raise AssertionError("nothing to do, yet the models were loaded")

    options = CountOptions(station.out, AnalyzerRecipe(BUNDLE_ID, never))
    summary = count_once((station.source,), options)
    assert (summary.n_counted, summary.n_unchanged, summary.exit_code) == (0, 3, 0)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in station.out.rglob("*.csv")} == before


def test_only_what_changed_is_counted_again(station: Station) -> None:
    station.run()
    station.write("s1/b.png", 7)
    station.write("s1/c.png", 1)
    assert station.run().n_counted == 2
    assert station.analyzer.analyzed == ["s1/b", "s1/c"]
    assert station.counts("s1") == {"a": "3", "b": "7", "c": "1"}


def test_touched_renamed_copied_and_removed_files_count_once(station: Station) -> None:
    station.run()
    os.utime(station.source / "s1" / "a.png", ns=(1, 1))
    (station.source / "s1" / "b.png").rename(station.source / "s1" / "renamed.png")
    station.write("s1/copy.png", 3)
    (station.source / "s2" / "a.png").unlink()
    summary = station.run()
    assert station.analyzer.analyzed == []
    assert (summary.n_counted, summary.n_duplicates, summary.exit_code) == (0, 1, 0)
    assert station.counts("s1") == {"a": "3", "copy": "duplicate", "renamed": "5"}
    assert station.counts("s2") == {"a": "0"}  # the camera's folder is emptied; the count stays
    assert [s.n_fov_ok for s in summary.slides] == [2, 1]


def test_force_another_bundle_or_another_scale_count_again(station: Station) -> None:
    station.run()
    assert station.run(force=True).n_counted == 3
    assert station.run(bundle_id="fedcba").n_counted == 3
    assert station.run(bundle_id="fedcba").n_counted == 0
    assert station.run(bundle_id="fedcba", scale=GIVEN).n_counted == 3
    assert station.run(bundle_id="fedcba", scale=GIVEN, edges=EdgeRule.INSIDE).n_counted == 0
    assert {row["bundle_id"] for row in station.table("s1")} == {"fedcba"}


def test_rows_of_two_bundles_are_told(station: Station) -> None:
    station.run()
    (station.source / "s1" / "a.png").unlink()
    station.run(bundle_id="fedcba")
    assert station.table("slides")[0]["bundle_id"] == f"{BUNDLE_ID}+fedcba"


def test_scale_given_by_the_user_is_used_as_it_is(station: Station) -> None:
    station.run(scale=GIVEN)
    assert station.analyzer.n_measured == 0
    assert set(station.analyzer.scales) == {GIVEN}
    assert station.table("s1")[0]["scale_source"] == "cell-diameter"


def test_scale_is_estimated_once_for_a_slide_and_kept(station: Station) -> None:
    station.run()
    assert station.analyzer.n_measured == 3
    assert station.analyzer.scales[:2] == [Scale(40.0, ScaleSource.SLIDE)] * 2
    assert station.analyzer.scales[2].source is ScaleSource.NONE
    assert isnan(station.analyzer.scales[2].cell_diameter_px)
    assert (station.table("s2")[0]["cell_diameter_px"], station.table("s2")[0]["scale_source"]) == (
        "",
        "none",
    )
    station.write("s1/c.png", 1)
    station.write("s2/b.png", 1)
    station.run()
    assert station.analyzer.n_measured == 1  # one content, in two slides
    station.run(bundle_id="fedcba")
    assert station.analyzer.n_measured == 4


def test_scale_looks_at_eight_fields_and_passes_over_broken_ones(station: Station) -> None:
    for i in range(40):
        station.write(f"many/{i:02d}.png", 1, seed=i)
    by_digest = sorted((station.source / "many").iterdir(), key=lambda p: sha256(p.read_bytes()).digest())
    by_digest[0].write_bytes(b"broken")
    by_digest[0].rename(station.source / "many" / "broken.png")
    station.run(station.source / "many")
    assert station.analyzer.n_measured == 8
    by_digest[1].unlink()  # it stays counted
    for i in range(40, 60):
        station.write(f"many/{i:02d}.png", 1, seed=i)
    station.run(station.source / "many")
    first = sorted(row["sha256"] for row in station.table("many") if row["status"] == "ok")[:8]
    new = {row["sha256"] for row in station.table("many")[39:] if row["status"] == "ok"}
    # Those of the first three that are not among them now are measured from where the first three agree.
    assert len(new.intersection(first)) <= station.analyzer.n_measured <= len(new.intersection(first)) + 3


def test_only_a_few_large_fields_are_measured(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        station.write(f"many/{i:02d}.png", 1, seed=i)
    monkeypatch.setattr("rbc_edge.vision.scale.MAX_PIXELS", 4.5 * 240 * 360)
    station.run(station.source / "many")
    assert station.analyzer.n_measured == 5


def test_one_broken_image_fails_alone(station: Station) -> None:
    (station.source / "s1" / "aa.png").write_bytes(b"not an image")
    summary = station.run()
    assert (summary.n_counted, summary.n_failed, summary.exit_code) == (3, 1, 3)
    assert station.counts("s1") == {"a": "3", "aa": "failed", "b": "5"}
    row = station.table("s1")[1]
    assert (row["failure"], row["n_rbc"], row["n_wbc"], row["overlap_fraction"]) == (
        "not-an-image",
        "",
        "",
        "",
    )
    again = station.run()
    assert (again.n_counted, again.n_failed, again.exit_code, station.analyzer.analyzed) == (0, 1, 3, [])
    station.write("s1/aa.png", 2)
    assert station.run().exit_code == 0
    assert station.counts("s1") == {"a": "3", "aa": "2", "b": "5"}


def test_whatever_the_analyzer_throws_fails_one_image(station: Station) -> None:
    class Fragile(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if field.fov == "a":
                raise ArithmeticError("too many cells")
            return super().analyze(field, scale)

    summary = station.run(analyzer=Fragile())
    assert (summary.n_counted, summary.n_failed) == (1, 2)
    assert station.table("s1")[0]["failure"] == "error"
    failed = [s.row for s in station.steps if s.row and s.row.status == "failed"]
    assert all(row.message.endswith("ArithmeticError: too many cells") for row in failed)


def test_jpegs_of_large_cells_are_decoded_as_small_as_their_slide_allows(station: Station) -> None:
    class Enlarging(StandIn):
        """Sees cells of 100 px."""

        def measured(self, image: UInt8, start: int) -> Measure:
            seen.append(image.shape[:2])
            return Measure(100.0, 9, 1)

        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            seen.append(field.decoded.pixels.shape[:2])
            return super().analyze(field, scale)

    seen: list[tuple[int, ...]] = []
    folder = station.source / "enlarged"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded(disks(3), ".jpg"))
    station.run(folder, analyzer=Enlarging())
    assert seen == [(240, 360), (120, 180)]  # all of it for the scale


def test_a_broken_bundle_ends_the_run(station: Station) -> None:
    class Broken(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            raise BundleError("model will not load")

    with pytest.raises(BundleError):
        station.run(analyzer=Broken())


def test_max_failures_ends_early_with_tables(station: Station) -> None:
    for name in "cdef":
        (station.source / "s1" / f"{name}.png").write_bytes(name.encode())
    summary = station.run(max_failures=2)
    assert (summary.gave_up, summary.n_failed, summary.exit_code) == (True, 2, 3)
    assert station.counts("s1") == {"a": "3", "b": "5", "c": "failed", "d": "failed"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_image_in_hand_and_writes_the_tables(
    station: Station, number: int, code: int
) -> None:
    stop = Stop()
    before = signal.getsignal(number)

    def on_step(step: Step) -> None:
        if step.n_done == 1:
            os.kill(os.getpid(), number)

    with stop.on_signals():
        summary = station.run(stop=stop, on_step=on_step)
    assert signal.getsignal(number) is before
    assert (summary.exit_code, summary.n_counted) == (code, 1)
    assert station.counts("s1") == {"a": "3"}
    assert station.run().exit_code == 0
    assert station.counts("s1") == {"a": "3", "b": "5"}


def test_a_second_signal_ends_at_once() -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_killed_before_the_tables_were_written_they_are_written_first(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    station.run()
    whole = station.everything()
    for path in station.out.rglob("*.csv"):
        path.unlink()

    class Killed(BaseException):
        pass

    def kill(_: Step) -> None:
        raise Killed

    station.write("s1/c.png", 1)
    station.write("s1/d.png", 1, seed=1)
    with pytest.raises(Killed):  # the first step ends it, with rows in the ledger and no table
        station.run(on_step=kill, force=True)
    monkeypatch.setattr(Session, "count", lambda *_, **__: Summary(0))
    station.run()
    assert station.everything().keys() == whole.keys()


def test_other_slide_names_for_the_same_files_count_nothing_twice(station: Station) -> None:
    station.run(station.source / "s1", cells=True)
    summary = station.run(station.source / "s1", slide_pattern=r"(?P<slide>[a-z])\.png")
    assert [(s.slide_id, s.counts.n_rbc if s.counts else None) for s in summary.slides] == [
        ("a", 3),
        ("b", 5),
    ]
    assert sorted(station.everything()) == ["a.csv", "b.csv", "slides.csv"]


def test_output_inside_or_equal_to_the_source_is_refused_and_nothing_written(
    station: Station, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(station.source)
    listing = sorted(station.source.rglob("*"))
    for out in (station.source, station.source / "s1", station.source / "new", tmp_path / "link" / "x"):
        station.out = out
        with pytest.raises(UsageError, match=r"lies inside the source.*--out"):
            station.run()
    station.out = station.source / "s1"
    with pytest.raises(UsageError, match="lies inside"):
        station.run(station.source / "s1" / "a.png")
    assert sorted(station.source.rglob("*")) == listing
    station.out = tmp_path
    assert station.run().exit_code == 0  # the source inside the output is no harm


def test_output_that_cannot_be_made(station: Station, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    station.out = tmp_path / "file" / "out"
    with pytest.raises(UnavailableError, match="cannot make the output folder"):
        station.run()


def test_source_is_not_written_to(station: Station) -> None:
    before = {p: p.stat().st_mtime_ns for p in (station.source, *station.source.rglob("*"))}
    station.run(cells=True)
    assert {p: p.stat().st_mtime_ns for p in (station.source, *station.source.rglob("*"))} == before


def test_a_folder_that_moved_is_shown_where_it_is_and_counted_once(station: Station) -> None:
    station.write("moved/a.png", 3)
    station.run()
    before = station.table("moved")
    moved = station.source.with_name("archive")
    station.source.rename(moved)
    summary = station.run(moved)
    assert (summary.n_counted, summary.n_unchanged) == (0, summary.n_images)
    path = str(moved / "moved" / "a.png")
    assert station.table("moved") == [row | {"path": path} for row in before]


def test_a_slide_whose_folder_is_renamed_keeps_its_counts(station: Station) -> None:
    station.write("s1/copy.png", 3)
    (station.source / "s1" / "bad.png").write_bytes(b"no image")
    station.run(cells=True)
    with Ledger(station.out) as ledger:
        decide(ledger, "s1", ["b"], Status.EXCLUDED, reason="dust")
        ledger.commit()
    station.run()
    before = station.table("s1")
    (station.source / "s1").rename(station.source / "t1")
    summary = station.run(cells=True)
    assert station.analyzer.analyzed == []
    assert (summary.n_counted, summary.n_unchanged, summary.n_duplicates, summary.n_failed) == (0, 2, 1, 1)
    assert summary.notes == ["slide s1: 2 fields moved to slide t1, with their counts"]
    times = {"analyzed_at": "", "elapsed_ms": ""}
    assert [row | times for row in station.table("t1")] == [
        row | times | {"slide_id": "t1", "path": row["path"].replace("/s1/", "/t1/")} for row in before
    ]
    assert sorted(station.everything()) == ["cells/s2.csv", "cells/t1.csv", "s2.csv", "slides.csv", "t1.csv"]
    assert [row["slide_id"] for row in station.table("slides")] == ["s2", "t1"]


def test_a_file_is_read_before_its_turn_only_where_another_slide_has_its_size(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = job.digest

    def digest(file: InboxFile) -> str:
        read.append(f"{file.slide_id}/{file.fov}")
        return real(file)

    monkeypatch.setattr(job, "digest", digest)
    station.run(scale=GIVEN)
    station.write("s1/new.png", 5, seed=77)  # a slide that is known, and a name that is not
    with (station.source / "s1" / "new.png").open("ab") as file:
        file.write(bytes(999))
    assert station.run(scale=GIVEN).n_counted == 1
    assert "s1/new" not in read
    read.clear()
    (station.source / "s1" / "new.png").rename(station.source / "s2" / "moved.png")
    station.run(scale=GIVEN)
    assert read == ["s2/moved"]
    assert station.counts("s2")["moved"] == "5"


def test_a_scale_set_for_a_slide_moves_with_its_folder(station: Station) -> None:
    station.run()
    with Ledger(station.out) as ledger:
        give_scale(ledger, "s1", Scale(95.0, ScaleSource.CELL_DIAMETER))
        ledger.commit()
    station.run()
    (station.source / "s1").rename(station.source / "t1")
    assert station.run().n_counted == 0
    station.write("t1/c.png", 1)
    station.run()
    assert {row["cell_diameter_px"] for row in station.table("t1")} == {"95.00"}


def test_an_image_moves_to_another_slide_or_is_counted_in_both(station: Station) -> None:
    station.run(scale=GIVEN)
    (station.source / "s1" / "a.png").rename(station.source / "s2" / "moved.png")
    summary = station.run(scale=GIVEN)
    assert station.analyzer.analyzed == []
    assert summary.notes == ["slide s1: 1 field moved to slide s2, with their counts"]
    assert (station.counts("s1"), station.counts("s2")) == ({"b": "5"}, {"a": "0", "moved": "3"})
    station.write("s2/copy.png", 5)
    assert station.run(scale=GIVEN).notes == ["slides s1 and s2: 1 image counted in both"]
    assert station.counts("s2")["copy"] == station.counts("s1")["b"] == "5"


def test_a_slide_at_another_scale_counts_again_what_moves_there(station: Station) -> None:
    station.run()
    with Ledger(station.out) as ledger:
        give_scale(ledger, "s2", Scale(95.0, ScaleSource.CELL_DIAMETER))
        ledger.commit()
    station.run()
    (station.source / "s1" / "a.png").rename(station.source / "s2" / "moved.png")
    summary = station.run()
    assert summary.n_counted == 1
    assert summary.notes == ["slide s1: 1 field moved to slide s2, and counted again"]
    assert (station.counts("s1"), station.counts("s2")) == ({"b": "5"}, {"a": "0", "moved": "3"})
    again = station.run()
    assert (again.n_counted, again.notes) == (0, [])


@pytest.mark.parametrize("is_archived", [False, True])
def test_one_slide_id_from_two_sources_is_refused(station: Station, is_archived: bool) -> None:
    """A camera that begins to number again, or another slide of the name of one that was archived."""
    station.write("day1/100MEDIA/0.png", 3)
    station.write("day2/100MEDIA/1.png", 4)
    station.run(station.source / "day1" / "100MEDIA")
    if is_archived:
        (station.source / "day1" / "100MEDIA" / "0.png").unlink()
    before = station.everything()
    with pytest.raises(UsageError, match=r"other images than .*day1/100MEDIA") as refused:
        station.run(station.source / "day2" / "100MEDIA")
    assert "forget 100MEDIA" in refused.value.advice
    assert station.everything() == before
    with Ledger(station.out) as ledger:
        decide(ledger, "100MEDIA", [], Status.FORGOTTEN)
        ledger.commit()
    assert station.run(station.source / "day2" / "100MEDIA").n_counted == 1
    assert station.counts("100MEDIA") == {"1": "4"}


def test_the_name_of_a_field_from_two_sources_is_refused(station: Station) -> None:
    station.write("day1/A_1.png", 3)
    station.write("day2/A_1.png", 4)
    station.run(station.source / "day1", slide_pattern="(?P<slide>[A-Z])_")
    with pytest.raises(UsageError, match="both would be slide A"):
        station.run(station.source / "day2", slide_pattern="(?P<slide>[A-Z])_")
    (station.source / "day2" / "A_1.png").rename(station.source / "day2" / "A_2.png")
    station.run(station.source / "day2", slide_pattern="(?P<slide>[A-Z])_")
    assert station.counts("A") == {"A_1": "3", "A_2": "4"}


def test_images_that_take_the_place_of_others_are_said_and_the_old_counts_kept(station: Station) -> None:
    station.write("s1/c.png", 6)
    station.run()
    station.write("s1/a.png", 7)
    assert station.run().notes == ["slide s1: 1 image replaced by others of the same name"]
    station.write("s1/b.png", 8)
    station.write("s1/c.png", 9)
    (note,) = station.run().notes
    assert "slide s1: 2 of 3 images replaced: another slide of the same name?" in note
    for name in "abc":
        (station.source / "s1" / f"{name}.png").unlink()
    station.write("s1/d.png", 1)
    (note,) = station.run().notes
    assert "slide s1: its 3 images are gone, and others came" in note
    assert station.counts("s1") == {"a": "7", "b": "8", "c": "9", "d": "1"}
    with Ledger(station.out) as ledger:
        kept = list(ledger.database.rows("SELECT fov, counts FROM replaced ORDER BY fov"))
    assert [(fov, unpack_counts(counts)[EdgeRule.ALL].n_rbc) for fov, counts in kept] == [
        *(("a", 3), ("b", 5), ("c", 6))
    ]


def test_settings_that_differ_from_the_last_run_are_said(station: Station) -> None:
    assert station.run().notes == []
    (note,) = station.run(scale=GIVEN).notes
    assert note == "settings differ from the last run: scale is 40 px a cell, was estimated"
    assert station.run(scale=GIVEN).notes == []
    (note,) = station.run(station.source / "s1", scale=GIVEN, slide_pattern="(?P<slide>[ab])").notes[:1]
    assert note == "settings differ from the last run: slide pattern is (?P<slide>[ab]), was none"


def die_while_counting(
    station: Station,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    *others: str,
    survives: Callable[[Sequence[Path]], bool | None] | None = None,
) -> None:
    """A run whose process ends while it counts an image; the next one is another process."""

    class Deadly(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if f"{field.slide_id}/{field.fov}" in (name, *others):
                raise SystemExit  # nothing is cleaned up on the way: see `Ledger.close`
            return super().analyze(field, scale)

    monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", f"process {next(PROCESSES)}")
    with pytest.raises(SystemExit):
        station.run(analyzer=Deadly(), survives=survives)
    monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", f"process {next(PROCESSES)}")


PROCESSES = count()


def test_an_image_two_processes_died_of_is_passed_over(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_while_counting(station, monkeypatch, "s1/a")
    die_while_counting(station, monkeypatch, "s1/a")
    summary = station.run()
    assert station.analyzer.analyzed == ["s1/b", "s2/a"]
    assert (summary.n_counted, summary.n_failed, summary.exit_code) == (2, 1, 3)
    row = station.table("s1")[0]
    assert (row["fov"], row["status"], row["failure"], row["n_rbc"]) == ("a", "failed", "crash", "")
    assert len(row["sha256"]) == 64
    assert station.run().n_counted == 0  # and it is not opened again


def test_suspects_are_tried_elsewhere_and_the_innocent_counted(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_while_counting(station, monkeypatch, "s1/a")  # b was being read ahead
    tried: list[list[str]] = []

    def survives(paths: Sequence[Path]) -> bool:
        tried.append([p.name for p in paths])
        return "b.png" not in tried[-1]

    summary = station.run(survives=survives)
    assert tried == [["a.png", "b.png"], ["a.png"], ["b.png"]]
    assert station.counts("s1") == {"a": "3", "b": "failed"}
    assert summary.n_counted == 2
    assert [s.file.fov for s in station.steps if s.row and s.row.failure == "crash"] == ["b"]


def test_processes_that_die_of_something_else_fail_no_image(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(50):
        die_while_counting(station, monkeypatch, "s1/a", survives=lambda _: True)
    summary = station.run(survives=lambda _: True)
    assert (summary.n_counted, summary.n_failed) == (3, 0)


def test_a_machine_that_goes_down_in_every_trial_gives_up_on_the_image_alone(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_while_counting(station, monkeypatch, "s1/a")

    def power_cut(paths: Sequence[Path]) -> bool:
        if "a.png" in [p.name for p in paths]:
            raise SystemExit
        return True

    n_cuts = 0
    while True:
        try:
            summary = station.run(survives=power_cut)
            break
        except SystemExit:
            n_cuts += 1
            monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", f"process {next(PROCESSES)}")
    assert n_cuts == 25
    assert station.counts("s1") == {"a": "failed", "b": "5"}
    assert summary.n_failed == 1


def test_an_image_that_only_the_service_dies_of_is_given_up_in_the_end(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(100):
        die_while_counting(station, monkeypatch, "s1/a", survives=lambda _: True)
    assert station.run(survives=lambda _: True).n_failed == 1
    assert station.counts("s1") == {"a": "failed", "b": "5"}


class Unsure(StandIn):
    """Sees other cells in each image: the wider, the more there are."""

    def measured(self, image: UInt8, start: int) -> Measure:
        self.n_measured += 1
        n_dark = int((image[:, :, 1] < 180).sum())
        return Measure(40.0 + n_dark / 1000, 9 + n_dark // 100, image.shape[0] * image.shape[1])


def test_a_slide_whose_images_come_one_by_one_has_the_scale_of_all(station: Station) -> None:
    folder, n_measured, n_analyzed = station.source / "s3", 0, []
    for i in range(16):
        station.write(f"s3/{i:02}.png", i + 1, seed=i)
        station.run(folder, analyzer=Unsure())
        n_measured += station.analyzer.n_measured
        n_analyzed.append(len(station.analyzer.analyzed))
    assert station.run(folder, analyzer=Unsure()).n_counted == 0
    one_by_one = {name: rows(station.out / name) for name in station.everything()}
    assert 8 <= n_measured < 24  # of 16 images; some of the first three also from where they agree
    assert n_analyzed[:3] != [1, 1, 1] and n_analyzed.count(1) > 4  # again only where the scale is another
    station.out = station.out.with_name("together")
    station.run(folder, analyzer=Unsure())
    assert station.analyzer.n_measured == 8
    assert len(station.analyzer.analyzed) == 16
    assert {name: rows(station.out / name) for name in station.everything()} == one_by_one


def ends_like_a_clean_run(station: Station) -> dict[str, list[dict[str, str]]]:
    station.run(analyzer=Unsure())
    ours = {name: rows(station.out / name) for name in station.everything()}
    assert station.run(analyzer=Unsure()).n_counted == 0
    station.out = station.out.with_name("clean")
    station.run(analyzer=Unsure())
    assert {name: rows(station.out / name) for name in station.everything()} == ours
    return ours


@pytest.mark.parametrize("n_bytes", [0, 200])
def test_files_that_were_incomplete_at_first_leave_no_trace(station: Station, n_bytes: int) -> None:
    whole = {}
    for i in range(12):
        station.write(f"s1/{i:02}.png", i + 1, seed=i)
        path = station.source / "s1" / f"{i:02}.png"
        whole[path if i % 2 else path.with_stem(f"tmp-{i}")] = path.read_bytes()
        path.write_bytes(path.read_bytes()[:n_bytes])
        if not i % 2:
            path.rename(path.with_stem(f"tmp-{i}"))
    assert station.run(analyzer=Unsure()).n_failed == 12
    for path, data in whole.items():
        path.write_bytes(data)
        path.rename(path.with_stem(path.stem.removeprefix("tmp-").zfill(2)))
    assert len(ends_like_a_clean_run(station)["s1.csv"]) == 14


def test_files_that_cannot_be_read_for_a_minute_leave_no_trace(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(12):
        station.write(f"s1/{i:02}.png", i + 1, seed=i)
    open_file = Path.open

    def refuse(path: Path, *rest: Any, **options: Any) -> Any:
        if path.stem.isdigit() and int(path.stem) % 3:
            raise PermissionError(13, "Permission denied")
        return open_file(path, *rest, **options)

    with monkeypatch.context() as minute:
        minute.setattr(Path, "open", refuse)
        assert station.run(analyzer=Unsure()).n_failed == 8
    ends_like_a_clean_run(station)


def test_copies_that_go_and_originals_that_leave_their_copy_leave_no_trace(station: Station) -> None:
    folder = station.source / "s1"
    for i in range(6):
        station.write(f"s1/{i}.png", i + 1, seed=i)
    for i in range(6):
        (folder / f"copy-{i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    assert station.run(analyzer=Unsure()).n_duplicates == 6
    for i in range(3):
        (folder / f"copy-{i}.png").unlink()
        (folder / f"{i + 3}.png").unlink()
    station.run(analyzer=Unsure())
    ends_like_a_clean_run(station)


def test_a_slide_that_lost_an_image_to_another_one_has_the_scale_of_the_others(station: Station) -> None:
    for i in range(6):
        station.write(f"z/{i}.png", 2 * i + 1, seed=i)
        station.write(f"a/{i}.png", 2 * i + 2, seed=i)
    station.run(analyzer=Unsure())
    before = station.table("a")[0]["cell_diameter_px"]
    for i in range(3, 6):
        (station.source / "a" / f"{i}.png").rename(station.source / "z" / f"from-a-{i}.png")
    tables = ends_like_a_clean_run(station)
    assert tables["a.csv"][0]["cell_diameter_px"] != before


def test_the_scale_of_a_run_lasts_until_a_run_without_it(station: Station) -> None:
    station.run()
    station.run(station.source / "s1", scale=GIVEN)
    with Ledger(station.out) as ledger:  # not beside: a service of its own settings
        assert (ledger.reader.given_scale("s1"), ledger.reader.given_scale("s2")) == (GIVEN, None)
        give_scale(ledger, "s2", Scale(95.0, ScaleSource.CELL_DIAMETER))
        ledger.commit()
    station.run()
    with Ledger(station.out) as ledger:
        assert ledger.reader.given_scale("s1") is None
        assert ledger.reader.given_scale("s2") == Scale(95.0, ScaleSource.CELL_DIAMETER)
    assert station.table("s1")[0]["scale_source"] == "estimated-slide"
    assert station.table("s2")[0]["cell_diameter_px"] == "95.00"


def test_the_image_in_hand_is_left_when_it_takes_too_long(station: Station) -> None:
    stop = Stop(patience_s=0.05)

    class Slow(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            os.kill(os.getpid(), signal.SIGTERM)
            released.wait(60)
            return super().analyze(field, scale)

    released = Event()
    with stop.on_signals():
        summary = station.run(analyzer=Slow(), stop=stop)
    released.set()
    assert stop.is_late
    assert (summary.exit_code, summary.n_counted) == (143, 0)
    assert station.run().n_counted == 3  # and it is no suspect


def test_a_run_waits_for_another_writer_and_gives_up(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    station.run()
    monkeypatch.setattr("rbc_edge.station.session._WAIT_FOR_WRITER_S", 0)
    with writing(station.out), pytest.raises(UnavailableError, match="another rbc-edge is writing"):
        station.run()


def test_images_counted_together_are_written_down_in_order(station: Station) -> None:
    for i in range(30):
        station.write(f"s1/{i:02}.png", i % 7, seed=i)
    station.write("s1/29-copy.png", 29 % 7, seed=29)
    station.write("s1/zz-broken.png", 1)
    (station.source / "s1" / "zz-broken.png").write_bytes(b"no image")
    station.run(cells=True)
    alone = {name: rows(station.out / name) for name in station.everything()}
    station.out = station.out.with_name("together")
    summary = station.run(cells=True, workers=4)
    assert [s.file.fov for s in station.steps] == [*sorted(s.file.fov for s in station.steps[:-1]), "a"]
    assert {name: rows(station.out / name) for name in station.everything()} == alone
    assert (summary.n_counted, summary.n_failed, summary.n_duplicates) == (33, 1, 1)


def rows(path: Path) -> list[dict[str, str]]:
    times = ("analyzed_at", "elapsed_ms")
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)]


def test_a_content_whose_count_fell_away_is_counted_by_its_copy(station: Station) -> None:
    """The first of two copies cannot be analyzed when the second was passed over as known already."""

    class Moody(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if field.fov == "a":
                raise ValueError("not this one")
            return super().analyze(field, scale)

    station.write("s3/a.png", 4, seed=8)
    station.write("s3/b.png", 4, seed=8)
    summary = station.run(station.source / "s3", analyzer=Moody(), workers=2)
    assert station.counts("s3") == {"a": "failed", "b": "4"}
    assert summary.n_counted == 1


# -- what became of every image -------------------------------------------------------------------------


def each_image_once(summary: Summary) -> tuple[int, int, int, int]:
    """What became of the images; every image stands under one number."""
    numbers = (summary.n_counted, summary.n_unchanged, summary.n_duplicates, summary.n_failed)
    assert sum(numbers) == summary.n_images
    return numbers


def test_every_image_is_summed_up_once(station: Station) -> None:
    station.write("s1/copy.png", 3)
    (station.source / "s1" / "broken.png").write_bytes(b"no image")
    assert each_image_once(station.run()) == (3, 0, 1, 1)
    assert each_image_once(station.run()) == (0, 3, 1, 1)
    assert each_image_once(station.run(force=True)) == (3, 0, 1, 1)
    station.write("s1/0-first.png", 3)  # the count of a moves to it
    assert each_image_once(station.run()) == (0, 3, 2, 1)
    assert station.counts("s1")["0-first"] == "3"


def test_images_that_a_better_scale_counts_again_are_not_unchanged(station: Station) -> None:
    station.run(station.source / "s2", analyzer=Unsure())
    station.write("s2/b.png", 2)
    assert each_image_once(station.run(station.source / "s2", analyzer=Unsure())) == (2, 0, 0, 0)


def test_a_copy_of_an_image_that_fails_now_is_counted_in_the_same_run(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    station.write("s1/copy.png", 3)
    station.run()
    os.utime(station.source / "s1" / "a.png", ns=(1, 1))
    load_field = image_file.load_field

    def refuse(path: Path, *rest: Any, **options: Any) -> FieldOfView:
        if path.name == "a.png":
            raise ArithmeticError
        return load_field(path, *rest, **options)

    monkeypatch.setattr(image_file, "load_field", refuse)
    station.run(station.source / "s1")
    assert station.counts("s1") == {"a": "failed", "b": "5", "copy": "3"}


def test_a_copy_of_an_image_elsewhere_is_counted_by_a_new_bundle_once(
    station: Station, tmp_path: Path
) -> None:
    write_disks(tmp_path / "old" / "s1" / "0.png", 3)
    station.run(tmp_path / "old" / "s1")
    station.run(station.source / "s1")
    assert station.counts("s1") == {"0": "3", "a": "duplicate", "b": "5"}
    assert station.run(station.source / "s1", bundle_id="fedcba").n_counted == 2
    assert station.run(station.source / "s1", bundle_id="fedcba").n_counted == 0
    assert station.analyzer.analyzed == []


def test_a_failure_of_access_counts_once_towards_the_limit(station: Station) -> None:
    station.run()
    station.write("s1/0-first.png", 3)
    (station.source / "s1" / "zz.png").symlink_to("nowhere")
    summary = station.run(max_failures=2)
    assert (summary.gave_up, each_image_once(summary)) == (False, (0, 3, 1, 1))


def test_images_done_before_are_tried_elsewhere_only_once(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    station.run()
    monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", "one that dies")

    class Deadly(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            raise SystemExit

    with pytest.raises(SystemExit):
        station.run(analyzer=Deadly(), force=True)
    monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", "the next one")
    tried: list[list[str]] = []

    def survives(paths: Sequence[Path]) -> bool:
        tried.append([p.name for p in paths])
        return True

    for _ in range(2):
        assert each_image_once(station.run(survives=survives)) == (0, 3, 0, 0)
    assert tried == [["a.png", "b.png"]]


@pytest.mark.parametrize("method", ["measure", "analyze"])
def test_a_broken_bundle_makes_no_image_suspect(
    station: Station, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    class Broken(StandIn):
        pass

    def broken(*_: object) -> None:
        raise BundleError("model will not load")

    setattr(Broken, method, broken)
    for n in range(3):
        monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", f"process {n}")
        with pytest.raises(BundleError):
            station.run(analyzer=Broken())
    monkeypatch.setattr("rbc_edge.store.ledger._PROCESS", "the last")
    assert each_image_once(station.run()) == (3, 0, 0, 0)


def test_a_portion_that_ends_early_shows_what_is_in_quarantine(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        die_while_counting(station, monkeypatch, "s2/a")
    station.write("s1/c.png", 1)
    files = scan([station.source]).files
    options = CountOptions(station.out, AnalyzerRecipe(BUNDLE_ID, StandIn))
    of_slide = {"s1": files[:3], "s2": files[3:]}
    with Session(options, Ledger(station.out), clock=ticking()) as session:
        session.count(files, of_slide=of_slide, time_s=0)
    assert station.counts("s2") == {"a": "failed"}


def test_an_estimate_of_the_scale_is_left_when_it_takes_too_long(station: Station) -> None:
    stop = Stop(patience_s=0.05)
    released = Event()

    class Slow(StandIn):
        def measure(self, images: Sequence[UInt8], start: int, /) -> list[Measure]:
            os.kill(os.getpid(), signal.SIGTERM)
            released.wait(5)
            return super().measure(images, start)

    started_s = perf_counter()
    with stop.on_signals():
        summary = station.run(analyzer=Slow(), stop=stop)
    assert perf_counter() - started_s < 4
    released.set()
    assert (stop.is_late, summary.exit_code, summary.n_counted) == (True, 143, 0)
    assert station.run().n_counted == 3


def test_what_a_killed_run_wrote_is_safe_before_a_table_shows_it(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut must not take back what a table shows."""
    die_while_counting(station, monkeypatch, "s2/a")
    order: list[str] = []
    write, commit = Tables.write, Database.commit

    def written(tables: Tables, slide_ids: Collection[str] | None = None) -> list[SlideSummary]:
        order.append("tables")
        return write(tables, slide_ids)

    def forced(database: Database) -> None:
        database.connection.set_trace_callback(order.append)
        commit(database)
        database.connection.set_trace_callback(None)

    monkeypatch.setattr(Tables, "write", written)
    monkeypatch.setattr(Database, "commit", forced)
    station.run()
    assert "INSERT OR REPLACE INTO flag VALUES ('forced')" in order[: order.index("tables")]


def test_an_image_for_which_memory_was_short_is_counted_by_the_next_run(station: Station) -> None:
    for name in "abc":
        station.write(f"s/{name}.png", 3, seed=ord(name))

    class Short(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if field.fov == "b":
                raise MemoryError
            return super().analyze(field, scale)

    done = station.run(station.source / "s", analyzer=Short())
    assert (done.exit_code, done.n_counted, done.n_failed, len(done.troubled)) == (5, 2, 0, 1)
    assert station.counts("s") == {"a": "3", "c": "3"}
    done = station.run(station.source / "s")
    assert (done.exit_code, station.analyzer.analyzed) == (0, ["s/b"])
    assert station.counts("s") == {"a": "3", "b": "3", "c": "3"}


def test_trouble_of_the_computer_ends_a_run_and_leaves_every_image_as_it_was(station: Station) -> None:
    for name in "abc":
        station.write(f"s/{name}.png", 3, seed=ord(name))

    class Broken(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if field.fov == "b":
                raise ImportError("libgomp.so.1")
            return super().analyze(field, scale)

    def unasked(_: Sequence[Path]) -> bool:
        raise AssertionError("no image is suspect")

    with pytest.raises(UnavailableError, match=r"libgomp\.so\.1"):
        station.run(station.source / "s", analyzer=Broken())
    assert station.run(station.source / "s", survives=unasked).exit_code == 0
    assert station.analyzer.analyzed == ["s/b", "s/c"]


def test_a_deleted_ledger_leaves_no_old_table_beside_the_new_ones(station: Station) -> None:
    station.run(cells=True)
    old = station.everything()
    (station.out / "ledger.sqlite3").unlink()
    assert station.run(station.source / "s1").exit_code == 0
    kept = next(station.out.glob("earlier-*"))
    assert {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*.csv")} == old
    assert sorted(p.name for p in station.out.glob("*.csv")) == ["s1.csv", "slides.csv"]


def test_a_link_to_the_results_makes_no_slides_of_them(station: Station) -> None:
    (station.source / "results").symlink_to(station.out.parent)
    for _ in range(3):
        assert station.run().n_images == 3
        (station.out / "overlays" / "s1").mkdir(parents=True, exist_ok=True)
        write_disks(station.out / "overlays" / "s1" / "a_overlay.jpg", 3)
    with pytest.raises(UsageError, match="it holds results"):
        station.run(station.out / "overlays")


def test_a_table_that_is_held_is_said_by_the_exit_code_and_written_by_the_next_run(station: Station) -> None:
    (station.out / "s1.csv").mkdir(parents=True)
    (station.out / "ledger.sqlite3").touch()
    done = station.run()
    assert (done.exit_code, done.n_counted, len(done.held)) == (5, 3, 1)
    assert [row["slide_id"] for row in station.table("slides")] == ["s1", "s2"]
    (station.out / "s1.csv").rmdir()
    assert station.run().exit_code == 0
    assert station.counts("s1") == {"a": "3", "b": "5"}


def test_a_suspect_that_cannot_be_tried_now_is_left_and_the_others_are_counted(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_while_counting(station, monkeypatch, "s1/a")
    done = station.run(survives=lambda paths: None if "a" in [path.stem for path in paths] else True)
    assert (done.exit_code, done.n_failed, [f.fov for f in done.troubled]) == (5, 0, ["a"])
    assert "s1/a" not in station.analyzer.analyzed and "s1/b" in station.analyzer.analyzed
    done = station.run(survives=lambda _: True)
    assert (done.exit_code, station.counts("s1")) == (0, {"a": "3", "b": "5"})


def test_a_time_that_the_ledger_cannot_hold_changes_nothing(station: Station) -> None:
    year_2300_s = 10_413_792_000
    os.utime(station.source / "s1" / "a.png", (year_2300_s, year_2300_s))
    assert (station.source / "s1" / "a.png").stat().st_mtime_ns > 2**63
    assert station.run().n_counted == 3
    assert (station.run().n_unchanged, station.analyzer.analyzed) == (3, [])


@pytest.mark.parametrize("is_there", [True, False])
def test_a_damaged_row_is_repaired_by_the_next_run_or_counted_again(station: Station, is_there: bool) -> None:
    station.run(cells=True)
    before = station.table("s1")
    for change in ("counts = x'0707'", "height_px = 7", "elapsed_ms = 1e9"):
        with sqlite3.connect(station.out / FILE_NAME) as db:
            db.execute(f"UPDATE field SET {change} WHERE fov = 'a' AND width_px IS NOT NULL")
        db.close()
        if not is_there:
            (station.source / "s1/a.png").unlink(missing_ok=True)
        summary = station.run(cells=True)
        is_lost = not is_there and change.startswith("elapsed")
        assert (summary.n_failed, summary.n_lost, summary.exit_code) == ((0, 1, 3) if is_lost else (0, 0, 0))
        assert any("slide s1: the counts of 1 image are lost" in note for note in summary.notes) == is_lost
        assert station.counts("s1") == {"a": "failed" if is_lost else "3", "b": "5"}
        if not is_lost and not change.startswith("elapsed"):
            assert station.table("s1") == before


def test_a_damaged_scale_leaves_no_count_at_another_scale(station: Station) -> None:
    for i in range(3):
        station.write(f"s3/{i}.png", 2, seed=i)
    station.run(analyzer=Unsure())
    with sqlite3.connect(station.out / FILE_NAME) as db:
        db.execute("UPDATE slide SET cell_diameter_px = 7")
    db.close()
    for i in range(3, 8):
        station.write(f"s3/{i}.png", 20, seed=i)
    station.run(analyzer=Unsure())
    assert len({row["cell_diameter_px"] for row in station.table("s3")}) == 1
    ends_like_a_clean_run(station)


@pytest.mark.parametrize("content", ["{", "7", "[1]"])
def test_a_note_that_is_damaged_stops_no_run(station: Station, content: str) -> None:
    station.run()
    with Ledger(station.out) as ledger:
        ledger.keep_note("settings", content)
        ledger.commit()
    assert station.run().notes == []


def test_names_of_tables_that_differ_by_case_do_not_depend_on_which_came_first(station: Station) -> None:
    out = station.out
    for slide_id, n in (("t1", 3), ("T1", 4), ("slides", 5)):
        station.write(f"{slide_id}/x.png", n, seed=n)
        station.run(analyzer=Unsure())
    ends_like_a_clean_run(station)
    station.out = out
    for old, new in (("t1", "t3"), ("T1", "t1")):
        (station.source / old).rename(station.source / new)
        station.run(analyzer=Unsure())
    assert "t1.csv" in ends_like_a_clean_run(station)
    assert not (out / "T1.csv").exists()


def test_cells_that_are_damaged_are_counted_again_by_a_run_that_shows_them(station: Station) -> None:
    station.run(cells=True)
    before = station.everything()
    with sqlite3.connect(station.out / FILE_NAME) as db:
        db.execute("UPDATE cells SET packed = x'ff00' WHERE field_key = 1")
    db.close()
    assert station.run(cells=True).n_counted == 1
    assert station.everything().keys() == before.keys()
    assert station.run(cells=True).exit_code == 0

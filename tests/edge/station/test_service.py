import csv
import errno
import logging
import os
import signal
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in import BUNDLE_ID, StandIn, disks, encoded, write_disks

from rbc_edge.errors import BundleError, ExitCode, UnavailableError, UsageError
from rbc_edge.station import job, service
from rbc_edge.station.job import AnalyzerRecipe, Task
from rbc_edge.station.service import WatchOptions, run_forever
from rbc_edge.station.session import Clock, CountOptions, count_once
from rbc_edge.station.source import Mount, WakeEvent
from rbc_edge.station.state_file import Activity, ServiceState, read_state
from rbc_edge.station.status import status_of
from rbc_edge.station.stop import Stop
from rbc_edge.station.systemd import Systemd
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import writing
from rbc_edge.store.recovery import keep_aside
from rbc_edge.store.rows import Look
from rbc_edge.store.schema import FILE_NAME, DamagedError
from rbc_edge.values import FieldOfView, FovResult, InboxFile, Measure, Scale, ScaleSource, UInt8
from rbc_edge.views.refresh import ViewOptions

GIVEN = Scale(40.0, ScaleSource.CELL_DIAMETER)
Action = Callable[[], object]


@dataclass
class Script(WakeEvent):
    """A wake event, a clock and a play in one: time passes only while the service waits.

    Attributes:
        now_s: Monotonic time, seconds.
        play: What happens when; an action that returns a path closes that file.
        wall_s: How far the time of day is off.
    """

    now_s: float = 1000.0
    play: list[tuple[float, Action]] = field(default_factory=list)
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def at(self, time_s: float, action: Action) -> None:
        """Adds to the play; times count from the start."""
        self.play.append((1000.0 + time_s, action))
        self.play.sort(key=lambda entry: entry[0])

    def wait(self, time_s: float) -> set[Path] | None:
        end_s = self.now_s + time_s
        if self.play and self.play[0][0] <= end_s:
            at_s, action = self.play.pop(0)
            self.now_s = max(self.now_s, at_s)
            closed = action()
            return {closed} if isinstance(closed, Path) else super().wait(0)
        if end_s > 100_000:
            raise AssertionError("the play is over, and nobody stopped the service")
        self.now_s = end_s
        return None

    def clock(self) -> Clock:
        start = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
        return Clock(lambda: start + timedelta(seconds=self.now_s + self.wall_s), lambda: self.now_s)


class Said(Systemd):
    """A line to systemd that remembers."""

    def __init__(self, watchdog_s: float | None = None) -> None:
        super().__init__({})
        self.lines: list[str] = []
        self.watchdog_s = watchdog_s
        self.n_beats = 0

    def ready(self, text: str) -> None:
        self.lines.append(f"ready {text}")

    def say(self, text: str) -> None:
        self.lines.append(text)

    def beat(self) -> None:
        self.n_beats += 1

    def reloading(self) -> None:
        self.lines.append("reloading")

    def stopping(self) -> None:
        self.lines.append("stopping")


@dataclass
class Post:
    """A camera's folder with a service at it."""

    folder: Path
    script: Script = field(default_factory=Script)
    stop: Stop = field(default_factory=Stop)
    systemd: Said = field(default_factory=Said)
    analyzer: StandIn = field(default_factory=StandIn)
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        return self.folder / "camera"

    @property
    def out(self) -> Path:
        return self.folder / "results"

    def options(self) -> WatchOptions:
        options = WatchOptions(
            source=self.source,
            counting=CountOptions(self.out, AnalyzerRecipe(BUNDLE_ID, lambda: self.analyzer), scale=GIVEN),
            min_free_bytes=0,
            polling=True,
        )
        return replace(options, **self.changes)  # type: ignore[arg-type]

    def write(self, name: str, n: int = 1, seed: int = 0) -> Path:
        write_disks(self.source / name, n, seed=seed)
        return self.source / name

    def until(self, time_s: float) -> ExitCode | int:
        """Lets the service work for so long."""
        self.script.at(time_s, lambda: setattr(self.stop, "signal", signal.SIGTERM))
        return self.run()

    def run(self, *, once: bool = False, reload: Callable[[], WatchOptions] | None = None) -> ExitCode | int:
        return run_forever(
            self.options(),
            once=once,
            reload=reload,
            stop=self.stop,
            clock=self.script.clock(),
            wake=self.script,
            systemd=self.systemd,
        )

    def again(self) -> "Post":
        """The same folders, another process."""
        return Post(self.folder, changes=self.changes)

    def table(self, name: str) -> dict[str, str]:
        try:
            with (self.out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
                return {
                    row["fov"]: row["n_rbc"] or row["failure"] or row["status"]
                    for row in csv.DictReader(file)
                }
        except FileNotFoundError:
            return {}

    def state(self) -> ServiceState:
        running, state = read_state(self.out)
        assert running
        assert state is not None
        return state


@pytest.fixture
def post(tmp_path: Path) -> Post:
    (tmp_path / "camera").mkdir()
    return Post(tmp_path)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rbc_edge")


def test_images_are_counted_as_they_come(post: Post) -> None:
    post.write("s1/a.png", 3)
    seen: list[dict[str, str]] = []
    post.script.at(5, lambda: seen.append(post.table("s1")))
    post.script.at(6, lambda: post.write("s1/b.png", 5))
    post.script.at(6.5, lambda: seen.append(post.table("s1")))
    assert post.until(30) == 143
    assert seen == [{"a": "3"}, {"a": "3", "b": "5"}]  # b was closed, a had to settle
    assert post.analyzer.analyzed == ["s1/a", "s1/b"]
    assert post.systemd.lines[0] == "starting; 0 counted, 0 failed since the start"
    assert "ready started" in post.systemd.lines
    assert "up to date; 2 counted, 0 failed since the start" in post.systemd.lines
    assert "stopping" in post.systemd.lines


def test_an_idle_service_only_scans_and_beats(post: Post) -> None:
    post.write("s1/a.png", 3)
    post.systemd.watchdog_s = 9
    post.until(3600)
    assert post.analyzer.analyzed == ["s1/a"]
    assert post.systemd.n_beats > 3600 / 9


def test_a_file_still_written_is_left_alone(post: Post) -> None:
    whole = encoded(disks(4, seed=9))
    path = post.source / "s1" / "slow.png"
    path.parent.mkdir()

    def write(n_bytes: int) -> object:
        return lambda: path.write_bytes(whole[:n_bytes])

    for second in range(30):
        post.script.at(second, write(len(whole) * (second + 1) // 40))  # type: ignore[arg-type]
    post.script.at(60, lambda: (path.write_bytes(whole), path)[1])
    post.until(62)
    assert post.table("s1") == {"slow": "4"}


def test_an_unfinished_image_fails_after_its_grace_and_counts_when_it_is_whole(post: Post) -> None:
    whole = encoded(disks(4))
    (post.source / "s1").mkdir()
    path = post.source / "s1" / "a.png"
    path.write_bytes(whole[:200])
    seen: list[object] = []
    post.script.at(119, lambda: seen.append((post.table("s1"), post.state().n_waiting)))
    post.script.at(140, lambda: seen.append(post.table("s1")))
    post.script.at(141, lambda: path.write_bytes(whole))
    post.until(160)
    assert seen == [({}, 1), {"a": "truncated"}]
    assert post.table("s1") == {"a": "4"}


def test_a_file_that_changes_while_it_is_read_waits(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    path = post.write("s1/a.png", 3)

    look_at, n = job.look_at, 0

    def interfering(task: Task) -> Look:
        nonlocal n
        n += 1
        found = look_at(task)
        if n == 1:
            write_disks(path, 6)
        return found

    monkeypatch.setattr(job, "look_at", interfering)
    post.until(60)
    assert post.table("s1") == {"a": "6"}
    assert len(post.analyzer.analyzed) == 2  # what it was at first was not written down


def test_files_that_vanish_before_they_are_read_are_no_failures(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at = job.look_at

    def too_late(task: Task) -> Look:
        (post.source / "s1" / "a.png").unlink(missing_ok=True)
        return look_at(task)

    post.write("s1/a.png", 3)
    monkeypatch.setattr(job, "look_at", too_late)
    post.until(300)
    assert post.table("s1") == {}
    with Ledger(post.out) as ledger:
        assert ledger.reader.tally().n_failed == 0


def test_renamed_copied_and_replaced_files(post: Post) -> None:
    post.write("s1/a.png", 3)
    post.write("s1/b.png", 5)
    post.script.at(5, lambda: (post.source / "s1" / "a.png").rename(post.source / "s1" / "renamed.png"))
    post.script.at(30, lambda: post.write("s1/copy.png", 5))
    post.script.at(60, lambda: post.write("s1/b.png", 7))
    post.script.at(90, lambda: post.write("s2/b.png", 7))
    post.until(120)
    # the copy keeps the count when the first one's content is replaced
    assert post.table("s1") == {"b": "7", "copy": "5", "renamed": "3"}
    assert post.table("s2") == {"b": "7"}


def test_one_image_more_does_not_ask_about_all_of_its_slide(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = Ledger.plan, list[int]()

    def counted(ledger: Ledger, files: Sequence[InboxFile], *args: object, **options: object) -> object:
        asked.append(len(files))
        return plan(ledger, files, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "plan", counted)
    for i in range(20):
        post.write(f"s1/{i:02}.png", 3, seed=i)
    post.script.at(30, asked.clear)
    post.script.at(31, lambda: post.write("s1/more.png", 2, seed=30))
    post.until(60)
    assert len(post.table("s1")) == 21
    assert asked
    assert max(asked) == 1


def test_a_better_scale_has_the_fields_of_before_counted_again(post: Post) -> None:
    class Unsure(StandIn):
        """Sees larger cells where there are more."""

        def measured(self, image: UInt8, start: int) -> Measure:
            n_dark = int((image[:, :, 1] < 180).sum())
            return Measure(n_dark / 100, n_dark // 1000, 1)

    post.analyzer = Unsure()
    counting = replace(post.options().counting, scale=None)
    post.changes["counting"] = counting
    post.write("s1/a.png", 3)
    post.script.at(20, lambda: post.write("s1/b.png", 5))
    post.until(60)
    assert post.analyzer.analyzed == ["s1/a", "s1/b", "s1/a"]
    assert [scale.cell_diameter_px for scale in post.analyzer.scales] == [37.5, 63.0, 63.0]
    assert post.table("s1") == {"a": "3", "b": "5"}


@pytest.mark.parametrize("of_service", [None, GIVEN])
def test_a_scale_that_a_run_has_corrected_is_not_undone(post: Post, of_service: Scale | None) -> None:
    right = Scale(95.0, ScaleSource.CELL_DIAMETER)
    post.changes["counting"] = replace(post.options().counting, scale=of_service)

    def correct() -> None:
        recipe = AnalyzerRecipe(BUNDLE_ID, lambda: post.analyzer)
        count_once([post.source / "s1"], CountOptions(post.out, recipe, scale=right))

    post.write("s1/a.png", 3)
    post.write("s2/a.png", 4)
    post.script.at(20, correct)
    post.script.at(40, lambda: post.write("s1/b.png", 5))
    post.until(80)
    assert [s.cell_diameter_px for s in post.analyzer.scales] == [40.0, 40.0, 95.0, 95.0]  # nothing twice
    assert post.analyzer.analyzed[2:] == ["s1/a", "s1/b"]


def test_a_service_looks_again_at_the_scale_of_a_slide_that_lost_an_image(post: Post) -> None:
    class Unsure(StandIn):
        """Sees larger cells where there are more."""

        def measured(self, image: UInt8, start: int) -> Measure:
            n_dark = int((image[:, :, 1] < 180).sum())
            return Measure(n_dark / 100, n_dark // 1000, 1)

    post.analyzer = Unsure()
    post.changes["counting"] = replace(post.options().counting, scale=None)
    post.write("s1/a.png", 3)
    large = post.write("s1/b.png", 5)
    post.write("s2/c.png", 2)
    post.script.at(20, lambda: large.rename(post.source / "s2" / "b.png") and None)
    post.until(60)
    assert (post.table("s1"), post.table("s2")) == ({"a": "3"}, {"b": "5", "c": "2"})
    assert post.analyzer.analyzed[-1] == "s1/a"
    assert post.analyzer.scales[-1].cell_diameter_px == 37.5


def test_an_image_that_was_passed_over_counts_when_the_other_one_changes(post: Post) -> None:
    post.write("s1/b.png", 3)
    post.script.at(20, lambda: post.write("s1/a.png", 3))
    post.script.at(40, lambda: post.table("s1") == {"a": "3", "b": "duplicate"} or pytest.fail("not moved"))
    post.script.at(41, lambda: post.write("s1/a.png", 7))
    post.until(70)
    assert post.table("s1") == {"a": "7", "b": "3"}


def test_restart_counts_nothing_again(post: Post) -> None:
    post.write("s1/a.png", 3)
    post.until(10)
    before = (post.out / "s1.csv").read_bytes()
    again = post.again()
    again.until(10)
    assert again.analyzer.analyzed == []
    assert (post.out / "s1.csv").read_bytes() == before


def test_once_drains_and_ends(post: Post) -> None:
    post.write("s1/a.png", 3)
    assert post.run(once=True) == ExitCode.OK
    _, state = read_state(post.out)  # else the doctor would ask why it does not run
    assert state is not None and state.activity is Activity.STOPPING
    assert post.table("s1") == {"a": "3"}
    (post.source / "s1" / "broken.png").write_bytes(b"no image")
    again = post.again()
    assert again.run(once=True) == ExitCode.SOME_FAILED
    assert again.table("s1") == {"a": "3", "broken": "not-an-image"}
    assert again.script.now_s < 1010 + 120  # it is not waited for longer than its grace


def test_once_waits_for_a_file_that_is_still_written(post: Post) -> None:
    now = post.script.clock().now().timestamp()
    path = post.source / "a.png"
    path.write_bytes(encoded(disks(3))[:100])
    os.utime(path, (now, now))
    post.script.at(20, lambda: write_disks(path, 3))
    assert post.run(once=True) == ExitCode.OK
    assert post.table("camera") == {"a": "3"}


def test_once_says_what_is_wrong_and_leaves(post: Post) -> None:
    post.source.rmdir()
    with pytest.raises(UnavailableError, match=r"no such file"):
        post.run(once=True)
    post.source.mkdir()
    post.write("a.png")
    post.changes["min_free_bytes"] = 10**18
    with pytest.raises(UnavailableError, match="MB are free"):
        post.again().run(once=True)


# -- trouble ----------------------------------------------------------------------------------------------


def test_a_source_that_is_away_is_a_state_said_once(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    post.write("s1/a.png", 3)
    away = post.folder / "away"
    states: list[ServiceState] = []
    post.script.at(5, lambda: post.source.rename(away))
    post.script.at(300, lambda: states.append(post.state()))
    post.script.at(301, lambda: away.rename(post.source))
    post.script.at(320, lambda: post.write("s1/b.png", 5))
    post.script.at(400, lambda: states.append(post.state()))
    post.until(401)
    assert [(s.activity, s.source_online) for s in states] == [
        (Activity.SOURCE_AWAY, False),
        (Activity.WATCHING, True),
    ]
    assert post.table("s1") == {"a": "3", "b": "5"}
    assert post.analyzer.analyzed == ["s1/a", "s1/b"]
    assert sum("source away:" in r.getMessage() for r in caplog.records) == 1
    assert sum("source away is over" in r.getMessage() for r in caplog.records) == 1


def test_a_source_that_is_away_at_the_start_is_waited_for(post: Post) -> None:
    post.source.rmdir()
    post.script.at(60, lambda: post.write("s1/a.png", 3))
    post.until(90)
    assert post.table("s1") == {"a": "3"}


def test_an_empty_folder_on_another_mount_is_away_and_one_with_images_is_not(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [Mount("/mnt", "/", "cifs", "//camera/images")]
    monkeypatch.setattr("rbc_edge.station.source.mount_of", lambda _: mounts[-1])
    path = post.write("s1/a.png", 3)
    post.script.at(5, path.unlink)
    states: list[tuple[Activity, str]] = []

    def note() -> None:
        states.append((post.state().activity, post.state().detail))

    post.script.at(30, note)  # emptied, as cameras do: no trouble
    post.script.at(31, lambda: mounts.append(Mount("/", "/", "ext4", "/dev/sda1")))
    post.script.at(60, note)
    post.script.at(61, lambda: post.write("s1/b.png", 4))  # moved to another disk on purpose
    post.script.at(90, note)
    post.until(91)
    assert [activity for activity, _ in states] == [
        Activity.WATCHING,
        Activity.SOURCE_AWAY,
        Activity.WATCHING,
    ]
    assert "images came from cifs //camera/images on /mnt" in states[1][1]
    assert post.table("s1") == {"a": "3", "b": "4"}


def test_where_images_come_from_is_remembered_after_trouble(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [Mount("/mnt", "/", "cifs", "//camera/images")]
    monkeypatch.setattr("rbc_edge.station.source.mount_of", lambda _: mounts[-1])
    path = post.write("s1/a.png", 3)
    begin, errors = Ledger.begin, [UnavailableError("cannot write", "free space")]

    def failing(ledger: Ledger, files: Sequence[InboxFile]) -> None:
        if errors:
            raise errors.pop()
        begin(ledger, files)

    monkeypatch.setattr(Ledger, "begin", failing)
    states: list[Activity] = []
    post.script.at(30, path.unlink)
    post.script.at(31, lambda: mounts.append(Mount("/", "/", "ext4", "/dev/sda1")))
    post.script.at(60, lambda: states.append(post.state().activity))
    post.until(61)
    assert (post.table("s1"), states) == ({"a": "3"}, [Activity.SOURCE_AWAY])


def test_without_its_marker_nothing_is_counted(post: Post) -> None:
    post.changes["marker"] = ".station"
    post.write("s1/a.png", 3)
    seen: list[object] = []
    post.script.at(60, lambda: seen.append((post.table("s1"), post.state().activity)))
    post.script.at(61, (post.source / ".station").touch)
    post.until(90)
    assert seen == [({}, Activity.SOURCE_AWAY)]
    assert post.table("s1") == {"a": "3"}


def test_a_full_disk_pauses_and_goes_on_by_itself(
    post: Post, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = [10_000_000]
    post.changes["min_free_bytes"] = 5_000_000
    monkeypatch.setattr("rbc_edge.station.service.free_bytes", lambda _: free[0])
    seen: list[object] = []

    def set_free(n: int) -> Callable[[], None]:
        return lambda: free.__setitem__(0, n)

    post.script.at(1, set_free(4_000_000))
    post.script.at(2, lambda: post.write("s1/a.png", 3))
    post.script.at(60, lambda: seen.append((post.table("s1"), post.state().activity, post.state().detail)))
    post.script.at(61, set_free(5_200_000))  # a little more is not enough, or it would flutter
    post.script.at(100, lambda: seen.append(post.table("s1")))
    post.script.at(101, set_free(6_000_000))
    post.until(140)
    assert seen[0] == ({}, Activity.DISK_FULL, f"{post.out}: 4 MB are free, less than 5 MB")
    assert seen[1] == {}
    assert post.table("s1") == {"a": "3"}
    assert sum("disk nearly full:" in r.getMessage() for r in caplog.records) == 1
    assert sum("disk nearly full is over" in r.getMessage() for r in caplog.records) == 1


def test_results_that_cannot_be_written_are_a_state(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbc_edge.views import tables

    broken = [True]
    write = tables._write

    def failing(path: Path, *rest: object) -> None:
        if broken[0]:
            raise UnavailableError(f"{path.parent}: cannot write {path.name}: no space left", "free space")
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "_write", failing)
    post.write("s1/a.png", 3)
    post.write("s1/b.png", 5)
    states: list[Activity] = []
    post.script.at(60, lambda: states.append(post.state().activity))
    post.script.at(61, lambda: broken.__setitem__(0, False))
    post.until(120)
    assert states == [Activity.RESULTS_AWAY]
    assert post.table("s1") == {"a": "3", "b": "5"}
    assert sorted(post.analyzer.analyzed) == ["s1/a", "s1/b"]  # what was committed is not counted again


def test_a_table_that_another_program_holds_keeps_only_its_slide_waiting(post: Post) -> None:
    post.write("s1/a.png", 3)
    held: list[tuple[dict[str, str], tuple[str, ...]]] = []
    (post.out / "s1.csv").mkdir(parents=True)  # cannot be replaced, like a table that Excel holds on a share
    (post.out / FILE_NAME).touch()
    post.script.at(10, lambda: post.write("s2/a.png", 5))
    post.script.at(30, lambda: held.append((post.table("s2"), post.state().problems)))
    post.script.at(31, (post.out / "s1.csv").rmdir)
    post.script.at(55, lambda: held.append(({}, post.state().problems)))
    post.until(60)
    (others, problems), (_, after) = held
    assert others == {"a": "5"}
    assert [p for p in problems if "s1.csv" in p and "close the program that has it open" in p]
    assert post.table("s1") == {"a": "3"}
    assert after == ()


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("bad allocation")]
)
def test_an_image_for_which_memory_is_short_is_tried_again_and_never_failed(
    post: Post, error: Exception
) -> None:
    for name in "abc":
        post.write(f"s1/{name}.png", 3, seed=ord(name))
    seen: list[dict[str, str]] = []

    class Short(StandIn):
        is_short = True

        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if field.fov == "b" and self.is_short:
                raise error
            return super().analyze(field, scale)

    analyzer = post.analyzer = Short()
    post.script.at(200, lambda: seen.append(post.table("s1")))  # longer than its grace
    post.script.at(201, lambda: setattr(analyzer, "is_short", False))
    post.until(600)
    assert seen == [{"a": "3", "c": "3"}]
    assert post.table("s1") == {"a": "3", "b": "3", "c": "3"}
    assert analyzer.analyzed.count("s1/a") == 1


def test_another_writer_is_waited_for(post: Post) -> None:
    post.write("s1/a.png", 3)
    post.out.mkdir()
    writer = writing(post.out)
    states: list[Activity] = []
    writer.__enter__()
    post.script.at(30, lambda: states.append(post.state().activity))
    post.script.at(31, lambda: writer.__exit__(None, None, None))
    post.until(60)
    assert states == [Activity.ANOTHER_WRITER]
    assert post.table("s1") == {"a": "3"}


def test_a_service_that_waits_for_another_writer_ends_when_asked(post: Post) -> None:
    post.out.mkdir()
    with writing(post.out):
        assert post.until(5) == 143


def test_run_and_retry_beside_the_service_are_noticed(post: Post) -> None:
    (post.source / "s1").mkdir()
    path = post.source / "s1" / "a.png"
    path.write_bytes(b"no image")
    post.write("s2/b.png", 2)
    post.script.at(150, lambda: post.table("s1") or pytest.fail("not failed yet"))

    def beside() -> None:
        paths = (post.source / "s2",)
        options = CountOptions(post.out, AnalyzerRecipe(BUNDLE_ID, StandIn), scale=GIVEN)
        summary = count_once(paths, options)
        assert (summary.n_counted, summary.n_unchanged) == (0, 1)
        whole, status = encoded(disks(4)), path.stat()
        path.write_bytes(whole)
        os.truncate(path, len(whole))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with Ledger(post.out) as ledger:
            assert ledger.retry("s1") == 1
            ledger.commit()

    post.script.at(151, beside)
    post.until(200)
    assert post.table("s1") == {"a": "4"}
    assert post.analyzer.analyzed == ["s2/b", "s1/a"]


def test_what_a_person_decides_beside_the_service_holds(
    post: Post, rbc: Callable[..., tuple[int, str, str]]
) -> None:
    post.write("s1/a.png", 2)
    post.write("s1/b.png", 3)

    def ask(*words: object) -> Callable[[], None]:
        return lambda: rbc(*words, "--out", post.out) and None

    post.script.at(20, ask("exclude", "s1", "a", "--reason", "dust"))
    post.script.at(21, ask("set", "s1", "--cell-diameter", 95))
    post.script.at(40, lambda: post.table("s1") == {"a": "excluded", "b": "3"} or pytest.fail("excluded"))
    post.script.at(41, ask("forget", "s1", "b"))
    post.script.at(42, lambda: post.write("s1/c.png", 4))
    post.script.at(60, lambda: post.table("s1") == {"a": "excluded", "c": "4"} or pytest.fail("forgotten"))
    post.script.at(61, ask("forget", "s1", "--undo"))
    post.script.at(62, ask("set", "s1", "--undo"))
    assert post.until(90) == 143
    assert post.table("s1") == {"a": "2", "b": "3", "c": "4"}  # --undo takes back both
    assert {s.cell_diameter_px for s in post.analyzer.scales[:2]} == {40.0}
    assert [s.cell_diameter_px for s in post.analyzer.scales[2:5]] == [95.0] * 3
    assert [s.cell_diameter_px for s in post.analyzer.scales[5:]] == [40.0] * 3


def test_a_folder_renamed_beside_the_service_moves(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    post.write("s1/a.png", 2)
    post.write("s1/b.png", 3)
    post.script.at(20, lambda: (post.source / "s1").rename(post.source / "t1") and None)
    post.until(60)
    assert (post.table("s1"), post.table("t1")) == ({}, {"a": "2", "b": "3"})
    assert post.analyzer.analyzed == ["s1/a", "s1/b"]
    assert caplog.text.count("slide s1: 2 fields moved to slide t1") == 1


def test_other_images_under_the_name_of_a_slide_wait_and_are_said_once(
    post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    write_disks(post.folder / "archive" / "s1" / "a.png", 2)
    options = CountOptions(post.out, AnalyzerRecipe(BUNDLE_ID, StandIn), scale=GIVEN)
    count_once((post.folder / "archive",), options)
    post.write("s1/b.png", 3)
    post.write("s2/c.png", 4)
    post.until(200)
    assert (post.table("s1"), post.table("s2")) == ({"a": "2"}, {"c": "4"})
    assert caplog.text.count("both would be slide s1") == 1


def test_a_second_service_is_refused(post: Post) -> None:
    def second() -> None:
        with pytest.raises(UnavailableError, match=rf"another rbc-edge watch \(process {os.getpid()}"):
            post.again().run()

    post.script.at(5, second)
    post.until(10)


def test_clock_that_jumps_loses_and_doubles_nothing(post: Post) -> None:
    for i, jump_s in enumerate((-1e6, 1e6, -3e6)):
        post.script.at(i * 20, lambda n=i: post.write(f"s1/{n}.png", n + 1, seed=n))  # type: ignore[misc]
        post.script.at(i * 20 + 1, lambda s=jump_s: setattr(post.script, "wall_s", s))  # type: ignore[misc]
    post.until(100)
    assert post.table("s1") == {"0": "1", "1": "2", "2": "3"}
    assert len(post.analyzer.analyzed) == 3


# -- the ledger -------------------------------------------------------------------------------------------


def test_a_damaged_ledger_is_kept_aside_and_rebuilt(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    post.write("s1/a.png", 3)
    gone = post.write("s1/b.png", 5)
    post.until(10)
    gone.unlink()
    (post.out / FILE_NAME).write_bytes(b"\x00" * 10_000)
    again = post.again()
    again.until(10)
    assert again.table("s1") == {"a": "3"}
    (aside,) = post.out.glob("damaged-*")
    assert (aside / FILE_NAME).read_bytes() == b"\x00" * 10_000
    assert ",b," in (aside / "s1.csv").read_text()
    assert any("the ledger was damaged" in r.getMessage() for r in caplog.records)


def test_damage_that_a_second_look_does_not_see_moves_nothing(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(["a page that was read wrongly once"])
    monkeypatch.setattr("rbc_edge.store.queries.damage", lambda _: next(found, ""))
    post.write("s1/a.png", 3)
    post.until(10)
    assert post.table("s1") == {"a": "3"}
    assert not list(post.out.glob("damaged-*"))
    assert next(found, "") == ""


def test_damage_that_shows_while_it_works_is_mended_too(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    post.write("s1/a.png", 3)
    begin = Ledger.begin
    n = 0

    def failing(ledger: Ledger, files: Sequence[InboxFile]) -> None:
        nonlocal n
        n += 1
        if n == 2:
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            with ledger.database.guard():
                raise error
        begin(ledger, files)

    monkeypatch.setattr(Ledger, "begin", failing)
    post.script.at(20, lambda: post.write("s1/b.png", 5))
    post.until(60)
    assert post.table("s1") == {"a": "3", "b": "5"}
    assert len(list(post.out.glob("damaged-*"))) == 1


def test_a_damaged_ledger_that_cannot_be_kept_aside_now_is_later(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    post.write("s1/a.png", 3)
    begin = Ledger.begin
    errors = [UnavailableError("cannot write", "free space"), DamagedError("malformed", "")]

    def damaged(ledger: Ledger, files: Sequence[InboxFile]) -> None:
        if len(errors) == 2:
            raise errors.pop()
        begin(ledger, files)

    def away(out: Path, stamp: str) -> Path:
        if errors:
            raise errors.pop()
        return keep_aside(out, stamp)

    monkeypatch.setattr(Ledger, "begin", damaged)
    monkeypatch.setattr(service, "keep_aside", away)
    post.until(60)
    assert post.table("s1") == {"a": "3"}
    assert len(list(post.out.glob("damaged-*"))) == 1


@pytest.mark.parametrize("change", ["counts = x'00'", "scale_source = 'guess'", "n_refused = 7", "fov = 'x'"])
@pytest.mark.parametrize("is_at_work", [False, True])
def test_a_damaged_row_is_repaired_or_counted_again_and_the_ledger_stays(
    post: Post, caplog: pytest.LogCaptureFixture, change: str, is_at_work: bool
) -> None:
    def alter() -> None:
        with sqlite3.connect(post.out / FILE_NAME) as db:
            db.execute(f"UPDATE field SET {change} WHERE fov = 'a'")
        db.close()

    post.write("s1/a.png", 3)
    gone = post.write("s1/b.png", 5)
    if is_at_work:
        post.script.at(20, alter)
        post.script.at(21, lambda: post.write("s1/c.png", 4))
        post.until(60)
    else:
        post.until(10)
        gone.unlink()
        alter()
        post.write("s1/c.png", 4)
        post = post.again()
        post.until(30)
    assert post.table("s1") == {"a": "3", "b": "5", "c": "4"}
    assert not list(post.out.glob("damaged-*"))
    assert sum("row of" in r.getMessage() and "was damaged" in r.getMessage() for r in caplog.records) == 1


def test_a_killed_services_tables_are_written_first(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    post.write("s1/a.png", 3)
    with monkeypatch.context() as killed:
        killed.setattr(
            "rbc_edge.views.tables.Tables.write_slide", lambda *_: (_ for _ in ()).throw(SystemExit)
        )
        with pytest.raises(SystemExit):
            post.until(10)
    assert post.table("s1") == {}
    (post.source / "s1" / "a.png").unlink()
    post.again().until(10)
    assert post.table("s1") == {"a": "3"}


# -- settings ---------------------------------------------------------------------------------------------


def test_hangup_takes_new_settings_or_keeps_the_old(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    post.write("s1/a.png", 3)
    results: list[Exception | WatchOptions] = [
        BundleError("the bundle is broken"),
        replace(post.options(), counting=replace(post.options().counting, out=post.folder / "other")),
        replace(
            post.options(),
            counting=replace(
                post.options().counting, recipe=AnalyzerRecipe("fedcba9876543210", lambda: post.analyzer)
            ),
        ),
    ]

    def reload() -> WatchOptions:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    for time_s in (20, 40, 60):
        post.script.at(time_s, lambda: os.kill(os.getpid(), signal.SIGHUP))
    post.script.at(50, lambda: post.analyzer.analyzed == ["s1/a"] or pytest.fail("counted again"))
    post.script.at(80, lambda: setattr(post.stop, "signal", signal.SIGTERM))
    post.run(reload=reload)
    assert post.analyzer.analyzed == ["s1/a", "s1/a"]
    assert "fedcba9876543210" in (post.out / "s1.csv").read_text()
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "the bundle is broken" in errors[0]
    assert "out cannot change" in errors[1]
    assert post.systemd.lines.count("reloading") == 3
    assert sum(line.startswith("ready") for line in post.systemd.lines) == 4


def test_options_that_can_never_work_are_refused_at_the_start(post: Post) -> None:
    counting = post.options().counting
    post.changes["counting"] = replace(counting, out=post.source / "out")
    with pytest.raises(UsageError, match="lies inside the source"):
        post.run()
    post.changes["counting"] = replace(counting, slide_pattern="(")
    with pytest.raises(UsageError, match="no regular expression"):
        post.run()
    post.changes = {"metrics": post.source / "x.prom"}
    with pytest.raises(UsageError, match="metrics file"):
        post.run()
    assert not post.out.exists()


def test_names_that_clash_are_problems_and_the_rest_is_counted(
    post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    post.write("s/a.jpg.png", 1)
    post.write("s/a.png", 2)
    write_disks(post.source / "s" / "a.jpg", 3)
    problems: list[tuple[str, ...]] = []
    post.script.at(30, lambda: problems.append(post.state().problems))
    post.until(60)
    assert post.table("s") == {"a.jpg": "3", "a.png": "2"}
    assert "two images of slide s would have the name a.jpg" in problems[0][0]
    assert sum("would have the name" in r.getMessage() for r in caplog.records) == 1


def with_pictures(post: Post) -> Post:
    counting = post.options().counting
    post.changes["counting"] = replace(counting, views=ViewOptions(overlays=True, reports=True))
    return post


def test_overlays_come_with_the_counts_and_pages_when_the_slide_rests(post: Post) -> None:
    with_pictures(post)
    overlay, page = post.out / "overlays" / "s1" / "a_overlay.jpg", post.out / "reports" / "s1.html"
    seen: list[tuple[bool, bool]] = []
    post.script.at(5, lambda: post.write("s1/a.png"))
    for time_s in (4.9, 19.0, 70.0):
        post.script.at(time_s, lambda: seen.append((overlay.exists(), page.exists())))
    assert post.until(80) == 143
    assert seen == [(False, False), (True, False), (True, True)]
    assert sorted(p.name for p in post.source.rglob("*") if p.is_file()) == ["a.png"]


def test_once_leaves_with_every_picture(post: Post) -> None:
    with_pictures(post)
    post.write("s1/a.png")
    assert post.run(once=True) == 0
    assert (post.out / "overlays" / "s1" / "a_overlay.jpg").exists()
    assert (post.out / "reports" / "s1.html").exists()


def test_pictures_of_what_a_service_before_counted_are_made(post: Post) -> None:
    post.write("s1/a.png")
    assert post.run(once=True) == 0
    assert not (post.out / "overlays").exists()
    assert with_pictures(post).run(once=True) == 0
    assert (post.out / "overlays" / "s1" / "a_overlay.jpg").exists()


def test_no_picture_takes_the_room_of_counts(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    post.write("s1/a.png")
    assert post.run(once=True) == 0
    with_pictures(post).changes["min_free_bytes"] = 1000
    monkeypatch.setattr("rbc_edge.station.service.free_bytes", lambda _: 999)
    assert post.run(once=True) == 0
    assert not (post.out / "overlays").exists() and not (post.out / "reports").exists()


def test_pictures_that_cannot_be_made_fail_nothing(post: Post, caplog: pytest.LogCaptureFixture) -> None:
    post.write("s1/a.png")
    post.out.mkdir()
    for name in ("overlays", "reports"):
        (post.out / name).write_bytes(b"")
    assert with_pictures(post).run(once=True) == 0
    assert "cannot write the reports" in caplog.text and "the counts are kept" in caplog.text


def test_an_archive_copied_in_does_not_hold_up_the_slide_at_work(post: Post) -> None:
    for i in range(3):
        os.utime(post.write(f"archive/{i}.png", 1, seed=i), (1, 1))
    os.utime(post.write("work/a.png", 2, seed=9), (1000, 1000))
    post.until(10)
    assert post.analyzer.analyzed[0] == "work/a"
    assert len(post.analyzer.analyzed) == 4


def test_what_is_not_counted_is_said_once_and_stands_in_the_state(
    post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    (post.source / "s").mkdir(parents=True)
    for i, name in enumerate(("a.heic", "b.heic", "@eaDir/c.png", "old/d.png")):
        path = post.source / "s" / name
        path.parent.mkdir(exist_ok=True)
        post.script.at(20 * i, lambda path=path: path.write_bytes(b"x"))  # type: ignore[misc]
    post.changes["counting"] = replace(post.options().counting, ignore=("old",))
    with caplog.at_level(logging.INFO, "rbc_edge"):
        post.until(100)
    assert caplog.text.count("of kinds that are not read") == 1
    _, state = read_state(post.out)
    assert state is not None
    assert state.not_counted[0].startswith("2 files of kinds that are not read: 2 .heic; ")
    assert (state.source_online, state.n_counted, state.n_failed) == (True, 0, 0)
    assert any(line.startswith("up to date") for line in post.systemd.lines)
    assert status_of(post.out, now=datetime.now(UTC)).not_counted == state.not_counted  # it has ended


def test_pages_are_counted_as_their_file_grows(post: Post) -> None:
    path = post.source / "s1" / "a.tif"
    path.parent.mkdir()

    def save(*counts: int) -> None:
        first, *others = [Image.fromarray(np.roll(disks(n, seed=n), (9 * n, 31 * n), (0, 1))) for n in counts]
        first.save(path, save_all=True, append_images=others)

    save(3, 4)
    post.script.at(20, lambda: save(3, 4, 5))
    post.script.at(15, lambda: seen.append(sorted(post.table("s1"))))
    seen: list[list[str]] = []
    post.until(400)
    assert seen == [["a#1", "a#2"]]
    assert sorted(post.table("s1")) == ["a#1", "a#2", "a#3"]
    assert post.analyzer.analyzed == ["s1/a#1", "s1/a#2", "s1/a#1", "s1/a#2", "s1/a#3"]
    with Ledger(post.out) as ledger:
        assert ledger.retry() == 0
        assert ledger.reader.tally().n_ok == 3

"""The main job for years: what comes into the camera's folder is counted, once, whatever happens meanwhile.

A loop of rounds, in one thread. Each looks whether the folder is there, scans it, takes the images that have
settled, and counts a portion of them with the body that a single run has too (`runner.Run`). Trouble outside,
a share that is away or a disk that is full, is a state that is said, and ends by itself; it never ends the
service.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC
from itertools import chain, groupby
from math import inf
from pathlib import Path
from types import FrameType
from typing import Final

from rbc_edge import __version__
from rbc_edge.errors import ExitCode, RbcEdgeError, UnavailableError, UsageError
from rbc_edge.station.inbox import UNFINISHED, Inbox, Settling, check_pattern, scan
from rbc_edge.station.runner import Analyzing, Clock, Run, RunOptions, Step, Stop, check_apart
from rbc_edge.station.sandbox import survives
from rbc_edge.station.source import Doorbell, Events, Mount, Sight, look
from rbc_edge.station.state_file import Activity, ServiceState, StateFile, boot_id
from rbc_edge.station.systemd import Systemd
from rbc_edge.store.ledger import DamagedError, Ledger, Status, keep_aside
from rbc_edge.store.outdir import BusyError, free_bytes, writing
from rbc_edge.text import path_text
from rbc_edge.values import InboxFile
from rbc_edge.views.refresh import Pictures
from rbc_edge.views.tables import Tables

log = logging.getLogger(__name__)

PATIENCE_S: Final = 8.0
"""How long the image in hand may take after SIGTERM; the service leaves within ten seconds."""

_PORTION_S: Final = 10.0  # then it looks around: new images, the disk, signals, another writer's turn
_OVERHEAD: Final = 10.0  # scans and tables may take a tenth of the time
_BREATH_S: Final = 0.1  # between portions, for another writer
_SOON_S: Final = 0.05  # between two scans, when events come in a row
_TROUBLE_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)  # between tries, while something is wrong
_TELL_S: Final = 2.0
_SILENCE_S: Final = 30.0  # who is silent for a minute may hang (`Status`)
_METRICS_S: Final = 15.0
_RATE_S: Final = 300.0
_ROOM_AGAIN: Final = 1.1  # a paused service goes on when there is a tenth more room than it paused at
_MOST_PROBLEMS: Final = 20
_SOURCE_NOTE: Final = "source"


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What a service is asked to do.

    Attributes:
        source: The camera's folder.
        counting: How to count; its `paths` is the source.
        bundle_id: The bundle that counts.
        make_analyzer: Called once, when the first image needs counting.
        trial_options: Options of ``rbc-edge run`` that count as this does; see `sandbox.survives`.
        marker: Name of a file that lies in the source while it is the right one; None: none.
        settle_s: See `Settling`.
        grace_s: See `Settling`.
        scan_every_s: How often the folder is scanned when nothing happens, seconds.
        min_free_bytes: Nothing is counted while the results' disk has less room.
        polling: Whether to do without events; None: as the file system needs it.
        metrics: Prometheus text file to write; None: none.
    """

    source: Path
    counting: RunOptions
    bundle_id: str
    make_analyzer: Callable[[], Analyzing]
    trial_options: tuple[str, ...] = ()
    marker: str | None = None
    settle_s: float = 2.0
    grace_s: float = 120.0
    scan_every_s: float = 10.0
    min_free_bytes: int = 200_000_000
    polling: bool | None = None
    metrics: Path | None = None


def run_forever(
    options: WatchOptions,
    *,
    once: bool = False,
    reload: Callable[[], WatchOptions] | None = None,
    stop: Stop | None = None,
    clock: Clock | None = None,
    doorbell: Doorbell | None = None,
    systemd: Systemd | None = None,
) -> ExitCode | int:
    """Counts what comes into the camera's folder, until it is asked to stop.

    Args:
        options: What to do.
        once: End when nothing is left to do, instead of waiting for more. Trouble is then an error.
        reload: Gives the new options when SIGHUP asks for them; raises `RbcEdgeError` when they are wrong.
        stop: Ends the service after the image in hand.
        clock: Where time comes from.
        doorbell: What wakes the service.
        systemd: The service manager.

    Returns:
        The exit code.

    Raises:
        UsageError: The options contradict each other.
        UnavailableError: Another service works on the results, or they cannot be written at the start.
        BundleError: From `make_analyzer`.
    """
    check_options(options)
    try:
        options.counting.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(options.counting.out)}: cannot make the output folder: {error.strerror}",
            "choose another --out, or check the permissions of its parent",
        ) from error
    watch = Watch(
        options,
        page=StateFile(options.counting.out),
        once=once,
        reload=reload,
        stop=stop or Stop(),
        clock=clock or Clock(),
        doorbell=doorbell or Doorbell(),
        systemd=systemd or Systemd(),
    )
    try:
        return watch.run()
    finally:
        watch.close()


def check_options(options: WatchOptions) -> None:
    """Raises `UsageError` for options that can never work, wherever the folders are now."""
    check_apart((options.source,), options.counting.out)
    check_pattern(options.counting.slide_pattern)
    if options.metrics is not None and options.metrics.is_relative_to(options.source):
        raise UsageError(
            f"the metrics file {path_text(options.metrics)} lies inside the source", "the source is read only"
        )


class Watch:
    """The service; `run_forever` is its door.

    One thread does everything that matters. `Events` has threads of its own, which only ring the doorbell.
    """

    def __init__(
        self,
        options: WatchOptions,
        *,
        page: StateFile,
        once: bool,
        reload: Callable[[], WatchOptions] | None,
        stop: Stop,
        clock: Clock,
        doorbell: Doorbell,
        systemd: Systemd,
    ) -> None:
        self._options = options
        self._page = page
        self._once = once
        self._reload = reload
        self._stop = stop
        self._clock = clock
        self._doorbell = doorbell
        self._systemd = systemd
        self._events = Events(doorbell.ring)
        self._reload_asked = False

        self._ledger: Ledger | None = None
        self._tables: Tables | None = None
        self._run: Run | None = None
        self._pictures: Pictures | None = None
        self._analyzer: Analyzing | None = None
        self._is_damaged = ""
        self._is_new_view = True
        self._changes = 0

        self._settling = self._new_settling()
        self._known: set[int] = set()  # of files that need no look: 500,000 of them take 30 MB
        self._closed: set[Path] = set()
        self._watched: tuple[int, int] | None = None
        self._mount: Mount | None = None
        self._next_scan_s = self._soonest_scan_s = -inf
        self._n_troubles = 0
        self._is_full = False
        self._problems: set[str] = set()

        self._state = ServiceState(
            pid=os.getpid(), version=__version__, started_at=self._now(), boot_id=boot_id()
        )
        self._started_s = clock.monotonic_s()
        self._told_s = self._metrics_s = -inf
        self._metrics_error = ""
        self._pace: deque[float] = deque()  # when images were settled, monotonic seconds

    # -- the loop -------------------------------------------------------------------------------------

    def run(self) -> ExitCode | int:
        """Goes round until it is asked to stop."""
        self._tell(Activity.STARTING)
        with self._on_reload():
            self._open(first=True)
            self._systemd.ready("started")
            log.info(
                "watching %s, counting into %s with bundle %s",
                path_text(self._options.source),
                path_text(self._options.counting.out),
                self._options.bundle_id,
            )
            while self._stop.signal is None:
                if self._reload_asked:
                    self._take_new_options()
                wait_s = self._round()
                self._systemd.beat()
                if wait_s is None:
                    return ExitCode.SOME_FAILED if self._has_failures() else ExitCode.OK
                if self._stop.signal is None:
                    self._wait(wait_s)
        self._systemd.stopping()
        self._tell(Activity.STOPPING, f"asked by {signal.Signals(self._stop.signal).name}")
        log.info("stopping; what was counted is kept")
        return 128 + self._stop.signal

    def close(self) -> None:
        """Lets go of everything."""
        self._events.stop()
        self._close_ledger()
        self._page.close()

    def _wait(self, time_s: float) -> None:
        """Waits for the time or the doorbell; short enough for systemd's patience."""
        end_s = self._clock.monotonic_s() + time_s
        while (left_s := end_s - self._clock.monotonic_s()) > 0 and self._stop.signal is None:
            closed = self._doorbell.wait(min(left_s, (self._systemd.watchdog_s or inf) / 3, _SILENCE_S))
            self._alive()
            if closed is not None:
                self._closed |= closed
                # The scan is soon, and not once for every event of a thousand.
                self._next_scan_s = min(self._next_scan_s, self._soonest_scan_s)
                return

    def _round(self) -> float | None:
        """Does what there is to do; returns for how long there is nothing, seconds; None: once is done."""
        try:
            now_s = self._clock.monotonic_s()
            due_s = max(min(self._next_scan_s, self._settling.next_s()), self._soonest_scan_s)
            if now_s < due_s:
                return due_s - now_s
            if self._ledger is None:
                self._open()
            if self._is_new_view and self._tables is not None:
                with writing(self._options.counting.out):
                    self._tables.write()
                if self._pictures is not None:
                    self._pictures.changed()
                self._is_new_view = False
            sight = look(self._options.source, marker=self._options.marker)
            if sight.missing:
                self._events.stop()
                self._watched = None
                return self._source_away(sight.missing)
            self._listen(sight)
            try:
                inbox = self._scan()
            except (UnavailableError, OSError) as error:  # gone, or closed to us, since the look
                return self._source_away(str(error))
            missing = self._missing_mount(inbox, sight)
            if missing:
                return self._source_away(missing)
            return self._take(inbox, sight)
        except BusyError as error:
            return self._trouble(Activity.ANOTHER_WRITER, error)
        except DamagedError as error:
            self._is_damaged = str(error)
            self._close_ledger()
            return self._trouble(Activity.RESULTS_AWAY, error)
        except UnavailableError as error:
            self._close_ledger()
            return self._trouble(Activity.RESULTS_AWAY, error)

    def _take(self, inbox: Inbox, sight: Sight) -> float | None:
        """Counts a portion of what has settled."""
        ledger, run = self._ledger, self._run
        assert ledger is not None
        assert run is not None
        now_s = self._clock.monotonic_s()
        ready = self._settling.see(self._not_done(inbox), self._closed, now_s)
        self._closed.clear()
        self._state = replace(self._state, source_online=True)
        n_waiting = self._settling.n_waiting(now_s)
        self._state = replace(self._state, n_waiting=n_waiting, n_to_do=len(ready))
        if not ready:
            self._all_well(n_waiting)
            if not self._make_pictures():
                return _BREATH_S
            if self._once and not n_waiting:
                return None
            return max(min(self._next_scan_s, self._settling.next_s()) - self._clock.monotonic_s(), _SOON_S)
        self._check_room()
        of_slide = {slide: list(files) for slide, files in groupby(inbox.files, key=lambda f: f.slide_id)}
        # The slide under the microscope does not wait for an archive that was copied in.
        portions = [list(files) for _, files in groupby(ready, key=lambda f: f.slide_id)]
        portions.sort(key=lambda files: max(file.mtime_ns for file in files), reverse=True)
        n_recounts = run.n_recounts
        with writing(self._options.counting.out):
            self._keep_mount(sight)
            self._tell(Activity.COUNTING)
            run.settle(
                list(chain.from_iterable(portions)),
                of_slide=of_slide,
                time_s=max(_PORTION_S, self._state.scan_ms / 1e3 * _OVERHEAD),
            )
        if self._pictures is not None:
            self._pictures.changed({file.slide_id for file in ready})
            self._pictures.draw(keep_going=self._has_time, time_s=_PORTION_S)
        if run.n_recounts != n_recounts:
            self._known.clear()
        self._n_troubles = 0
        self._next_scan_s = self._clock.monotonic_s()
        self._soonest_scan_s = self._next_scan_s + _BREATH_S
        return _BREATH_S

    def _make_pictures(self) -> bool:
        """Goes on with what is to be drawn, while nothing is to be counted; tells whether all is."""
        out, least = self._options.counting.out, self._options.min_free_bytes
        if self._pictures is None or free_bytes(out) < least:  # what room is left is for counts
            return True
        if not self._pictures.draw(keep_going=self._has_time, time_s=_PORTION_S):
            return False
        self._pictures.report(keep_going=self._has_time, wait=not self._once)
        return True

    def _has_time(self) -> bool:
        self._alive()
        return self._stop.signal is None

    def _not_done(self, inbox: Inbox) -> list[InboxFile]:
        """Returns the files that need a look; what is done stays in memory as a number a file."""
        ledger, run = self._ledger, self._run
        assert ledger is not None
        assert run is not None
        changes = ledger.foreign_changes()
        if changes != self._changes:  # `rbc-edge run` or `retry` beside us
            self._changes = changes
            self._known.clear()
            if self._tables is not None:
                self._tables.look_again()
        before, self._known = self._known, set()
        left = []
        for file in inbox.files:
            key = hash(file)
            status = Status.OK if key in before else ledger.done_as(file, run.version)
            if status is None:
                left.append(file)
            elif status is not Status.DUPLICATE:
                self._known.add(key)
        return left

    def _all_well(self, n_waiting: int) -> None:
        self._n_troubles = 0
        self._tell(Activity.WATCHING, f"waiting for {n_waiting} unfinished images" if n_waiting else "")

    # -- the source -----------------------------------------------------------------------------------

    def _scan(self) -> Inbox:
        started_s = self._clock.monotonic_s()
        inbox = scan([self._options.source], slide_pattern=self._options.counting.slide_pattern, go_on=True)
        ended_s = self._clock.monotonic_s()
        elapsed_s = ended_s - started_s
        self._next_scan_s = ended_s + max(self._options.scan_every_s, elapsed_s * _OVERHEAD)
        self._soonest_scan_s = ended_s + max(_SOON_S, elapsed_s * _OVERHEAD / 2)
        problems = [f"{path_text(folder)}: cannot be read" for folder in inbox.unreadable] + list(
            inbox.clashes
        )
        for problem in problems:
            if problem not in self._problems:
                log.warning("%s", problem)
        self._problems = set(problems)
        self._state = replace(
            self._state,
            scanned_at=self._now(),
            scan_ms=elapsed_s * 1e3,
            problems=tuple(problems[:_MOST_PROBLEMS]),
        )
        return inbox

    def _listen(self, sight: Sight) -> None:
        """Has the file system wake us, where it can; again when the folder is another one."""
        options = self._options
        if self._watched == sight.identity and (self._state.polling or self._events.are_on):
            return
        polling, reason = bool(options.polling), "as the settings say"
        kind = sight.mount.kind if sight.mount else "unknown"
        if options.polling is None and sight.mount is not None and not sight.mount.gives_events:
            polling, reason = True, f"{kind} gives no events of what others write"
        if not polling:
            failure = self._events.start(options.source)
            polling, reason = bool(failure), failure
        else:
            self._events.stop()
        self._watched = sight.identity
        log.info(
            "%s lies on %s; %s",
            path_text(options.source),
            sight.mount or "an unknown file system",
            f"polling every {options.scan_every_s:g} s: {reason}" if polling else "woken by its events",
        )
        self._state = replace(
            self._state,
            file_system=kind,
            polling=polling,
            polling_reason=reason if polling else "",
        )

    def _missing_mount(self, inbox: Inbox, sight: Sight) -> str:
        """Returns, in words, that the folder is empty because what was mounted there is not."""
        if inbox.files or inbox.unreadable or self._options.marker is not None or self._ledger is None:
            return ""
        source, _, before = self._ledger.note(_SOURCE_NOTE).partition("\n")
        if source != path_text(self._options.source) or not before or before == str(sight.mount):
            return ""
        return f"{source}: it is empty and lies on {sight.mount}, and images came from {before}"

    def _keep_mount(self, sight: Sight) -> None:
        """Remembers where images came from."""
        if self._ledger is not None and sight.mount is not None and sight.mount != self._mount:
            self._ledger.keep_note(_SOURCE_NOTE, f"{path_text(self._options.source)}\n{sight.mount}")
            self._mount = sight.mount

    def _source_away(self, reason: str) -> float:
        self._state = replace(self._state, source_online=False, n_waiting=0, n_to_do=0)
        return self._trouble(
            Activity.SOURCE_AWAY, UnavailableError(reason, "nothing is forgotten; it goes on when it is back")
        )

    # -- the results ----------------------------------------------------------------------------------

    def _open(self, *, first: bool = False) -> None:
        """Opens the ledger; a damaged one is kept aside first.

        Raises:
            UnavailableError: It cannot be opened now.
        """
        out = self._options.counting.out
        while True:
            try:
                with writing(out):
                    self._open_held(out, check=first or bool(self._is_damaged))
                return
            except BusyError as error:
                if not first or self._stop.signal is not None:
                    raise
                self._wait(self._trouble(Activity.ANOTHER_WRITER, error))

    def _open_held(self, out: Path, *, check: bool) -> None:
        damage, self._is_damaged = self._is_damaged, ""
        ledger: Ledger | None = None
        if not damage:
            try:
                ledger = Ledger(out)
                damage = ledger.damage() if check else ""
            except DamagedError as error:
                damage = str(error)
        if damage:
            if ledger is not None:
                ledger.close()
            aside = keep_aside(out, self._clock.now().astimezone(UTC).strftime("%Y%m%dT%H%M%SZ"))
            log.error(
                "the ledger was damaged (%s). It is kept in %s, with the tables of before; images that are"
                " in the camera's folder are counted anew, counts of others stand in those tables only",
                damage,
                path_text(aside),
            )
            ledger = Ledger(out)
        assert ledger is not None
        self._ledger = ledger
        counting = self._options.counting
        self._tables = Tables(out, ledger, edges=counting.edges, cells=counting.cells)
        wanted = counting.pictures
        self._pictures = (
            Pictures(ledger, wanted, edges=counting.edges, monotonic_s=self._clock.monotonic_s)
            if wanted.overlays or wanted.reports
            else None
        )
        self._make_run()
        # The process before was killed; or tables are to look different now, or somebody has removed them.
        self._is_new_view = self._is_new_view or ledger.tables_are_stale()

    def _make_run(self) -> None:
        assert self._ledger is not None
        assert self._tables is not None
        self._known.clear()
        self._run = Run(
            self._options.counting,
            self._options.bundle_id,
            self._the_analyzer,
            ledger=self._ledger,
            tables=self._tables,
            on_step=self._on_step,
            stop=self._stop,
            clock=self._clock,
            survives=self._survives,
            may_wait=self._may_wait,
        )

    def _close_ledger(self) -> None:
        ledger, self._ledger, self._run, self._tables = self._ledger, None, None, None
        self._mount = self._pictures = None
        if ledger is not None:
            ledger.close()

    def _check_room(self) -> None:
        """Raises `_FullError` while the results' disk is nearly full: before harm, not after."""
        free = free_bytes(self._options.counting.out)
        least = self._options.min_free_bytes * (_ROOM_AGAIN if self._is_full else 1.0)
        self._is_full = free < least
        if self._is_full:
            raise _FullError(
                f"{path_text(self._options.counting.out)}: {free / 1e6:.0f} MB are free, less than"
                f" {self._options.min_free_bytes / 1e6:.0f} MB",
                "free space; it goes on by itself",
            )

    def _the_analyzer(self) -> Analyzing:
        if self._analyzer is None:
            self._analyzer = self._options.make_analyzer()
        return self._analyzer

    def _survives(self, paths: Sequence[Path]) -> bool:
        def keep_going() -> bool:
            self._alive()
            return self._stop.signal is None

        log.warning("a process died while it counted %s", ", ".join(map(path_text, paths)))
        return survives(paths, options=self._options.trial_options, keep_going=keep_going)

    def _may_wait(self, file: InboxFile, failure: str) -> bool:
        """Leaves what may be unfinished for later; and what we may not read, without saying so each time."""
        if failure not in UNFINISHED:
            return False
        now_s = self._clock.monotonic_s()
        row = None if self._ledger is None else self._ledger.field(file.slide_id, file.fov)
        if (
            self._settling.is_young(file, now_s)
            or failure == "changed"
            or not os.path.lexists(file.path)
            or (
                row is not None
                and row.status is Status.FAILED
                and row.failure == failure
                and row.mtime_ns >= 0
            )
        ):
            self._settling.put_back(file, now_s)
            return True
        return False

    def _has_failures(self) -> bool:
        return self._ledger is not None and (self._ledger.tally().n_failed > 0 or bool(self._problems))

    # -- words ----------------------------------------------------------------------------------------

    def _alive(self) -> None:
        """Says that it goes round, though nothing is new."""
        self._systemd.beat()
        if self._clock.monotonic_s() - self._told_s >= _SILENCE_S:
            self._tell(self._state.activity, self._state.detail)

    def _on_step(self, step: Step) -> None:
        self._systemd.beat()
        row = step.row
        if row is None:
            log.debug("%s: not finished; it waits", path_text(step.file.path))
        elif row.status is Status.FAILED:
            log.warning("failed (%s): %s", row.failure, row.message)
        elif row.status is Status.DUPLICATE:
            log.info("duplicate %s/%s (%s)", row.slide_id, row.fov, row.message)
        elif not step.is_new:
            log.info("as before %s/%s: the same content, now %s", row.slide_id, row.fov, path_text(row.path))
        else:
            counts = row.counts[self._options.counting.edges]
            log.info(
                "ok %s/%s: %d red cells, %d single, %d overlapping, %d white, %d platelets; %.0f ms",
                *(row.slide_id, row.fov, counts.n_rbc, counts.n_rbc_single, counts.n_rbc_overlapping),
                *(counts.n_wbc, counts.n_platelets, row.elapsed_ms),
            )
        state = self._state
        now_s = self._clock.monotonic_s()
        if row is not None and step.is_new:
            self._pace.append(now_s)
            is_failed = row.status is Status.FAILED
            state = replace(
                state,
                last_image_at=self._now(),
                last_image_monotonic_s=now_s,
                n_counted=state.n_counted + (not is_failed),
                n_failed=state.n_failed + is_failed,
            )
        self._state = replace(state, n_to_do=max(state.n_to_do - 1, 0))
        self._tell(Activity.COUNTING)

    def _trouble(self, activity: Activity, error: UnavailableError) -> float:
        """Says what is wrong, once; returns when to try again, seconds.

        Raises:
            UnavailableError: Of a service that was to end when all is done.
        """
        if isinstance(error, _FullError):
            activity = Activity.DISK_FULL
        if self._once and activity is not Activity.ANOTHER_WRITER:
            raise error
        is_same = activity is self._state.activity and error.message == self._state.detail
        if not (is_same or (activity is self._state.activity and activity is Activity.DISK_FULL)):
            log.warning("%s: %s", activity, error)
        wait_s = _TROUBLE_S[min(self._n_troubles, len(_TROUBLE_S) - 1)]
        self._n_troubles += 1
        wait_s = min(wait_s, max(self._options.scan_every_s, 1.0))
        # Not before, however often it rings meanwhile; files that were closed then settle by time.
        self._next_scan_s = self._soonest_scan_s = self._clock.monotonic_s() + wait_s
        self._closed.clear()
        self._tell(activity, error.message)
        return wait_s

    def _tell(self, activity: Activity, detail: str = "") -> None:
        """Says how things are: to systemd, on the page, in the metrics; not more often than anybody reads."""
        before = self._state
        now_s = self._clock.monotonic_s()
        is_news = activity is not before.activity or detail != before.detail
        is_over = before.activity.is_paused and not activity.is_paused
        if is_news and is_over and activity is not Activity.STOPPING:
            log.warning("goes on: %s is over", before.activity)
        if not is_news and now_s - self._told_s < _TELL_S:
            return
        self._told_s = now_s
        options = self._options
        while self._pace and self._pace[0] < now_s - _RATE_S:
            self._pace.popleft()
        self._state = state = replace(
            before,
            activity=activity,
            detail=detail,
            source=path_text(options.source),
            bundle_id=options.bundle_id,
            images_per_min=len(self._pace) * 60 / min(_RATE_S, max(now_s - self._started_s, 60.0)),
            updated_at=self._now(),
            updated_monotonic_s=now_s,
        )
        self._page.write(state)
        text = f"{activity}{f': {detail}' if detail else ''}"
        self._systemd.say(f"{text}; {state.n_counted} counted, {state.n_failed} failed since the start")
        if options.metrics is not None and (is_news or now_s - self._metrics_s >= _METRICS_S):
            self._metrics_s = now_s
            from rbc_edge.station.prometheus import write_metrics  # noqa: PLC0415  few stations have them
            from rbc_edge.station.status import status_of  # noqa: PLC0415

            try:
                write_metrics(options.metrics, status_of(options.counting.out, now=self._clock.now()))
            except (RbcEdgeError, OSError) as error:
                if str(error) != self._metrics_error:
                    log.warning("the metrics cannot be written: %s", error)
                self._metrics_error = str(error)

    def _now(self) -> str:
        return self._clock.now().astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    # -- new options ----------------------------------------------------------------------------------

    @contextmanager
    def _on_reload(self) -> Iterator[None]:
        """Takes SIGHUP as the wish for new options."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._reload_asked = True
            self._doorbell.ring()

        if self._reload is None:
            yield
            return
        before = signal.signal(signal.SIGHUP, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)

    def _take_new_options(self) -> None:
        self._reload_asked = False
        assert self._reload is not None
        self._systemd.reloading()
        old = self._options
        try:
            new = self._reload()
            check_options(new)
            if new.counting.out != old.counting.out:
                raise UsageError(
                    f"out cannot change from {path_text(old.counting.out)} to"
                    f" {path_text(new.counting.out)} while the service runs",
                    "restart it",
                )
        except RbcEdgeError as error:
            log.error("the new settings are not taken, the old ones hold: %s", error)
            self._systemd.ready("the new settings are wrong, the old ones hold; see the log")
            return
        self._options = new
        self._analyzer = None
        self._close_ledger()  # tables and body are made anew with it
        self._is_new_view = True
        self._settling = self._new_settling()
        self._watched = None
        self._next_scan_s = self._soonest_scan_s = -inf
        log.info("new settings taken; bundle %s", new.bundle_id)
        self._systemd.ready("new settings taken")

    def _new_settling(self) -> Settling:
        # A service trusts no clock but its own; what is to end some time has to believe that old files are.
        clock_s = (lambda: self._clock.now().timestamp()) if self._once else None
        return Settling(self._options.settle_s, self._options.grace_s, clock_s=clock_s)


class _FullError(UnavailableError):
    """The disk of the results is nearly full."""

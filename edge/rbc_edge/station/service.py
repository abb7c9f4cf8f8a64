"""The service: what comes into the camera's folder is counted, for years.

A loop of rounds, in one thread. Each round finds out whether the folder is there, scans it, takes the images
that are complete, and counts a portion of them with the session that a single run uses too. Trouble outside,
such as a share that is away or a full disk, is a state: it is told, and it ends by itself. It never ends the
service.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC
from itertools import chain, groupby
from math import inf
from pathlib import Path
from types import FrameType
from typing import Final

from rbc_edge.errors import ExitCode, RbcEdgeError, UnavailableError, UsageError
from rbc_edge.station.announcer import Announcer
from rbc_edge.station.inbox import RESULTS, UNFINISHED, Debounce, Inbox, check_pattern, scan
from rbc_edge.station.job import MACHINE, drop_analyzer
from rbc_edge.station.other_files import NOT_COUNTED_NOTE
from rbc_edge.station.session import Clock, CountOptions, Session, mend_rows
from rbc_edge.station.source import Probe, SourceWatcher, WakeEvent, probe
from rbc_edge.station.state_file import Activity
from rbc_edge.station.stop import Stop
from rbc_edge.station.systemd import Systemd
from rbc_edge.store import outdir
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import BusyError, free_bytes, writing
from rbc_edge.store.recovery import keep_aside
from rbc_edge.store.rows import RowError, Status
from rbc_edge.store.schema import DamagedError
from rbc_edge.text import count_text, path_text, utc_text
from rbc_edge.values import InboxFile

log = logging.getLogger(__name__)

PATIENCE_S: Final = 8.0
"""How long the image in hand may take after SIGTERM, seconds. The service ends within ten."""

_PORTION_S: Final = 10.0  # then it looks around: new images, the disk, signals, another writer's turn
_OVERHEAD: Final = 10.0  # scans and tables may take a tenth of the time
_BREAK_S: Final = 0.1  # between portions, for another writer
_SOON_S: Final = 0.05  # between two scans, when events come in a row
_TROUBLE_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)  # between tries, while something is wrong
_ROOM_AGAIN: Final = 1.1  # a paused service goes on when there is a tenth more room than it paused at


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What a service is asked to do."""

    source: Path  # the camera's folder
    counting: CountOptions
    marker: str | None = None  # name of a file that lies in the source while it is the right one
    settle_s: float = 2.0  # see `Debounce`
    grace_s: float = 120.0  # see `Debounce`
    scan_every_s: float = 10.0  # when nothing happens
    min_free_bytes: int = 200_000_000  # nothing is counted while the results' disk has less room
    polling: bool | None = None  # whether to do without events; None: as the file system needs it
    metrics: Path | None = None  # Prometheus text file to write


def run_forever(
    options: WatchOptions,
    *,
    once: bool = False,
    reload: Callable[[], WatchOptions] | None = None,
    stop: Stop | None = None,
    clock: Clock | None = None,
    wake: WakeEvent | None = None,
    systemd: Systemd | None = None,
) -> ExitCode | int:
    """Counts what comes into the camera's folder, until it is asked to stop. Returns the exit code.

    With `once`, it ends when nothing is left to do, instead of waiting for more, and trouble is an error.
    `reload` gives the new options when SIGHUP asks for them. It raises `RbcEdgeError` when they are wrong.
    `stop` ends the service after the image in hand.

    Raises:
        UsageError: The options contradict each other.
        UnavailableError: Another service works on the results, or they cannot be written at the start.
        BundleError: The bundle is not what the recipe says.
    """
    check_options(options)
    outdir.make(options.counting.out)
    clock = clock or Clock()
    with closing(Announcer(options.counting.out, clock, systemd or Systemd())) as announcer:
        service = _Service(
            options, announcer, stop or Stop(), clock, wake or WakeEvent(), once=once, reload=reload
        )
        with closing(service):
            return service.run()


def check_options(options: WatchOptions) -> None:
    """Raises `UsageError` for options that can never work, wherever the folders are now."""
    outdir.check_apart((options.source,), options.counting.out)
    check_pattern(options.counting.slide_pattern)
    if options.metrics is not None and options.metrics.is_relative_to(options.source):
        raise UsageError(
            f"the metrics file {path_text(options.metrics)} lies inside the source", "the source is read only"
        )


class _FullError(UnavailableError):
    """The disk of the results is nearly full."""


class _Service:
    """The loop of rounds. One thread does all the work. Threads of `SourceWatcher` only wake it."""

    def __init__(
        self,
        options: WatchOptions,
        announcer: Announcer,
        stop: Stop,
        clock: Clock,
        wake: WakeEvent,
        *,
        once: bool,
        reload: Callable[[], WatchOptions] | None,
    ) -> None:
        self._say = announcer
        self._once = once
        self._reload = reload
        self._stop = stop
        self._clock = clock
        self._wake = wake
        self._session: Session | None = None
        self._damage = ""
        self._must_mend = False  # a row is damaged, maybe not the whole ledger
        self._is_full = False
        self._is_reload_asked = False
        self._n_troubles = 0
        self._is_short_of_memory = self._is_incomplete = False
        self._take(options)

    def _take(self, options: WatchOptions) -> None:
        """Begins to work with options."""
        self._options = options
        self._watcher = SourceWatcher(
            options.source, self._wake.wake, polling=options.polling, scan_every_s=options.scan_every_s
        )
        # A service trusts no clock but its own. `once` has to end, so it believes that old files are old.
        clock_s = (lambda: self._clock.now().timestamp()) if self._once else None
        self._debounce = Debounce(options.settle_s, options.grace_s, clock_s=clock_s)
        self._must_refresh = True  # tables may have to look different now, or somebody has removed them
        self._done: set[int] = set()  # hashes of files that need no look: 500,000 of them take 30 MB
        self._closed: set[Path] = set()
        self._changes = 0
        self._next_scan_s = self._soonest_scan_s = -inf
        self._say.serve(options.source, options.counting.recipe.bundle_id, options.metrics)

    # -- the loop ---------------------------------------------------------------------------------------

    def run(self) -> ExitCode | int:
        """Goes round until it is asked to stop."""
        options, systemd = self._options, self._say.systemd
        self._say.tell(Activity.STARTING)
        with self._on_reload():
            self._open_at_start()
            systemd.ready("started")
            log.info(
                "watching %s, counting into %s with bundle %s",
                path_text(options.source),
                path_text(options.counting.out),
                options.counting.recipe.bundle_id,
            )
            while self._stop.signal is None:
                if self._is_reload_asked:
                    self._take_new_options()
                wait_s = self._round()
                systemd.beat()
                if wait_s is None:
                    self._say.tell(Activity.STOPPING, "nothing is left to do (--once)")
                    if self._is_short_of_memory or (self._session and self._session.views.tables.held):
                        return ExitCode.UNAVAILABLE
                    n_failed = self._session.ledger.reader.tally().n_failed if self._session else 0
                    return ExitCode.SOME_FAILED if n_failed or self._is_incomplete else ExitCode.OK
                if self._stop.signal is None:
                    self._wait(wait_s)
        systemd.stopping()
        self._say.tell(Activity.STOPPING, f"asked by {signal.Signals(self._stop.signal).name}")
        log.info("stopping; what was counted is kept")
        return 128 + self._stop.signal

    def close(self) -> None:
        """Lets go of everything."""
        self._watcher.stop()
        self._close_session()
        drop_analyzer(self._options.counting.recipe)

    def _wait(self, time_s: float) -> None:
        """Waits for the time or the wake event; short enough for systemd's patience."""
        end_s = self._clock.monotonic_s() + time_s
        while (left_s := end_s - self._clock.monotonic_s()) > 0 and self._stop.signal is None:
            closed = self._wake.wait(min(left_s, self._say.longest_wait_s))
            self._say.alive()
            if closed is not None:
                self._closed |= closed
                # The scan is soon, and not once for every event of a thousand.
                self._next_scan_s = min(self._next_scan_s, self._soonest_scan_s)
                return

    def _round(self) -> float | None:
        """Does what there is to do; returns for how long there is nothing, seconds. None: once is done."""
        try:
            now_s = self._clock.monotonic_s()
            due_s = max(min(self._next_scan_s, self._debounce.next_s()), self._soonest_scan_s)
            if now_s < due_s:
                return due_s - now_s
            if self._session is None:
                self._session = self._opened(check=bool(self._damage) or self._must_mend)
            session = self._session
            if self._must_refresh:
                with writing(self._options.counting.out):
                    session.refresh()
                self._must_refresh = False
            found = probe(self._options.source, marker=self._options.marker)
            if found.missing:
                self._watcher.stop()
                return self._source_away(found.missing)
            watcher = self._watcher
            watcher.listen(found)
            self._say.note(polling=watcher.polling, polling_reason=watcher.polling_reason)
            self._say.note(file_system=found.mount.kind if found.mount else "unknown")
            try:
                inbox = self._scan()
            except (UnavailableError, OSError) as error:  # gone, or closed to us, since the probe
                return self._source_away(str(error))
            is_empty = not (
                inbox.files or inbox.unreadable or inbox.other or self._options.marker is not None
            )
            if is_empty and (missing := self._watcher.missing_mount(session.ledger.reader, found)):
                return self._source_away(missing)
            return self._work(session, inbox, found)
        except BusyError as error:
            return self._trouble(Activity.ANOTHER_WRITER, error)
        except UnavailableError as error:
            self._must_mend = isinstance(error, RowError)
            if isinstance(error, DamagedError) and not self._must_mend:
                self._damage = str(error)
            self._close_session()
            is_full = isinstance(error, _FullError)
            return self._trouble(Activity.DISK_FULL if is_full else Activity.RESULTS_AWAY, error)

    def _work(self, session: Session, inbox: Inbox, found: Probe) -> float | None:
        """Counts a portion of the images that are complete."""
        now_s = self._clock.monotonic_s()
        files = session.unfold(inbox.files, self._done)
        ready = self._debounce.see(self._to_do(session, files), self._closed, now_s)
        self._closed.clear()
        n_waiting = self._debounce.n_waiting(now_s)
        self._say.note(source_online=True, n_waiting=n_waiting, n_to_do=len(ready))
        unsettled, of_slide = session.ledger.reader.unsettled(), {}
        if ready or unsettled:
            of_slide = {slide: list(files) for slide, files in groupby(files, key=lambda f: f.slide_id)}
        if not ready and of_slide.keys().isdisjoint(unsettled):
            if held := session.views.tables.held:
                with writing(self._options.counting.out):
                    session.refresh(set(held))
            other = "\n".join(map(str, inbox.other.remarks()))
            if session.ledger.reader.note(NOT_COUNTED_NOTE) != other and self._has_room():
                with writing(self._options.counting.out):  # for `status`, when the service has ended
                    session.ledger.keep_note(NOT_COUNTED_NOTE, other)
                    session.ledger.commit()
            self._n_troubles = 0
            detail = f"waiting for {count_text(n_waiting, 'unfinished image')}" if n_waiting else ""
            self._say.tell(Activity.WATCHING, detail)
            if not self._make_pictures(session):
                return _BREAK_S
            if self._once and not n_waiting:
                return None
            return max(min(self._next_scan_s, self._debounce.next_s()) - self._clock.monotonic_s(), _SOON_S)
        self._check_room()
        # The slide under the microscope does not wait for an archive that was copied in.
        portions = [list(files) for _, files in groupby(ready, key=lambda f: f.slide_id)]
        portions.sort(key=lambda files: max(file.mtime_ns for file in files), reverse=True)
        with writing(self._options.counting.out):
            self._watcher.keep_mount(session.ledger, found)
            self._say.tell(Activity.COUNTING)
            summary = session.count(
                list(chain.from_iterable(portions)),
                of_slide=of_slide,
                copies=inbox.other.copies,
                time_s=max(_PORTION_S, self._say.state.scan_ms / 1e3 * _OVERHEAD),
            )
        self._is_short_of_memory = bool(summary.troubled)
        for note in summary.notes:
            log.info("%s", note)
        session.views.catch_up(keep_going=self._has_time, time_s=_PORTION_S, wait=True, reports=False)
        # A count has moved between two names, or the scale has changed: all files of the slide are asked
        # about again. Not of every slide, or one more image would cost as much as all images of its slide.
        self._done -= {hash(file) for slide_id in summary.unsettled for file in of_slide[slide_id]}
        self._n_troubles = 0
        self._next_scan_s = self._clock.monotonic_s()
        self._soonest_scan_s = self._next_scan_s + _BREAK_S
        return _BREAK_S

    def _make_pictures(self, session: Session) -> bool:
        """Goes on with what is to be drawn, while nothing is to be counted; tells whether all is."""
        if not session.views.are_due or not self._has_room():
            return True  # the room that is left is for counts
        return session.views.catch_up(keep_going=self._has_time, time_s=_PORTION_S, wait=not self._once)

    def _has_room(self) -> bool:
        return free_bytes(self._options.counting.out) >= self._options.min_free_bytes

    def _has_time(self) -> bool:
        self._say.alive()
        return self._stop.signal is None

    def _to_do(self, session: Session, files: Sequence[InboxFile]) -> list[InboxFile]:
        """Returns the files that need a look. What is done stays in memory as a number for each file."""
        changes = session.ledger.reader.changes()
        if changes != self._changes:  # `rbc-edge run` or `retry` has changed the ledger
            self._changes = changes
            self._done.clear()
            session.views.tables.look_again()
        before = self._done
        plan = session.plan([file for file in files if hash(file) not in before])
        self._done = {hash(file) for file in files if hash(file) in before}
        # A duplicate may need a look later, when its original changes.
        self._done |= {hash(file) for file, status in plan.done.items() if status is not Status.DUPLICATE}
        return list(plan.to_do)

    # -- the source -------------------------------------------------------------------------------------

    def _scan(self) -> Inbox:
        started_s = self._clock.monotonic_s()
        counting = self._options.counting
        inbox = scan(
            [self._options.source], slide_pattern=counting.slide_pattern, ignore=counting.ignore, go_on=True
        )
        scan_s = (ended_s := self._clock.monotonic_s()) - started_s
        self._next_scan_s = ended_s + max(self._options.scan_every_s, scan_s * _OVERHEAD)
        self._soonest_scan_s = ended_s + max(_SOON_S, scan_s * _OVERHEAD / 2)
        unreadable = [f"{path_text(folder)}: cannot be read" for folder in inbox.unreadable]
        results = [f"{path_text(path)}: {RESULTS}" for path in inbox.results]
        held = self._session.views.tables.held.values() if self._session else ()
        self._is_incomplete = bool(unreadable or inbox.clashes)
        problems = [*unreadable, *inbox.clashes, *held, *results]
        self._say.note_scan(problems, scan_s, not_counted=inbox.other.remarks())
        return inbox

    def _source_away(self, reason: str) -> float:
        self._say.note(source_online=False, n_waiting=0, n_to_do=0)
        advice = "nothing is forgotten; it goes on when it is back"
        return self._trouble(Activity.SOURCE_AWAY, UnavailableError(reason, advice))

    def _may_wait(self, file: InboxFile, failure: str) -> bool:
        """Leaves for later what may be incomplete, and what may not be read, without a message each time."""
        now_s = self._clock.monotonic_s()
        if failure == MACHINE:
            self._debounce.put_back(file, now_s)
            return True
        if failure not in UNFINISHED:
            return False
        row = self._session.ledger.reader.field(file.slide_id, file.fov) if self._session else None
        is_known = row is not None and row.status is Status.FAILED and row.failure == failure
        may_wait = (
            self._debounce.is_young(file, now_s)
            or failure == "changed"
            or not os.path.lexists(file.path)
            or (is_known and row is not None and row.mtime_ns >= 0)
        )
        if may_wait:
            self._debounce.put_back(file, now_s)
        return may_wait

    # -- the results ------------------------------------------------------------------------------------

    def _open_at_start(self) -> None:
        """Opens the session; waits for another writer, or until it is asked to stop."""
        while self._session is None and self._stop.signal is None:
            try:
                self._session = self._opened(check=True)
            except BusyError as error:
                self._wait(self._trouble(Activity.ANOTHER_WRITER, error))

    def _opened(self, *, check: bool) -> Session:
        """Opens the ledger; a damaged one is kept aside first."""
        counting = self._options.counting
        with writing(counting.out):
            outdir.claim(counting.out, utc_text(self._clock.now()), adopt=counting.adopt)
            ledger = self._undamaged(counting.out, check=check)
        self._done.clear()
        self._must_mend = False
        # The process before may have been killed.
        self._must_refresh = self._must_refresh or ledger.reader.tables_are_stale()
        return Session(
            counting,
            ledger,
            on_step=lambda step: self._say.step(step, counting.views.edges),
            stop=self._stop,
            clock=self._clock,
            may_wait=self._may_wait,
            keep_going=self._has_time,
        )

    def _undamaged(self, out: Path, *, check: bool) -> Ledger:
        found = self._damage
        if not found:
            try:
                ledger = Ledger(out)
                found = ledger.reader.damage() if check else ""
                if not found:
                    return ledger
                ledger.close()
                # Once more, before anything is moved: a disk may give wrong bytes once. Rows are repaired.
                ledger = Ledger(out)
                mend_rows(ledger, deep=True)
                found = ledger.reader.damage()
                if not found:
                    return ledger
                ledger.close()
            except DamagedError as error:
                found = str(error)
        aside = keep_aside(out, self._clock.now().astimezone(UTC).strftime("%Y%m%dT%H%M%SZ"))
        log.error(
            "the ledger was damaged (%s). It is kept in %s, with the tables made from it; images that are in"
            " the camera's folder are counted again, counts of others stand in those tables only",
            found,
            path_text(aside),
        )
        self._damage = ""
        return Ledger(out)

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _check_room(self) -> None:
        """Raises `_FullError` while the results' disk is nearly full: before harm, not after."""
        out, least = self._options.counting.out, self._options.min_free_bytes
        free = free_bytes(out)
        self._is_full = free < least * (_ROOM_AGAIN if self._is_full else 1.0)
        if self._is_full:
            raise _FullError(
                f"{path_text(out)}: {free / 1e6:.0f} MB are free, less than {least / 1e6:.0f} MB",
                "free space; it goes on by itself",
            )

    def _trouble(self, activity: Activity, error: UnavailableError) -> float:
        """Tells what is wrong, once; returns when to try again, seconds."""
        if self._once and activity is not Activity.ANOTHER_WRITER:
            raise error
        wait_s = _TROUBLE_S[min(self._n_troubles, len(_TROUBLE_S) - 1)]
        self._n_troubles += 1
        wait_s = min(wait_s, max(self._options.scan_every_s, 1.0))
        # Not before, however many events come meanwhile. Files that were closed then wait for their time.
        self._next_scan_s = self._soonest_scan_s = self._clock.monotonic_s() + wait_s
        self._closed.clear()
        self._say.trouble(activity, error)
        return wait_s

    # -- new options ------------------------------------------------------------------------------------

    @contextmanager
    def _on_reload(self) -> Iterator[None]:
        """Takes SIGHUP as the wish for new options."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._is_reload_asked = True
            self._wake.wake()

        if self._reload is None:
            yield
            return
        before = signal.signal(signal.SIGHUP, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)

    def _take_new_options(self) -> None:
        systemd, old = self._say.systemd, self._options
        self._is_reload_asked = False
        systemd.reloading()
        try:
            new = self._reload() if self._reload is not None else old
            check_options(new)
            if new.counting.out != old.counting.out:
                raise UsageError(
                    f"out cannot change from {path_text(old.counting.out)} to"
                    f" {path_text(new.counting.out)} while the service runs",
                    "restart it",
                )
        except RbcEdgeError as error:
            log.error("the new settings are not taken, the old ones hold: %s", error)
            systemd.ready("the new settings are wrong, the old ones hold; see the log")
            return
        self.close()
        self._take(new)
        log.info("new settings taken; bundle %s", new.counting.recipe.bundle_id)
        systemd.ready("new settings taken")

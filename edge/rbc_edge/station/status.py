"""How the station is: what the service last said of itself, what the ledger holds, and both in plain words.

The service writes its state into one file of the output folder, the page, and holds a lock on it for its
life. So a reader needs no connection to it, and a dead service cannot pass for a living one.
"""

import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.store.ledger import FieldRow, Ledger, Tally
from rbc_edge.store.outdir import free_bytes
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

PAGE_NAME: Final = ".rbc-edge.service"
PAGE_BYTES: Final = 8192
MOST_PROBLEMS: Final = 20
MOST_FAILURES: Final = 20
SILENT_S: Final = 60.0
"""A service that has not spoken for so long is said to be silent, seconds."""

_IDLE_WRITE_S: Final = 20.0
"""How often a state that only grew older is written: each write wears a memory card."""

_LOCK_TRIES, _LOCK_PAUSE_S = 15, 0.02  # a reader holds the lock for microseconds
_READ_TRIES, _READ_PAUSE_S = 10, 0.005
_CLOCK_SLACK_S: Final = 60.0  # clocks are put right by less all the time


class Activity(StrEnum):
    """What the service is doing. The words are for people, and stable for machines."""

    STARTING = "starting"
    WATCHING = "up to date"
    COUNTING = "counting"
    SOURCE_AWAY = "source away"
    DISK_FULL = "paused: disk nearly full"
    RESULTS_AWAY = "paused: results cannot be written"
    ANOTHER_WRITER = "waiting for another rbc-edge"
    STOPPING = "stopping"
    UNKNOWN = "unknown"  # the word of a version newer than this one

    @property
    def is_paused(self) -> bool:
        """Whether nothing is counted until somebody, or something, mends it."""
        return self in (Activity.SOURCE_AWAY, Activity.DISK_FULL, Activity.RESULTS_AWAY)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What the service says of itself. Times are ISO 8601, UTC; empty: never.

    Attributes:
        pid: Its process.
        version: Its version of rbc-edge.
        started_at: When it started.
        activity: What it does.
        detail: Why, in words; may be empty.
        source: The folder it watches.
        source_online: Whether that folder is there.
        file_system: Type of its file system, e.g. ``ext4``.
        polling: Whether changes are found by scanning alone, without events.
        polling_reason: Why.
        last_image_at: When an image was last settled.
        last_image_monotonic_s: The same on the monotonic clock; 0: never, or not said.
        n_waiting: Images seen that have not settled or are not whole yet.
        n_to_do: Images that have settled and are not counted yet.
        n_counted: Images counted since the start.
        n_failed: Images that failed since the start.
        images_per_min: Images settled a minute, over the last five minutes.
        problems: What somebody should look at: clashing names, folders that cannot be read; at most 20.
        bundle_id: The bundle it counts with.
        scanned_at: When the source was last scanned.
        scan_ms: How long that took.
        updated_at: When this was written.
        updated_monotonic_s: The same on the monotonic clock, which no setting of the clock moves.
        boot_id: The start of the computer that the monotonic times belong to (`boot_id`).
    """

    pid: int = 0
    version: str = ""
    started_at: str = ""
    activity: Activity = Activity.STARTING
    detail: str = ""
    source: str = ""
    source_online: bool = False
    file_system: str = ""
    polling: bool = False
    polling_reason: str = ""
    last_image_at: str = ""
    last_image_monotonic_s: float = 0.0
    n_waiting: int = 0
    n_to_do: int = 0
    n_counted: int = 0
    n_failed: int = 0
    images_per_min: float = 0.0
    problems: tuple[str, ...] = ()
    bundle_id: str = ""
    scanned_at: str = ""
    scan_ms: float = 0.0
    updated_at: str = ""
    updated_monotonic_s: float = 0.0
    boot_id: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        return asdict(self) | {"activity": str(self.activity), "problems": list(self.problems)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Makes a state of what `as_json` gave, be it in another version's words.

        Keys that this version does not know, and values of another kind than it expects, are passed over.
        """
        known: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            match field.default:
                case Activity():
                    words = [str(a) for a in Activity]
                    known[field.name] = Activity(value) if value in words else Activity.UNKNOWN
                case tuple() if isinstance(value, list):
                    known[field.name] = tuple(map(str, value))
                case bool() | int() | str() if type(value) is type(field.default):
                    known[field.name] = value
                case float() if isinstance(value, float) or type(value) is int:
                    known[field.name] = float(value)
        return cls(**known)


def boot_id() -> str:
    """Returns what tells this start of the computer from every other; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


# -- the page ---------------------------------------------------------------------------------------------


class Page:
    """The service's hold on an output folder, and its state in words for whoever asks.

    The state is written in place, into room that was taken at the start: that works on a full disk, leaves
    no half file behind, and costs no rename. It is not forced to the disk; after a power cut there is no
    service to speak of.
    """

    def __init__(self, out: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Takes hold of an output folder for one service.

        Args:
            out: The output folder; must exist.
            sleep: Tests give their own.

        Raises:
            UnavailableError: Another service works on the folder, or it cannot be written.
        """
        self._out = out
        self._path = out / PAGE_NAME
        self._written: ServiceState | None = None
        try:
            self._descriptor = self._opened()
        except OSError as error:
            raise UnavailableError(
                f"{path_text(out)}: cannot write: {error.strerror}", "check permissions and free space"
            ) from error
        for _ in range(_LOCK_TRIES):
            if _locked(self._descriptor, out):
                return
            sleep(_LOCK_PAUSE_S)
        state = _read(self._descriptor, sleep)
        os.close(self._descriptor)
        who = f" (process {state.pid}, since {state.started_at})" if state else ""
        raise UnavailableError(
            f"another rbc-edge watch{who} works on {path_text(out)}",
            "stop it, or choose another output folder",
        )

    def write(self, state: ServiceState) -> None:
        """Writes the state; never raises, for the counting goes on where the page cannot be written."""
        if not self._is_news(state):
            return
        try:
            self._keep_hold()
            _take_room(self._descriptor)
            os.pwrite(self._descriptor, _packed(state), 0)
            self._written = state
        except OSError as error:
            log.debug("%s: cannot write the state: %s", path_text(self._path), error.strerror)

    def close(self) -> None:
        """Lets go; the last words stay."""
        os.close(self._descriptor)

    def _opened(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _is_news(self, state: ServiceState) -> bool:
        before = self._written
        if before is None or state.updated_monotonic_s - before.updated_monotonic_s >= _IDLE_WRITE_S:
            return True
        return state != replace(
            before,
            scanned_at=state.scanned_at,
            scan_ms=state.scan_ms,
            updated_at=state.updated_at,
            updated_monotonic_s=state.updated_monotonic_s,
        )

    def _keep_hold(self) -> None:
        """Takes hold again where somebody cleared the folder, or mounted it again, under our feet."""
        ours = os.fstat(self._descriptor)
        with suppress(OSError):  # the folder is away: the old page is as good as any
            with suppress(FileNotFoundError):
                there = self._path.stat()
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    return
            descriptor = self._opened()
            if _locked(descriptor, self._out):
                os.close(self._descriptor)
                self._descriptor = descriptor
            else:
                os.close(descriptor)


def read_page(out: Path, *, sleep: Callable[[float], None] = time.sleep) -> tuple[bool, ServiceState | None]:
    """Asks after the service of an output folder, without disturbing it.

    Args:
        out: The output folder.
        sleep: Tests give their own.

    Returns:
        Whether a service is running, and its last words; None when there are none.

    Raises:
        UnavailableError: The page is there and cannot be read.
    """
    try:
        descriptor = os.open(out / PAGE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False, None
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out / PAGE_NAME)}: cannot be read: {error.strerror}",
            "ask as the service's user, or as a member of its group",
        ) from error
    try:
        state = _read(descriptor, sleep)
        try:
            # Shared, so that readers do not meet each other; a service that starts now tries again.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            running = False
        except BlockingIOError:
            running = True
        except OSError:  # no locks on this file system: by the process's number, which is nearly as good
            running = state is not None and state.boot_id == boot_id() and Path(f"/proc/{state.pid}").exists()
    finally:
        os.close(descriptor)
    return running, state


def _locked(descriptor: int, out: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks; one service is then the user's care
        log.warning("%s: cannot lock the output folder: %s", path_text(out), error.strerror)
    return True


def _take_room(descriptor: int) -> None:
    """Makes the page its full length, once; a disk that has no room now may have it later."""
    if os.fstat(descriptor).st_size == PAGE_BYTES:
        return
    os.ftruncate(descriptor, PAGE_BYTES)
    with suppress(OSError):  # no such thing on this file system: the write takes the room
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)


def _packed(state: ServiceState) -> bytes:
    """Returns exactly `PAGE_BYTES` of JSON with a checksum; a long state loses words, never its numbers."""
    state = replace(state, problems=tuple(state.problems[:MOST_PROBLEMS]))
    while len(packed := _framed(state.as_json())) > PAGE_BYTES:
        if state.problems:
            state = replace(state, problems=state.problems[:-1])
            continue
        texts = {f.name: v for f in fields(state) if type(v := getattr(state, f.name)) is str}
        longest = max(texts, key=lambda name: len(texts[name]))
        shorter: dict[str, Any] = {longest: texts[longest][: len(texts[longest]) // 2]}
        state = replace(state, **shorter)
    return packed.ljust(PAGE_BYTES - 1) + b"\n" if len(packed) < PAGE_BYTES else packed


def _framed(values: dict[str, Any]) -> bytes:
    return b'{"crc32": %d, "state": %s}' % (_checksum(values), _dumped(values))


def _dumped(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode("ascii")


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(_dumped(values))


def _read(descriptor: int, sleep: Callable[[float], None]) -> ServiceState | None:
    """Reads the page; again when it was caught half written."""
    for _ in range(_READ_TRIES):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            page = json.loads(os.pread(descriptor, 2 * PAGE_BYTES, 0))
            if page["crc32"] == _checksum(page["state"]):
                return ServiceState.from_json(page["state"])
        sleep(_READ_PAUSE_S)
    return None


# -- the whole picture ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status:
    """How a station is: the service, the ledger, the disk.

    Attributes:
        out: The output folder.
        running: Whether a service works on it.
        state: The service's words, or its last ones; None: there never was one.
        silent_s: How long ago a running service last spoke, seconds; None: not running, or unknown.
        tally: The ledger in numbers; None: it cannot be read now, see `ledger_problem`.
        ledger_problem: Why the ledger cannot be read; empty when it can.
        failures: Images that could not be counted, the newest first, at most `MOST_FAILURES`.
        failure_counts: How many failed, by reason.
        newest_result_at: When the newest result was written down, ISO 8601, UTC; empty: none.
        newest_result_age_s: How long ago, seconds, never negative; None: none, or the clock does not let us
            say (`clock_problem`).
        clock_problem: What is wrong with the computer's clock; empty when nothing is.
        disk_free_bytes: Room left for results; None: unknown.
    """

    out: Path
    running: bool
    state: ServiceState | None
    silent_s: float | None
    tally: Tally | None
    ledger_problem: str
    failures: tuple[FieldRow, ...]
    failure_counts: Mapping[str, int]
    newest_result_at: str
    newest_result_age_s: float | None
    clock_problem: str
    disk_free_bytes: int | None

    @property
    def is_silent(self) -> bool:
        """Whether a running service has not spoken for longer than it should."""
        return self.silent_s is not None and self.silent_s > SILENT_S

    @property
    def n_failed(self) -> int:
        """Images that could not be counted, of all times."""
        return self.tally.n_failed if self.tally else 0

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes; what is unknown is None."""
        state, tally = self.state, self.tally
        live = state if self.running else None
        return {
            "out": path_text(self.out),
            "running": self.running,
            "activity": str(live.activity) if live else "not running" if not self.running else "unknown",
            "detail": live.detail if live else "",
            "paused": live.activity.is_paused if live else None,
            "source": state.source if state else None,
            "source_online": live.source_online if live else None,
            "polling": live.polling if live else None,
            "silent_s": _rounded(self.silent_s),
            "n_waiting": live.n_waiting if live else None,
            "n_to_do": live.n_to_do if live else None,
            "n_counted": tally.n_ok if tally else None,
            "n_failed": tally.n_failed if tally else None,
            "n_duplicates": tally.n_duplicates if tally else None,
            "n_slides": tally.n_slides if tally else None,
            "images_per_min": live.images_per_min if live else None,
            "last_image_at": (state.last_image_at if state else "") or None,
            "newest_result_at": self.newest_result_at or None,
            "newest_result_age_s": _rounded(self.newest_result_age_s),
            "disk_free_bytes": self.disk_free_bytes,
            "bundle_id": state.bundle_id if state else None,
            "failure_counts": dict(self.failure_counts),
            "failures": [
                {
                    "slide_id": row.slide_id,
                    "fov": row.fov,
                    "path": path_text(row.path),
                    "failure": row.failure,
                    "message": row.message,
                    "analyzed_at": row.analyzed_at,
                }
                for row in self.failures
            ],
            "ledger_problem": self.ledger_problem or None,
            "clock_problem": self.clock_problem or None,
            "service": state.as_json() if state else None,
        }

    def as_lines(self) -> list[str]:
        """Returns the picture for people: the first line says how things are, the others are the figures."""
        lines = [("results", path_text(self.out))]
        if self.state is not None:
            lines = [*self._service_lines(self.state), *lines]
        age = self.newest_result_age_s
        if self.newest_result_at:
            lines.append(
                ("newest result", self.newest_result_at + ("" if age is None else f", {_span(age)} ago"))
            )
        if self.tally is not None:
            extra = f", {_n(self.tally.n_duplicates, 'duplicate')}" if self.tally.n_duplicates else ""
            lines.append(
                ("counted", f"{_n(self.tally.n_ok, 'image')} of {_n(self.tally.n_slides, 'slide')}{extra}")
            )
            by_reason = ", ".join(f"{n} {reason}" for reason, n in self.failure_counts.items())
            lines.append(("failed", f"{self.n_failed}{f': {by_reason}' if by_reason else ''}"))
        else:
            lines.append(("ledger", self.ledger_problem))
        lines += [("", f"{row.slide_id}/{row.fov}: {row.message or row.failure}") for row in self.failures]
        if self.n_failed > len(self.failures):
            lines.append(("", f"and {self.n_failed - len(self.failures)} before those"))
        if self.disk_free_bytes is not None:
            lines.append(("disk", f"{_bytes(self.disk_free_bytes)} free"))
        if self.clock_problem:
            lines.append(("clock", self.clock_problem))
        return [self.headline(), *(f"  {name:14} {text}".rstrip() for name, text in lines)]

    def headline(self) -> str:
        """Returns in one line, in plain words, how things are."""
        failed = f"; {_n(self.n_failed, 'image')} failed" if self.n_failed else ""
        state = self.state
        if not self.running:
            return f"not running{failed}"
        if state is None:
            return f"running, but its state cannot be read{failed}"
        why = f": {state.detail}" if state.detail else ""
        watching = f"watching {state.source}"
        if self.is_silent and self.silent_s is not None:
            return (
                f"SILENT: process {state.pid} has not spoken for {_span(self.silent_s)}; it may hang{failed}"
            )
        match state.activity:
            case Activity.SOURCE_AWAY:
                return f"PAUSED: the source is away{why}"
            case Activity.DISK_FULL:
                return f"PAUSED: the disk is nearly full{why}"
            case Activity.RESULTS_AWAY:
                return f"PAUSED: the results cannot be written{why}"
            case Activity.COUNTING:
                return f"{watching}, counting; {_n(state.n_to_do, 'image')} to do{failed}"
            case Activity.WATCHING:
                waiting = f"; {_n(state.n_waiting, 'image')} not finished yet" if state.n_waiting else ""
                return f"{watching}, up to date{waiting}{failed}"
            case _:
                return f"{watching}, {state.activity}{why}{failed}"

    def _service_lines(self, state: ServiceState) -> list[tuple[str, str]]:
        service = f"rbc-edge {state.version}, process {state.pid}, since {state.started_at}"
        if not self.running:
            return [
                ("source", state.source),
                ("last service", f"{service}; last words at {state.updated_at}: {state.activity}"),
            ]
        how = f"polling: {state.polling_reason}" if state.polling else "woken by its events"
        kind = f" ({state.file_system})" if state.file_system else ""
        lines = [
            ("source", f"{state.source}{kind}, {f'online, {how}' if state.source_online else 'AWAY'}"),
            ("service", service),
            ("bundle", state.bundle_id),
            ("waiting", f"{_n(state.n_waiting, 'image')} not finished yet, {state.n_to_do} to do"),
            (
                "since start",
                f"{state.n_counted} counted, {state.n_failed} failed;"
                f" {state.images_per_min:.1f} images a minute lately",
            ),
        ]
        return [*lines, *(("problem", problem) for problem in state.problems)]


def status_of(out: Path, *, now: datetime, monotonic_s: float | None = None) -> Status:
    """Puts together how the station of an output folder is, beside the running service.

    Args:
        out: The output folder.
        now: The time of day, with its zone.
        monotonic_s: The monotonic clock, seconds; None: the computer's.

    Returns:
        The status. Ages come from the monotonic clock wherever the service's words are of this start of the
        computer, so that a clock that was set does not falsify them.

    Raises:
        UnavailableError: There is neither a ledger that can be read nor a running service.
    """
    monotonic_s = time.monotonic() if monotonic_s is None else monotonic_s
    running, state = read_page(out)
    tally, problem = None, ""
    failures: list[FieldRow] = []
    failure_counts: dict[str, int] = {}
    try:
        with Ledger.reading(out) as ledger:
            tally = ledger.tally()
            failures = ledger.failures(MOST_FAILURES)
            failure_counts = ledger.failure_counts()
    except UnavailableError as error:
        if not running:
            raise
        problem = str(error)  # the service may be starting, or about to mend it
    try:
        free = free_bytes(out)
    except UnavailableError:
        free = None
    newest = _newest(state if running else None, tally, now, monotonic_s)
    return Status(
        out=out,
        running=running,
        state=state,
        silent_s=_silent_s(state, now, monotonic_s) if running and state else None,
        tally=tally,
        ledger_problem=problem,
        failures=tuple(failures),
        failure_counts=failure_counts,
        newest_result_at=newest.at,
        newest_result_age_s=newest.age_s,
        clock_problem=newest.clock_problem,
        disk_free_bytes=free,
    )


@dataclass(frozen=True, slots=True)
class _Newest:
    at: str
    age_s: float | None
    clock_problem: str = ""


def _newest(live: ServiceState | None, tally: Tally | None, now: datetime, monotonic_s: float) -> _Newest:
    """Returns when the newest result was written down, and how long ago that is."""
    if live is not None and live.last_image_monotonic_s and _is_of_this_boot(live, monotonic_s):
        age_s = max(monotonic_s - live.last_image_monotonic_s, 0.0)
        if tally is not None and tally.newest_analyzed_at > live.last_image_at:
            wall_s = _wall_age_s(tally.newest_analyzed_at, now)
            if wall_s is not None and 0 <= wall_s < age_s:
                return _Newest(tally.newest_analyzed_at, wall_s)  # by `rbc-edge run` beside the service
        wall_s = _wall_age_s(live.last_image_at, now)
        # Forward is not said: a computer that slept shows the same.
        back_s = age_s - wall_s if wall_s is not None else 0.0
        said = f"it was set back by {_span(back_s)} since the newest result"
        return _Newest(live.last_image_at, age_s, said if back_s > _CLOCK_SLACK_S else "")
    at = tally.newest_analyzed_at if tally else ""
    wall_s = _wall_age_s(at, now)
    if wall_s is not None and wall_s < -_CLOCK_SLACK_S:
        here = now.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return _Newest(at, None, f"it says {here}, and the newest result is of {at}: it was set back")
    return _Newest(at, None if wall_s is None else max(wall_s, 0.0))


def _silent_s(state: ServiceState, now: datetime, monotonic_s: float) -> float | None:
    if _is_of_this_boot(state, monotonic_s):
        return monotonic_s - state.updated_monotonic_s
    wall_s = _wall_age_s(state.updated_at, now)  # the service of another computer, on a share
    return None if wall_s is None or wall_s < 0 else wall_s


def _is_of_this_boot(state: ServiceState, monotonic_s: float) -> bool:
    return bool(state.boot_id) and state.boot_id == boot_id() and state.updated_monotonic_s <= monotonic_s


def _wall_age_s(at: str, now: datetime) -> float | None:
    try:
        then = datetime.fromisoformat(at)
        return (now - then) / timedelta(seconds=1)
    except (ValueError, TypeError):  # empty; or without a zone
        return None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _n(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def _span(time_s: float) -> str:
    """Returns a length of time as people say it."""
    for unit_s, word, least in ((86400, "days", 2), (3600, "h", 2), (60, "min", 1)):
        if time_s >= least * unit_s:
            return f"{time_s // unit_s:.0f} {word}"
    return f"{time_s:.0f} s"


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


# -- for Prometheus ---------------------------------------------------------------------------------------


def check_metrics(path: Path) -> None:
    """Raises `UsageError` when metrics cannot be written to a file, ever or at least now."""
    try:
        import prometheus_client  # noqa: F401, PLC0415  an extra
    except ImportError as error:
        raise UsageError(
            "metrics need the Prometheus client, which is not installed",
            'pip install "rbc-edge[prometheus]"',
        ) from error
    if not path.parent.is_dir():
        raise UsageError(
            f"{path_text(path)}: its folder does not exist",
            "give a file in the folder that the node exporter's textfile collector reads",
        )


def write_metrics(path: Path, status: Status) -> None:
    """Writes the figures of a status as a Prometheus text file, by temporary file and rename.

    What is unknown is left out: an absent figure raises an alarm where a false one would not.

    Args:
        path: The file; the node exporter reads those whose name ends in ``.prom``.
        status: The figures.

    Raises:
        UsageError: See `check_metrics`.
        UnavailableError: The file cannot be written.
    """
    check_metrics(path)
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile  # noqa: PLC0415

    registry = CollectorRegistry()

    def gauge(name: str, words: str, value: float | None) -> None:
        if value is not None:
            Gauge(f"rbc_edge_{name}", words, registry=registry).set(value)

    state, tally = status.state, status.tally
    gauge("running", "Whether the service runs.", status.running)
    if tally is not None:
        gauge("images_counted", "Images counted, in the ledger.", tally.n_ok)
        gauge("images_failed", "Images that could not be counted, in the ledger.", tally.n_failed)
        gauge("images_duplicate", "Images counted under another name of their slide.", tally.n_duplicates)
        gauge("slides", "Slides in the ledger.", tally.n_slides)
        by_reason = Gauge(
            "rbc_edge_images_failed_by_reason",
            "Images that could not be counted, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason, n in status.failure_counts.items():
            by_reason.labels(reason=reason).set(n)
    gauge(
        "newest_result_age_seconds",
        "Age of the newest result; absent while the clock does not let us say.",
        status.newest_result_age_s,
    )
    gauge("disk_free_bytes", "Room left for results.", status.disk_free_bytes)
    gauge("clock_ok", "0: the computer's clock was set back.", not status.clock_problem)
    if status.running and state is not None:
        gauge("silent_seconds", "How long the service has not spoken.", status.silent_s)
        gauge("images_waiting", "Images that are not finished yet.", state.n_waiting)
        gauge("images_to_do", "Images finished and not counted yet.", state.n_to_do)
        gauge("images_per_minute", "Images settled a minute, over five minutes.", state.images_per_min)
        gauge("source_online", "Whether the camera's folder is there.", state.source_online)
        gauge("paused", "Whether nothing is counted until something is mended.", state.activity.is_paused)
        gauge("problems", "Things somebody should look at; see rbc-edge status.", len(state.problems))
        gauge("scan_seconds", "Time the last scan took.", state.scan_ms / 1e3)
        gauge("last_image_timestamp_seconds", "When an image was last settled.", _since_1970_s(state))
        info = Gauge(
            "rbc_edge_info", "Version and bundle at work.", ["version", "bundle_id"], registry=registry
        )
        info.labels(version=state.version, bundle_id=state.bundle_id).set(1)
        doing = Gauge("rbc_edge_activity", "1 for what the service does.", ["activity"], registry=registry)
        for activity in Activity:
            doing.labels(activity=str(activity)).set(activity is state.activity)
    try:
        write_to_textfile(os.fspath(path), registry)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(path)}: cannot write the metrics: {error.strerror}",
            "check permissions and free space",
        ) from error


def _since_1970_s(state: ServiceState) -> float | None:
    with suppress(ValueError):
        return datetime.fromisoformat(state.last_image_at).timestamp()
    return None

"""How the station is: what the service last said of itself, what the ledger holds, and both in plain words.

The service writes its state into one file of the output folder, the page, and holds a lock on it for its
life. So a reader needs no connection to it, and a dead service cannot pass for a living one.
"""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.station.state_file import Activity, ServiceState, boot_id, read_state
from rbc_edge.store.ledger import FieldRow, Ledger, Tally
from rbc_edge.store.outdir import free_bytes
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

MAX_FAILURES: Final = 20
SILENT_S: Final = 60.0
"""A service that has not written its state for so long is reported as silent, seconds."""

_CLOCK_SLACK_S: Final = 60.0  # clocks are corrected by less all the time


@dataclass(frozen=True, slots=True)
class StationStatus:
    """How a station is: the service, the ledger, the disk.

    Attributes:
        out: The output folder.
        running: Whether a service works on it.
        state: The service's words, or its last ones; None: there never was one.
        silent_s: How long ago a running service last spoke, seconds; None: not running, or unknown.
        tally: The ledger in numbers; None: it cannot be read now, see `ledger_problem`.
        ledger_problem: Why the ledger cannot be read; empty when it can.
        failures: Images that could not be counted, the newest first, at most `MAX_FAILURES`.
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


def status_of(out: Path, *, now: datetime, monotonic_s: float | None = None) -> StationStatus:
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
    running, state = read_state(out)
    tally, problem = None, ""
    failures: list[FieldRow] = []
    failure_counts: dict[str, int] = {}
    try:
        with Ledger.reading(out) as ledger:
            tally = ledger.tally()
            failures = ledger.failures(MAX_FAILURES)
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
    return StationStatus(
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


def write_metrics(path: Path, status: StationStatus) -> None:
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

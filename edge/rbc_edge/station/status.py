"""The status of a station: its service, its ledger, its disk and its clock, put together from outside."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from rbc_edge.errors import UnavailableError
from rbc_edge.station.other_files import NOT_COUNTED_NOTE
from rbc_edge.station.state_file import ServiceState, boot_id, read_state
from rbc_edge.store.outdir import free_bytes
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import FieldRow, Tally
from rbc_edge.text import path_text, span_text, utc_text

MAX_FAILURES: Final = 20
SILENT_S: Final = 60.0  # a service that has not written its state for so long is reported as silent
_FAILURE_KEYS: Final = ("slide_id", "fov", "path", "failure", "message", "analyzed_at")
_CLOCK_SLACK_S: Final = 60.0  # clocks are corrected by less all the time


@dataclass(frozen=True, slots=True)
class StationStatus:
    """The status of a station."""

    out: Path
    running: bool  # whether a service works on it
    state: ServiceState | None  # the service's last; None: there never was one, or it cannot be read
    silent_s: float | None  # since a running service last reported; None: not running, or unknown
    tally: Tally | None  # None: the ledger cannot be read now, see `ledger_problem`
    ledger_problem: str  # why the ledger cannot be read
    failures: tuple[FieldRow, ...]  # images that could not be counted, newest first, at most `MAX_FAILURES`
    failure_counts: Mapping[str, int]  # how many failed, by reason
    newest_result_at: str  # when it was recorded, ISO 8601, UTC; empty: none
    newest_result_age_s: float | None  # never negative; None: there is none, or the clock is wrong
    clock_problem: str  # what is wrong with the computer's clock
    disk_free_bytes: int | None  # for results; None: unknown
    not_counted: tuple[str, ...] = ()  # what lies beside the images, of the running service or the last run
    n_gone: int | None = None  # counted images of which no file is there any more; None: unknown

    @property
    def live(self) -> ServiceState | None:
        """The state of a running service. None when it does not run, or its state cannot be read."""
        return self.state if self.running else None

    @property
    def is_silent(self) -> bool:
        """Whether a running service has not reported for longer than it should."""
        return self.silent_s is not None and self.silent_s > SILENT_S

    @property
    def n_failed(self) -> int:
        """Images in the ledger that could not be counted."""
        return self.tally.n_failed if self.tally else 0

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes. An unknown value is None."""
        state, live, tally = self.state, self.live, self.tally
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
            "n_excluded": tally.n_excluded if tally else None,
            "n_gone": self.n_gone,
            "n_slides": tally.n_slides if tally else None,
            "images_per_min": live.images_per_min if live else None,
            "last_image_at": (state.last_image_at if state else "") or None,
            "newest_result_at": self.newest_result_at or None,
            "newest_result_age_s": _rounded(self.newest_result_age_s),
            "disk_free_bytes": self.disk_free_bytes,
            "bundle_id": state.bundle_id if state else None,
            "not_counted": list(self.not_counted),
            "failure_counts": dict(self.failure_counts),
            "failures": [
                {name: getattr(row, name) for name in _FAILURE_KEYS} | {"path": path_text(row.path)}
                for row in self.failures
            ],
            "ledger_problem": self.ledger_problem or None,
            "clock_problem": self.clock_problem or None,
            "service": state.as_json() if state else None,
        }


def status_of(out: Path, *, now: datetime, monotonic_s: float | None = None) -> StationStatus:
    """Reads the status of an output folder, also while a service works on it.

    Ages come from the monotonic clock (`monotonic_s`, or the computer's) where the service's state is of this
    start of the computer, so that setting the clock does not change them. `now` is the time of day with zone.
    Raises `UnavailableError` where there is neither a readable ledger nor a running service.
    """
    monotonic_s = time.monotonic() if monotonic_s is None else monotonic_s
    running, state = read_state(out)
    tally, n_gone, problem = None, None, ""
    is_away = running and state is not None and not state.source_online
    failures: list[FieldRow] = []
    failure_counts: dict[str, int] = {}
    not_counted = state.not_counted if running and state else ()
    try:
        with Reader.open(out) as reader:
            tally = reader.tally()
            n_gone = None if is_away else reader.n_gone()
            failures, failure_counts = reader.failures(MAX_FAILURES), reader.failure_counts()
            not_counted = not_counted if running else tuple(reader.note(NOT_COUNTED_NOTE).splitlines())
    except UnavailableError as error:
        if not running:
            raise
        problem = str(error)  # the service may be starting, or about to replace it
    free = None
    with suppress(UnavailableError):
        free = free_bytes(out)
    silent_s = _silent_s(state, now, monotonic_s) if running and state else None
    newest = _newest_result(state if running else None, tally, now, monotonic_s)
    ledger = (tally, problem, tuple(failures), failure_counts)
    return StationStatus(out, running, state, silent_s, *ledger, *newest, free, not_counted, n_gone)


def _newest_result(
    live: ServiceState | None, tally: Tally | None, now: datetime, monotonic_s: float
) -> tuple[str, float | None, str]:
    """Returns when the newest result was recorded, how long ago that is, and what is wrong with the clock."""
    if live is not None and live.last_image_monotonic_s and _is_of_this_boot(live, monotonic_s):
        age_s = max(monotonic_s - live.last_image_monotonic_s, 0.0)
        if tally is not None and tally.newest_analyzed_at > live.last_image_at:
            wall_s = _wall_age_s(tally.newest_analyzed_at, now)
            if wall_s is not None and 0 <= wall_s < age_s:  # of `rbc-edge run`, during the service
                return tally.newest_analyzed_at, wall_s, ""
        wall_s = _wall_age_s(live.last_image_at, now)
        # Only a clock that was set back: a computer that slept looks like one that was set forward.
        back_s = age_s - wall_s if wall_s is not None else 0.0
        problem = f"it was set back by {span_text(back_s)} since the newest result"
        return live.last_image_at, age_s, problem if back_s > _CLOCK_SLACK_S else ""
    at = tally.newest_analyzed_at if tally else ""
    wall_s = _wall_age_s(at, now)
    if wall_s is not None and wall_s < -_CLOCK_SLACK_S:
        return at, None, f"it shows {utc_text(now)}, but the newest result is of {at}: it was set back"
    return at, None if wall_s is None else max(wall_s, 0.0), ""


def _silent_s(state: ServiceState, now: datetime, monotonic_s: float) -> float | None:
    if _is_of_this_boot(state, monotonic_s):
        return monotonic_s - state.updated_monotonic_s
    wall_s = _wall_age_s(state.updated_at, now)  # the service of another computer, on a share
    return None if wall_s is None or wall_s < 0 else wall_s


def _is_of_this_boot(state: ServiceState, monotonic_s: float) -> bool:
    return bool(state.boot_id) and state.boot_id == boot_id() and state.updated_monotonic_s <= monotonic_s


def _wall_age_s(at: str, now: datetime) -> float | None:
    try:
        return (now - datetime.fromisoformat(at)) / timedelta(seconds=1)
    except (ValueError, TypeError):  # empty, or without a zone
        return None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)

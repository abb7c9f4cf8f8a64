"""What the service tells: its log, its state file, systemd, and the metrics. It decides nothing."""

import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Final

from rbc_edge import __version__
from rbc_edge.errors import RbcEdgeError, UnavailableError
from rbc_edge.station.other_files import Remark
from rbc_edge.station.prometheus import write_metrics
from rbc_edge.station.session import Clock, Step
from rbc_edge.station.state_file import MAX_PROBLEMS, Activity, ServiceState, StateFile, boot_id
from rbc_edge.station.status import status_of
from rbc_edge.station.systemd import Systemd
from rbc_edge.store.rows import Status
from rbc_edge.text import count_text, path_text, utc_text
from rbc_edge.vision.counting import EdgeRule

log = logging.getLogger(__name__)

_TELL_S: Final = 2.0  # not more often than people read it
_SILENCE_S: Final = 30.0  # a service that is silent for a minute may hang (`StationStatus`)
_METRICS_S: Final = 15.0
_RATE_S: Final = 300.0


class Announcer:
    """Tells how the service is, to everything that listens. `state` is what was told last.

    It holds the output folder until `close`. Raises `UnavailableError` where another service works on the
    folder, or it cannot be written.
    """

    def __init__(self, out: Path, clock: Clock, systemd: Systemd) -> None:
        self._out = out
        self._file = StateFile(out)
        self._clock = clock
        self.systemd = systemd
        self.state = ServiceState(os.getpid(), __version__, self._now(), boot_id=boot_id())
        self._started_s = clock.monotonic_s()
        self._told_s = self._metrics_s = -inf
        self._metrics: Path | None = None
        self._metrics_error = ""
        self._problems: set[str] = set()
        self._remarks: set[str] = set()  # keys of what was said
        self._pace: deque[float] = deque()  # when images were recorded, monotonic seconds

    def close(self) -> None:
        """Releases the output folder. What was told last stays in the state file."""
        self._file.close()

    @property
    def longest_wait_s(self) -> float:
        """How long the service may wait without a sign of life, seconds."""
        return min((self.systemd.watchdog_s or inf) / 3, _SILENCE_S)

    def serve(self, source: Path, bundle_id: str, metrics: Path | None) -> None:
        """Notes what the service works on."""
        self._metrics = metrics
        self.note(source=path_text(source), bundle_id=bundle_id)

    def note(self, **changes: Any) -> None:
        """Changes the state, to be told with the next `tell`."""
        self.state = replace(self.state, **changes)

    def note_scan(
        self, problems: Sequence[str], scan_s: float, *, not_counted: Sequence[Remark] = ()
    ) -> None:
        """Notes a scan, and logs the problems that are new, and what is not counted."""
        for remark in not_counted:
            if remark.key not in self._remarks:  # once, and not with each file
                self._remarks.add(remark.key)
                log.warning("%s", remark)
        self.note(not_counted=tuple(map(str, not_counted)))
        for problem in problems:
            if problem not in self._problems:
                log.warning("%s", problem)
        self._problems = set(problems)
        self.note(scanned_at=self._now(), scan_ms=scan_s * 1e3, problems=tuple(problems[:MAX_PROBLEMS]))

    def alive(self) -> None:
        """Tells that the service works, though nothing is new."""
        self.systemd.beat()
        if self._clock.monotonic_s() - self._told_s >= _SILENCE_S:
            self.tell(self.state.activity, self.state.detail)

    def step(self, step: Step, edges: EdgeRule) -> None:
        """Tells what became of an image."""
        self.systemd.beat()
        _log_step(step, edges)
        state, row = self.state, step.row
        now_s = self._clock.monotonic_s()
        if row is not None and step.is_new:
            self._pace.append(now_s)
            is_failed = row.status is Status.FAILED
            n_counted, n_failed = state.n_counted + (not is_failed), state.n_failed + is_failed
            state = replace(state, n_counted=n_counted, n_failed=n_failed)
            state = replace(state, last_image_at=self._now(), last_image_monotonic_s=now_s)
        self.state = replace(state, n_to_do=max(state.n_to_do - 1, 0))
        self.tell(Activity.COUNTING)

    def trouble(self, activity: Activity, error: UnavailableError) -> None:
        """Tells what is wrong, and logs it once."""
        is_same = error.message == self.state.detail or activity is Activity.DISK_FULL
        if activity is not self.state.activity or not is_same:
            log.warning("%s: %s", activity, error)
        self.tell(activity, error.message)

    def tell(self, activity: Activity, detail: str = "") -> None:
        """Tells what the service does: to systemd, in the state file, in the metrics."""
        before, now_s = self.state, self._clock.monotonic_s()
        is_news = activity is not before.activity or detail != before.detail
        is_over = before.activity.is_paused and not activity.is_paused
        if is_news and is_over and activity is not Activity.STOPPING:
            log.warning("goes on: %s is over", before.activity)
        if not is_news and now_s - self._told_s < _TELL_S:
            return
        self._told_s = now_s
        while self._pace and self._pace[0] < now_s - _RATE_S:
            self._pace.popleft()
        self.state = state = replace(
            before,
            activity=activity,
            detail=detail,
            images_per_min=len(self._pace) * 60 / min(_RATE_S, max(now_s - self._started_s, 60.0)),
            updated_at=self._now(),
            updated_monotonic_s=now_s,
        )
        self._file.write(state)
        text = f"{activity}{f': {detail}' if detail else ''}"
        self.systemd.say(f"{text}; {state.n_counted} counted, {state.n_failed} failed since the start")
        if self._metrics is not None and (is_news or now_s - self._metrics_s >= _METRICS_S):
            self._metrics_s = now_s
            self._write_metrics(self._metrics)

    def _write_metrics(self, file: Path) -> None:
        try:
            write_metrics(file, status_of(self._out, now=self._clock.now()))
        except (RbcEdgeError, OSError) as error:
            if str(error) != self._metrics_error:
                log.warning("the metrics cannot be written: %s", error)
            self._metrics_error = str(error)

    def _now(self) -> str:
        return utc_text(self._clock.now())


def _log_step(step: Step, edges: EdgeRule) -> None:
    row = step.row
    if row is None:
        log.debug("%s: not complete yet; it waits", path_text(step.file.path))
    elif row.status is Status.FAILED:
        log.warning("failed (%s): %s", row.failure, row.message)
    elif row.status is Status.DUPLICATE:
        log.info("duplicate %s/%s (%s)", row.slide_id, row.fov, row.message)
    elif not step.is_new or row.status is not Status.OK:
        log.info("as before %s/%s: the same content, now %s", row.slide_id, row.fov, path_text(row.path))
    else:
        counts = row.counts[edges]
        log.info(
            "ok %s/%s: %s, %d single, %d overlapping, %d white, %s; %.0f ms",
            *(row.slide_id, row.fov, count_text(counts.n_rbc, "red cell")),
            *(counts.n_rbc_single, counts.n_rbc_overlapping, counts.n_wbc),
            *(count_text(counts.n_platelets, "platelet"), row.elapsed_ms),
        )

"""The status as figures for Prometheus: a text file that the node exporter reads (extra ``[prometheus]``)."""

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from rbc_edge.errors import UsageError, unavailable
from rbc_edge.station.state_file import Activity, ServiceState
from rbc_edge.station.status import StationStatus
from rbc_edge.text import path_text


def check_metrics(path: Path) -> None:
    """Raises `UsageError` when the extra or the folder of the file is missing."""
    try:
        import prometheus_client  # noqa: F401, PLC0415  an extra
    except ImportError as error:
        what = "metrics need the Prometheus client, which is not installed"
        raise UsageError(what, 'pip install "rbc-edge[prometheus]"') from error
    if not path.parent.is_dir():
        advice = "give a file in the folder that the node exporter's textfile collector reads"
        raise UsageError(f"{path_text(path)}: its folder does not exist", advice)


def write_metrics(path: Path, status: StationStatus) -> None:
    """Writes the figures of a status, by temporary file and rename.

    An unknown figure is left out: a missing figure raises an alarm, a false one does not. The node exporter
    reads files with names that end in ``.prom``. Raises as `check_metrics`, and `UnavailableError` where the
    file cannot be written.
    """
    check_metrics(path)
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile  # noqa: PLC0415

    registry = CollectorRegistry()

    def gauge(name: str, words: str, value: float | None) -> None:
        if value is not None:
            Gauge(f"rbc_edge_{name}", words, registry=registry).set(value)

    def labelled(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"rbc_edge_{name}", words, labels, registry=registry)

    gauge("running", "Whether the service runs.", status.running)
    if (tally := status.tally) is not None:
        gauge("images_counted", "Images counted, in the ledger.", tally.n_ok)
        gauge("images_failed", "Images that could not be counted, in the ledger.", tally.n_failed)
        gauge("images_duplicate", "Images counted under another name of their slide.", tally.n_duplicates)
        gauge("slides", "Slides in the ledger.", tally.n_slides)
        failed = labelled("images_failed_by_reason", "Images that could not be counted, by reason.", "reason")
        for reason, n in status.failure_counts.items():
            failed.labels(reason).set(n)
    of_age = "Age of the newest result. Absent when the computer's clock is wrong."
    gauge("newest_result_age_seconds", of_age, status.newest_result_age_s)
    gauge("disk_free_bytes", "Free space for results.", status.disk_free_bytes)
    gauge("clock_ok", "0: the computer's clock was set back.", not status.clock_problem)
    if (state := status.live) is not None:
        gauge("silent_seconds", "Time since the service last reported.", status.silent_s)
        gauge("images_waiting", "Images that are not finished yet.", state.n_waiting)
        gauge("images_to_do", "Images finished and not counted yet.", state.n_to_do)
        gauge("images_per_minute", "Images recorded per minute, over five minutes.", state.images_per_min)
        gauge("source_online", "Whether the camera's folder is there.", state.source_online)
        gauge("paused", "Whether counting waits until a problem is solved.", state.activity.is_paused)
        gauge("problems", "Problems to look at, see rbc-edge status.", len(state.problems))
        gauge("scan_seconds", "Time the last scan took.", state.scan_ms / 1e3)
        gauge("last_image_timestamp_seconds", "When an image was last recorded.", _since_1970_s(state))
        info = labelled("info", "Version and bundle at work.", "version", "bundle_id")
        info.labels(state.version, state.bundle_id).set(1)
        doing = labelled("activity", "1 for what the service does.", "activity")
        for activity in Activity:
            doing.labels(str(activity)).set(activity is state.activity)
    with unavailable(f"{path_text(path)}: cannot write the metrics", "check permissions and free space"):
        write_to_textfile(os.fspath(path), registry)


def _since_1970_s(state: ServiceState) -> float | None:
    with suppress(ValueError):
        return datetime.fromisoformat(state.last_image_at).timestamp()
    return None

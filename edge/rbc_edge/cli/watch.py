"""``rbc-edge watch``."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from rbc_edge.cli.console import log_to_stderr
from rbc_edge.cli.options import Given
from rbc_edge.cli.wiring import count_options, prepare_process
from rbc_edge.config import Settings
from rbc_edge.errors import UsageError
from rbc_edge.station.prometheus import check_metrics
from rbc_edge.station.service import PATIENCE_S, WatchOptions, run_forever
from rbc_edge.station.source import WakeEvent
from rbc_edge.station.stop import Stop
from rbc_edge.station.systemd import Systemd


def watch(given: Given, *, once: bool, adopt: bool) -> int:
    """Counts what arrives in the source until a signal ends it, or once."""
    systemd = Systemd()
    settings = given.load().settings
    log_to_stderr(verbose=settings.verbose, quiet=settings.quiet, service=True)
    prepare_process()
    wake = WakeEvent()
    stop = Stop(patience_s=PATIENCE_S, on_ask=wake.wake)
    with stop.on_signals():
        code = run_forever(
            _watch_options(settings, adopt=adopt),
            once=once,
            reload=lambda: _watch_options(given.load().settings, adopt=adopt),
            stop=stop,
            wake=wake,
            systemd=systemd,
        )
    if stop.is_late:
        # A thread may still be busy with a very large image. Nothing of it is kept: do not wait for it.
        sys.stderr.flush()
        os._exit(code)
    return code


def _watch_options(settings: Settings, *, adopt: bool) -> WatchOptions:
    """Returns how a service counts with these settings. Raises `UsageError` where one is missing."""
    if settings.source is None:
        raise UsageError("no source folder", "give SOURCE, or set source in the settings file")
    if settings.prometheus is not None:
        check_metrics(settings.prometheus)
    source = Path(os.path.abspath(settings.source))  # noqa: PTH100 -- resolve() would rename linked slides
    return WatchOptions(
        source=source,
        counting=replace(count_options(settings), adopt=adopt),
        marker=settings.marker,
        settle_s=settings.settle_s,
        grace_s=settings.grace_s,
        scan_every_s=settings.scan_every_s,
        min_free_bytes=int(settings.min_free_mb * 1e6),
        polling=settings.polling,
        metrics=settings.prometheus,
    )

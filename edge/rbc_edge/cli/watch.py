"""``rbc-edge watch``."""

import os
import sys

from rbc_edge.cli.console import log_to_stderr
from rbc_edge.cli.options import Given
from rbc_edge.cli.wiring import prepare_process, watch_options
from rbc_edge.station.service import PATIENCE_S, run_forever
from rbc_edge.station.source import WakeEvent
from rbc_edge.station.stop import Stop
from rbc_edge.station.systemd import Systemd


def watch(given: Given, *, once: bool) -> int:
    """Counts what arrives in the source until a signal ends it, or once."""
    systemd = Systemd()
    settings = given.load().settings
    log_to_stderr(verbose=settings.verbose, quiet=settings.quiet, service=True)
    prepare_process()
    wake = WakeEvent()
    stop = Stop(patience_s=PATIENCE_S, on_ask=wake.wake)
    with stop.on_signals():
        code = run_forever(
            watch_options(settings),
            once=once,
            reload=lambda: watch_options(given.load().settings),
            stop=stop,
            wake=wake,
            systemd=systemd,
        )
    if stop.is_late:
        # A thread may still be busy with a very large image. Nothing of it is kept: do not wait for it.
        sys.stderr.flush()
        os._exit(code)
    return code

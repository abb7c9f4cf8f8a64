"""``rbc-edge watch``."""

import os
import sys

from rbc_edge.cli.console import log_to_stderr
from rbc_edge.cli.options import Given
from rbc_edge.cli.wiring import count_forever
from rbc_edge.station.systemd import Systemd


def watch(given: Given, *, once: bool) -> int:
    """Counts what arrives in the source until a signal ends it, or once."""
    systemd = Systemd()
    settings = given.load().settings
    log_to_stderr(verbose=settings.verbose, quiet=settings.quiet, service=True)
    code, is_late = count_forever(settings, lambda: given.load().settings, once=once, systemd=systemd)
    if is_late:
        # A thread may still be busy with a very large image. Nothing of it is kept: do not wait for it.
        sys.stderr.flush()
        os._exit(code)
    return code

"""``rbc-edge review``."""

import sys
from pathlib import Path

from rbc_edge.cli.console import log, log_to_stderr, print_line
from rbc_edge.cli.options import Given
from rbc_edge.errors import BundleError, ExitCode, UsageError
from rbc_edge.vision.bundle import Bundle


def review(given: Given, *, port: int, host: str, read_only: bool, password_file: Path | None) -> int:
    """Serves the review page until it is stopped."""
    try:
        from rbc_edge.desk.server import serve  # noqa: PLC0415  an extra
    except ImportError as error:
        what = f"the review page needs a library that is not installed: {error}"
        raise UsageError(what, 'pip install "rbc-edge[review]"') from error
    log_to_stderr()
    settings = given.load().settings
    threshold, shapes = None, ()
    try:
        manifest = Bundle.open(settings.bundle).manifest
        threshold, shapes = manifest.overlap_threshold, getattr(manifest, "shapes", ())
    except BundleError as error:
        log.warning("the threshold cannot be shown: %s", error)
    serve(
        settings.out_folder(),
        host=host,
        port=port,
        read_only=read_only,
        password_file=password_file,
        threshold=threshold,
        shapes=shapes,
        say=_say,
    )
    return ExitCode.OK


def _say(address: str) -> None:
    print_line(address)
    sys.stdout.flush()

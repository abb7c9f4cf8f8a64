"""``rbc-edge report``."""

import webbrowser
from collections.abc import Sequence

from rbc_edge.cli.console import log, log_to_stderr, print_line
from rbc_edge.cli.options import Given
from rbc_edge.cli.wiring import edges_of
from rbc_edge.errors import BundleError, ExitCode
from rbc_edge.store.queries import Reader
from rbc_edge.text import path_text
from rbc_edge.views.report import IMAGES, Reports
from rbc_edge.vision.bundle import Bundle


def report(given: Given, slides: Sequence[str] | None, *, images: int | None, open_it: bool) -> int:
    """Writes the pages of these slides, or of all, and prints where they are."""
    log_to_stderr()
    loaded = given.load()
    out = loaded.settings.out_folder()
    manifest = None
    try:
        manifest = Bundle.open(loaded.settings.bundle).manifest
    except BundleError as error:
        log.warning("the thresholds cannot be shown: %s", error)
    with Reader.open(out) as reader:
        edges = edges_of(loaded, reader)
        n_images = IMAGES if images is None else images
        reports = Reports(out, reader, edges=edges, images=n_images, manifest=manifest)
        pages = reports.write(slides or None)
    for page in [*pages, reports.index]:
        print_line(path_text(page))
    if open_it:
        page = pages[0] if len(pages) == 1 else reports.index
        if not webbrowser.open(page.absolute().as_uri()):
            log.warning("no browser could be started; open the page yourself")
    return ExitCode.OK

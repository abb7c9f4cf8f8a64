"""``rbc-edge forget``, and what it shares with ``exclude`` and ``set``."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from rbc_edge.cli.console import log_to_stderr, print_line
from rbc_edge.cli.options import Given
from rbc_edge.errors import BundleError, ExitCode
from rbc_edge.store.decisions import decide
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import BusyError, writing
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import Status
from rbc_edge.text import count_text, name_text
from rbc_edge.views.names import OVERLAYS, REPORTS
from rbc_edge.views.refresh import ViewOptions, make_pictures
from rbc_edge.views.tables import Tables, edges_of
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import EdgeRule

_WAIT_S: Final = 30.0  # a service releases the folder every few seconds, a run when it has ended


def forget(given: Given, slide: str, fovs: Sequence[str] | None, *, undo: bool) -> int:
    """Takes fields out of the results, or back into them."""
    kind = None if undo else Status.FORGOTTEN
    n = changed(given, slide, lambda ledger: decide(ledger, slide, fovs or (), kind))
    done = "back in the results" if undo else "forgotten; --undo brings them back"
    print_line(f"{slide}: {count_text(n, 'field')} {done}")
    return ExitCode.OK


def changed(given: Given, slide_id: str, change: Callable[[Ledger], int]) -> int:
    """Changes the ledger and brings the slide's tables up to date; returns what `change` returned."""
    log_to_stderr()
    settings = given.load().settings
    folder: Path = settings.out_folder()
    with Reader.open(folder):  # first: Ledger() would create a ledger that is not there
        pass
    with Ledger(folder) as ledger:
        result = change(ledger)
        ledger.commit()
    try:
        with writing(folder, wait_s=_WAIT_S), Ledger(folder) as ledger:
            tables = Tables(folder, ledger, edges=edges_of(ledger.reader) or EdgeRule.ALL)
            tables.write([name_text(slide_id)])
        for what in tables.held.values():
            print_line(f"{what}; the next run writes it")
    except BusyError:
        print_line("a run is at work: the tables show it when the run has ended")
        return result
    if any((folder / name).is_dir() for name in (OVERLAYS, REPORTS)):
        with suppress(BundleError):  # pages show its thresholds; without them, the next run writes them
            views = ViewOptions(edges=tables.edges, manifest=Bundle.open(settings.bundle).manifest)
            make_pictures(folder, views, keep_going=lambda: True, slide_ids=[name_text(slide_id)])
    return result

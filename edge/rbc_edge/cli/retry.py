"""``rbc-edge retry``."""

import sys
from difflib import get_close_matches

from rbc_edge.cli.console import print_line
from rbc_edge.cli.options import Given
from rbc_edge.errors import ExitCode, UsageError
from rbc_edge.station.state_file import read_state
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.text import count_text


def retry(given: Given, slide: str | None, fov: str | None) -> int:
    """Marks failed images for another try and says who will try."""
    folder = given.load().settings.out_folder()
    with Reader.open(folder) as reader:  # first: Ledger() would create a ledger that is not there
        _check_known(reader, slide, fov)
    with Ledger(folder) as ledger:
        n = ledger.retry(slide, fov)
        ledger.commit()
        failed_slides = [] if n else sorted({row.slide_id for row in ledger.reader.failures(sys.maxsize)})
    running, state = read_state(folder)
    images = count_text(n, "failed image")
    if n == 0:
        asked = "/".join(part for part in (slide, fov) if part is not None)
        print_line(f"no image{f' of {asked}' if asked else ''} has failed; nothing to try again")
        if failed_slides:
            print_line(f"slides with failed images: {', '.join(failed_slides)}")
    elif running:
        paused = f", when this is over: {state.activity}" if state and state.activity.is_paused else ""
        print_line(f"{images} will be tried again by the running service at its next scan{paused}")
    else:
        print_line(f"{images} will be tried again by the next run, or when the service starts")
    return ExitCode.OK


def _check_known(reader: Reader, slide: str | None, fov: str | None) -> None:
    """Raises `UsageError` for a slide or a field of view that the ledger does not know."""
    if slide is None:
        return
    what, name, known = f"slide {slide!r}", slide, reader.slide_ids()
    if slide in known and fov is not None:
        if reader.field(slide, fov) is not None:
            return
        what, name = f"field of view {fov!r} in slide {slide!r}", fov
        known = [row.fov for row in reader.fields(slide)]
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.3)
        raise UsageError(f"no {what} in the ledger", f"did you mean {', '.join(near)}?" if near else "")

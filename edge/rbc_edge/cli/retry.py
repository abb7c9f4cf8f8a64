"""``rbc-edge retry``."""

import sys

from rbc_edge.cli.console import print_line
from rbc_edge.cli.options import Given
from rbc_edge.errors import ExitCode
from rbc_edge.station.state_file import read_state
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.text import count_text, in_order, name_text


def retry(given: Given, slide: str | None, fov: str | None) -> int:
    """Marks failed images for another try and says who will try."""
    folder = given.load().settings.out_folder()
    slide, fov = slide and name_text(slide), fov and name_text(fov)
    with Reader.open(folder) as reader:  # first: Ledger() would create a ledger that is not there
        if slide is not None:
            reader.check_known(slide, [fov] if fov else [])
    with Ledger(folder) as ledger:
        n = ledger.retry(slide, fov)
        ledger.commit()
        failed_slides = [] if n else in_order({row.slide_id for row in ledger.reader.failures(sys.maxsize)})
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

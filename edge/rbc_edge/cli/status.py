"""``rbc-edge status``."""

from datetime import UTC, datetime

from rbc_edge.cli.console import print_json
from rbc_edge.cli.options import Given
from rbc_edge.errors import ExitCode
from rbc_edge.ops import status_text
from rbc_edge.station.status import status_of
from rbc_edge.text import one_line


def status(given: Given, *, json_output: bool) -> int:
    """Prints the state of the station."""
    found = status_of(given.load().settings.out_folder(), now=datetime.now(UTC))
    if json_output:
        print_json(found.as_json())
    else:
        for line in status_text.as_lines(found):
            print(one_line(line))
    return ExitCode.OK

"""``rbc-edge export``."""

import sys
from datetime import UTC, datetime
from pathlib import Path

from rbc_edge.cli.console import log_to_stderr, print_line
from rbc_edge.cli.options import Given
from rbc_edge.cli.wiring import edges_of
from rbc_edge.errors import ExitCode, UsageError
from rbc_edge.station.notes import SETTINGS_NOTE
from rbc_edge.store.queries import Reader
from rbc_edge.text import path_text
from rbc_edge.views.document import Document


def export(given: Given, *, xlsx: Path | None, json_output: bool, with_cells: bool) -> int:
    """Writes the workbook, and prints the JSON document."""
    log_to_stderr()
    loaded = given.load()
    if xlsx is None and not json_output:
        raise UsageError("nothing to export", "give --xlsx FILE or --json")
    with Reader.open(loaded.settings.out_folder()) as reader:
        about = {"settings": reader.note(SETTINGS_NOTE)}
        document = Document(reader, edges_of(loaded, reader), now=datetime.now(UTC), about=about)
        if xlsx is not None:
            document.write_workbook(xlsx)
        if json_output:
            sys.stdout.writelines(document.json_parts(cells=with_cells))
    if xlsx is not None and not json_output:
        print_line(f"{path_text(xlsx)}: written")
    return ExitCode.OK

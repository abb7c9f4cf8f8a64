"""Writes the column tables of ``docs/tables.md`` from the columns that `rbc_edge.views.tables` declares.

Run as ``python docs/make_tables.py`` after a column has changed. A test compares the page with the program.
"""

from pathlib import Path
from typing import Final

from rbc_edge.views.tables import CELL_TABLE, FIELD_TABLE, SHAPE_TABLE, SLIDE_TABLE

PAGE: Final = Path(__file__).resolve().parent / "tables.md"


def filled(page: str) -> str:
    """Returns the text of the page with the current columns between its markers."""
    meanings = {
        "slides": SLIDE_TABLE.meanings,
        "fields": FIELD_TABLE.meanings,
        "cells": CELL_TABLE.meanings,
        "shapes": SHAPE_TABLE.meanings,
    }
    for name, columns in meanings.items():
        start, end = f"<!-- columns of {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"the page has no part from {start.strip()} to {end}")
        rows = "".join(f"| `{column}` | {meaning} |\n" for column, meaning in columns.items())
        page = f"{before}{start}| column | meaning |\n|---|---|\n{rows}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

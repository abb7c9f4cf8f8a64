"""Writes the column tables of ``docs/tables.md`` from the columns that `rbc_edge.views.tables` declares.

Run as ``python docs/make_tables.py`` after a column has changed. A test compares the page with the program.
"""

import re
from pathlib import Path
from typing import Final

from rbc_edge.views.tables import CELL_TABLE, FIELD_TABLE, SLIDE_TABLE

PAGE: Final = Path(__file__).resolve().parent / "tables.md"


def filled(page: str) -> str:
    """Returns the text of the page with the current columns between its markers."""
    for name, table in (("slides", SLIDE_TABLE), ("fields", FIELD_TABLE), ("cells", CELL_TABLE)):
        rows = "".join(f"| `{column}` | {meaning} |\n" for column, meaning in table.meanings.items())
        start, end = f"<!-- columns of {name} -->\n", "<!-- end -->"
        text = f"{start}| column | meaning |\n|---|---|\n{rows}{end}"
        page, n = re.subn(f"{start}.*?{end}", lambda _, text=text: text, page, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"the page needs one part between {start.strip()} and {end}")
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

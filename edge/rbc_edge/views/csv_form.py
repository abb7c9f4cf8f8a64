"""How the text of a table is written: as programs read it, or as a double click in Excel opens it.

Excel takes list separator and decimal sign from the region of the computer, and UTF-8 from a BOM. It takes
every cell that looks like a number or a date for one, in quotes, too. So an id begins with a tab there: it is
text then, and the tab is not seen. ``="17"`` would be text as well, but it is a formula: a table that holds
formulas of ours can hide those of others. An apostrophe would be shown. All cells are in quotes, because
LibreOffice may take the tab for a separator.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final, Literal

# Columns of text that may look like something else.
TEXTS: Final = frozenset({"slide_id", "fov", "path", "sha256", "reason", "bundle_id"})
_DECIMAL: Final = re.compile(r"-?\d+\.\d+")
_WITH_COMMA: Final = tuple(
    "af az be bg bs ca cs da de el es et eu fi fr gl hr hu hy id is it ka kk ky lt lv mk mn nb nl nn no"  # noqa: SIM905
    " pl pt ro ru sk sl sq sr sv tg tr uk uz vi".split()
)
# Of these languages, the lands with a decimal point: Switzerland, and most of Central America.
_WITH_POINT: Final = ("CH", "LI", "DO", "GT", "HN", "MX", "NI", "PA", "PE", "PR", "SV", "US")
Value = str | int | float | None


class CsvForm(StrEnum):
    """The form of all tables of a folder."""

    PLAIN = "plain"  # RFC 4180: commas, decimal points
    EXCEL_POINT = "excel, decimal point"  # and commas
    EXCEL_COMMA = "excel, decimal comma"  # and semicolons

    @classmethod
    def of(cls, env: Mapping[str, str], *, excel: bool) -> "CsvForm":
        """Returns the form that the language of the environment asks for."""
        if not excel:
            return cls.PLAIN
        name = env.get("LC_ALL") or env.get("LC_NUMERIC") or env.get("LANG") or ""
        language, _, land = re.split(r"[.@]", name)[0].partition("_")
        has_comma = language in _WITH_COMMA and land not in _WITH_POINT
        return cls.EXCEL_COMMA if has_comma else cls.EXCEL_POINT

    @property
    def separator(self) -> str:
        """The sign between two cells."""
        return ";" if self is CsvForm.EXCEL_COMMA else ","

    @property
    def quoting(self) -> Literal[0, 1]:
        """Which cells are in quotes: those that must be, or all."""
        return csv.QUOTE_MINIMAL if self is CsvForm.PLAIN else csv.QUOTE_ALL

    @property
    def start(self) -> str:
        """What stands in front of the table."""
        return "" if self is CsvForm.PLAIN else "\ufeff"

    def cells(self, names: Sequence[str], texts: Sequence[str]) -> Sequence[str]:
        """Returns the cells of a row. The texts are those of a plain table, in which no formula is left."""
        if self is CsvForm.PLAIN:  # there may be millions
            return texts
        return [self._cell(name, text) for name, text in zip(names, texts, strict=True)]

    def _cell(self, name: str, text: str) -> str:
        if text and name in TEXTS:
            return f"\t{text}"
        if self is CsvForm.EXCEL_COMMA and _DECIMAL.fullmatch(text):
            return text.replace(".", ",")
        return text


def typed(name: str, text: str) -> Value:
    """Returns the cell of a plain table as the value that it shows. None where it is empty.

    >>> typed("n_rbc", "12"), typed("overlap_low", "0.2500"), typed("fov", "12"), typed("n_wbc", "")
    (12, 0.25, '12', None)
    """
    if not text or name in TEXTS:
        return text or None
    if _DECIMAL.fullmatch(text):
        return float(text)
    return int(text) if re.fullmatch(r"-?\d+", text) else text

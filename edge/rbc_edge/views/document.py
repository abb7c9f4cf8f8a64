"""All tables as one document, an Excel workbook or JSON. It holds the numbers and texts of the CSV files.

A text is never a formula in it: a cell of a workbook says itself what it is.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rbc_edge import __version__
from rbc_edge.errors import UnavailableError, UsageError, unavailable
from rbc_edge.store.outdir import replacing
from rbc_edge.store.queries import Reader
from rbc_edge.text import in_order, path_text, utc_text
from rbc_edge.views.csv_form import TEXTS
from rbc_edge.views.tables import (
    FIELD_TABLE,
    SCHEMA,
    SHAPE_TABLE,
    SLIDE_TABLE,
    SlideSummary,
    shown_cells,
    shown_fields,
    shown_shapes,
    summarize,
)
from rbc_edge.vision.counting import EdgeRule

if TYPE_CHECKING:
    from xlsxwriter import Workbook

ALL: Final = "all slides"  # the name of the last row of the sheet `slides`
_MAX_ROWS: Final = 1_048_576  # of a sheet. XlsxWriter drops what is below it, without a word.
_LOCAL: Final = "analyzed_at_local"
_INTERVALS: Final = (
    "n_rbc_per_fov_low and n_rbc_per_fov_high are the 95 % interval of the mean number of red cells in a"
    " field (Student t, the fields are the units). overlap_low and overlap_high are that of the overlapping"
    f" share. In the row {ALL!r} the fields of all slides are the units: it says nothing about other slides."
)
_Value = str | int | float | datetime | None


class Document:
    """What a ledger shows under one edge rule, as of now. `about` is what else a person should know of it."""

    def __init__(self, reader: Reader, edges: EdgeRule, *, now: datetime, about: Mapping[str, str]) -> None:
        self._reader, self._edges, self._now, self._about = reader, edges, now, about

    def write_workbook(self, path: Path) -> None:
        """Writes an Excel workbook, completely or not at all.

        Raises `UsageError` where the extra is missing, the name is no workbook's, or a sheet cannot hold the
        rows, and `UnavailableError` where it cannot be written.
        """
        name = path_text(path)
        if path.suffix.lower() != ".xlsx":  # it might be a table, or the ledger
            raise UsageError(f"{name}: a workbook's name ends in .xlsx", "give another name")
        try:
            from xlsxwriter import Workbook  # noqa: PLC0415  an extra
            from xlsxwriter.exceptions import XlsxFileError  # noqa: PLC0415
        except ImportError as error:
            what = "a workbook needs XlsxWriter, which is not installed"
            raise UsageError(what, 'pip install "rbc-edge[xlsx]"') from error
        failed = unavailable(f"{name}: cannot write it", "check permissions and free space")
        try:
            # With constant memory, rows go to the disk one by one.
            with (
                failed,
                self._reader.snapshot(),
                replacing(path) as file,
                Workbook(file, {"constant_memory": True}) as book,
            ):
                self._fill(book)
        except XlsxFileError as error:
            raise UnavailableError(f"{name}: cannot write it: {error}", "check free space") from error

    def json_parts(self, *, cells: bool = False) -> Iterator[str]:
        """Yields a JSON document in parts, a line for each row. With `cells`, every cell is in it."""
        with self._reader.snapshot():
            yield json.dumps(self._head(), indent=1).removesuffix("\n}")
            yield f',\n "{ALL.replace(" ", "_")}": {json.dumps(self._all())}'
            tables = {"slides": self._slides(), "fields": self._fields(), "shapes": self._shapes()}
            for name, rows in (tables | ({"cells": self._cells()} if cells else {})).items():
                yield f',\n "{name}": ['
                for i, row in enumerate(rows):
                    yield f"{',' if i else ''}\n  {json.dumps(row)}"
                yield "\n ]"
            yield "\n}\n"

    # -- the rows ---------------------------------------------------------------------------------------

    def _summaries(self) -> Iterator[SlideSummary]:
        for slide_id in in_order(self._reader.slide_ids()):
            found = summarize(slide_id, self._reader.fields(slide_id), self._edges, forms_of=self._reader)
            if found.n_fov_ok or found.n_fov_failed:
                yield found

    def _slides(self) -> Iterator[dict[str, Any]]:
        return map(SLIDE_TABLE.values, self._summaries())

    def _shapes(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(map(shown_shapes, self._summaries()))

    def _all(self) -> dict[str, Any]:
        return SLIDE_TABLE.values(summarize(ALL, self._reader.all_fields(), self._edges))

    def _fields(self) -> Iterator[dict[str, Any]]:
        for slide_id in in_order(self._reader.slide_ids()):
            yield from shown_fields(self._reader.fields(slide_id), self._edges)

    def _cells(self) -> Iterator[dict[str, Any]]:
        for slide_id in in_order(self._reader.slide_ids()):
            yield from shown_cells(slide_id, self._reader)

    def _head(self) -> dict[str, str]:
        """Returns where the numbers come from."""
        return {
            "program": f"rbc-edge {__version__}",
            "schema": SCHEMA,
            "results": path_text(self._reader.path.parent.absolute()),
            "made_at": utc_text(self._now),
            "made_at_local": f"{self._now.astimezone():%Y-%m-%d %H:%M:%S %Z}",
            "edges": str(self._edges),
            **self._about,
            "intervals": _INTERVALS,
            "use": "Not a medical device. No medical professional has checked the numbers.",
        }

    # -- the sheets -------------------------------------------------------------------------------------

    def _fill(self, book: "Workbook") -> None:
        slides = _Sheet(book, "slides", SLIDE_TABLE.names)
        slides.add(self._slides())
        slides.end([self._all()])
        at = FIELD_TABLE.names.index("analyzed_at") + 1
        fields = _Sheet(book, "fields", (*FIELD_TABLE.names[:at], _LOCAL, *FIELD_TABLE.names[at:]))
        fields.add(row | {_LOCAL: _local(row["analyzed_at"])} for row in self._fields())
        fields.end()
        shapes = _Sheet(book, "shapes", SHAPE_TABLE.names)
        shapes.add(self._shapes())
        shapes.end()
        about = _Sheet(book, "provenance", ("what", "value"))
        about.add({"what": what, "value": value} for what, value in self._head().items())
        about.end()


class _Sheet:
    """A sheet that grows downwards: a header, and rows by the names of its columns."""

    def __init__(self, book: "Workbook", name: str, columns: Sequence[str]) -> None:
        self._sheet, self._columns = book.add_worksheet(name), columns
        self._name, self._last = name, 0
        self._bold = book.add_format({"bold": True})
        self._plain, self._share = book.add_format(), book.add_format({"num_format": "0.0%"})
        self._time = book.add_format({"num_format": "yyyy-mm-dd hh:mm:ss"})
        self._sheet.freeze_panes(1, 0)
        for i, column in enumerate(columns):
            wide = column in TEXTS or column.endswith("_at") or column in (_LOCAL, "what", "value")
            self._sheet.set_column(i, i, max(len(column) + 2, 24 if wide else 8))
            self._sheet.write_string(0, i, column, self._bold)

    def add(self, rows: Iterable[Mapping[str, _Value]], *, bold: bool = False) -> None:
        """Adds rows."""
        for row in rows:
            self._last += 1
            if self._last >= _MAX_ROWS:
                what = f"a sheet of a workbook holds {_MAX_ROWS - 1:,} rows, and {self._name} are more"
                raise UsageError(what, "use --json, or the CSV files")
            for i, column in enumerate(self._columns):
                self._write(i, column, row[column], bold=bold)

    def end(self, sums: Iterable[Mapping[str, _Value]] = ()) -> None:
        """Ends the rows that can be filtered, and adds sums below them."""
        self._sheet.autofilter(0, 0, self._last, len(self._columns) - 1)
        self.add(sums, bold=True)

    def _write(self, i: int, column: str, value: _Value, *, bold: bool) -> None:
        plain = self._bold if bold else self._plain
        if isinstance(value, str):  # never `write`, which takes some texts for formulas and links
            self._sheet.write_string(self._last, i, value, plain)
        elif isinstance(value, datetime):
            self._sheet.write_datetime(self._last, i, value, self._time)
        elif value is not None:
            form = self._share if column.startswith("overlap_") else plain
            self._sheet.write_number(self._last, i, value, form)


def _local(utc: str | None) -> datetime | None:
    """Returns a moment in the time of this computer, without its zone: workbooks know none."""
    return datetime.fromisoformat(utc).astimezone().replace(tzinfo=None) if utc else None

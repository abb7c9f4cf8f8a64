"""The named steps of the program at which the suite makes something go wrong. This list is the only one.

A scenario names a checkpoint, never a function. Where a function of the program gets another name or place,
its line here changes and nothing else in the suite. `at` is a public function of the program, or a call into
the system or a library below it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One step between "file seen" and "table renamed".

    Attributes:
        at: ``module:name`` or ``module:Class.name``, as the fault plugin takes it.
        what: What the program does in this step.
        match: Regular expression that one of the arguments must match. Empty: every call counts.
    """

    at: str
    what: str
    match: str = ""


_LEDGER: Final = "rbc_edge.store.ledger:Ledger"
_TABLES: Final = "rbc_edge.views.tables:Tables"

CHECKPOINTS: Final[Mapping[str, Checkpoint]] = {
    # The ledger is opened.
    "ledger opened": Checkpoint(f"{_LEDGER}.__init__", "opens the ledger, makes or migrates it if needed"),
    "database connected": Checkpoint("sqlite3:connect", "SQLite makes its file", r"ledger\.sqlite3$"),
    "transaction committed": Checkpoint(
        "sqlite3:Connection.execute", "SQLite commits; the first times, a version of the schema", r"^COMMIT$"
    ),
    # The source is scanned, and the plan is made.
    "source probed": Checkpoint("rbc_edge.station.source:probe", "asks whether the source is there"),
    "source scanned": Checkpoint("rbc_edge.station.inbox:scan", "lists the files of the source"),
    "files debounced": Checkpoint("rbc_edge.station.inbox:Debounce.see", "picks the files that are complete"),
    "files planned": Checkpoint(
        f"{_LEDGER}.plan", "asks what is done, to do, or was begun by a dead process"
    ),
    # The scale of a slide is estimated.
    "scale estimated": Checkpoint(
        "rbc_edge.vision.analyzer:Analyzer.measure",
        "measures the cells of some images, for their slide's scale",
    ),
    "measures kept": Checkpoint("rbc_edge.store.slide_scale:keep_measures", "writes down what they say"),
    "scale kept": Checkpoint("rbc_edge.store.slide_scale:keep", "writes that scale down"),
    # An image is looked at.
    "attempt noted": Checkpoint(f"{_LEDGER}.begin", "writes down which images are begun now"),
    "file read": Checkpoint("rbc_edge.vision.image_file:load_field", "reads and decodes an image file"),
    "image decoded": Checkpoint("PIL.Image:open", "opens the bytes of a JPEG file as an image", "^\xff\xd8"),
    "field analyzed": Checkpoint("rbc_edge.vision.analyzer:Analyzer.analyze", "finds the cells of a field"),
    "sandbox run": Checkpoint("rbc_edge.station.sandbox:survives", "counts an image in a process of its own"),
    # The result is recorded.
    "look recorded": Checkpoint(f"{_LEDGER}.record", "writes the count of a field, or why there is none"),
    "count written": Checkpoint("sqlite3:Connection.execute", "the row of a field", r"^INSERT INTO field"),
    "cells written": Checkpoint("sqlite3:Connection.execute", "the cells of a field", r"^INSERT INTO cells"),
    "ledger committed": Checkpoint(f"{_LEDGER}.commit", "commits everything written so far"),
    # The tables are written.
    "slide's table": Checkpoint(f"{_TABLES}.write_slide", "writes the table of one slide"),
    "all tables": Checkpoint(f"{_TABLES}.write", "writes the tables of all changed slides"),
    "temporary table synced": Checkpoint("os:fsync", "a temporary table reaches the disk", r"\.csv\.tmp$"),
    "table renamed": Checkpoint("os:replace", "a temporary table takes its place", r"\.csv\.tmp$"),
    "folder synced": Checkpoint("os:fsync", "the new name reaches the disk", r"/results(/cells)?$"),
    "tables noted as written": Checkpoint(f"{_LEDGER}.tables_written", "notes that the tables are current"),
}


def resolved(fault: Mapping[str, object]) -> dict[str, object]:
    """A fault for the plugin, from one that names a checkpoint.

    Args:
        fault: ``at`` is the name of a checkpoint, the rest is what the plugin takes. A ``match`` of its own
            replaces that of the checkpoint.

    Raises:
        KeyError: There is no such checkpoint.
    """
    checkpoint = CHECKPOINTS[str(fault["at"])]
    return {"match": checkpoint.match, **fault, "at": checkpoint.at}

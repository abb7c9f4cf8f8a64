"""What a person decides about the counts: a field forgotten or excluded, a scale, a cell corrected.

A decision is about a content of a slide, not about a file. So it holds while the file lies there, after it
was renamed, and for the count of another bundle. Everything can be undone, because no row is changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from rbc_edge.errors import UsageError
from rbc_edge.store.corrections import (
    COLUMNS,
    LABELS,
    NOT_A_CELL,
    Box,
    Correction,
    Kind,
    cells_id,
    correction_of,
)
from rbc_edge.store.ledger import RECOUNT, Ledger
from rbc_edge.store.rows import CONTENT, Status, checksum, decision_values, scale_values
from rbc_edge.text import name_text
from rbc_edge.values import SHAPES, CellClass, Scale

AGAIN: Final = "it was counted again or corrected elsewhere meanwhile: load the page again"
MIN_SIDE_PX: Final = 3.0


def decide(
    ledger: Ledger, slide_id: str, fovs: Sequence[str], kind: Status | None, *, reason: str = ""
) -> int:
    """Decides about fields of a slide, and about their copies there; no `fovs`: about all it has now.

    Args:
        ledger: Open for writing. The decision lasts with its next commit.
        slide_id: The slide.
        fovs: Names of fields of view.
        kind: `Status.EXCLUDED`, `Status.FORGOTTEN`, or None: what was decided is undone.
        reason: Why, for the tables.

    Returns:
        How many fields it is about.

    Raises:
        UsageError: The ledger does not know the slide or a field.
    """
    key = _slide_key(ledger, slide_id)
    query = f"SELECT fov, {CONTENT} FROM field WHERE slide_key = ?"
    content_of: dict[str, str] = dict(ledger.database.rows(query, key))
    names = [name_text(fov) for fov in fovs] or list(content_of)
    ledger.reader.check_known(name_text(slide_id), names)
    contents = {content_of[name] for name in names}
    with ledger.database.change() as db:
        for content in contents:
            db.execute("DELETE FROM decision WHERE slide_key = ? AND content = ?", (key, content))
            if kind is not None:
                values = decision_values(key, content, str(kind), reason)
                db.execute("INSERT INTO decision VALUES (?, ?, ?, ?, ?)", values)
    return sum(content in contents for content in content_of.values())


def give_scale(ledger: Ledger, slide_id: str, scale: Scale | None) -> int:
    """Gives a slide its scale, or takes back the one that was given. Its fields are to be counted again.

    Their counts stand until then. Returns how many fields that are. Raises `UsageError` where the ledger does
    not know the slide.
    """
    key = _slide_key(ledger, slide_id)
    with ledger.database.change() as db:
        values = scale_values(scale)
        db.execute(
            "UPDATE slide SET given_diameter_px = ?, given_source = ?, given_by_run = 0, given_checksum = ?"
            " WHERE slide_key = ?",
            (*values, checksum(*values, 0) if scale else None, key),
        )
        query = "UPDATE field SET settings = ? WHERE slide_key = ? AND status = 'ok'"
        return db.execute(query, (RECOUNT, key)).rowcount


def correct(
    ledger: Ledger,
    slide_id: str,
    fov: str,
    sha256: str,
    kind: Kind,
    what: str = "",
    box: Box | None = None,
    *,
    who: str,
    at: str,
) -> Correction:
    """Says of a cell what it is, adds one that was missed, or accepts a field as it is shown.

    Args:
        ledger: Open for writing. The correction lasts with its next commit.
        slide_id: The slide.
        fov: The field of view.
        sha256: The content that the person saw.
        kind: What it is about.
        what: One of `LABELS`, or the name of a shape. Empty for a review.
        box: Of the cell as it is shown, or of the cell to add, pixels of the field. None for a review.
        who: The person.
        at: ISO 8601, UTC.

    Raises:
        UsageError: The field is not counted, holds another image by now, or has no such cell.
    """
    key = _slide_key(ledger, slide_id)
    ledger.reader.check_known(name_text(slide_id), [name_text(fov)])
    row = ledger.reader.field(name_text(slide_id), name_text(fov))
    found = next(ledger.reader.corrected(name_text(slide_id), name_text(fov)), None)
    if row is None or found is None or row.sha256 != sha256:
        raise UsageError(f"{fov}: not counted now, or another image", AGAIN)
    cells, was, place = found[1], "", box
    boxes: list[Box] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in cells.cells.detections.xyxy.tolist()]
    if kind is Kind.REVIEWED:
        was = cells_id(cells.model)
    elif kind is Kind.ADDED:
        place = _addable(what, box, row.width_px or 0, row.height_px or 0, boxes)
    elif box is None or box not in boxes:
        raise UsageError(f"{fov}: no cell there any more", AGAIN)
    elif kind is Kind.LABEL and what not in LABELS:
        raise UsageError(f"{what!r} is no kind of cell", f"one of {', '.join(LABELS)}")
    else:
        i = boxes.index(box)
        is_red = cells.is_cell[i] and cells.cells.detections.class_id[i] == CellClass.RBC
        if kind is Kind.SHAPE and (what not in SHAPES or not is_red):
            raise UsageError(
                f"{fov}: {what!r} is no shape, or the cell is no red cell", "only red cells have one"
            )
        was = cells.label(i) if kind is Kind.LABEL else cells.shape.get(i, "")
        place = cells.place.get(i, boxes[i])  # so that all corrections of a cell have one place
    with ledger.database.change() as db:
        last = db.execute("SELECT coalesce(max(correction_key), 0) FROM correction").fetchone()[0]
        about = (who, at, was, row.version.bundle_id)
        new = Correction(last + 1, sha256, kind, str(what), place, *about)
        values = (new.key, key, *new.values(), new.checksum())
        db.execute(f"INSERT INTO correction VALUES ({', '.join('?' * len(values))})", values)
    return new


def undo(ledger: Ledger, correction_key: int, *, who: str, at: str) -> str:
    """Takes a correction back. Its row stays. Returns its slide. Raises `UsageError` where none holds."""
    query = f"SELECT slide_id, {COLUMNS} FROM correction JOIN slide USING (slide_key)"
    row = ledger.database.first(f"{query} WHERE correction_key = ? AND undone_at = ''", correction_key)
    if row is None:
        raise UsageError(f"no correction {correction_key} to undo", AGAIN)
    undone = replace(correction_of(row[1:], row[0]), undone_by=who, undone_at=at)
    with ledger.database.change() as db:
        db.execute(
            "UPDATE correction SET undone_by = ?, undone_at = ?, checksum = ? WHERE correction_key = ?",
            (who, at, undone.checksum(), correction_key),
        )
    return str(row[0])


def _addable(what: str, box: Box | None, width_px: int, height_px: int, boxes: list[Box]) -> Box:
    """Returns the place of a cell to add, as float32 keeps it. Raises `UsageError` where it cannot be one."""
    if what not in LABELS or what == NOT_A_CELL:
        raise UsageError(f"{what!r} is no kind of cell", f"one of {', '.join(LABELS[:-1])}")
    x0, y0, x1, y1 = np.array(box or (0, 0, 0, 0), np.float32).tolist()
    is_inside = min(x0, y0) >= 0 and x1 <= width_px and y1 <= height_px
    if not (is_inside and min(x1 - x0, y1 - y0) >= MIN_SIDE_PX):
        advice = "drag it from corner to corner of the cell"
        raise UsageError("the box is too small, or not inside the field", advice)
    if (x0, y0, x1, y1) in boxes:
        raise UsageError("there is a cell already", AGAIN)
    return x0, y0, x1, y1


def _slide_key(ledger: Ledger, slide_id: str) -> int:
    ledger.reader.check_known(name_text(slide_id))
    row = ledger.database.first("SELECT slide_key FROM slide WHERE slide_id = ?", name_text(slide_id))
    assert row is not None
    return int(row[0])

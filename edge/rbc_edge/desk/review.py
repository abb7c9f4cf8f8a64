"""What the review page shows and writes, without the web: slides, fields, cells, pictures, corrections.

The ledger is read while the service counts. A write is one short change of its own. The tables of the slide
follow as soon as no other process writes them.
"""

import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from math import isnan
from pathlib import Path
from typing import Any, Final, TypeVar

import cv2
import numpy as np
from PIL import Image

from rbc_edge.errors import RbcEdgeError, UsageError
from rbc_edge.store.corrections import Box, Corrected, Correction, Kind
from rbc_edge.store.decisions import AGAIN, correct, decide, undo
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import BusyError, writing
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.store.schema import FILE_NAME, is_gone
from rbc_edge.text import one_line, utc_text
from rbc_edge.views.tables import Tables, edges_of, form_of
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import load_field
from rbc_edge.vision.quality import warnings

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_LONGEST_PX: Final = 4096  # of a picture on the page
_QUALITY: Final = 92
_DOUBTFUL: Final = 0.15  # so near to the threshold, a call is a doubtful one
_THRESHOLD: Final = 0.5  # where no bundle says one
_WAIT_S: Final = 1.0  # for a writer of the tables, before it is tried again

Json = dict[str, Any]


class Desk:
    """The review of one output folder. All its methods but `picture` and `write_tables` are for one thread.

    Args:
        out: The output folder.
        threshold: Overlap score from which the bundle calls a cell overlapping. None: no bundle says it.
        shapes: Names of the shapes that the bundle knows.
        now: The clock.
    """

    def __init__(
        self,
        out: Path,
        *,
        threshold: float | None = None,
        shapes: Sequence[str] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._out, self._now = out, now
        self._threshold, self._shapes = threshold or _THRESHOLD, tuple(shapes)
        self._reader: Reader | None = None
        self._known: tuple[object, ...] = ()
        self._kept: dict[object, Any] = {}
        self._waiting: set[str] = (
            set()
        )  # slides with tables of before; sets are changed by one call at a time
        with Reader.open(out) as reader:
            if reader.tables_are_stale():  # of a process that was killed
                self._waiting.update(reader.slide_ids())

    # -- reading ----------------------------------------------------------------------------------------

    def slides(self) -> Json:
        """Returns a line for each slide, with numbers of fields."""
        return {"slides": self._kept_until_change("slides", self._slides)}

    def fields(self, slide_id: str) -> Json:
        """Returns a line for each field of a slide. Raises `UsageError` where there is no such slide."""
        self._read().check_known(slide_id)
        return {"fields": self._kept_until_change(("fields", slide_id), lambda: self._fields(slide_id))}

    def field(self, slide_id: str, fov: str) -> Json:
        """Returns a field with its cells and corrections. Raises `UsageError` where there is none."""
        reader, row = self._read(), self.row(slide_id, fov)
        shown = next(reader.corrected(slide_id, fov), None) if row.status is Status.OK else None
        found = shown[1] if shown else None
        said = reader.corrections(slide_id).get((slide_id, row.sha256), [])
        return _line(row, self._edges(), None) | {
            "slide": slide_id,
            "sha256": row.sha256,
            "width_px": row.width_px,
            "height_px": row.height_px,
            "message": one_line(row.message),
            "is_gone": is_gone(row.path),
            "bundle_id": row.version.bundle_id,
            "threshold": self._threshold,
            "shapes": self._shapes,
            "cells": _cells(found) if found else [],
            "corrections": [_said(each) for each in said],
            "lost": [_said(each) for each in found.lost] if found else [],
            "tables_waiting": slide_id in self._waiting,
        }

    def row(self, slide_id: str, fov: str) -> FieldRow:
        """Returns the ledger's row of a field. Raises `UsageError` where there is none."""
        reader = self._read()
        row = reader.field(slide_id, fov)
        if row is None:
            reader.check_known(slide_id, [fov])
            raise UsageError(f"{fov} was taken out of the results", "`rbc-edge forget --undo` brings it back")
        return row

    def close(self) -> None:
        """Closes the ledger."""
        if self._reader is not None:
            self._reader.__exit__()

    def _read(self) -> Reader:
        """Returns the open ledger. The file may be another one by now: damaged, and moved aside."""
        path = self._out / FILE_NAME
        file = path.stat() if path.exists() else None
        # With its log, for a reader that may not write: it sees no change that comes after the first log.
        known = (file.st_dev, file.st_ino, Path(f"{path}-wal").exists()) if file else ()
        if self._reader is None or known != self._known:
            self.close()
            self._reader, self._known = None, known
            self._kept.clear()
            self._reader = Reader.open(self._out)
        return self._reader

    def _kept_until_change(self, name: object, make: Callable[[], _T]) -> _T:
        changes = self._read().changes()
        if self._kept.get("changes") != changes:
            self._kept = {"changes": changes}
        if name not in self._kept:
            self._kept[name] = make()
        made: _T = self._kept[name]
        return made

    def _edges(self) -> EdgeRule:
        return edges_of(self._read()) or EdgeRule.ALL

    def _slides(self) -> list[Json]:
        edges, lines = self._edges(), dict[str, Counter[str]]()
        for row in self._read().all_fields():
            n = lines.setdefault(row.slide_id, Counter())
            n[f"n_{row.status}"] += 1
            n["n_flagged"] += bool(warnings(row.quality_flags))
            n["n_reviewed"] += bool(row.reviewed_by)
            n["n_corrected"] += row.n_corrected
            n["n_lost"] += row.n_lost
            if edges in row.counts:
                n["n_rbc"] += row.counts[edges].n_rbc
                n["n_rbc_overlapping"] += row.counts[edges].n_rbc_overlapping
        return [{"slide": slide_id, **n} for slide_id, n in lines.items()]

    def _fields(self, slide_id: str) -> list[Json]:
        reader, edges = self._read(), self._edges()
        doubt = {fov: self._n_doubtful(found) for fov, found in reader.corrected(slide_id)}
        rows = (row for row in reader.fields(slide_id) if row.status is not Status.DUPLICATE)
        return [_line(row, edges, doubt.get(row.fov)) for row in rows]

    def _n_doubtful(self, found: Corrected) -> int:
        near = np.abs(found.model.overlap_score - self._threshold) < _DOUBTFUL  # NaN is not near
        return int(np.count_nonzero(near)) - sum(bool(near[i]) for i in found.place if i < len(near))

    # -- writing ----------------------------------------------------------------------------------------

    def correct(
        self, slide_id: str, fov: str, sha256: str, kind: Kind, what: str, box: Box | None, who: str
    ) -> Json:
        """Writes a correction (`decisions.correct`). Returns the field as it is then."""
        if kind is Kind.SHAPE and what not in self._shapes:
            raise UsageError(
                f"the bundle knows no shape {what!r}", "choose one of those that the page offers"
            )
        self._change(
            slide_id,
            lambda ledger: correct(
                ledger, slide_id, fov, sha256, kind, what, box, who=who, at=utc_text(self._now())
            ),
        )
        return self.field(slide_id, fov)

    def undo(self, slide_id: str, fov: str, key: int, who: str) -> Json:
        """Takes back a correction of a field. Returns the field as it is then."""
        held = self.field(slide_id, fov)["corrections"]
        if key not in (each["key"] for each in held):
            raise UsageError(f"no correction {key} in this field", AGAIN)
        self._change(slide_id, lambda ledger: undo(ledger, key, who=who, at=utc_text(self._now())))
        return self.field(slide_id, fov)

    def exclude(self, slide_id: str, fov: str, sha256: str, reason: str | None) -> Json:
        """Takes a field out of the counts, also one that has lost its file. None: counts it again."""
        if self.row(slide_id, fov).sha256 != sha256:
            raise UsageError(f"{fov} holds another image now", AGAIN)
        kind = None if reason is None else Status.EXCLUDED
        self._change(slide_id, lambda ledger: decide(ledger, slide_id, [fov], kind, reason=reason or ""))
        return self.field(slide_id, fov)

    def _change(self, slide_id: str, change: Callable[[Ledger], object]) -> None:
        self._read()  # first: Ledger() would make a ledger that is not there
        with Ledger(self._out) as ledger:
            change(ledger)
            ledger.commit()
        self._waiting.add(slide_id)

    def write_tables(self) -> bool:
        """Brings the tables of changed slides up to date. False: another process writes now, try again.

        It may run in another thread than the rest.
        """
        slide_ids = set(self._waiting)
        if not slide_ids:
            return True
        self._waiting -= slide_ids  # before they are read: what changes meanwhile is written once more
        try:
            with writing(self._out, wait_s=_WAIT_S), Ledger(self._out) as ledger:
                edges = edges_of(ledger.reader) or EdgeRule.ALL
                tables = Tables(self._out, ledger, edges=edges, form=form_of(ledger.reader))
                tables.write(slide_ids)
        except RbcEdgeError as error:
            self._waiting |= slide_ids
            if isinstance(error, BusyError):
                return False
            raise
        for what in tables.held.values():
            log.warning("%s; the next run writes it", what)
        return True


def picture(path: Path, page: int, slide_id: str, fov: str, sha256: str) -> bytes:
    """Returns the bare image of a field as JPEG.

    Raises `ImageError` where it is gone or damaged, and `UsageError` where another image has its place.
    """
    field = load_field(path, slide_id, fov, page)
    if field.sha256 != sha256:
        raise UsageError(f"{fov}: the file now holds another image", "the next run counts it")
    image = field.image
    factor = _LONGEST_PX / max(image.shape[:2])
    if factor < 1:
        size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _line(row: FieldRow, edges: EdgeRule, n_doubtful: int | None) -> Json:
    counts = row.counts.get(edges)
    crowding = None
    if counts and row.scale and row.width_px and row.height_px and row.scale.cell_diameter_px > 0:
        area = row.width_px * row.height_px
        crowding = round(counts.n_rbc * row.scale.cell_diameter_px**2 / area, 3)
    return {
        "fov": row.fov,
        "status": row.status,
        "reason": row.reason,
        "flags": warnings(row.quality_flags),
        "crowding": crowding,
        "n_doubtful": n_doubtful,
        "n_corrected": row.n_corrected,
        "n_lost": row.n_lost,
        "reviewed": row.reviewed_by,
        "n_rbc": counts and counts.n_rbc,
        "n_rbc_single": counts and counts.n_rbc_single,
        "n_rbc_overlapping": counts and counts.n_rbc_overlapping,
        "n_wbc": counts and counts.n_wbc,
        "n_platelets": counts and counts.n_platelets,
    }


def _cells(found: Corrected) -> list[Json]:
    xyxy, score = found.cells.detections.xyxy.tolist(), found.cells.overlap_score.tolist()
    return [
        {
            "number": i + 1,
            "box": xyxy[i],
            "label": found.label(i),
            "model_label": found.model_label(i),
            "overlap_score": None if isnan(score[i]) else round(score[i], 4),
            "shape": found.shape.get(i, ""),
        }
        for i in range(len(xyxy))
    ]


def _said(each: Correction) -> Mapping[str, Any]:
    names = ("key", "kind", "what", "was", "who", "at", "box")
    return {name: getattr(each, name) for name in names}

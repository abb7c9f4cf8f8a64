"""Pictures of a field with its cells drawn: a person looks before believing a number.

`draw` outlines cells in an image. `Overlays` keeps ``overlays/<slide>/<fov>_overlay.jpg`` in the output
folder up to date: a view of the ledger, like the tables, that can always be drawn again while the camera's
image is there.
"""

import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rbc_edge.errors import ImageError, RbcEdgeError
from rbc_edge.store.outdir import remove_left_over, replacing
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.text import path_text
from rbc_edge.values import CellClass, Cells, Detections, Label, UInt8
from rbc_edge.views.tables import file_names
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import load_field

log = logging.getLogger(__name__)

FOLDER: Final = "overlays"
SUFFIX: Final = "_overlay.jpg"

# Okabe and Ito's palette keeps apart for every kind of colour vision; RGB. Line style says the same again.
COLOURS: Final = {
    Label.RBC_SINGLE: (0, 114, 178),
    Label.RBC_OVERLAPPING: (213, 94, 0),
    Label.WBC: (0, 158, 115),
    Label.PLATELET: (204, 121, 167),
}
_GROUP_COLOUR: Final = (70, 70, 70)
_GROWTH: Final = 1.12  # the group's line runs outside the lines of its cells
_DASH_DEGREES: Final = 18.0

_MARK: Final = "rbc-edge overlay 1"  # the version of the drawing; another one draws all anew
_HEAD_BYTES: Final = 1024  # the mark stands within the first of them
_QUALITY: Final = 88
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
_SWATCH_EM: Final = 2
_LEAST_FOOTER_PX: Final = 360  # a narrower field gets white beside it, so that its footer can be read


def draw(image: UInt8, cells: Cells, *, longest_px: int = 0) -> UInt8:
    """Outlines every cell of a field of view, and every group of overlapping cells.

    Single red cells: thin, whole, blue. Overlapping ones: thick, dashed, orange. White cells: green boxes.
    Platelets: thin pink circles. Groups of two and more: a thin grey line around all of their cells.

    Args:
        image: uint8 (H, W, 3) RGB; not changed.
        cells: What the analyzer found in it.
        longest_px: Where a side is longer, image and cells are drawn smaller; 0: as large as the image.

    Returns:
        uint8 (H, W, 3) RGB, a copy with the outlines; smaller where `longest_px` says so.
    """
    factor = min(1.0, longest_px / max(image.shape[:2])) if longest_px else 1.0
    if factor < 1:
        size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
        out: UInt8 = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        cells = _scaled(cells, factor)
    else:
        out = image.copy()
    thin = max(1, round(math.sqrt(out.shape[0] * out.shape[1]) / 400))
    _draw_groups(out, cells, thin)
    for i, (x0, y0, x1, y1) in enumerate(cells.detections.xyxy.tolist()):
        label = cells.label(i)
        colour = COLOURS[label]
        centre, axes = _ellipse(x0, y0, x1, y1)
        if label == Label.WBC:
            cv2.rectangle(out, (round(x0), round(y0)), (round(x1), round(y1)), colour, 2 * thin, cv2.LINE_AA)
        elif label == Label.RBC_OVERLAPPING:
            for start in np.arange(0.0, 360.0, 2 * _DASH_DEGREES).tolist():
                end = start + _DASH_DEGREES
                cv2.ellipse(out, centre, axes, 0.0, start, end, colour, 2 * thin, cv2.LINE_AA)
        else:
            cv2.ellipse(out, centre, axes, 0.0, 0.0, 360.0, colour, thin, cv2.LINE_AA)
    return out


def _scaled(cells: Cells, factor: float) -> Cells:
    found = cells.detections
    return Cells(
        Detections(found.xyxy * np.float32(factor), found.score, found.class_id),
        *(cells.overlap_score, cells.overlapping, cells.group, cells.touches_edge),
    )


def _ellipse(x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[int, int], tuple[int, int]]:
    centre = (round((x0 + x1) / 2), round((y0 + y1) / 2))
    return centre, (max(1, round((x1 - x0) / 2)), max(1, round((y1 - y0) / 2)))


def _draw_groups(out: UInt8, cells: Cells, thin: int) -> None:
    """Draws a line around the cells of each group; not their convex hull, which would enclose others."""
    for number in np.flatnonzero(np.bincount(cells.group) > 1).tolist():
        if number == 0:
            continue
        members = cells.group == number
        boxes = cells.detections.xyxy[members]
        side = float((boxes[:, 2:] - boxes[:, :2]).mean())
        margin = math.ceil(side * 0.5) + 3 * thin
        corner = np.floor(boxes[:, :2].min(axis=0)).astype(int) - margin
        size = np.ceil(boxes[:, 2:].max(axis=0)).astype(int) + margin - corner
        area: UInt8 = np.zeros((int(size[1]), int(size[0])), np.uint8)
        for x0, y0, x1, y1 in (boxes - np.tile(corner, 2)).tolist():
            centre, (a, b) = _ellipse(x0, y0, x1, y1)
            axes = (round(a * _GROWTH) + 2 * thin, round(b * _GROWTH) + 2 * thin)
            cv2.ellipse(area, centre, axes, 0.0, 0.0, 360.0, 255, -1)
        outlines = _outlines(area)
        if len(outlines) > 1:  # cells that are linked by the corners of their boxes
            disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin // 3 | 1,) * 2)
            outlines = _outlines(np.asarray(cv2.morphologyEx(area, cv2.MORPH_CLOSE, disk), np.uint8))
        offset = (int(corner[0]), int(corner[1]))
        cv2.drawContours(out, outlines, -1, _GROUP_COLOUR, max(1, thin // 2), cv2.LINE_AA, offset=offset)


def _outlines(area: UInt8) -> Sequence[np.ndarray]:
    return cv2.findContours(area, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]


# -- the footer -----------------------------------------------------------------------------------------


def with_footer(image: UInt8, row: FieldRow, *, edges: EdgeRule, manifest: Manifest | None) -> UInt8:
    """Puts a strip below a picture: what the lines mean, the counts, and what they depend on.

    Args:
        image: uint8 (H, W, 3) RGB.
        row: The field of view, counted.
        edges: Edge rule of the counts.
        manifest: The bundle that counted; None, or another: its thresholds are not known.

    Returns:
        uint8 (H + h, max(W, 360), 3) RGB; the picture itself is not touched.
    """
    counts = row.counts[edges]
    width = max(image.shape[1], _LEAST_FOOTER_PX)
    px = min(24, max(12, round(width / 55)))
    labels = [
        (Label.RBC_SINGLE, f"single {counts.n_rbc_single}"),
        (Label.RBC_OVERLAPPING, f"overlapping {counts.n_rbc_overlapping}"),
        (Label.WBC, f"white {counts.n_wbc}"),
        (Label.PLATELET, f"platelets {counts.n_platelets}"),
    ]
    items: list[tuple[Label | None, str]] = [(None, f"red cells {counts.n_rbc}:"), *labels]
    facts = [f"edges {edges}", _scale_text(row), *threshold_texts(row.version.bundle_id, manifest)]
    facts += [f"bundle {row.version.bundle_id}", *(f"! {flag}" for flag in row.quality_flags)]
    name = path_text(f"{row.slide_id}/{row.fov}").encode("ascii", "backslashreplace").decode()
    items += [(None, text) for text in (*facts, name)]

    font = ImageFont.load_default(px)
    placed, height = _placed(items, px, width, lambda text: math.ceil(font.getlength(text)))
    strip = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(strip)
    for label, text, x, y in placed:
        if label is not None:
            _swatch(pen, label, x, y, px)
        pen.text((x + (_SWATCH_EM * px if label else 0), y), text, fill=_INK, font=font)
    out = np.full((image.shape[0] + height, width, 3), 255, np.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    out[image.shape[0] :] = np.asarray(strip)
    return out


def threshold_texts(bundle_id: str, manifest: Manifest | None) -> list[str]:
    """Says the thresholds of the bundle that counted, in a few short texts; none where it is not at hand."""
    # "+fp32" stands behind it where the bundle counted in another precision; the thresholds are the same.
    if manifest is None or manifest.bundle_id != bundle_id.partition("+")[0]:
        return []
    score = manifest.score_threshold
    names = ((CellClass.RBC, "red"), (CellClass.WBC, "white"), (CellClass.PLATELET, "platelet"))
    seen = ", ".join(f"{name} {score[kind]:.2f}" for kind, name in names)
    return [f"score at least: {seen}", f"overlapping from {manifest.overlap_threshold:.2f}"]


def _scale_text(row: FieldRow) -> str:
    if row.scale is None or math.isnan(row.scale.cell_diameter_px):
        return "scale unknown"
    return f"red cell {row.scale.cell_diameter_px:.1f} px ({row.scale.source})"


def _placed(
    items: Sequence[tuple[Label | None, str]], px: int, width: int, length: Callable[[str], int]
) -> tuple[list[tuple[Label | None, str, int, int]], int]:
    """Sets items into lines; returns them with the left upper corner of each, and the height, pixels."""
    placed = []
    x = left = px // 2
    y = px // 3
    line = round(px * 1.35)
    for label, text in items:
        swatch = _SWATCH_EM * px if label is not None else 0
        if x > left and x + swatch + length(text) > width - left:
            x, y = left, y + line
        shown = text
        while shown and x + swatch + length(shown) > width - left:  # a name that is longer than the picture
            shown = f"{shown[:-4]}..." if len(shown) > 4 else ""
        placed.append((label, shown, x, y))
        x += swatch + length(shown) + px
    return placed, y + line + px // 4


def _swatch(pen: ImageDraw.ImageDraw, label: Label, x: int, y: int, px: int) -> None:
    """Draws the line of a label as it looks around a cell."""
    thin = max(1, px // 9)
    box = (x + px // 3, y + px // 8, x + px // 3 + px, y + px // 8 + px)
    colour = COLOURS[label]
    match label:
        case Label.WBC:
            pen.rectangle(box, outline=colour, width=2 * thin)
        case Label.RBC_OVERLAPPING:
            for start in range(0, 360, 45):
                pen.arc(box, start, start + 25, fill=colour, width=2 * thin)
        case Label.PLATELET:
            inner = px // 4
            pen.ellipse((box[0] + inner, box[1] + inner, box[2] - inner, box[3] - inner), outline=colour)
        case Label.RBC_SINGLE:
            pen.ellipse(box, outline=colour, width=thin)


# -- the files ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stale:
    row: FieldRow
    path: Path
    mark: str


def row_key(row: FieldRow, edges: EdgeRule) -> str:
    """Returns 16 hex digits that change when what is drawn and said of a field of view changes."""
    scale = row.scale
    shown = (
        *(row.slide_id, row.fov, row.sha256, row.version.bundle_id, row.quality_flags, edges),
        *((scale.cell_diameter_px, scale.source) if scale else ()),
        row.counts.get(edges),
    )
    return hashlib.sha256(repr(shown).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def overlay_paths(out: Path, slide_name: str, fovs: Sequence[str]) -> dict[str, Path]:
    """Returns where the overlay of each field of view lies, whether it is drawn or not.

    Args:
        out: The output folder.
        slide_name: The slide's file name (`tables.file_names`).
        fovs: The names of all counted fields of the slide, in order.
    """
    folder = out / FOLDER / on_disk(slide_name)
    return {fov: folder / on_disk(f"{name}{SUFFIX}") for fov, name in file_names(fovs).items()}


def on_disk(name: str) -> str:
    """Returns a file's name, made of a slide's or a field's, as the system wants it."""
    return os.fsdecode(name.encode())  # UTF-8 on disk, whatever the locale


class Overlays:
    """Keeps the overlays of one output folder up to date.

    A file is replaced whole or not at all, and is not touched while it shows what the ledger says. What
    cannot be drawn is a warning: the counts do not hang on it.

    Args:
        out: The output folder.
        ledger: The ledger to show.
        edges: Edge rule of the counts in the footer.
        longest_px: Longest side of the picture above its footer, pixels; 0: as large as the image.
        manifest: The bundle at work, for the thresholds in the footer; None: not known.
    """

    def __init__(
        self,
        out: Path,
        ledger: Reader,
        *,
        edges: EdgeRule = EdgeRule.ALL,
        longest_px: int = 2048,
        manifest: Manifest | None = None,
    ) -> None:
        self._out = out
        self._ledger = ledger
        self._edges = edges
        self._longest_px = longest_px
        self._manifest = manifest
        # A number each, for there are many: files that show the ledger, and those that cannot be drawn.
        self._looked_at: set[int] = set()
        self._there: set[int] = set()
        self._told: set[str] = set()

    def write_slide(self, slide_id: str, *, keep_going: Callable[[], bool] = lambda: True) -> bool:
        """Draws what is missing or out of date, and removes what shows nothing of the ledger any more.

        Args:
            slide_id: The slide.
            keep_going: Asked between two pictures; may end the work early.

        Returns:
            Whether all is drawn that can be.
        """
        try:
            stale = self._stale(slide_id)
        except OSError as error:
            self._warn(f"{path_text(self._out / FOLDER)}: cannot be used: {error.strerror}")
            return True
        if not stale:
            return True
        # The newest first: it is the one that somebody waits for.
        cells = self._cells(slide_id, stale)
        for each in sorted(stale.values(), key=lambda s: s.row.analyzed_at, reverse=True):
            if not keep_going():
                return False
            try:
                self._draw(each, cells[each.row.fov])
            except RbcEdgeError:
                raise
            except OSError as error:
                self._warn(
                    f"{path_text(each.path)}: the overlay cannot be written: {error.strerror or error}"
                )
                return True  # the disk is full, or not ours: the others fare no better
            except Exception as error:  # whatever it is, the counts go on
                log.debug("%s", path_text(each.path), exc_info=True)
                self._warn(f"{path_text(each.path)}: cannot be drawn: {type(error).__name__}: {error}")
            self._looked_at.add(hash((each.path, each.mark)))
        return True

    def _stale(self, slide_id: str) -> dict[str, _Stale]:
        slide_name = file_names(self._ledger.slide_ids()).get(slide_id)
        if slide_name is None:
            return {}
        rows = [row for row in self._ledger.fields(slide_id) if row.status is Status.OK]
        paths = overlay_paths(self._out, slide_name, [row.fov for row in rows])
        folder = self._out / FOLDER / on_disk(slide_name)
        there = _tidy(folder, {path.name for path in paths.values()})
        stale = {}
        for row in rows:
            path = paths[row.fov]
            mark = f"{_MARK} {row_key(row, self._edges)} {self._look(row)}"
            key = hash((path, mark))
            if path.name in there and key not in self._looked_at and mark in _mark_of(path):
                self._looked_at.add(key)
            if path.name in there:
                self._there.add(key)
            elif key in self._there:  # somebody has removed it
                self._there.discard(key)
                self._looked_at.discard(key)
            if key not in self._looked_at:
                stale[row.fov] = _Stale(row, path, mark)
        return stale

    def _look(self, row: FieldRow) -> str:
        """What of the drawing does not come from the counts."""
        thresholds = threshold_texts(row.version.bundle_id, self._manifest)
        return hashlib.sha256(repr((self._longest_px, thresholds)).encode()).hexdigest()[:8]

    def _cells(self, slide_id: str, stale: dict[str, _Stale]) -> dict[str, Cells]:
        found = {fov: cells for fov, cells in self._ledger.cells(slide_id) if fov in stale}
        return {fov: found.get(fov, Cells.empty()) for fov in stale}

    def _draw(self, stale: _Stale, cells: Cells) -> None:
        row = stale.row
        try:
            field = load_field(row.path, row.slide_id, row.fov)
        except ImageError as error:
            log.debug("no overlay: %s", error)
            field = None
        if field is None or field.sha256 != row.sha256:
            # The camera's folder was emptied, or holds another image by now, which is counted in its turn.
            # A picture of the same counts that only looks otherwise is better than none.
            if f"{_MARK} {row_key(row, self._edges)} " not in _mark_of(stale.path):
                stale.path.unlink(missing_ok=True)
            return
        picture = draw(field.image, cells, longest_px=self._longest_px)
        picture = with_footer(picture, row, edges=self._edges, manifest=self._manifest)
        with replacing(stale.path) as file:
            file.write(_jpeg(picture, stale.mark))

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s; the counts are kept", message)


def _jpeg(image: UInt8, mark: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY, comment=mark.encode())
    return buffer.getvalue()


def _mark_of(path: Path) -> str:
    """Returns the head of an overlay with its mark; empty where it is none, or was cut short."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(-2, os.SEEK_END)
            is_whole = file.read() == b"\xff\xd9"
    except OSError:
        return ""
    return head.decode("latin-1") if is_whole else ""


def _tidy(folder: Path, wanted: set[str]) -> set[str]:
    """Removes overlays that are not wanted any more; returns the names of those that are there."""
    there = set()
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if entry.name in wanted:
                there.add(entry.name)
            elif entry.name.endswith(SUFFIX):
                (folder / entry.name).unlink(missing_ok=True)
        remove_left_over(folder)
        if not wanted:
            with suppress(OSError):  # something else lies in it
                folder.rmdir()
    return there

"""Pictures of a field of view with its cells outlined, so that a person can check the count.

`draw` outlines cells in an image. `Overlays` keeps ``overlays/<slide>/<fov>_overlay.jpg`` in the output
folder up to date. Like the tables, overlays show the ledger. They can be drawn again while the camera's
image is there.
"""

import hashlib
import io
import logging
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont

from rbc_edge.errors import ImageError, RbcEdgeError
from rbc_edge.store.outdir import remove_left_over, replacing
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import FieldRow, Status
from rbc_edge.text import path_text
from rbc_edge.values import SHAPES, CellClass, Cells, Label, Shape, UInt8
from rbc_edge.views import shapes
from rbc_edge.views.names import (
    OVERLAY_SUFFIX,
    OVERLAYS,
    file_names,
    old_files,
    overlay_folder,
    overlay_paths,
)
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import OVERLAY_MARK, load_field
from rbc_edge.vision.quality import NOTES

log = logging.getLogger(__name__)

# RGB. The palette of Okabe and Ito suits every kind of colour vision. The line style shows the kind too.
COLOURS: Final = {
    Label.RBC_SINGLE: (0, 114, 178),
    Label.RBC_OVERLAPPING: (213, 94, 0),
    Label.WBC: (0, 158, 115),
    Label.PLATELET: (204, 121, 167),
}
_GROUP_COLOUR: Final = (70, 70, 70)
_GROWTH: Final = 1.12  # the line of a group runs outside the lines of its cells

_MARK: Final = f"{OVERLAY_MARK} 1"  # another version draws all of them again
_HEAD_BYTES: Final = 1024  # the mark is within the first bytes
_QUALITY: Final = 88
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
_FONT: Final = Path(__file__).with_name("fonts") / "DejaVuSans-subset.ttf"
# What it has of Unicode: Latin, Greek and Cyrillic letters.
_LETTERS: Final = (
    *(range(0x20, 0x7F), range(0xA0, 0x250), range(0x386, 0x3D0), range(0x400, 0x460)),
    *(range(0x1E00, 0x1EFA), range(0x2010, 0x2016)),
)
_STYLE: Final = 2  # of the footer. Another number draws the pictures again that can be drawn.
_SWATCH_EM: Final = 2.25
_MIN_FOOTER_PX: Final = 360  # a narrower field gets a white border, so that its footer can be read


def draw(image: UInt8, cells: Cells, *, longest_px: int = 0, letters: Sequence[str] = ()) -> UInt8:
    """Outlines every cell of a field of view, uint8 (H, W, 3) RGB, and every group of overlapping cells.

    Single red cells: thin solid blue line. Overlapping red cells: thick dashed orange line. White cells:
    green box. Platelets: thin pink circle. Groups of two or more: thin grey line around all their cells.

    `letters` are written into the cells, one text for each or none.

    Returns a copy, shrunk so that its longer side has `longest_px` at most. 0: as large as the image.
    """
    factor = longest_px / max(image.shape[:2]) if longest_px else 1.0
    out = image.copy()
    if factor < 1:
        size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
        out = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        found = replace(cells.detections, xyxy=cells.detections.xyxy * np.float32(factor))
        cells = replace(cells, detections=found)
    thin = max(1, round(math.sqrt(out.shape[0] * out.shape[1]) / 400))
    _draw_groups(out, cells, thin)
    for i, box in enumerate(cells.detections.xyxy.tolist()):
        _draw_cell(out, cells.label(i), box, thin)
    for text, box in zip(letters, cells.detections.xyxy.tolist(), strict=False):
        _write_in(out, text, box, thin)
    return out


def _write_in(out: UInt8, text: str, box: Sequence[float], thin: int) -> None:
    """Writes dark letters with a pale rim into the middle of a box."""
    size = max(0.3, 0.36 * (box[3] - box[1]) / 22 / max(len(text) / 2, 1))
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, thin)
    at = (round((box[0] + box[2] - width) / 2), round((box[1] + box[3] + height) / 2))
    for colour, line in ((_PAPER, 3 * thin), (_INK, thin)):
        cv2.putText(out, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, line, cv2.LINE_AA)


def shape_letters(cells: Cells, row: FieldRow) -> list[str]:
    """Returns what an overlay says of each cell's shape: its letters, with ``?`` where it is unsure.

    Nothing of normal cells, and of cells of which no shape is judged for another reason.
    """
    marks = {"yes": "", "unsure": "?"}
    return [
        shapes.LETTERS[SHAPES[shape]] + marks[why] if why in marks and SHAPES[shape] != Shape.NORMAL else ""
        for shape, why in zip(cells.morphology.shape.tolist(), shapes.judged(cells, row), strict=True)
    ]


def _draw_cell(out: UInt8, label: Label, box: Sequence[float], thin: int, dash_degrees: int = 18) -> None:
    if label == Label.WBC:
        corners = (round(box[0]), round(box[1])), (round(box[2]), round(box[3]))
        cv2.rectangle(out, *corners, COLOURS[label], 2 * thin, cv2.LINE_AA)
        return
    dashed = label == Label.RBC_OVERLAPPING
    length, step = (dash_degrees, 2 * dash_degrees) if dashed else (360, 360)
    for start in range(0, 360, step):
        arc = (*_ellipse(*box), 0.0, start, start + length)
        cv2.ellipse(out, *arc, COLOURS[label], thin * (1 + dashed), cv2.LINE_AA)


def _ellipse(x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns centre and half axes of the ellipse in a box, whole pixels."""
    centre = (round((x0 + x1) / 2), round((y0 + y1) / 2))
    return centre, (max(1, round((x1 - x0) / 2)), max(1, round((y1 - y0) / 2)))


def _draw_groups(out: UInt8, cells: Cells, thin: int) -> None:
    for outlines, offset in group_outlines(cells, thin):
        cv2.drawContours(out, outlines, -1, _GROUP_COLOUR, max(1, thin // 2), cv2.LINE_AA, offset=offset)


def group_outlines(cells: Cells, thin: int) -> Iterator[tuple[Sequence[np.ndarray], tuple[int, int]]]:
    """Yields the lines around the cells of each group, and where they lie, in pixels.

    A convex hull would enclose cells of no group. `thin` is the width of the line of a cell.
    """
    for number in np.flatnonzero(np.bincount(cells.group)[1:] > 1) + 1:
        boxes = cells.detections.xyxy[cells.group == number]
        margin = math.ceil(float((boxes[:, 2:] - boxes[:, :2]).mean()) * 0.5) + 3 * thin
        corner = np.floor(boxes[:, :2].min(axis=0)).astype(int) - margin
        size = np.ceil(boxes[:, 2:].max(axis=0)).astype(int) + margin - corner
        area: UInt8 = np.zeros((int(size[1]), int(size[0])), np.uint8)
        for x0, y0, x1, y1 in (boxes - np.tile(corner, 2)).tolist():
            centre, (a, b) = _ellipse(x0, y0, x1, y1)
            axes = (round(a * _GROWTH) + 2 * thin, round(b * _GROWTH) + 2 * thin)
            cv2.ellipse(area, centre, axes, 0.0, 0.0, 360.0, 255, -1)
        outlines = _outlines(area)
        if len(outlines) > 1:  # only the corners of the cells' boxes touch
            disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin // 3 | 1,) * 2)
            outlines = _outlines(np.asarray(cv2.morphologyEx(area, cv2.MORPH_CLOSE, disk), np.uint8))
        yield outlines, (int(corner[0]), int(corner[1]))


def _outlines(area: UInt8) -> Sequence[np.ndarray]:
    return cv2.findContours(area, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]


# -- the footer -----------------------------------------------------------------------------------------


def with_footer(
    image: UInt8,
    row: FieldRow,
    *,
    edges: EdgeRule,
    manifest: Manifest | None,
    letters: Sequence[str] | None = None,
) -> UInt8:
    """Adds a strip below a picture: legend, counts, and what the counts depend on.

    With the `letters` in the picture, it says what they mean, or that no shape is marked.

    The thresholds of the manifest are shown if it is of the bundle that counted. Returns a new picture, uint8
    (H + h, max(W, 360), 3) RGB.
    """
    counts = row.counts[edges]
    width = max(image.shape[1], _MIN_FOOTER_PX)
    px = min(24, max(12, round(width / 55)))
    items: list[tuple[Label | None, str]] = [
        (None, f"red cells {counts.n_rbc}:"),
        (Label.RBC_SINGLE, f"single {counts.n_rbc_single}"),
        (Label.RBC_OVERLAPPING, f"overlapping {counts.n_rbc_overlapping}"),
        (Label.WBC, f"white {counts.n_wbc}"),
        (Label.PLATELET, f"platelets {counts.n_platelets}"),
    ]
    size = row.scale.cell_diameter_px if row.scale else math.nan
    scale = f"red cell {size:.1f} px ({row.scale.source})" if row.scale and size > 0 else "scale unknown"
    facts = [f"edges {edges}", scale, *threshold_texts(row.version.bundle_id, manifest)]
    facts += [
        f"bundle {row.version.bundle_id}",
        *(f"{'' if flag in NOTES else '! '}{flag}" for flag in row.quality_flags),
    ]
    name = _drawable(path_text(f"{row.slide_id}/{row.fov}"))
    items += [(None, text) for text in (*_legend(letters, row), *facts, name)]

    font = ImageFont.truetype(_FONT, px)
    placed, height = _placed(items, px, width, lambda text: math.ceil(font.getlength(text)))
    strip = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(strip)
    for label, text, x, y in placed:
        pen.text((x + (round(_SWATCH_EM * px) if label else 0), y), text, fill=_INK, font=font)
    out = np.full((image.shape[0] + height, width, 3), 255, np.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    out[image.shape[0] :] = np.asarray(strip)
    for label, _, x, y in placed:
        if label is not None:
            half = px // 4 if label == Label.PLATELET else px // 2
            middle_x, middle_y = x + px, image.shape[0] + y + px * 5 // 8
            box = (middle_x - half * 1.5, middle_y - half, middle_x + half * 1.5, middle_y + half)
            _draw_cell(out, label, box, max(1, px // 16), 30)
    return out


def _legend(letters: Sequence[str] | None, row: FieldRow) -> list[str]:
    """Says what letters mean, and how many cells have them."""
    if letters is None:
        return []
    if shapes.is_spoiled(row):
        return ["no shape is judged: see the flags"]
    n = Counter(text.rstrip("?") for text in letters if text)
    texts = [f"{mark} {shapes.name(shape)} {n[mark]}" for shape, mark in shapes.LETTERS.items() if n[mark]]
    unsure = sum(text.endswith("?") for text in letters)
    return [*texts, *([f"? unsure {unsure}"] if unsure else [])] or ["no shape but normal is marked"]


def _drawable(name: str) -> str:
    """Returns a name with escapes for what the font does not have."""
    name = unicodedata.normalize("NFC", name)
    return "".join(
        c if any(ord(c) in letters for letters in _LETTERS) else c.encode("unicode_escape").decode()
        for c in name
    )


def threshold_texts(bundle_id: str, manifest: Manifest | None) -> list[str]:
    """Returns the thresholds of the bundle that counted as short texts, or none for another manifest."""
    # "+fp32" at the end means another precision of the same bundle. The thresholds are the same.
    if manifest is None or manifest.bundle_id != bundle_id.partition("+")[0]:
        return []
    score = manifest.score_threshold
    names = {CellClass.RBC: "red", CellClass.WBC: "white", CellClass.PLATELET: "platelet"}
    seen = ", ".join(f"{name} {score[kind]:.2f}" for kind, name in names.items())
    return [f"score at least: {seen}", f"overlapping from {manifest.overlap_threshold:.2f}"]


def _placed(
    items: Sequence[tuple[Label | None, str]], px: int, width: int, length: Callable[[str], int]
) -> tuple[list[tuple[Label | None, str, int, int]], int]:
    """Arranges items in lines. Returns them with their upper left corners, and the height, in pixels."""
    placed = []
    x = left = px // 2
    y, line = px // 3, round(px * 1.35)
    for label, text in items:
        swatch = round(_SWATCH_EM * px) if label is not None else 0
        if x > left and x + swatch + length(text) > width - left:
            x, y = left, y + line
        shown = text
        while shown and x + swatch + length(shown) > width - left:  # a name that is wider than the picture
            shown = f"{shown[:-4]}..." if len(shown) > 4 else ""
        placed.append((label, shown, x, y))
        x += swatch + length(shown) + px
    return placed, y + line + px // 4


# -- the files ------------------------------------------------------------------------------------------


class _Stale(NamedTuple):
    row: FieldRow
    path: Path
    mark: str


def digest(*parts: object) -> str:
    """Returns 16 hex digits that change when the parts change."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def row_key(row: FieldRow, edges: EdgeRule) -> str:
    """Returns 16 hex digits. They change when the picture or the text of a field of view has to change."""
    scale = (row.scale.cell_diameter_px, row.scale.source) if row.scale else ()
    version = (row.sha256, row.version.bundle_id, row.quality_flags, edges)
    said = (row.corrections,) if row.corrections else ()  # pictures of before stay
    return digest(row.slide_id, row.fov, *version, *scale, row.counts.get(edges), *said)


@dataclass(eq=False)
class Overlays:
    """Keeps the overlays of one output folder up to date (options as in `ViewOptions`).

    A file is replaced completely or not at all. It is not touched while it shows what the ledger says. If
    an overlay cannot be drawn, there is a warning. The counts do not depend on it.
    """

    out: Path
    ledger: Reader
    _: KW_ONLY
    edges: EdgeRule = EdgeRule.ALL
    longest_px: int = 2048  # without the footer
    manifest: Manifest | None = None  # of the installed bundle
    new: bool = True  # False: only those that exist, and only when their counts have changed
    shapes: bool = False  # write the shapes of cells into them, in letters
    # Hashes, because there may be very many files.
    _current: set[int] = field(default_factory=set, init=False)
    _impossible: set[int] = field(default_factory=set, init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def write_slide(self, slide_id: str, *, keep_going: Callable[[], bool] = lambda: True) -> bool:
        """Draws missing and outdated overlays, and removes those without a counted field.

        `keep_going` is asked before each picture. False ends the work early. Returns whether the work is
        complete. Overlays that cannot be drawn are left out.
        """
        try:
            stale = self._stale(slide_id)
        except OSError as error:
            self._warn(f"{path_text(self.out / OVERLAYS)}: cannot be used: {error.strerror}")
            return True
        if not stale:
            return True
        fovs = {each.row.fov for each in stale}
        cells = {fov: found for fov, found in self.ledger.cells(slide_id) if fov in fovs}
        # The newest first: a person may be waiting for it.
        for each in sorted(stale, key=lambda s: s.row.analyzed_at, reverse=True):
            if not keep_going():
                return False
            drawn = False
            try:
                drawn = self._draw(each, cells.get(each.row.fov, Cells.empty()))
            except RbcEdgeError:
                raise
            except OSError as error:  # a full disk or missing permission: the others fail too
                what = error.strerror or error
                self._warn(f"{path_text(each.path)}: the overlay cannot be written: {what}")
                return True
            except Exception as error:  # counting must go on after any error
                log.debug("%s", path_text(each.path), exc_info=True)
                self._warn(f"{path_text(each.path)}: cannot be drawn: {type(error).__name__}: {error}")
            (self._current if drawn else self._impossible).add(hash((each.path, each.mark)))
        return True

    def _stale(self, slide_id: str) -> list[_Stale]:
        names = file_names(self.ledger.slide_ids())
        slide_name = names.get(slide_id)
        if slide_name is None:
            return []
        for old in old_files(self.out / OVERLAYS, names, of=[slide_id]):
            _tidy(old, set())
        rows = [row for row in self.ledger.fields(slide_id) if row.status is Status.OK]
        paths = overlay_paths(self.out, slide_name, [row.fov for row in rows])
        there = _tidy(overlay_folder(self.out, slide_name), {path.name for path in paths.values()})
        stale = []
        for row in rows:
            path = paths[row.fov]
            # What of a picture does not come from the counts.
            extra = (row.analyzed_at,) if self.shapes else ()  # shapes are in no key
            said = threshold_texts(row.version.bundle_id, self.manifest)
            style = digest(_STYLE, self.longest_px, said, *extra)[:8]
            mark = f"{_MARK} {row_key(row, self.edges)} {style}"
            key = hash((path, mark))
            counts = f"{_MARK} {row_key(row, self.edges)} "
            if not self.new and (path.name not in there or counts in _mark_of(path)):
                continue
            if path.name in there and (key in self._current or mark in _mark_of(path)):
                self._current.add(key)
            elif key not in self._impossible:
                stale.append(_Stale(row, path, mark))
        return stale

    def _draw(self, stale: _Stale, cells: Cells) -> bool:
        """Returns whether it could be drawn."""
        row, field = stale.row, None
        try:
            field = load_field(row.path, row.slide_id, row.fov, row.page)
        except ImageError as error:
            log.debug("no overlay: %s", error)
        if field is None or field.sha256 != row.sha256:
            # The image is gone, or another image has its name and will be counted later. An old picture of
            # the same counts in another style stays.
            if f"{_MARK} {row_key(row, self.edges)} " not in _mark_of(stale.path):
                stale.path.unlink(missing_ok=True)
            return False
        letters = shape_letters(cells, row) if self.shapes else None
        picture = draw(field.image, cells, longest_px=self.longest_px, letters=letters or ())
        picture = with_footer(picture, row, edges=self.edges, manifest=self.manifest, letters=letters)
        buffer = io.BytesIO()
        # In EXIF, too: programs that save a picture again keep that sooner than the comment.
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = OVERLAY_MARK
        mark = stale.mark.encode()
        Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY, comment=mark, exif=exif)
        with replacing(stale.path) as file:
            file.write(buffer.getbuffer())
        return True

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s; the counts are kept", message)


def _mark_of(path: Path) -> str:
    """Returns the head of an overlay with its mark. It is empty for another file and for half a file."""
    if not path.is_file():  # a pipe of that name would block
        return ""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(-2, os.SEEK_END)
            is_whole = file.read() == b"\xff\xd9"
    except OSError:
        return ""
    return head.decode("latin-1") if is_whole else ""


def _tidy(folder: Path, wanted: set[str]) -> set[str]:
    """Removes overlays that are not wanted. Returns the names of those that exist."""
    there = set()
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if entry.name in wanted:
                there.add(entry.name)
            elif entry.name.endswith(OVERLAY_SUFFIX):
                (folder / entry.name).unlink(missing_ok=True)
        remove_left_over(folder)
        if not wanted:
            with suppress(OSError):  # it holds other files
                folder.rmdir()
    return there

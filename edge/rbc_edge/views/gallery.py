"""The pictures inside a page: JPEG as base64 text, so that the page is one file."""

import base64
import io
import re
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
from PIL import Image

from rbc_edge.errors import ImageError
from rbc_edge.store.rows import FieldRow
from rbc_edge.text import one_line, path_text
from rbc_edge.values import Cells, Label
from rbc_edge.views.overlay import draw, group_outlines
from rbc_edge.vision.image_file import load_field

MAX_BYTES: Final = 22_000_000  # all pictures of a page together, as base64
_BYTES_PER_PIXEL: Final = 0.18  # of a picture at _QUALITY, as base64
_QUALITY: Final = 72
_SIDES_PX: Final = (1600, 1280, 960, 800, 640, 560, 480)
_KINDS: Final = {
    Label.RBC_SINGLE: "single",
    Label.RBC_OVERLAPPING: "overlapping",
    Label.WBC: "white",
    Label.PLATELET: "platelet",
}
_EMBEDDED: Final = re.compile(
    rb'data-key="([0-9a-f]{16}-[0-9]+)" src="data:image/jpeg;base64,([A-Za-z0-9+/=]+)"'
)


class EmbeddedPicture(NamedTuple):
    """A JPEG as base64 text, and its size in pixels. The key changes when it must be drawn again."""

    key: str
    base64: str
    width_px: int
    height_px: int


def side_px(n_pictures: int) -> int:
    """Returns the longest side at which this number of pictures fits into a page, pixels."""
    # There are few sizes, so that one more field rarely means that all pictures must be drawn again.
    pixels = MAX_BYTES / max(n_pictures, 1) / _BYTES_PER_PIXEL
    return next((side for side in _SIDES_PX if side * side * 0.75 <= pixels), _SIDES_PX[-1])


def embed(row: FieldRow, key: str, longest_px: int) -> tuple[EmbeddedPicture | None, str]:
    """Makes the picture of a field of view, without its cells, or says why this is not possible."""
    try:
        field = load_field(row.path, row.slide_id, row.fov, row.page)
    except ImageError as error:
        if error.reason == "vanished":
            return None, f"no picture: the image is no longer at {one_line(path_text(row.path))}"
        return None, f"no picture: {one_line(str(error))}"
    if field.sha256 != row.sha256:
        return None, "no picture: the file now holds another image, which the next run counts"
    drawn = draw(field.image, Cells.empty(), longest_px=longest_px)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return EmbeddedPicture(key, text, drawn.shape[1], drawn.shape[0]), ""


def outlines(cells: Cells) -> dict[str, str]:
    """Returns the outlines of a field's cells as paths of SVG, by kind, in pixels of its image.

    They lie over the picture. So they are thin at every size, and a reader can take them away.
    """
    paths: dict[str, list[str]] = {kind: [] for kind in ("group", *_KINDS.values())}
    for contours, (left, upper) in group_outlines(cells, 1):
        for contour in contours:
            points = cv2.approxPolyDP(contour, 1.5, closed=True)[:, 0].tolist()
            paths["group"].append("M" + "L".join(f"{left + x} {upper + y}" for x, y in points) + "z")
    for i, (x0, y0, x1, y1) in enumerate(np.rint(cells.detections.xyxy).astype(int).tolist()):
        label, width, height = cells.label(i), max(x1 - x0, 1), max(y1 - y0, 1)
        if label is Label.WBC:
            path = f"M{x0} {y0}h{width}v{height}h-{width}z"
        else:
            half = f"a{width / 2:g} {height / 2:g} 0 1 0 "
            path = f"M{x0} {(y0 + y1) / 2:g}{half}{width} 0{half}-{width} 0"
        paths[_KINDS[label]].append(path)
    return {kind: "".join(some) for kind, some in paths.items() if some}


def old_pictures(page: Path) -> dict[str, EmbeddedPicture]:
    """Returns the pictures of an old page by their keys, without damaged ones. They can be used again."""
    pictures = {}
    if page.is_file():  # a pipe of that name would block
        for key, text in _EMBEDDED.findall(page.read_bytes()):
            with suppress(ValueError, OSError):
                image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["JPEG"])
                pictures[key.decode()] = EmbeddedPicture(key.decode(), text.decode(), *image.size)
    return pictures

"""The pictures inside a page: JPEG as base64 text, so that the page is one file."""

import base64
import io
import re
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from PIL import Image

from rbc_edge.errors import ImageError
from rbc_edge.store.rows import FieldRow
from rbc_edge.text import one_line, path_text
from rbc_edge.values import Cells
from rbc_edge.views.overlay import draw
from rbc_edge.vision.image_file import load_field

MAX_BYTES: Final = 22_000_000  # all pictures of a page together, as base64
_BYTES_PER_PIXEL: Final = 0.18  # of a picture at _QUALITY, as base64
_QUALITY: Final = 72
_SIDES_PX: Final = (1600, 1280, 960, 800, 640, 560, 480)
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


def embed(row: FieldRow, cells: Cells, key: str, longest_px: int) -> tuple[EmbeddedPicture | None, str]:
    """Draws a field of view, or says why this is not possible."""
    try:
        field = load_field(row.path, row.slide_id, row.fov, row.page)
    except ImageError as error:
        if error.reason == "vanished":
            return None, f"no picture: the image is no longer at {one_line(path_text(row.path))}"
        return None, f"no picture: {one_line(str(error))}"
    if field.sha256 != row.sha256:
        return None, "no picture: the file now holds another image, which the next run counts"
    drawn = draw(field.image, cells, longest_px=longest_px)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return EmbeddedPicture(key, text, drawn.shape[1], drawn.shape[0]), ""


def old_pictures(page: Path) -> dict[str, EmbeddedPicture]:
    """Returns the pictures of an old page by their keys, without damaged ones. They can be used again."""
    pictures = {}
    if page.is_file():  # a pipe of that name would block
        for key, text in _EMBEDDED.findall(page.read_bytes()):
            with suppress(ValueError, OSError):
                image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["JPEG"])
                pictures[key.decode()] = EmbeddedPicture(key.decode(), text.decode(), *image.size)
    return pictures

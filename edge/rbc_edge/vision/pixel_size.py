"""What an image file says about the size of its pixels: OME-XML, ImageJ, resolution with a unit.

Most files say something that is no size on the slide: 72, 96 or 300 dots per inch of a screen, a scanner or a
printer. So a size counts only where a microscope can have it. JPEG says dots per inch alone and is not asked.
"""

import io
import math
import re
from contextlib import suppress
from typing import Any, Final

from PIL import Image

MIN_UM, MAX_UM = 0.01, 2.0  # of a pixel: beyond any objective
_SQUARE: Final = 1.01  # a pixel is not longer than wide by more
_XML: Final = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
_UM: Final = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3, "cm": 1e4, "inch": 25_400.0}
# TIFF 6.0: numbers of tags, and of units.
_DESCRIPTION, _X_RESOLUTION, _Y_RESOLUTION, _UNIT = 270, 282, 283, 296
_UNIT_UM: Final = {2: _UM["inch"], 3: _UM["cm"]}
_PNG_DPI_UM: Final = 25_400.0
_open: Final = Image.open


def pixel_um(data: bytes) -> float:
    """Reads how wide a pixel of a TIFF or PNG file is on the slide, micrometres. NaN: it does not say."""
    x = y = math.nan
    if data.startswith((b"II", b"MM", b"\x89PNG")):
        with suppress(Exception), _open(io.BytesIO(data), formats=["TIFF", "PNG"]) as picture:
            x, y = _of_png(picture.info) if picture.format == "PNG" else _of_tiff(dict(picture.tag_v2))  # type: ignore[attr-defined]
    is_plausible = MIN_UM <= x <= MAX_UM and max(x / y, y / x) <= _SQUARE
    return x if is_plausible else math.nan


def _of_png(info: dict[Any, Any]) -> tuple[float, float]:
    x, y = info["dpi"]
    return _PNG_DPI_UM / x, _PNG_DPI_UM / y


def _of_tiff(tags: dict[int, Any]) -> tuple[float, float]:
    description = str(tags.get(_DESCRIPTION, ""))
    if pixels := _XML.search(description):
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', pixels[0]))
        x, y = (
            float(attributes[f"PhysicalSize{axis}"])
            * _unit_um(attributes.get(f"PhysicalSize{axis}Unit", "um"))
            for axis in "XY"
        )
        return x, y
    unit_um = _UNIT_UM.get(tags.get(_UNIT, 2), math.nan)
    if description.startswith("ImageJ="):
        said = re.search(r"^unit=(.+)$", description, re.MULTILINE)
        unit_um = _unit_um(said[1]) if said else math.nan
    return unit_um / float(tags[_X_RESOLUTION]), unit_um / float(tags[_Y_RESOLUTION])


def _unit_um(unit: str) -> float:
    """Returns a unit in micrometres. The Greek letter comes in many writings. NaN for an unknown unit."""
    plain = re.sub(r"\\u00[bB]5|&#\w+;|&micro;|[^\x00-\x7f]+", "u", unit.strip())
    return _UM.get(plain, math.nan)

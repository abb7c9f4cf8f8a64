"""Images in, model input out: decode, scale, tiles, crops.

This is the only preprocessing in the house. `rbc_train` and `rbc_export` import it, so what a model is
trained on, calibrated on and fed at the station is the same by construction (design, section 2).

Every image in memory is uint8 (H, W, 3), RGB.
"""

import hashlib
import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rbc_edge.errors import ImageError
from rbc_edge.values import FieldOfView, Float32, UInt8

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})

CROP_PX: Final = 64
"""Side of a crop, pixels (Gurav et al. 2025, method step 1)."""

LEAST_CELL_PX: Final = 44.0
"""`view` leaves cells at least this wide: with a margin of a quarter on each side they still fill a crop."""

PAD_VALUE: Final = 114
"""Grey level outside the image, in tiles and crops; the one ultralytics pads with in training."""

PAD_LEAST_PX: Final = 4
"""Least padding on each side of a detector input, pixels."""

STRIDE_PX: Final = 32
"""The detector's coarsest stride: sides of its input are multiples of it."""

SNUG: Final = 1.05
"""How much smaller than wanted a field may be shown, where that saves padding (`snug`)."""

TILE_PX: Final = 640
"""Largest side of one detector input, pixels at model scale."""

TILE_OVERLAP_PX: Final = 128
"""How far neighbouring tiles overlap: more than a white cell (about twice a red cell of 40 px)."""

BACKGROUND_LEVEL: Final = 230.0
"""Grey level that `balance` gives to the glass between the cells."""

_BRIGHT_PERCENTILE: Final = 95
_BALANCE_PIXELS: Final = 20_000  # enough for a percentile
_GAIN_RANGE: Final = (0.6, 4.0)
_MIN_SIDE_PX: Final = 16
_JPEG_BLOCK: Final = 8
_LINEAR: Final = cv2.INTER_LINEAR_EXACT  # INTER_LINEAR rounds otherwise on Arm
_LITTLE: Final = 1.6  # two pixels, of which a linear resize takes the mean, are not far apart then
_FORMATS: Final = ("JPEG", "PNG", "BMP", "TIFF")
_TIFF_SIGNATURES: Final = (b"II*\0", b"MM\0*")
_SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", *_TIFF_SIGNATURES, b"II+\0", b"MM\0+")
_MOST_BYTES_A_PIXEL: Final = 8  # 16 bits, four channels, not compressed
_BLOCK_ROWS: Final = 256
LARGE_PIXELS: Final = 8_000_000
"""From here on an image is handled with an eye on memory rather than on time."""
# TIFF 6.0, section 8: numbers of tags, and of the kinds of pixel.
_BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLES_TAG, _PLANAR_TAG = 258, 262, 277, 284
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_SEPARATE_PLANES: Final = 2
_CAPTURE_TAGS: Final = (ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTime)

# Cameras' files are checked against our own limit, from the header, before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# What OpenCV has to say of a broken file stands in the file's row, not across the progress bar.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Kept from before anybody imports ultralytics, whose own `Image.open` tries to install a HEIC reader on
# whatever is not an image, and fails with another error than Pillow's.
_open: Final = Image.open


def load_field(
    path: Path,
    slide_id: str,
    fov: str,
    *,
    max_megapixels: float = 250.0,
    cell_diameter_px: float = math.nan,
) -> FieldOfView:
    """Reads and decodes one image file.

    The file is read once; the hash is of exactly the bytes that were decoded.

    Args:
        path: The image file.
        slide_id: The slide it belongs to.
        fov: Its name within the slide.
        max_megapixels: Larger images are refused from their header, before any memory is taken.
        cell_diameter_px: Diameter of a red cell, pixels of the field: a JPEG is decoded at a half, a quarter
            or an eighth of its size where its `view` is no larger, in half the time and a fraction of the
            memory. NaN: decoded in full.

    Returns:
        The field of view, uint8 (H, W, 3) RGB, EXIF rotation applied.

    Raises:
        ImageError: With reason ``vanished``, ``unreadable``, ``empty``, ``not-an-image``, ``truncated``,
            ``too-large``, ``too-small`` or ``unsupported``.
    """
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            # Before it is read: a camera that went mad, or a sparse file, must not take all memory.
            if n_bytes > max_megapixels * 1e6 * _MOST_BYTES_A_PIXEL:
                raise ImageError(
                    "too-large",
                    f"{path}: {n_bytes / 1e6:.0f} MB is more than {max_megapixels:g} megapixels can take",
                    "save one field of view as one image",
                )
            data = file.read()
    except FileNotFoundError as error:
        raise ImageError("vanished", f"{path}: the file is gone", "was it moved while we worked?") from error
    except OSError as error:
        raise ImageError(
            "unreadable", f"{path}: cannot be read: {error.strerror or error}", "check its permissions"
        ) from error
    image, captured_at, size = _decode(data, str(path), max_megapixels, _shrinks(cell_diameter_px))
    is_smaller = size != (image.shape[1], image.shape[0])
    digest = hashlib.sha256(data).hexdigest()
    return FieldOfView(slide_id, fov, digest, image, captured_at, *size, data if is_smaller else b"")


def full_size(field: FieldOfView) -> UInt8:
    """Returns a field's image as the camera took it, uint8 (H, W, 3) RGB, if need be decoded again.

    Raises:
        ImageError: `too-large` where it does not fit into memory.
    """
    return decode(field.file, field.fov)[0] if field.file else field.image


def n_pixels(path: Path, cell_diameter_px: float) -> int:
    """Tells from a file's header how many pixels `load_field` would decode; 0 where that cannot be told."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        with _open(path, formats=_FORMATS) as picture:
            _draft(picture, _shrinks(cell_diameter_px))
            return int(picture.width * picture.height)
    return 0


def decode(data: bytes, name: str, *, max_megapixels: float = 250.0) -> tuple[UInt8, str]:
    """Decodes an image file's bytes to its end, or says why not.

    Pillow decodes, because it looks at the header first and makes truncation an error; 16-bit images go
    through OpenCV, because Pillow clips or cuts them. 16-bit values are stretched from the image's own
    range to 8 bits (a 12-bit camera fills a sixteenth of the range).

    Args:
        data: The file's bytes.
        name: What to call it in messages.
        max_megapixels: Larger images are refused from their header.

    Returns:
        The image, uint8 (H, W, 3) RGB with EXIF rotation applied, and its ISO 8601 capture time or "".

    Raises:
        ImageError: See `load_field`.
    """
    return _decode(data, name, max_megapixels, 1)[:2]


def _decode(data: bytes, name: str, max_megapixels: float, shrink: int) -> tuple[UInt8, str, tuple[int, int]]:
    """Decodes at 1 / `shrink` of the size if that is easy; returns width and height of the whole, too."""
    if not data:
        raise ImageError("empty", f"{name}: the file is empty", "was it still being written?")
    with warnings.catch_warnings():
        # Pillow's remarks on odd EXIF and TIFF tags are not the user's concern.
        warnings.simplefilter("ignore")
        try:
            picture = _open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError as error:
            if _has_tiff_directory(data):
                raise ImageError(
                    "unsupported",
                    f"{name}: a kind of TIFF that cannot be read",
                    "save it with 8 or 16 bits in grey or RGB; if it is saved so, copy it again",
                ) from error
            if data.startswith(_SIGNATURES):  # a TIFF's directory may stand at its end
                raise ImageError(
                    "truncated", f"{name}: the image is cut short or damaged", "copy it again"
                ) from error
            raise ImageError(
                "not-an-image",
                f"{name}: not a JPEG, PNG, BMP or TIFF image",
                "is it another kind of file with an image's name?",
            ) from error
        except Exception as error:
            raise ImageError(
                "truncated", f"{name}: the header is broken: {error}", "copy it again"
            ) from error
        width, height = picture.size
        if width * height > max_megapixels * 1e6:
            raise ImageError(
                "too-large",
                f"{name}: {width}x{height} is more than {max_megapixels:g} megapixels",
                "cut it into fields of view",
            )
        if min(width, height) < _MIN_SIDE_PX:
            raise ImageError("too-small", f"{name}: {width}x{height} pixels is too small for a field of view")
        try:
            is_deep = _is_deep(picture)  # before the capture time: looking for EXIF loads a PNG
            captured_at = _captured_at(picture)
            _draft(picture, shrink)
            drafted = picture.size
            rgb = _sixteen_bit(data, picture, name) if is_deep else _eight_bit(picture)
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError("too-large", f"{name}: {width}x{height} does not fit into memory") from error
        except Exception as error:
            raise ImageError(
                "truncated", f"{name}: the image is cut short or damaged: {error}", "copy it again"
            ) from error
    is_turned = (rgb.shape[1], rgb.shape[0]) != drafted  # by its EXIF
    return rgb, captured_at, (height, width) if is_turned else (width, height)


def _draft(picture: Image.Image, shrink: int) -> None:
    """Has a JPEG decoded at a half, a quarter or an eighth of its size, not less than 1 / `shrink`.

    It takes the lower frequencies of each block and no others. Other formats are decoded in full; so is what
    EXIF turns, unless its sides are whole at any size: a pixel that is not whole lies at the right or below.
    """
    if shrink == 1 or picture.format not in ("JPEG", "MPO"):
        return
    is_whole = picture.width % _JPEG_BLOCK == picture.height % _JPEG_BLOCK == 0
    if is_whole or picture.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        picture.draft(None, (max(1, picture.width // shrink), max(1, picture.height // shrink)))


def _has_tiff_directory(data: bytes) -> bool:
    """Whether the first directory of a TIFF file is there as a whole (TIFF 6.0, section 2)."""
    if not data.startswith(_TIFF_SIGNATURES):
        return False
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", data, start)
    except struct.error:
        return False
    return bool(start >= 8 and n_entries > 0 and start + 2 + 12 * n_entries + 4 <= len(data))


def _is_deep(picture: Image.Image) -> bool:
    """Whether the file holds more than 8 bits a channel (Pillow tells only for grey and TIFF)."""
    if picture.mode.startswith(("I", "F")):
        return True
    bits = getattr(picture, "tag_v2", {}).get(_BITS_TAG, ())
    if any(b > 8 for b in (bits if isinstance(bits, tuple) else (bits,))):
        return True
    # A 16-bit colour PNG opens as plain RGB; the depth stands in byte 24 of the file (PNG spec, 11.2.2).
    pieces = getattr(picture, "tile", []) if picture.format == "PNG" else []
    return bool(pieces) and "16" in str(pieces[0][3])


def _eight_bit(picture: Image.Image) -> UInt8:
    picture.load()  # raises on a truncated file; verify() does not
    # No copy that is not needed: each takes 80 MB of a 20-megapixel field.
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "P" or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        # What lies under full transparency is arbitrary: show it on white, as a viewer does.
        rgba = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.new("RGB", rgba.size, (255, 255, 255))
        picture.paste(rgba, mask=rgba)
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    if rgb.width * rgb.height < LARGE_PIXELS:
        return np.asarray(rgb, dtype=np.uint8)
    # Strip by strip: np.asarray(picture) holds all pixels twice more for a moment, 120 MB of 20 megapixels.
    image = np.empty((rgb.height, rgb.width, 3), np.uint8)
    for y in range(0, rgb.height, _BLOCK_ROWS):
        image[y : y + _BLOCK_ROWS] = np.asarray(rgb.crop((0, y, rgb.width, min(y + _BLOCK_ROWS, rgb.height))))
    return image


def _sixteen_bit(data: bytes, picture: Image.Image, name: str) -> UInt8:
    # Of TIFF files both decoders apply the orientation themselves, whatever they are told.
    turned = picture.format == "TIFF"
    kind = _deep_kind(picture, name)
    orientation = 1 if turned else picture.getexif().get(ExifTags.Base.Orientation, 1)
    picture.load()  # cv2 returns half an image silently; Pillow raises
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        if not picture.mode.startswith(("I", "F")):  # of colour Pillow gives the upper bytes only
            raise ImageError(
                "unsupported" if turned else "truncated",
                f"{name}: its 16-bit pixels cannot be read, or are not all there",
                "copy it again, or save it with 8 bits",
            )
        pixels = np.asarray(picture)
    elif pixels.ndim == 3:
        if pixels.shape[2] == 4:
            pixels = pixels[:, :, :3]
        pixels = pixels[:, :, ::-1]
    if kind == _WHITE_IS_ZERO:  # neither decoder turns 16 bits round
        if pixels.dtype != np.uint16:
            raise ImageError("unsupported", f"{name}: white is zero in it", "save it with black as zero")
        pixels = 65535 - pixels
    scaled = _stretched(pixels, name)
    if scaled.ndim == 2:
        scaled = np.repeat(scaled[:, :, None], 3, axis=2)
    upright = Image.fromarray(np.ascontiguousarray(scaled))
    if orientation != 1:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        upright.info["exif"] = exif.tobytes()
        upright = ImageOps.exif_transpose(upright)
    return np.asarray(upright, dtype=np.uint8)


def _deep_kind(picture: Image.Image, name: str) -> int:
    """Returns what a deep image's pixels mean; refuses what both decoders are known to read wrongly."""
    tags = getattr(picture, "tag_v2", {})
    kind = int(tags.get(_PHOTOMETRIC_TAG, _BLACK_IS_ZERO))
    if kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        raise ImageError(
            "unsupported", f"{name}: 16 bits, but neither grey nor RGB", "save it as grey or RGB"
        )
    if tags.get(_SAMPLES_TAG, 1) > 1 and tags.get(_PLANAR_TAG, 1) == _SEPARATE_PLANES:
        raise ImageError(
            "unsupported",
            f"{name}: 16-bit colour in separate planes",
            "save its channels interleaved (planar configuration: contiguous)",
        )
    return kind


def _stretched(pixels: npt.NDArray[Any], name: str) -> UInt8:
    """Stretches deep pixels to 8 bits: black stays where it is, the brightest thousandth becomes white.

    A percentile, not the extreme: one hot pixel must not darken the field. Black stays, so that an evenly
    bright field is not stretched into noise.
    """
    out = np.empty(pixels.shape, np.uint8)
    blocks = [slice(y, y + _BLOCK_ROWS) for y in range(0, len(pixels), _BLOCK_ROWS)]
    if pixels.dtype == np.uint16:
        # By a table, block by block: a copy in floats takes 240 MB of a 20-megapixel field.
        seen = sum(
            (np.bincount(pixels[rows].ravel(), minlength=65536) for rows in blocks), np.zeros(65536, np.int64)
        )
        brightest = int(np.searchsorted(np.cumsum(seen), 0.999 * pixels.size))
        table = np.clip(np.arange(65536) * (255.0 / max(brightest, 1e-6)), 0, 255).astype(np.uint8)
        for rows in blocks:
            out[rows] = table[pixels[rows]]
        return out
    values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        raise ImageError("unsupported", f"{name}: holds values that are not numbers", "save it with 16 bits")
    top = float(np.percentile(values, 99.9))
    bottom = min(0.0, float(values.min()))
    for rows in blocks:
        out[rows] = np.clip((values[rows] - bottom) * (255.0 / max(top - bottom, 1e-6)), 0, 255)
    return out


def _captured_at(picture: Image.Image) -> str:
    """Returns the EXIF capture time as ISO 8601, or "" (camera time: no zone is known)."""
    try:
        exif = picture.getexif()
        tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    except Exception:  # noqa: BLE001  a broken EXIF block must not cost the image
        return ""
    for tag in _CAPTURE_TAGS:
        text = str(tags.get(tag, "")).strip("\0 ")
        date, _, time = text.partition(" ")
        try:
            moment = datetime.strptime(f"{date} {time}", "%Y:%m:%d %H:%M:%S")
        except ValueError:  # a clock that was never set says 0000:00:00
            continue
        return moment.isoformat()
    return ""


def balance(image: UInt8) -> UInt8:
    """Makes the background of a field neutral and bright, whatever the lamp, the stain and the exposure.

    A gain for each channel brings the field's bright level (the glass between the cells) to
    `BACKGROUND_LEVEL`. What light and colour then still change, ``python -m rbc_train disturb`` prints.

    Args:
        image: uint8 (H, W, 3) RGB.

    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // _BALANCE_PIXELS))
    level = np.array(percentile(image[::step, ::step], _BRIGHT_PERCENTILE))
    # A black field has no background to go by: its noise must not become cells.
    gain = np.clip(BACKGROUND_LEVEL / np.maximum(level, 1.0), *_GAIN_RANGE)
    table = np.clip(np.arange(256)[:, None] * gain + 0.5, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table[None]), dtype=np.uint8)


def percentile(image: UInt8, percent: float) -> list[float]:
    """What np.percentile gives for each channel of uint8 (H, W, C), by counting instead of sorting."""
    image = np.ascontiguousarray(image)
    rank = percent / 100 * (image.shape[0] * image.shape[1] - 1)
    ranks = [math.floor(rank), math.ceil(rank)]
    levels = []
    for channel in range(image.shape[2]):
        seen = cv2.calcHist([image], [channel], None, [256], [0, 256])
        # In int64: from 2^24 pixels on single precision would not see one more.
        low, high = np.searchsorted(seen.astype(np.int64).cumsum(), ranks, side="right").tolist()
        levels.append(low + (high - low) * (rank - ranks[0]))
    return levels


def rescale(image: UInt8, factor: float) -> UInt8:
    """Resizes an image by one factor on both axes.

    Args:
        image: uint8 (H, W, 3).
        factor: New size over old size, > 0.

    Returns:
        uint8 (round(H * factor), round(W * factor), 3), at least 1x1; the image itself for factor 1.
    """
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    if size == (width, height):
        return image
    # Area averaging keeps thin gaps between cells when shrinking; a little shrinking does without, in a third
    # of the time; it has no meaning when enlarging.
    how = cv2.INTER_AREA if factor * _LITTLE < 1 else _LINEAR if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=how), dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What the networks are shown of a field: its light balanced, and shrunk where its cells are large.

    Attributes:
        image: uint8 (h, w, 3) RGB.
        plain: uint8 (h, w, 3) RGB, the same before its light was balanced.
        px: float32 (4,), pixels of the field in a pixel of the view, for x, y, x, y.
        size: Width and height of the field, pixels.
    """

    image: UInt8
    plain: UInt8
    px: Float32
    size: tuple[int, int]

    def shown_px(self, length_px: float) -> float:
        """Returns a length of the field, pixels of the field, in pixels of the view."""
        return length_px / float(np.sqrt(self.px[0] * self.px[1]))


def view(image: UInt8, cell_diameter_px: float, *, size: tuple[int, int] | None = None) -> View:
    """Balances a field (`balance`), and shrinks it by a whole number if its cells are far larger than needed.

    The mean of 2x2 pixels is a cheap first step, and all that follows (light, resizing, crops) has a quarter
    of the work. Cells keep at least `LEAST_CELL_PX`, so both networks still see them shrunk, not enlarged.
    What was decoded small (`load_field`) has a part of that behind it.

    Args:
        image: uint8 (H, W, 3) RGB, the field of view.
        cell_diameter_px: Diameter of a red cell in it, pixels; NaN: nobody knows, nothing is shrunk.
        size: Width and height of the field, pixels, where `image` was decoded at a part of them.

    Returns:
        The view, about H / k by W / k pixels.
    """
    width, height = (image.shape[1], image.shape[0]) if size is None else size
    # How many times smaller it was decoded. What is left over at the right and below has a pixel of its own.
    k = 2 ** round(math.log2(width / image.shape[1]))
    left = _shrinks(cell_diameter_px) / k
    small = rescale(image, 1 / left) if left > 1 else image
    px = np.array([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]] * 2, np.float32) * k
    return View(balance(small), small, px, (width, height))


def _shrinks(cell_diameter_px: float) -> int:
    """How many times smaller a field may be shown."""
    return 1 if math.isnan(cell_diameter_px) else max(1, int(cell_diameter_px // LEAST_CELL_PX))


@dataclass(frozen=True, slots=True)
class Tile:
    """One window of a field at model scale. All numbers are pixels at model scale.

    Attributes:
        x0: Left of the window.
        y0: Top of the window.
        x1: Right of the window, exclusive.
        y1: Bottom of the window, exclusive.
        core: x0, y0, x1, y1 of the part whose cells (by their centre) belong to this tile. The cores of
            a field's tiles cover it without overlap; at the field's border a core reaches to infinity.
    """

    x0: int
    y0: int
    x1: int
    y1: int
    core: tuple[float, float, float, float]


def tiles(
    width: int, height: int, *, tile_px: int = TILE_PX, overlap_px: int = TILE_OVERLAP_PX
) -> Iterator[Tile]:
    """Cuts a field into windows that overlap; a field that fits into one is one.

    Args:
        width: Width of the scaled field, pixels.
        height: Height of the scaled field, pixels.
        tile_px: Largest side of a window.
        overlap_px: Least overlap of neighbouring windows.

    Yields:
        Tiles in reading order, of nearly equal size.
    """
    columns = _intervals(width, tile_px, overlap_px)
    for y0, y1, core_y0, core_y1 in _intervals(height, tile_px, overlap_px):
        for x0, x1, core_x0, core_x1 in columns:
            yield Tile(x0, y0, x1, y1, (core_x0, core_y0, core_x1, core_y1))


def _intervals(length: int, tile_px: int, overlap_px: int) -> list[tuple[int, int, float, float]]:
    if length <= tile_px:
        return [(0, length, -math.inf, math.inf)]
    n = math.ceil((length - overlap_px) / (tile_px - overlap_px))
    # As many windows as it takes, and none larger than it takes: what two see is looked at twice.
    size = math.ceil((length + (n - 1) * overlap_px) / n)
    size = min(tile_px, _padded(size) - 2 * PAD_LEAST_PX)
    starts = [round(i * (length - size) / (n - 1)) for i in range(n)]
    # Neighbours meet in the middle of what both see.
    seams = [(a + size + b) / 2 for a, b in pairwise(starts)]
    lows = [-math.inf, *seams]
    highs = [*seams, math.inf]
    return [(s, s + size, lo, hi) for s, lo, hi in zip(starts, lows, highs, strict=True)]


def snug(width: int, height: int, factor: float) -> float:
    """Gives up a little of a resizing factor where the detector's input then is a stride smaller.

    A field 253 pixels wide takes an input of 288, one of 248 an input of 256: a fifth of the pixels, and of
    the detector's time, would be padding. The detector does not feel a few per cent of scale.

    Args:
        width: Width of the field, pixels.
        height: Height of the field, pixels.
        factor: New size over old size that is wanted, > 0.

    Returns:
        The factor between ``factor / SNUG`` and `factor` that gives the fewest input pixels, and of those the
        largest. Of fields that do not fit into one tile, `factor`.

    >>> round(snug(640, 480, 40 / 101.1), 4), round(snug(640, 480, 0.38), 4)
    (0.3833, 0.38)
    """
    if max(width, height) * factor > TILE_PX:
        return factor

    def input_pixels(f: float) -> int:
        return _padded(max(1, round(width * f))) * _padded(max(1, round(height * f)))

    # Those at which a side fills an input that is a stride smaller to the last pixel.
    tight = [
        (_padded(round(side * factor)) - STRIDE_PX - 2 * PAD_LEAST_PX) / side for side in (width, height)
    ]
    candidates = [factor, *(f for f in tight if factor / SNUG <= f < factor)]
    return min(candidates, key=lambda f: (input_pixels(f), -f))


def at_model_scale(image: UInt8, factor: float) -> UInt8:
    """Resizes a field, uint8 (H, W, 3), by about a factor (`snug`): what the detector's input is cut from."""
    return rescale(image, snug(image.shape[1], image.shape[0], factor))


def _padded(side: int, stride: int = STRIDE_PX) -> int:
    """The side of a detector input that holds so many pixels of a field."""
    return -(-(side + 2 * PAD_LEAST_PX) // stride) * stride


def pad_to_stride(image: UInt8, stride: int = STRIDE_PX) -> tuple[UInt8, int, int]:
    """Pads an image on all sides, by at least `PAD_LEAST_PX`, to sides that are multiples of `stride`.

    In training every photograph lies in grey. A cell that the image border cuts is seen as one only with
    some grey beyond the cut; padded on two sides alone, the error of the count was a tenth larger.

    Args:
        image: uint8 (H, W, 3).
        stride: The detector's coarsest stride, pixels.

    Returns:
        uint8 (H', W', 3) with H' and W' multiples of `stride`, the padding `PAD_VALUE`; and how many
        columns on the left and rows on top are padding.
    """
    height, width = image.shape[:2]
    down, right = _padded(height, stride) - height, _padded(width, stride) - width
    top, left = down // 2, right // 2
    padded = cv2.copyMakeBorder(
        image, top, down - top, left, right - left, cv2.BORDER_CONSTANT, value=(PAD_VALUE,) * 3
    )
    return np.asarray(padded, dtype=np.uint8), left, top


def crops(image: UInt8, xyxy: Float32, *, margin: float, size_px: int = CROP_PX) -> UInt8:
    """Cuts each box out of the field, with a margin, and resizes it to a square.

    Whether background lies around a cell is seen outside its box: hence the margin. Width and height
    are stretched apart; what lies outside the field is `PAD_VALUE`.

    Args:
        image: uint8 (H, W, 3), the field of view.
        xyxy: float32 (N, 4), pixels of the field.
        margin: Share of the box's side that is added on each of its four sides.
        size_px: Side of a crop, pixels.

    Returns:
        uint8 (N, size_px, size_px, 3).
    """
    out = np.empty((len(xyxy), size_px, size_px, 3), np.uint8)
    height, width = image.shape[:2]
    grow = (xyxy[:, 2:] - xyxy[:, :2]) * margin
    low = np.floor(xyxy[:, :2] - grow).astype(np.int64)
    high = np.ceil(xyxy[:, 2:] + grow).astype(np.int64)
    high = np.maximum(high, low + 1)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        window = image[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            if window.size == 0:
                out[i] = PAD_VALUE
                continue
            top, left = max(-y0, 0), max(-x0, 0)
            bottom, right = (y1 - y0) - top - window.shape[0], (x1 - x0) - left - window.shape[1]
            padded = cv2.copyMakeBorder(
                window, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(PAD_VALUE,) * 3
            )
            window = np.asarray(padded, np.uint8)
        shrinks = max(window.shape[:2]) > _LITTLE * size_px
        how = cv2.INTER_AREA if shrinks else _LINEAR
        cv2.resize(window, (size_px, size_px), dst=out[i], interpolation=how)
    return out

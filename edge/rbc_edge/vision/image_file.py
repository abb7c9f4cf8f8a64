"""Image files in, pixels out: decoded to the end, upright, 8 bits, or a reason why not.

Every image in memory is uint8 (H, W, 3), RGB. Importing this changes no setting of the host program.
"""

import ctypes
import errno
import hashlib
import io
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from rbc_edge.errors import ImageError
from rbc_edge.text import IMAGE_SUFFIXES
from rbc_edge.values import Decoded, FieldOfView, Float32, UInt8
from rbc_edge.vision import integrity
from rbc_edge.vision.pixel_size import pixel_um

MIN_CELL_PX: Final = 44.0  # so wide a cell, with a margin of a quarter, still fills a crop
LARGE_PIXELS: Final = 8_000_000  # from this size on an image is handled to save memory, not time
MIN_SIDE_PX: Final = 16  # images with a shorter side are no fields of view
OVERLAY_MARK: Final = "rbc-edge overlay"  # begins the comment, or EXIF's Software, of a picture that we drew

_JPEG_BLOCK: Final = 8
_FORMATS: Final = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_TIFF_SIGNATURES: Final = (b"II*\0", b"MM\0*")
_SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", *_TIFF_SIGNATURES, b"II+\0", b"MM\0+")
_MAX_BYTES_A_PIXEL: Final = 8  # 16 bits, four channels, not compressed
_MAX_NOTE_BYTES: Final = 64_000_000  # what a camera may add to its pixels: a preview, a sound, a film
# What decoding takes at its peak, for each pixel (measured): 8 bits of red, green and blue, 8 bits of another
# kind, more than 8 bits. And what may be taken for each megapixel of the limit.
_RGB_COST, _OTHER_COST, _DEEP_COST = 7, 12, 24
_BUDGET: Final = 4_000_000
_BLOCK_ROWS: Final = 256
# TIFF 6.0, section 8: numbers of tags, of the kinds of pixel, and of a planar configuration.
_BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLES_TAG, _PLANAR_TAG = 258, 262, 277, 284
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_PAGE_TAG, _DESCRIPTION_TAG = 254, 270
_NO_FIELD: Final = 0b101  # a page that is a smaller version or a mask of another
# What ImageJ (lines) and OME (XML) write into the first page's description.
_N_CHANNELS: Final = re.compile(r'^channels=(\d+)|\bSizeC="(\d+)"', re.MULTILINE)
_N_PLANES: Final = re.compile(r'^slices=(\d+)|\bSizeZ="(\d+)"', re.MULTILINE)
# What says that a file's one list of pages names fewer images than are in it: ImageJ from 4 GB on, tifffile.
_N_IMAGES: Final = re.compile(r"^images=(\d+)|^\{(?=.*\"truncated\": true)()", re.MULTILINE)
_MAX_PAGES: Final = 1000
_GREY: Final = ("L", "I;16", "I;16B")
# Two pages show one place if their details correlate so well, in a small version. Of photographs, two fields
# reach 0.3, by dust on the camera, and one field in two planes of focus 0.7 to 1.
_SAME_PLACE: Final = 0.5
_SAME_SHOT: Final = 0.9
_SMALL_PX: Final = 256
_ASPECT: Final = 0.02  # two formats of a shot may differ so much in width by height
_SEPARATE_PLANES: Final = 2
_CAPTURE_TAGS: Final = (ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTime)
_HEIF_SUFFIXES: Final = frozenset({".heic", ".heif", ".hif"})
_HEIF: Final = "pillow_heif"  # the library of the extra `heic`
_HEIF_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AGAIN: Final = "copy it again"
_OTHER_KIND: Final = "save it as a usual JPEG, PNG or TIFF with 8 bits"

# Kept from before ultralytics replaces `Image.open` by one that fails with other errors.
_open: Final = Image.open


def read_suffixes() -> frozenset[str]:
    """Returns the endings of files that are read here, lower case: WebP as Pillow can, HEIC by an extra."""
    found = IMAGE_SUFFIXES | _HEIF_SUFFIXES if find_spec(_HEIF) else IMAGE_SUFFIXES
    return found if features.check("webp") else found - {".webp"}


def load_field(
    path: Path,
    slide_id: str,
    fov: str,
    page: int = 0,
    *,
    max_megapixels: float = 250.0,
    cell_diameter_px: float = math.nan,
) -> FieldOfView:
    """Reads and decodes one image file, or a page of one, EXIF rotation applied.

    `page` counts the pages of full size from 1 (`n_fields`). 0 stands for a file that is one field. The file
    is read once. The hash is of exactly the bytes that are decoded (`content_id`). Images of more than
    `max_megapixels` are refused from their header, before any memory is taken, and so are images that would
    take more than four bytes for each pixel of that limit: 250 megapixels stand for 1 GB. With a diameter
    (of a red cell, pixels of the field) a JPEG of large cells is decoded at a half, a quarter or an eighth of
    its size, in half the time and a fraction of the memory. NaN: decoded in full.

    Raises `ImageError` with reason ``vanished``, ``unreadable``, ``empty``, ``not-an-image``, ``truncated``,
    ``too-large``, ``too-small``, ``overlay`` or ``unsupported``.
    """
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            # Before it is read: a damaged or a sparse file must not take all memory.
            if n_bytes > max_megapixels * 1e6 * _MAX_BYTES_A_PIXEL:
                what = f"{n_bytes / 1e6:.0f} MB is more than {max_megapixels:g} megapixels can take"
                raise ImageError("too-large", f"{path}: {what}", "save one field of view as one image")
            _check_size(file, n_bytes, path)
            data = file.read()
    except FileNotFoundError as error:
        raise ImageError("vanished", f"{path}: the file is gone", "was it moved while we worked?") from error
    except OSError as error:
        what = f"{path}: cannot be read: {error.strerror or error}"
        broken = error.errno == errno.EIO
        advice = "the disk or the card may be broken: copy it again" if broken else "check its permissions"
        raise ImageError("unreadable", what, advice) from error
    decoded, captured_at = _decode(data, str(path), max_megapixels, max_reduction(cell_diameter_px), page)
    content = content_id(hashlib.sha256(data).hexdigest(), page)
    with _lifted:
        um_per_px = pixel_um(data)
    return FieldOfView(slide_id, fov, content, decoded, captured_at, um_per_px)


def content_id(sha256: str, page: int) -> str:
    """Returns what tells a field's content: its file's hash, and after a # which page of the file it is."""
    return f"{sha256}#{page}" if page and sha256 else sha256


def n_fields(path: Path) -> int:
    """Reads from a TIFF's list of pages how many fields of view it holds. 1 where that cannot be read.

    No pixels are decoded: nothing in a file can end the process here.
    """
    with _lifted, suppress(Exception), _open(path, formats=["TIFF"]) as picture:
        fields, is_together = _fields(picture, "")
        return 1 if is_together else len(fields)
    return 1


def _check_size(file: BinaryIO, n_bytes: int, path: Path) -> None:
    """Raises `ImageError` for a large file whose header is of no image, or of too few pixels for its size."""
    if n_bytes <= _MAX_NOTE_BYTES:
        return
    head = file.read(12)
    if not head.startswith((*_SIGNATURES, b"BM", b"RIFF")):
        raise _not_opened(head, str(path))
    width = height = 0
    with _lifted, suppress(Exception), _open(file, formats=_FORMATS) as picture:
        if picture.format != "TIFF":  # that may have many pages
            width, height = picture.size
    if width and n_bytes > width * height * _MAX_BYTES_A_PIXEL + _MAX_NOTE_BYTES:
        what = f"{path}: {n_bytes / 1e6:.0f} MB is too much for {width}x{height} pixels"
        raise ImageError("too-large", what, "is it damaged? copy it again")
    file.seek(0)


def full_size(field: FieldOfView) -> UInt8:
    """Returns a field's image in full, uint8 (H, W, 3) RGB, decoded again if it is reduced.

    Raises `ImageError` with reason ``too-large`` where it does not fit into memory.
    """
    return field.image if field.decoded.reduction == 1 else decode(field.decoded.file, field.fov)[0]


def max_reduction(cell_diameter_px: float) -> int:
    """Returns how many times smaller a field may be shown. 1 for NaN."""
    return 1 if math.isnan(cell_diameter_px) else max(1, int(cell_diameter_px // MIN_CELL_PX))


def are_alike(one: FieldOfView, other: FieldOfView) -> bool:
    """Tells whether two fields are the same shot, in whatever size and format."""
    if abs(one.width_px * other.height_px / (one.height_px * other.width_px) - 1) > _ASPECT:
        return False
    a, b = (_details(np.asarray(Image.fromarray(each.decoded.pixels).convert("L"))) for each in (one, other))
    return float((a * cv2.resize(b, a.shape[::-1])).mean()) > _SAME_SHOT


def n_pixels(path: Path, cell_diameter_px: float) -> int:
    """Reads from a file's header how many pixels `load_field` decodes. 0 where that is not known."""
    with _lifted, suppress(Exception), path.open("rb") as file, _opened(file) as picture:
        _draft(picture, max_reduction(cell_diameter_px))
        return int(picture.width * picture.height)
    return 0


def decode(data: bytes, name: str, *, max_megapixels: float = 250.0) -> tuple[UInt8, str]:
    """Decodes an image file's bytes to the end, or says why it cannot.

    Pillow decodes, because it reads the header first and makes truncation an error. What it shows of a
    damaged file without a word is refused before (`integrity`). 16-bit images go through OpenCV, because
    Pillow clips or cuts them. 16-bit values are stretched from the image's own range to 8 bits (a 12-bit
    camera fills a sixteenth of the range). A TIFF with several pages is its one page of full size, or its
    three pages of channels. Where each page is a field of its own, `load_field` reads them.

    `name` stands for the file in messages. Limits and errors are those of `load_field`. Returns the image,
    uint8 (H, W, 3) RGB with EXIF rotation applied, and its ISO 8601 capture time or "".
    """
    decoded, captured_at = _decode(data, name, max_megapixels, 1, 0)
    return decoded.pixels, captured_at


@cache
def _set_tiff_handler() -> Callable[[int | None], int | None]:
    """Returns the function of Pillow's libtiff that sets who is told of errors. It returns the one before."""
    maps = Path("/proc/self/maps")  # the library has another name in each release of Pillow
    with suppress(OSError, AttributeError, StopIteration):
        loaded = (line.split(None, 5)[-1] for line in maps.read_text("utf-8", "surrogateescape").splitlines())
        name = next(path for path in loaded if path.rpartition("/")[2].startswith("libtiff"))
        function = ctypes.CDLL(name).TIFFSetErrorHandler
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        return cast(Callable[[int | None], int | None], function)
    return lambda handler: handler


class _PillowLimits:
    """Lifts Pillow's limit of pixels and silences it, and its libtiff, while one of our images is read.

    Our own limit is checked on the header, and an error of libtiff is one of ours as well. The settings
    belong to the whole process, and images are read in several threads. The first reader changes them and the
    last one restores them. If each reader restored what it found, they would stay changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_readers = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_readers:
                self._max_pixels, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")  # odd tags of EXIF and TIFF
                self._tiff_handler = _set_tiff_handler()(None)
            self._n_readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_readers -= 1
            if not self._n_readers:
                _set_tiff_handler()(self._tiff_handler)
                self._filters.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = self._max_pixels


_lifted: Final = _PillowLimits()


def _decode(data: bytes, name: str, max_megapixels: float, reduction: int, page: int) -> tuple[Decoded, str]:
    """Decodes at 1 / `reduction` of the size or larger. Returns the capture time as well."""
    if not data:
        raise ImageError("empty", f"{name}: the file is empty", "was it still being written?")
    with _lifted:
        try:
            picture = _opened(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise _not_opened(data, name) from error
        except Exception as error:
            raise ImageError("truncated", f"{name}: the header is broken: {error}", _AGAIN) from error
        if _is_overlay(picture):
            advice = "only the image that it shows is counted"
            raise ImageError("overlay", f"{name}: a picture that rbc-edge drew", advice)
        pages, neighbours = _pages(picture, name, page)
        width, height = picture.size
        if width * height > max_megapixels * 1e6:
            what = f"{name}: {width}x{height} is more than {max_megapixels:g} megapixels"
            raise ImageError("too-large", what, "cut it into fields of view")
        if min(width, height) < MIN_SIDE_PX:
            raise ImageError("too-small", f"{name}: {width}x{height} pixels is too small for a field of view")
        try:
            is_deep = _is_deep(picture)  # before it is loaded
            reduced = _draft(picture, reduction)
            drafted = picture.size
            if _cost_bytes(picture, width * height, is_deep=is_deep) > max_megapixels * _BUDGET:
                what = f"{name}: {width}x{height} pixels of this kind take too much memory"
                raise ImageError(
                    "too-large", what, "cut it into fields of view, or save it with 8 bits as RGB"
                )
            _refuse_one_place(picture, pages, neighbours, name)
            for at in pages[::-1]:
                _turn_to(picture, at)
                _refuse_broken(data, picture, name, max_megapixels)
            if picture.format == "PNG":
                picture.load()  # looking for EXIF does the same, but keeps silent about what is broken
            captured_at = _captured_at(picture)
            if len(pages) > 1:
                rgb = _channels(picture, pages, name)
            else:
                rgb = _sixteen_bit(data, picture, name) if is_deep else _eight_bit(picture)
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError("too-large", f"{name}: {width}x{height} does not fit into memory") from error
        except Exception as error:
            what = f"{name}: the image is cut short or damaged: {error}"
            raise ImageError("truncated", what, _AGAIN) from error
    if (rgb.shape[1], rgb.shape[0]) != drafted:  # turned by its EXIF
        width, height = height, width
    return Decoded(rgb, width, height, reduced, data if reduced > 1 else b""), captured_at


def _opened(file: BinaryIO) -> Image.Image:
    """Opens an image by its content. The library for HEIF is loaded for such a file only."""
    head = file.read(12)
    file.seek(0)
    if _is_heif(head) and find_spec(_HEIF):
        # Its class alone: registered in Pillow, it would change the host program.
        from pillow_heif import HeifImageFile  # noqa: PLC0415

        return cast(Image.Image, HeifImageFile(file))
    return _open(file, formats=_FORMATS)


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _is_overlay(picture: Image.Image) -> bool:
    """Tells whether we drew a picture, whatever its name is now. It may have been saved again."""
    if str(picture.info.get("comment", b""), "latin-1").startswith(OVERLAY_MARK):
        return True
    with suppress(Exception):  # odd EXIF
        if "exif" in picture.info:  # else a PNG is decoded for it
            return str(picture.getexif().get(ExifTags.Base.Software, "")).startswith(OVERLAY_MARK)
    return False


def _pages(picture: Image.Image, name: str, page: int) -> tuple[list[int], list[int]]:
    """Turns a picture to the page that is the field, and returns its number, or those of its three channels.

    Returns as well which pages are its neighbours. Raises `ImageError` where there is no such page, and where
    several are meant and none is asked for: one of them alone would be a count of a part.
    """
    fields, is_together = _fields(picture, name)
    neighbours: list[int] = []
    if page > (1 if is_together else len(fields)):
        raise ImageError("truncated", f"{name}: page {page} is not there", "was the file changed meanwhile?")
    if len(fields) > 1 and not is_together:
        if not page:
            advice = (
                "`rbc-edge run` counts each page of a .tif file; or save each page as an image of its own"
            )
            raise ImageError("unsupported", f"{name}: {len(fields)} pages, each a field of view", advice)
        neighbours = [fields[i] for i in (page - 2, page) if 0 <= i < len(fields)]
        fields = [fields[page - 1]]
    _turn_to(picture, fields[0])
    return fields, neighbours


def _fields(picture: Image.Image, name: str) -> tuple[list[int], bool]:
    """Returns which pages are fields, and whether they are the three channels of one.

    Smaller versions and masks are passed over. Raises `ImageError` where it is not clear what the pages are.
    """
    found: dict[int, tuple[tuple[int, int], str]] = {}
    description = str(getattr(picture, "tag_v2", {}).get(_DESCRIPTION_TAG, ""))
    n_pages = 1
    try:
        if picture.format in ("PNG", "WEBP", "HEIF"):
            n_pages = getattr(picture, "n_frames", 1)
        for page in range(_MAX_PAGES + 1) if picture.format == "TIFF" else ():
            try:
                picture.seek(page)
            except EOFError:
                break
            if not int(getattr(picture, "tag_v2", {}).get(_PAGE_TAG, 0)) & _NO_FIELD:
                found[page] = picture.size, picture.mode
    except Exception as error:
        raise ImageError("truncated", f"{name}: its list of pages is broken: {error}", _AGAIN) from error
    most = max((w * h for (w, h), _ in found.values()), default=0)
    fields = [page for page, ((w, h), _) in found.items() if 2 * w * h > most] or [0]
    n, advice = max(n_pages, len(fields)), "save each page as an image of its own"
    if (said := _N_IMAGES.search(description)) and (not said[1] or int(said[1]) > len(found)):
        what = f"{name}: its notes tell of more images than its list of pages, which names {len(found)}"
        raise ImageError("unsupported", what, advice)
    n_channels = _told(_N_CHANNELS, description)
    if n == 1:
        if n_channels > 1 and found.get(fields[0], ((0, 0), ""))[1] in _GREY:
            what = f"{name}: one channel of {n_channels}"
            raise ImageError("unsupported", what, "save each field of view as one RGB image")
        return fields, False
    if n_pages > 1:
        raise ImageError("unsupported", f"{name}: a moving picture of {n_pages} pages", advice)
    if n > _MAX_PAGES:
        raise ImageError("unsupported", f"{name}: more than {_MAX_PAGES} pages", advice)
    if (n_planes := _told(_N_PLANES, description)) > 1:
        what = f"{name}: a stack of {n_planes} focal planes"
        raise ImageError("unsupported", what, "save its sharpest plane as an image of its own")
    kinds = {found[page] for page in fields}
    if len(kinds) > 1:
        raise ImageError("unsupported", f"{name}: {n} pages of different sizes or kinds of pixel", advice)
    if n_channels > 1 and kinds.pop()[1] in _GREY:
        if n == n_channels == 3:
            return fields, True
        what = f"{name}: {n} pages of {n_channels} channels each or together"
        raise ImageError("unsupported", what, "save each field of view as one RGB image")
    return fields, False


def _refuse_one_place(picture: Image.Image, pages: list[int], neighbours: list[int], name: str) -> None:
    """Raises `ImageError` for a page that shows what its neighbour shows: its cells would count twice."""
    if not neighbours:
        return
    here = _details(_grey(picture, pages[0]))
    for other in neighbours:
        with suppress(Exception):  # a broken page fails alone
            if float((here * _details(_grey(picture, other))).mean()) > _SAME_PLACE:
                break
    else:
        return
    what = f"{name}: page {pages[0] + 1} shows the same place as page {other + 1}: a stack of focal planes?"
    raise ImageError("unsupported", what, "save its sharpest plane as an image of its own")


def _grey(picture: Image.Image, page: int) -> npt.NDArray[Any]:
    _turn_to(picture, page)
    return np.asarray(picture if picture.mode.startswith(("I", "F")) else picture.convert("L"))


def _details(grey: npt.NDArray[Any]) -> Float32:
    """Returns the small structures of an image (H, W), float32 (h, w), mean 0 and standard deviation 1."""
    factor = _SMALL_PX / max(grey.shape)
    size = tuple(max(1, round(side * factor)) for side in grey.shape[::-1])
    small = cv2.resize(grey.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    fine = small - cv2.GaussianBlur(small, (0, 0), _SMALL_PX / 16)
    return np.asarray((fine - fine.mean()) / max(float(fine.std()), 1e-6), np.float32)


def _told(pattern: re.Pattern[str], description: str) -> int:
    match = pattern.search(description)
    return int(match[1] or match[2]) if match else 1


def _turn_to(picture: Image.Image, page: int) -> None:
    if getattr(picture, "n_frames", 1) > 1 and picture.tell() != page:
        picture.seek(page)


def _channels(picture: Image.Image, pages: list[int], name: str) -> UInt8:
    """Puts three pages of grey together: red, green, blue."""
    planes = []
    for page in pages:
        _turn_to(picture, page)
        picture.load()
        planes.append(np.asarray(picture))
    together = np.stack(planes, axis=2)
    return together if together.dtype == np.uint8 else _stretched(together.astype(np.uint16), name)


def _cost_bytes(picture: Image.Image, n_full: int, *, is_deep: bool) -> int:
    """Returns what decoding a drafted picture takes at its peak, before it takes it."""
    a_pixel = _DEEP_COST if is_deep else _RGB_COST if picture.mode == "RGB" else _OTHER_COST
    # A progressive JPEG is kept whole until its last scan: two bytes a value, in full size.
    kept = 2 * len(picture.getbands()) * n_full if picture.info.get("progressive") else 0
    return picture.width * picture.height * a_pixel + kept


def _refuse_broken(data: bytes, picture: Image.Image, name: str, max_megapixels: float) -> None:
    """Raises `ImageError` for what the decoder would show without a word, or would call by a wrong name."""
    tags = getattr(picture, "tag_v2", {})
    if kind := integrity.not_read(data, tags):
        raise ImageError("unsupported", f"{name}: {kind}, which is not read", _OTHER_KIND)
    if damage := integrity.damage(data, tags, int(max_megapixels * 1e6 * _MAX_BYTES_A_PIXEL)):
        raise ImageError("truncated", f"{name}: the image is cut short or damaged: {damage}", _AGAIN)


def _not_opened(data: bytes, name: str) -> ImageError:
    """Returns what is wrong with a file that Pillow cannot identify."""
    if kind := integrity.not_read(data, {}):
        return ImageError("unsupported", f"{name}: {kind}, which is not read", _OTHER_KIND)
    if _is_heif(data):
        advice = "install the extra: pip install 'rbc-edge[heic]'; or save it as JPEG"
        return ImageError("unsupported", f"{name}: HEIC or HEIF, which is not read here", advice)
    if _has_tiff_directory(data):
        advice = "save it with 8 or 16 bits in grey or RGB; if it is saved so, copy it again"
        return ImageError("unsupported", f"{name}: a kind of TIFF that cannot be read", advice)
    if data.startswith(_SIGNATURES):  # a TIFF's directory may stand at its end
        return ImageError("truncated", f"{name}: the image is cut short or damaged", _AGAIN)
    advice = "is it another kind of file with an image's name?"
    return ImageError("not-an-image", f"{name}: not a JPEG, PNG, BMP, TIFF or WebP image", advice)


def _draft(picture: Image.Image, reduction: int) -> int:
    """Makes a JPEG decode at a half, a quarter or an eighth of its size, not less than 1 / `reduction`.

    The decoder takes the lower frequencies of each block only. Other formats are decoded in full, and so is
    an image that EXIF turns, unless its sides are multiples of a block: a part of a pixel must stay at the
    right or below. Returns how many times smaller the image will be: 1, 2, 4 or 8.
    """
    if reduction == 1 or picture.format not in ("JPEG", "MPO"):
        return 1
    is_whole = picture.width % _JPEG_BLOCK == picture.height % _JPEG_BLOCK == 0
    if not is_whole and picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return 1
    width = picture.width
    drafted = picture.draft(None, (max(1, width // reduction), max(1, picture.height // reduction)))
    return 1 if drafted is None else round(width / drafted[1][2])  # its box: in pixels of the reduced image


def _has_tiff_directory(data: bytes) -> bool:
    """Tells whether the first directory of a TIFF file is complete (TIFF 6.0, section 2)."""
    if not data.startswith(_TIFF_SIGNATURES):
        return False
    order = "<" if data.startswith(b"II") else ">"
    with suppress(struct.error):
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", data, start)
        return bool(start >= 8 and n_entries > 0 and start + 2 + 12 * n_entries + 4 <= len(data))
    return False


def _is_deep(picture: Image.Image) -> bool:
    """Tells whether the file holds more than 8 bits a channel (Pillow tells only for grey and TIFF)."""
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
    # No needless copy: each takes 80 MB of a 20-megapixel field.
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "P" or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        low, high = rgba.getchannel("A").getextrema()
        if low == high:  # it shows nothing: a program that writes 32 bits and fills 24
            picture = rgba.convert("RGB")
        else:
            # Pixels under full transparency are arbitrary: show white, as a viewer does.
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
    # Both decoders apply the orientation of a TIFF file themselves.
    turned = picture.format == "TIFF"
    kind = _deep_kind(picture, name)
    orientation = 1 if turned else picture.getexif().get(ExifTags.Base.Orientation, 1)
    picture.load()  # cv2 returns half an image silently; Pillow raises
    flags, buffer = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION, np.frombuffer(data, np.uint8)
    pixels: npt.NDArray[Any] | None
    if (page := picture.tell()) > 0:
        _, found = cv2.imdecodemulti(buffer, flags, range=(page, page + 1))
        pixels = found[0] if found else None
    else:
        pixels = cv2.imdecode(buffer, flags)
    if pixels is None:
        if not picture.mode.startswith(("I", "F")):  # Pillow gives only the upper bytes of colour
            what = f"{name}: its 16-bit pixels cannot be read, or are not all there"
            advice = f"{_AGAIN}, or save it with 8 bits"
            raise ImageError("unsupported" if turned else "truncated", what, advice)
        pixels = np.asarray(picture)
    elif pixels.ndim == 3:
        pixels = pixels[:, :, :3][:, :, ::-1]  # BGR, perhaps with alpha
    if kind == _WHITE_IS_ZERO:  # neither decoder inverts 16 bits
        if pixels.dtype != np.uint16:
            raise ImageError("unsupported", f"{name}: white is zero in it", "save it with black as zero")
        pixels = 65535 - pixels
    scaled = _stretched(pixels, name)
    if scaled.ndim == 2:
        scaled = np.repeat(scaled[:, :, None], 3, axis=2)
    upright = Image.fromarray(np.ascontiguousarray(scaled))
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(upright, in_place=True)
    return np.asarray(upright, dtype=np.uint8)


def _deep_kind(picture: Image.Image, name: str) -> int:
    """Returns what a deep image's pixels mean. Refuses what both decoders are known to read wrongly."""
    tags = getattr(picture, "tag_v2", {})
    kind = int(tags.get(_PHOTOMETRIC_TAG, _BLACK_IS_ZERO))
    if kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        what = f"{name}: 16 bits, but neither grey nor RGB"
        raise ImageError("unsupported", what, "save it as grey or RGB")
    if tags.get(_SAMPLES_TAG, 1) > 1 and tags.get(_PLANAR_TAG, 1) == _SEPARATE_PLANES:
        advice = "save its channels interleaved (planar configuration: contiguous)"
        raise ImageError("unsupported", f"{name}: 16-bit colour in separate planes", advice)
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
        date, _, time = str(tags.get(tag, "")).strip("\0 ").partition(" ")
        with suppress(ValueError):  # a clock that was never set says 0000:00:00
            return datetime.strptime(f"{date} {time}", "%Y:%m:%d %H:%M:%S").isoformat()
    return ""

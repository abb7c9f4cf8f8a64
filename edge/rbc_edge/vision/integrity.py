"""Is an image file whole? What the decoders pass over in silence: they show a damaged image without a word.

Each check looks at the bytes of a file that has not been decoded yet. A check says "damaged" only of what no
whole file shows. What it does not know, it leaves to the decoder.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

import simplejpeg

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"

# ITU-T T.81, table B.1. In words: why Pillow does not read the frames of the other kinds.
_FRAMES: Final = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC9, 0xCA), ""),
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF, 0xF7), "a lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "a hierarchical JPEG"),
}
_SEQUENTIAL: Final = (0xC0, 0xC1)
_CODES: Final = 0xC4
_EVEN: Final = 0  # what a code means: no more detail in this block
_LOST_BYTES: Final = 128
_START_OF_SCAN: Final = 0xDA
_END_OF_IMAGE: Final = b"\xff\xd9"
_FILLING: Final = b"\0\xff"
_EXTRANEOUS: Final = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
# The decoder has read so many bytes ahead, and the last codes of a whole image may look like filling.
_MAX_READ_AHEAD: Final = 16
_MAX_FILLING: Final = 1024
_MAX_ROUNDS: Final = 3

# TIFF 6.0 and its technical notes: numbers of tags and of compressions.
_COMPRESSION_TAG, _FILL_ORDER_TAG, _JPEG_TABLES_TAG = 259, 266, 347
_PIECES_TAGS: Final = ((273, 279), (324, 325))  # places and lengths of strips, of tiles
_TIFF_JPEG: Final = 7
_TIFF_DEFLATE: Final = (8, 32946)
_TIFF_READ: Final = (1, 2, 3, 4, 5, 6, 32773, 32771, 34925, 50000, _TIFF_JPEG, *_TIFF_DEFLATE)
_STEP_BYTES: Final = 1 << 20


def not_read(data: bytes, tiff_tags: Mapping[int, Any]) -> str:
    """Returns in words which kind of JPEG or TIFF a file is that is whole but not read. "" for all others.

    `tiff_tags` are the tags of a TIFF's page by their number, empty for other files.
    """
    if data.startswith(_JPEG):
        for kind, segment in _segments(data):
            if kind in _FRAMES:
                bits = segment[4] if len(segment) > 4 else 8
                return _FRAMES[kind] or ("" if bits == 8 else f"a JPEG of {bits} bits")
    compression = tiff_tags.get(_COMPRESSION_TAG, 1)
    return "" if compression in _TIFF_READ else f"a TIFF of compression {compression}"


def damage(data: bytes, tiff_tags: Mapping[int, Any], max_bytes: int) -> str:
    """Returns in words what is broken in a file's bytes. "" where nothing is seen.

    PNG: the checksum of every chunk. JPEG: a strict decoder, at an eighth of the size. TIFF: the checksums of
    Deflate, and JPEG as above; the other compressions have none.

    `tiff_tags` are the tags of a TIFF's page by their number, empty for other files. More than `max_bytes`
    decoded bytes are damage as well.
    """
    if data.startswith(_PNG):
        return _png_damage(data)
    if data.startswith(_JPEG):
        return _jpeg_damage(data)
    compression = tiff_tags.get(_COMPRESSION_TAG, 1)
    if compression == _TIFF_JPEG:
        tables = bytes(tiff_tags.get(_JPEG_TABLES_TAG, b""))[2:-2]
        whole = (_JPEG[:2] + tables + bytes(piece[2:]) for piece in _pieces(data, tiff_tags))
        return next(filter(None, map(_jpeg_damage, whole)), "")
    if compression in _TIFF_DEFLATE and tiff_tags.get(_FILL_ORDER_TAG, 1) == 1:
        return next(filter(None, (_deflate_damage(p, max_bytes) for p in _pieces(data, tiff_tags))), "")
    return ""


def _png_damage(data: bytes) -> str:
    """Checks length and checksum of every chunk up to the last (PNG, section 5.3)."""
    view, at = memoryview(data), len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if struct.unpack_from(">I", data, end) != (zlib.crc32(view[at + 4 : end]),):
            return f"the checksum of a chunk at byte {at} is wrong"
        if data[at + 4 : at + 8] == b"IEND":
            return ""
        at = end + 4
    return "the last chunk is missing"


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields kind and bytes of a JPEG's segments. The first scan is the last one, with all that follows."""
    at = 2
    while at + 4 <= len(data):
        kind = data[at + 1]
        if data[at] != 0xFF or kind in (0, 0xFF):  # filling between two segments
            at += 1
            continue
        if kind == _START_OF_SCAN:
            yield kind, data[at:]
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield kind, data[at : at + 2 + length]
        at += 2 + length


def _jpeg_damage(data: bytes) -> str:
    # Of its warnings the decoder tells only the first. So what it may warn of in a whole image is taken out
    # before: notes (a JFIF of revision 2, odd EXIF), bytes between segments and filling before the end.
    parts = [data[:2]]
    n_channels, is_baseline, shortest = 3, False, set[int]()
    for kind, segment in _segments(data):
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            parts.append(segment)
        if kind in _FRAMES and len(segment) > 9:
            n_channels, is_baseline = segment[9], kind in _SEQUENTIAL
        if kind == _CODES:
            shortest.update(_shortest_codes(segment[4:]))
    scan = parts[-1]
    # Zeros are codes like others. They mean nothing in a row but in an image with no detail at all, if its
    # shortest code is "the rest of the block is even". A disk or a card that lost a sector gives zeros.
    if is_baseline and len(scan) > 4 and scan[4] == n_channels and shortest - {_EVEN}:
        end = scan.find(_END_OF_IMAGE)
        if bytes(_LOST_BYTES) in scan[:end].rstrip(_FILLING):
            return "a part of it is zeros"
    data = b"".join(parts)
    colours = "CMYK" if n_channels == 4 else "GRAY"
    found = _strictly(data, colours)
    for _ in range(_MAX_ROUNDS):  # of filling the decoder counts some bytes less than there are
        extraneous = _EXTRANEOUS.search(found)
        if extraneous is None:
            break
        n = int(extraneous[1])
        end = data.find(_END_OF_IMAGE, len(data) - len(parts[-1]))
        n_filling = end - len(data[:end].rstrip(_FILLING))
        # More filling than is left over: it was decoded, in place of the cells.
        if not n <= n_filling <= min(n + _MAX_READ_AHEAD, _MAX_FILLING):
            break
        data = data[: end - n] + _END_OF_IMAGE
        found = _strictly(data, colours)
    return found


def _shortest_codes(tables: bytes) -> Iterator[int]:
    """Yields what zeros stand for in each code table of detail (T.81, B.2.4.2)."""
    at = 0
    while at + 17 < len(tables):
        if tables[at] >> 4:
            yield tables[at + 17]
        at += 17 + sum(tables[at + 1 : at + 17])


def _strictly(data: bytes, colours: str) -> str:
    """Returns what a strict decoder says of a JPEG. "" where it is whole, or cannot be judged."""
    try:
        # An eighth of the size: all codes are read, and next to no memory is taken.
        simplejpeg.decode_jpeg(data, colours, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        if str(error).startswith(("Corrupt JPEG data", "Premature end of JPEG")):
            return str(error)
    return ""


def _pieces(data: bytes, tags: Mapping[int, Any]) -> Iterator[memoryview]:
    """Yields the compressed strips or tiles of a TIFF's page."""
    view = memoryview(data)
    for places, lengths in _PIECES_TAGS:
        with suppress(TypeError):  # damaged tags: libtiff says so
            for start, n in zip(tags.get(places, ()), tags.get(lengths, ()), strict=False):
                yield view[start : start + n]


def _deflate_damage(piece: memoryview, max_bytes: int) -> str:
    stream = zlib.decompressobj()
    n_bytes = 0
    left: bytes | memoryview = piece
    try:
        while left and not stream.eof and n_bytes <= max_bytes:
            n_bytes += len(stream.decompress(left, _STEP_BYTES))
            left = stream.unconsumed_tail
    except zlib.error as error:
        return str(error)
    return "" if stream.eof else "a compressed part has no end"

"""Is an image file whole? What the decoders pass over in silence: they show a damaged image without a word.

Each check looks at the bytes of a file that has not been decoded yet. A check says "damaged" only of what no
whole file shows. What it does not know, it leaves to the decoder.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final

import numpy as np
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
_DAMAGE: Final = ("Corrupt JPEG data", "Premature end of JPEG", "Unsupported marker type")
_EXTRANEOUS: Final = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
# The decoder has read so many bytes ahead, and the last codes of a whole image may look like filling.
_MAX_READ_AHEAD: Final = 16
_MAX_FILLING: Final = 1024
_MAX_ROUNDS: Final = 3

# TIFF 6.0 and its technical notes: numbers of tags and of compressions.
_COMPRESSION_TAG, _FILL_ORDER_TAG, _JPEG_TABLES_TAG = 259, 266, 347
_PIECES_TAGS: Final = ((273, 279), (324, 325))  # places and lengths of strips, of tiles
_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLES_TAG = 256, 257, 258, 262, 277
_STRIP_ROWS_TAG, _PLANAR_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 278, 284, 322, 323
_YCBCR: Final = 6  # may hold fewer values of colour than pixels
_TIFF_RAW, _TIFF_LZW, _TIFF_JPEG, _TIFF_PACKBITS = 1, 5, 7, 32773
_TIFF_DEFLATE: Final = (8, 32946)
_TURNED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # fill order 2
# TIFF 6.0, section 13: a code that starts over, and the one at the end. How many codes have 9, 10, 11 bits,
# and 12 bits up to the largest table.
_CLEAR, _END = 256, 257
_LZW_BITS: Final = np.repeat([9, 10, 11, 12], [254, 512, 1024, 2306])
_LZW_PLACES: Final = np.cumsum(_LZW_BITS) - _LZW_BITS
_LZW_START_BYTES: Final = 2048
_PACKBITS_NOTHING: Final = 128

_HOLE_BYTES: Final = 512  # the smallest part that a disk or a card loses
_HOLE: Final = "a part of it is zeros"
# ITU-T H.265, 7.4.2: what is in no unit of a coded picture. Its encoder puts a 3 in between.
_NO_UNIT: Final = re.compile(rb"\0\0[\0\1\2]")
_DARK: Final = 8
_BRIGHT_SHARE: Final = 0.45  # of the bytes of a picture, also of 12 bits in 16
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
    Deflate, JPEG as above, and of LZW and PackBits whether the codes end with the last pixel. BMP and TIFF
    that are not compressed, and WebP: parts that were never written. More the other kinds do not show.

    `tiff_tags` are the tags of a TIFF's page by their number, empty for other files. More than `max_bytes`
    decoded bytes are damage as well.
    """
    if data.startswith(_PNG):
        return _png_damage(data)
    if data.startswith(_JPEG):
        return _jpeg_damage(data)
    if data.startswith(b"BM"):
        return _bmp_damage(data)
    if data.startswith(b"RIFF"):
        return _webp_damage(data)
    if data[4:8] == b"ftyp":
        return _heif_damage(data)
    compression = tiff_tags.get(_COMPRESSION_TAG, _TIFF_RAW)
    if compression == _TIFF_JPEG:
        tables = bytes(tiff_tags.get(_JPEG_TABLES_TAG, b""))[2:-2]
        whole = (_JPEG[:2] + tables + bytes(piece[2:]) for piece in _pieces(data, tiff_tags))
        return next(filter(None, map(_jpeg_damage, whole)), "")
    pieces = _pieces(data, tiff_tags)
    if compression in _TIFF_DEFLATE:
        return next(filter(None, (_deflate_damage(piece, max_bytes) for piece in pieces)), "")
    rows = _piece_rows(tiff_tags)
    if compression == _TIFF_RAW and _TILE_HEIGHT_TAG not in tiff_tags:
        return _hole(b"".join(pieces), next(rows, (0, ()))[0])
    if check := {_TIFF_LZW: _lzw_damage, _TIFF_PACKBITS: _packbits_damage}.get(compression):
        sizes = ([row * n for n in ns] for row, ns in rows)
        return next(filter(None, map(check, pieces, sizes)), "")
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
            return _HOLE
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
        if str(error).startswith(_DAMAGE):
            return str(error)
    return ""


def _pieces(data: bytes, tags: Mapping[int, Any]) -> Iterator[memoryview]:
    """Yields the strips or tiles of a TIFF's page as they are stored, their bits in the usual order."""
    view = memoryview(data)
    is_turned = tags.get(_FILL_ORDER_TAG, 1) == 2 and tags.get(_COMPRESSION_TAG) != _TIFF_JPEG
    for places, lengths in _PIECES_TAGS:
        with suppress(TypeError):  # damaged tags: libtiff says so
            for start, n in zip(tags.get(places, ()), tags.get(lengths, ()), strict=False):
                piece = view[start : start + n]
                yield memoryview(bytes(piece).translate(_TURNED)) if is_turned else piece


def _piece_rows(tags: Mapping[int, Any]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields how many bytes a row of each strip or tile takes, and how many rows it may hold.

    The last strip holds the rows that are left. Some programs fill it up. Nothing where it is not known.
    """
    with suppress(TypeError, KeyError, ZeroDivisionError):  # damaged tags
        width, height, n_samples = tags[_WIDTH_TAG], tags[_HEIGHT_TAG], tags.get(_SAMPLES_TAG, 1)
        bits = tags.get(_BITS_TAG, (1,))
        n_bits = bits[0] if isinstance(bits, tuple) else bits
        n_planes = n_samples if tags.get(_PLANAR_TAG, 1) == 2 else 1
        if tags.get(_PHOTOMETRIC_TAG) == _YCBCR:
            return
        rows = tags.get(_TILE_HEIGHT_TAG, min(tags.get(_STRIP_ROWS_TAG, height), height))
        wide = tags.get(_TILE_WIDTH_TAG, width)
        row_bytes = (wide * n_bits * n_samples // n_planes + 7) // 8
        n_wide, n_high = -(-width // wide), -(-height // rows)
        for _ in range(n_planes):
            for i in range(n_wide * n_high):
                is_short = _TILE_HEIGHT_TAG not in tags and i == n_high - 1
                yield row_bytes, (height - i * rows, rows) if is_short else (rows,)


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


def _lzw_damage(piece: memoryview, sizes: Sequence[int]) -> str:
    """Tells whether the codes of an LZW strip give as many bytes as one of `sizes`, and end there.

    How long a code is depends on how many came before it. So all codes up to the next start are read at once.
    """
    if len(piece) > 1 and piece[0] == 0 and piece[1] & 1:  # an older way to write it, the bits turned
        return ""
    data = np.frombuffer(bytes(piece) + bytes(3), np.uint8).astype(np.uint32)
    n_given, start, ends = 0, 0, set[int]()
    for n_starts in count():
        if n_starts > 4 + len(piece) // _LZW_START_BYTES:  # no writer starts over so often
            return ""
        places = start + _LZW_PLACES
        places = places[places + _LZW_BITS <= 8 * len(piece)]
        at, bits = places >> 3, _LZW_BITS[: len(places)]
        three = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
        codes = ((three >> (24 - (places & 7) - bits)) & ((1 << bits) - 1)).astype(np.int64)
        special = np.flatnonzero((codes == _CLEAR) | (codes == _END))
        n = int(special[0]) if len(special) else len(codes)
        # A code above 257 stands for an earlier code's bytes and one more.
        earlier = codes[:n] - _END - 1
        if (earlier >= np.arange(n)).any():
            break
        lengths = np.ones(n + 1, np.int64)  # the last: of nothing
        lengths[n] = 0
        earlier = np.append(np.where(earlier < 0, n, earlier), n)
        while (earlier < n).any():
            lengths, earlier = lengths + lengths[earlier], earlier[earlier]
        given = n_given + np.cumsum(lengths[:n])
        n_given = int(given[-1]) if n else n_given
        if n == len(codes):  # no code at the end, but filling up to a whole byte
            ends.update(given[-2:].tolist() if n < len(_LZW_BITS) else ())
            break
        ends.add(n_given)
        if codes[n] == _END or n_given > max(sizes):
            break
        start = int(places[n] + bits[n])
        ends.clear()
    return "" if ends.intersection(sizes) else "the codes of a compressed part do not end with its pixels"


def _packbits_damage(piece: memoryview, sizes: Sequence[int]) -> str:
    """Tells whether the codes of a PackBits strip give as many bytes as one of `sizes`, and end there."""
    at = n_given = 0
    while at < len(piece) and n_given < max(sizes):
        code = piece[at]
        if code < _PACKBITS_NOTHING:
            n_given += code + 1
            at += code + 2
        else:
            n_given += 257 - code if code > _PACKBITS_NOTHING else 0
            at += 2 if code > _PACKBITS_NOTHING else 1
    is_whole = n_given in sizes and at <= len(piece) and not bytes(piece[at:]).strip(b"\0\x80")
    return "" if is_whole else "the codes of a compressed part do not end with its pixels"


def _bmp_damage(data: bytes) -> str:
    with suppress(struct.error):
        start, head, width, _, _, n_bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
        if head >= 40 and compression in (0, 3):
            return _hole(memoryview(data)[start:], (abs(width) * n_bits + 31) // 32 * 4)
    return ""


def _webp_damage(data: bytes) -> str:
    """Looks for more zeros in a row than an even image gives: about 100 of a megapixel."""
    at = 12
    while at + 18 <= len(data):
        kind, length, width, height = struct.unpack_from("<4sI6x2H", data, at)
        lossy_megapixels = (width & 0x3FFF) * (height & 0x3FFF) / 1e6 if kind == b"VP8 " else 0
        zeros = bytes(_HOLE_BYTES * 3 // 4 + int(200 * lossy_megapixels))
        if kind in (b"VP8 ", b"VP8L") and zeros in data[at : at + 8 + length]:
            return _HOLE
        at += 8 + length + length % 2
    return ""


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start of the content and end of the boxes of a HEIF file (ISO/IEC 14496-12, 4.2)."""
    while at + 16 <= end:
        length, kind, long = struct.unpack_from(">I4sQ", data, at)
        start = at + (16 if length == 1 else 8)
        at = min(end, at + max(8, {0: end, 1: long}.get(length, length)))
        yield kind, start, at


def _heif_damage(data: bytes) -> str:
    """Checks that the parts of each coded picture of a HEIF file hold what a coder writes.

    The decoder shows whatever it makes of a part, and there are no checksums.
    """
    with suppress(struct.error, KeyError, IndexError):  # what is not understood is left to the decoder
        outside = {kind: (start, end) for kind, start, end in _boxes(data, 0, len(data))}
        start, end = outside[b"meta"]
        inside = {kind: (start, end) for kind, start, end in _boxes(data, start + 4, end)}
        start, end = inside[b"iinf"]
        infos = _boxes(data, start + (8 if data[start] else 6), end)
        coded = {
            struct.unpack_from(">I" if data[at] > 2 else ">H", data, at + 4)[0]
            for _, at, _ in infos
            if data[at + (10 if data[at] > 2 else 8) :][:4] == b"hvc1"
        }
        for item, start, length in _extents(data, inside[b"iloc"][0]):
            at, end = start, start + length
            while item in coded and at + 4 <= end:
                (n,) = struct.unpack_from(">I", data, at)
                if at + 4 + n > end or _NO_UNIT.search(data, at + 4, at + 4 + n):
                    return "a coded part holds what no coder writes"
                at += 4 + n
    return ""


def _extents(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, place and length of each item of one piece in a HEIF file (ISO/IEC 14496-12, 8.11.3)."""
    version, sizes = data[at], struct.unpack_from(">H", data, at + 4)[0]
    at += 6

    def number(n_bytes: int) -> int:
        nonlocal at
        at += n_bytes
        return int.from_bytes(data[at - n_bytes : at], "big")

    wide = 4 if version == 2 else 2
    for _ in range(number(wide)):
        item = number(wide)
        is_elsewhere = (number(2) & 15 if version else 0) + number(2)  # in another box, or another file
        base = number(sizes >> 4 & 15)
        n_pieces = number(2)
        for _ in range(n_pieces):
            number(sizes & 15 if version else 0)
            place, length = base + number(sizes >> 12), number(sizes >> 8 & 15)
            if n_pieces == 1 and not is_elsewhere:
                yield item, place, length


def _hole(pixels: bytes | memoryview, row_bytes: int) -> str:
    """Looks for a part of an image without compression that was never written, and is zeros.

    A black part of a picture is told by its shape: it does not begin within a row, below a bright one, and
    go on over the next row.
    """
    if not row_bytes:
        return ""
    data = np.frombuffer(pixels, np.uint8, len(pixels) // _HOLE_BYTES * _HOLE_BYTES)
    is_zero = np.append(data.reshape(-1, _HOLE_BYTES // 2).any(axis=1), True) ^ True
    edges = np.flatnonzero(np.diff(is_zero, prepend=False)) * (_HOLE_BYTES // 2)
    for start, end in edges.reshape(-1, 2).tolist():
        begin = start - _HOLE_BYTES // 2
        begin += int(np.flatnonzero(data[max(begin, 0) : start])[-1]) + 1 if start else -begin
        above = data[max(begin - row_bytes, 0) : begin - begin % row_bytes]
        is_torn = end - begin >= max(row_bytes, _HOLE_BYTES) and begin % row_bytes > 0 and len(above) > 0
        if is_torn and float((above > _DARK).mean()) > _BRIGHT_SHARE:
            return _HOLE
    return ""

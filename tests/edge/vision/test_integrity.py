"""Damaged files: refused, where the decoders would show something. Odd files that are whole: read."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from rbc_edge.errors import ImageError
from rbc_edge.values import UInt8
from rbc_edge.vision import image_file, integrity

END: Final = b"\xff\xd9"


def smear(height: int = 240, width: int = 320) -> UInt8:
    """Soft discs and noise: as much detail as a photograph has."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), 215, np.uint8)
    for x, y in rng.uniform(0, 1, (25, 2)) * (width, height):
        cv2.circle(image, (int(x), int(y)), 22, (170, 120, 130), -1)
    noise = rng.normal(0, 6, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 2) + noise, 0, 255).astype(np.uint8)


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smear()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(*, grey: bool) -> bytes:
    pixels = smear().astype(np.uint16) * 257
    done, data = cv2.imencode(".png", pixels[:, :, 0] if grey else pixels)
    assert done
    return data.tobytes()


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def reason(data: bytes) -> str:
    """Why an image is refused. "" where it is shown."""
    try:
        image_file.decode(data, "x")
    except ImageError as error:
        return error.reason
    return ""


@pytest.mark.parametrize("kind", ["colour", "grey16", "colour16", "palette"])
def test_one_bit_of_a_png_is_enough(kind: str) -> None:
    data = {
        "colour": lambda: saved("PNG"),
        "grey16": lambda: deep_png(grey=True),
        "colour16": lambda: deep_png(grey=False),
        "palette": lambda: saved("PNG", "P"),
    }[kind]()
    assert reason(data) == ""
    rng = random.Random(0)
    for _ in range(40):
        assert reason(flipped(data, rng.randrange(40, len(data) - 16), rng.randrange(8))) != ""


def test_a_png_s_pixels_are_checked_beyond_their_checksums() -> None:
    """The checksums are right, but the stream inside is broken. Looking for EXIF used to hide that."""
    data = saved("PNG")
    start = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, start)
    body = bytearray(data[start + 4 : start + 8 + length])
    body[length // 2] ^= 0x10
    broken = data[: start + 4] + body + struct.pack(">I", zlib.crc32(body)) + data[start + 12 + length :]
    assert reason(broken) == "truncated"


JPEGS: Final[dict[str, Callable[[], bytes]]] = {
    "usual": lambda: saved("JPEG", quality=90),
    "best": lambda: saved("JPEG", quality=100, subsampling=0),
    "restarts": lambda: saved("JPEG", quality=90, restart_marker_rows=1),
    "progressive": lambda: saved("JPEG", quality=90, progressive=True),
    "optimised": lambda: saved("JPEG", quality=90, optimize=True),
    "grey": lambda: saved("JPEG", "L", quality=90),
    "four colours": lambda: saved("JPEG", "CMYK", quality=90),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_hole_in_a_jpeg_is_seen(kind: str) -> None:
    data = JPEGS[kind]()
    assert reason(data) == ""
    scan = data.index(b"\xff\xda") + 14
    middle = (scan + len(data)) // 2
    half = data[:middle] + bytes(len(data) - middle - 2) + END
    assert reason(half) == "truncated"
    places = [int(scan + share * (len(data) - scan - 700)) for share in np.linspace(0.05, 1, 10)]
    lost = [reason(data[:at] + data[at + 512 :]) for at in places]
    zeroed = [reason(data[:at] + bytes(512) + data[at + 512 :]) for at in places]
    assert set(lost + zeroed) <= {"", "truncated"}
    # By chance the codes fit together again. In the last scans of a progressive file that is the rule.
    n_seen = 6 if kind == "progressive" else 8
    assert lost.count("truncated") >= n_seen
    if kind in ("usual", "best", "restarts", "grey", "four colours"):
        assert zeroed.count("truncated") == len(places)
    assert zeroed.count("truncated") >= n_seen


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("filling", [b"\0", bytes(7), bytes(600), b"\xff" * 9, b"\xff\0" * 5])
def test_filling_before_the_end_of_a_jpeg_is_no_damage(kind: str, filling: bytes) -> None:
    data = JPEGS[kind]()
    filled = data[:-2] + filling + END
    np.testing.assert_array_equal(image_file.decode(filled, "x")[0], image_file.decode(data, "x")[0])


def test_a_jpeg_of_jfif_revision_2_is_whole_and_its_damage_is_seen() -> None:
    data = saved("JPEG", quality=90).replace(b"JFIF\0\1", b"JFIF\0\2")
    assert data[11] == 2
    assert reason(data) == ""
    assert reason(data[:20] + bytes(6) + data[20:]) == ""  # a gap between two segments
    assert reason(data[:6000] + data[6512:]) == "truncated"


def test_an_even_jpeg_is_zeros_and_no_damage() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000), (255, 255, 255)).save(buffer, "JPEG", optimize=True)
    assert bytes(128) in buffer.getvalue()
    assert reason(buffer.getvalue()) == ""


def test_what_follows_the_end_of_a_jpeg_does_not_matter() -> None:
    assert reason(saved("JPEG") + b"a note of the camera" * 50) == ""


@pytest.mark.parametrize(("marker", "bits", "words"), [(0xC0, 12, "12 bits"), (0xC3, 8, "lossless")])
def test_another_kind_of_jpeg_is_not_called_damaged(marker: int, bits: int, words: str) -> None:
    data = saved("JPEG")
    at = data.index(b"\xff\xc0")
    data = data[: at + 1] + bytes([marker]) + data[at + 2 : at + 4] + bytes([bits]) + data[at + 5 :]
    with pytest.raises(ImageError, match=words) as caught:
        image_file.decode(data, "x")
    assert caught.value.reason == "unsupported"
    assert "copy it again" not in str(caught.value)


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "tiff_deflate", "jpeg"])
def test_a_hole_in_a_compressed_tiff_is_seen(compression: str) -> None:
    data = saved("TIFF", compression=compression)
    assert reason(data) == ""
    for share in (0.3, 0.5, 0.7):
        at = int(len(data) * share)
        assert reason(data[:at] + bytes(512) + data[at + 512 :]) == "truncated"


def test_one_bit_of_deflate_in_a_tiff_is_enough() -> None:
    data = saved("TIFF", compression="tiff_adobe_deflate")
    rng = random.Random(0)
    with Image.open(io.BytesIO(data)) as picture:
        assert isinstance(picture, TiffImagePlugin.TiffImageFile)
        (start, *_), (length, *_) = picture.tag_v2[273], picture.tag_v2[279]
    for _ in range(30):
        assert reason(flipped(data, start + rng.randrange(2, length), rng.randrange(8))) == "truncated"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "zstd", "lzma", "group4"])
def test_other_compressions_are_read(compression: str) -> None:
    assert features.check("libtiff")
    try:
        data = saved("TIFF", "1" if compression == "group4" else "RGB", compression=compression)
    except OSError as error:  # Pillow's older wheels have no zstd
        pytest.skip(f"Pillow cannot write it here: {error}")
    assert reason(data) == ""


def test_a_compression_that_is_not_read_is_not_called_damaged() -> None:
    data = saved("TIFF", compression="tiff_lzw")
    (start,) = struct.unpack_from("<I", data, 4)
    at = data.index(struct.pack("<HHIH", 259, 3, 1, 5), start) + 8
    with pytest.raises(ImageError, match="50001") as caught:
        image_file.decode(data[:at] + struct.pack("<H", 50001) + data[at + 2 :], "x")  # WebP
    assert caught.value.reason == "unsupported"


def png_of(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of zeros, made without its pixels (PNG, sections 5 and 11)."""
    n_channels = {0: 1, 2: 3, 6: 4}[colour]
    stream = zlib.compressobj(9)
    row = bytes(1 + width * n_channels * depth // 8)
    body = b"".join(stream.compress(row) for _ in range(height)) + stream.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks
    )


@pytest.mark.parametrize(
    ("depth", "colour", "n_most"), [(8, 2, 571), (8, 6, 333), (16, 6, 166), (16, 0, 166)]
)
def test_an_image_is_refused_by_what_decoding_takes_before_it_takes_it(
    depth: int, colour: int, n_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of one megapixel stands for 4 MB. Here 1000 pixels a row."""
    assert image_file.decode(png_of(1000, n_most, depth=depth, colour=colour), "x", max_megapixels=1.0)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="take too much memory") as caught:
        image_file.decode(png_of(1000, n_most + 1, depth=depth, colour=colour), "x", max_megapixels=1.0)
    assert caught.value.reason == "too-large"


def test_a_progressive_jpeg_is_refused_by_what_it_keeps() -> None:
    usual, progressive = (saved("JPEG", progressive=on) for on in (False, True))
    limit = 320 * 240 * 8 / 4e6
    image_file.decode(usual, "x", max_megapixels=limit)
    with pytest.raises(ImageError, match="take too much memory"):
        image_file.decode(progressive, "x", max_megapixels=limit)


@pytest.mark.parametrize(("head", "reason"), [(b"", "not-an-image"), (saved("JPEG"), "too-large")])
def test_a_large_file_with_no_image_in_it_is_not_read(
    tmp_path: Path, head: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sparse.jpg"
    file.write_bytes(head)
    os.truncate(file, 1_900_000_000)
    monkeypatch.setattr("hashlib.sha256", lambda _: pytest.fail("it was read"))
    monkeypatch.setattr(image_file, "_decode", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ImageError) as caught:
        image_file.load_field(file, "s", "f")
    assert caught.value.reason == reason


def strips(data: bytes) -> tuple[int, int]:
    """Start of the first strip and end of the last."""
    with Image.open(io.BytesIO(data)) as picture:
        assert isinstance(picture, TiffImagePlugin.TiffImageFile)
        places, lengths = picture.tag_v2[273], picture.tag_v2[279]
    return places[0], places[-1] + lengths[-1]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_a_flipped_bit_that_moves_the_pixels_of_an_lzw_tiff_is_seen(mode: str, predictor: int) -> None:
    """LZW has no checksum. But its codes must end with the last pixel."""
    data = saved("TIFF", mode, compression="tiff_lzw", tiffinfo={317: predictor})
    whole = image_file.decode(data, "x")[0].astype(int)
    start, end = strips(data)
    rng = random.Random(0)
    seen = 0
    for _ in range(80):
        broken = flipped(data, rng.randrange(start, end), rng.randrange(8))
        if reason(broken) == "truncated":
            seen += 1
            continue
        shown = image_file.decode(broken, "x")[0].astype(int)
        assert (abs(shown - whole).max(axis=2) > 24).mean() < (0.02 if predictor == 1 else 0.2)
    assert seen > 20


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits"])
@pytest.mark.parametrize("lost", [b"", bytes(512), b"\xff" * 512])
def test_a_hole_in_a_tiff_without_checksums_is_seen(compression: str, lost: bytes) -> None:
    data = saved("TIFF", compression=compression)
    start, end = strips(data)
    for share in np.linspace(0.05, 0.95, 12):
        at = int(start + share * (end - start - 600))
        assert reason(data[:at] + lost + data[at + 512 :]) == "truncated"


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_bits_in_the_other_order_are_read_and_their_damage_is_seen(compression: str) -> None:
    data = saved("TIFF", compression=compression, tiffinfo={266: 1})
    start, end = strips(data)
    (directory,) = struct.unpack_from("<I", data, 4)
    at = data.index(struct.pack("<HHIH", 266, 3, 1, 1), directory) + 8
    turned = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    data = data[:at] + b"\2" + data[at + 1 :]
    data = data[:start] + data[start:end].translate(turned) + data[end:]
    assert reason(data) == ""
    middle = (start + end) // 2
    assert reason(data[:middle] + data[middle + 512 :]) == "truncated"


def lzw(codes: list[int]) -> bytes:
    """Packs codes of 9 bits."""
    bits = "".join(f"{code:09b}" for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


@pytest.mark.parametrize(
    ("codes", "is_whole"),
    [
        ([256, 7, 258, 8, 257], True),  # 7 77 8
        ([7, 7, 7, 8, 257], True),  # no clear at the start
        ([256, 7, 258, 8, 256, 257], True),
        ([256, 7, 258, 8], True),  # no end
        ([256, 7, 258, 257], False),
        ([256, 7, 258, 258, 257], False),
        ([256, 7, 259, 8, 257], False),  # a code that is not there yet
        ([256, 258, 7, 8, 257], False),  # and one that would stand for itself
        ([256, 7, 258, 8, 9, 9, 9, 9], False),
    ],
)
def test_codes_of_lzw(codes: list[int], is_whole: bool) -> None:
    assert (integrity._lzw_damage(memoryview(lzw(codes)), [4]) == "") is is_whole


def test_lzw_that_starts_over_all_the_time_is_left_to_the_decoder() -> None:
    """Each start costs as much as thousands of codes: a megabyte of them took minutes."""
    assert integrity._lzw_damage(memoryview(lzw([256, 7] * 4) * 100_000), [10**6]) == ""


def test_a_jpeg_in_a_tiff_that_holds_an_unknown_marker_is_damaged() -> None:
    data = saved("TIFF", compression="jpeg")
    start, end = strips(data)
    at = (start + end) // 2
    assert reason(data[:at] + b"\xff\x8b" + data[at + 2 :]) == "truncated"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "grey BMP", "grey TIFF", "16 bits", "32 bits"])
def test_a_file_whose_rest_was_never_written_is_damaged(kind: str) -> None:
    """A copy that stopped, into a file that had its full size already: the rest is zeros."""
    image = smear()
    if kind == "16 bits":
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0].astype(np.uint16) * 200).save(buffer, "TIFF")
        data = buffer.getvalue()
    elif kind == "32 bits":
        data = saved("BMP", "RGBA")
    else:
        data = saved(kind.rsplit(maxsplit=1)[-1], "L" if "grey" in kind else "RGB")
    assert reason(data) == ""
    for share in (0.3, 0.5, 0.7):
        at = int(len(data) * share) // 4096 * 4096
        assert reason(data[:at] + bytes(len(data) - at)) == "truncated"
        assert reason(data[:at] + bytes(8192) + data[at + 8192 :]) == "truncated"


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
@pytest.mark.parametrize("black", ["below", "above", "right", "round", "label", "all", "turned"])
def test_black_parts_of_a_picture_are_no_holes(kind: str, black: str) -> None:
    image = smear()
    y, x = np.mgrid[:240, :320]
    where = {
        "below": y >= 200,
        "above": y < 40,
        "right": x >= 250,
        "round": (x - 160) ** 2 + (y - 120) ** 2 > 100**2,
        "label": (x >= 100) & (y >= 215),
        "all": y >= 0,
        "turned": np.abs(x - 160 + 0.05 * (y - 120)) + np.abs(0.1 * (y - 120)) > 90,
    }[black]
    image[where] = 0
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    assert reason(buffer.getvalue()) == ""


def test_zeros_in_a_webp_are_a_hole() -> None:
    for options in ({"quality": 90}, {"lossless": True}):
        data = saved("WEBP", **options)
        assert reason(data) == ""
        middle = len(data) // 2
        assert reason(data[:middle] + bytes(len(data) - middle)) == "truncated"
        assert reason(data[: middle - 512] + bytes(512) + data[middle:]) == "truncated"
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(buffer, "WEBP")
    assert bytes(1100) in buffer.getvalue()
    assert reason(buffer.getvalue()) == ""

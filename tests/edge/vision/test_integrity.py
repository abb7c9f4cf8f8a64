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
from rbc_edge.vision import image_file

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

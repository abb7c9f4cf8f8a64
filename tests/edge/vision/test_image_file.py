"""Image files: decoded exactly and to the end, or refused with a reason."""

import hashlib
import io
import math
import os
import struct
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image
from stand_in import scene

from rbc_edge.errors import ImageError
from rbc_edge.values import UInt8
from rbc_edge.vision import image_file, preprocess


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep(pixels: npt.NDArray[np.uint16], suffix: str) -> bytes:
    done, data = cv2.imencode(suffix, pixels)
    assert done
    return data.tobytes()


def test_a_field_carries_its_names_its_hash_and_rgb(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    data = pillow(Image.fromarray(scene()), "PNG")
    file.write_bytes(data)
    field = image_file.load_field(file, "slide", "a")
    assert (field.slide_id, field.fov, field.captured_at) == ("slide", "a", "")
    assert field.sha256 == hashlib.sha256(data).hexdigest()
    np.testing.assert_array_equal(field.image, scene())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    image, _ = image_file.decode(pillow(Image.fromarray(scene()), kind), "x")
    np.testing.assert_array_equal(image, scene())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF16"])
def test_exif_rotation_is_applied(orientation: int, kind: str) -> None:
    """EXIF 2.32, tag 0x0112: what to do with the stored pixels to see the scene upright."""
    turns: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, *range(2, a.ndim)),
        6: np.rot90,
        7: lambda a: a[::-1, ::-1].transpose(1, 0, *range(2, a.ndim)),
        8: lambda a: np.rot90(a, 3),
    }
    undo = turns[orientation]
    upright = scene()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if kind == "TIFF16":
        grey = (upright[:, :, 0].astype(np.uint16) + 1) * 200
        data = pillow(Image.fromarray(np.ascontiguousarray(undo(grey))), "TIFF", exif=exif)
        image, _ = image_file.decode(data, "x")
        assert image.shape == upright.shape
        ranks = np.argsort(image[0, :, 0], kind="stable")
        assert ranks.tolist() == list(range(60))  # brighter to the right, as in the scene
        assert (np.ptp(image, axis=0) == 0).all()
    else:
        stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
        image, _ = image_file.decode(pillow(stored, kind, exif=exif), "x")
        np.testing.assert_array_equal(image, upright)


def test_capture_time_is_iso_8601() -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    exif[ExifTags.Base.DateTime] = "2030:01:01 00:00:00"  # when it was edited: not what is asked
    picture = Image.fromarray(scene())
    assert image_file.decode(pillow(picture, "JPEG", exif=exif), "x")[1] == "2024-05-06T07:08:09"


@pytest.mark.parametrize("text", ["0000:00:00 00:00:00", "yesterday", "", "    :  :     :  :  "])
def test_a_clock_that_was_never_set_gives_no_time(text: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.DateTime] = text
    assert image_file.decode(pillow(Image.fromarray(scene()), "JPEG", exif=exif), "x")[1] == ""


def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    data = pillow(Image.fromarray(scene()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(image_file.decode(data, "x")[0], scene())


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_of_colour_keep_their_channels(suffix: str) -> None:
    stored = scene()[:, :, ::-1].astype(np.uint16) * 257
    image, _ = image_file.decode(deep(stored, suffix), "x")
    np.testing.assert_allclose(image.astype(int), scene().astype(int), atol=4)
    # And are not cut to the upper eight: a camera of 12 bits would leave the field black.
    dim, _ = image_file.decode(deep(stored // 16, suffix), "x")
    np.testing.assert_allclose(dim.astype(int), image.astype(int), atol=1)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_camera_that_fills_part_of_the_range_is_stretched(bits: int) -> None:
    full = np.tile(np.linspace(0, 2**bits - 1, 256).astype(np.uint16), (64, 1))
    image, _ = image_file.decode(deep(full, ".tif"), "x")
    assert image.shape == (64, 256, 3)
    np.testing.assert_allclose(image[0, :, 1], np.arange(256), atol=2)


def test_one_hot_pixel_does_not_darken_the_field() -> None:
    field = np.full((100, 100), 2000, np.uint16)
    field[50, 50] = 65535
    assert (image_file.decode(deep(field, ".png"), "x")[0] == 255).all()


def test_an_even_deep_field_is_not_stretched_into_noise() -> None:
    field = np.random.default_rng(0).integers(2000, 2005, (64, 64)).astype(np.uint16)
    image, _ = image_file.decode(deep(field, ".png"), "x")
    assert image.min() >= 252


def test_what_lies_under_transparency_is_shown_on_white() -> None:
    rgba = np.dstack([scene(), np.full((40, 60), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    image, _ = image_file.decode(pillow(Image.fromarray(rgba), "PNG"), "x")
    assert (image[:10] == 255).all()
    np.testing.assert_array_equal(image[10:], scene()[10:])


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK"])
def test_other_colour_modes_look_the_same(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    checks = np.kron(np.indices((4, 6)).sum(0) % 2, np.ones((10, 10)))[..., None] * [255, 255, 255]
    picture = Image.fromarray(checks.astype(np.uint8)).convert(mode)
    image, _ = image_file.decode(pillow(picture, kind), "x")
    np.testing.assert_array_equal(image, checks)


REFUSED = {
    "empty": b"",
    "not-an-image": b"GIF89a" + bytes(200),
    "truncated": pillow(Image.fromarray(scene()), "PNG")[:-100],
    "too-small": pillow(Image.fromarray(scene(15, 60)), "PNG"),
    "too-large": pillow(Image.fromarray(np.zeros((1000, 1100, 3), np.uint8)), "PNG"),
}


@pytest.mark.parametrize("reason", sorted(REFUSED))
def test_a_bad_file_says_what_is_wrong_with_which(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.png"
    file.write_bytes(REFUSED[reason])
    with pytest.raises(ImageError) as caught:
        image_file.load_field(file, "s", "bad", max_megapixels=1.0)
    assert caught.value.reason == reason
    assert str(file) in caught.value.message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PNG16", "TIFF16"])
def test_no_format_is_read_half(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    if kind.endswith("16"):
        data = deep(noise.astype(np.uint16) * 257, ".png" if kind == "PNG16" else ".tif")
    else:
        data = pillow(Image.fromarray(noise), kind)
    assert image_file.decode(data, "x")[0].shape == (64, 64, 3)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError) as caught:
            image_file.decode(data[: int(len(data) * share)], "x")
        assert caught.value.reason == "truncated"


def test_a_float_image_with_holes_is_refused_rather_than_shown_black() -> None:
    values = np.full((32, 32), 0.5, np.float32)
    values[3, 3] = np.nan
    with pytest.raises(ImageError) as caught:
        image_file.decode(pillow(Image.fromarray(values), "TIFF"), "x")
    assert caught.value.reason == "unsupported"


def test_a_file_that_went_away_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as gone:
        image_file.load_field(tmp_path / "gone.png", "s", "gone")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError) as folder:
        image_file.load_field(tmp_path / "folder.png", "s", "folder")
    assert (gone.value.reason, folder.value.reason) == ("vanished", "unreadable")


def tagged(data: bytes, tag: int, value: int, n: int = 1) -> bytes:
    """Changes a SHORT of an uncompressed little-endian TIFF's first directory (TIFF 6.0, section 2)."""
    (start,) = struct.unpack_from("<I", data, 4)
    (n_entries,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * n_entries, 12):
        if struct.unpack_from("<H", data, at) == (tag,):
            return data[:at] + struct.pack("<HHIHH", tag, 3, n, value, 0) + data[at + 12 :]
    raise AssertionError(f"no tag {tag}")


def deep_tiff(pixels: npt.NDArray[np.uint16]) -> bytes:
    done, data = cv2.imencode(".tif", pixels, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    assert done
    return data.tobytes()


@pytest.mark.parametrize(
    ("tag", "value", "words"), [(284, 2, "separate planes"), (262, 5, "neither grey nor RGB")]
)
def test_deep_colour_that_both_decoders_read_wrongly_is_refused(tag: int, value: int, words: str) -> None:
    data = deep_tiff(scene().astype(np.uint16) * 257)
    image_file.decode(data, "x")
    if tag == 262:
        data = tagged(data, 277, 4)
        data = tagged(data, 258, 16)
    with pytest.raises(ImageError, match=words) as caught:
        image_file.decode(tagged(data, tag, value), "x")
    assert caught.value.reason == "unsupported"


def test_deep_grey_with_white_as_zero_is_turned_round() -> None:
    grey = scene()[:, :, 0].astype(np.uint16) * 257
    as_usual, _ = image_file.decode(deep_tiff(grey), "x")
    turned, _ = image_file.decode(tagged(deep_tiff(65535 - grey), 262, 0), "x")
    np.testing.assert_array_equal(turned, as_usual)


def test_a_deep_image_that_lost_its_end_is_not_read_with_half_its_depth() -> None:
    """Pillow is content without the last chunk, and then gives the upper bytes: near black for 12 bits."""
    data = deep(scene().astype(np.uint16) * 16, ".png")
    with pytest.raises(ImageError, match="x: the image is cut short") as caught:
        image_file.decode(data[:-8], "x")
    assert caught.value.reason == "truncated"


def test_a_tiff_of_another_kind_is_not_called_truncated() -> None:
    data = pillow(Image.fromarray(scene()), "TIFF")
    with pytest.raises(ImageError, match="x: a kind of TIFF") as caught:
        image_file.decode(tagged(data, 262, 99), "x")
    assert caught.value.reason == "unsupported"
    with pytest.raises(ImageError) as caught:
        image_file.decode(data[:60], "x")
    assert caught.value.reason == "truncated"


def test_a_file_larger_than_any_image_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sparse.jpg"
    file.touch()
    os.truncate(file, 1 << 40)  # a terabyte of nothing takes no place on the disk
    with pytest.raises(ImageError, match=r"sparse\.jpg: 1099512 MB is more than 250 megapixels") as caught:
        image_file.load_field(file, "s", "f")
    assert caught.value.reason == "too-large"


def test_the_header_tells_how_many_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (70, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "c.jpg").write_bytes(b"no image")
    Image.new("RGB", (71, 40)).save(tmp_path / "d.jpg")

    def told(diameter: float) -> list[int]:
        names = ("a.png", "b.png", "c.jpg", "gone.jpg", "d.jpg")
        return [image_file.n_pixels(tmp_path / name, diameter) for name in names]

    assert told(math.nan) == told(80.0) == [2800, 2800, 0, 0, 2840]
    assert told(100.0) == [2800, 2800, 0, 0, 36 * 20]  # only a JPEG is decoded at a half


def test_a_large_image_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 41, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(image_file, "LARGE_PIXELS", 1)
    np.testing.assert_array_equal(image_file.load_field(tmp_path / "a.png", "s", "f").image, pixels)


def soft(height: int, width: int) -> UInt8:
    """Waves that are as long as cells: what a JPEG keeps at any of its sizes."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2)
    return np.round(128 + 90 * waves).astype(np.uint8)


@pytest.mark.parametrize(
    ("diameter", "shrunk"), [(math.nan, 1), (87.0, 1), (88.0, 2), (140.0, 2), (180.0, 4), (500.0, 8)]
)
@pytest.mark.parametrize(("height", "width"), [(480, 640), (481, 639)])
def test_a_jpeg_of_large_cells_is_decoded_at_a_part_of_its_size(
    tmp_path: Path, height: int, width: int, diameter: float, shrunk: int
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(pillow(Image.fromarray(soft(height, width)), "JPEG", quality=95))
    whole = image_file.load_field(file, "s", "a")
    field = image_file.load_field(file, "s", "a", cell_diameter_px=diameter)
    assert field.decoded.pixels.shape[:2] == (math.ceil(height / shrunk), math.ceil(width / shrunk))
    assert field.decoded.reduction == shrunk
    assert (field.width_px, field.height_px) == (whole.width_px, whole.height_px) == (width, height)
    assert field.sha256 == whole.sha256
    np.testing.assert_array_equal(image_file.full_size(field), whole.image)
    # The same is shown of it, at the same place.
    size = (width, height)
    view, of_whole = preprocess.view(field.decoded, diameter), preprocess.view(whole.image, diameter)
    assert view.size == of_whole.size == size
    np.testing.assert_allclose(view.px, of_whole.px, rtol=0.02)
    expected = cv2.resize(of_whole.plain, view.plain.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(view.plain.astype(int) - expected).mean() < 5


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_other_formats_are_decoded_in_full(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a"
    file.write_bytes(pillow(Image.fromarray(soft(64, 80)), kind))
    field = image_file.load_field(file, "s", "a", cell_diameter_px=200.0)
    np.testing.assert_array_equal(field.image, soft(64, 80))
    assert (field.width_px, field.height_px, field.decoded.file) == (80, 64, b"")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_has_its_sides_turned_at_every_size(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / "a.jpg"
    file.write_bytes(pillow(Image.fromarray(soft(200, 296)), "JPEG", exif=exif))
    whole = image_file.load_field(file, "s", "a")
    field = image_file.load_field(file, "s", "a", cell_diameter_px=100.0)
    assert (field.width_px, field.height_px) == ((296, 200) if orientation < 5 else (200, 296))
    assert (whole.width_px, whole.height_px) == (field.width_px, field.height_px)
    shape = (field.height_px // 2, field.width_px // 2, 3)
    assert field.decoded.pixels.shape == shape
    small = cv2.resize(whole.image, shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(field.decoded.pixels.astype(int) - small).mean() < 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(("height", "width"), [(240, 239), (239, 240), (241, 249), (240, 240), (248, 240)])
@pytest.mark.parametrize("diameter", [100.0, 400.0])
def test_a_turned_jpeg_keeps_its_places(
    tmp_path: Path, height: int, width: int, orientation: int, diameter: float
) -> None:
    """Sides that are no multiple of eight leave a part of a pixel over, and that is turned as well."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / "a.jpg"
    image = np.full((height, width, 3), 255, np.uint8)
    image[96:160, 64:128] = 0
    file.write_bytes(pillow(Image.fromarray(image), "JPEG", exif=exif, quality=95))
    whole = image_file.load_field(file, "s", "a")
    field = image_file.load_field(file, "s", "a", cell_diameter_px=diameter)
    assert (field.width_px, field.height_px) == (whole.width_px, whole.height_px)
    view = preprocess.view(field.decoded, diameter)
    for axis in (0, 1):
        seen, right = (255 - i[:, :, 0].astype(float).mean(axis=axis) for i in (view.plain, whole.image))
        place = ((np.arange(len(seen)) + 0.5) * seen).sum() / seen.sum() * view.px[axis]
        assert place == pytest.approx(((np.arange(len(right)) + 0.5) * right).sum() / right.sum(), abs=1.5)


@pytest.mark.parametrize("diameter", [88.0, 310.0, 1000.0, 4000.0])
@pytest.mark.parametrize(("height", "width"), [(16, 40), (17, 17), (5000, 17), (33, 2000)])
def test_a_narrow_jpeg_of_whatever_scale_is_read(
    tmp_path: Path, height: int, width: int, diameter: float
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(pillow(Image.fromarray(soft(height, width)), "JPEG"))
    field = image_file.load_field(file, "s", "a", cell_diameter_px=diameter)
    assert (field.width_px, field.height_px) == (width, height)
    pixels = field.decoded.pixels
    assert image_file.n_pixels(file, diameter) == pixels.shape[0] * pixels.shape[1]
    view = preprocess.view(field.decoded, diameter)
    for n, size, px in zip(view.image.shape[1::-1], view.size, view.px.tolist(), strict=False):
        # To the last pixel, which may lie outside by a part of itself.
        assert size <= n * px + 1e-3 < size + 2 * px


def test_a_jpeg_that_is_cut_short_is_refused_at_every_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3)).astype(np.uint8)
    data = pillow(Image.fromarray(noise), "JPEG")
    file = tmp_path / "a.jpg"
    for share in (0.3, 0.6, 0.9, 0.98):
        file.write_bytes(data[: int(len(data) * share)])
        for diameter in (math.nan, 100.0, 200.0, 400.0):
            with pytest.raises(ImageError) as caught:
                image_file.load_field(file, "s", "a", cell_diameter_px=diameter)
            assert caught.value.reason == "truncated"


def test_the_settings_of_the_host_program_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit of pixels does not apply to our images, and its limit and its warnings stay as they are."""
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 100
    )  # Pillow warns beyond it and fails beyond twice as much
    filters = list(warnings.filters)
    data = pillow(Image.fromarray(scene()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (tmp_path / "a.png").write_bytes(data)
    barrier = threading.Barrier(4)

    def read(i: int) -> bool:
        barrier.wait()
        for _ in range(20):
            with suppress(ImageError):
                image_file.decode(data[: (None, -100, 30, None)[i]], "x")
            image_file.n_pixels(tmp_path / "a.png", math.nan)
        return np.array_equal(image_file.decode(data, "x")[0], scene())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert Image.MAX_IMAGE_PIXELS == 100
    assert list(warnings.filters) == filters


def test_a_reduced_field_does_not_pass_for_a_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(pillow(Image.fromarray(soft(96, 160)), "JPEG"))
    field = image_file.load_field(file, "s", "a", cell_diameter_px=90.0)
    with pytest.raises(ValueError, match="a: decoded at 1/2 of its size"):
        _ = field.image
    assert image_file.full_size(field).shape == (96, 160, 3)
    whole = image_file.load_field(file, "s", "a")
    assert whole.image is whole.decoded.pixels
    assert whole.decoded.file == b""

"""What is in a file is shown as a whole, or refused in words: pages, channels, transparency, kinds."""

import errno
import io
import struct
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import pytest
from PIL import Image
from stand_in import disks, scene

from rbc_edge.errors import ImageError
from rbc_edge.station.inbox import scan
from rbc_edge.values import UInt8
from rbc_edge.vision import image_file

IMAGEJ: Final = "ImageJ=1.54f\nimages=3\nchannels=3\nmode=composite\n"
OME: Final = '<OME><Image><Pixels DimensionOrder="XYCZT" SizeC="3" SizeT="1" SizeZ="1"/></Image></OME>'


def pages(*images: UInt8, description: str = "", kinds: dict[int, int] | None = None) -> bytes:
    """A TIFF of several pages. `kinds`: what tag 254 says of a page."""
    buffer = io.BytesIO()
    made = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    for i, picture in enumerate(made):
        picture.encoderinfo = {"tiffinfo": {254: (kinds or {}).get(i, 0)}}
    made[0].encoderinfo["tiffinfo"][270] = description
    first, *others = made
    first.save(buffer, "TIFF", save_all=True, append_images=others, tiffinfo=first.encoderinfo["tiffinfo"])
    return buffer.getvalue()


def other_place() -> UInt8:
    rng = np.random.default_rng(1)
    return np.asarray(rng.integers(0, 255, (80, 120, 3)), np.uint8)


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        image_file.decode(data, "x")
    assert caught.value.reason == "unsupported"
    return str(caught.value)


def test_pages_of_one_size_are_not_counted_by_their_first() -> None:
    words = refused(pages(scene(), scene()[::-1], scene()[:, ::-1]))
    assert "3 pages" in words
    assert "save each page" in words


def test_each_page_of_one_size_is_a_field_of_its_own(tmp_path: Path) -> None:
    shown = scene(80, 120), other_place(), scene(80, 120)[::-1, ::-1]
    (tmp_path / "a.tif").write_bytes(pages(scene()[:20, :30], *shown))
    assert image_file.n_fields(tmp_path / "a.tif") == 3
    for i, image in enumerate(shown, 1):
        field = image_file.load_field(tmp_path / "a.tif", "s", f"a#{i}", i)
        np.testing.assert_array_equal(field.image, image)
        assert field.sha256.endswith(f"#{i}")
    with pytest.raises(ImageError, match="page 4 is not there"):
        image_file.load_field(tmp_path / "a.tif", "s", "a#4", 4)


def test_pages_of_different_sizes_or_kinds_are_refused() -> None:
    assert "different sizes" in refused(pages(scene(), scene()[:36]))
    assert "kinds of pixel" in refused(pages(scene(), scene()[:, :, 0]))


def test_channels_of_several_places_are_refused(tmp_path: Path) -> None:
    planes = [scene()[:, :, i % 3] for i in range(6)]
    data = pages(*planes, description=IMAGEJ.replace("images=3", "images=6"))
    assert "3 channels" in refused(data)
    (tmp_path / "a.tif").write_bytes(data)
    assert image_file.n_fields(tmp_path / "a.tif") == 1


def test_pages_out_of_focus_show_one_place_and_other_fields_do_not(tmp_path: Path) -> None:
    drawn = [disks(20, seed=i) for i in range(2)]
    planes = [np.asarray(cv2.GaussianBlur(drawn[0], (0, 0), s), np.uint8) for s in (1, 4, 8)]
    (tmp_path / "a.tif").write_bytes(pages(*planes, np.roll(drawn[1], (37, 31), (0, 1))))
    for i in (1, 2, 3):
        with pytest.raises(ImageError, match="same place") as caught:
            image_file.load_field(tmp_path / "a.tif", "s", "a", i)
        assert caught.value.reason == "unsupported"
    assert image_file.load_field(tmp_path / "a.tif", "s", "a", 4).width_px == 360


@pytest.mark.parametrize("first", [True, False])
def test_a_thumbnail_is_not_the_field(first: bool) -> None:
    small = scene()[::2, ::2]
    both = (small, scene()) if first else (scene(), small)
    np.testing.assert_array_equal(image_file.decode(pages(*both), "x")[0], scene())


@pytest.mark.parametrize("description", [IMAGEJ, OME])
@pytest.mark.parametrize("depth", [8, 16])
def test_three_pages_of_channels_are_one_field(description: str, depth: int) -> None:
    planes = [scene()[:, :, i] for i in range(3)]
    if depth == 16:
        planes = [plane.astype(np.uint16) * 257 for plane in planes]  # type: ignore[misc]
    image, _ = image_file.decode(pages(*planes, description=description), "x")
    np.testing.assert_allclose(image.astype(int), scene().astype(int), atol=4 if depth == 16 else 0)


@pytest.mark.parametrize("description", ["ImageJ=1.54f\nimages=3\nslices=3\n", OME.replace('Z="1"', 'Z="3"')])
def test_a_stack_of_planes_is_refused_with_advice(description: str) -> None:
    words = refused(pages(scene(), scene(), scene(), description=description))
    assert "3 focal planes" in words
    assert "sharpest" in words


def test_a_broken_list_of_pages_is_said() -> None:
    data = pages(scene())
    (start,) = struct.unpack_from("<I", data, 4)
    (n_entries,) = struct.unpack_from("<H", data, start)
    at = start + 2 + 12 * n_entries
    with pytest.raises(ImageError, match="pages") as caught:
        image_file.decode(data[:at] + struct.pack("<I", len(data) - 3) + data[at + 4 :], "x")
    assert caught.value.reason == "truncated"


def test_a_moving_picture_is_refused() -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(scene()), Image.fromarray(scene()[::-1].copy())]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    assert "2 pages" in refused(buffer.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_a_field_that_is_transparent_everywhere_is_shown_by_its_colour(kind: str) -> None:
    rgba = np.dstack([scene(), np.zeros((40, 60), np.uint8)])
    buffer = io.BytesIO()
    if kind == "BMP":  # OpenCV writes the header that tells of alpha
        done, data = cv2.imencode(".bmp", rgba[:, :, [2, 1, 0, 3]])
        assert done
        assert struct.unpack_from("<H", data.tobytes(), 28) == (32,)
        buffer.write(data.tobytes())
    else:
        Image.fromarray(rgba).save(buffer, kind)
    np.testing.assert_array_equal(image_file.decode(buffer.getvalue(), "x")[0], scene())


def test_other_names_of_jpeg_and_webp_are_images(tmp_path: Path) -> None:
    for suffix, kind in ((".jpe", "JPEG"), (".JFIF", "JPEG"), (".webp", "WEBP")):
        Image.fromarray(scene()).save(tmp_path / f"a{suffix}", kind)
    files = scan([tmp_path]).files
    assert sorted(f.path.suffix for f in files) == [".JFIF", ".jpe", ".webp"]
    for file in files:
        assert image_file.load_field(file.path, "s", "f").image.shape == scene().shape


def test_a_lossless_webp_is_exact_and_a_cut_one_is_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "WEBP", lossless=True)
    np.testing.assert_array_equal(image_file.decode(buffer.getvalue(), "x")[0], scene())
    with pytest.raises(ImageError) as caught:
        image_file.decode(buffer.getvalue()[:-40], "x")
    assert caught.value.reason == "truncated"


def test_libtiff_says_nothing_by_itself_and_speaks_again_afterwards(
    capfd: pytest.CaptureFixture[str],
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(disks(9)).save(buffer, "TIFF", compression="lzma")
    data = buffer.getvalue()
    broken = data[:300] + bytes(255 - b for b in data[300:320]) + data[320:]
    with pytest.raises(ImageError):
        image_file.decode(broken, "x")
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match=r"decoder error|-2"):  # a number by an older Pillow
        Image.open(io.BytesIO(broken)).load()
    assert "LZMADecode" in capfd.readouterr().err


def test_a_broken_disk_is_not_a_question_of_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").touch()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(ImageError, match="disk or the card") as caught:
        image_file.load_field(tmp_path / "a.png", "s", "a")
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    "notes", ["ImageJ=1.54f\nimages=9\nframes=9\n", '{"shape": [9, 40, 60, 3], "truncated": true}']
)
def test_images_behind_the_list_of_pages_are_not_passed_over(notes: str) -> None:
    """ImageJ lists one page of a stack of more than 4 GB. The others follow it in the file."""
    assert "more images than its list of pages" in refused(pages(scene(), description=notes))
    whole = notes.replace("images=9", "images=1").replace("true", "false").replace("frames=9", "")
    np.testing.assert_array_equal(image_file.decode(pages(scene(), description=whole), "x")[0], scene())


def test_one_channel_of_several_is_no_field() -> None:
    notes = OME.replace("XYCZT", "XYZTC")
    assert "one channel of 3" in refused(pages(scene()[:, :, 0], description=notes))
    np.testing.assert_array_equal(image_file.decode(pages(scene(), description=notes), "x")[0], scene())


@pytest.mark.parametrize("alpha", [0, 1, 128, 255])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_value_of_alpha_everywhere_shows_nothing(kind: str, alpha: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([scene(), np.full(scene().shape[:2], alpha, np.uint8)])).save(buffer, kind)
    np.testing.assert_array_equal(image_file.decode(buffer.getvalue(), "x")[0], scene())

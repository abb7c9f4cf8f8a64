"""HEIC is read by an extra, by content and not by name; without the extra it is refused with advice."""

import io
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from stand_in import encoded, scene

from rbc_edge.errors import ImageError
from rbc_edge.station.inbox import scan
from rbc_edge.vision import image_file, integrity

HEAD = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"


class HeifImageFile(PngImagePlugin.PngImageFile):
    """Stands in for the library's class: a PNG behind the head of a HEIC."""

    format = "HEIF"
    n_images = 1

    def __init__(self, fp: Any) -> None:
        assert fp.read(len(HEAD)) == HEAD
        super().__init__(io.BytesIO(fp.read()))
        self.n_frames = self.n_images


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pillow_heif")
    module.__spec__ = ModuleSpec("pillow_heif", None)
    vars(module)["HeifImageFile"] = HeifImageFile
    monkeypatch.setitem(sys.modules, "pillow_heif", module)


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "find_spec", lambda _: None)


def test_with_the_extra_heic_is_an_image_like_others(extra: None, tmp_path: Path) -> None:
    for name in ("a.heic", "b.HIF", "c.jpg"):  # phones name it .jpg as well
        (tmp_path / name).write_bytes(HEAD + encoded(scene()))
    found = scan([tmp_path])
    assert ([f.path.name for f in found.files], found.other.kinds) == (["a.heic", "b.HIF", "c.jpg"], {})
    for file in found.files:
        np.testing.assert_array_equal(image_file.load_field(file.path, "s", file.fov).image, scene())
        assert image_file.n_pixels(file.path, 80.0) == scene().shape[0] * scene().shape[1]
    assert "HEIF" not in Image.OPEN  # the host program's Pillow is as before


def test_without_the_extra_it_is_a_kind_that_is_not_read(no_extra: None, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(HEAD)
    assert scan([tmp_path], go_on=True).other.kinds == {".heic": 1}
    with pytest.raises(
        ImageError, match=r"HEIC or HEIF, which is not read here .*rbc-edge\[heic\]"
    ) as caught:
        image_file.decode(HEAD, "x.jpg")
    assert caught.value.reason == "unsupported"


def test_an_extra_that_cannot_be_loaded_is_no_fault_of_the_image(
    extra: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del sys.modules["pillow_heif"].HeifImageFile
    with pytest.raises(ImageError) as caught:
        image_file.decode(HEAD, "x")
    assert isinstance(caught.value.__cause__, ImportError)  # so `errors.machine_trouble` knows it


def test_several_images_in_one_file_are_not_counted_by_one(
    extra: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeifImageFile, "n_images", 3)
    monkeypatch.setattr(HeifImageFile, "seek", lambda self, page: None)
    with pytest.raises(ImageError, match="3 pages"):
        image_file.decode(HEAD + encoded(scene()), "x")


def test_the_library_itself() -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    buffer = io.BytesIO()
    field = np.repeat(np.repeat(scene(), 4, axis=0), 4, axis=1)
    heif.from_pillow(Image.fromarray(field)).save(buffer, quality=95)
    image, _ = image_file.decode(buffer.getvalue(), "x")
    assert np.abs(image.astype(int) - field).mean() < 3
    for part in (0.3, 0.6, 0.95):
        with pytest.raises(ImageError) as caught:
            image_file.decode(buffer.getvalue()[: int(part * len(buffer.getvalue()))], "x")
        assert caught.value.reason == "truncated"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def heic(*units: bytes, exif: bytes = bytes(4000), version: int = 0) -> bytes:
    """A file of one coded picture and of EXIF, as far as it is checked."""
    picture = b"".join(struct.pack(">I", len(unit)) + unit for unit in units)
    infos = [
        box(b"infe", b"\2\0\0\0" + struct.pack(">HH4s", i, 0, kind))
        for i, kind in ((1, b"hvc1"), (2, b"Exif"))
    ]
    head = box(b"ftyp", b"heic\0\0\0\0mif1heic")
    for start in (0, len(head) + 300):  # of the content, which follows
        places = b"".join(
            struct.pack(">H", i) + bytes(4 if version else 2) + struct.pack(">HII", 1, place, length)
            for i, place, length in ((1, start, len(picture)), (2, start + len(picture), len(exif)))
        )
        located = box(b"iloc", bytes([version, 0, 0, 0, 0x44, 0]) + struct.pack(">H", 2) + places)
        meta = box(b"meta", bytes(4) + box(b"iinf", bytes(4) + b"\0\2" + b"".join(infos)) + located)
    return (head + meta).ljust(len(head) + 292, b"\0") + box(b"mdat", picture + exif)


@pytest.mark.parametrize("version", [0, 1])
def test_a_hole_in_a_coded_picture_is_seen_and_zeros_beside_it_are_none(version: int) -> None:
    unit = bytes(range(1, 256)) * 20 + b"\0\0\3\1"
    assert integrity.damage(heic(unit, unit, version=version), {}, 0) == ""
    for broken in (unit[:900] + bytes(512) + unit[1412:], unit[:9] + b"\0\0\1" + unit[12:]):
        assert "no coder writes" in integrity.damage(heic(unit, broken, version=version), {}, 0)
    data = heic(unit, unit, version=version)
    at = data.index(struct.pack(">I", len(unit)) + unit)
    assert "no coder writes" in integrity.damage(data[:at] + b"\x7f" + data[at + 1 :], {}, 0)
    for n in range(0, len(data), 7):
        integrity.damage(data[:n], {}, 0)  # and no error

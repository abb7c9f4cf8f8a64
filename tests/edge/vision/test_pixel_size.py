"""What a file says of its pixels is a scale where a microscope can have it, and the cells agree."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from rbc_edge.ops.synthetic import DrawnField
from rbc_edge.values import FieldOfView, Scale, ScaleSource
from rbc_edge.vision import image_file
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.pixel_size import MAX_UM, MIN_UM, pixel_um

OME = '<?xml version="1.0"?><OME><Image><Pixels SizeC="3" {}/></Image></OME>'


def tiff(description: str = "", **tags: Any) -> bytes:
    numbers = {"x": 282, "y": 283, "unit": 296}
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if description:
        info[270] = description.encode()
    for name, value in tags.items():
        info[numbers[name]] = value
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(buffer, "TIFF", tiffinfo=info)
    return buffer.getvalue()


def png(dots_per_m: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(buffer, "PNG", dpi=(dots_per_m * 0.0254,) * 2)
    return buffer.getvalue()


def ome(value: float, unit: str | None = "µm", y: float | None = None) -> bytes:
    sizes = f'PhysicalSizeX="{value}" PhysicalSizeY="{y or value}"'
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    return tiff(OME.format(sizes + units))


@pytest.mark.parametrize(
    "data",
    [
        ome(0.2),
        ome(0.2, None),
        ome(200, "nm"),
        ome(0.0002, "mm"),
        ome(0.2, "&#181;m"),
        tiff("ImageJ=1.54f\nunit=micron\n", x=5.0, y=5.0, unit=1),
        tiff("ImageJ=1.54f\nunit=\\u00B5m\n", x=5.0, y=5.0, unit=1),
        tiff(x=50_000.0, y=50_000.0, unit=3),
        tiff(x=127_000.0, y=127_000.0, unit=2),
        png(5_000_000),
    ],
)
def test_each_way_of_saying_it_is_understood(data: bytes) -> None:
    assert pixel_um(data) == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    "data",
    [
        *(tiff(x=dpi, y=dpi, unit=2) for dpi in (72.0, 96.0, 300.0, 1200.0)),
        tiff(x=28.35, y=28.35, unit=3),
        tiff(x=50_000.0, y=25_000.0, unit=3),  # a pixel that is twice as long as wide
        tiff(x=5.0, y=5.0, unit=1),  # no unit
        tiff("ImageJ=1.54f\nunit=pixel\n", x=5.0, y=5.0, unit=1),
        tiff(x=0.0, y=0.0, unit=3),
        tiff(),
        ome(0.2, "parsec"),
        ome(0.2, y=0.4),
        ome(5.0),
        ome(math.nan),
        *map(png, (2835, 3780, 11811)),
        b"II*\0",
        b"\x89PNG\r\n\x1a\n",
        b"",
    ],
)
def test_what_no_microscope_has_is_not_believed(data: bytes) -> None:
    assert math.isnan(pixel_um(data))


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda end: ome(0.2)[:-300] + end))
def test_whatever_a_file_holds_it_is_a_plausible_size_or_none(data: bytes) -> None:
    said = pixel_um(data)
    assert math.isnan(said) or MIN_UM <= said <= MAX_UM


def test_a_jpeg_is_not_asked(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.jpg", dpi=(65_000, 65_000))
    assert math.isnan(image_file.load_field(tmp_path / "a.jpg", "s", "a").um_per_px)
    (tmp_path / "a.tif").write_bytes(ome(0.2))
    assert image_file.load_field(tmp_path / "a.tif", "s", "a").um_per_px == 0.2


def test_it_takes_the_place_of_an_estimate_that_agrees_and_is_noted_where_it_does_not(
    toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...]
) -> None:
    analyzer = Analyzer(Bundle.open(toy_bundle_path), threads=1)
    drawn = max(drawn_fields, key=lambda drawn: drawn.counts.n_rbc)
    silent, slide = FieldOfView.of(drawn.image), Scale(40.0, ScaleSource.SLIDE)
    agreeing, other = (replace(silent, um_per_px=7.5 / px) for px in (42.0, 80.0))
    before = analyzer.analyze(silent, slide)
    assert "pixel-size" not in before.flags
    used = analyzer.analyze(agreeing, slide)
    assert used.scale.source is ScaleSource.METADATA
    assert used.scale.cell_diameter_px == pytest.approx(42.0)
    assert "pixel-size" not in used.flags
    kept = analyzer.analyze(other, slide)
    assert kept.scale == before.scale
    assert kept.n_rbc == before.n_rbc
    assert set(kept.flags) - set(before.flags) == {"pixel-size"}
    given_px = Scale(40.0, ScaleSource.CELL_DIAMETER)
    assert analyzer.analyze(other, given_px).scale == given_px
    assert "pixel-size" not in analyzer.analyze(other, given_px).flags
    # Another objective than the rest of the slide, as the file says, and as its cells show.
    assert "pixel-size" not in analyzer.analyze(agreeing, Scale(120.0, ScaleSource.SLIDE)).flags

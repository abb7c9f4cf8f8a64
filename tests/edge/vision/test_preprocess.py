"""Light, scale, tiles and crops: what every model is fed, so exactness is asked for."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import scene

from conftest import WriteImage
from rbc_edge.ops.synthetic import CREAM, draw_field
from rbc_edge.values import CellClass, Scale, ScaleSource
from rbc_edge.vision import image_file, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle


def test_rescale_rounds_each_side_and_never_to_nothing() -> None:
    image = scene(41, 61)
    assert preprocess.rescale(image, 1.0) is image
    assert preprocess.rescale(image, 0.5).shape == (20, 30, 3)
    assert preprocess.rescale(image, 2.5).shape == (102, 152, 3)
    assert preprocess.rescale(image, 0.001).shape == (1, 1, 3)


def test_shrinking_averages_so_that_a_thin_gap_stays_visible() -> None:
    image = np.full((40, 40, 3), 100, np.uint8)
    image[:, 19] = 255  # one pixel of background between two cells
    assert (preprocess.rescale(image, 0.25)[:, :, 0].max(axis=1) > 125).all()


@pytest.mark.parametrize("size", [(640, 640), (641, 100), (1200, 900), (4000, 3000), (17, 1300)])
def test_tiles_cover_the_field_and_their_cores_are_disjoint(size: tuple[int, int]) -> None:
    width, height = size
    tiles = list(preprocess.tiles(width, height))
    for tile in tiles:
        assert 0 <= tile.x0 < tile.x1 <= width
        assert 0 <= tile.y0 < tile.y1 <= height
        assert tile.x1 - tile.x0 <= preprocess.TILE_PX
        assert tile.y1 - tile.y0 <= preprocess.TILE_PX
    # A point in the field and one outside belong to exactly one core each.
    for x, y in itertools.product(np.linspace(-5, width + 5, 97), np.linspace(-5, height + 5, 89)):
        owners = [t for t in tiles if t.core[0] <= x < t.core[2] and t.core[1] <= y < t.core[3]]
        assert len(owners) == 1
        # A white cell around it, twice a red one, is whole in its owner's window, or cut by the field.
        (t,) = owners
        reach = preprocess.TILE_OVERLAP_PX / 2 - 1
        assert t.x0 <= max(0.0, x - reach)
        assert t.x1 >= min(width, x + reach)
        assert t.y0 <= max(0.0, y - reach)
        assert t.y1 >= min(height, y + reach)


def test_a_small_field_is_one_tile() -> None:
    (tile,) = preprocess.tiles(640, 480)
    assert (tile.x0, tile.y0, tile.x1, tile.y1) == (0, 0, 640, 480)
    assert tile.core == (-math.inf, -math.inf, math.inf, math.inf)


@pytest.mark.parametrize(("height", "width"), [(33, 64), (56, 57), (1, 1), (184, 244)])
def test_padding_lies_on_every_side(height: int, width: int) -> None:
    image = scene(height, width)
    padded, left, top = preprocess.pad_to_stride(image)
    assert padded.shape[0] % 32 == 0 and padded.shape[1] % 32 == 0
    right, below = padded.shape[1] - width - left, padded.shape[0] - height - top
    assert min(left, top, right, below) >= preprocess.MIN_PAD_PX
    assert max(right - left, below - top) <= 1
    np.testing.assert_array_equal(padded[top : top + height, left : left + width], image)
    padded[top : top + height, left : left + width] = preprocess.PAD_VALUE
    assert (padded == preprocess.PAD_VALUE).all()


def test_a_crop_of_64_px_is_the_pixels_themselves() -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3)).astype(np.uint8)
    box = np.array([[20, 10, 84, 74]], np.float32)
    np.testing.assert_array_equal(preprocess.crops(image, box, margin=0.0)[0], image[10:74, 20:84])
    inner = np.array([[36, 26, 68, 58]], np.float32)  # 32 px and half of it on each side
    np.testing.assert_array_equal(preprocess.crops(image, inner, margin=0.5)[0], image[10:74, 20:84])


def test_a_crop_at_the_border_is_padded_where_the_field_ends() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    boxes = np.array([[-32, 0, 32, 64], [0, 32, 64, 96], [500, 500, 520, 520], [-50, -50, -10, -10]])
    left, below, away, before = preprocess.crops(image, boxes.astype(np.float32), margin=0.0)
    assert (left[:, :32] == preprocess.PAD_VALUE).all()
    assert (left[:, 32:] == 200).all()
    assert (below[:32] == 200).all()
    assert (below[32:] == preprocess.PAD_VALUE).all()
    assert (away == preprocess.PAD_VALUE).all()
    assert (before == preprocess.PAD_VALUE).all()


def test_crops_of_nothing_and_of_a_box_without_area() -> None:
    assert preprocess.crops(scene(), np.zeros((0, 4), np.float32), margin=0.25).shape == (0, 64, 64, 3)
    (point,) = preprocess.crops(scene(), np.array([[10, 10, 10, 10]], np.float32), margin=0.25)
    np.testing.assert_array_equal(point, np.broadcast_to(scene()[10, 10], (64, 64, 3)))


@pytest.mark.parametrize("box", [(40, 30, 90, 80), (-20, -20, 33, 41), (100, 150, 500, 500)])
def test_a_part_of_a_view_shows_its_box_where_it_lies(box: tuple[int, int, int, int]) -> None:
    """The view is half as large as the field, and a column and a row of its last pixels are not full."""
    field = scene(161, 201)
    view = preprocess.view(field, 100.0)
    assert view.image.shape == (80, 100, 3)
    part, corner = view.part(np.array(box, np.float32))
    x0, y0, *_ = np.rint(corner / view.px).astype(np.int64).tolist()
    height, width = part.image.shape[:2]
    np.testing.assert_array_equal(part.image, view.image[y0 : y0 + height, x0 : x0 + width])
    np.testing.assert_array_equal(part.plain, view.plain[y0 : y0 + height, x0 : x0 + width])
    low, high = corner[:2], corner[:2] + np.array([width, height]) * view.px[:2]
    assert (low <= np.maximum(box[:2], 0)).all()
    assert (low > np.array(box[:2]) - view.px[:2]).all() or min(box[:2]) < 0
    assert (high >= np.minimum(box[2:], view.size) - 1e-3).all()
    assert (high < np.array(box[2:]) + view.px[2:]).all()
    assert (np.array(part.size) >= high - low - 1e-3).all()


def test_a_crop_is_stretched_apart_in_width_and_height() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[40:60, 10:90] = 255
    (crop,) = preprocess.crops(image, np.array([[10, 40, 90, 60]], np.float32), margin=0.0)
    assert (crop == 255).all()


@pytest.mark.parametrize("cast", [(1.0, 1.0, 1.0), (0.45, 0.45, 0.45), (0.75, 0.9, 1.1), (1.05, 1.0, 0.6)])
def test_balance_takes_lamp_and_cast_away(cast: tuple[float, float, float]) -> None:
    plain = np.full((120, 160, 3), 220, np.uint8)
    plain[40:80, 50:90] = (180, 90, 110)
    seen = np.clip(plain * np.array(cast), 0, 255).astype(np.uint8)
    balanced = preprocess.balance(seen)
    assert np.abs(balanced[0, 0].astype(int) - round(preprocess.BACKGROUND_LEVEL)).max() <= 1
    expected = np.array((180, 90, 110)) / 220 * preprocess.BACKGROUND_LEVEL
    assert np.abs(balanced[60, 70] - expected).max() <= 4  # what rounding at less light leaves
    assert seen[60, 70].tolist() != balanced[60, 70].tolist()


def test_balance_makes_no_image_of_a_black_field() -> None:
    dark = np.random.default_rng(0).integers(0, 4, (64, 64, 3), np.uint8)
    assert preprocess.balance(dark).max() <= 12


def test_balance_of_an_even_field_leaves_it_even() -> None:
    balanced = preprocess.balance(np.full((40, 50, 3), (200, 210, 190), np.uint8))
    assert (balanced == round(preprocess.BACKGROUND_LEVEL)).all()


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 3), (100, 81, 3), (33, 64, 1)])
@pytest.mark.parametrize("percent", [0, 5, 50, 95, 99.9, 100])
def test_percentiles_are_numpys(shape: tuple[int, int, int], percent: float) -> None:
    values = np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)
    expected = np.percentile(values.reshape(-1, shape[2]), percent, axis=0)
    np.testing.assert_allclose(preprocess.percentile(values, percent), expected, atol=1e-9)


def input_pixels(width: int, height: int, factor: float) -> int:
    image = np.zeros((max(1, round(height * factor)), max(1, round(width * factor)), 3), np.uint8)
    return preprocess.pad_to_stride(image)[0].size


def test_a_snug_field_gives_up_little_and_never_takes_more() -> None:
    random = np.random.default_rng(0)
    saved = 0
    for _ in range(300):
        width, height = random.integers(16, 2000, 2).tolist()
        factor = float(random.uniform(0.05, 1.0) * min(1, preprocess.TILE_PX / max(width, height)))
        snug = preprocess.snug(width, height, factor)
        assert factor / preprocess.SNUG <= snug <= factor
        before, after = input_pixels(width, height, factor), input_pixels(width, height, snug)
        assert after < before or snug == factor
        saved += after < before
    assert saved > 100


def test_a_field_of_several_tiles_keeps_its_factor() -> None:
    assert preprocess.snug(5472, 3648, 0.4) == 0.4


class Recorder:
    """Passes calls on to a session of ONNX Runtime and keeps their inputs."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs: list[dict[str, Any]] = []

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
        self.inputs.append(inputs)
        return self.session.run(outputs, inputs)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("diameter", [100.0, 33.0])
def test_training_shows_the_networks_the_bytes_that_the_station_shows(
    toy_bundle_path: Path, tmp_path: Path, write_image: WriteImage, suffix: str, diameter: float
) -> None:
    drawn = draw_field(
        np.random.default_rng(3), width_px=640, height_px=480, cell_diameter_px=diameter, stain=CREAM
    )
    file = write_image(tmp_path / f"a{suffix}", drawn.image)
    analyzer = Analyzer(Bundle.open(toy_bundle_path), threads=1)
    analyzer.detector._session = detector = Recorder(analyzer.detector._session)
    analyzer.classifier._session = classifier = Recorder(analyzer.classifier._session)
    field = image_file.load_field(file, "s", "a", cell_diameter_px=diameter)
    found = analyzer.analyze(field, Scale(diameter, ScaleSource.CELL_DIAMETER)).cells.detections

    manifest = analyzer.bundle.manifest
    view = preprocess.view(field.decoded, diameter)
    shown = preprocess.detector_input(view, diameter, manifest.cell_diameter_px)
    (tile, *_) = preprocess.tiles(*shown.shape[1::-1])
    window, _, _ = preprocess.pad_to_stride(shown[tile.y0 : tile.y1, tile.x0 : tile.x1])
    np.testing.assert_array_equal(detector.inputs[0]["image"][0], window)
    if diameter == 100.0:
        assert window.shape == (192, 256, 3)  # the field 248 wide, although 640 * 0.4 is 256: see `snug`
    red = found.xyxy[found.class_id == CellClass.RBC]
    crops = preprocess.cell_crops(view, red, margin=manifest.crop_margin)
    assert len(crops) > 3
    np.testing.assert_array_equal(np.concatenate([i["crops"] for i in classifier.inputs]), crops)


@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), x=st.floats(-50, 3050), y=st.floats(-50, 3050)
)
def test_every_place_belongs_to_one_tile(width: int, height: int, x: float, y: float) -> None:
    owners = [
        t
        for t in preprocess.tiles(width, height)
        if t.core[0] <= x < t.core[2] and t.core[1] <= y < t.core[3]
    ]
    assert len(owners) == 1


@given(width=st.integers(16, 700), height=st.integers(16, 700), diameter=st.floats(4.0, 400.0))
@settings(deadline=None, max_examples=50)
def test_a_view_leaves_cells_as_large_as_a_crop_needs(width: int, height: int, diameter: float) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    view = preprocess.view(image, diameter)
    n = view.image.shape[1]
    assert view.size == (width, height)
    if n > 20:  # else the rounding to whole pixels is more than the rule
        assert diameter / view.px[0] > 0.97 * min(diameter, image_file.MIN_CELL_PX)
    assert abs(n * float(view.px[0]) - width) < 0.01

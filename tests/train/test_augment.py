"""Variation and pasted neighbours: same chance, same image; labels that stay true."""

import random

import cv2
import numpy as np
import pytest
from tiny_data import photograph

from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.values import Float32, UInt8
from rbc_edge.vision.preprocess import BACKGROUND_LEVEL
from rbc_train.augment import _restained, burned_in, empty_glass, paste_neighbour, surrounded, vary


@pytest.fixture(scope="module")
def drawn() -> DrawnField:
    """Cells far from each other."""
    return draw_field(
        np.random.default_rng(1), width_px=400, height_px=300, cell_diameter_px=40.0, n_single=6,
        group_sizes=(), n_wbc=0, n_platelets=0, stain=CREAM, illumination=0.0,
    )  # fmt: skip


def test_variation_keeps_shape_and_input_and_depends_on_chance_alone() -> None:
    image = photograph(0).image
    before = image.copy()
    outcomes = []
    for seed in range(30):
        varied = vary(image, random.Random(seed))
        assert varied.shape == image.shape
        assert varied.dtype == np.uint8
        np.testing.assert_array_equal(varied, vary(image, random.Random(seed)))
        outcomes.append(varied.tobytes())
    np.testing.assert_array_equal(image, before)
    assert len(set(outcomes)) > 25


def test_variation_moves_nothing() -> None:
    """Boxes stay true: what is small stays where it was, whatever the light around it does."""

    def detail(image: UInt8) -> Float32:
        grey = image.mean(axis=2, dtype=np.float32)
        return np.asarray(cv2.GaussianBlur(grey, (0, 0), 2) - cv2.GaussianBlur(grey, (0, 0), 15), np.float32)

    image = photograph(0).image
    shifted = np.roll(image, 12, axis=1)
    for seed in range(30):
        varied = detail(vary(image, random.Random(seed))).ravel()
        same = np.corrcoef(detail(image).ravel(), varied)[0, 1]
        assert same > 0.8
        assert same > np.corrcoef(detail(shifted).ravel(), varied)[0, 1] + 0.2


def whole(drawn: DrawnField) -> list[int]:
    inside = (drawn.xyxy[:, :2] > 2).all(1) & (drawn.xyxy[:, 2:] < [398, 298]).all(1)
    return np.flatnonzero(inside).tolist()


def test_a_pasted_neighbour_comes_with_the_cells_own_box(drawn: DrawnField) -> None:
    cells = whole(drawn)
    assert len(cells) >= 3
    before = drawn.image.copy()
    for seed in range(20):
        rng = random.Random(seed)
        image, box = paste_neighbour(
            drawn.image, drawn.xyxy[cells[0]], drawn.image, drawn.xyxy[cells[1 + seed % 2]], 0.3, rng
        )
        assert image.dtype == np.uint8
        np.testing.assert_allclose(
            box[2:] - box[:2], drawn.xyxy[cells[0], 2:] - drawn.xyxy[cells[0], :2], atol=1e-4
        )
        x0, y0 = (drawn.xyxy[cells[0], :2] - box[:2]).round().astype(int)
        plain = drawn.image[y0 : y0 + image.shape[0], x0 : x0 + image.shape[1]]
        changed = np.abs(plain.astype(int) - image.astype(int)).max(axis=2) > 12
        assert changed.any()
        again, _ = paste_neighbour(
            drawn.image,
            drawn.xyxy[cells[0]],
            drawn.image,
            drawn.xyxy[cells[1 + seed % 2]],
            0.3,
            random.Random(seed),
        )
        np.testing.assert_array_equal(again, image)
    np.testing.assert_array_equal(drawn.image, before)  # the photograph itself is drawn from again


@pytest.mark.parametrize(("depth", "touches"), [(0.45, True), (-0.25, False)])
def test_a_neighbour_lies_over_the_cell_or_beside_it(drawn: DrawnField, depth: float, touches: bool) -> None:
    """What the label of a pasted crop rests on."""
    cells = whole(drawn)
    over = []
    for seed in range(30):
        image, box = paste_neighbour(
            drawn.image, drawn.xyxy[cells[0]], drawn.image, drawn.xyxy[cells[1]], depth, random.Random(seed)
        )
        x0, y0 = (drawn.xyxy[cells[0], :2] - box[:2]).round().astype(int)
        plain = drawn.image[y0 : y0 + image.shape[0], x0 : x0 + image.shape[1]]
        changed = np.abs(plain.astype(int) - image.astype(int)).max(axis=2) > 12
        yy, xx = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
        centre, radius = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        inside = ((xx - centre[0]) / radius[0]) ** 2 + ((yy - centre[1]) / radius[1]) ** 2 < 0.9
        over.append(bool((changed & inside).sum() > 5))
    assert np.mean(over) > 0.9 if touches else np.mean(over) < 0.1


def test_a_cell_at_the_border_and_one_of_another_camera(drawn: DrawnField) -> None:
    corner = np.array([0, 0, 30, 30], np.float32)
    large = np.array([0, 0, 200, 160], np.float32)
    for box, donor in (
        (corner, drawn.xyxy[0]),
        (drawn.xyxy[0], corner),
        (drawn.xyxy[0], large),
        (corner, large),
    ):
        for seed in range(10):
            image, own = paste_neighbour(drawn.image, box, drawn.image, donor, 0.2, random.Random(seed))
            assert (own >= -1e-3).all()
            assert own[2] <= image.shape[1] + 1
            assert own[3] <= image.shape[0] + 1


def test_another_dye_leaves_glass_and_darkens_or_pales_what_is_stained() -> None:
    """Beer-Lambert: no dye, nothing absorbed, however strong the stain."""
    glass = BACKGROUND_LEVEL / 255
    values = np.full((4, 6, 3), glass, np.float32)
    values[:, 3:] = (0.6, 0.3, 0.5)
    lighter = darker = bare = 0
    for seed in range(40):
        restained = _restained(values, random.Random(seed))
        assert ((restained[:, :3] > 0.92 * glass) & (restained[:, :3] < 1.001 * glass)).all()
        bare += bool(np.allclose(restained[:, :3], glass, rtol=1e-5))
        assert (restained[:, 3:] < restained[:, :3]).all() and (restained > 0).all()
        lighter += bool((restained[0, 3] > values[0, 3]).all())
        darker += bool((restained[0, 3] < values[0, 3]).all())
    assert lighter > 10 and darker > 10
    assert 20 < bare < 40  # the others have plasma on their glass


def test_what_is_burned_in_covers_little_and_moves_nothing(drawn: DrawnField) -> None:
    changed = []
    for seed in range(30):
        image = burned_in(drawn.image, random.Random(seed))
        assert image.shape == drawn.image.shape
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, burned_in(drawn.image, random.Random(seed)))
        changed.append(float((image != drawn.image).any(axis=2).mean()))
    assert max(changed) < 0.1
    assert sum(c > 0 for c in changed) > 20


def test_empty_glass_shows_no_cell() -> None:
    """No dark body as large as a cell of 40 px."""
    for seed in range(20):
        image = empty_glass(200, 240, random.Random(seed))
        assert image.shape == (200, 240, 3)
        assert image.dtype == np.uint8
        dark = (image.min(axis=2) < 0.8 * np.median(image)).astype(np.uint8)
        opened = cv2.morphologyEx(dark, cv2.MORPH_OPEN, np.ones((15, 15), np.uint8))
        assert opened.sum() == 0


def test_through_an_eyepiece_boxes_hold_what_is_still_seen(drawn: DrawnField) -> None:
    cut = hidden = 0
    for seed in range(30):
        image, boxes, seen = surrounded(drawn.image, drawn.xyxy, random.Random(seed))
        lit = (image == drawn.image).all(axis=2)
        assert (image[~lit].max(axis=1) <= 20).all()
        for box, own, is_seen in zip(drawn.xyxy, boxes, seen, strict=True):
            x0, y0, x1, y1 = np.round(own).astype(int)
            if not is_seen:
                hidden += 1
                bx = np.round(box).astype(int)
                assert lit[bx[1] : bx[3], bx[0] : bx[2]].mean() < 0.1
                continue
            assert (own[:2] >= box[:2] - 1).all() and (own[2:] <= box[2:] + 1).all()
            rows, columns = np.nonzero(lit[y0:y1, x0:x1])
            assert rows.min() == 0 and columns.min() == 0  # nothing black beyond what is seen
            cut += bool((own != box).any())
    assert cut > 5 and hidden > 2


def test_an_image_without_boxes_can_be_surrounded(drawn: DrawnField) -> None:
    image, boxes, seen = surrounded(drawn.image, np.zeros((0, 4), np.float32), random.Random(1))
    assert image.shape == drawn.image.shape
    assert boxes.shape == (0, 4) and len(seen) == 0

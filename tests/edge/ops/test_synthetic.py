"""The drawn smears: is their truth the truth of the pixels?"""

import cv2
import numpy as np
import pytest

from rbc_edge.ops import synthetic
from rbc_edge.ops.synthetic import CREAM, GREY, ROSE, DrawnField, Stain, draw_field, draw_slide
from rbc_edge.values import Bool, CellClass, Float32

SEEDS = (0, 1, 2, 3)


def plain(seed: int, **kwargs: object) -> DrawnField:
    """A field without noise, blur or uneven light: its pixels show the geometry."""
    settings: dict[str, object] = {
        "illumination": 0.0,
        "noise": 0.0,
        "blur_px": 0.0,
        "stain": CREAM,
        **kwargs,
    }
    return draw_field(np.random.default_rng(seed), **settings)  # type: ignore[arg-type]


def meeting(a: Float32, b: Float32, scale: int) -> tuple[float, float]:
    """How deep two outlines overlap and how far apart they are, px: a second opinion on the geometry.

    Measured on masks that OpenCV draws `scale` times enlarged, not computed on the polygons.
    """
    both = np.concatenate([a, b])
    origin = np.floor(both.min(axis=0)) - 2
    width, height = ((both.max(axis=0) - origin + 2) * scale).astype(int).tolist()
    drawn = []
    for outline in (a, b):
        canvas = np.zeros((height, width), np.uint8)
        cv2.fillPoly(canvas, [np.round((outline - origin) * scale).astype(np.int32)], 1)
        drawn.append(canvas)
    lens = cv2.distanceTransform(cv2.bitwise_and(drawn[0], drawn[1]), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    away = cv2.distanceTransform(1 - drawn[0], cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return 2 * float(lens.max()) / scale, float(away[drawn[1] > 0].min()) / scale


def dark(field: DrawnField, stain: Stain, share: float) -> Bool:
    """Pixels that absorb at least a share of what a red cell's rim does."""
    absorbance = -np.log(np.maximum(field.image[..., 1], 1) / np.float32(stain.background[1]))
    return np.asarray(absorbance > share * stain.red[1])


def filled(field: DrawnField) -> Bool:
    """Pixels with their centre in an outline."""
    h, w = field.image.shape[:2]
    canvas = np.zeros((h * 16, w * 16), np.uint8)
    for outline in field.outlines:
        cv2.fillPoly(canvas, [np.round(outline * 16).astype(np.int32)], 1)
    return canvas[8::16, 8::16].astype(bool)


@pytest.mark.parametrize("stain", [GREY, CREAM, ROSE], ids=["grey", "cream", "rose"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dark_pixels_are_the_outlines(seed: int, stain: Stain) -> None:
    field = plain(seed, stain=stain, n_wbc=0, n_platelets=0)
    truth, seen = filled(field), dark(field, stain, 0.5)
    assert (seen & ~truth).sum() < 0.01 * truth.sum()
    depth = cv2.distanceTransform(truth.astype(np.uint8), cv2.DIST_L2, 5)
    rim = (depth > 1) & (depth < 10)  # within: the centre of a cell may be as pale as the background
    assert (rim & ~seen).sum() < 0.02 * rim.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_are_the_outlines_cut_at_the_border(seed: int) -> None:
    field = draw_field(np.random.default_rng(seed))
    for box, outline in zip(field.xyxy, field.outlines, strict=True):
        whole = np.concatenate([outline.min(axis=0), outline.max(axis=0)])
        np.testing.assert_allclose(box, np.clip(whole, 0, [640, 480, 640, 480]), atol=1e-4)
    assert field.xyxy.dtype == np.float32
    assert (field.xyxy[:, 2:] - field.xyxy[:, :2] > 1).all()


@pytest.mark.parametrize("diameter", [20.0, 60.0])
def test_overlap_and_gap_by_pixels(diameter: float) -> None:
    """No two cells are neither clearly apart nor clearly over each other."""
    field = draw_slide(
        np.random.default_rng(0),
        1,
        width_px=round(16 * diameter),
        height_px=round(12 * diameter),
        cell_diameter_px=diameter,
        crowding=0.5,
        wbc_per_field=4,
        platelets_per_field=8,
    )[0]
    least_gap = max(synthetic.MIN_GAP * diameter, synthetic.MIN_GAP_PX)
    meets = np.zeros(len(field.xyxy), bool)
    near = 0
    for i, a in enumerate(field.outlines):
        for j, b in enumerate(field.outlines):
            if i == j or np.linalg.norm(a.mean(axis=0) - b.mean(axis=0)) > 2.1 * diameter:
                continue
            depth_px, gap_px = meeting(a, b, scale=round(160 / diameter))
            if depth_px > 0:
                meets[i] = True
                assert field.group[i] == field.group[j] > 0
                assert synthetic.MIN_OVERLAP - 0.02 < depth_px / diameter < synthetic.MAX_OVERLAP + 0.02
            else:
                assert gap_px > least_gap - 0.3
                near += gap_px < 1.2 * least_gap
    assert near >= 5, "nothing came near the least gap: the field is too empty to test it"
    red = field.class_id == CellClass.RBC
    np.testing.assert_array_equal(field.overlapping, meets & red)
    np.testing.assert_array_equal(field.group > 0, meets)


@pytest.mark.parametrize("diameter", [30.0, 60.0, 90.0])
def test_groups_are_the_connected_dark_spots(diameter: float) -> None:
    """In the picture itself: background parts whatever does not overlap, nothing parts a group."""
    field = plain(
        7, width_px=800, height_px=600, cell_diameter_px=diameter, stain=ROSE, n_wbc=0, n_platelets=0
    )
    n_spots, _, stats, _ = cv2.connectedComponentsWithStats(
        dark(field, ROSE, 0.25).astype(np.uint8), connectivity=8
    )
    spots = int((stats[1:, cv2.CC_STAT_AREA] > 0.05 * diameter**2).sum())
    assert n_spots > 1
    assert spots == field.counts.n_rbc_single + field.group.max()


def test_counts_are_what_was_asked_for() -> None:
    field = draw_field(
        np.random.default_rng(4), n_single=9, group_sizes=(2, 3), n_wbc=2, n_wbc_overlapped=1, n_platelets=4
    )
    assert field.counts.n_rbc_single == 9
    assert field.counts.n_rbc_overlapping == 2 + 3 + 1
    assert field.counts.n_wbc == 2
    assert field.counts.n_platelets == 4
    assert sorted(np.bincount(field.group)[1:]) == [2, 2, 3]


def test_an_empty_field_is_background_only() -> None:
    field = draw_field(np.random.default_rng(0), n_single=0, group_sizes=(), n_wbc=0, n_platelets=0)
    assert field.xyxy.shape == (0, 4)
    assert field.class_id.shape == field.overlapping.shape == field.group.shape == (0,)
    assert field.counts.n_rbc == 0
    assert field.image.shape == (480, 640, 3)
    assert field.image[..., 1].min() > 160


def test_same_seed_same_field() -> None:
    a, b, c = (draw_slide(np.random.default_rng(seed), 2)[1] for seed in (11, 11, 12))
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.xyxy, b.xyxy)
    assert not np.array_equal(a.image, c.image)


def test_what_the_border_cuts_is_seen_well_enough() -> None:
    cut = 0
    for field in draw_slide(np.random.default_rng(5), 12, width_px=320, height_px=240, wbc_per_field=1.0):
        border = np.array([[0, 0], [320, 0], [320, 240], [0, 240]], np.float32)
        for class_id, outline in zip(field.class_id, field.outlines, strict=True):
            share = cv2.intersectConvexConvex(outline, border)[0] / cv2.contourArea(outline)
            cut += share < 0.999
            assert share >= {CellClass.RBC: 0.25, CellClass.WBC: 0.6, CellClass.PLATELET: 0.999}[class_id]
    assert cut > 10


def test_outlines_are_convex() -> None:
    """The exactness of overlap and gap rests on it."""
    for outline in draw_slide(np.random.default_rng(6), 1, width_px=1200, height_px=900)[0].outlines:
        assert cv2.isContourConvex(outline)


def test_cells_come_in_reading_order() -> None:
    centre_y = draw_field(np.random.default_rng(8)).xyxy[:, 1::2].sum(axis=1)
    assert (np.diff(centre_y) >= 0).all()


def test_slide_has_the_crowding_and_overlap_asked_for() -> None:
    fields = draw_slide(np.random.default_rng(9), 20, cell_diameter_px=50, crowding=0.2, overlap_fraction=0.4)
    n_rbc = sum(f.counts.n_rbc for f in fields)
    expected = 20 * 0.2 * 640 * 480 / (np.pi / 4 * 50**2)
    assert 0.85 * expected < n_rbc < 1.15 * expected
    assert 0.3 < sum(f.counts.n_rbc_overlapping for f in fields) / n_rbc < 0.5


def test_where_cells_cross_is_darker_than_either() -> None:
    field = plain(
        3, stain=ROSE, n_single=0, group_sizes=(2,) * 6, n_wbc=0, n_platelets=0, cell_diameter_px=60
    )
    covered = np.zeros((480, 640), np.uint8)
    for outline in field.outlines:
        one = np.zeros((480, 640), np.uint8)
        cv2.fillPoly(one, [np.round(outline).astype(np.int32)], 1)
        covered += np.asarray(cv2.erode(one, np.ones((5, 5), np.uint8)), np.uint8)
    green = field.image[..., 1]
    assert np.median(green[covered == 2]) < 0.85 * np.median(green[covered == 1])


def test_light_and_noise_do_what_they_say() -> None:
    empty = {"n_single": 0, "group_sizes": (), "n_wbc": 0, "n_platelets": 0}
    even = plain(1, **empty).image[..., 1].astype(float)
    uneven = plain(1, illumination=0.4, **empty).image[..., 1].astype(float)
    noisy = plain(1, noise=3.0, **empty).image[..., 1].astype(float)
    assert uneven.min() < 0.65 * even.max() < even.min()
    assert 2.5 < (noisy - even).std() < 3.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell_diameter_px": 5.0}, "12 px"),
        ({"cell_diameter_px": float("nan")}, "12 px"),
        ({"group_sizes": (1,)}, "two cells"),
        ({"width_px": 0}, "no area"),
        ({"n_wbc": 0, "n_wbc_overlapped": 1}, "n_wbc_overlapped"),
        ({"n_single": 500}, "no room"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_field(np.random.default_rng(0), **arguments)  # type: ignore[arg-type]


def test_a_crowded_slide_is_drawn_all_the_same() -> None:
    field = draw_slide(np.random.default_rng(0), 1, crowding=0.5, width_px=200, height_px=150)[0]
    assert field.counts.n_rbc > 2
    with pytest.raises(ValueError, match="crowding"):
        draw_slide(np.random.default_rng(0), 1, crowding=0.9)

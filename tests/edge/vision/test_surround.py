"""The black surround: found where it is, never in a smear, and what its rim cuts."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, GREY, ROSE, DrawnField, Stain, draw_field
from rbc_edge.values import Bool, CellClass, Detections, FieldOfView, Float32, Scale, ScaleSource, UInt8
from rbc_edge.vision import boxes, preprocess, surround
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import EdgeRule, counted

H, W = 480, 640
Shape = Callable[[Float32, Float32], Bool]


def drawn(stain: Stain = CREAM, seed: int = 1) -> DrawnField:
    return draw_field(np.random.default_rng(seed), n_single=24, group_sizes=(2, 2, 3), n_wbc=2, stain=stain)


def disc(radius: float, x0: float = W / 2, y0: float = H / 2) -> Shape:
    return lambda x, y: np.asarray((x - x0) ** 2 + (y - y0) ** 2 < radius**2)


SHAPES: dict[str, Shape] = {
    "round": disc(230),
    "small": disc(150),
    "beside the middle": disc(300, 260, 300),
    "corners only": disc(330),
    "bars": lambda x, y: np.asarray((x > 90) & (x < 540)),
    "lower half": lambda x, y: np.asarray(y < 240),
}


def in_black(image: UInt8, shape: Shape, *, black: int = 4, blur_px: float = 2.0) -> tuple[UInt8, Bool]:
    x, y = (a.astype(np.float32) for a in np.meshgrid(np.arange(W), np.arange(H)))
    inside = shape(x, y)
    light = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), blur_px)[..., None]
    return (image * light + black * (1 - light)).astype(np.uint8), inside


@pytest.mark.parametrize("stain", [CREAM, GREY, ROSE])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_lit_part_is_found(name: str, stain: Stain) -> None:
    image, inside = in_black(drawn(stain).image, SHAPES[name])
    lit = surround.lit(image)
    assert lit is not None
    assert (lit == inside).mean() > 0.97
    assert not (lit & ~inside).any() or (lit & ~inside).mean() < 0.005


def negative(image: UInt8) -> UInt8:
    return np.asarray(255 - image, np.uint8)


def vignette(loss: float) -> Callable[[UInt8], UInt8]:
    x, y = np.meshgrid(np.linspace(-1, 1, W), np.linspace(-1, 1, H))
    return lambda image: np.asarray(image * (1 - loss * (x * x + y * y) / 2)[..., None], np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: (image * 0.1).astype(np.uint8),
        negative,
        vignette(0.9),
        vignette(1.0),
        np.zeros_like,
        lambda image: np.where(np.arange(W)[None, :, None] < 40, 60, image).astype(np.uint8),  # a grey bar
    ],
)
def test_a_smear_has_no_surround(change: Callable[[UInt8], UInt8]) -> None:
    assert surround.lit(change(drawn().image)) is None


def test_writing_in_the_black_is_no_part_of_the_field() -> None:
    image, inside = in_black(drawn().image, SHAPES["bars"])
    cv2.putText(image, "10 um", (3, 460), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
    lit = surround.lit(image)
    assert lit is not None and (lit == inside).mean() > 0.95  # letters differ by the version of OpenCV


def test_the_light_of_a_field_is_that_of_its_lit_part() -> None:
    image = drawn().image
    plain = preprocess.balance(image)
    shown, inside = in_black(image, SHAPES["small"])
    balanced = preprocess.balance(shown)
    within = cv2.erode(inside.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    assert np.abs(balanced.astype(int) - plain)[within].mean() < 4
    lit = surround.lit(shown)
    assert lit is not None and (balanced[~lit] == preprocess.PAD_VALUE).all()
    view = preprocess.view(shown, 60.0)
    assert view.lit is not None and view.lit.shape == view.image.shape[:2]


def test_the_rim_cuts_a_cell_on_one_side() -> None:
    lit = np.zeros((100, 100), np.bool_)
    lit[20:80, 20:80] = True
    xyxy = np.array(
        [
            (20, 40, 40, 60), (40, 20, 60, 40), (60, 40, 80, 60), (40, 60, 60, 80),
            (40, 40, 60, 60), (62, 66, 80, 80),
        ],
        np.float32,
    )  # fmt: skip
    sides = surround.sides(xyxy, lit)
    np.testing.assert_array_equal(sides[:4], np.eye(4, dtype=np.bool_))
    assert not sides[4].any() and sides[5].sum() == 1
    assert surround.sides(np.zeros((0, 4), np.float32), lit).shape == (0, 4)


def test_no_white_cell_is_at_the_rim_and_no_cell_beyond() -> None:
    lit = np.zeros((100, 100), np.bool_)
    lit[:, 30:] = True
    xyxy = np.array([(25, 40, 60, 80), (31, 40, 60, 80), (50, 10, 80, 40), (0, 0, 40, 20)], np.float32)
    classes = np.array([CellClass.WBC, CellClass.RBC, CellClass.WBC, CellClass.PLATELET], np.int64)
    found = Detections(xyxy, np.full(4, 0.9, np.float32), classes)
    assert surround.without_rim(found, xyxy, lit).class_id.tolist() == [CellClass.RBC, CellClass.WBC]


@pytest.mark.parametrize("name", ["round", "corners only", "bars"])
@pytest.mark.parametrize("stain", [CREAM, GREY])
def test_a_round_field_is_counted_as_its_lit_part(name: str, stain: Stain) -> None:
    """With the shipped bundle: the cells that lie inside are those of the field without a surround."""
    analyzer, given = Analyzer(Bundle.open(), threads=1), Scale(66.0, ScaleSource.SLIDE)
    field = drawn(stain, seed=4)
    image, inside = in_black(field.image, SHAPES[name])
    result = analyzer.analyze(FieldOfView.of(image), given)
    assert result.quality_flags == ("round-field",)
    cells = result.cells
    height, width = inside.shape
    for box, class_id in zip(cells.detections.xyxy, cells.detections.class_id, strict=True):
        corner = np.clip(box.astype(int), 0, [width - 1, height - 1, width - 1, height - 1])
        if class_id == CellClass.WBC:
            assert inside[corner[[1, 3]][:, None], corner[[0, 2]]].sum() >= 3
    at = field.xyxy.reshape(-1, 2, 2).mean(axis=1).astype(int)
    visible = inside[at[:, 1].clip(0, H - 1), at[:, 0].clip(0, W - 1)] & (field.class_id == CellClass.RBC)
    assert result.n_rbc == pytest.approx(np.count_nonzero(visible), abs=max(2, 0.2 * visible.sum()))
    near = cells.detections.xyxy + np.array([-9, -9, 9, 9], np.float32)
    far = ~surround.sides(near, inside).any(axis=1) & ~boxes.touches_edge(near, W, H, 60.0).any(axis=1)
    assert far.any() and counted(cells, EdgeRule.INSIDE)[far].all()
    assert not counted(cells, EdgeRule.INSIDE)[~far].all()


def test_the_rim_makes_no_overlaps() -> None:
    """With the shipped bundle: of single cells that a round rim cuts, hardly any is called overlapping."""
    analyzer, given = Analyzer(Bundle.open(), threads=1), Scale(66.0, ScaleSource.SLIDE)
    n_cut = n_overlapping = 0
    for seed in range(4):
        field = draw_field(np.random.default_rng(seed), n_single=40, group_sizes=(), n_wbc=0, stain=ROSE)
        image, inside = in_black(field.image, SHAPES["round"])
        cells = analyzer.analyze(FieldOfView.of(image), given).cells
        red = cells.detections.class_id == CellClass.RBC
        cut = red & surround.sides(cells.detections.xyxy, inside).any(axis=1)
        n_cut += int(np.count_nonzero(cut))
        n_overlapping += int(np.count_nonzero(cut & cells.overlapping))
    assert n_cut > 10 and n_overlapping <= 0.1 * n_cut


def test_a_vignette_is_no_note(toy_bundle_path: Path) -> None:
    analyzer = Analyzer(Bundle.open(toy_bundle_path), threads=1)
    result = analyzer.analyze(
        FieldOfView.of(vignette(0.95)(drawn().image)), Scale(60.0, ScaleSource.CELL_DIAMETER)
    )
    assert "round-field" not in result.quality_flags

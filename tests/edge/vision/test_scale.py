"""The scale of a slide: measured boxes, and the toy network asked at several sizes."""

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, GREY, DrawnField, Stain, draw_slide
from rbc_edge.values import CellClass, Detections, Float32, ScaleSource, UInt8
from rbc_edge.vision import preprocess, scale
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.detector import Detector


@pytest.fixture(scope="module")
def detector(toy_bundle_path: Path) -> Detector:
    return Detector(Bundle.open(toy_bundle_path), threads=1)


def found(*rows: tuple[float, float, float, float], class_id: int = 0) -> Detections:
    n = len(rows)
    return Detections(
        np.array(rows, np.float32).reshape(-1, 4), np.full(n, 0.9, np.float32), np.full(n, class_id, np.int64)
    )


def test_nothing_is_measured_without_cells() -> None:
    diameter, n = scale.measured_diameter_px(Detections.empty(), 100, 100)
    assert math.isnan(diameter)
    assert n == 0


def test_the_median_of_whole_red_cells_is_measured() -> None:
    cells = found(
        (10, 10, 40, 40),
        (50, 50, 90, 90),
        (20, 50, 40, 95),  # 20 by 45: the geometric mean is 30
        (0, 30, 5, 60),  # cut at the left
        (95, 10, 100, 40),
        (30, 0, 60, 5),
        (30, 95, 60, 100),
    )
    diameter, n = scale.measured_diameter_px(cells, 100, 100)
    assert n == 3
    assert diameter == pytest.approx(30.0)


@pytest.mark.parametrize("class_id", [CellClass.WBC, CellClass.PLATELET])
def test_other_cells_say_nothing_of_the_scale(class_id: CellClass) -> None:
    assert scale.measured_diameter_px(found((10, 10, 90, 90), class_id=class_id), 100, 100)[1] == 0


@pytest.mark.parametrize(("side", "verdict"), [(40, False), (48, False), (52, True), (33, False), (31, True)])
def test_a_field_disagrees_beyond_a_quarter(side: float, verdict: bool) -> None:
    cells = found(*[(100 * i + 20, 20, 100 * i + 20 + side, 20 + side) for i in range(5)])
    assert scale.disagrees(cells, 1000, 1000, 40.0) is verdict


def test_a_few_cells_do_not_contradict_their_slide() -> None:
    few = found(*[(100 * i + 20, 20, 100 * i + 120, 120) for i in range(4)])
    assert not scale.disagrees(few, 1000, 1000, 40.0)
    assert not scale.disagrees(Detections.empty(), 1000, 1000, 40.0)


@pytest.mark.parametrize(
    ("n", "longer", "verdict"), [(6, 40, False), (6, 33, False), (6, 30, None), (6, 52, None), (5, 40, None)]
)
def test_cells_that_the_border_cuts_may_confirm_the_scale(n: int, longer: int, verdict: bool | None) -> None:
    cut = found(*[(100 * i + 20, 0, 100 * i + 20 + longer, 15) for i in range(n)])
    assert scale.disagrees(cut, 1000, 1000, 40.0) is verdict


@pytest.mark.parametrize("zoom", [0.6, 1.0, 1.37, 2.2, 4.0])
def test_a_field_is_measured_at_any_resolution(
    detector: Detector, drawn_fields: tuple[DrawnField, ...], zoom: float
) -> None:
    image = preprocess.rescale(drawn_fields[0].image, zoom)
    diameter, n = scale.estimate_field(image, detector)
    # The toy tells five sizes apart, a fifth from each to the next.
    assert diameter == pytest.approx(40.0 * zoom, rel=0.15)
    assert n > 3


def test_an_empty_field_has_no_scale(detector: Detector) -> None:
    diameter, n = scale.estimate_field(np.full((200, 300, 3), 210, np.uint8), detector)
    assert math.isnan(diameter)
    assert n == 0


def test_a_slide_without_fields_or_cells_has_none(detector: Detector) -> None:
    for images in ([], [np.full((100, 100, 3), 210, np.uint8)]):
        estimate = scale.estimate_slide(images, detector)
        assert estimate.source is ScaleSource.NONE
        assert math.isnan(estimate.cell_diameter_px)


def test_empty_fields_do_not_hide_the_slide(detector: Detector, drawn_fields: tuple[DrawnField, ...]) -> None:
    empty = np.full((100, 100, 3), 210, np.uint8)
    alone = scale.estimate_slide([drawn_fields[0].image], detector)
    assert alone.source is ScaleSource.SLIDE
    assert scale.estimate_slide([empty, drawn_fields[0].image, empty], detector) == alone


@pytest.fixture(scope="module")
def shipped() -> Detector:
    return Detector(Bundle.open(), threads=1)


def _written_on(image: UInt8) -> UInt8:
    for y in (210, 240, 270):
        cv2.putText(image, "Patient 4711 100x", (190, y), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2)
    return image


def _with_scale_bar(image: UInt8) -> UInt8:
    cv2.rectangle(image, (440, 420), (620, 432), (0, 0, 0), -1)
    cv2.putText(image, "10 um", (470, 465), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 2)
    return image


def _blank(level: int, rows: slice, columns: slice) -> Callable[[UInt8], UInt8]:
    def blank(image: UInt8) -> UInt8:
        image[rows, columns] = level
        return image

    return blank


def _watermarked(image: UInt8) -> UInt8:
    for y in (120, 300, 460):
        mark = np.zeros_like(image)
        cv2.putText(mark, "SAMPLE SAMPLE", (10, y), cv2.FONT_HERSHEY_SIMPLEX, 2.0, (40, 40, 40), 5)
        image = np.asarray(cv2.add(image, mark), np.uint8)
    return image


def _round(image: UInt8) -> UInt8:
    lit = np.zeros_like(image)
    cv2.circle(lit, (320, 240), 235, (1, 1, 1), -1)
    return np.asarray(image * lit, np.uint8)


EVERY_ROW, LEFT = slice(None), slice(0, 320)


@pytest.mark.parametrize(
    "change",
    [
        _written_on,
        _with_scale_bar,
        _watermarked,
        _blank(0, EVERY_ROW, LEFT),
        _blank(128, EVERY_ROW, LEFT),
        _blank(255, EVERY_ROW, LEFT),
        _blank(0, slice(240, None), EVERY_ROW),
        _blank(255, slice(240, None), EVERY_ROW),
        _round,
    ],
)
@pytest.mark.parametrize("stain", [CREAM, GREY], ids=["cream", "grey"])
def test_what_is_no_blood_does_not_change_the_scale(
    shipped: Detector, stain: Stain, change: Callable[[UInt8], UInt8]
) -> None:
    fields = draw_slide(np.random.default_rng(5), 4, cell_diameter_px=48.0, stain=stain)
    plain = scale.estimate_slide([f.image for f in fields], shipped).cell_diameter_px
    disturbed = scale.estimate_slide([change(f.image.copy()) for f in fields], shipped).cell_diameter_px
    assert disturbed == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_overview_does_not_change_the_scale_of_its_slide(shipped: Detector, at: int) -> None:
    images = [f.image for f in draw_slide(np.random.default_rng(6), 4, stain=CREAM)]
    plain = scale.estimate_slide(images, shipped).cell_diameter_px
    small = preprocess.rescale(images[at], 0.25)
    images[at] = np.ascontiguousarray(np.tile(small, (4, 4, 1)))
    assert scale.estimate_slide(images, shipped).cell_diameter_px == pytest.approx(plain, rel=0.05)


def test_writing_that_fills_the_middle_is_not_taken_for_small_cells(shipped: Detector) -> None:
    (field,) = draw_slide(
        np.random.default_rng(7), 1, width_px=1280, height_px=960, cell_diameter_px=60.0, stain=CREAM
    )
    plain = scale.estimate_slide([field.image], shipped).cell_diameter_px
    image = field.image.copy()
    for y in range(400, 560, 24):
        cv2.putText(image, "OOQO8 0OQ0 OOO6", (470, y), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (150, 110, 130), 3)
    assert scale.estimate_slide([image], shipped).cell_diameter_px == pytest.approx(plain, rel=0.05)


class Told:
    """Estimates that are known beforehand."""

    def __init__(self, *estimates: tuple[float, int]) -> None:
        self.estimates = iter(estimates)

    def __call__(self, _image: UInt8, _detector: Detector) -> tuple[float, int]:
        return next(self.estimates)


@pytest.mark.parametrize(
    ("estimates", "expected"),
    [
        ([(40.0, 30), (42.0, 30), (90.0, 20)], 42.0),
        ([(40.0, 100), (90.0, 10), (95.0, 10)], 90.0),  # an overview has no more say than a field
        ([(40.0, 10), (41.0, 12), (90.0, 3), (95.0, 4), (99.0, 4)], 41.0),  # but few cells have less
        ([(20.0, 4), (21.0, 4), (80.0, 5)], 80.0),  # few cells say little
        ([(20.0, 1), (math.nan, 0), (22.0, 4)], 22.0),  # unless there is nothing better
    ],
)
def test_the_slide_is_the_median_over_cells(
    monkeypatch: pytest.MonkeyPatch,
    detector: Detector,
    estimates: list[tuple[float, int]],
    expected: float,
) -> None:
    monkeypatch.setattr(scale, "estimate_field", Told(*estimates))
    images = [np.zeros((16, 16, 3), np.uint8)] * len(estimates)
    estimate = scale.estimate_slide(images, detector)
    assert (estimate.cell_diameter_px, estimate.source) == (expected, ScaleSource.SLIDE)


def test_small_guesses_look_at_the_middle_of_a_large_field(
    monkeypatch: pytest.MonkeyPatch, detector: Detector
) -> None:
    """What bounds the cost on a 20-megapixel camera."""
    seen: list[tuple[int, int, float]] = []

    def detect(image: UInt8, guess: float, *, score_threshold: Float32 | None = None) -> Detections:
        assert score_threshold is None
        seen.append((*image.shape[:2], guess))
        return Detections.empty()

    monkeypatch.setattr(detector, "detect", detect)
    scale.estimate_field(np.zeros((3000, 4000, 3), np.uint8), detector)
    assert [guess for _, _, guess in seen] == list(scale.GUESSES_PX)
    # Never more than a tile or two of the network, whatever the guess.
    assert all(max(h, w) * 40 / guess <= preprocess.TILE_PX for h, w, guess in seen)
    assert seen[-1][0] == 3000


@pytest.mark.parametrize(
    ("own_px", "n_cells", "verdict"),
    [
        (20.0, 5, True),
        (75.0, 5, True),
        (20.0, 4, False),
        (30.0, 50, False),
        (60.0, 50, False),
        (math.nan, 0, False),
    ],
)
def test_blindness_takes_enough_cells_of_a_size_the_detector_does_not_forgive(
    own_px: float, n_cells: int, verdict: bool
) -> None:
    assert scale.blind_at(40.0, own_px, n_cells) == verdict


@pytest.mark.parametrize("wrong", [90.0, 200.0, 17.0])
def test_cells_far_from_the_scale_are_found_elsewhere(
    detector: Detector, drawn_fields: tuple[DrawnField, ...], wrong: float
) -> None:
    image = drawn_fields[0].image
    own_px, n = scale.look_elsewhere(image, detector, detector.detect(image, wrong), wrong)
    assert own_px == pytest.approx(40.0, rel=0.15)
    assert scale.blind_at(wrong, own_px, n)


def test_what_is_seen_at_the_scale_of_the_slide_has_its_say(
    detector: Detector, drawn_fields: tuple[DrawnField, ...]
) -> None:
    image = drawn_fields[0].image
    own_px, n = scale.look_elsewhere(image, detector, detector.detect(image, 40.0), 40.0)
    assert math.isnan(own_px) and n == 0
    own_px, n = scale.look_elsewhere(image, detector, Detections.empty(), 40.0)
    assert n > 0  # the toy sees something of them at 90 px
    empty = np.full((200, 300, 3), 210, np.uint8)
    own_px, n = scale.look_elsewhere(empty, detector, Detections.empty(), 40.0)
    assert math.isnan(own_px) and n == 0


def test_guesses_elsewhere_stay_within_what_is_tried_at_all(
    monkeypatch: pytest.MonkeyPatch, detector: Detector
) -> None:
    seen: list[float] = []

    def detect(_image: UInt8, guess: float, *, score_threshold: Float32 | None = None) -> Detections:
        assert score_threshold is None
        seen.append(guess)
        return Detections.empty()

    monkeypatch.setattr(detector, "detect", detect)
    for diameter in (12.0, 40.0, 100.0, 300.0):
        seen.clear()
        scale.look_elsewhere(np.zeros((600, 800, 3), np.uint8), detector, Detections.empty(), diameter)
        assert 3 <= len(seen) <= 5
        assert all(max(g / diameter, diameter / g) > 2 for g in seen)
        # No size between the smallest and the largest guess is further off than the detector forgives.
        covered = np.array(sorted([*seen, diameter]))
        assert (covered[1:] / covered[:-1] < 1.51**2).all()
        assert covered[0] < scale.GUESSES_PX[0] * 2 and covered[-1] > scale.GUESSES_PX[-1] / 2


def test_fields_that_agree_spare_the_others_the_guesses(
    monkeypatch: pytest.MonkeyPatch, detector: Detector, drawn_fields: tuple[DrawnField, ...]
) -> None:
    images = [drawn.image for drawn in drawn_fields]
    asked: list[float] = []
    estimate = scale.estimate_field

    def counted(image: UInt8, asked_detector: Detector) -> tuple[float, int]:
        told = estimate(image, asked_detector)
        asked.append(told[0])
        return told

    monkeypatch.setattr(scale, "estimate_field", counted)
    slide = scale.estimate_slide(images, detector)
    assert len(asked) == 3
    assert slide.cell_diameter_px == pytest.approx(40.0, rel=0.15)
    # With one empty field among the first ones the other two agree. With two, all are asked in full.
    empty, full = np.full((100, 100, 3), 210, np.uint8), [images[0]] * 3
    for fields, expected in (([empty, *full], 3), ([empty, *full, empty], 5)):
        asked.clear()
        scale.estimate_slide(fields, detector)
        assert len(asked) == expected

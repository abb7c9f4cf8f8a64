"""Refused boxes that hold several cells: which they are, and what comes out of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.ops.synthetic import DrawnField
from rbc_edge.values import Detections, FieldOfView, Float32, FovResult, Scale, ScaleSource, UInt8
from rbc_edge.vision import boxes, clumps, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import CropScores

D = 40.0
GIVEN = Scale(D, ScaleSource.CELL_DIAMETER)
CLUMP = (100.0, 80.0, 170.0, 150.0)
ALONE = (10.0, 10.0, 50.0, 50.0)
PAIR = ((105.0, 85.0, 145.0, 125.0), (125.0, 105.0, 165.0, 145.0))
Box = tuple[float, float, float, float]


def detections(*xyxy: Box, class_id: int = 0, score: float = 0.5) -> Detections:
    """Boxes of which the detector is not sure."""
    n = len(xyxy)
    return Detections(
        np.array(xyxy, np.float32).reshape(n, 4),
        np.full(n, score, np.float32),
        np.full(n, class_id, np.int64),
    )


@pytest.fixture
def analyzer(toy_bundle_path: Path) -> Analyzer:
    return Analyzer(Bundle.open(toy_bundle_path), threads=1)


@pytest.fixture
def image() -> UInt8:
    """Every pixel its own colour."""
    return np.random.default_rng(0).integers(0, 256, (256, 320, 3)).astype(np.uint8)


Looks = list[tuple[preprocess.View, float]]


def painted(
    analyzer: Analyzer,
    monkeypatch: pytest.MonkeyPatch,
    first: Detections,
    inside: Callable[[Float32], Detections],
    refused: Callable[[Float32], object],
) -> Looks:
    """Has the detector see what is said: in the field, and in a part by its corner.

    `refused` tells by sides (N, 2) which boxes the second stage refuses. Returns every look at a part.
    """
    looks: Looks = []
    judged: list[Float32] = []
    part, cut = preprocess.View.part, preprocess.cell_crops

    def detect(view: preprocess.View, diameter_px: float) -> Detections:
        if not parts or view is not parts[-1][0]:
            return first
        looks.append((view, diameter_px))
        return inside(parts[-1][1])

    parts: list[tuple[preprocess.View, Float32]] = []

    def cut_part(self: preprocess.View, xyxy: Float32) -> tuple[preprocess.View, Float32]:
        parts.append(part(self, xyxy))
        return parts[-1]

    def crops(view: preprocess.View, xyxy: Float32, *, margin: float) -> UInt8:
        judged.append(xyxy)
        return cut(view, xyxy, margin=margin)

    def scores(_: UInt8, sides: Float32) -> CropScores:
        xyxy = judged[-1]
        refuse = np.asarray(refused(xyxy[:, 2:] - xyxy[:, :2]), np.float32)
        return CropScores(np.full(len(xyxy), 0.9, np.float32), refuse, np.ones((len(xyxy), 3), np.float32))

    monkeypatch.setattr(analyzer.detector, "detect", detect)
    monkeypatch.setattr(preprocess.View, "part", cut_part)
    monkeypatch.setattr(preprocess, "cell_crops", crops)
    monkeypatch.setattr(analyzer.classifier, "scores", scores)
    return looks


def large(sides: Float32) -> object:
    return sides.max(axis=1) > 69


def count(analyzer: Analyzer, image: UInt8) -> FovResult:
    return analyzer.analyze(FieldOfView.of(image), GIVEN)


def test_only_boxes_larger_than_a_cell_are_clumps_the_largest_first() -> None:
    sides = [(40, 40), (50, 60), (45, 45), (90, 90), (18, 200), (60, 40)]
    refused = np.array([(5, 5, 5 + w, 5 + h) for w, h in sides], np.float32)
    all_of_them = np.ones(len(refused), np.bool_)
    assert clumps.among(refused, all_of_them, D).tolist() == [3, 1, 5]
    assert clumps.among(refused, np.arange(len(refused)) != 1, D).tolist() == [3, 5]
    assert clumps.among(refused, all_of_them, 100.0).tolist() == []
    assert clumps.among(refused, all_of_them, np.nan).tolist() == []
    assert clumps.among(np.zeros((0, 4), np.float32), np.zeros(0, np.bool_), D).tolist() == []


def test_two_cells_half_over_each_other_are_several_and_a_large_cell_is_one() -> None:
    assert clumps.holds_several(np.array([0, 0, 80, 50], np.float32), 40.0)
    assert not clumps.holds_several(np.array([0, 0, 48, 48], np.float32), 40.0)


def test_a_clump_is_shown_larger_with_what_lies_around_it(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = painted(analyzer, monkeypatch, detections(CLUMP), lambda _: detections(), large)
    count(analyzer, image)
    ((view, diameter),) = looks
    np.testing.assert_array_equal(view.image, preprocess.balance(image)[40:190, 60:210])
    assert diameter == pytest.approx(D / 1.7)
    shown = preprocess.detector_input(view, diameter, D)
    assert shown.shape[0] == pytest.approx(1.7 * 150, rel=0.06)  # a few per cent smaller where that fits


def test_cells_that_come_out_are_counted(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = (200.0, 200.0, 240.0, 240.0)
    first = detections(ALONE, CLUMP, below)
    painted(analyzer, monkeypatch, first, lambda at: moved(detections(*PAIR), -at), large)
    result = count(analyzer, image)
    assert result.cells.detections.xyxy.tolist() == [list(b) for b in (ALONE, *PAIR, below)]
    assert (result.n_rbc, result.n_refused, "clump" in result.flags) == (4, 1, False)
    assert result.cells.group[1] == result.cells.group[2] > 0
    assert np.isfinite(result.cells.overlap_score).all()


def moved(found: Detections, by: Float32) -> Detections:
    return replace(found, xyxy=found.xyxy + by)


OUTSIDE = (60.0, 60.0, 100.0, 100.0)  # its centre is not in the clump
NOT_NEW: dict[str, Detections] = {
    "a neighbour": detections(PAIR[0], OUTSIDE),
    "a white cell": Detections.joined([detections(PAIR[0]), detections(PAIR[1], class_id=1)]),
    "the clump itself": detections(PAIR[0], (101.0, 81.0, 169.0, 149.0)),
    "refused again": detections(PAIR[0], (100.0, 112.0, 170.0, 142.0)),
    "one cell": detections(PAIR[0]),
}


@pytest.mark.parametrize("what", sorted(NOT_NEW))
def test_what_is_no_new_cell_stays_out_and_the_field_is_flagged(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    painted(analyzer, monkeypatch, detections(CLUMP), lambda at: moved(NOT_NEW[what], -at), large)
    result = count(analyzer, image)
    assert result.cells.detections.xyxy.tolist() == [list(PAIR[0])]
    assert result.n_refused == 1
    assert "clump" in result.flags


@pytest.mark.parametrize("class_id", [0, 1])
def test_a_cell_that_was_found_before_is_not_found_twice(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch, class_id: int
) -> None:
    known = detections(PAIR[0], class_id=class_id)
    near = (106.0, 85.0, 146.0, 125.0)
    first = Detections.joined([known, detections(CLUMP)])
    painted(analyzer, monkeypatch, first, lambda at: moved(detections(near, PAIR[1]), -at), large)
    result = count(analyzer, image)
    assert result.cells.detections.xyxy.tolist() == [list(PAIR[0]), list(PAIR[1])]
    assert result.cells.detections.class_id.tolist() == [class_id, 0]
    assert "clump" not in result.flags  # its two cells are there


def test_two_clumps_that_meet_do_not_share_a_cell(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (110.0, 90.0, 182.0, 162.0)
    both = detections(CLUMP, other)
    painted(analyzer, monkeypatch, both, lambda at: moved(detections(*PAIR), -at), large)
    result = count(analyzer, image)
    assert (result.n_rbc, result.n_refused) == (2, 2)


def test_so_many_clumps_of_a_field_are_searched_and_no_more(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [50 + i for i in range(clumps.MAX_SEARCHED + 2)]
    first = detections(*[(30.0 * i, 3.0 * i, 30.0 * i + s, 3.0 * i + s) for i, s in enumerate(sizes)])
    looks = painted(analyzer, monkeypatch, first, lambda _: detections(), lambda s: s[:, 0] > 45)
    result = count(analyzer, image)
    assert len(looks) == clumps.MAX_SEARCHED
    assert len(looks[0][0].image) >= 59  # the largest
    assert (result.n_rbc, result.n_refused, "clump" in result.flags) == (0, len(sizes), True)
    assert "no-red-cells" in result.flags


@pytest.mark.parametrize(("side", "is_flagged"), [(48, False), (70, True)])
def test_what_does_not_come_apart_is_a_cell_if_the_detector_is_sure(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch, side: float, is_flagged: bool
) -> None:
    box = (100.0, 80.0, 100.0 + side, 80.0 + side)
    first = detections(ALONE, box, (200.0, 200.0, 240.0, 240.0), score=0.95)
    looks = painted(analyzer, monkeypatch, first, lambda _: detections(), lambda s: s[:, 0] > 45)
    result = count(analyzer, image)
    assert len(looks) == 1
    assert result.cells.detections.xyxy.tolist() == first.xyxy.tolist()
    assert (result.n_rbc, result.n_refused, "clump" in result.flags) == (3, 0, is_flagged)


def test_what_comes_apart_is_no_cell_however_sure_the_detector_is(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = detections(CLUMP, score=0.95)
    painted(analyzer, monkeypatch, first, lambda at: moved(detections(*PAIR), -at), large)
    result = count(analyzer, image)
    assert result.cells.detections.xyxy.tolist() == [list(b) for b in PAIR]
    assert (result.n_rbc, result.n_refused) == (2, 1)


def test_an_accepted_box_of_any_size_is_one_cell(
    analyzer: Analyzer, image: UInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = painted(
        analyzer, monkeypatch, detections(CLUMP), lambda _: detections(), lambda s: np.zeros(len(s))
    )
    result = count(analyzer, image)
    assert (looks, result.n_rbc, result.n_refused) == ([], 1, 0)


def test_threads_find_the_same(toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...]) -> None:
    """With a threshold at which the toy refuses some of the cells, a large one among them."""
    toy = Bundle.open(toy_bundle_path)
    strict = Bundle(toy.path, replace(toy.manifest, refuse_threshold=0.1))
    one, four = (Analyzer(strict, threads=n) for n in (1, 4))
    n_came_out = 0
    for drawn in drawn_fields:
        alone, shared = (each.analyze(FieldOfView.of(drawn.image), GIVEN) for each in (one, four))
        np.testing.assert_array_equal(alone.cells.detections.xyxy, shared.cells.detections.xyxy)
        np.testing.assert_array_equal(alone.cells.overlap_score, shared.cells.overlap_score)
        assert (alone.n_refused, alone.flags) == (shared.n_refused, shared.flags)
        order = boxes.reading_order(alone.cells.detections.xyxy)
        assert order.tolist() == list(range(len(order)))
        n_red = one.detector.detect(preprocess.balance(drawn.image), D).class_id.tolist().count(0)
        n_came_out += alone.n_rbc + alone.n_refused - n_red
    assert n_came_out > 0

"""Metrics against their definitions, on cases small enough to reckon by hand."""

import doctest
import math

import numpy as np
import numpy.typing as npt
import pytest

from rbc_edge.values import Bool, Float32
from rbc_edge.vision import boxes
from rbc_edge.vision.boxes import iou
from rbc_train import metrics


def f32(*values: float) -> Float32:
    return np.array(values, np.float32)


def bools(text: str) -> Bool:
    return np.array([c == "1" for c in text], np.bool_)


def test_the_examples_in_the_docstrings_hold() -> None:
    results = [doctest.testmod(module) for module in (metrics, boxes)]  # `iou` is the station's
    assert all(r.attempted > 0 and r.failed == 0 for r in results)


def test_iou_by_hand_and_symmetric() -> None:
    a = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 5, 5]], np.float32)
    table = iou(a, a)
    assert table.tolist() == [[1.0, 0.0, 0.25], [0.0, 1.0, 0.0], [0.25, 0.0, 1.0]]
    assert iou(a[:0], a).shape == (0, 3)
    assert iou(a, a[:0]).shape == (3, 0)
    assert iou(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)).tolist() == [[0.0]]


def test_a_match_takes_the_best_score_first_and_each_box_once() -> None:
    truth = np.array([[0, 0, 10, 10], [8, 0, 18, 10]], np.float32)
    found = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [8, 0, 18, 10], [50, 0, 60, 10]], np.float32)
    assert metrics.match(found, f32(0.5, 0.9, 0.4, 1.0), truth, min_iou=0.5).tolist() == [-1, 0, 1, -1]
    assert metrics.match(found, f32(0.9, 0.5, 0.4, 1.0), truth, min_iou=0.5).tolist() == [0, -1, 1, -1]
    assert metrics.match(found[:0], f32(), truth, min_iou=0.5).tolist() == []
    assert metrics.match(found, f32(1, 1, 1, 1), truth[:0], min_iou=0.5).tolist() == [-1] * 4


def test_a_match_needs_the_min_iou() -> None:
    half = np.array([[0, 0, 10, 5]], np.float32)
    whole = np.array([[0, 0, 10, 10]], np.float32)
    assert metrics.match(half, f32(1), whole, min_iou=0.5).tolist() == [0]
    assert metrics.match(half, f32(1), whole, min_iou=0.51).tolist() == [-1]


def test_average_precision_by_hand() -> None:
    assert metrics.average_precision(f32(0.9, 0.8), bools("11"), 2) == 1.0
    assert metrics.average_precision(f32(), bools(""), 3) == 0.0
    assert math.isnan(metrics.average_precision(f32(0.5), bools("0"), 0))
    # One of two found, nothing wrong: recall 0, 0.01, ... 0.5 at precision 1, that is 51 of 101.
    assert metrics.average_precision(f32(0.9), bools("1"), 2) == pytest.approx(51 / 101)
    # A false one before the second: precision 1 to recall 0.5, then 2/3.
    assert metrics.average_precision(f32(0.9, 0.8, 0.7), bools("101"), 2) == pytest.approx(
        (51 + 50 * 2 / 3) / 101
    )
    # The same in another order of the arguments: the score decides.
    assert metrics.average_precision(f32(0.7, 0.9, 0.8), bools("110"), 2) == pytest.approx(
        (51 + 50 * 2 / 3) / 101
    )


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.round(rng.uniform(0, 1, 60), 1).astype(np.float32)  # many ties
    positive = rng.uniform(0, 1, 60) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    assert metrics.auc(score, positive) == pytest.approx(np.mean(pairs))


def test_auc_needs_both_classes() -> None:
    assert math.isnan(metrics.auc(f32(0.1, 0.2), bools("11")))
    assert math.isnan(metrics.auc(f32(), bools("")))


def test_verdicts_by_hand() -> None:
    v = metrics.verdicts(f32(0.1, 0.5, 0.9, 0.7, 0.4), bools("00110"), 0.5)
    assert v.n == 5
    assert v.accuracy == pytest.approx(4 / 5)  # a score at the threshold is overlapping, as at the station
    assert v.recall_single == pytest.approx(2 / 3)
    assert v.recall_overlapping == 1.0
    assert v.precision_overlapping == pytest.approx(2 / 3)
    assert v.auc == 1.0
    assert v.precision_single == 1.0
    assert v.f1_single == pytest.approx(4 / 5)
    assert v.f1_overlapping == pytest.approx(4 / 5)
    assert v.recall_overlapping_at_95 == 1.0
    assert v.brier == pytest.approx((0.01 + 0.25 + 0.01 + 0.09 + 0.16) / 5)


def test_verdicts_of_nothing_are_not_numbers() -> None:
    v = metrics.verdicts(f32(), bools(""), 0.5)
    assert v.n == 0
    assert math.isnan(v.accuracy)
    assert math.isnan(v.recall_single)
    assert math.isnan(v.precision_overlapping)
    assert all(math.isnan(x) for x in (v.f1_single, v.recall_overlapping_at_95, v.brier, v.calibration_error))


def test_a_weight_of_two_is_a_detection_seen_twice() -> None:
    rng = np.random.default_rng(0)
    score = rng.uniform(0, 1, 50).astype(np.float32)
    hit = rng.uniform(0, 1, 50) < 0.6
    weight = rng.integers(0, 4, 50)
    # Ties would be settled by order: give the copies scores that keep theirs.
    repeated = np.repeat(score, weight)
    expected = metrics.average_precision(repeated, np.repeat(hit, weight), 90)
    found = metrics.average_precision(score, hit, 90, weight.astype(np.float64))
    assert found == pytest.approx(expected, abs=0.02)  # between copies the envelope has a step more
    assert metrics.average_precision(score, hit, 90, np.ones(50)) == metrics.average_precision(score, hit, 90)


def test_roc_of_resamplings_is_the_roc_of_the_resampled() -> None:
    rng = np.random.default_rng(1)
    score = np.round(rng.uniform(0, 1, 80), 1).astype(np.float32)  # many ties
    positive = rng.uniform(0, 1, 80) < score
    drawn = metrics.resample(80, 5, seed=3)
    weight = np.stack([np.bincount(d, minlength=80) for d in drawn]).astype(np.float64)
    curves = metrics.roc(score, positive, weight)
    for i, d in enumerate(drawn):
        own = metrics.roc(score[d], positive[d])
        assert curves.area()[i] == pytest.approx(float(own.area()))
        assert curves.true_positive_at(0.8)[i] == pytest.approx(float(own.true_positive_at(0.8)))


def test_recall_where_singles_are_left_alone() -> None:
    # 20 singles, one of which scores 0.8; thresholds over 0.75 leave 19 of 20 single.
    score = f32(*[0.1] * 19, 0.8, 0.9, 0.7, 0.05, 0.85)
    positive = bools("0" * 20 + "1111")
    curve = metrics.roc(score, positive)
    assert float(curve.true_positive_at(0.95)) == 0.75
    assert float(curve.true_positive_at(1.0)) == 0.5
    assert curve.threshold[0] == math.inf
    assert curve.false_positive[-1] == curve.true_positive[-1] == 1.0


def test_calibration_by_hand() -> None:
    found = metrics.calibration(f32(0.05, 0.15, 0.15, 1.0), bools("0011"), bins=10)
    assert found.n.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found.share[:2].tolist() == [0.0, 0.5]
    assert math.isnan(found.mean_score[5])
    assert found.error == pytest.approx((0.05 + 2 * 0.35 + 0.0) / 4)
    assert found.brier == pytest.approx((0.05**2 + 0.15**2 + 0.85**2) / 4)


def test_agreement_and_relative_error_by_hand() -> None:
    counted, labelled = np.array([9, 12, 3]), np.array([10, 10, 0])
    found = metrics.agreement(counted, labelled)
    spread = 1.96 * math.sqrt(((-7 / 3) ** 2 + (2 / 3) ** 2 + (5 / 3) ** 2) / 2)
    assert [found.bias, found.low] == pytest.approx([4 / 3, 4 / 3 - spread])
    assert metrics.relative_error(counted, labelled)[:2].tolist() == pytest.approx([-0.1, 0.2])
    assert math.isnan(metrics.relative_error(counted, labelled)[2])
    assert math.isnan(metrics.agreement(counted[:1], labelled[:1]).bias)


def test_resampling_draws_with_replacement_and_the_interval_leaves_out_what_is_no_number() -> None:
    drawn = metrics.resample(10, 50)
    assert drawn.shape == (50, 10) and drawn.min() == 0 and drawn.max() == 9
    assert any(len(set(d)) < 10 for d in drawn.tolist())
    values = np.append(np.arange(101.0), math.nan)
    assert metrics.interval(values) == (2.5, 97.5)
    assert all(math.isnan(v) for v in metrics.interval(np.full(3, math.nan)))


def sigmoid(x: npt.NDArray[np.float64]) -> Float32:
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def test_platt_finds_how_a_score_was_bent() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 40_000)
    positive = rng.uniform(size=len(truth)) < sigmoid(truth)
    a, b = metrics.platt(sigmoid((truth - 1) / 0.5), positive)  # twice too sure, and moved
    assert a == pytest.approx(0.5, abs=0.02)
    assert b == pytest.approx(1.0, abs=0.05)


def test_platt_is_the_least_loss_and_a_weight_is_as_many_cases() -> None:
    rng = np.random.default_rng(1)
    score, positive = rng.uniform(size=60).astype(np.float32), rng.uniform(size=60) < 0.4
    weight = np.where(np.arange(60) < 20, 2.0, 1.0)
    line = metrics.platt(score, positive, weight)
    n = int(positive.sum())
    target = np.where(positive, (n + 1) / (n + 2), 1 / (60 - n + 2))
    x = np.log(score.astype(np.float64) / (1 - score))

    def loss(a: float, b: float) -> float:
        p = sigmoid(a * x + b).astype(np.float64)
        return float(-(weight * (target * np.log(p) + (1 - target) * np.log(1 - p))).sum())

    for da, db in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert loss(line[0] + da, line[1] + db) > loss(*line)


def test_platt_stands_scores_that_are_sure_and_a_class_that_is_missing() -> None:
    a, b = metrics.platt(f32(0, 0, 0, 1, 1, 1), bools("000111"))
    assert 0 < a < 1 and abs(b) < 1e-6  # perfect, but six cells do not prove certainty
    assert metrics.platt(f32(0.2, 0.9), bools("11")) == (1.0, 0.0)
    assert metrics.platt(f32(), bools("")) == (1.0, 0.0)

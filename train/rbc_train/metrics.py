"""Pure functions that score: no I/O, no models (in the manner of stardist's ``matching.py``)."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rbc_edge.values import Bool, Float32, Int64
from rbc_edge.vision.boxes import iou

Float64 = npt.NDArray[np.float64]


def match(found: Float32, score: Float32, truth: Float32, *, min_iou: float) -> Int64:
    """Pairs detections with labelled boxes, best score first, each box once (as COCO does).

    Args:
        found: float32 (N, 4), xyxy.
        score: float32 (N,).
        truth: float32 (M, 4), xyxy, same frame.
        min_iou: Least iou of a pair.

    Returns:
        int64 (N,): index of the labelled box, -1 without.

    >>> box = np.array([[0, 0, 10, 10]], np.float32)
    >>> match(np.repeat(box, 2, 0), np.array([0.5, 0.9], np.float32), box, min_iou=0.5).tolist()
    [-1, 0]
    """
    pairs = np.full(len(found), -1, np.int64)
    if len(truth) == 0:
        return pairs
    overlap = iou(found, truth)
    free = np.ones(len(truth), np.bool_)
    for i in np.argsort(-score, kind="stable"):
        candidates = np.where(free, overlap[i], -1.0)
        best = int(candidates.argmax())
        if candidates[best] >= min_iou:
            pairs[i] = best
            free[best] = False
    return pairs


def precision_recall(
    score: Float32, hit: Bool, n_truth: float, weight: Float64 | None = None
) -> tuple[Float64, Float64]:
    """Precision and recall of the detections down to each score, best first.

    Args:
        score: float32 (N,), over all photographs.
        hit: bool (N,), whether the detection found a labelled box.
        n_truth: Labelled boxes in all (weighted, where weights are given), > 0.
        weight: float64 (N,), how often each detection counts: that of its photograph in a resampling.

    Returns:
        Precision float64 (N,) and recall float64 (N,), 0..1.
    """
    order = np.argsort(-score, kind="stable")
    counted = np.ones(len(score)) if weight is None else weight[order]
    hits = np.cumsum(counted * hit[order])
    return hits / np.maximum(np.cumsum(counted), 1e-12), hits / n_truth


def average_precision(score: Float32, hit: Bool, n_truth: float, weight: Float64 | None = None) -> float:
    """Area under the precision envelope at 101 recalls (COCO).

    Args:
        score: float32 (N,), over all photographs.
        hit: bool (N,), whether the detection found a labelled box.
        n_truth: Labelled boxes in all (weighted, where weights are given).
        weight: See `precision_recall`.

    Returns:
        0..1. NaN without labelled boxes.

    >>> average_precision(np.array([0.9, 0.8], np.float32), np.array([True, True]), 2)
    1.0
    """
    if n_truth == 0:
        return float("nan")
    precision, recall = precision_recall(score, hit, n_truth, weight)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    where = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    padded = np.append(envelope, 0.0)
    return float(padded[np.minimum(where, len(envelope))].mean())


@dataclass(frozen=True, slots=True, eq=False)
class Roc:
    """Receiver operating characteristic, from the strictest threshold to the loosest.

    Attributes:
        threshold: float64 (T + 1,): infinity, then each distinct score, falling.
        false_positive: float64 (..., T + 1): share of negatives at or over the threshold. NaN without any.
        true_positive: float64 (..., T + 1): share of positives at or over it. NaN without any.
    """

    threshold: Float64
    false_positive: Float64
    true_positive: Float64

    def area(self) -> Float64:
        """Area under the curve, float64 (...), 0..1: how often a positive outranks a negative."""
        middle = (self.true_positive[..., 1:] + self.true_positive[..., :-1]) / 2
        area = (np.diff(self.false_positive, axis=-1) * middle).sum(axis=-1)
        return np.where(self._defined(), area, np.nan)

    def true_positive_at(self, true_negative: float) -> Float64:
        """Best share of positives found, float64 (...), where at least `true_negative` of negatives pass."""
        allowed = self.false_positive <= 1 - true_negative + 1e-9
        best = np.where(allowed, self.true_positive, 0.0).max(axis=-1)
        return np.where(self._defined(), best, np.nan)

    def _defined(self) -> Bool:
        return np.asarray(~np.isnan(self.false_positive[..., -1] + self.true_positive[..., -1]), np.bool_)


def roc(score: Float32, positive: Bool, weight: Float64 | None = None) -> Roc:
    """Draws the ROC of a score, of each of D resamplings where weights are given.

    Args:
        score: float32 (N,).
        positive: bool (N,).
        weight: float64 (D, N) or (N,), how often each case counts. Once each when None.

    Returns:
        Curves of shape (D, T + 1) or (T + 1,), T distinct scores.
    """
    order = np.argsort(-score, kind="stable")
    ranked = score[order].astype(np.float64)
    last = (
        np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, np.int64)
    )
    counted = (np.ones(len(score)) if weight is None else weight)[..., order]

    def share(of: Bool) -> Float64:
        upto = np.cumsum(counted * of[order], axis=-1)[..., last]
        upto = np.concatenate([np.zeros((*upto.shape[:-1], 1)), upto], axis=-1)
        total = upto[..., -1:]
        return np.where(total > 0, upto / np.maximum(total, 1e-12), np.nan)

    return Roc(np.append(np.inf, ranked[last]), share(~positive), share(positive))


def auc(score: Float32, positive: Bool) -> float:
    """Area under the ROC curve, as the probability that a positive outranks a negative (ties count half).

    Args:
        score: float32 (N,).
        positive: bool (N,).

    Returns:
        0..1. NaN when a class is missing.

    >>> auc(np.array([0.1, 0.9], np.float32), np.array([False, True]))
    1.0
    """
    return float(roc(score, positive).area())


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """How far a score can be read as a probability.

    Attributes:
        n: int64 (B,): cases in each of B bins of equal width over 0..1.
        mean_score: float64 (B,): their mean score. NaN in an empty bin.
        share: float64 (B,): share of positives among them. NaN in an empty bin.
        error: Expected calibration error: mean distance of the two over the cases (Guo et al. 2017, eq. 3).
        brier: Mean squared distance of score and label (Brier 1950).
    """

    n: Int64
    mean_score: Float64
    share: Float64
    error: float
    brier: float


def calibration(score: Float32, positive: Bool, *, bins: int = 10) -> Calibration:
    """Compares scores with what they promise.

    Args:
        score: float32 (N,), 0..1.
        positive: bool (N,).
        bins: How many.

    Returns:
        The comparison. Error and brier NaN without cases.

    >>> calibration(np.array([0.0, 1.0], np.float32), np.array([False, True])).error
    0.0
    """
    which = np.clip(score * bins, 0, bins - 1).astype(np.int64)
    n = np.bincount(which, minlength=bins).astype(np.int64)
    some = np.where(n > 0, n, np.nan)
    mean_score = np.bincount(which, score, bins) / some
    share = np.bincount(which, positive, bins) / some
    if len(score) == 0:
        return Calibration(n, mean_score, share, math.nan, math.nan)
    error = float(np.nansum(n * np.abs(mean_score - share)) / len(score))
    return Calibration(n, mean_score, share, error, float(np.mean((score - positive) ** 2)))


_SURE: Final = 1e-6  # a score of 0 or 1 has no log odds


def platt(score: Float32, positive: Bool, weight: Float64 | None = None) -> tuple[float, float]:
    """Fits how log odds must be stretched and moved so that a score is a probability (Platt 1999).

    Newton's method with halved steps and Platt's softened targets, as Lin, Lin, Weng (2007) correct it.

    Args:
        score: float32 (N,), 0..1.
        positive: bool (N,).
        weight: float64 (N,), how much each case counts. Once each when None.

    Returns:
        a and b: sigmoid(a * log odds of the score + b) is the probability. (1, 0) where a class is missing.
    """
    n = int(positive.sum())
    if n in (0, len(positive)):
        return 1.0, 0.0
    p = np.clip(score.astype(np.float64), _SURE, 1 - _SURE)
    x = np.stack([np.log(p / (1 - p)), np.ones(len(p))])
    target = np.where(positive, (n + 1) / (n + 2), 1 / (len(positive) - n + 2))
    counted = np.ones(len(p)) if weight is None else weight

    def loss(line: Float64) -> float:
        return float((counted * (np.logaddexp(0, line @ x) - target * (line @ x))).sum())

    line = np.array([1.0, 0.0])
    for _ in range(100):
        said = (1 + np.tanh(line @ x / 2)) / 2
        slope = x @ (counted * (said - target))
        step = np.linalg.solve((x * (counted * said * (1 - said))) @ x.T + 1e-12 * np.eye(2), slope)
        part = 1.0
        while part > 1e-9 and loss(line - part * step) > loss(line) - 1e-4 * part * float(slope @ step):
            part /= 2
        line = line - part * step
        if np.abs(slope).max() < 1e-9 * counted.sum():
            break
    return float(line[0]), float(line[1])


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two ways to count agree, field by field (Bland, Altman 1986).

    Attributes:
        bias: Mean of counted less labelled, cells a field.
        low: Lower limit of agreement, bias less 1.96 standard deviations, cells a field.
        high: Upper limit.
    """

    bias: float
    low: float
    high: float


def agreement(counted: Int64, labelled: Int64) -> Agreement:
    """Measures how counts agree.

    Args:
        counted: int64 (F,), cells in each field.
        labelled: int64 (F,), the same by the labels.

    Returns:
        Bias and limits. NaN with fewer than two fields.
    """
    difference = (counted - labelled).astype(np.float64)
    if len(difference) < 2:
        return Agreement(math.nan, math.nan, math.nan)
    bias, spread = float(difference.mean()), 1.96 * float(difference.std(ddof=1))
    return Agreement(bias, bias - spread, bias + spread)


def relative_error(counted: Int64, labelled: Int64) -> Float64:
    """Relative error of each field's count: float64 (F,), 0 is right. NaN where nothing is labelled."""
    return np.where(labelled > 0, (counted - labelled) / np.maximum(labelled, 1), np.nan)


def resample(n: int, draws: int, seed: int = 0) -> Int64:
    """Draws bootstrap samples.

    Args:
        n: What there is to draw from, photographs as a rule: the cells of one are alike.
        draws: How many samples.
        seed: Of the generator.

    Returns:
        int64 (draws, n): indices, drawn with replacement.
    """
    return np.random.default_rng(seed).integers(0, n, (draws, n), np.int64)


def interval(values: Float64) -> tuple[float, float]:
    """The middle 95 % of what bootstrap samples gave. Samples that gave nothing (NaN) are left out.

    >>> interval(np.arange(101.0))
    (2.5, 97.5)
    """
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return math.nan, math.nan
    low, high = np.percentile(known, (2.5, 97.5)).tolist()
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Single against overlapping, counted.

    Attributes:
        n: Labelled cells.
        accuracy: Share that is right.
        auc: Area under the ROC curve.
        recall_single: Share of single cells called single.
        recall_overlapping: Share of overlapping cells called overlapping.
        precision_overlapping: Share of cells called overlapping that are.
        precision_single: Share of cells called single that are.
        f1_single: Harmonic mean of precision and recall, single cells.
        f1_overlapping: The same, overlapping cells.
        recall_overlapping_at_95: Best recall of overlapping cells at any threshold that leaves 0.95 of the
            single cells single.
        calibration_error: Expected calibration error of the score (see `Calibration`).
        brier: Its Brier score.
    """

    n: int
    accuracy: float
    auc: float
    recall_single: float
    recall_overlapping: float
    precision_overlapping: float
    precision_single: float
    f1_single: float
    f1_overlapping: float
    recall_overlapping_at_95: float
    calibration_error: float
    brier: float


def verdicts(score: Float32, overlapping: Bool, threshold: float) -> Verdicts:
    """Scores the overlap verdicts of labelled cells.

    Args:
        score: float32 (N,), probability of overlapping.
        overlapping: bool (N,), the label.
        threshold: Least score of a cell called overlapping.

    Returns:
        The figures. NaN where a class is missing.
    """
    called = score >= threshold
    curve = roc(score, overlapping)
    calibrated = calibration(score, overlapping)

    def share(of: Bool, among: Bool) -> float:
        return float(of[among].mean()) if among.any() else float("nan")

    def f1(of: Bool, said: Bool) -> float:
        return float(2 * (of & said).sum() / (of.sum() + said.sum())) if (of | said).any() else float("nan")

    return Verdicts(
        n=len(score),
        accuracy=share(called == overlapping, np.ones(len(score), np.bool_)),
        auc=float(curve.area()),
        recall_single=share(~called, ~overlapping),
        recall_overlapping=share(called, overlapping),
        precision_overlapping=share(overlapping, called),
        precision_single=share(~overlapping, ~called),
        f1_single=f1(~overlapping, ~called),
        f1_overlapping=f1(overlapping, called),
        recall_overlapping_at_95=float(curve.true_positive_at(0.95)),
        calibration_error=calibrated.error,
        brier=calibrated.brier,
    )


def match_points(points: Float32, boxes: Float32) -> Int64:
    """Pairs points with boxes that hold them, nearest to a box's middle first, each box once.

    Args:
        points: float32 (K, 2), x and y.
        boxes: float32 (N, 4), xyxy, same frame.

    Returns:
        int64 (K,): index of the box, -1 without.

    >>> boxes = np.array([[0, 0, 10, 10], [6, 0, 16, 10]], np.float32)
    >>> match_points(np.array([[7, 5], [6, 5], [5, 5], [30, 5]], np.float32), boxes).tolist()
    [1, -1, 0, -1]
    """
    pairs = np.full(len(points), -1, np.int64)
    half = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6) / 2
    middle = (boxes[:, 2:] + boxes[:, :2]) / 2
    away = (np.abs(points[:, None] - middle) / half).max(axis=2, initial=0.0)  # 1 at the rim of the box
    for flat in np.argsort(away, axis=None, kind="stable").tolist():
        point, box = divmod(flat, len(boxes))
        if away[point, box] > 1:
            break
        if pairs[point] < 0 and box not in pairs:
            pairs[point] = box
    return pairs


OFF: Final = 0.15
"""A field is wrong if its count is off by more than this share, or its overlapping share by as much."""

OFF_CELLS: Final = 2
"""A count that is off by so many cells or fewer is not wrong."""


def fields_off(counted: Int64, labelled: Int64, share: Float64, labelled_share: Float64) -> Bool:
    """Says which fields are wrong: by the count, or by the overlapping share.

    Args:
        counted: int64 (F,), red cells in each field.
        labelled: int64 (F,), the same by the labels.
        share: float64 (F,), overlapping share of the counted cells, 0..1. NaN where it is not judged.
        labelled_share: float64 (F,), the same by the labels. NaN where it is not known.

    Returns:
        bool (F,): the count is off by more than 15 % and by more than two cells, or the overlapping share
        by more than 15 points.

    >>> share = np.array([0.1, 0.1, 0.3, 0.3])
    >>> labelled_share = np.array([0.1, 0.1, 0.1, np.nan])
    >>> fields_off(np.array([8, 7, 10, 10]), np.full(4, 10), share, labelled_share).tolist()
    [False, True, True, False]
    """
    error = np.abs(counted - labelled)
    by_count = (error > OFF * labelled) & (error > OFF_CELLS)
    return np.asarray(by_count | (np.abs(share - labelled_share) > OFF), np.bool_)


@dataclass(frozen=True, slots=True)
class Alarms:
    """Whether flags stand on the fields that are wrong.

    Attributes:
        wrong: Fields that are wrong.
        flagged: Fields with a flag.
        silent: Fields that are wrong and have no flag.
        false: Fields that are right and have a flag.
        silent_share: Share of silent fields among all fields.
        hit_rate: Share of flagged fields among the wrong ones. NaN without any.
        false_share: Share of flagged fields among the right ones. NaN without any.
    """

    wrong: int
    flagged: int
    silent: int
    false: int
    silent_share: float
    hit_rate: float
    false_share: float


def alarms(wrong: Bool, flagged: Bool) -> Alarms:
    """Compares flags with errors.

    Args:
        wrong: bool (F,), what `fields_off` returned.
        flagged: bool (F,), whether the field has a flag.

    Returns:
        The comparison.

    >>> found = alarms(np.array([True, True, False, False]), np.array([True, False, True, False]))
    >>> (found.silent_share, found.hit_rate, found.false_share)
    (0.25, 0.5, 0.5)
    """

    def share(of: Bool, among: Bool) -> float:
        return float(of[among].mean()) if among.any() else math.nan

    return Alarms(
        wrong=int(wrong.sum()),
        flagged=int(flagged.sum()),
        silent=int((wrong & ~flagged).sum()),
        false=int((flagged & ~wrong).sum()),
        silent_share=share(wrong & ~flagged, np.ones(len(wrong), np.bool_)),
        hit_rate=share(flagged, wrong),
        false_share=share(flagged, ~wrong),
    )

"""Pure functions that score: no I/O, no models (in the manner of stardist's ``matching.py``)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rbc_edge.values import Bool, Float32, Int64

Float64 = npt.NDArray[np.float64]


def iou(a: Float32, b: Float32) -> Float32:
    """Intersection over union of every box with every other.

    Args:
        a: float32 (N, 4), xyxy.
        b: float32 (M, 4), xyxy, same frame.

    Returns:
        float32 (N, M), 0..1.

    >>> iou(np.array([[0, 0, 2, 2]], np.float32), np.array([[1, 0, 3, 2]], np.float32)).round(3).tolist()
    [[0.3330000042915344]]
    """
    side = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.prod(np.clip(side, 0, None), axis=2)
    area_a = np.prod(a[:, 2:] - a[:, :2], axis=1)
    area_b = np.prod(b[:, 2:] - b[:, :2], axis=1)
    union = area_a[:, None] + area_b[None] - shared
    return np.asarray(shared / np.maximum(union, 1e-9), np.float32)


def match(found: Float32, score: Float32, truth: Float32, *, least_iou: float) -> Int64:
    """Pairs detections with labelled boxes, best score first, each box once (as COCO does).

    Args:
        found: float32 (N, 4), xyxy.
        score: float32 (N,).
        truth: float32 (M, 4), xyxy, same frame.
        least_iou: Least iou of a pair.

    Returns:
        int64 (N,): index of the labelled box, -1 without.

    >>> box = np.array([[0, 0, 10, 10]], np.float32)
    >>> match(np.repeat(box, 2, 0), np.array([0.5, 0.9], np.float32), box, least_iou=0.5).tolist()
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
        if candidates[best] >= least_iou:
            pairs[i] = best
            free[best] = False
    return pairs


def average_precision(score: Float32, hit: Bool, n_truth: int) -> float:
    """Area under the precision envelope at 101 recalls (COCO).

    Args:
        score: float32 (N,), over all photographs.
        hit: bool (N,), whether the detection found a labelled box.
        n_truth: Labelled boxes in all.

    Returns:
        0..1; NaN without labelled boxes.

    >>> average_precision(np.array([0.9, 0.8], np.float32), np.array([True, True]), 2)
    1.0
    """
    if n_truth == 0:
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(hit[order])
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / n_truth
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    where = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    padded = np.append(envelope, 0.0)
    return float(padded[np.minimum(where, len(envelope))].mean())


def auc(score: Float32, positive: Bool) -> float:
    """Area under the ROC curve, as the probability that a positive outranks a negative (ties count half).

    Args:
        score: float32 (N,).
        positive: bool (N,).

    Returns:
        0..1; NaN when a class is missing.

    >>> auc(np.array([0.1, 0.9], np.float32), np.array([False, True]))
    1.0
    """
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - counts + 1 + last) / 2  # mean rank of tied scores, from 1
    return float((rank[inverse][positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


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
    """

    n: int
    accuracy: float
    auc: float
    recall_single: float
    recall_overlapping: float
    precision_overlapping: float


def verdicts(score: Float32, overlapping: Bool, threshold: float) -> Verdicts:
    """Scores the overlap verdicts of labelled cells.

    Args:
        score: float32 (N,), probability of overlapping.
        overlapping: bool (N,), the label.
        threshold: Least score of a cell called overlapping.

    Returns:
        The figures; NaN where a class is missing.
    """
    called = score >= threshold

    def share(of: Bool, among: Bool) -> float:
        return float(of[among].mean()) if among.any() else float("nan")

    return Verdicts(
        len(score),
        share(called == overlapping, np.ones(len(score), np.bool_)),
        auc(score, overlapping),
        share(~called, ~overlapping),
        share(called, overlapping),
        share(overlapping, called),
    )

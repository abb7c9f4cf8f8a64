"""Scores a bundle, run through `rbc_edge` as the station runs it, against labels.

Never the torch model: what counts is what ships. Detection is judged on TXL-PBC's boxes, counts at the
shipped thresholds, single/overlapping on the verified labels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from rbc_edge import imaging
from rbc_edge.analyzer import Analyzer
from rbc_edge.values import (
    Bool,
    CellClass,
    Detections,
    FieldOfView,
    Float32,
    FovResult,
    Int64,
    Scale,
    ScaleSource,
)
from rbc_train import metrics
from rbc_train.datasets import CLASS_NAMES, Photograph, diameter_px, source_diameters_px
from rbc_train.labels import VerifiedLabel, VerifiedLabels

ScaleMode = Literal["estimated", "labelled"]

IOUS: Final = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's AP50-95
_LEAST_SCORE: Final = np.full(3, 0.01, np.float32)  # the precision curve needs its tail
_SCALE_FIELDS: Final = 8  # as many as the station looks at


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """One photograph, as the station saw it, beside its labels.

    Attributes:
        photograph: The photograph with its labelled boxes.
        result: What the analyzer gave at the shipped thresholds.
        ranked: Detections down to a score of 0.01, after suppression, for the precision curve.
        label_score: float32 (K,): overlap score of each verified box, cut where the label says.
        found_score: float32 (K,): overlap score of the detection that matches it; NaN where none does.
        overlapping: bool (K,): the verified labels, those that can be used.
        letter: K letters of them.
    """

    photograph: Photograph
    result: FovResult
    ranked: Detections
    label_score: Float32
    found_score: Float32
    overlapping: Bool
    letter: tuple[str, ...]


def examine(
    analyzer: Analyzer,
    photographs: Sequence[Photograph],
    verified: VerifiedLabels,
    *,
    scale: ScaleMode,
    progress: Callable[[int, int], None] | None = None,
) -> list[Examined]:
    """Runs the bundle over photographs.

    Args:
        analyzer: The bundle at work.
        photographs: What to run it on.
        verified: Overlap labels.
        scale: ``estimated``: each source is a slide, and nobody says how large its cells are (the
            station's default); ``labelled``: each photograph's labelled diameter is given.
        progress: Called with (done, in all).

    Returns:
        One entry a photograph, in order.
    """
    slide_scale = _slide_scales(analyzer, photographs) if scale == "estimated" else {}
    of_source = source_diameters_px(photographs)
    examined: list[Examined] = []
    for done, photograph in enumerate(photographs, start=1):
        field = imaging.load_field(photograph.image_path, photograph.source, photograph.name)
        given = slide_scale.get(photograph.source) or Scale(
            diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER
        )
        examined.append(_examine_one(analyzer, photograph, field, given, verified))
        if progress:
            progress(done, len(photographs))
    return examined


def _slide_scales(analyzer: Analyzer, photographs: Sequence[Photograph]) -> dict[str, Scale]:
    scales: dict[str, Scale] = {}
    for source in sorted({p.source for p in photographs}):
        own = [p for p in photographs if p.source == source]
        chosen = [own[round(i)] for i in np.linspace(0, len(own) - 1, min(_SCALE_FIELDS, len(own)))]
        scales[source] = analyzer.estimate_scale([p.read() for p in chosen])
    return scales


def _examine_one(
    analyzer: Analyzer, photograph: Photograph, field: FieldOfView, given: Scale, verified: VerifiedLabels
) -> Examined:
    result = analyzer.analyze(field, given)
    used = result.scale.cell_diameter_px
    image = imaging.balance(field.image)
    ranked = (
        Detections.empty()
        if math.isnan(used)
        else analyzer.detector.detect(image, used, score_threshold=_LEAST_SCORE)
    )
    labels = _usable(verified, photograph)
    boxes = np.array([v.xyxy for v in labels], np.float32).reshape(-1, 4)
    crops = imaging.crops(image, boxes, margin=analyzer.classifier.margin)
    return beside_labels(photograph, result, ranked, verified, analyzer.classifier.overlap_score(crops))


def beside_labels(
    photograph: Photograph,
    result: FovResult,
    ranked: Detections,
    verified: VerifiedLabels,
    label_score: Float32 | None = None,
) -> Examined:
    """Lays what a counter saw in one photograph beside its labels.

    Args:
        photograph: The photograph.
        result: Cells at the counter's own thresholds.
        ranked: Detections for the precision curve.
        verified: Overlap labels.
        label_score: float32 (K,), overlap scores of the usable verified boxes; NaN for a counter that
            judges only cells it finds itself.

    Returns:
        What `score` takes.
    """
    labels = _usable(verified, photograph)
    boxes = np.array([v.xyxy for v in labels], np.float32).reshape(-1, 4)
    found = result.cells.detections
    rbc = np.flatnonzero(found.class_id == CellClass.RBC)
    pairs = metrics.match(found.xyxy[rbc], found.score[rbc], boxes, least_iou=0.5)
    found_score = np.full(len(labels), np.nan, np.float32)
    found_score[pairs[pairs >= 0]] = result.cells.overlap_score[rbc][pairs >= 0]
    return Examined(
        photograph,
        result,
        ranked,
        np.full(len(labels), np.nan, np.float32) if label_score is None else label_score,
        found_score,
        np.array([v.label == "overlapping" for v in labels], np.bool_),
        tuple(v.letter for v in labels),
    )


def _usable(verified: VerifiedLabels, photograph: Photograph) -> list[VerifiedLabel]:
    return [v for v in verified.of_image(photograph.image_path.name) if v.label]


def score(examined: Sequence[Examined], overlap_threshold: float) -> dict[str, Any]:
    """Computes all figures, overall and by source.

    Args:
        examined: What `examine` returned.
        overlap_threshold: The bundle's.

    Returns:
        ``{"all": {...}, "bccd": {...}, ...}``, JSON-able.
    """
    sources = sorted({e.photograph.source for e in examined})
    groups = {
        "all": list(examined),
        **{s: [e for e in examined if e.photograph.source == s] for s in sources},
    }
    return {name: _score_group(group, overlap_threshold) for name, group in groups.items()}


def _score_group(group: Sequence[Examined], overlap_threshold: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"photographs": len(group)}
    for cell_class in CellClass:
        name = CLASS_NAMES[cell_class]
        precisions = [_average_precision(group, cell_class, least) for least in IOUS]
        figures[f"{name}_ap50"], figures[f"{name}_ap50_95"] = precisions[0], float(np.mean(precisions))
        labelled = _counts(group, cell_class, labelled=True)
        counted = _counts(group, cell_class, labelled=False)
        total = int(labelled.sum())
        figures[f"{name}_labelled"], figures[f"{name}_counted"] = total, int(counted.sum())
        figures[f"{name}_count_ratio"] = float(counted.sum()) / total if total else math.nan
        some = labelled > 0
        error = np.abs(counted[some] - labelled[some]) / labelled[some]
        figures[f"{name}_field_error_median"] = float(np.median(error)) if some.any() else math.nan
        figures[f"{name}_field_error_mean"] = float(error.mean()) if some.any() else math.nan
    present = [figures[f"{n}_ap50"] for n in CLASS_NAMES if not math.isnan(figures[f"{n}_ap50"])]
    figures["map50"] = float(np.mean(present)) if present else math.nan
    figures |= _precision_recall(group)
    overlapping = np.concatenate([e.overlapping for e in group])
    label_score = np.concatenate([e.label_score for e in group])
    found_score = np.concatenate([e.found_score for e in group])
    letters = [letter for e in group for letter in e.letter]
    found = ~np.isnan(found_score)
    figures["overlap_on_labelled_boxes"] = _verdicts(label_score, overlapping, letters, overlap_threshold)
    figures["overlap_on_found_boxes"] = _verdicts(
        found_score[found],
        overlapping[found],
        [c for c, f in zip(letters, found, strict=True) if f],
        overlap_threshold,
    )
    figures["overlap_labels_not_found"] = int((~found).sum())
    return figures


def _verdicts(
    scores: Float32, overlapping: Bool, letters: Sequence[str], threshold: float
) -> dict[str, float]:
    verdict = metrics.verdicts(scores, overlapping, threshold)
    figures = {name: getattr(verdict, name) for name in type(verdict).__slots__}
    # Touching is where eyes differ: say how each kind of overlap fares.
    for name, letter in (("over", "O"), ("touching", "T"), ("several", "M")):
        own = np.array([c[:1] == letter for c in letters], np.bool_) & overlapping
        figures[f"recall_{name}"] = float((scores[own] >= threshold).mean()) if own.any() else math.nan
    return figures


def _counts(group: Sequence[Examined], cell_class: CellClass, *, labelled: bool) -> Int64:
    """int64 (F,): cells of a class in each photograph."""
    ids: Iterable[Int64] = (
        e.photograph.class_id if labelled else e.result.cells.detections.class_id for e in group
    )
    return np.array([int((i == cell_class).sum()) for i in ids], np.int64)


def _average_precision(group: Sequence[Examined], cell_class: CellClass, least_iou: float) -> float:
    scores, hits, n_truth = _ranked_hits(group, cell_class, least_iou)
    return metrics.average_precision(scores, hits, n_truth)


def _ranked_hits(
    group: Sequence[Examined], cell_class: CellClass, least_iou: float
) -> tuple[Float32, Bool, int]:
    """Returns scores float32 (N,), whether each found a labelled box bool (N,), and the labelled boxes."""
    scores: list[Float32] = [np.zeros(0, np.float32)]
    hits: list[Bool] = [np.zeros(0, np.bool_)]
    n_truth = 0
    for e in group:
        truth = e.photograph.xyxy[e.photograph.class_id == cell_class]
        own = e.ranked.take(e.ranked.class_id == cell_class)
        hits.append(metrics.match(own.xyxy, own.score, truth, least_iou=least_iou) >= 0)
        scores.append(own.score)
        n_truth += len(truth)
    return np.concatenate(scores), np.concatenate(hits), n_truth


def _precision_recall(group: Sequence[Examined]) -> dict[str, float]:
    """Red cells at the shipped threshold, iou 0.5."""
    hits = n_found = n_truth = 0
    for e in group:
        truth = e.photograph.xyxy[e.photograph.class_id == CellClass.RBC]
        found = e.result.cells.detections
        found = found.take(found.class_id == CellClass.RBC)
        hits += int((metrics.match(found.xyxy, found.score, truth, least_iou=0.5) >= 0).sum())
        n_found += len(found)
        n_truth += len(truth)
    return {"rbc_precision": hits / max(n_found, 1), "rbc_recall": hits / max(n_truth, 1)}


def score_thresholds(examined: Sequence[Examined]) -> tuple[float, ...]:
    """Chooses each class's score threshold on validation photographs.

    Red cells: as many found as labelled, so that counts are unbiased; every source weighs the same, so
    that one with many cells does not decide for all. White cells and platelets are few, and an unbiased
    count of few is chance: best F1 at iou 0.5 instead.

    Args:
        examined: Validation photographs.

    Returns:
        By `CellClass`.
    """
    return (
        _unbiased_threshold(examined, CellClass.RBC),
        _best_f1_threshold(examined, CellClass.WBC),
        _best_f1_threshold(examined, CellClass.PLATELET),
    )


_USUAL_THRESHOLD: Final = 0.25  # of a class that no photograph shows: there is nothing to choose by
_CANDIDATES: Final = np.round(np.arange(0.1, 0.9, 0.005), 3)


def _unbiased_threshold(examined: Sequence[Examined], cell_class: CellClass) -> float:
    ratios: list[Float32] = []
    for source in sorted({e.photograph.source for e in examined}):
        own = [e for e in examined if e.photograph.source == source]
        n_truth = int(_counts(own, cell_class, labelled=True).sum())
        scores = np.concatenate([e.ranked.score[e.ranked.class_id == cell_class] for e in own])
        if n_truth:
            ratios.append((scores[None, :] >= _CANDIDATES[:, None]).sum(axis=1).astype(np.float32) / n_truth)
    if not ratios:
        return _USUAL_THRESHOLD
    bias = np.abs(np.log(np.maximum(np.mean(ratios, axis=0), 1e-6)))
    return float(_CANDIDATES[int(bias.argmin())])


def _best_f1_threshold(examined: Sequence[Examined], cell_class: CellClass) -> float:
    scores, hits, n_truth = _ranked_hits(examined, cell_class, 0.5)
    if n_truth == 0:
        return _USUAL_THRESHOLD
    over = scores[None, :] >= _CANDIDATES[:, None]
    f1 = 2 * (over & hits[None, :]).sum(axis=1) / np.maximum(over.sum(axis=1) + n_truth, 1)
    smooth = np.convolve(np.pad(f1, 5, mode="edge"), np.full(11, 1 / 11), mode="valid")
    return float(_CANDIDATES[int(smooth.argmax())])


def best_overlap_threshold(examined: Sequence[Examined]) -> float:
    """Chooses the overlap threshold with the best accuracy on verified validation labels.

    Of a plateau of equals the middle is taken.

    Args:
        examined: Validation photographs.

    Returns:
        A threshold between 0.2 and 0.8.
    """
    scores = np.concatenate([e.found_score for e in examined])
    overlapping = np.concatenate([e.overlapping for e in examined])
    found = ~np.isnan(scores)
    if not found.any():
        return 0.5
    candidates = np.round(np.arange(0.2, 0.801, 0.01), 2)
    accuracy = np.array([((scores[found] >= c) == overlapping[found]).mean() for c in candidates])
    smooth = np.convolve(np.pad(accuracy, 3, mode="edge"), np.full(7, 1 / 7), mode="valid")
    return float(candidates[int(smooth.argmax())])


def table(figures: dict[str, Any]) -> str:
    """Lays the headline figures out as text, a line a source.

    Args:
        figures: What `score` returned.

    Returns:
        Lines with a heading.
    """
    lines = [
        f"{'source':7} {'fields':>6} {'RBC AP50':>8} {'50-95':>6} {'WBC':>6} {'plt':>6} {'mAP50':>6} "
        f"{'labelled':>8} {'counted':>7} {'ratio':>6} {'field':>6} | {'n':>5} {'acc':>6} {'AUC':>6} "
        f"{'single':>6} {'overl.':>6} {'touch':>6}"
    ]
    for source, f in figures.items():
        v = f["overlap_on_found_boxes"]
        boxes = [f"{f[k]:>{w}.4f}" for k, w in (("rbc_ap50", 8), ("rbc_ap50_95", 6), ("wbc_ap50", 6))]
        boxes += [f"{f['platelet_ap50']:>6.4f}", f"{f['map50']:>6.4f}"]
        counts = f"{f['rbc_labelled']:>8} {f['rbc_counted']:>7} {f['rbc_count_ratio']:>6.3f}"
        kinds = ("accuracy", "auc", "recall_single", "recall_overlapping", "recall_touching")
        verdict = " ".join(f"{v[k]:>6.3f}" for k in kinds)
        lines.append(
            f"{source:7} {f['photographs']:>6} {' '.join(boxes)} {counts} "
            f"{f['rbc_field_error_median']:>6.3f} | {v['n']:>5} {verdict}"
        )
    return "\n".join(lines)

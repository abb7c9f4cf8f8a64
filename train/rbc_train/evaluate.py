"""Scores a bundle, run through `rbc_edge` as the station runs it, against labels.

Only the bundle that ships is scored, never the torch model. Detection is judged on TXL-PBC's boxes, counts
at the shipped thresholds, and overlap on the verified labels.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

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
from rbc_edge.vision import counting, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.boxes import iou
from rbc_edge.vision.counting import EdgeRule
from rbc_train import metrics
from rbc_train.data import CLASS_NAMES, Photograph, labelled_diameter_px, source_diameters_px
from rbc_train.labels import VerifiedLabel, VerifiedLabels
from rbc_train.metrics import Float64

ScaleMode = Literal["estimated", "labelled"]

IOUS: Final = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's AP50-95
_MIN_SCORE: Final = np.full(3, 0.01, np.float32)  # the precision curve needs its tail
_LABEL_MARGIN_PX: Final = 1.5  # a label that ends so near to the border was drawn up to it
_CUT: Final = 0.03  # of a cell: a box this near to the border is taken to be cut by it
_SCALE_FIELDS: Final = 8  # as many as the station looks at
_TOUCHES_IOU: Final = 0.1  # boxes of cells that merely lie close share less
_AP_DRAWS: Final = 4  # a quarter of the resamplings do for the AP, which takes the longest


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """One photograph as the station saw it, with its labels.

    Attributes:
        photograph: The photograph with its labelled boxes.
        result: What the analyzer gave at the shipped thresholds.
        ranked: Detections down to a score of 0.01, after suppression, for the precision curve.
        label_score: float32 (K,): overlap score of each verified box, cut where the label says.
        found_score: float32 (K,): overlap score of the detection that matches it. NaN where none does.
        overlapping: bool (K,): the verified labels, those that can be used.
        letter: K letters of them.
        refused: float32 (R, 4): red cells of the detector that the second stage refused, pixels of the
            photograph.
    """

    photograph: Photograph
    result: FovResult
    ranked: Detections
    label_score: Float32
    found_score: Float32
    overlapping: Bool
    letter: tuple[str, ...]
    refused: Float32 = field(default_factory=lambda: np.zeros((0, 4), np.float32))


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
        scale: ``estimated``: each source is a slide of unknown scale (the station's default).
            ``labelled``: each photograph's labelled diameter is given.
        progress: Called with (done, in all).

    Returns:
        One entry a photograph, in order.
    """
    slide_scale = _slide_scales(analyzer, photographs) if scale == "estimated" else {}
    of_source = source_diameters_px(photographs)
    examined: list[Examined] = []
    for done, photograph in enumerate(photographs, start=1):
        given = slide_scale.get(photograph.source) or Scale(
            labelled_diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER
        )
        field = photograph.field(given.cell_diameter_px)
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
    # A second look, down to the tail of the precision curve. Its boxes over the thresholds need not be the
    # station's: thresholds differ by class, and a red cell under its own may suppress a platelet over its.
    used = result.scale.cell_diameter_px
    view = analyzer.view(field, result.scale)
    ranked, detected = Detections.empty(), Detections.empty()
    if not math.isnan(used):
        ranked = analyzer.detector.detect(view, used, score_threshold=_MIN_SCORE)
        detected = analyzer.detector.detect(view, used)
    labels = usable(verified, photograph)
    boxes = np.array([v.xyxy for v in labels], np.float32).reshape(-1, 4)
    crops = preprocess.cell_crops(view, boxes, margin=analyzer.classifier.margin)
    seen = with_labels(photograph, result, ranked, verified, analyzer.classifier.overlap_score(crops))
    return replace(seen, refused=missing_boxes(detected, result.cells.detections))


def missing_boxes(detected: Detections, kept: Detections) -> Float32:
    """Returns the boxes of detected red cells that are not among the kept ones: float32 (R, 4)."""
    red = detected.xyxy[detected.class_id == CellClass.RBC]
    same = (red[:, None] == kept.xyxy[kept.class_id == CellClass.RBC]).all(axis=2)
    return np.asarray(red[~same.any(axis=1)], np.float32)


def with_labels(
    photograph: Photograph,
    result: FovResult,
    ranked: Detections,
    verified: VerifiedLabels,
    label_score: Float32 | None = None,
) -> Examined:
    """Combines what a counter saw in one photograph with its labels.

    Args:
        photograph: The photograph.
        result: Cells at the thresholds of the counter.
        ranked: Detections for the precision curve.
        verified: Overlap labels.
        label_score: float32 (K,), overlap scores of the usable verified boxes. NaN for a counter that
            judges only cells it finds itself.

    Returns:
        What `score` takes.
    """
    labels = usable(verified, photograph)
    boxes = np.array([v.xyxy for v in labels], np.float32).reshape(-1, 4)
    found = result.cells.detections
    rbc = np.flatnonzero(found.class_id == CellClass.RBC)
    pairs = metrics.match(found.xyxy[rbc], found.score[rbc], boxes, min_iou=0.5)
    found_score = np.full(len(labels), np.nan, np.float32)
    found_score[pairs[pairs >= 0]] = result.cells.overlap_score[rbc][pairs >= 0]
    return Examined(
        photograph=photograph,
        result=result,
        ranked=ranked,
        label_score=np.full(len(labels), np.nan, np.float32) if label_score is None else label_score,
        found_score=found_score,
        overlapping=np.array([v.label == "overlapping" for v in labels], np.bool_),
        letter=tuple(v.letter for v in labels),
    )


def usable(verified: VerifiedLabels, photograph: Photograph) -> list[VerifiedLabel]:
    """Returns the verified labels of a photograph that can be used, in the order of `Examined`."""
    return [v for v in verified.of_image(photograph.image_path.name) if v.label]


def score(examined: Sequence[Examined], overlap_threshold: float) -> dict[str, Any]:
    """Computes all figures, overall and by source.

    Args:
        examined: What `examine` returned.
        overlap_threshold: The bundle's.

    Returns:
        ``{"all": {...}, "bccd": {...}, ...}``, JSON-able.
    """
    return {name: score_group(group, overlap_threshold) for name, group in _groups(examined)}


def score_group(group: Sequence[Examined], overlap_threshold: float) -> dict[str, Any]:
    """Computes all figures of one group of photographs (see `score`)."""
    figures: dict[str, Any] = {"photographs": len(group)}
    for cell_class in CellClass:
        name = CLASS_NAMES[cell_class]
        precisions = [_average_precision(group, cell_class, least) for least in IOUS]
        figures[f"{name}_ap50"], figures[f"{name}_ap50_95"] = precisions[0], float(np.mean(precisions))
        figures |= {f"{name}_{k}": v for k, v in _count_figures(*field_counts(group, cell_class)).items()}
        figures |= {f"{name}_{k}": v for k, v in _precision_recall(group, cell_class).items()}
    present = [figures[f"{n}_ap50"] for n in CLASS_NAMES if not math.isnan(figures[f"{n}_ap50"])]
    figures["map50"] = float(np.mean(present)) if present else math.nan
    figures |= {f"rbc_whole_{k}": v for k, v in _count_figures(*_whole_counts(group)).items()}
    for rule in (EdgeRule.TWO_SIDES, EdgeRule.INSIDE):
        figures |= {f"rbc_{rule}_{k}": v for k, v in _count_figures(*_edge_counts(group, rule)).items()}
    figures["rbc_by_crowding"] = _by_crowding(group)
    for name, judged in (("labelled", judged_labels(group)), ("found", judged_found(group))):
        figures[f"overlap_on_{name}_boxes"] = verdicts(judged, overlap_threshold)
    figures["overlap_labels_not_found"] = sum(int(np.isnan(e.found_score).sum()) for e in group)
    return figures


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Scores and verified labels of N cells.

    Attributes:
        score: float32 (N,), overlap scores.
        overlapping: bool (N,), the verified labels.
        letter: N letters of them.
        source: N cameras.
    """

    score: Float32
    overlapping: Bool
    letter: tuple[str, ...]
    source: tuple[str, ...]

    def take(self, source: str) -> "Judged":
        """Returns the cells of one camera."""
        own = [i for i, s in enumerate(self.source) if s == source]
        letters = tuple(self.letter[i] for i in own)
        return Judged(self.score[own], self.overlapping[own], letters, (source,) * len(own))


def judged_found(examined: Sequence[Examined]) -> Judged:
    """Returns the verified cells that were found, judged on the box that found them."""
    return _judged(examined, [e.found_score for e in examined])


def judged_labels(examined: Sequence[Examined]) -> Judged:
    """Returns the verified cells, judged on the labelled box. None of a counter that does not do so."""
    return _judged(examined, [e.label_score for e in examined])


def _judged(examined: Sequence[Examined], scores: Sequence[Float32]) -> Judged:
    cells = [
        (s, o, letter, e.photograph.source)
        for e, own in zip(examined, scores, strict=True)
        for s, o, letter in zip(own.tolist(), e.overlapping.tolist(), e.letter, strict=True)
        if not math.isnan(s)
    ]
    return Judged(
        np.array([c[0] for c in cells], np.float32),
        np.array([c[1] for c in cells], np.bool_),
        tuple(c[2] for c in cells),
        tuple(c[3] for c in cells),
    )


def verdicts(judged: Judged, threshold: float) -> dict[str, float]:
    """Computes the figures of `metrics.Verdicts`, and number and recall of each kind of overlap.

    Args:
        judged: Cells.
        threshold: The bundle's.

    Returns:
        ``n``, ``accuracy``, ..., ``n_touching``, ``recall_touching``, the same for ``over`` and ``several``,
        and ``n_single``. NaN for a kind that no cell has.
    """
    figures: dict[str, float] = asdict(metrics.verdicts(judged.score, judged.overlapping, threshold))
    # People disagree most about touching cells, so each kind of overlap is given.
    for name, letter in (("over", "O"), ("touching", "T"), ("several", "M")):
        own = np.array([c[:1] == letter for c in judged.letter], np.bool_) & judged.overlapping
        figures[f"n_{name}"] = int(own.sum())
        figures[f"recall_{name}"] = float((judged.score[own] >= threshold).mean()) if own.any() else math.nan
    figures["n_single"] = int((~judged.overlapping).sum())
    return figures


def field_counts(examined: Sequence[Examined], cell_class: CellClass) -> tuple[Int64, Int64]:
    """Counts a class in each photograph.

    Args:
        examined: Photographs.
        cell_class: Which cells.

    Returns:
        int64 (F,) by the program, int64 (F,) by the labels. Red cells without a box are among these.
    """
    counted = [int((e.result.cells.detections.class_id == cell_class).sum()) for e in examined]
    labelled = [len(_labelled(e.photograph, cell_class)) for e in examined]
    return np.array(counted, np.int64), np.array(labelled, np.int64)


def _labelled(photograph: Photograph, cell_class: CellClass) -> Float32:
    """Returns the cells of a class, float32 (N, 4). Of red ones also those that were left out."""
    if cell_class == CellClass.RBC:
        return photograph.red_xyxy
    return np.asarray(photograph.xyxy[photograph.class_id == cell_class], np.float32)


def _whole_counts(examined: Sequence[Examined]) -> tuple[Int64, Int64]:
    """Red cells that the border does not cut, as `field_counts`.

    Two cells in five of these small photographs are cut, many to slivers that one annotator boxes and the
    next does not: beside the count of all cells this one says how much of the error lies there.
    """
    counted: list[int] = []
    labelled: list[int] = []
    for e in examined:
        found = e.result.cells.detections
        used = e.result.scale.cell_diameter_px
        least = 1.5 if math.isnan(used) else max(1.5, _CUT * used)
        size = np.array([e.photograph.width_px, e.photograph.height_px], np.float32)
        for numbers, box in (
            (counted, found.xyxy[found.class_id == CellClass.RBC]),
            (labelled, e.photograph.red_xyxy),
        ):
            whole = ((box[:, :2] > least) & (box[:, 2:] < size - least)).all(axis=1)
            numbers.append(int(whole.sum()))
    return np.array(counted, np.int64), np.array(labelled, np.int64)


def _edge_counts(examined: Sequence[Examined], rule: EdgeRule) -> tuple[Int64, Int64]:
    """Red cells under an edge rule, as `field_counts`. A label touches a border that it nearly reaches."""
    labelled = []
    for e in examined:
        red = e.photograph.red_xyxy
        far = np.array([e.photograph.width_px, e.photograph.height_px], np.float32) - _LABEL_MARGIN_PX
        out = (red[:, 2:] >= far).any(axis=1)
        if rule is EdgeRule.INSIDE:
            out |= (red[:, :2] <= _LABEL_MARGIN_PX).any(axis=1)
        labelled.append(int((~out).sum()))
    counted = [counting.count(e.result.cells, rule).n_rbc for e in examined]
    return np.array(counted, np.int64), np.array(labelled, np.int64)


def _count_figures(counted: Int64, labelled: Int64) -> dict[str, float]:
    total = int(labelled.sum())
    error = np.abs(metrics.relative_error(counted, labelled)[labelled > 0])
    agree = metrics.agreement(counted, labelled)
    return {
        "labelled": total,
        "counted": int(counted.sum()),
        "count_ratio": float(counted.sum()) / total if total else math.nan,
        "field_error_median": float(np.median(error)) if len(error) else math.nan,
        "field_error_mean": float(error.mean()) if len(error) else math.nan,
        "bias": agree.bias,
        "limit_low": agree.low,
        "limit_high": agree.high,
    }


def crowding(photograph: Photograph) -> float:
    """Measures how crowded a field is: the share of labelled red cells with a box that overlaps another box.

    Other measures were tried: red cells or box area per field area, the area that boxes cover, and how many
    boxes cover a point. This one and the last correlate best with the error of the count, and this one is
    easier to understand.

    Args:
        photograph: With its labelled boxes.

    Returns:
        0..1, boxes with an iou over 0.1 taken to overlap. NaN without red cells.
    """
    boxes = photograph.xyxy[photograph.class_id == CellClass.RBC]
    if len(boxes) == 0:
        return math.nan
    shared = iou(boxes, boxes)
    np.fill_diagonal(shared, 0.0)
    return float((shared.max(axis=1) > _TOUCHES_IOU).mean())


def crowding_quartiles(group: Sequence[Examined]) -> list[tuple[float, float, list[Examined]]]:
    """Sorts photographs by `crowding` into four parts of nearly equal size.

    Args:
        group: Photographs.

    Returns:
        For each part the least and the greatest crowding, and the photographs. Those without red cells
        are in none, a part without photographs is left out.
    """
    some = [(crowding(e.photograph), e) for e in group]
    ranked = sorted((c for c in some if not math.isnan(c[0])), key=lambda c: c[0])
    parts = [[ranked[i] for i in part] for part in np.array_split(np.arange(len(ranked)), 4)]
    return [(part[0][0], part[-1][0], [e for _, e in part]) for part in parts if part]


def _by_crowding(group: Sequence[Examined]) -> list[dict[str, float]]:
    return [
        {
            "from": low,
            "to": high,
            "photographs": len(part),
            **_count_figures(*field_counts(part, CellClass.RBC)),
        }
        for low, high, part in crowding_quartiles(group)
    ]


def _average_precision(group: Sequence[Examined], cell_class: CellClass, min_iou: float) -> float:
    scores, hits, n_truth = ranked_hits(group, cell_class, min_iou)
    return metrics.average_precision(scores, hits, n_truth)


def ranked_hits(
    group: Sequence[Examined], cell_class: CellClass, min_iou: float
) -> tuple[Float32, Bool, int]:
    """Matches the ranked detections of a class with its labelled boxes, photograph by photograph.

    Args:
        group: Photographs.
        cell_class: Which cells.
        min_iou: Least iou of a pair.

    Returns:
        Scores float32 (N,), whether each found a labelled box bool (N,), and how many boxes are labelled.
    """
    scores: list[Float32] = [np.zeros(0, np.float32)]
    hits: list[Bool] = [np.zeros(0, np.bool_)]
    n_truth = 0
    for e in group:
        truth = e.photograph.xyxy[e.photograph.class_id == cell_class]
        own = e.ranked.take(e.ranked.class_id == cell_class)
        hits.append(metrics.match(own.xyxy, own.score, truth, min_iou=min_iou) >= 0)
        scores.append(own.score)
        n_truth += len(truth)
    return np.concatenate(scores), np.concatenate(hits), n_truth


def class_hits(group: Sequence[Examined], cell_class: CellClass) -> tuple[int, int, int]:
    """Matches what was found at the shipped threshold with the labelled boxes, iou 0.5.

    Args:
        group: Photographs.
        cell_class: Which cells.

    Returns:
        How many found cells have a label, how many cells were found, and how many are labelled. Red cells
        without a box are among these.
    """
    hits = n_found = n_truth = 0
    for e in group:
        truth = _labelled(e.photograph, cell_class)
        found = e.result.cells.detections
        found = found.take(found.class_id == cell_class)
        hits += int((metrics.match(found.xyxy, found.score, truth, min_iou=0.5) >= 0).sum())
        n_found += len(found)
        n_truth += len(truth)
    return hits, n_found, n_truth


def _precision_recall(group: Sequence[Examined], cell_class: CellClass) -> dict[str, float]:
    hits, n_found, n_truth = class_hits(group, cell_class)
    return {
        "precision": hits / n_found if n_found else math.nan,
        "recall": hits / n_truth if n_truth else math.nan,
    }


def intervals(
    examined: Sequence[Examined], overlap_threshold: float, *, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns how much the main figures would vary with other photographs.

    Bootstrap: photographs are drawn with replacement. The cells of a photograph are drawn together, because
    they are alike (percentile interval, Efron 1979). The average precision uses a quarter of the draws,
    because it takes longest.

    Args:
        examined: What `examine` returned.
        overlap_threshold: The bundle's.
        draws: How many samples.
        seed: Of the draws.

    Returns:
        As `score`, (low, high) of the 95 % interval for each figure. Those of the verdicts (accuracy,
        auc, recall_overlapping_at_95) on found boxes.
    """
    return {
        name: _group_intervals(group, overlap_threshold, draws, seed) for name, group in _groups(examined)
    }


def _groups(examined: Sequence[Examined]) -> list[tuple[str, list[Examined]]]:
    sources = sorted({e.photograph.source for e in examined})
    own = [(s, [e for e in examined if e.photograph.source == s]) for s in sources]
    return [("all", list(examined)), *own]


def _group_intervals(
    group: Sequence[Examined], threshold: float, draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    drawn = metrics.resample(len(group), draws, seed)
    weight = np.stack([np.bincount(d, minlength=len(group)) for d in drawn]).astype(np.float64)
    counted, labelled = field_counts(group, CellClass.RBC)
    error = np.abs(metrics.relative_error(counted, labelled))
    total = weight @ labelled
    found = [~np.isnan(e.found_score) for e in group]
    of_photograph = np.repeat(np.arange(len(group)), [int(f.sum()) for f in found])
    judged = judged_found(group)
    of_cell = weight[:, of_photograph]
    right = (judged.score >= threshold) == judged.overlapping
    n_judged = of_cell.sum(axis=1)
    curves = metrics.roc(judged.score, judged.overlapping, of_cell)
    samples = {
        "rbc_count_ratio": np.where(total > 0, weight @ counted / np.maximum(total, 1), np.nan),
        "rbc_field_error_median": np.array([_median(error[d]) for d in drawn]),
        "accuracy": np.where(n_judged > 0, of_cell @ right / np.maximum(n_judged, 1), np.nan),
        "auc": curves.area(),
        "recall_overlapping_at_95": curves.true_positive_at(0.95),
    }
    few = weight[: max(1, draws // _AP_DRAWS)]
    for cell_class in CellClass:
        name = CLASS_NAMES[cell_class]
        samples[f"{name}_ap50"] = _resampled_precision(group, cell_class, IOUS[0], few)
    by_iou = [_resampled_precision(group, CellClass.RBC, least, few) for least in IOUS]
    samples["rbc_ap50_95"] = np.mean(by_iou, axis=0)
    return {name: metrics.interval(values) for name, values in samples.items()}


def _median(values: Float64) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def _resampled_precision(
    group: Sequence[Examined], cell_class: CellClass, min_iou: float, weight: Float64
) -> Float64:
    """Average precision float64 (D,) of each of D resamplings, `weight` float64 (D, photographs)."""
    score, hit, _ = ranked_hits(group, cell_class, min_iou)
    of_photograph = np.repeat(
        np.arange(len(group)), [int((e.ranked.class_id == cell_class).sum()) for e in group]
    )
    # AP goes by boxes: cells without one are not missed.
    n_truth = weight @ np.array([(e.photograph.class_id == cell_class).sum() for e in group])
    order = np.argsort(-score, kind="stable")  # sorted once, the sort of each draw has nothing to do
    score, hit, of_photograph = score[order], hit[order], of_photograph[order]
    return np.array(
        [
            metrics.average_precision(score, hit, float(n), w[of_photograph])
            for n, w in zip(n_truth, weight, strict=True)
        ]
    )


def by_laboratory(examined: Iterable[Examined]) -> dict[str, list[Examined]]:
    """Returns the photographs of each laboratory, by its name in the order of the alphabet."""
    everyone = list(examined)
    names = sorted({e.photograph.laboratory for e in everyone})
    return {n: [e for e in everyone if e.photograph.laboratory == n] for n in names}


def score_thresholds(examined: Sequence[Examined]) -> tuple[float, ...]:
    """Chooses each class's score threshold on validation photographs.

    Red cells: as many found as labelled, so that counts are unbiased. White cells and platelets are few, and
    an unbiased count of few is chance: best F1 at iou 0.5 instead. Every laboratory weighs the same, as if
    each had shown as many red cells. So one with many photographs does not decide for all.

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
    for own in by_laboratory(examined).values():
        n_truth = int(field_counts(own, cell_class)[1].sum())
        scores = np.concatenate([e.ranked.score[e.ranked.class_id == cell_class] for e in own])
        if n_truth:
            ratios.append((scores[None, :] >= _CANDIDATES[:, None]).sum(axis=1).astype(np.float32) / n_truth)
    if not ratios:
        return _USUAL_THRESHOLD
    bias = np.abs(np.log(np.maximum(np.mean(ratios, axis=0), 1e-6)))
    return float(_CANDIDATES[int(bias.argmin())])


def _best_f1_threshold(examined: Sequence[Examined], cell_class: CellClass) -> float:
    right, found, labelled = np.zeros(len(_CANDIDATES)), np.zeros(len(_CANDIDATES)), 0.0
    for own in by_laboratory(examined).values():
        scores, hits, n_truth = ranked_hits(own, cell_class, 0.5)
        over = scores[None, :] >= _CANDIDATES[:, None]
        # By red cells, not by cells of the class: where hardly any are labelled, false ones would decide all.
        weight = 1 / max(int(field_counts(own, CellClass.RBC)[1].sum()), 1)
        right += weight * (over & hits[None, :]).sum(axis=1)
        found += weight * over.sum(axis=1)
        labelled += weight * n_truth
    if labelled == 0:
        return _USUAL_THRESHOLD
    smooth = _smooth(2 * right / (found + labelled), 5)
    return float(_CANDIDATES[int(smooth.argmax())])


OVERLAP_CANDIDATES: Final = np.round(np.arange(0.2, 0.801, 0.01), 2)
_AS_UNBIASED: Final = 0.001  # of the share: less than any laboratory's few hundred cells can tell apart


def best_overlap_threshold(examined: Sequence[Examined]) -> float:
    """Chooses the overlap threshold on verified validation labels: unbiased on every laboratory.

    What users read is the overlapping share. A mean over laboratories hides that it is too high on one and
    too low on another. So the threshold is taken whose worst laboratory is off least, and of those that are
    as good the most accurate, every laboratory weighing the same. Of a plateau of equals it is the middle.

    Args:
        examined: Validation photographs.

    Returns:
        A threshold between 0.2 and 0.8. 0.5 without labels.
    """
    biases, accuracies = [], []
    for own in by_laboratory(examined).values():
        judged = judged_found(own)
        if len(judged.score):
            called = judged.score >= OVERLAP_CANDIDATES[:, None]  # threshold by cell
            biases.append(_smooth(called.mean(axis=1) - judged.overlapping.mean(), 3))
            accuracies.append(_smooth((called == judged.overlapping).mean(axis=1), 3))
    if not biases:
        return 0.5
    worst, accuracy = np.abs(biases).max(axis=0), np.mean(accuracies, axis=0)
    accuracy[worst > worst.min() + _AS_UNBIASED] = -np.inf
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-9)
    return float(OVERLAP_CANDIDATES[best[len(best) // 2]])


def platt(examined: Sequence[Examined]) -> tuple[float, float]:
    """Fits the overlap score of found cells to their verified labels, every laboratory weighing the same.

    Args:
        examined: Validation photographs.

    Returns:
        a and b of `metrics.platt`.
    """
    judged = [j for own in by_laboratory(examined).values() if len((j := judged_found(own)).score)]
    n = sum(len(j.score) for j in judged)
    weight = [np.full(len(j.score), n / (len(judged) * len(j.score))) for j in judged]
    return metrics.platt(
        np.concatenate([np.zeros(0, np.float32), *(j.score for j in judged)]),
        np.concatenate([np.zeros(0, np.bool_), *(j.overlapping for j in judged)]),
        np.concatenate([np.zeros(0), *weight]),
    )


REFUSE_CANDIDATES: Final = np.round(np.arange(0.5, 1.0, 0.005), 3)
"""With a floor: a network that knows its cells well need not use up what it may lose."""

MOST_REFUSED: Final = 0.01
"""Of the red cells, every laboratory weighing the same, no more than this share may be refused."""
MOST_REFUSED_ANYWHERE: Final = 0.015
"""Of the red cells of no laboratory may more than this share be refused."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """From which score on a box is refused, and what that does.

    Attributes:
        threshold: Least refuse score of a box that is refused.
        cells: Share of the red cells that are refused, by laboratory.
        negatives: Share of what is not one red cell that is refused, by laboratory.
    """

    threshold: float
    cells: Mapping[str, float]
    negatives: Mapping[str, float]


def refuse_threshold(
    scores_of_cells: Mapping[str, Float32], scores_of_negatives: Mapping[str, Float32]
) -> Refusal:
    """Chooses the smallest threshold that still spares the red cells.

    Args:
        scores_of_cells: float32 (N,), refuse scores of red cells, by laboratory.
        scores_of_negatives: float32 (M,), those of what is not one red cell. They do not decide.

    Returns:
        The smallest threshold that refuses at most `MOST_REFUSED` of the red cells and at most
        `MOST_REFUSED_ANYWHERE` of those of any laboratory. 1.0 if none does so, or without red cells.
    """
    known = {name: scores for name, scores in scores_of_cells.items() if len(scores)}
    refused = np.array([(s >= REFUSE_CANDIDATES[:, None]).mean(axis=1) for s in known.values()], np.float64)
    threshold = 1.0
    if known:
        fair = (refused.mean(axis=0) <= MOST_REFUSED) & (refused.max(axis=0) <= MOST_REFUSED_ANYWHERE)
        threshold = float(REFUSE_CANDIDATES[int(fair.argmax())]) if fair.any() else 1.0

    def share(of: Mapping[str, Float32]) -> dict[str, float]:
        return {name: float((s >= threshold).mean()) for name, s in of.items() if len(s)}

    return Refusal(threshold, share(scores_of_cells), share(scores_of_negatives))


def refuse_scores(
    examined: Sequence[Examined], judge: Callable[[Examined, Float32], Float32], sure_score: float = 1.0
) -> tuple[dict[str, Float32], dict[str, Float32]]:
    """Collects what `refuse_threshold` chooses by.

    Args:
        examined: Validation photographs, seen by a bundle that refuses nothing.
        judge: Gives the refuse scores float32 (N,) of boxes float32 (N, 4) of a photograph.
        sure_score: Detector score from which a box is not refused, whatever its refuse score: that is 0.

    Returns:
        By laboratory: scores of the found boxes that match a labelled red cell, and of the labelled boxes
        that are not one red cell.
    """
    cells: dict[str, Float32] = {}
    negatives: dict[str, Float32] = {}
    for name, own in by_laboratory(examined).items():
        right, others = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for e in own:
            found = e.result.cells.detections
            found = found.take(found.class_id == CellClass.RBC)
            truth = e.photograph.xyxy[e.photograph.class_id == CellClass.RBC]
            hit = metrics.match(found.xyxy, found.score, truth, min_iou=0.5) >= 0
            may_go = found.score[hit] < sure_score
            right.append(np.where(may_go, judge(e, found.xyxy[hit]), 0).astype(np.float32))
            boxes = np.array([n.xyxy for n in e.photograph.non_red_cells()], np.float32).reshape(-1, 4)
            others.append(judge(e, boxes))
        cells[name], negatives[name] = np.concatenate(right), np.concatenate(others)
    return cells, negatives


def _smooth(values: Float64, reach: int) -> Float64:
    """The mean over `reach` neighbours on each side, so that a single cell does not decide."""
    n = 2 * reach + 1
    return np.convolve(np.pad(values, reach, mode="edge"), np.full(n, 1 / n), mode="valid")


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

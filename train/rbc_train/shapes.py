"""How well a bundle names the shapes of red cells: figures, calibration, and the section for readers.

The truth is the points of experts on whole fields (Chula RBC-12). A point belongs to the red cell that holds
it, as the station finds it. What is not found, or refused, is counted as such and has no shape.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rbc_edge.values import SHAPES, Bool, CellClass, Float32, Int64, Scale, ScaleSource, Shape
from rbc_edge.vision import morphology, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.classifier import shape_columns
from rbc_train import metrics
from rbc_train.data import Photograph
from rbc_train.metrics import Float64
from rbc_train.results import Section, Table

_FEW: Final = 100  # with fewer cells nothing is learned
_RESAMPLED: Final = 1000
_BINS: Final = 10
_SLOPES: Final = np.geomspace(0.3, 4.0, 100)
RIGHT: Final = 0.9
"""Of the cells that are not called unsure, at least this share shall be right."""
_BOUNDS: Final = np.round(np.arange(0.0, 0.96, 0.01), 2)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Red cells with a point of an expert, as a bundle sees them.

    Attributes:
        truth: int64 (N,), index into `SHAPES`.
        probability: float32 (N, S), of each of `SHAPES`. 0 for those that the bundle does not know.
        signs: float32 (N, `morphology.N_SIGNS`), what was measured. NaN: nothing.
        judged: bool (N,), whether the cell is single and uncut: only then is a shape judged.
        field: int64 (N,), number of the photograph.
        n_points: Points in all, those without a red cell too.
    """

    truth: Int64
    probability: Float32
    signs: Float32
    judged: Bool
    field: Int64
    n_points: int

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def named(self) -> Int64:
        """int64 (N,): the most probable shape."""
        return np.asarray(self.probability.argmax(axis=1), np.int64)

    @property
    def score(self) -> Float32:
        """float32 (N,): its probability."""
        return np.asarray(self.probability.max(axis=1, initial=0.0), np.float32)

    def of_judged(self) -> "Seen":
        """Returns the single, uncut cells."""
        own = self.judged
        return Seen(
            self.truth[own], self.probability[own], self.signs[own], own[own], self.field[own], self.n_points
        )


def look(analyzer: Analyzer, photographs: Sequence[Photograph], *, scale: Scale | None = None) -> Seen:
    """Runs a bundle over photographs with points.

    Args:
        analyzer: The bundle at work. One that knows no shapes sees no cells.
        photographs: What to run it on.
        scale: Of the slide that they are. None estimates it from some of them, as the station does.

    Returns:
        The cells that were found.
    """
    shapes = [SHAPES.index(Shape(name)) for name in analyzer.bundle.manifest.shapes]
    if not shapes or not photographs:
        return Seen(*_nothing(), n_points=0)
    given = scale or _estimate(analyzer, photographs)
    parts = [_nothing()]
    n_points = 0
    for number, photograph in enumerate(photographs):
        points = np.array([(p.x, p.y) for p in photograph.points], np.float32).reshape(-1, 2)
        n_points += len(points)
        field = photograph.field(given.cell_diameter_px)
        result = analyzer.analyze(field, given)
        cells = result.cells
        red = np.flatnonzero(cells.detections.class_id == CellClass.RBC)
        xyxy = cells.detections.xyxy[red]
        pairs = metrics.match_points(points, xyxy)
        own = pairs[pairs >= 0]
        truth = [
            SHAPES.index(Shape(p.shape)) for p, i in zip(photograph.points, pairs, strict=True) if i >= 0
        ]
        view = analyzer.view(field, result.scale)
        crops = preprocess.cell_crops(view, xyxy[own], margin=analyzer.classifier.margin)
        sides = (xyxy[own, 2:] - xyxy[own, :2]) / np.float32(result.scale.cell_diameter_px)
        probability = np.zeros((len(own), len(SHAPES)), np.float32)
        form = cells.morphology.take(np.asarray(red[own], np.int64))
        signs = morphology.signs(form, result.scale.cell_diameter_px)
        said = analyzer.classifier.scores(crops, sides).shape
        probability[:, shapes] = analyzer.classifier.informed(said, signs)
        judged = ~cells.overlapping[red[own]] & ~cells.touches_edge[red[own]].any(axis=1)
        of_field = np.full(len(own), number, np.int64)
        parts.append((np.array(truth, np.int64), probability, signs, judged, of_field))
    truths, probabilities, measures, judgements, fields = zip(*parts, strict=True)
    return Seen(
        np.concatenate(truths),
        np.concatenate(probabilities),
        np.concatenate(measures),
        np.concatenate(judgements),
        np.concatenate(fields),
        n_points,
    )


def _nothing() -> tuple[Int64, Float32, Float32, Bool, Int64]:
    none, nothing = np.zeros(0, np.int64), np.zeros((0, morphology.N_SIGNS), np.float32)
    return none, np.zeros((0, len(SHAPES)), np.float32), nothing, np.zeros(0, np.bool_), none


def _estimate(analyzer: Analyzer, photographs: Sequence[Photograph]) -> Scale:
    chosen = [photographs[round(i)] for i in np.linspace(0, len(photographs) - 1, min(8, len(photographs)))]
    found = analyzer.estimate_scale([p.read() for p in chosen])
    return found if not math.isnan(found.cell_diameter_px) else Scale(math.nan, ScaleSource.NONE)


def slope(seen: Seen) -> float:
    """Returns the factor on the logits that makes probabilities right (temperature: Guo et al. 2017)."""
    logits = np.log(np.clip(seen.probability, 1e-9, 1)).astype(np.float64)

    def surprise(factor: float) -> float:
        line = factor * logits
        line -= np.logaddexp.reduce(line, axis=1, keepdims=True)
        return -float(line[np.arange(len(seen)), seen.truth].mean())

    return float(min(_SLOPES, key=surprise))


_DECAY: Final = 1e-4


def at_some_scales(analyzer: Analyzer, photographs: Sequence[Photograph]) -> Seen:
    """Looks at photographs at their scale, and at 5 % less and more: so far may an estimate be off."""
    right = _estimate(analyzer, photographs).cell_diameter_px
    looks = [
        look(analyzer, photographs, scale=Scale(right * f, ScaleSource.SLIDE)) for f in (0.95, 1.0, 1.05)
    ]
    return Seen(
        np.concatenate([each.truth for each in looks]),
        np.concatenate([each.probability for each in looks]),
        np.concatenate([each.signs for each in looks]),
        np.concatenate([each.judged for each in looks]),
        np.concatenate([each.field for each in looks]),
        sum(each.n_points for each in looks),
    )


def weights(seen: Seen) -> tuple[tuple[float, ...], ...]:
    """Learns how probabilities of the network and measures are brought together (`Classifier.informed`).

    Multinomial logistic regression on measured cells of training fields. The network knows these cells, but
    it is hardly better on them than on others (0.87 of them right, and 0.85 on validation fields).

    Args:
        seen: Training cells, as a bundle without weights sees them (`at_some_scales`).

    Returns:
        (S + signs + 1, S) numbers, rounded so that a manifest stays short. Empty with fewer than 100 cells.
    """
    is_known = seen.judged & np.isfinite(seen.signs).all(axis=1)
    if is_known.sum() < _FEW:
        return ()
    x = shape_columns(seen.probability[is_known], seen.signs[is_known]).astype(np.float64)
    columns = x[:, :-1]  # the last is the constant
    mean, spread = columns.mean(axis=0), np.maximum(columns.std(axis=0), 1e-6)
    x[:, :-1] = (columns - mean) / spread
    own = _fitted(x, seen.truth[is_known], start=spread[: len(SHAPES)])
    plain = own[:-1] / spread[:, None]
    constant = own[-1] - mean @ plain
    return tuple(tuple(float(f"{v:.5g}") for v in row) for row in (*plain.tolist(), constant.tolist()))


def _fitted(x: Float64, truth: Int64, start: Float64) -> Float64:
    """Fits logits x @ W to shapes. x float64 (N, C), its last column 1. Starts as the network says."""
    import torch  # noqa: PLC0415  takes seconds, which evaluating must not pay
    from torch.nn import functional  # noqa: PLC0415

    rows, target = torch.from_numpy(x), torch.from_numpy(truth)
    own = torch.zeros(x.shape[1], len(SHAPES), dtype=torch.float64)
    own[: len(SHAPES)] = torch.diag(torch.from_numpy(start))
    own.requires_grad_()
    # Deterministic: one start, all cells in every step.
    search = torch.optim.LBFGS([own], max_iter=500, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        off: torch.Tensor = functional.cross_entropy(rows @ own, target) + _DECAY * (own[:-1] ** 2).sum()
        off.backward()  # type: ignore[no-untyped-call]
        return off

    search.step(loss)  # type: ignore[no-untyped-call]
    return np.asarray(own.detach().numpy(), np.float64)


def threshold(seen: Seen) -> float:
    """Returns the least probability from which on `RIGHT` of the judged cells are right, 0..1."""
    own = seen.of_judged()
    right, score = own.named == own.truth, own.score
    for bound in _BOUNDS.tolist():
        sure = score >= bound
        if sure.any() and right[sure].mean() >= RIGHT:
            return float(bound)
    return float(_BOUNDS[-1])


def figures(seen: Seen, bound: float) -> dict[str, Any]:
    """Computes all figures of the shapes of judged cells.

    Args:
        seen: What `look` returned.
        bound: The bundle's `shape_threshold`.

    Returns:
        Points, found and judged cells; accuracy, macro F1 (over the shapes that occur) and calibration error
        of all judged cells; the share that is sure and its accuracy; figures by shape; the confusion matrix.
        Intervals are 95 %, by resampling whole fields.
    """
    own = seen.of_judged()
    sure = own.score >= bound
    accuracy, macro = _accuracy(own.truth, own.named), _macro(own.truth, own.named)
    return {
        "points": seen.n_points,
        "found": len(seen),
        "judged": len(own),
        "fields": len(np.unique(own.field)),
        "accuracy": accuracy,
        "accuracy_interval": _interval(own, _accuracy),
        "macro_f1": macro,
        "macro_f1_interval": _interval(own, _macro),
        "calibration_error": _calibration_error(own.score, own.named == own.truth),
        "bound": bound,
        "sure": float(sure.mean()) if len(own) else math.nan,
        "sure_accuracy": _accuracy(own.truth[sure], own.named[sure]),
        "sure_macro_f1": _macro(own.truth[sure], own.named[sure]),
        "by_shape": {str(s): _of_shape(own, sure, k) for k, s in enumerate(SHAPES) if (own.truth == k).any()},
        "confusion": _confusion(own.truth, own.named).tolist(),
        "blocks": by_blocks(seen).tolist(),
    }


def _of_shape(own: Seen, sure: Bool, shape: int) -> dict[str, Any]:
    is_shape, named = own.truth == shape, own.named == shape
    share = own.probability[:, shape] if len(own) else np.zeros(0, np.float32)
    return {
        "cells": int(is_shape.sum()),
        "recall": _share(named[is_shape]),
        "precision": _share(is_shape[named]),
        "f1": _f1(own.truth, own.named, shape),
        "f1_interval": _interval(own, lambda truth, said: _f1(truth, said, shape)),
        "sure": _share(sure[is_shape]),
        "called": int(named.sum()),
        "expected": float(share.sum()),
    }


def _share(of: Bool) -> float:
    return float(of.mean()) if len(of) else math.nan


def _accuracy(truth: Int64, named: Int64) -> float:
    return _share(np.asarray(truth == named, np.bool_))


def _f1(truth: Int64, named: Int64, shape: int) -> float:
    hits = int(((truth == shape) & (named == shape)).sum())
    n = int((truth == shape).sum() + (named == shape).sum())
    return 2 * hits / n if n else math.nan


def _macro(truth: Int64, named: Int64) -> float:
    each = [_f1(truth, named, shape) for shape in np.unique(truth).tolist()]
    return float(np.mean(each)) if each else math.nan


def _interval(own: Seen, of: Callable[[Int64, Int64], float]) -> tuple[float, float]:
    """The 95 % interval of a figure: fields are drawn again, because cells of one field are alike."""
    fields = np.unique(own.field)
    where = [np.flatnonzero(own.field == f) for f in fields]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLED if len(fields) > 1 else 0):
        index = np.concatenate([where[i] for i in rng.integers(0, len(fields), len(fields))])
        drawn.append(of(own.truth[index], own.named[index]))
    return metrics.interval(np.array(drawn, np.float64))


def _calibration_error(score: Float32, right: Bool) -> float:
    """Mean distance of probability and share that is right, in bins of equal width."""
    if not len(score):
        return math.nan
    number = np.minimum((score * _BINS).astype(np.int64), _BINS - 1)
    off = [
        abs(float(score[number == k].mean()) - float(right[number == k].mean())) * float((number == k).mean())
        for k in np.unique(number).tolist()
    ]
    return float(sum(off))


def _confusion(truth: Int64, named: Int64) -> Int64:
    """Counts (S, S): rows by the expert, columns by the bundle."""
    table = np.zeros((len(SHAPES), len(SHAPES)), np.int64)
    np.add.at(table, (truth, named), 1)
    return table


def section(of: Mapping[str, Any], command: str = "python -m rbc_train evaluate") -> Section:
    """Makes the section ``shapes`` of what `figures` returned."""
    return Section("shapes", command, tables(of), data=dict(of))


def tables(of: Mapping[str, Any]) -> tuple[Table, ...]:
    """Lays the figures out for readers: in all, by shape, and which shape is taken for which."""
    by_shape: Mapping[str, Any] = of["by_shape"]
    low, high = of["accuracy_interval"]
    macro_low, macro_high = of["macro_f1_interval"]
    whole = Table(
        "Shapes of single, uncut red cells, by the points of experts on validation fields. "
        f"Sure: a probability of {of['bound']:.2f} or more.",
        (
            "points", "found", "judged", "accuracy", "macro F1", "calibration error", "sure",
            "accuracy of sure",
        ),
        (
            (
                str(of["points"]), str(of["found"]), str(of["judged"]),
                f"{of['accuracy']:.3f} ({low:.3f} to {high:.3f})",
                f"{of['macro_f1']:.3f} ({macro_low:.3f} to {macro_high:.3f})",
                f"{of['calibration_error']:.3f}", f"{of['sure']:.3f}", f"{of['sure_accuracy']:.3f}",
            ),
        ),
    )  # fmt: skip
    each = Table(
        "Each shape. The interval of F1 is 95 %, over fields.",
        ("shape", "cells", "recall", "precision", "F1", "interval", "sure"),
        tuple(
            (
                name, str(f["cells"]), _figure(f["recall"]), _figure(f["precision"]), _figure(f["f1"]),
                f"{f['f1_interval'][0]:.2f} to {f['f1_interval'][1]:.2f}", _figure(f["sure"]),
            )
            for name, f in by_shape.items()
        ),
    )  # fmt: skip
    names = [str(s) for s in SHAPES]
    mixed = Table(
        "Which shape is taken for which. A row is what the expert said, a column what the bundle says.",
        ("", *(name[:4] for name in names)),
        tuple(
            (name, *(str(n or "") for n in row))
            for name, row in zip(names, of["confusion"], strict=True)
            if any(row)
        ),
    )
    return whole, each, mixed


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def by_blocks(seen: Seen, n: int = 5) -> Float64:
    """Returns the accuracy in `n` blocks of neighbouring fields, which are often of one slide."""
    own = seen.of_judged()
    edges = np.linspace(0, own.field.max(initial=0) + 1, n + 1)
    block = np.digitize(own.field, edges[1:-1])
    return np.array([_accuracy(own.truth[block == k], own.named[block == k]) for k in range(n)], np.float64)

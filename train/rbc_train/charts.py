"""Draws what the evaluation found: counts, detections and verdicts, one PNG each.

Okabe and Ito's colours keep apart for every kind of colour vision. Markers and line styles say the same
again. No pyplot: its figures are global state, and want a display's backend.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rbc_edge.errors import UnavailableError
from rbc_edge.values import CellClass, Int64
from rbc_train import evaluate, metrics
from rbc_train.data import CLASS_NAMES
from rbc_train.evaluate import Examined
from rbc_train.results import Chart

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, those that show on white."""

MARKERS: Final = ("o", "^", "s", "D", "v", "P")
_LINES: Final = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_GREY: Final = "#555555"
_DPI: Final = 100
_SINGLE, _OVERLAPPING = COLOURS[0], COLOURS[1]


def draw_all(
    examined: Sequence[Examined],
    score_threshold: Sequence[float],
    overlap_threshold: float,
    folder: Path,
    *,
    prefix: str = "metrics",
) -> tuple[Chart, ...]:
    """Draws every figure of an evaluation.

    Args:
        examined: What `evaluate.examine` returned.
        score_threshold: The shipped detector thresholds by `CellClass`.
        overlap_threshold: The shipped overlap threshold.
        folder: Where the PNGs go. Made when it is not there.
        prefix: What their names begin with.

    Returns:
        The charts, in the order of the page.

    Raises:
        UnavailableError: If they cannot be written.
    """
    draw: tuple[tuple[str, tuple[float, float], str, Callable[[Axes], None]], ...] = (
        (
            "counts",
            (6.4, 4.0),
            "Red cells of each validation photograph, counted minus labelled (Bland-Altman). Bias and limits "
            "of agreement over all photographs. The points are moved a little so that all are visible",
            lambda axes: counts(axes, examined),
        ),
        (
            "crowding",
            (6.4, 4.0),
            "Error of the count of each photograph by how crowded it is. Black: all cells of each quarter of "
            "the photographs, with the 95 % interval over photographs",
            lambda axes: crowding(axes, examined),
        ),
        (
            "precision",
            (5.2, 4.0),
            "Precision and recall of each class at iou 0.5. The axes are cut. The points are the shipped "
            "thresholds",
            lambda axes: precision_recall(axes, examined, score_threshold),
        ),
        (
            "confusion",
            (3.8, 3.4),
            "Verdicts on found cells by verified label: number of cells, and their share of the row",
            lambda axes: confusion(axes, examined, overlap_threshold),
        ),
        (
            "roc",
            (5.2, 4.2),
            "ROC of the overlap score of found cells by source, judged by the verified labels. The axes are "
            "cut. The point is the shipped threshold. The dotted line is the target: 0.95 of the single "
            "cells called single",
            lambda axes: roc(axes, examined, overlap_threshold),
        ),
        (
            "confidence",
            (6.4, 3.6),
            "Overlap score of found cells by verified label. The line is the shipped threshold",
            lambda axes: confidence(axes, examined, overlap_threshold),
        ),
        (
            "reliability",
            (4.6, 4.2),
            "Share of cells with the verified label overlapping, by overlap score. On the dotted line the "
            "score is a probability. Bars are 95 % intervals over photographs, numbers are cells",
            lambda axes: reliability(axes, examined),
        ),
    )
    drawn = []
    for name, size, caption, paint in draw:
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        paint(figure.add_subplot())
        file = f"{prefix}-{name}.png"
        save(figure, folder / file)
        drawn.append(Chart(file, caption))
    return tuple(drawn)


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as PNG.

    Args:
        figure: The figure.
        file: Where to. Its folder is made when it is not there.

    Raises:
        UnavailableError: If it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib in it, the same figures give the same file.
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    except OSError as error:
        raise UnavailableError(f"{file}: {error.strerror}", "choose another folder with --out") from error


def counts(axes: Axes, examined: Sequence[Examined]) -> None:
    """Bland and Altman's plot of the red cells of each photograph."""
    counted, labelled = evaluate.field_counts(examined, CellClass.RBC)
    agree = metrics.agreement(counted, labelled)
    shift = np.random.default_rng(0).uniform(-0.3, 0.3, (2, len(counted)))  # whole numbers lie on each other
    for i, own in enumerate(_by_source(axes, examined)):
        x, y = (counted + labelled)[own] / 2 + shift[0, own], (counted - labelled)[own] + shift[1, own]
        axes.scatter(x, y, **_points(i))
    for value, text, style in (
        (agree.low, "−1.96 sd", "--"),
        (agree.bias, "bias", "-"),
        (agree.high, "+1.96 sd", "--"),
    ):
        if not np.isnan(value):
            axes.axhline(value, color="black", linewidth=1, linestyle=style)
            axes.annotate(
                f"{text} {value:+.2f}",
                (1.0, value),
                (-3, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
    axes.set_xlabel("red cells in the photograph, mean of counted and labelled")
    axes.set_ylabel("counted less labelled, cells")
    _legend(axes, "upper left", columns=2)


def crowding(axes: Axes, examined: Sequence[Examined]) -> None:
    """The error of counts against crowding, with a point for each quarter of the photographs."""
    counted, labelled = evaluate.field_counts(examined, CellClass.RBC)
    error = 100 * metrics.relative_error(counted, labelled)
    crowded = np.array([evaluate.crowding(e.photograph) for e in examined])
    for i, own in enumerate(_by_source(axes, examined)):
        axes.scatter(crowded[own], error[own], **_points(i))
    for low, high, part in evaluate.crowding_quartiles(examined):
        counted, labelled = evaluate.field_counts(part, CellClass.RBC)
        drawn = metrics.resample(len(part), 1000)
        ratio = counted[drawn].sum(axis=1) / labelled[drawn].sum(axis=1)
        total = 100 * (counted.sum() / labelled.sum() - 1)
        below, above = (abs(100 * (v - 1) - total) for v in metrics.interval(ratio))
        axes.errorbar(
            (low + high) / 2, total,
            xerr=(high - low) / 2, yerr=[[below], [above]],
            color="black", marker="o", markersize=5, linewidth=1.5, capsize=3,
        )  # fmt: skip
    axes.axhline(0.0, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of the labelled red cells whose boxes overlap another's (iou over 0.1)")
    axes.set_ylabel("error of the count, %")
    if np.nanmax(np.abs(error), initial=0.0) > 50:  # a photograph with three cells must not flatten the rest
        axes.set_ylim(-50, 50)
    _legend(axes, "upper right", columns=2)


def precision_recall(axes: Axes, examined: Sequence[Examined], score_threshold: Sequence[float]) -> None:
    """Precision against recall of each class at iou 0.5."""
    for cell_class in CellClass:
        score, hit, n_truth = evaluate.ranked_hits(examined, cell_class, evaluate.IOUS[0])
        if n_truth == 0 or len(score) == 0:
            continue
        precision, recall = metrics.precision_recall(score, hit, n_truth)
        ap = metrics.average_precision(score, hit, n_truth)
        label = f"{CLASS_NAMES[cell_class]}, AP50 {ap:.3f}"
        colour = COLOURS[cell_class]
        axes.plot(recall, precision, color=colour, linestyle=_LINES[cell_class], label=label, linewidth=1.5)
        n_over = int((score >= score_threshold[cell_class]).sum())
        if n_over:
            axes.plot(
                recall[n_over - 1], precision[n_over - 1],
                color=colour, marker=MARKERS[cell_class], linestyle="none",
            )  # fmt: skip
    axes.set_xlabel("recall, share of the labelled cells")
    axes.set_ylabel("precision, share of the detections")
    axes.set_xlim(0.5, 1.005)
    axes.set_ylim(0.5, 1.005)
    _legend(axes, "lower left")


def confusion(axes: Axes, examined: Sequence[Examined], threshold: float) -> None:
    """Verdicts against verified labels."""
    judged = evaluate.judged_found(examined)
    called = judged.score >= threshold
    table = np.array(
        [
            [int(((judged.overlapping == label) & (called == said)).sum()) for said in (False, True)]
            for label in (False, True)
        ]
    )
    draw_confusion(axes, table, lambda row, column, n, share: f"{n}\n{100 * share:.1f} %")
    axes.set_xlabel("verdict, cells")
    axes.set_ylabel("verified label, cells")


def draw_confusion(axes: Axes, table: Int64, say: Callable[[int, int, int, float], str]) -> None:
    """Draws labels against verdicts, single before overlapping.

    Args:
        axes: Where. Its labels are the caller's.
        table: int64 (2, 2), cells by label and verdict.
        say: What stands in a field: given label, verdict, cells and their share of the label.
    """
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(2):
        for column in range(2):
            axes.text(
                column, row, say(row, column, int(table[row, column]), float(share[row, column])),
                ha="center", va="center", color="white" if share[row, column] > 0.5 else "black",
            )  # fmt: skip
    axes.set_xticks((0, 1), ("single", "overlapping"))
    axes.set_yticks((0, 1), ("single", "overlapping"), rotation=90, va="center")


def roc(axes: Axes, examined: Sequence[Examined], threshold: float) -> None:
    """ROC over all cells and of each source."""
    judged = evaluate.judged_found(examined)
    sources = sorted(set(judged.source))
    curves = (
        [("all", judged), *((s, judged.take(s)) for s in sources)] if len(sources) > 1 else [("all", judged)]
    )
    for i, (name, own) in enumerate(curves):
        curve = metrics.roc(own.score, own.overlapping)
        area = float(curve.area())
        if np.isnan(area):
            continue
        style: dict[str, Any] = (
            {"color": "black", "linewidth": 2.0}
            if i == 0
            else {"color": COLOURS[i - 1], "linewidth": 1.2, "linestyle": _LINES[i % len(_LINES)]}
        )
        axes.plot(curve.false_positive, curve.true_positive, label=f"{name}, AUC {area:.3f}", **style)
        if i == 0:
            called = own.score >= threshold
            axes.plot(
                called[~own.overlapping].mean(), called[own.overlapping].mean(),
                color="black", marker="o", linestyle="none",
            )  # fmt: skip
    axes.axvline(0.05, color=_GREY, linewidth=1, linestyle=":")
    axes.set_xlim(-0.005, 0.4)
    axes.set_ylim(0.6, 1.005)
    axes.set_xlabel("share of the single cells called overlapping")
    axes.set_ylabel("share of the overlapping cells called so")
    _legend(axes, "lower right")


def confidence(axes: Axes, examined: Sequence[Examined], threshold: float) -> None:
    """Histogram of the overlap score by verified label."""
    judged = evaluate.judged_found(examined)
    edges = np.linspace(0, 1, 26).tolist()
    for label, name, colour, hatch in (
        (False, "single", _SINGLE, ""),
        (True, "overlapping", _OVERLAPPING, "///"),
    ):
        own = np.clip(judged.score[judged.overlapping == label], 0, 1)
        axes.hist(
            own, edges, label=f"verified {name} ({len(own)})", color=colour, alpha=0.55, hatch=hatch,
            edgecolor=colour, linewidth=0.8,
        )  # fmt: skip
    axes.axvline(threshold, color="black", linewidth=1, linestyle="--")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, None)
    axes.set_yticks((0, 1, 10, 100), ("0", "1", "10", "100"))
    axes.set_xlabel("overlap score")
    axes.set_ylabel("cells")
    _legend(axes, "upper center")


def reliability(axes: Axes, examined: Sequence[Examined]) -> None:
    """The share of overlapping cells at each score."""
    judged = evaluate.judged_found(examined)
    found = metrics.calibration(judged.score, judged.overlapping)
    drawn = metrics.resample(len(examined), 500)
    cells = [np.flatnonzero(~np.isnan(e.found_score)) for e in examined]
    shares = np.array(
        [
            metrics.calibration(
                np.concatenate([examined[i].found_score[cells[i]] for i in d]),
                np.concatenate([examined[i].overlapping[cells[i]] for i in d]),
            ).share
            for d in drawn
        ]
    )
    axes.plot((0, 1), (0, 1), color=_GREY, linewidth=1, linestyle=":")
    some = np.flatnonzero(found.n > 0)
    ends = np.array([metrics.interval(shares[:, b]) for b in some]).reshape(-1, 2)
    y = found.share[some]
    axes.errorbar(
        found.mean_score[some], y,
        yerr=np.clip(np.stack([y - ends[:, 0], ends[:, 1] - y]), 0, None),
        color=COLOURS[0], marker="o", capsize=3, linewidth=1.5,
    )  # fmt: skip
    for b in some.tolist():
        axes.annotate(
            str(found.n[b]),
            (found.mean_score[b], found.share[b]),
            (6, -10),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_title(f"calibration error {found.error:.3f}, Brier score {found.brier:.3f}", fontsize=9)
    axes.set_xlim(-0.02, 1.06)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("overlap score, mean of the bin")
    axes.set_ylabel("share of cells verified as overlapping")


def _by_source(axes: Axes, examined: Sequence[Examined]) -> list[Any]:
    """Indices int64 (n,) of each source's photographs. Puts the sources into the legend."""
    sources = np.array([e.photograph.source for e in examined])
    names = sorted(set(sources.tolist()))
    for i, name in enumerate(names):
        axes.scatter([], [], label=name, **(_points(i) | {"alpha": 1.0}))
    return [np.flatnonzero(sources == name) for name in names]


def _points(i: int) -> dict[str, Any]:
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    return {"s": 14, "color": colour, "marker": marker, "alpha": 0.6, "linewidths": 0}


def _legend(axes: Axes, place: str, *, columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, fontsize=8, ncols=columns)

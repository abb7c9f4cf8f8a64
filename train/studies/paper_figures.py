"""The numbers of the trials of `paper_trials`, and the charts of ``docs/paper.md``."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rbc_train import metrics
from rbc_train.charts import COLOURS, MARKERS, draw_confusion, save
from rbc_train.metrics import Float64
from rbc_train.results import Chart
from studies.paper_trials import EXPERIMENTS, MIXED, ROC_GRID, RuleFigures, Trial, zeros

Curves = dict[tuple[int, int, str, str], list[Trial]]
"""Trials by crops, steps, network and labels."""

Differences = dict[str, dict[str, Float64]]
"""Differences to the reference, seed by seed, by ablation and figure."""

FIGURES: Final = {
    "accuracy": "accuracy",
    "precision_single": "single: precision",
    "recall_single": "single: recall",
    "f1_single": "single: F1",
    "precision_overlapping": "overlapping: precision",
    "recall_overlapping": "overlapping: recall",
    "f1_overlapping": "overlapping: F1",
    "auc": "ROC AUC",
}
"""The paper's figures, of `metrics.Verdicts`, in words."""

_GREY: Final = "#555555"
_DPI: Final = 80
# Student's t, 0.975, by the number of seeds; about that of twenty beyond.
_T: Final = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def of(trials: Iterable[Trial], **wanted: object) -> list[Trial]:
    """Picks the trials with such a task, by seed."""
    picked = [t for t in trials if all(getattr(t.task, k) == v for k, v in wanted.items())]
    return sorted(picked, key=lambda t: t.task.seed)


def figure_of(trials: Iterable[Trial], figure: str) -> Float64:
    """One of the verdicts' figures on verified validation labels, of each trial."""
    return np.array([t.verdicts[figure] for t in trials], np.float64)


def half_width(values: Float64) -> float:
    """Half of a 95 % interval of the mean, by Student's t."""
    n = len(values)
    return float(_T.get(n, 2.1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def confidence(trials: Sequence[Trial]) -> Float64:
    """Confidence of each verdict, 0.5..1."""
    score = np.concatenate([t.scores for t in trials]).astype(np.float64)
    return np.maximum(score, 1 - score)


def means(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, 5th and 95th percentile of each of `FIGURES`, where it is defined."""
    out = {}
    for figure in FIGURES:
        values = np.array([r[figure] for r in rows], np.float64)
        values = values[~np.isnan(values)]
        low, high = np.percentile(values, (5, 95)) if len(values) else (math.nan, math.nan)
        out[figure] = {
            "mean": float(values.mean()) if len(values) else math.nan,
            "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
            "low": float(low),
            "high": float(high),
        }
    return out


def steps_of(curves: Curves) -> int:
    """Steps of the curves of the paper's network (the longer runs have more)."""
    return min(steps for _, steps, name, _ in curves if name == "improved")


def by_share(mixed: Sequence[Trial]) -> dict[float, dict[str, list[Trial]]]:
    """Trials by the share of overlapping crops, then by recipe."""
    shares = sorted({t.task.share for t in mixed})
    return {s: {name: of(mixed, share=s, name=name) for name in MIXED} for s in shares}


def draw_experiments(own: dict[str, list[Trial]], rule: RuleFigures, folder: Path) -> tuple[Chart, ...]:
    """Draws the paper's figures again, over all draws of each of `EXPERIMENTS`."""
    labels = Figure(figsize=(10.0, 3.2), dpi=_DPI, layout="constrained")
    left, *matrices = labels.subplots(1, 3)
    _draw_classes(left, rule)
    scored = Figure(figsize=(10.0, 3.2), dpi=_DPI, layout="constrained")
    *histograms, right = scored.subplots(1, 3)
    for matrix, histogram, (name, each) in zip(matrices, histograms, own.items(), strict=True):
        _draw_confusion(matrix, name, each)
        _draw_confidence(histogram, name, each)
    _draw_roc(right, own["improved"])
    save(labels, folder / "paper-confusion.png")
    save(scored, folder / "paper-confidence.png")
    bars = Figure(figsize=(10.0, 3.2), dpi=_DPI, layout="constrained")
    for place, (name, each) in zip(bars.subplots(1, 2, sharey=True), own.items(), strict=True):
        _draw_bars(place, name, each)
    handles, words = bars.axes[0].get_legend_handles_labels()
    bars.legend(handles, words, loc="outside upper center", ncols=3, fontsize=8)
    save(bars, folder / "paper-classes.png")
    n = len(own["base"])
    return (
        Chart(
            "paper-confusion.png",
            f"Classes of the crops. Confusion matrices of {n} draws, summed (test crops, weak labels)",
        ),
        Chart(
            "paper-confidence.png",
            f"Confidence of the verdicts on the test crops of {n} draws. ROC of the improved network "
            "(mean and 5 to 95 % of the draws)",
        ),
        Chart(
            "paper-classes.png",
            f"Precision, recall and F1 of each class: in the paper, repeated ({n} draws, bars 5 to 95 %), "
            "and by verified labels of validation crops",
        ),
    )


def _draw_classes(axes: Axes, rule: RuleFigures) -> None:
    groups = {
        "paper,\n19": (8, 11),
        "paper,\n38": (17, 21),
        "BCCD,\nweak": rule.bccd[0],
        "BCCD,\nverified": rule.bccd[1],
    }
    for i, (single, overlapping) in enumerate(groups.values()):
        total = max(single + overlapping, 1)
        axes.bar(i, single / total, color=COLOURS[0], label="single" if i == 0 else None)
        axes.bar(
            i, overlapping / total, bottom=single / total, color=COLOURS[1], hatch="//",
            edgecolor="white", label="overlapping" if i == 0 else None,
        )  # fmt: skip
        for share, n in ((single / total / 2, single), (1 - overlapping / total / 2, overlapping)):
            axes.text(i, share, str(n), ha="center", va="center", color="white", fontweight="bold")
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel("share of the crops")
    axes.set_title("classes", fontsize=10)
    axes.set_ylim(0, 1.2)
    axes.legend(fontsize=8, loc="upper center", ncols=2)


def _draw_confusion(axes: Axes, name: str, own: Sequence[Trial]) -> None:
    total = np.array([t.confusion for t in own]).sum(axis=0).reshape(2, 2)
    paper = np.array(EXPERIMENTS[name].confusion).reshape(2, 2)
    draw_confusion(
        axes, total, lambda row, column, n, share: f"{n} ({share:.0%})\npaper: {paper[row, column]}"
    )
    axes.set_xlabel("verdict, test crops")
    axes.set_ylabel("weak label, test crops")
    axes.set_title(f"{name}: {len(own)} draws", fontsize=10)


def _draw_confidence(axes: Axes, name: str, own: Sequence[Trial]) -> None:
    score = np.concatenate([t.scores for t in own])
    label = np.concatenate([np.array(t.weak, np.bool_) for t in own])
    confident = np.maximum(score, 1 - score)
    most = max(0.7, float(confident.max()))
    axes.hist(
        [confident[~label], confident[label]], np.linspace(0.5, most, 26).tolist(), stacked=True,
        color=list(COLOURS[:2]), label=["weakly single", "weakly overlapping"],
    )  # fmt: skip
    axes.set_xlabel("confidence of the verdict")
    axes.set_ylabel("test crops")
    axes.set_title(f"{name}: confidence", fontsize=10)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=8)


def _draw_roc(axes: Axes, own: Sequence[Trial]) -> None:
    on_test = []
    for trial in own:
        curve = metrics.roc(trial.scores, np.array(trial.weak, np.bool_))
        on_test.append(np.interp(ROC_GRID, curve.false_positive, curve.true_positive))
    area = np.nanmean([t.on_own_test("weak")["auc"] for t in own])
    bands = (
        ("test crops, weak labels", np.array(on_test), area, COLOURS[4], "--"),
        (
            "validation, verified",
            np.array([t.roc for t in own]),
            figure_of(own, "auc").mean(),
            COLOURS[2],
            "-",
        ),
    )
    for words, curves, auc, colour, line in bands:
        low, high = np.percentile(curves, (5, 95), axis=0)
        axes.fill_between(ROC_GRID, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            ROC_GRID, curves.mean(axis=0), color=colour, linestyle=line, label=f"{words}: AUC {auc:.2f}"
        )
    axes.plot((0, 1), (0, 1), color=_GREY, linewidth=1, linestyle=":")
    axes.set_xlabel("single cells called overlapping, share")
    axes.set_ylabel("overlapping cells found, share")
    axes.set_title(f"improved: ROC (paper's AUC {EXPERIMENTS['improved'].auc:.2f})", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def _draw_bars(axes: Axes, name: str, own: Sequence[Trial]) -> None:
    figures = list(FIGURES)[1:7]
    paper = EXPERIMENTS[name].printed()
    kinds = (
        ("repeated, weak labels", [t.on_own_test("weak") for t in own], COLOURS[4], "//"),
        ("validation, verified labels", [zeros(t.verdicts) for t in own], COLOURS[2], ""),
    )
    x = np.arange(len(figures))
    axes.bar(x - 0.27, [paper[f] for f in figures], 0.26, color=_GREY, label="paper")
    for i, (words, each, colour, hatch) in enumerate(kinds):
        spread = means(each)
        mean = np.array([spread[f]["mean"] for f in figures])
        error = [
            [max(spread[f]["mean"] - spread[f]["low"], 0) for f in figures],
            [max(spread[f]["high"] - spread[f]["mean"], 0) for f in figures],
        ]
        axes.bar(
            x + 0.27 * i, mean, 0.26, yerr=error, color=colour, hatch=hatch, edgecolor="white", label=words,
            error_kw={"linewidth": 1, "capsize": 2},
        )  # fmt: skip
    words_of = [FIGURES[f].replace(": ", "\n").replace("overlapping", "overl.") for f in figures]
    axes.set_xticks(x, words_of, fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share")
    axes.set_title(name, fontsize=10)


def draw_curves(curves: Curves, rule: RuleFigures, shipped: dict[str, float], folder: Path) -> Chart:
    """Draws accuracy and AUC over the number of training crops."""
    figure = Figure(figsize=(10.0, 3.8), dpi=_DPI, layout="constrained")
    steps = steps_of(curves)
    lines = (("improved", "weak"), ("improved", "verified"), ("station", "verified"))
    levels = {
        "accuracy": (rule.val_agreement, rule.val_majority),
        "auc": (rule.val_auc, 0.5),
    }
    for axes, (which, (of_rule, of_guess)) in zip(figure.subplots(1, 2), levels.items(), strict=True):
        for i, (name, kind) in enumerate(lines):
            own = {
                n: figure_of(each, which)
                for (n, s, m, k), each in curves.items()
                if (m, k) == (name, kind) and (name == "station" or s == steps)
            }
            axes.errorbar(
                list(own), [v.mean() for v in own.values()],
                yerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in own.values()], capsize=3,
                color=COLOURS[i], marker=MARKERS[i], label=f"{name}, {kind} labels",
            )  # fmt: skip
            longer = [
                (n, float(figure_of(each, which).mean()))
                for (n, s, m, k), each in curves.items()
                if (m, k) == (name, kind) and name == "improved" and s > steps
            ]
            if longer:
                axes.plot(
                    *zip(*longer, strict=True), linestyle="none", marker=MARKERS[i], color=COLOURS[i],
                    markerfacecolor="none", markersize=9, label=f"{name}, {kind} labels, longer",
                )  # fmt: skip
        axes.axhline(of_rule, color=_GREY, linestyle="--", linewidth=1, label="the area rule itself")
        axes.axhline(of_guess, color=_GREY, linestyle=":", linewidth=1, label="guessing")
        if which in shipped:
            axes.axhline(shipped[which], color="black", linewidth=1, label="what ships")
        axes.set_xscale("log")
        axes.set_xticks((20, 100, 1000, 10000), ("20", "100", "1,000", "10,000"))
        axes.set_xlabel("training crops")
        axes.set_ylabel({"accuracy": "accuracy", "auc": "ROC AUC"}[which] + ", verified validation labels")
    handles, words = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside upper center", ncols=4, fontsize=8)
    save(figure, folder / "learning-curves.png")
    return Chart(
        "learning-curves.png",
        "Accuracy and AUC by the number of training crops, judged by verified validation labels. Bars: "
        "standard deviation over draws. Open marks: trained longer",
    )


def draw_ablations(ablated: Differences, mixed: Sequence[Trial], folder: Path) -> Chart:
    """Draws what each change does, and what unequal classes do."""
    figure = Figure(figsize=(10.0, 3.6), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(ablated)
    for i, (which, words) in enumerate((("accuracy", "accuracy"), ("auc", "AUC"))):
        y = np.arange(len(names)) + (i - 0.5) * 0.25
        values = [ablated[n][which] for n in names]
        left.errorbar(
            [float(v.mean()) for v in values], y, xerr=[half_width(v) if len(v) > 1 else 0 for v in values],
            linestyle="none", marker=MARKERS[i], color=COLOURS[i], capsize=3, label=words,
        )  # fmt: skip
    left.axvline(0, color=_GREY, linewidth=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("difference to the reference (bars: 95 % interval)")
    left.legend(fontsize=8)
    shares = by_share(mixed)
    for i, figure_name in enumerate(("recall_single", "recall_overlapping")):
        for name, line in zip(MIXED, ("-", "--"), strict=True):
            values = [figure_of(each[name], figure_name) for each in shares.values()]
            right.errorbar(
                list(shares), [float(v.mean()) for v in values],
                yerr=[float(v.std(ddof=1)) if len(v) > 1 else 0 for v in values], capsize=3, linestyle=line,
                marker=MARKERS[i], color=COLOURS[i],
                label=f"{figure_name.removeprefix('recall_')} cells found, {name}",
            )  # fmt: skip
    right.set_ylim(-0.02, 1.45)  # room for the legend
    right.set_yticks((0, 0.2, 0.4, 0.6, 0.8, 1))
    right.set_xlabel("share of overlapping crops in training")
    right.set_ylabel("share of validation cells found")
    right.legend(fontsize=7, loc="upper center")
    save(figure, folder / "learning-ablations.png")
    return Chart(
        "learning-ablations.png",
        "Left: effect of each change to the improved network, judged by verified validation labels. Right: "
        "share of each class found, by the classes of the training crops",
    )

"""The paper's experiments over many draws, and what its method is worth: ``python -m studies.paper``.

The trials are in `paper_trials`, the charts in `paper_figures`. Here: the command, and the tables and numbers
of ``docs/paper.md``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rbc_edge.errors import UnavailableError
from rbc_train import console, results
from rbc_train.metrics import Float64
from rbc_train.results import Section, Table
from studies.paper_figures import (
    FIGURES,
    Curves,
    Differences,
    by_share,
    confidence,
    draw_ablations,
    draw_curves,
    draw_experiments,
    figure_of,
    half_width,
    means,
    of,
)
from studies.paper_trials import (
    ABLATIONS,
    BATCHES,
    EXPERIMENTS,
    MIXED,
    PARTS,
    Plan,
    RuleFigures,
    Trial,
    repeat,
    zeros,
)

app = console.program()


class Part(StrEnum):
    """Parts of the work on the paper."""

    experiments = "experiments"
    learning = "learning"
    ablations = "ablations"


@app.command()
def paper(
    dataset: console.DatasetOption = console.DATASET,
    data: console.Data = console.DATA,
    detector: console.DetectorOption = console.DETECTOR,
    from_scratch: Annotated[bool, typer.Option(help="Start from noise, without --detector.")] = False,
    seeds: Annotated[int, typer.Option(min=2, help="Draws of each experiment.")] = 30,
    part: Annotated[Part | None, typer.Option(help="Only this part. By default: all three.")] = None,
    work: Annotated[
        Path, typer.Option(help="Folder of finished trials. A command that was stopped continues there.")
    ] = Path("runs/paper"),
    out: console.Out = results.FOLDER,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Repeats the paper's experiments over many draws and measures crops, labels and tricks."""
    trials, rule = repeat(
        Plan(seeds=seeds),
        (part.value,) if part else PARTS,
        work,
        dataset=dataset,
        data=data,
        begin=None if from_scratch else detector,
        threads=threads,
        progress=console.show_progress,
    )
    for section in sections(trials, rule, out, begun=not from_scratch):
        console.publish(section, out, as_text)


def ours(folder: Path) -> dict[str, float]:
    """Returns the verdicts of the shipped bundle on labelled boxes. Empty if ``evaluate`` was not run."""
    try:
        data = results.read_section("metrics", folder)
        figures = data["figures"]["all"]["overlap_on_labelled_boxes"]
        return {name: value for name, value in figures.items() if value is not None}
    except (UnavailableError, KeyError):
        return {}


def _spread(values: Float64) -> str:
    """Mean and standard deviation, of those that exist."""
    own = values[~np.isnan(values)]
    if len(own) == 0:
        return "-"
    return f"{own.mean():.2f} ± {own.std(ddof=1):.2f}" if len(own) > 1 else f"{own[0]:.2f}"


def _range(values: Float64) -> str:
    """Mean, standard deviation, 5th and 95th percentile."""
    own = values[~np.isnan(values)]
    if len(own) < 2:
        return _spread(values)
    low, high = np.percentile(own, (5, 95))
    return f"{_spread(own)} ({low:.2f} to {high:.2f})"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927).

    Args:
        hits: Cases that are so.
        n: Cases.

    Returns:
        Its ends, 0..1.

    >>> tuple(round(v, 2) for v in wilson(8, 10))
    (0.49, 0.94)
    """
    z = 1.96
    centre, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def at_least(hits: int, n: int, share: float) -> float:
    """Returns the chance of at least `hits` of `n` when each has the chance `share`.

    >>> round(at_least(8, 10, 0.5), 3)
    0.055
    """
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits, n + 1))


def by_chance(a: int, of_a: int, b: int, of_b: int) -> float:
    """Returns the chance of at least `a` of `of_a` where `b` of `of_b` are so too (Fisher's exact test).

    >>> round(by_chance(3, 30, 0, 30), 3)
    0.119
    """
    both = range(a, min(a + b, of_a) + 1)
    ways = sum(math.comb(of_a, k) * math.comb(of_b, a + b - k) for k in both if a + b - k <= of_b)
    return ways / math.comb(of_a + of_b, a + b)


def _hypergeometric(a: int, of_a: int, b: int, of_b: int) -> float:
    return math.comb(of_a, a) * math.comb(of_b, b) / math.comb(of_a + of_b, a + b)


def sections(trials: Sequence[Trial], rule: RuleFigures, folder: Path, *, begun: bool) -> Iterator[Section]:
    """Makes the sections that there are trials for, and draws their charts.

    Args:
        trials: Of `paper_trials.run`.
        rule: Of `paper_trials.judge_rule`.
        folder: Where sections and charts are. What ships is read from the section "metrics" there.
        begun: Whether the network of the station began from a detector's stages.

    Yields:
        The sections "paper" and "learning".

    Raises:
        UnavailableError: If a chart cannot be written.
    """
    if of(trials, study="experiment"):
        yield _experiments_section(trials, rule, folder)
    if any(t.task.study in ("curve", "mix", "ablation") for t in trials):
        yield _learning_section(trials, rule, folder, begun=begun)


def as_text(section: Section) -> str:
    """Lays out a section for the terminal."""
    return "\n\n".join(f"{t.caption}\n{console.aligned(t.columns, t.rows)}" for t in section.tables) + "\n"


# -- both experiments -----------------------------------------------------------------------------------


def _closest(trials: Sequence[Trial], name: str) -> list[Trial]:
    """The repetitions with the batch that gives the paper's outcome most often, the larger if none does."""
    size = EXPERIMENTS[name]
    each = [of(trials, study="experiment", name=name, n=size.n, batch=b) for b in BATCHES]
    return max(each, key=lambda own: _exact(own, name))


def _exact(trials: Sequence[Trial], name: str) -> int:
    """Draws that give exactly the paper's confusion matrix."""
    return sum(t.confusion == EXPERIMENTS[name].confusion for t in trials)


def _good(trials: Sequence[Trial]) -> int:
    """Draws that are right on 80 % or more of their own test crops."""
    return sum(t.on_own_test("weak")["accuracy"] >= 0.8 - 1e-9 for t in trials)


def _experiments_section(trials: Sequence[Trial], rule: RuleFigures, folder: Path) -> Section:
    own = {name: _closest(trials, name) for name in EXPERIMENTS}
    shipped = ours(folder)
    tables = [_experiment_table(name, own[name], shipped) for name in EXPERIMENTS]
    return Section(
        name="paper",
        command=f"python -m studies.paper --seeds {len(own['base'])}",
        tables=(*tables, _chance_table(trials)),
        charts=draw_experiments(own, rule, folder),
        data={
            "rule": asdict(rule),
            **{name: _experiment_figures(name, own[name], trials) for name in EXPERIMENTS},
            "small_test": small_test(),
            "ours": shipped,
        },
    )


def _experiment_figures(name: str, own: Sequence[Trial], trials: Sequence[Trial]) -> dict[str, Any]:
    batch = own[0].task.batch
    shuffled = of(trials, study="shuffled", name=name, n=EXPERIMENTS[name].n, batch=batch)
    exact, by_shuffled = _exact(own, name), _exact(shuffled, name)
    return {
        "seeds": len(own),
        "batch": batch,
        "exact": exact,
        "good": _good(own),
        "alike": sum(t.calls_all_alike for t in own),
        "confidence": float(confidence(own).mean()),
        "shuffled": {
            "draws": len(shuffled),
            "exact": by_shuffled,
            "good": _good(shuffled),
            "p": by_chance(exact, len(own), by_shuffled, len(shuffled)),
        },
        "printed": EXPERIMENTS[name].printed(),
        "weak": means([t.on_own_test("weak") for t in own]),
        "verified": means([t.on_own_test("verified") for t in own]),
        "validation": means([zeros(t.verdicts) for t in own]),
        "validation_bccd_accuracy": float(np.mean([t.bccd for t in own])),
    }


def small_test() -> dict[str, float]:
    """Returns what so few test crops as those of the improved network can say."""
    size = EXPERIMENTS["improved"]
    n, hits = sum(size.test), size.confusion[0] + size.confusion[3]
    low, high = wilson(hits, n)
    return {
        "n": n,
        "hits": hits,
        "low": low,
        "high": high,
        "majority": max(size.test) / n,
        "gain": hits - max(size.test),
        "coin": at_least(hits, n, 0.5),
        "split": _hypergeometric(7, 17, 3, 21),
    }


def _experiment_table(name: str, own: Sequence[Trial], shipped: dict[str, float]) -> Table:
    size, printed = EXPERIMENTS[name], EXPERIMENTS[name].printed()
    judged = {kind: [t.on_own_test(kind) for t in own] for kind in ("weak", "verified")} | {
        "validation": [zeros(t.verdicts) for t in own]
    }
    rows = []
    for figure, words in FIGURES.items():
        cells = [_range(np.array([r[figure] for r in each], np.float64)) for each in judged.values()]
        in_print = "-" if math.isnan(printed[figure]) else f"{printed[figure]:.2f}"
        ship = f"{shipped[figure]:.3f}" if figure in shipped else "not run"
        rows.append((words, in_print, *cells, ship))
    columns = ("", "paper", f"its {sum(size.test)} test crops, weak labels",
               "the same crops, verified labels", "validation, verified labels",
               "what ships, validation")  # fmt: skip
    return Table(
        f"The {name} network: {size.n} crops, {sum(size.train)} to train and {sum(size.test)} to test, "
        f"{len(own)} draws: mean ± standard deviation (5 to 95 %)",
        columns,
        tuple(rows),
    )


def _chance_table(trials: Sequence[Trial]) -> Table:
    rows = []
    for own, size in EXPERIMENTS.items():
        for batch in BATCHES:
            for study, name in (("experiment", "base"), ("experiment", "improved"), ("shuffled", own)):
                each = of(trials, study=study, name=name, n=size.n, batch=batch)
                if each:
                    rows.append(_chance_row(each, name, own, real=study == "experiment"))
    columns = ("network", "batch", "test accuracy", "draws with 80 % or more",
               "draws with the paper's confusion matrix", "draws that call all crops the same", "confidence",
               "validation accuracy", "validation AUC")  # fmt: skip
    return Table(
        "Effect of the network, the crops, the batch and chance (test crops by weak labels, validation by "
        "verified labels)",
        columns,
        tuple(rows),
    )


def _chance_row(each: Sequence[Trial], name: str, own: str, *, real: bool) -> tuple[str, ...]:
    accuracy = np.array([t.on_own_test("weak")["accuracy"] for t in each], np.float64)
    return (
        f"{name}, {each[0].task.n} crops" + ("" if real else ", training labels shuffled"),
        str(each[0].task.batch),
        _spread(accuracy),
        f"{_good(each) / len(each):.0%}",
        f"{_exact(each, name) / len(each):.0%}" if name == own else "-",
        f"{np.mean([t.calls_all_alike for t in each]):.0%}",
        f"{confidence(each).mean():.2f}",
        _spread(figure_of(each, "accuracy")) if real else "-",
        _spread(figure_of(each, "auc")) if real else "-",
    )


# -- more crops, other labels, one change at a time ------------------------------------------------------


def _learning_section(trials: Sequence[Trial], rule: RuleFigures, folder: Path, *, begun: bool) -> Section:
    shipped = ours(folder)
    curves, ablated = _curves(trials), _ablations(trials)
    mixed = of(trials, study="mix")
    tables, drawn = [], []
    if curves:
        tables.append(_curve_table(curves))
        drawn.append(draw_curves(curves, rule, shipped, folder))
    if ablated:
        tables.append(_ablation_table(trials, ablated))
    if mixed:
        tables.append(_mix_table(mixed))
    if ablated and mixed:
        drawn.append(draw_ablations(ablated, mixed, folder))
    listed = [
        {
            "crops": n,
            "steps": steps,
            "network": name,
            "labels": kind,
            "accuracy": figure_of(each, "accuracy").tolist(),
            "auc": figure_of(each, "auc").tolist(),
        }
        for (n, steps, name, kind), each in curves.items()
    ]
    return Section(
        name="learning",
        command="python -m studies.paper",
        tables=tuple(tables),
        charts=tuple(drawn),
        data={
            "begun": begun,
            "summary": summary(listed, rule.val_agreement, shipped.get("accuracy")) if curves else None,
            "curves": listed,
            "ablations": {
                name: {figure: difference.tolist() for figure, difference in both.items()}
                for name, both in ablated.items()
            },
            "mixes": [
                {
                    "overlapping": t.task.share,
                    "network": t.task.name,
                    "seed": t.task.seed,
                    **{k: t.verdicts[k] for k in ("accuracy", "auc", "recall_single", "recall_overlapping")},
                }
                for t in mixed
            ],
        },
    )


def summary(curves: Sequence[dict[str, Any]], rule: float, shipped: float | None) -> dict[str, Any]:
    """Returns what the learning curves say in a few numbers.

    Args:
        curves: Points with ``crops``, ``steps``, ``network``, ``labels`` and ``accuracy``, by draw.
        rule: Accuracy of the area rule itself.
        shipped: Accuracy of what ships, None where it was not measured.

    Returns:
        The numbers for the template of the page.
    """
    mean = {
        (c["crops"], c["steps"], c["network"], c["labels"]): float(np.mean(c["accuracy"])) for c in curves
    }
    steps = min(s for _, s, name, _ in mean if name == "improved")
    sizes = sorted({n for n, s, _, kind in mean if s == steps and kind == "verified"})
    first, last = sizes[0], sizes[-1]
    n_weak, s_weak = max((n, s) for n, s, _, kind in mean if kind == "weak")
    weak = mean[n_weak, s_weak, "improved", "weak"]
    enough = {
        name: next((n for n in sizes if mean.get((n, steps, name, "verified"), 0.0) >= weak), None)
        for name in ("improved", "station")
    }
    lines = [("the network of the station", "station", steps), ("the paper's", "improved", steps)]
    longest = max(s for n, s, name, kind in mean if (n, name, kind) == (last, "improved", "verified"))
    lines += [("the paper's, trained longer", "improved", longest)] if longest > steps else []
    draws = next(
        c["accuracy"]
        for c in curves
        if (c["crops"], c["steps"], c["network"], c["labels"]) == (first, steps, "improved", "verified")
    )
    return {
        "n_weak": n_weak,
        "weak": weak,
        "rule": rule,
        "enough": enough,
        "first": {"crops": first, "spread": float(np.std(draws, ddof=1)) if len(draws) > 1 else math.nan},
        "last": {"crops": last},
        "rows": [
            {
                "network": words,
                "steps": own,
                "first": mean.get((first, own, name, "verified"), math.nan),
                "last": mean.get((last, own, name, "verified"), math.nan),
            }
            for words, name, own in lines
        ],
        "shipped": shipped,
    }


def _curves(trials: Sequence[Trial]) -> Curves:
    """Trials by crops, steps, network and labels."""
    curves: Curves = {}
    for trial in sorted(of(trials, study="curve"), key=lambda t: (t.n_crops, t.task.steps)):
        task = trial.task
        curves.setdefault((trial.n_crops, task.steps, task.name, task.labels), []).append(trial)
    # Without the learning part, the reference of the ablations is no curve.
    return curves if len({n for n, *_ in curves}) > 1 else {}


def _pairs(a: Sequence[Trial], b: Sequence[Trial], figure: str) -> Float64:
    """Differences of a less b, seed by seed."""
    second = {t.task.seed: t.verdicts[figure] for t in b}
    both = [t.verdicts[figure] - second[t.task.seed] for t in a if t.task.seed in second]
    return np.array(both, np.float64)


def _signed(values: Float64) -> str:
    if len(values) == 0:
        return "-"
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    return f"{values.mean():+.3f} ± {values.std(ddof=1):.3f}"


def _curve_table(curves: Curves) -> Table:
    rows = []
    for steps, n in sorted({(s, n) for n, s, name, _ in curves if name == "improved"}):
        weak, verified, station = (
            curves.get((n, steps, name, kind), [])
            for name, kind in (("improved", "weak"), ("improved", "verified"), ("station", "verified"))
        )
        rows.append(
            (
                f"{n:,}",
                str(steps),
                *(_spread(figure_of(each, f)) for each in (weak, verified) for f in ("accuracy", "auc")),
                _signed(_pairs(verified, weak, "accuracy")),
                *(_spread(figure_of(station, f)) for f in ("accuracy", "auc")),
            )
        )
    return Table(
        "Learning curves: the improved network of the paper, trained with weak or with verified labels of "
        "the same crops, and the network that ships",
        (
            "crops",
            "steps",
            "weak: accuracy",
            "weak: AUC",
            "verified: accuracy",
            "verified: AUC",
            "accuracy, verified less weak",
            "station, verified: accuracy",
            "station: AUC",
        ),
        tuple(rows),
    )


def _ablations(trials: Sequence[Trial]) -> Differences:
    """Differences to the reference, seed by seed, of each ablation."""
    tried = of(trials, study="ablation")
    if not tried:
        return {}
    reference = _reference(trials)
    return {
        name: {
            figure: _pairs([t for t in tried if t.task.name == name], reference, figure)
            for figure in ("accuracy", "auc")
        }
        for name in ABLATIONS
    }


def _reference(trials: Sequence[Trial]) -> list[Trial]:
    steps = {t.task.steps for t in of(trials, study="ablation")}
    return [
        t for t in of(trials, study="curve", name="improved", labels="verified", n=0) if t.task.steps in steps
    ]


def _beyond_chance(difference: Float64) -> bool:
    return len(difference) > 1 and abs(float(difference.mean())) > half_width(difference)


def _ablation_table(trials: Sequence[Trial], ablated: Differences) -> Table:
    reference = _reference(trials)
    rows = [
        ("reference", *(_spread(figure_of(reference, f)) for f in ("accuracy", "auc")), "-", "-", "-"),
    ]
    for name, both in ablated.items():
        own = of(trials, study="ablation", name=name)
        sure = [words for f, words in (("accuracy", "accuracy"), ("auc", "AUC")) if _beyond_chance(both[f])]
        rows.append(
            (
                name,
                _spread(figure_of(own, "accuracy")),
                _spread(figure_of(own, "auc")),
                _signed(both["accuracy"]),
                _signed(both["auc"]),
                " and ".join(sure) or "none",
            )
        )
    n, seeds = (reference[0].n_crops, len(reference)) if reference else (0, 0)
    return Table(
        f"One change at a time: the improved network, {n:,} verified labels, {seeds} seeds. Differences to "
        "the reference, seed by seed",
        ("", "accuracy", "AUC", "accuracy, difference", "AUC, difference", "beyond chance (95 %, t)"),
        tuple(rows),
    )


def _mix_table(mixed: Sequence[Trial]) -> Table:
    shown = {"accuracy": "accuracy", "auc": "AUC", "recall_single": "single recall"}
    shown |= {"recall_overlapping": "overlapping recall"}
    rows = [
        (f"{share:.0%}", *(_spread(figure_of(each[name], f)) for name in MIXED for f in shown))
        for share, each in by_share(mixed).items()
    ]
    return Table(
        f"Class imbalance: {mixed[0].n_crops} crops with verified labels, "
        f"{len({t.task.seed for t in mixed})} draws, with and without the class weights of the paper",
        ("overlapping in training", *(f"{name}: {words}" for name in MIXED for words in shown.values())),
        tuple(rows),
    )


if __name__ == "__main__":
    console.answer(app)

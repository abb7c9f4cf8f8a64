"""What the trials of `paper` say: the tables, pictures and sentences of ``docs/paper.md``."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np

from rbc_edge.errors import UnavailableError
from rbc_train import results
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
    steps_of,
)
from studies.paper_trials import ABLATIONS, BATCHES, EXPERIMENTS, MIXED, RuleFigures, Trial, zeros

COMMAND: Final = "python -m rbc_train paper"


def ours(folder: Path) -> dict[str, float]:
    """Returns the shipped bundle's verdicts on labelled boxes, empty where ``evaluate`` was not run."""
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


def _closest(trials: Sequence[Trial], name: str) -> list[Trial]:
    """The repetitions with the batch that gives the paper's outcome most often, the larger if none does."""
    size = EXPERIMENTS[name]
    each = [of(trials, study="experiment", name=name, n=size.n, batch=b) for b in BATCHES]
    return max(each, key=lambda own: sum(t.confusion == size.confusion for t in own))


def sections(trials: Sequence[Trial], rule: RuleFigures, folder: Path, *, begun: bool) -> Iterator[Section]:
    """Makes the sections that there are trials for, and draws their pictures.

    Args:
        trials: Of `paper.run`.
        rule: Of `paper.judge_rule`.
        folder: Where sections and pictures lie; what ships is read from the section "metrics" there.
        begun: Whether the station's network began from a detector's stages.

    Yields:
        The sections "paper" and "learning".

    Raises:
        UnavailableError: If a picture cannot be written.
    """
    if of(trials, study="experiment"):
        yield _experiments_section(trials, rule, folder)
    if any(t.task.study in ("curve", "mix", "ablation") for t in trials):
        yield _learning_section(trials, rule, folder, begun=begun)


def as_text(section: Section) -> str:
    """Lays out a section for the terminal."""
    lines = [section.title, "", *section.text]
    for table in section.tables:
        rows = [table.columns, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
        lines += ["", table.caption]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _experiments_section(trials: Sequence[Trial], rule: RuleFigures, folder: Path) -> Section:
    own = {name: _closest(trials, name) for name in EXPERIMENTS}
    shipped = ours(folder)
    tables = [_experiment_table(name, own[name], shipped) for name in EXPERIMENTS]
    return Section(
        name="paper",
        page="paper",
        title="Both experiments, repeated",
        command=f"{COMMAND} --seeds {len(own['base'])}",
        text=tuple(_experiments_text(trials, own, rule)),
        tables=(*tables, _chance_table(trials)),
        pictures=draw_experiments(own, rule, folder),
        data={
            "rule": asdict(rule),
            **{
                name: {
                    "seeds": len(own[name]),
                    "batch": own[name][0].task.batch,
                    "printed": EXPERIMENTS[name].printed(),
                    "weak": means([t.on_own_test("weak") for t in own[name]]),
                    "verified": means([t.on_own_test("verified") for t in own[name]]),
                    "validation": means([zeros(t.verdicts) for t in own[name]]),
                    "validation_bccd_accuracy": float(np.mean([t.bccd for t in own[name]])),
                }
                for name in EXPERIMENTS
            },
            "ours": shipped,
        },
    )


def _experiment_table(name: str, own: Sequence[Trial], shipped: dict[str, float]) -> Table:
    size, paper = EXPERIMENTS[name], EXPERIMENTS[name].printed()
    judged = {kind: [t.on_own_test(kind) for t in own] for kind in ("weak", "verified")} | {
        "validation": [zeros(t.verdicts) for t in own]
    }
    rows = []
    for figure, words in FIGURES.items():
        cells = [_range(np.array([r[figure] for r in each], np.float64)) for each in judged.values()]
        in_print = "-" if math.isnan(paper[figure]) else f"{paper[figure]:.2f}"
        ship = f"{shipped[figure]:.3f}" if figure in shipped else "not run"
        rows.append((words, in_print, *cells, ship))
    return Table(
        f"The {name} network: {size.n} crops, {sum(size.train)} to train and {sum(size.test)} to test, "
        f"{len(own)} draws: mean ± standard deviation (5 to 95 %)",
        (
            "",
            "paper",
            f"its {sum(size.test)} test crops, weak labels",
            "the same crops, verified labels",
            "validation, verified labels",
            "what ships, validation",
        ),
        tuple(rows),
    )


def _chance_table(trials: Sequence[Trial]) -> Table:
    rows = []
    for own, size in EXPERIMENTS.items():
        for batch in BATCHES:
            for study, name in (("experiment", "base"), ("experiment", "improved"), ("shuffled", own)):
                each = of(trials, study=study, name=name, n=size.n, batch=batch)
                if not each:
                    continue
                accuracy = np.array([t.on_own_test("weak")["accuracy"] for t in each], np.float64)
                exact = sum(t.confusion == EXPERIMENTS[name].confusion for t in each)
                real = study == "experiment"
                rows.append(
                    (
                        f"{name}, {size.n} crops" + ("" if real else ", training labels shuffled"),
                        str(batch),
                        _spread(accuracy),
                        f"{(accuracy >= 0.8 - 1e-9).mean():.0%}",
                        f"{exact / len(each):.0%}" if name == own else "-",
                        f"{np.mean([t.calls_all_alike for t in each]):.0%}",
                        f"{confidence(each).mean():.2f}",
                        _spread(figure_of(each, "accuracy")) if real else "-",
                        _spread(figure_of(each, "auc")) if real else "-",
                    )
                )
    return Table(
        "What the network, the crops, the batch and chance do (test crops by weak labels; validation by "
        "verified ones)",
        (
            "network",
            "batch",
            "test accuracy",
            "draws with 80 % or more",
            "draws with the paper's confusion matrix",
            "draws that call all crops the same",
            "confidence",
            "validation accuracy",
            "validation AUC",
        ),
        tuple(rows),
    )


def _experiments_text(trials: Sequence[Trial], own: dict[str, list[Trial]], rule: RuleFigures) -> list[str]:
    size = EXPERIMENTS["improved"]
    n_test, hits = sum(size.test), size.confusion[0] + size.confusion[3]
    low, high = wilson(hits, n_test)
    majority = max(size.test) / n_test
    text = [
        _in_short(trials, own, rule),
        "**How.** Each draw takes other crops of BCCD's training photographs, with the paper's classes, and "
        "another initialisation; 10 epochs of Adam. The paper gives no batch size: 32 takes all its crops at "
        "once (10 steps), 4 makes up to 70 steps. The first two tables show the one that gives the paper's "
        f"outcome more often ({own['base'][0].task.batch} for base, {own['improved'][0].task.batch} for "
        "improved). The classes of its test crops are not printed; its recalls and precisions leave only "
        "3 + 3 and 7 + 3.",
        f"**What {n_test} crops can say.** {hits} of {n_test} is {hits / n_test:.0%}, 95 % interval "
        f"{low:.0%} to {high:.0%}. Calling every one of those crops single is right in {majority:.0%}: the "
        f"improved network is better by {hits - max(size.test)} crop. A coin reaches {hits} of {n_test} in "
        f"{at_least(hits, n_test, 0.5):.1%} of the tries; a blind split of 17 + 21 crops tests 7 + 3 in "
        f"{_hypergeometric(7, 17, 3, 21):.1%}.",
    ]
    for name, each in own.items():
        weak = means([t.on_own_test("weak") for t in each])["accuracy"]
        verified = means([t.on_own_test("verified") for t in each])["accuracy"]
        exact = sum(t.confusion == EXPERIMENTS[name].confusion for t in each)
        alike = sum(t.calls_all_alike for t in each)
        near = " (the paper: near 0.52)" if name == "base" else ""
        shuffled = of(trials, study="shuffled", name=name, n=EXPERIMENTS[name].n, batch=each[0].task.batch)
        untaught = sum(t.confusion == EXPERIMENTS[name].confusion for t in shuffled)
        good = [
            sum(t.on_own_test("weak")["accuracy"] >= 0.8 - 1e-9 for t in group) for group in (each, shuffled)
        ]
        text.append(
            f"**{name.capitalize()}.** {exact} of {len(each)} draws give exactly the paper's confusion "
            f"matrix ({untaught} of {len(shuffled)} when the training labels are shuffled), {good[0]} reach "
            f"80 % ({good[1]} shuffled), {alike} call all their test crops the same; mean confidence "
            f"{confidence(each).mean():.2f}{near}. Accuracy is {weak['mean']:.2f} by the labels of the rule "
            f"that taught it, {verified['mean']:.2f} on the same crops by verified labels, and "
            f"{figure_of(each, 'accuracy').mean():.2f} on validation (BCCD alone "
            f"{np.mean([t.bccd for t in each]):.2f}), where calling all the same is right in "
            f"{rule.val_majority:.2f}."
        )
    text.append(
        f"**The rule itself.** The weak label agrees with the verified one on {rule.train_agreement:.0%} of "
        f"{rule.n_train_known:,} training and {rule.val_agreement:.0%} of {rule.n_val:,} validation crops; "
        f"the area ranks validation crops with an AUC of {rule.val_auc:.2f}. The paper's test cannot see "
        "that: the rule judged what the rule had taught."
    )
    return text


def _in_short(trials: Sequence[Trial], own: dict[str, list[Trial]], rule: RuleFigures) -> str:
    said = []
    for name, each in own.items():
        shuffled = of(trials, study="shuffled", name=name, n=EXPERIMENTS[name].n, batch=each[0].task.batch)
        taught, untaught = (
            sum(t.confusion == EXPERIMENTS[name].confusion for t in group) for group in (each, shuffled)
        )
        chance = by_chance(taught, len(each), untaught, len(shuffled))
        said.append(
            f"the {name} network's outcome comes in {taught} of {len(each)} draws and, with the training "
            f"labels shuffled, in {untaught} of {len(shuffled)}: "
            + ("the labels had a part in it" if chance < 0.05 else "chance can do that without the labels")
            + f" (p = {chance:.2f})"
        )
    better = {n: float(figure_of(each, "accuracy").mean()) - rule.val_majority for n, each in own.items()}
    winners = [f"{name} by {100 * gain:.0f} points" for name, gain in better.items() if gain > 0.005]
    return (
        f"**In short.** Judged as the paper judged, {'; '.join(said)}. By verified labels, "
        + (f"better than calling all cells the same: {', '.join(winners)}." if winners else "")
        + ("" if winners else "neither network is better than calling all cells the same.")
    )


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


def _learning_section(trials: Sequence[Trial], rule: RuleFigures, folder: Path, *, begun: bool) -> Section:
    shipped = ours(folder)
    curves, ablated = _curves(trials), _ablations(trials)
    mixed = of(trials, study="mix")
    text = [
        "**How.** Verified validation labels judge all of it, threshold 0.5; crops of all four sources; the "
        "same number of optimizer steps whatever the number of crops, with Adam's rate falling along a "
        "cosine. The reference is the paper's improved network with one thing it does not mention: inputs "
        "less one half. The station's network begins "
        + ("from the trained detector's first stages, which saw no overlap label" if begun else "from noise")
        + ". ± is the standard deviation over draws and initialisations."
    ]
    tables, pictures = [], []
    if curves:
        tables.append(_curve_table(curves))
        text += _curve_text(curves, rule, shipped)
        pictures.append(draw_curves(curves, rule, shipped, folder))
    if ablated:
        tables.append(_ablation_table(trials, ablated))
        text.append(_ablation_text(ablated))
    if mixed:
        tables.append(_mix_table(mixed))
        text.append(_mix_text(mixed))
    if ablated and mixed:
        pictures.append(draw_ablations(ablated, mixed, folder))
    if not ablated:
        text.append("Ablations and class imbalance: not run.")
    if not curves:
        text.append("Learning curves: not run.")
    return Section(
        name="learning",
        page="paper",
        title="More crops, other labels, one change at a time",
        command=COMMAND,
        text=tuple(text),
        tables=tuple(tables),
        pictures=tuple(pictures),
        data={
            "curves": [
                {
                    "crops": n,
                    "steps": steps,
                    "network": name,
                    "labels": kind,
                    "accuracy": figure_of(each, "accuracy").tolist(),
                    "auc": figure_of(each, "auc").tolist(),
                }
                for (n, steps, name, kind), each in curves.items()
            ],
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
        "Learning curves: the paper's improved network taught by weak and by verified labels of the same "
        "crops, and the one that ships",
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


def _curve_text(curves: Curves, rule: RuleFigures, shipped: dict[str, float]) -> list[str]:
    def accuracy(n: int, steps: int, name: str, kind: str) -> float:
        each = figure_of(curves.get((n, steps, name, kind), []), "accuracy")
        return float(each.mean()) if len(each) else math.nan

    steps = steps_of(curves)
    sizes = sorted({n for n, s, _, kind in curves if s == steps and kind == "verified"})
    known = sizes[-1]
    n_weak, s_weak = max((n, s) for n, s, _, kind in curves if kind == "weak")
    best = accuracy(n_weak, s_weak, "improved", "weak")
    said = []
    for words, name in (("the same network", "improved"), ("the station's", "station")):
        enough = [n for n in sizes if accuracy(n, steps, name, "verified") >= best]
        said.append(f"{words} {f'with {enough[0]:,}' if enough else f'not with {known:,}'}")
    at_all = [
        f"{100 * pairs.mean():+.1f} ± {100 * pairs.std(ddof=1):.1f} points of accuracy after {s} steps"
        for s in sorted({s for n, s, name, _ in curves if (n, name) == (known, "improved")})
        if len(
            pairs := _pairs(
                curves.get((known, s, "improved", "verified"), []),
                curves.get((known, s, "improved", "weak"), []),
                "accuracy",
            )
        )
        > 1
    ]
    first, last = (accuracy(n, steps, "station", "verified") for n in (sizes[0], known))
    longest = max(s for n, s, name, kind in curves if (n, name, kind) == (known, "improved", "verified"))
    spread = figure_of(curves[sizes[0], steps, "improved", "verified"], "accuracy")
    return [
        f"**What the weak labels cost.** Taught by all {n_weak:,} weak labels the paper's network is right "
        f"in {best:.1%} of the validation crops; the rule itself in {rule.val_agreement:.1%}. Verified "
        f"labels reach that with fewer crops: {', '.join(said)}. On the same {known:,} crops, verified less "
        f"weak labels are worth {', '.join(at_all) or 'what the table says'}.",
        f"**More crops.** From {sizes[0]} to {known:,} verified crops the station's network goes from "
        f"{first:.1%} to {last:.1%} in {steps} steps"
        + (f" (what ships: {shipped['accuracy']:.1%})" if "accuracy" in shipped else "")
        + f", the paper's from {accuracy(sizes[0], steps, 'improved', 'verified'):.1%} to "
        f"{accuracy(known, steps, 'improved', 'verified'):.1%}, and to "
        f"{accuracy(known, longest, 'improved', 'verified'):.1%} in {longest}."
        + (
            f" With {sizes[0]} crops another draw alone changes accuracy by {100 * spread.std(ddof=1):.0f} "
            "points (standard deviation)."
            if len(spread) > 1
            else ""
        ),
    ]


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
        f"One change at a time: the improved network, {n:,} verified labels, {seeds} seeds; differences to "
        "the reference seed by seed",
        ("", "accuracy", "AUC", "accuracy, difference", "AUC, difference", "beyond chance (95 %, t)"),
        tuple(rows),
    )


def _ablation_text(ablated: Differences) -> str:
    said = []
    for figure, words in (("accuracy", "accuracy"), ("auc", "AUC")):
        sure = [
            f"{name} ({both[figure].mean():+.3f})"
            for name, both in ablated.items()
            if _beyond_chance(both[figure])
        ]
        said.append(f"{words} changes {', '.join(sure) if sure else 'with nothing'}")
    unsure = [name for name, both in ablated.items() if not any(_beyond_chance(v) for v in both.values())]
    return (
        f"**One change at a time.** Beyond what another seed does, {'; '.join(said)}. "
        + (f"Not told from chance: {', '.join(unsure)}. " if unsure else "")
        + f"Of {2 * len(ablated)} comparisons at 95 %, chance alone passes {0.05 * 2 * len(ablated):.1f}."
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
        f"{len({t.task.seed for t in mixed})} draws, the class weights of the paper on and off",
        ("overlapping in training", *(f"{name}: {words}" for name in MIXED for words in shown.values())),
        tuple(rows),
    )


def _mix_text(mixed: Sequence[Trial]) -> str:
    said = []
    for name in MIXED:
        mean = {
            share: {f: float(figure_of(each[name], f).mean()) for f in ("accuracy", "auc")}
            for share, each in by_share(mixed).items()
        }
        best = max(mean, key=lambda share: mean[share]["accuracy"])
        shown = sorted({min(mean), best, max(mean)})
        areas = [m["auc"] for m in mean.values()]
        said.append(
            f"{name}: "
            + ", ".join(f"{mean[share]['accuracy']:.2f} at {share:.0%}" for share in shown)
            + f" (AUC {min(areas):.2f} to {max(areas):.2f})"
        )
    return (
        f"**Class imbalance.** Accuracy by the share of overlapping crops that taught, {'; '.join(said)}: "
        "the rarest and the most frequent share, and the best."
    )

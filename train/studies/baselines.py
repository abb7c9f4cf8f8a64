"""What else counts red cells, by the same scoring: ``python -m studies.baselines``.

Textbook image processing (`baseline_methods`) and YOLOv5n without our CNN (`baseline_networks`). Reads top
to bottom: the candidates, the command, tuning and comparing, the tables. `evaluate.score` judges them all.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import cycle, product, starmap
from pathlib import Path
from typing import Annotated, Any, Final

import cv2
import numpy as np
import torch
import typer
from matplotlib.figure import Figure

from rbc_edge.values import CellClass, FovResult, Scale, ScaleSource, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train import charts, console, evaluate, labels, results
from rbc_train.data import Photograph, labelled_diameter_px, read_public, source_diameters_px
from rbc_train.evaluate import Examined
from rbc_train.labels import VerifiedLabels
from rbc_train.results import Chart, Section, Table
from studies import station
from studies.baseline_methods import Blobs, Components, Hough, Method, Proposals, Watershed
from studies.baseline_networks import (
    USUAL_CONFIDENCE,
    PlainYolo,
    TrainingOptions,
    TwoClassYolo,
    train_bccd640,
    train_two_class,
)

_SIZES: Final = (40.0, 64.0)  # our models' size of a cell, and one nearer to the photographs'
_BRIGHTER: Final = (-8, 0, 8)

CANDIDATES: Final[dict[str, tuple[Method, ...]]] = {
    "Circular Hough": tuple(starmap(Hough, product((25.0, 50.0, 100.0), (0.4, 0.5, 0.65), _SIZES, (0, 8)))),
    "Blobs": tuple(starmap(Blobs, product((0.1, 0.5), (0.1, 0.85), (True, False), _SIZES, _BRIGHTER))),
    "Watershed": tuple(
        starmap(Watershed, product((0.4, 0.6, 0.8), (0.8, 0.9), (True, False), _SIZES, (0, 8)))
    ),
    "Connected components": tuple(starmap(Components, product((0.0, 0.1, 0.2), _SIZES, _BRIGHTER))),
}
"""What `tune` chooses from, by name of the method."""

N_OUTCOMES: Final = len(CANDIDATES) + 4
"""How many outcomes `compare` gives."""


app = console.program()


class Trained(StrEnum):
    """Baselines that must be trained first."""

    bccd640 = "bccd640"
    two_class = "two-class"


@app.command("baselines")
def baselines_command(
    train: Annotated[
        Trained | None, typer.Option(help="Train this baseline into --out, and score nothing.")
    ] = None,
    bccd640: Annotated[Path | None, typer.Option(help="Its trained checkpoint.")] = None,
    two_class: Annotated[Path | None, typer.Option(help="Its trained checkpoint.")] = None,
    every: console.Every = 1,
    data: console.Data = console.DATA,
    bundle: console.BundleOption = None,
    dataset: console.DatasetOption = console.DATASET,
    weights: console.WeightsOption = console.WEIGHTS,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (runs/baseline-NAME) or of the results.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of the training. By default: the baseline's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    image_px: Annotated[
        int | None, typer.Option(min=64, help="Side of a training image. By default: the baseline's own.")
    ] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, or 0 for the first CUDA device.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="For training.")] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
) -> None:
    """Scores other ways to count red cells: Hough circles, blobs, watershed, components, other YOLOv5n."""
    if train is not None:
        options = TrainingOptions(
            data=data,
            dataset=dataset,
            bundle=bundle,
            weights=weights,
            out=out or Path(f"runs/baseline-{train.value}"),
            epochs=epochs,
            batch=batch,
            image_px=image_px,
            seed=seed,
            device=device,
            threads=threads,
            workers=workers,
        )
        typer.echo((train_bccd640 if train is Trained.bccd640 else train_two_class)(options))
        return
    txl, bccd = read_public(data)
    steps = compare(
        station.open_analyzer(bundle, threads=1),  # all methods run on one thread
        txl.photographs,
        bccd.photographs,
        labels.read_verified(),
        bccd640=bccd640,
        two_class=two_class,
        every=every,
    )
    with typer.progressbar(steps, length=N_OUTCOMES, label="methods", file=sys.stderr) as bar:
        outcomes = list(bar)
    given = (("--bccd640", bccd640), ("--two-class", two_class))
    command = "python -m studies.baselines" + "".join(
        f" {k} {v.name if v.is_absolute() else v}"  # without the paths of this machine
        for k, v in given
        if v
    )
    command += f" --every {every}" if every > 1 else ""
    folder = out or results.FOLDER
    console.publish(section(outcomes, folder, command), folder, lambda _section: text_table(outcomes))


@dataclass(frozen=True, slots=True)
class Tuned:
    """A method with what was chosen for it.

    Attributes:
        method: With its parameters.
        score_threshold: Least score of a cell that is counted.
        overlap_threshold: Least overlap score of a cell called overlapping.
        f1: Of red cells at iou 0.5 on the photographs that chose, mean over the sources.
    """

    method: Method
    score_threshold: float
    overlap_threshold: float
    f1: float


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """How one baseline fared.

    Attributes:
        name: Of the method.
        how: Its parameters and thresholds, in words.
        figures: What `evaluate.score` gave. Empty when it was not run.
        seconds: Median of a field, one thread, decoded image to counted cells. NaN when it was not run.
    """

    name: str
    how: str
    figures: Mapping[str, Any]
    seconds: float


def tuning_photographs(
    photographs: Sequence[Photograph], verified: VerifiedLabels, *, of_each: int = 20
) -> list[Photograph]:
    """Chooses the train photographs that parameters are chosen on.

    Args:
        photographs: Of any split. Only train is looked at.
        verified: Overlap labels.
        of_each: How many of each source, spread evenly over those with verified labels.

    Returns:
        The photographs.
    """
    chosen: list[Photograph] = []
    some = [p for p in photographs if p.split == "train" and evaluate.usable(verified, p)]
    for source in sorted({p.source for p in some}):
        own = [p for p in some if p.source == source]
        steps = np.linspace(0, len(own) - 1, min(of_each, len(own)))
        chosen += [own[round(i)] for i in steps]
    return chosen


def tune(candidates: Iterable[Method], photographs: Sequence[Photograph], verified: VerifiedLabels) -> Tuned:
    """Chooses a method's parameters and thresholds.

    For each candidate the score threshold is the one that makes its counts unbiased, as our detector's.
    The candidate with the best F1 of red cells at iou 0.5 there is taken, every source weighing the same.
    Then the overlap threshold is chosen as for the bundle (`evaluate.best_overlap_threshold`).

    Args:
        candidates: One method with different parameters. At least one.
        photographs: To choose on. Not those that judge.
        verified: Overlap labels.

    Returns:
        The best.
    """
    tried: list[Tuned] = []
    read = list(_read(photographs))
    for method in candidates:
        looked = _look(method, read)[0]
        least = evaluate.score_thresholds(_beside(looked, photographs, verified, 0.5))[CellClass.RBC]
        examined = _beside(looked, photographs, verified, least)
        sources = sorted({p.source for p in photographs})
        f1 = [_f1([e for e in examined if e.photograph.source == s], least) for s in sources]
        overlap = evaluate.best_overlap_threshold(examined)
        tried.append(Tuned(method, least, overlap, float(np.mean(f1))))
    return max(tried, key=lambda t: t.f1)


def _f1(examined: Sequence[Examined], least_score: float) -> float:
    scores, hits, n_truth = evaluate.ranked_hits(examined, CellClass.RBC, 0.5)
    over = scores >= least_score
    return 2 * int((over & hits).sum()) / max(int(over.sum()) + n_truth, 1)


def _read(photographs: Sequence[Photograph]) -> Iterator[tuple[UInt8, float]]:
    """Yields each photograph's image and labelled diameter, pixels."""
    of_source = source_diameters_px(photographs)
    for photograph in photographs:
        yield photograph.read(), labelled_diameter_px(photograph, of_source)


def _look(method: Method, read: Iterable[tuple[UInt8, float]]) -> tuple[list[Proposals], list[float]]:
    """Returns what a method saw in each photograph, and the seconds it took."""
    looked: list[Proposals] = []
    seconds: list[float] = []
    for image, diameter in read:
        start = time.perf_counter()
        looked.append(method.propose(image, diameter))
        seconds.append(time.perf_counter() - start)
    return looked, seconds


def _beside(
    looked: Sequence[Proposals],
    photographs: Sequence[Photograph],
    verified: VerifiedLabels,
    least_score: float,
) -> list[Examined]:
    """Lays what a method saw beside the labels, counting cells over a score."""
    of_source = source_diameters_px(photographs)
    return [
        evaluate.with_labels(
            photograph,
            FovResult(
                photograph.width_px,
                photograph.height_px,
                Scale(labelled_diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER),
                proposals.counted(least_score),
            ),
            proposals.detections,
            verified,
        )
        for proposals, photograph in zip(looked, photographs, strict=True)
    ]


def weak_area_threshold(photographs: Iterable[Photograph]) -> int:
    """Chooses the paper's T on the tight crops of BCCD's own train boxes (see `labels.area_threshold`)."""
    areas = [np.zeros(0, np.int64)]
    for photograph in photographs:
        if photograph.split == "train":
            red = photograph.xyxy[photograph.class_id == CellClass.RBC]
            areas.append(labels.otsu_area(preprocess.crops(photograph.read(), red, margin=0.0)))
    return labels.area_threshold(np.concatenate(areas))


def compare(
    analyzer: Analyzer,
    txl: Sequence[Photograph],
    bccd: Sequence[Photograph],
    verified: VerifiedLabels,
    *,
    bccd640: Path | None = None,
    two_class: Path | None = None,
    every: int = 1,
) -> Iterator[Outcome]:
    """Runs all baselines, and the bundle, over the validation photographs. Iterate to do the work.

    Args:
        analyzer: The bundle at work, on one thread.
        txl: TXL-PBC's photographs.
        bccd: BCCD's, with its own boxes: they choose the area threshold of YOLOv5n at 640.
        verified: Overlap labels.
        bccd640: Checkpoint of `train_bccd640`. None when there is none.
        two_class: Checkpoint of `train_two_class`. None when there is none.
        every: Every how many-th validation photograph, and candidate's photographs likewise.

    Yields:
        One outcome a baseline. Without figures where its checkpoint is not given.

    Raises:
        UnavailableError: If a checkpoint is not there.
        UsageError: If it is not such a checkpoint.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    validation = [p for p in txl if p.split == "val"][::every]
    choosing = tuning_photographs(txl, verified)[::every]
    for name, candidates in CANDIDATES.items():
        best = tune(candidates, choosing, verified)
        looked, seconds = _look(best.method, _read(validation))
        figures = evaluate.score(
            _beside(looked, validation, verified, best.score_threshold), best.overlap_threshold
        )
        how = (
            f"{_parameters(best.method)}; score from {best.score_threshold:g}, overlap from "
            f"{best.overlap_threshold:g}, chosen on {len(choosing)} train photographs (F1 {best.f1:.3f})"
        )
        yield Outcome(name, how, figures, float(np.median(seconds)))
    yield _plain_outcome(bccd640, validation, bccd, verified)
    yield _two_class_outcome(two_class, analyzer.bundle, validation, verified)
    scales: tuple[tuple[evaluate.ScaleMode, str], ...] = (
        ("labelled", "rbc-edge, told the scale"),
        ("estimated", "rbc-edge, told nothing"),
    )
    manifest = analyzer.bundle.manifest
    for scale, name in scales:
        examined = evaluate.examine(analyzer, validation, verified, scale=scale)
        figures = evaluate.score(examined, manifest.overlap_threshold)
        seconds = [sum(e.result.timings_ms.values()) / 1000 for e in examined]
        how = (
            f"bundle {analyzer.bundle.bundle_id}; score from {manifest.score_threshold[0]:g}, overlap from "
            f"{manifest.overlap_threshold:g}, as shipped (chosen on the validation photographs)"
        )
        yield Outcome(name, how, figures, float(np.median(seconds)))


def _parameters(method: Method) -> str:
    values = asdict(method)  # type: ignore[call-overload]  # every candidate is a dataclass
    return ", ".join(f"{k} {v:g}" if not isinstance(v, bool) else f"{k} {v}" for k, v in values.items())


_PLAIN: Final = "YOLOv5n, BCCD's boxes, 640"
_TWO_CLASS: Final = "YOLOv5n, two red classes"


def _plain_outcome(
    checkpoint: Path | None,
    validation: Sequence[Photograph],
    bccd: Sequence[Photograph],
    verified: VerifiedLabels,
) -> Outcome:
    if checkpoint is None:
        return Outcome(_PLAIN, "not run: no checkpoint given with --bccd640", {}, math.nan)
    area = weak_area_threshold(bccd)
    looked, seconds = _look(PlainYolo(checkpoint), _read(validation))
    overlap = (area + 0.5) / preprocess.CROP_PX**2  # overlapping if A > T
    figures = evaluate.score(_beside(looked, validation, verified, USUAL_CONFIDENCE), overlap)
    how = (
        f"{_epochs(checkpoint)}score from {USUAL_CONFIDENCE:g}, ultralytics' default; overlapping when the "
        f"dark area of the crop is over {area} of {preprocess.CROP_PX**2} pixels, Otsu's choice on BCCD's "
        "train crops"
    )
    return Outcome(_PLAIN, how, figures, float(np.median(seconds)))


def _epochs(checkpoint: Path) -> str:
    """How long a checkpoint was trained, as its run says: a short training is no fair rival."""
    try:
        run = json.loads((checkpoint.parent / "config.json").read_text(encoding="utf-8"))
        return f"trained for {int(run['epochs'])} epochs; "
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _two_class_outcome(
    checkpoint: Path | None, bundle: Bundle, validation: Sequence[Photograph], verified: VerifiedLabels
) -> Outcome:
    if checkpoint is None:
        return Outcome(_TWO_CLASS, "not run: no checkpoint given with --two-class", {}, math.nan)
    looked, seconds = _look(TwoClassYolo(checkpoint, bundle), _read(validation))
    least = evaluate.score_thresholds(_beside(looked, validation, verified, 0.5))[CellClass.RBC]
    examined = _beside(looked, validation, verified, least)
    overlap = evaluate.best_overlap_threshold(examined)
    how = (
        f"{_epochs(checkpoint)}score from {least:g}, overlap from {overlap:g}, chosen on the validation "
        "photographs, as ours"
    )
    return Outcome(_TWO_CLASS, how, evaluate.score(examined, overlap), float(np.median(seconds)))


def section(outcomes: Sequence[Outcome], folder: Path, command: str) -> Section:
    """Draws the chart and lays the outcomes out for the page.

    Args:
        outcomes: What `compare` gave.
        folder: Where the section will be. The chart is written there.
        command: How to get the same again.

    Returns:
        The section ``baselines``.

    Raises:
        UnavailableError: If the chart cannot be written.
    """
    run = [o for o in outcomes if o.figures]
    drawn: tuple[Chart, ...] = ()
    if run:
        charts.save(draw_crowding(run), folder / _CHART)
        caption = (
            "Error of the count by how crowded the field is: quarters of the fields, least crowded first"
        )
        drawn = (Chart(_CHART, caption),)
    return Section(
        name="baselines",
        command=command,
        tables=(_headline(outcomes), *_by_source(run)),
        charts=drawn,
        data={o.name: {"how": o.how, "seconds": o.seconds, **_headline_figures(o)} for o in outcomes},
    )


def _found(figures: Mapping[str, Any]) -> float:
    n = figures["overlap_on_found_boxes"]["n"]
    return float(n / max(n + figures["overlap_labels_not_found"], 1))


def _found_and_right(figures: Mapping[str, Any]) -> float:
    """Share of the verified cells that was found and rightly called. None of none found."""
    accuracy = figures["overlap_on_found_boxes"]["accuracy"]
    return 0.0 if math.isnan(accuracy) else _found(figures) * float(accuracy)


_CHART: Final = "baselines-crowding.png"
_COLUMNS: Final[tuple[tuple[str, Callable[[Mapping[str, Any]], float], str], ...]] = (
    ("RBC AP50", lambda f: f["rbc_ap50"], ".3f"),
    ("counted / labelled", lambda f: f["rbc_count_ratio"], ".3f"),
    ("field error, median", lambda f: f["rbc_field_error_median"], ".1%"),
    ("mean", lambda f: f["rbc_field_error_mean"], ".1%"),
    (
        "mean, crowded",
        lambda f: f["rbc_by_crowding"][-1]["field_error_mean"] if f["rbc_by_crowding"] else math.nan,
        ".1%",
    ),
    ("verified cells found", _found, ".1%"),
    ("overlap accuracy", lambda f: f["overlap_on_found_boxes"]["accuracy"], ".3f"),
    ("AUC", lambda f: f["overlap_on_found_boxes"]["auc"], ".3f"),
    ("recall of overlapping", lambda f: f["overlap_on_found_boxes"]["recall_overlapping"], ".3f"),
    ("found and right", _found_and_right, ".1%"),
)
_OF_SOURCES: Final = ("RBC AP50", "counted / labelled", "mean", "overlap accuracy", "found and right")


def _shown(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _headline_figures(outcome: Outcome) -> dict[str, Any]:
    """The figures of the tables and of the chart. All that `score` gives would be too much."""
    figures: dict[str, Any] = {
        group: {name: value(own) for name, value, _ in _COLUMNS} for group, own in outcome.figures.items()
    }
    if outcome.figures:
        figures["by_crowding"] = [
            {k: part[k] for k in ("from", "to", "photographs", "field_error_mean", "count_ratio")}
            for part in outcome.figures["all"]["rbc_by_crowding"]
        ]
    return figures


def _headline(outcomes: Sequence[Outcome]) -> Table:
    rows = [
        (
            o.name,
            *(
                _shown(value(o.figures["all"]), form) if o.figures else "not run"
                for _, value, form in _COLUMNS
            ),
            _shown(o.seconds * 1000, ".0f") if o.figures else "not run",
        )
        for o in outcomes
    ]
    columns = ("method", *(name for name, _, _ in _COLUMNS), "ms a field")
    return Table("All validation photographs", columns, tuple(rows))


def text_table(outcomes: Sequence[Outcome]) -> str:
    """Lays the headline figures out as text, a line a method."""
    table = _headline(outcomes)
    return console.aligned(table.columns, table.rows)


def _by_source(run: Sequence[Outcome]) -> list[Table]:
    sources = [s for s in run[0].figures if s != "all"] if run else []
    captions = {"mean": "mean field error"}
    return [
        Table(
            f"By source: {captions.get(name, name)}",
            ("method", *sources),
            tuple((o.name, *(_shown(value(o.figures[s]), form) for s in sources)) for o in run),
        )
        for name, value, form in _COLUMNS
        if name in _OF_SOURCES
    ]


# Okabe and Ito (2008): told apart by those who see no red or no green; markers besides.
_COLOURS: Final = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#CC79A7", "#000000", "#D55E00")
_MARKERS: Final = "osv^DXP*"


def draw_crowding(run: Sequence[Outcome]) -> Figure:
    """Draws the error of the count by how crowded the field is.

    Args:
        run: Outcomes with figures.

    Returns:
        The chart.
    """
    figure = Figure(figsize=(9.0, 3.8), dpi=80, layout="constrained")
    error, ratio = figure.subplots(1, 2, sharex=True)
    quarters = run[0].figures["all"]["rbc_by_crowding"]
    for outcome, colour, marker in zip(run, cycle(_COLOURS), cycle(_MARKERS), strict=False):
        parts = outcome.figures["all"]["rbc_by_crowding"]
        style = {"color": colour, "marker": marker, "markeredgecolor": "black", "markeredgewidth": 0.4}
        x = np.arange(1, len(parts) + 1)
        error.plot(x, [100 * p["field_error_mean"] for p in parts], label=outcome.name, **style)
        ratio.plot(x, [p["count_ratio"] for p in parts], **style)
    ratio.axhline(1.0, color="grey", linewidth=0.8)
    names = [f"{p['from']:.0%} to {p['to']:.0%}" for p in quarters]
    for axes, name in (
        (error, "mean error of a count, %"),
        (ratio, "cells counted / labelled"),
    ):
        axes.set_xticks(np.arange(1, len(names) + 1), names, fontsize=8)
        axes.set_xlabel("share of red cells whose boxes overlap another's")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    error.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    console.answer(app)

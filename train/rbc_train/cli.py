"""The command line of training: dataset, detector, teach, classifier, evaluate, pages. Parsing only.

torch takes seconds to load, which ``--help`` must not pay. So a command imports what it needs.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rbc_edge.errors import ExitCode
from rbc_train import console, results
from rbc_train.data import (
    CHULA,
    CLASS_NAMES,
    NEGATIVES,
    Collection,
    read_chula,
    read_completed,
    read_public,
    verified_labels,
    write_dataset,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rbc_train.data import Photograph
    from rbc_train.evaluate import Examined
    from rbc_train.train_classifier import LabelKind

app = console.program("Builds datasets, trains the two models and scores a bundle.")


class Model(StrEnum):
    """Classifier networks."""

    base = "base"
    improved = "improved"
    station = "station"
    teacher = "teacher"


class Labels(StrEnum):
    """What a classifier learns from."""

    weak = "weak"
    verified = "verified"
    taught = "taught"


class ScaleChoice(StrEnum):
    """What the station is told about the scale."""

    estimated = "estimated"
    labelled = "labelled"


@app.command()
def dataset(
    data: console.Data = console.DATA,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/dataset"),
    cell_diameter: Annotated[
        float, typer.Option(min=8, help="Size of a red cell at model scale, px.")
    ] = 40.0,
    crop_margin: Annotated[
        float, typer.Option(min=0, max=2, help="Margin of a crop on each side, share of its box.")
    ] = 0.25,
    chula: Annotated[
        bool, typer.Option(help="Take the 56 complete fields of Chula, too, and what is not one red cell.")
    ] = False,
    completed: Annotated[
        Path | None,
        typer.Option(help="What the complete command wrote: boxes where annotators left cells without one."),
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 3 when an annotation is wrong.")] = False,
) -> None:
    """Checks the public annotations and writes the detector's photographs and the 64x64 crops."""
    taken, bccd = read_public(data)
    if chula:
        fields = read_chula(data / CHULA)
        taken = Collection(taken.photographs + fields.photographs, taken.findings + fields.findings)
    for finding in [*taken.findings, *bccd.findings]:
        typer.echo(str(finding), err=True)
    steps = write_dataset(
        taken,
        out,
        cell_diameter_px=cell_diameter,
        crop_margin=crop_margin,
        negatives=chula,
        completed=completed,
    )
    with typer.progressbar(length=1, label="photographs", file=sys.stderr) as bar:
        for _, bar.length in steps:
            bar.update(1)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    kinds = (("rbc", 6), ("wbc", 5), ("platelet", 8), *((k, 8) for k in NEGATIVES if chula))
    heading = " ".join(f"{name:>{width}}" for name, width in kinds)
    typer.echo(f"{'split':6} {'source':7} {'photographs':>11} {heading}")
    for split, sources in manifest["counts"].items():
        for source, n in sources.items():
            cells = " ".join(f"{n.get(name, 0):>{width}}" for name, width in kinds)
            typer.echo(f"{split:6} {source:7} {n['photographs']:>11} {cells}")
    n_findings = len(taken.findings) + len(bccd.findings)
    typer.echo(f"{n_findings} findings (on stderr, and in {out / 'manifest.json'})")
    if strict and n_findings:
        raise typer.Exit(ExitCode.SOME_FAILED)


@app.command()
def complete(
    data: console.Data = console.DATA,
    bundle: console.BundleOption = None,
    out: Annotated[Path, typer.Option(help="Table to write.")] = Path("data/completed.csv"),
    sheets: Annotated[
        Path | None,
        typer.Option(help="Also write images of photographs with their boxes here. They are not public."),
    ] = None,
    threads: console.Threads = 0,
) -> None:
    """Boxes the cells of the training photographs that have a point of an expert, or nothing, instead.

    A bundle proposes the boxes, and the points decide. For `dataset --completed`. Look at the sheets first.
    """
    from rbc_edge.vision.analyzer import Analyzer  # noqa: PLC0415
    from rbc_edge.vision.bundle import Bundle  # noqa: PLC0415
    from rbc_train import complete as completing  # noqa: PLC0415
    from rbc_train import sheets as drawn  # noqa: PLC0415

    chula = read_chula(data / CHULA).of("train") if (data / CHULA).is_dir() else []
    photographs = read_public(data)[0].of("train") + chula
    analyzer = Analyzer(Bundle.open(bundle), threads=threads)
    with typer.progressbar(length=len(photographs), label="photographs", file=sys.stderr) as bar:
        counts = completing.write(photographs, analyzer, out, lambda _done, _total: bar.update(1))
    typer.echo("  ".join(f"{origin} {n}" for origin, n in sorted(counts.items())))
    if sheets:
        for file in drawn.write_completed(photographs, read_completed(out), sheets):
            typer.echo(file, err=True)
    typer.echo(out)


@app.command()
def detector(
    dataset: console.DatasetOption = console.DATASET,
    weights: Annotated[
        Path | None, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")
    ] = console.WEIGHTS,
    from_scratch: Annotated[bool, typer.Option(help="Start from noise, without --weights.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/detector"),
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    image_px: Annotated[int, typer.Option(min=64, help="Side of a training image, a multiple of 32.")] = 256,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, or 0 for the first CUDA device.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
) -> None:
    """Trains YOLOv5n. After an interruption, the same command continues."""
    from rbc_train import train_detector  # noqa: PLC0415

    options = train_detector.DetectorOptions(
        dataset=dataset,
        weights=None if from_scratch else weights,
        out=out,
        epochs=epochs,
        batch=batch,
        image_px=image_px,
        seed=seed,
        device=device,
        threads=threads,
        workers=workers,
    )
    typer.echo(train_detector.train(options))


@app.command()
def teach(
    dataset: console.DatasetOption = console.DATASET,
    data: console.Data = console.DATA,
    detector: console.DetectorOption = console.DETECTOR,
    out: Annotated[Path, typer.Option(help="Folder of the teachers.")] = Path("runs/teachers"),
    folds: Annotated[int, typer.Option(min=2, help="How many teachers.")] = 4,
    epochs: Annotated[int | None, typer.Option(min=1, help="By default: the teacher's own.")] = None,
    ask: Annotated[
        Path | None, typer.Option(help="Train no teachers: let this bundle judge the crops.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains teachers on the verified labels. They judge every training crop."""
    from rbc_edge.vision.bundle import Bundle  # noqa: PLC0415
    from rbc_train import teachers, train_classifier  # noqa: PLC0415

    options = teachers.TeachingOptions(
        dataset=dataset,
        data=data,
        detector=detector,
        out=out,
        folds=folds,
        epochs=epochs,
        threads=threads,
    )
    if ask:
        typer.echo(teachers.ask(Bundle.open(ask), dataset, data, out, threads))
        return
    taught = teachers.teach(options, console.show_progress)
    rows = train_classifier.read_rows(dataset, "train")
    known = teachers.agreement(rows, train_classifier.read_taught(out, dataset))
    typer.echo(
        f"{len(rows)} crops judged. {known.n} of them have a verified label that their teacher did not see: "
        f"accuracy {known.accuracy:.4f}, AUC {known.auc:.4f}"
    )
    typer.echo(taught)


@app.command()
def classifier(
    model: Annotated[
        Model, typer.Option(help="base and improved are the paper's. station ships.")
    ] = Model.station,
    labels: Annotated[
        Labels | None,
        typer.Option(help="Labels to learn from. By default: taught for station, else verified."),
    ] = None,
    dataset: console.DatasetOption = console.DATASET,
    data: console.Data = console.DATA,
    detector: console.DetectorOption = console.DETECTOR,
    from_scratch: Annotated[bool, typer.Option(help="Start from noise, without --detector.")] = False,
    taught: Annotated[Path, typer.Option(help="Folder of the teach command.")] = Path("runs/teachers"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of this run. By default: runs/classifier-MODEL.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="By default: the model's own.")] = None,
    crop_margin: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    paste: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of singles that get a pasted neighbour.")
    ] = None,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains a CNN for single or overlapping. After an interruption, the same command continues."""
    from rbc_train import networks, train_classifier  # noqa: PLC0415

    kind: LabelKind = (labels or (Labels.taught if model is Model.station else Labels.verified)).value
    paper = model.value in networks.PAPER
    options = train_classifier.ClassifierOptions(
        dataset=dataset,
        data=data,
        out=out or Path(f"runs/classifier-{model.value}"),
        model=model.value,
        labels=kind,
        detector=None if from_scratch or paper else detector,
        taught=taught if kind == "taught" else None,
        epochs=epochs,
        crop_margin=crop_margin,
        paste=paste,
        seed=seed,
        threads=threads,
    )
    typer.echo(train_classifier.train(options, console.show_progress))


@app.command()
def evaluate(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    scale: Annotated[
        ScaleChoice,
        typer.Option(help="estimated: the program finds the cell size, as at the station."),
    ] = ScaleChoice.estimated,
    out: console.Out = results.FOLDER,
    sheets: Annotated[
        Path | None,
        typer.Option(help="Also write images of the worst cells and fields here. They are not public."),
    ] = None,
    threads: console.Threads = 0,
    every: console.Every = 1,
) -> None:
    """Scores a bundle, run through rbc_edge, on the validation photographs: by source and by laboratory.

    The sources are those of TXL-PBC. Chula is a laboratory, too, where the data have it. Run it last: it
    compares the targets with what the studies scale, corruptions and bccd measured, and repeats the tables
    of the study laboratories (each laboratory left out of the training once). With --every it is a quick
    look: it prints the figures and publishes nothing.
    """
    from rbc_edge.vision.analyzer import Analyzer  # noqa: PLC0415
    from rbc_edge.vision.bundle import DETECTOR_FP32, Bundle  # noqa: PLC0415
    from rbc_train import charts, laboratories, scorecard, shapes  # noqa: PLC0415
    from rbc_train import sheets as worst  # noqa: PLC0415
    from rbc_train.evaluate import examine, intervals, score, table  # noqa: PLC0415

    opened = Bundle.open(bundle)
    validation, manifest = read_public(data)[0].of("val")[::every], opened.manifest
    fields = read_chula(data / CHULA).of("val") if (data / CHULA).is_dir() else []
    # Both kinds apart: boxes judge the laboratory, points the shapes.
    fields = [p for whole in (True, False) for p in [f for f in fields if f.complete is whole][::every]]
    verified = verified_labels([*validation, *fields])

    def look(analyzer: Analyzer, name: str, shown: "Sequence[Photograph]") -> "list[Examined]":
        with typer.progressbar(length=len(shown), label=name, file=sys.stderr) as bar:
            return examine(
                analyzer,
                shown,
                verified,
                scale=scale.value,
                progress=lambda _done, _total: bar.update(1),
            )

    station = Analyzer(opened, threads=threads)
    examined = look(station, "photographs", validation)
    found = score(examined, manifest.overlap_threshold)
    typer.echo(f"bundle {opened.bundle_id}, scale {scale.value}, validation photographs of TXL-PBC")
    typer.echo(table(found))
    other = look(station, "Chula", fields) if fields else []
    everyone = examined + other
    of_laboratory = laboratories.figures(everyone, manifest.overlap_threshold)
    of_shape = laboratories.by_shape(everyone)
    seen = shapes.look(station, [p for p in fields if p.points])
    formed = shapes.section(shapes.figures(seen, manifest.shape_threshold)) if len(seen) else None
    learned = laboratories.learned_from(manifest.training)
    own = laboratories.section(
        of_laboratory, of_shape, learned, bundle_id=opened.bundle_id, scale=scale.value
    )
    if sheets:
        for shown, prefix in ((examined, ""), (other, f"{CHULA}-")):
            for file in worst.write(shown, verified, manifest.overlap_threshold, sheets, prefix):
                typer.echo(file, err=True)
    if every > 1:
        typer.echo(laboratories.text([*own.tables, *(formed.tables if formed else ())]))
        return
    runs = [run for run in (scorecard.at_export(manifest.metrics),) if run]
    if DETECTOR_FP32 in manifest.files:
        whole = look(Analyzer(opened, threads=threads, precision="fp32"), "fp32", validation)
        fp32 = score(whole, manifest.overlap_threshold)["all"]
        runs.append(scorecard.Runs(f"now, scale {scale.value}", int8=found["all"], fp32=fp32))
    between = intervals(examined, manifest.overlap_threshold)
    lines = scorecard.targets(found, between, runs, opened.bundle_id, out)
    typer.echo(scorecard.targets_text(lines))
    typer.echo(laboratories.text([*own.tables, *(formed.tables if formed else ())]))
    if (out / "left-out.json").is_file():
        typer.echo(laboratories.text(results.read_tables("left-out", out)))
    names = (*CLASS_NAMES, "overlap")
    section = scorecard.section(
        found,
        between,
        lines,
        runs,
        charts.draw_all(examined, manifest.score_threshold, manifest.overlap_threshold, out),
        bundle_id=opened.bundle_id,
        scale=scale.value,
        thresholds=dict(zip(names, (*manifest.score_threshold, manifest.overlap_threshold), strict=True)),
    )
    results.store(own, out)
    if formed:
        results.store(formed, out)
    typer.echo(results.publish(section, out), err=True)


@app.command()
def thresholds(
    out: Annotated[Path, typer.Option(help="Folder of the new bundle. May be that of the old one.")],
    data: console.Data = console.DATA,
    bundle: console.BundleOption = None,
    threads: console.Threads = 0,
) -> None:
    """Chooses the thresholds of a finished bundle again, on validation photographs. The networks stay."""
    from rbc_edge.vision.bundle import Bundle  # noqa: PLC0415
    from rbc_train import thresholds as choosing  # noqa: PLC0415

    chula = read_chula(data / CHULA).of("val") if (data / CHULA).is_dir() else []
    photographs = read_public(data)[0].complete("val") + chula
    made = choosing.again(Bundle.open(bundle), photographs, out, typer.echo, threads)
    typer.echo(f"{made.path}  {made.bundle_id}")


@app.command()
def pages(out: console.Out = results.FOLDER) -> None:
    """Makes the pages of results again from what the commands wrote. Measures nothing."""
    for page in results.write_pages(out):
        typer.echo(page)


def main() -> None:
    """Runs the command line of training."""
    console.answer(app)

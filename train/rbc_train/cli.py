"""The workshop's command line: dataset, detector, classifier, evaluate. Parsing only."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rbc_edge.errors import ExitCode, RbcEdgeError
from rbc_train import results
from rbc_train.data import CLASS_NAMES, Photograph, annotated_twice, official_test, read_public, write_dataset

if TYPE_CHECKING:
    from rbc_edge.vision.analyzer import Analyzer

app = typer.Typer(
    help="Builds datasets, trains the two models and scores a bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path, typer.Option(help="Folder with splits.csv, txl_pbc/ and bccd/.", envvar="RBC_DATA")]
BundleOption = Annotated[Path | None, typer.Option(help="Bundle to run.  [default: the shipped one]")]
Every = Annotated[int, typer.Option(min=1, help="Every how many-th photograph.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the networks; 0: as the processor has.")]
Out = Annotated[Path, typer.Option(help="Folder of results; the page made of them lies one above.")]
DatasetOption = Annotated[Path, typer.Option(help="What the dataset command wrote.")]
DetectorOption = Annotated[Path, typer.Option(help="Detector checkpoint whose first stages it begins from.")]
_DATA = Path("../shared/data")
_DATASET = Path("data/dataset")
_DETECTOR = Path("runs/detector/detector.pt")
_WEIGHTS = Path("../shared/weights/yolov5n-coco.safetensors")


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


@app.command()
def dataset(
    data: Data = _DATA,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/dataset"),
    cell_diameter: Annotated[
        float, typer.Option(min=8, help="Size of a red cell at model scale, px.")
    ] = 40.0,
    crop_margin: Annotated[
        float, typer.Option(min=0, max=2, help="Margin of a crop, share of its box.")
    ] = 0.25,
    strict: Annotated[bool, typer.Option(help="Exit 3 when an annotation has findings.")] = False,
) -> None:
    """Checks the public annotations and writes the detector's photographs and the 64x64 crops."""
    txl, bccd = read_public(data)
    for finding in [*txl.findings, *bccd.findings]:
        typer.echo(str(finding), err=True)
    steps = write_dataset(txl, out, cell_diameter_px=cell_diameter, crop_margin=crop_margin)
    with typer.progressbar(
        steps, length=len(txl.of("train", "val")), label="photographs", file=sys.stderr
    ) as bar:
        for _ in bar:
            pass
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    typer.echo(f"{'split':6} {'source':7} {'photographs':>11} {'rbc':>6} {'wbc':>5} {'platelet':>8}")
    for split, sources in manifest["counts"].items():
        for source, n in sources.items():
            cells = " ".join(f"{n.get(c, 0):>{w}}" for c, w in (("rbc", 6), ("wbc", 5), ("platelet", 8)))
            typer.echo(f"{split:6} {source:7} {n['photographs']:>11} {cells}")
    n_findings = len(txl.findings) + len(bccd.findings)
    typer.echo(f"{n_findings} findings (on stderr, and in {out / 'manifest.json'})")
    if strict and n_findings:
        raise typer.Exit(ExitCode.SOME_FAILED)


@app.command()
def detector(
    dataset: Annotated[Path, typer.Option(help="What the dataset command wrote.")] = Path("data/dataset"),
    weights: Annotated[Path | None, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")] = _WEIGHTS,
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
    """Trains YOLOv5n. Run again after a kill, it goes on where it was."""
    from rbc_train import detector as room  # noqa: PLC0415  torch takes seconds that --help must not pay

    options = room.DetectorOptions(
        dataset,
        None if from_scratch else weights,
        out,
        epochs,
        batch,
        image_px,
        seed,
        device,
        threads,
        workers,
    )
    typer.echo(room.train(options))


@app.command()
def teach(
    dataset: DatasetOption = _DATASET,
    data: Data = _DATA,
    detector: DetectorOption = _DETECTOR,
    out: Annotated[Path, typer.Option(help="Folder of the teachers.")] = Path("runs/teachers"),
    folds: Annotated[int, typer.Option(min=2, help="How many teachers.")] = 4,
    epochs: Annotated[int | None, typer.Option(min=1, help="The teacher's own when not given.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains teachers on the verified labels and lets them judge every training crop."""
    options = teachers.TeachingOptions(dataset, data, detector, out, folds, epochs, threads)
    taught = teachers.teach(options, _show)
    rows = train_classifier.read_rows(dataset, "train")
    known = teachers.agreement(rows, train_classifier.read_taught(out, dataset))
    typer.echo(
        f"{len(rows)} crops taught; {known.n} of them were inspected and not seen by the teacher that "
        f"judged them: accuracy {known.accuracy:.4f}, AUC {known.auc:.4f}"
    )
    typer.echo(taught)


@app.command()
def classifier(
    model: Annotated[
        Model, typer.Option(help="base and improved are the paper's; station ships.")
    ] = Model.station,
    labels: Annotated[
        Labels | None,
        typer.Option(help="What teaches; taught for station when not given. The verified labels judge."),
    ] = None,
    dataset: DatasetOption = _DATASET,
    data: Data = _DATA,
    detector: DetectorOption = _DETECTOR,
    from_scratch: Annotated[bool, typer.Option(help="Start from noise, without --detector.")] = False,
    taught: Annotated[Path, typer.Option(help="What the teach command wrote.")] = Path("runs/teachers"),
    out: Annotated[Path | None, typer.Option(help="Folder of this run; runs/classifier-MODEL.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="The model's own when not given.")] = None,
    crop_margin: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    paste: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of singles with a pasted neighbour.")
    ] = None,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Trains a single/overlapping CNN. Run again after a kill, it goes on where it was."""
    from rbc_train import classifier as room  # noqa: PLC0415

    kind: room.LabelKind = (labels or (Labels.taught if model is Model.station else Labels.verified)).value
    paper = model.value in room.PAPER
    options = room.ClassifierOptions(
        dataset,
        data,
        out or Path(f"runs/classifier-{model.value}"),
        model.value,
        kind,
        detector=None if from_scratch or paper else detector,
        taught=taught if kind == "taught" else None,
        epochs=epochs,
        crop_margin=crop_margin,
        paste=paste,
        seed=seed,
        threads=threads,
    )
    typer.echo(room.train(options, _show))


def _show(done: int, total: int, line: str) -> None:
    bar = "#" * round(30 * done / total)
    typer.echo(f"[{bar:30}] {done}/{total}  {line}", err=True)


class ScaleChoice(StrEnum):
    """What the station is told of the scale."""

    estimated = "estimated"
    labelled = "labelled"


@app.command()
def evaluate(
    bundle: BundleOption = None,
    data: Data = _DATA,
    scale: Annotated[
        ScaleChoice, typer.Option(help="estimated: nobody says how large a cell is, as at the station.")
    ] = ScaleChoice.estimated,
    out: Out = results.FOLDER,
    sheets: Annotated[
        Path | None,
        typer.Option(help="Also write pictures of the worst verdicts and counts here. They are not public."),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Scores a bundle, run through rbc_edge, on the validation photographs of TXL-PBC, by source.

    Run it last: the targets that scale and disturb measure are read from what those published.
    """
    from rbc_edge.vision.analyzer import Analyzer  # noqa: PLC0415
    from rbc_edge.vision.bundle import DETECTOR_FP32  # noqa: PLC0415
    from rbc_train import labels, scorecard  # noqa: PLC0415
    from rbc_train import sheets as worst  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    opened, verified = analyzer.bundle, labels.read_verified()
    manifest = opened.manifest

    def examine(at_work: Analyzer, name: str) -> list[evaluate.Examined]:
        with typer.progressbar(length=len(validation), label=name, file=sys.stderr) as bar:
            return evaluate.examine(
                at_work, validation, verified, scale=scale.value, progress=lambda _done, _total: bar.update(1)
            )

    examined = examine(analyzer, "photographs")
    found = evaluate.score(examined, manifest.overlap_threshold)
    typer.echo(f"bundle {opened.bundle_id}, scale {scale.value}, validation photographs of TXL-PBC")
    typer.echo(evaluate.table(found))
    runs = [run for run in (scorecard.at_export(manifest.metrics),) if run]
    if DETECTOR_FP32 in manifest.files:
        whole = examine(Analyzer(opened, threads=threads, precision="fp32"), "fp32")
        fp32 = evaluate.score(whole, manifest.overlap_threshold)["all"]
        runs.append(scorecard.Runs(f"now, scale {scale.value}", found["all"], fp32))
    between = evaluate.intervals(examined, manifest.overlap_threshold)
    lines = scorecard.targets(found, between, runs, opened.bundle_id, out)
    typer.echo(scorecard.targets_text(lines))
    pictures = charts.draw_all(examined, manifest.score_threshold, manifest.overlap_threshold, out)
    names = (*CLASS_NAMES, "overlap")
    section = scorecard.section(
        found, between, lines, runs, pictures,
        bundle_id=opened.bundle_id,
        scale=scale.value,
        thresholds=dict(zip(names, (*manifest.score_threshold, manifest.overlap_threshold), strict=True)),
    )  # fmt: skip
    typer.echo(results.publish(section, out), err=True)
    if sheets:
        for file in worst.write(examined, verified, manifest.overlap_threshold, sheets):
            typer.echo(file, err=True)


@app.command()
def scale(
    bundle: BundleOption = None,
    data: Data = _DATA,
    every: Every = 3,  # trials.SCALE_EVERY
    out: Out = results.FOLDER,
    threads: Threads = 0,
) -> None:
    """Enlarges, shrinks and tiles validation photographs and lets the station find the scale of each."""
    from rbc_train import trials  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    photographs = validation[::every]
    typer.echo("factor  fields   rbc  change  estimated / labelled (5 %, median, 95 %)  off by a third")
    tried: list[trials.ScaleTrial] = []
    for trial in trials.try_scales(analyzer, photographs):
        tried.append(trial)
        change = trial.n_rbc / max(tried[0].n_rbc, 1) - 1
        typer.echo(
            f"{trial.factor:6.2f} {trial.n_fields:7} {trial.n_rbc:5} {change:+7.1%}"
            f"  {trial.ratio_low:17.2f} {trial.ratio_median:7.2f} {trial.ratio_high:6.2f} {trial.n_off:17}"
        )
    typer.echo("slide / field  put right    rbc  change")
    strays: list[trials.StrayTrial] = []
    for stray in trials.try_strays(analyzer, photographs):
        strays.append(stray)
        change = stray.n_rbc / max(strays[0].n_rbc, 1) - 1
        typer.echo(f"{stray.factor:13.2f} {stray.n_own:10} {stray.n_rbc:6} {change:+7.1%}")
    typer.echo("mosaic      parts  megapixels  labelled px  estimated     rbc  part by part  change")
    mosaics: list[trials.MosaicTrial] = []
    for tiled in trials.try_mosaics(analyzer, validation):
        mosaics.append(tiled)
        typer.echo(
            f"{tiled.source:10} {tiled.n_parts:6} {tiled.width_px * tiled.height_px / 1e6:11.1f}"
            f" {tiled.labelled_px:12.1f} {tiled.estimated_px:10.1f} {tiled.mosaic:7} {tiled.parts:13}"
            f" {tiled.mosaic / max(tiled.parts, 1) - 1:+7.1%}"
        )
    section = trials.scale_section(tried, strays, mosaics, analyzer.bundle.bundle_id, every=every)
    typer.echo(results.publish(section, out), err=True)


@app.command()
def disturb(
    bundle: BundleOption = None,
    data: Data = _DATA,
    every: Every = 1,
    out: Out = results.FOLDER,
    threads: Threads = 0,
) -> None:
    """Counts validation photographs under other light, colour, focus and compression."""
    from rbc_train import trials  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    photographs = validation[::every]
    typer.echo(f"{len(photographs)} photographs     rbc  change  overlapping  change  wbc")
    tried: list[trials.DisturbanceTrial] = []
    for trial in trials.try_disturbances(analyzer, photographs):
        tried.append(trial)
        rbc = trial.n_rbc / max(tried[0].n_rbc, 1) - 1
        overlapping = trial.n_overlapping / max(tried[0].n_overlapping, 1) - 1
        typer.echo(
            f"{trial.name:20} {trial.n_rbc:4} {rbc:+7.1%} {trial.n_overlapping:12} {overlapping:+7.1%}"
            f" {trial.n_wbc:4}"
        )
    section = trials.disturbance_section(tried, len(photographs), analyzer.bundle.bundle_id, every=every)
    typer.echo(results.publish(section, out), err=True)


@app.command()
def quality(
    bundle: BundleOption = None,
    data: Data = _DATA,
    every: Every = 10,  # defects.EVERY
    work: Annotated[Path, typer.Option(help="Folder of the trials; a cut command goes on there.")] = Path(
        "runs/quality"
    ),
    out: Out = results.FOLDER,
    threads: Threads = 0,
) -> None:
    """Draws defects into validation photographs and weighs the quality flags: hits and false alarms."""
    from rbc_train import defects  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    steps = defects.try_defects(analyzer, validation, every=every, work=work)
    with typer.progressbar(steps, length=defects.n_trials(), label="defects", file=sys.stderr) as bar:
        trials = list(bar)
    figure, picture = defects.draw_rocs(trials, "quality-roc.png")
    charts.save(figure, out / picture.file)
    results.publish(defects.flags_section(), out)
    typer.echo(_published(defects.section(trials, picture, analyzer.bundle.bundle_id, every=every), out))


@app.command()
def coverage(
    bundle: BundleOption = None,
    data: Data = _DATA,
    every: Every = 1,
    out: Out = results.FOLDER,
    threads: Threads = 0,
) -> None:
    """Draws slides from photographs: does the 95 % interval hold the truth, how many fields are needed?"""
    from rbc_train import coverage as room  # noqa: PLC0415

    analyzer, _ = _at_work(bundle, data, threads)
    photographs = read_public(data)[0].of("train", "val")[::every]
    with typer.progressbar(length=len(photographs), label="photographs", file=sys.stderr) as bar:
        sources = room.count_fields(analyzer, photographs, bar.update)
    covered = {f.source: list(room.cover(f, draws=room.DRAWS)) for f in sources}
    asked = {f.source: list(room.forecast(f, draws=room.FORECAST_DRAWS)) for f in sources}
    typer.echo(_published(room.section(sources, covered, asked, analyzer.bundle.bundle_id), out))


class Comparator(StrEnum):
    """Comparators that must be trained first."""

    bccd640 = "bccd640"
    two_class = "two-class"


@app.command()
def compare(
    train: Annotated[
        Comparator | None, typer.Option(help="Train this comparator into --out, and score nothing.")
    ] = None,
    bccd640: Annotated[Path | None, typer.Option(help="Its trained checkpoint.")] = None,
    two_class: Annotated[Path | None, typer.Option(help="Its trained checkpoint.")] = None,
    every: Every = 1,
    data: Data = _DATA,
    bundle: BundleOption = None,
    dataset: Annotated[Path, typer.Option(help="What the dataset command wrote (two-class).")] = Path(
        "data/dataset"
    ),
    weights: Annotated[Path, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")] = _WEIGHTS,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (runs/compare-NAME) or of the results.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="The comparator's own when not given.")] = None,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    image_px: Annotated[int | None, typer.Option(min=64, help="The comparator's own when not given.")] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, or 0 for the first CUDA device.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="For training.")] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
) -> None:
    """Scores what else counts red cells: Hough circles, blobs, watershed, components, other YOLOv5n."""
    from rbc_train import comparators, labels  # noqa: PLC0415

    if train is not None:
        plain = train is Comparator.bccd640
        folder = out or Path(f"runs/compare-{train.value}")
        options = comparators.TrainingOptions(
            data, dataset, bundle, weights, folder, epochs, batch, image_px, seed, device, threads, workers
        )
        typer.echo((comparators.train_bccd640 if plain else comparators.train_two_class)(options))
        return
    from rbc_edge.vision.analyzer import Analyzer  # noqa: PLC0415
    from rbc_edge.vision.bundle import Bundle  # noqa: PLC0415

    txl, bccd = read_public(data)
    steps = comparators.compare(
        Analyzer(Bundle.open(bundle), threads=1),  # all on one thread
        txl.photographs,
        bccd.photographs,
        labels.read_verified(),
        bccd640=bccd640,
        two_class=two_class,
        every=every,
    )
    with typer.progressbar(steps, length=comparators.N_OUTCOMES, label="methods", file=sys.stderr) as bar:
        outcomes = list(bar)
    given = (("--bccd640", bccd640), ("--two-class", two_class))
    command = "python -m rbc_train compare" + "".join(
        f" {k} {v.name if v.is_absolute() else v}"  # a machine's paths are nobody else's
        for k, v in given
        if v
    )
    command += f" --every {every}" if every > 1 else ""
    folder = out or results.FOLDER
    typer.echo(comparators.text_table(outcomes))
    typer.echo(results.publish(comparators.section(outcomes, folder, command), folder), err=True)


class Part(StrEnum):
    """Parts of the work on the paper."""

    experiments = "experiments"
    learning = "learning"
    ablations = "ablations"


@app.command()
def paper(
    dataset: DatasetOption = _DATASET,
    data: Data = _DATA,
    detector: DetectorOption = _DETECTOR,
    from_scratch: Annotated[bool, typer.Option(help="Start from noise, without --detector.")] = False,
    seeds: Annotated[int, typer.Option(min=2, help="Draws of each experiment.")] = 30,
    part: Annotated[Part | None, typer.Option(help="Only this.  [default: all three]")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the trials; a cut command goes on there.")] = Path(
        "runs/paper"
    ),
    out: Out = results.FOLDER,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Repeats the paper's experiments over many draws and asks what crops, labels and tricks are worth."""
    from rbc_train import paper as room  # noqa: PLC0415
    from rbc_train import paper_page  # noqa: PLC0415

    trials, rule = room.repeat(
        room.Plan(seeds=seeds),
        (part.value,) if part else room.PARTS,
        work,
        dataset=dataset,
        data=data,
        begin=None if from_scratch else detector,
        threads=threads,
        progress=_show,
    )
    for section in paper_page.sections(trials, rule, out, begun=not from_scratch):
        typer.echo(paper_page.as_text(section))
        typer.echo(results.publish(section, out), err=True)


class BccdSplit(StrEnum):
    """Splits of BCCD."""

    val = "val"
    test = "test"


@app.command()
def bccd(
    split: Annotated[BccdSplit, typer.Option(help="test is touched once, at the end.")] = BccdSplit.val,
    bundle: BundleOption = None,
    data: Data = _DATA,
    out: Out = results.FOLDER,
    threads: Threads = 0,
) -> None:
    """Scores a bundle against BCCD's own boxes, as the literature does."""
    from rbc_train import labels, scorecard  # noqa: PLC0415

    analyzer, _ = _at_work(bundle, data, threads)
    txl, own = read_public(data)

    def score(chosen: list[Photograph]) -> dict[str, object]:
        # Overlap is not judged here.
        seen = evaluate.examine(analyzer, chosen, labels.VerifiedLabels([]), scale="estimated")
        return evaluate.score_group(seen, analyzer.bundle.manifest.overlap_threshold)

    pairs = annotated_twice(data, txl, own)
    both = {
        "BCCD's boxes": score([b for b, _ in pairs]),
        "TXL-PBC's boxes": score([t for _, t in pairs]),
    }
    figures = score(own.of("val") if split is BccdSplit.val else official_test(data, own))
    section = scorecard.bccd_section(split.value, figures, both, analyzer.bundle.bundle_id)
    typer.echo(_published(section, out))


@app.command()
def overlap(
    checkpoint: Annotated[list[Path], typer.Argument(help="classifier.pt of each run to compare.")],
    dataset: DatasetOption = _DATASET,
    data: Data = _DATA,
    out: Out = results.FOLDER,
) -> None:
    """Judges overlap CNNs that were taught differently, on the verified validation labels."""
    from rbc_train import choices  # noqa: PLC0415

    typer.echo(_published(choices.overlap_section(choices.judge_overlap(checkpoint, dataset, data)), out))


@app.command()
def suppression(
    bundle: BundleOption = None,
    data: Data = _DATA,
    out: Out = results.FOLDER,
) -> None:
    """Judges ways to suppress boxes on what the bundle's detector sees before suppression."""
    from rbc_edge.vision.bundle import Bundle  # noqa: PLC0415
    from rbc_train import choices  # noqa: PLC0415

    opened = Bundle.open(bundle)
    validation = read_public(data)[0].of("val")
    seen = choices.candidates(choices.bundle_look(opened), validation, opened.manifest.cell_diameter_px)
    judged = dict(choices.try_suppressions(seen))
    typer.echo(_published(choices.suppression_section(judged, opened.bundle_id), out))


@app.command()
def diameter(
    data: Data = _DATA,
    weights: Annotated[Path, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")] = _WEIGHTS,
    runs: Annotated[Path, typer.Option(help="Folder of the datasets and runs.")] = Path("runs/diameter"),
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 12,
    out: Out = results.FOLDER,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Trains a detector at each of several cell sizes and measures accuracy against cost."""
    from rbc_train import choices  # noqa: PLC0415

    options = choices.DiameterOptions(data, weights, runs, epochs, threads)
    judged = {d: choices.try_diameter(options, d) for d in choices.DIAMETERS_PX}
    typer.echo(_published(choices.diameter_section(judged, epochs), out))


def _published(section: results.Section, folder: Path) -> str:
    """Publishes a section; returns its tables as text."""
    results.publish(section, folder)
    lines = []
    for table in section.tables:
        lines += [table.caption, *("  ".join(row) for row in (table.columns, *table.rows))]
    return "\n".join(lines)


def _at_work(bundle: Path | None, data: Path, threads: int) -> "tuple[Analyzer, list[Photograph]]":
    """Opens a bundle and the validation photographs of TXL-PBC."""
    from rbc_edge.vision.analyzer import Analyzer  # noqa: PLC0415  --help must not load ONNX Runtime
    from rbc_edge.vision.bundle import Bundle  # noqa: PLC0415

    return Analyzer(Bundle.open(bundle), threads=threads), read_public(data)[0].of("val")


def answer(program: typer.Typer) -> None:
    """Runs a command line; an error of ours becomes a message, advice and an exit code."""
    try:
        program()
    except RbcEdgeError as error:
        typer.echo(f"error: {error.message}", err=True)
        if error.advice:
            typer.echo(f"       {error.advice}", err=True)
        sys.exit(error.exit_code)


def main() -> None:
    """Runs the workshop's command line."""
    answer(app)

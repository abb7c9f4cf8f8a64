"""The workshop's command line: dataset, detector, classifier, evaluate. Parsing only."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rbc_edge.errors import ExitCode, RbcEdgeError
from rbc_train import datasets

if TYPE_CHECKING:
    from rbc_edge.analyzer import Analyzer

app = typer.Typer(
    help="Builds datasets, trains the two models and scores a bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path, typer.Option(help="Folder with splits.csv, txl_pbc/ and bccd/.", envvar="RBC_DATA")]
BundleOption = Annotated[Path | None, typer.Option(help="Bundle to run.  [default: the shipped one]")]
Every = Annotated[int, typer.Option(min=1, help="Every how many-th validation photograph.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the networks; 0: as the processor has.")]
_DATA = Path("../shared/data")


class Model(StrEnum):
    """Classifier networks."""

    base = "base"
    improved = "improved"
    station = "station"


class Labels(StrEnum):
    """What a classifier learns from."""

    weak = "weak"
    verified = "verified"


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
    txl, bccd = datasets.read_public(data)
    for finding in [*txl.findings, *bccd.findings]:
        typer.echo(str(finding), err=True)
    steps = datasets.write_dataset(txl, out, cell_diameter_px=cell_diameter, crop_margin=crop_margin)
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
    weights: Annotated[Path | None, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")] = Path(
        "../shared/weights/yolov5n-coco.safetensors"
    ),
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
def classifier(
    model: Annotated[
        Model, typer.Option(help="base and improved are the paper's; station ships.")
    ] = Model.station,
    labels: Annotated[
        Labels, typer.Option(help="What teaches. The verified labels always judge.")
    ] = Labels.verified,
    dataset: Annotated[Path, typer.Option(help="What the dataset command wrote.")] = Path("data/dataset"),
    data: Data = _DATA,
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

    folder = out or Path(f"runs/classifier-{model.value}")
    options = room.ClassifierOptions(
        dataset, data, folder, model.value, labels.value, epochs, crop_margin, paste, seed, threads
    )

    def show(done: int, total: int, line: str) -> None:
        bar = "#" * round(30 * done / total)
        typer.echo(f"[{bar:30}] {done}/{total}  {line}", err=True)

    typer.echo(room.train(options, show))


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
    out: Annotated[Path | None, typer.Option(help="Also write all figures as JSON to this file.")] = None,
    threads: Threads = 0,
) -> None:
    """Scores a bundle, run through rbc_edge, on the validation photographs of TXL-PBC, by source."""
    from rbc_train import evaluation, labels, results  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    with typer.progressbar(length=len(validation), label="photographs", file=sys.stderr) as bar:
        examined = evaluation.examine(
            analyzer,
            validation,
            labels.read_verified(),
            scale=scale.value,
            progress=lambda _done, _total: bar.update(1),
        )
    opened = analyzer.bundle
    figures = evaluation.score(examined, opened.manifest.overlap_threshold)
    typer.echo(f"bundle {opened.bundle_id}, scale {scale.value}, validation photographs of TXL-PBC")
    typer.echo(evaluation.table(figures))
    if out:
        content = {"bundle_id": opened.bundle_id, "scale": scale.value, "figures": results.plain(figures)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@app.command()
def scale(
    bundle: BundleOption = None,
    data: Data = _DATA,
    every: Every = 3,
    threads: Threads = 0,
) -> None:
    """Enlarges and shrinks validation photographs and lets the station find the scale of each alone."""
    from rbc_train import trials  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    photographs = validation[::every]
    typer.echo("factor  fields   rbc  change  estimated / labelled (5 %, median, 95 %)  off by a third")
    reference = 0
    for trial in trials.try_scales(analyzer, photographs, (1.0, 0.3, 0.5, 0.75, 1.5, 2.0, 2.5)):
        reference = reference or trial.n_rbc
        change = trial.n_rbc / max(reference, 1) - 1
        typer.echo(
            f"{trial.factor:6.2f} {trial.n_fields:7} {trial.n_rbc:5} {change:+7.1%}"
            f"  {trial.ratio_low:17.2f} {trial.ratio_median:7.2f} {trial.ratio_high:6.2f} {trial.n_off:17}"
        )


@app.command()
def disturb(
    bundle: BundleOption = None,
    data: Data = _DATA,
    every: Every = 3,
    threads: Threads = 0,
) -> None:
    """Counts validation photographs under other light, colour, focus and compression."""
    from rbc_train import trials  # noqa: PLC0415

    analyzer, validation = _at_work(bundle, data, threads)
    photographs = validation[::every]
    typer.echo(f"{len(photographs)} photographs     rbc  change  overlapping  change  wbc")
    plain: trials.DisturbanceTrial | None = None
    for trial in trials.try_disturbances(analyzer, photographs):
        plain = plain or trial
        rbc = trial.n_rbc / max(plain.n_rbc, 1) - 1
        overlapping = trial.n_overlapping / max(plain.n_overlapping, 1) - 1
        typer.echo(
            f"{trial.name:20} {trial.n_rbc:4} {rbc:+7.1%} {trial.n_overlapping:12} {overlapping:+7.1%}"
            f" {trial.n_wbc:4}"
        )


class Comparator(StrEnum):
    """Comparators that must be trained first."""

    bccd640 = "bccd640"
    two_class = "two-class"


@app.command()
def compare(
    train: Annotated[
        Comparator | None, typer.Option(help="Train this comparator into --out, and score nothing.")
    ] = None,
    data: Data = _DATA,
    bundle: BundleOption = None,
    dataset: Annotated[Path, typer.Option(help="What the dataset command wrote (two-class).")] = Path(
        "data/dataset"
    ),
    weights: Annotated[Path, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")] = Path(
        "../shared/weights/yolov5n-coco.safetensors"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (runs/compare-NAME) or of the results.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="bccd640: 100, two-class: 50.")] = None,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    image_px: Annotated[int | None, typer.Option(min=64, help="The comparator's own when not given.")] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, or 0 for the first CUDA device.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="For training.")] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
) -> None:
    """Scores what else counts red cells: Hough circles, blobs, watershed, components, other YOLOv5n."""
    from rbc_train import comparators  # noqa: PLC0415

    if train is not None:
        plain = train is Comparator.bccd640
        folder = out or Path(f"runs/compare-{train.value}")
        options = comparators.TrainingOptions(
            data, dataset, bundle, weights, folder, epochs or (100 if plain else 50),
            batch, image_px, seed, device, threads, workers,
        )  # fmt: skip
        typer.echo((comparators.train_bccd640 if plain else comparators.train_two_class)(options))
        return


def _at_work(bundle: Path | None, data: Path, threads: int) -> "tuple[Analyzer, list[datasets.Photograph]]":
    """Opens a bundle and the validation photographs of TXL-PBC."""
    from rbc_edge.analyzer import Analyzer  # noqa: PLC0415  --help must not load ONNX Runtime
    from rbc_edge.bundle import Bundle  # noqa: PLC0415

    return Analyzer(Bundle.open(bundle), threads=threads), datasets.read_public(data)[0].of("val")


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

"""Leaves each laboratory out of the training once, and judges on it: ``python -m studies.laboratories``.

With ``--train`` it makes the bundles, hours in all: dataset, detector, second stage, export. After an
interruption the same command continues. Without ``--train`` it judges those that are there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import MANIFEST, Bundle
from rbc_train import console, laboratories, results
from rbc_train.data import CHULA, Collection, read_chula, read_public, verified_labels, write_dataset
from rbc_train.evaluate import examine
from rbc_train.results import Section

NOTHING: Final = "nothing"
"""Stands for a laboratory where none is left out."""

app = console.program()


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the bundles are trained, all alike.

    Attributes:
        data: Folder of the public data.
        weights: COCO-pretrained YOLOv5n. None starts from noise.
        runs: Folder of the runs. Each has ``without-LABORATORY`` in it.
        epochs: Of the detector. Fewer than what ships, because there are five.
        classifier_epochs: Of the second stage. None takes its own.
        image_px: Side of the detector's training images. None: as many cells as usual.
        cell_diameter_px: Size of a red cell at model scale.
        device: Of the detector: ``cpu``, ``0`` for the first CUDA device.
        threads: Of torch on the CPU.
        workers: Processes that prepare images.
    """

    data: Path
    weights: Path | None
    runs: Path
    epochs: int = 25
    classifier_epochs: int | None = None
    image_px: int | None = None
    cell_diameter_px: float = 40.0
    device: str = "cpu"
    threads: int = 2
    workers: int = 0


@app.command("laboratories")
def laboratories_command(
    train: Annotated[bool, typer.Option(help="Train the bundles, and judge nothing. Continues.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Leave out this laboratory only. {NOTHING}: train with all. May be repeated."),
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAB=PATH", help="Judge this bundle for a left-out laboratory. May be repeated."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    data: console.Data = console.DATA,
    weights: console.WeightsOption = console.WEIGHTS,
    epochs: Annotated[int, typer.Option(min=1, help="Of each detector.")] = 25,
    cell_diameter: Annotated[
        float, typer.Option(min=8, help="Size of a red cell at model scale, px.")
    ] = 40.0,
    device: Annotated[str, typer.Option(help="cpu, or 0 for the first CUDA device.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
    out: console.Out = results.FOLDER,
) -> None:
    """Judges bundles on a laboratory that they did not learn from, beside one that learned from all."""
    everything = read_everything(data)
    names = [*sorted({p.laboratory for p in everything.complete("val")}), NOTHING]
    given = _given(bundle or [])
    if unknown := sorted({*(only or []), *given} - set(names)):
        raise UsageError(f"{unknown[0]}: no such laboratory", f"there are {', '.join(names)}")
    if train:
        options = TrainingOptions(
            data,
            weights,
            runs,
            epochs=epochs,
            cell_diameter_px=cell_diameter,
            device=device,
            threads=threads,
            workers=workers,
        )
        for name in only or names:
            typer.echo(train_without(name, everything, options, lambda line: typer.echo(line, err=True)))
        return
    opened = {}
    for name in only or names:
        folder = given.get(name, folder_of(runs, name) / "bundle")
        if name in given or folder.is_dir():
            opened[name] = Bundle.open(folder)
        else:
            typer.echo(f"{folder}: not trained yet, left out", err=True)
    if not set(opened) - {NOTHING}:
        raise UnavailableError(f"{runs}: no bundle without a laboratory", "train them: --train")
    # Without the paths of this machine.
    said = (f" --bundle {k}={v.name if v.is_absolute() else v}" for k, v in given.items())
    made = section(list(judge(opened, everything, threads)), "python -m studies.laboratories" + "".join(said))
    console.publish(made, out, lambda published: laboratories.text(published.tables))


def _given(pairs: list[str]) -> dict[str, Path]:
    """Reads the values of --bundle."""
    given = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--bundle {pair}: not LAB=PATH")
        given[name] = Path(path)
    return given


def read_everything(data: Path) -> Collection:
    """Reads TXL-PBC, and Chula where the data have it."""
    txl, _ = read_public(data)
    fields = read_chula(data / CHULA) if (data / CHULA).is_dir() else Collection()
    return Collection(txl.photographs + fields.photographs, txl.findings + fields.findings)


def without(laboratory: str, everything: Collection) -> Collection:
    """Returns a collection without the photographs of a laboratory, in any split."""
    kept = [p for p in everything.photographs if p.laboratory != laboratory]
    return Collection(kept, everything.findings)


def folder_of(runs: Path, laboratory: str) -> Path:
    """Returns the folder of the run that leaves a laboratory out."""
    return runs / f"without-{laboratory}"


def train_without(
    laboratory: str, everything: Collection, options: TrainingOptions, say: Callable[[str], None]
) -> Path:
    """Trains and exports a bundle without a laboratory, or continues an earlier run.

    Args:
        laboratory: The one that is left out of every step, or `NOTHING`.
        everything: What `read_everything` returned.
        options: How.
        say: Called with a line for each step.

    Returns:
        The folder of the bundle. At once if it is finished.

    Raises:
        UnavailableError: If weights or data are not there.
        UsageError: If the folder holds a run with other options.
        BundleError: If the 8-bit networks lose far more than usual.
    """
    # torch takes seconds to load, which judging must not pay.
    from rbc_export import exporting  # noqa: PLC0415
    from rbc_train import train_classifier, train_detector  # noqa: PLC0415

    folder = folder_of(options.runs, laboratory)
    dataset, finished = folder / "dataset", folder / "bundle"
    if (finished / MANIFEST).is_file():
        return finished
    if not (dataset / "manifest.json").is_file():
        say(f"without {laboratory}: dataset")
        steps = write_dataset(
            without(laboratory, everything),
            dataset,
            cell_diameter_px=options.cell_diameter_px,
            crop_margin=0.25,
            negatives=True,
        )
        for _ in steps:
            pass
    say(f"without {laboratory}: detector, {options.epochs} epochs")
    detector = train_detector.train(
        train_detector.DetectorOptions(
            dataset,
            options.weights,
            folder / "detector",
            epochs=options.epochs,
            image_px=options.image_px or _training_px(options.cell_diameter_px),
            device=options.device,
            threads=options.threads,
            workers=options.workers,
        )
    )
    say(f"without {laboratory}: second stage")
    classifier = train_classifier.train(
        train_classifier.ClassifierOptions(
            dataset,
            options.data,
            folder / "classifier",
            labels="verified",
            detector=detector,
            epochs=options.classifier_epochs,
            threads=options.threads,
        ),
        console.show_progress,
    )
    say(f"without {laboratory}: export")
    exporting.export(
        exporting.ExportOptions(
            detector, classifier, dataset, options.data, finished,
            # A short training leaves many scores near the threshold. The int8 bundle itself is judged.
            tolerance=exporting.Tolerance(ap50=0.03, ap50_95=0.03, count=0.05, flips=0.05),
        ),
        say,
    )  # fmt: skip
    return finished


def _training_px(cell_diameter_px: float) -> int:
    """Side of a training image that holds six cells beside each other, as the stride of 32 allows."""
    return 32 * round(6.4 * cell_diameter_px / 32)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one bundle does on laboratories.

    Attributes:
        left_out: The laboratory that it did not learn from, or `NOTHING`.
        bundle_id: Of the bundle.
        learned: The laboratories that it learned from.
        epochs: Of its detector's training. None where the manifest does not say it.
        figures: `laboratories.figures` by laboratory. Of a bundle that left one out, of that one alone.
    """

    left_out: str
    bundle_id: str
    learned: frozenset[str]
    epochs: int | None
    figures: Mapping[str, Mapping[str, Any]]


def judge(opened: Mapping[str, Bundle], everything: Collection, threads: int = 0) -> Iterator[Outcome]:
    """Runs each bundle on the complete validation photographs of the laboratory that it left out.

    Args:
        opened: Bundles by the laboratory left out. That of `NOTHING` is run on those of all others.
        everything: What `read_everything` returned.
        threads: Of the networks.

    Yields:
        One outcome for each bundle.

    Raises:
        UsageError: If a bundle learned from the laboratory, or does not say what it learned from.
    """
    verified = verified_labels(everything.photographs)
    for name, own in opened.items():
        manifest = own.manifest
        learned = laboratories.learned_from(manifest.training)
        if learned is None or name in learned:
            what = "does not say what it learned from" if learned is None else f"learned from {name}"
            raise UsageError(f"{own.path}: the bundle {what}", "give one that never saw the laboratory")
        analyzer = Analyzer(own, threads=threads)
        figures = {}
        for laboratory in sorted(set(opened) - {NOTHING}) if name == NOTHING else [name]:
            shown = [p for p in everything.complete("val") if p.laboratory == laboratory]
            seen = examine(analyzer, shown, verified, scale="estimated")
            figures[laboratory] = laboratories.figures(seen, manifest.overlap_threshold)[laboratory]
        epochs = manifest.training.get("detector", {}).get("epochs")
        yield Outcome(name, own.bundle_id, learned, epochs, figures)


def section(outcomes: Sequence[Outcome], command: str = "python -m studies.laboratories") -> Section:
    """Makes the section ``left-out``: two rows a laboratory, left out and learned.

    Args:
        outcomes: Of `judge`.
        command: How to get the same again.

    Returns:
        The section.
    """
    learned = next((o for o in outcomes if o.left_out == NOTHING), None)
    rows: dict[str, Mapping[str, Any]] = {}
    data: dict[str, dict[str, Any]] = {}
    for o in outcomes:
        if o is learned:
            continue
        rows[f"{o.left_out}, left out"] = own = o.figures[o.left_out]
        data[o.left_out] = {"left_out": own}
        if learned is not None and o.left_out in learned.learned:
            rows[f"{o.left_out}, learned"] = data[o.left_out]["learned"] = learned.figures[o.left_out]
    return Section(
        name="left-out",
        command=command,
        tables=laboratories.tables(
            rows,
            {},
            [name for name in rows if name.endswith(", learned")],
            by="of a laboratory, left out of the training or in it",
        ),
        data={
            "bundles": {
                o.left_out: {"bundle_id": o.bundle_id, "learned": sorted(o.learned), "epochs": o.epochs}
                for o in outcomes
            },
            "laboratories": data,
        },
    )


if __name__ == "__main__":
    console.answer(app)

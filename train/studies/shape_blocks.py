"""Do shapes hold on slides that the training did not see? ``python -m studies.shape_blocks``.

Neighbouring numbers of Chula's fields are often of one slide. A split by chance puts fields of one slide on
both sides. So the second stage is trained twice: without a fifth of the fields that is drawn, and without a
block of neighbours. Each time it names the cells of the fields that it did not see. No validation field is
used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer

from rbc_edge.vision import morphology
from rbc_train import console, networks, results, shapes, train_classifier
from rbc_train.data import CHULA, photographs_of
from rbc_train.results import Section, Table

app = console.program()
_FOLDS: Final = 5
_SHOWN: Final = ("normal", "spherocyte", "target", "elliptocyte", "schistocyte")


@app.command()
def shape_blocks(
    dataset: console.DatasetOption = console.DATASET,
    data: console.Data = console.DATA,
    detector: console.DetectorOption = console.DETECTOR,
    runs: Annotated[Path, typer.Option(help="Folder of the runs. They continue.")] = Path(
        "runs/shape-blocks"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Fewer than what ships.")] = 6,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: console.Out = results.FOLDER,
) -> None:
    """Names shapes on fields that were drawn for it, and on a block of neighbouring fields."""
    found = {}
    for name, blocks in (("drawn fields", False), ("a block of fields", True)):
        options = train_classifier.ClassifierOptions(
            dataset,
            data,
            runs / ("block" if blocks else "drawn"),
            detector=detector,
            folds=_FOLDS,
            fold=2,
            blocks=blocks,
            epochs=epochs,
            threads=threads,
        )
        checkpoint = train_classifier.train(options, console.show_progress)
        found[name] = shapes.figures(look(checkpoint, dataset, data, blocks=blocks), 0.0)
    console.publish(section(found, epochs), out)


def look(checkpoint: Path, dataset: Path, data: Path, *, blocks: bool, fold: int = 2) -> shapes.Seen:
    """Names the cells with a shape, in the fields that a run did not see, on the boxes of the dataset."""
    network, config = networks.load_classifier(checkpoint)
    dealt = train_classifier.deal(train_classifier.read_rows(dataset, "train"), _FOLDS, blocks=blocks)
    photographs = {p.name: p for p in photographs_of(dataset, data).values() if p.source == CHULA}
    # Every crop has a weak label: this is all of them.
    samples = train_classifier.read_samples(
        dataset, photographs_of(dataset, data), "train", "weak",
        use=lambda name: name in photographs and dealt.get(name) == fold,
    )  # fmt: skip
    asked = np.flatnonzero(samples.shape >= 0)
    crops = samples.crops(config["crop_margin"], asked.tolist())
    with torch.no_grad():
        parts = [
            network(
                networks.to_input(crops[i : i + 256]), torch.from_numpy(samples.sides[asked][i : i + 256])
            )
            for i in range(0, len(crops), 256)
        ]
    probability = torch.cat(parts)[:, 2:].softmax(1).numpy().astype(np.float32)
    everyone = np.ones(len(asked), np.bool_)
    unmeasured = np.full((len(asked), morphology.N_SIGNS), np.nan, np.float32)
    return shapes.Seen(
        samples.shape[asked], probability, unmeasured, everyone, samples.view[asked], len(asked)
    )


def section(found: Mapping[str, Mapping[str, Any]], epochs: int) -> Section:
    """Makes the section ``shape-blocks`` of `shapes.figures` for each way to leave fields out."""
    rows = []
    for name, f in found.items():
        low, high = f["accuracy_interval"]
        accuracy = f"{f['accuracy']:.3f} ({low:.3f} to {high:.3f})"
        each = (f"{f['by_shape'][s]['f1']:.2f}" if s in f["by_shape"] else "" for s in _SHOWN)
        rows.append((name, str(f["fields"]), str(f["judged"]), accuracy, f"{f['macro_f1']:.3f}", *each))
    table = Table(
        "Shapes on fields that the training did not see, on the boxes of the dataset. F1 by shape.",
        ("left out", "fields", "cells", "accuracy", "macro F1", *_SHOWN),
        tuple(rows),
    )
    command = f"python -m studies.shape_blocks --epochs {epochs}"
    return Section("shape-blocks", command, (table,), data={"epochs": epochs, **found})


if __name__ == "__main__":
    console.answer(app)

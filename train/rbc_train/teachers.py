"""Teachers: networks that judge every training crop, so that the one that ships can learn from all of them.

One red-cell box in six has a verified label. Teachers (the whole backbone of YOLOv5n, begun from our
detector) learn from these. Then every crop gets the mean of their probabilities over the eight ways to turn
and mirror it (knowledge distillation: Hinton, Vinyals, Dean 2015). The photographs are divided into folds. A
crop with a verified label is judged only by the teacher that did not learn from its photograph. So a wrong
label is not simply repeated.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rbc_edge.errors import UsageError
from rbc_edge.values import Float32
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import Classifier
from rbc_train import metrics, networks, train_classifier
from rbc_train.data import photographs_of


@dataclass(frozen=True, slots=True)
class TeachingOptions:
    """How to teach.

    Attributes:
        dataset: Folder that `write_dataset` wrote.
        data: Folder of the public data.
        detector: Detector checkpoint that the teachers begin from. None begins from noise.
        out: Folder of the teachers and of what they say.
        folds: How many teachers.
        epochs: Passes of each over its inspected crops. None takes the teacher's own.
        threads: Of torch.
    """

    dataset: Path
    data: Path
    detector: Path | None
    out: Path
    folds: int = 4
    epochs: int | None = None
    threads: int = 2


def teach(options: TeachingOptions, progress: Callable[[int, int, str], None] | None = None) -> Path:
    """Trains the teachers, or goes on where an earlier run was cut, and lets them judge every crop.

    Args:
        options: What to do.
        progress: Called with (epochs done, epochs in all, a line of figures), for each teacher.

    Returns:
        The file ``taught.csv``: a line a training crop, in the dataset's order.

    Raises:
        UnavailableError: If the dataset, a photograph or the detector is not there.
        UsageError: If there are fewer than two folds, or the folder holds a run with other options.
    """
    if options.folds < 2:
        raise UsageError("a verified crop needs a teacher that has not seen it", "give two folds or more")
    rows = train_classifier.read_rows(options.dataset, "train")
    photographs = photographs_of(options.dataset, options.data)
    # Every crop has a weak label: this is all of them.
    every = train_classifier.read_samples(options.dataset, photographs, "train", "weak")
    spread, verified = train_classifier.taught_rows(rows)
    asked = sorted({*spread, *verified})
    said = np.full((options.folds, len(rows), 2), np.nan, np.float32)
    for fold in range(options.folds):
        one = train_classifier.ClassifierOptions(
            options.dataset,
            options.data,
            options.out / f"teacher-{fold}",
            model="teacher",
            detector=options.detector,
            folds=options.folds,
            fold=fold,
            epochs=options.epochs,
            seed=fold,
            threads=options.threads,
        )
        network, config = networks.load_classifier(train_classifier.train(one, progress))
        crops = every.crops(config["crop_margin"], asked)
        said[fold, asked] = networks.predict_both(network, crops, turned=True)
    dealt = train_classifier.deal(rows, options.folds)
    own = np.array([dealt[row["name"]] for row in rows])
    inspected = np.array([bool(row["verified"]) for row in rows])
    probability = np.where(inspected[:, None], said[own, np.arange(len(rows))], said.mean(axis=0))
    _write(options.out / train_classifier.TAUGHT, rows, probability.astype(np.float32))
    return options.out / train_classifier.TAUGHT


def ask(bundle: Bundle, dataset: Path, data: Path, out: Path, threads: int = 2) -> Path:
    """Lets a finished bundle judge the training crops, in place of teachers.

    A new second stage, with another head or on more labels, then keeps what the old one knew. It takes a
    minute. The bundle has seen these photographs, so a wrong label is more often repeated than by teachers.

    Args:
        bundle: The bundle.
        dataset: Folder that `write_dataset` wrote.
        data: Folder of the public data.
        out: Folder to write.
        threads: Of the network.

    Returns:
        The file ``taught.csv``: a line a training crop, in the dataset's order.

    Raises:
        UnavailableError: If the dataset or a photograph is not there.
    """
    rows = train_classifier.read_rows(dataset, "train")
    photographs = photographs_of(dataset, data)
    every = train_classifier.read_samples(dataset, photographs, "train", "weak")
    spread, verified = train_classifier.taught_rows(rows)
    asked = sorted({*spread, *verified})
    classifier = Classifier(bundle, threads=threads)
    crops = every.crops(classifier.margin, asked)
    turns = [
        np.ascontiguousarray(np.rot90(c, k, (1, 2))) for k in range(4) for c in (crops, crops[:, :, ::-1])
    ]
    said = np.mean([np.stack(classifier.scores(turned)[:2], axis=1) for turned in turns], axis=0)
    probability = np.full((len(rows), 2), np.nan, np.float32)
    probability[asked] = said
    _write(out / train_classifier.TAUGHT, rows, probability)
    return out / train_classifier.TAUGHT


def agreement(rows: list[dict[str, str]], probability: Float32) -> metrics.Verdicts:
    """How well teachers know the inspected crops of photographs that they have not seen.

    Args:
        rows: Of the dataset.
        probability: float32 (N, 2), what was taught of each.

    Returns:
        Teachers against verified training labels.
    """
    inspected = np.array([bool(row["verified"]) for row in rows])
    overlapping = np.array([row["verified"] == "overlapping" for row in rows])
    return metrics.verdicts(probability[inspected, 0], overlapping[inspected], 0.5)


def _write(file: Path, rows: list[dict[str, str]], probability: Float32) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("name", "x0", "y0", "overlap_score", "refuse_score"))
        for row, both in zip(rows, probability.tolist(), strict=True):
            writer.writerow((row["name"], row["x0"], row["y0"], *(f"{p:.5f}" for p in both)))
    temporary.replace(file)

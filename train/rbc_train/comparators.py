"""What else counts red cells, by the same scoring: textbook image processing, and YOLOv5n without our CNN."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ultralytics.models.yolo.detect import DetectionTrainer

from rbc_edge.bundle import Bundle
from rbc_edge.classifier import Classifier
from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import CellClass
from rbc_train import datasets, runs
from rbc_train import detector as ours
from rbc_train.datasets import CLASS_NAMES, Photograph

# --- YOLOv5n as the literature trains it, and YOLOv5n that judges overlap itself ---------------------------

TWO_CLASS_NAMES: Final = ("rbc_single", "rbc_overlapping", "wbc", "platelet")
"""Classes of the detector that calls single and overlapping itself."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to train a comparator.

    Attributes:
        data: Folder of the public data (bccd640).
        dataset: Folder that `datasets.write_dataset` wrote (two-class).
        bundle: Whose classifier labels the boxes that nobody looked at (two-class); None: the shipped one.
        weights: COCO-pretrained YOLOv5n, safetensors; None starts from noise.
        out: Folder of this run.
        epochs: Passes over the training photographs.
        batch: Photographs a step.
        image_px: Side of a training image; None takes the comparator's own (640; our detector's).
        seed: Of everything random.
        device: ``cpu``, ``0`` for the first CUDA device.
        threads: Of torch on the CPU.
        workers: Processes that prepare images.
    """

    data: Path
    dataset: Path
    bundle: Path | None
    weights: Path | None
    out: Path
    epochs: int
    batch: int = 16
    image_px: int | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    workers: int = 0


class _PlainTrainer(ours.DetectorTrainer):
    """ultralytics' own dataset, resizing and augmentation; ours are only the COCO weights."""

    build_dataset = DetectionTrainer.build_dataset


def train_bccd640(options: TrainingOptions) -> Path:
    """Trains YOLOv5n on BCCD's own boxes at 640 px, all settings ultralytics' own; resumes a cut run.

    So Alam & Islam (2019) and most after them count with BCCD: its train split (less the photographs that
    our validation and test show again), its annotations, best checkpoint by its val split.

    Args:
        options: The run.

    Returns:
        The best checkpoint by ultralytics' fitness.

    Raises:
        UnavailableError: If the data or the weights are not there.
        UsageError: If the folder holds a run with other options, or the weights do not fit.
    """
    own = {k: v for k, v in asdict(options).items() if k not in ("dataset", "bundle")}
    runs.claim(options.out, {"comparator": "bccd640", **own})
    done = options.out / "detector.pt"
    if done.is_file():
        return done
    data = write_bccd(datasets.read_public(options.data)[1].photographs, options.out / "dataset")
    kept = options.out / "resume.pt"
    overrides: dict[str, Any] = {
        "model": "yolov5n.yaml",
        "data": str(data.resolve()),
        "epochs": options.epochs,
        "batch": options.batch,
        "imgsz": options.image_px or 640,
        "seed": options.seed,
        "device": options.device,
        "workers": options.workers,
        "project": str(options.out.resolve()),
        "name": "ultralytics",
        "exist_ok": True,
        "pretrained": False,  # the COCO weights come by `load_coco`
        "amp": False,  # its self-test downloads a model
        "plots": False,
    }
    if kept.is_file():
        overrides = {"resume": str(kept), "device": options.device, "workers": options.workers}
    trainer = _PlainTrainer(overrides=overrides)
    torch.set_num_threads(options.threads)  # after the trainer, which sets its own number
    trainer.coco_weights = options.weights
    trainer.add_callback("on_model_save", partial(_keep, keep=kept))
    trainer.train()
    shutil.copyfile(trainer.best, options.out / "detector.tmp")
    (options.out / "detector.tmp").replace(done)
    return done


def _keep(trainer: DetectionTrainer, *, keep: Path) -> None:
    temporary = keep.with_suffix(".tmp")
    shutil.copyfile(trainer.last, temporary)
    temporary.replace(keep)


def write_bccd(photographs: Sequence[Photograph], out: Path) -> Path:
    """Writes BCCD as it came, with its own boxes, in the layout that ultralytics reads.

    Args:
        photographs: BCCD's, without leaks; those of the test split are not looked at.
        out: Folder to write.

    Returns:
        ``data.yaml``, classes in the order of `CellClass`.
    """
    for photograph in photographs:
        if photograph.split == "test":
            continue
        image = out / "images" / photograph.split / photograph.image_path.name
        label = out / "labels" / photograph.split / f"{photograph.name}.txt"
        for file in (image, label):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photograph.image_path, image)
        label.write_text(datasets.yolo_text(photograph), encoding="utf-8")
    return datasets.write_data_yaml(out, CLASS_NAMES)


def train_two_class(options: TrainingOptions) -> Path:
    """Trains YOLOv5n with two classes of red cells: photographs, scale and trainer are our detector's.

    Args:
        options: The run.

    Returns:
        The best checkpoint by ultralytics' fitness.

    Raises:
        UnavailableError: If the dataset or the weights are not there.
        BundleError: If the bundle is not intact.
        UsageError: If the folder holds a run with other options, the weights do not fit, or the dataset's
            crops have another margin than the bundle's classifier needs.
    """
    made = write_two_class(options.dataset, Bundle.open(options.bundle), options.out / "dataset")
    return ours.train(
        ours.DetectorOptions(
            dataset=made,
            weights=options.weights,
            out=options.out,
            epochs=options.epochs,
            batch=options.batch,
            image_px=options.image_px or ours.DetectorOptions.image_px,
            seed=options.seed,
            device=options.device,
            threads=options.threads,
            workers=options.workers,
        )
    )


def write_two_class(dataset: Path, bundle: Bundle, out: Path) -> Path:
    """Writes our detector's dataset again with red cells called single or overlapping.

    A box gets its verified label; where nobody looked (most of train), the verdict of the bundle's
    classifier on the dataset's crop. So the comparator learns from what our CNN learnt from, spread over
    all boxes.

    Args:
        dataset: Folder that `datasets.write_dataset` wrote.
        bundle: Whose classifier judges.
        out: Folder to write.

    Returns:
        `out`, laid out as `dataset`: photographs and labels in ``detector/``, and ``manifest.json``.

    Raises:
        UnavailableError: If `dataset` is not a finished dataset.
        UsageError: If its crops have another margin than the classifier needs, or `out` holds other labels.
    """
    source = dataset / "manifest.json"
    if not source.is_file():
        raise UnavailableError(f"{dataset}: not a finished dataset", "make it: python -m rbc_train dataset")
    margin = json.loads(source.read_text(encoding="utf-8"))["crop_margin"]
    if margin != bundle.manifest.crop_margin:
        raise UsageError(
            f"{dataset}: crops have a margin of {margin}, the classifier of {bundle.path} needs "
            f"{bundle.manifest.crop_margin}",
            f"make it: python -m rbc_train dataset --crop-margin {bundle.manifest.crop_margin}",
        )
    manifest = {"dataset_manifest": datasets.sha256(source), "labelled_by": bundle.bundle_id}
    runs.claim(out, manifest)
    finished = out / "manifest.json"
    if finished.is_file():
        return out
    classifier = Classifier(bundle, threads=1)
    counts: dict[str, dict[str, int]] = {}
    for split in ("train", "val"):
        overlapping, n_verified = _overlap_labels(dataset, split, classifier)
        n_overlapping = sum(map(sum, overlapping.values()))
        n_red = sum(map(len, overlapping.values()))
        counts[split] = {
            "rbc_single": n_red - n_overlapping,
            "rbc_overlapping": n_overlapping,
            "verified": n_verified,
        }
        _write_two_class_split(dataset, split, overlapping, out)
    datasets.write_data_yaml(out / "detector", TWO_CLASS_NAMES)
    # Written last: a folder with a manifest is a finished dataset.
    finished.write_text(json.dumps({**manifest, "counts": counts}, indent=1) + "\n", encoding="utf-8")
    return out


def _overlap_labels(
    dataset: Path, split: datasets.Split, classifier: Classifier
) -> tuple[dict[str, list[bool]], int]:
    """Returns of each photograph whether its red cells overlap, in order, and how many were looked at."""
    crops = np.load(dataset / "crops" / f"{split}.npy", mmap_mode="r")
    verdicts = classifier.overlap_score(crops) >= classifier.threshold
    overlapping: dict[str, list[bool]] = {}
    n_verified = 0
    with (dataset / "crops" / f"{split}.csv").open(newline="", encoding="utf-8") as stream:
        for row, verdict in zip(csv.DictReader(stream), verdicts.tolist(), strict=True):
            label = row["verified"]
            n_verified += bool(label)
            overlapping.setdefault(row["name"], []).append(label == "overlapping" if label else verdict)
    return overlapping, n_verified


def _write_two_class_split(
    dataset: Path, split: datasets.Split, overlapping: dict[str, list[bool]], out: Path
) -> None:
    for part in ("images", "labels"):
        (out / "detector" / part / split).mkdir(parents=True, exist_ok=True)
    for file in sorted((dataset / "detector" / "labels" / split).glob("*.txt")):
        image = f"images/{split}/{file.stem}.png"
        shutil.copyfile(dataset / "detector" / image, out / "detector" / image)
        # The crops of a photograph stand in the order of its red cells.
        own = iter(overlapping.get(file.stem, []))
        lines: list[str] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            number, _, box = line.partition(" ")
            class_id = int(next(own)) if int(number) == CellClass.RBC else int(number) + 1
            lines.append(f"{class_id} {box}\n")
        (out / "detector" / "labels" / split / file.name).write_text("".join(lines), encoding="utf-8")

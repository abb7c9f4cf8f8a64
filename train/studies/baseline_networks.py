"""YOLOv5n without our CNN: as the literature trains it, and with single and overlapping as two classes.

Reads top to bottom: training of the two, then how each turns a photograph into `Proposals`.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import CellClass, Detections, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import Classifier
from rbc_edge.vision.detector import suppress, vote
from rbc_train import labels, runs, train_detector
from rbc_train.data import CLASS_NAMES, Photograph, Split, read_public, sha256, write_data_yaml, yolo_text
from studies.baseline_methods import Proposals

TWO_CLASS_NAMES: Final = ("rbc_single", "rbc_overlapping", "wbc", "platelet")
"""Classes of the detector that calls single and overlapping itself."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to train a baseline.

    Attributes:
        data: Folder of the public data (bccd640).
        dataset: Folder that `write_dataset` wrote (two-class).
        bundle: Its classifier labels the boxes without a verified label (two-class). None: the shipped one.
        weights: COCO-pretrained YOLOv5n, safetensors. None starts from noise.
        out: Folder of this run.
        epochs: Passes over the training photographs. None takes the baseline's own (ultralytics' 100, our
            detector's).
        batch: Photographs a step.
        image_px: Side of a training image. None takes the baseline's own (640, our detector's).
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
    epochs: int | None = None
    batch: int = 16
    image_px: int | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    workers: int = 0


class _PlainTrainer(train_detector.DetectorTrainer):
    """ultralytics' own dataset, resizing and augmentation. Ours are only the COCO weights."""

    build_dataset = DetectionTrainer.build_dataset


def train_bccd640(options: TrainingOptions) -> Path:
    """Trains YOLOv5n on BCCD's own boxes at 640 px, all settings ultralytics' own. Resumes a cut run.

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
    runs.claim(options.out, {"baseline": "bccd640", **own})
    done = options.out / train_detector.CHECKPOINT
    if done.is_file():
        return done
    data = write_bccd(read_public(options.data)[1].photographs, options.out / "dataset")
    overrides: dict[str, Any] = {
        "model": "yolov5n.yaml",
        "data": str(data.resolve()),
        "epochs": options.epochs or 100,
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
    return train_detector.run(_PlainTrainer, overrides, options.out, options.weights, options.threads)


def write_bccd(photographs: Sequence[Photograph], out: Path) -> Path:
    """Writes BCCD as it came, with its own boxes, in the layout that ultralytics reads.

    Args:
        photographs: BCCD's, without leaks. Those of the test split are not looked at.
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
        label.write_text(yolo_text(photograph), encoding="utf-8")
    return write_data_yaml(out, CLASS_NAMES)


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
    usual = train_detector.DetectorOptions(made, options.weights, options.out)
    return train_detector.train(
        replace(
            usual,
            epochs=options.epochs or usual.epochs,
            image_px=options.image_px or usual.image_px,
            batch=options.batch,
            seed=options.seed,
            device=options.device,
            threads=options.threads,
            workers=options.workers,
        )
    )


def write_two_class(dataset: Path, bundle: Bundle, out: Path) -> Path:
    """Writes our detector's dataset again with red cells called single or overlapping.

    A box gets its verified label. Without one (most of train) it gets the verdict of the bundle's
    classifier on the dataset's crop. So the baseline learns from what our CNN learnt from, spread over
    all boxes.

    Args:
        dataset: Folder that `write_dataset` wrote.
        bundle: Its classifier judges.
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
    manifest = {"dataset_manifest": sha256(source), "labelled_by": bundle.bundle_id}
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
    write_data_yaml(out / "detector", TWO_CLASS_NAMES)
    # Written last: a folder with a manifest is a finished dataset.
    finished.write_text(json.dumps({**manifest, "counts": counts}, indent=1) + "\n", encoding="utf-8")
    return out


def _overlap_labels(dataset: Path, split: Split, classifier: Classifier) -> tuple[dict[str, list[bool]], int]:
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
    dataset: Path, split: Split, overlapping: dict[str, list[bool]], out: Path
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


_MIN_SCORE: Final = 0.01  # the precision curve needs its tail
USUAL_CONFIDENCE: Final = 0.25  # ultralytics' own of `predict`


class PlainYolo:
    """YOLOv5n on whole photographs at 640 px, through ultralytics' own `predict`. Overlap by Otsu's area.

    It needs no scale. Overlap is the paper's weak rule: the dark area of the tight crop.

    Args:
        checkpoint: What `train_bccd640` returned.

    Raises:
        UnavailableError: If it is not there.
        UsageError: If it tells other classes apart.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._yolo = _open_yolo(checkpoint, CLASS_NAMES)
        self.propose(np.zeros((64, 64, 3), np.uint8), 1.0)  # ultralytics sets up at the first image
        torch.set_num_threads(1)  # and chooses the threads itself

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        """Looks at one photograph (see `Method`)."""
        del diameter_px
        seen = self._yolo.predict(image[:, :, ::-1], imgsz=640, conf=_MIN_SCORE, device="cpu", verbose=False)
        boxes = seen[0].boxes
        red = boxes.cls.numpy() == CellClass.RBC
        xyxy = np.asarray(boxes.xyxy.numpy()[red], np.float32).reshape(-1, 4)
        area = labels.otsu_area(preprocess.crops(image, xyxy, margin=0.0)) / preprocess.CROP_PX**2
        score = np.asarray(boxes.conf.numpy()[red], np.float32)
        return Proposals(
            Detections(xyxy, score, np.zeros(len(xyxy), np.int64)),
            np.diag(area).astype(np.float32).reshape(len(xyxy), len(xyxy)),
        )


class TwoClassYolo:
    """YOLOv5n that calls single and overlapping itself, at our detector's scale.

    A box's score is the larger of its two red classes. Overlap is the overlapping one's share of the two.
    Suppression takes the two for one class. It and the vote on a box's place are our detector's.

    Args:
        checkpoint: What `train_two_class` returned.
        bundle: Its scale and iou thresholds are used.

    Raises:
        UnavailableError: If it is not there.
        UsageError: If it tells other classes apart.
    """

    def __init__(self, checkpoint: Path, bundle: Bundle) -> None:
        self._network = _open_yolo(checkpoint, TWO_CLASS_NAMES).model.float().fuse().eval()
        self._manifest = bundle.manifest

    @torch.inference_mode()
    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        """Looks at one photograph (see `Method`)."""
        view = preprocess.view(image, diameter_px)
        small = preprocess.detector_input(view, diameter_px, self._manifest.cell_diameter_px)
        window, left, top = preprocess.pad_to_stride(small)
        inputs = torch.from_numpy(window).permute(2, 0, 1)[None].float() / 255
        rows = self._network(inputs)[0][0].T.numpy()  # (M, 4 + 4): centre and size, then the classes
        single, overlapping = rows[:, 4], rows[:, 5]
        by_class = np.stack([np.maximum(single, overlapping), rows[:, 6], rows[:, 7]], axis=1)
        low = rows[:, :2] - rows[:, 2:4] / 2 - np.array([left, top], np.float32)
        size = np.array([small.shape[1], small.shape[0]] * 2, np.float32)
        box = np.clip(np.concatenate([low, low + rows[:, 2:4]], axis=1), 0, size)
        full = np.array([image.shape[1], image.shape[0]] * 2, np.float32)
        found = Detections(
            (box * (full / size)).astype(np.float32),
            by_class.max(axis=1).astype(np.float32),
            by_class.argmax(axis=1).astype(np.int64),
        )
        seen = (found.score >= _MIN_SCORE) & (box[:, 2:] - box[:, :2] > 1).all(axis=1)
        found, single, overlapping = found.take(seen), single[seen], overlapping[seen]
        kept = suppress(
            found, np.array(self._manifest.iou_threshold, np.float32), self._manifest.iou_threshold_across
        )
        kept = kept[found.class_id[kept] == CellClass.RBC]
        voters = found.score >= np.array(self._manifest.score_threshold, np.float32)[found.class_id]
        share = overlapping[kept] / np.maximum(single[kept] + overlapping[kept], 1e-9)
        return Proposals(
            replace(found.take(kept), xyxy=vote(found, kept, voters)),
            np.diag(share).astype(np.float32).reshape(len(kept), len(kept)),
        )


def _open_yolo(checkpoint: Path, names: Sequence[str]) -> Any:
    """Opens a checkpoint of ultralytics, which tells these classes apart."""
    if not checkpoint.is_file():
        raise UnavailableError(f"{checkpoint}: no such file", "train it: python -m studies.baselines --train")
    try:
        yolo = YOLO(str(checkpoint), task="detect")
    except Exception as error:  # a pickle: whatever is wrong with it may come up as anything
        raise UsageError(f"{checkpoint}: not a checkpoint of ultralytics: {error}") from error
    if tuple(yolo.names.values()) != tuple(names):
        raise UsageError(
            f"{checkpoint}: tells {', '.join(yolo.names.values())} apart, not {', '.join(names)}",
            "is it the other baseline's?",
        )
    return yolo

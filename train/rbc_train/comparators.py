"""What else counts red cells, by the same scoring: textbook image processing, and YOLOv5n without our CNN.

Reads top to bottom: training of the two networks, image processing, how the networks look, tuning and
comparing, the page. Every method turns a photograph into a `Sight`; `evaluation.score` judges them all.
"""

import csv
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, product, starmap
from pathlib import Path
from typing import Any, Final, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import (
    Bool,
    CellClass,
    Cells,
    Detections,
    Float32,
    FovResult,
    Scale,
    ScaleSource,
    UInt8,
)
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import Classifier
from rbc_edge.vision.detector import suppress, vote
from rbc_train import datasets, evaluation, labels, results, runs
from rbc_train import detector as ours
from rbc_train.datasets import CLASS_NAMES, Photograph
from rbc_train.evaluation import Examined
from rbc_train.labels import VerifiedLabels

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
        epochs: Passes over the training photographs; None takes the comparator's own (ultralytics' 100; our
            detector's).
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
    epochs: int | None = None
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
    done = options.out / ours.CHECKPOINT
    if done.is_file():
        return done
    data = write_bccd(datasets.read_public(options.data)[1].photographs, options.out / "dataset")
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
    return ours.run(_PlainTrainer, overrides, options.out, options.weights, options.threads)


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
    usual = ours.DetectorOptions(made, options.weights, options.out)
    return ours.train(
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


# --- What image processing sees ------------------------------------------------------------------------

_NUCLEUS_CHROMA: Final = 60
"""Largest less smallest channel of a stained nucleus or platelet, on balanced photographs. Medians of the
train photographs: red cells 22 to 36, nuclei 103 to 127."""
_SMALL: Final = 0.25  # of a cell's area: specks and platelets
_RIM: Final = 0.08  # of a cell's diameter: around a nucleus, so that no ring of its white cell is left
_PIERCED: Final = 0.35  # of a cell's area: a hole as large as this is glass, not the pale middle of a cell


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What a method saw in one photograph.

    Attributes:
        detections: Red cells down to a low score.
        contact: float32 (N, N), 0..1: how surely cell i overlaps cell j; on the diagonal, how surely it
            overlaps whatever is no cell of this list.
    """

    detections: Detections
    contact: Float32

    def counted(self, least_score: float) -> Cells:
        """Returns the cells over a score, in reading order; only they overlap each other.

        The verdict is left open (`overlapping` is False throughout): it is `overlap_score` that is judged.
        """
        keep = np.flatnonzero(self.detections.score >= least_score)
        centre = self.detections.xyxy[keep, :2] + self.detections.xyxy[keep, 2:]
        keep = keep[np.lexsort((centre[:, 0], centre[:, 1]))]
        n = len(keep)
        overlap = self.contact[np.ix_(keep, keep)].max(axis=1, initial=0.0)
        return Cells(
            self.detections.take(keep),
            overlap.astype(np.float32),
            np.zeros(n, np.bool_),
            np.zeros(n, np.int64),
            np.zeros((n, 4), np.bool_),
        )


class Method(Protocol):
    """One way to find red cells and to say which overlap."""

    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph.

        Args:
            image: uint8 (H, W, 3) RGB, as the camera gave it.
            diameter_px: Diameter of its red cells, as its labels say; pixels.

        Returns:
            Cells in pixels of the photograph.
        """


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """A photograph prepared for image processing, at a size of its own.

    Attributes:
        cell_px: Diameter of a red cell here.
        green: uint8 (h, w), the channel that red cells absorb, balanced.
        cells: uint8 (h, w), 1 where a red cell lies; pale middles filled, white cells cut out.
        whites: float32 (W, 3), x, y and radius of each white cell.
        factor: Size here over size in the photograph.
        limit: float32 (4,), width, height, width, height of the photograph.
    """

    cell_px: float
    green: UInt8
    cells: UInt8
    whites: Float32
    factor: float
    limit: Float32

    @property
    def cell_area(self) -> float:
        """Pixels of a round cell of this diameter."""
        return math.pi / 4 * self.cell_px**2

    def boxes(self, xyxy: Float32) -> Float32:
        """Brings boxes float32 (N, 4) back to the photograph."""
        return np.asarray(np.clip(xyxy / self.factor, 0, self.limit), np.float32)

    def in_white(self, x: Float32, y: Float32) -> Bool:
        """Tells which points lie in a white cell: bool (N,)."""
        distance = np.hypot(x[:, None] - self.whites[None, :, 0], y[:, None] - self.whites[None, :, 1])
        return np.asarray((distance < self.whites[None, :, 2]).any(axis=1), np.bool_)


def _scene(image: UInt8, diameter_px: float, cell_px: float, brighter: int) -> _Scene:
    """Prepares a photograph; what is darker than Otsu's threshold plus `brighter` is cell."""
    factor = cell_px / diameter_px
    small = preprocess.rescale(preprocess.balance(image), factor)
    small = np.asarray(cv2.GaussianBlur(small, (0, 0), 0.025 * cell_px), np.uint8)
    green = np.ascontiguousarray(small[:, :, 1])
    stained = ((small.max(axis=2) - small.min(axis=2)) > _NUCLEUS_CHROMA).astype(np.uint8)
    whites = _white_cells(stained, cell_px)
    # Nuclei are darker by far, and would draw Otsu's threshold down to themselves.
    threshold = _otsu(green[stained == 0]) + brighter
    cells = (green <= threshold).astype(np.uint8)
    for x, y, radius in whites.tolist():
        cv2.circle(cells, (round(x), round(y)), round(radius), 0, -1)
    cells = _without_small_holes(cells, _PIERCED * math.pi / 4 * cell_px**2)
    height, width = image.shape[:2]
    return _Scene(cell_px, green, cells, whites, factor, np.array([width, height] * 2, np.float32))


def _otsu(levels: UInt8) -> float:
    if len(levels) == 0 or levels.min() == levels.max():
        return -math.inf  # nothing stands out from anything
    return float(cv2.threshold(levels[None], 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0])


def _white_cells(stained: UInt8, cell_px: float) -> Float32:
    """Returns float32 (W, 3): circles around stained nuclei too large for a platelet, lobes put together."""
    side = 2 * round(0.15 * cell_px) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(stained, cv2.MORPH_CLOSE, kernel)
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    found: list[tuple[float, float, float]] = []
    for contour in contours:
        if cv2.contourArea(contour) > 2 * _SMALL * math.pi / 4 * cell_px**2:
            (x, y), radius = cv2.minEnclosingCircle(contour)
            found.append((x, y, radius + _RIM * cell_px))
    return np.array(found, np.float32).reshape(-1, 3)


def _without_small_holes(cells: UInt8, glass_area: float) -> UInt8:
    """Fills what is not cell, is surrounded, and is smaller than glass between cells: pale middles."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - cells, connectivity=4)
    height, width = cells.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    inside = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    hole = inside & (stats[:, cv2.CC_STAT_AREA] < glass_area)
    hole[0] = False  # the cells themselves
    return np.asarray(np.maximum(cells, hole[labels]), np.uint8)


def _circles(scene: _Scene, x: Float32, y: Float32, radius: Float32, score: Float32) -> Sight:
    """Makes cells of circles; they overlap as far as they reach into each other."""
    keep = ~scene.in_white(x, y)
    x, y, radius, score = x[keep], y[keep], radius[keep], score[keep]
    ring = np.stack([x, y, radius], axis=1)
    contact = _reach(ring, ring, scene.cell_px)
    np.fill_diagonal(contact, _reach(ring, scene.whites, scene.cell_px).max(axis=1, initial=0.0))
    box = np.stack([x - radius, y - radius, x + radius, y + radius], axis=1)
    found = Detections(scene.boxes(box), score.astype(np.float32), np.zeros(len(x), np.int64))
    return Sight(found, contact)


def _reach(a: Float32, b: Float32, cell_px: float) -> Float32:
    """Returns float32 (N, M): a half where two circles touch, towards 1 as they reach into each other."""
    gap = np.hypot(a[:, None, 0] - b[None, :, 0], a[:, None, 1] - b[None, :, 1]) - (
        a[:, None, 2] + b[None, :, 2]
    )
    return np.asarray(1 / (1 + np.exp(gap / (0.1 * cell_px))), np.float32)


@dataclass(frozen=True, slots=True)
class Hough:
    """Circular Hough transform (Guan & Yan 2011; Varun & Priya 2018), OpenCV's gradient method.

    Score: root of votes over a cell's outline, times the share of the circle's inner square that is cell.
    Overlap: circles that intersect.

    Attributes:
        edge: Upper threshold of Canny.
        spacing: Least distance of two centres, cell diameters.
        cell_px: Diameter of a red cell where this method looks, pixels.
        brighter: Of the foreground, over Otsu's threshold, grey levels.
    """

    edge: float = 60.0
    spacing: float = 0.5
    cell_px: float = 40.0
    brighter: int = 0

    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        found = cv2.HoughCirclesWithAccumulator(
            scene.green,
            cv2.HOUGH_GRADIENT,
            1.0,  # accumulator as fine as the image
            self.spacing * self.cell_px,
            param1=self.edge,
            param2=6,  # the score's threshold comes later
            minRadius=round(0.35 * self.cell_px),
            maxRadius=round(0.65 * self.cell_px),
        )
        rows = np.asarray(() if found is None else found, np.float32).reshape(-1, 4)
        x, y, radius, votes = rows.T
        share = _share_inside(scene.cells, x, y, radius)
        return _circles(scene, x, y, radius, np.sqrt(np.clip(votes / (math.pi * self.cell_px) * share, 0, 1)))


def _share_inside(cells: UInt8, x: Float32, y: Float32, radius: Float32) -> Float32:
    """Returns float32 (N,): share of each circle's inner square, as far as it is seen, that is cell."""
    total = cv2.integral(cells)
    half = radius / math.sqrt(2)
    x0, x1 = (np.clip(np.round(v), 0, cells.shape[1]).astype(int) for v in (x - half, x + half))
    y0, y1 = (np.clip(np.round(v), 0, cells.shape[0]).astype(int) for v in (y - half, y + half))
    area = np.maximum((x1 - x0) * (y1 - y0), 1)
    return np.asarray((total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]) / area, np.float32)


@dataclass(frozen=True, slots=True)
class Blobs:
    """OpenCV's SimpleBlobDetector behind a colour filter (as Meimban et al. 2018 count with OpenCV).

    The colour filter leaves of the green channel what is darker than the glass and not stained as a nucleus
    is; all else becomes white. Blobs are dark regions between a quarter and four cells in area.
    Score: how near the blob's size comes to a cell's. Overlap: circles that intersect.

    Attributes:
        circularity: Least circularity of a blob.
        convexity: Least convexity of a blob.
        flat: Whether the blob detector sees the filter's mask alone instead of grey levels in it.
        cell_px: Diameter of a red cell where this method looks, pixels.
        brighter: Of the filter, over Otsu's threshold, grey levels.
    """

    circularity: float = 0.1
    convexity: float = 0.1
    flat: bool = True
    cell_px: float = 40.0
    brighter: int = 0

    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        wanted = cv2.SimpleBlobDetector.Params()
        wanted.filterByColor, wanted.blobColor = True, 0
        wanted.filterByArea, wanted.minArea, wanted.maxArea = (
            True,
            _SMALL * scene.cell_area,
            4 * scene.cell_area,
        )
        wanted.filterByCircularity, wanted.minCircularity = True, self.circularity
        wanted.filterByConvexity, wanted.minConvexity = True, self.convexity
        wanted.filterByInertia = False
        wanted.minDistBetweenBlobs = 0.4 * self.cell_px
        wanted.minRepeatability = 1 if self.flat else 2
        wanted.minThreshold, wanted.maxThreshold, wanted.thresholdStep = (
            (100, 130, 20) if self.flat else (60, 250, 8)
        )
        shown = np.where(scene.cells == 1, 0 if self.flat else scene.green, 255).astype(np.uint8)
        # A blob must not reach the border, where contours end.
        frame = 2
        framed = cv2.copyMakeBorder(shown, frame, frame, frame, frame, cv2.BORDER_CONSTANT, value=255)
        points = cv2.SimpleBlobDetector.create(wanted).detect(framed)
        rows = np.array([(*p.pt, p.size / 2) for p in points], np.float32).reshape(-1, 3)
        x, y, radius = rows[:, 0] - frame, rows[:, 1] - frame, rows[:, 2]
        likeness = np.minimum(2 * radius / self.cell_px, self.cell_px / np.maximum(2 * radius, 1))
        return _circles(scene, x, y, radius, likeness)


@dataclass(frozen=True, slots=True)
class Watershed:
    """Otsu's threshold, distance transform, watershed from its tops.

    Score: distance at the top over a cell's radius. Overlap: length of the border that two regions share.

    Attributes:
        window: Diameter of the neighbourhood whose largest distance makes the top, cell diameters.
        top: Share of that distance from which a pixel belongs to the top; 1 for the maximum alone.
        by_image: Whether borders follow the photograph's edges; else they lie midway between the tops.
        cell_px: Diameter of a red cell where this method looks, pixels.
        brighter: Of the foreground, over Otsu's threshold, grey levels.
    """

    window: float = 0.5
    top: float = 0.9
    by_image: bool = False
    cell_px: float = 40.0
    brighter: int = 0

    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        # OpenCV's watershed draws a line along the image border: let that line lie outside.
        cells, green = (
            np.asarray(cv2.copyMakeBorder(part, 1, 1, 1, 1, cv2.BORDER_REPLICATE), np.uint8)
            for part in (scene.cells, scene.green)
        )
        distance = cv2.distanceTransform(cells, cv2.DIST_L2, cv2.DIST_MASK_5)
        distance = np.asarray(cv2.GaussianBlur(distance, (0, 0), 0.03 * self.cell_px), np.float32)
        side = 2 * round(self.window * self.cell_px / 2) + 1
        around = cv2.dilate(distance, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
        tops = ((distance >= self.top * around) & (distance > 0.15 * self.cell_px) & (cells == 1)).astype(
            np.uint8
        )
        n, markers = cv2.connectedComponents(tops, connectivity=8)
        markers[markers > 0] += 1
        markers[cells == 0] = 1  # glass
        # OpenCV floods across the smallest difference first: glass as a step, so that no cell runs over.
        floor = green // 2 if self.by_image else np.zeros_like(green)
        basins = cv2.watershed(cv2.merge([np.where(cells == 1, floor, 255).astype(np.uint8)] * 3), markers)
        basins = np.asarray(basins, np.int32)[1:-1, 1:-1]
        height = np.zeros(n, np.float32)
        inner = np.maximum(basins - 1, 0)  # 0 glass and lines, then the regions
        np.maximum.at(height, inner.ravel(), distance[1:-1, 1:-1].ravel())
        return _regions(scene, inner, _shared_borders(basins, n), np.clip(height / (self.cell_px / 2), 0, 1))


def _shared_borders(basins: npt.NDArray[np.int32], n: int) -> Float32:
    """Returns float32 (n, n): pixels of the line between each two of the regions 2..n of a watershed.

    Row and column 0 stand for glass and are empty; region i of the watershed has row i - 1.
    """
    region = np.where(basins > 1, basins - 1, 0).astype(np.float32)
    kernel = np.ones((3, 3), np.uint8)
    highest = cv2.dilate(region, kernel)
    lowest = cv2.erode(np.where(region > 0, region, np.float32(1e9)), kernel)
    line = (basins == -1) & (highest > 0) & (lowest < highest)
    shared = np.zeros((n, n), np.float32)
    a, b = lowest[line].astype(int), highest[line].astype(int)
    np.add.at(shared, (a, b), 1)
    np.add.at(shared, (b, a), 1)
    return shared


def _regions(
    scene: _Scene, labels: npt.NDArray[np.int32], shared: Float32, score: Float32, own: Float32 | None = None
) -> Sight:
    """Makes cells of labelled regions 1..n-1.

    Args:
        scene: Where they lie.
        labels: int32 (h, w), 0 for none.
        shared: float32 (n, n), length of the border that two regions share, pixels.
        score: float32 (n,).
        own: float32 (n,), how surely a region is several cells; None when a region is one cell.

    Returns:
        The regions that are no specks.
    """
    n = len(score)
    # Beside a white cell: pixels of the region along it.
    rim = np.zeros(labels.shape, np.uint8)
    for x, y, radius in scene.whites.tolist():
        cv2.circle(rim, (round(x), round(y)), round(radius) + 1, 1, 2)
    beside = np.bincount(labels[rim == 1], minlength=n)[:n]
    diagonal = _of_length(beside.astype(np.float32), scene.cell_px)
    contact = _of_length(shared, scene.cell_px)
    np.fill_diagonal(contact, diagonal if own is None else np.maximum(own, diagonal))
    area = np.bincount(labels.ravel(), minlength=n)[:n]
    keep = np.array([i for i in range(1, n) if area[i] > _SMALL * scene.cell_area], np.int64)
    box = np.zeros((len(keep), 4), np.float32)
    for row, i in enumerate(keep.tolist()):
        x, y, width, height = cv2.boundingRect((labels == i).astype(np.uint8))
        box[row] = x, y, x + width, y + height
    found = Detections(scene.boxes(box), score[keep].astype(np.float32), np.zeros(len(keep), np.int64))
    return Sight(found, contact[np.ix_(keep, keep)])


def _of_length(border_px: Float32, cell_px: float) -> Float32:
    """Turns the length of a shared border into 0..1: a half at a quarter of a cell diameter."""
    return np.asarray(border_px / (border_px + cell_px / 4), np.float32)


@dataclass(frozen=True, slots=True)
class Components:
    """Connected components of the foreground, each one cell: a clump counts as one.

    Score: area over a cell's, at most 1. Overlap: how many cells' area the component holds.

    Attributes:
        opening: Diameter of the opening that cuts thin bridges, cell diameters; 0 for none.
        cell_px: Diameter of a red cell where this method looks, pixels.
        brighter: Of the foreground, over Otsu's threshold, grey levels.
    """

    opening: float = 0.0
    cell_px: float = 40.0
    brighter: int = 0

    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        cells = scene.cells
        if self.opening > 0:
            side = 2 * round(self.opening * self.cell_px / 2) + 1
            kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
            cells = np.asarray(cv2.morphologyEx(cells, cv2.MORPH_OPEN, kernel), np.uint8)
        n, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
        cells_in_it = stats[:, cv2.CC_STAT_AREA].astype(np.float32) / scene.cell_area
        several = (cells_in_it / (cells_in_it + 2)).astype(np.float32)
        none = np.zeros((n, n), np.float32)
        score = np.clip(cells_in_it, 0, 1).astype(np.float32)
        return _regions(scene, np.asarray(labels, np.int32), none, score, several)


# --- What the networks see ----------------------------------------------------------------------------

_LEAST_SCORE: Final = 0.01  # the precision curve needs its tail
_USUAL_CONFIDENCE: Final = 0.25  # ultralytics' own of `predict`


class PlainYolo:
    """YOLOv5n on whole photographs at 640 px, through ultralytics' own `predict`; overlap by Otsu's area.

    It needs no scale. Overlap is the paper's weak rule: the dark area of the tight crop.

    Args:
        checkpoint: What `train_bccd640` returned.

    Raises:
        UnavailableError: If it is not there.
        UsageError: If it tells other classes apart.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._yolo = _open_yolo(checkpoint, CLASS_NAMES)
        self.look(np.zeros((64, 64, 3), np.uint8), 1.0)  # ultralytics sets up at the first image
        torch.set_num_threads(1)  # and chooses the threads itself

    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph (see `Method`)."""
        del diameter_px
        seen = self._yolo.predict(
            image[:, :, ::-1], imgsz=640, conf=_LEAST_SCORE, device="cpu", verbose=False
        )
        boxes = seen[0].boxes
        red = boxes.cls.numpy() == CellClass.RBC
        xyxy = np.asarray(boxes.xyxy.numpy()[red], np.float32).reshape(-1, 4)
        area = labels.otsu_area(preprocess.crops(image, xyxy, margin=0.0)) / preprocess.CROP_PX**2
        score = np.asarray(boxes.conf.numpy()[red], np.float32)
        return Sight(
            Detections(xyxy, score, np.zeros(len(xyxy), np.int64)),
            np.diag(area).astype(np.float32).reshape(len(xyxy), len(xyxy)),
        )


class TwoClassYolo:
    """YOLOv5n that calls single and overlapping itself, at our detector's scale.

    A box's score is the larger of its two red classes; overlap is the overlapping one's share of the two.
    Suppression takes the two for one class; it and the vote on a box's place are our detector's.

    Args:
        checkpoint: What `train_two_class` returned.
        bundle: Whose scale and iou thresholds it shares.

    Raises:
        UnavailableError: If it is not there.
        UsageError: If it tells other classes apart.
    """

    def __init__(self, checkpoint: Path, bundle: Bundle) -> None:
        self._network = _open_yolo(checkpoint, TWO_CLASS_NAMES).model.float().fuse().eval()
        self._manifest = bundle.manifest

    @torch.inference_mode()
    def look(self, image: UInt8, diameter_px: float) -> Sight:
        """Looks at one photograph (see `Method`)."""
        small = preprocess.rescale(preprocess.balance(image), self._manifest.cell_diameter_px / diameter_px)
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
        seen = (found.score >= _LEAST_SCORE) & (box[:, 2:] - box[:, :2] > 1).all(axis=1)
        found, single, overlapping = found.take(seen), single[seen], overlapping[seen]
        kept = suppress(
            found, np.array(self._manifest.iou_threshold, np.float32), self._manifest.iou_threshold_across
        )
        kept = kept[found.class_id[kept] == CellClass.RBC]
        voters = found.score >= np.array(self._manifest.score_threshold, np.float32)[found.class_id]
        share = overlapping[kept] / np.maximum(single[kept] + overlapping[kept], 1e-9)
        return Sight(
            replace(found.take(kept), xyxy=vote(found, kept, voters)),
            np.diag(share).astype(np.float32).reshape(len(kept), len(kept)),
        )


def _open_yolo(checkpoint: Path, names: Sequence[str]) -> Any:
    """Opens a checkpoint of ultralytics, which tells these classes apart."""
    if not checkpoint.is_file():
        raise UnavailableError(f"{checkpoint}: no such file", "train it: python -m rbc_train compare --train")
    try:
        yolo = YOLO(str(checkpoint), task="detect")
    except Exception as error:  # a pickle: whatever is wrong with it may come up as anything
        raise UsageError(f"{checkpoint}: not a checkpoint of ultralytics: {error}") from error
    if tuple(yolo.names.values()) != tuple(names):
        raise UsageError(
            f"{checkpoint}: tells {', '.join(yolo.names.values())} apart, not {', '.join(names)}",
            "is it the other comparator's?",
        )
    return yolo


# --- One scoring for all ------------------------------------------------------------------------------

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
    """How one comparator fared.

    Attributes:
        name: Of the method.
        how: Its parameters and thresholds, in words.
        figures: What `evaluation.score` gave; empty when it was not run.
        seconds: Median of a field, one thread, decoded image to counted cells; NaN when it was not run.
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
        photographs: Of any split; only train is looked at.
        verified: Overlap labels.
        of_each: How many of each source, spread evenly over those with verified labels.

    Returns:
        The photographs.
    """
    chosen: list[Photograph] = []
    some = [p for p in photographs if p.split == "train" and evaluation.usable(verified, p)]
    for source in sorted({p.source for p in some}):
        own = [p for p in some if p.source == source]
        steps = np.linspace(0, len(own) - 1, min(of_each, len(own)))
        chosen += [own[round(i)] for i in steps]
    return chosen


def tune(candidates: Iterable[Method], photographs: Sequence[Photograph], verified: VerifiedLabels) -> Tuned:
    """Chooses a method's parameters and thresholds.

    For each candidate the score threshold is the one that makes its counts unbiased, as our detector's;
    the candidate with the best F1 of red cells at iou 0.5 there is taken, every source weighing the same.
    Then the overlap threshold is the one with the best accuracy on the verified labels.

    Args:
        candidates: One method with different parameters; at least one.
        photographs: To choose on; not those that judge.
        verified: Overlap labels.

    Returns:
        The best.
    """
    tried: list[Tuned] = []
    read = list(_read(photographs))
    for method in candidates:
        looked = _look(method, read)[0]
        least = evaluation.score_thresholds(_beside(looked, photographs, verified, 0.5))[CellClass.RBC]
        examined = _beside(looked, photographs, verified, least)
        sources = sorted({p.source for p in photographs})
        f1 = [_f1([e for e in examined if e.photograph.source == s], least) for s in sources]
        overlap = evaluation.best_overlap_threshold(examined)
        tried.append(Tuned(method, least, overlap, float(np.mean(f1))))
    return max(tried, key=lambda t: t.f1)


def _f1(examined: Sequence[Examined], least_score: float) -> float:
    scores, hits, n_truth = evaluation.ranked_hits(examined, CellClass.RBC, 0.5)
    over = scores >= least_score
    return 2 * int((over & hits).sum()) / max(int(over.sum()) + n_truth, 1)


def _read(photographs: Sequence[Photograph]) -> Iterator[tuple[UInt8, float]]:
    """Yields each photograph's image and labelled diameter, pixels."""
    of_source = datasets.source_diameters_px(photographs)
    for photograph in photographs:
        yield photograph.read(), datasets.diameter_px(photograph, of_source)


def _look(method: Method, read: Iterable[tuple[UInt8, float]]) -> tuple[list[Sight], list[float]]:
    """Returns what a method saw in each photograph, and the seconds it took."""
    looked: list[Sight] = []
    seconds: list[float] = []
    for image, diameter in read:
        start = time.perf_counter()
        looked.append(method.look(image, diameter))
        seconds.append(time.perf_counter() - start)
    return looked, seconds


def _beside(
    looked: Sequence[Sight], photographs: Sequence[Photograph], verified: VerifiedLabels, least_score: float
) -> list[Examined]:
    """Lays what a method saw beside the labels, counting cells over a score."""
    of_source = datasets.source_diameters_px(photographs)
    return [
        evaluation.beside_labels(
            photograph,
            FovResult(
                photograph.width_px,
                photograph.height_px,
                Scale(datasets.diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER),
                sight.counted(least_score),
            ),
            sight.detections,
            verified,
        )
        for sight, photograph in zip(looked, photographs, strict=True)
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
    """Runs all comparators, and the bundle, over the validation photographs; iterate to do the work.

    Args:
        analyzer: The bundle at work, on one thread.
        txl: TXL-PBC's photographs.
        bccd: BCCD's, with its own boxes: they choose the area threshold of YOLOv5n at 640.
        verified: Overlap labels.
        bccd640: Checkpoint of `train_bccd640`; None when there is none.
        two_class: Checkpoint of `train_two_class`; None when there is none.
        every: Every how many-th validation photograph, and candidate's photographs likewise.

    Yields:
        One outcome a comparator; without figures where its checkpoint is not given.

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
        figures = evaluation.score(
            _beside(looked, validation, verified, best.score_threshold), best.overlap_threshold
        )
        how = (
            f"{_parameters(best.method)}; score from {best.score_threshold:g}, overlap from "
            f"{best.overlap_threshold:g}, chosen on {len(choosing)} train photographs (F1 {best.f1:.3f})"
        )
        yield Outcome(name, how, figures, float(np.median(seconds)))
    yield _plain_outcome(bccd640, validation, bccd, verified)
    yield _two_class_outcome(two_class, analyzer.bundle, validation, verified)
    scales: tuple[tuple[evaluation.ScaleMode, str], ...] = (
        ("labelled", "rbc-edge, told the scale"),
        ("estimated", "rbc-edge, told nothing"),
    )
    manifest = analyzer.bundle.manifest
    for scale, name in scales:
        examined = evaluation.examine(analyzer, validation, verified, scale=scale)
        figures = evaluation.score(examined, manifest.overlap_threshold)
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
    figures = evaluation.score(_beside(looked, validation, verified, _USUAL_CONFIDENCE), overlap)
    how = (
        f"{_epochs(checkpoint)}score from {_USUAL_CONFIDENCE:g}, ultralytics' default; overlapping when the "
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
    least = evaluation.score_thresholds(_beside(looked, validation, verified, 0.5))[CellClass.RBC]
    examined = _beside(looked, validation, verified, least)
    overlap = evaluation.best_overlap_threshold(examined)
    how = (
        f"{_epochs(checkpoint)}score from {least:g}, overlap from {overlap:g}, chosen on the validation "
        "photographs, as ours"
    )
    return Outcome(_TWO_CLASS, how, evaluation.score(examined, overlap), float(np.median(seconds)))


# --- For readers --------------------------------------------------------------------------------------

_TEXT: Final = (
    "The same photographs, the same labels, the same scoring for all. Image processing (the first four) is "
    "told the diameter that each photograph's labels give, sees the photograph balanced as our models do, at "
    "their size of a cell or a larger one, and has white cells taken out by the colour of their nuclei "
    "(largest less smallest channel). Its parameters were chosen from a small grid on train photographs: "
    "score threshold for unbiased counts, then best F1 at iou 0.5, then overlap threshold for best accuracy "
    "on the verified train labels. Circles overlap when they intersect, regions of the watershed when they "
    "share a border, components when they hold the area of several cells, all of them when they lie against "
    "a white cell.",
    "Blobs are OpenCV's SimpleBlobDetector behind a colour filter, after Meimban et al. (2018), whose paper "
    "we know by its abstract: of the green channel only what is darker than Otsu's threshold and not "
    "coloured as a nucleus is left; the detector's limits come from the grid. Hough circles are the step of "
    "Guan and Yan (2011) and of Varun and Priya (2018), by OpenCV's gradient method.",
    "YOLOv5n on BCCD's own boxes (its train split without the photographs that our validation or test shows "
    "again) is trained and run by ultralytics' defaults at 640 px on the photograph as it came, told "
    "nothing; its overlap verdict is the paper's Otsu area rule. YOLOv5n with two red classes has our "
    "detector's photographs, scale, trainer and suppression, and the labelled diameter; a training box has "
    "its verified label where there is one, else the verdict of the bundle's own classifier. Its thresholds "
    "were chosen as ours, on the validation photographs that are scored here.",
    "Overlap is judged on the boxes that a method finds. One that finds few overlapping cells is judged on "
    "the easy ones: *found* says how many of the verified cells it found (iou 0.5), *found and right* what "
    "share of all verified cells it found and called rightly. Crowded: the quarter of fields with the "
    "largest share of red cells whose boxes overlap another's. Time: median of a field, one thread, from "
    "the decoded image to its cells.",
)


def section(outcomes: Sequence[Outcome], folder: Path, command: str) -> results.Section:
    """Draws the figure and lays the outcomes out for the page.

    Args:
        outcomes: What `compare` gave.
        folder: Where the section will lie; the figure is written there.
        command: How to get the same again.

    Returns:
        The section ``comparators``.

    Raises:
        UnavailableError: If the figure cannot be written.
    """
    run = [o for o in outcomes if o.figures]
    pictures: tuple[results.Picture, ...] = ()
    if run:
        draw_crowding(run, folder / _FIGURE)
        caption = "Error of the count against how crowded the field is: quarters of the fields, least first."
        pictures = (results.Picture(_FIGURE, caption),)
    return results.Section(
        "comparators",
        "results",
        "What else counts red cells",
        command,
        (*_TEXT, "\n".join(f"- {o.name}: {o.how}." for o in outcomes)),
        (_headline(outcomes), *_by_source(run)),
        pictures,
        {o.name: {"how": o.how, "seconds": o.seconds, **_headline_figures(o)} for o in outcomes},
    )


def _found(figures: Mapping[str, Any]) -> float:
    n = figures["overlap_on_found_boxes"]["n"]
    return float(n / max(n + figures["overlap_labels_not_found"], 1))


def _found_and_right(figures: Mapping[str, Any]) -> float:
    """Share of the verified cells that was found and rightly called; none of none found."""
    accuracy = figures["overlap_on_found_boxes"]["accuracy"]
    return 0.0 if math.isnan(accuracy) else _found(figures) * float(accuracy)


_FIGURE: Final = "comparators-crowding.png"
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
    """The figures of the tables and of the picture: all that `score` gives would fill a hundred pages."""
    figures: dict[str, Any] = {
        group: {name: value(own) for name, value, _ in _COLUMNS} for group, own in outcome.figures.items()
    }
    if outcome.figures:
        figures["by_crowding"] = [
            {k: part[k] for k in ("from", "to", "photographs", "field_error_mean", "count_ratio")}
            for part in outcome.figures["all"]["rbc_by_crowding"]
        ]
    return figures


def _headline(outcomes: Sequence[Outcome]) -> results.Table:
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
    return results.Table("All validation photographs", columns, tuple(rows))


def text_table(outcomes: Sequence[Outcome]) -> str:
    """Lays the headline figures out as text, a line a method."""
    table = _headline(outcomes)
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _by_source(run: Sequence[Outcome]) -> list[results.Table]:
    sources = [s for s in run[0].figures if s != "all"] if run else []
    captions = {"mean": "mean field error"}
    return [
        results.Table(
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


def draw_crowding(run: Sequence[Outcome], file: Path) -> None:
    """Draws the error of the count against how crowded the field is.

    Args:
        run: Outcomes with figures.
        file: PNG to write.

    Raises:
        UnavailableError: If it cannot be written.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=80)
    except OSError as problem:
        raise UnavailableError(
            f"{file}: {problem.strerror or problem}", "choose another folder with --out"
        ) from problem

"""From two checkpoints to a tested bundle: write graphs, quantize, choose thresholds, compare, seal.

Parity means that the exported networks give the same results as the trained ones. It is measured twice on
the whole validation split: as tensor error (torch against fp32 ONNX, on the station's own input) and as task
error (fp32 against int8, through `rbc_edge`): AP, counts, changed labels.
"""

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from torch import nn

from rbc_edge.errors import BundleError, UnavailableError, UsageError
from rbc_edge.ops import synthetic
from rbc_edge.values import SHAPES, CellClass, Float32, UInt8
from rbc_edge.vision import analyzer as station
from rbc_edge.vision import bundle, image_file, preprocess, selftest
from rbc_edge.vision.bundle import (
    CLASSIFIER,
    CLASSIFIER_FP32,
    DETECTOR,
    DETECTOR_FP32,
    TEST_EXPECTED,
    TEST_INPUT,
    Bundle,
    Manifest,
)
from rbc_export import graphs
from rbc_train import evaluate, labels, metrics, networks, results, shapes, thresholds
from rbc_train.data import (
    CHULA,
    CLASS_NAMES,
    Photograph,
    labelled_diameter_px,
    photographs_of,
    source_diameters_px,
    verified_labels,
)

TEST_DIAMETER_PX: Final = 60.0
_FEW_LABELS: Final = 100  # with fewer, the overlap score is not calibrated


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a bundle may lose on the validation split. More fails the export.

    Attributes:
        box_px: torch against fp32 ONNX, largest box difference, pixels at model scale.
        score: torch against fp32 ONNX, largest difference of a probability.
        ap50: int8 under fp32, RBC AP50.
        ap50_95: int8 under fp32, RBC AP50-95.
        count: int8 against fp32, share of the total red-cell count.
        flips: int8 against fp32, share of red cells with a changed verdict (single or overlapping).
    """

    box_px: float = 0.05
    score: float = 0.001
    ap50: float = 0.005
    ap50_95: float = 0.01
    count: float = 0.01
    flips: float = 0.01


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        detector: ultralytics checkpoint of `rbc_train.train_detector`. None takes that of `keep`.
        classifier: Checkpoint of `rbc_train.train_classifier`.
        dataset: Folder of the dataset they were trained on (its scale and crop margin).
        data: Folder of the public data.
        out: Folder of the bundle.
        with_fp32: Also ship the networks in fp32.
        calibration_images: How many training photographs the int8 ranges are measured on.
        iou_threshold: Suppression by `CellClass`.
        iou_threshold_across: Suppression between classes.
        tolerance: What may be lost.
        keep: A bundle whose detector is taken, as it was proven. Only the second stage is new.
    """

    detector: Path | None
    classifier: Path
    dataset: Path
    data: Path
    out: Path
    with_fp32: bool = False
    calibration_images: int = 200
    iou_threshold: tuple[float, float, float] = (0.65, 0.6, 0.5)
    iou_threshold_across: float = 0.7
    tolerance: Tolerance = Tolerance()
    keep: Path | None = None


Say = Callable[[str], None]


def export(options: ExportOptions, say: Say) -> Bundle:
    """Exports, proves and writes a bundle.

    Args:
        options: What to export.
        say: Called with a line for each step and its figures.

    Returns:
        The finished bundle.

    Raises:
        UnavailableError: If a checkpoint or the data are not there.
        BundleError: If parity is beyond its tolerance. Then nothing is written to `options.out`.
        UsageError: If there is no detector to export, or a kept one shall ship in fp32, which it lacks.
    """
    if options.keep is None and options.detector is None:
        raise UsageError("there is no detector to export", "give a checkpoint, or a bundle to keep that of")
    if options.keep is not None and options.with_fp32:
        raise UsageError("a detector that is kept has no fp32 network", "leave out --with-fp32")
    material = _collect(options)
    graph = _write_graphs(material)
    say("fp32 graphs written")
    manifest = _draft_manifest(material, _quantize(material, say))
    _write_test_input(material.work)
    manifest = _calibrated(material, manifest, say)

    analyzer, examined = _examined(material, manifest)
    manifest = thresholds.choose(analyzer, examined, material.pointed, manifest)
    say(
        f"thresholds from validation: scores {manifest.score_threshold}, "
        f"overlap {manifest.overlap_threshold}, refuse {manifest.refuse_threshold}, "
        f"shape {manifest.shape_threshold}"
    )
    draft = material.bundle(material.work / "draft", manifest)
    manifest = replace(manifest, metrics=_prove(material, graph, draft, say))
    _write_expectation(material.work, draft)
    finished = material.bundle(options.out, manifest, with_fp32=options.with_fp32)
    say(f"self-test: {selftest.verify(finished)}")
    return finished


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """What an export works with.

    Attributes:
        options: What to export.
        work: Folder of the files on the way.
        dataset: Manifest of the dataset.
        network: The classifier.
        config: Configuration of the classifier's training.
        calibration: Training photographs that the int8 ranges are measured on.
        validation: Validation photographs of every laboratory that the dataset has. Their boxes are complete.
        of_source: Median cell diameter of each camera's training photographs, pixels.
        verified: Overlap labels.
        kept: The bundle whose detector is taken.
        pointed: Validation photographs with points of shapes, complete or not.
        taught: Training photographs with points.
    """

    options: ExportOptions
    work: Path
    dataset: dict[str, Any]
    network: nn.Module
    config: dict[str, Any]
    calibration: list[Photograph]
    validation: list[Photograph]
    of_source: dict[str, float]
    verified: labels.VerifiedLabels
    kept: Bundle | None
    pointed: list[Photograph]
    taught: list[Photograph]

    @property
    def model_diameter_px(self) -> float:
        """Diameter of a red cell that the detector was trained on, pixels."""
        return float(self.dataset["cell_diameter_px"])

    @property
    def margin(self) -> float:
        """Margin of the classifier's crops, share of the box on each side."""
        return float(self.config["crop_margin"])

    def bundle(self, folder: Path, manifest: Manifest, *, with_fp32: bool = True) -> Bundle:
        """Writes the files on the way as a bundle."""
        fp32 = (DETECTOR_FP32, CLASSIFIER_FP32) if with_fp32 else ()
        names = (DETECTOR, CLASSIFIER, *fp32, TEST_INPUT, TEST_EXPECTED)
        return bundle.write(folder, {name: self.work / name for name in names}, manifest)


def _collect(options: ExportOptions) -> _Material:
    dataset = _manifest_of(options.dataset)
    # Of a laboratory that the dataset does not have, no photograph may choose a threshold or a range.
    sources = {source for of_split in dataset["counts"].values() for source in of_split}
    everyone = list(photographs_of(options.dataset, options.data).values())
    complete = [p for p in everyone if p.complete and p.source in sources]
    training, validation = ([p for p in complete if p.split == split] for split in ("train", "val"))
    network, config = networks.load_classifier(options.classifier)
    work = options.out.parent / (options.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    return _Material(
        options=options,
        work=work,
        dataset=dataset,
        network=network,
        config=config,
        calibration=_calibration(training, options.calibration_images),
        validation=validation,
        of_source=source_diameters_px(training),
        verified=verified_labels(complete),
        kept=Bundle.open(options.keep) if options.keep else None,
        pointed=[p for p in everyone if p.split == "val" and p.points and p.source in sources],
        taught=[p for p in everyone if p.split == "train" and p.points and p.source in sources],
    )


def _write_graphs(material: _Material) -> graphs.DetectorGraph | None:
    """Writes both networks as fp32 ONNX. Returns the detector that torch runs, None if one is kept."""
    _write_classifier(material, Calibration())
    if material.kept is not None:
        # Stands on both sides of the comparison: nothing of it can be lost.
        shutil.copyfile(material.kept.path / DETECTOR, material.work / DETECTOR_FP32)
        return None
    assert material.options.detector is not None
    detector = networks.load_detector(material.options.detector)
    graph = graphs.DetectorGraph(graphs.fuse(detector))
    graphs.write_detector(graph, material.work / DETECTOR_FP32)
    return graph


@dataclass(frozen=True, slots=True)
class Calibration:
    """What makes the logits of the second stage probabilities (`graphs.ClassifierGraph`)."""

    slope: float = 1.0
    shift: float = 0.0
    shape_slope: float = 1.0


def _write_classifier(material: _Material, by: Calibration) -> None:
    """Writes the second stage as fp32 ONNX, and as int8 with the ranges of the calibration photographs."""
    work = material.work
    graph = graphs.ClassifierGraph(material.network, **asdict(by))
    graphs.write_classifier(graph, work / CLASSIFIER_FP32)
    crops = _classifier_inputs(material.calibration, material.of_source, material.margin)
    graphs.quantize_classifier(work / CLASSIFIER_FP32, work / CLASSIFIER, crops)


def _quantize(material: _Material, say: Say) -> dict[str, float]:
    """Writes both networks as int8 ONNX. Returns what was added to the detector's logits, by class number."""
    work, chosen = material.work, material.calibration
    if material.kept is not None:
        shutil.copyfile(material.kept.path / DETECTOR, work / DETECTOR)
        shift = dict(material.kept.manifest.calibration["logit_shift"])
        say(f"the detector is that of {material.kept.bundle_id}")
        return shift
    inputs = list(_detector_inputs(chosen, material.of_source, material.model_diameter_px))
    graphs.quantize_detector(work / DETECTOR_FP32, work / DETECTOR, inputs)
    shift = graphs.correct_scores(work / DETECTOR_FP32, work / DETECTOR, inputs)
    say(f"int8 detector calibrated on {len(chosen)} training photographs; logits corrected by {_show(shift)}")
    return shift


def _draft_manifest(material: _Material, shift: dict[str, float]) -> Manifest:
    """The manifest before thresholds and metrics are known."""
    return Manifest(
        format=bundle.FORMAT,
        class_names=CLASS_NAMES,
        cell_diameter_px=material.model_diameter_px,
        tile_px=preprocess.TILE_PX,
        tile_overlap_px=preprocess.TILE_OVERLAP_PX,
        score_threshold=(thresholds.DRAFT_SCORE,) * len(CLASS_NAMES),
        iou_threshold=material.options.iou_threshold,
        iou_threshold_across=material.options.iou_threshold_across,
        crop_margin=material.margin,
        overlap_threshold=0.5,
        refuse_threshold=1.0,
        # What no expert's point can judge is not named.
        shapes=tuple(SHAPES) if isinstance(material.network, networks.StagesNet) and material.pointed else (),
        shape_weights=(),
        shape_threshold=1.0,
        normalisation="in the graph: uint8 RGB / 255",
        calibration={
            "images": [p.name for p in material.calibration],
            "split": "train",
            "method": "MinMax, moving average; weights int8 per channel in 7 bits, activations uint8; "
            "bias correction of the logits",
            "logit_shift": shift,
        },
        training=_training(material),
        metrics={},
        licence="AGPL-3.0-or-later",
        files={},
    )


def _write_test_input(work: Path) -> None:
    """Draws the field of the self-test. What is expected of it is written at the end."""
    field = synthetic.draw_field(
        np.random.default_rng(1), width_px=480, height_px=360, cell_diameter_px=TEST_DIAMETER_PX
    )
    ok, png = cv2.imencode(".png", field.image[:, :, ::-1])
    if not ok:
        raise BundleError(f"{work / TEST_INPUT}: could not be encoded")
    (work / TEST_INPUT).write_bytes(png.tobytes())
    (work / TEST_EXPECTED).write_text("{}\n", encoding="utf-8")


def _write_expectation(work: Path, draft: Bundle) -> None:
    """Writes what the finished networks find in the field of the self-test."""
    field = image_file.load_field(work / TEST_INPUT, "bundle", "test")
    expected = selftest.expectation(station.Analyzer(draft, threads=1), field, TEST_DIAMETER_PX)
    (work / TEST_EXPECTED).write_text(json.dumps(expected) + "\n", encoding="utf-8")


def _examined(material: _Material, manifest: Manifest) -> tuple[station.Analyzer, list[evaluate.Examined]]:
    """Runs the int8 networks over the validation photographs, as a draft of the bundle."""
    draft = station.Analyzer(material.bundle(material.work / "draft", manifest), threads=2)
    return draft, evaluate.examine(draft, material.validation, material.verified, scale="labelled")


def _calibrated(material: _Material, manifest: Manifest, say: Say) -> Manifest:
    """Makes scores of the second stage probabilities on validation cells, and writes the networks again.

    The overlap score by Platt's method, shapes by one factor (temperature).
    """
    analyzer, examined = _examined(material, manifest)
    by = Calibration()
    if len(evaluate.judged_found(examined).score) >= _FEW_LABELS:
        slope, shift = evaluate.platt(examined)
        # Not if it knows nothing of overlaps: the other way round would be no better.
        by = replace(by, slope=slope, shift=shift) if slope > 0 else by
    seen = shapes.look(analyzer, material.pointed)
    if len(seen) >= _FEW_LABELS:
        by = replace(by, shape_slope=shapes.slope(seen))
    _write_classifier(material, by)
    say(f"second stage calibrated on validation cells: {_show(asdict(by))}")
    named = {"overlap_slope": by.slope, "overlap_shift": by.shift, "shape_slope": by.shape_slope}
    manifest = replace(manifest, calibration={**manifest.calibration, **named})
    if not (manifest.shapes and material.taught):
        return manifest
    draft = station.Analyzer(material.bundle(material.work / "draft", manifest), threads=2)
    return replace(manifest, shape_weights=shapes.weights(shapes.at_some_scales(draft, material.taught)))


def _prove(
    material: _Material, graph: graphs.DetectorGraph | None, draft: Bundle, say: Say
) -> dict[str, Any]:
    """Compares torch with fp32 and fp32 with int8.

    Returns:
        The metrics of the manifest.

    Raises:
        BundleError: If parity is beyond its tolerance.
    """
    if graph is not None:
        torch_error = _torch_parity(graph, draft, material.validation, material.of_source)
    elif material.kept is not None:
        proven = material.kept.manifest.metrics["parity"]
        torch_error = {name: float(proven[name]) for name in ("box_px", "score")}
    say(f"torch to fp32 ONNX: {_show(torch_error)}")
    task_error, figures = _task_parity(draft, material.validation, material.verified)
    say(f"fp32 to int8: {_show(task_error)}")
    say(evaluate.table(figures["int8"]))
    _check(torch_error | task_error, material.options.tolerance)
    return {
        "split": "val",
        "scale": "labelled",
        "tolerance": asdict(material.options.tolerance),
        "parity": torch_error | task_error,
        **{k: results.plain(v) for k, v in figures.items()},
    }


def _manifest_of(dataset: Path) -> dict[str, Any]:
    file = dataset / "manifest.json"
    if not file.is_file():
        raise UnavailableError(f"{file}: no such file", "make the dataset: python -m rbc_train dataset")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _calibration(training: Sequence[Photograph], n: int) -> list[Photograph]:
    """Training photographs spread evenly over each source."""
    chosen: list[Photograph] = []
    sources = sorted({p.source for p in training})
    for source in sources:
        own = [p for p in training if p.source == source]
        count = min(len(own), math.ceil(n / len(sources)))
        chosen += [own[round(i)] for i in np.linspace(0, len(own) - 1, count)]
    return chosen


def _detector_inputs(
    photographs: Sequence[Photograph], of_source: dict[str, float], model_diameter_px: float
) -> Iterator[UInt8]:
    """Yields what the detector network gets at the station: uint8 (H, W, 3), sides multiples of 32."""
    for photograph in photographs:
        diameter = labelled_diameter_px(photograph, of_source)
        view = photograph.view(diameter)
        small = preprocess.detector_input(view, diameter, model_diameter_px)
        yield preprocess.pad_to_stride(small)[0]


def _classifier_inputs(
    photographs: Sequence[Photograph], of_source: dict[str, float], margin: float
) -> Iterator[UInt8]:
    """Yields what the classifier gets at the station, photograph by photograph: uint8 (N, 64, 64, 3)."""
    for photograph in photographs:
        xyxy = photograph.xyxy[photograph.class_id == CellClass.RBC]
        if len(xyxy):
            view = photograph.view(labelled_diameter_px(photograph, of_source))
            yield preprocess.cell_crops(view, xyxy, margin=margin)


@torch.no_grad()
def _torch_parity(
    graph: graphs.DetectorGraph, draft: Bundle, photographs: Sequence[Photograph], of_source: dict[str, float]
) -> dict[str, float]:
    session = draft.session(DETECTOR_FP32, threads=2)
    box_px = score = 0.0
    for image in _detector_inputs(photographs, of_source, draft.manifest.cell_diameter_px):
        inputs = {"image": image[None], "least_score": graphs.EVERYTHING}
        boxes, scores = graph.eval()(*(torch.from_numpy(i) for i in inputs.values()))
        onnx_boxes, onnx_scores = session.run(["boxes", "scores"], inputs)
        box_px = max(box_px, graphs.tensor_error(boxes.numpy(), onnx_boxes))
        score = max(score, graphs.tensor_error(scores.numpy(), onnx_scores))
    return {"box_px": box_px, "score": score}


def _task_parity(
    draft: Bundle, photographs: Sequence[Photograph], verified: labels.VerifiedLabels
) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs fp32 and int8 through the station's pipeline and compares what users see."""
    runs = {
        name: evaluate.examine(
            station.Analyzer(draft, threads=2, precision=name), photographs, verified, scale="labelled"
        )
        for name in ("fp32", "int8")
    }
    figures = {name: evaluate.score(run, draft.manifest.overlap_threshold) for name, run in runs.items()}
    whole, small = figures["fp32"]["all"], figures["int8"]["all"]
    flips = pairs = 0
    moved: list[Float32] = []
    for a, b in zip(runs["fp32"], runs["int8"], strict=True):
        one, two = a.result.cells, b.result.cells
        rbc_one = np.flatnonzero(one.detections.class_id == CellClass.RBC)
        rbc_two = np.flatnonzero(two.detections.class_id == CellClass.RBC)
        partner = metrics.match(
            two.detections.xyxy[rbc_two],
            two.detections.score[rbc_two],
            one.detections.xyxy[rbc_one],
            min_iou=0.5,
        )
        mine, theirs = rbc_two[partner >= 0], rbc_one[partner[partner >= 0]]
        pairs += len(mine)
        flips += int((two.overlapping[mine] != one.overlapping[theirs]).sum())
        moved.append(np.abs(two.detections.xyxy[mine] - one.detections.xyxy[theirs]).mean(axis=1))
    error = {
        "ap50": whole["rbc_ap50"] - small["rbc_ap50"],
        "ap50_95": whole["rbc_ap50_95"] - small["rbc_ap50_95"],
        "count": abs(small["rbc_counted"] - whole["rbc_counted"]) / max(whole["rbc_counted"], 1),
        "flips": flips / max(pairs, 1),
        "int8_box_px_mean": float(np.concatenate(moved).sum()) / max(pairs, 1),
    }
    return error, figures


def _check(errors: dict[str, float], tolerance: Tolerance) -> None:
    allowed = asdict(tolerance)
    beyond = [f"{k} {errors[k]:.5f} (at most {v})" for k, v in allowed.items() if not errors[k] <= v]
    if beyond:
        raise BundleError(f"parity is beyond its tolerance: {', '.join(beyond)}", "no bundle was written")


def _training(material: _Material) -> dict[str, Any]:
    dataset = material.dataset
    if material.kept is not None:
        detector = {**material.kept.manifest.training["detector"], "kept_from": material.kept.bundle_id}
    else:
        assert material.options.detector is not None
        run = material.options.detector.parent / "config.json"
        config = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
        keep = ("epochs", "batch", "image_px", "seed", "augmentation", "dataset_manifest")
        detector = {"network": "YOLOv5n, COCO-pretrained", **{k: config.get(k) for k in keep}}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    chula = any(CHULA in of_split for of_split in dataset["counts"].values())
    return {
        "data": "TXL-PBC (lugan113/TXL-PBC_Dataset 056d09e), train split; our verified overlap labels"
        + chula * "; Chula RBC-12 (Chula-PIC-Lab/Chula-RBC-12-Dataset fa130f4), train split, our boxes",
        "counts": dataset["counts"],
        "commit": commit or "unknown",
        "detector": detector,
        "classifier": {
            k: v
            for k, v in material.config.items()
            if k not in ("dataset", "data", "out", "threads", "detector", "taught")
        },
    }


def _show(errors: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.5f}" for k, v in errors.items())

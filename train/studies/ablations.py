"""The measurements behind our choices: ``python -m studies.ablations suppression|diameter|overlap``.

How boxes are suppressed, the size at which the detector sees a red cell, and how the overlap CNN is taught.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer

from rbc_edge.values import CellClass, Cells, Detections, Float32, FovResult, Scale, ScaleSource, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import iou
from rbc_edge.vision.bundle import DETECTOR, Bundle
from rbc_edge.vision.detector import suppress, vote
from rbc_train import console, evaluate, metrics, networks, results, train_classifier, train_detector
from rbc_train.data import (
    CLASS_NAMES,
    Photograph,
    labelled_diameter_px,
    read_public,
    source_diameters_px,
    write_dataset,
)
from rbc_train.evaluate import Examined
from rbc_train.labels import VerifiedLabels
from rbc_train.results import Section, Table
from studies import station

Look = Callable[[UInt8], tuple[Float32, Float32]]
"""A network: uint8 (H, W, 3) RGB with sides multiples of 32, to float32 boxes (A, 4) and scores (A, 3)."""

Suppression = Callable[[Detections], Detections]
"""From candidates to cells."""

DIAMETERS_PX: Final = (20, 28, 40, 56)
_IMAGE_CELLS: Final = 6.4  # side of a training image in cells, as for the detector that ships
_MIN_SCORE: Final = 0.01
_NONE: Final = VerifiedLabels([])  # overlap is not judged here


def bundle_look(bundle: Bundle) -> Look:
    """Returns the int8 detector of a bundle, before suppression."""
    session = bundle.session(DETECTOR, threads=1)

    def look(window: UInt8) -> tuple[Float32, Float32]:
        least = np.full(len(CLASS_NAMES), _MIN_SCORE, np.float32)
        boxes, scores = session.run(["boxes", "scores"], {"image": window[None], "least_score": least})
        return boxes, scores

    return look


def checkpoint_look(checkpoint: Path) -> Look:
    """Returns a trained detector, in torch and fp32, before suppression."""
    network: Any = networks.load_detector(checkpoint).float().eval()
    network.fuse(verbose=False)

    @torch.inference_mode()
    def look(window: UInt8) -> tuple[Float32, Float32]:
        inputs = torch.from_numpy(window).permute(2, 0, 1)[None].float() / 255
        rows = network(inputs)[0][0].T.numpy()  # (A, 4 + 3): centre and size, then the classes
        half = rows[:, 2:4] / 2
        return np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1), rows[:, 4:]

    return look


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What a network sees in one photograph before suppression.

    Attributes:
        photograph: The photograph, its scale taken from its labels.
        found: Every box down to a score of 0.01, pixels of the photograph.
        seconds: What the network took.
    """

    photograph: Photograph
    found: Detections
    seconds: float


def candidates(look: Look, photographs: Sequence[Photograph], cell_diameter_px: float) -> list[Candidates]:
    """Shows photographs to a network as the station would, in one tile.

    Args:
        look: The network.
        photographs: What to show.
        cell_diameter_px: The size at which it sees red cells, pixels.

    Returns:
        One entry a photograph.
    """
    of_source = source_diameters_px(photographs)
    seen: list[Candidates] = []
    for photograph in photographs:
        labelled = labelled_diameter_px(photograph, of_source)
        small = preprocess.detector_input(photograph.view(labelled), labelled, cell_diameter_px)
        window, left, top = preprocess.pad_to_stride(small)
        start = time.perf_counter()
        boxes, scores = look(window)
        seconds = time.perf_counter() - start
        size = np.array([small.shape[1], small.shape[0]] * 2, np.float32)
        boxes = np.clip(boxes - np.array([left, top] * 2, np.float32), 0, size)
        usable = (scores.max(axis=1) >= _MIN_SCORE) & (boxes[:, 2:] - boxes[:, :2] > 1).all(axis=1)
        full = np.array([photograph.width_px, photograph.height_px] * 2, np.float32)
        found = Detections(
            (boxes[usable] * (full / size)).astype(np.float32),
            scores[usable].max(axis=1).astype(np.float32),
            scores[usable].argmax(axis=1).astype(np.int64),
        )
        seen.append(Candidates(photograph, found, seconds))
    return seen


def greedy(iou: float, *, votes: bool = True) -> Suppression:
    """Greedy suppression as the station does it, red cells at another iou.

    Args:
        iou: Boxes of red cells that overlap by more are one cell.
        votes: Whether boxes that mean the same cell vote on its place.
    """

    def apply(found: Detections) -> Detections:
        kept = suppress(found, np.array([iou, 0.6, 0.5], np.float32), 0.7)
        if not votes:
            return found.take(kept)
        return replace(found.take(kept), xyxy=vote(found, kept, found.score >= 0.25))

    return apply


def soft(sigma: float) -> Suppression:
    """Soft suppression: a box loses score to each better one it overlaps (Bodla et al. 2017, eq. 3).

    Args:
        sigma: Width of the Gaussian penalty.
    """

    def apply(found: Detections) -> Detections:
        overlap, score = _within_class(found), found.score.copy()
        left, kept = np.ones(len(score), np.bool_), []
        while left.any():
            best = int(np.where(left, score, -1.0).argmax())
            if score[best] < _MIN_SCORE:
                break
            kept.append(best)
            left[best] = False
            score[left] *= np.exp(-(overlap[best, left] ** 2) / sigma)
        return replace(found, score=score).take(np.array(kept, np.int64))

    return apply


def matrix(sigma: float) -> Suppression:
    """Matrix suppression: soft, all at once (Wang et al. 2020, SOLOv2, eq. 4).

    Args:
        sigma: Width of the Gaussian penalty.
    """

    def apply(found: Detections) -> Detections:
        order = np.argsort(-found.score, kind="stable")
        ranked = found.take(order)
        overlap = np.triu(_within_class(ranked), 1)  # of each box with the better ones
        covered = overlap.max(axis=0, initial=0.0)
        decay = np.exp(-(overlap**2 - covered[:, None] ** 2) / sigma).min(axis=0, initial=1.0)
        return replace(ranked, score=(ranked.score * decay).astype(np.float32))

    return apply


def _within_class(found: Detections) -> Float32:
    same = found.class_id[:, None] == found.class_id[None]
    return np.where(same, iou(found.xyxy, found.xyxy), 0.0).astype(np.float32)


SUPPRESSIONS: Final[dict[str, Suppression]] = {
    **{f"greedy, iou {iou}": greedy(iou) for iou in (0.45, 0.55, 0.6, 0.65, 0.7, 0.75)},
    "greedy, iou 0.65, no vote": greedy(0.65, votes=False),
    **{f"soft, sigma {sigma}": soft(sigma) for sigma in (0.3, 0.5)},
    **{f"matrix, sigma {sigma}": matrix(sigma) for sigma in (0.3, 0.5)},
}
"""What was tried. The station does greedy suppression at the iou in its bundle, with the vote."""


def judge(seen: Sequence[Candidates], suppression: Suppression) -> dict[str, Any]:
    """Scores one way of suppression, at the threshold that makes its own counts unbiased.

    Args:
        seen: Candidates of the validation photographs.
        suppression: The way.

    Returns:
        What `evaluate.score_group` says, and ``score_threshold``.
    """
    ranked = [suppression(c.found) for c in seen]
    least = evaluate.score_thresholds(_examined(seen, ranked, None))
    figures = evaluate.score_group(_examined(seen, ranked, least), 0.5)
    return {**figures, "score_threshold": least[CellClass.RBC]}


def _examined(
    seen: Sequence[Candidates], ranked: Sequence[Detections], least: tuple[float, ...] | None
) -> list[Examined]:
    limit = np.array(least or (1.0, 1.0, 1.0), np.float32)
    entries: list[Examined] = []
    for one, found in zip(seen, ranked, strict=True):
        counted = found.take(found.score >= limit[found.class_id])
        n = len(counted)
        cells = Cells(
            counted,
            np.full(n, np.nan, np.float32),
            np.zeros(n, np.bool_),
            np.zeros(n, np.int64),
            np.zeros((n, 4), np.bool_),
        )
        photograph = one.photograph
        given = Scale(math.nan, ScaleSource.NONE)
        result = FovResult(photograph.width_px, photograph.height_px, given, cells, (), {})
        entries.append(evaluate.with_labels(photograph, result, found, _NONE))
    return entries


def suppression_section(judged: dict[str, dict[str, Any]], bundle_id: str) -> Section:
    """Makes the section ``suppression``.

    Args:
        judged: What `judge` returned, by the name of the method.
        bundle_id: Of the bundle with the detector.
    """
    return Section(
        name="suppression",
        command="python -m studies.ablations suppression",
        tables=(Table("Red cells by method of suppression", ("method", *_HEADINGS), _rows(judged)),),
        data={"bundle_id": bundle_id, "ways": judged},
    )


_HEADINGS: Final = (
    "AP50",
    "AP50-95",
    "threshold",
    "counted / labelled",
    "field error, median",
    "mean",
    "crowded: counted / labelled",
    "crowded: mean error",
)


def _rows(judged: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for name, f in judged.items():
        crowded = f["rbc_by_crowding"][-1]
        rows.append(
            (
                name,
                f"{f['rbc_ap50']:.4f}",
                f"{f['rbc_ap50_95']:.4f}",
                f"{f['score_threshold']:.3f}",
                f"{f['rbc_count_ratio']:.3f}",
                f"{f['rbc_field_error_median']:.1%}",
                f"{f['rbc_field_error_mean']:.1%}",
                f"{crowded['count_ratio']:.3f}",
                f"{crowded['field_error_mean']:.1%}",
            )
        )
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class DiameterOptions:
    """How to measure the curve of accuracy against the size at which cells are seen.

    Attributes:
        data: Folder of the public data.
        weights: COCO-pretrained YOLOv5n.
        out: Folder of the datasets and runs.
        epochs: Of each training, all alike. Fewer than what ships, because there are several.
        threads: Of torch.
    """

    data: Path
    weights: Path
    out: Path
    epochs: int = 12
    threads: int = 1


def try_diameter(options: DiameterOptions, diameter_px: int) -> dict[str, Any]:
    """Trains a detector that sees red cells at one size, or takes the finished one, and judges it.

    Args:
        options: How.
        diameter_px: The size, pixels.

    Returns:
        Its figures on the validation photographs, ``milliseconds`` of the network for a photograph (torch,
        fp32, median) and ``pixels`` that it sees of it (median).
    """
    txl, _ = read_public(options.data)
    dataset = options.out / f"dataset-{diameter_px}"
    if not (dataset / "manifest.json").is_file():
        for _step in write_dataset(txl, dataset, cell_diameter_px=diameter_px, crop_margin=0.25):
            pass
    checkpoint = train_detector.train(
        train_detector.DetectorOptions(
            dataset=dataset,
            weights=options.weights,
            out=options.out / f"detector-{diameter_px}",
            epochs=options.epochs,
            image_px=max(64, 32 * round(_IMAGE_CELLS * diameter_px / 32)),
            threads=options.threads,
        )
    )
    torch.set_num_threads(options.threads)
    validation = txl.of("val")
    seen = candidates(checkpoint_look(checkpoint), validation, diameter_px)
    of_source = source_diameters_px(validation)
    pixels = [
        p.width_px * p.height_px * (diameter_px / labelled_diameter_px(p, of_source)) ** 2 for p in validation
    ]
    return {
        **judge(seen, greedy(0.65)),
        "milliseconds": 1000 * float(np.median([c.seconds for c in seen])),
        "pixels": float(np.median(pixels)),
    }


def diameter_section(judged: dict[int, dict[str, Any]], epochs: int) -> Section:
    """Makes the section ``diameter``.

    Args:
        judged: What `try_diameter` said, by diameter in pixels.
        epochs: Of each training.
    """
    rows = _rows({f"{d} px": f for d, f in judged.items()})
    cost = [(f"{f['platelet_ap50']:.3f}", f"{f['milliseconds']:.1f}") for f in judged.values()]
    columns = ("red cell", *_HEADINGS, "platelet AP50", "ms a field")
    return Section(
        name="diameter",
        command="python -m studies.ablations diameter",
        tables=(
            Table(
                "Accuracy against cost",
                columns,
                tuple((*row, *own) for row, own in zip(rows, cost, strict=True)),
            ),
        ),
        data={"epochs": epochs, "diameters": {str(d): f for d, f in judged.items()}},
    )


def try_suppressions(seen: Sequence[Candidates]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Judges all of `SUPPRESSIONS` on the same candidates."""
    for name, way in SUPPRESSIONS.items():
        yield name, judge(seen, way)


def judge_overlap(checkpoints: Sequence[Path], dataset: Path, data: Path) -> list[dict[str, Any]]:
    """Judges overlap CNNs on the verified validation labels, each box cut where its label says.

    Args:
        checkpoints: ``classifier.pt`` of each.
        dataset: Folder of the dataset.
        data: Folder of the public data.

    Returns:
        One entry a checkpoint: how it was taught, its figures at its best threshold, milliseconds for 25
        crops (torch, fp32, median) and parameters.
    """
    photographs = {p.name: p for p in read_public(data)[0].photographs}
    labelled = train_classifier.read_samples(dataset, photographs, "val", "verified")
    judged: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        network, config = networks.load_classifier(checkpoint)
        crops = labelled.crops(float(config["crop_margin"]))
        for turned in (False, True):
            scores = networks.predict(network, crops, turned=turned)
            choice = evaluate.OVERLAP_CANDIDATES
            accuracy = [((scores >= c) == labelled.overlapping).mean() for c in choice]
            threshold = float(choice[int(np.argmax(accuracy))])
            judged.append(
                {
                    **{k: config.get(k) for k in ("model", "labels", "epochs", "crop_margin", "paste")},
                    "pretrained": config.get("detector") is not None,
                    "turned": turned,
                    "threshold": threshold,
                    **asdict(metrics.verdicts(scores, labelled.overlapping, threshold)),
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "milliseconds": _milliseconds(network, crops[:25], turned=turned),
                }
            )
    return judged


def _milliseconds(network: torch.nn.Module, crops: UInt8, *, turned: bool) -> float:
    torch.set_num_threads(1)
    taken = []
    for _ in range(15):
        start = time.perf_counter()
        networks.predict(network, crops, turned=turned)
        taken.append(time.perf_counter() - start)
    return 1000 * float(np.median(taken))


def overlap_section(judged: Sequence[dict[str, Any]]) -> Section:
    """Makes the section ``overlap``.

    Args:
        judged: What `judge_overlap` returned.
    """
    rows = tuple(
        (
            j["model"] + (", eight views" if j["turned"] else ""),
            "our detector" if j["pretrained"] else "noise",
            str(j["labels"]),
            str(j["epochs"]),
            f"{j['auc']:.4f}",
            f"{j['accuracy']:.4f}",
            f"{j['recall_overlapping_at_95']:.3f}",
            f"{j['parameters'] / 1e6:.2f}",
            f"{j['milliseconds']:.1f}",
        )
        for j in judged
    )
    columns = ("network", "begins from", "labels", "epochs", "AUC", "accuracy", "recall at 0.95",
               "million parameters", "ms")  # fmt: skip
    return Section(
        name="overlap",
        command="python -m studies.ablations overlap RUN/classifier.pt ...",
        tables=(Table("Networks", columns, rows),),
        data={"networks": list(judged)},
    )


app = console.program()


@app.command()
def overlap(
    checkpoint: Annotated[list[Path], typer.Argument(help="classifier.pt of each run to compare.")],
    dataset: console.DatasetOption = console.DATASET,
    data: console.Data = console.DATA,
    out: console.Out = results.FOLDER,
) -> None:
    """Judges overlap CNNs that were taught in different ways, on the verified validation labels."""
    console.publish(overlap_section(judge_overlap(checkpoint, dataset, data)), out)


@app.command()
def suppression(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    out: console.Out = results.FOLDER,
) -> None:
    """Judges methods of suppression on the boxes of the bundle's detector before suppression."""
    opened = Bundle.open(bundle)
    seen = candidates(bundle_look(opened), station.validation(data), opened.manifest.cell_diameter_px)
    console.publish(suppression_section(dict(try_suppressions(seen)), opened.bundle_id), out)


@app.command()
def diameter(
    data: console.Data = console.DATA,
    weights: console.WeightsOption = console.WEIGHTS,
    runs: Annotated[Path, typer.Option(help="Folder of the datasets and runs.")] = Path("runs/diameter"),
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 12,
    out: console.Out = results.FOLDER,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Trains a detector at each of several cell sizes and measures accuracy against cost."""
    options = DiameterOptions(data=data, weights=weights, out=runs, epochs=epochs, threads=threads)
    judged = {d: try_diameter(options, d) for d in DIAMETERS_PX}
    console.publish(diameter_section(judged, epochs), out)


if __name__ == "__main__":
    console.answer(app)

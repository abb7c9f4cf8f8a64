"""Outlines of red cells by U-Net, Otsu and watershed, and cells counted by outlines.

``python -m studies.outlines --train`` trains the U-Net on pasted overlaps, two minutes on one free core.
Without ``--train`` it compares the three on cells of which the outline is known, and on whole fields. Reads
top to bottom: the command, the cells, the comparison, the fields, the tables.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import cv2
import numpy as np
import typer

from rbc_edge.ops import synthetic
from rbc_edge.values import Bool, CellClass, Detections, Float32, Int64, Scale, ScaleSource, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.preprocess import CROP_PX
from rbc_train import console, evaluate, metrics, results
from rbc_train.data import Photograph, labelled_diameter_px, source_diameters_px, verified_labels
from rbc_train.labels import VerifiedLabels
from rbc_train.results import Section, Table
from studies import outline_methods, station
from studies.baseline_methods import Components, Watershed
from studies.laboratories import read_everything
from studies.outline_methods import Overlap, Single

Outliner = Callable[[UInt8], list[Bool]]
"""Windows uint8 (N, 64, 64, 3) in, N masks bool (64, 64) out."""

_OF_EACH: Final = 12  # free-standing cells of a photograph: a field of Chula has a hundred
_CUT_PX: Final = 3  # a box nearer to the border may be of a cut cell
_PASTED: Final = 1200
_DRAWN_FIELDS: Final = 6  # of each stain
_SAME_CELL: Final = 0.5  # iou of two masks of one cell
_LOW_SCORE: Final = 0.25  # of the detector's boxes that the masks choose from
_BINS: Final = (
    (0.0, 0.0, "none"),
    (0.0, 0.1, "to 10 %"),
    (0.1, 0.25, "10 to 25 %"),
    (0.25, 1.0, "over 25 %"),
)
_WATERSHED: Final = Watershed(window=0.6, top=0.9)
_COMPONENTS: Final = Components(opening=0.1, brighter=-8)
_LEAST_SCORE: Final = 0.1  # of both: as `studies.baselines` chose on train photographs

app = console.program()


@app.command("outlines")
def outlines_command(
    train: Annotated[bool, typer.Option(help="Train the U-Net, and compare nothing. Continues.")] = False,
    run: Annotated[Path, typer.Option(help="Folder of the trained U-Net.")] = Path("runs/outlines"),
    epochs: Annotated[int, typer.Option(min=1, help="Of the training.")] = 8,
    every: Annotated[int, typer.Option(min=1, help="Count one field in so many.")] = 1,
    sheets: Annotated[
        Path | None, typer.Option(help="Also draw outlines as images into this folder.")
    ] = None,
    data: console.Data = console.DATA,
    bundle: console.BundleOption = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: console.Out = results.FOLDER,
) -> None:
    """Compares outlines by U-Net, Otsu and watershed, and counts whole fields by outlines."""
    if not train:
        network, trained = outline_methods.load(run / outline_methods.CHECKPOINT)
    everything = read_everything(data)
    verified = verified_labels(everything.photographs)
    if train:
        options = outline_methods.TrainingOptions(run, epochs=epochs, threads=threads)
        singles = read_singles(everything.of("train"), verified)
        typer.echo(outline_methods.train(singles, options, console.show_progress))
        return
    outliners: dict[str, Outliner] = {
        "Otsu": lambda w: [outline_methods.otsu(x) for x in w],
        "Watershed": lambda w: [outline_methods.watershed(x) for x in w],
        "U-Net": lambda w: outline_methods.unet_masks(network, w),
    }
    singles = read_singles(everything.of("val"), verified)
    cells = cells_to_judge(singles, _PASTED, _DRAWN_FIELDS)
    judged = {kind: judge(some, outliners) for kind, some in cells.items()}
    fit = fitting(everything.of("val"), verified, outliners)
    if sheets is not None:
        write_sheets(cells, outliners, sheets)
    fields = everything.complete("val")[::every]
    analyzer = station.open_analyzer(bundle, threads)
    counted = count_fields(analyzer, fields, outliners["U-Net"])
    about: dict[str, str | int] = {
        "bundle_id": analyzer.bundle.bundle_id,
        "weights": sum(p.numel() for p in network.parameters()),
        "epochs": trained,
    }
    command = station.command("outlines", every, usual=1)
    console.publish(section(judged, fit, counted, about, command), out)


def read_singles(photographs: Sequence[Photograph], verified: VerifiedLabels) -> list[Single]:
    """Reads free-standing red cells (`outline_methods.free_standing`) that are labelled single.

    Args:
        photographs: To read from.
        verified: Overlap labels.

    Returns:
        The cells, of each photograph at most a dozen.
    """
    of_source = source_diameters_px(photographs)
    singles: list[Single] = []
    for p in photographs:
        labels = [v for v in evaluate.usable(verified, p) if v.label == "single"]
        if not labels:
            continue
        labels = [labels[round(i)] for i in np.linspace(0, len(labels) - 1, min(len(labels), 2 * _OF_EACH))]
        boxes = np.array([v.xyxy for v in labels], np.float32)
        found = [
            Single(crop, mask, p.source)
            for crop, box in zip(*_windows(p, boxes, of_source), strict=True)
            if (mask := outline_methods.free_standing(crop, box)) is not None
        ]
        singles += found[:_OF_EACH]
    return singles


def _windows(p: Photograph, boxes: Float32, of_source: dict[str, float]) -> tuple[UInt8, Float32]:
    """Cuts the windows of boxes (N, 4) out of a photograph. Returns them, and the boxes in their pixels."""
    diameter = labelled_diameter_px(p, of_source)
    crops, shown = outline_methods.windows(p.view(diameter), outline_methods.centres_of(boxes), diameter)
    return crops, _in_window(boxes, shown)


def _in_window(xyxy: Float32, shown: Float32) -> Float32:
    """Brings boxes (N, 4) of a field into their windows, (N, 4): pixels of the window."""
    low, side = np.tile(shown[:, :2], 2), np.tile(shown[:, 2:] - shown[:, :2], 2)
    return np.asarray((xyxy - low) / side * CROP_PX, np.float32)


# -- cells with a known outline ---------------------------------------------------------------------------


def cells_to_judge(singles: Sequence[Single], n_pasted: int, n_fields: int) -> dict[str, list[Overlap]]:
    """Makes the cells on which outlines are compared, by kind.

    Args:
        singles: Free-standing cells that no training saw.
        n_pasted: How many overlaps are pasted from them.
        n_fields: Drawn fields of each stain.
    """
    drawn: list[Overlap] = []
    for seed, stain in enumerate((synthetic.GREY, synthetic.CREAM, synthetic.ROSE)):
        rng = np.random.default_rng(seed)
        for field in synthetic.draw_slide(rng, n_fields, overlap_fraction=0.6, stain=stain):
            drawn += drawn_cells(field)
    return {
        "pasted": outline_methods.draw_overlaps(singles, n_pasted, random.Random(1)),
        "single": [Overlap(s.window, s.mask, 0.0) for s in singles],
        "drawn": drawn,
    }


def drawn_cells(field: synthetic.DrawnField) -> list[Overlap]:
    """Returns each red cell of a drawn field that the border does not cut, with its true outline.

    Light goes through drawn cells, so all of the outline is seen.
    """
    height, width = field.image.shape[:2]
    inside = (field.xyxy[:, :2] > 0).all(1) & (field.xyxy[:, 2:] < (width, height)).all(1)
    which = np.flatnonzero(inside & (field.class_id == CellClass.RBC))
    view = preprocess.view(field.image, field.cell_diameter_px)
    centres = outline_methods.centres_of(field.xyxy[which])
    crops, shown = outline_methods.windows(view, centres, field.cell_diameter_px)
    cells = []
    for i, crop, box in zip(which.tolist(), crops, shown, strict=True):
        mask = _filled(field.outlines[i], box)
        beside = np.zeros_like(mask)
        for j, outline in enumerate(field.outlines):
            if j != i and (outline.max(0) > box[:2]).all() and (outline.min(0) < box[2:]).all():
                beside |= _filled(outline, box)
        cells.append(Overlap(crop, mask, float((mask & beside).sum() / max(int(mask.sum()), 1))))
    return cells


def _filled(outline: Float32, shown: Float32, fine: int = 8) -> Bool:
    """Returns the pixels of a window, bool (64, 64), of which an outline (V, 2) of the field holds half."""
    points = (outline - shown[:2]) / (shown[2:] - shown[:2]) * CROP_PX * fine - 0.5
    canvas = np.zeros((CROP_PX * fine,) * 2, np.float32)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1.0)
    return np.asarray(cv2.resize(canvas, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA) >= 0.5, np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """How a method outlined N cells of one kind. All float32 (N,).

    Attributes:
        overlap: Share of the cell that another one shares.
        iou: Of its mask with the truth.
        mean_px: Mean distance of the outlines at 40 px a cell. NaN where it found nothing.
        p95_px: 95th percentile of that distance.
        area: Area found over true area.
        aspect: Aspect ratio found less the true one. NaN where it found nothing.
    """

    overlap: Float32
    iou: Float32
    mean_px: Float32
    p95_px: Float32
    area: Float32
    aspect: Float32


def judge(cells: Sequence[Overlap], outliners: Mapping[str, Outliner]) -> dict[str, Judged]:
    """Outlines cells by each method and compares with the truth. Hidden cells are left out."""
    cells = [c for c in cells if c.mask.any()]
    shape = (0, CROP_PX, CROP_PX, 3)
    crops = np.stack([c.window for c in cells]) if cells else np.zeros(shape, np.uint8)
    judged = {}
    for name, outliner in outliners.items():
        rows = [_judged(mask, cell) for mask, cell in zip(outliner(crops), cells, strict=True)]
        judged[name] = Judged(*np.array(rows, np.float32).reshape(-1, 6).T)
    return judged


def _judged(mask: Bool, cell: Overlap) -> tuple[float, ...]:
    away = outline_methods.boundary_distances(mask, cell.mask)
    mean, p95 = (float(away.mean()), float(np.percentile(away, 95))) if len(away) else (np.nan, np.nan)
    area = float(mask.sum() / cell.mask.sum())
    aspect = outline_methods.aspect(mask) - outline_methods.aspect(cell.mask)
    return cell.overlap, outline_methods.mask_iou(mask, cell.mask), mean, p95, area, aspect


def fitting(
    photographs: Sequence[Photograph], verified: VerifiedLabels, outliners: Mapping[str, Outliner]
) -> dict[str, dict[str, int]]:
    """Counts uncut cells labelled single whose outline has about the box of their label.

    Without the choice that `read_singles` makes: also cells that a threshold cannot outline.

    Returns:
        ``n`` and ``fit`` by method.
    """
    of_source = source_diameters_px(photographs)
    figures = {name: {"n": 0, "fit": 0} for name in outliners}
    for p in photographs:
        boxes = np.array([v.xyxy for v in evaluate.usable(verified, p) if v.label == "single"], np.float32)
        boxes = boxes.reshape(-1, 4)
        uncut = (boxes[:, :2] > _CUT_PX).all(1) & (
            boxes[:, 2:] < (p.width_px - _CUT_PX, p.height_px - _CUT_PX)
        ).all(1)
        crops, inside = _windows(p, boxes[uncut], of_source)
        for name, outliner in outliners.items():
            fit = [outline_methods.fits(m, b) for m, b in zip(outliner(crops), inside, strict=True)]
            figures[name]["n"] += len(fit)
            figures[name]["fit"] += sum(fit)
    return figures


def write_sheets(
    cells: Mapping[str, Sequence[Overlap]], outliners: Mapping[str, Outliner], folder: Path
) -> None:
    """Draws the first cells of each kind: the window, the truth, and the outline of each method."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, some in cells.items():
        shown = list(some)[:40]
        masks = [
            [c.mask for c in shown],
            *(o(np.stack([c.window for c in shown])) for o in outliners.values()),
        ]
        tiles = [
            np.hstack([_drawn(c.window), *(_drawn(c.window, own[i]) for own in masks)])
            for i, c in enumerate(shown)
        ]
        half = (len(tiles) + 1) // 2
        tiles += [np.zeros_like(tiles[0])] * (2 * half - len(tiles))
        sheet = np.hstack([np.vstack(tiles[:half]), np.vstack(tiles[half:])])
        cv2.imwrite(str(folder / f"{kind}.png"), sheet[:, :, ::-1])


def _drawn(window: UInt8, mask: Bool | None = None, factor: int = 2) -> UInt8:
    large = cv2.resize(window, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    if mask is not None:
        grown = cv2.resize(mask.astype(np.uint8), None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(large, contours, -1, (0, 160, 0), 1)
    return np.asarray(large, np.uint8)


# -- whole fields -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """How many red cells a method counted in one field.

    Attributes:
        laboratory: Of the field.
        method: Its name.
        n: Counted.
        labelled: By the labels.
        hits: Counted cells with a labelled box at iou 0.5.
    """

    laboratory: str
    method: str
    n: int
    labelled: int
    hits: int


def count_fields(analyzer: Analyzer, fields: Iterable[Photograph], unet: Outliner) -> list[Counted]:
    """Counts fields by the detector, by its boxes merged where the U-Net's masks are one cell, and by Otsu.

    Args:
        analyzer: The bundle at work. Every method is told the labelled scale.
        fields: With complete labels.
        unet: The U-Net.
    """
    fields = list(fields)
    of_source = source_diameters_px(fields)
    counted: list[Counted] = []
    low = np.array(analyzer.bundle.manifest.score_threshold, np.float32)
    low[CellClass.RBC] = min(_LOW_SCORE, low[CellClass.RBC])
    for p in fields:
        diameter = labelled_diameter_px(p, of_source)
        field = p.field(diameter)
        result = analyzer.analyze(field, Scale(diameter, ScaleSource.CELL_DIAMETER))
        view, image = analyzer.view(field, result.scale), p.read()
        shipped = _red(result.cells.detections)
        more = _red(analyzer.detector.detect(view, diameter, score_threshold=low))
        found = {
            "detector and CNN, as shipped": shipped,
            "as shipped, merged by U-Net": shipped.take(merged(view, shipped, diameter, unet)),
            f"detector from {_LOW_SCORE:g}": more,
            f"detector from {_LOW_SCORE:g}, merged by U-Net": more.take(merged(view, more, diameter, unet)),
            "Otsu and watershed": _WATERSHED.propose(image, diameter).counted(_LEAST_SCORE).detections,
            "Otsu components": _COMPONENTS.propose(image, diameter).counted(_LEAST_SCORE).detections,
        }
        for method, cells in found.items():
            hits = metrics.match(cells.xyxy, cells.score, p.red_xyxy, min_iou=0.5) >= 0
            counted.append(Counted(p.laboratory, method, len(cells), len(p.red_xyxy), int(hits.sum())))
    return counted


def _red(found: Detections) -> Detections:
    return found.take(found.class_id == CellClass.RBC)


def merged(view: preprocess.View, found: Detections, diameter_px: float, unet: Outliner) -> Int64:
    """Chooses the boxes whose masks are different cells, the surest first.

    Args:
        view: Of the field.
        found: N red cells, pixels of the field.
        diameter_px: Of the slide's red cells, pixels of the field.
        unet: Outlines the cell in the middle of each window.

    Returns:
        int64 (M,), indices of the boxes that are counted. A box without a cell in its middle is not.
    """
    crops, shown = outline_methods.windows(view, outline_methods.centres_of(found.xyxy), diameter_px)
    masks = unet(crops)
    kept: list[int] = []
    for i in np.argsort(-found.score, kind="stable").tolist():
        if masks[i].any() and all(
            same_place_iou(masks[i], shown[i], masks[j], shown[j]) < _SAME_CELL for j in kept
        ):
            kept.append(i)
    return np.array(sorted(kept), np.int64)


def same_place_iou(a: Bool, a_shown: Float32, b: Bool, b_shown: Float32) -> float:
    """Returns the iou of masks in two windows of one size, of which each shows a place (4,) of the field."""
    side = a_shown[2:] - a_shown[:2]
    x, y = np.round((b_shown[:2] - a_shown[:2]) / side * CROP_PX).astype(int).tolist()
    if max(abs(x), abs(y)) >= CROP_PX:
        return 0.0
    own = a[max(y, 0) : CROP_PX + min(y, 0), max(x, 0) : CROP_PX + min(x, 0)]
    other = b[max(-y, 0) : CROP_PX + min(-y, 0), max(-x, 0) : CROP_PX + min(-x, 0)]
    both = int((own & other).sum())
    return both / max(int(a.sum()) + int(b.sum()) - both, 1)


# -- tables -----------------------------------------------------------------------------------------------

_KINDS: Final = {
    "pasted": "Pasted overlaps of validation cells",
    "single": "Single validation cells (their truth is Otsu's outline)",
    "drawn": "Drawn smears",
}


def section(
    judged: Mapping[str, Mapping[str, Judged]],
    fit: Mapping[str, Mapping[str, int]],
    counted: Sequence[Counted],
    about: Mapping[str, str | int],
    command: str = "python -m studies.outlines",
) -> Section:
    """Makes the section ``outlines``.

    Args:
        judged: Of `judge`, by kind of cell.
        fit: Of `fitting`.
        counted: Of `count_fields`.
        about: ``bundle_id`` of what counted fields, ``weights`` and ``epochs`` of the U-Net.
        command: How to get the same again.
    """
    figures = {
        kind: {name: _outline_figures(j) for name, j in methods.items()} for kind, methods in judged.items()
    }
    counts = _count_figures(counted)
    return Section(
        name="outlines",
        command=command,
        tables=(
            *(_outline_table(_KINDS[kind], own) for kind, own in figures.items()),
            _shape_table(figures),
            Table(
                "Uncut validation cells labelled single: outlines that fit the box of the label",
                ("method", "cells", "fit"),
                tuple((k, f"{f['n']}", f"{100 * f['fit'] / max(f['n'], 1):.1f} %") for k, f in fit.items()),
            ),
            _count_table(counts),
        ),
        data={
            **about,
            "low_score": _LOW_SCORE,
            "outlines": figures,
            "fit": fit,
            "counts": counts,
        },
    )


def _outline_figures(judged: Judged) -> dict[str, dict[str, float]]:
    figures = {}
    bins = [("all", np.ones(len(judged.overlap), np.bool_))]
    bins += [
        (name, (judged.overlap <= high) & ((judged.overlap > low) | (high == 0))) for low, high, name in _BINS
    ]
    for name, own in bins:
        if not own.any():
            continue
        found = own & ~np.isnan(judged.mean_px)
        figures[name] = {
            "n": int(own.sum()),
            "iou": float(judged.iou[own].mean()),
            "mean_px": _mean(judged.mean_px[found]),
            "p95_px": _mean(judged.p95_px[found]),
            "not_found": int((own & ~found).sum()),
            "area": _mean(judged.area[found]),
            "area_sd": _sd(judged.area[found]),
            "aspect": _mean(judged.aspect[found]),
            "aspect_sd": _sd(judged.aspect[found]),
        }
    return figures


def _mean(values: Float32) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _sd(values: Float32) -> float:
    return float(values.std()) if len(values) else float("nan")


def _outline_table(caption: str, figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    rows = tuple(
        (
            part, name, f"{f['n']}", f"{f['iou']:.3f}", f"{f['mean_px']:.2f}", f"{f['p95_px']:.2f}",
            f"{f['not_found']}",
        )
        for part in ("all", *(b[2] for b in _BINS))
        for name, own in figures.items()
        if (f := own.get(part)) and not (part == "all" and len(own) == 2)  # one bin holds all of them
    )  # fmt: skip
    columns = ("shared area", "method", "cells", "IoU", "distance, px", "95th percentile, px", "not found")
    return Table(f"{caption}: outline against the truth, at 40 px a cell", columns, rows)


def _shape_table(figures: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Table:
    rows = tuple(
        (
            cells, part, name, f"{100 * (f['area'] - 1):+.1f} ± {100 * f['area_sd']:.1f} %",
            f"{f['aspect']:+.3f} ± {f['aspect_sd']:.3f}",
        )
        for kind, cells in (("single", "single, validation"), ("drawn", "drawn"))
        for part in (b[2] for b in _BINS)
        for name, own in figures.get(kind, {}).items()
        if (f := own.get(part))
    )  # fmt: skip
    columns = ("cells", "shared area", "method", "area against the truth", "aspect ratio less the true one")
    return Table("Area and aspect ratio, mean and SD over cells", columns, rows)


def _count_figures(counted: Sequence[Counted]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns figures by laboratory and method."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for c in counted:
        own = figures.setdefault(c.laboratory, {}).setdefault(c.method, {})
        for name, value in (("fields", 1), ("n", c.n), ("labelled", c.labelled), ("hits", c.hits)):
            own[name] = own.get(name, 0) + value
    for methods in figures.values():
        for own in methods.values():
            own["bias"] = own["n"] / own["labelled"] - 1 if own["labelled"] else float("nan")
            own["f1"] = 2 * own["hits"] / max(own["n"] + own["labelled"], 1)
    return figures


def _count_table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    rows = tuple(
        (
            laboratory, method, f"{f['fields']}", f"{f['labelled']}", f"{f['n']}",
            f"{100 * f['bias']:+.1f} %", f"{f['f1']:.3f}",
        )
        for laboratory, methods in sorted(figures.items())
        for method, f in methods.items()
    )  # fmt: skip
    columns = ("laboratory", "method", "fields", "labelled", "counted", "bias", "F1")
    return Table("Red cells of whole fields, scale told", columns, rows)


if __name__ == "__main__":
    console.answer(app)

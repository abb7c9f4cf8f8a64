"""A bundle by laboratory and by shape: how often it is right, and how often wrong without a flag."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from rbc_edge.values import SHAPES, CellClass
from rbc_edge.vision import quality
from rbc_train import console, metrics
from rbc_train.data import CLASS_NAMES, LABORATORIES
from rbc_train.evaluate import Examined, by_laboratory, class_hits, field_counts, judged_found, verdicts
from rbc_train.metrics import Float64
from rbc_train.results import Section, Table

_LABELLED: Final = 0.9  # of a field's red cells: with fewer verified labels its true share is not known
_KINDS: Final = {
    "single": "single", "touching": "touching", "over": "over or under", "several": "several in the box",
}  # fmt: skip
_NONE: Final = "–"


def figures(examined: Sequence[Examined], overlap_threshold: float) -> dict[str, dict[str, float]]:
    """Computes what a bundle does on each laboratory.

    Args:
        examined: Photographs. Those that are not complete are left out.
        overlap_threshold: The bundle's.

    Returns:
        Figures by laboratory, "all" first, JSON-able.
    """
    complete = [e for e in examined if e.photograph.complete]
    groups = {"all": complete, **by_laboratory(complete)}
    return {name: _of_group(group, overlap_threshold) for name, group in groups.items()}


def learned_from(training: Mapping[str, Any]) -> frozenset[str] | None:
    """Returns the laboratories whose photographs taught a bundle.

    Args:
        training: What the bundle's manifest says about it.

    Returns:
        Their names. None where the manifest does not say it.
    """
    sources = training.get("counts", {}).get("train")
    return None if sources is None else frozenset(LABORATORIES.get(s, s) for s in sources)


def _of_group(group: Sequence[Examined], threshold: float) -> dict[str, float]:
    hits, n_found, n_labelled = class_hits(group, CellClass.RBC)
    counted, labelled = field_counts(group, CellClass.RBC)
    share, true_share = overlapping_shares(group)
    wrong = metrics.fields_off(counted, labelled, share, true_share)
    flagged = np.array([bool(quality.warnings(e.result.flags)) for e in group], np.bool_)
    error = np.abs(metrics.relative_error(counted, labelled)[labelled > 0])
    overlap = verdicts(judged_found(group), threshold)
    known = ~np.isnan(true_share)
    return {
        "fields": len(group),
        "labelled": n_labelled,
        "counted": n_found,
        "recall": hits / n_labelled if n_labelled else math.nan,
        "precision": hits / n_found if n_found else math.nan,
        "f1": 2 * hits / (n_found + n_labelled) if n_found + n_labelled else math.nan,
        "count_bias": n_found / n_labelled - 1 if n_labelled else math.nan,
        "field_error_median": float(np.median(error)) if len(error) else math.nan,
        **asdict(metrics.alarms(wrong, flagged)),
        "share_fields": int(known.sum()),
        "share_bias": float((share - true_share)[known].mean()) if known.any() else math.nan,
        "verified": overlap["n"],
        **{k: overlap[k] for k in ("accuracy", "auc", "precision_overlapping", "calibration_error")},
        **{f"{what}_{kind}": overlap[f"{what}_{kind}"] for kind in _KINDS for what in ("n", "recall")},
        **_others(group, CellClass.WBC, n_labelled),
        **_others(group, CellClass.PLATELET, n_labelled),
        **_refused(group, hits),
    }


def _others(group: Sequence[Examined], cell_class: CellClass, n_red: int) -> dict[str, float]:
    """White cells or platelets: labelled, found, and boxes without one for each thousand red cells."""
    hits, n_found, n_labelled = class_hits(group, cell_class)
    name = CLASS_NAMES[cell_class]
    return {
        f"{name}_labelled": n_labelled,
        f"{name}_recall": hits / n_labelled if n_labelled else math.nan,
        f"{name}_false_per_1000": 1000 * (n_found - hits) / n_red if n_red else math.nan,
    }


def _refused(group: Sequence[Examined], n_kept: int) -> dict[str, float]:
    """What the second stage refused: red cells, and others. `n_kept` of the kept boxes have a label.

    A refused box on a red cell that another box found is no lost cell.
    """
    cells = n = 0
    for e in group:
        truth = e.photograph.red_xyxy
        found = e.result.cells.detections
        found = found.take(found.class_id == CellClass.RBC)
        pairs = metrics.match(found.xyxy, found.score, truth, min_iou=0.5)
        missed = np.delete(truth, pairs[pairs >= 0], axis=0)
        order = np.ones(len(e.refused), np.float32)
        cells += int((metrics.match(e.refused, order, missed, min_iou=0.5) >= 0).sum())
        n += len(e.refused)
    return {
        "refused_cells": cells,
        "refused_cells_share": cells / (cells + n_kept) if cells + n_kept else math.nan,
        "refused_others": n - cells,
    }


def overlapping_shares(group: Sequence[Examined]) -> tuple[Float64, Float64]:
    """Returns each field's overlapping share, float64 (F,): as counted, and by the verified labels.

    By the labels it is NaN where fewer than nine in ten red cells of the field have one.
    """
    counted, labelled = [], []
    for e in group:
        fraction = e.result.counts.overlap_fraction
        counted.append(math.nan if fraction is None else fraction)
        n = int((e.photograph.class_id == CellClass.RBC).sum())
        enough = n > 0 and len(e.overlapping) >= _LABELLED * n
        labelled.append(float(e.overlapping.mean()) if enough else math.nan)
    return np.array(counted, np.float64), np.array(labelled, np.float64)


def by_shape(examined: Sequence[Examined]) -> dict[str, dict[str, float]]:
    """Computes what becomes of the cells of each shape.

    A point is found if it lies in a box of a red cell. A point is single if its labelled box is.

    Args:
        examined: Photographs, those with points count.

    Returns:
        Figures by shape, "all" first: points, share found, share of found ones called overlapping, and the
        same of those that are labelled single. Shapes that no point has are left out.
    """
    rows: list[tuple[str, bool, bool, bool]] = []  # shape, found, called overlapping, labelled single
    for e in examined:
        points = e.photograph.points
        where = np.array([(p.x, p.y) for p in points], np.float32).reshape(-1, 2)
        cells = e.result.cells
        red = np.flatnonzero(cells.detections.class_id == CellClass.RBC)
        found = metrics.match_points(where, cells.detections.xyxy[red])
        boxes = np.array([v.xyxy for v in e.photograph.verified], np.float32).reshape(-1, 4)
        own = metrics.match_points(where, boxes)
        rows += [
            (
                point.shape,
                bool(f >= 0),
                bool(f >= 0 and cells.overlapping[red[f]]),
                bool(b >= 0 and e.photograph.verified[b].label == "single"),
            )
            for point, f, b in zip(points, found.tolist(), own.tolist(), strict=True)
        ]
    shapes = [s for s in SHAPES if any(r[0] == s for r in rows)]
    return {s: _of_shape([r for r in rows if s in ("all", r[0])]) for s in ("all", *shapes) if rows}


def _of_shape(rows: Sequence[tuple[str, bool, bool, bool]]) -> dict[str, float]:
    called = [r[2] for r in rows if r[1]]
    single = [r[2] for r in rows if r[1] and r[3]]
    return {
        "points": len(rows),
        "found": len(called) / len(rows),
        "called_overlapping": sum(called) / len(called) if called else math.nan,
        "single": len(single),
        "single_called_overlapping": sum(single) / len(single) if single else math.nan,
    }


def tables(
    of_laboratory: Mapping[str, Any],
    of_shape: Mapping[str, Any],
    learned: Collection[str] | None,
    *,
    by: str = "by laboratory",
) -> tuple[Table, ...]:
    """Lays the figures out for readers.

    Args:
        of_laboratory: What `figures` returned.
        of_shape: What `by_shape` returned.
        learned: Names in `of_laboratory` that the bundle learned from. None where it is not known.
        by: What the rows are, for the captions.

    Returns:
        Headline figures and flags, red cells, overlap, kinds of overlap, other boxes, and shapes where there
        are points.
    """

    def rows(cells: Callable[[Mapping[str, Any]], tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
        return tuple((name, *cells(f)) for name, f in of_laboratory.items())

    taught = {
        name: _NONE if learned is None or name == "all" else "yes" if name in learned else "no"
        for name in of_laboratory
    }
    made = [
        Table(
            f"Right or flagged, {by}. A field is wrong if its count is off by more than 15 % and two cells, "
            "or its overlapping share by more than 15 points. It is silent if it is wrong without a flag, a "
            "hit with one. A false alarm is a flag on a field that is right",
            (
                "laboratory", "learned from it", "fields", "F1", "count", "overlap accuracy", "share, points",
                "silent", "wrong", "hits", "false alarms",
            ),
            tuple(
                (
                    name, taught[name], str(f["fields"]), _figure(f["f1"]), _percent(f["count_bias"], "+.1f"),
                    _figure(f["accuracy"]), _figure(100 * f["share_bias"], "+.1f"),
                    f"{f['silent']} ({_percent(f['silent_share'])})", str(f["wrong"]),
                    f"{f['wrong'] - f['silent']} ({_percent(f['hit_rate'])})",
                    f"{f['false']} ({_percent(f['false_share'])})",
                )
                for name, f in of_laboratory.items()
            ),
        ),
        Table(
            f"Red cells {by}, at the shipped thresholds, iou 0.5",
            ("laboratory", "labelled", "counted", "recall", "precision", "F1", "median field error"),
            rows(
                lambda f: (
                    str(f["labelled"]), str(f["counted"]),
                    *(_figure(f[k]) for k in ("recall", "precision", "f1")),
                    _percent(f["field_error_median"]),
                )
            ),
        ),
        Table(
            f"Overlap {by}, found cells with a verified label. Calibration error: the expected one, "
            "ten bins of equal width. The share is judged in fields with a label on nine in ten red cells",
            (
                "laboratory", "cells", "accuracy", "AUC", "overlapping: precision", "calibration error",
                "fields with a share", "share, points",
            ),
            rows(
                lambda f: (
                    str(f["verified"]),
                    *(
                        _figure(f[k])
                        for k in ("accuracy", "auc", "precision_overlapping", "calibration_error")
                    ),
                    str(f["share_fields"]), _figure(100 * f["share_bias"], "+.1f"),
                )
            ),
        ),
        Table(
            f"Verdicts {by}, by kind: share of the found cells with a verified label that is right (number "
            "of cells)",
            ("laboratory", *_KINDS.values()),
            rows(lambda f: tuple(f"{_figure(f[f'recall_{k}'])} ({f[f'n_{k}']})" for k in _KINDS)),
        ),
        Table(
            f"White cells, platelets and refused boxes {by}. False ones: for each thousand red cells. The "
            "second stage refuses red cells (their share of those found before), and other boxes",
            (
                "laboratory", "white cells", "found", "false white cells", "platelets", "platelets found",
                "false platelets", "refused red cells", "refused others",
            ),
            rows(
                lambda f: (
                    *(
                        cell
                        for k in ("wbc", "platelet")
                        for cell in (
                            str(f[f"{k}_labelled"]), _figure(f[f"{k}_recall"]),
                            _figure(f[f"{k}_false_per_1000"], ".1f"),
                        )
                    ),
                    f"{f['refused_cells']} ({_percent(f['refused_cells_share'])})",
                    str(f["refused_others"]),
                )
            ),
        ),
    ]  # fmt: skip
    if of_shape:
        made.append(
            Table(
                "Points of Chula by shape: found as a red cell, and called overlapping",
                (
                    "shape",
                    "points",
                    "found",
                    "of them overlapping",
                    "found, labelled single",
                    "of them overlapping",
                ),
                tuple(
                    (
                        name, str(f["points"]), _figure(f["found"]), _figure(f["called_overlapping"]),
                        str(f["single"]), _figure(f["single_called_overlapping"]),
                    )
                    for name, f in of_shape.items()
                ),
            )
        )  # fmt: skip
    return tuple(made)


def text(made: Sequence[Table]) -> str:
    """Lays tables out for the terminal."""
    return "\n".join(f"{t.caption}:\n{console.aligned(t.columns, t.rows)}" for t in made)


def section(
    of_laboratory: Mapping[str, Any],
    of_shape: Mapping[str, Any],
    learned: Collection[str] | None,
    *,
    bundle_id: str,
    scale: str,
) -> Section:
    """Makes the section ``laboratories``.

    Args:
        of_laboratory: What `figures` returned.
        of_shape: What `by_shape` returned.
        learned: What `learned_from` returned.
        bundle_id: Of the bundle.
        scale: How the station got the scale: estimated or labelled.

    Returns:
        The section.
    """
    return Section(
        name="laboratories",
        command="python -m rbc_train evaluate" + ("" if scale == "estimated" else f" --scale {scale}"),
        tables=tables(of_laboratory, of_shape, learned),
        data={
            "bundle_id": bundle_id,
            "scale": scale,
            "learned": None if learned is None else sorted(learned),
            "laboratories": of_laboratory,
            "shapes": of_shape,
        },
    )


def _figure(value: float, form: str = ".3f") -> str:
    return _NONE if math.isnan(value) else f"{value:{form}}"


def _percent(value: float, form: str = ".1f") -> str:
    return _NONE if math.isnan(value) else f"{100 * value:{form}} %"

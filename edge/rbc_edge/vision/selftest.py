"""The bundle's test field on this machine, compared with what the export found."""

import json
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from rbc_edge.errors import BundleError, ImageError
from rbc_edge.values import CellClass, Detections, FieldOfView, Scale, ScaleSource
from rbc_edge.vision import image_file
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import TEST_EXPECTED, TEST_INPUT, Bundle

# How far the 8-bit kernels of two processors may differ.
_SAME_CELL: Final = 0.15  # of a cell diameter
_CLEAR: Final = 0.15  # of the detector's score, over its threshold
_SCORE_ERROR: Final = 0.25
_REFUSED_ERROR: Final = 1  # box: a cell here and refused there, near that threshold


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The cells of the bundle's test field, on this machine and at the export."""

    n_expected: int  # cells that the export found
    n_found: int  # cells that this machine finds
    n_unmatched: int  # clear cells (score well over the threshold) that only one of them finds
    box_error_px: float  # largest difference of a matched box, pixels of the field
    score_error: float  # largest difference of a matched detector or overlap score


def expectation(analyzer: Analyzer, field: FieldOfView, cell_diameter_px: float) -> dict[str, object]:
    """Returns the content of ``test-expected.json``: every cell of the test field (the export calls this)."""
    result = analyzer.analyze(field, Scale(cell_diameter_px, ScaleSource.CELL_DIAMETER))
    cells = result.cells
    return {
        "cell_diameter_px": cell_diameter_px,
        "xyxy": np.round(cells.detections.xyxy.astype(float), 2).tolist(),
        "class_id": cells.detections.class_id.tolist(),
        "score": np.round(cells.detections.score.astype(float), 4).tolist(),
        "overlap_score": [None if np.isnan(s) else round(float(s), 4) for s in cells.overlap_score],
        "n_refused": result.n_refused,
    }


def verify(bundle: Bundle, *, threads: int = 0) -> SelfTest:
    """Counts the bundle's test field and compares the cells with those that the export found.

    8-bit kernels differ between processors: cells near the threshold may come or go, clear cells may not. One
    box may be a cell on the one and refused on the other. Raises `BundleError` where this machine finds other
    cells than the export.
    """
    place = bundle.path / TEST_EXPECTED
    try:
        expected = json.loads(place.read_text(encoding="utf-8"))
        xyxy, score = (np.array(expected[name], np.float32) for name in ("xyxy", "score"))
        wanted = Detections(xyxy.reshape(-1, 4), score, np.array(expected["class_id"], np.int64))
        diameter, n_refused = float(expected["cell_diameter_px"]), int(expected["n_refused"])
        wanted_overlap = np.array([np.nan if s is None else s for s in expected["overlap_score"]], np.float32)
        if len(wanted_overlap) != len(wanted) or not 0 < diameter < math.inf:
            raise ValueError("lengths or diameter are wrong")
        if not set(wanted.class_id.tolist()) <= set(CellClass):
            raise ValueError("unknown class")
        field = image_file.load_field(bundle.path / TEST_INPUT, "bundle", "test")
    except (OSError, ValueError, KeyError, TypeError, ImageError) as error:
        message = f"{place}: the bundle's test is broken: {error}"
        raise BundleError(message, "export the bundle again") from error
    scale = Scale(diameter, ScaleSource.CELL_DIAMETER)
    result = Analyzer(bundle, threads=threads).analyze(field, scale)
    cells, found = result.cells, result.cells.detections
    least = np.array(bundle.manifest.score_threshold, np.float32)
    ours, theirs = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for i in range(len(wanted)):
        distance = np.abs(found.xyxy - wanted.xyxy[i]).max(axis=1, initial=0.0)
        same = (found.class_id == wanted.class_id[i]) & (distance <= _SAME_CELL * diameter)
        same[ours] = False
        if same.any():
            ours = np.append(ours, np.where(same, distance, np.inf).argmin())
            theirs = np.append(theirs, i)
    n_unmatched = 0
    for each, matched in ((found, ours), (wanted, theirs)):
        is_clear = each.score > least[each.class_id] + _CLEAR
        n_unmatched += int(np.count_nonzero(np.delete(is_clear, matched)))
    box_error = float(np.abs(found.xyxy[ours] - wanted.xyxy[theirs]).max(initial=0.0))
    score_error = np.abs(found.score[ours] - wanted.score[theirs]).max(initial=0.0)
    overlap_error = np.nan_to_num(np.abs(cells.overlap_score[ours] - wanted_overlap[theirs])).max(initial=0.0)
    largest = float(max(score_error, overlap_error))
    n_turned = abs(result.n_refused - n_refused)
    has_other_cells = n_turned > _REFUSED_ERROR or n_unmatched > n_turned
    if len(wanted) == 0 or has_other_cells or overlap_error > _SCORE_ERROR:
        seen = f"sees {len(found)} cells where the export saw {len(wanted)}"
        turned = f"{n_turned} more or fewer are refused"
        differ = f"{n_unmatched} clear ones differ, {turned}, scores by up to {largest:.2f}"
        advice = "report this with the output of `rbc-edge bundle show` and the processor's name"
        raise BundleError(f"{bundle.path}: on its test field this machine {seen}; {differ}", advice)
    return SelfTest(len(wanted), len(found), n_unmatched, box_error, largest)

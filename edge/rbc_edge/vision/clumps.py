"""Clumps: refused boxes that hold several red cells. Shown larger, their cells may be found one by one."""

from dataclasses import replace
from typing import Final

import numpy as np

from rbc_edge.values import Bool, CellClass, Detections, Float32, Int64
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import centre_inside
from rbc_edge.vision.detector import Detector

MAX_SEARCHED: Final = 8  # clumps of a field: bounds its time
# In cell diameters. Of the labelled boxes of one red cell, 3 in 100 have a larger mean side.
_SIDE: Final = 1.15
_SEVERAL: Final = 1.3  # two cells that lie half over each other; one cell in 300 is as large
_STRIP: Final = 0.5  # a narrower box is a strip at the border of the field
_FINER: Final = 1.7  # so much larger the cells are shown
_AROUND: Final = 1.0  # so that cells at the border of the clump are seen whole


def among(xyxy: Float32, refused: Bool, cell_diameter_px: float) -> Int64:
    """Returns which `refused` boxes, of (N, 4), are too large for one cell: (K,), the largest first."""
    sides = xyxy[:, 2:] - xyxy[:, :2]
    mean = np.sqrt(sides[:, 0] * sides[:, 1])
    is_clump = (mean > _SIDE * cell_diameter_px) & (sides.min(axis=1) > _STRIP * cell_diameter_px)
    order = np.argsort(-mean, kind="stable")
    return np.asarray(order[(refused & is_clump)[order]], np.int64)


def holds_several(clump: Float32, cell_diameter_px: float) -> bool:
    """Tells whether a clump, float32 (4,), is so large that more than one cell lies in it."""
    return bool(np.sqrt(np.prod(clump[2:] - clump[:2])) > _SEVERAL * cell_diameter_px)


def search(
    detector: Detector, view: preprocess.View, clump: Float32, cell_diameter_px: float, known: Detections
) -> Detections:
    """Searches a clump, float32 (4,), at a finer scale.

    Returns red cells with their centre in it that no known box shows, in reading order.
    """
    around = _AROUND * cell_diameter_px * np.array([-1, -1, 1, 1], np.float32)
    part, corner = view.part(clump + around)
    found = detector.detect(part, cell_diameter_px / _FINER)
    found = replace(found, xyxy=np.minimum(found.xyxy + corner, np.array(view.size * 2, np.float32)))
    found = found.take((found.class_id == CellClass.RBC) & centre_inside(found.xyxy, clump))
    # The clump itself may be found again, too.
    itself = Detections(clump[None], np.ones(1, np.float32), np.array([CellClass.RBC], np.int64))
    return found.take(detector.is_new(found, Detections.joined([known, itself])))

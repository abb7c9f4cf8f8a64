"""The black around a field: of an eyepiece, or bars that a program added.

The lit part of a field is the convex hull of what is bright. It stands in a black surround where all beyond
the hull is black and a corner of the image is among it. A vignette fades and is no surround. The surround is
no glass, and its rim is no cell.
"""

import math
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, CellClass, Detections, Float32, UInt8

_SIDE_PX: Final = 256  # of the sample that is looked at
_BRIGHT_PERCENT: Final = 98
_MIN_BRIGHT: Final = 40  # grey level of a field that is too dark to have a rim
_LIT: Final = 0.45  # of the bright level, in the brightest channel: a stained cell reaches it
_BLACK: Final = 0.12
_MIN_SOLID: Final = 0.75  # of the hull: a smear is no scattered blobs, as bright cells on black are
_MIN_BLACK: Final = 0.85  # of what lies beyond the hull: the rest is writing
_MIN_BEYOND: Final = 0.005  # of the image
_MIN_LIT: Final = 0.05  # of the image
_ANGLES: Final = np.arange(24) * (2 * np.pi / 24)
_RIM: Final = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1).astype(np.float32)
_INNER: Final = (
    np.stack(np.meshgrid(*[np.linspace(-0.9, 0.9, 9)] * 2), axis=-1).reshape(-1, 2).astype(np.float32)
)
_REACH: Final = 1.08  # of a box's half sides: a cell whose outline comes so near to the rim is cut by it
_MOSTLY: Final = 0.5


def lit(image: UInt8) -> Bool | None:
    """Tells which pixels of a field, uint8 (H, W, 3) RGB, are lit: bool (H, W). None: all of them."""
    corner = float(image[[0, 0, -1, -1], [0, -1, 0, -1]].max(axis=1).min())
    if corner > _BLACK * 255:  # most fields
        return None
    height, width = image.shape[:2]
    step = max(1, math.ceil(max(height, width) / _SIDE_PX))
    level = image[::step, ::step].max(axis=2)
    bright = float(np.percentile(level, _BRIGHT_PERCENT))
    if bright < _MIN_BRIGHT or corner > _BLACK * bright:
        return None
    core = (level > _LIT * bright).astype(np.uint8)
    core = np.asarray(cv2.morphologyEx(core, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)), np.uint8)
    _, label, stats, _ = cv2.connectedComponentsWithStats(core)
    if len(stats) < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    hull = cv2.convexHull(np.argwhere(label == largest)[:, ::-1].astype(np.int32))
    inside = np.zeros(level.shape, np.uint8)
    cv2.fillConvexPoly(inside, hull, 1)
    beyond = level[inside == 0]
    n = int(inside.sum())
    is_surround = (
        n >= _MIN_LIT * level.size
        and len(beyond) >= _MIN_BEYOND * level.size
        and stats[largest, cv2.CC_STAT_AREA] >= _MIN_SOLID * n
        and (beyond < _BLACK * bright).mean() >= _MIN_BLACK
    )
    if not is_surround:
        return None
    mask = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(mask, hull * step, 1)
    # The sample's last row and column stand for what is left of the image.
    rows, columns = (level.shape[0] - 1) * step, (level.shape[1] - 1) * step
    mask[rows:], mask[:, columns:] = mask[rows], mask[:, columns : columns + 1]
    return mask.astype(np.bool_)


def sides(xyxy: Float32, lit: Bool) -> Bool:
    """Tells which boxes, float32 (N, 4) in pixels of `lit`, the rim of the surround cuts, and on which side.

    Returns bool (N, 4): left, top, right, bottom. A cell at the rim is cut on one side: the one that looks
    most into the surround.
    """
    dark = ~_at(xyxy, _RIM * np.float32(_REACH), lit)  # (N, P)
    into = np.asarray(dark @ _RIM, np.float32)  # (N, 2), x and y
    reaches = np.concatenate([-into, into], axis=1)  # left, top, right, bottom
    most = np.arange(4) == np.argmax(reaches, axis=1, keepdims=True)
    return np.asarray(most & dark.any(axis=1, keepdims=True), np.bool_)


def without_rim(found: Detections, xyxy: Float32, lit: Bool) -> Detections:
    """Leaves out what is mostly surround, and white cells at the rim: the rim looks like a dark nucleus.

    `xyxy` are the boxes of `found` in pixels of `lit`.
    """
    at_rim = sides(xyxy, lit).any(axis=1) & (found.class_id == CellClass.WBC)
    mostly = _at(xyxy, _INNER, lit).mean(axis=1) < _MOSTLY
    return found.take(np.asarray(~(at_rim | mostly), np.bool_))


def _at(xyxy: Float32, points: Float32, lit: Bool) -> Bool:
    """Returns bool (N, P): whether points of each box, (P, 2) in its half sides, are lit."""
    centre, half = (xyxy[:, None, :2] + xyxy[:, None, 2:]) / 2, (xyxy[:, None, 2:] - xyxy[:, None, :2]) / 2
    place = np.floor(centre + half * points).astype(np.int64)
    height, width = lit.shape
    return np.asarray(lit[place[..., 1].clip(0, height - 1), place[..., 0].clip(0, width - 1)], np.bool_)

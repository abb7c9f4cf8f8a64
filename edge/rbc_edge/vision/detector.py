"""Finds cells: one field of view in, boxes in pixels of the field out.

The field is resized so that a red cell measures the bundle's `cell_diameter_px`, and cut into tiles if it is
large. The boxes of all tiles are put together. Outside this module boxes are in pixels of the field.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from rbc_edge.errors import ImageError
from rbc_edge.values import Bool, Detections, Float32, Int64, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import Grid, iou, reading_order
from rbc_edge.vision.bundle import DETECTOR, Bundle

_SEAM_PX = 4.0  # two tiles place a cell's centre a little differently, so near the seam both keep it
_SAME_BOX_IOU = 0.75  # such boxes show the same cell. Their mean is better than one of them
_FEW = 1_000  # boxes: all with all is faster then
_PAIRS_AT_ONCE = 500_000  # bounds the memory of suppression
_VOTES_AT_ONCE = 8_000_000  # that of voting; more than any tile of a smear
MAX_BOXES = 150_000  # 250 megapixels packed with cells of 40 pixels. Other patterns would take minutes


class Detector:
    """YOLOv5n of a bundle (`file`: int8 or fp32), on the CPU.

    `threads` tiles of a large field are analyzed at the same time. `detect` may be called from as many
    threads as well.
    """

    def __init__(self, bundle: Bundle, *, threads: int, file: str = DETECTOR) -> None:
        self.manifest = bundle.manifest
        # Each thread takes a tile or a field of its own, so no operator waits for another thread.
        self._session = bundle.session(file, threads=1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rbc-edge-tile") if threads > 1 else None
        within, across = self.manifest.iou_threshold, self.manifest.iou_threshold_across
        self._iou_thresholds = np.array(within, np.float32), across
        self._score_threshold = np.array(self.manifest.score_threshold, np.float32)

    def detect(
        self,
        image: preprocess.View | UInt8,
        cell_diameter_px: float,
        *,
        score_threshold: Float32 | None = None,
    ) -> Detections:
        """Finds the cells of one field of view, in reading order of their centres.

        The diameter and the result are in pixels of the field. `image` is the view of a field for about this
        diameter, or uint8 (H, W, 3) RGB, balanced. `score_threshold` is float32 (3,), the smallest score by
        class. None: the bundle's.
        """
        view = image if isinstance(image, preprocess.View) else preprocess.View.of(image)
        least = self._score_threshold if score_threshold is None else score_threshold
        manifest, (height, width) = self.manifest, view.image.shape[:2]
        small = preprocess.detector_input(view, cell_diameter_px, manifest.cell_diameter_px)
        rows, columns = small.shape[:2]
        tiles = preprocess.tiles(columns, rows, tile_px=manifest.tile_px, overlap_px=manifest.tile_overlap_px)
        in_order = map if self._pool is None or len(tiles) == 1 else self._pool.map
        found, n_boxes = [], 0
        for some in in_order(lambda tile: self._detect_tile(small, tile, least), tiles):
            found.append(some)
            n_boxes += len(some)
            if n_boxes > MAX_BOXES:
                what = f"more than {MAX_BOXES:,} things like cells are seen in it: that is not a smear"
                raise ImageError("not-a-smear", what, "check the image, and the scale if you gave it")
        merged = Detections.joined(found)
        # Sizes are rounded to whole pixels: each axis has its own exact factor.
        back = np.array([width / columns, height / rows] * 2, np.float32)
        xyxy = np.clip(merged.xyxy * back, 0, np.array([width, height] * 2, np.float32)).astype(np.float32)
        merged = replace(merged, xyxy=xyxy)
        if len(found) > 1:
            merged = merged.take(self._suppress(merged))
        merged = merged.take(reading_order(merged.xyxy))
        # The last pixel of a view may reach beyond the field.
        return replace(merged, xyxy=np.minimum(merged.xyxy * view.px, np.array(view.size * 2, np.float32)))

    def _detect_tile(self, small: UInt8, tile: preprocess.Tile, least: Float32) -> Detections:
        """Returns what one tile's core holds, in pixels at model scale, after suppression."""
        window, left, top = preprocess.pad_to_stride(small[tile.y0 : tile.y1, tile.x0 : tile.x1])
        given = {"image": window[None], "least_score": least.astype(np.float32)}
        boxes, scores = self._session.run(["boxes", "scores"], given)
        # There are no cells in the padding: boxes are cut at the image border.
        limit = np.array([tile.x1 - tile.x0, tile.y1 - tile.y0] * 2, np.float32)
        boxes = np.clip(boxes - np.array([left, top] * 2, np.float32), 0, limit)
        found = Detections(boxes, scores.max(axis=1), scores.argmax(axis=1).astype(np.int64))
        inside = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(axis=1)
        found = found.take(inside & (found.score >= least[found.class_id]))
        kept = self._suppress(found)
        voters = np.asarray(found.score >= self._score_threshold[found.class_id], np.bool_)
        found = replace(found.take(kept), xyxy=vote(found, kept, voters))
        xyxy = found.xyxy + np.array([tile.x0, tile.y0] * 2, np.float32)
        centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2
        low = np.array(tile.core[:2], np.float32) - _SEAM_PX
        high = np.array(tile.core[2:], np.float32) + _SEAM_PX
        mine = np.asarray(((centre >= low) & (centre < high)).all(axis=1), np.bool_)
        return Detections(xyxy, found.score, found.class_id).take(mine)

    def is_new(self, found: Detections, known: Detections) -> Bool:
        """Tells which of N boxes show a cell that no known box shows: bool (N,)."""
        return np.asarray(~one_cell(found, known, *self._iou_thresholds).any(axis=1), np.bool_)

    def _suppress(self, found: Detections) -> Int64:
        return suppress(found, *self._iou_thresholds)


def vote(found: Detections, kept: Int64, voters: Bool) -> Float32:
    """Moves each box that stays to the mean of the boxes of the same cell, weighted by score and iou.

    Several places of the network find each cell. Suppression keeps the box with the best score, but its place
    is not the best one (box voting: Gidaris and Komodakis 2015). On the validation photographs AP50-95 of red
    cells rises by 0.007, AP50 stays.

    `kept` is int64 (M,), indices of those that stay. `voters`, bool (N,), take part, and a kept box always
    takes part in its own mean. Returns float32 (M, 4), xyxy in the same frame.
    """
    n_rows = max(1, _VOTES_AT_ONCE // max(len(found), 1))
    if len(kept) > n_rows:  # a field full of boxes
        parts = (kept[start : start + n_rows] for start in range(0, len(kept), n_rows))
        return np.concatenate([vote(found, some, voters) for some in parts])
    votes = (found.class_id[kept][:, None] == found.class_id) & voters
    weight = iou(found.xyxy[kept], found.xyxy)
    weight = np.where(votes & (weight >= _SAME_BOX_IOU), weight, 0.0) * found.score
    weight[np.arange(len(kept)), kept] = found.score[kept]
    return np.asarray(weight @ found.xyxy / weight.sum(axis=1, keepdims=True), np.float32)


def suppress(found: Detections, iou_threshold: Float32, iou_threshold_across: float) -> Int64:
    """Greedy non-maximum suppression that keeps cells apart which lie over each other.

    Returns int64 (M,): indices that stay, best score first. See `one_cell` for the thresholds.
    """
    order = np.argsort(-found.score, kind="stable")
    found = found.take(order)
    alive = np.ones(len(order), np.bool_)
    kept: list[int] = []
    # Of many boxes, only those that lie near each other are compared, and only what is still there: all with
    # all takes minutes for a field full of boxes.
    grid = Grid(found.xyxy) if len(order) > _FEW else None
    up_to = np.zeros(len(order), np.int64) if grid is None else np.cumsum(grid.n_near)
    start = 0
    while start < len(order):
        done = int(up_to[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(up_to, done + _PAIRS_AT_ONCE, side="right")))
        rows = start + np.flatnonzero(alive[start:stop])
        if grid is None:
            a, b = np.nonzero(one_cell(found, found, iou_threshold, iou_threshold_across))
        else:
            a, b = grid.near(rows)
            same_class = found.class_id[a] == found.class_id[b]
            limit = np.where(same_class, iou_threshold[found.class_id[a]], iou_threshold_across)
            same = iou(found.xyxy[a][:, None], found.xyxy[b][:, None])[:, 0] > limit
            a, b = a[same], b[same]
        ends = np.searchsorted(a, rows, side="right")
        for i, first, end in zip(
            rows.tolist(), np.searchsorted(a, rows).tolist(), ends.tolist(), strict=True
        ):
            if alive[i]:
                kept.append(i)
                alive[b[first:end]] = False
        start = stop
    return order[np.array(kept, np.int64)]


def one_cell(a: Detections, b: Detections, iou_threshold: Float32, iou_threshold_across: float) -> Bool:
    """Tells which of N boxes are one cell with which of M boxes: bool (N, M).

    These have a larger iou: than `iou_threshold`, float32 (3,), for boxes of one class, than
    `iou_threshold_across` for boxes of different classes.
    """
    same_class = a.class_id[:, None] == b.class_id
    limit = np.where(same_class, iou_threshold[a.class_id, None], iou_threshold_across)
    return np.asarray(iou(a.xyxy, b.xyxy) > limit, np.bool_)

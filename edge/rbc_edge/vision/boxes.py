"""Geometry of boxes: overlap, the border, neighbours. All boxes are xyxy, pixels of the field of view."""

import numpy as np

from rbc_edge.values import Bool, Float32, Int64

EDGE_MARGIN = 1 / 40
"""A box that ends this near to the border, in cell diameters, counts as cut by it.

The detector's boxes are short by about a pixel. With this margin, as many found red cells as labelled ones
touch a border of the validation photographs (``python -m rbc_train evaluate``).
"""

# Boxes of cells that touch just meet, and the detector's boxes are a few per cent too short or too long.
_GROWTH = 0.05
_SQUARES_A_BOX = 16
_PAIRS_AT_ONCE = 2_000_000  # bounds the memory of a field where all boxes share their x range


def touches_edge(xyxy: Float32, width_px: int, height_px: int, cell_diameter_px: float) -> Bool:
    """Tells which boxes, float32 (N, 4), reach the border of their field. All numbers are its pixels.

    Returns bool (N, 4): left, top, right, bottom. A side counts as reached from `EDGE_MARGIN` on.
    """
    x_min, y_min, x_max, y_max = xyxy.T
    m = EDGE_MARGIN * cell_diameter_px
    sides = (x_min <= m, y_min <= m, x_max >= width_px - m, y_max >= height_px - m)
    return np.stack(sides, axis=1).astype(np.bool_)


def reading_order(xyxy: Float32) -> Int64:
    """Returns the order of boxes, float32 (N, 4), by their centres: y, then x."""
    centre = xyxy[:, :2] + xyxy[:, 2:]
    return np.lexsort((centre[:, 0], centre[:, 1]))


def centre_inside(xyxy: Float32, box: Float32) -> Bool:
    """Tells which boxes, float32 (N, 4), have their centre in a box, float32 (4,): bool (N,)."""
    centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2
    return np.asarray(((centre >= box[:2]) & (centre < box[2:])).all(axis=1), np.bool_)


def iou(a: Float32, b: Float32) -> Float32:
    """Intersection over union, float32 (N, M), of boxes float32 (N, 4) with boxes float32 (M, 4).

    Boxes float32 (N, 1, 4) with (N, K, 4), or of any shapes that go together, give one value for each pair.

    >>> iou(np.array([[0, 0, 2, 2]], np.float32), np.array([[1, 0, 3, 2]], np.float32)).round(3).tolist()
    [[0.3330000042915344]]
    """
    a, b = (a[:, None], b[None]) if a.ndim == b.ndim == 2 else (a, b)
    shared = _shared(a, b)
    union = _area(a) + _area(b) - shared
    return np.asarray(shared / np.maximum(union, 1e-9), np.float32)


def shared_area(a: Float32, b: Float32) -> Float32:
    """Returns the area, float32 (N, M), that boxes float32 (N, 4) share with boxes float32 (M, 4)."""
    return _shared(a[:, None], b[None])


def _shared(a: Float32, b: Float32) -> Float32:
    width, height = (
        np.minimum(a[..., k + 2], b[..., k + 2]) - np.maximum(a[..., k], b[..., k]) for k in (0, 1)
    )
    return np.asarray(np.maximum(width, 0) * np.maximum(height, 0), np.float32)


def _area(boxes: Float32) -> Float32:
    return np.asarray(np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1), np.float32)


class Grid:
    """Boxes, float32 (N, 4), by the squares of a grid that they reach into: who may overlap whom."""

    def __init__(self, xyxy: Float32) -> None:
        sides = xyxy[:, 2:] - xyxy[:, :2]
        side = max(float(np.median(sides)), 1.0) if len(xyxy) else 1.0
        # A few boxes may be as large as the field. So many squares that they cost more than all others do.
        while True:
            self._first = np.floor(xyxy[:, :2] / side).astype(np.int64)
            self._n = np.floor(xyxy[:, 2:] / side).astype(np.int64) - self._first + 1
            if (n := self._n.prod(axis=1)).sum() <= _SQUARES_A_BOX * len(xyxy):
                break
            side *= 2
        self._first -= self._first.min(axis=0, initial=0)
        self._width = int((self._first[:, 0] + self._n[:, 0]).max(initial=1))
        owner, square = self._squares(np.arange(len(xyxy)))
        order = np.argsort(square, kind="stable")
        self._boxes = owner[order]
        self._starts = np.searchsorted(square[order], np.arange(square.max(initial=0) + 2))
        n_in = np.diff(self._starts)[square]
        self.n_near = np.add.reduceat(n_in, np.cumsum(n) - n) if len(n) else n  # at most so many pairs

    def near(self, some: Int64) -> tuple[Int64, Int64]:
        """Returns pairs (a, b): a of `some`, in their order, with each box b that may overlap it.

        A pair may come several times, and each box with itself.
        """
        a, square = self._squares(some)
        which, member = _ranges(self._starts[square], np.diff(self._starts)[square])
        return a[which], self._boxes[member]

    def _squares(self, some: Int64) -> tuple[Int64, Int64]:
        """Returns box and square, for each square that the boxes reach into."""
        n = self._n[some]
        which, k = _ranges(np.zeros(len(some), np.int64), n.prod(axis=1))
        x = self._first[some[which], 0] + k % n[which, 0]
        return some[which], (self._first[some[which], 1] + k // n[which, 0]) * self._width + x


def _ranges(start: Int64, n: Int64) -> tuple[Int64, Int64]:
    """Returns (i, value) for the numbers from start[i] on, n[i] of them, for each i."""
    which = np.repeat(np.arange(len(n)), n)
    return which, np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + start[which]


def touching_pairs(boxes: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[Int64, Int64]:
    """Returns the index pairs (a, b), each once, of the boxes float64 (N, 4) that intersect when grown."""
    grow = (boxes[:, 2:] - boxes[:, :2]) * (_GROWTH / 2)
    low, high = boxes[:, :2] - grow, boxes[:, 2:] + grow
    order = np.argsort(low[:, 0], kind="stable")
    low, high = low[order], high[order]
    # Sweep along x: partners of i start after i and begin before i ends.
    first = np.arange(1, len(boxes) + 1)
    n_candidates = np.maximum(np.searchsorted(low[:, 0], high[:, 0], side="right") - first, 0)
    ends = np.cumsum(n_candidates)
    found_a, found_b = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    start = 0
    while start < len(boxes):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        n = n_candidates[start:stop]
        a = np.repeat(np.arange(start, stop), n)
        b = a + 1 + np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        hit = (low[b, 1] <= high[a, 1]) & (low[a, 1] <= high[b, 1])
        found_a.append(order[a[hit]])
        found_b.append(order[b[hit]])
        start = stop
    return np.concatenate(found_a), np.concatenate(found_b)

"""Red cells by textbook image processing: Hough circles, blobs, watershed, connected components.

Every method turns a photograph into `Proposals`, as the networks of `baseline_networks` do.
"""

import math
from dataclasses import dataclass
from typing import Final, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from rbc_edge.values import Bool, Cells, Detections, Float32, UInt8
from rbc_edge.vision import preprocess

_NUCLEUS_CHROMA: Final = 60
"""Largest less smallest channel of a stained nucleus or platelet, on balanced photographs. Medians of the
train photographs: red cells 22 to 36, nuclei 103 to 127."""
_SMALL: Final = 0.25  # of a cell's area: specks and platelets
_RIM: Final = 0.08  # of a cell's diameter: around a nucleus, so that no ring of its white cell is left
PIERCED: Final = 0.35  # of a cell's area: a hole as large as this is glass, not the pale middle of a cell


@dataclass(frozen=True, slots=True, eq=False)
class Proposals:
    """What a method saw in one photograph.

    Attributes:
        detections: Red cells down to a low score.
        contact: float32 (N, N), 0..1: how surely cell i overlaps cell j. On the diagonal, how surely it
            overlaps whatever is no cell of this list.
    """

    detections: Detections
    contact: Float32

    def counted(self, least_score: float) -> Cells:
        """Returns the cells over a score, in reading order. Only they overlap each other.

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

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        """Looks at one photograph.

        Args:
            image: uint8 (H, W, 3) RGB, as the camera gave it.
            diameter_px: Diameter of its red cells, as its labels say. Pixels.

        Returns:
            Cells in pixels of the photograph.
        """


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """A photograph prepared for image processing, at a size of its own.

    Attributes:
        cell_px: Diameter of a red cell here.
        green: uint8 (h, w), the channel that red cells absorb, balanced.
        cells: uint8 (h, w), 1 where a red cell lies. Pale middles filled, white cells cut out.
        whites: float32 (W, 3), x, y and radius of each white cell.
        factor: float32 (4,), size here over size in the photograph, for x, y, x, y.
        limit: float32 (4,), width, height, width, height of the photograph.
    """

    cell_px: float
    green: UInt8
    cells: UInt8
    whites: Float32
    factor: Float32
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
    """Prepares a photograph. What is darker than Otsu's threshold plus `brighter` is cell."""
    small = preprocess.detector_input(preprocess.view(image, diameter_px), diameter_px, cell_px)
    size = np.array([image.shape[1], image.shape[0]] * 2, np.float32)
    factor = np.array([small.shape[1], small.shape[0]] * 2, np.float32) / size
    cell_px = diameter_px * math.sqrt(factor[0] * factor[1])  # `detector_input` may make it a little smaller
    small = np.asarray(cv2.GaussianBlur(small, (0, 0), 0.025 * cell_px), np.uint8)
    green = np.ascontiguousarray(small[:, :, 1])
    stained = ((small.max(axis=2) - small.min(axis=2)) > _NUCLEUS_CHROMA).astype(np.uint8)
    whites = _white_cells(stained, cell_px)
    # Nuclei are darker by far, and would draw Otsu's threshold down to themselves.
    threshold = _otsu(green[stained == 0]) + brighter
    cells = (green <= threshold).astype(np.uint8)
    for x, y, radius in whites.tolist():
        cv2.circle(cells, (round(x), round(y)), round(radius), 0, -1)
    cells = without_small_holes(cells, PIERCED * math.pi / 4 * cell_px**2)
    return _Scene(cell_px, green, cells, whites, factor, limit=size)


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


def without_small_holes(cells: UInt8, glass_area: float) -> UInt8:
    """Fills what is not cell, is surrounded, and is smaller than glass between cells: pale middles."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - cells, connectivity=4)
    height, width = cells.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    inside = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    hole = inside & (stats[:, cv2.CC_STAT_AREA] < glass_area)
    hole[0] = False  # the cells themselves
    return np.asarray(np.maximum(cells, hole[labels]), np.uint8)


def _circles(scene: _Scene, x: Float32, y: Float32, radius: Float32, score: Float32) -> Proposals:
    """Makes cells of circles. They overlap as far as they reach into each other."""
    keep = ~scene.in_white(x, y)
    x, y, radius, score = x[keep], y[keep], radius[keep], score[keep]
    ring = np.stack([x, y, radius], axis=1)
    contact = _reach(ring, ring, scene.cell_px)
    np.fill_diagonal(contact, _reach(ring, scene.whites, scene.cell_px).max(axis=1, initial=0.0))
    box = np.stack([x - radius, y - radius, x + radius, y + radius], axis=1)
    found = Detections(scene.boxes(box), score.astype(np.float32), np.zeros(len(x), np.int64))
    return Proposals(found, contact)


def _reach(a: Float32, b: Float32, cell_px: float) -> Float32:
    """Returns float32 (N, M): a half where two circles touch, towards 1 as they reach into each other."""
    gap = np.hypot(a[:, None, 0] - b[None, :, 0], a[:, None, 1] - b[None, :, 1]) - (
        a[:, None, 2] + b[None, :, 2]
    )
    return np.asarray(1 / (1 + np.exp(gap / (0.1 * cell_px))), np.float32)


@dataclass(frozen=True, slots=True)
class Hough:
    """Circular Hough transform (Guan & Yan 2011, Varun & Priya 2018), OpenCV's gradient method.

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

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        found = cv2.HoughCirclesWithAccumulator(
            scene.green,
            cv2.HOUGH_GRADIENT,
            1.0,  # accumulator as fine as the image
            self.spacing * scene.cell_px,
            param1=self.edge,
            param2=6,  # the score's threshold comes later
            minRadius=round(0.35 * scene.cell_px),
            maxRadius=round(0.65 * scene.cell_px),
        )
        rows = np.asarray(() if found is None else found, np.float32).reshape(-1, 4)
        x, y, radius, votes = rows.T
        share = _share_inside(scene.cells, x, y, radius)
        return _circles(
            scene, x, y, radius, np.sqrt(np.clip(votes / (math.pi * scene.cell_px) * share, 0, 1))
        )


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
    is. All else becomes white. Blobs are dark regions between a quarter and four cells in area.
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

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
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
        wanted.minDistBetweenBlobs = 0.4 * scene.cell_px
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
        likeness = np.minimum(2 * radius / scene.cell_px, scene.cell_px / np.maximum(2 * radius, 1))
        return _circles(scene, x, y, radius, likeness)


@dataclass(frozen=True, slots=True)
class Watershed:
    """Otsu's threshold, distance transform, watershed from its tops.

    Score: distance at the top over a cell's radius. Overlap: length of the border that two regions share.

    Attributes:
        window: Diameter of the neighbourhood whose largest distance makes the top, cell diameters.
        top: Share of that distance from which a pixel belongs to the top. 1 for the maximum alone.
        by_image: Whether borders follow the photograph's edges. Else they lie midway between the tops.
        cell_px: Diameter of a red cell where this method looks, pixels.
        brighter: Of the foreground, over Otsu's threshold, grey levels.
    """

    window: float = 0.5
    top: float = 0.9
    by_image: bool = False
    cell_px: float = 40.0
    brighter: int = 0

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        floor = scene.green // 2 if self.by_image else np.zeros_like(scene.green)
        basins, distance = split(scene.cells, floor, scene.cell_px, self.window, self.top)
        n = max(int(basins.max()), 1)
        height = np.zeros(n, np.float32)
        inner = np.maximum(basins - 1, 0)  # 0 glass and lines, then the regions
        np.maximum.at(height, inner.ravel(), distance.ravel())
        return _regions(scene, inner, _shared_borders(basins, n), np.clip(height / (scene.cell_px / 2), 0, 1))


def split(
    cells: UInt8, floor: UInt8, cell_px: float, window: float, top: float
) -> tuple[npt.NDArray[np.int32], Float32]:
    """Takes cells apart: distance transform, watershed from its tops.

    Args:
        cells: uint8 (h, w), 1 where a cell lies.
        floor: uint8 (h, w), 0..127: where the flood comes last. Zeros for borders midway between the tops.
        cell_px: Diameter of a cell, pixels.
        window: See `Watershed`.
        top: See `Watershed`.

    Returns:
        int32 (h, w): 1 glass, from 2 the regions, -1 the lines around them. float32 (h, w): the distance.
    """
    # OpenCV's watershed draws a line along the image border: let that line lie outside.
    cells, floor = (
        np.asarray(cv2.copyMakeBorder(part, 1, 1, 1, 1, cv2.BORDER_REPLICATE), np.uint8)
        for part in (cells, floor)
    )
    distance = cv2.distanceTransform(cells, cv2.DIST_L2, cv2.DIST_MASK_5)
    distance = np.asarray(cv2.GaussianBlur(distance, (0, 0), 0.03 * cell_px), np.float32)
    side = 2 * round(window * cell_px / 2) + 1
    around = cv2.dilate(distance, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    tops = ((distance >= top * around) & (distance > 0.15 * cell_px) & (cells == 1)).astype(np.uint8)
    _, markers = cv2.connectedComponents(tops, connectivity=8)
    markers[markers > 0] += 1
    markers[cells == 0] = 1  # glass
    # OpenCV floods across the smallest difference first: glass as a step, so that no cell runs over.
    basins = cv2.watershed(cv2.merge([np.where(cells == 1, floor, 255).astype(np.uint8)] * 3), markers)
    return np.asarray(basins, np.int32)[1:-1, 1:-1], np.asarray(distance[1:-1, 1:-1], np.float32)


def _shared_borders(basins: npt.NDArray[np.int32], n: int) -> Float32:
    """Returns float32 (n, n): pixels of the line between each two of the regions 2..n of a watershed.

    Row and column 0 stand for glass and are empty. Region i of the watershed has row i - 1.
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
) -> Proposals:
    """Makes cells of labelled regions 1..n-1.

    Args:
        scene: Where they lie.
        labels: int32 (h, w), 0 for none.
        shared: float32 (n, n), length of the border that two regions share, pixels.
        score: float32 (n,).
        own: float32 (n,), how surely a region is several cells. None when a region is one cell.

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
    return Proposals(found, contact[np.ix_(keep, keep)])


def _of_length(border_px: Float32, cell_px: float) -> Float32:
    """Turns the length of a shared border into 0..1: a half at a quarter of a cell diameter."""
    return np.asarray(border_px / (border_px + cell_px / 4), np.float32)


@dataclass(frozen=True, slots=True)
class Components:
    """Connected components of the foreground, each one cell: a clump counts as one.

    Score: area over a cell's, at most 1. Overlap: how many cells' area the component holds.

    Attributes:
        opening: Diameter of the opening that cuts thin bridges, cell diameters. 0 for none.
        cell_px: Diameter of a red cell where this method looks, pixels.
        brighter: Of the foreground, over Otsu's threshold, grey levels.
    """

    opening: float = 0.0
    cell_px: float = 40.0
    brighter: int = 0

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        """Looks at one photograph (see `Method`)."""
        scene = _scene(image, diameter_px, self.cell_px, self.brighter)
        cells = scene.cells
        if self.opening > 0:
            side = 2 * round(self.opening * scene.cell_px / 2) + 1
            kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
            cells = np.asarray(cv2.morphologyEx(cells, cv2.MORPH_OPEN, kernel), np.uint8)
        n, labels, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
        cells_in_it = stats[:, cv2.CC_STAT_AREA].astype(np.float32) / scene.cell_area
        several = (cells_in_it / (cells_in_it + 2)).astype(np.float32)
        none = np.zeros((n, n), np.float32)
        score = np.clip(cells_in_it, 0, 1).astype(np.float32)
        return _regions(scene, np.asarray(labels, np.int32), none, score, several)

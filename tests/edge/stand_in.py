"""Plain images with a known number of cells, and an analyzer that counts them without a network."""

import csv
import os
from collections.abc import Sequence
from math import nan
from pathlib import Path

import cv2
import numpy as np

from rbc_edge.station.job import Analyzing
from rbc_edge.values import Cells, Detections, FieldOfView, FovResult, Measure, Scale, UInt8
from rbc_edge.vision.boxes import touches_edge
from rbc_edge.vision.counting import groups

BUNDLE_ID = "0123456789abcdef"
TOY_BUNDLE = Path(__file__).parent / "toy_bundle"


def disks(n: int, *, seed: int = 0, columns: int = 6) -> UInt8:
    """A bright RGB field with `n` dark disks of 40 px that touch neither each other nor the border."""
    image = np.full((60 * 4, 60 * columns, 3), 230, np.uint8)
    image[0, 0] = np.random.default_rng(seed).integers(200, 255, 3)  # other seeds, other content
    for i in range(n):
        centre = (30 + 60 * (i % columns), 30 + 60 * (i // columns))
        cv2.circle(image, centre, 20, (200, 120, 150), -1)
    return image


def scene(height: int = 40, width: int = 60) -> UInt8:
    """Every pixel its own colour, no two channels alike: shows a swap, a flip, a shift."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 6, 255 - x * 2 - y], axis=2).astype(np.uint8)


def encoded(image: UInt8, suffix: str = ".png") -> bytes:
    """An image file's bytes."""
    done, data = cv2.imencode(suffix, image[:, :, ::-1])
    assert done
    return data.tobytes()


def write_disks(path: Path | bytes, n: int, *, seed: int = 0) -> None:
    """Writes a PNG of `n` disks, whatever the path's suffix."""
    folder = os.path.dirname(path)  # noqa: PTH120 -- names that are not UTF-8 come as bytes
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(encoded(disks(n, seed=seed)))


class StandIn:
    """Counts dark blobs as red cells: overlapping in the right half, single in the left."""

    def __init__(self) -> None:
        self.analyzed: list[str] = []
        self.scales: list[Scale] = []
        self.n_measured = 0

    def measure(self, images: Sequence[UInt8], start: int, /) -> list[Measure]:
        return [self.measured(image, start) for image in images]

    def measured(self, image: UInt8, start: int) -> Measure:
        self.n_measured += 1
        seen = bool((image[:, :, 1] < 180).any())
        return Measure(40.0 if seen else nan, 9 * seen, image.shape[0] * image.shape[1])

    def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
        self.analyzed.append(f"{field.slide_id}/{field.fov}")
        self.scales.append(scale)
        height, width = field.image.shape[:2]
        dark = (field.image[:, :, 1] < 180).astype(np.uint8)
        stats = cv2.connectedComponentsWithStats(dark)[2][1:]
        xyxy = np.hstack([stats[:, :2], stats[:, :2] + stats[:, 2:4]]).astype(np.float32)
        n = len(xyxy)
        class_id = np.zeros(n, np.int64)
        overlapping = (xyxy[:, 0] > width / 2).astype(np.bool_)
        cells = Cells(
            Detections(xyxy, np.full(n, 0.9, np.float32), class_id),
            np.where(overlapping, 0.8, 0.1).astype(np.float32),
            overlapping,
            groups(xyxy, class_id, overlapping),
            touches_edge(xyxy, width, height, 40.0),
        )
        return FovResult(width, height, scale, cells)


def check_protocol(analyzer: StandIn) -> Analyzing:
    """Lets the type checker say that the stand-in is an analyzer."""
    return analyzer


_TIMES = ("analyzed_at", "elapsed_ms")


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    """Returns every table in a folder, by its path there, without what differs from run to run."""
    found = {}
    for path in sorted(out.rglob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: v for k, v in row.items() if k not in _TIMES} for row in csv.DictReader(file)]
        found[path.relative_to(out).as_posix()] = rows
    return found

"""Tiny images, and an analyzer that costs nothing: a run then measures scan, ledger and tables only.

``python -m bench.tiny FOLDER --n 500`` writes the images.
"""

import argparse
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from rbc_edge.values import Cells, Detections, FieldOfView, FovResult, Measure, Scale, ScaleSource, UInt8
from rbc_edge.vision.boxes import touches_edge
from rbc_edge.vision.counting import groups

FIELDS_A_SLIDE: Final = 100
_SIDE_PX: Final = 16
_N_CELLS: Final = 20
_SCALE: Final = Scale(100.0, ScaleSource.SLIDE)


def twenty_cells(rng: np.random.Generator) -> FovResult:
    """A typical result of a field of 640x480: twenty cells, some of them in groups."""
    low = rng.uniform(0, 500, (_N_CELLS, 2)).astype(np.float32)
    xyxy = np.hstack([low, low + 100])
    class_id = np.zeros(_N_CELLS, np.int64)
    overlapping = rng.random(_N_CELLS) < 0.5
    found = Detections(xyxy, rng.random(_N_CELLS).astype(np.float32), class_id)
    score = rng.random(_N_CELLS).astype(np.float32)
    in_groups = groups(xyxy, class_id, overlapping)
    cells = Cells(found, score, overlapping, in_groups, touches_edge(xyxy, 640, 480, 100.0))
    return FovResult(640, 480, _SCALE, cells)


class Instant:
    """Replaces the analyzer: returns the same twenty cells for every image, at once."""

    def __init__(self) -> None:
        self._result = twenty_cells(np.random.default_rng(0))

    def measure(self, images: Sequence[UInt8], start: int, /) -> list[Measure]:
        """Returns the same measure for all images."""
        del start
        return [Measure(_SCALE.cell_diameter_px, _N_CELLS, i.shape[0] * i.shape[1]) for i in images]

    def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
        """Returns the same cells for all fields."""
        del field, scale
        return self._result


def write_tiny(folder: Path, n: int, *, a_slide: int = FIELDS_A_SLIDE) -> None:
    """Writes `n` BMP images of 16x16 px, each with its own content, `a_slide` of them in each slide."""
    row = _SIDE_PX * 3
    header = struct.pack("<2sIHHI", b"BM", 54 + row * _SIDE_PX, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, _SIDE_PX, _SIDE_PX, 1, 24, 0, row * _SIDE_PX, 0, 0, 0, 0)
    for i in range(n):
        slide = folder / f"slide-{i // a_slide:05}"
        if i % a_slide == 0:
            slide.mkdir(parents=True)
        pixels = struct.pack("<I", i) + bytes(row * _SIDE_PX - 4)
        (slide / f"fov-{i:06}.bmp").write_bytes(header + pixels)


def main() -> None:
    """Writes the images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--slide", type=int, default=FIELDS_A_SLIDE, help="Images in a slide.  [100]")
    asked = parser.parse_args()
    write_tiny(asked.folder, asked.n, a_slide=asked.slide)


if __name__ == "__main__":
    main()

"""What an image costs as there are more of them, and as they hold more cells. A process of its own.

``python -m bench.growth images --n 100 1000``: whole runs over so many tiny images (a counter of cells that
costs nothing in the networks' place), so that scan, ledger and tables are all there is; and then what
another 200 images cost a service whose ledger holds those already. ``python -m bench.growth cells``: drawn
fields with more and more cells in them, through the real analyzer.
"""

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from rbc_edge.ops import synthetic
from rbc_edge.station.runner import RunOptions, run_once
from rbc_edge.store.ledger import Entry, Ledger, Version
from rbc_edge.values import Cells, Detections, FieldOfView, FovResult, InboxFile, Scale, ScaleSource, UInt8
from rbc_edge.views.tables import Tables
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.boxes import touches_edge
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import groups

FIELDS_A_SLIDE: Final = 100
N_ADDED: Final = 200
_BUNDLE_ID: Final = "0" * 16
_SIDE_PX: Final = 16
_CROWDINGS: Final = (0.03, 0.08, 0.16, 0.32)
_N_CELLS: Final = 20
_SCALE: Final = Scale(100.0, ScaleSource.SLIDE)


def twenty_cells(rng: np.random.Generator) -> FovResult:
    """A result as a field of 640x480 gives it: twenty cells, some of them in groups."""
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
    """In the analyzer's place: the same twenty cells for every image, at once."""

    def __init__(self) -> None:
        self._result = twenty_cells(np.random.default_rng(0))

    def estimate_scale(self, images: Sequence[UInt8], /) -> Scale:
        """A scale, whatever the images."""
        del images
        return _SCALE

    def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
        """Twenty cells, whatever the field."""
        del field, scale
        return self._result


def write_tiny(folder: Path, n: int) -> None:
    """Writes `n` BMP images of 16x16 px, each of another content, a hundred to a slide."""
    row = _SIDE_PX * 3
    header = struct.pack("<2sIHHI", b"BM", 54 + row * _SIDE_PX, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, _SIDE_PX, _SIDE_PX, 1, 24, 0, row * _SIDE_PX, 0, 0, 0, 0)
    for i in range(n):
        slide = folder / f"slide-{i // FIELDS_A_SLIDE:05}"
        if i % FIELDS_A_SLIDE == 0:
            slide.mkdir(parents=True)
        pixels = struct.pack("<I", i) + bytes(row * _SIDE_PX - 4)
        (slide / f"fov-{i:06}.bmp").write_bytes(header + pixels)


def cost_of_run(n: int, base: Path) -> tuple[float, float]:
    """Runs over `n` tiny images, and again with nothing to do; returns milliseconds an image of both."""
    write_tiny(base / "camera", n)
    took = []
    for _ in range(2):
        started_s = time.perf_counter()
        summary = run_once(RunOptions((base / "camera",), base / "out"), _BUNDLE_ID, Instant)
        took.append((time.perf_counter() - started_s) * 1e3 / n)
        if summary.n_failed or summary.n_images != n:
            raise SystemExit(f"bench/growth.py: of {n} tiny images {summary.n_failed} failed")
    return took[0], took[1]


def cost_of_adding(out: Path, n: int) -> tuple[float, float]:
    """Adds images to a ledger as a service does that gets them one by one: a row, a commit, its tables.

    Returns:
        Milliseconds an image: of the ledger, and of the tables. Two slides of a hundred are added.
    """
    result = twenty_cells(np.random.default_rng(1))
    ledger_s = tables_s = 0.0
    with Ledger(out) as ledger:
        tables = Tables(out, ledger)
        tables.write()  # a service writes them at its start
        for i in range(N_ADDED):
            slide = f"added-{i // FIELDS_A_SLIDE}"
            file = InboxFile(out / "none" / f"{i}.jpg", slide, f"fov-{i:06}", 1000, 1)
            version = Version(_BUNDLE_ID, "estimated")
            entry = Entry(file, version, f"{n}-{i}", datetime.now(UTC).isoformat())
            started_s = time.perf_counter()
            ledger.begin_attempts([file])
            if ledger.settle(entry) is None:
                ledger.record_ok(entry, result)
            ledger.commit()
            between_s = time.perf_counter()
            tables.write({slide})
            ledger_s += between_s - started_s
            tables_s += time.perf_counter() - between_s
    return ledger_s * 1e3 / N_ADDED, tables_s * 1e3 / N_ADDED


def images(numbers: Sequence[int]) -> list[dict[str, float]]:
    """The cost of an image by the number of images."""
    told = []
    for n in numbers:
        with tempfile.TemporaryDirectory() as name:
            base = Path(name)
            first, again = cost_of_run(n, base)
            ledger, tables = cost_of_adding(base / "out", n)
        told.append(
            {"n": n, "run_ms": first, "again_ms": again, "add_ledger_ms": ledger, "add_tables_ms": tables}
        )
    return told


def cells(*, threads: int, rounds: int) -> list[dict[str, float]]:
    """The cost of a field of 1280x960 by the number of its cells; the best of some interleaved rounds."""
    bundle = Bundle.open()
    analyzer = Analyzer(bundle, threads=threads)
    scale = Scale(70.0, ScaleSource.CELL_DIAMETER)
    fields = [
        [
            FieldOfView.of(drawn.image, slide_id="s", fov=f"{i}")
            for i, drawn in enumerate(
                synthetic.draw_slide(
                    np.random.default_rng(i),
                    3,
                    width_px=1280,
                    height_px=960,
                    cell_diameter_px=70.0,
                    crowding=crowding,
                )
            )
        ]
        for i, crowding in enumerate(_CROWDINGS)
    ]
    found = [[len(analyzer.analyze(f, scale).cells) for f in group] for group in fields]
    took: list[list[float]] = [[] for _ in fields]
    for _ in range(rounds):
        for i, group in enumerate(fields):
            started_s = time.perf_counter()
            for one in group:
                analyzer.analyze(one, scale)
            took[i].append((time.perf_counter() - started_s) * 1e3 / len(group))
    return [
        {"cells": float(np.mean(n)), "ms": float(np.median(ms))} for n, ms in zip(found, took, strict=True)
    ]


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["images", "cells"])
    parser.add_argument("--n", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    is_images = asked.what == "images"
    print(json.dumps(images(asked.n) if is_images else cells(threads=asked.threads, rounds=asked.rounds)))


if __name__ == "__main__":
    main()

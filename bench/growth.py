"""What an image costs with more and more images, and with more and more cells in it.

``python -m bench.growth images --n 100 1000`` runs over that many tiny images without networks (see `tiny`),
so that scan, ledger and tables are all that costs time. Then it adds 200 images, as a service does that has
counted the others before. ``python -m bench.growth cells`` counts drawn fields with more and more cells in
them, with the real analyzer.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from bench.tiny import FIELDS_A_SLIDE, Instant, twenty_cells, write_tiny
from rbc_edge.ops import synthetic
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import FieldOfView, InboxFile, Scale, ScaleSource
from rbc_edge.views.tables import Tables
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle

N_ADDED: Final = 200
_BUNDLE_ID: Final = "0" * 16
_CROWDINGS: Final = (0.03, 0.08, 0.16, 0.32)


def cost_of_run(n: int, base: Path) -> tuple[float, float]:
    """Runs over `n` tiny images, then again with nothing to do. Returns milliseconds an image of both."""
    write_tiny(base / "camera", n)
    took = []
    for _ in range(2):
        started_s = time.perf_counter()
        options = CountOptions(base / "out", AnalyzerRecipe(_BUNDLE_ID, Instant))
        summary = count_once((base / "camera",), options)
        took.append((time.perf_counter() - started_s) * 1e3 / n)
        if summary.n_failed or summary.n_images != n:
            raise SystemExit(f"bench/growth.py: of {n} tiny images {summary.n_failed} failed")
    return took[0], took[1]


def cost_of_adding(out: Path, n: int) -> tuple[float, float]:
    """Adds 200 images in two slides to a ledger, one by one, each with a row, a commit and its tables.

    Returns:
        Milliseconds an image for the ledger, and for the tables.
    """
    result = twenty_cells(np.random.default_rng(1))
    ledger_s = tables_s = 0.0
    with Ledger(out) as ledger:
        tables = Tables(out, ledger)
        tables.write()  # as a service does when it starts
        for i in range(N_ADDED):
            slide = f"added-{i // FIELDS_A_SLIDE}"
            file = InboxFile(out / "none" / f"{i}.jpg", slide, f"fov-{i:06}", 1000, 1)
            version = Version(_BUNDLE_ID, "estimated")
            look = Look(file, f"{n}-{i}", result=result)
            started_s = time.perf_counter()
            ledger.begin([file])
            ledger.record(look, version, datetime.now(UTC).isoformat())
            ledger.commit()
            between_s = time.perf_counter()
            tables.write({slide})
            ledger_s += between_s - started_s
            tables_s += time.perf_counter() - between_s
    return ledger_s * 1e3 / N_ADDED, tables_s * 1e3 / N_ADDED


def images(numbers: Sequence[int]) -> list[dict[str, float]]:
    """Measures the cost of an image for each number of images."""
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
    """Measures the cost of a field of 1280x960 by the number of its cells: the median of some rounds."""
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

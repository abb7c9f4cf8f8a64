"""Times the station: ``make bench``. A program, never a test: medians and spread, all sides in one run.

Draws fields of view (or takes a folder of photographs) and measures, on one and on two threads, each stage
of the pipeline and the floor: bare decode plus both bare sessions and nothing else. These machines are
shared and noisy: compare within one run.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from rbc_edge import imaging, smear
from rbc_edge.analyzer import Analyzer
from rbc_edge.bundle import CLASSIFIER, DETECTOR, Bundle
from rbc_edge.runner import RunOptions, run_once
from rbc_edge.values import CellClass


def spread(samples_ms: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = statistics.quantiles(samples_ms, n=4)
    return middle, high - low


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def draw(folder: Path, n: int) -> list[Path]:
    """Draws `n` JPEG fields of 640x480."""
    files = []
    for i, field in enumerate(smear.draw_slide(np.random.default_rng(0), n, cell_diameter_px=100.0)):
        _, data = cv2.imencode(".jpg", field.image[:, :, ::-1])
        files.append(folder / f"field-{i:04}.jpg")
        files[-1].write_bytes(data.tobytes())
    return files


def stages(files: list[Path], threads: int) -> dict[str, list[float]]:
    """Milliseconds a field by stage, and of the floor, for every file."""
    bundle = Bundle.open()
    analyzer = Analyzer(bundle, threads=threads)
    scale = analyzer.estimate_scale([imaging.load_field(f, "s", f.name).image for f in files[:8]])
    detect = bundle.session(DETECTOR, threads=threads)
    classify = bundle.session(CLASSIFIER, threads=threads)
    out: dict[str, list[float]] = {"decode": [], "total": [], "floor": []}
    for file in files:
        start = time.perf_counter()
        field = imaging.load_field(file, "s", file.name)
        out["decode"].append((time.perf_counter() - start) * 1000)
        result = analyzer.analyze(field, scale)
        out["total"].append((time.perf_counter() - start) * 1000)
        for stage, value in result.timings_ms.items():
            out.setdefault(stage, []).append(value)
        # The floor works on inputs that are ready: nothing but the decoder and the two networks.
        factor = bundle.manifest.cell_diameter_px / scale.cell_diameter_px
        small, _, _ = imaging.pad_to_stride(imaging.rescale(field.image, factor))
        found = result.cells.detections
        boxes = found.xyxy[found.class_id == CellClass.RBC]
        crops = imaging.crops(field.image, boxes, margin=bundle.manifest.crop_margin)
        data = np.frombuffer(file.read_bytes(), np.uint8)

        def floor(data: object = data, small: object = small, crops: object = crops) -> None:
            cv2.imdecode(data, cv2.IMREAD_COLOR)  # type: ignore[call-overload]
            detect.run(None, {"image": small[None]})  # type: ignore[index]
            classify.run(None, {"crops": crops})

        out["floor"].append(timed(floor))
    return out


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "source", nargs="?", type=Path, help="Folder of photographs; drawn fields when not given."
    )
    parser.add_argument("--fields", type=int, default=100)
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    asked = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "drawn").mkdir()
        files = (
            sorted(f for f in asked.source.iterdir() if f.suffix.lower() in imaging.IMAGE_SUFFIXES)[
                : asked.fields
            ]
            if asked.source
            else draw(work / "drawn", asked.fields)
        )
        for threads in (1, 2):
            measured = stages(files, threads)
            run_ms = timed(
                lambda t=threads: run_once(  # type: ignore[misc]
                    RunOptions(tuple(files), work / f"out-{t}"),
                    "bench",
                    lambda: Analyzer(Bundle.open(), threads=t),
                )
            )
            middle = {k: spread(v) for k, v in measured.items()}
            print(f"{len(files)} fields of view, threads: {threads}; ms a field, median (iqr)")
            for stage, (median, iqr) in middle.items():
                print(f"  {stage:9} {median:8.2f} ({iqr:.2f})")
            ratio = middle["total"][0] / middle["floor"][0]
            per_s = len(files) / run_ms * 1000
            print(f"  total / floor {ratio:.2f}; rbc-edge run with ledger and tables: {per_s:.0f} fields/s")
            figures[f"{threads} threads"] = {k: m for k, (m, _) in middle.items()} | {"fields_per_s": per_s}
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

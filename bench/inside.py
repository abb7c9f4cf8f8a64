"""Measures the time of each stage inside the program, and the floor below which it cannot get.

``python -m bench.inside stages FOLDER`` runs the real `count_once` and prints the time of each of its parts.
``python -m bench.inside prepare FOLDER FILE`` and then ``floor FILE`` measure the floor: the same images
through the decoder and both networks only, with inputs that are prepared before.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import onnxruntime as ort

from rbc_edge.station import job, session
from rbc_edge.store import ledger, slide_scale
from rbc_edge.values import CellClass
from rbc_edge.views import tables
from rbc_edge.vision import analyzer, boxes, classifier, counting, detector, image_file, preprocess
from rbc_edge.vision import scale as scales
from rbc_edge.vision.bundle import CLASSIFIER, DETECTOR, Bundle


class Probe:
    """Wall time by stage, without the time of other stages called inside it.

    Args:
        clock: Seconds.

    Attributes:
        seconds: By stage, summed over all threads.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._thread = threading.local()
        self._lock = threading.Lock()

    def around(self, stage: str, function: Callable[..., Any], *, whole: bool = False) -> Callable[..., Any]:
        """Returns the function, timed as a stage.

        Args:
            stage: Its name.
            function: What is timed.
            whole: With everything that it calls. Stages inside it are counted as this one.
        """

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            stack: list[tuple[str, bool]] = self._stack()
            name = stack[-1][0] if stack and stack[-1][1] else stage
            self._lap()
            stack.append((name, whole or bool(stack and stack[-1][1])))
            try:
                return function(*args, **kwargs)
            finally:
                self._lap()
                stack.pop()

        return timed

    def _stack(self) -> list[tuple[str, bool]]:
        if not hasattr(self._thread, "stack"):
            self._thread.stack, self._thread.since = [], self._clock()
        stack: list[tuple[str, bool]] = self._thread.stack
        return stack

    def _lap(self) -> None:
        """Adds the time since the last change to the stage that ran until now."""
        stack, now = self._stack(), self._clock()
        if stack:
            with self._lock:
                self.seconds[stack[-1][0]] += now - self._thread.since
        self._thread.since = now

    def attach(self, stage: str, owner: Any, name: str, *, whole: bool = False) -> None:
        """Times a function or method in every module that holds it.

        Raises:
            SystemExit: There is no such name, so the list of stages is out of date.
        """
        function = getattr(owner, name, None)
        if function is None:
            raise SystemExit(f"bench/inside.py: {owner.__name__} has no {name}: update the list of stages")
        timed = self.around(stage, function, whole=whole)
        setattr(owner, name, timed)
        for module in [m for n, m in sys.modules.items() if n.startswith("rbc_edge")]:
            for known, value in list(vars(module).items()):
                if value is function:
                    setattr(module, known, timed)


def attach_all(probe: Probe) -> None:
    """Attaches all stages of the program, in the order of the flow of data."""
    probe.attach("scan", session, "scan", whole=True)
    probe.attach("read, hash", image_file, "load_field")
    probe.attach("decode", image_file, "_decode", whole=True)
    probe.attach("slide's scale", analyzer.Analyzer, "measure", whole=True)
    probe.attach("field's own scale", scales, "estimate_field", whole=True)
    probe.attach("field's own scale", scales, "look_elsewhere", whole=True)
    probe.attach("view", preprocess, "view", whole=True)
    probe.attach("scale", preprocess, "rescale")
    probe.attach("scale", preprocess, "pad_to_stride")
    probe.attach("boxes", detector.Detector, "detect")
    probe.attach("suppress", detector, "suppress")
    probe.attach("suppress", detector, "vote")
    probe.attach("crop", preprocess, "crops")
    probe.attach("classify", classifier.Classifier, "scores")
    probe.attach("groups, edges", counting, "groups")
    probe.attach("groups, edges", boxes, "touches_edge")
    probe.attach("analyzer, rest", analyzer.Analyzer, "analyze")
    for name in ("plan", "begin", "record", "commit", "tables_written"):
        probe.attach("ledger", ledger.Ledger, name)
    for name in ("keep", "keep_measures"):
        probe.attach("ledger", slide_scale, name)
    probe.attach("CSV", tables.Tables, "write")
    probe.attach("CSV", tables.Tables, "write_slide")
    # The network alone, without the work on its output.
    detect = probe.around("detect", ort.InferenceSession.run)
    plain = ort.InferenceSession.run

    def run(session: Any, outputs: Any, feed: dict[str, Any], *args: Any) -> Any:
        return (detect if "image" in feed else plain)(session, outputs, feed, *args)

    ort.InferenceSession.run = run


def stages(folder: Path, *, threads: int) -> dict[str, object]:
    """Counts a folder with the real `count_once`, and returns milliseconds a field by stage.

    The bundle and the sessions are opened before the clock starts. Threads that work at the same time are
    added up, so the sum of the stages is larger than the elapsed time.
    """
    bundle = Bundle.open()
    ready = analyzer.Analyzer(bundle, threads=threads)
    probe = Probe()
    attach_all(probe)
    with tempfile.TemporaryDirectory() as out:
        started_s = time.perf_counter()
        recipe = job.AnalyzerRecipe(bundle.bundle_id, lambda: ready)
        summary = session.count_once(
            (folder,), session.CountOptions(Path(out) / "results", recipe, workers=threads)
        )
        elapsed_s = time.perf_counter() - started_s
    n = summary.n_images
    by_stage = {stage: seconds * 1e3 / n for stage, seconds in probe.seconds.items()}
    return {"n": n, "elapsed_ms": elapsed_s * 1e3 / n, "ms": by_stage}


# -- the floor ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """One image, prepared: its bytes and the inputs of both networks.

    Attributes:
        data: The file's content.
        windows: uint8 (1, H, W, 3) each, RGB, at model scale.
        crops: uint8 (N, 64, 64, 3) RGB.
        reduction: Largest of 1, 2, 4, 8 by which it may be shrunk while it is decoded, so that a cell is not
            smaller than the detector needs.
    """

    data: Any
    windows: list[Any]
    crops: Any
    reduction: int


def prepare(folder: Path, file: Path) -> dict[str, object]:
    """Counts the images of a folder once, and saves the inputs that the networks got."""
    bundle = Bundle.open()
    counter = analyzer.Analyzer(bundle, threads=len(os.sched_getaffinity(0)))
    paths = sorted(folder.iterdir())
    first = [image_file.load_field(p, "", p.name).image for p in paths[:: max(1, len(paths) // 8)][:8]]
    slide = counter.estimate_scale(first)
    kept: dict[str, Any] = {}
    n_cells = n_crops = 0
    for i, path in enumerate(paths):
        field = image_file.load_field(path, "", path.name, cell_diameter_px=slide.cell_diameter_px)
        found = counter.analyze(field, slide)
        used = found.scale if found.scale.cell_diameter_px > 0 else slide
        diameter, view = used.cell_diameter_px, counter.view(field, used)
        small = preprocess.detector_input(view, diameter, bundle.manifest.cell_diameter_px)
        cut = preprocess.tiles(
            small.shape[1],
            small.shape[0],
            tile_px=bundle.manifest.tile_px,
            overlap_px=bundle.manifest.tile_overlap_px,
        )
        windows = [preprocess.pad_to_stride(small[t.y0 : t.y1, t.x0 : t.x1])[0][None] for t in cut]
        detections = found.cells.detections
        boxes = detections.xyxy[detections.class_id == CellClass.RBC]
        kept[f"data-{i}"] = np.frombuffer(path.read_bytes(), np.uint8)
        kept[f"crops-{i}"] = preprocess.cell_crops(view, boxes, margin=bundle.manifest.crop_margin)
        kept[f"n-{i}"] = np.array(
            [
                len(windows),
                max(r for r in (1, 2, 4, 8) if diameter / r >= bundle.manifest.cell_diameter_px or r == 1),
            ]
        )
        kept |= {f"window-{i}-{j}": window for j, window in enumerate(windows)}
        n_cells += len(detections)
        n_crops += len(boxes)
    np.savez(file, **kept)
    return {"n": len(paths), "cells": n_cells, "crops": n_crops, "cell_diameter_px": slide.cell_diameter_px}


def _read(file: Path) -> list[Ready]:
    with np.load(file) as kept:
        n = sum(name.startswith("data-") for name in kept.files)
        numbers = [kept[f"n-{i}"].tolist() for i in range(n)]
        return [
            Ready(
                kept[f"data-{i}"],
                [kept[f"window-{i}-{j}"] for j in range(n_windows)],
                kept[f"crops-{i}"],
                reduction,
            )
            for i, (n_windows, reduction) in enumerate(numbers)
        ]


_REDUCED: Final = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_BATCH: Final = 256


def _session(name: str, threads: int, *, spin: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    path = str(Bundle.open().path / name)
    return ort.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])


def floor(file: Path, *, threads: int) -> dict[str, object]:
    """Times decoding and both networks only, for each way to use the threads.

    Returns:
        Milliseconds a field of each part alone on one thread, and of each way. ``best`` is the fastest way.
    """
    ready = _read(file)
    least = np.array(Bundle.open().manifest.score_threshold, np.float32)
    cv2.setNumThreads(1)
    ways: dict[str, float] = {}
    parts: dict[str, float] = {}
    for workers, inside in {(threads, 1), (1, threads)}:
        # Threads that wait in a loop for their next operator are faster if the core is free otherwise.
        detect = _session(DETECTOR, inside, spin=inside > 1)
        classify = _session(CLASSIFIER, inside, spin=inside > 1)

        def look(one: Ready, detect: Any = detect, classify: Any = classify) -> tuple[float, float, float]:
            t0 = time.perf_counter()
            cv2.imdecode(one.data, _REDUCED[one.reduction])
            t1 = time.perf_counter()
            for window in one.windows:
                detect.run(None, {"image": window, "least_score": least})
            t2 = time.perf_counter()
            for i in range(0, len(one.crops), _BATCH):
                some = one.crops[i : i + _BATCH]
                classify.run(None, {"crops": some, "sides": np.ones((len(some), 2), np.float32)})
            return t1 - t0, t2 - t1, time.perf_counter() - t2

        for one in ready[:3]:
            look(one)
        with ThreadPoolExecutor(workers) as pool:
            started_s = time.perf_counter()
            took = list(pool.map(look, ready))
            elapsed_s = time.perf_counter() - started_s
        name = f"{workers} at once, {inside} in an operator"
        ways[name] = elapsed_s * 1e3 / len(ready)
        if workers == 1:
            means = np.array(took).mean(axis=0) * 1e3
            parts = dict(zip(("decode", "detect", "classify"), means.tolist(), strict=True))
    best = min(ways, key=lambda way: ways[way])
    reductions = sorted({one.reduction for one in ready})
    return {
        "n": len(ready),
        "ms": ways[best],
        "best": best,
        "ways": ways,
        "parts": parts,
        "reductions": reductions,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["stages", "prepare", "floor"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    if asked.what == "stages":
        told = stages(asked.paths[0], threads=asked.threads)
    elif asked.what == "prepare":
        told = prepare(asked.paths[0], asked.paths[1])
    else:
        told = floor(asked.paths[0], threads=asked.threads)
    print(json.dumps(told))


if __name__ == "__main__":
    main()

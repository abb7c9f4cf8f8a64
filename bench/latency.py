"""Measures the time from a file closed in the camera's folder to its row in the table, on an idle station.

Run as ``python bench/latency.py [--files 30]``, or with ``make bench``. It starts a real `rbc-edge watch`
with the shipped bundle and the default settings. It writes and closes a field of 640x480, and reads the table
until the row is there. A pause follows, so that the station is idle again before the next file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from rbc_edge.ops import synthetic

PAUSE_S = 0.7
_LONGEST_S = 60.0


def latencies(n: int, *, options: tuple[str, ...] = ()) -> list[float]:
    """Starts a service, and times each of `n` files from its closing to its row.

    Args:
        n: How many files, after two for the warm-up.
        options: More options of ``rbc-edge watch``.

    Returns:
        Seconds, by file.

    Raises:
        TimeoutError: A row did not come within a minute.
    """
    fields = synthetic.draw_slide(np.random.default_rng(0), n + 2, cell_diameter_px=100.0)
    images = [cv2.imencode(".jpg", field.image[:, :, ::-1])[1].tobytes() for field in fields]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        slide, out = base / "camera" / "slide", base / "results"
        slide.mkdir(parents=True)
        (base / "config.toml").write_text("", encoding="utf-8")
        command = [sys.executable, "-m", "rbc_edge", "watch", str(base / "camera"), "--out", str(out)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("RBC_EDGE_")}
        with (base / "log.txt").open("wb") as log:
            service = subprocess.Popen(
                [*command, "--config", str(base / "config.toml"), *options], env=env, stderr=log
            )
        try:
            found = [_one(slide / f"fov{i:04}.jpg", image, out, service) for i, image in enumerate(images)]
        finally:
            service.terminate()
            service.wait(30)
    return found[2:]


def _one(path: Path, image: bytes, out: Path, service: subprocess.Popen[bytes]) -> float:
    table = out / f"{path.parent.name}.csv"
    wanted = f",{path.stem},".encode()
    path.write_bytes(image)
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < _LONGEST_S:
        if table.exists() and wanted in table.read_bytes():
            took_s = time.perf_counter() - started_s
            time.sleep(PAUSE_S)
            return took_s
        if service.poll() is not None:
            raise TimeoutError(f"the service ended with {service.returncode}")
        time.sleep(0.002)
    raise TimeoutError(f"{path.name} is not in the table after {_LONGEST_S:g} s")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=30)
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    asked = parser.parse_args()
    for words, options in (
        ("events", ()),
        ("polling (NFS, SMB): settled 2 s, scanned every 1 s", ("--polling", "--scan-every-s", "1")),
    ):
        found = latencies(asked.files if not options else max(asked.files // 3, 2), options=options)
        print(
            f"file closed to row in the table, idle station, {words}, {len(found)} files:"
            f" median {statistics.median(found):.2f} s, worst {max(found):.2f} s"
        )
        if asked.json and not options:
            figures = {"median_s": statistics.median(found), "worst_s": max(found), "files": len(found)}
            asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A long time of work in a short time: images at full speed through a camera's folder that is kept small."""

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tests.faults import verdict
from tests.faults.harness import Bench, BrokenError, Result
from tests.faults.verdict import Expected

KEPT_FILES = 500
"""The camera's folder holds about this many files."""

RSS_GROWTH_MB = 12.0
"""Limit for the growth of the resident memory from the warm-up to the end."""

RSS_SLOPE_MB = 0.5
"""Limit for its slope in a thousand images, fitted from the warm-up to the end."""

FD_GROWTH = 3
THREAD_GROWTH = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """The process at one moment."""

    n_counted: int
    rss_mb: float
    n_fds: int
    n_threads: int


def sample(pid: int, n_counted: int) -> Sample:
    """Reads /proc."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    )
    return Sample(
        n_counted,
        int(status["VmRSS"].split()[0]) / 1024,
        len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
        int(status["Threads"]),
    )


def slope(points: list[tuple[float, float]]) -> float:
    """Slope of y over x by least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def soak(bench: Bench) -> Result:
    """20,000 images, slide after slide. Memory, descriptors and threads do not grow."""
    n_images = 1500 if bench.is_short else 20_000
    a_slide = 250
    result = Result()
    expected = Expected()
    station = bench.station()
    station.start()
    samples: list[Sample] = []
    lying: deque[Path] = deque()
    over = threading.Event()
    n_put = 0
    counted = 0
    # The camera is at most half a folder ahead, so that nothing is removed before it is counted.
    ahead = KEPT_FILES // 2

    def camera() -> None:
        nonlocal n_put
        while n_put < n_images and not over.is_set():
            if n_put - counted >= ahead:
                over.wait(0.01)
                continue
            lying.extend(bench.put(station.source / f"slide{n_put // a_slide:04}", 10, expected))
            n_put += 10
            while len(lying) > KEPT_FILES and len(lying) > n_put - counted + 50:
                path = lying.popleft()
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()

    thread = threading.Thread(target=camera)
    started_s = time.monotonic()
    thread.start()
    try:
        last_s, last = time.monotonic(), 0
        while counted < n_images:
            if not station.is_alive:
                raise BrokenError(f"the service died: {station.said_last()}")
            counted = verdict.n_counted(station.out)
            samples.append(sample(station.pid, counted))
            if counted > last:
                last_s, last = time.monotonic(), counted
            elif time.monotonic() - last_s > 60:
                result.check(False, f"nothing was counted for 60 s after {counted}: {station.said_last()}")
                break
            time.sleep(0.25)
    finally:
        over.set()
        thread.join()
    lasted_s = time.monotonic() - started_s
    station.finish(counted)
    result.judged(station.out, expected)

    settled = [s for s in samples if s.n_counted >= n_images // 10] or samples
    start, middle, end = settled[0], settled[len(settled) // 2], settled[-1]
    growth = slope([(s.n_counted / 1000, s.rss_mb) for s in settled])
    fds = [max(s.n_fds for s in part) for part in (settled[: len(settled) // 3 + 1], settled)]
    threads = [max(s.n_threads for s in part) for part in (settled[: len(settled) // 3 + 1], settled)]
    result.check(
        end.rss_mb - start.rss_mb < RSS_GROWTH_MB,
        f"memory grew from {start.rss_mb:.0f} to {end.rss_mb:.0f} MB",
    )
    if not bench.is_short:
        result.check(growth < RSS_SLOPE_MB, f"memory grows by {growth:.2f} MB a thousand images")
    result.check(fds[1] - fds[0] <= FD_GROWTH, f"open files grew from {fds[0]} to {fds[1]}")
    result.check(threads[1] - threads[0] <= THREAD_GROWTH, f"threads grew from {threads[0]} to {threads[1]}")
    result.remark = (
        f"{counted / lasted_s:.0f} images/s; RSS {start.rss_mb:.0f}, {middle.rss_mb:.0f}, {end.rss_mb:.0f} MB"
        f" ({growth:+.2f} MB a thousand); files {start.n_fds}, {middle.n_fds}, {end.n_fds} (most {fds[1]});"
        f" threads {start.n_threads}, {middle.n_threads}, {end.n_threads} (most {threads[1]})"
    )
    return result


SCENARIOS = (("soak", soak),)

__all__ = ["SCENARIOS"]

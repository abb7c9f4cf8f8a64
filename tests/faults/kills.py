"""Processes that are killed: at random moments, at every checkpoint, and by an image."""

import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults import verdict
from tests.faults.harness import Bench, BrokenError, Result, Station, wait_for
from tests.faults.pictures import TOY_BUNDLE, clean_environment, sha256
from tests.faults.plugin.sitecustomize import NO_SUCH_NAME
from tests.faults.verdict import Expected

SLIDES = ("day1", "day2", "day3")


def _fill(bench: Bench, source: Path, n: int, *, jpeg: bool = False) -> Expected:
    """Writes `n` images into three slides."""
    expected = Expected()
    for i, slide in enumerate(SLIDES):
        bench.put(source / slide, n // 3 + (i < n % 3), expected, jpeg=jpeg)
    return expected


def killed_at_random(bench: Bench) -> Result:
    """All images are there at the start, the scale is estimated. The tables equal an uninterrupted run's."""
    n_images, n_kills = (120, 12) if bench.is_short else (500, 300)
    result = Result()
    first = bench.station("camera-of-all", scale=False)
    _fill(bench, first.source, n_images)
    whole = bench.reference(first.source, "--cells")
    started_s = time.monotonic()
    lasted_s = 0.0
    n_killed = n_rounds = 0
    while n_killed < n_kills:
        # A round is one output folder. The service is killed on it until a start reaches the end.
        n_rounds += 1
        station = bench.own(
            Station(
                first.source,
                bench.folder / f"round{n_rounds}" / "results",
                _made(bench.folder / f"round{n_rounds}"),
                options=["--cells"],
                scale=False,
            )
        )
        while True:
            begun_s = time.monotonic()
            station.start("--once")
            # Any moment of a start: imports, sandbox, scale, images, tables.
            longest_s = max(lasted_s / 2, 2.0)
            is_last = lasted_s == 0 or n_killed >= n_kills
            code = station.ended(600 if is_last else bench.chance.uniform(0.05, longest_s))
            if code is not None:
                lasted_s = lasted_s or time.monotonic() - begun_s
                break
            if is_last:
                station.kill()
                raise BrokenError(f"--once has not ended after 600 s: {station.said_last()}")
            if bench.chance.random() < 0.5:
                station.kill()  # with its children, as in a power cut
            else:
                station.signal(signal.SIGKILL)  # without its children, as when memory runs out
                station.ended(30)
            n_killed += 1
        result.n_images += n_images
        result.check(code == 0, f"round {n_rounds}: --once ended with {code}: {station.said_last()}")
        result.verdict.add(verdict.compare(whole, station.out), f"round {n_rounds}: ")
    per_kill_s = (time.monotonic() - started_s) / n_killed
    result.remark = (
        f"{n_killed} kills, {n_rounds} rounds; uninterrupted {lasted_s:.1f} s, {per_kill_s:.1f} s a kill"
    )
    return result


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def killed_while_they_come(bench: Bench) -> Result:
    """Images come while the service is killed and started again. The camera does not wait."""
    n_images, n_kills = (100, 10) if bench.is_short else (500, 150)
    result = Result()
    expected = Expected()
    station = bench.station()
    over = threading.Event()
    longest_s = 2.5

    def camera() -> None:
        # Spread over all the kills.
        pause_s = n_kills * longest_s / 2 / n_images
        for i in range(n_images):
            bench.put(station.source / SLIDES[i % 3], 1, expected)
            if over.wait(pause_s):
                return

    thread = threading.Thread(target=camera)
    thread.start()
    try:
        for _ in range(n_kills):
            station.start()
            code = station.ended(bench.chance.uniform(0.05, longest_s))
            if code is not None:
                raise BrokenError(f"the service ended without a signal, with {code}: {station.said_last()}")
            station.kill()
    except BaseException:
        over.set()
        raise
    finally:
        thread.join()
        station.kill()
    station.start()
    code = station.finish(n_images)
    result.check(code == 143, f"SIGTERM gave {code}")
    result.judged(station.out, expected)
    result.remark = f"{n_kills} kills"
    return result


def run_killed(bench: Bench) -> Result:
    """`rbc-edge run` is killed instead of the service."""
    n_images, n_kills = (100, 5) if bench.is_short else (300, 40)
    result = Result()
    source = bench.folder / "camera"
    _fill(bench, source, n_images)
    started_s = time.monotonic()
    whole = bench.reference(source, "--cells")
    lasted_s = time.monotonic() - started_s
    n_killed = n_rounds = 0
    while n_killed < n_kills:
        n_rounds += 1
        out = bench.folder / f"pieces{n_rounds}"
        command = [sys.executable, "-m", "rbc_edge", "run", str(source), "--out", str(out), "--cells"]
        command += ["--quiet", "--bundle", str(TOY_BUNDLE), "--threads", "1"]
        while True:
            process = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.DEVNULL)
            try:
                longest_s = max(lasted_s / 3, 1.0)
                code = process.wait(bench.chance.uniform(0.05, longest_s) if n_killed < n_kills else 600)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                n_killed += 1
        result.n_images += n_images
        result.check(code == 0, f"round {n_rounds}: run ended with {code}")
        result.verdict.add(verdict.compare(whole, out), f"round {n_rounds}: ")
    result.remark = f"{n_killed} kills, {n_rounds} rounds"
    return result


@dataclass(frozen=True, slots=True)
class Step:
    """A checkpoint at which the process is killed.

    Attributes:
        at: The checkpoint.
        calls: In which calls of it, from 1.
        is_after_death: A process is killed in the analyzer first, and the next one is killed here.
        scale: The user gives the scale.
    """

    at: str
    calls: tuple[int, ...] = (1,)
    is_after_death: bool = False
    scale: bool = True

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.at}{', after a death' if self.is_after_death else ''}"


STEPS: tuple[Step, ...] = (
    Step("ledger opened"),
    Step("database connected"),
    Step("transaction committed", (1, 2)),
    Step("source probed", (1, 2)),
    Step("source scanned", (1, 2)),
    Step("files debounced", (1, 2)),
    Step("files planned", (1, 2)),
    Step("scale estimated", (1, 2), scale=False),
    Step("measures kept", (1, 2), scale=False),
    Step("scale kept", (1, 2), scale=False),
    Step("attempt noted", (1, 2, 3)),
    Step("file read", (1, 10, 20)),
    Step("image decoded", (1, 12)),
    Step("field analyzed", (1, 7, 20)),
    Step("look recorded", (1, 9, 11, 20, 22)),
    Step("count written", (1, 12)),
    Step("cells written", (1, 12)),
    Step("ledger committed", (1, 2, 3)),
    Step("slide's table", (1, 2)),
    Step("temporary table synced", (1, 2, 3)),
    Step("table renamed", (1, 2, 3)),
    Step("folder synced", (1, 2)),
    Step("all tables"),
    Step("tables noted as written"),
    Step("files planned", is_after_death=True),
    Step("sandbox run", is_after_death=True),
    Step("look recorded", is_after_death=True),
)


def killed_at_steps(bench: Bench) -> Result:
    """The process is killed once before and once after each step. The next start finishes the work."""
    result = Result()
    source = bench.folder / "camera"
    expected = _fill(bench, source, 21, jpeg=True)
    (source / "day2" / "broken.jpg").write_bytes(b"no image")
    whole = {
        scale: bench.reference(source, "--cells", *(("--cell-diameter", 40) if scale else ()), name=name)
        for scale, name in ((True, "told"), (False, "estimated"))
    }
    n_deaths = 0
    for i, step in enumerate(STEPS):
        for when in ("before", "after")[i % 2 :: 2] if bench.is_short else ("before", "after"):
            for nth in step.calls[-1:] if bench.is_short else step.calls:
                name = f"{step.name}, {when} call {nth}"
                base = _made(bench.folder / f"death{n_deaths}")
                options = ["--cells", "--grace-s", "0.5"]
                station = bench.own(
                    Station(source, base / "results", base, options=options, scale=step.scale)
                )
                if step.is_after_death:
                    _die(station, Step("field analyzed"), "before", 5, "first")
                    n_deaths += 1
                _die(station, step, when, nth, name)
                n_deaths += 1
                code = station.drain()
                result.check(code == 3, f"{name}: the next start ended with {code}: {station.said_last()}")
                result.n_images += expected.n_images
                result.verdict.add(verdict.compare(whole[step.scale], station.out), f"{name}: ")
    result.remark = f"{n_deaths} deaths at {len(STEPS)} steps; tables equal the uninterrupted run's"
    return result


def _die(station: Station, step: Step, when: str, nth: int, name: str) -> None:
    """Starts the station and kills it at a step."""
    fuse = station.log.with_name("fuse")
    fuse.touch()
    fault = {
        **{"at": step.at, "when": when, "nth": nth},
        **{"do": "kill", "command": "watch", "fuse": str(fuse)},
    }
    station.start("--once", faults=[fault])
    code = station.ended(120)
    if code == NO_SUCH_NAME:
        raise BrokenError(station.said_last())
    if code != -signal.SIGKILL or fuse.exists():
        station.kill()
        raise BrokenError(f"{name}: this step was never reached (exit {code}): {station.said_last()}")


def killer_images(bench: Bench) -> Result:
    """Images that kill every process that opens them. The test starts the service again, as systemd does."""
    result = Result()
    for scale in (True, False):
        _killer_images(bench, result, scale=scale)
    return result


def _killer_images(bench: Bench, result: Result, *, scale: bool) -> None:
    expected = Expected()
    name = "told" if scale else "estimated"
    station = bench.station(name, scale=scale)
    bench.put(station.source / "day1", 40, expected)
    killers = []
    # In the middle, and first and last by name: a slide's scale is estimated from some of these.
    kinds = (("fov000005-aborts", "abort"), ("a-memory-eater", "kill"), ("z-aborts-too", "abort"))
    for i, (stem, do) in enumerate(kinds):
        picture = bench.jpegs[i]
        path = station.source / "day1" / f"{stem}.jpg"
        path.write_bytes(picture.variant(f"KILLER {do} {i}"))
        killers.append(path)
        expected.failed["day1", path.stem] = frozenset({"crash"})
    faults = [
        {
            "at": "image decoded",
            "when": "before",
            "nth": 0,
            "do": do,
            "match": f"KILLER {do}",
        }
        for do in ("abort", "kill")
    ]
    n_deaths = 0
    station.start(faults=faults)

    def settled() -> bool:
        nonlocal n_deaths
        if not station.is_alive:
            n_deaths += 1
            if n_deaths > 10 * len(killers):
                raise BrokenError(f"scale {name}: died {n_deaths} times: {station.said_last()}")
            station.kill()
            station.start(faults=faults)
        return verdict.n_counted(station.out) >= 40 and verdict.n_failed(station.out) >= len(killers)

    try:
        wait_for(settled, 180)
        # More good images after them: the service stays alive.
        n_before = n_deaths
        bench.put(station.source / "day1", 10, expected)
        station.finish(50, failed=len(killers))
        result.check(n_deaths == n_before, "it died again after the images that kill were known")
    finally:
        station.kill()
    if not scale:  # the scale is estimated without these images, so the counts differ
        expected.images["day1"] = dict.fromkeys(expected.images["day1"], ())
    result.judged(station.out, expected, f"scale {name}: ")
    # The same without a fault: a user who knows that the files are good calls retry.
    done = station.command("retry", "--out", station.out)
    result.check(done.returncode == 0, f"retry ended with {done.returncode}: {done.stderr}")
    for path in killers:
        counts = bench.jpegs[killers.index(path)].counts if scale else ()
        expected.images["day1"][sha256(path.read_bytes())] = counts
    expected.failed.clear()
    station.start()
    station.finish(53)
    result.judged(station.out, expected, f"scale {name}, after retry: ")
    result.remark += f"scale {name}: {len(killers)} images that kill, {n_deaths} deaths; "


SCENARIOS = (
    ("killed at random moments", killed_at_random),
    ("killed while images come", killed_while_they_come),
    ("run killed at random", run_killed),
    ("killed at every step", killed_at_steps),
    ("images that kill", killer_images),
)

__all__ = ["SCENARIOS"]

"""The service and others: a second service, other commands, signals, and a clock that jumps."""

import os
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

from tests.faults import verdict
from tests.faults.harness import (
    SCAN_EVERY_S,
    Bench,
    BrokenError,
    Notified,
    Result,
    SkippedError,
    wait_for,
)
from tests.faults.pictures import sha256
from tests.faults.verdict import Expected

ENDS_WITHIN_S = 10.0

_FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/arm-linux-gnueabihf/faketime/libfaketimeMT.so.1",
)


def clock_jumps(bench: Bench) -> Result:
    """The clock jumps by years, back and forth, while images come with such times. Counting goes on."""
    library = next((p for p in _FAKETIME if Path(p).exists()), None)
    if library is None:
        raise SkippedError("libfaketime is not installed (apt-get install faketime)")
    result = Result()
    expected = Expected()
    station = bench.station()
    clock = bench.folder / "clock"
    clock.write_text("+0", encoding="utf-8")
    station.env = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    jumps = ("+0", "-2d", "+400d", "-50y", "+0", "-90s", "+10y", "-1h")
    station.start()
    took: list[tuple[float, str]] = []
    for jump in jumps:
        clock.write_text(jump, encoding="utf-8")
        files = bench.put(station.source / "slide", 5, expected)
        shift_s = {"d": 86_400, "y": 365 * 86_400, "h": 3600, "s": 1}.get(jump[-1], 0) * int(
            jump.rstrip("dyhs")
        )
        for path in files[:3]:  # as if the camera had the same wrong clock
            stamp = max(time.time() + shift_s, 0)
            os.utime(path, (stamp, stamp))
        started_s = time.monotonic()
        if not station.wait_counted(expected.n_images, timeout_s=30):
            result.check(False, f"after {jump} only {verdict.n_counted(station.out)} were counted in 30 s")
        took.append((time.monotonic() - started_s, jump))
    rows = verdict.slide_tables(station.out).get("slide", [])
    years = {row["analyzed_at"][:4] for row in rows}
    result.check(len(years) >= 4, f"the clock was not faked: the table has the years {sorted(years)}")
    # Stopped and started with the clock set back: what was counted "in the future" stays counted.
    station.stop()
    clock.write_text("-3y", encoding="utf-8")
    bench.put(station.source / "slide", 5, expected)
    station.start()
    code = station.finish(expected.n_images)
    result.check(code == 143, f"SIGTERM gave {code}")
    result.judged(station.out, expected)
    result.remark = (
        f"{len(jumps)} jumps of up to 50 years; counted within {max(took)[0]:.1f} s (after {max(took)[1]})"
    )
    return result


def second_service(bench: Bench) -> Result:
    """A second service on the same results is refused with exit 5, at any time."""
    result = Result()
    expected = Expected()
    station = bench.station()
    bench.put(station.source / "slide", 60, expected)
    station.start()
    station.wait_counted(1)
    for _ in range(2 if bench.is_short else 5):
        done = station.command(*station.watch_command()[3:])
        result.check(done.returncode == 5, f"a second service ended with {done.returncode}: {done.stderr}")
        result.check("Traceback" not in done.stderr, done.stderr)
        result.check(str(station.out) in done.stderr, f"it does not name the results: {done.stderr}")
    result.check(station.is_alive, "the first one died")
    station.wait_counted(expected.n_images)
    # After a SIGKILL the lock of the first one is gone.
    station.kill()
    station.start()
    bench.put(station.source / "slide", 5, expected)
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    return result


def commands_beside(bench: Bench) -> Result:
    """status, retry and run are called while the service runs and images come."""
    result = Result()
    expected = Expected()
    station = bench.station()
    other = bench.folder / "other-camera"
    bench.put(other / "elsewhere", 30, expected)
    bench.put(station.source / "slide", 30, expected)
    (station.source / "slide" / "broken.jpg").write_bytes(b"no image")
    expected.failed["slide", "broken"] = frozenset({"not-an-image"})
    station.start()
    station.wait_counted(1)
    scale = ("--cell-diameter", 40, "--config", station.config)
    bundle = station.options[:2]
    n_waited = 0
    for i in range(3 if bench.is_short else 10):
        bench.put(station.source / f"slide{i}", 5, expected)
        done = station.command("status", "--out", station.out)
        result.check(done.returncode == 0, f"status ended with {done.returncode}: {done.stderr}")
        for source in (other, station.source):
            done = station.command("run", source, "--out", station.out, "--quiet", *bundle, *scale)
            # It waits for its turn, or says that another process writes. The images are counted either way.
            result.check(done.returncode in (0, 3, 5), f"run ended with {done.returncode}: {done.stderr}")
            n_waited += done.returncode == 5
        done = station.command("retry", "--out", station.out)
        result.check(done.returncode == 0, f"retry ended with {done.returncode}: {done.stderr}")
    done = station.command("run", other, "--out", station.out, "--quiet", *bundle, *scale)
    result.check(
        done.returncode == 0, f"run during an idle service ended with {done.returncode}: {done.stderr}"
    )
    # A broken image is replaced by a good one with the same time: only retry makes the service look again.
    broken = station.source / "slide" / "broken.jpg"
    station.finish(expected.n_images, failed=1)
    result.judged(station.out, expected)
    name, data, counts = bench.image()
    del name
    times = broken.stat()
    broken.write_bytes(data)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    expected.failed.clear()
    expected.images["slide"][sha256(data)] = counts
    station.start()
    done = station.command("retry", "slide", "broken", "--out", station.out)
    result.check(done.returncode == 0, f"retry of one field ended with {done.returncode}: {done.stderr}")
    station.finish(expected.n_images)
    result.judged(station.out, expected, "after retry: ")
    result.remark = f"run had to wait in vain {n_waited} times"
    return result


def another_writer(bench: Bench) -> Result:
    """A long `rbc-edge run` holds the lock of the results. The service waits, says so, and goes on."""
    result = Result()
    expected = Expected()
    station = bench.station()
    other = bench.folder / "other-camera"
    bench.put(other / "elsewhere", 8, expected)
    station.start()
    bench.put(station.source / "slide", 10, expected)
    station.wait_counted(10)
    slow = {
        "at": "field analyzed",
        "when": "before",
        "nth": 0,
        "do": "slow",
        "seconds": 1.0,
    }
    command = station.watch_command()[:3]
    process = subprocess.Popen(
        [
            *(*command, "run", str(other), "--out", str(station.out), "--quiet", *station.options[:6]),
            *("--cell-diameter", "40"),
        ],
        env=station.environment([slow]),
    )
    try:
        time.sleep(3)
        result.check(process.poll() is None, f"the run did not get its turn: exit {process.poll()}")
        bench.put(station.source / "slide", 10, expected)
        time.sleep(2 * SCAN_EVERY_S)
        result.check(station.is_alive, f"the service died: {station.said_last()}")
        result.check(station.command("status", "--out", station.out).returncode == 0, "status failed")
        code = process.wait(60)
        result.check(code == 0, f"the run ended with {code}")
    finally:
        process.kill()
        process.wait()
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    return result


def terminated(bench: Bench) -> Result:
    """SIGTERM and SIGINT during work: the current image is finished, and the service ends in time."""
    result = Result()
    expected = Expected()
    station = bench.station()
    n_images, n_times = (200, 4) if bench.is_short else (1000, 16)
    for slide in ("day1", "day2"):
        bench.put(station.source / slide, n_images // 2, expected)
    slowest_s = 0.0
    for i in range(n_times):
        number, right = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[i % 2]
        n_said = len(station.said())
        station.start()
        # A slow computer still imports modules after a second, and then no handler is installed yet.
        wait_for(lambda n=n_said: len(station.said()) > n or not station.is_alive, 30)  # type: ignore[misc]
        time.sleep(bench.chance.uniform(0.0, 2.5) if i else 1.5)
        if not station.is_alive:
            raise BrokenError(f"it ended without a signal: {station.said_last()}")
        started_s = time.monotonic()
        station.signal(number)
        code = station.ended(30)
        slowest_s = max(slowest_s, time.monotonic() - started_s)
        result.check(code == right, f"{signal.Signals(number).name} gave {code}, not {right}")
        if code is None:
            station.kill()
    # A slow image is finished first. It is not counted twice, and not taken for one that kills.
    slow = {
        "at": "field analyzed",
        "when": "before",
        "nth": 0,
        "do": "slow",
        "seconds": 3.0,
    }
    station.drain()
    bench.put(station.source / "day3", 3, expected)
    station.start(faults=[slow])
    time.sleep(4)
    n_before = verdict.n_counted(station.out)
    started_s = time.monotonic()
    station.signal(signal.SIGTERM)
    code = station.ended(30)
    took_s = time.monotonic() - started_s
    slowest_s = max(slowest_s, took_s)
    result.check(code == 143, f"SIGTERM during a slow image gave {code}")
    result.check(verdict.n_counted(station.out) > n_before, "the current image was dropped")
    result.check(slowest_s < ENDS_WITHIN_S, f"it took {slowest_s:.1f} s to end")
    station.start()
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    result.remark = f"{n_times + 1} times; ended within {slowest_s:.1f} s"
    return result


def reloaded(bench: Bench) -> Result:
    """SIGHUP with a good and a bad configuration, and the messages to systemd."""
    result = Result()
    expected = Expected()
    station = bench.station()
    notified = Notified(bench.folder)
    station.env = {"NOTIFY_SOCKET": str(notified.path), "WATCHDOG_USEC": "2000000"}
    bench.put(station.source / "slide", 20, expected)
    station.start()
    try:
        result.check(wait_for(lambda: notified.heard("READY=1"), 30), "READY=1 never came")
        station.wait_counted(20)
        cells = station.out / "cells" / "slide.csv"
        result.check(not cells.exists(), "a table of cells before it was asked for")
        station.config.write_text("cells = true\n", encoding="utf-8")
        station.signal(signal.SIGHUP)
        result.check(wait_for(lambda: notified.heard("RELOADING=1"), 10), "RELOADING=1 never came")
        bench.put(station.source / "slide", 5, expected)
        result.check(wait_for(cells.exists, 20), f"cells = true had no effect: {station.said_last()}")
        n_lines = len(station.said().splitlines())
        for bad in ("cels = true\n", "cells = [\n", 'cells = "many"\n', "edges = 3\n"):
            station.config.write_text(bad, encoding="utf-8")
            station.signal(signal.SIGHUP)
            time.sleep(0.5)
            (name,) = bench.put(station.source / "slide", 1, expected)
            if not station.wait_counted(expected.n_images, timeout_s=20):
                result.check(False, f"{name.name} was not counted after the configuration {bad!r}")
        more = "\n".join(station.said().splitlines()[n_lines:])
        for word in ("cels", "TOML", "many", "edges"):
            result.check(word in more, f"the log does not say what is wrong with {word}")
        station.config.unlink()
        station.signal(signal.SIGHUP)
        time.sleep(0.5)
        station.config.write_text("cells = true\n", encoding="utf-8")
        station.signal(signal.SIGHUP)
        bench.put(station.source / "slide", 5, expected)
        station.wait_counted(expected.n_images)
        time.sleep(3)
        beats_s = [at for at, line in notified.messages if line == "WATCHDOG=1"]
        gaps_s = [b - a for a, b in pairwise(beats_s)]
        result.check(
            len(beats_s) > 3 and max(gaps_s) < 2.0, f"watchdog: {len(beats_s)} beats, gaps {gaps_s[-3:]}"
        )
        code = station.finish(expected.n_images)
        result.check(code == 143, f"SIGTERM gave {code}")
        result.check(notified.heard("STOPPING=1"), "STOPPING=1 never came")
    finally:
        station.kill()
        notified.close()
    result.judged(station.out, expected)
    result.remark = f"good, bad, missing; {len(beats_s)} watchdog beats, longest gap {max(gaps_s):.2f} s"
    return result


def deaf_systemd(bench: Bench) -> Result:
    """A service manager that hangs and reads no message. Counting does not wait for it."""
    result = Result()
    expected = Expected()
    station = bench.station()
    notified = Notified(bench.folder, listens=False)
    station.env = {"NOTIFY_SOCKET": str(notified.path), "WATCHDOG_USEC": "2000000"}
    bench.put(station.source / "slide", 100, expected)
    started_s = time.monotonic()
    station.start()
    try:
        station.wait_counted(expected.n_images, timeout_s=25)
        lasted_s = time.monotonic() - started_s
        result.check(lasted_s < 20, f"100 images took {lasted_s:.0f} s")
        started_s = time.monotonic()
        code = station.stop()
        left_s = time.monotonic() - started_s
        result.check(code == 143 and left_s < ENDS_WITHIN_S, f"SIGTERM gave {code} after {left_s:.0f} s")
    finally:
        station.kill()
        notified.close()
    result.judged(station.out, expected)
    result.remark = f"{expected.n_images} images in {lasted_s:.1f} s"
    return result


def bad_start(bench: Bench) -> Result:
    """Starts that cannot work: exit 2 for the configuration, 4 for the bundle. It waits for a source."""
    result = Result()
    station = bench.station()
    bench.put(station.source / "slide", 1)
    broken = bench.folder / "broken.toml"
    broken.write_text("cels = true\n", encoding="utf-8")
    no_bundle = bench.folder / "no-bundle"
    cases: tuple[tuple[tuple[object, ...], int], ...] = (
        (("--config", broken), 2),
        (("--bundle", no_bundle), 4),
        (("--settle-s", "-1"), 2),
    )
    for options, right in cases:
        done = station.command(*station.watch_command(*map(str, options))[3:], timeout_s=60)
        result.check(done.returncode == right, f"{options[0]} gave {done.returncode}: {done.stderr}")
        result.check("Traceback" not in done.stderr, done.stderr)
        result.check(
            len(done.stderr.splitlines()) <= 4, f"{options[0]}: {len(done.stderr.splitlines())} lines"
        )
    # A share may come a minute after the start of the computer. The service runs and says that it waits.
    for name, options in (("missing", ()), ("no-marker", ("--marker", "no-such-marker"))):
        waiting = bench.station(name, *options)
        if not options:
            waiting.source.rmdir()
        waiting.start()
        result.check(
            wait_for(lambda w=waiting: w.out.exists() and "away" in str(w.state()), 20),  # type: ignore[misc]
            f"{name}: the state does not say that the source is away",
        )
        result.check(str(waiting.source) in waiting.said(), f"{name}: the log does not name the source")
        waiting.stop()
    result.remark = f"{len(cases) + 2} bad starts"
    return result


SCENARIOS = (
    ("clock set back and forward", clock_jumps),
    ("second service", second_service),
    ("commands beside it", commands_beside),
    ("another writer", another_writer),
    ("SIGTERM in the middle", terminated),
    ("SIGHUP and systemd", reloaded),
    ("systemd that hangs", deaf_systemd),
    ("bad starts", bad_start),
)

__all__ = ["SCENARIOS"]

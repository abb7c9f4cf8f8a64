"""Faults with files: slow writers, many files at once, broken and unusual files."""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import verdict
from tests.faults.harness import GRACE_S, SETTLE_S, Bench, BrokenError, Result, wait_for
from tests.faults.pictures import REPOSITORY, Counts, counts_of, sha256
from tests.faults.verdict import Expected

Writer = Callable[[Path, bytes], None]


def _slow(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(data), 512):
            file.write(data[at : at + 512])
            time.sleep(0.05)


def _pieces(path: Path, data: bytes) -> None:
    """Pauses for much longer than the service waits for a file to be finished."""
    with path.open("wb", buffering=0) as file:
        for part in range(3):
            file.write(data[part * len(data) // 3 : (part + 1) * len(data) // 3])
            time.sleep(SETTLE_S * 4)


def _closed_between(path: Path, data: bytes) -> None:
    for part in range(3):
        with path.open("ab") as file:
            file.write(data[part * len(data) // 3 : (part + 1) * len(data) // 3])
        time.sleep(SETTLE_S * 4)


def _empty_first(path: Path, data: bytes) -> None:
    path.touch()
    time.sleep(SETTLE_S * 4)
    path.write_bytes(data)


def _full_size_first(path: Path, data: bytes) -> None:
    """Reserves the whole size first, as some copy programs do. The size says nothing then."""
    with path.open("wb", buffering=0) as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            time.sleep(SETTLE_S * 2)
            file.write(data[at : at + 4096])


def _renamed(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".part")
    _slow(temporary, data)
    temporary.rename(path)


def _renamed_from_image_name(path: Path, data: bytes) -> None:
    """The temporary name looks like an image, and exists long enough to be read."""
    temporary = path.with_name(f"copying-{path.name}")
    temporary.write_bytes(data[: len(data) // 2])
    time.sleep(SETTLE_S * 4)
    temporary.write_bytes(data)
    temporary.rename(path)


def _renamed_from_hidden(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.x7Gh2")  # rsync
    _slow(temporary, data)
    temporary.rename(path)


def _old_time(path: Path, data: bytes) -> None:
    """Copied with its old time of change: the file is years old from the start."""
    _pieces(path, data)
    os.utime(path, (946_684_800, 946_684_800))


def _future_time(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, (4_102_444_800, 4_102_444_800))


WRITERS: tuple[Writer, ...] = (
    *(_slow, _pieces, _closed_between, _empty_first, _full_size_first, _renamed, _renamed_from_image_name),
    *(_renamed_from_hidden, _old_time, _future_time),
)


def writers(bench: Bench) -> Result:
    """Files that are written slowly, in pieces, with pauses or under other names, all at the same time."""
    n_each = 3 if bench.is_short else 15
    result = Result()
    expected = Expected()
    station = bench.station("", "--grace-s", 20)
    station.start()
    threads = []
    for writer in WRITERS:
        folder = station.source / writer.__name__.strip("_")
        folder.mkdir()
        for _ in range(n_each):
            name, data, counts = bench.image()
            expected.images[folder.name][sha256(data)] = counts
            threads.append(threading.Thread(target=writer, args=(folder / name, data)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    result.remark = f"{len(WRITERS)} kinds of writers"
    return result


def rewritten(bench: Bench) -> Result:
    """Files that are changed after the count: overwritten, replaced, renamed, copied. Only content counts."""
    n_each = 5 if bench.is_short else 25
    result = Result()
    expected = Expected()
    station = bench.station("", "--grace-s", 20)
    station.start()
    kinds = (
        "in-place",
        "by-rename",
        "twice-at-once",
        "renamed",
        "copied",
        "same-again",
        "emptied-and-filled",
    )
    files = {kind: bench.put(station.source / kind, n_each) for kind in kinds}
    station.wait_counted(n_each * len(kinds))

    def content(kind: str) -> tuple[bytes, Counts]:
        _, data, counts = bench.image()
        expected.images[kind][sha256(data)] = counts
        return data, counts

    def keep(kind: str, path: Path) -> None:
        data = path.read_bytes()
        expected.images[kind][sha256(data)] = known[sha256(data)]

    known = {
        row["sha256"]: counts_of(row)
        for rows in verdict.slide_tables(station.out).values()
        for row in rows
        if row["status"] == "ok"
    }
    if len(known) != n_each * len(kinds):
        raise BrokenError(f"only {len(known)} of the first images were counted: {station.said_last()}")
    for path in files["in-place"]:
        _slow(path, content("in-place")[0])
    for path in files["by-rename"]:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content("by-rename")[0])
        temporary.replace(path)
    for path in files["twice-at-once"]:
        _, data, _ = bench.image()
        path.write_bytes(data)  # the service may or may not see this content
        path.write_bytes(content("twice-at-once")[0])
    for path in files["renamed"]:
        keep("renamed", path)
        path.rename(path.with_name(f"new-{path.name}"))
    for path in files["copied"]:
        keep("copied", path)
        path.with_name(f"copy-of-{path.name}").write_bytes(path.read_bytes())
    expected.duplicates["copied"] = n_each
    for path in files["same-again"]:
        keep("same-again", path)
        _slow(path, path.read_bytes())
    for path in files["emptied-and-filled"]:
        path.write_bytes(b"")
    time.sleep(SETTLE_S * 4)
    for path in files["emptied-and-filled"]:
        path.write_bytes(content("emptied-and-filled")[0])

    def right() -> bool:
        return verdict.judge(station.out, expected).is_clean

    wait_for(right, 60)
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    result.remark = f"{len(kinds)} kinds of change after the count"
    return result


def moved_folders(bench: Bench) -> Result:
    """Whole folders that are moved in, also while they are being filled."""
    n = 10 if bench.is_short else 100
    result = Result()
    expected = Expected()
    station = bench.station()
    station.start()
    outside = bench.folder / "card"
    bench.put(outside / "moved-in", n, expected)
    (outside / "moved-in").rename(station.source / "moved-in")
    for part in ("a", "b"):
        bench.put(outside / "tree" / part, n)
        for path in sorted((outside / "tree" / part).iterdir()):
            data = path.read_bytes()
            expected.images[f"tree--{part}"][sha256(data)] = _counts_by_pixels(bench, data)
    (outside / "tree").rename(station.source / "tree")
    # Moved in empty and filled at once: the first events come before the new folder is watched.
    for i in range(5):
        (outside / f"late{i}").mkdir()
        (outside / f"late{i}").rename(station.source / f"late{i}")
        bench.put(station.source / f"late{i}", 3, expected)
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    result.remark = "moved in full, as a tree, and empty"
    return result


def _counts_by_pixels(bench: Bench, data: bytes) -> Counts:
    """The counts of a variant: after the comment its bytes are those of the picture."""
    return next(p.counts for p in bench.jpegs if data.endswith(p.data[2:]))


def vanishing(bench: Bench) -> Result:
    """Files that are removed soon after they came, some of them while they are being read."""
    n = 40 if bench.is_short else 300
    result = Result()
    expected = Expected()
    station = bench.station("", "--cells")
    held = bench.folder / "held"
    # The reader is held after the file is found and before it is opened. Then the file is removed.
    station.start(
        faults=[
            {
                **{"at": "file read", "when": "before", "nth": 0, "do": "hold"},
                **{"match": "held-", "reached": str(held)},
            }
        ]
    )
    n_held = 0
    for _ in range(3):
        name, data, counts = bench.image()
        path = station.source / "short" / f"held-{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        expected.maybe["short"][sha256(data)] = counts
        expected.maybe_failed["short", path.stem] = frozenset({"vanished"})
        if wait_for(lambda: held.exists() or not station.is_alive, 30) and held.exists():
            n_held += 1
            path.unlink()
            held.unlink()
    result.check(n_held == 3, f"only {n_held} of 3 files were caught while being read")

    gone: list[threading.Timer] = []
    for i in range(n):
        (path,) = bench.put(station.source / "stays", 1, expected)
        name, data, counts = bench.image()
        path = station.source / "short" / name
        path.write_bytes(data)
        expected.maybe["short"][sha256(data)] = counts
        expected.maybe_failed["short", path.stem] = frozenset({"vanished"})
        timer = threading.Timer(bench.chance.uniform(0, 1.5), path.unlink)
        gone.append(timer)
        timer.start()
        if i % 10 == 0:
            time.sleep(0.1)
    for timer in gone:
        timer.join()
    wait_for(lambda: verdict.judge(station.out, expected).is_clean, 60)
    station.finish(n)
    result.judged(station.out, expected)
    counted = len([r for r in verdict.slide_tables(station.out).get("short", []) if r["status"] == "ok"])
    result.remark = f"{n_held} while being read; of {n} removed later {counted} were counted before"
    return result


def stopped_and_flooded(bench: Bench) -> Result:
    """SIGSTOP, then more files than the kernel can queue events for, then SIGCONT."""
    n = 1000 if bench.is_short else 25_000
    result = Result()
    expected = Expected()
    station = bench.station()
    bench.put(station.source / "before", 20, expected)
    station.start()
    station.wait_counted(20)
    station.signal(signal.SIGSTOP)
    started_s = time.monotonic()
    for i in range(10):
        bench.put(station.source / f"slide{i}", n // 10, expected)
    wrote_s = time.monotonic() - started_s
    station.signal(signal.SIGCONT)
    started_s = time.monotonic()
    station.wait_counted(20 + n, timeout_s=60 + n / 20)
    lasted_s = time.monotonic() - started_s
    bench.put(station.source / "after", 20, expected)
    station.finish(40 + n)
    result.judged(station.out, expected)
    result.remark = f"{n} files in {wrote_s:.0f} s, counted in {lasted_s:.0f} s ({n / lasted_s:.0f} images/s)"
    return result


def bad_files(bench: Bench) -> Result:
    """All broken, unusual and oddly named files of tests/edge/cli/test_bad_input.py, between good ones."""
    sys.path[:0] = [str(REPOSITORY / "tests" / "edge" / folder) for folder in ("", "cli")]
    from test_bad_input import BROKEN, NAMES, UNUSUAL

    result = Result()
    expected = Expected()
    odd = bench.folder / "odd"
    odd.mkdir()
    # By a number, or two formats of the same picture would be one shot.
    unusual_names = [f"{i} {name}" for i, name in enumerate(UNUSUAL)]
    for name, make in zip(unusual_names, UNUSUAL.values(), strict=True):
        (odd / name).write_bytes(make())
    whole = bench.reference(odd, "--cell-diameter", 40)
    known = {row["sha256"]: counts_of(row) for row in verdict.read_table(whole / "odd.csv")}
    if len(known) != len(UNUSUAL):
        raise BrokenError(f"the reference counted {len(known)} of {len(UNUSUAL)} unusual images")

    station = bench.station()
    station.start()
    good, unusual = station.source / "good", station.source / "unusual"
    good.mkdir()
    unusual.mkdir()
    for name, (make_broken, failure) in BROKEN.items():
        bench.put(good, 2, expected)
        (good / name).write_bytes(make_broken())
        stem = name if sum(Path(n).stem == Path(name).stem for n in BROKEN) > 1 else Path(name).stem
        expected.failed["good", stem] = frozenset({failure})
    for name in unusual_names:
        data = (odd / name).read_bytes()
        (unusual / name).write_bytes(data)
        expected.images["unusual"][sha256(data)] = known[sha256(data)]
    named = station.source / "named"
    named.mkdir()
    for odd_name in NAMES:
        _, data, counts = bench.image()
        with open(os.fsencode(named) + b"/" + odd_name, "wb") as file:  # noqa: PTH123 -- not UTF-8
            file.write(data)
        expected.images["named"][sha256(data)] = counts
    (good / "to-nowhere.png").symlink_to(bench.folder / "nothing.png")
    expected.maybe_failed["good", "to-nowhere"] = frozenset({"vanished"})
    os.mkfifo(good / "pipe.png")
    (good / "folder.png").mkdir()
    (good / "notes.txt").write_text("not for us", encoding="utf-8")
    bench.put(good, 5, expected)
    station.finish(expected.n_images, failed=len(expected.failed), timeout_s=60 + GRACE_S)
    result.judged(station.out, expected)
    result.remark = (
        f"{len(BROKEN)} broken kinds failed with their reason; {len(UNUSUAL)} unusual,"
        f" {len(NAMES)} oddly named"
    )
    return result


def many_descriptors_taken(bench: Bench) -> Result:
    """A low limit for open files, as on a computer with many other programs."""
    result = Result()
    expected = Expected()
    station = bench.station()
    for i in range(60):
        bench.put(station.source / f"slide{i:03}", 3, expected)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, hard))
    try:
        station.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    result.remark = "48 open files allowed, 60 slides"
    return result


SCENARIOS = (
    ("slow and odd writers", writers),
    ("changed after the count", rewritten),
    ("folders moved in", moved_folders),
    ("files that vanish", vanishing),
    ("stopped and flooded", stopped_and_flooded),
    ("bad files between good", bad_files),
    ("few open files allowed", many_descriptors_taken),
)

__all__ = ["SCENARIOS"]

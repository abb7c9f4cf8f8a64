"""Damaged images and rows, trouble of the machine that passes, and images that move between slides."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from tests.faults import verdict
from tests.faults.harness import Bench, Result
from tests.faults.pictures import Counts, sha256
from tests.faults.verdict import Expected

# Values beside the packed cells. No index holds them, so SQLite sees nothing.
_ROWS = ("counts = x'07'", "scale_source = 'guess'", "n_refused = 7", "elapsed_ms = 1e9", "message = 'x'")


def _zeroed(data: bytes) -> bytes:
    """A JPEG that lost a sector in its picture."""
    middle = len(data) * 3 // 4
    return data[:middle] + bytes(300) + data[middle + 300 :]


def _flipped(data: bytes) -> bytes:
    """A PNG with a wrong bit in its pixels."""
    at = data.index(b"IDAT") + 200
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def damaged_files(bench: Bench) -> Result:
    """Damaged images are never counted, and are when they are whole again. Damaged rows are never shown."""
    n = 4 if bench.is_short else 20
    result, expected = Result(), Expected()
    station = bench.station("", "--cells")
    whole: dict[Path, bytes] = {}
    counts: dict[Path, Counts] = {}
    slide = station.source / "slide"
    for path in bench.put(slide, 2 * n, expected, jpeg=False):
        if len(whole) < n:
            data = whole[path] = path.read_bytes()
            path.write_bytes(_zeroed(data) if path.suffix == ".jpg" else _flipped(data))
            counts[path] = expected.images["slide"].pop(sha256(data))
            expected.failed["slide", path.stem] = frozenset({"truncated"})
    station.start()
    station.wait_counted(expected.n_images // 2)
    station.kill()
    station.start()
    station.finish(expected.n_images, failed=n)
    result.judged(station.out, expected, "damaged: ")
    station.start()
    for path, data in whole.items():
        path.write_bytes(data)
        expected.images["slide"][sha256(data)] = counts[path]
    expected.failed.clear()
    station.finish(expected.n_images)
    result.judged(station.out, expected, "whole again: ")
    first = next(iter(whole))
    for row in _ROWS:
        with sqlite3.connect(station.out / "ledger.sqlite3") as db:
            db.execute(f"UPDATE field SET {row} WHERE fov = ?", (first.stem,))
        db.close()
        station.start()
        station.wait_said(f"row of {first.stem} was damaged")
        station.finish(expected.n_images)
        result.verdict.add(verdict.judge(station.out, expected), f"{row}: ")
    result.check(not list(station.out.glob("damaged-*")), "a ledger with one damaged row was put aside")
    result.remark = f"{n} images damaged and mended; {len(_ROWS)} kinds of damaged rows"
    return result


def machine_trouble(bench: Bench) -> Result:
    """Memory, a library or open files that are short for a moment: no image fails, all are counted."""
    n = 6 if bench.is_short else 30
    result, expected = Result(), Expected()
    station = bench.station()
    for trouble in ("memory", "library", "files"):
        for step in ("file read", "field analyzed"):
            slide = station.source / f"{trouble}-{step.split()[0]}"
            fuse = bench.folder / "trouble"
            fuse.touch()
            bench.put(slide, n, expected)
            station.start(faults=[{"at": step, "when": "before", "nth": 0, "do": trouble, "fuse": str(fuse)}])
            station.wait_counted(expected.n_images - 1)
            station.kill()
            station.start()
            station.finish(expected.n_images)
            result.judged(station.out, expected, f"{trouble}, {step}: ")
    result.remark = "memory, a library and open files short, in two steps"
    return result


def moves(bench: Bench) -> Result:
    """Folders renamed, images moved, copied and renamed between slides, with a kill after each."""
    n_rounds, n = (1, 4) if bench.is_short else (5, 12)
    result, expected = Result(), Expected()
    station = bench.station()
    images = expected.images
    for slide in ("a", "b", "c"):
        bench.put(station.source / slide, n, expected)
    station.start()
    station.wait_counted(expected.n_images)

    def rename_folder(number: int) -> None:
        (station.source / "a").rename(station.source / f"a{number}")
        images[f"a{number}"] = images.pop("a")
        (station.source / f"a{number}").rename(station.source / "a")
        images["a"] = images.pop(f"a{number}")
        (station.source / "a").rename(station.source / f"kept{number}")
        images[f"kept{number}"] = images.pop("a")
        bench.put(station.source / "a", n, expected)

    def move_image(_: int) -> None:
        path = min((station.source / "b").iterdir())
        digest = sha256(path.read_bytes())
        path.rename(station.source / "c" / f"from-b-{path.name}")
        images["c"][digest] = images["b"].pop(digest)

    def copy_image(_: int) -> None:
        path = max((station.source / "c").iterdir())
        data = path.read_bytes()
        (station.source / "b" / f"copy-{path.name}").write_bytes(data)
        images["b"][sha256(data)] = images["c"][sha256(data)]

    def rename_image(number: int) -> None:
        path = max((station.source / "b").iterdir())
        path.rename(path.with_name(f"{number}-{path.name}"))

    changes: tuple[Callable[[int], None], ...] = (move_image, copy_image, rename_image, rename_folder)
    for number in range(n_rounds):
        for change in changes:
            change(number)
            station.kill()
            station.start()
            station.finish(expected.n_images)
            result.judged(station.out, expected, f"{change.__name__}: ")
            station.start()
    station.stop()
    result.remark = f"{n_rounds * len(changes)} changes, a kill after each"
    return result


SCENARIOS = (
    ("damaged files", damaged_files),
    ("machine trouble", machine_trouble),
    ("moves", moves),
)

__all__ = ["SCENARIOS"]

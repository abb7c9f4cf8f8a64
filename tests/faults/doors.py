"""Damaged images and rows, trouble of the machine, images that move, and histories of all that."""

import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rbc_edge.ops.synthetic import CREAM, draw_slide
from tests.faults import verdict
from tests.faults.harness import Bench, BrokenError, Result
from tests.faults.pictures import Counts, Picture, encoded, reference, sha256
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


class Camera:
    """A folder where anything may happen to images. What the end must show is what lies there in the end.

    Between two full counts, a content takes part in one event. Else its last place may be one that nobody
    saw, and the place before it stays counted, which is right: it may have been archived.
    """

    def __init__(self, folder: Path, chance: random.Random, fields: Sequence[Picture]) -> None:
        self.folder, self._chance = folder, chance
        self._fields, self._n = fields, 0
        self.n_events = 0
        self.files: dict[Path, bytes] = {}
        self._unfinished: dict[Path, tuple[Path, bytes]] = {}
        self._busy: set[bytes] = set()

    def arrive(self) -> None:
        """Some images come."""
        for _ in range(self._chance.randint(1, 3)):
            self._write(self._new_path(), self._new_data())

    def begin(self) -> None:
        """An image comes in part, or only its name. Maybe it gets another name when it is complete."""
        path, data = self._new_path(), self._new_data()
        path.write_bytes(data[: int(len(data) * self._chance.choice((0, 0.5, 0.95)))])
        self._unfinished[path] = (self._chance.choice((path, self._new_path(path.parent))), data)

    def finish(self) -> None:
        """What came in part is completed."""
        for path, (last, data) in self._unfinished.items():
            self._write(path, data)
            self._rename(path, last)
        self._unfinished.clear()

    def copy(self) -> None:
        """A second file of one content in a slide."""
        if path := self._pick():
            self._write(self._new_path(path.parent), self.files[path])

    def delete_copy(self) -> None:
        """One of two files of one content goes, the first or the second."""
        copies = [p for p in sorted(self.files) if list(self.files.values()).count(self.files[p]) > 1]
        if path := self._pick(copies):
            path.unlink()
            self._busy.add(self.files.pop(path))

    def rename(self) -> None:
        """A file gets another name."""
        if path := self._pick():
            self._rename(path, self._new_path(path.parent))

    def move(self) -> None:
        """A file goes to another slide."""
        contents = list(self.files.values())
        if path := self._pick([p for p in sorted(self.files) if contents.count(self.files[p]) == 1]):
            self._rename(path, self._new_path())

    def replace(self) -> None:
        """A file is overwritten with another image."""
        if path := self._pick():
            self._busy.add(self.files[path])
            self._write(path, self._new_data())

    def rename_slide(self) -> None:
        """A slide's folder gets another name."""
        old = self._chance.choice(sorted(self.folder.iterdir()))
        inside = [p for p in sorted(self.files) if p.parent == old]
        if not any(p.parent == old for p in self._unfinished) and self._busy.isdisjoint(
            self.files[p] for p in inside
        ):
            self._n += 1
            old.rename(new := old.with_name(f"{old.name[0]}{self._n}"))
            for path in inside:
                self.files[new / path.name] = self.files.pop(path)
                self._busy.add(self.files[new / path.name])

    def happen(self) -> None:
        """One of all that, by chance."""
        self.n_events += 1
        first, *others = (
            *(self.arrive, self.begin, self.finish, self.copy, self.delete_copy),
            *(self.rename, self.move, self.replace, self.rename_slide),
        )
        self._chance.choice((first, first, *others))()

    def all_counted(self) -> None:
        """Everything was seen: each content may take part in events again."""
        self._busy.clear()

    def _new_data(self) -> bytes:
        self._n += 1
        return self._fields[self._n % len(self._fields)].variant(f"{self._n}")

    def _new_path(self, folder: Path | None = None) -> Path:
        self._n += 1
        # The names come in another order than the images.
        name = f"{self._chance.choice('bmx')}{self._n}.png"
        return (folder or self._chance.choice(sorted(self.folder.iterdir()))) / name

    def _pick(self, some: Sequence[Path] | None = None) -> Path | None:
        paths = sorted(self.files) if some is None else some
        free = [path for path in paths if self.files[path] not in self._busy]
        return self._chance.choice(free) if free else None

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self.files[path] = data
        self._busy.add(data)

    def _rename(self, old: Path, new: Path) -> None:
        old.rename(new)
        self.files[new] = self.files.pop(old)
        self._busy.add(self.files[new])


def history(bench: Bench) -> Result:
    """Images come in portions or in part, are copied, renamed, moved, replaced, and the service is killed.

    In the end all tables are those of one run over the folder. The scale is estimated; cells have many sizes.
    """
    n_histories, n_rounds = (1, 4) if bench.is_short else (4, 12)
    result = Result()
    fields = []
    for px in (28, 31, 34, 37, 40, 43, 47, 52):
        size = {"width_px": 260, "height_px": 200}
        drawn = draw_slide(
            np.random.default_rng(px), 1, **size, cell_diameter_px=px, crowding=0.3, stain=CREAM
        )
        fields += [Picture(encoded(field.image, ".png"), ()) for field in drawn]
    n_events = 0
    for number in range(n_histories):
        station = bench.station(f"history{number}", "--cells", scale=False)
        for slide in ("a", "b"):
            (station.source / slide).mkdir()
        camera = Camera(station.source, bench.chance, fields)
        camera.arrive()
        fuse = station.out.with_name("trouble")
        for _ in range(n_rounds):
            trouble = bench.chance.choice((None, None, "memory", "files"))
            fuse.touch()
            fault = {"at": "field analyzed", "when": "before", "nth": 0, "do": trouble, "fuse": str(fuse)}
            station.start(faults=[fault] if trouble else [])
            for _ in range(bench.chance.randint(2, 4)):
                time.sleep(bench.chance.uniform(0, 1))
                camera.happen()
            time.sleep(bench.chance.uniform(0, 3))
            station.kill()
            if bench.chance.random() < 0.3:
                _count_all(station.source, station.out)
                camera.all_counted()
            elif bench.chance.random() < 0.3:
                station.command("retry", "--out", station.out)
        camera.finish()
        if station.drain() not in (0, 3):
            raise BrokenError(f"the last count failed: {station.said_last()}")
        station.command("retry", "--out", station.out)
        station.drain()
        whole = bench.reference(station.source, "--cells", name=f"whole{number}")
        result.n_images += len(camera.files)
        result.verdict.add(verdict.compare(whole, station.out), f"history {number}: ")
        n_events += camera.n_events
    result.remark = f"{n_events} events by chance, {n_histories * n_rounds} kills; the scale is estimated"
    return result


def _count_all(source: Path, out: Path) -> None:
    """A run by hand, beside the service."""
    done = reference(source, out, "--cells")
    if done.returncode not in (0, 3):
        raise BrokenError(f"the run ended with {done.returncode}: {done.stderr}")


SCENARIOS = (
    ("damaged files", damaged_files),
    ("machine trouble", machine_trouble),
    ("moves", moves),
    ("history", history),
)

__all__ = ["SCENARIOS"]

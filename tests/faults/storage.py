"""Disks, shares and permissions that come and go, and a damaged ledger."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import verdict
from tests.faults.harness import (
    SCAN_EVERY_S,
    Bench,
    BrokenError,
    Result,
    SkippedError,
    Station,
    mount,
    tmpfs,
    unmount,
    wait_for,
)
from tests.faults.pictures import sha256
from tests.faults.verdict import Expected

_PAUSE_S = 3 * SCAN_EVERY_S


def _tells(station: Station, *words: str) -> bool:
    """Whether the state holds one of these words."""
    told = str(station.state()).lower()
    return any(word in told for word in words)


def _fill_up(folder: Path, *, leave_bytes: int) -> Path:
    """Fills a file system up to `leave_bytes`."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize) > leave_bytes:
            try:
                file.write(bytes(min(free - leave_bytes, 1 << 16)))
            except OSError:
                break
    return filler


def nearly_full(bench: Bench) -> Result:
    """Less space than --min-free-mb: the service pauses in time, says so, and goes on with more space."""
    result = Result()
    expected = Expected()
    with tmpfs(bench.folder / "disk", "12m") as disk:
        station = bench.station("", min_free_mb=4)
        station.out = disk / "results"
        bench.put(station.source / "before", 20, expected)
        station.start()
        station.wait_counted(20)
        filler = _fill_up(disk, leave_bytes=2 << 20)
        time.sleep(_PAUSE_S)
        n_before = verdict.n_counted(station.out)
        bench.put(station.source / "during", 20, expected)
        time.sleep(_PAUSE_S)
        result.check(verdict.n_counted(station.out) == n_before, "it went on writing on a disk nearly full")
        result.check(station.is_alive, "it died on a disk nearly full")
        result.check(_tells(station, "disk", "room", "full", "space"), f"state: {station.state()}")
        filler.unlink()
        station.finish(expected.n_images)
        result.judged(station.out, expected)
    result.remark = "paused and went on by itself"
    return result


def really_full(bench: Bench) -> Result:
    """Writing fails with ENOSPC, in the tables or the ledger, again and again."""
    result = Result()
    expected = Expected()
    n_rounds = 3 if bench.is_short else 12
    with tmpfs(bench.folder / "disk", "6m") as disk:
        station = bench.station("", "--cells", min_free_mb=0)
        station.out = disk / "results"
        bench.put(station.source / "slide", 10, expected)
        station.start()
        station.wait_counted(10)
        for i in range(n_rounds):
            filler = _fill_up(disk, leave_bytes=[0, 4096, 20_000, 40_000, 80_000, 150_000][i % 6])
            bench.put(station.source / ("slide" if i % 2 else f"slide{i}"), 10, expected)
            time.sleep(_PAUSE_S)
            if not station.is_alive:
                raise BrokenError(f"it died on a full disk: {station.said_last()}")
            if i == 0:
                result.check(verdict.n_counted(station.out) < expected.n_images, "the disk was never full")
                result.check(
                    _tells(station, "disk", "room", "full", "space", "write"), f"state: {station.state()}"
                )
            filler.unlink()
            station.wait_counted(expected.n_images, timeout_s=30)
        station.finish(expected.n_images)
        result.judged(station.out, expected)
    result.remark = f"{n_rounds} times full, went on by itself"
    return result


def full_and_killed(bench: Bench) -> Result:
    """The power fails while the disk is full. The service starts again before there is space."""
    result = Result()
    expected = Expected()
    with tmpfs(bench.folder / "disk", "6m") as disk:
        station = bench.station("", min_free_mb=0)
        station.out = disk / "results"
        bench.put(station.source / "slide", 10, expected)
        station.start()
        station.wait_counted(10)
        for leave_bytes in (0,) if bench.is_short else (0, 12_000, 60_000, 0, 30_000):
            filler = _fill_up(disk, leave_bytes=leave_bytes)
            bench.put(station.source / "slide", 10, expected)
            time.sleep(_PAUSE_S)
            station.kill()
            station.start()
            time.sleep(_PAUSE_S)
            # Without space for its lock it may refuse to start: exit 5, and systemd tries again.
            if not station.is_alive:
                code = station.ended(1)
                result.check(code == 5, f"started on a full disk it ended with {code}: {station.said_last()}")
                filler.unlink()
                station.start()
            else:
                filler.unlink()
            station.wait_counted(expected.n_images, timeout_s=60)
        station.finish(expected.n_images)
        result.judged(station.out, expected)
    return result


# -- permissions ----------------------------------------------------------------------------------------


def _need_permissions() -> None:
    """Root ignores permissions, so the station is then started without that privilege."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        raise SkippedError("root may read everything, and setpriv is missing")


def permission_of_a_file(bench: Bench) -> Result:
    """Files that cannot be read for less and for more than the grace period, and then can."""
    _need_permissions()
    result = Result()
    expected = Expected()
    station = bench.station("", is_plain_user=True)
    station.out.mkdir()
    slide = station.source / "slide"
    early = bench.put(slide, 3, expected)
    for path in early:
        path.chmod(0)
    bench.put(slide, 10, expected)
    station.start()
    station.wait_counted(10)
    result.check(verdict.n_failed(station.out) == 0, "failed before the grace period was over")
    early[0].chmod(0o644)
    station.wait_counted(11)
    wait_for(lambda: verdict.n_failed(station.out) == 2, 30)
    rows = verdict.slide_tables(station.out)["slide"]
    reasons = [row["failure"] for row in rows if row["status"] == "failed"]
    result.check(reasons == ["unreadable"] * 2, f"the two closed files have failed with {reasons}")
    for path in early:
        path.chmod(0o644)
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    result.remark = "readable again before and after it had failed"
    return result


def permission_of_the_source(bench: Bench) -> Result:
    """The source folder, and the folder of a slide, lose their permissions and get them back."""
    _need_permissions()
    result = Result()
    expected = Expected()
    station = bench.station("", is_plain_user=True)
    station.out.mkdir()
    bench.put(station.source / "one", 10, expected)
    bench.put(station.source / "two", 10, expected)
    station.start()
    station.wait_counted(20)
    for folder in (station.source, station.source / "one"):
        folder.chmod(0)
        bench.put(station.source / "one", 5, expected)
        bench.put(station.source / "two", 5, expected)
        time.sleep(_PAUSE_S)
        if not station.is_alive:
            raise BrokenError(f"it died without permission for {folder.name}: {station.said_last()}")
        folder.chmod(0o755)
        station.wait_counted(expected.n_images, timeout_s=30)
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    return result


def permission_of_the_results(bench: Bench) -> Result:
    """The results folder cannot be written, or not even read, and then can again."""
    _need_permissions()
    result = Result()
    expected = Expected()
    station = bench.station("", is_plain_user=True)
    station.out.mkdir()
    bench.put(station.source / "slide", 10, expected)
    station.start()
    station.wait_counted(10)
    for mode in (0o555, 0):
        station.out.chmod(mode)
        bench.put(station.source / "slide", 5, expected)
        bench.put(station.source / f"slide{mode}", 5, expected)
        time.sleep(_PAUSE_S)
        if not station.is_alive:
            raise BrokenError(f"it died without permission for the results: {station.said_last()}")
        station.out.chmod(0o755)
        result.check(verdict.n_counted(station.out) < expected.n_images, "the folder was always writable")
        station.wait_counted(expected.n_images, timeout_s=30)
    station.finish(expected.n_images)
    result.judged(station.out, expected)
    return result


# -- shares ---------------------------------------------------------------------------------------------


def _vanishing_source(bench: Bench, result: Result, name: str, *options: str, use_bind: bool) -> None:
    """A source that is unmounted and mounted again, twice, and once while the service is stopped."""
    expected = Expected()
    station = bench.station(name, *options)
    disk = bench.folder / name / "disk"

    def fill(n: int) -> None:
        bench.put(disk / "slide", n, expected)
        bench.put(disk / f"slide{n}", 5, expected)

    def attach() -> None:
        mount("--bind", str(disk), str(station.source))

    mounted = [disk] if use_bind else []
    disk.mkdir()
    try:
        if not use_bind:
            mount("-t", "tmpfs", "-o", "size=20m,mode=755", "rbc-edge-faults", str(disk))
            mounted.append(disk)
        (disk / ".station-camera").touch()
        fill(10)
        attach()
        station.start()
        station.wait_counted(expected.n_images)
        for n in (11,) if bench.is_short else (11, 12):
            unmount(station.source)
            fill(n)
            n_before = verdict.n_counted(station.out)
            time.sleep(_PAUSE_S)
            if not station.is_alive:
                raise BrokenError(f"{name}: it died when the source went: {station.said_last()}")
            state = station.state()
            result.check("away" in str(state), f"{name}: the source is gone, and the state is {state}")
            result.check(
                verdict.n_counted(station.out) == n_before, f"{name}: counts changed without a source"
            )
            n_lines = len(station.said().splitlines())
            time.sleep(_PAUSE_S)
            n_more = len(station.said().splitlines()) - n_lines
            result.check(n_more <= 1, f"{name}: {n_more} lines in {_PAUSE_S:g} s about a source that is away")
            attach()
            station.wait_counted(expected.n_images, timeout_s=30)
        station.finish(expected.n_images)
        result.judged(station.out, expected, f"{name}: ")
        # Missing at the start: exit 5 where that can be known, and never an empty table.
        unmount(station.source)
        station.start()
        code = station.ended(_PAUSE_S)
        if code is None:
            state = station.state()
            result.check("away" in str(state), f"{name}: started without a source: {state}")
            station.stop()
        else:
            result.check(code == 5, f"{name}: started without a source it gave {code}")
        again = verdict.judge(station.out, expected)
        result.verdict.add(again, f"{name}, after a start without a source: ")
    finally:
        station.kill()
        unmount(station.source)
        if not use_bind:
            unmount(disk)


def unmounted(bench: Bench) -> Result:
    """The camera's share disappears and comes back. No count is deleted, and new images are counted."""
    result = Result()
    marker = ("--marker", ".station-camera")
    _vanishing_source(bench, result, "other-device", use_bind=False)
    # Here the empty folder under the mount is on the same device.
    _vanishing_source(bench, result, "bind-marker", *marker, use_bind=True)
    if not bench.is_short:
        _vanishing_source(bench, result, "other-device-marker", *marker, use_bind=False)
        _vanishing_source(bench, result, "bind", use_bind=True)
    result.remark = "other device and bind mount, with and without marker"
    return result


def other_card(bench: Bench) -> Result:
    """A new empty card replaces the old one. The old counts stay, and the new images are counted."""
    result = Result()
    expected = Expected()
    station = bench.station()
    try:
        mount("-t", "tmpfs", "-o", "size=20m,mode=755", "rbc-edge-faults", str(station.source))
        bench.put(station.source / "slide", 10, expected)
        station.start()
        station.wait_counted(10)
        for _ in range(3):
            unmount(station.source)
            time.sleep(_PAUSE_S)
            mount("-t", "tmpfs", "-o", "size=20m,mode=755", "rbc-edge-faults", str(station.source))
            bench.put(station.source / "slide", 10, expected)
            station.wait_counted(expected.n_images, timeout_s=30)
        station.finish(expected.n_images)
    finally:
        station.kill()
        unmount(station.source)
    result.judged(station.out, expected)
    return result


# -- the ledger -----------------------------------------------------------------------------------------


def _garbage_header(bench: Bench, ledger: Path) -> None:
    with ledger.open("r+b") as file:
        file.write(bench.chance.randbytes(200))


def _flipped_pages(bench: Bench, ledger: Path) -> None:
    n_pages = ledger.stat().st_size // 4096
    with ledger.open("r+b") as file:
        for page in range(2, n_pages, 3):
            file.seek(page * 4096)
            file.write(bench.chance.randbytes(4096))


def _one_page(_: Bench, ledger: Path) -> None:
    """One page of many, which most queries never read."""
    with sqlite3.connect(ledger) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'field_content'").fetchone()
    db.close()
    with ledger.open("r+b") as file:
        file.seek((page - 1) * 4096 + 200)
        file.write(b"\xa5" * 3000)


def _cut(_: Bench, ledger: Path) -> None:
    os.truncate(ledger, ledger.stat().st_size // 2 // 4096 * 4096)


def _cut_oddly(_: Bench, ledger: Path) -> None:
    os.truncate(ledger, ledger.stat().st_size - 5000)


def _text(_: Bench, ledger: Path) -> None:
    ledger.write_text("this was a ledger once\n" * 500, encoding="utf-8")


def _zeros(_: Bench, ledger: Path) -> None:
    ledger.write_bytes(bytes(ledger.stat().st_size))


DAMAGE: tuple[Callable[[Bench, Path], None], ...] = (
    *(_garbage_header, _one_page, _cut, _flipped_pages, _cut_oddly, _text, _zeros),
)


def damaged_ledger(bench: Bench) -> Result:
    """The damage is found at the start. The ledger is moved away with its tables, and a new one is made."""
    result = Result()
    good = bench.station("good", "--cells")
    first = Expected()
    bench.put(good.source / "slide", 30, first)
    bench.put(good.source / "archived", 10, first)
    code = good.drain()
    result.check(code == 0, f"--once ended with {code}")
    for damage in DAMAGE[:3] if bench.is_short else DAMAGE:
        name = damage.__name__.strip("_")
        base = bench.folder / name
        shutil.copytree(good.source, base / "camera")
        shutil.copytree(good.out, base / "results")
        station = bench.station(name, "--cells")
        expected = Expected()
        for path in (station.source / "slide").iterdir():
            digest = sha256(path.read_bytes())
            expected.images["slide"][digest] = first.images["slide"][digest]
        # Counts of images that are no longer in the camera's folder stay in the old table only.
        shutil.rmtree(station.source / "archived")
        bench.put(station.source / "new", 5, expected)
        damage(bench, station.out / "ledger.sqlite3")
        broken = (station.out / "ledger.sqlite3").read_bytes()
        station.start()
        # A damaged ledger may still tell the old counts: wait until the service has put it aside.
        station.wait_said("damaged")
        station.finish(expected.n_images)
        result.judged(station.out, expected, f"{name}: ")
        aside = list(station.out.glob("damaged-*"))
        result.check(len(aside) == 1, f"{name}: {len(aside)} folders with a damaged ledger")
        if aside:
            kept = verdict.read_table(aside[0] / "archived.csv")
            result.check(len(kept) == 10, f"{name}: {len(kept)} rows of the old table are kept, not 10")
            ledgers = [p for p in aside[0].glob("ledger*") if p.read_bytes() == broken]
            result.check(len(ledgers) == 1, f"{name}: the damaged ledger is not kept as it was")
        result.check("damaged" in station.said(), f"{name}: nothing was said: {station.said_last()}")
        # The next start finds no damage.
        station.start()
        station.finish(expected.n_images)
        result.check(len(list(station.out.glob("damaged-*"))) == len(aside), f"{name}: put aside again")
        result.verdict.add(verdict.judge(station.out, expected), f"{name}, started again: ")
    result.remark = f"{3 if bench.is_short else len(DAMAGE)} kinds of damage; old tables kept"
    return result


def lost_ledger(bench: Bench) -> Result:
    """The ledger, its journal or a table is deleted between two starts."""
    result = Result()
    expected = Expected()
    station = bench.station()
    bench.put(station.source / "slide", 20, expected)
    station.start()
    station.wait_counted(20)
    station.stop()
    for names in (
        ("ledger.sqlite3-wal", "ledger.sqlite3-shm"),
        ("slide.csv", "slides.csv"),
        ("ledger.sqlite3",),
    ):
        for name in names:
            (station.out / name).unlink(missing_ok=True)
        bench.put(station.source / "slide", 5, expected)
        station.start()
        station.finish(expected.n_images)
        result.judged(station.out, expected, f"without {names[0]}: ")
    result.remark = "journal, tables, and ledger deleted between two starts"
    return result


SCENARIOS = (
    ("disk nearly full", nearly_full),
    ("disk really full", really_full),
    ("full, and killed", full_and_killed),
    ("permission of a file", permission_of_a_file),
    ("permission of the source", permission_of_the_source),
    ("permission of the results", permission_of_the_results),
    ("source unmounted", unmounted),
    ("another card", other_card),
    ("damaged ledger", damaged_ledger),
    ("deleted ledger", lost_ledger),
)

__all__ = ["SCENARIOS"]

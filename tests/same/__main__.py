"""Checks that a change of the code does not change the tables.

``python -m tests.same`` counts known folders in known ways, and compares every table with
``tests/same/record.json``. ``--write`` makes that record. A change that only moves code leaves the record as
it is. A change of results writes a new record, and its commit says why.

The program runs as a user starts it, in processes of its own. Columns with times are left out, and paths are
relative to the source. The record holds a digest of each table and not the table, because counts of the
public photographs stay outside the repository. Networks in int8 round differently on other processors, so
compare only on the kind of processor that made the record.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("record.json")
BCCD = Path(os.environ.get("RBC_DATA", REPOSITORY.parent / "shared" / "data")) / "bccd" / "JPEGImages"
TIMES = ("analyzed_at", "elapsed_ms")

Tables = dict[str, str]


def _environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RBC_EDGE_", "NOTIFY_"))}
    return env | {"PYTHONPATH": str(REPOSITORY / "edge"), "XDG_CONFIG_HOME": "/nonexistent"}


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rbc_edge", *map(str, arguments)]


def _run(source: Path, out: Path, *, expected: int = 0) -> None:
    """Counts a folder. `expected` is the exit code, 3 for a folder with a broken image."""
    command = _command("run", source, "--out", out, "--cells", "--quiet")
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode != expected:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}, expected {expected}:\n{done.stderr}"
        )


def _tables(out: Path, source: Path) -> Tables:
    """Returns the digest of each table, without times, with paths relative to `source`."""
    found: Tables = {}
    for path in sorted([*out.glob("*.csv"), *out.glob("cells/*.csv"), *out.glob("shapes/*.csv")]):
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        header = rows[0]
        for row in rows[1:]:
            for name in TIMES:
                if name in header:
                    row[header.index(name)] = ""
            if "path" in header:
                row[header.index("path")] = os.path.relpath(row[header.index("path")], source)
        content = "\n".join(",".join(json.dumps(cell) for cell in row) for row in rows)
        found[path.relative_to(out).as_posix()] = hashlib.sha256(content.encode()).hexdigest()[:32]
    return found


def _draw(folder: Path) -> None:
    """Draws three slides of eight fields. One also gets a broken file and a field of another slide."""
    sys.path.insert(0, str(REPOSITORY / "edge"))
    from rbc_edge.ops import synthetic

    for k, (name, diameter, suffix) in enumerate(
        (("day1", 58, ".png"), ("day2", 84, ".jpg"), ("day3/left", 40, ".png"))
    ):
        place = folder / name
        place.mkdir(parents=True)
        drawn = synthetic.draw_slide(
            np.random.default_rng(7 + k),
            8,
            width_px=480,
            height_px=360,
            cell_diameter_px=diameter,
            crowding=0.5,
            stain=synthetic.CREAM,
        )
        for i, field in enumerate(drawn):
            done, data = cv2.imencode(suffix, cv2.cvtColor(field.image, cv2.COLOR_RGB2BGR))
            assert done
            (place / f"f{i:02}{suffix}").write_bytes(data.tobytes())
    (folder / "day1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    shutil.copy(folder / "day2" / "f03.jpg", folder / "day1" / "stranger.jpg")


def _bccd(work: Path) -> Tables:
    """Counts all fields of BCCD in one run."""
    _run(BCCD, work / "out")
    return _tables(work / "out", BCCD)


def _demo(work: Path) -> Tables:
    """Runs the demo."""
    out = work / "out"
    command = _command("demo", "--out", out)
    subprocess.run(command, env=_environment(), capture_output=True, check=True)
    results = out / "results" if (out / "results").is_dir() else out
    return _tables(results, out)


def _whole(work: Path) -> Tables:
    """Counts a drawn folder in one run."""
    source = work / "source"
    _draw(source)
    _run(source, work / "out", expected=3)
    return _tables(work / "out", source)


def _resumed(work: Path) -> Tables:
    """Counts every second file, then all files, then once more."""
    drawn, source = work / "drawn", work / "source"
    _draw(drawn)
    files = sorted(path for path in drawn.rglob("*") if path.is_file())
    for portion in (files[::2], files[1::2]):
        for file in portion:
            target = source / file.relative_to(drawn)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        has_broken = (source / "day1" / "broken.png").exists()
        _run(source, work / "out", expected=3 if has_broken else 0)
    _run(source, work / "out", expected=3)
    return _tables(work / "out", source)


def _killed(work: Path) -> Tables:
    """Kills the run twelve times, then counts to the end."""
    source, out = work / "source", work / "out"
    _draw(source)
    wait_s = 0.6
    for _ in range(12):
        child = subprocess.Popen(
            _command("run", source, "--out", out, "--cells", "--quiet"),
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(wait_s)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
        wait_s += 0.15
    _run(source, out, expected=3)
    return _tables(out, source)


def _renamed(work: Path) -> Tables:
    """Counts a folder, renames, copies, changes and removes files, and counts again."""
    source, out = work / "source", work / "out"
    _draw(source)
    _run(source, out, expected=3)
    day1, day2 = source / "day1", source / "day2"
    (day1 / "f00.png").rename(day1 / "z00.png")
    (day1 / "f07.png").rename(day1 / "a07.png")
    shutil.copy(day1 / "f03.png", day1 / "copy.png")
    shutil.copy(day2 / "f01.jpg", day2 / "x.jpg")
    (day2 / "f02.jpg").unlink()
    (day2 / "f05.jpg").write_bytes((day2 / "f06.jpg").read_bytes() + b"\0")
    _run(source, out, expected=3)
    return _tables(out, source)


def _watched(work: Path) -> Tables:
    """Counts a drawn folder with the service."""
    source = work / "source"
    _draw(source)
    command = _command("watch", source, "--out", work / "out", "--cells", "--quiet", "--once")
    done = subprocess.run(
        [*command, "--settle-s", "0", "--grace-s", "0"],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 3:
        raise SystemExit(f"watch --once ended with {done.returncode}, expected 3:\n{done.stderr}")
    return _tables(work / "out", source)


CASES: dict[str, Callable[[Path], Tables]] = {
    "bccd": _bccd,
    "demo": _demo,
    "whole": _whole,
    "resumed": _resumed,
    "killed": _killed,
    "renamed": _renamed,
    "watched": _watched,
}


def _differences(before: Tables, now: Tables) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if name not in now:
            yield f"{name}: is missing"
        elif name not in before:
            yield f"{name}: is new"
        elif before[name] != now[name]:
            yield f"{name}: differs"


def main() -> int:
    """Counts, then writes or compares. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.same", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the record instead of comparing")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="only these cases")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the results in this folder")
    options = parser.parse_args()
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    before: dict[str, Tables] = kept.get("tables", {})
    n_different = n_tables = 0
    for name in options.only:
        if name == "bccd" and not BCCD.is_dir():
            print(f"{name:8} skipped: no {BCCD}")
            continue
        with tempfile.TemporaryDirectory(prefix=f"rbc-edge-same-{name}-") as folder:
            now = CASES[name](Path(folder))
            if options.keep is not None:
                shutil.copytree(Path(folder) / "out", options.keep / name, dirs_exist_ok=True)
        n_tables += len(now)
        if options.write:
            before[name] = now
            print(f"{name:8} {len(now)} tables recorded")
            continue
        found = list(_differences(before.get(name, {}), now))
        n_different += len(found)
        print(f"{name:8} {'same' if not found else 'DIFFERENT'}: {len(now)} tables")
        for line in found:
            print(f"         {line}")
    if options.write:
        record = {"processor": platform.machine(), "tables": dict(sorted(before.items()))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return 0
    print(f"{'same' if n_different == 0 else f'{n_different} different'}: {n_tables} tables")
    return 1 if n_different else 0


if __name__ == "__main__":
    sys.exit(main())

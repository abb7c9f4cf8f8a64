"""Kills ``rbc-edge run`` at random moments and checks that its tables end as an uninterrupted run's.

Run as ``python bench/kill_run.py FOLDER [--kills 20] [--seed 0]``. Real processes, real SIGKILL, real
files; only the times (columns analyzed_at and elapsed_ms) may differ. Exit 1 when anything else does.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES = {"analyzed_at", "elapsed_ms"}


def command(source: Path, out: Path) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-m", "rbc_edge", "run", str(source), "--out", str(out), "--cells", "--quiet"]


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    """Every table under a folder, without its times."""
    found: dict[str, list[dict[str, str]]] = {}
    for file in sorted(out.rglob("*.csv")):
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(stream)]
        found[file.relative_to(out).as_posix()] = rows
    return found


def main() -> int:
    """Runs once whole, once in pieces, and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        expected_code = subprocess.run(command(asked.source, whole), check=False).returncode
        lasted_s = time.monotonic() - started
        expected = tables(whole)
        print(f"uninterrupted run: {lasted_s:.1f} s, exit {expected_code}, {len(expected)} tables")
        killed = rounds = 0
        differing: list[str] = []
        while killed < asked.kills:
            # A round: one output folder, killed again and again until a run reaches its end.
            rounds += 1
            pieces = Path(folder) / f"pieces-{rounds}"
            here = 0
            while True:
                process = subprocess.Popen(command(asked.source, pieces))
                # Over the whole of a run: start-up, scale, images, and the writing of the tables.
                left_s = chance.uniform(0.05, lasted_s / 3) if killed < asked.kills else None
                try:
                    code = process.wait(timeout=left_s)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    here += 1
            actual = tables(pieces)
            wrong = sorted(n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n))
            verdict = (
                "tables equal the uninterrupted run's" if not wrong else f"DIFFERENT: {', '.join(wrong)}"
            )
            print(f"round {rounds}: {here} kills, then exit {code}: {verdict}")
            differing += wrong if code == expected_code else [f"exit {code}"]
        print(f"{killed} kills in {rounds} rounds, {len(differing)} differences")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

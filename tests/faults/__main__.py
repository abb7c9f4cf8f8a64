"""The fault suite: ``make faults``, or ``python -m tests.faults`` from the repository's root.

It works with real processes of ``rbc-edge watch``, real files and real signals. No part of the program is
replaced. It prints a table with a row for each fault: the number of images, and how many of them are lost,
doubled or wrong. The exit code is 1 when any of these is not zero. A fault that the machine cannot produce
(mounting without root, another time without libfaketime) is skipped, and its row says why.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from tests.faults import doors, files, kills, pictures, service, soak, storage, verdict
from tests.faults.harness import Bench, BrokenError, Result, SkippedError, unmount
from tests.faults.verdict import Expected

Scenario = Callable[[Bench], Result]

SCENARIOS: tuple[tuple[str, Scenario], ...] = (
    *(
        *kills.SCENARIOS,
        *files.SCENARIOS,
        *storage.SCENARIOS,
        *service.SCENARIOS,
        *doors.SCENARIOS,
        *soak.SCENARIOS,
    ),
)

HEADER = f"{'fault':28} {'images':>7} {'lost':>5} {'doubled':>7} {'wrong':>5} {'s':>6}  remark"


def the_judge(bench: Bench) -> Result:
    """Damages a good result in every way. If the judge does not see it, no other row can be trusted."""
    result = Result()
    expected = Expected()
    bench.put(bench.folder / "slide", 12, expected)
    out = bench.reference(bench.folder / "slide", "--cell-diameter", pictures.CELL_DIAMETER_PX)
    for unseen in verdict.check_the_judge(out, expected):
        result.check(False, f"the judge does not see: {unseen}")
    result.n_images = expected.n_images
    result.remark = "a row removed, doubled, changed, a sum too high: all seen"
    return result


def run(name: str, scenario: Scenario, bench: Bench) -> tuple[str, bool]:
    """Runs one scenario. Returns its lines of the table, and whether everything was right."""
    started_s = time.monotonic()
    try:
        result = scenario(bench)
    except SkippedError as reason:
        return f"{name:28} {'-':>7} {'-':>5} {'-':>7} {'-':>5} {'-':>6}  skipped: {reason}", True
    except BrokenError as error:
        result = Result(remark="stopped early")
        result.verdict.note("wrong", str(error))
    except Exception:  # noqa: BLE001  an error in one scenario must not hide the others
        result = Result(remark="stopped early")
        result.verdict.note("wrong", traceback.format_exc())
    took_s = time.monotonic() - started_s
    found = result.verdict
    line = (
        f"{name:28} {result.n_images:7} {found.lost:5} {found.doubled:7} {found.wrong:5} {took_s:6.1f}"
        f"  {result.remark}"
    )
    return "\n".join([line, *(f"    {what}" for what in found.what)]), found.is_clean


def main() -> int:
    """Runs the scenarios and prints the table. Returns the exit code."""
    names = ["the judge itself", *(name for name, _ in SCENARIOS)]
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="Only faults with this text in their name. Can be repeated.",
    )
    parser.add_argument(
        "--short", action="store_true", help="A shorter form of a few minutes, for continuous integration."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random moments.")
    parser.add_argument("--keep", action="store_true", help="Keep the folders of all faults.")
    parser.add_argument("--jobs", type=int, default=1, help="How many faults run at the same time.")
    parser.add_argument("--list", action="store_true", help="Print the names of the faults.")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(names))
        return 0
    scenarios = [
        (name, scenario)
        for name, scenario in (("the judge itself", the_judge), *SCENARIOS)
        if not asked.only or any(part.lower() in name.lower() for part in asked.only)
    ]
    if not scenarios:
        parser.error(f"no fault has that name. The names are: {', '.join(names)}")
    # TMPDIR is respected: where /tmp is in memory, the files of the soak do not fit.
    top = Path(tempfile.mkdtemp(prefix="rbc-edge-faults-"))
    top.chmod(0o755)
    started_s = time.monotonic()
    print(f"folder {top}, seed {asked.seed}{', short' if asked.short else ''}, {os.cpu_count()} processors")
    (top / "pictures").mkdir()
    drawn = pictures.draw(top / "pictures")
    print(HEADER, flush=True)
    all_right = True

    benches: list[Bench] = []

    def break_off(number: int, _frame: FrameType | None) -> None:
        # Ends everything that was started or mounted. It does not wait for the threads of the scenarios.
        for bench in benches:
            bench.close()
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            point = Path(line.split()[4])
            if point.is_relative_to(top):
                unmount(point)
        print(f"stopped by {signal.Signals(number).name}. The folders are kept in {top}")
        sys.stdout.flush()
        os._exit(128 + number)

    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, break_off)

    def one(number: int, name: str, scenario: Scenario) -> tuple[str, bool]:
        folder = top / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        bench = Bench(folder, drawn, seed=asked.seed * 1000 + number, is_short=asked.short)
        benches.append(bench)
        try:
            said, right = run(name, scenario, bench)
        finally:
            bench.close()
        print(said, flush=True)
        if right and not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return said, right

    with ThreadPoolExecutor(asked.jobs) as pool:
        for done in [pool.submit(one, i, n, s) for i, (n, s) in enumerate(scenarios)]:
            all_right &= done.result()[1]
    if all_right and not asked.keep:
        shutil.rmtree(top, ignore_errors=True)
    else:
        print(f"the folders are kept in {top}")
    print(
        f"{'everything is right' if all_right else 'FAULTS FOUND'} after {time.monotonic() - started_s:.0f} s"
    )
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())

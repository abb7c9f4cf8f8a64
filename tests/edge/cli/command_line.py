"""What the tests of the command line share: the program as a process, and its tables."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from stand_in import TOY_BUNDLE

import rbc_edge

Run = Callable[..., tuple[int, str, str]]
"""The fixture `rbc`."""

SOURCE_ROOT = str(Path(rbc_edge.__file__).parents[1])
TOY = ("--bundle", TOY_BUNDLE, "--cell-diameter", 40)


def process(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": SOURCE_ROOT, **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "rbc_edge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )


def rows(path: Path, *without: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]

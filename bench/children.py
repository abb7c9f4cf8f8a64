"""One measured process: how long it ran, and the most memory it held. All sides are timed by this.

Whoever measures stays light: Linux hands a parent's peak of memory to its child until the child's own is
larger, so nothing here and nothing that imports this may import NumPy.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]

_OURS: Final = ("RBC_EDGE_", "OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_", "TORCH_", "YOLO_")


class ChildError(Exception):
    """A process that was to be measured failed; the message says which, and its last words."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of one process.

    Attributes:
        wall_s: From before its start to its end.
        peak_rss_mb: Most memory it held, MB of 1e6 bytes.
        output: What it printed.
    """

    wall_s: float
    peak_rss_mb: float
    output: str

    def json(self) -> Any:
        """The JSON on its last line, or of all that it printed."""
        text = self.output.strip()
        return json.loads(text if text.startswith("{\n") else text.splitlines()[-1])


def run(command: Sequence[str], *, threads: int, env: Mapping[str, str] | None = None) -> Ran:
    """Runs a process on so many cores and tells it to take so many threads.

    Both, so that no side gains from threads that nobody counted: readers, pools, the runtime's own.

    Args:
        command: The program and its arguments; its working directory is the checkout.
        threads: Cores it may use, and ``OMP_NUM_THREADS``.
        env: More variables.

    Raises:
        ChildError: It left with another code than 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started_s = time.perf_counter()
        child = start(command, threads=threads, env=env, stdout=out, stderr=err)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:  # we are told to end; it must not go on by itself
            child.kill()
            child.wait()
            raise
        wall_s = time.perf_counter() - started_s
        child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            words = err.read().decode(errors="replace").strip()[-600:]
            raise ChildError(f"{' '.join(command)[:300]}\nleft with {child.returncode}: {words}")
        return Ran(wall_s, used.ru_maxrss * 1024 / 1e6, out.read().decode(errors="replace"))


def start(
    command: Sequence[str],
    *,
    threads: int,
    env: Mapping[str, str] | None = None,
    stdout: Any = subprocess.DEVNULL,
    stderr: Any = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Starts a process as `run` does, and does not wait for it."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:threads])  # inherited; cheaper than a program in between
    try:
        return subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment(threads) | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    finally:
        os.sched_setaffinity(0, cores)


def environment(threads: int) -> dict[str, str]:
    """The environment of every side: nobody's settings, and threads as told."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
    # A checkout that is not installed is found by this; the program itself ignores it where it is.
    paths = [str(ROOT / part) for part in ("edge", "train", "export")]
    kept["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": str(threads), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}


def station() -> list[str]:
    """The command ``rbc-edge`` of this environment."""
    script = Path(sys.executable).with_name("rbc-edge")
    return [str(script)] if script.exists() else [sys.executable, "-m", "rbc_edge"]


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs one of this folder's programs."""
    return [sys.executable, "-m", f"bench.{name}", *map(str, arguments)]

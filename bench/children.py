"""Runs one process and measures its time and its peak memory. All sides are measured this way.

The measuring process must stay small. On Linux a child starts with the peak memory of its parent, until its
own peak is larger. So this module, and the programs that measure memory with it, must not import NumPy.
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
    """A measured process failed. The message holds its command and the end of its output."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of one process.

    Attributes:
        wall_s: From before its start to its end.
        peak_rss_mb: Peak resident memory, MB of 1e6 bytes.
        output: What it printed.
    """

    wall_s: float
    peak_rss_mb: float
    output: str

    def json(self) -> Any:
        """The JSON on its last line, or in its whole output."""
        text = self.output.strip()
        return json.loads(text if text.startswith("{\n") else text.splitlines()[-1])


def run(command: Sequence[str], *, threads: int, env: Mapping[str, str] | None = None) -> Ran:
    """Runs a process on `threads` cores, and asks it to use as many threads.

    Both are set. With cores to spare, a side could gain from threads that are not counted, such as readers,
    pools and the threads of a runtime.

    Args:
        command: The program and its arguments. It runs in the root of the checkout.
        threads: Cores it may use, and ``OMP_NUM_THREADS``.
        env: More variables.

    Raises:
        ChildError: It ended with another code than 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started_s = time.perf_counter()
        child = start(command, threads=threads, env=env, stdout=out, stderr=err)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:  # this process is asked to end, and the child must not go on alone
            child.kill()
            child.wait()
            raise
        wall_s = time.perf_counter() - started_s
        child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            words = err.read().decode(errors="replace").strip()[-600:]
            raise ChildError(f"{' '.join(command)[:300]}\nended with {child.returncode}: {words}")
        return Ran(wall_s, used.ru_maxrss * 1024 / 1e6, out.read().decode(errors="replace"))


def start(
    command: Sequence[str],
    *,
    threads: int,
    env: Mapping[str, str] | None = None,
    stdout: Any = subprocess.DEVNULL,
    stderr: Any = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Starts a process as `run` does, without waiting for its end."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:threads])  # the child inherits this; taskset would cost time
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
    """The environment of every side: no settings of the user, and the number of threads."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
    # So that a checkout that is not installed is found as well.
    paths = [str(ROOT / part) for part in ("edge", "train", "export")]
    kept["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": str(threads), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}


def station() -> list[str]:
    """The command ``rbc-edge`` of this environment."""
    script = Path(sys.executable).with_name("rbc-edge")
    return [str(script)] if script.exists() else [sys.executable, "-m", "rbc_edge"]


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a program of this folder."""
    return [sys.executable, "-m", f"bench.{name}", *map(str, arguments)]

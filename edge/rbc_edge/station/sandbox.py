"""A process of its own for images that may bring one down.

An image that was being tried when a process died is a suspect, not guilty: most processes die of power cuts
and of people. So suspects are first counted by ``rbc-edge run`` in a child, into a folder that is thrown
away. What becomes of the child is evidence; what becomes of this process, meanwhile, is not.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from rbc_edge.text import path_text

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 120.0
"""What takes longer than this for one image hangs, seconds."""

_PREFIX: Final = "rbc-edge-trial-"
_LOOK_EVERY_S: Final = 0.2
_ASKED_TO_LEAVE: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # no fault of an image


class Interrupted(Exception):  # noqa: N818  nothing went wrong
    """The trial was called off; it says nothing of the images."""


def survives(
    paths: Sequence[Path],
    *,
    options: Sequence[str],
    keep_going: Callable[[], bool] = lambda: True,
    command: Sequence[str] = (sys.executable, "-m", "rbc_edge"),
    timeout_s: float = TIMEOUT_S,
) -> bool:
    """Tells whether a process outlives the reading and counting of images.

    Args:
        paths: The images.
        options: Options of ``rbc-edge run`` that matter to a count (bundle, scale, threads).
        keep_going: Asked several times a second; False calls the trial off.
        command: The program.
        timeout_s: For each image, seconds.

    Returns:
        False when the child was ended by the system, or was still at it after its time.

    Raises:
        Interrupted: Called off, or somebody asked the child to leave.
    """
    # Its settings are those given here: not the environment's, not a file's; and it does not speak for us.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RBC_EDGE_", "NOTIFY_"))}
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as out:
        child = subprocess.Popen(
            [*command, "run", *options, "--config", os.devnull, "--quiet", "--out", out, "--", *paths],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _first_to_go(child.pid)
        try:
            code = _wait(child, timeout_s * len(paths), keep_going)
        finally:
            child.kill()
            child.wait()
    if code is not None and -code in _ASKED_TO_LEAVE:
        raise Interrupted
    alive = code is not None and code >= 0
    log.info("tried %s in a process of its own: %s", _named(paths), "it lives" if alive else "it died")
    return alive


def _wait(child: subprocess.Popen[bytes], timeout_s: float, keep_going: Callable[[], bool]) -> int | None:
    """Returns the child's exit code; None when its time is over."""
    left_s = timeout_s
    while left_s > 0:
        try:
            return child.wait(_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            left_s -= _LOOK_EVERY_S
            if not keep_going():
                raise Interrupted from None
    return None


def _first_to_go(pid: int) -> None:
    """Where memory runs out, the system ends the child and not the service."""
    with suppress(OSError):  # a system without it
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")


def _sweep() -> None:
    """Removes what processes that died during a trial have left."""
    for left_over in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = left_over.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left_over, ignore_errors=True)


def _named(paths: Sequence[Path]) -> str:
    return path_text(paths[0]) if len(paths) == 1 else f"{len(paths)} images"

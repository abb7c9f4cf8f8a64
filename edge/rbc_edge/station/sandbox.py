"""A process of its own for images that may kill one.

An image that was being counted when a process died may have killed it. Most processes die of power cuts and
of people, so that alone proves nothing. Such images are first counted by ``rbc-edge run`` in a child process,
into a folder that is thrown away. Only those that kill the child are put into quarantine: failed, and not
opened again.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from rbc_edge.errors import ExitCode
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Attempt
from rbc_edge.text import path_text
from rbc_edge.values import InboxFile

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 120.0  # an image that takes longer than this hangs
Sandbox = Callable[[Sequence[Path], Callable[[], bool]], bool | None]
"""Tells for images, and whether to go on, if a process of its own survives counting them (`survives`)."""

_PREFIX: Final = ".rbc-edge-sandbox-"
_POLL_S: Final = 0.2
_COUNTED: Final = (ExitCode.OK, ExitCode.SOME_FAILED)  # the only proof that images are harmless
_ASKED_TO_LEAVE: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # no fault of an image
# Deaths without a known cause. A computer that goes down in a sandbox run, and an image that survives the
# sandbox and kills the service, are rarer than a bad power supply. That must never fail a good image.
_MAX_SANDBOX_RUNS: Final = 25
_MAX_ATTEMPTS: Final = 100
_MAX_ATTEMPTS_WITHOUT: Final = 2


class Interrupted(Exception):  # noqa: N818  nothing went wrong
    """The sandbox run was called off. It says nothing of the images."""


def to_quarantine(
    ledger: Ledger,
    interrupted: Mapping[InboxFile, Attempt],
    survives: Sandbox | None,
    *,
    keep_going: Callable[[], bool],
) -> tuple[list[InboxFile], list[InboxFile]]:
    """Finds out which images kill a process, of those that were being counted when one died.

    Without a sandbox (`survives`), an image that two processes died of is taken for the cause. Returns the
    images that must not be opened again, and those that must not be opened now: the sandbox could not work.
    Raises `Interrupted` where `keep_going` is false: somebody asked this process to end.
    """
    max_attempts = _MAX_ATTEMPTS_WITHOUT if survives is None else _MAX_ATTEMPTS
    attempts = interrupted.items()
    killers = [f for f, a in attempts if a.n >= max_attempts or a.n_sandbox >= _MAX_SANDBOX_RUNS]
    rest = [file for file in interrupted if file not in killers]
    if survives is None or not rest:
        return killers, []
    log.warning("a process died while it counted %s", ", ".join(path_text(file.path) for file in rest))

    def outlives(files: Sequence[InboxFile]) -> bool | None:
        ledger.begin(files, sandbox=True)
        verdict: bool | None = True
        try:
            verdict = survives([file.path for file in files], keep_going)
        except Interrupted:
            if not keep_going():
                ledger.end(files, sandbox=True)
                raise
            # Somebody else ended the child: no evidence.
        if verdict is not False:
            ledger.end(files, sandbox=True)
        return verdict

    # Together, because most are harmless. One by one if no run of them ever ended.
    one_by_one = max(interrupted[file].n_sandbox for file in rest) >= _MAX_SANDBOX_RUNS // 2
    together = None if one_by_one else outlives(rest)
    if together:
        return killers, []
    is_tried = len(rest) == 1 and not one_by_one
    verdicts = {file: together if is_tried else outlives([file]) for file in rest}
    killers += [file for file, verdict in verdicts.items() if verdict is False]
    return killers, [file for file, verdict in verdicts.items() if verdict is None]


def survives(
    paths: Sequence[Path],
    keep_going: Callable[[], bool] = lambda: True,
    *,
    options: Sequence[str],
    command: Sequence[str] = (sys.executable, "-P", "-m", "rbc_edge"),
    timeout_s: float = TIMEOUT_S,
    folder: Path | None = None,
) -> bool | None:
    """Tells whether a process survives the reading and counting of images.

    `keep_going` is asked several times a second. False calls the run off. `options` of ``rbc-edge run`` are
    those that matter to a count (bundle, scale, threads). The time is for each image. `folder` is where the
    child's results lie until it ends. None: the system's temporary folder.

    Returns True when the child says that it counted. False when it was ended by the system, met a bug, or was
    still at it after its time. None when the child could not work at all: no space, no bundle, no process.
    Raises `Interrupted` where it was called off, or somebody asked the child to end.
    """
    # Its settings are those given here, not the environment's or a file's, and it does not speak to systemd.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RBC_EDGE_", "NOTIFY_"))}
    what = path_text(paths[0]) if len(paths) == 1 else f"{len(paths)} images"
    try:
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder) as out:
            child = subprocess.Popen(
                [*command, "run", *options, "--config", os.devnull, "--quiet", "--out", out, "--", *paths],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            with suppress(OSError):  # where memory runs out, the system ends the child and not the service
                Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000", encoding="ascii")
            try:
                code = _wait(child, timeout_s * len(paths), keep_going)
            finally:
                child.kill()
                child.wait()
    except OSError as error:
        log.warning("%s cannot be tried in a process of its own: %s", what, error.strerror or error)
        return None
    if code is not None and (-code in _ASKED_TO_LEAVE or code - 128 in _ASKED_TO_LEAVE):
        raise Interrupted
    verdict = True if code in _COUNTED else False if code is None or code <= ExitCode.UNEXPECTED else None
    words = {True: "it survives", False: "it died", None: f"it could not work (exit code {code})"}
    log.info("tried %s in a process of its own: %s", what, words[verdict])
    return verdict


def _wait(child: subprocess.Popen[bytes], timeout_s: float, keep_going: Callable[[], bool]) -> int | None:
    """Returns the child's exit code; None when its time is over."""
    left_s = timeout_s
    while left_s > 0:
        try:
            return child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            left_s -= _POLL_S
            if not keep_going():
                raise Interrupted from None
    return None


def _sweep(folder: Path | None) -> None:
    """Removes the folders of processes that died during a sandbox run."""
    for left_over in (folder or Path(tempfile.gettempdir())).glob(f"{_PREFIX}*"):
        pid = left_over.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left_over, ignore_errors=True)

"""The output folder as a place: who may write into it now, and how much room is left on its disk."""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rbc_edge.errors import UnavailableError
from rbc_edge.inbox import path_text

log = logging.getLogger(__name__)

LOCK_NAME: Final = ".rbc-edge.lock"

_LOOK_AGAIN_S: Final = 0.02  # a service lets go for a tenth of a second between two portions of its work


class BusyError(UnavailableError):
    """Another process writes into the output folder now."""


@contextmanager
def writing(out: Path, *, wait_s: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Holds an output folder for one writer of counts.

    Every writer takes it: a single run for its whole length, a service only while it settles images, so
    that a run gets its turn beside it. The lock is the system's and dies with the process.

    Args:
        out: The output folder; must exist.
        wait_s: How long to wait for another writer, seconds.
        sleep: Tests give their own.

    Raises:
        BusyError: Another writer holds the folder, and went on holding it.
        UnavailableError: The folder cannot be written.
    """
    descriptor = _open(out)
    try:
        left_s = wait_s
        while not _taken(descriptor, out):
            if left_s <= 0:
                raise BusyError(
                    f"another rbc-edge is writing to {path_text(out)}",
                    "wait until it has finished, or choose another output folder",
                )
            sleep(_LOOK_AGAIN_S)
            left_s -= _LOOK_AGAIN_S
        yield
    finally:
        os.close(descriptor)


def _open(out: Path) -> int:
    try:
        return os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out)}: cannot write: {error.strerror}", "check permissions and free space"
        ) from error


def _taken(descriptor: int, out: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks; one writer is then the user's care
        log.warning("%s: cannot lock the output folder: %s", path_text(out), error.strerror)
    return True


def free_bytes(folder: Path) -> int:
    """Returns the room left for us on a folder's disk, bytes.

    Raises:
        UnavailableError: The folder cannot be looked at.
    """
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(folder)}: cannot look at its disk: {error.strerror}", "is it mounted?"
        ) from error
    return disk.f_bavail * disk.f_frsize

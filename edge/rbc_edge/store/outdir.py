"""The output folder as a place: who may write into it, what is put there whole, how much room is left."""

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from rbc_edge.errors import UnavailableError
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

LOCK_NAME: Final = ".rbc-edge.lock"

_LOOK_AGAIN_S: Final = 0.02  # a service lets go for a tenth of a second between two portions of its work


_LEFT_OVER_S: Final = 3600.0  # a temporary file that old belongs to nobody


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


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Gives a file to write. It takes the place of `path` when it is complete, or not at all.

    Args:
        path: The file. Its folder is made.
        durable: Force the file and its name to the disk, so that they survive a power cut. Only for the
            process that holds `writing`. Without it, two processes may write the same file at once, and
            the file of one of them stays.

    Raises:
        OSError: It cannot be written. The old file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name of a view may be as long as the file system allows, so a suffix would not fit.
    short = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.parent / (f".{path.name}.tmp" if durable else f".{short}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def remove_left_over(folder: Path) -> None:
    """Removes what `replacing` left in a folder when its process was killed, an hour ago or longer."""
    for left_over in folder.glob(f".{'?' * 16}.*.tmp"):
        with suppress(OSError):
            if left_over.stat().st_mtime < time.time() - _LEFT_OVER_S:
                left_over.unlink()


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

"""The output folder: locks, files that are replaced as a whole, free space."""

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from rbc_edge.errors import UnavailableError, UsageError, unavailable
from rbc_edge.store.schema import FILE_NAME
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

LOCK_NAME: Final = ".rbc-edge.lock"

_FOLDERS: Final = ("cells", "overlays", "reports", "shapes")
# What the views write, and the words in the first bytes by which a file of ours is known.
_VIEWS: Final = {
    # In any case: where the disk ignores it, ``S1.CSV`` is ``S1.csv``.
    "*.[cC][sS][vV]": b"schema,slide_id",
    "cells/*.[cC][sS][vV]": b"schema,slide_id",
    "shapes/*.[cC][sS][vV]": b"schema,slide_id",
    "overlays/*/*_overlay.jpg": b"rbc-edge overlay",
    "reports/*.html": b"rbc-edge-content",
}
_HEAD_BYTES: Final = 2048
_RETRY_S: Final = 0.02  # a service releases the lock for a tenth of a second between two portions of work
_LEFT_OVER_S: Final = 3600.0  # a temporary file that is older was left by a killed process


class BusyError(UnavailableError):
    """Another process writes into the output folder now."""


def make(out: Path) -> None:
    """Makes an output folder, where it is missing. Raises `UnavailableError`."""
    advice = "choose another --out, or check the permissions of its parent"
    with unavailable(f"{path_text(out)}: cannot make the output folder", advice):
        out.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(out: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds an output folder for one writer of counts.

    A single run holds it from start to end. A service holds it only while it records images, so that a run
    can work at the same time. The system releases the lock when the process ends or dies.

    The folder must exist. Raises `BusyError` where another writer held it for all of `wait_s`, and
    `UnavailableError` where it cannot be written.
    """
    descriptor = open_lock_file(out / LOCK_NAME)
    try:
        left_s = wait_s
        while not lock(descriptor, out):
            if left_s <= 0:
                advice = "wait until it has finished, or choose another output folder"
                raise BusyError(f"another rbc-edge is writing to {path_text(out)}", advice)
            time.sleep(_RETRY_S)
            left_s -= _RETRY_S
        yield
    finally:
        os.close(descriptor)


def open_lock_file(path: Path) -> int:
    """Opens a file to lock, and makes it where it is missing. Returns its descriptor."""
    with unavailable(f"{path_text(path.parent)}: cannot write", "check permissions and free space"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def lock(descriptor: int, out: Path) -> bool:
    """Locks an open file of an output folder for this process, without waiting. Closing it releases the lock.

    Returns False when another process holds the lock. True also on a file system that has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems: there the user has to start one writer only
        log.warning("%s: cannot lock the output folder: %s", path_text(out), error.strerror)
    return True


def is_locked(descriptor: int) -> bool | None:
    """Tells whether another process holds the lock of an open file. None: the file system has no locks."""
    try:
        # Shared, so that two readers do not block each other. A service that starts now tries again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def check_apart(paths: Sequence[Path], out: Path) -> None:
    """Refuses an output folder that lies in the camera's folder: results would be read as its slides."""
    real_out = Path(os.path.realpath(out))
    for path in paths:
        real = Path(os.path.realpath(path))
        inside = real_out.is_relative_to(real) if real.is_dir() else real_out == real.parent
        if is_result(path):
            what = f"{path_text(path)}: it holds results of rbc-edge"
            raise UsageError(what, "give the folder of the camera's images")
        if inside:
            what = f"the output folder {path_text(out)} lies inside the source {path_text(path)}"
            advice = "give an --out outside the images' folder; that folder is never written to"
            raise UsageError(what, advice)


def is_result(path: Path) -> bool:
    """Tells whether a folder or a file is a result of ours, of any output folder. Links are followed."""
    real = Path(os.path.realpath(path))
    return os.path.lexists(real / FILE_NAME) or any(
        folder.name in _FOLDERS and os.path.lexists(folder.with_name(FILE_NAME))
        for folder in (real, *real.parents)
    )


def claim(out: Path, stamp: str, *, adopt: bool = False) -> None:
    """Makes sure that the first ledger of an output folder overwrites nothing, and that nothing old stays.

    Where a ledger was deleted, its tables and pictures are moved to ``earlier-TIME/``: the new ledger knows
    nothing of them. `stamp` is that time. With `adopt`, files of others that have such names go there too.
    `writing` must be held.

    Raises `UsageError` where there are files of others, without `adopt`, and `UnavailableError` where the
    folder cannot be written.
    """
    if os.path.lexists(out / FILE_NAME):
        return
    found = {path: head for pattern, head in _VIEWS.items() for path in sorted(out.glob(pattern))}
    others = [path for path, head in found.items() if not _begins(path, head)]
    if others and not adopt:
        names = ", ".join(path_text(path.relative_to(out)) for path in others[:3])
        what = f"{path_text(out)} has no ledger, but files that may be overwritten ({len(others)}): {names}"
        raise UsageError(what, "choose another --out, or give --adopt: then they are moved aside")
    if not found:
        return
    aside = out / f"earlier-{stamp.replace(':', '').replace('-', '')}"
    with unavailable(f"{path_text(out)}: cannot keep old tables aside", "check permissions and free space"):
        for path in found:
            kept = aside / path.relative_to(out)
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)
    log.warning("%s has no ledger; the old tables there are kept in %s", path_text(out), path_text(aside))


def _begins(path: Path, words: bytes) -> bool:
    """Tells whether a regular file has words in its first bytes."""
    if not path.is_file():
        return False
    with suppress(OSError), path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        return words in head or words in head.replace(b'"', b"").replace(b";", b",")  # a table for Excel
    return False


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Gives a file to write. It takes the place of `path` when it is complete, or not at all.

    Its folder is made. With `durable`, the file and its name are forced to the disk, so that they survive a
    power cut. That is only for the process that holds `writing`. Without it, two processes may write the same
    file at once, and the file of one of them stays. Raises `OSError` where it cannot be written. Then the
    file of before is intact.
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
    """Removes files that a killed process left in a folder (`replacing`), an hour old or older."""
    for left_over in folder.glob(f".{'?' * 16}.*.tmp"):
        with suppress(OSError):
            if left_over.stat().st_mtime < time.time() - _LEFT_OVER_S:
                left_over.unlink()


def free_bytes(folder: Path) -> int:
    """Returns the free space on the disk of a folder, bytes. Raises `UnavailableError`."""
    with unavailable(f"{path_text(folder)}: cannot look at its disk", "is it mounted?"):
        disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize

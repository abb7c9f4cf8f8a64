"""Errors with an exit code and advice.

Every error that a user can cause is one of these. The command line prints ``message`` and ``advice`` and ends
with ``exit_code``. Nothing else in the package calls ``sys.exit``.
"""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import ClassVar, Final

_SHORT_OF: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT}
)
# How libraries say it that have no exception of their own for it: OpenCV, Pillow, ONNX Runtime, zlib.
_NO_MEMORY: Final = re.compile(r"out of memory|insufficient memory|bad.?alloc|allocate memory", re.IGNORECASE)
NO_MEMORY: Final = "not enough memory"
BROKEN_DISK: Final = "the disk or its cable may be broken: look at the system's log, then run again"
_NO_THREAD: Final = re.compile(r"can't start new thread|pthread_create", re.IGNORECASE)


class ExitCode(IntEnum):
    """What the process tells the shell."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    SOME_FAILED = 3
    BUNDLE = 4
    UNAVAILABLE = 5
    INTERRUPTED = 130
    TERMINATED = 143


class RbcEdgeError(Exception):
    """An error with an exit code and a piece of advice.

    Args:
        message: What is wrong, and with which file.
        advice: What the user can do about it, or empty.
        private: Words in the message that a person chose. They must not leave the station.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.UNEXPECTED

    def __init__(self, message: str, advice: str = "", *, private: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.private = tuple(private)

    def __str__(self) -> str:
        return f"{self.message} ({self.advice})" if self.advice else self.message


class UsageError(RbcEdgeError):
    """The command line, the configuration or a call asks for something impossible."""

    exit_code = ExitCode.USAGE


class BundleError(RbcEdgeError):
    """The bundle is missing, not intact, or of a format that this version does not know."""

    exit_code = ExitCode.BUNDLE


class UnavailableError(RbcEdgeError):
    """The source folder or the output folder cannot be used now (missing, full, no permission)."""

    exit_code = ExitCode.UNAVAILABLE


class ImageError(RbcEdgeError):
    """One image could not be read. Only its field of view fails.

    Args:
        reason: A short stable word for the ``failure`` column, e.g. ``truncated``.
        message: What is wrong with the file, in words.
        advice: What the user can do about it.
    """

    exit_code = ExitCode.SOME_FAILED

    def __init__(self, reason: str, message: str, advice: str = "") -> None:
        super().__init__(message, advice)
        self.reason = reason


@contextmanager
def unavailable(what: str, advice: str) -> Iterator[None]:
    """Raises an `UnavailableError` in place of an `OSError`: what could not be done, and why."""
    try:
        yield
    except OSError as error:
        advice = BROKEN_DISK if error.errno == errno.EIO else advice
        raise UnavailableError(f"{what}: {error.strerror or error}", advice) from error


def machine_trouble(error: BaseException | None) -> str:
    """Returns what the computer lacks, in words, where that is why something failed. Else empty.

    A library that cannot be loaded, memory, open files, threads, space. The same work may succeed later or
    elsewhere, so it is no fault of an image, and no bug. The causes of the error are looked at as well.
    """
    while error is not None:
        if isinstance(error, ImportError):
            return f"a library cannot be loaded: {error}"
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return NO_MEMORY
        if isinstance(error, OSError) and error.errno in _SHORT_OF:
            return f"the system says: {error.strerror or error}"
        if _NO_THREAD.search(str(error)):
            return "no more threads can be started"
        error = error.__cause__
    return ""

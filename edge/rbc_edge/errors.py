"""Errors that carry their exit code and say what to do.

Every error a user can cause is one of these. ``cli`` prints ``message`` and ``advice`` and leaves with
``exit_code``; nothing else in the package calls ``sys.exit``. The codes are those of the table in the
README (design, section 4).
"""

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process tells the shell (design, section 4)."""

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
        advice: What the user can do about it; may be empty.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.UNEXPECTED

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message} ({self.advice})" if self.advice else self.message


class UsageError(RbcEdgeError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class BundleError(RbcEdgeError):
    """The bundle is missing, not intact, or not one that this version understands."""

    exit_code = ExitCode.BUNDLE


class UnavailableError(RbcEdgeError):
    """The source folder or the output folder cannot be used now (missing, full, no permission)."""

    exit_code = ExitCode.UNAVAILABLE


class ImageError(RbcEdgeError):
    """One image could not be read. It fails that field of view and nothing else.

    Args:
        reason: A short stable word for the ``failure`` column, e.g. ``truncated``.
        message: What is wrong with the file, in words.
        advice: What the user can do about it.
    """

    exit_code = ExitCode.SOME_FAILED

    def __init__(self, reason: str, message: str, advice: str = "") -> None:
        super().__init__(message, advice)
        self.reason = reason

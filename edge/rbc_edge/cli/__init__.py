"""The command line: parsing, printing, exit codes. No decision about images is made here."""

import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn, TextIO

from rbc_edge.cli.commands import app
from rbc_edge.errors import ExitCode, RbcEdgeError, UnavailableError, machine_trouble
from rbc_edge.text import one_line

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and ends the process with its exit code.

    The only place where errors become messages and exit codes. The arguments are what follows the program's
    name. None: those of the process.
    """
    _prepare_streams()
    given = sys.argv[1:] if arguments is None else arguments
    code: str | int | None = ExitCode.OK
    try:
        app(arguments, prog_name="rbc-edge")
    except SystemExit as end:
        code = end.code
    except RbcEdgeError as error:
        code = _tell(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001  the last resort
        # Not `set`: in this package that is the module of a command.
        if not {"--verbose", "-v"}.isdisjoint(given):
            traceback.print_exc()
        if (known := _trouble_outside(error)) is not None:
            code = _tell(known)
        else:
            _complain(
                f"rbc-edge: unexpected {type(error).__name__}: {one_line(str(error))}. This is a bug. Run"
                " again with --verbose and report what it prints."
            )
            code = ExitCode.UNEXPECTED
    if (unwritten := _unwritten(sys.stdout)) is not None:
        if not isinstance(unwritten, BrokenPipeError) and code in (None, ExitCode.OK, ExitCode.SOME_FAILED):
            what = f"cannot write the output: {unwritten.strerror or unwritten}"
            code = _tell(UnavailableError(what, "what was counted is kept"))
        _drop(sys.stdout)
    if _unwritten(sys.stderr) is not None:
        _drop(sys.stderr)
    sys.exit(code)


def _prepare_streams() -> None:
    """Makes standard input, output and error usable, also those that the caller has closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # else the ledger would get this number, and messages would be written into it
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")


def _tell(error: RbcEdgeError) -> ExitCode:
    advice = f"\n  {one_line(error.advice)}" if error.advice else ""
    _complain(f"rbc-edge: {one_line(error.message)}{advice}")
    return error.exit_code


def _complain(text: str) -> None:
    with suppress(OSError):  # it is closed, or its disk is full: there is no better place to say it
        print(text, file=sys.stderr, flush=True)


def _trouble_outside(error: Exception) -> RbcEdgeError | None:
    """Returns what is wrong around the program, in words. None: the program is wrong."""
    if trouble := machine_trouble(error):
        return UnavailableError(f"cannot go on: {trouble}", "what was counted is kept; run again")
    if isinstance(error, OSError):
        try:
            os.getcwd()  # noqa: PTH109
        except OSError:
            return UnavailableError("the current folder is not there any more", "change to another one: cd")
    return None


def _unwritten(stream: TextIO) -> OSError | None:
    """Returns why the rest of what was printed cannot be written. None where all is."""
    try:
        stream.flush()
    except OSError as error:
        return error
    return None


def _drop(stream: TextIO) -> None:
    """Forgets what cannot be written. Python would try once more at its end, and change the exit code."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

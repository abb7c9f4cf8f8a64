"""The command line: parsing, printing, exit codes. No decision about images is made here."""

import sys
import traceback
from typing import NoReturn

from rbc_edge.cli.commands import app
from rbc_edge.errors import ExitCode, RbcEdgeError
from rbc_edge.text import one_line

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and ends the process with its exit code.

    The only place where errors become messages and exit codes. The arguments are what follows the program's
    name. None: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="rbc-edge")
    except RbcEdgeError as error:
        print(f"rbc-edge: {one_line(error.message)}", file=sys.stderr)
        if error.advice:
            print(f"  {one_line(error.advice)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:  # noqa: BLE001  the last resort
        if {"--verbose", "-v"} & set(given):
            traceback.print_exc()
        print(
            f"rbc-edge: unexpected {type(error).__name__}: {one_line(str(error))}. This is a bug. Run again"
            " with --verbose and report what it prints.",
            file=sys.stderr,
        )
        sys.exit(ExitCode.UNEXPECTED)
    sys.exit(ExitCode.OK)

"""Printing: tables, JSON and mappings to standard output, log and progress bar to standard error."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence

from rbc_edge.station.systemd import journal_prefix, under_journal
from rbc_edge.text import one_line

log = logging.getLogger("rbc_edge")


class Bar(logging.Handler):
    """A progress bar on the last line of a terminal. It prints the log, all of it above the bar."""

    _WIDTH = 30

    def __init__(self, *, shown: bool) -> None:
        super().__init__()
        self._shown = shown
        self._line = ""

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("")

    def step(self, done: int, total: int, what: str) -> None:
        """Shows how far it is, and what was done last."""
        filled = self._WIDTH * done // max(total, 1)
        self._draw(f"{'#' * filled}{'.' * (self._WIDTH - filled)} {done}/{total} {what}")

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a message above the bar."""
        try:
            line = self._line
            self._draw("")
            print(self.format(record), file=sys.stderr, flush=True)
            self._draw(line)
        except BrokenPipeError:
            raise
        except Exception:  # noqa: BLE001  logging never stops the run
            self.handleError(record)

    def _draw(self, line: str) -> None:
        if self._shown and line != self._line:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line[:width]}")
            sys.stderr.flush()
            self._line = line


class _Line(logging.Formatter):
    """One line for a message, whatever names it holds. A traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return one_line(text) if record.exc_info is None else text


class _ServiceLine(_Line):
    """A line in the log of a service: the journal adds the time, and reads the level from a prefix."""

    def __init__(self) -> None:
        self._journal = under_journal(os.environ)
        super().__init__("%(message)s" if self._journal else "%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return journal_prefix(record.levelno) + text if self._journal else text


def log_to_stderr(
    *, verbose: bool = False, quiet: bool = False, bar: Bar | None = None, service: bool = False
) -> None:
    """Sends the log of the program to standard error, above the bar.

    From WARNING on, a service from INFO on. `verbose`: every message. `quiet`: errors only.
    """
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = bar or Bar(shown=False)
    handler.setFormatter(_ServiceLine() if service else _Line())
    log.addHandler(handler)
    usual = logging.INFO if service else logging.WARNING
    log.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else usual)


def print_line(text: str) -> None:
    """Prints one line, whatever names the text holds."""
    print(one_line(text))


def print_json(value: object) -> None:
    """Prints a value as JSON. Types that JSON does not have are printed as text."""
    # In ASCII: what stands in place of a character that stdout cannot show would be no JSON.
    print(json.dumps(value, indent=2, default=str))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of the same length in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        print_line("  ".join(cells).rstrip())


def print_mapping(values: Mapping[str, object], indent: str = "") -> None:
    """Prints a line for each key, and the keys of inner mappings under theirs."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            print_line(f"{indent}{key}:")
            print_mapping(value, indent + "  ")
        elif isinstance(value, Iterable) and not isinstance(value, str):
            print_line(f"{indent}{key}: {', '.join(map(str, value))}")
        else:
            print_line(f"{indent}{key}: {value}")

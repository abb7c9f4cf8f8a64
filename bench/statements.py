"""How many SQL statements an image costs: ``python -m bench.statements``.

Counts folders of tiny images with the real commands ``rbc-edge run`` and ``rbc-edge watch``, and has SQLite
report every statement that it executes. Each command is a process of its own. The networks are left out: an
analyzer that costs nothing takes their place. The exit code is 1 when a target is missed.

The figure that matters is the slope, the statements for one image more. What every start costs (opening the
ledger, its pragmas) is the same for both sizes and falls away.
"""

import argparse
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import children
from bench.children import ChildError, module
from bench.figures import table

MAX_AN_IMAGE: Final = 6.0
"""Statements for one image more that is counted."""
MAX_A_BATCH: Final = 1.0
"""Queries for `BATCH` images more that need nothing."""
BATCH: Final = 500
SIZES: Final = (500, 1500)

_N_FREQUENT: Final = 10
_N_ROUNDS: Final = 2  # of the service: the first one knows nothing yet
_WIDTH: Final = 120  # of a statement in the table of the most frequent ones


@dataclass(frozen=True, slots=True)
class Counted:
    """The statements of one command.

    Attributes:
        exit_code: What the command ended with.
        rounds: Statements by their normalised text. The first entry holds everything up to the end of the
            first scan of the source. Each further entry reaches up to the end of the next scan.
    """

    exit_code: int
    rounds: tuple[Counter[str], ...]

    @property
    def n(self) -> int:
        """Statements in all."""
        return sum(part.total() for part in self.rounds)

    @property
    def by_text(self) -> Counter[str]:
        """Statements in all, by their normalised text."""
        return sum(self.rounds, Counter())


@dataclass(frozen=True, slots=True)
class Measured:
    """One folder of tiny images.

    Attributes:
        n_images: Images in it.
        first: The run that counts them.
        again: A second run, which has nothing to do.
        service: Statements of a service that has nothing to do: of its first round after the start, and of
            the round after that.
    """

    n_images: int
    first: Counted
    again: Counted
    service: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One figure and its target.

    Attributes:
        name: What is counted.
        totals: Statements in all, by size.
        slope: Statements for as many images more as `unit` says.
        most: The target, for the same number of images.
        unit: What the slope and the target are for, in words.
    """

    name: str
    totals: tuple[int, ...]
    slope: float
    most: float
    unit: str

    @property
    def is_met(self) -> bool:
        """Whether the target is met."""
        return self.slope <= self.most


def normalised(statement: str) -> str:
    """A statement without its values and line breaks: the same statement of two images reads the same."""
    # Strings and comments in one pass: either may hold what looks like the other.
    text = re.sub(r"[xX]?'(?:[^']|'')*'|--[^\n]*", lambda m: " " if m[0].startswith("--") else "?", statement)
    text = re.sub(r"(?<![\w?])-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?\b", "?", text)
    text = re.sub(r"\bNULL\b(?=\s*[,)])", "?", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\?(?:, ?\?)+", "?, ...", text)


# -- the measured process -------------------------------------------------------------------------------


def count_command(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a command of ``rbc-edge`` in this process, and counts its SQL statements.

    Only for a process of its own: what it changes in the interpreter stays.

    Args:
        arguments: As after ``rbc-edge``. A ``watch`` is asked to stop after `_N_ROUNDS` rounds.

    Returns:
        ``exit_code``, and ``rounds`` as `Counted` has them.
    """
    rounds: list[Counter[str]] = [Counter()]

    def trace(statement: str) -> None:
        if not statement.startswith("--"):  # SQLite's note that a trigger or a foreign key is at work
            rounds[-1][normalised(statement)] += 1

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = plain(*args, **kwargs)
        connection.set_trace_callback(trace)
        return connection

    plain: Any = sqlite3.connect
    sqlite3.connect = connect  # type: ignore[assignment]
    _mark_scans(rounds, is_service=arguments[0] == "watch")
    _leave_networks_out()

    from rbc_edge import cli  # noqa: PLC0415  after `scan` is replaced, which other modules import by name

    sys.argv = ["rbc-edge", *arguments]
    code: object = 0
    try:
        cli.main()
    except SystemExit as left:
        code = left.code or 0
    return {"exit_code": code, "rounds": rounds}


def _leave_networks_out() -> None:
    """Gives every image the same twenty cells, at once."""
    from bench.tiny import Instant  # noqa: PLC0415  NumPy and the program; the parent needs neither
    from rbc_edge.vision.analyzer import Analyzer  # noqa: PLC0415

    instant = Instant()
    stand_in: Any = Analyzer
    stand_in.measure = lambda _self, images, start: instant.measure(images, start)
    stand_in.analyze = lambda _self, field, scale, *_, **__: instant.analyze(field, scale)


def _mark_scans(rounds: list[Counter[str]], *, is_service: bool) -> None:
    """Begins a new round with every scan of the source. Ends a service after enough of them."""
    from rbc_edge.station import inbox  # noqa: PLC0415  see `count_command`

    plain = inbox.scan

    def scan(*args: Any, **kwargs: Any) -> Any:
        if is_service and len(rounds) > _N_ROUNDS:
            os.kill(os.getpid(), signal.SIGTERM)
        found = plain(*args, **kwargs)
        rounds.append(Counter())
        return found

    inbox.scan = scan


# -- the measuring process ------------------------------------------------------------------------------


def count(*arguments: object) -> Counted:
    """Runs a command of ``rbc-edge`` in a process of its own, and counts its SQL statements.

    Raises:
        ChildError: The process failed, or the command did.
    """
    told = children.run(module("statements", "--count", *arguments), threads=1).json()
    counted = Counted(told["exit_code"], tuple(map(Counter, told["rounds"])))
    expected = 128 + signal.SIGTERM if arguments[0] == "watch" else 0
    if counted.exit_code != expected:
        raise ChildError(f"rbc-edge {' '.join(map(str, arguments))}\nended with {counted.exit_code}")
    return counted


def measure(n_images: int, base: Path, *, a_slide: int, is_all: bool = True) -> Measured:
    """Counts `n_images` tiny images, again with nothing to do, and lets a service look at them.

    Args:
        n_images: How many.
        base: An empty folder for everything that is made.
        a_slide: Images in a slide.
        is_all: False: only the first run.
    """
    children.run(module("tiny", base / "camera", "--n", n_images, "--slide", a_slide), threads=1)
    (base / "config.toml").write_text("", encoding="utf-8")  # not the user's
    common = (base / "camera", "--out", base / "out", "--config", base / "config.toml", "--quiet")
    first = count("run", *common)
    if not is_all:
        return Measured(n_images, first, Counted(0, ()), ())
    again = count("run", *common)
    service = count("watch", *common, "--polling", "--scan-every-s", "1", "--min-free-mb", "0")
    return Measured(n_images, first, again, tuple(part.total() for part in service.rounds[1 : _N_ROUNDS + 1]))


def lines(small: Measured, large: Measured, one_slide: Measured) -> list[Line]:
    """Compares the figures with their targets.

    Args:
        small: Images in several slides.
        large: More images in as many slides more.
        one_slide: Images of one slide, first run only. Its figure includes the start.
    """

    def more(a: int, b: int, images: int) -> float:
        return (b - a) * images / (large.n_images - small.n_images)

    a_batch = f"{BATCH} images more"
    first, again = (small.first.n, large.first.n), (small.again.n, large.again.n)
    told = [
        Line("first run", first, more(*first, 1), MAX_AN_IMAGE, "an image more"),
        Line(
            f"first run, one slide of {one_slide.n_images}",
            (one_slide.first.n,),
            one_slide.first.n / one_slide.n_images,
            MAX_AN_IMAGE,
            "an image, start included",
        ),
        Line("second run, nothing to do", again, more(*again, BATCH), MAX_A_BATCH, a_batch),
    ]
    rounds = zip(small.service, large.service, strict=True)
    for name, (a, b) in zip(("first round after the start", "a round"), rounds, strict=True):
        told.append(Line(f"service, {name}, nothing new", (a, b), more(a, b, BATCH), MAX_A_BATCH, a_batch))
    return told


def shown(told: Sequence[Line], sizes: Sequence[int]) -> str:
    """The figures and their targets as a table."""
    rows = [
        (
            line.name,
            *(f"{n:,}" for n in line.totals),
            *[""] * (len(sizes) - len(line.totals)),
            f"{line.slope:.2f}",
            line.unit,
            f"at most {line.most:g}",
            "met" if line.is_met else "MISSED",
        )
        for line in told
    ]
    head = ("SQL statements", *(f"{n:,} images" for n in sizes), "slope", "", "target", "")
    return table(head, rows)


def frequent(small: Measured, large: Measured, *, first: bool) -> str:
    """The most frequent statements, each with its number for an image more (for `BATCH` of them)."""
    a, b = (m.first.by_text if first else m.again.by_text for m in (small, large))
    images = 1 if first else BATCH
    slopes = {
        text: (b[text] - a[text]) * images / (large.n_images - small.n_images)
        for text in sorted({*a, *b})
        if b[text] != a[text]
    }
    most = sorted(slopes.items(), key=lambda item: -item[1])[:_N_FREQUENT]
    rows = [(f"{n:.2f}", _short(text)) for text, n in most]
    unit = "an image more" if first else f"{images} more"
    which = "first run" if first else "second run, nothing to do"
    return table((unit, f"most frequent, {which}"), rows, left=2)


def _short(text: str) -> str:
    """Both ends of a long statement: its verb and its table at one, its condition at the other."""
    half = _WIDTH // 2
    return text if len(text) <= _WIDTH else f"{text[: half - 5]} ... {text[-half:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts and prints. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.statements", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--sizes", nargs=2, type=int, default=SIZES, metavar="N", help="Images of both folders.  [500 1500]"
    )
    parser.add_argument("--slide", type=int, default=100, metavar="N", help="Images in a slide.  [100]")
    parser.add_argument(
        "--count", nargs=argparse.REMAINDER, help="Run this command of rbc-edge and print its statements."
    )
    asked = parser.parse_args(arguments)
    if asked.count:
        print(json.dumps(count_command(asked.count)), flush=True)
        return 0
    sizes = sorted(asked.sizes)
    if sizes[0] == sizes[1] or sizes[0] < 1:
        parser.error("--sizes takes two numbers that differ")
    try:
        with tempfile.TemporaryDirectory(prefix="rbc-edge-statements-") as name:
            folders = [Path(name) / part for part in ("small", "large", "slide")]
            for folder in folders:
                folder.mkdir()
            small, large = (
                measure(n, folder, a_slide=asked.slide) for n, folder in zip(sizes, folders[:2], strict=True)
            )
            one_slide = measure(sizes[0], folders[2], a_slide=sizes[0], is_all=False)
    except ChildError as error:
        print(f"bench.statements: {error}", file=sys.stderr)
        return 2
    told = lines(small, large, one_slide)
    print(shown(told, sizes))
    print()
    print(frequent(small, large, first=True))
    print()
    print(frequent(small, large, first=False))
    return 0 if all(line.is_met for line in told) else 1


if __name__ == "__main__":
    sys.exit(main())

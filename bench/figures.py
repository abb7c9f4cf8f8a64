"""Turns samples into figures: medians, spreads, rates, and the targets they are compared with."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Spread:
    """A measured number.

    Attributes:
        median: The middle of its samples.
        low: The smallest.
        high: The largest.
        n: Number of samples.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarises samples. There must be at least one."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def show(self, digits: int = 1) -> str:
        """Median and range."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one side: a process over many images, and one over a single image.

    Attributes:
        n: Images of the first.
        wall_s: Time of the first, start and end included.
        one_s: Time of the second. 0 for the floor, which has no start to subtract.
        cells: Cells (or boxes) found in the first. 0: not measured.
        peak_rss_mb: Peak memory of the first, MB.
    """

    n: int
    wall_s: float
    one_s: float
    cells: float
    peak_rss_mb: float

    @property
    def per_s_with_start(self) -> float:
        """Images per second of the whole process."""
        return self.n / self.wall_s


def rates(samples: Sequence[Sample]) -> list[float]:
    """Images per second without the start, round by round.

    The median start of all rounds is subtracted. A start takes as long as many images, so the noise of a
    single start would show in the rate. inf where a run took no longer than the start.
    """
    start_s = statistics.median(s.one_s for s in samples)
    if start_s == 0:
        return [s.n / s.wall_s for s in samples]
    return [(s.n - 1) / (s.wall_s - start_s) if s.wall_s > start_s else inf for s in samples]


def ratio(a: Sequence[Sample], b: Sequence[Sample]) -> Spread:
    """Rate of `a` divided by the rate of `b`, round by round. What slows both in a round cancels out."""
    return Spread.of([x / y for x, y in zip(rates(a), rates(b), strict=True)])


@dataclass(frozen=True, slots=True)
class Target:
    """A target and what was measured.

    Attributes:
        name: What is measured.
        target: The target, in words.
        measured: What was found, in words, or why nothing was.
        reached: Whether the target is reached. None: not measured.
    """

    name: str
    target: str
    measured: str
    reached: bool | None


_LINEAR: Final = 1.25
"""Limit for the cost of an image in the largest run over that in the second smallest. Noise is 10 %."""


def targets(found: Mapping[str, Any]) -> list[Target]:
    """Compares what was measured on two threads with the targets.

    Args:
        found: Any of ``over`` (by side, `Spread` of our rate over its rate), ``floor`` (`Spread` of our time
            over the floor's), ``first_count_s`` and ``help_s`` (`Spread`), ``rss_mb``, ``rss_20_mb`` and
            ``installed_mb`` (numbers), and ``images`` (the rows of `growth.images`).
    """
    over = found.get("over", {})
    told = [
        _at_least(f"fields/s against {name}", over.get(name), least)
        for name, least in (("yolo PyTorch 640", 20.0), ("yolo ONNX 640", 11.0), ("yolo PyTorch 256", 3.0))
    ]
    told += [
        _at_most("time a field against the floor", found.get("floor"), 1.2, "times", 2),
        _at_most("process start to first count", found.get("first_count_s"), 0.9, "s", 2),
        _at_most("rbc-edge --help", found.get("help_s"), 0.25, "s", 2),
        _at_most("peak RSS, fields", found.get("rss_mb"), 160, "MB", 0),
        _at_most("peak RSS, 20 megapixels", found.get("rss_20_mb"), 350, "MB", 0),
        _at_most("installed core, without Python", found.get("installed_mb"), 230, "MB", 0),
        _linear("cost of an image in a run", found.get("images"), ("run_ms",)),
        _linear("ledger and CSV of an image more", found.get("images"), ("add_ledger_ms", "add_tables_ms")),
        Target("accuracy given up for speed", "none", "`python -m rbc_train evaluate` says", None),
    ]
    return told


def _at_least(name: str, value: Spread | None, least: float) -> Target:
    if value is None:
        return Target(name, f"{least:g} times", "not measured", None)
    return Target(name, f"{least:g} times", value.show(), value.median >= least)


def _at_most(name: str, value: Spread | float | None, most: float, unit: str, digits: int) -> Target:
    asked = f"at most {most:g} {unit}"
    if value is None:
        return Target(name, asked, "not measured", None)
    if isinstance(value, Spread):
        return Target(name, asked, f"{value.show(digits)}", value.median <= most)
    return Target(name, asked, f"{value:.{digits}f}", value <= most)


def _linear(name: str, rows: Sequence[Mapping[str, float]] | None, keys: Sequence[str]) -> Target:
    """The smallest run is left out: the fixed cost of a run weighs too much on its few images."""
    asked = f"the same, within {_LINEAR - 1:.0%}"
    if not rows or len(rows) < 3:
        return Target(name, asked, "not measured", None)
    first, last = rows[1], rows[-1]
    low, high = (sum(row[key] for key in keys) for row in (first, last))
    words = (
        f"{high / low:.2f} times ({low:.2f} ms of {first['n']:,.0f} images, {high:.2f} of {last['n']:,.0f})"
    )
    return Target(name, asked, words, high <= low * _LINEAR)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lines of columns. The first `left` columns are aligned left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plain(value: Any) -> Any:
    """Turns dataclasses, tuples and keys of any kind into what JSON can hold."""
    if isinstance(value, Sample | Spread | Target):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if value == inf else value

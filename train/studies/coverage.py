"""How often the 95 % interval of a slide contains the true overlap fraction: ``python -m studies.coverage``.

The photographs of each camera, counted by the station, stand for all the fields of a slide. Slides of a few
fields are drawn from them with replacement. The true fraction is the one over all photographs of the camera.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import typer

from rbc_edge.values import FieldOfView, Int64, Scale, ScaleSource
from rbc_edge.vision import counting, statistics
from rbc_edge.vision.analyzer import Analyzer
from rbc_train import console, results
from rbc_train.data import Photograph, labelled_diameter_px, read_public, source_diameters_px
from rbc_train.results import Section, Table
from studies import station

N_FIELDS: Final = (1, 2, 3, 5, 10, 20, 50)
"""Fields of the slides that are drawn."""

DRAWS: Final = 4000
FORECAST_DRAWS: Final = 300
_WANTED: Final = 0.02

app = console.program()


@app.command()
def coverage(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    every: console.Every = 1,
    out: console.Out = results.FOLDER,
    threads: console.Threads = 0,
) -> None:
    """Draws slides from photographs. Does the interval contain the truth? How many fields are needed?"""
    analyzer = station.open_analyzer(bundle, threads)
    photographs = read_public(data)[0].of("train", "val")[::every]
    with typer.progressbar(length=len(photographs), label="photographs", file=sys.stderr) as bar:
        sources = count_fields(analyzer, photographs, bar.update)
    covered = {f.source: list(cover(f, draws=DRAWS)) for f in sources}
    asked = {f.source: list(forecast(f, draws=FORECAST_DRAWS)) for f in sources}
    made = section(sources, covered, asked, bundle_id=analyzer.bundle.bundle_id, every=every)
    console.publish(made, out)


@dataclass(frozen=True, slots=True, eq=False)
class Fields:
    """What the station counted in the photographs of one source.

    Attributes:
        source: The camera.
        n_overlapping: int64 (F,), overlapping red cells by photograph.
        n_rbc: int64 (F,), red cells by photograph.
    """

    source: str
    n_overlapping: Int64
    n_rbc: Int64

    @property
    def fraction(self) -> float:
        """Overlap fraction over all photographs."""
        return float(self.n_overlapping.sum() / self.n_rbc.sum())


def count_fields(
    analyzer: Analyzer, photographs: Sequence[Photograph], progress: Callable[[int], None] = lambda _: None
) -> list[Fields]:
    """Counts the photographs of each source at their labelled scale.

    Args:
        analyzer: The bundle at work.
        photographs: Photographs of any split but test.
        progress: Called with 1 after each.

    Returns:
        The counts of each source, by its name.
    """
    of_source = source_diameters_px(photographs)
    counts: dict[str, list[tuple[int, int]]] = {source: [] for source in sorted(of_source)}
    for p in photographs:
        given = Scale(labelled_diameter_px(p, of_source), ScaleSource.CELL_DIAMETER)
        field = FieldOfView.of(p.read(), slide_id=p.source, fov=p.name)
        seen = counting.count(analyzer.analyze(field, given).cells)
        counts[p.source].append((seen.n_rbc_overlapping, seen.n_rbc))
        progress(1)
    return [Fields(s, *np.array(rows, np.int64).T) for s, rows in counts.items() if rows]


def likeness(fields: Fields) -> float:
    """How much cells of one photograph resemble each other in overlapping: the intraclass correlation.

    By the analysis of variance of a binary outcome (Ridout, Demétrio, Firth 1999, *Biometrics* 55, eq. 2).

    Args:
        fields: Counts of a source.

    Returns:
        At most 1. 0 where cells overlap as if by chance.

    >>> two = Fields("", np.array([10, 0, 10, 0]), np.array([10, 10, 10, 10]))
    >>> round(likeness(two), 3)
    1.0
    """
    seen = fields.n_rbc > 0
    n, hits = fields.n_rbc[seen].astype(np.float64), fields.n_overlapping[seen].astype(np.float64)
    total, groups = n.sum(), len(n)
    own = hits / n
    between = (n * (own - hits.sum() / total) ** 2).sum() / (groups - 1)
    within = (hits * (1 - own)).sum() / (total - groups)
    size = (total - (n**2).sum() / total) / (groups - 1)
    return float((between - within) / (between + (size - 1) * within))


@dataclass(frozen=True, slots=True)
class Coverage:
    """How good the intervals of slides with so many fields are.

    Attributes:
        n_fields: Fields of each slide.
        held: Share of the slides with an interval that contains the truth.
        held_if_independent: The same if cells were taken for independent (Wilson on the cells).
        half_width: Mean half width of the interval.
    """

    n_fields: int
    held: float
    held_if_independent: float
    half_width: float


def cover(fields: Fields, *, draws: int, seed: int = 0) -> Iterator[Coverage]:
    """Draws slides from a source and counts how often their interval contains its fraction.

    Args:
        fields: Counts of the source.
        draws: Slides of each size.
        seed: Of the randomness.

    Yields:
        One coverage for each of `N_FIELDS`.
    """
    rng = np.random.default_rng(seed)
    truth = fields.fraction
    for n_fields in N_FIELDS:
        held = alone = n = 0
        width = 0.0
        for _ in range(draws):
            drawn = rng.integers(0, len(fields.n_rbc), n_fields)
            overlapping, rbc = fields.n_overlapping[drawn], fields.n_rbc[drawn]
            interval = statistics.overlap_interval(overlapping, rbc)
            if interval is None:
                continue
            n += 1
            low, high = interval
            held += low <= truth <= high
            width += (high - low) / 2
            # A cell a field: what the interval would be if cells did not resemble their neighbours.
            singly = np.repeat([1, 0], [overlapping.sum(), (rbc - overlapping).sum()])
            cells = statistics.overlap_interval(singly, np.ones_like(singly))
            alone += cells is not None and cells[0] <= truth <= cells[1]
        yield Coverage(n_fields, held / max(n, 1), alone / max(n, 1), width / max(n, 1))


@dataclass(frozen=True, slots=True)
class Forecast:
    """How good the answer is to "how many more fields?".

    Attributes:
        n_fields: Fields of the slides that were asked.
        needed: Median of the fields they ask for in all.
        half_width: 5th percentile, median and 95th of half the interval once they have them.
    """

    n_fields: int
    needed: float
    half_width: tuple[float, float, float]


def forecast(fields: Fields, *, draws: int, seed: int = 0) -> Iterator[Forecast]:
    """Asks drawn slides how many more fields give plus or minus two points, and adds these fields.

    Args:
        fields: Counts of a source.
        draws: Slides of each size.
        seed: Of the randomness.

    Yields:
        One forecast for each of `N_FIELDS` from three on.
    """
    rng = np.random.default_rng(seed)
    for n_fields in (n for n in N_FIELDS if n >= 3):
        needed, widths = [], []
        for _ in range(draws):
            drawn = rng.integers(0, len(fields.n_rbc), n_fields)
            more = statistics.fields_needed(
                fields.n_overlapping[drawn], fields.n_rbc[drawn], half_width=_WANTED
            )
            if more is None:
                continue
            whole = np.concatenate([drawn, rng.integers(0, len(fields.n_rbc), more)])
            interval = statistics.overlap_interval(fields.n_overlapping[whole], fields.n_rbc[whole])
            needed.append(n_fields + more)
            if interval is not None:
                widths.append((interval[1] - interval[0]) / 2)
        low, middle, high = np.percentile(widths, (5, 50, 95)).tolist() if widths else (math.nan,) * 3
        yield Forecast(n_fields, float(np.median(needed)) if needed else math.nan, (low, middle, high))


def section(
    sources: Sequence[Fields],
    covered: Mapping[str, Sequence[Coverage]],
    asked: Mapping[str, Sequence[Forecast]],
    *,
    bundle_id: str,
    every: int = 1,
) -> Section:
    """Makes the section ``coverage``.

    Args:
        sources: Of `count_fields`.
        covered: Of `cover`, by source.
        asked: Of `forecast`, by source.
        bundle_id: Of the bundle.
        every: One photograph in so many was counted.

    Returns:
        The section.
    """
    names = tuple(f.source for f in sources)
    return Section(
        name="coverage",
        command=station.command("coverage", every, usual=1),
        tables=(
            _sources_table(sources),
            _coverage_table([covered[n] for n in names], names),
            _forecast_table([asked[n] for n in names], names),
        ),
        data={
            "bundle_id": bundle_id,
            "photographs": sum(len(f.n_rbc) for f in sources),
            "draws": DRAWS,
            "likeness": statistics.LIKENESS,
            "sources": {
                f.source: {
                    "photographs": len(f.n_rbc),
                    "overlap_fraction": f.fraction,
                    "likeness": likeness(f),
                }
                for f in sources
            },
            "coverage": {n: [asdict(c) for c in covered[n]] for n in names},
            "forecast": {n: [asdict(f) for f in asked[n]] for n in names},
        },
    )


def _sources_table(sources: Sequence[Fields]) -> Table:
    rows = tuple(
        (
            f.source, str(len(f.n_rbc)), f"{f.n_rbc.mean():.1f}", f"{100 * f.fraction:.1f} %",
            f"{likeness(f):.3f}",
        )
        for f in sources
    )  # fmt: skip
    columns = ("source", "photographs", "red cells a photograph", "overlap fraction", "likeness")
    return Table(
        "The sources. Likeness is the intraclass correlation of the cells of a photograph", columns, rows
    )


def _coverage_table(covered: Sequence[Sequence[Coverage]], names: tuple[str, ...]) -> Table:
    rows = tuple(
        (
            str(of_size[0].n_fields),
            *(f"{100 * c.held:.1f} % ({100 * c.half_width:.1f})" for c in of_size),
            f"{100 * np.mean([c.held_if_independent for c in of_size]):.1f} %",
        )
        for of_size in zip(*covered, strict=True)
    )
    return Table(
        "Share of the slides with an interval that contains the true value (in brackets: half the mean "
        "width, points). Last column: over all sources, if the cells were independent of each other",
        ("fields", *names, "if independent"),
        rows,
    )


def _forecast_table(asked: Sequence[Sequence[Forecast]], names: tuple[str, ...]) -> Table:
    rows = tuple(
        (
            str(of_size[0].n_fields),
            *(f"{f.needed:.0f}: " + ", ".join(f"{100 * w:.1f}" for w in f.half_width) for f in of_size),
        )
        for of_size in zip(*asked, strict=True)
    )
    return Table(
        "How many fields give ±2 points? The median answer, then half the interval (5 %, median, 95 % of the "
        "slides, points) after that number of fields",
        ("fields so far", *names),
        rows,
    )


if __name__ == "__main__":
    console.answer(app)

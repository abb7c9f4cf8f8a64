"""Counts when the scale is unknown or wrong, and in large fields: ``python -m studies.scale``."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import typer

from rbc_edge.values import CellClass, FieldOfView, Scale, ScaleSource
from rbc_edge.vision import counting, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_train import console, results
from rbc_train.data import Photograph, labelled_diameter_px, source_diameters_px
from rbc_train.results import Section, Table
from studies import station
from studies.changes import change, changes

FACTORS: Final = (1.0, 0.3, 0.5, 0.75, 1.5, 2.0, 2.5)
"""New size over old size of the scale trials. The first is what the others are compared with."""

STRAYS: Final = (1.0, 0.25, 0.5, 2.0, 4.0)
"""A slide's scale over that of a field in it. The first is what the others are compared with."""

EVERY: Final = 3
"""Every how many-th photograph the scale is tried on: all of them take half an hour."""

_UNKNOWN: Final = Scale(math.nan, ScaleSource.NONE)
_MEGAPIXELS: Final = 20.0  # what a microscope's camera gives

app = console.program()


@app.command()
def scale(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    every: console.Every = EVERY,
    out: console.Out = results.FOLDER,
    threads: console.Threads = 0,
) -> None:
    """Resizes and tiles validation photographs. The program must find the scale of each."""
    analyzer, validation = station.open_analyzer(bundle, threads), station.validation(data)
    photographs = validation[::every]
    typer.echo("factor  fields   rbc  change  estimated / labelled (5 %, median, 95 %)  off by a third")
    tried: list[ScaleTrial] = []
    for trial in try_scales(analyzer, photographs):
        tried.append(trial)
        ratio = trial.n_rbc / max(tried[0].n_rbc, 1) - 1
        typer.echo(
            f"{trial.factor:6.2f} {trial.n_fields:7} {trial.n_rbc:5} {ratio:+7.1%}"
            f"  {trial.ratio_low:17.2f} {trial.ratio_median:7.2f} {trial.ratio_high:6.2f} {trial.n_off:17}"
        )
    typer.echo("slide / field  corrected    rbc  change")
    strays: list[StrayTrial] = []
    for stray in try_strays(analyzer, photographs):
        strays.append(stray)
        ratio = stray.n_rbc / max(strays[0].n_rbc, 1) - 1
        typer.echo(f"{stray.factor:13.2f} {stray.n_own:10} {stray.n_rbc:6} {ratio:+7.1%}")
    typer.echo("mosaic      parts  megapixels  labelled px  estimated     rbc  part by part  change")
    mosaics: list[MosaicTrial] = []
    for tiled in try_mosaics(analyzer, validation):
        mosaics.append(tiled)
        typer.echo(
            f"{tiled.source:10} {tiled.n_parts:6} {tiled.width_px * tiled.height_px / 1e6:11.1f}"
            f" {tiled.labelled_px:12.1f} {tiled.estimated_px:10.1f} {tiled.mosaic:7} {tiled.parts:13}"
            f" {tiled.mosaic / max(tiled.parts, 1) - 1:+7.1%}"
        )
    made = section(tried, strays, mosaics, bundle_id=analyzer.bundle.bundle_id, every=every)
    typer.echo(results.publish(made, out), err=True)


@dataclass(frozen=True, slots=True)
class ScaleTrial:
    """Counts in fields of unknown scale, all resized by one factor.

    Attributes:
        factor: New size over old size.
        n_fields: Fields tried, each on its own.
        n_rbc: Red cells counted in all of them.
        ratio_low: 5th percentile of estimated over labelled diameter.
        ratio_median: Median of it.
        ratio_high: 95th percentile of it.
        n_off: Fields with an estimate that is off by more than a third, or without an estimate.
        n_rbc_of_source: Red cells counted of each camera.
    """

    factor: float
    n_fields: int
    n_rbc: int
    ratio_low: float
    ratio_median: float
    ratio_high: float
    n_off: int
    n_rbc_of_source: Mapping[str, int]


def try_scales(
    analyzer: Analyzer, photographs: Sequence[Photograph], factors: Sequence[float] = FACTORS
) -> Iterator[ScaleTrial]:
    """Resizes photographs. The station estimates the scale of each field alone.

    Args:
        analyzer: The bundle at work.
        photographs: What to resize.
        factors: New size over old size, each.

    Yields:
        One trial a factor.
    """
    of_source = source_diameters_px(photographs)
    for factor in factors:
        ratios: list[float] = []
        of_camera = dict.fromkeys(sorted(of_source), 0)
        for photograph in photographs:
            image = preprocess.rescale(photograph.read(), factor)
            result = analyzer.analyze(
                FieldOfView.of(image, slide_id=photograph.source, fov=photograph.name), _UNKNOWN
            )
            of_camera[photograph.source] += counting.count(result.cells).n_rbc
            ratios.append(
                result.scale.cell_diameter_px / (labelled_diameter_px(photograph, of_source) * factor)
            )
        off = [not 3 / 4 <= r <= 4 / 3 for r in ratios]
        low, middle, high = np.nanpercentile(ratios, (5, 50, 95)).tolist()
        n_rbc = sum(of_camera.values())
        yield ScaleTrial(
            factor=factor,
            n_fields=len(photographs),
            n_rbc=n_rbc,
            ratio_low=low,
            ratio_median=middle,
            ratio_high=high,
            n_off=sum(off),
            n_rbc_of_source=of_camera,
        )


@dataclass(frozen=True, slots=True)
class StrayTrial:
    """Counts in fields of a slide with another scale: another objective in the same folder.

    Attributes:
        factor: The slide's diameter over the field's.
        n_fields: Fields tried.
        n_own: Fields that were given a scale of their own, off by less than a third.
        n_rbc: Red cells counted in all of them.
        n_rbc_of_source: Red cells counted of each camera.
    """

    factor: float
    n_fields: int
    n_own: int
    n_rbc: int
    n_rbc_of_source: Mapping[str, int]


def try_strays(
    analyzer: Analyzer, photographs: Sequence[Photograph], factors: Sequence[float] = STRAYS
) -> Iterator[StrayTrial]:
    """Counts photographs as fields of a slide with a wrong estimated scale.

    Args:
        analyzer: The bundle at work.
        photographs: What to count, read as the station reads it.
        factors: The slide's diameter over the field's, each. 1 is the right one.

    Yields:
        One trial a factor.
    """
    of_source = source_diameters_px(photographs)
    for factor in factors:
        of_camera = dict.fromkeys(sorted(of_source), 0)
        n_own = 0
        for photograph in photographs:
            right = labelled_diameter_px(photograph, of_source)
            given = Scale(right * factor, ScaleSource.SLIDE)
            result = analyzer.analyze(photograph.field(given.cell_diameter_px), given)
            of_camera[photograph.source] += counting.count(result.cells).n_rbc
            n_own += (
                result.scale.source is ScaleSource.FIELD
                and 3 / 4 <= result.scale.cell_diameter_px / right <= 4 / 3
            )
        yield StrayTrial(factor, len(photographs), n_own, sum(of_camera.values()), of_camera)


@dataclass(frozen=True, slots=True)
class MosaicTrial:
    """Counts in one large field of unknown scale: photographs of one camera, side by side.

    A strip of glass, one cell wide, separates them. Without it, halves of different cells would join to cells
    that no smear shows, and cells near the seams would be judged differently (measured: 3 % of the cells that
    do not touch a seam).

    Attributes:
        source: The camera.
        width_px: Width of the mosaic.
        height_px: Height of the mosaic.
        n_parts: Photographs in it. Where there are too few, some stand there again mirrored.
        labelled_px: Median diameter of the labelled red cells.
        estimated_px: What the station took.
        labelled: Labelled red cells, all of them.
        parts: Red cells counted part by part, each at its own labelled scale.
        mosaic: Red cells counted in the mosaic.
    """

    source: str
    width_px: int
    height_px: int
    n_parts: int
    labelled_px: float
    estimated_px: float
    labelled: int
    parts: int
    mosaic: int


def try_mosaics(
    analyzer: Analyzer, photographs: Sequence[Photograph], *, megapixels: float = _MEGAPIXELS
) -> Iterator[MosaicTrial]:
    """Tiles the photographs of each camera into one large field of unknown scale and counts it.

    Each photograph's background is balanced first: in one field there is one lamp.

    Args:
        analyzer: The bundle at work.
        photographs: What to tile. Of each camera those of its commonest size.
        megapixels: About how large.

    Yields:
        One trial a camera.
    """
    of_source = source_diameters_px(photographs)
    for source in sorted(of_source):
        own = [p for p in photographs if p.source == source]
        (width, height), _ = Counter((p.width_px, p.height_px) for p in own).most_common(1)[0]
        own = [p for p in own if (p.width_px, p.height_px) == (width, height)]
        gutter = round(of_source[source])
        step_x, step_y = width + gutter, height + gutter
        columns = max(1, round(math.sqrt(megapixels * 1e6 * 4 / 3) / step_x))
        rows = max(1, round(megapixels * 1e6 / (columns * step_x * step_y)))
        size = (rows * step_y - gutter, columns * step_x - gutter, 3)
        image = np.full(size, round(preprocess.BACKGROUND_LEVEL), np.uint8)
        labelled = parts = 0
        for i in range(rows * columns):
            photograph = own[i % len(own)]
            mirrored, upside_down = i // len(own) % 2 == 1, i // len(own) // 2 % 2 == 1
            part = preprocess.view(photograph.read(), math.nan).image[
                :: -1 if upside_down else 1, :: -1 if mirrored else 1
            ]
            part = np.ascontiguousarray(part)
            y, x = divmod(i, columns)
            image[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = part
            given = Scale(labelled_diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER)
            parts += counting.count(
                analyzer.analyze(FieldOfView.of(part, slide_id=source, fov=str(i)), given).cells
            ).n_rbc
            labelled += int((photograph.class_id == CellClass.RBC).sum())
        result = analyzer.analyze(FieldOfView.of(image, slide_id=source, fov="mosaic"), _UNKNOWN)
        mosaic = counting.count(result.cells).n_rbc
        yield MosaicTrial(
            source=source,
            width_px=image.shape[1],
            height_px=image.shape[0],
            n_parts=rows * columns,
            labelled_px=of_source[source],
            estimated_px=result.scale.cell_diameter_px,
            labelled=labelled,
            parts=parts,
            mosaic=mosaic,
        )


def section(
    trials: Sequence[ScaleTrial],
    strays: Sequence[StrayTrial],
    mosaics: Sequence[MosaicTrial],
    *,
    bundle_id: str,
    every: int = EVERY,
) -> Section:
    """Makes the section ``scale``.

    Args:
        trials: Of `try_scales`. The others are compared with the first.
        strays: Of `try_strays`. The others are compared with the first.
        mosaics: Of `try_mosaics`.
        bundle_id: Of the bundle.
        every: One photograph in so many was tried.

    Returns:
        The section. The targets read its ``changes`` and ``mosaic_changes``.
    """
    tables = [_scale_table(trials)]
    tables += [_stray_table(strays)] if strays else []
    tables += [_mosaic_table(mosaics)] if mosaics else []
    return Section(
        name="scale",
        command=station.command("scale", every, usual=EVERY),
        tables=tuple(tables),
        data={
            "bundle_id": bundle_id,
            "changes": {f"{t.factor:g}": t.n_rbc / max(trials[0].n_rbc, 1) - 1 for t in trials[1:]},
            "mosaic_changes": {m.source: m.mosaic / max(m.parts, 1) - 1 for m in mosaics},
            "trials": [asdict(t) for t in trials],
            "strays": [asdict(s) for s in strays],
            "mosaics": [asdict(m) for m in mosaics],
        },
    )


def _scale_table(trials: Sequence[ScaleTrial]) -> Table:
    plain = trials[0]
    rows = tuple(
        (
            f"{t.factor:g}", str(t.n_rbc), *changes(t, plain),
            f"{t.ratio_low:.2f}, {t.ratio_median:.2f}, {t.ratio_high:.2f}", str(t.n_off),
        )
        for t in trials
    )  # fmt: skip
    columns = ("factor", "red cells", "change", *plain.n_rbc_of_source,
               "estimated / labelled (5 %, median, 95 %)", "off by a third")  # fmt: skip
    return Table(f"{plain.n_fields} photographs resized: change of the red cells counted", columns, rows)


def _stray_table(strays: Sequence[StrayTrial]) -> Table:
    plain = strays[0]
    rows = tuple((f"{s.factor:g}", str(s.n_own), str(s.n_rbc), *changes(s, plain)) for s in strays)
    columns = ("slide / field", "corrected", "red cells", "change", *plain.n_rbc_of_source)
    return Table(
        f"{plain.n_fields} photographs in a slide of another scale: change of the red cells", columns, rows
    )


def _mosaic_table(mosaics: Sequence[MosaicTrial]) -> Table:
    rows = tuple(
        (
            m.source, str(m.n_parts), f"{m.width_px}x{m.height_px}", f"{m.labelled_px:.1f}",
            f"{m.estimated_px:.1f}", str(m.labelled), str(m.parts), str(m.mosaic), change(m.mosaic, m.parts),
        )
        for m in mosaics
    )  # fmt: skip
    columns = ("source", "parts", "size, px", "diameter labelled", "estimated", "red cells labelled",
               "part by part", "mosaic", "change")  # fmt: skip
    return Table("Mosaics: change against the red cells counted part by part", columns, rows)


if __name__ == "__main__":
    console.answer(app)

"""Counts under other light, colour, focus and compression: ``python -m studies.corruptions``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import cv2
import numpy as np
import typer

from rbc_edge.values import FieldOfView, Scale, ScaleSource, UInt8
from rbc_edge.vision import counting
from rbc_edge.vision.analyzer import Analyzer
from rbc_train import console, results
from rbc_train.data import Photograph, labelled_diameter_px, source_diameters_px
from rbc_train.results import Section, Table
from studies import station
from studies.changes import change, changes

app = console.program()


@app.command()
def corruptions(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    every: console.Every = 1,
    out: console.Out = results.FOLDER,
    threads: console.Threads = 0,
) -> None:
    """Counts validation photographs under other light, colour, focus and compression."""
    analyzer, photographs = station.open_analyzer(bundle, threads), station.validation(data)[::every]
    typer.echo(f"{len(photographs)} photographs     rbc  change  overlapping  change  wbc")
    tried: list[CorruptionTrial] = []
    for trial in try_corruptions(analyzer, photographs):
        tried.append(trial)
        rbc = trial.n_rbc / max(tried[0].n_rbc, 1) - 1
        overlapping = trial.n_overlapping / max(tried[0].n_overlapping, 1) - 1
        typer.echo(
            f"{trial.name:20} {trial.n_rbc:4} {rbc:+7.1%} {trial.n_overlapping:12} {overlapping:+7.1%}"
            f" {trial.n_wbc:4}"
        )
    made = section(tried, n_photographs=len(photographs), bundle_id=analyzer.bundle.bundle_id, every=every)
    typer.echo(results.publish(made, out), err=True)


def _gain(red: float, green: float, blue: float) -> Callable[[UInt8], UInt8]:
    """Light and colour of another lamp: a factor for each channel."""
    factors = np.array([red, green, blue], np.float32)
    return lambda image: np.clip(image * factors, 0, 255).astype(np.uint8)


def _jpeg(quality: int) -> Callable[[UInt8], UInt8]:
    def coded(image: UInt8) -> UInt8:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)

    return coded


def _blur(percent: float) -> Callable[[UInt8], UInt8]:
    """Gaussian of so many percent of the shorter side. Photographs show four to five cells across it."""
    return lambda image: np.asarray(
        cv2.GaussianBlur(image, (0, 0), percent / 100 * min(image.shape[:2])), np.uint8
    )


CORRUPTIONS: Final[dict[str, Callable[[UInt8], UInt8]]] = {
    "none": lambda image: image,
    "light -30 %": _gain(0.7, 0.7, 0.7),
    "light -60 %": _gain(0.4, 0.4, 0.4),
    "light +30 %, clipped": _gain(1.3, 1.3, 1.3),
    "red cast": _gain(1.2, 1.0, 0.8),
    "blue cast": _gain(0.75, 0.9, 1.2),
    "green cast": _gain(0.85, 1.15, 0.85),
    "yellow cast": _gain(1.1, 1.05, 0.6),
    "half the contrast": lambda image: (image * 0.5 + 110).astype(np.uint8),
    "monochrome": lambda image: np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2),
    "JPEG quality 50": _jpeg(50),
    "slight blur": _blur(0.4),
    "strong blur": _blur(0.8),
}
"""What other lamps and cameras do to a photograph: uint8 (H, W, 3) RGB to the same."""

TARGETED: Final = (
    "light -30 %", "light +30 %, clipped", "red cast", "blue cast", "green cast", "yellow cast",
    "JPEG quality 50", "slight blur",
)  # fmt: skip
"""Counts must change by less than 2 % under each of these. The others show where the method ends."""


@dataclass(frozen=True, slots=True)
class CorruptionTrial:
    """Counts under one corruption. The scale is known.

    Attributes:
        name: The corruption.
        n_rbc: Red cells counted in all fields.
        n_overlapping: Those called overlapping.
        n_wbc: White cells counted.
        n_rbc_of_source: Red cells counted of each camera.
    """

    name: str
    n_rbc: int
    n_overlapping: int
    n_wbc: int
    n_rbc_of_source: Mapping[str, int]


def try_corruptions(analyzer: Analyzer, photographs: Sequence[Photograph]) -> Iterator[CorruptionTrial]:
    """Counts photographs under each of `CORRUPTIONS`.

    Args:
        analyzer: The bundle at work.
        photographs: What to corrupt.

    Yields:
        One trial a corruption. The first is the unchanged photographs.
    """
    of_source = source_diameters_px(photographs)
    for name, corrupt in CORRUPTIONS.items():
        n_overlapping = n_wbc = 0
        of_camera = dict.fromkeys(sorted(of_source), 0)
        for photograph in photographs:
            image = np.ascontiguousarray(corrupt(photograph.read()))
            given = Scale(labelled_diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER)
            field = FieldOfView.of(image, slide_id=photograph.source, fov=photograph.name)
            seen = counting.count(analyzer.analyze(field, given).cells)
            of_camera[photograph.source] += seen.n_rbc
            n_overlapping += seen.n_rbc_overlapping
            n_wbc += seen.n_wbc
        yield CorruptionTrial(name, sum(of_camera.values()), n_overlapping, n_wbc, of_camera)


def section(
    trials: Sequence[CorruptionTrial], *, n_photographs: int, bundle_id: str, every: int = 1
) -> Section:
    """Makes the section ``corruptions``.

    Args:
        trials: Of `try_corruptions`. The first is the unchanged photographs.
        n_photographs: How many were tried.
        bundle_id: Of the bundle.
        every: One photograph in so many was tried.

    Returns:
        The section. The targets read its ``changes``.
    """
    plain, sources = trials[0], tuple(trials[0].n_rbc_of_source)
    rows = tuple(
        (
            t.name,
            str(t.n_rbc),
            *changes(t, plain),
            change(t.n_overlapping, plain.n_overlapping),
            change(t.n_wbc, plain.n_wbc),
            "2 %" if t.name in TARGETED else "–",
        )
        for t in trials
    )
    columns = ("corruption", "red cells", "change", *sources, "overlapping", "white cells", "allowed")
    return Section(
        name="corruptions",
        command=station.command("corruptions", every, usual=1),
        tables=(Table("Red cells counted", columns, rows),),
        data={
            "bundle_id": bundle_id,
            "photographs": n_photographs,
            "changes": {t.name: t.n_rbc / max(plain.n_rbc, 1) - 1 for t in trials if t.name in TARGETED},
            "trials": [asdict(t) for t in trials],
        },
    )


if __name__ == "__main__":
    console.answer(app)

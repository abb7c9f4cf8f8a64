"""Counts under what the station will meet: other light, colour and focus, and scales that nobody says."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import CellClass, FieldOfView, Scale, ScaleSource, UInt8
from rbc_edge.vision import counting, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_train.datasets import Photograph, diameter_px, source_diameters_px
from rbc_train.results import Section, Table

FACTORS: Final = (1.0, 0.3, 0.5, 0.75, 1.5, 2.0, 2.5)
"""New size over old size of the scale trials; the first is what the others are compared with."""

STRAYS: Final = (1.0, 0.25, 0.5, 2.0, 4.0)
"""A slide's scale over that of a field in it; the first is what the others are compared with."""

SCALE_EVERY: Final = 3
"""Every how many-th photograph the scale is tried on: all of them take half an hour."""

_UNKNOWN: Final = Scale(math.nan, ScaleSource.NONE)
_MEGAPIXELS: Final = 20.0  # what a microscope's camera gives


def _gain(red: float, green: float, blue: float) -> Callable[[UInt8], UInt8]:
    """Light and colour of another lamp: a factor for each channel."""
    factors = np.array([red, green, blue], np.float32)
    return lambda image: np.clip(image * factors, 0, 255).astype(np.uint8)


def _jpeg(quality: int) -> Callable[[UInt8], UInt8]:
    def coded(image: UInt8) -> UInt8:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)

    return coded


def _blur(cells: float) -> Callable[[UInt8], UInt8]:
    """Gaussian of `cells` percent of the shorter side: photographs show four to five cells across it."""
    return lambda image: np.asarray(
        cv2.GaussianBlur(image, (0, 0), cells / 100 * min(image.shape[:2])), np.uint8
    )


DISTURBANCES: Final[dict[str, Callable[[UInt8], UInt8]]] = {
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
"""What other lamps, cameras and hands do to a photograph; uint8 (H, W, 3) RGB to the same."""

TARGETED: Final = (
    "light -30 %", "light +30 %, clipped", "red cast", "blue cast", "green cast", "yellow cast",
    "JPEG quality 50", "slight blur",
)  # fmt: skip
"""Those under which counts shall change by less than 2 % each; the others show where it ends."""


@dataclass(frozen=True, slots=True)
class DisturbanceTrial:
    """How counts fare under one disturbance, the scale being known.

    Attributes:
        name: The disturbance.
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


def try_disturbances(analyzer: Analyzer, photographs: Sequence[Photograph]) -> Iterator[DisturbanceTrial]:
    """Counts photographs under each of `DISTURBANCES`.

    Args:
        analyzer: The bundle at work.
        photographs: What to disturb.

    Yields:
        One trial a disturbance; the first is the photographs as they are.
    """
    of_source = source_diameters_px(photographs)
    for name, disturb in DISTURBANCES.items():
        n_overlapping = n_wbc = 0
        of_camera = dict.fromkeys(sorted(of_source), 0)
        for photograph in photographs:
            image = np.ascontiguousarray(disturb(photograph.read()))
            given = Scale(diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER)
            field = FieldOfView.of(image, slide_id=photograph.source, fov=photograph.name)
            seen = counting.count(analyzer.analyze(field, given).cells)
            of_camera[photograph.source] += seen.n_rbc
            n_overlapping += seen.n_rbc_overlapping
            n_wbc += seen.n_wbc
        yield DisturbanceTrial(name, sum(of_camera.values()), n_overlapping, n_wbc, of_camera)


@dataclass(frozen=True, slots=True)
class ScaleTrial:
    """How fields fare whose scale nobody says, all resized by one factor.

    Attributes:
        factor: New size over old size.
        n_fields: Fields tried, each on its own.
        n_rbc: Red cells counted in all of them.
        ratio_low: 5th percentile of estimated over labelled diameter.
        ratio_median: Median of it.
        ratio_high: 95th percentile of it.
        n_off: Fields whose estimate is off by more than a third, or that gave none.
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
    """Resizes photographs and lets the station find each one's scale, field by field.

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
            ratios.append(result.scale.cell_diameter_px / (diameter_px(photograph, of_source) * factor))
        off = [not 3 / 4 <= r <= 4 / 3 for r in ratios]
        low, middle, high = np.nanpercentile(ratios, (5, 50, 95)).tolist()
        n_rbc = sum(of_camera.values())
        yield ScaleTrial(factor, len(photographs), n_rbc, low, middle, high, sum(off), of_camera)


@dataclass(frozen=True, slots=True)
class StrayTrial:
    """How fields fare whose slide has another scale: another objective in the same folder.

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
    """Counts photographs as fields of a slide whose estimated scale is not theirs.

    Args:
        analyzer: The bundle at work.
        photographs: What to count, read as the station reads it.
        factors: The slide's diameter over the field's, each; 1 is the right one.

    Yields:
        One trial a factor.
    """
    of_source = source_diameters_px(photographs)
    for factor in factors:
        of_camera = dict.fromkeys(sorted(of_source), 0)
        n_own = 0
        for photograph in photographs:
            right = diameter_px(photograph, of_source)
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
    """How one large field fares whose scale nobody says: photographs of one camera, side by side.

    A strip of glass, a cell wide, lies between them: laid edge to edge, halves of strangers would make cells
    that no smear shows, and what lies beside those is judged otherwise (measured: 3 % of the cells that the
    seams did not even touch).

    Attributes:
        source: The camera.
        width_px: Width of the mosaic.
        height_px: Height of the mosaic.
        n_parts: Photographs in it; where there are too few, some stand there again mirrored.
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
    """Tiles the photographs of each camera into one large field and counts it, its scale unknown.

    Each photograph's background is balanced first: in one field there is one lamp.

    Args:
        analyzer: The bundle at work.
        photographs: What to tile; of each camera those of its commonest size.
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
            part = preprocess.balance(photograph.read())[
                :: -1 if upside_down else 1, :: -1 if mirrored else 1
            ]
            part = np.ascontiguousarray(part)
            y, x = divmod(i, columns)
            image[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = part
            given = Scale(diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER)
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


def scale_section(
    trials: Sequence[ScaleTrial],
    strays: Sequence[StrayTrial],
    mosaics: Sequence[MosaicTrial],
    bundle_id: str,
    *,
    every: int = SCALE_EVERY,
) -> Section:
    """Makes the section ``scale``.

    Args:
        trials: Of `try_scales`; the first is what the others are compared with.
        strays: Of `try_strays`; the first is what the others are compared with.
        mosaics: Of `try_mosaics`.
        bundle_id: Of the bundle.
        every: Every how many-th photograph was tried.

    Returns:
        The section; its ``changes`` and ``mosaic_changes`` are what the targets look at.
    """
    plain, sources = trials[0], tuple(trials[0].n_rbc_of_source)
    rows = tuple(
        (
            f"{t.factor:g}",
            str(t.n_rbc),
            *_changes(t.n_rbc, t.n_rbc_of_source, plain.n_rbc, plain.n_rbc_of_source),
            f"{t.ratio_low:.2f}, {t.ratio_median:.2f}, {t.ratio_high:.2f}",
            str(t.n_off),
        )
        for t in trials
    )
    tables = [
        Table(
            f"{plain.n_fields} photographs resized; changes are of the red cells counted",
            ("factor", "red cells", "change", *sources, "estimated / labelled (5 %, median, 95 %)",
             "off by a third"),
            rows,
        )
    ]  # fmt: skip
    if strays:
        kept = strays[0]
        tables.append(
            Table(
                f"{kept.n_fields} photographs in a slide of another scale; changes are of the red cells",
                ("slide / field", "put right", "red cells", "change", *kept.n_rbc_of_source),
                tuple(
                    (
                        f"{s.factor:g}", str(s.n_own), str(s.n_rbc),
                        *_changes(s.n_rbc, s.n_rbc_of_source, kept.n_rbc, kept.n_rbc_of_source),
                    )
                    for s in strays
                ),
            )
        )  # fmt: skip
    if mosaics:
        tables.append(
            Table(
                "Mosaics; changes are of the red cells counted part by part",
                ("source", "parts", "size, px", "diameter labelled", "estimated", "red cells labelled",
                 "part by part", "mosaic", "change"),
                tuple(
                    (
                        m.source, str(m.n_parts), f"{m.width_px}x{m.height_px}", f"{m.labelled_px:.1f}",
                        f"{m.estimated_px:.1f}", str(m.labelled), str(m.parts), str(m.mosaic),
                        _change(m.mosaic, m.parts),
                    )
                    for m in mosaics
                ),
            )
        )  # fmt: skip
    return Section(
        name="scale",
        page="results",
        title="Scale without being told",
        command=_command("scale", every, SCALE_EVERY),
        text=(
            f"Bundle `{bundle_id}`. Validation photographs enlarged and shrunk; the station finds the scale "
            "of each alone.",
            "A field whose own cells contradict the scale of its slide, or that shows hardly any there, is "
            "measured itself.",
            "Large fields are photographs of one camera side by side, about 20 megapixels, backgrounds "
            "balanced, a strip of glass between them; where a camera has too few they stand there again, "
            "mirrored.",
        ),
        tables=tuple(tables),
        data={
            "bundle_id": bundle_id,
            "changes": {f"{t.factor:g}": t.n_rbc / max(plain.n_rbc, 1) - 1 for t in trials[1:]},
            "mosaic_changes": {m.source: m.mosaic / max(m.parts, 1) - 1 for m in mosaics},
            "trials": [asdict(t) for t in trials],
            "strays": [asdict(s) for s in strays],
            "mosaics": [asdict(m) for m in mosaics],
        },
    )


def disturbance_section(
    trials: Sequence[DisturbanceTrial], n_fields: int, bundle_id: str, *, every: int = 1
) -> Section:
    """Makes the section ``disturbances``.

    Args:
        trials: Of `try_disturbances`; the first is the photographs as they are.
        n_fields: Photographs tried.
        bundle_id: Of the bundle.
        every: Every how many-th photograph was tried.

    Returns:
        The section; its ``changes`` are what the targets look at.
    """
    plain, sources = trials[0], tuple(trials[0].n_rbc_of_source)
    rows = tuple(
        (
            t.name,
            str(t.n_rbc),
            *_changes(t.n_rbc, t.n_rbc_of_source, plain.n_rbc, plain.n_rbc_of_source),
            _change(t.n_overlapping, plain.n_overlapping),
            _change(t.n_wbc, plain.n_wbc),
            "2 %" if t.name in TARGETED else "–",
        )
        for t in trials
    )
    return Section(
        name="disturbances",
        page="results",
        title="Other light, colour, focus and compression",
        command=_command("disturb", every, 1),
        text=(
            f"Bundle `{bundle_id}` on {n_fields} validation photographs, their scale being known. Changes "
            "are of what is counted in the photographs as they are.",
        ),
        tables=(
            Table(
                "Red cells counted",
                ("disturbance", "red cells", "change", *sources, "overlapping", "white cells", "allowed"),
                rows,
            ),
        ),
        data={
            "bundle_id": bundle_id,
            "changes": {t.name: t.n_rbc / max(plain.n_rbc, 1) - 1 for t in trials if t.name in TARGETED},
            "trials": [asdict(t) for t in trials],
        },
    )


def _command(name: str, every: int, usual: int) -> str:
    return f"python -m rbc_train {name}" + (f" --every {every}" if every != usual else "")


def _changes(
    n: int, of_source: Mapping[str, int], plain: int, plain_of_source: Mapping[str, int]
) -> list[str]:
    return [_change(n, plain), *(_change(of_source[s], plain_of_source[s]) for s in plain_of_source)]


def _change(n: int, plain: int) -> str:
    return f"{100 * (n / plain - 1):+.1f} %" if plain else "–"

"""Counts under what the station will meet: other light, colour and focus, and scales that nobody says."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from rbc_edge import imaging
from rbc_edge.analyzer import Analyzer
from rbc_edge.values import CellClass, FieldOfView, Scale, ScaleSource, UInt8
from rbc_train.datasets import Photograph, diameter_px, source_diameters_px


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


@dataclass(frozen=True, slots=True)
class DisturbanceTrial:
    """How counts fare under one disturbance, the scale being known.

    Attributes:
        name: The disturbance.
        n_rbc: Red cells counted in all fields.
        n_overlapping: Those called overlapping.
        n_wbc: White cells counted.
    """

    name: str
    n_rbc: int
    n_overlapping: int
    n_wbc: int


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
        n_rbc = n_overlapping = n_wbc = 0
        for photograph in photographs:
            image = np.ascontiguousarray(disturb(photograph.read()))
            given = Scale(diameter_px(photograph, of_source), ScaleSource.CELL_DIAMETER)
            cells = analyzer.analyze(FieldOfView(photograph.source, photograph.name, "", image), given).cells
            n_rbc += int((cells.detections.class_id == CellClass.RBC).sum())
            n_overlapping += int(cells.overlapping.sum())
            n_wbc += int((cells.detections.class_id == CellClass.WBC).sum())
        yield DisturbanceTrial(name, n_rbc, n_overlapping, n_wbc)


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
    """

    factor: float
    n_fields: int
    n_rbc: int
    ratio_low: float
    ratio_median: float
    ratio_high: float
    n_off: int


def try_scales(
    analyzer: Analyzer, photographs: Sequence[Photograph], factors: Sequence[float]
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
    unknown = Scale(math.nan, ScaleSource.NONE)
    for factor in factors:
        ratios: list[float] = []
        n_rbc = 0
        for photograph in photographs:
            image = imaging.rescale(photograph.read(), factor)
            result = analyzer.analyze(FieldOfView(photograph.source, photograph.name, "", image), unknown)
            n_rbc += int((result.cells.detections.class_id == CellClass.RBC).sum())
            ratios.append(result.scale.cell_diameter_px / (diameter_px(photograph, of_source) * factor))
        off = [not 3 / 4 <= r <= 4 / 3 for r in ratios]
        low, middle, high = np.nanpercentile(ratios, (5, 50, 95)).tolist()
        yield ScaleTrial(factor, len(photographs), n_rbc, low, middle, high, sum(off))

"""The deep door: a field of view in, its classified cells out."""

import math
import os
import time
from collections.abc import Sequence

import numpy as np

from rbc_edge import counting, imaging, scale
from rbc_edge.bundle import DETECTOR, Bundle
from rbc_edge.classifier import Classifier
from rbc_edge.detector import Detector
from rbc_edge.values import CellClass, Cells, Detections, FieldOfView, FovResult, Scale, ScaleSource, UInt8

_MAX_THREADS = 4  # small inputs gain nothing from more


def default_threads() -> int:
    """Returns how many threads a network gets when nobody says: the processor's, at most four."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))


class Analyzer:
    """Runs a bundle on fields of view.

    Args:
        bundle: The bundle.
        threads: Threads inside one operator; 0 chooses for this machine.
        detector_file: Which of the bundle's detectors (int8 or fp32).
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0, detector_file: str = DETECTOR) -> None:
        count = threads or default_threads()
        self.bundle = bundle
        self.detector = Detector(bundle, threads=count, file=detector_file)
        self.classifier = Classifier(bundle, threads=count)

    def estimate_scale(self, images: Sequence[UInt8]) -> Scale:
        """Estimates a slide's scale from some of its fields (see `scale.estimate_slide`).

        Args:
            images: Fields, each uint8 (H, W, 3) RGB; may be empty.

        Returns:
            The scale with source ``estimated-slide``, or NaN and ``none``.
        """
        return scale.estimate_slide(images, self.detector)

    def analyze(self, field: FieldOfView, given: Scale) -> FovResult:
        """Finds and classifies the cells of one field of view.

        A scale that the user gave is kept. One that was estimated gives way when this field's own cells
        clearly contradict it (another objective, another camera in the same folder).

        Args:
            field: The field of view.
            given: The user's scale, or the slide's estimate.

        Returns:
            Every cell, whatever the edge rule. Quality flags: ``no-red-cells``; ``scale-mismatch`` when
            the cells measure clearly otherwise than the user said.
        """
        clock = _Clock()
        height, width = field.image.shape[:2]
        found, used, flags = self._detect(field.image, given, clock)
        rbc = np.flatnonzero(found.class_id == CellClass.RBC)
        crops = imaging.crops(field.image, found.xyxy[rbc], margin=self.classifier.margin)
        clock.lap("crop")
        overlap_score = np.full(len(found), np.nan, np.float32)
        overlap_score[rbc] = self.classifier.overlap_score(crops)
        # NaN compares false: other classes are never overlapping.
        overlapping = overlap_score >= self.classifier.threshold
        clock.lap("classify")
        cells = Cells(
            found,
            overlap_score,
            overlapping,
            counting.groups(found.xyxy, found.class_id, overlapping),
            counting.touches_edge(found.xyxy, width, height),
        )
        if len(rbc) == 0:
            flags.append("no-red-cells")
        return FovResult(width, height, used, cells, tuple(sorted(flags)), clock.laps_ms)

    def _detect(self, image: UInt8, given: Scale, clock: "_Clock") -> tuple[Detections, Scale, list[str]]:
        height, width = image.shape[:2]
        flags: list[str] = []
        used = given
        estimated = given.source in (ScaleSource.SLIDE, ScaleSource.NONE)
        if math.isnan(given.cell_diameter_px):
            own, n = scale.estimate_field(image, self.detector)
            clock.lap("scale")
            if n == 0:
                return Detections.empty(), Scale(math.nan, ScaleSource.NONE), flags
            used = Scale(own, ScaleSource.FIELD)
        found = self.detector.detect(image, used.cell_diameter_px)
        clock.lap("detect")
        if used is given and scale.disagrees(found, width, height, used.cell_diameter_px):
            if estimated:
                own, n = scale.estimate_field(image, self.detector)
                clock.lap("scale")
                if n > 0:
                    used = Scale(own, ScaleSource.FIELD)
                    found = self.detector.detect(image, own)
                    clock.lap("detect")
            else:
                flags.append("scale-mismatch")
        return found, used, flags


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps_ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps_ms[stage] = self.laps_ms.get(stage, 0.0) + (now - self._last) * 1000
        self._last = now

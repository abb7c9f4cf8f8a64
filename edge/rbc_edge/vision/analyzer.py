"""The deep door: a field of view in, its classified cells out."""

import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from threading import Lock
from typing import Final

import numpy as np

from rbc_edge.values import (
    CellClass,
    Cells,
    Detections,
    FieldOfView,
    Float32,
    FovResult,
    Scale,
    ScaleSource,
    UInt8,
)
from rbc_edge.vision import boxes, counting, image_file, preprocess, quality, scale
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import Classifier
from rbc_edge.vision.detector import Detector

_MAX_THREADS: Final = 4  # small inputs gain nothing from more


def default_threads() -> int:
    """Returns how many threads work when nobody says: the processor's, at most four."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))


class Analyzer:
    """Runs a bundle on fields of view.

    Args:
        bundle: The bundle.
        threads: Tiles and crops of a large field, and fields for a scale, that are looked at together; 0
            chooses for this machine.
        precision: Which of the bundle's networks: int8, or fp32 if it brings them along (`--with-fp32`).
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0, precision: str = "int8") -> None:
        count = threads or default_threads()
        self.bundle = bundle
        self._threads = count
        self._large = Lock()
        detector, classifier = bundle.networks(precision)
        self.detector = Detector(bundle, threads=count, file=detector)
        self.classifier = Classifier(bundle, threads=count, file=classifier)

    def estimate_scale(self, images: Sequence[UInt8]) -> Scale:
        """Estimates a slide's scale from some of its fields (see `scale.estimate_slide`).

        Args:
            images: Fields, each uint8 (H, W, 3) RGB; may be empty.

        Returns:
            The scale with source ``estimated-slide``, or NaN and ``none``.
        """
        return scale.estimate_slide(images, self.detector, threads=self._threads)

    def analyze(self, field: FieldOfView, given: Scale) -> FovResult:
        """Finds and classifies the cells of one field of view.

        A scale that the user gave is kept. One that was estimated gives way when this field's own cells
        clearly contradict it (another objective, another camera in the same folder).

        Args:
            field: The field of view.
            given: The user's scale, or the slide's estimate.

        Returns:
            Every cell, whatever the edge rule. Quality flags: those of `quality.FLAGS`, of which two are
            raised here: ``no-red-cells``; ``scale-mismatch`` when the cells measure clearly otherwise than
            the user said.
        """
        clock = _Clock()
        found, used, flags, view = self._detect(field, given, clock)
        rbc = np.flatnonzero(found.class_id == CellClass.RBC)
        crops = self.crops(view, found.xyxy[rbc])
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
            boxes.touches_edge(found.xyxy, field.width_px, field.height_px, used.cell_diameter_px),
        )
        if len(rbc) == 0:
            flags.append("no-red-cells")
        flags += quality.flags(self.signs(view, cells, used))
        clock.lap("quality")
        return FovResult(field.width_px, field.height_px, used, cells, tuple(sorted(flags)), clock.laps_ms)

    def view(self, field: FieldOfView, used: Scale) -> preprocess.View:
        """Returns what the networks were shown of a field that was counted at a scale.

        Args:
            field: The field of view.
            used: `FovResult.scale`.
        """
        if used.source is ScaleSource.FIELD:  # found in all its pixels
            return preprocess.view(image_file.full_size(field), used.cell_diameter_px)
        return preprocess.view(field.image, used.cell_diameter_px, size=(field.width_px, field.height_px))

    def signs(self, view: preprocess.View, cells: Cells, used: Scale) -> quality.Signs:
        """Measures what a field's picture is worth (see `quality`).

        Args:
            view: Of the field, for the scale that was used.
            cells: What was found in it.
            used: The scale it was found at.

        Returns:
            The signs.
        """
        manifest = self.bundle.manifest
        return quality.measure(
            view,
            cells,
            used.cell_diameter_px,
            model_diameter_px=manifest.cell_diameter_px,
            least_score=manifest.score_threshold[CellClass.RBC],
        )

    def detect(
        self, view: preprocess.View, cell_diameter_px: float, *, score_threshold: Float32 | None = None
    ) -> Detections:
        """Finds the cells of a view.

        Args:
            view: Of a field of view, for about this cell diameter.
            cell_diameter_px: Diameter of a red cell, pixels of the field.
            score_threshold: See `Detector.detect`.

        Returns:
            Detections in pixels of the field.
        """
        found = self.detector.detect(
            view.image, view.shown_px(cell_diameter_px), score_threshold=score_threshold
        )
        limit = np.array(view.size * 2, np.float32)
        return replace(found, xyxy=np.minimum(found.xyxy * view.px, limit))

    def crops(self, view: preprocess.View, xyxy: Float32) -> UInt8:
        """Cuts boxes out of a view: float32 (N, 4), pixels of the field; uint8 (N, 64, 64, 3)."""
        return preprocess.crops(view.image, xyxy / view.px, margin=self.classifier.margin)

    def _detect(
        self, field: FieldOfView, given: Scale, clock: "_Clock"
    ) -> tuple[Detections, Scale, list[str], preprocess.View]:
        """Returns the detections, the scale they were made at, flags about that scale, and the view."""
        width, height = field.width_px, field.height_px
        view = self.view(field, given)
        clock.lap("view")
        if math.isnan(given.cell_diameter_px):
            own = self._own(field, given, None)
            clock.lap("scale")
            if own is None:
                return Detections.empty(), Scale(math.nan, ScaleSource.NONE), [], view
            return self._detect_at(own, clock)
        found = self.detect(view, given.cell_diameter_px)
        clock.lap("detect")
        by_user = given.source in (ScaleSource.CELL_DIAMETER, ScaleSource.UM_PER_PX)
        contradicted = scale.disagrees(found, width, height, given.cell_diameter_px)
        if contradicted and by_user:
            return found, given, ["scale-mismatch"], view
        # Few cells: a sparse field, or a scale so far off that the detector is blind; they look the same.
        if not contradicted and not scale.sees_little(found, width, height):
            return found, given, [], view
        own = self._own(field, given, None if contradicted else found)
        clock.lap("scale")
        if own is None:
            return found, given, [], view
        if by_user:
            return found, given, ["scale-mismatch"], view
        return self._detect_at(own, clock)

    def _own(
        self, field: FieldOfView, given: Scale, found: Detections | None
    ) -> tuple[float, preprocess.View] | None:
        """Estimates a field's own scale from all its pixels; returns it with the view for it, or None.

        Where few cells were found at the given scale, the field has one of its own only if it explains more.

        Large fields that were decoded small take turns: in full, two of 20 megapixels are half a gigabyte.
        """
        is_large = bool(field.file) and field.width_px * field.height_px >= image_file.LARGE_PIXELS
        with self._large if is_large else nullcontext():
            image = image_file.full_size(field)
            if found is None:
                own_px, n = scale.estimate_field(preprocess.balance(image), self.detector)
                has_own = n > 0
            else:
                own_px, n = scale.look_elsewhere(
                    preprocess.balance(image), self.detector, found, given.cell_diameter_px
                )
                has_own = scale.blind_at(given.cell_diameter_px, own_px, n)
            return (own_px, preprocess.view(image, own_px)) if has_own else None

    def _detect_at(
        self, own: tuple[float, preprocess.View], clock: "_Clock"
    ) -> tuple[Detections, Scale, list[str], preprocess.View]:
        own_px, view = own
        found = self.detect(view, own_px)
        clock.lap("detect")
        return found, Scale(own_px, ScaleSource.FIELD), [], view


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps_ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps_ms[stage] = self.laps_ms.get(stage, 0.0) + (now - self._last) * 1000
        self._last = now

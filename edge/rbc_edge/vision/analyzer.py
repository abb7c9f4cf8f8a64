"""A field of view in, its classified cells out. `count_image` does it for one image, from Python."""

import functools
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np

from rbc_edge.config import CELL_DIAMETER_UM
from rbc_edge.errors import ImageError, UsageError
from rbc_edge.values import (
    CellClass,
    Cells,
    Detections,
    FieldOfView,
    Float32,
    FovResult,
    Measure,
    Morphology,
    Scale,
    ScaleSource,
    UInt8,
)
from rbc_edge.vision import (
    boxes,
    clumps,
    counting,
    image_file,
    morphology,
    preprocess,
    quality,
    scale,
    surround,
)
from rbc_edge.vision.bundle import Bundle, claimed_id
from rbc_edge.vision.classifier import Classifier, CropScores
from rbc_edge.vision.detector import Detector

_MAX_THREADS: Final = 4  # small inputs gain nothing from more
_Path = str | os.PathLike[str]
_Image = str | os.PathLike[str] | UInt8


def default_threads() -> int:
    """Returns how many threads work if the user does not say: as many as processor cores, at most four."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))


class Analyzer:
    """Runs a bundle on fields of view.

    Args:
        bundle: The bundle.
        threads: Tiles and crops of a large field, and fields for a scale, that are analyzed at the same time.
            0 chooses for this machine.
        precision: Which of the bundle's networks: ``int8``, or ``fp32`` if the bundle holds them.

    `analyze` and `count_image` may be called from several threads.

    Raises:
        BundleError: The bundle has no networks of this precision, or ONNX Runtime cannot load them.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0, precision: str = "int8") -> None:
        self.bundle = bundle
        self._threads = threads or default_threads()
        self._large = Lock()
        detector, classifier = bundle.networks(precision)
        self.detector = Detector(bundle, threads=self._threads, file=detector)
        self.classifier = Classifier(bundle, threads=self._threads, file=classifier)

    def estimate_scale(self, images: Sequence[UInt8]) -> Scale:
        """Estimates a slide's scale from some of its fields (see `scale.estimate_slide`).

        Args:
            images: Fields, each uint8 (H, W, 3) RGB. May be empty.

        Returns:
            The scale with source ``estimated-slide``, or NaN and ``none``.
        """
        return scale.estimate_slide(images, self.detector, threads=self._threads)

    def measure(self, images: Sequence[UInt8], start: int = 0) -> list[Measure]:
        """Measures the red cells of fields, each uint8 (H, W, 3) RGB (see `scale.measure`)."""
        return scale.measure(images, self.detector, start, threads=self._threads)

    def count_image(
        self, image: _Image, *, scale: Scale | None = None, max_megapixels: float = 250.0
    ) -> FovResult:
        """Counts the cells of one image, as `rbc-edge run` counts a slide of one field.

        Arguments, result and errors are those of the function `count_image`. A `scale` of None is estimated
        from the image.
        """
        if scale is None:
            scale = self.estimate_scale([_field(image, math.nan, max_megapixels).image])
        return self.analyze(_field(image, scale.cell_diameter_px, max_megapixels), scale)

    def analyze(self, field: FieldOfView, given: Scale) -> FovResult:
        """Finds and classifies the cells of one field of view.

        A scale that the user gave is kept. What the file says about its pixels takes the place of an estimate
        for the slide that agrees with it. An estimated scale is replaced when this field's own cells
        clearly contradict it (another objective, another camera in the same folder). A box that the second
        stage refuses is no cell, unless the detector is sure of it. Where it is large, its cells are searched
        (`clumps`). Returns every cell, whatever the edge rule, and the quality flags (`quality.FLAGS`).
        """
        clock = _Clock()
        told_px = CELL_DIAMETER_UM / field.um_per_px
        if given.source is ScaleSource.SLIDE and scale.agree(told_px, given.cell_diameter_px):
            given = Scale(told_px, ScaleSource.METADATA)
        found, used, flags, view = self._detect(field, given, clock)
        if used.source in (ScaleSource.SLIDE, ScaleSource.FIELD) and not math.isnan(told_px):
            flags += [] if scale.agree(told_px, used.cell_diameter_px) else ["pixel-size"]
        if view.lit is not None:
            flags.append("round-field")
            found = surround.without_rim(found, found.xyxy / view.px, view.lit)
        scores = self._judge(view, found, used, clock)
        refused = self.classifier.refuses(scores.refuse)
        heaps = clumps.among(found.xyxy, refused, used.cell_diameter_px)
        sure = np.asarray(found.score >= self.bundle.manifest.sure_score, np.bool_)
        refused &= ~sure
        refused[heaps] = True
        kept = found.take(~refused)
        more, more_scores = self._take_apart(view, found.xyxy[heaps], used, kept, clock)
        cells_at = np.concatenate([kept.xyxy[kept.class_id != CellClass.PLATELET], more.xyxy])
        large = [x for x in found.xyxy[heaps] if clumps.holds_several(x, used.cell_diameter_px)]
        if any(np.count_nonzero(boxes.centre_inside(cells_at, heap)) < 2 for heap in large):
            flags.append("clump")
        for i in heaps:  # what does not come apart is one cell, if the detector is sure of it
            refused[i] = not sure[i] or boxes.centre_inside(more.xyxy, found.xyxy[i]).any()
        n_refused = int(np.count_nonzero(refused))
        found = Detections.joined([found.take(~refused), more])
        order = boxes.reading_order(found.xyxy)
        scores = CropScores.joined([scores.take(~refused), more_scores]).take(order)
        found = found.take(order)
        # NaN compares false: other classes are never overlapping.
        overlapping = scores.overlap >= self.classifier.threshold
        group = counting.groups(found.xyxy, found.class_id, overlapping)
        edges = boxes.touches_edge(found.xyxy, field.width_px, field.height_px, used.cell_diameter_px)
        if view.lit is not None:
            edges |= surround.sides(found.xyxy / view.px, view.lit)
        # The outline of a cell that lies over another, or is cut, is not its form.
        whole = (found.class_id == CellClass.RBC) & ~overlapping & ~edges.any(axis=1)
        form = morphology.measured(Morphology.unknown(len(found)), view, found.xyxy, whole)
        signs = morphology.signs(form, used.cell_diameter_px)
        shape, shape_score, is_sure = self.classifier.shapes(self.classifier.informed(scores.shape, signs))
        form = replace(form, shape=shape, shape_score=shape_score, shape_sure=is_sure)
        clock.lap("outline")
        cells = Cells(found, scores.overlap, overlapping, group, edges, form)
        if not (found.class_id == CellClass.RBC).any():
            flags.append("no-red-cells")
        flags += quality.flags(self.features(view, cells, used))
        clock.lap("quality")
        size = field.width_px, field.height_px
        return FovResult(*size, used, cells, tuple(sorted(flags)), clock.laps_ms, n_refused)

    def view(self, field: FieldOfView, used: Scale) -> preprocess.View:
        """Returns what the networks were shown of a field that was counted at a scale (`FovResult.scale`)."""
        all_pixels = used.source is ScaleSource.FIELD
        image = image_file.full_size(field) if all_pixels else field.decoded
        return preprocess.view(image, used.cell_diameter_px)

    def features(self, view: preprocess.View, cells: Cells, used: Scale) -> quality.Features:
        """Measures the quality of a field's image (see `quality`), from its view for the scale `used`."""
        manifest = self.bundle.manifest
        known = {"model_px": manifest.cell_diameter_px, "min_score": manifest.score_threshold[CellClass.RBC]}
        return quality.measure(view, cells, used.cell_diameter_px, **known)

    def _judge(self, view: preprocess.View, found: Detections, used: Scale, clock: "_Clock") -> CropScores:
        """Judges the red cells of N boxes. The scores of other classes are NaN."""
        rbc = np.flatnonzero(found.class_id == CellClass.RBC)
        xyxy = found.xyxy[rbc]
        crops = preprocess.cell_crops(view, xyxy, margin=self.classifier.margin)
        clock.lap("crop")
        sides = (xyxy[:, 2:] - xyxy[:, :2]) / np.float32(used.cell_diameter_px)
        scores = self.classifier.unasked(len(found))
        for each, judged in zip(scores, self.classifier.scores(crops, sides), strict=True):
            each[rbc] = judged
        clock.lap("classify")
        return scores

    def _take_apart(
        self, view: preprocess.View, heaps: Float32, used: Scale, known: Detections, clock: "_Clock"
    ) -> tuple[Detections, CropScores]:
        """Searches clumps, (K, 4), again. Returns the cells that come out, and their scores."""
        more, scores = Detections.empty(), self.classifier.unasked(0)
        for heap in heaps[: clumps.MAX_SEARCHED]:
            seen = Detections.joined([known, more])
            new = clumps.search(self.detector, view, heap, used.cell_diameter_px, seen)
            clock.lap("detect")
            judged = self._judge(view, new, used, clock)
            is_cell = ~self.classifier.refuses(judged.refuse)
            more = Detections.joined([more, new.take(is_cell)])
            scores = CropScores.joined([scores, judged.take(is_cell)])
        return more, scores

    def _detect(
        self, field: FieldOfView, given: Scale, clock: "_Clock"
    ) -> tuple[Detections, Scale, list[str], preprocess.View]:
        """Returns the detections, the scale they were made at, flags about that scale, and the view."""
        view = self.view(field, given)
        clock.lap("view")
        found, tried = Detections.empty(), None
        by_user = given.source in (ScaleSource.CELL_DIAMETER, ScaleSource.UM_PER_PX)
        if not math.isnan(given.cell_diameter_px):
            found = self.detector.detect(view, given.cell_diameter_px)
            clock.lap("detect")
            disagrees = scale.disagrees(found, field.width_px, field.height_px, given.cell_diameter_px)
            if disagrees is None:
                tried = found
            elif not disagrees or by_user:
                return found, given, ["scale-mismatch"] if disagrees else [], view
        own = self._own(field, given, tried)
        clock.lap("scale")
        if own is None:
            used = Scale(math.nan, ScaleSource.NONE) if math.isnan(given.cell_diameter_px) else given
            return found, used, [], view
        if by_user:
            return found, given, ["scale-mismatch"], view
        own_px, view = own
        found = self.detector.detect(view, own_px)
        clock.lap("detect")
        return found, Scale(own_px, ScaleSource.FIELD), [], view

    def _own(
        self, field: FieldOfView, given: Scale, found: Detections | None
    ) -> tuple[float, preprocess.View] | None:
        """Estimates a field's own scale from all its pixels. Returns it with its view, or None.

        Where few cells were found at the given scale, its own scale must explain more than that. Large fields
        that were reduced are decoded in full one at a time: two of 20 megapixels take half a gigabyte.
        """
        is_large = field.decoded.reduction > 1 and field.width_px * field.height_px >= image_file.LARGE_PIXELS
        with self._large if is_large else nullcontext():
            image, given_px = image_file.full_size(field), given.cell_diameter_px
            balanced = preprocess.balance(image)
            if found is None:
                own_px, n = scale.estimate_field(balanced, self.detector)
                has_own = n > 0
            else:
                own_px, n = scale.look_elsewhere(balanced, self.detector, found, given_px)
                has_own = scale.blind_at(given_px, own_px, n)
            del balanced
            return (own_px, preprocess.view(image, own_px)) if has_own else None


def count_image(
    image: _Image,
    *,
    bundle: Bundle | _Path | None = None,
    cell_diameter_px: float | None = None,
    um_per_px: float | None = None,
    max_megapixels: float = 250.0,
    threads: int = 0,
) -> FovResult:
    """Counts the cells of one image (see `Analyzer.count_image`).

    The networks are opened once for each bundle and number of threads, and kept for later calls.

    Args:
        image: A JPEG, PNG, BMP or TIFF file, or uint8 (H, W, 3), RGB.
        bundle: The models, or their folder. None: those that ship with rbc-edge.
        cell_diameter_px: Diameter of a red cell, pixels. Give this, or `um_per_px`, or neither: then it is
            estimated from the image.
        um_per_px: Micrometres in a pixel.
        max_megapixels: Larger files are refused from their header.
        threads: See `Analyzer`.

    Returns:
        Counts, flags and cells.

    Raises:
        ImageError: The file cannot be read. Its `reason` says why.
        BundleError: The bundle is missing or not intact.
        UsageError: Both scales are given, or one is not positive.
        ValueError: The array has another dtype or shape.
    """
    given = given_scale(cell_diameter_px=cell_diameter_px, um_per_px=um_per_px)
    analyzer = open_analyzer(bundle, threads=threads)
    return analyzer.count_image(image, scale=given, max_megapixels=max_megapixels)


def open_analyzer(bundle: Bundle | _Path | None = None, *, threads: int = 0) -> Analyzer:
    """Returns an analyzer: the same one for the same bundle and number of threads."""
    path = bundle.path if isinstance(bundle, Bundle) else None if bundle is None else Path(bundle)
    return _opened(path, claimed_id(path), threads)


def given_scale(*, cell_diameter_px: float | None, um_per_px: float | None) -> Scale | None:
    """Returns the scale that the user gave. None for neither.

    Raises `UsageError` where both are given, or one is not positive.
    """
    if cell_diameter_px is not None and um_per_px is not None:
        raise UsageError("cell_diameter_px and um_per_px say the same in two ways", "give one of them")
    value = um_per_px if cell_diameter_px is None else cell_diameter_px
    if value is None:
        return None
    if not 0 < value < math.inf:
        raise UsageError(f"the scale {value:g} is not a positive number")
    if um_per_px is None:
        return Scale(value, ScaleSource.CELL_DIAMETER)
    return Scale(CELL_DIAMETER_UM / value, ScaleSource.UM_PER_PX)


@functools.lru_cache(maxsize=4)
def _opened(path: Path | None, bundle_id: str | None, threads: int) -> Analyzer:
    # The id is a part of the key: another bundle may come into the same folder.
    return Analyzer(Bundle.open(path), threads=threads)


def _field(image: _Image, diameter_px: float, max_megapixels: float) -> FieldOfView:
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        return image_file.load_field(
            path, "", path.name, max_megapixels=max_megapixels, cell_diameter_px=diameter_px
        )
    field = FieldOfView.of(image)
    if min(field.width_px, field.height_px) < image_file.MIN_SIDE_PX:
        raise ImageError("too-small", f"{field.width_px}x{field.height_px} pixels is too small for a field")
    return field


class _Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps_ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        before, self._last = self._last, time.perf_counter()
        self.laps_ms[stage] = self.laps_ms.get(stage, 0.0) + (self._last - before) * 1000

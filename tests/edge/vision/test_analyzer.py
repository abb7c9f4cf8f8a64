"""From a field to classified cells: which scale is used, and what is flagged."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.values import (
    CellClass,
    Detections,
    FieldOfView,
    Float32,
    FovResult,
    Scale,
    ScaleSource,
    Shape,
    UInt8,
)
from rbc_edge.vision import boxes, counting, image_file, preprocess
from rbc_edge.vision.analyzer import Analyzer, default_threads
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import CropScores

GIVEN = Scale(40.0, ScaleSource.CELL_DIAMETER)


UNKNOWN = Scale(math.nan, ScaleSource.NONE)


@pytest.fixture(scope="module")
def analyzer(toy_bundle_path: Path) -> Analyzer:
    return Analyzer(Bundle.open(toy_bundle_path), threads=1)


@pytest.fixture(scope="module")
def crowded(drawn_fields: tuple[DrawnField, ...]) -> DrawnField:
    """The field with the most cells."""
    return max(drawn_fields, key=lambda drawn: drawn.counts.n_rbc)


def field(image: UInt8) -> FieldOfView:
    return FieldOfView.of(image, slide_id="slide", fov="fov")


def test_only_red_cells_are_judged_and_groups_follow_the_verdicts(
    analyzer: Analyzer, drawn_fields: tuple[DrawnField, ...]
) -> None:
    white = draw_field(
        np.random.default_rng(4), width_px=320, height_px=256, cell_diameter_px=40.0, stain=CREAM
    )
    classes: set[int] = set()
    for drawn in (*drawn_fields, white):
        result = analyzer.analyze(field(drawn.image), GIVEN)
        cells = result.cells
        found = cells.detections
        classes |= set(found.class_id.tolist())
        red = found.class_id == CellClass.RBC
        assert (np.isnan(cells.overlap_score) == ~red).all()
        assert (cells.overlapping == (red & (cells.overlap_score >= 0.5))).all()
        np.testing.assert_array_equal(
            cells.group, counting.groups(found.xyxy, found.class_id, cells.overlapping)
        )
        np.testing.assert_array_equal(
            cells.touches_edge, boxes.touches_edge(found.xyxy, 320, 256, GIVEN.cell_diameter_px)
        )
        assert (result.width_px, result.height_px) == (320, 256)
        assert set(result.timings_ms) - {"scale"} == {
            *("view", "detect", "crop", "classify", "outline", "quality")
        }
        assert all(ms >= 0 for ms in result.timings_ms.values())
    assert classes == {0, 1, 2}


def test_the_scores_belong_to_their_cells(analyzer: Analyzer, crowded: DrawnField) -> None:
    cells = analyzer.analyze(field(crowded.image), GIVEN).cells
    for i in np.flatnonzero(cells.detections.class_id == CellClass.RBC):
        crop = preprocess.crops(
            preprocess.balance(crowded.image), cells.detections.xyxy[i : i + 1], margin=0.25
        )
        assert cells.overlap_score[i] == pytest.approx(analyzer.classifier.overlap_score(crop)[0], abs=1e-5)


def test_the_form_of_single_uncut_red_cells_is_measured(
    analyzer: Analyzer, drawn_fields: tuple[DrawnField, ...]
) -> None:
    n_measured = 0
    for drawn in drawn_fields:
        cells = analyzer.analyze(field(drawn.image), GIVEN).cells
        form = cells.morphology
        red = cells.detections.class_id == CellClass.RBC
        whole = red & ~cells.overlapping & ~cells.touches_edge.any(axis=1)
        assert np.isnan(form.area_px[~whole]).all()
        known = form.area_px[~np.isnan(form.area_px)]
        n_measured += len(known)
        # Drawn cells are 40 px wide, give or take 15 %.
        assert ((known > 0.7 * np.pi * 20**2) & (known < 1.4 * np.pi * 20**2)).all()
    assert n_measured > 20


def scored(analyzer: Analyzer, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Gives all that the detector finds the same score: a share of the way from the threshold to 1."""
    detect, least = analyzer.detector.detect, analyzer.bundle.manifest.score_threshold[CellClass.RBC]

    def found(*given: Any, **named: Any) -> Detections:
        cells = detect(*given, **named)
        return replace(cells, score=np.full(len(cells), least + share * (1 - least), np.float32))

    monkeypatch.setattr(analyzer.detector, "detect", found)


def test_dust_is_refused_and_no_cell(
    analyzer: Analyzer, crowded: DrawnField, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(analyzer, monkeypatch, 0.3)
    image = np.vstack([crowded.image, np.full_like(crowded.image[:80], crowded.image.max(axis=(0, 1)))])
    plain = analyzer.analyze(field(image), GIVEN)
    assert plain.n_refused == 0
    cv2.circle(image, (160, 300), 20, (150, 150, 150), -1)
    result = analyzer.analyze(field(image), GIVEN)
    assert result.n_refused == 1
    np.testing.assert_array_equal(result.cells.detections.xyxy, plain.cells.detections.xyxy)
    assert result.counts == plain.counts


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_red_box_is_a_cell_or_refused(
    analyzer: Analyzer, crowded: DrawnField, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """And what is refused is in no group, no count and no flag."""
    scored(analyzer, monkeypatch, 0.3)
    found = analyzer.detector.detect(preprocess.balance(crowded.image), 40.0)
    red = np.flatnonzero(found.class_id == CellClass.RBC)
    overlap = np.linspace(0, 1, len(red)).astype(np.float32)
    refuse = (np.random.default_rng(0).random(len(red)) < share).astype(np.float32)
    shape = np.eye(3, dtype=np.float32)[np.arange(len(red)) % 3]
    monkeypatch.setattr(analyzer.classifier, "scores", lambda *_: CropScores(overlap, refuse, shape))
    result = analyzer.analyze(field(crowded.image), GIVEN)
    cells, kept = result.cells, np.delete(np.arange(len(found)), red[refuse == 1])
    assert result.n_refused == (refuse == 1).sum() == len(found) - len(cells)
    np.testing.assert_array_equal(cells.detections.xyxy, found.xyxy[kept])
    assert result.n_rbc == (refuse == 0).sum()
    np.testing.assert_array_equal(
        cells.overlap_score[cells.detections.class_id == CellClass.RBC], overlap[refuse == 0]
    )
    names = [cell.shape for cell in cells if cell.overlap_score is not None]
    known = [Shape.NORMAL, Shape.ELLIPTOCYTE, Shape.SPHEROCYTE]
    assert names == [known[i % 3] for i in np.flatnonzero(refuse == 0)]
    assert all(cell.shape is None for cell in cells if cell.overlap_score is None)
    np.testing.assert_array_equal(
        cells.group, counting.groups(found.xyxy[kept], found.class_id[kept], cells.overlapping)
    )
    assert ("no-red-cells" in result.flags) == (share == 1.0)


def test_what_the_detector_is_sure_of_is_not_refused(
    analyzer: Analyzer, crowded: DrawnField, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage refused four in a hundred cells of a laboratory that it did not know."""
    scored(analyzer, monkeypatch, 0.4)
    plain = analyzer.analyze(field(crowded.image), GIVEN)

    def all_refused(crops: UInt8, _sides: Float32) -> CropScores:
        ones = np.ones(len(crops), np.float32)
        return CropScores(ones, ones, np.ones((len(crops), 3), np.float32))

    monkeypatch.setattr(analyzer.classifier, "scores", all_refused)
    result = analyzer.analyze(field(crowded.image), GIVEN)
    np.testing.assert_array_equal(result.cells.detections.xyxy, plain.cells.detections.xyxy)
    assert (result.n_refused, result.n_rbc) == (0, plain.n_rbc)


def test_the_same_field_gives_the_same_cells(analyzer: Analyzer, crowded: DrawnField) -> None:
    one, two = (analyzer.analyze(field(crowded.image), GIVEN).cells for _ in range(2))
    np.testing.assert_array_equal(one.detections.xyxy, two.detections.xyxy)
    np.testing.assert_array_equal(one.overlap_score, two.overlap_score)


def flags_of(result: FovResult) -> list[str]:
    """All but what says that the toy is a toy: it is never as sure as the shipped bundle."""
    return [flag for flag in result.quality_flags if flag != "unfamiliar"]


@pytest.mark.parametrize("source", [ScaleSource.CELL_DIAMETER, ScaleSource.UM_PER_PX])
def test_what_the_user_says_is_kept_and_doubted(
    analyzer: Analyzer, crowded: DrawnField, source: ScaleSource
) -> None:
    assert flags_of(analyzer.analyze(field(crowded.image), Scale(40.0, source))) == []
    wrong = Scale(29.0, source)  # the toy still sees cells so, and sees that they are larger
    result = analyzer.analyze(field(crowded.image), wrong)
    assert result.scale == wrong
    assert flags_of(result) == ["scale-mismatch"]


def test_an_estimate_gives_way_to_a_field_that_contradicts_it(
    analyzer: Analyzer, crowded: DrawnField
) -> None:
    """Another objective in the same folder."""
    right = analyzer.analyze(field(crowded.image), Scale(40.0, ScaleSource.SLIDE))
    assert right.scale == Scale(40.0, ScaleSource.SLIDE)
    result = analyzer.analyze(field(crowded.image), Scale(29.0, ScaleSource.SLIDE))
    assert result.scale.source is ScaleSource.FIELD
    assert result.scale.cell_diameter_px == pytest.approx(40.0, rel=0.15)
    assert flags_of(result) == []
    assert "scale" in result.timings_ms
    n = [int((r.cells.detections.class_id == CellClass.RBC).sum()) for r in (right, result)]
    assert n[1] == pytest.approx(n[0], abs=2)


def enlarged(drawn: DrawnField, factor: float, folder: Path) -> Path:
    """Writes a field as a JPEG of a camera with smaller pixels."""
    file = folder / "enlarged.jpg"
    Image.fromarray(preprocess.rescale(drawn.image, factor)).save(file, quality=95)
    return file


def test_a_jpeg_of_large_cells_gives_the_same_cells_at_half_its_size(
    analyzer: Analyzer, crowded: DrawnField, tmp_path: Path
) -> None:
    file, given = enlarged(crowded, 2.5, tmp_path), Scale(100.0, ScaleSource.SLIDE)
    whole = analyzer.analyze(image_file.load_field(file, "s", "f"), given)
    shrunk = image_file.load_field(file, "s", "f", cell_diameter_px=100.0)
    assert shrunk.decoded.pixels.shape == (320, 400, 3)
    half = analyzer.analyze(shrunk, given)
    assert (half.width_px, half.height_px) == (whole.width_px, whole.height_px) == (800, 640)
    assert half.scale == whole.scale == given
    one, two = whole.cells.detections, half.cells.detections
    assert len(one) == len(two) > 10
    # The toy looks at every fourth pixel of 40: each box is there within that.
    off = np.abs(one.xyxy[:, None] - two.xyxy[None]).max(axis=2)
    assert off.min(axis=1).max() <= 12


def test_a_field_of_small_cells_is_looked_at_in_full_where_its_slide_has_large_ones(
    analyzer: Analyzer, crowded: DrawnField, tmp_path: Path
) -> None:
    """Decoded at a half its cells of 40 px would be 20."""
    file, given = enlarged(crowded, 1.0, tmp_path), Scale(100.0, ScaleSource.SLIDE)
    shrunk = image_file.load_field(file, "s", "f", cell_diameter_px=100.0)
    assert shrunk.decoded.pixels.shape == (128, 160, 3)
    result = analyzer.analyze(shrunk, given)
    assert result.scale.source is ScaleSource.FIELD
    assert result.scale.cell_diameter_px == pytest.approx(40.0, rel=0.15)
    right = analyzer.analyze(image_file.load_field(file, "s", "f"), GIVEN)
    assert len(result.cells) == pytest.approx(len(right.cells), abs=2)
    assert (result.width_px, result.height_px) == (320, 256)


@pytest.mark.parametrize(("large_px", "alone"), [(320 * 256, True), (320 * 256 + 1, False)])
def test_large_fields_are_seen_in_full_one_at_a_time(
    analyzer: Analyzer,
    crowded: DrawnField,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    large_px: int,
    alone: bool,
) -> None:
    file, given = enlarged(crowded, 1.0, tmp_path), Scale(100.0, ScaleSource.SLIDE)
    monkeypatch.setattr(image_file, "LARGE_PIXELS", large_px)
    decode, seen = image_file.full_size, list[bool]()

    def watched(field: FieldOfView) -> UInt8:
        seen.append(analyzer._large.locked())
        return decode(field)

    monkeypatch.setattr(image_file, "full_size", watched)
    shrunk = image_file.load_field(file, "s", "f", cell_diameter_px=100.0)
    assert analyzer.analyze(shrunk, given).scale.source is ScaleSource.FIELD
    assert seen == [alone]
    assert not analyzer._large.locked()


def test_a_field_of_a_slide_without_scale_is_measured_itself(analyzer: Analyzer, crowded: DrawnField) -> None:
    result = analyzer.analyze(field(crowded.image), UNKNOWN)
    assert result.scale.source is ScaleSource.FIELD
    assert result.scale.cell_diameter_px == pytest.approx(40.0, rel=0.15)
    assert len(result.cells) > 5


def test_an_empty_field_is_counted_as_empty_and_says_so(analyzer: Analyzer) -> None:
    empty = field(np.full((120, 160, 3), 215, np.uint8))
    result = analyzer.analyze(empty, UNKNOWN)
    assert len(result.cells) == 0
    assert result.scale.source is ScaleSource.NONE
    assert math.isnan(result.scale.cell_diameter_px)
    assert result.quality_flags == ("no-red-cells",)
    known = analyzer.analyze(empty, GIVEN)
    assert (known.scale, known.quality_flags, len(known.cells)) == (GIVEN, ("no-red-cells",), 0)


def test_threads_are_at_least_one_and_at_most_four() -> None:
    assert 1 <= default_threads() <= 4


def test_a_field_far_out_of_its_slides_scale_is_not_called_empty(
    analyzer: Analyzer, crowded: DrawnField
) -> None:
    """At four times the size the detector sees next to nothing, so nothing contradicts the scale."""
    right = analyzer.analyze(field(crowded.image), GIVEN)
    far = analyzer.analyze(field(crowded.image), Scale(160.0, ScaleSource.SLIDE))
    assert far.scale.source is ScaleSource.FIELD
    assert far.scale.cell_diameter_px == pytest.approx(40.0, rel=0.15)
    assert len(far.cells) == pytest.approx(len(right.cells), abs=2)
    told = analyzer.analyze(field(crowded.image), Scale(160.0, ScaleSource.CELL_DIAMETER))
    assert "scale-mismatch" in told.quality_flags
    assert told.scale.cell_diameter_px == 160.0

"""The toy bundle keeps the real one's contract, and sees what is drawn."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.values import CellClass, FieldOfView, Scale, ScaleSource
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import CLASSIFIER, DETECTOR, Bundle


@pytest.fixture(scope="module")
def analyzer(toy_bundle_path: Path) -> Analyzer:
    return Analyzer(Bundle.open(toy_bundle_path), threads=1)


def test_it_is_small(toy_bundle_path: Path) -> None:
    assert sum(file.stat().st_size for file in toy_bundle_path.iterdir()) < 100_000


@pytest.mark.parametrize("shape", [(32, 32), (64, 160), (96, 32)])
def test_detector_keeps_the_contract(toy_bundle_path: Path, shape: tuple[int, int]) -> None:
    session = ort.InferenceSession(str(toy_bundle_path / DETECTOR), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    boxes, scores = session.run(["boxes", "scores"], {"image": image, "least_score": np.zeros(3, np.float32)})
    assert boxes.dtype == scores.dtype == np.float32
    assert boxes.shape == (len(scores), 4)
    assert scores.shape[1:] == (3,)
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_detector_gives_the_places_that_reach_the_least_score(toy_bundle_path: Path) -> None:
    session = ort.InferenceSession(str(toy_bundle_path / DETECTOR), providers=["CPUExecutionProvider"])
    drawn = draw_field(
        np.random.default_rng(1), width_px=192, height_px=160, n_single=3, group_sizes=(), n_wbc=0
    )
    every_box, every = session.run(None, {"image": drawn.image[None], "least_score": np.zeros(3, np.float32)})
    least = np.array([0.5, 0.1, 2.0], np.float32)
    boxes, scores = session.run(None, {"image": drawn.image[None], "least_score": least})
    reach = (every >= least).any(axis=1)
    assert 0 < reach.sum() < len(every)
    np.testing.assert_array_equal(boxes, every_box[reach])
    np.testing.assert_array_equal(scores, every[reach])


@pytest.mark.parametrize("n", [1, 5])
def test_classifier_keeps_the_contract(toy_bundle_path: Path, n: int) -> None:
    session = ort.InferenceSession(str(toy_bundle_path / CLASSIFIER), providers=["CPUExecutionProvider"])
    crops = np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), np.uint8)
    sides = np.random.default_rng(1).uniform(0.3, 2, (n, 2)).astype(np.float32)
    *scores, shape = session.run(
        ["overlap_score", "refuse_score", "shape_score"], {"crops": crops, "sides": sides}
    )
    assert shape.shape == (n, 3)
    assert shape.sum(axis=1) == pytest.approx(1, abs=1e-5)
    for score in scores:
        assert score.dtype == np.float32
        assert score.shape == (n,)
        assert ((score >= 0) & (score <= 1)).all()


@pytest.mark.parametrize("grey", [0, 114, 200, 255])
def test_an_even_field_shows_no_cell(analyzer: Analyzer, grey: int) -> None:
    image = np.full((120, 200, 3), grey, np.uint8)
    result = analyzer.analyze(FieldOfView.of(image), Scale(40.0, ScaleSource.CELL_DIAMETER))
    assert len(result.cells) == 0


def test_padding_shows_no_cell(analyzer: Analyzer) -> None:
    """The field is padded to multiples of 32 with a grey that is far darker than background."""
    field = draw_field(
        np.random.default_rng(0),
        width_px=193,
        height_px=145,
        n_single=0,
        group_sizes=(),
        n_wbc=0,
        n_platelets=0,
        stain=CREAM,
    )
    result = analyzer.analyze(FieldOfView.of(field.image), Scale(40.0, ScaleSource.CELL_DIAMETER))
    assert len(result.cells) == 0


def test_it_finds_the_drawn_cells(analyzer: Analyzer, drawn_fields: tuple[DrawnField, ...]) -> None:
    """Counts near the truth, on cells that lie where the truth has them."""
    n_found = n_true = n_matched = n_right = 0
    for drawn in drawn_fields:
        result = analyzer.analyze(FieldOfView.of(drawn.image), Scale(40.0, ScaleSource.CELL_DIAMETER))
        cells = result.cells
        found = np.flatnonzero(cells.detections.class_id == CellClass.RBC)
        truth = np.flatnonzero(drawn.class_id == CellClass.RBC)
        n_found += len(found)
        n_true += len(truth)
        centre = (drawn.xyxy[:, :2] + drawn.xyxy[:, 2:]) / 2
        for i in found:
            box = cells.detections.xyxy[i]
            distance = np.hypot(*(centre[truth] - (box[:2] + box[2:]) / 2).T)
            if distance.min() < 12:
                n_matched += 1
                n_right += bool(cells.overlapping[i] == drawn.overlapping[truth[distance.argmin()]])
    assert n_true > 40
    assert 0.8 * n_true < n_found < 1.1 * n_true
    assert n_matched > 0.9 * n_found
    assert n_right > 0.75 * n_matched


def test_its_scale_can_be_estimated(analyzer: Analyzer, drawn_fields: tuple[DrawnField, ...]) -> None:
    images = [drawn.image for drawn in drawn_fields]
    same = analyzer.estimate_scale(images)
    twice = analyzer.estimate_scale([preprocess.rescale(image, 2.0) for image in images])
    assert same.source is twice.source is ScaleSource.SLIDE
    assert 34 < same.cell_diameter_px < 46
    assert 68 < twice.cell_diameter_px < 92

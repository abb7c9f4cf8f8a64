"""How well a bundle names shapes: on made cells, and through the station with the toy bundle."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, draw_field
from rbc_edge.values import SHAPES, Float32, Scale, ScaleSource
from rbc_edge.vision import morphology
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train import shapes
from rbc_train.data import Photograph, ShapePoint

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"
NORMAL, TARGET, BURR = (SHAPES.index(s) for s in ("normal", "target", "burr"))


def unmeasured(n: int) -> Float32:
    return np.full((n, morphology.N_SIGNS), np.nan, np.float32)


def seen(truth: list[int], named: list[int], score: float = 0.8, fields: int = 4) -> shapes.Seen:
    n = len(truth)
    rest = (1 - score) / (len(SHAPES) - 1)
    probability = np.full((n, len(SHAPES)), rest, np.float32)
    probability[np.arange(n), named] = score
    return shapes.Seen(
        np.array(truth, np.int64), probability, unmeasured(n), np.ones(n, np.bool_), np.arange(n) % fields, n
    )


def test_figures_are_those_of_the_confusion() -> None:
    cells = seen([NORMAL] * 8 + [TARGET] * 4, [NORMAL] * 6 + [TARGET] * 2 + [TARGET] * 3 + [BURR])
    found = shapes.figures(cells, 0.5)
    assert found["accuracy"] == pytest.approx(9 / 12)
    assert found["by_shape"]["normal"]["f1"] == pytest.approx(2 * 6 / (8 + 6))
    assert found["by_shape"]["target"]["precision"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((12 / 14 + 6 / 9) / 2)  # no cell is a burr cell
    assert found["confusion"][NORMAL][TARGET] == 2
    assert np.sum(found["confusion"]) == 12
    low, high = found["accuracy_interval"]
    assert 0 <= low < 9 / 12 < high <= 1


def test_only_judged_cells_count() -> None:
    cells = seen([NORMAL, NORMAL, TARGET], [NORMAL, TARGET, TARGET])
    alone = replace(cells, judged=np.array([True, False, True]))
    assert shapes.figures(alone, 0.5)["accuracy"] == 1.0
    assert shapes.figures(alone, 0.5)["found"] == 3


def test_probabilities_that_say_too_much_are_taken_back() -> None:
    truth = [NORMAL] * 100
    named = [NORMAL] * 70 + [TARGET] * 30
    sure = seen(truth, named, score=0.97)
    factor = shapes.slope(sure)
    assert factor < 0.7
    logits = factor * np.log(sure.probability)
    after = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert after.max(axis=1).mean() == pytest.approx(0.7, abs=0.03)


def test_the_bound_leaves_nine_of_ten_right() -> None:
    doubtful, sure = seen([NORMAL] * 50, [TARGET] * 50, 0.4), seen([NORMAL] * 50, [NORMAL] * 50, 0.9)
    both = shapes.Seen(
        np.concatenate([doubtful.truth, sure.truth]),
        np.concatenate([doubtful.probability, sure.probability]),
        signs=unmeasured(100),
        judged=np.ones(100, np.bool_),
        field=np.zeros(100, np.int64),
        n_points=100,
    )
    bound = shapes.threshold(both)
    assert 0.4 < bound <= 0.9
    assert shapes.figures(both, bound)["sure"] == 0.5
    assert shapes.threshold(sure) == 0.0


def test_no_cell_has_no_figures_and_no_error() -> None:
    none = seen([], [])
    found = shapes.figures(none, 0.5)
    assert math.isnan(found["accuracy"])
    assert shapes.threshold(none) > 0.9  # nothing is known, so nothing is sure
    assert shapes.tables(found)


@pytest.fixture
def drawn(tmp_path: Path) -> Photograph:
    """A drawn field. Every cell has a point, and one point lies on glass."""
    field = draw_field(
        np.random.default_rng(1), width_px=400, height_px=300, cell_diameter_px=40.0, n_single=9,
        group_sizes=(2,), n_wbc=0, n_platelets=0, stain=CREAM,
    )  # fmt: skip
    middle = (field.xyxy[:, :2] + field.xyxy[:, 2:]) / 2
    points = [ShapePoint(float(x), float(y), "normal") for x, y in middle] + [ShapePoint(1.0, 1.0, "burr")]
    photograph = Photograph(
        tmp_path / "f.png", "f", "chula", "val", 400, 300, field.xyxy,
        np.zeros(len(field.xyxy), np.int64), np.zeros((32, 32), np.float32), complete=False,
        points=tuple(points),
    )  # fmt: skip
    cv2.imwrite(str(tmp_path / "f.png"), field.image[:, :, ::-1])
    return photograph


def test_points_meet_the_cells_that_the_station_finds(drawn: Photograph) -> None:
    analyzer = Analyzer(Bundle.open(TOY), threads=1)
    cells = shapes.look(analyzer, [drawn], scale=Scale(40.0, ScaleSource.CELL_DIAMETER))
    assert cells.n_points == len(drawn.points)
    assert 9 <= len(cells) < len(drawn.points)  # the point on glass has no cell
    assert (cells.truth == NORMAL).all()
    result = analyzer.analyze(drawn.field(40.0), Scale(40.0, ScaleSource.CELL_DIAMETER))
    named = {cell.shape for cell in result.cells}
    assert {SHAPES[i] for i in cells.named} <= named
    assert 0 < cells.judged.sum() < len(cells)


def test_a_bundle_without_shapes_sees_none(drawn: Photograph) -> None:
    opened = Bundle.open(TOY)
    plain = Analyzer(replace(opened, manifest=replace(opened.manifest, shapes=())), threads=1)
    assert len(shapes.look(plain, [drawn])) == 0


def test_measures_correct_a_network_that_cannot_see_them() -> None:
    """It calls long and round cells alike. What is measured tells them apart."""
    rng = np.random.default_rng(0)
    truth = [NORMAL, BURR] * 150
    cells = seen(truth, [NORMAL] * 300, 0.5)
    signs = rng.normal(0, 0.1, (300, morphology.N_SIGNS)).astype(np.float32)
    signs[:, 0] += np.where(cells.truth == BURR, 0.6, 0.1).astype(np.float32)
    learned = np.array(shapes.weights(replace(cells, signs=signs)), np.float64)
    assert learned.shape == (len(SHAPES) + morphology.N_SIGNS + 1, len(SHAPES))
    columns = np.concatenate([np.log(cells.probability), signs, np.ones((300, 1))], axis=1)
    assert ((columns @ learned).argmax(axis=1) == cells.truth).mean() > 0.95
    assert shapes.weights(cells) == ()  # nothing is measured

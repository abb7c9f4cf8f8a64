"""Measures of drawn cells, of which the outline is known exactly."""

import cv2
import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, GREY, ROSE, DrawnField, Form, Stain, draw_forms
from rbc_edge.values import Float32, Morphology
from rbc_edge.vision import morphology, preprocess

FORMS = [form for form in Form for _ in range(6)]


def measure(drawn: DrawnField, boxes: Float32 | None = None) -> Morphology:
    boxes = drawn.xyxy if boxes is None else boxes
    view = preprocess.view(drawn.image, drawn.cell_diameter_px)
    return morphology.measured(Morphology.unknown(len(boxes)), view, boxes, np.ones(len(boxes), np.bool_))


def true_area(drawn: DrawnField) -> Float32:
    return np.array([cv2.contourArea(outline) for outline in drawn.outlines], np.float32)


def true_aspect(drawn: DrawnField) -> Float32:
    axes = [sorted(cv2.fitEllipse(outline)[1]) for outline in drawn.outlines]
    return np.array([long / short for short, long in axes], np.float32)


@pytest.mark.parametrize("diameter_px", [24.0, 40.0, 90.0, 200.0])
@pytest.mark.parametrize("blur", [0.01, 0.035])  # of a diameter
@pytest.mark.parametrize("stain", [GREY, CREAM, ROSE])
def test_area_and_aspect_of_drawn_cells(diameter_px: float, blur: float, stain: Stain) -> None:
    rng = np.random.default_rng(7)
    drawn = draw_forms(rng, FORMS, cell_diameter_px=diameter_px, stain=stain, blur_px=blur * diameter_px)
    # The boxes of a detector are not exact.
    off = rng.normal(0, 0.02 * diameter_px, drawn.xyxy.shape).astype(np.float32)
    found = measure(drawn, drawn.xyxy + off)
    np.testing.assert_allclose(found.area_px / true_area(drawn), 1, atol=0.05)
    convex = np.array([form is not Form.BITTEN for form in drawn.forms])
    np.testing.assert_allclose(found.aspect_ratio[convex], true_aspect(drawn)[convex], atol=0.05)


def test_forms_are_told_apart() -> None:
    drawn = draw_forms(np.random.default_rng(1), FORMS)
    found = measure(drawn)

    def of(*forms: Form) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.array([form in forms for form in drawn.forms])

    assert (found.circularity[of(Form.DISC, Form.SPHERE, Form.RING, Form.TARGET)] > 0.97).all()
    assert (found.circularity[of(Form.ELLIPSE, Form.BITTEN)] < 0.92).all()
    assert (found.pallor[of(Form.SPHERE)] == 0).all()
    assert found.pallor[of(Form.DISC)].max() < found.pallor[of(Form.RING)].min()
    assert (found.pallor[of(Form.RING)] > 0.3).all()


def test_what_has_no_outline_is_not_measured_and_unwanted_cells_neither() -> None:
    drawn = draw_forms(np.random.default_rng(2), [Form.DISC] * 4)
    glass = np.full_like(drawn.image, 220)
    view = preprocess.view(glass, 60.0)
    none = morphology.measured(Morphology.unknown(4), view, drawn.xyxy, np.ones(4, np.bool_))
    assert np.isnan(none.area_px).all() and np.isnan(none.pallor).all()
    view = preprocess.view(drawn.image, 60.0)
    some = morphology.measured(Morphology.unknown(4), view, drawn.xyxy, np.array([True, False, True, False]))
    assert np.isnan(some.area_px).tolist() == [False, True, False, True]
    # A box of half the size shows a cell that reaches out of its window.
    half = np.concatenate([drawn.xyxy[:, :2], (drawn.xyxy[:, :2] + drawn.xyxy[:, 2:]) / 2], axis=1)
    assert np.isnan(measure(drawn, half).area_px).all()
    assert len(morphology.measured(Morphology.unknown(0), view, drawn.xyxy[:0], np.zeros(0, np.bool_))) == 0


def test_each_cell_is_measured_alone() -> None:
    """Windows are worked on as one picture: the neighbours there must change nothing."""
    drawn = draw_forms(np.random.default_rng(3), FORMS * 10)
    together = measure(drawn)
    view = preprocess.view(drawn.image, drawn.cell_diameter_px)
    for i in range(0, len(drawn.xyxy), 41):
        box = drawn.xyxy[i : i + 1]
        alone = morphology.measured(Morphology.unknown(1), view, box, np.ones(1, np.bool_))
        for name in ("area_px", "aspect_ratio", "circularity", "pallor"):
            np.testing.assert_allclose(getattr(alone, name)[0], getattr(together, name)[i], rtol=1e-4)


def test_it_takes_any_number_of_cells() -> None:
    drawn = draw_forms(np.random.default_rng(4), [Form.SPHERE] * 300)  # more than are measured at once
    np.testing.assert_allclose(measure(drawn).area_px / true_area(drawn), 1, atol=0.05)

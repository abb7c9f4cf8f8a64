"""The shipped bundle on drawn cells of exact form: the shares of their shapes are right."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, GREY, ROSE, Form, Stain, draw_forms
from rbc_edge.values import SHAPES, Shape
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle

NAMED = {
    Form.DISC: Shape.NORMAL,
    Form.SPHERE: Shape.SPHEROCYTE,
    Form.ELLIPSE: Shape.ELLIPTOCYTE,
    Form.RING: Shape.HYPOCHROMIC,
    Form.TARGET: Shape.TARGET,
    Form.BITTEN: Shape.SCHISTOCYTE,
}
# As on a slide: most cells are discs, so that the estimated scale is theirs.
DRAWN = {form: 24 if form is Form.DISC else 5 for form in Form}


@cache
def analyzer() -> Analyzer:
    return Analyzer(Bundle.open(), threads=1)


@pytest.mark.parametrize("stain", [GREY, CREAM, ROSE], ids=["grey", "cream", "rose"])
@pytest.mark.parametrize("diameter_px", [36.0, 60.0, 110.0])
def test_the_shares_of_drawn_shapes_are_right(stain: Stain, diameter_px: float) -> None:
    rng = np.random.default_rng(round(diameter_px))
    forms = [form for form, n in DRAWN.items() for _ in range(n)]
    rng.shuffle(forms)
    drawn = draw_forms(rng, forms, cell_diameter_px=diameter_px, stain=stain)
    result = analyzer().count_image(drawn.image)
    assert result.n_rbc == len(forms)
    form = result.cells.morphology
    n = Counter(SHAPES[i] for i in form.shape[form.shape_sure])
    # A drawn disc has a faint pallor. Without any it is a spherocyte, so these two stand together.
    round_ones = (Shape.NORMAL, Shape.SPHEROCYTE)
    assert sum(n[shape] for shape in round_ones) >= DRAWN[Form.DISC] + DRAWN[Form.SPHERE] - 8, n
    assert n[Shape.SPHEROCYTE] >= DRAWN[Form.SPHERE] - 1
    for drawn_form, shape in NAMED.items():
        if shape not in round_ones:  # one of five may be unsure, and of the discs three may be taken for it
            assert DRAWN[drawn_form] - 1 <= n[shape] <= DRAWN[drawn_form] + 3, (shape, n)

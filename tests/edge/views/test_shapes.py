"""Sizes and shapes of a slide: which cells are judged, and a drawn slide of which the truth is exact."""

import csv
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, Form, draw_forms
from rbc_edge.station.count_folder import count_folder
from rbc_edge.values import SHAPES, Shape
from rbc_edge.views import shapes
from rbc_edge.vision.quality import FLAGS, NOTES


def test_every_shape_has_a_name_and_its_own_letters_and_flags_exist() -> None:
    assert set(shapes.ICSH_NAMES) == set(shapes.LETTERS) == set(Shape)
    assert len(set(shapes.LETTERS.values())) == len(SHAPES)
    assert set(FLAGS) - NOTES >= shapes.SPOILS
    assert {"unfamiliar", "blurred", "uneven-light", "scale-mismatch"} <= shapes.SPOILS
    assert shapes.kept("target,normal,of a later version") == (Shape.NORMAL, Shape.TARGET)
    assert shapes.kept("") == ()


@pytest.mark.slow
def test_a_drawn_slide_gets_its_true_shares(toy_bundle_path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    mix = [Form.DISC] * 10 + [Form.ELLIPSE] * 4 + [Form.SPHERE] * 3 + [Form.RING] * 2 + [Form.BITTEN]
    (tmp_path / "in" / "s").mkdir(parents=True)
    for k in range(6):
        drawn = draw_forms(rng, [mix[i] for i in rng.permutation(len(mix))], cell_diameter_px=40, stain=CREAM)
        (tmp_path / "in" / "s" / f"{k}.png").write_bytes(drawn.encoded(".png"))
    count_folder(tmp_path / "in", tmp_path / "out", bundle=toy_bundle_path, um_per_px=7.5 / 40, cells=True)
    with (tmp_path / "out" / "slides.csv").open() as file:
        (slide,) = csv.DictReader(file)
    with (tmp_path / "out" / "cells" / "s.csv").open() as file:
        cells = [row for row in csv.DictReader(file) if row["area_px"]]
    assert len(cells) >= 110  # of 120: the toy bundle calls a few overlapping
    # Spheres have 0.8 of the diameter, and bitten discs have lost a part of their area.
    assert float(slide["small_share"]) == pytest.approx(3 / 20, abs=0.06)
    # Some drawn discs are as pale as hypochromic cells.
    assert 2 / 20 <= float(slide["pale_share"]) < 4 / 20
    assert np.mean([float(c["pallor"]) > 0.28 for c in cells]) == pytest.approx(2 / 20, abs=0.03)
    assert float(slide["large_share"]) == 0
    aspect, circularity = (
        np.array([float(c[name]) for c in cells]) for name in ("aspect_ratio", "circularity")
    )
    assert (aspect > 1.5).mean() == pytest.approx(4 / 20, abs=0.03)
    assert ((aspect < 1.5) & (circularity < 0.94)).mean() == pytest.approx(1 / 20, abs=0.02)
    # The mean of 40 px wide discs, and of smaller spheres, in square micrometres.
    true = np.pi / 4 * 7.5**2 * (17 + 3 * 0.64) / 20
    assert float(slide["area_mean"]) == pytest.approx(true, rel=0.03)

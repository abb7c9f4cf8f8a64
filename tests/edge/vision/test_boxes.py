"""Geometry of boxes: the image border, iou, neighbours."""

import math

import numpy as np

from rbc_edge.vision.boxes import touches_edge


def test_touches_edge_names_each_side() -> None:
    xyxy = np.array(
        [[0, 50, 20, 70], [50, 1.4, 70, 20], [180, 50, 198.6, 70], [50, 80, 70, 99], [2, 2, 198, 98]],
        np.float32,
    )
    expected = np.eye(5, 4, dtype=np.bool_)
    np.testing.assert_array_equal(touches_edge(xyxy, 200, 100, 60.0), expected)
    assert touches_edge(xyxy, 200, 100, 80.0).all(axis=1).tolist() == [False] * 4 + [True]
    assert touches_edge(np.zeros((0, 4), np.float32), 10, 10, math.nan).shape == (0, 4)


def test_an_enlarged_field_has_the_same_cells_at_its_border() -> None:
    xyxy = np.random.default_rng(0).uniform(0, 100, (200, 2)).astype(np.float32)
    xyxy = np.hstack([xyxy, xyxy + 40]).clip(0, 120)
    plain = touches_edge(xyxy, 120, 120, 40.0)
    assert 0 < plain.any(axis=1).sum() < 200
    np.testing.assert_array_equal(touches_edge(xyxy * 7, 840, 840, 280.0), plain)

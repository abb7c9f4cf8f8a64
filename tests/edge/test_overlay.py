"""The picture: every kind of cell is outlined in its colour, and the photograph stays as it was."""

import numpy as np

from rbc_edge import overlay
from rbc_edge.values import Cells, Detections


def one_cell(class_id: int, *, overlapping: bool) -> Cells:
    detections = Detections(
        np.array([[20, 30, 60, 80]], np.float32), np.ones(1, np.float32), np.array([class_id], np.int64)
    )
    score = np.array([float(overlapping) if class_id == 0 else np.nan], np.float32)
    return Cells(
        detections, score, np.array([overlapping]), np.zeros(1, np.int64), np.zeros((1, 4), np.bool_)
    )


def test_each_kind_has_its_own_outline_on_the_box() -> None:
    blank = np.full((100, 120, 3), 240, np.uint8)
    seen = set()
    for class_id, overlapping in ((0, False), (0, True), (1, False), (2, False)):
        drawn = overlay.draw(blank, one_cell(class_id, overlapping=overlapping))
        changed = (drawn != blank).any(axis=2)
        rows, columns = np.nonzero(changed)
        assert abs(columns.min() - 20) <= 3 and abs(columns.max() - 60) <= 3
        assert abs(rows.min() - 30) <= 3 and abs(rows.max() - 80) <= 3
        assert not changed[50:60, 35:45].any()  # the cell itself stays visible
        colours, counts = np.unique(drawn[changed], axis=0, return_counts=True)
        seen.add(tuple(colours[counts.argmax()].tolist()))
    assert len(seen) == 4


def test_an_overlapping_cell_is_dashed_and_a_single_one_whole() -> None:
    blank = np.full((100, 120, 3), 240, np.uint8)
    angles = np.radians(np.arange(0, 360, 2))
    x, y = np.round(40 + 20 * np.cos(angles)).astype(int), np.round(55 + 25 * np.sin(angles)).astype(int)
    whole = (overlay.draw(blank, one_cell(0, overlapping=False)) != blank).any(axis=2)[y, x]
    dashed = (overlay.draw(blank, one_cell(0, overlapping=True)) != blank).any(axis=2)[y, x]
    assert whole.mean() > 0.95
    assert 0.3 < dashed.mean() < 0.9


def test_nothing_found_draws_nothing_and_the_photograph_is_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    before = image.copy()
    assert (overlay.draw(image, Cells.empty()) == before).all()
    overlay.draw(image, one_cell(0, overlapping=True))
    assert (image == before).all()

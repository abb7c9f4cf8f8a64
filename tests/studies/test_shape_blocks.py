"""Shapes on fields that were left out: the section for readers."""

import numpy as np

from rbc_edge.values import SHAPES
from rbc_edge.vision import morphology
from rbc_train import results, shapes
from studies.shape_blocks import section


def test_the_section_shows_both_ways_to_leave_fields_out() -> None:
    n = len(SHAPES)
    nan = np.full((n, morphology.N_SIGNS), np.nan, np.float32)
    right = shapes.Seen(
        np.arange(n), np.eye(n, dtype=np.float32), nan, np.ones(n, np.bool_), np.arange(n) % 4, n
    )
    wrong = shapes.Seen(
        np.arange(n), np.roll(np.eye(n, dtype=np.float32), 1, axis=1), nan, right.judged, right.field, n
    )
    found = {name: shapes.figures(s, 0.0) for name, s in (("drawn fields", right), ("a block", wrong))}
    made = section(found, epochs=3)
    drawn, block = made.tables[0].rows
    assert drawn[:5] == ("drawn fields", "4", "13", "1.000 (1.000 to 1.000)", "1.000")
    assert block[3:5] == ("0.000 (0.000 to 0.000)", "0.000")
    assert made.name in results._SECTIONS["results"]

"""The values: checked where they are made, and cells one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbc_edge.values import (
    Cell,
    CellClass,
    Cells,
    Counts,
    Decoded,
    Detections,
    FieldOfView,
    FovResult,
    Label,
    Scale,
    ScaleSource,
)

NAN = float("nan")


def three_cells() -> Cells:
    found = Detections(
        np.array([[0, 1, 10, 11], [5, 6, 20, 30], [40, 40, 50, 50]], np.float32),
        np.array([0.5, 0.75, 1.0], np.float32),
        np.array([CellClass.RBC, CellClass.RBC, CellClass.WBC], np.int64),
    )
    edges = np.zeros((3, 4), np.bool_)
    edges[0, 0] = True
    return Cells(
        found,
        np.array([0.25, 0.875, NAN], np.float32),
        np.array([False, True, False]),
        np.array([0, 1, 1], np.int64),
        edges,
    )


def test_cells_are_iterated_in_their_order() -> None:
    cells = three_cells()
    assert list(cells) == [
        Cell((0, 1, 10, 11), Label.RBC_SINGLE, 0.5, 0.25, 0, True),
        Cell((5, 6, 20, 30), Label.RBC_OVERLAPPING, 0.75, 0.875, 1, False),
        Cell((40, 40, 50, 50), Label.WBC, 1.0, None, 1, False),
    ]
    assert cells[-1] == cells[2]
    assert [cell.shape for cell in cells] == [None] * 3
    assert list(Cells.empty()) == []
    with pytest.raises(IndexError):
        cells[3]


def test_a_result_has_the_counts_of_its_cells() -> None:
    result = FovResult(60, 60, Scale(12.0, ScaleSource.SLIDE), three_cells(), ("dark",))
    assert result.counts == Counts(1, 1, 1, 0)
    numbers = (result.n_rbc, result.n_rbc_single, result.n_rbc_overlapping, result.n_wbc, result.n_platelets)
    assert numbers == (2, 1, 1, 1, 0)
    assert result.flags == ("dark",)
    assert three_cells().counts(np.array([True, False, True])) == Counts(1, 0, 1, 0)


@given(st.lists(st.tuples(st.sampled_from(list(CellClass)), st.booleans()), max_size=30))
def test_single_and_overlapping_are_all_red_cells(kinds: list[tuple[CellClass, bool]]) -> None:
    n = len(kinds)
    class_id = np.array([c for c, _ in kinds], np.int64)
    found = Detections(np.zeros((n, 4), np.float32), np.ones(n, np.float32), class_id)
    cells = Cells(
        found,
        np.ones(n, np.float32),
        np.array([o for _, o in kinds], np.bool_),
        np.zeros(n, np.int64),
        np.zeros((n, 4), np.bool_),
    )
    counts = cells.counts()
    labels = [cell.label for cell in cells]
    assert counts.n_rbc == counts.n_rbc_single + counts.n_rbc_overlapping
    assert [labels.count(label) for label in Label] == [
        counts.n_rbc_single,
        counts.n_rbc_overlapping,
        counts.n_wbc,
        counts.n_platelets,
    ]
    assert (counts.overlap_fraction is None) == (counts.n_rbc == 0)


@given(st.integers(16, 200), st.integers(16, 200), st.sampled_from([1, 2, 4, 8]))
def test_a_reduced_image_has_the_frame_of_the_whole(width: int, height: int, reduction: int) -> None:
    pixels = np.zeros((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    decoded = Decoded(pixels, width, height, reduction)
    field = FieldOfView("s", "f", "", decoded)
    assert (field.width_px, field.height_px) == (width, height)
    for wrong in {1, 2, 4, 8} - {reduction}:
        with pytest.raises(ValueError, match="pixels: shape"):
            Decoded(pixels, width, height, wrong)
    whole = FieldOfView.of(pixels, slide_id="s", fov="f")
    assert (whole.width_px, whole.height_px) == (pixels.shape[1], pixels.shape[0])
    assert whole.image is pixels


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((20, 20), np.uint8), np.zeros((20, 20, 4), np.uint8), np.zeros((20, 20, 3), np.float32)],
)
def test_other_arrays_are_no_images(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> None:
    with pytest.raises(ValueError, match="pixels: "):
        FieldOfView.of(pixels)
    with pytest.raises(ValueError, match="pixels: "):
        Decoded(np.zeros((20, 20, 3), np.uint8), 41, 40, 2)

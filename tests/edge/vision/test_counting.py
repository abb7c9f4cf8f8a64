"""Groups and edge rules."""

import numpy as np
import pytest

from rbc_edge.values import Bool, CellClass, Cells, Detections, Float32, Int64
from rbc_edge.vision.boxes import touches_edge
from rbc_edge.vision.counting import EdgeRule, count, counted, groups

RBC, WBC, PLATELET = (int(c) for c in CellClass)


def boxes(*centre_and_size: tuple[float, float, float]) -> Float32:
    return np.array(
        [[x - s / 2, y - s / 2, x + s / 2, y + s / 2] for x, y, s in centre_and_size], np.float32
    ).reshape(-1, 4)


def cells(xyxy: Float32, class_id: list[int], overlapping: list[bool], width: int, height: int) -> Cells:
    n = len(xyxy)
    return Cells(
        Detections(xyxy, np.full(n, 0.9, np.float32), np.array(class_id, np.int64)),
        np.full(n, 0.5, np.float32),
        np.array(overlapping, np.bool_),
        np.zeros(n, np.int64),
        touches_edge(xyxy, width, height, 40.0),
    )


def grouped(xyxy: Float32, class_id: list[int], overlapping: list[bool]) -> list[int]:
    return [int(g) for g in groups(xyxy, np.array(class_id, np.int64), np.array(overlapping, np.bool_))]


def test_groups_numbers_components_in_order_of_their_first_cell() -> None:
    xyxy = boxes((300, 10, 40), (10, 10, 40), (330, 10, 40), (40, 10, 40), (500, 10, 40), (70, 10, 40))
    assert grouped(xyxy, [RBC] * 6, [True, True, True, True, False, True]) == [1, 2, 1, 2, 0, 2]


@pytest.mark.parametrize(("gap", "expected"), [(0.0, [1, 1]), (1.9, [1, 1]), (2.2, [1, 2])])
def test_groups_links_boxes_that_meet_within_five_per_cent(gap: float, expected: list[int]) -> None:
    xyxy = boxes((100, 100, 40), (140 + gap, 100, 40))
    assert grouped(xyxy, [RBC, RBC], [True, True]) == expected
    assert grouped(xyxy[:, [1, 0, 3, 2]], [RBC, RBC], [True, True]) == expected


def test_groups_lone_overlapping_cell_has_a_number_and_single_cells_never() -> None:
    xyxy = boxes((100, 100, 40), (120, 100, 40), (400, 100, 40))
    assert grouped(xyxy, [RBC] * 3, [False, True, True]) == [0, 1, 2]
    assert grouped(xyxy, [RBC] * 3, [False] * 3) == [0, 0, 0]


def test_groups_white_cell_only_next_to_an_overlapping_red_cell_and_platelets_never() -> None:
    xyxy = boxes((100, 100, 80), (150, 100, 40), (600, 100, 80), (640, 100, 80), (150, 110, 10))
    class_id = [WBC, RBC, WBC, WBC, PLATELET]
    assert grouped(xyxy, class_id, [False, True, False, False, False]) == [1, 1, 0, 0, 0]
    assert grouped(xyxy, class_id, [False] * 5) == [0] * 5


def test_groups_white_cells_pass_no_link_on_between_themselves() -> None:
    xyxy = boxes((100, 100, 40), (150, 100, 80), (220, 100, 80))
    assert grouped(xyxy, [RBC, WBC, WBC], [True, False, False]) == [1, 1, 0]


def test_groups_without_cells() -> None:
    empty = groups(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    assert empty.shape == (0,)
    assert empty.dtype == np.int64


def test_groups_agrees_with_flood_fill_on_random_fields() -> None:
    rng = np.random.default_rng(7)
    for n in (1, 2, 30, 200):
        centre, size = rng.uniform(0, 700, (n, 2)), rng.uniform(10, 70, (n, 2))
        xyxy = np.hstack([centre - size / 2, centre + size / 2]).astype(np.float32)
        class_id = rng.choice([RBC, WBC, PLATELET], n, p=[0.8, 0.1, 0.1]).astype(np.int64)
        overlapping = rng.random(n) < 0.5
        assert groups(xyxy, class_id, overlapping).tolist() == flood_fill(xyxy, class_id, overlapping)


def flood_fill(xyxy: Float32, class_id: Int64, overlapping: Bool) -> list[int]:
    n = len(xyxy)
    big = xyxy.astype(np.float64)
    grow = (big[:, 2:] - big[:, :2]) * 0.025
    big = np.hstack([big[:, :2] - grow, big[:, 2:] + grow])
    red = [bool(overlapping[i] and class_id[i] == RBC) for i in range(n)]
    member = [red[i] or class_id[i] == WBC for i in range(n)]

    def linked(i: int, j: int) -> bool:
        apart = (big[i, :2] > big[j, 2:]).any() or (big[j, :2] > big[i, 2:]).any()
        return member[i] and member[j] and (red[i] or red[j]) and not apart

    number, group = 0, [0] * n
    for seed in range(n):
        if group[seed] or not member[seed]:
            continue
        reached, todo = {seed}, [seed]
        while todo:
            i = todo.pop()
            new = {j for j in range(n) if j not in reached and linked(i, j)}
            reached |= new
            todo += new
        if any(red[i] for i in reached):
            number += 1
            for i in reached:
                group[i] = number
    return group


def test_groups_of_a_stack_of_ten_thousand_cells_is_one() -> None:
    # Every box shares the same x range: the sweep's worst case, which must neither hang nor fill the memory.
    n = 10_000
    xyxy = boxes(*((0.0, 30.0 * i, 40.0) for i in range(n)))
    order = np.random.default_rng(1).permutation(n)
    result = groups(xyxy[order], np.zeros(n, np.int64), np.ones(n, np.bool_))
    assert result.min() == result.max() == 1


def test_edge_rules_count_what_they_say() -> None:
    xyxy = boxes((5, 50, 10), (50, 5, 10), (195, 50, 10), (50, 95, 10), (100, 50, 10))
    field = cells(xyxy, [RBC, WBC, RBC, PLATELET, RBC], [True, False, False, False, True], 200, 100)
    assert counted(field, EdgeRule.ALL).tolist() == [True] * 5
    assert counted(field, EdgeRule.TWO_SIDES).tolist() == [True, True, False, False, True]
    assert counted(field, EdgeRule.INSIDE).tolist() == [False, False, False, False, True]
    all_cells = count(field)
    assert (all_cells.n_rbc, all_cells.n_rbc_single, all_cells.n_rbc_overlapping) == (3, 1, 2)
    assert (all_cells.n_wbc, all_cells.n_platelets) == (1, 1)
    two_sides = count(field, EdgeRule.TWO_SIDES)
    assert (two_sides.n_rbc, two_sides.n_wbc, two_sides.n_platelets) == (2, 1, 0)
    assert count(Cells.empty(), EdgeRule.INSIDE).overlap_fraction is None

import math

import numpy as np
import pytest

from rbc_edge.values import Bool, CellClass, Cells, Detections, Float32, Int64
from rbc_edge.vision.boxes import touches_edge
from rbc_edge.vision.counting import EdgeRule, count, counted, groups
from rbc_edge.vision.statistics import LIKENESS, fields_needed, overlap_interval, says_little

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


def test_groups_white_cell_only_beside_an_overlapping_red_cell_and_platelets_never() -> None:
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


def interval(n_overlapping: list[int], n_rbc: list[int]) -> tuple[float, float]:
    result = overlap_interval(np.array(n_overlapping, np.int64), np.array(n_rbc, np.int64))
    assert result is not None
    return result


def test_overlap_interval_of_independent_cells_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, score method without correction.
    # A cell a field: nothing for cells to resemble but each other's absence. The spread is that of chance,
    # and so many fields that Student t is the normal.
    low, high = interval([1] * 81 + [0] * 182, [1] * 263)
    assert 0.2553 - 0.002 < low <= 0.2553 and 0.3662 <= high < 0.3662 + 0.002


def test_overlap_interval_of_one_field_knows_that_its_cells_are_alike() -> None:
    effect = 1 + (263 - 1) * LIKENESS
    n, p, z = 263 / effect, 81 / 263, 1.96
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low, high = interval([81], [263])
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert low < 0.12 and high > 0.55  # of one field, however many cells it shows, one cannot say much
    assert interval([0], [20])[0] == 0.0
    assert interval([20], [20])[1] == 1.0


def test_overlap_interval_without_any_overlap_is_no_certainty() -> None:
    low, high = interval([0, 0, 0], [20, 20, 20])
    assert low == 0.0
    assert 0.1 < high < 0.3  # independent cells would say 0.06
    assert interval([20, 20, 20], [20, 20, 20])[0] == pytest.approx(1 - high)
    assert interval([0] * 30, [20] * 30)[1] < 0.04


def test_overlap_interval_widens_with_the_spread_between_fields() -> None:
    alike = interval([20, 20, 20, 20], [100, 100, 100, 100])
    spread = interval([0, 40, 5, 35], [100, 100, 100, 100])
    # Never narrower than 400 independent cells (Wilson).
    assert alike[0] == pytest.approx(0.1637, abs=1e-4)
    assert alike[1] == pytest.approx(0.2420, abs=1e-4)
    assert spread[0] < alike[0] < 0.2 < alike[1] < spread[1]


def needed(n_overlapping: list[int], n_rbc: list[int], half_width: float = 0.02) -> int | None:
    return fields_needed(np.array(n_overlapping, np.int64), np.array(n_rbc, np.int64), half_width=half_width)


@pytest.mark.parametrize("n_fields", [1, 2, 4, 12])
def test_with_the_fields_that_were_needed_the_interval_is_as_narrow_as_asked(n_fields: int) -> None:
    """When the fields to come are just like those that are there: they come again and again."""
    rng = np.random.default_rng(n_fields)
    n_rbc = rng.poisson(40, n_fields)
    n_overlapping = rng.binomial(n_rbc, rng.beta(3, 4, n_fields))
    more = needed(n_overlapping.tolist(), n_rbc.tolist())
    assert more is not None and more > 0
    again = np.arange(n_fields + more) % n_fields
    if n_fields > 1:
        low, high = interval(n_overlapping[again].tolist(), n_rbc[again].tolist())
        # Drawn again and again the spread looks smaller by F / (F - 1).
        assert (high - low) / 2 == pytest.approx(0.02 * np.sqrt((n_fields - 1) / n_fields), rel=0.1)
    fewer = needed(n_overlapping.tolist(), n_rbc.tolist(), 0.04)
    assert fewer is not None and fewer < more / 2


def test_no_more_fields_are_needed_when_there_are_enough_and_nobody_knows_without_cells() -> None:
    assert needed([20, 21, 19, 20] * 100, [40] * 400) == 0
    assert needed([], []) is None
    assert needed([0], [0]) is None
    some = needed([0, 0], [20, 20])
    assert some is not None and 10 < some < 100


def test_what_says_little() -> None:
    assert says_little(None)
    assert says_little(interval([3], [12]))
    assert not says_little(interval([10, 12, 11, 9, 10, 11] * 10, [40] * 60))


def test_overlap_interval_without_red_cells_is_unknown() -> None:
    assert overlap_interval(np.zeros(3, np.int64), np.zeros(3, np.int64)) is None
    assert overlap_interval(np.zeros(0, np.int64), np.zeros(0, np.int64)) is None


@pytest.mark.parametrize("n_fields", [1, 2, 3, 10, 40])
def test_overlap_interval_covers_the_truth_about_95_times_in_a_hundred(n_fields: int) -> None:
    rng = np.random.default_rng(n_fields)
    truth, tries, hits = 0.25, 400, 0
    for _ in range(tries):
        n_rbc = rng.poisson(60, n_fields)
        fraction = rng.beta(truth * 12, (1 - truth) * 12, n_fields)  # fields differ more than chance
        low, high = interval(rng.binomial(n_rbc, fraction).tolist(), n_rbc.tolist())
        hits += low <= truth <= high
    assert 0.91 <= hits / tries <= (0.995 if n_fields > 2 else 1)

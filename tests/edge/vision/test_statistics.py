"""Statistics over fields of view: the overlap interval and the fields to add."""

import numpy as np
import pytest

from rbc_edge.vision.statistics import LIKENESS, fields_needed, mean_interval, overlap_interval, says_little


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


def test_no_more_fields_are_needed_when_there_are_enough_and_none_are_known_without_cells() -> None:
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


def test_interval_of_the_mean_is_students() -> None:
    counts = np.array([31, 12, 55, 40, 22], np.int64)
    half = 2.7764 * counts.std(ddof=1) / np.sqrt(5)
    assert mean_interval(counts) == pytest.approx((32 - half, 32 + half), abs=1e-3)
    assert mean_interval(counts[:1]) is None
    assert mean_interval(counts[:0]) is None


def test_interval_of_the_mean_is_not_certain_by_chance() -> None:
    low, high = mean_interval(np.array([20, 20, 20], np.int64)) or (0, 0)
    assert low < 16 and high > 24  # three fields of cells that lie at random: 60 +- 15
    low, high = mean_interval(np.zeros(5, np.int64)) or (0, 0)
    assert low == 0 and 0.5 < high < 1


@pytest.mark.parametrize("n_fields", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("size", [3, 20, np.inf])  # of the negative binomial: uneven, as in smears, at random
def test_interval_of_the_mean_holds_the_mean_of_the_slide(n_fields: int, size: float) -> None:
    rng, mean = np.random.default_rng(1), 25.0
    rates = (
        rng.gamma(size, mean / size, (2000, n_fields)) if size < np.inf else np.full((2000, n_fields), mean)
    )
    found = [mean_interval(counts) or (0, 0) for counts in rng.poisson(rates)]
    assert np.mean([low <= mean <= high for low, high in found]) > 0.92

import json
from math import inf

import pytest

from bench.figures import Sample, Spread, plain, rates, ratio, table, targets


def sample(n: int, wall_s: float, one_s: float = 0.0) -> Sample:
    return Sample(n, wall_s, one_s, 20.0 * n, 100.0)


def test_the_start_is_taken_off() -> None:
    assert rates([sample(101, 6.0, 1.0)]) == [20.0]
    assert sample(101, 6.0, 1.0).per_s_with_start == pytest.approx(101 / 6)


def test_the_middle_start_of_all_rounds_is_taken_off() -> None:
    assert rates([sample(11, 2.0, 1.0), sample(11, 6.0, 5.0), sample(11, 3.0, 0.9)]) == [10.0, 2.0, 5.0]


def test_a_side_without_a_start_has_nothing_taken_off() -> None:
    assert rates([sample(100, 2.0), sample(100, 4.0)]) == [50.0, 25.0]


def test_a_run_no_longer_than_its_start_is_no_number() -> None:
    (rate,) = rates([sample(3, 1.0, 1.1)])
    assert rate == inf
    assert plain({"rate": rate}) == {"rate": None}


def test_ratios_are_taken_round_by_round() -> None:
    # The machine was half as fast in the second round, for both.
    ours, theirs = [sample(11, 2.0), sample(11, 4.0)], [sample(11, 10.0), sample(11, 20.0)]
    assert ratio(ours, theirs) == Spread(5.0, 5.0, 5.0, 2)


def test_targets_say_yes_no_and_not_measured() -> None:
    rows = [
        {"n": n, "run_ms": ms, "add_ledger_ms": 1.0, "add_tables_ms": ms}
        for n, ms in ((100, 9.0), (1000, 1.0), (100_000, 2.0))
    ]
    told = {
        t.name: t
        for t in targets(
            {
                "over": {
                    "yolo PyTorch 640": Spread(21.0, 19.0, 22.0, 3),
                    "yolo ONNX 640": Spread(9.0, 9.0, 9.0, 3),
                },
                "floor": Spread(1.2, 1.1, 1.3, 3),
                "rss_mb": 161.0,
                "images": rows,
            }
        )
    }
    assert told["fields/s against yolo PyTorch 640"].reached is True
    assert told["fields/s against yolo ONNX 640"].reached is False
    assert told["fields/s against yolo PyTorch 256"].reached is None
    assert told["time a field against the floor"].reached is True
    assert told["peak RSS, fields"].reached is False
    assert told["peak RSS, 20 megapixels"].measured == "not measured"
    assert told["cost of an image in a run"].reached is False
    assert told["cost of an image in a run"].measured.startswith("2.00 times")
    assert told["ledger and CSV of an image more"].reached is False
    assert told["accuracy given up for speed"].reached is None


def test_the_smallest_run_is_not_what_others_are_held_against() -> None:
    rows = [{"n": 100, "run_ms": 0.1}, {"n": 1000, "run_ms": 1.0}, {"n": 10_000, "run_ms": 1.2}]
    by_name = {
        t.name: t for t in targets({"images": [r | {"add_ledger_ms": 1, "add_tables_ms": 1} for r in rows]})
    }
    assert by_name["cost of an image in a run"].reached is True


def test_a_table_lines_up() -> None:
    assert (
        table(("a", "n"), [("long name", "1"), ("x", "12.5")])
        == "a             n\nlong name     1\nx          12.5"
    )


def test_figures_become_json() -> None:
    told = plain({("a", 1): Spread.of([1.0, 3.0, 2.0]), "t": targets({})[0], "s": [sample(2, 1.0)]})
    assert json.loads(json.dumps(told))["('a', 1)"] == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}

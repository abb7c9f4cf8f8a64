"""Scoring: figures from examined photographs by hand, and the toy bundle run as the station runs it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_data import TinyData

from rbc_edge.values import CellClass, Cells, Detections, Float32, FovResult, Scale, ScaleSource
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.boxes import touches_edge
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import groups
from rbc_edge.vision.detector import suppress
from rbc_train import evaluate, results
from rbc_train.data import Negative, Photograph, read_public
from rbc_train.evaluate import Examined, ScaleMode

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


def lattice(n: int, *, first: int = 0) -> Float32:
    """n boxes of 20 px that do not overlap."""
    x0 = (np.arange(first, first + n) % 10) * 30.0 + 5
    y0 = (np.arange(first, first + n) // 10) * 30.0 + 5
    return np.stack([x0, y0, x0 + 20, y0 + 20], axis=1).astype(np.float32)


def examined(
    truth: Float32,
    found: Float32,
    score: list[float],
    *,
    source: str = "pbc",
    overlapping: list[bool] | None = None,
    found_score: list[float] | None = None,
    letter: str = "",
    least: float = 0.25,
) -> Examined:
    """A photograph of red cells; `found` down to any score, of which those over `least` are counted."""
    verdicts = np.array(overlapping or [], np.bool_)
    scores = np.array(found_score or [], np.float32)
    ranked = Detections(found, np.array(score, np.float32), np.zeros(len(found), np.int64))
    counted = ranked.take(ranked.score >= least)
    none = np.zeros(len(counted), np.bool_)
    cells = Cells(
        counted,
        np.zeros(len(counted), np.float32),
        none,
        groups(counted.xyxy, counted.class_id, none),
        touches_edge(counted.xyxy, 400, 400, 40.0),
    )
    thumbnail = np.zeros((32, 32), np.float32)
    return Examined(
        Photograph(
            Path("x.jpg"), "x", source, "val", 400, 400, truth, np.zeros(len(truth), np.int64), thumbnail
        ),
        FovResult(400, 400, Scale(20.0, ScaleSource.CELL_DIAMETER), cells),
        ranked,
        np.nan_to_num(scores, nan=0.5),
        scores,
        verdicts,
        tuple(letter or "O" * len(verdicts)),
    )


def test_a_perfect_station_gets_perfect_figures() -> None:
    boxes = lattice(12)
    one = examined(
        boxes, boxes, [0.9] * 12, overlapping=[True, False, True], found_score=[0.9, 0.2, 0.8], letter="OST"
    )
    figures = evaluate.score([one], 0.5)
    assert set(figures) == {"all", "pbc"}
    f = figures["all"]
    assert f["rbc_ap50"] == f["rbc_ap50_95"] == f["map50"] == 1.0
    assert f["rbc_count_ratio"] == f["rbc_precision"] == f["rbc_recall"] == 1.0
    assert f["rbc_field_error_median"] == 0.0
    assert math.isnan(f["wbc_ap50"])  # none labelled: neither good nor bad
    v = f["overlap_on_found_boxes"]
    assert (v["n"], v["accuracy"], v["auc"], v["recall_over"], v["recall_touching"]) == (
        3,
        1.0,
        1.0,
        1.0,
        1.0,
    )
    assert math.isnan(v["recall_several"])


def test_cells_that_the_border_cuts_are_counted_apart() -> None:
    inside = np.array([[50, 50, 70, 70], [100, 50, 120, 70]], np.float32)
    cut = np.array([[0, 50, 20, 70], [398, 50, 400, 70]], np.float32)
    # One sliver is missed, one whole cell is seen that nobody labelled.
    more = np.array([[200, 200, 220, 220]], np.float32)
    f = evaluate.score(
        [examined(np.concatenate([inside, cut]), np.concatenate([inside, cut[:1], more]), [0.9] * 4)], 0.5
    )["all"]
    assert (f["rbc_labelled"], f["rbc_counted"]) == (4, 4)
    assert (f["rbc_whole_labelled"], f["rbc_whole_counted"]) == (2, 3)
    assert f["rbc_whole_field_error_median"] == 0.5


def test_misses_and_false_cells_cost_what_they_should() -> None:
    truth = lattice(10)
    found = np.concatenate([truth[:8], lattice(4, first=50)])
    f = evaluate.score([examined(truth, found, [0.9] * 8 + [0.3, 0.3, 0.1, 0.1])], 0.5)["all"]
    assert (f["rbc_labelled"], f["rbc_counted"]) == (10, 10)  # 8 + 2 over the threshold
    assert f["rbc_precision"] == pytest.approx(0.8)
    assert f["rbc_recall"] == pytest.approx(0.8)
    assert f["rbc_ap50"] == pytest.approx(81 / 101)  # recall to 0.8 at precision 1, nothing beyond


def test_a_box_that_is_half_off_counts_at_50_and_not_at_95() -> None:
    truth = lattice(4)
    shifted = truth + np.array([5, 0, 5, 0], np.float32)  # iou 15 / 25
    f = evaluate.score([examined(truth, shifted, [0.9] * 4)], 0.5)["all"]
    assert f["rbc_ap50"] == 1.0
    assert f["rbc_ap50_95"] == pytest.approx(0.3)  # 0.50, 0.55 and 0.60 of ten


def test_sources_are_told_apart() -> None:
    good, bad = lattice(5), lattice(5, first=50)
    figures = evaluate.score(
        [examined(good, good, [0.9] * 5, source="a"), examined(good, bad, [0.9] * 5, source="b")], 0.5
    )
    assert (figures["a"]["rbc_ap50"], figures["b"]["rbc_ap50"]) == (1.0, 0.0)
    assert 0.2 < figures["all"]["rbc_ap50"] < 0.8
    assert figures["all"]["photographs"] == 2


def test_a_label_without_a_detection_is_said_and_judged_by_its_own_crop() -> None:
    one = examined(
        lattice(2), lattice(2), [0.9] * 2, overlapping=[True, False], found_score=[math.nan, 0.1], letter="OS"
    )
    f = evaluate.score([one], 0.5)["all"]
    assert f["overlap_labels_not_found"] == 1
    assert f["overlap_on_found_boxes"]["n"] == 1
    assert f["overlap_on_labelled_boxes"]["n"] == 2
    assert f["overlap_on_labelled_boxes"]["accuracy"] == 1.0


def test_a_counter_that_judges_only_what_it_finds_has_no_verdicts_on_labelled_boxes() -> None:
    one = examined(lattice(2), lattice(2), [0.9] * 2, overlapping=[True, False], found_score=[0.9, 0.1])
    one.label_score[:] = math.nan
    f = evaluate.score([one], 0.5)["all"]
    assert f["overlap_on_labelled_boxes"]["n"] == 0
    assert math.isnan(f["overlap_on_labelled_boxes"]["accuracy"])
    assert f["overlap_on_found_boxes"]["accuracy"] == 1.0


def test_counts_and_precision_of_every_class() -> None:
    truth = lattice(10)
    one = examined(truth, truth[:8], [0.9] * 8)
    two = examined(truth, lattice(12), [0.9] * 12)
    two.photograph.class_id[:4] = 1  # four white cells, all called red
    f = evaluate.score([one, two], 0.5)["all"]
    assert (f["rbc_labelled"], f["rbc_counted"], f["wbc_labelled"], f["wbc_counted"]) == (16, 20, 4, 0)
    assert (f["rbc_precision"], f["rbc_recall"]) == (14 / 20, 14 / 16)
    assert math.isnan(f["wbc_precision"]) and f["wbc_recall"] == 0.0
    assert math.isnan(f["platelet_recall"])
    assert f["rbc_bias"] == 2.0  # -2 and +6
    assert f["rbc_limit_high"] == pytest.approx(2 + 1.96 * math.sqrt(32))
    assert f["rbc_field_error_median"] == pytest.approx((0.2 + 1.0) / 2)


def test_crowded_fields_are_told_from_sparse_ones() -> None:
    """Eight fields, in the k-th of which 2 k of 20 cells lie over another; the crowded ones miss cells."""
    entries = []
    for k in range(8):
        boxes = lattice(20)
        boxes[1 : 2 * k : 2] = boxes[0 : 2 * k : 2] + 5  # iou 0.39
        assert evaluate.crowding(examined(boxes, boxes, [0.9] * 20).photograph) == pytest.approx(2 * k / 20)
        entries.append(examined(boxes, boxes[: 20 - k], [0.9] * (20 - k)))
    parts = evaluate.score(entries, 0.5)["all"]["rbc_by_crowding"]
    assert [p["photographs"] for p in parts] == [2, 2, 2, 2]
    assert [p["from"] for p in parts] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert [p["counted"] for p in parts] == [39, 35, 31, 27]
    none = examined(lattice(0), lattice(0), [])
    assert math.isnan(evaluate.crowding(none.photograph))
    assert evaluate.score([none], 0.5)["all"]["rbc_by_crowding"] == []


def test_intervals_resample_photographs_and_not_cells() -> None:
    """Cells of a photograph are all right or all wrong: what varies is which photographs were taken."""
    rng = np.random.default_rng(0)
    entries = []
    for i in range(40):
        truth = lattice(10)
        label = [bool(b) for b in rng.uniform(size=10) < 0.5]
        score = [0.9 if b == (i % 4 > 0) else 0.1 for b in label]
        entries.append(
            examined(
                truth, truth[: 8 + i % 5], [0.9] * min(10, 8 + i % 5), overlapping=label, found_score=score
            )
        )
    figures = evaluate.score(entries, 0.5)["all"]
    found = evaluate.intervals(entries, 0.5, draws=400)
    assert set(found) == {"all", "pbc"} and found["all"] == found["pbc"]
    assert evaluate.intervals(entries, 0.5, draws=400) == found  # seeded
    low, high = found["all"]["accuracy"]
    assert figures["overlap_on_found_boxes"]["accuracy"] == 0.75
    # Of 40 photographs: sd 0.068. Of 400 cells it would be 0.022.
    assert low == pytest.approx(0.75 - 1.96 * 0.068, abs=0.03)
    assert high == pytest.approx(0.75 + 1.96 * 0.068, abs=0.03)
    for name in ("rbc_ap50", "rbc_ap50_95", "rbc_count_ratio", "rbc_field_error_median"):
        low, high = found["all"][name]
        assert low <= figures[name] <= high
        assert low < high
    assert all(math.isnan(v) for v in found["all"]["wbc_ap50"])


def test_a_red_cell_under_its_threshold_may_suppress_a_platelet_over_its() -> None:
    """Why the photographs are looked at twice: the tail's boxes over the thresholds are not the station's."""
    both = Detections(
        np.array([[0, 0, 20, 20], [0, 0, 20, 21]], np.float32),
        np.array([0.40, 0.30], np.float32),
        np.array([CellClass.RBC, CellClass.PLATELET]),
    )
    least = np.array([0.465, 0.36, 0.22], np.float32)
    iou = np.array([0.65, 0.6, 0.5], np.float32)
    station = both.take(both.score >= least[both.class_id])
    station = station.take(suppress(station, iou, 0.7))
    tail = both.take(suppress(both, iou, 0.7))
    tail = tail.take(tail.score >= least[tail.class_id])
    assert (len(station), len(tail)) == (1, 0)


def test_refused_are_the_red_cells_that_the_station_does_not_show() -> None:
    detected = Detections(lattice(4), np.full(4, 0.9, np.float32), np.array([0, 0, 1, 0]))
    kept = detected.take(np.array([False, True, False, True]))
    np.testing.assert_array_equal(evaluate.missing_boxes(detected, kept), lattice(1))
    assert evaluate.missing_boxes(Detections.empty(), Detections.empty()).shape == (0, 4)


def test_the_score_threshold_makes_counts_unbiased() -> None:
    truth = lattice(20)
    found = np.concatenate([truth, lattice(20, first=50)])
    scores = [*np.linspace(0.6, 0.9, 20).tolist(), *np.linspace(0.1, 0.4, 20).tolist()]
    chosen = evaluate.score_thresholds([examined(truth, found, scores)])
    assert 0.4 < chosen[0] <= 0.6
    counted = sum(s >= chosen[0] for s in scores)
    assert counted == 20


def test_every_laboratory_weighs_the_same() -> None:
    """A hundred cells of one laboratory, whose two cameras are not two, do not outvote twenty of another."""
    many, few = lattice(100), lattice(20)
    wants_high = [
        examined(many, np.concatenate([many, many]), [0.8] * 100 + [0.5] * 100, source=s)
        for s in ("bccd", "bcd")
    ]
    wants_low = examined(few, few, [0.3] * 20, source="b")
    chosen = evaluate.score_thresholds([*wants_high, wants_low])[0]
    assert 0.3 < chosen <= 0.5  # ratios 2 and 0, mean 1; by cells or cameras it would lie over 0.5


def test_false_white_cells_of_a_laboratory_without_any_raise_the_threshold() -> None:
    """Five right ones at 0.3 and a false one at 0.2; elsewhere eight false ones at 0.25."""
    here = examined(lattice(15), lattice(6, first=10), [0.3] * 5 + [0.2])
    here.photograph.class_id[10:] = CellClass.WBC
    there = examined(lattice(10), lattice(8, first=50), [0.25] * 8, source="chula")
    for e in (here, there):
        e.ranked.class_id[:] = CellClass.WBC
    assert evaluate.score_thresholds([here])[1] < 0.25
    assert 0.25 < evaluate.score_thresholds([here, there])[1] <= 0.3


@pytest.mark.parametrize("class_id", [1, 2])
def test_other_cells_get_the_threshold_of_the_best_f1(class_id: int) -> None:
    """Hits at 0.6 and over, false ones at 0.4 and under."""
    truth = lattice(6)
    found = np.concatenate([truth, lattice(6, first=50)])
    one = examined(truth, found, [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    one.photograph.class_id[:] = class_id
    one.ranked.class_id[:] = class_id
    assert 0.4 < evaluate.score_thresholds([one])[class_id] <= 0.6


def test_a_class_that_no_photograph_shows_keeps_a_usual_threshold() -> None:
    one = examined(lattice(20), lattice(20), [0.9] * 20)
    assert evaluate.score_thresholds([one])[1:] == (0.25, 0.25)
    one.photograph.class_id[:] = 1
    assert evaluate.score_thresholds([one])[0] == 0.25


def test_the_overlap_threshold_is_the_middle_of_the_best() -> None:
    one = examined(
        lattice(1), lattice(1), [0.9],
        overlapping=[False] * 5 + [True] * 5,
        found_score=[0.1, 0.2, 0.25, 0.3, 0.35, 0.61, 0.7, 0.8, 0.9, 0.99],
    )  # fmt: skip
    assert 0.37 < evaluate.best_overlap_threshold([one]) < 0.6


def test_the_overlap_threshold_counts_as_the_labels_do_before_it_is_accurate() -> None:
    # To 0.4, 200 singles too many are called overlapping, from 0.6, 200 too few; between them both err.
    one = examined(
        lattice(1), lattice(1), [0.9],
        overlapping=[False] * 5000 + [True] * 5000,
        found_score=[0.1] * 4800 + [0.6] * 200 + [0.9] * 4800 + [0.4] * 200,
    )  # fmt: skip
    assert 0.43 <= evaluate.best_overlap_threshold([one]) <= 0.57


def test_the_worst_laboratory_decides_the_overlap_threshold() -> None:
    """A thousand cells are unbiased and most accurate under 0.5, forty of another laboratory around 0.7."""
    many = examined(
        lattice(1), lattice(1), [0.9], source="a",
        overlapping=[False] * 500 + [True] * 500, found_score=[0.1] * 500 + [0.5] * 20 + [0.9] * 480,
    )  # fmt: skip
    few = examined(
        lattice(1), lattice(1), [0.9], source="b",
        overlapping=[False] * 20 + [True] * 20, found_score=[0.1] * 15 + [0.62] * 5 + [0.9] * 20,
    )  # fmt: skip
    assert evaluate.best_overlap_threshold([many]) < 0.5
    # Off by 0 and 12.5 points under 0.5, by 2 and 0 over 0.62. By cells the former would win.
    assert evaluate.best_overlap_threshold([many, few]) > 0.62


def test_of_thresholds_as_unbiased_the_most_accurate_is_taken() -> None:
    """From 0.4 to 0.6 as many cells are called wrongly in each direction, over 0.6 none."""
    one = examined(
        lattice(1), lattice(1), [0.9],
        overlapping=[False] * 50 + [True] * 50,
        found_score=[0.1] * 45 + [0.6] * 5 + [0.9] * 45 + [0.4] * 5,
    )  # fmt: skip
    other = examined(
        lattice(1), lattice(1), [0.9], source="b",
        overlapping=[False] * 50 + [True] * 50, found_score=[0.1] * 50 + [0.7] * 50,
    )  # fmt: skip
    assert 0.4 < evaluate.best_overlap_threshold([one, other]) < 0.6


def test_without_overlap_labels_the_threshold_is_a_half() -> None:
    assert evaluate.best_overlap_threshold([examined(lattice(1), lattice(1), [0.9])]) == 0.5


def test_calibration_weighs_every_laboratory_the_same() -> None:
    """Of score 0.5, a tenth of one laboratory's cells overlap and nine tenths of another's."""
    rare = examined(lattice(1), lattice(1), [0.9], source="a", overlapping=[True] * 30 + [False] * 270,
                    found_score=[0.5] * 300)  # fmt: skip
    usual = examined(lattice(1), lattice(1), [0.9], source="b", overlapping=[True] * 9 + [False],
                     found_score=[0.5] * 10)  # fmt: skip
    a, b = evaluate.platt([rare])
    assert b == pytest.approx(math.log(1 / 9), abs=0.05)
    a, b = evaluate.platt([rare, usual])
    assert a == 1.0  # all scores are alike: there is no slope to see
    assert b == pytest.approx(0.0, abs=0.05)
    assert evaluate.platt([examined(lattice(1), lattice(1), [0.9])]) == (1.0, 0.0)


def refused(*high: int, of: int) -> Float32:
    """Refuse scores of `of` red cells, all 0.01 but those at high[0] hundredths, high[1], ..."""
    return np.array([h / 100 for h in high] + [0.01] * (of - len(high)), np.float32)


def test_the_refuse_threshold_spares_the_red_cells_of_every_laboratory() -> None:
    negatives = {"a": np.array([0.2, 0.9], np.float32), "c": np.array([0.99], np.float32)}
    # One in a hundred may go: the threshold lies just over the second highest.
    found = evaluate.refuse_threshold({"a": refused(90, 80, of=100)}, negatives)
    assert found.threshold == pytest.approx(0.805)
    assert found.cells == {"a": 0.01}
    assert found.negatives == {"a": 0.5, "c": 1.0}
    # The mean of two laboratories is 1 %, but 2 % of the one are too many.
    found = evaluate.refuse_threshold({"a": refused(90, 80, of=100), "b": refused(of=100)}, {})
    assert found.threshold == pytest.approx(0.805)
    # 1.33 % of each are within the bound of the worst, and not within that of the mean.
    both = {name: refused(90, 80, 70, 60, of=300) for name in "ab"}
    assert evaluate.refuse_threshold(both, {}).threshold == pytest.approx(0.605)
    both["b"] = refused(of=300)
    assert evaluate.refuse_threshold(both, {}).threshold == evaluate.REFUSE_CANDIDATES[0]


def test_nothing_is_refused_where_no_threshold_spares_the_cells() -> None:
    found = evaluate.refuse_threshold({"a": refused(*[100] * 5, of=10)}, {})
    assert (found.threshold, found.cells) == (1.0, {"a": 0.5})  # said, and not hidden
    assert evaluate.refuse_threshold({"a": refused(of=0)}, {}).threshold == 1.0


def test_refusal_is_chosen_by_found_cells_and_labelled_negatives() -> None:
    """Of ten red boxes found, eight have a label; one white cell and one empty box are known."""
    truth = lattice(9)
    one = examined(truth, np.concatenate([truth[:8], lattice(2, first=50)]), [0.9] * 10, source="chula")
    one.photograph.class_id[8] = CellClass.WBC
    empty = (Negative((300.0, 300.0, 320.0, 320.0), "nothing", "N"),)
    one = replace(one, photograph=replace(one.photograph, negatives=empty))
    cells, negatives = evaluate.refuse_scores([one], lambda _e, boxes: boxes[:, 0])
    np.testing.assert_array_equal(cells["chula"], truth[:8, 0])
    np.testing.assert_array_equal(negatives["chula"], [truth[8, 0], 300])
    sure, _ = evaluate.refuse_scores([one], lambda _e, boxes: boxes[:, 0], sure_score=0.9)
    assert sure["chula"].shape == (8,) and not sure["chula"].any()  # no score refuses these


@pytest.mark.parametrize("scale", ["estimated", "labelled"])
def test_the_toy_bundle_on_drawn_photographs(data: TinyData, scale: ScaleMode) -> None:
    photographs = read_public(data.folder)[0].photographs
    seen: list[tuple[int, int]] = []
    entries = evaluate.examine(
        Analyzer(Bundle.open(TOY), threads=1),
        photographs,
        data.verified(),
        scale=scale,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 7) for i in range(1, 8)]
    expected = ScaleSource.SLIDE if scale == "estimated" else ScaleSource.CELL_DIAMETER
    for entry, photograph in zip(entries, photographs, strict=True):
        assert entry.photograph is photograph
        assert entry.result.scale.source in (expected, ScaleSource.FIELD)
        assert len(entry.overlapping) == data.drawn[photograph.name].counts.n_rbc
        assert int(entry.overlapping.sum()) == data.drawn[photograph.name].counts.n_rbc_overlapping
        assert len(entry.ranked) >= len(entry.result.cells)
        assert len(entry.refused) == 0
    figures = evaluate.score(entries, 0.5)
    # The toy is no good model; a mix-up of photographs, labels or frames would leave nothing of these.
    assert figures["all"]["rbc_ap50"] > 0.6
    assert 0.7 < figures["all"]["rbc_count_ratio"] < 1.3
    assert figures["all"]["overlap_on_labelled_boxes"]["auc"] > 0.8
    text = evaluate.table(figures)
    assert [line.split()[0] for line in text.splitlines()] == ["source", "all", "pbc"]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    json.dumps(results.plain(figures), allow_nan=False)

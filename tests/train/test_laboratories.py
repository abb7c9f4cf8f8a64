"""Figures by laboratory and by shape, from examined fields by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import rbc_train
from test_evaluate import examined, lattice
from tiny_data import TinyData, add_chula

from rbc_edge.values import CellClass
from rbc_train import laboratories, results
from rbc_train.data import ShapePoint
from rbc_train.evaluate import Examined
from rbc_train.labels import VerifiedLabel, VerifiedName

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


def flagged(one: Examined) -> Examined:
    return replace(one, result=replace(one.result, quality_flags=("blurred",)))


def test_bccd_and_bcd_are_one_laboratory() -> None:
    boxes = lattice(3)
    group = [examined(boxes, boxes, [0.9] * 3, source=s) for s in ("bccd", "bcd", "raabin", "chula", "pbc")]
    found = laboratories.figures(group, 0.5)
    assert list(found) == ["all", "bccd+bcd", "chula", "pbc", "raabin"]
    assert [f["fields"] for f in found.values()] == [5, 2, 1, 1, 1]


def test_a_field_without_complete_boxes_is_in_no_figure() -> None:
    one = examined(lattice(10), lattice(10), [0.9] * 10)
    other = replace(one, photograph=replace(one.photograph, complete=False, source="chula"))
    assert list(laboratories.figures([one, other], 0.5)) == ["all", "pbc"]


def test_red_cells_of_a_laboratory() -> None:
    truth = lattice(20)
    entries = [
        examined(truth, np.concatenate([truth[:18], lattice(4, first=50)]), [0.9] * 22),
        examined(truth, truth, [0.9] * 20),
    ]
    f = laboratories.figures(entries, 0.5)["pbc"]
    assert (f["labelled"], f["counted"]) == (40, 42)
    assert (f["recall"], f["precision"]) == (38 / 40, 38 / 42)
    assert f["f1"] == pytest.approx(76 / 82)
    assert f["count_bias"] == pytest.approx(0.05)
    assert f["field_error_median"] == pytest.approx(0.05)


def test_a_wrong_field_is_silent_without_a_flag_and_a_right_one_with_it_a_false_alarm() -> None:
    truth = lattice(20)
    wrong, right = (examined(truth, truth[:n], [0.9] * n) for n in (16, 18))
    entries = [wrong, flagged(wrong), right, right, right, flagged(right)]
    f = laboratories.figures(entries, 0.5)["pbc"]
    assert (f["wrong"], f["flagged"], f["silent"], f["false"]) == (2, 2, 1, 1)
    assert (f["silent_share"], f["hit_rate"], f["false_share"]) == (1 / 6, 0.5, 0.25)


@pytest.mark.parametrize(("n_verified", "silent"), [(9, 1), (8, 0)])
def test_the_share_is_judged_where_nine_in_ten_cells_have_a_label(n_verified: int, silent: int) -> None:
    """All cells are called single; two of the labelled ones overlap."""
    one = examined(
        lattice(10), lattice(10), [0.9] * 10,
        overlapping=[True] * 2 + [False] * (n_verified - 2), found_score=[0.1] * n_verified,
    )  # fmt: skip
    f = laboratories.figures([one], 0.5)["all"]
    assert (f["silent"], f["share_fields"]) == (silent, silent)
    assert f["share_bias"] == pytest.approx(-2 / 9) if silent else math.isnan(f["share_bias"])


def test_overlap_of_a_laboratory_and_its_calibration() -> None:
    one = examined(
        lattice(4), lattice(4), [0.9] * 4,
        overlapping=[True, False, False, False], found_score=[0.75, 0.75, 0.25, 0.25],
    )  # fmt: skip
    f = laboratories.figures([one], 0.5)["all"]
    assert (f["verified"], f["accuracy"], f["precision_overlapping"]) == (4, 0.75, 0.5)
    assert f["auc"] == pytest.approx(5 / 6)
    assert f["calibration_error"] == pytest.approx(0.25)  # 0.75 said, 0.5 true; 0.25 said, 0 true


def test_verdicts_of_a_laboratory_by_kind() -> None:
    one = examined(
        lattice(6), lattice(6), [0.9] * 6, letter="SSTTOO",
        overlapping=[False] * 2 + [True] * 4, found_score=[0.1, 0.9, 0.9, 0.1, 0.9, 0.9],
    )  # fmt: skip
    f = laboratories.figures([one], 0.5)["pbc"]
    assert [f[f"n_{k}"] for k in ("single", "touching", "over", "several")] == [2, 2, 2, 0]
    assert [f[f"recall_{k}"] for k in ("single", "touching", "over")] == [0.5, 0.5, 1.0]
    assert math.isnan(f["recall_several"])


def test_what_is_refused_is_a_lost_cell_a_double_or_no_cell() -> None:
    truth = lattice(10)
    one = examined(truth, truth[:9], [0.9] * 9)
    nothing = lattice(1, first=50)
    one = replace(one, refused=np.concatenate([truth[9:], truth[:1] + 1, nothing]))
    f = laboratories.figures([one], 0.5)["pbc"]
    assert (f["refused_cells"], f["refused_cells_share"], f["refused_others"]) == (1, 0.1, 2)


def test_a_bundle_learned_from_the_laboratories_of_its_training_photographs() -> None:
    training = {"counts": {"train": {"bcd": {"rbc": 3}, "raabin": {"rbc": 3}}, "val": {"pbc": {"rbc": 3}}}}
    learned = laboratories.learned_from(training)
    assert sorted(learned or ()) == ["bccd+bcd", "raabin"]
    assert laboratories.learned_from({"data": "none"}) is None
    boxes = lattice(3)
    found = laboratories.figures([examined(boxes, boxes, [0.9] * 3, source=s) for s in ("bcd", "pbc")], 0.5)
    rows = laboratories.tables(found, {}, learned)[0].rows
    assert [r[:2] for r in rows] == [("all", "–"), ("bccd+bcd", "yes"), ("pbc", "no")]
    assert [r[1] for r in laboratories.tables(found, {}, None)[0].rows] == ["–"] * 3


def test_false_white_cells_and_platelets_per_thousand_red_cells() -> None:
    """Of 20 cells found, 3 are called white, one of them rightly, and one a platelet."""
    one = examined(lattice(20), lattice(20), [0.9] * 20)
    one.photograph.class_id[0] = CellClass.WBC
    one.result.cells.detections.class_id[:3] = CellClass.WBC
    one.result.cells.detections.class_id[3] = CellClass.PLATELET
    f = laboratories.figures([one], 0.5)["all"]
    assert f["wbc_false_per_1000"] == pytest.approx(2000 / 19)
    assert f["platelet_false_per_1000"] == pytest.approx(1000 / 19)
    assert (f["wbc_labelled"], f["wbc_recall"], f["platelet_labelled"]) == (1, 1.0, 0)
    assert math.isnan(f["platelet_recall"])


def test_nothing_is_neither_good_nor_bad() -> None:
    f = laboratories.figures([examined(lattice(0), lattice(0), [])], 0.5)["all"]
    assert (f["wrong"], f["silent_share"]) == (0, 0.0)
    for name in ("recall", "precision", "f1", "count_bias", "hit_rate", "auc", "wbc_false_per_1000"):
        assert math.isnan(f[name])
    assert laboratories.by_shape([examined(lattice(1), lattice(1), [0.9])]) == {}


def test_shapes_are_found_where_a_red_cell_holds_their_point() -> None:
    """Four targets: single, single but called overlapping, overlapping, missed. One burr, called white."""
    truth = lattice(5)
    one = examined(truth, np.concatenate([truth[:3], truth[4:]]), [0.9] * 4)
    one.result.cells.overlapping[:] = [False, True, True, False]
    one.result.cells.detections.class_id[3] = CellClass.WBC
    middles = ((truth[:, :2] + truth[:, 2:]) / 2).tolist()
    points = tuple(
        ShapePoint(x, y, s) for (x, y), s in zip(middles, ("target",) * 4 + ("burr",), strict=True)
    )
    words: tuple[VerifiedName, ...] = ("single", "single", "overlapping", "single", "single")
    verified = tuple(
        VerifiedLabel("x.jpg", "chula", (x0, y0, x1, y1), "S", word, 1)
        for (x0, y0, x1, y1), word in zip(truth.tolist(), words, strict=True)
    )
    one = replace(one, photograph=replace(one.photograph, points=points, verified=verified))
    found = laboratories.by_shape([one])
    assert list(found) == ["all", "target", "burr"]
    target, burr = found["target"], found["burr"]
    assert (target["points"], target["found"], target["single"]) == (4, 0.75, 2)
    assert target["called_overlapping"] == pytest.approx(2 / 3)
    assert target["single_called_overlapping"] == 0.5
    assert (burr["points"], burr["found"]) == (1, 0.0)
    assert math.isnan(burr["called_overlapping"])
    assert found["all"]["found"] == 0.6


@pytest.mark.parametrize("every", [1, 2])
def test_evaluate_prints_laboratories_and_publishes_only_whole_figures(
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    every: int,
) -> None:
    add_chula(data)
    out_folder = tmp_path / "docs" / "results"
    left_out = results.Table("Red cells of a laboratory left out", ("laboratory", "F1"), (("moon", "0.5"),))
    results.store(results.Section("left-out", "x", (left_out,), data={"bundles": {}}), out_folder)
    code, out, _ = rbc_train(
        monkeypatch, capsys, "evaluate", "--bundle", TOY, "--data", data.folder, "--out", out_folder,
        "--threads", 1, "--scale", "labelled", "--every", every, "--sheets", tmp_path / "sheets",
    )  # fmt: skip
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    of_laboratory = [r for r in rows if r and r[0] in ("all", "pbc", "chula") and "%)" in " ".join(r)]
    n = 2 if every == 1 else 1
    of_laboratory = [[r[0], *r[2:3]] for r in of_laboratory if r[1] == "–"]  # the toy learned from nothing
    assert of_laboratory == [["all", str(n + 1)], ["chula", "1"], ["pbc", str(n)]]
    assert (["moon", "0.5"] in rows) == (every == 1)
    n_points = sum(
        int((d.class_id[~d.overlapping] == 0).sum()) for d in (data.drawn["chula-3"], data.drawn["chula-4"])
    )
    assert ["target", str(n_points)] in [r[:2] for r in rows]
    assert (out_folder / "laboratories.json").exists() == (every == 1)
    assert (out_folder / "metrics.json").exists() == (every == 1)
    if every == 1:
        found = results.read_section("laboratories", out_folder)
        assert list(found["laboratories"]) == ["all", "chula", "pbc"]
        assert "## By laboratory" in (tmp_path / "docs" / "results.md").read_text()
        json.dumps(found, allow_nan=False)
        sheets = {f.name for f in (tmp_path / "sheets").iterdir()}
        assert "worst-fields.png" in sheets
        assert any(name.startswith("chula-worst") for name in sheets)

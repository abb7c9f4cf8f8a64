"""Ablations: suppression does what its papers say, and what is measured is what the station would see."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import TinyData, photograph
from ultralytics.nn.tasks import DetectionModel

from rbc_edge.errors import UnavailableError
from rbc_edge.values import Detections, Float32, UInt8
from rbc_edge.vision.bundle import Bundle
from rbc_train import results, train_classifier
from rbc_train.data import read_public
from studies import ablations
from studies.ablations import Candidates

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4].copy(), table[:, 4].copy(), table[:, 5].astype(np.int64))


# Two cells of iou 1/3, a double of the first with iou 0.9, a white cell in the same place.
PAIR = boxes((0, 0, 20, 20, 0.9, 0), (10, 0, 30, 20, 0.8, 0), (0, 0, 20, 18, 0.7, 0), (0, 0, 20, 20, 0.6, 1))


def by_box(found: Detections) -> dict[tuple[float, ...], float]:
    return {
        (*b, int(c)): float(s)
        for b, c, s in zip(found.xyxy.tolist(), found.class_id.tolist(), found.score, strict=True)
    }


def test_greedy_keeps_cells_that_lie_over_each_other_and_no_doubles() -> None:
    kept = ablations.greedy(0.65, votes=False)(PAIR)
    assert by_box(kept) == pytest.approx({(0, 0, 20, 20, 0): 0.9, (10, 0, 30, 20, 0): 0.8})
    assert len(ablations.greedy(0.3, votes=False)(PAIR)) == 1
    voted = ablations.greedy(0.65)(PAIR)
    assert voted.xyxy[0, 3] == pytest.approx((0.9 * 20 + 0.7 * 0.9 * 18) / (0.9 + 0.7 * 0.9))


def test_soft_suppression_costs_score_by_its_gaussian() -> None:
    found = by_box(ablations.soft(0.5)(PAIR))
    assert found[0, 0, 20, 20, 0] == pytest.approx(0.9)
    assert found[10, 0, 30, 20, 0] == pytest.approx(0.8 * np.exp(-((1 / 3) ** 2) / 0.5))
    other = 180 / (400 + 360 - 180)  # the double against the second cell
    assert found[0, 0, 20, 18, 0] == pytest.approx(0.7 * np.exp(-(0.9**2 + other**2) / 0.5))
    assert found[0, 0, 20, 20, 1] == pytest.approx(0.6)  # another class


def test_matrix_suppression_spares_what_a_covered_box_covers() -> None:
    found = by_box(ablations.matrix(0.5)(PAIR))
    assert found[0, 0, 20, 20, 0] == pytest.approx(0.9)
    assert found[10, 0, 30, 20, 0] == pytest.approx(0.8 * np.exp(-((1 / 3) ** 2) / 0.5))
    # By the first cell, which nothing covers; the second is covered itself and costs less.
    assert found[0, 0, 20, 18, 0] == pytest.approx(0.7 * np.exp(-(0.9**2) / 0.5))
    assert found[0, 0, 20, 20, 1] == pytest.approx(0.6)


@pytest.mark.parametrize("name", list(ablations.SUPPRESSIONS))
def test_every_way_stands_nothing(name: str) -> None:
    assert len(ablations.SUPPRESSIONS[name](Detections.empty())) == 0


def test_candidates_are_in_pixels_of_the_photograph(data: TinyData) -> None:
    validation = read_public(data.folder)[0].of("val")
    windows: list[tuple[int, ...]] = []

    def look(window: UInt8) -> tuple[Float32, Float32]:
        windows.append(window.shape)
        # One box over the middle half of the window, one that is no box, one that nobody believes.
        height, width = window.shape[:2]
        middle = [width / 4, height / 4, 3 * width / 4, 3 * height / 4]
        scores = np.array([[0.1, 0.9, 0.2], [0.9, 0.1, 0.1], [0.005, 0.001, 0.002]], np.float32)
        return np.array([middle, [5, 5, 5, 5], middle], np.float32), scores

    seen = ablations.candidates(look, validation, 40.0)
    for one, shape in zip(seen, windows, strict=True):
        assert shape[0] % 32 == shape[1] % 32 == 0
        assert one.found.class_id.tolist() == [1]
        centre = (one.found.xyxy[0, :2] + one.found.xyxy[0, 2:]) / 2
        size = (one.photograph.width_px, one.photograph.height_px)
        np.testing.assert_allclose(centre, np.array(size) / 2, rtol=0.02)


def test_the_toy_s_candidates_are_judged_and_published(data: TinyData, tmp_path: Path) -> None:
    bundle = Bundle.open(TOY)
    validation = read_public(data.folder)[0].of("val")
    seen = ablations.candidates(ablations.bundle_look(bundle), validation, bundle.manifest.cell_diameter_px)
    judged = {name: ablations.judge(seen, ablations.SUPPRESSIONS[name]) for name in ("greedy, iou 0.65",)}
    one = judged["greedy, iou 0.65"]
    assert one["rbc_ap50"] > 0.5
    assert 0.6 < one["rbc_count_ratio"] < 1.4
    page = results.publish(ablations.suppression_section(judged, bundle.bundle_id), tmp_path / "results")
    assert "greedy, iou 0.65" in page.read_text(encoding="utf-8")


def test_perfect_candidates_get_perfect_figures(data: TinyData) -> None:
    seen = [
        Candidates(p, Detections(p.xyxy, np.full(len(p.xyxy), 0.9, np.float32), p.class_id), 0.001)
        for p in read_public(data.folder)[0].of("val")
    ]
    figures = ablations.judge(seen, ablations.greedy(0.95))
    assert (figures["rbc_ap50_95"], figures["rbc_count_ratio"]) == (1.0, 1.0)
    assert figures["rbc_field_error_mean"] == 0.0


def test_networks_taught_differently_stand_side_by_side(
    data: TinyData, dataset: Path, tmp_path: Path
) -> None:
    checkpoints = [
        train_classifier.train(
            train_classifier.ClassifierOptions(
                dataset, data.folder, tmp_path / model, model=model, epochs=1, threads=1
            )
        )
        for model in ("improved", "station")
    ]
    judged = ablations.judge_overlap(checkpoints, dataset, data.folder)
    assert [(j["model"], j["turned"]) for j in judged] == [
        ("improved", False), ("improved", True), ("station", False), ("station", True),
    ]  # fmt: skip
    assert all(0 <= j["accuracy"] <= 1 and j["n"] > 0 and j["milliseconds"] > 0 for j in judged)
    page = results.publish(ablations.overlap_section(judged), tmp_path / "results").read_text(
        encoding="utf-8"
    )
    assert "| station, eight views | noise | verified | 1 |" in page


def test_a_missing_checkpoint_is_named(dataset: Path, data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no such file"):
        ablations.judge_overlap([tmp_path / "classifier.pt"], dataset, data.folder)
    with pytest.raises(UnavailableError, match="no such file"):
        ablations.checkpoint_look(tmp_path / "detector.pt")


def test_a_checkpoint_s_boxes_are_corners_in_pixels_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    window = np.ascontiguousarray(photograph(0).image[:96, :128])
    network = DetectionModel("yolov5n.yaml", nc=3, verbose=False).eval()
    rows = network(torch.from_numpy(window).permute(2, 0, 1)[None].float() / 255)[0][0].T.detach().numpy()

    monkeypatch.setattr("rbc_train.networks.load_detector", lambda _file: network)
    found, scores = ablations.checkpoint_look(Path("any"))(window)
    np.testing.assert_allclose((found[:, :2] + found[:, 2:]) / 2, rows[:, :2], atol=0.05)
    np.testing.assert_allclose(found[:, 2:] - found[:, :2], rows[:, 2:4], atol=0.05)
    np.testing.assert_allclose(scores, rows[:, 4:], atol=1e-4)

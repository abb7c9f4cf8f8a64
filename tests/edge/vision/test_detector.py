"""The detector: suppression, tiles and their seams, padding; with the toy network and with a painted one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbc_edge.errors import ImageError
from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.values import CellClass, Detections, Float32, UInt8
from rbc_edge.vision import detector, preprocess
from rbc_edge.vision.boxes import iou
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.detector import Detector, one_cell, suppress, vote


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """Detections of rows x0, y0, x1, y1, score, class."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4].copy(), table[:, 4].copy(), table[:, 5].astype(np.int64))


def limits(*values: float) -> Float32:
    return np.array(values, np.float32)


def test_suppression_of_nothing() -> None:
    assert suppress(Detections.empty(), limits(0.5, 0.5, 0.5), 0.5).tolist() == []


def test_the_best_of_equals_stays_and_the_first_of_equal_scores() -> None:
    found = boxes(
        (0, 0, 10, 10, 0.5, 0), (1, 0, 11, 10, 0.9, 0), (0, 1, 10, 11, 0.9, 0), (30, 0, 40, 10, 0.1, 0)
    )
    assert suppress(found, limits(0.5, 0.5, 0.5), 0.5).tolist() == [1, 3]


def test_each_class_has_its_own_limit() -> None:
    """Two boxes of iou 1/3: one cell to a strict limit, two to a generous one."""
    for class_id in CellClass:
        found = boxes((0, 0, 10, 10, 0.9, class_id), (5, 0, 15, 10, 0.8, class_id))
        strict, generous = limits(0.6, 0.6, 0.6), limits(0.6, 0.6, 0.6)
        strict[class_id] = 0.3
        assert suppress(found, strict, 0.9).tolist() == [0]
        assert suppress(found, generous, 0.0).tolist() == [0, 1]


def test_between_classes_another_limit_holds() -> None:
    found = boxes((0, 0, 10, 10, 0.8, CellClass.RBC), (0, 0, 10, 9, 0.9, CellClass.WBC))
    assert suppress(found, limits(0.1, 0.1, 0.1), 0.95).tolist() == [1, 0]
    assert suppress(found, limits(1.0, 1.0, 1.0), 0.7).tolist() == [1]


def test_an_iou_at_the_limit_stays() -> None:
    found = boxes((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 5, 0.8, 0))  # iou exactly a half
    assert len(suppress(found, limits(0.5, 1, 1), 1.0)) == 2
    assert len(suppress(found, limits(0.499, 1, 1), 1.0)) == 1


def test_boxes_that_mean_the_same_cell_vote_by_score() -> None:
    found = boxes((0, 0, 20, 20, 0.9, 0), (2, 0, 22, 20, 0.6, 0), (10, 0, 30, 20, 0.8, 0))
    # iou 18/22 with the second, 1/3 with the third: the third is another cell.
    (own,) = vote(found, np.array([0]), np.ones(3, np.bool_)).tolist()
    shift = 2 * 0.6 * (18 / 22) / (0.9 + 0.6 * (18 / 22))
    assert own == pytest.approx([shift, 0, 20 + shift, 20])


def test_only_the_sure_of_the_same_class_vote_and_a_lone_box_stays() -> None:
    found = boxes((0, 0, 20, 20, 0.3, 0), (2, 0, 22, 20, 0.9, 1), (0, 2, 20, 22, 0.2, 0))
    sure = np.array([False, True, False])
    assert vote(found, np.array([0, 1]), sure).tolist() == [[0, 0, 20, 20], [2, 0, 22, 20]]
    assert vote(Detections.empty(), np.zeros(0, np.int64), np.zeros(0, np.bool_)).shape == (0, 4)


def test_what_is_suppressed_suppresses_nothing() -> None:
    """A row of three where the middle one overlaps both: the ends stay."""
    found = boxes((0, 0, 10, 10, 0.9, 0), (4, 0, 14, 10, 0.8, 0), (8, 0, 18, 10, 0.7, 0))
    assert suppress(found, limits(0.3, 1, 1), 1.0).tolist() == [0, 2]


def test_suppression_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 60, (80, 2))
    table = np.hstack(
        [low, low + rng.uniform(5, 25, (80, 2)), rng.uniform(0, 1, (80, 1)), rng.integers(0, 3, (80, 1))]
    )
    found = boxes(*map(tuple, table.tolist()))

    def iou(i: int, j: int) -> float:
        a, b = found.xyxy[i].astype(float), found.xyxy[j].astype(float)
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        shared = float(np.prod(np.clip(sides, 0, None)))
        return shared / (float(np.prod(a[2:] - a[:2])) + float(np.prod(b[2:] - b[:2])) - shared)

    kept: list[int] = []
    same = (0.2, 0.5, 0.1)
    for i in np.argsort(-found.score).tolist():
        if all(
            iou(i, k) <= (same[found.class_id[k]] if found.class_id[k] == found.class_id[i] else 0.4)
            for k in kept
        ):
            kept.append(i)
    assert suppress(found, limits(*same), 0.4).tolist() == kept
    assert 10 < len(kept) < 80


def plain_suppress(found: Detections, iou_threshold: Float32, iou_threshold_across: float) -> list[int]:
    """Compares all boxes with all: what `suppress` has to give, bit by bit."""
    order = np.argsort(-found.score, kind="stable")
    found = found.take(order)
    same = one_cell(found, found, iou_threshold, iou_threshold_across)
    alive, kept = np.ones(len(order), np.bool_), []
    for i in range(len(order)):
        if alive[i]:
            kept.append(int(order[i]))
            alive &= ~same[i]
    return kept


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 300),
    field_px=st.sampled_from([30, 300, 3000]),
    side_px=st.sampled_from([0.0, 3.0, 40.0, 900.0]),
    at_once=st.sampled_from([1, 50, 500_000]),
    few=st.sampled_from([0, 0, 0, 1000]),
)
def test_suppression_by_a_grid_is_that_of_all_with_all(
    seed: int, n: int, field_px: int, side_px: float, at_once: int, few: int
) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(-5, field_px, (n, 2))
    sides = rng.exponential(side_px, (n, 2)) * rng.choice([1, 1, 20], (n, 1))
    class_id = rng.integers(0, 3, n)
    # Equal boxes and equal scores, too.
    low[n // 2 :] = np.round(low[n // 2 :], -1)
    score = np.round(rng.uniform(0, 1, n), 2)
    found = boxes(*np.column_stack([low, low + sides, score, class_id]).tolist())
    asked = (found, limits(*rng.uniform(0, 0.9, 3)), float(rng.choice([0.0, 0.5, 0.8])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "_PAIRS_AT_ONCE", at_once)
        patch.setattr(detector, "_FEW", few)
        assert suppress(*asked).tolist() == plain_suppress(*asked)


def test_the_time_for_a_field_full_of_boxes_grows_with_their_number_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs that are compared, not seconds: 16 times the boxes are 256 times the pairs of all with all."""
    n_pairs: list[int] = []

    def counted(a: Float32, b: Float32) -> Float32:
        n_pairs.append(len(a))
        return iou(a, b)

    monkeypatch.setattr(detector, "iou", counted)
    sums = []
    for side in (60, 240):
        n_pairs.clear()
        y, x = 10.0 * np.array(np.divmod(np.arange(side * side), side))
        found = boxes(*np.column_stack([x, y, x + 12, y + 12, np.full_like(x, 0.5), x * 0]).tolist())
        assert len(suppress(found, limits(0.5, 0.5, 0.5), 0.5)) == side * side
        sums.append(sum(n_pairs))
    assert sums[1] < 20 * sums[0]


def test_votes_of_a_field_full_of_boxes_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = boxes(*[(i, 0, i + 20, 20, 0.9, 0) for i in range(30)])
    asked = found, np.arange(30), np.ones(30, np.bool_)
    whole = vote(*asked)
    monkeypatch.setattr(detector, "_VOTES_AT_ONCE", 100)
    np.testing.assert_allclose(vote(*asked), whole, rtol=1e-6)


class Painted:
    """Stands for the network: sees a cell wherever a pixel is painted (1, 2, 3 + class), a little off.

    How far off depends on the window, as with a real network that sees a cell in another surrounding.
    """

    def __init__(self, side_px: float, jitter_px: float) -> None:
        self.side_px, self.jitter_px = side_px, jitter_px
        self.shapes: list[tuple[int, ...]] = []

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Float32]:
        assert outputs == ["boxes", "scores"]
        image = inputs["image"]
        self.shapes.append(image.shape)
        rng = np.random.default_rng(len(self.shapes))
        y, x = np.nonzero((image[0, :, :, 0] == 1) & (image[0, :, :, 1] == 2))
        centre = np.stack([x, y], 1) + 0.5 + rng.uniform(-self.jitter_px, self.jitter_px, (len(x), 2))
        xyxy = np.hstack([centre - self.side_px / 2, centre + self.side_px / 2]).astype(np.float32)
        scores = np.zeros((len(x), 3), np.float32)
        scores[np.arange(len(x)), image[0, y, x, 2] - 3] = rng.uniform(0.5, 0.9, len(x))
        reach = (scores >= inputs["least_score"]).any(axis=1)
        return [xyxy[reach], scores[reach]]


def painted(monkeypatch: pytest.MonkeyPatch, path: Path, jitter_px: float = 0.0) -> tuple[Detector, Painted]:
    network = Painted(36.0, jitter_px)
    monkeypatch.setattr(Bundle, "session", lambda *_args, **_more: network)
    return Detector(Bundle.open(path), threads=1), network


def canvas(width: int, height: int, cells: list[tuple[int, int, int]]) -> UInt8:
    image = np.full((height, width, 3), 200, np.uint8)
    for x, y, class_id in cells:
        image[y, x] = (1, 2, 3 + class_id)
    return image


@pytest.mark.parametrize("jitter_px", [0.0, 1.5])
@pytest.mark.parametrize("size", [(1500, 1100), (641, 640), (700, 480), (3000, 200)])
def test_cells_on_every_seam_are_counted_once(
    monkeypatch: pytest.MonkeyPatch, toy_bundle_path: Path, size: tuple[int, int], jitter_px: float
) -> None:
    """Cells as near to each other as can be, in a lattice that drifts over the seams in both directions."""
    width, height = size
    cells = [
        (x + (y // 41) % 40, y, 0) for y in range(20, height - 20, 41) for x in range(20, width - 60, 41)
    ]
    detector, network = painted(monkeypatch, toy_bundle_path, jitter_px)
    found = detector.detect(canvas(width, height, cells), 40.0)
    assert len(network.shapes) == len(list(preprocess.tiles(width, height))) > 1
    assert len(found) == len(cells)
    centre = (found.xyxy[:, :2] + found.xyxy[:, 2:]) / 2
    for x, y, _ in cells:
        distance = np.abs(centre - (x + 0.5, y + 0.5)).max(axis=1)
        assert (distance <= jitter_px + 1e-3).sum() == 1


def test_two_cells_over_each_other_on_a_seam_stay_two(
    monkeypatch: pytest.MonkeyPatch, toy_bundle_path: Path
) -> None:
    """Suppression across tiles is no stricter than within one."""
    seams = [t.core[2] for t in preprocess.tiles(1000, 400) if np.isfinite(t.core[2])]
    assert seams
    x = round(seams[0])
    cells = [(x - 8, 200, 0), (x + 12, 200, 0)]  # iou 16 / 56
    detector, _ = painted(monkeypatch, toy_bundle_path, 1.0)
    assert len(detector.detect(canvas(1000, 400, cells), 40.0)) == 2


def test_boxes_come_back_in_pixels_of_the_field(
    monkeypatch: pytest.MonkeyPatch, toy_bundle_path: Path
) -> None:
    """A field of 80 px cells is halved; width 333 becomes 166 (not 166.5): each axis has its own factor."""
    detector, network = painted(monkeypatch, toy_bundle_path)
    monkeypatch.setattr(
        preprocess,
        "rescale",
        lambda _image, factor: canvas(166, 100, [(100, 50, 2)]) if factor == 0.5 else None,
    )
    found = detector.detect(np.zeros((200, 333, 3), np.uint8), 80.0)
    assert network.shapes == [(1, 128, 192, 3)]
    x = 333 / 166
    np.testing.assert_allclose(found.xyxy, [[82.5 * x, 65, 118.5 * x, 137]], rtol=1e-6)
    assert found.class_id.tolist() == [CellClass.PLATELET]


def test_boxes_are_cut_at_the_border_and_none_lies_in_the_padding(
    monkeypatch: pytest.MonkeyPatch, toy_bundle_path: Path
) -> None:
    class Network:
        def run(self, _outputs: list[str], _inputs: dict[str, Any]) -> list[Float32]:
            rows = [
                [-9, -9, 20, 20],
                [90, 60, 130, 100],
                [101, 10, 125, 30],
                [10, 71, 20, 90],
                [99.5, 5, 120, 30],
            ]
            boxes = np.array(rows, np.float32) + np.array([left, top] * 2, np.float32)
            return [boxes, np.tile(np.array([0.9, 0, 0], np.float32), (5, 1))]

    image = np.zeros((70, 100, 3), np.uint8)
    _, left, top = preprocess.pad_to_stride(image)
    monkeypatch.setattr(Bundle, "session", lambda *_args, **_more: Network())
    detector = Detector(Bundle.open(toy_bundle_path), threads=1)
    found = detector.detect(image, 40.0)
    assert found.xyxy.tolist() == [[0, 0, 20, 20], [90, 60, 100, 70]]


def test_each_class_has_its_own_threshold_and_they_can_be_lowered(toy_bundle_path: Path) -> None:
    field = draw_field(
        np.random.default_rng(4), width_px=320, height_px=256, cell_diameter_px=40.0, stain=CREAM
    )
    detector = Detector(Bundle.open(toy_bundle_path), threads=1)
    usual = detector.detect(field.image, 40.0)
    low = detector.detect(field.image, 40.0, score_threshold=limits(0.01, 0.01, 0.01))
    only_white = detector.detect(field.image, 40.0, score_threshold=limits(1.1, 0.3, 1.1))
    assert len(low) > len(usual) > 0
    assert (usual.score >= 0.3).all()
    assert set(only_white.class_id.tolist()) == {CellClass.WBC}
    assert (only_white.class_id == CellClass.WBC).sum() == (usual.class_id == CellClass.WBC).sum()


def test_order_is_that_of_reading(toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...]) -> None:
    found = Detector(Bundle.open(toy_bundle_path), threads=1).detect(drawn_fields[0].image, 40.0)
    centre = ((found.xyxy[:, :2] + found.xyxy[:, 2:])[:, ::-1]).tolist()
    assert centre == sorted(centre)
    assert len(centre) > 5


@pytest.mark.parametrize("size", [(16, 16), (33, 500), (640, 640)])
def test_an_empty_field_gives_no_cells(toy_bundle_path: Path, size: tuple[int, int]) -> None:
    found = Detector(Bundle.open(toy_bundle_path), threads=1).detect(np.full((*size, 3), 220, np.uint8), 40.0)
    assert found.xyxy.shape == (0, 4)
    assert found.xyxy.dtype == np.float32
    assert found.class_id.dtype == np.int64


def test_a_field_far_smaller_than_its_cells_is_no_error(toy_bundle_path: Path) -> None:
    detector = Detector(Bundle.open(toy_bundle_path), threads=1)
    assert len(detector.detect(np.full((20, 20, 3), 220, np.uint8), 5000.0)) == 0


def test_a_mosaic_through_the_toy_network_counts_each_cell_once(
    toy_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiled, a large field gives the cells that it gives as one tile."""
    # Even light: the toy judges darkness against the brightest place of its window.
    field = draw_field(
        np.random.default_rng(7),
        width_px=1248,
        height_px=928,
        cell_diameter_px=40.0,
        n_single=150,
        group_sizes=(2, 3) * 12,
        n_wbc=4,
        n_platelets=0,
        stain=CREAM,
        illumination=0.0,
        noise=0.0,
    )
    opened = Bundle.open(toy_bundle_path)
    tiled = Detector(opened, threads=1).detect(field.image, 40.0)
    whole = Detector(replace(opened, manifest=replace(opened.manifest, tile_px=2048)), threads=1).detect(
        field.image, 40.0
    )

    def centres(found: Detections) -> Any:
        own = found.xyxy[found.class_id == CellClass.RBC]
        return (own[:, :2] + own[:, 2:]) / 2

    distance = np.linalg.norm(centres(tiled)[:, None] - centres(whole)[None], axis=2)
    near = distance < 8
    assert (near.sum(axis=0) <= 1).all()  # nothing twice
    assert near.any(axis=0).mean() > 0.97  # nothing lost: the toy's grid shifts with the window
    assert len(centres(tiled)) == pytest.approx(field.counts.n_rbc, rel=0.1)


def test_what_shows_far_more_boxes_than_a_smear_is_not_one(
    toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    field = drawn_fields[0]
    networks = Detector(Bundle.open(toy_bundle_path), threads=2)
    n = len(networks.detect(field.image, 40.0))
    monkeypatch.setattr(detector, "MAX_BOXES", n - 1)
    with pytest.raises(ImageError, match=f"more than {n - 1} things like cells") as raised:
        networks.detect(field.image, 40.0)
    assert raised.value.reason == "not-a-smear"

"""Outlines: pasting with exact truth, masks of drawn discs, distances, training, counting, a page."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command import called
from tiny_data import TinyData, photograph, usual

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.ops import synthetic
from rbc_edge.values import Bool, Detections, Float32, UInt8
from rbc_edge.vision.preprocess import PAD_VALUE, View
from studies import outline_methods, outlines
from studies.outline_methods import Single, TrainingOptions

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"
GLASS = 230


def disc(x: float = 31.5, y: float = 31.5, radius: float = 20.0) -> Bool:
    rows, columns = np.mgrid[:64, :64]
    return np.asarray(np.hypot(columns - x, rows - y) <= radius, np.bool_)


def window(*cells: Bool) -> UInt8:
    """Cells of one stain on glass: where two lie over each other, light goes through both."""
    light = np.full((64, 64, 3), GLASS, np.float32)
    for mask in cells:
        light[mask] *= np.array([0.9, 0.7, 0.8], np.float32)
    return np.asarray(light + 0.5, np.uint8)


def single(radius: float = 20.0) -> Single:
    return Single(window(disc(radius=radius)), disc(radius=radius), "bccd")


class Chance(random.Random):
    """Chance that is told: `random` gives the values in turn, and every place is to the right."""

    def __init__(self, values: Sequence[float], depth: float) -> None:
        super().__init__(0)
        self.values, self.depth = list(values), depth

    def random(self) -> float:
        return self.values.pop(0)

    def uniform(self, a: float, b: float) -> float:
        return 0.0 if b > 2 * math.pi - 1e-9 else self.depth if b == 0.6 else 1.0

    def randrange(self, *_: int) -> int:  # type: ignore[override]
        return 0


def test_pasted_light_goes_through_both_cells_and_all_of_the_outline_is_the_truth() -> None:
    made = outline_methods.paste(single(), [single()], Chance([0.9, 0.1, 0.1], depth=0.25))
    other = disc(x=31.5 + 39 - 10)  # 39 px between the middles of the outermost pixels, a quarter cell less
    np.testing.assert_array_equal(made.mask, disc())
    assert made.overlap == pytest.approx((disc() & other).sum() / disc().sum(), abs=0.02)
    deep = cv2.erode((disc() & other).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert deep.any()
    alone = window(disc())[31, 25].astype(float)
    np.testing.assert_allclose(made.window[deep], np.tile(alone**2 / GLASS, (deep.sum(), 1)), atol=2)


def test_pasted_over_the_cell_hides_a_part_of_it() -> None:
    made = outline_methods.paste(single(), [single()], Chance([0.9, 0.7], depth=0.25))
    seen = disc() & ~disc(x=60.5)
    assert outline_methods.mask_iou(made.mask, seen) > 0.97
    assert made.overlap > 0.05
    np.testing.assert_allclose(made.window[31, 45], window(disc())[31, 25], atol=2)  # one cell dark, not two


def test_pasted_under_the_cell_hides_nothing_of_it() -> None:
    made = outline_methods.paste(single(), [single()], Chance([0.9, 0.95], depth=0.25))
    np.testing.assert_array_equal(made.mask, disc())
    inner = disc(radius=17)
    np.testing.assert_array_equal(made.window[inner], single().window[inner])
    assert (made.window[31, 58:, 1] < GLASS - 30).all()  # the other one lies beside


def test_pasted_cells_are_of_one_camera_and_the_same_chance_gives_the_same() -> None:
    cells = [single(18), single(20), Single(window(disc(radius=19)), disc(radius=19), "pbc")]
    one, two = (outline_methods.draw_overlaps(cells, 12, random.Random(5)) for _ in range(2))
    assert all(
        (a.window == b.window).all() and (a.mask == b.mask).all() for a, b in zip(one, two, strict=True)
    )
    assert any(o.overlap > 0.1 for o in one)
    assert any(o.overlap == 0 for o in one)
    assert all(0 <= o.overlap <= 1 for o in one)


def test_a_free_standing_cell_is_outlined() -> None:
    box = np.array([9, 9, 54, 54], np.float32)  # a tenth wider than the cell, as labels are
    mask = outline_methods.free_standing(window(disc()), box)
    assert mask is not None
    assert outline_methods.mask_iou(mask, disc()) > 0.97


@pytest.mark.parametrize(
    ("cells", "box"),
    [
        ((disc(), disc(x=64)), (11, 11, 52, 52)),  # touches another
        ((disc(), disc(x=72.5)), (11, 11, 52, 52)),  # hardly any glass between
        ((disc() & ~disc(x=52, radius=16),), (11, 11, 52, 52)),  # half of it is missing
        ((disc(radius=9),), (11, 11, 52, 52)),  # not what the label means
        ((disc(x=12),), (0, 11, 32, 52)),  # beyond the window
        ((), (11, 11, 52, 52)),
    ],
)
def test_other_cells_are_not_free_standing(cells: tuple[Bool, ...], box: tuple[float, ...]) -> None:
    assert outline_methods.free_standing(window(*cells), np.array(box, np.float32)) is None


def test_a_cell_cut_by_the_border_is_not_free_standing() -> None:
    crop = window(disc())
    crop[:, :24] = PAD_VALUE
    assert outline_methods.free_standing(crop, np.array([24, 11, 52, 52], np.float32)) is None


def test_otsu_fills_a_pale_middle() -> None:
    crop = window(disc())
    crop[disc(radius=8)] = GLASS
    assert outline_methods.mask_iou(outline_methods.otsu(crop), disc()) > 0.95


def test_two_discs_are_one_to_otsu_and_two_to_watershed() -> None:
    pair = window(disc(), disc(x=31.5 + 34))
    assert outline_methods.mask_iou(outline_methods.otsu(pair), disc() | disc(x=65.5)) > 0.95
    found = outline_methods.watershed(pair)
    assert outline_methods.mask_iou(found, disc()) > 0.9
    assert not found[:, 58:].any()


@pytest.mark.parametrize("outline", [outline_methods.otsu, outline_methods.watershed])
def test_beyond_the_field_there_is_no_cell(outline: outlines.Outliner) -> None:
    assert not outline(window()).any()  # type: ignore[attr-defined]
    assert not outline(np.full((64, 64, 3), PAD_VALUE, np.uint8)).any()  # type: ignore[attr-defined]


def test_boundary_distance_of_known_masks() -> None:
    assert (outline_methods.boundary_distances(disc(), disc()) == 0).all()
    grown = outline_methods.boundary_distances(disc(radius=23), disc(radius=20))
    np.testing.assert_allclose(grown, 3, atol=1.1)
    assert grown.mean() == pytest.approx(3, abs=0.3)
    square = np.zeros((64, 64), np.bool_)
    square[20:40, 20:40] = True
    moved = outline_methods.boundary_distances(square, np.roll(square, 4, axis=1))
    assert moved.max() == 4
    assert len(outline_methods.boundary_distances(square, np.zeros_like(square))) == 0


def test_iou_and_aspect_of_known_masks() -> None:
    empty = np.zeros((64, 64), np.bool_)
    bar = empty.copy()
    bar[20:30, 10:50] = True
    assert outline_methods.mask_iou(bar, bar) == 1
    assert outline_methods.mask_iou(bar, np.roll(bar, 20, axis=1)) == pytest.approx(1 / 3)
    assert outline_methods.mask_iou(empty, empty) == 0
    assert outline_methods.aspect(bar) == pytest.approx(4)
    assert outline_methods.aspect(disc()) == pytest.approx(1, abs=1e-6)
    assert math.isnan(outline_methods.aspect(empty))


def test_windows_show_a_cell_forty_pixels_wide_and_say_where() -> None:
    image = np.full((300, 400, 3), GLASS, np.uint8)
    cv2.circle(image, (200, 150), 30, (200, 150, 180), -1)
    crops, shown = outline_methods.windows(View.of(image), np.array([[200, 150], [5, 5]], np.float32), 60.0)
    mask = outline_methods.otsu(crops[0])
    assert mask.sum() == pytest.approx(math.pi * 20**2, rel=0.05)
    np.testing.assert_allclose(shown[0], [152, 102, 248, 198], atol=1)
    assert (crops[1][:27, :27] == PAD_VALUE).all()  # beyond the field


def test_drawn_cells_know_their_outline_and_what_lies_over_it() -> None:
    field = synthetic.draw_field(np.random.default_rng(3), n_single=6, group_sizes=(2, 2), n_wbc=0)
    cells = outlines.drawn_cells(field)
    assert len(cells) > 4
    apart = [c for c in cells if c.overlap == 0]
    over = [c for c in cells if c.overlap > 0]
    assert apart
    assert over
    for cell in apart:  # drawn with a soft edge, so a threshold finds it within a pixel
        assert outline_methods.mask_iou(outline_methods.otsu(cell.window), cell.mask) > 0.88
    for cell in over:
        assert outline_methods.otsu(cell.window).sum() > 1.2 * cell.mask.sum()


def test_perfect_outlines_are_judged_perfect_and_missing_ones_missing() -> None:
    cells = outline_methods.draw_overlaps([single()], 8, random.Random(2))
    seen = [c.mask for c in cells if c.mask.any()]
    judged = outlines.judge(
        cells, {"true": lambda _w: seen, "none": lambda _w: [np.zeros((64, 64), np.bool_)] * len(seen)}
    )
    assert judged["true"].iou.tolist() == [1.0] * len(seen)
    assert judged["true"].mean_px.max() == 0
    np.testing.assert_array_equal(judged["true"].area, 1)
    assert judged["none"].iou.max() == 0
    assert np.isnan(judged["none"].mean_px).all()


def boxes(*middles: tuple[float, float]) -> Float32:
    return np.array([(x - 20, y - 20, x + 20, y + 20) for x, y in middles], np.float32)


def test_boxes_of_one_cell_are_merged_and_those_of_two_are_not() -> None:
    image = np.full((128, 192, 3), GLASS, np.uint8)
    for x in (50, 120):
        cv2.circle(image, (x, 64), 20, (200, 150, 180), -1)
    xyxy = boxes((50, 64), (54, 64), (120, 64), (85, 20))  # the last one on glass
    found = Detections(xyxy, np.array([0.5, 0.9, 0.6, 0.8], np.float32), np.zeros(4, np.int64))
    kept = outlines.merged(View.of(image), found, 40.0, lambda w: [outline_methods.otsu(x) for x in w])
    assert kept.tolist() == [1, 2]


def test_masks_are_compared_where_they_lie_in_the_field() -> None:
    shown = np.array([0, 0, 96, 96], np.float32)
    moved = shown + np.array([15, 0, 15, 0], np.float32)  # 10 px of the window
    assert outlines.same_place_iou(disc(x=35), shown, disc(x=25), moved) == 1
    assert outlines.same_place_iou(disc(), shown, disc(), shown + 1000) == 0


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path) -> None:
    cells = [single(r) for r in (18, 20, 22)]

    def run(name: str) -> TrainingOptions:
        return TrainingOptions(tmp_path / name, epochs=2, windows=8, threads=1)

    whole, epochs = outline_methods.load(outline_methods.train(cells, run("whole")))
    assert epochs == 2

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outline_methods.train(cells, run("parts"), stop)
    parts, _ = outline_methods.load(outline_methods.train(cells, run("parts")))
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match="other options"):
        outline_methods.train(cells[:2], run("whole"))


def test_the_network_is_small_and_an_empty_field_has_no_masks() -> None:
    network = outline_methods.UNet()
    assert sum(p.numel() for p in network.parameters()) <= 100_000
    assert outline_methods.unet_masks(network, np.zeros((0, 64, 64, 3), np.uint8)) == []


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no U-Net") as missing:
        outline_methods.load(tmp_path / "outlines.pt")
    assert "--train" in (missing.value.advice or "")
    (tmp_path / "outlines.pt").write_bytes(b"no weights")
    with pytest.raises(UnavailableError, match="no U-Net"):
        outline_methods.load(tmp_path / "outlines.pt")
    with pytest.raises(UnavailableError, match="no free-standing cell"):
        outline_methods.train([], TrainingOptions(tmp_path / "run"))


def test_the_command_trains_compares_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data: TinyData = usual(tmp_path / "data")
    verified = data.verified()
    monkeypatch.setattr(outlines, "verified_labels", lambda _photographs: verified)
    monkeypatch.setattr(outlines, "_PASTED", 12)
    monkeypatch.setattr(outlines, "_DRAWN_FIELDS", 1)
    run = tmp_path / "run"
    cells = [single(r) for r in (18, 20, 22)]
    outline_methods.train(cells, TrainingOptions(run, epochs=1, windows=8, threads=1))
    words = ("--data", data.folder, "--bundle", TOY, "--run", run, "--out", tmp_path / "docs" / "results")
    code, printed, _ = called(
        outlines.app,
        monkeypatch,
        capsys,
        *words,
        "--threads",
        1,
        "--every",
        1,
        "--sheets",
        tmp_path / "sheets",
    )
    assert code == 0
    assert "Drawn smears" in printed
    section = json.loads((tmp_path / "docs" / "results" / "outlines.json").read_text())
    assert section["command"] == "python -m studies.outlines"
    assert set(section["data"]["outlines"]) == {"pasted", "single", "drawn"}
    fit = section["data"]["fit"]["Otsu"]
    assert 0 < fit["fit"] <= fit["n"]
    shipped = section["data"]["counts"]["pbc"]["detector and CNN, as shipped"]
    assert shipped["labelled"] == sum(int((photograph(seed).class_id == 0).sum()) for seed in (10, 11))
    assert shipped["f1"] > 0.5
    assert "`python -m studies.outlines`" in (tmp_path / "docs" / "results.md").read_text()
    assert sorted(f.name for f in (tmp_path / "sheets").iterdir()) == [
        "drawn.png",
        "pasted.png",
        "single.png",
    ]

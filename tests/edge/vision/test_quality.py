"""Quality: each feature follows its defect and nothing else, whatever the camera; flags follow the bounds."""

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from rbc_edge.ops.synthetic import CREAM, GREY, ROSE, DrawnField, Stain, draw_field
from rbc_edge.values import Bool, CellClass, Cells, Detections, FieldOfView, Scale, ScaleSource, UInt8
from rbc_edge.vision import boxes, preprocess, quality
from rbc_edge.vision.analyzer import Analyzer, open_analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.quality import Features

FINE = Features(210.0, 0.0, 0.3, 0.09, 0.1, 0.45, 88.0, 0.8, 0.44, 0.1, 0, 0, 0.01, 0, 0, 0.1)
Change = Callable[[UInt8], UInt8]


def drawn(seed: int = 1, *, diameter_px: float = 80.0, stain: Stain = CREAM) -> DrawnField:
    return draw_field(
        np.random.default_rng(seed), width_px=round(8 * diameter_px), height_px=round(6 * diameter_px),
        cell_diameter_px=diameter_px, n_single=10, group_sizes=(2, 3), n_wbc=0, n_platelets=1,
        stain=stain, illumination=0.05, blur_px=diameter_px / 80,
    )  # fmt: skip


def seen(field: DrawnField, *, score: float = 0.9) -> Cells:
    """The drawn truth, as if it had been found."""
    n = len(field.xyxy)
    found = Detections(field.xyxy, np.full(n, score, np.float32), field.class_id)
    height, width = field.image.shape[:2]
    return Cells(
        found,
        np.where(field.overlapping, 0.9, 0.1).astype(np.float32),
        field.overlapping,
        field.group,
        boxes.touches_edge(field.xyxy, width, height, field.cell_diameter_px),
    )


def features(field: DrawnField, change: Change = lambda image: image, *, score: float = 0.9) -> Features:
    return quality.measure(
        preprocess.view(change(field.image), field.cell_diameter_px), seen(field, score=score),
        field.cell_diameter_px,
        model_px=40.0, min_score=0.5,
    )  # fmt: skip


def blurred(cells: float) -> Change:
    return lambda image: np.asarray(cv2.GaussianBlur(image, (0, 0), cells * 80), np.uint8)


def gain(*factors: float) -> Change:
    return lambda image: np.clip(image * np.array(factors), 0, 255).astype(np.uint8)


def contrast(share: float) -> Change:
    return lambda image: (230 - (230 - image.astype(np.float64).clip(0, 230)) * share).astype(np.uint8)


def vignette(loss: float) -> Change:
    def darken(image: UInt8) -> UInt8:
        height, width = image.shape[:2]
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        return np.asarray(image * (1 - loss * (x * x + y * y) / 2)[..., None], np.uint8)

    return darken


@pytest.mark.parametrize("stain", [CREAM, GREY, ROSE])
def test_a_fine_field_raises_no_flag(stain: Stain) -> None:
    for seed in range(3):
        assert quality.flags(features(drawn(seed, stain=stain))) == ()


DEFECTS: dict[str, tuple[str, bool, list[Change]]] = {
    "blurred": ("edge_width", True, [blurred(c) for c in (0.03, 0.06, 0.12)]),
    "dark": ("bright_level", False, [gain(g) for g in (0.6, 0.3, 0.1)]),
    "faint": ("contrast", False, [contrast(c) for c in (0.6, 0.3, 0.1)]),
    "overexposed": ("clipped", True, [gain(g) for g in (1.3, 1.6, 2.2)]),
    "uneven-light": ("unevenness", True, [vignette(v) for v in (0.3, 0.6, 0.9)]),
}


@pytest.mark.parametrize("flag", sorted(DEFECTS))
def test_a_feature_follows_its_defect(flag: str) -> None:
    name, rises, changes = DEFECTS[flag]
    field = drawn()
    values = [getattr(features(field, change), name) for change in (lambda image: image, *changes)]
    assert values == sorted(values, reverse=not rises)
    assert abs(values[-1] - values[0]) > 0.05
    assert flag not in quality.flags(features(field))
    assert flag in quality.flags(features(field, changes[-1]))


@pytest.mark.parametrize("flag", sorted(DEFECTS))
def test_a_weak_defect_raises_no_other_flag(flag: str) -> None:
    assert set(quality.flags(features(drawn(), DEFECTS[flag][2][0]))) <= {flag}


def test_focus_is_not_contrast_and_not_light() -> None:
    """An absolute measure of sharpness would fall with both."""
    field = drawn()
    plain = features(field)
    for change in (gain(0.4), contrast(0.4), gain(0.9, 1.0, 0.7), vignette(0.4)):
        assert features(field, change).edge_width == pytest.approx(plain.edge_width, rel=0.15)
    assert features(field, gain(0.4)).contrast == pytest.approx(plain.contrast, rel=0.1)


def test_features_are_the_same_for_all_cameras() -> None:
    """Twice, or half, the pixels for the same field."""
    field = drawn(diameter_px=120.0)
    plain = features(field)
    for factor in (0.6, 1.5):
        other = replace(
            field,
            image=preprocess.rescale(field.image, factor),
            xyxy=(field.xyxy * factor).astype(np.float32),
            cell_diameter_px=field.cell_diameter_px * factor,
        )
        measured = features(other)
        for name in ("bright_level", "contrast", "edge_width", "glass", "green"):
            assert getattr(measured, name) == pytest.approx(getattr(plain, name), rel=0.1), name
        assert measured.unevenness == pytest.approx(plain.unevenness, abs=0.02)


def test_glass_vanishes_where_cells_lie_over_each_other() -> None:
    """Light passes all of them, so transmittances multiply."""
    layers = [drawn(seed) for seed in range(8)]
    shares = []
    passed = np.ones_like(layers[0].image, np.float64)
    for n, layer in enumerate(layers, start=1):
        passed *= layer.image / 255.0
        xyxy = np.concatenate([other.xyxy for other in layers[:n]])
        crowd = Detections(xyxy, np.full(len(xyxy), 0.9, np.float32), np.zeros(len(xyxy), np.int64))
        none = np.zeros(len(xyxy), np.int64)
        cells = Cells(
            crowd, np.ones(len(xyxy), np.float32), none == 0, none, np.zeros((len(xyxy), 4), np.bool_)
        )
        image = (passed / passed.max() * 235).astype(np.uint8)
        shares.append(
            quality.measure(preprocess.view(image, 80.0), cells, 80.0, model_px=40.0, min_score=0.5).glass
        )
    assert shares[0] > 0.5
    assert shares[-1] < 0.15
    assert all(b < a + 0.02 for a, b in pairwise(shares))


def test_a_field_without_cells_is_measured_as_far_as_can_be() -> None:
    white = quality.measure(
        preprocess.view(np.full((120, 160, 3), 255, np.uint8), math.nan),
        Cells.empty(),
        math.nan,
        model_px=40.0,
        min_score=0.5,
    )
    assert (white.bright_level, white.clipped) == (255.0, 1.0)
    assert math.isnan(white.edge_width) and math.isnan(white.confidence) and math.isnan(white.green)
    assert quality.flags(white) == ("overexposed",)
    black = quality.measure(
        preprocess.view(np.zeros((120, 160, 3), np.uint8), math.nan),
        Cells.empty(),
        math.nan,
        model_px=40.0,
        min_score=0.5,
    )
    assert "dark" in quality.flags(black)


@pytest.mark.parametrize("size", [(16, 16), (16, 4000), (40, 41)])
def test_tiny_and_thin_fields_are_no_error(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    box = np.array([[1, 1, 15, 15]], np.float32)
    one = Detections(box, np.full(1, 0.6, np.float32), np.zeros(1, np.int64))
    cells = Cells(
        one, np.ones(1, np.float32), np.ones(1, np.bool_), np.ones(1, np.int64), np.ones((1, 4), np.bool_)
    )
    for diameter in (3.0, 40.0, 900.0):
        measured = quality.measure(
            preprocess.view(image, diameter), cells, diameter, model_px=40.0, min_score=0.5
        )
        assert set(quality.flags(measured)) <= set(quality.FLAGS)


def test_unsure_cells_and_strange_colours_are_unfamiliar() -> None:
    field = drawn()
    assert features(field, score=0.9).confidence == pytest.approx(0.8, abs=1e-6)
    assert "unfamiliar" in quality.flags(features(field, score=0.55))
    turned = features(field, lambda image: np.ascontiguousarray(image[:, :, [1, 0, 2]]))  # green cells
    assert turned.green < features(field).green - 0.05
    grey = features(
        field, lambda image: np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    )
    assert grey.green == pytest.approx(1 / 3, abs=0.001)
    assert quality.flags(grey) == ()  # a monochrome camera is none of the user's fault


def without(field: DrawnField, gone: Bool) -> DrawnField:
    """The drawn field as if these cells had not been found."""
    kept = ~gone
    return replace(
        field, xyxy=field.xyxy[kept], class_id=field.class_id[kept], overlapping=field.overlapping[kept],
        group=field.group[kept],
    )  # fmt: skip


@pytest.mark.parametrize("stain", [CREAM, GREY, ROSE])
def test_cells_outside_all_boxes_are_missed(stain: Stain) -> None:
    field = drawn(stain=stain)
    values = [features(without(field, np.arange(len(field.xyxy)) < n)).missed for n in (0, 2, 4, 6)]
    assert values[0] < 0.02
    assert values == sorted(values) and values[-1] > 0.25
    assert quality.flags(features(without(field, np.arange(len(field.xyxy)) < 4))) == ("missed-cells",)


def test_red_cells_that_are_called_otherwise_are_missed() -> None:
    """White cells and platelets of the size of red cells. A true white cell is larger."""
    field = drawn()
    red = np.flatnonzero(field.class_id == CellClass.RBC)
    for other in (CellClass.WBC, CellClass.PLATELET):
        class_id = field.class_id.copy()
        class_id[red[:5]] = other
        assert "missed-cells" in quality.flags(features(replace(field, class_id=class_id)))
    white = draw_field(
        np.random.default_rng(2), cell_diameter_px=60.0, n_single=10, group_sizes=(2,), n_wbc=4, stain=CREAM
    )
    assert "missed-cells" not in quality.flags(features(white))


def only(field: DrawnField, n: int) -> DrawnField:
    """The drawn field with the first `n` cells, glass in place of the others. All boxes stay."""
    image = np.full_like(field.image, int(np.percentile(field.image, 95)))
    for x0, y0, x1, y1 in field.xyxy[:n].astype(int).tolist():
        image[y0:y1, x0:x1] = field.image[y0:y1, x0:x1]
    return replace(field, image=image)


def test_dust_and_few_cells_are_no_missed_cells() -> None:
    field = only(drawn(), 3)
    for x, y in ((50, 60), (400, 90), (300, 400)):
        cv2.circle(field.image, (x, y), 6, (90, 80, 70), -1)
    assert quality.flags(features(without(field, np.arange(len(field.xyxy)) > 2))) == ()


def test_boxes_on_glass_are_empty() -> None:
    field = drawn()
    assert len(field.xyxy) == 16
    shares = [features(only(field, n)).hollow for n in (16, 14, 10, 6)]
    assert shares[:2] == [0.0, 0.0] and shares[2] < shares[3]
    assert "empty-boxes" in quality.flags(features(only(field, 6)))


def test_doubt_is_how_many_verdicts_are_wrong() -> None:
    field = drawn()
    cells = seen(field)

    def doubt(score: float, overlapping: bool) -> float:
        other = replace(
            cells,
            overlap_score=np.full(len(cells), score, np.float32),
            overlapping=np.full(len(cells), overlapping),
        )
        return quality.measure(
            preprocess.view(field.image, 80.0), other, 80.0, model_px=40.0, min_score=0.5
        ).doubt

    assert doubt(0.0, False) == 0.0
    n = int(np.count_nonzero(field.class_id == CellClass.RBC))
    assert doubt(0.4, False) == pytest.approx(0.4 - 2 / n)
    alone = int(
        np.count_nonzero(~field.overlapping & (field.class_id == 0) & ~cells.touches_edge.any(axis=1))
    )
    assert doubt(1.0, True) == pytest.approx(max(alone - 2, 0) / n, abs=0.15)  # two boxes may just meet
    assert doubt(1.0, True) > 0.22


def test_cells_side_by_side_are_no_thick_smear() -> None:
    """Hardly any glass, but light passes one cell only."""
    image = np.full((480, 640, 3), 225, np.uint8)
    boxes_ = [(x, y, x + 58, y + 58) for y in range(2, 420, 60) for x in range(2, 580, 60)]
    for x0, y0, _, _ in boxes_:
        cv2.rectangle(image, (x0, y0), (x0 + 58, y0 + 58), (190, 150, 160), -1)
    n = len(boxes_)
    found = Detections(np.array(boxes_, np.float32), np.full(n, 0.9, np.float32), np.zeros(n, np.int64))
    cells = Cells(
        found, np.zeros(n, np.float32), np.zeros(n, np.bool_), np.zeros(n, np.int64),
        np.zeros((n, 4), np.bool_),
    )  # fmt: skip

    def flagged(picture: UInt8) -> tuple[str, ...]:
        view = preprocess.view(picture, 58.0)
        return quality.flags(quality.measure(view, cells, 58.0, model_px=40.0, min_score=0.5))

    assert "crowded" not in flagged(image)
    over = image.astype(np.float64) / 225  # the same cells, half a cell further, under them
    passed = over * np.roll(over, (29, 29), axis=(0, 1))
    assert "crowded" in flagged((passed * 225).astype(np.uint8))


def exchanged(image: UInt8) -> UInt8:
    return np.ascontiguousarray(image[..., ::-1])


def grey_only(image: UInt8) -> UInt8:
    return np.repeat(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)[..., None], 3, axis=2)


def dithered(image: UInt8) -> UInt8:
    return np.stack(
        [np.asarray(Image.fromarray(image[..., c]).convert("1"), np.uint8) * 255 for c in range(3)], axis=-1
    )


@pytest.mark.parametrize("stain", [CREAM, GREY, ROSE])
def test_colours_of_no_camera_are_flagged(stain: Stain) -> None:
    """Whether the networks find cells in them or not."""
    field = draw_field(
        np.random.default_rng(3), cell_diameter_px=60.0, n_single=10, n_wbc=2, n_platelets=3, stain=stain
    )
    for fine in (lambda image: image, grey_only):
        assert quality.flags(features(field, fine)) == ()
    changes: list[Change] = [dithered, lambda image: dithered(grey_only(image))]
    changes += [gain(*f) for f in ((1, 0.2, 0.2), (0.2, 1, 0.2), (0.2, 0.2, 1))]
    for change in changes:
        assert "colours" in quality.flags(features(field, change))
        found = replace(
            field, xyxy=field.xyxy[:0], class_id=field.class_id[:0], overlapping=field.overlapping[:0]
        )
        assert "colours" in quality.flags(features(replace(found, group=field.group[:0]), change))
    # A purple stain (ROSE) is as likely with its colours exchanged.
    assert ("colours" in quality.flags(features(field, exchanged))) == (stain is not ROSE)


def noisy(spread: float) -> Change:
    rng = np.random.default_rng(0)
    return lambda image: np.clip(image + rng.normal(0, spread, image.shape), 0, 255).astype(np.uint8)


def test_noise_and_small_cells_are_no_dithering() -> None:
    assert features(drawn(), noisy(5.0)).grain < 0.035
    assert features(drawn(diameter_px=15.0)).grain < 0.035


def line_drawing(image: UInt8) -> UInt8:
    edges = cv2.Canny(cv2.GaussianBlur(grey_only(image), (0, 0), 2), 15, 40)
    return np.repeat(
        255 - np.asarray(cv2.dilate(edges, np.ones((2, 2), np.uint8)), np.uint8)[..., None], 3, 2
    )


@pytest.mark.parametrize(
    "change", [lambda image: 255 - image, lambda image: 255 - grey_only(image), line_drawing]
)
@pytest.mark.parametrize("stain", [CREAM, GREY, ROSE])
def test_negatives_and_drawings_are_flagged(stain: Stain, change: Change) -> None:
    """With the shipped bundle: it finds cells in them, and is unsure."""
    field = draw_field(np.random.default_rng(1), cell_diameter_px=60.0, stain=stain)
    assert open_analyzer(None, threads=1).count_image(np.asarray(change(field.image), np.uint8)).flags


def test_bounds_raise_flags_and_what_is_not_known_raises_none() -> None:
    assert quality.flags(FINE) == ()
    for rule in quality.RULES:
        at = replace(FINE, **{rule.feature: rule.bound})
        assert quality.flags(at) == ()
        beyond = rule.bound * (1.01 if rule.above else 0.99)
        assert quality.flags(replace(FINE, **{rule.feature: beyond})) == (rule.flag,)
    assert quality.flags(Features(*[math.nan] * 16)) == ()


def test_every_flag_is_explained() -> None:
    others = {"clump", "no-red-cells", "pixel-size", "round-field", "scale-mismatch"}
    assert {rule.flag for rule in quality.RULES} | others == set(quality.FLAGS)
    assert list(quality.FLAGS) == sorted(quality.FLAGS)
    for flag, meaning in quality.FLAGS.items():
        assert re.fullmatch("[a-z]+(-[a-z]+)*", flag)
        assert meaning[0].isupper() and meaning.endswith(".") and ";" not in flag


def test_the_page_of_the_tables_names_every_flag() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tables.md").read_text(encoding="utf-8")
    words = page.partition("## Words in `quality_flags`")[2]
    assert re.findall(r"^\| `([a-z-]+)` \|", words, re.M) == sorted(quality.FLAGS)


def test_threads_may_share_it() -> None:
    field = drawn()
    alone = features(field)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: features(field), range(40))) == {alone}


def test_the_analyzer_raises_them_and_they_change_no_count(
    toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    analyzer = Analyzer(Bundle.open(toy_bundle_path), threads=1)
    given = Scale(40.0, ScaleSource.CELL_DIAMETER)
    field = max(drawn_fields, key=lambda drawn: drawn.counts.n_rbc)
    dim = vignette(0.9)(field.image)
    result = analyzer.analyze(FieldOfView.of(dim), given)
    assert "uneven-light" in result.quality_flags
    assert list(result.quality_flags) == sorted(result.quality_flags)
    monkeypatch.setattr(quality, "flags", lambda _: ())
    without = analyzer.analyze(FieldOfView.of(dim), given)
    assert "uneven-light" not in without.quality_flags
    np.testing.assert_array_equal(result.cells.detections.xyxy, without.cells.detections.xyxy)
    assert len(without.cells) > 5

"""The overlap classifier of a bundle: order, batches, nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.errors import BundleError
from rbc_edge.ops.synthetic import CREAM, draw_field
from rbc_edge.values import SHAPES, Morphology, Shape, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import Classifier
from rbc_edge.vision.morphology import N_SIGNS, signs


@pytest.fixture(scope="module")
def classifier(toy_bundle_path: Path) -> Classifier:
    return Classifier(Bundle.open(toy_bundle_path), threads=1)


def noise(n: int) -> UInt8:
    return np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3)).astype(np.uint8)


def test_no_crops_give_no_scores(classifier: Classifier) -> None:
    for scores, shape in zip(classifier.scores(noise(0)), [(0,), (0,), (0, 3)], strict=True):
        assert scores.shape == shape
        assert scores.dtype == np.float32


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_batches_change_no_score_and_no_order(classifier: Classifier, n: int) -> None:
    crops = noise(n)
    scores = classifier.scores(crops)
    for one in scores:
        assert len(one) == n
        assert one.dtype == np.float32
    for i in {0, n // 2, min(255, n - 1), min(256, n - 1), n - 1}:
        alone = classifier.scores(crops[i : i + 1])
        for all_of_it, its_own in zip(scores, alone, strict=True):
            assert all_of_it[i] == pytest.approx(its_own[0], abs=1e-6)


def test_only_shapes_depend_on_the_size_of_a_box(classifier: Classifier) -> None:
    crops = noise(8)
    plain, long = classifier.scores(crops), classifier.scores(crops, np.array([[1.6, 0.8]] * 8, np.float32))
    np.testing.assert_array_equal(plain.overlap, long.overlap)
    np.testing.assert_array_equal(plain.refuse, long.refuse)
    assert [SHAPES[i] for i in classifier.shapes(long.shape)[0]] == [Shape.ELLIPTOCYTE] * 8


def test_a_shape_below_the_bound_is_not_sure(classifier: Classifier) -> None:
    bound = 0.6  # of the toy bundle
    score = np.array([[bound, 0.3, 0.1], [0.5, 0.3, 0.2], [np.nan] * 3], np.float32)
    shape, best, is_sure = classifier.shapes(score)
    assert shape.tolist() == [SHAPES.index(Shape.NORMAL)] * 2 + [-1]
    assert best[:2] == pytest.approx([bound, 0.5])
    assert np.isnan(best[2])
    assert is_sure.tolist() == [True, False, False]


def test_a_bundle_may_know_no_shapes(toy_bundle_path: Path) -> None:
    opened = Bundle.open(toy_bundle_path)
    plain = Classifier(replace(opened, manifest=replace(opened.manifest, shapes=())), threads=1)
    scores = plain.scores(noise(5), np.ones((5, 2), np.float32))
    assert scores.shape.shape == (5, 0)
    shape, best, is_sure = plain.shapes(scores.shape)
    assert shape.tolist() == [-1] * 5
    assert np.isnan(best).all()
    assert not is_sure.any()


def test_a_bundle_with_an_unknown_shape_is_refused(toy_bundle_path: Path) -> None:
    opened = Bundle.open(toy_bundle_path)
    with pytest.raises(BundleError, match="sickle"):
        Classifier(replace(opened, manifest=replace(opened.manifest, shapes=("normal", "sickle"))), threads=1)


def test_the_bundle_says_margin_and_threshold(classifier: Classifier, toy_bundle_path: Path) -> None:
    manifest = Bundle.open(toy_bundle_path).manifest
    assert (classifier.margin, classifier.threshold) == (manifest.crop_margin, manifest.overlap_threshold)


@pytest.mark.parametrize(("threshold", "refused"), [(0.0, [0, 1, 2]), (0.5, [1, 2]), (0.75, [2]), (1.0, [])])
def test_a_threshold_of_1_refuses_nothing(
    toy_bundle_path: Path, threshold: float, refused: list[int]
) -> None:
    toy = Bundle.open(toy_bundle_path)
    manifest = replace(toy.manifest, refuse_threshold=threshold)
    classifier = Classifier(Bundle(toy.path, manifest), threads=1)
    scores = np.array([0.0, 0.5, 1.0, np.nan], np.float32)
    assert np.flatnonzero(classifier.refuses(scores)).tolist() == refused


def test_a_cell_with_a_neighbour_scores_higher_than_one_alone(classifier: Classifier) -> None:
    fields = [
        draw_field(
            np.random.default_rng(seed),
            width_px=256,
            height_px=192,
            cell_diameter_px=40.0,
            n_single=2,
            group_sizes=(2,),
            n_wbc=0,
            n_platelets=0,
            stain=CREAM,
        )
        for seed in range(5)
    ]
    scores = np.concatenate(
        [
            classifier.overlap_score(preprocess.crops(f.image, f.xyxy, margin=classifier.margin))
            for f in fields
        ]
    )
    overlapping = np.concatenate([f.overlapping for f in fields])
    assert np.median(scores[overlapping]) > classifier.threshold > np.median(scores[~overlapping])


def weighted(toy_bundle_path: Path) -> Classifier:
    """The toy, with weights that call every cell an elliptocyte that is measured as twice as long as wide."""
    weights = np.zeros((3 + N_SIGNS + 1, 3))
    weights[:3] = np.eye(3)
    weights[3, 1], weights[-1, 1] = 40.0, -20.0  # of log(length / width); at 1.65 nothing changes
    opened = Bundle.open(toy_bundle_path)
    manifest = replace(opened.manifest, shape_weights=tuple(map(tuple, weights.tolist())))
    return Classifier(replace(opened, manifest=manifest), threads=1)


def form(aspect_ratio: float) -> Morphology:
    one = (np.full(1, v, np.float32) for v in (np.nan, 900.0, aspect_ratio, 0.9, 0.1))
    score, *measures = one
    return Morphology(np.zeros(1, np.int64), score, np.zeros(1, np.bool_), *measures)


def test_what_is_measured_decides_with_the_network(toy_bundle_path: Path) -> None:
    said = np.array([[0.5, 0.4, 0.1]], np.float32)
    classifier = weighted(toy_bundle_path)
    for aspect_ratio, shape in ((1.0, Shape.NORMAL), (2.0, Shape.ELLIPTOCYTE)):
        known = classifier.informed(said, signs(form(aspect_ratio), 34.0))
        assert known.sum() == pytest.approx(1)
        assert SHAPES[classifier.shapes(known)[0][0]] is shape


def test_what_is_not_measured_changes_nothing(classifier: Classifier, toy_bundle_path: Path) -> None:
    said = np.array([[0.5, 0.4, 0.1], [np.nan] * 3], np.float32)
    unmeasured = signs(Morphology.unknown(2), 34.0)
    np.testing.assert_array_equal(weighted(toy_bundle_path).informed(said, unmeasured), said)
    measured = np.repeat(signs(form(2.0), 34.0), 2, axis=0)
    np.testing.assert_array_equal(classifier.informed(said, measured), said)  # a bundle without weights
    assert np.isnan(weighted(toy_bundle_path).informed(said, measured)[1]).all()  # no red cell


def test_weights_of_another_size_are_refused(toy_bundle_path: Path) -> None:
    opened = Bundle.open(toy_bundle_path)
    odd = replace(opened, manifest=replace(opened.manifest, shape_weights=((1.0,),)))
    with pytest.raises(BundleError, match="weights of shapes"):
        Classifier(odd, threads=1)

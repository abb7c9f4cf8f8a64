"""Trials: disturbances leave the form alone, and counts are compared with the right thing."""

from pathlib import Path

import numpy as np
import pytest
from tiny_data import TinyData

from rbc_edge.analyzer import Analyzer
from rbc_edge.bundle import Bundle
from rbc_train import datasets, trials

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"


def test_disturbances_keep_the_image_s_form_and_the_first_is_none() -> None:
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    names = list(trials.DISTURBANCES)
    assert names[0] == "none"
    for name, disturb in trials.DISTURBANCES.items():
        before = image.copy()
        disturbed = disturb(image)
        assert disturbed.shape == image.shape and disturbed.dtype == np.uint8
        assert np.array_equal(disturbed, image) is (name == "none")
        np.testing.assert_array_equal(image, before)


def test_the_toy_counts_alike_under_another_lamp(data: TinyData) -> None:
    photographs = datasets.read_public(data.folder)[0].of("val")
    tried = {t.name: t for t in trials.try_disturbances(Analyzer(Bundle.open(TOY), threads=1), photographs)}
    assert list(tried) == list(trials.DISTURBANCES)
    assert tried["none"].n_rbc > 5
    assert tried["blue cast"].n_rbc == pytest.approx(tried["none"].n_rbc, abs=2)
    assert 0 < tried["none"].n_overlapping < tried["none"].n_rbc


def test_a_scale_trial_measures_against_the_labels(data: TinyData) -> None:
    photographs = datasets.read_public(data.folder)[0].of("val")
    one, twice = trials.try_scales(Analyzer(Bundle.open(TOY), threads=1), photographs, (1.0, 2.0))
    assert (one.factor, twice.factor, one.n_fields) == (1.0, 2.0, len(photographs))
    assert one.n_rbc > 5
    for trial in (one, twice):
        assert 0.75 < trial.ratio_low <= trial.ratio_median <= trial.ratio_high < 4 / 3
        assert trial.n_off == 0

"""Corruptions: images keep their form, and only what has a target is judged."""

from pathlib import Path

import numpy as np
import pytest
from tiny_data import TinyData

from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train.data import read_public
from studies import corruptions

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"


def test_corruptions_keep_the_image_s_form_and_the_first_is_none() -> None:
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    names = list(corruptions.CORRUPTIONS)
    assert names[0] == "none"
    for name, corrupt in corruptions.CORRUPTIONS.items():
        before = image.copy()
        corrupted = corrupt(image)
        assert corrupted.shape == image.shape and corrupted.dtype == np.uint8
        assert np.array_equal(corrupted, image) is (name == "none")
        np.testing.assert_array_equal(image, before)


def test_the_toy_counts_alike_under_another_lamp(data: TinyData) -> None:
    photographs = read_public(data.folder)[0].of("val")
    analyzer = Analyzer(Bundle.open(TOY), threads=1)
    tried = {t.name: t for t in corruptions.try_corruptions(analyzer, photographs)}
    assert list(tried) == list(corruptions.CORRUPTIONS)
    assert tried["none"].n_rbc > 5
    assert tried["blue cast"].n_rbc == pytest.approx(tried["none"].n_rbc, abs=2)
    assert 0 < tried["none"].n_overlapping < tried["none"].n_rbc
    assert all(t.n_rbc_of_source == {"pbc": t.n_rbc} for t in tried.values())


def test_the_section_says_the_change_and_only_what_is_targeted_is_judged() -> None:
    tried = [
        corruptions.CorruptionTrial(name, n, 50, 0, {"a": n})
        for name, n in (("none", 100), ("red cast", 99), ("strong blur", 80))
    ]
    section = corruptions.section(tried, n_photographs=12, bundle_id="id")
    assert section.data["changes"] == {"red cast": pytest.approx(-0.01)}
    assert section.tables[0].rows[2] == ("strong blur", "80", "-20.0 %", "-20.0 %", "+0.0 %", "–", "–")
    assert set(corruptions.TARGETED) < set(corruptions.CORRUPTIONS)

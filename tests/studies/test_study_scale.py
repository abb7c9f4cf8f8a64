"""Trials: disturbances leave the form alone, and counts are compared with the right thing."""

import math
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import pytest
from tiny_data import TinyData, write_image

from rbc_edge.values import Cells, Detections, FieldOfView, FovResult, Scale, ScaleSource
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train.data import Photograph, read_public

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
    photographs = read_public(data.folder)[0].of("val")
    tried = {t.name: t for t in trials.try_disturbances(Analyzer(Bundle.open(TOY), threads=1), photographs)}
    assert list(tried) == list(trials.DISTURBANCES)
    assert tried["none"].n_rbc > 5
    assert tried["blue cast"].n_rbc == pytest.approx(tried["none"].n_rbc, abs=2)
    assert 0 < tried["none"].n_overlapping < tried["none"].n_rbc
    assert all(t.n_rbc_of_source == {"pbc": t.n_rbc} for t in tried.values())


def test_a_scale_trial_measures_against_the_labels(data: TinyData) -> None:
    photographs = read_public(data.folder)[0].of("val")
    one, twice = trials.try_scales(Analyzer(Bundle.open(TOY), threads=1), photographs, (1.0, 2.5))
    assert (one.factor, twice.factor, one.n_fields) == (1.0, 2.5, len(photographs))
    assert one.n_rbc > 5
    for trial in (one, twice):
        assert 0.75 < trial.ratio_low <= trial.ratio_median <= trial.ratio_high < 4 / 3
        assert trial.n_off == 0
        assert trial.n_rbc_of_source == {"pbc": trial.n_rbc}


class _Blobs:
    """An analyzer that takes every dark blob for a red cell, and their median for the scale."""

    def analyze(self, field: FieldOfView, given: Scale) -> FovResult:
        dark = (field.image[:, :, 0] < 128).astype(np.uint8)
        box = cv2.connectedComponentsWithStats(dark)[2][1:, :4].astype(np.float32)
        xyxy = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)
        n, (height, width) = len(xyxy), dark.shape
        scale = (
            Scale(float(np.median(box[:, 2:])), ScaleSource.FIELD)
            if math.isnan(given.cell_diameter_px)
            else given
        )
        found = Detections(xyxy, np.ones(n, np.float32), np.zeros(n, np.int64))
        none = np.zeros(n, np.int64)
        cells = Cells(found, np.zeros(n, np.float32), none > 0, none, np.zeros((n, 4), np.bool_))
        return FovResult(width, height, scale, cells)


def test_a_field_in_a_slide_of_another_scale_is_put_right_when_it_has_its_own(tmp_path: Path) -> None:
    image = np.full((160, 200, 3), 255, np.uint8)
    boxes = np.array([(x, 20, x + 20, 40) for x in (20, 60, 100)], np.float32)
    for x0, y0, x1, y1 in boxes.astype(int).tolist():
        image[y0:y1, x0:x1] = 0
    write_image(tmp_path / "p.png", image)
    rbc, thumbnail = np.zeros(3, np.int64), np.zeros((32, 32), np.float32)
    one = Photograph(tmp_path / "p.png", "p", "pbc", "val", 200, 160, boxes, rbc, thumbnail)
    told: list[Scale] = []

    class Doubting(_Blobs):
        """Believes no scale over 50."""

        def analyze(self, field: FieldOfView, given: Scale) -> FovResult:
            told.append(given)
            return super().analyze(field, given if given.cell_diameter_px < 50 else trials._UNKNOWN)

    right, twice, thrice = trials.try_strays(cast(Analyzer, Doubting()), [one], (1.0, 2.0, 3.0))
    assert told == [Scale(20.0 * f, ScaleSource.SLIDE) for f in (1, 2, 3)]
    assert [t.n_own for t in (right, twice, thrice)] == [0, 0, 1]
    assert all((t.n_rbc, t.n_rbc_of_source, t.n_fields) == (3, {"pbc": 3}, 1) for t in (right, twice, thrice))


def test_a_mosaic_is_compared_with_its_parts(tmp_path: Path) -> None:
    """Squares of 20 px: five whole ones, and one cut by the border that its mirror image completes."""
    corners = [(30, 20), (90, 25), (150, 30), (35, 100), (100, 110), (190, 60)]
    image = np.full((160, 200, 3), 255, np.uint8)
    boxes = np.array([(x, y, min(x + 20, 200), y + 20) for x, y in corners], np.float32)
    for x0, y0, x1, y1 in boxes.astype(int).tolist():
        image[y0:y1, x0:x1] = 0
    write_image(tmp_path / "p.png", image)
    rbc, thumbnail = np.zeros(6, np.int64), np.zeros((32, 32), np.float32)
    one = Photograph(tmp_path / "p.png", "p", "pbc", "val", 200, 160, boxes, rbc, thumbnail)
    (trial,) = trials.try_mosaics(cast(Analyzer, _Blobs()), [one], megapixels=0.16)
    # Two by two: as it is, mirrored, upside down, both.
    assert (trial.source, trial.width_px, trial.height_px, trial.n_parts) == ("pbc", 420, 340, 4)
    assert (trial.labelled_px, trial.estimated_px) == (20.0, 20.0)
    assert (trial.labelled, trial.parts) == (24, 24)
    assert trial.mosaic == 24  # no halves of strangers became one


def test_sections_say_the_change_and_only_what_is_targeted_is_judged() -> None:
    plain = trials.ScaleTrial(1.0, 4, 200, 0.9, 1.0, 1.1, 0, {"a": 50, "b": 150})
    small = trials.ScaleTrial(0.3, 4, 197, 0.9, 1.0, 1.2, 1, {"a": 50, "b": 147})
    stray = [trials.StrayTrial(f, 4, k, n, {"a": n}) for f, k, n in ((1.0, 0, 50), (0.5, 4, 49))]
    tiled = trials.MosaicTrial("a", 4000, 5000, 9, 100.0, 98.0, 52, 50, 49)
    section = trials.scale_section([plain, small], stray, [tiled], "id", every=8)
    assert section.command == "python -m rbc_train scale --every 8"
    assert trials.scale_section([plain], [], [], "id").command == "python -m rbc_train scale"
    assert section.data["changes"] == {"0.3": pytest.approx(-0.015)}
    assert section.data["mosaic_changes"] == {"a": pytest.approx(-0.02)}
    assert section.tables[0].rows[1][:5] == ("0.3", "197", "-1.5 %", "+0.0 %", "-2.0 %")
    assert section.tables[1].rows[1] == ("0.5", "4", "49", "-2.0 %", "-2.0 %")
    assert section.tables[2].rows[0][-1] == "-2.0 %"
    tried = [
        trials.DisturbanceTrial(name, n, 50, 0, {"a": n})
        for name, n in (("none", 100), ("red cast", 99), ("strong blur", 80))
    ]
    section = trials.disturbance_section(tried, 12, "id")
    assert section.data["changes"] == {"red cast": pytest.approx(-0.01)}
    assert section.tables[0].rows[2] == ("strong blur", "80", "-20.0 %", "-20.0 %", "+0.0 %", "–", "–")
    assert set(trials.TARGETED) < set(trials.DISTURBANCES)

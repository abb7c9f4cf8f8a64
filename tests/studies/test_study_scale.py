"""Scale: what is estimated is compared with the labels, and a large field with its parts."""

import math
from functools import partial
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import pytest
from command import called, rbc_train
from tiny_data import TinyData, write_image

from rbc_edge.values import Cells, Detections, FieldOfView, FovResult, Scale, ScaleSource
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train.data import Photograph, read_public
from studies import corruptions, scale

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"


def test_a_scale_trial_measures_against_the_labels(data: TinyData) -> None:
    photographs = read_public(data.folder)[0].of("val")
    one, twice = scale.try_scales(Analyzer(Bundle.open(TOY), threads=1), photographs, (1.0, 2.5))
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
            return super().analyze(field, given if given.cell_diameter_px < 50 else scale._UNKNOWN)

    right, twice, thrice = scale.try_strays(cast(Analyzer, Doubting()), [one], (1.0, 2.0, 3.0))
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
    (trial,) = scale.try_mosaics(cast(Analyzer, _Blobs()), [one], megapixels=0.16)
    # Two by two: as it is, mirrored, upside down, both.
    assert (trial.source, trial.width_px, trial.height_px, trial.n_parts) == ("pbc", 420, 340, 4)
    assert (trial.labelled_px, trial.estimated_px) == (20.0, 20.0)
    assert (trial.labelled, trial.parts) == (24, 24)
    assert trial.mosaic == 24  # no halves of strangers became one


def test_the_section_says_the_change() -> None:
    plain = scale.ScaleTrial(1.0, 4, 200, 0.9, 1.0, 1.1, 0, {"a": 50, "b": 150})
    small = scale.ScaleTrial(0.3, 4, 197, 0.9, 1.0, 1.2, 1, {"a": 50, "b": 147})
    stray = [scale.StrayTrial(f, 4, k, n, {"a": n}) for f, k, n in ((1.0, 0, 50), (0.5, 4, 49))]
    tiled = scale.MosaicTrial("a", 4000, 5000, 9, 100.0, 98.0, 52, 50, 49)
    section = scale.section([plain, small], stray, [tiled], bundle_id="id", every=8)
    assert section.command == "python -m studies.scale --every 8"
    assert scale.section([plain], [], [], bundle_id="id").command == "python -m studies.scale"
    assert section.data["changes"] == {"0.3": pytest.approx(-0.015)}
    assert section.data["mosaic_changes"] == {"a": pytest.approx(-0.02)}
    assert section.tables[0].rows[1][:5] == ("0.3", "197", "-1.5 %", "+0.0 %", "-2.0 %")
    assert section.tables[1].rows[1] == ("0.5", "4", "49", "-2.0 %", "-2.0 %")
    assert section.tables[2].rows[0][-1] == "-2.0 %"


def test_scale_and_corruptions_publish_what_the_targets_read(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "try_scales", partial(scale.try_scales, factors=(1.0, 1.5)))
    monkeypatch.setattr(scale, "try_strays", partial(scale.try_strays, factors=(1.0,)))
    monkeypatch.setattr(scale, "try_mosaics", partial(scale.try_mosaics, megapixels=0.1))
    folder = tmp_path / "docs" / "results"
    rest = ("--bundle", TOY, "--data", data.folder, "--out", folder, "--threads", 1)
    code, out, _ = called(scale.app, monkeypatch, capsys, *rest)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "factor",
        "1.00",
        "1.50",
        "slide",
        "1.00",
        "mosaic",
        "pbc",
    ]
    code, out, _ = called(corruptions.app, monkeypatch, capsys, *rest, "--every", 2)
    assert code == 0
    assert out.startswith("1 photographs")
    assert "python -m studies.corruptions --every 2`" in (tmp_path / "docs" / "results.md").read_text()
    code, out, _ = rbc_train(monkeypatch, capsys, "evaluate", *rest)
    assert code == 0
    measured = {line.split("  ")[0]: line for line in out.splitlines() if line.startswith("count change")}
    assert len(measured) == 3
    assert not any("not run" in line for line in measured.values())

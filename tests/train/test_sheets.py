"""Sheets of the worst: who is on them, in which order, and what is drawn."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_evaluate import examined, lattice
from tiny_data import write_image

from rbc_edge.errors import UnavailableError
from rbc_edge.values import Float32, UInt8
from rbc_train import sheets
from rbc_train.evaluate import Examined
from rbc_train.labels import VerifiedLabel, VerifiedLabels

TILE = sheets._CROP_PX + sheets._TITLE_PX + 4


def photographed(
    folder: Path, truth: Float32, found: Float32, overlapping: list[bool], scores: list[float]
) -> tuple[Examined, VerifiedLabels]:
    """A white photograph with verified labels for its first boxes."""
    write_image(folder / "x.png", np.full((400, 400, 3), 255, np.uint8))
    one = examined(truth, found, [0.9] * len(found), overlapping=overlapping, found_score=scores)
    one = replace(one, photograph=replace(one.photograph, image_path=folder / "x.png"))
    rows = [
        VerifiedLabel("x.png", "pbc", (x0, y0, x1, y1), "O", "overlapping" if o else "single", 1)
        for (x0, y0, x1, y1), o in zip(truth.tolist(), overlapping, strict=False)
    ]
    return one, VerifiedLabels(rows)


def test_only_wrong_verdicts_are_shown_by_kind(tmp_path: Path) -> None:
    boxes = lattice(5)
    one, verified = photographed(
        tmp_path, boxes, boxes, [True, True, False, False, True], [0.2, 0.9, 0.8, 0.1, 0.4]
    )
    missed = sheets.worst_verdicts([one], verified, 0.5, overlapping=True)
    false = sheets.worst_verdicts([one], verified, 0.5, overlapping=False)
    assert missed is not None and false is not None
    assert missed.shape[:2] == (TILE, 2 * (sheets._CROP_PX + 4))
    assert false.shape[:2] == (TILE, sheets._CROP_PX + 4)
    assert sheets.worst_verdicts([one], verified, 0.05, overlapping=True) is None


def test_the_most_wrong_come_first_and_no_more_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    whole = sheets._titled

    def titled(image: UInt8, title: str) -> UInt8:
        titles.append(title)
        return whole(image, title)

    monkeypatch.setattr(sheets, "_titled", titled)
    boxes = lattice(4)
    one, verified = photographed(tmp_path, boxes, boxes, [True] * 4, [0.3, 0.1, 0.45, 0.2])
    sheets.worst_verdicts([one], verified, 0.5, overlapping=True, most=3)
    assert titles == ["0.10 O pbc", "0.20 O pbc", "0.30 O pbc"]
    titles.clear()
    one, verified = photographed(tmp_path, boxes, boxes, [False] * 4, [0.6, 0.9, 0.7, 0.2])
    sheets.worst_verdicts([one], verified, 0.5, overlapping=False)
    assert titles == ["0.90 O pbc", "0.70 O pbc", "0.60 O pbc"]


def test_fields_show_found_missed_and_false_boxes(tmp_path: Path) -> None:
    truth = lattice(10)
    found = np.concatenate([truth[:5], lattice(1, first=50)])
    one, _ = photographed(tmp_path, truth, found, [], [])
    right, _ = photographed(tmp_path, truth, truth, [], [])
    sheet = sheets.worst_fields([right, one])
    assert sheet is not None
    assert sheet.shape[1] == sheets._FIELD_PX + 4  # the photograph that is right is not there
    for colour in (sheets._FOUND, sheets._MISSED, sheets._FALSE):
        assert (sheet == np.array(colour)).all(axis=2).any()
    assert sheets.worst_fields([right]) is None


def test_sheets_are_written_and_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    boxes = lattice(3)
    one, verified = photographed(tmp_path, boxes, boxes[:2], [True, False, True], [0.1, 0.9, 0.9])
    files = sheets.write([one], verified, 0.5, tmp_path / "out")
    assert [f.name for f in files] == ["worst-singles.png", "worst-overlapping.png", "worst-fields.png"]
    assert all(cv2.imread(str(f)) is not None for f in files)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="--sheets"):
        sheets.write([one], verified, 0.5, tmp_path / "file")

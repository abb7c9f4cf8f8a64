"""The thresholds of a finished bundle, chosen again: on its own laboratories, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_data import TinyData

from rbc_edge.vision import selftest
from rbc_edge.vision.bundle import Bundle
from rbc_train import thresholds
from rbc_train.data import Photograph, read_public

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


@pytest.fixture
def photographs(data: TinyData) -> list[Photograph]:
    return read_public(data.folder)[0].photographs


def test_only_thresholds_change(photographs: list[Photograph], tmp_path: Path) -> None:
    toy, said = Bundle.open(TOY), list[str]()
    made = thresholds.again(toy, photographs, tmp_path / "again", said.append, threads=1)
    old, new = toy.manifest, made.manifest
    assert [line.split()[0] for line in said] == ["scores", "overlap", "refuse", "shape"]
    assert new.bundle_id != old.bundle_id and old.bundle_id in new.calibration["thresholds"]
    assert {n: h for n, h in new.files.items() if n.endswith("onnx")} == {
        n: h for n, h in old.files.items() if n.endswith("onnx")
    }
    same = replace(
        new,
        score_threshold=old.score_threshold, overlap_threshold=old.overlap_threshold,
        refuse_threshold=old.refuse_threshold, metrics=old.metrics, calibration=old.calibration,
        files=old.files, bundle_id=old.bundle_id,
    )  # fmt: skip
    assert same == old
    assert selftest.verify(made, threads=1).n_unmatched == 0


def test_more_cells_that_are_labelled_lower_the_threshold(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    """A cell without a box is a cell, too."""
    toy = Bundle.open(TOY)
    made = thresholds.again(toy, photographs, tmp_path / "a", lambda _: None, threads=1)
    lacking = [
        replace(p, xyxy=p.xyxy[::2], class_id=p.class_id[::2], unboxed=np.zeros((0, 4), np.float32))
        for p in photographs
    ]
    higher = thresholds.again(toy, lacking, tmp_path / "b", lambda _: None, threads=1)
    assert higher.manifest.score_threshold[0] > made.manifest.score_threshold[0]
    without = [
        replace(p, unboxed=q.xyxy[1::2][q.class_id[1::2] == 0])
        for p, q in zip(lacking, photographs, strict=True)
    ]
    again = thresholds.again(toy, without, tmp_path / "c", lambda _: None, threads=1)
    assert again.manifest.score_threshold[0] < higher.manifest.score_threshold[0]

"""The bundle's self-test: which machines pass, and which tests are broken."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbc_edge.errors import BundleError
from rbc_edge.vision import bundle
from rbc_edge.vision.bundle import CLASSIFIER, DETECTOR, TEST_EXPECTED, TEST_INPUT, Bundle
from rbc_edge.vision.selftest import verify

N_TEST_CELLS = 9
"""What the toy bundle sees on its own test field."""


def test_a_bundle_passes_its_own_test(toy_bundle_path: Path) -> None:
    seen = verify(Bundle.open(toy_bundle_path), threads=1)
    assert seen.n_expected == seen.n_found == N_TEST_CELLS
    assert seen.n_unmatched == 0
    assert seen.box_error_px < 0.01
    # 0.0125 on Arm: its kernels round differently. A box moves by a thousandth of a pixel, and a crop by one.
    assert seen.score_error < 0.02


def changed(path: Path, tmp_path: Path, **changes: Any) -> Bundle:
    """An intact bundle whose test expects something else."""
    copy = Path(shutil.copytree(path, tmp_path / "bundle"))
    expected = json.loads((copy / TEST_EXPECTED).read_text()) | changes
    (copy / TEST_EXPECTED).write_text(json.dumps(expected))
    source = {name: copy / name for name in (DETECTOR, CLASSIFIER, TEST_INPUT, TEST_EXPECTED)}
    return bundle.write(copy, source, Bundle.open(path).manifest)


def expected_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / TEST_EXPECTED).read_text())
    return content


def test_another_processor_may_differ_a_little(toy_bundle_path: Path, tmp_path: Path) -> None:
    expected = expected_of(toy_bundle_path)
    opened = changed(
        toy_bundle_path,
        tmp_path,
        xyxy=(np.array(expected["xyxy"]) + 2.0).tolist(),
        overlap_score=[None if s is None else min(1, s + 0.1) for s in expected["overlap_score"]],
        score=(np.array(expected["score"]) - 0.05).tolist(),
    )
    seen = verify(opened, threads=1)
    assert seen.n_unmatched == 0
    assert seen.box_error_px == pytest.approx(2.0, abs=0.01)
    assert seen.score_error == pytest.approx(0.1, abs=0.01)


def test_a_doubtful_cell_may_come_or_go(toy_bundle_path: Path, tmp_path: Path) -> None:
    """The cell with score 0.37 is near the threshold of 0.3."""
    expected = expected_of(toy_bundle_path)
    doubtful = int(np.argmin(expected["score"]))
    fewer = {
        k: [v for i, v in enumerate(expected[k]) if i != doubtful]
        for k in ("xyxy", "class_id", "score", "overlap_score")
    }
    seen = verify(changed(toy_bundle_path, tmp_path, **fewer), threads=1)
    assert (seen.n_expected, seen.n_found, seen.n_unmatched) == (N_TEST_CELLS - 1, N_TEST_CELLS, 0)


def test_a_box_near_the_threshold_may_be_refused_on_one_of_them(
    toy_bundle_path: Path, tmp_path: Path
) -> None:
    expected = expected_of(toy_bundle_path)
    seen = verify(changed(toy_bundle_path, tmp_path, **without_a_clear_cell(expected), n_refused=1))
    assert (seen.n_expected, seen.n_found, seen.n_unmatched) == (N_TEST_CELLS - 1, N_TEST_CELLS, 1)


def without_a_clear_cell(expected: dict[str, Any]) -> dict[str, Any]:
    best = int(np.argmax(expected["score"]))
    return {
        k: [v for i, v in enumerate(expected[k]) if i != best]
        for k in ("xyxy", "class_id", "score", "overlap_score")
    }


def with_a_clear_cell_more(expected: dict[str, Any]) -> dict[str, Any]:
    more = {"xyxy": [140.0, 110.0, 180.0, 150.0], "class_id": 0, "score": 0.9, "overlap_score": 0.1}
    return {k: [*expected[k], v] for k, v in more.items()}


OTHER_CELLS: dict[str, Any] = {
    "a clear cell is new": without_a_clear_cell,
    "a clear cell is missing": with_a_clear_cell_more,
    "another class": lambda e: {"class_id": [1 - c if c < 2 else c for c in e["class_id"]]},
    "boxes elsewhere": lambda e: {"xyxy": (np.array(e["xyxy"]) + 15).tolist()},
    "other verdicts": lambda e: {"overlap_score": [None if s is None else 1 - s for s in e["overlap_score"]]},
    "two are refused": lambda _: {"n_refused": 2},
    "no cells at all": lambda _: {"xyxy": [], "class_id": [], "score": [], "overlap_score": []},
}


@pytest.mark.parametrize("what", sorted(OTHER_CELLS))
def test_a_machine_that_sees_something_else_is_refused(
    toy_bundle_path: Path, tmp_path: Path, what: str
) -> None:
    opened = changed(toy_bundle_path, tmp_path, **OTHER_CELLS[what](expected_of(toy_bundle_path)))
    with pytest.raises(
        BundleError, match=f"on its test field this machine sees {N_TEST_CELLS} cells where the export saw"
    ):
        verify(opened, threads=1)


BROKEN: dict[str, Any] = {
    "lengths": {"score": [0.5]},
    "overlap lengths": {"overlap_score": [0.5]},
    "boxes": {"xyxy": [[1, 2, 3]]},
    "class": {"class_id": [7] * N_TEST_CELLS},
    "no diameter": {"cell_diameter_px": 0.0},
    "text": {"xyxy": "boxes"},
    "refused is null": {"n_refused": None},
    "null": {"class_id": None},
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_a_test_that_makes_no_sense_is_an_error_of_the_bundle(
    toy_bundle_path: Path, tmp_path: Path, what: str
) -> None:
    with pytest.raises(BundleError, match="the bundle's test is broken"):
        verify(changed(toy_bundle_path, tmp_path, **BROKEN[what]), threads=1)


@pytest.mark.parametrize("name", [TEST_INPUT, TEST_EXPECTED])
def test_a_test_file_of_another_kind_is_an_error_of_the_bundle(
    toy_bundle_path: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(toy_bundle_path, tmp_path / "bundle"))
    (copy / name).write_text("[1, 2")
    source = {n: copy / n for n in (DETECTOR, CLASSIFIER, TEST_INPUT, TEST_EXPECTED)}
    opened = bundle.write(copy, source, Bundle.open(toy_bundle_path).manifest)
    with pytest.raises(BundleError, match="the bundle's test is broken"):
        verify(opened, threads=1)

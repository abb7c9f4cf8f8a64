"""The real data, where they lie beside the checkout: what is in them, and what is known to be wrong."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.values import SHAPES, CellClass
from rbc_train import labels
from rbc_train.data import (
    CHULA,
    NEGATIVES,
    SPLITS,
    TWIN_CORRELATION,
    Collection,
    read_chula,
    read_public,
    read_splits,
    source_diameters_px,
)

DATA = Path(os.environ.get("RBC_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (DATA / "splits.csv").is_file(),
        reason=f"the public data are not at {DATA}; set RBC_DATA to the folder with splits.csv",
    ),
]


@pytest.fixture(scope="module")
def public() -> tuple[Collection, Collection]:
    return read_public(DATA)


def test_photographs_per_split_and_camera(public: tuple[Collection, Collection]) -> None:
    txl, bccd = (Counter((p.split, p.source) for p in c.photographs) for c in public)
    assert txl == {
        ("train", "bccd"): 85,
        ("train", "bcd"): 124,
        ("train", "pbc"): 350,
        ("train", "raabin"): 350,
        ("val", "bccd"): 75,
        ("val", "bcd"): 50,
        ("val", "pbc"): 100,
        ("val", "raabin"): 100,
    }
    assert bccd == {("train", "bccd"): 165, ("val", "bccd"): 105, ("test", "bccd"): 93}


def test_every_box_of_the_originals_is_there_or_in_a_finding(public: tuple[Collection, Collection]) -> None:
    """Counted by grep, as it were, and not by our parsers."""
    txl, bccd = public
    lines = sum(
        len(file.read_text().split("\n")) - file.read_text().split("\n").count("")
        for file in (DATA / "txl_pbc" / "labels").glob("*.txt")
        if file.name != "classes.txt"
    )
    left_out = {f.file.stem for f in txl.findings if f.kind == "leak"}
    of_leaks = sum(
        len((DATA / "txl_pbc" / "labels" / f"{stem}.txt").read_text().split("\n")) - 1 for stem in left_out
    )
    duplicates = sum(f.kind == "duplicate" for f in txl.findings)
    assert sum(len(p.xyxy) for p in txl.photographs) == lines - of_leaks - duplicates
    boxes = {f.stem: f.read_text().count("<object>") for f in (DATA / "bccd" / "Annotations").glob("*.xml")}
    assert sum(boxes.values()) == 4155 + 372 + 361
    of_leaks = sum(boxes[f.file.stem] for f in bccd.findings)
    assert sum(len(p.xyxy) for p in bccd.photographs) == sum(boxes.values()) - of_leaks


def test_no_photograph_is_in_two_splits(public: tuple[Collection, Collection]) -> None:
    """By name, and by looks in any of eight orientations."""
    everyone = [p for c in public for p in c.photographs]
    split = np.array([SPLITS.index(p.split) for p in everyone])
    looks = np.stack([p.thumbnail for p in everyone])
    flat = looks.reshape(len(looks), -1)
    for mirrored in (looks, looks[:, :, ::-1]):
        for turns in range(4):
            turned = np.rot90(mirrored, turns, axes=(1, 2)).reshape(len(looks), -1)
            alike = flat @ turned.T > TWIN_CORRELATION
            assert not (alike & (split[:, None] != split[None])).any()
    names = {t.rpartition(".")[0]: b for _, b, t in read_splits(DATA / "splits.csv") if b and t}
    splits_of: dict[str, set[str]] = {}
    for p in everyone:
        splits_of.setdefault(names.get(p.name, p.name), set()).add(p.split)
    assert max(len(s) for s in splits_of.values()) == 1


def test_findings_are_those_that_are_known(public: tuple[Collection, Collection]) -> None:
    txl, bccd = public
    assert Counter(f.kind for f in txl.findings) == {"leak": 24, "duplicate": 2}
    assert {(f.file.name[:8], f.line) for f in txl.findings if f.kind == "duplicate"} == {
        ("14b82b9a", 14),
        ("2639b362", 20),
    }
    assert [(f.file.name, f.kind) for f in bccd.findings] == [("BloodImage_00038.jpg", "leak")]


def test_verified_labels_find_their_boxes(public: tuple[Collection, Collection]) -> None:
    """All but those of photographs that were left out as leaks."""
    txl, _ = public
    verified = labels.read_verified()
    found: list[labels.VerifiedLabel] = []
    for p in txl.photographs:
        for box in p.xyxy[p.class_id == CellClass.RBC]:
            label = verified.find(p.image_path.name, box)
            if label is not None:
                found.append(label)
    assert len(set(found)) == len(found)  # no label stands for two boxes
    leaks = {f.file.name for f in txl.findings if f.kind == "leak"}
    lost = set(verified.rows) - set(found)
    assert {label.image for label in lost} <= leaks
    assert (len(found), len(lost)) == (3460, 45)


def test_cells_measure_what_is_known_of_the_cameras(public: tuple[Collection, Collection]) -> None:
    sizes = source_diameters_px(public[0].of("train"))
    assert sizes == {
        "bccd": pytest.approx(105, rel=0.1),
        "raabin": pytest.approx(130, rel=0.1),
        "pbc": pytest.approx(75, rel=0.1),
        "bcd": pytest.approx(75, rel=0.1),
    }


@pytest.fixture(scope="module")
def chula() -> Collection:
    return read_chula(DATA / CHULA)


def test_chula_is_read_whole(chula: Collection) -> None:
    assert Counter((p.split, p.complete) for p in chula.photographs) == {
        ("train", True): 45,
        ("train", False): 482,
        ("val", True): 11,
        ("val", False): 56,
    }
    assert len(chula.photographs) == 594
    shapes = Counter(q.shape for p in chula.photographs for q in p.points)
    assert shapes.keys() == set(SHAPES)
    assert (shapes.total(), shapes["target"], shapes["schistocyte"]) == (17_384, 2_036, 712)
    assert {p.laboratory for p in chula.photographs} == {"chula"}


def test_boxes_of_chula_are_cells_with_a_label_or_negatives_with_a_kind(chula: Collection) -> None:
    classes = Counter(c for p in chula.photographs for c in p.class_id.tolist())
    assert classes == {CellClass.RBC: 5_849, CellClass.WBC: 4, CellClass.PLATELET: 301}
    kinds = Counter(n.kind for p in chula.photographs for n in p.negatives)
    assert kinds == {"nothing": 202, "misfit": 45, "clump": 28, "unusable": 12}
    assert kinds.keys() == set(NEGATIVES)
    assert classes.total() + kinds.total() == 6_441
    verified = Counter(v.label for p in chula.photographs for v in p.verified)
    assert verified == {"single": 4_742, "overlapping": 768 + 339}
    assert source_diameters_px(chula.of("train")) == {"chula": pytest.approx(45, rel=0.1)}


def test_26_images_of_chula_are_png_and_nothing_else_is_wrong(chula: Collection) -> None:
    assert Counter((f.kind, f.action) for f in chula.findings) == {("format", "kept"): 26}

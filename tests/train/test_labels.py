"""Weak labels (Otsu area) and verified labels: reproducible, and found again by photograph and box."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from rbc_edge.errors import UsageError
from rbc_edge.values import UInt8
from rbc_train import labels
from rbc_train.labels import VerifiedLabel, VerifiedLabels

HEADER = "image,source,x0,y0,x1,y1,letter,label,passes\n"


def disc_crop(radius: int) -> UInt8:
    crop = np.full((64, 64, 3), 220, np.uint8)
    cv2.circle(crop, (32, 32), radius, (120, 60, 140), -1)
    return crop


def test_the_area_is_that_of_the_dark_pixels() -> None:
    crops = np.stack([disc_crop(r) for r in (8, 16, 24)])
    areas = labels.otsu_area(crops)
    assert areas.dtype == np.int64
    assert areas.tolist() == [int((c[:, :, 0] == 120).sum()) for c in crops]
    assert areas[1] == pytest.approx(np.pi * 16**2, rel=0.05)


def test_light_and_stain_do_not_change_the_area() -> None:
    """Each crop has its own Otsu threshold."""
    crop = disc_crop(20)
    assert (
        labels.otsu_area(np.stack([crop, crop // 2, crop // 2 + 100])).tolist()
        == [labels.otsu_area(crop[None])[0]] * 3
    )


def test_no_crops_have_no_areas() -> None:
    assert labels.otsu_area(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0,)


def exhaustive(areas: list[int]) -> tuple[float, set[int]]:
    """Otsu's criterion by its definition, over every threshold that parts the areas."""
    values = np.array(areas, float)
    best, at = -1.0, set()
    for t in sorted(set(areas))[:-1]:
        low, high = values[values <= t], values[values > t]
        between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, at = between, {t}
        elif between >= best * (1 - 1e-12):
            at.add(t)
    return best, at


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_is_otsus_by_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    areas = np.concatenate([rng.normal(1500, 200, 40), rng.normal(2600, 300, 15)]).astype(np.int64)
    assert labels.area_threshold(areas) in exhaustive(areas.tolist())[1]
    assert labels.area_threshold(rng.permutation(areas)) == labels.area_threshold(areas)


@pytest.mark.parametrize(
    ("areas", "threshold"),
    [([], 0), ([7], 7), ([7, 7, 7], 7), ([1, 9], 1), ([1, 1, 9, 9, 9], 1), ([1, 2, 9], 2)],
)
def test_small_sets_of_areas(areas: list[int], threshold: int) -> None:
    assert labels.area_threshold(np.array(areas, np.int64)) == threshold


def row(image: str, *xyxy: float, label: str = "single") -> VerifiedLabel:
    x0, y0, x1, y1 = xyxy
    name: labels.VerifiedName = "single" if label == "single" else "overlapping"
    return VerifiedLabel(image, "pbc", (x0, y0, x1, y1), name[0].upper(), name, 1)


def test_a_box_is_found_again_to_within_rounding() -> None:
    verified = VerifiedLabels(
        [row("a.jpg", 10, 10, 50, 50), row("a.jpg", 14, 10, 50, 50), row("b.jpg", 0, 0, 9, 9)]
    )
    near = np.array([9.4, 9.2, 49.7, 51.2], np.float32)
    assert verified.find("a.jpg", near) is verified.rows[0]
    assert verified.find("a.jpg", np.array([13, 10, 50, 50], np.float32)) is verified.rows[1]  # the nearest
    assert verified.find("a.jpg", np.array([10, 10, 50, 53], np.float32)) is None
    assert verified.find("b.jpg", near) is None
    assert verified.find("c.jpg", near) is None
    assert verified.of_image("a.jpg") == verified.rows[:2]
    assert verified.of_image("c.jpg") == []


def test_without_labels_nothing_is_found() -> None:
    assert VerifiedLabels([]).find("a.jpg", np.zeros(4, np.float32)) is None


def write(folder: Path, train: str, val: str = "") -> Path:
    (folder / "train.csv").write_text(HEADER + train)
    (folder / "val.csv").write_text(HEADER + val)
    return folder


def test_both_files_are_read(tmp_path: Path) -> None:
    verified = labels.read_verified(
        write(tmp_path, "x/images/a.jpg,bcd,1,2.5,30,40,ST,,2\n", "b.jpg,pbc,0,0,9,9,O,overlapping,1\n")
    )
    assert verified.rows == [
        VerifiedLabel("a.jpg", "bcd", (1, 2.5, 30, 40), "ST", "", 2),
        VerifiedLabel("b.jpg", "pbc", (0, 0, 9, 9), "O", "overlapping", 1),
    ]


@pytest.mark.parametrize(
    "bad",
    [
        "a.jpg,bcd,1,2,3,4,Z,single,1",
        "a.jpg,bcd,1,2,3,4,S,alone,1",
        "a.jpg,bcd,1,2,three,4,S,single,1",
        "a.jpg,bcd,1,2,3,4,S,single,often",
        "a.jpg,bcd,1,2",
    ],
)
def test_a_row_that_is_none_is_refused_with_its_line(tmp_path: Path, bad: str) -> None:
    with pytest.raises(UsageError, match=r"val\.csv:3: "):
        labels.read_verified(write(tmp_path, "", f"b.jpg,pbc,0,0,9,9,O,overlapping,1\n{bad}\n"))


def test_our_own_labels_are_as_their_readme_says() -> None:
    rows = labels.read_verified().rows
    assert len(rows) == 2405 + 1100
    letters = {"S": "single", "T": "overlapping", "O": "overlapping", "M": "overlapping", "X": ""}
    for r in rows:
        if len(r.letter) == 1:
            assert r.label == letters[r.letter]
        else:
            assert r.passes == 2
            assert r.label in {letters[c] for c in r.letter} | {""}
    assert all(r.xyxy[2] > r.xyxy[0] and r.xyxy[3] > r.xyxy[1] for r in rows)
    pairs = itertools.groupby(sorted((r.image, r.xyxy) for r in rows))
    assert max(len(list(same)) for _, same in pairs) == 1  # no box has two labels


def test_cells_without_a_box_are_read(tmp_path: Path) -> None:
    head = "image,source,x0,y0,x1,y1,kind\n"
    rows = "txl_pbc/images/a.jpg,pbc,0,1.5,20,30,cell\ntxl_pbc/images/a.jpg,pbc,5,5,9,9,nothing\n"
    (tmp_path / "val.csv").write_text(head + rows)
    unboxed = labels.read_unboxed(tmp_path)
    assert {name: boxes.tolist() for name, boxes in unboxed.items()} == {"a.jpg": [[0, 1.5, 20, 30]]}
    (tmp_path / "val.csv").write_text(head + "a.jpg,pbc,0,1.5,20,30,perhaps\n")
    with pytest.raises(UsageError, match=r"val.csv:2: not a box that was looked at"):
        labels.read_unboxed(tmp_path)


def test_our_cells_without_a_box_are_a_fourteenth_of_all() -> None:
    """Of the 5,692 red cells that the validation photographs of TXL-PBC have a box for."""
    assert sum(len(boxes) for boxes in labels.read_unboxed().values()) == 452

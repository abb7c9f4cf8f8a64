"""The reader of Chula: complete boxes of some fields, points of most, and what is wrong with either."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from command import rbc_train
from tiny_data import TinyData, add_chula, photograph, write_image

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import CellClass
from rbc_edge.vision import preprocess
from rbc_train import train_classifier
from rbc_train.data import (
    Collection,
    Negative,
    Split,
    photographs_of,
    read_chula,
    read_public,
    verified_labels,
)


@pytest.fixture
def chula(data: TinyData) -> TinyData:
    add_chula(data)
    return data


@pytest.fixture
def one(tmp_path: Path) -> TinyData:
    """One field, without boxes and points so far."""
    data = TinyData(tmp_path / "public")
    data.add_chula("train", 7, photograph(57), boxes=False)
    for name in ("splits.csv", "shapes.csv"):
        file = data.folder / "chula" / name
        file.write_text(file.read_text().splitlines()[0] + "\n")
    data.chula("splits.csv", "images/7.jpg", "train", "yes")
    data.chula("boxes.csv", "images/7.jpg", 10, 10, 50, 50, "S", "rbc", "single")
    return data


def read(data: TinyData) -> Collection:
    return read_chula(data.folder / "chula")


def test_good_tables_have_no_findings_and_come_back_as_drawn(chula: TinyData) -> None:
    got = read(chula)
    assert got.findings == []
    assert [(p.name, p.split, p.complete) for p in got.photographs] == [
        ("chula-1", "train", True),
        ("chula-2", "train", False),
        ("chula-3", "val", True),
        ("chula-4", "val", False),
    ]
    assert [p.name for p in got.complete("train")] == ["chula-1"]
    for p in got.photographs:
        drawn = chula.drawn[p.name]
        red = drawn.class_id == CellClass.RBC
        assert len(p.points) == int((red & ~drawn.overlapping).sum())
        assert {q.shape for q in p.points} == {"target"}
        if not p.complete:
            assert (len(p.xyxy), p.verified, p.negatives) == (0, (), ())
            continue
        np.testing.assert_allclose(p.xyxy, drawn.xyxy, atol=0.06)
        assert p.class_id.tolist() == drawn.class_id.tolist()
        assert [v.label == "overlapping" for v in p.verified] == drawn.overlapping[red].tolist()
        assert p.negatives == (Negative((1, 1, 21, 21), "nothing", "N"),)


def test_the_laboratory_follows_from_the_folder_and_not_from_the_size(tmp_path: Path) -> None:
    """Both are 640x480."""
    data = TinyData(tmp_path / "public")
    same = {"width_px": 640, "height_px": 480}
    data.add_txl("train", "a", photograph(0, **same))
    data.add_txl("train", "b", photograph(1, width_px=416, height_px=416))
    data.add_txl("train", "c", photograph(2))
    data.add_chula("train", 1, photograph(3, **same), boxes=True)
    txl, _ = read_public(data.folder)
    assert [p.laboratory for p in txl.photographs] == ["bccd+bcd", "bccd+bcd", "pbc"]
    assert [(p.source, p.laboratory) for p in read(data).photographs] == [("chula", "chula")]


FAULTS = {
    # a row of a table: kind, action
    ("boxes.csv", "images/7.jpg", 1, 2, "x", 4, "S", "rbc", "single"): ("bad-line", "box left out"),
    ("boxes.csv", "images/7.jpg", 1, 2): ("bad-line", "box left out"),
    ("boxes.csv", "images/7.jpg", 60, 60, 90, 90, "Q", "rbc", "single"): ("unknown-class", "box left out"),
    ("boxes.csv", "images/7.jpg", 60, 60, 90, 90, "S", "rbc", ""): ("unknown-class", "box left out"),
    ("boxes.csv", "images/7.jpg", 60, 60, 90, 90, "N", "rbc", "single"): ("unknown-class", "box left out"),
    ("boxes.csv", "images/7.jpg", 60, 60, 60, 90, "S", "rbc", "single"): ("no-area", "box left out"),
    ("boxes.csv", "images/7.jpg", 60, "nan", 90, 90, "N", "nothing", ""): ("no-area", "box left out"),
    ("boxes.csv", "images/7.jpg", 300, 60, 390, 90, "N", "nothing", ""): ("outside", "box left out"),
    ("boxes.csv", "images/7.jpg", 150, 60, 290, 90, "N", "nothing", ""): ("outside", "clipped"),
    ("boxes.csv", "images/7.jpg", 10, 10, 50, 50, "O", "rbc", "overlapping"): ("duplicate", "box left out"),
    ("boxes.csv", "images/8.jpg", 10, 10, 50, 50, "S", "rbc", "single"): ("not-in-split", "box left out"),
    ("shapes.csv", "images/7.jpg", 5, "y", "target"): ("bad-line", "point left out"),
    ("shapes.csv", "images/7.jpg", 5, 5, "bean"): ("unknown-class", "point left out"),
    ("shapes.csv", "images/7.jpg", 193, 5, "target"): ("outside", "point left out"),
    ("shapes.csv", "images/7.jpg", "nan", 5, "target"): ("outside", "point left out"),
    ("shapes.csv", "images/8.jpg", 5, 5, "target"): ("not-in-split", "point left out"),
    ("splits.csv", "images/7.jpg", "train", "yes"): ("duplicate", "kept"),
}


@pytest.mark.parametrize("row", sorted(FAULTS, key=str))
def test_a_fault_in_a_row_is_found_in_its_line(one: TinyData, row: tuple[str, ...]) -> None:
    table, *cells = row
    one.chula(table, *cells)
    file = one.folder / "chula" / table
    (finding,) = (got := read(one)).findings
    line = len(file.read_text().splitlines())
    assert (finding.file, finding.line, finding.kind, finding.action) == (file, line, *FAULTS[row])
    (p,) = got.photographs
    assert (len(p.xyxy), len(p.points)) == (1, 0)
    assert [n.xyxy for n in p.negatives] == ([(150, 60, 192, 90)] if finding.action == "clipped" else [])


def test_a_point_counts_once(one: TinyData) -> None:
    for _ in range(2):
        one.chula("shapes.csv", "images/7.jpg", 5, 5, "target")
    got = read(one)
    assert [(f.line, f.kind) for f in got.findings] == [(3, "duplicate")]
    assert len(got.photographs[0].points) == 1


def test_a_complete_field_without_boxes_is_left_out(one: TinyData) -> None:
    """It would teach that its cells are background. Without complete boxes it is kept for its points."""
    one.chula("splits.csv", "images/8.jpg", "train", "yes")
    one.chula("splits.csv", "images/9.jpg", "val", "no")
    for number in (8, 9):
        image = photograph(number).image
        write_image(one.folder / f"chula/images/{number}.jpg", image)
    got = read(one)
    assert [(p.name, p.complete) for p in got.photographs] == [("chula-7", True), ("chula-9", False)]
    kinds = [(f.file.name, f.kind) for f in got.findings]
    assert kinds == [("8.jpg", "format"), ("boxes.csv", "empty"), ("9.jpg", "format")]


def test_a_png_under_the_name_of_a_jpeg_is_said_and_read(one: TinyData) -> None:
    image = photograph(57).image
    write_image(one.folder / "chula/images/7.jpg", image)
    got = read(one)
    assert [(f.file.name, f.kind, f.action) for f in got.findings] == [("7.jpg", "format", "kept")]
    np.testing.assert_array_equal(got.photographs[0].read(), image)


def test_images_and_names_without_each_other_are_said(one: TinyData) -> None:
    (one.folder / "chula/images/7.jpg").rename(one.folder / "chula/images/70.jpg")
    got = read(one)
    assert got.photographs == []
    assert [(f.file.name, f.kind, f.action) for f in got.findings] == [
        ("70.jpg", "not-in-split", "photograph left out"),
        ("7.jpg", "missing-image", "photograph left out"),
    ]


def test_the_same_field_in_two_splits_stays_in_the_stricter(one: TinyData) -> None:
    one.add_chula("val", 8, photograph(57), boxes=True)
    got = read(one)
    assert [p.name for p in got.photographs] == ["chula-8"]
    assert [(f.file.name, f.kind) for f in got.findings] == [("7.jpg", "leak")]


def test_tables_that_are_none_are_said(one: TinyData) -> None:
    one.chula("splits.csv", "images/7.jpg", "exam", "no")
    with pytest.raises(UsageError, match=r"splits\.csv:3: unknown split 'exam'"):
        read(one)
    (one.folder / "chula/shapes.csv").write_text("image,x\n")
    (one.folder / "chula/splits.csv").write_text("image,split,boxes\n")
    with pytest.raises(UsageError, match=r"shapes\.csv: has no column 'y'"):
        read(one)
    (one.folder / "chula/boxes.csv").unlink()
    with pytest.raises(UnavailableError, match=r"boxes\.csv: No such file"):
        read(one)


def test_without_being_asked_a_dataset_has_nothing_of_chula(
    chula: TinyData,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No byte of it differs."""
    words = ("dataset", "--data", chula.folder, "--out", tmp_path / "d", "--cell-diameter", 24)
    code, out, _ = rbc_train(monkeypatch, capsys, *words, "--strict")
    assert (code, "chula" in out, "nothing" in out) == (0, False, False)
    assert (tmp_path / "d" / "manifest.json").read_bytes() == (dataset / "manifest.json").read_bytes()
    assert photographs_of(tmp_path / "d", chula.folder).keys() == {
        p.name for p in read_public(chula.folder)[0].photographs
    }


def test_a_dataset_with_chula_has_its_complete_fields_and_the_negatives(
    chula: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("dataset", "--data", chula.folder, "--out", tmp_path / "d", "--cell-diameter", 24, "--chula")
    code, out, _ = rbc_train(monkeypatch, capsys, *words)
    assert code == 0
    rows = [row.split() for row in out.splitlines()]
    assert rows[0][-4:] == ["nothing", "misfit", "clump", "unusable"]
    assert [r[:3] for r in rows[1:5]] == [
        ["train", "chula", "1"],
        ["train", "pbc", "4"],
        ["val", "chula", "1"],
        ["val", "pbc", "2"],
    ]
    assert [r[6:] for r in rows[1:3]] == [["1", "0", "0", "0"], ["0", "0", "0", "0"]]
    images = tmp_path / "d" / "detector" / "images"
    assert sorted(p.name for p in images.rglob("chula*")) == ["chula-1.png", "chula-3.png"]
    got = photographs_of(tmp_path / "d", chula.folder)
    verified = verified_labels(got.values())
    shown: dict[Split, tuple[str, ...]] = {
        "train": ("t0", "t1", "t2", "t3", "chula-1"),
        "val": ("v10", "v11", "chula-3"),
    }
    for split, names in shown.items():
        crops = np.load(tmp_path / "d" / "crops" / f"{split}-negatives.npy")
        with (tmp_path / "d" / "crops" / f"{split}-negatives.csv").open(newline="") as stream:
            lines = list(csv.DictReader(stream))
        ids = np.concatenate([chula.drawn[n].class_id for n in names])
        kinds = [(line["kind"], line["letter"]) for line in lines]
        assert kinds.count(("wbc", "W")) == int((ids == CellClass.WBC).sum())
        assert kinds.count(("platelet", "P")) == int((ids == CellClass.PLATELET).sum())
        assert kinds.count(("nothing", "N")) == 1
        assert len(crops) == len(kinds) == int((ids != CellClass.RBC).sum()) + 1
        for crop, line in zip(crops, lines, strict=True):
            p = got[line["name"]]
            box = np.array([[float(line[k]) for k in ("x0", "y0", "x1", "y1")]], np.float32)
            exact = preprocess.cell_crops(p.view(float(line["diameter_px"])), box, margin=0.25)[0]
            assert np.abs(exact.astype(int) - crop.astype(int)).mean() < 3
        # Cells carry their own labels, and nobody takes a negative for a cell.
        cells = train_classifier.read_rows(tmp_path / "d", split)
        assert len(cells) == int((ids == CellClass.RBC).sum())
        for line in (c for c in cells if c["source"] == "chula"):
            box = np.array([float(line[k]) for k in ("x0", "y0", "x1", "y1")], np.float32)
            known = verified.find(got[line["name"]].image_path.name, box)
            assert known is not None
            assert (line["verified"], line["letter"]) == (known.label, known.letter)
    files = json.loads((tmp_path / "d" / "manifest.json").read_text())["files"]
    assert {"crops/train-negatives.npy", "crops/val-negatives.csv"} <= files.keys()


def test_a_classifier_learns_from_a_dataset_with_chula(
    chula: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--data", chula.folder)
    words = ("dataset", *place, "--out", tmp_path / "d", "--cell-diameter", 24, "--chula")
    assert rbc_train(monkeypatch, capsys, *words)[0] == 0
    code, out, _ = rbc_train(
        monkeypatch, capsys, "classifier", *place, "--dataset", tmp_path / "d", "--out", tmp_path / "run",
        "--threads", 1, "--model", "base", "--epochs", 1,
    )  # fmt: skip
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "run" / "classifier.pt"))
    samples = train_classifier.read_samples(
        tmp_path / "d", photographs_of(tmp_path / "d", chula.folder), "train", "verified"
    )
    assert "chula" in samples.source

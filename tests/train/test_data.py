"""Readers of BCCD and TXL-PBC: every fault is a finding with file and line; no photograph in two splits."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tiny_data import TinyData, photograph, voc, write_image, yolo

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.values import CellClass, Scale, ScaleSource, UInt8
from rbc_edge.vision import image_file, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train import labels
from rbc_train.data import (
    AnnotationFinding,
    Collection,
    Photograph,
    keep_apart,
    labelled_diameter_px,
    read_bccd,
    read_public,
    read_splits,
    read_txl_pbc,
    source_diameters_px,
    write_dataset,
)
from rbc_train.train_classifier import Samples

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


@pytest.fixture
def empty(tmp_path: Path) -> TinyData:
    return TinyData(tmp_path / "public")


def read_txl(data: TinyData) -> Collection:
    return read_txl_pbc(data.folder / "txl_pbc", read_splits(data.folder / "splits.csv"))


def read_own(data: TinyData) -> Collection:
    return read_bccd(data.folder / "bccd", read_splits(data.folder / "splits.csv"))


def test_good_data_have_no_findings_and_come_back_as_drawn(data: TinyData) -> None:
    txl, bccd = read_public(data.folder)
    assert txl.findings == bccd.findings == []
    assert [p.name for p in txl.of("train")] == ["t0", "t1", "t2", "t3"]
    assert [p.name for p in txl.of("val", "test")] == ["e20", "v10", "v11"]
    assert [(p.name, p.split) for p in bccd.photographs] == [
        ("BloodImage_00001", "train"),
        ("BloodImage_00002", "val"),
    ]
    for p in [*txl.photographs, *bccd.photographs]:
        drawn = data.drawn[p.name]
        np.testing.assert_allclose(
            p.xyxy, drawn.xyxy, atol=0.51 if p.source == "bccd" or p in bccd.photographs else 1e-3
        )
        assert p.class_id.tolist() == drawn.class_id.tolist()
        assert (p.width_px, p.height_px) == (192, 160)
        np.testing.assert_array_equal(p.read(), drawn.image)


@pytest.mark.parametrize(
    ("size", "source"),
    [((640, 480), "bccd"), ((416, 416), "bcd"), ((575, 575), "raabin"), ((360, 363), "pbc")],
)
def test_the_camera_is_told_by_the_size(empty: TinyData, size: tuple[int, int], source: str) -> None:
    empty.add_txl("train", "a", photograph(0, width_px=size[0], height_px=size[1]))
    assert read_txl(empty).photographs[0].source == source


YOLO_FAULTS = {
    # what stands in line 2: kind, action, boxes that stay of 1
    "1 0.5 0.5 0.2": ("bad-line", "box left out", 1),
    "1 0.5 0.5 0.2 0.2 0.9": ("bad-line", "box left out", 1),
    "1 0.5 x 0.2 0.2": ("bad-line", "box left out", 1),
    "3 0.5 0.5 0.2 0.2": ("unknown-class", "box left out", 1),
    "RBC 0.5 0.5 0.2 0.2": ("unknown-class", "box left out", 1),
    "1 0.5 0.5 0 0.2": ("no-area", "box left out", 1),
    "1 0.5 0.5 0.2 -0.2": ("no-area", "box left out", 1),
    "1 nan 0.5 0.2 0.2": ("no-area", "box left out", 1),
    "1 0.5 inf 0.2 0.2": ("no-area", "box left out", 1),
    "1 1.5 0.5 0.2 0.2": ("outside", "box left out", 1),
    "1 0.5 -0.5 0.2 0.2": ("outside", "box left out", 1),
    "1 1.0 0.5 0.2 0.2": ("outside", "clipped", 2),
    "1 0.25 0.25 0.1 0.1": ("duplicate", "box left out", 1),
}


@pytest.mark.parametrize("line", sorted(YOLO_FAULTS))
def test_a_fault_in_a_yolo_line_is_found_there(empty: TinyData, line: str) -> None:
    kind, action, n_boxes = YOLO_FAULTS[line]
    empty.add_txl("train", "a", photograph(0))
    empty.label_file("a").write_text(f"1 0.25 0.25 0.1 0.1\n{line}\n")
    read = read_txl(empty)
    (finding,) = read.findings
    assert (finding.file, finding.line, finding.kind, finding.action) == (
        empty.label_file("a"),
        2,
        kind,
        action,
    )
    assert str(finding).startswith(f"{empty.label_file('a')}:2: {kind}: ")
    (one,) = read.photographs
    assert len(one.xyxy) == n_boxes
    assert (one.xyxy >= 0).all()
    assert (one.xyxy <= [192, 160, 192, 160]).all()


def test_a_clipped_box_ends_at_the_border(empty: TinyData) -> None:
    empty.add_txl("train", "a", photograph(0))
    empty.label_file("a").write_text("0 1.0 0.5 0.5 0.5\n")
    (one,) = read_txl(empty).photographs
    np.testing.assert_allclose(one.xyxy, [[144, 40, 192, 120]], atol=1e-3)
    assert one.class_id.tolist() == [CellClass.WBC]


def test_the_same_box_of_another_class_is_no_duplicate(empty: TinyData) -> None:
    empty.add_txl("train", "a", photograph(0))
    empty.label_file("a").write_text("1 0.25 0.25 0.1 0.1\n2 0.25 0.25 0.1 0.1\n")
    read = read_txl(empty)
    assert read.findings == []
    assert len(read.photographs[0].xyxy) == 2


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        (b"", [(0, "empty")]),
        (b"\n \n", [(0, "empty")]),
        (b"9 0.5 0.5 0.1 0.1\n", [(1, "unknown-class"), (0, "empty")]),
        (b"\xff\xfe\x00", [(0, "bad-line")]),
        (None, [(0, "missing-annotation")]),
    ],
)
def test_a_photograph_without_labels_is_left_out(
    empty: TinyData, content: bytes | None, kinds: list[tuple[int, str]]
) -> None:
    """It would teach that its cells are background."""
    empty.add_txl("train", "a", photograph(0))
    if content is None:
        empty.label_file("a").unlink()
    else:
        empty.label_file("a").write_bytes(content)
    read = read_txl(empty)
    assert read.photographs == []
    assert [(f.line, f.kind) for f in read.findings] == kinds
    assert read.findings[-1].action == "photograph left out"
    assert read.findings[-1].file == empty.label_file("a")


@pytest.mark.parametrize(
    ("content", "kind"), [(None, "missing-image"), (b"", "unreadable-image"), (b"text", "unreadable-image")]
)
def test_a_missing_or_broken_image_is_left_out(empty: TinyData, content: bytes | None, kind: str) -> None:
    empty.add_txl("val", "a", photograph(0))
    empty.add_bccd("val", "b", photograph(1))
    txl_image, bccd_image = empty.folder / "txl_pbc/images/a.jpg", empty.folder / "bccd/JPEGImages/b.jpg"
    for file in (txl_image, bccd_image):
        file.unlink() if content is None else file.write_bytes(content)
    for read, image in ((read_txl(empty), txl_image), (read_own(empty), bccd_image)):
        assert read.photographs == []
        assert [(f.file, f.line, f.kind, f.action) for f in read.findings] == [
            (image, 0, kind, "photograph left out")
        ]


def test_what_no_split_names_is_said(data: TinyData) -> None:
    write_image(data.folder / "txl_pbc/images/stray.jpg", photograph(40).image)
    write_image(data.folder / "bccd/JPEGImages/stray.jpg", photograph(41).image)
    txl, bccd = read_public(data.folder)
    assert [(f.file.name, f.kind) for f in txl.findings] == [("stray.jpg", "not-in-split")]
    assert [(f.file.name, f.kind) for f in bccd.findings] == [("stray.jpg", "not-in-split")]
    assert "stray" not in {p.name for p in [*txl.photographs, *bccd.photographs]}


def test_a_name_twice_in_the_split_is_said_and_the_strictest_wins(data: TinyData) -> None:
    data.name("test", "", "t0.jpg")
    read = read_txl(data)
    assert [(f.file.name, f.kind) for f in read.findings] == [("t0.jpg", "duplicate")]
    assert {p.name: p.split for p in read.photographs}["t0"] == "test"


def object_of(name: str, *values: object) -> list[str]:
    tags = [f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True)]
    return ["<object>", f"<name>{name}</name>", "<bndbox>", *tags, "</bndbox>", "</object>"]


VOC_FAULTS: dict[str, tuple[list[str], str, str]] = {
    "class": (object_of("Rbc", 50, 50, 80, 80), "unknown-class", "box left out"),
    "no area": (object_of("RBC", 50, 50, 49, 80), "no-area", "box left out"),
    "outside": (object_of("RBC", 500, 50, 540, 80), "outside", "box left out"),
    "partly": (object_of("RBC", 150, 50, 230, 80), "outside", "clipped"),
    "word": (object_of("RBC", "left", 50, 230, 80), "bad-line", "box left out"),
    "again": (object_of("RBC", 11, 11, 40, 40), "duplicate", "box left out"),
    "no box": (["<object>", "<name>RBC</name>", "</object>"], "bad-line", "box left out"),
}


@pytest.mark.parametrize("what", sorted(VOC_FAULTS))
def test_a_fault_in_a_voc_object_is_found_at_its_line(empty: TinyData, what: str) -> None:
    extra, kind, action = VOC_FAULTS[what]
    empty.add_bccd("train", "a", photograph(0))
    good = voc(np.array([[10, 10, 40, 40]], np.float32), ["RBC"], (192, 160)).splitlines()
    line = len(good)  # where </annotation> stood, the object begins
    empty.voc_file("a").write_text("\n".join([*good[:-1], *extra, "</annotation>"]))
    read = read_own(empty)
    assert [(f.file, f.line, f.kind, f.action) for f in read.findings] == [
        (empty.voc_file("a"), line, kind, action)
    ]
    (one,) = read.photographs
    assert one.xyxy[0].tolist() == [10, 10, 40, 40]
    assert len(one.xyxy) == (2 if action == "clipped" else 1)


def test_a_size_that_is_not_the_images_is_said_and_the_image_believed(empty: TinyData) -> None:
    empty.add_bccd("train", "a", photograph(0))
    text = empty.voc_file("a").read_text()
    empty.voc_file("a").write_text(text.replace("<width>192<", "<width>640<"))
    read = read_own(empty)
    assert [(f.line, f.kind, f.action) for f in read.findings] == [(5, "size-mismatch", "kept")]
    assert "640x160" in read.findings[0].message
    assert "192x160" in read.findings[0].message
    assert read.photographs[0].width_px == 192


@pytest.mark.parametrize(
    ("content", "line"), [("", 1), ("<annotation>\n<object>\n</annotation>", 3), ("text", 1)]
)
def test_what_is_no_xml_is_found_with_its_line(empty: TinyData, content: str, line: int) -> None:
    empty.add_bccd("train", "a", photograph(0))
    empty.voc_file("a").write_text(content)
    read = read_own(empty)
    assert read.photographs == []
    assert [(f.line, f.kind, f.action) for f in read.findings] == [(line, "bad-line", "photograph left out")]


def test_a_missing_voc_file_and_one_without_objects(empty: TinyData) -> None:
    empty.add_bccd("train", "a", photograph(0))
    empty.add_bccd("train", "b", photograph(1))
    empty.voc_file("a").unlink()
    empty.voc_file("b").write_text(voc(np.zeros((0, 4), np.float32), [], (192, 160)))
    read = read_own(empty)
    assert read.photographs == []
    assert [(f.file, f.kind) for f in read.findings] == [
        (empty.voc_file("a"), "missing-annotation"),
        (empty.voc_file("b"), "empty"),
    ]


def test_a_photograph_that_only_the_split_knows_is_said_to_be_missing(empty: TinyData) -> None:
    empty.name("train", "gone", "")
    read = read_own(empty)
    assert read.photographs == []
    image = empty.folder / "bccd" / "JPEGImages" / "gone.jpg"
    assert [(f.file, f.kind, f.action) for f in read.findings] == [
        (image, "missing-image", "photograph left out")
    ]


def turned(drawn: DrawnField, how: str) -> UInt8:
    """The same photograph as another collection might hold it."""
    image = {
        "same": drawn.image,
        "mirrored": drawn.image[:, ::-1],
        "upside down": drawn.image[::-1],
        "quarter turn": np.rot90(drawn.image),
        "turned and mirrored": np.rot90(drawn.image)[:, ::-1],
        "squeezed": cv2.resize(drawn.image, (120, 120), interpolation=cv2.INTER_AREA),
        "squeezed and turned": np.rot90(cv2.resize(drawn.image, (120, 120), interpolation=cv2.INTER_AREA), 3),
        "JPEG": cv2.imdecode(
            cv2.imencode(".jpg", drawn.image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_UNCHANGED
        ),
    }[how]
    return np.ascontiguousarray(image, dtype=np.uint8)


HOWS = (
    "same",
    "mirrored",
    "upside down",
    "quarter turn",
    "turned and mirrored",
    "squeezed",
    "squeezed and turned",
    "JPEG",
)


@pytest.mark.parametrize("how", HOWS)
def test_a_twin_in_a_stricter_split_is_a_leak(data: TinyData, how: str) -> None:
    """Under another name, without a link: found by its content, and left out of the looser split."""
    write_image(data.folder / "txl_pbc/images/twin.jpg", turned(data.drawn["t1"], how))
    data.label_file("twin").write_text(yolo(data.drawn["t1"]))
    data.name("val", "", "twin.jpg")
    txl, bccd = read_public(data.folder)
    assert [(f.file.name, f.line, f.kind, f.action) for f in txl.findings] == [
        ("t1.jpg", 0, "leak", "photograph left out")
    ]
    assert "twin of val" in txl.findings[0].message
    assert [p.name for p in txl.of("train")] == ["t0", "t2", "t3"]
    assert "twin" in {p.name for p in txl.of("val")}
    assert bccd.findings == []


def test_a_twin_is_looked_for_across_the_collections(data: TinyData) -> None:
    data.add_bccd("test", "BloodImage_00009", photograph(0))  # t0 of TXL-PBC's train
    data.add_bccd("train", "BloodImage_00010", photograph(11))  # v11 of TXL-PBC's val
    txl, bccd = read_public(data.folder)
    assert [(f.file.name, f.kind) for f in txl.findings] == [("t0.jpg", "leak")]
    assert [(f.file.name, f.kind) for f in bccd.findings] == [("BloodImage_00010.jpg", "leak")]


def test_a_twin_by_name_is_a_leak_whatever_it_looks_like(data: TinyData) -> None:
    data.add_txl("train", "renamed", photograph(50), bccd_name="BloodImage_00002")
    # The row says that both names are one photograph; BCCD's own row says val.
    txl, bccd = read_public(data.folder)
    assert [(f.file.name, f.kind) for f in txl.findings] == [("renamed.jpg", "leak")]
    assert bccd.findings == []


def test_twins_of_one_split_both_stay(data: TinyData) -> None:
    data.add_txl("train", "again", photograph(0))
    txl, _ = read_public(data.folder)
    assert txl.findings == []
    assert len(txl.of("train")) == 5


def test_a_chain_of_twins_ends_in_the_strictest(data: TinyData) -> None:
    data.add_txl("val", "in_val", photograph(0))
    data.add_txl("test", "in_test", photograph(0))
    txl, _ = read_public(data.folder)
    assert sorted(f.file.name for f in txl.findings) == ["in_val.jpg", "t0.jpg"]
    assert all("in_test of test" in f.message for f in txl.findings)


def test_leaks_between_nothing() -> None:
    keep_apart((Collection(), Collection()), same_as={})


@pytest.mark.parametrize("missing", ["splits.csv", "txl_pbc", "bccd"])
def test_data_that_are_not_there_are_named(data: TinyData, missing: str) -> None:
    (data.folder / missing).rename(data.folder / "away")
    with pytest.raises(UnavailableError, match=missing):
        read_public(data.folder)


def test_a_split_table_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "splits.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="has no column 'split'"):
        read_splits(file)
    file.write_text("split,bccd_image,txl_pbc_image\ntrain,a,\ntraining,b,\n")
    with pytest.raises(UsageError, match=r"splits\.csv:3: unknown split 'training'"):
        read_splits(file)


def test_the_diameter_is_that_of_whole_red_cells(data: TinyData) -> None:
    txl, _ = read_public(data.folder)
    of_source = source_diameters_px(txl.photographs)
    assert of_source["pbc"] == pytest.approx(40, abs=5)
    one = txl.photographs[0]
    sizes = one.whole_rbc_diameters_px
    assert 0 < len(sizes) <= int((one.class_id == 0).sum())
    assert labelled_diameter_px(one, {"pbc": 77.0}, least=1) == pytest.approx(float(np.median(sizes)))
    assert labelled_diameter_px(one, {"pbc": 77.0}, least=100) == 77.0
    assert labelled_diameter_px(one, {}, least=100) == pytest.approx(float(np.median(sizes)))


def crop_rows(dataset: Path, split: str) -> list[dict[str, str]]:
    with (dataset / "crops" / f"{split}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_manifest_names_every_file_with_its_hash(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    there = {p.relative_to(dataset).as_posix() for p in dataset.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == there
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((dataset / name).read_bytes()).hexdigest() == digest
    assert (manifest["cell_diameter_px"], manifest["crop_margin"]) == (24.0, 0.25)


def test_the_manifest_counts_by_split_source_and_class(dataset: Path, data: TinyData) -> None:
    counts = json.loads((dataset / "manifest.json").read_text())["counts"]
    assert set(counts) == {"train", "val"}  # the test split is nobody's to train on
    for split, names in (("train", ["t0", "t1", "t2", "t3"]), ("val", ["v10", "v11"])):
        ids = np.concatenate([data.drawn[n].class_id for n in names])
        assert counts[split] == {
            "pbc": {
                "photographs": len(names),
                "rbc": int((ids == 0).sum()),
                "wbc": int((ids == 1).sum()),
                "platelet": int((ids == 2).sum()),
            }
        }


def test_findings_stand_in_the_manifest(data: TinyData, tmp_path: Path) -> None:
    data.label_file("t0").write_text("1 0.25 0.25 0.1 0.1\n9 0.5 0.5 0.1 0.1\n")
    txl, _ = read_public(data.folder)
    list(write_dataset(txl, tmp_path / "d", cell_diameter_px=24, crop_margin=0.25))
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["findings"] == [
        {
            "file": "txl_pbc/labels/t0.txt",
            "line": 2,
            "kind": "unknown-class",
            "message": "'9'",
            "action": "box left out",
        }
    ]


def test_detector_photographs_show_red_cells_at_one_size(dataset: Path, data: TinyData) -> None:
    txl, _ = read_public(data.folder)
    of_source = source_diameters_px(txl.of("train"))
    for p in txl.of("train", "val"):
        image = cv2.imread(str(dataset / "detector" / "images" / p.split / f"{p.name}.png"))
        assert image is not None
        diameter = labelled_diameter_px(p, of_source)
        np.testing.assert_array_equal(
            image[:, :, ::-1], preprocess.detector_input(p.view(diameter), diameter, 24.0)
        )
        table = np.loadtxt(dataset / "detector" / "labels" / p.split / f"{p.name}.txt", ndmin=2)
        assert table[:, 0].astype(int).tolist() == p.class_id.tolist()  # CellClass, not TXL-PBC's numbers
        centre = (p.xyxy[:, :2] + p.xyxy[:, 2:]) / 2 / [192, 160]
        np.testing.assert_allclose(table[:, 1:3], centre, atol=1e-5)
    text = (dataset / "detector" / "data.yaml").read_text()
    assert "train: images/train\nval: images/val\n" in text
    assert "  0: rbc\n  1: wbc\n  2: platelet\n" in text


def test_crops_are_the_stations_own_and_carry_their_labels(dataset: Path, data: TinyData) -> None:
    for split, names in (("train", ["t0", "t1", "t2", "t3"]), ("val", ["v10", "v11"])):
        crops = np.load(dataset / "crops" / f"{split}.npy")
        rows = crop_rows(dataset, split)
        assert len(rows) == len(crops) == sum(data.drawn[n].counts.n_rbc for n in names)
        assert crops.dtype == np.uint8
        for i, row in enumerate(rows):
            drawn = data.drawn[row["name"]]
            box = np.array([[float(row[k]) for k in ("x0", "y0", "x1", "y1")]], np.float32)
            truth = int(np.abs(drawn.xyxy - box).max(axis=1).argmin())
            assert int(row["crop"]) == i
            assert row["verified"] == ("overlapping" if drawn.overlapping[truth] else "single")
            assert row["letter"] == ("O" if drawn.overlapping[truth] else "S")
            view = preprocess.view(drawn.image, float(row["diameter_px"]))
            exact = preprocess.cell_crops(view, drawn.xyxy[truth : truth + 1], margin=0.25)[0]
            assert np.abs(exact.astype(int) - crops[i].astype(int)).mean() < 3


class Recorder:
    """An ONNX session that keeps what it is given."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.given: list[dict[str, UInt8]] = []

    def run(self, names: list[str], inputs: dict[str, UInt8]) -> Any:
        self.given.append(inputs)
        return self.session.run(names, inputs)


def test_training_sees_the_pixels_that_the_station_shows_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, on a field of 640x480 with cells of 100 px."""
    drawn = draw_field(
        np.random.default_rng(7), width_px=640, height_px=480, cell_diameter_px=100.0,
        n_single=6, group_sizes=(2,), stain=CREAM,
    )  # fmt: skip
    write_image(tmp_path / "f.png", drawn.image)
    analyzer = Analyzer(Bundle.open(TOY), threads=1)
    manifest = analyzer.bundle.manifest
    detector, overlap = Recorder(analyzer.detector._session), Recorder(analyzer.classifier._session)
    monkeypatch.setattr(analyzer.detector, "_session", detector)
    monkeypatch.setattr(analyzer.classifier, "_session", overlap)
    field = image_file.load_field(tmp_path / "f.png", "s", "f", cell_diameter_px=100.0)
    found = analyzer.analyze(field, Scale(100.0, ScaleSource.CELL_DIAMETER)).cells.detections
    assert int((found.class_id == CellClass.RBC).sum()) > 4

    # The same field as a training photograph: its labels are what the station found.
    monkeypatch.setattr("rbc_train.data.labelled_diameter_px", lambda _photograph, _of_source: 100.0)
    thumbnail = np.zeros((32, 32), np.float32)
    photograph = Photograph(
        tmp_path / "f.png", "f", "pbc", "train", 640, 480, found.xyxy, found.class_id, thumbnail
    )
    size, margin = manifest.cell_diameter_px, manifest.crop_margin
    list(write_dataset(Collection([photograph]), tmp_path / "d", cell_diameter_px=size, crop_margin=margin))
    image = cv2.imread(str(tmp_path / "d" / "detector" / "images" / "train" / "f.png"))
    assert image is not None
    padded, _, _ = preprocess.pad_to_stride(np.ascontiguousarray(image[:, :, ::-1]))
    assert len(detector.given) == 1
    np.testing.assert_array_equal(detector.given[0]["image"][0], padded)

    crops = np.concatenate([given["crops"] for given in overlap.given])
    np.testing.assert_array_equal(np.load(tmp_path / "d" / "crops" / "train.npy"), crops)
    # The trainer cuts them again for every epoch.
    red = found.xyxy[found.class_id == CellClass.RBC]
    n = len(red)
    none = np.zeros(n, np.float32)
    samples = Samples(
        [photograph.view(100.0)], np.zeros(n, np.int64), red, none > 0, none, none,
        np.full(n, -1), np.ones((n, 2), np.float32), [""] * n, [""] * n,
    )  # fmt: skip
    np.testing.assert_array_equal(samples.crops(margin), crops)


def test_weak_labels_follow_from_the_areas_alone(dataset: Path) -> None:
    """Anybody who has the areas gets the same threshold, and the same labels."""
    threshold = json.loads((dataset / "manifest.json").read_text())["weak_label_threshold"]
    areas = np.array([int(r["otsu_area"]) for r in crop_rows(dataset, "train")], np.int64)
    assert threshold == labels.area_threshold(areas)
    for split in ("train", "val"):
        for row in crop_rows(dataset, split):
            assert row["weak"] == ("overlapping" if int(row["otsu_area"]) > threshold else "single")
    assert 0 < (areas > threshold).sum() < len(areas)


def test_the_same_data_give_the_same_dataset(data: TinyData, dataset: Path, tmp_path: Path) -> None:
    """Written twice, also over itself, no byte differs."""
    txl, _ = read_public(data.folder)
    before = (dataset / "manifest.json").read_bytes()
    for out in (tmp_path / "other", dataset):
        steps = list(write_dataset(txl, out, cell_diameter_px=24.0, crop_margin=0.25))
        assert steps == [(i, 6) for i in range(1, 7)]
        assert (out / "manifest.json").read_bytes() == before


def test_a_folder_of_somebody_else_is_not_overwritten(data: TinyData, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "crops").mkdir(parents=True)
    (mine / "crops" / "thesis.txt").write_text("years of work")
    txl, _ = read_public(data.folder)
    with pytest.raises(UnavailableError, match="is not empty and not a dataset"):
        list(write_dataset(txl, mine, cell_diameter_px=24.0, crop_margin=0.25))
    assert (mine / "crops" / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_dataset_can_be_made_again(data: TinyData, dataset: Path, tmp_path: Path) -> None:
    txl, _ = read_public(data.folder)
    out = tmp_path / "cut"
    next(write_dataset(txl, out, cell_diameter_px=24.0, crop_margin=0.25))  # and never again
    assert not (out / "manifest.json").exists()  # nobody takes it for finished
    list(write_dataset(txl, out, cell_diameter_px=24.0, crop_margin=0.25))
    assert (out / "manifest.json").read_bytes() == (dataset / "manifest.json").read_bytes()


def test_a_finding_reads_as_compilers_write_them() -> None:
    finding = AnnotationFinding(Path("a/b.txt"), 7, "outside", "too far", "clipped")
    assert str(finding) == "a/b.txt:7: outside: too far (clipped)"

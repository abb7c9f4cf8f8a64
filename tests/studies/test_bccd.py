"""BCCD's own boxes: what both sets annotate is judged by both, and the official split by its list."""

from pathlib import Path

import pytest
from command import called
from tiny_data import TinyData, photograph, voc

from rbc_edge.errors import UnavailableError
from rbc_train import results
from rbc_train.data import annotated_twice, official_test, read_public
from studies import bccd

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


def test_bccd_s_own_boxes_judge_what_both_sets_annotate(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # BCCD's annotation of the one photograph that both have lacks all red cells but one.
    twice = photograph(41)
    data.add_txl("val", "twin", twice, bccd_name="BloodImage_00009")
    data.add_bccd("val", "BloodImage_00009", twice)
    names = ["RBC" if c == 0 else "WBC" for c in twice.class_id.tolist()]
    keep = [i for i, n in enumerate(names) if n != "RBC"] + [names.index("RBC")]
    size = (twice.image.shape[1], twice.image.shape[0])
    data.voc_file("BloodImage_00009").write_text(voc(twice.xyxy[keep], [names[i] for i in keep], size))
    txl, own_boxes = read_public(data.folder)
    ((own, theirs),) = annotated_twice(data.folder, txl, own_boxes)
    assert (own.name, theirs.name) == ("BloodImage_00009", "twin")
    code, out, _ = called(
        bccd.app, monkeypatch, capsys, "--bundle", TOY, "--data", data.folder, "--threads", 1,
        "--out", tmp_path / "results",
    )  # fmt: skip
    assert code == 0
    rows = {line.split("  ")[0]: line.split("  ") for line in out.splitlines()}
    assert rows["val split, BCCD's boxes"][1] == "2"
    assert rows["validation, BCCD's boxes"][6] == "1"
    assert int(rows["validation, TXL-PBC's boxes"][6]) == twice.counts.n_rbc
    found = results.read_section("bccd-test", tmp_path / "results")
    assert found["map50"] is None  # of the test split only


def test_bccd_s_official_test_split_is_what_its_list_names(data: TinyData, tmp_path: Path) -> None:
    data.add_bccd("test", "BloodImage_00010", photograph(42))
    data.add_bccd("test", "BloodImage_00011", photograph(43))  # a twin of TXL-PBC's test
    photographs = read_public(data.folder)[1]
    with pytest.raises(UnavailableError, match="ImageSets"):
        official_test(data.folder, photographs)
    (data.folder / "bccd" / "ImageSets" / "Main").mkdir(parents=True)
    (data.folder / "bccd" / "ImageSets" / "Main" / "test.txt").write_text("BloodImage_00010\n")
    assert [p.name for p in official_test(data.folder, photographs)] == ["BloodImage_00010"]

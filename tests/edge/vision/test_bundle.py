"""A bundle is taken whole or not at all: every kind of damage is refused with exit code 4."""

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from rbc_edge.errors import BundleError
from rbc_edge.vision import bundle
from rbc_edge.vision.bundle import CLASSIFIER, DETECTOR, MANIFEST, TEST_EXPECTED, TEST_INPUT, Bundle, Manifest

FILES = (DETECTOR, CLASSIFIER, TEST_INPUT, TEST_EXPECTED)


@pytest.fixture
def folder(toy_bundle_path: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(toy_bundle_path, tmp_path / "bundle"))


def refused(folder: Path) -> str:
    """Returns why the bundle is refused, and checks that it says which file and what to do."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert int(caught.value.exit_code) == 4
    assert str(folder) in caught.value.message
    assert caught.value.advice
    return caught.value.message


def sealed(folder: Path, **changes: object) -> None:
    """Changes the manifest and signs it again, as somebody with intent would."""
    content = json.loads((folder / MANIFEST).read_text()) | changes
    known = {f.name for f in fields(Manifest)}
    manifest = Manifest(**{k: v for k, v in content.items() if k in known})
    content["bundle_id"] = manifest.content_id()
    (folder / MANIFEST).write_text(json.dumps(content))


def test_an_intact_bundle_opens_and_says_what_it_is(toy_bundle_path: Path) -> None:
    opened = Bundle.open(toy_bundle_path)
    assert opened.bundle_id == opened.manifest.content_id()
    assert set(opened.manifest.files) == set(FILES)
    said = json.loads(json.dumps(opened.describe()))
    assert said["path"] == str(toy_bundle_path)
    assert said["bundle_id"] == opened.bundle_id
    assert said["files"] == opened.manifest.files


def test_signing_a_manifest_again_without_a_change_keeps_it_open(folder: Path) -> None:
    """The tests below would pass for the wrong reason if `sealed` itself broke the bundle."""
    before = Bundle.open(folder).bundle_id
    sealed(folder)
    assert Bundle.open(folder).bundle_id == before
    sealed(folder, licence="other")
    assert Bundle.open(folder).bundle_id != before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last", "one more", "one less"])
def test_one_byte_changed(folder: Path, name: str, where: str) -> None:
    data = bytearray((folder / name).read_bytes())
    if where == "one more":
        data += b"\0"
    elif where == "one less":
        del data[-1]
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name}: does not match its SHA-256" in refused(folder)


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    """A digit of a threshold, a letter of a name: whatever still reads as JSON is refused by its id."""
    file = folder / MANIFEST
    text = file.read_text()
    for old, new in (("0.3", "0.2"), ('"RBC"', '"WBC"'), ("640", "672"), ("AGPL", "AGPM"), ("40.0", "41.0")):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        assert "does not match its bundle_id" in refused(folder)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name}: No such file" in refused(folder)


def test_there_is_no_bundle(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in refused(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not text"),
        (b"[]", "is not a manifest"),
        (b'"manifest"', "is not a manifest"),
        (b"null", "is not a manifest"),
        (b"{}", "format None, this version reads 4"),
        (b'{"format": 1}', "format 1, this version reads 4"),
        (b'{"format": "1"}', "format '1', this version reads 4"),
        (b'{"format": 2}', "format 2, this version reads 4"),
        (b'{"format": 4}', "missing or unknown: bundle_id"),
    ],
)
def test_the_manifest_is_something_else(folder: Path, content: bytes, message: str) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert message in refused(folder)


def test_unknown_and_missing_keys_are_named(folder: Path) -> None:
    sealed(folder, colour="red")
    assert "missing or unknown: colour" in refused(folder)
    content = json.loads((folder / MANIFEST).read_text())
    del content["colour"], content["licence"]
    (folder / MANIFEST).write_text(json.dumps(content))
    assert "missing or unknown: licence" in refused(folder)


OUT_OF_RANGE: dict[str, Any] = {
    "two classes": {"class_names": ["RBC", "WBC"]},
    "four thresholds": {"score_threshold": [0.3] * 4},
    "threshold over 1": {"score_threshold": [0.3, 0.3, 1.5]},
    "threshold is text": {"score_threshold": ["high", 0.3, 0.3]},
    "threshold is no list": {"score_threshold": 0.3},
    "iou below 0": {"iou_threshold": [-0.1, 0.3, 0.3]},
    "iou across is text": {"iou_threshold_across": "0.4"},
    "overlap threshold is null": {"overlap_threshold": None},
    "refuse threshold over 1": {"refuse_threshold": 1.01},
    "shape threshold over 1": {"shape_threshold": 1.01},
    "a weight of shapes is text": {"shape_weights": [["long"]]},
    "refuse threshold is text": {"refuse_threshold": "never"},
    "overlap threshold is NaN": {"overlap_threshold": float("nan")},
    "no diameter": {"cell_diameter_px": 0},
    "infinite diameter": {"cell_diameter_px": float("inf")},
    "diameter is text": {"cell_diameter_px": "40"},
    "tiles that overlap by all": {"tile_overlap_px": 320},
    "tiles without overlap": {"tile_px": 0},
    "half a pixel": {"tile_px": 640.5},
    "margin": {"crop_margin": -0.25},
    "classes are a number": {"class_names": 3},
    "files are a number": {"files": 3},
    "no files": {"files": {}},
}


@pytest.mark.parametrize("change", sorted(OUT_OF_RANGE))
def test_values_that_the_pipeline_cannot_use(folder: Path, change: str) -> None:
    sealed(folder, **OUT_OF_RANGE[change])
    assert MANIFEST in refused(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", "", "a\0b"])
def test_a_file_name_that_leads_elsewhere(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    # The right hash of the file that it points to: nothing but its name is wrong.
    sealed(folder, files={**files, name: "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"})
    assert "out of its range" in refused(folder)


def test_a_network_that_is_none_is_refused_when_it_is_opened(folder: Path) -> None:
    (folder / DETECTOR).write_bytes(b"not a network")
    source = {name: folder / name for name in FILES}
    content = json.loads((folder / MANIFEST).read_text())
    broken = bundle.write(folder, source, Manifest(**content))
    with pytest.raises(BundleError, match=r"detector\.onnx: ONNX Runtime cannot load it"):
        broken.session(DETECTOR, threads=1)


def test_writing_names_every_byte_and_leaves_nothing_of_the_earlier_bundle(
    toy_bundle_path: Path, tmp_path: Path
) -> None:
    opened = Bundle.open(toy_bundle_path)
    source = {name: toy_bundle_path / name for name in FILES}
    (tmp_path / bundle.DETECTOR_FP32).write_bytes(b"of an earlier bundle")
    written = bundle.write(tmp_path, source, replace(opened.manifest, files={}, bundle_id=""))
    assert written.bundle_id == opened.bundle_id
    assert asdict(written.manifest) == asdict(opened.manifest)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, MANIFEST])
    other = bundle.write(tmp_path, source, replace(opened.manifest, overlap_threshold=0.6))
    assert other.bundle_id != opened.bundle_id
    assert Bundle.open(tmp_path).manifest.overlap_threshold == 0.6


def test_a_bundle_without_its_test_cannot_be_written(toy_bundle_path: Path, tmp_path: Path) -> None:
    source = {name: toy_bundle_path / name for name in FILES if name != TEST_INPUT}
    with pytest.raises(BundleError, match=TEST_INPUT):
        bundle.write(tmp_path / "new", source, Bundle.open(toy_bundle_path).manifest)
    assert not (tmp_path / "new").exists()


def test_a_manifest_out_of_range_cannot_be_written(toy_bundle_path: Path, tmp_path: Path) -> None:
    source = {name: toy_bundle_path / name for name in FILES}
    wrong = replace(Bundle.open(toy_bundle_path).manifest, overlap_threshold=2.0)
    with pytest.raises(BundleError, match="out of its range"):
        bundle.write(tmp_path, source, wrong)
    with pytest.raises(BundleError, match="No such file"):
        Bundle.open(tmp_path)  # and what lies there is not taken for a bundle


def test_a_manifest_that_is_nested_too_deeply_is_refused_in_words(folder: Path) -> None:
    deep: object = 0
    for _ in range(600):
        deep = {"a": deep}
    content = json.loads((folder / MANIFEST).read_text()) | {"training": deep}
    (folder / MANIFEST).write_text(json.dumps(content))
    assert "nested too deeply" in refused(folder)

"""The workshop's command line: what it prints, what it writes, how it fails."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command import rbc_train
from tiny_data import TinyData, photograph, voc

from rbc_edge.errors import UnavailableError
from rbc_train import results
from rbc_train.data import annotated_twice, official_test, read_public

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


def test_help_loads_no_torch() -> None:
    """Which takes seconds."""
    script = (
        "import sys; from rbc_train.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(','.join({'torch', 'ultralytics', 'onnxruntime', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("dataset", "detector", "classifier", "evaluate", "scale", "disturb"):
        assert command in done.stdout


def test_dataset_prints_counts_and_lists_findings(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data.label_file("t0").write_text(data.label_file("t0").read_text() + "7 0.5 0.5 0.1 0.1\n")
    line = len(data.label_file("t0").read_text().splitlines())
    words = ("dataset", "--data", data.folder, "--out", tmp_path / "d", "--cell-diameter", 24)
    code, out, err = rbc_train(monkeypatch, capsys, *words)
    assert code == 0
    assert f"{data.label_file('t0')}:{line}: unknown-class: '7' (box left out)" in err
    rows = [row.split() for row in out.splitlines()]
    assert rows[0] == ["split", "source", "photographs", "rbc", "wbc", "platelet"]
    n = [
        sum(getattr(data.drawn[f"t{i}"].counts, k) for i in range(4))
        for k in ("n_rbc", "n_wbc", "n_platelets")
    ]
    assert rows[1] == ["train", "pbc", "4", *map(str, n)]
    assert rows[2][:3] == ["val", "pbc", "2"]
    assert "1 findings" in out
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["cell_diameter_px"] == 24
    assert rbc_train(monkeypatch, capsys, *words, "--strict")[0] == 3


def test_clean_data_pass_strictly(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = rbc_train(
        monkeypatch, capsys, "dataset", "--data", data.folder, "--out", tmp_path / "d", "--strict"
    )
    assert code == 0
    assert "0 findings" in out


def test_a_classifier_is_trained_and_its_checkpoint_named(
    data: TinyData,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (
        "classifier",
        "--dataset",
        dataset,
        "--data",
        data.folder,
        "--out",
        tmp_path / "run",
        "--threads",
        1,
    )
    code, out, err = rbc_train(monkeypatch, capsys, *words, "--model", "base", "--epochs", 2)
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "run" / "classifier.pt"))  # ultralytics greets
    assert "[###############               ] 1/2" in err
    assert "accuracy" in err
    code, out, err = rbc_train(monkeypatch, capsys, *words, "--model", "improved", "--epochs", 2)
    assert code == 2
    assert err.startswith("error: ")
    assert "has other options" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("dataset", "--data", "nowhere"), 5, "splits.csv: no such file"),
        (("detector", "--dataset", "nowhere"), 5, "make the dataset first"),
        (("classifier", "--dataset", "nowhere"), 5, "not a finished dataset"),
        (("evaluate", "--bundle", "nowhere"), 4, "manifest.json: No such file"),
        (("classifier", "--model", "huge"), 2, "huge"),
        (("dataset", "--cell-diameter", "2"), 2, "cell-diameter"),
    ],
)
def test_what_goes_wrong_has_its_message_and_code(
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RBC_DATA", str(data.folder))
    found, out, err = rbc_train(monkeypatch, capsys, *words)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert out == "" or words[0] == "detector"  # ultralytics greets on stdout


def test_evaluate_scores_a_bundle_and_publishes(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs" / "results"
    words = ("evaluate", "--bundle", TOY, "--data", data.folder, "--out", folder, "--threads", 1)
    code, out, err = rbc_train(
        monkeypatch, capsys, *words, "--scale", "labelled", "--sheets", tmp_path / "sheets"
    )
    assert code == 0
    lines = out.splitlines()
    assert "scale labelled, validation photographs of TXL-PBC" in lines[0]
    assert [line.split()[:2] for line in lines[2:4]] == [["all", "2"], ["pbc", "2"]]
    assert lines[4].split() == ["target", "goal", "ours", "reached"]
    assert any(line.startswith("count, total") for line in lines[5:])
    assert str(tmp_path / "docs" / "results.md") in err
    assert "sheets" in err
    written = json.loads((folder / "metrics.json").read_text())["data"]
    assert written["scale"] == "labelled"
    assert written["figures"]["all"]["photographs"] == 2
    n = sum(data.drawn[name].counts.n_rbc for name in ("v10", "v11"))
    assert written["figures"]["all"]["rbc_labelled"] == n
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "python -m rbc_train evaluate --scale labelled" in page
    assert "(results/metrics-roc.png)" in page


def test_scale_and_disturb_publish_what_the_targets_read(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "try_scales", partial(trials.try_scales, factors=(1.0, 1.5)))
    monkeypatch.setattr(trials, "try_strays", partial(trials.try_strays, factors=(1.0,)))
    monkeypatch.setattr(trials, "try_mosaics", partial(trials.try_mosaics, megapixels=0.1))
    folder = tmp_path / "docs" / "results"
    rest = ("--bundle", TOY, "--data", data.folder, "--out", folder, "--threads", 1)
    code, out, _ = rbc_train(monkeypatch, capsys, "scale", *rest)
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
    code, out, _ = rbc_train(monkeypatch, capsys, "disturb", *rest, "--every", 2)
    assert code == 0
    assert out.startswith("1 photographs")
    assert "disturb --every 2`" in (tmp_path / "docs" / "results.md").read_text()
    code, out, _ = rbc_train(monkeypatch, capsys, "evaluate", *rest)
    assert code == 0
    measured = {line.split("  ")[0]: line for line in out.splitlines() if line.startswith("count change")}
    assert len(measured) == 3
    assert not any("not run" in line for line in measured.values())


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
    txl, bccd = read_public(data.folder)
    ((own, theirs),) = annotated_twice(data.folder, txl, bccd)
    assert (own.name, theirs.name) == ("BloodImage_00009", "twin")
    code, out, _ = rbc_train(
        monkeypatch, capsys, "bccd", "--bundle", TOY, "--data", data.folder, "--threads", 1,
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
    bccd = read_public(data.folder)[1]
    with pytest.raises(UnavailableError, match="ImageSets"):
        official_test(data.folder, bccd)
    (data.folder / "bccd" / "ImageSets" / "Main").mkdir(parents=True)
    (data.folder / "bccd" / "ImageSets" / "Main" / "test.txt").write_text("BloodImage_00010\n")
    assert [p.name for p in official_test(data.folder, bccd)] == ["BloodImage_00010"]


def test_a_folder_that_cannot_be_is_said(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = rbc_train(
        monkeypatch, capsys, "evaluate", "--bundle", TOY, "--data", data.folder, "--threads", 1,
        "--out", tmp_path / "file" / "results",
    )  # fmt: skip
    assert code == 5
    assert "error: " in err and "--out" in err and "Traceback" not in err

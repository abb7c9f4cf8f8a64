"""The workshop's command line: what it prints, what it writes, how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import rbc_train
from tiny_data import TinyData

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
    for command in ("dataset", "detector", "teach", "classifier", "evaluate", "pages"):
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

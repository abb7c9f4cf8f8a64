"""Each laboratory left out once: nothing of it gets into its bundle, and what is judged was never seen."""

import json
from pathlib import Path

import pytest
from command import called
from test_evaluate import examined, lattice
from test_exporting import let_the_toy_detect
from tiny_data import TinyData, add_chula

from rbc_edge.vision.bundle import Bundle
from rbc_train import laboratories as by_laboratory
from rbc_train import networks, results, train_detector
from rbc_train.data import verified_labels
from studies import laboratories
from studies.laboratories import NOTHING, Outcome, TrainingOptions

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


@pytest.fixture
def options(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingOptions:
    """Drawn data of two laboratories. The toy is exported for the detector, after one epoch of training."""
    add_chula(data)
    let_the_toy_detect(monkeypatch)
    monkeypatch.setattr(networks.StagesNet, "begin_from", lambda _self, _detector: None)
    return TrainingOptions(
        data.folder, None, tmp_path / "runs", epochs=1, classifier_epochs=1, image_px=64, threads=1
    )


def silent(_line: str) -> None:
    pass


def test_a_laboratory_is_left_out_in_every_split(data: TinyData) -> None:
    add_chula(data)
    everything = laboratories.read_everything(data.folder)
    assert {p.laboratory for p in everything.photographs} == {"pbc", "chula"}
    for name, other in (("pbc", "chula"), ("chula", "pbc")):
        kept = laboratories.without(name, everything)
        assert {p.laboratory for p in kept.photographs} == {other}
    assert laboratories.without(NOTHING, everything).photographs == everything.photographs


def test_bundles_are_trained_once_and_judged_on_what_they_never_saw(
    options: TrainingOptions,
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = laboratories.read_everything(data.folder)
    for name, learned in (("chula", ["pbc"]), (NOTHING, ["chula", "pbc"])):
        folder = laboratories.train_without(name, everything, options, silent)
        assert folder == options.runs / f"without-{name}" / "bundle"
        manifest = Bundle.open(folder).manifest
        assert sorted(by_laboratory.learned_from(manifest.training) or ()) == learned
        assert any(i.startswith("chula") for i in manifest.calibration["images"]) == ("chula" in learned)
        assert set(manifest.metrics["int8"]) == {"all", *learned}
        dataset = folder.parent / "dataset"
        counts = json.loads((dataset / "manifest.json").read_text())["counts"]
        assert sorted(counts["train"]) == sorted(counts["val"]) == learned
        assert (dataset / "crops" / "train-negatives.npy").is_file()

    monkeypatch.setattr(train_detector, "train", lambda _options: pytest.fail("trained again"))
    capsys.readouterr()  # what ultralytics said
    words = ("--data", data.folder, "--runs", options.runs, "--threads", 1)
    given = (laboratories.app, monkeypatch, capsys)
    code, out, _ = called(*given, "--train", "--only", "chula", "--only", NOTHING, *words)
    assert (code, len(out.splitlines())) == (0, 2)

    out_folder = tmp_path / "docs" / "results"
    code, out, err = called(*given, *words, "--out", out_folder)
    assert code == 0
    assert "without-pbc/bundle: not trained yet, left out" in err
    assert [line.split("  ")[0] for line in out.splitlines()[2:4]] == ["chula, left out", "chula, learned"]
    found = results.read_section("left-out", out_folder)
    assert found["bundles"]["chula"]["learned"] == ["pbc"]
    assert found["bundles"][NOTHING]["learned"] == ["chula", "pbc"]
    of_chula = found["laboratories"]["chula"]
    assert of_chula["left_out"]["fields"] == of_chula["learned"]["fields"] == 1
    chula = [p for p in everything.complete("val") if p.laboratory == "chula"]
    assert of_chula["left_out"]["labelled"] == data.drawn["chula-3"].counts.n_rbc
    assert of_chula["left_out"]["verified"] <= len(verified_labels(chula).of_image("3.jpg"))
    assert "without chula: bundle" in (tmp_path / "docs" / "results.md").read_text()

    code, _, err = called(*given, *words, "--bundle", f"pbc={options.runs / 'without-chula' / 'bundle'}")
    assert code == 2
    assert "the bundle learned from pbc" in err


def test_an_export_that_was_cut_goes_on(options: TrainingOptions, data: TinyData) -> None:
    everything = laboratories.read_everything(data.folder)
    folder = laboratories.train_without("pbc", everything, options, silent)
    before = Bundle.open(folder).bundle_id
    (folder / "manifest.json").unlink()
    said: list[str] = []
    laboratories.train_without("pbc", everything, options, said.append)
    assert "without pbc: dataset" not in said
    assert Bundle.open(folder).bundle_id == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--only", "moon"), 2, "moon: no such laboratory"),
        (("--bundle", "moon=x"), 2, "there are chula, pbc, nothing"),
        (("--bundle", "chula"), 2, "--bundle chula: not LAB=PATH"),
        (("--bundle", f"chula={TOY}"), 2, "does not say what it learned from"),
        (("--runs", "nowhere"), 5, "no bundle without a laboratory"),
    ],
)
def test_what_cannot_be_judged_is_said(
    data: TinyData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    add_chula(data)
    given = (laboratories.app, monkeypatch, capsys)
    found, _, err = called(*given, "--data", data.folder, "--threads", 1, *words)
    assert found == code
    assert message in err


def test_a_laboratory_stands_beside_itself_learned() -> None:
    def of(name: str, n: int) -> dict[str, dict[str, float]]:
        truth = lattice(10)
        return by_laboratory.figures([examined(truth, truth[:n], [0.9] * n, source=name)], 0.5)

    outcomes = [
        Outcome("pbc", "aa", frozenset({"raabin", "chula"}), 25, of("pbc", 5)),
        Outcome("raabin", "bb", frozenset({"pbc"}), None, of("raabin", 6)),
        Outcome(NOTHING, "cc", frozenset({"pbc", "chula"}), 25, of("pbc", 9) | of("raabin", 8)),
    ]
    made = laboratories.section(outcomes)
    # The bundle of all did not learn from raabin, so nothing stands beside it.
    assert [(*r[:2], made.tables[1].rows[i][3]) for i, r in enumerate(made.tables[0].rows)] == [
        ("pbc, left out", "no", "0.500"),
        ("pbc, learned", "yes", "0.900"),
        ("raabin, left out", "no", "0.600"),
    ]
    assert set(made.data["laboratories"]["raabin"]) == {"left_out"}
    assert made.data["bundles"]["raabin"]["epochs"] is None

"""Training of the overlap CNN: a run cut anywhere ends, bit for bit, as one that was not."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import TinyData, add_chula

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.vision.boxes import iou
from rbc_train import networks, runs, train_classifier
from rbc_train.data import Collection, photographs_of, read_chula, read_public, write_dataset
from rbc_train.networks import ModelName
from rbc_train.train_classifier import ClassifierOptions


class CutError(Exception):
    """Stands for a kill."""


@pytest.fixture
def options(data: TinyData, dataset: Path, tmp_path: Path) -> ClassifierOptions:
    return ClassifierOptions(dataset, data.folder, tmp_path / "run", epochs=3, threads=1)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["network"]
    return state


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("model", ["base", "improved", "station", "teacher"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    options: ClassifierOptions, tmp_path: Path, model: ModelName
) -> None:
    whole = replace(options, model=model, out=tmp_path / "whole")
    cut = replace(options, model=model, out=tmp_path / "cut")
    expected = weights(train_classifier.train(whole))

    def stop_after(limit: int) -> None:
        def progress(done: int, total: int, line: str) -> None:
            assert total == 3
            assert "accuracy" in line
            if done == limit:
                raise CutError

        with pytest.raises(CutError):
            train_classifier.train(cut, progress)
        assert not (cut.out / "classifier.pt").exists()

    stop_after(1)
    stop_after(2)
    torch.manual_seed(99)  # another process has another state
    torch.rand(7)
    resumed = weights(train_classifier.train(cut))
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    assert log_of(cut.out) == log_of(whole.out)


@pytest.mark.parametrize("where", ["_log", "save"])
def test_a_kill_between_log_and_checkpoint_costs_no_line_and_repeats_none(
    options: ClassifierOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = replace(options, out=tmp_path / "whole")
    expected = weights(train_classifier.train(whole))
    module = train_classifier if where == "_log" else runs
    real = getattr(module, where)
    calls: list[int] = []

    def once(*arguments: object, **more: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise CutError
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, where, once)
        with pytest.raises(CutError):
            train_classifier.train(options)
    assert all(torch.equal(expected[k], v) for k, v in weights(train_classifier.train(options)).items())
    assert log_of(options.out) == log_of(whole.out)


def test_a_finished_run_is_not_trained_again(options: ClassifierOptions) -> None:
    checkpoint = train_classifier.train(options)
    before = checkpoint.read_bytes()

    def never(_done: int, _total: int, _line: str) -> None:
        raise AssertionError("trained again")

    assert train_classifier.train(options, never) == checkpoint
    assert checkpoint.read_bytes() == before


def test_seeds_matter_and_are_all_that_matters(options: ClassifierOptions, tmp_path: Path) -> None:
    first = weights(train_classifier.train(options))
    other = weights(train_classifier.train(replace(options, seed=1, out=tmp_path / "other")))
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_a_run_with_other_options_is_not_mixed_in(options: ClassifierOptions) -> None:
    train_classifier.train(options)
    with pytest.raises(UsageError, match="has other options"):
        train_classifier.train(replace(options, epochs=4))


def test_log_and_configuration_are_kept_with_the_checkpoint(options: ClassifierOptions) -> None:
    checkpoint = train_classifier.train(options)
    lines = log_of(options.out)
    assert [line["epoch"] for line in lines] == ["1", "2", "3"]
    assert all(0 <= float(line["accuracy"]) <= 1 and float(line["loss"]) > 0 for line in lines)
    config = json.loads((options.out / "config.json").read_text())
    assert (config["model"], config["epochs"], config["crop_margin"], config["seed"]) == (
        "station",
        3,
        0.25,
        0,
    )
    network, kept = networks.load_classifier(checkpoint)
    assert kept == config
    assert not network.training


def test_the_paper_s_models_learn_from_weak_labels_too(options: ClassifierOptions) -> None:
    weak = replace(options, model="improved", labels="weak", epochs=1)
    config = networks.load_classifier(train_classifier.train(weak))[1]
    assert (config["labels"], config["crop_margin"], config["paste"]) == ("weak", 0.0, 0.0)


def test_the_loss_falls(options: ClassifierOptions) -> None:
    train_classifier.train(replace(options, model="base", epochs=6))
    losses = [float(line["loss"]) for line in log_of(options.out)]
    assert losses[-1] < losses[0]


def test_what_is_missing_is_named(options: ClassifierOptions, data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not a finished dataset"):
        train_classifier.train(replace(options, dataset=tmp_path / "none"))
    with pytest.raises(UnavailableError, match=r"classifier\.pt: no such file"):
        networks.load_classifier(tmp_path / "classifier.pt")
    (data.folder / "txl_pbc/images/t2.jpg").unlink()
    with pytest.raises(UnavailableError, match="t2 is not in the data"):
        train_classifier.train(replace(options, out=tmp_path / "other"))


def test_without_labels_there_is_nothing_to_learn(options: ClassifierOptions, dataset: Path) -> None:
    index = dataset / "crops" / "train.csv"
    index.write_text(index.read_text().replace(",single,\n", ",,\n").replace(",overlapping,\n", ",,\n"))
    with pytest.raises(UsageError, match="no verified labels to train on"):
        train_classifier.train(options)


def test_without_validation_labels_it_trains_all_the_same(options: ClassifierOptions, dataset: Path) -> None:
    index = dataset / "crops" / "val.csv"
    index.write_text(index.read_text().replace(",single,\n", ",,\n").replace(",overlapping,\n", ",,\n"))
    train_classifier.train(replace(options, epochs=1))
    assert log_of(options.out)[0]["accuracy"] == "nan"


def test_samples_are_the_labelled_boxes(data: TinyData, dataset: Path) -> None:
    photographs = {p.name: p for p in read_public(data.folder)[0].photographs}
    for kind in ("weak", "verified"):
        samples = train_classifier.read_samples(
            dataset, photographs, "train", "weak" if kind == "weak" else "verified"
        )
        assert len(samples) == sum(data.drawn[f"t{i}"].counts.n_rbc for i in range(4))
        np.testing.assert_allclose(samples.crops(0.25), np.load(dataset / "crops" / "train.npy"), atol=60)
    n_overlapping = sum(data.drawn[f"t{i}"].counts.n_rbc_overlapping for i in range(4))
    assert int(samples.overlapping.sum()) == n_overlapping
    assert samples.letter.count("O") == n_overlapping


def test_what_is_not_one_red_cell_is_learned_beside_the_cells(data: TinyData, tmp_path: Path) -> None:
    """White cells, platelets, what was looked at and holds nothing, and boxes that are drawn wrong."""
    add_chula(data)
    everyone = [*read_public(data.folder)[0].photographs, *read_chula(data.folder / "chula").photographs]
    list(
        write_dataset(
            Collection(everyone), tmp_path / "d", cell_diameter_px=24, crop_margin=0.25, negatives=True
        )
    )
    photographs = photographs_of(tmp_path / "d", data.folder)

    def read(*, others: bool) -> train_classifier.Samples:
        return train_classifier.read_samples(tmp_path / "d", photographs, "train", "verified", others=others)

    cells, everything = read(others=False), read(others=True)
    n = len(cells)
    assert not np.isnan(cells.target).any()
    assert (cells.refuse == 0).all()
    np.testing.assert_array_equal(everything.target[:n], cells.target)
    assert np.isnan(everything.target[n:]).all() and (everything.refuse[n:] == 1).all()
    negatives = sum(len(p.non_red_cells()) for p in everyone if p.split == "train" and p.complete)
    assert len(everything) > n + negatives  # and the wrong ones
    again = read(others=True)
    np.testing.assert_array_equal(again.xyxy, everything.xyxy)
    names = sorted(p.name for p in photographs.values() if p.split == "train" and p.complete)
    for view, box in zip(everything.view[n + negatives :], everything.xyxy[n + negatives :], strict=True):
        assert iou(box[None], photographs[names[view]].xyxy).max() <= 0.4


def test_a_box_of_several_cells_overlaps_and_is_not_asked_whether_it_is_one(
    options: ClassifierOptions, data: TinyData
) -> None:
    index = options.dataset / "crops" / "train.csv"
    with index.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows[0]["letter"], rows[0]["verified"] = "M", "overlapping"
    with index.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    photographs = photographs_of(options.dataset, data.folder)
    samples = train_classifier.read_samples(options.dataset, photographs, "train", "verified")
    assert samples.target[0] == 1
    assert np.isnan(samples.refuse).tolist() == [True] + [False] * (len(samples) - 1)


def test_a_question_that_a_crop_does_not_answer_teaches_nothing() -> None:
    logits = torch.tensor([0.3, -2.0, 1.0], requires_grad=True)
    target = torch.tensor([1.0, float("nan"), 0.0])
    train_classifier._loss(logits, target, 0.0, torch.ones(2)).backward()  # type: ignore[no-untyped-call]
    gradient = logits.grad
    assert gradient is not None
    assert (gradient != 0).tolist() == [True, False, True]
    nothing = train_classifier._loss(logits, torch.full((3,), float("nan")), 0.0, torch.ones(2))
    assert float(nothing.detach()) == 0


def test_of_a_crowded_photograph_not_every_crop_is_taught() -> None:
    rows = [{"name": "a"}] * 5 + [{"name": "b"}] * 100
    chosen = train_classifier._spread(rows)
    assert chosen[:5] == [0, 1, 2, 3, 4]
    own = chosen[5:]
    assert len(own) == len(set(own)) == 18
    assert (own[0], own[-1]) == (5, 104)


def test_blocks_are_dealt_together() -> None:
    rows = [{"name": f"chula-{i}"} for i in (9, 10, 1, 2, 30, 31)]
    assert train_classifier.deal(rows, 3, blocks=True) == {
        "chula-1": 0, "chula-2": 0, "chula-9": 1, "chula-10": 1, "chula-30": 2, "chula-31": 2,
    }  # fmt: skip

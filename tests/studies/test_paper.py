"""The paper, repeated: what a seed draws, what a cut costs, what the tables say."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import called
from tiny_data import TinyData
from torch import nn

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import Bool, UInt8
from rbc_train import networks, results, train_classifier
from studies import paper, paper_trials
from studies.paper_trials import (
    ABLATIONS,
    EXPERIMENTS,
    PARTS,
    PRINTED,
    REFERENCE,
    STATION,
    Crops,
    Plan,
    Recipe,
    Task,
)

PLAN = Plan(
    seeds=2,
    epochs=1,
    sizes=(10, 0),
    curve_seeds=2,
    steps=1,
    long_steps=2,
    long_seeds=1,
    mixes=(0.2, 0.8),
    mix_size=12,
    mix_seeds=2,
    ablation_seeds=2,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_crops(n: int, seed: int) -> Crops:
    """Noise, darker where the weak label says overlapping; the verified label differs for each fifth."""
    rng = np.random.default_rng(seed)
    weak = np.arange(n) % 2 == 1
    tight: UInt8 = rng.integers(0, 120, (n, 64, 64, 3)).astype(np.uint8)
    tight[~weak] += 120
    return Crops(
        tight,
        tight[:, ::-1].copy(),
        weak,
        np.where(weak, 3000, 2000).astype(np.int64),
        weak ^ (np.arange(n) % 5 == 0),
        np.arange(n) % 10 != 3,
        np.array(["bccd", "bccd", "pbc"] * n)[:n],
    )


@pytest.fixture
def crops() -> tuple[Crops, Crops]:
    val = some_crops(20, 1)
    return some_crops(90, 0), val.take(np.flatnonzero(val.known))


def test_the_experiments_are_those_in_print() -> None:
    """Table of the paper: crops, accuracy, precision, recall and F1 of both classes."""
    assert [(e.n, sum(e.train), sum(e.test)) for e in EXPERIMENTS.values()] == [(19, 13, 6), (38, 28, 10)]
    mixes = [tuple(np.add(e.train, e.test)) for e in EXPERIMENTS.values()]
    assert mixes == [(8, 11), (17, 21)]
    in_print = {
        "base": (0.50, 0.00, 0.00, 0.00, 0.50, 1.00, 0.67),
        "improved": (0.80, 0.78, 1.00, 0.88, 1.00, 0.33, 0.50),
    }
    for name, expected in in_print.items():
        found = EXPERIMENTS[name].printed()
        assert [found[f] for f in list(found)[:7]] == pytest.approx(expected, abs=0.006)
    assert EXPERIMENTS["improved"].printed()["auc"] == 0.81
    assert [sum(e.confusion) for e in EXPERIMENTS.values()] == [6, 10]


def test_a_seed_draws_the_paper_s_classes_and_never_tests_what_it_taught(
    crops: tuple[Crops, Crops], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Crops, list[bool]]] = []
    real = paper_trials.teach

    def teach(recipe: Recipe, taught: Crops, target: Bool, *, steps: int, seed: int, batch: int) -> nn.Module:
        seen.append((taught, target.tolist()))
        return real(recipe, taught, target, steps=steps, seed=seed, batch=batch)

    monkeypatch.setattr(paper_trials, "teach", teach)
    task = Task("experiment", "improved", PRINTED["improved"], "weak", 38, 0, 1)
    trial = paper_trials.perform(task, *crops)
    (taught, target), size = seen[0], EXPERIMENTS["improved"]
    assert (target.count(False), target.count(True)) == size.train
    assert (trial.weak.count(False), trial.weak.count(True)) == size.test
    assert set(taught.source) == {"bccd"}
    assert taught.known.all()
    assert len({c.tobytes() for c in taught.tight}) == 28
    shuffled = paper_trials.perform(replace(task, study="shuffled"), *crops)
    assert (shuffled.weak, shuffled.verified) == (trial.weak, trial.verified)
    assert sorted(seen[1][1]) == sorted(target)
    assert seen[1][1] != target
    assert shuffled.verdicts == {}
    assert paper_trials.perform(replace(task, seed=1), *crops).score != trial.score
    again = paper_trials.perform(task, *crops)
    assert json.dumps(asdict(again)) == json.dumps(asdict(trial))


def test_weak_and_verified_labels_teach_with_the_same_crops(
    crops: tuple[Crops, Crops], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bytes, list[bool]]] = []

    def teach(_recipe: Recipe, taught: Crops, target: Bool, **_more: object) -> nn.Module:
        seen.append((taught.tight.tobytes(), target.tolist()))
        return networks.build("base")

    monkeypatch.setattr(paper_trials, "teach", teach)
    weak = Task("curve", "improved", REFERENCE, "weak", 20, 3, 1)
    paper_trials.perform(weak, *crops)
    paper_trials.perform(replace(weak, labels="verified"), *crops)
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]
    assert paper_trials.perform(replace(weak, n=0), *crops).n_crops == int(crops[0].known.sum())
    assert paper_trials.perform(replace(weak, n=-1), *crops).n_crops == 90
    mixed = paper_trials.perform(replace(weak, study="mix", labels="verified", n=20, share=0.25), *crops)
    assert (mixed.n_crops, sum(seen[-1][1])) == (20, 5)


def test_more_crops_than_there_are_cannot_be_drawn(crops: tuple[Crops, Crops]) -> None:
    with pytest.raises(UsageError, match="500 crops are to be drawn where the dataset has 81"):
        paper_trials.perform(Task("curve", "improved", REFERENCE, "weak", 500, 0, 1), *crops)


def test_every_ablation_changes_one_thing() -> None:
    assert len({json.dumps(asdict(r)) for r in (REFERENCE, *ABLATIONS.values())}) == 1 + len(ABLATIONS)
    for name, recipe in ABLATIONS.items():
        changed = [k for k, v in asdict(recipe).items() if v != asdict(REFERENCE)[k]]
        assert len(changed) == (3 if name == "without all three" else 1), name


@pytest.mark.parametrize("recipe", [PRINTED["base"], STATION, *ABLATIONS.values()])
def test_every_recipe_can_be_taught(crops: tuple[Crops, Crops], recipe: Recipe) -> None:
    train = crops[0].take(np.arange(6))
    before = paper_trials.teach(recipe, train, train.weak, steps=0, seed=1)
    after = paper_trials.teach(recipe, train, train.weak, steps=2, seed=1)
    again = paper_trials.teach(recipe, train, train.weak, steps=2, seed=1)
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    for a, b in zip(after.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_learns_what_is_plain_to_see(crops: tuple[Crops, Crops]) -> None:
    train, val = crops
    network = paper_trials.teach(replace(REFERENCE, noise=0.0), train, train.weak, steps=25, seed=0)
    called = networks.predict(network, val.tight) >= 0.5
    assert (called == val.weak).all()


def test_focal_loss_weighs_what_is_known_less(crops: tuple[Crops, Crops]) -> None:
    """Lin et al. 2017, equation 5: at probability one half the loss is a quarter of cross entropy."""
    logits, target = torch.zeros(2), torch.tensor([0.0, 1.0])
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert torch.allclose(paper_trials.focal(plain), plain / 4)
    assert float(paper_trials.focal(torch.tensor([1e-4]))) < 1e-11


def test_batches_go_through_all_crops_before_any_comes_again() -> None:
    torch.manual_seed(0)
    batches = list(paper_trials._batches(13, 13, 4))
    assert [len(b) for b in batches] == [4] * 13
    together = np.concatenate(batches)
    for start in range(0, 52, 13):
        assert sorted(together[start : start + 13]) == list(range(13))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with all trials of the small plan."""
    work = tmp_path_factory.mktemp("work")
    val = some_crops(20, 1)
    paper_trials.run(
        PLAN, PARTS, (some_crops(90, 0), val.take(np.flatnonzero(val.known))), work, claim={"dataset": "x"}
    )
    return work


_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def _figures(line: str) -> list[float]:
    return [float(n) for n in _NUMBER.findall(line)]


def _without_figures(line: str) -> str:
    return _NUMBER.sub("", line)


def test_a_cut_command_goes_on_where_it_was(
    crops: tuple[Crops, Crops], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (finished / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    (tmp_path / "trials.jsonl").write_text("".join(lines[:-2]) + lines[-2][:30])  # a kill in mid-line
    done: list[Task] = []
    real = paper_trials.perform

    def perform(task: Task, *more: object) -> paper_trials.Trial:
        done.append(task)
        return real(task, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(paper_trials, "perform", perform)
    shown: list[tuple[int, int, str]] = []
    trials = paper_trials.run(
        PLAN, PARTS, crops, tmp_path, claim={"dataset": "x"}, progress=lambda *a: shown.append(a)
    )
    assert len(done) == 2
    again = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2]
    for one, other in zip(again[-2:], lines[-2:], strict=True):
        assert _without_figures(one) == _without_figures(other)
        # In single precision, a matrix at another place in memory may be summed in another order.
        assert _figures(one) == pytest.approx(_figures(other), rel=1e-5, nan_ok=True)
    assert len(trials) == len(lines)
    assert shown[-1][0] == shown[-1][1]
    assert "accuracy" in shown[0][2]


def test_parts_that_are_not_finished_say_nothing(
    crops: tuple[Crops, Crops], finished: Path, tmp_path: Path
) -> None:
    lines = (finished / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    (tmp_path / "trials.jsonl").write_text("".join(lines[:-1]))
    trials = paper_trials.run(PLAN, (), crops, tmp_path, claim={"dataset": "x"})
    assert {t.task.study for t in trials} == {"experiment", "shuffled", "curve"}
    more = paper_trials.run(replace(PLAN, seeds=3), (), crops, tmp_path, claim={"dataset": "x"})
    assert {t.task.study for t in more} == {"curve"}


def test_trials_of_another_dataset_are_not_mixed_in(crops: tuple[Crops, Crops], finished: Path) -> None:
    with pytest.raises(UsageError, match="has other options"):
        paper_trials.run(PLAN, PARTS, crops, finished, claim={"dataset": "y"})


def test_the_page_shows_what_was_tried(crops: tuple[Crops, Crops], finished: Path, tmp_path: Path) -> None:
    trials = paper_trials.run(PLAN, (), crops, finished, claim={"dataset": "x"})
    rule = paper_trials.judge_rule(*crops)
    out = tmp_path / "docs" / "results"
    made = list(paper.sections(trials, rule, out, begun=False))
    assert [s.name for s in made] == ["paper", "learning"]
    for section in made:
        page = results.publish(section, out)
        for table in section.tables:
            assert table.caption in paper.as_text(section)
    text = page.read_text()
    assert all(f"| {name} |" in text for name in ABLATIONS)
    assert "not run" in text  # what ships was not scored
    data = results.read_section("paper", out)
    own = [t for t in trials if (t.task.study, t.task.name, t.task.n) == ("experiment", "base", 19)]
    own = [t for t in own if t.task.batch == data["base"]["batch"]]
    expected = np.mean([t.on_own_test("weak")["accuracy"] for t in own])
    assert data["base"]["weak"]["accuracy"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert len(data["improved"]["printed"]) == 8
    pictures = list(out.glob("*.png"))
    assert len(pictures) == 5
    assert all(p.stat().st_size < 90_000 for p in pictures)


def test_what_ships_stands_beside(crops: tuple[Crops, Crops], finished: Path, tmp_path: Path) -> None:
    trials = paper_trials.run(PLAN, (), crops, finished, claim={"dataset": "x"})
    figures = {"all": {"overlap_on_labelled_boxes": {"accuracy": 0.9314, "auc": None}}}
    shipped = results.Section("metrics", "c", data={"figures": figures})
    results.store(shipped, tmp_path / "results")
    first = next(paper.sections(trials, paper_trials.judge_rule(*crops), tmp_path / "results", begun=True))
    rows = {row[0]: row for row in first.tables[0].rows}
    assert rows["accuracy"][-1] == "0.931"
    assert rows["ROC AUC"][-1] == "not run"


def test_without_trials_there_is_no_page(crops: tuple[Crops, Crops], tmp_path: Path) -> None:
    assert list(paper.sections([], paper_trials.judge_rule(*crops), tmp_path, begun=True)) == []


def test_the_rule_is_judged_by_verified_labels(crops: tuple[Crops, Crops]) -> None:
    rule = paper_trials.judge_rule(*crops)
    assert (rule.n_train, rule.n_train_known, rule.n_val) == (90, 81, 18)
    known = [i for i in range(90) if i % 10 != 3]
    assert rule.train_agreement == pytest.approx(sum(i % 5 != 0 for i in known) / 81)
    assert sum(rule.bccd[0]) == sum(rule.bccd[1])
    nothing = paper_trials.judge_rule(crops[0], crops[1].take(np.zeros(0, np.int64)))
    assert math.isnan(nothing.val_agreement)


def test_differences_are_told_from_chance_by_their_spread() -> None:
    assert paper._beyond_chance(np.array([0.05, 0.06, 0.055, 0.06, 0.05]))
    assert not paper._beyond_chance(np.array([0.05, -0.06, 0.02, 0.06, -0.03]))
    assert not paper._beyond_chance(np.array([0.05]))


def test_chance_is_counted_exactly() -> None:
    assert paper.at_least(8, 10, 0.5) == pytest.approx(56 / 1024)
    assert paper.at_least(0, 10, 0.3) == pytest.approx(1)
    low, high = paper.wilson(8, 10)
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson 1927


def test_shuffled_labels_tell_what_the_labels_did() -> None:
    """Fisher's exact test, by hand: all five of five against none of five is one way in 252."""
    assert paper.by_chance(5, 5, 0, 5) == pytest.approx(1 / 252)
    assert paper.by_chance(0, 30, 3, 30) == pytest.approx(1)
    assert paper.by_chance(30, 30, 28, 30) == pytest.approx(30 * 29 / 2 / (60 * 59 / 2))


def test_crops_are_read_as_the_paper_cuts_them(data: TinyData, dataset: Path) -> None:
    train, val = paper_trials.read_crops(dataset, data.folder)
    assert len(train) == sum(data.drawn[f"t{i}"].counts.n_rbc for i in range(4))
    assert train.known.all()
    assert int(val.verified.sum()) == sum(data.drawn[f"v{i}"].counts.n_rbc_overlapping for i in (10, 11))
    np.testing.assert_array_equal(train.wide, np.load(dataset / "crops" / "train.npy"))
    rows = train_classifier.read_rows(dataset, "train")
    assert train.area.tolist() == [int(r["otsu_area"]) for r in rows]
    assert train.weak.tolist() == [r["weak"] == "overlapping" for r in rows]


def test_what_is_missing_is_named(data: TinyData, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not a finished dataset"):
        paper_trials.read_crops(tmp_path, data.folder)
    with pytest.raises(UnavailableError, match=r"detector\.pt: no such file"):
        paper_trials.repeat(
            PLAN,
            PARTS,
            tmp_path,
            dataset=dataset,
            data=data.folder,
            begin=tmp_path / "detector.pt",
            threads=1,
        )
    (dataset / "crops" / "val.npy").write_bytes(b"half")
    with pytest.raises(UnavailableError, match=r"val\.npy: cannot be read"):
        paper_trials.read_crops(dataset, data.folder)


def test_the_command_prints_its_tables_and_publishes_them(
    crops: tuple[Crops, Crops],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(paper, "Plan", lambda seeds: replace(PLAN, seeds=seeds))
    monkeypatch.setattr(paper_trials, "read_crops", lambda _dataset, _data: crops)
    (tmp_path / "manifest.json").write_text("{}")
    words = ("--from-scratch", "--part", "experiments", "--seeds", 2, "--dataset", tmp_path)
    places = ("--work", tmp_path / "work", "--out", tmp_path / "docs" / "results")
    code, out, err = called(paper.app, monkeypatch, capsys, *words, *places)
    assert code == 0
    assert "The improved network: 38 crops, 28 to train and 10 to test, 2 draws" in out
    assert err.splitlines()[-1] == str(tmp_path / "docs" / "paper.md")
    assert [p.name for p in (tmp_path / "docs" / "results").glob("*.json")] == ["paper.json"]
    (tmp_path / "manifest.json").write_text("{} ")
    code, out, err = called(paper.app, monkeypatch, capsys, *words, *places)
    assert (code, out) == (2, "")
    assert "the run in this folder has other options" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--from-scratch",), "not a finished dataset"), (("--detector", "none.pt"), "none.pt: no such file")],
)
def test_the_command_says_what_is_missing(
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = called(
        paper.app, monkeypatch, capsys, "--dataset", "none", "--data", data.folder, "--work", "w", *words
    )
    assert (code, out) == (5, "")
    assert message in err
    assert not (tmp_path / "w").exists()

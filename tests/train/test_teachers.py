"""Teaching: every crop is judged, and an inspected one only by a teacher that has not seen it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_data import TinyData
from torch import nn

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import Float32, UInt8
from rbc_train import networks, teachers, train_classifier
from rbc_train.data import read_public
from rbc_train.teachers import TeachingOptions
from rbc_train.train_classifier import ClassifierOptions


@pytest.fixture
def options(data: TinyData, dataset: Path, tmp_path: Path) -> TeachingOptions:
    return TeachingOptions(dataset, data.folder, None, tmp_path / "teachers", folds=2, epochs=1, threads=1)


def test_inspected_crops_are_judged_by_the_teacher_that_has_not_seen_them(
    options: TeachingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = options.dataset / "crops" / "train.csv"
    lines = index.read_text().splitlines()
    # The first crop of each photograph was not inspected.
    seen: set[str] = set()
    for i, line in enumerate(lines[1:], start=1):
        name = line.split(",")[1]
        if name not in seen:
            lines[i] = line.rsplit(",", 2)[0] + ",,"
            seen.add(name)
    index.write_text("\n".join(lines) + "\n")
    trained: list[ClassifierOptions] = []

    def train(one: ClassifierOptions, _progress: object = None) -> Path:
        trained.append(one)
        return one.out

    def load(out: Path) -> tuple[nn.Module, dict[str, float]]:
        network = nn.Identity()
        network.fold = int(out.name.removeprefix("teacher-"))  # type: ignore[assignment]
        return network, {"crop_margin": 0.25}

    def predict(network: nn.Module, crops: UInt8, *, turned: bool) -> Float32:
        assert turned
        overlap = 0.2 + 0.6 * float(network.fold)  # type: ignore[arg-type]
        return np.tile(np.array([overlap, 0.1], np.float32), (len(crops), 1))

    monkeypatch.setattr(train_classifier, "train", train)
    monkeypatch.setattr(networks, "load_classifier", load)
    monkeypatch.setattr(networks, "predict_both", predict)
    teachers.teach(options)
    assert [(t.model, t.labels, t.folds, t.fold) for t in trained] == [
        ("teacher", "verified", 2, 0),
        ("teacher", "verified", 2, 1),
    ]
    said = train_classifier.read_taught(options.out, options.dataset)
    rows = train_classifier.read_rows(options.dataset, "train")
    dealt = train_classifier.deal(rows, 2)
    for row, (p, refused) in zip(rows, said, strict=True):
        assert refused == pytest.approx(0.1)
        assert p == pytest.approx(0.2 + 0.6 * dealt[row["name"]] if row["verified"] else 0.5)
    known = teachers.agreement(rows, said)
    assert known.n == len(rows) - len(seen)


def test_teachers_leave_their_fold_out(options: TeachingOptions, data: TinyData) -> None:
    photographs = {p.name: p for p in read_public(data.folder)[0].photographs}
    rows = train_classifier.read_rows(options.dataset, "train")
    folds = train_classifier.deal(rows, 2)
    assert sorted(folds.values()) == [0, 0, 1, 1]
    assert folds == train_classifier.deal(rows[::-1], 2)
    parts = []
    for fold in (0, 1):

        def use(name: str, fold: int = fold) -> bool:
            return folds[name] != fold

        parts.append(
            train_classifier.read_samples(options.dataset, photographs, "train", "verified", use=use)
        )
    assert sum(map(len, parts)) == sum(bool(row["verified"]) for row in rows)
    assert all(len(part) > 0 for part in parts)


def test_a_pupil_learns_from_every_crop(options: TeachingOptions, data: TinyData, tmp_path: Path) -> None:
    teachers.teach(options)
    said = train_classifier.read_taught(options.out, options.dataset)
    assert ((said > 0) & (said < 1)).all()
    pupil = ClassifierOptions(
        options.dataset,
        data.folder,
        tmp_path / "pupil",
        labels="taught",
        taught=options.out,
        epochs=1,
        threads=1,
    )
    config = networks.load_classifier(train_classifier.train(pupil))[1]
    assert (config["model"], config["labels"], config["crop_margin"]) == ("station", "taught", 0.25)
    before = {f: f.stat().st_mtime_ns for f in options.out.rglob("classifier.pt")}
    assert teachers.teach(options).is_file()  # what is done is not done again
    assert {f: f.stat().st_mtime_ns for f in options.out.rglob("classifier.pt")} == before


def test_taught_targets_are_the_mean_of_label_and_teachers(options: TeachingOptions, data: TinyData) -> None:
    photographs = {p.name: p for p in read_public(data.folder)[0].photographs}
    rows = train_classifier.read_rows(options.dataset, "train")
    soft = np.linspace(0.1, 0.9, 2 * len(rows), dtype=np.float32).reshape(-1, 2)
    samples = train_classifier.read_samples(options.dataset, photographs, "train", "taught", soft)
    hard = np.array([row["verified"] == "overlapping" for row in rows], np.float32)
    assert len(samples) == 2 * len(rows)  # all of them are inspected here, and stand twice
    np.testing.assert_allclose(samples.target, np.tile((soft[:, 0] + hard) / 2, 2), atol=1e-6)
    np.testing.assert_allclose(samples.refuse, np.tile(soft[:, 1] / 2, 2), atol=1e-6)  # all are cells
    with pytest.raises(UnavailableError, match="teach again"):
        train_classifier.read_samples(options.dataset, photographs, "train", "taught", soft[:-1])


def test_mistakes_are_named(options: TeachingOptions) -> None:
    with pytest.raises(UsageError, match="has not seen it"):
        teachers.teach(replace(options, folds=1))
    with pytest.raises(UnavailableError, match="not a file of the teachers"):
        train_classifier.read_taught(options.out, options.dataset)
    options.out.mkdir()
    (options.out / train_classifier.TAUGHT).write_text(
        "name,x0,y0,overlap_score,refuse_score\nother,1,2,0.5,0\n"
    )
    with pytest.raises(UnavailableError, match="not the crops of"):
        train_classifier.read_taught(options.out, options.dataset)

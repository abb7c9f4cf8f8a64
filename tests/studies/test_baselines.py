"""What else counts red cells: image processing on drawn cells, networks that are trained, one scoring."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from command import called
from tiny_data import TinyData, photograph

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import Detections, Float32, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.boxes import iou
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.classifier import Classifier
from rbc_train import evaluate, metrics, results, train_detector
from rbc_train.data import Photograph, read_public
from studies import baseline_networks, baselines
from studies.baseline_methods import Blobs, Components, Hough, Method, Proposals, Watershed
from studies.baseline_networks import TrainingOptions

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"
METHODS: tuple[Method, ...] = (Hough(), Blobs(), Watershed(), Components())
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def smear(*centres: tuple[float, float], radius: int = 20, side: int = 160) -> UInt8:
    """Red cells of 40 px on bright glass, evenly stained."""
    image = np.full((side, side, 3), 230, np.uint8)
    for x, y in centres:
        cv2.circle(image, (round(x), round(y)), radius, (205, 165, 175), -1, cv2.LINE_AA)
    return image


def boxes(*centres: tuple[float, float], radius: float = 20) -> Float32:
    return np.array([(x - radius, y - radius, x + radius, y + radius) for x, y in centres], np.float32)


def counted(proposals: Proposals, least: float = 0.3) -> tuple[Float32, Float32]:
    """Boxes and overlap scores of the cells over a score."""
    cells = proposals.counted(least)
    return cells.detections.xyxy, cells.overlap_score


@by_method
def test_cells_apart_are_found_where_they_lie(method: Method) -> None:
    centres = ((40, 40), (115, 45), (75, 115))
    xyxy, overlap = counted(method.propose(smear(*centres), 40.0))
    assert len(xyxy) == 3
    assert iou(xyxy, boxes(*centres)).max(axis=1).min() > 0.7
    assert overlap.max() < 0.4


@by_method
def test_the_diameter_it_is_told_is_what_it_goes_by(method: Method) -> None:
    image = smear((40, 40), (115, 45), (75, 115))
    large = cv2.resize(image, None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC)
    xyxy, _ = counted(method.propose(np.asarray(large, np.uint8), 100.0))
    assert len(xyxy) == 3
    np.testing.assert_allclose(xyxy / 2.5, counted(method.propose(image, 40.0))[0], atol=3)


@pytest.mark.parametrize("method", [Hough(), Watershed()], ids=lambda m: type(m).__name__)
def test_two_cells_that_lie_over_each_other_are_two_and_overlap(method: Method) -> None:
    pair = ((60, 80), (92, 80))
    xyxy, overlap = counted(method.propose(smear(*pair), 40.0))
    assert len(xyxy) == 2
    assert iou(xyxy, boxes(*pair)).max(axis=1).min() > 0.5
    assert overlap.min() > 0.5


def test_components_count_a_clump_once_and_call_it_several() -> None:
    proposals = Components().propose(smear((40, 40), (60, 110), (92, 110), (124, 110)), 40.0)
    xyxy, overlap = counted(proposals)
    assert len(xyxy) == 2  # the mistake this project is about
    assert overlap[1] > 0.5 > overlap[0]


@by_method
def test_white_cells_are_no_red_cells(method: Method) -> None:
    image = smear((40, 40))
    cv2.circle(image, (110, 110), 26, (105, 60, 165), -1, cv2.LINE_AA)
    xyxy, _ = counted(method.propose(image, 40.0))
    assert len(xyxy) == 1
    assert iou(xyxy, boxes((40, 40))).max() > 0.7


@by_method
def test_a_red_cell_against_a_white_cell_overlaps(method: Method) -> None:
    def overlap(x: float) -> float:
        image = smear((x, 80))
        cv2.circle(image, (110, 80), 26, (105, 60, 165), -1, cv2.LINE_AA)
        scores = counted(method.propose(image, 40.0))[1]
        assert len(scores) == 1
        return float(scores[0])

    assert overlap(68) > overlap(35) + 0.1


@by_method
@pytest.mark.parametrize("level", [0, 230])
def test_an_empty_field_has_no_cells(method: Method, level: int) -> None:
    assert len(method.propose(np.full((50, 60, 3), level, np.uint8), 40.0).counted(0.3)) == 0


@by_method
def test_drawn_photographs(method: Method) -> None:
    """Cells with pale middles, a group of two, white cells and platelets."""
    n_found = n_hit = n = 0
    for seed in range(6):
        drawn = photograph(seed)
        xyxy, _ = counted(method.propose(drawn.image, 40.0))
        truth = drawn.xyxy[drawn.class_id == 0]
        n_hit += int((metrics.match(xyxy, np.ones(len(xyxy), np.float32), truth, min_iou=0.5) >= 0).sum())
        n_found += len(xyxy)
        n += len(truth)
    assert n_hit > 0.5 * n
    assert n_found < 1.3 * n


def test_only_cells_that_are_counted_overlap_each_other() -> None:
    contact = np.array([[0.1, 0.9, 0.3], [0.9, 0.0, 0.0], [0.3, 0.0, 0.2]], np.float32)
    found = Detections(
        boxes((50, 90), (50, 10), (20, 10)), np.array([0.8, 0.2, 0.6], np.float32), np.zeros(3, np.int64)
    )
    proposals = Proposals(found, contact)
    some, everyone = proposals.counted(0.5), proposals.counted(0.1)
    assert some.overlap_score.tolist() == pytest.approx([0.3, 0.3])  # the one of 0.9 is not counted
    assert everyone.overlap_score.tolist() == pytest.approx([0.3, 0.9, 0.9])
    np.testing.assert_array_equal(everyone.detections.xyxy, boxes((20, 10), (50, 10), (50, 90)))


class Knows:
    """A method that was told the truth about some photographs, down to false cells of a low score."""

    def __init__(self, truth: Callable[[UInt8], Float32], false: float) -> None:
        self.truth, self.false = truth, false

    def propose(self, image: UInt8, diameter_px: float) -> Proposals:
        right = self.truth(image)
        wrong = right + 300
        n = len(right)
        score = np.array([0.6] * n + [self.false] * n, np.float32)
        found = Detections(np.concatenate([right, wrong]), score, np.zeros(2 * n, np.int64))
        return Proposals(found, np.zeros((2 * n, 2 * n), np.float32))


def test_the_better_method_is_chosen_with_thresholds_of_its_own(data: TinyData) -> None:
    photographs = read_public(data.folder)[0].of("train")
    by_image = {p.read().tobytes(): p.xyxy[p.class_id == 0] for p in photographs}
    good = Knows(lambda image: by_image[image.tobytes()], 0.2)
    bad = Knows(lambda image: by_image[image.tobytes()] + np.float32(15), 0.2)
    for order in ((good, bad), (bad, good)):
        best = baselines.tune(order, photographs, data.verified())
        assert best.method is good
        assert best.f1 == 1.0
        assert 0.2 < best.score_threshold <= 0.6


def test_parameters_are_chosen_on_train_alone(data: TinyData) -> None:
    txl = read_public(data.folder)[0].photographs
    chosen = baselines.tuning_photographs(txl, data.verified())
    assert [p.name for p in chosen] == ["t0", "t1", "t2", "t3"]
    assert len(baselines.tuning_photographs(txl, data.verified(), of_each=2)) == 2


def test_bccd_is_written_as_it_came_without_its_test_split(data: TinyData, tmp_path: Path) -> None:
    data.add_bccd("test", "BloodImage_00003", photograph(32))
    photographs = read_public(data.folder)[1].photographs
    yaml = baseline_networks.write_bccd(photographs, tmp_path / "d")
    assert "0: rbc\n  1: wbc\n  2: platelet\n" in yaml.read_text()
    written = sorted(p.relative_to(tmp_path / "d").as_posix() for p in (tmp_path / "d").rglob("*.*"))
    assert written == [
        "data.yaml",
        "images/train/BloodImage_00001.jpg",
        "images/val/BloodImage_00002.jpg",
        "labels/train/BloodImage_00001.txt",
        "labels/val/BloodImage_00002.txt",
    ]
    image = tmp_path / "d/images/train/BloodImage_00001.jpg"
    assert image.read_bytes() == (data.folder / "bccd/JPEGImages/BloodImage_00001.jpg").read_bytes()
    train = next(p for p in photographs if p.split == "train")
    rows = [
        line.split() for line in (tmp_path / "d/labels/train/BloodImage_00001.txt").read_text().splitlines()
    ]
    assert [int(r[0]) for r in rows] == train.class_id.tolist()
    width = np.array([float(r[3]) for r in rows]) * train.width_px
    np.testing.assert_allclose(width, train.xyxy[:, 2] - train.xyxy[:, 0], atol=0.01)


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.open(TOY)


def test_two_classes_take_the_verified_label_and_else_the_verdict(
    data: TinyData, dataset: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts: all overlapping. One photograph loses its verified labels."""
    rows = (dataset / "crops/train.csv").read_text().splitlines()
    header = rows[0].split(",")
    cut = [r.split(",") for r in rows[1:]]
    for row in cut:
        if row[header.index("name")] == "t1":
            row[header.index("verified")] = ""
    (dataset / "crops/train.csv").write_text("\n".join([rows[0], *(",".join(r) for r in cut)]) + "\n")
    monkeypatch.setattr(Classifier, "overlap_score", lambda _self, crops: np.ones(len(crops), np.float32))

    out = baseline_networks.write_two_class(dataset, bundle, tmp_path / "two")
    for name, drawn in data.drawn.items():
        if not name.startswith("t"):
            continue
        text = (out / f"detector/labels/train/{name}.txt").read_text().split("\n")
        red = drawn.overlapping if name != "t1" else np.ones_like(drawn.overlapping)
        expected = np.where(drawn.class_id == 0, red.astype(int), drawn.class_id + 1)
        assert [int(line.split()[0]) for line in text if line] == expected.tolist()
        before = (dataset / f"detector/labels/train/{name}.txt").read_text().split("\n")
        assert [line.partition(" ")[2] for line in text] == [line.partition(" ")[2] for line in before]
        png = f"detector/images/train/{name}.png"
        assert (out / png).read_bytes() == (dataset / png).read_bytes()
    assert "0: rbc_single\n  1: rbc_overlapping\n  2: wbc\n  3: platelet\n" in (
        (out / "detector/data.yaml").read_text()
    )
    counts = json.loads((out / "manifest.json").read_text())["counts"]["train"]
    lost = data.drawn["t1"].counts.n_rbc
    assert counts["verified"] == sum(data.drawn[f"t{i}"].counts.n_rbc for i in range(4)) - lost
    assert counts["rbc_single"] == sum(data.drawn[f"t{i}"].counts.n_rbc_single for i in (0, 2, 3))


def test_crops_of_another_margin_are_refused(dataset: Path, bundle: Bundle, tmp_path: Path) -> None:
    manifest = dataset / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"crop_margin": 0.25', '"crop_margin": 0.5'))
    with pytest.raises(UsageError, match=r"margin of 0\.5") as caught:
        baseline_networks.write_two_class(dataset, bundle, tmp_path / "two")
    assert "--crop-margin" in caught.value.advice
    with pytest.raises(UnavailableError, match="not a finished dataset"):
        baseline_networks.write_two_class(tmp_path / "none", bundle, tmp_path / "two")


class CutError(Exception):
    """Stands for a kill."""


def options(data: TinyData, dataset: Path, out: Path, epochs: int) -> TrainingOptions:
    return TrainingOptions(
        data.folder, dataset, TOY, None, out, epochs=epochs, batch=2, image_px=64, threads=1
    )


def test_yolo_on_bccds_boxes_is_cut_goes_on_and_looks(
    data: TinyData, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = options(data, dataset, tmp_path / "run", 2)
    real, kept_epochs = train_detector._keep, []

    def keep_then_cut(trainer: Any, *, keep: Path) -> None:
        real(trainer, keep=keep)
        kept_epochs.append(trainer.epoch)
        if trainer.epoch == 0:
            raise CutError

    monkeypatch.setattr(train_detector, "_keep", keep_then_cut)
    with pytest.raises(CutError):
        baseline_networks.train_bccd640(run)
    checkpoint = baseline_networks.train_bccd640(run)
    assert kept_epochs == [0, 1]
    before = checkpoint.read_bytes()
    assert baseline_networks.train_bccd640(run).read_bytes() == before  # finished: not again
    proposals = baseline_networks.PlainYolo(checkpoint).propose(photograph(3).image, 40.0)
    assert proposals.contact.shape == (len(proposals.detections),) * 2
    with pytest.raises(UsageError, match="rbc, wbc, platelet"):
        baseline_networks.TwoClassYolo(checkpoint, Bundle.open(TOY))


def test_yolo_with_two_red_classes_is_trained_and_looks(
    data: TinyData, dataset: Path, bundle: Bundle, tmp_path: Path
) -> None:
    checkpoint = baseline_networks.train_two_class(options(data, dataset, tmp_path / "run", 1))
    method = baseline_networks.TwoClassYolo(checkpoint, bundle)
    proposals = method.propose(photograph(3).image, 40.0)
    assert (proposals.detections.class_id == 0).all()
    with pytest.raises(UsageError, match="rbc_single"):
        baseline_networks.PlainYolo(checkpoint)


def test_the_two_red_classes_are_one_in_suppression(bundle: Bundle) -> None:
    """One cell seen as single and as overlapping is one cell; its score is the larger of the two."""
    method = object.__new__(baseline_networks.TwoClassYolo)
    method._manifest = bundle.manifest
    image, diameter = smear((80, 40), side=160), 80.0
    factor = bundle.manifest.cell_diameter_px / diameter
    _, left, top = preprocess.pad_to_stride(preprocess.rescale(image, factor))
    x, y, side = 80 * factor + left, 40 * factor + top, 40 * factor
    rows = [
        (x, y, side, side, 0.9, 0.3, 0, 0),
        (x + 1, y, side, side, 0.2, 0.6, 0, 0),  # the same cell again
        (x, y + 2 * side, side, side, 0.2, 0.6, 0, 0),
        (x - 2 * side, y, side, side, 0, 0, 0.8, 0),  # a white cell
    ]
    answer = torch.tensor(rows).T[None]
    method._network = lambda inputs: (answer,)
    cells = method.propose(image, diameter).counted(0.25)
    np.testing.assert_allclose(cells.detections.xyxy, boxes((80, 40), (80, 120)), atol=1)
    assert cells.detections.score.tolist() == pytest.approx([0.9, 0.6])
    assert cells.overlap_score.tolist() == pytest.approx([0.25, 0.75])


def test_otsus_area_judges_what_yolo_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop that is dark all over against one that is dark in a corner; other classes are left out."""
    image = np.full((100, 100, 3), 230, np.uint8)
    image[10:50, 10:48] = 90
    image[60:70, 60:70] = 90
    xyxy = torch.tensor([[10.0, 10, 50, 50], [60, 60, 100, 100], [0, 0, 9, 9]])
    seen = SimpleNamespace(
        boxes=SimpleNamespace(xyxy=xyxy, conf=torch.ones(3), cls=torch.tensor([0.0, 0, 1]))
    )
    method = object.__new__(baseline_networks.PlainYolo)
    method._yolo = SimpleNamespace(predict=lambda *_a, **_k: [seen])
    cells = method.propose(image, math.nan).counted(0.25)
    assert cells.overlap_score.tolist() == pytest.approx([0.95, 1 / 16], abs=0.02)


@pytest.mark.parametrize(("content", "kind"), [(None, UnavailableError), (b"text", UsageError)])
def test_what_is_no_checkpoint_is_named(content: bytes | None, kind: type[Exception], tmp_path: Path) -> None:
    file = tmp_path / "detector.pt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(kind, match=str(file)):
        baseline_networks.PlainYolo(file)


@pytest.fixture
def outcomes(data: TinyData, monkeypatch: pytest.MonkeyPatch) -> Sequence[baselines.Outcome]:
    """All baselines on two drawn photographs, a candidate each."""
    few = {type(m).__name__: (m,) for m in METHODS}
    monkeypatch.setattr(baselines, "CANDIDATES", few)
    txl, bccd = read_public(data.folder)
    analyzer = Analyzer(Bundle.open(TOY), threads=1)
    return list(baselines.compare(analyzer, txl.photographs, bccd.photographs, data.verified()))


def test_all_are_scored_alike_and_what_is_missing_is_said(
    outcomes: Sequence[baselines.Outcome], tmp_path: Path
) -> None:
    assert len(outcomes) == baselines.N_OUTCOMES
    run = [o for o in outcomes if o.figures]
    assert {tuple(o.figures) for o in run} == {("all", "pbc")}
    assert {o.figures["all"]["photographs"] for o in run} == {2}
    assert all(o.seconds > 0 for o in run)
    made = baselines.section(outcomes, tmp_path / "results", "the command")
    rows = {row[0]: row[1:] for row in made.tables[0].rows}
    assert len(rows) == len(outcomes)
    for o in outcomes:
        assert (set(rows[o.name]) == {"not run"}) == (o not in run)
    assert [o.name for o in outcomes if o not in run] == [baselines._PLAIN, baselines._TWO_CLASS]
    assert all(len(t.rows) == len(run) for t in made.tables[1:])
    page = results.publish(made, tmp_path / "results").read_text()
    assert "not run: no checkpoint given with --two-class" in page
    assert baselines.text_table(outcomes).count("\n") == len(outcomes)


def test_cells_that_were_not_found_are_not_right(data: TinyData, tmp_path: Path) -> None:
    """Accuracy has only the found ones; a method that finds nothing has none right."""

    class Blind:
        def propose(self, image: UInt8, diameter_px: float) -> Proposals:
            return Proposals(Detections.empty(), np.zeros((0, 0), np.float32))

    photographs: list[Photograph] = read_public(data.folder)[0].of("val")
    looked, _ = baselines._look(Blind(), baselines._read(photographs))
    examined = baselines._beside(looked, photographs, data.verified(), 0.5)
    figures = evaluate.score(examined, 0.5)
    outcome = baselines.Outcome("blind", "", figures, 0.1)
    row = baselines.section([outcome], tmp_path, "").data["blind"]["all"]
    assert row["verified cells found"] == row["found and right"] == row["counted / labelled"] == 0.0
    assert math.isnan(row["overlap accuracy"])


def test_the_command_writes_its_section(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baselines, "CANDIDATES", {"Connected components": (Components(),)})
    words = ("--data", data.folder, "--bundle", TOY, "--every", 2, "--out", tmp_path / "a" / "results")
    code, out, err = called(baselines.app, monkeypatch, capsys, *words)
    assert code == 0, err
    assert out.startswith("method")
    assert "`python -m studies.baselines --every 2`" in (tmp_path / "a" / "results.md").read_text()
    kept = results.read_section("baselines", tmp_path / "a" / "results")
    assert kept["Connected components"]["all"]["RBC AP50"] > 0.3
    assert (tmp_path / "a" / "results" / "baselines-crowding.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--data", "nowhere"), 5, "splits.csv: no such file"),
        (("--bccd640", "nowhere.pt"), 5, "nowhere.pt: no such file"),
        (("--bundle", "nowhere"), 4, "manifest.json"),
        (("--train", "bccd640", "--weights", "nowhere.safetensors"), 5, "nowhere.safetensors: no such file"),
        (("--train", "two-class", "--dataset", "nowhere"), 5, "not a finished dataset"),
        (("--train", "other"), 2, "other"),
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
    monkeypatch.setattr(baselines, "CANDIDATES", {"Connected components": (Components(),)})
    found, _, err = called(baselines.app, monkeypatch, capsys, *words)
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_how_long_a_rival_was_trained_is_said(tmp_path: Path) -> None:
    assert baselines._epochs(tmp_path / "detector.pt") == ""
    (tmp_path / "config.json").write_text('{"epochs": 20}')
    assert baselines._epochs(tmp_path / "detector.pt") == "trained for 20 epochs; "

"""The whole export, on drawn data with the toy network as detector: sealed, or not written."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_data import TinyData, add_chula
from torch import Tensor, nn

from rbc_edge.errors import BundleError, UnavailableError, UsageError
from rbc_edge.ops.synthetic import CREAM, draw_field
from rbc_edge.values import UInt8
from rbc_edge.vision import selftest
from rbc_edge.vision.bundle import DETECTOR, DETECTOR_FP32, TEST_EXPECTED, Bundle
from rbc_export import cli, exporting, graphs
from rbc_export.exporting import ExportOptions, Tolerance
from rbc_train import networks, runs, train_classifier
from rbc_train.data import Collection, Photograph, read_chula, read_public, write_dataset

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


class ToyGraph(nn.Module):
    """The toy network where the export expects torch's; `off` is how far it strays from its ONNX."""

    off = 0.0

    def __init__(self, _detector: object) -> None:
        super().__init__()
        self.session = Bundle.open(TOY).session(DETECTOR, threads=1)

    def forward(self, image: Tensor, least_score: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {"image": image.numpy(), "least_score": least_score.numpy()}
        boxes, scores = self.session.run(["boxes", "scores"], inputs)
        return torch.from_numpy(boxes) + self.off, torch.from_numpy(scores)


def quantized_to(gain: float) -> Callable[[Path, Path, Iterable[UInt8]], None]:
    """Quantization that weakens every score by a factor, and looks at all calibration images."""

    def quantize(fp32: Path, int8: Path, images: Iterable[UInt8]) -> None:
        for image in images:
            assert image.dtype == np.uint8
            assert image.shape[0] % 32 == image.shape[1] % 32 == 0
        model = onnx.load(fp32)
        for node in model.graph.node:
            if list(node.output) == ["scores"]:
                node.output[0] = "strong"
        factor = numpy_helper.from_array(np.array(gain, np.float32), "factor")
        model.graph.initializer.append(factor)
        model.graph.node.append(onnx.helper.make_node("Mul", ["strong", "factor"], ["scores"]))
        onnx.save(model, str(int8))

    return quantize


def let_the_toy_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy network is exported in place of the trained detector."""

    # The toy sees drawn cells in this stain, in light that is even.
    def field(rng: np.random.Generator, *, width_px: int, height_px: int, cell_diameter_px: float) -> Any:
        return draw_field(
            rng, width_px=width_px, height_px=height_px, cell_diameter_px=cell_diameter_px,
            stain=CREAM, illumination=0.0, n_single=6, group_sizes=(2,),
        )  # fmt: skip

    monkeypatch.setattr("rbc_edge.ops.synthetic.draw_field", field)
    monkeypatch.setattr("rbc_train.networks.load_detector", lambda _file: None)
    monkeypatch.setattr(graphs, "fuse", lambda detector: detector)
    monkeypatch.setattr(graphs, "DetectorGraph", ToyGraph)
    monkeypatch.setattr(graphs, "write_detector", lambda _graph, file: shutil.copyfile(TOY / DETECTOR, file))
    monkeypatch.setattr(graphs, "quantize_detector", quantized_to(1.0))
    monkeypatch.setattr(graphs, "correct_scores", lambda _fp32, _int8, _images: {"0": 0.0})


@pytest.fixture
def options(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportOptions:
    """All that an export needs: drawn data at the toy's scale, checkpoints that nobody trained."""
    txl, _ = read_public(data.folder)
    for _step in write_dataset(txl, tmp_path / "dataset", cell_diameter_px=40.0, crop_margin=0.25):
        pass
    torch.manual_seed(0)
    run = tmp_path / "run"
    options = train_classifier.ClassifierOptions(tmp_path / "dataset", data.folder, run, epochs=1).complete()
    config = runs.claim(run, {k: getattr(options, k) for k in options.__dataclass_fields__})
    runs.save(run / "classifier.pt", {"network": networks.build("station").state_dict(), "config": config})
    (tmp_path / "detector.pt").write_bytes(b"the toy takes its place")

    let_the_toy_detect(monkeypatch)
    return ExportOptions(
        tmp_path / "detector.pt",
        run / "classifier.pt",
        tmp_path / "dataset",
        data.folder,
        tmp_path / "bundle",
        calibration_images=8,
        iou_threshold=(0.5, 0.3, 0.3),
        iou_threshold_across=0.4,
    )


def silent(_line: str) -> None:
    pass


def test_a_bundle_is_sealed_with_its_proof(options: ExportOptions) -> None:
    said: list[str] = []
    finished = exporting.export(options, said.append)
    assert Bundle.open(options.out).bundle_id == finished.bundle_id
    m = finished.manifest
    assert (m.cell_diameter_px, m.crop_margin, m.class_names) == (40.0, 0.25, ("rbc", "wbc", "platelet"))
    assert (m.iou_threshold, m.iou_threshold_across) == ((0.5, 0.3, 0.3), 0.4)
    parity = m.metrics["parity"]
    assert set(parity) >= {"box_px", "score", "ap50", "ap50_95", "count", "flips"}
    assert all(parity[k] == 0 for k in ("box_px", "score", "ap50", "count", "flips"))
    assert m.metrics["split"] == "val"
    assert m.metrics["int8"]["all"]["photographs"] == 2
    assert m.metrics["int8"]["all"]["rbc_ap50"] > 0.6
    json.dumps(m.metrics, allow_nan=False)
    assert any("self-test" in line for line in said)


def test_only_training_photographs_calibrate(options: ExportOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    real = quantized_to(1.0)

    def spy(fp32: Path, int8: Path, images: Iterable[UInt8]) -> None:
        kept = list(images)
        seen.extend(i.tobytes() for i in kept)
        real(fp32, int8, kept)

    monkeypatch.setattr(graphs, "quantize_detector", spy)
    calibration = exporting.export(options, silent).manifest.calibration
    assert sorted(calibration["images"]) == ["t0", "t1", "t2", "t3"]
    assert calibration["split"] == "train"
    assert len(set(seen)) == 4


def with_chula(options: ExportOptions, data: TinyData, *, left_out: str = "") -> ExportOptions:
    """The same with two complete fields of Chula in the data. A source may be left out of the dataset."""
    add_chula(data)
    txl, chula = read_public(options.data)[0], read_chula(options.data / "chula")
    both = [p for p in [*txl.photographs, *chula.photographs] if p.source != left_out]
    out = options.dataset.with_name("all")
    for _step in write_dataset(Collection(both), out, cell_diameter_px=40.0, crop_margin=0.25):
        pass
    return replace(options, dataset=out)


def test_complete_fields_of_chula_calibrate_and_validate_with_their_labels(
    options: ExportOptions, data: TinyData
) -> None:
    manifest = exporting.export(with_chula(options, data), silent).manifest
    assert sorted(manifest.calibration["images"]) == ["chula-1", "t0", "t1", "t2", "t3"]
    figures = manifest.metrics["int8"]
    assert (figures["all"]["photographs"], figures["chula"]["photographs"]) == (3, 1)
    assert figures["chula"]["overlap_on_labelled_boxes"]["n"] > 0
    assert "Chula" in manifest.training["data"]


@pytest.mark.parametrize(("left_out", "kept"), [("pbc", "chula"), ("chula", "pbc")])
def test_a_laboratory_that_is_not_in_the_dataset_chooses_nothing(
    options: ExportOptions, data: TinyData, left_out: str, kept: str
) -> None:
    manifest = exporting.export(with_chula(options, data, left_out=left_out), silent).manifest
    assert {n.startswith("chula") for n in manifest.calibration["images"]} == {kept == "chula"}
    assert set(manifest.metrics["int8"]) == {"all", kept}
    assert ("Chula" in manifest.training["data"]) == (kept == "chula")


def test_the_bundle_passes_its_own_test_and_says_what_it_expects(options: ExportOptions) -> None:
    finished = exporting.export(options, silent)
    expected = json.loads((options.out / TEST_EXPECTED).read_text())
    assert len(expected["xyxy"]) == len(expected["overlap_score"]) > 5
    assert selftest.verify(finished, threads=1).n_unmatched == 0


@pytest.mark.parametrize("with_fp32", [True, False])
def test_the_fp32_detector_ships_on_demand_only(options: ExportOptions, with_fp32: bool) -> None:
    finished = exporting.export(replace(options, with_fp32=with_fp32), silent)
    assert (DETECTOR_FP32 in finished.manifest.files) is with_fp32
    assert (options.out / DETECTOR_FP32).exists() is with_fp32


def test_the_training_is_named(options: ExportOptions) -> None:
    training = exporting.export(options, silent).manifest.training
    assert training["classifier"]["model"] == "station"
    assert training["counts"]["train"]["pbc"]["photographs"] == 4
    text = json.dumps(training)
    assert str(options.data) not in text  # no path of the workshop's machine
    assert str(options.dataset) not in text


def test_torch_that_differs_from_its_graph_fails_and_writes_nothing(
    options: ExportOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyGraph, "off", 0.2)
    with pytest.raises(
        BundleError, match=r"parity is beyond its tolerance: box_px 0\.2\d* \(at most 0\.05\)"
    ) as caught:
        exporting.export(options, silent)
    assert int(caught.value.exit_code) == 4
    assert not options.out.exists()
    exporting.export(replace(options, tolerance=Tolerance(box_px=0.3)), silent)
    assert options.out.exists()


def test_int8_that_sees_less_fails_and_leaves_the_earlier_bundle(
    options: ExportOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = exporting.export(options, silent).bundle_id
    # Thresholds are chosen for int8, so it is the fp32 detector that now sees more.
    monkeypatch.setattr(graphs, "quantize_detector", quantized_to(0.5))
    with pytest.raises(BundleError, match="parity is beyond its tolerance"):
        exporting.export(replace(options, tolerance=Tolerance(count=0.0001)), silent)
    assert Bundle.open(options.out).bundle_id == before


@pytest.mark.parametrize("key", ["box_px", "score", "ap50", "ap50_95", "count", "flips"])
def test_every_tolerance_is_asked(key: str) -> None:
    good = dict.fromkeys(("box_px", "score", "ap50", "ap50_95", "count", "flips"), 0.0)
    exporting._check(good, Tolerance())
    for bad in (1.0, float("nan")):
        with pytest.raises(BundleError, match=key):
            exporting._check(good | {key: bad}, Tolerance())


@pytest.mark.parametrize(
    ("what", "message"),
    [("classifier", "train it"), ("dataset", "make the dataset"), ("data", "splits.csv")],
)
def test_what_is_missing_is_named(options: ExportOptions, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(UnavailableError, match=message):
        exporting.export(replace(options, **dict[str, Any]({what: tmp_path / "nowhere"})), silent)
    assert not options.out.exists()


def test_the_detector_of_a_bundle_may_be_kept(options: ExportOptions, tmp_path: Path) -> None:
    """Only the second stage is new: nothing of the detector is written, measured or lost again."""
    first = exporting.export(options, silent)
    kept = replace(options, detector=None, keep=options.out, out=tmp_path / "kept")
    again = exporting.export(kept, silent)
    assert again.manifest.files[DETECTOR] == first.manifest.files[DETECTOR]
    assert again.manifest.training["detector"]["kept_from"] == first.bundle_id
    parity = [bundle.manifest.metrics["parity"] for bundle in (first, again)]
    assert parity[0]["box_px"] == parity[1]["box_px"]
    assert parity[1]["count"] == 0


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"detector": None}, "no detector to export"), ({"keep": Path("b"), "with_fp32": True}, "no fp32")],
)
def test_without_a_detector_or_its_fp32_network_nothing_begins(
    options: ExportOptions, wrong: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        exporting.export(replace(options, **wrong), silent)
    assert not options.out.exists()


def test_calibration_is_spread_over_the_sources() -> None:
    def photographs(source: str, n: int) -> list[Photograph]:
        none = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((32, 32), np.float32))
        return [Photograph(Path("x"), f"{source}{i}", source, "train", 1, 1, *none) for i in range(n)]

    chosen = exporting._calibration([*photographs("a", 100), *photographs("b", 5), *photographs("c", 3)], 12)
    names = [p.name for p in chosen]
    assert len(set(names)) == len(names)
    assert [sum(p.source == s for p in chosen) for s in "abc"] == [4, 4, 3]
    assert {"a0", "a99"} <= set(names)


def test_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rbc_export", "--data", "nowhere"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 5
    assert "manifest.json: no such file" in capsys.readouterr().err

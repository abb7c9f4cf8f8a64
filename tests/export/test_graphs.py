"""ONNX graphs: what torch and ultralytics say, the graph says; int8 where it should be and nowhere else."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from rbc_edge.errors import BundleError
from rbc_edge.ops.synthetic import CREAM, draw_field
from rbc_edge.values import UInt8
from rbc_export import graphs
from rbc_train import networks
from rbc_train.networks import ModelName


@pytest.fixture(scope="module")
def yolo() -> Any:
    """A YOLOv5n of chance that answers to its input as a trained one does; not fused."""
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            module.momentum = 1.0
    head = model.model[-1]
    for branch in (*head.cv2, *head.cv3):
        nn.init.normal_(branch[-1].weight, 0, 0.05)
        nn.init.normal_(branch[-1].bias, -1, 0.2)
    with torch.no_grad():
        model.train()(torch.from_numpy(fields(4)).permute(0, 3, 1, 2).float() / 255)
    return model.eval()


@pytest.fixture(scope="module")
def fused(yolo: Any) -> Any:
    return graphs.fuse(copy.deepcopy(yolo))


@pytest.fixture(scope="module")
def fp32(fused: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graphs") / "detector.onnx"
    graphs.write_detector(graphs.DetectorGraph(fused), file)
    return file


def fields(n: int, width_px: int = 96, height_px: int = 64) -> UInt8:
    return np.stack(
        [
            draw_field(
                np.random.default_rng(seed), width_px=width_px, height_px=height_px, cell_diameter_px=20.0,
                n_single=3, group_sizes=(), n_wbc=0, n_platelets=1, stain=CREAM,
            ).image
            for seed in range(n)
        ]
    )  # fmt: skip


def run(file: Path, images: UInt8) -> tuple[Any, Any]:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = [{"image": image[None], "least_score": graphs.EVERYTHING} for image in images]
    said = [session.run(["boxes", "scores"], one) for one in inputs]
    return np.stack([boxes for boxes, _ in said]), np.stack([scores for _, scores in said])


def graph_says(model: Any, images: UInt8) -> tuple[Any, Any]:
    """The same by torch: boxes (B, A, 4), scores (B, A, 3)."""
    graph, every = graphs.DetectorGraph(model).eval(), torch.from_numpy(graphs.EVERYTHING)
    with torch.no_grad():
        said = [graph(torch.from_numpy(image[None]), every) for image in images]
    return np.stack([b.numpy() for b, _ in said]), np.stack([s.numpy() for _, s in said])


def ultralytics_says(model: Any, images: UInt8) -> tuple[Any, Any]:
    """Boxes xyxy and scores by ultralytics' own decoding."""
    with torch.no_grad():
        said = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    table = (said[0] if isinstance(said, tuple) else said).numpy().transpose(0, 2, 1)
    centre, half = table[..., :2], table[..., 2:4] / 2
    return np.concatenate([centre - half, centre + half], axis=2), table[..., 4:]


def test_the_graph_decodes_as_ultralytics_does(yolo: Any) -> None:
    images = fields(2)
    boxes, scores = graph_says(yolo, images)
    their_boxes, their_scores = ultralytics_says(yolo, images)
    assert boxes.shape == (2, 96 * 64 // 64 + 96 * 64 // 256 + 96 * 64 // 1024, 4)
    assert graphs.tensor_error(boxes, their_boxes) < 3e-3  # of hundreds of pixels
    assert graphs.tensor_error(scores, their_scores) < 1e-5
    assert np.ptp(their_scores) > 0.1  # not one number everywhere


def test_fusing_changes_no_figure(yolo: Any, fused: Any) -> None:
    assert any(isinstance(m, nn.BatchNorm2d) for m in yolo.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    before, after = graph_says(yolo, fields(1)), graph_says(fused, fields(1))
    assert graphs.tensor_error(before[0], after[0]) < 1e-2
    assert graphs.tensor_error(before[1], after[1]) < 1e-4


@pytest.mark.parametrize("shape", [(64, 96), (32, 32), (160, 64), (192, 256)])
def test_height_and_width_are_free(fused: Any, fp32: Path, shape: tuple[int, int]) -> None:
    height, width = shape
    tall = np.tile(fields(1), (1, 1 + height // 64, 1 + width // 96, 1))
    images = np.ascontiguousarray(tall[:, :height, :width])
    boxes, scores = run(fp32, images)
    their_boxes, their_scores = ultralytics_says(fused, images)
    assert boxes.dtype == scores.dtype == np.float32
    # A network of chance makes much of float's rounding, and its boxes reach over hundreds of pixels.
    assert np.abs(boxes - their_boxes).mean() < 0.005
    assert graphs.tensor_error(boxes, their_boxes) < 0.5
    assert graphs.tensor_error(scores, their_scores) < 2e-3


def test_channels_are_in_the_station_s_order(fused: Any, fp32: Path) -> None:
    """RGB, not BGR: a swap would cost accuracy and no error."""
    images = fields(1)
    swapped = np.ascontiguousarray(images[..., ::-1])
    assert graphs.tensor_error(run(fp32, images)[1], ultralytics_says(fused, images)[1]) < 1e-4
    assert graphs.tensor_error(run(fp32, images)[1], ultralytics_says(fused, swapped)[1]) > 0.01


@pytest.fixture(scope="module")
def int8(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("int8") / "detector.onnx"
    graphs.quantize_detector(fp32, file, iter(fields(4)))
    return file


def test_int8_stays_near_and_is_small(fp32: Path, int8: Path) -> None:
    images = fields(2)
    (boxes, scores), (q_boxes, q_scores) = run(fp32, images), run(int8, images)
    assert q_boxes.shape == boxes.shape
    # Loose: weights of chance, calibrated on four images. The export measures the trained network.
    assert np.abs(q_boxes - boxes).mean() < 0.1 * boxes.std()
    assert np.corrcoef(q_boxes.ravel(), boxes.ravel())[0, 1] > 0.95
    assert np.abs(q_scores - scores).mean() < 0.1
    assert graphs.tensor_error(boxes, q_boxes) > 0  # it is another network
    assert int8.stat().st_size < 0.4 * fp32.stat().st_size


def test_the_systematic_error_of_the_scores_is_taken_out(fp32: Path, int8: Path, tmp_path: Path) -> None:
    images = fields(6)
    worse = tmp_path / "worse.onnx"  # every class off by its own amount
    model = onnx.load(int8)
    off = np.array([0.5, -0.3, 0.2], np.float32)
    for constant in model.graph.initializer:
        if constant.name.endswith("bias") and list(constant.dims) == [3]:
            value = onnx.numpy_helper.to_array(constant) + off
            constant.CopyFrom(onnx.numpy_helper.from_array(value, constant.name))
    onnx.save(model, worse)
    shutil.copyfile(worse, tmp_path / "corrected.onnx")
    shift = graphs.correct_scores(fp32, tmp_path / "corrected.onnx", images)
    plain = tmp_path / "plain.onnx"
    shutil.copyfile(int8, plain)
    own = graphs.correct_scores(fp32, plain, images)
    for c in range(3):
        assert shift[str(c)] == pytest.approx(own[str(c)] - off[c], abs=0.02)
    scores = run(fp32, images)[1]
    before, after = (run(f, images)[1] for f in (worse, tmp_path / "corrected.onnx"))
    for c in range(3):
        unsure = (scores[..., c] > 0.2) & (scores[..., c] < 0.9)
        assert abs((after - scores)[..., c][unsure].mean()) < 0.02
        assert abs((before - scores)[..., c][unsure].mean()) > 0.02


def test_a_graph_without_logits_is_refused(tmp_path: Path) -> None:
    toy = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle" / "detector.onnx"
    shutil.copyfile(toy, tmp_path / "toy.onnx")
    with pytest.raises(BundleError, match="no convolution with a class's logits"):
        graphs.correct_scores(toy, tmp_path / "toy.onnx", fields(1))


def test_int8_keeps_its_axes_free(int8: Path) -> None:
    boxes, _ = run(int8, fields(1, 128, 96))
    assert boxes.shape == (1, 128 * 96 // 64 + 128 * 96 // 256 + 128 * 96 // 1024, 4)


def test_boxes_are_decoded_where_a_score_is_high_enough(fused: Any, fp32: Path, int8: Path) -> None:
    image = fields(1)
    least = np.array([0.3, 0.2, 0.35], np.float32)
    for file in (fp32, int8):
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        boxes, scores = session.run(["boxes", "scores"], {"image": image, "least_score": least})
        (every_box,), (every,) = run(file, image)
        reach = (every >= least).any(axis=1)
        assert 0 < reach.sum() < len(every)
        np.testing.assert_allclose(scores, every[reach])
        np.testing.assert_allclose(boxes, every_box[reach], atol=1e-3)
    with torch.no_grad():
        none = graphs.DetectorGraph(fused)(torch.from_numpy(image), torch.full((3,), 2.0))
    assert (none[0].shape, none[1].shape) == ((0, 4), (0, 3))


def test_decoding_and_both_ends_stay_in_float(int8: Path) -> None:
    """No number passes through eight bits before the first convolution or after the last ones."""
    graph = onnx.load(int8).graph
    maker = {name: node for node in graph.node for name in node.output}

    def back(tensor: str) -> Iterator[Any]:
        """Everything between a tensor and the convolutions that lead to it, those included."""
        seen: set[str] = set()
        waiting = [tensor]
        while waiting:
            name = waiting.pop()
            node = maker.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            yield node
            if node.op_type not in ("Conv", "Shape"):  # a shape holds no number of the network
                waiting += node.input

    for output, n_last in (("scores", 3), ("boxes", 6)):  # which boxes are decoded, scores decide
        tail = list(back(output))
        last = [n for n in tail if n.op_type == "Conv"]
        assert len(last) == n_last
        assert not [n.name for n in tail if "Quantize" in n.op_type]
        # Their own weights are float too.
        float_names = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
        assert all(n.input[1] in float_names for n in last)
    convs = [n for n in graph.node if n.op_type == "Conv"]
    quantized = [n for n in convs if maker.get(n.input[1]) is not None]
    # The stem and the first stage, and two heads of three levels.
    assert len(convs) - len(quantized) == graphs.N_FLOAT_CONVOLUTIONS + 6
    assert convs[0] not in quantized


def test_weights_take_seven_bits(int8: Path) -> None:
    """With all eight, processors without VNNI saturate, and the counts depend on the processor."""
    weights = [
        onnx.numpy_helper.to_array(i)
        for i in onnx.load(int8).graph.initializer
        if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4
    ]
    assert len(weights) > 40
    assert all(w.min() >= -64 and w.max() <= 64 for w in weights)
    assert max(int(np.abs(w).max()) for w in weights) >= 60


def test_what_stays_float_is_told_by_the_graph_alone() -> None:
    """pixels -> cast -> conv a -> conv b -> (conv c -> sigmoid), (conv d); shape work aside."""
    nodes: list[graphs.Node] = [
        ("cast", "Cast", ["image"], ["x"]),
        ("a", "Conv", ["x", "wa"], ["ya"]),
        ("relu", "Relu", ["ya"], ["ra"]),
        ("b", "Conv", ["ra", "wb"], ["yb"]),
        ("c", "Conv", ["yb", "wc"], ["yc"]),
        ("d", "Conv", ["yb", "wd"], ["yd"]),
        ("shape", "Shape", ["yb"], ["s"]),
        ("sigmoid", "Sigmoid", ["yc"], ["scores"]),
        ("reshape", "Reshape", ["yd", "s"], ["boxes"]),
    ]
    ends = {"cast", "a", "c", "d", "shape", "sigmoid", "reshape"}
    assert set(graphs.stays_float(nodes, first=1)) == ends
    assert set(graphs.stays_float(nodes, first=2)) == {*ends, "relu", "b"}
    assert graphs.stays_float([]) == []


@pytest.mark.parametrize("model", ["base", "improved", "station"])
@pytest.mark.parametrize("n", [1, 5])
def test_the_classifier_s_graph_scores_as_torch_does(tmp_path: Path, model: ModelName, n: int) -> None:
    torch.manual_seed(1)
    network = networks.build(model)
    file = tmp_path / "classifier.onnx"
    graphs.write_classifier(graphs.ClassifierGraph(network), file)
    crops = np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3)).astype(np.uint8)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = {"crops": crops}
    if model in networks.PAPER:
        (scores,) = session.run(["overlap_score"], inputs)
    else:
        sides = np.random.default_rng(1).uniform(0.4, 1.8, (n, 2)).astype(np.float32)
        scores, shape = session.run(["overlap_score", "shape_score"], inputs | {"sides": sides})
        with torch.no_grad():
            logits = network(networks.to_input(crops), torch.from_numpy(sides))[:, 2:]
        np.testing.assert_allclose(shape, logits.softmax(1).numpy(), atol=1e-5)
    assert scores.shape == (n,)
    np.testing.assert_allclose(scores, networks.predict(network, crops), atol=1e-5)


def test_tensor_error_is_the_largest_difference() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 2.9])
    assert graphs.tensor_error(a, b) == pytest.approx(0.5)
    assert graphs.tensor_error(a[:0], b[:0]) == 0.0
    assert graphs.tensor_error(np.array([0], np.uint8), np.array([255], np.uint8)) == 255.0


def test_the_graph_writes_what_onnx_itself_accepts(fp32: Path, int8: Path) -> None:
    for file in (fp32, int8):
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        assert {o.name for o in model.graph.output} == {"boxes", "scores"}
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_silu_is_one_node(fp32: Path) -> None:
    """Joined, the graph says the same; products that are no SiLU stay."""
    model = onnx.load(fp32)
    n = sum(node.op_type == "Mul" for node in model.graph.node)
    joined = graphs.join_silu(model)
    assert joined > 60
    assert sum(node.op_type == "Mul" for node in model.graph.node) == n - joined
    assert sum(node.op_type == "QuickGelu" for node in model.graph.node) == joined
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = fields(1)
    boxes, scores = session.run(["boxes", "scores"], {"image": image, "least_score": graphs.EVERYTHING})
    (whole_boxes,), (whole_scores,) = run(fp32, image)
    np.testing.assert_allclose(scores, whole_scores, atol=1e-4)
    np.testing.assert_allclose(boxes, whole_boxes, atol=0.05)


def test_the_int8_classifier_stays_near_and_is_small(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = networks.build("station").eval()
    whole, small = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    graphs.write_classifier(graphs.ClassifierGraph(network), whole)
    crops = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3)).astype(np.uint8)
    graphs.quantize_classifier(whole, small, iter([crops[:6], crops[6:]]))
    a, b = (
        ort.InferenceSession(str(f), providers=["CPUExecutionProvider"]).run(
            None, {"crops": crops, "sides": np.ones((12, 2), np.float32)}
        )[0]
        for f in (whole, small)
    )
    assert a.shape == b.shape == (12,)
    assert 0 < graphs.tensor_error(a, b) < 0.05
    assert small.stat().st_size < 0.45 * whole.stat().st_size

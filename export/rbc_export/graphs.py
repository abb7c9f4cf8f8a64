"""Torch networks as ONNX graphs, in the contract of `rbc_edge.vision.bundle`, and their int8 form.

The graphs take uint8 pixels as `vision.preprocess` makes them. Normalisation is inside the graph, so it
cannot differ between programs.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional

from rbc_edge.errors import BundleError
from rbc_edge.values import SHAPES, UInt8
from rbc_train.networks import StagesNet

OPSET: Final = 17
EVERYTHING: Final = np.zeros(3, np.float32)
"""Least scores with which the detector keeps every place, in one order."""

N_FLOAT_CONVOLUTIONS: Final = 7
"""Convolutions at the input that are not quantized: YOLOv5's stem (2) and first C3 stage (5)."""


class DetectorGraph(nn.Module):
    """YOLOv5n with its decoding, from pixels to boxes.

    Args:
        detector: ultralytics' DetectionModel.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        network: Any = detector  # ultralytics is untyped
        self.layers = network.model
        self.save: list[int] = network.save

    def forward(self, image: Tensor, least_score: Tensor) -> tuple[Tensor, Tensor]:
        """Decodes one field.

        Boxes are decoded only where a score is high enough: of a thousand places in a field, about a hundred
        see a cell.

        Args:
            image: uint8 (1, H, W, 3) RGB, sides multiples of 32.
            least_score: float32 (3,), least score by class. Zeros give every place.

        Returns:
            boxes float32 (N, 4), xyxy in pixels of the input. Scores float32 (N, 3): the places where the
            score of some class is at least its `least_score`, in reading order by stride.
        """
        x = image.permute(0, 3, 1, 2).float() / 255.0
        kept: dict[int, Tensor] = {}
        *body, head = self.layers
        for layer in body:
            # ultralytics' wiring: f is where a layer's input comes from, -1 the layer before.
            sources = [layer.f] if isinstance(layer.f, int) else layer.f
            inputs = [x if j == -1 else kept[j] for j in sources]
            x = layer(inputs if len(inputs) > 1 else inputs[0])
            if layer.i in self.save:
                kept[layer.i] = x
        levels = [x if j == -1 else kept[j] for j in head.f]
        scores = torch.cat([head.cv3[i](level).sigmoid()[0].flatten(1) for i, level in enumerate(levels)], 1)
        distances = torch.cat([head.cv2[i](level)[0].flatten(1) for i, level in enumerate(levels)], 1)
        places = torch.cat([_places(level, float(head.stride[i])) for i, level in enumerate(levels)], 1)
        sure = torch.nonzero((scores - least_score[:, None]).amax(0) >= 0)[:, 0]
        boxes = _decode(distances[:, sure].T, places[:, sure].T, bins=head.reg_max)
        return boxes, scores[:, sure].T


def _places(level: Tensor, stride: float) -> Tensor:
    """Gives the anchor points of one level, float (3, h * w): x, y in pixels of the input, and the stride."""
    height, width = level.shape[-2:]
    y = (torch.arange(height, dtype=torch.float32) + 0.5).view(-1, 1) * stride
    x = (torch.arange(width, dtype=torch.float32) + 0.5).view(1, -1) * stride
    zeros = torch.zeros_like(y + x)
    return torch.stack([x + zeros, y + zeros, zeros + stride]).flatten(1)


def _decode(distances: Tensor, places: Tensor, *, bins: int) -> Tensor:
    """Distribution focal loss decoding: a box is four expected distances from its anchor point.

    Args:
        distances: float (N, 4 * bins), logits over distances in strides.
        places: float (N, 3), `_places`.
        bins: Distances 0 .. bins - 1 a side.

    Returns:
        boxes float (N, 4), xyxy in pixels of the input.
    """
    share = functional.softmax(distances.view(-1, 4, bins), dim=2)
    steps = torch.arange(bins, dtype=torch.float32)
    sides = (share * steps).sum(2) * places[:, 2:]  # left, top, right, bottom; pixels
    return torch.cat([places[:, :2] - sides[:, :2], places[:, :2] + sides[:, 2:]], 1)


class ClassifierGraph(nn.Module):
    """The second stage from pixels to probabilities.

    Args:
        network: Gives logits float (N, 2 + S) for float (N, 3, 64, 64) in 0..1 and sides float (N, 2), as
            `StagesNet`, or (N,) for the first alone.
        slope: Of the calibration of the overlap logit, fitted on validation cells (Platt 1999).
        shift: Added to it.
        shape_slope: Of the calibration of the logits of shapes.
    """

    def __init__(
        self, network: nn.Module, *, slope: float = 1.0, shift: float = 0.0, shape_slope: float = 1.0
    ) -> None:
        super().__init__()
        self.network = network
        self.slope, self.shift, self.shape_slope = slope, shift, shape_slope
        self.n_shapes = len(SHAPES) if isinstance(network, StagesNet) else 0

    def forward(self, crops: Tensor, sides: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scores crops.

        Args:
            crops: uint8 (N, 64, 64, 3).
            sides: float32 (N, 2), width and height of their boxes in diameters of a red cell, if the network
                knows shapes.

        Returns:
            overlap_score and refuse_score, each float32 (N,), and shape_score, float32 (N, S), if the network
            knows shapes.
        """
        x = crops.permute(0, 3, 1, 2).float() / 255.0
        if not self.n_shapes:
            logits = self.network(x)
            return torch.sigmoid(logits * self.slope + self.shift), torch.zeros_like(logits)
        logits = self.network(x, sides)
        shape = functional.softmax(logits[:, 2:] * self.shape_slope, dim=1)
        return torch.sigmoid(logits[:, 0] * self.slope + self.shift), torch.sigmoid(logits[:, 1]), shape


def write_detector(graph: DetectorGraph, file: Path) -> None:
    """Writes the detector as fp32 ONNX with free height and width."""
    example = torch.randint(0, 256, (1, 192, 256, 3), dtype=torch.uint8), torch.zeros(3)
    axes = {"image": {1: "height", 2: "width"}, "least_score": {}, "boxes": {0: "n"}, "scores": {0: "n"}}
    _write(graph, example, file, axes)


def write_classifier(graph: ClassifierGraph, file: Path) -> None:
    """Writes the classifier as fp32 ONNX with a free number of crops."""
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    names = ["crops", "overlap_score", "refuse_score"]
    example: tuple[Tensor, ...] = (crops,)
    if graph.n_shapes:
        names = ["crops", "sides", "overlap_score", "refuse_score", "shape_score"]
        example = crops, torch.ones(2, 2)
    _write(graph, example, file, {name: {0: "n"} for name in names})


def _unit_sides(n: int) -> npt.NDArray[Any]:
    return np.ones((n, 2), np.float32)


def _write(
    graph: nn.Module, example: tuple[Tensor, ...], file: Path, axes: dict[str, dict[int, str]]
) -> None:
    """Traces a graph. `axes` names its inputs, then its outputs, and the sides of each that are free."""
    with warnings.catch_warnings():
        # The tracing exporter is marked old, but it is the one that needs no onnxscript.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(),
            example,
            str(file),
            input_names=list(axes)[: len(example)],
            output_names=list(axes)[len(example) :],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(onnx.load(file))


_Inputs = dict[str, npt.NDArray[Any]]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: Iterable[_Inputs]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> _Inputs | None:
        return next(self._inputs, None)


def quantize_detector(fp32: Path, int8: Path, images: Iterable[UInt8], *, reduce_range: bool = True) -> None:
    """Quantizes the detector statically: weights int8 per channel, activations uint8.

    The decoding stays in float: its values (distances in strides, probabilities near 0) do not fit one
    8-bit scale. Weights take 7 bits: on processors without VNNI (an office PC of 2015) the product of
    two full 8-bit operands saturates in 16 bits, and the counts would depend on the processor.

    Args:
        fp32: What `write_detector` wrote.
        int8: File to write.
        images: Calibration, each uint8 (H, W, 3) RGB at model scale, sides multiples of 32.
        reduce_range: 7-bit weights.
    """
    inputs: Iterator[_Inputs] = ({"image": image[None], "least_score": EVERYTHING} for image in images)
    _quantize(fp32, int8, inputs, first=N_FLOAT_CONVOLUTIONS, reduce_range=reduce_range)


def quantize_classifier(fp32: Path, int8: Path, crops: Iterable[UInt8], *, reduce_range: bool = True) -> None:
    """Quantizes the classifier as the detector.

    As many first convolutions stay in float: it takes as long as with one, and fewer verdicts change.

    Args:
        fp32: What `write_classifier` wrote.
        int8: File to write.
        crops: Calibration, each uint8 (N, 64, 64, 3) RGB.
        reduce_range: 7-bit weights.
    """
    taken = {given.name for given in onnx.load(fp32).graph.input}
    # No range depends on the sides: only the head reads them, in float.
    every: Iterator[_Inputs] = ({"crops": some, "sides": _unit_sides(len(some))} for some in crops)
    inputs: Iterator[_Inputs] = ({k: v for k, v in each.items() if k in taken} for each in every)
    _quantize(fp32, int8, inputs, first=N_FLOAT_CONVOLUTIONS, reduce_range=reduce_range)


def _quantize(
    fp32: Path,
    int8: Path,
    inputs: Iterable[_Inputs],
    *,
    first: int,
    reduce_range: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = Path(folder) / "prepared.onnx"
        # Symbolic shape inference needs sympy and gains nothing here.
        quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        join_silu(model)
        onnx.save(model, prepared)
        nodes = [(n.name, n.op_type, list(n.input), list(n.output)) for n in model.graph.node]
        quantize_static(
            str(prepared),
            str(int8),
            _Reader(inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=stays_float(nodes, first=first),
            extra_options={"CalibMovingAverage": True},
        )


def join_silu(model: onnx.ModelProto) -> int:
    """Makes one node of each x * sigmoid(x), in place.

    Quantized apart, sigmoid and product each round to 8 bits and each go through memory. As ONNX Runtime's
    QuickGelu (with alpha 1 the same function) they are one pass in float between two convolutions in
    8 bits: the detector takes 6 % less time, the classifier 14 %, and less is rounded.

    Args:
        model: An fp32 graph.

    Returns:
        How many were joined.
    """
    maker = {output: node for node in model.graph.node for output in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    joined: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for node in model.graph.node:
        for x, y in (node.input, reversed(node.input)) if node.op_type == "Mul" else ():
            other = maker.get(y)
            if other is not None and other.op_type == "Sigmoid" and other.input[0] == x and readers[y] == 1:
                joined[node.name] = onnx.helper.make_node(
                    "QuickGelu", [x], list(node.output), node.name, domain="com.microsoft", alpha=1.0
                )
                gone.add(other.name)
    nodes = [joined.get(node.name, node) for node in model.graph.node if node.name not in gone]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if joined:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return len(joined)


_UNSURE: Final = (0.2, 0.9)
"""Probabilities in fp32 that decide whether a cell is counted."""


def correct_scores(fp32: Path, int8: Path, images: Iterable[UInt8]) -> dict[str, float]:
    """Takes the systematic error of quantization out of the int8 detector's scores (bias correction).

    Quantized, the logits of a class are a little off all the same way, and counts with them: by 0.9 % for
    one detector. Their mean error over the calibration images goes into the bias of the last convolutions,
    which are in float (Nagel et al. 2019, Data-Free Quantization, section 4.2, with data). It costs nothing.

    Args:
        fp32: What `write_detector` wrote.
        int8: What `quantize_detector` wrote. Corrected in place.
        images: Calibration, as for `quantize_detector`.

    Returns:
        By class number, what was added to its logits.
    """
    whole, small = (
        onnxruntime.InferenceSession(str(f), providers=["CPUExecutionProvider"]) for f in (fp32, int8)
    )
    errors: list[list[npt.NDArray[Any]]] = []
    for image in images:
        inputs = {"image": image[None], "least_score": EVERYTHING}
        right, given = (s.run(["scores"], inputs)[0] for s in (whole, small))
        n_classes = right.shape[1]
        errors = errors or [[] for _ in range(n_classes)]
        for c in range(n_classes):
            unsure = (right[:, c] > _UNSURE[0]) & (right[:, c] < _UNSURE[1])
            errors[c].append(_logit(right[unsure, c]) - _logit(given[unsure, c]))
    shift = np.array([e.mean() if len(e) else 0.0 for e in map(np.concatenate, errors)], np.float32)
    model = onnx.load(int8)
    made_by = {output: node for node in model.graph.node for output in node.output}
    constants = {constant.name: constant for constant in model.graph.initializer}
    corrected = 0
    for node in model.graph.node:
        before = made_by.get(node.input[0]) if node.op_type == "Sigmoid" else None
        if before is None or before.op_type != "Conv" or len(before.input) < 3:
            continue
        bias = constants.get(before.input[2])
        if bias is not None and list(bias.dims) == [len(shift)]:
            value = onnx.numpy_helper.to_array(bias) + shift
            bias.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), bias.name))
            corrected += 1
    if not corrected:
        raise BundleError(f"{int8}: no convolution with a class's logits was found")
    onnx.save(model, int8)
    return {str(c): float(s) for c, s in enumerate(shift)}


def _logit(probability: npt.NDArray[Any]) -> npt.NDArray[Any]:
    p = np.clip(probability.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(p / (1 - p)))


Node = tuple[str, str, list[str], list[str]]


def stays_float(nodes: Iterable[Node], *, first: int = N_FLOAT_CONVOLUTIONS) -> list[str]:
    """Names the nodes that are not quantized: the decoding, and the convolutions at either end.

    The first convolutions read raw pixels and the last ones write distances and logits. What they round away
    is lost. Measured on validation, the change of the count, int8 against fp32: 1.5 %
    with the first and the last convolutions in float, 0.5 % with the first seven (the stem and the first
    C3 stage) and the last, at no cost in time.

    Args:
        nodes: (name, operator, inputs, outputs) in graph order.
        first: How many convolutions at the input stay in float.

    Returns:
        Names of all nodes up to the `first`-th convolution, of the convolutions that no other follows, and
        of all nodes after those.
    """
    listed = list(nodes)
    to_conv: set[str] = set()  # tensors that lead to a convolution
    names: list[str] = []
    for name, operator, inputs, outputs in reversed(listed):
        leads = bool(to_conv & set(outputs))
        if not leads:
            names.append(name)
        if leads or operator == "Conv":
            to_conv |= set(inputs)
    seen = 0
    for name, operator, _, _ in listed:
        names.append(name)
        seen += operator == "Conv"
        if seen == first:
            break
    return names


def fuse(detector: Any) -> nn.Module:
    """Folds batch normalisation into the convolutions of ultralytics' DetectionModel, for inference."""
    fused: nn.Module = detector.float().eval().fuse(verbose=False)
    return fused


def tensor_error(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Largest absolute difference of two arrays of one shape."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))

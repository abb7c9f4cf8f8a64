"""Makes ``tests/edge/toy_bundle``: networks of a few KB that see drawn cells, without any training.

Run as ``python tests/edge/make_toy_bundle.py``. It needs the `onnx` package, which the tests do not: the
bundle is committed. Both networks keep the contract of `vision.bundle`. They are matched filters, not
good, but deterministic and responsive to the image: with them the tests run the real pipeline, ONNX
Runtime included, on fields that `ops.synthetic` draws in its `CREAM` stain.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rbc_edge.ops import synthetic
from rbc_edge.values import Float32
from rbc_edge.vision import bundle, image_file, preprocess
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.selftest import expectation

FOLDER = Path(__file__).resolve().parent / "toy_bundle"
CELL_DIAMETER_PX = 40.0
RBC_DIAMETERS_PX = (28.0, 33.5, 40.0, 48.0, 57.5)
"""Sizes of red cells that the detector tells apart: enough for a scale to be estimated with it."""
WBC_BOX_PX = 68.0
PLATELET_BOX_PX = 12.0
STEP_PX = 4
"""The detector looks at every fourth pixel."""
CROP_MARGIN = 0.25


class Graph:
    """A network in the making: calling it adds a node and returns the name of its output."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic] = np.float32) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def save(self, file: Path, sources: list[Any], results: dict[str, Any]) -> None:
        """Checks and writes the network; `results` is the tensor's name to the output it becomes."""
        for tensor, info in results.items():
            self._nodes.append(helper.make_node("Identity", [tensor], [info.name]))
        graph = helper.make_graph(self._nodes, file.stem, sources, list(results.values()), self._constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="rbc-edge toy"
        )
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(file))


def absorbed(g: Graph, image: str, step: int) -> str:
    """How much darker the image is than its brightest place, 0..1: uint8 (B, H, W, 3) to (B, 3, H/s, W/s).

    Padding counts as background; no pixel of a drawn field is exactly its grey in all channels.
    """
    pixels = g("Transpose", g("Cast", image, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    grey = g("Equal", pixels, g.constant(float(preprocess.PAD_VALUE)))
    padding = g("ReduceMin", g("Cast", grey, to=TensorProto.FLOAT), axes=[1], keepdims=1)
    content = g("Sub", g.constant(1.0), padding)
    small = g("AveragePool", g("Mul", pixels, content), kernel_shape=[step, step], strides=[step, step])
    brightest = g("ReduceMax", small, axes=[2, 3], keepdims=1)
    here = g("AveragePool", content, kernel_shape=[step, step], strides=[step, step])
    # (brightest - pixel) where there is content, 0 where there is padding
    darker = g("Sub", g("Mul", brightest, here), small)
    return g("Mul", g("Relu", darker), g.constant(1 / 255))


def channel(g: Graph, planes: str, index: int) -> str:
    """One channel of (B, C, h, w), as (B, 1, h, w)."""
    starts, ends, axes = ([v] for v in (index, index + 1, 1))
    return g("Slice", planes, *(g.constant(v, np.int64) for v in (starts, ends, axes)))


def disc(size: int, inner_px: float, outer_px: float, step: float) -> Float32:
    """Kernel (size, size) of sum 1 over a ring; radii in pixels of the image, antialiased."""
    fine = 8
    at = (np.arange(size * fine) + 0.5) / fine - size / 2
    radius = np.hypot(at[None], at[:, None]) * step
    ring = ((radius >= inner_px) & (radius < outer_px)).astype(np.float32)
    kernel = ring.reshape(size, fine, size, fine).mean(axis=(1, 3))
    return np.asarray(kernel / kernel.sum(), np.float32)


def convolved(g: Graph, plane: str, kernels: list[Float32]) -> str:
    """(B, 1, h, w) filtered with K square kernels of odd size: (B, K, h, w)."""
    size = kernels[0].shape[0]
    return g("Conv", plane, g.constant(np.stack(kernels)[:, None]), pads=[size // 2] * 4)


def score(g: Graph, response: str, gain: float, offset: float) -> str:
    """gain * (response - offset), within 0..1."""
    line = g("Mul", g("Sub", response, g.constant(offset)), g.constant(gain))
    return g("Clip", line, g.constant(0.0), g.constant(1.0))


def peaks(g: Graph, scores: str, radius: int) -> str:
    """(B, K, h, w) with everything but the best of its neighbourhood, over all K, set to 0."""
    best = g("ReduceMax", scores, axes=[1], keepdims=1)
    around = g("MaxPool", best, kernel_shape=[2 * radius + 1] * 2, strides=[1, 1], pads=[radius] * 4)
    is_peak = g("Cast", g("Equal", scores, around), to=TensorProto.FLOAT)
    return g("Mul", scores, is_peak)


def make_detector(file: Path) -> None:
    """Discs on the light that green and red lose, less the ring around them."""
    g = Graph()
    darkness = absorbed(g, "image", STEP_PX)
    green, red = channel(g, darkness, 1), channel(g, darkness, 0)

    size = 23
    discs = [
        disc(size, 0, d / 2, STEP_PX) - disc(size, 0.55 * d, 0.75 * d, STEP_PX) for d in RBC_DIAMETERS_PX
    ]
    nucleus = score(g, convolved(g, red, [disc(size, 0, 14, STEP_PX)]), 5.0, 0.36)
    no_nucleus = g(
        "Sub", g.constant(1.0), g("Clip", g("Mul", nucleus, g.constant(10.0)), "", g.constant(1.0))
    )
    speck = convolved(g, red, [disc(size, 0, 5, STEP_PX) - 3 * disc(size, 8, 13, STEP_PX)])
    rbc = peaks(g, g("Mul", score(g, convolved(g, green, discs), 3.0, 0.0), no_nucleus), 3)
    wbc = peaks(g, nucleus, 7)
    platelet = peaks(g, g("Mul", score(g, speck, 5.0, 0.06), no_nucleus), 2)

    # Centres of the grid's places: running sums of ones.
    ones = g("Add", g("Mul", green, g.constant(0.0)), g.constant(1.0))
    x, y = (
        g(
            "Mul",
            g("Sub", g("CumSum", ones, g.constant(axis, np.int64)), g.constant(0.5)),
            g.constant(float(STEP_PX)),
        )
        for axis in (3, 2)
    )
    column = g.constant([0, -1, 1], np.int64)
    x, y = g("Reshape", x, column), g("Reshape", y, column)
    boxes, scores = [], []
    for plane, sides, class_id in (
        (rbc, RBC_DIAMETERS_PX, 0),
        (wbc, (WBC_BOX_PX,), 1),
        (platelet, (PLATELET_BOX_PX,), 2),
    ):
        for side in sides:
            half = g.constant(side / 2)
            corners = (g("Sub", x, half), g("Sub", y, half), g("Add", x, half), g("Add", y, half))
            boxes.append(g("Concat", *corners, axis=2))
        flat = g("Reshape", plane, column)
        zero = g("Mul", flat, g.constant(0.0))
        scores.append(g("Concat", *(flat if c == class_id else zero for c in range(3)), axis=2))
    # Of all places those where some class reaches its least score.
    every_box, every_score = (
        g("Squeeze", g("Concat", *parts, axis=1), g.constant([0], np.int64)) for parts in (boxes, scores)
    )
    over = g("ReduceMax", g("Sub", every_score, "least_score"), axes=[1], keepdims=0)
    sure = g("Squeeze", g("NonZero", g("GreaterOrEqual", over, g.constant(0.0))), g.constant([0], np.int64))
    g.save(
        file,
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, [1, "H", "W", 3]),
            helper.make_tensor_value_info("least_score", TensorProto.FLOAT, [3]),
        ],
        {
            g("Gather", every_box, sure, axis=0): helper.make_tensor_value_info(
                "boxes", TensorProto.FLOAT, ["N", 4]
            ),
            g("Gather", every_score, sure, axis=0): helper.make_tensor_value_info(
                "scores", TensorProto.FLOAT, ["N", 3]
            ),
        },
    )


def make_classifier(file: Path) -> None:
    """How dark it is just outside the outline against inside, and whether that is the colour of a red cell.

    Red cells absorb green and little red. Dust is grey, and empty glass absorbs nothing: both are refused.
    """
    g = Graph()
    darkness = absorbed(g, "crops", 2)  # (N, 3, 32, 32)
    green, red = channel(g, darkness, 1), channel(g, darkness, 0)
    radius_px = preprocess.CROP_PX / 2 / (1 + 2 * CROP_MARGIN)
    inside, outside = disc(32, 0, 0.8 * radius_px, 2), disc(32, 1.2 * radius_px, 1.45 * radius_px, 2)
    means = g("Conv", green, g.constant(np.stack([inside, outside])[:, None]))  # (N, 2, 1, 1)
    green_inside = g("Add", channel(g, means, 0), g.constant(0.02))
    red_inside = g("Add", g("Conv", red, g.constant(inside[None, None])), g.constant(0.02))
    overlap = g("Div", channel(g, means, 1), green_inside)
    grey = g("Div", red_inside, green_inside)
    scores = {"overlap_score": (overlap, 0.22), "refuse_score": (grey, 0.92)}
    g.save(
        file,
        [
            helper.make_tensor_value_info("crops", TensorProto.UINT8, ["N", 64, 64, 3]),
            helper.make_tensor_value_info("sides", TensorProto.FLOAT, ["N", 2]),
        ],
        {
            shapes(g, green): helper.make_tensor_value_info("shape_score", TensorProto.FLOAT, ["N", 3]),
        }
        | {
            g("Reshape", probability(g, share, middle), g.constant([-1], np.int64)): (
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"])
            )
            for name, (share, middle) in scores.items()
        },
    )


def shapes(g: Graph, green: str) -> str:
    """Probabilities of normal, elliptocyte and spherocyte: a long box, and a middle not pale."""
    low, high = (g(f"Reduce{m}", "sides", axes=[1], keepdims=1) for m in ("Min", "Max"))
    long = g("Mul", g("Sub", g("Div", high, low), g.constant(1.3)), g.constant(20.0))
    middle, whole = (g("Conv", green, g.constant(disc(32, 0, r, 2)[None, None])) for r in (6.0, 18.0))
    share = g("Div", middle, g("Add", whole, g.constant(0.02)))
    filled = g("Mul", g("Sub", share, g.constant(0.97)), g.constant(20.0))
    filled = g("Reshape", filled, g.constant([-1, 1], np.int64))
    return g("Softmax", g("Concat", g("Mul", filled, g.constant(0.0)), long, filled, axis=1), axis=1)


def probability(g: Graph, share: str, middle: float) -> str:
    """A sigmoid with one half at `middle`."""
    return g("Sigmoid", g("Mul", g("Sub", share, g.constant(middle)), g.constant(20.0)))


def manifest() -> bundle.Manifest:
    """The toy's description of itself."""
    return bundle.Manifest(
        format=bundle.FORMAT,
        class_names=("RBC", "WBC", "platelet"),
        cell_diameter_px=CELL_DIAMETER_PX,
        tile_px=640,
        tile_overlap_px=128,
        score_threshold=(0.3, 0.3, 0.3),
        iou_threshold=(0.5, 0.3, 0.3),
        iou_threshold_across=0.4,
        crop_margin=CROP_MARGIN,
        overlap_threshold=0.5,
        refuse_threshold=0.5,
        shapes=("normal", "elliptocyte", "spherocyte"),
        shape_weights=(),
        shape_threshold=0.6,
        normalisation="uint8 RGB in; the networks see how much darker than the brightest place",
        calibration={},
        training={"made by": "tests/edge/make_toy_bundle.py", "data": "none"},
        metrics={},
        licence="AGPL-3.0-or-later",
        files={},
    )


def main() -> None:
    """Writes the bundle."""
    with tempfile.TemporaryDirectory() as name:
        build = Path(name)
        source = {
            part: build / part
            for part in (bundle.DETECTOR, bundle.CLASSIFIER, bundle.TEST_INPUT, bundle.TEST_EXPECTED)
        }
        make_detector(source[bundle.DETECTOR])
        make_classifier(source[bundle.CLASSIFIER])
        drawn = synthetic.draw_field(
            np.random.default_rng(1),
            width_px=204,  # so that `preprocess.snug` leaves it as it is
            height_px=168,
            cell_diameter_px=CELL_DIAMETER_PX,
            n_single=3,
            group_sizes=(2,),
            n_platelets=1,
            stain=synthetic.CREAM,
            noise=0.0,  # so that the PNG stays small
        )
        cv2.imwrite(str(source[bundle.TEST_INPUT]), cv2.cvtColor(drawn.image, cv2.COLOR_RGB2BGR))
        # A draft says what the networks find, as in the export.
        source[bundle.TEST_EXPECTED].write_text("{}\n", encoding="utf-8")
        draft = bundle.write(build / "draft", source, manifest())
        field = image_file.load_field(source[bundle.TEST_INPUT], "bundle", "test")
        expected = expectation(Analyzer(draft, threads=1), field, CELL_DIAMETER_PX)
        source[bundle.TEST_EXPECTED].write_text(json.dumps(expected) + "\n", encoding="utf-8")
        print(bundle.write(FOLDER, source, manifest()).bundle_id)


if __name__ == "__main__":
    main()

"""The alternative to rbc-edge: `yolo predict` with the weights of the bundle.

A bundle holds the detector as int8 ONNX only. This puts its weights back into ultralytics' network (the
int8 weights times their scales), checks that both find the same boxes, and exports ultralytics' own ONNX of
it. Run as ``python -m bench.rival BUNDLE OUT IMAGES``, in a process of its own, because it needs torch.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("YOLO_OFFLINE", "True")

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from rbc_edge import text
from rbc_edge.vision import image_file, preprocess
from rbc_edge.vision.bundle import DETECTOR, Bundle
from rbc_edge.vision.scale import estimate_slide
from rbc_export.graphs import EVERYTHING, DetectorGraph

DEFAULT_PX: Final = 640
SMALL_PX: Final = 256
"""Our size: a field of 640x480 with cells of 100 px has 256x192 pixels at the bundle's scale."""

_MIN_SAME: Final = 0.9
"""Share of the boxes with a high score that both networks must find in one place; int8 moves the rest."""
_SURE: Final = 0.5
_SAME_PX: Final = 4.0
_N_COMPARED: Final = 4


def dequantized(detector: Path) -> DetectionModel:
    """Returns ultralytics' YOLOv5n, batch normalisation fused, with the weights of a bundle's detector.

    Args:
        detector: A ``detector.onnx`` that `rbc_export.graphs` wrote, int8 (QDQ) or fp32.

    Raises:
        ValueError: Weights are missing, or of another shape: another network than YOLOv5n.
    """
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(detector).graph.initializer}
    network = DetectionModel("yolov5n.yaml", nc=3, verbose=False).float().eval().fuse(verbose=False)
    state = {}
    for name, wanted in network.state_dict().items():
        if name.endswith("dfl.conv.weight"):  # the constants 0, 1, .., 15
            continue
        value = _constant(constants, name.replace("model.", "layers.", 1))
        if value is None or value.shape != tuple(wanted.shape):
            raise ValueError(f"{detector}: has no weights that fit {name} of YOLOv5n")
        state[name] = torch.from_numpy(value.copy())
    network.load_state_dict(state, strict=False)
    network.names = {0: "RBC", 1: "WBC", 2: "Platelets"}
    return network


def _constant(constants: dict[str, npt.NDArray[Any]], name: str) -> npt.NDArray[np.float32] | None:
    if name in constants:
        return constants[name].astype(np.float32)
    quantized = constants.get(f"{name}_quantized")
    scale = constants.get(f"{name}_quantized_scale", constants.get(f"{name}_scale"))
    if quantized is None or scale is None:
        return None
    per_channel = scale.reshape(-1, *[1] * (quantized.ndim - 1))
    return np.asarray(quantized.astype(np.float32) * per_channel, np.float32)


def agreement(network: DetectionModel, bundle: Bundle, images: list[Path]) -> float:
    """Returns the share of the bundle's boxes with a high score that the network finds in the same place."""
    session = bundle.session(DETECTOR, threads=1)
    graph = DetectorGraph(network)
    fields = [image_file.load_field(path, "", path.name).image for path in images]
    diameter = _diameter_px(bundle, fields)
    same = sure = 0
    for field in fields:
        view = preprocess.view(field, diameter)
        small = preprocess.detector_input(view, diameter, bundle.manifest.cell_diameter_px)
        window = preprocess.pad_to_stride(small[: preprocess.TILE_PX, : preprocess.TILE_PX])[0][None]
        inputs = {"image": window.copy(), "least_score": EVERYTHING}
        boxes, scores = session.run(["boxes", "scores"], inputs)
        with torch.no_grad():
            ours, theirs = graph(*(torch.from_numpy(i) for i in inputs.values()))
        # Both have the same anchors, so no matching is needed.
        at = scores.max(axis=1) > _SURE
        off = np.abs(boxes - ours.numpy()).max(axis=1)
        alike = (off < _SAME_PX) & (np.abs(scores - theirs.numpy()).max(axis=1) < 0.25)
        same, sure = same + int((at & alike).sum()), sure + int(at.sum())
    return same / max(sure, 1)


def _diameter_px(bundle: Bundle, fields: list[npt.NDArray[np.uint8]]) -> float:
    from rbc_edge.vision.detector import Detector  # noqa: PLC0415  not at the top: it opens a session

    return estimate_slide(fields, Detector(bundle, threads=1)).cell_diameter_px


def make(bundle: Bundle, out: Path, images: list[Path]) -> dict[str, object]:
    """Writes ``detector.pt``, ``detector.onnx`` (both sides 640) and ``free.onnx`` (free sides).

    Returns:
        How far the networks agree, and the boxes in a field that `yolo predict` finds at each size.

    Raises:
        ValueError: The rebuilt network does not find the boxes of the bundle's.
    """
    network = dequantized(bundle.path / DETECTOR)
    same = agreement(network, bundle, images[:_N_COMPARED])
    if not same >= _MIN_SAME:
        raise ValueError(f"the rebuilt network finds {same:.0%} of the bundle's boxes: it is another network")
    weights = out / "detector.pt"
    torch.save({"model": network, "train_args": {"imgsz": DEFAULT_PX, "task": "detect"}}, weights)
    found = {}
    for size in (DEFAULT_PX, SMALL_PX):
        results = YOLO(weights).predict(
            [str(i) for i in images], imgsz=size, device="cpu", save=False, verbose=False, stream=True
        )
        found[str(size)] = float(np.mean([len(r.boxes) for r in results]))
    # Free sides first: the export names both files after the weights.
    for dynamic, name in ((True, "free.onnx"), (False, "detector.onnx")):
        made = YOLO(weights).export(
            format="onnx", imgsz=DEFAULT_PX, dynamic=dynamic, simplify=False, device="cpu", verbose=False
        )
        shutil.move(made, out / name)
    return {"agreement": same, "boxes_per_field": found}


def main() -> None:
    """Makes the files and prints the figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("images", type=Path)
    asked = parser.parse_args()
    images = sorted(p for p in asked.images.iterdir() if p.suffix.lower() in text.IMAGE_SUFFIXES)
    try:
        figures = make(Bundle.open(asked.bundle), asked.out, images)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

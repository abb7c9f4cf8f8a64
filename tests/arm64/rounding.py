"""A program for either computer: the detector's scores with its int8 kernels, and without.

``rounding.py DIAMETER OUT.npz IMAGE...``, or ``rounding.py - OUT.npz THEIRS.npz`` for the windows of another
computer. Without ONNX Runtime's fusing of operators, the quantized network is computed in float and rounded
to 8 bits where it was quantized.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from rbc_edge.values import UInt8
from rbc_edge.vision import image_file, preprocess
from rbc_edge.vision.bundle import DETECTOR, Bundle


def windows(diameter_px: float, images: list[str], model_px: float) -> dict[str, UInt8]:
    """Returns the detector's input for each image, uint8 (H, W, 3)."""
    found = {}
    for name in images:
        field = image_file.load_field(Path(name), "slide", name, cell_diameter_px=diameter_px)
        view = preprocess.view(field.decoded, diameter_px)
        shown = preprocess.detector_input(view, diameter_px, model_px)
        found[Path(name).stem], _, _ = preprocess.pad_to_stride(shown)
    return found


def main(diameter_px: str, out: str, *files: str) -> None:
    """Writes ``NAME.window``, ``NAME.int8`` and ``NAME.float`` of each image."""
    bundle = Bundle.open()
    if diameter_px == "-":
        given = np.load(files[0])
        shown = {key.removesuffix(".window"): given[key] for key in given.files if key.endswith(".window")}
    else:
        shown = windows(float(diameter_px), list(files), bundle.manifest.cell_diameter_px)
    made = {f"{name}.window": window for name, window in shown.items()}
    everywhere = np.full(len(bundle.manifest.score_threshold), -1, np.float32)
    levels = ort.GraphOptimizationLevel
    for kernels, level in (("int8", levels.ORT_ENABLE_ALL), ("float", levels.ORT_DISABLE_ALL)):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(
            str(bundle.path / DETECTOR), options, providers=["CPUExecutionProvider"]
        )
        for name, window in shown.items():
            (made[f"{name}.{kernels}"],) = session.run(
                ["scores"], {"image": window[None], "least_score": everywhere}
            )
    np.savez(out, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])

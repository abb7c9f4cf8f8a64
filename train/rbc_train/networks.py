"""The networks: YOLOv5n as ultralytics builds it, and the networks of the second stage.

All networks of the second stage take uint8 RGB crops of 64x64. They give the log odds that the cell in the
middle overlaps another cell. Ours also give the log odds that the box holds no single red cell, and of each
shape a cell can have. The shapes of tensors stand in the margin.
"""

import os
from pathlib import Path
from typing import Any, Final, Literal

os.environ.setdefault("YOLO_OFFLINE", "True")  # training must not reach for the network

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.patches import torch_load

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import SHAPES, Float32, UInt8
from rbc_train.data import CLASS_NAMES

ModelName = Literal["base", "improved", "station", "teacher"]

PAPER: Final = ("base", "improved")
"""The networks of the paper. The others are ours."""


N_SIZES: Final = 6
"""What `sizes` tells the head of shapes."""
_N_HIDDEN: Final = 128

N_COCO_TENSORS: Final = 342
"""Backbone and neck tensors of YOLOv5n v6.1 that fit ultralytics' yolov5n.yaml by name and shape."""


class PaperNet(nn.Module):
    """The paper's CNN: two convolutions, each with max-pooling, then fully connected (paper, step 3).

    Args:
        dropout: 0 for the base network, 0.5 for the improved one.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),  # N, 32, 64, 64
            nn.ReLU(),
            nn.MaxPool2d(2),  # N, 32, 32, 32
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # N, 64, 16, 16
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * 16 * 16, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gives logits float (N,) for crops float (N, 3, 64, 64) in 0..1."""
        return torch.squeeze(self.head(self.features(x)), 1)


class StagesNet(nn.Module):
    """The first stages of YOLOv5n, pooled, with a small head.

    A crop shows its cell 43 px wide, about the size at which the detector sees cells. So the first stages of
    a trained detector fit crops, and they know outlines, pallor and neighbours before the first overlap label
    (`begin_from`). With the same labels, training from noise reaches AUC 0.982 on validation, and training
    from these stages 0.991 (`python -m studies.ablations overlap`).

    Args:
        depth: Layers of YOLOv5n's backbone: 7 up to stride 16 (11 million multiply-adds a crop), 10 for
            all of it (14 million).
        dropout: Before the head.
    """

    _CHANNELS: Final = {4: 64, 6: 128, 9: 256}  # layers that end a stage, and their channels

    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        yolo: Any = DetectionModel("yolov5n.yaml", nc=len(CLASS_NAMES), verbose=False)
        self.stages = nn.ModuleList(list(yolo.model[:depth]))
        self.taps = tuple(i for i in self._CHANNELS if i < depth)
        n_features = sum(self._CHANNELS[i] for i in self.taps)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(n_features, 2))
        self.shape_head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(n_features + N_SIZES, _N_HIDDEN),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(_N_HIDDEN, len(SHAPES)),
        )

    def forward(self, x: Tensor, sides: Tensor | None = None) -> Tensor:
        """Gives logits for crops.

        Args:
            x: float (N, 3, 64, 64) in 0..1.
            sides: float (N, 2), width and height of the boxes in diameters of a red cell. None: as one. Only
                shapes depend on them.

        Returns:
            float (N, 2 + S): overlapping, no single red cell, and each of `SHAPES`.
        """
        pooled: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            x = stage(x)  # N, 64, 8, 8 after layer 4; N, 128, 4, 4 after 6; N, 256, 2, 2 after 9
            if i in self.taps:
                pooled.append(x.mean((2, 3)))
        seen = torch.cat(pooled, 1)
        size = sizes(torch.ones_like(seen[:, :2]) if sides is None else sides)
        return torch.cat([self.head(seen), self.shape_head(torch.cat([seen, size], 1))], 1)

    def begin_from(self, detector: nn.Module) -> None:
        """Takes the first stages of a trained detector.

        Args:
            detector: ultralytics' YOLOv5n (`load_detector`).
        """
        trained: Any = detector
        for own, given in zip(self.stages, trained.model, strict=False):
            own.load_state_dict(given.float().state_dict())


def sizes(sides: Tensor) -> Tensor:
    """Turns sides, float (N, 2), into `N_SIZES` numbers that do not change when the crop is turned.

    Smaller and larger side, their geometric mean, each less 1; how much longer the longer is; and how far the
    mean is from 1, twice, because a macrocyte and a microcyte are both far from a normal cell.
    """
    low, high = sides.amin(1, keepdim=True), sides.amax(1, keepdim=True)
    mean = (low * high).sqrt() - 1
    return torch.cat([low - 1, high - 1, mean, high / low.clamp(min=1e-3) - 1, 4 * mean**2, mean.abs()], 1)


def build(model: ModelName) -> nn.Module:
    """Builds a network by its name."""
    match model:
        case "base":
            return PaperNet(dropout=0.0)
        case "improved":
            return PaperNet(dropout=0.5)
        case "station":
            return StagesNet(depth=7, dropout=0.2)
        case "teacher":
            return StagesNet(depth=10, dropout=0.3)


def to_input(crops: UInt8) -> Tensor:
    """Turns crops uint8 (N, 64, 64, 3) into float (N, 3, 64, 64) in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 255.0


def overlap_logits(logits: Tensor) -> Tensor:
    """Returns the log odds of overlapping, float (N,), of what any of the networks gives."""
    return logits[:, 0] if logits.ndim == 2 else logits


def predict(network: nn.Module, crops: UInt8, *, turned: bool = False) -> Float32:
    """Scores crops for overlap (see `predict_both`): float32 (N,), probability of overlapping."""
    return predict_both(network, crops, turned=turned)[:, 0]


@torch.no_grad()
def predict_both(network: nn.Module, crops: UInt8, *, turned: bool = False) -> Float32:
    """Scores crops.

    Args:
        network: In any mode. Left in evaluation mode.
        crops: uint8 (N, 64, 64, 3) RGB.
        turned: Take the mean over the eight ways to turn and mirror a crop.

    Returns:
        float32 (N, 2): probability of overlapping, and that the box holds no single red cell. The paper's
        networks do not say the second: 0.
    """
    network.eval()
    parts = [torch.zeros(0, 2)]
    for i in range(0, len(crops), 256):
        x = to_input(crops[i : i + 256])
        views = [torch.rot90(y, k, (2, 3)) for k in range(4) for y in (x, x.flip(3))] if turned else [x]
        scores = torch.stack([torch.sigmoid(network(v)) for v in views]).mean(0)
        both = scores[:, :2] if scores.ndim == 2 else torch.stack([scores, torch.zeros_like(scores)], 1)
        parts.append(both)
    return torch.cat(parts).numpy().astype(np.float32)


def load_classifier(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a finished network.

    Args:
        checkpoint: ``classifier.pt`` of a run.

    Returns:
        The network in evaluation mode, and the configuration of its run.

    Raises:
        UnavailableError: If the file is not there.
    """
    if not checkpoint.is_file():
        raise UnavailableError(f"{checkpoint}: no such file", "train it: python -m rbc_train classifier")
    state = torch.load(checkpoint, weights_only=True)
    network = build(state["config"]["model"])
    network.load_state_dict(state["network"])
    return network.eval(), state["config"]


def load_coco(model: nn.Module, path: Path) -> None:
    """Loads the COCO-pretrained backbone and neck into a model, by name.

    Args:
        model: ultralytics' ``yolov5n.yaml``.
        path: safetensors of YOLOv5n v6.1.

    Raises:
        UnavailableError: If the file is not there.
        UsageError: If not all backbone and neck tensors fit: training would start from noise unseen.
    """
    if not path.is_file():
        raise UnavailableError(f"{path}: no such file", "give the COCO weights with --weights")
    own = model.state_dict()
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path}: not a safetensors file: {error}", "is it YOLOv5n v6.1?") from error
    fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    if len(fits) != N_COCO_TENSORS:
        raise UsageError(
            f"{path}: {len(fits)} of {N_COCO_TENSORS} tensors fit YOLOv5n", "is it YOLOv5n v6.1?"
        )
    model.load_state_dict({**own, **fits})


def load_detector(checkpoint: Path) -> DetectionModel:
    """Loads a trained detector.

    Args:
        checkpoint: ``detector.pt`` of a run (a pickle of ultralytics: load only your own).

    Returns:
        The network, with the running mean of its weights where there is one.

    Raises:
        UnavailableError: If the file is not there.
    """
    if not checkpoint.is_file():
        raise UnavailableError(f"{checkpoint}: no such file", "train it: python -m rbc_train detector")
    state = torch_load(checkpoint, map_location="cpu")
    network: DetectionModel = state["ema"] if state.get("ema") is not None else state["model"]
    return network

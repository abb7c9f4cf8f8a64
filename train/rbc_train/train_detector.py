"""Training of the detector: YOLOv5n (backbone and neck from COCO) through ultralytics, at one cell size.

Reads top to bottom: options, what training images go through, the trainer, `train`. The images of the
dataset already show red cells at `cell_diameter_px`. ultralytics would resize each to `imgsz`, which
would undo that, so `ScaledDataset` does not. It takes a random window of a larger image.
"""

import os
import random
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("YOLO_OFFLINE", "True")  # training must not reach for the network

import cv2
import numpy as np
import torch
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.patches import torch_load

from rbc_edge.errors import UnavailableError
from rbc_edge.values import Bool, Float32, UInt8
from rbc_train import augment, networks, runs
from rbc_train.data import sha256

CHECKPOINT: Final = "detector.pt"
"""What a finished run leaves in its folder."""


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """How to train the detector.

    Attributes:
        dataset: Folder that `write_dataset` wrote.
        weights: COCO-pretrained YOLOv5n, safetensors. None starts from noise.
        out: Folder of this run: checkpoints, log, configuration.
        epochs: Passes over the training photographs.
        batch: Photographs a step (each a mosaic of four).
        image_px: Side of a training image. About six cells.
        seed: Of everything random.
        device: ``cpu``, ``0`` for the first CUDA device.
        threads: Of torch on the CPU.
        workers: Processes that prepare images.
    """

    dataset: Path
    weights: Path | None
    out: Path
    epochs: int = 100
    batch: int = 16
    image_px: int = 256
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    workers: int = 0


# What ultralytics varies. Round cells have no up or left; a rotation by other than a quarter turn would
# make the boxes of round cells too large, so there is none. Scale 0.5 to 1.5 is what lets the station
# live with a diameter that is only estimated.
AUGMENTATION: Final = {
    "mosaic": 1.0,
    "scale": 0.5,
    "translate": 0.1,
    "degrees": 0.0,
    "flipud": 0.5,
    "fliplr": 0.5,
    "hsv_h": 0.03,
    "hsv_s": 0.6,
    "hsv_v": 0.3,
    "mixup": 0.0,
}


# The last part of the epochs shows photographs as the station does: whole, with grey around them. Two
# cells in five are cut by the border of these photographs, and a mosaic shows other cells beyond it. From
# the same weights, 14 such epochs took RBC AP50-95 from 0.821 to 0.827 and platelets from 0.886 to 0.895.
WHOLE_SHARE: Final = 0.4


# Shares of the training images. What is no blood must not be learned from its absence alone.
BURNED_IN: Final = 0.08
SURROUNDED: Final = 0.03
EMPTY: Final = 0.02

# A window cuts cells. Of a cell that shows less than this share of its box, the window shows too little.
_LEAST_SEEN: Final = 0.1


class ScaledDataset(YOLODataset):  # type: ignore[misc]
    """ultralytics' dataset without its resizing to ``imgsz``. Training images are varied."""

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[UInt8, tuple[int, int], tuple[int, int]]:
        """Returns image uint8 (H, W, 3) BGR and its (H, W) twice: nothing is resized."""
        del rect_mode, resize_short
        if self.ims[i] is None:
            self.ims[i] = cv2.imread(self.im_files[i])
        image: UInt8 = self.ims[i]
        if self.augment:
            # Mosaic keeps a buffer of recent images to draw its other three from.
            self.buffer.append(i)
            if len(self.buffer) > self.max_buffer_length:
                self.buffer.pop(0)
        return image, image.shape[:2], image.shape[:2]

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """Returns image and boxes. In training: a window of at most ``imgsz``, varied."""
        if not self.augment:
            label: dict[str, Any] = super().get_image_and_label(index)
            return label
        image, (height, width), _ = self.load_image(index)
        own = self.labels[index]
        half, centre = own["bboxes"][:, 2:] / 2, own["bboxes"][:, :2]
        xyxy = np.concatenate([centre - half, centre + half], axis=1) * [width, height, width, height]
        image, boxes, seen = _window(image, xyxy.astype(np.float32), self.imgsz, random)  # type: ignore[arg-type]
        image, boxes, kept = _shown(image, boxes, random)  # type: ignore[arg-type]  # seeded by ultralytics
        seen &= kept
        height, width = image.shape[:2]
        corners = boxes[seen] / np.array([width, height, width, height], np.float32)
        shown: dict[str, Any] = self.update_labels_info(
            {
                "im_file": own["im_file"],
                "img": image,
                "cls": own["cls"][seen],
                "bboxes": np.concatenate(
                    [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1
                ),
                "segments": [],
                "keypoints": None,
                "normalized": True,
                "bbox_format": "xywh",
                "ori_shape": (height, width),
                "resized_shape": (height, width),
                "ratio_pad": (1.0, 1.0),
            }
        )
        return shown


def _window(image: UInt8, xyxy: Float32, side: int, rng: random.Random) -> tuple[UInt8, Float32, Bool]:
    """Cuts a random window out of an image that is larger: image, boxes in it, and which of them it shows."""
    height, width = image.shape[:2]
    x, y = (rng.randint(0, max(0, length - side)) for length in (width, height))
    window = image[y : y + side, x : x + side]
    limit = np.array([window.shape[1], window.shape[0]] * 2, np.float32)
    boxes = np.clip(xyxy - np.array([x, y] * 2, np.float32), 0, limit).astype(np.float32)
    area, whole = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, xyxy))
    return window, boxes, np.asarray(area > _LEAST_SEEN * whole, np.bool_)


def _shown(image: UInt8, xyxy: Float32, rng: random.Random) -> tuple[UInt8, Float32, Bool]:
    """Varies a window, and shows in some what is no blood: image, boxes, and which are still seen."""
    seen = np.ones(len(xyxy), np.bool_)
    if rng.random() < EMPTY:
        image, seen = augment.empty_glass(image.shape[0], image.shape[1], rng), ~seen
    image = augment.vary(image, rng)
    if rng.random() < BURNED_IN:
        image = augment.burned_in(image, rng)
    if rng.random() < SURROUNDED:
        image, xyxy, lit = augment.surrounded(image, xyxy, rng)
        seen &= lit
    return image, xyxy, seen


class QuickModel(DetectionModel):  # type: ignore[misc]
    """YOLOv5n that calculates in half precision (bfloat16) while it is trained on a processor.

    An epoch takes half the time on processors that know this format. Weights, losses and everything outside
    training stay in single precision.
    """

    def predict(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the network, as `DetectionModel.predict`."""
        if not (self.training and x.device.type == "cpu"):
            return super().predict(x, *args, **kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            return _single(super().predict(x.contiguous(memory_format=torch.channels_last), *args, **kwargs))


def _single(value: Any) -> Any:
    """Turns every tensor of nested lists and dicts into single precision: losses need it."""
    if isinstance(value, dict):
        return {k: _single(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_single(v) for v in value)
    return value.float() if isinstance(value, torch.Tensor) else value


class DetectorTrainer(DetectionTrainer):  # type: ignore[misc]
    """ultralytics' trainer with our dataset, and with the COCO weights loaded into the model."""

    coco_weights: Path | None = None

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> ScaledDataset:
        """Builds the dataset of one split. Validation in rectangular batches, as the station sees it."""
        return ScaledDataset(
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=mode != "train",
            cache=None,
            stride=32,
            pad=0.0 if mode == "train" else 0.5,
            prefix=f"{mode}: ",
            task="detect",
            data=self.data,
            fraction=1.0,
        )

    def get_model(
        self, cfg: str | None = None, weights: torch.nn.Module | None = None, verbose: bool = True
    ) -> DetectionModel:
        """Builds YOLOv5n. On a fresh run with the COCO tensors, on a resumed one with the checkpoint's."""
        model = self.set_model_names_for_load(
            QuickModel(cfg or "yolov5n.yaml", nc=self.data["nc"], ch=self.data["channels"], verbose=verbose)
        )
        if weights is not None:
            model.load(weights)
        elif self.coco_weights is not None:
            networks.load_coco(model, self.coco_weights)
        return model.to(memory_format=torch.channels_last)


def _keep(trainer: DetectionTrainer, *, keep: Path) -> None:
    """Copies the last checkpoint atomically: ultralytics writes it in place, and a kill may cut it."""
    temporary = keep.with_suffix(".tmp")
    shutil.copyfile(trainer.last, temporary)
    temporary.replace(keep)


def train(options: DetectorOptions) -> Path:
    """Trains, or continues an earlier run with the same options.

    Args:
        options: The run. Written to ``config.json`` in its folder.

    Returns:
        The best checkpoint by ultralytics' fitness on the validation split.

    Raises:
        UnavailableError: If the dataset or the weights are not there.
        UsageError: If the folder holds a run with other options, or the weights do not fit.
    """
    data = (options.dataset / "detector" / "data.yaml").resolve()
    if not data.is_file():
        raise UnavailableError(f"{data}: no such file", "make the dataset first: python -m rbc_train dataset")
    manifest = sha256(options.dataset / "manifest.json")
    runs.claim(
        options.out,
        {
            **asdict(options),
            "augmentation": {
                **AUGMENTATION,
                "whole_share": WHOLE_SHARE,
                "burned_in": BURNED_IN,
                "surrounded": SURROUNDED,
                "empty": EMPTY,
            },
            "dataset_manifest": manifest,
        },
    )
    overrides: dict[str, Any] = {
        "model": "yolov5n.yaml",
        "data": str(data),
        "epochs": options.epochs,
        "batch": options.batch,
        "imgsz": options.image_px,
        "seed": options.seed,
        "device": options.device,
        "workers": options.workers,
        "project": str(options.out.resolve()),
        "name": "ultralytics",
        "exist_ok": True,
        "pretrained": False,
        "amp": False,  # its self-test downloads a model
        "plots": False,
        "cache": False,
        "deterministic": True,
        # What ultralytics' "auto" chooses for a run of this length, written down so that it stays.
        "optimizer": "AdamW",
        "lr0": 0.0015,
        "momentum": 0.9,
        "lrf": 0.01,
        "cos_lr": True,
        "close_mosaic": round(WHOLE_SHARE * options.epochs),
        **AUGMENTATION,
    }
    return run(DetectorTrainer, overrides, options.out, options.weights, options.threads)


def run(
    trainer_class: type[DetectorTrainer],
    overrides: dict[str, Any],
    out: Path,
    weights: Path | None,
    threads: int,
) -> Path:
    """Runs ultralytics' training in a folder of ours. A kill at any moment costs one epoch at most.

    Args:
        trainer_class: Gives dataset and model.
        overrides: ultralytics' settings for a fresh run.
        out: Folder of the run, claimed by the caller.
        weights: COCO-pretrained YOLOv5n. None starts from noise.
        threads: Of torch on the CPU.

    Returns:
        ``detector.pt``, the best checkpoint by ultralytics' fitness. At once if the run is finished.
    """
    done, kept = out / CHECKPOINT, out / "resume.pt"
    if done.is_file():
        return done
    best = out / "ultralytics" / "weights" / "best.pt"
    if kept.is_file():
        if torch_load(kept, map_location="cpu")["epoch"] + 1 >= overrides["epochs"]:
            # Cut after the last epoch: there is nothing to resume, which ultralytics refuses.
            return _finish(best, done)
        overrides = {"resume": str(kept), **{k: overrides[k] for k in ("device", "workers")}}
    runs.keep_memory()
    trainer = trainer_class(overrides=overrides)
    torch.set_num_threads(threads)  # after the trainer is made, which sets a number of its own
    trainer.coco_weights = weights
    trainer.add_callback("on_model_save", partial(_keep, keep=kept))
    trainer.train()
    return _finish(trainer.best, done)


def _finish(best: Path, done: Path) -> Path:
    """Copies the best checkpoint atomically to where a finished run has it."""
    shutil.copyfile(best, done.with_suffix(".tmp"))
    return done.with_suffix(".tmp").replace(done)

"""Training of the detector: the COCO weights really get in, nothing is resized, a cut run goes on."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.vision import image_file  # before ultralytics
from rbc_train import train_detector
from rbc_train.train_detector import DetectorOptions


class CutError(Exception):
    """Stands for a kill."""


@pytest.fixture
def options(dataset: Path, tmp_path: Path) -> DetectorOptions:
    return DetectorOptions(dataset, None, tmp_path / "run", epochs=1, batch=2, image_px=64, threads=1)


def test_the_dataset_resizes_nothing(dataset: Path) -> None:
    images = sorted((dataset / "detector/images/train").iterdir())
    stand_in = SimpleNamespace(
        ims=[None] * len(images),
        im_files=[str(i) for i in images],
        augment=False,
        buffer=[],
        max_buffer_length=2,
    )
    for i, file in enumerate(images):
        image, original, now = train_detector.ScaledDataset.load_image(stand_in, i)  # type: ignore[arg-type]
        np.testing.assert_array_equal(image, np.asarray(cv2.imread(str(file))))
        assert original == now == image.shape[:2]
        assert max(image.shape) > 64


def test_training_images_are_varied_and_the_kept_ones_are_not(dataset: Path) -> None:
    images = sorted((dataset / "detector/images/train").iterdir())
    stand_in = SimpleNamespace(
        ims=[None], im_files=[str(images[0])], augment=True, buffer=[], max_buffer_length=2
    )
    plain = np.asarray(cv2.imread(str(images[0])))
    seen: list[Any] = [train_detector.ScaledDataset.load_image(stand_in, 0)[0] for _ in range(8)]  # type: ignore[arg-type]
    assert len({s.tobytes() for s in seen}) > 4
    np.testing.assert_array_equal(stand_in.ims[0], plain)
    assert stand_in.buffer == [0, 0]  # no longer than asked


def test_what_is_missing_is_named(options: DetectorOptions, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="make the dataset first"):
        train_detector.train(replace(options, dataset=tmp_path / "none"))


def test_missing_weights_are_said_before_anything_is_trained(
    options: DetectorOptions, tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match="no such file"):
        train_detector.train(replace(options, weights=tmp_path / "none.safetensors"))
    assert not (options.out / "resume.pt").exists()


def test_a_run_trains_is_cut_and_goes_on(options: DetectorOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs on four drawn photographs, cut after the first."""
    options = replace(options, epochs=2)
    real = train_detector._keep
    kept_epochs: list[int] = []

    def keep_then_cut(trainer: Any, *, keep: Path) -> None:
        real(trainer, keep=keep)
        kept_epochs.append(trainer.epoch)
        raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(train_detector, "_keep", keep_then_cut)
        with pytest.raises(CutError):
            train_detector.train(options)
    assert kept_epochs == [0]
    assert not (options.out / "detector.pt").exists()

    def keep(trainer: Any, *, keep: Path) -> None:
        kept_epochs.append(trainer.epoch)
        real(trainer, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr(train_detector, "_keep", keep)
        checkpoint = train_detector.train(options)
    assert kept_epochs == [0, 1]  # the first epoch is not trained again
    assert checkpoint == options.out / "detector.pt"
    state = torch.load(checkpoint, weights_only=False)
    network = state["ema"] if state["ema"] is not None else state["model"]
    assert network.model[-1].nc == 3
    config = json.loads((options.out / "config.json").read_text())
    assert (config["epochs"], config["image_px"]) == (2, 64)
    assert config["augmentation"]["degrees"] == 0.0
    assert len(config["dataset_manifest"]) == 64
    before = checkpoint.read_bytes()
    assert train_detector.train(options).read_bytes() == before  # finished: not again
    with pytest.raises(UsageError, match="has other options"):
        train_detector.train(replace(options, seed=5))


def test_what_is_no_image_stays_so_after_ultralytics_was_imported() -> None:
    """Which puts a function of its own in the place of Pillow's, for the whole process."""
    with pytest.raises(ImageError) as caught:
        image_file.decode(b"text", "x")
    assert caught.value.reason == "not-an-image"

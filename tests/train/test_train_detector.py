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
from ultralytics.nn.tasks import DetectionModel

from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.vision import image_file  # before ultralytics
from rbc_train import augment, networks, train_detector
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


def read_one(image: Path, boxes: Any, side: int, *, augment: bool = True) -> Any:
    """What the trainer gets of an image with boxes (xywh, shares of the image)."""
    stand_in = SimpleNamespace(
        ims=[None], im_files=[str(image)], augment=augment, buffer=[], max_buffer_length=2, imgsz=side,
        labels=[{"im_file": str(image), "bboxes": boxes, "cls": np.arange(len(boxes))[:, None]}],
        update_labels_info=lambda label: label,
    )  # fmt: skip
    whole = train_detector.ScaledDataset
    stand_in.load_image = lambda i: whole.load_image(stand_in, i)  # type: ignore[arg-type]
    return stand_in, lambda: whole.get_image_and_label(stand_in, 0)  # type: ignore[arg-type]


def test_training_images_are_varied_and_the_kept_ones_are_not(dataset: Path) -> None:
    images = sorted((dataset / "detector/images/train").iterdir())
    plain = np.asarray(cv2.imread(str(images[0])))
    stand_in, read = read_one(images[0], np.zeros((0, 4)), 999)
    seen = [read()["img"] for _ in range(8)]
    assert len({s.tobytes() for s in seen}) > 4
    assert {s.shape for s in seen} == {plain.shape}
    np.testing.assert_array_equal(stand_in.ims[0], plain)
    assert stand_in.buffer == [0, 0]  # no longer than asked


def test_of_a_large_image_a_random_window_is_shown_with_its_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pixel of a box is 200, and no other."""
    for share in ("BURNED_IN", "SURROUNDED", "EMPTY"):
        monkeypatch.setattr(train_detector, share, 0.0)
    monkeypatch.setattr(augment, "vary", lambda image, _rng: image)
    image = np.zeros((120, 200, 3), np.uint8)
    image[20:60, 30:80] = image[70:110, 120:190] = 200
    cv2.imwrite(str(tmp_path / "i.png"), image)
    boxes = np.array([[55 / 200, 40 / 120, 50 / 200, 40 / 120], [155 / 200, 90 / 120, 70 / 200, 40 / 120]])
    _, read = read_one(tmp_path / "i.png", boxes, 96)
    shown = [read() for _ in range(40)]
    assert {one["img"].shape for one in shown} == {(96, 96, 3)}
    assert len({one["img"].tobytes() for one in shown}) > 10
    assert {len(one["cls"]) for one in shown} >= {1, 2}
    for one in shown:
        covered = np.zeros((96, 96), np.bool_)
        for x, y, width, height in one["bboxes"] * 96:
            covered[
                round(y - height / 2) : round(y + height / 2), round(x - width / 2) : round(x + width / 2)
            ] = True
        missed = (one["img"][:, :, 0] > 0) & ~covered
        assert not (covered & (one["img"][:, :, 0] == 0)).any()
        assert missed.sum() <= 0.1 * 40 * 70  # a sliver of a cell is none


def test_some_training_images_show_no_blood(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sorted((dataset / "detector/images/train").iterdir())[0]
    monkeypatch.setattr(train_detector, "EMPTY", 1.0)
    _, read = read_one(image, np.array([[0.5, 0.5, 0.2, 0.2]]), 999)
    assert all(len(read()["cls"]) == 0 for _ in range(4))


def test_half_precision_is_for_training_alone() -> None:
    torch.manual_seed(0)
    model = train_detector.QuickModel("yolov5n.yaml", nc=3, verbose=False)
    pixels = torch.rand(2, 3, 64, 64)
    precise = model.train()(pixels)["scores"]
    assert precise.dtype == torch.float32
    plain = DetectionModel.predict(model, pixels)["scores"]
    assert not torch.equal(precise, plain)
    assert float((precise - plain).detach().abs().mean()) < 0.2
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(pixels)[0], DetectionModel.predict(model, pixels)[0])


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


def test_a_run_cut_after_its_last_epoch_is_finished(
    options: DetectorOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(_best: Path, _done: Path) -> Path:
        raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(train_detector, "_finish", cut)
        with pytest.raises(CutError):
            train_detector.train(options)
    assert not (options.out / "detector.pt").exists()
    assert networks.load_detector(train_detector.train(options)).model[-1].nc == 3


def test_what_is_no_image_stays_so_after_ultralytics_was_imported() -> None:
    """Which puts a function of its own in the place of Pillow's, for the whole process."""
    with pytest.raises(ImageError) as caught:
        image_file.decode(b"text", "x")
    assert caught.value.reason == "not-an-image"

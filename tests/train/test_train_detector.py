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
from safetensors.torch import save_file

from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.vision import image_file  # before ultralytics
from rbc_train import networks, train_detector
from rbc_train.train_detector import DetectorOptions


class CutError(Exception):
    """Stands for a kill."""


@pytest.fixture
def options(dataset: Path, tmp_path: Path) -> DetectorOptions:
    return DetectorOptions(dataset, None, tmp_path / "run", epochs=1, batch=2, image_px=64, threads=1)


@pytest.fixture(scope="module")
def yolo() -> torch.nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model: torch.nn.Module = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    return model


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a COCO file would hold: 342 tensors of backbone and neck, in half precision, all sevens."""
    own = [(k, v) for k, v in model.state_dict().items() if not k.startswith("model.24.")]
    assert len(own) >= networks.N_COCO_TENSORS
    return {k: torch.full_like(v, 7).half() for k, v in own[: networks.N_COCO_TENSORS]}


def test_coco_weights_get_into_the_model(yolo: torch.nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "coco.safetensors"
    given = tensors(yolo)
    other = {"head.weight": torch.zeros(3), "model.0.conv.bias": torch.zeros(1)}  # what does not fit is left
    save_file({**given, **other}, file)
    before = {k: v.clone() for k, v in yolo.state_dict().items()}
    networks.load_coco(yolo, file)
    for name, tensor in yolo.state_dict().items():
        assert tensor.dtype == before[name].dtype
        if name in given:
            assert (tensor == 7).all(), name
        else:
            assert torch.equal(tensor, before[name]), name
    yolo.load_state_dict(before)


@pytest.mark.parametrize("damage", ["one missing", "another shape", "other names", "not there"])
def test_weights_that_do_not_fit_are_refused(yolo: torch.nn.Module, tmp_path: Path, damage: str) -> None:
    """ultralytics would train from noise and say nothing."""
    file = tmp_path / "coco.safetensors"
    given = tensors(yolo)
    first = next(iter(given))
    if damage == "one missing":
        del given[first]
    elif damage == "another shape":
        given[first] = torch.zeros(1, 2, 3)
    elif damage == "other names":
        given = {f"net.{k}": v for k, v in given.items()}
    if damage != "not there":
        save_file(given, file)
    before = {k: v.clone() for k, v in yolo.state_dict().items()}
    kind, message = (
        (UnavailableError, "no such file") if damage == "not there" else (UsageError, "of 342 tensors fit")
    )
    with pytest.raises(kind, match=message):
        networks.load_coco(yolo, file)
    assert all(torch.equal(v, before[k]) for k, v in yolo.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_file_that_is_no_weights_is_an_error_of_ours(
    yolo: torch.nn.Module, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "coco.safetensors"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=str(file)):
        networks.load_coco(yolo, file)


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


def test_a_missing_detector_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="python -m rbc_train detector"):
        networks.load_detector(tmp_path / "detector.pt")


def test_a_detector_checkpoint_is_read(tmp_path: Path) -> None:
    """ultralytics keeps the running mean under `ema`, or, stripped, the network under `model`."""
    network = torch.nn.Linear(2, 3)
    for state in ({"ema": None, "model": network}, {"ema": network, "model": None}):
        torch.save(state, tmp_path / "detector.pt")
        loaded = networks.load_detector(tmp_path / "detector.pt")
        assert torch.equal(loaded.weight, network.weight)

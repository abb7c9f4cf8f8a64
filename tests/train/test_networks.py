"""The networks: their layers and scores, and the weights that really get in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from ultralytics.nn.tasks import DetectionModel

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import SHAPES
from rbc_edge.vision import preprocess
from rbc_train import networks
from rbc_train.networks import ModelName


@pytest.mark.parametrize("model", ["base", "improved", "station", "teacher"])
@pytest.mark.parametrize("n", [1, 3])
def test_networks_give_a_logit_a_crop(model: ModelName, n: int) -> None:
    network = networks.build(model).eval()
    crops = np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3)).astype(np.uint8)
    ours = model not in networks.PAPER
    logits = network(networks.to_input(crops))
    assert logits.shape == ((n, 2 + len(SHAPES)) if ours else (n,))
    assert networks.overlap_logits(logits).shape == (n,)
    scores = networks.predict(network, crops)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    both = networks.predict_both(network, crops)
    np.testing.assert_array_equal(both[:, 0], scores)
    assert (both[:, 1] > 0).all() if ours else (both[:, 1] == 0).all()
    assert networks.predict(network, crops[:0]).shape == (0,)


def test_the_paper_s_network_has_its_layers() -> None:
    """Two convolutions of 32 and 64, two poolings, then fully connected (paper, step 3)."""
    sizes = [tuple(p.shape) for p in networks.build("base").parameters()]
    assert sizes[0] == (32, 3, 3, 3)
    assert sizes[2] == (64, 32, 3, 3)
    assert sizes[4][1] == 64 * 16 * 16
    dropouts = [m.p for m in networks.build("improved").modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert all(p == 0.5 for p in dropouts)


def test_input_is_rgb_planes_in_0_to_1() -> None:
    crops = np.zeros((1, preprocess.CROP_PX, preprocess.CROP_PX, 3), np.uint8)
    crops[0, 0, 1] = (255, 51, 0)
    planes = networks.to_input(crops)
    assert planes.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(planes[0, :, 0, 1], [1.0, 0.2, 0.0], atol=1e-6)
    assert float(planes.sum()) == pytest.approx(1.2)


def test_stages_begin_from_a_detector() -> None:
    torch.manual_seed(1)
    detector = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    network = networks.StagesNet(depth=7, dropout=0.0)
    network.begin_from(detector)
    trained = detector.model[:7].state_dict()
    assert network.stages.state_dict().keys() == trained.keys()
    assert all(torch.equal(v, trained[k]) for k, v in network.stages.state_dict().items())


@pytest.fixture(scope="module")
def yolo() -> torch.nn.Module:
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

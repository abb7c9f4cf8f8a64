from pathlib import Path

import pytest
import torch

from bench.rival import agreement, dequantized
from rbc_edge.vision.bundle import DETECTOR, TEST_INPUT, Bundle

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"


def test_the_rebuilt_network_sees_what_the_bundle_sees() -> None:
    bundle = Bundle.open()
    network = dequantized(bundle.path / DETECTOR)
    images = [bundle.path / TEST_INPUT]
    assert agreement(network, bundle, images) > 0.9
    with torch.no_grad():  # the right weights in the wrong order
        weights = network.state_dict()["model.3.conv.weight"]
        weights.copy_(weights.flip(0))
    assert agreement(network, bundle, images) < 0.5


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="has no weights that fit"):
        dequantized(TOY / DETECTOR)

"""Tells for each red cell how likely it lies overlapping: crops in, scores out."""

import numpy as np

from rbc_edge.bundle import CLASSIFIER, Bundle
from rbc_edge.values import Float32, UInt8

_BATCH = 256
"""Crops a run: bounds the memory of a 20-megapixel field."""


class Classifier:
    """The overlap CNN of a bundle, on the CPU.

    Args:
        bundle: The bundle.
        threads: Threads inside one operator.
    """

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self.threshold = bundle.manifest.overlap_threshold
        self.margin = bundle.manifest.crop_margin
        self._session = bundle.session(CLASSIFIER, threads=1)

    def overlap_score(self, crops: UInt8) -> Float32:
        """Scores crops.

        Args:
            crops: uint8 (N, 64, 64, 3) RGB, cut with the bundle's margin; N may be 0.

        Returns:
            float32 (N,): probability that the cell in the middle is overlapping.
        """
        scores = [
            self._session.run(["overlap_score"], {"crops": crops[i : i + _BATCH]})[0]
            for i in range(0, len(crops), _BATCH)
        ]
        return np.concatenate([np.zeros(0, np.float32), *scores]).astype(np.float32)

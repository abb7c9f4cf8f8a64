"""The second stage: is each box one red cell, and does it overlap another? Crops in, scores out."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from rbc_edge.values import Bool, Float32, UInt8
from rbc_edge.vision.bundle import CLASSIFIER, Bundle

_BATCH = 32  # crops in one run: bounds memory, and gives each thread a part of a large field


class CropScores(NamedTuple):
    """What the network says of N crops."""

    overlap: Float32  # (N,), probability that the cell in the middle is overlapping
    refuse: Float32  # (N,), probability that the box holds no single red cell


class Classifier:
    """The CNN of a bundle (`file`: int8 or fp32) that judges the detector's red cells, on the CPU.

    `threads` batches of a large field's crops are scored at the same time. The methods may be called from as
    many threads as well.
    """

    def __init__(self, bundle: Bundle, *, threads: int, file: str = CLASSIFIER) -> None:
        self.threshold = bundle.manifest.overlap_threshold
        self.margin = bundle.manifest.crop_margin
        self._refuse_threshold = bundle.manifest.refuse_threshold
        self._session = bundle.session(file, threads=1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rbc-edge-crops") if threads > 1 else None

    def scores(self, crops: UInt8) -> CropScores:
        """Scores crops, uint8 (N, 64, 64, 3) RGB, cut with the bundle's margin."""
        batches = [crops[i : i + _BATCH] for i in range(0, len(crops), _BATCH)]
        in_order = map if self._pool is None or len(batches) < 2 else self._pool.map
        names = ["overlap_score", "refuse_score"]
        found = in_order(lambda batch: self._session.run(names, {"crops": batch}), batches)
        none = np.zeros(0, np.float32)
        overlap, refuse = zip((none, none), *found, strict=True)
        return CropScores(*(np.concatenate(each).astype(np.float32) for each in (overlap, refuse)))

    def overlap_score(self, crops: UInt8) -> Float32:
        """Returns only the overlap scores, float32 (N,), for boxes that are known to be red cells."""
        return self.scores(crops).overlap

    def refuses(self, refuse_score: Float32) -> Bool:
        """Tells which boxes are not one red cell: bool of the same shape. NaN is not refused.

        A score of 1 is possible: a sigmoid in float32 gets there. So a threshold of 1 is not compared with.
        """
        if self._refuse_threshold >= 1:
            return np.zeros(refuse_score.shape, np.bool_)
        return np.asarray(refuse_score >= self._refuse_threshold, np.bool_)

"""Scores how likely each red cell overlaps another: crops in, scores out."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rbc_edge.values import Float32, UInt8
from rbc_edge.vision.bundle import CLASSIFIER, Bundle

_BATCH = 32  # crops in one run: bounds memory, and gives each thread a part of a large field


class Classifier:
    """The overlap CNN of a bundle (`file`: int8 or fp32), on the CPU.

    `threads` batches of a large field's crops are scored at the same time. `overlap_score` may be called from
    as many threads as well.
    """

    def __init__(self, bundle: Bundle, *, threads: int, file: str = CLASSIFIER) -> None:
        self.threshold = bundle.manifest.overlap_threshold
        self.margin = bundle.manifest.crop_margin
        self._session = bundle.session(file, threads=1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rbc-edge-crops") if threads > 1 else None

    def overlap_score(self, crops: UInt8) -> Float32:
        """Returns float32 (N,): probability that the cell in the middle of each crop is overlapping.

        `crops` are uint8 (N, 64, 64, 3) RGB, cut with the bundle's margin.
        """
        batches = [crops[i : i + _BATCH] for i in range(0, len(crops), _BATCH)]
        in_order = map if self._pool is None or len(batches) < 2 else self._pool.map
        scores = in_order(lambda batch: self._session.run(["overlap_score"], {"crops": batch})[0], batches)
        return np.concatenate([np.zeros(0, np.float32), *scores]).astype(np.float32)

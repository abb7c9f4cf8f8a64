"""The second stage: is each box one red cell, does it overlap, what shape has it? Crops in, scores out."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from rbc_edge.errors import BundleError
from rbc_edge.values import SHAPES, Bool, Float32, Int64, Shape, UInt8
from rbc_edge.vision.bundle import CLASSIFIER, Bundle
from rbc_edge.vision.morphology import N_SIGNS

_LEAST_SHAPE_SCORE = 1e-6  # a probability of 0 has no logarithm
_BATCH = 32  # crops in one run: bounds memory, and gives each thread a part of a large field


class CropScores(NamedTuple):
    """What the network says of N crops. NaN where it was not asked."""

    overlap: Float32  # (N,), probability that the cell in the middle is overlapping
    refuse: Float32  # (N,), probability that the box holds no single red cell
    shape: Float32  # (N, S), probability of each of the bundle's shapes. S = 0: it knows none

    def take(self, index: Int64 | Bool) -> "CropScores":
        """Returns the scores that `index` (int64 (M,) or bool (N,)) names, in that order."""
        return CropScores(*(each[index] for each in self))

    @classmethod
    def joined(cls, parts: Sequence["CropScores"]) -> "CropScores":
        """Returns the scores of all parts, at least one, in their order."""
        return cls(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def shape_columns(shape_score: Float32, signs: Float32) -> Float32:
    """Returns what a manifest's `shape_weights` are for, at the station as in training.

    Of scores float32 (N, S) and signs float32 (N, `morphology.N_SIGNS`): float32 (N, S + signs + 1), log
    probabilities, signs, and 1.
    """
    said = np.log(np.maximum(shape_score, _LEAST_SHAPE_SCORE))
    return np.concatenate([said, signs, np.ones((len(said), 1), np.float32)], axis=1)


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
        self.n_shapes = len(bundle.manifest.shapes)
        if unknown := set(bundle.manifest.shapes) - set(SHAPES):
            what = f"{bundle.path}: this version knows no shape {min(unknown)!r}"
            raise BundleError(what, "use the rbc-edge version that the bundle was made for")
        self._shape_numbers = np.array([SHAPES.index(Shape(s)) for s in bundle.manifest.shapes], np.int64)
        self._shape_threshold = bundle.manifest.shape_threshold
        self._shape_weights = np.array(bundle.manifest.shape_weights, np.float32)
        fits = self.n_shapes + N_SIGNS + 1, self.n_shapes
        if self._shape_weights.size and self._shape_weights.shape != fits:
            raise BundleError(f"{bundle.path}: the weights of shapes have another size than {fits}")
        self._outputs = ["overlap_score", "refuse_score", *["shape_score"][: self.n_shapes]]
        self._takes_sides = "sides" in {given.name for given in self._session.get_inputs()}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rbc-edge-crops") if threads > 1 else None

    def scores(self, crops: UInt8, sides: Float32 | None = None) -> CropScores:
        """Scores crops.

        Args:
            crops: uint8 (N, 64, 64, 3) RGB, cut with the bundle's margin.
            sides: float32 (N, 2), width and height of their boxes in diameters of a red cell. Only shapes
                depend on them. None: shapes are not asked for.
        """
        if sides is None:
            sides = np.ones((len(crops), 2), np.float32)
        batches = [slice(i, i + _BATCH) for i in range(0, len(crops), _BATCH)]
        in_order = map if self._pool is None or len(batches) < 2 else self._pool.map

        def run(batch: slice) -> CropScores:
            inputs = {"crops": crops[batch]} | ({"sides": sides[batch]} if self._takes_sides else {})
            overlap, refuse, *shape = self._session.run(self._outputs, inputs)
            return CropScores(overlap, refuse, *(shape or [np.zeros((len(overlap), 0), np.float32)]))

        return CropScores.joined([self.unasked(0), *in_order(run, batches)])

    def unasked(self, n: int) -> CropScores:
        """Returns what is known of `n` boxes before they are judged: NaN."""
        return CropScores(*(np.full((n, *s), np.nan, np.float32) for s in ((), (), (self.n_shapes,))))

    def overlap_score(self, crops: UInt8) -> Float32:
        """Returns only the overlap scores, float32 (N,), for boxes that are known to be red cells."""
        return self.scores(crops).overlap

    def informed(self, shape_score: Float32, signs: Float32) -> Float32:
        """Brings together what the network says of shapes and what was measured.

        Args:
            shape_score: float32 (N, S), as `scores` gives them.
            signs: float32 (N, `morphology.N_SIGNS`). NaN: not measured, so nothing changes.

        Returns:
            float32 (N, S), probability of each shape.
        """
        is_known = ~np.isnan(shape_score).any(axis=1) & np.isfinite(signs).all(axis=1)
        if not self._shape_weights.size or not is_known.any():
            return shape_score
        logits = shape_columns(shape_score[is_known], signs[is_known]) @ self._shape_weights
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        known = shape_score.copy()
        known[is_known] = odds / odds.sum(axis=1, keepdims=True)
        return known

    def shapes(self, shape_score: Float32) -> tuple[Int64, Float32, Bool]:
        """Names the most probable shapes, from float32 (N, S) as `scores` gives them.

        Returns for N cells the index into `values.SHAPES`, -1 where the score is NaN or S = 0, its
        probability, and whether that reaches the bundle's bound.
        """
        n = len(shape_score)
        if not self.n_shapes:
            return np.full(n, -1, np.int64), np.full(n, np.nan, np.float32), np.zeros(n, np.bool_)
        best = np.asarray(shape_score.argmax(axis=1), np.int64)
        score = shape_score[np.arange(n), best]
        shape = np.where(np.isnan(score), -1, self._shape_numbers[best])
        # NaN compares false.
        return shape, score, np.asarray(score >= self._shape_threshold, np.bool_)

    def refuses(self, refuse_score: Float32) -> Bool:
        """Tells which boxes are not one red cell: bool of the same shape. NaN is not refused.

        A score of 1 is possible: a sigmoid in float32 gets there. So a threshold of 1 is not compared with.
        """
        if self._refuse_threshold >= 1:
            return np.zeros(refuse_score.shape, np.bool_)
        return np.asarray(refuse_score >= self._refuse_threshold, np.bool_)

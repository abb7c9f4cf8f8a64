"""The values that travel through the pipeline: frozen, checked where they are made, no I/O.

There is one coordinate frame: pixels of the field of view, after EXIF rotation. Boxes are xyxy with x to the
right, y down, and the far edge exclusive. N = 0 cells is legal everywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class CellClass(IntEnum):
    """The detector's classes. The number is the bundle's class index."""

    RBC = 0
    WBC = 1
    PLATELET = 2


class Label(StrEnum):
    """Names of cells in the tables."""

    RBC_SINGLE = "rbc_single"
    RBC_OVERLAPPING = "rbc_overlapping"
    WBC = "wbc"
    PLATELET = "platelet"


class Shape(StrEnum):
    """Shapes of red cells, in the words of the collection that taught them (Chula RBC-12)."""

    NORMAL = "normal"
    MACROCYTE = "macrocyte"
    MICROCYTE = "microcyte"
    SPHEROCYTE = "spherocyte"
    TARGET = "target"
    STOMATOCYTE = "stomatocyte"
    OVALOCYTE = "ovalocyte"
    TEARDROP = "teardrop"
    BURR = "burr"
    SCHISTOCYTE = "schistocyte"
    UNCATEGORISED = "uncategorised"
    HYPOCHROMIC = "hypochromic"
    ELLIPTOCYTE = "elliptocyte"


SHAPES: Final = tuple(Shape)
"""Shapes by number: `Morphology.shape` is an index into it. Append only, because ledgers keep the numbers."""


class ScaleSource(StrEnum):
    """Where the cell diameter came from (column ``scale_source``)."""

    CELL_DIAMETER = "cell-diameter"  # the user gave it in pixels
    UM_PER_PX = "um-per-px"  # the user gave micrometres per pixel
    METADATA = "metadata"  # the file says micrometres per pixel, and the estimate agrees
    SLIDE = "estimated-slide"  # estimated from the slide's fields
    FIELD = "estimated-field"  # this field disagrees with its slide: estimated from the field alone
    NONE = "none"  # nothing to measure: no red cell found


def _check(name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: Sequence[int | None]) -> None:
    """Raises ValueError unless `array` has `dtype` and `shape` (None: any length)."""
    if array.dtype != dtype:
        raise ValueError(f"{name}: dtype {array.dtype}, expected {np.dtype(dtype)}")
    if array.ndim != len(shape) or any(w not in (None, s) for s, w in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{name}: shape {array.shape}, expected {shape}")


@dataclass(frozen=True, slots=True)
class InboxFile:
    """One image file, as the scan found it."""

    path: Path  # absolute. Opens the file even where its name is not UTF-8.
    slide_id: str  # as text: bytes that are not UTF-8 as ``\xNN``
    fov: str  # its name within the slide, as text. Unique there.
    size_bytes: int
    mtime_ns: int  # time of last change, since 1970
    page: int = 0  # of a file of which each page is a field, from 1. 0: the file is one field.
    n_pages: int = 1  # of these fields in the file

    def pages(self, n: int) -> "list[InboxFile]":
        """Returns each of a file's `n` pages as a field, or the file itself where it is one field."""
        if n == 1:
            return [self]
        return [replace(self, fov=f"{self.fov}#{i}", page=i, n_pages=n) for i in range(1, n + 1)]

    @property
    def whole(self) -> "InboxFile":
        """The file, whichever of its pages this is: what gave `pages`."""
        return replace(self, fov=self.fov.rpartition("#")[0], page=0, n_pages=1) if self.page else self


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a red cell is in the field of view.

    Attributes:
        cell_diameter_px: Diameter of a red cell in pixels of the field of view, > 0. NaN when unknown.
        source: Where the number came from.
    """

    cell_diameter_px: float
    source: ScaleSource


@dataclass(frozen=True, slots=True)
class Measure:
    """What one field says about the scale of its slide.

    Attributes:
        cell_diameter_px: Diameter of its red cells in pixels. NaN when it shows none.
        n_cells: So many were measured.
        n_pixels: Size of the field.
    """

    cell_diameter_px: float
    n_cells: int
    n_pixels: int


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An image file's pixels: all of them, or fewer where its cells are large."""

    pixels: UInt8  # (h, w, 3), RGB, upright
    width_px: int  # of the image in the file, upright
    height_px: int
    # 1, 2, 4 or 8: so many pixels of the image are one of `pixels`, in width and in height. A last column or
    # row that is not full counts as one.
    reduction: int = 1
    file: bytes = b""  # the file's bytes where `reduction` is not 1, to decode the image in full later

    def __post_init__(self) -> None:
        shape = (math.ceil(self.height_px / self.reduction), math.ceil(self.width_px / self.reduction), 3)
        _check("pixels", self.pixels, np.uint8, shape)

    @classmethod
    def of(cls, pixels: UInt8) -> "Decoded":
        """Returns uint8 (H, W, 3) RGB as all of an image's pixels."""
        _check("pixels", pixels, np.uint8, (None, None, 3))
        return cls(pixels, pixels.shape[1], pixels.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class FieldOfView:
    """One decoded camera image."""

    slide_id: str
    fov: str  # its name within the slide
    sha256: str  # hex digest of the file's bytes, with the number of the page (`image_file.content_id`)
    decoded: Decoded
    captured_at: str = ""  # ISO 8601, or empty when the file does not say
    um_per_px: float = math.nan  # what the file says of its pixels on the slide. NaN: it does not say

    @classmethod
    def of(cls, image: UInt8, *, slide_id: str = "", fov: str = "") -> "FieldOfView":
        """Returns uint8 (H, W, 3) RGB as a field of view."""
        return cls(slide_id, fov, "", Decoded.of(image))

    @property
    def width_px(self) -> int:
        """Width of the camera's image: boxes are in its pixels, however it was decoded."""
        return self.decoded.width_px

    @property
    def height_px(self) -> int:
        """Height of the camera's image."""
        return self.decoded.height_px

    @property
    def image(self) -> UInt8:
        """The camera's image, uint8 (height_px, width_px, 3), RGB.

        Raises `ValueError` where it was decoded at a part of its size. See `image_file.full_size`.
        """
        if self.decoded.reduction != 1:
            raise ValueError(f"{self.fov}: decoded at 1/{self.decoded.reduction} of its size")
        return self.decoded.pixels


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Boxes with scores, as the detector gives them."""

    xyxy: Float32  # (N, 4), pixels of the field of view
    score: Float32  # (N,), 0..1
    class_id: Int64  # (N,), values of `CellClass`

    def __post_init__(self) -> None:
        _check("xyxy", self.xyxy, np.float32, (None, 4))
        _check("score", self.score, np.float32, (len(self.xyxy),))
        _check("class_id", self.class_id, np.int64, (len(self.xyxy),))

    def __len__(self) -> int:
        return len(self.xyxy)

    @classmethod
    def empty(cls) -> "Detections":
        """Returns detections with N = 0."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Detections"]) -> "Detections":
        """Returns the detections of all parts, at least one, in their order."""
        names = ("xyxy", "score", "class_id")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def take(self, index: Int64 | Bool) -> "Detections":
        """Returns the detections that `index` (int64 (M,) or bool (N,)) names, in that order."""
        return Detections(self.xyxy[index], self.score[index], self.class_id[index])


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a field of view.

    Attributes:
        box: Left, top, right and bottom, pixels of the field of view.
        label: Its name in the tables.
        score: The detector's score, 0..1.
        overlap_score: Probability that the red cell overlaps another, 0..1. None for other cells.
        group: Number of its group of overlapping cells in this field. 0 for a cell in no group.
        touches_edge: Whether the image border cuts it.
        shape: Its most probable shape. None: not looked at.
    """

    box: tuple[float, float, float, float]
    label: Label
    score: float
    overlap_score: float | None
    group: int
    touches_edge: bool
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many cells a field (or a slide) shows. Counts are of cells, never of groups."""

    n_rbc_single: int = 0
    n_rbc_overlapping: int = 0
    n_wbc: int = 0
    n_platelets: int = 0

    @property
    def n_rbc(self) -> int:
        """All red cells: single plus overlapping, always."""
        return self.n_rbc_single + self.n_rbc_overlapping

    @property
    def overlap_fraction(self) -> float | None:
        """Overlapping share of the red cells, 0..1. None without red cells."""
        return self.n_rbc_overlapping / self.n_rbc if self.n_rbc else None


@dataclass(frozen=True, slots=True, eq=False)
class Morphology:
    """What is known of the form of N cells, whether it may be relied on or not.

    Attributes:
        shape: int64 (N,), the most probable shape, as index into `SHAPES`. -1: not looked at.
        shape_score: float32 (N,), its probability. NaN where there is none.
        shape_sure: bool (N,), whether the probability reaches the bundle's bound.
        area_px: float32 (N,), area inside the outline, pixels of the field of view. NaN: not measured.
        aspect_ratio: float32 (N,), longer over shorter side of the outline, >= 1. NaN: not measured.
        circularity: float32 (N,), 4 pi area / perimeter^2, 1 for a disc. NaN: not measured.
        pallor: float32 (N,), share of the area that is pale, 0..1. NaN: not measured.
    """

    shape: Int64
    shape_score: Float32
    shape_sure: Bool
    area_px: Float32
    aspect_ratio: Float32
    circularity: Float32
    pallor: Float32

    def __post_init__(self) -> None:
        n = len(self.shape)
        _check("shape", self.shape, np.int64, (n,))
        _check("shape_sure", self.shape_sure, np.bool_, (n,))
        for name in ("shape_score", "area_px", "aspect_ratio", "circularity", "pallor"):
            _check(name, getattr(self, name), np.float32, (n,))

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, index: Int64 | Bool) -> "Morphology":
        """Returns that of the cells that `index` (int64 (M,) or bool (N,)) names, in that order."""
        return Morphology(*(getattr(self, each.name)[index] for each in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["Morphology"]) -> "Morphology":
        """Returns that of all parts, at least one, in their order."""
        return cls(*(np.concatenate([getattr(p, each.name) for p in parts]) for each in fields(cls)))

    @classmethod
    def unknown(cls, n: int) -> "Morphology":
        """Returns that of `n` cells of which nothing is known."""
        nan = (np.full(n, math.nan, np.float32) for _ in range(5))
        return cls(np.full(n, -1, np.int64), next(nan), np.zeros(n, np.bool_), *nan)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Classified detections of one field of view, as arrays. Iterating gives each `Cell`.

    Attributes:
        detections: N boxes, sorted by box centre in reading order (y, then x) so that tables are stable.
        overlap_score: float32 (N,), probability that the red cell is overlapping. NaN for other classes.
        overlapping: bool (N,), the verdict. False for other classes.
        group: int64 (N,), 1..G numbers the groups of overlapping cells, 0 for a cell in no group.
        touches_edge: bool (N, 4), whether the box reaches the left, top, right, bottom image border.
        morphology: Of the N cells. By default nothing is known.
    """

    detections: Detections
    overlap_score: Float32
    overlapping: Bool
    group: Int64
    touches_edge: Bool
    morphology: Morphology = field(default_factory=lambda: Morphology.unknown(0))

    def __post_init__(self) -> None:
        n = len(self.detections)
        if len(self.morphology) == 0:
            object.__setattr__(self, "morphology", Morphology.unknown(n))
        _check("morphology", self.morphology.shape, np.int64, (n,))
        _check("overlap_score", self.overlap_score, np.float32, (n,))
        _check("overlapping", self.overlapping, np.bool_, (n,))
        _check("group", self.group, np.int64, (n,))
        _check("touches_edge", self.touches_edge, np.bool_, (n, 4))

    def __len__(self) -> int:
        return len(self.detections)

    @classmethod
    def empty(cls) -> "Cells":
        """Returns a field without cells."""
        none = Detections.empty()
        return cls(none, none.score, np.zeros(0, np.bool_), none.class_id, np.zeros((0, 4), np.bool_))

    def take(self, index: Int64 | Bool) -> "Cells":
        """Returns the cells that `index` (int64 (M,) or bool (N,)) names, in that order."""
        return Cells(
            self.detections.take(index),
            self.overlap_score[index],
            self.overlapping[index],
            self.group[index],
            self.touches_edge[index],
            self.morphology.take(index),
        )

    def label(self, i: int) -> Label:
        """Returns the table's label of cell `i`."""
        red = Label.RBC_OVERLAPPING if self.overlapping[i] else Label.RBC_SINGLE
        return (red, Label.WBC, Label.PLATELET)[self.detections.class_id[i]]

    def __getitem__(self, i: int) -> Cell:
        """Returns cell `i`, counted from the end where it is negative."""
        found, overlap_score = self.detections, float(self.overlap_score[i])
        x0, y0, x1, y1 = found.xyxy[i].tolist()
        return Cell(
            (x0, y0, x1, y1),
            self.label(i),
            float(found.score[i]),
            None if math.isnan(overlap_score) else overlap_score,
            int(self.group[i]),
            bool(self.touches_edge[i].any()),
            SHAPES[shape] if (shape := int(self.morphology.shape[i])) >= 0 else None,
        )

    def __iter__(self) -> Iterator[Cell]:
        return (self[i] for i in range(len(self)))

    def counts(self, keep: Bool | slice = slice(None)) -> Counts:
        """Counts all cells, or those where `keep`, bool (N,), is true."""
        class_id = self.detections.class_id[keep]
        n_rbc, n_wbc, n_platelets = (int(np.count_nonzero(class_id == kind)) for kind in CellClass)
        red = class_id == CellClass.RBC
        n_overlapping = int(np.count_nonzero(red & self.overlapping[keep]))
        return Counts(n_rbc - n_overlapping, n_overlapping, n_wbc, n_platelets)


@dataclass(frozen=True, slots=True, eq=False)
class FovResult:
    """What the analyzer found in one field of view.

    Attributes:
        width_px: Width of the image, after EXIF rotation.
        height_px: Height of the image, after EXIF rotation.
        scale: The scale the cells were found at.
        cells: Every cell, whatever the edge rule.
        quality_flags: Stable words, sorted, for the ``quality_flags`` column.
        timings_ms: Wall time by stage, e.g. ``{"decode": 2.1, "detect": 5.0}``.
        n_refused: Boxes of the detector that hold no single red cell. They are not among the cells.
    """

    width_px: int
    height_px: int
    scale: Scale
    cells: Cells
    quality_flags: tuple[str, ...] = ()
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    n_refused: int = 0

    @property
    def flags(self) -> tuple[str, ...]:
        """The quality flags."""
        return self.quality_flags

    @property
    def counts(self) -> Counts:
        """Counts of all cells, those at the image border included."""
        return self.cells.counts()

    @property
    def n_rbc(self) -> int:
        """Red cells: single plus overlapping, always."""
        return self.counts.n_rbc

    @property
    def n_rbc_single(self) -> int:
        """Red cells with background all around them."""
        return self.counts.n_rbc_single

    @property
    def n_rbc_overlapping(self) -> int:
        """Red cells that lie over, under or against another cell."""
        return self.counts.n_rbc_overlapping

    @property
    def n_wbc(self) -> int:
        """White cells."""
        return self.counts.n_wbc

    @property
    def n_platelets(self) -> int:
        """Platelets."""
        return self.counts.n_platelets

"""Drawn blood smears: fields of view whose truth is known exactly.

The demo shows the program on them and the tests draw from them. A field is laid out as convex outlines
first (exact geometry, from which the truth follows) and rendered second: every cell adds its absorbance,
so light is transmitted as Beer and Lambert have it, ``I = I0 * 10**-A`` (here with base e), and two cells
over each other are darker than one.

The truth is unambiguous to a careful person: two cells are either clearly apart (`MIN_GAP` of a diameter
or more, background is visible between) or lie clearly over each other (`MIN_OVERLAP` to `MAX_OVERLAP`);
nothing in between is drawn. All randomness comes from the generator that is passed in.

Coordinates: pixels of the field of view, x to the right, y down; pixel (i, j) covers the square from
(j, i) to (j + 1, i + 1), so outlines and boxes are continuous and the far edge is exclusive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, CellClass, Counts, Float32, Int64, UInt8

MIN_GAP: Final = 0.08
"""Cells that do not overlap are at least this far apart, as a share of the red cell's diameter, and never
less than `MIN_GAP_PX`."""
MIN_GAP_PX: Final = 3.0
"""What a camera needs to show background between two small cells."""
MIN_OVERLAP: Final = 0.08
"""Cells that overlap do so at least this deep, as a share of the red cell's diameter."""
MAX_OVERLAP: Final = 0.40
"""Cells that overlap do so at most this deep, as a share of the red cell's diameter."""
MIN_VISIBLE: Final = 0.25
"""A red cell that the border cuts shows at least this share of its area."""
_MIN_VISIBLE_WBC: Final = 0.60  # less, and the nucleus that makes it a white cell may lie outside

_VERTICES: Final = 72
_ANGLES: Final = np.arange(_VERTICES) * (2 * np.pi / _VERTICES)
_PRESSED: Final = 0.5
_TRIES: Final = 300  # places tried for one cell before the field counts as full


@dataclass(frozen=True, slots=True)
class Stain:
    """What a stain, a lamp and a camera make of blood.

    Attributes:
        background: RGB of the empty slide at the brightest place, 0..255.
        red: Absorbance (natural log, per RGB channel) of a red cell at its rim.
        cytoplasm: Absorbance of a white cell's cytoplasm.
        nucleus: Absorbance of a white cell's nucleus.
        platelet: Absorbance of a platelet's granules.
        pallor: How pale the red cells' centre is, 0 (not at all) to 1 (as the background).
        variation: Relative standard deviation of the absorbance from cell to cell.
    """

    background: tuple[float, float, float]
    red: tuple[float, float, float]
    cytoplasm: tuple[float, float, float]
    nucleus: tuple[float, float, float]
    platelet: tuple[float, float, float]
    pallor: float
    variation: float


# The numbers were measured on photographs of three laboratories (medians of background and cells).
GREY: Final = Stain(
    (212, 215, 209),
    (0.15, 0.33, 0.22),
    (0.15, 0.30, 0.03),
    (0.80, 1.10, 0.03),
    (0.42, 0.52, 0.05),
    0.52,
    0.14,
)
"""Greenish-grey light, dusky red cells, violet nuclei."""
CREAM: Final = Stain(
    (254, 233, 205),
    (0.33, 0.46, 0.28),
    (0.24, 0.34, 0.10),
    (1.15, 1.75, 0.42),
    (0.50, 0.75, 0.20),
    0.52,
    0.06,
)
"""Warm cream light, pinkish-grey red cells, dark blue nuclei."""
ROSE: Final = Stain(
    (222, 187, 174),
    (0.40, 0.58, 0.25),
    (0.16, 0.26, 0.15),
    (0.95, 2.10, 0.55),
    (0.40, 0.65, 0.30),
    0.30,
    0.08,
)
"""Rose light, grey-violet red cells with little pallor, purple nuclei."""


@dataclass(frozen=True, slots=True, eq=False)
class DrawnField:
    """A drawn field of view and its truth; cells in reading order (by box centre, y, then x).

    Attributes:
        image: uint8 (H, W, 3), RGB.
        xyxy: float32 (N, 4), pixels of the field; the box of the outline, cut at the image border.
        class_id: int64 (N,), values of `CellClass`.
        overlapping: bool (N,), whether the red cell overlaps another cell; False for other classes.
        group: int64 (N,), 1..G numbers the groups of overlapping cells, 0 for a cell in no group. A white
            cell has a group when a red cell overlaps it.
        outlines: N arrays, each float32 (V, 2): the convex outline as x, y, not cut at the border.
        cell_diameter_px: Mean diameter of the slide's red cells, the scale.
    """

    image: UInt8
    xyxy: Float32
    class_id: Int64
    overlapping: Bool
    group: Int64
    outlines: tuple[Float32, ...]
    cell_diameter_px: float

    @property
    def counts(self) -> Counts:
        """The field's true counts."""
        red = self.class_id == CellClass.RBC
        return Counts(
            n_rbc_single=int((red & ~self.overlapping).sum()),
            n_rbc_overlapping=int((red & self.overlapping).sum()),
            n_wbc=int((self.class_id == CellClass.WBC).sum()),
            n_platelets=int((self.class_id == CellClass.PLATELET).sum()),
        )


def draw_field(
    rng: np.random.Generator,
    *,
    width_px: int = 640,
    height_px: int = 480,
    cell_diameter_px: float = 60.0,
    n_single: int = 14,
    group_sizes: Sequence[int] = (2, 2, 3),
    n_wbc: int = 1,
    n_wbc_overlapped: int = 0,
    n_platelets: int = 2,
    stain: Stain = GREY,
    illumination: float = 0.12,
    noise: float = 1.5,
    blur_px: float = 0.8,
) -> DrawnField:
    """Draws one field of view with exactly the cells asked for.

    Args:
        rng: Source of all randomness; the same state gives the same field.
        width_px: Width of the image.
        height_px: Height of the image.
        cell_diameter_px: Mean diameter of a red cell, at least 12 px.
        n_single: Red cells that lie alone.
        group_sizes: Sizes (2 or more) of the groups of overlapping red cells.
        n_wbc: White cells, those of `n_wbc_overlapped` among them.
        n_wbc_overlapped: White cells with one red cell partly over them; that red cell counts besides
            `n_single` and `group_sizes`.
        n_platelets: Platelets; they lie apart from every cell.
        stain: Colours.
        illumination: Share of the light that is lost at the darkest corner, 0..1.
        noise: Standard deviation of the noise in bright places, grey levels; falls with the light as shot
            noise does.
        blur_px: Standard deviation of the optics' blur.

    Returns:
        The field and its truth.

    Raises:
        ValueError: An argument is out of range, or the cells find no room in the field.
    """
    _check_arguments(
        width_px,
        height_px,
        cell_diameter_px,
        group_sizes=group_sizes,
        n_wbc=n_wbc,
        n_wbc_overlapped=n_wbc_overlapped,
    )
    layout = _Layout(rng, width_px, height_px, cell_diameter_px)
    complete = layout.fill(n_single, group_sizes, n_wbc, n_wbc_overlapped, n_platelets)
    if not complete:
        raise ValueError(
            f"no room for these cells of {cell_diameter_px:g} px in {width_px}x{height_px} px: "
            "draw fewer or smaller cells, or a larger field"
        )
    return _render(rng, layout, stain=stain, illumination=illumination, noise=noise, blur_px=blur_px)


def draw_slide(
    rng: np.random.Generator,
    n_fields: int,
    *,
    width_px: int = 640,
    height_px: int = 480,
    cell_diameter_px: float = 60.0,
    crowding: float = 0.22,
    overlap_fraction: float = 0.35,
    wbc_per_field: float = 0.6,
    platelets_per_field: float = 1.5,
    stain: Stain = GREY,
    illumination: float = 0.12,
    noise: float = 1.5,
    blur_px: float = 0.8,
) -> list[DrawnField]:
    """Draws the fields of one slide: same stain, lamp and scale, other cells in each.

    Args:
        rng: Source of all randomness.
        n_fields: How many fields.
        width_px: Width of each image.
        height_px: Height of each image.
        cell_diameter_px: Mean diameter of a red cell.
        crowding: Share of the field that red cells cover on average, 0..0.5. Cells for which a field is
            too full are left out: of the image and of the truth.
        overlap_fraction: Share of the red cells that overlap, on average, 0..1.
        wbc_per_field: Mean number of white cells; every third has a red cell over it.
        platelets_per_field: Mean number of platelets.
        stain: As in `draw_field`, like `illumination`, `noise` and `blur_px`.
        illumination: See `draw_field`.
        noise: See `draw_field`.
        blur_px: See `draw_field`.

    Returns:
        `n_fields` fields.

    Raises:
        ValueError: An argument is out of range.
    """
    _check_arguments(width_px, height_px, cell_diameter_px)
    if not 0 <= crowding <= 0.5:
        raise ValueError(f"crowding {crowding:g} is not within 0..0.5")
    if not 0 <= overlap_fraction <= 1:
        raise ValueError(f"overlap_fraction {overlap_fraction:g} is not within 0..1")
    mean_rbc = crowding * width_px * height_px / (math.pi / 4 * cell_diameter_px**2)
    fields = []
    for _ in range(n_fields):
        n_rbc = int(rng.poisson(mean_rbc))
        n_wbc = int(rng.poisson(wbc_per_field))
        n_wbc_overlapped = int(rng.binomial(n_wbc, 1 / 3))
        group_sizes: list[int] = []
        while sum(group_sizes) + 1 < n_rbc * overlap_fraction:
            group_sizes.append(int(rng.choice((2, 2, 2, 3, 3, 4))))
        layout = _Layout(rng, width_px, height_px, cell_diameter_px)
        layout.fill(
            max(0, n_rbc - sum(group_sizes)),
            group_sizes,
            n_wbc,
            n_wbc_overlapped,
            int(rng.poisson(platelets_per_field)),
        )
        fields.append(
            _render(rng, layout, stain=stain, illumination=illumination, noise=noise, blur_px=blur_px)
        )
    return fields


def _check_arguments(
    width_px: int,
    height_px: int,
    cell_diameter_px: float,
    *,
    group_sizes: Sequence[int] = (),
    n_wbc: int = 0,
    n_wbc_overlapped: int = 0,
) -> None:
    """Raises ValueError for what cannot be drawn."""
    if width_px < 1 or height_px < 1:
        raise ValueError(f"a field of {width_px}x{height_px} px has no area")
    if not cell_diameter_px >= 12:  # also refuses NaN
        raise ValueError(f"cell_diameter_px {cell_diameter_px:g} is below 12 px, too small to draw a cell")
    if any(size < 2 for size in group_sizes):
        raise ValueError(f"group_sizes {tuple(group_sizes)}: a group has two cells or more")
    if n_wbc_overlapped > n_wbc:
        raise ValueError(f"n_wbc_overlapped {n_wbc_overlapped} is more than n_wbc {n_wbc}")


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """A convex outline in polar form around `centre`.

    Attributes:
        class_id: What it is.
        centre: x, y in pixels of the field.
        radius_px: float64 (V,), radius at the angles 2 pi i / V.
        group: 0 for a cell in no group.
    """

    class_id: CellClass
    centre: tuple[float, float]
    radius_px: np.ndarray[tuple[int], np.dtype[np.float64]]
    group: int = 0

    @property
    def outline(self) -> Float32:
        """The polygon, float32 (V, 2)."""
        x = self.centre[0] + self.radius_px * np.cos(_ANGLES)
        y = self.centre[1] + self.radius_px * np.sin(_ANGLES)
        return np.stack([x, y], axis=1).astype(np.float32)


def _radius(
    rng: np.random.Generator, mean_px: float, wobble: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns the radii (V,) of a convex, slightly elliptic and irregular outline.

    With ``r = R (1 + sum a_k cos(k t + p_k))`` the outline is convex while ``sum |a_k| (k^2 - 1) < 1``
    (to first order); at wobble 1 the sum is at most 0.74.
    """
    radius = np.ones(_VERTICES)
    for k, most in ((2, 0.095), (3, 0.022), (4, 0.010), (5, 0.0055)):
        amplitude = wobble * most * rng.uniform(0.2, 1.0)
        radius += amplitude * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi))
    return mean_px * radius


def _depth_px(a: Float32, b: Float32) -> tuple[float, Float32]:
    """Returns how deep two convex outlines overlap, px, and the lens they share, float32 (M, 2).

    The depth is the lens's smaller side; 0 and an empty lens where the outlines do not meet.
    """
    area, vertices = cv2.intersectConvexConvex(a, b)
    if area <= 0 or vertices is None or len(vertices) < 3:
        return 0.0, np.zeros((0, 2), np.float32)
    lens = np.asarray(vertices, np.float32).reshape(-1, 2)
    return float(min(cv2.minAreaRect(lens)[1])), lens


def _gap_px(a: Float32, b: Float32) -> float:
    """Returns the distance of two convex outlines that do not meet: it lies at a vertex of one of them."""
    return min(_vertex_gap(a, b), _vertex_gap(b, a))


def _vertex_gap(points: Float32, outline: Float32) -> float:
    """Returns the least distance from `points` (P, 2) to the edges of `outline` (V, 2)."""
    start = outline[None]
    edge = np.roll(outline, -1, axis=0)[None] - start
    to_point = points[:, None] - start
    t = np.clip((to_point * edge).sum(2) / np.maximum((edge * edge).sum(2), 1e-12), 0, 1)
    return float(np.sqrt(((to_point - t[..., None] * edge) ** 2).sum(2).min()))


class _Layout:
    """Cells placed by rejection: each new outline is clearly apart from, or clearly over, every other."""

    def __init__(
        self, rng: np.random.Generator, width_px: int, height_px: int, cell_diameter_px: float
    ) -> None:
        self.width_px = width_px
        self.height_px = height_px
        self.cell_diameter_px = cell_diameter_px
        self.shapes: list[_Shape] = []
        self.outlines: list[Float32] = []
        self._rng = rng
        self._n_groups = 0
        self._border = np.array([[0, 0], [width_px, 0], [width_px, height_px], [0, height_px]], np.float32)

    def fill(
        self, n_single: int, group_sizes: Sequence[int], n_wbc: int, n_wbc_overlapped: int, n_platelets: int
    ) -> bool:
        """Places the cells, the bulky ones first; returns whether all found room."""
        kinds: list[list[Callable[[], bool]]] = [
            [partial(self._group, (CellClass.WBC, CellClass.RBC))] * n_wbc_overlapped,
            [partial(self._group, (CellClass.RBC,) * size) for size in sorted(group_sizes, reverse=True)],
            [partial(self._alone, CellClass.WBC)] * (n_wbc - n_wbc_overlapped),
            [partial(self._alone, CellClass.RBC)] * n_single,
            [partial(self._alone, CellClass.PLATELET)] * n_platelets,
        ]
        # Where one cell found no room the next of its kind hardly would: stop there, try the next kind.
        full = [kind for kind in kinds if not all(place() for place in kind)]
        return not full

    def _new_radius(self, class_id: CellClass) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        radius_px = self.cell_diameter_px / 2
        match class_id:
            case CellClass.RBC:
                size = float(np.clip(self._rng.normal(1.0, 0.06), 0.85, 1.15))
                return _radius(self._rng, radius_px * size, 1.0)
            case CellClass.WBC:
                return _radius(self._rng, radius_px * self._rng.uniform(1.5, 1.9), 0.5)
            case CellClass.PLATELET:
                return _radius(self._rng, radius_px * self._rng.uniform(0.22, 0.35), 1.2)

    def _alone(self, class_id: CellClass) -> bool:
        for _ in range(_TRIES):
            radius_px = self._new_radius(class_id)
            reach = float(radius_px.max())
            shape = _Shape(
                class_id,
                (
                    float(self._rng.uniform(-reach, self.width_px + reach)),
                    float(self._rng.uniform(-reach, self.height_px + reach)),
                ),
                radius_px,
            )
            outline = shape.outline
            if self._seen(shape, outline) and self._fits(shape, outline):
                self.shapes.append(shape)
                self.outlines.append(outline)
                return True
        return False

    def _group(self, classes: Sequence[CellClass]) -> bool:
        """Places one connected group, all of it or nothing."""
        before = len(self.shapes)
        self._n_groups += 1
        for _ in range(_TRIES // 10):
            if self._alone(classes[0]):
                self.shapes[-1] = _Shape(
                    classes[0], self.shapes[-1].centre, self.shapes[-1].radius_px, self._n_groups
                )
                if all(self._attach(class_id, before) for class_id in classes[1:]):
                    return True
            del self.shapes[before:], self.outlines[before:]
        self._n_groups -= 1
        return False

    def _attach(self, class_id: CellClass, first: int) -> bool:
        """Places a cell over one of the group's cells, which are those from index `first` on."""
        for _ in range(_TRIES // 10):
            partner = self.shapes[int(self._rng.integers(first, len(self.shapes)))]
            radius_px = self._new_radius(class_id)
            direction = float(self._rng.uniform(0, 2 * np.pi))
            depth_px = self._rng.uniform(1.3 * MIN_OVERLAP, 0.95 * MAX_OVERLAP) * self.cell_diameter_px
            i = round(direction / (2 * np.pi) * _VERTICES) % _VERTICES
            distance = partner.radius_px[i] + radius_px[(i + _VERTICES // 2) % _VERTICES] - depth_px
            shape = _Shape(
                class_id,
                (
                    partner.centre[0] + float(distance) * math.cos(direction),
                    partner.centre[1] + float(distance) * math.sin(direction),
                ),
                radius_px,
                self._n_groups,
            )
            outline = shape.outline
            if self._seen(shape, outline) and self._fits(shape, outline):
                self.shapes.append(shape)
                self.outlines.append(outline)
                return True
        return False

    def _seen(self, shape: _Shape, outline: Float32) -> bool:
        """Whether the image shows enough of the shape to call it a cell of the field."""
        low, high = outline.min(axis=0), outline.max(axis=0)
        if low.min() >= 0 and high[0] <= self.width_px and high[1] <= self.height_px:
            return True
        if shape.class_id == CellClass.PLATELET:
            return False  # a cut platelet is a speck
        visible, _ = cv2.intersectConvexConvex(outline, self._border)
        least = MIN_VISIBLE if shape.class_id == CellClass.RBC else _MIN_VISIBLE_WBC
        return bool(visible >= least * cv2.contourArea(outline))

    def _fits(self, shape: _Shape, outline: Float32) -> bool:
        """Whether the shape is clearly apart from every cell, or clearly over cells of its own group."""
        gap_px = max(MIN_GAP * self.cell_diameter_px, MIN_GAP_PX)
        reach = float(shape.radius_px.max())
        for other, other_outline in zip(self.shapes, self.outlines, strict=True):
            distance = math.dist(shape.centre, other.centre)
            if distance >= reach + float(other.radius_px.max()) + gap_px:
                continue
            same_group = shape.group != 0 and shape.group == other.group
            if not same_group and distance < float(shape.radius_px.min() + other.radius_px.min()):
                return False  # the quick answer; the exact one follows
            depth_px, lens = _depth_px(outline, other_outline)
            if not len(lens):
                if _gap_px(outline, other_outline) < gap_px:
                    return False
                continue
            if not same_group or not self._clear(depth_px, lens):
                return False
        return True

    def _clear(self, depth_px: float, lens: Float32) -> bool:
        """Whether an overlap is deep enough to see, in the image, and leaves both cells to be seen."""
        if depth_px > MAX_OVERLAP * self.cell_diameter_px:
            return False
        seen_px, _ = _depth_px(lens, self._border)
        return seen_px >= MIN_OVERLAP * self.cell_diameter_px


# ---------------------------------------------------------------- light


def _render(
    rng: np.random.Generator,
    layout: _Layout,
    *,
    stain: Stain,
    illumination: float,
    noise: float,
    blur_px: float,
) -> DrawnField:
    """Turns a layout into a picture and its truth."""
    h, w = layout.height_px, layout.width_px
    absorbance = np.zeros((h, w, 3), np.float32)
    edge_px = max(0.7, 0.018 * layout.cell_diameter_px)
    for shape in layout.shapes:
        match shape.class_id:
            case CellClass.RBC:
                _add_red(rng, absorbance, shape, stain, edge_px)
            case CellClass.WBC:
                _add_white(rng, absorbance, shape, stain, edge_px)
            case CellClass.PLATELET:
                _add_platelet(rng, absorbance, shape, stain, edge_px)

    # Plasma and dust: a mottled background, far fainter than any cell.
    mottle = rng.normal(0, 1, (h // 40 + 3, w // 40 + 3)).astype(np.float32)
    absorbance += 0.006 * cv2.resize(mottle, (w, h), interpolation=cv2.INTER_CUBIC)[..., None]

    transmitted = np.exp(-absorbance)
    transmitted *= _illumination(rng, w, h, illumination)[..., None]
    if blur_px > 0:
        transmitted = np.asarray(cv2.GaussianBlur(transmitted, (0, 0), blur_px), np.float32)
    picture = transmitted * (np.asarray(stain.background, np.float32) / np.float32(255))
    if noise > 0:
        # Shot noise grows with the root of the light; demosaicking and JPEG smear it over neighbours.
        white = rng.standard_normal((h, w, 3), np.float32)
        grain = np.asarray(cv2.GaussianBlur(white, (0, 0), 0.6), np.float32)
        grain *= np.sqrt(transmitted)
        picture += grain * np.float32(noise / 0.47 / 255)  # the blur left 0.47 of the deviation
    image = cv2.convertScaleAbs(np.maximum(picture, 0), alpha=255.0)
    return _truth(layout, np.asarray(image, np.uint8))


def _truth(layout: _Layout, image: UInt8) -> DrawnField:
    """Returns the field with its cells in reading order."""
    n = len(layout.shapes)
    limits = np.array([layout.width_px, layout.height_px], np.float32)
    xyxy = np.zeros((n, 4), np.float32)
    for i, outline in enumerate(layout.outlines):
        xyxy[i, :2] = np.clip(outline.min(axis=0), 0, limits)
        xyxy[i, 2:] = np.clip(outline.max(axis=0), 0, limits)
    class_id = np.array([s.class_id for s in layout.shapes], np.int64)
    group = np.array([s.group for s in layout.shapes], np.int64)
    order = np.lexsort((xyxy[:, 0] + xyxy[:, 2], xyxy[:, 1] + xyxy[:, 3]))
    return DrawnField(
        image=image,
        xyxy=xyxy[order],
        class_id=class_id[order],
        overlapping=((group > 0) & (class_id == CellClass.RBC))[order],
        group=group[order],
        outlines=tuple(layout.outlines[i] for i in order),
        cell_diameter_px=layout.cell_diameter_px,
    )


def _illumination(rng: np.random.Generator, w: int, h: int, fall_off: float) -> Float32:
    """Returns the lamp's light, float32 (H, W), 1 at the brightest place, 1 - fall_off at the darkest."""
    x = np.linspace(-1, 1, w, dtype=np.float32)[None]
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    cx, cy = rng.uniform(-0.45, 0.45, 2).astype(np.float32)
    slope = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    loss = (x - cx) ** 2 + (y - cy) ** 2 + slope[0] * x + slope[1] * y
    loss -= loss.min()
    return np.asarray(1 - fall_off * loss / max(float(loss.max()), 1e-6), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Patch:
    """The part of the field that a shape covers, in the shape's own coordinates.

    Attributes:
        where: Rows and columns of the field.
        dx: float32 (h, w), pixels from the centre, to the right.
        dy: float32 (h, w), pixels from the centre, down.
        rho: float32 (h, w), distance from the centre over the outline's radius: 1 on the outline.
        inside: float32 (h, w), 1 inside, 0 outside, one half on the outline.
    """

    where: tuple[slice, slice]
    dx: Float32
    dy: Float32
    rho: Float32
    inside: Float32


def _patch(absorbance: Float32, shape: _Shape, edge_px: float) -> _Patch:
    """Returns the shape's patch; the edge rises over `edge_px` to either side of the outline."""
    h, w = absorbance.shape[:2]
    reach = float(shape.radius_px.max()) * 1.15 + 3 * edge_px
    x0, x1 = max(0, int(shape.centre[0] - reach)), min(w, int(shape.centre[0] + reach) + 1)
    y0, y1 = max(0, int(shape.centre[1] - reach)), min(h, int(shape.centre[1] + reach) + 1)
    dx, dy = np.meshgrid(
        np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - shape.centre[0]),
        np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - shape.centre[1]),
    )
    distance, angle = cv2.cartToPolar(dx, dy)
    # A fine table of radii instead of an interpolation for each pixel.
    closed = np.append(shape.radius_px, shape.radius_px[0])
    fine = np.interp((np.arange(1024) + 0.5) * (_VERTICES / 1024), np.arange(_VERTICES + 1), closed)
    radius = fine.astype(np.float32)[(angle * np.float32(1024 / (2 * np.pi))).astype(np.int32) & 1023]
    rho = distance / radius
    inside = _rise((radius - distance) / np.float32(edge_px))
    return _Patch((slice(y0, y1), slice(x0, x1)), dx, dy, rho, inside)


def _rise(x: Float32) -> Float32:
    """Smooth step: 0 below -1, 1 above 1, one half at 0."""
    t = np.clip(x * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _blobs(rng: np.random.Generator, patch: _Patch, grain_px: float) -> Float32:
    """Returns smooth noise, float32 (h, w), mean near 0, deviation near 1 and grains of `grain_px`."""
    h, w = patch.rho.shape
    small = rng.standard_normal((max(2, int(h / grain_px) + 2), max(2, int(w / grain_px) + 2)), np.float32)
    return np.asarray(cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC), np.float32)


def _add(absorbance: Float32, patch: _Patch, density: Float32, colour: tuple[float, float, float]) -> None:
    """Adds density (h, w) times colour to the field's absorbance."""
    absorbance[patch.where] += density[..., None] * np.asarray(colour, np.float32)


def _add_red(
    rng: np.random.Generator, absorbance: Float32, shape: _Shape, stain: Stain, edge_px: float
) -> None:
    """A biconcave disc: a paler centre, a plateau, a slightly darker rim, a thin bright line around."""
    patch = _patch(absorbance, shape, edge_px)
    radius_px = float(shape.radius_px.mean())
    strength = float(np.clip(rng.normal(1, stain.variation), 0.6, 1.5))
    pallor = float(np.clip(rng.normal(stain.pallor, 0.4 * stain.pallor), 0, 0.8))
    width = rng.uniform(0.34, 0.60)
    shift = rng.normal(0, 0.05, 2) * radius_px  # the dimple is rarely quite in the middle
    centre_rho = np.hypot(patch.dx - np.float32(shift[0]), patch.dy - np.float32(shift[1])) / np.float32(
        radius_px
    )
    dimple = np.exp(-((centre_rho / np.float32(width)) ** 2.6))
    rim = np.exp(-(((patch.rho - np.float32(0.86)) / np.float32(0.11)) ** 2))
    body = 1 - np.float32(pallor) * dimple + np.float32(rng.uniform(0.04, 0.16)) * rim
    body *= 1 + 0.035 * _blobs(rng, patch, 0.35 * radius_px)
    # The bright line that refraction draws around a cell (Becke line).
    halo = np.exp(-(((patch.rho - np.float32(1.06)) / np.float32(0.035)) ** 2)) * (1 - patch.inside)
    density = np.float32(strength) * body * patch.inside
    # Cells that dried over each other are pressed thinner where they cross: photographs show the lens
    # darker than either cell, but not by the whole of the other.
    under = np.clip(absorbance[patch.where][..., 1] / np.float32(stain.red[1]), 0, 1)
    density *= 1 - np.float32(_PRESSED) * under
    density -= np.float32(0.06) * halo * (1 - under)
    tint = rng.normal(1, 0.025, 3)
    _add(absorbance, patch, density, (stain.red[0] * tint[0], stain.red[1] * tint[1], stain.red[2] * tint[2]))


def _add_white(
    rng: np.random.Generator, absorbance: Float32, shape: _Shape, stain: Stain, edge_px: float
) -> None:
    """Granular cytoplasm with a round or lobed, mottled nucleus."""
    patch = _patch(absorbance, shape, 1.3 * edge_px)
    radius_px = float(shape.radius_px.mean())
    granules = np.maximum(_blobs(rng, patch, max(2.0, 0.06 * radius_px)), -1)
    cytoplasm = (1 + 0.15 * granules + 0.12 * _blobs(rng, patch, 0.3 * radius_px)) * patch.inside
    _add(absorbance, patch, cytoplasm, stain.cytoplasm)

    n_lobes = int(rng.choice((1, 2, 3, 3, 4)))
    if n_lobes == 1:  # lymphocyte: one large round nucleus
        places = [(rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), rng.uniform(0.60, 0.74))]
    else:  # neutrophil: lobes along an arc, linked by bridges
        turn, step = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.15) * (4.2 / (n_lobes + 1))
        arc = rng.uniform(0.36, 0.46)
        lobe = {2: 0.36, 3: 0.30, 4: 0.26}[n_lobes]
        places = []
        for i in range(2 * n_lobes - 1):  # every second one is a bridge
            angle = turn + i * step / 2
            size = lobe * rng.uniform(0.88, 1.12) if i % 2 == 0 else lobe * 0.6
            places.append((arc * math.cos(angle), arc * math.sin(angle), size))
    depth = np.full(patch.rho.shape, -np.inf, np.float32)
    for x, y, size in places:
        distance = np.hypot(patch.dx - np.float32(x * radius_px), patch.dy - np.float32(y * radius_px))
        depth = np.maximum(depth, np.float32(size * radius_px) - distance)
    depth += np.float32(0.03 * radius_px) * _blobs(rng, patch, 0.22 * radius_px)
    nucleus = _rise(depth / np.float32(2.0 * edge_px)) * patch.inside
    nucleus *= 1 + 0.13 * _blobs(rng, patch, max(2.0, 0.10 * radius_px))
    _add(absorbance, patch, nucleus, stain.nucleus)


def _add_platelet(
    rng: np.random.Generator, absorbance: Float32, shape: _Shape, stain: Stain, edge_px: float
) -> None:
    """A small granular speck, darkest in the middle."""
    patch = _patch(absorbance, shape, 1.6 * edge_px)
    radius_px = float(shape.radius_px.mean())
    body = (0.65 + 0.45 * np.exp(-((patch.rho / np.float32(0.6)) ** 2))) * patch.inside
    body *= 1 + 0.25 * np.clip(_blobs(rng, patch, max(1.5, 0.4 * radius_px)), -1.5, 1.5)
    _add(absorbance, patch, np.float32(rng.uniform(0.85, 1.25)) * body, stain.platelet)

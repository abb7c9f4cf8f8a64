"""Drawn fields of view with known truth, for the demo and for tests.

A field is made in two steps. First the cells are laid out as convex outlines: exact geometry, from which the
truth follows. Then they are rendered: every cell adds its absorbance, and light is transmitted by the law of
Beer and Lambert, ``I = I0 * exp(-A)``. So two cells over each other are darker than one.

The truth is clear to a careful person. Two cells either have background between them (a gap of at least
`MIN_GAP`) or lie clearly over each other (`MIN_OVERLAP` to `MAX_OVERLAP`). Nothing in between is drawn. All
randomness comes from the generator that the caller gives.

Coordinates are pixels of the field of view, x to the right, y down. Pixel (i, j) covers the square from
(j, i) to (j + 1, i + 1), so outlines and boxes are continuous and the far edge is exclusive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Bool, CellClass, Counts, Float32, Int64, UInt8

# Lengths are shares of the diameter of a red cell.
MIN_GAP: Final = 0.08  # smallest gap between cells that do not overlap
MIN_GAP_PX: Final = 3.0  # and never smaller than this: a camera has to show background between small cells
MIN_OVERLAP: Final = 0.08  # smallest depth of an overlap
MAX_OVERLAP: Final = 0.40  # largest depth of an overlap
MIN_VISIBLE: Final = 0.25  # smallest visible share of the area of a red cell that the image border cuts
_MIN_VISIBLE_WBC: Final = 0.60  # with less, the nucleus that makes it a white cell may lie outside

_VERTICES: Final = 72
_ANGLES: Final = np.arange(_VERTICES) * (2 * np.pi / _VERTICES)
_PRESSED: Final = 0.5
_MAX_TRIES: Final = 300  # places tried for one cell before the field counts as full

_Radii = np.ndarray[tuple[int], np.dtype[np.float64]]
_Colour = tuple[float, float, float]


class Form(StrEnum):
    """Red cells of an exact form, for `draw_forms`."""

    DISC = "disc"  # with a pale middle, as the stain says
    SPHERE = "sphere"  # smaller, without a pale middle
    ELLIPSE = "ellipse"  # `ELLIPSE_ASPECT` times as long as wide
    RING = "ring"  # the middle as pale as the background: hypochromic
    TARGET = "target"  # a pale ring around a dark middle
    BITTEN = "bitten"  # a disc without a round piece of its side


ELLIPSE_ASPECT: Final = 1.8


@dataclass(frozen=True, slots=True)
class Stain:
    """How blood looks with a certain stain, lamp and camera. Absorbance: natural log, per RGB channel."""

    background: _Colour  # RGB of the empty slide at the brightest place, 0..255
    red: _Colour  # absorbance of a red cell at its rim
    cytoplasm: _Colour  # of a white cell: absorbance, as for the next two
    nucleus: _Colour  # of a white cell
    platelet: _Colour  # its granules
    pallor: float  # how pale the centre of a red cell is, 0 (as dark as the rim) to 1 (like the background)
    variation: float  # relative standard deviation of the absorbance from cell to cell


# Measured on photographs of three laboratories (medians of background and cells), in the order of the fields.
GREY: Final = Stain(
    (212, 215, 209), (0.15, 0.33, 0.22), (0.15, 0.3, 0.03), (0.8, 1.1, 0.03), (0.42, 0.52, 0.05), 0.52, 0.14
)
"""Greenish-grey light, dusky red cells, violet nuclei."""
CREAM: Final = Stain(
    (254, 233, 205), (0.33, 0.46, 0.28), (0.24, 0.34, 0.1), (1.15, 1.75, 0.42), (0.5, 0.75, 0.2), 0.52, 0.06
)
"""Warm cream light, pinkish-grey red cells, dark blue nuclei."""
ROSE: Final = Stain(
    (222, 187, 174), (0.4, 0.58, 0.25), (0.16, 0.26, 0.15), (0.95, 2.1, 0.55), (0.4, 0.65, 0.3), 0.3, 0.08
)
"""Rose light, grey-violet red cells with little pallor, purple nuclei."""


@dataclass(frozen=True, slots=True, eq=False)
class DrawnField:
    """A drawn field of view and its truth. Cells are in reading order (by box centre, y, then x).

    A white cell is in a group when a red cell overlaps it.
    """

    image: UInt8  # (H, W, 3), RGB
    xyxy: Float32  # (N, 4), pixels of the field: the box of the outline, cut at the image border
    class_id: Int64  # (N,), values of `CellClass`
    overlapping: Bool  # (N,), whether the red cell overlaps another cell; False for other classes
    group: Int64  # (N,), 1..G numbers the groups of overlapping cells, 0 for a cell in no group
    # N of (V, 2): the outline as x, y, not cut at the border. Convex, but that of `Form.BITTEN`.
    outlines: tuple[Float32, ...]
    cell_diameter_px: float  # mean diameter of the red cells of the slide: the scale
    forms: tuple[Form, ...] = ()  # N, of `draw_forms`

    @property
    def counts(self) -> Counts:
        """The true counts of the field."""
        red = self.class_id == CellClass.RBC
        return Counts(
            n_rbc_single=int((red & ~self.overlapping).sum()),
            n_rbc_overlapping=int((red & self.overlapping).sum()),
            n_wbc=int((self.class_id == CellClass.WBC).sum()),
            n_platelets=int((self.class_id == CellClass.PLATELET).sum()),
        )

    def encoded(self, suffix: str) -> bytes:
        """Returns the image as the bytes of a file."""
        options = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else []
        return cv2.imencode(suffix, self.image[:, :, ::-1], options)[1].tobytes()


def draw_field(
    rng: np.random.Generator,
    *,
    width_px: int = 640,
    height_px: int = 480,
    cell_diameter_px: float = 60.0,  # mean diameter of a red cell, at least 12 px
    n_single: int = 14,  # single red cells
    group_sizes: Sequence[int] = (2, 2, 3),  # groups of overlapping red cells, each of 2 or more
    n_wbc: int = 1,  # including the next
    n_wbc_overlapped: int = 0,  # white cells that one more red cell partly covers: it is in no number above
    n_platelets: int = 2,  # they touch no other cell
    stain: Stain = GREY,
    illumination: float = 0.12,  # share of the light that is lost at the darkest corner, 0..1
    noise: float = 1.5,  # standard deviation in bright places, grey levels; less in the dark, as shot noise
    blur_px: float = 0.8,  # standard deviation of the blur of the optics
) -> DrawnField:
    """Draws one field of view with exactly the given cells. The same state of `rng` gives the same field.

    Raises `ValueError` where an argument is out of range, or there is no room for the cells.
    """
    layout = _Layout(rng, width_px, height_px, cell_diameter_px)
    if any(size < 2 for size in group_sizes):
        raise ValueError(f"group_sizes {tuple(group_sizes)}: a group has two cells or more")
    if n_wbc_overlapped > n_wbc:
        raise ValueError(f"n_wbc_overlapped {n_wbc_overlapped} is more than n_wbc {n_wbc}")
    if not layout.fill(n_single, group_sizes, n_wbc, n_wbc_overlapped, n_platelets):
        raise ValueError(
            f"no room for these cells of {cell_diameter_px:g} px in {width_px}x{height_px} px: "
            "draw fewer or smaller cells, or a larger field"
        )
    return _render(layout, stain, illumination, noise, blur_px)


def draw_slide(
    rng: np.random.Generator,
    n_fields: int,
    *,
    width_px: int = 640,
    height_px: int = 480,
    cell_diameter_px: float = 60.0,
    crowding: float = 0.22,  # mean share of a field that red cells cover, 0..0.5
    overlap_fraction: float = 0.35,  # mean share of the red cells that overlap, 0..1
    wbc_per_field: float = 0.6,  # a red cell covers every third of them in part
    platelets_per_field: float = 1.5,
    stain: Stain = GREY,
    illumination: float = 0.12,
    noise: float = 1.5,
    blur_px: float = 0.8,
) -> list[DrawnField]:
    """Draws the fields of one slide: same stain, lamp and scale (see `draw_field`), different cells.

    Cells for which there is no room are left out of the image and of the truth. Raises `ValueError` where an
    argument is out of range.
    """
    if not 0 <= crowding <= 0.5:
        raise ValueError(f"crowding {crowding:g} is not within 0..0.5")
    if not 0 <= overlap_fraction <= 1:
        raise ValueError(f"overlap_fraction {overlap_fraction:g} is not within 0..1")
    fields = []
    for _ in range(n_fields):
        layout = _Layout(rng, width_px, height_px, cell_diameter_px)
        n_rbc = int(rng.poisson(crowding * width_px * height_px / (math.pi / 4 * cell_diameter_px**2)))
        n_wbc = int(rng.poisson(wbc_per_field))
        n_wbc_overlapped = int(rng.binomial(n_wbc, 1 / 3))
        group_sizes: list[int] = []
        while sum(group_sizes) + 1 < n_rbc * overlap_fraction:
            group_sizes.append(int(rng.choice((2, 2, 2, 3, 3, 4))))
        n_platelets = int(rng.poisson(platelets_per_field))
        layout.fill(max(0, n_rbc - sum(group_sizes)), group_sizes, n_wbc, n_wbc_overlapped, n_platelets)
        fields.append(_render(layout, stain, illumination, noise, blur_px))
    return fields


def draw_forms(
    rng: np.random.Generator,
    forms: Sequence[Form],
    *,
    cell_diameter_px: float = 60.0,
    stain: Stain = GREY,
    illumination: float = 0.12,
    noise: float = 1.5,
    blur_px: float = 0.8,
) -> DrawnField:
    """Draws red cells of given forms, at least one, apart from each other (arguments as of `draw_field`)."""
    pitch_px, columns = 1.75 * cell_diameter_px, math.ceil(math.sqrt(len(forms)))
    rows = math.ceil(len(forms) / columns)
    layout = _Layout(rng, round(columns * pitch_px), round(rows * pitch_px), cell_diameter_px)
    for i, form in enumerate(forms):
        place = np.array([i % columns, i // columns]) + rng.uniform(0.44, 0.56, 2)
        x, y = (place * pitch_px).tolist()
        size_px = cell_diameter_px / 2 * rng.uniform(0.95, 1.05) * (0.8 if form is Form.SPHERE else 1.0)
        radius_px = size_px * _form(form, float(rng.uniform(0, 2 * np.pi)))
        layout.shapes.append(_Shape(CellClass.RBC, (x, y), radius_px, form=form))
    return _render(layout, stain, illumination, noise, blur_px)


def _form(form: Form, turn: float) -> _Radii:
    """Returns the radii (V,) of a form, turned by an angle. Those of a disc are 1."""
    angle = _ANGLES - turn
    if form is Form.ELLIPSE:  # of the area of the disc
        long, short = math.sqrt(ELLIPSE_ASPECT), 1 / math.sqrt(ELLIPSE_ASPECT)
        return np.asarray(1 / np.hypot(np.cos(angle) / long, np.sin(angle) / short))
    if form is Form.BITTEN:  # a smaller circle around a point of the outline is missing
        inside = np.maximum(0.45**2 - np.sin(angle) ** 2, 0)
        return np.asarray(np.where((inside > 0) & (np.cos(angle) > 0), np.cos(angle) - np.sqrt(inside), 1))
    return np.ones(_VERTICES)


# -- geometry ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Shape:
    """A convex outline in polar form around its centre."""

    class_id: CellClass
    centre: tuple[float, float]  # x, y in pixels of the field
    radius_px: _Radii  # (V,), radius at the angles 2 pi i / V
    group: int = 0  # 0: in no group
    form: Form | None = None

    @cached_property
    def outline(self) -> Float32:
        """The polygon, float32 (V, 2)."""
        x = self.centre[0] + self.radius_px * np.cos(_ANGLES)
        y = self.centre[1] + self.radius_px * np.sin(_ANGLES)
        return np.stack([x, y], axis=1).astype(np.float32)


def _radius(rng: np.random.Generator, mean_px: float, wobble: float) -> _Radii:
    """Returns the radii (V,) of a convex, slightly elliptic and irregular outline.

    With ``r = R (1 + sum a_k cos(k t + p_k))`` the outline is convex while ``sum |a_k| (k^2 - 1) < 1``
    (to first order). At wobble 1 the sum is at most 0.74.
    """
    radius = np.ones(_VERTICES)
    for k, most in ((2, 0.095), (3, 0.022), (4, 0.010), (5, 0.0055)):
        amplitude = wobble * most * rng.uniform(0.2, 1.0)
        radius += amplitude * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi))
    return mean_px * radius


def _depth_px(a: Float32, b: Float32) -> tuple[float, Float32]:
    """Returns how deep two convex outlines overlap, px, and the lens that they share, float32 (M, 2).

    The depth is the smaller side of the lens. It is 0, with an empty lens, where the outlines do not meet.
    """
    area, vertices = cv2.intersectConvexConvex(a, b)
    if area <= 0 or vertices is None or len(vertices) < 3:
        return 0.0, np.zeros((0, 2), np.float32)
    lens = np.asarray(vertices, np.float32).reshape(-1, 2)
    return float(min(cv2.minAreaRect(lens)[1])), lens


def _gap_px(points: Float32, outline: Float32) -> float:
    """Returns the smallest distance from `points` (P, 2) to the edges of `outline` (V, 2)."""
    start = outline[None]
    edge = np.roll(outline, -1, axis=0)[None] - start
    to_point = points[:, None] - start
    t = np.clip((to_point * edge).sum(2) / np.maximum((edge * edge).sum(2), 1e-12), 0, 1)
    return float(np.sqrt(((to_point - t[..., None] * edge) ** 2).sum(2).min()))


@dataclass(eq=False)
class _Layout:
    """Places cells at random: each is clearly apart from, or clearly over, every other, or dropped."""

    rng: np.random.Generator
    width_px: int
    height_px: int
    cell_diameter_px: float  # mean of the red cells
    shapes: list[_Shape] = field(default_factory=list)

    def __post_init__(self) -> None:
        w, h, cell_px = self.width_px, self.height_px, self.cell_diameter_px
        if w < 1 or h < 1:
            raise ValueError(f"a field of {w}x{h} px has no area")
        if not cell_px >= 12:  # also refuses NaN
            raise ValueError(f"cell_diameter_px {cell_px:g} is below 12 px, too small to draw a cell")
        self._border = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)

    def fill(
        self, n_single: int, group_sizes: Sequence[int], n_wbc: int, n_wbc_overlapped: int, n_platelets: int
    ) -> bool:
        """Places the cells, the largest first. Returns whether there was room for all."""
        kinds: list[list[Callable[[], bool]]] = [
            [partial(self._group, (CellClass.WBC, CellClass.RBC))] * n_wbc_overlapped,
            [partial(self._group, (CellClass.RBC,) * size) for size in sorted(group_sizes, reverse=True)],
            [partial(self._alone, CellClass.WBC)] * (n_wbc - n_wbc_overlapped),
            [partial(self._alone, CellClass.RBC)] * n_single,
            [partial(self._alone, CellClass.PLATELET)] * n_platelets,
        ]
        # Without room for one cell there is hardly room for the next of its kind: go on with the next kind.
        complete = [all(place() for place in kind) for kind in kinds]
        return all(complete)

    def _new_radius(self, class_id: CellClass) -> _Radii:
        rng, radius_px = self.rng, self.cell_diameter_px / 2
        if class_id == CellClass.RBC:
            return _radius(rng, radius_px * float(np.clip(rng.normal(1.0, 0.06), 0.85, 1.15)), 1.0)
        low, high, wobble = (1.5, 1.9, 0.5) if class_id == CellClass.WBC else (0.22, 0.35, 1.2)
        return _radius(rng, radius_px * rng.uniform(low, high), wobble)

    def _alone(self, class_id: CellClass, group: int = 0) -> bool:
        """Places a cell apart from all others, as the first of a group where one is given."""
        for _ in range(_MAX_TRIES):
            radius_px = self._new_radius(class_id)
            reach = float(radius_px.max())
            x = float(self.rng.uniform(-reach, self.width_px + reach))
            y = float(self.rng.uniform(-reach, self.height_px + reach))
            if self._add(_Shape(class_id, (x, y), radius_px, group)):
                return True
        return False

    def _group(self, classes: Sequence[CellClass]) -> bool:
        """Places a connected group, all of it or nothing."""
        before = len(self.shapes)
        group = 1 + max((shape.group for shape in self.shapes), default=0)
        for _ in range(_MAX_TRIES // 10):
            if self._alone(classes[0], group) and all(self._attach(c, group, before) for c in classes[1:]):
                return True
            del self.shapes[before:]
        return False

    def _attach(self, class_id: CellClass, group: int, first: int) -> bool:
        """Places a cell over a cell of the group. The group begins at index `first`."""
        for _ in range(_MAX_TRIES // 10):
            partner = self.shapes[int(self.rng.integers(first, len(self.shapes)))]
            radius_px = self._new_radius(class_id)
            direction = float(self.rng.uniform(0, 2 * np.pi))
            depth_px = self.rng.uniform(1.3 * MIN_OVERLAP, 0.95 * MAX_OVERLAP) * self.cell_diameter_px
            i = round(direction / (2 * np.pi) * _VERTICES) % _VERTICES
            distance = float(partner.radius_px[i] + radius_px[(i + _VERTICES // 2) % _VERTICES] - depth_px)
            x = partner.centre[0] + distance * math.cos(direction)
            y = partner.centre[1] + distance * math.sin(direction)
            if self._add(_Shape(class_id, (x, y), radius_px, group)):
                return True
        return False

    def _add(self, shape: _Shape) -> bool:
        """Adds a shape that is visible and fits. Returns whether it was added."""
        if added := self._is_visible(shape) and self._fits(shape):
            self.shapes.append(shape)
        return added

    def _is_visible(self, shape: _Shape) -> bool:
        """Whether the image shows enough of the shape to call it a cell of the field."""
        outline = shape.outline
        is_whole = bool(outline.min() >= 0 and (outline.max(axis=0) <= self._border[2]).all())
        if is_whole or shape.class_id == CellClass.PLATELET:  # a platelet that is cut is a speck
            return is_whole
        visible, _ = cv2.intersectConvexConvex(outline, self._border)
        least = MIN_VISIBLE if shape.class_id == CellClass.RBC else _MIN_VISIBLE_WBC
        return bool(visible >= least * cv2.contourArea(outline))

    def _fits(self, shape: _Shape) -> bool:
        """Whether the shape is clearly apart from every cell, or clearly over cells of its own group."""
        gap_px = max(MIN_GAP * self.cell_diameter_px, MIN_GAP_PX)
        reach = float(shape.radius_px.max())
        for other in self.shapes:
            distance = math.dist(shape.centre, other.centre)
            if distance >= reach + float(other.radius_px.max()) + gap_px:
                continue
            same_group = shape.group != 0 and shape.group == other.group
            if not same_group and distance < float(shape.radius_px.min() + other.radius_px.min()):
                return False  # a quick answer, before the exact one
            depth_px, lens = _depth_px(shape.outline, other.outline)
            if not len(lens):
                # The shortest way between two convex outlines ends at a vertex of one of them.
                a, b = shape.outline, other.outline
                if min(_gap_px(a, b), _gap_px(b, a)) < gap_px:
                    return False
            # An overlap is deep enough to see in the image, and both cells remain visible.
            elif (
                not same_group
                or depth_px > MAX_OVERLAP * self.cell_diameter_px
                or _depth_px(lens, self._border)[0] < MIN_OVERLAP * self.cell_diameter_px
            ):
                return False
        return True


# -- light ------------------------------------------------------------------------------------------------


def _render(layout: _Layout, stain: Stain, illumination: float, noise: float, blur_px: float) -> DrawnField:
    """Turns a layout into an image and its truth."""
    h, w, rng = layout.height_px, layout.width_px, layout.rng
    absorbance = np.zeros((h, w, 3), np.float32)
    painter = _Painter(rng, stain, absorbance, edge_px=max(0.7, 0.018 * layout.cell_diameter_px))
    for shape in layout.shapes:
        painter.add(shape)

    # Plasma and dust: a mottled background, much fainter than any cell.
    mottle = rng.normal(0, 1, (h // 40 + 3, w // 40 + 3)).astype(np.float32)
    absorbance += 0.006 * cv2.resize(mottle, (w, h), interpolation=cv2.INTER_CUBIC)[..., None]

    transmitted = np.exp(-absorbance)
    transmitted *= _light(rng, w, h, illumination)[..., None]
    if blur_px > 0:
        transmitted = np.asarray(cv2.GaussianBlur(transmitted, (0, 0), blur_px), np.float32)
    picture = transmitted * (np.asarray(stain.background, np.float32) / np.float32(255))
    if noise > 0:
        # Shot noise grows with the root of the light. Demosaicking and JPEG spread it over neighbours.
        white = rng.standard_normal((h, w, 3), np.float32)
        grain = np.asarray(cv2.GaussianBlur(white, (0, 0), 0.6), np.float32)
        grain *= np.sqrt(transmitted)
        picture += grain * np.float32(noise / 0.47 / 255)  # the blur left 0.47 of the deviation
    image = cv2.convertScaleAbs(np.maximum(picture, 0), alpha=255.0)

    corners = [(shape.outline.min(axis=0), shape.outline.max(axis=0)) for shape in layout.shapes]
    xyxy = np.clip(np.array(corners, np.float32).reshape(-1, 4), 0, np.array([w, h, w, h], np.float32))
    class_id = np.array([shape.class_id for shape in layout.shapes], np.int64)
    group = np.array([shape.group for shape in layout.shapes], np.int64)
    order = np.lexsort((xyxy[:, 0] + xyxy[:, 2], xyxy[:, 1] + xyxy[:, 3]))
    return DrawnField(
        image=np.asarray(image, np.uint8),
        xyxy=xyxy[order],
        class_id=class_id[order],
        overlapping=((group > 0) & (class_id == CellClass.RBC))[order],
        group=group[order],
        outlines=tuple(layout.shapes[i].outline for i in order),
        cell_diameter_px=layout.cell_diameter_px,
        forms=tuple(form for i in order if (form := layout.shapes[i].form)),
    )


def _light(rng: np.random.Generator, w: int, h: int, fall_off: float) -> Float32:
    """Returns the light of the lamp, float32 (H, W), from 1 - fall_off to 1 at the brightest place."""
    x = np.linspace(-1, 1, w, dtype=np.float32)[None]
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    cx, cy = rng.uniform(-0.45, 0.45, 2).astype(np.float32)
    sx, sy = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    loss = (x - cx) ** 2 + (y - cy) ** 2 + sx * x + sy * y
    loss -= loss.min()
    return np.asarray(1 - fall_off * loss / max(float(loss.max()), 1e-6), np.float32)


def _rise(x: Float32) -> Float32:
    """Returns a smooth step: 0 below -1, 1 above 1, one half at 0."""
    t = np.clip(x * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Patch:
    """The part of the field that a shape covers, in the coordinates of the shape. Arrays are (h, w)."""

    where: tuple[slice, slice]  # rows and columns of the field
    dx: Float32  # pixels to the right of the centre
    dy: Float32  # pixels below the centre
    rho: Float32  # distance from the centre over the radius of the outline: 1 on the outline
    inside: Float32  # 1 inside, 0 outside, one half on the outline
    radius_px: float  # mean radius of the shape

    @classmethod
    def of(cls, shape: _Shape, h: int, w: int, edge_px: float) -> "_Patch":
        """Makes the patch of a shape. The edge rises over `edge_px` to either side of the outline."""
        reach = float(shape.radius_px.max()) * 1.15 + 3 * edge_px
        x0, x1 = max(0, int(shape.centre[0] - reach)), min(w, int(shape.centre[0] + reach) + 1)
        y0, y1 = max(0, int(shape.centre[1] - reach)), min(h, int(shape.centre[1] + reach) + 1)
        dx, dy = np.meshgrid(
            np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - shape.centre[0]),
            np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - shape.centre[1]),
        )
        distance, angle = cv2.cartToPolar(dx, dy)
        # A fine table of radii, faster than interpolation for each pixel.
        closed = np.append(shape.radius_px, shape.radius_px[0])
        fine = np.interp((np.arange(1024) + 0.5) * (_VERTICES / 1024), np.arange(_VERTICES + 1), closed)
        radius = fine.astype(np.float32)[(angle * np.float32(1024 / (2 * np.pi))).astype(np.int32) & 1023]
        inside = _rise((radius - distance) / np.float32(edge_px))
        where = (slice(y0, y1), slice(x0, x1))
        return cls(where, dx, dy, distance / radius, inside, float(shape.radius_px.mean()))

    def blobs(self, rng: np.random.Generator, grain_px: float) -> Float32:
        """Returns smooth noise, float32 (h, w), mean near 0, deviation near 1 and grains of `grain_px`."""
        h, w = self.rho.shape
        size = (max(2, int(h / grain_px) + 2), max(2, int(w / grain_px) + 2))
        small = rng.standard_normal(size, np.float32)
        return np.asarray(cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC), np.float32)

    def distance(self, x: float, y: float) -> Float32:
        """Returns the distance from a point, float32 (h, w), px. The point is relative to the centre."""
        return np.asarray(np.hypot(self.dx - np.float32(x), self.dy - np.float32(y)), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Painter:
    """Adds cells to the absorbance of a field."""

    rng: np.random.Generator
    stain: Stain
    absorbance: Float32  # (H, W, 3), changed in place
    edge_px: float  # half the width of a red cell's edge

    def add(self, shape: _Shape) -> None:
        """Adds one cell."""
        paint: dict[CellClass, Callable[[_Patch], None]] = {
            CellClass.RBC: partial(self._red, form=shape.form),
            CellClass.WBC: self._white,
            CellClass.PLATELET: self._platelet,
        }
        softness = {CellClass.RBC: 1.0, CellClass.WBC: 1.3, CellClass.PLATELET: 1.6}[shape.class_id]
        h, w = self.absorbance.shape[:2]
        paint[shape.class_id](_Patch.of(shape, h, w, softness * self.edge_px))

    def _add(self, patch: _Patch, density: Float32, colour: _Colour) -> None:
        self.absorbance[patch.where] += density[..., None] * np.asarray(colour, np.float32)

    def _red(self, patch: _Patch, form: Form | None) -> None:
        """A biconcave disc: a paler centre, a plateau, a slightly darker rim, a thin bright line around."""
        rng, stain, radius_px = self.rng, self.stain, patch.radius_px
        strength = float(np.clip(rng.normal(1, stain.variation), 0.6, 1.5))
        pallor = float(np.clip(rng.normal(stain.pallor, 0.4 * stain.pallor), 0, 0.8))
        width = rng.uniform(0.34, 0.60)
        shift = rng.normal(0, 0.05, 2) * radius_px  # the dimple is rarely exactly in the middle
        centre_rho = patch.distance(shift[0], shift[1]) / np.float32(radius_px)
        dimple = np.exp(-((centre_rho / np.float32(width)) ** 2.6))
        if form in (Form.RING, Form.TARGET):
            pallor, dimple = 0.9, np.exp(-((patch.rho / np.float32(0.62)) ** 6))
        if form is Form.TARGET:
            dimple -= np.exp(-((patch.rho / np.float32(0.32)) ** 4))
        if form is Form.SPHERE:
            pallor = 0.0
        rim = np.exp(-(((patch.rho - np.float32(0.86)) / np.float32(0.11)) ** 2))
        body = 1 - np.float32(pallor) * dimple + np.float32(rng.uniform(0.04, 0.16)) * rim
        body *= 1 + 0.035 * patch.blobs(rng, 0.35 * radius_px)
        # The bright line that refraction draws around a cell (Becke line).
        halo = np.exp(-(((patch.rho - np.float32(1.06)) / np.float32(0.035)) ** 2)) * (1 - patch.inside)
        density = np.float32(strength) * body * patch.inside
        # Cells that dried over each other are thinner where they cross: in photographs the lens is darker
        # than either cell, but not as dark as both together.
        under = np.clip(self.absorbance[patch.where][..., 1] / np.float32(stain.red[1]), 0, 1)
        density *= 1 - np.float32(_PRESSED) * under
        density -= np.float32(0.06) * halo * (1 - under)
        r, g, b = rng.normal(1, 0.025, 3)
        self._add(patch, density, (stain.red[0] * r, stain.red[1] * g, stain.red[2] * b))

    def _white(self, patch: _Patch) -> None:
        """Granular cytoplasm with a round or lobed, mottled nucleus."""
        rng, radius_px = self.rng, patch.radius_px
        granules = np.maximum(patch.blobs(rng, max(2.0, 0.06 * radius_px)), -1)
        cytoplasm = (1 + 0.15 * granules + 0.12 * patch.blobs(rng, 0.3 * radius_px)) * patch.inside
        self._add(patch, cytoplasm, self.stain.cytoplasm)

        n_lobes = int(rng.choice((1, 2, 3, 3, 4)))
        if n_lobes == 1:  # lymphocyte: one large round nucleus
            places = [(rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), rng.uniform(0.60, 0.74))]
        else:  # neutrophil: lobes along an arc, connected by bridges
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
            distance = patch.distance(x * radius_px, y * radius_px)
            depth = np.maximum(depth, np.float32(size * radius_px) - distance)
        depth += np.float32(0.03 * radius_px) * patch.blobs(rng, 0.22 * radius_px)
        nucleus = _rise(depth / np.float32(2.0 * self.edge_px)) * patch.inside
        nucleus *= 1 + 0.13 * patch.blobs(rng, max(2.0, 0.10 * radius_px))
        self._add(patch, nucleus, self.stain.nucleus)

    def _platelet(self, patch: _Patch) -> None:
        """A small granular speck, darkest in the middle."""
        body = (0.65 + 0.45 * np.exp(-((patch.rho / np.float32(0.6)) ** 2))) * patch.inside
        body *= 1 + 0.25 * np.clip(patch.blobs(self.rng, max(1.5, 0.4 * patch.radius_px)), -1.5, 1.5)
        self._add(patch, np.float32(self.rng.uniform(0.85, 1.25)) * body, self.stain.platelet)

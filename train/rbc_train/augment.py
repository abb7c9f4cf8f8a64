"""Photographs as another microscope, stain or camera might have made them, and overlaps made by pasting.

Also what lies on photographs and is no blood: letters, scale bars and pointers burned into the pixels, the
black surround of an eyepiece, glass with dirt and nothing else.
"""

import math
import random
from dataclasses import replace
from typing import Final

import cv2
import numpy as np

from rbc_edge.ops import synthetic
from rbc_edge.values import Bool, Float32, Shape, UInt8
from rbc_edge.vision.preprocess import BACKGROUND_LEVEL


def vary(image: UInt8, rng: random.Random) -> UInt8:
    """Shows a photograph as another microscope, stain or camera might have.

    Colour cast and light by a gain per channel and a gamma, more or less of another dye, a lamp that lights
    one side more, focus by a blur, outlines that a camera has sharpened, fewer pixels, noise, JPEG.

    Args:
        image: uint8 (H, W, 3), any channel order.
        rng: Source of chance.

    Returns:
        uint8 (H, W, 3).
    """
    values = image.astype(np.float32) / 255.0
    if rng.random() < 0.8:
        # Lamp and exposure are balanced away before; this is what the balance leaves.
        light = rng.uniform(0.85, 1.12)
        gain = np.array([light * rng.uniform(0.9, 1.1) for _ in range(3)], np.float32)
        values = np.clip(values * gain, 0, 1) ** rng.uniform(0.75, 1.35)
    if rng.random() < 0.5:
        values = _restained(values, rng)
    if rng.random() < 0.25:
        values = values * _shade(values.shape[0], values.shape[1], rng)[:, :, None]
    if rng.random() < 0.05:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)  # a monochrome camera
    if rng.random() < 0.15:
        values = _coarser(values, rng.uniform(0.45, 0.9))
    if rng.random() < 0.3:
        values = np.asarray(cv2.GaussianBlur(values, (0, 0), rng.uniform(0.3, 1.1)), np.float32)
    elif rng.random() < 0.15:
        soft = cv2.GaussianBlur(values, (0, 0), rng.uniform(0.8, 1.6))
        values = np.clip(values + rng.uniform(0.4, 1.6) * (values - soft), 0, 1).astype(np.float32)
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(values.shape, np.float32)
        values = values + noise * rng.uniform(0.005, 0.03)
    varied: UInt8 = np.asarray(np.clip(values * 255.0 + 0.5, 0, 255), np.uint8)
    if rng.random() < 0.3:
        _, coded = cv2.imencode(".jpg", varied, [cv2.IMWRITE_JPEG_QUALITY, rng.randint(40, 95)])
        varied = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), dtype=np.uint8)
    return varied


def _restained(values: Float32, rng: random.Random) -> Float32:
    """Another amount of dye, and another dye, in absorbances (Beer-Lambert).

    A strong stain makes red cells dark and hides their pale middle. A weak one, or a condenser wide open,
    brings everything near the background. Channels scale apart, and leak into each other: pink cells become
    orange, violet or grey, and so does what tells a white cell from a red one by its colour alone. A curve
    makes pale middles paler, or hides them. The plasma takes a tint of its own.
    """
    glass = BACKGROUND_LEVEL / 255
    depth = -np.log(np.clip(values / glass, 1e-3, 1.15))
    if rng.random() < 0.4:
        leak = rng.uniform(0.1, 0.6)
        other = np.array([[rng.random() for _ in range(3)] for _ in range(3)])
        mixing = (1 - leak) * np.eye(3) + leak * other / other.sum(axis=1, keepdims=True)
        depth = depth @ mixing.T.astype(np.float32)
    if rng.random() < 0.3:
        full = max(float(np.percentile(depth[::4, ::4], 95)), 0.05)
        depth = np.sign(depth) * full * (np.abs(depth) / full) ** rng.uniform(0.7, 1.5)
    amount = math.exp(rng.uniform(math.log(0.4), math.log(2.2)))
    power = np.array([amount * rng.uniform(0.75, 1.33) for _ in range(3)], np.float32)
    plasma = np.array([rng.uniform(0, 0.08) for _ in range(3)], np.float32) * (rng.random() < 0.3)
    return np.asarray(glass * np.exp(-(depth * power + plasma)), np.float32)


def _shade(height: int, width: int, rng: random.Random) -> Float32:
    """float32 (height, width): light that falls off towards one side, down to 0.65."""
    angle = rng.uniform(0, 2 * math.pi)
    along = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :] * math.cos(angle) + np.linspace(
        -0.5, 0.5, height, dtype=np.float32
    )[:, None] * math.sin(angle)
    return np.asarray(1.0 - rng.uniform(0.1, 0.35) * (along + 0.5).clip(0, 1) ** 1.5, np.float32)


def _coarser(values: Float32, factor: float) -> Float32:
    """A camera with fewer pixels a cell: made smaller by `factor`, and as large again."""
    height, width = values.shape[:2]
    size = (max(8, round(width * factor)), max(8, round(height * factor)))
    small = cv2.resize(values, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


_INKS: Final = (
    (0, 0, 0),
    (255, 255, 255),
    (255, 255, 0),
    (0, 255, 0),
    (255, 0, 0),
    (0, 0, 255),
    (0, 255, 255),
)
_FONTS: Final = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_PLAIN, cv2.FONT_HERSHEY_COMPLEX_SMALL)


def burned_in(image: UInt8, rng: random.Random) -> UInt8:
    """Burns letters, a scale bar or a pointer into a photograph, as the programs of cameras do.

    Args:
        image: uint8 (H, W, 3), any channel order.
        rng: Source of chance.

    Returns:
        uint8 (H, W, 3), a new array.
    """
    drawn = image.copy()
    height, width = drawn.shape[:2]
    for _ in range(rng.randint(1, 3)):
        ink, thick = rng.choice(_INKS), rng.randint(1, 3)
        x, y = rng.randrange(width), rng.randrange(height)
        what = rng.randrange(3)
        if what == 0:
            letters = rng.choice(("um", "µm", " x1000", ":", "/", "")) if rng.random() < 0.7 else "Sample A"
            text = f"{rng.uniform(0, 2026):.{rng.randint(0, 2)}f}{letters}"
            size = rng.uniform(0.3, 1.0)
            cv2.putText(drawn, text, (x - 30, y), rng.choice(_FONTS), size, ink, thick, cv2.LINE_AA)
        elif what == 1:
            end, tick = x + rng.randint(15, 120), rng.choice((0, 3, 6))
            cv2.line(drawn, (x, y), (end, y), ink, thick)
            for side in (x, end):
                cv2.line(drawn, (side, y - tick), (side, y + tick), ink, thick)
        else:
            angle, long = rng.uniform(0, 2 * math.pi), rng.uniform(10, 45)
            tip = (round(x + long * math.cos(angle)), round(y + long * math.sin(angle)))
            cv2.arrowedLine(drawn, (x, y), tip, ink, rng.randint(1, 6), cv2.LINE_AA, 0, 0.4)
    return np.asarray(drawn, np.uint8)


def empty_glass(height: int, width: int, rng: random.Random) -> UInt8:
    """Draws glass between smears, with dirt, fibres and rims of dried plasma: uint8 (height, width, 3)."""
    noise = np.random.default_rng(rng.getrandbits(32))
    level = BACKGROUND_LEVEL / 255 * np.array([rng.uniform(0.9, 1.02) for _ in range(3)], np.float32)
    values = np.empty((height, width, 3), np.float32)
    values[...] = level
    cloud = cv2.resize(
        noise.standard_normal((6, 6), np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    values *= 1 + rng.uniform(0, 0.05) * cloud[:, :, None]
    drawn = np.asarray(np.clip(values * 255, 0, 255), np.uint8)
    for _ in range(rng.randint(0, 8)):
        ink = tuple(int(v) for v in noise.integers(60, 220, 3))
        place = (rng.randrange(width), rng.randrange(height))
        if rng.random() < 0.6:
            cv2.circle(drawn, place, rng.randint(1, 4), ink, -1, cv2.LINE_AA)
        else:
            steps = noise.integers(-18, 19, (rng.randint(3, 8), 2)).cumsum(axis=0) + np.array(place)
            cv2.polylines(
                drawn, [steps.astype(np.int32)], rng.random() < 0.2, ink, rng.randint(1, 2), cv2.LINE_AA
            )
    return np.asarray(cv2.GaussianBlur(drawn, (0, 0), rng.uniform(0.5, 1.5)), np.uint8)


def surrounded(image: UInt8, xyxy: Float32, rng: random.Random) -> tuple[UInt8, Float32, Bool]:
    """Shows a photograph through an eyepiece: black beyond a circle.

    Args:
        image: uint8 (H, W, 3).
        xyxy: float32 (N, 4), boxes in it, pixels.
        rng: Source of chance.

    Returns:
        The image, a new array; the boxes, each around what is still seen of it; and bool (N,), which boxes
        still show enough to be a cell: a tenth.
    """
    height, width = image.shape[:2]
    radius = rng.uniform(0.45, 0.75) * max(height, width)
    centre = (round(width * rng.uniform(0.3, 0.7)), round(height * rng.uniform(0.3, 0.7)))
    lit = np.zeros((height, width), np.uint8)
    cv2.circle(lit, centre, round(radius), 1, -1)
    dark = rng.randint(0, 20)
    drawn = np.where(lit[:, :, None] > 0, image, np.uint8(dark)).astype(np.uint8)
    boxes, seen = xyxy.copy(), np.zeros(len(xyxy), np.bool_)
    for i, (x0, y0, x1, y1) in enumerate(np.round(xyxy).astype(np.int64).tolist()):
        rows, columns = np.nonzero(lit[y0:y1, x0:x1])
        if len(rows) < max(0.1 * (y1 - y0) * (x1 - x0), 6):
            continue
        seen[i] = True
        if len(rows) < (y1 - y0) * (x1 - x0):
            boxes[i] = x0 + columns.min(), y0 + rows.min(), x0 + columns.max() + 1, y0 + rows.max() + 1
    return drawn, boxes, seen


def paste_neighbour(
    image: UInt8, box: Float32, donor: UInt8, donor_box: Float32, depth: float, rng: random.Random
) -> tuple[UInt8, Float32]:
    """Pastes a cell of one photograph over or next to a cell of another.

    A network that learns from such overlaps also knows real ones (Brünggel, Vallotton, Conway 2022). The
    donor is cut along its own outline. Light goes through both cells, so their transmittances multiply
    (Beer-Lambert). One time in three the donor hides the cell under it, as thick cells do.

    Args:
        image: uint8 (H, W, 3) RGB, the photograph that receives.
        box: float32 (4,), xyxy px, the cell that gets a neighbour.
        donor: uint8 (H', W', 3) RGB, the photograph that gives.
        donor_box: float32 (4,), xyxy px, a single cell in it.
        depth: Overlap along the line of centres, share of the two radii's sum. Negative for a gap.
        rng: Source of chance.

    Returns:
        The part of the photograph around the cell, uint8 (h, w, 3), and the cell's box in it, float32 (4,).
    """
    height, width = image.shape[:2]
    size = box[2:] - box[:2]
    reach = 1.3 * float(size.max())
    x0, y0 = (max(0, int(v)) for v in (box[:2] - reach))
    x1, y1 = min(width, math.ceil(box[2] + reach)), min(height, math.ceil(box[3] + reach))
    window = image[y0:y1, x0:x1].astype(np.float32)
    own = box - np.array([x0, y0, x0, y0], np.float32)
    # The donor comes at the receiver's scale: the two photographs may be of different cameras.
    donor_side = math.sqrt(float(np.prod(donor_box[2:] - donor_box[:2])))
    factor = math.sqrt(float(np.prod(size))) / max(donor_side, 1.0) * rng.uniform(0.88, 1.12)
    patch, mask = _cut_cell(donor, donor_box, factor)
    if rng.random() < 0.5:
        patch, mask = patch[:, ::-1], mask[:, ::-1]
    if rng.random() < 0.5:
        patch, mask = patch[::-1], mask[::-1]
    background = _background(window)
    transmittance = np.minimum(patch / _background(patch), 1.05)
    angle = rng.uniform(0, 2 * math.pi)
    direction = np.array([math.cos(angle), math.sin(angle)])
    other = np.array([mask.shape[1], mask.shape[0]]) * (1 / 1.2)
    # Radii of the two ellipses along the line of centres.
    radius = sum(1 / math.sqrt(float(((direction / (s / 2)) ** 2).sum())) for s in (size, other))
    centre = (own[:2] + own[2:]) / 2 + direction * radius * (1 - depth)
    left, top = (round(float(c - s / 2)) for c, s in zip(centre, mask.shape[1::-1], strict=True))
    sx0, sy0 = max(0, -left), max(0, -top)
    sx1 = min(mask.shape[1], window.shape[1] - left)
    sy1 = min(mask.shape[0], window.shape[0] - top)
    if sx1 > sx0 and sy1 > sy0:
        target = window[top + sy0 : top + sy1, left + sx0 : left + sx1]
        m = mask[sy0:sy1, sx0:sx1, None]
        t = transmittance[sy0:sy1, sx0:sx1]
        through = target * (1 - m + m * t)
        hiding = target * (1 - m) + m * t * background
        target[...] = through if rng.random() < 2 / 3 else hiding
    return np.clip(window + 0.5, 0, 255).astype(np.uint8), own


def _cut_cell(photograph: UInt8, box: Float32, factor: float) -> tuple[Float32, Float32]:
    """Returns a cell's patch, float32 (h, w, 3), and its soft outline mask, float32 (h, w), 0..1."""
    margin = (box[2:] - box[:2]) * 0.1
    low = np.maximum(np.floor(box[:2] - margin), 0).astype(int)
    high = np.ceil(box[2:] + margin).astype(int)
    cut = photograph[low[1] : high[1], low[0] : high[0]]
    size = (max(4, round(cut.shape[1] * factor)), max(4, round(cut.shape[0] * factor)))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    cut = np.asarray(cv2.resize(cut, size, interpolation=how), np.uint8)
    # The green channel: haemoglobin absorbs it most.
    _, binary = cv2.threshold(cut[:, :, 1], 0, 255, cv2.THRESH_BINARY_INV | cv2.THRESH_OTSU)
    contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mask = np.zeros(binary.shape, np.uint8)
    if contours:
        # Filled: the central pallor belongs to the cell.
        cv2.drawContours(mask, [max(contours, key=cv2.contourArea)], -1, 255, thickness=-1)
    grown = cv2.dilate(mask, np.ones((3, 3), np.uint8))
    soft = cv2.GaussianBlur(grown.astype(np.float32) / 255, (0, 0), 0.8)
    return cut.astype(np.float32), np.asarray(soft, np.float32)


def _background(patch: Float32) -> Float32:
    """float32 (3,): the bright level of each channel, what the glass alone shows."""
    return np.maximum(np.percentile(patch.reshape(-1, 3), 90, axis=0), 1.0).astype(np.float32)


_FORMS: Final = {
    synthetic.Form.DISC: Shape.NORMAL,
    synthetic.Form.SPHERE: Shape.SPHEROCYTE,
    synthetic.Form.ELLIPSE: Shape.ELLIPTOCYTE,
    synthetic.Form.RING: Shape.HYPOCHROMIC,
    synthetic.Form.TARGET: Shape.TARGET,
    synthetic.Form.BITTEN: Shape.SCHISTOCYTE,
}


def drawn_shapes(n: int, rng: random.Random) -> tuple[synthetic.DrawnField, list[Shape]]:
    """Draws `n` single red cells of exact forms, in a stain between those that `synthetic` knows.

    A few in a thousand training crops teach what a shape is where nobody doubts it. Without them the network
    called two drawn discs in five elliptocytes.

    Returns:
        The field, and the shape of each of its cells.
    """
    share = np.array([rng.random() for _ in range(3)])
    stains = (synthetic.GREY, synthetic.CREAM, synthetic.ROSE)
    parts = [np.array([getattr(stain, name) for stain in stains]) for name in ("background", "red")]
    background, red = (tuple((share @ part / share.sum()).tolist()) for part in parts)
    stain = replace(
        stains[0],
        background=background,
        red=red,
        pallor=rng.uniform(0.2, 0.6),
        variation=rng.uniform(0.03, 0.15),
    )
    drawn = synthetic.draw_forms(
        np.random.default_rng(rng.getrandbits(32)),
        rng.choices(list(_FORMS), k=n),
        cell_diameter_px=rng.uniform(40, 80),
        stain=stain,
        noise=rng.uniform(0.5, 3),
        blur_px=rng.uniform(0.5, 1.5),
    )
    return drawn, [_FORMS[form] for form in drawn.forms]

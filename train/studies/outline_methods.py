"""The outline of the cell in the middle of a window: Otsu, watershed, a small U-Net, and truth by pasting.

A window is 64x64 pixels, not stretched, and a red cell of the slide is 40 pixels wide in it. Nobody drew
outlines by hand. Free-standing cells are cut along a threshold and laid over each other (Brünggel, Vallotton,
Conway 2022), so the visible outline of each is known. Reads top to bottom: windows and masks, distances,
pasting, the network, its training.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from rbc_edge.errors import UnavailableError
from rbc_edge.values import Bool, Float32, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import iou
from rbc_edge.vision.preprocess import BACKGROUND_LEVEL, CROP_PX, PAD_VALUE, View
from rbc_train import networks, runs
from rbc_train.augment import vary
from studies import baseline_methods

CELL_PX: Final = 40.0
"""Diameter of a slide's red cell in a window, pixels."""
CELL_AREA: Final = math.pi / 4 * CELL_PX**2
CHECKPOINT: Final = "outlines.pt"

_NEAR_PX: Final = 8.0  # a detector's box may be so far off the cell that it means
_SAME_BOX: Final = 0.6  # iou of a cell's label with the box of its mask: labels are a tenth wider than cells
_CONVEX: Final = 0.9  # least area of a lone cell over its convex hull: less is two cells, or half of one
_APART_PX: Final = 2  # glass around a free-standing cell
_WINDOW: Final = 0.6  # watershed as `baselines` tuned it on train photographs
_TOP: Final = 0.9


def windows(view: View, centres: Float32, cell_diameter_px: float) -> tuple[UInt8, Float32]:
    """Cuts windows out of a view.

    Args:
        view: Of a field.
        centres: float32 (N, 2), pixels of the field.
        cell_diameter_px: Of the slide's red cells, pixels of the field.

    Returns:
        uint8 (N, 64, 64, 3), and what each shows, float32 (N, 4), pixels of the field.
    """
    side = max(1, round(CROP_PX / CELL_PX * view.shown_px(cell_diameter_px)))
    low = np.round(centres / view.px[:2] - side / 2)
    # Whole pixels: `crops` would widen others, and the masks would no longer lie on their cells.
    xyxy = np.concatenate([low, low + side], axis=1).astype(np.float32)
    return preprocess.crops(view.image, xyxy, margin=0.0), np.asarray(xyxy * view.px, np.float32)


def centres_of(xyxy: Float32) -> Float32:
    """Returns the middle of each box: float32 (N, 2)."""
    return np.asarray((xyxy[:, :2] + xyxy[:, 2:]) / 2, np.float32)


def otsu(window: UInt8) -> Bool:
    """Outlines the cell in the middle by Otsu's threshold: connected, holes filled. bool (64, 64)."""
    return _in_the_middle(_dark(window))


def watershed(window: UInt8) -> Bool:
    """Outlines the cell in the middle by Otsu's threshold and a watershed of distances. bool (64, 64)."""
    cells = _dark(window)
    basins, _ = baseline_methods.split(cells, np.zeros_like(cells), CELL_PX, _WINDOW, _TOP)
    region = np.maximum(basins - 1, 0).astype(np.uint8)
    # The lines around the regions belong to them, too: without them every cell loses a pixel.
    region[region == 0] = cv2.dilate(region, np.ones((3, 3), np.uint8))[region == 0]
    region[cells == 0] = 0
    return _nearest(region.astype(np.int32))


def _dark(window: UInt8) -> UInt8:
    """Returns what is darker than Otsu's threshold, pale middles filled: uint8 (64, 64), 0 or 1."""
    beyond = _beyond(window)
    green = np.where(beyond, np.uint8(BACKGROUND_LEVEL), window[:, :, 1])
    green = np.asarray(cv2.GaussianBlur(green, (0, 0), 0.7), np.uint8)
    if beyond.all():
        return np.zeros(green.shape, np.uint8)
    level, _ = cv2.threshold(green[~beyond][None], 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    dark = ((green <= level) & (green < green.max()) & ~beyond).astype(np.uint8)
    return baseline_methods.without_small_holes(dark, baseline_methods.PIERCED * CELL_AREA)


def _beyond(window: UInt8) -> Bool:
    """Returns what lies outside the field, with the pixels that resizing mixed: bool (64, 64)."""
    padded = (window == PAD_VALUE).all(axis=2).astype(np.uint8)
    return np.asarray(cv2.dilate(padded, np.ones((3, 3), np.uint8)) > 0, np.bool_)


def _in_the_middle(cells: UInt8) -> Bool:
    return _nearest(np.asarray(cv2.connectedComponents(cells, connectivity=4)[1], np.int32))


def _nearest(region: npt.NDArray[np.int32]) -> Bool:
    """Returns the region, from 1, that comes nearest to the middle. None where none is near."""
    rows, columns = np.nonzero(region)
    if len(rows) == 0:
        return np.zeros(region.shape, np.bool_)
    away = np.hypot(rows - (CROP_PX - 1) / 2, columns - (CROP_PX - 1) / 2)
    first = int(away.argmin())
    if away[first] > _NEAR_PX:
        return np.zeros(region.shape, np.bool_)
    return np.asarray(region == region[rows[first], columns[first]], np.bool_)


def mask_iou(a: Bool, b: Bool) -> float:
    """Returns the shared area of two masks over the area that both cover. 0 for two empty ones."""
    both = int((a | b).sum())
    return int((a & b).sum()) / both if both else 0.0


def boundary_distances(found: Bool, truth: Bool) -> Float32:
    """Measures how far two outlines lie apart.

    Args:
        found: bool (H, W).
        truth: bool (H, W).

    Returns:
        float32 (P,), pixels: from each pixel of either outline to the nearest one of the other. Empty where
        one of the masks is.
    """
    outlines = [_outline(found), _outline(truth)]
    if not all(o.any() for o in outlines):
        return np.zeros(0, np.float32)
    to = [cv2.distanceTransform((~o).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for o in outlines]
    return np.concatenate([to[1][outlines[0]], to[0][outlines[1]]]).astype(np.float32)


def _outline(mask: Bool) -> Bool:
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(mask & (inner == 0), np.bool_)


def aspect(mask: Bool) -> float:
    """Returns length over width of a mask, of the ellipse with the same second moments. NaN: empty."""
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    if moments["m00"] == 0:
        return math.nan
    # A pixel is a square, not a point: its own moment is a twelfth.
    xx, yy = (moments[k] / moments["m00"] + 1 / 12 for k in ("mu20", "mu02"))
    xy = moments["mu11"] / moments["m00"]
    low, high = np.linalg.eigvalsh(np.array([[xx, xy], [xy, yy]]))
    return float(np.sqrt(high / low))


# -- pasting ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Single:
    """A free-standing red cell.

    Attributes:
        window: uint8 (64, 64, 3), with the cell in the middle.
        mask: bool (64, 64), the cell.
        source: The camera.
    """

    window: UInt8
    mask: Bool
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """A cell with others over or under it.

    Attributes:
        window: uint8 (64, 64, 3), with the cell in the middle.
        mask: bool (64, 64), what is seen of the cell: all of it where light goes through the others.
        overlap: Share of the cell's area that another one shares, 0..1.
    """

    window: UInt8
    mask: Bool
    overlap: float


def free_standing(window: UInt8, box: Float32) -> Bool | None:
    """Outlines a cell that a threshold can be trusted with.

    Args:
        window: uint8 (64, 64, 3), with the cell in the middle.
        box: float32 (4,), its label, pixels of the window.

    Returns:
        bool (64, 64). None where the threshold does not agree with the label, or the cell is not alone.
    """
    dark = _dark(window)
    mask = _in_the_middle(dark)
    if mask[[0, -1]].any() or mask[:, [0, -1]].any() or not fits(mask, box):
        return None
    if mask.sum() < _CONVEX * _hull(mask).sum():
        return None
    around = cv2.dilate(mask.astype(np.uint8), np.ones((2 * _APART_PX + 1,) * 2, np.uint8))
    return None if ((around > mask) & ((dark > 0) | _beyond(window))).any() else mask


def fits(mask: Bool, box: Float32) -> bool:
    """Tells whether a mask has about the box (4,) of a label, pixels of the window."""
    if not mask.any():
        return False
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return bool(iou(np.array([[x, y, x + width, y + height]], np.float32), box[None])[0, 0] >= _SAME_BOX)


def _hull(mask: Bool) -> Bool:
    filled = np.zeros(mask.shape, np.uint8)
    points = cv2.findNonZero(mask.astype(np.uint8))
    cv2.fillConvexPoly(filled, cv2.convexHull(points), 1)
    return np.asarray(filled > 0, np.bool_)


def paste(base: Single, donors: Sequence[Single], rng: random.Random) -> Overlap:
    """Lays cells over and under the one in the middle.

    Light mostly goes through both cells, so transmittances multiply: ``I = I1 * I2 / I0``, or a little less
    dark, as cells that dried over each other are thinner there. One time in three a cell hides the other.

    Args:
        base: The cell in the middle.
        donors: Others of the same camera.
        rng: Source of chance.

    Returns:
        The window and the truth.
    """
    glass = _glass(base)
    image = base.window.astype(np.float32)
    own = _soft(base.mask)
    visible, covered = base.mask.copy(), np.zeros_like(base.mask)
    for donor in donors:
        through = np.clip(donor.window / _glass(donor), 0, 1.05).astype(np.float32)
        turned = rng.randrange(4), rng.random() < 0.5
        through, mask = _turned(through, *turned), _turned(donor.mask, *turned)
        shift = _place(base.mask, mask, rng)
        through = np.asarray(_shifted(through, shift, 1.0), np.float32)
        mask = _shifted(mask.astype(np.uint8), shift, 0) > 0
        soft = np.asarray(_shifted(_soft(_turned(donor.mask, *turned)), shift, 0.0), np.float32)
        kind = rng.random()
        if kind < 2 / 3:
            dried = 1.0 if rng.random() < 0.5 else rng.uniform(0.35, 1.0)
            image *= 1 - soft + soft * through ** (1 - (1 - dried) * own)
        elif kind < 5 / 6:  # over the cell
            image = image * (1 - soft) + soft * through * glass
            visible &= ~mask
        else:  # under it
            seen = soft * (1 - own)
            image *= 1 - seen + seen * through
        covered |= mask & base.mask
    share = covered.sum() / max(int(base.mask.sum()), 1)
    return Overlap(np.clip(image + 0.5, 0, 255).astype(np.uint8), visible, float(share))


def _glass(single: Single) -> Float32:
    """Returns the light beside a cell, float32 (3,)."""
    away = cv2.dilate(_dark(single.window), np.ones((5, 5), np.uint8)) == 0
    if not away.any():
        return np.full(3, BACKGROUND_LEVEL, np.float32)
    return np.asarray(np.maximum(np.median(single.window[away], axis=0), 1), np.float32)


def _soft(mask: Bool) -> Float32:
    """Returns a mask with a soft edge that holds the whole edge of the cell, float32 (64, 64, 1)."""
    grown = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(grown, (0, 0), 0.8), np.float32)[:, :, None]


def _turned(image: npt.NDArray[Any], quarters: int, mirrored: bool) -> npt.NDArray[Any]:
    turned = np.rot90(image, quarters)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


def _place(base: Bool, donor: Bool, rng: random.Random) -> tuple[int, int]:
    """Chooses where a donor lies, as a shift in x and y: from a small gap to three fifths of a cell deep."""
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(-0.1, 0.6) * CELL_PX
    towards = np.array([math.cos(angle), math.sin(angle)])
    reach = []
    middles = []
    for mask, sign in ((base, 1.0), (donor, -1.0)):
        xy = np.argwhere(mask)[:, ::-1]
        middles.append(xy.mean(axis=0))
        reach.append(float(((xy - middles[-1]) @ (sign * towards)).max()))
    shift = middles[0] - middles[1] + towards * (sum(reach) - depth)
    return round(float(shift[0])), round(float(shift[1]))


def _shifted(image: npt.NDArray[Any], shift: tuple[int, int], beyond: float) -> npt.NDArray[Any]:
    shape = image.shape
    moved = np.full(shape, beyond, image.dtype)
    (x, y), (height, width) = shift, shape[:2]
    if abs(x) < width and abs(y) < height:
        moved[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)] = image[
            max(-y, 0) : height + min(-y, 0), max(-x, 0) : width + min(-x, 0)
        ]
    return moved


def draw_overlaps(singles: Sequence[Single], n: int, rng: random.Random) -> list[Overlap]:
    """Pastes n windows. Most have one or two others, one in seven none."""
    of_source: dict[str, list[Single]] = {}
    for single in singles:
        of_source.setdefault(single.source, []).append(single)
    made = []
    for _ in range(n):
        own = of_source[rng.choice(sorted(of_source))]  # every camera the same weight
        others = rng.choice((0, 1, 1, 1, 2, 2, 3))
        made.append(paste(rng.choice(own), [rng.choice(own) for _ in range(others)], rng))
    return made


# -- the network ------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """A U-Net (Ronneberger, Fischer, Brox 2015) of 85,000 weights for windows of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 32, 48)
        self.down = nn.ModuleList(
            _convolutions((3, *widths)[i], width, 1 if i == 0 else 2) for i, width in enumerate(widths)
        )
        self.up = nn.ModuleList(
            _convolutions(widths[i] + widths[i + 1], widths[i], 1 if i else 2) for i in (2, 1, 0)
        )
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns log odds, (N, 64, 64), that a pixel is of the cell in the middle. x: (N, 3, 64, 64)."""
        passed: list[Tensor] = []
        for stage in self.down:
            x = stage(functional.max_pool2d(x, 2) if passed else x)
            passed.append(x)
        for stage, beside in zip(self.up, passed[-2::-1], strict=True):
            x = stage(torch.cat([functional.interpolate(x, scale_factor=2.0), beside], dim=1))
        return torch.as_tensor(self.out(x)[:, 0])


def _convolutions(before: int, after: int, n: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(n):
        layers += [
            nn.Conv2d(after if i else before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


@torch.no_grad()
def unet_masks(network: nn.Module, crops: UInt8) -> list[Bool]:
    """Outlines the cell in the middle of each window, uint8 (N, 64, 64, 3): N of bool (64, 64)."""
    network.eval()
    masks: list[Bool] = []
    for start in range(0, len(crops), 128):
        inside = network(networks.to_input(crops[start : start + 128])).numpy() > 0
        masks += [_in_the_middle(m) for m in inside.astype(np.uint8)]
    return masks


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How the U-Net is trained.

    Attributes:
        out: Folder of the run.
        epochs: How often new overlaps are pasted.
        windows: Pasted in each epoch.
        seed: Of everything random.
        threads: Of torch.
    """

    out: Path
    epochs: int = 8
    windows: int = 1536
    seed: int = 0
    threads: int = 2


def train(
    singles: Sequence[Single],
    options: TrainingOptions,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Trains the U-Net, or continues an earlier run with the same options.

    Random numbers depend on seed and epoch only, so a resumed run ends like one without interruption.

    Args:
        singles: Free-standing cells of train photographs.
        options: The run.
        progress: Called with (epochs done, epochs in all, a line of figures).

    Returns:
        The checkpoint.

    Raises:
        UnavailableError: If there are no cells to paste.
        UsageError: If the folder holds a run with other options.
    """
    if not singles:
        raise UnavailableError("no free-standing cell in the train photographs", "give the data with --data")
    runs.claim(options.out, {**asdict(options), "singles": len(singles)})
    done, kept = options.out / CHECKPOINT, options.out / "resume.pt"
    if done.is_file():
        return done
    runs.keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    network, first = UNet(), 0
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["epoch"])
    for epoch in range(first, options.epochs):
        rng = random.Random(options.seed * 100_003 + epoch)
        shown = [_varied(o, rng) for o in draw_overlaps(singles, options.windows, rng)]
        share = epoch / options.epochs
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
        loss = _run_epoch(
            network, optimizer, np.stack([s[0] for s in shown]), np.stack([s[1] for s in shown])
        )
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        runs.save(kept, state)
        if progress:
            progress(epoch + 1, options.epochs, f"loss {loss:.4f}")
    runs.save(done, {"network": network.state_dict(), "epochs": options.epochs})
    return done


def load(checkpoint: Path) -> tuple[UNet, int]:
    """Loads a trained U-Net, and how many epochs it was trained for.

    Raises:
        UnavailableError: If it is not there, or is something else.
    """
    network = UNet()
    try:
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        return network, int(state["epochs"])
    except Exception as error:  # torch.load has no error of its own for a wrong file
        raise UnavailableError(
            f"{checkpoint}: no U-Net of this study", "train it: python -m studies.outlines --train"
        ) from error


def _varied(overlap: Overlap, rng: random.Random) -> tuple[UInt8, Bool]:
    """Shows a window as a detector and another microscope might: off the middle, larger, at the border."""
    factor, dx, dy = rng.uniform(0.85, 1.15), rng.uniform(-3, 3), rng.uniform(-3, 3)
    middle = (CROP_PX - 1) / 2
    to = np.array(
        [[factor, 0, middle * (1 - factor) + dx], [0, factor, middle * (1 - factor) + dy]], np.float64
    )
    size = (CROP_PX, CROP_PX)
    window = cv2.warpAffine(overlap.window, to, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.warpAffine(overlap.mask.astype(np.float32), to, size, flags=cv2.INTER_LINEAR) > 0.5
    beyond = _beyond(np.asarray(window, np.uint8))
    window = vary(np.asarray(window, np.uint8), rng)
    window[beyond] = PAD_VALUE
    turned = rng.randrange(4), rng.random() < 0.5
    window, mask = _turned(window, *turned), _turned(mask, *turned)
    if rng.random() < 0.2:
        wide = rng.randint(4, 28)
        window[:wide], mask[:wide] = PAD_VALUE, False
        back = rng.randrange(4)
        window, mask = _turned(window, back, False), _turned(mask, back, False)
    return np.asarray(window, np.uint8), np.asarray(mask, np.bool_)


def _run_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, crops: UInt8, masks: Bool, batch: int = 16
) -> float:
    network.train()
    total = 0.0
    for start in range(0, len(crops), batch):
        truth = torch.from_numpy(masks[start : start + batch]).float()
        logits = network(networks.to_input(crops[start : start + batch]))
        inside = torch.sigmoid(logits)
        shared = 2 * (inside * truth).sum((1, 2)) + 1
        dice = 1 - (shared / (inside.sum((1, 2)) + truth.sum((1, 2)) + 1)).mean()
        loss = functional.binary_cross_entropy_with_logits(logits, truth) + dice
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(truth)
    return total / max(len(crops), 1)

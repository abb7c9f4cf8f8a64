"""Training of the second stage: the paper's two networks, and the one that the bundle ships.

The paper's networks learn single from overlapping. Ours also learn what is not one red cell: every box that
was looked at and holds something else, and boxes that are drawn wrong on purpose (`_wrong_boxes`).

Read it from top to bottom: the options, the samples, `train`. The networks are in `rbc_train.networks`.
"""

import csv
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.text import in_order
from rbc_edge.values import SHAPES, Bool, CellClass, Decoded, Float32, Int64, Shape, UInt8
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import iou
from rbc_train import metrics, networks, runs
from rbc_train.augment import drawn_shapes, paste_neighbour, vary
from rbc_train.data import Photograph, Split, labelled_diameter_px, photographs_of, source_diameters_px

LabelKind = Literal["weak", "verified", "taught"]


TAUGHT: Final = "taught.csv"
"""The file with the verdicts of the teachers on every training crop, in their folder."""


@dataclass(frozen=True, slots=True)
class ClassifierOptions:
    """How to train a classifier.

    Attributes:
        dataset: Folder that `write_dataset` wrote.
        data: Folder of the public data (the photographs are cut again for every epoch).
        out: Folder of this run: checkpoint, log, configuration.
        model: base and improved are the paper's. Station ships. Teachers teach it.
        labels: weak (Otsu area), verified, or taught (by teachers, and verified where there are any).
        detector: Detector checkpoint that station and teacher begin from. None begins from noise.
        taught: Folder of `teachers.teach`, for labels taught.
        folds: In how many parts the training photographs are cut. 0 for all of them.
        fold: The part that is left out.
        blocks: Whether a part is a block of neighbouring names, which are often of one slide, and not a draw.
        epochs: Passes over the training crops. None takes the model's own.
        crop_margin: Share of the box's side added on each of its four sides. None takes the model's own.
        paste: Share of single cells that get a pasted neighbour. None for 0.
        seed: Of everything random.
        threads: Of torch.
    """

    dataset: Path
    data: Path
    out: Path
    model: networks.ModelName = "station"
    labels: LabelKind = "verified"
    detector: Path | None = None
    taught: Path | None = None
    folds: int = 0
    fold: int = 0
    blocks: bool = False
    epochs: int | None = None
    crop_margin: float | None = None
    paste: float | None = None
    seed: int = 0
    threads: int = 2

    def complete(self) -> "ClassifierOptions":
        """Returns the options with the model's own values where none was given."""
        paper = self.model in networks.PAPER
        return replace(
            self,
            # Taught, an epoch has seven times the crops.
            epochs=self.epochs or (10 if paper else 16 if self.labels == "taught" else 30),
            crop_margin=(0.0 if paper else 0.25) if self.crop_margin is None else self.crop_margin,
            # Pasted overlaps were tried: with a share of 0.3, AUC on validation fell from 0.984 to 0.980.
            paste=self.paste or 0.0,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Labelled boxes of one split, with their photographs.

    Attributes:
        views: The photographs as the station shows them to its networks.
        view: int64 (N,), index into `views`.
        xyxy: float32 (N, 4), pixels of the photograph.
        overlapping: bool (N,), the label.
        target: float32 (N,), how much the label says overlapping, 0..1. NaN where that is not the question.
        refuse: float32 (N,), how much it says that the box holds no single red cell, 0..1. NaN: unknown.
        shape: int64 (N,), what an expert called it, as index into `SHAPES`. -1: nobody did.
        sides: float32 (N, 2), width and height in diameters of a red cell.
        letter: N letters of the verified label, "" where there is none.
        source: N cameras.
    """

    views: list[preprocess.View]
    view: Int64
    xyxy: Float32
    overlapping: Bool
    target: Float32
    refuse: Float32
    shape: Int64
    sides: Float32
    letter: list[str]
    source: list[str]

    def __len__(self) -> int:
        return len(self.view)

    def crops(self, margin: float, which: Sequence[int] | None = None) -> UInt8:
        """Cuts boxes as the station does: uint8 (N, 64, 64, 3). All, or `which`."""
        cut = [
            preprocess.cell_crops(self.views[int(self.view[i])], self.xyxy[i, None], margin=margin)
            for i in (range(len(self)) if which is None else which)
        ]
        return np.concatenate([np.zeros((0, preprocess.CROP_PX, preprocess.CROP_PX, 3), np.uint8), *cut])


def read_rows(dataset: Path, split: Split) -> list[dict[str, str]]:
    """Reads what the dataset says of each red-cell crop of one split, in the order of its crops.

    Raises:
        UnavailableError: If the dataset is not there, or not whole.
    """
    index = dataset / "crops" / f"{split}.csv"
    if not (dataset / "manifest.json").is_file():
        raise UnavailableError(f"{dataset}: not a finished dataset", "make it: python -m rbc_train dataset")
    with index.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_taught(folder: Path, dataset: Path) -> Float32:
    """Reads the verdicts of the teachers.

    Args:
        folder: Of the teachers.
        dataset: The dataset of the crops that they judged.

    Returns:
        float32 (N, 2): probability of overlapping, and of no single red cell, by crop of the dataset. NaN
        for crops that are not taught.

    Raises:
        UnavailableError: If there are no verdicts, or they are for another dataset.
    """
    file = folder / TAUGHT
    advice = "teach: python -m rbc_train teach"
    rows = read_rows(dataset, "train")
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            taught = list(csv.DictReader(stream))
        same = [(r["name"], r["x0"], r["y0"]) for r in taught] == [
            (r["name"], r["x0"], r["y0"]) for r in rows
        ]
        both = [(float(r["overlap_score"]), float(r["refuse_score"])) for r in taught]
        probability = np.array(both, np.float32).reshape(-1, 2)
    except (OSError, KeyError, ValueError) as error:
        raise UnavailableError(f"{file}: not a file of the teachers: {error}", advice) from error
    if not same:
        raise UnavailableError(f"{file}: these are not the crops of {dataset}", advice)
    return probability


def deal(rows: list[dict[str, str]], folds: int, *, blocks: bool = False) -> dict[str, int]:
    """Deals the photographs of the dataset into folds of equal size.

    Args:
        rows: What `read_rows` returned.
        folds: How many.
        blocks: Whether neighbours, in natural order of the names, are dealt together.

    Returns:
        The fold of each photograph, by its name. The same whenever the photographs are the same.
    """
    if blocks:
        ordered = in_order({row["name"] for row in rows})
        return {name: i * folds // len(ordered) for i, name in enumerate(ordered)}
    names = sorted({row["name"] for row in rows}, key=lambda n: hashlib.sha256(n.encode()).digest())
    return {name: i % folds for i, name in enumerate(names)}


def read_samples(
    dataset: Path,
    photographs: dict[str, Photograph],
    split: Split,
    kind: LabelKind,
    soft: Float32 | None = None,
    use: Callable[[str], bool] = lambda _name: True,
    *,
    others: bool = False,
) -> Samples:
    """Reads the labelled boxes of one split.

    Args:
        dataset: Folder that `write_dataset` wrote.
        photographs: Those that may be used, by name.
        split: train or val.
        kind: Which labels.
        soft: float32 (N, 2), for labels taught: what the teachers say of every crop of the split.
        use: Whether a photograph, by its name, takes part.
        others: Also read the boxes that are not one red cell, draw wrong ones, and read the cells that have
            no such label but a shape.

    Returns:
        The boxes that have such a label. Taught, a verified box stands twice: its target is the mean of
        label and teachers. The teachers soften a label that is wrong.

    Raises:
        UnavailableError: If the dataset or a photograph is not there.
    """
    rows = read_rows(dataset, split)
    refuse = np.zeros(len(rows), np.float32)
    if kind == "taught":
        if soft is None or len(soft) != len(rows):
            raise UnavailableError(
                f"{dataset}: {len(rows)} crops, {0 if soft is None else len(soft)} of them taught",
                "teach again: python -m rbc_train teach",
            )
        spread, verified = taught_rows(rows)
        hard = np.array([r["verified"] == "overlapping" for r in rows], np.float32)
        target, refuse = soft[:, 0].copy(), soft[:, 1].copy()
        target[verified] = (soft[verified, 0] + hard[verified]) / 2
        refuse[verified] /= 2
        chosen = [*spread, *verified]
    else:
        chosen = [i for i, row in enumerate(rows) if row[kind] and use(row["name"])]
        target = np.array([row[kind] == "overlapping" for row in rows], np.float32)
    # Several cells in the box: each of them overlaps, but it is no box of one.
    several = np.array([row["letter"][:1] == "M" for row in rows], np.bool_)
    refuse[several] = np.nan
    named = {row["name"] for row in rows}
    if missing := sorted(named - photographs.keys()):
        raise UnavailableError(f"{dataset}: {missing[0]} is not in the data", "make the dataset again")
    if others:
        formed = sorted({i for i, r in enumerate(rows) if r["shape"] and use(r["name"])} - set(chosen))
        target[formed], refuse[formed] = np.nan, 0
        chosen = [*chosen, *formed]
    rows = [rows[i] for i in chosen]
    target, refuse = target[chosen], refuse[chosen]
    if others:
        more = _negatives(dataset, split, use) + _wrong_boxes(rows, photographs)
        rows += more
        target = np.concatenate([target, np.full(len(more), np.nan, np.float32)])
        refuse = np.concatenate([refuse, np.ones(len(more), np.float32)])
    names = sorted({row["name"] for row in rows})
    number = {name: i for i, name in enumerate(names)}
    of_source = source_diameters_px(p for p in photographs.values() if p.split == "train")
    used = [photographs[name] for name in names]
    boxes = [[float(r[k]) for k in ("x0", "y0", "x1", "y1")] for r in rows]
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    # Experts see how large a cell is, not how large it is beside its neighbours. So the camera's diameter.
    camera_px = np.array([of_source.get(r["source"], math.nan) for r in rows], np.float32).reshape(-1, 1)
    return Samples(
        views=[p.view(labelled_diameter_px(p, of_source)) for p in used],
        view=np.array([number[r["name"]] for r in rows], np.int64),
        xyxy=xyxy,
        overlapping=target >= 0.5,
        target=target,
        refuse=refuse,
        shape=np.array([SHAPES.index(Shape(r["shape"])) if r.get("shape") else -1 for r in rows], np.int64),
        sides=np.nan_to_num((xyxy[:, 2:] - xyxy[:, :2]) / camera_px, nan=1.0),
        letter=[r["letter"] for r in rows],
        source=[r["source"] for r in rows],
    )


_MOST_TAUGHT: Final = 18
"""Crops of a photograph that are taught. A field of Chula has a hundred cells, and others teach, too."""


def taught_rows(rows: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Returns which crops are taught, spread evenly over each photograph, and those that were inspected."""
    return _spread(rows), [i for i, row in enumerate(rows) if row["verified"]]


def _spread(rows: list[dict[str, str]]) -> list[int]:
    """Chooses crops evenly, at most `_MOST_TAUGHT` of a photograph."""
    of: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of.setdefault(row["name"], []).append(i)
    return [
        own[round(k)]
        for own in of.values()
        for k in np.linspace(0, len(own) - 1, min(len(own), _MOST_TAUGHT))
    ]


_REFUSED: Final = ("wbc", "platelet", "nothing", "misfit", "clump")


def _negatives(dataset: Path, split: Split, use: Callable[[str], bool]) -> list[dict[str, str]]:
    """Reads the boxes of the dataset that are not one red cell. None where it was made without them."""
    file = dataset / "crops" / f"{split}-negatives.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [r for r in csv.DictReader(stream) if r["kind"] in _REFUSED and use(r["name"])]


_WRONG_A_PHOTOGRAPH: Final = 4
_WRONG_IOU: Final = 0.4  # a wrong box shares less with every cell


def _wrong_boxes(rows: list[dict[str, str]], photographs: dict[str, Photograph]) -> list[dict[str, str]]:
    """Draws boxes that no detector should give: beside a cell, on a part of it, around several, on glass.

    Drawn once, by the name of the photograph: chance is the same in every run.
    """
    made: list[dict[str, str]] = []
    for name in sorted({row["name"] for row in rows}):
        photograph, rng = photographs[name], random.Random(name)
        cells = photograph.xyxy
        red = cells[photograph.class_id == CellClass.RBC]
        if len(red) == 0:
            continue
        size = np.array([photograph.width_px, photograph.height_px] * 2, np.float32)
        for _ in range(_WRONG_A_PHOTOGRAPH):
            box = np.clip(_wrong(red, size, rng), 0, size).astype(np.float32)
            shown = box[2:] - box[:2]
            if shown.min() < 4 or iou(box[None], cells).max() > _WRONG_IOU:
                continue
            corners = dict(zip(("x0", "y0", "x1", "y1"), map(str, box.tolist()), strict=True))
            made.append({"name": name, "source": photograph.source, "letter": "", **corners})
    return made


def _wrong(red: Float32, size: Float32, rng: random.Random) -> Float32:
    """One wrong box, float32 (4,), by a cell of a photograph."""
    cell = red[rng.randrange(len(red))]
    side = np.tile(cell[2:] - cell[:2], 2)
    what = rng.randrange(4)
    if what == 0:  # beside: half of this cell, half of what is next to it
        angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.45, 0.75)
        return np.asarray(cell + side * far * np.array([math.cos(angle), math.sin(angle)] * 2), np.float32)
    if what == 1:  # a part
        part = rng.uniform(0.35, 0.6)
        low = cell[:2] + (1 - part) * side[:2] * np.array([rng.random(), rng.random()])
        return np.concatenate([low, low + part * side[:2]]).astype(np.float32)
    if what == 2:  # this cell and the nearest one
        away = np.abs((red[:, :2] + red[:, 2:] - cell[:2] - cell[2:]) / 2).sum(axis=1)
        if len(red) > 1:
            other = red[int(np.argsort(away)[1])]
            return np.concatenate([np.minimum(cell[:2], other[:2]), np.maximum(cell[2:], other[2:])])
    low = np.array([rng.uniform(0, s) for s in (size[:2] - side[:2]).clip(1).tolist()])
    return np.concatenate([low, low + side[:2]]).astype(np.float32)


class _Epoch(NamedTuple):
    """What one epoch shows: N crops and what is known of each."""

    crops: UInt8  # (N, 64, 64, 3)
    sides: Float32  # (N, 2)
    targets: Float32  # (N, 2), overlapping, and no single red cell. NaN where a crop does not say.
    shape: Int64  # (N,), -1 where a crop does not say


_FORMED_AN_EPOCH: Final = 12000
"""Cells that teach only their shape, in one epoch."""
_BALANCE: Final = 0.5
"""0 shows shapes as often as they occur, 1 all as often as another."""


def _shown(samples: Samples, rng: random.Random) -> list[int]:
    """Chooses samples: all that say overlapping or refused, and some that have a shape only."""
    formed = np.isnan(samples.target) & (samples.shape >= 0)
    only_form = np.flatnonzero(formed).tolist()
    often = np.bincount(samples.shape[formed], minlength=1)
    weights = [float(often[samples.shape[i]]) ** -_BALANCE for i in only_form]
    chosen = rng.choices(only_form, weights, k=min(len(only_form), _FORMED_AN_EPOCH)) if only_form else []
    return [*np.flatnonzero(~formed).tolist(), *chosen]


def _epoch_crops(samples: Samples, options: ClassifierOptions, rng: random.Random) -> _Epoch:
    """Cuts training boxes once, with the variation of other detectors and microscopes."""
    margin, paste = options.crop_margin or 0.0, options.paste or 0.0
    singles = [i for i in range(len(samples)) if samples.target[i] < 0.5]
    which = _shown(samples, rng)
    out = np.empty((len(which), preprocess.CROP_PX, preprocess.CROP_PX, 3), np.uint8)
    targets = np.stack([samples.target, samples.refuse], axis=1)[which]
    sides = samples.sides[which]
    plain = options.model in networks.PAPER
    for k, i in enumerate(which):
        view, box = samples.views[int(samples.view[i])], samples.xyxy[i]
        if samples.target[i] < 0.5 and rng.random() < paste:
            j = rng.choice(singles)
            touches = rng.random() < 0.7
            depth = rng.uniform(0.02, 0.5) if touches else -rng.uniform(0.1, 0.3)
            donor = samples.views[int(samples.view[j])]
            view, box = _pasted(view, box, donor, samples.xyxy[j], depth=depth, rng=rng)
            targets[k, 0] = float(touches)
        if not plain:
            # The detector's boxes are not the annotator's, and the scale of a slide is an estimate.
            side = np.tile(box[2:] - box[:2], 2)
            moved = side * np.array([rng.gauss(0, 0.03) for _ in range(4)], np.float32)
            box = box + moved
            sides[k] *= (1 + (moved[2:] - moved[:2]) / side[:2]) * rng.gauss(1, 0.04)
        crop = preprocess.cell_crops(view, box[None], margin=margin)[0]
        if not plain:
            crop = np.rot90(crop, rng.randrange(4))
            crop = vary(np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop), rng)
        elif options.model == "improved":
            noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.05 * 255, crop.shape)
            crop = np.clip(crop + noise, 0, 255).astype(np.uint8)  # the paper's noise-based augmentation
        out[k] = crop
    real = _Epoch(out, sides, targets, samples.shape[which])
    # Without a real shape none is learned.
    return real if plain or (samples.shape < 0).all() else _with_drawn(real, margin, rng)


_DRAWN_FIELDS: Final = 40
_DRAWN_CELLS: Final = 25  # in a field


def _with_drawn(real: _Epoch, margin: float, rng: random.Random) -> _Epoch:
    """Adds drawn cells of exact shapes to an epoch. They teach their shape alone."""
    parts = [real]
    for _ in range(_DRAWN_FIELDS):
        drawn, shapes = drawn_shapes(_DRAWN_CELLS, rng)
        view = preprocess.view(Decoded.of(drawn.image), drawn.cell_diameter_px)
        side = np.tile(drawn.xyxy[:, 2:] - drawn.xyxy[:, :2], 2)
        moved = np.array([[rng.gauss(0, 0.03) for _ in range(4)] for _ in shapes], np.float32)
        box = (drawn.xyxy + side * moved).astype(np.float32)
        crops = preprocess.cell_crops(view, box, margin=margin)
        parts.append(
            _Epoch(
                np.stack([vary(crop, rng) for crop in crops]),
                (box[:, 2:] - box[:, :2]) / np.float32(drawn.cell_diameter_px * rng.gauss(1, 0.04)),
                np.full((len(shapes), 2), np.nan, np.float32),
                np.array([SHAPES.index(shape) for shape in shapes], np.int64),
            )
        )
    return _Epoch(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _pasted(
    view: preprocess.View,
    box: Float32,
    donor: preprocess.View,
    donor_box: Float32,
    *,
    depth: float,
    rng: random.Random,
) -> tuple[preprocess.View, Float32]:
    """Pastes a neighbour (`paste_neighbour`): the part of the view around the cell, and its box there."""
    image, own = paste_neighbour(
        view.image, box / view.px, donor.image, donor_box / donor.px, depth=depth, rng=rng
    )
    return preprocess.View.of(image), own


_LOG_FIELDS: Final = ("epoch", "loss", "accuracy", "auc", "recall_single", "recall_overlapping")


def train(options: ClassifierOptions, progress: Callable[[int, int, str], None] | None = None) -> Path:
    """Trains, or continues an earlier run with the same options.

    Random numbers depend on seed and epoch only. So a resumed run ends like one without interruption.

    Args:
        options: The run. Written to ``config.json`` in its folder.
        progress: Called with (epochs done, epochs in all, a line of figures).

    Returns:
        The checkpoint ``classifier.pt``: weights of the last epoch (station: their running mean).

    Raises:
        UnavailableError: If the dataset or a photograph is not there.
        UsageError: If the folder holds a run with other options, or there are no labels to train on.
    """
    options = options.complete()
    epochs = options.epochs or 0
    config = runs.claim(options.out, asdict(options))
    done = options.out / "classifier.pt"
    if done.is_file():
        return done
    runs.keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    photographs = photographs_of(options.dataset, options.data)
    soft = read_taught(options.taught, options.dataset) if options.taught else None
    rows = read_rows(options.dataset, "train")
    dealt = deal(rows, options.folds, blocks=options.blocks) if options.folds else {}
    ours = options.model not in networks.PAPER
    training = read_samples(
        dataset=options.dataset,
        photographs=photographs,
        split="train",
        kind=options.labels,
        soft=soft,
        use=lambda name: dealt.get(name) != options.fold,
        others=ours,
    )
    # Whatever teaches, the verified labels judge.
    validation = read_samples(options.dataset, photographs, "val", "verified")
    if len(training) == 0:
        raise UsageError(f"{options.dataset}: no {options.labels} labels to train on")
    val_crops = validation.crops(options.crop_margin or 0.0)

    network = networks.build(options.model)
    if isinstance(network, networks.StagesNet) and options.detector is not None:
        network.begin_from(networks.load_detector(options.detector))
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)  # type: ignore[no-untyped-call]
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    optimizer = torch.optim.AdamW(_groups(network, options), lr=1e-3, weight_decay=0.02 if ours else 0)
    weights = torch.tensor(
        _class_weights(training.overlapping) if options.model == "improved" else (1.0, 1.0)
    )
    kept, first = options.out / "resume.pt", 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        network.load_state_dict(state["network"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["epoch"])
        _cut_log(options.out / "log.csv", first)
    judged = averaged.module if ours else network
    for epoch in range(first, epochs):
        torch.manual_seed(options.seed * 100_003 + epoch)
        rng = random.Random(options.seed * 100_003 + epoch)
        shown = _epoch_crops(training, options, rng)
        if ours:
            # Warm up, then down a cosine to a hundredth.
            share = epoch / max(epochs - 1, 1)
            rate = 1e-3 * min(1.0, (epoch + 1) / 3) * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
        # Teachers give probabilities; a label gives certainty, which no inspection has.
        smoothing = 0.015 if ours and options.labels != "taught" else 0.0
        loss = _run_epoch(
            network=network,
            averaged=averaged,
            optimizer=optimizer,
            shown=shown,
            weights=weights,
            smoothing=smoothing,
            calm=ours,
        )
        line = {"epoch": epoch + 1, "loss": loss, **_judge(judged, val_crops, validation.overlapping)}
        _log(options.out / "log.csv", line, first_row=epoch == 0)
        runs.save(
            kept,
            {
                "network": network.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
            },
        )
        if progress:
            progress(epoch + 1, epochs, "  ".join(f"{k} {v:.4f}" for k, v in line.items() if k != "epoch"))
    runs.save(done, {"network": judged.state_dict(), "config": config})
    return done


def _groups(network: nn.Module, options: ClassifierOptions) -> list[dict[str, Any]]:
    """Parameters by how fast they may move: stages that a detector has trained need less."""
    if not isinstance(network, networks.StagesNet):
        return [{"params": list(network.parameters()), "share": 1.0}]
    return [
        {"params": list(network.stages.parameters()), "share": 0.3 if options.detector else 1.0},
        {"params": [*network.head.parameters(), *network.shape_head.parameters()], "share": 1.0},
    ]


def _class_weights(overlapping: Bool) -> tuple[float, float]:
    """Inverse frequency of single and overlapping, mean 1 over the crops (paper, step 3: w_c)."""
    share = float(overlapping.mean())
    return (0.5 / max(1 - share, 1e-6), 0.5 / max(share, 1e-6))


def _run_epoch(
    network: nn.Module,
    averaged: "torch.optim.swa_utils.AveragedModel",
    optimizer: torch.optim.Optimizer,
    shown: _Epoch,
    weights: Tensor,
    *,
    smoothing: float,
    calm: bool,
    batch: int = 64,
) -> float:
    """One pass. `calm` bounds the gradient, which a pretrained network needs at first."""
    network.train()
    order = torch.randperm(len(shown.crops)).numpy()
    total = 0.0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        if len(chosen) < 2:
            continue  # batch normalisation needs two
        target = torch.from_numpy(shown.targets[chosen])
        x = networks.to_input(shown.crops[chosen])
        if isinstance(network, networks.StagesNet):
            logits = network(x, torch.from_numpy(shown.sides[chosen]))
            loss = _loss(logits[:, 1], target[:, 1], smoothing, torch.ones(2))
            loss = loss + _shape_loss(logits[:, 2:], torch.from_numpy(shown.shape[chosen]))
        else:
            logits, loss = network(x), torch.zeros(())
        loss = loss + _loss(networks.overlap_logits(logits), target[:, 0], smoothing, weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if calm:
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        averaged.update_parameters(network)
        total += loss.item() * len(chosen)
    return total / max(len(order), 1)


_SHAPE_SMOOTHING: Final = 0.05  # experts do not agree on one cell in ten


def _shape_loss(logits: Tensor, shape: Tensor) -> Tensor:
    """Cross entropy over the crops of which an expert named the shape. `logits` are float (N, S)."""
    says = shape >= 0
    losses = functional.cross_entropy(
        logits[says], shape[says], label_smoothing=_SHAPE_SMOOTHING, reduction="sum"
    )
    return losses / max(len(says), 1)


def _loss(logits: Tensor, target: Tensor, smoothing: float, weights: Tensor) -> Tensor:
    """Cross entropy over the crops that answer this question (target not NaN), by weight of the answer."""
    says = ~target.isnan()
    logits, target = logits[says], target[says]
    soft = target * (1 - 2 * smoothing) + smoothing
    losses = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return (losses * weights[target.round().long()]).sum() / max(len(says), 1)


def _judge(network: nn.Module, crops: UInt8, overlapping: Bool) -> dict[str, float]:
    verdicts = asdict(metrics.verdicts(networks.predict(network, crops), overlapping, 0.5))
    return {name: verdicts[name] for name in _LOG_FIELDS if name in verdicts}


def _cut_log(file: Path, epochs: int) -> None:
    """Drops lines that were logged after the last checkpoint: their epochs come again."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[: 1 + epochs]), encoding="utf-8")


def _log(file: Path, line: dict[str, float], *, first_row: bool) -> None:
    with file.open("w" if first_row else "a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _LOG_FIELDS, lineterminator="\n")
        if first_row:
            writer.writeheader()
        writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in line.items()})

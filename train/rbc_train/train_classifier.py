"""Training of the overlap classifier: the paper's two networks, and the one that the bundle ships.

Read it from top to bottom: the options, the samples, `train`. The networks are in `rbc_train.networks`.
"""

import csv
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import Bool, Float32, Int64, UInt8
from rbc_edge.vision import preprocess
from rbc_train import metrics, networks, runs
from rbc_train.augment import paste_neighbour, vary
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
        target: float32 (N,), how much the label says overlapping, 0..1.
        letter: N letters of the verified label, "" where there is none.
        source: N cameras.
    """

    views: list[preprocess.View]
    view: Int64
    xyxy: Float32
    overlapping: Bool
    target: Float32
    letter: list[str]
    source: list[str]

    def __len__(self) -> int:
        return len(self.view)

    def crops(self, margin: float) -> UInt8:
        """Cuts all boxes as the station does: uint8 (N, 64, 64, 3)."""
        cut = [
            preprocess.cell_crops(self.views[i], box[None], margin=margin)
            for i, box in zip(self.view.tolist(), self.xyxy, strict=True)
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
        float32 (N,): probability of overlapping, by crop of the dataset.

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
        probability = np.array([float(r["overlap_score"]) for r in taught], np.float32)
    except (OSError, KeyError, ValueError) as error:
        raise UnavailableError(f"{file}: not a file of the teachers: {error}", advice) from error
    if not same:
        raise UnavailableError(f"{file}: these are not the crops of {dataset}", advice)
    return probability


def deal(rows: list[dict[str, str]], folds: int) -> dict[str, int]:
    """Deals the photographs of the dataset into folds of equal size.

    Args:
        rows: What `read_rows` returned.
        folds: How many.

    Returns:
        The fold of each photograph, by its name. The same whenever the photographs are the same.
    """
    names = sorted({row["name"] for row in rows}, key=lambda n: hashlib.sha256(n.encode()).digest())
    return {name: i % folds for i, name in enumerate(names)}


def read_samples(
    dataset: Path,
    photographs: dict[str, Photograph],
    split: Split,
    kind: LabelKind,
    soft: Float32 | None = None,
    use: Callable[[str], bool] = lambda _name: True,
) -> Samples:
    """Reads the labelled boxes of one split.

    Args:
        dataset: Folder that `write_dataset` wrote.
        photographs: Those that may be used, by name.
        split: train or val.
        kind: Which labels.
        soft: float32 (N,), for labels taught: the teachers' probability for every crop of the split.
        use: Whether a photograph, by its name, takes part.

    Returns:
        The boxes that have such a label. Taught, a verified box stands twice: its target is the mean of
        label and teachers. The teachers soften a label that is wrong.

    Raises:
        UnavailableError: If the dataset or a photograph is not there.
    """
    rows = read_rows(dataset, split)
    if kind == "taught":
        if soft is None or len(soft) != len(rows):
            raise UnavailableError(
                f"{dataset}: {len(rows)} crops, {0 if soft is None else len(soft)} of them taught",
                "teach again: python -m rbc_train teach",
            )
        verified = [i for i, row in enumerate(rows) if row["verified"]]
        hard = np.array([r["verified"] == "overlapping" for r in rows], np.float32)
        target = soft.copy()
        target[verified] = (soft[verified] + hard[verified]) / 2
        chosen = [*range(len(rows)), *verified]
    else:
        chosen = [i for i, row in enumerate(rows) if row[kind] and use(row["name"])]
        target = np.array([row[kind] == "overlapping" for row in rows], np.float32)
    named = {row["name"] for row in rows}
    if missing := sorted(named - photographs.keys()):
        raise UnavailableError(f"{dataset}: {missing[0]} is not in the data", "make the dataset again")
    names = sorted({rows[i]["name"] for i in chosen})
    number = {name: i for i, name in enumerate(names)}
    rows = [rows[i] for i in chosen]
    target = target[chosen]
    of_source = source_diameters_px(p for p in photographs.values() if p.split == "train")
    used = [photographs[name] for name in names]
    boxes = [[float(r[k]) for k in ("x0", "y0", "x1", "y1")] for r in rows]
    return Samples(
        views=[p.view(labelled_diameter_px(p, of_source)) for p in used],
        view=np.array([number[r["name"]] for r in rows], np.int64),
        xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        overlapping=target >= 0.5,
        target=target,
        letter=[r["letter"] for r in rows],
        source=[r["source"] for r in rows],
    )


def _epoch_crops(samples: Samples, options: ClassifierOptions, rng: random.Random) -> tuple[UInt8, Float32]:
    """Cuts every training box once, with the variation of other detectors and microscopes.

    Returns:
        Crops uint8 (N, 64, 64, 3) and targets float32 (N,), 0 single, 1 overlapping.
    """
    margin, paste = options.crop_margin or 0.0, options.paste or 0.0
    singles = [i for i in range(len(samples)) if not samples.overlapping[i]]
    out = np.empty((len(samples), preprocess.CROP_PX, preprocess.CROP_PX, 3), np.uint8)
    targets = samples.target.copy()
    plain = options.model in networks.PAPER
    for i in range(len(samples)):
        view, box = samples.views[int(samples.view[i])], samples.xyxy[i]
        if not samples.overlapping[i] and rng.random() < paste:
            j = rng.choice(singles)
            touches = rng.random() < 0.7
            depth = rng.uniform(0.02, 0.5) if touches else -rng.uniform(0.1, 0.3)
            donor = samples.views[int(samples.view[j])]
            view, box = _pasted(view, box, donor, samples.xyxy[j], depth=depth, rng=rng)
            targets[i] = float(touches)
        if not plain:
            # The detector's boxes are not the annotator's.
            side = np.tile(box[2:] - box[:2], 2)
            box = box + side * np.array([rng.gauss(0, 0.03) for _ in range(4)], np.float32)
        crop = preprocess.cell_crops(view, box[None], margin=margin)[0]
        if not plain:
            crop = np.rot90(crop, rng.randrange(4))
            crop = vary(np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop), rng)
        elif options.model == "improved":
            noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.05 * 255, crop.shape)
            crop = np.clip(crop + noise, 0, 255).astype(np.uint8)  # the paper's noise-based augmentation
        out[i] = crop
    return out, targets


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
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    photographs = photographs_of(options.dataset, options.data)
    soft = read_taught(options.taught, options.dataset) if options.taught else None
    dealt = deal(read_rows(options.dataset, "train"), options.folds) if options.folds else {}
    training = read_samples(
        dataset=options.dataset,
        photographs=photographs,
        split="train",
        kind=options.labels,
        soft=soft,
        use=lambda name: dealt.get(name) != options.fold,
    )
    # Whatever teaches, the verified labels judge.
    validation = read_samples(options.dataset, photographs, "val", "verified")
    if len(training) == 0:
        raise UsageError(f"{options.dataset}: no {options.labels} labels to train on")
    val_crops = validation.crops(options.crop_margin or 0.0)

    network = networks.build(options.model)
    ours = options.model not in networks.PAPER
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
        crops, targets = _epoch_crops(training, options, rng)
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
            crops=crops,
            targets=targets,
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
        {"params": list(network.head.parameters()), "share": 1.0},
    ]


def _class_weights(overlapping: Bool) -> tuple[float, float]:
    """Inverse frequency of single and overlapping, mean 1 over the crops (paper, step 3: w_c)."""
    share = float(overlapping.mean())
    return (0.5 / max(1 - share, 1e-6), 0.5 / max(share, 1e-6))


def _run_epoch(
    network: nn.Module,
    averaged: "torch.optim.swa_utils.AveragedModel",
    optimizer: torch.optim.Optimizer,
    crops: UInt8,
    targets: Float32,
    weights: Tensor,
    *,
    smoothing: float,
    calm: bool,
    batch: int = 64,
) -> float:
    """One pass. `calm` bounds the gradient, which a pretrained network needs at first."""
    network.train()
    order = torch.randperm(len(crops)).numpy()
    total = 0.0
    for start in range(0, len(crops), batch):
        chosen = order[start : start + batch]
        if len(chosen) < 2:
            continue  # batch normalisation needs two
        target = torch.from_numpy(targets[chosen])
        logits = network(networks.to_input(crops[chosen]))
        soft = target * (1 - 2 * smoothing) + smoothing
        losses = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
        loss = (losses * weights[target.round().long()]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if calm:
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        averaged.update_parameters(network)
        total += loss.item() * len(chosen)
    return total / max(len(crops), 1)


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

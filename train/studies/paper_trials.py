"""Gurav, Yadav, Taral (2025) again: both experiments over many draws, and their fifth objective.

Reads top to bottom: recipes (a network and how it is taught), the crops, `teach`, the plan of trials, `run`.
A trial draws crops by its seed, trains one network with them and judges it on the verified labels of
validation photographs. `paper` makes tables and charts of the trials.
"""

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.values import Bool, Float32, Int64, UInt8
from rbc_train import labels, metrics, networks, runs, train_classifier
from rbc_train.augment import vary
from rbc_train.data import Photograph, Split, read_public, sha256

Part = Literal["experiments", "learning", "ablations"]
Study = Literal["experiment", "shuffled", "curve", "mix", "ablation"]

PARTS: Final[tuple[Part, ...]] = ("experiments", "learning", "ablations")
ROC_GRID: Final = np.linspace(0, 1, 41)
"""Shares of single cells called overlapping at which a trial notes its ROC."""

BATCHES: Final = (32, 4)
"""Crops a step in the experiments. The paper gives none. 32 is Keras's own, and takes all crops at once."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One of the paper's two experiments.

    Attributes:
        train: Single and overlapping crops that teach.
        test: Single and overlapping crops that judge. The paper prints only their sum. Its recalls and
            precisions leave no other numbers.
        confusion: Of the test crops, as its figures imply: single called single, single called
            overlapping, overlapping called single, overlapping called overlapping.
        auc: Printed area under the ROC curve. NaN where there is none.
    """

    train: tuple[int, int]
    test: tuple[int, int]
    confusion: tuple[int, int, int, int]
    auc: float = float("nan")

    @property
    def n(self) -> int:
        """Crops in all."""
        return sum(self.train) + sum(self.test)

    def printed(self) -> dict[str, float]:
        """The paper's figures, from the confusion that they imply. It prints 0 for 0/0."""
        ss, so, os, oo = self.confusion

        def share(a: int, b: int) -> float:
            return a / b if b else 0.0

        return {
            "accuracy": (ss + oo) / (ss + so + os + oo),
            "precision_single": share(ss, ss + os),
            "recall_single": share(ss, ss + so),
            "f1_single": share(2 * ss, 2 * ss + so + os),
            "precision_overlapping": share(oo, oo + so),
            "recall_overlapping": share(oo, oo + os),
            "f1_overlapping": share(2 * oo, 2 * oo + so + os),
            "auc": self.auc,
        }


EXPERIMENTS: Final[dict[str, Experiment]] = {
    "base": Experiment(train=(5, 8), test=(3, 3), confusion=(0, 3, 0, 3)),
    "improved": Experiment(train=(10, 18), test=(7, 3), confusion=(7, 0, 2, 1), auc=0.81),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network and how it is taught. As it stands: the paper's improved CNN, with inputs centred.

    Attributes:
        station: The network that ships, on crops with margin and varied, instead of the paper's CNN.
        dropout: Before both fully connected layers.
        noise: Standard deviation of the noise added to training crops, share of full brightness.
        class_weights: Weigh the loss by the inverse frequency of the classes (paper, step 3).
        focal: Focal loss with gamma 2 (Lin et al. 2017).
        squeeze: Squeeze-and-excitation after each convolution (Hu et al. 2018).
        centred: Give the network brightness less one half. The paper says nothing of it.
        decays: Let Adam's rate fall to nothing along a cosine, so that the last step is no lottery.
    """

    station: bool = False
    dropout: float = 0.5
    noise: float = 0.05
    class_weights: bool = True
    focal: bool = False
    squeeze: bool = False
    centred: bool = True
    decays: bool = True


REFERENCE: Final = Recipe()
PRINTED: Final = {
    "base": Recipe(dropout=0.0, noise=0.0, class_weights=False, centred=False, decays=False),
    "improved": Recipe(centred=False, decays=False),
}
"""The paper's two networks as it describes them."""

STATION: Final = Recipe(station=True, noise=0.0, class_weights=False)
ABLATIONS: Final = {
    "without dropout": replace(REFERENCE, dropout=0.0),
    "without noise": replace(REFERENCE, noise=0.0),
    "without class weights": replace(REFERENCE, class_weights=False),
    "without all three": replace(REFERENCE, dropout=0.0, noise=0.0, class_weights=False),
    "with focal loss": replace(REFERENCE, focal=True),
    "with squeeze-and-excitation": replace(REFERENCE, squeeze=True),
    "inputs not centred": replace(REFERENCE, centred=False),
}
"""One thing changed at a time, from `REFERENCE`."""


MIXED: Final = {
    "with class weights": REFERENCE,
    "without": ABLATIONS["without class weights"],
}
"""What is taught by unequal classes."""

LONGER: Final[tuple[tuple[train_classifier.LabelKind, int], ...]] = (
    ("weak", 0),
    ("verified", 0),
    ("weak", -1),
)
"""Labels and numbers of crops (see `Task`) that teach for longer."""


class _Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


def build(recipe: Recipe) -> nn.Module:
    """Builds the network of a recipe: crops float (N, 3, 64, 64) in 0..1 to logits float (N,)."""
    if recipe.station:
        logging.getLogger("ultralytics").setLevel(logging.WARNING)  # it greets every network it builds
        return networks.build("station")
    network = networks.PaperNet(recipe.dropout)
    if recipe.squeeze:
        first, relu, pool, second, relu2, pool2 = network.features
        network.features = nn.Sequential(
            first, relu, SqueezeExcitation(32, 8), pool, second, relu2, SqueezeExcitation(64, 8), pool2
        )
    return nn.Sequential(_Centred(), network) if recipe.centred else network


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """Red cells of one split, as both networks see them, with both kinds of labels.

    Attributes:
        tight: uint8 (N, 64, 64, 3), cut without margin, as the paper does.
        wide: uint8 (N, 64, 64, 3), cut with the dataset's margin, for the network that ships.
        weak: bool (N,), overlapping by the area rule.
        area: int64 (N,), the area that the rule judges by.
        verified: bool (N,), overlapping by inspection. False where `known` is.
        known: bool (N,), whether there is a verified label.
        source: str (N,), the camera.
    """

    tight: UInt8
    wide: UInt8
    weak: Bool
    area: Int64
    verified: Bool
    known: Bool
    source: "np.ndarray[Any, np.dtype[np.str_]]"

    def __len__(self) -> int:
        return len(self.weak)

    def take(self, which: Int64) -> "Crops":
        """Returns the crops of these indices, int64 (M,)."""
        return Crops(*(getattr(self, name)[which] for name in Crops.__slots__))


def read_crops(dataset: Path, data: Path) -> tuple[Crops, Crops]:
    """Reads the crops of both splits.

    Args:
        dataset: Folder that `write_dataset` wrote.
        data: Folder of the public data: the paper's crops have no margin, so they are cut again.

    Returns:
        All training crops, and the validation crops that have a verified label.

    Raises:
        UnavailableError: If the dataset or a photograph is not there.
    """
    photographs = {p.name: p for p in read_public(data)[0].photographs}
    train = _read_split(dataset, photographs, "train")
    val = _read_split(dataset, photographs, "val")
    return train, val.take(np.flatnonzero(val.known))


def _read_split(dataset: Path, photographs: dict[str, Photograph], split: Split) -> Crops:
    # Every crop has a weak label, so these are all of them, in the order of the index.
    samples = train_classifier.read_samples(dataset, photographs, split, "weak")
    tight = samples.crops(0.0)
    file = dataset / "crops" / f"{split}.npy"
    verified = np.array([row["verified"] for row in train_classifier.read_rows(dataset, split)], np.str_)
    try:
        wide = np.load(file)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{file}: cannot be read: {error}", "make the dataset again") from error
    if not len(samples) == len(verified) == len(wide):
        raise UnavailableError(f"{file}: not the crops of its index", "make the dataset again")
    return Crops(
        tight=tight,
        wide=wide,
        weak=samples.overlapping,
        area=labels.otsu_area(tight),
        verified=verified == "overlapping",
        known=verified != "",
        source=np.array(samples.source, np.str_),
    )


def teach(
    recipe: Recipe,
    crops: Crops,
    overlapping: Bool,
    *,
    steps: int,
    seed: int,
    batch: int = 32,
    begin: nn.Module | None = None,
) -> nn.Module:
    """Trains a network. The result depends on the seed and the arguments only.

    Args:
        recipe: Network and loss.
        crops: N of them.
        overlapping: bool (N,), the label that teaches.
        steps: Of the optimizer, whatever N.
        batch: Crops of a step. All of them when there are fewer.
        begin: Detector. The station's network begins from its first stages. None begins from noise.
        seed: Of initialisation, order, dropout and noise.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    network = build(recipe)
    slow: list[nn.Parameter] = []
    if begin is not None and isinstance(network, networks.StagesNet):
        network.begin_from(begin)
        slow = list(network.stages.parameters())  # what a detector has trained needs less
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    known = {id(p) for p in slow}
    fast = [p for p in network.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW(
        [{"params": fast, "lr": 1e-3}, {"params": slow, "lr": 3e-4}],
        weight_decay=0.02 if recipe.station else 0.0,
    )
    weights = torch.ones(2)
    if recipe.class_weights:
        share = float(np.clip(overlapping.mean(), 0.01, 0.99))
        weights = torch.tensor([0.5 / (1 - share), 0.5 / share])
    seen = crops.wide if recipe.station else crops.tight
    # Three times as quick, where the processor knows it; otherwise it is emulated, and slow.
    short = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    network.train()
    for chosen in _batches(len(crops), steps, batch):
        cut = np.stack([_turned(c, rng) for c in seen[chosen]]) if recipe.station else seen[chosen]
        x = networks.to_input(cut)
        if recipe.noise:
            x = (x + recipe.noise * torch.randn_like(x)).clamp(0, 1)
        target = torch.from_numpy(overlapping[chosen].astype(np.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=short):
            logits = networks.overlap_logits(network(x))
        losses = functional.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        if recipe.focal:
            losses = focal(losses)
        loss = (losses * weights[target.long()]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.station:
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        if recipe.decays:
            schedule.step()
    return network


def focal(cross_entropy: Tensor) -> Tensor:
    """Weighs cross entropy by how uncertain the network was (Lin et al. 2017, equation 4, gamma 2).

    Args:
        cross_entropy: float (N,), of each crop.

    Returns:
        float (N,).
    """
    return (1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy  # exp(-loss): the right class's probability


def _batches(n: int, steps: int, batch: int) -> Iterator[Int64]:
    """Goes through all crops, each time in a new order."""
    left: Int64 = np.zeros(0, np.int64)
    size = min(batch, n)
    for _ in range(steps):
        if len(left) < size:
            left = np.concatenate([left, torch.randperm(n).numpy()])
        yield left[:size]
        left = left[size:]


def _turned(crop: UInt8, rng: random.Random) -> UInt8:
    turned = np.rot90(crop, rng.randrange(4))
    return vary(np.ascontiguousarray(turned[:, ::-1] if rng.random() < 0.5 else turned), rng)


@dataclass(frozen=True, slots=True)
class Task:
    """What one trial does.

    Attributes:
        study: What it belongs to.
        name: Its recipe, for readers.
        recipe: Its recipe.
        labels: weak or verified: what teaches.
        n: Crops drawn. 0 for all that have a verified label, -1 for all.
        seed: Of the draw and of `teach`. Tasks of one seed and size teach with the same crops.
        steps: Of the optimizer.
        batch: Crops of a step.
        share: Share of overlapping crops among those drawn. NaN as it comes.
    """

    study: Study
    name: str
    recipe: Recipe
    labels: train_classifier.LabelKind
    n: int
    seed: int
    steps: int
    batch: int = 32
    share: float = float("nan")

    @property
    def key(self) -> str:
        """Names the task. A change of its recipe makes it another."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.study}-{self.name}-{self.labels}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Trial:
    """A task, and what came of it.

    Attributes:
        task: The task.
        n_crops: Crops that taught.
        verdicts: `metrics.Verdicts` as a dictionary, on the verified labels of validation photographs.
        bccd: Accuracy on those of BCCD alone.
        roc: Share of overlapping cells found on them at each of `ROC_GRID`.
        score: Scores of the experiment's own test crops. Empty elsewhere.
        weak: Their weak labels.
        verified: Their verified labels.
    """

    task: Task
    n_crops: int
    verdicts: dict[str, float] = field(default_factory=dict)
    bccd: float = float("nan")
    roc: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    weak: list[bool] = field(default_factory=list)
    verified: list[bool] = field(default_factory=list)

    @property
    def scores(self) -> Float32:
        """float32 (N,), scores of its own test crops."""
        return np.array(self.score, np.float32)

    @property
    def confusion(self) -> tuple[int, int, int, int]:
        """Of its own test crops by weak labels, in the order of `Experiment.confusion`."""
        called, label = self.scores >= 0.5, np.array(self.weak, np.bool_)
        ss, so, os, oo = (
            int(((label == a) & (called == b)).sum()) for a in (False, True) for b in (False, True)
        )
        return ss, so, os, oo

    @property
    def calls_all_alike(self) -> bool:
        """Whether it calls all its own test crops the same."""
        ss, so, os, oo = self.confusion
        return ss + os == 0 or so + oo == 0

    def on_own_test(self, kind: train_classifier.LabelKind) -> dict[str, float]:
        """`metrics.Verdicts` on its own test crops, by weak or verified labels."""
        label = np.array(self.weak if kind == "weak" else self.verified, np.bool_)
        return zeros(asdict(metrics.verdicts(self.scores, label, 0.5)))


def zeros(verdicts: dict[str, float]) -> dict[str, float]:
    """Counts the precision of a class that is never called as 0, as the paper does."""
    undefined = {
        f"precision_{c}": 0.0
        for c in ("single", "overlapping")
        if math.isnan(verdicts[f"precision_{c}"]) and not math.isnan(verdicts[f"recall_{c}"])
    }
    return {**verdicts, **undefined}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is tried: what one core does in half an hour.

    Attributes:
        seeds: Draws of each experiment.
        epochs: Passes over the crops of an experiment (paper, step 4).
        sizes: Crops on the learning curves. 0 for all that have a verified label.
        curve_seeds: Draws of each size.
        steps: Of the optimizer, on the curves and after, whatever the number of crops.
        long_steps: Of those that are taught by all crops once more, for longer, and by all weak labels.
        long_seeds: Seeds of that.
        mixes: Shares of overlapping crops.
        mix_size: Crops of each mix.
        mix_seeds: Draws of each mix.
        ablation_seeds: Seeds of each ablation.
    """

    seeds: int = 30
    epochs: int = 10
    sizes: tuple[int, ...] = (19, 38, 76, 152, 304, 608, 1216, 0)
    curve_seeds: int = 3
    steps: int = 200
    long_steps: int = 800
    long_seeds: int = 2
    mixes: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    mix_size: int = 608
    mix_seeds: int = 3
    ablation_seeds: int = 5

    def tasks(self, part: Part) -> list[Task]:
        """Returns the tasks of one part, in the order they run."""
        if part == "experiments":
            return [task for seed in range(self.seeds) for task in _experiments(seed, self.epochs)]
        return self._curves() if part == "learning" else self._ablations()

    def _curves(self) -> list[Task]:
        seeds = range(self.curve_seeds)
        curves = [task for n in self.sizes for seed in seeds for task in self._curve(n, seed, self.steps)]
        # All weak labels there are, and the same time for the crops that have both.
        longer = [
            Task(
                study="curve",
                name="improved",
                recipe=REFERENCE,
                labels=kind,
                n=n,
                seed=seed,
                steps=self.long_steps,
            )
            for seed in range(self.long_seeds)
            for kind, n in LONGER
        ]
        return curves + longer

    def _curve(self, n: int, seed: int, steps: int) -> list[Task]:
        return [
            Task(
                study="curve", name="improved", recipe=REFERENCE, labels="weak", n=n, seed=seed, steps=steps
            ),
            Task(
                study="curve",
                name="improved",
                recipe=REFERENCE,
                labels="verified",
                n=n,
                seed=seed,
                steps=steps,
            ),
            Task(
                study="curve", name="station", recipe=STATION, labels="verified", n=n, seed=seed, steps=steps
            ),
        ]

    def _ablations(self) -> list[Task]:
        ablations = [
            Task(
                study="ablation",
                name=name,
                recipe=recipe,
                labels="verified",
                n=0,
                seed=seed,
                steps=self.steps,
            )
            for seed in range(self.ablation_seeds)
            for name, recipe in ABLATIONS.items()
        ]
        # The reference is the end of a learning curve.
        reference = [
            Task(
                study="curve",
                name="improved",
                recipe=REFERENCE,
                labels="verified",
                n=0,
                seed=seed,
                steps=self.steps,
            )
            for seed in range(self.ablation_seeds)
        ]
        mixes = [
            Task(
                study="mix",
                name=name,
                recipe=recipe,
                labels="verified",
                n=self.mix_size,
                seed=seed,
                steps=self.steps,
                share=share,
            )
            for share in self.mixes
            for seed in range(self.mix_seeds)
            for name, recipe in MIXED.items()
        ]
        return reference + ablations + mixes


def _experiments(seed: int, epochs: int) -> Iterator[Task]:
    for own, size in EXPERIMENTS.items():
        n_train = sum(size.train)
        for batch in BATCHES:
            steps = math.ceil(epochs * n_train / min(batch, n_train))
            for name, recipe in PRINTED.items():
                # Each network with each size, once: what did the network do, and what the crops?
                if name == own or batch == BATCHES[0]:
                    yield Task(
                        study="experiment",
                        name=name,
                        recipe=recipe,
                        labels="weak",
                        n=size.n,
                        seed=seed,
                        steps=steps,
                        batch=batch,
                    )
            yield Task(
                study="shuffled",
                name=own,
                recipe=PRINTED[own],
                labels="weak",
                n=size.n,
                seed=seed,
                steps=steps,
                batch=batch,
            )


def perform(task: Task, train: Crops, val: Crops, begin: nn.Module | None = None) -> Trial:
    """Does one task.

    Args:
        task: What to do.
        train: Training crops.
        val: Validation crops with verified labels.
        begin: Detector that the station's network begins from.

    Returns:
        The trial.

    Raises:
        UsageError: If there are too few crops to draw from.
    """
    if task.study in ("experiment", "shuffled"):
        return _experiment(task, train, val)
    taught = train if task.n < 0 else train.take(_draw(task, train))
    target = taught.weak if task.labels == "weak" else taught.verified
    network = teach(
        task.recipe, taught, target, steps=task.steps, seed=task.seed, batch=task.batch, begin=begin
    )
    return _judged(Trial(task, len(taught)), network, val)


def _experiment(task: Task, train: Crops, val: Crops) -> Trial:
    size = next(e for e in EXPERIMENTS.values() if e.n == task.n)
    rng = np.random.default_rng([task.seed, task.n])
    teaching, testing = [], []
    for label in (False, True):
        # BCCD's, as in the paper; those with both labels, so that both can judge.
        pool = np.flatnonzero((train.source == "bccd") & train.known & (train.weak == label))
        drawn = _some(pool, size.train[label] + size.test[label], rng)
        teaching.append(drawn[: size.train[label]])
        testing.append(drawn[size.train[label] :])
    taught, tested = train.take(np.concatenate(teaching)), train.take(np.concatenate(testing))
    target = rng.permutation(taught.weak) if task.study == "shuffled" else taught.weak
    network = teach(task.recipe, taught, target, steps=task.steps, seed=task.seed, batch=task.batch)
    trial = Trial(
        task,
        len(taught),
        score=networks.predict(network, tested.tight).tolist(),
        weak=tested.weak.tolist(),
        verified=tested.verified.tolist(),
    )
    return trial if task.study == "shuffled" else _judged(trial, network, val)


def _draw(task: Task, train: Crops) -> Int64:
    known = np.flatnonzero(train.known)
    if task.n == 0:
        return known
    rng = np.random.default_rng([task.seed, task.n])
    if np.isnan(task.share):
        return _some(known, task.n, rng)
    n_overlapping = round(task.share * task.n)
    overlapping = train.verified[known]
    return np.concatenate(
        [
            _some(known[~overlapping], task.n - n_overlapping, rng),
            _some(known[overlapping], n_overlapping, rng),
        ]
    )


def _some(pool: Int64, n: int, rng: np.random.Generator) -> Int64:
    if n > len(pool):
        raise UsageError(
            f"{n} crops are to be drawn where the dataset has {len(pool)}",
            "make the dataset from the whole public data: python -m rbc_train dataset",
        )
    return rng.choice(pool, n, replace=False)


def _judged(trial: Trial, network: nn.Module, val: Crops) -> Trial:
    score = networks.predict(network, val.wide if trial.task.recipe.station else val.tight)
    curve = metrics.roc(score, val.verified)
    own = val.source == "bccd"
    return replace(
        trial,
        verdicts=asdict(metrics.verdicts(score, val.verified, 0.5)),
        bccd=metrics.verdicts(score[own], val.verified[own], 0.5).accuracy,
        roc=np.interp(ROC_GRID, curve.false_positive, curve.true_positive).tolist(),
    )


def run(
    plan: Plan,
    parts: Sequence[Part],
    crops: tuple[Crops, Crops],
    work: Path,
    *,
    claim: Mapping[str, Any],
    begin: nn.Module | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Trial]:
    """Runs the tasks of a plan that are not done yet.

    Each finished trial is a line of ``trials.jsonl``: a command that was cut goes on where it was.

    Args:
        plan: How much is tried.
        parts: Which of it.
        crops: What `read_crops` returned.
        work: Folder of the trials.
        claim: All that makes these trials what they are, beside their tasks.
        begin: Detector that the station's network begins from.
        progress: Called with (tasks done, tasks in all, a line of figures).

    Returns:
        The trials of all parts that are done, those not asked for now included.

    Raises:
        UsageError: If the folder holds trials with another claim, or there are too few crops.
        UnavailableError: If the trials cannot be read or written.
    """
    networks = "".join(repr(build(r)) for r in (REFERENCE, STATION))  # other networks, other trials
    runs.claim(work, {**claim, "networks": hashlib.sha256(networks.encode()).hexdigest()})
    file = work / "trials.jsonl"
    planned = {part: {task.key: task for task in plan.tasks(part)} for part in PARTS}
    done = _read_trials(file, {key: task for tasks in planned.values() for key, task in tasks.items()})
    wanted = {key: task for part in parts for key, task in planned[part].items()}
    for number, (key, task) in enumerate(wanted.items(), start=1):
        if key not in done:
            done[key] = perform(task, *crops, begin)
            _append(file, key, done[key])
        if progress:
            progress(number, len(wanted), _line(done[key]))
    finished = [tasks for tasks in planned.values() if tasks.keys() <= done.keys()]
    return [done[key] for key in {key: None for tasks in finished for key in tasks}]


def _line(trial: Trial) -> str:
    task = trial.task
    judged = trial.verdicts or trial.on_own_test("weak")
    words = f"{task.study} {task.name}, {task.labels} labels, {trial.n_crops} crops"
    return f"{words}: accuracy {judged['accuracy']:.3f}"


def _read_trials(file: Path, tasks: Mapping[str, Task]) -> dict[str, Trial]:
    if not file.is_file():
        return {}
    found: dict[str, Trial] = {}
    whole = 0
    with file.open("rb") as stream:
        for line in stream:
            try:
                content = json.loads(line)
                key, figures = content["key"], content["trial"]
            except (ValueError, KeyError):
                break  # a kill cut this line; what follows was never written
            whole += len(line)
            if key in tasks:
                found[key] = Trial(tasks[key], **figures)
    if whole < file.stat().st_size:
        with file.open("r+b") as stream:
            stream.truncate(whole)
    return found


def _append(file: Path, key: str, trial: Trial) -> None:
    figures = {k: v for k, v in asdict(trial).items() if k != "task"}
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "trial": figures}) + "\n")
    except OSError as error:
        raise UnavailableError(
            f"{file}: {error.strerror}", "free some space, or choose another --work"
        ) from error


@dataclass(frozen=True, slots=True)
class RuleFigures:
    """What the area rule and plain guessing are worth, on verified labels.

    Attributes:
        n_train: Training crops, all with a weak label.
        n_train_known: Those with a verified label.
        train_agreement: Share of them where both labels agree.
        bccd: Single and overlapping crops of BCCD's training photographs: weak, then verified labels.
        n_val: Validation crops, all with a verified label.
        val_agreement: Share of them where both labels agree: the accuracy of the rule.
        val_auc: AUC of the area.
        val_majority: Accuracy of calling all of them what most are.
    """

    n_train: int
    n_train_known: int
    train_agreement: float
    bccd: tuple[tuple[int, int], tuple[int, int]]
    n_val: int
    val_agreement: float
    val_auc: float
    val_majority: float


def judge_rule(train: Crops, val: Crops) -> RuleFigures:
    """Judges the area rule by the verified labels.

    Args:
        train: Training crops.
        val: Validation crops with verified labels.

    Returns:
        The figures.
    """
    own = train.known & (train.source == "bccd")
    n = int(own.sum())
    weak, verified = int(train.weak[own].sum()), int(train.verified[own].sum())
    share = float(val.verified.mean()) if len(val) else float("nan")
    return RuleFigures(
        n_train=len(train),
        n_train_known=int(train.known.sum()),
        train_agreement=_agreement(train.take(np.flatnonzero(train.known))),
        bccd=((n - weak, weak), (n - verified, verified)),
        n_val=len(val),
        val_agreement=_agreement(val),
        val_auc=metrics.auc(val.area.astype(np.float32), val.verified),
        val_majority=max(share, 1 - share),
    )


def _agreement(crops: Crops) -> float:
    return float((crops.weak == crops.verified).mean()) if len(crops) else float("nan")


def repeat(
    plan: Plan,
    parts: Sequence[Part],
    work: Path,
    *,
    dataset: Path,
    data: Path,
    begin: Path | None,
    threads: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Trial], RuleFigures]:
    """Runs the experiments of the paper and ours, or continues an interrupted run.

    Args:
        plan: How much is tried.
        parts: Which of it.
        work: Folder of the trials.
        dataset: Folder that `write_dataset` wrote.
        data: Folder of the public data.
        begin: Detector checkpoint that the station's network begins from. None begins from noise.
        threads: Of torch.
        progress: As of `run`.

    Returns:
        The trials that are done, and what the area rule is worth.

    Raises:
        UnavailableError: If dataset, data or detector are not there.
        UsageError: If the folder holds trials of another dataset, detector or network.
    """
    torch.set_num_threads(threads)
    stages = networks.load_detector(begin) if begin else None
    crops = read_crops(dataset, data)
    claim = {
        "dataset": sha256(dataset / "manifest.json"),
        "detector": sha256(begin) if begin else "",
    }
    trials = run(plan, parts, crops, work, claim=claim, begin=stages, progress=progress)
    return trials, judge_rule(*crops)

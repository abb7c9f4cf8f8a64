"""How good the quality flags are: ``python -m studies.flags``.

Defects of several strengths are drawn into validation photographs. A good flag is silent on unchanged
photographs and is raised where the count is wrong. `weigh` measures both and compares the bound of each rule
in `RULES` with the bound that separates harmed fields best. `studies.wrong_fields` judges the other rules.
"""

import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Annotated, Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import typer
from matplotlib.figure import Figure

from rbc_edge.errors import UnavailableError
from rbc_edge.values import CellClass, FieldOfView, Scale, ScaleSource, UInt8
from rbc_edge.vision import counting, preprocess, quality
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.quality import Features, Rule
from rbc_train import charts, console, metrics, results
from rbc_train.data import Photograph
from rbc_train.results import Chart, Section, Table
from studies import station

EVERY: Final = 10
"""Every how many-th photograph gets the defects."""

MAX_FALSE_ALARMS: Final = 0.02
"""Share of a source's photographs, as they are, that a flag may mark."""

HARMED: Final = 0.15
"""A field is harmed when its count is off by this share, or its overlap fraction by so much."""

_UNKNOWN: Final = Scale(math.nan, ScaleSource.NONE)
_SCALE_FIELDS: Final = 8  # of a slide, for its scale, as at the station
_MIN_SIDE_PX: Final = 16  # smaller is refused before the analyzer
_NOT_SMEARS_EACH: Final = 8
_READ_NOISE: Final = 0.5  # grey levels
_SHOT_NOISE: Final = 1.5  # grey levels in full light

app = console.program()


@app.command()
def flags(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    every: console.Every = EVERY,
    work: Annotated[
        Path, typer.Option(help="Folder of finished trials. A command that was stopped continues there.")
    ] = Path("runs/quality"),
    out: console.Out = results.FOLDER,
    threads: console.Threads = 0,
) -> None:
    """Draws defects into validation photographs and measures hits and false alarms of the flags."""
    analyzer = station.open_analyzer(bundle, threads)
    steps = try_defects(analyzer, station.validation(data), every=every, work=work)
    with typer.progressbar(steps, length=n_trials(), label="defects", file=sys.stderr) as bar:
        trials = list(bar)
    figure, chart = draw_rocs(trials, "quality-roc.png")
    charts.save(figure, out / chart.file)
    console.publish(section(trials, chart, bundle_id=analyzer.bundle.bundle_id, every=every), out)


Draw = Callable[[UInt8, float, np.random.Generator], UInt8]
"""uint8 (H, W, 3) RGB, red-cell diameter in its pixels, randomness. To the image with the defect."""


@dataclass(frozen=True, slots=True)
class Defect:
    """One kind of defect in one strength.

    Attributes:
        flag: The flag that must see it. Empty for unchanged photographs.
        feature: The feature that it changes.
        kind: What it is.
        strength: How strong it is, in words.
        draw: Draws it.
        rescales: Whether the station must estimate the scale.
        stack: How many photographs lie over each other.
    """

    flag: str
    feature: str
    kind: str
    strength: str
    draw: Draw
    rescales: bool = False
    stack: int = 1


@dataclass(frozen=True, slots=True)
class Looked:
    """What the station made of one field.

    Attributes:
        source: The camera, or the kind of picture that is no smear.
        n_true: Red cells that are there: found in the photograph as it is. Labelled, where photographs lie
            over each other. None in what is no smear.
        n_labelled: Red cells labelled.
        n_rbc: Red cells counted.
        true_overlap: Overlap fraction of the photograph as it is. NaN where it is not known.
        overlap: Overlap fraction. NaN without red cells.
        features: What was measured.
        flags: What was raised, the analyzer's flags among it.
    """

    source: str
    n_true: int
    n_labelled: int
    n_rbc: int
    true_overlap: float
    overlap: float
    features: Features
    flags: tuple[str, ...]

    @property
    def harmed(self) -> bool:
        """Whether the counts mislead their reader."""
        if abs(self.n_rbc - self.n_true) > HARMED * self.n_true:
            return True
        return abs(self.overlap - self.true_overlap) > HARMED  # NaN compares false


@dataclass(frozen=True, slots=True)
class DefectTrial:
    """One defect on all its fields."""

    defect: Defect
    fields: tuple[Looked, ...]


# -- defects --------------------------------------------------------------------------------------------


def _noisy(image: npt.NDArray[np.floating[Any]], rng: np.random.Generator) -> UInt8:
    """Adds what a camera adds when light is short: shot noise, and rounding to 8 bits."""
    spread = _SHOT_NOISE * np.sqrt(np.clip(image, 0, 255) / 255) + _READ_NOISE
    noisy = np.clip(image + rng.normal(0, 1, image.shape) * spread, 0, 255)
    return np.asarray(noisy, np.uint8)


def _blur(cells: float, image: UInt8, diameter_px: float, _: np.random.Generator) -> UInt8:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), cells * diameter_px), np.uint8)


def _motion(cells: float, image: UInt8, diameter_px: float, rng: np.random.Generator) -> UInt8:
    side = max(3, round(cells * diameter_px) | 1)
    kernel = np.zeros((side, side), np.float32)
    angle, reach = rng.uniform(0, math.pi), side // 2
    for t in np.linspace(-reach, reach, 4 * side):
        kernel[round(reach + t * math.sin(angle)), round(reach + t * math.cos(angle))] = 1
    return np.asarray(cv2.filter2D(image, -1, kernel / kernel.sum()), np.uint8)


def _dark(gain: float, image: UInt8, _: float, rng: np.random.Generator) -> UInt8:
    return _noisy(image * np.float32(gain), rng)


def _bright(gain: float, image: UInt8, _: float, rng: np.random.Generator) -> UInt8:
    return _noisy(image * np.float32(gain), rng)


def _faint(contrast: float, image: UInt8, _: float, rng: np.random.Generator) -> UInt8:
    """Towards the glass: a field's own bright level of each channel."""
    glass = np.percentile(image.reshape(-1, 3), 95, axis=0).astype(np.float32)
    return _noisy(glass - (glass - image) * np.float32(contrast), rng)


def _vignette(loss: float, image: UInt8, _: float, rng: np.random.Generator) -> UInt8:
    height, width = image.shape[:2]
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return _noisy(image * (1 - loss * (x * x + y * y) / 2)[..., None], rng)


def _ramp(loss: float, image: UInt8, _: float, rng: np.random.Generator) -> UInt8:
    height, width = image.shape[:2]
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    return _noisy(image * (1 - loss * along)[..., None], rng)


def _resize(factor: float, image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    return preprocess.rescale(image, factor)


def _hue(degrees: float, image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turned = (hsv[..., 0].astype(np.int64) + round(degrees / 2)) % 180  # OpenCV's hue goes to 180
    hsv[..., 0] = turned.astype(np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def _same(image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    return image


def _negative(image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    return np.asarray(255 - image, np.uint8)


def _exchanged(image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    return np.ascontiguousarray(image[..., ::-1])


def _tinted(loss: float, image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    return np.asarray(image * np.array([1, 1 - loss, 1 - loss]), np.uint8)


_BAYER: Final = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])


def _dithered(levels: float, image: UInt8, _: float, __: np.random.Generator) -> UInt8:
    """Ordered dithering to so many levels a channel."""
    height, width = image.shape[:2]
    limit = (np.tile(_BAYER, (-(-height // 4), -(-width // 4)))[:height, :width, None] + 0.5) / 16
    return np.asarray(np.floor(image / 255 * (levels - 1) + limit) * (255 / (levels - 1)), np.uint8)


def _grades(
    flag: str,
    feature: str,
    kind: str,
    draw: Callable[[float, UInt8, float, np.random.Generator], UInt8],
    strengths: Sequence[float],
    say: str,
    **more: bool,
) -> tuple[Defect, ...]:
    return tuple(
        Defect(flag, feature, kind, say.format(s), functools.partial(draw, s), **more) for s in strengths
    )


PLAIN: Final = Defect("", "", "unchanged", "", _same)

DEFECTS: Final = (
    *_grades(
        "blurred", "edge_width", "focus: Gaussian, sigma in cells", _blur, (0.02, 0.04, 0.06, 0.08, 0.12),
        "{:.2f}",
    ),
    *_grades("blurred", "edge_width", "motion, cells", _motion, (0.1, 0.2, 0.3, 0.5), "{:.1f}"),
    Defect("colours", "exchanged", "red and blue exchanged", "", _exchanged),
    *_grades("colours", "tint", "one colour, others lose", _tinted, (0.3, 0.6, 0.8), "{:.0%}"),
    *_grades("colours", "grain", "dithered, levels", _dithered, (6, 4, 2), "{:.0f}"),
    *(
        Defect("crowded", "glass", "photographs over each other", str(n), _same, stack=n)
        for n in (2, 3, 4)
    ),
    *_grades("dark", "bright_level", "light, with noise", _dark, (0.5, 0.2, 0.15, 0.1, 0.05), "x {:g}"),
    *_grades("faint", "contrast", "contrast, with noise", _faint, (0.5, 0.3, 0.2, 0.1), "x {:g}"),
    *_grades("overexposed", "clipped", "light, clipped", _bright, (1.2, 1.4, 1.6, 2.0), "x {:g}"),
    *_grades(
        "scale-out-of-range", "cell_diameter_px", "image resized", _resize,
        (0.08, 0.12, 0.16, 0.2, 0.3, 3.0, 5.0), "x {:g}", rescales=True,
    ),
    *_grades("uneven-light", "unevenness", "vignetting, lost in the corner", _vignette, (0.3, 0.6, 0.8, 0.9),
             "{:.0%}"),
    *_grades("uneven-light", "unevenness", "light from one side, lost at the other", _ramp,
             (0.3, 0.6, 0.8, 0.9), "{:.0%}"),
    *_grades("unfamiliar", "green", "hue turned", _hue, (60, 120, 180, 240), "{:.0f}°"),
    Defect("unfamiliar", "confidence", "negative", "", _negative),
)  # fmt: skip
"""Every defect, weakest first within its kind."""

RULES: Final = tuple(
    rule for rule in quality.RULES if (rule.flag, rule.feature) in {(d.flag, d.feature) for d in DEFECTS}
)
"""The rules that a defect can judge. `studies.wrong_fields` judges the others."""


def not_smears(kind: str, rng: np.random.Generator, *, width: int = 640, height: int = 480) -> UInt8:
    """Draws a picture that is no blood smear.

    Args:
        kind: One of `NOT_SMEARS`.
        rng: Source of all randomness.
        width: Width of the picture.
        height: Height of the picture.

    Returns:
        uint8 (height, width, 3) RGB.
    """
    image = np.full((height, width, 3), 235, np.uint8)

    def place() -> tuple[int, int]:
        return int(rng.integers(0, width)), int(rng.integers(0, height))

    def colour(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(v) for v in rng.integers(low, high, 3))

    match kind:
        case "text":
            size = float(rng.uniform(0.4, 1.2))
            for y in range(20, height, round(40 * size) + 8):
                words = "".join(chr(int(c)) for c in rng.integers(65, 123, 80))
                cv2.putText(
                    image, words, (5, y), int(rng.integers(0, 4)), size, colour(0, 90), 1, cv2.LINE_AA
                )
        case "gradient":
            along = np.linspace(0, 1, width)[None, :, None]
            first, last = rng.integers(0, 256, (2, 3))
            image[:] = (first + (last - first) * along).astype(np.uint8)
        case "noise":
            image[:] = rng.integers(0, 256, image.shape)
        case "clouds":
            soft = np.zeros(image.shape)
            for step in (80, 40, 20, 10, 5):
                coarse = rng.normal(0, step, (height // step + 2, width // step + 2, 3))
                soft += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
            image[:] = np.clip(170 + soft / 2, 0, 255).astype(np.uint8)
        case "squares":
            for _ in range(60):
                (x0, y0), side = place(), int(rng.integers(15, 60))
                cv2.rectangle(image, (x0, y0), (x0 + side, y0 + side), colour(0, 230), -1)
        case "rings":
            for _ in range(30):
                thick = int(rng.integers(1, 5))
                cv2.circle(image, place(), int(rng.integers(10, 45)), colour(60, 200), thick, cv2.LINE_AA)
        case "stripes":
            right, down = np.meshgrid(np.arange(width), np.arange(height))
            angle = rng.uniform(0, math.pi)
            wave = np.sin((right * math.cos(angle) + down * math.sin(angle)) / rng.uniform(3, 20))
            image[:] = np.clip(150 + 70 * wave[..., None] * rng.uniform(0.3, 1, 3), 0, 255).astype(np.uint8)
        case "tissue":  # violet nuclei side by side in a rose ground
            image[:] = colour(170, 235)
            for _ in range(400):
                axes = (int(rng.integers(5, 16)), int(rng.integers(4, 10)))
                stain = (int(rng.integers(70, 120)), int(rng.integers(40, 90)), int(rng.integers(110, 170)))
                cv2.ellipse(image, place(), axes, float(rng.uniform(0, 180)), 0, 360, stain, -1, cv2.LINE_AA)
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), 1.5), np.uint8)
        case "beads":
            for _ in range(35):
                cv2.circle(image, place(), int(rng.integers(15, 40)), (40, 40, 40), -1, cv2.LINE_AA)
        case "dust":
            for _ in range(300):
                cv2.circle(image, place(), int(rng.integers(1, 5)), colour(20, 200), -1, cv2.LINE_AA)
        case _:
            raise ValueError(f"{kind}: one of {', '.join(NOT_SMEARS)}")
    return _noisy(image.astype(np.float32), rng)


NOT_SMEARS: Final = (
    "text", "gradient", "noise", "clouds", "squares", "rings", "stripes", "tissue", "beads", "dust",
)  # fmt: skip
"""Kinds of pictures that are no smears."""


# -- trials ---------------------------------------------------------------------------------------------


def n_trials() -> int:
    """Returns how many trials `try_defects` yields."""
    return 1 + len(DEFECTS) + len(NOT_SMEARS)


def try_defects(
    analyzer: Analyzer, photographs: Sequence[Photograph], *, every: int = EVERY, work: Path
) -> Iterator[DefectTrial]:
    """Counts photographs unchanged, some of them with each defect, and pictures that show no smear.

    As at the station: each source is a slide of unknown scale.

    Args:
        analyzer: The bundle at work.
        photographs: Validation photographs.
        every: Every how many-th gets the defects.
        work: Folder of finished trials. An interrupted command continues there. Flags are raised again
            from the features in them, by the present rules.

    Yields:
        A trial a defect. The first is `PLAIN`, on all photographs.

    Raises:
        UnavailableError: If the folder cannot be written, or holds trials of other options.
    """
    shelf = _Shelf(
        work,
        f"bundle {analyzer.bundle.bundle_id}, {len(photographs)} photographs, one in {every} with defects",
    )

    @functools.cache
    def scale_of(source: str) -> Scale:
        own = [p for p in photographs if p.source == source]
        chosen = np.linspace(0, len(own) - 1, min(_SCALE_FIELDS, len(own))).round().astype(int)
        return analyzer.estimate_scale([own[i].read() for i in chosen])

    def look(image: UInt8, given: Scale, truth: Looked) -> Looked:
        field = FieldOfView.of(np.ascontiguousarray(image), slide_id=truth.source)
        result = analyzer.analyze(field, given)
        counts = counting.count(result.cells)
        fraction = counts.overlap_fraction
        return replace(
            truth,
            n_rbc=counts.n_rbc,
            overlap=math.nan if fraction is None else fraction,
            features=analyzer.features(analyzer.view(field, result.scale), result.cells, result.scale),
            flags=result.quality_flags,
        )

    def look_plainly(p: Photograph) -> Looked:
        seen = look(p.read(), scale_of(p.source), _unseen(p.source, int((p.class_id == CellClass.RBC).sum())))
        return replace(seen, n_true=seen.n_rbc, true_overlap=seen.overlap)

    def look_at_defect(defect: Defect, i: int, p: Photograph, before: Looked) -> Iterator[Looked]:
        rng = np.random.default_rng(i)
        if defect.stack > 1:
            image, n = _stacked(p, photographs, defect.stack, rng)
            truth = _unseen(p.source, n)
        else:
            image, truth = defect.draw(p.read(), before.features.cell_diameter_px, rng), before
        if min(image.shape[:2]) >= _MIN_SIDE_PX:
            yield look(image, _UNKNOWN if defect.rescales else scale_of(p.source), truth)

    plain = shelf.take(PLAIN, lambda: [look_plainly(p) for p in photographs])
    yield plain
    some = list(zip(photographs, plain.fields, strict=True))[::every]

    def look_at_defects(defect: Defect) -> list[Looked]:
        return [f for i, (p, before) in enumerate(some) for f in look_at_defect(defect, i, p, before)]

    def look_at_no_smears(kind: str) -> list[Looked]:
        pictures = [not_smears(kind, np.random.default_rng(i)) for i in range(_NOT_SMEARS_EACH)]
        return [look(picture, _UNKNOWN, _unseen(kind, 0)) for picture in pictures]

    for defect in DEFECTS:
        yield shelf.take(defect, functools.partial(look_at_defects, defect))
    for kind in NOT_SMEARS:
        no_smear = Defect("unfamiliar", "confidence", "no smear", kind, _same)
        yield shelf.take(no_smear, functools.partial(look_at_no_smears, kind))


def _unseen(source: str, n: int) -> Looked:
    """A field before it is counted. Its `n` labelled red cells are the truth."""
    nothing = Features(*[math.nan] * len(fields_of(Features)))
    return Looked(
        source=source,
        n_true=n,
        n_labelled=n,
        n_rbc=0,
        true_overlap=math.nan,
        overlap=math.nan,
        features=nothing,
        flags=(),
    )


class _Shelf:
    """Finished trials in a folder.

    Args:
        folder: Made when it is not there.
        options: What the trials depend on, in words.
    """

    def __init__(self, folder: Path, options: str) -> None:
        self._folder = folder
        self._n = 0
        label = folder / "options.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not label.exists():
                label.write_text(options + "\n", encoding="utf-8")
            found = label.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UnavailableError(
                f"{folder}: {error.strerror}", "choose another folder with --work"
            ) from error
        if found != options:
            raise UnavailableError(
                f"{folder}: holds trials of {found}, not of {options}",
                "remove it, or choose another folder with --work",
            )

    def take(self, defect: Defect, look: Callable[[], Sequence[Looked]]) -> DefectTrial:
        """Returns a trial from the folder, or looks and puts it there."""
        file = self._folder / f"{self._n:02}.json"
        self._n += 1
        name = f"{defect.kind} {defect.strength}"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["defect"] == name:
                return DefectTrial(defect, tuple(map(_looked, content["fields"])))
        trial = DefectTrial(defect, tuple(look()))
        temporary = file.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"defect": name, "fields": [asdict(f) for f in trial.fields]}), encoding="utf-8"
        )
        temporary.replace(file)
        return trial


def _looked(content: dict[str, Any]) -> Looked:
    features = Features(**content.pop("features"))
    by_rule = {rule.flag for rule in quality.RULES}
    flags = {flag for flag in content.pop("flags") if flag not in by_rule} | set(quality.flags(features))
    return Looked(**content, features=features, flags=tuple(sorted(flags)))


def _stacked(
    first: Photograph, photographs: Sequence[Photograph], n: int, rng: np.random.Generator
) -> tuple[UInt8, int]:
    """Lays photographs of one source over each other as a thick smear lays cells: light passes all of them.

    Transmittances multiply (Beer and Lambert). What does not fit into the first is cut off. Its cells still
    count, so photographs of the first one's size are taken where there are enough.

    Returns:
        The image, and how many labelled red cells it holds.
    """
    own = [p for p in photographs if p.source == first.source and p is not first]
    alike = [p for p in own if (p.width_px, p.height_px) == (first.width_px, first.height_px)]
    others = alike if len(alike) >= n - 1 else []
    chosen = (
        [first, *(others[i] for i in rng.choice(len(others), n - 1, replace=False))] if others else [first]
    )
    passed = np.ones((first.height_px, first.width_px, 3), np.float32)
    for p in chosen:
        passed *= np.minimum(
            preprocess.view(p.read(), math.nan).image / np.float32(preprocess.BACKGROUND_LEVEL), 1
        )
    image = _noisy(passed * np.float32(preprocess.BACKGROUND_LEVEL), rng)
    return image, sum(int((p.class_id == CellClass.RBC).sum()) for p in chosen)


# -- what came of it ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weighed:
    """A rule, and how good it is.

    Attributes:
        rule: As shipped.
        n_harmed: Fields that its defects harmed.
        auc: How well its feature tells those from photographs as they are, 0.5 (not) to 1.
        best: The bound that tells harmed fields best from all others (Youden's J), of those with few false
            alarms. NaN where nothing was harmed.
        hit: Share of the harmed fields that break the rule as shipped.
        spared: Share of the fields with its defects that are not harmed and do not break it.
        false_alarms: Share of the photographs as they are that break it, by source.
    """

    rule: Rule
    n_harmed: int
    auc: float
    best: float
    hit: float
    spared: float
    false_alarms: dict[str, float]


def weigh(rule: Rule, trials: Sequence[DefectTrial]) -> Weighed:
    """Compares a rule with the best that its feature allows.

    Args:
        rule: The rule.
        trials: Of `try_defects`. The first is the photographs as they are.

    Returns:
        How good it is.
    """
    plain = trials[0].fields
    aimed = [
        f
        for t in trials[1:]
        if (t.defect.flag, t.defect.feature) == (rule.flag, rule.feature)
        for f in t.fields
    ]
    harmed = [f for f in aimed if f.harmed and not math.isnan(_worth(rule, f))]
    spared = [f for f in aimed if not f.harmed]
    of_plain = np.array([_worth(rule, f) for f in plain])
    of_harmed = np.array([_worth(rule, f) for f in harmed])
    of_others = np.concatenate([of_plain, [_worth(rule, f) for f in spared]])
    sources = sorted({f.source for f in plain})
    alarms = {s: _share([f for f in plain if f.source == s], rule) for s in sources}
    area, best = math.nan, math.nan
    if harmed:
        both = np.nan_to_num(np.concatenate([of_plain, of_harmed]), nan=-1e9).astype(np.float32)
        area = metrics.auc(both, np.arange(len(both)) >= len(of_plain))
        best = _best_bound(of_harmed, of_others, [
            np.array([_worth(rule, f) for f in plain if f.source == s]) for s in sources
        ])  # fmt: skip
    return Weighed(
        rule=rule,
        n_harmed=len(harmed),
        auc=area,
        best=best if rule.above else -best,
        hit=_share(harmed, rule),
        spared=1 - _share(spared, rule),
        false_alarms=alarms,
    )


def _worth(rule: Rule, field: Looked) -> float:
    """The feature, turned so that more is worse."""
    value = float(getattr(field.features, rule.feature))
    return value if rule.above else -value


def _share(fields: Sequence[Looked], rule: Rule) -> float:
    return float(np.mean([rule.is_broken(f.features) for f in fields])) if fields else math.nan


def _best_bound(
    harmed: npt.NDArray[np.float64], others: npt.NDArray[np.float64], plain: Sequence[npt.NDArray[np.float64]]
) -> float:
    """Returns the bound with the largest Youden's J of those that spare each source. The middle of equals."""
    seen = np.unique(np.concatenate([harmed, others]))
    seen = seen[~np.isnan(seen)]
    bounds = np.concatenate([(seen[1:] + seen[:-1]) / 2, seen[-1:]])
    allowed = np.all([[np.mean(p > b) <= MAX_FALSE_ALARMS for b in bounds] for p in plain], axis=0)
    gain = np.array([np.mean(harmed > b) - np.mean(others > b) for b in bounds])
    gain[~allowed] = -np.inf
    best = np.flatnonzero(gain >= gain.max() - 1e-9)
    return float(bounds[best[len(best) // 2]])


def draw_rocs(trials: Sequence[DefectTrial], file: str) -> tuple[Figure, Chart]:
    """Draws the ROC of each rule's feature: harmed fields against photographs as they are.

    Args:
        trials: Of `try_defects`.
        file: The picture's name.

    Returns:
        The figure, and its caption.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    plain = trials[0].fields
    for i, rule in enumerate(RULES):
        worth = weigh(rule, trials)
        harmed = [
            f for t in trials[1:] if (t.defect.flag, t.defect.feature) == (rule.flag, rule.feature)
            for f in t.fields if f.harmed
        ]  # fmt: skip
        if not worth.n_harmed:
            continue
        score = np.nan_to_num([_worth(rule, f) for f in (*plain, *harmed)], nan=-1e9).astype(np.float32)
        curve = metrics.roc(score, np.arange(len(score)) >= len(plain))
        axes.plot(
            curve.false_positive, curve.true_positive,
            color=charts.COLOURS[i % len(charts.COLOURS)], linestyle=("-", "--")[i // len(charts.COLOURS)],
            label=f"{rule.flag} ({rule.feature.replace('_', ' ')})",
        )  # fmt: skip
    axes.axvline(MAX_FALSE_ALARMS, color="#555555", linewidth=1, linestyle=":")
    axes.set_xlim(-0.002, 0.2)
    axes.set_xlabel("share of the unchanged photographs")
    axes.set_ylabel("share of the harmed fields")
    axes.legend(loc="lower right", fontsize=8)
    caption = (
        "ROC of each feature: fields that a defect harmed against unchanged validation photographs. The axis "
        "is cut. What could not be measured counts as not flagged. The dotted line is 2 % false alarms"
    )
    return figure, Chart(file, caption)


def section(trials: Sequence[DefectTrial], chart: Chart, *, bundle_id: str, every: int = EVERY) -> Section:
    """Makes the section ``quality``.

    Args:
        trials: Of `try_defects`.
        chart: Of `draw_rocs`.
        bundle_id: Of the bundle.
        every: One photograph in so many got the defects.

    Returns:
        The section.
    """
    plain = trials[0].fields
    sources = sorted({f.source for f in plain})
    weighed = [weigh(rule, trials) for rule in RULES]
    return Section(
        name="quality",
        command=station.command("flags", every, usual=EVERY),
        tables=(_bounds_table(weighed, sources), _alarms_table(plain, sources), _defects_table(trials)),
        charts=(chart,),
        data={
            "bundle_id": bundle_id,
            "photographs": len(plain),
            "every": every,
            "harmed": HARMED,
            "max_false_alarms": MAX_FALSE_ALARMS,
            "unnoticed": _unnoticed(trials),
            "weighed": [
                {
                    "flag": w.rule.flag, "feature": w.rule.feature, "above": w.rule.above,
                    "bound": w.rule.bound, "best": w.best, "auc": w.auc, "harmed": w.n_harmed,
                    "hit": w.hit, "spared": w.spared, "false_alarms": w.false_alarms,
                }
                for w in weighed
            ],
            "flagged_by_what": {t.defect.kind + " " + t.defect.strength: _flag_counts(t) for t in trials},
        },
    )  # fmt: skip


def _bounds_table(weighed: Sequence[Weighed], sources: Sequence[str]) -> Table:
    rows = tuple(
        (
            w.rule.flag, w.rule.feature.replace("_", " "), f"{'>' if w.rule.above else '<'} {w.rule.bound:g}",
            _number(w.best), _number(w.auc), str(w.n_harmed), _percent(w.hit), _percent(w.spared),
            *(_percent(w.false_alarms[s]) for s in sources),
        )
        for w in weighed
    )  # fmt: skip
    columns = ("flag", "feature", "bound", "best", "AUC", "harmed", "hit", "spared", *sources)
    return Table("Bounds. The last columns are false alarms by camera", columns, rows)


def _alarms_table(plain: Sequence[Looked], sources: Sequence[str]) -> Table:
    own = {s: [f for f in plain if f.source == s] for s in sources}
    rows = [(flag, *(_percent(_raised(own[s], flag)) for s in sources)) for flag in quality.FLAGS]
    rows.append(("any", *(_percent(float(np.mean([bool(f.flags) for f in own[s]]))) for s in sources)))
    return Table("Unchanged photographs that are flagged", ("flag", *sources), tuple(rows))


def _defects_table(trials: Sequence[DefectTrial]) -> Table:
    return Table(
        "Defects by strength: what happens to the counts, and how many fields are flagged",
        ("defect", "strength", "fields", "counted / unchanged", "field error, mean", "overlap, points",
         "harmed", "its flag", "hit", "any flag"),
        tuple(map(_trial_row, trials)),
    )  # fmt: skip


def _unnoticed(trials: Sequence[DefectTrial]) -> list[str]:
    """Kinds of pictures that are no smear, show cells to the station, and mostly raise no flag."""
    return [
        t.defect.strength
        for t in trials
        if t.defect.kind == "no smear"
        and any(f.n_rbc for f in t.fields)
        and 2 * sum(bool(f.flags) for f in t.fields) < len(t.fields)
    ]


def _flag_counts(trial: DefectTrial) -> dict[str, int]:
    return dict(sorted(Counter(flag for f in trial.fields for flag in f.flags).items()))


def _raised(fields: Sequence[Looked], flag: str) -> float:
    return float(np.mean([flag in f.flags for f in fields])) if fields else math.nan


def _trial_row(trial: DefectTrial) -> tuple[str, ...]:
    """A row of the table of defects."""
    fields, defect = trial.fields, trial.defect
    true, counted = sum(f.n_true for f in fields), sum(f.n_rbc for f in fields)
    errors = [abs(f.n_rbc - f.n_labelled) / f.n_labelled for f in fields if f.n_labelled]
    change = np.array([f.overlap - f.true_overlap for f in fields])
    known = change[~np.isnan(change)]
    return (
        defect.kind,
        defect.strength or "–",
        str(len(fields)),
        f"{counted / true:.3f}" if true else f"{counted / max(len(fields), 1):.0f} a field",
        _percent(float(np.mean(errors))) if errors else "–",
        f"{100 * known.mean():+.0f}" if len(known) else "–",
        _percent(float(np.mean([f.harmed for f in fields]))) if fields else "–",
        defect.flag or "–",
        _percent(_raised(fields, defect.flag)) if defect.flag else "–",
        _percent(float(np.mean([bool(f.flags) for f in fields]))) if fields else "–",
    )


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _percent(value: float) -> str:
    return (
        "–"
        if math.isnan(value)
        else f"{100 * value:.0f} %"
        if value >= 0.1 or value == 0
        else f"{100 * value:.1f} %"
    )


if __name__ == "__main__":
    console.answer(app)

"""Do the flags stand on fields with a wrong count? ``python -m studies.wrong_fields``.

A station meets stains and cameras that its networks do not know. So complete photographs are counted as they
are and with other stains, and the counts are compared with the labels. The fields that are wrong show which
signs tell them from the others. Laboratories that did not teach the bundle say most.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import typer

from rbc_edge.values import Bool, CellClass, Cells, Detections, FieldOfView, FovResult, UInt8
from rbc_edge.vision import quality
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.quality import Features
from rbc_train import console, laboratories, metrics, results
from rbc_train.data import Photograph, read_chula, read_public, verified_labels
from rbc_train.evaluate import field_counts, with_labels
from rbc_train.metrics import Float64
from rbc_train.results import Section, Table
from studies import station

EVERY: Final = 4
"""Every how many-th photograph of the four sources is used. Of Chula all complete ones are."""

MAX_FALSE_ALARMS: Final = 0.02
"""Share of a laboratory's right fields that one sign may mark, for the bound that is suggested."""

_SCALE_FIELDS: Final = 8
_USUAL_RED: Final = 0.4  # absorbance at which `_paler` leaves a stain as it is

app = console.program()


@app.command()
def wrong_fields(
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    every: console.Every = EVERY,
    out: console.Out = results.FOLDER,
    threads: console.Threads = 0,
) -> None:
    """Compares the flags with the errors of the counts, by laboratory, in their own stain and in others."""
    analyzer = station.open_analyzer(bundle, threads)
    photographs = read_public(data)[0].complete("val")[::every]
    if (data / "chula").is_dir():
        photographs += read_chula(data / "chula").complete("train", "val")
    looks = look(analyzer, photographs)
    with typer.progressbar(looks, length=len(photographs) * len(STAINS), file=sys.stderr) as bar:
        fields = judge(list(bar))
    console.publish(section(fields, bundle_id=analyzer.bundle.bundle_id, every=every), out)


# -- stains ---------------------------------------------------------------------------------------------

Restain = Callable[[Float64], Float64]
"""Absorbance float64 (H, W, 3), natural log, before and after."""


def _mixed(*rows: tuple[float, float, float]) -> Restain:
    return lambda absorbance: absorbance @ np.array(rows).T


def _paler(power: float) -> Restain:
    """Thin places lose more of their stain than thick ones: pale middles, as in iron deficiency."""
    return lambda a: np.sign(a) * np.abs(a) ** power * _USUAL_RED ** (1 - power)


_PURPLE: Final = _mixed((1, 0.6, 0), (0, 1.3, 0), (0, 0, 0.9))

STAINS: Final[Mapping[str, Restain]] = {
    "as it is": lambda absorbance: absorbance,
    "purple": _PURPLE,
    "blue": _mixed((0.3, 1, 0), (0, 1, 0), (0, 0, 0.4)),
    "orange": _mixed((0.5, 0, 0), (0, 1, 0), (0, 0.3, 1.2)),
    "deep": lambda absorbance: 2 * absorbance,
    "weak": lambda absorbance: 0.45 * absorbance,
    "pale middles": _paler(2),
    "purple, pale middles": lambda absorbance: _paler(2)(_PURPLE(absorbance)),
}
"""What becomes of the absorbance in each stain."""


def restained(image: UInt8, stain: Restain) -> UInt8:
    """Shows a photograph, uint8 (H, W, 3) RGB, in another stain, by the law of Beer and Lambert."""
    glass = np.maximum(np.percentile(image.reshape(-1, 3), 95, axis=0), 1)
    absorbance = np.clip(np.log(glass / np.maximum(image.astype(np.float64), 1)), -0.2, 5)
    return np.asarray(np.clip(glass * np.exp(-stain(absorbance)), 0, 255), np.uint8)


# -- signs ----------------------------------------------------------------------------------------------

Error = Literal["count", "share"]


@dataclass(frozen=True, slots=True)
class Sign:
    """What may tell a wrong field.

    Attributes:
        feature: One of the `Features`, or of `OTHERS`.
        error: What it should tell: a wrong count, or a wrong overlapping share.
        flag: The flag of its rule. Empty: it was tried and has none.
        above: Whether large values are bad.
    """

    feature: str
    error: Error
    flag: str = ""
    above: bool = True


SIGNS: Final = (
    Sign("missed", "count", "missed-cells"),
    Sign("hollow", "count", "empty-boxes"),
    Sign("doubt", "share", "unsure-overlaps"),
    Sign("confidence", "count", "unfamiliar", above=False),
    Sign("low scores", "count"),
    Sign("spread of scores", "count"),
    Sign("spread of sizes", "count"),
    Sign("white cells", "count"),
    Sign("unsure verdicts", "share"),
)
"""The signs that are compared."""


def _spread_of_sizes(cells: Cells, is_red: Bool) -> float:
    box = cells.detections.xyxy[is_red & ~cells.touches_edge.any(axis=1)]
    side = np.sqrt(np.prod(box[:, 2:] - box[:, :2], axis=1))
    return float(np.log(side).std()) if len(side) else np.nan


OTHERS: Final[Mapping[str, Callable[[Cells, Bool], float]]] = {
    "low scores": lambda cells, red: float((cells.detections.score[red] < 0.6).mean()),
    "spread of scores": lambda cells, red: float(cells.detections.score[red].std()),
    "spread of sizes": _spread_of_sizes,
    "white cells": lambda cells, red: float((cells.detections.class_id == CellClass.WBC).sum() / red.sum()),
    "unsure verdicts": lambda cells, red: float((np.abs(cells.overlap_score[red] - 0.5) < 0.35).mean()),
}
"""Signs without a flag, of the cells of a field and bool (N,) which are red. There is a red cell."""


# -- fields ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What the station made of a photograph in one stain."""

    photograph: Photograph
    stain: str
    result: FovResult
    features: Features


@dataclass(frozen=True, slots=True)
class Judged:
    """One field, and what its count is worth.

    Attributes:
        laboratory: The photograph's.
        stain: One of `STAINS`.
        wrong_count: Whether its count is off (`metrics.fields_off`).
        wrong_share: Whether its overlapping share is off.
        flags: Raised flags.
        signs: Value of each of the `SIGNS`. 0 where it is not known.
    """

    laboratory: str
    stain: str
    wrong_count: bool
    wrong_share: bool
    flags: tuple[str, ...]
    signs: Mapping[str, float]

    @property
    def is_wrong(self) -> bool:
        """Whether count or share are off."""
        return self.wrong_count or self.wrong_share


def look(analyzer: Analyzer, photographs: Sequence[Photograph]) -> Iterator[Look]:
    """Counts photographs in every stain. Each source in each stain is a slide of unknown scale."""
    by_source = groupby(sorted(photographs, key=lambda p: p.source), key=lambda p: p.source)
    for _, own in [(source, list(group)) for source, group in by_source]:
        for stain, restain in STAINS.items():
            chosen = np.linspace(0, len(own) - 1, min(_SCALE_FIELDS, len(own))).round().astype(int)
            scale = analyzer.estimate_scale([restained(own[i].read(), restain) for i in chosen])
            for photograph in own:
                field = FieldOfView.of(restained(photograph.read(), restain))
                result = analyzer.analyze(field, scale)
                view = analyzer.view(field, result.scale)
                yield Look(photograph, stain, result, analyzer.features(view, result.cells, result.scale))


def judge(looks: Sequence[Look]) -> list[Judged]:
    """Compares counts with labels, field by field."""
    verified = verified_labels({x.photograph.name: x.photograph for x in looks}.values())
    examined = [with_labels(x.photograph, x.result, Detections.empty(), verified) for x in looks]
    counted, labelled = field_counts(examined, CellClass.RBC)
    share, true_share = laboratories.overlapping_shares(examined)
    unknown = np.full(len(looks), np.nan)
    by_count = metrics.fields_off(counted, labelled, unknown, unknown)
    by_share = metrics.fields_off(labelled, labelled, share, true_share)
    return [
        Judged(x.photograph.laboratory, x.stain, bool(c), bool(s), x.result.flags, _signs(x))
        for x, c, s in zip(looks, by_count, by_share, strict=True)
    ]


def _signs(seen: Look) -> dict[str, float]:
    red = np.asarray(seen.result.cells.detections.class_id == CellClass.RBC, np.bool_)
    others = {k: f(seen.result.cells, red) if red.any() else np.nan for k, f in OTHERS.items()}
    values = {s.feature: float((asdict(seen.features) | others)[s.feature]) for s in SIGNS}
    return {k: 0.0 if np.isnan(v) else v for k, v in values.items()}


# -- what came of it ------------------------------------------------------------------------------------


def weigh(sign: Sign, fields: Sequence[Judged]) -> dict[str, float]:
    """Says how well a sign tells the fields with its error from those that are right.

    Returns:
        ``auc``, 0.5 (not at all) to 1; ``wrong``, how many fields have its error; ``hit`` and ``false``, the
        shares of these and of the right fields that break the rule of its flag. NaN without wrong fields, and
        without a rule.
    """
    bad = [f for f in fields if (f.wrong_count if sign.error == "count" else f.wrong_share)]
    good = [f for f in fields if not f.is_wrong]
    found = {"auc": np.nan, "wrong": float(len(bad)), "hit": np.nan, "false": np.nan}
    worth = _worth(sign, (*good, *bad))
    if good and bad:
        found["auc"] = metrics.auc(worth.astype(np.float32), np.arange(len(worth)) >= len(good))
    for rule in quality.RULES:
        if (rule.flag, rule.feature) == (sign.flag, sign.feature):
            broken = worth > (rule.bound if rule.above else -rule.bound)
            found["false"] = float(broken[: len(good)].mean()) if good else np.nan
            found["hit"] = float(broken[len(good) :].mean()) if bad else np.nan
    return found


def suggest(sign: Sign, fields: Sequence[Judged]) -> float:
    """Returns the lowest bound (for a sign that is bad below: the highest) that spares each laboratory."""
    right = [f for f in fields if not f.is_wrong]
    by_laboratory = [_worth(sign, [f for f in right if f.laboratory == n]) for n in _names(right)]
    bound = max((float(np.quantile(w, 1 - MAX_FALSE_ALARMS)) for w in by_laboratory), default=np.nan)
    return bound if sign.above else -bound


def _worth(sign: Sign, fields: Sequence[Judged]) -> npt.NDArray[np.float64]:
    values = np.array([f.signs[sign.feature] for f in fields], np.float64)
    return values if sign.above else -values


def _names(fields: Sequence[Judged]) -> list[str]:
    return sorted({f.laboratory for f in fields})


def section(fields: Sequence[Judged], *, bundle_id: str, every: int = EVERY) -> Section:
    """Makes the section ``wrong-fields``."""
    groups = {
        f"{name}, {kind}": [f for f in fields if f.laboratory == name and (f.stain == "as it is") == plain]
        for name in _names(fields)
        for kind, plain in (("as it is", True), ("other stains", False))
    }
    groups = {name: own for name, own in groups.items() if own}
    alarms = {
        name: asdict(
            metrics.alarms(
                np.array([f.is_wrong for f in own]), np.array([bool(quality.warnings(f.flags)) for f in own])
            )
        )
        for name, own in groups.items()
    }
    weighed = {s.feature: {name: weigh(s, own) for name, own in groups.items()} for s in SIGNS}
    suggested = {s.feature: suggest(s, fields) for s in SIGNS}
    return Section(
        name="wrong-fields",
        command=station.command("wrong_fields", every, usual=EVERY),
        tables=(_alarms_table(groups, alarms), _signs_table(weighed, suggested), _flags_table(groups)),
        data={
            "bundle_id": bundle_id,
            "every": every,
            "fields": len(fields),
            "max_false_alarms": MAX_FALSE_ALARMS,
            "stains": [s for s in STAINS if s != "as it is"],
            "alarms": alarms,
            "signs": weighed,
            "suggested": suggested,
        },
    )


def _alarms_table(groups: Mapping[str, Sequence[Judged]], alarms: Mapping[str, dict[str, Any]]) -> Table:
    rows = tuple(
        (
            name, str(len(own)), str(sum(f.wrong_count for f in own)), str(sum(f.wrong_share for f in own)),
            f"{a['silent']} ({_percent(a['silent_share'])})", _percent(a["hit_rate"]),
            f"{a['false']} ({_percent(a['false_share'])})",
        )
        for (name, own), a in zip(groups.items(), alarms.values(), strict=True)
    )  # fmt: skip
    columns = ("fields of", "fields", "count off", "share off", "silent", "hit", "false alarms")
    return Table("Wrong fields, and how many of them carry a flag", columns, rows)


def _signs_table(
    weighed: Mapping[str, Mapping[str, Mapping[str, float]]], suggested: Mapping[str, float]
) -> Table:
    bounds = {(r.flag, r.feature): r.bound for r in quality.RULES}
    rows = tuple(
        (
            sign.feature, sign.error, sign.flag or "–",
            f"{bounds[sign.flag, sign.feature]:g}" if sign.flag else "–", f"{suggested[sign.feature]:.3g}",
            *(
                " / ".join((_number(w["auc"]), _percent(w["hit"]), _percent(w["false"])))
                for w in weighed[sign.feature].values()
            ),
        )
        for sign in SIGNS
    )  # fmt: skip
    columns = ("sign", "error", "flag", "bound", "suggested", *next(iter(weighed.values())))
    return Table("Signs. For each group of fields: AUC / hit / false alarms", columns, rows)


def _flags_table(groups: Mapping[str, Sequence[Judged]]) -> Table:
    """How often each flag stands on fields that are right, and on fields that are wrong."""
    raised = [flag for flag in quality.FLAGS if any(flag in f.flags for own in groups.values() for f in own)]
    rows = tuple(
        (
            flag,
            *(
                f"{sum(flag in f.flags and not f.is_wrong for f in own)} / "
                f"{sum(flag in f.flags and f.is_wrong for f in own)}"
                for own in groups.values()
            ),
        )
        for flag in raised
    )
    return Table("Flags: fields that are right / that are wrong", ("flag", *groups), rows)


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f} %"


if __name__ == "__main__":
    console.answer(app)

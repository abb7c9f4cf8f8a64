"""The tables of an evaluation, and the targets of the project with what was reached."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rbc_edge.errors import UnavailableError
from rbc_train import results
from rbc_train.data import CLASS_NAMES
from rbc_train.results import Chart, Section, Table

Figures = Mapping[str, Any]
"""What `evaluate.score` returned."""

Intervals = Mapping[str, Mapping[str, tuple[float, float]]]
"""What `evaluate.intervals` returned."""

_NONE: Final = "–"
_PARITY: Final = (
    ("RBC AP50", "rbc_ap50"),
    ("RBC AP50-95", "rbc_ap50_95"),
    ("WBC AP50", "wbc_ap50"),
    ("platelet AP50", "platelet_ap50"),
    ("mAP50", "map50"),
    ("red cells counted", "rbc_counted"),
)


@dataclass(frozen=True, slots=True)
class Runs:
    """The same photographs by the int8 and by the fp32 networks.

    Attributes:
        where: What the two ran on, in words.
        int8: Figures over all photographs (``score(...)["all"]``).
        fp32: The same by the fp32 networks.
    """

    where: str
    int8: Mapping[str, Any]
    fp32: Mapping[str, Any]


def at_export(metrics: Mapping[str, Any]) -> Runs | None:
    """Finds what the export measured in a bundle's manifest.

    Args:
        metrics: The manifest's.

    Returns:
        Both runs. None where the manifest does not hold them.
    """
    try:
        int8, fp32 = metrics["int8"]["all"], metrics["fp32"]["all"]
        # JSON has no NaN: what could not be measured stands there as null.
        own, other = ({k: math.nan if r[k] is None else r[k] for _, k in _PARITY} for r in (int8, fp32))
    except (KeyError, TypeError):
        return None
    return Runs("at export, scale labelled", own, other)


@dataclass(frozen=True, slots=True)
class Target:
    """A target of the project with what was measured.

    Attributes:
        name: What is measured.
        known: The best figure known from elsewhere.
        goal: The target, in words.
        ours: What was measured, NaN when it was not.
        shown: The same in words, with its 95 % interval where there is one.
        reached: Whether the target is reached. None when nothing was measured.
    """

    name: str
    known: str
    goal: str
    ours: float
    shown: str
    reached: bool | None


def targets(
    figures: Figures, intervals: Intervals, runs: Sequence[Runs], bundle_id: str, folder: Path
) -> list[Target]:
    """Compares what was measured with the targets.

    Best known figures: CST-YOLO (RBC, WBC, platelet AP50 on cleaned labels of 60 images, mAP50 on BCCD's
    test split), Alam and Islam 2019 (red cells counted), Gurav, Yadav, Taral 2025 (verdicts, on 10 crops
    labelled by the rule that taught the network), an int8 YOLO11n by OpenVINO.

    Args:
        figures: Of the bundle on the validation photographs.
        intervals: Of the same.
        runs: int8 against fp32. The last is judged.
        bundle_id: Of the bundle. Sections that another bundle was measured for do not count.
        folder: Where other commands published what they measured.

    Returns:
        One entry a target, in the order of the project's own table.
    """
    a, between = figures["all"], intervals["all"]
    found = a["overlap_on_found_boxes"]
    of_source = {
        s: f["overlap_on_found_boxes"]["accuracy"]
        for s, f in figures.items()
        if s != "all" and not math.isnan(f["overlap_on_found_boxes"]["accuracy"])
    }
    worst = min(of_source, key=lambda s: of_source[s], default="")

    def least(name: str, known: str, goal: float, value: float, key: str = "", said: str = "") -> Target:
        shown = _figure(value) + (f" ({said})" if said and not math.isnan(value) else "")
        if key in between:
            shown += f" ({_range(between[key])})"
        return _target(
            name=name, known=known, goal=f"at least {goal:g}", value=value, shown=shown, reached=value >= goal
        )

    def within(name: str, known: str, goal: float, value: float, shown: str) -> Target:
        return _target(
            name=name,
            known=known,
            goal=f"within {100 * goal:g} %",
            value=value,
            shown=shown,
            reached=abs(value) <= goal,
        )

    ratio, low_high = a["rbc_count_ratio"], between["rbc_count_ratio"]
    median = a["rbc_field_error_median"]
    low, high = (100 * v for v in between["rbc_field_error_median"])
    lines = [
        least("RBC AP50", "0.947", 0.985, a["rbc_ap50"], "rbc_ap50"),
        least("RBC AP50-95", "", 0.83, a["rbc_ap50_95"], "rbc_ap50_95"),
        least("WBC AP50", "0.995", 0.985, a["wbc_ap50"], "wbc_ap50"),
        least("platelet AP50", "0.927", 0.90, a["platelet_ap50"], "platelet_ap50"),
        _bccd_test(bundle_id, folder),
        within(
            "count, total", "96.1 % right", 0.01, ratio - 1,
            f"{100 * (ratio - 1):+.2f} % ({', '.join(f'{100 * (v - 1):+.2f}' for v in low_high)})",
        ),
        within(
            "count, median error of a field", "", 0.03, median,
            f"{100 * median:.2f} % ({low:.2f}, {high:.2f})",
        ),
        least("overlap accuracy", "0.80", 0.96, found["accuracy"], "accuracy"),
        least("overlap accuracy, worst source", "", 0.94, of_source.get(worst, math.nan), said=worst),
        least("overlap AUC", "0.81", 0.99, found["auc"], "auc"),
        least(
            "overlapping recall at single recall 0.95", "0.33", 0.97,
            found["recall_overlapping_at_95"], "recall_overlapping_at_95",
        ),
    ]  # fmt: skip
    if runs:
        last = runs[-1]
        lost = last.int8["rbc_ap50_95"] - last.fp32["rbc_ap50_95"]
        lines.append(
            _target(
                name="int8 less fp32, RBC AP50-95", known="-0.0014", goal="at least -0.003", value=lost,
                shown=f"{lost:+.4f} ({last.where})", reached=lost >= -0.003,
            )
        )  # fmt: skip
        moved = last.int8["rbc_counted"] / max(last.fp32["rbc_counted"], 1) - 1
        lines.append(
            within("int8 against fp32, count", "", 0.003, moved, f"{100 * moved:+.2f} % ({last.where})")
        )
    else:
        lines += [
            _target(
                name="int8 less fp32, RBC AP50-95",
                known="-0.0014",
                goal="at least -0.003",
                value=math.nan,
                shown="",
                reached=False,
            ),
            _target(
                name="int8 against fp32, count",
                known="",
                goal="within 0.3 %",
                value=math.nan,
                shown="",
                reached=False,
            ),
        ]
    changes = _of_bundle("scale", bundle_id, folder).get("changes", {})
    lines.append(_greatest("count change, scale 0.3 to 2.5 unknown", changes))
    mosaics = _of_bundle("scale", bundle_id, folder).get("mosaic_changes", {})
    lines.append(_greatest("count change, mosaics of 20 megapixels, scale unknown", mosaics))
    corrupted = _of_bundle("corruptions", bundle_id, folder).get("changes", {})
    lines.append(_greatest("count change, other light, colour, JPEG quality 50, slight blur", corrupted))
    return lines


def _bccd_test(bundle_id: str, folder: Path) -> Target:
    data = _of_bundle("bccd-test", bundle_id, folder)
    value = data.get("map50")
    value = math.nan if value is None else float(value)
    name, known = "mAP50, BCCD's test split and own labels", "0.927"
    return _target(
        name=name, known=known, goal="at least 0.92", value=value, shown=_figure(value), reached=value >= 0.92
    )


def _greatest(name: str, changes: Mapping[str, float | None]) -> Target:
    """Each of the changes must keep within 2 %: the greatest is shown."""
    known = {k: v for k, v in changes.items() if v is not None}
    worst = max(known, key=lambda k: abs(known[k]), default="")
    value = known.get(worst, math.nan)
    shown = f"{100 * value:+.2f} % ({worst})"
    return _target(
        name=name, known="", goal="within 2 %", value=value, shown=shown, reached=abs(value) < 0.02
    )


def _of_bundle(name: str, bundle_id: str, folder: Path) -> dict[str, Any]:
    """The figures of another command, empty when it was not run with this bundle."""
    try:
        data = results.read_section(name, folder)
    except UnavailableError:
        return {}
    return data if data.get("bundle_id") == bundle_id else {}


def _target(name: str, known: str, goal: str, value: float, shown: str, reached: bool) -> Target:
    if math.isnan(value):
        return Target(name=name, known=known, goal=goal, ours=value, shown="not run", reached=None)
    return Target(name=name, known=known, goal=goal, ours=value, shown=shown, reached=reached)


def targets_text(lines: Sequence[Target]) -> str:
    """Lays the targets out as text, a line a target.

    Args:
        lines: What `targets` returned.

    Returns:
        Lines with a heading.
    """
    rows = [("target", "goal", "ours", "reached")]
    rows += [(t.name, t.goal, t.shown, _reached(t)) for t in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    )


def _reached(target: Target) -> str:
    return {None: _NONE, True: "yes", False: "no"}[target.reached]


def section(
    figures: Figures,
    intervals: Intervals,
    lines: Sequence[Target],
    runs: Sequence[Runs],
    drawn: Sequence[Chart],
    *,
    bundle_id: str,
    scale: str,
    thresholds: Mapping[str, float],
) -> Section:
    """Makes the section ``metrics``.

    Args:
        figures: Of the bundle on the validation photographs.
        intervals: Of the same.
        lines: The targets.
        runs: int8 against fp32.
        drawn: What `charts.draw_all` drew.
        bundle_id: Of the bundle.
        scale: How the station got the scale: estimated or labelled.
        thresholds: The bundle's, by name.

    Returns:
        The section.
    """
    command = "python -m rbc_train evaluate" + ("" if scale == "estimated" else f" --scale {scale}")
    return Section(
        name="metrics",
        command=command,
        tables=(
            _targets_table(lines),
            _headline_table(figures, intervals),
            _detection_table(figures),
            _counts_table(figures),
            _crowding_table(figures),
            _verdicts_table(figures),
            _letters_table(figures),
            *([_parity_table(runs)] if runs else []),
        ),
        charts=tuple(drawn),
        data={
            "bundle_id": bundle_id,
            "scale": scale,
            "thresholds": thresholds,
            "figures": figures,
            "intervals": intervals,
            "targets": [asdict(t) for t in lines],
            "int8_fp32": [asdict(r) for r in runs],
        },
    )


def _targets_table(lines: Sequence[Target]) -> Table:
    return Table(
        "Targets",
        ("", "best known", "target", "ours (95 %)", "reached"),
        tuple((t.name, t.known, t.goal, t.shown, _reached(t)) for t in lines),
    )


def _headline_table(figures: Figures, intervals: Intervals) -> Table:
    columns = (
        ("RBC AP50", "rbc_ap50", "rbc_ap50"),
        ("count ratio", "rbc_count_ratio", "rbc_count_ratio"),
        ("median field error", "rbc_field_error_median", "rbc_field_error_median"),
        ("accuracy", "", "accuracy"),
        ("AUC", "", "auc"),
        ("overlapping recall at single recall 0.95", "", "recall_overlapping_at_95"),
    )
    rows = []
    for source, f in figures.items():
        row = [source, str(f["photographs"])]
        for _, key, name in columns:
            value = f[key] if key else f["overlap_on_found_boxes"][name]
            row.append(f"{_figure(value, 3)} ({_range(intervals[source][name], 3)})")
        rows.append(tuple(row))
    return Table(
        "Main figures with 95 % intervals (red cells; overlap on found cells by verified label)",
        ("source", "fields", *(c[0] for c in columns)),
        tuple(rows),
    )


def _detection_table(figures: Figures) -> Table:
    names = ("labelled", "ap50", "ap50_95", "precision", "recall")
    return Table(
        "Detections. Precision and recall at the shipped thresholds, iou 0.5",
        ("class", "source", "labelled", "AP50", "AP50-95", "precision", "recall"),
        tuple(
            (c, source, *(_figure(f[f"{c}_{k}"]) for k in names))
            for c in CLASS_NAMES
            for source, f in figures.items()
        ),
    )


_COUNTS: Final = ("labelled", "counted", "count_ratio")


def _counts_row(figures: Mapping[str, Any], prefix: str = "") -> list[str]:
    median, mean = (figures[f"{prefix}field_error_{k}"] for k in ("median", "mean"))
    low, high = figures[f"{prefix}limit_low"], figures[f"{prefix}limit_high"]
    return [
        *(_figure(figures[f"{prefix}{k}"], 3) for k in _COUNTS),
        _signed(figures[f"{prefix}bias"]),
        f"{_signed(low)} to {_signed(high)}",
        _percent(median),
        _percent(mean),
    ]


_COUNTED: Final = {
    "rbc": "rbc",
    "rbc_two-sides": "rbc, `--edges two-sides`",
    "rbc_inside": "rbc, `--edges inside`",
    "rbc_whole": "rbc not cut by the border",
    "wbc": "wbc",
    "platelet": "platelet",
}
_COUNT_COLUMNS: Final = (
    "labelled", "counted", "ratio", "bias, cells a field", "limits of agreement", "median error of a field",
    "mean error of a field",
)  # fmt: skip


def _counts_table(figures: Figures) -> Table:
    return Table(
        "Counts at the shipped thresholds. Errors are relative and without sign, over fields with this class",
        ("class", "source", *_COUNT_COLUMNS),
        tuple(
            (shown, s, *_counts_row(f, f"{c}_")) for c, shown in _COUNTED.items() for s, f in figures.items()
        ),
    )


def _crowding_table(figures: Figures) -> Table:
    return Table(
        "Red cells by how crowded the field is (share of its red cells with a box that overlaps another "
        "box by an iou over 0.1), a quarter of the photographs each",
        ("crowding", "fields", *_COUNT_COLUMNS),
        tuple(
            (f"{q['from']:.2f} to {q['to']:.2f}", str(q["photographs"]), *_counts_row(q))
            for q in figures["all"]["rbc_by_crowding"]
        ),
    )


def _verdicts_table(figures: Figures) -> Table:
    columns = (
        ("n", "n"),
        ("accuracy", "accuracy"),
        ("AUC", "auc"),
        ("single: precision", "precision_single"),
        ("recall", "recall_single"),
        ("F1", "f1_single"),
        ("overlapping: precision", "precision_overlapping"),
        ("recall", "recall_overlapping"),
        ("F1", "f1_overlapping"),
        ("recall at single recall 0.95", "recall_overlapping_at_95"),
        ("calibration error", "calibration_error"),
        ("Brier", "brier"),
    )
    rows = []
    for box in ("found", "labelled"):
        for source, f in figures.items():
            own = f[f"overlap_on_{box}_boxes"]
            rows.append((box, source, *(_figure(own[key], 3) for _, key in columns)))
    return Table(
        "Single or overlapping, by verified label",
        ("box", "source", *(c[0] for c in columns)),
        tuple(rows),
    )


def _letters_table(figures: Figures) -> Table:
    letters = (
        ("S, outline whole", "single"),
        ("T, touches another", "touching"),
        ("O, over or under another", "over"),
        ("M, several cells in the box", "several"),
    )
    rows = []
    for title, name in letters:
        own = [f["overlap_on_found_boxes"] for f in figures.values()]
        rows.append((title, *(f"{_figure(v[f'recall_{name}'], 3)} ({v[f'n_{name}']})" for v in own)))
    caption = "Share of correct verdicts by letter of the verified label (number of cells), found cells"
    return Table(caption, ("letter", *figures), tuple(rows))


def _parity_table(runs: Sequence[Runs]) -> Table:
    rows = []
    for run in runs:
        for title, key in _PARITY:
            whole, small = run.fp32[key], run.int8[key]
            change = small - whole
            said = f"{100 * change / max(whole, 1):+.2f} %" if key == "rbc_counted" else f"{change:+.4f}"
            rows.append(
                (run.where, title, _figure(whole), _figure(small), _NONE if math.isnan(change) else said)
            )
    return Table("int8 and fp32, through `rbc_edge`", ("run", "", "fp32", "int8", "change"), tuple(rows))


def _figure(value: float, digits: int = 4) -> str:
    if math.isnan(value):
        return _NONE
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:+.2f}"


def _percent(value: float) -> str:
    return _NONE if math.isnan(value) else f"{100 * value:.1f} %"


def _range(ends: tuple[float, float], digits: int = 4) -> str:
    return f"{_figure(ends[0], digits)}, {_figure(ends[1], digits)}"

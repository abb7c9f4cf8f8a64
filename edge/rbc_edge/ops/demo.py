"""The demo: slides whose truth is known, counted by the main job, with the counts beside the truth."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from rbc_edge.errors import UnavailableError
from rbc_edge.ops import synthetic
from rbc_edge.station.runner import RunOptions, Stop, run_once
from rbc_edge.text import path_text
from rbc_edge.values import Counts, UInt8
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle

_COUNTED: Final = {
    "n_rbc": "red cells",
    "n_rbc_single": "single",
    "n_rbc_overlapping": "overlapping",
    "n_wbc": "white cells",
    "n_platelets": "platelets",
}
"""Columns of the tables that have a truth here, and what they are called on the screen."""


@dataclass(frozen=True, slots=True)
class _Slide:
    """How one of the demo's slides is drawn: they differ in all that differs between laboratories."""

    slide_id: str
    stain: synthetic.Stain
    width_px: int
    height_px: int
    cell_diameter_px: float
    crowding: float
    overlap_fraction: float
    illumination: float
    noise: float
    suffix: str
    n_fields: int = 8


_SLIDES: Final = (
    _Slide("cream", synthetic.CREAM, 640, 480, 58.0, 0.22, 0.30, 0.08, 1.2, ".jpg"),
    _Slide("grey", synthetic.GREY, 800, 600, 84.0, 0.26, 0.40, 0.14, 1.6, ".png"),
    _Slide("rose", synthetic.ROSE, 640, 640, 70.0, 0.18, 0.25, 0.25, 1.8, ".jpg"),
)


def run_demo(out: Path | None, *, bundle: Path | None, threads: int, seed: int, json_output: bool) -> int:
    """Draws slides, counts them, and prints the counts beside the truth.

    Writes ``images/<slide>/``, ``truth.csv`` (a row a field of view) and ``results/`` (what ``rbc-edge
    run`` writes) into the folder. No scale is given: it is estimated, as on any slide.

    Args:
        out: The folder; a new temporary one, which stays, when None.
        bundle: The bundle to count with; the one that ships when None.
        threads: See `Analyzer`.
        seed: Which slides are drawn; the same seed draws the same.
        json_output: Print JSON instead of a table.

    Returns:
        The exit code of the run.

    Raises:
        BundleError: The bundle is missing or not intact; nothing was drawn.
        UnavailableError: The folder cannot be written.
    """
    opened = Bundle.open(bundle)
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="rbc-edge-demo-"))
    n_fields = sum(slide.n_fields for slide in _SLIDES)
    print(f"drawing {n_fields} fields of view of {len(_SLIDES)} slides", file=sys.stderr)
    try:
        truth = _draw(out, seed)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out)}: cannot write the demo's images: {error.strerror or error}",
            "give another --out, with room for a few megabytes",
        ) from error

    print("counting them", file=sys.stderr)
    results = out / "results"
    stop = Stop()
    with stop.on_signals():
        summary = run_once(
            RunOptions(paths=(out / "images",), out=results),
            opened.bundle_id,
            lambda: Analyzer(opened, threads=threads),
            stop=stop,
        )
    if summary.stopped_by is not None:  # half-counted slides beside the whole truth would mislead
        print(f"stopped; what was counted lies in {path_text(results)}", file=sys.stderr)
        return int(summary.exit_code)
    counted = {slide.slide_id: slide.counts for slide in summary.slides}
    measured = {slide.slide_id: _measured_px(results / f"{slide.slide_id}.csv") for slide in _SLIDES}
    if json_output:
        print(json.dumps(_as_json(out, truth, counted, measured), indent=2))
    else:
        _print_table(truth, counted, measured)
        print(f"Tables in {path_text(results)}, images in {path_text(out / 'images')}, truth in", end=" ")
        print(path_text(out / "truth.csv"))
    return int(summary.exit_code)


def _draw(out: Path, seed: int) -> dict[str, Counts]:
    """Draws and writes the slides and their truth; returns the true counts by slide."""
    rows: list[list[object]] = []
    truth = {}
    for number, slide in enumerate(_SLIDES):
        folder = out / "images" / slide.slide_id
        folder.mkdir(parents=True, exist_ok=True)
        fields = synthetic.draw_slide(
            np.random.default_rng([seed, number]),
            slide.n_fields,
            width_px=slide.width_px,
            height_px=slide.height_px,
            cell_diameter_px=slide.cell_diameter_px,
            crowding=slide.crowding,
            overlap_fraction=slide.overlap_fraction,
            stain=slide.stain,
            illumination=slide.illumination,
            noise=slide.noise,
        )
        for i, field in enumerate(fields, start=1):
            fov = f"field-{i:02d}"
            (folder / f"{fov}{slide.suffix}").write_bytes(_encoded(field.image, slide.suffix))
            numbers = [getattr(field.counts, column) for column in _COUNTED]
            rows.append([slide.slide_id, fov, f"{slide.cell_diameter_px:.2f}", *numbers])
        truth[slide.slide_id] = _sum(field.counts for field in fields)
    with (out / "truth.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["slide_id", "fov", "cell_diameter_px", *_COUNTED])
        writer.writerows(rows)
    return truth


def _encoded(image: UInt8, suffix: str) -> bytes:
    """Returns the image (uint8 (H, W, 3) RGB) as the bytes of a file."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else []
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return data.tobytes()


def _sum(counts: Iterable[Counts]) -> Counts:
    total = [(c.n_rbc_single, c.n_rbc_overlapping, c.n_wbc, c.n_platelets) for c in counts]
    return Counts(*(sum(column) for column in zip(*total, strict=True)))


def _sum_if_all(counts: Iterable[Counts | None]) -> Counts | None:
    """Returns the sum; None where one is not known."""
    known = list(counts)
    return None if None in known else _sum(c for c in known if c is not None)


def _measured_px(table: Path) -> float | None:
    """Reads the estimated cell diameter from a slide's table; None where it has none."""
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            found = [row["cell_diameter_px"] for row in csv.DictReader(stream)]
    except OSError as error:
        raise UnavailableError(f"{path_text(table)}: {error.strerror or error}") from error
    diameters = [float(text) for text in found if text]
    return float(np.median(diameters)) if diameters else None


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One number beside its truth; `counted` is None where it could not be counted."""

    column: str
    truth: int
    counted: int | None

    @property
    def error(self) -> float | None:
        """The relative error; None where there is nothing to relate, or to relate to."""
        return (self.counted - self.truth) / self.truth if self.truth and self.counted is not None else None

    @property
    def shown(self) -> tuple[str, str, str, str]:
        """Its line on the screen."""
        counted = "-" if self.counted is None else str(self.counted)
        error = "-" if self.error is None else f"{self.error:+.1%}"
        return _COUNTED[self.column], str(self.truth), counted, error


def _compare(truth: Counts, counted: Counts | None) -> list[_Comparison]:
    return [
        _Comparison(c, getattr(truth, c), None if counted is None else getattr(counted, c)) for c in _COUNTED
    ]


def _as_json(
    out: Path,
    truth: Mapping[str, Counts],
    counted: Mapping[str, Counts | None],
    measured: Mapping[str, float | None],
) -> dict[str, object]:
    def compare(true: Counts, found: Counts | None) -> dict[str, object]:
        return {
            c.column: {"truth": c.truth, "counted": c.counted, "error": c.error}
            for c in _compare(true, found)
        }

    slides = [
        {
            "slide_id": slide.slide_id,
            "n_fields": slide.n_fields,
            "cell_diameter_px": {"truth": slide.cell_diameter_px, "estimated": measured[slide.slide_id]},
            **compare(truth[slide.slide_id], counted[slide.slide_id]),
        }
        for slide in _SLIDES
    ]
    return {
        "out": path_text(out),
        "images": path_text(out / "images"),
        "results": path_text(out / "results"),
        "truth": path_text(out / "truth.csv"),
        "slides": slides,
        "all": compare(_sum(truth.values()), _sum_if_all(counted.values())),
    }


def _print_table(
    truth: Mapping[str, Counts], counted: Mapping[str, Counts | None], measured: Mapping[str, float | None]
) -> None:
    lines = [("slide", "fields", "", "truth", "counted", "error")]
    for slide in _SLIDES:
        drawn_px, seen_px = slide.cell_diameter_px, measured[slide.slide_id]
        seen = "-" if seen_px is None else f"{seen_px:.1f}"
        off = "-" if seen_px is None else f"{seen_px / drawn_px - 1:+.1%}"
        lines.append((slide.slide_id, str(slide.n_fields), "cell diameter, px", f"{drawn_px:.1f}", seen, off))
        lines += [("", "", *c.shown) for c in _compare(truth[slide.slide_id], counted[slide.slide_id])]
    n_fields = sum(slide.n_fields for slide in _SLIDES)
    first, *rest = _compare(_sum(truth.values()), _sum_if_all(counted.values()))
    lines += [("all", str(n_fields), *first.shown), *(("", "", *c.shown) for c in rest)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        left = [line[0].ljust(widths[0]), line[1].rjust(widths[1]), line[2].ljust(widths[2])]
        right = [text.rjust(width) for text, width in zip(line[3:], widths[3:], strict=True)]
        print("  ".join(left + right))

"""The demo: drawn slides with known counts, counted like any slide, and both counts in one table."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from rbc_edge.errors import UnavailableError
from rbc_edge.ops import synthetic
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.station.stop import Stop
from rbc_edge.text import path_text
from rbc_edge.values import Counts, UInt8
from rbc_edge.vision.bundle import Bundle

_COUNTED: Final = {
    "n_rbc": "red cells",
    "n_rbc_single": "single",
    "n_rbc_overlapping": "overlapping",
    "n_wbc": "white cells",
    "n_platelets": "platelets",
}
"""Columns of the tables for which the truth is known, and their names on the screen."""


@dataclass(frozen=True, slots=True)
class _Slide:
    """How a slide is drawn (`synthetic.draw_slide`) and saved."""

    slide_id: str
    suffix: str
    cell_diameter_px: float
    drawing: Mapping[str, Any]
    n_fields: int = 8


# They differ in everything that differs between laboratories.
_CREAM: Final = {"stain": synthetic.CREAM, "width_px": 640, "height_px": 480, "crowding": 0.22}
_GREY: Final = {"stain": synthetic.GREY, "width_px": 800, "height_px": 600, "crowding": 0.26}
_ROSE: Final = {"stain": synthetic.ROSE, "width_px": 640, "height_px": 640, "crowding": 0.18}
_SLIDES: Final = (
    _Slide("cream", ".jpg", 58.0, _CREAM | {"overlap_fraction": 0.30, "illumination": 0.08, "noise": 1.2}),
    _Slide("grey", ".png", 84.0, _GREY | {"overlap_fraction": 0.40, "illumination": 0.14, "noise": 1.6}),
    _Slide("rose", ".jpg", 70.0, _ROSE | {"overlap_fraction": 0.25, "illumination": 0.25, "noise": 1.8}),
)


def run_demo(out: Path | None, *, bundle: Path | None, threads: int, seed: int, json_output: bool) -> int:
    """Draws slides, counts them, and prints the counts next to the truth.

    Writes three things into the folder: ``images/<slide>/``, ``truth.csv`` (a row for each field of view) and
    ``results/`` (what ``rbc-edge run`` writes). No scale is given. It is estimated, as for any slide.

    Args:
        out: The folder. None: a new temporary one, which stays.
        bundle: The bundle to count with. None: the one that ships with the program.
        threads: See `Analyzer`.
        seed: Which slides are drawn. The same seed draws the same slides.
        json_output: Print JSON instead of a table.

    Returns:
        The exit code of the run.

    Raises:
        BundleError: The bundle is missing or not intact. Nothing was drawn.
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
            "give another --out, with space for a few megabytes",
        ) from error

    print("counting them", file=sys.stderr)
    results = out / "results"
    stop = Stop()
    with stop.on_signals():
        recipe = AnalyzerRecipe.of(opened, threads=threads)
        summary = count_once([out / "images"], CountOptions(results, recipe), stop=stop)
    if (
        summary.stopped_by is not None
    ):  # a comparison of half-counted slides with the full truth would mislead
        print(f"stopped; what was counted is in {path_text(results)}", file=sys.stderr)
        return int(summary.exit_code)
    counted = {slide.slide_id: slide.counts for slide in summary.slides}
    measured = {slide.slide_id: _measured_px(results / f"{slide.slide_id}.csv") for slide in _SLIDES}
    if json_output:
        print(json.dumps(_as_json(out, truth, counted, measured), indent=2))
    else:
        _print_table(truth, counted, measured)
        images, table = path_text(out / "images"), path_text(out / "truth.csv")
        print(f"Tables in {path_text(results)}, images in {images}, truth in {table}")
    return int(summary.exit_code)


def _draw(out: Path, seed: int) -> dict[str, Counts]:
    """Draws and writes the slides and their truth. Returns the true counts by slide."""
    rows: list[list[object]] = []
    truth = {}
    for number, slide in enumerate(_SLIDES):
        folder = out / "images" / slide.slide_id
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        diameter_px = slide.cell_diameter_px
        fields = synthetic.draw_slide(rng, slide.n_fields, cell_diameter_px=diameter_px, **slide.drawing)
        for i, field in enumerate(fields, start=1):
            fov = f"field-{i:02d}"
            (folder / f"{fov}{slide.suffix}").write_bytes(_encoded(field.image, slide.suffix))
            numbers = [getattr(field.counts, column) for column in _COUNTED]
            rows.append([slide.slide_id, fov, f"{diameter_px:.2f}", *numbers])
        truth[slide.slide_id] = _sum(field.counts for field in fields)
    with (out / "truth.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["slide_id", "fov", "cell_diameter_px", *_COUNTED])
        writer.writerows(rows)
    return truth


def _encoded(image: UInt8, suffix: str) -> bytes:
    """Returns an image (uint8 (H, W, 3), RGB) as the bytes of a file."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else []
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return data.tobytes()


def _sum(counts: Iterable[Counts]) -> Counts:
    total = [(c.n_rbc_single, c.n_rbc_overlapping, c.n_wbc, c.n_platelets) for c in counts]
    return Counts(*(sum(column) for column in zip(*total, strict=True)))


def _sum_if_all(counts: Iterable[Counts | None]) -> Counts | None:
    """Returns the sum. None where one of them is unknown."""
    known = list(counts)
    return None if None in known else _sum(c for c in known if c is not None)


def _measured_px(table: Path) -> float | None:
    """Returns the estimated cell diameter from the table of a slide. None where it has none."""
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            found = [row["cell_diameter_px"] for row in csv.DictReader(stream)]
    except OSError as error:
        raise UnavailableError(f"{path_text(table)}: {error.strerror or error}") from error
    diameters = [float(text) for text in found if text]
    return float(np.median(diameters)) if diameters else None


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A count and its truth. `counted` is None where it could not be counted."""

    column: str
    truth: int
    counted: int | None

    @property
    def error(self) -> float | None:
        """The relative error. None where the truth is 0 or nothing could be counted."""
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

    def described(slide: _Slide) -> dict[str, object]:
        diameters = {"truth": slide.cell_diameter_px, "estimated": measured[slide.slide_id]}
        head = {"slide_id": slide.slide_id, "n_fields": slide.n_fields, "cell_diameter_px": diameters}
        return head | compare(truth[slide.slide_id], counted[slide.slide_id])

    return {
        "out": path_text(out),
        "images": path_text(out / "images"),
        "results": path_text(out / "results"),
        "truth": path_text(out / "truth.csv"),
        "slides": [described(slide) for slide in _SLIDES],
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

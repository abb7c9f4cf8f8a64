"""The demo: drawn slides with known counts, counted like any slide, and both counts in one table."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from rbc_edge.errors import unavailable
from rbc_edge.ops import synthetic
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.station.stop import Stop
from rbc_edge.text import one_line, path_text
from rbc_edge.values import Counts
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision.bundle import Bundle

# Columns of the tables for which the truth is known, and their names on the screen.
_COUNTED: Final = {
    "n_rbc": "red cells",
    "n_rbc_single": "single",
    "n_rbc_overlapping": "overlapping",
    "n_wbc": "white cells",
    "n_platelets": "platelets",
}
_SIZES: Final = (
    "each slide has another stain, light and size of cells; the program finds the size, in steps of about 2 %"
)
_Line = tuple[str, str, str, str, str, str]


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


@dataclass(frozen=True, slots=True)
class _Compared:
    """A slide, or all of them, with its true and its counted cells. None: not known."""

    slide_id: str
    n_fields: int
    truth: Counts
    counted: Counts | None
    drawn_px: float | None = None  # cell diameter
    seen_px: float | None = None  # cell diameter as estimated

    def as_lines(self) -> list[_Line]:
        """Returns its lines on the screen."""
        lines = []
        if self.drawn_px is not None:
            lines.append(_line("cell diameter, px", self.drawn_px, self.seen_px, ".1f"))
        lines += [_line(_COUNTED[column], *numbers, ".0f") for column, numbers in self._numbers()]
        heads = [(self.slide_id, str(self.n_fields)), *[("", "")] * (len(lines) - 1)]
        return [(*head, *line) for head, line in zip(heads, lines, strict=True)]

    def as_json(self) -> dict[str, object]:
        """Returns what `json.dumps` takes."""
        found: dict[str, object] = {
            column: {"truth": truth, "counted": counted, "error": _error(truth, counted)}
            for column, (truth, counted) in self._numbers()
        }
        if self.drawn_px is None:
            return found
        diameters = {"truth": self.drawn_px, "estimated": self.seen_px}
        return {"slide_id": self.slide_id, "n_fields": self.n_fields, "cell_diameter_px": diameters} | found

    def _numbers(self) -> Iterator[tuple[str, tuple[int, int | None]]]:
        """Yields the columns, and for each the true and the counted number."""
        return ((c, (getattr(self.truth, c), getattr(self.counted, c, None))) for c in _COUNTED)


def run_demo(out: Path | None, *, bundle: Path | None, threads: int, seed: int, json_output: bool) -> int:
    """Draws slides, counts them, and prints the counts next to the truth. Returns the exit code of the run.

    Writes three things into the folder: ``images/<slide>/``, ``truth.csv`` (a row for each field of view)
    and ``results/`` (what ``rbc-edge run --report`` writes). No scale is given. It is estimated, as for any
    slide. Without a folder nothing is kept. The same seed draws the same slides. Raises `BundleError` before
    it draws, and `UnavailableError` where the folder cannot be written.
    """
    opened = Bundle.open(bundle)
    with nullcontext(out) if out else TemporaryDirectory(prefix="rbc-edge-demo-") as folder:
        return _run(Path(folder), opened, threads, seed, is_kept=out is not None, json_output=json_output)


def _run(out: Path, opened: Bundle, threads: int, seed: int, *, is_kept: bool, json_output: bool) -> int:
    images, results, table = out / "images", out / "results", out / "truth.csv"
    n_fields = sum(slide.n_fields for slide in _SLIDES)
    print(
        f"drawing {n_fields} fields of view of {len(_SLIDES)} slides, so that the truth is known",
        file=sys.stderr,
    )
    print(_SIZES, file=sys.stderr)
    advice = "give another --out, with space for a few megabytes"
    with unavailable(f"{path_text(out)}: cannot write the demo's images", advice):
        truth = _draw(out, seed)

    print("counting them", file=sys.stderr)
    stop = Stop()
    with stop.on_signals():
        recipe = AnalyzerRecipe.of(opened, threads=threads)
        views = ViewOptions(reports=is_kept, manifest=opened.manifest)
        summary = count_once([images], CountOptions(results, recipe, views=views), stop=stop)
    if summary.stopped_by is not None:  # half-counted slides next to the full truth would mislead
        print(one_line(f"stopped; what was counted is in {path_text(results)}"), file=sys.stderr)
        return int(summary.exit_code)
    counted = {slide.slide_id: slide.counts for slide in summary.slides}
    slides = []
    for slide in _SLIDES:
        name, seen_px = slide.slide_id, _measured_px(results / f"{slide.slide_id}.csv")
        both = truth[name], counted[name]
        slides.append(_Compared(name, slide.n_fields, *both, slide.cell_diameter_px, seen_px))
    whole = _Compared("all", n_fields, _sum(truth.values()), _sum_if_all(counted.values()))
    if json_output:
        places = {"out": out, "images": images, "results": results, "truth": table}
        shown = {name: path_text(path) if is_kept else None for name, path in places.items()}
        found = {"slides": [slide.as_json() for slide in slides], "all": whole.as_json()}
        print(json.dumps(shown | found, indent=2))
    else:
        _print_table([line for slide in (*slides, whole) for line in slide.as_lines()])
        if not is_kept:
            print("Nothing of it is kept. With --out DIR you get the images, the tables and a report.")
            return int(summary.exit_code)
        where = f"Tables in {path_text(results)}, images in {path_text(images)}, truth in {path_text(table)}"
        print(one_line(where))
        print(one_line(f"Open {path_text(results / 'reports' / 'index.html')} to look at each cell"))
    return int(summary.exit_code)


def _draw(out: Path, seed: int) -> dict[str, Counts]:
    """Draws and writes the slides and their truth. Returns the true counts by slide."""
    rows: list[list[object]] = [["slide_id", "fov", "cell_diameter_px", *_COUNTED]]
    truth = {}
    for number, slide in enumerate(_SLIDES):
        folder = out / "images" / slide.slide_id
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        diameter_px = slide.cell_diameter_px
        fields = synthetic.draw_slide(rng, slide.n_fields, cell_diameter_px=diameter_px, **slide.drawing)
        for i, field in enumerate(fields, start=1):
            fov = f"field-{i:02d}"
            (folder / f"{fov}{slide.suffix}").write_bytes(field.encoded(slide.suffix))
            numbers = [getattr(field.counts, column) for column in _COUNTED]
            rows.append([slide.slide_id, fov, f"{diameter_px:.2f}", *numbers])
        truth[slide.slide_id] = _sum(field.counts for field in fields)
    with (out / "truth.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    return truth


def _sum(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*map(astuple, counts), strict=True)))


def _sum_if_all(counts: Iterable[Counts | None]) -> Counts | None:
    """Returns the sum. None where one of them is unknown."""
    known = list(counts)
    return None if None in known else _sum(c for c in known if c is not None)


def _measured_px(table: Path) -> float | None:
    """Returns the estimated cell diameter from the table of a slide. None where it has none."""
    with unavailable(path_text(table), ""), table.open(encoding="utf-8", newline="") as stream:
        texts = [row["cell_diameter_px"] for row in csv.DictReader(stream)]
    diameters = [float(text) for text in texts if text]
    return float(np.median(diameters)) if diameters else None


def _error(truth: float, found: float | None) -> float | None:
    """Returns the relative error. None where the truth is 0 or nothing was found."""
    return (found - truth) / truth if truth and found is not None else None


def _line(name: str, truth: float, found: float | None, form: str) -> tuple[str, str, str, str]:
    error = _error(truth, found)
    shown = "-" if found is None else format(found, form)
    return name, format(truth, form), shown, "-" if error is None else f"{error:+.1%}"


def _print_table(lines: Sequence[_Line]) -> None:
    lines = [("slide", "fields", "", "truth", "counted", "error"), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        texts = enumerate(zip(line, widths, strict=True))
        print("  ".join(t.ljust(width) if i in (0, 2) else t.rjust(width) for i, (t, width) in texts))

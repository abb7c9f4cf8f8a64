"""``rbc-edge bench``: measures for a minute how fast this computer counts, and which setup is fastest.

The images go through the same steps as in ``rbc-edge run``, ledger and tables included. Only the start of
the program and the estimate of the scale (once per slide) are not timed. In each round every setup has one
turn, because small computers become hot and slow, and the last setup would be at a disadvantage.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Final, Self

import numpy as np

from rbc_edge.errors import ImageError, UsageError, unavailable
from rbc_edge.ops import synthetic
from rbc_edge.ops.settings_file import assignments
from rbc_edge.station.inbox import scan
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.values import Scale, ScaleSource
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import CLASSIFIER_FP32, DETECTOR_FP32, Bundle
from rbc_edge.vision.image_file import load_field
from rbc_edge.vision.scale import MAX_FIELDS

N_DRAWN: Final = 24
BUDGET_S: Final = 45.0  # no new round begins then. With drawing and opening, the whole takes about a minute.
_MAX_ROUNDS: Final = 5
_TURN_S: Final = 2.5  # long enough that a short interruption by the system matters little
_MIN_FIELDS, _MAX_FIELDS = 6, 1000
# Factor by which one more thread, or fp32, has to be faster. The camera's program needs a core too, and fp32
# needs more memory and gives other counts.
_MIN_GAIN: Final = 1.03


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings to measure."""

    threads: int
    precision: str  # ``int8``, or ``fp32`` where the bundle has such networks


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a setup is."""

    setup: Setup
    fields_per_s: float  # fields of view per second, the median of the rounds
    least_fields_per_s: float  # in the slowest round
    most_fields_per_s: float  # in the fastest round
    cells_per_s: float  # cells of all kinds per second, the median of the rounds
    n_rounds: int

    @classmethod
    def of(cls, setup: Setup, n_fields: int, turns: Sequence[tuple[float, int]]) -> Self:
        """Returns the speed from the time, seconds, and the number of cells of each turn."""
        fields = [n_fields / took_s for took_s, _ in turns]
        cells = median(n_cells / took_s for took_s, n_cells in turns)
        return cls(setup, median(fields), min(fields), max(fields), cells, len(turns))

    @property
    def ms_per_field(self) -> float:
        """Time for one field, milliseconds."""
        return 1000 / self.fields_per_s

    def as_json(self) -> dict[str, object]:
        """Returns what `json.dumps` takes."""
        values = asdict(self)
        return {**values.pop("setup"), **values, "ms_per_field": self.ms_per_field}


def _draw(folder: Path) -> None:
    """Draws JPEG fields of 640x480 with red cells of 100 px, as in the public data."""
    # As crowded as those: an almost empty field is also searched at five other scales, which takes longer.
    fields = synthetic.draw_slide(np.random.default_rng(0), N_DRAWN, cell_diameter_px=100.0, crowding=0.35)
    for i, field in enumerate(fields):
        (folder / f"field-{i:02}.jpg").write_bytes(field.encoded(".jpg"))


def setups(bundle: Bundle, n_cores: int) -> list[Setup]:
    """Returns the setups to measure: every number of threads up to 4, its doubles, and all cores."""
    threads = sorted({n for n in (1, 2, 3, 4, 8, 16, 32, 64, n_cores) if n <= min(n_cores, 64)})
    has_fp32 = {DETECTOR_FP32, CLASSIFIER_FP32} <= set(bundle.manifest.files)
    precisions = ["int8", "fp32"] if has_fp32 else ["int8"]
    return [Setup(n, precision) for precision in precisions for n in threads]


def measure(
    bundle: Bundle, images: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> list[Speed]:
    """Times every setup on the images, or on drawn ones. Returns a speed for each, in the order of `setups`.

    `say` is called with a line for each step. Raises `UsageError` where there are no images, or some cannot
    be counted, and `UnavailableError` where they, or the folder for temporary files, cannot be used.
    """
    advice = "set TMPDIR to a folder with space for a few megabytes"
    with (
        unavailable("cannot use the folder for temporary files", advice),
        tempfile.TemporaryDirectory(prefix="rbc-edge-bench-") as name,
    ):
        base = Path(name)
        if images is None:
            say(f"drawing {N_DRAWN} fields of view")
            images = base / "drawn"
            images.mkdir()
            _draw(images)
        paths = _linked(images, base / "fields")
        end_s = monotonic() + BUDGET_S
        turn = partial(_turn, bundle, base, _scale(bundle, paths))
        return _rounds(turn, setups(bundle, len(os.sched_getaffinity(0))), paths, end_s=end_s, say=say)


def _linked(images: Path, folder: Path) -> list[Path]:
    """Links the images into a new folder, sorted by slide, so that a part of them can be counted alone."""
    files = scan([images]).files
    slides = {slide: i for i, slide in enumerate(dict.fromkeys(file.slide_id for file in files))}
    paths = []
    for i, file in enumerate(files[:_MAX_FIELDS]):
        path = folder / f"{slides[file.slide_id]:05}" / f"{i:05}{file.path.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(file.path.absolute())
        paths.append(path)
    return paths


def _scale(bundle: Bundle, paths: Sequence[Path]) -> Scale | None:
    """Estimates the scale once. A run does it once per slide, so it is little of a day's work."""
    images = []
    for path in paths[:MAX_FIELDS]:
        with suppress(ImageError):  # a turn reports it
            images.append(load_field(path, "", path.name).image)
    found = Analyzer(bundle, threads=1).estimate_scale(images)
    is_known = found.source is not ScaleSource.NONE
    return Scale(found.cell_diameter_px, ScaleSource.CELL_DIAMETER) if is_known else None


def _turn(
    bundle: Bundle, base: Path, scale: Scale | None, setup: Setup, paths: Sequence[Path]
) -> tuple[float, int]:
    """Counts images into a new output folder. Returns the time, seconds, and the number of cells."""
    out = Path(tempfile.mkdtemp(dir=base))
    # A new one for each turn: all setups at once do not fit into the memory of a small computer.
    analyzer = Analyzer(bundle, threads=setup.threads, precision=setup.precision)
    recipe = AnalyzerRecipe(bundle.bundle_id, lambda: analyzer)
    started_s = monotonic()
    summary = count_once(paths, CountOptions(out, recipe, scale=scale, workers=setup.threads))
    took_s = monotonic() - started_s
    if summary.n_failed:
        text = f"{summary.n_failed} of {len(paths)} images cannot be counted"
        raise UsageError(text, "`rbc-edge run` names them; give other images")
    counts = [slide.counts for slide in summary.slides if slide.counts]
    return max(took_s, 1e-9), sum(sum(astuple(c)) for c in counts)


def _rounds(
    turn: Callable[[Setup, Sequence[Path]], tuple[float, int]],
    tried: Sequence[Setup],
    paths: Sequence[Path],
    *,
    end_s: float,
    say: Callable[[str], None],
) -> list[Speed]:
    """Gives every setup a turn in each round, as long as there is time for another round."""
    # The first turn warms up, and shows how many fields make a turn long enough.
    took_s, _ = turn(tried[0], paths[:_MIN_FIELDS])
    chosen = paths[: max(_MIN_FIELDS, int(_TURN_S * len(paths[:_MIN_FIELDS]) / max(took_s, 1e-3)))]
    measured: dict[Setup, list[tuple[float, int]]] = {setup: [] for setup in tried}
    round_s = 0.0
    for i in range(_MAX_ROUNDS):
        if i and monotonic() + round_s > end_s:
            break
        say(f"round {i + 1}: {len(chosen)} fields of view, {len(tried)} setups")
        began_s = monotonic()
        for setup in tried:
            measured[setup].append(turn(setup, chosen))
        round_s = monotonic() - began_s
    return [Speed.of(setup, len(chosen), turns) for setup, turns in measured.items()]


def best(speeds: Sequence[Speed]) -> Speed:
    """Returns the fastest setup. Of equally fast ones, int8 with the fewest threads."""
    in_order = sorted(speeds, key=lambda s: (s.setup.precision != "int8", s.setup.threads))
    found = in_order[0]
    for speed in in_order[1:]:
        if speed.fields_per_s > found.fields_per_s * _MIN_GAIN:
            found = speed
    return found


def settings_of(speeds: Sequence[Speed], chosen: Speed) -> dict[str, int | str]:
    """Returns the settings of a setup. The precision only where there was a choice."""
    values: dict[str, int | str] = asdict(chosen.setup)
    if len({s.setup.precision for s in speeds}) == 1:
        del values["precision"]
    return values


def as_lines(speeds: Sequence[Speed], chosen: Speed) -> list[str]:
    """Returns the table and the best setup."""
    lines = ["threads  network  fields/s    (range)  cells/s  ms a field"]
    for s in speeds:
        spread = f"{s.least_fields_per_s:.1f}-{s.most_fields_per_s:.1f}"
        lines.append(
            f"{s.setup.threads:7}  {s.setup.precision:7}  {s.fields_per_s:8.1f}  {spread:>11}"
            f"  {s.cells_per_s:7.0f}  {s.ms_per_field:10.1f}"
        )
    keys = assignments(settings_of(speeds, chosen))
    gain = f"more threads or fp32 have to be {100 * (_MIN_GAIN - 1):.0f} % faster"
    return [*lines, f"best: {keys} ({chosen.fields_per_s:.1f} fields a second; {gain})"]


def as_json(speeds: Sequence[Speed], chosen: Speed) -> dict[str, object]:
    """Returns the same for programs."""
    return {"best": chosen.as_json(), "tried": [speed.as_json() for speed in speeds]}

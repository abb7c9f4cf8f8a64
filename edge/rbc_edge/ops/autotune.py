"""A minute on the user's machine: how fast it counts, and with how many threads it counts best.

The fields go through the main job as ``rbc-edge run`` does them, ledger and tables included; only the
program's start and the estimate of the scale, once a slide, are left out. Every way to count gets its turn in
every round, because small computers grow hot and slow, and what came last would lose.
"""

import json
import os
import re
import statistics
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from rbc_edge import config
from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.ops import synthetic
from rbc_edge.station.inbox import scan
from rbc_edge.station.runner import SCALE_FIELDS, Clock, RunOptions, run_once
from rbc_edge.text import path_text
from rbc_edge.values import Scale, ScaleSource
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import CLASSIFIER_FP32, DETECTOR_FP32, Bundle
from rbc_edge.vision.image_file import load_field

N_DRAWN: Final = 24
BUDGET_S: Final = 45.0
"""When no further round is begun; drawing and opening come on top, and all of it is a minute."""

_ROUNDS: Final = 5
_TRIAL_S: Final = 2.5  # so long that a hiccup of the system is little of it
_LEAST_FIELDS, _MOST_FIELDS = 6, 1000
_WORTH_A_CHANGE: Final = 1.03
"""Gain that a further thread has to bring, for the camera's program wants a core too, and so has fp32, which
takes more memory and whose counts are other counts."""

_TABLE: Final = re.compile(r"^[ \t]*\[", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to count.

    Attributes:
        threads: As in the settings.
        precision: ``int8``, or ``fp32`` where the bundle has such a detector.
    """

    threads: int
    precision: str


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a way is.

    Attributes:
        way: The way.
        fields_per_s: Fields of view a second, the median of the rounds.
        cells_per_s: Cells a second, of all kinds.
        least_fields_per_s: In the slowest round.
        most_fields_per_s: In the fastest round.
        n_rounds: Rounds it took part in.
    """

    way: Way
    fields_per_s: float
    cells_per_s: float
    least_fields_per_s: float
    most_fields_per_s: float
    n_rounds: int

    @property
    def ms_per_field(self) -> float:
        """Milliseconds that one field takes."""
        return 1000 / self.fields_per_s


def draw(folder: Path, n: int = N_DRAWN) -> None:
    """Draws `n` JPEG fields of 640x480 with red cells of 100 px, as the public data have them."""
    # As crowded as those: a field with hardly a cell is looked at in five more scales, and not the usual one.
    fields = synthetic.draw_slide(np.random.default_rng(0), n, cell_diameter_px=100.0, crowding=0.35)
    for i, field in enumerate(fields):
        _, data = cv2.imencode(".jpg", field.image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        (folder / f"field-{i:02}.jpg").write_bytes(data.tobytes())


def ways(bundle: Bundle, n_cores: int) -> list[Way]:
    """Returns what is worth trying: every number of threads up to four, then doubled up to all cores."""
    threads = sorted({n for n in (1, 2, 3, 4, 8, 16, 32, 64, n_cores) if n <= min(n_cores, 64)})
    has_fp32 = {DETECTOR_FP32, CLASSIFIER_FP32} <= set(bundle.manifest.files)
    precisions = ["int8", "fp32"] if has_fp32 else ["int8"]
    return [Way(n, precision) for precision in precisions for n in threads]


def measure(
    bundle: Bundle,
    images: Path | None = None,
    *,
    budget_s: float = BUDGET_S,
    n_cores: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    clock: Clock | None = None,
) -> list[Speed]:
    """Times every way to count the images, in turns.

    Args:
        bundle: The bundle to count with.
        images: Folder of images, or an image; None: fields are drawn.
        budget_s: See `BUDGET_S`; each way has one turn at least.
        n_cores: Cores to try; None: those this process may use.
        say: Told what is done.
        clock: Where time comes from.

    Returns:
        A speed for each way, in the order of `ways`.

    Raises:
        UsageError: There are no images, or some cannot be counted.
        UnavailableError: The images, or the folder for temporary files, cannot be used.
        BundleError: ONNX Runtime cannot load the bundle.
    """
    now_s = (clock or Clock()).monotonic_s
    try:
        with tempfile.TemporaryDirectory(prefix="rbc-edge-bench-") as name:
            base = Path(name)
            if images is None:
                say(f"drawing {N_DRAWN} fields of view")
                images = base / "drawn"
                images.mkdir()
                draw(images)
            paths = _linked(images, base / "fields")
            end_s = now_s() + budget_s
            return _in_turns(bundle, paths, base, n_cores, end_s=end_s, say=say, now_s=now_s)
    except OSError as error:
        raise UnavailableError(
            f"cannot use the folder for temporary files: {error.strerror or error}",
            "set TMPDIR to a folder with room for a few megabytes",
        ) from error


def _linked(images: Path, folder: Path) -> list[Path]:
    """Links the images into a folder of ours by their slides, so that a part of them can be counted alone."""
    files = scan([images]).files
    slides = {slide: i for i, slide in enumerate(dict.fromkeys(file.slide_id for file in files))}
    paths = []
    for i, file in enumerate(files[:_MOST_FIELDS]):
        path = folder / f"{slides[file.slide_id]:05}" / f"{i:05}{file.path.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(file.path.absolute())
        paths.append(path)
    return paths


def _scale(bundle: Bundle, paths: Sequence[Path]) -> Scale | None:
    """Estimates the scale once: a run does so once a slide, much of a turn and little of a day's work."""
    images = []
    for path in paths[:SCALE_FIELDS]:
        with suppress(ImageError):  # the turns will say so
            images.append(load_field(path, "", path.name).image)
    found = Analyzer(bundle, threads=1).estimate_scale(images)
    if found.source is ScaleSource.NONE:
        return None
    return Scale(found.cell_diameter_px, ScaleSource.CELL_DIAMETER)


def _in_turns(
    bundle: Bundle,
    paths: list[Path],
    base: Path,
    n_cores: int | None,
    *,
    end_s: float,
    say: Callable[[str], None],
    now_s: Callable[[], float],
) -> list[Speed]:
    tried = ways(bundle, n_cores or len(os.sched_getaffinity(0)))
    scale = _scale(bundle, paths)
    n_outs = 0

    def count(way: Way, chosen: Sequence[Path]) -> tuple[float, int]:
        """Seconds, and cells."""
        nonlocal n_outs
        n_outs += 1
        options = RunOptions(tuple(chosen), base / f"out-{n_outs}", scale=scale, workers=way.threads)
        # Of one turn only: all ways at once do not fit into the memory of a small computer.
        analyzer = Analyzer(bundle, threads=way.threads, precision=way.precision)
        started_s = now_s()
        summary = run_once(options, bundle.bundle_id, lambda: analyzer)
        took_s = now_s() - started_s
        if summary.n_failed:
            raise UsageError(
                f"{summary.n_failed} of {len(chosen)} images cannot be counted",
                "`rbc-edge run` says which; give others",
            )
        every = [slide.counts for slide in summary.slides if slide.counts is not None]
        return took_s, sum(c.n_rbc + c.n_wbc + c.n_platelets for c in every)

    # The first turn warms up, and says how many fields make a turn long enough.
    took_s, _ = count(tried[0], paths[:_LEAST_FIELDS])
    n = max(_LEAST_FIELDS, int(_TRIAL_S * len(paths[:_LEAST_FIELDS]) / max(took_s, 1e-3)))
    chosen = paths[:n]
    rates: dict[Way, list[tuple[float, float]]] = {way: [] for way in tried}
    round_s = 0.0
    for i in range(_ROUNDS):
        if i and now_s() + round_s > end_s:
            break
        say(f"round {i + 1}: {len(chosen)} fields of view, {len(tried)} ways")
        began_s = now_s()
        for way in tried:
            took_s, n_cells = count(way, chosen)
            rates[way].append((len(chosen) / max(took_s, 1e-9), n_cells / max(took_s, 1e-9)))
        round_s = now_s() - began_s
    return [
        Speed(
            way,
            statistics.median(f for f, _ in measured),
            statistics.median(c for _, c in measured),
            min(f for f, _ in measured),
            max(f for f, _ in measured),
            len(measured),
        )
        for way, measured in rates.items()
    ]


def best(speeds: Sequence[Speed]) -> Speed:
    """Returns the fastest way; of those that are as fast, int8 and the one with the fewest threads."""
    in_order = sorted(speeds, key=lambda s: (s.way.precision != "int8", s.way.threads))
    found = in_order[0]
    for speed in in_order[1:]:
        if speed.fields_per_s > found.fields_per_s * _WORTH_A_CHANGE:
            found = speed
    return found


def settings_of(speeds: Sequence[Speed], chosen: Speed) -> dict[str, int | str]:
    """Returns the settings that make a way the one in force; a precision only where there was a choice."""
    values: dict[str, int | str] = {"threads": chosen.way.threads}
    if len({s.way.precision for s in speeds}) > 1:
        values["precision"] = chosen.way.precision
    return values


def check_writable(file: Path) -> None:
    """Says before the minute, and not after it, that a settings file cannot be changed.

    Raises:
        UsageError: The file is not right as it is.
        UnavailableError: It cannot be written.
    """
    target = Path(os.path.realpath(file))
    if target.is_file():
        config.load({}, file=target, env={})
    folder = next(p for p in target.parents if p.exists())
    if not os.access(folder, os.W_OK) or target.is_dir():
        raise UnavailableError(f"{path_text(file)}: cannot write it", "check the permissions of its folder")


def write_settings(file: Path, values: Mapping[str, int | str]) -> None:
    """Sets keys in a settings file, and touches nothing else of it, comments included.

    The file is replaced whole, after the new one has proved right; a missing one is made.

    Args:
        file: The settings file.
        values: Keys and their new values.

    Raises:
        UsageError: The file is not right as it is, or cannot be changed safely.
        UnavailableError: It cannot be written.
    """
    target = Path(os.path.realpath(file))  # a link stays a link
    try:
        old = target.read_bytes() if target.exists() else b""
    except OSError as error:
        raise UsageError(
            f"{path_text(file)}: cannot read it: {error.strerror}", "check its permissions"
        ) from error
    if old:
        config.load({}, file=target, env={})  # what was wrong before is not for us to write over
    changed = text = old.decode("utf-8")
    for key, value in values.items():
        changed = _with(changed, key, json.dumps(value))
    try:
        is_right = tomllib.loads(changed) == tomllib.loads(text) | dict(values)
    except tomllib.TOMLDecodeError:  # a key stands there in a way that we do not see: twice is an error
        is_right = False
    if not is_right:
        raise UsageError(
            f"{path_text(file)}: {', '.join(values)} cannot be changed in it without changing something else",
            "write it yourself: "
            + ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items()),
        )
    _replace(target, changed.encode("utf-8"), file)


def _with(text: str, key: str, value: str) -> str:
    """Returns TOML text with a key of the top level set: in its line, under its comment, or at the end."""
    line = f"{key} = {value}"
    end = _TABLE.search(text)
    top, rest = (text[: end.start()], text[end.start() :]) if end else (text, "")
    for written in (
        rf"^[ \t]*{key}[ \t]*=[ \t]*[^#\r\n]*?(?=[ \t]*(#[^\r\n]*)?\r?$)",
        rf"^#[ \t]?{key}[ \t]*=[^\r\n]*",
    ):
        found = re.search(written, top, re.MULTILINE)
        if found:
            kept = found[0] + _newline(text) if found[0].startswith("#") else ""
            return top[: found.start()] + kept + line + top[found.end() :] + rest
    if top and not top.endswith("\n"):
        top += _newline(text)
    return top + line + _newline(text) + rest


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _replace(target: Path, content: bytes, shown: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                if target.exists():
                    status = target.stat()
                    os.fchmod(stream.fileno(), status.st_mode & 0o7777)
                    with suppress(PermissionError):  # only root may give files away
                        os.fchown(stream.fileno(), status.st_uid, status.st_gid)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            config.load({}, file=temporary, env={})
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(shown)}: cannot write it: {error.strerror}", "check the permissions of its folder"
        ) from error


def settings_file(loaded: config.Loaded) -> Path:
    """Returns the settings file that holds; the user's own, still to be made, where there is none."""
    return loaded.file or config.user_file(os.environ)


def as_lines(speeds: Sequence[Speed], chosen: Speed) -> list[str]:
    """Returns the table and the verdict."""
    lines = ["threads  network  fields/s    (range)  cells/s  ms a field"]
    for s in speeds:
        spread = f"{s.least_fields_per_s:.1f}-{s.most_fields_per_s:.1f}"
        lines.append(
            f"{s.way.threads:7}  {s.way.precision:7}  {s.fields_per_s:8.1f}  {spread:>11}"
            f"  {s.cells_per_s:7.0f}  {s.ms_per_field:10.1f}"
        )
    gain = 100 * (_WORTH_A_CHANGE - 1)
    said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings_of(speeds, chosen).items())
    lines.append(
        f"best: {said} ({chosen.fields_per_s:.1f} fields a second; a change has to gain {gain:.0f} %)"
    )
    return lines


def as_json(speeds: Sequence[Speed], chosen: Speed) -> dict[str, object]:
    """Returns the same for programs."""

    def plain(s: Speed) -> dict[str, object]:
        return {
            "threads": s.way.threads,
            "precision": s.way.precision,
            "fields_per_s": s.fields_per_s,
            "least_fields_per_s": s.least_fields_per_s,
            "most_fields_per_s": s.most_fields_per_s,
            "cells_per_s": s.cells_per_s,
            "ms_per_field": s.ms_per_field,
            "n_rounds": s.n_rounds,
        }

    return {"best": plain(chosen), "tried": [plain(s) for s in speeds]}

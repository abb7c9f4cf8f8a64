"""Settings: flag, then environment, then file, then default; checked in one place, whoever gave them."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, Final

from rbc_edge.errors import UnavailableError, UsageError

ENV_PREFIX: Final = "RBC_EDGE_"
CELL_DIAMETER_UM: Final = 7.5
"""Diameter of a red cell in a dry smear, micrometres (design, section 3)."""

PRECISIONS: Final = ("int8", "fp32")
EDGES: Final = ("all", "two-sides", "inside")

_SYSTEM_FILE: Final = Path("/etc/rbc-edge/config.toml")
_EXAMPLE: Final = Path(__file__).with_name("example.toml")
_KEY: Final = re.compile(r"""[ \t]*["']?([^\s"'=]+)["']?[ \t]*=""")
_SCALE_KEYS: Final = ("cell_diameter", "um_per_px")
_MOST_THREADS: Final = 64  # ten thousand bring a small computer down, and nothing gains from ten
_RANGES: Final = {  # seconds, and MB
    "settle_s": (0.0, 3600.0),
    "grace_s": (0.0, 86_400.0),
    "scan_every_s": (0.1, 3600.0),
    "min_free_mb": (0.0, 1e7),
}
_LEAST_OVERLAY_PX, _MOST_OVERLAY_PX = 64, 20_000  # a JPEG ends at 65,535
_SMALLEST_CELL_PX, _LARGEST_CELL_PX = 4.0, 4000.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run can be told; each name is a key of the file, and in capitals a variable of the environment.

    Attributes:
        out: Output folder.
        bundle: Folder of the bundle; None: the one shipped.
        threads: Images counted at the same time, a thread each; 0: as many as cores, at most 4.
        precision: Which of the bundle's detectors counts: int8 or fp32.
        cell_diameter: Diameter of a red cell in pixels; None: not given.
        um_per_px: Micrometres per pixel; None: not given.
        slide_pattern: Regular expression that finds the slide in a file's name; None: folders are slides.
        edges: Edge rule: all, two-sides or inside.
        cells: Also write a table of cells by slide.
        overlays: Also draw a picture by field, its cells outlined.
        overlay_px: Longest side of such a picture, pixels; 0: as large as the image.
        report: Also write a page by slide, to look at.
        max_failures: Stop after this many failed images; None: never.
        source: The camera's folder, for ``watch``.
        marker: Name of a file that lies in the source while it is the right one; None: none.
        settle_s: ``watch`` takes a file that has not changed for so long, seconds.
        grace_s: ``watch`` fails an unfinished file that has not changed for so long, seconds.
        scan_every_s: ``watch`` scans its source at least so often, seconds.
        min_free_mb: ``watch`` pauses while the results' disk has less room, MB.
        polling: Whether ``watch`` does without events; None: as the file system needs it.
        prometheus: Text file for Prometheus that ``watch`` writes; None: none.
        quiet: Say nothing but errors.
        verbose: Say more.
    """

    out: Path | None = None
    bundle: Path | None = None
    threads: int = 0
    precision: str = "int8"
    cell_diameter: float | None = None
    um_per_px: float | None = None
    slide_pattern: str | None = None
    edges: str = "all"
    cells: bool = False
    overlays: bool = False
    overlay_px: int = 2048
    report: bool = False
    max_failures: int | None = None
    source: Path | None = None
    marker: str | None = None
    settle_s: float = 2.0
    grace_s: float = 120.0
    scan_every_s: float = 10.0
    min_free_mb: float = 200.0
    polling: bool | None = None
    prometheus: Path | None = None
    quiet: bool = False
    verbose: bool = False

    @property
    def cell_diameter_px(self) -> float | None:
        """Diameter of a red cell in pixels that the user gave, either way; None: to be estimated."""
        if self.um_per_px is not None:
            return CELL_DIAMETER_UM / self.um_per_px
        return self.cell_diameter


_TYPES: Final[dict[str, type]] = {
    "out": Path,
    "bundle": Path,
    "threads": int,
    "precision": str,
    "cell_diameter": float,
    "um_per_px": float,
    "slide_pattern": str,
    "edges": str,
    "cells": bool,
    "overlays": bool,
    "overlay_px": int,
    "report": bool,
    "max_failures": int,
    "source": Path,
    "marker": str,
    "settle_s": float,
    "grace_s": float,
    "scan_every_s": float,
    "min_free_mb": float,
    "polling": bool,
    "prometheus": Path,
    "quiet": bool,
    "verbose": bool,
}
_WORDS: Final = {Path: "a path", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and where each came from.

    Attributes:
        settings: The settings in force.
        source: For each setting ``flag``, a variable, a file and line (``FILE:LINE``), or ``default``.
        file: The configuration file read; None without one.
    """

    settings: Settings
    source: Mapping[str, str]
    file: Path | None


def load(
    flags: Mapping[str, Any], *, file: Path | None = None, env: Mapping[str, str] | None = None
) -> Loaded:
    """Puts the settings together.

    Args:
        flags: What the command line gave, by name of the setting; None: not given.
        file: The file the user named; None: ``RBC_EDGE_CONFIG``, else the user's
            ``rbc-edge/config.toml`` (XDG), else ``/etc/rbc-edge/config.toml``, else none.
        env: The environment; None: the process's.

    Returns:
        The settings, each from the highest source that names it. The two ways to give the scale are one
        setting: a flag for one of them outranks a file that has the other.

    Raises:
        UsageError: A key is unknown, a value is of the wrong type or out of range, the file cannot be
            read, or one source gives the scale both ways.
    """
    env = os.environ if env is None else env
    path = _file(file, env)
    given = {key: (value, "flag") for key, value in flags.items() if value is not None}
    layers = [given, _variables(env)]
    if path is not None:
        layers.append(_read(path))

    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for layer in layers:
        scale = [key for key in _SCALE_KEYS if key in layer]
        if len(scale) > 1:
            origin = layer[scale[0]][1]
            where = "the command line" if origin == "flag" else origin
            raise UsageError(
                f"{where}: cell_diameter and um_per_px are two ways to say the same", "give one of them"
            )
        scale_is_set = any(key in values for key in _SCALE_KEYS)
        for key, (value, origin) in layer.items():
            if key not in values and not (key in _SCALE_KEYS and scale_is_set):
                values[key], source[key] = value, origin
    settings = Settings(**values)
    _check(settings, source)
    return Loaded(settings, {f.name: source.get(f.name, "default") for f in fields(Settings)}, path)


def user_file(env: Mapping[str, str]) -> Path:
    """Returns where the user's own settings file is, or would be."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    return home / "rbc-edge" / "config.toml"


def places(env: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Returns where settings are looked for when nobody names a file: the user's, then the system's.

    Args:
        env: The environment; None: the process's.
    """
    env = os.environ if env is None else env
    return user_file(env), _SYSTEM_FILE


def example(*, source: Path | None = None, out: Path | None = None) -> str:
    """Returns a settings file in which every key stands with its meaning, commented out.

    Args:
        source: The camera's folder, to be set in it; None: left out.
        out: The output folder, to be set in it; None: left out.

    Raises:
        UsageError: A folder's name is not UTF-8, and cannot stand in a TOML file.
    """
    text = _EXAMPLE.read_text(encoding="utf-8")
    for key, folder in (("source", source), ("out", out)):
        if folder is None:
            continue
        try:
            os.fspath(folder).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"--{key} is {os.fspath(folder)!r}", "a settings file can name UTF-8 folders only"
            ) from error
        line = f"{key} = {json.dumps(os.fspath(folder), ensure_ascii=False)}"
        text, n = re.subn(rf"^#{key} = .*$", line.replace("\\", r"\\"), text, flags=re.M)
        assert n == 1, key
    return text


def write_example(
    file: Path, *, source: Path | None = None, out: Path | None = None, force: bool = False
) -> None:
    """Writes `example` into a file, whole or not at all; its folder is made where it is missing.

    Args:
        file: The file.
        source: See `example`.
        out: See `example`.
        force: Replace a file that is there.

    Raises:
        UsageError: The file is there already, or see `example`.
        UnavailableError: It cannot be written.
    """
    text = example(source=source, out=out)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        if not force and os.path.lexists(file):
            raise UsageError(
                f"{file}: there are settings already", "edit them, or give --force to replace them"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        raise UnavailableError(
            f"{file}: cannot write: {error.strerror or error}", "check permissions, or name another --file"
        ) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def _file(given: Path | None, env: Mapping[str, str]) -> Path | None:
    if given is None and env.get(f"{ENV_PREFIX}CONFIG"):
        given = Path(env[f"{ENV_PREFIX}CONFIG"])
    if given is not None:
        return given
    for path in places(env):
        if os.path.isfile(path):  # noqa: PTH113 -- False, not an error, where we may not look
            return path
    return None


def _variables(env: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX) or name == f"{ENV_PREFIX}CONFIG":
            continue
        key = _known(name.removeprefix(ENV_PREFIX).lower(), f"environment variable {name}", ENV_PREFIX)
        found[key] = (_from_text(key, text, name), name)
    return found


def _from_text(key: str, text: str, where: str) -> object:
    kind = _TYPES[key]
    word = text.strip().lower()
    if kind is bool and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    if kind is not bool and word:  # an empty path would be the current folder
        try:
            return kind(text)
        except ValueError:
            pass
    raise UsageError(f"{where}: {key} is {text!r}", f"it has to be {_WORDS[kind]}")


def _read(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the configuration: {error.strerror}", "check --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: not a TOML file: {error}", "`rbc-edge config init --file -` prints one with every key"
        ) from error
    lines: dict[str, int] = {}  # tomllib does not tell; every setting is one line of its own
    for number, line in enumerate(text.splitlines(), 1):
        if match := _KEY.match(line):
            lines.setdefault(match[1], number)
    values: dict[str, tuple[Any, str]] = {}
    for key, value in content.items():
        where = f"{path}:{lines[key]}" if key in lines else str(path)
        kind = _TYPES[_known(key, where, "")]
        if kind is Path and isinstance(value, str):
            if not value:
                raise UsageError(f"{where}: {key} is empty", f"it has to be {_WORDS[kind]}")
            # Relative to the file, wherever the program is started.
            values[key] = path.parent / value, where
        elif kind is float and type(value) in (int, float):
            values[key] = float(value), where
        elif type(value) is kind:  # not isinstance: true is no number
            values[key] = value, where
        else:
            raise UsageError(f"{where}: {key} is {value!r}", f"it has to be {_WORDS[kind]}")
    return values


def _known(key: str, where: str, prefix: str) -> str:
    if key in _TYPES:
        return key
    near = difflib.get_close_matches(key, _TYPES, n=1, cutoff=0.0)[0]
    near = prefix + near.upper() if prefix else near
    raise UsageError(f"{where}: unknown setting {key!r}", f"did you mean {near}?")


def _check(settings: Settings, source: Mapping[str, str]) -> None:
    def wrong(key: str, advice: str) -> UsageError:
        where = source.get(key, "flag")
        name = f"--{key.replace('_', '-')}" if where == "flag" else f"{where}: {key}"
        return UsageError(f"{name} is {getattr(settings, key)}", advice)

    for key in _SCALE_KEYS:
        value = getattr(settings, key)
        if value is None:
            continue
        if not (isfinite(value) and value > 0):
            raise wrong(key, "it has to be a positive number")
        diameter = settings.cell_diameter_px
        if diameter is not None and not _SMALLEST_CELL_PX <= diameter <= _LARGEST_CELL_PX:
            raise wrong(
                key,
                f"that makes a red cell {diameter:g} pixels wide; it can be from"
                f" {_SMALLEST_CELL_PX:g} to {_LARGEST_CELL_PX:g}",
            )
    for key, (least, most) in _RANGES.items():
        if not least <= getattr(settings, key) <= most:
            raise wrong(key, f"it can be from {least:g} to {most:g}")
    if settings.marker is not None and ("/" in settings.marker or settings.marker in ("", ".", "..")):
        raise wrong("marker", "it has to be the name of a file in the source")
    if settings.edges not in EDGES:
        raise wrong("edges", f"it has to be one of {', '.join(EDGES)}")
    if settings.precision not in PRECISIONS:
        raise wrong("precision", f"it has to be one of {', '.join(PRECISIONS)}")
    if not 0 <= settings.threads <= _MOST_THREADS:
        raise wrong("threads", f"it has to be 0 (choose for me) or more, up to {_MOST_THREADS}")
    if settings.overlay_px != 0 and not _LEAST_OVERLAY_PX <= settings.overlay_px <= _MOST_OVERLAY_PX:
        raise wrong(
            "overlay_px",
            f"it has to be 0 (as large as the image), or from {_LEAST_OVERLAY_PX} to {_MOST_OVERLAY_PX}",
        )
    if settings.max_failures is not None and settings.max_failures < 1:
        raise wrong("max_failures", "it has to be 1 or more")

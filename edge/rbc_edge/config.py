"""Settings: flag, then environment, then file, then default. Each is declared once, in `Settings`.

Options of the command line, variables of the environment, checks, the example file and the tables of
``docs/commands.md`` all come from these declarations.
"""
# ruff: noqa: RUF009  `_is` is dataclasses.field

import difflib
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from functools import partial
from math import inf, isinf
from pathlib import Path
from types import NoneType
from typing import Any, Final, TypeVar, get_args, get_origin

from rbc_edge.errors import UsageError

ENV_PREFIX: Final = "RBC_EDGE_"
CELL_DIAMETER_UM: Final = 7.5  # of a red cell in a dry smear
PRECISIONS: Final = ("int8", "fp32")
EDGES: Final = ("all", "two-sides", "inside")

_T = TypeVar("_T")
_SYSTEM_FILE: Final = Path("/etc/rbc-edge/config.toml")
_KEY: Final = r"""[ \t]*["']?([^\s"'=]+)["']?[ \t]*="""
_SCALE_KEYS: Final = frozenset({"cell_diameter", "um_per_px"})
_MIN_CELL_PX, _MAX_CELL_PX = 4.0, 4000.0
_TYPES: Final = {
    **{Path: "a path", int: "a whole number", float: "a number", str: "text", bool: "true or false"},
    tuple: "a list of texts",
}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_LINE_LENGTH: Final = 110

_COUNTING: Final = "run watch"
_WITH_RESULTS: Final = f"{_COUNTING} status retry forget exclude set review report export doctor"
_WITH_BUNDLE: Final = f"{_COUNTING} demo bench review report doctor bundle-show bundle-verify"


@dataclass(frozen=True, slots=True)
class Setting:
    """How one setting is explained, checked and given on the command line."""

    name: str  # of the field of `Settings`: the key of the file
    kind: type  # of its value
    default: Any
    help: str  # what it means, for the command line, the example file and the documentation
    more: str = ""  # what the example file says after that
    option: str = ""  # its option and the word for its value, ``--out -o DIR``; a word alone: an argument
    on: str = _COUNTING  # the commands that take it; ``bundle-show`` is `show` of the group `bundle`
    without: str = ""  # what happens without it, where there is no default
    example: str = ""  # a value in TOML, where there is no default
    choices: tuple[str, ...] = ()  # the words it can be
    limits: tuple[float, float] | None = None  # the smallest and the largest value
    zero: str = ""  # what 0 means, where that is not a number like the others
    pattern: str = ""  # regular expression that text must match
    rule: str = ""  # the values it can have, in words, where the above does not say it well
    heading: str = ""  # title of the group that begins here, in the example file

    @property
    def values(self) -> str:
        """The values it can have, in words."""
        if self.rule:
            return self.rule
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.limits is None:
            return _TYPES[self.kind]
        low, high = self.limits
        numbers = f"{low:g} or more" if isinf(high) else f"from {low:g} to {high:.15g}"
        return f"0 ({self.zero}), or {numbers}" if self.zero else numbers

    @property
    def default_words(self) -> str:
        """The default, or what happens without the setting. Empty where the help says it, or for false."""
        if self.default is None or self.default is False:
            return self.without
        if self.kind is tuple:
            return ", ".join(self.default)
        return f"{self.default:g}" if self.kind is float else str(self.default)

    def allows(self, value: Any) -> bool:
        """Tells whether a value of the right type is one of those it can have."""
        if value is None or (self.zero and value == 0):
            return True
        if self.choices:
            return value in self.choices
        if self.pattern:
            texts = value if self.kind is tuple else (value,)
            return all(re.fullmatch(self.pattern, text) for text in texts)
        return self.limits is None or bool(self.limits[0] <= value <= self.limits[1])


def _is(default: _T, help: str, more: str = "", **about: Any) -> _T:
    return field(default=default, metadata={"help": help, "more": more, **about})


_watch: Final = partial(_is, on="watch")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run can be told. A name is a key of the file and, in capitals, a variable of the environment.

    `SETTINGS` has what is said about each. None means that it is not given.
    """

    source: Path | None = _is(
        None,
        "The camera's folder. Each sub-folder is a slide.",
        "For `rbc-edge watch`. Nothing is ever written into this folder.",
        option="SOURCE",
        on="watch doctor",
        example='"/srv/camera"',
        heading="Folders",
    )
    out: Path | None = _is(
        None,
        "Folder for the results: the tables, and the ledger (the database they are made from). Required.",
        "It must be outside source, on a disk of this computer.",
        option="--out -o DIR",
        on=_WITH_RESULTS,
        example='"/var/lib/rbc-edge"',
    )
    marker: str | None = _watch(
        None,
        "Name of a file that must be in the source. While it is missing, the source counts as not available.",
        "For network shares: create the file on the share (`touch .camera-share`). Then a share that is not"
        " mounted is not taken for an empty folder.",
        option="--marker NAME",
        example='".camera-share"',
        pattern=r"(?!\.{1,2}$)[^/]+",
        rule="the name of a file in the source, without a folder",
    )
    cell_diameter: float | None = _is(
        None,
        "Scale of the images: the diameter of a red cell in pixels.",
        "Give cell_diameter or um_per_px, not both.",
        option="--cell-diameter PX",
        without="estimated for each slide",
        example="80.0",
        limits=(_MIN_CELL_PX, _MAX_CELL_PX),
        heading="What is counted",
    )
    um_per_px: float | None = _is(
        None,
        f"Scale of the images: micrometres per pixel. A red cell is {CELL_DIAMETER_UM} micrometres wide.",
        option="--um-per-px UM",
        without="estimated for each slide",
        example="0.09",
        limits=(CELL_DIAMETER_UM / _MAX_CELL_PX, CELL_DIAMETER_UM / _MIN_CELL_PX),
        rule=f"from {CELL_DIAMETER_UM / _MAX_CELL_PX:g} to {CELL_DIAMETER_UM / _MIN_CELL_PX:g}, which makes a"
        f" red cell {_MAX_CELL_PX:g} to {_MIN_CELL_PX:g} pixels wide",
    )
    edges: str = _is(
        "all",
        "Which cells at the image border count. all: every cell. two-sides: not the cells at the right and"
        " the lower border. inside: only cells that touch no border.",
        option="--edges RULE",
        on=f"{_COUNTING} report export",
        choices=EDGES,
    )
    cells: bool = _is(False, "Also write cells/<slide>.csv, with a row per cell.")
    excel: bool = _is(
        False,
        "Write the tables so that a double click opens them rightly in Excel. Programs then need to be told.",
        "If the language of this computer (LC_ALL, LC_NUMERIC, LANG) has a decimal comma, semicolons stand"
        " between the cells. Ids begin with a tab, so that Excel does not take them for numbers or dates."
        " After a change, all tables are written again.",
    )
    overlays: bool = _is(
        False, "Also draw every field of view with its cells outlined (a picture in overlays/<slide>/)."
    )
    overlay_px: int = _is(
        2048,
        "Longest side of these pictures in pixels. 0: as large as the image.",
        limits=(64, 20_000),  # a JPEG ends at 65,535
        zero="as large as the image",
    )
    overlay_shapes: bool = _is(
        False, "Also write the shapes of red cells into these pictures, in letters that are explained below."
    )
    report: bool = _is(False, "Also write a web page with pictures for each slide (reports/<slide>.html).")
    slide_pattern: str | None = _is(
        None,
        "Regular expression that finds the slide in a file name: group 'slide', and optionally group 'fov'.",
        "For cameras that put all slides into one folder.",
        option="--slide-pattern REGEX",
        without="each folder is a slide",
        example="'(?P<slide>[^_]+)_(?P<fov>[0-9]+)'",
    )
    ignore: tuple[str, ...] = _is(
        (),
        "Files and folders of the source to pass over: patterns with * and ?, such as 'old*' or 'day1/test'.",
        "A pattern is compared with each name on the way from the source to a file, and with all of that way."
        " * stands for /, too, and small and capital letters are the same. Folders that a system or a storage"
        " makes (@eaDir, #recycle, lost+found) are always passed over. In the variable, : stands between two"
        " patterns. The option may be given several times.",
        option="--ignore PATTERN",
        on=f"{_COUNTING} doctor",
        # Not empty, not everything, no / at its ends, no ./ in front, and each [ closed.
        pattern=r"(?![*/]+$)(?!\.{0,2}/)(?:[^\[/\0]|/(?!/|$)|\[!?\]?[^\]/\0]*\])+",
        rule="patterns that are not empty and not * alone, do not begin or end with /, and close each [",
    )
    bundle: Path | None = _is(
        None,
        "Folder of the bundle (the models that count).",
        on=_WITH_BUNDLE,
        without="the one shipped with the program",
        example='"/opt/rbc-edge-bundles/ours"',
    )
    settle_s: float = _watch(
        2.0,
        "Count a file when it has not changed for this many seconds.",
        "Where the system reports that a file was closed, 0.1 s is enough.",
        limits=(0, 3600),
        heading="When a file is counted",
    )
    grace_s: float = _watch(
        120.0,
        "Record an incomplete file as failed when it has not changed for this many seconds.",
        "A file that is cut short, empty or unreadable may still arrive. Until then it is tried again.",
        limits=(0, 86_400),
    )
    scan_every_s: float = _watch(
        10.0, "Longest time between two scans of the whole source, in seconds.", limits=(0.1, 3600)
    )
    polling: bool | None = _watch(
        None,
        "Find new files only by scanning, without events of the file system.",
        "Without this setting the program scans network shares and uses events on other disks.",
        option="--polling/--events",
        without="depends on the kind of file system",
        example="true",
    )
    min_free_mb: float = _watch(
        200.0,
        "Pause while the disk of the results has less free space than this, in MB.",
        limits=(0, 1e7),
        heading="The computer",
    )
    threads: int = _is(
        0,
        "Images counted at the same time. 0: as many as the computer has cores, at most 4.",
        on=f"{_COUNTING} demo",
        limits=(1, 64),  # ten thousand bring a small computer down, and nothing gains from ten
        zero="as many as the computer has cores, at most 4",
    )
    precision: str = _is(
        "int8",
        "Which detector of the bundle counts: int8 (calculates with whole numbers) or fp32 (floating point).",
        "fp32 works only where the bundle has it. `rbc-edge bench` measures which is faster on this computer."
        " Their counts differ a little, so after a change every image is counted again.",
        option="--precision KIND",
        choices=PRECISIONS,
    )
    prometheus: Path | None = _watch(
        None,
        "Text file of numbers for the monitoring program Prometheus, kept up to date.",
        "Its node_exporter reads it (textfile collector). This needs the extra `prometheus` and a folder that"
        " the service may write to.",
        option="--prometheus FILE",
        example='"/var/lib/rbc-edge/rbc-edge.prom"',
    )
    quiet: bool = _is(False, "Print only errors.", option="--quiet -q", heading="Messages and limits")
    verbose: bool = _is(False, "Print a line per image, and the details of an error.", option="--verbose -v")
    max_failures: int | None = _is(
        None,
        "Stop after this many failed images.",
        "For `rbc-edge run` only.",
        on="run",
        without="never stop",
        example="100",
        limits=(1, inf),
    )

    def out_folder(self) -> Path:
        """Returns `out`. Raises `UsageError` where it is not given."""
        if self.out is None:
            raise UsageError("no output folder", "give --out DIR, or set out in the settings file")
        return self.out

    @property
    def cell_diameter_px(self) -> float | None:
        """Diameter of a red cell in pixels that the user gave, in either way. None: to be estimated."""
        if self.um_per_px is not None:
            return CELL_DIAMETER_UM / self.um_per_px
        return self.cell_diameter


def _setting(of: Field[Any]) -> Setting:
    """Returns a setting. Without another `option` the word for its value is its unit, or N, or DIR."""
    is_list = get_origin(of.type) is tuple
    kind = tuple if is_list else next(k for k in (*get_args(of.type), of.type) if k is not NoneType)
    flag, unit = f"--{of.name.replace('_', '-')}", of.name.rpartition("_")[2].upper()
    word = unit if unit in {"S", "PX", "MB"} else "N" if kind is int else "DIR"
    option = f"{flag}/--no-{flag[2:]}" if kind is bool else f"{flag} {word}"
    about: dict[str, Any] = {"option": option, **of.metadata}
    return Setting(of.name, kind, of.default, **about)


# Each setting by its name, in the order of the example file.
SETTINGS: Final[Mapping[str, Setting]] = {f.name: _setting(f) for f in fields(Settings)}


def _fail(error: UsageError) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in force, and where each came from."""

    settings: Settings
    source: Mapping[str, str]  # of each setting: ``flag``, a variable, ``FILE:LINE``, or ``default``
    file: Path | None  # the settings file that was read


def load(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    fail: Callable[[UsageError], None] = _fail,
) -> Loaded:
    """Puts the settings together, each from the first place that names it.

    The two ways to give the scale are one setting: a flag for one of them comes before a file that has the
    other. A flag that is None is not given. Without `file`: that of ``RBC_EDGE_CONFIG``, or one of `places`.
    `fail` is told of each error. It may return: then the setting is left out, and the next error is found.

    Raises `UsageError` where a key is unknown, a value is of the wrong type or out of range, the file cannot
    be read, or one place gives the scale in both ways.
    """
    env = os.environ if env is None else env
    path = _file(file, env)
    # An option that may be given several times is an empty list where it is not given.
    flags = {key: value for key, value in flags.items() if value is not None and value != []}
    given = {k: (tuple(v) if isinstance(v, list) else v, "flag") for k, v in flags.items()}
    layers = (given, _variables(env, fail), {} if path is None else _read(path, fail))
    found: dict[str, tuple[Any, str]] = {}
    for layer in layers:
        if layer.keys() >= _SCALE_KEYS:
            origin = layer["cell_diameter"][1]
            where = "the command line" if origin == "flag" else origin
            text = f"{where}: cell_diameter and um_per_px are two ways to say the same"
            fail(UsageError(text, "give one of them"))
        taken = found.keys() | (_SCALE_KEYS if found.keys() & _SCALE_KEYS else ())
        found |= {key: value for key, value in layer.items() if key not in taken}
    for key, (value, origin) in list(found.items()):
        if not SETTINGS[key].allows(value):
            name = f"--{key.replace('_', '-')}" if origin == "flag" else f"{origin}: {key}"
            wrong = [v for v in value if not SETTINGS[key].allows((v,))] if type(value) is tuple else [value]
            text = f"{name} is {'empty' if wrong[0] == '' else wrong[0]}"
            fail(UsageError(text, f"it has to be {SETTINGS[key].values}", private=[str(wrong[0])]))
            del found[key]
    source = dict.fromkeys(SETTINGS, "default") | {key: origin for key, (_, origin) in found.items()}
    return Loaded(Settings(**{key: value for key, (value, _) in found.items()}), source, path)


def places(env: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
    """Returns where settings are looked for when no file is named: the user's (XDG), then the system's."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    return home / "rbc-edge" / "config.toml", _SYSTEM_FILE


_EXAMPLE_HEAD: Final = """\
# Settings of rbc-edge. The program reads the file that --config or RBC_EDGE_CONFIG names. Otherwise it reads
# ~/.config/rbc-edge/config.toml, or else /etc/rbc-edge/config.toml, which is the file of the service.
# An option of the command line comes before a variable RBC_EDGE_..., and a variable before this file.
#
# After a change: `rbc-edge config validate`. Then `systemctl reload rbc-edge` for a running service.
# After a change of source or out: run install.sh again where it made the service, so that the service may
# use the new folder.
#
# A line like "#key = value" shows the default. Where there is no default, it shows an example. An unknown key
# is an error.
"""


def example(*, source: Path | None = None, out: Path | None = None) -> str:
    """Returns a settings file that explains every setting. Only the folders given here are set in it.

    Raises `UsageError` where a folder's name is not UTF-8, and so cannot stand in a TOML file.
    """
    folders = {"source": source, "out": out}
    text = _EXAMPLE_HEAD
    for key, setting in SETTINGS.items():
        if setting.heading:
            text += f"\n# -- {setting.heading} ".ljust(_LINE_LENGTH - 3, "-") + "\n"
        comment = textwrap.wrap(f"{setting.help} {setting.more}", _LINE_LENGTH - 2, break_on_hyphens=False)
        if setting.default is None:
            comment.append(f"(no default{setting.without and f': {setting.without}'})")
        text += "\n" + "".join(f"# {line}\n" for line in comment)
        if (folder := folders.get(key)) is None:
            text += f"#{key} = {setting.example or json.dumps(setting.default)}\n"
        else:
            name = str(folder)
            if name.encode("utf-8", "ignore").decode() != name:
                raise UsageError(f"--{key} is {name!r}", "a settings file can name UTF-8 folders only")
            text += f"{key} = {json.dumps(name, ensure_ascii=False)}\n"
    return text


def _file(given: Path | None, env: Mapping[str, str]) -> Path | None:
    if named := given or env.get(f"{ENV_PREFIX}CONFIG"):
        return Path(named)
    found = (path for path in places(env) if os.path.isfile(path))  # noqa: PTH113 -- False, not an error
    return next(found, None)


def _variables(env: Mapping[str, str], fail: Callable[[UsageError], None]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for name, text in env.items():
        if name.startswith(ENV_PREFIX) and name != f"{ENV_PREFIX}CONFIG":
            where = f"environment variable {name}"
            try:
                key = _known(name.removeprefix(ENV_PREFIX).lower(), where, ENV_PREFIX)
                found[key] = (_from_text(key, text, name), name)
            except UsageError as error:
                fail(error)
    return found


def _from_text(key: str, text: str, where: str) -> object:
    kind = SETTINGS[key].kind
    word = text.strip().lower()
    if kind is bool and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    if kind is tuple and word:
        return tuple(text.split(":"))
    if kind is not bool and word:  # an empty path would be the current folder
        with suppress(ValueError):
            return kind(text)
    raise UsageError(f"{where}: {key} is {text!r}", f"it has to be {_TYPES[kind]}", private=[text])


def _read(path: Path, fail: Callable[[UsageError], None]) -> dict[str, tuple[Any, str]]:
    import tomllib  # noqa: PLC0415 -- it takes 4 ms, and only a settings file needs it

    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write a BOM
        content = tomllib.loads(text)
    except OSError as error:
        text = f"{path}: cannot read the configuration: {error.strerror}"
        raise UsageError(text, "check --config") from error
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        advice = "`rbc-edge config init --file -` prints one with every key"
        raise UsageError(f"{path}: not a TOML file: {error}", advice) from error
    lines: dict[str, int] = {}  # tomllib gives no line numbers, and every setting is on a line of its own
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(_KEY, line):
            lines.setdefault(match[1], number)
    values: dict[str, tuple[Any, str]] = {}
    for key, given in content.items():
        where = f"{path}:{lines[key]}" if key in lines else str(path)
        try:
            values[key] = _from_toml(_known(key, where, ""), given, where, path.parent), where
        except UsageError as error:
            fail(error)
    return values


def _from_toml(key: str, given: Any, where: str, folder: Path) -> object:
    kind = SETTINGS[key].kind
    if isinstance(given, str) and "\0" in given:
        raise UsageError(f"{where}: {key} is {given!r}", "remove \\u0000 from it", private=[given])
    if kind is Path and given and isinstance(given, str):
        return folder / given  # relative to the file, wherever the program is started
    if kind is float and type(given) is int:
        return float(str(given))  # of hundreds of digits: infinite, and no error
    if kind is tuple and isinstance(given, list) and all(type(text) is str for text in given):
        return tuple(given)
    if type(given) is not kind:  # not isinstance: true is no number
        shown = "empty" if given == "" else repr(given)
        raise UsageError(f"{where}: {key} is {shown}", f"it has to be {_TYPES[kind]}", private=[str(given)])
    return given


def _known(key: str, where: str, prefix: str) -> str:
    if key in SETTINGS:
        return key
    near = difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.0)[0]
    near = prefix + near.upper() if prefix else near
    raise UsageError(f"{where}: unknown setting {key!r}", f"did you mean {near}?", private=[key])

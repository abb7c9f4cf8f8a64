"""Options and commands for typer: those of the settings are made from `rbc_edge.config`."""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import typer

from rbc_edge.config import SETTINGS, Loaded, Setting, load
from rbc_edge.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line said about the settings."""

    flags: Mapping[str, Any] = field(default_factory=dict)  # by name of the setting; None: not given
    file: Path | None = None  # the settings file that ``--config`` named

    def load(self) -> Loaded:
        """Puts flags, environment, file and defaults together. Raises what `config.load` raises."""
        return load(self.flags, file=self.file)


def argument(word: str, help: str, default: Any = None) -> Any:
    """Makes an argument. A default of ``...`` makes it required."""
    # A path may be unreadable here: the code that uses it says so, with its own exit code.
    return typer.Argument(default, metavar=word, help=help, show_default=False, readable=False)


def option(spelling: str, help: str, default: Any = None, **more: Any) -> Any:
    """Makes an option. The spelling has its names and the word for its value: ``--out -o DIR``."""
    names = [word for word in spelling.split() if word.startswith("-")]
    word = " ".join(word for word in spelling.split() if word not in names)
    return typer.Option(default, *names, metavar=word or None, help=help, readable=False, **more)


def command(app: typer.Typer, *examples: str, config: bool = True) -> Callable[..., Any]:
    """Declares a command. A call of it loads the module ``rbc_edge.cli.NAME`` and calls its function NAME.

    The declaration is a function without a body, and it stays as it is. ``bundle_show`` is the function
    `show` of the group and the module `bundle`. A first parameter `given` stands for the settings that the
    command takes, each with an option, and for ``--config`` (`config`). Typer reads the other parameters.
    The examples are command lines for the help.
    """

    def declare(declaration: Callable[..., Any]) -> Callable[..., Any]:
        name = declaration.__name__.replace("_", "-")
        module, _, function = name.rpartition("-")
        own = list(inspect.signature(declaration).parameters.values())
        takes_settings = bool(own) and own[0].name == "given"
        settings = [s for s in SETTINGS.values() if takes_settings and name in s.on.split()]

        def call(**values: Any) -> None:
            if takes_settings:
                flags = {setting.name: values.pop(setting.name) for setting in settings}
                values["given"] = Given(flags, values.pop("config", None))
            raise typer.Exit(_loaded(module or function, function)(**values))

        for parameter in own:
            _name_numbers(parameter)
        parameters = [
            *map(_parameter, settings),
            *(p.replace(kind=p.KEYWORD_ONLY) for p in own[takes_settings:]),
            *([_CONFIG] if takes_settings and config else []),
        ]
        vars(call)["__signature__"] = inspect.Signature(parameters)
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        heading = "Example" if len(examples) == 1 else "Examples"
        epilog = "\n\n".join((f"{heading}:", *examples))
        text = inspect.getdoc(declaration) or ""
        first = text.split("\n\n")[0].replace("\n", " ")  # whole: typer would cut it
        app.command(function, help=text, short_help=first, epilog=epilog)(call)
        return declaration

    return declare


def _loaded(module: str, function: str) -> Callable[..., Any]:
    """Loads what a command does. Raises `UnavailableError` where a library that it needs cannot be loaded."""
    try:
        return cast(Callable[..., Any], getattr(import_module(f"rbc_edge.cli.{module}"), function))
    except Exception as error:  # a library of another processor or version may raise anything
        what = f"a library cannot be loaded: {type(error).__name__}: {error}"
        advice = "`rbc-edge doctor` says which; install rbc-edge again, into its own environment"
        raise UnavailableError(what, advice) from error


def _keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _parameter(setting: Setting) -> inspect.Parameter:
    """Makes typer's parameter of a setting. Its default is None: then the environment or a file counts."""
    default, spelling = setting.default_words, setting.option
    help_text = f"{setting.help}  [default: {default}]" if default else setting.help
    if setting.choices:
        spelling = f"{spelling.split()[0]} [{'|'.join(setting.choices)}]"
    info = option(spelling, help_text) if spelling.startswith("-") else argument(spelling, help_text)
    kind = list[str] if setting.kind is tuple else setting.kind
    return _name_numbers(_keyword(setting.name, kind | None, info))


def _number(kind: type[int] | type[float], text: str) -> int | float:
    """Returns the number that a text is, or says what to write instead of "80px" or "0,5"."""
    with suppress(ValueError):
        return kind(text)
    found = re.fullmatch(r"\s*([+-]?\d+)(?:[.,](\d+))?\s*[^\d.,]*", text)
    advice = ""
    if found and not (found[2] and kind is int):
        decimals = f".{found[2]}" if found[2] else ""
        advice = f": write {found[1]}{decimals}, without a unit"
    raise typer.BadParameter(f"{text!r} is not {'a whole number' if kind is int else 'a number'}{advice}")


def _name_numbers(parameter: inspect.Parameter) -> inspect.Parameter:
    """Gives an option for a number words of its own where it is none. One with a limit keeps typer's."""
    for kind in (float, int):
        info = parameter.default
        if parameter.annotation in (kind, kind | None) and getattr(info, "min", 0) is None:
            info.parser = partial(_number, kind)
    return parameter


_CONFIG = _keyword(
    "config",
    Path | None,
    option("--config FILE", "Settings file (TOML).  [default: the user's, or else the one in /etc/rbc-edge]"),
)

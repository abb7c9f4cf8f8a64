"""Writes the tables of ``docs/commands.md`` from the program.

Run it after a change of an option or a setting::

    python docs/make_commands.py
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from rbc_edge import cli
from rbc_edge.config import SETTINGS

PAGE = Path(__file__).with_name("commands.md")

_SECTION = re.compile(r"^## (?:`rbc-edge(?P<command>[a-z ]*)[^`]*`|Settings)\n.*?(?=^## |\Z)", re.M | re.S)
_TABLE = re.compile(r"(?:^\|.*\n)+", re.M)


def page(text: str) -> str:
    """Returns the text of the page with every table of options, and that of the settings, made again."""
    commands = dict(_commands(get_command(cli.app)))

    def section(found: re.Match[str]) -> str:
        name = found["command"]
        table = _settings() if name is None else _options(commands[name.strip()], is_program=not name)
        made, n = _TABLE.subn(lambda _: table, found[0], count=1)
        assert n == 1 or not table, f"no table for {name}"
        return made

    return _SECTION.sub(section, text)


def _commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{path} {name}".strip())


def _options(command: Any, *, is_program: bool) -> str:
    rows = []
    context = command.context_class(command, **command.context_settings)
    for parameter in command.get_params(context):
        is_help = "--help" in parameter.opts  # the same for each command: only in the first table
        if parameter.param_type_name != "option" or parameter.hidden or (is_help and not is_program):
            continue
        names = sorted(
            (*parameter.opts, *parameter.secondary_opts), key=lambda name: not name.startswith("--")
        )
        word = f" {parameter.metavar}" if parameter.metavar else ""
        rows.append((", ".join(_code(f"{name}{word}") for name in names), _text(parameter.help)))
    return _table(("option", "meaning"), rows)


def _settings() -> str:
    rows = [
        (
            _code(setting.name),
            setting.values,
            setting.without if setting.default is None else _code(json.dumps(setting.default)),
            _text(setting.help),
        )
        for setting in SETTINGS.values()
    ]
    return _table(("key", "value", "default", "meaning"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return "`" + text.replace("|", r"\|") + "`"


def _text(words: str) -> str:
    """Returns a help text for Markdown: names with <a place> in them as code."""
    return re.sub(r"[\w/]*<\w+>(?:[\w/.]*[\w/])?", r"`\g<0>`", " ".join(words.split()))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

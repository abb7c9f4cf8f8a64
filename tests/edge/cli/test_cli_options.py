"""The command line has what the settings say, and its declarations fit what they call."""

import importlib.util
import inspect
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import Run
from stand_in import TOY_BUNDLE
from typer.main import get_command

from rbc_edge import cli
from rbc_edge.cli import commands
from rbc_edge.cli.options import Given
from rbc_edge.config import SETTINGS

ROOT = Path(__file__).parents[3]
PROGRAM: Any = get_command(cli.app)  # types of click, which typer does not name
COMMANDS = {
    **{name: c for name, c in PROGRAM.commands.items() if not hasattr(c, "commands")},
    **{f"{g}-{name}": c for g in ("bundle", "config") for name, c in PROGRAM.commands[g].commands.items()},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_settings(name: str) -> None:
    found = {p.name: p for p in COMMANDS[name].params}
    if "given" not in inspect.signature(getattr(commands, name.replace("-", "_"))).parameters:
        return
    wanted = [setting for setting in SETTINGS.values() if name in setting.on.split()]
    assert [key for key in found if key in SETTINGS and (name, key) != ("demo", "out")] == [
        s.name for s in wanted
    ]
    for setting in wanted:
        parameter = found[setting.name]
        assert parameter.default is None  # not given: a variable, a file or the default may say it
        assert parameter.help.startswith(setting.help)
        if setting.option.startswith("-"):
            words = setting.option.replace("/", " ").split()
            assert [*parameter.opts, *parameter.secondary_opts] == [w for w in words if w.startswith("-")]
        else:
            assert parameter.param_type_name == "argument"


def test_every_setting_is_taken_by_commands_that_exist() -> None:
    for setting in SETTINGS.values():
        assert setting.on and set(setting.on.split()) <= set(COMMANDS), setting.name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_declaration_has_the_parameters_of_what_it_calls(name: str) -> None:
    declared = inspect.signature(getattr(commands, name.replace("-", "_"))).parameters
    module, _, function = name.rpartition("-")
    called = inspect.signature(getattr(import_module(f"rbc_edge.cli.{module or function}"), function))
    assert list(declared) == list(called.parameters)
    assert called.return_annotation is int
    for key, parameter in declared.items():
        kind = str(called.parameters[key].annotation).replace("collections.abc.Sequence", "list")
        assert kind == str(parameter.annotation), key


def test_a_flag_comes_before_everything_else(
    rbc: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RBC_EDGE_EDGES", "inside")
    (tmp_path / "c.toml").write_text('edges = "two-sides"\nsettle_s = 3\n')
    settings = Given({"edges": "all", "out": None}, tmp_path / "c.toml").load().settings
    assert (settings.edges, settings.settle_s, settings.out) == ("all", 3.0, None)
    shown = json.loads(rbc("config", "show", "--json", "--config", tmp_path / "c.toml")[1])
    assert shown["edges"] == {"value": "inside", "source": "RBC_EDGE_EDGES"}
    assert shown["settle_s"] == {"value": 3.0, "source": f"{tmp_path / 'c.toml'}:2"}


def test_the_old_name_of_the_support_archive_is_understood_and_not_shown(rbc: Run, tmp_path: Path) -> None:
    asked = ("doctor", "--bundle", TOY_BUNDLE, "--json")
    for number, name in enumerate(("--support-archive", "--bundle-support")):
        archive = tmp_path / f"{number}.zip"
        assert "README.txt" in json.loads(rbc(*asked, name, archive)[1])["support"]
        assert archive.is_file()
    told = rbc("doctor", "--help")[1]
    assert "--support-archive" in told and "--bundle-support" not in told


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_program() -> None:
    # After a change: python docs/make_commands.py
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert maker().page(text) == text
    assert "| `--um-per-px UM` | Scale of the images" in text
    assert maker().page(text.replace("| `--um-per-px UM` |", "| `--um` |")) == text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--cell-diameter", "80px"), "'80px' is not a number: write 80, without a unit"),
        (("--um-per-px", "0,09 um"), "'0,09 um' is not a number: write 0.09, without a unit"),
        (("--threads", "two"), "'two' is not a whole number"),
        (("--threads", "1.5"), "'1.5' is not a whole number"),
    ],
)
def test_a_number_with_a_unit_gets_words_that_help(rbc: Run, given: tuple[str, str], said: str) -> None:
    code, _, complained = rbc("run", "x", "--out", "y", *given)
    assert code == 2
    assert complained.endswith(f"Invalid value for '{given[0]}': {said}\n")


def test_the_help_cuts_nothing_and_has_no_brackets_in_brackets(rbc: Run) -> None:
    _, said, _ = rbc("--help")
    assert "..." not in said.partition("Commands:")[2]
    for name in ("report", "forget", "exclude", "retry"):
        assert "[[" not in rbc(name, "--help")[1]

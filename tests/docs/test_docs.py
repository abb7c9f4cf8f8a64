"""What README and docs name exists in the program, and what the program has stands in them."""

import ast
import importlib.util
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rbc_edge import cli
from rbc_edge.config import Settings, load
from rbc_edge.errors import ExitCode
from rbc_edge.station.state_file import Activity
from rbc_edge.store import corrections
from rbc_edge.store.rows import Status
from rbc_edge.values import ScaleSource, Shape
from rbc_edge.views import shapes, tables
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.quality import NOTES
from rbc_export import cli as export_cli
from rbc_train import cli as train_cli
from studies import (
    ablations,
    baselines,
    bccd,
    corruptions,
    coverage,
    laboratories,
    paper,
    scale,
    wrong_fields,
)
from studies import flags as flag_study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / "edge" / "rbc_edge").rglob("*.py"))]
COMMANDS_PAGE, TABLES_PAGE = ROOT / "docs" / "commands.md", ROOT / "docs" / "tables.md"

# Commands of click, which typer does not name as a type of its own.
Command = Any

PROGRAM: Command = get_command(cli.app)
PYTHON_M: dict[str, Command] = {
    "rbc_edge": PROGRAM,
    "rbc_train": get_command(train_cli.app),
    "studies.ablations": get_command(ablations.app),
    "studies.baselines": get_command(baselines.app),
    "studies.bccd": get_command(bccd.app),
    "studies.corruptions": get_command(corruptions.app),
    "studies.coverage": get_command(coverage.app),
    "studies.flags": get_command(flag_study.app),
    "studies.laboratories": get_command(laboratories.app),
    "studies.paper": get_command(paper.app),
    "studies.scale": get_command(scale.app),
    "studies.wrong_fields": get_command(wrong_fields.app),
    "rbc_export": get_command(export_cli.app),
}


# -- reading the pages --------------------------------------------------------------------------------------


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block between fences."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """The `words in code` of a text."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def shell_lines(page: Path) -> Iterator[str]:
    """Lines that a reader would type: of a block with $ those behind one, of another all."""
    for language, text in fences(page):
        if language not in ("", "sh", "console"):
            continue
        typed = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        yield from typed or text.replace("\\\n", " ").splitlines()


def words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # not a shell's line
        return []


def called(line: str) -> tuple[Command, list[str]] | None:
    """The program of ours that a line calls, and what it is given."""
    given = words(line)
    while given and (given[0] == "sudo" or re.fullmatch(r"[A-Z_]+=.*", given[0])):
        given = given[1:]
    if given[:2] == ["runuser", "-u"]:
        given = given[given.index("--") + 1 :] if "--" in given else []
    if not given:
        return None
    name = given[0].rpartition("bin/")[2]  # not /var/lib/rbc-edge
    if name == "rbc-edge":
        return PROGRAM, given[1:]
    if name == "python" and given[1:2] == ["-m"] and given[2] in PYTHON_M:
        return PYTHON_M[given[2]], given[3:]
    return None


def placeholders(line: str) -> str:
    """A line of a text with its [optional] parts and ... taken away."""
    while re.search(r"\[[^\[\]]*\]", line):
        line = re.sub(r"\[[^\[\]]*\]", "", line)
    return line.replace("...", "")


# These act while a line is parsed, one of them on the reader's shell.
EAGER = {"--help", "-h", "--version", "--install-completion", "--show-completion"}


def parse(command: Command, given: list[str]) -> None:
    """Parses a command line as the program would, without running anything; raises what click raises."""
    assert not EAGER & set(given)
    context = command.make_context("x", list(given), resilient_parsing=False)
    with context:
        if hasattr(command, "commands"):
            rest = [*context._protected_args, *context.args]
            if rest:
                name, inner, left = command.resolve_command(context, rest)
                assert inner is not None, name
                parse(inner, left)


def leaves(command: Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Every command that does something, and the groups they are in."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, name))


def options(command: Command) -> set[str]:
    return {
        option
        for parameter in command.get_params(command.context_class(command, **command.context_settings))
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-")
    }


def hidden(command: Command) -> set[str]:
    """Old names of options, which are understood and not shown."""
    return {o for p in command.params if getattr(p, "hidden", False) for o in p.opts}


def rows(text: str) -> list[list[str]]:
    """Cells of the first table of a text, without its head."""
    table = re.search(r"^\|.*\n\|[-| :]+\|\n((?:\|.*\n?)+)", text, re.M)
    assert table is not None
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[1].strip().split("\n")
    ]


def section(page: Path, heading: str) -> str:
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^##+ {heading}.*?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"{page.name}: no heading {heading}"
    return found[1]


# -- commands and options -----------------------------------------------------------------------------------

NAMED = {
    (" ".join(path)): command for path, command in leaves(PROGRAM) if not getattr(command, "commands", {})
}


def test_the_reference_has_every_command_and_no_other() -> None:
    text = COMMANDS_PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## `rbc-edge ([a-z ]+?)(?: [A-Z\[].*)?`$", text, re.M)
    assert sorted(headings) == sorted(NAMED)


@pytest.mark.parametrize("name", ["", *NAMED])
def test_the_reference_has_every_option_and_no_other(name: str) -> None:
    command = NAMED.get(name, PROGRAM)
    text = section(COMMANDS_PAGE, f"`rbc-edge{f' {name}' if name else ''}[` ]")
    documented = {word.split()[0] for row in rows(text) for word in spans(row[0])}
    said_once = {"--help", "-h"} if name else set()
    assert documented == options(command) - hidden(command) - said_once


def test_arguments_are_in_the_headings() -> None:
    text = COMMANDS_PAGE.read_text(encoding="utf-8")
    for name, command in NAMED.items():
        heading = re.search(rf"^## `rbc-edge {name}( .*)?`$", text, re.M)
        assert heading is not None
        wanted = {p.name.upper().rstrip("S") for p in command.params if p.param_type_name == "argument"}
        assert {word.rstrip("S") for word in re.findall("[A-Z]+", heading[1] or "")} == wanted, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_can_be_typed(page: Path) -> None:
    lines = [line for line in shell_lines(page) if "..." not in line]
    # In the text a command may be called by its name alone.
    text = [placeholders(span) for span in spans(prose(page)) if called(span)]
    alone = {f"rbc-edge {' '.join(path)}" for path, _ in leaves(PROGRAM)} | {
        "rbc-edge",
        "rbc-edge COMMAND --help",
    }
    for line in [*lines, *(t for t in text if t.strip() not in alone)]:
        call = called(line)
        if call is None or call[1] == [] or EAGER & set(call[1]):
            continue
        try:
            parse(*call)
        except Exception as error:  # noqa: BLE001  click's and typer's own, and ours
            if line in text and type(error).__name__ == "MissingParameter":
                continue  # `rbc-edge run --cells` in a sentence names no folder
            pytest.fail(f"{page.name}: {line}: {getattr(error, 'message', None) or error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_named_exists(page: Path) -> None:
    ours = set(chain.from_iterable(options(c) for p in PYTHON_M.values() for _, c in leaves(p)))
    for script in (
        "deploy/install.sh",
        "deploy/uninstall.sh",
        "tests/faults/__main__.py",
        "tests/arm64/__main__.py",
        "tests/same/__main__.py",
        "docs/outputs.py",
    ):
        ours |= set(re.findall(r"--[a-z-]+", (ROOT / script).read_text(encoding="utf-8")))
    named = {m[0] for span in spans(prose(page)) if (m := re.match(r"--[a-z][a-z-]*", span))}
    assert named <= ours


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))
    for page in PAGES:
        typed = [*shell_lines(page), *spans(prose(page))]
        named = {m[1] for line in typed if (m := re.match(r"make ([a-z0-9-]+)", line))}
        assert named <= targets, page.name
    assert {"demo", "test", "faults"} <= targets


def test_every_option_of_the_installer_is_in_its_help() -> None:
    usage = (
        (ROOT / "deploy" / "install.sh")
        .read_text(encoding="utf-8")
        .partition("usage()")[2]
        .partition("END\n}")[0]
    )
    for page in PAGES:
        for line in [*shell_lines(page), *spans(prose(page))]:
            given = words(line.removeprefix("sudo "))
            if given and given[0].endswith("install.sh") and not given[0].endswith("uninstall.sh"):
                assert {w for w in given if w.startswith("--")} <= set(re.findall("--[a-z-]+", usage)), line


# -- settings -----------------------------------------------------------------------------------------------


def test_the_reference_has_every_setting_and_its_default() -> None:
    found = {spans(row[0])[0]: spans(row[2]) for row in rows(section(COMMANDS_PAGE, "Settings"))}
    assert sorted(found) == sorted(f.name for f in fields(Settings))
    for key, default in found.items():
        value = getattr(Settings(), key)
        if default:
            shown = (
                str(value).lower()
                if isinstance(value, bool)
                else f'"{value}"'
                if isinstance(value, str)
                else str(list(value))
                if isinstance(value, tuple)
                else str(value)
            )
            assert default == [shown], key
        else:
            assert value is None, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_are_valid(page: Path, tmp_path: Path) -> None:
    blocks = [text for language, text in fences(page) if language == "toml"]
    keys = {f.name for f in fields(Settings)}
    lines = [s for s in spans(prose(page)) if (m := re.match(r"([a-z_]+) = ", s)) and m[1] in keys]
    for number, text in enumerate([*blocks, *lines]):
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        load({}, file=file, env={})
    for name in re.findall(r"RBC_EDGE_([A-Z_]+)", page.read_text(encoding="utf-8")):
        assert name.lower() in {*keys, "config"}, name


# -- exit codes, words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [ROOT / "README.md", COMMANDS_PAGE], ids=lambda page: page.name)
def test_exit_codes(page: Path) -> None:
    codes = [int(code) for row in rows(section(page, "Exit codes")) for code in row[0].split(", ")]
    assert sorted(codes) == sorted(ExitCode)


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("`slides.csv`", tables.SLIDE_TABLE.names),
        ("`<slide_id>.csv`", tables.FIELD_TABLE.names),
        ("`cells/<slide_id>.csv`", tables.CELL_TABLE.names),
        ("`shapes/<slide_id>.csv`", tables.SHAPE_TABLE.names),
    ],
)
def test_columns_stand_in_their_order(heading: str, columns: tuple[str, ...]) -> None:
    assert [spans(row[0]) for row in rows(section(TABLES_PAGE, heading))] == [[c] for c in columns]


def test_the_page_of_the_tables_has_every_column_and_no_other() -> None:
    text = prose(TABLES_PAGE)
    named = {
        word
        for span in spans(text)
        for word in span.split(", ")
        if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", word)
    }
    columns = {*tables.FIELD_TABLE.names, *tables.SLIDE_TABLE.names, *tables.CELL_TABLE.names}
    columns |= {*tables.SHAPE_TABLE.names}
    of_json = {
        key
        for file in Path(cli.__file__).parent.rglob("*.py")
        for key in re.findall(r'"([a-z0-9_]+)":', file.read_text(encoding="utf-8"))
    }
    values = {*LABELS, *Status, *ScaleSource, *of_json}
    assert columns <= named
    assert {word for word in named if "_" in word} <= columns | values


def test_the_page_about_shapes_shows_what_the_program_knows() -> None:
    page = ROOT / "docs" / "shapes.md"
    judged = spans(section(page, "Which cells are judged"))
    assert set(judged) >= {*shapes.SPOILS, "overlapping", "cut", "unsure", "flagged"}
    assert not set(judged) & NOTES
    make = runpy.run_path(str(ROOT / "docs" / "make_shapes.py"))
    assert set(make["DRAWINGS"]) == set(Shape)
    drawn = (ROOT / "docs" / "shapes.svg").read_text(encoding="utf-8")
    assert make["svg"]() == drawn, "run: python docs/make_shapes.py"
    text = page.read_text(encoding="utf-8")
    assert f"{shapes.ENOUGH:,} cells" in text and f"{shapes.PALE:.0%}".replace("%", " %") in text


def test_the_readme_names_every_table_and_no_column_that_is_not_there() -> None:
    text = section(ROOT / "README.md", "Tables")
    assert {"slides.csv", "<slide_id>.csv", "cells/<slide_id>.csv"} <= set(spans(text))
    assert "(docs/tables.md)" in text
    columns = {*tables.FIELD_TABLE.names, *tables.SLIDE_TABLE.names, *tables.CELL_TABLE.names}
    assert {span for span in spans(text) if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", span)} <= columns


LABELS = {*corrections.LABELS}


def test_words_in_columns() -> None:
    fields_text = section(TABLES_PAGE, "`<slide_id>.csv`")
    shown = set(Status) - {Status.FORGOTTEN}  # a forgotten field is in no table
    assert {*map(str, shown), *map(str, ScaleSource)} <= set(spans(fields_text))
    assert set(spans(section(TABLES_PAGE, "`cells/<slide_id>.csv`"))) >= LABELS
    assert {*map(str, EdgeRule)} <= set(spans((ROOT / "docs" / "counting.md").read_text(encoding="utf-8")))


def failures() -> set[str]:
    """Every word that the program may put into the column: first arguments where failures are made."""
    found: set[str] = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = (
                node.args[0:1] if name == "ImageError" else node.args[1:2] if name == "record_failed" else []
            )
            given += [k.value for k in node.keywords if k.arg == "failure"]
            found |= {v.value for v in given if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return found - {""}


def test_failures() -> None:
    documented = {spans(row[0])[0] for row in rows(section(TABLES_PAGE, "Words in `failure`"))}
    assert documented == failures()
    assert len(documented) > 8


def flags() -> set[str]:
    """Every quality flag of the program."""
    if importlib.util.find_spec("rbc_edge.vision.quality"):
        return set(importlib.import_module("rbc_edge.vision.quality").FLAGS)
    return {"no-red-cells", "scale-mismatch"}


def test_quality_flags() -> None:
    everywhere = {span for page in PAGES for span in spans(page.read_text(encoding="utf-8"))}
    assert flags() <= everywhere
    table = {spans(row[0])[0] for row in rows(section(TABLES_PAGE, "Words in `quality_flags`"))}
    assert table == flags()


def test_states_of_the_service() -> None:
    told = section(ROOT / "docs" / "operations.md", "How it is")
    passing = {Activity.STARTING, Activity.STOPPING, Activity.UNKNOWN}
    for activity in set(Activity) - passing:
        assert str(activity) in told, activity


def test_metrics() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in SOURCES)
    for page in PAGES:
        for name in re.findall(r"`rbc_edge_([a-z_]+)", prose(page)):
            assert f'"{name}"' in source or f'"rbc_edge_{name}"' in source, name


# -- links --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "")).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if re.match("[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert len(pages) > 15
    assert set(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == pages


def test_files_named_in_the_text_exist() -> None:
    for page in PAGES:
        for span in spans(prose(page)):
            if re.fullmatch(r"(edge|train|export|tests|docs|deploy|bench)(/[\w.-]+)+", span):
                assert (ROOT / span).exists(), f"{page.name}: {span}"


# -- the checks themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "rbc-edge run images --oot results",
        "rbc-edge runn images --out results",
        "rbc-edge watch a b --out results",
        "rbc-edge config inti",
        "rbc-edge run --out results",
        "sudo runuser -u rbc-edge -- rbc-edge retry --fov x",
        "python -m rbc_train evaluate --bundel x",
        "python -m studies.bccd --split all",
    ],
)
def test_a_wrong_line_is_found(line: str) -> None:
    call = called(line)
    assert call is not None
    with pytest.raises(Exception, match=r"(?s).+"):
        parse(*call)


def test_a_right_line_is_not() -> None:
    for line in (
        "$ .venv/bin/rbc-edge run a b --out c --cells"[2:],
        "RBC_EDGE_THREADS=1 rbc-edge config show --json",
        "runuser -u rbc-edge -- rbc-edge retry s f --out x",
        ".venv/bin/python -m studies.bccd --split test   # once",
    ):
        call = called(line)
        assert call is not None
        parse(*call)

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from rbc_edge.cli import console


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    log = logging.getLogger("rbc_edge")
    before = list(log.handlers), log.level
    yield
    log.handlers, log.level = before[0], before[1]


def test_a_table_has_columns_of_one_width(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table([("slide", "n", "x"), ("a longer one", "1,000", ""), ("s", "2", "y")])
    assert capsys.readouterr().out == (
        "slide             n  x\na longer one  1,000\ns                 2  y\n"
    )


def test_a_mapping_shows_inner_ones_under_their_key(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_mapping({"id": "x", "scores": (0.5, 1), "inner": {"a": {"b": None}}, "empty": {}})
    assert capsys.readouterr().out == "id: x\nscores: 0.5, 1\ninner:\n  a:\n    b: None\nempty:\n"


def test_messages_go_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with console.Bar(shown=True) as bar:
        console.log_to_stderr(bar=bar)
        bar.step(1, 4, "s/1")
        console.log.warning("careful")
        console.log.info("not shown")
    drawn = terminal.getvalue()
    line = f"\r\x1b[K{'#' * 7}{'.' * 23} 1/4 s/1"
    assert drawn == f"{line}\r\x1b[Kcareful\n{line}\r\x1b[K"


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Bar(shown=False) as bar:
        bar.step(1, 1, "s/1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({}, ["WARNING", "ERROR"]),
        ({"quiet": True}, ["ERROR"]),
        ({"verbose": True}, ["DEBUG", "INFO", "WARNING", "ERROR"]),
        ({"service": True}, ["INFO", "WARNING", "ERROR"]),
    ],
)
def test_levels(asked: dict[str, Any], shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    console.log_to_stderr(**asked)
    for level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        console.log.log(getattr(logging, level), level)
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == shown


def test_a_line_of_a_service_is_one_line_with_its_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.log_to_stderr(service=True)
    console.log.warning("two\nlines")
    assert capsys.readouterr().err.rstrip().endswith(r" WARNING two\nlines")
    monkeypatch.setattr(console, "under_journal", lambda _: True)
    console.log_to_stderr(service=True)
    console.log.error("two\nlines")
    assert capsys.readouterr().err == "<3>two\\nlines\n"

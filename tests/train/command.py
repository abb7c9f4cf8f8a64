"""The command lines of training and of the studies, called as the shell does."""

import sys

import pytest
import typer

from rbc_train import cli, console


def rbc_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a command of training."""
    return called(cli.app, monkeypatch, capsys, *words)


def called(
    app: typer.Typer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: object,
) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    code = 0
    try:
        console.answer(app)
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err

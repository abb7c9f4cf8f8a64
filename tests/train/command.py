"""The workshop's command line, called as the shell does."""

import sys

import pytest

from rbc_train import cli


def rbc_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["rbc_train", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import SOURCE_ROOT, Run
from stand_in import TOY_BUNDLE
from typer.core import TyperGroup
from typer.main import get_command

from rbc_edge import cli

pytestmark = pytest.mark.usefixtures("own_settings")


def test_completion_is_offered(rbc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_RBC_EDGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "rbc-edge config va")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert rbc() == (0, "validate\n", "")


def test_every_command_has_examples(rbc: Run) -> None:
    def leaves(group: TyperGroup, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, command in group.commands.items():
            if isinstance(command, TyperGroup):
                yield from leaves(command, (*path, name))
            else:
                yield (*path, name)

    program = get_command(cli.app)
    assert isinstance(program, TyperGroup)
    found = list(leaves(program, ()))
    assert ("config", "init") in found
    for path in found:
        assert re.search(rf"Examples?:\s+.*rbc-edge {' '.join(path)}", rbc(*path, "--help")[1], re.S), path


def test_help_and_nothing(rbc: Run) -> None:
    code, said, _ = rbc("run", "--help")
    assert code == 0
    assert "rbc-edge run /camera --out /results" in said
    assert rbc()[0] == 2


def test_help_needs_none_of_the_heavy_modules() -> None:
    heavy = ("numpy", "cv2", "onnxruntime", "PIL", "sqlite3", "rich")
    code = (
        "import sys\nfrom rbc_edge.cli import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": SOURCE_ROOT},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"


def test_a_bug_is_one_line_and_a_traceback_only_when_asked(
    rbc: Run, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the unthinkable")

    monkeypatch.setattr("rbc_edge.cli.run.count_once", broken)
    asked = ("run", camera, "--out", tmp_path / "out", "--bundle", TOY_BUNDLE)
    code, _, complained = rbc(*asked)
    assert code == 1
    assert complained.count("\n") == 1
    assert "unexpected RuntimeError: the unthinkable. This is a bug" in complained
    assert "Traceback" in rbc(*asked, "--verbose")[2]

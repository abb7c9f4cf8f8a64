import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import SOURCE_ROOT, TOY, Run, process
from stand_in import TOY_BUNDLE, write_disks
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


def shell(
    line: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> tuple[int, bytes, bytes]:
    """Runs the program by a line of the shell, in which "$@" stands for it; code, stdout, stderr."""
    command = [sys.executable, "-W", "error", "-m", "rbc_edge", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": SOURCE_ROOT, **environment}
    done = subprocess.run(
        ["sh", "-c", line, "sh", *command], cwd=cwd, env=env, capture_output=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_full_disk_behind_stdout_is_said_and_no_bug(camera: Path, tmp_path: Path) -> None:
    for arguments in (("config", "init", "--file", "-"), ("run", camera, "--out", tmp_path / "out", *TOY)):
        code, _, complained = shell('"$@" >/dev/full', *arguments)
        assert code == 5
        assert re.match(rb"rbc-edge: cannot .*: No space left on device\n", complained)
        assert b"bug" not in complained and b"Exception" not in complained
    assert (tmp_path / "out" / "s1.csv").exists()


def test_closed_and_full_streams_do_not_stop_the_work(camera: Path, tmp_path: Path) -> None:
    (camera / "s1" / "bad.png").write_bytes(b"")  # there is something to say on stderr
    for number, line in enumerate(('"$@" 2>&-', '"$@" 2>/dev/full', '"$@" >&- 2>&- <&-')):
        out = tmp_path / str(number)
        code, said, complained = shell(line, "run", camera, "--out", out, "--json", *TOY)
        assert (code, complained) == (3, b"")
        if ">&- 2" not in line:
            assert json.loads(said)["n_failed"] == 1
        assert (out / "s1.csv").exists()


def test_a_deleted_working_folder_is_said_and_matters_only_to_relative_paths(
    camera: Path, tmp_path: Path
) -> None:
    for relative, wanted in ((True, 5), (False, 0)):
        here = tmp_path / "here"
        here.mkdir()
        asked = ("run", "camera" if relative else camera, "--out", tmp_path / "out", *TOY)
        code, _, complained = shell('rmdir "$PWD" && "$@"', *asked, cwd=here)
        assert code == wanted, complained
        assert b"bug" not in complained
        assert (b"the current folder is not there any more" in complained) is relative


def test_json_is_json_whatever_stdout_can_show(tmp_path: Path) -> None:
    write_disks(tmp_path / "cam" / "Müller ＝ 🔬" / "a.png", 3)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for encoding in ("ascii", "latin-1", "utf-8"):
        asked = process(
            "run",
            tmp_path / "cam",
            "--out",
            tmp_path / "out",
            "--json",
            *TOY,
            **locale,
            PYTHONIOENCODING=encoding,
        )
        said, complained = asked.communicate(timeout=120)
        assert asked.returncode == 0, complained
        assert json.loads(said)["slides"][0]["slide_id"] == "Müller ＝ 🔬"


def test_no_library_writes_to_stderr_by_itself(tmp_path: Path) -> None:
    (tmp_path / "cam").mkdir()
    deep = np.full((64, 64, 4), 40_000, np.uint16)  # OpenCV says of its own TIFF that a channel is too much
    assert cv2.imwrite(str(tmp_path / "cam" / "a.tif"), deep)
    code, _, complained = shell('"$@"', "run", tmp_path / "cam", "--out", tmp_path / "out", *TOY)
    assert (code, complained) == (0, b"")


def test_results_in_a_folder_whose_name_is_not_text(tmp_path: Path) -> None:
    """The list of what a process has in memory names the ledger in it. All images failed of that."""
    write_disks(tmp_path / "cam" / "a.png", 3)
    code, said, complained = shell(
        '"$@" "$(printf "o\\377")"', "run", tmp_path / "cam", *TOY, "--json", "--out", cwd=tmp_path
    )
    assert (code, complained) == (0, b"")
    assert json.loads(said)["n_counted"] == 1


def test_names_do_not_steer_the_terminal(rbc: Run, tmp_path: Path) -> None:
    evil = "a\x1b]0;b\x07\nc\u202e"
    write_disks(tmp_path / "cam" / evil / f"{evil}.png", 3)
    (tmp_path / "cam" / evil / f"{evil}2.png").write_bytes(b"")
    asked = ("run", tmp_path / "cam", "--out", tmp_path / evil, *TOY, "--report", "--verbose")
    for arguments in (asked, (*asked, "--force", "--json"), ("report", "--out", tmp_path / evil)):
        code, said, complained = rbc(*arguments)
        assert code in (0, 3)
        for text in (said, complained):
            assert not {"\x1b", "\x07", "\u202e"} & set(text) and "\nc" not in text


@pytest.mark.parametrize(
    ("library", "error"),
    [
        ("cv2", "ImportError('libGL.so.1: cannot open shared object file')"),
        ("numpy", "RuntimeError('NumPy was built with baseline optimizations: (X86_V2)')"),
        ("onnxruntime", "ImportError('a symbol is missing')"),
    ],
)
def test_a_library_that_cannot_load_is_said_and_the_version_needs_none(
    camera: Path, tmp_path: Path, library: str, error: str
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"{library}.py").write_text(f"raise {error}\n")
    path = f"{tmp_path / 'broken'}:{SOURCE_ROOT}"
    for arguments, wanted in ((["--version"], 0), (["run", camera, "--out", tmp_path / "out", *TOY], 5)):
        code, _, complained = shell(f'PYTHONPATH={path} "$@"', *arguments)
        assert (code, b"Traceback" in complained or b"bug" in complained) == (wanted, False), complained
    assert b"a library cannot be loaded" in complained and b"rbc-edge: " in complained
    with suppress(FileNotFoundError):  # no image is written down as failed
        assert "failed" not in (tmp_path / "out" / "s1.csv").read_text()

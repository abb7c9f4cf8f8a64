import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stand_in import TOY_BUNDLE, write_disks
from typer.core import TyperGroup
from typer.main import get_command

import rbc_edge
from rbc_edge import cli, config
from rbc_edge.errors import BundleError
from rbc_edge.vision import selftest
from rbc_edge.vision.bundle import Bundle

Run = Callable[..., tuple[int, str, str]]
SOURCE_ROOT = str(Path(rbc_edge.__file__).parents[1])


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RBC_EDGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(config, "_SYSTEM_FILE", tmp_path / "none.toml")


@pytest.fixture
def rbc(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; returns exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    for i in range(3):
        write_disks(tmp_path / "camera" / "s1" / f"{i}.png", 4 + i, seed=i)
    return tmp_path / "camera"


def process(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": SOURCE_ROOT, **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "rbc_edge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )


def rows(path: Path, *without: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def test_run_prints_a_table_and_writes_the_files(rbc: Run, camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, complained = rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    assert (code, complained) == (0, "")
    lines = said.splitlines()
    assert lines[0].split()[:2] == ["slide", "fields"]
    n_rbc = rows(out / "slides.csv")[0]["n_rbc"]
    assert lines[1].split()[:4] == ["s1", "3", "0", n_rbc]
    assert re.fullmatch(
        rf"too few to say: s1: 3 fields with {n_rbc} red cells put the overlap anywhere in \d+%-\d+%; "
        r"about \d+ more fields make it sure to 2 points",
        lines[2],
    )
    assert lines[3].startswith("3 images: 3 counted now, 0 as before")
    assert int(n_rbc) > 0
    assert sorted(p.name for p in out.iterdir()) == [
        ".rbc-edge.lock",
        "ledger.sqlite3",
        "s1.csv",
        "slides.csv",
    ]


def test_run_json_is_all_of_stdout(rbc: Run, camera: Path, tmp_path: Path) -> None:
    (camera / "s1" / "bad.png").write_bytes(b"")
    out = tmp_path / "out"
    code, said, complained = rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--json", "--cells")
    answer = json.loads(said)
    assert (code, answer["exit_code"], answer["n_images"], answer["n_failed"]) == (3, 3, 4, 1)
    (slide,) = answer["slides"]
    assert (
        slide["n_rbc"]
        == slide["n_rbc_single"] + slide["n_rbc_overlapping"]
        == len(rows(out / "cells/s1.csv"))
    )
    assert re.search(r"failed \(empty\): .*bad\.png", complained)


def test_quiet_says_nothing_and_verbose_a_line_an_image(rbc: Run, camera: Path, tmp_path: Path) -> None:
    asked = ("run", camera, "--out", tmp_path / "out", "--bundle", TOY_BUNDLE)
    assert rbc(*asked, "--quiet") == (0, "", "")
    _, _, complained = rbc(*asked, "--verbose", "--force")
    assert [line for line in complained.splitlines() if line.startswith("ok ")] == [
        f"ok s1/{i}" for i in range(3)
    ]


def test_settings_come_from_environment_and_file(
    rbc: Run, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "xdg" / "rbc-edge" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f"out = '{tmp_path / 'configured'}'\ncell_diameter = 40\n")
    monkeypatch.setenv("RBC_EDGE_BUNDLE", str(TOY_BUNDLE))
    code, _, _ = rbc("run", camera)
    assert code == 0
    assert rows(tmp_path / "configured" / "s1.csv")[0]["scale_source"] == "cell-diameter"
    code, said, _ = rbc("config", "show")
    assert code == 0
    assert re.search(rf"^cell_diameter +40\.0 +{re.escape(str(file))}:2$", said, re.M)
    assert re.search(r"^bundle .* RBC_EDGE_BUNDLE$", said, re.M)
    assert json.loads(rbc("config", "show", "--json")[1])["threads"] == {"value": 0, "source": "default"}
    assert rbc("config", "validate") == (0, f"{file}: valid\n", "")
    file.write_text("thread = 1\n")
    code, _, complained = rbc("config", "validate")
    assert code == 2
    assert "did you mean threads?" in complained


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no output folder"),
        (["--out", "{out}", "--cell-diameter", "40", "--um-per-px", "0.1"], "two ways to say the same"),
        (["--out", "{out}", "--cell-diameter", "nan"], "--cell-diameter is nan"),
        (["--out", "{out}", "--cell-diameter", "-3"], "--cell-diameter is -3"),
        (["--out", "{out}", "--um-per-px", "0"], "--um-per-px is 0"),
        (["--out", "{out}", "--edges", "left"], "--edges is left"),
        (["--out", "{out}", "--threads", "x"], "--threads"),
        (["--out", "{out}", "--max-failures", "0"], "--max-failures is 0"),
        (["--out", "{out}", "--slide-pattern", "("], "slide pattern"),
        (["--out", "{out}", "--config", "/no/such.toml"], "/no/such.toml"),
        (["--out", "{out}", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_is_exit_2_in_words(
    rbc: Run, camera: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    filled = [a.format(out=tmp_path / "out") for a in arguments]
    code, printed, complained = rbc("run", camera, "--bundle", TOY_BUNDLE, *filled)
    assert (code, printed) == (2, "")
    assert said in complained
    assert "Traceback" not in complained
    assert not (tmp_path / "out").exists()


def test_bundle_that_is_missing_is_exit_4(rbc: Run, camera: Path, tmp_path: Path) -> None:
    code, _, complained = rbc("run", camera, "--out", tmp_path / "out", "--bundle", tmp_path / "none")
    assert code == 4
    assert complained.startswith("rbc-edge: ")
    assert rbc("bundle", "show", "--bundle", tmp_path / "none")[0] == 4


def test_bundle_show(rbc: Run) -> None:
    code, said, _ = rbc("bundle", "show", "--bundle", TOY_BUNDLE, "--json")
    assert code == 0
    bundle_id = json.loads(said)["bundle_id"]
    assert f"bundle_id: {bundle_id}\n" in rbc("bundle", "show", "--bundle", TOY_BUNDLE)[1]


def test_bundle_verify(rbc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("bundle", "verify", "--bundle", TOY_BUNDLE)
    monkeypatch.setattr(selftest, "verify", lambda *_, **__: selftest.SelfTest(20, 19, 0, 0.21, 0.0126))
    code, said, complained = rbc(*asked)
    assert (code, complained) == (0, "")
    assert "19 cells of 20, boxes within 0.2 px, scores within 0.013" in said
    answer = json.loads(rbc(*asked, "--json")[1])
    assert (answer["verified"], answer["n_found"]) == (True, 19)

    def differs(*_: object, **__: object) -> None:
        raise BundleError("this machine sees 3 cells", "report this")

    monkeypatch.setattr(selftest, "verify", differs)
    assert rbc(*asked) == (4, "", "rbc-edge: this machine sees 3 cells\n  report this\n")


def test_version_names_the_bundle_that_would_count(
    rbc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, toy = (Bundle.open(path).bundle_id for path in (None, TOY_BUNDLE))
    program = f"rbc-edge {rbc_edge.__version__}"
    assert rbc("--version") == (0, f"{program}, bundle {shipped}\n", "")
    monkeypatch.setenv("RBC_EDGE_BUNDLE", str(TOY_BUNDLE))
    assert rbc("--version") == (0, f"{program}, bundle {toy}\n", "")
    monkeypatch.setenv("RBC_EDGE_BUNDLE", str(tmp_path))
    assert rbc("--version") == (0, f"{program}, no bundle\n", "")
    monkeypatch.setenv("RBC_EDGE_BUNDEL", "x")  # wrong settings do not hide the version
    assert rbc("--version") == (0, f"{program}, bundle {shipped}\n", "")


def test_config_init_writes_where_settings_are_looked_for(rbc: Run, tmp_path: Path) -> None:
    file = tmp_path / "xdg" / "rbc-edge" / "config.toml"
    code, said, complained = rbc("config", "init", "--out", tmp_path / "results")
    assert (code, said.startswith(f"{file}: written"), complained) == (0, True, "")
    line = file.read_text().splitlines().index(f'out = "{tmp_path / "results"}"') + 1
    assert re.search(rf"^out .* {re.escape(str(file))}:{line}$", rbc("config", "show")[1], re.M)
    assert rbc("config", "init")[0] == 2
    assert rbc("config", "init", "--force")[0] == 0
    assert rbc("config", "init", "--file", "-") == (0, file.read_text(), "")


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

    monkeypatch.setattr("rbc_edge.station.runner.run_once", broken)
    asked = ("run", camera, "--out", tmp_path / "out", "--bundle", TOY_BUNDLE)
    code, _, complained = rbc(*asked)
    assert code == 1
    assert complained.count("\n") == 1
    assert "unexpected RuntimeError: the unthinkable. This is a bug" in complained
    assert "Traceback" in rbc(*asked, "--verbose")[2]


def test_plain_locale_and_names_that_are_not_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/cam/sl\xff\xc3\xa9"
    write_disks(folder + b"/a.png", 3)
    with open(folder + b"/b\nc\xfe.png", "wb"):  # noqa: PTH123
        pass
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}):
        running = process(
            *("run", tmp_path / "cam", "--out", tmp_path / "out", "--bundle", TOY_BUNDLE), **locale
        )
        said, complained = running.communicate(timeout=120)
        assert running.returncode == 3, complained
        assert b"Traceback" not in complained
        assert rb"sl\xff" in said
    text = (tmp_path / "out" / "slides.csv").read_text(encoding="utf-8")
    assert "\nsl" not in text
    assert r"1,sl\xffé,1,1," in text


def test_closed_stdout_is_no_error(camera: Path, tmp_path: Path) -> None:
    running = process("run", camera, "--out", tmp_path / "out", "--bundle", TOY_BUNDLE, "--json")
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    complained = running.stderr.read()
    running.wait(timeout=120)
    running.stderr.close()
    assert b"Traceback" not in complained
    assert b"bug" not in complained
    assert (tmp_path / "out" / "slides.csv").exists()


def a_slide(camera: Path, n: int = 30) -> None:
    for i in range(n):
        write_disks(camera / ("s1" if i < n // 2 else "s2") / f"{i:02d}.png", i % 20, seed=i)
    (camera / "s1" / "bad.png").write_bytes(b"")
    (camera / "s2" / "copy.png").write_bytes((camera / "s2" / f"{n - 1:02d}.png").read_bytes())


def shown(out: Path) -> dict[str, list[dict[str, str]]]:
    """Every table, without the two columns that tell of time."""
    return {
        str(path.relative_to(out)): rows(path, "analyzed_at", "elapsed_ms")
        for path in sorted(out.rglob("*.csv"))
    }


def lines_until(running: subprocess.Popen[bytes], n: int) -> None:
    """Reads `n` lines of progress; fewer where the process ends before."""
    assert running.stderr is not None
    for _ in range(n):
        if not running.stderr.readline():
            break


@pytest.mark.slow
def test_killed_at_many_places_and_run_again_it_ends_as_if_never_killed(tmp_path: Path) -> None:
    camera = tmp_path / "camera"
    a_slide(camera)
    asked = ("run", camera, "--bundle", TOY_BUNDLE, "--cells", "--verbose", "--out")
    whole = process(*asked, tmp_path / "whole")
    assert whole.communicate(timeout=120)[0]
    assert whole.returncode == 3
    out = tmp_path / "killed"
    for n_lines in (0, 1, 4, 9, 3):
        running = process(*asked, out)
        lines_until(running, n_lines)
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
    last = process(*asked, out)
    assert last.communicate(timeout=120)[0]
    assert last.returncode == 3
    assert shown(out) == shown(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_process_with_its_code_and_whole_tables(
    tmp_path: Path, number: int, code: int
) -> None:
    camera, out = tmp_path / "camera", tmp_path / "out"
    a_slide(camera, 120)
    asked = ("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--verbose", "--cell-diameter", 40)
    running = process(*asked)
    lines_until(running, 2)
    running.send_signal(number)
    _, complained = running.communicate(timeout=60)
    assert running.returncode == code, complained
    assert b"run the same command again to go on" in complained
    n_rows = len(rows(out / "s1.csv"))
    assert 0 < n_rows < 122
    assert sum(int(r["n_fov_ok"]) + int(r["n_fov_failed"]) for r in rows(out / "slides.csv")) == n_rows


TOY = ("--bundle", TOY_BUNDLE, "--cell-diameter", 40)


def test_watch_once_counts_and_says_a_line_an_image(camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (camera / "s1" / "broken.png").write_bytes(b"no image")
    for path in camera.rglob("*.png"):
        os.utime(path, (1, 1))  # as old as a camera's files mostly are
    service = process("watch", camera, "--out", out, "--once", *TOY)
    _, said = service.communicate(timeout=60)
    assert service.returncode == 3
    assert [row["status"] for row in rows(out / "s1.csv")] == ["ok", "ok", "ok", "failed"]
    lines = said.decode().splitlines()
    assert sum(" INFO ok s1/" in line for line in lines) == 3
    assert sum(" WARNING failed (not-an-image)" in line for line in lines) == 1


def test_watch_leaves_on_a_signal_and_speaks_to_systemd(camera: Path, tmp_path: Path) -> None:
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(60)
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
    service = process("watch", camera, "--out", tmp_path / "out", "--settle-s", 0, *TOY, **environment)
    try:
        said = ""
        while "up to date; 3 counted" not in said:
            said += systemd.recv(10_000).decode() + "\n"
        assert "READY=1" in said
        assert "WATCHDOG=1" in said
        service.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in said:
            said += systemd.recv(10_000).decode() + "\n"
        assert service.wait(timeout=60) == 143
    finally:
        service.kill()
        service.communicate()
        systemd.close()
    assert len(rows(tmp_path / "out" / "s1.csv")) == 3


def test_watch_without_a_place_is_usage_and_with_a_wrong_bundle_is_4(
    rbc: Run, camera: Path, tmp_path: Path
) -> None:
    code, _, said = rbc("watch", "--out", tmp_path / "out")
    assert (code, "no source folder" in said) == (2, True)
    code, _, said = rbc("watch", camera)
    assert (code, "no output folder" in said) == (2, True)
    code, _, said = rbc("watch", camera, "--out", camera / "out", *TOY)
    assert (code, "lies inside the source" in said) == (2, True)
    code, _, said = rbc("watch", camera, "--out", tmp_path / "out", "--bundle", tmp_path)
    assert code == 4
    assert not (tmp_path / "out").exists()


def test_watch_takes_its_settings_from_a_file(camera: Path, tmp_path: Path) -> None:
    for path in camera.rglob("*.png"):
        os.utime(path, (1, 1))
    file = tmp_path / "config.toml"
    bundle = json.dumps(str(TOY_BUNDLE))
    file.write_text(
        f'source = "camera"\nout = "out"\nbundle = {bundle}\ncell_diameter = 40\npolling = true\n'
    )
    service = process("watch", "--once", "--config", file)
    _, said = service.communicate(timeout=60)
    assert service.returncode == 0, said.decode()
    assert b"polling every 10 s: as the settings say" in said
    assert len(rows(tmp_path / "out" / "s1.csv")) == 3


def test_run_makes_pictures_and_pages_and_report_names_them(rbc: Run, camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    counting = ("--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    code, said, complained = rbc("run", camera, "--out", out, *counting, "--overlays", "--report")
    assert (code, complained) == (0, "")
    assert said.endswith(f"Open {out / 'reports' / 'index.html'} to look at them\n")
    assert len(list((out / "overlays" / "s1").iterdir())) == 3
    assert {p.name for p in (out / "reports").iterdir()} == {"index.html", "s1.html"}
    assert "score at least" in (out / "reports" / "s1.html").read_text()
    page, index = out / "reports" / "s1.html", out / "reports" / "index.html"
    page.unlink()
    code, said, complained = rbc("report", "--out", out, "--bundle", TOY_BUNDLE)
    assert (code, said.splitlines(), complained) == (0, [str(page), str(index)], "")
    assert page.exists()
    code, said, _ = rbc("report", "s1", "--out", out, "--images", 1)
    assert code == 0 and page.read_text().count("<img") == 1


def test_report_counts_as_the_tables_beside_it_unless_told_otherwise(
    rbc: Run, camera: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40, "--edges", "inside")
    rbc("report", "--out", out)
    assert "inside: cells that touch" in (out / "reports" / "s1.html").read_text()
    rbc("report", "--out", out, "--edges", "all")
    assert "all: every cell counts" in (out / "reports" / "s1.html").read_text()


def test_report_says_what_is_missing(rbc: Run, camera: Path, tmp_path: Path) -> None:
    code, _, complained = rbc("report", "--out", tmp_path / "nothing")
    assert code == 5 and "no ledger.sqlite3 there" in complained
    assert not (tmp_path / "nothing").exists()
    out = tmp_path / "out"
    rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    code, _, complained = rbc("report", "s2", "--out", out)
    assert code == 2 and "no slide 's2'" in complained and "did you mean s1?" in complained
    code, said, complained = rbc("report", "--out", out, "--bundle", tmp_path / "no-bundle")
    assert code == 0 and "the thresholds cannot be shown" in complained and said


def test_the_bound_of_an_overlay_is_checked(rbc: Run, camera: Path, tmp_path: Path) -> None:
    code, _, complained = rbc("run", camera, "--out", tmp_path / "out", "--overlay-px", 5)
    assert code == 2 and "--overlay-px is 5" in complained and "0 (as large as the image)" in complained


def test_run_names_slides_whose_fields_are_flagged(rbc: Run, camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "flagged"
    code, told, _ = rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 14)
    assert code == 0
    flagged = [r for r in rows(out / "s1.csv") if r["quality_flags"]]
    assert flagged
    (line,) = [line for line in told.splitlines() if line.startswith("have a look: s1:")]
    assert f"{len(flagged)} of " in line
    (slide, *_) = json.loads(
        rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 14, "--json")[1]
    )["slides"]
    assert slide["n_fov_flagged"] == len(flagged)
    assert set(slide["quality_flags"]) == {f for r in flagged for f in r["quality_flags"].split(";")}

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TOY, Run, process, rows
from stand_in import TOY_BUNDLE, write_disks

pytestmark = pytest.mark.usefixtures("own_settings")


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


def test_run_prints_a_table_and_writes_the_files(rbc: Run, camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, complained = rbc("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40)
    assert (code, complained) == (0, "")
    lines = said.splitlines()
    assert lines[0].split()[:2] == ["slide", "fields"]
    n_rbc = rows(out / "slides.csv")[0]["n_rbc"]
    assert lines[1].split()[:4] == ["s1", "3", "0", n_rbc]
    assert re.fullmatch(
        rf"too few fields: s1: 3 fields with {n_rbc} red cells\. The overlap can be anything from \d+% to "
        r"\d+%\. Count about \d+ more fields to know it within 2 percentage points\.",
        lines[2],
    )
    assert lines[3].startswith("3 images: 3 counted now, 0 counted before")
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
    assert r"3,sl\xffé,1,1," in text


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
    assert b"run the same command again to continue" in complained
    n_rows = len(rows(out / "s1.csv"))
    assert 0 < n_rows < 122
    assert sum(int(r["n_fov_ok"]) + int(r["n_fov_failed"]) for r in rows(out / "slides.csv")) == n_rows


def test_a_second_run_names_what_failed_before_and_its_footer_adds_up(
    rbc: Run, camera: Path, tmp_path: Path
) -> None:
    for name in ("bad10.png", "bad9.png"):
        (camera / "s1" / name).write_bytes(b"")
    (camera / "s1" / "copy.png").write_bytes((camera / "s1" / "0.png").read_bytes())
    asked = ("run", camera, "--out", tmp_path / "out", *TOY)
    _, _, first = rbc(*asked)
    assert len(re.findall(r"failed \(empty\): .*bad\d+\.png", first)) == 2
    (camera / "s1" / "bad11.png").write_bytes(b"")
    code, said, second = rbc(*asked)
    assert code == 3
    names = re.findall(r"failed( before)? \(empty\): \S*(bad\d+)\.png", second)
    assert names == [("", "bad11"), (" before", "bad9"), (" before", "bad10")]
    footer = next(line for line in said.splitlines() if "counted now" in line)
    n_images, *parts = map(int, re.findall(r"\d+", footer.partition(". Tables")[0]))
    assert (n_images, parts) == (7, [0, 3, 1, 3])


def test_what_is_left_is_in_the_footer(rbc: Run, camera: Path, tmp_path: Path) -> None:
    for i in range(3):
        (camera / "s1" / f"0bad{i}.png").write_bytes(b"")
    _, said, _ = rbc("run", camera, "--out", tmp_path / "out", *TOY, "--max-failures", 1)
    assert "6 images: 1 counted now, 0 counted before, 0 duplicates, 1 failed, 4 left for later." in said


@pytest.mark.parametrize("other", ["--no-excel", "--excel"])
def test_excel_is_a_setting_and_all_tables_follow_it(
    rbc: Run, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    write_disks(camera / "s2" / "0.png", 3, seed=9)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    out, settings = tmp_path / "out", tmp_path / "settings.toml"
    settings.write_text("excel = true\ncells = true\n")
    asked = ("run", camera, "--out", out, *TOY, "--config", settings)
    assert rbc(*asked)[0] == 0
    tables = sorted(out.rglob("*.csv"))
    head = b'\xef\xbb\xbf"schema";"slide_id"'
    assert len(tables) == 7 and all(path.read_bytes().startswith(head) for path in tables)
    _, _, complained = rbc(*asked, other)
    changed = "form of the tables is plain, was excel, decimal comma" in complained
    assert changed is (other == "--no-excel")
    assert all(path.read_bytes().startswith(head) is not changed for path in tables)


def test_export_needs_to_be_told_what(rbc: Run, camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rbc("export", "--out", out)[0] == 2
    assert rbc("export", "--out", out, "--json")[0] == 5
    rbc("run", camera, "--out", out, *TOY, "--edges", "inside")
    code, said, complained = rbc("export", "--out", out, "--json")
    document = json.loads(said)
    assert (code, complained, document["edges"]) == (0, "", "inside")
    assert [row["slide_id"] for row in document["slides"]] == ["s1"]
    assert json.loads(document["settings"])["edges"] == "inside"
    code, said, complained = rbc("export", "--out", out, "--xlsx", tmp_path / "results.csv")
    assert (code, said) == (2, "") and "ends in .xlsx" in complained


def test_export_writes_a_workbook(rbc: Run, camera: Path, tmp_path: Path) -> None:
    pytest.importorskip("xlsxwriter")
    rbc("run", camera, "--out", tmp_path / "out", *TOY)
    path = tmp_path / "results.xlsx"
    assert rbc("export", "--out", tmp_path / "out", "--xlsx", path) == (0, f"{path}: written\n", "")
    assert path.read_bytes().startswith(b"PK")


def test_a_workbook_without_its_extra_says_what_to_install(
    rbc: Run, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rbc("run", camera, "--out", tmp_path / "out", *TOY)
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    code, _, complained = rbc("export", "--out", tmp_path / "out", "--xlsx", tmp_path / "a.xlsx")
    assert code == 2 and "rbc-edge[xlsx]" in complained

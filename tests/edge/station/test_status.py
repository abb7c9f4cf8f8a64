import json
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from service_state import NOON, NOON_S, STATE, at_noon, record

from rbc_edge import cli, config
from rbc_edge.errors import UnavailableError
from rbc_edge.ops import status_text
from rbc_edge.station.state_file import Activity, StateFile
from rbc_edge.station.status import MAX_FAILURES, status_of
from rbc_edge.store.queries import Reader
from rbc_edge.store.schema import FILE_NAME
from rbc_edge.text import span_text


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no ledger"):
        at_noon(tmp_path)
    assert list(tmp_path.iterdir()) == []  # asking makes nothing


def test_up_to_date(tmp_path: Path, file: StateFile) -> None:
    record(tmp_path, ok=3, failed=("truncated", "empty", "truncated"), when=NOON - timedelta(minutes=4))
    file.write(STATE)
    status = at_noon(tmp_path)
    lines = status_text.as_lines(status)
    assert lines[0] == "watching /camera, up to date; 3 images failed"
    assert "  newest result  2026-03-04T11:57:00Z, 3 min ago" in lines
    assert "  counted        3 images of 1 slide" in lines
    assert "  failed         3: 2 truncated, 1 empty" in lines
    assert any("s/bad002: bad002.png: truncated, it seems" in line for line in lines)
    said = status.as_json()
    assert json.loads(json.dumps(said)) == said
    assert (said["running"], said["activity"], said["paused"]) == (True, "up to date", False)
    assert (said["n_counted"], said["n_failed"], said["failure_counts"]) == (
        3,
        3,
        {"truncated": 2, "empty": 1},
    )
    assert [row["fov"] for row in said["failures"]] == ["bad002", "bad001", "bad000"]
    assert (said["newest_result_age_s"], said["silent_s"]) == (180.0, 2.0)
    assert said["disk_free_bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"n_waiting": 2}, "watching /camera, up to date; 2 images not finished yet"),
        ({"activity": Activity.COUNTING, "n_to_do": 1}, "watching /camera, counting; 1 image to do"),
        (
            {"activity": Activity.SOURCE_AWAY, "detail": "/camera: not mounted"},
            "PAUSED: the source is away: /camera: not mounted",
        ),
        (
            {"activity": Activity.DISK_FULL, "detail": "/out: 3 MB are free"},
            "PAUSED: the disk is nearly full: /out: 3 MB are free",
        ),
        (
            {"activity": Activity.RESULTS_AWAY, "detail": "/out: no permission"},
            "PAUSED: the results cannot be written: /out: no permission",
        ),
        ({"activity": Activity.ANOTHER_WRITER}, "watching /camera, waiting for another rbc-edge"),
        ({"activity": Activity.STOPPING, "detail": "asked"}, "watching /camera, stopping: asked"),
        ({"activity": Activity.STARTING}, "watching /camera, starting"),
        (
            {"updated_monotonic_s": NOON_S - 600},
            "SILENT: process 123 has not reported for 10 min; it may hang",
        ),
    ],
)
def test_the_first_line_says_how_things_are(
    tmp_path: Path, file: StateFile, changes: dict[str, object], headline: str
) -> None:
    record(tmp_path, ok=1)
    file.write(replace(STATE, **changes))  # type: ignore[arg-type]
    assert status_text.headline(at_noon(tmp_path)) == headline


def test_what_a_state_says_is_told_as_paused_or_not() -> None:
    paused = {activity for activity in Activity if activity.is_paused}
    assert paused == {Activity.SOURCE_AWAY, Activity.DISK_FULL, Activity.RESULTS_AWAY}


def test_a_dead_service_does_not_pass_for_a_living_one(tmp_path: Path) -> None:
    record(tmp_path, ok=1, failed=("crash",))
    file = StateFile(tmp_path)
    file.write(replace(STATE, activity=Activity.COUNTING, n_to_do=7))
    file.close()
    status = at_noon(tmp_path)
    assert status_text.as_lines(status)[0] == "not running; 1 image failed"
    assert "last report at 2026-03-04T11:59:58Z: counting" in "\n".join(status_text.as_lines(status))
    said = status.as_json()
    assert (said["running"], said["activity"], said["n_to_do"]) == (False, "not running", None)
    assert (said["silent_s"], said["source_online"]) == (None, None)


def test_a_service_without_a_ledger_yet_is_told(tmp_path: Path, file: StateFile) -> None:
    file.write(replace(STATE, activity=Activity.STARTING))
    said = at_noon(tmp_path).as_json()
    assert (said["running"], said["n_counted"]) == (True, None)
    assert "no ledger" in said["ledger_problem"]
    assert any("no ledger" in line for line in status_text.as_lines(at_noon(tmp_path)))


def test_a_damaged_ledger_is_an_error_and_with_a_service_a_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(UnavailableError, match="damaged"):
        at_noon(tmp_path)
    file = StateFile(tmp_path)
    file.write(STATE)
    assert "damaged" in at_noon(tmp_path).ledger_problem
    file.close()


def test_a_service_with_an_unreadable_state_is_running(tmp_path: Path, file: StateFile) -> None:
    record(tmp_path, ok=1)
    status = at_noon(tmp_path)
    assert status_text.headline(status) == "running, but its state cannot be read"
    assert status.as_json()["activity"] == "unknown"


def test_many_failures_are_counted_and_the_newest_named(tmp_path: Path) -> None:
    record(tmp_path, failed=("empty",) * (MAX_FAILURES + 5))
    status = at_noon(tmp_path)
    assert [row.fov for row in status.failures[:2]] == ["bad024", "bad023"]
    assert len(status.failures) == MAX_FAILURES
    assert status.n_failed == MAX_FAILURES + 5
    assert any("and 5 older ones" in line for line in status_text.as_lines(status))


def test_without_the_service_the_age_is_by_the_clock(tmp_path: Path) -> None:
    record(tmp_path, ok=1, when=NOON - timedelta(hours=5))
    status = at_noon(tmp_path)
    assert (status.newest_result_age_s, status.clock_problem) == (5 * 3600, "")


def test_a_clock_that_was_set_back_is_said_and_no_age_is_negative(tmp_path: Path) -> None:
    record(tmp_path, ok=1, when=NOON + timedelta(hours=5))
    status = at_noon(tmp_path)
    assert status.newest_result_age_s is None
    assert "set back" in status.clock_problem
    assert any(line.startswith("  clock ") for line in status_text.as_lines(status))
    assert at_noon(tmp_path).as_json()["newest_result_age_s"] is None


def test_the_age_with_a_service_does_not_follow_the_clock(tmp_path: Path, file: StateFile) -> None:
    record(tmp_path, ok=1, when=NOON - timedelta(minutes=3))
    file.write(STATE)
    for set_by, problem in ((timedelta(hours=-5), "set back by 5 h"), (timedelta(days=400), "")):
        status = status_of(tmp_path, now=NOON + set_by, monotonic_s=NOON_S)
        assert (status.newest_result_age_s, status.silent_s) == (180.0, 2.0)
        assert problem in status.clock_problem
        assert bool(problem) == bool(status.clock_problem)


def test_a_run_during_the_service_gives_the_newest_result(tmp_path: Path, file: StateFile) -> None:
    record(tmp_path, ok=1, when=NOON - timedelta(seconds=30))
    file.write(STATE)
    assert at_noon(tmp_path).newest_result_age_s == 30.0


def test_the_state_of_another_boot_is_judged_by_the_clock(tmp_path: Path, file: StateFile) -> None:
    record(tmp_path, ok=1, when=NOON - timedelta(hours=1))
    file.write(replace(STATE, boot_id="another", updated_monotonic_s=5.0))
    status = at_noon(tmp_path)
    assert (status.silent_s, status.newest_result_age_s) == (2.0, 3600.0)


@pytest.mark.parametrize(
    ("time_s", "words"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min"), (7199, "119 min"), (7200, "2 h"), (1e6, "11 days")],
)
def test_lengths_of_time_in_words(time_s: float, words: str) -> None:
    assert span_text(time_s) == words


# -- the commands -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RBC_EDGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(config, "_SYSTEM_FILE", tmp_path / "none.toml")


def rbc(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_status_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, ok=1, failed=("empty",), slide="s\n\x1b[31m")
    code, said, complained = rbc(capsys, "status", "--out", tmp_path)
    assert (code, complained) == (0, "")
    assert said.startswith("not running; 1 image failed\n")
    assert "\x1b" not in said
    code, said, _ = rbc(capsys, "status", "--out", tmp_path, "--json")
    assert (code, json.loads(said)["n_failed"]) == (0, 1)


def test_status_finds_the_results_by_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, ok=1)
    settings = tmp_path / "config.toml"
    settings.write_text('out = "."\n')
    assert rbc(capsys, "status", "--config", settings)[0] == 0
    code, _, complained = rbc(capsys, "status")
    assert (code, "no output folder" in complained) == (2, True)
    code, _, complained = rbc(capsys, "status", "--out", tmp_path / "none")
    assert (code, "no ledger" in complained) == (5, True)


def test_retry_says_how_many_and_who_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, ok=1, failed=("empty", "truncated"))
    code, said, _ = rbc(capsys, "retry", "--out", tmp_path)
    assert (code, said.split(" will be ")[0]) == (0, "2 failed images")
    assert "next run" in said
    file = StateFile(tmp_path)
    file.write(replace(STATE, activity=Activity.SOURCE_AWAY, updated_monotonic_s=time.monotonic()))
    said = rbc(capsys, "retry", "s", "bad001", "--out", tmp_path)[1]
    file.close()
    assert said.startswith("1 failed image will be tried again by the running service")
    assert "source away" in said
    with Reader.open(tmp_path) as ledger:
        again = {row.fov for row in ledger.fields("s") if row.mtime_ns == -1}
    assert again == {"bad000", "bad001"}


def test_retry_of_nothing_names_the_slides_that_have_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, ok=1, failed=("empty",))
    record(tmp_path, ok=1, slide="other")
    code, said, _ = rbc(capsys, "retry", "other", "--out", tmp_path)
    assert (code, said.splitlines()) == (
        0,
        ["no image of other has failed; nothing to try again", "slides with failed images: s"],
    )
    code, _, complained = rbc(capsys, "retry", "--out", tmp_path / "none")
    assert (code, "no ledger" in complained) == (5, True)
    assert not (tmp_path / "none").exists()


def test_retry_of_what_is_not_there_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, ok=1, failed=("empty",))
    code, said, complained = rbc(capsys, "retry", "nosuch", "--out", tmp_path)
    assert (code, said) == (2, "")
    assert complained.startswith("rbc-edge: no slide 'nosuch' in the ledger\n")
    code, said, complained = rbc(capsys, "retry", "s", "bad00", "--out", tmp_path)
    assert (code, said) == (2, "")
    assert "no field of view 'bad00' in slide 's'" in complained and "did you mean bad000" in complained

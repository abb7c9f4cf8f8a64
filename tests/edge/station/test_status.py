import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import nan
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rbc_edge import cli, config
from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.ops import status_text
from rbc_edge.station.prometheus import check_metrics, write_metrics
from rbc_edge.station.state_file import (
    STATE_FILE_BYTES,
    STATE_FILE_NAME,
    Activity,
    ServiceState,
    StateFile,
    boot_id,
    read_state,
)
from rbc_edge.station.status import MAX_FAILURES, StationStatus, status_of
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import Look, Version
from rbc_edge.store.schema import FILE_NAME
from rbc_edge.text import span_text
from rbc_edge.values import Cells, FovResult, InboxFile, Scale, ScaleSource

NOON = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)
NOON_S = 50_000.0  # the monotonic clock at noon
STATE = ServiceState(
    pid=123,
    version="1.2",
    started_at="2026-03-04T06:00:00Z",
    activity=Activity.WATCHING,
    source="/camera",
    source_online=True,
    file_system="ext4",
    last_image_at="2026-03-04T11:57:00Z",
    last_image_monotonic_s=NOON_S - 180,
    n_counted=40,
    n_failed=1,
    images_per_min=2.4,
    bundle_id="feedfacefeedface",
    updated_at="2026-03-04T11:59:58Z",
    updated_monotonic_s=NOON_S - 2,
    boot_id=boot_id(),
)


def stamp(when: datetime) -> str:
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def at_noon(out: Path) -> StationStatus:
    return status_of(out, now=NOON, monotonic_s=NOON_S)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    file = StateFile(tmp_path)
    yield file
    file.close()


def record(
    out: Path, *, ok: int = 0, failed: tuple[str, ...] = (), when: datetime = NOON, slide: str = "s"
) -> None:
    """Records images as the runner does."""
    nothing = FovResult(64, 48, Scale(nan, ScaleSource.NONE), Cells.empty())
    version = Version("b", "estimated")
    with Ledger(out) as ledger:
        for i in range(ok):
            name = f"ok{i}-{when.timestamp()}"
            file = InboxFile(out / "gone" / name, slide, name, 10, 1)
            ledger.record(Look(file, name, result=nothing), version, stamp(when))
        for i, failure in enumerate(failed):
            file = InboxFile(out / "gone" / f"bad{i:03}.png", slide, f"bad{i:03}", 10, 1)
            look = Look(file, f"bad{i}", failure=failure, message=f"bad{i:03}.png: {failure}, it seems")
            ledger.record(look, version, stamp(when))
        ledger.commit()


# -- the state --------------------------------------------------------------------------------------------


def test_a_state_survives_json() -> None:
    state = replace(STATE, problems=("a", "b"), source="/cam\udc80")
    assert ServiceState.from_json(json.loads(json.dumps(state.as_json()))) == state


def test_values_of_another_version_are_ignored() -> None:
    values = STATE.as_json() | {"activity": "resting", "mood": "good", "pid": "many", "scan_ms": 3}
    del values["version"]
    state = ServiceState.from_json(values)
    assert (state.activity, state.pid, state.version, state.scan_ms) == (Activity.UNKNOWN, 0, "", 3.0)
    assert state.bundle_id == STATE.bundle_id


# -- the state file --------------------------------------------------------------------------------------


def test_no_state_file_no_service(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (False, None)
    assert read_state(tmp_path / "none") == (False, None)


def test_the_state_file_says_what_the_service_wrote_while_it_lives(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.write(STATE)
    assert read_state(tmp_path) == (True, STATE)
    file.close()
    assert read_state(tmp_path) == (False, STATE)
    again = StateFile(tmp_path)
    assert read_state(tmp_path) == (True, STATE)
    again.close()


def test_a_second_service_is_refused_and_told_of_the_first(tmp_path: Path, file: StateFile) -> None:
    file.write(STATE)
    with pytest.raises(UnavailableError, match=r"process 123, since 2026-03-04T06:00:00Z") as refused:
        StateFile(tmp_path, sleep=lambda _: None)
    assert refused.value.exit_code == 5
    file.write(replace(STATE, pid=124))  # and the first has not noticed
    assert read_state(tmp_path) == (True, replace(STATE, pid=124))


def test_a_reader_that_looks_in_that_moment_does_not_stop_a_service_from_starting(tmp_path: Path) -> None:
    StateFile(tmp_path).close()
    reader = os.open(tmp_path / STATE_FILE_NAME, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    pauses = []

    def reader_goes(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            os.close(reader)

    file = StateFile(tmp_path, sleep=reader_goes)
    assert len(pauses) == 3
    assert read_state(tmp_path)[0]
    file.close()


def test_readers_do_not_take_each_other_for_a_service(tmp_path: Path) -> None:
    StateFile(tmp_path).close()
    reader = os.open(tmp_path / STATE_FILE_NAME, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    assert not read_state(tmp_path)[0]
    os.close(reader)


def test_the_state_file_never_grows_and_its_space_is_reserved_at_once(
    tmp_path: Path, file: StateFile
) -> None:
    file.write(STATE)
    status = (tmp_path / STATE_FILE_NAME).stat()
    assert status.st_size == STATE_FILE_BYTES
    assert status.st_blocks * 512 >= STATE_FILE_BYTES
    long = replace(
        STATE,
        problems=tuple(f"{i}: " + "ü" * 300 for i in range(50)),
        detail="why " * 5000,
        source="/" + "ö" * 4095,
    )
    file.write(long)
    assert (tmp_path / STATE_FILE_NAME).stat().st_size == STATE_FILE_BYTES
    read = read_state(tmp_path)[1]
    assert read is not None
    assert replace(read, problems=(), detail="", source="") == replace(
        long, problems=(), detail="", source=""
    )
    assert long.detail.startswith(read.detail)
    assert read.detail


def test_few_problems_are_all_kept(tmp_path: Path, file: StateFile) -> None:
    state = replace(STATE, problems=tuple(f"folder {i}: cannot be read" for i in range(20)))
    file.write(state)
    assert read_state(tmp_path)[1] == state


def test_a_state_that_only_grew_older_is_not_written_each_time(tmp_path: Path, file: StateFile) -> None:
    def read() -> ServiceState | None:
        return read_state(tmp_path)[1]

    file.write(STATE)
    for later_s in (1.0, 19.0):
        file.write(replace(STATE, updated_monotonic_s=NOON_S - 2 + later_s, scan_ms=later_s, scanned_at="x"))
        assert read() == STATE
    older = replace(STATE, updated_monotonic_s=NOON_S + 18)
    file.write(older)
    assert read() == older
    news = replace(older, n_waiting=1, updated_monotonic_s=NOON_S + 19)
    file.write(news)
    assert read() == news


def test_a_state_file_caught_half_written_is_read_again(tmp_path: Path, file: StateFile) -> None:
    file.write(STATE)
    path = tmp_path / STATE_FILE_NAME
    whole = path.read_bytes()
    other = replace(STATE, n_counted=99)
    file.write(other)
    torn = whole[:300] + path.read_bytes()[300:]
    assert torn != whole
    whole = path.read_bytes()
    path.write_bytes(torn)
    pauses = []

    def writer_goes_on(pause_s: float) -> None:
        pauses.append(pause_s)
        path.write_bytes(whole)

    assert read_state(tmp_path, sleep=writer_goes_on) == (True, other)
    assert len(pauses) == 1


RUBBISH = [b"", b"\0" * STATE_FILE_BYTES, b"[]", b'{"crc32": 1, "state": {}}', b"{"]


@pytest.mark.parametrize("content", RUBBISH)
def test_rubbish_is_no_state(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE_NAME).write_bytes(content)
    assert read_state(tmp_path, sleep=lambda _: None) == (False, None)
    file = StateFile(tmp_path)
    file.write(STATE)
    assert read_state(tmp_path) == (True, STATE)
    file.close()


def test_the_service_keeps_its_lock_when_the_folder_is_emptied(tmp_path: Path, file: StateFile) -> None:
    file.write(STATE)
    (tmp_path / STATE_FILE_NAME).unlink()
    file.write(replace(STATE, n_counted=41))
    assert read_state(tmp_path) == (True, replace(STATE, n_counted=41))
    with pytest.raises(UnavailableError):
        StateFile(tmp_path, sleep=lambda _: None)


def test_writing_goes_on_quietly_while_the_folder_is_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    file = StateFile(out)
    file.write(STATE)
    out.rename(tmp_path / "away")
    file.write(replace(STATE, n_counted=41))
    (tmp_path / "away").rename(out)
    assert read_state(out) == (True, replace(STATE, n_counted=41))
    file.close()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot write"):
        StateFile(tmp_path / "none")


# -- the status ------------------------------------------------------------------------------------


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


# -- for Prometheus ---------------------------------------------------------------------------------------


def figures(path: Path) -> dict[str, float]:
    """What Prometheus would read, by its own parser."""
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8"))
        for sample in family.samples
    }


def test_the_metrics_are_the_figures_of_the_status(tmp_path: Path, file: StateFile) -> None:
    record(tmp_path, ok=3, failed=("truncated", "empty"), when=NOON - timedelta(minutes=3))
    file.write(replace(STATE, activity=Activity.DISK_FULL, n_waiting=4, n_to_do=5))
    path = tmp_path / "rbc.prom"
    write_metrics(path, at_noon(tmp_path))
    read = figures(path)
    expected = {
        "running": 1,
        "images_counted": 3,
        "images_failed": 2,
        "images_failed_by_reason[truncated]": 1,
        "images_failed_by_reason[empty]": 1,
        "images_duplicate": 0,
        "slides": 1,
        "images_waiting": 4,
        "images_to_do": 5,
        "images_per_minute": 2.4,
        "source_online": 1,
        "paused": 1,
        "newest_result_age_seconds": 180,
        "last_image_timestamp_seconds": (NOON - timedelta(minutes=3)).timestamp(),
        "silent_seconds": 2,
        "activity[paused: disk nearly full]": 1,
        "activity[up to date]": 0,
        "clock_ok": 1,
    }
    assert {name: read[f"rbc_edge_{name}"] for name in expected} == expected
    assert read["rbc_edge_disk_free_bytes"] > 0
    assert [name for name in read if name.startswith("rbc_edge_info")] == [
        "rbc_edge_info[feedfacefeedface][1.2]"
    ]
    assert [p.name for p in tmp_path.iterdir() if "prom" in p.name] == ["rbc.prom"]


def test_what_is_unknown_is_no_figure(tmp_path: Path) -> None:
    record(tmp_path, ok=1, when=NOON + timedelta(hours=5))
    path = tmp_path / "rbc.prom"
    write_metrics(path, at_noon(tmp_path))
    read = figures(path)
    assert read["rbc_edge_running"] == 0
    assert read["rbc_edge_clock_ok"] == 0
    unknown = {"newest_result_age_seconds", "images_waiting", "source_online", "last_image_timestamp_seconds"}
    assert not {f"rbc_edge_{name}" for name in unknown} & set(read)


def test_metrics_without_the_extra_or_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="folder does not exist"):
        check_metrics(tmp_path / "none" / "rbc.prom")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError, match=r"rbc-edge\[prometheus\]"):
        check_metrics(tmp_path / "rbc.prom")


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    record(tmp_path, ok=1)
    (tmp_path / "rbc.prom").mkdir()
    with pytest.raises(UnavailableError, match=r"rbc\.prom: cannot write the metrics"):
        write_metrics(tmp_path / "rbc.prom", at_noon(tmp_path))
    assert [p.name for p in tmp_path.iterdir() if "prom" in p.name] == ["rbc.prom"]


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
    code, said, _ = rbc(capsys, "retry", "other", "--out", tmp_path)
    assert (code, said.splitlines()) == (
        0,
        ["no image of other has failed; nothing to try again", "slides with failed images: s"],
    )
    code, _, complained = rbc(capsys, "retry", "--out", tmp_path / "none")
    assert (code, "no ledger" in complained) == (5, True)
    assert not (tmp_path / "none").exists()

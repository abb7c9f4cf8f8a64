import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from service_state import NOON_S, STATE

from rbc_edge.errors import UnavailableError
from rbc_edge.station.state_file import (
    STATE_FILE_BYTES,
    STATE_FILE_NAME,
    Activity,
    ServiceState,
    StateFile,
    read_state,
)


def test_a_state_survives_json() -> None:
    state = replace(STATE, problems=("a", "b"), source="/cam\udc80")
    assert ServiceState.from_json(json.loads(json.dumps(state.as_json()))) == state


def test_values_of_another_version_are_ignored() -> None:
    values = STATE.as_json() | {"activity": "resting", "mood": "good", "pid": "many", "scan_ms": 3}
    del values["version"]
    state = ServiceState.from_json(values)
    assert (state.activity, state.pid, state.version, state.scan_ms) == (Activity.UNKNOWN, 0, "", 3.0)
    assert state.bundle_id == STATE.bundle_id


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

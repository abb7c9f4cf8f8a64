from pathlib import Path

import pytest

from rbc_edge.errors import UnavailableError
from rbc_edge.store.outdir import BusyError, free_bytes, writing


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with writing(tmp_path), pytest.raises(BusyError, match="another rbc-edge is writing"), writing(tmp_path):
        pass
    with writing(tmp_path):
        pass


def test_a_run_waits_for_a_service_that_lets_go_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    service = writing(tmp_path)
    service.__enter__()

    def sleep(time_s: float) -> None:
        slept.append(time_s)
        if len(slept) == 5:
            service.__exit__(None, None, None)

    monkeypatch.setattr("rbc_edge.store.outdir.time.sleep", sleep)
    with writing(tmp_path, wait_s=60):
        assert len(slept) == 5
        slept.clear()
        monkeypatch.setattr("rbc_edge.store.outdir.time.sleep", slept.append)
        with pytest.raises(BusyError), writing(tmp_path, wait_s=1):
            pass
        assert sum(slept) == pytest.approx(1, abs=0.05)


def test_no_folder_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot write"), writing(tmp_path / "none"):
        pass
    with pytest.raises(UnavailableError, match="cannot look at its disk"):
        free_bytes(tmp_path / "none")
    assert free_bytes(tmp_path) > 0

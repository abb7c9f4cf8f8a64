from pathlib import Path

import pytest

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.store.outdir import BusyError, claim, free_bytes, writing


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


FOREIGN = (
    *("slides.csv", "slideA.csv", "cells/s.csv", "shapes/s.csv", "reports/index.html"),
    "overlays/s/a_overlay.jpg",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_overwritten_and_are_kept_when_the_folder_is_taken(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"no ledger, but files.*{name}.*--adopt"):
        claim(tmp_path, "2026-01-02T03:04:05Z")
    assert (tmp_path / name).read_text() == "mine"
    claim(tmp_path, "2026-01-02T03:04:05Z", adopt=True)
    assert not (tmp_path / name).exists()
    assert (tmp_path / "earlier-20260102T030405Z" / name).read_text() == "mine"


def test_a_folder_with_a_ledger_or_with_other_names_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("notes.txt", "reports/method.pdf", "overlays/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    claim(tmp_path, "now")
    (tmp_path / "ledger.sqlite3").touch()
    (tmp_path / "slides.csv").write_text("mine")
    claim(tmp_path, "now")
    assert not list(tmp_path.glob("earlier*"))

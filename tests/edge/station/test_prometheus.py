import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service_state import NOON, STATE, at_noon, record

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.station.prometheus import check_metrics, write_metrics
from rbc_edge.station.state_file import Activity, StateFile


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

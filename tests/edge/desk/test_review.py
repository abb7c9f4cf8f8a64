"""The desk: what the review page shows and writes, on a folder that was counted."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from reviewed import count, table
from stand_in import disks, encoded

from rbc_edge.desk.review import Desk, picture
from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.store.corrections import Kind
from rbc_edge.store.outdir import writing

NOW = datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.fixture
def out(camera: Path, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    count(tmp_path / "out", camera, flags=("blurred",))
    return tmp_path / "out"


@pytest.fixture
def desk(out: Path) -> Iterator[Desk]:
    opened = Desk(out, threshold=0.2, now=lambda: NOW)
    yield opened
    opened.close()


def say(desk: Desk, fov: str, number: int, what: str, kind: Kind = Kind.LABEL) -> dict[str, Any]:
    shown = desk.field("s1", fov)
    box = tuple(shown["cells"][number - 1]["box"])
    return desk.correct("s1", fov, shown["sha256"], kind, what, box, "Ana")


def test_slides_and_fields_say_what_needs_a_look(desk: Desk) -> None:
    (slide,) = desk.slides()["slides"]
    assert {name: slide[name] for name in ("slide", "n_ok", "n_flagged", "n_rbc", "n_corrected")} == {
        **{"slide": "s1", "n_ok": 3, "n_flagged": 1},
        **{"n_rbc": 15, "n_corrected": 0},
    }
    lines = desk.fields("s1")["fields"]
    assert [line["fov"] for line in lines] == ["0", "1", "2"]
    assert [tuple(line["flags"]) for line in lines] == [(), ("blurred",), ()]
    assert lines[0]["crowding"] < lines[2]["crowding"]
    assert [line["n_doubtful"] for line in lines] == [3, 3, 3]  # scores 0.1 are near 0.2
    with pytest.raises(UsageError, match="no slide"):
        desk.fields("s2")
    with pytest.raises(UsageError, match="no field of view"):
        desk.field("s1", "9")


def test_cells_have_the_numbers_and_boxes_of_the_table(desk: Desk, out: Path) -> None:
    say(desk, "2", 1, "wbc")
    desk.write_tables()
    shown = desk.field("s1", "2")["cells"]
    rows = [row for row in table(out, "cells/s1.csv") if row["fov"] == "2"]
    assert [(str(c["number"]), c["label"], c["model_label"], f"{c['box'][0]:.1f}") for c in shown] == [
        (row["cell"], row["label"], row["model_label"], row["x_min_px"]) for row in rows
    ]
    assert desk.field("s1", "2")["threshold"] == 0.2


def test_a_correction_is_in_the_tables_and_undone_again(desk: Desk, out: Path) -> None:
    before = (out / "s1.csv").read_bytes(), (out / "slides.csv").read_bytes()
    shown = say(desk, "1", 1, "rbc_overlapping")
    assert (shown["n_rbc_single"], shown["n_corrected"], shown["tables_waiting"]) == (2, 1, True)
    (said,) = shown["corrections"]
    assert (said["who"], said["at"], said["was"]) == ("Ana", "2025-03-04T05:06:07Z", "rbc_single")
    assert desk.write_tables()
    assert [row["n_corrected"] for row in table(out, "s1.csv")] == ["0", "1", "0"]
    assert table(out, "slides.csv")[0]["n_corrected"] == "1"
    assert desk.slides()["slides"][0]["n_corrected"] == 1
    with pytest.raises(UsageError, match="in this field"):
        desk.undo("s1", "0", said["key"], "Ana")
    assert desk.undo("s1", "1", said["key"], "Ana")["corrections"] == []
    assert desk.write_tables()
    assert ((out / "s1.csv").read_bytes(), (out / "slides.csv").read_bytes()) == before


def test_tables_wait_for_the_other_writer_and_the_correction_does_not(desk: Desk, out: Path) -> None:
    before = (out / "s1.csv").read_bytes()
    with writing(out):
        say(desk, "1", 1, "not_a_cell")
        assert not desk.write_tables()
        assert desk.field("s1", "1")["tables_waiting"]
    # This process is killed here. The next one finds what is to do.
    assert (out / "s1.csv").read_bytes() == before
    again = Desk(out)
    assert again.write_tables()
    assert table(out, "s1.csv")[1]["n_corrected"] == "1"
    again.close()


def test_the_page_sees_what_the_service_counts_meanwhile(desk: Desk, out: Path, camera: Path) -> None:
    shown = desk.field("s1", "0")
    desk.slides()
    say(desk, "0", 1, "rbc_overlapping")
    (camera / "s1" / "3.png").write_bytes(encoded(disks(9, seed=9)))
    (camera / "s1" / "0.png").write_bytes(encoded(disks(2, seed=8)))
    count(out, camera, bundle="b2")
    assert desk.slides()["slides"][0]["n_ok"] == 4
    with pytest.raises(UsageError, match="another image") as raised:
        desk.correct("s1", "0", shown["sha256"], Kind.REVIEWED, "", None, "Ana")
    assert "load the page again" in raised.value.advice
    with pytest.raises(UsageError, match="another image"):
        desk.exclude("s1", "0", shown["sha256"], "x")
    assert (desk.field("s1", "0")["n_corrected"], desk.field("s1", "0")["corrections"]) == (0, [])


def test_a_field_without_its_file_says_so_and_can_be_excluded(desk: Desk, out: Path, camera: Path) -> None:
    (camera / "s1" / "1.png").unlink()
    shown = desk.field("s1", "1")
    assert shown["is_gone"]
    row = desk.row("s1", "1")
    with pytest.raises(ImageError) as raised:
        picture(row.path, row.page, "s1", "1", row.sha256)
    assert raised.value.reason == "vanished"
    now = desk.exclude("s1", "1", shown["sha256"], "out of focus")
    assert (now["status"], now["reason"], now["n_rbc"], now["cells"]) == (
        "excluded",
        "out of focus",
        None,
        [],
    )
    desk.write_tables()
    assert [row["status"] for row in table(out, "s1.csv")] == ["ok", "excluded", "ok"]
    assert desk.exclude("s1", "1", shown["sha256"], None)["status"] == "ok"


def test_a_picture_is_of_the_content_that_was_counted(desk: Desk, camera: Path) -> None:
    row = desk.row("s1", "1")
    assert picture(row.path, 0, "s1", "1", row.sha256).startswith(b"\xff\xd8")
    (camera / "s1" / "1.png").write_bytes(encoded(disks(2)))
    with pytest.raises(UsageError, match="another image"):
        picture(row.path, 0, "s1", "1", row.sha256)


def test_shapes_are_those_of_the_bundle(desk: Desk, out: Path) -> None:
    with pytest.raises(UsageError, match="knows no shape"):
        say(desk, "1", 1, "target", Kind.SHAPE)
    knowing = Desk(out, shapes=("target", "teardrop"))
    assert knowing.field("s1", "1")["shapes"] == ("target", "teardrop")
    assert say(knowing, "1", 1, "target", Kind.SHAPE)["cells"][0]["shape"] == "target"
    knowing.close()


def test_no_results_no_desk(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no ledger"):
        Desk(tmp_path)

import csv
import errno
import os
import runpy
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.errors import UnavailableError
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import (
    SHAPES,
    Cells,
    Detections,
    FovResult,
    InboxFile,
    Morphology,
    Scale,
    ScaleSource,
    Shape,
)
from rbc_edge.views.tables import CELL_TABLE, FIELD_TABLE, SHAPE_TABLE, SLIDE_TABLE, Tables
from rbc_edge.vision.bundle import Bundle, Manifest
from rbc_edge.vision.counting import EdgeRule

WHEN = "2025-01-02T03:04:05Z"


def a_result(n_single: int, n_overlapping: int, n_wbc: int = 0, n_platelets: int = 0) -> FovResult:
    class_id = np.repeat([0, 1, 2], [n_single + n_overlapping, n_wbc, n_platelets]).astype(np.int64)
    n = len(class_id)
    overlapping = np.arange(n) < n_overlapping
    cells = Cells(
        Detections(
            np.tile(np.array([[1.26, 2, 41.04, 42]], np.float32), (n, 1)),
            np.full(n, 0.98768, np.float32),
            class_id,
        ),
        np.where(class_id == 0, 0.25, nan).astype(np.float32),
        overlapping,
        np.where(overlapping, 1, 0).astype(np.int64),
        np.zeros((n, 4), np.bool_),
    )
    if n:
        cells.touches_edge[0, 2:] = True  # the first cell lies in the right lower corner
    return FovResult(640, 480, Scale(40.126, ScaleSource.SLIDE), cells, ("blurred", "dark"))


class Desk:
    """A ledger and its output folder."""

    def __init__(self, out: Path, ledger: Ledger) -> None:
        self.out, self.ledger = out, ledger
        self.manifest: Manifest | None = None

    def record(self, slide_id: str, fov: str, bundle_id: str = "b1", **look: object) -> None:
        file = InboxFile(Path("/in") / slide_id / f"{fov}.png", slide_id, fov, 1, 1)
        sha256 = f"sha of {slide_id}/{fov}" if fov.isalpha() else "sha"
        self.ledger.record(
            Look(file, sha256, elapsed_ms=12.34, **look),  # type: ignore[arg-type]
            Version(bundle_id, "estimated"),
            WHEN,
        )

    def ok(
        self, slide_id: str, fov: str, result: FovResult, captured_at: str = "", bundle_id: str = "b1"
    ) -> None:
        self.record(slide_id, fov, bundle_id, captured_at=captured_at, result=result)

    def failed(self, slide_id: str, fov: str) -> None:
        self.record(slide_id, fov, failure="truncated", message="in words")

    def write(self, edges: EdgeRule = EdgeRule.ALL, *, cells: bool = False) -> None:
        Tables(self.out, self.ledger, edges=edges, cells=cells, manifest=self.manifest).write()

    def read(self, name: str) -> list[dict[str, str]]:
        with (self.out / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Ledger(tmp_path) as ledger:
        yield Desk(tmp_path, ledger)


def test_field_table_to_the_byte(desk: Desk) -> None:
    desk.ok("s", "a", replace(a_result(2, 1, 1, 3), n_refused=4), "2024-05-06T07:08:09")
    desk.failed("s", "b")
    desk.ok("s", "c", a_result(0, 0))
    desk.write()
    assert (desk.out / "s.csv").read_bytes().decode() == (
        "schema,slide_id,fov,path,sha256,status,failure,reason,width_px,height_px,cell_diameter_px,scale_source,"
        "n_rbc,n_rbc_single,n_rbc_overlapping,n_wbc,n_platelets,n_refused,overlap_fraction,n_corrected,reviewed,"
        "quality_flags,captured_at,analyzed_at,bundle_id,elapsed_ms\n"
        "3,s,a,/in/s/a.png,sha of s/a,ok,,,640,480,40.13,estimated-slide,3,2,1,1,3,4,0.3333,0,,blurred;dark,"
        "2024-05-06T07:08:09,2025-01-02T03:04:05Z,b1,12.3\n"
        "3,s,b,/in/s/b.png,sha of s/b,failed,truncated,,,,,,,,,,,,,,,,,2025-01-02T03:04:05Z,b1,12.3\n"
        "3,s,c,/in/s/c.png,sha of s/c,ok,,,640,480,40.13,estimated-slide,0,0,0,0,0,0,,0,,blurred;dark,,"
        "2025-01-02T03:04:05Z,b1,12.3\n"
    )


def test_slide_table_sums_what_was_counted(desk: Desk) -> None:
    desk.ok("s", "a", a_result(6, 4, 1, 2), "2024-05-06T07:08:09")
    desk.ok("s", "b", a_result(20, 10, 0, 1), "2024-05-01T00:00:00", bundle_id="b0")
    desk.failed("s", "c")
    desk.failed("broken", "a")
    desk.ok("one", "a", a_result(1, 0))
    desk.write()
    broken, one, both = desk.read("slides.csv")
    assert tuple(both) == SLIDE_TABLE.names
    low, high = float(both.pop("overlap_low")), float(both.pop("overlap_high"))
    # Two fields: Student t is 12.7.
    assert (both.pop("n_rbc_per_fov_low"), both.pop("n_rbc_per_fov_high")) == ("0.00", "147.06")
    assert 0 < low < 0.35 < high < 1
    assert list(both.values()) == [
        *("3", "s", "2", "1", "40", "26", "14", "0.3500", "1", "3", "0", "20.00", "14.14"),
        *("2024-05-01T00:00:00", "2024-05-06T07:08:09", "b0+b1"),
        *[""] * 6,
    ]
    assert list(broken.values()) == ["3", "broken", "0", "1", *[""] * 8, "0", *[""] * 13]
    of_one = [one[f"n_rbc_per_fov_{name}"] for name in ("mean", "sd", "low", "high")]
    assert of_one == ["1.00", "", "", ""]


def test_rows_stand_in_the_order_in_which_people_count(desk: Desk) -> None:
    for slide_id in ("s103", "s17"):
        for fov in ("f10", "f9", "f010"):
            file = InboxFile(Path("/in") / slide_id / fov, slide_id, fov, 1, 1)
            look = Look(file, f"{slide_id}/{fov}", failure="truncated")
            desk.ledger.record(look, Version("b1", "estimated"), WHEN)
    desk.write()
    assert [row["slide_id"] for row in desk.read("slides.csv")] == ["s17", "s103"]
    assert [row["fov"] for row in desk.read("s17.csv")] == ["f9", "f010", "f10"]


def test_cell_table_has_every_cell_whatever_the_edge_rule(desk: Desk) -> None:
    desk.ok("s", "a", a_result(1, 1, 1, 1))
    desk.failed("s", "b")
    desk.write(EdgeRule.INSIDE, cells=True)
    rows = desk.read("cells/s.csv")
    assert tuple(rows[0]) == CELL_TABLE.names
    box = ["1.3", "2.0", "41.0", "42.0", "0.9877"]
    form = [*[""] * 8, "1.000"]
    assert [list(row.values()) for row in rows] == [
        ["3", "s", "a", "1", *["rbc_overlapping"] * 2, *box, "0.2500", "1", "right+bottom", *form],
        ["3", "s", "a", "2", *["rbc_single"] * 2, *box, "0.2500", "", "", *form],
        ["3", "s", "a", "3", *["wbc"] * 2, *box, "", "", "", *form],
        ["3", "s", "a", "4", *["platelet"] * 2, *box, "", "", "", *form],
    ]


def shaped(
    names: list[Shape],
    area_px: list[float],
    *,
    unsure: int = 0,
    flags: tuple[str, ...] = (),
    source: ScaleSource = ScaleSource.UM_PER_PX,
) -> FovResult:
    """Single cells with shapes and areas, in a field where a red cell is 40 px wide."""
    result, n = a_result(len(names), 0), len(names)
    result.cells.touches_edge[:] = False
    shape = np.array([SHAPES.index(name) for name in names], np.int64)
    columns = (np.array(area_px), np.full(n, 1.1), np.full(n, 0.9), np.linspace(0, 0.3, n))
    score = np.full(n, 0.8, np.float32)
    sure = np.arange(n) >= unsure
    form = Morphology(shape, score, sure, *(c.astype(np.float32) for c in columns))
    scale = Scale(40.0, source)
    return replace(result, cells=replace(result.cells, morphology=form), quality_flags=flags, scale=scale)


def test_cells_say_their_shape_and_why_it_is_not_judged(desk: Desk) -> None:
    result = shaped([Shape.NORMAL, Shape.TARGET, Shape.BURR, Shape.NORMAL], [800, 1600, 400, nan], unsure=1)
    result.cells.overlapping[1] = True
    result.cells.touches_edge[2, 0] = True
    desk.ok("s", "a", result)
    desk.ok("s", "b", shaped([Shape.NORMAL], [800], flags=("unfamiliar",), source=ScaleSource.SLIDE))
    desk.write(cells=True)
    rows = desk.read("cells/s.csv")
    assert [(row["shape"], row["shape_judged"]) for row in rows] == [
        ("normal", "unsure"),
        ("target", "overlapping"),
        ("burr", "cut"),
        ("normal", "yes"),
        ("normal", "flagged"),
    ]
    assert [row["area_px"] for row in rows] == ["800.0", "1600.0", "400.0", "", "800.0"]
    # 7.5 um are 40 px. An estimated scale is not known in micrometres.
    assert [row["area_um2"] for row in rows] == ["28.12", "56.25", "14.06", "", ""]
    assert rows[0]["shape_score"] == "0.8000" and rows[0]["aspect_ratio"] == "1.100"


def test_sizes_of_a_slide(desk: Desk) -> None:
    normal = [Shape.NORMAL] * 10
    desk.ok("s", "a", shaped(normal, [1000.0] * 8 + [600.0, 1400.0], unsure=10))
    desk.ok("s", "b", shaped(normal, [5000.0] * 10, flags=("blurred",)))
    desk.ok("u", "a", shaped(normal, [1000.0] * 10))
    desk.ok("u", "b", shaped(normal, [1000.0] * 10, source=ScaleSource.FIELD))
    desk.write()
    s, u = desk.read("slides.csv")
    assert (s["area_mean"], s["area_sd"], s["area_cv"]) == ("35.16", "6.63", "0.1886")
    assert (s["pale_share"], s["small_share"], s["large_share"]) == ("0.2000", "0.1000", "0.1000")
    assert (u["area_mean"], u["area_sd"], u["area_cv"]) == ("", "", "0.0000")
    assert not (desk.out / "shapes").exists()


def test_shape_table_counts_judged_cells_with_an_interval_over_fields(
    desk: Desk, toy_bundle_path: Path
) -> None:
    desk.manifest = replace(Bundle.open(toy_bundle_path).manifest, bundle_id="b1")
    n = 40
    for k, fov in enumerate("abcd"):
        names = [Shape.ELLIPTOCYTE] * (10 + 4 * k) + [Shape.NORMAL] * (n - 10 - 4 * k)
        desk.ok("s", fov, shaped(names, [1000.0] * n))
    desk.ok("s", "e", shaped([Shape.TEARDROP] * n, [1000.0] * n, flags=("unfamiliar",)))
    desk.write(cells=True)
    rows = {row["shape"]: row for row in desk.read("shapes/s.csv")}
    assert tuple(rows["normal"]) == SHAPE_TABLE.names
    # In the order of the data's list. What the bundle names and no cell shows has a 0.
    assert list(rows) == ["normal", "spherocyte", "teardrop", "elliptocyte"]
    assert [rows[s]["n"] for s in rows] == ["96", "0", "0", "64"]
    assert {row["n_judged"] for row in rows.values()} == {"160"}
    low, high = (float(rows["elliptocyte"][f"share_{end}"]) for end in ("low", "high"))
    assert rows["elliptocyte"]["share"] == "0.4000"
    # The fields differ, so it is wider than that of 160 cells that were independent (0.33 to 0.48).
    assert low < 0.30 and high > 0.50
    assert float(rows["spherocyte"]["share_high"]) > 0.01
    assert {row["enough"] for row in rows.values()} == {"no"}
    # Written again without the bundle, and without --cells: the file stays, and says the same.
    before, desk.manifest = (desk.out / "shapes/s.csv").read_bytes(), None
    desk.write()
    assert (desk.out / "shapes/s.csv").read_bytes() == before


def test_the_shape_table_goes_with_its_slide(desk: Desk) -> None:
    desk.ok("s", "a", shaped([Shape.NORMAL], [1000.0]))
    desk.write(cells=True)
    assert (desk.out / "shapes/s.csv").exists()
    desk.record("t", "a", failure="truncated")
    moved = InboxFile(Path("/in/s/a.png"), "t", "a", 1, 1)  # the same file, of another slide now
    look = Look(moved, "sha of s/a", result=shaped([Shape.NORMAL], [1000.0]))
    desk.ledger.record(look, Version("b1", "estimated"), WHEN)
    desk.write(cells=True)
    assert [path.name for path in (desk.out / "shapes").iterdir()] == ["t.csv"]


def test_without_shapes_there_is_no_shape_table(desk: Desk) -> None:
    desk.ok("s", "a", a_result(3, 1))
    desk.write(cells=True)
    assert not (desk.out / "shapes").exists()
    assert {row["shape"] + row["shape_judged"] for row in desk.read("cells/s.csv")} == {""}


def test_edge_rule_is_a_view(desk: Desk) -> None:
    desk.ok("s", "a", a_result(2, 1))
    for rule, n_rbc, n_overlapping in ((EdgeRule.TWO_SIDES, "2", "0"), (EdgeRule.ALL, "3", "1")):
        desk.write(rule)
        (row,) = desk.read("s.csv")
        assert (row["n_rbc"], row["n_rbc_overlapping"]) == (n_rbc, n_overlapping)
        assert desk.read("slides.csv")[0]["n_rbc"] == n_rbc


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("=1+1", "'=1+1"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("@x", "'@x"),
        ("＝1", "'＝1"),  # full width: a spreadsheet in Japanese takes it for =
        ("＋1", "'＋1"),
        ("－1", "'－1"),
        ("＠x", "'＠x"),
        ("x;=1+1", "x;'=1+1"),  # a semicolon begins a cell in many languages
        ('x; "＝1"', 'x;\' "＝1"'),
        ("x;y=1", "x;y=1"),
        ("\tx", r"\tx"),
        ("\r=x", r"\r=x"),
        ("two\nlines", r"two\nlines"),
        ("line\u2028separator\x1b", r"line\u2028separator\x1b"),
        ('a "quoted", name', 'a "quoted", name'),
        ("Ausstrich Müller", "Ausstrich Müller"),
        (r"\xff", r"\xff"),
    ],
)
def test_names_are_safe_in_cells_and_a_row_is_a_line(desk: Desk, name: str, shown: str) -> None:
    desk.ok(name, name, a_result(1, 0))
    desk.write(cells=True)
    (path,) = (p for p in desk.out.glob("*.csv") if p.name != "slides.csv")
    assert len(path.read_bytes().splitlines()) == 2
    for row in (*desk.read(path.name), *desk.read(f"cells/{path.name}")):
        assert (row["slide_id"], row["fov"]) == (shown, shown)
    assert desk.read("slides.csv")[0]["slide_id"] == shown


def test_unchanged_table_is_not_touched(desk: Desk) -> None:
    desk.ok("s", "a", a_result(1, 0))
    desk.ok("t", "a", a_result(1, 0))
    desk.write(cells=True)
    paths = [*desk.out.glob("*.csv"), *desk.out.glob("cells/*.csv")]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
    assert len(before) == 5
    desk.write(cells=True)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths} == before
    desk.ok("s", "b", a_result(2, 0))
    desk.write()
    changed = {path.relative_to(desk.out) for path in paths if path.stat().st_ino != before[path][0]}
    assert changed == {Path("s.csv"), Path("slides.csv"), Path("cells/s.csv")}


@pytest.mark.parametrize("damage", ["", "schema\n", "{all}one line more\n", "{all}", "\x00" * 5000])
def test_table_that_was_altered_is_put_right(desk: Desk, damage: str) -> None:
    desk.ok("s", "a", a_result(1, 0))
    desk.write()
    path = desk.out / "s.csv"
    right = path.read_text()
    path.write_text(damage.replace("{all}", right))
    desk.write()
    assert path.read_text() == right
    assert not list(desk.out.glob(".*.tmp"))


def test_table_of_a_slide_without_fields_goes_away(desk: Desk) -> None:
    desk.ok("s", "a", a_result(1, 0))
    desk.write(cells=True)
    moved = InboxFile(Path("/in/s/a.png"), "t", "a", 1, 1)
    desk.ledger.record(Look(moved, failure="truncated"), Version("b1", "estimated"), WHEN)
    desk.write()
    assert sorted(p.name for p in desk.out.rglob("*.csv")) == ["slides.csv", "t.csv"]
    assert [row["slide_id"] for row in desk.read("slides.csv")] == ["t"]
    desk.ledger.database.connection.execute("DELETE FROM field")
    desk.write()
    assert sorted(p.name for p in desk.out.rglob("*.csv")) == ["slides.csv"]
    assert desk.read("slides.csv") == []


def test_a_call_without_changed_slides_keeps_all_tables(desk: Desk) -> None:
    desk.ok("s", "a", a_result(1, 0))
    desk.ok("t", "a", a_result(2, 0))
    desk.write(cells=True)
    before = {p: p.read_bytes() for p in desk.out.rglob("*.csv")}
    tables = Tables(desk.out, desk.ledger)
    assert [summary.slide_id for summary in tables.write(set())] == ["s", "t"]
    assert {p: p.read_bytes() for p in desk.out.rglob("*.csv")} == before


def test_full_disk_leaves_the_old_table_and_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.ok("s", "a", a_result(1, 0))
    desk.write()
    before = (desk.out / "s.csv").read_bytes()
    desk.ok("s", "b", a_result(1, 0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match=r"cannot write s\.csv: No space left.*free space"):
        desk.write()
    assert (desk.out / "s.csv").read_bytes() == before
    assert not list(desk.out.glob(".*.tmp"))
    assert desk.ledger.reader.tables_are_stale()
    monkeypatch.undo()
    desk.write()
    assert len(desk.read("s.csv")) == 2


def test_a_table_that_another_program_holds_waits_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, held = Path.replace, {"s.csv", "slides.csv"}

    def refuse(self: Path, target: Path) -> Path:
        if target.name in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    for slide in "rst":
        desk.ok(slide, "a", a_result(2, 0))
    tables = Tables(desk.out, desk.ledger)
    sums = [(summary.slide_id, summary.n_fov_ok) for summary in tables.write()]
    assert sums == [("r", 1), ("s", 1), ("t", 1)]
    assert sorted(path.name for path in desk.out.glob("*.csv")) == ["r.csv", "t.csv"]
    assert tables.held.keys() == {"s", ""}
    assert "cannot write s.csv: Permission denied (close the program" in tables.held["s"]
    assert desk.ledger.reader.tables_are_stale()
    held.clear()
    tables.write(set(tables.held))
    assert (tables.held, desk.read("s.csv")[0]["n_rbc"], len(desk.read("slides.csv"))) == ({}, "2", 3)
    assert not desk.ledger.reader.tables_are_stale()


def test_what_is_no_file_at_the_name_of_a_table_stops_nothing(desk: Desk) -> None:
    os.mkfifo(desk.out / "s.csv")
    (desk.out / "t.csv").mkdir()
    for slide in "rst":
        desk.ok(slide, "a", a_result(2, 0))
    tables = Tables(desk.out, desk.ledger)
    tables.write()
    assert (len(desk.read("r.csv")), len(desk.read("s.csv")), set(tables.held)) == (1, 1, {"t"})


def test_left_over_of_a_killed_process_is_swept(desk: Desk) -> None:
    (desk.out / "cells").mkdir()
    for path in (desk.out / ".old.csv.tmp", desk.out / "cells" / ".old.csv.tmp"):
        path.write_text("half a table")
    desk.write()
    assert not list(desk.out.rglob("*.tmp"))


def test_columns_are_those_of_the_contract() -> None:
    assert len(FIELD_TABLE.names) == 26
    assert len(SLIDE_TABLE.names) == 26
    assert len(CELL_TABLE.names) == 23


def test_the_page_of_the_tables_has_the_columns_of_the_program() -> None:
    docs = Path(__file__).parents[3] / "docs"
    filled = runpy.run_path(str(docs / "make_tables.py"))["filled"]
    page = (docs / "tables.md").read_text(encoding="utf-8")
    assert filled(page) == page, "run: python docs/make_tables.py"
    with pytest.raises(ValueError, match="columns of cells"):
        filled(page.replace("<!-- columns of cells -->", ""))

"""What lies beside the images: said, and never counted by mistake. Nothing of it is opened."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in import BUNDLE_ID, TOY_BUNDLE, StandIn, write_disks

from rbc_edge import config
from rbc_edge.errors import UnavailableError
from rbc_edge.station.inbox import scan
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.other_files import NOT_READ, Ignored, OtherFiles, keys, originals
from rbc_edge.station.session import CountOptions, Summary, count_once
from rbc_edge.station.state_file import STATE_FILE_BYTES, ServiceState, StateFile, read_state
from rbc_edge.store.queries import Reader
from rbc_edge.text import IMAGE_SUFFIXES
from rbc_edge.values import Scale, ScaleSource
from rbc_edge.views.refresh import ViewOptions

GIVEN = Scale(40.0, ScaleSource.CELL_DIAMETER)
MACHINES = [
    *("@eaDir", "@eadir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "FOUND.000"),
    *(
        ".stversions",
        ".Trash-1000",
        ".thumbnails",
        ".snapshot",
        "lost+found",
        "Thumbs",
        "__MACOSX",
        "RECYCLER",
    ),
]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(folder: Path, *ignore: str) -> list[str]:
    return [f"{f.slide_id}/{f.path.name}" for f in scan([folder], ignore=ignore).files]


def counted(source: Path, out: Path, *paths: Path, **options: object) -> Summary:
    recipe = AnalyzerRecipe(BUNDLE_ID, StandIn)
    return count_once(paths or [source], CountOptions(out, recipe, scale=GIVEN, **options))  # type: ignore[arg-type]


def statuses(out: Path) -> dict[str, str]:
    with Reader.open(out) as reader:
        return {f"{row.slide_id}/{row.path.name}": str(row.status) for row in reader.all_fields()}


# -- kinds that are not read --------------------------------------------------------------------------------


def test_kinds_that_are_not_read_are_said_with_numbers_and_advice(tmp_path: Path) -> None:
    write_disks(tmp_path / "in" / "s" / "a.png", 3)
    touch(
        *(tmp_path / "in" / "s" / name for name in ("b.SVS", "c.svs", "d.heic", "e.zip", "n.txt", ".h.svs"))
    )
    touch(tmp_path / "in" / "big.ome.zarr" / "0" / "0.0")
    summary = counted(tmp_path / "in", tmp_path / "out")
    assert (summary.exit_code, summary.n_images) == (0, 1)
    assert summary.not_read == {".svs": 2, ".heic": 1, ".zip": 1, ".zarr": 1}
    (note,) = summary.notes
    assert note.startswith("5 files of kinds that are not read: 2 .svs, 1 ")
    assert "JPEG, PNG or TIFF; for .heic install the extra: pip install 'rbc-edge[heic]'; unpack" in note


def test_a_folder_of_such_kinds_alone_is_not_called_empty(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.czi", tmp_path / "in" / "b.nd2")
    with pytest.raises(UnavailableError, match=r"2 files of kinds that are not read: 1 \.czi, 1 \.nd2"):
        scan([tmp_path / "in"])
    assert scan([tmp_path / "in"], go_on=True).other


def test_the_advice_fits_the_kinds(tmp_path: Path) -> None:
    touch(tmp_path / "a.zip")
    (remark,) = scan([tmp_path], go_on=True).other.remarks()
    assert remark.advice == "unpack archives"


def test_kinds_of_every_sort_are_known_and_no_image_is_among_them() -> None:
    asked = (
        ".heic .heif .svs .nd2 .czi .lif .vsi .mrxs .ndpi .scn .dcm .oir .raw .cr2 .nef .dng .avif .jxl .psd"
    )
    assert set(f"{asked} .pdf .zip .webp .gif .jp2 .mp4".split()) <= NOT_READ
    assert {".webp"} == NOT_READ & IMAGE_SUFFIXES


def test_webp_is_such_a_kind_where_pillow_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.webp", tmp_path / "b.png")
    assert not scan([tmp_path]).other
    monkeypatch.setattr("PIL.features.check", lambda _: False)
    found = scan([tmp_path])
    assert ([f.fov for f in found.files], found.other.kinds) == (["b"], {".webp": 1})


def test_many_kinds_are_one_line() -> None:
    other = OtherFiles()
    for suffix in sorted(NOT_READ):
        other.add_kind(suffix)
    assert f"and {len(NOT_READ) - 8} other kinds" in other.remarks()[0].text


# -- folders of machines, and patterns ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_folders_of_machines_are_passed_over(tmp_path: Path, name: str) -> None:
    touch(
        tmp_path / "day" / "a.png", tmp_path / "day" / name / "a.png" / "SYNO.jpg", tmp_path / name / "b.jpg"
    )
    touch(tmp_path / "day" / "._a.png", tmp_path / "day" / name / "x.svs")
    assert names(tmp_path) == ["day/a.png"]
    assert not scan([tmp_path]).other


def test_what_the_shell_names_with_the_others_is_passed_over_and_what_is_named_alone_is_taken(
    tmp_path: Path,
) -> None:
    touch(tmp_path / "day" / "a.png", tmp_path / "lost+found" / "b.png", tmp_path / "old" / "c.png")
    found = scan(sorted(tmp_path.iterdir()), ignore=["old"])
    assert [f.slide_id for f in found.files] == ["day"]
    assert found.other.n_ignored == 2
    assert names(tmp_path / "lost+found") == ["lost+found/b.png"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("old*", ["day1/a.png", "day1--test/b.png"]),
        ("OLD.png", ["day1/a.png", "day1--test/b.png", "older/c.png"]),
        ("day1/test", ["day1/a.png", "day1/old.png", "older/c.png"]),
        ("day1/*", ["older/c.png"]),
        ("test/b.png", ["day1/a.png", "day1/old.png", "day1--test/b.png", "older/c.png"]),
    ],
)
def test_patterns_are_compared_with_each_name_and_the_whole_way(
    tmp_path: Path, pattern: str, left: list[str]
) -> None:
    top = tmp_path / "old source"  # a name above the source is none of the pattern's
    touch(
        top / "day1" / "a.png", top / "day1" / "old.png", top / "day1" / "test" / "b.png", top / "older/c.png"
    )
    assert sorted(names(top, pattern)) == sorted(left)


def test_ignoring_everything_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    with pytest.raises(UnavailableError, match=r"1 files and folders passed over: .*the setting ignore"):
        scan([tmp_path], ignore=["*.png"])


@settings(max_examples=200)
@given(st.text("abc/", min_size=1), st.text("ab*?[]!-/.", min_size=1, max_size=8))
def test_every_pattern_that_the_settings_take_can_be_asked(way: str, pattern: str) -> None:
    if config.SETTINGS["ignore"].allows((pattern,)):
        Ignored([pattern])(way.rpartition("/")[2], way)
        assert set(pattern) - {"*", "/"}


# -- copies by other programs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("a_outlines.png", "a_cp_masks.tif", "a_overlay.jpg", "a_mask.png", "a_seg.png", "a_Overlay.png"),
        *("a_mask_12.png", "a-labels.tif", "Mask of a.tif", "Drawing of a.jpg", "a_Simple Segmentation.png"),
        *(
            "a (mask).png",
            "a_annot.tif",
            "a_RGB_overlay.png",
            "a_cyto_masks.png",
            "a_counts.jpg",
            "a_ROI.png",
        ),
        *("a_cp_masks_overlay.png", "a.jpg_mask.png", "mask_a.png", "tn_a.jpg", "A_OUTLINES.PNG"),
    ],
)
def test_a_copy_beside_its_image_is_not_counted_and_a_lone_one_is(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "s" / "a.jpg", tmp_path / "s" / name, tmp_path / "lone" / name)
    found = scan([tmp_path])
    assert [f"{f.slide_id}/{f.path.name}" for f in found.files] == [f"lone/{name}", "s/a.jpg"]
    (remark,) = found.other.remarks()
    assert remark.text.startswith("1 picture not counted, made by a program of an image beside, such as ")
    assert remark.text.endswith(f"s/{name}")


def test_the_original_may_be_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    touch(*(tmp_path / "s" / name for name in ("a.czi", "a_mask.png", "b.zip", "b_mask.png")))
    assert names(tmp_path) == ["s/b_mask.png"]


@pytest.mark.parametrize("name", ["a_2.png", "a b.png", "mask.png", "ab_mask.png", "flow.png", "a_old.png"])
def test_other_names_are_fields(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "s" / "a.png", tmp_path / "s" / name)
    assert len(names(tmp_path)) == 2


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0")),
    st.sampled_from(["_mask", "-overlay", " outlines"]),
)
def test_each_name_has_its_copies(stem: str, mark: str) -> None:
    if stem.strip(" _.-"):
        assert set(originals(stem + mark)) & {*keys(f"{stem}.png"), *keys(f"{stem.rstrip(' _.-')}.png")}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(["a.png", "a_mask.png", "b_overlay.png", "b.png", "c_seg.png"]), data=st.data())
def test_counts_do_not_depend_on_whether_the_copy_came_first(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], data: st.DataObject
) -> None:
    top = tmp_path_factory.mktemp("history")
    for i, name in enumerate(order):
        write_disks(top / "in" / "s" / name, 1 + i, seed=len(name) + ord(name[0]))
        if data.draw(st.booleans()):
            counted(top / "in", top / "out")
    counted(top / "in", top / "out")
    found = {name for name, status in statuses(top / "out").items() if status == "ok"}
    assert found == {"s/a.png", "s/b.png", "s/c_seg.png"}
    assert counted(top / "in", top / "out").n_counted == 0


def test_a_copy_stays_a_copy_when_its_image_is_archived(tmp_path: Path) -> None:
    write_disks(tmp_path / "in" / "s" / "a.png", 3)
    write_disks(tmp_path / "in" / "s" / "a_mask.png", 2)
    counted(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "s" / "a.png").unlink()
    summary = counted(tmp_path / "in", tmp_path / "out")
    assert (summary.n_counted, summary.exit_code) == (0, 0)
    assert any(
        "1 picture not counted, made by a program of a counted image" in note for note in summary.notes
    )
    assert statuses(tmp_path / "out") == {"s/a.png": "ok", "s/a_mask.png": "duplicate"}
    assert counted(tmp_path / "in", tmp_path / "out").n_counted == 0


def test_our_overlays_are_known_by_their_mark_whatever_their_name(tmp_path: Path) -> None:
    write_disks(tmp_path / "in" / "s" / "a.png", 3)
    counted(tmp_path / "in", tmp_path / "out", views=ViewOptions(overlays=True))
    (overlay,) = (tmp_path / "out").rglob("*_overlay.jpg")
    (tmp_path / "in" / "s" / "holiday.jpg").write_bytes(overlay.read_bytes())
    summary = counted(tmp_path / "in", tmp_path / "out")
    assert (summary.exit_code, summary.n_failed, summary.n_counted) == (0, 0, 0)
    assert any("1 picture not counted, drawn by rbc-edge, such as " in note for note in summary.notes)
    assert statuses(tmp_path / "out") == {"s/a.png": "ok", "s/holiday.jpg": "duplicate"}
    again = counted(tmp_path / "in", tmp_path / "out")
    assert (again.n_duplicates, again.notes) == (1, [])  # it was not opened again


def test_a_folder_with_a_ledger_is_not_scanned(tmp_path: Path) -> None:
    touch(
        tmp_path / "in" / "a.png", tmp_path / "in" / "r" / "ledger.sqlite3", tmp_path / "in" / "r" / "b.png"
    )
    assert scan([tmp_path / "in"]).results == (tmp_path / "in" / "r",)
    assert names(tmp_path / "in") == ["in/a.png"]


# -- where it is said ---------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


def test_run_status_and_doctor_say_it(rbc: Run, camera: Path, tmp_path: Path) -> None:
    touch(
        camera / "s1" / "x.heic",
        camera / "s1" / "y.svs",
        camera / "s1" / "0_mask.png",
        camera / "old" / "z.png",
    )
    asked = ("--out", tmp_path / "out", "--bundle", TOY_BUNDLE)
    run = ("run", camera, *asked, "--cell-diameter", 40, "--ignore", "old", "--ignore", "none")
    code, _, said = rbc(*run)
    assert (code, said.count("\n")) == (0, 2)
    assert "2 files of kinds that are not read: 1 .heic, 1 .svs; save" in said
    assert "1 picture not counted" in said
    answer = json.loads(rbc(*run, "--json")[1])
    assert (answer["n_not_read"], answer["n_copies_not_counted"]) == ({".heic": 1, ".svs": 1}, 1)
    assert "2 files of kinds" in answer["notes"][0]
    assert "not counted    2 files of kinds" in rbc("status", "--out", tmp_path / "out")[1]
    assert len(json.loads(rbc("status", "--out", tmp_path / "out", "--json")[1])["not_counted"]) == 2
    code, said, _ = rbc("doctor", camera, *asked, "--ignore", "old")
    assert code == 0
    assert re.search(
        r"warning +other files +2 files of kinds that are not read: 1 .heic, 1 .svs\n +-> save", said
    )
    assert "3 images in 3 folders" in said
    (camera / "s1" / "x.heic").unlink()
    (camera / "s1" / "y.svs").unlink()
    (camera / "s1" / "0_mask.png").unlink()
    rbc(*run)
    assert "not counted" not in rbc("status", "--out", tmp_path / "out")[1]


def test_the_state_file_holds_it_and_loses_it_rather_than_a_number(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.write(ServiceState(not_counted=("3 files of kinds that are not read",), n_counted=7))
    _, state = read_state(tmp_path)
    assert state is not None and state.not_counted == ("3 files of kinds that are not read",)
    file.write(ServiceState(not_counted=("a", "\u00e4" * STATE_FILE_BYTES), n_counted=8))
    _, state = read_state(tmp_path)
    assert state is not None and (state.not_counted, state.n_counted) == (("a",), 8)
    file.close()


def test_a_remark_is_one_line() -> None:
    (remark,) = OtherFiles(copies=[Path("a\n_mask.png")]).remarks()
    assert r"such as a\n_mask.png; rename" in str(remark)


def test_nothing_is_opened_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.png", tmp_path / "a_mask.png", tmp_path / "b.svs", tmp_path / "c.heic")
    monkeypatch.setattr(Path, "open", None)
    monkeypatch.setattr("builtins.open", None)
    listed: list[Path] = []
    listing = os.scandir

    def scandir(path: Path) -> object:
        listed.append(path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(scan([tmp_path]).files) == 1
    assert listed == [tmp_path]

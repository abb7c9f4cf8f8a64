"""Each page of a file is a field of its own, when the file changes, too, and when a person decides."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image
from stand_in import BUNDLE_ID, StandIn, disks, write_disks

from rbc_edge.station.inbox import scan
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, Summary, count_once
from rbc_edge.store.decisions import decide
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.store.rows import Status
from rbc_edge.values import FieldOfView, FovResult, Scale, ScaleSource, UInt8
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision import image_file

GIVEN: Final = Scale(40.0, ScaleSource.CELL_DIAMETER)


def pages(*counts: int, depth: int = 8, compression: str | None = None) -> bytes:
    """A TIFF with a page of so many disks for each number, no two of them at the same places."""
    shown = [turned(disks(n, seed=n), i) for i, n in enumerate(counts)]
    if depth == 16:
        shown = [page[:, :, 1].astype(np.uint16) * 257 for page in shown]  # type: ignore[misc]
    first, *others = [Image.fromarray(np.ascontiguousarray(page)) for page in shown]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=others, compression=compression)
    return buffer.getvalue()


def turned(image: UInt8, i: int) -> UInt8:
    rng = np.random.default_rng(i)
    return np.roll(image, (int(rng.integers(20, 40)) * i, int(rng.integers(20, 40)) * i), (0, 1))


class Camera:
    """A camera's folder and the results of its runs."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / "camera", folder / "out"
        (self.source / "s").mkdir(parents=True)
        self.analyzer = StandIn()

    def write(self, name: str, data: bytes) -> Path:
        path = self.source / "s" / name
        path.write_bytes(data)
        return path

    def run(self, analyzer: StandIn | None = None, views: ViewOptions | None = None) -> Summary:
        self.analyzer = analyzer or StandIn()
        recipe = AnalyzerRecipe(BUNDLE_ID, lambda: self.analyzer)
        return count_once([self.source], CountOptions(self.out, recipe, GIVEN, views=views or ViewOptions()))

    def table(self, name: str = "s") -> list[dict[str, str]]:
        with (self.out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def counts(self) -> dict[str, str]:
        return {row["fov"]: row["n_rbc"] or row["failure"] or row["status"] for row in self.table()}


@pytest.fixture
def camera(tmp_path: Path) -> Camera:
    return Camera(tmp_path)


@pytest.mark.parametrize("depth", [8, 16])
def test_each_page_is_a_field(camera: Camera, depth: int) -> None:
    path = camera.write("a.tif", pages(3, 5, 7, depth=depth))
    done = camera.run(views=ViewOptions(cells=True, overlays=True, reports=True))
    n_pages = [int(row["n_rbc"]) for row in camera.table()]
    assert [row["fov"] for row in camera.table()] == ["a#1", "a#2", "a#3"]
    alone = [StandIn().analyze(image_file.load_field(path, "s", "", i), GIVEN).n_rbc for i in (1, 2, 3)]
    assert n_pages == alone
    assert min(n_pages) >= 3
    assert (done.n_images, done.n_counted, done.exit_code) == (3, 3, 0)
    assert {row["path"] for row in camera.table()} == {str(path)}
    contents = [row["sha256"] for row in camera.table()]
    assert contents == [f"{contents[0][:64]}#{i}" for i in (1, 2, 3)]
    assert {row["fov"] for row in camera.table("cells/s")} == {"a#1", "a#2", "a#3"}
    drawn = sorted(p.name for p in (camera.out / "overlays" / "s").iterdir())
    assert drawn == [f"a#{i}_overlay.jpg" for i in (1, 2, 3)]
    assert (camera.out / "reports" / "s.html").read_text().count('src="data:image/jpeg') == 3
    again = camera.run()
    assert (again.n_counted, again.n_unchanged, camera.analyzer.analyzed) == (0, 3, [])


def test_a_file_with_more_fewer_or_no_pages_is_another_file(camera: Camera) -> None:
    for counts, names in (
        ((3, 5), ["a#1", "a#2"]),
        ((3, 5, 7, 4), ["a#1", "a#2", "a#3", "a#4"]),
        ((6, 2), ["a#1", "a#2"]),
        ((6,), ["a"]),
        ((3, 5, 7), ["a#1", "a#2", "a#3"]),
    ):
        camera.write("a.tif", pages(*counts))
        done = camera.run()
        assert (sorted(camera.counts()), done.n_counted) == (names, len(names))
        assert camera.table("slides")[0]["n_fov_ok"] == str(len(names))
    with Ledger(camera.out) as ledger:
        kept = ledger.database.rows("SELECT fov FROM replaced ORDER BY fov")
        assert {fov for (fov,) in kept} == {"a", "a#1", "a#2", "a#3", "a#4"}


def test_a_broken_page_fails_alone_and_a_broken_list_fails_the_file(camera: Camera) -> None:
    data = pages(3, 5, 7, compression="tiff_adobe_deflate")
    with Image.open(io.BytesIO(data)) as picture:
        picture.seek(1)
        at = picture.tag_v2[273][0] + picture.tag_v2[279][0] // 2  # type: ignore[attr-defined]
    camera.write("a.tif", data[:at] + bytes(255 - b for b in data[at : at + 9]) + data[at + 9 :])
    done = camera.run()
    assert (camera.counts()["a#2"], done.n_failed, done.n_counted, done.exit_code) == ("truncated", 1, 2, 3)
    assert camera.run().n_failed == 1
    camera.write("a.tif", data[:-300])
    done = camera.run()
    assert (camera.counts(), done.exit_code) == ({"a": "truncated"}, 3)


def test_a_killed_run_loses_no_page(camera: Camera) -> None:
    class Killed(StandIn):
        def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
            if field.fov == "a#2":
                raise KeyboardInterrupt
            return super().analyze(field, scale)

    camera.write("a.tif", pages(3, 5, 7))
    with pytest.raises(KeyboardInterrupt):
        camera.run(Killed())
    camera.run()
    assert list(camera.counts()) == ["a#1", "a#2", "a#3"]


def test_pages_are_renamed_excluded_forgotten_and_retried_like_fields(camera: Camera) -> None:
    path = camera.write("a.tif", pages(3, 5, 7))
    camera.run()
    with Ledger(camera.out) as ledger:
        assert decide(ledger, "s", ["a#2"], Status.EXCLUDED, reason="folded") == 1
        ledger.commit()
    camera.run()
    assert [row["status"] for row in camera.table()] == ["ok", "excluded", "ok"]
    path.rename(path.with_name("b.tif"))
    done = camera.run()
    assert (done.n_counted, camera.analyzer.analyzed) == (0, [])
    assert [(row["fov"], row["status"]) for row in camera.table()] == [
        *(("b#1", "ok"), ("b#2", "excluded"), ("b#3", "ok"))
    ]
    (path.parent.parent / "t").mkdir()
    path.with_name("b.tif").rename(path.parent.parent / "t" / "b.tif")
    assert camera.run().n_counted == 0
    assert [row["status"] for row in camera.table("t")] == ["ok", "excluded", "ok"]
    with Reader.open(camera.out) as reader:
        assert reader.tally().n_ok == 2


def test_a_copy_of_a_file_with_pages_counts_once(camera: Camera) -> None:
    camera.write("a.tif", pages(3, 5))
    camera.write("b.tif", pages(3, 5))
    assert camera.run().n_duplicates == 2
    assert [row["status"] for row in camera.table()] == ["ok", "ok", "duplicate", "duplicate"]


def test_pages_an_older_program_refused_are_counted(camera: Camera, monkeypatch: pytest.MonkeyPatch) -> None:
    camera.write("a.tif", pages(3, 5))
    with monkeypatch.context() as older:
        older.setattr("rbc_edge.station.session.n_fields", lambda _: 1)
        assert camera.run().n_failed == 1
    assert camera.counts() == {"a": "unsupported"}
    assert camera.run().n_failed == 0
    assert list(camera.counts()) == ["a#1", "a#2"]


def test_a_file_named_like_a_page_is_another_field(camera: Camera) -> None:
    camera.write("a.tif", pages(3, 5))
    write_disks(camera.source / "s" / "a#2.png", 9)
    assert camera.run().n_counted == 3
    assert list(camera.counts()) == ["a#1", "a#2", "a#2.png"]
    write_disks(camera.source / "s" / "Image #7.png", 2)
    assert [f.fov for f in scan([camera.source]).files] == ["Image #7", "a", "a#2.png"]


@pytest.mark.parametrize("second", [0, 3])
def test_pages_that_show_one_place_are_no_fields(camera: Camera, second: int) -> None:
    field = disks(9)
    shown: Sequence[UInt8] = (field, np.roll(field, second, 1), turned(disks(5), 1))
    first, *others = [Image.fromarray(np.ascontiguousarray(page)) for page in shown]
    first.save(camera.source / "s" / "a.tif", save_all=True, append_images=others)
    camera.run()
    assert camera.counts() == {"a#1": "unsupported", "a#2": "unsupported", "a#3": "5"}
    with Reader.open(camera.out) as reader:
        assert all("same place" in row.message for row in reader.failures(9))


def test_each_page_of_a_copy_by_a_program_is_taken_out_when_its_image_comes(camera: Camera) -> None:
    camera.write("a_mask.tif", pages(3, 5))
    camera.run()
    assert camera.counts() == {"a_mask#1": "3", "a_mask#2": "5"}
    write_disks(camera.source / "s" / "a.png", 9)
    camera.run()
    assert camera.counts() == {"a": "9", "a_mask#1": "copy", "a_mask#2": "copy"}

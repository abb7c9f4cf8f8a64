"""One shot in two formats is one field, in whatever order the files come and go."""

import csv
import io
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image
from stand_in import BUNDLE_ID, StandIn, disks

from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, Summary, count_once
from rbc_edge.values import Scale, ScaleSource, UInt8

GIVEN: Final = Scale(40.0, ScaleSource.CELL_DIAMETER)


class Camera:
    """A camera's folder and the results of its runs."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / "camera" / "s", folder / "out"
        self.source.mkdir(parents=True)
        self.analyzer = StandIn()

    def write(self, name: str, image: UInt8) -> None:
        Image.fromarray(image).save(self.source / name)

    def run(self, ignore: Sequence[str] = ()) -> Summary:
        self.analyzer = StandIn()
        recipe = AnalyzerRecipe(BUNDLE_ID, lambda: self.analyzer)
        return count_once([self.source.parent], CountOptions(self.out, recipe, GIVEN, ignore=ignore))

    def rows(self) -> dict[str, str]:
        with (self.out / "s.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["failure"] == ("other-format" if row["status"] == "duplicate" else "") for row in rows)
        return {row["fov"]: row["n_rbc"] or row["status"] for row in rows}


@pytest.fixture
def camera(tmp_path: Path) -> Camera:
    return Camera(tmp_path)


SHOT: Final = disks(9, seed=1)


@pytest.mark.parametrize("order", list(permutations(["a.jpg", "a.tif", "a.png"])))
def test_the_order_of_arrival_does_not_matter(camera: Camera, order: tuple[str, ...]) -> None:
    for name in order:
        camera.write(name, SHOT)
        camera.run()
    assert camera.rows() == {"a.jpg": "duplicate", "a.png": "duplicate", "a.tif": "9"}
    done = camera.run()
    assert (done.n_counted, done.n_unchanged, done.n_duplicates, done.exit_code) == (0, 1, 2, 0)
    assert camera.analyzer.analyzed == []


def test_two_pictures_with_one_name_are_two_fields(camera: Camera) -> None:
    camera.write("a.jpg", np.roll(disks(5, seed=2), (37, 31), (0, 1)))
    camera.write("a.tif", SHOT)
    camera.run()
    assert len(rows := camera.rows()) == 2 and "duplicate" not in rows.values()
    assert camera.run().n_unchanged == 2


def test_a_smaller_and_brighter_version_is_the_same_shot(camera: Camera) -> None:
    camera.write("a.tif", SHOT)
    camera.write("a.jpg", np.minimum(SHOT[::2, ::2] + 20, 255).astype(np.uint8))
    camera.run()
    assert camera.rows() == {"a.jpg": "duplicate", "a.tif": "9"}


def test_a_half_written_better_file_takes_over_when_it_is_whole(camera: Camera) -> None:
    camera.write("a.jpg", SHOT)
    buffer = io.BytesIO()
    Image.fromarray(SHOT).save(buffer, "PNG")
    (camera.source / "a.png").write_bytes(buffer.getvalue()[:900])
    assert (camera.run().n_failed, camera.analyzer.analyzed) == (1, ["s/a.jpg"])
    (camera.source / "a.png").write_bytes(buffer.getvalue())
    camera.run()
    assert camera.rows() == {"a.jpg": "duplicate", "a.png": "9"}


def test_the_better_file_becomes_another_picture(camera: Camera) -> None:
    camera.write("a.jpg", SHOT)
    camera.write("a.tif", SHOT)
    camera.run()
    camera.write("a.tif", np.roll(disks(4, seed=3), (37, 31), (0, 1)))
    camera.run()
    assert "duplicate" not in camera.rows().values()
    assert camera.rows()["a.jpg"] == "9"


def test_the_better_file_is_archived_and_still_counts_alone(camera: Camera) -> None:
    camera.write("a.jpg", SHOT)
    camera.write("a.tif", SHOT)
    camera.run()
    (camera.source / "a.tif").unlink()
    for _ in range(2):
        camera.run()
        assert camera.rows() == {"a": "duplicate", "a.tif": "9"}


def test_a_better_file_that_is_passed_over_takes_no_count(camera: Camera) -> None:
    for name in ("a.jpg", "a.png", "a.tif"):
        camera.write(name, SHOT)
    camera.run(ignore=["*.tif"])
    assert camera.rows() == {"a.jpg": "duplicate", "a.png": "9"}

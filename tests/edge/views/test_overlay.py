"""Overlays. The picture: each kind of cell has its outline and its colour, and the image is not changed.

The files: complete or absent, up to date with the ledger, never in the folder of the camera.
"""

import logging
import os
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFont
from stand_in import StandIn, write_disks

from rbc_edge.errors import ImageError
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import (
    SHAPES,
    Cells,
    Detections,
    FieldOfView,
    InboxFile,
    Label,
    Morphology,
    Scale,
    ScaleSource,
    Shape,
    UInt8,
)
from rbc_edge.views import overlay
from rbc_edge.views.overlay import Overlays
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import load_field


def one_cell(class_id: int, *, overlapping: bool) -> Cells:
    detections = Detections(
        np.array([[20, 30, 60, 80]], np.float32), np.ones(1, np.float32), np.array([class_id], np.int64)
    )
    score = np.array([float(overlapping) if class_id == 0 else np.nan], np.float32)
    return Cells(
        detections, score, np.array([overlapping]), np.zeros(1, np.int64), np.zeros((1, 4), np.bool_)
    )


def test_each_kind_has_its_own_outline_on_the_box() -> None:
    blank = np.full((100, 120, 3), 240, np.uint8)
    seen = set()
    for class_id, overlapping in ((0, False), (0, True), (1, False), (2, False)):
        drawn = overlay.draw(blank, one_cell(class_id, overlapping=overlapping))
        changed = (drawn != blank).any(axis=2)
        rows, columns = np.nonzero(changed)
        assert abs(columns.min() - 20) <= 3 and abs(columns.max() - 60) <= 3
        assert abs(rows.min() - 30) <= 3 and abs(rows.max() - 80) <= 3
        assert not changed[50:60, 35:45].any()  # the cell itself stays visible
        colours, counts = np.unique(drawn[changed], axis=0, return_counts=True)
        seen.add(tuple(colours[counts.argmax()].tolist()))
    assert len(seen) == 4


def test_an_overlapping_cell_is_dashed_and_a_single_one_whole() -> None:
    blank = np.full((100, 120, 3), 240, np.uint8)
    angles = np.radians(np.arange(0, 360, 2))
    x, y = np.round(40 + 20 * np.cos(angles)).astype(int), np.round(55 + 25 * np.sin(angles)).astype(int)
    whole = (overlay.draw(blank, one_cell(0, overlapping=False)) != blank).any(axis=2)[y, x]
    dashed = (overlay.draw(blank, one_cell(0, overlapping=True)) != blank).any(axis=2)[y, x]
    assert whole.mean() > 0.95
    assert 0.3 < dashed.mean() < 0.9


def test_nothing_found_draws_nothing_and_the_photograph_is_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    before = image.copy()
    assert (overlay.draw(image, Cells.empty()) == before).all()
    overlay.draw(image, one_cell(0, overlapping=True))
    assert (image == before).all()


def test_a_group_has_one_line_around_all_of_its_cells() -> None:
    blank = np.full((120, 300, 3), 240, np.uint8)
    xyxy = np.array([[20, 30, 70, 80], [60, 30, 110, 80], [200, 30, 250, 80]], np.float32)
    alone = Cells(
        Detections(xyxy, np.ones(3, np.float32), np.zeros(3, np.int64)),
        np.ones(3, np.float32),
        np.ones(3, np.bool_),
        np.zeros(3, np.int64),
        np.zeros((3, 4), np.bool_),
    )
    grouped = replace(alone, group=np.array([1, 1, 2], np.int64))
    line = (overlay.draw(blank, grouped) != overlay.draw(blank, alone)).any(axis=2)
    assert not line[:, 130:].any()  # a group of one has none
    rows, columns = np.nonzero(line)
    assert 10 <= columns.min() < 20 and 110 < columns.max() <= 120
    assert 20 <= rows.min() < 30 and 80 < rows.max() <= 90
    n_pieces, _ = cv2.connectedComponents(line.astype(np.uint8))
    assert n_pieces <= 3  # one line (and the ground), where the cells' own lines do not cut it


def test_cells_that_are_linked_by_the_corners_of_their_boxes_share_a_line() -> None:
    blank = np.full((120, 300, 3), 240, np.uint8)
    xyxy = np.array([[20, 10, 60, 50], [60, 50, 100, 90]], np.float32)
    alone = Cells(
        Detections(xyxy, np.ones(2, np.float32), np.zeros(2, np.int64)),
        np.ones(2, np.float32),
        np.ones(2, np.bool_),
        np.zeros(2, np.int64),
        np.zeros((2, 4), np.bool_),
    )
    grouped = replace(alone, group=np.ones(2, np.int64))
    line = (overlay.draw(blank, grouped) != overlay.draw(blank, alone)).any(axis=2)
    assert cv2.connectedComponents(line.astype(np.uint8))[0] == 2  # the ground, and one line


def test_a_large_field_is_drawn_smaller_with_its_cells() -> None:
    blank = np.full((100, 120, 3), 240, np.uint8)
    small = overlay.draw(blank, one_cell(1, overlapping=False), longest_px=60)
    assert small.shape == (50, 60, 3)
    rows, columns = np.nonzero((small != 240).any(axis=2))
    assert abs(columns.min() - 10) <= 2 and abs(columns.max() - 30) <= 2
    assert abs(rows.min() - 15) <= 2 and abs(rows.max() - 40) <= 2
    assert overlay.draw(blank, Cells.empty(), longest_px=500).shape == blank.shape  # never larger


def shaped(n: int, *shape: Shape, sure: bool = True) -> Morphology:
    unknown = Morphology.unknown(n)
    names = np.array([SHAPES.index(each) for each in shape], np.int64)
    return replace(unknown, shape=names, shape_sure=np.full(n, sure))


def test_shapes_are_letters_in_the_cell_and_only_where_they_are_asked_for(desk: "Desk") -> None:
    desk.count("s", "a", 3)
    (row,) = desk.ledger.reader.fields("s")
    ((_, cells),) = desk.ledger.reader.cells("s")
    cells.touches_edge[:] = False
    n = len(cells)
    cells = replace(cells, morphology=shaped(n, *[Shape.TEARDROP] * n), overlapping=np.arange(n) == 0)
    assert overlay.shape_letters(cells, row) == ["", *["Te"] * (n - 1)]
    doubtful = replace(cells, morphology=shaped(n, *[Shape.TEARDROP] * n, sure=False))
    assert overlay.shape_letters(doubtful, row)[1:] == ["Te?"] * (n - 1)
    normal = replace(cells, morphology=shaped(n, *[Shape.NORMAL] * n))
    assert set(overlay.shape_letters(normal, row)) == {""}
    assert set(overlay.shape_letters(cells, replace(row, quality_flags=("unfamiliar",)))) == {""}
    blank = np.full((100, 120, 3), 128, np.uint8)
    cell = one_cell(0, overlapping=False)
    plain, marked = overlay.draw(blank, cell), overlay.draw(blank, cell, letters=["Te"])
    changed = (plain != marked).any(axis=2)
    assert changed[45:65, 30:50].any() and not changed[:35].any()
    # Dark and pale: it shows on every ground, in print too.
    assert marked[changed].min() < 60 and marked[changed].max() > 200


def test_letters_are_explained_below(desk: "Desk", monkeypatch: pytest.MonkeyPatch) -> None:
    desk.count("s", "a", 3)
    said: list[str] = []
    placed = overlay._placed

    def noted(items: Sequence[tuple[Label | None, str]], *rest: Any) -> Any:
        said.extend(text for _, text in items)
        return placed(items, *rest)

    monkeypatch.setattr(overlay, "_placed", noted)
    desk.draw()
    plain = list(said)
    said.clear()
    desk.draw(shapes=True)  # another style: it is drawn again
    assert [text for text in said if text not in plain] == ["no shape but normal is marked"]
    (row,) = desk.ledger.reader.fields("s")
    blank = np.full((100, 400, 3), 240, np.uint8)
    said.clear()
    overlay.with_footer(blank, row, edges=EdgeRule.ALL, manifest=None, letters=["Te", "Bu", "Te?", ""])
    assert {"Te teardrop cell 2", "Bu echinocyte 1", "? unsure 1"} <= set(said)
    said.clear()
    flagged = replace(row, quality_flags=("blurred",))
    overlay.with_footer(blank, flagged, edges=EdgeRule.ALL, manifest=None, letters=[""])
    assert "no shape is judged: see the flags" in said


class Desk:
    """A camera's folder, counted by the stand-in, and its output folder."""

    def __init__(self, folder: Path) -> None:
        self.camera, self.out = folder / "camera", folder / "out"
        self.out.mkdir()
        self.ledger = Ledger(self.out)

    def count(
        self,
        slide_id: str,
        fov: str,
        n: int,
        *,
        seed: int = 0,
        bundle_id: str = "b1",
        at: str = "2026-01-01T00:00:00Z",
    ) -> Path:
        path = self.camera / slide_id / f"{fov}.png"
        write_disks(path, n, seed=seed)
        field = load_field(path, slide_id, fov)
        result = StandIn().analyze(field, Scale(40.0, ScaleSource.SLIDE))
        look = Look(InboxFile(path, slide_id, fov, 1, 1), field.sha256, result=result)
        self.ledger.record(look, Version(bundle_id, "x"), at, force=True)
        return path

    def move(self, path: Path, slide_id: str) -> None:
        """Has another slide claim the file."""
        look = Look(InboxFile(path, slide_id, path.stem, 1, 1), failure="truncated")
        self.ledger.record(look, Version("b1", "x"), "2026-01-01T00:00:00Z")

    def draw(self, slide_id: str = "s", **options: object) -> bool:
        return Overlays(self.out, self.ledger.reader, **options).write_slide(slide_id)  # type: ignore[arg-type]

    def files(self) -> dict[str, int]:
        """Paths below the folder of overlays, and which file each is."""
        found = sorted((self.out / "overlays").rglob("*"))
        return {str(p.relative_to(self.out / "overlays")): p.stat().st_ino for p in found if p.is_file()}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    with made.ledger:
        yield made


def picture(path: Path) -> UInt8:
    with pytest.raises(ImageError, match="a picture that rbc-edge drew"):  # in the source it is no field
        load_field(path, "", "")
    return np.asarray(Image.open(path))


def test_each_field_has_its_picture_with_a_strip_below(desk: Desk) -> None:
    path = desk.count("s", "a", 5)
    before = sorted(desk.camera.rglob("*")), path.read_bytes()
    assert desk.draw()
    assert list(desk.files()) == ["s/a_overlay.jpg"]
    drawn = picture(desk.out / "overlays" / "s" / "a_overlay.jpg")
    image = load_field(path, "s", "a").image
    assert drawn.shape[1] == image.shape[1] and drawn.shape[0] > image.shape[0] + 30
    difference = np.abs(drawn[: image.shape[0]].astype(int) - image)
    assert difference.max() > 2 and np.median(difference) <= 2
    strip = drawn[image.shape[0] :]
    assert np.median(strip) > 250 and strip.min() < 80  # ink on paper
    assert (sorted(desk.camera.rglob("*")), path.read_bytes()) == before


def test_the_strip_says_the_counts_scale_thresholds_and_bundle(toy_bundle_path: Path, desk: Desk) -> None:
    manifest = Bundle.open(toy_bundle_path).manifest
    desk.count("s", "a", 5, bundle_id=manifest.bundle_id)
    row = desk.ledger.reader.field("s", "a")
    assert row is not None
    narrow = np.full((40, 20, 3), 9, np.uint8)
    plain = overlay.with_footer(narrow, row, edges=EdgeRule.ALL, manifest=None)
    full = overlay.with_footer(narrow, row, edges=EdgeRule.ALL, manifest=manifest)
    assert plain.shape[1] == 360 and (plain[:40, :20] == 9).all()  # wide enough to be read
    assert full.shape[0] > plain.shape[0]  # the thresholds take room
    texts = " ".join(overlay.threshold_texts(manifest.bundle_id, manifest))
    assert f"red {manifest.score_threshold[0]:.2f}" in texts
    assert f"from {manifest.overlap_threshold:.2f}" in texts
    assert overlay.threshold_texts(f"{manifest.bundle_id}+fp32", manifest)
    assert overlay.threshold_texts("another", manifest) == []
    other = overlay.with_footer(
        narrow, replace(row, fov="b" * 300, slide_id="\u00fc"), edges=EdgeRule.ALL, manifest=None
    )
    assert other.shape[1] == 360


def test_a_picture_is_drawn_again_when_its_counts_change_and_only_then(desk: Desk) -> None:
    desk.count("s", "a", 5)
    desk.count("s", "b", 4, seed=1)
    desk.draw()
    before = desk.files()
    desk.draw()
    assert desk.files() == before
    desk.count("s", "b", 6, seed=2)
    desk.draw()
    after = desk.files()
    assert after["s/a_overlay.jpg"] == before["s/a_overlay.jpg"]
    assert after["s/b_overlay.jpg"] != before["s/b_overlay.jpg"]
    desk.draw(edges=EdgeRule.INSIDE)
    assert desk.files()["s/a_overlay.jpg"] != after["s/a_overlay.jpg"]


def test_a_picture_with_letters_is_drawn_again_with_each_new_count(desk: Desk) -> None:
    desk.count("s", "a", 5)
    seen = []
    for at, letters in (
        ("2026-01-01", True),
        ("2026-01-02", True),
        ("2026-01-02", False),
        ("2026-01-03", False),
    ):
        desk.count("s", "a", 5, at=f"{at}T00:00:00Z")  # the same cells: only their shapes may differ
        desk.draw(shapes=letters)
        seen.append(desk.files()["s/a_overlay.jpg"])
    assert seen[0] != seen[1] != seen[2] == seen[3]


def test_a_picture_that_was_cut_short_is_drawn_again(desk: Desk) -> None:
    desk.count("s", "a", 5)
    desk.draw()
    path = desk.out / "overlays" / "s" / "a_overlay.jpg"
    whole = path.read_bytes()
    for length in (0, 1, 500, len(whole) - 1):
        path.write_bytes(whole[:length])
        desk.draw()
        assert path.read_bytes() == whole


def test_a_pipe_at_the_name_of_a_picture_is_replaced(desk: Desk) -> None:
    desk.count("s", "a", 5)
    path = desk.out / "overlays" / "s" / "a_overlay.jpg"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    desk.draw()
    assert path.is_file()


def test_a_picture_goes_with_its_field(desk: Desk) -> None:
    paths = [desk.count("s", fov, 4, seed=i) for i, fov in enumerate("ab")]
    desk.draw()
    keep = desk.out / "overlays" / "s" / "note.txt"
    keep.write_text("mine")
    desk.move(paths[0], "t")
    desk.draw()
    assert list(desk.files()) == ["s/b_overlay.jpg", "s/note.txt"]
    keep.unlink()
    desk.move(paths[1], "t")
    desk.draw()
    assert not (desk.out / "overlays" / "s").exists()


def test_of_an_image_that_is_gone_the_picture_of_its_counts_stays(desk: Desk) -> None:
    path = desk.count("s", "a", 5)
    desk.draw()
    before = desk.files()
    path.unlink()
    desk.draw(longest_px=100)  # it cannot be drawn smaller any more
    assert desk.files() == before
    desk.draw(edges=EdgeRule.INSIDE)  # but other counts must not stand below it
    assert desk.files() == {}


def test_another_image_in_its_place_is_not_taken_for_it(desk: Desk) -> None:
    path = desk.count("s", "a", 5)
    write_disks(path, 3, seed=9)
    desk.draw()
    assert desk.files() == {}


def test_names_that_no_file_system_takes(desk: Desk) -> None:
    desk.count("s", "a", 4)
    path = desk.count("s", "b", 5)
    result = StandIn().analyze(load_field(path, "x", "y"), Scale(40.0, ScaleSource.SLIDE))
    look = Look(InboxFile(path, "x/..", "p:q" * 90, 1, 1), "?", result=result)
    desk.ledger.record(look, Version("b1", "x"), "now")
    desk.draw("x/..")
    assert all(part not in ("..", "") for name in desk.files() for part in name.split("/"))


def test_what_was_removed_is_drawn_again_and_what_cannot_be_drawn_is_not_tried_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.count("s", "a", 4)
    desk.count("s", "b", 5, seed=1).write_bytes(b"")
    overlays = Overlays(desk.out, desk.ledger.reader)
    overlays.write_slide("s")
    overlays.write_slide("s")
    looked: list[str] = []

    def looking(path: Path, slide_id: str, fov: str, page: int) -> FieldOfView:
        looked.append(fov)
        return load_field(path, slide_id, fov, page)

    monkeypatch.setattr(overlay, "load_field", looking)
    (desk.out / "overlays" / "s" / "a_overlay.jpg").unlink()
    overlays.write_slide("s")
    assert looked == ["a"]
    assert list(desk.files()) == ["s/a_overlay.jpg"]


def test_drawing_can_be_ended_and_goes_on(desk: Desk) -> None:
    for i in range(3):
        desk.count("s", f"{i}", 4, seed=i)
    left = [True, False]
    overlays = Overlays(desk.out, desk.ledger.reader)
    assert not overlays.write_slide("s", keep_going=lambda: left.pop(0))
    assert len(desk.files()) == 1
    assert overlays.write_slide("s")
    assert len(desk.files()) == 3


def test_what_cannot_be_written_is_a_warning_said_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.count("s", "a", 4)
    (desk.out / "overlays").write_bytes(b"")
    overlays = Overlays(desk.out, desk.ledger.reader)
    with caplog.at_level(logging.WARNING):
        assert overlays.write_slide("s")
        assert overlays.write_slide("s")
    assert len(caplog.records) == 1
    assert "the counts are kept" in caplog.text


def test_what_a_killed_process_left_is_removed_later(desk: Desk) -> None:
    desk.count("s", "a", 4)
    folder = desk.out / "overlays" / "s"
    folder.mkdir(parents=True)
    old, young = folder / ".0123456789abcdef.1.tmp", folder / ".0123456789abcdef.2.tmp"
    old.write_bytes(b"")
    young.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    desk.draw()
    assert not old.exists() and young.exists()


def test_the_strip_shows_names_in_their_own_letters(desk: Desk) -> None:
    desk.count("s", "a", 5)
    row = desk.ledger.reader.field("s", "a")
    assert row is not None
    image = np.full((40, 400, 3), 9, np.uint8)

    def strip(name: str) -> bytes:
        return overlay.with_footer(
            image, replace(row, slide_id=name), edges=EdgeRule.ALL, manifest=None
        ).tobytes()

    names = ("M\u00fcller", "Mu\u0308ller", "Muller", r"M\xfcller", "\u017e\u00e1ba", "zaba", "\u0416\u0430")
    shown = [strip(name) for name in names]
    assert shown[0] == shown[1]  # as a Mac writes it
    assert len(set(shown)) == len(names) - 1
    assert strip("\u4e2d") == strip(r"\u4e2d")  # no letter of the font


def test_every_letter_that_is_drawn_is_in_the_font() -> None:
    font = ImageFont.truetype(overlay._FONT, 24)

    def drawn(letter: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(letter)
        return mask.size, bytes(list(mask))

    missing = drawn("\u4e2d")
    letters = [chr(i) for some in overlay._LETTERS for i in some if unicodedata.category(chr(i))[0] in "LNP"]
    assert [letter for letter in letters if drawn(letter) == missing] == []

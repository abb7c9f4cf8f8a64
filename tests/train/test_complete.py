"""Completed boxes: every cell gets one, by the teacher or by its point."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from command import rbc_train
from tiny_data import TinyData, add_chula, photograph, write_image

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.ops.synthetic import DrawnField
from rbc_edge.values import CellClass, Detections, Float32
from rbc_edge.vision import preprocess
from rbc_edge.vision.boxes import iou
from rbc_train import complete
from rbc_train.data import (
    Box,
    Photograph,
    ShapePoint,
    completed_photographs,
    photographs_of,
    read_chula,
    read_completed,
)

BOXES = np.array([[10, 10, 50, 50], [70, 10, 110, 50], [130, 10, 170, 50]], np.float32)


class Teacher:
    """Finds given boxes with given scores, at the right scale only."""

    def __init__(self, xyxy: Float32, score: list[float], class_id: list[int]) -> None:
        self.detector = self
        self.found = Detections(xyxy, np.array(score, np.float32), np.array(class_id, np.int64))

    def detect(self, _view: preprocess.View, diameter: float, *, score_threshold: Float32) -> Detections:
        """As `Detector.detect`."""
        is_over = self.found.score >= score_threshold[self.found.class_id]
        return self.found.take(is_over) if diameter == 40.0 else Detections.empty()


def discs(
    tmp_path: Path, drawn: Float32, *, points: list[tuple[float, float]] | None, **own: Any
) -> Photograph:
    """A photograph of dark discs, with a point in each, or with boxes."""
    image = np.full((120, 200, 3), 230, np.uint8)
    for x0, y0, x1, y1 in drawn.tolist():
        centre, axes = ((x0 + x1) / 2, (y0 + y1) / 2), ((x1 - x0) / 2, (y1 - y0) / 2)
        cv2.ellipse(image, tuple(map(round, centre)), tuple(map(round, axes)), 0, 0, 360, (190, 150, 170), -1)
    write_image(tmp_path / "p.png", image)
    given = {"xyxy": np.zeros((0, 4), np.float32), "class_id": np.zeros(0, np.int64), **own}
    shapes = tuple(ShapePoint(x, y, "normal") for x, y in points or ())
    return Photograph(
        image_path=tmp_path / "p.png", name="p", source="chula", split="train", width_px=200, height_px=120,
        thumbnail=np.zeros((32, 32), np.float32), complete=points is None, points=shapes, **given,
    )  # fmt: skip


def test_points_decide_where_the_teacher_is_unsure(tmp_path: Path) -> None:
    """The second box has a low score, and a point; the third a low score, and none."""
    field = discs(tmp_path, BOXES, points=[(90, 30)])
    boxes = complete.complete(field, Teacher(BOXES, [0.9, 0.12, 0.12], [0, 2, 0]), 40.0)  # type: ignore[arg-type]
    # A platelet of 0.12 is none: the point gets the outline of its spot.
    assert [(b.origin, b.class_id) for b in boxes] == [("found", CellClass.RBC), ("spot", CellClass.RBC)]
    boxes = complete.complete(field, Teacher(BOXES, [0.9, 0.4, 0.12], [0, 2, 0]), 40.0)  # type: ignore[arg-type]
    # An expert says that it is a red cell.
    assert [(b.origin, b.class_id) for b in boxes] == [("found", CellClass.RBC), ("pointed", CellClass.RBC)]
    assert boxes[1].xyxy == (70, 10, 110, 50)


def test_a_point_that_nothing_holds_gets_the_outline_of_its_spot_or_a_disc(tmp_path: Path) -> None:
    field = discs(tmp_path, BOXES, points=[(90, 30), (150, 30), (100, 90)])
    boxes = complete.complete(field, Teacher(BOXES[:1], [0.9], [0]), 40.0)  # type: ignore[arg-type]
    assert [b.origin for b in boxes] == ["found", "spot", "spot", "disc"]
    for box, drawn in zip(boxes[1:3], BOXES[1:], strict=True):
        np.testing.assert_allclose(box.xyxy, drawn, atol=3)
    assert boxes[3].xyxy == (80, 70, 120, 110)


def test_empty_and_inked_boxes_are_left_out(tmp_path: Path) -> None:
    field = discs(tmp_path, BOXES[:2], points=[])
    image = field.read().copy()
    image[20:40, 20:40] = (255, 255, 0)  # a pointer on the first disc
    write_image(field.image_path, image)
    boxes = complete.complete(field, Teacher(BOXES, [0.9, 0.9, 0.9], [0, 0, 0]), 40.0)  # type: ignore[arg-type]
    assert [b.xyxy for b in boxes] == [(70, 10, 110, 50)]


def test_a_white_cell_has_a_nucleus(tmp_path: Path) -> None:
    field = discs(tmp_path, BOXES[:2], points=[])
    image = field.read().copy()
    image[25:38, 22:38] = (60, 20, 90)
    write_image(field.image_path, image)
    boxes = complete.complete(field, Teacher(BOXES[:2], [0.9, 0.9], [1, 1]), 40.0)  # type: ignore[arg-type]
    assert [b.class_id for b in boxes] == [CellClass.WBC, CellClass.RBC]
    unsure = complete.complete(field, Teacher(BOXES[:2], [0.5, 0.5], [1, 1]), 40.0)  # type: ignore[arg-type]
    assert [b.class_id for b in unsure] == [CellClass.RBC]  # dirt may look like a nucleus


def test_an_annotators_boxes_stay_each_once_and_what_they_lack_is_added(tmp_path: Path) -> None:
    own = np.concatenate([BOXES[:1], BOXES[:1] + 1])
    field = discs(tmp_path, BOXES, points=None, xyxy=own, class_id=np.zeros(2, np.int64))
    boxes = complete.complete(field, Teacher(BOXES, [0.9, 0.9, 0.5], [0, 0, 0]), 40.0)  # type: ignore[arg-type]
    assert [(b.origin, b.xyxy[0]) for b in boxes] == [("labelled", 10), ("found", 70)]


def test_foreground_is_the_cells_with_their_pale_middles() -> None:
    drawn: DrawnField = photograph(3)
    mask = complete.foreground(preprocess.balance(drawn.image))
    inside = np.zeros(mask.shape, np.bool_)
    for (x0, y0, x1, y1), c in zip(np.round(drawn.xyxy).astype(int).tolist(), drawn.class_id, strict=True):
        inside[y0:y1, x0:x1] = True
        if c == CellClass.RBC and x0 > 2 and y0 > 2 and x1 < 190 and y1 < 158:
            assert mask[y0:y1, x0:x1].mean() > 0.6
            assert mask[(y0 + y1) // 2, (x0 + x1) // 2]
    assert mask[~inside].mean() < 0.05


def test_completed_photographs_teach_with_the_boxes_of_the_table(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the commands, with the bundle that ships: every drawn cell has a box."""
    add_chula(data)
    place = ("--data", data.folder)
    code, out, err = rbc_train(
        monkeypatch,
        capsys,
        "complete",
        *place,
        "--out",
        tmp_path / "c.csv",
        "--sheets",
        tmp_path / "s",
        "--threads",
        1,
    )
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "c.csv"))
    assert "completed-pointed.png" in err
    words = ("dataset", *place, "--out", tmp_path / "d", "--cell-diameter", 24, "--chula")
    assert rbc_train(monkeypatch, capsys, *words, "--completed", tmp_path / "c.csv")[0] == 0
    assert {p.stem for p in (tmp_path / "d/detector/images/train").iterdir()} >= {"chula-1", "chula-2", "t0"}
    taken = photographs_of(tmp_path / "d", data.folder)
    assert taken["chula-2"].complete and not taken["chula-4"].complete  # nothing that judges is touched
    drawn = data.drawn["chula-2"].xyxy
    found = iou(drawn, taken["chula-2"].xyxy).max(axis=1)
    assert (found > 0.5).mean() > 0.7
    # Made again without the table, the dataset is without it, too.
    assert rbc_train(monkeypatch, capsys, *words)[0] == 0
    assert not photographs_of(tmp_path / "d", data.folder)["chula-2"].complete


def test_a_table_comes_back_as_it_was_written(data: TinyData, tmp_path: Path) -> None:
    add_chula(data)
    fields = read_chula(data.folder / "chula").of("train")
    analyzer = SimpleNamespace(detector=Teacher(BOXES, [0.9] * 3, [0] * 3))
    seen: list[tuple[int, int]] = []
    counts = complete.write(fields, analyzer, tmp_path / "c.csv", lambda *n: seen.append(n))  # type: ignore[arg-type]
    assert seen == [(1, 2), (2, 2)]
    boxes = read_completed(tmp_path / "c.csv")
    assert sum(counts.values()) == sum(map(len, boxes.values()))
    made = completed_photographs([*fields, replace(fields[0], name="other")], boxes)
    assert [len(p.xyxy) for p in made[:2]] == [len(boxes[p.name]) for p in made[:2]]
    assert made[2].xyxy is fields[0].xyxy


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="rbc_train complete"):
        read_completed(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("name,x0,y0,x1,y1,kind,origin\na,1,2,3,4,cat,found\n")
    with pytest.raises(UsageError, match="not a table of completed boxes"):
        read_completed(tmp_path / "bad.csv")
    assert Box((0, 0, 1, 1), CellClass.RBC, "found").origin == "found"

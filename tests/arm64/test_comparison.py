"""Tests that the comparison of two processors' tables finds all differences, and only those."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, draw_slide
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision.bundle import Bundle
from tests.arm64.comparison import COLUMNS, compare, read

TOY = Path(__file__).parents[1] / "edge" / "toy_bundle"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `rbc-edge run --cells` for three drawn fields."""
    import cv2

    folder = tmp_path_factory.mktemp("comparison")
    (folder / "slide").mkdir()
    fields = draw_slide(
        np.random.default_rng(5), 3, width_px=320, height_px=256, cell_diameter_px=40.0, stain=CREAM
    )
    for i, field in enumerate(fields):
        cv2.imwrite(str(folder / "slide" / f"{i}.png"), field.image[..., ::-1])
    bundle = Bundle.open(TOY)
    recipe = AnalyzerRecipe.of(bundle, threads=1)
    count_once((folder / "slide",), CountOptions(folder / "out", recipe, views=ViewOptions(cells=True)))
    return folder / "out"


def changed(results: Path, to: Path, change: Callable[[list[dict[str, str]]], object], name: str) -> Path:
    """A copy of the results with one table changed."""
    for table in results.rglob("*.csv"):
        copy = to / table.relative_to(results)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with table.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        columns = list(rows[0])
        if str(table.relative_to(results)) == name:
            change(rows)
        with copy.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
    return to


def test_the_same_tables_do_not_differ(results: Path) -> None:
    ours = read(results)

    same = compare(ours, read(results))

    assert same.n_fields == 3
    assert same.ours == same.theirs
    assert sum(len(field.cells) for field in ours.values()) == sum(same.ours[i] for i in (0, 3, 4)) > 10
    assert (same.differences, same.worst, same.off("n_rbc")) == ((), 0, 0.0)
    assert (same.scale_error, same.box_error_px, same.det_error, same.overlap_error) == (0, 0, 0, 0)


def test_a_cell_that_is_gone_is_named(results: Path, tmp_path: Path) -> None:
    ours = read(results)
    name, field = next((n, f) for n, f in ours.items() if any(c.kind == "rbc" for c in f.cells))
    gone = next(i for i, c in enumerate(field.cells) if c.kind == "rbc")

    def drop(rows: list[dict[str, str]]) -> None:
        of_field = [row for row in rows if row["fov"] == name[1]]
        rows.remove(of_field[gone])

    compared = compare(ours, read(changed(results, tmp_path, drop, "cells/slide.csv")))

    (difference,) = compared.differences
    assert difference.name == "/".join(name)
    assert difference.only_one == (field.cells[gone],)
    over = field.cells[gone].det_score - 0.1
    assert compared.clearest(0.1, 1.0) == pytest.approx(over)
    assert compared.clearest(0.1, difference.crowded[0]) == 0
    assert compared.n_changes == 1


def test_counts_and_scale_are_compared(results: Path, tmp_path: Path) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        rows[1]["n_rbc"] = str(int(rows[1]["n_rbc"]) + 3)
        rows[2]["cell_diameter_px"] = str(float(rows[2]["cell_diameter_px"]) * 1.5)

    ours = read(results)
    compared = compare(ours, read(changed(results, tmp_path, change, "slide.csv")))

    assert compared.worst == 3
    assert compared.off("n_rbc") == pytest.approx(3 / compared.ours[COLUMNS.index("n_rbc")])
    assert compared.scale_error == pytest.approx(0.5, rel=1e-3)


def test_a_verdict_that_turns_and_scores_that_move_are_seen(results: Path, tmp_path: Path) -> None:
    def turn(rows: list[dict[str, str]]) -> None:
        row = next(row for row in rows if row["label"].startswith("rbc"))
        row["label"] = "rbc_single" if row["label"] == "rbc_overlapping" else "rbc_overlapping"
        row["det_score"] = str(float(row["det_score"]) - 0.25)
        row["x_min_px"] = str(float(row["x_min_px"]) + 2)

    compared = compare(read(results), read(changed(results, tmp_path, turn, "cells/slide.csv")))

    (difference,) = compared.differences
    assert len(difference.turned) == 1
    assert "same counts" in str(difference)
    assert math.isclose(compared.det_error, 0.25, abs_tol=1e-6)
    assert math.isclose(compared.det_shift * sum(compared.ours[i] for i in (0, 3, 4)), -0.25, abs_tol=1e-6)
    assert compared.n_changes == 1
    assert math.isclose(compared.box_error_px, 2, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("column", "value", "says"), [("sha256", "0", "same images"), ("status", "failed", "not counted")]
)
def test_tables_that_cannot_be_compared_are_refused(
    results: Path, tmp_path: Path, column: str, value: str, says: str
) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        rows[0][column] = value

    with pytest.raises(ValueError, match=says):
        compare(read(results), read(changed(results, tmp_path, change, "slide.csv")))


def test_what_a_lone_box_shares_with_another_is_its_iou(results: Path, tmp_path: Path) -> None:
    """A second box covers half of the first cell, so the iou is a half."""
    ours = read(results)
    (name, field) = next((n, f) for n, f in ours.items() if f.cells)
    x0, y0, x1, y1 = field.cells[0].xyxy

    def add(rows: list[dict[str, str]]) -> None:
        at = next(i for i, row in enumerate(rows) if row["fov"] == name[1])
        rows.insert(at, rows[at] | {"x_max_px": str((x0 + x1) / 2)})

    (difference,) = compare(ours, read(changed(results, tmp_path, add, "cells/slide.csv"))).differences

    assert difference.only_one[0].xyxy == pytest.approx((x0, y0, (x0 + x1) / 2, y1))
    assert difference.crowded[0] == pytest.approx(0.5)

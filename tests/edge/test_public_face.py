"""`import rbc_edge`: light, without side effects, and the same counts as the command line."""

import csv
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import rbc_edge
from conftest import WriteImage
from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.vision import preprocess
from rbc_edge.vision.analyzer import open_analyzer


def in_a_host_program(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_face_is_light() -> None:
    heavy = "cv2", "numpy", "PIL", "onnxruntime", "typer", "sqlite3"
    assert in_a_host_program(f"import rbc_edge, sys; print(set({heavy!r}) & set(sys.modules))") == "set()"
    code = "import sys, time; t = time.process_time(); import rbc_edge; print(time.process_time() - t)"
    assert min(float(in_a_host_program(code)) for _ in range(5)) < 0.030


def test_no_module_changes_the_host_program() -> None:
    out = in_a_host_program(
        "import importlib, os, pkgutil, signal, warnings\n"
        "import cv2, rbc_edge\n"
        "from PIL import Image\n"
        "def state():\n"
        "    signals = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\n"
        "    level = cv2.utils.logging.getLogLevel()\n"
        "    return Image.MAX_IMAGE_PIXELS, level, cv2.getNumThreads(), signals, dict(os.environ)\n"
        "before = state()\n"
        "names = [m.name for m in pkgutil.walk_packages(rbc_edge.__path__, 'rbc_edge.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'):\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except ModuleNotFoundError as error:\n"
        "            assert error.name.partition('.')[0] in ('starlette', 'uvicorn')\n"  # an extra
        "assert state() == before, (state(), before)\n"
        "print(len(names))\n"
    )
    assert int(out) > 30


def test_every_public_name_is_there_and_no_other() -> None:
    for name in rbc_edge.__all__:
        assert getattr(rbc_edge, name) is not None
    assert set(rbc_edge.__all__) == set(dir(rbc_edge))
    with pytest.raises(AttributeError, match="'rbc_edge' has no attribute 'nothing'"):
        _ = rbc_edge.nothing  # type: ignore[attr-defined]


@pytest.fixture
def photograph(tmp_path: Path, drawn_fields: tuple[DrawnField, ...], write_image: WriteImage) -> Path:
    """Cells of 100 px, as a JPEG: the station decodes it at a half."""
    drawn = max(drawn_fields, key=lambda field: field.counts.n_rbc)
    return write_image(tmp_path / "slides" / "slide-a" / "field.jpg", preprocess.rescale(drawn.image, 2.5))


@pytest.mark.parametrize("given", [{}, {"cell_diameter_px": 100.0}, {"um_per_px": 0.075}])
def test_one_image_has_the_counts_of_its_row(
    photograph: Path, tmp_path: Path, toy_bundle_path: Path, given: dict[str, float]
) -> None:
    counts = rbc_edge.count_image(photograph, bundle=toy_bundle_path, **given)  # type: ignore[arg-type]
    result = rbc_edge.count_folder(
        tmp_path / "slides",
        tmp_path / "out",
        bundle=toy_bundle_path,
        cells=True,
        **given,  # type: ignore[arg-type]
    )
    assert (result.n_images, result.n_counted, result.n_failed) == (1, 1, 0)
    (slide,) = result.slides
    assert (slide.slide_id, slide.counts) == ("slide-a", counts.counts)
    with (result.out / "slide-a.csv").open(encoding="utf-8") as table:
        (row,) = csv.DictReader(table)
    for column in ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets", "n_refused"):
        assert int(row[column]) == getattr(counts, column)
    assert row["scale_source"] == counts.scale.source
    assert float(row["cell_diameter_px"]) == pytest.approx(counts.scale.cell_diameter_px, abs=0.01)
    with (result.out / "cells" / "slide-a.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [r["label"] for r in rows] == [cell.label for cell in counts.cells]
    boxes = [[float(r[c]) for c in ("x_min_px", "y_min_px", "x_max_px", "y_max_px")] for r in rows]
    np.testing.assert_allclose(boxes, [cell.box for cell in counts.cells], atol=0.06)
    assert counts.n_rbc > 5
    again = rbc_edge.count_folder([photograph], tmp_path / "out2", bundle=toy_bundle_path)
    assert again.n_counted == 1
    assert rbc_edge.count_folder([photograph], tmp_path / "out2", bundle=toy_bundle_path).n_counted == 0
    assert again.notes == ()
    (photograph.parent / "scan.svs").touch()
    folder = tmp_path / "slides"
    notes = rbc_edge.count_folder(folder, tmp_path / "out2", bundle=toy_bundle_path, edges="inside").notes
    assert ["svs" in notes[0], *(note.startswith("settings differ") for note in notes[1:])] == [True, True]


def test_what_was_refused_stays_in_the_row(
    tmp_path: Path, toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...], write_image: WriteImage
) -> None:
    """Through the ledger, and through a second run that counts nothing."""
    image = np.vstack([drawn_fields[0].image, np.full((80, 320, 3), 225, np.uint8)])
    cv2.circle(image, (160, 300), 20, (150, 150, 150), -1)  # dust
    file = write_image(tmp_path / "slides" / "s" / "a.png", image)
    rows = []
    for n_counted in (1, 0):
        result = rbc_edge.count_folder(
            [file], tmp_path / "out", bundle=toy_bundle_path, cell_diameter_px=40.0
        )
        assert result.n_counted == n_counted
        rows.append((tmp_path / "out" / "s.csv").read_bytes())
    assert rows[0] == rows[1]
    (row,) = csv.DictReader(rows[0].decode().splitlines())
    assert row["n_refused"] == "1"
    counts = rbc_edge.count_image(file, bundle=toy_bundle_path, cell_diameter_px=40.0)
    assert (counts.n_refused, counts.n_rbc) == (1, int(row["n_rbc"]))


def test_an_array_is_counted_like_its_file(
    tmp_path: Path, toy_bundle_path: Path, drawn_fields: tuple[DrawnField, ...], write_image: WriteImage
) -> None:
    image = drawn_fields[0].image
    file = write_image(tmp_path / "a.png", image)
    one, two = (rbc_edge.count_image(i, bundle=toy_bundle_path, threads=1) for i in (image, str(file)))
    assert list(one.cells) == list(two.cells)
    assert one.scale == two.scale
    opened = rbc_edge.Analyzer(rbc_edge.Bundle.open(toy_bundle_path), threads=1)
    three = opened.count_image(image, scale=one.scale)
    assert list(three.cells) == list(one.cells)


def test_the_networks_are_opened_once(toy_bundle_path: Path) -> None:
    assert open_analyzer(toy_bundle_path, threads=1) is open_analyzer(str(toy_bundle_path), threads=1)
    assert open_analyzer(rbc_edge.Bundle.open(toy_bundle_path), threads=1) is open_analyzer(
        toy_bundle_path, threads=1
    )
    assert open_analyzer(toy_bundle_path, threads=2) is not open_analyzer(toy_bundle_path, threads=1)


def test_an_image_without_cells_has_none(toy_bundle_path: Path) -> None:
    counts = rbc_edge.count_image(np.full((120, 160, 3), 215, np.uint8), bundle=toy_bundle_path)
    assert (counts.n_rbc, list(counts.cells), counts.flags) == (0, [], ("no-red-cells",))


def test_what_cannot_be_counted_says_why(tmp_path: Path, toy_bundle_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(rbc_edge.ImageError) as caught:
        rbc_edge.count_image(tmp_path / "text.jpg", bundle=toy_bundle_path)
    assert caught.value.reason == "not-an-image"
    with pytest.raises(rbc_edge.ImageError) as caught:
        rbc_edge.count_image(tmp_path / "gone.jpg", bundle=toy_bundle_path)
    assert caught.value.reason == "vanished"
    with pytest.raises(rbc_edge.ImageError) as caught:
        rbc_edge.count_image(np.zeros((15, 200, 3), np.uint8), bundle=toy_bundle_path)
    assert caught.value.reason == "too-small"
    drawn = draw_field(
        np.random.default_rng(1), width_px=320, height_px=256, cell_diameter_px=40.0, stain=CREAM
    )
    with pytest.raises(ValueError, match="pixels: shape"):
        rbc_edge.count_image(drawn.image[:, :, 0], bundle=toy_bundle_path)
    with pytest.raises(ValueError, match="pixels: dtype"):
        rbc_edge.count_image(drawn.image / 255.0, bundle=toy_bundle_path)  # type: ignore[arg-type]
    with pytest.raises(rbc_edge.BundleError):
        rbc_edge.count_image(drawn.image, bundle=tmp_path)
    with pytest.raises(rbc_edge.UsageError, match="in two ways"):
        rbc_edge.count_image(drawn.image, cell_diameter_px=40.0, um_per_px=0.1)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(rbc_edge.UsageError, match="not a positive number"):
            rbc_edge.count_image(drawn.image, cell_diameter_px=wrong)
    with pytest.raises(rbc_edge.UsageError, match="edges 'some' is unknown"):
        rbc_edge.count_folder(tmp_path, tmp_path / "out", edges="some")
    with pytest.raises(rbc_edge.UnavailableError):
        rbc_edge.count_folder(tmp_path / "nothing", tmp_path / "out", bundle=toy_bundle_path)

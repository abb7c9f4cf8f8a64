"""docs/python-api.md and the notebook: every example runs, every public name is explained."""

import csv
import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest

import rbc_edge
from rbc_edge.ops.synthetic import draw_slide
from rbc_edge.values import Cell

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "python-api.md"
NOTEBOOK = REPOSITORY / "examples" / "count_a_slide.ipynb"


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name: two drawn slides, one of their images, and a text."""
    for number in (1, 2):
        folder = tmp_path / "slides" / f"slide-{number}"
        folder.mkdir(parents=True)
        drawn = draw_slide(
            np.random.default_rng(number), 2, width_px=640, height_px=480, cell_diameter_px=80.0, crowding=0.3
        )
        for i, field in enumerate(drawn):
            _, data = cv2.imencode(".jpg", field.image[:, :, ::-1])
            (folder / f"field-{i}.jpg").write_bytes(data.tobytes())
    (tmp_path / "field.jpg").write_bytes(data.tobytes())
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run_in_their_order(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    assert len(examples()) >= 6
    said = []
    for i, code in enumerate(examples()):
        exec(compile(code, f"{PAGE.name}, example {i + 1}", "exec"), names)
        said.append(capsys.readouterr().out)
    assert all(said)
    assert said[-1].startswith("not-an-image - notes.txt")
    with (workplace / "results" / "slides.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [row["slide_id"] for row in rows] == ["slide-1", "slide-2"]
    assert all(int(row["n_rbc"]) > 0 for row in rows)


def test_every_public_name_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in rbc_edge.__all__:
        assert re.search(rf"`(rbc_edge\.)?{name}[`(]", text), name
    for one in (Cell, rbc_edge.FovResult, rbc_edge.FolderResult, rbc_edge.Counts):
        for field in fields(one):
            assert f"`{field.name}`" in text, f"{one.__name__}.{field.name}"
    for label in (*rbc_edge.Label, *rbc_edge.ScaleSource):
        assert f"`{label}`" in text, label


def code_cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("pandas", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the notebook needs {module}, which is not installed")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for i, code in enumerate(code_cells()):
        exec(compile(code, f"{NOTEBOOK.name}, cell {i + 1}", "exec"), names)
    said = capsys.readouterr().out
    assert "red cells" in said
    assert (tmp_path / "results" / "slides.csv").exists()


def test_the_notebook_is_kept_without_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(cell["outputs"] == [] for cell in content["cells"] if cell["cell_type"] == "code")
    assert NOTEBOOK.stat().st_size < 20_000

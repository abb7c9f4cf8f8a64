"""Figures: each is drawn from what was examined, fits a page, and says what its axes are."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_evaluate import examined, lattice

from rbc_edge.errors import UnavailableError
from rbc_train import charts
from rbc_train.evaluate import Examined

THRESHOLDS = (0.25, 0.25, 0.25)


def some() -> list[Examined]:
    """Twelve photographs of two cameras with verdicts of every kind."""
    rng = np.random.default_rng(0)
    entries = []
    for i in range(12):
        truth = lattice(10 + i)
        truth[1 : i + 1 : 2] = truth[0:i:2][: len(truth[1 : i + 1 : 2])] + 5
        label = [bool(b) for b in rng.uniform(size=8) < 0.5]
        score = np.clip(rng.normal(0.3, 0.25, 8) + 0.4 * np.array(label), 0, 1).tolist()
        entries.append(
            examined(
                truth,
                truth[: 8 + i],
                rng.uniform(0.2, 0.9, 8 + i).tolist(),
                source="pbc" if i % 2 else "bcd",
                overlapping=label,
                found_score=score,
            )
        )
    return entries


def test_every_figure_is_drawn_small_and_the_same_again(tmp_path: Path) -> None:
    pictures = charts.draw_all(some(), THRESHOLDS, 0.5, tmp_path / "a" / "results")
    assert [p.file for p in pictures] == [
        f"metrics-{n}.png"
        for n in ("counts", "crowding", "precision", "confusion", "roc", "confidence", "reliability")
    ]
    for picture in pictures:
        data = (tmp_path / "a" / "results" / picture.file).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 3_000 < len(data) < 60_000
        assert picture.caption
    charts.draw_all(some(), THRESHOLDS, 0.5, tmp_path / "b")
    for picture in pictures:
        first = (tmp_path / "a" / "results" / picture.file).read_bytes()
        assert (tmp_path / "b" / picture.file).read_bytes() == first


def test_the_axes_say_what_they_are_and_hold_the_figures() -> None:
    entries = some()
    figure = Figure()
    FigureCanvasAgg(figure)
    counts, confusion, curve, reliable = figure.subplots(1, 4)
    charts.counts(counts, entries)
    charts.confusion(confusion, entries, 0.5)
    charts.roc(curve, entries, 0.5)
    charts.reliability(reliable, entries)
    for axes in (counts, confusion, curve, reliable):
        assert axes.get_xlabel() and axes.get_ylabel()
    assert [t.get_text() for t in counts.get_legend().get_texts()] == ["bcd", "pbc"]
    assert any("bias" in t.get_text() for t in counts.texts)
    cells = [int(t.get_text().split()[0]) for t in confusion.texts]
    label = np.concatenate([e.overlapping for e in entries])
    called = np.concatenate([e.found_score for e in entries]) >= 0.5
    expected = [int(((label == a) & (called == b)).sum()) for a in (False, True) for b in (False, True)]
    assert cells == expected and all(expected)
    assert [t.get_text()[:3] for t in curve.get_legend().get_texts()] == ["all", "bcd", "pbc"]
    assert sum(int(t.get_text()) for t in reliable.texts) == len(label)


@pytest.mark.parametrize("n", [0, 3])
def test_photographs_without_verdicts_or_cells_are_no_reason_to_fail(tmp_path: Path, n: int) -> None:
    entries = [examined(lattice(n), lattice(n), [0.9] * n)] * 2
    assert len(charts.draw_all(entries, THRESHOLDS, 0.5, tmp_path)) == 7


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="--out"):
        charts.draw_all(some(), THRESHOLDS, 0.5, tmp_path / "file" / "results")

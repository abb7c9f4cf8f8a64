"""Coverage: intervals of drawn slides hold the truth as often as they say, and forecasts come true."""

from pathlib import Path

import numpy as np
import pytest
from command import called
from tiny_data import TinyData

from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train import results
from rbc_train.data import read_public
from studies import coverage
from studies.coverage import Fields

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"


def source(alike: float, *, n: int = 400, seed: int = 0) -> Fields:
    """Fields of about 20 cells, 40 % overlapping, that resemble each other by `alike` within a field."""
    rng = np.random.default_rng(seed)
    n_rbc = rng.integers(12, 28, n)
    strength = 1 / alike - 1  # of the beta distribution with this intraclass correlation
    own = rng.beta(0.4 * strength, 0.6 * strength, n)
    return Fields("drawn", rng.binomial(n_rbc, own), n_rbc)


@pytest.mark.parametrize("alike", [0.02, 0.15, 0.4])
def test_likeness_is_found_again(alike: float) -> None:
    assert coverage.likeness(source(alike, n=4000)) == pytest.approx(alike, abs=0.02)


def test_slides_hold_the_truth_where_independent_cells_would_not() -> None:
    covered = list(coverage.cover(source(0.15), draws=400))
    assert [c.n_fields for c in covered] == list(coverage.N_FIELDS)
    assert all(c.held > 0.91 for c in covered)
    assert all(c.held_if_independent < 0.85 for c in covered)
    widths = [c.half_width for c in covered[1:]]
    assert widths == sorted(widths, reverse=True)


def test_a_forecast_from_many_fields_comes_true() -> None:
    asked = list(coverage.forecast(source(0.1), draws=30))
    assert [f.n_fields for f in asked] == [n for n in coverage.N_FIELDS if n >= 3]
    low, middle, high = asked[-1].half_width
    assert low <= middle <= high
    assert middle == pytest.approx(0.02, abs=0.002)
    assert asked[-1].needed == pytest.approx(asked[-2].needed, rel=0.3)


def test_the_station_counts_the_fields(data: TinyData) -> None:
    photographs = read_public(data.folder)[0].of("train", "val")
    done: list[int] = []
    (fields,) = coverage.count_fields(Analyzer(Bundle.open(TOY), threads=1), photographs, done.append)
    assert (fields.source, len(fields.n_rbc), sum(done)) == ("pbc", len(photographs), len(photographs))
    assert 0 < fields.fraction < 1
    assert (fields.n_overlapping <= fields.n_rbc).all()


def test_the_command_publishes(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coverage, "DRAWS", 20)
    monkeypatch.setattr(coverage, "FORECAST_DRAWS", 5)
    out = tmp_path / "docs" / "results"
    code, said, _ = called(
        coverage.app,
        monkeypatch,
        capsys,
        "--data",
        data.folder,
        "--bundle",
        TOY,
        "--out",
        out,
        "--threads",
        1,
    )
    assert code == 0
    assert "if independent" in said
    assert set(results.read_section("coverage", out)["coverage"]) == {"pbc"}
    assert "contains the true value" in (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")

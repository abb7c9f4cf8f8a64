"""Wrong fields: other stains look as they say, signs are weighed against the errors of the counts."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import called
from tiny_data import TinyData, add_chula, photograph

from rbc_edge.vision import quality
from rbc_train import results
from studies import wrong_fields
from studies.wrong_fields import Judged, Sign

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"
MISSED = Sign("missed", "count", "missed-cells")
RIGHT = Judged("a", "as it is", False, False, (), {"missed": 0.0, "confidence": 0.9})


def test_another_stain_changes_cells_and_not_glass() -> None:
    image = photograph(3).image
    glass = np.percentile(image.reshape(-1, 3), 95, axis=0)
    same = wrong_fields.restained(image, wrong_fields.STAINS["as it is"])
    assert np.abs(same.astype(int) - np.minimum(image, glass * math.exp(0.2)).astype(int)).max() <= 1
    for name, stain in wrong_fields.STAINS.items():
        other = wrong_fields.restained(image, stain)
        np.testing.assert_allclose(np.percentile(other.reshape(-1, 3), 95, axis=0), glass, atol=4)
        assert (name == "as it is") == np.array_equal(other, same)
    deep = wrong_fields.restained(image, wrong_fields.STAINS["deep"])
    assert deep.mean() < image.mean() - 5


def test_a_sign_is_weighed_by_its_own_error() -> None:
    bound = next(r.bound for r in quality.RULES if r.flag == "missed-cells")
    fields = [replace(RIGHT, signs={"missed": 0.1 * bound * i}) for i in range(10)]
    fields += [replace(RIGHT, wrong_count=True, signs={"missed": bound * (0.95 + 0.1 * i)}) for i in range(4)]
    fields += [replace(RIGHT, wrong_share=True, signs={"missed": 9.0})]
    weighed = wrong_fields.weigh(MISSED, fields)
    assert weighed == {"auc": 1.0, "wrong": 4, "hit": 0.75, "false": 0.0}
    assert wrong_fields.weigh(Sign("missed", "share"), fields)["wrong"] == 1
    assert math.isnan(wrong_fields.weigh(MISSED, fields[:10])["auc"])


def test_the_suggested_bound_spares_every_laboratory() -> None:
    fields = [replace(RIGHT, signs={"missed": 0.001 * i}) for i in range(101)]
    fields += [replace(f, laboratory="b", signs={"missed": 0.5 * f.signs["missed"]}) for f in fields]
    fields += [replace(RIGHT, wrong_count=True, signs={"missed": 1.0})]
    assert wrong_fields.suggest(MISSED, fields) == pytest.approx(0.098)
    low = [replace(f, signs={"confidence": 1 - f.signs["missed"]}) for f in fields]
    assert wrong_fields.suggest(Sign("confidence", "count", above=False), low) == pytest.approx(0.902)


def test_the_command_publishes_what_the_page_shows(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_chula(data)
    stains = {name: wrong_fields.STAINS[name] for name in ("as it is", "deep")}
    monkeypatch.setattr(wrong_fields, "STAINS", stains)
    out = tmp_path / "docs" / "results"
    code, said, _ = called(
        wrong_fields.app, monkeypatch, capsys, "--data", data.folder, "--bundle", TOY, "--out", out,
        "--threads", 1, "--every", 1,
    )  # fmt: skip
    assert code == 0
    assert "chula, as it is" in said and "chula, other stains" in said
    published = results.read_section("wrong-fields", out)
    assert published["stains"] == ["deep"]
    assert set(published["alarms"]) == set(published["signs"]["missed"])
    assert published["fields"] % len(stains) == 0 and published["fields"] >= 4
    assert "Do the flags stand on wrong fields?" in (tmp_path / "docs" / "quality.md").read_text("utf-8")

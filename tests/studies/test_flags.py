"""Defects: drawn as they say, weighed against photographs as they are, bounds chosen where harm begins."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import called
from tiny_data import TinyData, photograph

from rbc_edge.errors import UnavailableError
from rbc_edge.vision import quality
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.quality import Features, Rule
from rbc_train import results
from rbc_train.data import read_public
from studies import flags, wrong_fields
from studies.flags import Defect, DefectTrial, Looked

TOY = Path(__file__).resolve().parents[1] / "edge" / "toy_bundle"
FINE = Features(210.0, 0.0, 0.3, 0.09, 0.1, 0.45, 88.0, 0.8, 0.44, 0.1, 0, 0, 0.01, 0, 0, 0.1)
BLUR = Rule("blurred", "edge_width", True, 0.15)


def looked(
    edge_width: float, *, source: str = "a", n_true: int = 20, n_rbc: int = 20, overlap: float = 0.5
) -> Looked:
    features = replace(FINE, edge_width=edge_width)
    return Looked(source, n_true, n_true, n_rbc, 0.5, overlap, features, quality.flags(features))


def blurs(*fields: Looked) -> DefectTrial:
    return DefectTrial(Defect("blurred", "edge_width", "k", "s", lambda image, _, __: image), fields)


def test_every_defect_changes_the_picture_and_keeps_its_form() -> None:
    image = photograph(3).image
    for defect in flags.DEFECTS:
        one, two = (defect.draw(image.copy(), 40.0, np.random.default_rng(5)) for _ in range(2))
        assert one.dtype == np.uint8 and one.ndim == 3
        np.testing.assert_array_equal(one, two)
        if defect.stack == 1:
            assert one.shape != image.shape if defect.rescales else one.shape == image.shape
            assert not np.array_equal(one, image)
    judged = {(d.flag, d.feature) for d in flags.DEFECTS} | {(s.flag, s.feature) for s in wrong_fields.SIGNS}
    assert {(r.flag, r.feature) for r in quality.RULES} <= judged


def test_a_defect_s_sign_gets_worse_with_its_strength() -> None:
    """Those that need no cells to be measured."""
    image = photograph(3).image
    levels = [
        float(np.percentile(d.draw(image, 40.0, np.random.default_rng(0)), 95))
        for d in flags.DEFECTS
        if d.flag == "dark"
    ]
    assert levels == sorted(levels, reverse=True) and levels[0] > 4 * levels[-1]
    spread = [
        float(d.draw(image, 40.0, np.random.default_rng(0)).std()) for d in flags.DEFECTS if d.flag == "faint"
    ]
    assert spread == sorted(spread, reverse=True)


@pytest.mark.parametrize("kind", flags.NOT_SMEARS)
def test_what_is_no_smear_can_be_drawn(kind: str) -> None:
    picture = flags.not_smears(kind, np.random.default_rng(0), width=160, height=120)
    assert picture.shape == (120, 160, 3) and picture.dtype == np.uint8
    assert picture.std() > 3


def test_a_picture_of_no_kind_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="one of text, gradient"):
        flags.not_smears("cats", np.random.default_rng(0))


def test_a_field_is_harmed_when_its_reader_is_misled() -> None:
    assert not looked(0.1, n_true=20, n_rbc=22).harmed
    assert looked(0.1, n_true=20, n_rbc=16).harmed
    assert looked(0.1, n_true=20, n_rbc=24).harmed
    assert looked(0.1, overlap=0.7).harmed
    assert not looked(0.1, n_true=0, n_rbc=0, overlap=math.nan).harmed
    assert looked(0.1, n_true=0, n_rbc=1, overlap=math.nan).harmed


def test_a_rule_is_weighed_against_photographs_as_they_are_and_harmless_defects() -> None:
    plain = DefectTrial(flags.PLAIN, tuple(looked(0.05 + 0.001 * i, source="ab"[i % 2]) for i in range(100)))
    weak = blurs(*(looked(0.16 + 0.001 * i) for i in range(10)))
    strong = blurs(*(looked(0.18 + 0.01 * i, n_rbc=5) for i in range(10)))
    worth = flags.weigh(BLUR, [plain, weak, strong])
    assert (worth.n_harmed, worth.hit, worth.auc) == (10, 1.0, 1.0)
    assert worth.spared == 0.0  # the shipped bound marks blur that does no harm
    assert 0.169 < worth.best < 0.18  # that one would not
    assert worth.false_alarms == {"a": 0.0, "b": 0.0}


def test_a_bound_never_costs_more_false_alarms_than_allowed() -> None:
    # Telling harm best would take a bound at 0.1, but a tenth of source b lies beyond that.
    plain = [looked(0.05, source="a") for _ in range(90)]
    plain += [looked(0.05, source="b") for _ in range(45)] + [looked(0.2, source="b") for _ in range(5)]
    harmed = blurs(*(looked(w, n_rbc=3) for w in np.linspace(0.12, 0.3, 40)))
    worth = flags.weigh(BLUR, [DefectTrial(flags.PLAIN, tuple(plain)), harmed])
    assert worth.best >= 0.2
    assert worth.false_alarms == {"a": 0.0, "b": pytest.approx(0.1)}
    below = Rule("blurred", "edge_width", False, 0.15)
    assert math.isnan(flags.weigh(below, [DefectTrial(flags.PLAIN, tuple(plain))]).best)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind of trial one or two: the toy is asked for the scale of every strange picture."""
    darker = tuple(d for d in flags.DEFECTS if d.flag in ("dark", "crowded"))
    monkeypatch.setattr(flags, "DEFECTS", darker)
    monkeypatch.setattr(flags, "NOT_SMEARS", ("gradient",))
    monkeypatch.setattr(flags, "_NOT_SMEARS_EACH", 1)


@pytest.mark.usefixtures("few")
def test_the_station_is_tried_as_it_is(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = read_public(data.folder)[0].of("val")
    analyzer, work = Analyzer(Bundle.open(TOY), threads=1), tmp_path / "work"
    trials = list(flags.try_defects(analyzer, photographs, every=2, work=work))
    assert len(trials) == flags.n_trials()
    plain = trials[0].fields
    assert len(plain) == 2 and not any(f.harmed for f in plain)
    assert sum(f.n_rbc for f in plain) > 5
    assert all(len(t.fields) <= 1 for t in trials[1:] if t.defect.kind != "no smear")
    dark = [t for t in trials if t.defect.flag == "dark"]
    assert [t.fields[0].features.bright_level for t in dark] == sorted(
        (t.fields[0].features.bright_level for t in dark), reverse=True
    )
    assert "dark" in dark[-1].fields[0].flags
    monkeypatch.delattr(Analyzer, "analyze")
    again = list(flags.try_defects(analyzer, photographs, every=2, work=work))
    assert str(again) == str(trials)  # from the folder; str, because NaN is not itself
    with pytest.raises(UnavailableError, match=r"one in 2 .* not of .* one in 3 "):
        next(flags.try_defects(analyzer, photographs, every=3, work=work))
    figure, chart = flags.draw_rocs(trials, "quality-roc.png")
    section = flags.section(trials, chart, bundle_id="id", every=2)
    assert section.command == "python -m studies.flags --every 2"
    assert len(section.tables[2].rows) == len(trials)
    assert [row[0] for row in section.tables[1].rows] == [*quality.FLAGS, "any"]
    assert figure.axes


@pytest.mark.usefixtures("few")
def test_the_command_publishes_what_the_page_shows(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "docs" / "results"
    code, said, _ = called(
        flags.app, monkeypatch, capsys, "--data", data.folder, "--bundle", TOY, "--out", out, "--threads", 1,
        "--work", tmp_path / "work",
    )  # fmt: skip
    assert code == 0
    assert "unchanged" in said and "gradient" in said
    assert len(results.read_section("quality", out)["weighed"]) == len(flags.RULES)
    page = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    for flag, meaning in quality.FLAGS.items():
        assert f"`{flag}`" in page and meaning in page

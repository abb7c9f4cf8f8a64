"""The scorecard: targets are reckoned, never typed, and what was not measured is said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import examined, lattice

from rbc_train import evaluate, results, scorecard
from rbc_train.results import Section
from rbc_train.scorecard import Runs, Target

BUNDLE = "0123456789abcdef"


def scored(*, found: int = 20, right: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and intervals of four photographs of twenty red cells each."""
    truth = lattice(20)
    score = [0.9, 0.8, 0.1, 0.2] if right else [0.2, 0.8, 0.1, 0.9]
    one = examined(
        truth,
        truth[:found],
        [0.9] * found,
        overlapping=[True, True, False, False],
        found_score=score,
        letter="OTSS",
    )
    two = examined(
        truth, truth, [0.9] * 20, source="bcd", overlapping=[True, False], found_score=[0.9, 0.1], letter="MS"
    )
    entries = [one, two] * 2
    return evaluate.score(entries, 0.5), evaluate.intervals(entries, 0.5, draws=40)


def by_name(lines: list[Target]) -> dict[str, Target]:
    return {t.name: t for t in lines}


def publish(folder: Path, name: str, **data: Any) -> None:
    results.store(Section(name, "do", data={"bundle_id": BUNDLE, **data}), folder)


def test_a_perfect_bundle_reaches_what_was_measured(tmp_path: Path) -> None:
    runs = [
        Runs("now", {"rbc_ap50_95": 0.83, "rbc_counted": 1002}, {"rbc_ap50_95": 0.832, "rbc_counted": 1000})
    ]
    found = by_name(scorecard.targets(*scored(), runs, BUNDLE, tmp_path))
    measured = {n: t.reached for n, t in found.items() if t.reached is not None}
    assert set(measured.values()) == {True}
    assert {"RBC AP50", "count, total", "overlap AUC", "int8 less fp32, RBC AP50-95"} <= set(measured)
    assert found["int8 against fp32, count"].shown == "+0.20 % (now)"
    assert found["WBC AP50"].reached is None  # no photograph shows one
    assert found["WBC AP50"].shown == "not run"


def test_a_bundle_that_misses_cells_and_errs_does_not(tmp_path: Path) -> None:
    found = by_name(scorecard.targets(*scored(found=18, right=False), [], BUNDLE, tmp_path))
    assert found["count, total"].reached is False
    assert found["count, total"].ours == pytest.approx(-0.05)
    assert found["overlap accuracy"].reached is False
    assert found["overlap accuracy, worst source"].shown == "0.5000 (pbc)"
    assert found["RBC AP50"].reached is False
    assert found["int8 against fp32, count"].reached is None
    text = scorecard.targets_text(list(found.values())).splitlines()
    assert len(text) == len(found) + 1
    assert text[0].split() == ["target", "goal", "ours", "reached"]
    assert next(line for line in text if line.startswith("count, total")).endswith("no")


def test_what_other_commands_measured_counts_for_their_bundle_only(tmp_path: Path) -> None:
    figures, between = scored()
    names = (
        "count change, scale 0.3 to 2.5 unknown",
        "count change, mosaics of 20 megapixels, scale unknown",
        "count change, other light, colour, JPEG quality 50, slight blur",
    )
    found = by_name(scorecard.targets(figures, between, [], BUNDLE, tmp_path))
    assert [found[n].reached for n in names] == [None] * 3
    publish(
        tmp_path,
        "scale",
        changes={"0.3": -0.01, "2.5": 0.005},
        mosaic_changes={"bccd": math.nan, "pbc": -0.03},
    )
    publish(tmp_path, "corruptions", changes={"red cast": 0.019, "slight blur": -0.0199})
    found = by_name(scorecard.targets(figures, between, [], BUNDLE, tmp_path))
    assert [found[n].reached for n in names] == [True, False, True]
    assert found[names[0]].shown == "-1.00 % (0.3)"
    assert found[names[2]].shown == "-1.99 % (slight blur)"
    other = by_name(scorecard.targets(figures, between, [], "another", tmp_path))
    assert [other[n].reached for n in names] == [None] * 3


def test_the_export_s_figures_are_found_or_not() -> None:
    own = {k: 0.5 for _, k in scorecard._PARITY}
    runs = scorecard.at_export({"int8": {"all": own}, "fp32": {"all": own | {"wbc_ap50": None}}})
    assert runs is not None and runs.int8["rbc_ap50"] == 0.5
    assert math.isnan(runs.fp32["wbc_ap50"])
    assert scorecard.at_export({}) is None


@pytest.mark.parametrize("scale", ["estimated", "labelled"])
def test_the_section_holds_every_table_and_can_be_published(tmp_path: Path, scale: str) -> None:
    figures, between = scored()
    own = {k: 0.5 for _, k in scorecard._PARITY}
    runs = [Runs("at export", own, own | {"wbc_ap50": math.nan})]
    lines = scorecard.targets(figures, between, runs, BUNDLE, tmp_path)
    section = scorecard.section(
        figures,
        between,
        lines,
        runs,
        (),
        bundle_id=BUNDLE,
        scale=scale,
        thresholds={"rbc": 0.4, "overlap": 0.5},
    )
    assert section.command.endswith("evaluate" if scale == "estimated" else "evaluate --scale labelled")
    page = results.publish(section, tmp_path / "results").read_text(encoding="utf-8")
    assert BUNDLE in page
    assert "nan" not in page
    assert len(section.tables) == 8
    rows = {t.caption[:10]: t.rows for t in section.tables}
    assert [r[0] for r in rows["Main figur"]] == ["all", "bcd", "pbc"]
    assert len(rows["Detections"]) == 9
    assert rows["Share of c"][1][1] == "1.000 (2)"
    data = json.loads((tmp_path / "results" / "metrics.json").read_text())["data"]
    assert data["figures"]["all"]["rbc_labelled"] == 80
    assert data["targets"][0]["reached"] is True
    assert results.read_section("metrics", tmp_path / "results")["bundle_id"] == BUNDLE

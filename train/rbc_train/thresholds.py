"""The thresholds of a bundle, chosen on validation photographs: at the export, and again later."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from rbc_edge.values import Float32
from rbc_edge.vision import bundle, image_file, preprocess, selftest
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import TEST_EXPECTED, TEST_INPUT, Bundle, Manifest
from rbc_train import evaluate, laboratories, results, shapes
from rbc_train.data import Photograph, verified_labels

DRAFT_SCORE: Final = 0.25
"""Score threshold of each class before one is chosen. A draft refuses nothing."""


def draft(manifest: Manifest) -> Manifest:
    """Returns a manifest without thresholds: what they are chosen with."""
    scores = (DRAFT_SCORE,) * len(manifest.score_threshold)
    return replace(manifest, score_threshold=scores, overlap_threshold=0.5, refuse_threshold=1.0)


def choose(
    analyzer: Analyzer,
    examined: Sequence[evaluate.Examined],
    pointed: Sequence[Photograph],
    manifest: Manifest,
) -> Manifest:
    """Chooses all thresholds.

    What is refused would not be seen by a draft. So the score thresholds come first, and what is refused then
    comes on top.

    Args:
        analyzer: Of the draft.
        examined: Validation photographs, seen by it.
        pointed: Validation photographs with points of shapes. Without any, the bound of shapes stays.
        manifest: Of the draft.

    Returns:
        The manifest with thresholds.
    """
    scored = replace(
        manifest,
        score_threshold=evaluate.score_thresholds(examined),
        overlap_threshold=evaluate.best_overlap_threshold(examined),
    )
    margin = analyzer.classifier.margin

    def judge(e: evaluate.Examined, boxes: Float32) -> Float32:
        view = e.photograph.view(e.result.scale.cell_diameter_px)
        return analyzer.classifier.scores(preprocess.cell_crops(view, boxes, margin=margin)).refuse

    refusal = evaluate.refuse_threshold(*evaluate.refuse_scores(examined, judge, scored.sure_score))
    chosen = replace(scored, refuse_threshold=refusal.threshold)
    if not pointed:
        return chosen
    files = analyzer.bundle.manifest.files
    judged = Analyzer(Bundle(analyzer.bundle.path, replace(chosen, files=files)))
    return replace(chosen, shape_threshold=shapes.threshold(shapes.look(judged, pointed)))


def again(
    opened: Bundle, photographs: Sequence[Photograph], out: Path, say: Callable[[str], None], threads: int = 0
) -> Bundle:
    """Chooses the thresholds of a finished bundle again, and writes it with them. The networks stay.

    Args:
        opened: The bundle.
        photographs: Validation photographs, complete or with points of shapes. Those of laboratories that did
            not teach the bundle are not used: they may judge it later.
        out: Folder of the new bundle. May be that of the old one.
        say: Called with a line for each step.
        threads: Of the networks.

    Returns:
        The new bundle. Its manifest says that the thresholds are younger than the export, and has figures of
        the int8 networks with them in ``metrics["again"]``. Those of the export stay.

    Raises:
        BundleError: If the networks cannot be loaded.
    """
    old = opened.manifest
    learned = laboratories.learned_from(old.training)
    known = [p for p in photographs if learned is None or p.laboratory in learned]
    used, pointed = [p for p in known if p.complete], [p for p in known if p.points]
    verified, bare = verified_labels(used), draft(old)
    analyzer = Analyzer(Bundle(opened.path, bare), threads=threads)
    chosen = choose(analyzer, evaluate.examine(analyzer, used, verified, scale="labelled"), pointed, bare)
    say(f"scores {old.score_threshold} -> {chosen.score_threshold}")
    say(f"overlap {old.overlap_threshold} -> {chosen.overlap_threshold}")
    say(f"refuse {old.refuse_threshold} -> {chosen.refuse_threshold}")
    say(f"shape {old.shape_threshold} -> {chosen.shape_threshold}")
    analyzer = Analyzer(Bundle(opened.path, chosen), threads=threads)
    seen = evaluate.examine(analyzer, used, verified, scale="labelled")
    figures = results.plain(evaluate.score(seen, chosen.overlap_threshold))
    chosen = replace(
        chosen,
        metrics={**old.metrics, "again": figures},
        calibration={**old.calibration, "thresholds": f"chosen again, after the export as {old.bundle_id}"},
    )
    expected = json.loads((opened.path / TEST_EXPECTED).read_text(encoding="utf-8"))
    field = image_file.load_field(opened.path / TEST_INPUT, "bundle", "test")
    with TemporaryDirectory() as folder:
        file = Path(folder) / TEST_EXPECTED
        found = selftest.expectation(analyzer, field, float(expected["cell_diameter_px"]))
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
        source = {name: opened.path / name for name in old.files} | {TEST_EXPECTED: file}
        return bundle.write(out, source, chosen)

"""``rbc-edge bundle show`` and ``verify``."""

from dataclasses import asdict
from typing import Any

from rbc_edge.cli.console import print_json, print_mapping
from rbc_edge.cli.options import Given
from rbc_edge.errors import ExitCode
from rbc_edge.text import path_text
from rbc_edge.vision import selftest
from rbc_edge.vision.bundle import CLASSIFIER_FP32, DETECTOR_FP32, Bundle, Manifest


def show(given: Given, *, everything: bool, json_output: bool) -> int:
    """Prints the main facts about the bundle, or everything in its manifest."""
    bundle = Bundle.open(given.load().settings.bundle)
    if json_output:
        print_json(bundle.describe())
    else:
        print_mapping(bundle.describe() if everything else _main_facts(bundle))
    return ExitCode.OK


def _main_facts(bundle: Bundle) -> dict[str, object]:
    manifest = bundle.manifest
    has_fp32 = {DETECTOR_FP32, CLASSIFIER_FP32} <= manifest.files.keys()
    named = zip(manifest.class_names, manifest.score_threshold, strict=True)
    return {
        "bundle_id": bundle.bundle_id,
        "folder": path_text(bundle.path),
        "precision": "int8, fp32" if has_fp32 else "int8",
        "cell diameter": f"{manifest.cell_diameter_px:g} px, to which every image is scaled",
        "a detection counts": ", ".join(f"{name} from score {score:g}" for name, score in named),
        "a red cell": f"overlapping from score {manifest.overlap_threshold:g}, {_refused(manifest)}",
        "training data": manifest.training.get("data", "not named"),
        "training commit": manifest.training.get("commit", "not named"),
        "accuracy": _accuracy(manifest),
        "licence": manifest.licence,
    }


def _refused(manifest: Manifest) -> str:
    threshold = manifest.refuse_threshold
    return f"refused from score {threshold:g}" if threshold < 1 else "never refused"


def _accuracy(manifest: Manifest) -> str:
    """Says what the manifest's metrics say of red cells: the share found, and the share that is right."""
    metrics: Any = manifest.metrics
    try:
        figures = metrics.get("again") or metrics["int8"]
        recall, precision = (figures["all"][key] for key in ("rbc_recall", "rbc_precision"))
    except (KeyError, TypeError, AttributeError):
        return "not measured"
    right = f"{precision:.1%} of those found are right (validation photographs)"
    return f"{recall:.1%} of the red cells found, {right}"


def verify(given: Given, *, json_output: bool) -> int:
    """Counts the bundle's test image and prints how near the cells are to those of the export."""
    settings = given.load().settings
    bundle = Bundle.open(settings.bundle)
    test = selftest.verify(bundle, threads=settings.threads)
    if json_output:
        print_json({"bundle_id": bundle.bundle_id, "verified": True, **asdict(test)})
    else:
        near = f"boxes within {test.box_error_px:.1f} px, scores within {test.score_error:.3f}"
        found = f"{test.n_found} cells of {test.n_expected}, {near}"
        print(f"bundle {bundle.bundle_id} is intact and finds the same cells here as at the export: {found}")
    return ExitCode.OK

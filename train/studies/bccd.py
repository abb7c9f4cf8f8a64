"""Scores a bundle against BCCD's own boxes, as the literature does: ``python -m studies.bccd``."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from rbc_train import console, results
from rbc_train.data import Photograph, annotated_twice, official_test, read_public
from rbc_train.evaluate import examine, score_group
from rbc_train.labels import VerifiedLabels
from rbc_train.results import Section, Table
from studies import station

app = console.program()


class Split(StrEnum):
    """Splits of BCCD."""

    val = "val"
    test = "test"


@app.command()
def bccd(
    split: Annotated[Split, typer.Option(help="test is used once, at the end.")] = Split.val,
    bundle: console.BundleOption = None,
    data: console.Data = console.DATA,
    out: console.Out = results.FOLDER,
    threads: console.Threads = 0,
) -> None:
    """Scores a bundle against BCCD's own boxes, as the literature does."""
    analyzer = station.open_analyzer(bundle, threads)
    txl, own = read_public(data)

    def score(photographs: list[Photograph]) -> dict[str, object]:
        # Overlap is not judged here.
        seen = examine(analyzer, photographs, VerifiedLabels([]), scale="estimated")
        return score_group(seen, analyzer.bundle.manifest.overlap_threshold)

    pairs = annotated_twice(data, txl, own)
    both = {
        "BCCD's boxes": score([b for b, _ in pairs]),
        "TXL-PBC's boxes": score([t for _, t in pairs]),
    }
    figures = score(own.of("val") if split is Split.val else official_test(data, own))
    console.publish(section(split, figures, both, analyzer.bundle.bundle_id), out)


def section(
    split: Split, figures: Mapping[str, Any], both: Mapping[str, Mapping[str, Any]], bundle_id: str
) -> Section:
    """Makes the section ``bccd-test``.

    Args:
        split: Which of BCCD's splits was scored.
        figures: Of that split, against BCCD's own boxes.
        both: Figures of the validation photographs that both sets annotate, by the set of boxes.
        bundle_id: Of the bundle.

    Returns:
        The section. The target reads its ``map50``, which exists for the test split only.
    """

    def row(name: str, f: Mapping[str, Any]) -> tuple[str, ...]:
        precisions = (f[k] for k in ("rbc_ap50", "wbc_ap50", "platelet_ap50", "map50"))
        shown = (*(f"{v:.4f}" for v in precisions), str(f["rbc_labelled"]), str(f["rbc_counted"]),
                 *(f"{f[k]:.3f}" for k in ("rbc_precision", "rbc_recall")))  # fmt: skip
        return (name, str(f["photographs"]), *("–" if v == "nan" else v for v in shown))

    columns = ("judged by", "photographs", "RBC AP50", "WBC", "platelet", "mAP50", "labelled", "counted",
               "precision", "recall")  # fmt: skip
    rows = [row(f"{split} split, BCCD's boxes", figures)]
    rows += [row(f"validation, {name}", f) for name, f in both.items()]
    return Section(
        name="bccd-test",
        command=f"python -m studies.bccd --split {split}",
        tables=(Table("AP50 and red cells", columns, tuple(rows)),),
        data={
            "bundle_id": bundle_id,
            "split": str(split),
            "map50": figures["map50"] if split is Split.test else math.nan,
            "figures": figures,
            "both": both,
        },
    )


if __name__ == "__main__":
    console.answer(app)

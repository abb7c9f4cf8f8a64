"""The shapes of a drawn slide, of which the truth is exact, named by the bundle that is shipped."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rbc_edge.ops.synthetic import CREAM, GREY, Form, Stain, draw_forms
from rbc_edge.station.count_folder import count_folder

_NAMED = {
    Form.DISC: "normal",
    Form.SPHERE: "spherocyte",
    Form.ELLIPSE: "elliptocyte",
    Form.RING: "hypochromic",
    Form.TARGET: "target",
    Form.BITTEN: "schistocyte",
}
_TRUE = 1 / len(Form)  # as many cells of each form
# Half a form. One that is not known is off by a whole one, and so is another that it is taken for. Where all
# discs are unsure, each other share rises by a fifth of this one, without a fault of its own.
_TOLERANCE = _TRUE / 2


def counted(stain: Stain, folder: Path) -> tuple[list[dict[str, str]], dict[str, dict[str, str]]]:
    """The cells of a drawn slide, and the lines of its table of shapes."""
    rng = np.random.default_rng(16)
    (folder / "in" / "s").mkdir(parents=True)
    mix = list(Form) * 6
    for k in range(4):
        drawn = draw_forms(rng, [mix[i] for i in rng.permutation(len(mix))], stain=stain)
        (folder / "in" / "s" / f"{k}.png").write_bytes(drawn.encoded(".png"))
    count_folder(folder / "in", folder / "out", cell_diameter_px=60.0, cells=True)
    with (folder / "out" / "cells" / "s.csv").open() as file:
        cells = list(csv.DictReader(file))
    with (folder / "out" / "shapes" / "s.csv").open() as file:
        lines = {row["shape"]: row for row in csv.DictReader(file)}
    assert len(cells) == 4 * len(mix)
    return cells, lines


@pytest.mark.parametrize("stain", [CREAM, GREY], ids=["cream", "grey"])
def test_a_drawn_slide_gets_its_shares_of_the_shipped_bundle(stain: Stain, tmp_path: Path) -> None:
    cells, lines = counted(stain, tmp_path)
    share = {shape: float(row["share"]) for shape, row in lines.items()}
    for form, shape in _NAMED.items():
        if form is not Form.DISC:
            assert share[shape] == pytest.approx(_TRUE, abs=_TOLERANCE), form
    assert sum(each for shape, each in share.items() if shape not in _NAMED.values()) < _TOLERANCE
    assert sum(share.values()) == pytest.approx(1, abs=len(share) * 5e-5)  # as they are rounded
    # The table says what the cells say.
    named = Counter(row["shape"] for row in cells if row["shape_judged"] == "yes")
    assert named == {shape: int(row["n"]) for shape, row in lines.items() if row["n"] != "0"}
    for row in lines.values():
        assert int(row["n_judged"]) == named.total()
        assert float(row["share_low"]) <= float(row["share"]) <= float(row["share_high"])


@pytest.mark.xfail(strict=True, reason="most drawn discs are unsure, or called other shapes than normal")
def test_drawn_discs_get_their_share_as_normal_cells(tmp_path: Path) -> None:
    _, lines = counted(GREY, tmp_path)
    assert float(lines["normal"]["share"]) == pytest.approx(_TRUE, abs=_TOLERANCE)

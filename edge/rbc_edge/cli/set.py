"""``rbc-edge set``."""

from rbc_edge.cli.console import print_line
from rbc_edge.cli.forget import changed
from rbc_edge.cli.options import Given
from rbc_edge.errors import ExitCode, UsageError
from rbc_edge.store.decisions import give_scale
from rbc_edge.text import count_text
from rbc_edge.vision.analyzer import given_scale


def set(given: Given, slide: str, *, diameter_px: float | None, pixel_um: float | None, undo: bool) -> int:
    """Gives a slide its scale, or takes it back."""
    scale = given_scale(cell_diameter_px=diameter_px, um_per_px=pixel_um)
    if undo is (scale is not None):
        raise UsageError("nothing to set", "give one of --cell-diameter, --um-per-px and --undo")
    n = changed(given, slide, lambda ledger: give_scale(ledger, slide, scale))
    what = f"a red cell is {scale.cell_diameter_px:g} px wide" if scale else "the scale that was set is gone"
    print_line(f"{slide}: {what}; {count_text(n, 'field')} to be counted again")
    return ExitCode.OK

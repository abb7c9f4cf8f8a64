"""``rbc-edge exclude``."""

from collections.abc import Sequence

from rbc_edge.cli.console import print_line
from rbc_edge.cli.forget import changed
from rbc_edge.cli.options import Given
from rbc_edge.errors import ExitCode
from rbc_edge.store.decisions import decide
from rbc_edge.store.rows import Status
from rbc_edge.text import count_text


def exclude(given: Given, slide: str, fovs: Sequence[str] | None, *, reason: str, undo: bool) -> int:
    """Takes fields out of the counts and keeps their rows, or counts them."""
    kind = None if undo else Status.EXCLUDED
    n = changed(given, slide, lambda ledger: decide(ledger, slide, fovs or (), kind, reason=reason))
    print_line(f"{slide}: {count_text(n, 'field')} {'counted' if undo else 'excluded'}")
    return ExitCode.OK

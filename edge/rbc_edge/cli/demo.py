"""``rbc-edge demo``."""

from pathlib import Path

from rbc_edge.cli.console import log_to_stderr
from rbc_edge.cli.options import Given
from rbc_edge.ops.demo import run_demo


def demo(given: Given, out: Path | None, *, seed: int, json_output: bool) -> int:
    """Draws, counts and compares. Only settings of the command line apply."""
    log_to_stderr()
    bundle, threads = given.flags["bundle"], given.flags["threads"] or 0
    return run_demo(out, bundle=bundle, threads=threads, seed=seed, json_output=json_output)

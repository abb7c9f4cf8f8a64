"""``rbc-edge bench``: measures, prints, and writes the best settings where that is asked."""

import sys
from pathlib import Path

from rbc_edge.cli.console import log_to_stderr, print_json
from rbc_edge.cli.options import Given
from rbc_edge.config import places
from rbc_edge.errors import ExitCode, UsageError
from rbc_edge.ops import autotune, settings_file
from rbc_edge.text import one_line, path_text
from rbc_edge.vision.bundle import Bundle


def bench(
    given: Given, images: Path | None, *, apply: bool, write_config: Path | None, json_output: bool
) -> int:
    """Measures how fast this computer counts and prints what is best."""
    loaded = given.load()
    if apply and write_config is not None:
        raise UsageError("--apply and --write-config are two ways to name the file", "give one of them")
    log_to_stderr()
    file = (loaded.file or places()[0]) if apply else write_config
    if file is not None:
        settings_file.check_writable(file)
    bundle = Bundle.open(loaded.settings.bundle)
    speeds = autotune.measure(bundle, images, say=lambda words: print(words, file=sys.stderr))
    chosen = autotune.best(speeds)
    if json_output:
        print_json(autotune.as_json(speeds, chosen))
    else:
        print("\n".join(autotune.as_lines(speeds, chosen)))
    if file is not None:
        best = autotune.settings_of(speeds, chosen)
        settings_file.write_settings(file, best)
        written = f"{settings_file.assignments(best)} written to {path_text(file)}"
        print(one_line(written), file=sys.stderr)
    return ExitCode.OK

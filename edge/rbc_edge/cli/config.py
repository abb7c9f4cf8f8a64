"""``rbc-edge config``: writes, shows and checks settings."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from rbc_edge.cli.console import print_json
from rbc_edge.cli.options import Given
from rbc_edge.config import example, load, places
from rbc_edge.errors import ExitCode, UsageError
from rbc_edge.ops.settings_file import write_new
from rbc_edge.text import one_line


def init(file: Path | None, *, source: Path | None, out: Path | None, force: bool) -> int:
    """Writes the example of a settings file, or prints it."""
    # Absolute: in the file they would be relative to the file.
    source, out = (None if p is None else Path(os.path.abspath(p)) for p in (source, out))  # noqa: PTH100
    text = example(source=source, out=out)
    if file == Path("-"):
        print(text, end="")
        return ExitCode.OK
    file = file or places()[0]
    write_new(file, text, force=force)
    check = f"rbc-edge config validate --config {file}"
    print(one_line(f"{file}: written; check it with `{check}` after a change"))
    return ExitCode.OK


def show(given: Given, *, json_output: bool) -> int:
    """Prints each setting, its value and where the value comes from."""
    loaded = given.load()
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(loaded.settings).items()}
    if json_output:
        print_json({k: {"value": v, "source": loaded.source[k]} for k, v in values.items()})
        return ExitCode.OK
    for key, value in values.items():
        shown = "-" if value is None else json.dumps(value, ensure_ascii=False)
        print(f"{key:14} {one_line(shown):20} {one_line(loaded.source[key])}")
    return ExitCode.OK


def validate(given: Given) -> int:
    """Checks the settings, and prints every error. Raises the last."""
    errors: list[UsageError] = []
    loaded = load(given.flags, file=given.file, fail=errors.append)
    for error in errors[:-1]:
        print(f"rbc-edge: {one_line(error.message)}\n  {one_line(error.advice)}", file=sys.stderr)
    if errors:
        raise errors[-1]
    nowhere = f"no settings file ({' or '.join(map(str, places()))})"
    print(one_line(f"{loaded.file or nowhere}: valid"))
    return ExitCode.OK

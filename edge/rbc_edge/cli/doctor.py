"""``rbc-edge doctor``."""

from pathlib import Path

from rbc_edge.cli.console import print_json
from rbc_edge.cli.options import Given
from rbc_edge.ops.doctor import examine
from rbc_edge.ops.support_archive import write
from rbc_edge.text import one_line


def doctor(
    given: Given, *, support_archive: Path | None, bundle_support: Path | None, json_output: bool
) -> int:
    """Prints what was found, and writes the archive for a bug report where one is named."""
    archive = support_archive or bundle_support
    diagnosis = examine(given.flags, file=given.file)
    contents = [] if archive is None else write(archive, diagnosis)
    if json_output:
        print_json({**diagnosis.as_json(), "support": [name for name, _ in contents]})
    else:
        for line in diagnosis.as_lines():
            print(one_line(line))
        if archive is not None:
            print(one_line(f"{archive}: written, with"))
            for name, meaning in contents:
                print(f"  {name:14} {meaning}")
    return diagnosis.exit_code

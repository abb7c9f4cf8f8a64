"""Makes what the pages show: ``python docs/outputs.py`` runs each shown command and writes its output.

A block of a page that shows an output has a mark in front, which names the place where the command runs::

    <!-- output: demo -->
    ```console
    $ rbc-edge run demo/images --out first
    slide  fields  failed ...
    ```

The places are in `PLACES`. Blocks of one page in the same place run in their order, in one folder. So a
command may use what the command before it wrote. What differs from run to run (times, free space) is
replaced by a fixed example (`EXAMPLES`). A line ``...`` in a shown output stands for lines left out: as many
lines as the page shows before and after it are kept.

A table between ``<!-- rows: results.md, Targets -->`` and ``<!-- end -->`` takes its figures from the table
of that caption: the page chooses rows (by the first column) and columns (by their headings).

``--check`` writes nothing and exits with 1 if a page differs. ``--without bccd`` leaves out a place.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from difflib import unified_diff
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
DATA: Final = Path(os.environ.get("RBC_DATA", ROOT.parent / "shared" / "data"))

_OUTPUT = re.compile(r"^<!-- output: ([a-z]+) -->\n```console\n(.*?)^```$", re.M | re.S)
_ROWS = re.compile(r"^(<!-- rows: ([\w.-]+), (.+?) -->\n)(.*?)^(?=<!-- end -->$)", re.M | re.S)

EXAMPLES: Final = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "2026-11-23 12:01:42,025"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "2026-11-23T12:01:42Z"),
    (r"\b\d+ ms\b", "27 ms"),
    (r"\b\d+ s ago", "2 s ago"),
    (r"\bprocess \d+", "process 812"),
    (r"\d+\.\d GB free", "78.7 GB free"),
    (r" lies on .*?; .*", " lies on ext4 /dev/sda1 on /; woken by its events"),
)
"""Pattern and replacement for what no two runs have in common."""


def _run(folder: Path, line: str) -> str:
    """Runs one shown command in `folder` and returns what a terminal would show of it.

    Raises:
        SystemExit: If the command fails or is none of ours.
    """
    # `make demo` installs the station first. After that it is this command (the Makefile says so).
    words = shlex.split("rbc-edge demo --out demo" if line == "make demo" else line)
    if words[0] != "rbc-edge":
        raise SystemExit(f"{line}: only rbc-edge and make demo can be shown with their output")
    # /srv is the folder of the example. Nothing is written outside the folder of this run.
    words = [word.replace("/srv/", f"{folder}/srv/") for word in words[1:]]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RBC_EDGE_", "NOTIFY_"))}
    environment = kept | {
        "PYTHONPATH": str(ROOT / "edge"),
        "PYTHONUNBUFFERED": "1",  # output and messages come in the order of a terminal
        "PYTHONUTF8": "1",
        "COLUMNS": "120",
        "TZ": "UTC",
        "XDG_CONFIG_HOME": "/nonexistent",
    }
    done = subprocess.run(
        [sys.executable, "-m", "rbc_edge", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{line} ended with {done.returncode}:\n{done.stdout}")
    text = done.stdout.replace(f"{folder}/srv/", "/srv/")
    for pattern, example in EXAMPLES:
        text = re.sub(pattern, example, text)
    return text


# -- places -------------------------------------------------------------------------------------------------


def _empty(_folder: Path) -> None:
    """A folder with nothing in it."""


def _camera(folder: Path) -> None:
    """Slide A17 with two drawn fields, where a camera would write."""
    _run(folder, "rbc-edge demo --out drawn")
    slide = folder / "srv" / "camera" / "A17"
    slide.mkdir(parents=True)
    for image in sorted((folder / "drawn" / "images" / "cream").iterdir())[:2]:
        image.rename(slide / image.name)


def _bccd(folder: Path) -> None:
    """The photographs of BCCD, as its repository has them."""
    (folder / "BCCD_Dataset" / "BCCD").mkdir(parents=True)
    (folder / "BCCD_Dataset" / "BCCD" / "JPEGImages").symlink_to(DATA / "bccd" / "JPEGImages")


PLACES: Final[dict[str, Callable[[Path], None]]] = {"demo": _empty, "camera": _camera, "bccd": _bccd}
"""Places by name: what is in the folder before the first command runs."""

NEED_DATA: Final = frozenset({"bccd"})
"""Places that need the public data beside the checkout."""


# -- pages --------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """Returns the pages that show an output, or rows of another page."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [p for p in candidates if re.search(r"^<!-- (output|rows): ", p.read_text(encoding="utf-8"), re.M)]


def places(page: Path) -> set[str]:
    """Returns the places that the blocks of a page name."""
    return {found[1] for found in _OUTPUT.finditer(page.read_text(encoding="utf-8"))}


def made(page: Path, only: Collection[str]) -> str:
    """Returns a page as it has to be: every output of the places in `only`, and every row, made now."""
    with tempfile.TemporaryDirectory(prefix="rbc-edge-docs-") as scratch:

        def output(found: re.Match[str]) -> str:
            place, body = found[1], found[2]
            if place not in only:
                return found[0]
            folder = Path(scratch) / place
            if not folder.exists():
                folder.mkdir()
                PLACES[place](folder)
            calls = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body, re.M)
            shown = "".join(f"$ {line}\n{_shortened(_run(folder, line), like=old)}" for line, old in calls)
            return f"<!-- output: {place} -->\n```console\n{shown}```"

        text = _OUTPUT.sub(output, page.read_text(encoding="utf-8"))
    return _ROWS.sub(lambda found: found[1] + _chosen_rows(found[4], found[2], found[3]), text)


def _shortened(text: str, *, like: str) -> str:
    """Returns `text` with as many lines at its head and its end as `like` shows around its ``...``."""
    head, dots, tail = like.partition("...\n")
    if not dots:
        return text
    lines = text.splitlines(keepends=True)
    n_head, n_tail = len(head.splitlines()), len(tail.splitlines())
    return "".join([*lines[:n_head], dots, *lines[len(lines) - n_tail :]])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _chosen_rows(table: str, source: str, caption: str) -> str:
    """Returns `table` with its figures taken from the table that stands under `caption` in docs/`source`."""
    text = (ROOT / "docs" / source).read_text(encoding="utf-8")
    found = re.search(rf"^\*\*{re.escape(caption)}[^\n]*\*\*\n\n((?:\|.*\n)+)", text, re.M)
    if found is None:
        raise SystemExit(f"docs/{source} has no table {caption}")
    there = found[1].splitlines()
    column = {name: k for k, name in enumerate(_cells(there[0]))}
    row = {_cells(line)[0]: _cells(line) for line in there[2:]}
    head, rule, *lines = table.splitlines()
    names = _cells(head)
    for name in (names[1:], [_cells(line)[0] for line in lines]):
        missing = set(name) - set(column) - set(row)
        if missing:
            raise SystemExit(f"docs/{source}, table {caption}: nothing is called {sorted(missing)}")
    new = [[_cells(line)[0], *(row[_cells(line)[0]][column[name]] for name in names[1:])] for line in lines]
    return "\n".join([head, rule, *(f"| {' | '.join(cells)} |" for cells in new)]) + "\n"


def main() -> int:
    """Rewrites the pages, or compares them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    parser.add_argument("--without", nargs="*", default=[], choices=sorted(PLACES), help="places left out")
    given = parser.parse_args()
    only = set(PLACES) - set(given.without)
    if only & NEED_DATA and not DATA.is_dir():
        print(f"{DATA} is not there: outputs of public photographs stay as they are", file=sys.stderr)
        only -= NEED_DATA
    differs = False
    for page in pages():
        before, now = page.read_text(encoding="utf-8"), made(page, only)
        if before == now:
            continue
        differs = True
        name = page.relative_to(ROOT).as_posix()
        sys.stdout.writelines(unified_diff(before.splitlines(True), now.splitlines(True), name, name))
        if not given.check:
            page.write_text(now, encoding="utf-8")
    return int(differs and given.check)


if __name__ == "__main__":
    sys.exit(main())

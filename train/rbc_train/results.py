"""What the measuring commands found, kept as JSON, and the pages of `docs/` that are made of it.

Each command publishes one `Section`: its figures, as numbers for machines and as tables and pictures for
readers. The pages are made of the sections that lie in the folder, never typed; who runs one command again
renews its section and leaves the others as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rbc_edge.errors import UnavailableError

Page = Literal["results", "paper", "quality"]

FOLDER: Final = Path("docs/results")
"""Where sections and their pictures lie, from the root of the repository; the pages lie one above."""

_TITLES: Final[dict[Page, str]] = {
    "results": "Results",
    "paper": "The paper, repeated and answered",
    "quality": "Quality flags and intervals",
}
_INTRODUCTIONS: Final[dict[Page, str]] = {
    "results": (
        "Every figure on this page was printed by the command named above it, with the bundle named there. "
        "Data: the validation photographs of TXL-PBC (`datasets.keep_apart` has taken out those that leak), "
        "which also chose the thresholds, unless a section says otherwise. Overlap is judged on the "
        "verified labels."
    ),
    "paper": (
        "Gurav, Yadav, Taral (2025) taught two small CNNs single and overlapping cells with 13 and 28 crops, "
        "labelled by the area rule that also judged them. This page repeats both experiments over many "
        "draws, then asks what the method is worth when inspected labels judge it."
    ),
    "quality": (
        "The column `quality_flags` warns of fields whose counts may be wrong; a flag never changes a count. "
        "This page tells what the flags mean, how often they are right, and how often a slide's interval "
        "holds the truth. Every figure was printed by the command named above it."
    ),
}
_ORDER: Final = (
    "metrics",
    "bccd-test",
    "comparators",
    "disturbances",
    "scale",
    "suppression",
    "diameter",
    "overlap",
    "paper",
    "learning",
    "flags",
    "quality",
    "coverage",
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table for readers.

    Attributes:
        caption: What it shows.
        columns: Headings.
        rows: Cells as text, as many as there are columns.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.caption}: {len(row)} cells in a row of {len(self.columns)} columns")


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure for readers.

    Attributes:
        file: Its name in the folder of the sections (PNG or SVG).
        caption: What it shows; also its text for those who do not see it.
    """

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """What one command found.

    Attributes:
        name: Of its file, ``<name>.json``; one of the names that the pages know.
        page: The page it belongs to.
        title: Its heading.
        command: How to get the same again.
        text: Paragraphs, Markdown.
        tables: For readers.
        pictures: For readers.
        data: The figures for machines, JSON-able (see `plain`).
    """

    name: str
    page: Page
    title: str
    command: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in _ORDER:
            raise ValueError(f"{self.name}: no page has a place for it")


def publish(section: Section, folder: Path = FOLDER) -> Path:
    """Writes a section and renews the page it belongs to.

    Args:
        section: What was found. Its pictures must lie in `folder` already.
        folder: Where the sections lie; the pages are written one above.

    Returns:
        The page.

    Raises:
        UnavailableError: If a picture is missing, or the files cannot be written.
    """
    missing = [p.file for p in section.pictures if not (folder / p.file).is_file()]
    if missing:
        raise UnavailableError(f"{folder / missing[0]}: the picture was not drawn")
    content = {
        "title": section.title,
        "page": section.page,
        "command": section.command,
        "text": section.text,
        "tables": [{"caption": t.caption, "columns": t.columns, "rows": t.rows} for t in section.tables],
        "pictures": [{"file": p.file, "caption": p.caption} for p in section.pictures],
        "data": plain(dict(section.data)),
    }
    page = folder.parent / f"{section.page}.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{section.name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _write(page, _render(folder, section.page))
    except OSError as error:
        raise UnavailableError(
            f"{error.filename}: {error.strerror}", "choose another folder with --out"
        ) from error
    return page


def read_section(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Reads the figures that a command published.

    Args:
        name: Of the section.
        folder: Where the sections lie.

    Returns:
        Its ``data``.

    Raises:
        UnavailableError: If the command was not run, or its file is not whole.
    """
    file = folder / f"{name}.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["data"])
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(
            f"{file}: not a section of results: {error}", "run its command again"
        ) from error


def plain(figures: Any) -> Any:
    """Rounds figures for JSON, which has no NaN: those that do not exist become null."""
    if isinstance(figures, Mapping):
        return {str(k): plain(v) for k, v in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [plain(v) for v in figures]
    if isinstance(figures, float):
        return round(figures, 5) if abs(figures) < float("inf") else None
    return figures


def _render(folder: Path, page: Page) -> str:
    lines = [f"# {_TITLES[page]}", "", _INTRODUCTIONS[page], ""]
    for name in _ORDER:
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["page"] != page:
            continue
        lines += [f"## {content['title']}", "", f"`{content['command']}`", ""]
        for paragraph in content["text"]:
            lines += [paragraph, ""]
        for table in content["tables"]:
            lines += [f"**{table['caption']}**", "", _row(table["columns"]), _row(_rule(table))]
            lines += [_row(row) for row in table["rows"]]
            lines.append("")
        for picture in content["pictures"]:
            lines += [f"![{picture['caption']}]({folder.name}/{picture['file']})", ""]
            lines += [f"*{picture['caption']}*", ""]
    return "\n".join(lines).rstrip() + "\n"


def _rule(table: dict[str, Any]) -> list[str]:
    """Markdown's line under the heading; columns of figures stand right."""
    figures = "0123456789+-−.,%±–() []nao/"
    columns = zip(*table["rows"], strict=True) if table["rows"] else [()] * len(table["columns"])
    return ["--:" if column and all(set(c) <= set(figures) for c in column) else "---" for column in columns]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)

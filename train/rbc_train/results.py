"""What the measuring commands found, kept as JSON, and the pages of `docs/` that are made of it.

A command publishes one `Section`: its figures, as numbers for programs and as tables and charts for
readers. The words stand in one template a page, ``templates/<page>.md``. A page shows the sections that
are in the folder, so a command that runs again renews its own section and no other.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import jinja2

from rbc_edge.errors import UnavailableError
from rbc_edge.vision import quality

Page = Literal["results", "paper", "quality"]

FOLDER: Final = Path("docs/results")
"""Where sections and their charts are, from the root of the repository. The pages are one folder above."""

_SECTIONS: Final[dict[Page, tuple[str, ...]]] = {
    "results": (
        "metrics", "laboratories", "left-out", "shapes", "shape-blocks", "bccd-test", "baselines", "outlines",
        "corruptions", "scale", "suppression", "diameter", "overlap",
    ),
    "paper": ("paper", "learning"),
    "quality": ("quality", "wrong-fields", "coverage"),
}  # fmt: skip


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
class Chart:
    """A drawn figure for readers.

    Attributes:
        file: Its name in the folder of the sections (PNG or SVG).
        caption: What it shows. Also its text for readers who do not see it.
    """

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """What one command found.

    Attributes:
        name: Of its file, ``<name>.json``. One of the names that the pages know.
        command: How to get the same again.
        tables: For readers.
        charts: For readers.
        data: The figures for programs and for the words of the page, JSON-able (see `plain`).
    """

    name: str
    command: str
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(self.name in names for names in _SECTIONS.values()):
            raise ValueError(f"{self.name}: no page has a place for it")

    @property
    def page(self) -> Page:
        """The page that shows it."""
        return next(page for page, names in _SECTIONS.items() if self.name in names)


def publish(section: Section, folder: Path = FOLDER) -> Path:
    """Writes a section and renews its page.

    Args:
        section: What was found. Its charts must be in `folder` already.
        folder: Where the sections are. The pages are written one folder above.

    Returns:
        The page.

    Raises:
        UnavailableError: If a chart is missing, or the files cannot be written.
    """
    store(section, folder)
    return write_page(section.page, folder)


def store(section: Section, folder: Path = FOLDER) -> None:
    """Writes the JSON of a section. See `publish`."""
    missing = [c.file for c in section.charts if not (folder / c.file).is_file()]
    if missing:
        raise UnavailableError(f"{folder / missing[0]}: the chart was not drawn")
    content = {
        "command": section.command,
        "tables": [asdict(t) for t in section.tables],
        "charts": [asdict(c) for c in section.charts],
        "data": plain(dict(section.data)),
    }
    _write(folder / f"{section.name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_page(page: Page, folder: Path = FOLDER) -> Path:
    """Makes a page again from its template and from the sections that are there.

    Args:
        page: Which page.
        folder: Where the sections are. The page is written one folder above.

    Returns:
        The page.

    Raises:
        UnavailableError: If a section is not whole or older than the template, or the page cannot be written.
    """
    file = folder.parent / f"{page}.md"
    _write(file, render(page, folder))
    return file


def write_pages(folder: Path = FOLDER) -> list[Path]:
    """Makes all pages again. See `write_page`."""
    return [write_page(page, folder) for page in get_args(Page)]


def render(page: Page, folder: Path = FOLDER) -> str:
    """Returns the Markdown of a page. See `write_page`."""
    there = {name: folder / f"{name}.json" for name in _SECTIONS[page]}
    sections = {
        name.replace("-", "_"): _read(file) if file.is_file() else None for name, file in there.items()
    }
    environment = jinja2.Environment(
        loader=_LOADER, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "points": _points,
        "shown": _Shown(folder.name),
    }
    try:
        text = environment.get_template(f"{page}.md").render(sections, FLAGS=quality.FLAGS)
    except jinja2.UndefinedError as error:
        raise UnavailableError(
            f"{folder}: a section of the page {page} is older than its words: {error}",
            "run its command again",
        ) from error
    return "\n".join(line for line in _single_blank(text.splitlines())).strip() + "\n"


def read_section(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Reads the figures that a command published.

    Args:
        name: Of the section.
        folder: Where the sections are.

    Returns:
        Its ``data``.

    Raises:
        UnavailableError: If the command was not run, or its file is not whole.
    """
    return dict(_read(folder / f"{name}.json")["data"])


def read_tables(name: str, folder: Path = FOLDER) -> tuple[Table, ...]:
    """Reads the tables that a command published. See `read_section`."""
    return tuple(
        Table(t["caption"], tuple(t["columns"]), tuple(map(tuple, t["rows"])))
        for t in _read(folder / f"{name}.json")["tables"]
    )


def plain(figures: Any) -> Any:
    """Rounds figures for JSON. JSON has no NaN: figures that do not exist become null."""
    if isinstance(figures, Mapping):
        return {str(k): plain(v) for k, v in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [plain(v) for v in figures]
    if isinstance(figures, float):
        return round(figures, 5) if abs(figures) < float("inf") else None
    return figures


_LOADER: jinja2.BaseLoader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")


class _Shown:
    """Shows the tables and charts of a section as Markdown."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, section: Mapping[str, Any]) -> str:
        lines: list[str] = []
        for table in section["tables"]:
            lines += [f"**{table['caption']}**", "", _row(table["columns"]), _row(_rule(table))]
            lines += [_row(row) for row in table["rows"]]
            lines.append("")
        for chart in section["charts"]:
            lines += [f"![{chart['caption']}]({self._folder}/{chart['file']})", ""]
            lines += [f"*{chart['caption']}*", ""]
        return "\n".join(lines)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _points(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:+.{digits}f}"


def _single_blank(lines: list[str]) -> list[str]:
    return [line for i, line in enumerate(lines) if line.strip() or (i and lines[i - 1].strip())]


def _rule(table: dict[str, Any]) -> list[str]:
    """Markdown's line under the heading. Columns of numbers are set to the right."""
    numbers = "0123456789+-−.,%±–() []nao/"
    columns = zip(*table["rows"], strict=True) if table["rows"] else [()] * len(table["columns"])
    return ["--:" if column and all(set(c) <= set(numbers) for c in column) else "---" for column in columns]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        content["data"]
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(
            f"{file}: not a section of results: {error}", "run its command again"
        ) from error
    return content


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise UnavailableError(
            f"{error.filename}: {error.strerror}", "choose another folder with --out"
        ) from error

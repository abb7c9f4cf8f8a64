"""What the command lines of training, export and studies share: options, errors, progress, publishing."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from rbc_edge.errors import RbcEdgeError
from rbc_train import results

Data = Annotated[
    Path, typer.Option(help="Folder with splits.csv, txl_pbc/, bccd/ and perhaps chula/.", envvar="RBC_DATA")
]
BundleOption = Annotated[Path | None, typer.Option(help="Bundle to run. By default: the shipped one.")]
Every = Annotated[int, typer.Option(min=1, help="Use one photograph in so many.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the networks. 0: all that the processor has.")]
Out = Annotated[Path, typer.Option(help="Folder of the results. The page is written one folder above.")]
DatasetOption = Annotated[Path, typer.Option(help="Folder that the dataset command wrote.")]
DetectorOption = Annotated[
    Path, typer.Option(help="Detector checkpoint. Training begins from its first stages.")
]
WeightsOption = Annotated[Path, typer.Option(help="COCO-pretrained YOLOv5n, safetensors.")]

DATA: Final = Path("../shared/data")
DATASET: Final = Path("data/dataset")
DETECTOR: Final = Path("runs/detector/detector.pt")
WEIGHTS: Final = Path("../shared/weights/yolov5n-coco.safetensors")


def program(help_text: str | None = None) -> typer.Typer:
    """Returns an empty command line that is set up as all of ours are."""
    return typer.Typer(
        help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )


def answer(command: typer.Typer) -> None:
    """Runs a command line. An error of ours becomes a message, advice and an exit code."""
    try:
        command()
    except RbcEdgeError as error:
        typer.echo(f"error: {error.message}", err=True)
        if error.advice:
            typer.echo(f"       {error.advice}", err=True)
        sys.exit(error.exit_code)


def show_progress(done: int, total: int, line: str) -> None:
    """Prints a bar and a line of figures on stderr."""
    bar = "#" * round(30 * done / total)
    typer.echo(f"[{bar:30}] {done}/{total}  {line}", err=True)


def publish(
    section: results.Section, folder: Path, text: Callable[[results.Section], str] | None = None
) -> None:
    """Writes a section and its page, prints its tables on stdout and the page's path on stderr.

    Args:
        section: What a command measured.
        folder: Where the sections lie.
        text: Lays the section out for the terminal. By default: its tables, cells apart by two spaces.
    """
    page = results.publish(section, folder)
    typer.echo((text or tables_text)(section))
    typer.echo(page, err=True)


def tables_text(section: results.Section) -> str:
    """Lays the tables of a section out as text, a line a row."""
    lines: list[str] = []
    for table in section.tables:
        lines += [table.caption, *("  ".join(row) for row in (table.columns, *table.rows))]
    return "\n".join(lines)


def aligned(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    """Lays a table out as text in columns: the first to the left, the others to the right."""
    table = [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    )

"""`rbc-edge run` as a Python function."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rbc_edge.errors import UsageError
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.text import one_line
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.views.tables import SlideSummary
from rbc_edge.vision.analyzer import default_threads, given_scale
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import EdgeRule


@dataclass(frozen=True, slots=True)
class FolderResult:
    """What `count_folder` did.

    Attributes:
        out: The folder of the tables.
        slides: The rows of ``slides.csv``.
        n_images: Images found.
        n_counted: Images counted now. The others were counted before, or failed.
        n_failed: Images that could not be counted, now or before.
        notes: What a person should know, a sentence each: files that were not counted, images that moved or
            were replaced, settings that differ from the last call, tables that another program holds.
    """

    out: Path
    slides: tuple[SlideSummary, ...]
    n_images: int
    n_counted: int
    n_failed: int
    notes: tuple[str, ...] = ()


def count_folder(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    bundle: Bundle | str | os.PathLike[str] | None = None,
    cell_diameter_px: float | None = None,
    um_per_px: float | None = None,
    edges: str = "all",
    cells: bool = False,
    threads: int = 0,
) -> FolderResult:
    """Counts every image of a folder and writes the tables, as `rbc-edge run` does.

    A second call counts only images that are new or changed. An image that cannot be counted is a failed row,
    and the others are counted. The source is never written to.

    Args:
        source: A folder with one sub-folder for each slide, or images, or several of both.
        out: Folder for the tables. Made when missing. Not inside the source.
        bundle: The models, or their folder. None: those that ship with rbc-edge.
        cell_diameter_px: Diameter of a red cell, pixels. Give this, or `um_per_px`, or neither: then it is
            estimated for each slide.
        um_per_px: Micrometres in a pixel.
        edges: Cells at the image border: ``all`` counts them, ``two-sides`` leaves out those that touch the
            right or lower border, ``inside`` leaves out all that touch a border.
        cells: Also write a table of cells for each slide.
        threads: Images counted at the same time. 0 chooses for this machine.

    Returns:
        The slides, and numbers of images.

    Raises:
        BundleError: The bundle is missing or not intact.
        UnavailableError: Source or output cannot be used.
        UsageError: An argument is impossible, or the output folder lies inside the source.
    """
    if edges not in list(EdgeRule):
        raise UsageError(f"edges {edges!r} is unknown", f"use one of {', '.join(EdgeRule)}")
    paths = [source] if isinstance(source, str | os.PathLike) else source
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(None if bundle is None else Path(bundle))
    options = CountOptions(
        out=Path(out),
        recipe=AnalyzerRecipe.of(opened, threads=threads),
        scale=given_scale(cell_diameter_px=cell_diameter_px, um_per_px=um_per_px),
        workers=threads or default_threads(),
        views=ViewOptions(edges=EdgeRule(edges), cells=cells),
    )
    done = count_once([Path(path) for path in paths], options)
    notes = (*done.notes, *done.troubled.values(), *done.held)
    return FolderResult(
        options.out,
        tuple(done.slides),
        done.n_images,
        done.n_counted,
        done.n_failed,
        tuple(map(one_line, notes)),
    )

"""From the settings to how images are counted, by a run, a service and a sandbox."""

import os
from functools import partial

from rbc_edge.config import Loaded, Settings
from rbc_edge.station.job import AnalyzerRecipe, share_one_heap
from rbc_edge.station.sandbox import survives
from rbc_edge.station.session import CountOptions
from rbc_edge.store.queries import Reader
from rbc_edge.views import tables
from rbc_edge.views.csv_form import CsvForm
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision import quiet_opencv
from rbc_edge.vision.analyzer import default_threads, given_scale
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import EdgeRule


def prepare_process() -> None:
    """Settings of a process that is ours. As a library we leave the host program alone."""
    quiet_opencv()
    share_one_heap()


def count_options(settings: Settings) -> CountOptions:
    """Returns how images are counted with these settings. Raises `UsageError` without an output folder."""
    out = settings.out_folder()
    bundle = Bundle.open(settings.bundle)
    return CountOptions(
        out=out,
        recipe=AnalyzerRecipe.of(bundle, threads=settings.threads, precision=settings.precision),
        scale=given_scale(cell_diameter_px=settings.cell_diameter, um_per_px=settings.um_per_px),
        slide_pattern=settings.slide_pattern,
        ignore=settings.ignore,
        workers=settings.threads or default_threads(),
        views=ViewOptions(
            edges=EdgeRule(settings.edges),
            cells=settings.cells,
            form=CsvForm.of(os.environ, excel=settings.excel),
            overlays=settings.overlays,
            longest_px=settings.overlay_px,
            overlay_shapes=settings.overlay_shapes,
            reports=settings.report,
            manifest=bundle.manifest,
        ),
        # In the folder of the results: where counts have room, a trial has.
        sandbox=partial(survives, options=_sandbox_options(settings), folder=out),
    )


def edges_of(loaded: Loaded, reader: Reader) -> EdgeRule:
    """Returns the rule for the border: that of the settings, or else that of the tables of the folder."""
    rule = loaded.settings.edges
    kept = tables.edges_of(reader) if loaded.source["edges"] == "default" else None
    return EdgeRule(kept or rule)


def _sandbox_options(settings: Settings) -> tuple[str, ...]:
    """Returns the options of ``run`` that count as these settings do."""
    options = ["--threads", str(settings.threads), "--precision", settings.precision]
    if settings.bundle is not None:
        options += ["--bundle", str(settings.bundle)]
    if settings.cell_diameter_px is not None:
        options += ["--cell-diameter", str(settings.cell_diameter_px)]
    return tuple(options)

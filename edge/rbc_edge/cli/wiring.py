"""From the settings to the options of a run, a service and a sandbox."""

import os
from functools import partial
from pathlib import Path

from rbc_edge.config import Settings
from rbc_edge.errors import UsageError
from rbc_edge.station.job import AnalyzerRecipe, share_one_heap
from rbc_edge.station.prometheus import check_metrics
from rbc_edge.station.sandbox import survives
from rbc_edge.station.service import WatchOptions
from rbc_edge.station.session import CountOptions
from rbc_edge.values import Scale, ScaleSource
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision import quiet_opencv
from rbc_edge.vision.analyzer import default_threads
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
    scale = None
    if settings.cell_diameter_px is not None:
        source = ScaleSource.CELL_DIAMETER if settings.um_per_px is None else ScaleSource.UM_PER_PX
        scale = Scale(settings.cell_diameter_px, source)
    return CountOptions(
        out=out,
        recipe=AnalyzerRecipe.of(bundle, threads=settings.threads, precision=settings.precision),
        scale=scale,
        slide_pattern=settings.slide_pattern,
        workers=settings.threads or default_threads(),
        views=ViewOptions(
            edges=EdgeRule(settings.edges),
            cells=settings.cells,
            overlays=settings.overlays,
            longest_px=settings.overlay_px,
            reports=settings.report,
            manifest=bundle.manifest,
        ),
        sandbox=partial(survives, options=_sandbox_options(settings)),
    )


def _sandbox_options(settings: Settings) -> tuple[str, ...]:
    """Returns the options of ``run`` that count as these settings do."""
    options = ["--threads", str(settings.threads), "--precision", settings.precision]
    if settings.bundle is not None:
        options += ["--bundle", str(settings.bundle)]
    if settings.cell_diameter_px is not None:
        options += ["--cell-diameter", str(settings.cell_diameter_px)]
    return tuple(options)


def watch_options(settings: Settings) -> WatchOptions:
    """Returns how a service counts with these settings. Raises `UsageError` where one is missing."""
    if settings.source is None:
        raise UsageError("no source folder", "give SOURCE, or set source in the settings file")
    if settings.prometheus is not None:
        check_metrics(settings.prometheus)
    source = Path(os.path.abspath(settings.source))  # noqa: PTH100 -- resolve() would rename linked slides
    return WatchOptions(
        source=source,
        counting=count_options(settings),
        marker=settings.marker,
        settle_s=settings.settle_s,
        grace_s=settings.grace_s,
        scan_every_s=settings.scan_every_s,
        min_free_bytes=int(settings.min_free_mb * 1e6),
        polling=settings.polling,
        metrics=settings.prometheus,
    )

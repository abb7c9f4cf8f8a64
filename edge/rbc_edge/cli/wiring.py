"""From the settings to the station: what a run, a service and a sandbox are made with."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rbc_edge.config import Settings
from rbc_edge.errors import UsageError
from rbc_edge.station.job import AnalyzerRecipe, share_one_heap
from rbc_edge.station.prometheus import check_metrics
from rbc_edge.station.sandbox import survives
from rbc_edge.station.service import PATIENCE_S, WatchOptions, run_forever
from rbc_edge.station.session import CountOptions, Step, Summary, count_once
from rbc_edge.station.source import WakeEvent
from rbc_edge.station.stop import Stop
from rbc_edge.station.systemd import Systemd
from rbc_edge.values import Scale, ScaleSource
from rbc_edge.views.refresh import ViewOptions
from rbc_edge.vision import quiet_opencv
from rbc_edge.vision.analyzer import default_threads
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.counting import EdgeRule


def count(
    settings: Settings, paths: Sequence[Path], out: Path, *, force: bool, on_step: Callable[[Step], None]
) -> Summary:
    """Counts images once, as ``run`` does. A signal ends it early.

    Args:
        settings: The settings.
        paths: Folders and images.
        out: Folder for the results.
        force: Count again what was counted before.
        on_step: Called for each image.

    Returns:
        What was done.
    """
    _prepare_process()
    options = _count_options(settings, out, force=force, max_failures=settings.max_failures)
    stop = Stop()
    with stop.on_signals():
        return count_once(paths, options, on_step=on_step, stop=stop)


def count_forever(
    settings: Settings, reload: Callable[[], Settings], *, once: bool, systemd: Systemd
) -> tuple[int, bool]:
    """Counts what arrives in the source, as ``watch`` does, until a signal ends it.

    Args:
        settings: The settings.
        reload: Reads the settings again.
        once: Stop when everything that is there is counted.
        systemd: The service manager.

    Returns:
        The exit code, and whether a thread may still be busy with an image.
    """
    _prepare_process()
    wake = WakeEvent()
    stop = Stop(patience_s=PATIENCE_S, on_ask=wake.wake)
    with stop.on_signals():
        code = run_forever(
            _watch_options(settings),
            once=once,
            reload=lambda: _watch_options(reload()),
            stop=stop,
            wake=wake,
            systemd=systemd,
        )
    return code, stop.is_late


def _prepare_process() -> None:
    """Settings of a process that is ours. As a library we leave the host program alone."""
    quiet_opencv()
    share_one_heap()


def _count_options(
    settings: Settings, out: Path, *, force: bool = False, max_failures: int | None = None
) -> CountOptions:
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
        force=force,
        max_failures=max_failures,
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


def _watch_options(settings: Settings) -> WatchOptions:
    if settings.source is None:
        raise UsageError("no source folder", "give SOURCE, or set source in the settings file")
    if settings.out is None:
        raise UsageError("no output folder", "give --out DIR, or set out in the settings file")
    if settings.prometheus is not None:
        check_metrics(settings.prometheus)
    source = Path(os.path.abspath(settings.source))  # noqa: PTH100 -- resolve() would rename linked slides
    return WatchOptions(
        source=source,
        counting=_count_options(settings, settings.out),
        marker=settings.marker,
        settle_s=settings.settle_s,
        grace_s=settings.grace_s,
        scan_every_s=settings.scan_every_s,
        min_free_bytes=int(settings.min_free_mb * 1e6),
        polling=settings.polling,
        metrics=settings.prometheus,
    )

"""From the settings to the station: what a run, a service and a sandbox are made with."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rbc_edge.config import Settings
from rbc_edge.errors import UsageError
from rbc_edge.station.prometheus import check_metrics
from rbc_edge.station.runner import RunOptions, RunSummary, Step, Stop, run_once
from rbc_edge.station.sandbox import survives
from rbc_edge.station.source import Doorbell
from rbc_edge.station.systemd import Systemd
from rbc_edge.station.watch import PATIENCE_S, WatchOptions, run_forever
from rbc_edge.values import Scale, ScaleSource
from rbc_edge.views.refresh import PictureOptions
from rbc_edge.vision.analyzer import Analyzer, default_threads
from rbc_edge.vision.bundle import Bundle, Manifest
from rbc_edge.vision.counting import EdgeRule


def count_once(
    settings: Settings, paths: Sequence[Path], out: Path, *, force: bool, on_step: Callable[[Step], None]
) -> RunSummary:
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
    bundle = _bundle(settings)
    options = _run_options(settings, paths, out, bundle.manifest, force=force)
    in_sandbox = _sandbox_options(settings)
    stop = Stop()
    with stop.on_signals():
        return run_once(
            options,
            bundle.counts_as(settings.precision),
            lambda: _analyzer(bundle, settings),
            on_step=on_step,
            stop=stop,
            survives=lambda suspects: survives(
                suspects, options=in_sandbox, keep_going=lambda: stop.signal is None
            ),
        )


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
    doorbell = Doorbell()
    stop = Stop(patience_s=PATIENCE_S, on_ask=doorbell.ring)
    with stop.on_signals():
        code = run_forever(
            _watch_options(settings),
            once=once,
            reload=lambda: _watch_options(reload()),
            stop=stop,
            doorbell=doorbell,
            systemd=systemd,
        )
    return code, stop.is_late


def _bundle(settings: Settings) -> Bundle:
    opened = Bundle.open(settings.bundle)
    opened.networks(settings.precision)  # raises when the bundle has none of this precision
    return opened


def _analyzer(bundle: Bundle, settings: Settings) -> Analyzer:
    return Analyzer(bundle, threads=settings.threads, precision=settings.precision)


def _run_options(
    settings: Settings, paths: Sequence[Path], out: Path, manifest: Manifest, *, force: bool
) -> RunOptions:
    scale = None
    if settings.cell_diameter_px is not None:
        source = ScaleSource.CELL_DIAMETER if settings.um_per_px is None else ScaleSource.UM_PER_PX
        scale = Scale(settings.cell_diameter_px, source)
    return RunOptions(
        paths=tuple(paths),
        out=out,
        scale=scale,
        slide_pattern=settings.slide_pattern,
        edges=EdgeRule(settings.edges),
        cells=settings.cells,
        force=force,
        max_failures=settings.max_failures,
        workers=settings.threads or default_threads(),
        pictures=PictureOptions(settings.overlays, settings.overlay_px, settings.report, manifest),
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
    bundle = _bundle(settings)
    source = Path(os.path.abspath(settings.source))  # noqa: PTH100 -- resolve() would rename linked slides
    return WatchOptions(
        source=source,
        counting=replace(
            _run_options(settings, [source], settings.out, bundle.manifest, force=False), max_failures=None
        ),
        bundle_id=bundle.counts_as(settings.precision),
        make_analyzer=lambda: _analyzer(bundle, settings),
        trial_options=_sandbox_options(settings),
        marker=settings.marker,
        settle_s=settings.settle_s,
        grace_s=settings.grace_s,
        scan_every_s=settings.scan_every_s,
        min_free_bytes=int(settings.min_free_mb * 1e6),
        polling=settings.polling,
        metrics=settings.prometheus,
    )

"""The command line: parsing, printing, exit codes. No decision about images is made here.

The heavy imports are inside the commands: ``rbc-edge --help`` needs no numpy.
"""
# ruff: noqa: PLC0415  imports inside the commands, see above; typer makes options of arguments

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rbc_edge.errors import ExitCode, RbcEdgeError, UsageError
from rbc_edge.vision import quiet_opencv

if TYPE_CHECKING:
    from rbc_edge.config import Loaded, Settings
    from rbc_edge.station.runner import RunOptions, RunSummary, Step
    from rbc_edge.station.watch import WatchOptions
    from rbc_edge.views.tables import SlideSummary
    from rbc_edge.vision.bundle import Manifest

log = logging.getLogger("rbc_edge")

app = typer.Typer(
    name="rbc-edge",
    help="Counts red blood cells in smear images and tells single from overlapping cells.\n\n"
    "Not a medical device.",
    epilog="Exit codes: 0 all done, 1 unexpected, 2 usage or configuration, 3 done but some images failed,"
    " 4 bundle missing or not intact, 5 source or output not available, 130/143 stopped by a signal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bundle_app = typer.Typer(help="Show or check the models the station counts with.", no_args_is_help=True)
config_app = typer.Typer(help="Begin, show or check the settings.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")
app.add_typer(config_app, name="config")

BundleOption = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="DIR", help="Bundle to count with.  [default: the one shipped]"),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Settings file (TOML).  [default: the user's, then /etc's]"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Images counted at the same time, a thread each; 0: as many as cores, at most 4.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="[int8|fp32]", help="Which of the bundle's detectors counts.  [default: int8]"
    ),
]

OutOption = Annotated[
    Path | None,
    # Whether it can be read is for those who use it to say: they know the exit code.
    typer.Option(
        "--out", "-o", metavar="DIR", help="Folder for tables and ledger; required.", readable=False
    ),
]
CellsOption = Annotated[
    bool | None, typer.Option("--cells/--no-cells", help="Also write a table of cells by slide.")
]
OverlaysOption = Annotated[
    bool | None,
    typer.Option("--overlays/--no-overlays", help="Also draw every field with its cells outlined."),
]
OverlayPxOption = Annotated[
    int | None,
    typer.Option(
        "--overlay-px",
        metavar="PX",
        help="Longest side of such a picture; 0: as large as the image.  [default: 2048]",
    ),
]
ReportOption = Annotated[
    bool | None,
    typer.Option("--report/--no-report", help="Also write a page by slide, with pictures, to look at."),
]
EdgesOption = Annotated[
    str | None,
    typer.Option(
        "--edges",
        metavar="[all|two-sides|inside]",
        help="Which cells at the border count; two-sides: not those at the right and lower border."
        "  [default: all]",
    ),
]
CellDiameterOption = Annotated[
    float | None,
    typer.Option(
        "--cell-diameter",
        metavar="PX",
        help="Diameter of a red cell in pixels.  [default: estimated by slide]",
    ),
]
UmPerPxOption = Annotated[
    float | None,
    typer.Option("--um-per-px", metavar="UM", help="Micrometres per pixel; a red cell is taken as 7.5 um."),
]
SlidePatternOption = Annotated[
    str | None,
    typer.Option(
        "--slide-pattern",
        metavar="REGEX",
        help="Finds the slide in the file name: group 'slide', optionally group 'fov'.",
    ),
]
QuietOption = Annotated[bool | None, typer.Option("--quiet", "-q", help="Print errors only.")]


def _version(asked: bool) -> None:
    if not asked:
        return
    from rbc_edge import __version__
    from rbc_edge.vision.bundle import claimed_id

    try:
        folder = _settings({}, None).settings.bundle
    except UsageError:  # whoever asks for the version may be looking for what is wrong
        folder = None
    bundle_id = claimed_id(folder)
    print(f"rbc-edge {__version__}, {f'bundle {bundle_id}' if bundle_id else 'no bundle'}")
    raise typer.Exit()


@app.callback()
def _program(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and the bundle's."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:\n\n"
    "rbc-edge run /camera --out /results\n\n"
    "rbc-edge run day1.tif day2.tif --out results --um-per-px 0.1 --cells\n\n"
    "rbc-edge run /camera --out /results --slide-pattern '(?P<slide>[^_]+)_(?P<fov>[0-9]+)'"
)
def run(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Folders (a sub-folder is a slide) and images.",
            show_default=False,
            readable=False,
        ),
    ],
    out: OutOption = None,
    cells: CellsOption = None,
    overlays: OverlaysOption = None,
    overlay_px: OverlayPxOption = None,
    report: ReportOption = None,
    edges: EdgesOption = None,
    cell_diameter: CellDiameterOption = None,
    um_per_px: UmPerPxOption = None,
    slide_pattern: SlidePatternOption = None,
    bundle: BundleOption = None,
    threads: ThreadsOption = None,
    precision: PrecisionOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = None,
    force: Annotated[bool, typer.Option("--force", help="Count again what was counted before.")] = False,
    max_failures: Annotated[
        int | None, typer.Option("--max-failures", metavar="N", help="Stop after N failed images.")
    ] = None,
    config: ConfigOption = None,
    verbose: Annotated[
        bool | None, typer.Option("--verbose", "-v", help="A line an image; tracebacks of errors.")
    ] = None,
) -> None:
    """Count every image of the PATHs once.

    Writes a table by slide, slides.csv, and the ledger they come from into --out. Run it again, also after
    a crash, and it goes on: what was counted stays, what changed is counted again, nothing counts twice.
    The images' folder is never written to.
    """
    loaded = _settings(
        {
            "out": out,
            "bundle": bundle,
            "threads": threads,
            "precision": precision,
            "cell_diameter": cell_diameter,
            "um_per_px": um_per_px,
            "slide_pattern": slide_pattern,
            "edges": edges,
            "cells": cells,
            "overlays": overlays,
            "overlay_px": overlay_px,
            "report": report,
            "max_failures": max_failures,
            "quiet": quiet,
            "verbose": verbose,
        },
        config,
    )
    settings = loaded.settings
    if settings.out is None:
        raise UsageError("no output folder", "give --out DIR")
    bar = _Bar(shown=not settings.quiet and not settings.verbose and sys.stderr.isatty())
    _log_to_stderr(settings.verbose, settings.quiet, bar)

    from rbc_edge.station.runner import Stop, run_once
    from rbc_edge.station.sandbox import survives
    from rbc_edge.vision.analyzer import Analyzer
    from rbc_edge.vision.bundle import Bundle

    opened = Bundle.open(settings.bundle)
    opened.networks(settings.precision)  # or say now that it has none
    options = _run_options(settings, paths, settings.out, opened.manifest, force=force)
    trial_options = _trial_options(settings)
    stop = Stop()
    with stop.on_signals(), bar:
        summary = run_once(
            options,
            opened.counts_as(settings.precision),
            lambda: Analyzer(opened, threads=settings.threads, precision=settings.precision),
            on_step=lambda step: _report_step(step, bar),
            stop=stop,
            survives=lambda suspects: survives(
                suspects, options=trial_options, keep_going=lambda: stop.signal is None
            ),
        )
    if json_output:
        _print_json(_run_json(summary, settings.out))
    elif not settings.quiet:
        _print_run(summary, settings.out)
        if settings.report:
            from rbc_edge.text import path_text

            index = settings.out / "reports" / "index.html"
            if index.exists():  # else a signal, or a warning, said why not
                print(f"Open {path_text(index)} to look at them")
    raise typer.Exit(summary.exit_code)


@app.command(
    epilog="Examples:\n\n"
    "rbc-edge watch /camera --out /results\n\n"
    "rbc-edge watch --config /etc/rbc-edge/config.toml\n\n"
    "rbc-edge watch /mnt/share --out /results --marker .station --once"
)
def watch(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="SOURCE",
            help="The camera's folder; a sub-folder is a slide.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    out: OutOption = None,
    once: Annotated[bool, typer.Option("--once", help="Count what is there, and end.")] = False,
    cells: CellsOption = None,
    overlays: OverlaysOption = None,
    overlay_px: OverlayPxOption = None,
    report: ReportOption = None,
    edges: EdgesOption = None,
    cell_diameter: CellDiameterOption = None,
    um_per_px: UmPerPxOption = None,
    slide_pattern: SlidePatternOption = None,
    bundle: BundleOption = None,
    threads: ThreadsOption = None,
    precision: PrecisionOption = None,
    marker: Annotated[
        str | None,
        typer.Option(
            "--marker", metavar="NAME", help="A file in SOURCE without which the share is not mounted."
        ),
    ] = None,
    settle_s: Annotated[
        float | None,
        typer.Option("--settle-s", metavar="S", help="Take a file unchanged for so long.  [default: 2]"),
    ] = None,
    grace_s: Annotated[
        float | None,
        typer.Option(
            "--grace-s", metavar="S", help="Fail an unfinished file unchanged for so long.  [default: 120]"
        ),
    ] = None,
    scan_every_s: Annotated[
        float | None,
        typer.Option("--scan-every-s", metavar="S", help="Scan SOURCE at least so often.  [default: 10]"),
    ] = None,
    min_free_mb: Annotated[
        float | None,
        typer.Option(
            "--min-free-mb", metavar="MB", help="Pause while the results' disk has less.  [default: 200]"
        ),
    ] = None,
    polling: Annotated[
        bool | None,
        typer.Option(
            "--polling/--events", help="Without, or with events.  [default: as the file system needs]"
        ),
    ] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option("--prometheus", metavar="FILE", help="Text file of metrics to keep up to date."),
    ] = None,
    quiet: QuietOption = None,
    config: ConfigOption = None,
    verbose: Annotated[
        bool | None, typer.Option("--verbose", "-v", help="Say more; tracebacks of errors.")
    ] = None,
) -> None:
    """Count every image that comes into SOURCE, for years.

    An image is taken when its writer has finished it. It may be killed at any moment, the share may vanish
    and the disk may fill up: every image is counted once. SIGTERM ends it after the image in hand, SIGHUP
    reads the settings again. `rbc-edge status` tells how things are.
    """
    from rbc_edge.errors import ExitCode
    from rbc_edge.station.systemd import Systemd

    flags = {
        "source": source,
        "out": out,
        "bundle": bundle,
        "threads": threads,
        "precision": precision,
        "cell_diameter": cell_diameter,
        "um_per_px": um_per_px,
        "slide_pattern": slide_pattern,
        "edges": edges,
        "cells": cells,
        "overlays": overlays,
        "overlay_px": overlay_px,
        "report": report,
        "marker": marker,
        "settle_s": settle_s,
        "grace_s": grace_s,
        "scan_every_s": scan_every_s,
        "min_free_mb": min_free_mb,
        "polling": polling,
        "prometheus": prometheus,
        "quiet": quiet,
        "verbose": verbose,
    }
    systemd = Systemd()
    settings = _settings(flags, config).settings
    _log_to_stderr(settings.verbose, settings.quiet, _Bar(shown=False), service=True)

    from rbc_edge.station.runner import Stop
    from rbc_edge.station.source import Doorbell
    from rbc_edge.station.watch import PATIENCE_S, run_forever

    doorbell = Doorbell()
    stop = Stop(patience_s=PATIENCE_S, on_ask=doorbell.ring)
    with stop.on_signals():
        code = run_forever(
            _watch_options(settings),
            once=once,
            reload=lambda: _watch_options(_settings(flags, config).settings),
            stop=stop,
            doorbell=doorbell,
            systemd=systemd,
        )
    if stop.is_late:
        # A thread may still be at a huge image; nothing of it lasts, and nobody waits for it.
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(ExitCode(code))


@app.command(epilog="Example:\n\nrbc-edge demo --out demo")
def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where to put it.  [default: a new folder]"),
    ] = None,
    bundle: BundleOption = None,
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which slides are drawn.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Draw a few slides whose truth is known, count them, and print the counts beside the truth."""
    _log_to_stderr(verbose=False, quiet=False, bar=_Bar(shown=False))
    from rbc_edge.ops.demo import run_demo

    raise typer.Exit(run_demo(out, bundle=bundle, threads=threads or 0, seed=seed, json_output=json_output))


@app.command(
    epilog="Examples:\n\nrbc-edge bench\n\nrbc-edge bench /camera/day1 --apply\n\n"
    "sudo rbc-edge bench --write-config /etc/rbc-edge/config.toml"
)
def bench(
    images: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGES",
            help="Folder of your own fields of view.  [default: drawn ones]",
            show_default=False,
            readable=False,
        ),
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(
            "--write-config", metavar="FILE", help="Write what is best into this file.", readable=False
        ),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write it into the settings file in force, or make the user's.")
    ] = False,
    bundle: BundleOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure for a minute how fast this machine counts, and what it counts best with.

    That is a number of threads, and int8 or fp32 where the bundle holds both.
    """
    loaded = _settings({"bundle": bundle}, config)
    if apply and write_config is not None:
        raise UsageError("--apply and --write-config are two ways to say where", "give one of them")
    _log_to_stderr(verbose=False, quiet=False, bar=_Bar(shown=False))

    from rbc_edge.ops import autotune
    from rbc_edge.text import path_text
    from rbc_edge.vision.bundle import Bundle

    file = autotune.settings_file(loaded) if apply else write_config
    if file is not None:
        autotune.check_writable(file)
    opened = Bundle.open(loaded.settings.bundle)
    speeds = autotune.measure(opened, images, say=lambda words: print(words, file=sys.stderr))
    chosen = autotune.best(speeds)
    if json_output:
        _print_json(autotune.as_json(speeds, chosen))
    else:
        print("\n".join(autotune.as_lines(speeds, chosen)))
    if file is not None:
        written = autotune.settings_of(speeds, chosen)
        autotune.write_settings(file, written)
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in written.items())
        print(_one_line(f"{said} written to {path_text(file)}"), file=sys.stderr)


@app.command(epilog="Examples:\n\nrbc-edge status --out /results\n\nrbc-edge status --json")
def status(
    out: OutOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say how the station is: the service, what is counted, what failed and why, the disk.

    Works beside the running service, and without one. Exit 0 when it could be told, 5 when there are no
    results in --out.
    """
    from datetime import UTC, datetime

    from rbc_edge.station.status import status_of

    found = status_of(_out_folder(out, config), now=datetime.now(UTC))
    if json_output:
        _print_json(found.as_json())
    else:
        for line in found.as_lines():
            print(_one_line(line))


@app.command(
    epilog="Examples:\n\nrbc-edge retry --out /results\n\nrbc-edge retry slide7 field3 --out /results"
)
def retry(
    slide: Annotated[
        str | None,
        typer.Argument(metavar="SLIDE", help="Only images of this slide.", show_default=False),
    ] = None,
    fov: Annotated[
        str | None, typer.Argument(metavar="FOV", help="Only this image.", show_default=False)
    ] = None,
    out: OutOption = None,
    config: ConfigOption = None,
) -> None:
    """Have failed images looked at again, by the running service or the next run."""
    from rbc_edge.station.status import read_page
    from rbc_edge.store.ledger import Ledger

    folder = _out_folder(out, config)
    Ledger.reading(folder).close()  # first, for the other way to open one would make it
    with Ledger(folder) as ledger:
        n = ledger.retry(slide, fov)
        ledger.commit()
        failed_slides = [] if n else sorted({row.slide_id for row in ledger.failures(sys.maxsize)})
    running, state = read_page(folder)
    images = f"{n} failed image{'' if n == 1 else 's'}"
    if n == 0:
        asked = "/".join(part for part in (slide, fov) if part is not None)
        print(_one_line(f"no image{f' of {asked}' if asked else ''} has failed; nothing to try again"))
        if failed_slides:
            print(_one_line(f"slides with failed images: {', '.join(failed_slides)}"))
    elif running:
        paused = f", when this is over: {state.activity}" if state and state.activity.is_paused else ""
        print(f"{images} will be tried again by the running service at its next scan{paused}")
    else:
        print(f"{images} will be tried again by the next run, or when the service starts")


@app.command(
    name="report",
    epilog="Examples:\n\nrbc-edge report --out /results --open\n\nrbc-edge report slide7 --out /results",
)
def write_report(
    slides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SLIDE]...", help="Only pages of these slides.", show_default=False),
    ] = None,
    out: OutOption = None,
    images: Annotated[
        int | None,
        typer.Option("--images", metavar="MAX", min=0, help="Most pictures in a page.  [default: 400]"),
    ] = None,
    edges: EdgesOption = None,
    bundle: BundleOption = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    config: ConfigOption = None,
) -> None:
    """Write a page for each slide, with pictures, to look at, and an index of the slides.

    The pages lie in reports/ of --out, and stand alone: copy one to wherever it is to be read. Works beside
    the running service. Prints where the pages are.
    """
    _log_to_stderr(verbose=False, quiet=False, bar=_Bar(shown=False))
    from rbc_edge.errors import BundleError
    from rbc_edge.store.ledger import Ledger
    from rbc_edge.text import path_text
    from rbc_edge.views.report import IMAGES, Reports
    from rbc_edge.views.tables import EDGES_NOTE
    from rbc_edge.vision.bundle import Bundle
    from rbc_edge.vision.counting import EdgeRule

    loaded = _settings({"out": out, "edges": edges, "bundle": bundle}, config)
    if loaded.settings.out is None:
        raise UsageError("no output folder", "give --out DIR")
    manifest = None
    try:
        manifest = Bundle.open(loaded.settings.bundle).manifest
    except BundleError as error:
        log.warning("the thresholds cannot be shown: %s", error)
    with Ledger.reading(loaded.settings.out) as ledger:
        rule = loaded.settings.edges
        if loaded.source["edges"] == "default":  # as the tables beside it
            rule = ledger.note(EDGES_NOTE) or rule
        reports = Reports(
            loaded.settings.out,
            ledger,
            edges=EdgeRule(rule),
            images=IMAGES if images is None else images,
            manifest=manifest,
        )
        pages = reports.write(slides or None)
    for page in [*pages, reports.index]:
        print(path_text(page))
    if open_it:
        import webbrowser

        if not webbrowser.open((pages[0] if len(pages) == 1 else reports.index).absolute().as_uri()):
            log.warning("no browser could be started; open the page yourself")


@app.command(
    epilog="Examples:\n\n"
    "rbc-edge doctor --out /results\n\n"
    "rbc-edge doctor /camera --out /results --json\n\n"
    "runuser -u rbc-edge -- rbc-edge doctor --config /etc/rbc-edge/config.toml\n\n"
    "rbc-edge doctor --out /results --bundle-support report.zip"
)
def doctor(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SOURCE", help="The camera's folder.", show_default=False, readable=False),
    ] = None,
    out: OutOption = None,
    bundle: BundleOption = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
    bundle_support: Annotated[
        Path | None,
        typer.Option(
            "--bundle-support",
            metavar="FILE",
            help="Also write a zip file for a bug report, without images, names or paths.",
        ),
    ] = None,
) -> None:
    """Look for what may keep the station from counting: computer, settings, bundle, folders, service.

    Each line is ok, a warning or failed, with what to do. Nothing is changed. Exit 0 when nothing failed;
    else 2 for settings, 4 for the bundle, 5 for folders and service.
    """
    from rbc_edge.ops.doctor import examine

    diagnosis = examine({"source": source, "out": out, "bundle": bundle}, file=config)
    contents: list[tuple[str, str]] = []
    if bundle_support is not None:
        from rbc_edge.ops import support_archive

        contents = support_archive.write(bundle_support, diagnosis)
    if json_output:
        _print_json({**diagnosis.as_json(), "support": [name for name, _ in contents]})
    else:
        for line in diagnosis.as_lines():
            print(_one_line(line))
        if bundle_support is not None:
            print(_one_line(f"{bundle_support}: written, with"))
            for name, meaning in contents:
                print(f"  {name:14} {meaning}")
    raise typer.Exit(diagnosis.exit_code)


@bundle_app.command(
    "show", epilog="Examples:\n\nrbc-edge bundle show\n\nrbc-edge bundle show --bundle DIR --json"
)
def bundle_show(bundle: BundleOption = None, json_output: JsonOption = False) -> None:
    """Print what the bundle says of itself; exit 4 when it is not intact."""
    from rbc_edge.vision.bundle import Bundle

    described = Bundle.open(_settings({"bundle": bundle}, None).settings.bundle).describe()
    if json_output:
        _print_json(described)
    else:
        _print_mapping(described)


@bundle_app.command("verify", epilog="Example:\n\nrbc-edge bundle verify")
def bundle_verify(bundle: BundleOption = None, json_output: JsonOption = False) -> None:
    """Check the bundle's files and run its test field on this machine; exit 4 when the cells differ."""
    from dataclasses import asdict

    from rbc_edge.vision.bundle import Bundle
    from rbc_edge.vision.selftest import verify

    settings = _settings({"bundle": bundle}, None).settings
    opened = Bundle.open(settings.bundle)
    test = verify(opened, threads=settings.threads)
    if json_output:
        _print_json({"bundle_id": opened.bundle_id, "verified": True, **asdict(test)})
    else:
        print(
            f"bundle {opened.bundle_id} is intact and sees here what the export saw: {test.n_found} cells of"
            f" {test.n_expected}, boxes within {test.box_error_px:.1f} px,"
            f" scores within {test.score_error:.3f}"
        )


@config_app.command(
    "init",
    epilog="Examples:\n\n"
    "rbc-edge config init\n\n"
    "rbc-edge config init --file station.toml --source /camera --out /results\n\n"
    "rbc-edge config init --file -",
)
def config_init(
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Where to write; - prints it.  [default: the user's settings file]"
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="DIR", help="The camera's folder, to be set in it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="The output folder, to be set in it.", readable=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a settings file in which every key stands with its meaning, commented out.

    Nothing that is there is written over.
    """
    from rbc_edge.config import example, places, write_example

    # Absolute: in the file they would be relative to the file.
    source, out = (None if p is None else Path(os.path.abspath(p)) for p in (source, out))  # noqa: PTH100
    if file == Path("-"):
        print(example(source=source, out=out), end="")
        return
    file = file or places()[0]
    write_example(file, source=source, out=out, force=force)
    print(_one_line(f"{file}: written; `rbc-edge config validate --config {file}` after every change"))


@config_app.command(
    "show", epilog="Examples:\n\nrbc-edge config show\n\nRBC_EDGE_THREADS=1 rbc-edge config show"
)
def config_show(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Print the settings in force and where each comes from: a variable, a file and its line, or default."""
    from dataclasses import asdict

    loaded = _settings({}, config)
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(loaded.settings).items()}
    if json_output:
        _print_json({k: {"value": v, "source": loaded.source[k]} for k, v in values.items()})
        return
    for key, value in values.items():
        shown = "-" if value is None else json.dumps(value, ensure_ascii=False)
        print(f"{key:14} {_one_line(shown):20} {_one_line(loaded.source[key])}")


@config_app.command(
    "validate", epilog="Example:\n\nrbc-edge config validate --config /etc/rbc-edge/config.toml"
)
def config_validate(config: ConfigOption = None) -> None:
    """Check the settings file and the environment; exit 2 when something in them is wrong."""
    from rbc_edge.config import places

    loaded = _settings({}, config)
    none = f"no settings file ({' or '.join(map(str, places()))})"
    print(_one_line(f"{loaded.file or none}: valid"))


def _run_options(
    settings: "Settings", paths: Sequence[Path], out: Path, manifest: "Manifest", *, force: bool
) -> "RunOptions":
    from rbc_edge.station.runner import RunOptions
    from rbc_edge.values import Scale, ScaleSource
    from rbc_edge.views.refresh import PictureOptions
    from rbc_edge.vision.analyzer import default_threads
    from rbc_edge.vision.counting import EdgeRule

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


def _trial_options(settings: "Settings") -> tuple[str, ...]:
    """The options of ``run`` that count as these settings do."""
    options = ["--threads", str(settings.threads), "--precision", settings.precision]
    if settings.bundle is not None:
        options += ["--bundle", str(settings.bundle)]
    if settings.cell_diameter_px is not None:
        options += ["--cell-diameter", str(settings.cell_diameter_px)]
    return tuple(options)


def _watch_options(settings: "Settings") -> "WatchOptions":
    from rbc_edge.station.watch import WatchOptions
    from rbc_edge.vision.analyzer import Analyzer
    from rbc_edge.vision.bundle import Bundle

    if settings.source is None:
        raise UsageError("no source folder", "give SOURCE, or source in the settings file")
    if settings.out is None:
        raise UsageError("no output folder", "give --out DIR, or out in the settings file")
    if settings.prometheus is not None:
        from rbc_edge.station.status import check_metrics

        check_metrics(settings.prometheus)
    opened = Bundle.open(settings.bundle)
    opened.networks(settings.precision)  # or say now that it has none
    source = Path(os.path.abspath(settings.source))  # noqa: PTH100 -- resolve() would rename linked slides
    return WatchOptions(
        source=source,
        counting=replace(
            _run_options(settings, [source], settings.out, opened.manifest, force=False), max_failures=None
        ),
        bundle_id=opened.counts_as(settings.precision),
        make_analyzer=lambda: Analyzer(opened, threads=settings.threads, precision=settings.precision),
        trial_options=_trial_options(settings),
        marker=settings.marker,
        settle_s=settings.settle_s,
        grace_s=settings.grace_s,
        scan_every_s=settings.scan_every_s,
        min_free_bytes=int(settings.min_free_mb * 1e6),
        polling=settings.polling,
        metrics=settings.prometheus,
    )


def _settings(flags: Mapping[str, Any], file: Path | None) -> "Loaded":
    from rbc_edge.config import load

    return load(flags, file=file)


def _out_folder(out: Path | None, config: Path | None) -> Path:
    folder = _settings({"out": out}, config).settings.out
    if folder is None:
        raise UsageError("no output folder", "give --out DIR")
    return folder


# -- printing -------------------------------------------------------------------------------------------


class _Bar:
    """A progress bar on the last line of a terminal; everything else on stderr goes above it."""

    _WIDTH = 30

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._line = ""

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("")

    def step(self, done: int, total: int, what: str) -> None:
        filled = self._WIDTH * done // max(total, 1)
        self._draw(f"{'#' * filled}{'.' * (self._WIDTH - filled)} {done}/{total} {what}")

    def print(self, message: str) -> None:
        line = self._line
        self._draw("")
        print(message, file=sys.stderr, flush=True)
        self._draw(line)

    def _draw(self, line: str) -> None:
        if self._shown and line != self._line:
            import shutil

            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line[:width]}")
            sys.stderr.flush()
            self._line = line


class _ToBar(logging.Handler):
    def __init__(self, bar: _Bar) -> None:
        super().__init__()
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._bar.print(self.format(record))
        except BrokenPipeError:
            raise
        except Exception:  # noqa: BLE001  logging never brings the run down
            self.handleError(record)


def _log_to_stderr(verbose: bool, quiet: bool, bar: _Bar, *, service: bool = False) -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = _ToBar(bar)
    if service:
        handler.setFormatter(_Line())
    log.addHandler(handler)
    usual = logging.INFO if service else logging.WARNING
    log.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else usual)


class _Line(logging.Formatter):
    """A line of a service's log: the journal adds the time, and takes its weight from a prefix."""

    def __init__(self) -> None:
        from rbc_edge.station.systemd import under_journal

        self._journal = under_journal(os.environ)
        super().__init__("%(message)s" if self._journal else "%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        from rbc_edge.station.systemd import journal_prefix

        text = _one_line(super().format(record)) if record.exc_info is None else super().format(record)
        return journal_prefix(record.levelno) + text if self._journal else text


def _report_step(step: "Step", bar: _Bar) -> None:
    row = step.row
    if row is not None and row.status == "failed":
        log.warning("failed (%s): %s", row.failure, _one_line(row.message))
    elif row is not None:
        said = f" ({_one_line(row.message)})" if row.message else ""
        log.info("%s %s/%s%s", row.status, _one_line(row.slide_id), _one_line(row.fov), said)
    bar.step(step.n_done, step.n_total, _one_line(f"{step.file.slide_id}/{step.file.fov}"))


def _one_line(text: str) -> str:
    """Shows control characters and broken ones by escapes: a file name must not steer the terminal."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_NAMED_SLIDES = 8  # a line each; who has a hundred slides wants the table


def _print_run(summary: "RunSummary", out: Path) -> None:
    from rbc_edge.text import path_text

    header = (
        "slide",
        "fields",
        "failed",
        "red cells",
        "single",
        "overlapping",
        "overlap",
        "95 %",
        "white",
        "plt",
    )
    rows = [header, *(_shown_slide(slide) for slide in summary.slides)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    for line in (*_flagged_fields(summary.slides), *_few_fields(summary.slides)):
        print(line)
    print(
        f"{summary.n_images} images: {summary.n_counted} counted now, {summary.n_unchanged} as before,"
        f" {summary.n_duplicates} duplicates, {summary.n_failed} failed. Tables in {path_text(out)}"
    )
    if summary.stopped_by is not None:
        log.warning("stopped by a signal; run the same command again to go on")
    elif summary.gave_up:
        log.warning("stopped after too many failed images (--max-failures)")


def _flagged_fields(slides: Sequence["SlideSummary"]) -> Iterator[str]:
    """Says of which slides somebody should look at fields; the most flagged are named."""
    flagged = sorted((s for s in slides if s.n_fov_flagged), key=lambda s: -s.n_fov_flagged / s.n_fov_ok)
    for slide in flagged[:_NAMED_SLIDES]:
        flags = ", ".join(f"{n} {flag}" for flag, n in slide.flags.items())
        yield (
            f"have a look: {_one_line(slide.slide_id)}: {slide.n_fov_flagged} of {slide.n_fov_ok} fields are"
            f" flagged: {flags}"
        )
    if any(s.flags.get("scale-mismatch", 0) > s.n_fov_ok / 2 for s in flagged):
        yield "the cells are not as large as the scale says; leave it out, and it is estimated"
    if len(flagged) > _NAMED_SLIDES:
        yield f"have a look: {len(flagged) - _NAMED_SLIDES} more slides (--json tells all)"


def _few_fields(slides: Sequence["SlideSummary"]) -> Iterator[str]:
    """Warns of slides whose overlap is anybody's guess, each with what it would take; a few are named."""
    from rbc_edge.vision.statistics import says_little

    unsure = [s for s in slides if s.n_fov_more is not None and says_little(s.overlap_interval)]
    for slide in unsure[:_NAMED_SLIDES]:
        n_rbc, (low, high) = slide.counts.n_rbc if slide.counts else 0, slide.overlap_interval or (0.0, 1.0)
        fields = f"{slide.n_fov_ok} field{'' if slide.n_fov_ok == 1 else 's'}"
        yield (
            f"too few to say: {_one_line(slide.slide_id)}: {fields} with {n_rbc} red cells put the overlap"
            f" anywhere in {low:.0%}-{high:.0%};"
            f" about {slide.n_fov_more} more fields make it sure to 2 points"
        )
    if len(unsure) > _NAMED_SLIDES:
        yield f"too few to say: {len(unsure) - _NAMED_SLIDES} more slides (--json tells all)"


def _shown_slide(slide: "SlideSummary") -> tuple[str, ...]:
    counts, interval = slide.counts, slide.overlap_interval
    fraction = counts.overlap_fraction if counts else None
    return (
        _one_line(slide.slide_id),
        str(slide.n_fov_ok),
        str(slide.n_fov_failed),
        *(map(str, (counts.n_rbc, counts.n_rbc_single, counts.n_rbc_overlapping)) if counts else ("-",) * 3),
        "-" if fraction is None else f"{fraction:.1%}",
        "-" if interval is None else f"{interval[0]:.1%}-{interval[1]:.1%}",
        *(map(str, (counts.n_wbc, counts.n_platelets)) if counts else ("-",) * 2),
    )


def _run_json(summary: "RunSummary", out: Path) -> dict[str, object]:
    from rbc_edge.text import path_text

    return {
        "out": path_text(out),
        "exit_code": summary.exit_code,
        "n_images": summary.n_images,
        "n_counted": summary.n_counted,
        "n_unchanged": summary.n_unchanged,
        "n_duplicates": summary.n_duplicates,
        "n_failed": summary.n_failed,
        "slides": [_slide_json(slide) for slide in summary.slides],
    }


def _slide_json(slide: "SlideSummary") -> dict[str, object]:
    from rbc_edge.vision.statistics import says_little

    counts = slide.counts
    low, high = slide.overlap_interval or (None, None)
    return {
        "slide_id": slide.slide_id,
        "n_fov_ok": slide.n_fov_ok,
        "n_fov_failed": slide.n_fov_failed,
        "n_fov_flagged": slide.n_fov_flagged,
        "quality_flags": dict(slide.flags),
        "n_rbc": counts.n_rbc if counts else None,
        "n_rbc_single": counts.n_rbc_single if counts else None,
        "n_rbc_overlapping": counts.n_rbc_overlapping if counts else None,
        "overlap_fraction": counts.overlap_fraction if counts else None,
        "overlap_low": low,
        "overlap_high": high,
        "too_few_fields": says_little(slide.overlap_interval),
        "n_fov_more_for_2_points": slide.n_fov_more,
        "n_wbc": counts.n_wbc if counts else None,
        "n_platelets": counts.n_platelets if counts else None,
        "n_rbc_per_fov_mean": slide.n_rbc_per_fov_mean,
        "n_rbc_per_fov_sd": slide.n_rbc_per_fov_sd,
        "first_captured_at": slide.first_captured_at or None,
        "last_captured_at": slide.last_captured_at or None,
        "bundle_ids": list(slide.bundle_ids),
    }


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _print_mapping(values: Mapping[str, object], indent: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            print(f"{indent}{key}:")
            _print_mapping(value, indent + "  ")
        elif isinstance(value, Iterable) and not isinstance(value, str):
            print(f"{indent}{key}: {', '.join(map(str, value))}")
        else:
            print(f"{indent}{key}: {value}")


# -- the way out ----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and ends the process with its exit code.

    The only place where errors become messages and exit codes.

    Args:
        arguments: What follows the program's name; None: the process's.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name no terminal can show must not end the run
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    quiet_opencv()
    try:
        app(arguments, prog_name="rbc-edge")
    except RbcEdgeError as error:
        print(f"rbc-edge: {_one_line(error.message)}", file=sys.stderr)
        if error.advice:
            print(f"  {_one_line(error.advice)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:  # noqa: BLE001  the last resort
        if {"--verbose", "-v"} & set(given):
            import traceback

            traceback.print_exc()
        print(
            f"rbc-edge: unexpected {type(error).__name__}: {_one_line(str(error))}. This is a bug; run again"
            " with --verbose and report what it prints.",
            file=sys.stderr,
        )
        sys.exit(ExitCode.UNEXPECTED)
    sys.exit(ExitCode.OK)


if __name__ == "__main__":
    main()

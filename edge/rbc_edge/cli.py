"""The command line: parsing, printing, exit codes. No decision about images is made here.

The heavy imports are inside the commands: ``rbc-edge --help`` needs no numpy.
"""
# ruff: noqa: PLC0415  imports inside the commands, see above; typer makes options of arguments

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rbc_edge import __version__
from rbc_edge.errors import ExitCode, RbcEdgeError, UsageError

if TYPE_CHECKING:
    from rbc_edge.config import Loaded
    from rbc_edge.runner import RunSummary, Step
    from rbc_edge.tables import SlideSummary

log = logging.getLogger("rbc_edge")

app = typer.Typer(
    name="rbc-edge",
    help="Counts red blood cells in smear images and tells single from overlapping cells.\n\n"
    "Not a medical device.",
    epilog="Exit codes: 0 all done, 1 unexpected, 2 usage or configuration, 3 done but some images failed,"
    " 4 bundle missing or not intact, 5 source or output not available, 130/143 stopped by a signal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bundle_app = typer.Typer(help="Show or check the models the station counts with.", no_args_is_help=True)
config_app = typer.Typer(help="Show or check the settings.", no_args_is_help=True)
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
    typer.Option("--threads", metavar="N", help="Threads of the networks; 0: as the processor has."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"rbc-edge {__version__}")
        raise typer.Exit()


@app.callback()
def _program(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
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
            metavar="PATH", help="Folders (a sub-folder is a slide) and images.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for tables and ledger; required."),
    ] = None,
    cells: Annotated[
        bool | None, typer.Option("--cells/--no-cells", help="Also write a table of cells by slide.")
    ] = None,
    edges: Annotated[
        str | None,
        typer.Option(
            "--edges",
            metavar="[all|two-sides|inside]",
            help="Which cells at the border count; two-sides: not those at the right and lower border."
            "  [default: all]",
        ),
    ] = None,
    cell_diameter: Annotated[
        float | None,
        typer.Option(
            "--cell-diameter",
            metavar="PX",
            help="Diameter of a red cell in pixels.  [default: estimated by slide]",
        ),
    ] = None,
    um_per_px: Annotated[
        float | None,
        typer.Option(
            "--um-per-px", metavar="UM", help="Micrometres per pixel; a red cell is taken as 7.5 um."
        ),
    ] = None,
    slide_pattern: Annotated[
        str | None,
        typer.Option(
            "--slide-pattern",
            metavar="REGEX",
            help="Finds the slide in the file name: group 'slide', optionally group 'fov'.",
        ),
    ] = None,
    bundle: BundleOption = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
    quiet: Annotated[bool | None, typer.Option("--quiet", "-q", help="Print errors only.")] = None,
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
            "cell_diameter": cell_diameter,
            "um_per_px": um_per_px,
            "slide_pattern": slide_pattern,
            "edges": edges,
            "cells": cells,
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

    from rbc_edge.analyzer import Analyzer
    from rbc_edge.bundle import Bundle
    from rbc_edge.counting import EdgeRule
    from rbc_edge.runner import RunOptions, Stop, run_once
    from rbc_edge.values import Scale, ScaleSource

    scale = None
    if settings.cell_diameter_px is not None:
        source = ScaleSource.CELL_DIAMETER if settings.um_per_px is None else ScaleSource.UM_PER_PX
        scale = Scale(settings.cell_diameter_px, source)
    options = RunOptions(
        paths=tuple(paths),
        out=settings.out,
        scale=scale,
        slide_pattern=settings.slide_pattern,
        edges=EdgeRule(settings.edges),
        cells=settings.cells,
        force=force,
        max_failures=settings.max_failures,
    )
    opened = Bundle.open(settings.bundle)
    stop = Stop()
    with stop.on_signals(), bar:
        summary = run_once(
            options,
            opened.bundle_id,
            lambda: Analyzer(opened, threads=settings.threads),
            on_step=lambda step: _report_step(step, bar),
            stop=stop,
        )
    if json_output:
        _print_json(_run_json(summary, settings.out))
    elif not settings.quiet:
        _print_run(summary, settings.out)
    raise typer.Exit(summary.exit_code)


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
    from rbc_edge.demo import run_demo

    raise typer.Exit(run_demo(out, bundle=bundle, threads=threads or 0, seed=seed, json_output=json_output))


@bundle_app.command("show")
def bundle_show(bundle: BundleOption = None, json_output: JsonOption = False) -> None:
    """Print what the bundle says of itself; exit 4 when it is not intact."""
    from rbc_edge.bundle import Bundle

    described = Bundle.open(_settings({"bundle": bundle}, None).settings.bundle).describe()
    if json_output:
        _print_json(described)
    else:
        _print_mapping(described)


@bundle_app.command("verify")
def bundle_verify(bundle: BundleOption = None, json_output: JsonOption = False) -> None:
    """Check the bundle's files and run its test field on this machine; exit 4 when the cells differ."""
    from dataclasses import asdict

    from rbc_edge.analyzer import verify
    from rbc_edge.bundle import Bundle

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


@config_app.command("show")
def config_show(config: ConfigOption = None, json_output: JsonOption = False) -> None:
    """Print the settings in force and where each comes from."""
    from dataclasses import asdict

    loaded = _settings({}, config)
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(loaded.settings).items()}
    if json_output:
        _print_json({k: {"value": v, "source": loaded.source[k]} for k, v in values.items()})
        return
    for key, value in values.items():
        shown = "-" if value is None else json.dumps(value, ensure_ascii=False)
        print(f"{key:14} {shown:20} {loaded.source[key]}")


@config_app.command("validate")
def config_validate(config: ConfigOption = None) -> None:
    """Check the settings file and the environment; exit 2 when something in them is wrong."""
    loaded = _settings({}, config)
    print(f"{loaded.file or 'no settings file'}: valid")


def _settings(flags: Mapping[str, Any], file: Path | None) -> "Loaded":
    from rbc_edge.config import load

    return load(flags, file=file)


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


def _log_to_stderr(verbose: bool, quiet: bool, bar: _Bar) -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.addHandler(_ToBar(bar))
    log.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)


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


def _print_run(summary: "RunSummary", out: Path) -> None:
    from rbc_edge.inbox import path_text

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
    print(
        f"{summary.n_images} images: {summary.n_counted} counted now, {summary.n_unchanged} as before,"
        f" {summary.n_duplicates} duplicates, {summary.n_failed} failed. Tables in {path_text(out)}"
    )
    if summary.stopped_by is not None:
        log.warning("stopped by a signal; run the same command again to go on")
    elif summary.gave_up:
        log.warning("stopped after too many failed images (--max-failures)")


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
    from rbc_edge.inbox import path_text

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
    counts = slide.counts
    low, high = slide.overlap_interval or (None, None)
    return {
        "slide_id": slide.slide_id,
        "n_fov_ok": slide.n_fov_ok,
        "n_fov_failed": slide.n_fov_failed,
        "n_rbc": counts.n_rbc if counts else None,
        "n_rbc_single": counts.n_rbc_single if counts else None,
        "n_rbc_overlapping": counts.n_rbc_overlapping if counts else None,
        "overlap_fraction": counts.overlap_fraction if counts else None,
        "overlap_low": low,
        "overlap_high": high,
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

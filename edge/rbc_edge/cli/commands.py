"""The commands: their words and options. What a command does is in its own module, loaded when it is called.

So ``rbc-edge run --help`` needs no numpy. Functions here are declarations: see `options.command`.
"""

from importlib import import_module
from pathlib import Path

import typer

from rbc_edge.cli.options import Given, argument, command, option

app = typer.Typer(
    name="rbc-edge",
    help="Counts red blood cells in images of blood smears, and tells single from overlapping cells.\n\n"
    "Not a medical device.",
    epilog="Exit codes: 0 all done, 1 a bug, 2 wrong usage or settings, 3 done but some images failed,"
    " 4 bundle missing or damaged, 5 source or output not available, 130 or 143 stopped by a signal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bundle_app = typer.Typer(help="Show or check the models that count.", no_args_is_help=True)
config_app = typer.Typer(help="Create, show or check the settings.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")
app.add_typer(config_app, name="config")

JSON = option("--json", "Print JSON on standard output.", False)

SLIDE = argument("SLIDE", "The slide.", ...)
FOVS = argument("FOV", "Only these fields of view.  [default: all of the slide]")
ADOPT = option(
    "--adopt",
    "Use --out although it holds tables or pages of others. They are moved aside, not deleted.",
    False,
)


def _version(asked: bool) -> None:
    if asked:
        import_module("rbc_edge.cli.version").print_version()
        raise typer.Exit()


ABOUT_VERSION = "Print the version of the program and of its bundle."


@app.callback()
def _program(_: bool = option("--version", ABOUT_VERSION, False, callback=_version, is_eager=True)) -> None:
    pass


@command(
    app,
    "rbc-edge run /camera --out /results",
    "rbc-edge run day1.tif day2.tif --out results --um-per-px 0.1 --cells",
    "rbc-edge run /camera --out /results --slide-pattern '(?P<slide>[^_]+)_(?P<fov>[0-9]+)'",
)
def run(
    given: Given,
    paths: list[Path] = argument("PATH", "Images, and folders of images. Each sub-folder is a slide.", ...),
    force: bool = option("--force", "Count all images again, also those counted before.", False),
    adopt: bool = ADOPT,
    json_output: bool = JSON,
) -> None:
    """Count every image in the given folders and files once.

    Writes one table for each slide, the table slides.csv, and the ledger (the database they are made from)
    into --out. Run the same command again to continue, also after a crash: counted images stay, changed
    images are counted again, and no image counts twice. The folder of the images is never written to.
    """


@command(
    app,
    "rbc-edge watch /camera --out /results",
    "rbc-edge watch --config /etc/rbc-edge/config.toml",
    "rbc-edge watch /mnt/share --out /results --marker .station --once",
)
def watch(
    given: Given,
    once: bool = option("--once", "Count the images that are there now, then stop.", False),
    adopt: bool = ADOPT,
) -> None:
    """Count every image that arrives in SOURCE, until it is stopped.

    Made to run for years. An image is counted when it is complete. The program may be killed at any moment,
    the network share may disappear and the disk may fill up: every image is still counted once. SIGTERM
    stops it after the current image. SIGHUP makes it read the settings again. `rbc-edge status` shows its
    state.
    """


@command(app, "rbc-edge demo --out demo", config=False)
def demo(
    given: Given,
    out: Path | None = option(
        "--out -o DIR", "Folder for images, results and a report.  [default: nothing is kept]"
    ),
    seed: int = option("--seed N", "Another number draws other slides.", 0),
    json_output: bool = JSON,
) -> None:
    """Draw slides with a known number of cells, count them, and compare the counts with the truth."""


@command(
    app,
    "rbc-edge bench",
    "rbc-edge bench /camera/day1 --apply",
    "sudo rbc-edge bench --write-config /etc/rbc-edge/config.toml",
)
def bench(
    given: Given,
    images: Path | None = argument("IMAGES", "Folder of your own images.  [default: drawn images]"),
    apply: bool = option(
        "--apply",
        "Write the best settings into the settings file in use. Without one, create the user's.",
        False,
    ),
    write_config: Path | None = option("--write-config FILE", "Write the best settings into this file."),
    json_output: bool = JSON,
) -> None:
    """Measure how fast this computer counts, and which settings are best for it.

    Takes about a minute. Tries several numbers of threads, and int8 and fp32 where the bundle has both.
    """


@command(app, "rbc-edge status --out /results", "rbc-edge status --json")
def status(given: Given, json_output: bool = JSON) -> None:
    """Show the state of the station: the service, the counts, failed images and why, the disk.

    Works while the service runs, and without it. Exit code 0 when the state could be read, 5 when there are
    no results in --out.
    """


@command(app, "rbc-edge retry --out /results", "rbc-edge retry slide7 field3 --out /results")
def retry(
    given: Given,
    slide: str | None = argument("SLIDE", "Only images of this slide."),
    fov: str | None = argument("FOV", "Only this image (its field of view)."),
) -> None:
    """Let the running service, or the next run, try failed images again."""


@command(
    app,
    "rbc-edge forget slide7 --out /results",
    "rbc-edge forget slide7 field3 field4 --out /results",
    "rbc-edge forget slide7 --undo --out /results",
)
def forget(
    given: Given,
    slide: str = SLIDE,
    fovs: list[str] | None = FOVS,
    undo: bool = option("--undo", "Take what was forgotten back into the results.", False),
) -> None:
    """Take fields of view out of the results, for example of images that were deleted.

    They are in no table then, also while their files are still in the source. The ledger keeps the counts,
    for --undo. Works while the service runs.
    """


@command(
    app,
    "rbc-edge exclude slide7 field3 --reason 'out of focus' --out /results",
    "rbc-edge exclude slide7 field3 --undo --out /results",
)
def exclude(
    given: Given,
    slide: str = SLIDE,
    fovs: list[str] | None = FOVS,
    reason: str = option("--reason TEXT", "Why, for the column reason of the table.", ""),
    undo: bool = option("--undo", "Count what was excluded.", False),
) -> None:
    """Keep fields of view in the table, but count nothing in them.

    Their status is excluded, also when they are counted again. Works while the service runs.
    """


@command(
    app,
    "rbc-edge set slide7 --cell-diameter 95 --out /results",
    "rbc-edge set slide7 --undo --out /results",
)
def set(
    given: Given,
    slide: str = SLIDE,
    diameter_px: float | None = option("--cell-diameter PX", "Diameter of a red cell in pixels."),
    pixel_um: float | None = option("--um-per-px UM", "Micrometres per pixel."),
    undo: bool = option("--undo", "Take back the scale that was set.", False),
) -> None:
    """Set the scale of one slide. It comes before an estimate, and before a scale for all slides.

    The running service, or the next run, counts the images of the slide again that are still there. The scale
    stays until --undo.
    """


@command(app, "rbc-edge review --out /results", "rbc-edge review --out /results --read-only --port 8017")
def review(
    given: Given,
    port: int = option("--port N", "Port of the page. 0: one that is free.", 0, min=0, max=65535),
    host: str = option(
        "--host ADDRESS",
        "Address to listen on. Another one than this computer's own needs --password-file.",
        "127.0.0.1",
    ),
    read_only: bool = option("--read-only", "Show everything and change nothing.", False),
    password_file: Path | None = option(
        "--password-file FILE", "Ask for the password on the first line of this file, not for the address."
    ),
) -> None:
    """Look at fields in the browser, correct their cells, and take bad pictures out.

    Prints one address, with a secret, and serves its page on this computer until it is stopped with Ctrl-C.
    Who knows the address can change the counts. Tables count with the corrections, and corrections hold for
    later counts. Works while the service runs. Needs the extra `review` (pip install "rbc-edge[review]").
    """


@command(app, "rbc-edge report --out /results --open", "rbc-edge report slide7 --out /results")
def report(
    given: Given,
    slides: list[str] | None = argument("SLIDE", "Only pages of these slides."),
    images: int | None = option(
        "--images MAX", "Largest number of pictures in a page.  [default: 400]", min=0
    ),
    open_it: bool = option("--open", "Open the page in the browser.", False),
) -> None:
    """Write a web page with pictures for each slide, and an index page.

    The pages are in the folder reports/ of --out. Each page is one file that can be copied anywhere. Works
    while the service runs. Prints where the pages are. Without --edges, cells at the border count as in the
    tables.
    """


@command(app, "rbc-edge export --out /results --xlsx results.xlsx", "rbc-edge export --out /results --json")
def export(
    given: Given,
    xlsx: Path | None = option("--xlsx FILE", "Write an Excel workbook (needs the extra xlsx)."),
    json_output: bool = option("--json", "Print all tables as one JSON document on standard output.", False),
    with_cells: bool = option("--with-cells", "Put every cell into the JSON document, too.", False),
) -> None:
    """Write all tables into one Excel workbook, or print them as JSON.

    The workbook has the sheets slides, with a row for all slides, fields and provenance. Texts are texts in
    it, and numbers are numbers, in every language of Excel. Works while the service runs. Without --edges,
    cells at the border count as in the tables.
    """


@command(
    app,
    "rbc-edge doctor --out /results",
    "rbc-edge doctor /camera --out /results --json",
    "runuser -u rbc-edge -- rbc-edge doctor --config /etc/rbc-edge/config.toml",
    "rbc-edge doctor --out /results --support-archive report.zip",
)
def doctor(
    given: Given,
    support_archive: Path | None = option(
        "--support-archive FILE",
        "Also write a zip file for a bug report. It contains no images, no names and no paths.",
    ),
    bundle_support: Path | None = option("--bundle-support FILE", "Old name of the same.", hidden=True),
    json_output: bool = JSON,
) -> None:
    """Look for problems with the computer, the settings, the bundle, the folders and the service.

    Each line says ok, warning or failed, and what to do. Nothing is changed. Exit code 0 when nothing
    failed. Otherwise 2 for the settings, 4 for the bundle, 5 for the folders and the service.
    """


@command(bundle_app, "rbc-edge bundle show", "rbc-edge bundle show --bundle DIR --json", config=False)
def bundle_show(
    given: Given,
    everything: bool = option("--all", "Print everything that the bundle says about itself.", False),
    json_output: bool = JSON,
) -> None:
    """Show what the bundle is; exit code 4 when it is damaged."""


@command(bundle_app, "rbc-edge bundle verify", config=False)
def bundle_verify(given: Given, json_output: bool = JSON) -> None:
    """Check the files of the bundle and count its test image on this computer.

    Exit code 4 when a file is damaged, or when other cells are found than at the export.
    """


@command(
    config_app,
    "rbc-edge config init",
    "rbc-edge config init --file station.toml --source /camera --out /results",
    "rbc-edge config init --file -",
)
def config_init(
    file: Path | None = option(
        "--file FILE", "The file to write; - prints it.  [default: the user's settings file]"
    ),
    source: Path | None = option("--source DIR", "Set the camera's folder in the file."),
    out: Path | None = option("--out -o DIR", "Set the folder for the results in the file."),
    force: bool = option("--force", "Replace a file that exists.", False),
) -> None:
    """Write a settings file that explains every setting, all of them commented out.

    A file that exists stays as it is, unless --force is given.
    """


@command(config_app, "rbc-edge config show", "RBC_EDGE_THREADS=1 rbc-edge config show")
def config_show(given: Given, json_output: bool = JSON) -> None:
    """Show the settings in use, and where each one comes from: a variable, a line of a file, the default."""


@command(config_app, "rbc-edge config validate --config /etc/rbc-edge/config.toml")
def config_validate(given: Given) -> None:
    """Check the settings file and the environment variables; exit code 2 when something is wrong."""

"""The command line of the export. Parsing only."""

from pathlib import Path
from typing import Annotated

import typer

from rbc_train import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    detector: Annotated[Path, typer.Option(help="Detector checkpoint.")] = console.DETECTOR,
    classifier: Annotated[Path, typer.Option(help="Classifier checkpoint.")] = Path(
        "runs/classifier-station/classifier.pt"
    ),
    dataset: Annotated[Path, typer.Option(help="Dataset they were trained on.")] = console.DATASET,
    data: console.Data = console.DATA,
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")] = Path("runs/bundle"),
    with_fp32: Annotated[bool, typer.Option(help="Also ship the networks in fp32 (11 MB).")] = False,
    calibration_images: Annotated[int, typer.Option(min=8)] = 200,
    keep: Annotated[
        Path | None, typer.Option(help="Take the detector of this bundle. Only the second stage is new.")
    ] = None,
) -> None:
    """Writes, quantizes, tests and seals a bundle. Fails when int8 loses more than is allowed."""
    from rbc_export import exporting  # noqa: PLC0415  torch takes seconds that --help must not pay

    options = exporting.ExportOptions(
        detector=None if keep else detector,
        classifier=classifier,
        dataset=dataset,
        data=data,
        out=out,
        with_fp32=with_fp32,
        calibration_images=calibration_images,
        keep=keep,
    )
    finished = exporting.export(options, lambda line: typer.echo(line, err=True))
    typer.echo(f"{finished.path}  {finished.bundle_id}")


def main() -> None:
    """Runs the command line of the export."""
    console.answer(app)

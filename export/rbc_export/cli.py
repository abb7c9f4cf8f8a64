"""The export's command line. Parsing only."""

from pathlib import Path
from typing import Annotated

import typer

from rbc_train import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    detector: Annotated[Path, typer.Option(help="Detector checkpoint.")] = Path("runs/detector/detector.pt"),
    classifier: Annotated[Path, typer.Option(help="Classifier checkpoint.")] = Path(
        "runs/classifier-station/classifier.pt"
    ),
    dataset: Annotated[Path, typer.Option(help="Dataset they were trained on.")] = Path("data/dataset"),
    data: Annotated[Path, typer.Option(help="The public data.", envvar="RBC_DATA")] = Path("../shared/data"),
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")] = Path("runs/bundle"),
    with_fp32: Annotated[bool, typer.Option(help="Also ship the networks in fp32 (11 MB).")] = False,
    calibration_images: Annotated[int, typer.Option(min=8)] = 200,
) -> None:
    """Writes, quantizes, proves and seals a bundle; fails when more is lost than is allowed."""
    from rbc_export import exporting  # noqa: PLC0415  torch takes seconds that --help must not pay

    options = exporting.ExportOptions(
        detector, classifier, dataset, data, out, with_fp32, calibration_images=calibration_images
    )
    finished = exporting.export(options, lambda line: typer.echo(line, err=True))
    typer.echo(f"{finished.path}  {finished.bundle_id}")


def main() -> None:
    """Runs the export's command line."""
    console.answer(app)

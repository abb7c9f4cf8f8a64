"""Bundle and photographs of a study: the station's analyzer, and the validation photographs of TXL-PBC."""

from pathlib import Path

from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle
from rbc_train.data import Photograph, read_public


def open_analyzer(bundle: Path | None, threads: int) -> Analyzer:
    """Opens a bundle (None: the shipped one) on so many threads (0: all that the processor has)."""
    return Analyzer(Bundle.open(bundle), threads=threads)


def validation(data: Path) -> list[Photograph]:
    """Reads the validation photographs of TXL-PBC."""
    return read_public(data)[0].of("val")


def command(name: str, every: int, usual: int) -> str:
    """Returns the command line of a study that used one photograph in `every`."""
    return f"python -m studies.{name}" + (f" --every {every}" if every != usual else "")

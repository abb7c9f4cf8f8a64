"""A folder that is counted without a network, to be reviewed."""

import csv
from dataclasses import replace
from pathlib import Path

from stand_in import StandIn

from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Look, Version
from rbc_edge.values import InboxFile, Scale, ScaleSource
from rbc_edge.views.tables import Tables
from rbc_edge.vision.image_file import load_field

WHEN = "2025-01-02T03:04:05Z"


def count(out: Path, camera: Path, *, flags: tuple[str, ...] = (), bundle: str = "b1") -> None:
    """Counts the drawn slide without a network: disks to the right of the middle overlap."""
    with Ledger(out) as ledger:
        for path in sorted(camera.glob("s1/*.png")):
            field = load_field(path, "s1", path.stem)
            result = StandIn().analyze(field, Scale(40.0, ScaleSource.CELL_DIAMETER))
            if path.stem == "1":
                result = replace(result, quality_flags=flags)
            file = InboxFile(path, "s1", path.stem, path.stat().st_size, path.stat().st_mtime_ns)
            ledger.record(Look(file, field.sha256, result=result), Version(bundle, "given"), WHEN)
        Tables(out, ledger, cells=True).write()


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

"""Small drawn fields with known counts. Of each, any number of files with different bytes can be made."""

import csv
import hashlib
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from rbc_edge.ops.synthetic import CREAM, draw_slide

REPOSITORY = Path(__file__).resolve().parents[2]
TOY_BUNDLE = REPOSITORY / "tests" / "edge" / "toy_bundle"
CELL_DIAMETER_PX = 40

N_RED_WHOLE = 6
"""With fewer whole cells the program estimates the scale of the field itself, ten times as slow."""

COUNTS = ("n_rbc", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets")

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn field as the bytes of a file, with the counts of an uninterrupted run.

    Attributes:
        data: A JPEG or PNG file.
        counts: In the order of `COUNTS`.
    """

    data: bytes
    counts: Counts

    def variant(self, note: str) -> bytes:
        """Returns a file with the same pixels and other bytes: the note is a comment in it."""
        text = note.encode()
        if self.data.startswith(b"\xff\xd8"):  # JPEG: a COM segment after SOI
            return self.data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + self.data[2:]
        chunk = b"tEXt" + b"Comment\0" + text  # PNG: a chunk before IEND
        packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return self.data[:-12] + packed + self.data[-12:]


def sha256(data: bytes) -> str:
    """Hex digest, as in the tables."""
    return hashlib.sha256(data).hexdigest()


def clean_environment() -> dict[str, str]:
    """The environment without the settings of the user who runs the suite."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RBC_EDGE_", "FAULT_", "NOTIFY_"))}
    env["PYTHONPATH"] = str(REPOSITORY / "edge")
    env["XDG_CONFIG_HOME"] = "/nonexistent"
    return env


def reference(source: Path, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Counts a folder without any fault."""
    no_config = source.parent / "no-config.toml"
    no_config.write_text("", encoding="utf-8")
    return subprocess.run(
        [
            *(sys.executable, "-m", "rbc_edge", "run", str(source), "--out", str(out), "--threads", "1"),
            *("--config", str(no_config), "--bundle", str(TOY_BUNDLE), "--quiet", *map(str, options)),
        ],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def counts_of(row: dict[str, str]) -> Counts:
    """The counts of a table's row."""
    return tuple(int(row[name]) for name in COUNTS)


def encoded(image: npt.NDArray[np.uint8], suffix: str) -> bytes:
    """The bytes of an image file."""
    done, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert done
    return data.tobytes()


def draw(folder: Path, *, n: int = 24, seed: int = 2026) -> list[Picture]:
    """Draws fields, and takes their counts from an uninterrupted run.

    Args:
        folder: Folder to work in. It must exist and be empty.
        n: How many fields.
        seed: Seed of the drawing.

    Returns:
        The pictures, half of them PNG. Two neighbours never have the same counts.
    """
    fields = draw_slide(
        np.random.default_rng(seed),
        n * 6,
        width_px=224,
        height_px=176,
        cell_diameter_px=CELL_DIAMETER_PX,
        crowding=0.4,
        wbc_per_field=0.3,
        stain=CREAM,
    )
    source = folder / "drawn"
    source.mkdir()
    data: dict[str, bytes] = {}
    for i, field in enumerate(fields):
        name = f"field{i:04}"
        data[name] = encoded(field.image, ".png" if i % 2 else ".jpg")
        (source / f"{name}{'.png' if i % 2 else '.jpg'}").write_bytes(data[name])
    done = reference(source, folder / "counted", "--cell-diameter", CELL_DIAMETER_PX, "--cells")
    if done.returncode:
        raise RuntimeError(f"the reference run ended with {done.returncode}: {done.stderr}")
    whole: dict[str, int] = {}
    with (folder / "counted" / "cells" / "drawn.csv").open(newline="", encoding="utf-8") as file:
        for cell in csv.DictReader(file):
            whole[cell["fov"]] = whole.get(cell["fov"], 0) + (
                cell["label"].startswith("rbc") and not cell["touches_edge"]
            )
    pictures: list[Picture] = []
    with (folder / "counted" / "drawn.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            flags = {*row["quality_flags"].split(";")} - {"", "unfamiliar"}  # the toy is never sure
            if flags or whole.get(row["fov"], 0) < N_RED_WHOLE:
                continue
            counts = counts_of(row)
            if not pictures or pictures[-1].counts != counts:
                pictures.append(Picture(data[row["fov"]], counts))
    if len(pictures) < n:
        raise RuntimeError(f"only {len(pictures)} of {len(fields)} drawn fields can be used")
    return pictures[:n]

"""Prepares the images that all sides are timed on: fields of view in one folder, and mosaics of them.

Run as ``python -m bench.images OUT [FOLDER] --fields N --mosaics 2x16 4x6``. It is a process of its own,
because it imports NumPy and a process that measures memory must not (see `children`).
"""

import argparse
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from rbc_edge import text
from rbc_edge.errors import ImageError
from rbc_edge.ops import synthetic
from rbc_edge.vision import image_file

_QUALITY: Final = 92
DRAWN: Final = "drawn fields"


def lay_out(
    out: Path, source: Path | None, n_fields: int, mosaics: list[tuple[int, int]]
) -> dict[str, object]:
    """Writes ``fields/`` and, for each mosaic of side k, ``mosaic-k/``.

    Args:
        out: An empty folder.
        source: Photographs to copy. None: fields of 640x480 are drawn.
        n_fields: How many fields, spread evenly over the source.
        mosaics: Side length in fields, and how many mosaics of it.

    Returns:
        For each folder the number of images, their size in pixels, and megapixels.

    Raises:
        ValueError: The source has no images.
    """
    fields = out / "fields"
    fields.mkdir(parents=True)
    if source is None:
        drawn = synthetic.draw_slide(
            np.random.default_rng(0), n_fields, cell_diameter_px=100.0, crowding=0.35
        )
        for i, field in enumerate(drawn):
            _write(fields / f"field-{i:04}.jpg", field.image)
    else:
        found = sorted(p for p in source.iterdir() if p.suffix.lower() in text.IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"{source}: no images there; give --images another folder")
        picked = np.linspace(0, len(found) - 1, min(n_fields, len(found))).round().astype(int)
        for i in sorted(set(picked.tolist())):
            shutil.copy2(found[i], fields / found[i].name)
    files = sorted(fields.iterdir())
    sizes = Counter(_size(p) for p in files)
    usual, _ = sizes.most_common(1)[0]
    alike = [p for p in files if _size(p) == usual]
    told: dict[str, object] = {
        "fields": {"n": len(files), "px": usual, "megapixels": usual[0] * usual[1] / 1e6}
    }
    for side, n in mosaics:
        folder = out / f"mosaic-{side}"
        folder.mkdir()
        for i in range(n):
            # The fields are used in turn, so that every mosaic has its own content.
            parts = [alike[(i * side * side + j) % len(alike)] for j in range(side * side)]
            images = [image_file.load_field(p, "", p.name).image for p in parts]
            rows = [np.hstack(images[r : r + side]) for r in range(0, side * side, side)]
            _write(folder / f"mosaic-{i:02}.jpg", np.roll(np.vstack(rows), i, axis=1))
        px = (usual[0] * side, usual[1] * side)
        told[folder.name] = {"n": n, "px": px, "megapixels": px[0] * px[1] / 1e6}
    for folder in [p for p in out.iterdir() if p.is_dir()]:
        link(folder, out / f"{folder.name}-one", 1)
    return told


def link(folder: Path, to: Path, n: int) -> None:
    """Links `n` images of a folder into a new one, spread evenly over them. 1: the first image."""
    to.mkdir()
    files = sorted(folder.iterdir())
    n = min(n, len(files))
    for i in sorted({round(i * (len(files) - 1) / max(n - 1, 1)) for i in range(n)}):
        os.link(files[i], to / files[i].name)


def _size(path: Path) -> tuple[int, int]:
    try:
        height, width = image_file.load_field(path, "", path.name).image.shape[:2]
    except ImageError as error:
        raise ValueError(str(error)) from error
    return width, height


def _write(path: Path, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    path.write_bytes(data.tobytes())


def main() -> None:
    """Prepares the images and prints what they are, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--fields", type=int, default=364)
    parser.add_argument("--mosaics", nargs="*", default=[], metavar="SIDExN")
    parser.add_argument(
        "--some", nargs="*", type=int, default=[], help="Also folders of so many of the fields."
    )
    asked = parser.parse_args()
    mosaics = [(int(a), int(b)) for a, b in (m.split("x") for m in asked.mosaics)]
    try:
        told = lay_out(asked.out, asked.source, asked.fields, mosaics)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    for n in asked.some:
        link(asked.out / "fields", asked.out / f"fields-{n}", n)
    print(json.dumps(told))


if __name__ == "__main__":
    main()

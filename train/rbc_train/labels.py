"""Single or overlapping: weak labels (the paper's Otsu area rule) and verified labels (visual inspection).

Neither is called ground truth. The weak rule is that of Gurav, Yadav, Taral (2025), method step 2: grey,
Otsu threshold, binary mask B, area A = sum over i, j of B(i, j). Overlapping if A > T. The paper does not
give T. `area_threshold` chooses it from the areas alone, so the result can be repeated.
"""

import csv
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import cv2
import numpy as np

from rbc_edge.errors import UsageError
from rbc_edge.values import Float32, Int64, UInt8

VerifiedName = Literal["single", "overlapping", ""]
LETTERS: Final = "STOMX"
_SAME_BOX_PX: Final = 2.5  # the label files round boxes to whole pixels and count from 1


def otsu_area(crops: UInt8) -> Int64:
    """Measures the dark area of tight crops (paper, step 2).

    Args:
        crops: uint8 (N, 64, 64, 3), RGB, cut without margin.

    Returns:
        int64 (N,): pixels darker than the crop's own Otsu threshold, 0..4096.
    """
    areas = np.zeros(len(crops), np.int64)
    for i, crop in enumerate(crops):
        grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
        _, mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY_INV | cv2.THRESH_OTSU)
        areas[i] = int(mask.sum())
    return areas


def area_threshold(areas: Int64) -> int:
    """Chooses the paper's T: Otsu's criterion again, on the histogram of the training crops' areas.

    No label is looked at, so the weak labels stay weak and the choice is reproducible.

    Args:
        areas: int64 (N,), what `otsu_area` measured on the training split. N may be 0.

    Returns:
        T: a crop is weakly overlapping when its area is greater.
    """
    if len(areas) == 0:
        return 0
    values = np.sort(areas).astype(np.float64)
    n = len(values)
    below = np.arange(1, n)
    sums = np.cumsum(values)[:-1]
    mean_low, mean_high = sums / below, (values.sum() - sums) / (n - below)
    between = below * (n - below) * (mean_high - mean_low) ** 2
    between[values[1:] == values[:-1]] = -1.0  # a threshold cannot stand between equal areas
    if n == 1 or between.max() <= 0:
        return int(values[-1])
    return int(values[int(between.argmax())])


@dataclass(frozen=True, slots=True)
class VerifiedLabel:
    """What visual inspection says of one red-cell box.

    Attributes:
        image: File name of the photograph.
        source: The camera.
        xyxy: The box, pixels of the photograph.
        letter: S, T, O, M or X. Two letters where two passes differ (see overlap_labels/README.md).
        label: single, overlapping, or "" where it cannot be used.
        passes: How often it was looked at.
    """

    image: str
    source: str
    xyxy: tuple[float, float, float, float]
    letter: str
    label: VerifiedName
    passes: int


class VerifiedLabels:
    """The verified labels, found again by photograph and box."""

    def __init__(self, rows: list[VerifiedLabel]) -> None:
        self.rows = rows
        self._of: dict[str, tuple[Float32, list[VerifiedLabel]]] = {}
        by_image: dict[str, list[VerifiedLabel]] = {}
        for row in rows:
            by_image.setdefault(row.image, []).append(row)
        for image, own in by_image.items():
            self._of[image] = (np.array([r.xyxy for r in own], np.float32), own)

    def find(self, image: str, box: Float32) -> VerifiedLabel | None:
        """Returns the label of a box.

        Args:
            image: File name of the photograph.
            box: float32 (4,), pixels of the photograph.

        Returns:
            The label with the same box (apart from rounding), or None.
        """
        if image not in self._of:
            return None
        boxes, own = self._of[image]
        distance = np.abs(boxes - box).max(axis=1)
        nearest = int(distance.argmin())
        return own[nearest] if distance[nearest] <= _SAME_BOX_PX else None

    def of_image(self, image: str) -> list[VerifiedLabel]:
        """Returns the labels of one photograph, by its file name."""
        return self._of[image][1] if image in self._of else []


def read_verified(folder: Path | None = None) -> VerifiedLabels:
    """Reads the verified labels of both splits.

    Args:
        folder: Folder with train.csv and val.csv. Ours (in this package) when None.

    Returns:
        All rows.

    Raises:
        UsageError: If a row is not what the README of the labels describes.
    """
    place = folder or Path(str(files("rbc_train") / "overlap_labels"))
    rows: list[VerifiedLabel] = []
    for name in ("train.csv", "val.csv"):
        with (place / name).open(newline="", encoding="utf-8") as stream:
            for number, row in enumerate(csv.DictReader(stream), start=2):
                try:
                    letter, label, passes = row["letter"] or "", row["label"], int(row["passes"])
                    xyxy = (float(row["x0"]), float(row["y0"]), float(row["x1"]), float(row["y1"]))
                except (KeyError, TypeError, ValueError) as error:
                    raise UsageError(f"{place / name}:{number}: not a verified label: {error}") from error
                if set(letter) - set(LETTERS) or label not in ("single", "overlapping", ""):
                    raise UsageError(f"{place / name}:{number}: letter {letter!r} with label {label!r}")
                verified: VerifiedName = (
                    "single" if label == "single" else "overlapping" if label == "overlapping" else ""
                )
                image = row["image"].rpartition("/")[2]
                rows.append(
                    VerifiedLabel(
                        image=image,
                        source=row["source"],
                        xyxy=xyxy,
                        letter=letter,
                        label=verified,
                        passes=passes,
                    )
                )
    return VerifiedLabels(rows)


def read_unboxed(folder: Path | None = None) -> dict[str, Float32]:
    """Reads the red cells of validation photographs that have no box in TXL-PBC.

    Args:
        folder: Folder with val.csv. Ours (in this package) when None.

    Returns:
        Boxes float32 (N, 4), pixels of the photograph, by its file name.

    Raises:
        UsageError: If a row is not what the README of the table describes.
    """
    file = (folder or Path(str(files("rbc_train") / "unboxed_cells"))) / "val.csv"
    boxes: dict[str, list[list[float]]] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):
            try:
                box = [float(row[k]) for k in ("x0", "y0", "x1", "y1")]
                is_cell = {"cell": True, "nothing": False}[row["kind"]]
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{file}:{number}: not a box that was looked at: {error}") from error
            if is_cell:
                boxes.setdefault(row["image"].rpartition("/")[2], []).append(box)
    return {image: np.array(own, np.float32) for image, own in boxes.items()}

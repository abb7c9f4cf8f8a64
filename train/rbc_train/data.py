"""Public smear images as training data: read, checked, split by photograph, written at one scale.

Readers for BCCD (Pascal VOC), TXL-PBC (YOLO text) and Chula (CSV tables). Whatever is wrong with an
annotation becomes a `AnnotationFinding` with its file and line. Nothing is left out without one.
`write_dataset` makes what the trainers read. Field coordinates are xyxy in pixels of the photograph.
"""

import csv
import hashlib
import json
import math
import shutil
import xml.parsers.expat
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import cv2
import numpy as np

from rbc_edge.errors import ImageError, UnavailableError, UsageError
from rbc_edge.values import SHAPES, CellClass, FieldOfView, Float32, Int64, UInt8
from rbc_edge.vision import image_file, preprocess
from rbc_train import labels, metrics

Split = Literal["train", "val", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
"""From the loosest to the strictest: a test photograph must not be used for training."""

VOC_CLASSES: Final = {"RBC": CellClass.RBC, "WBC": CellClass.WBC, "Platelets": CellClass.PLATELET}
YOLO_CLASSES: Final = (CellClass.WBC, CellClass.RBC, CellClass.PLATELET)  # TXL-PBC's classes.txt
CLASS_NAMES: Final = ("rbc", "wbc", "platelet")  # by CellClass number

LABORATORIES: Final = {"bccd": "bccd+bcd", "bcd": "bccd+bcd"}
"""Sources that come from one laboratory. Every other source is a laboratory of its own."""

CHULA: Final = "chula"
"""The folder of Chula RBC-12 and the source of its photographs."""

NEGATIVES: Final = ("nothing", "misfit", "clump", "unusable")
"""Kinds of boxes without one cell: no cell, a box that does not fit, several cells, and not to be said."""

_TXL_SOURCES: Final = {(640, 480): "bccd", (416, 416): "bcd", (575, 575): "raabin"}
TWIN_CORRELATION: Final = 0.97
"""Thumbnails of one photograph correlate by over 0.97, of different ones by less (measured)."""

_BORDER_PX: Final = 2.0
_OUTSIDE_PX: Final = 1.5  # YOLO text has six decimals and VOC counts from 1: a pixel over is no error


@dataclass(frozen=True, slots=True)
class AnnotationFinding:
    """An error in an annotation, and what was done about it.

    Attributes:
        file: The annotation file (or the image, where that is what is wrong).
        line: 1-based line in it, 0 when the whole file is meant.
        kind: Stable word: outside, no-area, unknown-class, bad-line, missing-image, unreadable-image,
            missing-annotation, empty, size-mismatch, duplicate, not-in-split, leak, format.
        message: What is wrong, in words.
        action: ``clipped``, ``box left out``, ``point left out``, ``photograph left out`` or ``kept``.
    """

    file: Path
    line: int
    kind: str
    message: str
    action: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.message} ({self.action})"


@dataclass(frozen=True, slots=True)
class Negative:
    """A box that was looked at and holds no single cell, where a detector may see one.

    Attributes:
        xyxy: The box, pixels of the photograph, inside it.
        kind: One of `NEGATIVES`, or wbc or platelet where a list has those, too.
        letter: What was seen, by the labelling guide.
    """

    xyxy: tuple[float, float, float, float]
    kind: str
    letter: str


@dataclass(frozen=True, slots=True)
class ShapePoint:
    """A point on a red cell with its shape, by an expert.

    Attributes:
        x: Pixels of the photograph.
        y: Pixels of the photograph.
        shape: One of `values.SHAPES`.
    """

    x: float
    y: float
    shape: str


@dataclass(frozen=True, slots=True, eq=False)
class Photograph:
    """One annotated photograph.

    Attributes:
        image_path: The image file.
        name: Its stem, unique within a dataset.
        source: The camera: bccd, bcd, pbc, raabin or chula.
        split: train, val or test.
        width_px: Width of the image.
        height_px: Height of the image.
        xyxy: float32 (N, 4), pixels of the photograph, inside it.
        class_id: int64 (N,), values of `CellClass`.
        thumbnail: float32 (32, 32), grey, zero mean, unit norm: to find the same photograph again.
        complete: Whether every cell has a box. Only such a photograph may teach or judge a detector.
        verified: The overlap labels that came with its boxes.
        negatives: Boxes without a single cell.
        points: Points with a shape. Not every cell has one.
        unboxed: float32 (M, 4), red cells that the annotators left out, and we found. They are for counts:
            the boxes are a detector's.
    """

    image_path: Path
    name: str
    source: str
    split: Split
    width_px: int
    height_px: int
    xyxy: Float32
    class_id: Int64
    thumbnail: Float32
    complete: bool = True
    verified: tuple[labels.VerifiedLabel, ...] = ()
    negatives: tuple[Negative, ...] = ()
    points: tuple[ShapePoint, ...] = ()
    unboxed: Float32 = field(default_factory=lambda: np.zeros((0, 4), np.float32))

    @property
    def red_xyxy(self) -> Float32:
        """Every red cell, those that the annotators left out at the end: float32 (N, 4)."""
        return np.concatenate([self.xyxy[self.class_id == CellClass.RBC], self.unboxed])

    @property
    def laboratory(self) -> str:
        """The laboratory of the photograph. Its fields share stain, hands and light."""
        return LABORATORIES.get(self.source, self.source)

    def read(self) -> UInt8:
        """Returns the image, uint8 (H, W, 3) RGB."""
        return self.field(math.nan).image

    def field(self, cell_diameter_px: float) -> FieldOfView:
        """Returns the photograph as the station reads it in a slide of this scale, pixels. NaN: in full."""
        return image_file.load_field(
            self.image_path, self.source, self.name, cell_diameter_px=cell_diameter_px
        )

    def view(self, cell_diameter_px: float) -> preprocess.View:
        """Returns what the networks are shown of the photograph, at the station as in training.

        Args:
            cell_diameter_px: Diameter of its red cells, pixels of the photograph.
        """
        return preprocess.view(self.field(cell_diameter_px).decoded, cell_diameter_px)

    def non_red_cells(self) -> list[Negative]:
        """Returns every box that is not one red cell: white cells, platelets, and the negatives."""
        letters = {CellClass.WBC: "W", CellClass.PLATELET: "P"}
        cells = [
            Negative((x0, y0, x1, y1), CLASS_NAMES[c], letters[CellClass(c)])
            for (x0, y0, x1, y1), c in zip(self.xyxy.tolist(), self.class_id.tolist(), strict=True)
            if c != CellClass.RBC
        ]
        return [*cells, *self.negatives]

    @property
    def whole_rbc_diameters_px(self) -> Float32:
        """float32 (M,): the geometric mean side of each red-cell box that the border does not cut."""
        box = self.xyxy[self.class_id == CellClass.RBC]
        size = np.array([self.width_px, self.height_px], np.float32)
        whole = (box[:, :2] > _BORDER_PX).all(1) & (box[:, 2:] < size - _BORDER_PX).all(1)
        return np.asarray(np.sqrt(np.prod(box[whole, 2:] - box[whole, :2], axis=1)), np.float32)


@dataclass(slots=True)
class Collection:
    """Photographs, and every error that was found while reading them."""

    photographs: list[Photograph] = field(default_factory=list)
    findings: list[AnnotationFinding] = field(default_factory=list)

    def of(self, *splits: Split) -> list[Photograph]:
        """Returns the photographs of these splits."""
        return [p for p in self.photographs if p.split in splits]

    def complete(self, *splits: Split) -> list[Photograph]:
        """Returns the photographs of these splits in which every cell has a box."""
        return [p for p in self.of(*splits) if p.complete]


@dataclass(frozen=True, slots=True)
class _RawBox:
    line: int
    class_name: str
    xyxy: tuple[float, float, float, float]
    letter: str = ""
    label: labels.VerifiedName = ""


def read_splits(path: Path) -> list[tuple[Split, str, str]]:
    """Reads ``splits.csv``: one row a photograph.

    Args:
        path: The CSV with columns split, bccd_image, txl_pbc_image.

    Returns:
        (split, BCCD stem or "", TXL-PBC file name or "") of each photograph.

    Raises:
        UnavailableError: If the file is not there.
        UsageError: If it is not such a table, or names one image in two splits.
    """
    if not path.is_file():
        raise UnavailableError(f"{path}: no such file", "give the folder that holds splits.csv with --data")
    rows: list[tuple[Split, str, str]] = []
    with path.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):
            try:
                split, bccd, txl = row["split"], row["bccd_image"] or "", row["txl_pbc_image"] or ""
            except KeyError as error:
                raise UsageError(f"{path}: has no column {error}") from error
            rows.append((_split(split, path, number), bccd, txl))
    return rows


def _split(word: str, file: Path, line: int) -> Split:
    known = next((s for s in SPLITS if s == word), None)
    if known is None:
        raise UsageError(f"{file}:{line}: unknown split {word!r}")
    return known


def read_public(data: Path) -> tuple[Collection, Collection]:
    """Reads TXL-PBC and BCCD and keeps their splits apart, photograph by photograph.

    Args:
        data: Folder with ``splits.csv``, ``txl_pbc/`` and ``bccd/``.

    Returns:
        TXL-PBC (complete labels: train, val) and BCCD (its own labels).

    Raises:
        UnavailableError: If the folder does not hold them.
        UsageError: If ``splits.csv`` is not such a table.
    """
    splits = read_splits(data / "splits.csv")
    for part in ("txl_pbc", "bccd"):
        if not (data / part).is_dir():
            raise UnavailableError(f"{data / part}: no such folder", "docs/training.md says where to get it")
    txl, bccd = read_txl_pbc(data / "txl_pbc", splits), read_bccd(data / "bccd", splits)
    unboxed = labels.read_unboxed()
    txl.photographs[:] = [
        replace(p, unboxed=unboxed[p.image_path.name])
        if p.split == "val" and p.image_path.name in unboxed
        else p
        for p in txl.photographs
    ]
    names = {t.rpartition(".")[0]: b for _, b, t in splits if t and b}
    keep_apart((txl, bccd), same_as=names)
    return txl, bccd


def official_test(data: Path, bccd: Collection) -> list[Photograph]:
    """Returns the photographs of BCCD's official test split, which the literature scores on.

    Our own test split has all of them, and also those that TXL-PBC tests on.

    Args:
        data: Folder with ``bccd/``.
        bccd: BCCD.

    Raises:
        UnavailableError: If the list of them is not there.
    """
    file = data / "bccd" / "ImageSets" / "Main" / "test.txt"
    try:
        names = set(file.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UnavailableError(f"{file}: {error.strerror}", "take BCCD with its ImageSets") from error
    return [p for p in bccd.of("test") if p.name in names]


def annotated_twice(data: Path, txl: Collection, bccd: Collection) -> list[tuple[Photograph, Photograph]]:
    """Finds the validation photographs that both sets annotate, in the same pixels.

    Args:
        data: Folder with ``splits.csv``.
        txl: TXL-PBC.
        bccd: BCCD.

    Returns:
        (with BCCD's boxes, with TXL-PBC's boxes) of each.
    """
    own = {p.name: p for p in bccd.of("val")}
    theirs = {p.image_path.name: p for p in txl.of("val")}
    pairs = [(own[b], theirs[t]) for _, b, t in read_splits(data / "splits.csv") if b in own and t in theirs]
    return [(b, t) for b, t in pairs if (b.width_px, b.height_px) == (t.width_px, t.height_px)]


def keep_apart(
    collections: Sequence[Collection], *, same_as: dict[str, str], alike: float = TWIN_CORRELATION
) -> None:
    """Leaves photographs out that occur again in a stricter split (test over val over train).

    The published split does not know all twins: the same photograph resized to 416x416, mirrored or turned,
    under another name. So twins are found by name and by content: thumbnails that correlate by more than
    `alike` in one of the eight orientations.

    Args:
        collections: Changed in place: photographs removed, findings of kind ``leak`` added.
        same_as: Name of a photograph to the name of its twin.
        alike: Least correlation of twins.
    """
    everyone = [(c, p) for c in collections for p in c.photographs]
    if not everyone:
        return
    root = list(range(len(everyone)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    by_name: dict[str, int] = {}
    for i, (_, photograph) in enumerate(everyone):
        name = same_as.get(photograph.name, photograph.name)
        root[find(i)] = find(by_name.setdefault(name, i))
    thumbnails = np.stack([p.thumbnail for _, p in everyone])
    flat = thumbnails.reshape(len(everyone), -1)
    for mirrored in (thumbnails, thumbnails[:, :, ::-1]):
        for turns in range(4):
            turned = np.rot90(mirrored, turns, axes=(1, 2)).reshape(len(everyone), -1)
            for i, j in np.argwhere(flat @ turned.T > alike).tolist():
                root[find(i)] = find(j)
    strictest: dict[int, int] = {}
    for i, (_, photograph) in enumerate(everyone):
        rank = SPLITS.index(photograph.split)
        if rank >= SPLITS.index(everyone[strictest.setdefault(find(i), i)][1].split):
            strictest[find(i)] = i
    for i, (collection, photograph) in enumerate(everyone):
        other = everyone[strictest[find(i)]][1]
        if SPLITS.index(photograph.split) < SPLITS.index(other.split):
            message = f"{photograph.split} shows the same photograph as {other.name} of {other.split}"
            collection.findings.append(
                AnnotationFinding(photograph.image_path, 0, "leak", message, "photograph left out")
            )
            collection.photographs.remove(photograph)


def read_txl_pbc(folder: Path, splits: Sequence[tuple[Split, str, str]]) -> Collection:
    """Reads TXL-PBC (YOLO text) for the photographs that the split names.

    Args:
        folder: The folder with ``images/`` and ``labels/``.
        splits: What `read_splits` returned.

    Returns:
        The photographs and the findings.
    """
    result = Collection()
    names: dict[str, Split] = {}
    for split, _, txl in splits:
        if txl:
            if txl in names:
                result.findings.append(
                    AnnotationFinding(folder / txl, 0, "duplicate", "named twice in the split", "kept")
                )
            names[txl] = max(split, names.get(txl, split), key=SPLITS.index)
    for file in sorted((folder / "images").glob("*")):
        if file.name not in names:
            result.findings.append(
                AnnotationFinding(file, 0, "not-in-split", "no split names it", "photograph left out")
            )
    for name, split in sorted(names.items()):
        annotation = folder / "labels" / f"{Path(name).stem}.txt"
        looked = _look(folder / "images" / name, result.findings)
        if looked is None:
            continue
        raw = _yolo_boxes(annotation, looked[0], result.findings)
        source = _TXL_SOURCES.get(looked[0], "pbc")
        _add(
            result=result,
            image=folder / "images" / name,
            source=source,
            split=split,
            looked=looked,
            annotation=annotation,
            raw=raw,
        )
    return result


def read_bccd(folder: Path, splits: Sequence[tuple[Split, str, str]]) -> Collection:
    """Reads BCCD (Pascal VOC) for the photographs that the split names.

    Its annotations miss about half of the red cells (see the data's README): for the literature's
    figures, not for training.

    Args:
        folder: The folder with ``JPEGImages/`` and ``Annotations/``.
        splits: What `read_splits` returned.

    Returns:
        The photographs and the findings.
    """
    result = Collection()
    names: dict[str, Split] = {}
    for split, bccd, _ in splits:
        if bccd:  # a photograph named in several splits belongs to the strictest
            names[bccd] = max(split, names.get(bccd, split), key=SPLITS.index)
    have = {p.stem for p in (folder / "JPEGImages").glob("*.jpg")}
    for name, split in sorted(names.items()):
        annotation = folder / "Annotations" / f"{name}.xml"
        image = folder / "JPEGImages" / f"{name}.jpg"
        looked = _look(image, result.findings)
        if looked is None:
            continue
        raw = _voc_boxes(annotation, looked[0], result.findings)
        _add(
            result=result,
            image=image,
            source="bccd",
            split=split,
            looked=looked,
            annotation=annotation,
            raw=raw,
        )
    for name in sorted(have - names.keys()):
        file = folder / "JPEGImages" / f"{name}.jpg"
        result.findings.append(
            AnnotationFinding(file, 0, "not-in-split", "no split names it", "photograph left out")
        )
    return result


_INSPECTED: Final = {
    "S": ("rbc", "single"), "T": ("rbc", "overlapping"), "O": ("rbc", "overlapping"),
    "W": ("wbc", ""), "P": ("platelet", ""),
    "N": ("nothing", ""), "B": ("misfit", ""), "M": ("clump", ""), "X": ("unusable", ""),
}  # fmt: skip
"""Kind and label of each letter of the labelling guide, as ``boxes.csv`` has them."""


def read_chula(folder: Path) -> Collection:
    """Reads Chula RBC-12: points with a shape in most photographs, our complete boxes in some.

    ``splits.csv`` names every photograph, its split, and whether its boxes are complete. ``boxes.csv`` has
    what was seen in each box of those, cells and others. ``shapes.csv`` has the points. A photograph without
    complete boxes has no boxes at all (`Photograph.complete`), because a part of its cells would teach a
    detector to overlook the rest.

    Args:
        folder: The folder with ``images/`` and the three tables.

    Returns:
        The photographs, named ``chula-<number>``, and the findings.

    Raises:
        UnavailableError: If a table is not there.
        UsageError: If a table lacks a column, or names an unknown split.
    """
    result = Collection()
    find = result.findings.append
    splits: dict[str, tuple[Split, bool]] = {}
    file = folder / "splits.csv"
    for line, row in _rows(file, ("image", "split", "boxes")):
        split = _split(row["split"], file, line)
        if row["image"] in splits:
            find(AnnotationFinding(file, line, "duplicate", "named twice in the split", "kept"))
            split = max(split, splits[row["image"]][0], key=SPLITS.index)
        splits[row["image"]] = split, row["boxes"] == "yes"
    boxes = _inspected_boxes(folder / "boxes.csv", {i for i, (_, own) in splits.items() if own}, find)
    points = _shape_points(folder / "shapes.csv", splits.keys(), find)
    for image in sorted((folder / "images").glob("*")):
        if f"images/{image.name}" not in splits:
            find(AnnotationFinding(image, 0, "not-in-split", "no split names it", "photograph left out"))
    for name, (split, complete) in splits.items():
        image = folder / name
        looked = _look(image, result.findings)
        if looked is None:
            continue
        if image.suffix.lower() in (".jpg", ".jpeg") and _is_png(image):
            find(AnnotationFinding(image, 0, "format", "is PNG by its content", "kept"))
        kinds = (*CLASS_NAMES, *NEGATIVES)
        own = _checked(boxes.get(name, []), looked[0], kinds, folder / "boxes.csv", result.findings)
        if complete and not own:
            _leave_out_empty(folder / "boxes.csv", result.findings)
            continue
        result.photographs.append(
            Photograph(
                image_path=image,
                name=f"{CHULA}-{image.stem}",
                source=CHULA,
                split=split,
                width_px=looked[0][0],
                height_px=looked[0][1],
                **_arrays(own),
                thumbnail=looked[1],
                complete=complete,
                verified=tuple(
                    labels.VerifiedLabel(image.name, CHULA, b.xyxy, b.letter, b.label, 1)
                    for b in own
                    if b.label
                ),
                negatives=tuple(
                    Negative(b.xyxy, b.class_name, b.letter) for b in own if b.class_name in NEGATIVES
                ),
                points=_inside(points.get(name, []), looked[0], folder / "shapes.csv", result.findings),
            )
        )
    keep_apart((result,), same_as={})
    return result


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line number and the cells of each row. A cell that a short row lacks is empty."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, restval="")
            if missing := [c for c in columns if c not in (reader.fieldnames or ())]:
                raise UsageError(f"{file}: has no column {missing[0]!r}")
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise UnavailableError(
            f"{file}: {error.strerror}", "docs/training.md says where to get it"
        ) from error


def _inspected_boxes(
    file: Path, complete: Container[str], find: Callable[[AnnotationFinding], None]
) -> dict[str, list[_RawBox]]:
    """Reads ``boxes.csv``: the boxes of each photograph. Those of other photographs become findings."""
    boxes: dict[str, list[_RawBox]] = {}
    for line, row in _rows(file, ("image", "x0", "y0", "x1", "y1", "letter", "kind", "label")):
        letter, kind, label = row["letter"], row["kind"], row["label"]
        if row["image"] not in complete:
            message = f"{row['image']}: no split says that its boxes are complete"
            find(AnnotationFinding(file, line, "not-in-split", message, "box left out"))
            continue
        try:
            xyxy = (float(row["x0"]), float(row["y0"]), float(row["x1"]), float(row["y1"]))
        except ValueError as error:
            find(AnnotationFinding(file, line, "bad-line", f"no box: {error}", "box left out"))
            continue
        if _INSPECTED.get(letter) != (kind, label):
            message = f"letter {letter!r} with kind {kind!r} and label {label!r}"
            find(AnnotationFinding(file, line, "unknown-class", message, "box left out"))
            continue
        known: labels.VerifiedName = (
            "single" if label == "single" else "overlapping" if label == "overlapping" else ""
        )
        boxes.setdefault(row["image"], []).append(_RawBox(line, kind, xyxy, letter, known))
    return boxes


def _shape_points(
    file: Path, images: Container[str], find: Callable[[AnnotationFinding], None]
) -> dict[str, list[tuple[int, ShapePoint]]]:
    """Reads ``shapes.csv``: the points of each photograph with their lines."""
    points: dict[str, list[tuple[int, ShapePoint]]] = {}
    for line, row in _rows(file, ("image", "x", "y", "shape")):
        if row["image"] not in images:
            message = f"no split names {row['image']}"
            find(AnnotationFinding(file, line, "not-in-split", message, "point left out"))
            continue
        try:
            point = ShapePoint(float(row["x"]), float(row["y"]), row["shape"])
        except ValueError as error:
            find(AnnotationFinding(file, line, "bad-line", f"no point: {error}", "point left out"))
            continue
        if point.shape not in SHAPES:
            find(AnnotationFinding(file, line, "unknown-class", f"{point.shape!r}", "point left out"))
            continue
        points.setdefault(row["image"], []).append((line, point))
    return points


def _inside(
    points: Iterable[tuple[int, ShapePoint]],
    size: tuple[int, int],
    file: Path,
    findings: list[AnnotationFinding],
) -> tuple[ShapePoint, ...]:
    """Returns the points that lie in the photograph, each once. Every other one becomes a finding."""
    kept: dict[ShapePoint, None] = {}
    for line, point in points:
        where = f"({point.x:g}, {point.y:g})"
        if not (0 <= point.x <= size[0] and 0 <= point.y <= size[1]):
            message = f"{where} in {size[0]}x{size[1]}"
            findings.append(AnnotationFinding(file, line, "outside", message, "point left out"))
        elif point in kept:
            message = f"{where} stands there already"
            findings.append(AnnotationFinding(file, line, "duplicate", message, "point left out"))
        else:
            kept[point] = None
    return tuple(kept)


def _is_png(image: Path) -> bool:
    with image.open("rb") as stream:
        return stream.read(8) == b"\x89PNG\r\n\x1a\n"


def _look(image: Path, findings: list[AnnotationFinding]) -> tuple[tuple[int, int], Float32] | None:
    """Returns (width, height) and the thumbnail of an image, or None with a finding."""
    try:
        pixels = image_file.load_field(image, "", "").image
    except ImageError as error:
        kind = "missing-image" if error.reason == "vanished" else "unreadable-image"
        findings.append(AnnotationFinding(image, 0, kind, error.message, "photograph left out"))
        return None
    grey = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    centred = grey.astype(np.float32) - grey.mean(dtype=np.float32)
    thumbnail = centred / max(float(np.linalg.norm(centred)), 1e-6)
    return (pixels.shape[1], pixels.shape[0]), np.asarray(thumbnail, np.float32)


def _yolo_boxes(file: Path, size: tuple[int, int], findings: list[AnnotationFinding]) -> list[_RawBox] | None:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        findings.append(AnnotationFinding(file, 0, "missing-annotation", str(error), "photograph left out"))
        return None
    except UnicodeDecodeError as error:
        findings.append(AnnotationFinding(file, 0, "bad-line", f"not text: {error}", "photograph left out"))
        return None
    boxes: list[_RawBox] = []
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        words = content.split()
        try:
            number, (cx, cy, w, h) = words[0], (float(v) for v in words[1:])
        except (ValueError, IndexError):
            findings.append(
                AnnotationFinding(
                    file, line, "bad-line", f"{content!r} is not 'class cx cy w h'", "box left out"
                )
            )
            continue
        name = CLASS_NAMES[YOLO_CLASSES[int(number)]] if number in ("0", "1", "2") else number
        x, y = cx * size[0], cy * size[1]
        half_w, half_h = w * size[0] / 2, h * size[1] / 2
        boxes.append(_RawBox(line, name, (x - half_w, y - half_h, x + half_w, y + half_h)))
    return boxes


def _voc_boxes(file: Path, size: tuple[int, int], findings: list[AnnotationFinding]) -> list[_RawBox] | None:
    """Parses VOC with expat itself, because ElementTree does not keep line numbers."""
    boxes: list[_RawBox] = []
    path: list[str] = []
    text: dict[str, str] = {}
    start_line = 0
    parser = xml.parsers.expat.ParserCreate()

    def start(name: str, _attributes: dict[str, str]) -> None:
        nonlocal start_line
        path.append(name)
        if name == "object":
            text.clear()
            start_line = parser.CurrentLineNumber

    def data(content: str) -> None:
        key = path[-1] if path else ""
        text[key] = text.get(key, "") + content

    def end(name: str) -> None:
        path.pop()
        if name == "size":
            declared = text.get("width", "").strip(), text.get("height", "").strip()
            if declared != (str(size[0]), str(size[1])):
                message = f"says {declared[0]}x{declared[1]}, the image is {size[0]}x{size[1]}"
                findings.append(
                    AnnotationFinding(file, parser.CurrentLineNumber, "size-mismatch", message, "kept")
                )
        if name != "object":
            return
        known = VOC_CLASSES.get(text.get("name", "").strip())
        label = CLASS_NAMES[known] if known is not None else text.get("name", "").strip()
        try:
            # VOC counts pixels from 1 and includes the last one.
            x0, y0 = float(text["xmin"]) - 1, float(text["ymin"]) - 1
            x1, y1 = float(text["xmax"]), float(text["ymax"])
        except (KeyError, ValueError) as error:
            findings.append(
                AnnotationFinding(
                    file, start_line, "bad-line", f"object without a box: {error}", "box left out"
                )
            )
            return
        boxes.append(_RawBox(start_line, label, (x0, y0, x1, y1)))

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    try:
        parser.Parse(file.read_bytes(), True)
    except OSError as error:
        findings.append(AnnotationFinding(file, 0, "missing-annotation", str(error), "photograph left out"))
        return None
    except xml.parsers.expat.ExpatError as error:
        findings.append(
            AnnotationFinding(file, error.lineno, "bad-line", f"not XML: {error}", "photograph left out")
        )
        return None
    return boxes


def _add(
    result: Collection,
    image: Path,
    source: str,
    split: Split,
    looked: tuple[tuple[int, int], Float32],
    annotation: Path,
    raw: list[_RawBox] | None,
) -> None:
    """Checks the boxes of one photograph and adds it."""
    if raw is None:
        return
    boxes = _checked(raw, looked[0], CLASS_NAMES, annotation, result.findings)
    if not boxes:
        _leave_out_empty(annotation, result.findings)
        return
    result.photographs.append(
        Photograph(
            image_path=image,
            name=image.stem,
            source=source,
            split=split,
            width_px=looked[0][0],
            height_px=looked[0][1],
            **_arrays(boxes),
            thumbnail=looked[1],
        )
    )


class _Arrays(TypedDict):
    xyxy: Float32
    class_id: Int64


def _arrays(boxes: Iterable[_RawBox]) -> _Arrays:
    """The boxes of cells, without those of any other kind."""
    cells = [b for b in boxes if b.class_name in CLASS_NAMES]
    return {
        "xyxy": np.array([b.xyxy for b in cells], np.float32).reshape(-1, 4),
        "class_id": np.array([CLASS_NAMES.index(b.class_name) for b in cells], np.int64),
    }


def _leave_out_empty(annotation: Path, findings: list[AnnotationFinding]) -> None:
    """Says why: a photograph without boxes would teach that its cells are background."""
    findings.append(AnnotationFinding(annotation, 0, "empty", "no usable box", "photograph left out"))


def _checked(
    raw: Iterable[_RawBox],
    size: tuple[int, int],
    names: Sequence[str],
    annotation: Path,
    findings: list[AnnotationFinding],
) -> list[_RawBox]:
    """Returns the boxes that can be used, cut at the border. Every other one becomes a finding."""
    boxes: list[_RawBox] = []
    there: set[tuple[str, tuple[float, float, float, float]]] = set()

    def find(line: int, kind: str, message: str, action: str) -> None:
        findings.append(AnnotationFinding(annotation, line, kind, message, action))

    for box in raw:
        if box.class_name not in names:
            find(box.line, "unknown-class", f"{box.class_name!r}", "box left out")
            continue
        x0, y0, x1, y1 = box.xyxy
        if not (np.isfinite(box.xyxy).all() and x1 > x0 and y1 > y0):
            find(box.line, "no-area", f"{_show(box.xyxy)}", "box left out")
            continue
        inside = max(x0, 0.0), max(y0, 0.0), min(x1, size[0]), min(y1, size[1])
        if inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1:
            find(box.line, "outside", f"{_show(box.xyxy)} in {size[0]}x{size[1]}", "box left out")
            continue
        if max(abs(a - b) for a, b in zip(inside, box.xyxy, strict=True)) > _OUTSIDE_PX:
            find(box.line, "outside", f"{_show(box.xyxy)} in {size[0]}x{size[1]}", "clipped")
        if (box.class_name, inside) in there:
            find(box.line, "duplicate", f"{_show(box.xyxy)} stands there already", "box left out")
            continue
        there.add((box.class_name, inside))
        boxes.append(replace(box, xyxy=inside))
    return boxes


def _show(xyxy: tuple[float, float, float, float]) -> str:
    return "(" + ", ".join(f"{v:.1f}" for v in xyxy) + ")"


def verified_labels(photographs: Iterable[Photograph]) -> labels.VerifiedLabels:
    """Returns our verified labels, and those that came with the boxes of these photographs."""
    own = [v for p in photographs for v in p.verified]
    verified = labels.read_verified()
    return labels.VerifiedLabels([*verified.rows, *own]) if own else verified


def source_diameters_px(photographs: Iterable[Photograph]) -> dict[str, float]:
    """Returns each source's median red-cell diameter, pixels (for photographs that show too few)."""
    sizes: dict[str, list[float]] = {}
    for photograph in photographs:
        sizes.setdefault(photograph.source, []).extend(photograph.whole_rbc_diameters_px.tolist())
    return {source: float(np.median(values)) for source, values in sizes.items() if values}


def labelled_diameter_px(photograph: Photograph, of_source: dict[str, float], *, least: int = 4) -> float:
    """Returns the red-cell diameter of one photograph, pixels.

    Args:
        photograph: The photograph.
        of_source: What `source_diameters_px` returned.
        least: With fewer whole cells than this, the source's diameter is taken.

    Returns:
        The median geometric mean side of its whole red-cell boxes.
    """
    sizes = photograph.whole_rbc_diameters_px
    if len(sizes) >= least:
        return float(np.median(sizes))
    return of_source.get(photograph.source, float(np.median(sizes)) if len(sizes) else 100.0)


def photographs_of(dataset: Path, data: Path) -> dict[str, Photograph]:
    """Reads the photographs that a dataset was made of, again and in full.

    Args:
        dataset: Folder that `write_dataset` wrote.
        data: Folder of the public data.

    Returns:
        TXL-PBC, and Chula where the dataset has it, by name.

    Raises:
        UnavailableError: If the dataset or the data are not there, or not whole.
    """
    try:
        counts = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))["counts"]
    except (OSError, ValueError, KeyError) as error:
        advice = "make it: python -m rbc_train dataset"
        raise UnavailableError(f"{dataset}: not a finished dataset", advice) from error
    photographs = read_public(data)[0].photographs
    if any(CHULA in sources for sources in counts.values()):
        photographs = photographs + read_chula(data / CHULA).photographs
    table = dataset / "completed.csv"
    if table.is_file():
        photographs = completed_photographs(photographs, read_completed(table))
    return {p.name: p for p in photographs}


COMPLETED_COLUMNS: Final = ("name", "x0", "y0", "x1", "y1", "kind", "origin")


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a completed photograph.

    Attributes:
        xyxy: Pixels of the photograph.
        class_id: Which cell.
        origin: ``labelled`` by an annotator, ``pointed`` (found, with a point in it), ``spot`` (a point, and
            the outline of the dark spot under it), ``disc`` (a point, and a cell's mean size), or ``found``.
    """

    xyxy: tuple[float, float, float, float]
    class_id: CellClass
    origin: str


def read_completed(file: Path) -> dict[str, list[Box]]:
    """Reads what `complete.write` wrote: the boxes of each photograph, by its name.

    Raises:
        UnavailableError: If the file is not there.
        UsageError: If it is not such a table.
    """
    boxes: dict[str, list[Box]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                x0, y0, x1, y1 = (float(row[k]) for k in ("x0", "y0", "x1", "y1"))
                kind = CellClass(CLASS_NAMES.index(row["kind"]))
                boxes.setdefault(row["name"], []).append(Box((x0, y0, x1, y1), kind, row["origin"]))
    except OSError as error:
        raise UnavailableError(
            f"{file}: {error.strerror}", "make it: python -m rbc_train complete"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: not a table of completed boxes: {error}") from error
    return boxes


def completed_photographs(photographs: Iterable[Photograph], boxes: dict[str, list[Box]]) -> list[Photograph]:
    """Returns the photographs, those that the table names with its boxes, and complete."""
    made = []
    for photograph in photographs:
        own = boxes.get(photograph.name)
        if not own:
            made.append(photograph)
            continue
        made.append(
            replace(
                photograph,
                xyxy=np.array([b.xyxy for b in own], np.float32).reshape(-1, 4),
                class_id=np.array([b.class_id for b in own], np.int64),
                complete=True,
            )
        )
    return made


def write_dataset(
    collection: Collection,
    out: Path,
    *,
    cell_diameter_px: float,
    crop_margin: float,
    negatives: bool = False,
    completed: Path | None = None,
) -> Iterator[tuple[int, int]]:
    """Writes what the trainers read. Iterate to do the work.

    ``detector/``: PNG photographs resized so that a red cell measures `cell_diameter_px`, YOLO labels in
    the order of `CellClass`, ``data.yaml``. ``crops/<split>.npy``: uint8 (N, 64, 64, 3) of every red-cell
    box, cut from the original photograph with `crop_margin`. ``crops/<split>.csv`` says of each where it
    comes from, its Otsu area (tight crop) and its labels. ``manifest.json``: file hashes, counts per
    class, source and split, and every finding. Photographs that are not complete are left out.

    ``crops/<split>-negatives.npy`` and ``.csv``, where asked for: the same of every box that is not one red
    cell, with its kind (wbc, platelet, or one of `NEGATIVES`). They are files of their own, because whoever
    learns single from overlapping reads every row of ``crops/<split>.csv``.

    Args:
        collection: What a reader returned.
        out: Folder to write. An earlier dataset in it is replaced.
        cell_diameter_px: Diameter of a red cell at model scale.
        crop_margin: See `preprocess.crops`.
        negatives: Whether to write the negatives.
        completed: Table of boxes (`read_completed`) that replace those of its photographs. It is copied into
            the dataset.

    Yields:
        (photographs done, photographs in all).

    Raises:
        UnavailableError: If `out` holds something that is not a dataset of ours, or cannot be written.
    """
    everyone = collection.of("train", "val")
    if completed is not None:
        everyone = completed_photographs(everyone, read_completed(completed))
    photographs = [p for p in everyone if p.complete]
    # Where an earlier run was cut there is no manifest yet: then the marker says that the folder is ours.
    unfinished = out / "unfinished"
    ours = (out / "manifest.json").is_file() or unfinished.is_file()
    if out.exists() and any(out.iterdir()) and not ours:
        raise UnavailableError(f"{out}: is not empty and not a dataset", "choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    for part in ("detector", "crops"):
        shutil.rmtree(out / part, ignore_errors=True)
    for old in ("manifest.json", "completed.csv"):
        (out / old).unlink(missing_ok=True)
    of_source = source_diameters_px(p for p in photographs if p.split == "train")
    verified = verified_labels(photographs)
    files: dict[str, str] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    cut: dict[Split, list[UInt8]] = {"train": [], "val": []}
    rows: dict[Split, list[dict[str, Any]]] = {"train": [], "val": []}
    refused: dict[Split, list[UInt8]] = {"train": [], "val": []}
    refused_rows: dict[Split, list[dict[str, Any]]] = {"train": [], "val": []}
    for done, photograph in enumerate(photographs, start=1):
        diameter = labelled_diameter_px(photograph, of_source)
        view = photograph.view(diameter)
        small = preprocess.detector_input(view, diameter, cell_diameter_px)
        _write_detector_photograph(photograph, small, out, files)
        for class_id in photograph.class_id.tolist():
            counts[photograph.split, photograph.source, CLASS_NAMES[class_id]] += 1
        counts[photograph.split, photograph.source, "photographs"] += 1
        boxes = photograph.xyxy[photograph.class_id == CellClass.RBC]
        cut[photograph.split].append(preprocess.cell_crops(view, boxes, margin=crop_margin))
        areas = labels.otsu_area(preprocess.cell_crops(view, boxes, margin=0.0))
        shapes = shapes_of(photograph, boxes)
        for box, area, shape in zip(boxes, areas.tolist(), shapes, strict=True):
            label = verified.find(photograph.image_path.name, box)
            rows[photograph.split].append(
                {
                    **_where(photograph, box.tolist(), diameter),
                    "otsu_area": area,
                    "letter": label.letter if label else "",
                    "verified": label.label if label else "",
                    "shape": shape,
                }
            )
        if negatives:
            others = photograph.non_red_cells()
            boxes = np.array([n.xyxy for n in others], np.float32).reshape(-1, 4)
            refused[photograph.split].append(preprocess.cell_crops(view, boxes, margin=crop_margin))
            refused_rows[photograph.split] += [
                {**_where(photograph, n.xyxy, diameter), "kind": n.kind, "letter": n.letter} for n in others
            ]
            for n in others:
                if n.kind in NEGATIVES:
                    counts[photograph.split, photograph.source, n.kind] += 1
        yield done, len(photographs)
    if completed is not None:
        shutil.copyfile(completed, out / "completed.csv")
        files["completed.csv"] = sha256(out / "completed.csv")
    threshold = labels.area_threshold(np.array([r["otsu_area"] for r in rows["train"]], np.int64))
    for split in ("train", "val"):
        for row in rows[split]:
            row["weak"] = "overlapping" if row["otsu_area"] > threshold else "single"
        columns = ("otsu_area", "weak", "letter", "verified", "shape")
        _write_crops(out, split, cut[split], rows[split], columns, files)
        if negatives:
            name = f"{split}-negatives"
            _write_crops(out, name, refused[split], refused_rows[split], ("kind", "letter"), files)
    _write_manifest(
        collection=collection,
        out=out,
        files=files,
        counts=counts,
        cell_diameter_px=cell_diameter_px,
        crop_margin=crop_margin,
        threshold=threshold,
        of_source=of_source,
    )
    unfinished.unlink()


def shapes_of(photograph: Photograph, boxes: Float32) -> list[str]:
    """Returns what an expert's point calls each box, float32 (N, 4): N words, "" without a point."""
    points = np.array([(p.x, p.y) for p in photograph.points], np.float32).reshape(-1, 2)
    shapes = [""] * len(boxes)
    for point, box in zip(photograph.points, metrics.match_points(points, boxes).tolist(), strict=True):
        if box >= 0:
            shapes[box] = point.shape
    return shapes


def _write_detector_photograph(
    photograph: Photograph, small: UInt8, out: Path, files: dict[str, str]
) -> None:
    image_file = out / "detector" / "images" / photograph.split / f"{photograph.name}.png"
    label_file = out / "detector" / "labels" / photograph.split / f"{photograph.name}.txt"
    for file in (image_file, label_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    ok, png = cv2.imencode(".png", small[:, :, ::-1])
    if not ok:
        raise UnavailableError(f"{image_file}: could not be encoded")
    image_file.write_bytes(png.tobytes())
    label_file.write_text(yolo_text(photograph), encoding="utf-8")
    for file in (image_file, label_file):
        files[file.relative_to(out).as_posix()] = sha256(file)


def yolo_text(photograph: Photograph) -> str:
    """Returns a photograph's boxes as YOLO text, classes in the order of `CellClass`, at any scale."""
    size = np.array([photograph.width_px, photograph.height_px] * 2, np.float32)
    box = photograph.xyxy / size
    return "".join(
        f"{c} {(x0 + x1) / 2:.6f} {(y0 + y1) / 2:.6f} {x1 - x0:.6f} {y1 - y0:.6f}\n"
        for c, (x0, y0, x1, y1) in zip(photograph.class_id.tolist(), box.tolist(), strict=True)
    )


def write_data_yaml(folder: Path, names: Iterable[str]) -> Path:
    """Writes ``data.yaml``, by which ultralytics finds images, labels and class names. Returns it."""
    numbered = "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
    file = folder / "data.yaml"
    file.write_text(f"train: images/train\nval: images/val\nnames:\n{numbered}", encoding="utf-8")
    return file


def _where(photograph: Photograph, box: Sequence[float], diameter_px: float) -> dict[str, Any]:
    """The columns that say where a crop comes from."""
    corners = dict(zip(("x0", "y0", "x1", "y1"), (round(float(v), 2) for v in box), strict=True))
    own = {"name": photograph.name, "source": photograph.source}
    return {**own, **corners, "diameter_px": round(diameter_px, 2)}


def _write_crops(
    out: Path,
    name: str,
    cut: list[UInt8],
    rows: list[dict[str, Any]],
    columns: tuple[str, ...],
    files: dict[str, str],
) -> None:
    """Writes ``crops/<name>.npy`` and its table: number, place, `columns`."""
    folder, side = out / "crops", preprocess.CROP_PX
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", np.concatenate([np.zeros((0, side, side, 3), np.uint8), *cut]))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        place = ("crop", "name", "source", "x0", "y0", "x1", "y1", "diameter_px")
        writer = csv.DictWriter(stream, [*place, *columns], lineterminator="\n")
        writer.writeheader()
        for crop, row in enumerate(rows):
            writer.writerow({"crop": crop, **row})
    for file in (folder / f"{name}.npy", folder / f"{name}.csv"):
        files[file.relative_to(out).as_posix()] = sha256(file)


def _write_manifest(
    collection: Collection,
    out: Path,
    files: dict[str, str],
    counts: Counter[tuple[str, str, str]],
    cell_diameter_px: float,
    crop_margin: float,
    threshold: int,
    of_source: dict[str, float],
) -> None:
    files["detector/data.yaml"] = sha256(write_data_yaml(out / "detector", CLASS_NAMES))
    table: dict[str, dict[str, dict[str, int]]] = {}
    for (split, source, what), n in sorted(counts.items()):
        table.setdefault(split, {}).setdefault(source, {})[what] = n
    manifest = {
        "cell_diameter_px": cell_diameter_px,
        "crop_margin": crop_margin,
        "weak_label_threshold": threshold,
        "source_diameter_px": {k: round(v, 2) for k, v in sorted(of_source.items())},
        "counts": table,
        "findings": [{**asdict(f), "file": _short(f.file)} for f in collection.findings],
        "files": dict(sorted(files.items())),
    }
    # Written last: a folder with a manifest is a finished dataset.
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _short(file: Path) -> str:
    return "/".join(file.parts[-3:])


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file as a hex digest."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

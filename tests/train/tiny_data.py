"""The public data in small: a few drawn photographs in the folders and formats of the originals."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_field
from rbc_edge.values import Float32, UInt8
from rbc_train.labels import VerifiedLabel, VerifiedLabels

YOLO_NUMBER = {0: 1, 1: 0, 2: 2}  # TXL-PBC: 0 WBC, 1 RBC, 2 platelet
VOC_NAME = {0: "RBC", 1: "WBC", 2: "Platelets"}
CHULA_COLUMNS = {
    "splits.csv": "image,split,boxes",
    "boxes.csv": "image,x0,y0,x1,y1,letter,kind,label",
    "shapes.csv": "image,x,y,shape",
}


def photograph(seed: int, *, width_px: int = 192, height_px: int = 160) -> DrawnField:
    """A drawn photograph with red cells of 40 px."""
    return draw_field(
        np.random.default_rng(seed),
        width_px=width_px,
        height_px=height_px,
        cell_diameter_px=40.0,
        n_single=3,
        group_sizes=(2,),
        n_wbc=seed % 2,
        n_platelets=1,
        stain=CREAM,
    )


def yolo(drawn: DrawnField) -> str:
    """The labels of a photograph in TXL-PBC's format."""
    height, width = drawn.image.shape[:2]
    lines = []
    for (x0, y0, x1, y1), c in zip(drawn.xyxy.tolist(), drawn.class_id.tolist(), strict=True):
        values = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
        lines.append(f"{YOLO_NUMBER[c]} " + " ".join(f"{v:.6f}" for v in values) + "\n")
    return "".join(lines)


def voc(xyxy: Float32, names: Sequence[str], size: tuple[int, int]) -> str:
    """The labels of a photograph in BCCD's format, a tag a line, boxes counted from 1."""
    lines = ["<annotation>", "<size>", f"<width>{size[0]}</width>", f"<height>{size[1]}</height>", "</size>"]
    for (x0, y0, x1, y1), name in zip(np.round(xyxy).astype(int).tolist(), names, strict=True):
        lines += ["<object>", f"<name>{name}</name>", "<bndbox>", f"<xmin>{x0 + 1}</xmin>"]
        lines += [
            f"<ymin>{y0 + 1}</ymin>",
            f"<xmax>{x1}</xmax>",
            f"<ymax>{y1}</ymax>",
            "</bndbox>",
            "</object>",
        ]
    return "\n".join([*lines, "</annotation>"]) + "\n"


def write_image(file: Path, image: UInt8) -> None:
    """Writes RGB losslessly, whatever the suffix says (the decoder looks at the content)."""
    done, data = cv2.imencode(".png", image[:, :, ::-1])
    assert done
    file.write_bytes(data.tobytes())


@dataclass
class TinyData:
    """A folder laid out as the public data, and what was drawn into it."""

    folder: Path
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    drawn: dict[str, DrawnField] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("txl_pbc/images", "txl_pbc/labels", "bccd/JPEGImages", "bccd/Annotations"):
            (self.folder / part).mkdir(parents=True)

    def add_txl(self, split: str, name: str, drawn: DrawnField, *, bccd_name: str = "") -> None:
        """Adds a photograph to TXL-PBC."""
        write_image(self.folder / "txl_pbc" / "images" / f"{name}.jpg", drawn.image)
        self.label_file(name).write_text(yolo(drawn))
        self.drawn[name] = drawn
        self.name(split, bccd_name, f"{name}.jpg")

    def add_bccd(self, split: str, name: str, drawn: DrawnField) -> None:
        """Adds a photograph to BCCD."""
        size = (drawn.image.shape[1], drawn.image.shape[0])
        write_image(self.folder / "bccd" / "JPEGImages" / f"{name}.jpg", drawn.image)
        names = [VOC_NAME[c] for c in drawn.class_id.tolist()]
        self.voc_file(name).write_text(voc(drawn.xyxy, names, size))
        self.drawn[name] = drawn
        self.name(split, name, "")

    def name(self, split: str, bccd: str, txl: str) -> None:
        """Adds a row to splits.csv."""
        self.rows.append((split, bccd, txl))
        with (self.folder / "splits.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(
                [("split", "bccd_image", "txl_pbc_image"), *self.rows]
            )

    def label_file(self, name: str) -> Path:
        """Where TXL-PBC keeps the labels of a photograph."""
        return self.folder / "txl_pbc" / "labels" / f"{name}.txt"

    def voc_file(self, name: str) -> Path:
        """Where BCCD keeps the labels of a photograph."""
        return self.folder / "bccd" / "Annotations" / f"{name}.xml"

    def add_chula(self, split: str, number: int, drawn: DrawnField, *, boxes: bool) -> None:
        """Adds a field to Chula: a point on every single red cell, and boxes if its boxes are complete."""
        folder, image = self.folder / "chula", f"images/{number}.jpg"
        if not folder.is_dir():
            (folder / "images").mkdir(parents=True)
            for name, columns in CHULA_COLUMNS.items():
                (folder / name).write_text(columns + "\n")
        done, data = cv2.imencode(".jpg", drawn.image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, 100))
        assert done
        (folder / image).write_bytes(data.tobytes())
        self.drawn[f"chula-{number}"] = drawn
        self.chula("splits.csv", image, split, "yes" if boxes else "no")
        for box, c, over in zip(
            drawn.xyxy.tolist(), drawn.class_id.tolist(), drawn.overlapping.tolist(), strict=True
        ):
            if c == 0 and not over:
                middle = (round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2))
                self.chula("shapes.csv", image, *middle, "target")
            if boxes:
                kind = ("rbc", "wbc", "platelet")[c]
                letter, label = ("SO"[over], ("single", "overlapping")[over]) if c == 0 else (" WP"[c], "")
                self.chula("boxes.csv", image, *(round(v, 1) for v in box), letter, kind, label)
        if boxes:
            self.chula("boxes.csv", image, 1, 1, 21, 21, "N", "nothing", "")

    def chula(self, table: str, *cells: object) -> None:
        """Adds a row to a table of Chula."""
        with (self.folder / "chula" / table).open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerow(cells)

    def verified(self) -> VerifiedLabels:
        """The drawn truth as verified labels; boxes rounded as in the label files."""
        rows = []
        for name, drawn in self.drawn.items():
            if name.startswith("chula"):
                continue  # its labels come with its boxes
            for box, c, overlapping in zip(drawn.xyxy, drawn.class_id, drawn.overlapping, strict=True):
                if c == 0:
                    x0, y0, x1, y1 = (float(v) for v in np.round(box))
                    letter = "O" if overlapping else "S"
                    rows.append(
                        VerifiedLabel(
                            f"{name}.jpg", "pbc", (x0 + 1, y0 + 1, x1, y1), letter,
                            "overlapping" if overlapping else "single", 1,
                        )
                    )  # fmt: skip
        return VerifiedLabels(rows)


def usual(folder: Path) -> TinyData:
    """Four photographs to train on, two to validate, one to test, and two of BCCD."""
    data = TinyData(folder)
    for seed in range(4):
        data.add_txl("train", f"t{seed}", photograph(seed))
    for seed in (10, 11):
        data.add_txl("val", f"v{seed}", photograph(seed))
    data.add_txl("test", "e20", photograph(20))
    data.add_bccd("train", "BloodImage_00001", photograph(30))
    data.add_bccd("val", "BloodImage_00002", photograph(31))
    return data


def add_chula(data: TinyData) -> None:
    """A field of Chula with complete boxes and one without, to train on and to validate."""
    for number, split, boxes in (
        (1, "train", True),
        (2, "train", False),
        (3, "val", True),
        (4, "val", False),
    ):
        data.add_chula(split, number, photograph(50 + number), boxes=boxes)

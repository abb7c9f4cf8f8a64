"""Images of the worst errors: the crops with the worst scores, the fields with the worst counts.

They show photographs of the public data, which we may not publish. Keep them out of the repository.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from rbc_edge.errors import UnavailableError
from rbc_edge.values import CellClass, Float32, UInt8
from rbc_train import evaluate, metrics
from rbc_train.data import Box, Photograph
from rbc_train.evaluate import Examined
from rbc_train.labels import VerifiedLabels

# Okabe and Ito's palette, RGB.
_FOUND: Final = (0, 114, 178)
_MISSED: Final = (213, 94, 0)
_FALSE: Final = (204, 121, 167)
_INK: Final = (0, 0, 0)

_CROP_PX: Final = 150
_SURROUNDINGS: Final = 1.0  # share of the box on each side: what touches the cell must be seen
_FIELD_PX: Final = 620
_TITLE_PX: Final = 22
_DASH_PX: Final = 6


def write(
    examined: Sequence[Examined], verified: VerifiedLabels, threshold: float, folder: Path, prefix: str = ""
) -> list[Path]:
    """Writes both kinds of sheets. Photographs that are not complete are left out.

    Args:
        examined: What `evaluate.examine` returned.
        verified: Overlap labels, as given to it.
        threshold: The bundle's overlap threshold.
        folder: Where to. Not in the repository.
        prefix: Of the names of the files.

    Returns:
        The files.

    Raises:
        UnavailableError: If they cannot be written.
    """
    examined = [e for e in examined if e.photograph.complete]
    sheets = {
        "worst-singles.png": worst_verdicts(examined, verified, threshold, overlapping=False),
        "worst-overlapping.png": worst_verdicts(examined, verified, threshold, overlapping=True),
        "worst-fields.png": worst_fields(examined),
    }
    files = []
    for name, sheet in sheets.items():
        if sheet is None:
            continue
        done, data = cv2.imencode(".png", sheet[:, :, ::-1])
        file = folder / f"{prefix}{name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data.tobytes() if done else b"")
        except OSError as error:
            raise UnavailableError(
                f"{file}: {error.strerror}", "choose another folder with --sheets"
            ) from error
        files.append(file)
    return files


def worst_verdicts(
    examined: Sequence[Examined],
    verified: VerifiedLabels,
    threshold: float,
    *,
    overlapping: bool,
    most: int = 40,
    columns: int = 8,
) -> UInt8 | None:
    """Shows verified cells of one kind that were judged wrong, the worst first.

    Args:
        examined: What `evaluate.examine` returned.
        verified: Overlap labels, as given to it.
        threshold: The bundle's overlap threshold.
        overlapping: Cells that are called single and are not. Else the other way round.
        most: How many at most.
        columns: How many in a row.

    Returns:
        uint8 (H, W, 3) RGB: each cell with its box, score, letter and source. None when no verdict is
        wrong.
    """
    wrong: list[tuple[float, Examined, int]] = []
    for e in examined:
        called = e.found_score >= threshold
        mistaken = ~np.isnan(e.found_score) & (e.overlapping == overlapping) & (called != overlapping)
        wrong += [(float(e.found_score[i]), e, i) for i in np.flatnonzero(mistaken).tolist()]
    wrong.sort(key=lambda w: w[0], reverse=not overlapping)
    tiles = []
    for score, e, i in wrong[:most]:
        box = np.array(evaluate.usable(verified, e.photograph)[i].xyxy, np.float32)
        title = f"{score:.2f} {e.letter[i]} {e.photograph.source}"
        tiles.append(_titled(_crop(e.photograph.read(), box), title))
    return _grid(tiles, columns) if tiles else None


def worst_fields(examined: Sequence[Examined], *, most: int = 12, columns: int = 3) -> UInt8 | None:
    """Shows the photographs with the largest errors of the red-cell count.

    Args:
        examined: What `evaluate.examine` returned.
        most: How many at most.
        columns: How many in a row.

    Returns:
        uint8 (H, W, 3) RGB: found boxes blue and solid, labelled but missed ones orange and dashed, false
        ones pink with a cross. None when every count is right.
    """
    counted, labelled = evaluate.field_counts(examined, CellClass.RBC)
    error = np.abs(counted - labelled)
    order = np.argsort(-error, kind="stable")[:most]
    tiles = []
    for i in order[error[order] > 0].tolist():
        photograph = examined[i].photograph
        title = f"{photograph.source} {photograph.name[:13]}: labelled {labelled[i]}, counted {counted[i]}"
        tiles.append(_titled(_boxes(examined[i]), title))
    return _grid(tiles, columns) if tiles else None


_ORIGINS: Final = {
    "labelled": (0, 130, 0),
    "pointed": (0, 130, 0),
    "found": (0, 0, 255),
    "spot": (255, 0, 0),
    "disc": (255, 0, 0),
}


def write_completed(
    photographs: Sequence[Photograph], boxes: Mapping[str, Sequence[Box]], out: Path, *, most: int = 12
) -> list[Path]:
    """Draws photographs with completed boxes, to be looked at before they teach.

    Args:
        photographs: Those that were completed.
        boxes: What `data.read_completed` returned.
        out: Folder to write.
        most: Photographs on a sheet.

    Returns:
        A sheet for each origin of boxes but ``labelled``: green is labelled or has a point, blue was found,
        red is a point that nothing held. White cells are drawn in magenta.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for origin in ("pointed", "found", "spot", "disc"):
        own = [p for p in photographs if any(b.origin == origin for b in boxes.get(p.name, ()))]
        chosen = [own[round(i)] for i in np.linspace(0, len(own) - 1, min(most, len(own)))]
        if chosen:
            written.append(out / f"completed-{origin}.png")
            tiles = [_titled(_completed(p, boxes[p.name]), f"{p.source} {p.name[:13]}") for p in chosen]
            cv2.imwrite(str(written[-1]), _grid(tiles, 2)[:, :, ::-1])
    return written


def _completed(photograph: Photograph, boxes: Sequence[Box]) -> UInt8:
    image = photograph.read()
    factor = _FIELD_PX / image.shape[1]
    drawn = np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
    for box in boxes:
        corners = np.array(box.xyxy, np.float32) * factor
        ink = (255, 0, 255) if box.class_id is CellClass.WBC else _ORIGINS[box.origin]
        cv2.rectangle(drawn, _point(corners[:2]), _point(corners[2:]), ink, 1)
    return drawn


def _crop(image: UInt8, box: Float32) -> UInt8:
    """uint8 (_CROP_PX, _CROP_PX, 3): a square around the box, grey beyond the photograph."""
    centre, side = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max()) * (1 + 2 * _SURROUNDINGS)
    factor = _CROP_PX / side
    move = np.array([[factor, 0, 0], [0, factor, 0]])
    move[:, 2] = _CROP_PX / 2 - factor * centre
    size = (_CROP_PX, _CROP_PX)
    tile = np.asarray(
        cv2.warpAffine(image, move, size, flags=cv2.INTER_AREA, borderValue=(114,) * 3), np.uint8
    )
    low, high = (factor * box[:2] + move[:, 2]).round(), (factor * box[2:] + move[:, 2]).round()
    cv2.rectangle(tile, _point(low), _point(high), _FOUND, 1)
    return tile


def _boxes(e: Examined) -> UInt8:
    """uint8 (H, W, 3): a photograph with its red-cell boxes, _FIELD_PX wide."""
    image = e.photograph.read()
    factor = _FIELD_PX / image.shape[1]
    drawn = np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
    truth = e.photograph.xyxy[e.photograph.class_id == CellClass.RBC]
    found = e.result.cells.detections
    found = found.take(found.class_id == CellClass.RBC)
    pairs = metrics.match(found.xyxy, found.score, truth, min_iou=evaluate.IOUS[0])
    for box, score, pair in zip(found.xyxy * factor, found.score, pairs.tolist(), strict=True):
        low, high = _point(box[:2]), _point(box[2:])
        if pair >= 0:
            cv2.rectangle(drawn, low, high, _FOUND, 1)
            continue
        cv2.rectangle(drawn, low, high, _FALSE, 2)
        cv2.line(drawn, low, high, _FALSE, 1)
        cv2.line(drawn, (low[0], high[1]), (high[0], low[1]), _FALSE, 1)
        _write(drawn, f"{score:.2f}", (low[0] + 3, low[1] + 14))
    for box in np.delete(truth, pairs[pairs >= 0], axis=0) * factor:
        _dashed(drawn, _point(box[:2]), _point(box[2:]))
    return drawn


def _dashed(image: UInt8, low: tuple[int, int], high: tuple[int, int]) -> None:
    """A dashed rectangle: OpenCV has none."""
    for x in range(low[0], high[0], 2 * _DASH_PX):
        for y in (low[1], high[1]):
            cv2.line(image, (x, y), (min(x + _DASH_PX, high[0]), y), _MISSED, 3)
    for y in range(low[1], high[1], 2 * _DASH_PX):
        for x in (low[0], high[0]):
            cv2.line(image, (x, y), (x, min(y + _DASH_PX, high[1])), _MISSED, 3)


def _titled(image: UInt8, title: str) -> UInt8:
    strip = np.full((_TITLE_PX, image.shape[1], 3), 255, np.uint8)
    _write(strip, title, (3, _TITLE_PX - 7))
    return np.concatenate([strip, image])


def _write(image: UInt8, text: str, place: tuple[int, int]) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, _INK, 1, cv2.LINE_AA)


def _grid(tiles: Sequence[UInt8], columns: int) -> UInt8:
    """Lays tiles out in rows, white between them. Those of a row stand at its top."""
    columns = min(columns, len(tiles))
    width = max(t.shape[1] for t in tiles) + 4
    rows = []
    for start in range(0, len(tiles), columns):
        own = tiles[start : start + columns]
        row = np.full((max(t.shape[0] for t in own) + 4, width * columns, 3), 255, np.uint8)
        for i, tile in enumerate(own):
            row[: tile.shape[0], i * width : i * width + tile.shape[1]] = tile
        rows.append(row)
    return np.concatenate(rows)


def _point(xy: Float32) -> tuple[int, int]:
    return round(float(xy[0])), round(float(xy[1]))

"""Pictures of a field with its cells drawn: a person looks before believing a number."""

import math
from typing import Final

import cv2
import numpy as np

from rbc_edge.values import Cells, Label, UInt8

# Okabe and Ito's palette keeps apart for every kind of colour vision; RGB. Line style says the same again.
_COLOURS: Final = {
    Label.RBC_SINGLE: (0, 114, 178),
    Label.RBC_OVERLAPPING: (213, 94, 0),
    Label.WBC: (0, 158, 115),
    Label.PLATELET: (204, 121, 167),
}
_DASH_DEGREES: Final = 18.0


def draw(image: UInt8, cells: Cells) -> UInt8:
    """Outlines every cell of a field of view.

    Single red cells: thin, whole, blue. Overlapping ones: thick, dashed, orange. White cells: green boxes.
    Platelets: pink circles.

    Args:
        image: uint8 (H, W, 3) RGB; not changed.
        cells: What the analyzer found in it.

    Returns:
        uint8 (H, W, 3) RGB, a copy with the outlines.
    """
    out = image.copy()
    thin = max(1, round(math.sqrt(image.shape[0] * image.shape[1]) / 400))
    for i, (x0, y0, x1, y1) in enumerate(cells.detections.xyxy.tolist()):
        label = cells.label(i)
        colour = _COLOURS[label]
        centre = (round((x0 + x1) / 2), round((y0 + y1) / 2))
        axes = (max(1, round((x1 - x0) / 2)), max(1, round((y1 - y0) / 2)))
        if label == Label.WBC:
            cv2.rectangle(out, (round(x0), round(y0)), (round(x1), round(y1)), colour, 2 * thin, cv2.LINE_AA)
        elif label == Label.RBC_OVERLAPPING:
            for start in np.arange(0.0, 360.0, 2 * _DASH_DEGREES).tolist():
                end = start + _DASH_DEGREES
                cv2.ellipse(out, centre, axes, 0.0, start, end, colour, 2 * thin, cv2.LINE_AA)
        else:
            cv2.ellipse(out, centre, axes, 0.0, 0.0, 360.0, colour, thin, cv2.LINE_AA)
    return out

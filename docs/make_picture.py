"""Makes ``docs/field.jpg``: one drawn field with its cells outlined by the shipped bundle.

Run as ``python docs/make_picture.py`` after ``make demo``. Photographs of the public data do not go into
the repository, so the field is drawn; give the name of a photograph to look at a real one.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from rbc_edge.ops import synthetic
from rbc_edge.values import FieldOfView
from rbc_edge.views import overlay
from rbc_edge.vision import image_file
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle


def main() -> None:
    """Draws or reads a field, counts it, and writes the picture."""
    folder = Path(__file__).resolve().parent
    if len(sys.argv) > 1:
        field = image_file.load_field(Path(sys.argv[1]), "slide", "field")
        out = Path(sys.argv[2] if len(sys.argv) > 2 else "field.jpg")
    else:
        drawn = synthetic.draw_slide(
            np.random.default_rng(7), 1, width_px=900, height_px=560, cell_diameter_px=76.0, crowding=0.3
        )[0]
        field = FieldOfView.of(drawn.image, slide_id="slide", fov="field")
        out = folder / "field.jpg"
    analyzer = Analyzer(Bundle.open())
    result = analyzer.analyze(field, analyzer.estimate_scale([field.image]))
    _, data = cv2.imencode(out.suffix, overlay.draw(field.image, result.cells)[:, :, ::-1])
    out.write_bytes(data.tobytes())


if __name__ == "__main__":
    main()

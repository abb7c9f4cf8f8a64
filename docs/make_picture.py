"""Makes ``docs/field.jpg``: a drawn field of view with the cells that the shipped bundle finds.

Run ``python docs/make_picture.py``. The field is drawn: photographs of the public data are not in
the repository. To see a photograph, run ``python docs/make_picture.py PHOTOGRAPH [OUT]``.
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
    """Draws or reads a field of view, counts it, and writes the image with outlined cells."""
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

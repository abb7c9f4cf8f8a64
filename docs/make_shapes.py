"""Draws ``docs/shapes.svg``: an example of each shape of red cells, for the page about the shape table.

Run as ``python docs/make_shapes.py`` after a shape or a name has changed. The drawings show what the words
mean. They are no photographs.
"""

import math
from pathlib import Path
from typing import Final

from rbc_edge.values import Shape
from rbc_edge.views import shapes

PAGE: Final = Path(__file__).resolve().parent / "shapes.svg"
_RED, _PALE, _LINE = "#c4747c", "#f3dcd6", "#8e4650"
_WIDTH, _HEIGHT, _COLUMNS = 132, 128, 5


def _disc(radius: float, fill: str = _RED) -> str:
    return f'<circle r="{radius:g}" fill="{fill}" stroke="{_LINE}" stroke-width="1.5"/>'


def _oval(long: float, short: float) -> str:
    pale = f'<ellipse rx="{long * 0.4:g}" ry="{short * 0.4:g}" fill="{_PALE}"/>'
    return f'<ellipse rx="{long}" ry="{short}" fill="{_RED}" stroke="{_LINE}" stroke-width="1.5"/>{pale}'


def _middle(radius: float, fill: str = _PALE) -> str:
    return f'<circle r="{radius:g}" fill="{fill}"/>'


def _path(d: str) -> str:
    return f'<path d="{d}" fill="{_RED}" stroke="{_LINE}" stroke-width="1.5" stroke-linejoin="round"/>'


def _burr() -> str:
    n = 16
    radii = [(34 if i % 2 else 27, math.pi * i / n) for i in range(2 * n)]
    points = " ".join(f"{r * math.cos(a):.1f},{r * math.sin(a):.1f}" for r, a in radii)
    return _path(f"M{points}Z")


DRAWINGS: Final = {
    Shape.NORMAL: _disc(32) + _middle(11),
    Shape.MACROCYTE: _disc(40) + _middle(13),
    Shape.MICROCYTE: _disc(24) + _middle(8),
    Shape.SPHEROCYTE: _disc(25, "#a9545e"),
    Shape.TARGET: _disc(34) + _middle(24) + _middle(12, _RED),
    Shape.STOMATOCYTE: _disc(32) + f'<rect x="-18" y="-5" width="36" height="10" rx="5" fill="{_PALE}"/>',
    Shape.OVALOCYTE: _oval(36, 26),
    Shape.TEARDROP: _path("M-46,-6C-28,-8 -18,-26 6,-26A26,26 0 1 1 6,26C-18,26 -28,-4 -46,-6Z"),
    Shape.BURR: _burr(),
    Shape.SCHISTOCYTE: _path("M-28,10A30,30 0 0 1 26,-16L8,-4L-4,-10L-12,4Z"),
    Shape.UNCATEGORISED: _path("M-26,-18C-8,-34 4,-14 24,-22S34,10 16,20S-14,14 -24,24S-40,-4 -26,-18Z"),
    Shape.HYPOCHROMIC: _disc(33) + _middle(24),
    Shape.ELLIPTOCYTE: _oval(42, 17),
}


def svg() -> str:
    """Returns the drawing, as text."""
    n_rows = -(-len(DRAWINGS) // _COLUMNS)
    width, height = _COLUMNS * _WIDTH, n_rows * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" font-size="15" text-anchor="middle">',
        "<title>Drawn examples of red cells</title>",
        f'<rect width="{width}" height="{height}" fill="#fdf6ee"/>',
    ]
    for i, (shape, drawing) in enumerate(DRAWINGS.items()):
        x, y = (i % _COLUMNS + 0.5) * _WIDTH, i // _COLUMNS * _HEIGHT + 48
        parts += [
            f'<g transform="translate({x:g} {y:g})">{drawing}</g>',
            f'<text x="{x:g}" y="{y + 64:g}" fill="#222222">{shapes.name(shape)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PAGE.write_text(svg(), encoding="utf-8")

"""Finished experiments, each a command: ``python -m studies.NAME``. Their figures stand on pages of docs/."""

# Before ultralytics, which replaces Pillow's `Image.open`: `image_file` keeps the one that it found.
from rbc_edge.vision import image_file as image_file

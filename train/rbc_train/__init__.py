"""rbc_train: datasets from public smear images, labels, training and evaluation of the two models."""

# Before ultralytics, which replaces Pillow's `Image.open`: `image_file` keeps the one that it found.
from rbc_edge.vision import image_file as image_file

"""rbc_train: datasets from public smear images, labels, training and evaluation of the two models."""

# Before ultralytics, which puts a function of its own in the place of Pillow's `Image.open`: `imaging` keeps
# the one that it found.
from rbc_edge import imaging as imaging

"""rbc-edge: counts single and overlapping red blood cells in smear images, on the CPU, without torch."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rbc-edge")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+source"

__all__ = ["__version__"]

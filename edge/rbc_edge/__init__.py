"""rbc-edge counts single and overlapping red blood cells in smear images, on the CPU.

`count_image` counts one image, `count_folder` a folder of slides. See docs/python-api.md. Importing this is
cheap and changes nothing in the host program: every name is loaded when it is first used.
"""

from importlib import import_module

TYPE_CHECKING = False  # as `typing` has it, without its 10 ms
if TYPE_CHECKING:
    from rbc_edge.errors import BundleError, ImageError, RbcEdgeError, UnavailableError, UsageError
    from rbc_edge.station.count_folder import FolderResult, count_folder
    from rbc_edge.values import Cell, Cells, Counts, FovResult, Label, Scale, ScaleSource
    from rbc_edge.vision.analyzer import Analyzer, count_image
    from rbc_edge.vision.bundle import Bundle

__version__: str

__all__ = [
    "Analyzer", "Bundle", "BundleError", "Cell", "Cells", "Counts", "FolderResult", "FovResult", "ImageError",
    "Label", "RbcEdgeError", "Scale", "ScaleSource", "UnavailableError", "UsageError", "__version__",
    "count_folder", "count_image",
]  # fmt: skip

_MODULES = {
    "errors": ("BundleError", "ImageError", "RbcEdgeError", "UnavailableError", "UsageError"),
    "station.count_folder": ("FolderResult", "count_folder"),
    "values": ("Cell", "Cells", "Counts", "FovResult", "Label", "Scale", "ScaleSource"),
    "vision.analyzer": ("Analyzer", "count_image"),
    "vision.bundle": ("Bundle",),
}


if not TYPE_CHECKING:  # so that a type checker knows these names and no others

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  takes 20 ms

            try:
                return version("rbc-edge")
            except PackageNotFoundError:  # a source tree that was never installed
                return "0+source"
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"rbc_edge.{module}"), name)
        raise AttributeError(f"module 'rbc_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

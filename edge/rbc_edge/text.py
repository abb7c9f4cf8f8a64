"""Text for people and files, without a heavy import: names as text, sizes, times, one line."""

import os
from typing import Final

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})


def path_text(path: str | os.PathLike[str]) -> str:
    r"""Returns a path as text for any UTF-8 file or terminal: bytes that are not UTF-8 as ``\xNN``."""
    # Not os.fsencode: in a plain C locale that is ASCII, and fails on text that was made here.
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

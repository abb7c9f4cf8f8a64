"""Text for people and files, without a heavy import: names, one line, counts, sizes and times."""

import os
import re
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
)
"""Endings of the files that are counted, in lower case."""

_BY_WORTH: Final = (
    *(".tif", ".tiff", ".png", ".bmp", ".webp", ".heic", ".heif", ".hif"),
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
)

PAGED_SUFFIXES: Final = frozenset({".tif", ".tiff"})
"""Endings of those that may hold several fields of view."""


def path_text(path: str | os.PathLike[str]) -> str:
    r"""Returns a path as text for any UTF-8 file or terminal: bytes that are not UTF-8 as ``\xNN``."""
    # Not os.fsencode: in a plain C locale that is ASCII, and fails on text that was made here.
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_text(name: str) -> str:
    """Returns a name as text in Unicode NFC. A Mac writes the same name in another form.

    >>> name_text("e\u0301") == "\u00e9"
    True
    """
    # The scan asks it twice of each image, and most names are ASCII.
    return name if name.isascii() else unicodedata.normalize("NFC", path_text(name))


def natural_key(name: str) -> str:
    """Returns a text by which names sort as people count: numbers in them by their size.

    Names with the same key differ only in leading zeros: sort by the name then.

    >>> sorted(["f103", "f17", "f2b", "f2"], key=natural_key)
    ['f2', 'f2b', 'f17', 'f103']
    """
    return re.sub("[0-9]+", lambda found: f"{len(n := found[0].lstrip('0')):03d}{n}", name)


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names in the order of `natural_key`."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def better_formats(suffix: str) -> tuple[str, ...]:
    """Returns endings of the formats that keep more of a shot than a file of this ending, the best first.

    >>> better_formats(".PNG")
    ('.tif', '.tiff')
    >>> ".heic" in better_formats(".jpg")
    True
    """
    return _BY_WORTH[: _BY_WORTH.index(suffix.lower())] if suffix.lower() in _BY_WORTH else ()


def one_line(text: str) -> str:
    r"""Returns text with control characters and broken characters as escapes.

    A file name must not steer the terminal, nor the direction of a page's text.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path_text(text))


def count_text(n: int, thing: str) -> str:
    """Returns a number with its noun: "1 image", "2 images"."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def bytes_text(n: float) -> str:
    """Returns a number of bytes in MB, or in GB from one GB on: "2 MB", "1.5 GB"."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def span_text(time_s: float) -> str:
    """Returns a length of time in the unit that people use for it: "42 s", "1 min", "2 h", "2 days"."""
    for unit_s, word, least in ((86400, "days", 2), (3600, "h", 2), (60, "min", 1)):
        if time_s >= least * unit_s:
            return f"{time_s // unit_s:.0f} {word}"
    return f"{time_s:.0f} s"


def local_text(utc: str) -> str:
    """Returns a moment of `utc_text` in the time of this computer, with that in UTC behind it.

    What is no such moment stays as it is.
    """
    try:
        here = datetime.fromisoformat(utc).astimezone()
    except (ValueError, OverflowError):
        return utc
    if not utc.endswith("Z") or not here.utcoffset():
        return utc
    return f"{here:%Y-%m-%d %H:%M:%S %Z} ({utc})"


def utc_text(moment: datetime) -> str:
    """Returns a moment with a time zone as ISO 8601 in UTC, to the second: "2026-01-02T03:04:05Z"."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

"""Names of the files that show a slide: valid on every disk, and no two the same."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final

OVERLAYS: Final = "overlays"
OVERLAY_SUFFIX: Final = "_overlay.jpg"
REPORTS: Final = "reports"

_MAX_NAME_BYTES: Final = 120  # with prefix, hash and suffix it stays below 255, the limit of file systems


def file_names(slide_ids: Sequence[str]) -> dict[str, str]:
    """Gives each slide a file name without suffix that every file system accepts.

    The slide that was seen first stands in front, so a slide keeps its name when others are added. A name
    ends in a hash of the slide_id if it is too long, or reserved, or if an earlier name differs from it only
    by case or by characters that a file name cannot have.
    """
    names: dict[str, str] = {}
    taken = {"slides"}  # slides.csv is the table of all slides
    for slide_id in slide_ids:
        name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", slide_id)
        name = re.sub(r"^[.\-~]+|[. ]+$", "_", name) or "_"
        digest = hashlib.sha256(slide_id.encode()).hexdigest()
        short = name.encode()[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
        if short != name:
            name = f"{short}-{digest[:8]}"
        for length in range(8, len(digest) + 1, 8):
            if _folded(name) not in taken:
                break
            name = f"{short}-{digest[:length]}"
        taken.add(_folded(name))
        names[slide_id] = name
    return names


def _folded(name: str) -> str:
    """Returns the same text for names that are one file where the file system ignores case or accents."""
    return unicodedata.normalize("NFC", name).casefold()


def on_disk(name: str) -> str:
    """Returns a file name in the form that the system wants: UTF-8 on disk in every locale."""
    return os.fsdecode(name.encode())


def overlay_folder(out: Path, slide_name: str) -> Path:
    """Returns the folder of a slide's overlays, from its file name (`file_names`)."""
    return out / OVERLAYS / on_disk(slide_name)


def overlay_paths(out: Path, slide_name: str, fovs: Sequence[str]) -> dict[str, Path]:
    """Returns the path of the overlay, drawn or not, of each counted field of a slide (all, in order)."""
    folder = overlay_folder(out, slide_name)
    return {fov: folder / on_disk(f"{name}{OVERLAY_SUFFIX}") for fov, name in file_names(fovs).items()}


def page_name(slide_name: str) -> str:
    """Returns the file name of a slide's page. ``index.html`` is the list of all slides."""
    return f"{slide_name}_.html" if slide_name.casefold() == "index" else f"{slide_name}.html"

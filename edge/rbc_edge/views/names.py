"""Names of the files that show a slide: valid on every disk, and no two the same."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

OVERLAYS: Final = "overlays"
OVERLAY_SUFFIX: Final = "_overlay.jpg"
REPORTS: Final = "reports"
_OURS: Final = ("slides", "index")  # ``slides.csv``, ``index.html``

# Windows takes these for devices, whatever the ending. COM and LPT also with the raised digits.
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)
_MAX_NAME_BYTES: Final = 120  # with prefix, hash and suffix it stays below 255, the limit of file systems


def file_names(slide_ids: Sequence[str], *, reserved: Sequence[str] = ("slides",)) -> dict[str, str]:
    """Gives each slide a file name without suffix that every file system accepts.

    Those in front have the simplest names (see `Reader.slide_ids`): a name depends on the slides that there
    are, and not on which one came first. A name ends in a hash of the slide_id if it is too long, or
    reserved, or if an earlier name differs from it only by case or by characters that a file name cannot
    have. A name that is a device's on Windows begins with
    ``_``. ``slides.csv`` is the table of all slides.
    """
    names: dict[str, str] = {}
    taken = set(reserved)
    for slide_id in slide_ids:
        name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', "_", slide_id)
        name = re.sub(r"^[.\-~]+|[. ]+$", "_", name) or "_"
        name = f"_{name}" if _DEVICE.match(name) else name
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


def old_files(
    folder: Path, names: Mapping[str, str], suffix: str = "", *, of: Collection[str] | None = None
) -> list[Path]:
    """Returns what shows slides (None: all) under names that they had among other slides."""
    used = {_folded(name): name for name in names.values()}
    found = []
    for slide_id in names if of is None else of:
        (alone,) = file_names([slide_id], reserved=()).values()
        beside = file_names([slide_id], reserved=(_folded(alone),))[slide_id]
        for name in {alone, beside}.difference(used.values(), _OURS):
            path, other = folder / on_disk(name + suffix), used.get(_folded(name))
            # Where the disk ignores case, it is the file of another slide.
            if os.path.lexists(path) and not (other and _is_same(path, folder / on_disk(other + suffix))):
                found.append(path)
    return found


def _is_same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        return path.samefile(other)
    return False


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


def page_names(slide_ids: Sequence[str]) -> dict[str, str]:
    """Returns the file name of each slide's page. ``index.html`` is the list of all slides."""
    return {slide: f"{name}.html" for slide, name in file_names(slide_ids, reserved=_OURS).items()}

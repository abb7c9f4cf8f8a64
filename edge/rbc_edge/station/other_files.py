"""What lies beside the images and is not counted: other kinds, copies by programs, folders of systems.

All is told by names. Nothing here opens a file. What is passed over and may be meant to be counted is said.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from rbc_edge.text import count_text, name_text, one_line

NOT_COUNTED_NOTE: Final = "not counted"
"""Name of the note in the ledger that keeps what the last run found, a line each."""
_MAX_KINDS: Final = 8  # named in a line

# -- kinds of files that may hold images, and are not read -------------------------------------------------

_ARCHIVES: Final = "7z ace arj bz2 cab gz iso lz lz4 lzma rar tar tbz tbz2 tgz txz xz zip zst"
_HEIF: Final = "heic heif hif"
_KINDS: Final = (
    _ARCHIVES,
    _HEIF,
    # of cameras, viewers and the web; .webp is read where Pillow has it
    "avif avifs dds exr gif hdr hdp j2c j2k jls jng jp2 jpc jpf jpm jpx jxl jxr pbm pcx pfm pgm pnm ppm qoi"
    " sgi tga wdp webp",
    # of microscopes, and of scanners of whole slides
    "afi bif btf c01 cxd czi dcm dib dicom dm3 dm4 dv fit fits flex fts gel ics ids ima ims isyntax kfb lei"
    " lif lof lsm mds mdsx mha mhd mrc mrxs mvd2 nd nd2 ndpi ndpis nrrd oib oif oir ome poir qptiff r3d scn"
    " sdpc sis sld sldy spe stk svs svslide szi tf2 tf8 tmap tron vms vmu vsi xdce xlef xlif zvi",
    # raw images of cameras
    "3fr ari arw bay cap cr2 cr3 crw dcr dcs dng drf eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef nrw"
    " orf pef ptx raf raw rw2 rwl rwz sr2 srf srw x3f",
    # drawings, documents, films
    "afphoto ai clip cdr djvu eps indd kra odp pdf ppt pptx psb psd svg xcf xps",
    "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv ser webm wmv",
)
NOT_READ: Final = frozenset(f".{kind}" for kind in " ".join(_KINDS).split())
"""Endings, in lower case, of files that may hold images and are no `IMAGE_SUFFIXES`, or not always."""
_NO_IMAGES: Final = tuple(f".{kind}" for kind in f"{_ARCHIVES} odp pdf ppt pptx xps".split())
_NOT_READ_FOLDERS: Final = (".n5", ".zarr")  # an image that is a folder

# -- folders that systems and storages make ----------------------------------------------------------------

# By their names in lower case. Names that begin with a point are passed over in any case: .stversions,
# .Trash-1000, .thumbnails, .snapshot, ._image.jpg.
_MACHINE: Final = frozenset(
    {"@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp", "#recycle", "#snapshot", "~snapshot"}
    | {"$recycle.bin", "recycled", "recycler", "system volume information", "dfsrprivate", "msocache"}
    | {"lost+found", "lost.dir", "network trash folder", "temporary items", "thevolumesettingsfolder"}
    | {"__macosx", "thumbs", "thumbnails", "_thumbs", "_thumbnails"}
)
_FOUND: Final = re.compile(r"found\.\d{3}|\$recycle\..*")
_FOUND_FIRST: Final = ("f", "$")

# -- pictures that programs make of an image ---------------------------------------------------------------

# CellProfiler, Fiji, Cellpose, StarDist, ilastik, QuPath, labelling programs, viewers; and rbc-edge.
# A + is a space, or _ or nothing.
_MADE: Final = (
    "annot annotated annotation annotations binarized binary boundaries boundary contour contours count"
    " count+masks counted counts cp+flows cp+mask cp+masks cp+outline cp+outlines cp+output cyto+masks"
    " detected detection detections dp+cp+masks drawing flow flows ground+truth groundtruth gt heatmap"
    " instances label labeled labelled labels marked marking markings mask masks nuclei+masks"
    " object+identities object+predictions outline outlines overlaid overlay overlay+masks overlays pred"
    " predicted prediction predictions preds preview probabilities probability probability+map rendered"
    " result results rgb+overlay roi rois scale+bar seg segmentation segmentations segmented segs semantic"
    " simple+segmentation skeleton thresh threshold thresholded thumb thumbnail thumbnails thumbs"
    " uncertainty"
)
_WORDS: Final = _MADE.replace(" ", "|").replace("+", "[ _]?")
_BEHIND: Final = re.compile(rf"(.+?)[ _.-]+\(?(?:{_WORDS})\)?(?:[ _-]?\d{{1,3}})?", re.DOTALL)
_IN_FRONT: Final = re.compile(rf"(?:{_WORDS}|tn)(?:[ _-]of)?[ _.-]+(.+)", re.DOTALL)
# A quick look that most names do not pass.
_FIRST: Final = frozenset({"tn_", "tn-", *(word[:3] for word in _MADE.split())})
_LAST: Final = frozenset(word[-3:] for word in _MADE.split())
_NUMBER: Final = "0123456789 _-)"


def originals(stem: str) -> Iterator[str]:
    """Yields the names that an image may have of which another is a copy, by the copy's name without ending.

    >>> list(originals("a_cp_masks-overlay"))
    ['a_cp_masks', 'a']
    >>> list(originals("Mask of A.tif"))
    ['a.tif', 'a']
    """
    name = name_text(stem).lower()
    while match := _BEHIND.fullmatch(name) or _IN_FRONT.fullmatch(name):
        name = match[1].rstrip(" _.-")
        if name:
            yield name
        if bare := name.rpartition(".")[0]:
            yield bare


def may_be_copy(name: str) -> bool:
    """Tells, quickly and sometimes wrongly, whether a file of this name may have `originals`."""
    stem = name.lower().rpartition(".")[0]
    return stem[:3] in _FIRST or stem.rstrip(_NUMBER)[-3:] in _LAST


def keys(name: str) -> tuple[str, str]:
    """Returns what `originals` yields for a copy of the image of this name: with its ending and without."""
    name = name_text(name).lower()
    return name, name.rpartition(".")[0]


class Ignored:
    """Names that are passed over: of systems and storages, and by patterns (the setting `ignore`)."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.has_patterns = bool(patterns)  # without, only folders need to be asked about
        words = "|".join(translate(name_text(pattern).lower()) for pattern in patterns)
        self._match: Callable[[str], object] | None = re.compile(words).match if patterns else None

    def __call__(self, name: str, way: str) -> bool:
        """Tells it of a file or a folder. `way`: its path from the source on, its name at the end."""
        low = name.lower()
        if low in _MACHINE or (low[:1] in _FOUND_FIRST and _FOUND.fullmatch(low)):
            return True
        if self._match is None:
            return False
        return bool(self._match(name_text(name).lower()) or self._match(name_text(way).lower()))


class Remark(NamedTuple):
    """What a person should know of other files."""

    key: str  # changes only when there is something new to say
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}"


@dataclass(slots=True)
class OtherFiles:
    """What a scan found besides images."""

    kinds: Counter[str] = field(default_factory=Counter)  # ending to number, of kinds that are not read
    copies: list[Path] = field(default_factory=list)  # that programs made of images beside them
    n_ignored: int = 0  # files and folders

    def __bool__(self) -> bool:
        return bool(self.kinds or self.copies)

    def add_kind(self, suffix: str, *, is_folder: bool = False) -> bool:
        """Counts a file, or a folder that is an image. Returns whether it is of a kind that is not read."""
        is_kind = suffix in (_NOT_READ_FOLDERS if is_folder else NOT_READ)
        if is_kind:
            self.kinds[suffix] += 1
        return is_kind

    def remarks(self) -> list[Remark]:
        """Returns what a person should know."""
        said = []
        if self.kinds:
            n, named = (
                sum(self.kinds.values()),
                sorted(self.kinds, key=lambda k: (-self.kinds[k], k))[:_MAX_KINDS],
            )
            what = ", ".join(f"{self.kinds[kind]} {kind}" for kind in named)
            more = f" and {len(self.kinds) - len(named)} other kinds" if len(self.kinds) > len(named) else ""
            text = f"{count_text(n, 'file')} of kinds that are not read: {what}{more}"
            said.append(Remark(" ".join(sorted(self.kinds)), text, self._advice()))
        if self.copies:
            pictures = f"{count_text(len(self.copies), 'picture')} not counted"
            text = (
                f"{pictures}, made by a program of an image beside, such as {one_line(str(min(self.copies)))}"
            )
            said.append(Remark("copies", text, "rename one that is a field itself"))
        return said

    def _advice(self) -> str:
        heif, archives = ({f".{kind}" for kind in kinds.split()} for kinds in (_HEIF, _ARCHIVES))
        advice = []
        if self.kinds.keys() - archives:
            advice.append("save each field of view as JPEG, PNG or TIFF")
        if found := sorted(self.kinds.keys() & heif):
            advice.append(f"for {' and '.join(found)} install the extra: pip install 'rbc-edge[heic]'")
        if self.kinds.keys() & archives:
            advice.append("unpack archives")
        return "; ".join(advice)


def without_copies(files: Sequence[tuple[object, str]], others: Sequence[tuple[object, str]]) -> set[int]:
    """Finds copies that programs made of images.

    Args:
        files: Folder and name of each image.
        others: Folder and name of each file of a kind that is not read. An image may be the original.

    Returns:
        Which of the files are copies of another that lies in the same folder.
    """
    stems = ((i, name.rpartition(".")[0]) for i, (_, name) in enumerate(files) if may_be_copy(name))
    asked = {i: names for i, stem in stems if (names := list(originals(stem)))}
    if not asked:
        return set()
    folders = {files[i][0] for i in asked}
    images = (other for other in others if not other[1].lower().endswith(_NO_IMAGES))
    there = {
        (folder, key) for folder, name in chain(files, images) if folder in folders for key in keys(name)
    }
    return {i for i, names in asked.items() if any((files[i][0], name) in there for name in names)}

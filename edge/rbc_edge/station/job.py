"""One look at one file, and many of them on any executor. Pure work: no ledger, no table, no clock of ours.

Everything here can be pickled, so a look runs in a thread, in another process, or on another computer. Each
process makes its analyzer once.
"""

import ctypes
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Final, Protocol

from rbc_edge.errors import (
    NO_MEMORY,
    BundleError,
    ImageError,
    RbcEdgeError,
    UnavailableError,
    machine_trouble,
)
from rbc_edge.store.rows import Look
from rbc_edge.text import better_formats, name_text, path_text
from rbc_edge.values import FieldOfView, FovResult, InboxFile, Measure, Scale, UInt8
from rbc_edge.vision import image_file
from rbc_edge.vision.analyzer import Analyzer
from rbc_edge.vision.bundle import Bundle

log = logging.getLogger(__name__)

MACHINE: Final = "machine"  # failure of a look for which the computer had no memory. Never recorded.
_MAX_HASHED_BYTES: Final = 2_000_000_000  # a larger file was never read; hashing it would take minutes
_LARGE_BYTES: Final = 60_000_000  # a field of 20 megapixels, not compressed
_M_ARENA_MAX: Final = -8  # malloc.h


class Analyzing(Protocol):
    """What a look asks of an analyzer (`rbc_edge.vision.analyzer.Analyzer`)."""

    def measure(self, images: Sequence[UInt8], start: int, /) -> Sequence[Measure]:
        """Measures fields of a slide, uint8 (H, W, 3) images, each on its own."""

    def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
        """Finds the cells of one field of view."""


@dataclass(frozen=True, slots=True)
class AnalyzerRecipe:
    """How a process makes the analyzer that it counts with."""

    bundle_id: str  # what its counts are written down under (`Bundle.counts_as`)
    make: Callable[[], Analyzing]  # for executors of other processes it has to be picklable

    @classmethod
    def of(cls, bundle: Bundle, *, threads: int = 0, precision: str = "int8") -> "AnalyzerRecipe":
        """Returns the recipe for a bundle (see `Analyzer`). Raises `BundleError` without such networks."""
        bundle.networks(precision)
        opening = _OpenBundle(bundle.path, bundle.bundle_id, threads, precision)
        return cls(bundle.counts_as(precision), opening)


@dataclass(frozen=True, slots=True)
class _OpenBundle:
    """Opens a bundle in the process that counts. Compared by value, because it travels between processes."""

    path: Path
    bundle_id: str
    threads: int
    precision: str

    def __call__(self) -> Analyzer:
        bundle = Bundle.open(self.path)
        if bundle.bundle_id != self.bundle_id:
            what = f"{path_text(self.path)}: it is bundle {bundle.bundle_id} now, and was {self.bundle_id}"
            raise BundleError(what, "start again, to count with the new one")
        return Analyzer(bundle, threads=self.threads, precision=self.precision)


@dataclass(frozen=True, slots=True)
class Task:
    """A file to look at."""

    file: InboxFile
    scale: Scale  # of its slide, or the user's
    recipe: AnalyzerRecipe
    known: frozenset[str] = frozenset()  # digests of contents that need no analysis: they are counted already
    beside: frozenset[Path] = frozenset()  # all files of the slide: none that is passed over takes a count


class _Kept:
    """The analyzer of this process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._recipe: AnalyzerRecipe | None = None
        self._analyzer: Analyzing | None = None

    def of(self, recipe: AnalyzerRecipe) -> Analyzing:
        with self._lock:
            if self._analyzer is None or self._recipe != recipe:
                self._analyzer = None  # two of them at once take twice the memory
                self._analyzer = recipe.make()
                self._recipe = recipe
            return self._analyzer

    def drop(self, recipe: AnalyzerRecipe) -> None:
        with self._lock:
            if self._recipe == recipe:
                self._analyzer = self._recipe = None


_KEPT: Final = _Kept()
_ONE_LARGE: Final = Lock()


def share_one_heap() -> None:
    """Has all threads of this process take memory from one heap.

    glibc gives each thread its own, and each keeps the most it ever held. For 640x480 that is 159 MiB instead
    of 151, for 20 megapixels 331 instead of 308, at the same speed.
    """
    with suppress(OSError, AttributeError):  # another C library, which has no such heaps
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def drop_analyzer(recipe: AnalyzerRecipe) -> None:
    """Frees the memory of an analyzer of this process."""
    _KEPT.drop(recipe)


def look_at(task: Task) -> Look:
    """Reads, decodes and counts one file.

    Whatever is wrong with the image is a failure in the look, never an exception. An `RbcEdgeError` is of the
    bundle, or of the computer (`UnavailableError`: a library, open files, threads). Where memory is short,
    the failure is `MACHINE`: it may be enough for other images, and for this one later.
    """
    started_s = perf_counter()
    file, scale = task.file, task.scale
    look = Look(file)
    try:
        # One of the large ones at a time: two of 20 megapixels are half a gigabyte.
        with _ONE_LARGE if _is_large(file, scale) else nullcontext():
            diameter_px = scale.cell_diameter_px
            field = image_file.load_field(
                file.path, file.slide_id, file.fov, file.page, cell_diameter_px=diameter_px
            )
            look = replace(look, sha256=field.sha256, captured_at=field.captured_at)
            if other := _in_better_format(task, field):
                what = f"the same shot as {path_text(other.name)}, which is counted"
                look = replace(look, failure="other-format", message=what)
            elif field.sha256 not in task.known:
                look = replace(look, result=_KEPT.of(task.recipe).analyze(field, scale))
    except ImageError as error:
        look = _troubled(file, error.__cause__) or replace(look, failure=error.reason, message=str(error))
    except RbcEdgeError:
        raise
    except Exception as error:  # whatever it is, the other images are counted
        log.debug("%s", path_text(file.path), exc_info=True)
        message = f"{path_text(file.path)}: could not be counted: {type(error).__name__}: {error}"
        look = _troubled(file, error) or replace(look, failure="error", message=message)
    if look.failure not in ("", "vanished", "unreadable", MACHINE) and not look.sha256:
        look = replace(look, sha256=digest(file))
    return replace(look, elapsed_ms=(perf_counter() - started_s) * 1e3)


def _in_better_format(task: Task, field: FieldOfView) -> Path | None:
    """Returns a file that shows the same shot in a format that keeps more of it. Two pictures are no shot."""
    file = task.file
    if file.page or file.fov != name_text(file.path.name):  # its name without the ending is its own
        return None
    for suffix in better_formats(file.path.suffix):
        for path in (file.path.with_suffix(s) for s in (suffix, suffix.upper())):
            with suppress(ImageError):  # it fails alone
                if path in task.beside and image_file.are_alike(field, image_file.load_field(path, "", "")):
                    return path
    return None


def _troubled(file: InboxFile, error: BaseException | None) -> Look | None:
    """Returns the look at a file for which memory was short. None where the computer is not to blame.

    Raises `UnavailableError` where the computer lacks what every image needs.
    """
    trouble = machine_trouble(error)
    if trouble == NO_MEMORY:
        return Look(file, failure=MACHINE, message=f"{path_text(file.path)}: {trouble}; it is left for later")
    if trouble:
        advice = "no image is to blame; what is counted is kept, and the others are counted next time"
        raise UnavailableError(f"images cannot be counted now: {trouble}", advice) from error
    return None


def looks(
    tasks: Iterable[Task | None],
    executor: Executor,
    *,
    n_ahead: int,
    wait: Callable[[Future[Look]], Look] = Future.result,
) -> Generator[Look, None, None]:
    """Looks at files, several at a time. Yields the looks in the order of the tasks.

    Tasks are taken one by one, `n_ahead` more than the one that is waited for. None is a barrier: nothing
    behind it is begun before everything in front of it has been yielded.
    """
    at_work: deque[Future[Look]] = deque()
    try:
        for task in tasks:
            if task is not None:
                at_work.append(executor.submit(look_at, task))
            n_left = 0 if task is None else n_ahead
            while len(at_work) > n_left:
                yield wait(at_work.popleft())
        while at_work:
            yield wait(at_work.popleft())
    finally:
        for future in at_work:
            future.cancel()


@dataclass(frozen=True, slots=True)
class MeasureLook:
    """What one file says about the scale of its slide."""

    file: InboxFile
    measure: Measure | None = None  # None: it cannot be read, or is not what it was
    message: str = ""  # for a file for which memory was short, in words


def measure(
    files: Sequence[tuple[InboxFile, str]], start: int, max_pixels: float, recipe: AnalyzerRecipe
) -> list[MeasureLook]:
    """Measures the cells of files that have a digest, from `start` on (`scale.measure`).

    No more files are read once the images are more than `max_pixels` together: these are not in the result.
    Raises `RbcEdgeError` as `look_at`.
    """
    images: dict[InboxFile, UInt8] = {}
    found: dict[InboxFile, MeasureLook] = {}
    for file, sha256 in files:
        if sum(image.shape[0] * image.shape[1] for image in images.values()) > max_pixels:
            break
        found[file] = MeasureLook(file)
        try:
            field = image_file.load_field(file.path, file.slide_id, file.fov, file.page)
            if field.sha256 == sha256:
                images[file] = field.image
        except Exception as error:
            if troubled := _troubled(file, error.__cause__ if isinstance(error, ImageError) else error):
                found[file] = MeasureLook(file, message=troubled.message)
            log.debug("%s: not used for the scale", path_text(file.path), exc_info=True)
    if images:
        measures = _measures(list(images.values()), start, recipe)
        found |= {file: MeasureLook(file, m) for file, m in zip(images, measures, strict=True)}
    return list(found.values())


def _measures(images: Sequence[UInt8], start: int, recipe: AnalyzerRecipe) -> list[Measure]:
    try:
        return list(_KEPT.of(recipe).measure(images, start))
    except RbcEdgeError:
        raise
    except Exception as error:
        if trouble := machine_trouble(error):
            what = f"the scale of a slide cannot be estimated now: {trouble}"
            raise UnavailableError(what, "set threads to 1, or end other programs") from error
        log.debug("measuring", exc_info=True)
        if len(images) == 1:  # it says nothing, and is counted, or fails, like the others
            return [Measure(nan, 0, images[0].shape[0] * images[0].shape[1])]
        return [m for image in images for m in _measures([image], start, recipe)]


def digest(file: InboxFile) -> str:
    """Returns `image_file.content_id` of a field. Empty where it cannot be read, or only in minutes."""
    if file.size_bytes <= _MAX_HASHED_BYTES:
        with suppress(OSError), Path(file.path).open("rb") as content:
            return image_file.content_id(hashlib.file_digest(content, "sha256").hexdigest(), file.page)
    return ""


def _is_large(file: InboxFile, scale: Scale) -> bool:
    if file.size_bytes > _LARGE_BYTES:  # a file of many pages is read as a whole for each
        return True
    # Whatever the file's size: 250 megapixels of one colour are a PNG of 30 kB.
    return image_file.n_pixels(file.path, scale.cell_diameter_px) >= image_file.LARGE_PIXELS

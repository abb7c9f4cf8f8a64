"""What is there to be counted: image files of folders and arguments, each with its slide and its name.

The scan opens no image and writes nothing. `Debounce` tells, from one scan to the next, which files are
complete.
"""

import logging
import os
import re
import signal
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import inf
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from rbc_edge.errors import UnavailableError, UsageError, unavailable
from rbc_edge.station.other_files import Ignored, OtherFiles, may_be_copy, without_copies
from rbc_edge.store.outdir import is_result
from rbc_edge.store.schema import FILE_NAME
from rbc_edge.text import name_text, path_text
from rbc_edge.values import InboxFile
from rbc_edge.vision.image_file import read_suffixes

log = logging.getLogger(__name__)

# Failures that an incomplete file shows too: one that is still being written, or moved.
UNFINISHED: Final = frozenset({"empty", "not-an-image", "truncated", "unreadable", "vanished", "changed"})
RESULTS: Final = "results of rbc-edge; they are not counted"
_IGNORED: Final = "files and folders passed over: made by a system, or as the setting ignore says"
_MAX_NS: Final = 2**63 - 1
_LONGEST_NAME: Final = 250  # characters
_MAX_SEARCH_S: Final = 1.0  # of the processor, for one name
_CLOSED_S: Final = 0.1  # after its writer closed it; some close and open again
_FIRST_WAIT_S: Final = 0.5  # before an incomplete file is tried again; doubled each time
_MAX_WAIT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Inbox:
    """What one scan found."""

    files: tuple[InboxFile, ...]  # sorted by slide and field of view in plain character order
    unreadable: tuple[Path, ...] = ()  # sub-folders that could not be listed; their images are not in `files`
    n_skipped: int = 0  # files passed over: no image by their name, or no regular files
    results: tuple[Path, ...] = ()  # folders and links passed over, because they hold results of ours
    # Of a scan that goes on, in words: images left out for a name taken before, names without the pattern.
    clashes: tuple[str, ...] = ()
    other: OtherFiles = field(default_factory=OtherFiles)  # passed over, and to be said


def scan(
    paths: Sequence[Path],
    *,
    slide_pattern: str | None = None,
    ignore: Sequence[str] = (),
    go_on: bool = False,
) -> Inbox:
    """Finds the image files of folders and files, and says which slide each belongs to.

    The files directly in a folder given are the slide named after that folder; each of its sub-folders, at
    any depth, is a slide named by its relative path joined with ``--``. A file given is of the slide named
    after its folder. A file is taken once, however often and by whichever way it is given. Hidden files and
    folders, other suffixes and everything that is not a regular file are passed over; a file given by name
    is taken whatever its suffix. A link that points nowhere is taken, so that it shows up as a failed image.
    Folders with a ledger, and links into results, are passed over. So are folders that systems make, what
    `ignore` names (`other_files.Ignored`; both not where it is the only path given), and copies that programs
    made of an image beside them.

    The pattern is a regular expression, searched for in each file's name, with the named group ``slide`` and
    optionally ``fov``. A file in which it is not found falls back to its folder, and that is said. Names are
    compared in Unicode NFC. `go_on` is for a service: no image is no error, the first of two equal names is
    taken, and nothing is logged. What is wrong stands in the result.

    Raises:
        UsageError: The pattern is wrong or found in no name, or two folders (or two files) would have the
            same name.
        UnavailableError: A path is missing or cannot be read, or there is no image at all.
    """
    pattern = check_pattern(slide_pattern)
    walk = _Walk(Ignored(ignore), read_suffixes(), is_only=len(paths) == 1)
    for path in paths:
        walk.take(Path(os.path.abspath(path)))  # noqa: PTH100 -- resolve() would rename linked slides
    if not walk.found and not go_on:
        where = ", ".join(path_text(p) for p in paths) or "no path given"
        blocked = "".join(f"; cannot read {path_text(p)}" for p in walk.unreadable)
        blocked += "".join(f"; {path_text(p)}: {RESULTS}" for p in walk.results)
        blocked += "".join(f"; {remark}" for remark in walk.other.remarks())
        blocked += f"; {walk.other.n_ignored} {_IGNORED}" if walk.other.n_ignored else ""
        advice = f"images are files whose name ends in {', '.join(sorted(walk.suffixes))}"
        raise UnavailableError(f"no image found: {where}{blocked}", advice)
    clashes: list[str] = []
    files = _named(walk.without_copies(), pattern, clashes if go_on else None)
    if not go_on:
        for folder in walk.unreadable:
            log.warning("%s: cannot be read; its images are not counted", path_text(folder))
        for result in walk.results:
            log.warning("%s: %s", path_text(result), RESULTS)
        if walk.n_skipped:
            log.info("%d files passed over: not an image by their name, or not regular files", walk.n_skipped)
        if walk.other.n_ignored:
            log.info("%d %s", walk.other.n_ignored, _IGNORED)
    passed_over = (tuple(walk.unreadable), walk.n_skipped, tuple(walk.results), tuple(clashes), walk.other)
    return Inbox(files, *passed_over)


def mtime_ns(status: os.stat_result) -> int:
    """Returns when a file was changed, nanoseconds, at most what the ledger holds: some day of 2262."""
    return min(status.st_mtime_ns, _MAX_NS)


def check_pattern(slide_pattern: str | None) -> re.Pattern[str] | None:
    """Returns a slide pattern compiled. Raises `UsageError` where it is wrong."""
    if slide_pattern is None:
        return None
    advice = r"for example (?P<slide>[^_]+)_(?P<fov>\d+)"
    try:
        pattern = re.compile(slide_pattern)
    except (re.error, OverflowError, RecursionError) as error:
        what = f"slide pattern {slide_pattern!r} is no regular expression: {error}"
        raise UsageError(what, advice) from error
    if "slide" not in pattern.groupindex:
        raise UsageError(f"slide pattern {slide_pattern!r} has no group named slide", advice)
    # What brings most patterns of this kind to light: a long row of something that they take, and no end.
    _matches(pattern, [c * _LONGEST_NAME + "\n\n" for c in sorted({*slide_pattern, *"aA0_- ."})])
    return pattern


def _matches(pattern: re.Pattern[str], names: Sequence[str]) -> list[re.Match[str] | None]:
    """Searches a pattern in names. Raises `UsageError` where one of them takes it longer than a second.

    A pattern like ``(a+)+$`` tries more ways than there are atoms, and no look at the pattern tells all that
    do. So the time is bounded: the search asks for signals as it goes, and SIGVTALRM counts the time at work,
    not the time that other programs take. Only the main thread may ask for it, which is where the program
    scans; a host program that scans in another thread has no such bound.
    """

    def late(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread():
        return [pattern.search(name) for name in names]
    found: list[re.Match[str] | None] = []
    before = signal.signal(signal.SIGVTALRM, late)
    try:
        for name in names:
            signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_SEARCH_S)
            found.append(pattern.search(name))
    except TimeoutError as error:
        what = f"the slide pattern {pattern.pattern!r} tries too many ways to read a file name"
        advice = "put no repetition into another one, as in (a+)+: write [^_]+ for a part of the name"
        raise UsageError(what, advice) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return found


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    folder_slide: str
    folder: tuple[int, int]  # device and number: one folder given by two ways is one
    status: os.stat_result


@dataclass(slots=True)
class _Walk:
    """The walk over all paths given. It remembers real folders and files, so that none is taken twice."""

    ignored: Ignored
    suffixes: frozenset[str]  # of images
    is_only: bool  # whether one path is given: it is taken whatever its name
    found: list[_Found] = field(default_factory=list)
    other: OtherFiles = field(default_factory=OtherFiles)
    unreadable: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    n_skipped: int = 0
    _folders: set[tuple[int, int]] = field(default_factory=set)
    _files: set[tuple[int, int, str]] = field(default_factory=set)
    _not_read: list[tuple[object, str]] = field(default_factory=list)  # folder and name of each file
    _has_copies: bool = False  # perhaps
    _start: int = 0  # of a path: where its way from the folder given begins

    def take(self, path: Path) -> None:
        """Takes one absolute path the user gave."""
        if not self.is_only and self.ignored(path.name, path.name):
            self.other.n_ignored += 1  # the shell has put it in the place of a *
            return
        self._start = len(os.path.join(path, ""))  # noqa: PTH118 -- the root has its / already
        try:
            status = path.stat()
        except OSError as error:
            what = f"{path_text(path)}: {(error.strerror or 'cannot be read').lower()}"
            advice = "give an existing folder or image file; is the camera's share mounted?"
            raise UnavailableError(what, advice) from error
        if stat.S_ISDIR(status.st_mode):
            with unavailable(f"{path_text(path)}: cannot list the folder", "check its permissions"):
                self._folder(path, status, name_text(path.name or "root"), "")
        elif stat.S_ISREG(status.st_mode):
            self._file(path, status, name_text(path.parent.name or "root"), path.parent.stat())
        else:
            raise UnavailableError(f"{path_text(path)}: neither a folder nor a regular file", "give an image")

    def _folder(self, folder: Path, status: os.stat_result, slide: str, prefix: str) -> None:
        """Takes a folder's images as `slide`, and its sub-folders as slides named after `prefix`."""
        # A stack, not recursion: folders may nest deeper than Python's stack.
        todo = [(folder, status, slide, prefix)]
        while todo:
            folder, status, slide, prefix = todo.pop()
            if (status.st_dev, status.st_ino) in self._folders:
                continue  # given twice, or a link that leads in a circle
            self._folders.add((status.st_dev, status.st_ino))
            try:
                with os.scandir(folder) as listing:
                    # Real folders before links to them: a slide keeps its own name.
                    entries = sorted(listing, key=lambda e: (e.is_symlink(), e.name))
            except OSError:
                if prefix == "":
                    raise
                self.unreadable.append(folder)
                continue
            if any(entry.name == FILE_NAME for entry in entries):
                self.results.append(folder)
                continue
            todo += reversed(list(self._entries(entries, slide, prefix, status)))

    def _entries(
        self, entries: list[os.DirEntry[str]], slide: str, prefix: str, folder: os.stat_result
    ) -> Iterator[tuple[Path, os.stat_result, str, str]]:
        """Takes the images among a folder's entries and yields its sub-folders."""
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if self.ignored.has_patterns and self.ignored(entry.name, entry.path[self._start :]):
                self.other.n_ignored += 1
                continue
            if entry.is_symlink() and is_result(Path(entry.path)):
                # Else each picture that we draw would be an image to count.
                self.results.append(Path(entry.path))
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  ten times faster
            try:
                status = _status(entry)
            except OSError:
                continue  # gone since the listing
            if stat.S_ISDIR(status.st_mode):
                if self.ignored(entry.name, "") or self.other.add_kind(suffix, is_folder=True):
                    continue
                name = prefix + name_text(entry.name)
                yield Path(entry.path), status, name, f"{name}--"
            elif not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                self.n_skipped += 1
            elif suffix in self.suffixes:
                self._file(Path(entry.path), status, slide, folder)
            elif self.other.add_kind(suffix):
                self._not_read.append(((folder.st_dev, folder.st_ino), entry.name))
            else:
                self.n_skipped += 1

    def _file(self, path: Path, status: os.stat_result, slide: str, folder: os.stat_result) -> None:
        # By folder and name, not by the file's own number: two links to one file are two names, which the
        # ledger tells apart by content.
        identity, name = (folder.st_dev, folder.st_ino), path.name
        if (*identity, name) not in self._files:
            self._files.add((*identity, name))
            self._has_copies = self._has_copies or may_be_copy(name)
            self.found.append(_Found(path, slide, identity, status))

    def without_copies(self) -> list[_Found]:
        """Returns what was found without copies that programs made of it."""
        if not self._has_copies:
            return self.found
        copies = without_copies([(file.folder, file.path.name) for file in self.found], self._not_read)
        self.other.copies += [self.found[i].path for i in sorted(copies)]
        return [file for i, file in enumerate(self.found) if i not in copies] if copies else self.found


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Returns what the entry points at, or the link itself when it points nowhere."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


def _named(
    found: list[_Found], pattern: re.Pattern[str] | None, clashes: list[str] | None
) -> tuple[InboxFile, ...]:
    """Gives each file its slide and a name that is unique there.

    Where two would go by one name, raises `UsageError`, or leaves the later one out and says so in `clashes`.
    """

    def clash(message: str, advice: str) -> None:
        if clashes is None:
            raise UsageError(message, advice)
        clashes.append(f"{message}: {advice}")

    unmatched: list[_Found] = []
    folder_of: dict[str, _Found] = {}
    clashing: set[tuple[int, int]] = set()
    by_name: dict[tuple[str, str], list[_Found]] = defaultdict(list)
    names = [name_text(file.path.name) for file in found]
    for file, match in zip(found, _matches(pattern, names) if pattern else repeat(None), strict=False):
        slide = match["slide"] if match else None
        fov = match["fov"] if match and slide and "fov" in match.re.groupindex else None
        if not slide:
            unmatched.append(file)
            slide = file.folder_slide
            other = folder_of.setdefault(slide, file)
            if other.folder != file.folder and not _same_name(other.path.parent, file.path.parent):
                if file.folder not in clashing:
                    clashing.add(file.folder)
                    folders = f"{path_text(other.path.parent)} and {path_text(file.path.parent)}"
                    advice = "give their common parent folder instead, or rename one of them"
                    clash(f"two folders would be the slide {slide}: {folders}", advice)
                continue
        by_name[slide, fov or name_text(file.path.stem)].append(file)
    if pattern and unmatched:
        n, example = f"{len(unmatched)} of {len(found)}", path_text(unmatched[0].path.name)
        message = f"the slide pattern {pattern.pattern!r} is not found in {n} file names, such as {example}"
        advice = "these images are counted under the names of their folders"
        if clashes is not None:
            clashes.append(f"{message}: {advice}")
        elif len(unmatched) == len(found):
            raise UsageError(message, "correct --slide-pattern, or leave it out")
        else:
            log.warning("%s: %s", message, advice)

    files: dict[tuple[str, str], InboxFile] = {}
    for (slide, fov), same in by_name.items():
        for file in same:
            # In front of a # stands the name of a file whose pages are fields of their own.
            is_page = (slide, fov.rpartition("#")[0]) in by_name
            name = name_text(file.path.name) if len(same) > 1 or is_page else fov
            if other_image := files.get((slide, name)):
                images = f"{path_text(other_image.path)} and {path_text(file.path)}"
                advice = "rename one of them, or give a --slide-pattern that tells them apart"
                clash(f"two images of slide {slide} would have the name {name}: {images}", advice)
                continue
            files[slide, name] = InboxFile(file.path, slide, name, file.status.st_size, mtime_ns(file.status))
    return tuple(files[key] for key in sorted(files))


def _same_name(one: Path, other: Path) -> bool:
    """Tells whether two folders have one name, written in two forms of Unicode."""
    return name_text(str(one)) == name_text(str(other))


@dataclass(slots=True)
class _Seen:
    """A file that is waiting, on the monotonic clock."""

    size_bytes: int
    mtime_ns: int
    since_s: float  # the last change we saw
    is_closed: bool = False
    not_before_s: float = -inf
    n_tries: int = 0


class Debounce:
    """Tells which files are complete, by what one scan after another saw of them.

    All times are of the monotonic clock, because a camera's clock, and ours, may be set back.

    A file is taken when its size and time have not changed for `settle_s`, or sooner where its writer was
    seen to close it. After `grace_s` without a change it is complete, even if it cannot be read. `clock_s`
    gives the time of day, seconds since 1970: then a new file is as old as its own time says. Without it, as
    old as our first sight of it.
    """

    def __init__(
        self, settle_s: float, grace_s: float, *, clock_s: Callable[[], float] | None = None
    ) -> None:
        self._settle_s = settle_s
        self._grace_s = grace_s
        self._clock_s = clock_s
        self._seen: dict[Path, _Seen] = {}

    def see(self, files: Sequence[InboxFile], closed: Collection[Path], now_s: float) -> list[InboxFile]:
        """Notes a scan: files not counted yet, and files that their writers have closed since the last call.

        Returns those to be taken now, in the same order.
        """
        before, self._seen = self._seen, {}
        ready = []
        for file in files:
            seen = before.get(file.path)
            if seen is None or (seen.size_bytes, seen.mtime_ns) != (file.size_bytes, file.mtime_ns):
                age_s = self._clock_s() - file.mtime_ns / 1e9 if self._clock_s and seen is None else 0.0
                seen = _Seen(file.size_bytes, file.mtime_ns, now_s - max(age_s, 0.0))
            if file.path in closed:
                seen.is_closed = True
            self._seen[file.path] = seen
            if self._due_s(seen) <= now_s:
                ready.append(file)
        return ready

    def next_s(self) -> float:
        """Returns when the next waiting file may be taken, monotonic seconds. Infinity without one."""
        return min(map(self._due_s, self._seen.values()), default=inf)

    def n_waiting(self, now_s: float) -> int:
        """Returns how many files are not to be taken yet, and may still be incomplete."""
        return sum(self._due_s(seen) > now_s and self._is_young(seen, now_s) for seen in self._seen.values())

    def is_young(self, file: InboxFile, now_s: float) -> bool:
        """Tells whether a file may still be incomplete."""
        seen = self._seen.get(file.path)
        return seen is not None and self._is_young(seen, now_s)

    def put_back(self, file: InboxFile, now_s: float) -> None:
        """Has a file tried again later, less and less often, and once more when its grace is over."""
        seen = self._seen.get(file.path)
        if seen is None or seen.not_before_s > now_s:  # another page of the file has put it back
            return
        wait_s = min(_FIRST_WAIT_S * 2**seen.n_tries, _MAX_WAIT_S)
        seen.n_tries = min(seen.n_tries + 1, 30)
        seen.not_before_s = now_s + wait_s
        if self._is_young(seen, now_s):
            seen.not_before_s = min(seen.not_before_s, seen.since_s + self._grace_s)

    def _is_young(self, seen: _Seen, now_s: float) -> bool:
        return now_s - seen.since_s < self._grace_s

    def _due_s(self, seen: _Seen) -> float:
        return max(seen.since_s + (_CLOSED_S if seen.is_closed else self._settle_s), seen.not_before_s)

"""One slide's files on their way through a session: what is to do, and what became of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path

from rbc_edge.store.queries import SlideContents
from rbc_edge.store.rows import Attempt, Plan, Recorded, Version
from rbc_edge.text import count_text, path_text
from rbc_edge.values import InboxFile, Measure, Scale, ScaleSource


class SlideWork:
    """One slide's files on their way."""

    def __init__(self, slide_id: str, files: list[InboxFile], plan: Plan, there: Sequence[InboxFile]) -> None:
        self.slide_id = slide_id
        self.files = files
        self.beside = frozenset(f.path for f in there)  # every file that there is of the slide
        self.interrupted: Mapping[InboxFile, Attempt] = plan.interrupted
        self.status = {f: plan.done[f] for f in files if f in plan.done}  # what became of them
        self.scale = Scale(nan, ScaleSource.NONE)
        self.version = Version("", "")  # of its counts
        self.measures: dict[tuple[str, int], Measure] = {}  # made now, by digest and start
        self.was_settled = True
        self.contents = SlideContents({}, frozenset())
        self.begun: dict[InboxFile, None] = {}  # the ledger says that they are being tried
        self.counted: set[InboxFile] = set()  # now
        self.told: set[InboxFile] = set()
        self.waiting: set[InboxFile] = {f for f in files if f in plan.waiting}
        self.troubled: dict[InboxFile, str] = {}  # why they could not be looked at; no fault of theirs
        self.left: set[str] = set()  # slides that lost images to this one
        self.moved = frozenset[str]()  # digests of contents that come from slides that lost them
        # How many fields moved here from each slide, with their counts (True) or to be counted again.
        self.came_from: Counter[tuple[str, bool]] = Counter()
        self.drawn: list[Path] = []  # pictures that we drew, here in place of images
        self.is_changed = self.is_unsettled = self.was_unsettled = False

    def to_do(self) -> list[InboxFile]:
        """Returns the files that need a look."""
        return [f for f in self.files if f not in self.status and f not in self.waiting]

    def add(self, file: InboxFile, recorded: Recorded | None) -> None:
        """Takes in what became of a file. None: it was left for later."""
        self.begun.pop(file, None)
        if recorded is None:
            self.waiting.add(file)
            return
        self.status[file] = recorded.row.status
        if recorded.is_new:
            self.counted.add(file)
        if recorded.row.failure == "overlay":
            self.drawn.append(file.path)
        self.is_changed = True
        self.is_unsettled |= recorded.is_unsettling
        self.was_unsettled |= recorded.is_unsettling
        self.left |= recorded.left
        if recorded.moved_from:
            self.came_from[recorded.moved_from, recorded.is_renamed] += 1

    def notes(self) -> Iterator[str]:
        """Says what has moved, and what is no image of a camera."""
        if self.drawn:
            pictures = f"{count_text(len(self.drawn), 'picture')} not counted, drawn by rbc-edge"
            yield f"slide {self.slide_id}: {pictures}, such as {path_text(self.drawn[0])}"
        for (slide_id, is_whole), n in self.came_from.items():
            fields = count_text(n, "field")
            if slide_id == self.slide_id:
                yield f"slide {slide_id}: {fields} renamed; the counts moved along"
            else:
                how = "with their counts" if is_whole else "and counted again"
                yield f"slide {slide_id}: {fields} moved to slide {self.slide_id}, {how}"

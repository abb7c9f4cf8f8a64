"""Whose images they are: what moved to another slide, what is another slide of its name, what was replaced.

The ledger applies the rules to each look (`Ledger.record`). Here is what needs the files of a slide together.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rbc_edge.errors import UsageError
from rbc_edge.station import job
from rbc_edge.station.notes import Notes
from rbc_edge.station.slide_work import SlideWork
from rbc_edge.store import slide_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import Plan, Version
from rbc_edge.store.schema import is_gone
from rbc_edge.text import count_text, name_text, one_line, path_text
from rbc_edge.values import InboxFile
from rbc_edge.vision.image_file import content_id

log = logging.getLogger(__name__)

_Place = tuple[str, Path, str]  # fov, path and digest of a counted field


class Identity:
    """Compares files with what the ledger has counted, by content.

    Args:
        ledger: The ledger.
        notes: Where it is said what was replaced.
        has_pattern: Whether a slide pattern may gather a slide from several folders.
        may_wait: As in `Session`.
        keep_going: Asked before a file is read. False: it counts as one that cannot be read.
    """

    def __init__(
        self,
        ledger: Ledger,
        notes: Notes,
        *,
        has_pattern: bool,
        may_wait: Callable[[InboxFile, str], bool] | None,
        keep_going: Callable[[], bool],
    ) -> None:
        self._ledger, self._notes = ledger, notes
        self._has_pattern, self._may_wait, self._keep_going = has_pattern, may_wait, keep_going
        self._digests: dict[InboxFile, str] = {}  # of files that were not recorded yet

    def digest(self, file: InboxFile) -> str:
        """Returns the digest of a file that is to be looked at, read once. Empty where it cannot be read."""
        whole = file.whole
        if whole not in self._digests and self._keep_going():
            self._digests[whole] = job.digest(whole)
        return content_id(self._digests.get(whole, ""), file.page)

    def recorded(self, file: InboxFile) -> None:
        """Forgets the digest of a file: the ledger knows it now."""
        self._digests.pop(file.whole, None)

    def taken_over(self, slide: SlideWork) -> Mapping[str, Version]:
        """Returns the contents that other slides have counted and lost to this one, and what counted them.

        The slide takes over a scale that was given there.

        Only a file of a size that is counted elsewhere is read for it: the others are read when their turn
        comes.
        """
        reader, files = self._ledger.reader, slide.to_do()
        sizes = reader.sizes_elsewhere(slide.slide_id, {f.size_bytes for f in files})
        digests = {d for f in files if f.size_bytes in sizes and (d := self.digest(f))}
        moved = reader.moved(slide.slide_id, digests)
        for other in sorted({other for other, _ in moved.values()}):
            slide_scale.inherit(self._ledger, slide.slide_id, other)
        return {digest: version for digest, (_, version) in moved.items()}

    def without_strangers(self, plan: Plan) -> Plan:
        """Returns the plan without images of another slide that has the name of one that is known.

        Raises `UsageError` for them where nobody can wait: a run.
        """
        strangers: set[InboxFile] = set()
        for slide_id, group in groupby(plan.to_do, key=lambda f: f.slide_id):
            files = list(group)
            counted = self._ledger.reader.places(slide_id)
            if not counted:
                continue
            if other := self._other_source(files, counted):
                what = f"{path_text(files[0].path.parent)} holds other images than {path_text(other.parent)}"
                what += f", and both would be slide {slide_id}"
                advice = f"rename the folder, give another --out, or first `rbc-edge forget {slide_id}`"
                if self._may_wait is None:
                    raise UsageError(one_line(what), one_line(advice))
                if self._notes.is_new(what):
                    log.error("%s: they are not counted: %s", what, advice)
                strangers |= {file for file in files if self._may_wait(file, "changed")}
            else:
                self._note_replaced(slide_id, files, counted)
        return Plan(
            plan.done, tuple(f for f in plan.to_do if f not in strangers), plan.interrupted, strangers
        )

    def _other_source(self, files: Sequence[InboxFile], counted: Sequence[_Place]) -> Path | None:
        """Returns a file of another folder that has the slide's name, or the field's. None: it is one slide.

        A folder that moved still holds an image that is known. A slide pattern may gather a slide from
        several folders.
        """
        folders = {name_text(str(file.path.parent)) for file in files}
        elsewhere = [place for place in counted if name_text(str(place[1].parent)) not in folders]
        if not elsewhere:
            return None
        contents = {sha256 for _, _, sha256 in counted}
        if len(elsewhere) == len(counted) and not self._has_pattern:
            is_known = any(self.digest(file) in contents for file in files)
            is_link = any(_is_same_folder(elsewhere[0][1].parent, Path(folder)) for folder in folders)
            return None if is_known or is_link else elsewhere[0][1]
        at = {fov: path for fov, path, _ in elsewhere}
        for file in files:
            path = at.get(file.fov)
            if path and not is_gone(path) and self.digest(file) not in contents:
                return path
        return None

    def _note_replaced(self, slide_id: str, files: Sequence[InboxFile], counted: Sequence[_Place]) -> None:
        """Says where images of a slide have taken the place of others."""
        contents = {sha256 for _, _, sha256 in counted}
        names = {fov for fov, _, _ in counted}

        def is_new(file: InboxFile) -> bool:
            return bool(digest := self.digest(file)) and digest not in contents

        n = sum(is_new(file) for file in files if file.fov in names)
        question = "another slide of the same name? The old counts are kept in the ledger"
        slide = f"slide {slide_id}"
        are_gone = n <= len(counted) / 2 and all(is_gone(path) for _, path, _ in counted)
        if are_gone and any(map(is_new, files)):
            there = f"{slide}: its {count_text(len(counted), 'image')} are gone, and others came"
            self._notes.say(f"{there}: another slide of the same name? Then `rbc-edge forget`")
        elif n > len(counted) / 2:
            self._notes.say(f"{slide}: {n} of {count_text(len(counted), 'image')} replaced: {question}")
        elif n:
            self._notes.say(f"{slide}: {count_text(n, 'image')} replaced by others of the same name")


def _is_same_folder(one: Path, other: Path) -> bool:
    """Tells whether two paths lead to one folder, by a link or another mount."""
    try:
        return one.samefile(other)
    except OSError:
        return False

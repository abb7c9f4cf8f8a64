"""What a person should know about a session's results, a line each. Each is said once."""

import json
from collections.abc import Collection, Mapping
from typing import Final

from rbc_edge.store.ledger import Ledger
from rbc_edge.text import count_text, in_order

SETTINGS_NOTE: Final = "settings"  # name of the note in the ledger that keeps the settings of the last run


class Notes:
    """The notes of a session. A service says a thing once, however often it comes."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._said: set[str] = set()
        self.new: list[str] = []  # since `taken`

    def say(self, note: str) -> None:
        """Adds a note, unless it was said."""
        if self.is_new(note):
            self.new.append(note)

    def is_new(self, note: str) -> bool:
        """Tells whether something is said for the first time, and remembers it."""
        is_new = note not in self._said
        self._said.add(note)
        return is_new

    def taken(self) -> list[str]:
        """Returns what is new, once."""
        new, self.new = self.new, []
        return new

    def shared(self, slide_ids: Collection[str]) -> None:
        """Says which images of slides are counted in other slides, too."""
        for slide_id in in_order(slide_ids):
            for other, n in self._ledger.reader.shared(slide_id).items():
                slides = " and ".join(in_order((slide_id, other)))
                self.say(f"slides {slides}: {count_text(n, 'image')} counted in both")

    def lost(self) -> int:
        """Says which counts are lost (`Reader.lost`), and returns how many."""
        found = self._ledger.reader.lost()
        for slide_id, n in found.items():
            lost = f"slide {slide_id}: the counts of {count_text(n, 'image')} are lost (damaged-row)"
            self.say(f"{lost}: put them back, or `rbc-edge forget` them")
        return sum(found.values())

    def settings(self, now: Mapping[str, str]) -> None:
        """Says which settings, by name, are not those of the last run on these results, and keeps them."""
        text = json.dumps(now)
        if (kept := self._ledger.reader.note(SETTINGS_NOTE)) == text:
            return
        try:
            before = dict(json.loads(kept or text))
        except (ValueError, TypeError):  # damaged
            before = dict(now)
        differ = [
            f"{name} is {value}, was {before[name]}"
            for name, value in now.items()
            if before.get(name, value) != value
        ]
        if differ:
            self.say(f"settings differ from the last run: {'; '.join(differ)}")
        self._ledger.keep_note(SETTINGS_NOTE, text)

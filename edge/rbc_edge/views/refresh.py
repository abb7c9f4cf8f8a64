"""When the views that people look at, overlays and reports, are brought up to date beside the tables.

They are dear: a picture costs as much as counting it. So they follow the counts, never the other way
round, and what of them cannot be made is a warning.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rbc_edge.errors import RbcEdgeError, UnavailableError
from rbc_edge.store.ledger import Ledger
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule

if TYPE_CHECKING:
    from rbc_edge.views.overlay import Overlays
    from rbc_edge.views.report import Reports

log = logging.getLogger(__name__)

_QUIET_S: Final = 20.0  # a slide without news for so long is done, as far as anybody can tell
_PATIENCE_S: Final = 300.0  # one that never rests gets its page now and then


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """Which views are wanted.

    Attributes:
        overlays: Draw ``overlays/<slide>/<fov>_overlay.jpg``.
        longest_px: Longest side of an overlay, pixels; 0: as large as the image.
        reports: Write ``reports/<slide>.html``.
        manifest: The bundle at work, for its thresholds; None: they are not shown.
    """

    overlays: bool = False
    longest_px: int = 2048
    reports: bool = False
    manifest: Manifest | None = None


class Pictures:
    """Brings overlays and reports up to date, slide by slide, when there is time for it.

    Args:
        ledger: The ledger to show.
        options: Which views are wanted; without any, nothing is done.
        edges: Edge rule of the counts.
        monotonic_s: Seconds that never go back.
    """

    def __init__(
        self, ledger: Ledger, options: PictureOptions, *, edges: EdgeRule, monotonic_s: Callable[[], float]
    ) -> None:
        out = ledger.path.parent
        self._ledger = ledger
        self._monotonic_s = monotonic_s
        self._overlays: Overlays | None = None
        self._reports: Reports | None = None
        # Imported when wanted: who wants none does not wait for them at the start.
        if options.overlays:
            from rbc_edge.views import overlay  # noqa: PLC0415

            self._overlays = overlay.Overlays(
                out, ledger, edges=edges, longest_px=options.longest_px, manifest=options.manifest
            )
        if options.reports:
            from rbc_edge.views import report  # noqa: PLC0415

            self._reports = report.Reports(out, ledger, edges=edges, manifest=options.manifest)
        self._to_draw: dict[str, None] = {}
        self._to_report: dict[str, tuple[float, float]] = {}  # when it changed first and last
        self._warned = ""

    def changed(self, slide_ids: Collection[str] | None = None) -> None:
        """Notes that slides may have changed; None: any may have."""
        now_s = self._monotonic_s()
        for slide_id in self._ledger.slide_ids() if slide_ids is None else slide_ids:
            if self._overlays is not None:
                self._to_draw[slide_id] = None
            if self._reports is not None:
                first_s, _ = self._to_report.get(slide_id, (now_s, now_s))
                self._to_report[slide_id] = (first_s, now_s)

    def draw(self, *, keep_going: Callable[[], bool], time_s: float = inf) -> bool:
        """Draws the overlays of changed slides.

        Args:
            keep_going: Asked between two pictures; may end the work early.
            time_s: Ends it early, between two pictures, after this time.

        Returns:
            Whether all are drawn; else the next call goes on.
        """
        end_s = self._monotonic_s() + time_s
        for slide_id in list(self._to_draw):
            assert self._overlays is not None
            if not self._overlays.write_slide(
                slide_id, keep_going=lambda: keep_going() and self._monotonic_s() < end_s
            ):
                return False
            del self._to_draw[slide_id]
        return True

    def report(self, *, keep_going: Callable[[], bool], wait: bool = False) -> None:
        """Writes the pages of changed slides, and the index.

        Args:
            keep_going: Asked between two pictures; may end the work early.
            wait: Only of those whose turn has come: nothing was new for 20 s, or something for 5 minutes.
        """
        now_s = self._monotonic_s()
        due = [
            slide_id
            for slide_id, (first_s, last_s) in self._to_report.items()
            if not wait or now_s - last_s >= _QUIET_S or now_s - first_s >= _PATIENCE_S
        ]
        if not due or self._reports is None:
            return
        known = set(self._ledger.slide_ids())
        try:
            self._reports.write([slide_id for slide_id in due if slide_id in known], keep_going=keep_going)
        except UnavailableError as error:
            self._warn(str(error))
        except RbcEdgeError:
            raise
        except Exception as error:  # whatever it is, the counts go on
            log.debug("reports", exc_info=True)
            self._warn(f"the reports cannot be made: {type(error).__name__}: {error}")
        if keep_going():
            for slide_id in due:
                del self._to_report[slide_id]

    def _warn(self, message: str) -> None:
        if message != self._warned:
            log.warning("%s", message)
        self._warned = message


def make_all(out: Path, options: PictureOptions, *, edges: EdgeRule, keep_going: Callable[[], bool]) -> None:
    """Brings every view that is wanted up to date, reading the ledger beside whoever writes it.

    Args:
        out: The output folder, with its ledger.
        options: Which views are wanted.
        edges: Edge rule of the counts.
        keep_going: Asked between two pictures; may end the work early.

    Raises:
        UnavailableError: The ledger cannot be read.
    """
    if not (options.overlays or options.reports) or not keep_going():
        return
    with Ledger.reading(out) as ledger:
        pictures = Pictures(ledger, options, edges=edges, monotonic_s=time.monotonic)
        pictures.changed()
        if pictures.draw(keep_going=keep_going):
            pictures.report(keep_going=keep_going)

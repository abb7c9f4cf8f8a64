"""All views of a ledger as one thing: tables, overlays and reports, and when each is brought up to date.

Tables follow every change at once. Overlays and reports are expensive: drawing a field takes as long as
counting it. So they follow when there is time, and one that cannot be made is a warning, not a failed count.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Final

from rbc_edge.errors import RbcEdgeError, UnavailableError
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.views.csv_form import CsvForm
from rbc_edge.views.names import OVERLAYS, REPORTS
from rbc_edge.views.overlay import Overlays
from rbc_edge.views.report import Reports
from rbc_edge.views.tables import SlideSummary, Tables
from rbc_edge.vision.bundle import Manifest
from rbc_edge.vision.counting import EdgeRule

log = logging.getLogger(__name__)

_QUIET_S: Final = 20.0  # a slide without news for so long is probably complete
_PATIENCE_S: Final = 300.0  # a slide with news all the time gets its page now and then


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """Which views are wanted, and how they look."""

    edges: EdgeRule = EdgeRule.ALL  # of the counts. Another rule needs no new count.
    cells: bool = False  # write ``cells/<slide>.csv``
    form: CsvForm = CsvForm.PLAIN  # of the tables
    overlays: bool = False  # draw ``overlays/<slide>/<fov>_overlay.jpg``
    longest_px: int = 2048  # longest side of an overlay. 0: as large as the image.
    overlay_shapes: bool = False  # write the shapes of cells into the overlays
    reports: bool = False  # write ``reports/<slide>.html``
    manifest: Manifest | None = None  # of the bundle at work, for its thresholds. None: they are not shown.


class Pictures:
    """Brings overlays and reports up to date, slide by slide, when there is time for it.

    Its methods ask `keep_going` before each picture: False ends the work early, and the next call goes on.
    Those that exist are kept up to date also where no new ones are wanted: no old page is beside new tables.
    """

    def __init__(self, reader: Reader, options: ViewOptions, *, monotonic_s: Callable[[], float]) -> None:
        out, edges, manifest = reader.path.parent, options.edges, options.manifest
        self._reader, self._options, self._monotonic_s = reader, options, monotonic_s
        self._overlays = Overlays(
            out,
            reader,
            edges=edges,
            longest_px=options.longest_px,
            manifest=manifest,
            new=options.overlays,
            shapes=options.overlay_shapes,
        )
        self._reports = Reports(out, reader, edges=edges, manifest=manifest, new=options.reports)
        self._to_draw: dict[str, None] = {}
        self._to_report: dict[str, tuple[float, float]] = {}  # when it changed first and last
        self._warned = ""

    def changed(self, slide_ids: Collection[str] | None = None) -> None:
        """Notes that slides may have changed; None: any may have."""
        now_s, out = self._monotonic_s(), self._reader.path.parent
        has_overlays = self._options.overlays or (out / OVERLAYS).is_dir()
        has_reports = self._options.reports or self._reports.index.exists()
        for slide_id in self._reader.slide_ids() if slide_ids is None else slide_ids:
            if has_overlays:
                self._to_draw[slide_id] = None
            if has_reports:
                first_s, _ = self._to_report.get(slide_id, (now_s, now_s))
                self._to_report[slide_id] = (first_s, now_s)

    @property
    def are_due(self) -> bool:
        """Whether there is something to draw or to write."""
        return bool(self._to_draw or self._to_report)

    def catch_up(
        self, *, keep_going: Callable[[], bool], time_s: float = inf, wait: bool = False, reports: bool = True
    ) -> bool:
        """Draws the overlays of changed slides, for about so long, then writes `reports` if they are wanted.

        With `wait`, only of slides that had no news for 20 s, or news for 5 minutes. Returns whether all
        overlays are drawn.
        """
        end_s = self._monotonic_s() + time_s
        for slide_id in list(self._to_draw):
            if not self._overlays.write_slide(
                slide_id, keep_going=lambda: keep_going() and self._monotonic_s() < end_s
            ):
                return False
            del self._to_draw[slide_id]
        if reports:
            self._report(keep_going, wait=wait)
        return True

    def _report(self, keep_going: Callable[[], bool], *, wait: bool) -> None:
        """Writes the pages of changed slides, and the index."""
        now_s = self._monotonic_s()
        due = [
            slide_id
            for slide_id, (first_s, last_s) in self._to_report.items()
            if not wait or now_s - last_s >= _QUIET_S or now_s - first_s >= _PATIENCE_S
        ]
        if not due:
            return
        try:
            self._reports.write(set(due).intersection(self._reader.slide_ids()), keep_going=keep_going)
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


class Views(Pictures):
    """The views of a ledger that is being written. `monotonic_s` gives seconds that never go back."""

    def __init__(self, ledger: Ledger, options: ViewOptions, *, monotonic_s: Callable[[], float]) -> None:
        super().__init__(ledger.reader, options, monotonic_s=monotonic_s)
        out, manifest, edges = ledger.database.path.parent, options.manifest, options.edges
        self.tables = Tables(
            out, ledger, edges=edges, cells=options.cells, manifest=manifest, form=options.form
        )

    def refresh(self, slide_ids: Collection[str] | None = None) -> list[SlideSummary]:
        """Does what `Tables.write` does. The pictures of the changed slides are then due."""
        summaries = self.tables.write(slide_ids)
        self.changed(None if self.tables.is_renamed else slide_ids)
        return summaries


def make_pictures(
    out: Path,
    options: ViewOptions,
    *,
    keep_going: Callable[[], bool],
    slide_ids: Collection[str] | None = None,
) -> None:
    """Brings overlays and reports up to date, reading the ledger while another process may write it.

    Of these slides. None: of all.

    `keep_going` is asked before each picture. False ends the work early. Raises `UnavailableError` where the
    ledger cannot be read.
    """
    exist = any((out / name).is_dir() for name in (OVERLAYS, REPORTS))
    if not (options.overlays or options.reports or exist) or not keep_going():
        return
    with Reader.open(out) as reader:
        pictures = Pictures(reader, options, monotonic_s=time.monotonic)
        pictures.changed(slide_ids)
        pictures.catch_up(keep_going=keep_going)

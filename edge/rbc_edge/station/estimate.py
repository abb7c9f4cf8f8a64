"""The scale of a slide: chosen from what its contents say, measured where that is not known yet."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from heapq import merge
from itertools import islice
from math import isnan

from rbc_edge.station import job
from rbc_edge.station.identity import Identity
from rbc_edge.station.sandbox import Interrupted
from rbc_edge.station.slide_work import SlideWork
from rbc_edge.store import slide_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.rows import SlideScale
from rbc_edge.values import InboxFile, Measure, Scale
from rbc_edge.vision import scale as scales


class Estimate:
    """Chooses the scales of slides.

    Args:
        ledger: Keeps measures and scales.
        identity: Knows the contents of files.
        recipe: What measures.
        given: The user's scale for all slides. None: it is estimated.
        force: Measure again what was measured.
        wait: Waits for the result of a worker.
        leave_for_later: Told of a file that cannot be measured now, and why.
        keep_going: Asked before a file is read. False calls the work off: `Interrupted` is raised.
    """

    def __init__(
        self,
        ledger: Ledger,
        identity: Identity,
        *,
        recipe: job.AnalyzerRecipe,
        given: Scale | None,
        force: bool,
        wait: Callable[[Future[list[job.MeasureLook]]], list[job.MeasureLook]],
        leave_for_later: Callable[[InboxFile, str, SlideWork], None],
        keep_going: Callable[[], bool],
    ) -> None:
        self._ledger, self._identity, self._recipe = ledger, identity, recipe
        self._given, self._force, self._keep_going = given, force, keep_going
        self._wait, self._leave_for_later = wait, leave_for_later

    def choose(self, slide: SlideWork, workers: Executor) -> bool:
        """Takes the scale that holds for a slide; tells whether the counts of before have another one.

        It is the one given for this slide, the user's for all, or what the slide's contents say. It is a
        function of these, whenever and in whatever order they came.
        """
        given = self._ledger.reader.given_scale(slide.slide_id) or self._given
        if given is not None:
            slide.scale = given
            return False
        bundle_id, kept = slide.version.bundle_id, self._ledger.reader.slide_scale(slide.slide_id)
        measures = self._measures(slide, workers)
        scale = slide.scale = scales.of_slide(measures)
        is_same = kept is not None and kept.bundle_id == bundle_id and _are_same(kept.scale, scale)
        n_recounted = 0
        if not is_same or kept is None or kept.n_fields != len(measures):
            new = SlideScale(scale, bundle_id, len(measures))
            n_recounted = slide_scale.keep(self._ledger, slide.slide_id, new, is_new=not is_same)
            self._ledger.commit()  # before any field is counted at it
        if is_same or (kept is None and not n_recounted):  # counts without a scale: its row was damaged
            return False
        slide.was_unsettled = True
        return True

    def _measures(self, slide: SlideWork, workers: Executor) -> list[Measure]:
        """Returns what a slide's first contents say about its scale, by digest: measured, or measured before.

        The first three are searched in full, and the others mostly from where these agree.
        """
        found: list[Measure] = []
        candidates = self._candidates(slide)
        left_px, start = scales.MAX_PIXELS, 0
        while left_px >= 0 and (n := scales.MAX_FIELDS - len(found)):
            if len(found) < scales.FIRST_FIELDS:
                n = scales.FIRST_FIELDS - len(found)
            else:
                start = scales.start(found[: scales.FIRST_FIELDS])
            some = dict(islice(candidates, n))
            if not some:
                break
            of_content = self._measured(slide, some, start, left_px, workers)
            for sha256 in some:
                if sha256 in of_content and left_px >= 0:
                    found.append(of_content[sha256])
                    left_px -= of_content[sha256].n_pixels
        return found

    def _measured(
        self, slide: SlideWork, files: Mapping[str, InboxFile], start: int, left_px: float, workers: Executor
    ) -> dict[str, Measure]:
        """Returns the measures of contents, by digest. What cannot be read is left out."""
        bundle_id = slide.version.bundle_id
        known = {sha256: m for sha256 in files if (m := slide.measures.get((sha256, start)))}
        if not self._force:
            known |= self._ledger.reader.measures(files, bundle_id, start)
        asked = []
        for sha256, file in files.items():
            if sha256 in known:
                left_px -= known[sha256].n_pixels
            elif left_px >= 0:
                asked.append((file, sha256))
        if not asked:
            return known
        try:
            self._ledger.begin([file for file, _ in asked])
            looks = self._wait(workers.submit(job.measure, asked, start, left_px, self._recipe))
        finally:
            self._ledger.end([file for file, _ in asked])
        new = {}
        for (file, sha256), look in zip(asked, looks, strict=False):
            if look.measure is not None:
                new[sha256] = slide.measures[sha256, start] = look.measure
            elif look.message:
                self._leave_for_later(file, look.message, slide)
        slide_scale.keep_measures(self._ledger, bundle_id, start, new)
        return known | new

    def _candidates(self, slide: SlideWork) -> Iterator[tuple[str, InboxFile]]:
        """Yields contents that are, or will be, counted in a slide, by digest. Some may not be readable."""
        coming: dict[str, InboxFile] = {}
        digest_of: dict[str, str] = {}
        for file in slide.to_do():
            if not self._keep_going():
                raise Interrupted
            if (digest := self._identity.digest(file)) and digest not in slide.contents.failed:
                coming.setdefault(digest, file)
                digest_of[file.fov] = digest
        counted = self._ledger.reader.counted(slide.slide_id, slide.version.bundle_id)
        # A count of which the file is another one now does not stand for long.
        standing = ((sha256, file) for sha256, file in counted if digest_of.get(file.fov, sha256) == sha256)
        before = ""
        for sha256, file in merge(sorted(coming.items()), standing, key=lambda item: item[0]):
            if sha256 != before:
                yield sha256, file
            before = sha256


def _are_same(old: Scale, new: Scale) -> bool:
    both_unknown = isnan(old.cell_diameter_px) and isnan(new.cell_diameter_px)
    return both_unknown or old == new

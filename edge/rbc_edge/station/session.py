"""An output folder, open for counting: ledger, tables and views as one thing; and a single run over folders.

The loop of the way of the data stands in `Session.count`: plan, looks, record, refresh.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from heapq import merge
from itertools import groupby, islice
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, Final, TypeVar

from rbc_edge.errors import BundleError, ExitCode, UnavailableError, UsageError
from rbc_edge.station import job, other_files
from rbc_edge.station.inbox import mtime_ns, scan
from rbc_edge.station.sandbox import Interrupted, Sandbox, to_quarantine
from rbc_edge.station.stop import Abandoned, Stop
from rbc_edge.store import outdir, slide_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import SlideContents
from rbc_edge.store.recovery import mend
from rbc_edge.store.rows import Attempt, FieldRow, Look, Plan, Recorded, SlideScale, Status, Version
from rbc_edge.store.schema import is_gone
from rbc_edge.text import (
    PAGED_SUFFIXES,
    count_text,
    in_order,
    name_text,
    natural_key,
    one_line,
    path_text,
    utc_text,
)
from rbc_edge.values import InboxFile, Measure, Scale, ScaleSource
from rbc_edge.views.refresh import ViewOptions, Views, make_pictures
from rbc_edge.views.tables import SlideSummary
from rbc_edge.vision import scale as scales
from rbc_edge.vision.image_file import content_id, n_fields

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_COMMIT_EVERY_S: Final = 0.5  # what a power cut can cost in work; a commit an image wears a memory card
_WAIT_FOR_WRITER_S: Final = 60.0  # a running service releases the folder every few seconds
_POLL_S: Final = 0.2
_TOGETHER: Final = 8  # images whose attempts are noted at once
_TOGETHER_ASKED: Final = 500  # files whose pages one query asks for
SETTINGS_NOTE: Final = "settings"  # name of the note in the ledger that keeps the settings of the last run
_Place = tuple[str, Path, str]  # fov, path and digest of a counted field
_MAX_SAID: Final = 20  # damaged rows that are named
_MAX_PASSES: Final = 4  # over the files of a slide that unsettled each other
_SUMMED_AS: Final = {  # numbers of `Summary`
    Status.OK: "n_unchanged",
    Status.FAILED: "n_failed",
    Status.DUPLICATE: "n_duplicates",
    Status.EXCLUDED: "n_excluded",
    Status.FORGOTTEN: "n_excluded",
}


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from. Tests give their own."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)  # the time of day, with its zone
    monotonic_s: Callable[[], float] = time.perf_counter  # never goes back


@dataclass(frozen=True, slots=True)
class CountOptions:
    """How to count, and into which folder."""

    out: Path  # made when it is missing
    recipe: job.AnalyzerRecipe  # what to count with
    scale: Scale | None = None  # the user's; None: estimated for each slide
    slide_pattern: str | None = None  # see `inbox.scan`
    ignore: Sequence[str] = ()  # see `inbox.scan`
    force: bool = False  # count again what was counted
    adopt: bool = False  # take a folder that holds tables of others, which are moved aside (`outdir.claim`)
    max_failures: int | None = None  # stop after this many failed images; None: never
    workers: int = 1  # images looked at together
    views: ViewOptions = field(default_factory=ViewOptions)
    # None: an image that was being counted when two processes died is failed without that.
    sandbox: Sandbox | None = None

    @property
    def version(self) -> Version:
        """What a count depends on besides the image."""
        return Version.of(self.recipe.bundle_id, self.scale)


@dataclass(frozen=True, slots=True)
class Step:
    """One image is recorded; for progress bars and logs."""

    file: InboxFile
    row: FieldRow | None  # what the ledger now says; None: nothing had to be done, or it was left for later
    is_new: bool  # counted, or failed, now; an image that was only renamed or touched is not new
    n_done: int  # images done so far, this one included
    n_total: int


@dataclass(slots=True)
class Summary:
    """What was done. An image is counted under one of `n_counted` to `n_excluded`, or it waits."""

    n_images: int  # found
    n_counted: int = 0  # analyzed now
    n_unchanged: int = 0  # counted before, or only renamed
    n_duplicates: int = 0  # the content is counted under another name of the slide
    n_failed: int = 0  # now or before
    n_excluded: int = 0  # or forgotten, by a person
    n_unreadable_folders: int = 0
    stopped_by: int | None = None  # the signal that ended it early
    gave_up: bool = False  # it ended early because of `CountOptions.max_failures`
    slides: list[SlideSummary] = field(default_factory=list)  # the rows of ``slides.csv``
    troubled: dict[InboxFile, str] = field(default_factory=dict)  # left for later, because memory was short
    held: list[str] = field(default_factory=list)  # tables that could not be replaced, and why
    unsettled: set[str] = field(default_factory=set)  # slides of which a file that was done may need a look
    notes: list[str] = field(default_factory=list)  # what a person should know, a line each
    not_read: dict[str, int] = field(
        default_factory=dict
    )  # files of kinds that are not read, by their ending
    failed: list[FieldRow] = field(default_factory=list)  # of a run: those of `n_failed`, in order of names
    n_copies: int = 0  # pictures passed over that a program made of an image beside them

    @property
    def n_left(self) -> int:
        """Images that nothing was done about: it ended early, or they wait."""
        done = self.n_counted + self.n_unchanged + self.n_duplicates + self.n_failed + self.n_excluded
        return self.n_images - done

    @property
    def exit_code(self) -> int:
        """What the process tells the shell."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        if self.troubled or self.held:
            return ExitCode.UNAVAILABLE
        return ExitCode.SOME_FAILED if self.n_failed or self.n_unreadable_folders else ExitCode.OK


def count_once(
    paths: Sequence[Path],
    options: CountOptions,
    *,
    on_step: Callable[[Step], None] = lambda _: None,
    stop: Stop | None = None,
    clock: Clock | None = None,
    executor: Executor | None = None,
) -> Summary:
    """Counts every image of the paths that is not counted yet, and brings the tables up to date.

    It may be killed at any moment: the next run goes on. One image that cannot be counted is a failed row,
    and the others are counted. The other arguments are those of `Session`.

    Raises:
        UsageError: The output folder lies inside the source, or holds tables of others, or names clash
            (`inbox.scan`).
        UnavailableError: Source or output cannot be used.
        BundleError: The bundle is not what the recipe says.
    """
    stop, out, clock = stop or Stop(), options.out, clock or Clock()
    outdir.check_apart(paths, out)
    inbox = scan(paths, slide_pattern=options.slide_pattern, ignore=options.ignore)
    not_counted = list(map(str, inbox.other.remarks()))
    outdir.make(out)
    try:
        with outdir.writing(out, wait_s=_WAIT_FOR_WRITER_S):
            outdir.claim(out, utc_text(clock.now()), adopt=options.adopt)
            with Session(
                options, Ledger(out), on_step=on_step, stop=stop, clock=clock, executor=executor
            ) as session:
                mend_rows(session.ledger, deep=False)
                if (
                    session.ledger.reader.tables_are_stale()
                ):  # a run was killed: its counts show before the work
                    session.refresh()
                session.ledger.keep_note(other_files.NOT_COUNTED_NOTE, "\n".join(not_counted))
                summary = session.count(session.unfold(inbox.files), copies=inbox.other.copies)
    finally:
        job.drop_analyzer(options.recipe)
    summary.n_unreadable_folders = len(inbox.unreadable)
    summary.not_read, summary.n_copies = dict(inbox.other.kinds), len(inbox.other.copies)
    summary.notes[:0] = not_counted
    # Without the lock: what only reads, and takes its time, keeps no service waiting.
    make_pictures(out, options.views, keep_going=lambda: stop.signal is None)
    summary.stopped_by = stop.signal
    return summary


def mend_rows(ledger: Ledger, *, deep: bool) -> None:
    """Repairs damaged rows (`recovery.mend`), and says so."""
    said = mend(ledger.database, deep=deep)
    ledger.commit()
    for line in said[:_MAX_SAID]:
        log.warning("%s", line)
    if len(said) > _MAX_SAID:
        log.warning("%d more damaged rows", len(said) - _MAX_SAID)


class Session:
    """Counts lists of files into an output folder. A run and the service share it.

    Args:
        options: How to count.
        ledger: The folder's ledger. No other process records images meanwhile (`outdir.writing`). It is
            closed with the session.
        on_step: Told of every image.
        stop: Ends the work after the image in hand, with tables that show what was done.
        clock: Where time comes from.
        executor: Where images are looked at. None: threads of this process.
        may_wait: Tells for a file and a failure whether to leave it for later instead of recording it. The
            failure is ``changed`` where the file was written to while it was read.
        keep_going: Asked while a sandbox is at work. False calls it off.
    """

    def __init__(
        self,
        options: CountOptions,
        ledger: Ledger,
        *,
        on_step: Callable[[Step], None] = lambda _: None,
        stop: Stop | None = None,
        clock: Clock | None = None,
        executor: Executor | None = None,
        may_wait: Callable[[InboxFile, str], bool] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> None:
        self.ledger = ledger
        self._options = options
        self._version = options.version
        self._on_step = on_step
        self._stop = stop or Stop()
        self._clock = clock or Clock()
        self._executor = executor
        self._may_wait = may_wait
        self._keep_going = keep_going or (lambda: self._stop.signal is None)
        self._last_commit_s = self._clock.monotonic_s()
        self._n_new_failures = 0
        self._digests: dict[InboxFile, str] = {}  # of files that were not recorded yet
        self._n_pages: dict[int, int] = {}  # fields of files that hold several, by the hash of the file
        self._noted: set[str] = set()  # what was said: a service says it once
        self.views = Views(ledger, options.views, monotonic_s=self._clock.monotonic_s)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the ledger."""
        self.ledger.close()

    def plan(self, files: Sequence[InboxFile]) -> Plan:
        """Says which files need a look (`Ledger.plan`)."""
        return self.ledger.plan(files, self._version, force=self._options.force)

    def unfold(self, files: Sequence[InboxFile], done: Container[int] = ()) -> list[InboxFile]:
        """Returns the fields of view that files hold: of a TIFF with several full pages, each page.

        What is in a file is known from the ledger, or read from its list of pages. `done` are hashes of files
        that are one field each.
        """
        asked = [f for f in files if f.path.suffix.lower() in PAGED_SUFFIXES and hash(f) not in done]
        asked = [f for f in asked if hash(f) not in self._n_pages]
        for start in range(0, len(asked), _TOGETHER_ASKED):
            portion = asked[start : start + _TOGETHER_ASKED]
            known = self.ledger.reader.n_pages(portion, self._version.bundle_id)
            for file in portion:
                if self._keep_going() and (n := known.get(file) or n_fields(file.path)) > 1:
                    self._n_pages[hash(file)] = n
        return [page for f in files for page in f.pages(self._n_pages.get(hash(f), 1))]

    def refresh(self, slide_ids: Collection[str] | None = None) -> list[SlideSummary]:
        """Writes tables (`Views.refresh`). They never show what a power cut could take back."""
        self.ledger.commit()
        return self.views.refresh(slide_ids)

    def count(
        self,
        files: Sequence[InboxFile],
        *,
        of_slide: Mapping[str, Sequence[InboxFile]] | None = None,
        copies: Sequence[Path] = (),
        time_s: float = inf,
    ) -> Summary:
        """Counts files in order, slide by slide, and refreshes the tables, also when it ends early.

        Args:
            files: What to count. Files of one slide stand together.
            of_slide: All images there are, by slide, where `files` is only a part of them.
            copies: Pictures that are copies of an image beside them. Those that came before it are counted,
                and are taken out of the counts.
            time_s: Ends early, between two images, after this time, seconds.
        """
        portion = _Portion(Summary(n_images=len(files)), self._clock.monotonic_s() + time_s)
        groups: dict[str, list[InboxFile]] = {}
        for file in files:
            groups.setdefault(file.slide_id, []).append(file)
        there = groups if of_slide is None else of_slide
        with self._workers() as workers:
            try:
                self._note_settings(portion)
                if self._may_wait is None:
                    self._keep_given(groups, portion)
                portion.changed |= self.ledger.drop_gone(there)
                plan = self._without_copies(self.plan(files), copies, portion)
                plan = self._without_killers(self._without_strangers(plan, portion), portion)
                unsettled = self.ledger.reader.unsettled()
                for slide_id, group in groups.items():
                    if self._is_over(portion):
                        break
                    slide = _Slide(slide_id, group, plan, there.get(slide_id, group))
                    slide.was_settled = slide_id not in unsettled
                    self._count(slide, portion, workers)
                # Slides that lost an image to another one: their scale may be another now.
                for slide_id in filter(there.__contains__, self.ledger.reader.unsettled()):
                    if self._is_over(portion):
                        break
                    files_there, plan = there[slide_id], Plan({}, (), {}, portion.waiting)
                    slide = _Slide(slide_id, groups.get(slide_id, []), plan, files_there)
                    slide.status = dict.fromkeys(portion.failed.intersection(slide.files), Status.FAILED)
                    slide.was_settled, slide.told = False, set(slide.files)
                    self._plan_again(slide)
                    self._count(slide, portion, workers)
            except (Interrupted, Abandoned):
                portion.summary.stopped_by = self._stop.signal
            except (BundleError, UnavailableError):
                self.ledger.commit()  # that no image is suspect
                raise
            finally:
                portion.sum_up()
        self._note_shared(portion)
        portion.summary.slides = self.refresh(None if of_slide is None else portion.changed)
        portion.summary.held = list(self.views.tables.held.values())
        if self._may_wait is None:
            names = sorted((f.slide_id, natural_key(f.fov), f.fov) for f in portion.failed)
            found = (self.ledger.reader.field(slide_id, fov) for slide_id, _, fov in names)
            portion.summary.failed = [row for row in found if row is not None]
        return portion.summary

    @contextmanager
    def _workers(self) -> Iterator[Executor]:
        if self._executor is not None:
            yield self._executor
            return
        workers = _Threads(self._options.workers)
        try:
            yield workers
        finally:
            # A thread that is late with a huge image is not waited for: the process ends under it.
            while workers.at_work and not self._stop.is_late:
                wait(list(workers.at_work), timeout=_POLL_S)
            workers.shutdown(wait=not workers.at_work, cancel_futures=True)

    def _without_copies(self, plan: Plan, copies: Sequence[Path], portion: "_Portion") -> Plan:
        """Takes copies that programs made of an image out of the counts. Returns the plan without them.

        A copy may have come before its image, and is counted. Or its image is counted, and has left since.
        """
        done = dict(plan.done)
        late = [file for file in plan.to_do if self._is_late_copy(file)]
        for file in (*self.ledger.reader.counted_at(copies), *late):
            message = f"{path_text(file.path)}: made by a program of an image that lies beside it"
            look = Look(file, failure="copy", message=message)
            recorded = self.ledger.record(look, self._version_of(file.slide_id), self._now())
            assert recorded is not None  # a failure always gives a row
            done[file] = recorded.row.status
            portion.changed |= {file.slide_id, *recorded.left}
        if late:
            pictures, example = count_text(len(late), "picture"), path_text(late[0].path)
            self._note(f"{pictures} not counted, made by a program of a counted image: {example}", portion)
        return replace(plan, done=done, to_do=tuple(f for f in plan.to_do if f not in done))

    def _is_late_copy(self, file: InboxFile) -> bool:
        names = set(other_files.originals(file.path.stem))
        return bool(names) and any(
            path.parent == file.path.parent and not names.isdisjoint(other_files.keys(path.name))
            for _, path, _ in self.ledger.reader.places(file.slide_id)
        )

    def _without_killers(self, plan: Plan, portion: "_Portion") -> Plan:
        """Records as failed what kills a process; returns the plan without it."""
        if not plan.interrupted:
            return plan
        sandbox = self._options.sandbox
        killers, undecided = to_quarantine(
            self.ledger, plan.interrupted, sandbox, keep_going=self._keep_going
        )
        portion.undecided = frozenset(undecided)
        done = dict(plan.done)
        if sandbox is not None:  # what survived, and need not be opened, is not tried by each run again
            self.ledger.end([f for f in plan.interrupted if f in done and f not in killers])
        for file in killers:
            message = f"{path_text(file.path)}: ends the program when it is opened; it is not opened again"
            look = Look(file, job.digest(file), failure="crash", message=message)
            recorded = self.ledger.record(look, self._version_of(file.slide_id), self._now())
            assert recorded is not None  # a failure always gives a row
            done[file] = recorded.row.status
            portion.changed |= {file.slide_id, *recorded.left}
            self._on_step(Step(file, recorded.row, True, portion.n_done, portion.summary.n_images))
        self.ledger.commit()
        to_do = tuple(f for f in plan.to_do if f not in done)
        return Plan(done, to_do, plan.interrupted, plan.waiting)

    def _put_off(self, undecided: Collection[InboxFile], slide: "_Slide") -> None:
        """Leaves images for later that may kill this process, while no other can try them."""
        for file in slide.files:
            if file in undecided:
                slide.waiting.add(file)
                slide.troubled[file] = f"{path_text(file.path)}: left for later: it may have ended a process"
                if self._may_wait is not None:
                    self._may_wait(file, job.MACHINE)

    def _count(self, slide: "_Slide", portion: "_Portion", workers: Executor) -> None:
        self._put_off(portion.undecided, slide)
        try:
            self._count_slide(slide, portion, workers)
        finally:
            portion.add(slide)
            for note in slide.notes():
                self._note(note, portion)

    def _count_slide(self, slide: "_Slide", portion: "_Portion", workers: Executor) -> None:
        """Counts the files of one slide until its scale is that of what is counted."""
        if slide.was_settled and not slide.to_do():
            return
        slide_scale.settle(self.ledger, slide.slide_id, is_settled=False)
        self._take_over(slide)
        slide.contents = self.ledger.reader.contents(slide.slide_id, slide.version)
        if self._choose_scale(slide, workers) and not self._options.force:
            self._plan_again(slide)
        for _ in range(_MAX_PASSES):
            if self._pass(slide, portion, workers):
                break
            # A file may be another one than before it was opened, or cannot be counted.
            is_new_scale = self._choose_scale(slide, workers)
            if not (slide.is_unsettled or is_new_scale):
                slide_scale.settle(self.ledger, slide.slide_id)
                break
            # A count moved between two names, or what a duplicate refers to is gone: look at those, too.
            self._plan_again(slide)
        if slide.is_changed:
            self.ledger.commit()  # first: a table never shows what a power cut could take back
            self.views.tables.write_slide(slide.slide_id)

    def _plan_again(self, slide: "_Slide") -> None:
        slide.is_unsettled = False
        failed = {f: status for f, status in slide.status.items() if status is Status.FAILED}
        slide.status = {**failed, **self.ledger.plan(slide.files, self._version).done}
        slide.contents = self.ledger.reader.contents(slide.slide_id, slide.version)

    def _version_of(self, slide_id: str) -> Version:
        given = self.ledger.reader.given_scale(slide_id) or self._options.scale
        return Version.of(self._version.bundle_id, given)

    def _pass(self, slide: "_Slide", portion: "_Portion", workers: Executor) -> bool:
        """Goes through a slide's files once; tells whether it ended early."""
        tasks = self._tasks(slide, slide.to_do())
        is_early = False
        with closing(job.looks(tasks, workers, n_ahead=self._options.workers, wait=self._wait)) as coming:
            try:
                for file in slide.files:
                    is_early = self._is_over(portion)
                    if is_early:
                        break
                    if file in slide.waiting:
                        continue
                    if file not in slide.status:
                        recorded = self._record(next(coming), slide, workers)
                        slide.add(file, recorded)
                        if self._clock.monotonic_s() - self._last_commit_s >= _COMMIT_EVERY_S:
                            self.ledger.commit()
                            self._last_commit_s = self._clock.monotonic_s()
                        self._tell(slide, portion, file, recorded)
                    elif file not in slide.told:
                        self._tell(slide, portion, file, None)
            except (Abandoned, BundleError, UnavailableError):  # no fault of the images
                self.ledger.end(list(slide.begun))
                raise
        if slide.begun:
            self.ledger.end(list(slide.begun))
            slide.begun.clear()
        return is_early

    def _tasks(self, slide: "_Slide", files: Sequence[InboxFile]) -> Iterator[job.Task | None]:
        """Yields what to look at, and has the ledger note it before it is opened.

        Some at a time, because a note for each would triple what is written to the disk. An image that was
        being counted when a process died is tried alone: of many it would not be known which one it was.
        """
        for i, file in enumerate(files):
            is_alone = file in slide.interrupted
            if is_alone:
                yield None
            if file not in slide.begun:
                together = [file]
                for other in files[i + 1 : i + _TOGETHER] if not is_alone else ():
                    if other in slide.interrupted:
                        break
                    together.append(other)
                self.ledger.begin(together)
                slide.begun.update(dict.fromkeys(together))
            known = frozenset[str]()
            if not self._options.force:
                known = slide.contents.counted.get(file.size_bytes, known) | slide.moved
            yield job.Task(file, slide.scale, self._options.recipe, known, slide.beside)
            if is_alone:
                yield None

    def _wait(self, work: Future[_T]) -> _T:
        with self._stop.image_in_hand():
            # Not all at once: a signal that another thread receives is handled when this one wakes.
            while not wait((work,), timeout=_POLL_S).done:
                pass
            return work.result()

    def _record(self, look: Look, slide: "_Slide", workers: Executor) -> Recorded | None:
        """Brings one look into the ledger; None: the file was left for later."""
        file, now = look.file, self._now()
        if look.failure == job.MACHINE:
            self._leave_for_later(file, look.message, slide)
            self.ledger.end([file])
            return None
        if self._may_wait is not None:
            failure = look.failure or ("changed" if _has_changed(file) else "")
            if failure and self._may_wait(file, failure):
                self.ledger.end([file])
                return None
        recorded = self.ledger.record(look, slide.version, now, force=self._options.force)
        if recorded is None:  # its content was known, but what knew it is gone
            task = job.Task(file, slide.scale, self._options.recipe, beside=slide.beside)
            look = self._wait(workers.submit(job.look_at, task))
            if look.failure == job.MACHINE:
                return self._record(look, slide, workers)
            recorded = self.ledger.record(look, slide.version, now, force=self._options.force)
        if recorded is not None:
            self._digests.pop(file.whole, None)
            self._n_new_failures += recorded.row.status is Status.FAILED
        return recorded

    def _leave_for_later(self, file: InboxFile, why: str, slide: "_Slide") -> None:
        slide.waiting.add(file)
        slide.troubled[file] = why
        log.warning("%s", why)
        if self._may_wait is not None:
            self._may_wait(file, job.MACHINE)

    def _tell(self, slide: "_Slide", portion: "_Portion", file: InboxFile, recorded: Recorded | None) -> None:
        portion.n_done += file not in slide.told
        slide.told.add(file)
        row, is_new = (recorded.row, recorded.is_new) if recorded else (None, False)
        self._on_step(Step(file, row, is_new, portion.n_done, portion.summary.n_images))

    def _is_over(self, portion: "_Portion") -> bool:
        limit, summary = self._options.max_failures, portion.summary
        summary.stopped_by = self._stop.signal
        summary.gave_up = limit is not None and self._n_new_failures >= limit
        if summary.stopped_by is not None or summary.gave_up:
            return True
        return portion.n_done > 0 and self._clock.monotonic_s() >= portion.end_s

    def _now(self) -> str:
        return utc_text(self._clock.now())

    # -- whose images they are --------------------------------------------------------------------------

    def _digest(self, file: InboxFile) -> str:
        """Returns the digest of a file that is to be looked at, read once. Empty where it cannot be read."""
        whole = file.whole
        if whole not in self._digests and self._keep_going():
            self._digests[whole] = job.digest(whole)
        return content_id(self._digests.get(whole, ""), file.page)

    def _take_over(self, slide: "_Slide") -> None:
        """Finds what other slides have counted and lost to this one, maybe with a scale that was given there.

        Only a file of a size that is counted elsewhere is read for it: the others are read when their turn
        comes.
        """
        reader, files = self.ledger.reader, slide.to_do()
        sizes = reader.sizes_elsewhere(slide.slide_id, {f.size_bytes for f in files})
        digests = {d for f in files if f.size_bytes in sizes and (d := self._digest(f))}
        moved = reader.moved(slide.slide_id, digests)
        for other in sorted({other for other, _ in moved.values()}):
            slide_scale.inherit(self.ledger, slide.slide_id, other)
        slide.version = self._version_of(slide.slide_id)
        if not self._options.force:
            slide.moved = frozenset(d for d, (_, version) in moved.items() if version == slide.version)

    def _without_strangers(self, plan: Plan, portion: "_Portion") -> Plan:
        """Returns the plan without images of another slide that has the name of one that is known.

        Raises `UsageError` for them where nobody can wait: a run.
        """
        strangers: set[InboxFile] = set()
        for slide_id, group in groupby(plan.to_do, key=lambda f: f.slide_id):
            files = list(group)
            counted = self.ledger.reader.places(slide_id)
            if not counted:
                continue
            if other := self._other_source(files, counted):
                what = f"{path_text(files[0].path.parent)} holds other images than {path_text(other.parent)}"
                what += f", and both would be slide {slide_id}"
                advice = f"rename the folder, give another --out, or first `rbc-edge forget {slide_id}`"
                if self._may_wait is None:
                    raise UsageError(one_line(what), one_line(advice))
                if what not in self._noted:
                    log.error("%s: they are not counted: %s", what, advice)
                    self._noted.add(what)
                strangers |= {file for file in files if self._may_wait(file, "changed")}
            else:
                self._note_replaced(slide_id, files, counted, portion)
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
        if len(elsewhere) == len(counted) and self._options.slide_pattern is None:
            is_known = any(self._digest(file) in contents for file in files)
            is_link = any(_is_same_folder(elsewhere[0][1].parent, Path(folder)) for folder in folders)
            return None if is_known or is_link else elsewhere[0][1]
        at = {fov: path for fov, path, _ in elsewhere}
        for file in files:
            path = at.get(file.fov)
            if path and not is_gone(path) and self._digest(file) not in contents:
                return path
        return None

    def _note_replaced(
        self, slide_id: str, files: Sequence[InboxFile], counted: Sequence[_Place], portion: "_Portion"
    ) -> None:
        """Says where images of a slide have taken the place of others."""
        contents = {sha256 for _, _, sha256 in counted}
        names = {fov for fov, _, _ in counted}

        def is_new(file: InboxFile) -> bool:
            return bool(digest := self._digest(file)) and digest not in contents

        n = sum(is_new(file) for file in files if file.fov in names)
        question = "another slide of the same name? The old counts are kept in the ledger"
        slide = f"slide {slide_id}"
        are_gone = n <= len(counted) / 2 and all(is_gone(path) for _, path, _ in counted)
        if are_gone and any(map(is_new, files)):
            there = f"{slide}: its {count_text(len(counted), 'image')} are gone, and others came"
            self._note(f"{there}: another slide of the same name? Then `rbc-edge forget`", portion)
        elif n > len(counted) / 2:
            self._note(f"{slide}: {n} of {count_text(len(counted), 'image')} replaced: {question}", portion)
        elif n:
            self._note(f"{slide}: {count_text(n, 'image')} replaced by others of the same name", portion)

    def _note(self, note: str, portion: "_Portion") -> None:
        if note not in self._noted:
            self._noted.add(note)
            portion.summary.notes.append(note)

    def _note_shared(self, portion: "_Portion") -> None:
        for slide_id in in_order(portion.changed):
            for other, n in self.ledger.reader.shared(slide_id).items():
                slides = " and ".join(in_order((slide_id, other)))
                self._note(f"slides {slides}: {count_text(n, 'image')} counted in both", portion)

    def _note_settings(self, portion: "_Portion") -> None:
        """Says which settings are not those of the last run on these results."""
        options, scale = self._options, self._options.scale
        now = {
            "slide pattern": options.slide_pattern or "none",
            "ignore": ", ".join(options.ignore) or "none",
            "scale": f"{scale.cell_diameter_px:g} px a cell" if scale else "estimated",
            "edges": str(options.views.edges),
            "form of the tables": str(options.views.form),
            "bundle": options.recipe.bundle_id,
        }
        text = json.dumps(now)
        if (kept := self.ledger.reader.note(SETTINGS_NOTE)) == text:
            return
        try:
            before = dict(json.loads(kept or text))
        except ValueError:  # damaged
            before = now
        differ = [
            f"{name} is {value}, was {before[name]}"
            for name, value in now.items()
            if before.get(name, value) != value
        ]
        if differ:
            self._note(f"settings differ from the last run: {'; '.join(differ)}", portion)
        self.ledger.keep_note(SETTINGS_NOTE, text)

    # -- the scale of a slide ---------------------------------------------------------------------------

    def _keep_given(self, slide_ids: Collection[str], portion: "_Portion") -> None:
        """Has the slides keep the scale of this run, and says which of them lose that of an earlier one."""
        lost = slide_scale.give_by_run(self.ledger, slide_ids, self._options.scale)
        if lost and not any(note.startswith("settings differ") for note in portion.summary.notes):
            slides = f"slide {lost[0]}" if len(lost) == 1 else f"{len(lost)} slides"
            self._note(f"{slides}: the scale is estimated again, it was given to an earlier run", portion)

    def _choose_scale(self, slide: "_Slide", workers: Executor) -> bool:
        """Takes the scale that holds for a slide; tells whether the counts of before have another one.

        It is the one given for this slide, the user's for all, or what the slide's contents say. It is a
        function of these, whenever and in whatever order they came.
        """
        given = self.ledger.reader.given_scale(slide.slide_id) or self._options.scale
        if given is not None:
            slide.scale = given
            return False
        bundle_id, kept = slide.version.bundle_id, self.ledger.reader.slide_scale(slide.slide_id)
        measures = self._measures(slide, workers)
        scale = slide.scale = scales.of_slide(measures)
        is_same = kept is not None and kept.bundle_id == bundle_id and _are_same(kept.scale, scale)
        n_recounted = 0
        if not is_same or kept is None or kept.n_fields != len(measures):
            new = SlideScale(scale, bundle_id, len(measures))
            n_recounted = slide_scale.keep(self.ledger, slide.slide_id, new, is_new=not is_same)
            self.ledger.commit()  # before any field is counted at it
        if is_same or (kept is None and not n_recounted):  # counts without a scale: its row was damaged
            return False
        slide.was_unsettled = True
        return True

    def _measures(self, slide: "_Slide", workers: Executor) -> list[Measure]:
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
        self, slide: "_Slide", files: Mapping[str, InboxFile], start: int, left_px: float, workers: Executor
    ) -> dict[str, Measure]:
        """Returns the measures of contents, by digest. What cannot be read is left out."""
        bundle_id = slide.version.bundle_id
        known = {sha256: m for sha256 in files if (m := slide.measures.get((sha256, start)))}
        if not self._options.force:
            known |= self.ledger.reader.measures(files, bundle_id, start)
        asked = []
        for sha256, file in files.items():
            if sha256 in known:
                left_px -= known[sha256].n_pixels
            elif left_px >= 0:
                asked.append((file, sha256))
        if not asked:
            return known
        try:
            self.ledger.begin([file for file, _ in asked])
            looks = self._wait(workers.submit(job.measure, asked, start, left_px, self._options.recipe))
        finally:
            self.ledger.end([file for file, _ in asked])
        new = {}
        for (file, sha256), look in zip(asked, looks, strict=False):
            if look.measure is not None:
                new[sha256] = slide.measures[sha256, start] = look.measure
            elif look.message:
                self._leave_for_later(file, look.message, slide)
        slide_scale.keep_measures(self.ledger, bundle_id, start, new)
        return known | new

    def _candidates(self, slide: "_Slide") -> Iterator[tuple[str, InboxFile]]:
        """Yields contents that are, or will be, counted in a slide, by digest. Some may not be readable."""
        coming: dict[str, InboxFile] = {}
        digest_of: dict[str, str] = {}
        for file in slide.to_do():
            if not self._keep_going():
                raise Interrupted
            if (digest := self._digest(file)) and digest not in slide.contents.failed:
                coming.setdefault(digest, file)
                digest_of[file.fov] = digest
        counted = self.ledger.reader.counted(slide.slide_id, slide.version.bundle_id)
        # A count of which the file is another one now does not stand for long.
        standing = ((sha256, file) for sha256, file in counted if digest_of.get(file.fov, sha256) == sha256)
        before = ""
        for sha256, file in merge(sorted(coming.items()), standing, key=lambda item: item[0]):
            if sha256 != before:
                yield sha256, file
            before = sha256


class _Threads(ThreadPoolExecutor):
    """Threads, and what is at work in them."""

    def __init__(self, n: int) -> None:
        super().__init__(n, thread_name_prefix="rbc-edge-count")
        self.at_work: set[Future[Any]] = set()  # what is not done

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor.submit`. Raises `UnavailableError` where no thread can be started."""
        try:
            future = super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            what = f"images cannot be counted now: {error}"
            raise UnavailableError(what, "end other programs, or raise the limit of processes") from error
        self.at_work.add(future)
        future.add_done_callback(self.at_work.discard)
        return future


class _Slide:
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


@dataclass(slots=True)
class _Portion:
    """One call of `Session.count`."""

    summary: Summary
    end_s: float
    n_done: int = 0
    changed: set[str] = field(default_factory=set)  # slides
    undecided: frozenset[InboxFile] = frozenset()  # not to be opened now
    counted: set[InboxFile] = field(default_factory=set)  # now
    failed: set[InboxFile] = field(default_factory=set)
    waiting: set[InboxFile] = field(default_factory=set)
    of_slide: dict[str, Counter[str]] = field(default_factory=dict)  # what became of its files

    def add(self, slide: _Slide) -> None:
        """Adds up what became of a slide's files."""
        summary = self.summary
        summary.troubled |= slide.troubled
        self.changed |= slide.left
        if slide.is_changed:
            self.changed.add(slide.slide_id)
        if slide.was_unsettled:
            summary.unsettled.add(slide.slide_id)
        self.counted |= slide.counted
        self.waiting |= slide.waiting
        self.failed |= {file for file, status in slide.status.items() if status is Status.FAILED}
        # In the place of what was summed up before its files were counted again.
        self.of_slide[slide.slide_id] = Counter(
            "n_counted" if status is Status.OK and file in self.counted else _SUMMED_AS[status]
            for file, status in slide.status.items()
        )

    def sum_up(self) -> None:
        """Adds up all slides."""
        for name, n in sum(self.of_slide.values(), Counter[str]()).items():
            setattr(self.summary, name, n)


def _is_same_folder(one: Path, other: Path) -> bool:
    """Tells whether two paths lead to one folder, by a link or another mount."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _has_changed(file: InboxFile) -> bool:
    try:
        status = file.path.stat()
    except OSError:
        return False  # gone after it was read; what was read is whole
    return (status.st_size, mtime_ns(status)) != (file.size_bytes, file.mtime_ns)


def _are_same(old: Scale, new: Scale) -> bool:
    both_unknown = isnan(old.cell_diameter_px) and isnan(new.cell_diameter_px)
    return both_unknown or old == new

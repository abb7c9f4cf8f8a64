"""An output folder, open for counting: ledger, tables and views as one thing; and a single run over folders.

The loop of the way of the data stands in `Session.count`: plan, looks, record, refresh.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any, Final, TypeVar

from rbc_edge.errors import BundleError, ExitCode, UnavailableError
from rbc_edge.station import job, other_files
from rbc_edge.station.estimate import Estimate
from rbc_edge.station.identity import Identity
from rbc_edge.station.inbox import mtime_ns, scan
from rbc_edge.station.notes import Notes
from rbc_edge.station.sandbox import Interrupted, Sandbox, to_quarantine
from rbc_edge.station.slide_work import SlideWork
from rbc_edge.station.stop import Abandoned, Stop
from rbc_edge.store import outdir, slide_scale
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.recovery import mend
from rbc_edge.store.rows import FieldRow, Look, Plan, Recorded, RowError, Status, Version
from rbc_edge.text import PAGED_SUFFIXES, count_text, natural_key, path_text, utc_text
from rbc_edge.values import InboxFile, Scale
from rbc_edge.views.refresh import ViewOptions, Views, make_pictures
from rbc_edge.views.tables import SlideSummary
from rbc_edge.vision.image_file import n_fields

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_COMMIT_EVERY_S: Final = 0.5  # what a power cut can cost in work; a commit an image wears a memory card
_WAIT_FOR_WRITER_S: Final = 60.0  # a running service releases the folder every few seconds
_POLL_S: Final = 0.2
_TOGETHER: Final = 8  # images whose attempts are noted at once
_TOGETHER_ASKED: Final = 500  # files whose pages one query asks for
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

    def in_words(self) -> dict[str, str]:
        """Returns the settings that a person should know of when they differ from the last run."""
        scale = self.scale
        return {
            "slide pattern": self.slide_pattern or "none",
            "ignore": ", ".join(self.ignore) or "none",
            "scale": f"{scale.cell_diameter_px:g} px a cell" if scale else "estimated",
            "edges": str(self.views.edges),
            "form of the tables": str(self.views.form),
            "bundle": self.recipe.bundle_id,
        }


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
    n_lost: int = 0  # counts: their rows in the ledger were damaged, and their images are gone
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
        n_failed = self.n_failed + self.n_lost + self.n_unreadable_folders
        return ExitCode.SOME_FAILED if n_failed else ExitCode.OK


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

    def counted(*, deep: bool) -> Summary:
        how = (on_step, stop or Stop(), clock or Clock(), executor)
        return _counted_once(paths, options, *how, deep=deep)

    try:
        return counted(deep=False)
    except RowError:  # packed cells are read only where a view shows them
        return counted(deep=True)


def _counted_once(
    paths: Sequence[Path],
    options: CountOptions,
    on_step: Callable[[Step], None],
    stop: Stop,
    clock: Clock,
    executor: Executor | None,
    *,
    deep: bool,
) -> Summary:
    out = options.out
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
                mend_rows(session.ledger, deep=deep)
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
        self._n_pages: dict[int, int] = {}  # fields of files that hold several, by the hash of the file
        self._notes = Notes(ledger)
        self._identity = Identity(
            ledger,
            self._notes,
            has_pattern=options.slide_pattern is not None,
            may_wait=may_wait,
            keep_going=self._keep_going,
        )
        self._estimate = Estimate(
            ledger,
            self._identity,
            recipe=options.recipe,
            given=options.scale,
            force=options.force,
            wait=self._wait,
            leave_for_later=self._leave_for_later,
            keep_going=self._keep_going,
        )
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
                self._notes.settings(self._options.in_words())
                if self._may_wait is None:
                    self._keep_given(groups)
                portion.changed |= self.ledger.drop_gone(there)
                plan = self._without_copies(self.plan(files), copies, portion)
                plan = self._without_killers(self._identity.without_strangers(plan), portion)
                unsettled = self.ledger.reader.unsettled()
                for slide_id, group in groups.items():
                    if self._is_over(portion):
                        break
                    slide = SlideWork(slide_id, group, plan, there.get(slide_id, group))
                    slide.was_settled = slide_id not in unsettled
                    self._count(slide, portion, workers)
                # Slides that lost an image to another one: their scale may be another now.
                for slide_id in filter(there.__contains__, self.ledger.reader.unsettled()):
                    if self._is_over(portion):
                        break
                    files_there, plan = there[slide_id], Plan({}, (), {}, portion.waiting)
                    slide = SlideWork(slide_id, groups.get(slide_id, []), plan, files_there)
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
        self._notes.shared(portion.changed)
        portion.summary.n_lost = self._notes.lost()
        portion.summary.notes = self._notes.taken()
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
            self._notes.say(f"{pictures} not counted, made by a program of a counted image: {example}")
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

    def _put_off(self, undecided: Collection[InboxFile], slide: SlideWork) -> None:
        """Leaves images for later that may kill this process, while no other can try them."""
        for file in slide.files:
            if file in undecided:
                slide.waiting.add(file)
                slide.troubled[file] = f"{path_text(file.path)}: left for later: it may have ended a process"
                if self._may_wait is not None:
                    self._may_wait(file, job.MACHINE)

    def _count(self, slide: SlideWork, portion: "_Portion", workers: Executor) -> None:
        self._put_off(portion.undecided, slide)
        try:
            self._count_slide(slide, portion, workers)
        finally:
            portion.add(slide)
            for note in slide.notes():
                self._notes.say(note)

    def _count_slide(self, slide: SlideWork, portion: "_Portion", workers: Executor) -> None:
        """Counts the files of one slide until its scale is that of what is counted."""
        if slide.was_settled and not slide.to_do():
            return
        slide_scale.settle(self.ledger, slide.slide_id, is_settled=False)
        moved = self._identity.taken_over(slide)
        slide.version = self._version_of(slide.slide_id)
        if not self._options.force:
            slide.moved = frozenset(d for d, version in moved.items() if version == slide.version)
        slide.contents = self.ledger.reader.contents(slide.slide_id, slide.version)
        if self._estimate.choose(slide, workers) and not self._options.force:
            self._plan_again(slide)
        for _ in range(_MAX_PASSES):
            if self._pass(slide, portion, workers):
                break
            # A file may be another one than before it was opened, or cannot be counted.
            is_new_scale = self._estimate.choose(slide, workers)
            if not (slide.is_unsettled or is_new_scale):
                slide_scale.settle(self.ledger, slide.slide_id)
                break
            # A count moved between two names, or what a duplicate refers to is gone: look at those, too.
            self._plan_again(slide)
        if slide.is_changed:
            self.ledger.commit()  # first: a table never shows what a power cut could take back
            self.views.tables.write_slide(slide.slide_id)

    def _plan_again(self, slide: SlideWork) -> None:
        slide.is_unsettled = False
        failed = {f: status for f, status in slide.status.items() if status is Status.FAILED}
        slide.status = {**failed, **self.ledger.plan(slide.files, self._version).done}
        slide.contents = self.ledger.reader.contents(slide.slide_id, slide.version)

    def _version_of(self, slide_id: str) -> Version:
        given = self.ledger.reader.given_scale(slide_id) or self._options.scale
        return Version.of(self._version.bundle_id, given)

    def _pass(self, slide: SlideWork, portion: "_Portion", workers: Executor) -> bool:
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

    def _tasks(self, slide: SlideWork, files: Sequence[InboxFile]) -> Iterator[job.Task | None]:
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

    def _record(self, look: Look, slide: SlideWork, workers: Executor) -> Recorded | None:
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
            self._identity.recorded(file)
            self._n_new_failures += recorded.row.status is Status.FAILED
        return recorded

    def _leave_for_later(self, file: InboxFile, why: str, slide: SlideWork) -> None:
        slide.waiting.add(file)
        slide.troubled[file] = why
        log.warning("%s", why)
        if self._may_wait is not None:
            self._may_wait(file, job.MACHINE)

    def _tell(
        self, slide: SlideWork, portion: "_Portion", file: InboxFile, recorded: Recorded | None
    ) -> None:
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

    def _keep_given(self, slide_ids: Collection[str]) -> None:
        """Has the slides keep the scale of this run, and says which of them lose that of an earlier one."""
        lost = slide_scale.give_by_run(self.ledger, slide_ids, self._options.scale)
        if lost and not any(note.startswith("settings differ") for note in self._notes.new):
            slides = f"slide {lost[0]}" if len(lost) == 1 else f"{len(lost)} slides"
            self._notes.say(f"{slides}: the scale is estimated again, it was given to an earlier run")


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

    def add(self, slide: SlideWork) -> None:
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


def _has_changed(file: InboxFile) -> bool:
    try:
        status = file.path.stat()
    except OSError:
        return False  # gone after it was read; what was read is whole
    return (status.st_size, mtime_ns(status)) != (file.size_bytes, file.mtime_ns)

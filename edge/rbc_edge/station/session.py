"""An output folder, open for counting: ledger, tables and views as one thing; and a single run over folders.

The loop of the way of the data stands in `Session.count`: plan, looks, record, refresh.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from math import inf, nan
from pathlib import Path
from typing import Any, Final

from rbc_edge.errors import ExitCode, UnavailableError
from rbc_edge.station.inbox import scan
from rbc_edge.station.job import (
    SCALE_FIELDS,
    AnalyzerRecipe,
    Task,
    digest,
    drop_analyzer,
    estimate_scale,
    look_at,
    looks,
    spread,
)
from rbc_edge.station.sandbox import Interrupted, Sandbox, to_quarantine
from rbc_edge.station.stop import Abandoned, Stop
from rbc_edge.store.ledger import Ledger
from rbc_edge.store.outdir import check_apart, writing
from rbc_edge.store.queries import SlideContents
from rbc_edge.store.rows import FieldRow, Look, Plan, Recorded, SlideScale, Status, Version
from rbc_edge.text import path_text, utc_text
from rbc_edge.values import InboxFile, Scale, ScaleSource
from rbc_edge.views.refresh import ViewOptions, Views, make_pictures
from rbc_edge.views.tables import SlideSummary

log = logging.getLogger(__name__)

_MAX_SCALE_ATTEMPTS: Final = 32  # a folder full of broken images is not read through for its scale
_SCALE_TOLERANCE: Final = 0.02  # a smaller change of the scale changes no count (docs/results.md, scale)
_COMMIT_EVERY_S: Final = 0.5  # what a power cut can cost in work; a commit an image wears a memory card
_WAIT_FOR_WRITER_S: Final = 60.0  # a running service releases the folder every few seconds
_POLL_S: Final = 0.2
_TOGETHER: Final = 8  # images whose attempts are noted at once
_MAX_PASSES: Final = 4  # over the files of a slide that unsettled each other


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from. Tests give their own.

    Attributes:
        now: The time of day, with its zone.
        monotonic_s: Seconds that never go back.
    """

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    monotonic_s: Callable[[], float] = time.perf_counter


@dataclass(frozen=True, slots=True)
class CountOptions:
    """How to count, and into which folder.

    Attributes:
        out: Output folder. It is made when it is missing.
        recipe: What to count with.
        scale: The scale the user gave. None: estimated for each slide.
        slide_pattern: See `inbox.scan`.
        force: Count again what was counted.
        max_failures: Stop after this many failed images. None: never.
        workers: Images looked at together.
        views: Tables, overlays and reports.
        sandbox: See `Sandbox`. None: an image that was being counted when two processes died is failed
            without that.
    """

    out: Path
    recipe: AnalyzerRecipe
    scale: Scale | None = None
    slide_pattern: str | None = None
    force: bool = False
    max_failures: int | None = None
    workers: int = 1
    views: ViewOptions = field(default_factory=ViewOptions)
    sandbox: Sandbox | None = None

    @property
    def version(self) -> Version:
        """What a count depends on besides the image."""
        scale = self.scale
        settings = f"{scale.source}={scale.cell_diameter_px!r}" if scale else "estimated"
        return Version(self.recipe.bundle_id, settings)


@dataclass(frozen=True, slots=True)
class Step:
    """One image is recorded; for progress bars and logs.

    Attributes:
        file: The image.
        row: What the ledger now says. None where nothing had to be done, or the image was left for later.
        is_new: It was counted, or failed, now. An image that was only renamed or touched is not new.
        n_done: Images done so far, this one included.
        n_total: Images in all.
    """

    file: InboxFile
    row: FieldRow | None
    is_new: bool
    n_done: int
    n_total: int


@dataclass(slots=True)
class Summary:
    """What was done.

    Attributes:
        n_images: Images found.
        n_counted: Images analyzed now.
        n_unchanged: Images that needed no analysis: counted before, or only renamed.
        n_duplicates: Images whose content is counted under another name of their slide.
        n_failed: Images that could not be counted, now or before.
        n_unreadable_folders: Sub-folders that could not be listed.
        n_recounts: How often a slide's scale changed, so that its fields were counted again.
        stopped_by: The signal that ended it early.
        gave_up: It ended early because of `CountOptions.max_failures`.
        slides: The rows of ``slides.csv``.
    """

    n_images: int
    n_counted: int = 0
    n_unchanged: int = 0
    n_duplicates: int = 0
    n_failed: int = 0
    n_unreadable_folders: int = 0
    n_recounts: int = 0
    stopped_by: int | None = None
    gave_up: bool = False
    slides: list[SlideSummary] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """What the process tells the shell."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        if self.n_failed or self.n_unreadable_folders:
            return ExitCode.SOME_FAILED
        return ExitCode.OK


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
    and the others are counted.

    Args:
        paths: Folders and files.
        options: How to count.
        on_step: Told of every image.
        stop: Ends the run early, with tables that show what was done.
        clock: Where time comes from.
        executor: Where images are looked at. None: threads of this process.

    Returns:
        What was done.

    Raises:
        UsageError: The output folder lies inside the source, or names clash (`inbox.scan`).
        UnavailableError: Source or output cannot be used.
        BundleError: The bundle is not what the recipe says.
    """
    stop = stop or Stop()
    out = options.out
    check_apart(paths, out)
    inbox = scan(paths, slide_pattern=options.slide_pattern)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out)}: cannot make the output folder: {error.strerror}",
            "choose another --out, or check the permissions of its parent",
        ) from error
    try:
        with (
            writing(out, wait_s=_WAIT_FOR_WRITER_S),
            Session(
                options, Ledger(out), on_step=on_step, stop=stop, clock=clock, executor=executor
            ) as session,
        ):
            if session.ledger.reader.tables_are_stale():  # a run was killed: its counts show before the work
                session.views.refresh()
            summary = session.count(inbox.files)
    finally:
        drop_analyzer(options.recipe)
    summary.n_unreadable_folders = len(inbox.unreadable)
    # Without the lock: what only reads, and takes its time, keeps no service waiting.
    make_pictures(out, options.views, keep_going=lambda: stop.signal is None)
    summary.stopped_by = stop.signal
    return summary


class Session:
    """Counts lists of files into an output folder. A run and the service share it.

    Args:
        options: How to count.
        ledger: The folder's ledger. No other process records images meanwhile (`outdir.writing`). It is
            closed with the session.
        on_step: Told of every image.
        stop: Ends the work after the image in hand.
        clock: Where time comes from.
        executor: Where images are looked at. None: threads of this process.
        may_wait: Tells for a file and a failure whether to leave it for later instead of recording it. The
            failure is ``changed`` where the file was written to while it was read.
        keep_going: Asked while a sandbox is at work. False calls it off.

    Attributes:
        ledger: The ledger.
        views: Its views.
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

    def count(
        self,
        files: Sequence[InboxFile],
        *,
        of_slide: Mapping[str, Sequence[InboxFile]] | None = None,
        time_s: float = inf,
    ) -> Summary:
        """Counts files in order, slide by slide, and refreshes the tables, also when it ends early.

        Args:
            files: What to count. Files of one slide stand together.
            of_slide: All images there are, by slide, where `files` is only a part of them. A slide's scale is
                estimated from these.
            time_s: Ends early, between two images, after this time, seconds.
        """
        portion = _Portion(Summary(n_images=len(files)), self._clock.monotonic_s() + time_s)
        plan = self.plan(files)
        changed: set[str] = set()
        with self._workers() as workers:
            try:
                plan = self._quarantined(plan, portion)
                for slide_id, group in groupby(files, key=lambda f: f.slide_id):
                    in_slide = list(group)
                    changed.add(slide_id)
                    everything = (of_slide or {}).get(slide_id, in_slide)
                    changed |= self._count_slide(in_slide, everything, plan, portion, workers)
                    if self._is_over(portion):
                        break
            except Interrupted:
                portion.summary.stopped_by = self._stop.signal
        self.ledger.commit()
        portion.summary.slides = self.views.refresh(None if of_slide is None else changed)
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

    def _quarantined(self, plan: Plan, portion: "_Portion") -> Plan:
        """Records as failed what kills a process; returns the plan without it."""
        if not plan.interrupted:
            return plan
        killers = to_quarantine(
            self.ledger,
            plan.interrupted,
            self._options.sandbox,
            keep_going=self._keep_going,
        )
        done = dict(plan.done)
        for file in killers:
            message = f"{path_text(file.path)}: ends the program when it is opened; it is not opened again"
            look = Look(file, digest(file), failure="crash", message=message)
            recorded = self.ledger.record(look, self._version, self._now())
            assert recorded is not None
            done[file] = recorded.row.status
            self._on_step(Step(file, recorded.row, True, portion.n_done, portion.summary.n_images))
        self.ledger.commit()
        return Plan(done, tuple(f for f in plan.to_do if f not in done), plan.interrupted)

    def _count_slide(
        self,
        files: Sequence[InboxFile],
        everything: Sequence[InboxFile],
        plan: Plan,
        portion: "_Portion",
        workers: Executor,
    ) -> set[str]:
        """Counts the files of one slide; returns slides that lost images to it."""
        slide = _Slide(files, plan, portion)
        to_do = [file for file in files if file not in plan.done]
        scale = Scale(nan, ScaleSource.NONE)  # for a slide with nothing to do
        contents = SlideContents({}, frozenset())
        if to_do:
            slide_id = files[0].slide_id
            contents = self.ledger.reader.contents(slide_id, self._version)
            scale, is_recount = self._slide_scale(slide_id, everything, contents, workers)
            if is_recount:
                portion.summary.n_recounts += 1
                contents = SlideContents({}, contents.failed)
                slide.status = dict(self.plan(files).done)
        for _ in range(_MAX_PASSES):
            if self._pass(slide, scale, contents, portion, workers) or not slide.is_unsettled:
                break
            # A count moved between two names, or what a duplicate refers to is gone: look at those, too.
            slide.is_unsettled = False
            slide.status = dict(self.ledger.plan(files, self._version).done)
            contents = self.ledger.reader.contents(files[0].slide_id, self._version)
        portion.add(slide.status.values())
        if slide.is_changed:
            self.ledger.commit()  # first: a table never shows what a power cut could take back
            self.views.refresh_slide(files[0].slide_id)
        return slide.left

    def _pass(
        self,
        slide: "_Slide",
        scale: Scale,
        contents: SlideContents,
        portion: "_Portion",
        workers: Executor,
    ) -> bool:
        """Goes through a slide's files once; tells whether it ended early."""
        begun: dict[InboxFile, None] = {}  # the ledger says that they are being tried
        to_do = [f for f in slide.files if f not in slide.status and f not in slide.waiting]
        tasks = self._tasks(to_do, scale, contents, slide, begun)
        coming = looks(tasks, workers, n_ahead=self._options.workers, wait=self._wait)
        is_early = False
        try:
            for file in slide.files:
                if self._is_over(portion):
                    is_early = True
                    break
                if file in slide.status:
                    if file not in slide.told:
                        self._tell(slide, portion, file, None, is_new=False)
                    continue
                if file in slide.waiting:
                    continue
                recorded = self._record(next(coming), scale, portion)
                begun.pop(file, None)
                slide.add(file, recorded)
                if recorded is not None and recorded.row.status is Status.FAILED:
                    self._n_new_failures += 1
                self._commit_now_and_then()
                is_new = recorded is not None and recorded.is_new
                self._tell(slide, portion, file, recorded.row if recorded else None, is_new=is_new)
        except Abandoned:
            portion.summary.stopped_by = self._stop.signal
            is_early = True
        coming.close()
        if begun:
            self.ledger.end(list(begun))
        return is_early

    def _tasks(
        self,
        files: Sequence[InboxFile],
        scale: Scale,
        contents: SlideContents,
        slide: "_Slide",
        begun: dict[InboxFile, None],
    ) -> Iterator[Task | None]:
        """Yields what to look at, and has the ledger note it before it is opened.

        Some at a time, because a note for each would triple what is written to the disk. An image that was
        being counted when a process died is tried alone: of many it would not be known which one it was.
        """
        for i, file in enumerate(files):
            is_alone = file in slide.interrupted
            if is_alone:
                yield None
            if file not in begun:
                together = [file]
                for other in files[i + 1 : i + _TOGETHER] if not is_alone else ():
                    if other in slide.interrupted:
                        break
                    together.append(other)
                self.ledger.begin(together)
                begun.update(dict.fromkeys(together))
            known = frozenset[str]()
            if not self._options.force:
                known = contents.counted.get(file.size_bytes, known)
            yield Task(file, scale, self._options.recipe, known)
            if is_alone:
                yield None

    def _wait(self, looking: Future[Look]) -> Look:
        with self._stop.image_in_hand():
            # Not all at once: a signal that another thread receives is handled when this one wakes.
            while not wait((looking,), timeout=_POLL_S).done:
                pass
            return looking.result()

    def _record(self, look: Look, scale: Scale, portion: "_Portion") -> Recorded | None:
        """Brings one look into the ledger; None: the file was left for later.

        Raises:
            Abandoned: From `Stop`. The ledger still says that the file is being tried.
        """
        file, now = look.file, self._now()
        if self._may_wait is not None:
            failure = look.failure or ("changed" if _has_changed(file) else "")
            if failure and self._may_wait(file, failure):
                self.ledger.end([file])
                return None
        recorded = self.ledger.record(look, self._version, now, force=self._options.force)
        if recorded is None:  # its content was known, but what knew it is gone
            with self._stop.image_in_hand():
                look = look_at(Task(file, scale, self._options.recipe))
            recorded = self.ledger.record(look, self._version, now, force=self._options.force)
        if recorded is not None and recorded.row.status is Status.OK:
            portion.summary.n_counted += recorded.is_new
            portion.summary.n_unchanged += not recorded.is_new
        return recorded

    def _tell(
        self, slide: "_Slide", portion: "_Portion", file: InboxFile, row: FieldRow | None, *, is_new: bool
    ) -> None:
        if file not in slide.told:
            slide.told.add(file)
            portion.n_done += 1
            portion.summary.n_unchanged += file in slide.unchanged
        self._on_step(Step(file, row, is_new, portion.n_done, portion.summary.n_images))

    def _is_over(self, portion: "_Portion") -> bool:
        limit, summary = self._options.max_failures, portion.summary
        summary.stopped_by = self._stop.signal
        summary.gave_up = limit is not None and self._n_new_failures >= limit
        if summary.stopped_by is not None or summary.gave_up:
            return True
        return portion.n_done > 0 and self._clock.monotonic_s() >= portion.end_s

    def _commit_now_and_then(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - self._last_commit_s >= _COMMIT_EVERY_S:
            self.ledger.commit()
            self._last_commit_s = now_s

    def _now(self) -> str:
        return utc_text(self._clock.now())

    # -- the scale of a slide ---------------------------------------------------------------------------

    def _slide_scale(
        self, slide_id: str, files: Sequence[InboxFile], contents: SlideContents, workers: Executor
    ) -> tuple[Scale, bool]:
        """Returns the scale of a slide, and whether its fields have to be counted again.

        It is the user's, the one kept for the slide, or a new estimate, then kept. A slide that gets its
        images one by one has its first estimate from one field, and better ones when it has two, four and
        eight. When the estimate changes, its few fields are counted again.
        """
        if self._options.scale is not None:
            return self._options.scale, False
        bundle_id = self._version.bundle_id
        kept = self.ledger.reader.slide_scale(slide_id)
        if kept is not None and (kept.bundle_id != bundle_id or self._options.force):
            kept = None
        if kept is not None and not _may_know_better(kept, len(files)):
            return kept.scale, False
        scale = self._estimated(files, contents, workers)
        is_recount = kept is not None and _differ(kept.scale, scale)
        if kept is not None and not is_recount:
            scale = kept.scale
        self.ledger.keep_scale(slide_id, SlideScale(scale, bundle_id, len(files)), recount=is_recount)
        self.ledger.commit()  # before any field is counted at it: a killed run goes on with the same scale
        return scale, is_recount

    def _estimated(self, files: Sequence[InboxFile], contents: SlideContents, workers: Executor) -> Scale:
        # What killed a process once is not opened for this either.
        candidates = [f for f in spread(files) if f.fov not in contents.failed][:_MAX_SCALE_ATTEMPTS]
        asked, coming = candidates[:SCALE_FIELDS], candidates[SCALE_FIELDS:]
        begun = list(asked)
        try:
            while True:
                self.ledger.begin(asked)
                found = workers.submit(estimate_scale, asked, self._options.recipe).result()
                if found.n_passed_over == 0 or not coming:
                    return found.scale
                # Others in the place of those that could not be read.
                instead, coming = coming[: found.n_passed_over], coming[found.n_passed_over :]
                asked = [*found.read, *instead]
                begun += instead
        finally:
            self.ledger.end(begun)


class _Threads(ThreadPoolExecutor):
    """Threads, and what is at work in them.

    Attributes:
        at_work: Looks that are not done.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n, thread_name_prefix="rbc-edge-count")
        self.at_work: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor.submit`."""
        future = super().submit(fn, *args, **kwargs)
        self.at_work.add(future)
        future.add_done_callback(self.at_work.discard)
        return future


@dataclass(slots=True)
class _Portion:
    """One call of `Session.count`."""

    summary: Summary
    end_s: float
    n_done: int = 0

    def add(self, status: Iterable[Status]) -> None:
        """Adds up what became of files."""
        for one in status:
            self.summary.n_failed += one is Status.FAILED
            self.summary.n_duplicates += one is Status.DUPLICATE


class _Slide:
    """One slide's files on their way."""

    def __init__(self, files: Sequence[InboxFile], plan: Plan, portion: _Portion) -> None:
        self.files = files
        self.interrupted = plan.interrupted
        self.status = {f: plan.done[f] for f in files if f in plan.done}
        self.unchanged = frozenset(self.status)
        self.told: set[InboxFile] = set()
        self.waiting: set[InboxFile] = set()
        self.is_changed = False
        self.is_unsettled = False
        self.left: set[str] = set()

    def add(self, file: InboxFile, recorded: Recorded | None) -> None:
        """Takes in what became of a file."""
        if recorded is None:
            self.waiting.add(file)
            return
        self.status[file] = recorded.row.status
        self.is_changed = True
        self.is_unsettled |= recorded.is_unsettling
        self.left |= recorded.left


def _has_changed(file: InboxFile) -> bool:
    try:
        status = file.path.stat()
    except OSError:
        return False  # gone after it was read; what was read is whole
    return (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.mtime_ns)


def _may_know_better(kept: SlideScale, n_files: int) -> bool:
    """Tells whether a slide has twice the images its scale was estimated from, while they were few."""
    if kept.scale.source is ScaleSource.NONE:
        return kept.n_fields is None or n_files != kept.n_fields  # saw no cell then; there may be some now
    return kept.n_fields is not None and n_files >= min(2 * kept.n_fields, SCALE_FIELDS) > kept.n_fields


def _differ(old: Scale, new: Scale) -> bool:
    if ScaleSource.NONE in (old.source, new.source):
        return old.source is not new.source
    return abs(new.cell_diameter_px / old.cell_diameter_px - 1) > _SCALE_TOLERANCE

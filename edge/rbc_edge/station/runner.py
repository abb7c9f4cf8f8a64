"""The main job: every image of the paths given, counted once, written down, shown in the tables."""

import ctypes
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from math import nan
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any, Final, Protocol

from rbc_edge.errors import ExitCode, ImageError, RbcEdgeError, UnavailableError, UsageError
from rbc_edge.station.inbox import scan
from rbc_edge.station.sandbox import Interrupted
from rbc_edge.store.ledger import Entry, FieldRow, Ledger, SlideScale, Status, Version
from rbc_edge.store.outdir import writing
from rbc_edge.text import path_text
from rbc_edge.values import FieldOfView, FovResult, InboxFile, Scale, ScaleSource, UInt8
from rbc_edge.views.refresh import PictureOptions, make_all
from rbc_edge.views.tables import SlideSummary, Tables
from rbc_edge.vision import image_file
from rbc_edge.vision.counting import EdgeRule
from rbc_edge.vision.image_file import load_field

log = logging.getLogger(__name__)

SCALE_FIELDS: Final = 8
"""Fields of view a slide's scale is estimated from."""

_SCALE_PIXELS: Final = 30e6  # all of them together: a few 20-megapixel fields hold cells enough, and memory
_SCALE_ATTEMPTS: Final = 32  # a folder full of broken images is not read through for its scale
_HASHED_BYTES: Final = 2_000_000_000  # a larger file was never read; hashing it would take minutes
_LARGE_BYTES: Final = 300_000  # smaller files are not asked: no JPEG of 4 megapixels takes less
_COMMIT_EVERY_S: Final = 0.5  # what a power cut can cost in work; a commit an image wears a memory card
_WAIT_FOR_WRITER_S: Final = 60.0  # a service beside us lets go every few seconds
_SCALE_TOLERANCE: Final = 0.02  # counts do not feel less (docs/results.md, scale)
_M_ARENA_MAX: Final = -8  # malloc.h
_TOGETHER: Final = 8  # images whose attempts are noted at once
# Deaths without evidence. A machine that goes down in a trial, and an image that a trial outlives and the
# service does not, are rarer than a supply that flaps: that must fail no good image, however often it does.
_MOST_TRIALS: Final = 25
_MOST_ATTEMPTS: Final = 100


class Analyzing(Protocol):
    """What the runner asks of an analyzer (`rbc_edge.vision.analyzer.Analyzer`)."""

    def estimate_scale(self, images: Sequence[UInt8], /) -> Scale:
        """Estimates a slide's scale from uint8 (H, W, 3) images."""

    def analyze(self, field: FieldOfView, scale: Scale, /) -> FovResult:
        """Finds the cells of one field of view."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one run is asked to do.

    Attributes:
        paths: Folders and files.
        out: Output folder; made when missing.
        scale: The scale the user gave; None: estimated by slide.
        slide_pattern: See `inbox.scan`.
        edges: Edge rule of the tables.
        cells: Also write a table of cells by slide.
        force: Count again what was counted.
        max_failures: Stop after this many failed images; None: never.
        workers: Images read and counted at the same time.
        pictures: Which overlays and reports to make of the counts.
    """

    paths: tuple[Path, ...]
    out: Path
    scale: Scale | None = None
    slide_pattern: str | None = None
    edges: EdgeRule = EdgeRule.ALL
    cells: bool = False
    force: bool = False
    max_failures: int | None = None
    workers: int = 1
    pictures: PictureOptions = field(default_factory=PictureOptions)


@dataclass(frozen=True, slots=True)
class Step:
    """One image is settled; for progress bars and logs.

    Attributes:
        file: The image.
        row: What the ledger now says; None where nothing had to be done, or the image was left for later.
        is_new: It was analyzed, or failed, now; an image that was only renamed or touched is not new.
        n_done: Images settled so far, this one included.
        n_total: Images of the run.
    """

    file: InboxFile
    row: FieldRow | None
    is_new: bool
    n_done: int
    n_total: int


@dataclass(slots=True)
class RunSummary:
    """What a run did.

    Attributes:
        n_images: Images found.
        n_counted: Images analyzed in this run.
        n_unchanged: Images that needed no analysis: settled before, or only renamed.
        n_duplicates: Images of the run whose content is counted under another name of their slide.
        n_failed: Images of the run that could not be counted, now or before.
        n_unreadable_folders: Sub-folders that could not be listed.
        stopped_by: The signal that ended the run early.
        gave_up: The run ended early because of `RunOptions.max_failures`.
        slides: The rows of ``slides.csv``.
    """

    n_images: int
    n_counted: int = 0
    n_unchanged: int = 0
    n_duplicates: int = 0
    n_failed: int = 0
    n_unreadable_folders: int = 0
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


class Abandoned(BaseException):
    """The image in hand is left where it is; not an error of the image, so no `Exception`."""


@dataclass(slots=True)
class Stop:
    """A wish to end after the image in hand.

    Attributes:
        signal: The signal that asked; None: go on.
        patience_s: How long the image in hand may take after that; None: as long as it needs.
        is_late: The image in hand took longer than that, and was left.
        on_ask: Called from the signal handler.
    """

    signal: int | None = None
    patience_s: float | None = None
    is_late: bool = False
    on_ask: Callable[[], None] = lambda: None
    _in_hand: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM as the wish; a second one ends the process at once."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number])
            if self.patience_s is not None:
                signal.signal(signal.SIGALRM, lose_patience)
                signal.setitimer(signal.ITIMER_REAL, self.patience_s)
            self.on_ask()

        def lose_patience(_number: int, _frame: FrameType | None) -> None:
            self.is_late = True
            if self._in_hand:
                raise Abandoned

        before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def image_in_hand(self) -> Iterator[None]:
        """Marks code that may be left at any point, by `Abandoned`: it changes nothing that lasts."""
        self._in_hand = True
        try:
            if self.is_late:
                raise Abandoned
            yield
        finally:
            self._in_hand = False


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from; tests give their own.

    Attributes:
        now: The time of day, with its zone.
        monotonic_s: Seconds that never go back.
    """

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    monotonic_s: Callable[[], float] = time.perf_counter


def run_once(
    options: RunOptions,
    bundle_id: str,
    make_analyzer: Callable[[], Analyzing],
    *,
    on_step: Callable[[Step], None] = lambda _: None,
    stop: Stop | None = None,
    clock: Clock | None = None,
    survives: Callable[[Sequence[Path]], bool] | None = None,
) -> RunSummary:
    """Counts every image of the paths that is not counted yet, and brings the tables up to date.

    It may be killed at any moment; the next run goes on. One image that cannot be counted is a failed row,
    and the others are counted.

    Args:
        options: What to do.
        bundle_id: The bundle the analyzer works with; another one makes every count stale.
        make_analyzer: Called once, when the first image needs counting; a run with nothing to do stays light.
        on_step: Told of every image settled.
        stop: Ends the run early, with tables that show what was done.
        clock: Where time comes from.
        survives: See `Run`.

    Returns:
        What was done.

    Raises:
        UsageError: The output folder lies inside the source, or names clash (`inbox.scan`).
        UnavailableError: Source or output cannot be used.
        BundleError: From `make_analyzer`.
    """
    stop = stop or Stop()
    check_apart(options.paths, options.out)
    inbox = scan(options.paths, slide_pattern=options.slide_pattern)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"{path_text(options.out)}: cannot make the output folder: {error.strerror}",
            "choose another --out, or check the permissions of its parent",
        ) from error
    with writing(options.out, wait_s=_WAIT_FOR_WRITER_S), Ledger(options.out) as ledger:
        tables = Tables(options.out, ledger, edges=options.edges, cells=options.cells)
        if ledger.tables_are_stale():  # a run was killed; its counts show before hours of counting go by
            tables.write()
        run = Run(
            options,
            bundle_id,
            make_analyzer,
            ledger=ledger,
            tables=tables,
            on_step=on_step,
            stop=stop,
            clock=clock or Clock(),
            survives=survives,
        )
        summary = run.settle(inbox.files, n_unreadable_folders=len(inbox.unreadable))
    # Without the lock: what is read only, and takes its time, keeps no service waiting.
    make_all(options.out, options.pictures, edges=options.edges, keep_going=lambda: stop.signal is None)
    summary.stopped_by = stop.signal
    return summary


def check_apart(paths: Sequence[Path], out: Path) -> None:
    """Refuses an output folder that lies in the camera's folder: results would be read as its slides."""
    real_out = Path(os.path.realpath(out))
    for path in paths:
        real = Path(os.path.realpath(path))
        inside = real_out.is_relative_to(real) if real.is_dir() else real_out == real.parent
        if inside or real == real_out / "cells":
            raise UsageError(
                f"the output folder {path_text(out)} lies inside the source {path_text(path)}",
                "give an --out outside the images' folder; that folder is never written to",
            )


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look at a file gave: its cells, or why not.

    The pixels are not kept: of large images only those at work fit into memory.
    """

    failure: str = ""
    message: str = ""
    sha256: str = ""
    captured_at: str = ""
    result: FovResult | None = None  # None with no failure: it was not analyzed, its content is known
    elapsed_s: float = 0.0


class Run:
    """Settles lists of files; the body that a single run and a watch share.

    Args:
        options: What to do; `RunOptions.paths` is not looked at.
        bundle_id: The bundle the analyzer works with.
        make_analyzer: Called once, when the first image needs counting.
        ledger: The ledger, of which nobody else settles images meanwhile (`outdir.writing`).
        tables: The tables of that ledger.
        on_step: Told of every image settled.
        stop: Ends the work after the image in hand.
        clock: Where time comes from.
        survives: Tells whether a process of its own outlives the counting of images (`sandbox.survives`);
            None: an image that was being tried when two processes died is failed without it.
        may_wait: Tells for a file and a failure whether to leave it for later instead of writing it down; the
            failure is ``changed`` where somebody wrote to the file while it was read.

    Attributes:
        n_recounts: How often a slide's scale was found anew, so that its fields have to be counted again.
    """

    def __init__(
        self,
        options: RunOptions,
        bundle_id: str,
        make_analyzer: Callable[[], Analyzing],
        *,
        ledger: Ledger,
        tables: Tables,
        on_step: Callable[[Step], None],
        stop: Stop,
        clock: Clock,
        survives: Callable[[Sequence[Path]], bool] | None = None,
        may_wait: Callable[[InboxFile, str], bool] | None = None,
    ) -> None:
        _share_one_heap()
        self._options = options
        self._make_analyzer = make_analyzer
        self._analyzer: Analyzing | None = None
        self._sharing = Lock()
        self._large = Lock()
        self._digests: set[str] = set()  # contents of the slide that are counted, or about to be
        self._ledger = ledger
        self._tables = tables
        self._on_step = on_step
        self._stop = stop
        self._clock = clock
        self._survives = survives
        self._may_wait = may_wait
        scale = options.scale
        settings = f"{scale.source}={scale.cell_diameter_px!r}" if scale else "estimated"
        self.version = Version(bundle_id, settings)
        self.n_recounts = 0
        self._last_commit_s = clock.monotonic_s()
        self._n_new_failures = 0
        self._n_done = 0
        self._suspects: set[InboxFile] = set()

    def settle(
        self,
        files: Sequence[InboxFile],
        *,
        of_slide: Mapping[str, Sequence[InboxFile]] | None = None,
        n_unreadable_folders: int = 0,
        time_s: float | None = None,
    ) -> RunSummary:
        """Settles files in order, slide by slide, and writes the tables, also when it ends early.

        Args:
            files: What to settle; files of one slide stand together.
            of_slide: All images there are, by slide, where `files` is only a part of them; a slide's scale is
                estimated from these.
            n_unreadable_folders: Goes into the summary.
            time_s: Ends early, between two images, after this time; None: when all are settled.
        """
        summary = RunSummary(n_images=len(files), n_unreadable_folders=n_unreadable_folders)
        self._n_done = 0
        end_s = None if time_s is None else self._clock.monotonic_s() + time_s
        changed = self._ledger.claim_paths(files)
        # This thread writes down, in order, what the others read and count.
        workers = ThreadPoolExecutor(self._options.workers, thread_name_prefix="rbc-edge-count")
        try:
            self._settle_suspects(files)
            for slide_id, group in groupby(files, key=lambda f: f.slide_id):
                in_slide = list(group)
                changed.add(slide_id)
                self._settle_slide(
                    in_slide, (of_slide or {}).get(slide_id, in_slide), workers, summary, end_s=end_s
                )
                if self._ends_early(summary, end_s):
                    break
        except Interrupted:
            summary.stopped_by = self._stop.signal
        finally:
            # A thread that is late with a huge image is not waited for; the process ends under it.
            workers.shutdown(wait=not self._stop.is_late, cancel_futures=True)
        self._ledger.commit()
        summary.slides = self._tables.write(None if of_slide is None else changed)
        return summary

    def _settle_suspects(self, files: Sequence[InboxFile]) -> None:
        """Writes down as failed what brought a process down, and would again."""
        suspects = self._ledger.attempts(files)
        self._suspects = set(suspects)
        if not suspects:
            return
        guilty = [
            file
            for file, attempt in suspects.items()
            if attempt.n >= (2 if self._survives is None else _MOST_ATTEMPTS)
            or attempt.n_trials >= _MOST_TRIALS
        ]
        rest = [file for file in suspects if file not in guilty]
        if self._survives is not None and rest:
            # Together, for most are innocent; but not if nobody ever told how that ends.
            alone = max(suspects[file].n_trials for file in rest) >= _MOST_TRIALS // 2
            if alone or not self._outlives(rest):
                guilty += [
                    file for file in rest if (len(rest) == 1 and not alone) or not self._outlives([file])
                ]
        for file in guilty:
            entry = Entry(file, self.version, _digest(file), self._now())
            message = f"{path_text(file.path)}: brings the program down; it is passed over"
            row = self._ledger.record_failed(entry, "crash", message)
            self._on_step(Step(file, row, True, self._n_done, len(files)))
        self._ledger.commit()

    def _outlives(self, files: Sequence[InboxFile]) -> bool:
        assert self._survives is not None
        self._ledger.begin_trial(files)
        try:
            lives = self._survives([file.path for file in files])
        except Interrupted:
            if self._stop.signal is not None:
                self._ledger.end_trial(files)
                raise
            lives = True  # somebody ended the child, not us: no evidence
        if lives:
            self._ledger.end_trial(files)
        return lives

    def _settle_slide(
        self,
        files: list[InboxFile],
        all_files: Sequence[InboxFile],
        workers: ThreadPoolExecutor,
        summary: RunSummary,
        *,
        end_s: float | None,
    ) -> None:
        slide_id = files[0].slide_id
        begun: dict[str, InboxFile] = {}  # the ledger says that they are being tried
        ahead: dict[str, Future[_Look]] = {}
        changed = False
        # Before the first image: where the scale is found anew, those that were counted are not done.
        scale: Scale | None = None
        if any(not self._is_done(file) for file in files):
            scale = self._slide_scale(slide_id, all_files)
            self._digests = set() if self._options.force else self._ledger.digests(slide_id, self.version)
        for i, file in enumerate(files):
            if self._ends_early(summary, end_s):
                break
            row: FieldRow | None = None
            n_counted = summary.n_counted
            if self._is_done(file):
                summary.n_unchanged += 1
                known = self._ledger.field(slide_id, file.fov)
                status: Status | None = known.status if known else Status.OK
            else:
                scale = scale or self._slide_scale(slide_id, all_files)
                for j, f in enumerate(files[i : i + 1 + self._options.workers], i):
                    if f.fov not in begun and (j == i or self._may_begin(file, f)):
                        begun |= {g.fov: g for g in self._begin(files[j:])}
                    if f.fov in begun and f.fov not in ahead:
                        ahead[f.fov] = workers.submit(self._look, f, scale)
                try:
                    row = self._settle_file(file, ahead.pop(file.fov), scale, summary)
                except Abandoned:
                    summary.stopped_by = self._stop.signal
                    break
                del begun[file.fov]
                changed, status = changed or row is not None, row.status if row else None
                self._n_new_failures += status is Status.FAILED
            summary.n_failed += status is Status.FAILED
            summary.n_duplicates += status is Status.DUPLICATE
            self._n_done += 1
            self._commit_now_and_then()
            is_new = summary.n_counted > n_counted or (row is not None and row.status is Status.FAILED)
            self._on_step(Step(file, row, is_new, self._n_done, summary.n_images))
        if begun:
            self._ledger.end_attempts(list(begun.values()))
        if changed:
            self._ledger.commit()  # first: a table never shows what a power cut could take back
            self._tables.write_slide(slide_id)

    def _begin(self, files: Sequence[InboxFile]) -> list[InboxFile]:
        """Has the ledger say that the first of some files, and a few more, are being tried; returns them.

        Together, because a note for each would triple what is written to the disk. A suspect is tried
        alone: of many it would not be known which one it was.
        """
        together = list(files[:1])
        if files[0] not in self._suspects:
            for file in files[1:_TOGETHER]:
                if file in self._suspects:
                    break
                if not self._is_done(file):
                    together.append(file)
        self._ledger.begin_attempts(together)
        return together

    def _may_begin(self, first: InboxFile, file: InboxFile) -> bool:
        return not ({first, file} & self._suspects or self._is_done(file))

    def _is_done(self, file: InboxFile) -> bool:
        return not self._options.force and self._ledger.is_done(file, self.version)

    def _ends_early(self, summary: RunSummary, end_s: float | None) -> bool:
        limit = self._options.max_failures
        summary.stopped_by = self._stop.signal
        summary.gave_up = limit is not None and self._n_new_failures >= limit
        if summary.stopped_by is not None or summary.gave_up:
            return True
        return end_s is not None and self._n_done > 0 and self._clock.monotonic_s() >= end_s

    def _commit_now_and_then(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - self._last_commit_s >= _COMMIT_EVERY_S:
            self._ledger.commit()
            self._last_commit_s = now_s

    def _slide_scale(self, slide_id: str, files: Sequence[InboxFile]) -> Scale:
        """Returns the scale of a slide: the user's, the one kept for it, or a new estimate, then kept.

        A slide whose images come one by one gets its first estimate from one field, and better ones when it
        has two, four and eight; those that differ have its few fields counted again.
        """
        if self._options.scale is not None:
            return self._options.scale
        kept = self._ledger.slide_scale(slide_id)
        if kept is not None and (kept.bundle_id != self.version.bundle_id or self._options.force):
            kept = None
        if kept is not None and not _may_know_better(kept, len(files)):
            return kept.scale
        scale, recount = self._estimated(slide_id, list(files)), False
        if kept is not None:
            if _differ(kept.scale, scale):
                recount = True
                self.n_recounts += 1
            else:
                scale = kept.scale
        new = SlideScale(scale, self.version.bundle_id, len(files))
        self._ledger.keep_slide_scale(slide_id, new, recount=recount)
        self._ledger.commit()  # before any field is counted at it: a killed run goes on with the same scale
        return scale

    def _estimated(self, slide_id: str, files: list[InboxFile]) -> Scale:
        images: list[UInt8] = []
        tried: list[InboxFile] = []
        n_pixels = 0
        for file in _spread(files):
            if len(tried) == _SCALE_ATTEMPTS or len(images) == SCALE_FIELDS or n_pixels > _SCALE_PIXELS:
                break
            row = self._ledger.field(slide_id, file.fov)
            if row is not None and row.status is Status.FAILED:
                continue  # one that brought a process down is not opened for this either
            tried.append(file)
            self._ledger.begin_attempts([file])
            try:
                image = load_field(file.path, slide_id, file.fov).image
            except Exception:
                log.debug("%s: not used for the scale", path_text(file.path), exc_info=True)
                continue
            images.append(image)
            n_pixels += image.shape[0] * image.shape[1]
        try:
            return self._the_analyzer().estimate_scale(images) if images else Scale(nan, ScaleSource.NONE)
        except RbcEdgeError:
            raise
        except Exception:  # the fields are then estimated one by one, and fail one by one if they must
            log.warning("slide %s: its scale could not be estimated", slide_id)
            log.debug("slide %s", slide_id, exc_info=True)
            return Scale(nan, ScaleSource.NONE)
        finally:
            self._ledger.end_attempts(tried)

    def _the_analyzer(self) -> Analyzing:
        with self._sharing:
            if self._analyzer is None:
                self._analyzer = self._make_analyzer()
            return self._analyzer

    def _now(self) -> str:
        return self._clock.now().astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    def _settle_file(
        self, file: InboxFile, looking: Future[_Look], scale: Scale, summary: RunSummary
    ) -> FieldRow | None:
        """Brings one file into the ledger; None: it was left for later.

        Raises:
            Abandoned: From `Stop`; the ledger still says that the file is being tried.
        """
        with self._stop.image_in_hand():
            look = looking.result()
        entry = Entry(
            file, self.version, look.sha256, self._now(), look.captured_at, elapsed_ms=look.elapsed_s * 1e3
        )
        if self._may_wait is not None:
            failure = look.failure or ("changed" if _has_changed(file) else "")
            if failure and self._may_wait(file, failure):
                self._ledger.end_attempts([file])
                return None
        if look.failure:
            return self._ledger.record_failed(entry, look.failure, look.message)
        settled = self._ledger.settle(entry, force=self._options.force)
        if settled is not None:
            summary.n_unchanged += settled.status is Status.OK
            return settled
        if look.result is None:  # its content was known, but what knew it does not count any more
            self._digests.discard(look.sha256)
            with self._stop.image_in_hand():
                look = self._look(file, scale)
            entry = replace(entry, sha256=look.sha256, elapsed_ms=look.elapsed_s * 1e3)
            if look.result is None:
                return self._ledger.record_failed(entry, look.failure, look.message)
        summary.n_counted += 1
        return self._ledger.record_ok(entry, look.result)

    def _is_mine(self, sha256: str) -> bool:
        """Tells whether a content is not counted yet, and gives it to who asks first."""
        with self._sharing:
            is_new = sha256 not in self._digests
            self._digests.add(sha256)
            return is_new

    def _look(self, file: InboxFile, scale: Scale) -> _Look:
        """Reads, decodes and counts one file, in a thread of its own; touches no ledger."""
        started_s = self._clock.monotonic_s()
        look = _Look()
        try:
            # One of the large ones at a time: two of 20 megapixels are half a gigabyte.
            with self._large if _is_large(file, scale) else nullcontext():
                field_of_view = load_field(
                    file.path, file.slide_id, file.fov, cell_diameter_px=scale.cell_diameter_px
                )
                look = _Look(sha256=field_of_view.sha256, captured_at=field_of_view.captured_at)
                if self._is_mine(look.sha256):
                    look = replace(look, result=self._the_analyzer().analyze(field_of_view, scale))
        except ImageError as error:
            look = replace(look, failure=error.reason, message=str(error))
        except RbcEdgeError:
            raise
        except Exception as error:  # whatever it is, the other images are counted
            log.debug("%s", path_text(file.path), exc_info=True)
            look = replace(look, failure="error", message=_unexpected(file.path, error))
        if look.failure not in ("", "vanished", "unreadable") and not look.sha256:
            look = replace(look, sha256=_digest(file))
        return replace(look, elapsed_s=self._clock.monotonic_s() - started_s)


def _share_one_heap() -> None:
    """Has all threads of the process take memory from one heap.

    glibc gives each thread its own, and each keeps the most it ever held: 640x480 took 159, and 151 so;
    20 megapixels 331 and 308 (MiB), at the same speed.
    """
    with suppress(OSError, AttributeError):  # another C library, which has no such heaps
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _is_large(file: InboxFile, scale: Scale) -> bool:
    if file.size_bytes <= _LARGE_BYTES:
        return False
    return image_file.n_pixels(file.path, scale.cell_diameter_px) >= image_file.LARGE_PIXELS


def _digest(file: InboxFile) -> str:
    """The hex digest of a file's content; empty where it cannot be read, or only in minutes."""
    if file.size_bytes <= _HASHED_BYTES:
        with suppress(OSError), file.path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    return ""


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


def _unexpected(path: Path, error: Exception) -> str:
    return f"{path_text(path)}: could not be counted: {type(error).__name__}: {error}"


def _spread(files: list[InboxFile]) -> list[InboxFile]:
    """Orders files so that the first few lie evenly over all of them; the same files, the same order."""
    n = min(SCALE_FIELDS, len(files))
    picked = sorted({round(i * (len(files) - 1) / max(n - 1, 1)) for i in range(n)})
    rest = sorted(set(range(len(files))) - set(picked))
    return [files[i] for i in picked + rest]

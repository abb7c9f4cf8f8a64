"""``rbc-edge run``: counts once and prints what was counted."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rbc_edge.cli.console import Bar, log, log_to_stderr, print_json, print_line, print_table
from rbc_edge.cli.options import Given
from rbc_edge.cli.wiring import count_options, prepare_process
from rbc_edge.station.session import Step, Summary, count_once
from rbc_edge.station.stop import Stop
from rbc_edge.store.rows import FieldRow
from rbc_edge.text import count_text, one_line, path_text
from rbc_edge.views.tables import SlideSummary

_MAX_NAMED_SLIDES = 8  # a line each; for a hundred slides the table is better
_MAX_NAMED_FAILURES = 20
_HEADER = (
    *("slide", "fields", "failed", "red cells", "single", "overlapping", "overlap", "95 %"),
    *("white", "plt"),
)


def run(given: Given, paths: Sequence[Path], *, force: bool, adopt: bool, json_output: bool) -> int:
    """Counts the images, prints a table or JSON, and returns the exit code."""
    settings = given.load().settings
    out = settings.out_folder()
    bar = Bar(shown=not settings.quiet and not settings.verbose and sys.stderr.isatty())
    log_to_stderr(verbose=settings.verbose, quiet=settings.quiet, bar=bar)
    prepare_process()
    options = replace(count_options(settings), force=force, adopt=adopt, max_failures=settings.max_failures)
    stop, said = Stop(), set[tuple[str, str]]()

    def show(step: Step) -> None:
        _show_step(step, bar)
        if step.row is not None:
            said.add((step.row.slide_id, step.row.fov))

    with bar, stop.on_signals():
        summary = count_once(paths, options, on_step=show, stop=stop)
    _say_failed_before([row for row in summary.failed if (row.slide_id, row.fov) not in said])
    for note in summary.notes:
        log.warning("%s", one_line(note))
    if summary.troubled:
        n_left = count_text(len(summary.troubled), "image")
        log.error("%s left for later: run again with --threads 1, or when more memory is free", n_left)
    for what in summary.held:
        log.error("%s; run again then", what)
    if json_output:
        print_json(_as_json(summary, out))
    elif not settings.quiet:
        _print(summary, out)
        index = out / "reports" / "index.html"
        if settings.report and index.exists():  # else a signal, or a warning, said why not
            print_line(f"Open {path_text(index)} to look at them")
    return summary.exit_code


def _show_step(step: Step, bar: Bar) -> None:
    row = step.row
    if row is not None and row.status == "failed":
        log.warning("failed (%s): %s", row.failure, one_line(row.message))
    elif row is not None:
        message = f" ({one_line(row.message)})" if row.message else ""
        log.info("%s %s/%s%s", row.status, one_line(row.slide_id), one_line(row.fov), message)
    bar.step(step.n_done, step.n_total, one_line(f"{step.file.slide_id}/{step.file.fov}"))


def _say_failed_before(rows: Sequence[FieldRow]) -> None:
    """Names what failed in an earlier run, and has not changed since."""
    for row in rows[:_MAX_NAMED_FAILURES]:
        log.warning("failed before (%s): %s", row.failure, one_line(row.message))
    if (n := len(rows) - _MAX_NAMED_FAILURES) > 0:
        log.warning("%s more failed before (rbc-edge status)", count_text(n, "image"))


def _print(summary: Summary, out: Path) -> None:
    print_table([_HEADER, *map(_row, summary.slides)])
    for line in (*_flagged_fields(summary.slides), *_too_few_fields(summary.slides)):
        print_line(line)
    print_line(
        f"{count_text(summary.n_images, 'image')}: {summary.n_counted} counted now,"
        f" {summary.n_unchanged} counted before, {count_text(summary.n_duplicates, 'duplicate')},"
        f" {summary.n_failed} failed{f', {summary.n_excluded} excluded' if summary.n_excluded else ''}"
        f"{f', {summary.n_left} left for later' if summary.n_left else ''}."
        f" Tables in {path_text(out)}"
    )
    if summary.stopped_by is not None:
        log.warning("stopped by a signal; run the same command again to continue")
    elif summary.gave_up:
        log.warning("stopped after too many failed images (--max-failures)")


def _row(slide: SlideSummary) -> tuple[str, ...]:
    counts, interval = slide.counts, slide.overlap_interval
    share = counts.overlap_fraction if counts else None
    return (
        one_line(slide.slide_id),
        str(slide.n_fov_ok),
        str(slide.n_fov_failed),
        *(map(str, (counts.n_rbc, counts.n_rbc_single, counts.n_rbc_overlapping)) if counts else ("-",) * 3),
        "-" if share is None else f"{share:.1%}",
        "-" if interval is None else f"{interval[0]:.1%}-{interval[1]:.1%}",
        *(map(str, (counts.n_wbc, counts.n_platelets)) if counts else ("-",) * 2),
    )


def _flagged_fields(slides: Sequence[SlideSummary]) -> Iterator[str]:
    """Names the slides with flagged fields, those with the largest share first."""
    flagged = sorted((s for s in slides if s.n_fov_flagged), key=lambda s: -s.n_fov_flagged / s.n_fov_ok)
    for slide in flagged[:_MAX_NAMED_SLIDES]:
        flags = ", ".join(f"{n} {flag}" for flag, n in slide.flags.items())
        share = f"{slide.n_fov_flagged} of {count_text(slide.n_fov_ok, 'field')}"
        yield f"have a look: {one_line(slide.slide_id)}: {share} flagged: {flags}"
    if any(slide.contradicts_scale for slide in flagged):
        advice = "run without --cell-diameter and --um-per-px to have it estimated"
        yield f"the cells do not have the size that the given scale says; {advice}"
    if len(flagged) > _MAX_NAMED_SLIDES:
        more = count_text(len(flagged) - _MAX_NAMED_SLIDES, "more slide")
        yield f"have a look: {more} (--json lists all)"


def _too_few_fields(slides: Sequence[SlideSummary]) -> Iterator[str]:
    """Names the slides with too few fields for a useful share of overlapping cells."""
    few = [slide for slide in slides if slide.advice_on_fields]
    for slide in few[:_MAX_NAMED_SLIDES]:
        yield f"too few fields: {one_line(slide.slide_id)}: {slide.advice_on_fields}"
    if len(few) > _MAX_NAMED_SLIDES:
        more = count_text(len(few) - _MAX_NAMED_SLIDES, "more slide")
        yield f"too few fields: {more} (--json lists all)"


def _as_json(summary: Summary, out: Path) -> dict[str, object]:
    numbers = ("exit_code", "n_images", "n_counted", "n_unchanged", "n_duplicates", "n_failed", "n_excluded")
    return {
        "out": path_text(out),
        **{name: getattr(summary, name) for name in numbers},
        "n_copies_not_counted": summary.n_copies,
        "n_not_read": summary.not_read,
        "notes": summary.notes,
        "slides": [_slide_as_json(slide) for slide in summary.slides],
    }


def _slide_as_json(slide: SlideSummary) -> dict[str, object]:
    def values(of: object, *names: str) -> dict[str, object]:
        return {name: getattr(of, name, None) for name in names}  # null where nothing was counted

    low, high = slide.overlap_interval or (None, None)
    mean_low, mean_high = slide.n_rbc_per_fov_interval or (None, None)
    return {
        **values(slide, "slide_id", "n_fov_ok", "n_fov_failed", "n_fov_flagged"),
        "quality_flags": dict(slide.flags),
        **values(slide.counts, "n_rbc", "n_rbc_single", "n_rbc_overlapping", "overlap_fraction"),
        "overlap_low": low,
        "overlap_high": high,
        "too_few_fields": slide.too_few_fields,
        "n_fov_more_for_2_points": slide.n_fov_more,
        **values(slide.counts, "n_wbc", "n_platelets"),
        **values(slide, "n_rbc_per_fov_mean", "n_rbc_per_fov_sd"),
        "n_rbc_per_fov_low": mean_low,
        "n_rbc_per_fov_high": mean_high,
        "first_captured_at": slide.first_captured_at or None,
        "last_captured_at": slide.last_captured_at or None,
        "bundle_ids": list(slide.bundle_ids),
    }

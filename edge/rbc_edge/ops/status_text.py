"""The status of a station in words: what ``rbc-edge status`` prints."""

from rbc_edge.station.state_file import Activity, ServiceState
from rbc_edge.station.status import StationStatus
from rbc_edge.text import bytes_text, count_text, local_text, path_text, span_text


def headline(status: StationStatus) -> str:
    """Returns the status in one line."""
    failed = f"; {count_text(status.n_failed, 'image')} failed" if status.n_failed else ""
    state = status.state
    if not status.running:
        return f"not running{failed}"
    if state is None:
        return f"running, but its state cannot be read{failed}"
    why = f": {state.detail}" if state.detail else ""
    watching = f"watching {state.source}"
    if status.is_silent and status.silent_s is not None:
        span = span_text(status.silent_s)
        return f"SILENT: process {state.pid} has not reported for {span}; it may hang{failed}"
    waiting = f"; {count_text(state.n_waiting, 'image')} not finished yet" if state.n_waiting else ""
    texts = {
        Activity.SOURCE_AWAY: f"PAUSED: the source is away{why}",
        Activity.DISK_FULL: f"PAUSED: the disk is nearly full{why}",
        Activity.RESULTS_AWAY: f"PAUSED: the results cannot be written{why}",
        Activity.COUNTING: f"{watching}, counting; {count_text(state.n_to_do, 'image')} to do{failed}",
        Activity.WATCHING: f"{watching}, up to date{waiting}{failed}",
    }
    return texts.get(state.activity, f"{watching}, {state.activity}{why}{failed}")


def as_lines(status: StationStatus) -> list[str]:
    """Returns the status as lines: the headline first, then the figures."""
    lines = [("results", path_text(status.out))]
    if status.state is not None:
        lines = [*_service_lines(status.state, running=status.running), *lines]
    if status.newest_result_at:
        age_s = status.newest_result_age_s
        ago = "" if age_s is None else f", {span_text(age_s)} ago"
        lines.append(("newest result", f"{local_text(status.newest_result_at)}{ago}"))
    if (tally := status.tally) is not None:
        counted = f"{count_text(tally.n_ok, 'image')} of {count_text(tally.n_slides, 'slide')}"
        extra = f", {count_text(tally.n_duplicates, 'duplicate')}" if tally.n_duplicates else ""
        extra += f", {tally.n_excluded} excluded" if tally.n_excluded else ""
        by_reason = ", ".join(f"{n} {reason}" for reason, n in status.failure_counts.items())
        lines.append(("counted", f"{counted}{extra}"))
        if status.n_gone:
            text = f"{count_text(status.n_gone, 'counted image')} no longer in the folder; their counts stay"
            lines.append(("gone", text))
        lines.append(("failed", f"{status.n_failed}{f': {by_reason}' if by_reason else ''}"))
    else:
        lines.append(("ledger", status.ledger_problem))
    lines += [("", f"{row.slide_id}/{row.fov}: {row.message or row.failure}") for row in status.failures]
    if status.n_failed > len(status.failures):
        lines.append(("", f"and {status.n_failed - len(status.failures)} older ones"))
    lines += [("not counted", line) for line in status.not_counted]
    if status.disk_free_bytes is not None:
        lines.append(("disk", f"{bytes_text(status.disk_free_bytes)} free"))
    if status.clock_problem:
        lines.append(("clock", status.clock_problem))
    return [headline(status), *(f"  {name:14} {text}".rstrip() for name, text in lines)]


def _service_lines(state: ServiceState, *, running: bool) -> list[tuple[str, str]]:
    service = f"rbc-edge {state.version}, process {state.pid}, since {local_text(state.started_at)}"
    if not running:
        last = f"{service}; last report at {local_text(state.updated_at)}: {state.activity}"
        return [("source", state.source), ("last service", last)]
    how = f"polling: {state.polling_reason}" if state.polling else "notified by file events"
    kind = f" ({state.file_system})" if state.file_system else ""
    counted = f"{state.n_counted} counted, {state.n_failed} failed"
    return [
        ("source", f"{state.source}{kind}, {f'online, {how}' if state.source_online else 'AWAY'}"),
        ("service", service),
        ("bundle", state.bundle_id),
        ("waiting", f"{count_text(state.n_waiting, 'image')} not finished yet, {state.n_to_do} to do"),
        ("since start", f"{counted}; {state.images_per_min:.1f} images a minute lately"),
        *(("problem", problem) for problem in state.problems),
    ]

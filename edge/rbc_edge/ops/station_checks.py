"""The doctor's checks of the station: settings that contradict, bundle, camera's folder, results, service."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from rbc_edge.config import Settings
from rbc_edge.errors import BundleError, UnavailableError, UsageError
from rbc_edge.ops import status_text
from rbc_edge.ops.computer import Computer, user_name
from rbc_edge.ops.finding import Finding, Level, failed, failed_by, ok, warning
from rbc_edge.station import source as camera
from rbc_edge.station.inbox import check_pattern
from rbc_edge.station.other_files import Ignored, OtherFiles, without_copies
from rbc_edge.station.prometheus import check_metrics
from rbc_edge.station.state_file import STATE_FILE_NAME, Activity, read_state
from rbc_edge.station.status import StationStatus, status_of
from rbc_edge.store.outdir import LOCK_NAME, check_apart
from rbc_edge.store.queries import Reader
from rbc_edge.store.schema import FILE_NAME, DamagedError
from rbc_edge.text import bytes_text, count_text, local_text, path_text
from rbc_edge.vision.bundle import Bundle
from rbc_edge.vision.image_file import read_suffixes
from rbc_edge.vision.selftest import verify

_LITTLE_DISK_BYTES: Final = 1e9
_MAX_ENTRIES: Final = 200_000  # of the source: the doctor takes a quick look, not a full scan
_MAX_CHECKED_BYTES: Final = 100e6  # a larger ledger is checked by the service only, at its start
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


# -- what counts ------------------------------------------------------------------------------------------


def contradictions(settings: Settings) -> Iterator[Finding]:
    """Yields settings that are each valid but cannot work together."""
    try:
        check_pattern(settings.slide_pattern)
        if settings.source is not None and settings.out is not None:
            check_apart((settings.source,), settings.out)
        if settings.prometheus is not None:
            check_metrics(settings.prometheus)
    except UsageError as error:
        yield failed_by("settings", error)


def bundle(settings: Settings) -> Finding:
    """Opens the bundle and counts its test image."""
    try:
        opened = Bundle.open(settings.bundle)
        opened.networks(settings.precision)
        test = verify(opened, threads=settings.threads)
    except BundleError as error:
        return failed_by("bundle", error)
    found = f"finds in its test image what it should: {test.n_found} cells of {test.n_expected}"
    return ok("bundle", f"{opened.bundle_id} is intact and {found}")


# -- the camera's folder ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Tree:
    """The folders and images of the source, without opening an image."""

    n_folders: int = 0  # the source among them
    n_images: int = 0  # by their names
    n_unreadable: int = 0  # folders and images that the user may not read
    newest_s: float = 0.0  # time of last change of the newest image, seconds since 1970; 0: no image
    is_complete: bool = True  # whether the walk saw everything
    other: OtherFiles = field(default_factory=OtherFiles)

    @property
    def newest(self) -> datetime | None:
        """Time of last change of the newest image."""
        try:
            return datetime.fromtimestamp(self.newest_s, UTC) if self.newest_s else None
        except (OverflowError, ValueError, OSError):
            return datetime.max.replace(tzinfo=UTC)

    @classmethod
    def of(cls, source: Path, ignore: Sequence[str] = ()) -> Self:
        """Walks through the source. Finds nothing where it is away."""
        tree, n_entries = cls(), 0
        errors: list[OSError] = []
        ignored, suffixes, start = Ignored(ignore), read_suffixes(), len(os.path.join(source, ""))  # noqa: PTH118
        over = set[str]()  # folders that are passed over: they have watches all the same

        def is_over(path: str) -> bool:
            name = os.path.basename(path)  # noqa: PTH119
            return name.startswith(".") or ignored(name, path[start:])

        for folder, folders, names in os.walk(source, onerror=errors.append):
            tree.n_folders += 1
            n_entries += len(folders) + len(names)
            if n_entries > _MAX_ENTRIES:
                tree.is_complete = False
                break
            inner = {path: Path(path).suffix.lower() for path in (os.path.join(folder, f) for f in folders)}  # noqa: PTH118
            if folder in over or FILE_NAME in names:
                over |= inner.keys()
                continue
            over |= {p for p, s in inner.items() if is_over(p) or tree.other.add_kind(s, is_folder=True)}
            files = [path for name in names if not is_over(str(path := Path(folder, name)))]
            images = [path for path in files if path.suffix.lower() in suffixes]
            others = [
                p for p in files if p.suffix.lower() not in suffixes and tree.other.add_kind(p.suffix.lower())
            ]
            copies = without_copies(
                [(0, image.name) for image in images], [(0, path.name) for path in others]
            )
            tree.other.copies += [images[i] for i in copies]
            for image in (image for i, image in enumerate(images) if i not in copies):
                with suppress(OSError):  # gone since the listing
                    tree.newest_s = max(tree.newest_s, image.stat().st_mtime)
                    tree.n_images += 1
                    tree.n_unreadable += not os.access(image, os.R_OK)
        tree.n_folders += len(errors)
        tree.n_unreadable += len(errors)
        return tree


def source(settings: Settings, tree: Tree | None, computer: Computer) -> Iterator[Finding]:
    """Yields findings about the camera's folder, and about how new images in it are noticed."""
    if settings.source is None or tree is None:
        yield ok("source", "none is given; `rbc-edge watch` needs one")
        return
    name = path_text(settings.source)
    probe = camera.probe(settings.source, marker=settings.marker)
    if probe.missing:
        advice = "mount it, correct its permissions, or give another folder; the service waits for it"
        yield failed("source", probe.missing, advice)
        return
    images = count_text(tree.n_images, "image") if tree.is_complete else f"{tree.n_images} or more images"
    text = f"{name}: {images} in {count_text(tree.n_folders, 'folder')}"
    if tree.n_unreadable:
        user = user_name()
        text += f", and {tree.n_unreadable} files or folders that {user} may not read"
        advice = f"the camera's umask, or: setfacl -R -m u:{user}:rX -d -m u:{user}:rX {name}"
        yield warning("source", text, advice)
    else:
        yield ok("source", text)
    for remark in tree.other.remarks():
        yield warning("other files", remark.text, remark.advice).hiding(*map(str, tree.other.copies))
    if (mount := probe.mount) is None:
        yield ok("events", "the file system of the source is unknown")
    else:
        found = _events(settings, mount, tree.n_folders, computer.max_watches)
        yield found.hiding(str(mount), mount.device, mount.root, mount.point)


def _events(settings: Settings, mount: camera.Mount, n_folders: int, max_watches: int | None) -> Finding:
    scans = f"scanned every {settings.scan_every_s:g} s"
    if settings.polling:
        return ok("events", f"{mount.kind}: {scans}, as the settings say")
    if not mount.gives_events:
        if settings.polling is None:
            return ok("events", f"{mount.kind} gives none: {scans}")
        text = f"{mount.kind} does not report what other computers write, but the settings ask for events"
        return warning("events", text, "remove polling = false")
    if max_watches is None or n_folders < max_watches:
        limit = "" if max_watches is None else f" of {max_watches} that may be watched"
        return ok("events", f"{mount.kind} gives them; {n_folders} folders{limit}")
    text = f"{n_folders} folders, but the system watches only {max_watches}: {scans}"
    advice = f"sysctl fs.inotify.max_user_watches={4 * n_folders}, and in a file of /etc/sysctl.d"
    return warning("events", text, advice)


# -- the results ------------------------------------------------------------------------------------------


def results(settings: Settings, now: datetime) -> tuple[list[Finding], StationStatus | None]:
    """Returns findings about the output folder, the ledger and the service, and the station's status."""
    out = settings.out
    if out is None:
        return [ok("results", "no output folder is given (--out)")], None
    running = False
    with suppress(UnavailableError):
        running, _ = read_state(out)
    findings = [_writable(out, running=running)]
    if findings[0].level is not Level.FAILED:
        findings.append(_disk(settings, out))
    if not os.path.exists(out / FILE_NAME) and not running:  # noqa: PTH110 -- False, not an error
        return [*findings, ok("ledger", "nothing is counted there yet")], None
    try:
        status = status_of(out, now=now)
        return [*findings, _ledger(out, status), _service(status)], status
    except DamagedError as error:
        advice = "the next run, or the service at its start, keeps it aside and counts again"
        return [*findings, failed("ledger", error.message, advice)], None
    except UnavailableError as error:
        return [*findings, failed_by("ledger", error)], None


def _writable(out: Path, *, running: bool) -> Finding:
    there = _existing(out)
    try:
        status = there.stat()
    except OSError as error:
        advice = "check the permissions of the folders above it"
        return failed("results", f"{path_text(out)}: {error.strerror}", advice)
    if not stat.S_ISDIR(status.st_mode):
        return failed("results", f"{path_text(out)}: not a folder", "give another")
    return _permission(out, there, status.st_uid, running=running).hiding(user_name(status.st_uid))


def _permission(out: Path, there: Path, uid: int, *, running: bool) -> Finding:
    """Checks that the user may write, and that all files have one owner."""
    name, user, owner = path_text(out), user_name(), user_name(uid)
    if not os.access(there, os.W_OK | os.X_OK):
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            text = f"{name}: its disk is read-only"
            return failed("results", text, "mount it for writing; check the disk (dmesg)")
        text = f"{name}: {user} may not write there"
        if running:
            advice = f"a program that writes there has to run as {owner}: runuser -u {owner} -- rbc-edge ..."
            return warning("results", f"{text}, but the running service may", advice)
        return failed("results", text, f"run it as {owner}, or chown the folder")
    if not os.path.lexists(out):
        return ok("results", f"{name}: will be made")
    others = sorted({other for other in _owners(out) if other != uid})
    if others:
        other = user_name(others[0])
        text = f"{name}: belongs to {owner}, but files in it to {other}: a run by {other} made them"
        advice = f"chown -R --reference={name} {name}, while nothing is counting"
        return warning("results", text, advice).hiding(other)
    if uid != os.geteuid():
        text = f"{name}: belongs to {owner}, but {user} runs the doctor: their permissions differ"
        return warning("results", text, f"run it as {owner}: runuser -u {owner} -- rbc-edge doctor")
    return ok("results", f"{name}: may be written")


def _owners(out: Path) -> Iterator[int]:
    """Yields the owners of the ledger, its log and the locks. A writer has to write all of them."""
    for name in (FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", LOCK_NAME, STATE_FILE_NAME):
        with suppress(OSError):
            yield (out / name).stat().st_uid


def _existing(out: Path) -> Path:
    """Returns the folder, or the nearest folder above it that exists, as far as we may look."""
    there = Path(os.path.abspath(out))  # noqa: PTH100 -- resolve() needs permissions that may be missing
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    return there


def _disk(settings: Settings, out: Path) -> Finding:
    name, there = path_text(out), _existing(out)
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    text = f"{bytes_text(free)} free"
    pauses = f"the service pauses below {settings.min_free_mb:g} MB"
    no_files = bool(disk.f_files) and not disk.f_favail
    if free < settings.min_free_mb * 1e6 or no_files:
        why = ", and no room for another file" if no_files else ""
        return failed("disk", f"{text}{why}; {pauses}", "free space; the service then goes on by itself")
    mount = camera.mount_of(there)
    if mount is not None and mount.kind in _IN_MEMORY:
        text += f"; {name} lies in memory ({mount.kind}) and is lost at a restart"
        return warning("disk", text, "give an output folder on a disk")
    if mount is not None and not mount.gives_events:
        text += f"; {name} lies on a share ({mount.kind}), where the ledger's locks are not reliable"
        advice = "give an output folder on a disk of this computer, and copy the tables"
        return warning("disk", text, advice)
    if free < _LITTLE_DISK_BYTES:
        return warning("disk", f"{text}; {pauses}", "free space before that")
    return ok("disk", f"{text}{f' on {mount.kind}' if mount else ''}")


def _ledger(out: Path, status: StationStatus) -> Finding:
    tally = status.tally
    if tally is None:
        return warning("ledger", status.ledger_problem)
    text = f"{count_text(tally.n_ok, 'image')} of {count_text(tally.n_slides, 'slide')} counted"
    size = 0
    with suppress(OSError):
        size = (out / FILE_NAME).stat().st_size
    if size <= _MAX_CHECKED_BYTES:
        with Reader.open(out) as reader:
            damage = reader.damage()
        if damage:
            advice = "restart the service, or run again: it is kept aside, and the images are counted again"
            return failed("ledger", f"{text}; it is damaged: {damage}", advice)
        text += ", checked and intact"
    else:
        text += f"; {bytes_text(size)}, too large to check here: the service checks it at its start"
    if tally.n_failed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in status.failure_counts.items())
        advice = "rbc-edge status lists them; rbc-edge retry counts them again"
        return warning("ledger", f"{text}; {tally.n_failed} failed: {reasons}", advice)
    return ok("ledger", text)


def _service(status: StationStatus) -> Finding:
    state = status.state
    headline = status_text.headline(status)
    if state is None:
        return ok("service", headline if status.running else "none has worked on these results")
    if not status.running:
        text = f"not running; last report at {local_text(state.updated_at)}: {state.activity}"
        if state.activity is Activity.STOPPING:
            return ok("service", text)
        advice = "if it should run: systemctl status rbc-edge, systemctl start rbc-edge"
        return warning("service", text, advice)
    finding, problems = ok("service", headline), state.problems
    if status.is_silent or state.activity.is_paused:
        finding = failed("service", headline, "rbc-edge status and journalctl -u rbc-edge say more")
    elif problems:
        text = f"{headline}; {count_text(len(problems), 'problem')}, the first: {problems[0]}"
        finding = warning("service", text, "rbc-edge status lists all")
    return finding.hiding(state.source, state.detail, *problems)

"""The camera's folder as a place: whether it is there, on what file system, and what happens in it.

A share that is not mounted looks like an empty folder. It is told by its mount, or by a marker file in it.
Events of the file system only wake the service: they overflow, and shares send none. The scan is the truth.
"""

import logging
import os
import queue
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rbc_edge.store.ledger import Ledger
from rbc_edge.store.queries import Reader
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

_SOURCE_NOTE: Final = "source"
_MOUNTS: Final = Path("/proc/self/mountinfo")
# What others write there the kernel does not tell us.
_WITHOUT_EVENTS: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4"}
    | {"ocfs2", "prl_fs", "smb", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs"}
)


@dataclass(frozen=True, slots=True)
class Mount:
    """What a folder lies on (proc(5), mountinfo)."""

    point: str  # where it is mounted
    root: str  # what of the file system is mounted there
    kind: str  # type of the file system, for example ``ext4``, ``cifs``
    device: str  # what is mounted, for example ``/dev/sda1``, ``//camera/images``

    @property
    def gives_events(self) -> bool:
        """Tells whether the kernel sees every change there."""
        return self.kind not in _WITHOUT_EVENTS and not self.kind.startswith("fuse")

    def __str__(self) -> str:
        return f"{self.kind} {self.device}{'' if self.root == '/' else self.root} on {self.point}"


def mount_of(path: Path, *, mounts: Path = _MOUNTS) -> Mount | None:
    """Returns what a path lies on, links followed; None where the system does not say."""
    try:
        lines = os.fsdecode(mounts.read_bytes()).splitlines()
    except OSError:
        return None
    real = Path(os.path.realpath(path))
    found: Mount | None = None
    for line in lines:
        left, _, right = line.partition(" - ")
        try:
            _, _, _, root, point, *_ = left.split(" ")
            kind, device, *_ = right.split(" ")
        except ValueError:
            continue
        mount = Mount(_unescaped(point), _unescaped(root), kind, _unescaped(device))
        # The longest point, and of several on one point the last, lies on top.
        if real.is_relative_to(mount.point) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a look at the camera's folder found."""

    missing: str  # why it is certainly not there, in words; empty when it may be
    mount: Mount | None = None  # what it lies on; None where the system does not say
    identity: tuple[int, int] = (0, 0)  # device and number of the folder; another one needs new watches


def probe(folder: Path, *, marker: str | None = None) -> Probe:
    """Finds out whether the camera's folder is there. A file `marker` lies in the right one."""
    name = path_text(folder)
    try:
        with os.scandir(folder) as listing:
            next(listing, None)  # a share that hangs on a broken wire answers stat from memory
        status = folder.stat()
        if marker is not None and not (folder / marker).exists():
            return Probe(f"{name}: the marker {marker} is not there: is the share mounted?")
    except OSError as error:
        return Probe(f"{name}: {(error.strerror or 'cannot be read').lower()}")
    return Probe("", mount_of(folder), (status.st_dev, status.st_ino))


class WakeEvent:
    """What wakes the service: closed files, other changes, signals.

    It may be set from any thread and from a signal handler.
    """

    def __init__(self) -> None:
        # Not an Event: a signal handler that sets one may find its lock held by the code it interrupted.
        self._wakes: queue.SimpleQueue[Path | None] = queue.SimpleQueue()

    def wake(self, closed: Path | None = None) -> None:
        """Wakes the waiting service. `closed` is a file that its writer has closed."""
        self._wakes.put(closed)

    def wait(self, time_s: float) -> set[Path] | None:
        """Waits until it wakes; returns the files closed since the last call, or None: the time is over."""
        try:
            wakes = [self._wakes.get(timeout=max(time_s, 0.0))]
            while not self._wakes.empty():
                wakes.append(self._wakes.get_nowait())
        except queue.Empty:
            return None
        return {wake for wake in wakes if wake is not None}


class Events:
    """Wakes the service when something happens in the camera's folder (inotify, by watchdog).

    `wake` is called from another thread, with a file that was closed or moved in, or None.
    """

    def __init__(self, wake: Callable[[Path | None], None]) -> None:
        self._wake = wake
        self._observer: Any = None

    def start(self, folder: Path) -> str:
        """Watches a folder and all below it; returns why it cannot, in words, or nothing."""
        # Here, because a station that polls needs none of it.
        from watchdog import events  # noqa: PLC0415
        from watchdog.observers import Observer  # noqa: PLC0415

        wake = self._wake

        class Handler(events.FileSystemEventHandler):  # type: ignore[misc]
            def on_any_event(self, event: Any) -> None:
                if event.is_directory:
                    wake(None)
                elif isinstance(event, events.FileMovedEvent):
                    wake(Path(os.fsdecode(event.dest_path)))
                else:
                    wake(Path(os.fsdecode(event.src_path)) if event.event_type == "closed" else None)

        kinds = [
            *(events.FileCreatedEvent, events.FileClosedEvent, events.FileMovedEvent),
            *(events.DirCreatedEvent, events.DirMovedEvent),
        ]
        observer = Observer()
        try:
            observer.schedule(Handler(), str(folder), recursive=True, event_filter=kinds)
            observer.start()
        except OSError as error:
            return f"cannot watch: {error.strerror or error} (fs.inotify limits?)"
        self._observer = observer
        return ""

    @property
    def are_on(self) -> bool:
        """Whether events arrive."""
        observer = self._observer
        return observer is not None and all(t.is_alive() for t in (observer, *observer.emitters))

    def stop(self) -> None:
        """Ends the watching and its threads."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join(timeout=5)


class SourceWatcher:
    """Follows the camera's folder: its events, and where its images came from.

    With `polling`, it does without events. None: as the file system needs it. `scan_every_s` is for the log.
    """

    def __init__(
        self, folder: Path, wake: Callable[[Path | None], None], *, polling: bool | None, scan_every_s: float
    ) -> None:
        self._folder = folder
        self._events = Events(wake)
        self._asked = polling
        self._scan_every_s = scan_every_s
        self._identity: tuple[int, int] | None = None
        self.polling = False
        self.polling_reason = ""

    def listen(self, found: Probe) -> None:
        """Has the file system wake the service, where it can; again when the folder is another one."""
        if self._identity == found.identity and (self.polling or self._events.are_on):
            return
        polling, reason = bool(self._asked), "as the settings say"
        if self._asked is None and found.mount is not None and not found.mount.gives_events:
            polling, reason = True, f"{found.mount.kind} gives no events of what others write"
        self._events.stop()
        if not polling:
            reason = self._events.start(self._folder)
            polling = bool(reason)
        self._identity, self.polling, self.polling_reason = found.identity, polling, reason if polling else ""
        where = found.mount or "an unknown file system"
        how = f"polling every {self._scan_every_s:g} s: {reason}" if polling else "woken by its events"
        log.info("%s lies on %s; %s", path_text(self._folder), where, how)

    def stop(self) -> None:
        """Ends the events and their threads."""
        self._events.stop()
        self._identity = None

    def keep_mount(self, ledger: Ledger, found: Probe) -> None:
        """Has the ledger remember where images came from."""
        if found.mount is not None:
            ledger.keep_note(_SOURCE_NOTE, f"{path_text(self._folder)}\n{found.mount}")

    def missing_mount(self, reader: Reader, found: Probe) -> str:
        """Returns, in words, that an empty folder is empty because a share is not mounted there."""
        source, _, before = reader.note(_SOURCE_NOTE).partition("\n")
        if source != path_text(self._folder) or not before or before == str(found.mount):
            return ""
        return f"{source}: it is empty and lies on {found.mount}, and images came from {before}"

"""The camera's folder as a place: whether it is there, on what file system, and what happens in it.

A share that is not mounted looks like an empty folder. It is known by its mount, or by a file in it. Events
of the file system only wake the service up: they overflow, and shares send none. The scan is the truth.
"""

import logging
import os
import queue
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rbc_edge.text import path_text

log = logging.getLogger(__name__)

_MOUNTS: Final = Path("/proc/self/mountinfo")
# What others write there the kernel does not tell us.
_WITHOUT_EVENTS: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4"}
    | {"ocfs2", "prl_fs", "smb", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs"}
)


@dataclass(frozen=True, slots=True)
class Mount:
    """What a folder lies on (proc(5), mountinfo).

    Attributes:
        point: Where it is mounted.
        root: What of the file system is mounted there.
        kind: Type of the file system, for example ``ext4``, ``cifs``.
        device: What is mounted, for example ``/dev/sda1``, ``//camera/images``.
    """

    point: str
    root: str
    kind: str
    device: str

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
class Sight:
    """One look at the camera's folder.

    Attributes:
        missing: Why it is certainly not there, in words; empty when it may be.
        mount: What it lies on; None where the system does not say.
        identity: Device and number of the folder; another one needs new watches.
    """

    missing: str
    mount: Mount | None = None
    identity: tuple[int, int] = (0, 0)


def look(folder: Path, *, marker: str | None = None) -> Sight:
    """Looks whether the camera's folder is there.

    Args:
        folder: The folder.
        marker: Name of a file that lies in it as long as it is the right one; None: none was agreed on.
    """
    name = path_text(folder)
    try:
        with os.scandir(folder) as listing:
            next(listing, None)  # a share that hangs on a broken wire answers stat from memory
        status = folder.stat()
        if marker is not None and not (folder / marker).exists():
            return Sight(f"{name}: the marker {marker} is not there: is the share mounted?")
    except OSError as error:
        return Sight(f"{name}: {(error.strerror or 'cannot be read').lower()}")
    return Sight("", mount_of(folder), (status.st_dev, status.st_ino))


class Doorbell:
    """What wakes the service: closed files, other changes, signals.

    It may be rung from any thread and from a signal handler.
    """

    def __init__(self) -> None:
        # Not an Event: a signal handler that sets one may find its lock held by the code it interrupted.
        self._rings: queue.SimpleQueue[Path | None] = queue.SimpleQueue()

    def ring(self, closed: Path | None = None) -> None:
        """Wakes the waiting one; `closed` is a file whose writer has closed it."""
        self._rings.put(closed)

    def wait(self, time_s: float) -> set[Path] | None:
        """Waits until it rings; returns the files closed since the last call, or None: the time is over."""
        try:
            rings = [self._rings.get(timeout=max(time_s, 0.0))]
            while not self._rings.empty():
                rings.append(self._rings.get_nowait())
        except queue.Empty:
            return None
        return {ring for ring in rings if ring is not None}


class Events:
    """Rings the doorbell when something happens in the camera's folder (inotify, by watchdog).

    Args:
        ring: Called from another thread, with a file that was closed or moved in, or None.
    """

    def __init__(self, ring: Callable[[Path | None], None]) -> None:
        self._ring = ring
        self._observer: Any = None

    def start(self, folder: Path) -> str:
        """Watches a folder and all below it; returns why it cannot, in words, or nothing."""
        self.stop()
        # Here, because a station that polls needs none of it.
        from watchdog import events  # noqa: PLC0415
        from watchdog.observers import Observer  # noqa: PLC0415

        ring = self._ring

        class Handler(events.FileSystemEventHandler):  # type: ignore[misc]
            def on_any_event(self, event: Any) -> None:
                if event.is_directory:
                    ring(None)
                elif isinstance(event, events.FileMovedEvent):
                    ring(Path(os.fsdecode(event.dest_path)))
                else:
                    ring(Path(os.fsdecode(event.src_path)) if event.event_type == "closed" else None)

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
        """Tells whether anybody is listening."""
        observer = self._observer
        return (
            observer is not None
            and observer.is_alive()
            and all(emitter.is_alive() for emitter in observer.emitters)
        )

    def stop(self) -> None:
        """Ends the watching and its threads."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join(timeout=5)

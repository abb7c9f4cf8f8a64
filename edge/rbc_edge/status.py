"""How the station is: what the service last said of itself, what the ledger holds, and both in plain words.

The service writes its state into one file of the output folder, the page, and holds a lock on it for its
life. So a reader needs no connection to it, and a dead service cannot pass for a living one.
"""

import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from rbc_edge.errors import UnavailableError
from rbc_edge.inbox import path_text

log = logging.getLogger(__name__)

PAGE_NAME: Final = ".rbc-edge.service"
PAGE_BYTES: Final = 8192
MOST_PROBLEMS: Final = 20

_IDLE_WRITE_S: Final = 20.0
"""How often a state that only grew older is written: each write wears a memory card."""

_LOCK_TRIES, _LOCK_PAUSE_S = 15, 0.02  # a reader holds the lock for microseconds
_READ_TRIES, _READ_PAUSE_S = 10, 0.005


class Activity(StrEnum):
    """What the service is doing. The words are for people, and stable for machines."""

    STARTING = "starting"
    WATCHING = "up to date"
    COUNTING = "counting"
    SOURCE_AWAY = "source away"
    DISK_FULL = "paused: disk nearly full"
    RESULTS_AWAY = "paused: results cannot be written"
    ANOTHER_WRITER = "waiting for another rbc-edge"
    STOPPING = "stopping"
    UNKNOWN = "unknown"  # the word of a version newer than this one

    @property
    def is_paused(self) -> bool:
        """Whether nothing is counted until somebody, or something, mends it."""
        return self in (Activity.SOURCE_AWAY, Activity.DISK_FULL, Activity.RESULTS_AWAY)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What the service says of itself. Times are ISO 8601, UTC; empty: never.

    Attributes:
        pid: Its process.
        version: Its version of rbc-edge.
        started_at: When it started.
        activity: What it does.
        detail: Why, in words; may be empty.
        source: The folder it watches.
        source_online: Whether that folder is there.
        file_system: Type of its file system, e.g. ``ext4``.
        polling: Whether changes are found by scanning alone, without events.
        polling_reason: Why.
        last_image_at: When an image was last settled.
        last_image_monotonic_s: The same on the monotonic clock; 0: never, or not said.
        n_waiting: Images seen that have not settled or are not whole yet.
        n_to_do: Images that have settled and are not counted yet.
        n_counted: Images counted since the start.
        n_failed: Images that failed since the start.
        images_per_min: Images settled a minute, over the last five minutes.
        problems: What somebody should look at: clashing names, folders that cannot be read; at most 20.
        bundle_id: The bundle it counts with.
        scanned_at: When the source was last scanned.
        scan_ms: How long that took.
        updated_at: When this was written.
        updated_monotonic_s: The same on the monotonic clock, which no setting of the clock moves.
        boot_id: The start of the computer that the monotonic times belong to (`boot_id`).
    """

    pid: int = 0
    version: str = ""
    started_at: str = ""
    activity: Activity = Activity.STARTING
    detail: str = ""
    source: str = ""
    source_online: bool = False
    file_system: str = ""
    polling: bool = False
    polling_reason: str = ""
    last_image_at: str = ""
    last_image_monotonic_s: float = 0.0
    n_waiting: int = 0
    n_to_do: int = 0
    n_counted: int = 0
    n_failed: int = 0
    images_per_min: float = 0.0
    problems: tuple[str, ...] = ()
    bundle_id: str = ""
    scanned_at: str = ""
    scan_ms: float = 0.0
    updated_at: str = ""
    updated_monotonic_s: float = 0.0
    boot_id: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        return asdict(self) | {"activity": str(self.activity), "problems": list(self.problems)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Makes a state of what `as_json` gave, be it in another version's words.

        Keys that this version does not know, and values of another kind than it expects, are passed over.
        """
        known: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            match field.default:
                case Activity():
                    words = [str(a) for a in Activity]
                    known[field.name] = Activity(value) if value in words else Activity.UNKNOWN
                case tuple() if isinstance(value, list):
                    known[field.name] = tuple(map(str, value))
                case bool() | int() | str() if type(value) is type(field.default):
                    known[field.name] = value
                case float() if isinstance(value, float) or type(value) is int:
                    known[field.name] = float(value)
        return cls(**known)


def boot_id() -> str:
    """Returns what tells this start of the computer from every other; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


# -- the page ---------------------------------------------------------------------------------------------


class Page:
    """The service's hold on an output folder, and its state in words for whoever asks.

    The state is written in place, into room that was taken at the start: that works on a full disk, leaves
    no half file behind, and costs no rename. It is not forced to the disk; after a power cut there is no
    service to speak of.
    """

    def __init__(self, out: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Takes hold of an output folder for one service.

        Args:
            out: The output folder; must exist.
            sleep: Tests give their own.

        Raises:
            UnavailableError: Another service works on the folder, or it cannot be written.
        """
        self._out = out
        self._path = out / PAGE_NAME
        self._written: ServiceState | None = None
        try:
            self._descriptor = self._opened()
        except OSError as error:
            raise UnavailableError(
                f"{path_text(out)}: cannot write: {error.strerror}", "check permissions and free space"
            ) from error
        for _ in range(_LOCK_TRIES):
            if _locked(self._descriptor, out):
                return
            sleep(_LOCK_PAUSE_S)
        state = _read(self._descriptor, sleep)
        os.close(self._descriptor)
        who = f" (process {state.pid}, since {state.started_at})" if state else ""
        raise UnavailableError(
            f"another rbc-edge watch{who} works on {path_text(out)}",
            "stop it, or choose another output folder",
        )

    def write(self, state: ServiceState) -> None:
        """Writes the state; never raises, for the counting goes on where the page cannot be written."""
        if not self._is_news(state):
            return
        try:
            self._keep_hold()
            _take_room(self._descriptor)
            os.pwrite(self._descriptor, _packed(state), 0)
            self._written = state
        except OSError as error:
            log.debug("%s: cannot write the state: %s", path_text(self._path), error.strerror)

    def close(self) -> None:
        """Lets go; the last words stay."""
        os.close(self._descriptor)

    def _opened(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _is_news(self, state: ServiceState) -> bool:
        before = self._written
        if before is None or state.updated_monotonic_s - before.updated_monotonic_s >= _IDLE_WRITE_S:
            return True
        return state != replace(
            before,
            scanned_at=state.scanned_at,
            scan_ms=state.scan_ms,
            updated_at=state.updated_at,
            updated_monotonic_s=state.updated_monotonic_s,
        )

    def _keep_hold(self) -> None:
        """Takes hold again where somebody cleared the folder, or mounted it again, under our feet."""
        ours = os.fstat(self._descriptor)
        with suppress(OSError):  # the folder is away: the old page is as good as any
            with suppress(FileNotFoundError):
                there = self._path.stat()
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    return
            descriptor = self._opened()
            if _locked(descriptor, self._out):
                os.close(self._descriptor)
                self._descriptor = descriptor
            else:
                os.close(descriptor)


def read_page(out: Path, *, sleep: Callable[[float], None] = time.sleep) -> tuple[bool, ServiceState | None]:
    """Asks after the service of an output folder, without disturbing it.

    Args:
        out: The output folder.
        sleep: Tests give their own.

    Returns:
        Whether a service is running, and its last words; None when there are none.

    Raises:
        UnavailableError: The page is there and cannot be read.
    """
    try:
        descriptor = os.open(out / PAGE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False, None
    except OSError as error:
        raise UnavailableError(
            f"{path_text(out / PAGE_NAME)}: cannot be read: {error.strerror}",
            "ask as the service's user, or as a member of its group",
        ) from error
    try:
        state = _read(descriptor, sleep)
        try:
            # Shared, so that readers do not meet each other; a service that starts now tries again.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            running = False
        except BlockingIOError:
            running = True
        except OSError:  # no locks on this file system: by the process's number, which is nearly as good
            running = state is not None and state.boot_id == boot_id() and Path(f"/proc/{state.pid}").exists()
    finally:
        os.close(descriptor)
    return running, state


def _locked(descriptor: int, out: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks; one service is then the user's care
        log.warning("%s: cannot lock the output folder: %s", path_text(out), error.strerror)
    return True


def _take_room(descriptor: int) -> None:
    """Makes the page its full length, once; a disk that has no room now may have it later."""
    if os.fstat(descriptor).st_size == PAGE_BYTES:
        return
    os.ftruncate(descriptor, PAGE_BYTES)
    with suppress(OSError):  # no such thing on this file system: the write takes the room
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)


def _packed(state: ServiceState) -> bytes:
    """Returns exactly `PAGE_BYTES` of JSON with a checksum; a long state loses words, never its numbers."""
    state = replace(state, problems=tuple(state.problems[:MOST_PROBLEMS]))
    while len(packed := _framed(state.as_json())) > PAGE_BYTES:
        if state.problems:
            state = replace(state, problems=state.problems[:-1])
            continue
        texts = {f.name: v for f in fields(state) if type(v := getattr(state, f.name)) is str}
        longest = max(texts, key=lambda name: len(texts[name]))
        shorter: dict[str, Any] = {longest: texts[longest][: len(texts[longest]) // 2]}
        state = replace(state, **shorter)
    return packed.ljust(PAGE_BYTES - 1) + b"\n" if len(packed) < PAGE_BYTES else packed


def _framed(values: dict[str, Any]) -> bytes:
    return b'{"crc32": %d, "state": %s}' % (_checksum(values), _dumped(values))


def _dumped(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode("ascii")


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(_dumped(values))


def _read(descriptor: int, sleep: Callable[[float], None]) -> ServiceState | None:
    """Reads the page; again when it was caught half written."""
    for _ in range(_READ_TRIES):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            page = json.loads(os.pread(descriptor, 2 * PAGE_BYTES, 0))
            if page["crc32"] == _checksum(page["state"]):
                return ServiceState.from_json(page["state"])
        sleep(_READ_PAUSE_S)
    return None

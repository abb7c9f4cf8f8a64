"""The state file: what the service last said of itself, and whether it is running.

The service writes its state into one file of the output folder. It holds a lock on that file as long as it
lives. A reader needs no connection to the service, and a dead service cannot look like a running one.
"""

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

from rbc_edge.errors import UnavailableError, unavailable
from rbc_edge.store.outdir import is_locked, lock, open_lock_file
from rbc_edge.store.schema import is_gone
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

STATE_FILE_NAME: Final = ".rbc-edge.service"
STATE_FILE_BYTES: Final = 8192
MAX_PROBLEMS: Final = 20

_IDLE_WRITE_S: Final = 20.0  # when only the times have changed: each write wears a memory card
_LOCK_TRIES, _LOCK_PAUSE_S = 15, 0.02  # a reader holds the lock for microseconds
_READ_TRIES, _READ_PAUSE_S = 10, 0.005


class Activity(StrEnum):
    """What the service is doing. The words are for people, and stable for programs."""

    STARTING = "starting"
    WATCHING = "up to date"
    COUNTING = "counting"
    SOURCE_AWAY = "source away"
    DISK_FULL = "paused: disk nearly full"
    RESULTS_AWAY = "paused: results cannot be written"
    ANOTHER_WRITER = "waiting for another rbc-edge"
    STOPPING = "stopping"
    UNKNOWN = "unknown"  # a word of a newer version

    @property
    def is_paused(self) -> bool:
        """Whether nothing is counted until the cause is gone."""
        return self in (Activity.SOURCE_AWAY, Activity.DISK_FULL, Activity.RESULTS_AWAY)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What the service says of itself. Times are ISO 8601, UTC. An empty time means never."""

    pid: int = 0
    version: str = ""  # of rbc-edge
    started_at: str = ""
    activity: Activity = Activity.STARTING
    detail: str = ""  # why, in words; may be empty
    source: str = ""  # the folder that it watches
    source_online: bool = False  # whether that folder is there
    file_system: str = ""  # its type, for example ``ext4``
    polling: bool = False  # whether changes are found by scanning alone, without events
    polling_reason: str = ""
    last_image_at: str = ""  # when an image was last recorded
    last_image_monotonic_s: float = 0.0  # the same on the monotonic clock; 0: never, or not known
    n_waiting: int = 0  # images that are not finished yet
    n_to_do: int = 0  # images that are finished and not counted yet
    n_counted: int = 0  # since the start
    n_failed: int = 0  # since the start
    images_per_min: float = 0.0  # recorded, over the last five minutes
    problems: tuple[str, ...] = ()  # clashing names, unreadable folders; at most `MAX_PROBLEMS`
    not_counted: tuple[str, ...] = ()  # what lies in the source besides images, a line each
    bundle_id: str = ""  # the bundle that it counts with
    scanned_at: str = ""  # when the source was last scanned
    scan_ms: float = 0.0  # how long that took
    updated_at: str = ""  # when this was written
    updated_monotonic_s: float = 0.0  # the same on the monotonic clock, which does not change with the clock
    boot_id: str = ""  # the start of the computer that the monotonic times belong to (`boot_id`)

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        lists = {"problems": list(self.problems), "not_counted": list(self.not_counted)}
        return asdict(self) | {"activity": str(self.activity), **lists}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Makes a state from the values of `as_json`, also of another version.

        Unknown keys, and values of an unexpected type, are ignored.
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
    """Returns the identity of this start of the computer. Empty where the system does not know it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


class StateFile:
    """Makes a process the one service of an output folder, and shows its state to readers.

    The state is written in place, into disk space that is reserved at the start. So it can be written on a
    full disk, leaves no half file behind, and needs no rename. It is not forced to the disk, because after a
    power cut there is no service. Raises `UnavailableError` where another service works on the folder, or it
    cannot be written.
    """

    def __init__(self, out: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._out = out
        self._path = out / STATE_FILE_NAME
        self._written: ServiceState | None = None
        self._descriptor = open_lock_file(self._path)
        for _ in range(_LOCK_TRIES):
            if lock(self._descriptor, out):
                return
            sleep(_LOCK_PAUSE_S)
        state = _read(self._descriptor, sleep)
        os.close(self._descriptor)
        who = f" (process {state.pid}, since {state.started_at})" if state else ""
        what = f"another rbc-edge watch{who} works on {path_text(out)}"
        raise UnavailableError(what, "stop it, or choose another output folder")

    def write(self, state: ServiceState) -> None:
        """Writes the state. Never raises: counting goes on where the state cannot be written."""
        if not self._is_news(state):
            return
        try:
            self._keep_lock()
            _reserve_space(self._descriptor)
            os.pwrite(self._descriptor, _packed(state), 0)
            self._written = state
        except OSError as error:
            log.debug("%s: cannot write the state: %s", path_text(self._path), error.strerror)

    def close(self) -> None:
        """Releases the lock. The last state stays readable."""
        os.close(self._descriptor)

    def _is_news(self, state: ServiceState) -> bool:
        before = self._written
        if before is None or state.updated_monotonic_s - before.updated_monotonic_s >= _IDLE_WRITE_S:
            return True
        times = {n: getattr(state, n) for n in ("scanned_at", "scan_ms", "updated_at", "updated_monotonic_s")}
        return state != replace(before, **times)

    def _keep_lock(self) -> None:
        """Makes and locks the file again after the folder was emptied, or mounted again, during the run."""
        ours = os.fstat(self._descriptor)
        with suppress(OSError, UnavailableError):  # the folder is away: the old file still takes the state
            with suppress(FileNotFoundError):
                there = self._path.stat()
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    return
            descriptor = open_lock_file(self._path)
            if lock(descriptor, self._out):
                self._descriptor, descriptor = descriptor, self._descriptor
            os.close(descriptor)


def read_state(out: Path, *, sleep: Callable[[float], None] = time.sleep) -> tuple[bool, ServiceState | None]:
    """Reads the state of the service of an output folder, without disturbing the service.

    Returns whether a service is running, and its last state. None: there is none that can be read. Raises
    `UnavailableError` where the file is there and may not be read.
    """
    path, advice = out / STATE_FILE_NAME, "ask as the service's user, or as a member of its group"
    if is_gone(path):
        return False, None
    with unavailable(f"{path_text(path)}: cannot be read", advice):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = _read(descriptor, sleep)
        running = is_locked(descriptor)
        if running is None:  # no locks on this file system: the process number is the next best sign
            running = state is not None and state.boot_id == boot_id() and Path(f"/proc/{state.pid}").exists()
    finally:
        os.close(descriptor)
    return running, state


def _reserve_space(descriptor: int) -> None:
    """Gives the file its full length once. A disk that has no space now may have it later."""
    if os.fstat(descriptor).st_size == STATE_FILE_BYTES:
        return
    os.ftruncate(descriptor, STATE_FILE_BYTES)
    with suppress(OSError):  # not supported by this file system: the write takes the space
        os.posix_fallocate(descriptor, 0, STATE_FILE_BYTES)


def _packed(state: ServiceState) -> bytes:
    """Returns exactly `STATE_FILE_BYTES` of JSON with a checksum. A long state loses text, never numbers."""
    state = replace(state, problems=tuple(state.problems[:MAX_PROBLEMS]))
    while len(packed := _framed(state.as_json())) > STATE_FILE_BYTES:
        if state.problems:
            state = replace(state, problems=state.problems[:-1])
            continue
        if state.not_counted:
            state = replace(state, not_counted=state.not_counted[:-1])
            continue
        texts = {f.name: v for f in fields(state) if type(v := getattr(state, f.name)) is str}
        longest, text = max(texts.items(), key=lambda item: len(item[1]))
        shorter: dict[str, Any] = {longest: text[: len(text) // 2]}
        state = replace(state, **shorter)
    return packed.ljust(STATE_FILE_BYTES - 1) + b"\n" if len(packed) < STATE_FILE_BYTES else packed


def _framed(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode("ascii")
    return b'{"crc32": %d, "state": %s}' % (zlib.crc32(text), text)


def _read(descriptor: int, sleep: Callable[[float], None]) -> ServiceState | None:
    """Reads the state, and again when it was read in the middle of a write."""
    for _ in range(_READ_TRIES):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            content = json.loads(os.pread(descriptor, 2 * STATE_FILE_BYTES, 0))
            if content["crc32"] == zlib.crc32(json.dumps(content["state"]).encode("ascii")):
                return ServiceState.from_json(content["state"])
        sleep(_READ_PAUSE_S)
    return None

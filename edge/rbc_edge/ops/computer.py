"""The computer as Linux describes it: processor, memory, limits, clock, user."""

import ctypes
import os
import platform
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised


@dataclass(frozen=True, slots=True, kw_only=True)
class Computer:
    """What the system knows of the computer. None: unknown."""

    machine: str  # architecture, e.g. ``x86_64``, ``aarch64``
    model: str  # name of the processor or the board; may be empty
    flags: frozenset[str]  # names of the processor's extensions, as Linux calls them
    n_cores: int
    n_usable: int  # cores that this process may use (affinity)
    quota_cores: float | None  # limit of a control group, in cores
    available_bytes: int | None  # memory that is free without swapping
    memory_bytes: int | None  # memory of the computer
    memory_limit_bytes: int | None  # limit of a control group for the memory of this process
    accounts_memory: bool | None  # whether control groups can limit memory at all
    max_watches: int | None  # number of folders that the system watches for one user (inotify)
    is_synchronised: bool | None  # whether a time server sets the clock

    @classmethod
    def here(cls, root: Path = Path("/")) -> Self:
        """Reads it from Linux: proc(5), cgroups(7), inotify(7), adjtimex(2). Tests replace the `root`."""
        # flags and model name: x86. Features and Model: ARM.
        processor = dict(re.findall(r"^(\w[\w ]*?)\s*:[ \t]*(.*)$", _read(root / "proc/cpuinfo"), re.M))
        sizes = re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.M)
        memory = {name: int(kilobytes) * 1024 for name, kilobytes in sizes}
        controllers = _read(root / "sys/fs/cgroup/cgroup.controllers").split()
        n_cores = os.cpu_count() or 1
        return cls(
            machine=platform.machine(),
            model=(processor.get("Model") or processor.get("model name", "")).strip(),
            flags=frozenset((processor.get("flags") or processor.get("Features", "")).split()),
            n_cores=n_cores,
            n_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cores,
            quota_cores=min(_quotas(root), default=None),
            available_bytes=memory.get("MemAvailable"),
            memory_bytes=memory.get("MemTotal"),
            memory_limit_bytes=min(_memory_limits(root), default=None),
            accounts_memory="memory" in controllers if controllers else None,
            max_watches=_whole_number(_read(root / "proc/sys/fs/inotify/max_user_watches")),
            is_synchronised=_is_synchronised(),
        )

    @property
    def usable_cores(self) -> int:
        """Cores on which threads can run at the same time, at least 1."""
        quota = self.n_usable if self.quota_cores is None else max(round(self.quota_cores), 1)
        return max(min(self.n_usable, quota), 1)


def user_name(uid: int | None = None) -> str:
    """Returns the name of a user, by default of the one who runs this process."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # in a container: a number without a name
        return str(uid)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _whole_number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _control_groups(root: Path) -> Iterator[Path]:
    """Yields the folders of this process's control group and of those above it (cgroups(7), version 2)."""
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.M)
    if own is None:
        return
    folder = Path(own[1].strip("/"))
    yield from (root / "sys/fs/cgroup" / name for name in dict.fromkeys((folder, *folder.parents)))


def _quotas(root: Path) -> Iterator[float]:
    for folder in _control_groups(root):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    limits = (_whole_number(_read(folder / "memory.max")) for folder in _control_groups(root))
    return (limit for limit in limits if limit is not None)


def _is_synchronised() -> bool | None:
    """Whether a time server sets the clock. With modes 0, adjtimex(2) only reads."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR

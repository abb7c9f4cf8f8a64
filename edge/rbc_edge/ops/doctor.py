"""What may keep a station from counting, looked for before it does: each finding with what to do about it.

Nothing is written, nothing is mended, and the service is not disturbed. The heavy modules are imported where
they are asked for, because a broken installation is one of the things to be found.
"""
# ruff: noqa: PLC0415  see above

import ctypes
import os
import platform
import pwd
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from rbc_edge import __version__
from rbc_edge.config import Loaded, Settings, load
from rbc_edge.errors import BundleError, ExitCode, RbcEdgeError, UnavailableError, UsageError

if TYPE_CHECKING:
    from rbc_edge.station.source import Mount
    from rbc_edge.station.status import StationStatus

_PACKAGES: Final = ("numpy", "opencv-python-headless", "onnxruntime", "pillow", "watchdog", "typer")
_LEAST_MEMORY_BYTES: Final = 300e6  # docs/operations.md, "Limits": an image of 5 megapixels
_LITTLE_DISK_BYTES: Final = 1e9
_MOST_ENTRIES: Final = 200_000  # of the source: a look, not a scan
_READ_THROUGH_BYTES: Final = 100e6  # a larger ledger is read through by the service alone, when it starts
_EARLIEST_YEAR, _LATEST_YEAR = 2026, 2100  # no image is older than the program that counts it
_CLOCK_SLACK: Final = timedelta(minutes=1)
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
_PASSING: Final = frozenset({"tmpfs", "ramfs"})


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # it counts, but somebody should look
    FAILED = "failed"  # it does not count, or not for long


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What was looked at, in a word or two; stable.
        level: How bad it is.
        text: What was found.
        advice: What to do about it; empty where nothing is to be done.
        exit_code: What the process leaves with when this failed.
        private: Parts of text and advice that are nobody else's business: names and paths.
    """

    what: str
    level: Level
    text: str
    advice: str = ""
    exit_code: ExitCode = ExitCode.OK
    private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was looked at.

    Attributes:
        findings: In the order of looking.
        loaded: The settings in force; None when they are wrong.
        out: The output folder; None when nobody named one.
    """

    findings: tuple[Finding, ...]
    loaded: Loaded | None = None
    out: Path | None = None

    @property
    def exit_code(self) -> ExitCode:
        """0 when nothing failed; else the smallest code: settings before bundle before folders."""
        return min(
            (f.exit_code for f in self.findings if f.level is Level.FAILED),
            default=ExitCode.OK,
        )

    def as_lines(self) -> list[str]:
        """Returns it for people: a line a finding, what to do below it, a summary at the end."""
        width = max((len(f.what) for f in self.findings), default=0)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:8} {finding.what:{width}}  {finding.text}")
            if finding.advice:
                lines.append(f"{'':8} {'':{width}}  -> {finding.advice}")
        n = {level: sum(f.level is level for f in self.findings) for level in Level}
        lines.append(f"{n[Level.FAILED]} failed, {n[Level.WARNING]} warnings, {n[Level.OK]} ok")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        return {
            "exit_code": int(self.exit_code),
            "findings": [
                {"what": f.what, "level": str(f.level), "text": f.text, "advice": f.advice}
                for f in self.findings
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Computer:
    """What the system says of the computer. None: it does not say.

    Attributes:
        machine: Architecture, e.g. ``x86_64``, ``aarch64``.
        model: Name of the processor or the board; may be empty.
        flags: Names of the processor's extensions, as Linux calls them.
        n_cores: Cores of the computer.
        n_usable: Cores this process may use (affinity).
        quota_cores: Share of them that a control group leaves it, in cores.
        available_bytes: Memory to be had without swapping.
        memory_bytes: Memory of the computer.
        memory_limit_bytes: Memory that a control group leaves this process.
        accounts_memory: Whether control groups can limit memory at all.
        max_watches: Folders that the system watches for one user (inotify).
        is_synchronised: Whether the clock is set by a time server.
    """

    machine: str
    model: str
    flags: frozenset[str]
    n_cores: int
    n_usable: int
    quota_cores: float | None
    available_bytes: int | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    accounts_memory: bool | None
    max_watches: int | None
    is_synchronised: bool | None

    @classmethod
    def here(cls, root: Path = Path("/")) -> Self:
        """Asks Linux: proc(5), cgroups(7), inotify(7), adjtimex(2).

        Args:
            root: Folder that holds ``proc`` and ``sys``; tests give their own.
        """
        processor = _read(root / "proc/cpuinfo")
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", processor, re.M)
        model = re.search(r"^Model\s*:\s*(.+)$", processor, re.M) or re.search(
            r"^model name\s*:\s*(.+)$", processor, re.M
        )
        memory = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.M))
        controllers = _read(root / "sys/fs/cgroup/cgroup.controllers").split()
        n_cores = os.cpu_count() or 1
        return cls(
            machine=platform.machine(),
            model=model[1].strip() if model else "",
            flags=frozenset(flags[1].split() if flags else ()),
            n_cores=n_cores,
            n_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cores,
            quota_cores=min(_quotas(root), default=None),
            available_bytes=_kb(memory.get("MemAvailable")),
            memory_bytes=_kb(memory.get("MemTotal")),
            memory_limit_bytes=min(_memory_limits(root), default=None),
            accounts_memory="memory" in controllers if controllers else None,
            max_watches=_whole(_read(root / "proc/sys/fs/inotify/max_user_watches")),
            is_synchronised=_is_synchronised(),
        )

    @property
    def usable_cores(self) -> int:
        """Cores that threads can run on at the same time, at least 1."""
        quota = self.n_usable if self.quota_cores is None else max(round(self.quota_cores), 1)
        return max(min(self.n_usable, quota), 1)


def examine(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    computer: Computer | None = None,
    now: datetime | None = None,
) -> Diagnosis:
    """Looks at everything that a count rests on.

    Args:
        flags: Settings that the command line gave (`config.load`).
        file: The settings file the user named; None: the usual places.
        env: The environment; None: the process's.
        computer: The computer; None: this one.
        now: The time of day, with its zone; None: the computer's.

    Returns:
        The findings; what cannot be looked at because of an earlier finding is left out.
    """
    computer = computer or Computer.here()
    now = now or datetime.now(UTC)
    loaded, settings, judged = _settings(flags, file, env)
    installation = _installation()
    findings = [installation, _processor(computer), _cores(computer, settings), _memory(computer), judged]
    if installation.level is Level.FAILED:
        return Diagnosis((*findings, _clock(computer, now)), loaded, settings.out)
    findings += _contradictions(settings)
    findings.append(_bundle(settings))
    view = None if settings.source is None else _View.of(settings.source)
    findings += _source(settings, view, computer)
    status, results = _results(settings, now)
    findings += [*results, _clock(computer, now, view, status)]
    return Diagnosis(tuple(findings), loaded, settings.out)


def _settings(
    flags: Mapping[str, Any], file: Path | None, env: Mapping[str, str] | None
) -> tuple[Loaded | None, Settings, Finding]:
    """Returns the settings; where they are wrong, what the command line alone says."""
    given = tuple(str(value) for value in flags.values() if isinstance(value, (str, Path)))
    try:
        loaded = load(flags, file=file, env=env)
    except UsageError as error:
        # Its message begins with the file.
        wrong = replace(_failed("settings", error), private=(*given, error.message.partition(": ")[0]))
        try:
            return None, load(flags, env={}, file=Path(os.devnull)).settings, wrong
        except UsageError:
            return None, Settings(), wrong
    where = "no settings file" if loaded.file is None else str(loaded.file)
    private = given if loaded.file is None else (*given, where)
    return loaded, loaded.settings, Finding("settings", Level.OK, f"{where}: valid", private=private)


# -- the computer -----------------------------------------------------------------------------------------


def _installation() -> Finding:
    versions = ", ".join(f"{name} {number}" for name, number in versions_of())
    try:
        import cv2  # noqa: F401
        import numpy  # noqa: F401
        import onnxruntime  # noqa: F401
        import PIL.Image  # noqa: F401
    except Exception as error:  # noqa: BLE001  a library that is broken may raise anything
        return Finding(
            "installation",
            Level.FAILED,
            f"{versions}: {type(error).__name__}: {error}",
            "install rbc-edge again, into an environment of its own",
            ExitCode.BUNDLE,
        )
    return Finding("installation", Level.OK, versions)


def versions_of() -> list[tuple[str, str]]:
    """Returns names and versions of what counts here: the program, its libraries, the system."""
    found = [("rbc-edge", __version__), ("Python", platform.python_version())]
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return [*found, (platform.system(), f"{platform.release()} {platform.machine()}")]


def _processor(computer: Computer) -> Finding:
    flags = computer.flags
    name = computer.model or computer.machine
    if computer.machine in ("x86_64", "AMD64", "i686"):
        vnni = [flag for flag in ("avx512_vnni", "avx_vnni") if flag in flags]
        if vnni:
            return Finding("processor", Level.OK, f"{name}: int8 is fast ({vnni[0]})")
        if "avx2" in flags:
            return Finding(
                "processor", Level.OK, f"{name}: int8 works, without VNNI not at its fastest (avx2)"
            )
    elif computer.machine in ("aarch64", "arm64"):
        dot = [flag for flag in ("i8mm", "asimddp") if flag in flags]
        if dot:
            return Finding("processor", Level.OK, f"{name}: int8 is fast ({dot[0]})")
        if "asimd" in flags:
            return Finding(
                "processor", Level.OK, f"{name}: int8 works, without dot products not at its fastest (asimd)"
            )
    return Finding(
        "processor",
        Level.WARNING,
        f"{name} ({computer.machine}): no instructions that speed int8 up (avx2, vnni, asimddp); slow",
        "it counts the same, slowly; a processor of the last ten years is several times as fast",
    )


def _cores(computer: Computer, settings: Settings) -> Finding:
    text = f"{computer.usable_cores} of {computer.n_cores} may be used"
    if computer.quota_cores is not None:
        text += f" (a control group allows {computer.quota_cores:g})"
    if settings.threads > computer.usable_cores:
        return Finding(
            "cores",
            Level.WARNING,
            f"{text}, and threads is {settings.threads}",
            f"threads = {computer.usable_cores}, or 0: more than that wait for each other",
        )
    return Finding("cores", Level.OK, text)


def _memory(computer: Computer) -> Finding:
    left = [n for n in (computer.available_bytes, computer.memory_limit_bytes) if n is not None]
    if not left:
        return Finding("memory", Level.OK, "the system does not say")
    parts = []
    if computer.available_bytes is not None:
        of = f" of {_bytes(computer.memory_bytes)}" if computer.memory_bytes else ""
        parts.append(f"{_bytes(computer.available_bytes)}{of} available")
    if computer.memory_limit_bytes is not None:
        parts.append(f"a control group allows {_bytes(computer.memory_limit_bytes)}")
    text = ", ".join(parts)
    if min(left) < _LEAST_MEMORY_BYTES:
        return Finding(
            "memory",
            Level.WARNING,
            f"{text}: little for images of 5 megapixels or more",
            "end other programs, raise MemoryMax, or set threads = 1",
        )
    if computer.accounts_memory is False:
        return Finding(
            "memory",
            Level.WARNING,
            f"{text}; the kernel keeps no account of it, so the service's MemoryMax has no effect",
            "on a Raspberry Pi: cgroup_enable=memory in the line of /boot/firmware/cmdline.txt, and restart",
        )
    return Finding("memory", Level.OK, text)


def _clock(
    computer: Computer, now: datetime, view: "_View | None" = None, status: "StationStatus | None" = None
) -> Finding:
    said = now.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    advice = "set the clock (timedatectl); times in the tables are as wrong as it is, counts are not"
    if not _EARLIEST_YEAR <= now.year <= _LATEST_YEAR:
        return Finding("clock", Level.WARNING, f"it says {said}, which cannot be", advice)
    if status is not None and status.clock_problem:
        return Finding("clock", Level.WARNING, status.clock_problem, advice)
    if view is not None and view.newest is not None and view.newest > now + _CLOCK_SLACK:
        ahead = view.newest.isoformat(timespec="seconds").replace("+00:00", "Z")
        return Finding(
            "clock",
            Level.WARNING,
            f"it says {said}, and the source holds an image of {ahead}: this clock or the camera's is wrong",
            "set both; a time server keeps them right",
            private=(ahead,),
        )
    if computer.is_synchronised is False:
        return Finding(
            "clock",
            Level.WARNING,
            f"it says {said}; no time server keeps it right",
            f"if that is wrong: {advice}",
        )
    return Finding(
        "clock", Level.OK, f"{said}{', kept by a time server' if computer.is_synchronised else ''}"
    )


# -- what counts ------------------------------------------------------------------------------------------


def _contradictions(settings: Settings) -> Iterator[Finding]:
    """Yields what the settings cannot mean, though each is right for itself."""
    from rbc_edge.station.inbox import check_pattern
    from rbc_edge.station.prometheus import check_metrics
    from rbc_edge.station.runner import check_apart

    try:
        check_pattern(settings.slide_pattern)
        if settings.source is not None and settings.out is not None:
            check_apart((settings.source,), settings.out)
        if settings.prometheus is not None:
            check_metrics(settings.prometheus)
    except UsageError as error:
        yield _failed("settings", error)


def _bundle(settings: Settings) -> Finding:
    from rbc_edge.vision.bundle import Bundle
    from rbc_edge.vision.selftest import verify

    try:
        bundle = Bundle.open(settings.bundle)
        bundle.networks(settings.precision)
        test = verify(bundle, threads=settings.threads)
    except BundleError as error:
        return _failed("bundle", error)
    return Finding(
        "bundle",
        Level.OK,
        f"{bundle.bundle_id} is intact and sees here what the export saw: {test.n_found} cells of"
        f" {test.n_expected}",
    )


# -- the camera's folder ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _View:
    """What a walk through the source sees, without opening an image."""

    n_folders: int = 0
    n_images: int = 0
    n_unreadable: int = 0
    newest_s: float = 0.0
    is_whole: bool = True

    @property
    def newest(self) -> datetime | None:
        """Time of change of the newest image."""
        try:
            return datetime.fromtimestamp(self.newest_s, UTC) if self.newest_s else None
        except (OverflowError, ValueError, OSError):
            return datetime.max.replace(tzinfo=UTC)

    @classmethod
    def of(cls, source: Path) -> Self:
        """Walks; sees nothing where the source is away."""
        view = cls()
        todo: list[str] = [os.fspath(source)]
        n_entries = 0
        while todo:
            view.n_folders += 1
            try:
                with os.scandir(todo.pop()) as listing:
                    for entry in listing:
                        n_entries += 1
                        if n_entries > _MOST_ENTRIES:
                            view.is_whole = False
                            return view
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(entry.path)
                        else:
                            view._take(entry)
            except OSError:
                view.n_unreadable += 1
        return view

    def _take(self, entry: os.DirEntry[str]) -> None:
        from rbc_edge.text import IMAGE_SUFFIXES

        if entry.name.startswith(".") or Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
            return
        with suppress(OSError):  # gone since the listing
            self.newest_s = max(self.newest_s, entry.stat().st_mtime)
            self.n_images += 1
            self.n_unreadable += not os.access(entry.path, os.R_OK)


def _source(settings: Settings, view: _View | None, computer: Computer) -> Iterator[Finding]:
    from rbc_edge.station.source import look
    from rbc_edge.text import path_text

    if settings.source is None or view is None:
        yield Finding("source", Level.OK, "none is named; `rbc-edge watch` needs one")
        return
    name = path_text(settings.source)
    sight = look(settings.source, marker=settings.marker)
    if sight.missing:
        yield Finding(
            "source",
            Level.FAILED,
            sight.missing,
            "mount it, mend its permissions, or name another; the service waits for it",
            ExitCode.UNAVAILABLE,
            (name,),
        )
        return
    n = f"{view.n_images}{'' if view.is_whole else ' or more'} images in {view.n_folders} folders"
    if view.n_unreadable:
        yield Finding(
            "source",
            Level.WARNING,
            f"{name}: {n}, and {view.n_unreadable} files or folders that {user_name()} may not read",
            f"the camera's umask, or: setfacl -R -m u:{user_name()}:rX -d -m u:{user_name()}:rX {name}",
            private=(name, user_name()),
        )
    else:
        yield Finding("source", Level.OK, f"{name}: {n}", private=(name,))
    yield _waking(settings, sight.mount, view, computer)


def _waking(settings: Settings, mount: "Mount | None", view: _View, computer: Computer) -> Finding:
    """How new images are noticed there."""
    polls = f"looked through every {settings.scan_every_s:g} s"
    if mount is None:
        return Finding("events", Level.OK, "the system does not say what the source lies on")
    private = (str(mount), mount.device, mount.root, mount.point)
    if settings.polling:
        return Finding("events", Level.OK, f"{mount.kind}: {polls}, as the settings say", private=private)
    if not mount.gives_events:
        if settings.polling is False:
            return Finding(
                "events",
                Level.WARNING,
                f"{mount.kind} tells nothing of what other computers write, and the settings ask for events",
                "take polling = false out",
                private=private,
            )
        return Finding("events", Level.OK, f"{mount.kind} gives none: {polls}", private=private)
    if computer.max_watches is not None and view.n_folders >= computer.max_watches:
        return Finding(
            "events",
            Level.WARNING,
            f"{view.n_folders} folders, and the system watches {computer.max_watches}: {polls}",
            f"sysctl fs.inotify.max_user_watches={4 * view.n_folders}, and in a file of /etc/sysctl.d",
        )
    limit = "" if computer.max_watches is None else f" of {computer.max_watches} that may be watched"
    return Finding("events", Level.OK, f"{mount.kind} gives them; {view.n_folders} folders{limit}")


# -- the results ------------------------------------------------------------------------------------------


def _results(settings: Settings, now: datetime) -> tuple["StationStatus | None", list[Finding]]:
    from rbc_edge.station.state_file import read_state
    from rbc_edge.station.status import status_of
    from rbc_edge.store.ledger import FILE_NAME, DamagedError
    from rbc_edge.text import path_text

    out = settings.out
    if out is None:
        return None, [Finding("results", Level.OK, "no output folder is named (--out)")]
    name = path_text(out)
    running = False
    with suppress(UnavailableError):
        running, _ = read_state(out)
    findings = [_writable(out, name, running=running)]
    if findings[0].level is not Level.FAILED:
        findings.append(_disk(settings, out, name))
    if not os.path.exists(out / FILE_NAME) and not running:  # noqa: PTH110 -- False, not an error
        return None, [*findings, Finding("ledger", Level.OK, "nothing is counted there yet")]
    try:
        status = status_of(out, now=now)
    except DamagedError as error:
        mended = UnavailableError(
            error.message, "the next run, or the service at its start, keeps it aside and counts anew"
        )
        return None, [*findings, _failed("ledger", mended)]
    except UnavailableError as error:
        return None, [*findings, _failed("ledger", error)]
    return status, [*findings, _ledger(out, status), _service(status)]


def _writable(out: Path, name: str, *, running: bool) -> Finding:
    there = _existing(out)
    try:
        status = there.stat()
    except OSError as error:
        return Finding(
            "results",
            Level.FAILED,
            f"{name}: {error.strerror}",
            "check the permissions of the folders above it",
            ExitCode.UNAVAILABLE,
            (name,),
        )
    if not stat.S_ISDIR(status.st_mode):
        return Finding(
            "results", Level.FAILED, f"{name}: not a folder", "name another", ExitCode.UNAVAILABLE, (name,)
        )
    owner = _name_of(status.st_uid)
    private = (name, str(there), owner, user_name())
    if not os.access(there, os.W_OK | os.X_OK):
        read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
        text = f"{name}: {'its disk is read-only' if read_only else f'{user_name()} may not write there'}"
        if running and not read_only:
            return Finding(
                "results",
                Level.WARNING,
                f"{text}; the service, which runs, may",
                f"what writes there has to be {owner}: runuser -u {owner} -- rbc-edge ...",
                private=private,
            )
        return Finding(
            "results",
            Level.FAILED,
            text,
            "mount it for writing; look at the disk (dmesg)" if read_only else f"ask as {owner}, or chown it",
            ExitCode.UNAVAILABLE,
            private,
        )
    if not os.path.lexists(out):
        return Finding("results", Level.OK, f"{name}: will be made", private=private)
    strangers = sorted({uid for uid in _owners(out) if uid != status.st_uid})
    if strangers:
        other = _name_of(strangers[0])
        return Finding(
            "results",
            Level.WARNING,
            f"{name}: belongs to {owner}, and files in it to {other}: somebody counted there as {other}",
            f"chown -R --reference={name} {name}, while nobody counts",
            private=(*private, other),
        )
    if status.st_uid != os.geteuid():
        return Finding(
            "results",
            Level.WARNING,
            f"{name}: belongs to {owner}, and {user_name()} asks: what one may, the other may not",
            f"ask as {owner}: runuser -u {owner} -- rbc-edge doctor",
            private=private,
        )
    return Finding("results", Level.OK, f"{name}: may be written", private=private)


def _owners(out: Path) -> Iterator[int]:
    """Yields whose the ledger, its log and the locks are: who writes there has to write all of them."""
    from rbc_edge.station.state_file import STATE_FILE_NAME
    from rbc_edge.store.ledger import FILE_NAME
    from rbc_edge.store.outdir import LOCK_NAME

    for name in (FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", LOCK_NAME, STATE_FILE_NAME):
        with suppress(OSError):
            yield (out / name).stat().st_uid


def _existing(out: Path) -> Path:
    """Returns the folder, or the nearest above it that is there, as far as we may look."""
    there = Path(os.path.abspath(out))  # noqa: PTH100 -- resolve() asks what we may not know
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    return there


def _disk(settings: Settings, out: Path, name: str) -> Finding:
    from rbc_edge.station.source import mount_of

    there = _existing(out)
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    text = f"{_bytes(free)} free"
    if free < settings.min_free_mb * 1e6 or (disk.f_files and not disk.f_favail):
        why = "" if disk.f_favail or not disk.f_files else ", and no room for another file"
        return Finding(
            "disk",
            Level.FAILED,
            f"{text}{why}; the service pauses below {settings.min_free_mb:g} MB",
            "make room; it goes on by itself",
            ExitCode.UNAVAILABLE,
        )
    mount = mount_of(there)
    if mount is not None and mount.kind in _PASSING:
        return Finding(
            "disk",
            Level.WARNING,
            f"{text}; {name} lies in memory ({mount.kind}) and is gone after a restart",
            "name an output folder on a disk",
            private=(name,),
        )
    if mount is not None and not mount.gives_events:
        return Finding(
            "disk",
            Level.WARNING,
            f"{text}; {name} lies on a share ({mount.kind}), where the ledger's locks cannot be trusted",
            "name an output folder on a disk of this computer, and copy the tables",
            private=(name,),
        )
    if free < _LITTLE_DISK_BYTES:
        return Finding(
            "disk",
            Level.WARNING,
            f"{text}; the service pauses below {settings.min_free_mb:g} MB",
            "make room before it does",
        )
    return Finding("disk", Level.OK, f"{text}{f' on {mount.kind}' if mount else ''}")


def _ledger(out: Path, status: "StationStatus") -> Finding:
    from rbc_edge.store.ledger import FILE_NAME, Ledger

    if status.tally is None:
        return Finding("ledger", Level.WARNING, status.ledger_problem, private=(str(out),))
    tally = status.tally
    text = f"{tally.n_ok} images of {tally.n_slides} slides counted"
    size = 0
    with suppress(OSError):
        size = (out / FILE_NAME).stat().st_size
    if size <= _READ_THROUGH_BYTES:
        with Ledger.reading(out) as ledger:
            damage = ledger.damage()
        if damage:
            return Finding(
                "ledger",
                Level.FAILED,
                f"{text}; it is damaged: {damage}",
                "restart the service, or run again: it is kept aside, and the images are counted anew",
                ExitCode.UNAVAILABLE,
            )
        text += ", read through and intact"
    else:
        text += f"; {_bytes(size)}, too much to read through here: the service does so at its start"
    if tally.n_failed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in status.failure_counts.items())
        return Finding(
            "ledger",
            Level.WARNING,
            f"{text}; {tally.n_failed} failed: {reasons}",
            "rbc-edge status names them; rbc-edge retry has them looked at again",
        )
    return Finding("ledger", Level.OK, text)


def _service(status: "StationStatus") -> Finding:
    from rbc_edge.ops import status_text
    from rbc_edge.station.state_file import Activity

    state = status.state
    headline = status_text.headline(status)
    private = () if state is None else (state.source, state.detail, *state.problems)
    if not status.running:
        if state is None:
            return Finding("service", Level.OK, "none has worked on these results")
        text = f"not running; last words at {state.updated_at}: {state.activity}"
        if state.activity is Activity.STOPPING:
            return Finding("service", Level.OK, text)
        return Finding(
            "service",
            Level.WARNING,
            text,
            "if it should run: systemctl status rbc-edge, systemctl start rbc-edge",
        )
    if status.is_silent or (state is not None and state.activity.is_paused):
        return Finding(
            "service",
            Level.FAILED,
            headline,
            "rbc-edge status and journalctl -u rbc-edge say more",
            ExitCode.UNAVAILABLE,
            private,
        )
    if state is not None and state.problems:
        return Finding(
            "service",
            Level.WARNING,
            f"{headline}; {len(state.problems)} problems, the first: {state.problems[0]}",
            "rbc-edge status names all",
            private=private,
        )
    return Finding("service", Level.OK, headline, private=private)


# -- asking the system --------------------------------------------------------------------------------------


def _failed(what: str, error: RbcEdgeError) -> Finding:
    return Finding(what, Level.FAILED, error.message, error.advice, error.exit_code)


def user_name() -> str:
    """Returns who asks."""
    return _name_of(os.geteuid())


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container's number without a name
        return str(uid)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _whole(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _kb(text: str | None) -> int | None:
    return None if text is None else int(text) * 1024


def _control_groups(root: Path) -> Iterator[Path]:
    """Yields the folders of this process's control group and those above it (cgroups(7), version 2)."""
    own = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.M)
    if own is None:
        return
    top = root / "sys/fs/cgroup"
    folder = top / own[1].strip("/")
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder


def _quotas(root: Path) -> Iterator[float]:
    for folder in _control_groups(root):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    for folder in _control_groups(root):
        limit = _whole(_read(folder / "memory.max"))
        if limit is not None:
            yield limit


def _is_synchronised() -> bool | None:
    """Whether a time server keeps the clock (adjtimex(2), which with modes 0 only tells)."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"

"""The doctor: checks everything a count depends on before counting starts, with advice for each problem.

It changes nothing and does not disturb a running service. A broken installation is one of the things it
finds, so this module itself loads without the libraries that count.
"""

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rbc_edge import __version__
from rbc_edge.config import Loaded, Settings, load
from rbc_edge.errors import UsageError
from rbc_edge.ops.computer import Computer
from rbc_edge.ops.finding import Diagnosis, Finding, Level, failed, failed_by, ok, warning
from rbc_edge.text import bytes_text, utc_text

_IMPORT_ERROR: Exception | None = None
try:
    import_module("numpy")  # without it, OpenCV would print advice of its own among our lines
    from rbc_edge.ops import station_checks
except Exception as _error:  # noqa: BLE001  a broken library may raise anything
    _IMPORT_ERROR = _error

_PACKAGES: Final = ("numpy", "opencv-python-headless", "onnxruntime", "pillow", "watchdog", "typer")
_MIN_MEMORY_BYTES: Final = 300e6  # docs/operations.md, "Limits": an image of 5 megapixels
_FIRST_YEAR, _LAST_YEAR = 2026, 2100  # no image is older than the program that counts it
_CLOCK_SLACK: Final = timedelta(minutes=1)
_X86: Final = (("avx512_vnni", "avx_vnni"), "avx2", "VNNI")
_ARM: Final = (("i8mm", "asimddp"), "asimd", "dot products")
# For each architecture: extensions that make int8 fast, the one that int8 needs, and what the former add.
_INT8: Final = {"x86_64": _X86, "AMD64": _X86, "i686": _X86, "aarch64": _ARM, "arm64": _ARM}


def examine(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    computer: Computer | None = None,
    now: datetime | None = None,
) -> Diagnosis:
    """Runs all checks. A check that an earlier problem makes impossible is left out.

    `flags`, `file` and `env` are those of `config.load`. Computer and time (with its zone) are those of this
    computer where they are not given.
    """
    computer = computer or Computer.here()
    now = now or datetime.now(UTC)
    loaded, settings, validity = _settings(flags, file, env)
    installation = _installation()
    findings = [installation, _processor(computer), _cores(computer, settings), _memory(computer), validity]
    if installation.level is Level.FAILED:
        return Diagnosis((*findings, _clock(computer, now)), loaded, settings.out)
    tree = None if settings.source is None else station_checks.Tree.of(settings.source, settings.ignore)
    results, status = station_checks.results(settings, now)
    findings += [
        *station_checks.contradictions(settings),
        station_checks.bundle(settings),
        *station_checks.source(settings, tree, computer),
        *results,
        _clock(computer, now, tree.newest if tree else None, status.clock_problem if status else ""),
    ]
    return Diagnosis(tuple(findings), loaded, settings.out)


def versions_of() -> dict[str, str]:
    """Returns the versions of the program, its libraries and the system by their names."""
    found = {"rbc-edge": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {platform.system(): f"{platform.release()} {platform.machine()}"}


def _settings(
    flags: Mapping[str, Any], file: Path | None, env: Mapping[str, str] | None
) -> tuple[Loaded | None, Settings, Finding]:
    """Returns the settings. Where they are wrong, those of the command line alone."""
    try:
        loaded = load(flags, file=file, env=env)
    except UsageError as error:
        given = [str(value) for value in flags.values() if isinstance(value, (str, Path))]
        # The message begins with the file.
        wrong = failed_by("settings", error).hiding(*given, error.message.partition(": ")[0])
        try:
            return None, load(flags, env={}, file=Path(os.devnull)).settings, wrong
        except UsageError:
            return None, Settings(), wrong
    return loaded, loaded.settings, ok("settings", f"{loaded.file or 'no settings file'}: valid")


def _installation() -> Finding:
    versions = ", ".join(f"{name} {number}" for name, number in versions_of().items())
    error = _IMPORT_ERROR
    try:
        for library in ("numpy", "cv2", "onnxruntime", "PIL.Image"):
            import_module(library)
    except Exception as broken:  # noqa: BLE001  a broken library may raise anything
        error = broken
    if error is None:
        return ok("installation", versions)
    text = f"{versions}: {type(error).__name__}: {error}"
    advice = "install rbc-edge again, into its own environment"
    return failed("installation", text, advice)


def _processor(computer: Computer) -> Finding:
    name = computer.model or computer.machine
    fast, needed, what = _INT8.get(computer.machine, ((), "", ""))
    if found := [flag for flag in fast if flag in computer.flags]:
        return ok("processor", f"{name}: int8 is fast ({found[0]})")
    if needed in computer.flags:
        return ok("processor", f"{name}: int8 works, but without {what} it is not at its fastest ({needed})")
    text = f"{name} ({computer.machine}): no instructions for fast int8 (avx2, vnni, asimddp), so it is slow"
    advice = "the counts are the same; a processor of the last ten years is several times as fast"
    return warning("processor", text, advice)


def _cores(computer: Computer, settings: Settings) -> Finding:
    n = computer.usable_cores
    text = f"{n} of {computer.n_cores} may be used"
    if computer.quota_cores is not None:
        text += f" (a control group allows {computer.quota_cores:g})"
    if settings.threads <= n:
        return ok("cores", text)
    advice = f"threads = {n}, or 0: more threads than cores wait for each other"
    return warning("cores", f"{text}, but threads is {settings.threads}", advice)


def _memory(computer: Computer) -> Finding:
    available, limit = computer.available_bytes, computer.memory_limit_bytes
    parts = []
    if available is not None:
        of = f" of {bytes_text(computer.memory_bytes)}" if computer.memory_bytes else ""
        parts.append(f"{bytes_text(available)}{of} available")
    if limit is not None:
        parts.append(f"a control group allows {bytes_text(limit)}")
    if not parts:
        return ok("memory", "the system does not show it")
    text = ", ".join(parts)
    if min(n for n in (available, limit) if n is not None) < _MIN_MEMORY_BYTES:
        advice = "end other programs, raise MemoryMax, or set threads = 1"
        return warning("memory", f"{text}: not enough for images of 5 megapixels or more", advice)
    if computer.accounts_memory is False:
        text += "; the kernel does not account for memory, so the service's MemoryMax has no effect"
        line = "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt"
        return warning("memory", text, f"on a Raspberry Pi: {line}, restart")
    return ok("memory", text)


def _clock(
    computer: Computer, now: datetime, newest_image: datetime | None = None, problem: str = ""
) -> Finding:
    shown = utc_text(now)
    advice = "set the clock (timedatectl); a wrong clock makes the times in the tables wrong, not the counts"
    if not _FIRST_YEAR <= now.year <= _LAST_YEAR:
        return warning("clock", f"it shows {shown}, which cannot be", advice)
    if problem:
        return warning("clock", problem, advice)
    if newest_image is not None and newest_image > now + _CLOCK_SLACK:
        ahead = utc_text(newest_image)
        wrong = "this clock or the camera's is wrong"
        text = f"it shows {shown}, but the source holds an image of {ahead}: {wrong}"
        return warning("clock", text, "set both; a time server keeps them right").hiding(ahead)
    if computer.is_synchronised is False:
        return warning("clock", f"it shows {shown}; no time server sets it", f"if that is wrong: {advice}")
    return ok("clock", f"{shown}{', set by a time server' if computer.is_synchronised else ''}")

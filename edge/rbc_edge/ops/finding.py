"""What the doctor reports: one finding for each check, and all of them as lines or JSON."""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from rbc_edge.config import Loaded
from rbc_edge.errors import ExitCode, RbcEdgeError


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # the station counts, but a person should look
    FAILED = "failed"  # the station does not count, or not for long


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str  # was checked, in a word; stable
    text: str  # what was found
    advice: str = ""  # what to do about it; empty where nothing is to be done
    level: Level = Level.OK
    exit_code: ExitCode = ExitCode.OK  # of the process when this check failed
    private: tuple[str, ...] = ()  # names and paths in text and advice that must not leave the station

    def hiding(self, *private: str) -> Self:
        """Returns the same finding with more private names."""
        return replace(self, private=(*self.private, *private))


ok: Final = Finding
warning: Final = partial(Finding, level=Level.WARNING)
failed: Final = partial(Finding, level=Level.FAILED, exit_code=ExitCode.UNAVAILABLE)


def failed_by(what: str, error: RbcEdgeError) -> Finding:
    """Returns an error as a finding, with the advice and the exit code of the error."""
    return failed(what, error.message, error.advice, exit_code=error.exit_code, private=error.private)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]
    loaded: Loaded | None = None  # the settings in force; None when they are wrong
    out: Path | None = None  # the output folder; None when none is given

    @property
    def exit_code(self) -> ExitCode:
        """0 when nothing failed, else the smallest code: settings before bundle before folders."""
        codes = (f.exit_code for f in self.findings if f.level is Level.FAILED)
        return min(codes, default=ExitCode.OK)

    def as_lines(self) -> list[str]:
        """Returns a line for each finding, its advice below it, and a summary at the end."""
        width = max((len(f.what) for f in self.findings), default=0)
        lines = []
        for f in self.findings:
            lines.append(f"{f.level:8} {f.what:{width}}  {f.text}")
            if f.advice:
                lines.append(f"{'':8} {'':{width}}  -> {f.advice}")
        n = {level: sum(f.level is level for f in self.findings) for level in Level}
        lines.append(f"{n[Level.FAILED]} failed, {n[Level.WARNING]} warnings, {n[Level.OK]} ok")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        names = ("what", "level", "text", "advice")
        findings = [{name: str(getattr(f, name)) for name in names} for f in self.findings]
        return {"exit_code": int(self.exit_code), "findings": findings}

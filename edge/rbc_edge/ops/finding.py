"""What the doctor reports: one finding for each check, and all of them as lines or JSON."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from rbc_edge.config import Loaded
from rbc_edge.errors import ExitCode, RbcEdgeError


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # the station counts, but a person should look
    FAILED = "failed"  # the station does not count, or not for long


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        what: What was checked, in a word. Stable.
        level: How bad it is.
        text: What was found.
        advice: What to do about it. Empty where nothing is to be done.
        exit_code: Exit code of the process when this check failed.
        private: Names and paths in text and advice that must not leave the station.
    """

    what: str
    level: Level
    text: str
    advice: str = ""
    exit_code: ExitCode = ExitCode.OK
    private: tuple[str, ...] = ()

    def hiding(self, *private: str) -> Self:
        """Returns the same finding with more private names."""
        return replace(self, private=(*self.private, *private))


def ok(what: str, text: str) -> Finding:
    """Returns a finding that all is well."""
    return Finding(what, Level.OK, text)


def warning(what: str, text: str, advice: str = "") -> Finding:
    """Returns a finding that a person should look at."""
    return Finding(what, Level.WARNING, text, advice)


def failed(what: str, text: str, advice: str, exit_code: ExitCode = ExitCode.UNAVAILABLE) -> Finding:
    """Returns a finding that keeps the station from counting."""
    return Finding(what, Level.FAILED, text, advice, exit_code)


def failed_by(what: str, error: RbcEdgeError) -> Finding:
    """Returns an error as a finding, with the advice and the exit code of the error."""
    return failed(what, error.message, error.advice, error.exit_code)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings.

    Attributes:
        findings: In the order of the checks.
        loaded: The settings in force. None when they are wrong.
        out: The output folder. None when none is given.
    """

    findings: tuple[Finding, ...]
    loaded: Loaded | None = None
    out: Path | None = None

    @property
    def exit_code(self) -> ExitCode:
        """0 when nothing failed, else the smallest code: settings before bundle before folders."""
        codes = (f.exit_code for f in self.findings if f.level is Level.FAILED)
        return min(codes, default=ExitCode.OK)

    def as_lines(self) -> list[str]:
        """Returns a line for each finding, its advice below it, and a summary at the end."""
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
        findings = [
            {"what": f.what, "level": str(f.level), "text": f.text, "advice": f.advice} for f in self.findings
        ]
        return {"exit_code": int(self.exit_code), "findings": findings}

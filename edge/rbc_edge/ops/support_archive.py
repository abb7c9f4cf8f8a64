"""The archive for a bug report: the doctor's findings and the newest rows of the ledger, without names."""

import csv
import hashlib
import io
import json
import re
import secrets
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, Final

from rbc_edge.config import Loaded, Settings
from rbc_edge.errors import RbcEdgeError, UnavailableError, UsageError
from rbc_edge.ops.computer import user_name
from rbc_edge.ops.doctor import versions_of
from rbc_edge.ops.finding import Diagnosis
from rbc_edge.station.state_file import read_state
from rbc_edge.text import path_text

_HAS_LEDGER = True
try:
    from rbc_edge.store.queries import Reader
    from rbc_edge.store.rows import FieldRow
except Exception:  # noqa: BLE001  a broken installation: the archive then says so, without the ledger
    _HAS_LEDGER = False

_MAX_ROWS: Final = 500
_FIXED_WORDS: Final = frozenset({"edges", "precision"})  # settings with one of a few known words
_COLUMNS: Final = (
    *("slide", "fov", "status", "failure", "size_bytes", "width_px", "height_px", "cell_diameter_px"),
    *("scale_source", "n_rbc_single", "n_rbc_overlapping", "n_wbc", "n_platelets", "n_refused"),
    *("n_corrected", "quality_flags", "analyzed_at", "bundle_id", "elapsed_ms"),
)


def write(file: Path, diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Writes what a bug report needs into a new zip file, without images, names or paths.

    Slides and fields of view appear as numbers that mean nothing outside the archive: hashes with a key that
    is not kept. Returns name and meaning of each file in the archive. Raises `UsageError` where the file
    exists, and `UnavailableError` where it cannot be written.
    """
    scrub = _Scrubber(diagnosis)
    settings = _json(_settings_shown(diagnosis.loaded, scrub))
    contents = [
        ("doctor.txt", "what rbc-edge doctor found", scrub.lines(diagnosis)),
        ("versions.json", "versions of the program, its libraries and the system", _json(versions_of())),
        ("settings.json", "which settings are given, and where, without paths and names", settings),
    ]
    if diagnosis.out is not None:
        contents += _of_results(diagnosis.out, scrub)
    listing = "".join(f"{name}: {meaning}\n" for name, meaning, _ in contents)
    readme = (
        "An archive for a bug report, written by `rbc-edge doctor --support-archive`.\n\n"
        f"{listing}\nIt does not contain images, checksums of images, the times when they were taken, or\n"
        "names of slides, files, folders, users and computers. Check this yourself before you send it.\n"
    )
    try:
        file.touch(mode=0o600, exist_ok=False)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, _, text in (("README.txt", "", readme), *contents):
                archive.writestr(name, text.encode("utf-8", "backslashreplace"))
    except FileExistsError as error:
        raise UsageError(f"{file}: exists already", "give another file name") from error
    except OSError as error:
        with suppress(OSError):
            file.unlink()  # no half archive: the file did not exist before
        text = f"{file}: cannot write: {error.strerror or error}"
        raise UnavailableError(text, "check permissions and free space") from error
    return [("README.txt", "this list"), *((name, meaning) for name, meaning, _ in contents)]


class _Scrubber:
    """Removes names and paths from text. The hashes of one archive cannot be compared with another's."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self._key = secrets.token_bytes(16)
        known = {part for finding in diagnosis.findings for part in finding.private}
        if diagnosis.loaded is not None:
            given = asdict(diagnosis.loaded.settings) | dict.fromkeys(_FIXED_WORDS)
            known |= {str(value) for value in given.values() if isinstance(value, (str, Path))}
            known |= set(diagnosis.loaded.settings.ignore)
            known |= {str(diagnosis.loaded.file)} - {"None"}
        known |= {str(diagnosis.out)} - {"None"}
        known |= {shown for name in known for shown in (path_text(name), repr(name)[1:-1])}
        known |= {str(Path(__file__).parents[1]), sys.prefix}
        with suppress(OSError):  # the current folder may be deleted
            known.add(str(Path.cwd()))
        known |= {str(Path.home()), socket.gethostname(), user_name()} - {"root", "rbc-edge", "localhost"}
        self._known = sorted((k for k in known if len(k) > 1), key=len, reverse=True)

    def hashed(self, name: str) -> str:
        """Returns a short number for a name. Within one archive the same name has the same number."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=self._key, digest_size=4)
        return digest.hexdigest()

    def __call__(self, text: str) -> str:
        """Returns the text without known names, quoted words and everything that looks like a path."""
        for name in self._known:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
        text = re.sub(r"'[^']*'|\"[^\"]*\"", "<quoted>", text)
        # Up to the next mark, because a path may hold spaces. Better a word too few than a name too many.
        return re.sub(r"(?<![\w<])(?:<name>)?/[^:;,]*", "<path>", text)

    def lines(self, diagnosis: Diagnosis) -> str:
        """Returns the findings as text."""
        scrubbed = [replace(f, text=self(f.text), advice=self(f.advice)) for f in diagnosis.findings]
        return "\n".join(replace(diagnosis, findings=tuple(scrubbed)).as_lines()) + "\n"


def _settings_shown(loaded: Loaded | None, scrub: _Scrubber) -> dict[str, Any]:
    if loaded is None:
        return {"wrong": "see doctor.txt"}
    shown = {}
    for field in fields(Settings):
        value, source = getattr(loaded.settings, field.name), loaded.source[field.name]
        # A word that a person chose may be the name of a slide or a person.
        if isinstance(value, (str, Path, tuple)) and value and field.name not in _FIXED_WORDS:
            value = "given"
        where = "file" if loaded.file is not None and source.startswith(str(loaded.file)) else source
        shown[field.name] = {"value": value, "source": scrub(where)}
    return shown


def _of_results(out: Path, scrub: _Scrubber) -> Iterator[tuple[str, str, str]]:
    """Yields what the service and the ledger say, as far as they can be read."""
    with suppress(RbcEdgeError):
        running, state = read_state(out)
        if state is not None:
            shown = state.as_json() | {"running": running, "problems": len(state.problems)}
            shown["not_counted"] = len(state.not_counted)
            shown["source"], shown["detail"] = bool(state.source), bool(state.detail)
            shown["polling_reason"] = scrub(state.polling_reason)
            yield "service.json", "the last state of the service", _json(shown)
    if not _HAS_LEDGER:
        return
    with suppress(RbcEdgeError), Reader.open(out) as ledger:
        every = (row for slide in ledger.slide_ids() for row in ledger.fields(slide))
        rows = nlargest(_MAX_ROWS, every, key=lambda row: row.analyzed_at)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_COLUMNS)
        table.writerows(_shown(row, scrub) for row in rows)
        meaning = f"the newest {len(rows)} rows, with numbers for slides and fields of view"
        yield "ledger.csv", meaning, text.getvalue()


def _shown(row: "FieldRow", scrub: _Scrubber) -> list[object]:
    """Returns the values of `_COLUMNS` for a row of the ledger."""
    c = next(iter(row.counts.values()), None)
    counts = ("",) * 4 if c is None else (c.n_rbc_single, c.n_rbc_overlapping, c.n_wbc, c.n_platelets)
    scale = ("", "") if row.scale is None else (f"{row.scale.cell_diameter_px:.1f}", row.scale.source)
    return [
        *(scrub.hashed(row.slide_id), scrub.hashed(row.fov), row.status, row.failure, row.size_bytes),
        *(row.width_px, row.height_px, *scale, *counts, row.n_refused, row.n_corrected),
        ";".join(row.quality_flags),
        *(row.analyzed_at, row.version.bundle_id, round(row.elapsed_ms, 1)),
    ]


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"

"""The archive for a bug report: what the doctor found and what the ledger holds, without anybody's name."""

import csv
import hashlib
import io
import json
import re
import secrets
import socket
import sys
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, Final

from rbc_edge.config import Loaded, Settings
from rbc_edge.errors import RbcEdgeError, UnavailableError, UsageError
from rbc_edge.ops.doctor import Diagnosis, user_name, versions_of

_SUPPORT_ROWS: Final = 500
_NOT_CHOSEN_FREELY: Final = frozenset({"edges", "precision"})  # one word of a few


def write(file: Path, diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Writes what a bug report needs into a new zip file, without images, names or paths.

    Slides and fields of view go by numbers that mean nothing outside the archive: hashes under a key that
    is thrown away.

    Args:
        file: The archive; must not exist.
        diagnosis: What was found.

    Returns:
        Name and meaning of each file in it.

    Raises:
        UsageError: The file exists.
        UnavailableError: It cannot be written.
    """
    scrub = _Scrubber(diagnosis)
    contents = [
        ("doctor.txt", "what rbc-edge doctor found", scrub.lines(diagnosis)),
        (
            "versions.json",
            "versions of the program, its libraries and the system",
            _json(dict(versions_of())),
        ),
        (
            "settings.json",
            "which settings are given, and where; paths and names left out",
            _json(_settings_shown(diagnosis.loaded, scrub)),
        ),
    ]
    if diagnosis.out is not None:
        contents += _of_results(diagnosis.out, scrub)
    listing = "".join(f"{name}: {meaning}\n" for name, meaning, _ in contents)
    readme = (
        "An archive for a bug report, written by `rbc-edge doctor --bundle-support`.\n\n"
        f"{listing}\nNot in it: images, names of slides, files, folders, users and computers, checksums of"
        " images,\ntimes at which they were taken. Look for yourself before you send it.\n"
    )
    try:
        file.touch(mode=0o600, exist_ok=False)
        file.write_bytes(_zipped([("README.txt", "", readme), *contents]))
    except FileExistsError as error:
        raise UsageError(f"{file}: is there already", "name another file") from error
    except OSError as error:
        with suppress(OSError):
            file.unlink()  # no half an archive; it was not there before
        raise UnavailableError(
            f"{file}: cannot write: {error.strerror or error}", "check permissions and free space"
        ) from error
    return [("README.txt", "this list"), *((name, meaning) for name, meaning, _ in contents)]


class _Scrubber:
    """Takes names and paths out of text; one archive's hashes cannot be compared with another's."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self._key = secrets.token_bytes(16)
        known = {part for finding in diagnosis.findings for part in finding.private}
        if diagnosis.loaded is not None:
            given = asdict(diagnosis.loaded.settings) | dict.fromkeys(_NOT_CHOSEN_FREELY)
            known |= {str(value) for value in given.values() if isinstance(value, (str, Path))}
            known |= {str(diagnosis.loaded.file)} - {"None"}
        known |= {str(diagnosis.out)} - {"None"}
        known |= {str(Path(__file__).parents[1]), sys.prefix, str(Path.cwd())}
        known |= {str(Path.home()), socket.gethostname(), user_name()} - {"root", "rbc-edge", "localhost"}
        self._known = sorted((k for k in known if len(k) > 1), key=len, reverse=True)

    def hashed(self, name: str) -> str:
        """Returns a short number for a name, the same for the same name in one archive."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=self._key, digest_size=4)
        return digest.hexdigest()

    def __call__(self, text: str) -> str:
        """Returns the text without known names, quoted words and whatever looks like a path."""
        for name in self._known:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
        text = re.sub(r"'[^']*'|\"[^\"]*\"", "<quoted>", text)
        # To the next mark: a path may hold spaces, and a word too few does less harm than a name too many.
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
        # Words chosen by people may name a slide or a person.
        if isinstance(value, (str, Path)) and field.name not in _NOT_CHOSEN_FREELY:
            value = "given"
        where = "file" if loaded.file is not None and source.startswith(str(loaded.file)) else source
        shown[field.name] = {"value": value, "source": scrub(where)}
    return shown


def _of_results(out: Path, scrub: _Scrubber) -> list[tuple[str, str, str]]:
    """Returns what service and ledger say, as far as they can be read."""
    try:
        from rbc_edge.station.state_file import read_state  # noqa: PLC0415
        from rbc_edge.store.ledger import Ledger  # noqa: PLC0415  a broken installation has none
    except ImportError:
        return []
    found = []
    with suppress(RbcEdgeError):
        running, state = read_state(out)
        if state is not None:
            page = state.as_json() | {"running": running, "problems": len(state.problems)}
            page["source"], page["detail"] = bool(state.source), bool(state.detail)
            page["polling_reason"] = scrub(state.polling_reason)
            found.append(("service.json", "the service's last words", _json(page)))
    with suppress(RbcEdgeError), Ledger.reading(out) as ledger:
        rows = nlargest(
            _SUPPORT_ROWS,
            (row for slide in ledger.slide_ids() for row in ledger.fields(slide)),
            key=lambda row: row.analyzed_at,
        )
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        columns: tuple[str, ...] = (
            "slide",
            "fov",
            "status",
            "failure",
            "size_bytes",
            "width_px",
            "height_px",
        )
        columns += ("cell_diameter_px", "scale_source", "n_rbc_single", "n_rbc_overlapping", "n_wbc")
        columns += ("n_platelets", "quality_flags", "analyzed_at", "bundle_id", "elapsed_ms")
        table.writerow(columns)
        for row in rows:
            counts = next(iter(row.counts.values()), None)
            cells = (
                ("",) * 4
                if counts is None
                else (counts.n_rbc_single, counts.n_rbc_overlapping, counts.n_wbc, counts.n_platelets)
            )
            scale = ("", "") if row.scale is None else (f"{row.scale.cell_diameter_px:.1f}", row.scale.source)
            table.writerow(
                (
                    *(scrub.hashed(row.slide_id), scrub.hashed(row.fov), row.status, row.failure),
                    *(row.size_bytes, row.width_px, row.height_px, *scale, *cells),
                    *(";".join(row.quality_flags), row.analyzed_at, row.version.bundle_id),
                    round(row.elapsed_ms, 1),
                )
            )
        found.append(
            ("ledger.csv", f"the newest {len(rows)} rows; slides and fields by numbers", text.getvalue())
        )
    return found


def _zipped(contents: Sequence[tuple[str, str, str]]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, _, text in contents:
            archive.writestr(name, text.encode("utf-8", "backslashreplace"))
    return packed.getvalue()


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"

"""Advice fits the cause: a broken disk is no question of free space."""

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from rbc_edge.errors import UnavailableError, unavailable
from rbc_edge.store.ledger import Ledger
from rbc_edge.views.tables import Tables


def test_a_broken_disk_is_no_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, full = OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left")
    with (
        pytest.raises(UnavailableError, match="broken"),
        unavailable("x", "check permissions and free space"),
    ):
        raise broken
    with pytest.raises(UnavailableError, match="free space"), unavailable("x", "check free space"):
        raise full
    with Ledger(tmp_path) as ledger:

        def fail(_: int) -> None:
            raise broken

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(UnavailableError, match=r"cannot write slides\.csv.*broken") as caught:
            Tables(tmp_path, ledger).write()
        assert "free space" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (sqlite3.SQLITE_IOERR_READ, r"\(the disk or its cable may be broken"),
        (
            sqlite3.SQLITE_IOERR_WRITE,
            "quota; if there is enough, the disk",
        ),  # so SQLite calls a full quota, too
        (sqlite3.SQLITE_FULL, "free space on the disk"),
    ],
)
def test_so_it_is_for_the_ledger(tmp_path: Path, code: int, words: str) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    with (
        Ledger(tmp_path) as ledger,
        pytest.raises(UnavailableError, match=words),
        ledger.database.guard(),
    ):
        raise error

"""``rbc-edge review``: who is let in, and what stops it before it serves."""

import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from command_line import Run
from reviewed import count
from stand_in import TOY_BUNDLE

pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.fixture
def out(camera: Path, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    count(tmp_path / "out", camera)
    return tmp_path / "out"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where a server listened. It ends at once."""
    where: list[tuple[str, int]] = []

    def run(server: Any, sockets: list[socket.socket]) -> None:
        where.append(sockets[0].getsockname()[:2])

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return where


def test_it_prints_one_address_with_its_secret(rbc: Run, out: Path, served: list[tuple[str, int]]) -> None:
    addresses = []
    for _ in range(2):
        code, said, complained = rbc("review", "--out", out, "--bundle", TOY_BUNDLE)
        host, port = served.pop()
        assert (code, complained, host) == (0, "", "127.0.0.1")
        address, secret = said.split("?token=")
        assert address == f"http://127.0.0.1:{port}/"
        assert len(secret.strip()) > 40
        addresses.append(secret)
    assert addresses[0] != addresses[1]


def test_other_computers_need_a_password(rbc: Run, out: Path, tmp_path: Path, served: list[Any]) -> None:
    asked = ("review", "--out", out, "--bundle", TOY_BUNDLE, "--host", "0.0.0.0")
    code, _, complained = rbc(*asked)
    assert (code, "SSH tunnel" in complained) == (2, True)
    file = tmp_path / "password"
    code, _, complained = rbc(*asked, "--password-file", file)
    assert (code, str(file) in complained) == (5, True)
    file.write_text("too short\n")
    code, _, complained = rbc(*asked, "--password-file", file)
    assert (code, "12 or more" in complained) == (2, True)
    file.write_text("correct horse battery\n")
    assert not served
    code, said, complained = rbc(*asked, "--password-file", file)
    assert (code, "not encrypted" in complained) == (0, True)
    assert "token" not in said
    assert "correct" not in said + complained
    logging.getLogger("rbc_edge").handlers.clear()


def test_what_is_missing_is_said(
    rbc: Run, out: Path, tmp_path: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, complained = rbc("review", "--out", tmp_path / "nothing", "--bundle", TOY_BUNDLE)
    assert (code, "no ledger" in complained) == (5, True)
    assert not (tmp_path / "nothing").exists()
    code, _, complained = rbc("review", "--out", out, "--bundle", tmp_path / "no-bundle")
    assert (code, "threshold cannot be shown" in complained) == (0, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, complained = rbc("review", "--out", out, "--port", taken.getsockname()[1])
        assert (code, "choose another --port" in complained) == (5, True)
    monkeypatch.setitem(sys.modules, "rbc_edge.desk.server", None)
    code, _, complained = rbc("review", "--out", out)
    assert (code, 'pip install "rbc-edge[review]"' in complained) == (2, True)

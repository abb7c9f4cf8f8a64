"""Serves the review page, until it is stopped."""

import getpass
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from secrets import token_urlsafe
from typing import Final

import uvicorn

from rbc_edge.desk.app import Review
from rbc_edge.desk.guard import Guard, is_loopback
from rbc_edge.desk.review import Desk
from rbc_edge.errors import UnavailableError, UsageError, unavailable
from rbc_edge.text import path_text

log = logging.getLogger(__name__)

MIN_PASSWORD: Final = 12
"""Characters. A password can be tried from the network, five times in a minute."""


def serve(
    out: Path,
    *,
    host: str,
    port: int,
    read_only: bool,
    password_file: Path | None,
    threshold: float | None,
    shapes: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Serves the page of an output folder until a signal comes. Says its address when it can be opened.

    Raises `UsageError` for an address beyond this computer without a password, and `UnavailableError` where
    there are no results, or the port is taken.
    """
    password = "" if password_file is None else _password(password_file)
    if not is_loopback(host):
        if not password:
            what = f"--host {host}: other computers could read and change the results"
            raise UsageError(what, "give --password-file FILE, or leave --host away and use an SSH tunnel")
        log.warning(
            "other computers can reach this page and log in. It is not encrypted. Who listens"
            " in the network can read the password and the pictures. An SSH tunnel to 127.0.0.1 is safer"
        )
    desk = Desk(out, threshold=threshold, shapes=shapes)
    listening = _listening(host, port)
    with listening:
        port = int(listening.getsockname()[1])
        token = token_urlsafe(32)
        app = Review(desk, who=_user(), read_only=read_only).app()
        guard = Guard(app, token=token, port=port, host=host, password=password, read_only=read_only)
        config = uvicorn.Config(
            guard,
            log_config=None,
            log_level="warning",
            access_log=False,  # it would have the token
            server_header=False,
            proxy_headers=False,
            http="h11",
            ws="none",
            lifespan="on",
            limit_concurrency=64,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=3,
            h11_max_incomplete_event_size=16_384,
        )
        name = f"[{host}]" if ":" in host else host
        say(f"http://{name}:{port}/" + ("" if password else f"?token={token}"))
        uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        what = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        raise UnavailableError(what, "choose another --port, or leave it away") from error


def _password(file: Path) -> str:
    """Reads the first line of a file. Raises `UsageError` where it is too short for a password."""
    with unavailable(f"{path_text(file)}: cannot be read", "check its name and permissions"):
        lines = file.read_bytes()[:4096].decode("utf-8", "replace").splitlines()
    password = lines[0].strip() if lines else ""
    if len(password) < MIN_PASSWORD:
        what = f"{path_text(file)}: the password has {len(password)} characters"
        raise UsageError(what, f"give {MIN_PASSWORD} or more, on the first line")
    return password


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in this container
        return ""

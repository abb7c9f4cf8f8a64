"""What the service tells systemd: ready, status, still alive. It does nothing when systemd did not start it.

The protocol is a datagram of NAME=VALUE lines to a socket (sd_notify(3), systemd.service(5)), and a number in
angle brackets before each line of the log (sd-daemon(3)).
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_SEND_TIMEOUT_S: Final = 1.0  # systemd needs a moment to restart itself, but counting must not wait
_MAX_STATUS_CHARS: Final = 400  # `systemctl status` shows one line


class Systemd:
    """The connection to systemd. No call raises: a service manager that does not listen never stops counting.

    `env` is the environment. None: the process's. Then the variables are removed from it, so that no child
    process sends messages in the name of the service. systemd ends a service that does not call `beat` for
    `watchdog_s` seconds. None: systemd does not ask for it.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        given = dict(os.environ if env is None else env)
        if env is None:
            for name in _VARIABLES:
                os.environ.pop(name, None)
        address = given.get("NOTIFY_SOCKET", "")
        # A leading @ is the abstract namespace. Other families (vsock) are for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address[:1] in ("@", "/"):
            with suppress(OSError):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._said = ""
        self.watchdog_s = _watchdog_s(given) if self._socket else None

    def ready(self, text: str) -> None:
        """Says that the service works, after its start and after each reload; `text` is for people."""
        self._send("READY=1", f"STATUS={_without_breaks(text)}", patient=True)
        self._said = text

    def say(self, text: str) -> None:
        """Says what the service does now. Sent only when it differs from the last text."""
        if text != self._said and self._send(f"STATUS={_without_breaks(text)}"):
            self._said = text

    def beat(self) -> None:
        """Says that the main loop is alive. Only the main loop may call this."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """Says that the settings are read again. `ready` must follow, also when they are wrong."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """Says that the service is about to end."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Closes the connection. Later calls send nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str, patient: bool = False) -> bool:
        """Sends a message. When systemd does not take it, waits only if it must arrive (`patient`)."""
        if self._socket is None:
            return False
        try:
            self._socket.settimeout(_SEND_TIMEOUT_S if patient else 0.0)
            self._socket.sendto("\n".join(lines).encode("utf-8", "backslashreplace"), self._address)
        except OSError:  # also a timeout. The next beat or say tries again
            return False
        return True


def _watchdog_s(env: Mapping[str, str]) -> float | None:
    """Returns the time systemd allows between beats, seconds. None: not meant for this process."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        limit_us = int(env.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return limit_us / 1e6 if limit_us > 0 else None


def _without_breaks(text: str) -> str:
    """Removes line breaks: one would end the STATUS and begin another message."""
    return " ".join(text.split())[:_MAX_STATUS_CHARS]


def under_journal(env: Mapping[str, str] | None = None) -> bool:
    """Tells whether standard error goes directly to the journal (systemd.exec(5), ``JOURNAL_STREAM``)."""
    stream = (os.environ if env is None else env).get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or replaced by an object that is no file
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


def journal_prefix(levelno: int) -> str:
    """Returns the prefix of a log line that tells the journal its priority, for a level of `logging`."""
    levels = {logging.CRITICAL: "<2>", logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>"}
    return next((prefix for level, prefix in levels.items() if levelno >= level), "<7>")

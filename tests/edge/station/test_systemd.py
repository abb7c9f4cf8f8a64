import io
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest

from rbc_edge.station.systemd import Systemd, journal_prefix, under_journal


class Listener:
    """The other end of the connection: a real socket, as that of systemd."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def listener() -> Iterator[Listener]:
    with TemporaryDirectory() as folder:  # not tmp_path: an address holds 108 bytes
        listener = Listener(f"{folder}/notify")
        yield listener
        listener.socket.close()


@pytest.fixture
def env(listener: Listener) -> dict[str, str]:
    return {"NOTIFY_SOCKET": listener.socket.getsockname()}


def test_messages_follow_the_protocol(listener: Listener, env: dict[str, str]) -> None:
    systemd = Systemd(env | {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())})
    assert systemd.watchdog_s == 3.0
    systemd.ready("started")
    systemd.beat()
    systemd.stopping()
    assert listener.heard() == ["READY=1\nSTATUS=started", "WATCHDOG=1", "STOPPING=1"]
    systemd.close()


def test_an_abstract_socket(listener: Listener) -> None:
    name = f"rbc-edge-{uuid4().hex}"
    abstract = Listener(f"\0{name}")
    systemd = Systemd({"NOTIFY_SOCKET": f"@{name}"})
    systemd.ready("started")
    assert abstract.heard() == ["READY=1\nSTATUS=started"]
    assert listener.heard() == []
    systemd.close()
    abstract.socket.close()


def test_the_same_is_said_once(listener: Listener, env: dict[str, str]) -> None:
    systemd = Systemd(env)
    systemd.ready("started")
    for text in ("started", "counting", "counting", "up to date"):
        systemd.say(text)
    assert listener.heard()[1:] == ["STATUS=counting", "STATUS=up to date"]
    systemd.close()


def test_a_name_with_a_line_break_cannot_send_a_message_of_its_own(
    listener: Listener, env: dict[str, str]
) -> None:
    systemd = Systemd(env)
    systemd.say("counting a\nSTOPPING=1\udc80")
    assert listener.heard() == ["STATUS=counting a STOPPING=1\\udc80"]
    systemd.close()


def test_reloading_carries_the_monotonic_time(listener: Listener, env: dict[str, str]) -> None:
    systemd = Systemd(env)
    before = time.monotonic_ns() // 1000
    systemd.reloading()
    (message,) = listener.heard()
    first, second = message.split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    systemd.close()


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_no_beat_where_none_is_asked_for(
    listener: Listener, env: dict[str, str], variables: dict[str, str], watchdog_s: float | None
) -> None:
    systemd = Systemd(env | variables)
    assert systemd.watchdog_s == watchdog_s
    systemd.beat()
    assert listener.heard() == ([] if watchdog_s is None else ["WATCHDOG=1"])
    systemd.close()


def everything(systemd: Systemd) -> None:
    systemd.ready("started")
    systemd.say("counting")
    systemd.beat()
    systemd.reloading()
    systemd.stopping()


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "/nowhere/notify", "@rbc-edge-nobody-listens"])
def test_a_missing_listener_does_no_harm(address: str) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    everything(systemd)
    systemd.close()
    everything(systemd)


def test_what_did_not_arrive_is_said_again(listener: Listener, env: dict[str, str]) -> None:
    systemd = Systemd(env)
    there = Path(env["NOTIFY_SOCKET"])
    away = there.rename(there.with_name("away"))
    systemd.say("counting")
    away.rename(there)
    systemd.say("counting")
    assert listener.heard() == ["STATUS=counting"]
    systemd.close()


def test_children_do_not_speak_in_our_name(
    listener: Listener, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (env | {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}).items():
        monkeypatch.setenv(name, value)
    systemd = Systemd()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    systemd.beat()
    assert listener.heard() == ["WATCHDOG=1"]
    systemd.close()


def test_the_journal_is_known_by_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stream").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        status = os.fstat(stream.fileno())
        ours = f"{status.st_dev}:{status.st_ino}"
        assert under_journal({"JOURNAL_STREAM": ours})
        assert not under_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
        assert not under_journal({})
        monkeypatch.setenv("JOURNAL_STREAM", ours)
        assert under_journal()
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert not under_journal()


def test_priorities() -> None:
    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
    assert [journal_prefix(level) for level in levels] == ["<7>", "<6>", "<4>", "<3>", "<2>"]

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from command_line import TOY, Run, process, rows
from stand_in import TOY_BUNDLE

pytestmark = pytest.mark.usefixtures("own_settings")


def test_watch_once_counts_and_says_a_line_an_image(camera: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (camera / "s1" / "broken.png").write_bytes(b"no image")
    for path in camera.rglob("*.png"):
        os.utime(path, (1, 1))  # as old as a camera's files mostly are
    service = process("watch", camera, "--out", out, "--once", *TOY)
    _, said = service.communicate(timeout=60)
    assert service.returncode == 3
    assert [row["status"] for row in rows(out / "s1.csv")] == ["ok", "ok", "ok", "failed"]
    lines = said.decode().splitlines()
    assert sum(" INFO ok s1/" in line for line in lines) == 3
    assert sum(" WARNING failed (not-an-image)" in line for line in lines) == 1


def test_watch_leaves_on_a_signal_and_speaks_to_systemd(camera: Path, tmp_path: Path) -> None:
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(60)
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
    service = process("watch", camera, "--out", tmp_path / "out", "--settle-s", 0, *TOY, **environment)
    try:
        said = ""
        while "up to date; 3 counted" not in said:
            said += systemd.recv(10_000).decode() + "\n"
        assert "READY=1" in said
        assert "WATCHDOG=1" in said
        service.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in said:
            said += systemd.recv(10_000).decode() + "\n"
        assert service.wait(timeout=60) == 143
    finally:
        service.kill()
        service.communicate()
        systemd.close()
    assert len(rows(tmp_path / "out" / "s1.csv")) == 3


def test_watch_without_a_place_is_usage_and_with_a_wrong_bundle_is_4(
    rbc: Run, camera: Path, tmp_path: Path
) -> None:
    code, _, said = rbc("watch", "--out", tmp_path / "out")
    assert (code, "no source folder" in said) == (2, True)
    code, _, said = rbc("watch", camera)
    assert (code, "no output folder" in said) == (2, True)
    code, _, said = rbc("watch", camera, "--out", camera / "out", *TOY)
    assert (code, "lies inside the source" in said) == (2, True)
    code, _, said = rbc("watch", camera, "--out", tmp_path / "out", "--bundle", tmp_path)
    assert code == 4
    assert not (tmp_path / "out").exists()


def test_watch_takes_its_settings_from_a_file(camera: Path, tmp_path: Path) -> None:
    for path in camera.rglob("*.png"):
        os.utime(path, (1, 1))
    file = tmp_path / "config.toml"
    bundle = json.dumps(str(TOY_BUNDLE))
    file.write_text(
        f'source = "camera"\nout = "out"\nbundle = {bundle}\ncell_diameter = 40\npolling = true\n'
    )
    service = process("watch", "--once", "--config", file)
    _, said = service.communicate(timeout=60)
    assert service.returncode == 0, said.decode()
    assert b"polling every 10 s: as the settings say" in said
    assert len(rows(tmp_path / "out" / "s1.csv")) == 3

"""Checks the service inside a running Debian. ``debian_tree.py --boot`` puts this file there.

It runs as root with the Python of the system, before and after a power cut. It writes its lines to the second
serial port: ``ok``, ``FAILED`` or ``info``, and ``POWER CUT NOW`` to ask for the power cut. The slides are in
``/root/images``, single images in ``/root/extra``. `rbc-edge run` gives the expected counts.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Final

IMAGES: Final = Path("/root/images")
EXTRA: Final = Path("/root/extra")
EXPECTED: Final = Path("/root/expected")
CAMERA: Final = Path("/srv/camera")
RESULTS: Final = Path("/var/lib/rbc-edge")
SETTINGS: Final = Path("/etc/rbc-edge/config.toml")
PHASE: Final = Path("/root/phase")
DROP_IN: Final = Path("/run/systemd/system/rbc-edge.service.d/50-check.conf")
RELEASE: Final = Path("/root/release")

CUT: Final = "POWER CUT NOW"
_TIMES: Final = {"analyzed_at", "elapsed_ms"}
_BAD_WORDS: Final = (
    "traceback|affinity|not permitted|unexpected|error|permission denied|read-only|gpu|warning|cpuinfo"
)


class Console:
    """The serial port to the program outside."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def say(self, word: str, what: str, shown: object = "") -> None:
        """Sends a line."""
        print(f"{word:6}  {what}{f': {shown}' if shown != '' else ''}", file=self._stream, flush=True)

    def check(self, what: str, holds: bool, shown: object = "") -> bool:
        """Sends one check."""
        self.say("ok" if holds else "FAILED", what, shown)
        return holds


def sh(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command. Returns its output, stderr with stdout."""
    return subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def show(name: str) -> str:
    """A property of the service."""
    return sh("systemctl", "show", "--property", name, "--value", "rbc-edge").stdout.strip()


def pid() -> str:
    """Process id of the service."""
    return show("MainPID")


def is_ready() -> bool:
    """Whether the service has said READY and runs."""
    return show("ActiveState") == "active" and show("SubState") == "running"


_PATIENCE: Final = 8  # an emulated processor is about fifty times slower than a real one


def within(limit_s: float, holds: Callable[[], bool]) -> float | None:
    """Waits until something is true. Returns the seconds that took, or None when it never was."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < limit_s * _PATIENCE:
        if holds():
            return time.monotonic() - started_s
        time.sleep(0.1)
    return None


def rows(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Every field of view in the tables of all slides, without times."""
    found = {}
    for file in sorted(folder.glob("*.csv")):
        if file.name != "slides.csv":
            with file.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream):
                    kept = {k: v for k, v in row.items() if k not in _TIMES and k != "path"}
                    found[row["slide_id"], row["fov"]] = kept
    return found


def camera_writes(slides: Iterable[str]) -> int:
    """Copies slides into the camera's folder. Returns the number of images."""
    n = 0
    for slide in slides:
        shutil.copytree(IMAGES / slide, CAMERA / slide)
        n += sum(1 for _ in (IMAGES / slide).iterdir())
    return n


def journal(since: str = "") -> str:
    """The log of the service."""
    after = [f"--after-cursor={since}"] if since else []
    return sh("journalctl", "--unit=rbc-edge", "--no-pager", "--output=cat", *after).stdout


def cursor() -> str:
    """The current place in the journal."""
    last = sh("journalctl", "--lines=1", "--output=json", "--no-pager").stdout
    return str(json.loads(last)["__CURSOR"])


def drop_in(*lines: str) -> None:
    """Changes the unit until the next start of the machine. Without lines: as it is shipped."""
    if lines:
        DROP_IN.parent.mkdir(parents=True, exist_ok=True)
        DROP_IN.write_text("\n".join(("[Service]", *lines)) + "\n")
    else:
        DROP_IN.unlink(missing_ok=True)
    sh("systemctl", "daemon-reload")


def cgroup(name: str) -> str:
    """A value of the control group of the service."""
    file = Path(f"/sys/fs/cgroup{show('ControlGroup')}/{name}")
    return file.read_text().strip() if file.exists() else "-"


def life(to: Console) -> None:
    """All checks before the power cut."""
    slides = iter(sorted(path.name for path in IMAGES.iterdir()))
    n_images = 0

    def more(n: int) -> int:
        nonlocal n_images
        n_images += camera_writes(next(slides) for _ in range(n))
        return n_images

    def counted() -> int:
        return len(rows(RESULTS))

    # -- start
    took_s = within(120, is_ready)
    to.check("the unit starts with the machine and says READY", took_s is not None, show("StatusText"))
    if took_s is None:
        to.say("info", "journal", journal()[-3000:])
        return
    exposure = sh("systemd-analyze", "security", "--no-pager", "rbc-edge").stdout
    to.say("info", "systemd-analyze security", exposure.strip().splitlines()[-1])
    status = Path(f"/proc/{pid()}/status").read_text()
    confined = [re.search(rf"^{key}:\s*(\w+)$", status, re.M) for key in ("Seccomp", "NoNewPrivs", "CapBnd")]
    values = [match[1] if match else "-" for match in confined]
    to.check("it runs under the filter, without privileges", values == ["2", "1", "0" * 16], values)
    to.check("memory and processor are limited", cgroup("memory.max").isdigit(), cgroup("cpu.max"))
    interfaces = sh("nsenter", "--net", "--target", pid(), "ls", "/sys/class/net").stdout.split()
    to.say("info", "network interfaces it sees (from the host's /sys)", interfaces)
    to.check("it has no route anywhere", Path(f"/proc/{pid()}/net/route").read_text().count("\n") <= 1)

    # -- counting
    here = cursor()
    started_s = time.monotonic()
    more(1)
    took_s = within(60, lambda: counted() == n_images)
    to.check("images are counted", took_s is not None, f"{counted()} of {n_images} in {took_s or 0:.1f} s")
    (CAMERA / "late").mkdir()
    shutil.copy(EXTRA / "late.png", CAMERA / "late" / "late.png")
    n_images += 1
    took_s = within(30, lambda: counted() == n_images)
    to.check("one more image shows in the table", took_s is not None, f"{took_s or 99:.2f} s")
    to.say("info", "since the first file", f"{time.monotonic() - started_s:.1f} s")
    bad = [line for line in journal(here).splitlines() if re.search(_BAD_WORDS, line, re.I)]
    to.check("the log has no complaint", not bad, bad[:5] or "")
    to.say("info", "a line of the journal", journal(here).strip().splitlines()[-1:])
    to.say("info", "memory now, most, processes", [cgroup(f"{n}.current") for n in ("memory", "pids")])
    to.say("info", "memory.peak", cgroup("memory.peak"))
    seccomp = sh("journalctl", "--dmesg", "--no-pager", "--output=cat", "--grep", "seccomp|SIGSYS").stdout
    to.say("info", "the kernel on system calls", seccomp.strip()[-200:])

    # -- who can read the results
    sh("useradd", "--groups", "rbc-edge", "reader")
    sh("useradd", "stranger")
    may, may_not = (
        sh("runuser", "-u", name, "--", "cat", str(RESULTS / "slides.csv")).returncode
        for name in ("reader", "stranger")
    )
    to.check("only the group can read the results", (may, may_not != 0) == (0, True))
    for name in ("reader", "root"):
        said = sh("runuser", "-u", name, "--", "rbc-edge", "status", "--out", str(RESULTS))
        to.check(f"rbc-edge status as {name}", said.returncode == 0, said.stdout.strip().splitlines()[:2])

    # -- changed settings
    text = SETTINGS.read_text()
    before, here = pid(), cursor()
    SETTINGS.write_text(f"{text}\ncells = true\n")
    said = sh("systemctl", "reload", "rbc-edge")
    took_s = within(20, lambda: "new settings taken" in journal(here) and is_ready())
    holds = (said.returncode, pid()) == (0, before) and took_s is not None
    to.check("systemctl reload takes new settings", holds, "" if holds else said.stdout + journal(here))
    shown = within(20, (RESULTS / "cells" / "slide-00.csv").exists)
    to.check("they change the existing tables, too", shown is not None)
    here = cursor()
    SETTINGS.write_text(f"{text}\ntreads = 2\n")
    sh("systemctl", "reload", "rbc-edge")
    took_s = within(20, lambda: "old ones hold" in journal(here))
    to.check("wrong settings are refused", took_s is not None and is_ready() and pid() == before)
    here = cursor()
    done = sh("systemctl", "restart", "rbc-edge").returncode
    time.sleep(25)  # two and a half times RestartSec
    values = [show("ActiveState"), show("NRestarts"), show("ExecMainStatus")]
    to.check("a start with wrong settings fails once", done != 0 and values == ["failed", "0", "2"], values)
    to.say("info", "the journal says", journal(here).strip().splitlines()[:3])
    SETTINGS.write_text(text)
    to.check("it starts with correct settings", sh("systemctl", "start", "rbc-edge").returncode == 0)

    # -- stopping and restarting
    more(2)
    within(30, lambda: counted() > n_images - 10)
    before = pid()
    sh("systemctl", "kill", "--signal=SIGKILL", "rbc-edge")
    took_s = within(60, lambda: is_ready() and pid() != before)
    to.check("after SIGKILL it starts again", took_s is not None, f"after {took_s or 0:.1f} s")
    before = pid()
    os.kill(int(before), 15)
    took_s = within(60, lambda: is_ready() and pid() != before)
    to.check(
        "after a SIGTERM of another program it starts again", took_s is not None, f"after {took_s or 0:.1f} s"
    )
    took_s = within(60, lambda: counted() == n_images)
    to.check("every image is counted", took_s is not None, f"{counted()} of {n_images}")
    more(2)
    within(30, lambda: counted() > n_images - 10)
    started_s = time.monotonic()
    sh("systemctl", "stop", "rbc-edge")
    took_s = time.monotonic() - started_s
    values = [show("ActiveState"), show("Result"), show("ExecMainStatus")]
    to.check(
        "systemctl stop, while it counts, within 10 s",
        took_s < 10 and values == ["inactive", "success", "143"],
        f"{took_s:.2f} s, {values}",
    )
    time.sleep(15)
    to.check("it stays stopped", show("ActiveState") == "inactive")

    # -- the watchdog
    drop_in("WatchdogSec=20")
    sh("systemctl", "start", "rbc-edge")
    before = pid()
    os.kill(int(before), 19)
    took_s = within(90, lambda: is_ready() and pid() != before)
    to.check("a process that hangs is restarted", took_s is not None, f"after {took_s or 0:.1f} s")
    within(60, lambda: counted() == n_images)
    before = pid()
    time.sleep(60)
    to.check("it stays alive when idle for three times WatchdogSec", pid() == before)

    # -- folders that come and go
    here = cursor()
    sh("mount", "-t", "tmpfs", "tmpfs", str(CAMERA))
    took_s = within(40, lambda: "source away" in show("StatusText"))
    to.check(
        "a file system mounted over the camera's folder is noticed", took_s is not None, show("StatusText")
    )
    sh("umount", str(CAMERA))
    took_s = within(60, lambda: "up to date" in show("StatusText"))
    to.check("it goes on after the unmount", took_s is not None, show("StatusText"))
    (CAMERA / "share").mkdir()
    sh("mount", "-t", "tmpfs", "tmpfs", str(CAMERA / "share"))
    shutil.copy(EXTRA / "share.png", CAMERA / "share")
    took_s = within(60, lambda: ("share", "share") in rows(RESULTS))
    to.check("a share mounted after the start is counted", took_s is not None, f"{took_s or 0:.1f} s")
    done = sh("umount", str(CAMERA / "share")).returncode
    to.check("it can be unmounted", done == 0)

    # -- an image that needs too much memory
    least = int(cgroup("memory.current"))
    drop_in("MemoryMax=260M", "MemoryHigh=infinity", "MemorySwapMax=0")
    sh("systemctl", "restart", "rbc-edge")
    to.say("info", "memory before, at MemoryMax=260M", [least, cgroup("memory.current")])
    here = cursor()
    shutil.copy(EXTRA / "huge.png", CAMERA / "late" / "huge.png")
    shutil.copy(EXTRA / "after.png", CAMERA / "late" / "after.png")
    took_s = within(200, lambda: rows(RESULTS).get(("late", "huge"), {}).get("failure") == "crash")
    to.check("an image that needs too much memory fails", took_s is not None, f"after {took_s or 0:.1f} s")
    took_s = within(60, lambda: rows(RESULTS).get(("late", "after"), {}).get("status") == "ok")
    to.check("the next image is counted", took_s is not None and is_ready(), f"restarts {show('NRestarts')}")
    to.say("info", "the journal", [x for x in journal(here).splitlines() if "ok " not in x][:20])
    drop_in()
    (CAMERA / "late" / "huge.png").unlink()
    sh("systemctl", "restart", "rbc-edge")

    # -- a camera's folder under /home
    home = Path("/home/lab/camera")
    (home / "home-slide").mkdir(parents=True)
    Path("/home/lab").chmod(0o755)
    shutil.copy(EXTRA / "home.png", home / "home-slide" / "home.png")
    SETTINGS.write_text(text.replace('"/srv/camera"', f'"{home}"'))
    (wheel,) = RELEASE.glob("rbc_edge-*.whl")
    install = (str(RELEASE / "deploy/install.sh"), str(wheel), "--wheels", str(RELEASE / "wheels"))
    said = sh(*install)
    took_s = within(60, lambda: ("home-slide", "home") in rows(RESULTS))
    to.check(
        "a camera's folder under /home", took_s is not None and said.returncode == 0, f"{took_s or 0:.1f} s"
    )
    to.check("its drop-in verifies", sh("systemd-analyze", "verify", "rbc-edge.service").stdout == "")
    SETTINGS.write_text(text)
    said = sh(*install)
    to.check(
        "an upgrade while it runs", said.returncode == 0 and is_ready(), said.stdout.strip().splitlines()[1:]
    )

    # -- the power cut
    PHASE.write_text("cut")
    os.sync()
    n_before = counted()
    more(2)
    within(30, lambda: counted() > n_before + 3)
    to.say("info", "counted at the power cut", f"{counted()} of {n_images} on the slides")
    to.say(CUT, "")
    time.sleep(600)


def afterwards(to: Console) -> None:
    """All checks after the power cut."""
    took_s = within(120, is_ready)
    to.check("after a power cut it starts by itself", took_s is not None, show("StatusText"))
    for slide in sorted(path.name for path in IMAGES.iterdir()):
        # Images that had not reached the disk are written again, as a camera would.
        shutil.copytree(IMAGES / slide, CAMERA / slide, dirs_exist_ok=True)
    # Counted here, not outside: another processor rounds differently, and a cell at a threshold can change.
    said = sh("rbc-edge", "run", str(IMAGES), "--out", str(EXPECTED), "--config", str(SETTINGS))
    to.check(
        "rbc-edge run while the service runs", said.returncode == 0, said.stdout.strip().splitlines()[-1:]
    )
    expected = rows(EXPECTED)
    took_s = within(120, lambda: set(expected) <= set(rows(RESULTS)))
    # A file may have been read between the power cut and its second writing. Wait until all are correct.
    within(60, lambda: all(rows(RESULTS).get(key) == row for key, row in expected.items()))
    found = rows(RESULTS)
    wrong = {key: (row, found.get(key)) for key, row in expected.items() if found.get(key) != row}
    to.check("every image is counted once", took_s is not None, f"{len(expected)} images")
    to.check("the counts are those of rbc-edge run", not wrong, f"{len(wrong)} differ" if wrong else "")
    for key, (right, got) in list(wrong.items())[:3]:
        differing = {k: (v, (got or {}).get(k)) for k, v in right.items() if (got or {}).get(k) != v}
        to.say("info", f"{key}", differing)
    bad = [line for line in journal().splitlines() if re.search("damage|traceback|unexpected", line, re.I)]
    to.check("the ledger is undamaged", not bad, bad[:3] or "")
    owners = {path.stat().st_uid for path in RESULTS.rglob("*")}
    to.check("the results belong to the service", owners == {RESULTS.stat().st_uid}, owners)
    to.say(
        "info", "systemctl status", sh("systemctl", "status", "--no-pager", "--lines=0", "rbc-edge").stdout
    )
    to.say("info", "rbc-edge status", sh("rbc-edge", "status", "--out", str(RESULTS)).stdout)


def main() -> None:
    """Runs the checks of this start, and switches the machine off."""
    with open(sys.argv[1], "w", encoding="utf-8", errors="backslashreplace") as stream:  # noqa: PTH123 -- a device
        to = Console(stream)
        try:
            if PHASE.exists():
                afterwards(to)
            else:
                life(to)
        except Exception as error:  # noqa: BLE001 -- any error must be seen outside
            to.check("the checks ran to their end", False, f"{type(error).__name__}: {error}")
        to.say("info", "the end")
    os.sync()
    subprocess.run(["systemctl", "poweroff", "--force"], check=False)


if __name__ == "__main__":
    main()

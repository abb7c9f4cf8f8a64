"""The service under test as a real process, its folders, and the result of a scenario."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import verdict
from tests.faults.checkpoints import resolved
from tests.faults.pictures import (
    CELL_DIAMETER_PX,
    TOY_BUNDLE,
    Counts,
    Picture,
    clean_environment,
    reference,
    sha256,
)
from tests.faults.verdict import Expected, Verdict

PLUGIN = Path(__file__).resolve().parent / "plugin"

# Root without the right to ignore permissions.
_PLAIN_USER = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--")

SCAN_EVERY_S = 1.0
SETTLE_S = 0.3
GRACE_S = 4.0

_LOOK_EVERY_S = 0.05


class SkippedError(Exception):
    """The machine cannot do what the scenario needs. The message says why."""


class BrokenError(Exception):
    """The service died, hung or said something wrong. No count shows this."""


@dataclass(slots=True)
class Result:
    """What a scenario found.

    Attributes:
        n_images: Images that had to be counted, in all rounds.
        verdict: What was not right.
        remark: A few words for the table.
    """

    n_images: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    remark: str = ""

    def judged(self, out: Path, expected: Expected, where: str = "") -> None:
        """Judges an output folder and adds the verdict."""
        self.n_images += expected.n_images
        self.verdict.add(verdict.judge(out, expected), where)

    def check(self, is_right: bool, message: str) -> None:
        """Adds something that no table shows as wrong, unless it is right."""
        if not is_right:
            self.verdict.note("wrong", message)


def wait_for(what: Callable[[], bool], timeout_s: float) -> bool:
    """Waits until `what` is true. Returns False when the time is over before."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if what():
            return True
        time.sleep(_LOOK_EVERY_S)
    return what()


class Bench:
    """The folder, the pictures and the random numbers of one scenario.

    Attributes:
        folder: Its own folder, empty at the start.
        chance: Its own random numbers.
        is_short: Whether to run the shorter form.
        jpegs: The pictures that are JPEG files.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture], *, seed: int, is_short: bool) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.is_short = is_short
        self.jpegs = [p for p in pictures if p.data.startswith(b"\xff\xd8")]
        self._pictures = pictures
        self._n = 0
        self._stations: list[Station] = []

    def close(self) -> None:
        """Ends all processes of the scenario, also after an error."""
        for station in self._stations:
            station.kill()

    def image(self, *, jpeg: bool = True) -> tuple[str, bytes, Counts]:
        """A new image with content of its own: name, bytes, counts."""
        self._n += 1
        pictures = self.jpegs if jpeg else self._pictures
        picture = pictures[self._n % len(pictures)]
        suffix = ".jpg" if picture.data.startswith(b"\xff\xd8") else ".png"
        return f"fov{self._n:06}{suffix}", picture.variant(f"{self.folder.name} {self._n}"), picture.counts

    def put(self, folder: Path, n: int, expected: Expected | None = None, *, jpeg: bool = True) -> list[Path]:
        """Writes `n` new images into the folder of a slide, and adds them to `expected`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for _ in range(n):
            name, data, counts = self.image(jpeg=jpeg)
            paths.append(folder / name)
            paths[-1].write_bytes(data)
            if expected is not None:
                expected.images[folder.name][sha256(data)] = counts
        return paths

    def station(self, name: str = "", *options: object, **kind: "str | int | bool | None") -> "Station":
        """A station of this scenario. Missing folders are made."""
        base = self.folder / name if name else self.folder
        source = base / "camera"
        source.mkdir(parents=True, exist_ok=True)
        return self.own(
            Station(source, base / "results", base, options=tuple(map(str, options)), **kind)  # type: ignore[arg-type]
        )

    def own(self, station: "Station") -> "Station":
        """Makes `close` end the process of this station."""
        self._stations.append(station)
        return station

    def reference(self, source: Path, *options: object, name: str = "whole") -> Path:
        """Counts a folder without interruption and returns the output folder."""
        out = self.folder / f"{name}-{source.name}"
        done = reference(source, out, *options)
        if done.returncode not in (0, 3):
            raise BrokenError(f"the uninterrupted run ended with {done.returncode}: {done.stderr}")
        return out


class Station:
    """`rbc-edge watch` on a camera's folder. It can be started many times.

    Attributes:
        source: The camera's folder.
        out: The output folder.
        log: The log of all its processes.
        process: The running process, or None.
        env: More environment variables for the next start.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        base: Path,
        *,
        options: Sequence[str] = (),
        scale: bool = True,
        is_plain_user: bool = False,
        min_free_mb: int = 1,
    ) -> None:
        self.source, self.out = source, out
        self.log = base / "log.txt"
        self._temporary = base / "tmp"
        self._temporary.mkdir(exist_ok=True)
        self.config = base / "config.toml"
        if not self.config.exists():
            self.config.write_text("", encoding="utf-8")
        self.process: subprocess.Popen[bytes] | None = None
        self.env: dict[str, str] = {}
        self._prefix = _PLAIN_USER if is_plain_user and os.geteuid() == 0 else ()
        self.options = [
            *("--bundle", str(TOY_BUNDLE), "--threads", "1", "--config", str(self.config)),
            *("--scan-every-s", f"{SCAN_EVERY_S:g}", "--settle-s", f"{SETTLE_S:g}"),
            *("--grace-s", f"{GRACE_S:g}", "--min-free-mb", f"{min_free_mb}"),
            *(("--cell-diameter", str(CELL_DIAMETER_PX)) if scale else ()),
            *options,
        ]

    # -- the process ------------------------------------------------------------------------------------

    def watch_command(self, *options: str) -> list[str]:
        """The command line of the service."""
        watch = [sys.executable, "-m", "rbc_edge", "watch", str(self.source), "--out", str(self.out)]
        return [*watch, *self.options, *options]

    def start(self, *options: str, faults: Sequence[Mapping[str, object]] = ()) -> None:
        """Starts the service, with `faults` installed (see `checkpoints.resolved`)."""
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, *self.watch_command(*options)],
                env=self.environment(faults),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def environment(self, faults: Sequence[Mapping[str, object]] = ()) -> dict[str, str]:
        """The environment variables of the processes."""
        env = clean_environment() | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self._temporary)} | self.env
        if faults:
            env["PYTHONPATH"] = f"{PLUGIN}:{env['PYTHONPATH']}"
            env["FAULT_PLAN"] = json.dumps([resolved(fault) for fault in faults])
        return env

    def command(self, *arguments: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs another command of the program while the service runs."""
        return subprocess.run(
            [*self._prefix, sys.executable, "-m", "rbc_edge", *map(str, arguments)],
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    @property
    def pid(self) -> int:
        """Process id of the running service."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Sends the service a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def ended(self, timeout_s: float) -> int | None:
        """Waits for the end of the process. Returns its exit code, or None when it still runs."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self.process = None
        return code

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Sends SIGKILL to the service and all its children, as a power cut ends them."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> int:
        """Sends SIGTERM, as systemd does. Returns the exit code."""
        self.signal(signal.SIGTERM)
        code = self.ended(30)
        if code is None:
            self.kill()
            raise BrokenError(f"still running 30 s after SIGTERM. Its last words: {self.said_last()}")
        return code

    def drain(self, timeout_s: float = 300.0) -> int:
        """Runs the service with --once to its end. Returns the exit code."""
        self.start("--once")
        code = self.ended(timeout_s)
        if code is None:
            self.kill()
            raise BrokenError(f"--once has not ended after {timeout_s:g} s: {self.said_last()}")
        return code

    # -- the log ----------------------------------------------------------------------------------------

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def said_last(self) -> str:
        """The last lines of the log."""
        return " | ".join(self.said().splitlines()[-3:])

    def state(self) -> dict[str, object]:
        """The output of ``rbc-edge status --json`` now."""
        done = self.command("status", "--json", "--out", self.out, "--config", self.config)
        try:
            found = json.loads(done.stdout)
        except json.JSONDecodeError as error:
            raise BrokenError(f"status --json ended with {done.returncode}: {done.stderr}") from error
        assert isinstance(found, dict)
        return found

    # -- waiting ----------------------------------------------------------------------------------------

    def wait_counted(self, n: int, *, failed: int = 0, timeout_s: float = 120.0) -> bool:
        """Waits until that many fields are counted and failed. Returns False when the time is over."""

        def there() -> bool:
            if not self.is_alive:
                raise BrokenError(
                    f"the service died ({self.process and self.process.poll()}): {self.said_last()}"
                )
            return verdict.n_counted(self.out) >= n and verdict.n_failed(self.out) >= failed

        return wait_for(there, timeout_s)

    def wait_said(self, words: str, timeout_s: float = 60.0) -> bool:
        """Waits until the log has these words."""
        return wait_for(lambda: words in self.said(), timeout_s)

    def finish(self, n: int, *, failed: int = 0, timeout_s: float = 120.0) -> int:
        """Waits for the counts, then a little longer for doubled ones, and stops the service."""
        self.wait_counted(n, failed=failed, timeout_s=timeout_s)
        time.sleep(2 * SCAN_EVERY_S + SETTLE_S)
        if not self.is_alive:
            raise BrokenError(f"the service died: {self.said_last()}")
        return self.stop()


class Notified:
    """Plays systemd at the other end of NOTIFY_SOCKET.

    Attributes:
        path: The socket.
        messages: Received lines, each with its time of arrival (monotonic, seconds).
    """

    def __init__(self, folder: Path, *, listens: bool = True) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(0.2)
        self.messages: list[tuple[float, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        if listens:  # without a reader the kernel keeps ten messages
            self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                data = self._socket.recv(65536)
                self.messages += [(time.monotonic(), line) for line in data.decode().splitlines()]

    def heard(self, line: str) -> bool:
        """Whether this line was received."""
        return any(line == came for _, came in list(self.messages))

    def close(self) -> None:
        """Closes the socket."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()


# -- what the machine can do ----------------------------------------------------------------------------


def need_root() -> None:
    """Skips the scenario without root, which is needed to mount."""
    if os.geteuid() != 0:
        raise SkippedError("needs root")


def mount(*arguments: str) -> None:
    """Mounts, or skips the scenario if this machine cannot."""
    need_root()
    if shutil.which("mount") is None:
        raise SkippedError("there is no mount command")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"this machine cannot mount: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Unmounts lazily: a share that disappears does not wait for open files."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a small file system in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size},mode=755", "rbc-edge-faults", str(folder))
    try:
        yield folder
    finally:
        unmount(folder)

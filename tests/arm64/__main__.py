"""Tests the release on Arm: ``make test-arm64``, or ``python -m tests.arm64`` in the repository, as root.

A Debian arm64 runs under qemu, once with the processor of a Raspberry Pi 4 and once with that of a Pi 5. The
release is installed there with its own script. Then the tests of the station and the demo run, except the
tests in `LEFT_OUT`. At last the same wheel counts the same fields of view there and on this computer. The
differences are listed and must be within `LIMITS`.

The Debian is kept (``$XDG_CACHE_HOME/rbc-edge``), so that a second run is faster. Without root, debootstrap
or qemu the program says so, and its exit code is 0. Everything that it mounts or registers ends with it.
"""

import argparse
import csv
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from rbc_edge.ops.synthetic import CREAM, GREY, ROSE, draw_slide
from rbc_edge.values import CellClass
from rbc_edge.vision.bundle import Bundle
from tests.arm64.comparison import COLUMNS, Comparison, compare, read
from tests.debian import (
    ROOT,
    MissingError,
    Proof,
    Tree,
    for_python,
    make_tree,
    need,
    pip,
    put_release,
    temporary_folder,
)

QEMU: Final = "qemu-aarch64-static"
MACHINE: Final = "aarch64"
SUITE: Final = "bookworm"  # Raspberry Pi OS is based on it
STEPS: Final = ("tests", "demo", "counts")

# ELF, 64 bit, little-endian, executable or shared object, for aarch64, as in the binfmt file of qemu.
_MAGIC: Final = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK: Final = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"

_FIELDS_ROUNDED: Final = 6
_SEEN: Final = 0.3  # below this the detector sees nothing, and scores do not change

_PYTHON: Final = "/opt/rbc-edge/current/bin/python"
_TESTING: Final = ("pytest", "pytest-timeout", "prometheus-client")


@dataclass(frozen=True, slots=True)
class Computer:
    """A computer to emulate.

    Attributes:
        name: Its name.
        cpu: Name of its processor in qemu.
        features: Features of the processor that qemu emulates, by their names in the kernel.
        part: Number of the processor in ``/proc/cpuinfo``.
        variant: Variant of the processor.
        revision: Revision of the processor.
    """

    name: str
    cpu: str
    features: str
    part: str
    variant: str
    revision: int

    def cpuinfo(self, cores: int) -> str:
        """Content of ``/proc/cpuinfo`` there.

        qemu shows the file of the host. ONNX Runtime looks for the fields of aarch64 in it, finds none and
        crashes.
        """
        return "".join(
            f"processor\t: {i}\nBogoMIPS\t: 108.00\nFeatures\t: {self.features}\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: {self.variant}\nCPU part\t: {self.part}\n"
            f"CPU revision\t: {self.revision}\n\n"
            for i in range(cores)
        )


COMPUTERS: Final = {
    "pi4": Computer("Raspberry Pi 4", "cortex-a72", "fp asimd evtstrm crc32 cpuid", "0xd08", "0x0", 3),
    "pi5": Computer(
        "Raspberry Pi 5",
        "cortex-a76",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "0xd0b",
        "0x4",
        1,
    ),
}
"""The Pi 5 has the int8 dot product (asimddp) and the Pi 4 has not, so they use different kernels."""

_DOT_PRODUCT: Final = "import ctypes; print(bool(ctypes.CDLL(None).getauxval(16) & 1 << 20))"
"""Checks in the same way as ONNX Runtime: AT_HWCAP, HWCAP_ASIMDDP."""

LEFT_OUT: Final = {
    "test_synthetic.py": "draws for minutes; the demo counts what it draws",
    "test_demo.py": "the demo itself runs here",
    "test_cli.py": "starts a process for each test, which takes ten seconds",
    "test_bad_input.py": "the same",
    "test_sandbox.py": "the same",
}
"""Tests of the station that do not run here, with the reason."""


# The limits were chosen after the first measurement (docs/hardware.md). The last bits of a float depend on
# the order of a sum, and the int8 network turns them into steps. So the scores change by 0.01 to 0.02, up or
# down, and about two cells in a hundred have a score so near to the threshold that they appear or disappear.
# N such changes, each up or down, change a sum by about sqrt(N).
LIMITS: Final = {
    "sum": (0.01, "red cells in all, relative difference"),  # 18 changes in 1,000 cells: sqrt is 0.4 %
    "share": (0.01, "overlapping share of the red cells, difference"),
    "field": (3, "any count of any field of view, difference in cells"),
    "clear": (0.15, "score above the threshold of a red cell that only one sees"),  # as in `bundle verify`
    "shift": (0.005, "mean difference of the detector's scores"),  # ten times its standard error
}


@contextmanager
def programs_of_arm(folder: Path) -> Iterator[None]:
    """Registers qemu in the kernel for aarch64 programs, until the block ends."""
    place = folder / "binfmt_misc"
    place.mkdir()
    mount = ("mount", "-t", "binfmt_misc", "binfmt_misc", str(place))
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        raise MissingError("it needs the kernel's binfmt_misc (modprobe binfmt_misc; not in most containers)")
    entry = place / f"rbc-edge-{os.getpid()}"
    try:
        # F: the kernel opens qemu now, because the tree does not hold it. The newest matching entry is used.
        line = f":{entry.name}:M::{_MAGIC}:{_MASK}:{shutil.which(QEMU)}:F"
        (place / "register").write_text(line)
        yield
    finally:
        if entry.exists():
            entry.write_text("-1")
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def kept_tree(mirror: str, *, fresh: bool) -> Iterator[Path]:
    """The folder of the Debian, for one run at a time. Bootstraps the Debian if it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rbc-edge" / f"{SUITE}-arm64"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.with_name(f"{cache.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{cache} is in use by another run: wait until it ends, or set XDG_CACHE_HOME")
        if fresh:
            shutil.rmtree(cache, ignore_errors=True)
        if not cache.is_dir():
            # It gets its name only when it is complete.
            part = Path(tempfile.mkdtemp(prefix=f"{cache.name}-", dir=cache.parent))
            try:
                make_tree(part, SUITE, mirror, ["python3", "python3-venv"], "--arch=arm64")
                (part / "tree").rename(cache)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        yield cache


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code.
        said: Its output, stderr with stdout.
        peak_mb: Peak memory of the process, or of a child with more, MB.
        took_s: Seconds that it took.
    """

    code: int
    said: str
    peak_mb: float
    took_s: float


def measured(command: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """Runs a command and measures its memory and its time."""
    started_s = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(environment)
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        said = file.read()
    return Ended(process.returncode, said, usage.ru_maxrss / 1024, time.monotonic() - started_s)


class Here:
    """This computer, with the same wheel and the same versions of the packages that it needs."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        site = folder / "site"
        pip("install", "--no-deps", f"--target={site}", str(wheel))
        self._environment = {**os.environ, "PYTHONPATH": str(site)}

    def python(self, *arguments: str) -> Ended:
        """Runs Python."""
        # -P: without the current folder, where the repository has the package too.
        return measured([sys.executable, "-P", *arguments], self._environment)


class There:
    """An emulated computer, with the release installed."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def python(self, *arguments: str) -> Ended:
        """Runs Python of the release."""
        return measured(self.tree.command(_PYTHON, *arguments), self.tree.environment)


_VERSIONS: Final = (
    "import importlib.metadata as m, json, sys; "
    "print(json.dumps({n: m.version(n) for n in ('rbc-edge', 'numpy', 'onnxruntime', 'pillow',"
    " 'opencv-python-headless')}))"
)


def run_tests(there: There, proof: Proof) -> None:
    """Runs the tests of the station against the installed release."""
    for name, why in LEFT_OUT.items():
        print(f"left out: tests/edge/{name} ({why})")
    checkout, testing = there.tree.path("/root/checkout"), there.tree.path("/root/testing")
    for old in (checkout, testing):
        shutil.rmtree(old, ignore_errors=True)
    (checkout / "tests").mkdir(parents=True)
    # All files that the tests read, without the package: they import the installed one.
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "deploy", checkout / "deploy")
    shutil.copy(ROOT / "tests" / "conftest.py", checkout / "tests")
    ignored = shutil.ignore_patterns("__pycache__", *LEFT_OUT)
    shutil.copytree(ROOT / "tests" / "edge", checkout / "tests" / "edge", ignore=ignored)
    version = there.python("-c", "import sys; print('{}.{}'.format(*sys.version_info))").said.strip()
    pip("install", f"--target={testing}", *for_python(version, MACHINE), *_TESTING)
    ended = there.python(
        "-c",
        # Emulated, a test takes fifty times as long. A shell starts background programs with SIGINT ignored.
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.chdir('/root/checkout'); sys.path.insert(0, '/root/testing'); import pytest; "
        "sys.exit(pytest.main(['tests/edge', '-p', 'no:cacheprovider', '-o', 'timeout=3600', '-rs']))",
    )
    if ended.code != 0:
        print(ended.said[-8000:])
    last = ended.said.strip().splitlines()[-1:]
    proof.check("the station's tests", ended.code == 0, f"{' '.join(last)} ({ended.took_s:.0f} s)")


def run_demo(here: Here, there: There, folder: Path, proof: Proof) -> None:
    """Runs the demo on both. Each draws the slides itself."""
    summaries = []
    for name, ended in (
        ("this computer", here.python("-m", "rbc_edge", "demo", "--json", "--out", str(folder / "demo"))),
        ("there", there.python("-m", "rbc_edge", "demo", "--json", "--out", "/root/demo")),
    ):
        proof.check(f"rbc-edge demo, {name}", ended.code == 0, f"exit {ended.code}, {ended.took_s:.0f} s")
        if ended.code != 0:
            print(ended.said[-4000:])
            return
        summaries.append(json.loads(ended.said[ended.said.index("{") :])["all"])
    for column in COLUMNS:
        ours, theirs = (summary[column] for summary in summaries)
        print(f"        {column}: truth {theirs['truth']}, here {ours['counted']}, there {theirs['counted']}")
    truth, counted = summaries[1]["n_rbc"]["truth"], summaries[1]["n_rbc"]["counted"]
    proof.check("the demo's red cells are within 10 % of the truth", abs(counted - truth) <= 0.1 * truth)
    shutil.rmtree(there.tree.path("/root/demo"))


def public_fields(n: int) -> list[Path]:
    """The first photographs of BCCD's validation part. Fewer or none if the data is missing."""
    data = Path(os.environ.get("RBC_DATA") or ROOT.parent / "shared" / "data")
    if not (data / "splits.csv").is_file():
        return []
    with (data / "splits.csv").open(encoding="utf-8", newline="") as stream:
        names = {row["bccd_image"] for row in csv.DictReader(stream) if row["split"] == "val"}
    files = [data / "bccd" / "JPEGImages" / f"{name}.jpg" for name in sorted(names - {""})]
    return [file for file in files if file.is_file()][:n]


def put_images(folder: Path, n: int, *, drawn: bool) -> tuple[str, float]:
    """Writes the slides that both count. Returns what they are, and the diameter of a red cell in px."""
    photographs = [] if drawn else public_fields(n)
    if photographs:
        slide = folder / "bccd"
        slide.mkdir(parents=True)
        for file in photographs:
            shutil.copy(file, slide)
        return f"{len(photographs)} photographs of BCCD (validation)", 105.0
    diameter_px = 70.0
    for i, (name, stain) in enumerate({"cream": CREAM, "grey": GREY, "rose": ROSE}.items()):
        fields = draw_slide(
            np.random.default_rng([7, i]),
            n // 3 + (i < n % 3),
            width_px=640,
            height_px=480,
            cell_diameter_px=diameter_px,
            crowding=0.25,
            overlap_fraction=0.3,
            stain=stain,
            illumination=0.1,
            noise=1.5,
        )
        (folder / name).mkdir(parents=True)
        for k, field in enumerate(fields):
            # PNG: every decoder gives the same pixels.
            cv2.imwrite(str(folder / name / f"field-{k:02d}.png"), field.image[..., ::-1])
    return f"{n} drawn fields", diameter_px


def run_counts(
    here: Here, there: There, images: Path, diameter_px: float, folder: Path, proof: Proof
) -> None:
    """Counts the same images on both and compares.

    The scale is given. To estimate it, the detector runs some hundred times, which takes longer than the
    counting when it is emulated. The demo estimates the scale.
    """
    inside = there.tree.path("/root/images")
    shutil.rmtree(inside, ignore_errors=True)
    shutil.copytree(images, inside)
    out = there.tree.path("/root/results")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "results", ignore_errors=True)
    count = (
        "-m",
        "rbc_edge",
        "run",
        "--cells",
        "--threads",
        "1",
        "--cell-diameter",
        str(diameter_px),
        "--out",
    )
    ours = here.python(*count, str(folder / "results"), str(images))
    theirs = there.python(*count, "/root/results", "/root/images")
    for ended in (ours, theirs):
        if ended.code != 0:
            proof.check("rbc-edge run", False, f"exit {ended.code}: {ended.said[-2000:]}")
            return
    compared = compare(read(folder / "results"), read(out))
    show(compared)
    judge(compared, proof)
    print(
        f"        memory: {ours.peak_mb:.0f} MB here, {theirs.peak_mb:.0f} MB there with the emulator itself"
    )
    print(f"        time: {ours.took_s:.1f} s here, {theirs.took_s:.0f} s there, emulated: a Pi is faster")


def run_rounding(
    here: Here, there: There, images: Path, diameter_px: float, folder: Path, proof: Proof
) -> None:
    """Measures the cause of the differences: the same inputs, with int8 kernels and without."""
    program = "tests/arm64/rounding.py"
    inside = there.tree.path("/root/rounding")
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    shutil.copy(ROOT / program, inside)
    files = sorted(str(file) for file in images.rglob("*") if file.is_file())[:_FIELDS_ROUNDED]
    ours = here.python(str(ROOT / program), str(diameter_px), str(folder / "ours.npz"), *files)
    if ours.code == 0:
        shutil.copy(folder / "ours.npz", inside)
        ours = there.python(
            "/root/rounding/rounding.py", "-", "/root/rounding/theirs.npz", "/root/rounding/ours.npz"
        )
    if ours.code != 0:
        proof.check("the rounding of the kernels", False, f"exit {ours.code}: {ours.said[-2000:]}")
        return
    kernels = [np.load(folder / "ours.npz"), np.load(inside / "theirs.npz")]
    scores = {
        (who, kind): np.concatenate([k[key].ravel() for key in k.files if key.endswith(f".{kind}")])
        for who, k in zip(("here", "there"), kernels, strict=True)
        for kind in ("int8", "float")
    }
    apart = float(np.abs(scores["here", "float"] - scores["there", "float"]).max())
    proof.check(
        "without int8 kernels the detector's scores are the same: at most 0.001",
        apart <= 0.001,
        f"{apart:.2g}",
    )
    seen = np.maximum(scores["here", "float"], scores["there", "float"]) > _SEEN
    spread = {}
    for who in ("here", "there"):
        error = (scores[who, "int8"] - scores[who, "float"])[seen]
        spread[who] = float(error.std())
        print(
            f"        int8 kernels {who} compared with none: scores change by {error.mean():+.4f} on average,"
            f" standard deviation {error.std():.4f} ({len(error)} scores over {_SEEN:g})"
        )
    proof.check(
        "rounding errors of the kernels there over those here: at most 1.5 times",
        spread["there"] <= 1.5 * spread["here"],
        f"{spread['there'] / spread['here']:.2f}",
    )


def show(compared: Comparison) -> None:
    """Prints the sums and all fields that differ."""
    for column, ours, theirs in zip(COLUMNS, compared.ours, compared.theirs, strict=True):
        print(f"        {column}: {ours} here, {theirs} there")
    for difference in compared.differences:
        print(f"        {difference}")
    print(
        f"        {len(compared.differences)} of {compared.n_fields} fields differ: of"
        f" {sum(compared.ours) - compared.ours[0]} cells {compared.n_changes} come, go or turn over"
    )
    print(
        f"        cells that both see: boxes within {compared.box_error_px:.1f} px, detector's scores"
        f" within {compared.det_error:.3f}"
        f" (mean {compared.det_shift:+.4f}), overlap scores within {compared.overlap_error:.3f};"
        f" scales within {compared.scale_error:.2%}"
    )


def judge(compared: Comparison, proof: Proof) -> None:
    """Holds the differences within `LIMITS`."""
    single, overlapping = (COLUMNS.index(f"n_rbc_{kind}") for kind in ("single", "overlapping"))
    share, share_there = (
        sums[overlapping] / max(1, sums[single] + sums[overlapping])
        for sums in (compared.ours, compared.theirs)
    )
    manifest = Bundle.open().manifest
    # Boxes move as scores do, and where two share about as much as the suppression lets them, one goes.
    clearest = compared.clearest(
        manifest.score_threshold[CellClass.RBC], manifest.iou_threshold[CellClass.RBC] - 0.1
    )
    for what, value in (
        ("sum", compared.off("n_rbc")),
        ("share", abs(share_there - share)),
        ("field", compared.worst),
        ("clear", clearest),
        ("shift", abs(compared.det_shift)),
    ):
        limit, text = LIMITS[what]
        proof.check(f"{text}: at most {limit:g}", value <= limit, f"{value:.4g}")


def main() -> int:
    """Makes the Debian and tests the release in it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=STEPS, help="only these parts  [default: all]"
    )
    parser.add_argument(
        "--computer", nargs="+", choices=COMPUTERS, default=list(COMPUTERS), help="[default: all]"
    )
    parser.add_argument("--fields", type=int, default=50, help="how many fields are counted  [default: 50]")
    parser.add_argument("--drawn", action="store_true", help="drawn fields, even if there are photographs")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--fresh", action="store_true", help="bootstrap the Debian again")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is registered is removed
    proof = Proof()
    try:
        if platform.machine() == MACHINE:
            raise MissingError("this is an Arm computer, where `make test` is enough")
        need("debootstrap", "unshare", "chroot", QEMU, packages={QEMU: "qemu-user-static"})
        with (
            temporary_folder(kept=False) as folder,
            programs_of_arm(folder),
            kept_tree(asked.mirror, fresh=asked.fresh) as root,
        ):
            prove(asked, root, folder, proof)
    except MissingError as missing:
        print(f"skipped: {missing}")
        return 0
    print(f"{proof.n_checks} checks, {len(proof.failed)} failed")
    return 1 if proof.failed else 0


def prove(asked: argparse.Namespace, root: Path, folder: Path, proof: Proof) -> None:
    """Installs, tests and counts, on one emulated computer after the other."""
    computers = [COMPUTERS[name] for name in asked.computer]
    trees = []
    for computer in computers:
        cpuinfo = folder / f"cpuinfo-{computer.cpu}"
        cpuinfo.write_text(computer.cpuinfo(os.cpu_count() or 1))
        trees.append(Tree(root, environment={"QEMU_CPU": computer.cpu}, over={"/proc/cpuinfo": cpuinfo}))
    wheel = put_release(trees[0], folder, machine=MACHINE)
    here = Here(folder, root / "root" / "release" / wheel)
    # An upgrade would keep the previous version, which is not needed here.
    shutil.rmtree(root / "opt" / "rbc-edge", ignore_errors=True)
    release = "/root/release"
    said = trees[0].run(f"{release}/deploy/install.sh", f"{release}/{wheel}", "--wheels", f"{release}/wheels")
    print(said.stdout, end="")
    proof.check("install.sh", said.returncode == 0, f"exit {said.returncode}")
    if said.returncode != 0:
        return
    versions = [computer.python("-c", _VERSIONS).said for computer in (here, There(trees[0]))]
    proof.check("the same versions on both", versions[0] == versions[1], versions[1].strip())

    what, diameter_px = put_images(folder / "images", asked.fields, drawn=asked.drawn)
    for i, (computer, tree) in enumerate(zip(computers, trees, strict=True)):
        print(f"-- {computer.name} ({computer.cpu}), emulated", flush=True)
        there = There(tree)
        has = there.python("-c", _DOT_PRODUCT).said.strip()
        proof.check(
            "int8 dot product as on the real processor", has == str("asimddp" in computer.features), has
        )
        said = tree.run("rbc-edge", "bundle", "verify")
        proof.check("rbc-edge bundle verify", said.returncode == 0, said.stdout.strip())
        if "counts" in asked.only:
            print(f"        {what}, {diameter_px:g} px a cell", flush=True)
            run_counts(here, there, folder / "images", diameter_px, folder, proof)
            run_rounding(here, there, folder / "images", diameter_px, folder, proof)
        # Only once: tests and demo show that the program works. The counts compare the processors.
        if i == 0 and "tests" in asked.only:
            run_tests(there, proof)
        if i == 0 and "demo" in asked.only:
            run_demo(here, there, folder, proof)


if __name__ == "__main__":
    sys.exit(main())

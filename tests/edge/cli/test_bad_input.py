"""Everything a lab can feed the program by mistake, through the main job or the command line itself."""

import csv
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from stand_in import BUNDLE_ID, TOY_BUNDLE, StandIn, disks, encoded, write_disks

import rbc_edge
from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, Step, Summary, count_once

N_GOOD = 7
STAND_IN = AnalyzerRecipe(BUNDLE_ID, StandIn)
SOURCE_ROOT = str(Path(rbc_edge.__file__).parents[1])


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(n: int) -> Image.Image:
    return Image.fromarray(disks(n))


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 black pixels in about 100 KB."""
    packer = zlib.compressobj(9)
    line = bytes(1 + 30_000 // 8)
    data = b"".join(packer.compress(line * 1000) for _ in range(30)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "empty"),
    "text.png": (lambda: b"field,count\n1,2\n" * 20, "not-an-image"),
    "text.jpg": (lambda: b"x", "not-an-image"),
    "page.tif": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "not-an-image"),
    "moving.bmp": (lambda: pillow(rgb(3).convert("P"), "GIF"), "not-an-image"),
    "zeros.png": (lambda: bytes(4096), "not-an-image"),
    "cut.png": (lambda: encoded(disks(5))[:700], "truncated"),
    "cut.jpg": (lambda: encoded(disks(5), ".jpg")[:-2000], "truncated"),
    "cut.bmp": (lambda: encoded(disks(5), ".bmp")[:-20_000], "truncated"),
    "cut.tif": (lambda: pillow(rgb(5), "TIFF")[:-20_000], "truncated"),
    "header.png": (lambda: encoded(disks(5))[:20], "truncated"),
    "bomb.png": (bomb, "too-large"),
    "dot.png": (lambda: encoded(disks(5)[:3, :3]), "too-small"),
}


def grey(n: int) -> npt.NDArray[np.uint16]:
    return disks(n)[:, :, 1].astype(np.uint16)


def colour(n: int) -> npt.NDArray[np.uint16]:
    return disks(n)[:, :, ::-1].astype(np.uint16)


def cv2_encoded(image: npt.NDArray[np.uint16] | npt.NDArray[np.uint8], suffix: str) -> bytes:
    done, data = cv2.imencode(suffix, image)
    assert done
    return data.tobytes()


def with_alpha(n: int) -> Image.Image:
    image = rgb(n).convert("RGBA")
    image.putalpha(200)
    return image


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "grey.png": lambda: cv2_encoded(grey(9).astype(np.uint8), ".png"),
    "grey16.png": lambda: cv2_encoded(grey(9) * 257, ".png"),
    "grey12in16.tif": lambda: cv2_encoded(grey(9) * 16, ".tif"),
    "colour16.png": lambda: cv2_encoded(colour(9) * 257, ".png"),
    "colour16.tiff": lambda: cv2_encoded(colour(9) * 257, ".tiff"),
    "cmyk.jpg": lambda: pillow(rgb(9).convert("CMYK"), "JPEG", quality=95),
    "cmyk.tif": lambda: pillow(rgb(9).convert("CMYK"), "TIFF"),
    "palette.png": lambda: pillow(rgb(9).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "alpha.png": lambda: pillow(with_alpha(9), "PNG"),
    "really a png.JPG": lambda: encoded(disks(9)),
    "plain.bmp": lambda: encoded(disks(9), ".bmp"),
    "plain.jpeg": lambda: encoded(disks(9), ".jpg"),
}

NAMES = [
    b"two words.png",
    b"\"double\" and 'single'.png",
    b"two\nlines.png",
    b"tab\tand\rreturn.png",
    b"latin-1 M\xfcller.png",
    "Müller 血液.png".encode(),
    b"=1+1.png",
    b"+2.png",
    b"-rf.png",
    b"@cmd.png",
    b"a,b;c.png",
    b"$(reboot).png",
    b"x" * 251 + b".png",
]


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    for i in range(N_GOOD):
        write_disks(tmp_path / "camera" / f"good{i}.png", i, seed=i)
    return tmp_path / "camera"


def count(camera: Path, out: Path) -> tuple[Summary, dict[str, dict[str, str]], list[Step]]:
    steps: list[Step] = []
    summary = count_once((camera,), CountOptions(out, STAND_IN), on_step=steps.append)
    with (out / f"{camera.name}.csv").open(encoding="utf-8", newline="") as file:
        return summary, {row["fov"]: row for row in csv.DictReader(file)}, steps


def check_good(rows: dict[str, dict[str, str]]) -> None:
    assert [rows[f"good{i}"]["n_rbc"] for i in range(N_GOOD)] == [str(i) for i in range(N_GOOD)]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_fails_with_empty_counts_and_the_others_are_counted(
    camera: Path, tmp_path: Path, name: str
) -> None:
    make, failure = BROKEN[name]
    content = make()
    (camera / name).write_bytes(content)
    assert len(content) < 300_000
    summary, rows, steps = count(camera, tmp_path / "out")
    check_good(rows)
    assert (summary.n_counted, summary.n_failed, summary.exit_code) == (N_GOOD, 1, 3)
    row = rows[Path(name).stem]
    assert (row["status"], row["failure"]) == ("failed", failure)
    assert {k for k, v in row.items() if v and k.startswith(("n_", "overlap", "width", "height"))} == set()
    (message,) = (step.row.message for step in steps if step.row and step.row.status == "failed")
    assert str(camera / name) in message
    assert "Error" not in message


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_image_is_counted_like_any_other(camera: Path, tmp_path: Path, name: str) -> None:
    (camera / name).write_bytes(UNUSUAL[name]())
    summary, rows, _ = count(camera, tmp_path / "out")
    check_good(rows)
    assert summary.exit_code == 0
    assert rows[Path(name).stem]["n_rbc"] == "9"


def test_names_of_every_kind_are_counted_and_told_apart(camera: Path, tmp_path: Path) -> None:
    for i, name in enumerate(NAMES):
        write_disks(os.fsencode(camera) + b"/" + name, i, seed=100 + i)
    summary, rows, _ = count(camera, tmp_path / "out")
    check_good(rows)
    assert summary.exit_code == 0
    assert len(rows) == N_GOOD + len(NAMES)
    assert rows["'=1+1"]["n_rbc"] == "6"
    assert rows[r"two\nlines"]["n_rbc"] == "2"
    assert rows[r"latin-1 M\xfcller"]["n_rbc"] == "4"
    assert rows["Müller 血液"]["n_rbc"] == "5"
    text = (tmp_path / "out" / "camera.csv").read_bytes()
    assert text.count(b"\n") == 1 + len(rows)
    assert b"\r" not in text
    assert count(camera, tmp_path / "out")[0].n_counted == 0


@contextmanager
def without_privileges() -> Iterator[None]:
    """Makes this process an ordinary user's: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_file_and_folder_without_permission() -> None:
    # Not tmp_path: pytest's folders are closed to other users.
    top = Path(tempfile.mkdtemp())
    try:
        for i in range(N_GOOD):
            write_disks(top / "camera" / f"good{i}.png", i, seed=i)
        write_disks(top / "camera" / "locked.png", 3, seed=50)
        write_disks(top / "camera" / "sub" / "inside.png", 3, seed=51)
        (top / "camera" / "locked.png").chmod(0)
        (top / "camera" / "sub").chmod(0)
        (top / "closed").mkdir()
        (top / "closed").chmod(0)
        top.chmod(0o777)
        with without_privileges():
            summary, rows, _ = count(top / "camera", top / "out")
            check_good(rows)
            assert (summary.n_failed, summary.n_unreadable_folders, summary.exit_code) == (1, 1, 3)
            assert (rows["locked"]["status"], rows["locked"]["failure"]) == ("failed", "unreadable")
            assert rows["locked"]["n_rbc"] == ""
            with pytest.raises(rbc_edge.errors.UnavailableError, match="cannot list the folder"):
                count_once((top / "closed",), CountOptions(top / "out", STAND_IN))
            with pytest.raises(rbc_edge.errors.UnavailableError, match=r"cannot write|Permission denied"):
                count_once((top / "camera",), CountOptions(top / "closed" / "out", STAND_IN))
        (top / "camera" / "locked.png").chmod(0o644)
        (top / "camera" / "sub").chmod(0o755)
        with without_privileges():
            summary, rows, _ = count(top / "camera", top / "out")  # permission given back: counted
        assert (summary.n_counted, summary.exit_code) == (2, 0)
        assert rows["locked"]["n_rbc"] == "3"
    finally:
        shutil.rmtree(top)


def test_link_to_nowhere_fails_alone(camera: Path, tmp_path: Path) -> None:
    (camera / "gone.png").symlink_to(tmp_path / "nothing.png")
    summary, rows, _ = count(camera, tmp_path / "out")
    check_good(rows)
    assert (summary.exit_code, rows["gone"]["failure"], rows["gone"]["n_rbc"]) == (3, "vanished", "")


# -- the command line ------------------------------------------------------------------------------------


def rbc(*arguments: object, file_size_limit: int | None = None) -> tuple[int, str]:
    """Runs the program as its own process; returns exit code and stderr."""
    limit = file_size_limit

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = {k: v for k, v in os.environ.items() if not k.startswith("RBC_EDGE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rbc_edge", *map(str, arguments)],
        env={**env, "PYTHONPATH": SOURCE_ROOT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=set_limit,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "bug" not in done.stderr
    return done.returncode, done.stderr


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    code, said = rbc("run", tmp_path / "missing", "--out", tmp_path / "out", "--bundle", TOY_BUNDLE)
    assert (code, "missing: no such file or directory" in said) == (5, True)
    (tmp_path / "empty").mkdir()
    code, said = rbc("run", tmp_path / "empty", "--out", tmp_path / "out", "--bundle", TOY_BUNDLE)
    assert (code, "no image found" in said, ".tiff" in said) == (5, True, True)
    assert not (tmp_path / "out").exists()


def test_output_inside_the_source(camera: Path) -> None:
    code, said = rbc("run", camera, "--out", camera / "results", "--bundle", TOY_BUNDLE)
    assert (code, "lies inside the source" in said) == (2, True)
    assert not (camera / "results").exists()


@pytest.mark.parametrize("name", ["detector.onnx", "classifier.onnx", "manifest.json"])
def test_bundle_with_one_byte_changed(camera: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(TOY_BUNDLE, bundle)
    data = bytearray((bundle / name).read_bytes())
    # In the manifest a digit of a hash: the change that breaks no syntax.
    at = data.index(b'"files"') + 60 if name == "manifest.json" else len(data) // 2
    while name == "manifest.json" and chr(data[at]) not in "0123456789":
        at += 1
    data[at] ^= 1
    (bundle / name).write_bytes(data)
    code, said = rbc("run", camera, "--out", tmp_path / "out", "--bundle", bundle)
    assert code == 4, said
    assert str(bundle) in said
    assert not (tmp_path / "out").exists()


def check_full_and_then_room(
    full: Callable[[], tuple[int, str]], roomy: Callable[[], int], out: Path, n_images: int = N_GOOD
) -> None:
    code, said = full()
    assert code == 5, said
    assert str(out) in said
    assert "free space" in said
    for table in out.rglob("*.csv"):  # whatever was written is whole
        assert table.read_bytes().endswith(b"\n")
    assert not list(out.rglob("*.tmp"))
    assert roomy() == 0
    with (out / "slides.csv").open(newline="") as file:
        assert [row["n_fov_ok"] for row in csv.DictReader(file)] == [str(n_images)]


@pytest.mark.parametrize(("limit", "n_more"), [(100, 0), (20_000, 0), (90_000, 80)])
def test_disk_full_stood_in_for_by_a_limit_on_file_size(
    camera: Path, tmp_path: Path, limit: int, n_more: int
) -> None:
    out = tmp_path / "out"
    for i in range(n_more):  # the first fields fit, later ones do not
        write_disks(camera / f"more{i}.png", 20, seed=100 + i)
    asked = ("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40, "--cells")
    check_full_and_then_room(
        lambda: rbc(*asked, file_size_limit=limit), lambda: rbc(*asked)[0], out, N_GOOD + n_more
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    options = ["-t", "tmpfs", "-o", "size=128k", "rbc-edge-test", str(disk)]
    if subprocess.run([mount, *options], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_really_full(camera: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    filler = small_disk / "filler"
    asked = ("run", camera, "--out", out, "--bundle", TOY_BUNDLE, "--cell-diameter", 40, "--cells")

    def roomy() -> int:
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        return rbc(*asked)[0]

    filler.write_bytes(bytes(60_000))
    check_full_and_then_room(lambda: rbc(*asked), roomy, out)

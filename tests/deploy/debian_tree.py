"""Installs the release into a fresh Debian, counts there as the user of the service, upgrades, uninstalls.

Run as root: ``python -m tests.deploy.debian_tree [--suite bookworm]`` (``make debian-tree``). With ``--boot``
the Debian is started as a virtual machine instead (qemu), with the systemd, the kernel and the sandbox of a
station, and its power is cut. ``boot_checks.py`` holds the checks inside it. Without root, debootstrap or
qemu the program says so, and its exit code is 0. It changes nothing outside a temporary folder. Its mounts
are in a mount namespace that ends with the process.
"""

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.debian import MissingError, Proof, Tree, make_tree, need, put_release, temporary_folder

CHECKS: Final = Path(__file__).with_name("boot_checks.py")

_TIMES: Final = {"analyzed_at", "elapsed_ms"}
_SETTINGS: Final = "etc/rbc-edge/config.toml"
_RESULTS: Final = "var/lib/rbc-edge"
_CAMERA: Final = "/srv/camera"
_PLANTED: Final = ("platform.py", "struct.py", "json.py", "venv.py", "pip.py", "rbc_edge/__init__.py")
_WATCH_ONCE: Final = (
    *("runuser", "-u", "rbc-edge", "--", "rbc-edge", "watch", "--once"),
    *("--config", "/etc/rbc-edge/config.toml"),
)


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a table, without its times."""
    with file.open(encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if k not in _TIMES} for row in csv.DictReader(stream)]


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def releases(tree: Tree) -> list[str]:
    """The installed versions."""
    folder = tree.path("/opt/rbc-edge/releases")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def prove(tree: Tree, wheel: str, proof: Proof) -> None:
    """Installs, counts, installs again, tries installations that fail, uninstalls."""
    install = [
        "/root/release/deploy/install.sh",
        f"/root/release/{wheel}",
        "--wheels",
        "/root/release/wheels",
    ]
    results, camera, settings = tree.path(_RESULTS), tree.path(_CAMERA), tree.path(_SETTINGS)

    # -- a first installation that fails leaves nothing
    tree.path("/root/none").mkdir()
    said = tree.run(*install[:2], "--wheels", "/root/none", "--source", _CAMERA)
    nothing = not tree.path("/opt/rbc-edge").exists() and not settings.exists()
    proof.check("an installation that fails leaves nothing", said.returncode == 1 and nothing)

    # -- a first installation, from a folder with Python files that must not run
    planted = tree.path("/srv/planted")
    for name in _PLANTED:
        (planted / name).parent.mkdir(parents=True, exist_ok=True)
        (planted / name).write_text(f"open('/srv/planted/ran', 'a').write('{name} ')\n")
    in_planted = ("env", "--chdir=/srv/planted", "PYTHONPATH=/srv/planted")
    said = tree.run(*in_planted, *install, "--source", _CAMERA)
    print(said.stdout, end="")
    proof.check("install.sh, offline", said.returncode == 0, f"exit {said.returncode}")
    ran = planted / "ran"
    proof.check("it runs nothing of that folder", not ran.exists(), ran.read_text() if ran.exists() else "")
    if said.returncode != 0:
        return
    first = releases(tree)

    # -- counting as the user of the service. `rbc-edge run` on the same images gives the expected counts.
    said = tree.run("rbc-edge", "demo", "--out", "/root/demo", "--json")
    proof.check("rbc-edge demo draws smears and counts them", said.returncode == 0, f"exit {said.returncode}")
    expected = table(tree.path("/root/demo/results/slides.csv"))
    truth = table(tree.path("/root/demo/truth.csv"))
    shutil.copytree(tree.path("/root/demo/images"), camera)
    images = digests(camera)
    said = tree.run(*_WATCH_ONCE)
    print(said.stdout, end="")
    proof.check("watch --once, as the user rbc-edge", said.returncode == 0, f"exit {said.returncode}")
    if said.returncode != 0:
        return
    text = (results / "slides.csv").read_text(encoding="utf-8")
    print(text, end="")
    counted = table(results / "slides.csv")
    n_true, n_counted = (sum(int(row["n_rbc"]) for row in rows) for rows in (truth, counted))
    n_fields = sum(int(row["n_fov_ok"]) for row in counted)
    proof.check("every image is a field of view", n_fields == len(images), f"{n_fields} of {len(images)}")
    proof.check("the counts are those of rbc-edge run", counted == expected)
    proof.check(
        "the counts are within 10 % of the truth",
        abs(n_counted - n_true) <= 0.1 * n_true,
        f"{n_counted} red cells of {n_true}",
    )
    proof.check("the camera's folder is unchanged", digests(camera) == images)
    owners = {(f.stat().st_uid, f.stat().st_gid) for f in results.rglob("*")}
    proof.check(
        "the results belong to the service", owners == {(results.stat().st_uid, results.stat().st_gid)}
    )

    # -- the same again: an upgrade keeps settings and ledger
    with settings.open("a", encoding="utf-8") as file:
        file.write("\ncells = true\n")
    written, rows = settings.read_bytes(), (results / "rose.csv").read_bytes()
    said = tree.run(*install, "--source", _CAMERA)
    proof.check("install.sh a second time", said.returncode == 0, f"exit {said.returncode}")
    proof.check("it keeps the settings", settings.read_bytes() == written)
    said = tree.run(*_WATCH_ONCE)
    again = (results / "rose.csv").read_bytes()  # with analyzed_at, so nothing was counted twice
    proof.check("it keeps the ledger", said.returncode == 0 and again == rows)
    proof.check("the new setting has an effect", (results / "cells" / "rose.csv").is_file())
    second = releases(tree)
    proof.check("the previous version stays", len(second) == 2 and set(first) < set(second), second)

    # -- an upgrade that fails changes nothing
    tree.path("/root/rbc_edge-9.9.9-py3-none-any.whl").write_bytes(b"not a wheel")
    said = tree.run(install[0], "/root/rbc_edge-9.9.9-py3-none-any.whl", *install[2:])
    works = tree.run("rbc-edge", "bundle", "verify").returncode == 0
    proof.check("a broken wheel changes nothing", said.returncode == 1 and releases(tree) == second and works)
    settings.write_bytes(written + b"treads = 2\n")
    said = tree.run(*install)
    works = tree.run("rbc-edge", "bundle", "verify").returncode == 2  # only the settings are wrong
    proof.check(
        "settings that are not valid stop an upgrade",
        said.returncode == 2
        and "did you mean threads?" in said.stdout
        and releases(tree) == second
        and works,
    )
    settings.write_bytes(written)
    said = tree.run(*install, "--source", "/srv/other")
    proof.check(
        "--source that differs from the settings is refused",
        said.returncode == 2 and releases(tree) == second,
        said.stdout.strip().splitlines()[-2].strip(),
    )

    # -- folders in other places
    home = written.replace(b'"/srv/camera"', b'"/home/lab/50 % camera"').replace(
        b'out = "/var/lib/rbc-edge"', b'out = "/srv/results"'
    )
    settings.write_bytes(home)
    said = tree.run(*install)
    dropin = tree.path("/etc/systemd/system/rbc-edge.service.d/10-folders.conf")
    text = dropin.read_text() if dropin.exists() else ""
    proof.check(
        "folders in other places get a drop-in",
        said.returncode == 0 and "ProtectHome=read-only" in text and 'ReadWritePaths="/srv/results"' in text,
    )
    settings.write_bytes(written)
    tree.run(*install)
    proof.check("it is removed when they are back", not dropin.exists())

    # -- uninstalling
    before = digests(results)
    said = tree.run(*in_planted, "/root/release/deploy/uninstall.sh")
    print(said.stdout, end="")
    gone = [
        path
        for path in ("/opt/rbc-edge", "/usr/local/bin/rbc-edge", "/etc/systemd/system/rbc-edge.service")
        if os.path.lexists(tree.path(path))
    ]
    proof.check("uninstall.sh removes program and unit", said.returncode == 0 and not gone)
    proof.check("it leaves results, ledger and settings", digests(results) == before and settings.exists())
    said = tree.run("/root/release/deploy/uninstall.sh", "--purge")
    kept = said.returncode == 0 and digests(results) == before and not settings.exists()
    proof.check("--purge removes the settings, never results", kept)
    proof.check("the camera's folder is still unchanged", digests(camera) == images)


_UNIT: Final = """
[Unit]
After=rbc-edge.service
[Service]
ExecStart=/usr/bin/python3 /root/boot_checks.py /dev/ttyS1
[Install]
WantedBy=multi-user.target
"""
_DRAW: Final = """
import cv2, numpy, pathlib
from rbc_edge.ops import synthetic
def draw(seed, n):
    return synthetic.draw_slide(numpy.random.default_rng(seed), n, width_px=240, height_px=180,
        cell_diameter_px=40.0, crowding=0.2, overlap_fraction=0.3, stain=synthetic.ROSE, illumination=0.1,
        noise=1.2)
def write(path, field):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), field.image[..., ::-1])
for i in range(7):
    for j, field in enumerate(draw(i, 6)):
        write(pathlib.Path(f"/root/images/slide-{i:02d}/field-{j}.png"), field)
for name, field in zip(("late", "share", "home", "after"), draw(99, 4)):
    write(pathlib.Path(f"/root/extra/{name}.png"), field)
# 72 megapixels, 216 MB when decoded, 200 kB as a file
cv2.imwrite("/root/extra/huge.png", numpy.full((8000, 9000, 3), 230, numpy.uint8))
"""
"""Draws small fields, because an emulated processor has to count them."""


def furnish(tree: Tree, wheel: str) -> None:
    """Installs the release for its first start, and prepares the images of the camera."""
    release = "/root/release"
    said = tree.run(
        *(f"{release}/deploy/install.sh", f"{release}/{wheel}", "--wheels", f"{release}/wheels"),
        *("--source", _CAMERA),
    )
    print(said.stdout, end="")
    tree.path(_CAMERA).mkdir()
    with tree.path(_SETTINGS).open("a", encoding="utf-8") as file:
        file.write("cell_diameter = 40\n")
    said = tree.run("/opt/rbc-edge/current/bin/python", "-c", _DRAW)
    print(said.stdout, end="")
    shutil.copy(CHECKS, tree.path("/root/boot_checks.py"))
    tree.path("/etc/systemd/system/boot-checks.service").write_text(_UNIT)
    tree.run("systemctl", "enable", "boot-checks")
    tree.path("/etc/resolv.conf").unlink(missing_ok=True)


def boot(tree: Tree, folder: Path, accel: str, proof: Proof) -> None:
    """Runs the tree until it switches itself off. Cuts its power when it asks for it, and starts it again."""
    disk = folder / "disk.ext4"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", str(tree.folder), str(disk), "4G"],
        check=True,
    )
    (kernel,), (initrd,) = (tree.path("/boot").glob(f"{name}-*") for name in ("vmlinuz", "initrd.img"))
    command = [
        *(
            "qemu-system-x86_64",
            "-accel",
            accel,
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "1792",
        ),
        *("-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", "root=/dev/vda rw console=ttyS0"),
        *("-drive", f"file={disk},if=virtio,format=raw"),
        *("-serial", f"file:{folder / 'console.log'}", "-serial", "stdio"),
    ]
    print(f"starting it ({accel})", flush=True)
    for _ in range(2):
        ended = power_cut = False
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as machine:
            assert machine.stdout is not None
            for line in machine.stdout:
                if line.startswith("POWER CUT"):
                    print("the power is cut", flush=True)
                    machine.kill()
                    power_cut = True
                elif line.startswith(("ok ", "FAILED")):
                    what, _, shown = line[8:].rstrip().partition(": ")
                    proof.check(what, line.startswith("ok"), shown)
                else:
                    print(line.rstrip(), flush=True)
                    ended = ended or line.startswith("info    the end")
        if not power_cut:
            break
    if not ended:
        proof.check("the machine finished its checks", False, (folder / "console.log").read_text()[-2000:])


def main() -> int:
    """Makes the tree and checks the release in it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="bookworm", help="name of the Debian release  [default: bookworm]")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--boot", action="store_true", help="start it as a virtual machine")
    parser.add_argument("--accel", default="tcg", help="accelerator of qemu, kvm if possible  [default: tcg]")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    asked = parser.parse_args()
    proof = Proof()
    try:
        need("debootstrap", "unshare", "chroot")
        with temporary_folder(kept=asked.keep) as folder:
            packages = ["python3", "python3-venv"]
            if asked.boot:
                need("qemu-system-x86_64", "mke2fs")
                packages += ["systemd-sysv", "dbus", "udev", "initramfs-tools", "linux-image-cloud-amd64"]
            tree = make_tree(folder, asked.suite, asked.mirror, packages)
            wheel = put_release(tree, folder)
            if asked.boot:
                furnish(tree, wheel)
                boot(tree, folder, asked.accel, proof)
            else:
                prove(tree, wheel, proof)
    except MissingError as missing:
        print(f"skipped: {missing}")
        return 0
    print(f"{proof.n_checks} checks, {len(proof.failed)} failed")
    return 1 if proof.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Changed files at the two doors of the program: ``make fuzz``, or ``python -m tests.fuzz``.

Small whole images (PNG, JPEG, TIFF, BMP, WebP) and the example of the settings are changed at random, for a
given time, and read by the decoder and by the reader of the settings. A find is: an error that is not one of
the declared ones, ten seconds for one file, more memory than the limit allows, a process that dies, and an
image that is read although its own checksums say that it is damaged. Each find is kept as a file. The exit
code is 1 where there is one.
"""

import argparse
import io
import multiprocessing
import os
import random
import resource
import struct
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from rbc_edge.config import SETTINGS, example, load
from rbc_edge.errors import ImageError, UsageError
from rbc_edge.vision.image_file import load_field

HANG_S: Final = 10.0
MEGAPIXELS: Final = 30.0
# What the decoder promises for this limit, and what the interpreter and a broken allocator may add to it.
MAX_GROWTH_BYTES: Final = int(MEGAPIXELS * 4e6 + 150e6)
_ADDRESS_SPACE: Final = 4_000_000_000  # a find must not take the computer down
_PNG_HEAD: Final = 8
_DEFLATE: Final = 8  # TIFF's compression that has checksums
_WORDS: Final = (0, 1, 2, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_VALUES: Final = (
    *("true", "0", "-1", "1e999", "nan", "inf", "99999999999999999999", '""', '"x"', r'"\u0000"', "'''"),
    *("[]", "[[[[", "{a=1}", "1979-05-27", "0x7f", "\N{BOM}", '"' + "a" * 5000 + '"', "= ="),
)


# -- images ---------------------------------------------------------------------------------------------


def whole_images() -> list[bytes]:
    """Small images of each format and of the compressions that are read."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    rgb = np.stack([x * 4, y * 5, 255 - x], axis=2).astype(np.uint8) ^ rng.integers(
        0, 8, (48, 64, 3), np.uint8
    )
    deep = (rgb[..., 0].astype(np.uint16) << 8) | rgb[..., 1]
    kinds: list[tuple[Any, dict[str, Any]]] = [
        *((rgb, {"format": "PNG"}), (rgb[..., 0], {"format": "PNG"}), (deep, {"format": "PNG"})),
        *((rgb, {"format": "JPEG", "quality": q}) for q in (60, 95)),
        (rgb, {"format": "JPEG", "progressive": True}),
        (rgb[..., 0], {"format": "JPEG"}),
        (rgb, {"format": "BMP"}),
        *((rgb, {"format": "WEBP", "lossless": lossless}) for lossless in (False, True)),
        *(
            (rgb, {"format": "TIFF", "compression": c})
            for c in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
        ),
        (deep, {"format": "TIFF", "compression": "tiff_deflate"}),
    ]
    found = []
    for pixels, options in kinds:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **options)
        found.append(buffer.getvalue())
    return found


def mutated(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Returns bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        if rng.random() < 0.4:  # most decisions are made from the head of a file
            at = min(at, rng.randrange(64))
        n = rng.choice((1, 2, 4, 16, 64, 512))
        kind = rng.randrange(8)
        if kind <= 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at : at + n] = bytes(len(changed[at : at + n]))
        elif kind == 3:
            del changed[at : at + n]
        elif kind == 4:
            changed[at:at] = changed[at : at + n]
        elif kind == 5:
            order, size = rng.choice("<>"), rng.choice("HI")
            word = struct.pack(order + size, rng.choice(_WORDS) & (0xFFFF if size == "H" else 0xFFFFFFFF))
            changed[at : at + len(word)] = word
        elif kind == 6:
            changed[at:] = rng.choice(others)[at:]
        else:
            del changed[at:]
    return bytes(changed)


def has_wrong_checksum(data: bytes) -> bool:
    """Tells of a PNG or of a TIFF with Deflate whether its own checksums say that it is damaged.

    Written apart from `rbc_edge.vision.integrity`, which it checks.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        at = _PNG_HEAD
        while at + 12 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            body = data[at + 4 : at + 8 + length]
            if len(body) < 4 + length or data[at + 8 + length : at + 12 + length] != zlib.crc32(
                body
            ).to_bytes(4, "big"):
                return True
            if kind == b"IEND":
                return False
            at += 12 + length
        return True
    with (
        suppress(Exception),
        Image.open(io.BytesIO(data)) as picture,
    ):  # what Pillow cannot open, nobody reads
        tags = getattr(picture, "tag_v2", {})
        if tags.get(259) == _DEFLATE and tags.get(266, 1) == 1:
            for start, n in zip(tags[273], tags[279], strict=False):
                try:
                    zlib.decompress(data[start : start + n])
                except zlib.error:
                    return True
    return False


def read_image(path: Path) -> str:
    """Reads one file as a station does. Returns what became of it. Raises what is a find."""
    try:
        load_field(path, "s", "f", max_megapixels=MEGAPIXELS)
    except ImageError as error:
        return error.reason
    if has_wrong_checksum(path.read_bytes()):
        raise AssertionError("it is read, although its checksums say that it is damaged")
    return "read"


def make_image(rng: random.Random, *, _whole: list[bytes] = []) -> bytes:  # noqa: B006 -- made once a process
    """Makes a changed image."""
    _whole += [] if _whole else whole_images()
    return mutated(rng.choice(_whole), rng, _whole)


# -- settings -------------------------------------------------------------------------------------------


def make_settings(rng: random.Random) -> bytes:
    """Makes a changed settings file: lines of the example with other values, then changed bytes."""
    lines = example().splitlines()
    for _ in range(rng.randint(1, 6)):
        value = rng.choice(_VALUES) if rng.random() < 0.7 else str(rng.uniform(-1e5, 1e5))
        lines.insert(rng.randrange(len(lines) + 1), f"{rng.choice([*SETTINGS, 'nosuch'])} = {value}")
    data = "\n".join(lines).encode()
    return mutated(data, rng, [data]) if rng.random() < 0.5 else data


def read_settings(path: Path) -> str:
    """Reads one settings file. Returns what became of it. Raises what is a find."""
    try:
        load({}, file=path, env={})
    except UsageError:
        return "refused"
    return "read"


# -- the loop -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """Where files come in: how one is made, and how it is read."""

    make: Callable[[random.Random], bytes]
    read: Callable[[Path], str]


DOORS: Final = {"image": Door(make_image, read_image), "settings": Door(make_settings, read_settings)}


def _peak_kb() -> int:
    """Returns the most memory that this process ever held. `getrusage` counts that of its parent, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def at_work(door: Door, seed: int, case: Path, told: Connection) -> None:
    """Reads changed files for ever, in a process of its own. Tells of the start and the end of each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff says there what it thinks of each file
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    rng = random.Random(seed)
    case.write_bytes(door.make(rng))
    before_kb = _peak_kb()
    while True:
        told.send(("begun", ""))
        try:
            said = ("done", door.read(case))
        except BaseException:  # noqa: BLE001  whatever it is, it is a find
            said = ("find", traceback.format_exc())
        now_kb = _peak_kb()
        if (now_kb - before_kb) * 1024 > MAX_GROWTH_BYTES:
            said = ("find", f"it took {(now_kb - before_kb) / 1024:.0f} MB")
        told.send(said)
        if said[0] == "find":  # the file is kept first
            return
        case.write_bytes(door.make(rng))


def fuzz(
    name: str,
    door: Door,
    time_s: float,
    seed: int,
    folder: Path,
    *,
    hang_s: float = HANG_S,
    max_finds: int = 20,
) -> tuple[Counter[str], int]:
    """Reads changed files at one door for so long. Returns what became of them, and the number of finds."""
    end_s = time.monotonic() + time_s
    seen: Counter[str] = Counter()
    n_finds = n_processes = 0
    case = folder / name
    spawn = multiprocessing.get_context("spawn")
    while time.monotonic() < end_s and n_finds < max_finds:
        theirs, ours = spawn.Pipe()
        process = spawn.Process(
            target=at_work, args=(door, seed * 1_000_003 + n_processes, case, theirs), daemon=True
        )
        process.start()
        theirs.close()
        n_processes += 1
        find = ""
        is_begun = False
        while not find and time.monotonic() < end_s:
            try:
                if not ours.poll(hang_s if is_begun else 60.0):
                    find = f"not read within {hang_s:g} s"
                    break
                what, said = ours.recv()
            except EOFError:
                process.join()
                find = f"the process died ({process.exitcode})"
                break
            is_begun = what == "begun"
            if what == "done":
                seen[said] += 1
            elif what == "find":
                find = said
        process.kill()
        process.join()
        if find:
            n_finds += 1
            kept = folder / f"find-{name}-{n_finds}"
            kept.write_bytes(case.read_bytes())
            print(f"FOUND: {kept}: {find}", flush=True)
    return seen, n_finds


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes both doors, the decoder for most of the time. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="How long, both doors together.")
    parser.add_argument("--seed", type=int, default=None, help="For the same files again. Default: the time.")
    asked = parser.parse_args(arguments)
    seed = int(time.time()) if asked.seed is None else asked.seed
    folder = Path(tempfile.mkdtemp(prefix="rbc-edge-fuzz-"))
    print(f"folder {folder}, seed {seed}, {asked.seconds:g} s", flush=True)
    n_finds = 0
    for name, share in (("image", 0.8), ("settings", 0.2)):
        seen, n = fuzz(name, DOORS[name], asked.seconds * share, seed, folder)
        n_finds += n
        outcome = ", ".join(f"{count} {what}" for what, count in seen.most_common())
        print(f"{name}: {seen.total()} files: {outcome}; {n} finds", flush=True)
    return 1 if n_finds else 0

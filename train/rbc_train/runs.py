"""The folder of one training run: its configuration, and files that are complete or missing."""

import ctypes
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from rbc_edge.errors import UsageError

# malloc.h: option and value.
_KEEPS: Final = (
    (-8, 1),  # M_ARENA_MAX: one heap for all threads
    (-4, 0),  # M_MMAP_MAX: large tensors come from the heap, too
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: what is free stays in the heap
    (-2, 200_000_000),  # M_TOP_PAD
)


def keep_memory() -> None:
    """Has this process keep the memory that it frees.

    glibc gives each large tensor back to the system and takes it again for the next step. That was a third of
    the time of a training on the CPU. With this, a run takes the most memory that it ever needs.
    """
    with suppress(OSError, AttributeError):  # another C library, which has no such options
        for option, value in _KEEPS:
            ctypes.CDLL(None).mallopt(option, value)


def claim(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the folder of a run, or continues the run in it.

    Args:
        folder: The run's folder.
        options: All that makes this run what it is. Written to ``config.json``.

    Returns:
        The options as JSON holds them.

    Raises:
        UsageError: If the folder holds a run with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(options), indent=1, default=str) + "\n"
    file = folder / "config.json"
    if not file.is_file():
        temporary = file.with_suffix(".tmp")  # a kill must not leave half a configuration
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"{file}: the run in this folder has other options", "choose another --out, or delete the folder"
        )
    return dict(json.loads(text))


def save(file: Path, state: Mapping[str, Any]) -> None:
    """Saves a checkpoint in one step, so that a kill leaves the previous one complete."""
    temporary = file.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    temporary.replace(file)

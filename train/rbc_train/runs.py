"""The folder of one training run: its configuration, and files that are complete or missing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rbc_edge.errors import UsageError


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

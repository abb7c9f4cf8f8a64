"""Fixtures for the tests of training and export. Settings of ultralytics stay out of the user's home."""

import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_data import TinyData

os.environ["TZ"] = "UTC"  # people are shown the time of their computer
time.tzset()
_SETTINGS = tempfile.mkdtemp(prefix="rbc-edge-tests-")
atexit.register(shutil.rmtree, _SETTINGS, ignore_errors=True)
os.environ["YOLO_CONFIG_DIR"] = _SETTINGS  # read when ultralytics is first imported
os.environ["YOLO_OFFLINE"] = "True"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "TinyData":
    """Drawn data in the form of the public data. Its verified labels are the drawn truth."""
    from tiny_data import usual

    made = usual(tmp_path / "public")
    monkeypatch.setattr("rbc_train.labels.read_verified", made.verified)
    return made


@pytest.fixture
def dataset(data: "TinyData", tmp_path: Path) -> Path:
    """The dataset made from `data`, at 24 px a cell."""
    from rbc_train.data import read_public, write_dataset

    out = tmp_path / "dataset"
    txl, _ = read_public(data.folder)
    for _step in write_dataset(txl, out, cell_diameter_px=24.0, crop_margin=0.25):
        pass
    return out

"""What the workshop's tests share. ultralytics' own settings stay out of the user's home."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

_SETTINGS = tempfile.mkdtemp(prefix="rbc-edge-tests-")
atexit.register(shutil.rmtree, _SETTINGS, ignore_errors=True)
os.environ["YOLO_CONFIG_DIR"] = _SETTINGS  # read when ultralytics is first imported
os.environ["YOLO_OFFLINE"] = "True"

import tiny_data  # noqa: E402

from rbc_train import datasets  # noqa: E402


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny_data.TinyData:
    """Drawn public data, whose verified labels are the drawn truth."""
    made = tiny_data.usual(tmp_path / "public")
    monkeypatch.setattr("rbc_train.labels.read_verified", made.verified)
    return made


@pytest.fixture
def dataset(data: tiny_data.TinyData, tmp_path: Path) -> Path:
    """The dataset made of it, at 24 px a cell."""
    out = tmp_path / "dataset"
    txl, _ = datasets.read_public(data.folder)
    for _step in datasets.write_dataset(txl, out, cell_diameter_px=24.0, crop_margin=0.25):
        pass
    return out

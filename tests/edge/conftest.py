"""Fixtures of the station's tests: a bundle of a few KB, and drawn fields with a known truth."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from stand_in import write_disks

from rbc_edge import cli, config
from rbc_edge.ops.synthetic import CREAM, DrawnField, draw_slide
from rbc_edge.values import UInt8

WriteImage = Callable[[Path, UInt8], Path]


@pytest.fixture(scope="session")
def toy_bundle_path() -> Path:
    """The committed toy bundle. Tests that change a byte copy it first."""
    return Path(__file__).resolve().parent / "toy_bundle"


@pytest.fixture(scope="session")
def drawn_fields() -> tuple[DrawnField, ...]:
    """Six small fields of one slide, red cells of 40 px, in the stain the toy bundle knows. Read only."""
    fields = draw_slide(
        np.random.default_rng(2026),
        6,
        width_px=320,
        height_px=256,
        cell_diameter_px=40.0,
        crowding=0.2,
        stain=CREAM,
    )
    return tuple(fields)


@pytest.fixture(scope="session")
def write_image() -> WriteImage:
    """Writes uint8 (H, W, 3) RGB to a file of the kind of its suffix. Makes the folder, returns the path."""

    def write(path: Path, image: UInt8) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        done, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        assert done
        path.write_bytes(data.tobytes())  # not cv2.imwrite: it cannot write names that are not UTF-8
        return path

    return write


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of nobody else: no variables, no file of the user, no file of the system."""
    for name in [name for name in os.environ if name.startswith("RBC_EDGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(config, "_SYSTEM_FILE", tmp_path / "none.toml")


@pytest.fixture
def rbc(own_settings: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; returns exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    """A folder with one slide, s1, of three fields."""
    for i in range(3):
        write_disks(tmp_path / "camera" / "s1" / f"{i}.png", 4 + i, seed=i)
    return tmp_path / "camera"

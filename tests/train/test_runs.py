"""The folder of a run: not two runs in one, and no half-written checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from rbc_edge.errors import UsageError
from rbc_train import runs


def test_a_run_is_taken_up_with_the_same_options_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    options = {"seed": 1, "dataset": Path("x"), "epochs": None}
    assert runs.claim(folder, options) == {"seed": 1, "dataset": "x", "epochs": None}
    assert runs.claim(folder, options) == runs.claim(folder, dict(options))
    with pytest.raises(UsageError, match="has other options"):
        runs.claim(folder, options | {"seed": 2})
    assert json.loads((folder / "config.json").read_text())["seed"] == 1


def test_a_kill_while_the_config_is_written_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(file: Path, text: str, **_more: object) -> int:
        file.write_bytes(text.encode()[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(KeyboardInterrupt):
            runs.claim(tmp_path, {"seed": 1})
    assert runs.claim(tmp_path, {"seed": 1}) == {"seed": 1}
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "resume.pt"
    runs.save(file, {"epoch": 1})

    def cut(_state: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            runs.save(file, {"epoch": 2})
    assert torch.load(file, weights_only=True) == {"epoch": 1}
    runs.save(file, {"epoch": 3})
    assert torch.load(file, weights_only=True) == {"epoch": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["resume.pt"]


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange:
        """A library without these options."""

    monkeypatch.setattr("ctypes.CDLL", lambda _name: Strange())
    runs.keep_memory()

from pathlib import Path

import pytest

from bench import growth, tiny
from rbc_edge.store.queries import Reader
from rbc_edge.vision.image_file import load_field


def test_tiny_images_are_images_and_all_different(tmp_path: Path) -> None:
    tiny.write_tiny(tmp_path, 101)
    files = sorted(tmp_path.rglob("*.bmp"))
    assert len({load_field(f, "s", f.name).sha256 for f in files}) == 101
    assert {f.parent.name for f in files} == {"slide-00000", "slide-00001"}


def test_every_image_gets_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "N_ADDED", 3)
    first, again = growth.cost_of_run(5, tmp_path)
    ledger_ms, tables_ms = growth.cost_of_adding(tmp_path / "out", 5)
    assert min(first, again, ledger_ms, tables_ms) > 0
    with Reader.open(tmp_path / "out") as ledger:
        assert ledger.tally().n_ok == 5 + 3
    lines = (tmp_path / "out" / "added-0.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 3

import json
import re
from pathlib import Path

import pytest
from command_line import Run, rows
from stand_in import TOY_BUNDLE

pytestmark = pytest.mark.usefixtures("own_settings")


def test_settings_come_from_environment_and_file(
    rbc: Run, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "xdg" / "rbc-edge" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f"out = '{tmp_path / 'configured'}'\ncell_diameter = 40\n")
    monkeypatch.setenv("RBC_EDGE_BUNDLE", str(TOY_BUNDLE))
    code, _, _ = rbc("run", camera)
    assert code == 0
    assert rows(tmp_path / "configured" / "s1.csv")[0]["scale_source"] == "cell-diameter"
    code, said, _ = rbc("config", "show")
    assert code == 0
    assert re.search(rf"^cell_diameter +40\.0 +{re.escape(str(file))}:2$", said, re.M)
    assert re.search(r"^bundle .* RBC_EDGE_BUNDLE$", said, re.M)
    assert json.loads(rbc("config", "show", "--json")[1])["threads"] == {"value": 0, "source": "default"}
    assert rbc("config", "validate") == (0, f"{file}: valid\n", "")
    file.write_text("thread = 1\n")
    code, _, complained = rbc("config", "validate")
    assert code == 2
    assert "did you mean threads?" in complained


def test_config_init_writes_where_settings_are_looked_for(rbc: Run, tmp_path: Path) -> None:
    file = tmp_path / "xdg" / "rbc-edge" / "config.toml"
    code, said, complained = rbc("config", "init", "--out", tmp_path / "results")
    assert (code, said.startswith(f"{file}: written"), complained) == (0, True, "")
    line = file.read_text().splitlines().index(f'out = "{tmp_path / "results"}"') + 1
    assert re.search(rf"^out .* {re.escape(str(file))}:{line}$", rbc("config", "show")[1], re.M)
    assert rbc("config", "init")[0] == 2
    assert rbc("config", "init", "--force")[0] == 0
    assert rbc("config", "init", "--file", "-") == (0, file.read_text(), "")


def test_validate_names_every_error_at_once(
    rbc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "station.toml"
    file.write_text('cell_diameter = "80px"\nthreads = 99\ncamera = "/x"\ncells = true\n')
    monkeypatch.setenv("RBC_EDGE_SETTLE_S", "soon")
    code, said, complained = rbc("config", "validate", "--config", file)
    assert (code, said) == (2, "")
    wrong = ("cell_diameter is '80px'", "threads is 99", "unknown setting 'camera'", "settle_s is 'soon'")
    assert all(complained.count(text) == 1 for text in wrong)
    assert complained.count("rbc-edge: ") == 4
    file.write_text("threads = 2\n")
    monkeypatch.delenv("RBC_EDGE_SETTLE_S")
    assert rbc("config", "validate", "--config", file)[0] == 0

import json
import re
from pathlib import Path

import pytest
from command_line import Run
from stand_in import TOY_BUNDLE

import rbc_edge
from rbc_edge.errors import BundleError
from rbc_edge.vision import selftest
from rbc_edge.vision.bundle import Bundle

pytestmark = pytest.mark.usefixtures("own_settings")


def test_bundle_that_is_missing_is_exit_4(rbc: Run, camera: Path, tmp_path: Path) -> None:
    code, _, complained = rbc("run", camera, "--out", tmp_path / "out", "--bundle", tmp_path / "none")
    assert code == 4
    assert complained.startswith("rbc-edge: ")
    assert rbc("bundle", "show", "--bundle", tmp_path / "none")[0] == 4


def test_bundle_show(rbc: Run) -> None:
    code, said, _ = rbc("bundle", "show", "--bundle", TOY_BUNDLE, "--json")
    assert code == 0
    bundle_id = json.loads(said)["bundle_id"]
    assert f"bundle_id: {bundle_id}\n" in rbc("bundle", "show", "--bundle", TOY_BUNDLE)[1]


def test_bundle_verify(rbc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("bundle", "verify", "--bundle", TOY_BUNDLE)
    monkeypatch.setattr(selftest, "verify", lambda *_, **__: selftest.SelfTest(20, 19, 0, 0.21, 0.0126))
    code, said, complained = rbc(*asked)
    assert (code, complained) == (0, "")
    assert "19 cells of 20, boxes within 0.2 px, scores within 0.013" in said
    answer = json.loads(rbc(*asked, "--json")[1])
    assert (answer["verified"], answer["n_found"]) == (True, 19)

    def differs(*_: object, **__: object) -> None:
        raise BundleError("this machine sees 3 cells", "report this")

    monkeypatch.setattr(selftest, "verify", differs)
    assert rbc(*asked) == (4, "", "rbc-edge: this machine sees 3 cells\n  report this\n")


def test_version_names_the_bundle_that_would_count(
    rbc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, toy = (Bundle.open(path).bundle_id for path in (None, TOY_BUNDLE))
    program = f"rbc-edge {rbc_edge.__version__}"
    assert rbc("--version") == (0, f"{program}, bundle {shipped}\n", "")
    monkeypatch.setenv("RBC_EDGE_BUNDLE", str(TOY_BUNDLE))
    assert rbc("--version") == (0, f"{program}, bundle {toy}\n", "")
    monkeypatch.setenv("RBC_EDGE_BUNDLE", str(tmp_path))
    assert rbc("--version") == (0, f"{program}, no bundle\n", "")
    monkeypatch.setenv("RBC_EDGE_BUNDEL", "x")  # wrong settings do not hide the version
    assert rbc("--version") == (0, f"{program}, bundle {shipped}\n", "")


def test_bundle_show_is_ten_lines_and_all_of_it_when_asked(rbc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, short, _ = rbc("bundle", "show")
    assert (code, short.count("\n")) == (0, 10)
    bundle = Bundle.open()
    assert short.startswith(f"bundle_id: {bundle.bundle_id}\n")
    assert "training data: TXL-PBC" in short
    assert re.search(r"^accuracy: \d\d\.\d% of the red cells found, \d\d\.\d% ", short, re.M)
    everything = rbc("bundle", "show", "--all")[1]
    assert everything.count("\n") > 500
    for key in json.loads(rbc("bundle", "show", "--json")[1]):
        assert re.search(rf"^{key}:", everything, re.M), key
    toy = rbc("bundle", "show", "--bundle", TOY_BUNDLE)[1]
    assert "accuracy: not measured\n" in toy and "training data: none\n" in toy

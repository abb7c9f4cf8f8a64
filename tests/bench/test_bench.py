import json
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.__main__ import FLOOR, OURS, Bench, Plan
from bench.figures import plain


@pytest.mark.slow
def test_a_run_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    plan = Plan(
        fields=4,
        fewer=((FLOOR, 2), ("yolo PyTorch 640", 2)),
        mosaics=((2, 2),),
        threads=(2,),
        rounds=1,
        mosaic_rounds=1,
        inside_rounds=1,
    )
    run = Bench(plan, None, tmp_path)
    for part in (run.fields, run.mosaics, run.stages, run.size):
        part()
    found = run.conclude()
    assert {key[0] for key in run.samples} == {OURS, FLOOR}
    (ours,) = run.samples[OURS, "fields", 2]
    assert ours.n == 4
    assert ours.cells > 20
    assert found["images"]["mosaic-2"]["megapixels"] == pytest.approx(1.23, abs=0.01)
    assert found["installed_mb"]["numpy"] > 5
    assert "torch" not in found["installed_mb"]
    assert json.loads(json.dumps(plain(found)))["samples"]["rbc-edge run, fields, 2"][0]["n"] == 4
    text = "\n".join(run.lines())
    assert "left out: yolo predict: torch, ultralytics, onnx not installed" in text
    assert "not measured" in next(line for line in text.splitlines() if line.startswith("fields/s against"))
    assert {"detect", "decode", "ledger"} <= {line.split("  ")[0] for line in text.splitlines()}


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(["--images", str(tmp_path / "none")])
    assert left.value.code == 2
    assert "none: no such folder" in capsys.readouterr().err

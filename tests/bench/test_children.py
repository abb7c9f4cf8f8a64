import os
import subprocess
import sys

import pytest

from bench.children import ROOT, ChildError, environment, run, start

ASK = """
import os
print(len(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"], "RBC_EDGE_OUT" in os.environ)
"""


def test_a_child_gets_the_cores_the_threads_and_no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBC_EDGE_OUT", "elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = os.sched_getaffinity(0)
    assert run([sys.executable, "-c", ASK], threads=1).output.split() == ["1", "1", "False"]
    assert os.sched_getaffinity(0) == before


def test_memory_is_the_childs_own() -> None:
    # Measured by a small process, as in the benchmark. Else the memory of this one would count for the child.
    ask = (
        "import sys; from bench.children import run\n"
        "for program in ('pass', 'x = bytearray(b\"x\") * 80_000_000'):\n"
        "    print(run([sys.executable, '-c', program], threads=1).peak_rss_mb)"
    )
    told = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, check=True, timeout=60)
    small, large = map(float, told.stdout.split())
    assert small < 40
    assert 70 < large - small < 90


def test_the_measuring_process_is_small() -> None:
    ask = "import sys, bench.__main__; print({'numpy', 'cv2', 'torch', 'onnxruntime'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, check=True, timeout=60)
    assert told.stdout.strip() == b"set()"


def test_json_is_read_from_the_last_line_or_from_all() -> None:
    assert run(["printf", 'said before\n{"a": 1}\n'], threads=1).json() == {"a": 1}
    assert run(["printf", '{\n "a": 1\n}\n'], threads=1).json() == {"a": 1}


def test_a_child_that_fails_is_named_with_the_end_of_its_output() -> None:
    with pytest.raises(ChildError, match="ended with 3: not today"):
        run(["sh", "-c", "echo not today >&2; exit 3"], threads=1)


def test_a_child_may_be_left_running() -> None:
    child = start(["cat"], threads=1, stdout=subprocess.PIPE)
    assert child.communicate(timeout=20)[0] == b""


def test_other_variables_stay() -> None:
    assert environment(2)["PATH"] == os.environ["PATH"]
    assert environment(2)["OMP_NUM_THREADS"] == "2"

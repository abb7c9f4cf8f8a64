import os
import sys
from pathlib import Path

import pytest
from stand_in import TOY_BUNDLE, write_disks

from rbc_edge.station.sandbox import Interrupted, survives


def child(tmp_path: Path, code: str) -> list[str]:
    """A program of our own in the place of rbc-edge."""
    (tmp_path / "child.py").write_text(f"import os, signal, sys, time\n{code}\n")
    return [sys.executable, str(tmp_path / "child.py")]


def test_an_image_that_is_counted_survives(tmp_path: Path) -> None:
    write_disks(tmp_path / "a.png", 3)
    (tmp_path / "broken.png").write_bytes(b"no image")
    options = ["--bundle", str(TOY_BUNDLE), "--cell-diameter", "40"]
    assert survives([tmp_path / "a.png", tmp_path / "broken.png"], options=options)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(3)", True),
        ("sys.exit(0)", True),
        ("sys.exit(1)", False),  # a bug that the image brings to light
        ("sys.exit(2)", None),
        ("sys.exit(4)", None),
        ("sys.exit(5)", None),  # no space, no memory
        ("os.abort()", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("os.kill(os.getpid(), signal.SIGSEGV)", False),
    ],
)
def test_only_a_count_proves_innocence_and_only_a_death_guilt(
    tmp_path: Path, code: str, expected: bool | None
) -> None:
    command = child(tmp_path, code)
    assert survives([tmp_path / "a.png"], options=[], command=command) is expected


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    command = child(tmp_path, "signal.pause()")
    assert not survives([tmp_path / "a.png"], options=[], command=command, timeout_s=0.3)


def test_called_off_or_asked_to_leave_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        survives([tmp_path], options=[], command=child(tmp_path, "signal.pause()"), keep_going=lambda: False)
    for leaves in ("os.kill(os.getpid(), signal.SIGTERM)", "sys.exit(143)"):
        with pytest.raises(Interrupted):
            survives([tmp_path], options=[], command=child(tmp_path, leaves))


def test_the_child_has_no_settings_but_those_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBC_EDGE_OUT", "/elsewhere")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    code = f"open({str(tmp_path / 'said')!r}, 'w').write(repr((sorted(os.environ), sys.argv[1:])))"
    assert survives([tmp_path / "-a.png"], options=["--threads", "1"], command=child(tmp_path, code))
    said = (tmp_path / "said").read_text()
    assert "RBC_EDGE" not in said
    assert "NOTIFY" not in said
    assert f"'run', '--threads', '1', '--config', '{os.devnull}'" in said
    assert f"'--', '{tmp_path / '-a.png'}'" in said


def test_what_a_killed_trial_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    of_the_dead = tmp_path / "tmp" / ".rbc-edge-sandbox-999999999-x"
    of_the_living = tmp_path / "tmp" / f".rbc-edge-sandbox-{os.getppid()}-x"
    for folder in (of_the_dead / "cells", of_the_living):
        folder.mkdir(parents=True)
    assert survives([tmp_path / "a.png"], options=[], command=child(tmp_path, "sys.exit(0)"))
    assert list((tmp_path / "tmp").iterdir()) == [of_the_living]


def test_without_room_for_a_trial_nothing_is_known_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    command = child(tmp_path, "sys.exit(0)")
    assert survives([tmp_path / "a.png"], options=[], command=command) is None
    assert survives([tmp_path / "a.png"], options=[], command=command, folder=tmp_path) is True
    assert survives([tmp_path / "a.png"], options=[], command=["/no/such/program"], folder=tmp_path) is None

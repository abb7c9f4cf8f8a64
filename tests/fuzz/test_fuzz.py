"""The search for hostile files finds what it is made for."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import (
    Door,
    fuzz,
    has_wrong_checksum,
    main,
    make_image,
    mutated,
    read_image,
    whole_images,
)


def make(_: random.Random) -> bytes:
    return b"x"


def raises(_: Path) -> str:
    raise KeyError("tail")


def hangs(_: Path) -> str:
    time.sleep(60)
    return ""


def dies(_: Path) -> str:
    os._exit(11)


def takes_memory(_: Path) -> str:
    return str(len(bytearray(os.urandom(1) * 400_000_000)))


@pytest.mark.parametrize(
    ("read", "words"),
    [(raises, "KeyError: 'tail'"), (hangs, "not read within"), (dies, "died (11)"), (takes_memory, "MB")],
)
def test_each_kind_of_find_is_told_and_kept(
    read: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = {"hang_s": 0.5 if read is hangs else 60.0, "max_finds": 1}
    _, n = fuzz("door", Door(make, read), 120.0, 0, tmp_path, **bounds)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert n == 1
    assert words in said
    assert (tmp_path / "find-door-1").read_bytes() == b"x"


def test_whole_images_are_read_and_a_damaged_one_that_is_read_is_a_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    for data in whole_images():
        path.write_bytes(data)
        assert read_image(path) == "read"
        assert not has_wrong_checksum(data)
    path.write_bytes(whole_images()[0][:-20] + b"\0" * 8 + whole_images()[0][-12:])
    assert read_image(path) == "truncated"
    deflated = next(d for d in whole_images() if d[:2] == b"II" and b"x\x9c" in d)
    at = deflated.index(b"x\x9c") + 100
    assert has_wrong_checksum(deflated[:at] + bytes([deflated[at] ^ 1]) + deflated[at + 1 :])
    monkeypatch.setattr(fuzzing, "load_field", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="its checksums"):
        read_image(path)


def test_the_same_seed_makes_the_same_files() -> None:
    one, other = ([make_image(random.Random(seed)) for seed in range(20)] for _ in range(2))
    assert one == other
    assert len(set(one)) > 15
    assert mutated(b"", random.Random(0), [b""]) is not None


def test_some_seconds_find_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "10", "--seed", "1"]) == 0
    assert "settings: " in capsys.readouterr().out

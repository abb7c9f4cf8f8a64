import stat
import tomllib
from pathlib import Path

import pytest

from rbc_edge import config
from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.ops.settings_file import check_writable, write_new, write_settings


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "threads = 3\n"),
        ("cells = true", "cells = true\nthreads = 3\n"),
        ("threads=1", "threads = 3"),
        (
            "# ours\nthreads = 1  # the camera has the other\ncells = true\n",
            "# ours\nthreads = 3  # the camera has the other\ncells = true\n",
        ),
        (
            "# Threads; 0: as it has.\n#threads = 0\n\nquiet = true\n",
            "# Threads; 0: as it has.\n#threads = 0\nthreads = 3\n\nquiet = true\n",
        ),
        (
            "cells = true\r\nthreads = 1\r\nquiet = true\r\n",
            "cells = true\r\nthreads = 3\r\nquiet = true\r\n",
        ),
        ("#threads = 0\r\n", "#threads = 0\r\nthreads = 3\r\n"),
        ("marker = '''threads'''\n", "marker = '''threads'''\nthreads = 3\n"),
        ("# threads = 0\n", "# threads = 0\nthreads = 3\n"),
        ("threads = 1 # three = 3\n[later]\nthreads = 9\n", None),  # not a settings file
        ('"threads" = 2\n', None),  # a form that is not changed
        ('slide_pattern = """\nthreads = 1\n"""\n', None),
    ],
)
def test_one_key_changes_and_nothing_else(tmp_path: Path, before: str, after: str | None) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(before.encode())
    if after is None:
        with pytest.raises(UsageError):
            write_settings(file, {"threads": 3})
        assert file.read_bytes() == before.encode()
    else:
        write_settings(file, {"threads": 3})
        assert file.read_bytes() == after.encode()
        assert config.load({}, file=file, env={}).settings.threads == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.toml"]


def test_the_shipped_example_can_be_changed(tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "deploy" / "systemd" / "config.toml"
    file = tmp_path / "c.toml"
    file.write_bytes(example.read_bytes())
    values: dict[str, int | str] = {"threads": 2, "precision": "fp32"}
    for _ in range(2):  # the second time in the same lines
        write_settings(file, values)
        assert tomllib.loads(file.read_text()) == tomllib.loads(example.read_text()) | values
        assert len(file.read_text().splitlines()) == len(example.read_text().splitlines()) + 2


def test_a_file_with_an_error_is_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    for wrong in ("thraeds = 1\n", "threads = \n", "threads = 1000\n"):
        file.write_text(wrong)
        with pytest.raises(UsageError, match=r"c\.toml"):
            write_settings(file, {"threads": 2})
        assert file.read_text() == wrong


def test_mode_and_link_stay_and_folders_are_made(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("threads = 1\n")
    file.chmod(0o640)
    (tmp_path / "link.toml").symlink_to(file)
    write_settings(tmp_path / "link.toml", {"threads": 2})
    assert (tmp_path / "link.toml").is_symlink()
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("threads = 2\n", 0o640)
    write_settings(tmp_path / "new" / "config.toml", {"threads": 2})
    assert (tmp_path / "new" / "config.toml").read_text() == "threads = 2\n"


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot write it"):
        write_settings(tmp_path / "file" / "c.toml", {"threads": 2})
    with pytest.raises(UnavailableError, match="cannot write it"):
        check_writable(tmp_path)


def test_a_new_file_and_never_over_an_old_one(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "c.toml"
    write_new(file, config.example(), force=False)
    assert file.read_text() == config.example()
    file.write_text("threads = 1\n")
    with pytest.raises(UsageError, match=r"there are settings already.*--force"):
        write_new(file, config.example(), force=False)
    assert file.read_text() == "threads = 1\n"
    write_new(file, config.example(out=Path("/r")), force=True)
    assert config.load({}, file=file, env={}).settings.out == Path("/r")
    assert [p.name for p in file.parent.iterdir()] == ["c.toml"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot write") as caught:
        write_new(tmp_path / "file" / "c.toml", config.example(), force=False)
    assert caught.value.exit_code == 5


def test_a_byte_order_mark_stays(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xef\xbb\xbfthreads = 1\n")
    write_settings(file, {"threads": 3})
    assert file.read_bytes() == b"\xef\xbb\xbfthreads = 3\n"

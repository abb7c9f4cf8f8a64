import os
from pathlib import Path

import pytest

from rbc_edge.station.source import Events, Mount, WakeEvent, mount_of, probe

MOUNTINFO = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / /mnt/share rw,relatime - cifs //camera/images rw,vers=3
31 22 0:31 / /mnt/share\040two rw - fuse.sshfs me@host:/x rw
32 22 254:1 /day1 /mnt/bound rw shared:2 - ext4 /dev/vdb rw
33 30 0:33 / /mnt/share/inner rw - tmpfs none rw
34 32 0:34 / /mnt/bound rw - nfs4 server:/b rw
a broken line
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_bytes(MOUNTINFO)
    return path


@pytest.mark.parametrize(
    ("path", "expected", "gives_events"),
    [
        ("/srv/camera", Mount("/", "/", "ext4", "/dev/vda"), True),
        ("/mnt/share/slide", Mount("/mnt/share", "/", "cifs", "//camera/images"), False),
        ("/mnt/share two", Mount("/mnt/share two", "/", "fuse.sshfs", "me@host:/x"), False),
        ("/mnt/sharers", Mount("/", "/", "ext4", "/dev/vda"), True),
        ("/mnt/share/inner/a", Mount("/mnt/share/inner", "/", "tmpfs", "none"), True),
        ("/mnt/bound/a", Mount("/mnt/bound", "/", "nfs4", "server:/b"), False),  # the last lies on top
    ],
)
def test_what_a_folder_lies_on(mounts: Path, path: str, expected: Mount, gives_events: bool) -> None:
    assert mount_of(Path(path), mounts=mounts) == expected
    assert expected.gives_events is gives_events


def test_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert mount_of(tmp_path, mounts=tmp_path / "none") is None
    real = mount_of(tmp_path)
    assert real is not None
    assert tmp_path.is_relative_to(real.point)


def test_a_mount_is_said_in_words() -> None:
    assert str(Mount("/mnt", "/day1", "ext4", "/dev/vdb")) == "ext4 /dev/vdb/day1 on /mnt"


def test_a_folder_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "camera").mkdir()
    sight = probe(tmp_path / "camera")
    assert (sight.missing, sight.mount) == ("", mount_of(tmp_path))
    status = (tmp_path / "camera").stat()
    assert sight.identity == (status.st_dev, status.st_ino)
    assert "no such file" in probe(tmp_path / "gone").missing
    (tmp_path / "file").touch()
    assert "not a directory" in probe(tmp_path / "file").missing


def test_without_its_marker_the_share_is_away(tmp_path: Path) -> None:
    assert "marker .station is not there" in probe(tmp_path, marker=".station").missing
    (tmp_path / ".station").touch()
    assert probe(tmp_path, marker=".station").missing == ""


def test_wake_tells_ringing_from_time_and_gathers_closed_files() -> None:
    wake = WakeEvent()
    assert wake.wait(0) is None
    wake.wake()
    wake.wake(Path("/a"))
    wake.wake(Path("/b"))
    assert wake.wait(10) == {Path("/a"), Path("/b")}
    wake.wake()
    assert wake.wait(10) == set()
    assert wake.wait(0) is None


def test_events_tell_of_closed_and_moved_files_also_in_new_folders(tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    (folder / "s").mkdir(parents=True)
    wake = WakeEvent()
    events = Events(wake.wake)
    assert events.start(folder) == ""
    assert events.are_on
    try:
        path = folder / "s" / os.fsdecode(b"\xff.png")
        path.write_bytes(b"x")
        wait_for(wake, path)
        (folder / "s" / ".a.tmp").write_bytes(b"x")
        (folder / "s" / ".a.tmp").rename(folder / "s" / "a.png")
        wait_for(wake, folder / "s" / "a.png")
    finally:
        events.stop()
    assert not events.are_on


def wait_for(wake: WakeEvent, path: Path) -> None:
    for _ in range(100):
        if path in (wake.wait(10) or ()):
            return
    pytest.fail(f"nobody told of {path!r}")


def test_events_of_a_folder_that_is_gone_say_why(tmp_path: Path) -> None:
    events = Events(lambda _: None)
    assert "cannot watch" in events.start(tmp_path / "gone")
    assert not events.are_on
    events.stop()

import logging
import os
import signal
from math import inf
from pathlib import Path

import pytest

from rbc_edge.errors import UnavailableError, UsageError
from rbc_edge.station import inbox
from rbc_edge.station.inbox import Debounce, check_pattern, scan
from rbc_edge.text import path_text
from rbc_edge.values import InboxFile


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(*paths: Path, slide_pattern: str | None = None) -> list[tuple[str, str]]:
    return [(f.slide_id, f.fov) for f in scan(paths, slide_pattern=slide_pattern).files]


def test_folders_are_slides_at_any_depth_in_plain_order(tmp_path: Path) -> None:
    top = tmp_path / "day"
    touch(top / "f10.png", top / "f2.JPG", top / "s" / "a.tif", top / "s" / "deep" / "b.bmp")
    assert names(top) == [("day", "f10"), ("day", "f2"), ("s", "a"), ("s--deep", "b")]


def test_what_the_scan_saw_of_a_file(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    (file,) = scan([tmp_path]).files
    status = (tmp_path / "a.png").stat()
    assert (file.path, file.size_bytes, file.mtime_ns) == (tmp_path / "a.png", 1, status.st_mtime_ns)


def test_relative_folder_is_named_after_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "slide7" / "a.png")
    monkeypatch.chdir(tmp_path / "slide7")
    assert names(Path()) == [("slide7", "a")]
    assert scan([Path()]).files[0].path.is_absolute()


def test_a_file_belongs_to_its_folder_and_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.dat", tmp_path / "s" / "b.png")
    assert names(tmp_path / "s" / "a.dat") == [("s", "a")]


def test_hidden_and_other_files_are_passed_over_and_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(
        tmp_path / "a.png", tmp_path / ".b.png", tmp_path / ".h" / "c.png", tmp_path / "n.txt", tmp_path / "m"
    )
    os.mkfifo(tmp_path / "pipe.png")
    with caplog.at_level(logging.INFO, "rbc_edge"):
        inbox = scan([tmp_path])
    assert [f.fov for f in inbox.files] == ["a"]
    assert inbox.n_skipped == 3
    assert len(caplog.records) == 1


def test_same_file_by_two_ways_is_taken_once(tmp_path: Path) -> None:
    file = tmp_path / "s" / "a.png"
    touch(file)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    assert names(tmp_path / "s", file, tmp_path, tmp_path / "link" / "a.png") == [("s", "a")]


def test_links_are_read_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "s" / "a.png", tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "s" / "again").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "s" / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    assert names(tmp_path / "in") == [("linked", "b"), ("s", "a"), ("s", "c")]


def test_link_to_nowhere_is_taken_so_that_it_fails_visibly(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    assert names(tmp_path) == [(tmp_path.name, "gone")]


def test_two_files_with_one_stem_keep_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.png", tmp_path / "s" / "a.jpg", tmp_path / "s" / "b.png")
    assert names(tmp_path / "s") == [("s", "a.jpg"), ("s", "a.png"), ("s", "b")]


def test_names_that_are_not_utf8_are_escaped_and_still_open(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/sl\xffide"
    os.mkdir(folder)  # noqa: PTH102
    with open(folder + b"/f\xfe.png", "wb") as file:  # noqa: PTH123
        file.write(b"content")
    (found,) = scan([Path(os.fsdecode(folder))]).files
    assert (found.slide_id, found.fov) == (r"sl\xffide", r"f\xfe")
    assert found.path.read_bytes() == b"content"
    assert path_text(found.path).endswith(r"sl\xffide/f\xfe.png")


def test_slide_pattern_finds_slide_and_fov_and_falls_back_to_the_folder(tmp_path: Path) -> None:
    touch(tmp_path / "d" / "A_01.png", tmp_path / "d" / "A_02.png", tmp_path / "d" / "B_01.png")
    touch(tmp_path / "d" / "other.png")
    pattern = r"(?P<slide>[A-Z])_(?P<fov>\d+)"
    assert names(tmp_path / "d", slide_pattern=pattern) == [
        ("A", "01"),
        ("A", "02"),
        ("B", "01"),
        ("d", "other"),
    ]
    assert names(tmp_path / "d", slide_pattern=r"^(?P<slide>[A-Z])_")[0] == ("A", "A_01")


def test_slide_pattern_may_gather_a_slide_from_two_folders(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "A_1.png", tmp_path / "y" / "A_2.png")
    assert names(tmp_path, slide_pattern=r"(?P<slide>[A-Z])_") == [("A", "A_1"), ("A", "A_2")]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        *(("(", "slide pattern"), (r"(\d+)", "no group named slide")),
        *(("(?P<slide>x{99999999999})", "too large"), (f"(?P<slide>{'(' * 5000}a{')' * 5000})", "recursion")),
    ],
)
def test_wrong_slide_pattern(tmp_path: Path, pattern: str, said: str) -> None:
    touch(tmp_path / "a.png")
    with pytest.raises(UsageError, match=said):
        scan([tmp_path], slide_pattern=pattern)


def test_a_name_in_two_forms_of_unicode_is_one_name(tmp_path: Path) -> None:
    touch(tmp_path / "d" / "Jos\u00e9" / "a.png", tmp_path / "d" / "Jose\u0301" / "e\u0301.png")
    assert names(tmp_path / "d") == [("Jos\u00e9", "a"), ("Jos\u00e9", "\u00e9")]
    assert names(tmp_path / "d", slide_pattern="(?P<slide>\u00e9|a)") == [("a", "a"), ("\u00e9", "\u00e9")]


def test_a_slide_pattern_that_is_not_found_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "A_1.png", tmp_path / "b.png")
    with pytest.raises(UsageError, match="not found in 2 of 2 file names"):
        scan([tmp_path], slide_pattern="(?P<slide>[0-9]+)-")
    assert not caplog.records
    scan([tmp_path], slide_pattern="(?P<slide>[A-Z])_")
    assert "not found in 1 of 2 file names, such as b.png" in caplog.text
    caplog.clear()
    (problem,) = scan([tmp_path], slide_pattern="(?P<slide>[0-9]+)-", go_on=True).clashes
    assert "2 of 2" in problem
    assert not caplog.records


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "s" / "a.png", tmp_path / "y" / "s" / "b.png")
    with pytest.raises(UsageError, match=r"x/s and .*y/s.*parent") as caught:
        scan([tmp_path / "x" / "s", tmp_path / "y" / "s"])
    assert caught.value.exit_code == 2
    assert names(tmp_path) == [("x--s", "a"), ("y--s", "b")]


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "A_1.png", tmp_path / "y" / "A_1.png")
    with pytest.raises(UsageError, match="two images of slide A"):
        scan([tmp_path], slide_pattern=r"(?P<slide>[A-Z])_")


def test_missing_path_empty_folder_and_special_file(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="missing: no such file") as caught:
        scan([tmp_path / "missing"])
    assert caught.value.exit_code == 5
    (tmp_path / "e").mkdir()
    with pytest.raises(UnavailableError, match=r"no image found: .*/e \(.*\.jpeg, \.jpg"):
        scan([tmp_path / "e"])
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnavailableError, match="neither a folder nor a regular file"):
        scan([tmp_path / "pipe.png"])


def test_unreadable_sub_folder_is_told_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path / "s" / "a.png", tmp_path / "locked" / "b.png")
    listing = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "locked":  # root may read everything: the system's answer is stood in for
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    inbox = scan([tmp_path])
    assert [f.fov for f in inbox.files] == ["a"]
    assert inbox.unreadable == (tmp_path / "locked",)
    assert "locked: cannot be read" in caplog.text
    with pytest.raises(UnavailableError, match="cannot list the folder"):
        scan([tmp_path / "locked"])


def test_a_service_goes_on_where_a_run_gives_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert scan([tmp_path], go_on=True).files == ()
    touch(tmp_path / "a" / "b" / "x.png", tmp_path / "a--b" / "y.png", tmp_path / "a--b" / "z.png")
    touch(tmp_path / "s" / "a.jpg.png", tmp_path / "s" / "a.jpg", tmp_path / "s" / "a.png")
    with caplog.at_level(logging.INFO, "rbc_edge"):
        inbox = scan([tmp_path], go_on=True)
    assert [(f.slide_id, f.fov) for f in inbox.files] == [("a--b", "x"), ("s", "a.jpg"), ("s", "a.png")]
    assert len(inbox.clashes) == 2
    assert "two folders would be the slide a--b" in inbox.clashes[0]
    assert "two images of slide s would have the name a.jpg" in inbox.clashes[1]
    assert not caplog.records
    with pytest.raises(UnavailableError, match="no such file"):
        scan([tmp_path / "gone"], go_on=True)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?P<slide>(a+)+)$",
        "(?P<slide>(a|a)*)$",
        "(?P<slide>(a|aa)+)_",
        "(?P<slide>([A-Za-z0-9]+[ _]?)*)-(?P<fov>[0-9]+)$",
        "(?P<slide>(.*)*)!",
        "(?P<slide>(x+x+)+)y",
    ],
)
def test_a_slide_pattern_that_never_ends_is_refused_at_the_start(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_MAX_SEARCH_S", 0.05)
    with pytest.raises(UsageError, match="too many ways") as raised:
        check_pattern(pattern)
    assert "repetition" in raised.value.advice
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def test_a_name_in_which_a_slide_pattern_never_ends_is_an_error_and_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_MAX_SEARCH_S", 0.05)
    pattern = "(?P<slide>(ab|abab)*c)"  # nothing that the check at the start tries
    check_pattern(pattern)
    (tmp_path / f"{'ab' * 100}.png").touch()
    for go_on in (False, True):
        with pytest.raises(UsageError, match="too many ways"):
            scan([tmp_path], slide_pattern=pattern, go_on=go_on)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?P<slide>[^_]+)_(?P<fov>\d+)",
        r"^(?P<slide>.+)[-_ ](?P<fov>.+)[-_ ].*$",
        r"(?P<slide>(?:[A-Z]{2}\d{4}-?){1,3})_(?P<fov>\w+)(?=\.)",
        r"(?P<slide>\w+?)(?:_(?P<fov>\d+))?\.(?:jpg|png|tiff?)$",
        r"(?P<slide>.*)_(.*)_(?P<fov>.*)_",
    ],
)
def test_slide_patterns_of_laboratories_are_taken(pattern: str) -> None:
    assert check_pattern(pattern) is not None


def test_slide_pattern_is_checked_without_a_scan() -> None:
    check_pattern(None)
    check_pattern("(?P<slide>x)")
    with pytest.raises(UsageError, match="no group named slide"):
        check_pattern("x")


def seen(name: str, size: int = 10, mtime_ns: int = 1) -> InboxFile:
    return InboxFile(Path("/camera") / name, "s", name, size, mtime_ns)


def taken(settling: Debounce, now_s: float, *files: InboxFile, closed: tuple[str, ...] = ()) -> list[str]:
    return [f.fov for f in settling.see(files, {Path("/camera") / name for name in closed}, now_s)]


def test_a_file_is_taken_when_it_has_not_changed_for_a_while() -> None:
    settling = Debounce(settle_s=2, grace_s=60)
    assert settling.next_s() == inf
    assert taken(settling, 100, seen("a"), seen("b")) == []
    assert settling.next_s() == 102
    assert taken(settling, 101, seen("a"), seen("b", size=11)) == []
    assert settling.n_waiting(101) == 2
    assert taken(settling, 102, seen("a"), seen("b", size=11)) == ["a"]
    assert taken(settling, 102.5, seen("b", size=11, mtime_ns=2)) == []
    assert taken(settling, 104.4, seen("b", size=11, mtime_ns=2)) == []
    assert taken(settling, 104.5, seen("b", size=11, mtime_ns=2)) == ["b"]
    assert taken(settling, 105) == []
    assert settling.n_waiting(105) == 0


def test_a_closed_file_is_taken_at_once_unless_it_goes_on_changing() -> None:
    settling = Debounce(settle_s=2, grace_s=60)
    assert taken(settling, 100, seen("a"), closed=("a",)) == []
    assert taken(settling, 100.1, seen("a")) == ["a"]
    assert taken(settling, 100.2, seen("a", size=20)) == []  # opened again
    assert taken(settling, 101, seen("a", size=20)) == []
    assert taken(settling, 101.1, seen("a", size=20), closed=("a",)) == ["a"]


def test_an_unfinished_file_is_tried_ever_more_seldom_and_once_more_at_the_end_of_its_grace() -> None:
    settling = Debounce(settle_s=2, grace_s=10)
    file = seen("a")
    taken(settling, 0, file)
    tries = []
    for tenth in range(1000):
        now_s = tenth / 10
        if taken(settling, now_s, file):
            tries.append((now_s, settling.is_young(file, now_s)))
            settling.put_back(file, now_s)
    assert tries[:5] == [(2.0, True), (2.5, True), (3.5, True), (5.5, True), (9.5, True)]
    assert tries[5] == (10.0, False)
    assert len(tries) <= 9
    assert settling.n_waiting(100) == 0  # nobody waits for it any more, though it is tried again
    assert taken(settling, 100, seen("a", size=11)) == []
    assert taken(settling, 102, seen("a", size=11)) == ["a"]  # finished after all


def test_files_are_as_old_as_they_say_only_where_the_clock_is_believed() -> None:
    old = seen("old", mtime_ns=int(900e9))
    future = seen("future", mtime_ns=int(2000e9))
    trusting = Debounce(settle_s=2, grace_s=60, clock_s=lambda: 1000.0)
    assert taken(trusting, 5, old, future) == ["old"]
    assert not trusting.is_young(old, 5)
    assert trusting.is_young(future, 5)
    assert taken(trusting, 7, old, future) == ["old", "future"]
    assert taken(Debounce(settle_s=2, grace_s=60), 5, old, future) == []


def test_results_of_ours_are_never_images(tmp_path: Path) -> None:
    out = tmp_path / "disk" / "out"
    touch(tmp_path / "in" / "s" / "a.png", out / "ledger.sqlite3", out / "overlays" / "s" / "a_overlay.jpg")
    touch(tmp_path / "disk" / "other" / "b.png", tmp_path / "in" / "old" / "ledger.sqlite3")
    touch(tmp_path / "in" / "old" / "c.png")
    overlays = out / "overlays"
    for name, target in (
        ("up", out.parent),
        ("pics", overlays),
        ("s1", overlays / "s"),
    ):
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "in" / "d.jpg").symlink_to(overlays / "s" / "a_overlay.jpg")
    found = scan([tmp_path / "in"])
    assert [(f.slide_id, f.fov) for f in found.files] == [("s", "a"), ("up--other", "b")]
    assert sorted(path.name for path in found.results) == ["d.jpg", "old", "out", "pics", "s1"]

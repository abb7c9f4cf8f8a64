"""When pictures are made: after the counts, bit by bit, and pages only of slides that have come to rest."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stand_in import BUNDLE_ID, StandIn, write_disks

from rbc_edge.station.job import AnalyzerRecipe
from rbc_edge.station.session import CountOptions, count_once
from rbc_edge.station.stop import Stop
from rbc_edge.store.ledger import Ledger
from rbc_edge.views.refresh import Pictures, ViewOptions
from rbc_edge.vision.counting import EdgeRule

EVERYTHING = ViewOptions(overlays=True, reports=True)


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """An output folder with two slides of two fields, without pictures."""
    for slide in ("s1", "s2"):
        for i in range(2):
            write_disks(tmp_path / "camera" / slide / f"{i}.png", 4 + i, seed=i)
    run(tmp_path, ViewOptions())
    assert not (tmp_path / "out" / "overlays").exists()
    assert not (tmp_path / "out" / "reports").exists()
    return tmp_path / "out"


def run(folder: Path, wanted: ViewOptions, stop: Stop | None = None) -> int:
    options = CountOptions(folder / "out", AnalyzerRecipe(BUNDLE_ID, StandIn), views=wanted)
    return count_once((folder / "camera",), options, stop=stop).exit_code


@pytest.fixture
def ledger(counted: Path) -> Iterator[Ledger]:
    with Ledger(counted) as opened:
        yield opened


def made(out: Path) -> list[str]:
    return sorted(
        str(p.relative_to(out)) for d in ("overlays", "reports") for p in (out / d).rglob("*") if p.is_file()
    )


def for_n(n: int) -> Callable[[], bool]:
    left = iter([True] * n)
    return lambda: next(left, False)


def test_a_run_makes_them_of_everything_that_is_counted(counted: Path) -> None:
    assert run(counted.parent, EVERYTHING) == 0
    overlays = [f"overlays/{slide}/{i}_overlay.jpg" for slide in ("s1", "s2") for i in range(2)]
    assert made(counted) == [*overlays, *(f"reports/{page}.html" for page in ("index", "s1", "s2"))]
    assert "../overlays/s1/1_overlay.jpg" in (counted / "reports" / "s1.html").read_text()


def test_a_run_that_was_stopped_makes_none(counted: Path) -> None:
    assert run(counted.parent, EVERYTHING, Stop(signal=15)) == 143
    assert made(counted) == []


def test_overlays_are_drawn_bit_by_bit(counted: Path, ledger: Ledger) -> None:
    pictures = Pictures(ledger.reader, EVERYTHING, monotonic_s=lambda: 0.0)
    pictures.changed()
    assert not pictures.catch_up(keep_going=for_n(3), reports=False)
    assert len(made(counted)) == 3
    assert pictures.catch_up(keep_going=for_n(1), reports=False)
    assert len(made(counted)) == 4
    assert pictures.catch_up(keep_going=for_n(0), reports=False)  # nothing is left to do


def test_drawing_takes_no_longer_than_it_may(counted: Path, ledger: Ledger) -> None:
    ticks = iter(range(100))
    pictures = Pictures(ledger.reader, EVERYTHING, monotonic_s=lambda: float(next(ticks)))
    pictures.changed()
    assert not pictures.catch_up(keep_going=lambda: True, time_s=2.5, reports=False)
    assert 0 < len(made(counted)) < 4


def test_a_page_is_written_when_its_slide_rests_or_never_does(counted: Path, ledger: Ledger) -> None:
    now_s = 0.0
    pictures = Pictures(ledger.reader, ViewOptions(reports=True), monotonic_s=lambda: now_s)
    pictures.changed(["s1", "s2"])
    pictures.catch_up(keep_going=lambda: True, wait=True)
    assert made(counted) == []
    now_s = 15.0
    pictures.changed(["s2"])
    now_s = 21.0
    pictures.catch_up(keep_going=lambda: True, wait=True)
    assert made(counted) == ["reports/index.html", "reports/s1.html"]
    while now_s < 301.0:
        assert "reports/s2.html" not in made(counted)
        pictures.changed(["s2"])
        pictures.catch_up(keep_going=lambda: True, wait=True)
        now_s += 10.0
    pictures.catch_up(keep_going=lambda: True, wait=True)
    assert "reports/s2.html" in made(counted)


def test_a_page_that_was_left_is_written_next_time(counted: Path, ledger: Ledger) -> None:
    pictures = Pictures(ledger.reader, ViewOptions(reports=True), monotonic_s=lambda: 0.0)
    pictures.changed()
    pictures.catch_up(keep_going=lambda: False)
    assert made(counted) == []
    pictures.catch_up(keep_going=lambda: True)
    assert len(made(counted)) == 3


def test_pages_that_cannot_be_written_are_a_warning(
    counted: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    (counted / "reports").write_bytes(b"")
    assert run(counted.parent, EVERYTHING) == 0
    assert caplog.text.count("cannot write the reports") == 1


def test_what_nobody_thought_of_is_a_warning_too(
    counted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ArithmeticError("of tomorrow")

    monkeypatch.setattr("rbc_edge.views.overlay.draw", broken)
    monkeypatch.setattr("rbc_edge.views.gallery.draw", broken)
    assert run(counted.parent, EVERYTHING) == 0
    assert "cannot be drawn: ArithmeticError" in caplog.text
    assert "the reports cannot be made: ArithmeticError" in caplog.text


def test_pictures_that_exist_are_kept_up_to_date_and_no_others_are_made(counted: Path) -> None:
    assert run(counted.parent, EVERYTHING) == 0
    (counted / "reports" / "s2.html").unlink()
    (counted / "overlays" / "s1" / "0_overlay.jpg").unlink()
    assert run(counted.parent, ViewOptions()) == 0  # the page of s1 has one link less
    before = {name: (counted / name).read_bytes() for name in made(counted)}
    assert len(before) == 5
    assert run(counted.parent, ViewOptions(longest_px=100)) == 0  # another style alone is no reason to draw
    assert {name: (counted / name).read_bytes() for name in made(counted)} == before
    assert run(counted.parent, ViewOptions(edges=EdgeRule.INSIDE)) == 0
    assert set(made(counted)) == set(before)
    assert not [name for name, old in before.items() if (counted / name).read_bytes() == old]

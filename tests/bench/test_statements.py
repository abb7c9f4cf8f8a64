from collections import Counter
from pathlib import Path

import pytest

from bench import statements
from bench.children import ChildError
from bench.statements import Counted, Measured, normalised


def counted(**n: int) -> Counted:
    return Counted(0, (Counter(), Counter(n)))


def measured(n_images: int, *, first: int, again: int = 0, service: tuple[int, ...] = (0, 0)) -> Measured:
    return Measured(n_images, counted(insert=first), counted(select=again), service)


def test_the_same_statement_of_two_images_reads_the_same() -> None:
    one = normalised("SELECT a1 FROM t\n  WHERE fov = 'it''s -- 1' AND n = 12.5 AND data = x'00ff' -- why")
    assert one == "SELECT a1 FROM t WHERE fov = ? AND n = ? AND data = ?"
    assert normalised("INSERT INTO t VALUES (1, NULL, 'x', -3)") == "INSERT INTO t VALUES (?, ...)"
    assert normalised("... WHERE x IS NOT NULL") == "... WHERE x IS NOT NULL"
    assert normalised("VALUES (?1, ?2)") == "VALUES (?1, ?2)"


def test_the_slope_leaves_out_what_every_start_costs() -> None:
    small = measured(500, first=40 + 500 * 6, again=9 + 1, service=(1, 1))
    large = measured(1500, first=40 + 1500 * 6, again=9 + 3, service=(3, 1))
    told = statements.lines(small, large, measured(500, first=2900))
    assert [line.slope for line in told] == [6.0, 5.8, 1.0, 1.0, 0.0]
    assert all(line.is_met for line in told)
    assert "MISSED" not in statements.shown(told, (500, 1500))


@pytest.mark.parametrize(
    ("large", "missed"),
    [
        (measured(1500, first=9001), "first run"),
        (measured(1500, first=9000, again=3), "second run, nothing to do"),
        (measured(1500, first=9000, service=(3, 0)), "service, first round after the start, nothing new"),
        (measured(1500, first=9000, service=(0, 3)), "service, a round, nothing new"),
    ],
)
def test_more_than_the_target_is_missed(large: Measured, missed: str) -> None:
    told = statements.lines(measured(500, first=3000), large, measured(500, first=3000))
    assert [line.name for line in told if not line.is_met] == [missed]
    (row,) = [line for line in statements.shown(told, (500, 1500)).splitlines() if "MISSED" in line]
    assert row.startswith(missed)


def test_the_most_frequent_statements_come_first() -> None:
    small = Measured(10, counted(a=30, b=10, start=7), counted(), (0, 0))
    large = Measured(20, counted(a=60, b=30, start=7), counted(c=1), (0, 0))
    head, *rows = statements.frequent(small, large, first=True).splitlines()
    assert head.startswith("an image more")
    assert [row.split() for row in rows] == [["3.00", "a"], ["2.00", "b"]]
    assert statements.frequent(small, large, first=False).splitlines()[1].split() == ["50.00", "c"]


def test_the_real_commands_are_counted(tmp_path: Path) -> None:
    found = statements.measure(6, tmp_path, a_slide=3)
    assert found.first.n > 6
    assert any("INSERT INTO" in text for text in found.first.by_text)
    assert 0 < found.again.n < found.first.n
    assert len(found.service) == 2
    assert not any("fov-000" in text for text in found.first.by_text)
    assert len((tmp_path / "out" / "slides.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2


@pytest.mark.slow
def test_the_exit_code_tells_whether_a_target_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    code = statements.main(["--sizes", "12", "4", "--slide", "4"])
    said = capsys.readouterr().out
    assert code == ("MISSED" in said)
    assert {"first run", "second run, nothing to do"} <= {line.split("  ")[0] for line in said.splitlines()}


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="ended with 5"):
        statements.count("run", tmp_path / "none", "--out", tmp_path / "out")

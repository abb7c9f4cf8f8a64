"""Text that people and files are shown."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbc_edge.text import (
    bytes_text,
    count_text,
    in_order,
    local_text,
    one_line,
    path_text,
    span_text,
    utc_text,
)


def test_a_name_that_is_not_utf8_is_text_anyway() -> None:
    assert path_text("sl\udce4ide") == r"sl\xe4ide"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\nb\tc", r"a\nb\tc"), ("sl\udce4ide", r"sl\xe4ide"), ("Größe", "Größe")],
)
def test_a_name_does_not_steer_the_terminal(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_a_noun_follows_its_number() -> None:
    assert [count_text(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


def test_sizes_change_their_unit_at_a_gigabyte() -> None:
    assert [bytes_text(n) for n in (0, 999_400_000, 1e9)] == ["0 MB", "999 MB", "1.0 GB"]


def test_spans_change_their_unit() -> None:
    assert [span_text(t) for t in (0.4, 59, 60, 7199, 7200, 172_799, 172_800)] == [
        *("0 s", "59 s", "1 min", "119 min"),
        *("2 h", "47 h", "2 days"),
    ]


def test_a_moment_is_told_in_utc() -> None:
    here = timezone(timedelta(hours=2))
    assert utc_text(datetime(2026, 5, 1, 1, 30, 0, 999, tzinfo=here)) == "2026-04-30T23:30:00Z"
    assert utc_text(datetime(2026, 5, 1, tzinfo=UTC)) == "2026-05-01T00:00:00Z"


def test_names_stand_in_the_order_in_which_people_count() -> None:
    names = ["slide103", "slide17", "slide2b", "slide2", "Slide9", "a", "10", "9", "007", "7", "1.10", "1.9"]
    assert in_order(names) == [
        *("1.9", "1.10", "007", "7", "9", "10", "Slide9", "a", "slide2", "slide2b", "slide17", "slide103"),
    ]


@settings(deadline=None)
@given(
    st.lists(st.text("ab01-9é", max_size=6), unique=True).flatmap(
        lambda n: st.tuples(st.just(n), st.permutations(n))
    )
)
def test_the_order_of_names_does_not_depend_on_their_history(both: tuple[list[str], list[str]]) -> None:
    assert in_order(both[0]) == in_order(both[1])


@settings(deadline=None)
@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_numbers_in_names_are_numbers(one: int, other: int) -> None:
    assert in_order([f"f{other}x", f"f{one}x"]) == [f"f{n}x" for n in sorted((one, other))]


@pytest.fixture
def in_kolkata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "IST-5:30")  # a zone that needs no file of zones
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("in_kolkata")
def test_a_time_is_shown_as_on_the_wall_and_in_utc() -> None:
    assert local_text("2026-05-01T20:00:00Z") == "2026-05-02 01:30:00 IST (2026-05-01T20:00:00Z)"
    assert [local_text(text) for text in ("", "2026-05-01T20:00:00", "9999-12-31T23:59:59Z", "?Z")] == [
        *("", "2026-05-01T20:00:00", "9999-12-31T23:59:59Z", "?Z"),
    ]


def test_a_computer_that_lives_in_utc_shows_one_time() -> None:
    assert local_text("2026-05-01T20:00:00Z").startswith("2026-05-01")

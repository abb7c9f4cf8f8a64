"""Text that people and files are shown."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from rbc_edge.text import bytes_text, count_text, one_line, path_text, span_text, utc_text


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

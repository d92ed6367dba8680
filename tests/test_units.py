from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit.errors import ConfigError
from tunekit.units import format_bytes, format_count, format_seconds, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 GiB", 12 * 2**30),
        ("1.5G", 3 * 2**29),
        ("500 MB", 500_000_000),
        ("8gib", 8 * 2**30),
        ("10 kB", 10_000),
        ("0", 0),
        ("7 B", 7),
        (4096, 4096),
    ],
)
def test_parse_bytes(text: str | int, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "12 GiX", "-1 GiB", "1 i", "1,5 GiB", True])
def test_parse_bytes_refuses(text: str):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=12)
    | st.from_regex(r"[ ]?[0-9]{0,400}[.]?[0-9]{0,3} ?[kKmMgGtT]?i?[bB]?", fullmatch=True)
    | st.integers(-(2**70), 2**70)
)
def test_any_text_is_a_size_or_is_refused(text: str | int):
    for read in (parse_bytes, lambda value: parse_budget(str(value))):
        try:
            size = read(text)
        except ConfigError:
            continue
        assert 0 <= size <= 2**50


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**50))
def test_what_is_written_of_a_size_is_read_as_nearly_that(count: int):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_288_490_189, "1.2 GiB"),
        (2**30 - 1, "1.0 GiB"),
        (2**40, "1.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_bytes(count: int, expected: str):
    assert format_bytes(count) == expected


@pytest.mark.parametrize("count", [0, 5, 3 * 2**20, 12 * 2**30])
def test_bytes_round_trip(count: int):
    assert parse_bytes(format_bytes(count)) == count


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0042, "4.2 ms"),
        (12.34, "12.3 s"),
        (59.99, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7260, "2 h 1 min"),
        (-2, "-2.0 s"),
    ],
)
def test_format_seconds(seconds: float, expected: str):
    assert format_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1234, "1,234"), (123_456, "123.5k"), (11_300_000, "11.3M"), (859_520_964, "859.5M"), (12e9, "12.0B")],
)
def test_format_count(count: float, expected: str):
    assert format_count(count) == expected

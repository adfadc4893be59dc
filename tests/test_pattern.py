"""Patterns as they are written."""

from __future__ import annotations

import pytest

from compress.errors import UsageError
from compress.pattern import LARGEST, UNSTRUCTURED, Pattern, parse_pattern


def test_a_pattern_reads_as_it_is_written() -> None:
    assert parse_pattern(UNSTRUCTURED) == Pattern()
    assert parse_pattern("2:4") == Pattern(quota=(2, 4))
    assert parse_pattern("15:16") == Pattern(quota=(15, 16))
    assert parse_pattern("1x4") == Pattern(rows=1, columns=4)
    assert parse_pattern("16x1") == Pattern(rows=16, columns=1)
    assert [parse_pattern(text).is_block for text in (UNSTRUCTURED, "2:4", "1x2")] == [False, False, True]


@pytest.mark.parametrize(
    "pattern",
    ["", "2", "2:", ":4", "a:b", "2:4:8", "-1:4", "2.0:4", "2 : 4", "x4", "4x", "1x4x1", "-1x4", "1 x 4", "4X1"],
)
def test_what_is_no_pattern_is_refused_with_those_that_are(pattern: str) -> None:
    with pytest.raises(UsageError, match="is not a pattern") as caught:
        parse_pattern(pattern)
    assert repr(pattern) in caught.value.message
    assert "2:4" in caught.value.hint and "1x4" in caught.value.hint


@pytest.mark.parametrize("pattern", ["0:4", "4:4", "5:4", "0:0"])
def test_a_pattern_removes_some_and_keeps_some(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"keeps \d of \d"):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "count"), [("0x4", "0 weights"), ("1x1", "1 weight\n"), (f"2x{LARGEST}", f"{2 * LARGEST} weights")]
)
def test_a_block_has_several_weights_and_not_too_many(pattern: str, count: str) -> None:
    with pytest.raises(UsageError, match=f"its blocks have {count}"):
        parse_pattern(pattern)

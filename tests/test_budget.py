"""Budgets read as people write them, and what isn't one is refused with the forms that are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.budget import EXAMPLES, UNITS, Budget, budget_from_json, format_bytes, parse_budget, rounded_up
from compress.canonical import plain
from compress.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3MB", Budget("bytes", 300_000.0)),
        ("300 kB", Budget("bytes", 300_000.0)),
        ("2KiB", Budget("bytes", 2048.0)),
        ("25%", Budget("bytes", 0.25, "dense")),
        ("4bit", Budget("bits", 4.0)),
        ("bits=2.5bits", Budget("bits", 2.5)),
        ("sparsity=0.5", Budget("sparsity", 0.5)),
        ("sparsity=50%", Budget("sparsity", 0.5)),
        ("sparsity=0", Budget("sparsity", 0.0)),
        ("sparsity=0.0", Budget("sparsity", 0.0)),
        ("sparsity=1", Budget("sparsity", 1.0)),
        ("sparsity=100%", Budget("sparsity", 1.0)),
        ("macs=50%", Budget("macs", 0.5, "dense")),
        ("MACs = 20M", Budget("macs", 2e7)),
        ("params=1e5", Budget("params", 1e5)),
        ("latency=2ms", Budget("latency", 2.0)),
        ("latency=500us", Budget("latency", 0.5)),
        ("bops=1.5G", Budget("bops", 1.5e9)),
        ("bops=1.5e+09", Budget("bops", 1.5e9)),
        ("bops=10%", Budget("bops", 0.1, "dense")),
    ],
)
def test_a_budget_reads_as_it_is_written(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", EXAMPLES.split(", "))
def test_every_example_of_the_messages_is_a_budget(text: str) -> None:
    assert parse_budget(str(parse_budget(text))) == parse_budget(text)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("zonk", "budget 'zonk' is not understood", EXAMPLES),
        ("", "budget '' is not understood", EXAMPLES),
        ("-1MB", "budget '-1MB' is out of range", "above 0"),
        ("macs=-50%", "budget 'macs=-50%' is out of range", "above 0"),
        ("macs=150%", "budget 'macs=150%' is more than the whole network", "below 100%"),
        ("speed=2", "unknown quantity 'speed'", "one of bytes, bits, sparsity"),
        ("bits=50%", "bits are absolute", "write 4bit"),
        ("latency=2", "unit 'missing' does not fit latency", "use us, ms, s or a percentage"),
        ("sparsity=2MB", "unit 'mb' does not fit sparsity", "use a plain number or a percentage"),
        ("0MB", "budget '0MB' is out of range", "above 0"),
        ("macs=0%", "budget 'macs=0%' is out of range", "above 0"),
        ("sparsity=-0.1", "budget 'sparsity=-0.1' is out of range", "sparsity lies between 0 and 1"),
        ("sparsity=1.01", "budget 'sparsity=1.01' is out of range", "sparsity lies between 0 and 1"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_forms_that_are(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert message in caught.value.message
    assert hint in caught.value.hint


@given(quantity=st.sampled_from(sorted(UNITS)), limit=st.floats(1e-3, 0.999), of=st.sampled_from(["absolute", "dense"]))
def test_a_budget_survives_json(quantity: str, limit: float, of: str) -> None:
    budget = Budget(quantity, limit, of)
    assert budget_from_json(plain(budget)) == budget


def test_no_budget_is_none_in_json() -> None:
    assert budget_from_json(None) is None


def test_a_share_is_of_the_dense_figure() -> None:
    assert parse_budget("25%").absolute(1000) == 250
    assert parse_budget("0.3MB").absolute(1000) == 300_000


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12B"), (1234, "1.234KB"), (283_034, "283KB"), (2e6, "2MB"), (3e9, "3GB")]
)
def test_bytes_are_decimal(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(quantity=st.sampled_from(["bytes", "bits", "bops", "latency"]), amount=st.floats(1, 1e11))
def test_a_minimum_as_it_is_printed_can_be_asked_for(quantity: str, amount: float) -> None:
    least = parse_budget(str(Budget(quantity, rounded_up(amount)))).limit
    assert amount * (1 - 1e-12) <= least <= amount * 1.001


def test_a_minimum_of_four_digits_is_not_raised() -> None:
    assert [rounded_up(amount) for amount in (0.0, 4.0, 42_740.0, 42_741.0, 0.1234)] == [
        0.0,
        4.0,
        42_740.0,
        42_750.0,
        0.1234,
    ]

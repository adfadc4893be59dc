"""frontier.json: read as it was written, points found by brute force, and what was tampered with refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import canonical
from compress.errors import InputError
from compress.frontier import FLOAT_BITS, Choice, FrontierRecord, Item, read_frontier
from compress.numerics.pareto import pareto_frontier


def record_of(items: tuple[Item, ...], index: int = 0, **changes: Any) -> FrontierRecord:
    costs = [[choice.cost for choice in item.choices] for item in items]
    frontier = pareto_frontier(costs, [[choice.loss for choice in item.choices] for item in items])
    index = min(index, len(frontier) - 1)
    fields: dict[str, Any] = {
        "method": "hawq",
        "quantity": "bits",
        "scale": 0.25,
        "fixed": 3,
        "dense_amount": 32.0,
        "loss_unit": "nats",
        "items": items,
        "costs": tuple(frontier.costs.tolist()),
        "losses": tuple(frontier.values.tolist()),
        "index": index,
        "chosen": frontier.choice(index),
        "activations": {"x": (-1.5, 2.0)},
    }
    return FrontierRecord(**{**fields, **changes})


def choices(tensors: int, *table: tuple[int, int, float]) -> tuple[Choice, ...]:
    return tuple(
        Choice(bits, cost, loss, () if bits == FLOAT_BITS else ("mse", "channels:ms")[:tensors])
        for bits, cost, loss in table
    )


ITEMS = (
    Item(("a.weight",), choices(1, (2, 4, 0.9), (4, 8, 0.25), (8, 16, 0.0625))),
    Item(("b.weight", "c.weight"), choices(2, (2, 6, 0.5), (4, 12, 0.125), (32, 96, 0.0))),
)


@st.composite
def records(draw: st.DrawFn) -> FrontierRecord:
    finite = st.floats(-1e6, 1e6, allow_subnormal=False)
    items = []
    for number in range(draw(st.integers(1, 3))):
        tensors = tuple(f"{number}.{i}.weight" for i in range(draw(st.integers(1, 2))))
        widths = sorted(draw(st.sets(st.sampled_from([2, 3, 4, 8, FLOAT_BITS]), min_size=1, max_size=4)))
        ranges = st.sampled_from(["minmax", "mse", "clip0.80", "channels:msAZ"])
        items.append(
            Item(
                tensors,
                tuple(
                    Choice(
                        bits,
                        draw(st.integers(0, 200)),
                        draw(finite),
                        () if bits == FLOAT_BITS else tuple(draw(ranges) for _ in tensors),
                    )
                    for bits in widths
                ),
            )
        )
    return record_of(
        tuple(items),
        draw(st.integers(0, 50)),
        quantity=draw(st.sampled_from(["bits", "bytes", "bops", "latency"])),
        scale=draw(st.floats(1e-9, 1e3)),
        fixed=draw(st.integers(-(10**6), 10**12)),
        activations=draw(st.dictionaries(st.text(max_size=5), st.tuples(finite, finite), max_size=2)),
    )


@settings(max_examples=40)
@given(records())
def test_a_record_reads_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, record: FrontierRecord) -> None:
    path = tmp_path_factory.mktemp("record") / "frontier.json"
    path.write_text(canonical.dumps(record))
    assert read_frontier(path) == record


@settings(max_examples=40)
@given(records(), st.integers(-100, 1000))
def test_the_point_within_is_the_best_that_fits(record: FrontierRecord, spare: int) -> None:
    fitting = [i for i, cost in enumerate(record.costs) if cost <= spare]
    expected = min(fitting, key=lambda i: record.losses[i]) if fitting else None
    assert record.within(record.scale * (record.fixed + spare + 0.5)) == expected


@settings(max_examples=40)
@given(records(), st.integers(1, 10**10))
def test_the_amount_of_a_point_is_enough_for_it(record: FrontierRecord, weights: int) -> None:
    """Also where floats round it down."""
    record = replace(record, scale=1 / weights, fixed=31 * weights)
    for index, cost in enumerate(record.costs):
        assert record.within(record.amount(cost)) == index


def test_as_many_bits_as_asked_are_within_for_a_network_of_billions_of_weights() -> None:
    weights = 6_199_863_750
    items = (Item(("a.weight",), choices(1, (3, 3 * weights, 1.0), (4, 4 * weights, 0.5))),)
    assert record_of(items, scale=1 / weights, fixed=0).within(4.0) == 1


def test_a_relative_or_boundless_amount_is_within() -> None:
    record = record_of(ITEMS)
    assert record.within(float("inf")) == len(record.costs) - 1
    assert record.within(record.amount(record.costs[0]) - 0.1) is None


def test_the_choices_of_a_point_have_its_cost_and_loss() -> None:
    costs, losses = ([[getattr(choice, name) for choice in i.choices] for i in ITEMS] for name in ("cost", "loss"))
    frontier, record = pareto_frontier(costs, losses), record_of(ITEMS)
    for index in range(len(record.costs)):
        chosen = record.at(index, frontier.choice(index)).chosen_choices()
        assert sum(choice.cost for choice in chosen) == record.costs[index]
        assert sum(choice.loss for choice in chosen) == record.losses[index]


def test_rivals_have_one_width_that_every_item_has() -> None:
    assert record_of(ITEMS).rivals() == {"2 bits": (10, 1.4), "4 bits": (20, 0.375)}
    floats = tuple(replace(item, choices=choices(len(item.tensors), (32, 7, 0.0))) for item in ITEMS)
    assert record_of(floats).rivals() == {"float": (14, 0.0)}
    assert record_of((ITEMS[0], floats[1])).rivals() == {}


def tampered(change: Callable[[dict[str, Any]], None], path: Path) -> Path:
    record = canonical.plain(record_of(ITEMS, 2))
    change(record)
    path.write_text(json.dumps(record))
    return path


def put(value: Any, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(99, "index"), "index 99 is no point of the frontier"),
        (put(-1, "index"), "index -1 is no point of the frontier"),
        (put([0], "chosen"), "chosen names a choice that isn't there"),
        (put([0, 3], "chosen"), "chosen names a choice that isn't there"),
        (put([0, -1], "chosen"), "chosen names a choice that isn't there"),
        (put([1.0], "losses"), "is no point of the frontier"),
        (put(["mse"], "items", 1, "choices", 0, "ranges"), "b.weight has no choice of 2 bits, cost 6 and ranges mse"),
        (put([], "items", 0, "choices", 0, "ranges"), "a.weight has no choice of 2 bits"),
        (put(["zonk"], "items", 0, "choices", 0, "ranges"), "a.weight has no choice of 2 bits"),
        (put(["channels:"], "items", 0, "choices", 0, "ranges"), "a.weight has no choice of 2 bits"),
        (put(["channels:m?"], "items", 0, "choices", 0, "ranges"), "a.weight has no choice of 2 bits"),
        (put(["mse", "mse"], "items", 1, "choices", 2, "ranges"), "b.weight has no choice of 32 bits"),
        (put(9, "items", 0, "choices", 0, "bits"), "a.weight has no choice of 9 bits"),
        (put(2**60, "items", 0, "choices", 0, "cost"), "cost 1152921504606846976"),
        (put([], "items", 0, "tensors"), "an item without tensors"),
        (put([], "items", 0, "choices"), "chosen names a choice that isn't there"),
        (put("x", "items", 0, "choices", 0, "cost"), "bad entry"),
        (put(None, "scale"), "bad entry"),
        (put(0.0, "scale"), "the scale isn't above 0"),
        (put(float("inf"), "fixed"), "bad entry"),
        (put([0.0, float("nan")], "activations", "x"), "a number isn't finite"),
        (put([1], "activations"), "bad entry"),
        (put([1, 2, 3], "activations", "x"), "bad entry"),
        (lambda record: record.pop("items"), "bad entry"),
        (put("hcompress.frontier/9", "schema"), "schema is hcompress.frontier/9"),
    ],
)
def test_what_was_tampered_with_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    path = tampered(change, tmp_path / "frontier.json")
    with pytest.raises(InputError) as caught:
        read_frontier(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_a_folder_without_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_frontier(tmp_path / "frontier.json")

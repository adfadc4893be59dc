"""n:m masks by enumeration, patterns as they are written, and how many weights a sparsity removes."""

from __future__ import annotations

import itertools

import pytest
import torch
from zoo import named

from compress.errors import BudgetError, UsageError
from compress.graph.trace import trace_graph
from compress.prune.masks import n_of_m_mask, parse_pattern, removed_weights


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 0), (1, 2, 1), (1, 3, 2), (3, 4, 1), (2, 6, 2)])
def test_the_kept_scores_of_every_m_have_the_largest_sum(n: int, m: int, axis: int) -> None:
    sizes = [2, 3, 2]
    sizes[axis] = 2 * m
    scores = torch.rand(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    mask = n_of_m_mask(scores, n, m, axis)
    assert mask.shape == scores.shape
    assert mask.is_contiguous()
    rows, kept = (x.movedim(axis, -1).reshape(-1, m) for x in (scores, mask))
    for row, keep in zip(rows, kept, strict=True):
        best = max(itertools.combinations(range(m), n), key=lambda chosen: float(row[list(chosen)].sum()))
        assert keep.nonzero().flatten().tolist() == list(best)


def test_of_equal_scores_the_first_are_kept() -> None:
    assert n_of_m_mask(torch.zeros(1, 8), 2, 4, 1).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    protected = torch.tensor([[float("inf"), 3.0, -1.0, float("inf")]])
    assert n_of_m_mask(protected, 2, 4, 1).int().tolist() == [[1, 0, 0, 1]]


def test_a_pattern_reads_as_it_is_written() -> None:
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("15:16") == (15, 16)


@pytest.mark.parametrize("pattern", ["", "2", "2:", ":4", "a:b", "2:4:8", "-1:4", "2.0:4", "2 : 4", "unstructured"])
def test_what_is_no_pattern_is_refused_with_those_that_are(pattern: str) -> None:
    with pytest.raises(UsageError, match="is not a pattern") as caught:
        parse_pattern(pattern)
    assert repr(pattern) in caught.value.message
    assert "2:4" in caught.value.hint


@pytest.mark.parametrize("pattern", ["0:4", "4:4", "5:4", "0:0"])
def test_a_pattern_removes_some_and_keeps_some(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"keeps \d of \d"):
        parse_pattern(pattern)


def test_a_sparsity_is_of_the_whole_network() -> None:
    network = named("plain_cnn")
    graph = trace_graph(network.make(), network.inputs(2))
    total, rest = sum(layer.elements for layer in graph.layers), graph.without(["1.*"])
    available = sum(layer.elements for layer in rest)
    assert removed_weights(graph, graph.layers, 0.5) == round(0.5 * total)
    assert removed_weights(graph, rest, available / total) == available
    with pytest.raises(BudgetError, match=f"--exclude leaves at most {available / total:.4f}"):
        removed_weights(graph, rest, available / total + 0.01)

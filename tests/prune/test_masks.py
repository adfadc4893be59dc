"""How many weights a sparsity removes."""

from __future__ import annotations

import pytest
from zoo import named

from compress.errors import BudgetError
from compress.graph.trace import trace_graph
from compress.prune.masks import removed_weights


def test_a_sparsity_is_of_the_whole_network() -> None:
    network = named("plain_cnn")
    graph = trace_graph(network.make(), network.inputs(2))
    total, rest = sum(layer.elements for layer in graph.layers), graph.without(["1.*"])
    available = sum(layer.elements for layer in rest)
    assert removed_weights(graph, graph.layers, 0.5) == round(0.5 * total)
    assert removed_weights(graph, rest, available / total) == available
    with pytest.raises(BudgetError, match=f"--exclude leaves at most {available / total:.4f}"):
        removed_weights(graph, rest, available / total + 0.01)

"""Cost tables against figures counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from compress.graph.cost import cost_tables
from compress.graph.trace import trace_graph


def test_tables_hold_what_is_counted_by_hand() -> None:
    # 8 x 8 inputs: the convolution gives 4 x 6 x 6 outputs from 3 x 3 x 3 weights each, the head 10 from 4 * 36.
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    tables = cost_tables(trace_graph(module, (torch.randn(2, 3, 8, 8),)))
    assert tables["params"].total("") == 4 * 27 + 1440
    assert tables["macs"].total("") == 4 * 36 * 27 + 1440
    assert tables["activation_bits"].entries["0.weight", "8"] == 4 * 36 * 8
    assert tables["activation_bits"].total("32") == (4 * 36 + 10) * 32
    assert tables["bytes"].entries["0.weight", "3"] == 41 + 4 * 4  # 324 bits, and a scale a channel
    assert tables["bytes"].total("32") == 4 * (108 + 1440)
    assert tables["bops"].entries["3.weight", "4"] == 1440 * 16
    assert not tables["bytes"].has("")


def test_a_weight_used_twice_counts_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(torch.relu(self.conv(x)))
            return y

    graph = trace_graph(Twice().eval(), (torch.randn(2, 4, 8, 8),))
    assert graph.layers[0].activations == 2 * 4 * 64
    assert graph.layers[0].macs == 2 * 4 * 64 * 36

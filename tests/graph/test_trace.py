"""The traced network: its layers, its multiplications, and what it says it can't compress."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import Network, named

from compress.errors import InputError
from compress.graph.trace import trace_graph, trace_module

BATCH = 2


def test_macs_are_half_the_flops_that_torch_counts(network: Network) -> None:
    if network.name == "Recurrent":
        pytest.skip("torch doesn't count recurrent layers")
    module = network.make()
    graph = trace_graph(module, network.inputs(BATCH))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*network.inputs(BATCH))
    assert graph.macs == counter.get_total_flops() / 2 / BATCH


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("plain_cnn", 64 * 8 * 27 + 16 * 12 * 72 + 12 * 5),
        ("depthwise", 64 * 8 * 27 + 64 * 8 * 9 + 64 * 12 * 8 + 12 * 5),
        ("mlp", 20 * 16 + 16 * 12 + 12 * 4),
        ("Attention", 7 * 12 * 36 + 2 * 7 * 7 * 12 + 7 * 12 * 12 + 7 * 12 * 4),
        ("Recurrent", 6 * 8 * 10 + 6 * 24 * (10 + 6) + 2 * 6 * 15 * (6 + 5) + 10 * 4),
        ("RawParameters", 7 * 10 * 8 + 7 * 2 * 8 * 5 + 7 * 10 * 3),
    ],
)
def test_macs_equal_the_hand_computed_figure(name: str, macs: int) -> None:
    network = named(name)
    assert trace_graph(network.make(), network.inputs(BATCH)).macs == macs


def test_a_tied_weight_is_one_layer_under_its_first_name() -> None:
    network = named("TiedEmbedding")
    graph = trace_graph(network.make(), network.inputs(BATCH))
    assert graph.tied == (("embedding.weight", "output.weight"),)
    assert [layer.tensor for layer in graph.layers] == ["hidden.weight", "embedding.weight"]


def test_a_shared_convolution_counts_both_of_its_uses() -> None:
    network = named("SharedConvolution")
    layer = trace_graph(network.make(), network.inputs(BATCH)).layer("conv.weight")
    assert layer.macs == 2 * 64 * 4 * 36


def test_transposed_layers_have_their_outputs_on_dimension_one() -> None:
    network = named("transposed_2d")
    graph = trace_graph(network.make(), network.inputs(BATCH))
    assert [(layer.axis, layer.input_axis) for layer in graph.layers] == [(1, 0), (None, 0), (0, 1)]


@pytest.mark.parametrize(
    ("name", "blockers"),
    [
        ("Recurrent", {"lstm.weight_ih_l0": "aten.lstm.input", "gru.weight_hh_l0_reverse": "aten.gru.input"}),
        ("RawParameters", {"weight": "aten.matmul.default", "kernel": "aten.einsum.default"}),
        ("weight_norm", {"1.parametrizations.weight.original1": "aten._weight_norm.default"}),
        ("DataclassOutput", {"b.weight": "not used by the forward pass"}),
        ("FunctionalWeights", {"conv.weight": "aten.mul.Tensor"}),
    ],
)
def test_weights_that_no_method_compresses_are_named_with_the_reason(name: str, blockers: dict[str, str]) -> None:
    network = named(name)
    found = {b.layer: b.reason for b in trace_graph(network.make(), network.inputs(BATCH)).blockers}
    for layer, reason in blockers.items():
        assert reason in found[layer]


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.zeros(len(x), 3)


class Selecting(FixedBatch):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[torch.nonzero(x[:, 0] > 0).squeeze(1)])


class Branching(FixedBatch):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (FixedBatch(), "input x: the network fixes its batch size to 2"),
        (Branching(), r"depends on values, in Branching at .*test_trace.py:\d+: return self.fc\(x\) if x.sum\(\) > 0"),
        (nn.Sequential(nn.ReLU(), Branching()), r"depends on values, in 1 \(Branching\) at .*test_trace.py"),
        (Selecting(), "a tensor whose size u0 depends on values"),
        (nn.Linear(4, 3).half(), "weight has dtype float16"),
        (nn.Linear(4, 3).bfloat16(), "weight has dtype bfloat16"),
        (nn.Linear(4, 3).double(), "weight has dtype float64"),
    ],
    ids=["fixed batch", "branch", "part", "selection", "float16", "bfloat16", "float64"],
)
def test_a_network_that_cannot_be_handled_is_an_input_error(
    module: nn.Module, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=words):
        trace_graph(module.eval(), (torch.randn(2, 4, dtype=next(module.parameters()).dtype),))
    assert capfd.readouterr() == ("", ""), "torch logs and prints of its own"


class Regions(nn.Module):
    """One region in another: without gradients, without autocast, with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            held = self.a(x)
            with torch.autocast("cpu", enabled=False):
                held = held + self.a(held)
        with torch.autocast("cpu", enabled=False):
            y = self.b(x + held).tanh()
        with torch.autocast("cpu", torch.bfloat16):
            z: Tensor = self.c(y)
        return y + z


def test_regions_are_put_in_line_and_those_without_gradients_pass_none() -> None:
    net, x = Regions().eval(), torch.randn(3, 4)
    module = trace_module(net, (x[:2],)).module(check_guards=False)
    assert torch.equal(module(x), net(x))
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    assert [sum("linear" in str(n.target) for n in part.graph.nodes) for part in parts] == [3, 1], "autocast stays"
    for forward in (net, module):
        found = torch.autograd.grad(forward(x).sum(), list(forward.parameters()), allow_unused=True)
        assert [gradient is None for gradient in found] == [True, True, False, False, False, False]
    assert [layer.tensor for layer in trace_graph(net, (x,)).layers] == ["a.weight", "b.weight"]


def test_what_leaves_a_region_may_be_an_output() -> None:
    class Held(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                y = super().forward(x)
                return y, y.relu()

    net, x = Held(4, 4), torch.randn(3, 4)
    program = trace_module(net, (x[:2],))
    program.validate()
    for found, expected in zip(program.module(check_guards=False)(x), net(x), strict=True):
        assert torch.equal(found, expected) and not found.requires_grad

"""Applying a plan: a pure function whose result is the network with its weights rounded or masked."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import Network, named

from compress.apply import Compressed, apply_plan, assemble, float_module, mask_sha256, pack_mask
from compress.errors import InputError
from compress.formats.packed import QuantizedTensor
from compress.graph.rewrite import activation_points
from compress.graph.trace import Graph, trace_graph
from compress.plan import Decision, MaskWeights, Plan, Quantize


def plan_of(*decisions: Decision) -> Plan:
    return Plan("uniform", {}, 0, "0" * 64, None, None, decisions, {})


def weights_plan(graph: Graph, bits: int, search: str) -> Plan:
    return plan_of(*(Quantize(y.tensor, "weight", bits, "symmetric", y.axis, search) for y in graph.layers))


@pytest.mark.parametrize(
    ("bits", "search"),
    [(3, "mse"), *(pytest.param(b, s, marks=pytest.mark.slow) for b, s in ((8, "minmax"), (2, "mse")))],
)
def test_the_assembled_network_is_the_users_with_rounded_weights(network: Network, bits: int, search: str) -> None:
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    compressed = apply_plan(module, graph.tied, weights_plan(graph, bits, search), {})
    rounded = copy.deepcopy(module)
    rounded.load_state_dict(compressed.state())
    expected = tree_leaves(rounded(*network.inputs(5)))
    found = tree_leaves(assemble(graph, compressed)(*network.inputs(5)))
    for e, f in zip(expected, found, strict=True):
        assert float((e - f).abs().max()) <= 1e-5 * float(e.abs().max())


def test_the_source_is_left_as_it_was() -> None:
    network = named("plain_cnn")
    module = network.make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    graph = trace_graph(module, network.inputs(2))
    assemble(graph, apply_plan(module, graph.tied, weights_plan(graph, 2, "mse"), {}))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    first = assemble(graph, Compressed(dict(module.state_dict()), None))(*network.inputs(3))
    torch.testing.assert_close(first, module(*network.inputs(3)), rtol=1e-5, atol=1e-6)


def test_tied_names_share_one_quantized_tensor() -> None:
    network = named("TiedEmbedding")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    tensors = apply_plan(module, graph.tied, weights_plan(graph, 4, "minmax"), {}).tensors
    assert isinstance(tensors["embedding.weight"], QuantizedTensor)
    assert tensors["output.weight"] is tensors["embedding.weight"]


def masked(keep: Tensor) -> tuple[MaskWeights, dict[str, Tensor]]:
    packed = pack_mask(keep)
    name = "0.0.weight"
    return MaskWeights(name, int(keep.sum()), keep.numel(), "unstructured", mask_sha256(packed)), {name: packed}


def test_a_mask_zeroes_what_it_does_not_keep() -> None:
    module = named("plain_cnn").make()
    weight = module.state_dict()["0.0.weight"]
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    decision, sidecar = masked(keep)
    found = apply_plan(module, (), plan_of(decision), sidecar).tensors["0.0.weight"]
    assert isinstance(found, Tensor) and torch.equal(found, torch.where(keep, weight, 0.0))


def test_a_plan_that_does_not_fit_is_an_input_error() -> None:
    network = named("plain_cnn")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    keep = torch.ones(module.state_dict()["0.0.weight"].shape, dtype=torch.bool)
    decision, sidecar = masked(keep)
    absent = Quantize("absent.weight", "weight", 4, "symmetric", 0, "mse")
    wrong_axis = Quantize("0.0.weight", "weight", 4, "symmetric", 7, "mse")
    cases = [
        (absent, {}, "tensor absent.weight is not in the checkpoint"),
        (wrong_axis, {}, "0.0.weight has axis 7, but 4 dimensions"),
        (decision, {}, "the mask of 0.0.weight is missing"),
        (replace(decision, kept=3), sidecar, "keeps 3, its mask keeps 216"),
        (replace(decision, total=8), sidecar, "has 8 elements, the checkpoint's has 216"),
        (replace(decision, mask_sha256="0" * 64), sidecar, "has another hash"),
    ]
    for choice, tensors, words in cases:
        with pytest.raises(InputError, match=words):
            apply_plan(module, graph.tied, plan_of(choice), tensors)
    lost = Quantize("absent", "activation", 8, "asymmetric", None, (0.0, 1.0))
    with pytest.raises(InputError, match="activation absent is not in the graph"):
        assemble(graph, apply_plan(module, graph.tied, plan_of(lost), {}))


def test_activations_are_rounded_to_the_plans_grid() -> None:
    network = named("mlp")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    name = activation_points(float_module(graph))[0].name
    decision = Quantize(name, "activation", 8, "asymmetric", None, (-2.0, 3.1))
    assembled = assemble(graph, apply_plan(module, graph.tied, plan_of(decision), {}))
    (x,) = network.inputs(5)
    rounded = (torch.round(x / 0.02) + 100).clamp(0, 255).sub(100) * 0.02
    torch.testing.assert_close(assembled(x), module(rounded), rtol=1e-5, atol=1e-5)

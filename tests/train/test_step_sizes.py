"""Learned step sizes: LSQ's gradients against its equations, and a network that stays on its grid while it learns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import named

from compress.formats.packed import QuantizedTensor
from compress.graph.rewrite import Grid, tensor_at
from compress.graph.trace import trace_graph
from compress.numerics.rounding import level_range, round_weight, stored_bits
from compress.pruned import trainable_copy
from compress.train.mode import training_mode
from compress.train.step_sizes import learn_step_sizes, round_to_steps, scale_name
from compress.widths import levels_of


def lsq_gradients(weight: Tensor, scale: Tensor, upstream: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Equations 3 and 5 of the paper, for rows, written out weight by weight."""
    of_weight, of_scale = torch.zeros_like(weight), torch.zeros_like(scale)
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            v = float(weight[row, column] / scale[row])
            is_inside = low < v < high
            of_weight[row, column] = upstream[row, column] * is_inside
            level = min(max(round(v), low), high)
            of_scale[row] += upstream[row, column] * (level - v if is_inside else level)
    return of_weight, of_scale / math.sqrt(weight.shape[1] * high)


@given(st.integers(0, 1000), st.integers(2, 8))
def test_gradients_are_those_of_the_paper(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 7, generator=generator, dtype=torch.float64).requires_grad_()
    scale = (0.1 + torch.rand(3, generator=generator, dtype=torch.float64)) * torch.tensor([1.0, -1.0, 1.0]).double()
    scale.requires_grad_()
    upstream = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    low, high = level_range(bits)
    rounded = round_to_steps(weight, scale, 0, bits)
    torch.testing.assert_close(
        rounded, (weight / scale[:, None]).round().clamp(low, high) * scale[:, None], rtol=0, atol=1e-12
    )
    rounded.backward(upstream)
    assert weight.grad is not None and scale.grad is not None
    expected = lsq_gradients(weight.detach(), scale.detach(), upstream, low, high)
    torch.testing.assert_close(weight.grad, expected[0])
    torch.testing.assert_close(scale.grad, expected[1])


def test_rows_in_a_code_by_stages_keep_to_their_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    width = "channels:0abcdefghijklm3"
    weight = (3 * torch.randn(15, 8, 3, 3, generator=generator)).requires_grad_()
    scale = torch.linspace(0.2, 2, 15).requires_grad_()
    rounded = round_to_steps(weight, scale, 0, width)
    levels = (rounded.detach() / scale.detach().reshape(-1, 1, 1, 1)).round()
    assert not levels[0].any()
    clamped = 0
    for letter, row, values in zip(
        "abcdefghijklm", levels[1:14], weight.detach()[1:14] / scale.detach()[1:14, None, None, None], strict=True
    ):
        assert int(stored_bits(row.reshape(1, -1), letter, 1)) <= levels_of(letter).bits * 72
        low, high = level_range(letter)
        free = values.round().clamp(low, high)
        moved = free != row
        first = 2 ** (levels_of(letter).stages[0] - 1) - 1
        assert bool((row[moved].abs() == first).all())
        clamped += int(moved.any())
        left = values[~moved & (free.abs() > first)].abs()
        assert not moved.any() or not len(left) or float(values[moved].abs().max()) <= float(left.min())
    assert clamped > 3
    rounded.sum().backward()
    off = levels != (weight.detach() / scale.detach().reshape(-1, 1, 1, 1)).round()
    assert weight.grad is not None and not weight.grad[off].any()


@pytest.mark.parametrize(
    ("name", "group_size"),
    [("padded_residual", None), ("Gpt", None), ("SharedConvolution", None), ("depthwise", None), ("Gpt", 5)],
)
def test_a_network_stays_on_its_grids_while_it_learns(name: str, group_size: int | None) -> None:
    network = named(name)
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    state = dict(module.state_dict())
    weights, zeros = {}, {}
    for layer in graph.layers:
        weight = state[layer.tensor].clone()
        zeros[layer.tensor] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        weight = weight.masked_fill(zeros[layer.tensor], 0)
        levels, scale = round_weight(weight, 3, axis=layer.axis, search="mse", group_size=group_size)
        weights[layer.tensor] = QuantizedTensor(levels, 3, scale, layer.axis, group_size)
        state[layer.tensor] = weights[layer.tensor].dequantize()
    rounded, plain = (trainable_copy(graph, state) for _ in range(2))
    steps = learn_step_sizes(rounded, weights, dict.fromkeys(weights, 3), {}, zeros)
    inputs = network.inputs(4)
    for a, b in zip(outputs(rounded, inputs), outputs(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for tensor, value in steps.rounded().items():
        assert torch.equal(value.levels, weights[tensor].levels)

    parameters = [p.requires_grad_() for p in rounded.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    with training_mode(rounded):
        for _ in range(3):
            optimizer.zero_grad()
            sum(out.float().square().mean() for out in outputs(rounded, inputs)).backward()  # type: ignore[union-attr]
            optimizer.step()
            steps.hold()
    found = steps.rounded()
    assert any(not torch.equal(found[t].levels, weights[t].levels) for t in weights)
    assert any(not torch.equal(found[t].scale, weights[t].scale) for t in weights)
    for tensor, value in found.items():
        assert not bool(value.levels[zeros[tensor]].any())
        assert -4 <= int(value.levels.min()) <= int(value.levels.max()) <= 3
        weight, scale = tensor_at(rounded, tensor), tensor_at(rounded, scale_name(tensor))
        seen = round_to_steps(weight, scale, value.axis, 3, group_size)
        if group_size is None:
            torch.testing.assert_close(seen, value.dequantize(), rtol=1e-5, atol=1e-7)
        else:  # scales of groups are stored in 16 bits, and levels are the nearest to those
            moved = value.dequantize() - weight
            assert torch.equal(value.scale, value.scale.bfloat16().float())
            assert float(moved.norm()) <= 1.01 * float((seen - weight).norm())


def outputs(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(module(*inputs)) if isinstance(x, Tensor)]


def test_a_scale_keeps_its_sign() -> None:
    network = named("mlp")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    layer = graph.layers[0]
    levels, scale = round_weight(module.state_dict()[layer.tensor], 4, axis=0, search="minmax")
    value = QuantizedTensor(levels, 4, scale, 0)
    copied = trainable_copy(graph, {layer.tensor: value.dequantize()})
    steps = learn_step_sizes(copied, {layer.tensor: value}, {layer.tensor: 4}, {}, {})
    with torch.no_grad():
        tensor_at(copied, scale_name(layer.tensor)).neg_()
    steps.hold()
    assert bool((tensor_at(copied, scale_name(layer.tensor)) * scale > 0).all())


def test_activations_are_rounded_where_the_written_network_rounds_them() -> None:
    network = named("biased_conv_bn")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    state = dict(module.state_dict())
    layer = next(layer for layer in graph.layers if state[layer.tensor].dim() == 4)
    levels, scale = round_weight(state[layer.tensor], 4, axis=layer.axis, search="minmax")
    copied = trainable_copy(graph, state)
    nodes = [node.name for node in copied.graph.nodes if node.op == "call_function" and "conv" in node.name]
    value = QuantizedTensor(levels, 4, scale, layer.axis)
    learn_step_sizes(copied, {layer.tensor: value}, {layer.tensor: 4}, {nodes[0]: Grid(0.1, 3, 4)}, {})
    rounding = [node for node in copied.graph.nodes if node.target is torch.fake_quantize_per_tensor_affine]
    assert len(rounding) == 1
    assert rounding[0].args[0].target is torch.ops.aten.batch_norm.default

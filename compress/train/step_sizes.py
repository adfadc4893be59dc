"""Weights and activations that are rounded while a network trains, with learned step sizes.

In the forward pass a weight is ``s round(clamp(w / s))``; in the backward pass rounding is the identity, so that ``w``
gathers what moves its level in the end, and the scale ``s`` of each row learns with it. Its gradient is divided by
``sqrt(n q)`` for ``n`` weights and ``q`` levels, which makes its steps as large as those of the weights. Activations
keep the grids of the plan.
The levels of a code by stages are held to its bits: of a row that has too many in the later stages, the smallest of
them are clamped to the first.
Source: Esser et al. 2020, LSQ (arXiv:1902.08153), equations 1 to 5. Cost: of a step, ten passes over the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..formats.packed import QuantizedTensor
from ..graph.rewrite import Grid, after_norms, join_reads, put_parameter, reaches_output, split_reads, tensor_at
from ..numerics.rounding import in_16_bits, level_bounds, level_ranges, spread_scale
from ..widths import Width

LEAST_SCALE = 1e-3  # of what it was: a scale that crossed zero would turn its row around


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The rounded weights of a network that trains.

    Attributes:
        stored: The weights before training, by name.
        levels: Width of the levels in use, by name.
        zeros: Which levels stay 0: those of pruned weights.
    """

    module: fx.GraphModule
    stored: Mapping[str, QuantizedTensor]
    levels: Mapping[str, Width]
    zeros: Mapping[str, Tensor]

    def hold(self) -> None:
        """Put pruned weights back to zero, and scales to their side of it; to be called after each step."""
        with torch.no_grad():
            for name, value in self.stored.items():
                weight, scale = tensor_at(self.module, name), tensor_at(self.module, scale_name(name))
                if name in self.zeros:
                    weight.masked_fill_(self.zeros[name].to(weight.device), 0)
                least = LEAST_SCALE * value.scale.to(scale.device)
                scale.copy_(torch.where(scale * least.sign() < least.abs(), least, scale))

    def rounded(self) -> dict[str, QuantizedTensor]:
        """The weights as they are stored."""
        found = {}
        for name, value in self.stored.items():
            weight, scale = (tensor_at(self.module, key).detach().cpu().float() for key in (name, scale_name(name)))
            scale = scale if value.group_size is None else in_16_bits(scale)
            levels = weight / spread_scale(scale, value.axis, weight.shape, value.group_size)
            low, high = level_bounds(levels, self.levels[name], value.axis)
            levels = torch.clamp(torch.round(levels), low, high)
            found[name] = QuantizedTensor(
                levels.to(torch.int8), value.bits, scale.clone(), value.axis, value.group_size
            )
        return found


def scale_name(weight: str) -> str:
    """What the scales of a weight are called while it trains."""
    return f"{weight}_step_sizes"


def learn_step_sizes(
    module: fx.GraphModule,
    weights: Mapping[str, QuantizedTensor],
    levels: Mapping[str, Width],
    activations: Mapping[str, Grid],
    zeros: Mapping[str, Tensor],
) -> StepSizes:
    """Round weights and activations in a network's forward, in place.

    Args:
        module: Of float weights, those that ``weights`` stand for, with its batch norms.
        levels: Width of the levels in use, by weight.
        activations: Grids by name, as ``graph.rewrite.quantize_activations`` takes them.
        zeros: bool by weight: whose level is 0 in any case.
    """
    split_reads(module)
    names = {node.name: node for node in module.graph.nodes}
    rounded = {after_norms(names[name]): grid for name, grid in activations.items()}  # finds norms by plain weights
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and str(node.target) in weights:
            _round_weight(module, node, weights[str(node.target)], levels[str(node.target)])
    for node, grid in rounded.items():
        users = [user for user in node.users if not reaches_output(user)]
        arguments = (node, grid.scale, grid.zero_point, 0, 2**grid.bits - 1)
        with module.graph.inserting_after(node):
            back = module.graph.call_function(torch.fake_quantize_per_tensor_affine, arguments)
        back.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, back)
    join_reads(module)
    module.graph.lint()
    module.recompile()
    return StepSizes(module, weights, levels, zeros)


def _round_weight(module: fx.GraphModule, node: fx.Node, value: QuantizedTensor, width: Width) -> None:
    target = str(node.target)
    put_parameter(module, scale_name(target), value.scale.clone())
    with module.graph.inserting_after(node):
        scale = module.graph.get_attr(scale_name(target))
    scale.meta["val"] = value.scale
    with module.graph.inserting_after(scale):
        rounded = module.graph.call_function(round_to_steps, (node, scale, value.axis, width, value.group_size))
    rounded.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)


def round_to_steps(
    weight: Tensor, scale: Tensor, axis: int | None, width: Width, group_size: int | None = None
) -> Tensor:
    """A weight on its grid, with LSQ's gradients of both.

    Args:
        scale: ``[c]`` along ``axis``, or ``[]``; ``[c, m]`` of groups.
        width: Of the levels: bits, or a letter of ``widths.WIDTHS`` for each scale.
    """
    count = max(1, weight.numel() // max(1, scale.numel()))
    step = spread_scale(scale, axis, weight.shape, group_size)
    most = torch.as_tensor(level_ranges(width, axis, weight.dim())[1]).to(weight)
    factor = 1 / torch.sqrt(count * most.clamp_min(1))
    step = step * factor + (step * (1 - factor)).detach()
    ratio = weight / step
    inside = torch.clamp(ratio, *level_bounds(ratio.detach(), width, axis))
    levels: Tensor = inside + (inside.round() - inside).detach()
    return levels * step


def stored_weight(node: fx.Node) -> fx.Node:
    """The tensor behind a weight that is rounded as it is read, or the node itself."""
    return node.all_input_nodes[0] if node.target is round_to_steps else node

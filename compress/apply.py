"""Decisions become weights: a pure function of checkpoint and plan, without data, randomness or gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from .errors import InputError, NumericsError
from .formats.packed import QuantizedTensor
from .formats.planes import pack, unpack
from .graph.rewrite import (
    Grid,
    IntegerWeight,
    finish,
    fold_batch_norms,
    is_addend,
    put_tensor,
    quantize_activations,
    set_weight,
    split_reads,
    tensor_at,
    tensor_names,
    unlift,
)
from .graph.trace import Graph
from .numerics.rounding import activation_grid, level_ranges, round_weight
from .plan import BY_CHANNEL, CorrectBias, Decision, MaskWeights, Plan, Quantize, Replace, grid_bits
from .pruned import Pruned
from .widths import is_mixed, letters_of, shown

Tensors = dict[str, Tensor | QuantizedTensor]


@dataclass(frozen=True, slots=True)
class Compressed:
    """The result of a plan.

    Attributes:
        tensors: Every state-dict key of the source's module, as it will be stored.
        plan: What was applied.
    """

    tensors: Tensors
    plan: Plan | None

    def state(self) -> dict[str, Tensor]:
        """The state dict in floats."""
        return {k: v.dequantize() if isinstance(v, QuantizedTensor) else v for k, v in self.tensors.items()}


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean mask as bits, uint8 ``[ceil(n / 8)]``: the form that sidecars hold and plans hash."""
    return torch.from_numpy(pack(mask.flatten().to(torch.uint8).numpy(), 1).copy())


def mask_sha256(packed: Tensor) -> str:
    """The hash that a plan's decision carries."""
    return hashlib.sha256(packed.numpy().tobytes()).hexdigest()


def unpack_mask(packed: Tensor, decision: MaskWeights, shape: torch.Size) -> Tensor:
    """The mask of a decision, checked against it.

    Raises:
        InputError: The decision was edited and no longer fits its sidecar, or the tensor has another shape.
    """
    name = decision.tensor
    if decision.total != shape.numel():
        raise InputError(
            f"plan: {name} has {decision.total} elements, the checkpoint's has {shape.numel()}",
            hint="the plan is for another architecture",
        )
    if mask_sha256(packed) != decision.mask_sha256:
        raise InputError(f"plan: {name}: the mask in the sidecar has another hash", hint="make the plan again")
    mask = torch.from_numpy(unpack(packed.numpy(), 1, decision.total).copy()).bool()
    if int(mask.sum()) != decision.kept:
        raise InputError(
            f"plan: {name} keeps {decision.kept}, its mask keeps {int(mask.sum())}", hint="make the plan again"
        )
    return mask.reshape(shape)


def masks_of(plan: Plan, sidecar: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plan's masks by tensor, of the shapes that the tensors of ``state`` have.

    Raises:
        InputError: A tensor isn't in the checkpoint, or the mask doesn't fit its decision.
    """
    unknown = [name for name in plan.masks() if name not in state]
    if unknown:
        raise InputError(
            f"plan: tensor {unknown[0]} is not in the checkpoint", hint="the plan is for another architecture"
        )
    return {name: unpack_mask(sidecar[name], d, state[name].shape) for name, d in plan.masks().items()}


def values_key(tensor: str) -> str:
    """Where a sidecar holds the new values of a tensor's survivors, ``[kept]`` in order."""
    return f"{tensor}#values"


def values_sha256(values: Tensor) -> str:
    """The hash that a plan's decision carries."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def with_values(
    plan: Plan, sidecar: Mapping[str, Tensor], values: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with other values of whole tensors; of a masked weight, those that stay.

    Args:
        masks: Of the plan's masked weights, bool by tensor.
    """
    left, tensors = dict(values), dict(sidecar)
    decisions: list[Decision] = []
    for decision in plan.decisions:
        if isinstance(decision, MaskWeights) and decision.tensor in left:
            found = left.pop(decision.tensor)[masks[decision.tensor]].clone()
            tensors[values_key(decision.tensor)] = found
            decisions.append(replace(decision, values_sha256=values_sha256(found)))
        elif not isinstance(decision, Replace | CorrectBias) or decision.tensor not in left:
            decisions.append(decision)
    for name, value in sorted(left.items()):
        tensors[values_key(name)] = value.clone()
        decisions.append(Replace(name, values_sha256(value)))
    return replace(plan, decisions=tuple(decisions)), tensors


def moved_values(module: fx.GraphModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training made of the tensors of ``state``, where it changed them."""
    values = {name: tensor_at(module, name).cpu() for name in tensor_names(module) & state.keys()}
    return {name: value for name, value in values.items() if not torch.equal(value, state[name])}


def levels_keys(tensor: str) -> tuple[str, str]:
    """Where a sidecar holds the levels of a rounded weight, int8 in its shape, and its float32 scales."""
    return f"{tensor}#levels", f"{tensor}#scales"


def levels_sha256(levels: Tensor, scales: Tensor) -> str:
    """The hash that a plan's decision carries."""
    return values_sha256(torch.cat([levels.contiguous().flatten(), scales.contiguous().flatten().view(torch.int8)]))


def _stored(sidecar: Mapping[str, Tensor], choice: Quantize, weight: Tensor) -> QuantizedTensor:
    """Levels and scales of a decision that holds them, checked against it."""
    levels, scales = (sidecar.get(key) for key in levels_keys(choice.tensor))
    shape = [] if choice.axis is None else [weight.shape[choice.axis]]
    if choice.group_size is not None:
        shape.append(-(-weight.shape[1] // choice.group_size))
    is_whole = (
        levels is not None
        and scales is not None
        and (levels.dtype, scales.dtype) == (torch.int8, torch.float32)
        and (list(levels.shape), list(scales.shape)) == (list(weight.shape), shape)
        and levels_sha256(levels, scales) == choice.values_sha256
    )
    if levels is None or scales is None or not is_whole:
        raise InputError(
            f"plan: the levels of {choice.tensor} in the sidecar are missing or others",
            hint="keep plan.safetensors as it was written beside plan.json",
        )
    low, high = level_ranges(grid_bits(choice.bits, choice.scheme), choice.axis, levels.dim())
    if bool(((levels < low) | (levels > high)).any()):
        raise InputError(
            f"plan: {choice.tensor} has levels beyond its {shown(choice.bits)}", hint="make the plan again"
        )
    return QuantizedTensor(levels, choice.bits, scales, choice.axis, choice.group_size)


def _values(sidecar: Mapping[str, Tensor], decision: MaskWeights | CorrectBias | Replace, count: int) -> Tensor:
    values = sidecar.get(values_key(decision.tensor))
    if values is None or values.numel() != count or values_sha256(values) != decision.values_sha256:
        raise InputError(
            f"plan: the new values of {decision.tensor} in the sidecar are missing or others",
            hint="keep plan.safetensors as it was written beside plan.json",
        )
    return values


def apply_plan(
    module: nn.Module,
    tied: tuple[tuple[str, ...], ...],
    plan: Plan,
    sidecar: Mapping[str, Tensor],
    pruned: Pruned | None = None,
) -> Compressed:
    """Apply every weight decision of a plan to a module's state dict.

    Args:
        module: The source's; not changed.
        tied: State-dict keys of one tensor, the canonical key first.
        plan: Its decisions name canonical keys; those on weights hold for what is left after the channels' cut.
        sidecar: Packed masks and new values by tensor.
        pruned: The cut of the plan's channels, where it has any.

    Raises:
        InputError: A decision names a tensor that the checkpoint lacks, or doesn't fit it.
        NumericsError: The result isn't finite; names the tensor.
    """
    tensors: Tensors = {key: value.detach().clone() for key, value in module.state_dict().items()}
    named = (*plan.masks(), *plan.quantized("weight"), *plan.corrections(), *plan.replaced())
    unknown = [name for name in named if name not in tensors]
    if unknown:
        raise InputError(
            f"plan: tensor {unknown[0]} is not in the checkpoint", hint="the plan is for another architecture"
        )
    if pruned is not None:
        tensors = dict(pruned.sliced(module.state_dict(), tied))
    for name, replaced in plan.replaced().items():
        before = tensors[name]
        assert isinstance(before, Tensor)
        tensors[name] = _values(sidecar, replaced, before.numel()).reshape(before.shape).to(before.dtype)
    for name, decision in plan.masks().items():
        weight = tensors[name]
        assert isinstance(weight, Tensor)
        if name not in sidecar:
            raise InputError(f"plan: the mask of {name} is missing", hint="keep plan.safetensors beside plan.json")
        mask = unpack_mask(sidecar[name], decision, weight.shape)
        if decision.values_sha256 is not None:
            weight = weight.masked_scatter(mask, _values(sidecar, decision, decision.kept).to(weight.dtype))
        tensors[name] = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    for name, choice in plan.quantized("weight").items():
        weight = tensors[name]
        assert isinstance(weight, Tensor)
        if choice.axis is not None and not 0 <= choice.axis < weight.dim():
            raise InputError(
                f"plan: {name} has axis {choice.axis}, but {weight.dim()} dimensions", hint="edit the plan"
            )
        if choice.group_size is not None and weight.dim() != 2:
            raise InputError(
                f"plan: {name} has groups, but {weight.dim()} dimensions",
                hint="only weights of linear layers have groups: set its group_size to null",
            )
        search, scales = str(choice.range), 1 if choice.axis is None else weight.shape[choice.axis]
        if search.startswith(BY_CHANNEL) and len(search) != len(BY_CHANNEL) + scales:
            raise InputError(
                f"plan: {name} has ranges for {len(search) - len(BY_CHANNEL)} channels, the checkpoint's has {scales}",
                hint="the plan is for another architecture, or was edited: one letter for each channel",
            )
        if is_mixed(choice.bits) and len(letters_of(choice.bits)) != scales:
            raise InputError(
                f"plan: {name} has widths for {len(letters_of(choice.bits))} channels, the checkpoint's has {scales}",
                hint="the plan is for another architecture, or was edited: one letter for each channel",
            )
        if choice.values_sha256 is not None:
            tensors[name] = _stored(sidecar, choice, weight)
            continue
        grid = grid_bits(choice.bits, choice.scheme)
        levels, scale = round_weight(weight, grid, axis=choice.axis, search=search, group_size=choice.group_size)
        tensors[name] = QuantizedTensor(levels, choice.bits, scale, choice.axis, choice.group_size)
    for name, correction in plan.corrections().items():
        bias = tensors[name]
        assert isinstance(bias, Tensor)
        tensors[name] = _values(sidecar, correction, bias.numel()).reshape(bias.shape).to(bias.dtype)
    for names in tied:
        for alias in names[1:]:
            if alias in tensors:
                tensors[alias] = tensors[names[0]]
    for name, value in tensors.items():
        scale_or_value = value.scale if isinstance(value, QuantizedTensor) else value
        if scale_or_value.is_floating_point() and not torch.isfinite(scale_or_value).all():
            raise NumericsError(
                f"{name} isn't finite after the plan", hint="check the checkpoint with hcompress inspect"
            )
    return Compressed(tensors, plan)


def assemble(graph: Graph, compressed: Compressed, *, float_addends: bool = False) -> fx.GraphModule:
    """The network that runs and is exported: batch norms folded, integer weights, rounded activations.

    Args:
        float_addends: Whether the outputs of convolutions that only sums read stay floats, whatever the plan says.

    Raises:
        InputError: The plan names an activation that the graph lacks.
    """
    module = split_reads(unlift(graph.program, graph.tied))
    if compressed.plan is not None:
        read = tensor_names(module)
        # Batch norms are folded before weights are set: their tensors must be the plan's by then.
        for name in (*compressed.plan.corrections(), *compressed.plan.replaced()):
            value = compressed.tensors[name]
            if isinstance(value, Tensor) and name in read:
                put_tensor(module, name, value)
    factors = fold_batch_norms(module)
    activations = {} if compressed.plan is None else compressed.plan.quantized("activation")
    targets = tensor_names(module)
    layers = {layer.tensor: layer for layer in graph.layers}
    for target in sorted(targets & compressed.tensors.keys()):
        axis = layers[target].axis if target in layers else None
        set_weight(module, target, _folded(compressed.tensors[target], factors.get(target), axis))
    nodes = {node.name: node for node in module.graph.nodes}
    lost = [name for name in activations if name not in nodes]
    if lost:
        raise InputError(f"plan: activation {lost[0]} is not in the graph", hint="the plan is for another architecture")
    grids = activation_grids(activations)
    if float_addends:
        grids = {name: grid for name, grid in grids.items() if not is_addend(nodes[name])}
    quantize_activations(module, grids)
    return finish(module)


def activation_grids(decisions: Mapping[str, Quantize]) -> dict[str, Grid]:
    """The grid of each activation that a plan rounds, by name."""
    grids = {}
    for name, decision in decisions.items():
        low, high = decision.range  # type: ignore[str-unpack]  # read_plan checks it
        assert isinstance(decision.bits, int)
        grids[name] = grid_of(float(low), float(high), decision.bits)
    return grids


def grid_of(low: float, high: float, bits: int) -> Grid:
    """The grid of an activation's range."""
    return Grid(*activation_grid(low, high, bits), bits)


def _folded(value: Tensor | QuantizedTensor, factor: Tensor | None, axis: int | None) -> Tensor | IntegerWeight:
    """A weight times its batch norm's factor, which goes into the scale of integers."""
    if isinstance(value, QuantizedTensor):
        if value.group_size is not None:
            scale = value.scale if factor is None else value.scale * factor[:, None]
            return IntegerWeight(value.levels, scale, value.axis, value.group_size)
        scale = value.scale if factor is None else value.scale * factor
        return IntegerWeight(value.levels, scale, value.axis if factor is None or value.axis is not None else axis)
    if factor is None:
        return value
    assert axis is not None
    # Plus zero, so that a weight that was zeroed is +0.0 whatever the factor's sign.
    return value * factor.reshape([-1 if dim == axis else 1 for dim in range(value.dim())]) + 0.0


def float_module(graph: Graph) -> fx.GraphModule:
    """The dense network with its batch norms folded: where activations are calibrated, by the names that plans use."""
    module = split_reads(unlift(graph.program, graph.tied))
    factors = fold_batch_norms(module)
    axes = {layer.tensor: layer.axis for layer in graph.layers}
    for target, factor in factors.items():
        set_weight(module, target, _folded(tensor_at(module, target), factor, axes[target]))
    return finish(module)

"""How each ATen op treats channels: one small rule an op, by its target.

A rule gets the node's operands with their labels and returns the output's. It binds the channels that the op makes go
together and freezes those that it needs. An op without a rule freezes every channel that reaches it, and says so.
A pruned channel counts as absent: what reads it is cut too, or reads zeros for it, never a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .labels import Axis, Labels, Value, along, matched_dims, reshaped, shrink
from .rewrite import operand
from .trace import CONVOLUTIONS, TRANSPOSED, argument

Result = Value | list[Value]
Rule = Callable[["Reading", fx.Node], Result]
RULES: dict[Any, Rule] = {}

# With zeros in, zeros out: of one tensor, whatever the other arguments.
KEEP_ZERO = {
    "relu", "relu_", "gelu", "silu", "silu_", "tanh", "tanh_", "hardswish", "hardswish_", "leaky_relu", "leaky_relu_",
    "elu", "elu_", "relu6", "relu6_", "selu", "selu_", "mish", "mish_", "celu", "abs", "neg", "square", "sqrt", "sign",
    "sin", "erf", "prelu", "clone", "contiguous", "dropout", "dropout_", "feature_dropout", "alpha_dropout", "to",
    "_to_copy", "detach", "detach_", "softsign", "expm1", "log1p", "trunc", "round", "floor",
    "ceil", "type_as", "positive", "alias", "lift_fresh_copy", "hardshrink", "softshrink", "tanhshrink", "relu2",
    "real", "imag", "_conj", "conj", "conj_physical", "resolve_conj",
}  # fmt: skip
# Element by element too, though not tagged so.
POINTWISE = {
    "clone", "contiguous", "dropout", "dropout_", "feature_dropout", "alpha_dropout", "to", "_to_copy", "detach",
    "detach_", "type_as", "alias", "lift_fresh_copy", "prelu", "silu", "silu_", "selu", "selu_", "mish", "mish_",
    "relu6", "relu6_", "logsigmoid", "log_sigmoid", "square", "masked_fill", "masked_fill_", "copy_", "celu", "celu_",
    "rsub", "where", "hardswish", "hardswish_", "hardsigmoid", "elu", "fill_", "addcmul", "addcdiv", "lerp",
    "float_power", "true_divide", "multiply", "subtract", "divide", "clip", "clip_", "zeros_like",
    "ones_like", "full_like", "empty_like", "nan_to_num", "isnan", "isfinite", "softplus", "hardtanh", "hardtanh_",
    "real", "imag", "_conj", "conj", "conj_physical", "resolve_conj", "complex",
    "__and__", "__or__", "__xor__", "__iand__", "__ior__", "__ixor__", "__lshift__", "__rshift__",
}  # fmt: skip
PRODUCTS = {"mul", "mul_", "multiply"}
SUMS = {"add", "add_", "sub", "sub_", "subtract", "rsub"}
KERNEL = "a kernel has one size"
QUOTIENTS = {"div", "div_", "divide", "true_divide"}
INFINITE_AT_ZERO = {"log", "log_", "log2", "log10", "rsqrt", "rsqrt_", "reciprocal", "reciprocal_", "logit", "lgamma"}


@dataclass(slots=True)
class Reading:
    """The graph as far as it is read.

    Attributes:
        values: Labels of each node's output; a list for several.
        weights: Labels ``[n]`` along each dimension of each parameter, buffer and constant; None for size 1.
        fixed: ``(labels, dim, reason, node)`` whose labels must not differ along ``dim`` once all are bound.
        directions: Tensor and dimension of what is divided by its norm: zeros there would be no direction.
    """

    labels: Labels
    values: dict[fx.Node, Result]
    weights: dict[str, list[Tensor | None]]
    fixed: list[tuple[Tensor, int, str, str]]
    directions: set[tuple[str, int]]

    def value(self, node: Any) -> Value:
        """The labels of one tensor; none for anything else."""
        found = self.values.get(node, ()) if isinstance(node, fx.Node) else ()
        return found if isinstance(found, tuple) else ()

    def freeze(self, value: Value, reason: str) -> None:
        for axis in value:
            self.labels.freeze(axis.labels, reason)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for all overloads of the ATen ops called ``names``."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(node: fx.Node) -> str:
    """``conv2d`` of ``aten.conv2d.default``; the whole target of what isn't ATen."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target._schema.name).removeprefix("aten::")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def shape_of(node: Any) -> tuple[int, ...]:
    """A tensor's shape at the traced batch; empty for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(hint(size) for size in value.shape) if isinstance(value, Tensor) else ()


def hint(size: Any) -> int:
    """A size at the traced batch."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def read(reading: Reading, node: fx.Node) -> Result:
    """The labels of a node's output, by its op's rule."""
    name = op_name(node)
    if name in RULES:
        return RULES[name](reading, node)
    if _draws(node):
        for source in node.all_input_nodes:
            reading.freeze(reading.value(source), f"{name} draws random numbers for it")
        return ()
    if name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise(reading, node)
    return unknown(reading, node)


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    if isinstance(node.target, torch._ops.OpOverload):
        flags = (argument(node, name, None) for name in ("train", "training"))
        if any(flag is False for flag in flags):
            return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def unknown(reading: Reading, node: fx.Node) -> Result:
    """No rule: everything that reaches the op stays as it is."""
    for source in node.all_input_nodes:
        reading.freeze(reading.value(source), f"{op_name(node)} has no channel rule")
    value = node.meta.get("val")
    return [() for _ in value] if isinstance(value, (list, tuple)) else ()


# -- element by element ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor among those that an op broadcasts together."""

    value: Value
    shape: tuple[int, ...]


def pointwise(reading: Reading, node: fx.Node) -> Value:
    """Operands that meet element by element share their channels."""
    operands = [
        Operand(reading.value(a), shape_of(a)) for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)
    ]
    name = op_name(node)
    _freeze_infinite(reading, node, operands)
    if name == "copy_":  # what it holds is the source's
        operands.reverse()
    has_scalar = name in SUMS and any(isinstance(a, (int, float)) and a != 0 for a in node.args[:2])
    if name == "pow":
        kind = "unary" if isinstance(node.args[1], (int, float)) and node.args[1] > 0 else "other"
    elif name in ("zeros_like",) or name in PRODUCTS:
        kind = "mul"
    elif name in SUMS:
        kind = "other" if has_scalar else "add"
    elif name == "complex":
        kind = "add"
    elif name in QUOTIENTS or name == "copy_":
        kind = "first"
    elif name.startswith("hardtanh"):
        low, high = argument(node, "min_val", -1), argument(node, "max_val", 1)
        kind = "unary" if low <= 0 <= high else "other"
    else:
        kind = "unary" if name in KEEP_ZERO else "other"
    return broadcast(reading.labels, operands, kind, op_name(node))


def _freeze_infinite(reading: Reading, node: fx.Node, operands: Sequence[Operand]) -> None:
    """What is zero when pruned can't be divided by: zeros after it would not make up for what isn't finite."""
    name, second = op_name(node), node.args[1] if len(node.args) > 1 else None
    if name in QUOTIENTS and isinstance(second, fx.Node):
        value = reading.value(second)
    elif name in INFINITE_AT_ZERO or (name == "pow" and isinstance(second, (int, float)) and second < 0):
        value = operands[0].value if operands else ()
    else:
        return
    reading.freeze(tuple(axis for axis in value if axis.is_zero), f"{name} isn't finite where it is zero")


def broadcast(labels: Labels, operands: Sequence[Operand], kind: str, name: str, *, kept: int = 0) -> Value:
    """The labels of operands that are broadcast together.

    Args:
        kind: When the result is zero at a pruned channel: ``mul`` if any operand is, ``add`` if all are, ``first`` and
            ``unary`` if the first is, ``other`` never.
        kept: Leading dimensions that a product of matrices keeps, which are heads and no positions within one.
    """
    dims = max((len(o.shape) for o in operands), default=0)
    aligned = [_aligned(side, dims) for side in operands]
    merged: list[tuple[Tensor, dict[int, bool]]] = []  # labels, and whether each operand that has them is zero there
    for number, side in enumerate(aligned):
        for axis in side.value:
            varying = set(axis.varying())
            for place, (known, zeros) in enumerate(merged):
                others = {d for d, size in enumerate(known.shape) if size > 1}
                few, many = sorted((varying, others), key=len)
                if few < many and min(few) > min(many - few) and max(few) >= kept:
                    known, axis = _whole(labels, known, axis, name)
                    merged[place] = (known, zeros)
                    if known.numel() == 1 or axis.labels.numel() == 1:
                        zeros[number] = zeros.get(number, False) or axis.is_zero
                        merged[place] = (known if axis.labels.numel() == 1 else axis.labels, zeros)
                        break
                if varying & others:
                    labels.bind(known, axis.labels)
                    wider = known if known.numel() >= axis.labels.numel() else axis.labels
                    zeros[number] = zeros.get(number, False) or axis.is_zero
                    merged[place] = (wider, zeros)
                    break
            else:
                merged.append((axis.labels, {number: axis.is_zero}))
    found = []
    for known, zeros in merged:
        varying_dims = [d for d, size in enumerate(known.shape) if size > 1]
        without = [side for number, side in enumerate(aligned) if number not in zeros]
        met = [d for d in varying_dims if any(side.shape[d] > 1 for side in without)]
        if met and len(met) == len(varying_dims):
            labels.freeze(known, f"{name} joins it with a tensor that has no channels there")
            continue
        known = labels.couple(Axis(known, False), met).labels  # heads go whole, where each meets the same positions
        if kind == "mul":
            is_zero = any(zeros.values())
        elif kind == "add":
            is_zero = len(zeros) == len(aligned) and all(zeros.values())
        else:
            is_zero = kind in ("first", "unary") and zeros.get(0, False)
        found.append(Axis(known, is_zero))
    return tuple(found)


def _whole(labels: Labels, known: Tensor, axis: Axis, name: str) -> tuple[Tensor, Axis]:
    """What varies on fewer dimensions stays, and the other is bound along them: heads go whole.

    Positions within a head that each meet a value of their own, as in rotary embeddings, could only go from all heads
    at once; a head can go alone.
    """
    few, many = (axis.labels, known) if axis.labels.numel() < known.numel() else (known, axis.labels)
    labels.freeze(few, f"{name} meets it in every head")
    whole = labels.couple(Axis(many, False), [d for d, size in enumerate(few.shape) if size > 1]).labels
    none = few.reshape(-1)[:1].reshape([1] * few.dim())
    if few is known:
        return none, replace(axis, labels=whole)
    return whole, replace(axis, labels=none)


def _aligned(side: Operand, dims: int) -> Operand:
    """With as many dimensions as the result, those that are missing in front."""
    lead = (1,) * (dims - len(side.shape))
    value = tuple(replace(axis, labels=axis.labels.reshape(lead + tuple(axis.labels.shape))) for axis in side.value)
    return Operand(value, lead + side.shape)


# -- layers ----------------------------------------------------------------------------------------------------------


@rule(*{str(op._schema.name).removeprefix("aten::") for op in (*CONVOLUTIONS, *TRANSPOSED)})
def convolution(reading: Reading, node: fx.Node) -> Value:
    """Inputs are summed over; groups keep as many inputs and outputs each."""
    labels, (x, weight) = reading.labels, node.args[:2]
    bias, groups = argument(node, "bias", None), argument(node, "groups", 1)
    if not isinstance(groups, int):
        return unknown_value(reading, node)
    transposed = node.target in TRANSPOSED
    dims = len(shape_of(node))
    channel = 1 if dims == len(shape_of(weight)) else 0
    value, stored = reading.value(x), reading.value(weight)
    rest = []
    for axis in value:
        others = [d for d in axis.varying() if d > channel]
        if axis.labels.shape[channel] == 1 and others:
            labels.freeze(axis.labels, f"{op_name(node)} slides over it")
        elif axis.labels.shape[channel] == 1:
            rest.append(axis)
    inside = tuple(a for a in value if not any(a is b for b in rest))
    read_labels = labels.vector(inside, channel)
    for axis in stored:
        if any(d > 1 for d in axis.varying()):
            labels.freeze(axis.labels, KERNEL)
    inputs = labels.vector(stored, 0 if transposed else 1)
    outputs = labels.vector(stored, 1 if transposed else 0)
    _freeze_unless_zero(labels, inside, channel, stored, 0 if transposed else 1, op_name(node))
    is_zero = _is_zero(stored, 1 if transposed else 0)
    if groups > 1:
        outputs = _grouped(reading, node, read_labels, inputs, outputs, groups, transposed=transposed)
        is_zero |= shape_of(weight)[1] == 1 and _is_zero(inside, channel)
    else:
        _meet(labels, read_labels, inputs, f"{op_name(node)} reads channels that stay")
    beside = tuple(rest) if bias is None else unzeroed(tuple(rest))
    return (*beside, *_offset(reading, node, outputs, bias, channel, is_zero=is_zero))


def _is_zero(value: Value, dim: int) -> bool:
    """Whether a tensor is zero at a pruned channel along a dimension."""
    return all(axis.is_zero for axis in value if axis.labels.shape[dim] > 1)


def _freeze_unless_zero(labels: Labels, value: Value, dim: int, stored: Value, stored_dim: int, name: str) -> None:
    """What is summed over stays where neither the input nor the weight is zero when it is pruned."""
    if not _is_zero(value, dim) and not _is_zero(stored, stored_dim):
        for axis in value:
            if axis.labels.shape[dim] > 1:
                labels.freeze(axis.labels, f"{name} sums over it, and what is pruned would not be zero")


def _offset(reading: Reading, node: fx.Node, outputs: Tensor | None, bias: Any, dim: int, *, is_zero: bool) -> Value:
    """A layer's outputs, labelled as its weight's are, after its bias."""
    labels, added, dims = reading.labels, reading.value(bias), len(shape_of(node))
    offset = labels.vector(added, 0)
    if isinstance(bias, fx.Node):
        _meet(labels, outputs, offset, f"{op_name(node)} has outputs or a bias that stay")
    return () if outputs is None else (Axis(along(outputs, dim, dims), is_zero and _is_zero(added, 0)),)


def _meet(labels: Labels, first: Tensor | None, second: Tensor | None, reason: str) -> None:
    """Bind two vectors; where one has no labels the other stays."""
    if first is not None and second is not None:
        labels.bind(first, second)
    elif first is not None or second is not None:
        labels.freeze(first if first is not None else second, reason)  # type: ignore[arg-type]


def _grouped(
    reading: Reading,
    node: fx.Node,
    read_labels: Tensor | None,
    inputs: Tensor | None,
    outputs: Tensor | None,
    groups: int,
    *,
    transposed: bool,
) -> Tensor | None:
    """Labels of a grouped convolution's outputs.

    Whole groups go where there are more of them than inputs in one, else the same places within all groups. A weight
    holds either its outputs or, transposed, its inputs for all groups, and the others once.
    """
    labels, name = reading.labels, op_name(node)
    by_group, within = (inputs, outputs) if transposed else (outputs, inputs)
    each = shape_of(node.args[1])[0 if transposed else 1] // (groups if transposed else 1)
    if groups > each:
        if within is not None:
            labels.freeze(within, f"{name} loses whole groups, not places within one")
        if by_group is None:
            if read_labels is not None:
                labels.freeze(read_labels, f"{name} has weights that stay")
            return None
        grid = by_group.reshape(groups, -1)
        labels.bind(grid[:, :1], grid)
        if read_labels is None:
            labels.freeze(by_group, f"{name} has a group for each input, and they stay")
        else:
            labels.bind(grid[:, :1], read_labels.reshape(groups, -1))
        return grid[:, 0].repeat_interleave(shape_of(node.args[1])[1]) if transposed else outputs
    if by_group is not None:
        grid = by_group.reshape(groups, -1)
        labels.bind(grid[:1], grid)
    places = None
    if read_labels is not None:
        places = read_labels.reshape(groups, -1)
        labels.bind(places[:1], places)
        places = places[0]
    summed = inputs.reshape(groups, -1)[0] if transposed and inputs is not None else inputs
    _meet(labels, places, summed, f"{name} reads channels that stay")
    return outputs.repeat(groups) if transposed and outputs is not None else outputs


@rule("linear")
def linear(reading: Reading, node: fx.Node) -> Value:
    """The last dimension is summed over."""
    labels, (x, weight) = reading.labels, node.args[:2]
    value, stored, dims = reading.value(x), reading.value(weight), len(shape_of(node))
    last = tuple(axis for axis in value if axis.labels.shape[-1] > 1)
    _meet(labels, labels.vector(last, dims - 1), labels.vector(stored, 1), "linear reads channels that stay")
    _freeze_unless_zero(labels, last, -1, stored, 1, "linear")
    rest = tuple(axis for axis in value if axis.labels.shape[-1] == 1)
    outputs, bias = labels.vector(stored, 0), argument(node, "bias", None)
    return (*unzeroed(rest), *_offset(reading, node, outputs, bias, dims - 1, is_zero=_is_zero(stored, 0)))


def unzeroed(value: Value) -> Value:
    """The same channels, of what may not be zero where they are pruned."""
    return tuple(replace(axis, is_zero=False) for axis in value)


@rule("embedding")
def embedding(reading: Reading, node: fx.Node) -> Value:
    """Rows are looked up; the last dimension is the weight's."""
    stored, dims = reading.value(node.args[0]), len(shape_of(node))
    reading.freeze(reading.value(node.args[1]), "embedding reads it as rows")
    rows = reading.labels.vector(stored, 0)
    if rows is not None:
        reading.labels.freeze(rows, "embedding looks its rows up")
    columns = reading.labels.vector(stored, 1)
    return () if columns is None else (Axis(along(columns, dims - 1, dims), True),)


# -- normalisation ---------------------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(reading: Reading, node: fx.Node) -> Value:
    """Statistics of each channel alone, over all that lies beside it where they aren't stored."""
    if argument(node, "training", False) or argument(node, "use_input_stats", False):
        _freeze_beside(reading, node)
    return _by_channel(reading, node, node.args[1:5], zeroes=node.args[1] is not None)


def _freeze_beside(reading: Reading, node: fx.Node) -> None:
    """Statistics over a channel's elements: a network without some of them has others."""
    for axis in reading.value(node.args[0]):
        if any(d != 1 for d in axis.varying()):
            reading.labels.freeze(axis.labels, f"{op_name(node)} takes its statistics over it")


def _by_channel(reading: Reading, node: fx.Node, stored: Sequence[Any], *, zeroes: bool) -> Value:
    labels, value, dims = reading.labels, reading.value(node.args[0]), len(shape_of(node))
    channels = labels.vector(value, 1) if dims > 1 else None
    for part in stored:
        if isinstance(part, fx.Node):
            vector = labels.vector(reading.value(part), 0)
            _meet(labels, channels, vector, f"{op_name(node)} normalises channels that stay")
            zeroes &= _is_zero(reading.value(part), 0)
    rest = tuple(axis for axis in value if axis.labels.shape[1] == 1)
    was_zero = any(axis.is_zero for axis in value if axis.labels.shape[1] > 1)
    return (*unzeroed(rest), *(() if channels is None else (Axis(along(channels, 1, dims), zeroes or was_zero),)))


@rule("prelu", "_prelu_kernel")
def prelu(reading: Reading, node: fx.Node) -> Value:
    """A slope for each channel, or one for all."""
    if shape_of(node.args[1]) in ((1,), ()):
        return reading.value(node.args[0])
    return _by_channel(reading, node, node.args[1:2], zeroes=False)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(reading: Reading, node: fx.Node) -> Value:
    """What is normalised over stays, or goes whole, as a head does."""
    dims, value = len(shape_of(node)), reading.value(node.args[0])
    reason = f"{op_name(node)} takes its statistics over it"
    for dim in range(dims - len(node.args[1]), dims):  # type: ignore[arg-type]
        value = _across(reading.labels, value, dim, reason)
    for part in node.args[2:4]:
        reading.freeze(reading.value(part), reason)
    return unzeroed(value)


@rule("_weight_norm")
def weight_norm(reading: Reading, node: fx.Node) -> Value:
    """``g v / |v|`` over all dimensions of ``v`` but one, along which ``g`` lies."""
    direction, length = reading.value(node.args[0]), reading.value(node.args[1])
    dim = int(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[arg-type]
    reading.directions.add((str(getattr(node.args[0], "target", "")), dim))
    labels = reading.labels
    _meet(labels, labels.vector(direction, dim), labels.vector(length, dim), "its length stays")
    return direction


@rule("group_norm")
def group_norm(reading: Reading, node: fx.Node) -> Value:
    """Statistics of each group: whole ones may go."""
    groups = int(node.args[1])  # type: ignore[arg-type]
    _freeze_beside(reading, node)
    weight, bias = argument(node, "weight", None), argument(node, "bias", None)
    value = _by_channel(reading, node, (weight, bias), zeroes=weight is not None)
    channels = reading.labels.vector(value, 1)
    if channels is not None:
        if groups == 1:
            reading.labels.freeze(channels, "group_norm takes its statistics over it")
        by_group = channels.reshape(groups, -1)
        reading.labels.bind(by_group[:, :1], by_group)
    return value


# -- products of tensors ---------------------------------------------------------------------------------------------


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(reading: Reading, node: fx.Node) -> Value:
    first, second = node.args[:2]
    return _product(reading, _operand(reading, first), _operand(reading, second), op_name(node))


@rule("outer", "ger")
def outer(reading: Reading, node: fx.Node) -> Value:
    """``[m]`` times ``[n]`` is ``[m, 1] @ [1, n]``."""
    sides = []
    for place, source in enumerate(node.args[:2]):
        value = tuple(replace(a, labels=a.labels.unsqueeze(1 - place)) for a in reading.value(source))
        sides.append(Operand(value, (*shape_of(source), 1) if place == 0 else (1, *shape_of(source))))
    return broadcast(reading.labels, sides, "mul", op_name(node))


@rule("addmm", "baddbmm", "addbmm")
def addmm(reading: Reading, node: fx.Node) -> Value:
    added, first, second = node.args[:3]
    value = _product(reading, _operand(reading, first), _operand(reading, second), op_name(node))
    operands = [Operand(value, shape_of(node)), _operand(reading, added)]
    return broadcast(reading.labels, operands, "add", op_name(node))


def _operand(reading: Reading, node: Any) -> Operand:
    return Operand(reading.value(node), shape_of(node))


def _product(reading: Reading, first: Operand, second: Operand, name: str) -> Value:
    """``[..., m, k] @ [..., k, n]``: the channels along k are summed over, the others stay apart."""
    labels = reading.labels
    vector_first, vector_second = len(first.shape) == 1, len(second.shape) == 1
    if vector_first:
        first = Operand(tuple(replace(a, labels=a.labels.unsqueeze(0)) for a in first.value), (1, *first.shape))
    if vector_second:
        second = Operand(tuple(replace(a, labels=a.labels.unsqueeze(1)) for a in second.value), (*second.shape, 1))
    left, left_summed, left_zero = _summed(labels, first.value, -1)
    right, right_summed, right_zero = _summed(labels, second.value, -2)
    if left_summed is not None and right_summed is not None and not (left_zero or right_zero):
        labels.freeze(left_summed, f"{name} sums over it, and what is pruned would not be zero")
    _meet(labels, left_summed, right_summed, f"{name} sums over channels that stay in its other factor")
    sides = [
        Operand(tuple(a for a in left), (*first.shape[:-1], 1)),
        Operand(tuple(a for a in right), (*second.shape[:-2], 1, second.shape[-1])),
    ]
    value = broadcast(labels, sides, "mul", name, kept=max(len(side.shape) for side in sides))
    for dim in [-2] * vector_first + [-1] * vector_second:
        value = tuple(replace(a, labels=a.labels.squeeze(dim)) for a in value)
    return value


def _summed(labels: Labels, value: Value, dim: int) -> tuple[list[Axis], Tensor | None, bool]:
    """The axes that a product keeps, the labels ``[k]`` that it sums over, and whether those are zeros when pruned.

    Channels that lie along the summed dimension and another, as heads do, go whole.
    """
    kept: list[Axis] = []
    summed = []
    for axis in value:
        place = axis.labels.dim() + dim
        if axis.labels.shape[place] > 1 and len(axis.varying()) > 1:
            kept.append(labels.couple(axis, [place]))
        elif axis.labels.shape[place] > 1:
            summed.append(axis)
        else:
            kept.append(axis)
    vector = labels.vector(tuple(summed), summed[0].labels.dim() + dim) if summed else None
    return kept, vector, all(axis.is_zero for axis in summed)


@rule("scaled_dot_product_attention")
def attention(reading: Reading, node: fx.Node) -> Value:
    """Scores of queries and keys, softmax, and the scores' product with the values."""
    labels = reading.labels
    query, key, value = (_operand(reading, a) for a in node.args[:3])
    if argument(node, "enable_gqa", False):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_heads(side, repeats) for side in (key, value))
    turned = Operand(
        tuple(replace(a, labels=a.labels.transpose(-1, -2)) for a in key.value),
        (*key.shape[:-2], key.shape[-1], key.shape[-2]),
    )
    scores = _product(reading, query, turned, "attention")
    leading = tuple(max(a, b) for a, b in zip(query.shape[:-2], key.shape[:-2], strict=True))
    shape = (*leading, query.shape[-2], key.shape[-2])
    mask = argument(node, "attn_mask", None)
    if isinstance(mask, fx.Node):
        scores = broadcast(labels, [Operand(scores, shape), _operand(reading, mask)], "other", "attention's mask")
    kept = _across(labels, scores, len(shape) - 1, "attention's softmax sums over it")
    return _product(reading, Operand(unzeroed(kept), shape), value, "attention")


def _repeat_heads(side: Operand, repeats: int) -> Operand:
    def wider(axis: Axis) -> Axis:
        labels = axis.labels
        return replace(axis, labels=labels.repeat_interleave(repeats, -3) if labels.shape[-3] > 1 else labels)

    return Operand(tuple(map(wider, side.value)), (*side.shape[:-3], side.shape[-3] * repeats, *side.shape[-2:]))


@rule("einsum")
def einsum(reading: Reading, node: fx.Node) -> Value:
    """Every operand laid out over all letters; those that the result lacks are summed over."""
    equation = str(node.args[0]).replace(" ", "")
    nodes = list(node.args[1])  # type: ignore[arg-type]
    if "." in equation or "->" not in equation:
        return unknown_value(reading, node)
    terms, result = equation.split("->")
    letters = result + "".join(sorted({x for x in terms if x.isalpha()} - set(result)))
    sizes = {
        x: s for term, a in zip(terms.split(","), nodes, strict=True) for x, s in zip(term, shape_of(a), strict=True)
    }
    operands = []
    for term, source in zip(terms.split(","), nodes, strict=True):
        if len(set(term)) != len(term):
            return unknown_value(reading, node)
        order = sorted(range(len(term)), key=lambda i, t=term: letters.index(t[i]))  # type: ignore[misc]
        layout = [1 if x not in term else 0 for x in letters]

        def laid(axis: Axis, order: list[int] = order, layout: list[int] = layout) -> Axis:
            labels = axis.labels.permute(order)
            for d, missing in enumerate(layout):
                labels = labels.unsqueeze(d) if missing else labels
            return replace(axis, labels=labels)

        shape = tuple(sizes[x] if x in term else 1 for x in letters)
        operands.append(Operand(tuple(laid(a) for a in reading.value(source)), shape))
    found = []
    gone = range(len(result), len(letters))
    for axis in broadcast(reading.labels, operands, "mul", "einsum", kept=len(result)):
        summed = [d for d in gone if axis.labels.shape[d] > 1]
        if summed and len(summed) == len(axis.varying()):
            if not axis.is_zero:
                reading.labels.freeze(axis.labels, "einsum sums over it, and what is pruned would not be zero")
            continue
        axis = reading.labels.couple(axis, summed)
        found.append(replace(axis, labels=axis.labels.reshape(axis.labels.shape[: len(result)])))
    return tuple(found)


def unknown_value(reading: Reading, node: fx.Node) -> Value:
    """``unknown`` for an op of one output."""
    unknown(reading, node)
    return ()


# -- across a dimension ----------------------------------------------------------------------------------------------


def _across(labels: Labels, value: Value, dim: int, reason: str) -> Value:
    """Labels that an op over ``dim`` leaves; those that lie along it alone stay as they are."""
    found = []
    for axis in value:
        if axis.labels.shape[dim] == 1:
            found.append(axis)
        elif len(axis.varying()) > 1:
            found.append(labels.couple(axis, [dim]))
        else:
            labels.freeze(axis.labels, reason)
    return tuple(found)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "_safe_softmax")
def over_dim(reading: Reading, node: fx.Node) -> Value:
    dim = int(operand(node, 1)) % len(shape_of(node))
    kept = _across(reading.labels, reading.value(node.args[0]), dim, f"{op_name(node)} runs over it")
    return kept if op_name(node).startswith("cum") else unzeroed(kept)


@rule(*(f"fft_{way}{kind}fft{rank}" for way in ("", "i") for kind in ("", "r", "h") for rank in ("", "2", "n")))
def fourier(reading: Reading, node: fx.Node) -> Value:
    """Frequencies of each channel alone."""
    name, value, dims = op_name(node), reading.value(node.args[0]), len(shape_of(node.args[0]))
    given = argument(node, "dim", -1 if name.endswith("t") else [-2, -1] if name.endswith("2") else None)
    for dim in range(dims) if given is None else [given] if isinstance(given, int) else given:
        value = _across(reading.labels, value, dim % dims, f"{name} runs over it")
    return value


@rule("tril", "tril_", "triu", "triu_")
def triangle(reading: Reading, node: fx.Node) -> Value:
    """Zeros on one side of the diagonal of each matrix."""
    value, dims = reading.value(node.args[0]), len(shape_of(node))
    for dim in (dims - 2, dims - 1):
        value = _across(reading.labels, value, dim, f"{op_name(node)} reads it as positions")
    return value


@rule("sort", "topk")
def ordered(reading: Reading, node: fx.Node) -> Result:
    dim = argument(node, "dim", -1)
    dims = len(shape_of(node.args[0]))
    kept = _across(reading.labels, reading.value(node.args[0]), int(dim) % dims, f"{op_name(node)} runs over it")
    return [unzeroed(kept), unzeroed(kept)]


@rule(
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "std", "var", "norm", "linalg_vector_norm", "prod",
    "logsumexp", "any", "all", "std_mean", "var_mean", "median", "count_nonzero",
)  # fmt: skip
def reduction(reading: Reading, node: fx.Node) -> Result:
    """Zeros add nothing to a sum, and change a mean by a factor; other statistics need all that they are taken over."""
    name, value = op_name(node), reading.value(node.args[0])
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return pointwise(reading, node)  # maximum and minimum of two tensors
    gone = reduced_dims(node)
    keepdim = bool(argument(node, "keepdim", False))
    found = []
    for axis in value:
        over = [d for d in axis.varying() if d in gone]
        if over and len(over) == len(axis.varying()):
            if not (axis.is_zero and _adds(node)):
                reading.labels.freeze(axis.labels, f"{name} runs over it")
            continue
        axis = reading.labels.couple(axis, over)
        labels = axis.labels
        if not keepdim:
            labels = labels.reshape([s for d, s in enumerate(labels.shape) if d not in gone])
        found.append(Axis(labels, axis.is_zero and name in ZERO_OF_ZEROS))
    outputs = node.meta.get("val")
    return [tuple(found) for _ in outputs] if isinstance(outputs, (list, tuple)) else tuple(found)


ZERO_OF_ZEROS = {
    "sum", "mean", "amax", "amin", "max", "min", "std", "var", "std_mean", "var_mean", "norm", "linalg_vector_norm",
    "prod", "median",
}  # fmt: skip


def reduced_dims(node: fx.Node) -> set[int]:
    """The dimensions that a statistic is taken over."""
    dims, given = len(shape_of(node.args[0])), argument(node, "dim", None)
    axes = range(dims) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    return {int(d) % max(dims, 1) for d in axes}


def _adds(node: fx.Node) -> bool:
    """Whether more zeros change nothing, or a factor: sums, means, and norms that are roots of sums.

    A mean that a root is taken of is a norm's, which stays as ``rms_norm`` does: no class has another divisor for it.
    """
    name = op_name(node)
    if name == "mean":
        return not _has_root(node)
    order = argument(node, "ord", 2) if name == "linalg_vector_norm" else argument(node, "p", 2)
    return name == "sum" or (name in ("norm", "linalg_vector_norm") and (order is None or order > 0))


def _has_root(node: fx.Node) -> bool:
    return any(
        op_name(user) in ("rsqrt", "sqrt", "pow") or (op_name(user) in SUMS and _has_root(user)) for user in node.users
    )


@rule("glu")
def glu(reading: Reading, node: fx.Node) -> Value:
    """The first half times the sigmoid of the second."""
    dim = int(argument(node, "dim", -1)) % len(shape_of(node))
    half = shape_of(node)[dim]
    parts = []
    for start in (0, half):
        value = _narrow(reading, node, dim, start, half)
        parts.append(Operand(value, shape_of(node)))
    return broadcast(reading.labels, parts, "first", "glu")


# -- positions -------------------------------------------------------------------------------------------------------

POSITIONAL = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "max_pool2d_with_indices", "grid_sampler",
)  # fmt: skip


@rule(*POSITIONAL)
def positional(reading: Reading, node: fx.Node) -> Result:
    """Rows and columns are mixed; batch and channels stay apart."""
    found = _apart(reading, node, reading.value(node.args[0]))
    for other in node.all_input_nodes[1:]:
        reading.freeze(reading.value(other), f"{op_name(node)} reads it as positions")
        if len(shape_of(other)) > 1 and shape_of(other)[0] > 1:  # a grid for each example
            reading.freeze(tuple(a for a in found if 0 in a.varying()), f"{op_name(node)} reads positions for it")
    outputs = node.meta.get("val")
    return [found for _ in outputs] if isinstance(outputs, (list, tuple)) else found


@rule("max_unpool2d", "max_unpool3d")
def unpool(reading: Reading, node: fx.Node) -> Result:
    """What was pooled goes back to where it was."""
    operands = [_operand(reading, a) for a in node.args[:2]]
    return _apart(reading, node, broadcast(reading.labels, operands, "first", op_name(node)))


def _apart(reading: Reading, node: fx.Node, value: Value) -> Value:
    """What isn't along rows and columns."""
    rank = _rank(op_name(node))
    first = len(shape_of(node.args[0])) - rank
    found = []
    for axis in value:
        if any(d >= first for d in axis.varying()):
            reading.labels.freeze(axis.labels, f"{op_name(node)} slides over it")
        else:
            found.append(axis)
    return tuple(found)


def _rank(name: str) -> int:
    return next((int(name[i]) for i in range(len(name) - 1, -1, -1) if name[i].isdigit()), 2)


@rule("constant_pad_nd", "pad")
def pad(reading: Reading, node: fx.Node) -> Value:
    """Added channels are zeros that go with whatever they are added to."""
    amounts, value, dims = list(node.args[1]), reading.value(node.args[0]), len(shape_of(node))  # type: ignore[arg-type]
    mode = argument(node, "mode", "constant") if op_name(node) == "pad" else "constant"
    fill = argument(node, "value", None)
    padded = {dims - 1 - i // 2: (amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)}
    padded = {d: (low, high) for d, (low, high) in padded.items() if low or high}
    adds_zeros = mode != "constant" or fill in (None, 0) or not padded
    found = []
    for axis in value:
        if not any(d in padded for d in axis.varying()):
            found.append(replace(axis, is_zero=axis.is_zero and adds_zeros))
        elif mode != "constant" or len(axis.varying()) > 1 or any(not isinstance(x, int) or x < 0 for x in amounts):
            reading.labels.freeze(axis.labels, "pad mixes it with its neighbours")
        else:
            (dim,) = axis.varying()
            low, high = padded[dim]
            parts = [reading.labels.fresh(low), axis.labels.reshape(-1), reading.labels.fresh(high)]
            found.append(Axis(along(torch.cat(parts), dim, dims), axis.is_zero and adds_zeros))
    return tuple(found)


# -- moves -----------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "flatten", "_unsafe_view", "unflatten", "view_as", "reshape_as")
def view(reading: Reading, node: fx.Node) -> Value:
    before, after = shape_of(node.args[0]), shape_of(node)
    value = reading.value(node.args[0])
    many = _copies_of_channels(reading, value, before, after)
    value = tuple(axis for axis in value if not (reading.labels.is_free(axis) and many & set(axis.varying())))
    moved = (reshaped(reading.labels, axis, before, after, copies=many) for axis in value)
    return tuple(axis for axis in moved if axis is not None)


def _copies_of_channels(reading: Reading, value: Value, before: Sequence[int], after: Sequence[int]) -> set[int]:
    """Dimensions of copies that go into one with channels, as keys for several queries do: they stay as many."""
    free = [axis for axis in value if reading.labels.is_free(axis)]
    if not free:
        return set()
    held = {d for axis in value if not reading.labels.is_free(axis) for d in axis.varying()}
    mixed = {d for left, _ in matched_dims(before, after) if held & set(left) for d in left}
    gone = tuple(axis for axis in free if mixed & set(axis.varying()))
    reading.freeze(gone, "each channel has as many copies")
    return {d for axis in gone for d in axis.varying()}


@rule("permute", "transpose", "t", "swapaxes", "movedim", "numpy_T", "mT", "squeeze", "unsqueeze", "swapdims")
def turn(reading: Reading, node: fx.Node) -> Value:
    """The same move on the labels. Dimensions of size 1 are theirs where the tensor's aren't: squeeze by place."""
    before, name = shape_of(node.args[0]), op_name(node)
    found = []
    for axis in reading.value(node.args[0]):
        if name == "squeeze":
            given = argument(node, "dim", None)
            axes = range(len(before)) if given is None else [given] if isinstance(given, int) else list(given)
            gone = {int(d) % len(before) for d in axes if before[int(d)] == 1}
            labels = axis.labels.reshape([s for d, s in enumerate(axis.labels.shape) if d not in gone])
        else:
            labels = node.target(axis.labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        found.append(replace(axis, labels=labels))
    return tuple(found)


@rule("view_as_complex")
def as_complex(reading: Reading, node: fx.Node) -> Value:
    """Both parts of a number go together."""
    value = _across(reading.labels, reading.value(node.args[0]), len(shape_of(node)), "view_as_complex takes both")
    return tuple(replace(axis, labels=axis.labels.squeeze(-1)) for axis in value)


@rule("view_as_real")
def as_real(reading: Reading, node: fx.Node) -> Value:
    return tuple(replace(axis, labels=axis.labels.unsqueeze(-1)) for axis in reading.value(node.args[0]))


@rule("expand_as")
def expand_as(reading: Reading, node: fx.Node) -> Value:
    """As many copies as the other tensor has."""
    return broadcast(reading.labels, [_operand(reading, a) for a in node.args], "first", op_name(node))


@rule("expand", "broadcast_to")
def expand(reading: Reading, node: fx.Node) -> Value:
    """Copies, as of a mask for every head or a kernel for every channel, are as many as what they are joined with."""
    source = _aligned(_operand(reading, node.args[0]), len(shape_of(node)))
    return (*source.value, *_copies(reading, node, source))


def _copies(reading: Reading, node: fx.Node, source: Operand) -> list[Axis]:
    """Labels along the dimensions of size 1 that an op widens."""
    return [axis for axis in _of_any_size(reading, node, False) if source.shape[axis.varying()[0]] == 1]


@rule("repeat", "tile")
def repeat(reading: Reading, node: fx.Node) -> Value:
    dims, times = len(shape_of(node)), list(node.args[1])  # type: ignore[arg-type]
    times = [1] * (dims - len(times)) + times
    source = _aligned(_operand(reading, node.args[0]), dims)
    found = _copies(reading, node, source)
    for axis in source.value:
        counts = [hint_of(t) if s > 1 else 1 for t, s in zip(times, axis.labels.shape, strict=True)]
        found.append(replace(axis, labels=axis.labels.repeat(counts)))
    return tuple(found)


def hint_of(value: Any) -> int:
    """An integer argument at the traced batch."""
    return hint(value.meta["val"]) if isinstance(value, fx.Node) else int(value)


@rule("repeat_interleave")
def repeat_interleave(reading: Reading, node: fx.Node) -> Value:
    times, dim = node.args[1], argument(node, "dim", None)
    if not isinstance(times, int) or dim is None:
        return unknown_value(reading, node)
    return tuple(
        replace(axis, labels=axis.labels.repeat_interleave(times, dim) if axis.labels.shape[dim] > 1 else axis.labels)
        for axis in reading.value(node.args[0])
    )


def _narrow(reading: Reading, node: fx.Node, dim: int, start: int, length: int, step: int = 1) -> Value:
    """A piece along ``dim``; one that is a single channel's has none."""
    found = []
    for axis in reading.value(node.args[0]):
        if axis.labels.shape[dim] > 1:
            chosen = [slice(None)] * axis.labels.dim()
            chosen[dim] = slice(start, start + length, step)
            axis = replace(axis, labels=shrink(axis.labels[tuple(chosen)]))
            if axis.labels.numel() == 1:
                reading.labels.freeze(axis.labels, f"{op_name(node)} takes it alone")
                continue
        found.append(axis)
    return tuple(found)


def slice_bounds(node: fx.Node) -> tuple[int, int, int, int]:
    """``(dim, start, length read, step)`` of a slice at the traced batch."""
    shape = shape_of(node.args[0])
    dim = int(argument(node, "dim", 0)) % len(shape)
    size = shape[dim]
    start, end = argument(node, "start", None), argument(node, "end", None)
    low, high = (0 if start is None else hint_of(start)), (size if end is None else hint_of(end))
    low, high, step = slice(low, high, int(argument(node, "step", 1))).indices(size)
    return dim, low, max(high - low, 0), step


@rule("slice")
def slice_(reading: Reading, node: fx.Node) -> Value:
    dim, start, length, step = slice_bounds(node)
    return _narrow(reading, node, dim, start, length, step)


@rule("narrow")
def narrow(reading: Reading, node: fx.Node) -> Value:
    dim = int(node.args[1]) % len(shape_of(node))  # type: ignore[arg-type]
    if not all(isinstance(a, int) for a in node.args[2:4]):
        return unknown_value(reading, node)
    return _narrow(reading, node, dim, int(node.args[2]), int(node.args[3]))  # type: ignore[arg-type]


@rule("select")
def select(reading: Reading, node: fx.Node) -> Value:
    dim = int(node.args[1]) % len(shape_of(node.args[0]))  # type: ignore[arg-type]
    index = hint_of(node.args[2]) % max(shape_of(node.args[0])[dim], 1)
    return _picked(reading, node, dim, index)


def _picked(reading: Reading, node: fx.Node, dim: int, index: int) -> Value:
    found = []
    for axis in reading.value(node.args[0]):
        if axis.labels.shape[dim] > 1:
            reading.fixed.append((axis.labels, dim, f"{op_name(node)} takes one of them", node.name))
        labels = axis.labels.select(dim, index if axis.labels.shape[dim] > 1 else 0)
        if labels.numel() > 1:
            found.append(replace(axis, labels=shrink(labels)))
    return tuple(found)


@rule("unbind")
def unbind(reading: Reading, node: fx.Node) -> Result:
    dim = int(argument(node, "dim", 0)) % len(shape_of(node.args[0]))
    return [_picked(reading, node, dim, index) for index in range(shape_of(node.args[0])[dim])]


def split_sizes(node: fx.Node) -> tuple[int, list[int]]:
    """The dimension and the sizes of a split's pieces."""
    dim = int(argument(node, "dim", 0)) % len(shape_of(node.args[0]))
    return dim, [hint(piece.shape[dim]) for piece in node.meta["val"]]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(reading: Reading, node: fx.Node) -> Result:
    dim, sizes = split_sizes(node)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_narrow(reading, node, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@rule("getitem")
def getitem(reading: Reading, node: fx.Node) -> Value:
    source = reading.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    index = node.args[1]
    return source[index] if isinstance(source, list) and isinstance(index, int) and index < len(source) else ()


@rule("cat", "concat", "concatenate")
def cat(reading: Reading, node: fx.Node) -> Value:
    parts = [a for a in node.args[0] if isinstance(a, fx.Node)]  # type: ignore[union-attr]
    dim = int(argument(node, "dim", 0)) % len(shape_of(node))
    return _joined(reading, [_operand(reading, a) for a in parts], dim, len(shape_of(node)))


@rule("stack")
def stack(reading: Reading, node: fx.Node) -> Value:
    dims = len(shape_of(node))
    dim = int(argument(node, "dim", 0)) % dims
    parts = []
    for a in node.args[0]:  # type: ignore[union-attr]
        value = tuple(replace(axis, labels=axis.labels.unsqueeze(dim)) for axis in reading.value(a))
        shape = shape_of(a)
        parts.append(Operand(value, (*shape[:dim], 1, *shape[dim:])))
    return _joined(reading, parts, dim, dims)


def _joined(reading: Reading, parts: Sequence[Operand], dim: int, dims: int) -> Value:
    """Tensors one after another along ``dim``: channels along it side by side, those along others bound."""
    labels = reading.labels
    whole = {d for part in parts for axis in part.value if axis.labels.shape[dim] == 1 for d in axis.varying()}
    pieces, others = [], []
    is_zero = True
    for part in parts:  # a head goes whole in all parts, if in one
        value = [labels.couple(axis, [dim]) if whole & set(axis.varying()) else axis for axis in part.value]
        lying = tuple(axis for axis in value if axis.labels.shape[dim] > 1)
        vector = lying[0].labels if len(lying) == 1 else labels.vector(lying, dim)
        pieces.append(vector if vector is None or vector.dim() == dims else along(vector, dim, dims))
        is_zero &= all(axis.is_zero for axis in lying) and vector is not None
        rest = tuple(axis for axis in value if axis.labels.shape[dim] == 1)
        others.append(Operand(rest, (*part.shape[:dim], 1, *part.shape[dim + 1 :])))
    found = list(broadcast(labels, others, "add", "cat"))
    if any(piece is not None for piece in pieces):
        made = []
        for piece, part in zip(pieces, parts, strict=True):
            if piece is None:
                piece = along(labels.fresh(part.shape[dim]), dim, dims)
                labels.freeze(piece, "cat joins it with a tensor that has no channels there")
            made.append(piece)
        sizes = [max(piece.shape[d] for piece in made) if d != dim else -1 for d in range(dims)]
        found.append(Axis(torch.cat([piece.expand(sizes) for piece in made], dim), is_zero))
    return tuple(found)


@rule("pixel_shuffle")
def pixel_shuffle(reading: Reading, node: fx.Node) -> Value:
    """The ``r x r`` sub-pixels of a channel go together."""
    shape, factor = shape_of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    return _by_place(reading, node, lambda labels: _coupled(reading, labels.reshape(-1, factor**2)), len(shape) - 3)


def _coupled(reading: Reading, labels: Tensor) -> Tensor:
    reading.labels.bind(labels[:, :1], labels)
    return labels[:, 0]


@rule("pixel_unshuffle")
def pixel_unshuffle(reading: Reading, node: fx.Node) -> Value:
    shape, factor = shape_of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    return _by_place(reading, node, lambda labels: labels.repeat_interleave(factor**2), len(shape) - 3)


@rule("channel_shuffle")
def channel_shuffle(reading: Reading, node: fx.Node) -> Value:
    groups = int(node.args[1])  # type: ignore[arg-type]

    def shuffled(labels: Tensor) -> Tensor:
        grid = labels.reshape(groups, -1)
        reading.labels.bind(grid[:1], grid)
        return grid.T.reshape(-1)

    return _by_place(reading, node, shuffled, 1)


def _by_place(reading: Reading, node: fx.Node, move: Callable[[Tensor], Tensor], dim: int) -> Value:
    """Labels along ``dim`` moved; those along the positions after it stay."""
    found = []
    for axis in reading.value(node.args[0]):
        if axis.labels.shape[dim] > 1:
            vector = reading.labels.vector((axis,), dim)
            assert vector is not None
            found.append(Axis(along(move(vector), dim, len(shape_of(node))), axis.is_zero))
        elif any(d > dim for d in axis.varying()):
            reading.labels.freeze(axis.labels, f"{op_name(node)} mixes its positions")
        else:
            found.append(axis)
    return tuple(found)


@rule("flip")
def flip(reading: Reading, node: fx.Node) -> Value:
    dims = list(node.args[1])  # type: ignore[arg-type]
    return tuple(replace(axis, labels=axis.labels.flip(dims)) for axis in reading.value(node.args[0]))


@rule("roll")
def roll(reading: Reading, node: fx.Node) -> Value:
    """Channels may not be rolled, as the distance is one of places."""
    over = {int(d) % len(shape_of(node)) for d in argument(node, "dims", [])}
    return _untouched(reading, node, over)


def _untouched(reading: Reading, node: fx.Node, over: set[int]) -> Value:
    found = []
    for axis in reading.value(node.args[0]):
        if over & set(axis.varying()) or not over:
            reading.labels.freeze(axis.labels, f"{op_name(node)} moves it by places")
        else:
            found.append(axis)
    return tuple(found)


@rule("index")
def index(reading: Reading, node: fx.Node) -> Value:
    """Rows looked up by a tensor stay; the dimensions beside them are kept, where they follow or lead."""
    chosen = list(node.args[1])  # type: ignore[arg-type]
    places = [d for d, part in enumerate(chosen) if part is not None]
    shape = shape_of(node.args[0])
    for part in chosen:
        reading.freeze(reading.value(part), "index reads it as places")
    if places != list(range(places[0], places[-1] + 1)) or any(_is_mask(part) for part in chosen):
        return unknown_value(reading, node)
    added = len(shape_of(node)) - (len(shape) - len(places))
    found = []
    value = reading.value(node.args[0])
    for place in places:
        value = _across(reading.labels, value, place, "index looks it up")
    for axis in value:
        sizes = list(axis.labels.shape)
        sizes[places[0] : places[-1] + 1] = [1] * added
        found.append(replace(axis, labels=axis.labels.reshape(sizes)))
    return tuple(found)


def _is_mask(part: Any) -> bool:
    value = part.meta.get("val") if isinstance(part, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


@rule("index_select")
def index_select(reading: Reading, node: fx.Node) -> Value:
    return _untouched(reading, node, {int(node.args[1]) % len(shape_of(node))})  # type: ignore[arg-type]


# -- made from sizes -------------------------------------------------------------------------------------------------

MADE = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")


@rule(*MADE)
def made(reading: Reading, node: fx.Node) -> Value:
    """A constant of any size: it is as large as what it is joined with."""
    is_zero = op_name(node) in ("zeros", "new_zeros") or argument(node, "fill_value", 1) == 0
    return _of_any_size(reading, node, is_zero)


def _of_any_size(reading: Reading, node: fx.Node, is_zero: bool) -> Value:
    """Labels of its own along every dimension, but for those that go with the batch."""
    sizes = [None if isinstance(size, torch.SymInt) else int(size) for size in node.meta["val"].shape]
    return tuple(
        Axis(along(reading.labels.fresh_constant(size), d, len(sizes)), is_zero)
        for d, size in enumerate(sizes)
        if size is not None and size > 1
    )


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(reading: Reading, node: fx.Node) -> Result:
    """A recurrent layer's state, inputs and outputs stay."""
    for source in node.all_input_nodes:
        reading.freeze(reading.value(source), f"{op_name(node)} keeps its state and inputs")
    return [() for _ in node.meta["val"]]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(reading: Reading, node: fx.Node) -> Result:
    """A unit's gates, which lie one after another in each weight, go with its state."""
    labels, name = reading.labels, op_name(node)
    x, before, weight, recurrent_weight, *biases = node.args
    states = list(before) if isinstance(before, (list, tuple)) else [before]
    units = labels.vector(reading.value(recurrent_weight), 1)
    gates = shape_of(weight)[0] // shape_of(recurrent_weight)[1]
    for part in (weight, recurrent_weight, *biases):
        made = labels.vector(reading.value(part), 0)
        if isinstance(part, fx.Node):
            _meet(labels, units, None if made is None else made.reshape(gates, -1), f"{name} has gates that stay")
    for source, read_labels in ((x, labels.vector(reading.value(weight), 1)), *((state, units) for state in states)):
        value, dims = reading.value(source), len(shape_of(source))
        last = tuple(axis for axis in value if axis.labels.shape[-1] > 1)
        reading.freeze(tuple(axis for axis in value if axis.labels.shape[-1] == 1), f"{name} keeps its batch")
        _meet(labels, labels.vector(last, dims - 1), read_labels, f"{name} reads channels that stay")
        _freeze_unless_zero(labels, last, -1, reading.value(weight if source is x else recurrent_weight), 1, name)
    stored = all(_is_zero(reading.value(part), 0) for part in (weight, recurrent_weight, *biases))
    is_zero = stored and all(_is_zero(reading.value(state), -1) for state in states)
    value = () if units is None else (Axis(along(units, dims - 1, dims), is_zero),)
    return [value for _ in states] if name == "lstm_cell" else value


@rule(
    "sym_size",
    "arange",
    "size",
    "_assert_tensor_metadata",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "scalar_tensor",
)
def nothing(reading: Reading, node: fx.Node) -> Value:
    """No tensor, or one of positions."""
    return ()

"""Rewrites of a traced network: batch norms folded, weights as integers, activations rounded.

Each works on the unlifted module of a program (``program.module()``), in place, and replaces tensors instead of writing
into them: the program's own weights are never changed.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate
from torch.nn import functional
from torch.utils import _pytree as pytree

from ..plan import WIDEST
from .trace import CONVOLUTIONS, TRANSPOSED, WEIGHT_ARGUMENT, WEIGHT_OPS, argument, aten
from .writes import writes

decomposed = torch.ops.quantized_decomposed
BATCH_NORMS = (aten.batch_norm.default,)
M = TypeVar("M", bound=nn.Module)
LEAST_FLOAT = -torch.finfo(torch.float32).max
LARGEST_BIAS = 2**30  # levels of an int32 bias, with room for the sum that is added to it
ZERO_CHANNEL_BIAS = 2**10  # levels of the bias of a channel of zeros
SMALLEST_PRODUCT = 1e-30  # of a weight's scale and its input's, well inside float32
# An op whose output keeps its input's grid: rounding again would change nothing.
MOVES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.contiguous.default, aten.max_pool2d.default, aten.max_pool1d.default, aten.max_pool3d.default,
    aten.dropout.default, aten.feature_dropout.default, aten.clone.default, aten.expand.default, aten.chunk.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.unflatten.int, aten.channel_shuffle.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, operator.getitem,
}  # fmt: skip
ACTIVATIONS = {
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default,
    aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.clamp_min_.default,
}  # fmt: skip
SUMS = {aten.add.Tensor, aten.add_.Tensor}
ROUNDED = {
    *WEIGHT_OPS, *ACTIVATIONS, *SUMS, aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default,
    aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.batch_norm.default, aten.pad.default,
    aten.sigmoid.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default,
    aten.hardsigmoid.default, aten.gelu.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default,
    aten.tanh.default, aten.sub.Tensor, aten.upsample_nearest2d.vec, aten.prelu.default,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """Levels and scale that stand for a weight: ``levels * scale``, the scale along ``axis``.

    Attributes:
        group_size: Of a matrix ``[c, k]`` with axis 0 and scales ``[c, m]``: elements of a row that share a scale.
    """

    levels: Tensor
    scale: Tensor
    axis: int | None
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """Unsigned grid of an activation."""

    scale: float
    zero_point: int
    bits: int


def unlift(program: ExportedProgram, tied: Sequence[Sequence[str]] = ()) -> fx.GraphModule:
    """The program as a module of its own, whose tensors may be replaced; tied weights go by their first name."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    canonical = {alias: names[0] for names in tied for alias in names}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in canonical:
            node.target = canonical[node.target]
    _real_constants(module)
    _plain_outputs(module)
    return module


def _real_constants(module: fx.GraphModule) -> None:
    """Complex constants are held as pairs of floats: no file that is written holds others."""
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, Tensor) and value.is_complex():
            stored = tensor_at(module, str(node.target))
            if stored.is_complex():
                put_tensor(module, str(node.target), torch.view_as_real(stored).contiguous())
            readers = list(node.users)
            with module.graph.inserting_after(node):
                made = module.graph.call_function(aten.view_as_complex.default, (node,))
            made.meta, node.meta = dict(node.meta), {**node.meta, "val": torch.view_as_real(value)}
            for reader in readers:
                reader.replace_input_with(node, made)
    module.recompile()


def _plain_outputs(module: fx.GraphModule) -> None:
    """Outputs in a class of the user's become a tuple: a saved program must load without that class."""
    codegen: Any = module.graph._codegen
    spec = codegen.pytree_info.out_spec
    if not _is_plain(spec):
        flat = pytree.tree_structure((None,) * spec.num_leaves)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=flat)
        module.recompile()


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.is_leaf() or (
        spec.type in (tuple, list, dict) and all(_is_plain(spec.child(i)) for i in range(spec.num_children))
    )


def operand(node: fx.Node, position: int) -> Any:
    """An argument of a call; torch types it as a union of all that an argument may be."""
    return node.args[position]


def tensor_at(module: nn.Module, target: str) -> Tensor:
    """The parameter, buffer or constant that a ``get_attr`` target names."""
    value = operator.attrgetter(target)(module)
    assert isinstance(value, Tensor)
    return value.detach()


def tensor_names(module: fx.GraphModule) -> set[str]:
    """The names that a graph reads stored tensors by."""
    return {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}


def move(module: M, device: torch.device) -> M:
    """Move a network, and to the same device what its graphs make there: a range of positions, a mask."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
            part.recompile()
    return module.to(device)


def on_device(module: M, device: torch.device) -> M:
    """The module itself on the CPU, a copy on any other device: it may share tensors with the source."""
    return module if device.type == "cpu" else move(copy.deepcopy(module), device)


def put_tensor(module: nn.Module, target: str, value: Tensor) -> None:
    """Set a tensor called ``target``: a parameter where that is one and the value has floats, else a buffer."""
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    if name in owner._parameters and value.is_floating_point():
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
        return
    if name in owner._parameters:
        del owner._parameters[name]
    if name in owner._buffers:
        owner._buffers[name] = value
    elif hasattr(owner, name):
        setattr(owner, name, value)
    else:
        owner.register_buffer(name, value)


def put_parameter(module: nn.Module, target: str, value: Tensor) -> None:
    """Add a parameter called ``target``, whose owner exists."""
    path, _, name = target.rpartition(".")
    module.get_submodule(path).register_parameter(name, nn.Parameter(value, requires_grad=False))


def bias_keys(program: ExportedProgram, tied: Sequence[Sequence[str]] = ()) -> dict[str, tuple[str, str]]:
    """The tensor that adds a constant to each output channel of a layer: its bias, or its batch norm's.

    Returns:
        The layer's node and that tensor's state-dict key by the weight's. Left out: weights and biases that are used
        more than once, and layers without such a tensor.
    """
    module = unlift(program, tied)
    after: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.target in WEIGHT_OPS:
            after[node] = argument(node, "bias", None)
    for node in module.graph.nodes:
        if node.target in BATCH_NORMS and _is_foldable(node):
            # Another one after it is folded as well, and its output is what the constant would be added to.
            is_last = all(user.target not in BATCH_NORMS for user in node.users)
            after[operand(node, 0)] = operand(node, 2) if is_last else None
    found = {}
    for layer, bias in after.items():
        weight = operand(layer, WEIGHT_ARGUMENT)
        stored = [weight, bias]
        if all(isinstance(x, fx.Node) and x.op == "get_attr" and _num_uses(x) == 1 for x in stored):
            found[str(weight.target)] = (layer.name, str(bias.target))
    return found


def fold_batch_norms(module: fx.GraphModule) -> dict[str, Tensor]:
    """Fold each batch norm into the convolution or linear layer before it.

    ``gamma (w x + b - mean) / sigma + beta = (k w) x + (b - mean) k + beta`` with ``k = gamma / sigma``.

    Returns:
        The factor ``k``, shape ``[c]``, of every folded weight by its target: the weight itself is left for the caller,
        who multiplies the float weight or, for integers, the scale. Biases are folded here.
    """
    factors: dict[str, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.target in BATCH_NORMS and _is_foldable(node):
            layer = operand(node, 0)
            weight = operand(layer, WEIGHT_ARGUMENT)
            gamma, beta, mean, variance = (_optional(module, operand(node, i)) for i in range(1, 5))
            assert mean is not None and variance is not None
            factor = 1 / torch.sqrt(variance.double() + operand(node, 7))
            if gamma is not None:
                factor = factor * gamma.double()
            old_bias = _bias(module, layer)
            bias = ((0.0 if old_bias is None else old_bias.double()) - mean.double()) * factor
            if beta is not None:
                bias = bias + beta.double()
            _set_bias(module, layer, bias.to(mean.dtype))
            before = factors.get(weight.target)  # of a batch norm that this one follows
            factors[weight.target] = factor.to(mean.dtype) if before is None else before * factor.to(mean.dtype)
            node.replace_all_uses_with(layer)
            module.graph.erase_node(node)
    return factors


def after_norms(layer: fx.Node) -> fx.Node:
    """The node whose values a layer gives once ``fold_batch_norms`` was run: the last batch norm's, or its own."""
    end = layer
    while len(end.users) == 1 and (norm := next(iter(end.users))).target in BATCH_NORMS:
        if end is layer and not _is_foldable(norm):
            break
        end = norm
    return end


def _is_foldable(node: fx.Node) -> bool:
    layer = operand(node, 0)
    if not isinstance(layer, fx.Node) or layer.target not in WEIGHT_OPS or len(layer.users) != 1:
        return False
    if operand(node, 3) is None or node.args[5]:  # no running statistics, or training mode
        return False
    if layer.target is aten.linear.default and operand(node, 0).meta["val"].dim() != 2:
        return False  # batch norm over dim 1 of [n, t, c] isn't the linear layer's output dim
    if layer.target in TRANSPOSED and argument(layer, "groups", 1) != 1:
        return False
    weight, bias = operand(layer, WEIGHT_ARGUMENT), argument(layer, "bias", None)
    stored = [weight, *(value for value in (bias, *node.args[1:5]) if value is not None)]
    return all(value.op == "get_attr" for value in stored) and _num_uses(weight) == 1


def _num_uses(weight: fx.Node) -> int:
    """Uses of a weight over all the ``get_attr`` nodes that name it."""
    return sum(len(n.users) for n in weight.graph.nodes if n.op == "get_attr" and n.target == weight.target)


def _bias(module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    return _optional(module, argument(layer, "bias", None))


def _optional(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a ``get_attr`` node gives; None for no node, and for a computed one."""
    is_stored = isinstance(node, fx.Node) and node.op == "get_attr"
    return tensor_at(module, str(node.target)) if is_stored else None


def _set_bias(module: fx.GraphModule, layer: fx.Node, value: Tensor) -> None:
    weight = operand(layer, WEIGHT_ARGUMENT)
    target = f"{weight.target.removesuffix('weight')}folded_bias"
    put_tensor(module, target, value)
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(target)
    _set_argument(layer, 2, node)


def _set_argument(layer: fx.Node, position: int, value: fx.Node) -> None:
    padded = list(layer.args) + [None] * (position + 1 - len(layer.args))
    padded[position] = value
    layer.args = tuple(padded)


def set_weight(module: fx.GraphModule, target: str, value: Tensor | IntegerWeight) -> None:
    """Replace the weight at ``target``, by floats or by integers behind a dequantization."""
    if isinstance(value, Tensor):
        put_tensor(module, target, value)
        return
    axis = 0 if value.axis is None else value.axis
    if value.group_size is not None:
        # A row for each group. Their scales keep their signs: no kernel multiplies with these integers.
        levels = functional.pad(value.levels, (0, -value.levels.shape[1] % value.group_size))
        levels, scale = levels.reshape(-1, value.group_size), value.scale.flatten()
    else:
        scale = value.scale.expand(value.levels.shape[axis]) if value.axis is None else value.scale
        # Runtimes want positive scales; a negative one moves its sign into the levels.
        sign = torch.where(scale < 0, -1, 1).to(torch.int8)
        levels = value.levels * sign.reshape([-1 if d == axis else 1 for d in range(value.levels.dim())])
        scale = scale.abs()
    names = [f"{target}_{part}" for part in ("levels", "scale", "zero_point")]
    values = (levels.contiguous(), scale.contiguous(), torch.zeros(len(scale), dtype=torch.int64))
    for name, tensor in zip(names, values, strict=True):
        put_tensor(module, name, tensor)
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target == target]:
        with module.graph.inserting_before(node):
            parts = [module.graph.get_attr(name) for name in names]
            integer = module.graph.call_function(
                decomposed.dequantize_per_channel.default, (*parts, axis, -128, 127, torch.int8)
            )
            if value.group_size is not None:
                count, length = value.levels.shape
                integer = module.graph.call_function(aten.view.default, (integer, [count, -1]))
                if length % value.group_size:
                    integer = module.graph.call_function(aten.slice.Tensor, (integer, 1, 0, length))
            integer.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(integer)
        module.graph.erase_node(node)


def activation_points(module: fx.GraphModule) -> list[fx.Node]:
    """Tensors that are rounded in a network with integer activations: inputs, and the outputs of compute ops.

    A layer followed by an activation function alone is rounded after it, as runtimes fuse the two; the network's output
    stays float. What a layer reads is rounded whichever op it comes from.
    """
    points = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if all(reaches_output(user) for user in node.users):
            continue
        if node.op == "placeholder" or (
            node.op == "call_function"
            and node.target not in MOVES
            and (node.target in ROUNDED or feeds_layer(node))
            and not _is_fused(node)
        ):
            points.append(node)
    return points


def _is_fused(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].target in ACTIVATIONS and node.target not in ACTIVATIONS


def split_reads(module: fx.GraphModule) -> fx.GraphModule:
    """A node of its own for what layers read of a value that other ops read as well, called ``<value>_read``, in place.

    It may have a narrower grid than the value: a stream that blocks add to keeps its bits beside the layers that read
    it, as rounding the stream would add up over the blocks. To be called before batch norms are folded: a name is then
    that of the dense network's node.
    """
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        reading = [user for user in node.users if _is_layers_own(user, node)]
        if not reading or all(user in reading or reaches_output(user) for user in node.users):
            continue
        with module.graph.inserting_after(node):
            read = module.graph.create_node("call_function", aten.alias.default, (node,), name=f"{node.name}_read")
        read.meta["val"] = value
        for user in reading:
            user.replace_input_with(node, read)
    module.recompile()
    return module


def _is_layers_own(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user is a layer that reads the node as its input, or moves it to such layers alone."""
    if user.target in WEIGHT_OPS:
        return user.args[0] is node
    return user.target in MOVES and bool(user.users) and all(_is_layers_own(after, user) for after in user.users)


def join_reads(module: fx.GraphModule) -> None:
    """Undo ``split_reads``, once values are rounded."""
    for node in list(module.graph.nodes):
        if is_read(node):
            node.replace_all_uses_with(operand(node, 0))
            module.graph.erase_node(node)


def is_read(node: fx.Node) -> bool:
    """Whether a node stands for what layers read of another's value."""
    return node.target is aten.alias.default


def feeds_layer(node: fx.Node) -> bool:
    """Whether a layer reads the node's values as its input."""
    return any(
        (user.target in WEIGHT_OPS and user.args[0] is node) or (user.target in MOVES and feeds_layer(user))
        for user in node.users
    )


def is_addend(node: fx.Node) -> bool:
    """Whether a node is the output of a convolution that sums alone read."""
    return node.target in CONVOLUTIONS and all(user.target in SUMS for user in node.users)


def reaches_output(node: fx.Node) -> bool:
    """Whether a node is the output, or only moves what becomes part of it."""
    return node.op == "output" or (node.target in MOVES and any(reaches_output(user) for user in node.users))


def points_for(module: fx.GraphModule, integer: Collection[str]) -> list[fx.Node]:
    """The activation points to round where only the layers with the weights in ``integer`` have integers.

    An integer kernel needs its input and its output rounded: a point that layers read or write is kept where one of
    them is an integer layer. One between other ops, as in a shortcut, is kept where every point that it feeds is, or,
    feeding none, where all layers are integers.

    Args:
        module: As ``activation_points`` takes it: float weights, batch norms folded.
        integer: State-dict keys. A layer whose weight is computed is never one of them.
    """
    points = activation_points(module)
    layers = [node for node in module.graph.nodes if node.target in WEIGHT_OPS]
    is_whole = all(_has_weight(layer, integer) for layer in layers)
    known, kept = set(points), set[fx.Node]()
    for node in reversed(points):  # what a point feeds comes after it
        around = _layers_at(node)
        fed = _fed_points(node, known)
        if any(_has_weight(layer, integer) for layer in around) or (not around and (fed <= kept if fed else is_whole)):
            kept.add(node)
    return [node for node in points if node in kept]


def _has_weight(layer: fx.Node, integer: Collection[str]) -> bool:
    weight = operand(layer, WEIGHT_ARGUMENT)
    return weight.op == "get_attr" and weight.target in integer


def _layers_at(node: fx.Node) -> list[fx.Node]:
    """Layers that read a point's values as their input, and the one whose output it is."""
    writer = node
    if node.target in ACTIVATIONS and _is_fused(operand(node, 0)):
        writer = operand(node, 0)
    return [*_readers(node), *([writer] if writer.target in WEIGHT_OPS else [])]


def layer_reads(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Every layer with the node whose values it reads: what comes before moves of data."""
    return [(node, _through_moves(operand(node, 0))) for node in module.graph.nodes if node.target in WEIGHT_OPS]


def _readers(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        if user.target in WEIGHT_OPS and operand(user, 0) is node:
            found.append(user)
        elif user.target in MOVES or is_read(user):
            found += _readers(user)
    return found


def _fed_points(node: fx.Node, points: set[fx.Node]) -> set[fx.Node]:
    """The next points on every way from a node to the outputs."""
    found, seen, ahead = set(), set(), list(node.users)
    while ahead:
        user = ahead.pop()
        if user in points:
            found.add(user)
        elif user not in seen:
            seen.add(user)
            ahead += user.users
    return found


def quantize_activations(module: fx.GraphModule, grids: Mapping[str, Grid]) -> None:
    """Round the activations named in ``grids``; the biases of integer layers fed by them become int32.

    Layers with float weights keep them in ONNX Runtime, even between two rounded activations.
    """
    by_node = {}
    for node in list(module.graph.nodes):
        if node.name in grids:
            by_node[_round(module, node, grids[node.name])] = grids[node.name]
    # Runtimes see no grid through an op with several outputs: each output says it again, which changes no value.
    for node in list(module.graph.nodes):
        if node.target is operator.getitem and isinstance(node.meta.get("val"), Tensor) and node.name not in grids:
            grid = by_node.get(_through_moves(node))
            if grid is not None:
                by_node[_round(module, node, grid)] = grid
    join_reads(module)
    layers = [(node, by_node.get(_through_moves(operand(node, 0)))) for node in _integer_layers(module)]
    fed = [(node, grid) for node, grid in layers if grid is not None]
    _fit_scales(module, fed)
    for node, grid in fed:
        _integer_bias(module, node, grid)
    _keep_floats(module)


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether an operator of the graph writes into its input, so that values that were kept would change."""
    return any(writes(node) for node in graph.nodes)


def rounded_to(value: Tensor, grid: Grid) -> Tensor:
    """An activation's values on its grid."""
    return torch.fake_quantize_per_tensor_affine(value, grid.scale, grid.zero_point, 0, 2**grid.bits - 1)


def _round(module: fx.GraphModule, node: fx.Node, grid: Grid) -> fx.Node:
    """Round what all users but the output read of ``node``."""
    arguments = (grid.scale, grid.zero_point, 0, 2**WIDEST - 1, torch.uint8)
    users = [user for user in node.users if not reaches_output(user)]
    steps: list[tuple[Any, tuple[Any, ...]]] = [(decomposed.quantize_per_tensor.default, arguments)]
    if grid.bits < WIDEST:  # integers are clamped, not floats: kernels that end in QuantizeLinear still do
        steps.append((aten.clamp.default, (0, 2**grid.bits - 1)))
    steps.append((decomposed.dequantize_per_tensor.default, arguments))
    back = node
    for target, others in steps:
        with module.graph.inserting_after(back):
            back = module.graph.call_function(target, (back, *others))
        back.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, back)
    return back


def _keep_floats(module: fx.GraphModule) -> None:
    """A clamp at the least float before each float layer between two rounded activations.

    ONNX Runtime rounds the weights of such a layer itself when it loads the file (WeightBiasQuantization), to 8 bits
    with one scale for all channels, unless another op stands between DequantizeLinear and the layer.
    """
    for node in list(module.graph.nodes):
        if node.target not in WEIGHT_OPS or _is_integer(node):
            continue
        value = operand(node, 0)
        output = next(iter(node.users)) if _is_fused(node) else node
        is_fed = _through_moves(value).target is decomposed.dequantize_per_tensor.default
        if is_fed and any(user.target is decomposed.quantize_per_tensor.default for user in output.users):
            with module.graph.inserting_before(node):
                same = module.graph.call_function(aten.clamp.default, (value, LEAST_FLOAT))
            same.meta["val"] = value.meta.get("val")
            node.replace_input_with(value, same)


def _through_moves(node: fx.Node) -> fx.Node:
    while node.target in MOVES:
        node = operand(node, 0)
    return node


def _is_integer(layer: fx.Node) -> bool:
    """Whether the layer's weight is integers behind a dequantization."""
    return operand(layer, WEIGHT_ARGUMENT).target is decomposed.dequantize_per_channel.default


def _integer_layers(module: fx.GraphModule) -> list[fx.Node]:
    """Layers with a bias and an integer weight whose scales are those of its output channels."""
    return [
        node
        for node in module.graph.nodes
        if node.target in WEIGHT_OPS
        and _is_integer(node)
        and _bias(module, node) is not None
        and (node.target not in TRANSPOSED or argument(node, "groups", 1) == 1)
    ]


def _fit_scales(module: fx.GraphModule, fed: Sequence[tuple[fx.Node, Grid]]) -> None:
    """Scales at which every bias fits int32: wider where it would overflow, finer where a channel is all zeros.

    A bias that would overflow is 2**30 steps of a weight or more: what the weights lose as their levels are rounded
    again is beyond float32 beside it. Leaving the bias float is no way out, as runtimes round it themselves, unchecked.
    A channel of zeros has any scale; one made for its bias keeps the bias exact, in levels of few bits.
    """
    needed: dict[str, Tensor] = {}
    weights = {}
    for layer, grid in fed:
        weight = operand(layer, WEIGHT_ARGUMENT)
        target = operand(weight, 0).target
        least = (_float_bias(module, layer).abs() / LARGEST_BIAS).clamp(min=SMALLEST_PRODUCT) / grid.scale
        needed[target] = torch.maximum(needed[target], least) if target in needed else least
        weights[target] = weight
    for target, weight in weights.items():
        scale_target, axis = operand(weight, 1).target, operand(weight, 3)
        levels, scale = tensor_at(module, target), tensor_at(module, scale_target).double()
        is_zero = levels.movedim(axis, 0).flatten(1).count_nonzero(1) == 0
        own = needed[target] * (LARGEST_BIAS // ZERO_CHANNEL_BIAS)
        fitted = torch.where(is_zero, own, torch.maximum(scale, needed[target]))
        ratio = (scale / fitted).reshape([-1 if d == axis else 1 for d in range(levels.dim())])
        put_tensor(module, target, torch.round(levels * ratio).to(torch.int8))
        put_tensor(module, scale_target, fitted.float())


def _float_bias(module: fx.GraphModule, layer: fx.Node) -> Tensor:
    bias = _bias(module, layer)
    assert bias is not None
    return bias.double()


def _integer_bias(module: fx.GraphModule, layer: fx.Node, grid: Grid) -> None:
    """An int32 bias at scale ``input scale * weight scale``."""
    if layer.target in TRANSPOSED:
        return
    # The product of what a file has, two float32 values, so that a runtime can compute it as well.
    step = torch.tensor(grid.scale, dtype=torch.float32).double()
    scale = tensor_at(module, operand(operand(layer, WEIGHT_ARGUMENT), 1).target).double() * step
    levels = torch.round(_float_bias(module, layer) / scale).to(torch.int32)
    prefix = f"{layer.name}_bias"
    names = [f"{prefix}_{part}" for part in ("levels", "scale", "zero_point")]
    values = (levels, scale.float(), torch.zeros(len(scale), dtype=torch.int64))
    for name, tensor in zip(names, values, strict=True):
        put_tensor(module, name, tensor)
    with module.graph.inserting_before(layer):
        parts = [module.graph.get_attr(name) for name in names]
        integer = module.graph.call_function(
            decomposed.dequantize_per_channel.default, (*parts, 0, -(2**31), 2**31 - 1, torch.int32)
        )
    _set_argument(layer, 2, integer)


def to_aten(module: fx.GraphModule) -> None:
    """Say the same with ATen ops alone, so that a saved program loads without importing anything."""
    for node in list(module.graph.nodes):
        if node.target is decomposed.dequantize_per_tensor.default:
            rounded = operand(node, 0)
            top = None
            if rounded.target is aten.clamp.default:
                rounded, top = operand(rounded, 0), operand(rounded, 2)
            scale, zero_point, low, high = (operand(rounded, i) for i in range(1, 5))
            high = high if top is None else top
            steps = (
                (aten.mul.Tensor, 1.0 / scale),  # not div: the operator multiplies too, and ties must go the same way
                (aten.round.default,),
                (aten.add.Tensor, zero_point),
                (aten.clamp.default, low, high),
                (aten.sub.Tensor, zero_point),
                (aten.mul.Tensor, scale),
            )
            value = operand(rounded, 0)
            with module.graph.inserting_before(node):
                for target, *arguments in steps:
                    value = module.graph.call_function(target, (value, *arguments))
            node.replace_all_uses_with(value)
        elif node.target is decomposed.dequantize_per_channel.default:
            levels, scale, _, axis = (operand(node, i) for i in range(4))
            dims = tensor_at(module, levels.target).dim()
            shape = [-1 if d == axis else 1 for d in range(dims)]
            with module.graph.inserting_before(node):
                floats = module.graph.call_function(aten.to.dtype, (levels, torch.float32))
                wide = module.graph.call_function(aten.view.default, (scale, shape))
                product = module.graph.call_function(aten.mul.Tensor, (floats, wide))
            node.replace_all_uses_with(product)
    finish(module)


def finish(module: fx.GraphModule) -> fx.GraphModule:
    """Drop what nothing uses, nodes and tensors, and recompile."""
    module.graph.eliminate_dead_code()
    used = tensor_names(module)
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)
    module.graph.lint()
    module.recompile()
    return module


def convolutional(program: ExportedProgram) -> bool:
    """Whether the network has a convolution: its activations are 8 bits by default."""
    return any(node.target in CONVOLUTIONS for node in program.graph.nodes)

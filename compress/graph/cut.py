"""Channels cut out of a network: its tensors sliced, the sizes in its graph made to fit.

``cut`` gives a smaller network that computes what the whole one computes with the same channels at zero, ``masked``.
``worst_difference`` compares the two in float64 on a copy whose parameters and buffers are all random: gains that start
at zero and statistics that were never taken would hide a wrong cut.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import UsageError
from .channel_rules import MADE, hint, op_name, reduced_dims, shape_of, slice_bounds, split_sizes
from .groups import Channels, places_kept
from .rewrite import MOVES, put_tensor, tensor_at
from .trace import Graph, argument, aten

Keep = Mapping[str, Sequence[int]]


def kept_channels(channels: Channels, keep: Keep) -> Tensor:
    """bool over all channels, those of ``keep``'s groups and of the groups that it doesn't name.

    Raises:
        UsageError: A group or a channel that isn't there, or a tensor would lose all along a dimension.
    """
    known = {group.name for group in channels.groups}
    for name in keep:
        if name not in known:
            raise UsageError(f"the network has no channel group {name!r}", hint="hcompress inspect lists the groups")
    parts = []
    for group in channels.groups:
        chosen = torch.ones(group.size, dtype=torch.bool)
        if group.name in keep:
            indices = torch.tensor(list(keep[group.name]), dtype=torch.int64)
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < group.size:
                raise UsageError(
                    f"group {group.name} has channels 0 to {group.size - 1}, not {list(keep[group.name])}",
                    hint="the plan is for another architecture",
                )
            chosen = torch.zeros(group.size, dtype=torch.bool)
            chosen[indices] = True
        parts.append(chosen)
    kept = torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool)
    for target, vectors in channels.weights.items():
        for dim, labels in enumerate(vectors):
            if labels is not None and not stays(channels, kept, labels).any():
                raise UsageError(f"{target} would keep nothing along dimension {dim}", hint="keep one channel at least")
    return kept


def stays(channels: Channels, kept: Tensor, labels: Tensor) -> Tensor:
    """bool of the labels' shape: whether each place stays."""
    return places_kept(kept, channels.channel_of[labels])


def graph_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with tensors of its own. What torch warns itself of while it copies is of no use to anyone else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module)


def masked(channels: Channels, module: fx.GraphModule, kept: Tensor) -> fx.GraphModule:
    """The whole network with every parameter and buffer of the cut channels at zero."""
    whole = graph_copy(module)
    for target, vectors in channels.weights.items():
        tensor = tensor_at(whole, target).clone()
        for dim, labels in enumerate(vectors):
            if labels is not None and (target, dim) not in channels.directions:
                gone = ~stays(channels, kept, labels)
                tensor[(slice(None),) * dim + (gone,)] = 0
        put_tensor(whole, target, tensor)
    return whole


def cut(channels: Channels, module: fx.GraphModule, kept: Tensor) -> fx.GraphModule:
    """The network without the channels that aren't kept.

    Args:
        module: ``channels.module`` or a copy of it, whose nodes have the same names; not changed.
        kept: bool over all channels, as ``kept_channels`` gives it.
    """
    small = graph_copy(module)
    for target in channels.weights:
        put_tensor(small, target, sliced_tensor(channels, kept, target, tensor_at(small, target)))
    originals = {node.name: node for node in channels.module.graph.nodes}
    for node in reversed(small.graph.nodes):  # what no output needs has no labels
        if originals[node.name] not in channels.values and not node.users:
            small.graph.erase_node(node)
    for node in list(small.graph.nodes):
        original = originals[node.name]
        if node.op == "call_function" and original in channels.values:
            _fit(_Cut(channels, kept), small, node, original)
    small.graph.lint()
    small.recompile()
    return small


def sliced_tensor(channels: Channels, kept: Tensor, target: str, tensor: Tensor) -> Tensor:
    """What is left of the tensor called ``target``."""
    for dim, labels in enumerate(channels.weights.get(target, ())):
        if labels is not None:
            left = stays(channels, kept, labels)
            if not left.all():  # dimensions of pairs aren't there in a complex tensor
                tensor = tensor.index_select(dim, left.nonzero().reshape(-1))
    return tensor.clone(memory_format=torch.contiguous_format)


class _Cut:
    """What is left of each tensor."""

    def __init__(self, channels: Channels, kept: Tensor) -> None:
        self.channels, self.kept = channels, kept

    def along(self, node: fx.Node, dim: int, part: int | None = None) -> Tensor | None:
        """bool ``[n]`` along a dimension of a node's output; None where all of it stays."""
        result = self.channels.values.get(node, ())
        value = result if isinstance(result, tuple) else result[part or 0]
        size = shape_of(node)[dim] if part is None else hint(node.meta["val"][part].shape[dim])
        whole = torch.ones(size, dtype=torch.bool)
        for axis in value:
            if axis.labels.shape[dim] > 1:
                left = stays(self.channels, self.kept, axis.labels)
                whole &= left.movedim(dim, 0).reshape(size, -1).any(1)
        return None if bool(whole.all()) else whole


def _fit(cut_: _Cut, module: fx.GraphModule, node: fx.Node, original: fx.Node) -> None:
    """Make a node's integer arguments fit what is left."""
    name = op_name(node)
    if name in ("view", "reshape", "_unsafe_view", "expand", "repeat_to", "broadcast_to"):
        _fit_sizes(cut_, module, node, original, 1, list(range(len(shape_of(original)))))
    elif name in MADE:
        position = 1 if name.startswith("new_") else 0
        _fit_sizes(cut_, module, node, original, position, list(range(len(shape_of(original)))))
    elif name in ("repeat", "tile"):
        _fit_repeats(cut_, node, original)
    elif name == "unflatten":
        dim = int(node.args[1]) % len(shape_of(original.args[0]))  # type: ignore[arg-type]
        _fit_sizes(cut_, module, node, original, 2, list(range(dim, dim + len(node.args[2]))))  # type: ignore[arg-type]
    elif name == "slice":
        _fit_slice(cut_, module, node, original)
    elif name == "narrow":
        dim = int(node.args[1]) % len(shape_of(original))  # type: ignore[arg-type]
        left = cut_.along(original.args[0], dim)  # type: ignore[arg-type]
        if left is not None:
            start, length = int(node.args[2]), int(node.args[3])  # type: ignore[arg-type]
            ends = int(left[:start].sum()), int(left[start : start + length].sum())
            node.args = (node.args[0], dim, *ends)
    elif name in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"):
        dim, sizes = split_sizes(original)
        if cut_.along(original.args[0], dim) is not None:  # type: ignore[arg-type]
            lefts = [cut_.along(original, dim, part) for part in range(len(sizes))]
            counts = [size if left is None else int(left.sum()) for size, left in zip(sizes, lefts, strict=True)]
            node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], counts, dim), {}
    elif name in ("constant_pad_nd", "pad"):
        _fit_pad(cut_, node, original)
    elif name.startswith("conv"):
        _fit_groups(cut_, node, original)
    elif name == "mean":
        _fit_mean(cut_, module, node, original)
    elif name == "group_norm":
        left = cut_.along(original, 1)
        if left is not None:
            groups = int(node.args[1])  # type: ignore[arg-type]
            node.args = (node.args[0], int(left.reshape(groups, -1).any(1).sum()), *node.args[2:])
    elif name == "scaled_dot_product_attention" and argument(node, "scale", None) is None:
        node.kwargs = {**node.kwargs, "scale": shape_of(original.args[0])[-1] ** -0.5}


def _fit_sizes(
    cut_: _Cut, module: fx.GraphModule, node: fx.Node, original: fx.Node, position: int, dims: Sequence[int]
) -> None:
    sizes = list(node.args[position])  # type: ignore[arg-type]
    for place, dim in enumerate(dims):
        left = cut_.along(original, dim)
        if left is None or (isinstance(sizes[place], int) and sizes[place] == -1):
            continue
        if isinstance(sizes[place], fx.Node):
            with module.graph.inserting_before(node):
                scaled = module.graph.call_function(operator.mul, (sizes[place], int(left.sum())))
                sizes[place] = module.graph.call_function(operator.floordiv, (scaled, len(left)))
        else:
            sizes[place] = int(left.sum())
    node.args = (*node.args[:position], sizes, *node.args[position + 1 :])


def _fit_repeats(cut_: _Cut, node: fx.Node, original: fx.Node) -> None:
    """Copies of one place; of more, the places themselves are what goes."""
    times: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    dims, lengths = len(shape_of(original)), shape_of(original.args[0])
    times = [1] * (dims - len(times)) + times
    lengths = (1,) * (dims - len(lengths)) + lengths
    for dim in range(dims):
        left = cut_.along(original, dim) if lengths[dim] == 1 else None
        if left is not None:
            times[dim] = int(left.sum())
    node.args = (node.args[0], times, *node.args[2:])


def _fit_slice(cut_: _Cut, module: fx.GraphModule, node: fx.Node, original: fx.Node) -> None:
    dim, start, length, step = slice_bounds(original)
    left = cut_.along(original.args[0], dim)  # type: ignore[arg-type]
    if left is None:
        return
    if step == 1:
        first = int(left[:start].sum())
        node.args, node.kwargs = (node.args[0], dim, first, first + int(left[start : start + length].sum())), {}
        return
    place = left.cumsum(0) - 1
    chosen = [p for p in range(start, start + length, step) if left[p]]
    name = f"{node.name}_places"
    module.register_buffer(name, place[torch.tensor(chosen)])
    with module.graph.inserting_before(node):
        places = module.graph.get_attr(name)
    node.target, node.args, node.kwargs = aten.index_select.default, (node.args[0], dim, places), {}


def _fit_pad(cut_: _Cut, node: fx.Node, original: fx.Node) -> None:
    amounts: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    dims = len(shape_of(original))
    for i in range(0, len(amounts), 2):
        dim = dims - 1 - i // 2
        left = cut_.along(original, dim)
        if left is not None and (amounts[i] or amounts[i + 1]):
            high = len(left) - amounts[i + 1]
            amounts[i : i + 2] = [int(left[: amounts[i]].sum()), int(left[high:].sum())]
    node.args = (node.args[0], amounts, *node.args[2:])


def _fit_groups(cut_: _Cut, node: fx.Node, original: fx.Node) -> None:
    """Whole groups that are gone lower their number; places within groups don't."""
    groups = argument(node, "groups", 1)
    if groups == 1 or not isinstance(groups, int):
        return
    channel = 1 if len(shape_of(original)) == len(shape_of(original.args[1])) else 0
    left = cut_.along(original, channel)
    if left is None:
        return
    count = int(left.reshape(groups, -1).any(1).sum())
    position = next(i for i, p in enumerate(node.target._schema.arguments) if p.name == "groups")  # type: ignore[union-attr]
    arguments = [argument(node, p.name, p.default_value) for p in node.target._schema.arguments]  # type: ignore[union-attr]
    arguments[position] = count
    node.args, node.kwargs = tuple(arguments), {}


def _fit_mean(cut_: _Cut, module: fx.GraphModule, node: fx.Node, original: fx.Node) -> None:
    """What is gone counts as zeros, so that the divisor is as large as before."""
    source = original.args[0]
    assert isinstance(source, fx.Node)
    lefts = [left for dim in reduced_dims(original) if (left := cut_.along(source, dim)) is not None]
    if lefts:
        readers = list(node.users)
        with module.graph.inserting_after(node):
            share = math.prod(float(left.double().mean()) for left in lefts)
            scaled = module.graph.call_function(aten.mul.Tensor, (node, share))
        scaled.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, scaled)


def randomised(module: fx.GraphModule, *, seed: int) -> fx.GraphModule:
    """A float64 copy with random parameters and buffers; statistics of variance stay positive."""
    generator = torch.Generator().manual_seed(seed)
    made = graph_copy(module).double()
    for node in made.graph.nodes:
        if node.op == "get_attr":
            try:
                tensor = tensor_at(made, str(node.target))
            except AssertionError:
                continue
            if tensor.is_floating_point():
                spread = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
                value = spread / fan_in**0.5 if tensor.dim() > 1 else 0.5 + 0.5 * spread.abs()
                put_tensor(made, str(node.target), value)
    for part in made.modules():  # a block with a context of its own, such as autocast, is a graph in the graph
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _doubled)
            part.recompile()
    return made


def _doubled(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def worst_difference(channels: Channels, kept: Tensor, inputs: Sequence[Tensor], *, seed: int = 0) -> float:
    """The largest difference between a cut network and the masked one, in units of the largest output.

    Both have the same random tensors, in float64.
    """
    module = randomised(channels.module, seed=seed)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad(), float64_by_default():
        with seeded(seed):
            whole = tensor_leaves(masked(channels, module, kept)(*wide))
        with seeded(seed):
            small = tensor_leaves(cut(channels, module, kept)(*wide))
    worst = 0.0
    for a, b in zip(whole, small, strict=True):
        if a.shape != b.shape or not torch.isfinite(a).all():
            return float("inf")
        if a.is_floating_point() and a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)))
    return worst


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Networks that draw random numbers draw the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def float64_by_default() -> Iterator[None]:
    """What a graph makes without saying of which dtype is float64, as its tensors are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensor_leaves(outputs: Any) -> list[Tensor]:
    """The tensors among a network's outputs, however they are nested."""
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]


def probe_inputs(graph: Graph, *, seed: int) -> tuple[Tensor, ...]:
    """The traced examples with one more, floats in float64 and moved a little; random rows for what an embedding reads.

    Equal tokens would make all queries alike, and hide heads that are split in the wrong places.
    """
    generator = torch.Generator().manual_seed(seed)
    placeholders = {node.name: node for node in graph.program.graph.nodes if node.op == "placeholder"}
    made = []
    for x, name in zip(graph.example_inputs, graph.program.graph_signature.user_inputs, strict=True):
        more = torch.cat([x, x[:1]]).cpu()
        if more.is_floating_point():
            noise = torch.rand(more.shape, generator=generator, dtype=torch.float64)
            made.append(more.double() * (0.9 + 0.2 * noise) if more.any() else noise)
            continue
        rows = [shape_of(reader.args[0])[0] for reader in _embedding_readers(placeholders[str(name)])]
        made.append(torch.randint(min(rows), more.shape, generator=generator).to(more.dtype) if rows else more)
    return tuple(made)


def _embedding_readers(node: fx.Node) -> list[fx.Node]:
    """Those that read a node's values as their rows."""
    found = []
    for user in node.users:
        if user.target is aten.embedding.default and user.args[1] is node:
            found.append(user)
        elif user.target in MOVES or op_name(user) == "to":
            found += _embedding_readers(user)
    return found

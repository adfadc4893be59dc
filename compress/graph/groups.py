"""Channel groups: what can be cut out of a network, and everything that goes with it.

The graph is read once, in the order of execution, with a label for each channel (``labels``, ``channel_rules``). Labels
that are bound make one *channel*; channels that touch the same dimensions of the same parameters make a *group*, whose
channels are alternatives to each other. Source: the dependency graphs of Fang et al. 2023, DepGraph (arXiv:2301.12900),
and the minimally removable structures of Chen et al. 2023, OTO (arXiv:2312.09411), here found by labels.
Cost: seconds, on the processor, without running the network.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .channel_rules import KERNEL, Reading, Result, op_name, read, shape_of, unzeroed
from .labels import Axis, Labels, Value, along
from .rewrite import tensor_at, unlift
from .trace import WEIGHT_ARGUMENT, Graph, aten

OUTPUT = "the network's output"
Signature = tuple[tuple[int, int], ...]  # dimensions, and the places of each
Run = tuple[Tensor, Tensor, Tensor]  # roots along a dimension, where the places of each start, and the places


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension of a tensor that the channels of a group lie along.

    Attributes:
        tensor: State-dict key of a parameter or buffer.
        indices: int64 ``[c, k]``: the ``k`` places of each of the ``c`` channels.
    """

    tensor: str
    dim: int
    indices: Tensor


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that can be cut out one by one.

    Attributes:
        name: The first layer that makes them: the state-dict key of its weight, with a number where it makes several
            groups.
        size: Number of channels.
        members: In the order of execution.
    """

    name: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class FrozenChannels:
    """Channels that stay, and why.

    Attributes:
        tensor: State-dict key of the tensor that holds them.
        count: Number of places along ``dim``.
        node: The op that needs them.
        source: Where the op stands in the user's code; empty where torch doesn't say.
    """

    tensor: str
    dim: int
    count: int
    reason: str
    node: str
    source: str


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels of a network.

    Attributes:
        module: The unlifted graph that they were read from.
        groups: In the order of execution.
        frozen: By tensor and dimension.
        channel_of: For every label its channel's number in ``sizes`` order, -1 where frozen.
        values: Labels of each node's output.
        weights: Labels along each dimension of each tensor.
        directions: Tensor and dimension of what is divided by its norm, and is cut but never zeroed.
    """

    module: fx.GraphModule
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenChannels, ...]
    channel_of: Tensor
    values: Mapping[fx.Node, Result]
    weights: Mapping[str, list[Tensor | None]]
    directions: frozenset[tuple[str, int]]

    @property
    def count(self) -> int:
        """Number of channels ``c`` of all groups together."""
        return sum(group.size for group in self.groups)

    def split(self, values: Tensor) -> list[tuple[ChannelGroup, Tensor]]:
        """Values of all channels, ``[c]``, by group; the parts are views."""
        parts = torch.split(values, [group.size for group in self.groups]) if self.groups else ()
        return list(zip(self.groups, parts, strict=True))

    def along(self, node: fx.Node, dim: int) -> Tensor | None:
        """The channel of each place along a dimension of a node's value, -1 where it stays; None where all do."""
        found = self.values.get(node, ())
        for axis in found if isinstance(found, tuple) else ():
            if axis.labels.shape[dim] > 1:
                moved = self.channel_of[axis.labels].movedim(dim, 0).reshape(axis.labels.shape[dim], -1)
                if bool((moved >= 0).any()):
                    return moved.amax(1)
        return None


def places_kept(kept: Tensor, channel: Tensor) -> Tensor:
    """Whether each place stays, bool of ``channel``'s shape.

    Args:
        kept: bool over all channels.
        channel: Of each place, -1 where it always stays.
    """
    return torch.cat([kept, kept.new_ones(1)])[channel]  # -1 is the last


def channel_dim(node: fx.Node) -> int:
    """The dimension of a layer's input and output that its weight sums over and makes."""
    dims = len(shape_of(node))
    if node.target is aten.linear.default:
        return dims - 1
    return 1 if dims == len(shape_of(node.args[WEIGHT_ARGUMENT])) else 0


def find_channels(graph: Graph) -> Channels:
    """Read the channels of a traced network."""
    module = unlift(graph.program, graph.tied)
    reading = Reading(Labels(), {}, {}, [], set())
    sources: dict[str, str] = {}
    living = _living(module)
    for node in module.graph.nodes:
        if node in living:
            reading.labels.where = node.name
            sources[node.name] = source_line(node)
            reading.values[node] = _read(reading, module, node)
    roots, frozen = _settle(reading)
    return _grouped(reading, module, roots, frozen, sources)


def _living(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that the outputs depend on. One that writes into a tensor is taken to reach them."""
    living: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op in ("output", "placeholder") or _writes(node) or any(user in living for user in node.users):
            living.add(node)
    return living


def _read(reading: Reading, module: fx.GraphModule, node: fx.Node) -> Result:
    if node.op == "get_attr":
        return _stored(reading, module, str(node.target))
    if node.op == "output":
        for source in node.all_input_nodes:
            reading.freeze(reading.value(source), OUTPUT)
        return ()
    if node.op != "call_function":
        return ()
    found = read(reading, node)
    if _writes(node) and isinstance(found, tuple):
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if not found or not all(axis.is_zero for axis in found):
            _unzero(reading, target)
        reading.values[target] = found
    return found


def _aliases(node: fx.Node) -> Any:
    """What the schema says of a call's first argument: it is None where the result is a tensor of its own."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.arguments:
        return node.target._schema.arguments[0].alias_info
    return None


def _writes(node: fx.Node) -> bool:
    """Whether a call changes its first argument."""
    return getattr(_aliases(node), "is_write", False)


def _unzero(reading: Reading, node: fx.Node) -> None:
    """What shares its memory with a tensor that was written to may not be zero any more."""

    def shares(view: fx.Node) -> bool:
        is_item = view.target is operator.getitem or "dropout" in op_name(view)
        return view.op == "call_function" and (is_item or _aliases(view) is not None)

    while shares(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    waiting = [node]
    while waiting:
        node = waiting.pop()
        result = reading.values.get(node)
        if result is not None:
            parts = [result] if isinstance(result, tuple) else result
            changed = [unzeroed(value) for value in parts]
            reading.values[node] = changed[0] if isinstance(result, tuple) else changed
            waiting += [user for user in node.users if shares(user) and user.args[0] is node]


def _stored(reading: Reading, module: fx.GraphModule, target: str) -> Value:
    """A parameter, buffer or constant: labels along each of its dimensions."""
    tensor = getattr_path(module, target)
    if tensor is None:
        return ()
    if target not in reading.weights:
        floating = tensor.is_floating_point()
        reading.weights[target] = [
            reading.labels.fresh(size) if size > 1 and floating else None for size in tensor.shape
        ]
    vectors = reading.weights[target]
    return tuple(Axis(along(labels, d, tensor.dim()), True) for d, labels in enumerate(vectors) if labels is not None)


def getattr_path(module: fx.GraphModule, target: str) -> Tensor | None:
    """The tensor at a ``get_attr`` target; None for a submodule."""
    try:
        return tensor_at(module, target)
    except AssertionError:
        return None


def source_line(node: fx.Node) -> str:
    """``net.py:12`` of the innermost line outside of torch that made a node."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ") and "/torch/" not in line]
    if not lines:
        return ""
    path, _, rest = lines[-1].removeprefix('File "').partition('", line ')
    return f"{path.rpartition('/')[2]}:{rest.split(',')[0]}"


def _settle(reading: Reading) -> tuple[Tensor, Tensor]:
    """Bind until every cut leaves blocks.

    Channels must lie along one dimension of each activation: where they vary on two, as heads and their width do, they
    are bound along the shorter.

    Returns:
        For each label its root, and whether that is frozen.
    """
    labels = reading.labels
    while True:
        roots = labels.roots()
        frozen = torch.zeros(labels.count, dtype=torch.bool)
        for freeze in labels.freezes:
            frozen[roots[freeze.labels]] = True
        before = len(labels.edges) + len(labels.freezes)
        marked = torch.where(frozen[roots], -1, roots)
        for node, result in reading.values.items():
            for value in [result] if isinstance(result, tuple) else result:
                for axis in value:
                    varying = _varying(marked[axis.labels])
                    if len(varying) > 1:
                        labels.where = node.name
                        longest = max(varying, key=lambda d, a=axis: a.labels.shape[d])  # type: ignore[misc]
                        labels.couple(axis, [d for d in varying if d != longest])
        for held, dim, reason, where in reading.fixed:
            if dim in _varying(marked[held]):
                labels.where = where
                labels.freeze(held, reason)
        for target, vectors in reading.weights.items():
            for vector in vectors:
                if (
                    vector is not None
                    and not frozen[roots[vector]].any()
                    and bool((roots[vector] == roots[vector[0]]).all())
                ):
                    labels.where = target
                    labels.freeze(vector, "all its channels go together, and nothing would be left")
        if len(labels.edges) + len(labels.freezes) == before:
            return roots, frozen[roots]


def _varying(marked: Tensor) -> list[int]:
    return [d for d, size in enumerate(marked.shape) if size > 1 and bool((marked != marked.narrow(d, 0, 1)).any())]


def _grouped(
    reading: Reading, module: fx.GraphModule, roots: Tensor, frozen: Tensor, sources: Mapping[str, str]
) -> Channels:
    dims = [
        (target, d, v) for target, vectors in reading.weights.items() for d, v in enumerate(vectors) if v is not None
    ]
    groups, names = [], defaultdict[str, int](int)
    channel_of = torch.full((reading.labels.count,), -1)
    first = 0
    families, runs = _families(dims, roots, frozen)
    for signature, members in families:
        name = _name(dims, signature)
        names[name] += 1
        made = []
        for place, count in signature:
            held, starts, places = runs[place]
            each = starts[torch.searchsorted(held, members)][:, None] + torch.arange(count)
            made.append(Member(dims[place][0], dims[place][1], places[each]))
        groups.append(ChannelGroup(name if names[name] == 1 else f"{name}#{names[name]}", len(members), tuple(made)))
        channel_of[members] = torch.arange(first, first + len(members))
        first += len(members)
    return Channels(
        module,
        tuple(groups),
        _frozen(reading, dims, roots, frozen, sources),
        channel_of[roots],
        reading.values,
        reading.weights,
        frozenset(reading.directions),
    )


def _families(
    dims: Sequence[tuple[str, int, Tensor]], roots: Tensor, frozen: Tensor
) -> tuple[list[tuple[Signature, Tensor]], list[Run]]:
    """Roots that lie in the same dimensions, in as many places of each: split by one dimension at a time.

    Returns:
        The dimensions and the roots of each family, in the order of execution; and what lies along each dimension.
    """
    family, signatures = torch.zeros(len(roots), dtype=torch.int64), [Signature()]
    rank, seen = torch.full_like(family, -1), 0
    runs = []
    for number, (_, _, vector) in enumerate(dims):
        living = (~frozen[vector]).nonzero().reshape(-1)
        found, order = roots[vector[living]].sort(stable=True)
        held, counts = torch.unique(found, return_counts=True)
        runs.append((held, counts.cumsum(0) - counts, living[order]))
        fresh = held[rank[held] < 0]
        rank[fresh] = torch.arange(seen, seen + len(fresh))
        seen += len(fresh)
        pairs, which = torch.unique(torch.stack([family[held], counts]), dim=1, return_inverse=True)
        family[held] = len(signatures) + which
        signatures += [(*signatures[before], (number, count)) for before, count in pairs.T.tolist()]
    members = (rank >= 0).nonzero().reshape(-1)
    members = members[rank[members].argsort()]
    held = family[members]
    return [(signatures[number], members[held == number]) for number in dict.fromkeys(held.tolist())], runs


def _name(dims: list[tuple[str, int, Tensor]], signature: Signature) -> str:
    """The first weight whose outputs the channels are."""
    made = [dims[number][0] for number, _ in signature if dims[number][1] == 0]
    return made[0] if made else dims[signature[0][0]][0]


def _frozen(
    reading: Reading, dims: list[tuple[str, int, Tensor]], roots: Tensor, frozen: Tensor, sources: Mapping[str, str]
) -> tuple[FrozenChannels, ...]:
    reason_of: dict[int, tuple[str, str]] = {}
    for freeze in reading.labels.freezes:
        for root in set(roots[freeze.labels].tolist()):
            reason_of.setdefault(root, (freeze.reason, freeze.where))
    found = []
    for target, dim, vector in dims:
        held = roots[vector][frozen[vector]]
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for root in held.tolist():
            counts[reason_of[root]] += 1
        for (reason, where), count in counts.items():
            if reason == KERNEL:
                continue  # no channels
            found.append(FrozenChannels(target, dim, count, reason, where, sources.get(where, "")))
    return tuple(found)

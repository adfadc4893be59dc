"""A traced network as a function of its weights, and where its operators use them.

It works on the exported graph, not on the user's modules: every use of a weight is one node, whether it came from a
module, a functional call or an exported program. Cost: one copy of the layers' weights and of the buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..data import Data
from ..errors import InputError, NumericsError
from ..graph.rewrite import move, unlift, writes_in_place
from ..graph.trace import WEIGHT_ARGUMENT, WEIGHT_OPS, Graph, Layer
from .gradient_rules import Site, num_trailing

PASS_BATCH = 32  # examples of a forward and backward pass
MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class Network:
    """A network whose layer weights may be changed and differentiated.

    Attributes:
        module: In evaluation mode; batch norms are not folded.
        layers: As in the graph.
        weights: Parameters of the layers, and others that were asked for after them, by state-dict key; copies of the
            source's, which need no gradient until asked.
        uses: Layer nodes of the graph with the tensor that they multiply.
        batch_dims: Where those nodes' inputs have the examples; none where it isn't a dimension of its own.
        sites: Operators with one or more of the weights as arguments, which their per-sample gradients come from.
        looped: Weights whose per-sample gradients can't be had from sites alone: something else than an operator with
            the examples apart reads them, such as one that casts them, or merges the batch with another dimension.
        is_in_place: Whether an operator writes into its input.
    """

    module: fx.GraphModule
    layers: tuple[Layer, ...]
    weights: Mapping[str, nn.Parameter]
    uses: Mapping[fx.Node, str]
    batch_dims: Mapping[fx.Node, int]
    sites: Mapping[fx.Node, tuple[Site, ...]]
    looped: frozenset[str]
    is_in_place: bool
    device: torch.device

    @property
    def num_weights(self) -> int:
        """``d``: elements of all weights."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def dtype(self) -> torch.dtype:
        return next((weight.dtype for weight in self.weights.values()), torch.float32)

    def flat(self) -> Tensor:
        """The weights as one vector ``[d]``: layers in order, then others."""
        return torch.cat([weight.detach().flatten() for weight in self.weights.values()])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``[..., d]`` as one tensor a weight, ``[..., *shape]``."""
        parts = torch.split(vector, [weight.numel() for weight in self.weights.values()], dim=-1)
        return {
            name: part.reshape(*vector.shape[:-1], *weight.shape)
            for (name, weight), part in zip(self.weights.items(), parts, strict=True)
        }

    def set_flat(self, vector: Tensor) -> None:
        """Replace the weights by ``vector`` ``[d]``."""
        with torch.no_grad():
            for name, value in self.split(vector).items():
                self.weights[name].copy_(value)


def open_network(
    graph: Graph, *, layers: tuple[Layer, ...] | None = None, others: Sequence[str] = (), device: torch.device
) -> Network:
    """A copy of the network that may be differentiated and changed.

    Args:
        layers: Those that matter; all of the graph's where None.
        others: Floating-point parameters beside their weights, by the names they have in the graph: biases, norms,
            embeddings.
    """
    module = unlift(graph.program, graph.tied)
    _own_tensors(module, device)
    move(module, device)  # compiles it: calls it by the names that tied weights now go by
    chosen = graph.layers if layers is None else layers
    names = list(dict.fromkeys((*(layer.tensor for layer in chosen), *others)))
    weights: dict[str, nn.Parameter] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        weight = nn.Parameter(getattr(owner, leaf).clone(), requires_grad=False)
        owner._buffers.pop(leaf, None)
        owner._parameters[leaf] = weights[name] = weight
    symbols = {_size(node, 0) for node in module.graph.nodes if node.op == "placeholder"} - {None}
    uses: dict[fx.Node, str] = {}
    batch_dims: dict[fx.Node, int] = {}
    sites: dict[fx.Node, tuple[Site, ...]] = {}
    looped: set[str] = set()
    layer_tensors = {layer.tensor for layer in chosen}
    for node in module.graph.nodes:
        for read in node.all_input_nodes:
            if read.op != "get_attr" or read.target not in weights:
                continue
            tensor = str(read.target)
            found = _sites(node, read, symbols)
            sites[node] = (*sites.get(node, ()), *found)
            if not found:
                looped.add(tensor)
            if tensor in layer_tensors and _multiplies(node, read):
                uses[node] = tensor
                if found:
                    batch_dims[node] = found[0].batch_dim
    sites = {node: tuple(site for site in found if site.tensor not in looped) for node, found in sites.items()}
    sites = {node: found for node, found in sites.items() if found}
    is_in_place = writes_in_place(module.graph)
    return Network(module, chosen, weights, uses, batch_dims, sites, frozenset(looped), is_in_place, device)


def _own_tensors(module: fx.GraphModule, device: torch.device) -> None:
    """Let the module share values, but neither flags nor anything that it writes to, with the program it came from."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.detach().clone().to(device)


def _multiplies(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node is a layer, and ``weight`` its weight and nothing else."""
    return node.target in WEIGHT_OPS and [i for i, a in enumerate(node.args) if a is weight] == [WEIGHT_ARGUMENT]


def _sites(node: fx.Node, weight: fx.Node, symbols: set[Any]) -> tuple[Site, ...]:
    """Where ``weight`` is an argument of an operator whose examples are apart; none where that isn't all that it is."""
    positions = [i for i, value in enumerate(node.args) if value is weight]
    if node.op != "call_function" or _count(node, weight) != len(positions) or _is_mutable(node):
        return ()
    out, dims = _batch_dim(node, symbols), tuple(_batch_dim(value, symbols) for value in node.args)
    if out is None or _MERGED in (out, *dims) or not node.meta["val"].is_floating_point():
        return ()
    last = node.meta["val"].dim() - max(num_trailing(node, position) for position in positions)
    # A rule's operator keeps the batch where it is: before the dimensions that it sums over or takes channels from.
    has_rules = last < node.meta["val"].dim()
    if out >= last or (has_rules and out not in dims):
        return ()
    return tuple(Site(node, position, str(weight.target), out, dims) for position in positions)


_MERGED = -1  # in place of the batch's dimension


def _count(node: fx.Node, value: fx.Node) -> int:
    return sum(leaf is value for leaf in tree_leaves((list(node.args), dict(node.kwargs))))


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


def _batch_dim(value: Any, symbols: set[Any]) -> int | None:
    """The one dimension of a traced value that is the batch; None without any, ``_MERGED`` where it is in others."""
    nodes = [leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Node)]
    if not isinstance(value, fx.Node):  # a list: of sizes, among which the batch may be, or of tensors
        return _MERGED if any(_batch_dim(node, symbols) is not None for node in nodes) else None
    known = value.meta.get("val")
    if isinstance(known, torch.SymInt):
        return None if known.node.expr in symbols or not known.node.expr.free_symbols else _MERGED
    if not isinstance(known, Tensor):
        return None if known is None or isinstance(known, int | float | bool) else _MERGED
    sizes = [_size(value, d) for d in range(known.dim())]
    dims = [d for d, size in enumerate(sizes) if size in symbols]
    others = [size for size in sizes if size is not None and size not in symbols and size.free_symbols]
    return _MERGED if others or len(dims) > 1 else dims[0] if dims else None


def _size(node: fx.Node, dim: int) -> Any:
    """A traced size as an expression of the batch, to be compared; numbers are no batch."""
    value = node.meta.get("val")
    size = value.shape[dim] if isinstance(value, Tensor) and value.dim() > dim else None
    return size.node.expr if isinstance(size, torch.SymInt) else None


@contextmanager
def differentiable(network: Network, names: Iterable[str]) -> Iterator[list[nn.Parameter]]:
    """The weights called ``names``, asking for gradients inside the block only."""
    weights = [network.weights[name] for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def batches(network: Network, data: Data, size: int = PASS_BATCH) -> Iterator[Data]:
    """Successive batches of at most ``size`` examples, on the network's device; a forward may write into them."""
    for batch in data.batches(size):
        targets = None if batch.targets is None else batch.targets.to(network.device)
        yield Data(tuple(x.to(network.device, copy=True) for x in batch.inputs), targets, batch.name)


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    """The floating outputs of a network, flattened out of tuples and dicts.

    Raises:
        InputError: It has none.
    """
    found = tuple(x for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point())
    if not found:
        raise InputError("the network has no floating-point output", hint="curvature needs an output to differentiate")
    return found


def predict(network: Network, data: Data, *, batch: int = 2 * PASS_BATCH) -> Tensor:
    """The first output on all examples, ``[n, ...]``, on the CPU.

    Raises:
        NumericsError: An output isn't finite; names the examples.
    """
    found = []
    with torch.no_grad():
        for number, part in enumerate(batches(network, data, batch)):
            value = outputs_of(network.module(*part.inputs))[0]
            require_finite(value, "the output", range(number * batch, number * batch + len(part)), data.name)
            found.append(value.cpu())
    return torch.cat(found)


def require_finite(values: Tensor, what: str, numbers: Sequence[int | str], name: str) -> None:
    """Refuse NaN and infinity in ``values`` ``[n, ...]``.

    Args:
        what: The values, in words.
        numbers: Of the examples among the data called ``name``, or the first and the last of several: ``32-47``.

    Raises:
        NumericsError: Names the examples.
    """
    # NaN and infinity survive a sum, and one number a batch is cheaper to look at than all.
    if math.isfinite(values.sum().item()):
        return
    is_bad = ~torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else ~torch.isfinite(values)
    bad = [number for number, flag in zip(numbers, is_bad.tolist(), strict=True) if flag]
    if bad:
        more = f" and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
        listed = ", ".join(map(str, bad[:MAX_LISTED])) + more
        raise NumericsError(
            f"{what} isn't finite on {'example' if listed.isdigit() else 'examples'} {listed} of {name}",
            hint="check these examples, and the checkpoint with hcompress inspect",
        )

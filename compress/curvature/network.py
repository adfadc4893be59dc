"""A traced network as a function of its weights: forward passes that keep what per-layer derivatives need.

It works on the exported graph, not on the user's modules: every use of a weight is one node, whether it came from a
module, a functional call or an exported program. Cost: one copy of the layers' weights and of the buffers.
"""

from __future__ import annotations

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
from ..graph.trace import WEIGHT_ARGUMENT, WEIGHT_OPS, Graph, Layer, aten

PASS_BATCH = 32  # examples of a forward and backward pass
MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class Network:
    """A network whose layer weights may be changed and differentiated.

    Attributes:
        module: In evaluation mode; batch norms are not folded.
        layers: As in the graph.
        weights: Parameters of the layers by state-dict key, copies of the source's; they need no gradient until asked.
        uses: Layer nodes of the graph with the tensor that they multiply.
        batch_dims: Where those nodes' inputs have the examples; none where it isn't a dimension of its own.
        looped: Tensors whose per-sample gradients can't be had from the layers' inputs and outputs: with a use that is
            no layer, such as an embedding that shares the weight, or without a batch dimension.
        is_in_place: Whether an operator writes into its input.
    """

    module: fx.GraphModule
    layers: tuple[Layer, ...]
    weights: Mapping[str, nn.Parameter]
    uses: Mapping[fx.Node, str]
    batch_dims: Mapping[fx.Node, int]
    looped: frozenset[str]
    is_in_place: bool
    device: torch.device

    @property
    def num_weights(self) -> int:
        """``d``: elements of all layers."""
        return sum(layer.elements for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return next((weight.dtype for weight in self.weights.values()), torch.float32)

    def flat(self) -> Tensor:
        """The weights as one vector ``[d]``, layers in order."""
        return torch.cat([self.weights[layer.tensor].detach().flatten() for layer in self.layers])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``[..., d]`` as one tensor a layer, ``[..., *shape]``."""
        parts = torch.split(vector, [layer.elements for layer in self.layers], dim=-1)
        return {
            layer.tensor: part.reshape(*vector.shape[:-1], *layer.shape)
            for layer, part in zip(self.layers, parts, strict=True)
        }

    def set_flat(self, vector: Tensor) -> None:
        """Replace the weights by ``vector`` ``[d]``."""
        with torch.no_grad():
            for name, value in self.split(vector).items():
                self.weights[name].copy_(value)


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a weight in a forward pass: the layer's node, its input and its output."""

    node: fx.Node
    tensor: str
    input: Tensor
    output: Tensor


def open_network(graph: Graph, *, layers: tuple[Layer, ...] | None = None, device: torch.device) -> Network:
    """A copy of the network that may be differentiated and changed.

    Args:
        layers: Those that matter; all of the graph's where None.
    """
    module = unlift(graph.program, graph.tied)
    _own_tensors(module, device)
    move(module, device)  # compiles it: calls it by the names that tied weights now go by
    chosen = graph.layers if layers is None else layers
    names = {layer.tensor for layer in chosen}
    weights: dict[str, nn.Parameter] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        weight = nn.Parameter(getattr(owner, leaf).clone(), requires_grad=False)
        owner._buffers.pop(leaf, None)
        owner._parameters[leaf] = weights[name] = weight
    symbols = {_size(node, 0) for node in module.graph.nodes if node.op == "placeholder"} - {None}
    uses: dict[fx.Node, str] = {}
    batch_dims: dict[fx.Node, int] = {}
    looped: set[str] = set()
    for node in module.graph.nodes:
        for argument in node.all_input_nodes:
            if argument.op != "get_attr" or argument.target not in names:
                continue
            tensor = str(argument.target)
            if not _multiplies(node, argument):
                looped.add(tensor)
                continue
            uses[node] = tensor
            dim = _batch_dim(node, symbols)
            if dim is None:
                looped.add(tensor)
            else:
                batch_dims[node] = dim
    is_in_place = writes_in_place(module.graph)
    return Network(module, chosen, weights, uses, batch_dims, frozenset(looped), is_in_place, device)


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


def _batch_dim(node: fx.Node, symbols: set[Any]) -> int | None:
    """The one dimension of a layer's input that is the batch; None where it is merged with another, or missing."""
    inputs = node.args[0]
    assert isinstance(inputs, fx.Node)
    dims = [d for d in range(inputs.meta["val"].dim()) if _size(inputs, d) in symbols]
    # A convolution's batch is its first dimension, and a linear layer sums over its last.
    last = inputs.meta["val"].dim() - 1 if node.target is aten.linear.default else 1
    return dims[0] if len(dims) == 1 and dims[0] < last else None


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


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps each use of a weight; outputs of layers are where gradients are asked for."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.module)
        self.network = network
        self.found: list[Use] = []

    def run_node(self, n: fx.Node) -> Any:
        if self.network.uses.get(n) in (None, *self.network.looped):
            return super().run_node(n)
        input_node = n.args[0]
        assert isinstance(input_node, fx.Node)
        value, inputs = super().run_node(n), self.env[input_node].detach()
        if not value.requires_grad:
            value.requires_grad_(True)
        # An operator in place, maybe on a view, would change the recorded tensors into others.
        if self.network.is_in_place:
            self.found.append(Use(n, self.network.uses[n], inputs.clone(), value))
            return value.clone()
        self.found.append(Use(n, self.network.uses[n], inputs, value))
        return value


def record(network: Network, inputs: tuple[Tensor, ...]) -> tuple[Any, list[Use]]:
    """Run the network; its outputs, and every use of a layer's weight, in the order of execution."""
    recorder = _Recorder(network)
    with torch.enable_grad():
        outputs = recorder.run(*inputs)
    return outputs, recorder.found


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


def require_finite(values: Tensor, what: str, numbers: Sequence[int], name: str) -> None:
    """Refuse NaN and infinity in ``values`` ``[n, ...]``.

    Args:
        what: The values, in words.
        numbers: Of the examples among the data called ``name``.

    Raises:
        NumericsError: Names the examples.
    """
    # NaN and infinity survive a sum, and one number a batch is cheaper to look at than all.
    if torch.isfinite(values.sum()):
        return
    is_bad = ~torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else ~torch.isfinite(values)
    bad = [number for number, flag in zip(numbers, is_bad.tolist(), strict=True) if flag]
    if bad:
        more = f" and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
        listed = ", ".join(map(str, bad[:MAX_LISTED])) + more
        raise NumericsError(
            f"{what} isn't finite on {'example' if len(bad) == 1 else 'examples'} {listed} of {name}",
            hint="check these examples, and the checkpoint with hcompress inspect",
        )

"""What a network costs after any cut: parameters, MACs and activations as sums of products of shares that stay.

The MACs of a layer go with the share of its inputs that stays times that of its outputs, those of an attention with its
heads, and so on for each set of channels that a node's operands and output lie along. A term is exact: it is the number
that tracing the smaller network again would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..errors import UsageError
from .channel_rules import shape_of
from .groups import Channels
from .labels import Value
from .trace import WEIGHT_ARGUMENT, WEIGHT_OPS, argument, aten, node_macs


@dataclass(frozen=True, slots=True)
class Term:
    """``amount`` times, for each factor, the share of its places whose channels stay.

    Attributes:
        factors: int64 ``[n]`` each: the channel of each place, -1 where it always stays.
    """

    amount: float
    factors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ChannelCosts:
    """Terms of each quantity; MACs and activation elements are of one example, channels those of all groups."""

    params: tuple[Term, ...]
    macs: tuple[Term, ...]
    activations: tuple[Term, ...]
    channels: tuple[Term, ...]

    def of(self, quantity: str) -> tuple[Term, ...]:
        """The terms that a budget of a quantity limits; of bytes those of the parameters, each by its number.

        Raises:
            UsageError: The quantity isn't one of channels.
        """
        known = {"macs": self.macs, "params": self.params, "bytes": self.params, "sparsity": self.channels}
        if quantity not in known:
            raise UsageError(
                f"{quantity} isn't a budget of channels",
                hint="use macs=50%, params=50%, 0.3MB or sparsity=0.5; in a loop of your own, cost= measures any other",
            )
        return known[quantity]


def total(terms: Iterable[Term], kept: Tensor) -> int:
    """The sum of the terms where ``kept``, bool over all channels, says what stays."""
    padded = torch.cat([kept, torch.ones(1, dtype=torch.bool)])  # -1, the last place, always stays
    amount = 0.0
    for term in terms:
        share = math.prod(int(padded[factor].sum()) / len(factor) for factor in term.factors)
        amount += term.amount * share
    return round(amount)


def channel_costs(channels: Channels, batch: int) -> ChannelCosts:
    """The costs of a network that was traced with ``batch`` examples."""
    parameters = dict(channels.module.named_parameters())
    params = []
    for name, parameter in parameters.items():
        vectors = channels.weights.get(name, [None] * parameter.dim())
        factors = tuple(channels.channel_of[labels] for labels in vectors if labels is not None)
        params.append(Term(float(parameter.numel()), _cuttable(factors)))
    macs, activations = [], []
    for node in channels.module.graph.nodes:
        if node.op != "call_function" or node not in channels.values:
            continue
        macs += _macs(channels, node, batch)
        result = channels.values[node]
        if isinstance(result, tuple) and shape_of(node):
            size = math.prod(shape_of(node)) / batch
            activations.append(Term(size, _factors(channels, [result])))
    numbers = channels.split(torch.arange(channels.count))
    counts = tuple(Term(float(group.size), (places,)) for group, places in numbers)
    return ChannelCosts(tuple(params), tuple(macs), tuple(activations), counts)


def _macs(channels: Channels, node: fx.Node, batch: int) -> list[Term]:
    whole = node_macs(node, batch)
    if not whole:
        return []
    values = [_value(channels, source) for source in node.all_input_nodes]
    if node.target in WEIGHT_OPS:
        return [Term(float(whole), _layer_factors(channels, node))]
    if node.target is not aten.scaled_dot_product_attention.default:
        return [Term(float(whole), _factors(channels, [*values, _value(channels, node)]))]
    width = shape_of(node.args[0])[-1]
    scores = whole * width // (width + shape_of(node.args[2])[-1])
    output = _value(channels, node)
    repeated = bool(argument(node, "enable_gqa", False))
    queries = values[:1] if repeated else values[:2]
    return [Term(float(scores), _factors(channels, queries)), Term(float(whole - scores), _factors(channels, [output]))]


def _layer_factors(channels: Channels, node: fx.Node) -> tuple[Tensor, ...]:
    """Those of the weight, whose inputs and outputs may be the same channels, and of what the layer passes through."""
    weight = _value(channels, node.args[WEIGHT_ARGUMENT])  # type: ignore[arg-type]
    own = [channels.channel_of[axis.labels.reshape(-1)] for axis in weight]
    dims = len(shape_of(node))
    channel = dims - 1 if node.target is aten.linear.default else 1 if dims == len(shape_of(node.args[1])) else 0
    passed = tuple(axis for axis in _value(channels, node) if axis.labels.shape[channel] == 1)
    return (*_cuttable(own), *_factors(channels, [passed]))


def _value(channels: Channels, node: fx.Node) -> Value:
    found = channels.values.get(node, ())
    return found if isinstance(found, tuple) else ()


def _factors(channels: Channels, values: Iterable[Value]) -> tuple[Tensor, ...]:
    """One factor for each set of channels, however many of the values lie along it."""
    found: dict[tuple[tuple[int, float], ...], Tensor] = {}
    for value in values:
        for axis in value:
            factor = channels.channel_of[axis.labels.reshape(-1)]
            numbers, counts = torch.unique(factor, return_counts=True)
            key = tuple(zip(numbers.tolist(), (counts / len(factor)).tolist(), strict=True))
            found.setdefault(key, factor)
    return _cuttable(found.values())


def _cuttable(factors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(factor for factor in factors if bool((factor >= 0).any()))


def num_parameters(module: fx.GraphModule) -> int:
    """Elements of the parameters of a cut network."""
    return sum(parameter.numel() for parameter in module.parameters())

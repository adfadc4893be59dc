"""Forward passes of a traced network that keep what per-sample gradients need, laid out for fast backward passes.

Two things are computed otherwise than the graph says, with the same result. On a processor images have their channels
last: oneDNN's convolutions then read and write as it is, forwards and backwards, and gradients that come in another
order are put in it. A batch norm of fixed statistics that alone reads a convolution goes into its weight, so that
neither pass runs it. No output of an operator is kept: memory that the caches still hold is written to again.
Cost: of a pass, what the network's own takes, less the batch norms.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from ..graph.trace import CONVOLUTIONS, TRANSPOSED, WEIGHT_ARGUMENT, argument, aten
from .gradient_rules import Site, Use
from .network import Network

CHANNELS_LAST = torch.channels_last
IMAGE_DIMS = 4
KEEPS_LAYOUT = {  # forwards and backwards
    *CONVOLUTIONS,
    *TRANSPOSED,
    aten.add.Tensor,
    aten.batch_norm.default,
    aten.gelu.default,
    aten.hardswish.default,
    aten.mul.Tensor,
    aten.relu.default,
    aten.sigmoid.default,
    aten.silu.default,
}
ANY_LAYOUT = {  # whose result is the same for every layout of what they read
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.add.Scalar,
    aten.avg_pool2d.default,
    aten.cat.default,
    aten.clamp.default,
    aten.constant_pad_nd.default,
    aten.div.Tensor,
    aten.dropout.default,
    aten.elu.default,
    aten.flatten.using_ints,
    aten.group_norm.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.instance_norm.default,
    aten.layer_norm.default,
    aten.leaky_relu.default,
    aten.linear.default,
    aten.max_pool2d.default,
    aten.mean.default,
    aten.mean.dim,
    aten.mul.Scalar,
    aten.pad.default,
    aten.permute.default,
    aten.prelu.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.softmax.int,
    aten.softplus.default,
    aten.sub.Tensor,
    aten.sum.dim_IntList,
    aten.sym_size.int,
    aten.tanh.default,
    aten.transpose.int,
    aten.view.default,  # made a reshape
}
READS_LAYOUT = {
    aten._reshape_alias.default,
    aten.as_strided.default,
    aten.sym_stride.int,
    aten.view.dtype,
    aten.view_as_complex.default,
}
IMAGE_OPS = {aten.conv2d.default, aten.conv2d.padding}


@dataclass(frozen=True, slots=True)
class _Folded:
    """A convolution and its batch norm as one convolution: its weight and bias, and the norm's factors ``[c]``."""

    weight: Tensor
    bias: Tensor
    factor: Tensor


class Recorder(fx.Interpreter):
    """Runs a network's graph, at its weights as they are now, and keeps each use of a weight."""

    def __init__(self, network: Network, sites: Mapping[fx.Node, tuple[Site, ...]] | None = None) -> None:
        """A recorder of ``sites``; of all that the network has, and with norms folded, where None."""
        super().__init__(network.module)
        self.network = network
        self.is_in_place = network.is_in_place
        self.sites = network.sites if sites is None else sites
        self.has_channels_last = _may_have_channels_last(network)
        norms = _norms(network) if sites is None else {}
        self.folded = {node: self._folded(node, norm) for node, norm in norms.items()}
        self.passed = {*norms.values(), *(() if self.is_in_place else _whole_slices(network.module.graph))}
        self.stored = {node: self._stored(node) for node in network.module.graph.nodes if node.op == "get_attr"}
        self.found: list[Use] = []

    def record(self, inputs: tuple[Tensor, ...]) -> tuple[Any, list[Use]]:
        """The outputs, and every use of a weight, in the order of execution."""
        self.found = []
        with torch.enable_grad():
            outputs = self.run(*inputs, initial_env=dict(self.stored))
        return outputs, self.found

    def run_node(self, n: fx.Node) -> Any:
        if n in self.passed:
            return self.env[n.args[0]]  # type: ignore[index]
        if n.op == "placeholder":
            return self._channels_last(super().run_node(n))
        if n.op != "call_function":
            return super().run_node(n)
        sites = self.sites.get(n, ())
        # An operator in place, maybe on a view, would change the recorded tensors into others.
        arguments = fx.node.map_arg(n.args, self._kept) if sites else ()
        value = self._call(n)
        if not sites:
            return value
        if not value.requires_grad:
            value.requires_grad_(True)
        edge, factor = get_gradient_edge(value), self.folded[n].factor if n in self.folded else None
        self.found += [Use(site, arguments, edge, value.shape, factor) for site in sites]
        return value.clone() if self.is_in_place else value

    def _call(self, n: fx.Node) -> Any:
        target: Any = n.target
        args = fx.node.map_arg(n.args, self.env.__getitem__)
        kwargs = fx.node.map_arg(n.kwargs, self.env.__getitem__)
        if n in self.folded:
            args = (args[0], self.folded[n].weight, self.folded[n].bias, *args[3:])
        elif self.has_channels_last and n.target not in KEEPS_LAYOUT:
            args = tuple(_with_layout(value) for value in args)
            if target is aten.view.default:
                target = aten.reshape.default
            elif target not in ANY_LAYOUT:  # it may look at strides, as views, custom operators and branches do
                args, kwargs = tree_map(_contiguous, (args, kwargs))
        return target(*args, **kwargs)

    def _stored(self, node: fx.Node) -> Any:
        value = self.fetch_attr(str(node.target))
        is_weight = any(user.target in IMAGE_OPS and user.args[WEIGHT_ARGUMENT] is node for user in node.users)
        return self._channels_last(value) if is_weight else value

    def _channels_last(self, value: Any) -> Any:
        if self.has_channels_last and isinstance(value, Tensor) and value.dim() == IMAGE_DIMS:
            return value.contiguous(memory_format=CHANNELS_LAST)
        return value

    def _kept(self, node: fx.Node) -> Any:
        value = self.env[node]
        if isinstance(node.meta.get("val"), torch.SymInt):
            return 1  # the size of one example's batch
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone() if self.is_in_place and node.op != "get_attr" else value.detach()

    def _folded(self, node: fx.Node, norm: fx.Node) -> _Folded:
        weight, bias = (self._parameter(value) for value in (*node.args, None)[1:3])
        scale, shift, mean, variance = (self._parameter(value) for value in norm.args[1:5])
        assert weight is not None and mean is not None and variance is not None  # as in _norms
        factor = torch.rsqrt(variance + argument(norm, "eps", 1e-5))
        factor = factor if scale is None else factor * scale
        offset = (-mean if bias is None else bias - mean) * factor
        offset = offset if shift is None else offset + shift
        scaled = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
        return _Folded(self._channels_last(scaled), offset, factor)

    def _parameter(self, node: Any) -> Tensor | None:
        return None if node is None else self.fetch_attr(str(node.target)).detach()


def record(
    network: Network, inputs: tuple[Tensor, ...], sites: Mapping[fx.Node, tuple[Site, ...]] | None = None
) -> tuple[Any, list[Use]]:
    """One pass of a ``Recorder``: the outputs, and every use of a weight, in the order of execution."""
    return Recorder(network, sites).record(inputs)


class _Layout(torch.autograd.Function):
    """Nothing forwards; backwards, the gradient with its channels last.

    Its sum with others, and the derivative of what made the value, would take many times as long in mixed layouts.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=CHANNELS_LAST)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _with_layout(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.dim() == IMAGE_DIMS and value.requires_grad):
        return value
    has_layout = value.is_contiguous(memory_format=CHANNELS_LAST) and not value.is_contiguous()
    return _Layout.apply(value) if has_layout else value  # type: ignore[no-untyped-call]


def _may_have_channels_last(network: Network) -> bool:
    """Whether the order of memory is ours to choose, and matters."""
    targets = {node.target for node in network.module.graph.nodes}
    is_free = not network.is_in_place and not targets & READS_LAYOUT
    return network.device.type == "cpu" and is_free and bool(targets & IMAGE_OPS)


def _whole_slices(graph: fx.Graph) -> list[fx.Node]:
    """Slices of everything, as the first two of ``x[:, :, ::2]`` are, whose derivatives would be copies."""
    slices = [node for node in graph.nodes if node.target is aten.slice.Tensor]
    return [
        node
        for node in slices
        if argument(node, "start", None) in (None, 0)
        and argument(node, "end", None) in (None, sys.maxsize)
        and argument(node, "step", 1) == 1
    ]


def _norms(network: Network) -> dict[fx.Node, fx.Node]:
    """Batch norms of fixed statistics that have no gradients of their own, by the convolution that they alone read."""
    found: dict[fx.Node, fx.Node] = {}
    for norm in network.module.graph.nodes:
        if norm.target is not aten.batch_norm.default or norm in network.sites:
            continue
        source, parameters, is_training = norm.args[0], norm.args[1:5], norm.args[5]
        if source.target not in CONVOLUTIONS or len(source.users) > 1 or is_training or None in parameters[2:]:
            continue
        layer = (*source.args, None)[1:3]
        if all(value is None or value.op == "get_attr" for value in (*parameters, *layer)):
            found[source] = norm
    return found

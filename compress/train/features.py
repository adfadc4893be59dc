"""Features: what the layers of a compressed network read, drawn towards what those of the dense one read.

Outputs alone say little about where inside a network they went wrong. Compared are the values that are read more than
once, such as a residual stream, and what the last layer reads; what lies between may find its own way. In a network
without such values it is what every layer reads. The layers of both networks go by their weights' names; of what the
dense one's read, the channels that stay are compared.
Source: Romero et al. 2014, FitNets (arXiv:1412.6550), for hints; here throughout the network and without a regressor,
as channels keep their meaning when others are cut.
Cost: one difference the size of each activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..graph.channel_rules import shape_of
from ..graph.groups import Channels, channel_dim, places_kept
from ..graph.rewrite import operand
from ..graph.trace import WEIGHT_ARGUMENT, WEIGHT_OPS
from .step_sizes import stored_weight

TAP = "hcompress_tap"  # name of the submodule that values pass by
Values = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Feature:
    """What a layer of the dense network reads.

    Attributes:
        dim: Along which its channels lie.
        channel: int64 ``[size]``: the channel of each place, -1 where it stays; None where all do.
    """

    dim: int
    channel: Tensor | None


class Features:
    """What is compared between a dense network and one that came from it.

    Args:
        channels: Of the dense network; those of a cut network keep their meaning.
        kept: bool ``[c]``, called in every step: the channels that are compared, all where None. The network that is
            trained has these alone, or all.
    """

    def __init__(self, channels: Channels, kept: Callable[[], Tensor] | None = None) -> None:
        every = torch.ones(channels.count, dtype=torch.bool)
        self._kept = kept or (lambda: every)
        self._found = {
            key: _Feature(channel_dim(layer), channels.along(operand(layer, 0), channel_dim(layer)))
            for key, layer in _layers(channels.module).items()
            if operand(layer, 0) in channels.values
        }
        self._stays: Tensor | None = None
        self._places: dict[str, Tensor] = {}

    def distance(self, dense: Values, small: Values) -> Tensor | None:
        """The mean over all features of the squared difference, in units of the dense one's mean square.

        Args:
            dense: By layer, as ``tapped`` gives them.
            small: Of the network that is trained.

        Returns:
            None where the two have no feature in common.
        """
        self._refresh()
        parts = []
        for key, feature in self._found.items():
            if key in dense and key in small:
                part = self._part(key, feature.dim, dense[key].float(), small[key].float())
                parts += [] if part is None else [part]
        return torch.stack(parts).mean() if parts else None

    def _part(self, key: str, dim: int, wanted: Tensor, found: Tensor) -> Tensor | None:
        places = self._places.get(key)
        if places is not None:
            places = places.to(wanted.device)
            is_whole = found.shape == wanted.shape
            wanted = wanted.index_select(dim, places)
            found = found.index_select(dim, places) if is_whole else found
        if found.shape != wanted.shape or not found.numel():
            return None
        scale = wanted.square().mean().clamp(min=torch.finfo(wanted.dtype).tiny)
        return (found - wanted).square().mean() / scale

    def _refresh(self) -> None:
        """The places of each feature that are compared."""
        kept = self._kept()
        if self._stays is not None and torch.equal(kept, self._stays):
            return
        self._stays = kept.clone()
        for key, feature in self._found.items():
            if feature.channel is not None:
                self._places[key] = places_kept(kept, feature.channel).nonzero().reshape(-1)


@contextmanager
def tapped(module: object) -> Iterator[Values]:
    """What the layers of an exported network read, by layer, anew in every forward; of any other module nothing."""
    values: Values = {}
    if not isinstance(module, fx.GraphModule):
        yield values
        return
    layers = _layers(module)
    added = []
    module.add_submodule(TAP, _Tap(values))
    try:
        for key, layer in layers.items():
            with module.graph.inserting_before(layer):
                added.append(module.graph.call_module(TAP, (key, operand(layer, 0))))
        module.recompile()
        yield values
    finally:
        for node in reversed(added):
            module.graph.erase_node(node)
        module.delete_submodule(TAP)
        module.recompile()


class _Tap(nn.Module):
    """Keeps what passes by."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def forward(self, key: str, value: Tensor) -> None:
        self.values[key] = value


def _layers(module: fx.GraphModule) -> Mapping[str, fx.Node]:
    """The layers whose inputs are compared, by their weight's name and the number of its use.

    One reader of a value is enough: layers that read what an earlier one reads are left out.
    """
    found: dict[str, fx.Node] = {}
    uses: dict[str, int] = {}
    seen: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in WEIGHT_OPS:
            continue
        read, weight = operand(node, 0), stored_weight(operand(node, WEIGHT_ARGUMENT))
        if weight.op != "get_attr":
            continue
        number = uses[str(weight.target)] = uses.get(str(weight.target), -1) + 1
        if read.op == "call_function" and read not in seen and shape_of(read):
            seen.add(read)
            found[f"{weight.target}#{number}"] = node
    last = list(found)[-1:]
    shared = {key: node for key, node in found.items() if key in last or len(operand(node, 0).users) > 1}
    return shared if len(shared) > len(last) else found

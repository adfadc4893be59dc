"""Cross-layer equalization: the channels between two layers get scales at which they are of one size.

What a layer gives passes through operators that commute with a positive factor of each channel, such as ReLU and
pooling, to layers that read it. Dividing a channel by a factor where it is made, and multiplying the weights that read
it, leaves the network as it is; but a grid that all channels of an activation share, or a row of a weight, rounds it
better. Factors are powers of two, so that in floats the network gives the same bits. They follow from the weights.
Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1; with a batch norm the size of a channel is that of its
largest usual value, ``beta + 3 |gamma|``, as in section 4.2. Cost: a pass over the weights for each of a few sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .rewrite import BATCH_NORMS, after_norms, operand
from .trace import CONVOLUTIONS, WEIGHT_ARGUMENT, WEIGHT_OPS, argument, aten

SWEEPS = 20  # at most; chains of layers settle in a few
USUAL = 3.0  # standard deviations of a normalised channel
# Operators that commute with a positive factor, and keep every value where it is.
ELEMENTWISE = {
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.dropout.default,
    aten.feature_dropout.default, aten.contiguous.default, aten.clone.default,
}  # fmt: skip
# Those that do so for each channel, and the dimensions of what they take where the second one holds the channels.
POOLS = {
    aten.max_pool1d.default: 3, aten.max_pool2d.default: 4, aten.max_pool3d.default: 5, aten.avg_pool1d.default: 3,
    aten.avg_pool2d.default: 4, aten.avg_pool3d.default: 5, aten.adaptive_avg_pool1d.default: 3,
    aten.adaptive_avg_pool2d.default: 4, aten.adaptive_avg_pool3d.default: 5,
}  # fmt: skip
# Those that may move channels, and don't where each has a single value.
RESHAPES = {
    aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
COMMUTING = {*ELEMENTWISE, *POOLS, *RESHAPES, aten.pad.default, aten.mean.dim}


@dataclass(frozen=True, slots=True)
class Link:
    """Channels that one layer makes and others read.

    Attributes:
        weight: The key of the layer's weight ``[c, ...]``.
        divided: Keys of what is divided by the factors, along the first dimension: the weight and bias, or the batch
            norm's factor and offset.
        norm: Whether those are a batch norm's.
        read_by: Keys of the weights that are multiplied, and the dimension that holds the channels.
    """

    weight: str
    divided: tuple[str, ...]
    norm: bool
    read_by: tuple[tuple[str, int], ...]


def find_links(module: fx.GraphModule, keys: Collection[str], exclude: Collection[str] = ()) -> list[Link]:
    """The channels that may be scaled, in network order.

    Args:
        module: Of ``rewrite.unlift``.
        keys: Of the state dict: other constants stay as they are.
        exclude: Keys of tensors that stay as they are.
    """
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    free = {key for key, count in uses.items() if count == 1 and key in keys and key not in exclude}
    links = [_link(node) for node in module.graph.nodes if node.target in WEIGHT_OPS]
    return [link for link in links if link is not None and {link.weight, *link.divided, *dict(link.read_by)} <= free]


def _link(layer: fx.Node) -> Link | None:
    if not _makes_channels_second(layer):
        return None
    end = after_norms(layer)
    norm = None if end is layer else end
    if norm is not None and operand(norm, 0) is not layer:
        return None  # norms in a row
    if norm is None and any(user.target in BATCH_NORMS for user in layer.users):
        return None
    weight = operand(layer, WEIGHT_ARGUMENT)
    divided = [operand(norm, 1), operand(norm, 2)] if norm is not None else [weight, argument(layer, "bias", None)]
    divided = [value for value in divided if value is not None]
    readers = _readers(end, _channels(layer))
    named = [weight, *divided, *(value for value, _ in readers or ())]
    if not readers or (norm is not None and len(divided) != 2) or any(value.op != "get_attr" for value in named):
        return None
    read_by = tuple((str(value.target), dim) for value, dim in readers)
    return Link(str(weight.target), tuple(str(value.target) for value in divided), norm is not None, read_by)


def _channels(layer: fx.Node) -> int:
    return int(operand(layer, WEIGHT_ARGUMENT).meta["val"].shape[0])


def _makes_channels_second(layer: fx.Node) -> bool:
    """Whether the channels of a layer's output are its second dimension."""
    has_batch: bool = layer.meta["val"].dim() == operand(layer, WEIGHT_ARGUMENT).meta["val"].dim()
    return has_batch and (layer.target in CONVOLUTIONS or layer.target is aten.linear.default)


def _readers(value: fx.Node, count: int) -> list[tuple[fx.Node, int]] | None:
    """The weights that read a value's channels, and along which dimension; None where anything else does."""
    found: list[tuple[fx.Node, int]] = []
    for user in value.users:
        dim = _reading_dim(user, value, count)
        if dim is not None:
            found.append((operand(user, WEIGHT_ARGUMENT), dim))
        elif _commutes(user, value, count) and (further := _readers(user, count)):
            found.extend(further)
        else:
            return None
    return found


def _reading_dim(user: fx.Node, value: fx.Node, count: int) -> int | None:
    """The dimension of a layer's weight along which it reads a value's channels."""
    if user.target not in WEIGHT_OPS or operand(user, 0) is not value or operand(user, WEIGHT_ARGUMENT) is value:
        return None
    shape, weight = value.meta["val"].shape, operand(user, WEIGHT_ARGUMENT).meta["val"].shape
    if len(shape) != len(weight) or shape[1] != count:
        return None
    if user.target is aten.linear.default:
        return 1
    if user.target not in CONVOLUTIONS:
        return None
    if weight[1] == count:
        return 1
    return 0 if weight[0] == argument(user, "groups", 1) == count else None  # depthwise


def _commutes(user: fx.Node, value: fx.Node, count: int) -> bool:
    """Whether an operator reads a value alone, gives its channels, and each of them a factor where it had one."""
    if user.target not in COMMUTING or any(argument is not value for argument in user.all_input_nodes):
        return False  # a slope of each channel, say, would have to be moved as well
    before, after = value.meta["val"].shape, user.meta["val"].shape
    if len(after) < 2 or before[1] != count or after[1] != count:
        return False
    if user.target in POOLS:
        # With one dimension less there is no batch, and channels are pooled.
        return bool(len(before) == POOLS[user.target])
    if user.target is aten.pad.default:
        is_zero: bool = argument(user, "mode", "constant") == "constant" and not argument(user, "value", None)
        return is_zero and len(operand(user, 1)) <= 2 * (len(before) - 2)
    if user.target is aten.mean.dim:
        dims = argument(user, "dim", None) or ()
        return bool(dims) and all(dim % len(before) > 1 for dim in dims)
    if user.target in RESHAPES:
        return bool(math.prod(before[2:]) == math.prod(after[2:]) == 1)
    return True


def exponents(links: Sequence[Link], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole binary logarithms of the factors of each link's channels, float64 ``[c]``, by the link's weight.

    Each factor is the power of two nearest to ``sqrt(a / b)``, ``a`` the size of a channel and ``b`` the largest weight
    that reads it. Channels that are zero, or that nothing reads, stay.
    """
    total = {link.weight: torch.zeros(len(state[link.weight]), dtype=torch.float64) for link in links}
    current = dict(state)
    for _ in range(SWEEPS):
        moved = False
        for link in links:
            more = _exponents(link, current)
            total[link.weight] += more
            current |= scaled([link], current, {link.weight: more})
            moved |= bool(more.any())
        if not moved:
            break
    return total


def scaled(links: Sequence[Link], state: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` that change with the factors ``by``, of ``exponents``."""
    found: dict[str, Tensor] = {}
    for link in links:
        if link.weight not in by or not by[link.weight].any():
            continue
        factor = torch.exp2(by[link.weight]).float()
        for key in link.divided:
            value = found.get(key, state[key])
            found[key] = value / _along(factor, 0, value)
        for key, dim in link.read_by:
            value = found.get(key, state[key])
            found[key] = value * _along(factor, dim, value)
    return found


def _exponents(link: Link, state: Mapping[str, Tensor]) -> Tensor:
    made = [state[key].double() for key in link.divided]
    if link.norm:
        size = made[1] + USUAL * made[0].abs()
    else:
        size = torch.stack([value.abs().reshape(len(value), -1).amax(1) for value in made]).amax(0)
    read = [state[key].double().abs().movedim(dim, 0).flatten(1).amax(1) for key, dim in link.read_by]
    weight = torch.stack(read).amax(0)
    usable = (size > 0) & (weight > 0)
    ratio = torch.where(usable, size, 1) / torch.where(usable, weight, 1)
    return torch.where(usable, torch.round(ratio.log2() / 2), 0)


def _along(factor: Tensor, dim: int, tensor: Tensor) -> Tensor:
    return factor.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])

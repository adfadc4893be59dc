"""Where channels lie in a model's own tensors, and how those are scaled in place while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..graph.groups import Channels
from ..graph.reload import copied


@dataclass(frozen=True, slots=True)
class Places:
    """A dimension of a tensor that channels lie along.

    Attributes:
        tensor: State-dict key.
        channel: int64 ``[n]``: the channel of each place along ``dim``; -1 where it always stays.
    """

    tensor: str
    dim: int
    channel: Tensor


def find_places(channels: Channels) -> tuple[Places, ...]:
    """Where the channels lie; what is divided by its norm has no size of its own and is left out."""
    found = []
    for tensor, vectors in channels.weights.items():
        for dim, labels in enumerate(vectors):
            if labels is not None and (tensor, dim) not in channels.directions:
                channel = channels.channel_of[labels]
                if bool((channel >= 0).any()):
                    found.append(Places(tensor, dim, channel))
    return tuple(found)


def scale_channels(places: Sequence[Places], tensors: Mapping[str, Tensor], factors: Tensor) -> None:
    """Multiply, in place, what lies along each channel by the channel's factor; zero makes it exactly zero.

    Args:
        factors: ``[c + 1]``, the last for what always stays.
    """
    for place in places:
        tensor = tensors.get(place.tensor)
        if tensor is None:
            continue
        factor = factors[place.channel]  # -1 is the last
        partial = (factor != 1) & (factor != 0)
        if bool(partial.any()):
            shape = [1] * tensor.dim()
            shape[place.dim] = -1
            tensor.detach().mul_(factor.to(tensor).reshape(shape))
        gone = (factor == 0).nonzero().reshape(-1)
        if len(gone):  # not by multiplication, which keeps NaN
            tensor.detach().index_fill_(place.dim, gone.to(tensor.device), 0)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def copy_of(model: nn.Module) -> nn.Module:
    """On the processor, without gradients: one with a graph can't be copied."""
    held = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in held:
            p.grad = None
        return copied(model).cpu()
    finally:
        for p, grad in held:
            p.grad = grad

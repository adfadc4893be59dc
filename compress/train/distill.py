"""What a compressed network learns from: the task's loss, and how far its outputs are from the dense network's.

Source: Hinton et al. 2015 (arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ..data import Data
from ..errors import UsageError
from ..task import Task, divergence, floating, has_logits

BATCH = 256  # of examples that are only compared


def loss_of(
    task: Task, outputs: Any, targets: Tensor | None, wanted: Tensor | None, *, distill: float, temperature: float
) -> Tensor:
    """The loss of a batch: ``(1 - distill)`` of the task's and ``distill`` of the distance from the dense network.

    Args:
        outputs: Of the network; the task's loss takes all of them, the distance the first tensor.
        targets: None without labels: the distance is all that there is.
        wanted: The dense network's first output, of the same shape; None leaves the task's loss.
    """
    outputs = tree_map(_widened, outputs)
    if wanted is None:
        assert targets is not None
        return task.loss(outputs, targets)
    share = 1.0 if targets is None else distill
    apart = distance(_widened(wanted), first_tensor(outputs), are_logits=has_logits(task), temperature=temperature)
    if targets is None or share == 1:
        return apart
    return share * apart + (1 - share) * task.loss(outputs, targets)


def distance(reference: Tensor, outputs: Tensor, *, are_logits: bool, temperature: float) -> Tensor:
    """What ``task.divergence`` measures, to be differentiated.

    Args:
        reference: ``[..., c]`` where they are logits.
        temperature: Logits are divided by it. Gradients fall with its square, by which the divergence is multiplied.

    Returns:
        Mean KL divergence of logits, mean squared difference of other values.
    """
    if are_logits and reference.dim() >= 2 and reference.shape[-1] >= 2:
        log_p = F.log_softmax(reference.flatten(0, -2) / temperature, -1)
        log_q = F.log_softmax(outputs.flatten(0, -2) / temperature, -1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    return F.mse_loss(outputs, reference)


def divergence_from(
    dense: Callable[..., Any], network: Callable[..., Any], data: Data, task: Task, device: torch.device
) -> float:
    """Mean divergence of a network's outputs from the dense one's, over all of ``data``."""
    return divergences_from(dense, [network], data, task, device)[0]


def divergences_from(
    dense: Callable[..., Any],
    networks: Sequence[Callable[..., Any]],
    data: Data,
    task: Task,
    device: torch.device,
    *,
    batch_size: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The same of several networks, with one pass of the dense one.

    Args:
        batch_size: Examples of a pass.
        progress: Told how many examples are done.
    """
    totals = [0.0] * len(networks)
    with torch.no_grad():
        for number, batch in enumerate(data.batches(batch_size)):
            if progress is not None:
                progress(number * batch_size)
            reference = [value.cpu() for value in floating(run(dense, batch, device))]
            for place, network in enumerate(networks):
                outputs = [value.cpu() for value in floating(run(network, batch, device))]
                totals[place] += len(batch) * divergence(reference, outputs, are_logits=has_logits(task))
    if progress is not None:
        progress(len(data))
    return [total / len(data) for total in totals]


def run(network: Callable[..., Any], batch: Data, device: torch.device) -> Any:
    """The outputs of a batch, which stays as it is: a forward may write into its inputs."""
    return network(*(x.to(device, copy=True) for x in batch.inputs))


def first_tensor(outputs: Any) -> Tensor:
    """The output that is compared.

    Raises:
        UsageError: There is none.
    """
    for value in tree_leaves(outputs):
        if isinstance(value, Tensor):
            return value
    raise UsageError("the network gives no tensor", hint="a network that is trained returns one at least")


def _widened(value: Any) -> Any:
    """Half floats of mixed precision as float32: a sum over classes needs it."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value

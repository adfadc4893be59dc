"""Factors of the loss Hessian in output space: cotangents whose pull-backs are rows of a Fisher or Gauss-Newton matrix.

For one example with outputs f, let S be the Hessian of its loss in f and L Lᵀ = S. With random signs r, the gradient of
fᵀ(L r), L r held constant, is a random vector whose second moment is the example's block JᵀSJ of the generalized
Gauss-Newton matrix (Martens 2020, arXiv:1412.1193; Schraudolph 2002). Labels sampled from the model's own distribution
give the same matrix, the true Fisher, with more noise; the data's labels give the empirical Fisher.

Draws are seeded by example and probe, so that they don't depend on batches or on the number of machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..errors import NumericsError, UsageError
from ..task import Regression, Task, has_logits
from .network import outputs_of, require_finite

MAX_OUTPUTS = 512  # of an example, or of a position of it, where the loss Hessian of a user's task is formed
MAX_ELEMENTS = 2**28  # of the blocks of all positions of a batch


@dataclass(frozen=True, slots=True)
class Draw:
    """Which random numbers the examples of a batch get.

    Attributes:
        seed: Of the whole run.
        examples: Numbers of the batch's examples among the data.
        probe: Of ``ggn``: the k probes of an example with one prediction of k outputs are orthogonal, so that over all
            of them the second moment is exact; in random order, so that any of them are a fair sample.
        name: Of the data, for messages.
    """

    seed: int
    examples: Sequence[int]
    probe: int
    name: str


def cotangents(task: Task, outputs: Any, targets: Tensor | None, draw: Draw, *, mode: str) -> tuple[Tensor, ...]:
    """What to differentiate the outputs against, one tensor for each output, an independent draw for each example.

    Args:
        outputs: Of a batch, ``[n, ...]`` each.
        targets: ``[n, ...]``; needed by ``labels``, and by tasks of the user's.
        mode: ``ggn`` (output-space probes), ``sampled`` (labels drawn from the model), ``labels`` (the data's).

    Returns:
        Tensors ``[n, ...]`` in units of an example's loss by output.

    Raises:
        UsageError: The mode needs targets and there are none, or the task's loss has too many outputs to factor.
        NumericsError: An output, the loss or its Hessian isn't finite; names the examples.
    """
    values = tuple(value.detach() for value in outputs_of(outputs))
    require_finite(values[0], "the output", draw.examples, draw.name)
    if mode == "labels":
        return _of_labels(task, outputs, targets, draw)
    zeros = tuple(torch.zeros_like(v) for v in values[1:])
    if _is_logits(task, values[0]):
        return (_logit_probe(values[0], draw) if mode == "ggn" else _sampled_label(values[0], draw), *zeros)
    if isinstance(task, Regression):
        flat = values[0].reshape(len(values[0]), -1)
        noise = _signs(flat, draw) if mode == "ggn" else _normals(flat, draw)
        return ((2 / flat.shape[1]) ** 0.5 * noise.reshape(values[0].shape), *zeros)
    if mode == "sampled":
        raise UsageError(
            f"labels can't be sampled for the metric {task.name}", hint="use --fisher ggn, which needs no label"
        )
    return _factored(task, outputs, targets, draw)


def period(task: Task, outputs: Any) -> int:
    """How many ``ggn`` probes of an example are complete; 0 where none are, as it has several predictions."""
    found = outputs_of(outputs)
    if _is_logits(task, found[0]):
        return found[0].shape[-1] if _positions(found[0]) == 1 else 0
    return sum(value[0].numel() for value in (found[:1] if isinstance(task, Regression) else found))


def output_curvature(task: Task, outputs: Any) -> Tensor | None:
    """``tr(S)`` of each example, ``[n]`` in float64; None where it is the same for all, or would have to be formed."""
    value = outputs_of(outputs)[0].detach()
    if not _is_logits(task, value):
        return None
    p = torch.softmax(value.double(), -1)
    return (p * (1 - p)).sum(-1).reshape(len(p), -1).mean(1)


def loss_of(task: Task, outputs: Any, targets: Tensor | None) -> Tensor:
    """Mean loss of a batch; without targets, expected under the model's own predictions, held constant.

    Raises:
        UsageError: There are no targets, and the task is not one whose model predicts a distribution.
    """
    if targets is not None:
        return task.loss(outputs, targets)
    value = outputs_of(outputs)[0]
    if _is_logits(task, value):
        return F.cross_entropy(value.flatten(0, -2), torch.softmax(value.detach(), -1).flatten(0, -2))
    if isinstance(task, Regression):
        return F.mse_loss(value, value.detach())
    raise _needs_targets(task)


def _is_logits(task: Task, value: Tensor) -> bool:
    return has_logits(task) and value.dim() >= 2 and value.shape[-1] >= 2


def _needs_targets(task: Task) -> UsageError:
    return UsageError(f"the loss of the metric {task.name} needs targets", hint="pass --data with y")


def _positions(logits: Tensor) -> int:
    """Predictions of one example: 1 for classes, the tokens of a window."""
    return logits[0].numel() // logits.shape[-1]


def _logit_probe(logits: Tensor, draw: Draw) -> Tensor:
    """``(diag(√p) - p √pᵀ) r``: its second moment is ``diag(p) - ppᵀ``; over positions, the mean loss of an example."""
    p = torch.softmax(logits, -1)
    signs = _signs(p.flatten(1) if _positions(p) == 1 else p, draw).reshape(p.shape)
    weighted = p.sqrt() * signs
    scale: float = _positions(logits) ** -0.5
    return scale * (weighted - p * weighted.sum(-1, keepdim=True))


def _sampled_label(logits: Tensor, draw: Draw) -> Tensor:
    """``p - e_y`` with y drawn from p, the gradient of the loss at the model's own label; scaled like the probes."""
    p = torch.softmax(logits, -1)
    rows = p.flatten(1, -2).cpu() if p.dim() > 2 else p.unsqueeze(1).cpu()
    drawn = torch.stack(
        [torch.multinomial(row, 1, generator=g) for row, g in zip(rows, _generators(draw), strict=True)]
    )
    labels = drawn.reshape(p.shape[:-1]).to(p.device)
    scale: float = _positions(logits) ** -0.5
    return scale * (p - F.one_hot(labels, p.shape[-1]))


def _signs(like: Tensor, draw: Draw) -> Tensor:
    """Random signs in the shape of ``like``; of ``[n, k]``, times a row of the Hartley matrix.

    ``cas(2 pi i j / k)`` over j has k orthogonal rows of squared norm k. Its row for each probe is drawn without
    replacement, as the entries of one row aren't all of magnitude 1. All of it is drawn on the CPU: every device gets
    the same.
    """
    k = like.shape[-1]
    is_single = like.dim() == 2
    turn, place = divmod(draw.probe, k) if is_single else (draw.probe, 0)
    signs, rows = [], []
    for generator in _generators(draw, turn):
        signs.append(2 * torch.randint(0, 2, like.shape[1:], generator=generator, dtype=torch.int8) - 1)
        rows.append(torch.randperm(k, generator=generator)[place] if is_single else torch.zeros((), dtype=torch.int64))
    drawn = torch.stack(signs).to(like)
    if not is_single:
        return drawn
    angle = torch.outer(torch.stack(rows), torch.arange(k)) % k * (2 * math.pi / k)
    return drawn * (angle.cos() + angle.sin()).to(like)


def _normals(like: Tensor, draw: Draw) -> Tensor:
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in _generators(draw)]).to(like)


def _generators(draw: Draw, turn: int | None = None) -> list[torch.Generator]:
    """One for each example; probes of one ``turn`` share its random numbers."""
    return [seeded((draw.seed, number, draw.probe if turn is None else turn)) for number in draw.examples]


def seeded(key: Sequence[int]) -> torch.Generator:
    """A generator of its own for the numbers ``key``, such as a run's seed, an example and a probe."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _of_labels(task: Task, outputs: Any, targets: Tensor | None, draw: Draw) -> tuple[Tensor, ...]:
    if targets is None:
        raise UsageError("the empirical Fisher needs labels, and --data has none", hint="use --fisher ggn or sampled")
    leaves, found = _leaves(outputs)
    gradients = torch.autograd.grad(_sum_of_losses(task, leaves, targets, draw), found, allow_unused=True)
    return tuple(torch.zeros_like(f) if g is None else g for f, g in zip(found, gradients, strict=True))


def _factored(task: Task, outputs: Any, targets: Tensor | None, draw: Draw) -> tuple[Tensor, ...]:
    """A user's loss: its Hessian in the outputs is formed for each example, and its negative part left out."""
    if targets is None:
        raise _needs_targets(task)
    leaves, found = _leaves(outputs)
    loss = _sum_of_losses(task, leaves, targets, draw)
    if (by_position := _position_blocks(loss, found)) is not None:
        blocks, dim = by_position
        require_finite(blocks, "the loss's Hessian", draw.examples, draw.name)
        return (_drawn(blocks, draw).reshape(found[0].movedim(dim, -1).shape).movedim(-1, dim).to(found[0]),)
    sizes = [f[0].numel() for f in found]
    if sum(sizes) > MAX_OUTPUTS:
        raise UsageError(
            f"the network has {sum(sizes)} outputs an example; a loss of your own is factored up to {MAX_OUTPUTS}",
            hint="set logits = True on the task if its loss is a cross-entropy, classes last; or pass --trace hessian",
        )
    hessian = _output_hessian(loss, found).double().cpu()
    require_finite(hessian, "the loss's Hessian", draw.examples, draw.name)
    parts = torch.split(_drawn(hessian.unsqueeze(1), draw).to(found[0]), sizes, 1)
    return tuple(part.reshape(f.shape) for part, f in zip(parts, found, strict=True))


def _drawn(blocks: Tensor, draw: Draw) -> Tensor:
    """``L r`` of Hessians that are block diagonal, ``[n, positions, k, k]``, as ``[n, positions * k]``."""
    eigenvalues, vectors = torch.linalg.eigh((blocks + blocks.transpose(-1, -2)) / 2)
    signs = _signs(eigenvalues.flatten(1), draw).reshape(eigenvalues.shape)
    return torch.einsum("npkj,npj->npk", vectors, eigenvalues.clamp(min=0).sqrt() * signs).flatten(1)


def _position_blocks(loss: Tensor, found: Sequence[Tensor]) -> tuple[Tensor, int] | None:
    """The blocks ``[n, positions, k, k]`` of a loss that adds up over positions, pixels say, and the dimension of k.

    None where it doesn't: the blocks, which k products with the Hessian give, must give its product with random signs.
    """
    if len(found) != 1 or found[0].dim() < 3:
        return None
    value = found[0]
    gradient = torch.autograd.grad(loss, value, create_graph=True, allow_unused=True)[0]
    if gradient is None or not gradient.requires_grad:
        return None

    def product(vector: Tensor, dim: int) -> Tensor:
        return torch.autograd.grad(gradient, value, vector, retain_graph=True)[0].movedim(dim, -1).double().cpu()

    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(0)).to(value) * 2 - 1
    for dim in dict.fromkeys((1, value.dim() - 1)):
        k = value.shape[dim]
        if k <= MAX_OUTPUTS and value.numel() * k <= MAX_ELEMENTS:
            units = torch.eye(k).to(value)
            columns = [product(unit.expand(value.movedim(dim, -1).shape).movedim(-1, dim), dim) for unit in units]
            blocks, wanted = torch.stack(columns, -1), product(signs, dim)
            given = torch.einsum("...kj,...j->...k", blocks, signs.movedim(dim, -1).double().cpu())
            if torch.allclose(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
                return blocks.reshape(len(value), -1, k, k), dim
    return None


def _output_hessian(loss: Tensor, found: Sequence[Tensor]) -> Tensor:
    """``[n, k, k]`` from the sum of the examples' losses, k elements of all outputs."""
    gradient = _flat_gradient(loss, found, create_graph=True)
    if not gradient.requires_grad:  # of a loss that is linear in the outputs
        return gradient.new_zeros(*gradient.shape, gradient.shape[1])
    return torch.stack([_flat_gradient(column.sum(), found, create_graph=False) for column in gradient.unbind(1)], 1)


def _flat_gradient(value: Tensor, found: Sequence[Tensor], *, create_graph: bool) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(f).reshape(len(f), -1) for f in found], 1)
    gradients = torch.autograd.grad(value, found, create_graph=create_graph, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(f) if g is None else g for f, g in zip(found, gradients, strict=True)]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _leaves(outputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The outputs cut off from the network, to be differentiated in, and the floating ones of them."""

    def cut(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_(True) if is_float else value

    leaves = tree_map(cut, outputs)
    return leaves, outputs_of(leaves)


def _sum_of_losses(task: Task, outputs: Any, targets: Tensor, draw: Draw) -> Tensor:
    with torch.enable_grad():
        loss = task.loss(outputs, targets) * len(draw.examples)
    if not torch.isfinite(loss):
        raise NumericsError(
            f"the loss is {loss.item():g} on examples {draw.examples[0]}-{draw.examples[-1]} of {draw.name}",
            hint="check these examples and their targets",
        )
    return loss

"""AdaHessian: Adam with the Hessian's diagonal in place of squared gradients.

The diagonal is Hutchinson's estimate ``z * Hz`` with random signs ``z``, averaged over the kernel of a convolution, or
over blocks of a matrix, and smoothed over the steps.
Source: Yao et al. 2021 (arXiv:2006.00719), algorithm 1; the delay of the Hessian: their section 5.4.
Cost: in each step with a new diagonal, a second backward pass, through the first: about 6 times a step of SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class AdaHessian(torch.optim.Optimizer):
    """The optimizer; ``needs_graph`` says whether the next step takes gradients with a graph.

    Such a step follows ``loss.backward(create_graph=True)``, as every one may; the others keep the diagonal as it is.

    Args:
        betas: Of the means of gradients and of squared diagonals.
        weight_decay: Decoupled, as in AdamW.
        power: Of the diagonal: 1 scales like Newton's method, 0 not at all.
        delay: Steps that one diagonal serves, for all groups alike.
        block_size: Entries of a matrix's row that share one value of the diagonal; 1 for all their own. A row whose
            length isn't a multiple of it keeps its own.
        seed: Of the signs, which follow from it and the number of the step; for all groups alike.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        power: float = 1.0,
        block_size: int = 1,
        delay: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value, is_right in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("power", power, 0 <= power <= 1),
            ("block_size", block_size, block_size >= 1),
            ("delay", delay, delay >= 1),
        ):
            if not is_right:
                raise ValueError(f"{name} of AdaHessian is {value}, out of range")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "power": power}
        super().__init__(params, {**defaults, "block_size": block_size, "delay": delay, "seed": seed})

    @property
    def needs_graph(self) -> bool:
        """Whether the next step takes a new diagonal."""
        return self._steps() % int(self.param_groups[0]["delay"]) == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that are there.

        Raises:
            RuntimeError: The step takes a new diagonal, and ``backward`` was called without ``create_graph=True``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return loss
        diagonals: list[Tensor | None] = [None] * len(held)
        if self.needs_graph:
            if not any(p.grad.requires_grad for p, _ in held):
                raise RuntimeError("AdaHessian needs gradients with a graph: call loss.backward(create_graph=True)")
            generator = torch.Generator().manual_seed(int(self.param_groups[0]["seed"]) * 1_000_003 + self._steps())
            parameters = [p for p, _ in held]
            diagonals[:] = hutchinson_diagonal([p.grad for p in parameters], parameters, generator=generator)
        for (p, group), diagonal in zip(held, diagonals, strict=True):
            self._update(p, None if diagonal is None else averaged(diagonal, group["block_size"]), group)
        return loss

    def _steps(self) -> int:
        """Steps that were made."""
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    def _update(self, p: Tensor, diagonal: Tensor | None, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"], state["diagonals"] = 0, 0
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        first, second = group["betas"]
        assert p.grad is not None
        state["mean"].mul_(first).add_(p.grad.detach(), alpha=1 - first)
        if diagonal is not None:
            state["diagonals"] += 1
            state["square"].mul_(second).addcmul_(diagonal, diagonal, value=1 - second)
        if not state["diagonals"]:
            return  # a parameter that joined since the last diagonal waits for its own
        corrected = state["mean"] / (1 - first ** state["step"])
        scale = (state["square"] / (1 - second ** state["diagonals"])).sqrt() ** group["power"] + group["eps"]
        p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(corrected, scale, value=-group["lr"])


def hutchinson_diagonal(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], *, generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the Hessian as ``z * Hz`` with random signs ``z``: unbiased, from one product.

    Args:
        gradients: Of the loss, made with ``create_graph=True``; one without a graph stands for a loss that is linear in
            the parameter.
        parameters: Of the same shapes.
        generator: On the processor, so that every device draws the same signs.

    Returns:
        Of the same shapes, in units of loss per squared weight.
    """
    signs = [
        (2.0 * torch.randint(2, p.shape, generator=generator) - 1.0).to(device=p.device, dtype=p.dtype)
        for p in parameters
    ]
    used = [(g, z) for g, z in zip(gradients, signs, strict=True) if g.requires_grad]
    products = torch.autograd.grad(
        [g for g, _ in used], parameters, grad_outputs=[z for _, z in used], allow_unused=True, materialize_grads=True
    )
    return [(z * product).detach() for z, product in zip(signs, products, strict=True)]


def averaged(diagonal: Tensor, block_size: int = 1) -> Tensor:
    """The diagonal's magnitude, averaged over what differs mostly by noise: a kernel's positions, a matrix's blocks."""
    size = diagonal.abs()
    if size.dim() > 2:
        return size.flatten(2).mean(2).reshape(*size.shape[:2], *[1] * (size.dim() - 2)).expand_as(size)
    if size.dim() == 2 and block_size > 1 and size.shape[1] % block_size == 0:
        return size.reshape(-1, block_size).mean(1, keepdim=True).expand(-1, block_size).reshape(size.shape)
    return size

"""M-FAC as an optimizer: momentum, multiplied by the damped inverse Fisher matrix of the last gradients.

With the last ``n`` gradients of all parameters as the rows of ``G``, ``F = damping I + G^T G / n``, and Nesterov's
momentum of them as ``G^T c``::

    step = (1 + 1 / d) lr damping F^-1 G^T c = (1 + d) lr t G^T (d t I + G G^T)^-1 c

where ``t`` is the mean squared norm of those gradients, and ``damping = d t / n``. Directions that the gradients agree
on are shortened, by ``1 + n / d`` at most, and a gradient like no other keeps its length: a learning rate means what it
means to SGD, which this becomes at large ``d``. The product is never a difference, and its m x m algebra is float64.
Source: Frantar, Kurtic, Alistarh 2021 (arXiv:2107.03356), section 3.2; the scale is ours.
Cost: of a step, 2 m d multiply-adds beside forward and backward; m copies of the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..numerics.mfac_window import GramWindow, check_products, combination, row_products

ROWS, WINDOW = "gradients", "window"  # of a parameter's state; the window is the first one's


class MFAC(torch.optim.Optimizer):
    """The optimizer; all groups share one Fisher matrix.

    A parameter that had no gradient in a step counts there with zeros.

    Args:
        num_gradients: ``m``, for all groups alike.
        damping: ``d``, relative, for all groups alike: 1 halves a gradient that is like no other before the scale is
            put right.
        momentum: Nesterov's; of the gradients in the window, so that it needs no buffer.
        weight_decay: Decoupled, as in AdamW.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.03,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1.0,
        num_gradients: int = 64,
    ) -> None:
        for name, value, is_right in (
            ("lr", lr, lr >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("damping", damping, damping > 0),
            ("num_gradients", num_gradients, num_gradients >= 1),
        ):
            if not is_right:
                raise ValueError(f"{name} of MFAC is {value}, out of range")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.damping, self.num_gradients = damping, num_gradients

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that are there.

        Raises:
            NumericsError: A gradient is not finite; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for p in self._parameters()):
            return loss
        window = self._take()
        n = len(window)
        mean = float(window.gram.diagonal().sum()) / n
        if mean > 0:
            ridge = window.factorise(self.damping * mean)
            for group in self.param_groups:
                momentum = [group["momentum"] ** (age + 1) for age in reversed(range(n))]
                coefficients = torch.zeros_like(window.gram[0])
                coefficients[window.order] = coefficients.new_tensor(momentum)
                coefficients[window.order[-1]] += 1
                solved = (ridge + mean) * window.solve(coefficients, ridge)
                for p in group["params"]:
                    self._move(p, solved, group)
        self.state[self._anchor()][WINDOW] = window.state_dict()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, with its precision: torch's own would make float64 what the parameters are."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, p in zip(saved, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name] = _moved(value, p.device)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _anchor(self) -> Tensor:
        first: Tensor = self.param_groups[0]["params"][0]
        return first

    def _take(self) -> GramWindow:
        """The window with the gradients that are there as its newest."""
        anchor = self._anchor()
        window = GramWindow(self.num_gradients, device=anchor.device)
        if WINDOW in self.state[anchor]:
            window.load_state_dict(self.state[anchor][WINDOW])
        products, own = torch.zeros_like(window.gram[0]), 0.0
        for p in self._parameters():
            if p.grad is None or not p.numel():
                continue
            if p.grad.is_sparse:
                raise RuntimeError("MFAC takes no sparse gradients")
            if ROWS not in self.state[p]:
                dtype = torch.promote_types(p.dtype, torch.float32)
                self.state[p][ROWS] = torch.zeros(self.num_gradients, *p.shape, dtype=dtype, device=p.device)
            gradient = p.grad.flatten()
            products += row_products(self._rows(p), gradient).to(products.device)
            own += float(gradient.to(torch.float64).square().sum())
        check_products(products, own)
        slot = window.free_slot()
        if slot is None:
            slot = window.order[0]
            window.empty(slot)
        for p in self._parameters():
            if ROWS in self.state[p]:
                self.state[p][ROWS][slot] = 0 if p.grad is None else p.grad
        products[slot] = own
        window.fill(slot, products)
        return window

    def _rows(self, p: Tensor) -> Tensor:
        rows: Tensor = self.state[p][ROWS]
        return rows.reshape(len(rows), -1)

    def _move(self, p: Tensor, solved: Tensor, group: dict[str, Any]) -> None:
        if p.grad is None or not p.numel():
            return
        p.mul_(1 - group["lr"] * group["weight_decay"])
        step = combination(self._rows(p), solved.to(p.device)).to(p.dtype)
        p.sub_(step.reshape(p.shape), alpha=group["lr"])


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of a state, its tensors on another device, in their own dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {name: _moved(inner, device) for name, inner in value.items()}
    return copy.deepcopy(value)

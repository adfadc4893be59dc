"""Saliency of channels, from the parameters and gradients of single training steps.

A channel is all the parameters that go when it is cut. Along its gate, a factor on all of them, the loss has the slope
``w . g``: the first-order scores are functions of it, and its square, averaged over batches, is the gate's curvature.
Each criterion is divided by its mean over the channels, so that they can be added.
Source: Chen et al. 2024, HESSO (arXiv:2409.09085), section 3, for the five criteria; Molchanov et al. 2019
(arXiv:1906.10771) and Theis et al. 2018 (arXiv:1801.05787) for the curvature.
Cost: three products the size of the parameters for each step that is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from .channel_places import Places


@dataclass(frozen=True, slots=True)
class Sums:
    """What the criteria are made from: sums over all parameters of each channel, ``[c]``.

    Attributes:
        ww: Squared parameters.
        wg: Parameters times gradients: the slope of the loss along the gate.
        gg: Squared gradients.
        size: Number of parameters.
        is_trained: Whether any of them has a gradient.
    """

    ww: Tensor
    wg: Tensor
    gg: Tensor
    size: Tensor
    is_trained: Tensor


def channel_sums(
    places: Iterable[Places], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], count: int
) -> Sums:
    """Sum over the parameters of each of ``count`` channels.

    Args:
        places: Those of tensors that aren't in ``weights`` are passed over.
        weights: Parameters by state-dict key.
        gradients: Of some of them, or of all.
    """
    device = next(iter(weights.values())).device if weights else torch.device("cpu")
    sums = torch.zeros(5, count + 1, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    # One pass over each tensor gives its three products; a tensor that two dimensions lie in is held from the first.
    by_tensor: dict[str, list[Places]] = {}
    for place in places:
        by_tensor.setdefault(place.tensor, []).append(place)
    for name, held in by_tensor.items():
        if name not in weights:
            continue
        w = weights[name].detach()
        g = gradients[name].detach().to(w.dtype) if name in gradients else None
        products = [w * w] if g is None else [w * w, w * g, g * g]
        for place in held:
            others = [d for d in range(w.dim()) if d != place.dim]
            rows = [p.sum(others) if others else p for p in products]
            size = torch.full_like(rows[0], w.numel() / len(rows[0]))
            zero = torch.zeros_like(rows[0])
            rows = [*[*rows, zero, zero][:3], size, torch.full_like(size, float(g is not None))]
            channel = torch.where(place.channel < 0, count, place.channel).to(device)
            sums.index_add_(1, channel, torch.stack(rows).to(sums))
    ww, wg, gg, size, trained = sums[:, :count].double().cpu() if device.type == "cuda" else sums[:, :count].cpu()
    return Sums(ww, wg, gg, size, trained > 0)


def magnitude(sums: Sums) -> Tensor:
    """``|w|``."""
    return sums.ww.sqrt()


def average_magnitude(sums: Sums) -> Tensor:
    """``|w|`` by the root of the number of parameters."""
    return (sums.ww / sums.size.clamp(min=1)).sqrt()


def cosine(sums: Sums) -> Tensor:
    """``(1 + cos(w, -g)) / 2``: 0 where a gradient step goes straight to the origin; a half without a gradient."""
    norms = (sums.ww * sums.gg).sqrt()
    cos = torch.where(norms > 0, -sums.wg / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)
    return (1 + cos.clamp(-1, 1)) / 2


def first_order(sums: Sums) -> Tensor:
    """``|w . g|``: the loss's change by its slope at the channel as it is."""
    return sums.wg.abs()


def second_order(sums: Sums) -> Tensor:
    """``|-w . g + (w . g)^2 / 2|``: with ``g g^T`` for the Hessian. The published score; a function of the first."""
    return (0.5 * sums.wg.square() - sums.wg).abs()


def curvature(sums: Sums) -> Tensor:
    """``(w . g)^2 / 2``; its mean over batches is half the diagonal of the Fisher matrix of the gates."""
    return 0.5 * sums.wg.square()


CRITERIA: Mapping[str, Callable[[Sums], Tensor]] = {
    "magnitude": magnitude,
    "average-magnitude": average_magnitude,
    "cosine": cosine,
    "first-order": first_order,
    "second-order": second_order,
    "curvature": curvature,
}


FADE = 0.5  # what is left of earlier steps' say after each pick: the scores of a few steps alone are mostly noise


class RunningScores:
    """The mean of each criterion over the steps that were added, those of earlier periods less, in constant memory.

    Args:
        criteria: Names in ``CRITERIA``.
        count: Number of channels ``c``.
        fade: Share of the earlier steps' weight that each period keeps.
    """

    def __init__(self, criteria: Sequence[str], count: int, fade: float = FADE) -> None:
        self.criteria, self.fade = tuple(criteria), fade
        self.totals = torch.zeros(len(self.criteria), count, dtype=torch.float64)
        self.steps = 0.0
        self.is_over = False

    def add(self, sums: Sums, among: Tensor) -> None:
        """Add a step.

        Args:
            among: bool ``[c]``: the channels whose mean is made 1, so that a step with a large loss has no more say
                than another.

        Raises:
            NumericsError: A score isn't finite.
        """
        if self.is_over:
            self.totals *= self.fade
            self.steps, self.is_over = self.steps * self.fade, False
        for number, name in enumerate(self.criteria):
            score = CRITERIA[name](sums).double()
            if not bool(torch.isfinite(score).all()):
                raise NumericsError(
                    f"the {name} saliency of {int((~torch.isfinite(score)).sum())} channels isn't finite",
                    hint="the loss has diverged: lower the learning rate",
                )
            self.totals[number] += normalised(score, among)
        self.steps += 1

    def combined(self, weights: Mapping[str, float], among: Tensor) -> Tensor:
        """The weighted mean of the criteria, each of mean 1 over ``among``, float64 ``[c]``."""
        total = sum(weights.values())
        means = self.totals / self.steps if self.steps else self.totals
        parts = [
            weights[name] / total * normalised(mean, among) for name, mean in zip(self.criteria, means, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def begin_anew(self) -> None:
        """Fade all steps as soon as there is another."""
        self.is_over = True

    def state_dict(self) -> dict[str, Any]:
        return {"totals": self.totals.clone(), "steps": self.steps, "is_over": self.is_over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals.copy_(state["totals"])
        self.steps, self.is_over = float(state["steps"]), bool(state["is_over"])


def normalised(score: Tensor, among: Tensor) -> Tensor:
    """Scores whose mean over ``among`` is 1; zeros where all of those are."""
    mean = float(score[among].mean()) if bool(among.any()) else 0.0
    return score / mean if mean > 0 else torch.zeros_like(score)

"""Gradual pruning: the smallest weights go while the network trains, and may come back until late.

Forward and backward see the weights that stay. Those that are gone keep a value of their own, which a tenth of their
gradient moves on: where the masks are chosen anew, what has grown comes back, and what has shrunk goes. The sparsity
rises along a cubic, and for the last quarter the masks hold.
Source: Zhu and Gupta 2018 (arXiv:1710.01878) for the cubic; Lin et al. 2020, DPF (arXiv:2006.07253), for weights that
come back; the share of their gradient is ours.
Cost: of a step, that of training and two copies of the weights; a sort of them in every ``EVERY``-th of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import moved_values, with_values
from ..budget import Budget
from ..context import Context
from ..errors import UsageError
from ..graph.groups import find_channels
from ..graph.trace import Graph
from ..model import Source
from ..numerics.units import Units, masks_of_most
from ..pattern import Pattern
from ..plan import Plan
from ..pruned import trainable_copy
from ..saliencies import saliency_histogram
from ..sensitivity import Sensitivity
from ..task import Calibration
from ..train.features import Features
from ..train.loop import Hooks, train
from ..train.optimizers import RATES
from ..train.recipe import Recipe, Training
from . import magnitude
from .masks import Masks, cut_layers, mask_plan, num_removed, recorded_options, units_of, whole_plan
from .removal import Removal, remaining, removal_for, squares

NAME = "gradual"
RAMP = 0.3  # of the steps, in which the sparsity rises
HELD = 0.75  # of the steps, after which the masks hold
EVERY = 0.0125  # of the steps: masks are chosen anew
SHARE = 0.1  # of its gradient, that moves a weight while it is gone
SALIENCY = "magnitude at the end of the training; of what is gone, of the value that it kept beneath"
RATE = 10 / 3  # of the usual learning rate: what goes and what stays has to move far

Choose = Callable[[Mapping[str, Tensor], float], Masks]
refit = magnitude.refit


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Train a network while its weights go.

    Args:
        budget: ``sparsity``, ``bytes`` of the delivered file, or ``macs``; None means a sparsity of one half.
        options: ``scope`` (``global`` or ``layer``), ``pattern`` (``pattern.FORMS``), ``exclude`` (globs).
        context: Its ``training`` says on what and for how long.

    Returns:
        The plan and its sidecar: packed masks, and new values by tensor.

    Raises:
        BudgetError: More is to be removed than ``exclude`` or the pattern leaves.
        UsageError: Nothing to train on, nothing to prune, or no pattern.
        NumericsError: The loss is no longer finite.
    """
    training: Training | None = context.training
    if training is None:
        raise UsageError(f"method {NAME} trains", hint="pass --train DATA")
    recorded = recorded_options(options)
    layers, pattern = cut_layers(source, graph, recorded, budget, context)
    removal = None
    if pattern.quota is None:
        removal = removal_for(source, graph, layers, pattern, budget, recorded["scope"], context)
    if removal is not None and removal.amount == 0:
        context.notes.append(f"{NAME}: nothing has to go, so that nothing was trained")
        return whole_plan(source, graph, layers, budget, NAME, recorded)
    units = units_of(layers, pattern)
    choose = _chooser(units, pattern, removal, recorded["scope"])
    recipe = _of_gradual(training.recipe)
    state = dict(source.module.state_dict())
    module, teacher = trainable_copy(graph, state), trainable_copy(graph, state)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    soft = SoftMasks({tensor: parameters[tensor] for tensor in units}, choose, recipe.steps)
    trained = train(
        module,
        training.data,
        calibration.task,
        recipe,
        teacher=teacher,
        calibration=calibration.data,
        seed=training.seed,
        device=context.device,
        progress=context.progress,
        features=Features(find_channels(graph)),
        hooks=Hooks(
            step=soft.step,
            after=soft.put,
            state=soft.state,
            restore=soft.restore,
            may_keep=soft.is_held,
            settings={**recorded, "method": NAME, "budget": None if budget is None else asdict(budget)},
        ),
        journal=training.journal,
        resume=training.resume,
    )
    context.notes.append(f"{NAME}: the masks hold after {soft.held_from} of {recipe.steps} steps; {trained.moved()}")
    masks = {name: mask.cpu() for name, mask in soft.masks.items()}
    values = torch.cat([soft.values[name].abs().flatten().cpu() for name in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    context.saliencies.append(saliency_histogram(values, kept, what=SALIENCY))
    decided, sidecar = mask_plan(source, graph, masks, budget, NAME, recorded)
    options = {**decided.options, "recover": asdict(recipe)}
    decided = replace(decided, task_sha256=calibration.sha256(), options=options)
    return with_values(decided, sidecar, moved_values(module, state), masks)


@dataclass(slots=True)
class SoftMasks:
    """Weights that are gone from a network while it trains, and that come back where they grow.

    Attributes:
        weights: By tensor; what the network sees, zero where a weight is gone.
        choose: The masks of these values at a share of what is to go in the end.
        steps: Of the training.
        values: Of all weights, also of those that are gone.
        masks: True where a weight is there.
        number: Steps that were made.
    """

    weights: Mapping[str, nn.Parameter]
    choose: Choose
    steps: int
    values: dict[str, Tensor] = field(init=False)
    masks: Masks = field(init=False)
    number: int = 0

    def __post_init__(self) -> None:
        self.values = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in self.values.items()}

    @property
    def held_from(self) -> int:
        """The number of steps after which the masks hold."""
        return round(HELD * self.steps)

    def is_held(self) -> bool:
        return self.number >= self.held_from

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        """In place of the optimizer's: it moves what the network sees, and the values beneath by as much."""
        share = 0.0 if self.is_held() else SHARE
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            if weight.grad is not None:
                with torch.set_grad_enabled(weight.grad.requires_grad):  # a second backward pass may follow
                    weight.grad = weight.grad * torch.where(self._mask(name), 1.0, share).to(weight.dtype)
        optimizer.step()
        self.number = number + 1
        for name, weight in self.weights.items():
            value = self.values[name].to(weight.device)
            self.values[name] = value + (weight.detach() - before[name])
        every = max(1, round(EVERY * self.steps))
        if self.number <= self.held_from and (self.number % every == 0 or self.is_held()):
            done = min(1.0, self.number / (RAMP * self.steps))
            self.masks = self.choose({n: value.cpu() for n, value in self.values.items()}, 1 - (1 - done) ** 3)

    @torch.no_grad()
    def put(self) -> None:
        """Let the network see what is there."""
        for name, weight in self.weights.items():
            weight.copy_(self.values[name].to(weight.device) * self._mask(name))

    def _mask(self, name: str) -> Tensor:
        self.masks[name] = self.masks[name].to(self.weights[name].device)
        return self.masks[name]

    def state(self) -> dict[str, Any]:
        return {"values": dict(self.values), "masks": dict(self.masks), "number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        self.values, self.masks, self.number = dict(state["values"]), dict(state["masks"]), int(state["number"])


def _of_gradual(recipe: Recipe) -> Recipe:
    """The recipe, in what the settings leave open."""
    return recipe if recipe.lr is not None else replace(recipe, lr=RATE * RATES[recipe.optimizer])


def _chooser(units: Mapping[str, Units], pattern: Pattern, removal: Removal | None, scope: str) -> Choose:
    """How masks are chosen: the removal is made in the end, or all goes that the pattern's quota doesn't keep."""

    def choose(values: Mapping[str, Tensor], share: float) -> Masks:
        costs = squares(units, values)
        if pattern.quota is None:
            assert removal is not None
            amount = num_removed(share * removal.amount / removal.whole, removal.whole)
            return remaining(units, costs, replace(removal, amount=amount), scope)
        n, m = pattern.quota
        return masks_of_most(units, costs, m - round((m - n) * share))

    return choose

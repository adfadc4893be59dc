"""HESSO-CRIC: the channels that go are tried at zero, and put back, before any of them goes.

A saliency taken at a channel's full size says little of what happens when it is gone with others. In a cycle, the
channels that would go, and weren't tried yet (the violating set), are shrunk along sampled sparsities while the network
trains; at each, their saliency is taken with their full size and the gradients there. Then parameters, buffers and the
optimizer's state are put back as they were. All saliencies rise where the loss does: those of the trial are brought to
the sum of those before it, or what was tried would give way to what wasn't, whatever it is worth. Means over the
gradients of both pick the next set; when they pick nothing new, or the cycles are over, HESSO's periods begin: each
picks by the saliencies of the network as it is by then, times what the trials made of each channel's first one.

    cric = Cric(model, optimizer, example_inputs, budget="macs=50%", steps=250)

Source: Chen et al. 2024 (arXiv:2409.09085), whose published code puts the parameters alone back.
Cost: the steps of its cycles, which are the last of the warm-up and leave no training behind, and while they last one
more copy of the parameters, buffers and optimizer's state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import Budget
from ..errors import UsageError
from .channel_plan import LEAST
from .cut_target import Cost
from .group_saliency import RunningScores
from .hesso import DEFAULT, STEPS, WEIGHTS, Hesso, Schedule


@dataclass(frozen=True, slots=True)
class Cycles:
    """How long channels are tried.

    Attributes:
        most: Cycles after which the periods begin in any case.
        share: Of the training's steps, for all cycles together.
    """

    most: int = 3
    share: float = 0.05

    def __post_init__(self) -> None:
        if self.most < 1 or not 0 < self.share < 1:
            raise UsageError(
                f"{self.most} cycles in {self.share:g} of the steps", hint="1 cycle or more, in a share between 0 and 1"
            )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training as it was.

    Attributes:
        tensors: Parameters and buffers by name.
        states: Key and value of each entry of the optimizer's state; the key of a parameter is its number.
    """

    tensors: dict[str, Tensor]
    states: tuple[tuple[Any, Any], ...]


class Cric(Hesso):
    """A training that ends in a smaller network, whose channels were tried before they went.

    Args:
        cycles: How many, and how long.
        seed: Of the sampled sparsities.

    All else is as for ``Hesso``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
        *,
        budget: str | Budget = DEFAULT,
        steps: int = STEPS,
        schedule: Schedule | None = None,
        cycles: Cycles | None = None,
        weights: Mapping[str, float] = WEIGHTS,
        multiple_of: int | None = 1,
        least: float = LEAST,
        exclude: Sequence[str] = (),
        cost: Cost | None = None,
        seed: int = 0,
    ) -> None:
        self.cycles, self.seed = Cycles() if cycles is None else cycles, seed
        super().__init__(
            model,
            optimizer,
            example_inputs,
            budget=budget,
            steps=steps,
            schedule=schedule,
            weights=weights,
            multiple_of=multiple_of,
            least=least,
            exclude=exclude,
            cost=cost,
        )
        self.settings |= {"cycles": asdict(self.cycles), "seed": seed}
        self.violations: list[int] = []  # of each cycle
        self._place = 0  # of the step in its cycle
        self._are_over = False  # the cycles
        self._correction = torch.ones(self.count, dtype=torch.float64)  # of each score, by its trial
        self.trial = RunningScores(tuple(self.weights), self.count, fade=0.0)  # of the violating set, in the cycle
        self._tried = torch.zeros(self.count, dtype=torch.bool)
        self._violating = torch.zeros(self.count, dtype=torch.bool)
        self._rank = torch.zeros(self.count, dtype=torch.float64)  # of the violating, in [0, 1)
        self._factor = torch.ones(self.count, dtype=torch.float64)
        self._saved: Snapshot | None = None

    @property
    def unshrunk(self) -> Tensor:
        """bool ``[c]``: the channels at their full size; none in a trial, whose loss is to be the outputs' alone."""
        return self.staying if self._saved is None else torch.zeros_like(self._gone)

    @property
    def cycle_steps(self) -> int:
        """Steps of a cycle."""
        return max(2, round(self.cycles.share * self.steps / self.cycles.most))

    def _periods(self, steps: int) -> list[int]:
        """Those of HESSO: the cycles are the end of the warm-up, or follow its first step where it is too short."""
        bounds = super()._periods(steps)
        late = max(0, 1 + self.cycles.most * self.cycle_steps - bounds[0])
        return [bound + late for bound in bounds]

    # -- the cycles

    def _scores(self) -> Tensor:
        """Those of the network as it is, each by what the trials made of its first one."""
        return super()._scores() * self._correction

    def _begin(self) -> None:
        """The next cycle, or the end of them."""
        scores = self._scores()
        picked = self._select(scores)
        violating = picked & ~self._tried
        if not bool(violating.any()) or len(self.violations) == self.cycles.most:
            self._are_over = True
            earlier = self._bounds[0] - (self.number + 1)
            self._bounds = [bound - earlier for bound in self._bounds]
            return
        self.violations.append(int(violating.sum()))
        self._tried |= violating
        self._violating = violating
        order = torch.where(violating, scores, torch.inf).argsort(stable=True)[: self.violations[-1]]
        self._rank[order] = torch.arange(len(order), dtype=torch.float64) / len(order)
        self._factor = torch.ones_like(self._factor)
        self._saved, self._place = snapshot(self.model, self.optimizer), 0
        self._try()

    def _after(self) -> None:
        if self._are_over:
            super()._after()
            return
        if self._saved is not None:
            self._place += 1
            if self._place < self.cycle_steps:
                self._try()
                return
            restore(self.model, self.optimizer, self._saved)
            self._saved = None
            self._correct()
        if self.number + 1 >= self._bounds[0] - self.cycles.most * self.cycle_steps:
            self._begin()

    def _running(self) -> tuple[RunningScores, Tensor]:
        return super()._running() if self._saved is None else (self.trial, self._violating)

    def _correct(self) -> None:
        """Take what the cycle found into the scores of the violating set, whose sum stays."""
        if self.trial.steps:
            scores = self._scores()
            tried = scores[self._violating].mean() * self.trial.combined(self.weights, self._violating)
            share = self.trial.steps / (self.trial.steps + self.scores.steps)
            change = torch.where(scores > 0, scores.lerp(tried, share) / scores, 1.0)
            self._correction = torch.where(self._violating, self._correction * change, self._correction)
        self.trial.begin_anew()

    def _try(self) -> None:
        """Shrink the violating channels for the next step."""
        factor = torch.where(self._violating, trial_factors(self._rank, self._level()), 1.0)
        self._scale(self._violating, factor / self._factor.clamp(min=torch.finfo(torch.float64).tiny))
        self._factor = factor

    def _level(self) -> float:
        """The sparsity that is tried in this step: rising, each drawn from a part of 0 to 1 of its own."""
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.violations))
        levels = torch.rand(self.cycle_steps, generator=drawn, dtype=torch.float64)
        return float((self._place + levels[self._place]) / self.cycle_steps)

    def _reference(self) -> dict[str, Tensor]:
        if self._saved is None:
            return super()._reference()
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {name: self._saved.tensors[names[id(p)]] for name, p in self._parameters().items()}

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        saved = None if self._saved is None else {"tensors": self._saved.tensors, "states": list(self._saved.states)}
        return {
            **super().state_dict(),
            "violations": list(self.violations),
            "place": self._place,
            "are_over": self._are_over,
            "correction": self._correction.clone(),
            "trial": self.trial.state_dict(),
            "tried": self._tried.clone(),
            "violating": self._violating.clone(),
            "rank": self._rank.clone(),
            "factor": self._factor.clone(),
            "saved": copy.deepcopy(saved),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.violations, self._place = list(state["violations"]), int(state["place"])
        self._are_over, self._correction = bool(state["are_over"]), state["correction"].clone()
        self.trial.load_state_dict(state["trial"])
        self._tried, self._violating = state["tried"].clone(), state["violating"].clone()
        self._rank, self._factor = state["rank"].clone(), state["factor"].clone()
        saved = copy.deepcopy(state["saved"])
        states = None if saved is None else tuple((key, value) for key, value in saved["states"])
        self._saved = None if saved is None or states is None else Snapshot(saved["tensors"], states)


def trial_factors(rank: Tensor, level: float) -> Tensor:
    """What channels are multiplied by: at level 0 by 1, at 1 by 0, the lower ranks first, each over half of the way."""
    return (1 - (2 * level - rank)).clamp(0, 1)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Snapshot:
    """Copies of parameters, buffers and the optimizer's state; not of its learning rates, which follow a schedule."""
    tensors = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    if optimizer is None:
        return Snapshot(tensors, ())
    numbers = {id(p): number for number, p in enumerate(_stepped(optimizer))}
    states = tuple((numbers.get(id(key), key), copy.deepcopy(value)) for key, value in optimizer.state.items())
    return Snapshot(tensors, states)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer | None, saved: Snapshot) -> None:
    """Put a training back, bit for bit."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(saved.tensors[name])
    if optimizer is not None:
        parameters = _stepped(optimizer)
        optimizer.state.clear()
        for key, value in saved.states:
            optimizer.state[parameters[key] if isinstance(key, int) else key] = copy.deepcopy(value)


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

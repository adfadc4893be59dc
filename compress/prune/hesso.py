"""HESSO: channels go while the network trains, inside any training loop and with any torch optimizer.

After a warm-up, each of a few periods picks the least salient channels up to its part of the budget. While the period
lasts, all that belongs to them is multiplied by a factor that falls to zero; then it is held at zero, the optimizer's
state too, and the rest trains on. What is left is cut out: the smaller network computes what the whole one does.

    hesso = Hesso(model, optimizer, example_inputs, budget="macs=50%", steps=250)
    for x, y in loader:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        hesso.step()
    small = hesso.compress()

Source: Chen et al. 2024 (arXiv:2409.09085): here the budget is one of cost, not a count of groups.
Cost: of a step in the warm-up and the periods, three products the size of the parameters; after them, one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..budget import Budget, parse_budget
from ..errors import BudgetError, InputError, NumericsError, UsageError
from ..graph.cut import cut
from ..graph.graph_forward import why_graph
from ..graph.groups import find_channels
from ..graph.reload import ReloadError, sliced
from ..graph.rewrite import move, tensor_names
from ..graph.trace import Graph, trace_graph
from ..pruned import check_cut, with_tensors
from .channel_places import copy_of, find_places, scale_channels, tensors_of
from .channel_plan import LEAST, movable_channels
from .cut_target import Cost, CutTarget, keep_of
from .group_saliency import CRITERIA, RunningScores, channel_sums
from .selection import require_prunable

DEFAULT = "macs=50%"
STEPS = 250
# Of the criteria. The curvature alone beats the published five by three points on the demo's network at half the MACs.
WEIGHTS: Mapping[str, float] = {"curvature": 1.0}
PUBLISHED: Mapping[str, float] = dict.fromkeys(
    ("magnitude", "average-magnitude", "cosine", "first-order", "second-order"), 1.0
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When what happens, as shares of the training's steps.

    Attributes:
        warm_up: Ordinary training, in which saliencies are taken.
        pruning: All periods together; what is left of the steps trains the smaller network.
        periods: The most; no more than there are steps for.
    """

    warm_up: float = 0.1
    pruning: float = 0.4
    periods: int = 10

    def __post_init__(self) -> None:
        if not (0 < self.warm_up < 1 and self.pruning > 0 and self.warm_up + self.pruning <= 1 and self.periods > 0):
            raise UsageError(
                f"a warm-up of {self.warm_up:g} and {self.periods} periods of {self.pruning:g} of the steps together",
                hint="both are shares above 0, at most 1 together; 1 period or more",
            )


class Hesso:
    """A training that ends in a smaller network.

    Args:
        model: Of any class, or an exported graph; its tensors are changed in place. What ``torch.compile`` and data
            parallelism wrap is taken out.
        optimizer: Steps on the model's parameters. May be set later, as ``hesso.optimizer``.
        example_inputs: Tensors ``[n, ...]`` of one ``n``, or of 1: forward's arguments in order, or by name.
        budget: ``macs``, ``params``, ``bytes`` of the parameters, ``sparsity`` (share of all channels that goes), or
            any other quantity that ``cost`` gives.
        steps: Of the whole training: calls of ``step``, not batches. By the usual schedule all that goes is at zero
            after half of them; the training may be longer.
        schedule: When channels are picked and shrunk.
        weights: Of the criteria in ``group_saliency.CRITERIA``, by name; ``PUBLISHED`` are the paper's five.
        multiple_of: What a group that loses channels keeps is a multiple of this.
        least: Share of each group that stays in any case; one channel always does.
        exclude: Globs of weights whose channels stay.
        cost: The budget's quantity for the channels that stay, by group; measured latency, say. Called about thirty
            times.

    Raises:
        BudgetError: The budget is out of reach; gives the least that is left. Or no channel can go: lists the reasons.
        UsageError: An option that is none, a glob that matches nothing, or an optimizer of another model.
        InputError: torch.export can't trace the model.
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
        weights: Mapping[str, float] = WEIGHTS,
        multiple_of: int | None = 1,
        least: float = LEAST,
        exclude: Sequence[str] = (),
        cost: Cost | None = None,
    ) -> None:
        self.budget = parse_budget(budget) if isinstance(budget, str) else budget
        self.schedule = Schedule() if schedule is None else schedule
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        _require(model=(model, nn.Module), budget=(self.budget, Budget), steps=(steps, int))
        _require(schedule=(self.schedule, Schedule), weights=(weights, Mapping))
        self.model, self.optimizer = _unwrapped(model), optimizer
        self.weights = _checked(weights)
        self.settings: dict[str, Any] = {
            "method": type(self).__name__, "budget": str(self.budget), "steps": steps, "weights": self.weights,
            "schedule": asdict(self.schedule), "multiple_of": multiple_of, "least": least, "exclude": list(exclude),
        }  # fmt: skip
        if optimizer is not None:
            _require_steps_on(self.model, optimizer)
        self.graph = _traced(self.model, example_inputs)
        self.channels = find_channels(self.graph)
        self.count = self.channels.count
        self.places = find_places(self.channels)
        self.number = 0
        self.steps = steps
        self._bounds = self._periods(steps)
        if self.num_steps > steps:
            raise UsageError(
                f"all that goes is at zero after {self.num_steps} steps, and steps={steps}",
                hint="give more steps, or shorter shares of them",
            )

        self._movable = movable_channels(self.channels, self.graph, exclude) & self._is_own()
        held = "--exclude" if exclude else ""
        require_prunable(self.channels, is_any=bool(self._movable.any()), held=held)
        self.target = CutTarget(
            self.channels,
            self.graph,
            self.budget,
            self._movable,
            multiple_of=multiple_of,
            least=least,
            cost=cost,
            itemsize=_itemsize(self.model),
        )

        self.scores = RunningScores(tuple(self.weights), self.count)
        self._may_overflow = False
        self._is_trained = torch.zeros(self.count, dtype=torch.bool)
        self._gone = torch.zeros(self.count, dtype=torch.bool)  # at zero
        self._leaving = torch.zeros(self.count, dtype=torch.bool)  # on their way
        self.ranked = torch.zeros(self.count, dtype=torch.float64)  # the saliencies of the last pick with each channel

    @property
    def kept(self) -> dict[str, list[int]]:
        """The channels of each group that stay, as far as it is decided."""
        return keep_of(self.channels, self.staying)

    @property
    def staying(self) -> Tensor:
        """bool ``[c]``: the channels that aren't on their way out."""
        return ~(self._gone | self._leaving)

    @property
    def unshrunk(self) -> Tensor:
        """bool ``[c]``: the channels at their full size."""
        return self.staying

    @property
    def num_steps(self) -> int:
        """Steps after which the cut is decided and all of it is at zero."""
        return self._bounds[-1]

    def cost(self) -> float:
        """What stays costs this, in the budget's quantity; the number of channels for a sparsity."""
        return self.target.cost_of(self.staying)

    def step(self, closure: Callable[[], Any] | None = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """The optimizer's step, and what the schedule has for it. Call it after ``backward``.

        Args:
            closure: For optimizers that evaluate the loss themselves.
            scaler: Of mixed precision; its own ``update`` is left to the caller.

        Returns:
            What the optimizer's step returns.

        Raises:
            NumericsError: A saliency isn't finite.
        """
        if self.optimizer is None:
            raise UsageError("there is no optimizer to step", hint="set hesso.optimizer, or pass it to Hesso")
        if self.number == 0:
            _require_steps_on(self.model, self.optimizer)
        if scaler is not None and scaler.is_enabled():
            _unscale(scaler, self.optimizer)
            self._may_overflow = True
        self._before(closure is not None)
        result: Any
        if closure is not None:
            result = self.optimizer.step(self._observing(closure))
        elif scaler is not None:
            result = scaler.step(self.optimizer)
        else:
            result = self.optimizer.step()
        with torch.no_grad():
            self._after()
        self.number += 1
        return result

    def compress(self, model: nn.Module | None = None) -> nn.Module:
        """The smaller network, of the model's class.

        Warns where the class's own code can't compute it, and the exported graph of it does.

        Args:
            model: A network of the same class whose weights are to be taken, as a moving average of the model's: what
                goes is cut out of it as well, whatever it holds there.

        Raises:
            UsageError: Channels are still on their way out, or the model isn't zero there any more.
            GateError: The cut network isn't the masked one; names the group.
        """
        if self.number < self.num_steps:
            raise UsageError(
                f"{self.number} of the {self.num_steps} steps are made after which all that goes is at zero",
                hint=f"call hesso.step() in every step, or lower steps={self.steps}",
            )
        kept = ~self._gone
        source = self.model if model is None else _unwrapped(model)
        copied = copy_of(source)
        if model is None:
            self._require_zero(tensors_of(copied))
        else:
            self._require_alike(copied)
            with torch.no_grad():
                scale_channels(self.places, tensors_of(copied), self._factors())
        check_cut(self.graph, self.channels, kept, seed=0)
        small = self._sliced(copied, kept)
        return move(small, next(source.parameters()).device)

    def _require_alike(self, other: nn.Module) -> None:
        shapes = [{name: tuple(t.shape) for name, t in tensors_of(m).items()} for m in (self.model, other)]
        for name, shape in shapes[0].items():
            if shapes[1].get(name) != shape:
                raise UsageError(
                    f"{name} has shape {shapes[1].get(name)} in the network to compress, {shape} in the trained one",
                    hint="give a network of the same class and sizes, such as a copy with averaged weights",
                )

    def _require_zero(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a network in which what is cut isn't zero: without it another one would be left."""
        gone = torch.cat([self._gone, torch.zeros(1, dtype=torch.bool)])
        for place in self.places:
            tensor, places = tensors.get(place.tensor), gone[place.channel].nonzero().reshape(-1)
            if tensor is not None and bool(tensor.detach().index_select(place.dim, places.to(tensor.device)).any()):
                raise UsageError(
                    f"{place.tensor} isn't zero where it is cut: it was changed after the last hesso.step()",
                    hint="let hesso.step() be the last that writes; other weights: hesso.compress(other_model)",
                )

    def _sliced(self, copied: nn.Module, kept: Tensor) -> nn.Module:
        if not isinstance(copied, fx.GraphModule):
            name = type(copied).__name__
            try:
                small = sliced(copied, self.graph, self.channels, kept)
            except ReloadError as error:
                warnings.warn(f"{name} can't hold what is left, and a graph is: {error.message}", stacklevel=3)
            else:
                if why_graph(small):
                    warnings.warn(f"{name}: {why_graph(small)}", stacklevel=3)
                return small
        small = cut(self.channels, with_tensors(self.channels.module, tensors_of(copied)), kept)
        read = tensor_names(small)
        for name, _ in list(small.named_parameters(remove_duplicate=False)):
            if name not in read:  # other names of tied weights, which still have the whole's shape
                path, _, last = name.rpartition(".")
                del small.get_submodule(path)._parameters[last]
        trained = dict(copied.named_parameters(remove_duplicate=False))
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(name in trained and trained[name].requires_grad)
        return small

    # -- saliency

    def _is_observing(self) -> bool:
        """Whether this step's gradients are looked at: up to where the last period picks."""
        return self.number <= self._bounds[-2]

    def _before(self, has_closure: bool) -> None:
        if self._is_observing() and not has_closure:
            self._observe()

    def _observing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, whose first gradients are those of the parameters as they are."""
        is_seen = not self._is_observing()

        def observed() -> Any:
            nonlocal is_seen
            loss = closure()
            if not is_seen:
                is_seen = True
                self._observe()
            return loss

        return observed

    def _observe(self) -> None:
        gradients = {name: p.grad for name, p in self._parameters().items() if p.grad is not None}
        if self.number == 0:
            self._check_gradients(gradients)
        sums = channel_sums(self.places, self._reference(), gradients, self.count)
        self._is_trained |= sums.is_trained
        # The gradients of a scaled loss that overflowed say nothing, and the scaler leaves their step out too.
        if not self._may_overflow or bool(torch.isfinite(sums.gg).all()):
            scores, among = self._running()
            scores.add(sums, among)

    def _check_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Refuse a first step in which no channel has a gradient; warn of what trains beside the graph."""
        if not gradients.keys() & {place.tensor for place in self.places}:
            raise UsageError("no channel's parameters have gradients", hint="call hesso.step() after loss.backward()")
        graph = self.channels.module.graph
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
        read |= {name for names in self.graph.tied for name in names}
        beside = sorted(gradients.keys() - read)
        if beside:
            named = ", ".join(beside[:3]) + " and others" * (len(beside) > 3)
            warnings.warn(
                f"{named}: trained, but not run in evaluation: they keep their shapes, and the smaller network may not "
                "run in training mode",
                stacklevel=4,
            )

    def _running(self) -> tuple[RunningScores, Tensor]:
        """What this step's saliencies are added to, and the channels whose mean is made 1."""
        return self.scores, self._stays()

    def _reference(self) -> dict[str, Tensor]:
        """The parameters whose channels the gradients are to weigh."""
        return self._parameters()

    def _parameters(self) -> dict[str, Tensor]:
        """By every name that the places may use."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _stays(self) -> Tensor:
        return self._movable & self.staying

    # -- the schedule

    def _periods(self, steps: int) -> list[int]:
        """The step at which each period starts, and after them the one at which the last ends."""
        first = max(1, round(self.schedule.warm_up * steps))
        length = max(1, round(self.schedule.pruning * steps))
        if steps < 2:
            raise UsageError(f"steps={steps} leave no time to prune", hint="a warm-up and a period need 2 at least")
        periods = min(self.schedule.periods, length)
        return [first + round(length * p / periods) for p in range(periods + 1)]

    def _after(self) -> None:
        """Pick, shrink, and hold at zero."""
        number, bounds = self.number, self._bounds
        if bounds[0] <= number < bounds[-1]:
            period = sum(bound <= number for bound in bounds) - 1
            if number == bounds[period]:
                self._pick(period)
            left = bounds[period + 1] - number
            # From one step to the next by (left - 1) / left: at the period's end, by any path, zero.
            self._scale(self._leaving, (left - 1) / left)
            if left == 1:
                self._gone |= self._leaving
                self._leaving = torch.zeros_like(self._gone)
        self._hold()

    def _pick(self, period: int) -> None:
        """The next channels that go: the cut at this period's part of the budget."""
        share = (period + 1) / (len(self._bounds) - 1)
        scores = self._scores()
        self.scores.begin_anew()
        self.ranked = torch.where(self._gone, self.ranked, scores)
        self._leaving = self._select(scores, share) & ~self._gone

    def _scores(self) -> Tensor:
        """float64 ``[c]``; zero for what is gone already."""
        if not bool((self._movable & self._is_trained).any()):
            raise BudgetError("no channel's parameters had gradients that aren't zero", hint="train some of them")
        if not self.scores.steps:
            raise NumericsError("no step had finite gradients", hint="lower the loss scale or the learning rate")
        self._movable &= self._is_trained
        return torch.where(self._gone, 0.0, self.scores.combined(self.weights, self._stays()))

    def _select(self, scores: Tensor, share: float = 1.0) -> Tensor:
        """bool ``[c]``: what goes for a share of all that the budget removes."""
        return ~self.target.choose(scores, share, self._movable | self._gone, self._gone)

    def _is_own(self) -> Tensor:
        """bool ``[c]``: channels all of whose tensors are the model's, and can be held at zero."""
        own = tensors_of(self.model).keys()
        found = torch.ones(self.count + 1, dtype=torch.bool)
        for place in self.places:
            if place.tensor not in own:
                found[place.channel] = False
        return found[: self.count]

    # -- tensors

    def _scale(self, which: Tensor, factor: float | Tensor) -> None:
        """Multiply the parameters of some channels, and of each of its own."""
        factors = torch.ones(self.count + 1, dtype=torch.float64)
        factors[: self.count][which] = factor if isinstance(factor, float) else factor[which].double()
        scale_channels(self.places, self._parameters(), factors)

    def _hold(self) -> None:
        """Parameters, buffers and optimizer state of what is gone to zero: momentum would revive it."""
        if not bool(self._gone.any()):
            return
        factors, tensors = self._factors(), tensors_of(self.model)
        scale_channels(self.places, tensors, factors)
        if self.optimizer is not None:
            for place in self.places:
                parameter = tensors.get(place.tensor)
                if parameter is not None and parameter in self.optimizer.state:
                    for value in self.optimizer.state[parameter].values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                            scale_channels([place], {place.tensor: value}, factors)

    def _factors(self) -> Tensor:
        """float64 ``[c + 1]``: zero for what is gone, one for all else."""
        return torch.cat([(~self._gone).double(), torch.ones(1, dtype=torch.float64)])

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside the model's and the optimizer's own state."""
        return {
            "settings": dict(self.settings),
            "number": self.number,
            "bounds": list(self._bounds),
            "groups": [(group.name, group.size) for group in self.channels.groups],
            "gone": self._gone.clone(),
            "leaving": self._leaving.clone(),
            "ranked": self.ranked.clone(),
            "movable": self._movable.clone(),
            "is_trained": self._is_trained.clone(),
            "target": self.target.state_dict(),
            "scores": self.scores.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            InputError: It is of another network, or of other settings.
        """
        groups = [(group.name, group.size) for group in self.channels.groups]
        if [tuple(group) for group in state["groups"]] != groups:
            raise InputError(
                f"the state is of a network with {len(state['groups'])} channel groups, this one has {len(groups)}",
                hint="resume with the model that was trained",
            )
        given = state.get("settings", {})
        for name, value in self.settings.items():
            if given.get(name) != value:
                raise InputError(
                    f"the state is of {name}={given.get(name)}, and this training has {name}={value}",
                    hint="resume with the settings that the training began with",
                )
        self.number, self._bounds = int(state["number"]), [int(bound) for bound in state["bounds"]]
        self._gone, self._leaving = state["gone"].clone(), state["leaving"].clone()
        self.ranked = state.get("ranked", self.ranked).clone()  # older states have none
        self._movable, self._is_trained = state["movable"].clone(), state["is_trained"].clone()
        self.target.load_state_dict(state["target"])
        self.scores.load_state_dict(state["scores"])


def _unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Once a step, as the caller may have done it to clip the gradients."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _checked(weights: Mapping[str, float]) -> dict[str, float]:
    unknown = [name for name in weights if name not in CRITERIA]
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UsageError(
            f"criteria {dict(weights)}"
            + (f": {unknown[0]!r} is none" if unknown else ": they need weights above zero"),
            hint=f"choices: {', '.join(CRITERIA)}",
        )
    return {name: float(weight) for name, weight in weights.items() if weight > 0}


def _require(**arguments: tuple[object, type]) -> None:
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            known = "text, as 'macs=50%'" if kind is Budget else kind.__name__
            raise UsageError(f"{name} is {value!r}, of type {type(value).__name__}", hint=f"give one of {known}")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, which has the same parameters."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "_orig_mod" in model._modules:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        assert inner is not None
        model = inner
    return model


def _itemsize(model: nn.Module) -> float:
    """Bytes of a parameter, on average."""
    parameters = list(model.parameters())
    return sum(p.numel() * p.element_size() for p in parameters) / max(1, sum(p.numel() for p in parameters))


def _require_steps_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise UsageError("the optimizer has none of the model's parameters", hint="make it of model.parameters()")


def _arguments(model: nn.Module, given: Sequence[Tensor] | Mapping[str, Tensor] | Tensor) -> tuple[Tensor, ...]:
    """Forward's arguments, in order.

    Raises:
        UsageError: They aren't tensors, or not batches of one size.
    """
    if isinstance(given, Mapping):
        try:
            given = tuple(inspect.signature(model.forward).bind(**given).args)
        except TypeError as error:
            raise UsageError(
                f"example_inputs aren't forward's arguments: {error}", hint="name them as it does"
            ) from None
    inputs = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor) or not x.dim():
            raise UsageError(
                f"example_inputs[{number}] is {'a number' if isinstance(x, Tensor) else type(x).__name__}",
                hint="give tensors [n, ...]; what else forward takes: wrap the network in a module that has it",
            )
    counts = sorted({len(x) for x in inputs} - {1})
    if not inputs or len(counts) > 1 or 0 in counts:
        raise UsageError(
            f"example_inputs have {', '.join(str(len(x)) for x in inputs) or 'no'} examples",
            hint="each is a batch [n, ...] of the same n; expand what is the same for all, as a mask",
        )
    return inputs


def _traced(model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | Tensor) -> Graph:
    """Of a copy on the processor in evaluation mode: the model itself keeps its mode, device and gradients."""
    inputs = _arguments(model, example_inputs)
    # Tracing takes a batch of one for a constant.
    pairs = tuple(torch.cat([x, x]) if len(x) == 1 else x[:2] for x in (x.detach().cpu() for x in inputs))
    copied = copy_of(model).float().eval().requires_grad_(False)
    return trace_graph(copied, tuple(x.float() if x.is_floating_point() else x for x in pairs))

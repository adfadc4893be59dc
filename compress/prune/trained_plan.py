"""The plan of a method that trains: what it cut, and the values that the rest came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..context import Context
from ..errors import UsageError
from ..graph.channel_cost import ChannelCosts, channel_costs, total
from ..graph.cut import Keep, cut, kept_channels
from ..graph.groups import Channels, find_channels
from ..graph.rewrite import tensor_at, tensor_names
from ..graph.trace import Graph
from ..model import Source
from ..plan import Plan
from ..pruned import trainable_copy
from ..saliencies import saliency_histogram
from ..sensitivity import Sensitivity
from ..task import Calibration
from ..train.features import Features
from ..train.loop import Hooks, train
from ..train.recipe import Training
from .channel_plan import UNCUT, channel_plan, cost_figures, terms_of, within_reach
from .cut_target import Cost, keep_of
from .hesso import STEPS, Hesso

SALIENCY = "saliency of a channel over the mean of all that stayed, when channels were picked for the last time with it"
DEFAULT = Budget("macs", 0.5, "dense")
FEW_STEPS = 50  # ten picks of at most two gradients each, and as many steps of training


def _limit(
    budget: Budget, channels: Channels, costs: ChannelCosts, graph: Graph, context: Context
) -> tuple[str, float, Cost | None]:
    """The quantity that channels are cut by, its limit, and what measures it."""
    if budget.quantity == "sparsity":
        return "sparsity", budget.limit, None
    if budget.quantity != "latency" or context.latency is None:
        terms, limit = terms_of(budget, costs, context)
        return "macs" if terms is costs.macs else "params", limit, None
    latency, known = context.latency, dict[tuple[int, ...], float]()

    def measured(keep: Keep) -> float:
        """Latency depends on how many channels each group keeps, not on which."""
        sizes = tuple(len(keep[group.name]) for group in channels.groups)
        if sizes not in known:
            known[sizes] = latency(cut(channels, channels.module, kept_channels(channels, keep)))
        return known[sizes]

    whole = keep_of(channels, torch.ones(channels.count, dtype=torch.bool))
    return "latency", budget.absolute(measured(whole)), measured


def _is_within(
    quantity: str, limit: float, cost: Cost | None, channels: Channels, costs: ChannelCosts, kept: Tensor
) -> bool:
    """Whether the channels that stay, bool ``[c]``, keep a limit of ``_limit``."""
    if quantity == "sparsity":
        return int((~kept).sum()) >= limit * len(kept)
    found = total(costs.of(quantity), kept) if cost is None else cost(keep_of(channels, kept))
    return float(found) <= limit


def trained_plan(
    name: str,
    make: type[Hesso],
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Train a network while its channels go.

    Args:
        name: Of the method.
        budget: ``macs``, ``params``, ``bytes`` of the delivered file, ``latency`` or ``sparsity``, the share of all
            channels that goes; None means half the MACs.
        options: ``multiple_of``, ``exclude`` (globs of weights whose channels stay).
        context: Its ``training`` says on what and for how long.

    Returns:
        The plan and its sidecar: the new values by tensor.

    Raises:
        BudgetError: More is to be removed than can be cut, or nothing can; gives the feasible minimum.
        UsageError: A glob matches no weight, or there are too few steps.
        NumericsError: The loss is no longer finite.
    """
    training: Training | None = context.training
    if training is None:
        raise UsageError(f"method {name} trains", hint="pass --train DATA")
    channels = find_channels(graph)
    costs = channel_costs(channels, len(graph.example_inputs[0]))
    budget = budget or DEFAULT
    quantity, limit, cost = _limit(budget, channels, costs, graph, context)
    exclude, multiple_of = tuple(options.get("exclude") or ()), options.get("multiple_of")
    recorded = {"exclude": list(exclude), "multiple_of": multiple_of}
    state = dict(source.module.state_dict())
    whole = torch.ones(channels.count, dtype=torch.bool)
    if _is_within(quantity, limit, cost, channels, costs, whole):
        context.notes.append(f"{UNCUT}, so that nothing was trained")
        return channel_plan(
            name,
            source,
            channels,
            whole,
            channels.module,
            (),
            calibration=calibration,
            budget=budget,
            options=recorded,
            predicted=cost_figures(costs, whole),
        )
    module, teacher = trainable_copy(graph, state), trainable_copy(graph, state)

    def opened(limit: float) -> Hesso:
        return make(
            module,
            None,
            graph.example_inputs,
            budget=Budget(quantity, limit),
            steps=training.recipe.steps,
            multiple_of=multiple_of,
            exclude=exclude,
            cost=cost,
        )

    method = within_reach(budget, opened, limit, graph=graph, channels=channels, options=options)
    context.notes.append(f"{name}: all that goes is at zero after {method.num_steps} of {training.recipe.steps} steps")
    if training.recipe.steps < FEW_STEPS:
        context.notes.append(
            f"{name}: {training.recipe.steps} steps are few to find what goes and to train what stays: "
            f"--recover-steps {STEPS} is the default"
        )

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        method.optimizer = optimizer
        method.step()

    trained = train(
        module,
        training.data,
        calibration.task,
        training.recipe,
        teacher=teacher,
        calibration=calibration.data,
        seed=training.seed,
        device=context.device,
        progress=context.progress,
        features=Features(channels, lambda: method.unshrunk),
        hooks=Hooks(
            step=step,
            state=method.state_dict,
            restore=method.load_state_dict,
            may_keep=lambda: method.number >= method.num_steps,
            settings={**recorded, "method": name, "budget": asdict(budget), "overhead": context.overhead},
        ),
        journal=training.journal,
        resume=training.resume,
    )
    context.notes.append(trained.moved())
    kept = kept_channels(channels, method.kept)
    context.saliencies.append(saliency_histogram(method.ranked, kept, what=SALIENCY, of="channels"))
    if bool(kept.all()):
        context.notes.append(UNCUT)
    read = tensor_names(module) & state.keys()
    changed = {target for target in read if not torch.equal(tensor_at(module, target), state[target])}
    return channel_plan(
        name,
        source,
        channels,
        kept,
        module,
        changed,
        calibration=calibration,
        budget=budget,
        options={**recorded, "recover": asdict(training.recipe)},
        predicted=cost_figures(costs, kept),
    )

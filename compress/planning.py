"""From a goal to a plan whose written files keep it: decide, build, look at what came out, and pick again.

A budget of bytes or of latency is met by the files, not by what was predicted of them. Without a budget, the smallest
model is searched for whose metric the gates let through: the one step that selects on the evaluation data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from . import canonical, equalizing, measuring, recovery, store
from .apply import apply_plan, assemble, masks_of
from .bench import measure_latency
from .budget import Budget, parse_budget, rounded_up
from .build import (
    Built,
    Dense,
    absolute_budget,
    build,
    delivered_name,
    form_of,
    infeasible,
    overhead_of,
    plain_onnx,
    planning_context,
    sealed,
    write_plan,
)
from .context import Context
from .errors import BudgetError, InputError, UsageError, escape
from .export import onnx_model, serialize
from .figures import LATENCY_SLACK
from .finish import LATENCY_THREADS, read_evaluation, timed
from .frontier import FLOAT_BITS, FrontierRecord, read_frontier
from .frontier import NAME as FRONTIER
from .graph.groups import find_channels
from .graph.trace import trace_graph
from .job import Job, input_specs, method_options
from .latency import cached_latency_table
from .pattern import UNSTRUCTURED, parse_pattern
from .plan import Plan, Quantize, weight_scheme
from .prune.channel_places import find_places
from .prune.group_saliency import channel_sums
from .pruned import kept_of
from .quantize.calibrate import activation_decisions, calibrated
from .registry import METHODS, Method, find_method, load_module
from .saliencies import Saliencies, saliency_histogram
from .sensitivity import CostTable, Sensitivity
from .settings import DYNAMIC, MIXED, Settings
from .task import Task
from .train.journal import journal_of_pass
from .train.recipe import Training
from .verdict import Gates, metric_checks
from .verify import Session, evaluate, open_session, runtime_forward

DEFAULT_DROP = 1.0  # percentage points, where nothing else says what may be lost
RESOLUTION = 0.01  # of the dense file's bytes: a search ends when the next step is smaller
ROOM = 0.002  # of a budget of bytes: what may be left of it
LATENCY_REPEATS = 60
LATENCY_TRIES = 8
FIRST_SHARE = 0.6  # of the MACs: the first network that a latency is measured of
LEAST_SHARE = 0.02  # of the MACs: a search ends when two networks are nearer
CLOSE_LATENCY = 0.95  # of the budget: a network this near is not made slower again
DENSE_LATENCY = "dense latency"  # in the memo of a job
WIDTHS = (*range(2, 9), FLOAT_BITS)


@dataclass(frozen=True, slots=True)
class Decided:
    """A plan with its sidecar, the frontier that it is a point of, and the saliencies of what it keeps and removes."""

    plan: Plan
    sidecar: Mapping[str, Tensor]
    frontier: FrontierRecord | None = None
    saliencies: Saliencies | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan is made for.

    Attributes:
        gates: What the search looks at where there is no budget.
        journal: Where a training keeps its state.
        resume: Whether it goes on from there.
    """

    method: Method
    budget: Budget | None
    gates: Gates
    dense: Dense
    stage: Path
    journal: Path | None = None
    resume: bool = False


def is_searched(method: Method, budget: Budget | None, settings: Settings) -> bool:
    """Whether the smallest model within the gates is looked for: nothing else says how small it is to be."""
    pattern = settings["pattern"].value if "pattern" in method.options else UNSTRUCTURED
    return method.searches and budget is None and parse_pattern(str(pattern)).quota is None


def require_counted_activations(method: Method, budget: Budget | None, settings: Settings) -> None:
    """Widths of activations are chosen where the budget counts their bits.

    Raises:
        UsageError: It doesn't, or the method has one width for all activations.
    """
    if "activations" not in method.options or settings["activations"].value != MIXED:
        return
    if "bops" not in method.budgets:
        others = [m.name for m in METHODS if m.job == method.job and "bops" in m.budgets]
        raise UsageError(
            f"method {method.name} has one width for all activations",
            hint=f"pass --method {' or '.join(others)} with --activations mixed, or --activations 8, 6 or 4",
        )
    if budget is None or budget.quantity != "bops":
        given = "without a budget" if budget is None else f"for the budget {budget}"
        raise UsageError(
            f"--activations mixed: {given} the bits of activations cost nothing, so that there is nothing to choose",
            hint="pass --budget bops=5% or so, which counts them, or --activations 8, 6 or 4",
        )


def search_gates(method: Method, budget: Budget | None, gates: Gates, settings: Settings, task: Task) -> Gates:
    """The gates of a run: with one point of the metric where a search has nothing else to go by.

    Raises:
        UsageError: The metric isn't in percent, and nothing says what may be lost.
    """
    if not is_searched(method, budget, settings) or gates.max_drop is not None or gates.min_metric is not None:
        return gates
    if task.unit != "%":
        raise UsageError(
            f"nothing says how small the model is to be, or how much {task.name} ({task.unit}) may get worse",
            hint="pass --budget, or --max-drop X for the smallest model within it",
        )
    return replace(gates, max_drop=DEFAULT_DROP)


def make_plan(job: Job, goal: Goal) -> tuple[Decided, Built, dict[str, Sensitivity]]:
    """The plan that meets the goal, with its files in the stage.

    Raises:
        BudgetError: The goal is out of reach; gives the feasible minimum.
    """
    training = None
    if goal.method.trains:
        training = recovery.training(job, journal=goal.journal, resume=goal.resume)
    context = planning_context(job, goal.dense, 0)
    measures = (*goal.method.measures, *(goal.method.mixed_measures if job.value("activations") == MIXED else ()))
    sensitivities = {name: measuring.take(job, name, context).record for name in measures}
    quantity = None if goal.budget is None else goal.budget.quantity
    recovers = not goal.method.trains and recovery.is_asked(job.settings)
    if is_searched(goal.method, goal.budget, job.settings):
        decided, built = _search(job, goal, sensitivities)
    elif quantity == "latency" and goal.method.job == "quantize":
        costs = {"latency": _latency_table(job, goal.method, context)}
        decided = _decide(job, goal, sensitivities, costs, overhead=0)
        decided, built = _within_latency(job, goal, *publish(job, decided, goal.stage))
    elif quantity == "latency" and goal.method.trains:
        decided, built = _trained_to_latency(job, goal, sensitivities, training)
    elif quantity == "latency":
        decided = _decide(job, goal, sensitivities, {}, overhead=0, budget=Budget("macs", FIRST_SHARE, "dense"))
        decided, built = _within_latency_of_channels(job, goal, *publish(job, decided, goal.stage))
    else:
        decided = _decide(job, goal, sensitivities, {}, overhead=0, training=training)
        if recovers and quantity != "bytes":  # no file has to be looked at first
            decided, recovers = recovered(job, decided, goal.journal, resume=goal.resume), False
        published = publish(job, decided, goal.stage)
        if quantity == "bytes" and not recovers:
            published = _filled(job, goal, *published)
        decided, built = _within_bytes(job, goal, *published, sensitivities, training)
    if recovers:
        decided, built = publish(job, recovered(job, decided, goal.journal, resume=goal.resume), goal.stage)
    return decided, built, sensitivities


def saliencies_of(job: Job, decided: Decided) -> Saliencies | None:
    """Those that the method ranked by; magnitudes where it left none, as a plan that is followed does.

    Returns:
        None where nothing is removed.
    """
    plan, state = decided.plan, job.source.module.state_dict()
    if decided.saliencies is not None:
        return decided.saliencies
    if masks := masks_of(plan, decided.sidecar, state):
        values = torch.cat([state[name].detach().flatten().abs() for name in masks])
        kept = torch.cat([mask.flatten() for mask in masks.values()])
        return saliency_histogram(values, kept, what="magnitude of the checkpoint's weights")
    if not plan.channels():
        return None
    channels = find_channels(job.graph)
    norms = channel_sums(find_places(channels), state, {}, channels.count).ww.sqrt()
    kept = kept_of(channels, plan.channels())
    return saliency_histogram(norms, kept, what="norm of all weights of the channel", of="channels")


def recovered(job: Job, decided: Decided, journal: Path | None, *, resume: bool) -> Decided:
    """The plan after training."""
    plan, tensors = recovery.recovered(job, decided.plan, decided.sidecar, journal=journal, resume=resume)
    plan, tensors = sealed(plan, tensors)
    return replace(decided, plan=plan, sidecar=tensors)


def _decide(
    job: Job,
    goal: Goal,
    sensitivities: Mapping[str, Sensitivity],
    costs: Mapping[str, CostTable],
    *,
    overhead: int,
    training: Training | None = None,
    budget: Budget | None = None,
) -> Decided:
    """The plan for the goal's budget, or for another one on the way to it."""
    job.progress("plan", 0, None)
    context = planning_context(job, goal.dense, overhead)
    latency = partial(_exported_latency, job, goal.dense)
    context = replace(context, costs=costs, training=training, memo=job.memo, is_swept=job.is_swept, latency=latency)
    plan, tensors = load_module(goal.method).plan(
        job.source,
        job.graph,
        sensitivities,
        job.calibration,
        absolute_budget(budget or goal.budget, goal.dense),
        planner_options(job, goal.method),
        context,
    )
    return _completed(job, goal.budget, plan, tensors, context)


def require_groups(job: Job, method: Method) -> None:
    """Groups of inputs, where they are asked for, are those of linear layers with float activations.

    Raises:
        UsageError: Activations are rounded, or there is no linear layer.
    """
    options = method_options(job, method.options)
    if options.get("group_size") is None:
        return
    if options["activations"] != "float":
        raise UsageError(
            f"--group-size {options['group_size']} goes with float activations, not with --activations "
            f"{options['activations']}: no integer kernel multiplies with several scales in one sum",
            hint="pass --activations float, or no --group-size",
        )
    if not any(layer.op == "linear" for layer in job.graph.layers):
        raise UsageError(
            f"--group-size {options['group_size']} is for linear layers, and the network has none",
            hint="leave it out: convolutions have a scale for each output channel",
        )


def planner_options(job: Job, method: Method) -> dict[str, Any]:
    """A method's settings; activations that are rounded as they come are floats to it, as they have no range."""
    options = method_options(job, method.options)
    return options | {"activations": "float"} if options.get("activations") == DYNAMIC else options


def _completed(job: Job, budget: Budget | None, plan: Plan, tensors: dict[str, Tensor], context: Context) -> Decided:
    plan, tensors = corrected(job, plan, tensors, context)
    if job.value("activations") == DYNAMIC and "activations" in plan.options:
        plan = replace(plan, options={**plan.options, "activations": DYNAMIC})
    if job.equalization:
        plan = replace(plan, options={**plan.options, equalizing.OPTION: dict(job.equalization)})
    job.notes.extend(note for note in context.notes if note not in job.notes)
    seed, inputs = int(job.value("seed")), input_specs(job.graph.example_inputs)
    plan, sidecar = sealed(replace(plan, budget=budget or plan.budget, seed=seed, inputs=inputs), tensors)
    frontier = context.frontiers[-1] if context.frontiers else None
    return Decided(plan, sidecar, frontier, context.saliencies[-1] if context.saliencies else None)


def _moved(job: Job, goal: Goal, decided: Decided, index: int) -> Decided:
    """The plan at another point of its frontier."""
    assert decided.frontier is not None
    context = planning_context(job, goal.dense, 0)
    plan = load_module(goal.method).at_point(decided.plan, job.graph, decided.frontier, index, context)
    return Decided(*sealed(*corrected(job, plan, {}, context)), context.frontiers[-1])


def corrected(job: Job, plan: Plan, tensors: dict[str, Tensor], context: Context) -> tuple[Plan, dict[str, Tensor]]:
    """The plan after its method's last step, which needs all other decisions: of the methods that have one."""
    module = load_module(find_method(_job_of(plan), plan.method))
    if not hasattr(module, "correct"):
        return plan, tensors
    corrected, found = module.correct(plan, job.source, job.graph, job.calibration, context)
    job.notes.extend(note for note in context.notes if note not in job.notes)
    return corrected, {**tensors, **found}


def _job_of(plan: Plan) -> str:
    return next(method.job for method in METHODS if method.name == plan.method)


def publish(job: Job, decided: Decided, stage: Path) -> tuple[Decided, Built]:
    """Write the plan, its model files and its frontier into the stage.

    Returns:
        What was decided, with a frontier whose bytes are those of the file that was written, and the files.
    """
    write_plan(stage, decided.plan, dict(decided.sidecar))
    built = build(job, decided.plan, decided.sidecar, stage)
    if decided.frontier is not None:
        if decided.frontier.quantity == "bytes":
            decided = _settled(decided, built.sizes[delivered_name(job.settings)])
        store.write_file(stage / FRONTIER, canonical.dumps(decided.frontier))
    return decided, built


def _settled(decided: Decided, amount: float) -> Decided:
    """The frontier shifted so that its point takes what was measured of it."""
    frontier = decided.frontier
    assert frontier is not None
    excess = amount - frontier.amount(frontier.costs[frontier.index])
    return replace(decided, frontier=replace(frontier, fixed=frontier.fixed + round(excess / frontier.scale)))


def _filled(job: Job, goal: Goal, decided: Decided, built: Built) -> tuple[Decided, Built]:
    """A larger point of the frontier where the written file leaves room: codes by stages take less than their bits."""
    limit = absolute_budget(goal.budget, goal.dense)
    assert limit is not None
    if decided.frontier is None or built.sizes[delivered_name(job.settings)] > (1 - ROOM) * limit.limit:
        return decided, built
    index = decided.frontier.within(limit.limit)
    if index is None or index <= decided.frontier.index:
        return decided, built
    return publish(job, _moved(job, goal, decided, index), goal.stage)


def _within_bytes(
    job: Job,
    goal: Goal,
    decided: Decided,
    built: Built,
    sensitivities: Mapping[str, Sensitivity],
    training: Training | None,
) -> tuple[Decided, Built]:
    """Lower what the weights may take by what the written file has beyond its budget, until it fits."""
    number, known = 1, 0
    while (overhead := overhead_of(job, built, decided.plan, goal.budget, goal.dense, known)) is not None:
        before, number, known = decided.plan.decisions, number + 1, overhead
        if training is not None and goal.journal is not None:
            training = replace(training, journal=journal_of_pass(goal.journal, number))
        if decided.frontier is None:
            decided = _decide(job, goal, sensitivities, {}, overhead=overhead, training=training)
        else:
            limit = absolute_budget(goal.budget, goal.dense)
            assert limit is not None
            decided = _moved(job, goal, decided, decided.frontier.within(limit.limit) or 0)
        if decided.plan.decisions == before:
            raise infeasible(job, built, goal.budget)
        decided, built = publish(job, decided, goal.stage)
    return decided, built


def _within_latency(job: Job, goal: Goal, decided: Decided, built: Built) -> tuple[Decided, Built]:
    """The best point whose written file is measured within the budget; predictions only say where to look."""
    assert goal.budget is not None and decided.frontier is not None
    limit = goal.budget.absolute(_dense_latency(job, goal.dense))
    low, high = -1, len(decided.frontier.costs)  # the last point within the budget, the first one beyond it
    tried: dict[int, float] = {}
    for _ in range(LATENCY_TRIES):
        assert decided.frontier is not None
        index = decided.frontier.index
        tried[index] = _measured_latency(job, goal.dense, built.onnx)
        decided = _settled(decided, tried[index])
        low, high = (max(low, index), high) if tried[index] <= limit else (low, min(high, index))
        if high - low <= 1 or CLOSE_LATENCY * limit <= tried[index] <= limit:
            break
        assert decided.frontier is not None
        wanted = decided.frontier.within(limit)
        decided = _moved(job, goal, decided, min(max(-1 if wanted is None else wanted, low + 1), high - 1))
        decided, built = publish(job, decided, goal.stage)
    if low < 0:
        decided, built = publish(job, _moved(job, goal, decided, 0), goal.stage)
        least = tried[0] if 0 in tried else _measured_latency(job, goal.dense, built.onnx)
        if least > limit:
            raise BudgetError(
                f"{goal.budget} is out of reach: the fastest network of {goal.method.name} takes {least:.3g} ms",
                hint=f"raise --budget to latency={1.03 * least:.3g}ms, or prune before",
            )
        low, tried[0] = 0, least
    assert decided.frontier is not None
    if decided.frontier.index != low:
        decided = _moved(job, goal, decided, low)
    return publish(job, _settled(decided, tried[low]), goal.stage)


def _within_latency_of_channels(job: Job, goal: Goal, decided: Decided, built: Built) -> tuple[Decided, Built]:
    """The most MACs whose written file is measured within the budget, and once more as the run's check measures it.

    Latency isn't a sum over channels, as runtimes compute them in blocks: each network that is tried is measured.
    """
    assert goal.budget is not None
    limit = goal.budget.absolute(_dense_latency(job, goal.dense))
    low, high, least = 0.0, 1.0, math.inf
    within: dict[float, Decided] = {}  # by MACs
    share = decided.plan.predicted["macs"] / job.graph.macs
    for _ in range(LATENCY_TRIES):
        found = _measured_latency(job, goal.dense, built.onnx)
        least = min(least, found)
        if found <= limit:
            within[decided.plan.predicted["macs"]] = decided
            low = max(low, share)
            if found >= CLOSE_LATENCY * limit:
                break
        else:
            high = min(high, share)
        share = min(max(share * (limit / found), low + 0.05 * (high - low)), high - 0.05 * (high - low))
        if high - low < LEAST_SHARE:
            break
        try:
            decided = _decide(job, goal, {}, {}, overhead=0, budget=Budget("macs", share, "dense"))
        except BudgetError:
            if not within and low == 0.0 and share < LEAST_SHARE:
                break
            low = share
            continue
        decided, built = publish(job, decided, goal.stage)
    missed: list[float] = []
    for macs in sorted(within, reverse=True):
        decided, built = publish(job, within[macs], goal.stage)
        found, limit = _checked_latency(job, goal, built)
        if found <= LATENCY_SLACK * limit:
            return decided, built
        missed.append(found)
    least = min(missed, default=least)
    raise BudgetError(
        f"{goal.budget} is out of reach: the fastest network that was tried takes {least:.3g} ms",
        hint=f"raise --budget to latency={1.03 * least:.3g}ms",
    )


def _trained_to_latency(
    job: Job, goal: Goal, sensitivities: Mapping[str, Sensitivity], training: Training | None
) -> tuple[Decided, Built]:
    """A method that trains measures the cuts that it may make; what was written is measured once more."""
    assert goal.budget is not None
    decided, built = publish(job, _decide(job, goal, sensitivities, {}, overhead=0, training=training), goal.stage)
    found, limit = _checked_latency(job, goal, built)
    if found > LATENCY_SLACK * limit:
        raise BudgetError(
            f"{goal.budget} is missed: the trained network takes {found:.3g} ms, {limit:.3g} ms are allowed",
            hint=f"raise --budget to latency={1.03 * found:.3g}ms; its cuts were within before the training",
        )
    return decided, built


def _checked_latency(job: Job, goal: Goal, built: Built) -> tuple[float, float]:
    """What a written network takes, as the run's check will measure it, and what it may take: milliseconds."""
    assert goal.budget is not None
    found = timed(_sessions(job, goal.dense, built.onnx), _one_example(job), goal.budget, job.progress)
    return found["compressed"].median, goal.budget.absolute(found["dense"].median)


def _exported_latency(job: Job, dense: Dense, network: fx.GraphModule) -> float:
    """Of a network that was cut: median milliseconds of its ONNX file."""
    graph = trace_graph(network, job.graph.example_inputs)
    return _measured_latency(job, dense, plain_onnx(graph, network, is_cut=True, form=form_of(job.settings)))


def _measured_latency(job: Job, dense: Dense, model: bytes) -> float:
    """Median milliseconds of an ONNX network at batch 1, as if the dense one took what it took at first.

    Other work comes and goes, and slows both: they are timed in turns.
    """
    found = measure_latency(_sessions(job, dense, model), _one_example(job), LATENCY_REPEATS, job.progress)
    return found["compressed"].median * _dense_latency(job, dense) / found["dense"].median


def _dense_latency(job: Job, dense: Dense) -> float:
    """Median milliseconds of the dense network at batch 1, measured once a run."""
    if DENSE_LATENCY not in job.memo:
        session = open_session(dense.onnx, job.value("threads") or LATENCY_THREADS)
        found = measure_latency({"dense": session}, _one_example(job), LATENCY_REPEATS, job.progress)
        job.memo[DENSE_LATENCY] = found["dense"].median
    return float(job.memo[DENSE_LATENCY])


def _sessions(job: Job, dense: Dense, model: bytes) -> dict[str, Session]:
    threads = job.value("threads") or LATENCY_THREADS
    return {"dense": open_session(dense.onnx, threads), "compressed": open_session(model, threads)}


def _one_example(job: Job) -> tuple[Tensor, ...]:
    return tuple(x[:1] for x in job.graph.example_inputs)


def _latency_table(job: Job, method: Method, context: Context) -> CostTable:
    """What each layer takes at each width in the runtime, measured on this machine or read from the cache."""
    activations = str(planner_options(job, method).get("activations", "float"))
    few = None if job.calibration is None else replace(job.calibration, data=job.calibration.data.first(32))
    ranges = calibrated(
        job.graph, few, {"activations": activations, "activation_range": "minmax"}, replace(context, memo={})
    )

    def network(widths: Mapping[str, int]) -> bytes:
        integer = {tensor: bits for tensor, bits in widths.items() if bits < FLOAT_BITS}
        axes = {layer.tensor: layer.axis for layer in job.graph.layers}
        schemes = {bits: weight_scheme(bits, with_integers=bool(ranges)) for bits in WIDTHS}
        weights = [Quantize(t, "weight", bits, schemes[bits], axes[t], "minmax") for t, bits in integer.items()]
        rounded = activation_decisions(job.graph, ranges, integer.keys(), activations)
        plan = Plan("latency", {}, 0, "", None, None, (*weights, *rounded), {})
        compressed = apply_plan(job.source.module, job.graph.tied, plan, {})
        form = form_of(job.settings)
        module = assemble(job.graph, compressed, float_addends=form.float_addends)
        return serialize(onnx_model(job.graph, compressed, module, form=form))

    return cached_latency_table(
        network,
        job.graph,
        job.graph.without(tuple(job.value("exclude") or ())),
        WIDTHS,
        _one_example(job),
        threads=int(job.value("threads") or LATENCY_THREADS),
        activations=activations if ranges else "float",
        notes=job.notes,
        progress=job.progress,
    )


def _search(job: Job, goal: Goal, sensitivities: Mapping[str, Sensitivity]) -> tuple[Decided, Built]:
    """The smallest model whose metric on the evaluation data passes the gates."""
    module = load_module(goal.method)
    scores = _scorer(job, goal)
    if hasattr(module, "candidates"):
        found = _search_candidates(job, goal, module, sensitivities, scores)
    else:
        found = _search_frontier(job, goal, sensitivities, scores)
    decided, built, tried, passed = found
    models = "1 model" if tried == 1 else f"{tried} models"
    job.notes.append(
        f"no budget was given: of {models} the smallest one within the gates was selected on the evaluation data"
        if passed
        else f"no budget was given, and none of {models} was within the gates on the evaluation data"
    )
    return decided, built


def _scorer(job: Job, goal: Goal) -> Callable[[Built], bool]:
    """Whether a written network's metric on the evaluation data passes the gates."""
    data, task = read_evaluation(job)
    threads = job.value("threads")
    session = open_session(goal.dense.onnx, threads)
    dense = evaluate(runtime_forward(session), data, task, "evaluate dense", job.progress)

    def passes(built: Built) -> bool:
        forward = runtime_forward(open_session(built.onnx, threads))
        metric = evaluate(forward, data, task, "evaluate candidate", job.progress)
        checks = metric_checks(
            goal.gates, unit=task.unit, higher_is_better=task.higher_is_better, dense=dense, compressed=metric
        )
        return all(check.ok for check in checks)

    return passes


def _search_frontier(
    job: Job, goal: Goal, sensitivities: Mapping[str, Sensitivity], passes: Callable[[Built], bool]
) -> tuple[Decided, Built, int, bool]:
    """Bisect the frontier; the largest model is returned where none passes, for the gates to refuse."""
    decided = _decide(job, goal, sensitivities, {}, overhead=0)
    assert decided.frontier is not None
    frontier, tried, last = decided.frontier, 0, len(decided.frontier.costs) - 1
    low, high = -1, last
    resolution = RESOLUTION * len(goal.dense.onnx) / frontier.scale
    while low < high - 1 and frontier.costs[high] - frontier.costs[max(low, 0)] > resolution:
        middle = frontier.within(frontier.amount((frontier.costs[max(low, 0)] + frontier.costs[high]) // 2))
        index = min(max(low + 1, middle or 0), high - 1)
        decided = _moved(job, goal, decided, index)
        tried += 1
        decided, built = publish(job, decided, goal.stage)
        low, high = (low, index) if passes(built) else (index, high)
    decided, built = publish(job, _moved(job, goal, decided, high), goal.stage)
    return decided, built, max(tried, 1), high < last or passes(built)


def _search_candidates(
    job: Job, goal: Goal, module: Any, sensitivities: Mapping[str, Sensitivity], passes: Callable[[Built], bool]
) -> tuple[Decided, Built, int, bool]:
    """Go on to ever smaller models until one fails; the first is returned where none passes."""
    context = planning_context(job, goal.dense, 0)
    options = planner_options(job, goal.method)
    best, tried, passed = None, 0, False
    for plan, tensors in module.candidates(job.source, job.graph, sensitivities, job.calibration, options, context):
        decided = _completed(job, goal.budget, plan, tensors, context)
        tried += 1
        decided, built = publish(job, decided, goal.stage)
        if not passes(built):
            best = best or decided
            break
        best, passed = decided, True
    assert best is not None
    best, built = publish(job, best, goal.stage)
    return best, built, tried, passed


def pick(job: Job, plan: Plan, folder: Path, wanted: str, dense: Dense, stage: Path) -> tuple[Decided, Built]:
    """Another point of a run's frontier: its number, or a budget of the frontier's quantity.

    What the file takes is known once it is written: a smaller point is taken as long as it is beyond its budget.

    Raises:
        InputError: The run has no frontier, or not this point.
        BudgetError: No point is within the budget.
    """
    frontier = read_frontier(folder / FRONTIER)
    if frontier.method != plan.method:
        raise InputError(
            f"{folder / FRONTIER}: the frontier is one of {escape(frontier.method)}, the plan of {escape(plan.method)}",
            hint="keep the files of a run together",
        )
    module = load_module(find_method("quantize", plan.method))
    index = _wanted_point(frontier, wanted, dense)
    limit = float("inf") if wanted.isdecimal() else parse_budget(wanted).absolute(len(dense.onnx))
    while True:
        context = planning_context(job, dense, 0)
        moved = module.at_point(replace(plan.untrained(), budget=None), job.graph, frontier, index, context)
        decided = Decided(*sealed(*corrected(job, moved, {}, context)), context.frontiers[-1])
        decided, built = publish(job, decided, stage)
        assert decided.frontier is not None
        frontier = decided.frontier
        if frontier.amount(frontier.costs[index]) <= limit:
            return decided, built
        if index == 0:
            raise infeasible(job, built, Budget(frontier.quantity, limit))
        index = min(frontier.within(limit) or 0, index - 1)


def _wanted_point(frontier: FrontierRecord, wanted: str, dense: Dense) -> int:
    if wanted.isdecimal():
        if int(wanted) >= len(frontier.costs):
            raise InputError(
                f"--pick {wanted}: the frontier has points 0 to {len(frontier.costs) - 1}",
                hint="hcompress show RUN --frontier lists them",
            )
        return int(wanted)
    budget = parse_budget(wanted)
    if budget.quantity != frontier.quantity or (budget.of == "dense" and budget.quantity != "bytes"):
        raise UsageError(
            f"--pick {wanted}: the frontier's costs are {frontier.quantity}",
            hint="pass a point's number, or an amount of that quantity",
        )
    index = frontier.within(budget.absolute(len(dense.onnx)))
    if index is None:
        least = Budget(frontier.quantity, rounded_up(frontier.amount(frontier.costs[0])))
        raise BudgetError(f"--pick {wanted}: the frontier starts at {least}", hint=f"pick {least} or more")
    return index

"""Ranges of activations, measured on calibration data: the candidate that moves the network's outputs least.

Candidates are those of ``numerics.activation_ranges``, from a histogram of each activation's values. They are told
apart by what they do to the outputs, as none of the rules is the best for every tensor; where the difference could be
chance, the least squared error decides.
Source: Nagel et al. 2021 (arXiv:2106.08295), section 3.1. Cost: two forward passes over the calibration examples, and
for each activation five partial ones over ``FEW``, and two over ``EXAMPLES`` where a range seems better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ..apply import float_module, grid_of
from ..context import Context, Progress
from ..curvature.network import require_finite
from ..data import Data
from ..errors import UsageError
from ..graph.rewrite import Grid, activation_points, feeds_layer, is_read, on_device, operand, points_for, rounded_to
from ..graph.trace import Graph
from ..numerics.activation_ranges import RULES, Ends, between_steps
from ..plan import WIDEST, Quantize
from ..settings import MIXED
from ..task import Calibration
from .changes import TEMPERATURE, loss_changes

CPU = torch.device("cpu")
BATCH = 16  # larger ones cost memory and are no faster
BINS = 2048  # of an activation's values between its extremes
AUTO = "auto"
USUAL = "mse"  # the range that others must beat
FAR_LESS = 0.5  # of the loss that it measures
FEW, EXAMPLES = 32, 128  # on which all ranges of an activation are compared, and what seems better with the usual one
RUNS = 5120  # of the network from an activation on, for each of those two: deep networks have fewer examples


class _Watcher(fx.Interpreter):
    """Runs a graph and shows the values of some of its nodes, with the numbers of the examples that are run."""

    def __init__(
        self, module: fx.GraphModule, names: Collection[str], seen: Callable[[str, Tensor, range], None]
    ) -> None:
        super().__init__(module)
        self.names, self.seen, self.examples = names, seen, range(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            self.seen(n.name, value, self.examples)
        return value

    def run_all(self, data: Data, what: str, progress: Progress, device: torch.device) -> None:
        with torch.no_grad():
            for done, batch in enumerate(data.batches(BATCH)):
                progress(what, done * BATCH, len(data))
                self.examples = range(done * BATCH, done * BATCH + len(batch))
                self.run(*(x.to(device) for x in batch.inputs))
        progress(what, len(data), len(data))


def calibrated(
    graph: Graph, calibration: Calibration | None, options: Mapping[str, Any], context: Context
) -> dict[str, Ends]:
    """The range of every activation that may be rounded, by name; none where activations are floats.

    Args:
        options: ``activations``: bits, ``float``, or ``mixed`` for the ranges of eight bits; ``activation_range``: one
            of ``numerics.activation_ranges.RULES``, or ``auto`` for the best of them for each activation.

    Raises:
        UsageError: There are no data.
    """
    activations, rule = str(options["activations"]), str(options.get("activation_range", AUTO))
    if activations == "float":
        return {}
    if calibration is None:
        raise UsageError(
            f"{activations}-bit activations are calibrated on data, and none were given",
            hint="pass --data FILE.npz or FILE.py:fn(args), or --activations float",
        )
    if (known := f"ranges of {activations}-bit activations by {rule}") in context.memo:
        return dict(context.memo[known])
    module = float_module(graph)
    points = activation_points(module)
    extremes = activation_ranges(
        module, [node.name for node in points], calibration.data, context.progress, device=context.device
    )
    bits = WIDEST if activations == MIXED else int(activations)
    narrow = [node for node in points if bits < WIDEST and _is_narrow(node)]
    whole = {node.name: extremes[node.name] for node in points if node not in narrow}
    found = ranges_at(graph, WIDEST, whole, calibration, rule, context)
    # What layers read of a value that has eight bits is clipped already.
    own = {node.name: found[operand(node, 0).name] if is_read(node) else extremes[node.name] for node in narrow}
    found |= ranges_at(graph, bits, own, calibration, rule, context)
    context.memo[known] = found
    return dict(found)


def ranges_at(
    graph: Graph, bits: int, ranges: Mapping[str, Ends], calibration: Calibration, rule: str, context: Context
) -> dict[str, Ends]:
    """The part of each activation's range that a grid of so many bits is put over.

    Args:
        ranges: By name; one without extent stays as it is.
        rule: As for ``calibrated``.
    """
    module, found = float_module(graph), dict(ranges)
    wide = {name: ends for name, ends in ranges.items() if ends[0] < ends[1]}
    if not wide or (rule == "minmax" and bits == WIDEST):
        return found
    counts = _histograms(module, wide, calibration.data, context)
    reads = {node.name for node in module.graph.nodes if is_read(node)}

    def by(rule: str, name: str) -> Ends:
        ends = RULES[rule](counts[name], *wide[name], bits)
        return between_steps(*ends, bits, wide[name]) if name in reads and bits < WIDEST else ends

    if rule != AUTO:
        return found | {name: by(rule, name) for name in wide}
    candidates = {name: list(dict.fromkeys(by(rule, name) for rule in (USUAL, *RULES))) for name in wide}
    return found | _best(graph, bits, candidates, calibration, context)


def _best(
    graph: Graph, bits: int, candidates: Mapping[str, Sequence[Ends]], calibration: Calibration, context: Context
) -> dict[str, Ends]:
    """Of each activation's ranges the first, or the one with which, it alone rounded, the outputs move far less.

    All are compared on a few examples, and those that are better on more.
    """
    left = {name: list(own) for name, own in candidates.items()}
    for count in (FEW, max(FEW, min(EXAMPLES, RUNS // len(candidates)))):
        data = calibration.data.every(max(1, len(calibration.data) // count)).first(count)
        grids = {name: [grid_of(*ends, bits) for ends in own] for name, own in left.items() if len(own) > 1}
        if not grids:
            break
        _, found = loss_changes(graph, {}, grids, data, calibration.task, context, temperature=TEMPERATURE)
        for name, losses in found.items():
            best = min(range(len(losses)), key=losses.__getitem__)
            left[name] = left[name][:1] + ([left[name][best]] if losses[best] < FAR_LESS * losses[0] else [])
    return {name: own[-1] for name, own in left.items()}


def _histograms(module: fx.GraphModule, ranges: Mapping[str, Ends], data: Data, context: Context) -> dict[str, Tensor]:
    """Counts of each activation's values in equal bins of its range, float64; those beyond it are in the last ones."""
    counts: dict[str, Tensor] = {}

    def seen(name: str, value: Tensor, examples: range) -> None:
        low, high = ranges[name]
        found = torch.histc(value.float().clamp(low, high), BINS, low, high).double().cpu()
        counts[name] = counts[name] + found if name in counts else found

    watcher = _Watcher(on_device(module, context.device), ranges, seen)
    watcher.run_all(data, "histograms of activations", context.progress, context.device)
    return counts


def activation_decisions(
    graph: Graph,
    ranges: Mapping[str, Ends],
    integer: Collection[str],
    activations: str,
    chosen: Mapping[str, tuple[int, Ends]] = MappingProxyType({}),
) -> tuple[Quantize, ...]:
    """The grids of the activations around integer layers: what float layers read stays as it is.

    Args:
        ranges: Of ``calibrated``.
        integer: Weights with integers, by state-dict key.
        activations: Bits of what layers read, ``float``, or ``mixed``; the network's inputs, and what other ops alone
            read, have eight.
        chosen: Bits and range of those that have widths of their own.
    """
    if not ranges:
        return ()
    points = [node for node in points_for(float_module(graph), integer) if node.name in ranges]
    narrow = WIDEST if activations == MIXED else int(activations)
    own = {node.name: (narrow if _is_narrow(node) else WIDEST, ranges[node.name]) for node in points}
    own |= {name: found for name, found in chosen.items() if name in own}
    for node in points:
        if is_read(node) and own[node.name] == own.get(operand(node, 0).name):
            del own[node.name]  # layers read the value as it is
    return tuple(Quantize(name, "activation", bits, "asymmetric", None, ends) for name, (bits, ends) in own.items())


def _is_narrow(node: fx.Node) -> bool:
    """Whether an activation has as many bits as are asked for, rather than eight."""
    return node.op != "placeholder" and feeds_layer(node)


def activation_ranges(
    module: fx.GraphModule, points: Collection[str], data: Data, progress: Progress, *, device: torch.device = CPU
) -> dict[str, Ends]:
    """Least and greatest value of each activation in ``points``, zero included.

    Raises:
        NumericsError: An activation isn't finite; names it.
    """
    ranges = dict.fromkeys(points, (0.0, 0.0))

    def seen(name: str, value: Tensor, examples: range) -> None:
        low, high = (float(v) for v in torch.aminmax(value))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            numbers = examples if value.dim() and len(value) == len(examples) else examples[:1]
            rows = value if len(numbers) == len(examples) else value.reshape(1, -1)
            require_finite(rows, f"activation {name}", numbers, data.name)
        ranges[name] = (min(ranges[name][0], low), max(ranges[name][1], high))

    watcher = _Watcher(on_device(module, device), ranges, seen)
    watcher.run_all(data, "calibrate activations", progress, device)
    return ranges


def squared_changes(
    module: fx.GraphModule,
    grids: Mapping[str, Sequence[Grid]],
    data: Data,
    progress: Progress,
    *,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """By activation: the squared change of all its elements that each grid makes, a mean over the examples."""
    found = {name: [0.0] * len(own) for name, own in grids.items()}

    def seen(name: str, value: Tensor, examples: range) -> None:
        for place, grid in enumerate(grids[name]):
            moved = (rounded_to(value, grid) - value).square().sum(dtype=torch.float64)
            found[name][place] += float(moved) / len(data)

    watcher = _Watcher(on_device(module, device), grids, seen)
    watcher.run_all(data, "round activations", progress, device)
    return found

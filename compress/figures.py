"""The parts of a report record: what was decided and why, what it did, and the checks that follow."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import __version__, canonical
from .apply import Tensors, float_module
from .budget import Budget, format_bytes
from .data import Data
from .formats.packed import QuantizedTensor
from .frontier import FLOAT_BITS, UNITS, FrontierRecord
from .graph.rewrite import is_read, layer_reads, operand
from .graph.trace import WEIGHT_ARGUMENT, Graph
from .numerics.rounding import mean_stored_bits
from .pattern import parse_pattern
from .plan import BY_CHANNEL, Plan, Replace
from .sensitivity import Sensitivity
from .settings import DYNAMIC
from .task import Task
from .verdict import Check, limit_check
from .verify import FLOAT_TOLERANCE, INTEGER_TOLERANCE, MEAN_TOLERANCE, Parity
from .widths import counts, is_mixed, letters_of, levels_of, shown

REPORT_SCHEMA = "hcompress.report/1"
SPARSITY_SLACK = 1e-4  # rounding to whole weights
LATENCY_SLACK = 1.1
MAX_POINTS = 200  # of a frontier in the report
COST_UNITS = {**UNITS, "bits": "bits"}


def is_dynamic(plan: Plan) -> bool:
    """Whether activations are rounded as they come."""
    return plan.options.get("activations") == DYNAMIC


def has_integers(plan: Plan | None) -> bool:
    """Whether activations are rounded: what runtimes do with a value halfway between two steps differs."""
    return plan is not None and (bool(plan.quantized("activation")) or is_dynamic(plan))


def parity_checks(parity: list[Parity], integer: bool) -> list[Check]:
    """One check a batch size, of the largest difference; with integer activations also of the mean one."""
    unit, limit = "relative", INTEGER_TOLERANCE if integer else FLOAT_TOLERANCE
    checks = [Check(f"parity_batch_{p.batch}", p.max_relative, limit, unit, p.max_relative <= limit) for p in parity]
    if integer:
        checks += [
            Check(f"parity_mean_batch_{p.batch}", p.mean_relative, MEAN_TOLERANCE, unit, False)
            for p in parity
            if p.mean_relative > MEAN_TOLERANCE
        ]
    return checks


def parity_record(parity: Parity) -> dict[str, Any]:
    return {"batch": parity.batch, "max_abs": parity.max_abs, "argmax_agreement": parity.argmax_agreement}


def metric_record(task: Task, dense: float, compressed: float, data: Data) -> dict[str, Any]:
    return {
        "name": task.name,
        "unit": task.unit,
        "higher_is_better": task.higher_is_better,
        "dense": dense,
        "compressed": compressed,
        "num_examples": len(data),
        "runtime": f"onnxruntime {metadata.version('onnxruntime')}",
        "data_sha256": data.sha256(),
    }


def budget_checks(
    budget: Budget | None,
    reached: Mapping[str, float],
    dense: Mapping[str, float],
    frontier: FrontierRecord | None,
) -> list[Check]:
    """The check of a budget against what came out.

    Args:
        reached: ``average_bits``, ``sparsity`` (of channels where any were cut), ``bytes``, ``macs`` (of weights that
            aren't zero where weights were masked), ``params`` and ``latency`` in milliseconds.
        dense: The same of the dense network, for relative budgets.
        frontier: Of the plan; bit operations are known from it.
    """
    if budget is None:
        return []
    if budget.quantity == "bytes":
        return limit_check("budget", reached["bytes"], budget.absolute(dense["bytes"]), "bytes")
    if budget.quantity == "bits":
        return limit_check("budget", reached["average_bits"], budget.limit + 1e-9, "bits")
    if budget.quantity == "latency":
        limit = budget.absolute(dense["latency"])
        # Two measurements of one network differ by some percent.
        return [Check("budget", reached["latency"], limit, "ms", reached["latency"] <= LATENCY_SLACK * limit)]
    if budget.quantity in ("macs", "params"):
        limit = budget.absolute(dense[budget.quantity])
        return limit_check("budget", reached[budget.quantity], limit, budget.quantity)
    if budget.quantity == "bops":
        # A frontier is cut at the budget: what the point costs is what was asked for, or less.
        return [] if frontier is None else _bops_check(budget, frontier)
    sparsity = reached["sparsity"]
    return [Check("budget", sparsity, budget.limit, "sparsity", sparsity >= budget.limit - SPARSITY_SLACK)]


def _bops_check(budget: Budget, frontier: FrontierRecord) -> list[Check]:
    amount = frontier.amount(frontier.costs[frontier.index])
    limit = budget.limit if budget.of == "absolute" else budget.limit * frontier.dense_amount
    return limit_check("budget", amount, limit, "bops")


def frontier_figures(frontier: FrontierRecord) -> dict[str, Any]:
    """The frontier as the report draws it: the point of the plan, its rivals, and a thinned curve."""
    step = -(-len(frontier.costs) // MAX_POINTS)
    shown = sorted({*range(0, len(frontier.costs), step), len(frontier.costs) - 1, frontier.index})
    return {
        "quantity": frontier.quantity,
        "unit": UNITS[frontier.quantity],
        "loss_unit": frontier.loss_unit,
        "num_points": len(frontier.costs),
        "index": frontier.index,
        "cost": frontier.amount(frontier.costs[frontier.index]),
        "loss": frontier.losses[frontier.index],
        "points": [[frontier.amount(frontier.costs[i]), frontier.losses[i]] for i in shown],
        "rivals": [
            {"name": name, "cost": frontier.amount(cost), "loss": loss}
            for name, (cost, loss) in frontier.rivals().items()
        ],
    }


def _alternatives(frontier: FrontierRecord | None) -> dict[str, list[dict[str, Any]]]:
    """By tensor: what each option of its item costs and is expected to lose."""
    if frontier is None:
        return {}
    unit = COST_UNITS[frontier.quantity]
    scale = 1.0 if frontier.quantity == "bits" else frontier.scale
    found: dict[str, list[dict[str, Any]]] = {}
    numbers = frontier.chosen[: len(frontier.items)]
    for item, chosen, factor in zip(frontier.items, numbers, frontier.factors(), strict=True):
        options = [
            {
                "option": "float" if choice.bits == FLOAT_BITS else shown(choice.bits),
                "cost": scale * factor * choice.cost,
                "unit": unit,
                "loss": choice.loss,
                "chosen": number == chosen,
            }
            for number, choice in enumerate(item.choices)
        ]
        found |= dict.fromkeys(item.tensors, options)
    return found


def activation_records(
    graph: Graph,
    plan: Plan | None,
    frontier: FrontierRecord | None = None,
    sensitivities: Mapping[str, Sensitivity] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """One entry for each activation that is rounded: its bits, what reads it, and the widths that it might have had."""
    decided = {} if plan is None else plan.quantized("activation")
    if not decided:
        return []
    read_by: dict[str, list[str]] = {}
    for layer, read in layer_reads(float_module(graph)):
        # Where it has no width of its own, what layers read of a value is that value.
        name = operand(read, 0).name if is_read(read) and read.name not in decided else read.name
        read_by.setdefault(name, []).append(str(operand(layer, WEIGHT_ARGUMENT).target))
    measured, alternatives = _sensitivities(sensitivities), {} if frontier is None else _read_alternatives(frontier)
    return [
        {
            "tensor": name,
            "bits": decision.bits,
            "range": decision.range,
            "read_by": read_by.get(name, []),
            "sensitivity": measured.get(name),
            "alternatives": alternatives.get(name, []),
        }
        for name, decision in decided.items()
    ]


def _read_alternatives(frontier: FrontierRecord) -> dict[str, list[dict[str, Any]]]:
    """By activation: what each width of it, and of those that share its width, costs and is expected to lose."""
    weights = frontier.chosen_choices()
    found: dict[str, list[dict[str, Any]]] = {}
    for read, chosen in zip(frontier.reads, frontier.chosen_reads(), strict=True):
        each_bit = read.cost + sum(weights[number].cost for number in read.items)
        options = [
            {
                "option": shown(choice.bits),
                "cost": frontier.scale * choice.bits * each_bit,
                "unit": COST_UNITS[frontier.quantity],
                "loss": choice.loss,
                "chosen": choice is chosen,
            }
            for choice in read.choices
        ]
        found |= dict.fromkeys(read.activations, options)
    return found


def _sensitivities(records: Mapping[str, Sensitivity]) -> dict[str, dict[str, Any]]:
    """By tensor: the measure of the layer itself, with its error; none where a measure has a value for each option."""
    return {
        layer: {"measure": record.method, "value": e.value, "stderr": e.stderr, "unit": record.unit}
        for record in records.values()
        for (layer, option), e in record.entries.items()
        if not option
    }


def layer_records(
    state: Mapping[str, Tensor],
    graph: Graph,
    tensors: Tensors,
    plan: Plan | None,
    frontier: FrontierRecord | None = None,
    sensitivities: Mapping[str, Sensitivity] = MappingProxyType({}),
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """One entry a weight: what was decided, why, what else there was, and what it did to the weight.

    Args:
        state: The weights before, less what was cut.
        graph: The network that is left.
        shapes: Of the weights before the cut, where there was one.
    """
    alternatives, measured = _alternatives(frontier), _sensitivities(sensitivities)
    masks = {} if plan is None else plan.masks()
    quantized = {} if plan is None else plan.quantized("weight")
    entries = []
    for layer in graph.layers:
        if layer.tensor not in tensors:  # a buffer that isn't saved: part of the code, not of the checkpoint
            continue
        stored = tensors[layer.tensor]
        value = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored
        original = state[layer.tensor].double()
        norm = float(original.norm())
        error = float((value.double() - original).norm()) / norm if norm else 0.0
        sparsity = 1 - int(torch.count_nonzero(value)) / layer.elements
        bits = (
            mean_stored_bits(stored.levels, stored.bits, stored.axis)
            if isinstance(stored, QuantizedTensor)
            else 8 * value.element_size()
        )
        left = _left(layer.shape, shapes.get(layer.tensor, layer.shape))
        decision = "quantize" if layer.tensor in quantized else "mask" if layer.tensor in masks else "keep"
        why = _why(plan, layer.tensor, decision, sparsity, bits, error)
        if left:
            decision, why = ("prune", left) if decision == "keep" else (decision, f"{left}; {why}")
        entries.append(
            {
                "tensor": layer.tensor,
                "op": layer.op,
                "shape": list(layer.shape),
                "elements": layer.elements,
                "macs": layer.macs,
                "bits": bits,
                "channel_bits": _channel_bits(stored),
                "sparsity": sparsity,
                "decision": decision,
                "relative_error": error,
                "why": why,
                "sensitivity": measured.get(layer.tensor),
                "alternatives": alternatives.get(layer.tensor, []),
            }
        )
    return entries


def _channel_bits(stored: Tensor | QuantizedTensor) -> list[list[float]]:
    """Bits and the number of channels that have them, the fewest bits first; none where all have the same."""
    if not isinstance(stored, QuantizedTensor) or not is_mixed(stored.bits):
        return []
    letters = letters_of(stored.bits)
    found = {levels_of(letter).bits: letters.count(letter) for letter in set(letters)}
    return [[bits, found[bits]] for bits in sorted(found)]


def _left(shape: tuple[int, ...], before: tuple[int, ...]) -> str:
    """What a cut left of a weight, in words; empty where it left all."""
    lost = [
        f"{now} of {was} {'outputs' if dim == 0 else 'inputs' if dim == 1 else 'places'}"
        for dim, (now, was) in enumerate(zip(shape, before, strict=True))
        if now != was
    ]
    return f"{' and '.join(lost)} are left" if lost else ""


def group_records(plan: Plan) -> list[dict[str, Any]]:
    """The groups that lost channels."""
    return [{"name": d.tensor, "channels": d.size, "kept": len(d.keep)} for d in plan.channels().values()]


def _why(plan: Plan | None, tensor: str, decision: str, sparsity: float, bits: float, error: float) -> str:
    if plan is None:
        return "exported as it is"
    if decision == "keep":
        is_new = any(isinstance(d, Replace) and d.tensor == tensor for d in plan.decisions)
        if plan.channels() or is_new:
            return ("none of its channels is cut" if plan.channels() else "not masked") + (
                "; its values are fitted or trained anew" if is_new else ""
            )
        return f"left as it is: excluded, or {plan.options.get('pattern', plan.method)} doesn't fit its shape"
    if decision == "mask":
        mask = plan.masks()[tensor]
        kept = f"{mask.total - mask.kept} of {mask.total} weights zeroed"
        pattern, moved = parse_pattern(mask.pattern), mask.values_sha256 is not None
        least = "least salient" if moved else "smallest"
        made_up = "; the others moved to make up for them" if moved else ""
        if pattern.quota is not None:
            return f"{kept}: the {least} of each group along the inputs, pattern {mask.pattern}{made_up}"
        shared = plan.options.get("scope") == "global"
        saves_macs = shared and plan.budget is not None and plan.budget.quantity == "macs"
        where = "all layers" if shared else "this layer"
        where += ", for the MACs that they make" * saves_macs
        if pattern.is_block:
            return f"{kept}: the {least} of the {mask.pattern} blocks of {where}{made_up}"
        if moved:
            return f"{kept}: the {least} of {where}{made_up}"
        if saves_macs:
            return f"{kept}: those of the least square for the MACs that they make"
        if shared:
            return f"{kept}: those below the magnitude that all layers share"
        return f"{kept}: the smallest of this layer"
    choice = plan.quantized("weight")[tensor]
    search = str(choice.range)
    ranges = "a range for each channel" if search.startswith(BY_CHANNEL) else f"{search} ranges"
    widths = f" by channel ({counts(choice.bits)})" if is_mixed(choice.bits) else ""
    if choice.group_size is not None:
        ranges = f"a scale for each {choice.group_size} inputs, {ranges}"
    return f"{plan.method} chose {bits:.4g} bits{widths} with {ranges}: the weights move by {100 * error:.2g} %"


def totals(layers: list[dict[str, Any]]) -> dict[str, float]:
    elements = sum(layer["elements"] for layer in layers)
    zeros = sum(round(layer["sparsity"] * layer["elements"]) for layer in layers)
    bits = sum(layer["bits"] * layer["elements"] for layer in layers)
    return (
        {"average_bits": bits / elements, "sparsity": zeros / elements}
        if elements
        else {"average_bits": 32.0, "sparsity": 0.0}
    )


def nonzero_macs(graph: Graph, layers: list[dict[str, Any]]) -> int:
    """Multiply-accumulates whose weight isn't zero, as the entries of the graph's layers say."""
    return graph.nonzero_macs({e["tensor"]: e["elements"] - round(e["sparsity"] * e["elements"]) for e in layers})


def versions() -> dict[str, str]:
    names = ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "numpy")
    return {
        "hcompress": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def origin(source: Path) -> dict[str, Any] | None:
    """The uncompressed network at the start of a chain of runs; None where the source is no run."""
    if not (source / "report.json").is_file():
        return None
    parent = canonical.read_record(source / "report.json", REPORT_SCHEMA)
    if parent.get("origin") is not None:
        return dict(parent["origin"])
    metric = parent["metric"]
    return {
        "name": parent["source"]["name"],
        "dense_bytes": parent["dense_bytes"],
        "metric": None if metric is None else metric["dense"],
        "unit": None if metric is None else metric["unit"],
    }


def describe_origin(origin: Mapping[str, Any]) -> str:
    """The start of a chain in words."""
    metric = "" if origin["metric"] is None else f", {origin['metric']:.6g} {origin['unit']}"
    return f"the chain starts at {origin['name']}: {format_bytes(origin['dense_bytes'])}{metric}"


def warnings(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is right but surprising: layers that are all zero."""
    empty = [str(layer["tensor"]) for layer in layers if layer["sparsity"] == 1]
    if layers and len(empty) == len(layers):
        return ["nothing is left: every weight of every layer is zero"]
    return [f"every weight of {', '.join(empty)} is zero"] if empty else []

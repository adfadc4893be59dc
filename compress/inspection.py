"""What a checkpoint or a run folder holds: layers, parameters, MACs, dtypes, tied weights, what blocks compression."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .canonical import sha256_of_file
from .formats.checkpoint import Checkpoint, read_checkpoint
from .graph.channel_cost import channel_costs, total
from .graph.cost import cost_tables
from .graph.groups import find_channels
from .graph.trace import Graph
from .model import WEIGHTS, Source

SCHEMA = "hcompress.inspect/1"


def describe_network(path: Path, source: Source, graph: Graph, notes: list[str]) -> dict[str, Any]:
    """A network in its architecture."""
    state = source.module.state_dict()
    parameters = dict(source.module.named_parameters())
    tensors = {**state, **dict(source.module.named_buffers())}  # a weight may be a buffer that isn't saved
    return {
        "schema": SCHEMA,
        "path": str(path),
        "format": source.format,
        "sha256": source.sha256,
        "parameters": sum(p.numel() for p in parameters.values()),
        "macs": graph.macs,
        "costs": {
            quantity: {width: table.total(width) for width in ("", "4", "8", "32") if table.has(width)}
            for quantity, table in cost_tables(graph).items()
        },
        "input_shape": [list(x.shape[1:]) for x in graph.example_inputs],
        "dtypes": _count_dtypes(state),
        "layers": [
            {
                "name": layer.tensor,
                "op": layer.op,
                "shape": list(layer.shape),
                "parameters": layer.elements,
                "macs": layer.macs,
                "activations": layer.activations,
                "dtype": str(tensors[layer.tensor].dtype).removeprefix("torch."),
            }
            for layer in graph.layers
        ],
        "tied": [list(names) for names in graph.tied],
        "blockers": [{"layer": blocker.layer, "reason": blocker.reason} for blocker in graph.blockers],
        "notes": notes,
    }


def describe_channels(graph: Graph) -> dict[str, Any]:
    """The groups of channels that can be cut out of a network, what a channel of each costs, and what stays and why."""
    channels = find_channels(graph)
    costs = channel_costs(channels, len(graph.example_inputs[0]))
    whole = torch.ones(channels.count, dtype=torch.bool)
    amounts = {"params": total(costs.params, whole), "macs": total(costs.macs, whole)}
    groups = []
    for group, numbers in channels.split(torch.arange(channels.count)):
        without = whole.clone()
        without[numbers[0]] = False
        saved = {"params": total(costs.params, without), "macs": total(costs.macs, without)}
        members = [{"tensor": m.tensor, "dim": m.dim, "places": m.indices.shape[1]} for m in group.members]
        saved_by_one = {name: amounts[name] - amount for name, amount in saved.items()}
        groups.append({"name": group.name, "channels": group.size, "members": members, "saved_by_one": saved_by_one})
    frozen = [
        {"tensor": f.tensor, "dim": f.dim, "places": f.count, "reason": f.reason, "node": f.node, "source": f.source}
        for f in channels.frozen
    ]
    return {"groups": groups, "frozen": frozen}


def describe_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """A state dict without its architecture."""
    path, state = checkpoint.path, checkpoint.state
    return {
        "schema": SCHEMA,
        "path": str(path),
        "format": checkpoint.format,
        "sha256": sha256_of_file(path),
        "parameters": sum(t.numel() for t in state.values() if t.is_floating_point()),
        "macs": None,
        "input_shape": None,
        "dtypes": _count_dtypes(state),
        "layers": [
            {
                "name": key,
                "op": "tensor",
                "shape": list(t.shape),
                "parameters": t.numel(),
                "macs": None,
                "dtype": str(t.dtype).removeprefix("torch."),
            }
            for key, t in state.items()
        ],
        "tied": [],
        "blockers": [],
        "notes": [
            *checkpoint.notes,
            "a state dict holds no architecture: pass --model FILE.py:FACTORY to see layers and MACs",
        ],
    }


def describe_run(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """A run folder says itself what it holds."""
    return {
        "schema": SCHEMA,
        "path": str(run),
        "format": "run",
        "sha256": sha256_of_file(run / WEIGHTS),
        "parameters": record["params"]["compressed"],
        "macs": record["macs"]["compressed"],
        "input_shape": None,
        "dtypes": _count_dtypes(read_checkpoint(run / WEIGHTS).state),
        "layers": [
            {
                "name": layer["tensor"],
                "op": layer["op"],
                "shape": layer["shape"],
                "parameters": layer["elements"],
                "macs": layer["macs"],
                "dtype": "float32" if layer["bits"] == 32 else f"int{layer['bits']}",
            }
            for layer in record["layers"]
        ],
        "tied": [],
        "blockers": [],
        "notes": [f"made by hcompress {record['command']}; hcompress show {run} prints its figures"],
    }


def _count_dtypes(state: Mapping[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in state.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + 1
    return counts

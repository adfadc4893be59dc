"""What is left of a network when a plan's channels are cut: its graph, its state dict, and the proof of the cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from . import canonical
from .errors import GateError, HCompressError, InputError
from .graph.cut import cut, graph_copy, kept_channels, probe_inputs, sliced_tensor, worst_difference
from .graph.groups import Channels, find_channels
from .graph.reload import sliced
from .graph.rewrite import put_tensor, tensor_names, unlift
from .graph.trace import Graph, trace_graph
from .plan import InputSpec, Plan, PruneChannels

CUT_TOLERANCE = 1e-9  # of the largest output, in float64
CUTS = "hcompress.cuts"  # key of a safetensors file's metadata


@dataclass(frozen=True, slots=True)
class Cut:
    """What a plan cut, as model.safetensors records it: so that the file and the factory are enough to load it.

    Attributes:
        inputs: What the network was traced with.
    """

    channels: tuple[PruneChannels, ...]
    inputs: tuple[InputSpec, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A cut.

    Attributes:
        channels: Of the whole network.
        kept: bool over all its channels.
        graph: The network that is left.
    """

    channels: Channels
    kept: Tensor
    graph: Graph

    def sliced(self, state: Mapping[str, Tensor], tied: tuple[tuple[str, ...], ...]) -> dict[str, Tensor]:
        """A state dict of the whole network, without what was cut."""
        canonical = {alias: names[0] for names in tied for alias in names}
        return {
            key: sliced_tensor(self.channels, self.kept, canonical.get(key, key), value) for key, value in state.items()
        }


def prune(graph: Graph, plan: Plan) -> Pruned | None:
    """Cut a plan's channels; None where it cuts none.

    Raises:
        InputError: The plan's groups aren't the network's.
    """
    decisions = plan.channels()
    if not decisions:
        return None
    channels = find_channels(graph)
    return pruned(graph, channels, kept_of(channels, decisions))


def kept_of(channels: Channels, decisions: Mapping[str, PruneChannels]) -> Tensor:
    """bool over all channels: those that stay.

    Raises:
        InputError: A group isn't the network's, or has another size.
    """
    sizes = {group.name: group.size for group in channels.groups}
    for name, decision in decisions.items():
        if sizes.get(name) != decision.size:
            raise InputError(
                f"{name} has {sizes[name]} channels, the plan's has {decision.size}"
                if name in sizes
                else f"the network has no channels of {name}, of which the plan cuts some",
                hint="the plan is for another architecture; hcompress inspect --channels lists the groups",
            )
    return kept_channels(channels, {name: decision.keep for name, decision in decisions.items()})


def pruned(graph: Graph, channels: Channels, kept: Tensor) -> Pruned:
    """The network that is left, traced again."""
    small = trace_graph(cut(channels, channels.module, kept), graph.example_inputs)
    return Pruned(channels, kept, replace(small, tied=graph.tied))


def prune_decisions(channels: Channels, kept: Tensor) -> tuple[PruneChannels, ...]:
    """The decisions that ``kept_of`` reads, of the groups that lose something."""
    return tuple(
        PruneChannels(group.name, group.size, tuple(chosen.nonzero().reshape(-1).tolist()))
        for group, chosen in channels.split(kept)
        if not chosen.all()
    )


def check_cut(graph: Graph, channels: Channels, kept: Tensor, *, seed: int) -> float:
    """Prove the cut: it computes what the whole network computes with the same channels at zero.

    In float64 with random parameters and buffers, within 1e-9 of the largest output.

    Args:
        graph: The whole network, which ``channels`` are of.
        kept: bool over all its channels.

    Returns:
        The largest difference, in units of the largest output.

    Raises:
        GateError: It doesn't; names the group that breaks it.
    """
    inputs = probe_inputs(graph, seed=seed)
    worst = worst_difference(channels, kept, inputs, seed=seed)
    if worst <= CUT_TOLERANCE:
        return worst
    broken = "no group alone, all of them together"
    for decision in prune_decisions(channels, kept):
        alone = kept_of(channels, {decision.tensor: decision})
        if not worst_difference(channels, alone, inputs, seed=seed) <= CUT_TOLERANCE:
            broken = f"group {decision.tensor}"
            break
    raise GateError(
        f"the cut network differs from the masked one by {worst:.2g} of the largest output: {broken}",
        hint="nothing was published; keep that group with --exclude, and report it with the network's forward",
    )


def cuts_metadata(cuts: Sequence[Cut]) -> dict[str, str]:
    """Entries of a file's metadata; none where nothing was cut."""
    return {CUTS: json.dumps(canonical.plain(cuts), sort_keys=True, separators=(",", ":"))} if cuts else {}


def read_cuts(metadata: Mapping[str, str], path: Path) -> tuple[Cut, ...]:
    """The cuts that a file records, in the order in which they were made.

    Raises:
        InputError: The record is damaged.
    """
    if CUTS not in metadata:
        return ()
    try:
        return tuple(
            Cut(
                tuple(
                    PruneChannels(str(c["tensor"]), int(c["size"]), tuple(int(i) for i in c["keep"]))
                    for c in entry["channels"]
                ),
                tuple(InputSpec(tuple(int(s) for s in i["shape"]), str(i["dtype"])) for i in entry["inputs"]),
            )
            for entry in json.loads(metadata[CUTS])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged metadata {CUTS} ({error})", hint="write the file again") from None


def cut_module(module: nn.Module, cuts: Sequence[Cut], path: Path) -> nn.Module:
    """The user's module with the channels cut out of its own layers.

    Raises:
        InputError: Its class can't hold what is left; says which layer, and that the exported program can.
    """
    for cut_ in cuts:
        inputs = recorded_inputs(cut_.inputs)
        module.eval()
        graph = trace_graph(module, inputs)
        channels = find_channels(graph)
        try:
            kept = kept_of(channels, {decision.tensor: decision for decision in cut_.channels})
            module = sliced(module, graph, channels, kept)
        except HCompressError as error:
            raise InputError(
                f"{path}: {error.message}",
                hint="load the run folder without a factory: its model.pt2 holds the cut network",
            ) from error
    return module


def recorded_inputs(inputs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    """Two examples of recorded shapes: random floats, zeros of all else."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in inputs:
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"plan: input dtype {spec.dtype!r} is unknown", hint="float32, int64, ...")
        size = (2, *spec.shape)
        is_float = dtype.is_floating_point
        made.append(torch.randn(size, generator=generator, dtype=dtype) if is_float else torch.zeros(size, dtype=dtype))
    return tuple(made)


def trainable_copy(graph: Graph, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """A graph as a network with tensors of its own: those of ``state``, where it has them."""
    return with_tensors(unlift(graph.program, graph.tied), state)


def with_tensors(module: fx.GraphModule, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of a network with the tensors of ``state``, where it has them."""
    made = graph_copy(module)
    for target in sorted(tensor_names(made) & state.keys()):
        put_tensor(made, target, state[target].detach().clone())
    return made

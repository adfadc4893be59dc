"""What layers read: at how many bits, at what cost, and which activations have one width of their own.

Bit operations are multiply-accumulates times the bits of the weight times those of the activation, so that a choice of
an activation's bits multiplies the costs of all weights that read it. Activations that one weight reads, or weights of
one width, share theirs; where one of them is an input of the network, they stay at eight bits.
Source: Yao et al. 2021, HAWQ-V3 (arXiv:2011.10680), for bit operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..apply import float_module, grid_of
from ..context import Context
from ..frontier import FLOAT_BITS, Read, ReadChoice
from ..graph.rewrite import Grid, layer_reads, operand, points_for
from ..graph.trace import WEIGHT_ARGUMENT, Graph, Layer, node_macs
from ..numerics.activation_ranges import Ends
from ..plan import WIDEST
from ..settings import MIXED
from ..task import Calibration
from .calibrate import ranges_at

READ_WIDTHS = (4, 6, 8)
Ranges = Mapping[str, Sequence[Ends]]  # by activation, one for each of READ_WIDTHS


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a weight.

    Attributes:
        tensor: The weight's state-dict key.
        activation: What it reads, by name; None where that stays float.
        bits: Of what it reads; 1 where they are yet to be chosen.
        macs: Multiply-accumulates of one example.
    """

    tensor: str
    activation: str | None
    bits: int
    macs: int


@dataclass(frozen=True, slots=True)
class Shared:
    """Activations that get one width.

    Attributes:
        groups: Numbers of the groups of weights that read them.
        cost: Of each bit of theirs, what layers outside the groups add: their weights are floats.
    """

    activations: tuple[str, ...]
    groups: tuple[int, ...]
    cost: int


@dataclass(frozen=True, slots=True)
class Reads:
    """What the layers of a network read.

    Attributes:
        shared: The activations whose widths are chosen; none unless activations are mixed.
    """

    uses: tuple[Use, ...]
    shared: tuple[Shared, ...]

    def cost(self, tensor: str) -> int:
        """Of each bit of a weight; where what it reads is yet to be chosen, of each bit of that as well."""
        return sum(use.macs * use.bits for use in self.uses if use.tensor == tensor)


def find_reads(graph: Graph, groups: Sequence[tuple[Sequence[Layer], Sequence[int]]], activations: str) -> Reads:
    """Every use of a weight with what it reads.

    Args:
        groups: Of ``points.groups_of``: weights that get one width, and the widths that they may get.
        activations: Bits, ``float`` or ``mixed``.
    """
    integer = {layer.tensor for layers, widths in groups if min(widths) < FLOAT_BITS for layer in layers}
    module = float_module(graph)
    points = [] if activations == "float" else points_for(module, integer)
    known = {layer.tensor for layer in graph.layers}
    rest = WIDEST if activations in ("float", MIXED) else int(activations)
    batch = len(graph.example_inputs[0])
    uses = []
    for node, read in layer_reads(module):
        tensor = str(operand(node, WEIGHT_ARGUMENT).target)
        if tensor in known:
            bits = FLOAT_BITS if read not in points else WIDEST if read.op == "placeholder" else rest
            uses.append(Use(tensor, read.name if read in points else None, bits, node_macs(node, batch)))
    if activations != MIXED:
        return Reads(tuple(uses), ())
    inputs = {node.name for node in points if node.op == "placeholder"}
    shared = _shared(uses, [tuple(layer.tensor for layer in layers) for layers, _ in groups], inputs)
    chosen = {name for one in shared for name in one.activations}
    return Reads(tuple(replace(use, bits=1) if use.activation in chosen else use for use in uses), tuple(shared))


def _shared(uses: Sequence[Use], groups: Sequence[Sequence[str]], inputs: set[str]) -> list[Shared]:
    """Activations bound by the groups that read them, in the order of their first use."""
    leader = {use.activation: use.activation for use in uses}
    read_by = [{use.activation for use in uses if use.tensor in group} for group in groups]
    for read in read_by:
        bound = {leader[name] for name in read}
        first = next((name for name in leader.values() if name in bound), None)
        leader = {name: first if own in bound else own for name, own in leader.items()}
    fixed = {leader[name] for name in leader if name is None or name in inputs}
    every = {tensor for group in groups for tensor in group}
    found = []
    for first in dict.fromkeys(leader.values()):
        if first in fixed:
            continue
        names = [name for name, own in leader.items() if own == first and name is not None]
        others = [use for use in uses if use.activation in names and use.tensor not in every]
        readers = tuple(number for number, read in enumerate(read_by) if read & set(names))
        found.append(Shared(tuple(names), readers, sum(FLOAT_BITS * use.macs for use in others)))
    return found


def read_ranges(
    graph: Graph, reads: Reads, ranges: Mapping[str, Ends], calibration: Calibration, rule: str, context: Context
) -> Ranges:
    """The range of each activation whose width is chosen, at each width.

    Args:
        ranges: Of eight bits, by name.
        rule: As for ``calibrate.calibrated``.
    """
    wide = {name: ranges[name] for one in reads.shared for name in one.activations}
    if not wide:
        return {}
    narrow = [ranges_at(graph, bits, wide, calibration, rule, context) for bits in READ_WIDTHS[:-1]]
    return {name: (*(found[name] for found in narrow), ends) for name, ends in wide.items()}


def grids_of(ranges: Ranges) -> dict[str, list[Grid]]:
    """The grids of ``read_ranges``."""
    return {
        name: [grid_of(*ends, bits) for ends, bits in zip(own, READ_WIDTHS, strict=True)]
        for name, own in ranges.items()
    }


def read_records(reads: Reads, ranges: Ranges, losses: Mapping[str, Sequence[float]]) -> tuple[Read, ...]:
    """The choices of activations, for the frontier.

    Args:
        losses: By activation, of each of ``READ_WIDTHS``.
    """
    return tuple(
        Read(
            one.activations,
            one.groups,
            one.cost,
            tuple(
                ReadChoice(
                    bits,
                    sum(losses[name][place] for name in one.activations),
                    tuple(ranges[name][place] for name in one.activations),
                )
                for place, bits in enumerate(READ_WIDTHS)
            ),
        )
        for one in reads.shared
    )

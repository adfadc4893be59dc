"""What rounding each weight alone, at each width from 2 to 8 bits, costs the network: the measure ``output-change``.

Each weight is rounded as the method of the same name rounds it, the network runs with it on calibration data, and its
outputs are compared with the dense network's (``changes``).
Cost: one rounding of each weight and a partial forward pass over ``EXAMPLES`` examples, for each of the seven widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..context import Context
from ..curvature.moments import input_moments
from ..curvature.network import open_network
from ..graph.trace import Graph, Layer
from ..model import Source
from ..sensitivity import Estimate, Repeats, Sensitivity
from ..task import Calibration, has_logits
from .changes import TEMPERATURE, loss_changes, telling_examples
from .channel_widths import rounded_at
from .output_change import EXAMPLES, NAME, USUAL
from .points import WIDTHS


def measure(
    source: Source, graph: Graph, calibration: Calibration, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """How far the outputs move, in units of the loss, with each weight alone at each width (``"4"``).

    Args:
        options: ``reconstruction``: ``gptq`` for levels chosen by the layer's outputs, ``none`` for the nearest;
            ``widths``, where only some are to be tried, ``USUAL`` among them.
    """
    by_outputs, widths = options["reconstruction"] == "gptq", options.get("widths", WIDTHS)
    rounded = at_every_width(
        source, graph, graph.layers, calibration, by_outputs=by_outputs, context=context, widths=widths
    )
    variants = {tensor: list(values.values()) for tensor, values in rounded.items()}
    task, usual = calibration.task, {tensor: values[USUAL] for tensor, values in rounded.items()}
    data, counts = telling_examples(graph, usual, calibration.data, EXAMPLES, task, context, temperature=TEMPERATURE)
    found, _ = loss_changes(graph, variants, {}, data, task, context, counts=counts, temperature=TEMPERATURE)
    entries = {
        (tensor, str(bits)): Estimate(loss)
        for tensor, losses in found.items()
        for bits, loss in zip(rounded[tensor], losses, strict=True)
    }
    unit = "nats" if has_logits(task) else "squared output"
    return Sensitivity(NAME, unit, source.sha256, calibration.sha256(), entries, dict(options)), {}


def repeats(options: Mapping[str, Any], total: int) -> Repeats:
    """Widths."""
    one, two = ({**options, "widths": tuple(range(USUAL, USUAL + count))} for count in (1, 2))
    return Repeats((one, two), (1, 2), len(WIDTHS), len(WIDTHS), min(total, EXAMPLES))


def at_every_width(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    calibration: Calibration,
    *,
    by_outputs: bool,
    context: Context,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, dict[int, Tensor]]:
    """Each weight rounded at each width.

    Args:
        by_outputs: Levels are chosen by what they do to the layer's outputs, rather than the nearest.
    """
    moments: dict[str, Tensor] = {}
    if by_outputs:
        network = open_network(graph, layers=tuple(layers), device=context.device)
        moments = input_moments(network, calibration.data, progress=context.progress)
    state = source.module.state_dict()
    found = {}
    for done, layer in enumerate(layers):
        context.progress("round at every width", done, len(layers))
        weight, moment = state[layer.tensor].detach().float().cpu(), moments.get(layer.tensor)
        letters = [str(bits) for bits in widths]
        made = rounded_at(layer, weight, moment, letters, with_integers=False, by_outputs=by_outputs)
        found[layer.tensor] = {bits: made[str(bits)] for bits in widths}
    context.progress("round at every width", len(layers), len(layers))
    return found

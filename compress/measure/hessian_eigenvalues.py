"""The largest eigenvalues of the exact Hessian: of every layer's block, and of all layers together.

The error of each is the residual of its vector: the block has an eigenvalue within it. The values say how far the loss
rises along the worst direction, where a trace says how far it rises on average.
Source: Dong et al. 2019, HAWQ (arXiv:1905.03696), for layers; Ghorbani et al. 2019 (arXiv:1901.10159), for networks.
Cost: 10 Hessian-vector products a layer, and ``passes`` more where these leave more than ``rtol``; as many for all of
them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..context import Context
from ..curvature.loss_factor import seeded
from ..curvature.network import Network, open_network
from ..curvature.sample_gradients import draw_seed
from ..curvature.traces import hessian_products
from ..errors import UsageError
from ..graph.trace import Graph
from ..model import Source
from ..numerics.eigenvalues import FIRST as SHORT_SEARCH
from ..numerics.eigenvalues import top_eigenvalues
from ..sensitivity import TOGETHER, Estimate, Repeats, Sensitivity
from ..task import Calibration

ZERO = 1e-3  # of a block's largest eigenvalue: a smaller one need not be known to a share of itself


def measure(
    source: Source, graph: Graph, calibration: Calibration, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """The largest eigenvalues of every layer's block, as options ``eigenvalue 1`` and on, and of all layers' block.

    Args:
        options: ``eigenvalues``: how many; ``rtol``: the residual's share of the value at which a short search ends;
            ``passes``: products of a long one.

    Raises:
        UsageError: More eigenvalues than products, or an operator without a second derivative.
    """
    count, limit = int(options["eigenvalues"]), int(options["passes"])
    check_count(count, limit)
    rtol = float(options["rtol"])
    network, seed = open_network(graph, device=context.device), draw_seed(context.generator)
    names = [layer.tensor for layer in network.layers]
    blocks = {name: [name] for name in names} | ({TOGETHER: names} if len(names) > 1 else {})
    entries: dict[tuple[str, str], Estimate] = {}
    for number, (block, tensors) in enumerate(blocks.items()):
        context.progress("Hessian eigenvalues", number, len(blocks))
        size = sum(network.weights[name].numel() for name in tensors)
        start = torch.randn(size, generator=seeded((seed, number)), dtype=network.dtype).to(network.device)
        products = partial(_products, network, calibration, tensors)
        found = top_eigenvalues(products, start, count, rtol=rtol, limit=limit)
        for place, one in enumerate(found, 1):
            entries[block, f"eigenvalue {place}"] = Estimate(one.value, one.residual)
    context.progress("Hessian eigenvalues", len(blocks), len(blocks))
    largest = {block: abs(entries[block, "eigenvalue 1"].value) for block, _ in entries}
    unsure = {b for (b, _), e in entries.items() if e.stderr > rtol * max(abs(e.value), ZERO * largest[b])}
    if unsure:
        context.notes.append(
            f"eigenvalues of {len(unsure)} blocks have residuals above --rtol {rtol:g} of them after {limit} "
            "products; raise --passes for closer ones"
        )
    unit, task_sha256 = "loss per squared weight", calibration.sha256()
    return Sensitivity("hessian-eigenvalues", unit, source.sha256, task_sha256, entries, dict(options)), {}


def _products(network: Network, calibration: Calibration, tensors: Sequence[str], rows: Tensor) -> Tensor:
    """``H v`` for each row of ``[k, d]``, H the block of the weights named, one after the other."""
    shapes = [network.weights[name].shape for name in tensors]
    parts = torch.split(rows, [shape.numel() for shape in shapes], 1)
    vectors = {name: part.reshape(-1, *shape) for name, part, shape in zip(tensors, parts, shapes, strict=True)}
    found = hessian_products(network, calibration.task, calibration.data, vectors)
    return torch.cat([found[name].flatten(1) for name in tensors], 1)


def repeats(options: Mapping[str, Any], total: int) -> Repeats:
    """Products: one for the start and one for each residual, beside those of a search.

    Raises:
        UsageError: More eigenvalues than products.
    """
    count, limit = int(options["eigenvalues"]), int(options["passes"])
    check_count(count, limit)
    first, around = count + 2, count + 1
    one, two = ({**options, "passes": times * first} for times in (1, 2))
    least = SHORT_SEARCH + 2 * count + around
    return Repeats((one, two), (first + around, 2 * first + around), least, least + limit + around, total)


def check_count(count: int, limit: int) -> None:
    """Refuse more eigenvalues than products can find.

    Raises:
        UsageError: Says how many products are needed.
    """
    if limit < count + 2:
        raise UsageError(
            f"{count} eigenvalues need {count + 2} products or more, and --passes is {limit}",
            hint=f"pass --passes {max(20, 4 * count)}",
        )

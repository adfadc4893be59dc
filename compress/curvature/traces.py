"""Traces of every layer's curvature block, with standard errors.

``ggn_traces``: one backward pass of Σₙ fₙᵀ Lₙ rₙ, r random signs in output space, gives for *every* layer at once and
every example a squared gradient norm whose mean is the trace of its generalized Gauss-Newton block. The probes of
successive passes are orthogonal: with k classes the estimate is exact after k passes. On a trained network few examples
hold most of the trace, and are known by their outputs: after two passes over all, further ones cover those alone.
``hessian_traces``: one layer's block of the exact Hessian by its products with vectors (``numerics.trace``; Dong et al.
2020, HAWQ-V2, arXiv:1911.03852, section 3.1), with the Gauss-Newton matrix as a control variate (``controls``). One
product for all layers would bring the noise of the blocks between them into each. A network that is piecewise linear in
each layer's weights, as one of ReLUs with fixed batch statistics is, has the same blocks in both matrices: there the
first function gives the Hessian's traces.
Cost: a forward pass and one with per-sample gradients over the data for all layers, or with ``factors`` of them,
against one backward pass a layer and product, and a forward and backward pass a layer and block of products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..context import Progress
from ..data import Data
from ..errors import NumericsError, UsageError
from ..graph.trace import Layer
from ..numerics.trace import ESTIMATORS, TraceEstimate, hutchinson, sketched
from ..task import Task
from .controls import Known, gauss_newton_blocks
from .factors import UseGradients, factored, factors_of, squared_row_norms
from .loss_factor import Draw, loss_of, output_curvature, period, seeded
from .network import PASS_BATCH, Network, batches, differentiable, require_finite
from .recording import Recorder
from .sample_gradients import draw_seed, layer_rows

MIN_PASSES = 2  # a standard error needs two
MIN_FREEDOM = 7  # probes beyond the first of each example: the spread of fewer is often small by chance
CONTROLLED = "control"
METHODS = {**ESTIMATORS, CONTROLLED: hutchinson}
AIDED = {CONTROLLED: "control", "hutch++": "sketch"}  # what these take of a Gauss-Newton matrix
HEAVY_SHARE = 0.99  # of the squared output-space traces


def ggn_traces(
    network: Network,
    task: Task,
    data: Data,
    *,
    rtol: float,
    max_passes: int,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, TraceEstimate]:
    """Traces of the Gauss-Newton block of every layer.

    Args:
        rtol: Passes are made until every layer's standard error is at most this share of its mean.
        max_passes: The most passes; 2 or more.

    Raises:
        UsageError: The task's loss needs targets and there are none, or it has too many outputs.
        NumericsError: An output or a gradient isn't finite; names the examples and the layer.
    """
    names = [layer.tensor for layer in network.layers]
    norms = partial(_squared_norms, network, task)
    return traces_by_passes(
        names, norms, data, rtol=rtol, max_passes=max_passes, generator=generator, progress=progress
    )


# Squared norms ``[n, l]`` of the gradients of some examples, given the data, the examples, a seed and the number of the
# probe; the output-space traces ``[n]``; how many probes are complete.
SquaredNorms = Callable[[Data, Tensor, int, int], tuple[Tensor, Tensor | None, int]]


def traces_by_passes(
    names: Sequence[str],
    squared_norms: SquaredNorms,
    data: Data,
    *,
    rtol: float,
    max_passes: int,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, TraceEstimate]:
    """The mean squared norms over probes and examples, of all examples first and then of those that hold the most.

    Args:
        names: Of the columns of ``squared_norms``.
    """
    if not names:
        return {}
    everything = torch.arange(len(data))
    chosen, heavy = everything, everything
    counts = torch.zeros(len(data), dtype=torch.float64)  # probes of each example
    sums = torch.zeros(len(data), len(names), dtype=torch.float64)
    squares = torch.zeros_like(sums)
    seed = draw_seed(generator)
    found: dict[str, TraceEstimate] = {}
    for passes in range(1, max(max_passes, MIN_PASSES) + 1):
        progress("Gauss-Newton traces", passes - 1, max_passes)
        norms, curvature, complete = squared_norms(data, chosen, seed, int(counts[chosen[0]]))
        counts[chosen] += 1
        sums[chosen] += norms
        squares[chosen] += norms.square()
        if passes == 1:
            heavy = everything if curvature is None else heaviest(curvature)
        if passes < MIN_PASSES and passes != complete:
            continue
        found = _estimates(names, counts, sums, squares, complete=complete, passes=passes)
        is_exact = bool(counts[heavy[0]] == complete)
        is_known = is_exact or (counts[heavy[0]] - 1) * len(heavy) >= MIN_FREEDOM
        if is_known and all(estimate.stderr <= rtol * estimate.mean for estimate in found.values()):
            break
        # The heavy ones may be exact before the others are close enough.
        chosen = everything[counts < complete] if is_exact else heavy
    progress("Gauss-Newton traces", max_passes, max_passes)
    return found


def heaviest(curvature: Tensor) -> Tensor:
    """The smallest set of examples, in order, that holds 99 % of the sum of squares of ``curvature`` ``[n]``.

    An example's variance grows with the square of its output-space trace, which doesn't depend on the probes: choosing
    by it leaves the estimate unbiased.
    """
    squares, order = curvature.square().sort(descending=True, stable=True)
    count = int((squares.cumsum(0) < HEAVY_SHARE * squares.sum()).sum()) + 1
    return order[:count].sort().values


def _squared_norms(
    network: Network, task: Task, data: Data, chosen: Tensor, seed: int, probe: int
) -> tuple[Tensor, Tensor | None, int]:
    """``SquaredNorms`` of the layers' weights."""
    norms, curvatures, complete, recorder = [], [], 0, Recorder(network)
    for numbers, batch in zip(torch.split(chosen, PASS_BATCH), batches(network, data.at(chosen)), strict=True):
        outputs, uses = recorder.record(batch.inputs)
        complete, curvature = period(task, outputs), output_curvature(task, outputs)
        draw = Draw(seed, numbers.tolist(), probe, data.name)
        found = {tensor: torch.zeros(len(batch), dtype=torch.float64) for tensor in network.weights}

        def square(tensor: str, rows: Tensor, found: dict[str, Tensor] = found) -> None:
            found[tensor] = squared_row_norms(rows, len(network.weights[tensor])).cpu()

        def square_factors(
            tensor: str, gradients: UseGradients, found: dict[str, Tensor] = found, draw: Draw = draw
        ) -> None:
            squares = factors_of([gradients]).squared_norms().squeeze(1)
            require_finite(squares, f"the gradient of {tensor}", draw.examples, draw.name)
            found[tensor] = squares.cpu()

        receivers = {tensor: partial(square_factors, tensor) for tensor in factored(uses)}
        layer_rows(network, task, batch, outputs, uses, draw, square, mode="ggn", factored=receivers)
        norms.append(torch.stack([found[tensor] for tensor in network.weights], 1))
        curvatures += [] if curvature is None else [curvature.cpu()]
    return torch.cat(norms), torch.cat(curvatures) if curvatures else None, complete


def _estimates(
    names: Sequence[str], counts: Tensor, sums: Tensor, squares: Tensor, *, complete: int, passes: int
) -> dict[str, TraceEstimate]:
    """Mean and standard error from each example's number of probes ``[n]`` and sums ``[n, l]``: every one a stratum.

    Orthogonal probes are draws without replacement: after all of them an example's trace is exact.
    """
    n, times = len(counts), counts.unsqueeze(1)
    means = (sums / times).sum(0) / n
    variances = ((squares - sums.square() / times) / (times - 1).clamp(min=1)).clamp(min=0)
    left = 1 - times / complete if complete else torch.ones_like(times)
    errors = (variances / times * left).sum(0).sqrt() / n
    return {
        name: TraceEstimate(float(mean), float(error), passes)
        for name, mean, error in zip(names, means, errors, strict=True)
    }


def hessian_traces(
    network: Network,
    task: Task,
    data: Data,
    *,
    estimator: str,
    is_aided: bool = True,
    rtol: float,
    max_probes: int,
    generator: torch.Generator,
    progress: Progress,
    batch: int = PASS_BATCH,
) -> dict[str, TraceEstimate]:
    """Traces of the exact Hessian's diagonal blocks, one layer at a time.

    Args:
        data: Without targets, the loss is expected under the model's own predictions.
        estimator: Of ``METHODS``; ``CONTROLLED`` is Hutchinson's with a control variate.
        is_aided: Whether those of ``AIDED`` may use a Gauss-Newton matrix; without it they are as published.
        rtol: Products are made for a layer until its standard error is at most this share of its magnitude.
        max_probes: The most products of a layer; 2 or more. Fewer than 8 are only made where this is below 8.

    Raises:
        UsageError: The loss needs targets and there are none, or an operator has no second derivative.
        NumericsError: The loss or a product isn't finite; names the examples or the layer.
    """
    found, seed = {}, draw_seed(generator)
    numbers = {layer.tensor: number for number, layer in enumerate(network.layers)}
    sizes = {layer.tensor: layer.elements for layer in network.layers}

    def signs(tensor: str, chosen: range) -> Tensor:
        return _signs(network, (seed, numbers[tensor]), sizes[tensor], chosen)

    known: dict[str, Known] = {}
    if estimator in AIDED and is_aided:
        count = max(max_probes, MIN_PASSES)
        num_sketched = sketched(count) if AIDED[estimator] == "sketch" else 0
        known = gauss_newton_blocks(
            network,
            task,
            data,
            signs,
            count,
            num_sketched=num_sketched,
            seed=seed,
            progress=progress,
        )
    for layer in network.layers:
        progress("Hessian traces", numbers[layer.tensor], len(network.layers))
        products = partial(layer_products, network, task, data, layer, batch=batch)
        aid = {AIDED[estimator]: getattr(known[layer.tensor], AIDED[estimator])} if known else {}
        found[layer.tensor] = METHODS[estimator](
            products, partial(signs, layer.tensor), rtol=rtol, limit=max_probes, **aid
        )
    progress("Hessian traces", len(network.layers), len(network.layers))
    return found


def _signs(network: Network, key: tuple[int, int], d: int, numbers: range) -> Tensor:
    """``[k, d]`` random signs of the probes that ``numbers`` counts: each has a seed of its own."""
    rows = [
        torch.randint(0, 2, (d,), generator=seeded((*key, number)), dtype=network.dtype).mul(2).sub(1)
        for number in numbers
    ]
    return torch.stack(rows).to(network.device) if rows else torch.zeros(0, d, dtype=network.dtype)


def layer_products(
    network: Network, task: Task, data: Data, layer: Layer, vectors: Tensor, *, batch: int = PASS_BATCH
) -> Tensor:
    """``H v`` for each row of ``vectors`` ``[k, elements]``, H the layer's block of the mean loss's Hessian."""
    parts = {layer.tensor: vectors.reshape(-1, *layer.shape)}
    return hessian_products(network, task, data, parts, batch=batch)[layer.tensor].flatten(1)


def hessian_product(
    network: Network, task: Task, data: Data, vectors: Mapping[str, Tensor], *, batch: int = PASS_BATCH
) -> dict[str, Tensor]:
    """``H v`` for one vector: ``hessian_products`` of tensors without their first dimension."""
    found = hessian_products(network, task, data, {name: v.unsqueeze(0) for name, v in vectors.items()}, batch=batch)
    return {name: value.squeeze(0) for name, value in found.items()}


def hessian_products(
    network: Network, task: Task, data: Data, vectors: Mapping[str, Tensor], *, batch: int = PASS_BATCH
) -> dict[str, Tensor]:
    """``H v`` of the mean loss over ``data`` for k vectors, H restricted to the tensors that ``vectors`` names.

    A batch's forward and first backward pass serve all vectors; each has one more backward pass.

    Args:
        vectors: ``[k, *shape]`` each, with the same k.

    Raises:
        UsageError: The loss needs targets and there are none, or an operator has no second derivative.
        NumericsError: The loss isn't finite; names the examples. A product isn't; names the layer.
    """
    names = list(vectors)
    total = {name: torch.zeros_like(vectors[name]) for name in names}
    if not all(len(value) for value in vectors.values()):
        return total
    with differentiable(network, names) as weights:
        for number, part in enumerate(batches(network, data, batch)):
            # Fused attention has no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(task, network.module(*part.inputs), part.targets) * (len(part) / len(data))
                if not torch.isfinite(loss):
                    first = number * batch
                    raise NumericsError(
                        f"the loss is {loss.item():g} on examples {first}-{first + len(part) - 1} of {data.name}",
                        hint="check these examples and their targets",
                    )
                _add_second_derivatives(loss, weights, [vectors[name] for name in names], list(total.values()))
    for name, value in total.items():
        if not torch.isfinite(value).all():
            raise NumericsError(
                f"the Hessian of {name} isn't finite on {data.name}",
                hint="check the checkpoint with hcompress inspect, or pass --trace ggn",
            )
    return total


def _add_second_derivatives(
    loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor], total: Sequence[Tensor]
) -> None:
    """Add ``H v`` to ``total`` for each row of ``vectors``; none where a weight doesn't reach the loss, or linearly."""
    if not loss.requires_grad:
        return
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    curved = [number for number, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    if not curved:
        return
    count = len(vectors[0])
    for row in range(count):
        try:
            products = torch.autograd.grad(
                [gradients[number] for number in curved],
                weights,
                [vectors[number][row] for number in curved],
                retain_graph=row + 1 < count,
                allow_unused=True,
            )
        except RuntimeError as error:  # torch has no type of its own for an operator without a second derivative
            if "is not implemented" not in str(error):
                raise
            raise UsageError(
                f"the exact Hessian needs second derivatives, and torch lacks one ({error})",
                hint="use what needs first derivatives only: --trace ggn, or the Fisher matrix",
            ) from error
        for own, product in zip(total, products, strict=True):
            if product is not None:
                own[row] += product.detach()

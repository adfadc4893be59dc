"""Hutchinson's estimate of the Hessian's diagonal, with AdaHessian's spatial and block averaging.

E[z * Hz] = diag(H) for random signs z; one product serves all layers. Neighbouring entries differ more by noise than by
curvature, so that convolutions are averaged over their kernel positions, and linear layers over blocks of inputs.
Source: Yao et al. 2021, AdaHessian (arXiv:2006.00719), sections 3.1 and 3.2. Cost: one Hessian-vector product a probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..graph.trace import Layer
from ..numerics.trace import FIRST, standard_error
from ..task import Task
from .network import PASS_BATCH, Network
from .traces import MIN_PASSES, hessian_product


@dataclass(frozen=True, slots=True)
class Diagonal:
    """A layer's diagonal in loss per squared weight.

    Attributes:
        entries: In the weight's shape.
        mean: Over all entries.
        stderr: Of the mean.
        probes: That were drawn.
    """

    entries: Tensor
    mean: float
    stderr: float
    probes: int


def hessian_diagonal(
    network: Network,
    task: Task,
    data: Data,
    *,
    num_probes: int,
    rtol: float,
    block_size: int,
    generator: torch.Generator,
    progress: Progress,
    batch: int = PASS_BATCH,
) -> dict[str, Diagonal]:
    """The averaged diagonal of the mean loss's Hessian for every layer.

    Args:
        num_probes: The most; 2 or more.
        rtol: Probes are drawn until the standard error of every layer's mean is at most this share of its magnitude.
        block_size: Inputs of a linear layer that share an average; 1 averages nothing there.

    Raises:
        UsageError: The loss needs targets and there are none, or an operator has no second derivative.
        NumericsError: The loss or a product isn't finite; names the examples or the layer.
    """
    probes, made = max(num_probes, MIN_PASSES), 0
    sums = {layer.tensor: torch.zeros(layer.shape, dtype=torch.float64) for layer in network.layers}
    means: dict[str, list[float]] = {layer.tensor: [] for layer in network.layers}
    for number in range(probes):
        progress("Hessian diagonal", number, probes)
        vectors = {
            layer.tensor: torch.randint(0, 2, layer.shape, generator=generator)
            .mul(2)
            .sub(1)
            .to(network.device, network.dtype)
            for layer in network.layers
        }
        products = hessian_product(network, task, data, vectors, batch=batch)
        for name, product in products.items():
            sample = (product * vectors[name]).double().cpu()
            sums[name] += sample
            means[name].append(float(sample.mean()))
        made = number + 1
        if made >= FIRST and all(_is_close(values, rtol) for values in means.values()):
            break
    progress("Hessian diagonal", probes, probes)
    return {
        layer.tensor: Diagonal(
            spatial_average(sums[layer.tensor] / made, layer, block_size=block_size),
            sum(means[layer.tensor]) / made,
            standard_error(means[layer.tensor]),
            made,
        )
        for layer in network.layers
    }


def _is_close(values: list[float], rtol: float) -> bool:
    return standard_error(values) <= rtol * abs(sum(values) / len(values))


def spatial_average(diagonal: Tensor, layer: Layer, *, block_size: int) -> Tensor:
    """Means over the kernel of a convolution, or over ``block_size`` consecutive inputs of a linear layer.

    Args:
        diagonal: In the weight's shape.
    """
    if diagonal.dim() > 2:
        kernel = tuple(range(2, diagonal.dim()))
        return diagonal.mean(kernel, keepdim=True).expand_as(diagonal).clone()
    averaged = diagonal.clone()
    axis = layer.input_axis if diagonal.dim() > 1 else 0
    for part in torch.split(averaged, block_size, dim=axis):
        part.copy_(part.mean(axis, keepdim=True).expand_as(part))
    return averaged

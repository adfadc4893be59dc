"""Per-sample gradients as sums of outer products, and what can be known of them without making them.

A linear layer's gradient for one example is the sum over positions of ``g x^T``, of what it reads and of its output's
gradient; a convolution's is the same with the windows that it reads. A row's squared norm is then the sum of the
products of two Gram matrices over positions, and its product with a vector ``V`` the sum of ``g^T V x``, where ``V x``
serves all gradients of the same inputs. That is less work where positions are few for the numbers of a row, and no row
lies in memory.
Source: Goodfellow 2015 (arXiv:1510.01799) for one position; Rochette, Manoel, Tramel 2019 (arXiv:1912.06015).
Cost: as in ``_is_cheaper``; memory of the windows, and of positions squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph.trace import CONVOLUTIONS, WEIGHT_ARGUMENT, argument, aten
from .gradient_rules import Use, each_dim, examples_first, padded

MOVED = 32  # multiplications in whose time a number is written and read again


@dataclass(frozen=True, slots=True)
class Factors:
    """Rows of k draws of n examples: of draw j and example i, the sum over positions of ``g[i, j] x[i]^T``.

    Attributes:
        inputs: ``[n, positions, columns]``.
        gradients: ``[n, k, positions, outputs]``.
    """

    inputs: Tensor
    gradients: Tensor

    def squared_norms(self) -> Tensor:
        """Of the rows, ``[n, k]`` in float64."""
        of_inputs = self.inputs @ self.inputs.transpose(1, 2)
        of_draws = [g @ g.transpose(1, 2) for g in self.gradients.unbind(1)]
        return torch.stack([(of_inputs * grams).sum((1, 2), dtype=torch.float64) for grams in of_draws], 1)

    def times(self, vectors: Tensor) -> Tensor:
        """The rows' products with weights ``[v, outputs, columns]`` of any type: ``[n, v, k]``."""
        n, inputs = len(self.inputs), self.inputs.flatten(0, 1)
        images = [(inputs @ vector.to(inputs.dtype).T).reshape(n, -1) for vector in vectors]
        return torch.stack(images, 1) @ self.gradients.flatten(2).transpose(1, 2)

    def summed(self, factors: Tensor) -> Tensor:
        """The sum ``[outputs, columns]`` of all rows times ``[n, k]``."""
        gradients = factors.unsqueeze(1) @ self.gradients.flatten(2)
        return gradients.reshape(-1, self.gradients.shape[3]).T @ self.inputs.flatten(0, 1)


def factored(uses: Sequence[Use], *, draws: int = 1, vectors: int = 0) -> frozenset[str]:
    """The weights whose rows need not be made: all that reads them has factors, which take fewer multiplications.

    Args:
        uses: Of one forward pass.
        draws: Gradients of the same outputs.
        vectors: Products of each row, or sums of all.
    """
    by_tensor: dict[str, list[Use]] = {}
    for use in uses:
        by_tensor.setdefault(use.tensor, []).append(use)
    return frozenset(
        tensor
        for tensor, own in by_tensor.items()
        if all(map(_has_factors, own)) and _is_cheaper(own, draws=draws, vectors=vectors)
    )


# Of a layer's outputs, in one draw: one for each of its uses.
UseGradients = Sequence[tuple[Use, Tensor]]


def factors_of(draws: Sequence[UseGradients]) -> Factors:
    """The rows of a weight of ``factored``, from draws of the same outputs."""
    inputs = [_inputs(use) for use, _ in draws[0]]
    gradients = [torch.cat([_gradients(use, gradient) for use, gradient in draw], 1) for draw in draws]
    return Factors(torch.cat(inputs, 1), torch.stack(gradients, 1))


def _has_factors(use: Use) -> bool:
    """Whether a weight's gradient is one matrix product of positions."""
    if use.site.position != WEIGHT_ARGUMENT:
        return False
    is_whole = use.node.target in CONVOLUTIONS and argument(use.node, "groups", 1) == 1
    return use.node.target is aten.linear.default or is_whole


def num_positions(use: Use) -> int:
    """Of one example."""
    weight = use.arguments[WEIGHT_ARGUMENT]
    return math.prod(use.shape) // use.shape[use.site.batch_dim] // len(weight)


def _is_cheaper(uses: Sequence[Use], *, draws: int, vectors: int) -> bool:
    weight = uses[0].arguments[WEIGHT_ARGUMENT]
    positions, outputs, columns, d = sum(map(num_positions, uses)), len(weight), weight[0].numel(), weight.numel()
    of_rows = draws * d * (positions + vectors)
    of_factors = vectors * d * positions + positions**2 * (columns + draws * outputs)
    numbers = positions * (columns + (draws + vectors) * outputs) + positions**2 * (1 + draws)
    is_cheaper: bool = of_factors + MOVED * numbers < of_rows + MOVED * draws * d
    return is_cheaper


def squared_row_norms(rows: Tensor, outputs: int) -> Tensor:
    """Of ``[n, elements]``, ``[n]`` in float64; what is summed in the rows' own type is no longer than an output's."""
    norms = torch.linalg.vector_norm(rows.reshape(len(rows), outputs, -1), dim=2)
    squares: Tensor = norms.double().square().sum(1)
    return squares


def windows(node: fx.Node, inputs: Tensor, weight: Tensor) -> Tensor:
    """What each position of a convolution's output reads: a view ``[n, channels, *positions, *kernel]``."""
    spatial = weight.dim() - 2
    inputs, padding = padded(node, inputs, weight)
    found = F.pad(inputs, [side for size in reversed(padding) for side in (size, size)])
    steps, dilations = (each_dim(argument(node, name, 1), spatial) for name in ("stride", "dilation"))
    for dim, (size, stride, dilation) in enumerate(zip(weight.shape[2:], steps, dilations, strict=True), start=2):
        found = found.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return found


def _inputs(use: Use) -> Tensor:
    """``[n, positions, columns]``."""
    inputs, weight = use.arguments[0], use.arguments[WEIGHT_ARGUMENT]
    if use.node.target is aten.linear.default:
        return examples_first(inputs, use.site.batch_dim, 1)
    found = windows(use.node, inputs, weight)
    spatial = weight.dim() - 2
    return found.movedim(1, 1 + spatial).reshape(len(found), -1, weight[0].numel())


def _gradients(use: Use, gradient: Tensor) -> Tensor:
    """``[n, positions, outputs]``, of the layer's own output."""
    if use.node.target is aten.linear.default:
        return examples_first(gradient, use.site.batch_dim, 1)
    found = gradient.flatten(2).transpose(1, 2)
    return found if use.factor is None else found * use.factor

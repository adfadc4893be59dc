"""Units of removal: how a weight falls into what is kept or removed together, and which of the units go.

A weight is a matrix of output rows by input columns for each position of the kernel. A unit is a block of consecutive
rows and columns at one position; a single weight is a unit of one by one. Where rows or columns are no multiple, the
last units are smaller. All that removes weights asks for costs of units and for masks here, so that a method has one
rule for single weights, for n of m neighbours and for blocks.
Cost: one sort of the units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pattern import Pattern


@dataclass(frozen=True, slots=True)
class Units:
    """A weight's units, numbered ``[b, n]``: bands of rows, and the units of each.

    Where neighbours along the inputs matter, all inputs of a position are numbered before the next position; else units
    are numbered as the weight lies in memory.

    Attributes:
        shape: Of the weight.
        row_axis: Dimension of the outputs.
        column_axis: Dimension of the inputs.
        pattern: What goes together. Blocks larger than the weight are as large as the weight.
    """

    shape: tuple[int, ...]
    row_axis: int
    column_axis: int
    pattern: Pattern

    @property
    def rows(self) -> int:
        """Of a unit."""
        return max(1, min(self.pattern.rows, self.shape[self.row_axis]))

    @property
    def columns(self) -> int:
        """Of a unit."""
        return max(1, min(self.pattern.columns, self.shape[self.column_axis]))

    def blocks(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the weight's shape by unit, ``[b, n, rows, columns]``; ``fill`` where a unit is smaller."""
        r, c = self.rows, self.columns
        moved = values.reshape(self.shape).movedim((self.row_axis, self.column_axis), (0, 1))
        out, inputs, *kernel = moved.shape
        matrix = moved.reshape(out, inputs, math.prod(kernel))
        if out % r or inputs % c:
            matrix = F.pad(matrix, (0, 0, 0, -inputs % c, 0, -out % r), value=fill)
        bands, groups = -(-out // r), -(-inputs // c)
        split = matrix.reshape(bands, r, groups, c, math.prod(kernel))
        split = split.permute((0, 4, 2, 1, 3) if self._by_position else (0, 2, 4, 1, 3))
        return split.reshape(bands, groups * math.prod(kernel), r, c)

    def spread(self, values: Tensor) -> Tensor:
        """Values ``[b, n]`` of the units at each of their weights, in the weight's shape."""
        out, inputs = self.shape[self.row_axis], self.shape[self.column_axis]
        positions = math.prod(self.shape) // max(1, out * inputs)
        r, c = self.rows, self.columns
        sizes = (positions, -1) if self._by_position else (-1, positions)
        split = values.reshape(-(-out // r), *sizes)
        if self._by_position:
            split = split.transpose(1, 2)  # [b, inputs / c, positions]
        matrix = split.repeat_interleave(r, 0)[:out].repeat_interleave(c, 1)[:, :inputs]
        others = [size for axis, size in enumerate(self.shape) if axis not in (self.row_axis, self.column_axis)]
        return matrix.reshape(out, inputs, *others).movedim((0, 1), (self.row_axis, self.column_axis)).contiguous()

    def sizes(self) -> Tensor:
        """How many weights each unit has, int32 ``[b, n]``."""
        if not self.pattern.is_block:
            bands = self.shape[self.row_axis]
            return torch.ones(bands, math.prod(self.shape) // max(1, bands), dtype=torch.int32)
        return self.blocks(torch.ones(self.shape, dtype=torch.int32)).sum((2, 3), dtype=torch.int32)

    def means(self, values: Tensor) -> Tensor:
        """The mean of each unit's values, float64 ``[b, n]``."""
        return self.blocks(values.double()).sum((2, 3)) / self.sizes().to(values.device)

    def columns_of(self) -> Tensor:
        """Columns ``[n, columns]`` of each unit of a band in the weight as a matrix ``[r, k]``; -1 where it has fewer.

        For weights whose rows come first.
        """
        k = math.prod(self.shape[1:])
        band = Units((1, *self.shape[1:]), 0, self.column_axis, self.pattern)
        return band.blocks(torch.arange(k), -1)[0, :, 0]

    @property
    def _by_position(self) -> bool:
        return self.columns > 1 or self.pattern.quota is not None


def cheapest(costs: Tensor, sizes: Tensor, removed: int) -> Tensor:
    """The fewest of the cheapest units whose sizes sum to ``removed`` or more: their numbers, the cheapest first.

    Args:
        costs: Of each unit for its size, ``[u]``. Of equal ones the first goes first.
        sizes: Weights of each unit, or what else is counted, ``[u]``.
    """
    order = costs.argsort(stable=True)
    if removed <= 0:
        return order[:0]
    return order[: 1 + int((sizes[order].cumsum(0) < removed).sum())]


def kept_of_all(
    costs: Mapping[str, Tensor], sizes: Mapping[str, Tensor], removed: int, each: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """What is left of several tensors when the cheapest of all their units have gone, bool ``[b, n]`` by tensor.

    Args:
        costs: Of a weight of each unit, ``[b, n]`` by tensor.
        sizes: Weights of each unit, ``[b, n]`` by tensor.
        removed: What goes at least: weights, or what they count for.
        each: What a weight counts for, by tensor: units compete by what they cost for that. One where None.
    """
    prices, amounts = [costs[name].flatten() for name in costs], [sizes[name].flatten() for name in costs]
    if each is not None:
        prices = [price / each[name] for name, price in zip(costs, prices, strict=True)]
        amounts = [amount.double() * each[name] for name, amount in zip(costs, amounts, strict=True)]
    kept = torch.ones(sum(map(len, prices)), dtype=torch.bool)
    kept[cheapest(torch.cat(prices), torch.cat(amounts), removed)] = False
    parts = torch.split(kept, [len(part) for part in prices])
    return {name: part.reshape(costs[name].shape) for name, part in zip(costs, parts, strict=True)}


def masks_without(
    units: Mapping[str, Units],
    costs: Mapping[str, Tensor],
    removed: Mapping[str, int] | int,
    *,
    each: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Masks of what is left when the cheapest units have gone, bool in the weights' shapes.

    Args:
        costs: Of a weight of each unit, by tensor ``[b, n]``.
        removed: What goes at least of all tensors together; or weights that go at least of each one.
        each: What a weight of each tensor counts for where they compete; one where None.
    """
    costs, sizes = {name: costs[name] for name in units}, {name: own.sizes() for name, own in units.items()}
    if isinstance(removed, int):
        kept = kept_of_all(costs, sizes, removed, each)
    else:
        kept = {name: kept_of_all({name: costs[name]}, sizes, removed[name])[name] for name in units}
    return {name: own.spread(kept[name]) for name, own in units.items()}


def masks_of_most(units: Mapping[str, Units], costs: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Masks that keep the n dearest of every m neighbours, m being of the units' quota; of equal ones, the first."""
    masks = {}
    for name, own in units.items():
        assert own.pattern.quota is not None
        groups = costs[name].reshape(-1, own.pattern.quota[1])
        order = torch.argsort(groups, dim=1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
        masks[name] = own.spread(keep.reshape(costs[name].shape))
    return masks

"""Widths by channel: every row of a weight rounded at every width, and the mixtures of widths that lose least.

A row ``w`` that becomes ``s q`` is expected to cost ``g (w - s q) A (w - s q)^T``, with ``A`` the second moment of the
layer's inputs and ``g`` how much the outputs react to the row (``curvature.row_traces``, in units of ``tr A``). For a
number of bits on average, the rows get the widths with the least sum: those that minimise cost plus a price for each
bit, and what is left is spent on the rows that gain most for it.
Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3), on measured costs.
Cost: one rounding of each row at each width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.trace import Layer
from ..numerics.output_rounding import factor_of, round_at_all
from ..numerics.rounding import round_weight, spread_scale
from ..plan import grid_bits, weight_scheme
from ..widths import WIDTHS, Width, by_channel, is_width, letters_of, of_letter

MIXED = "0abcdefghijklm"  # widths that channels share a number of bits by
AT_ONCE = 2**20  # weights at several widths that are rounded together
STEPS = 60  # of the search for the price of a bit


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight rounded at every width.

    Attributes:
        letters: Of the widths, of ``widths.WIDTHS``.
        rounded: By letter: float32, the weight's shape.
        costs: ``[c, w]``, float64: what each row at each width is expected to cost, in a unit of the layer's own; one
            row in all where channels can't have widths of their own.
    """

    letters: str
    rounded: Mapping[str, Tensor]
    costs: Tensor

    def may_mix(self) -> bool:
        return len(self.costs) > 1

    def at(self, width: Width) -> Tensor:
        """The weight at a width."""
        letters = self._letters(width)
        if len(letters) == 1:
            return self.rounded[letters]
        weight = torch.empty_like(self.rounded[letters[0]])
        for letter in set(letters):
            places = [place for place, own in enumerate(letters) if own == letter]
            weight[places] = self.rounded[letter][places]
        return weight

    def _letters(self, width: Width) -> str:
        """Where activations are rounded, 8 bits have the levels of 7."""
        letters = letters_of(width)
        return letters if "8" in self.letters else letters.replace("8", "7")

    def cost(self, width: Width) -> float:
        """Of the whole weight."""
        places = torch.tensor([self.letters.index(letter) for letter in self._letters(width)])
        return float(self.costs.gather(1, places.expand(len(self.costs))[:, None]).sum())


def rounded_rows(
    layer: Layer,
    weight: Tensor,
    moment: Tensor | None,
    traces: Tensor,
    *,
    with_integers: bool,
    by_outputs: bool,
    group_size: int | None = None,
) -> Rows:
    """Every row of a weight at every width.

    Args:
        moment: Of the layer's inputs, as ``input_moments`` gives it; None where there is none.
        traces: ``[c]``, of ``row_traces``.
        with_integers: Activations are rounded.
        by_outputs: Levels are chosen by what they do to the outputs, rather than the nearest.
        group_size: Inputs of a row that share a scale; the weight then has one width.
    """
    mixes = layer.axis == 0 and moment is not None and len(weight) > 1 and group_size is None
    letters = MIXED + "2345678" if mixes else "2345678"
    if with_integers and mixes:
        letters = letters.replace("8", "")  # has the levels of 7 bits
    rounded = rounded_at(
        layer, weight, moment, letters, with_integers=with_integers, by_outputs=by_outputs, group_size=group_size
    )
    errors = torch.stack([_output_errors(weight - value, moment) for value in rounded.values()], 1)
    power = 1.0 if moment is None else float(moment.diagonal(dim1=-2, dim2=-1).sum(-1).mean()) or 1.0
    costs = traces[:, None] * errors / power
    return Rows(letters, rounded, costs if mixes else costs.sum(0, keepdim=True))


def _output_errors(change: Tensor, moment: Tensor | None) -> Tensor:
    """``[c]``: how far each row's outputs move, in the mean square."""
    if moment is None or moment.shape[-1] != change[0].numel():
        return change.double().flatten(1).square().sum(1)
    groups = _in_groups(moment)
    rows = change.double().reshape(len(groups), -1, groups.shape[-1])
    return ((rows @ groups.double()) * rows).sum(2).reshape(-1).clamp_min(0)


def _in_groups(moment: Tensor) -> Tensor:
    """``[g, k, k]``."""
    return moment if moment.dim() == 3 else moment[None]


def rounded_at(
    layer: Layer,
    weight: Tensor,
    moment: Tensor | None,
    letters: Sequence[str],
    *,
    with_integers: bool,
    by_outputs: bool,
    group_size: int | None = None,
) -> dict[str, Tensor]:
    """A weight at each of some widths for all of its rows; the other arguments are those of ``rounded_rows``."""
    widths = {letter: of_letter(letter) for letter in letters if letter != "0"}
    grids = {letter: grid_bits(w, weight_scheme(w, with_integers=with_integers)) for letter, w in widths.items()}
    found = {letter: torch.zeros_like(weight) for letter in letters if letter == "0"}
    if not by_outputs or moment is None or layer.axis not in (0, None):
        for letter, grid in grids.items():
            levels, scale = round_weight(weight, grid, axis=layer.axis, search="mse", group_size=group_size)
            found[letter] = levels * spread_scale(scale, layer.axis, weight.shape, group_size)
        return found
    factored, pruned = factor_of(_in_groups(moment)), weight == 0
    shape = (len(factored.h), -1, factored.h.shape[-1])
    zeros = pruned.reshape(shape) if bool(pruned.any()) else None
    size = max(1, AT_ONCE // weight.numel())
    names = list(grids)
    for begin in range(0, len(names), size):
        some = names[begin : begin + size]
        made = round_at_all(
            weight.reshape(shape),
            factored,
            [grids[letter] for letter in some],
            is_shared=layer.axis is None,
            zeros=zeros,
            is_quick=True,
            sweeps=1,
            group_size=group_size,
        )
        for letter, (levels, scale) in zip(some, made, strict=True):
            step = scale[..., None] if group_size is None else spread_scale(scale[0], 0, weight.shape, group_size)
            found[letter] = (step * levels).reshape(weight.shape)
    return found


def mixtures(rows: Rows, targets: Sequence[float]) -> dict[float, Width]:
    """By the bits that a weight has on average at most: the widths of the rows with the least cost.

    Targets that give the widths of a smaller one, or nearly no levels at all, are left out.
    """
    letters = [letter for letter in rows.letters if letter in MIXED]
    costs = rows.costs[:, [rows.letters.index(letter) for letter in letters]]
    bits = torch.tensor([WIDTHS[letter].bits for letter in letters], dtype=torch.float64)
    found: dict[float, Width] = {}
    last = None
    for target in sorted(targets):
        chosen = _filled(costs, bits, _priced(costs, bits, target), target)
        if chosen is None or (last is not None and bool((chosen == last).all())):
            continue
        last = chosen
        width = by_channel([letters[place] for place in chosen.tolist()])
        if is_width(width):
            found[target] = width
    return found


def _priced(costs: Tensor, bits: Tensor, target: float) -> Tensor | None:
    """The index of each row's width at the least price of a bit that keeps the target; None where none does."""
    low, high = 0.0, float(costs.max()) + 1e-300
    best = None
    for _ in range(STEPS):
        price = high if best is None else (low * high) ** 0.5 if low else high / 16
        chosen = (costs + price * bits).argmin(1)
        if float(bits[chosen].mean()) <= target + 1e-9:
            best, high = chosen, price
        elif best is None:
            high *= 16
        else:
            low = price
    return best


def _filled(costs: Tensor, bits: Tensor, chosen: Tensor | None, target: float) -> Tensor | None:
    """What is left of the target spent on the rows that gain most for a bit."""
    if chosen is None:
        return None
    left = target * len(costs) + 1e-9 - float(bits[chosen].sum())
    while True:
        more = bits[None] - bits[chosen][:, None]
        gain = costs.gather(1, chosen[:, None]) - costs
        rate = torch.where((more > 0) & (more <= left) & (gain > 0), gain / more.clamp_min(1e-9), 0.0)
        place = int(rate.argmax())
        row, width = divmod(place, len(bits))
        if float(rate[row, width]) <= 0:
            return chosen
        chosen = chosen.clone()
        left -= float(more[row, width])
        chosen[row] = width

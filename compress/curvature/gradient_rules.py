"""Rules for per-sample gradients: an operator's parameter, from its inputs and the gradient of its output.

``RULES`` has a line for each pair of operator and argument: the function that gives the rows, and how many of the
output's last dimensions can't be the batch. What has no line is differentiated by ``torch.func``, one operator at a
time: the pull-back of one example, vectorised over the batch.
Source: Goodfellow 2015 (arXiv:1510.01799); Rochette, Manoel, Tramel 2019 (arXiv:1912.06015) for convolutions.
Cost: of a rule, about that of the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from ..graph.trace import CONVOLUTIONS, TRANSPOSED, argument, argument_names, aten

MIN_CALLED = 4  # examples of a row, from which on a convolution's row is fastest as a call of its own


@dataclass(frozen=True, slots=True)
class Site:
    """Where a parameter is an argument of an operator whose examples are apart.

    Attributes:
        node: The operator's.
        position: Of the parameter among its arguments.
        tensor: The parameter's name.
        batch_dim: Of the output.
        dims: The batch's dimension in each argument; none in what has no examples.
    """

    node: fx.Node
    position: int
    tensor: str
    batch_dim: int
    dims: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """A site in one forward pass.

    Attributes:
        arguments: The operator's, sizes of the batch among them 1.
        edge: Where the gradient of its output comes by.
        shape: Of its output.
        factor: ``[c]``: where a batch norm is folded into the operator, the norm's factors. The output is the norm's
            then, and the operator's own has as many times its gradient.
    """

    site: Site
    arguments: tuple[Any, ...]
    edge: GradientEdge
    shape: torch.Size
    factor: Tensor | None = None

    @property
    def node(self) -> fx.Node:
        return self.site.node

    @property
    def tensor(self) -> str:
        return self.site.tensor

    def part(self, examples: slice) -> Use:
        """What some of the examples have of it."""
        pairs = zip(self.arguments, self.site.dims, strict=True)
        arguments = tuple(value if dim is None else _along(value, dim, examples) for value, dim in pairs)
        return replace(self, arguments=arguments)


# From a use, the gradient of its output, and how many successive examples share a row: ``[n or n / group, elements]``.
Rule = Callable[[Use, Tensor, int], Tensor]


def rows_of(use: Use, gradient: Tensor, *, group: int = 1) -> Tensor:
    """Gradients ``[ceil(n / group), elements]`` of the parameter, each the sum over ``group`` successive examples.

    Args:
        gradient: Of the output; the last row is of the examples that are left.
    """
    dim = use.site.batch_dim
    count = gradient.shape[dim]
    whole = count - count % group
    if whole in (0, count):
        return _rows(use, gradient, min(group, count))
    parts = (slice(0, whole), group), (slice(whole, count), count - whole)
    return torch.cat([_rows(use.part(some), _along(gradient, dim, some), size) for some, size in parts])


def summed(rows: Tensor, group: int) -> Tensor:
    """Rows ``[n, elements]`` added up, ``group`` successive ones at a time, to ``[ceil(n / group), elements]``."""
    return rows if group == 1 else torch.stack([part.sum(0) for part in torch.split(rows, group)])


def _rows(use: Use, gradient: Tensor, group: int) -> Tensor:
    """``rows_of`` a multiple of ``group`` examples."""
    found = RULES.get(_key(use.node, use.site.position))
    count = gradient.shape[use.site.batch_dim] // group
    rows = _by_torch_func(use, gradient) if found is None else found[0](use, gradient, group)
    rows = rows if rows.shape[0] == count else summed(rows, group)
    if use.factor is None:
        return rows
    return rows.reshape(count, use.factor.shape[0], -1).mul_(use.factor.unsqueeze(1)).flatten(1)  # a convolution's own


def _along(value: Tensor, dim: int, part: slice) -> Tensor:
    return value.narrow(dim, part.start, part.stop - part.start)


def num_trailing(node: fx.Node, position: int) -> int:
    """Of the output's last dimensions, how many can't be the batch."""
    found = RULES.get(_key(node, position))
    return 0 if found is None else found[1](node)


def _key(node: fx.Node, position: int) -> tuple[Any, str]:
    names = argument_names(node.target)
    return node.target, names[position] if names else ""


def _linear(use: Use, gradient: Tensor, group: int) -> Tensor:
    left, right = (examples_first(x, use.site.batch_dim, 1) for x in (gradient, use.arguments[0]))
    left, right = (x.reshape(len(x) // group, -1, x.shape[-1]) for x in (left, right))
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


def _convolution(use: Use, gradient: Tensor, group: int) -> Tensor:
    node, weight, inputs = use.node, use.arguments[1], use.arguments[0]
    spatial, count = weight.dim() - 2, gradient.shape[0] // group
    inputs, padding = padded(node, inputs, weight)
    groups = int(argument(node, "groups", 1))
    options = (
        each_dim(argument(node, "stride", 1), spatial),
        padding,
        each_dim(argument(node, "dilation", 1), spatial),
        node.target in TRANSPOSED,
        each_dim(argument(node, "output_padding", 0), spatial),
    )
    if group >= MIN_CALLED:
        parts = zip(gradient.chunk(count), inputs.chunk(count), strict=True)
        found = [_of_weight(g, x, weight, options, groups) for g, x in parts]
        # Theirs may be the layout of channels last, which a stack would keep, to be copied again.
        return torch.stack(found, out=weight.new_empty(count, *weight.shape)).flatten(1)
    # The rows as groups of one convolution: 2 to 5 times faster than a call an example, or than unfolding.
    gradient, inputs = (
        x.reshape(count, group, *x.shape[1:]).transpose(0, 1).reshape(group, -1, *x.shape[2:])
        for x in (gradient, inputs)
    )
    like = weight.new_empty(count * len(weight), *weight.shape[1:])
    return _of_weight(gradient, inputs, like, options, count * groups).reshape(count, -1)


def _of_weight(gradient: Tensor, inputs: Tensor, like: Tensor, options: tuple[Any, ...], groups: int) -> Tensor:
    """Gradient of a convolution's weight, summed over the batch; nothing but the shape of ``like`` matters."""
    found: Tensor = aten.convolution_backward(gradient, inputs, like, None, *options, groups, [False, True, False])[1]
    return found


def _embedding(use: Use, gradient: Tensor, group: int) -> Tensor:
    weight, indices = use.arguments[0], use.arguments[1]
    indices = examples_first(indices.unsqueeze(-1), use.site.batch_dim, 1)[..., 0]
    gradient = examples_first(gradient, use.site.batch_dim, 1)
    gradient = gradient.masked_fill((indices == argument(use.node, "padding_idx", -1)).unsqueeze(-1), 0)
    if argument(use.node, "scale_grad_by_freq", False):
        times = indices.new_zeros(len(indices), len(weight)).scatter_add_(1, indices, torch.ones_like(indices))
        gradient = gradient / times.gather(1, indices).unsqueeze(-1)
    rows = gradient.new_zeros(len(gradient) // group, len(weight), weight.shape[1])
    number = torch.arange(len(rows), device=indices.device).repeat_interleave(group).unsqueeze(1).expand_as(indices)
    return rows.index_put_((number, indices), gradient, accumulate=True).flatten(1)


def _factor(use: Use, gradient: Tensor, group: int) -> Tensor:
    """Of a norm: the output's gradient times what the norm is without factor and offset."""
    schema = use.node.target._schema.arguments  # type: ignore[union-attr]
    plain = [
        None if parameter.name in ("weight", "bias") else value
        for parameter, value in zip(schema, use.arguments, strict=False)
    ]
    return _offset(use, gradient * use.node.target(*plain), group)  # type: ignore[operator]


def _offset(use: Use, gradient: Tensor, group: int) -> Tensor:
    """The output's gradient, summed over all but the parameter's own dimensions."""
    if use.node.target in CHANNELS_SECOND:
        return gradient.flatten(2).sum(2) if gradient.dim() > 2 else gradient
    return examples_first(gradient, use.site.batch_dim, num_trailing(use.node, use.site.position)).sum(1).flatten(1)


def examples_first(value: Tensor, batch_dim: int, kept: int) -> Tensor:
    """``[n, positions, ...]``, the last ``kept`` dimensions as they are."""
    value = value.movedim(batch_dim, 0)
    return value.reshape(len(value), -1, *value.shape[value.dim() - kept :])


def _by_torch_func(use: Use, gradient: Tensor) -> Tensor:
    site, arguments = use.site, use.arguments
    weight, batched = arguments[site.position], [(p, d) for p, d in enumerate(site.dims) if d is not None]

    def pulled_back(gradient: Tensor, *inputs: Tensor) -> Tensor:
        whole = list(arguments)
        for (position, dim), value in zip(batched, inputs, strict=True):
            whole[position] = value.unsqueeze(dim)

        def operator(weight: Tensor) -> Tensor:
            value: Tensor = site.node.target(  # type: ignore[operator]
                *whole[: site.position], weight, *whole[site.position + 1 :], **site.node.kwargs
            )
            return value

        return torch.func.vjp(operator, weight)[1](gradient.unsqueeze(site.batch_dim))[0]  # type: ignore[no-any-return]

    inputs = [arguments[position] for position, _ in batched]
    dims = (site.batch_dim, *(dim for _, dim in batched))
    try:
        rows: Tensor = torch.func.vmap(pulled_back, in_dims=dims)(gradient, *inputs)
    except RuntimeError:  # torch has no type of its own for an operator that can't be vectorised
        parts = zip(*(x.unbind(dim) for x, dim in zip((gradient, *inputs), dims, strict=True)), strict=True)
        rows = torch.stack([pulled_back(*part) for part in parts])
    return rows.flatten(1)


def padded(node: fx.Node, inputs: Tensor, weight: Tensor) -> tuple[Tensor, list[int]]:
    """The input and the padding of a convolution; ``same`` may be uneven, and is put into the input itself."""
    spatial = weight.dim() - 2
    padding = argument(node, "padding", 0)
    if not isinstance(padding, str):
        return inputs, each_dim(padding, spatial)
    if padding == "valid":
        return inputs, [0] * spatial
    dilation = each_dim(argument(node, "dilation", 1), spatial)
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(inputs, sides), [0] * spatial


def each_dim(value: Any, spatial: int) -> list[int]:
    """One number a spatial dimension: ATen takes a single one for all."""
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * spatial if len(values) == 1 else values


def _all_but_first(node: fx.Node) -> int:
    return int(node.meta["val"].dim()) - 1


def _last(node: fx.Node) -> int:
    return 1


def _normalised(node: fx.Node) -> int:
    return len(argument(node, "normalized_shape", ()))


NORMS = (aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default)
CHANNELS_SECOND = {*CONVOLUTIONS, *TRANSPOSED, *NORMS}
RULES: dict[tuple[Any, str], tuple[Rule, Callable[[fx.Node], int]]] = {
    (aten.linear.default, "weight"): (_linear, _last),
    (aten.linear.default, "bias"): (_offset, _last),
    (aten.embedding.default, "weight"): (_embedding, _last),
    **{(op, "weight"): (_convolution, _all_but_first) for op in (*CONVOLUTIONS, *TRANSPOSED)},
    **{(op, "weight"): (_factor, _all_but_first) for op in NORMS},
    **{(op, "bias"): (_offset, _all_but_first) for op in CHANNELS_SECOND},
    **{(op, "weight"): (_factor, _normalised) for op in (aten.layer_norm.default, aten.rms_norm.default)},
    (aten.layer_norm.default, "bias"): (_offset, _normalised),
}

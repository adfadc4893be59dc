"""The trace of a symmetric matrix that is known by its products with vectors, with its standard error.

``hutchinson``: the mean of ``v^T A v`` over random signs ``v`` (Hutchinson 1989).
``hutch_plus_plus``: the trace on a subspace that holds the largest eigenvalues, exactly, and Hutchinson on the rest
(Meyer, Musco, Musco and Woodruff 2021, arXiv:2010.09649).
``xtrace``: the same with every probe in both parts, each left out of the subspace in turn (Epperly, Tropp and Webber
2024, arXiv:2301.07825, section 2).
Cost: the products; besides, ``k^2 d`` operations and ``4 k d`` numbers for k vectors of the last two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_PRODUCTS = 2  # a standard error needs two values
FIRST = 8  # products before a standard error is believed: the spread of fewer values is often small by chance
NEXT = 4  # products between two looks at it

# ``A v`` for each row of ``[k, d]``, and ``[k, d]`` random signs of the probes that a range numbers.
Products = Callable[[Tensor], Tensor]
Probes = Callable[[range], Tensor]


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """The trace of a matrix; of a layer's block of the mean loss's curvature it is in loss per squared weight.

    Attributes:
        stderr: Of the probes; the examples are taken as given.
        passes: Over the data, or products with this matrix.
    """

    mean: float
    stderr: float
    passes: int


@dataclass(frozen=True, slots=True)
class Control:
    """A matrix near to the one that is estimated, whose trace is known.

    Attributes:
        values: ``v^T B v`` of the probes in the order of their numbers.
    """

    trace: float
    values: tuple[float, ...]


def hutchinson(
    products: Products, probes: Probes, *, rtol: float, limit: int, control: Control | None = None
) -> TraceEstimate:
    """The mean of ``v^T A v``: unbiased, with variance ``2 (|A|_F^2 - sum_i A_ii^2) / k`` for k probes.

    With a control B it is the mean of ``v^T (A - B) v + tr B``, of the variance of ``A - B``; where that turns out to
    be the larger one, B is left out.

    Args:
        products: Of the symmetric ``A``.
        probes: The same rows for a number, whatever else is drawn.
        rtol: Probes are drawn until the standard error is at most this share of the magnitude.
        limit: The most products; at least ``MIN_PRODUCTS`` are made.
        control: With as many values as products, or more.

    Example:
        >>> hutchinson(lambda v: v * torch.tensor([1.0, 2.0]), lambda r: torch.ones(len(r), 2), rtol=0.1, limit=4)
        TraceEstimate(mean=3.0, stderr=0.0, passes=4)
    """
    return _sampled(
        products, probes, lambda v: v, first=0, offset=0.0, spent=0, rtol=rtol, limit=limit, control=control
    )


def hutch_plus_plus(
    products: Products, probes: Probes, *, rtol: float, limit: int, sketch: Tensor | None = None
) -> TraceEstimate:
    """``tr(Q^T A Q)`` and Hutchinson's estimate of what ``Q`` leaves, ``Q`` a basis of ``A S`` for random signs ``S``.

    A third of ``limit`` goes into each of ``A S``, ``A Q`` and the rest's probes; of these, as many as ``rtol`` needs.
    With a sketch in place of ``A S`` it is a half for each of the last two.

    Args:
        sketch: ``[k, d]``: ``B S`` of the first k probes for a matrix B that is near to A and cost no products of A.
            The probes of the rest are others, so that the estimate is unbiased whatever B is.
    """
    limit = max(limit, MIN_PRODUCTS)
    size = (limit - MIN_PRODUCTS) // 2 if limit < 3 * MIN_PRODUCTS else limit // 3
    if sketch is not None:
        size = min(sketched(limit), len(sketch))
    rows = probes(range(size)) if sketch is None else sketch[:size]
    rows = rows[: rows.shape[1]]  # d of them span everything
    if not len(rows):
        return hutchinson(products, probes, rtol=rtol, limit=limit)
    basis: Tensor = torch.linalg.qr((products(rows) if sketch is None else rows).T)[0].T.contiguous()
    size, spent = len(basis), len(basis) if sketch is not None else 2 * len(basis)
    known = float((products(basis) * basis).double().sum())

    def rest(v: Tensor) -> Tensor:
        return v - (v @ basis.T) @ basis

    if size == basis.shape[1]:
        return TraceEstimate(known, 0.0, spent)
    return _sampled(
        products, probes, rest, first=size, offset=known, spent=spent, rtol=rtol, limit=max(limit, spent + MIN_PRODUCTS)
    )


def sketched(limit: int) -> int:
    """How many rows of a sketch ``hutch_plus_plus`` uses with so many products."""
    return max(limit, 2 * MIN_PRODUCTS) // 2


def xtrace(products: Products, probes: Probes, *, rtol: float, limit: int) -> TraceEstimate:
    """The mean over probes ``i`` of ``tr(Q_i^T A Q_i) + u_i^T A u_i``, by two products a probe.

    ``Q_i`` is a basis of ``A V`` without its i-th column, ``u_i`` what it leaves of the i-th probe.

    Args:
        As for ``hutchinson``.

    Returns:
        The standard error takes the summands as independent, as the paper does, and they nearly are: two of it hold in
        75 to 85 % of cases at 9 to 15 probes, rather than 95 %.
    """
    limit, d = max(limit, 2 * MIN_PRODUCTS), probes(range(1)).shape[1]
    v = images = basis = images_of_basis = probes(range(0))
    coefficients = torch.zeros(0, 0, dtype=torch.float64, device=v.device)
    while True:
        count = min(max(len(v) + NEXT // 2, FIRST // 2), limit // 2, d)
        drawn = probes(range(len(v), count))
        made = products(drawn)
        added, coefficients = _extended(basis, coefficients, made)
        v, images, basis = torch.cat([v, drawn]), torch.cat([images, made]), torch.cat([basis, added])
        images_of_basis = torch.cat([images_of_basis, products(added)])
        if count == d:  # the basis spans everything
            return TraceEstimate(float((basis * images_of_basis).double().sum()), 0.0, 2 * count)
        values = _left_out(v, images, basis, images_of_basis, coefficients)
        mean, stderr = sum(values) / count, standard_error(values)
        if 2 * (count + 1) > limit or (2 * count >= FIRST and stderr <= rtol * abs(mean)):
            return TraceEstimate(mean, stderr, 2 * count)


# What needs nothing but products.
ESTIMATORS: dict[str, Callable[..., TraceEstimate]] = {
    "hutchinson": hutchinson,
    "hutch++": hutch_plus_plus,
    "xtrace": xtrace,
}


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two or more independent values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _sampled(
    products: Products,
    probes: Probes,
    project: Callable[[Tensor], Tensor],
    *,
    first: int,
    offset: float,
    spent: int,
    rtol: float,
    limit: int,
    control: Control | None = None,
) -> TraceEstimate:
    """``offset`` and the mean of ``v^T A v`` over projected probes, from the one numbered ``first`` on."""
    values: list[float] = []
    limit = max(limit - spent, MIN_PRODUCTS)
    while True:
        start = first + len(values)
        count = min(NEXT if values else FIRST, limit - len(values))
        v = project(probes(range(start, start + count)))
        values += (products(v) * v).double().sum(1).tolist()
        chosen = values
        if control is not None:
            nearer = [value - own + control.trace for value, own in zip(values, control.values, strict=False)]
            chosen = min(values, nearer, key=standard_error)
        mean, stderr = offset + sum(chosen) / len(chosen), standard_error(chosen)
        if len(values) == limit or stderr <= rtol * abs(mean):
            return TraceEstimate(mean, stderr, spent + len(values))


def _extended(basis: Tensor, coefficients: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """More orthonormal rows for a basis ``[k, d]`` that is to span ``rows`` too, and the coefficients of all.

    Args:
        coefficients: Upper triangular ``R`` ``[k, k]`` in float64, with ``Y^T = Q^T R`` for the rows ``Y`` so far.
    """
    size, count = len(basis), len(basis) + len(rows)
    # Householder's method gives orthonormal columns whatever the rank; those of the basis come out as they are, up to
    # their sign.
    q, r = torch.linalg.qr(torch.cat([basis, rows]).T)
    r = r.double()
    total = coefficients.new_zeros(count, count)
    total[:size, :size] = coefficients
    total[:size, size:] = r.diagonal()[:size].sign()[:, None] * r[:size, size:]
    total[size:, size:] = r[size:, size:]
    return q[:, size:].T.contiguous(), total


def _left_out(v: Tensor, images: Tensor, basis: Tensor, images_of_basis: Tensor, coefficients: Tensor) -> list[float]:
    """XTrace's estimate of each probe, from ``V``, ``A V``, ``Q``, ``A Q`` ``[k, d]`` and ``R``.

    Without its i-th column ``A V`` spans what ``Q`` does but for one direction, ``s_i``: column i of ``R^-T``, scaled.
    """
    diagonal = coefficients.diagonal()
    # A matrix of low rank leaves columns of rounding errors or zeros, whose direction is any.
    floor = torch.finfo(v.dtype).eps * float(diagonal.abs().max()) or 1.0
    raised = torch.where(diagonal.abs() < floor, floor, diagonal)
    solvable = coefficients - torch.diag(diagonal) + torch.diag(raised)
    eye = torch.eye(len(v), dtype=torch.float64, device=v.device)
    s = torch.linalg.solve_triangular(solvable.T, eye, upper=False)
    s = s / s.norm(dim=0)
    inner = (basis @ images_of_basis.T).double()
    shares = (basis @ v.T).double()  # [k, k]: of the probes in the basis, a column each
    kept = (shares - s * (s * shares).sum(0)).to(v.dtype).T
    left = v - kept @ basis
    found = (left * (images - kept @ images_of_basis)).double().sum(1)
    within = inner.trace() - (s * (inner @ s)).sum(0)
    values: list[float] = (within + found).tolist()
    return values

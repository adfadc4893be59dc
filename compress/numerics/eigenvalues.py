"""The largest eigenvalues of a symmetric matrix that is known by its products with vectors, with error bounds.

Lanczos's method with full orthogonalisation, of ARPACK through scipy: the eigenvalues of the matrix on the span of
``v, A v, ..., A^(k-1) v`` (Lanczos 1950; Lehoucq, Sorensen and Yang 1998).
Cost: the products; besides, ``k^2 d`` operations and ``k d`` numbers in float64 for k products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .trace import Products

FIRST = 6  # products of the short search, beside two an eigenvalue
ANY_RESIDUAL = 1e30  # for ARPACK: what it found after so many products is wanted, whatever the residual


@dataclass(frozen=True, slots=True)
class Eigenvalue:
    """Of a layer's block of the mean loss's curvature, in loss per squared weight.

    Attributes:
        residual: ``|A x - value x|`` for the unit vector x that was found: the matrix has an eigenvalue within it.
    """

    value: float
    residual: float


def top_eigenvalues(
    products: Products, start: Tensor, count: int, *, rtol: float, limit: int
) -> tuple[Eigenvalue, ...]:
    """The ``count`` largest eigenvalues, or all d of them where there are fewer; the largest first.

    Args:
        products: Of the symmetric ``A``.
        start: Any vector ``[d]`` that isn't orthogonal to what is wanted, such as random numbers.
        rtol: A search with few products is enough if every residual is at most this share of its value.
        limit: Products of the search that follows where it isn't; more than ``count + 1``.

    Returns:
        Exact values where d is at most ``limit``, with a residual of 0: then the matrix itself is formed.

    Example:
        >>> top_eigenvalues(lambda v: v * torch.tensor([1.0, 3.0]), torch.ones(2), 1, rtol=0.05, limit=4)
        (Eigenvalue(value=3.0, residual=0.0),)
    """
    d = len(start)
    if d <= limit:
        matrix = products(torch.eye(d, dtype=start.dtype, device=start.device)).double().cpu()
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)[:count].tolist()
        return tuple(Eigenvalue(value, 0.0) for value in values)
    if not products(start.unsqueeze(0)).any():  # the zero matrix, but for an unlucky start
        return (Eigenvalue(0.0, 0.0),) * count
    found: tuple[Eigenvalue, ...] = ()
    for size in (min(FIRST + 2 * count, limit), limit):
        found = _searched(products, start, count, size)
        if size == limit or all(one.residual <= rtol * abs(one.value) for one in found):
            break
    return found


def _searched(products: Products, start: Tensor, count: int, size: int) -> tuple[Eigenvalue, ...]:
    """What ``size`` products find, and a last one for each residual."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    d = len(start)

    def product(v: np.ndarray) -> np.ndarray:
        row = torch.from_numpy(v.reshape(1, d)).to(start.device, start.dtype)
        found: np.ndarray = products(row)[0].double().cpu().numpy()
        return found

    operator, first = LinearOperator((d, d), matvec=product, dtype=np.float64), start.double().cpu().numpy()
    vectors = eigsh(operator, k=count, which="LA", v0=first, ncv=size, maxiter=1, tol=ANY_RESIDUAL)[1]
    x = torch.from_numpy(vectors.T.copy()).to(start.device, start.dtype)
    images, x = products(x).double(), x.double()
    norms = x.norm(dim=1, keepdim=True)
    images, x = images / norms, x / norms
    values = (x * images).sum(1)
    residuals = (images - values[:, None] * x).norm(dim=1)
    pairs = zip(values.tolist(), residuals.tolist(), strict=True)
    return tuple(sorted((Eigenvalue(*pair) for pair in pairs), key=lambda one: -one.value))

"""Static M-FAC: the inverse empirical Fisher of given gradients, and the exact joint update of Optimal Brain Surgeon.

Source: Frantar, Kurtic, Alistarh 2021 (arXiv:2107.03356). Their row-by-row recursion is a Cholesky factorisation; here
it is matrix products. With gradients ``G`` of shape ``[m, d]``, ``F = damping I + G^T G / m``, ``u = m damping`` and
``L L^T = u I + G G^T``::

    F^-1 x       = (x - G^T (u I + G G^T)^-1 G x) / damping
    diag(F^-1)   = (1 - column norms^2 of L^-1 G) / damping
    F^-1 G^T c   = m G^T (u I + G G^T)^-1 c

and ``F^-1 = m (u I + G^T G)^-1`` directly for a block of ``B <= m`` parameters.

Precision: m x m and B x B matrices are float64. Of float32 gradients, ``G G^T`` is summed from float32 products and
``G^T G`` from float64 ones. The first line loses ``log10(||F|| / damping)`` digits where ``x`` lies in the span of the
gradients: a solve in float64 is refined, with residuals in twice the gradients' precision. What is known to lie in the
span (``ihvp_span``, the joint update) is never a difference. The diagonal and the elements lose two digits at most:
where the second line would lose more, they come from refined solves.
Cost: ``m^2 d / 2`` multiply-adds, and as many for the diagonal. Memory beside the gradients: ``n min(m, B)^2`` float64
numbers for n blocks, and pieces of 16 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError
from . import blas
from .gradient_file import CPU, ChunkedGradients, file_gradients, held_gradients

DTYPES = (torch.float32, torch.float64)
ALIGNMENT = 64  # bytes: a cache line, and the widest register
PIECE = 2**21  # elements of the gradients worked on at once: 16 MB in float64, which malloc reuses
DEVICE_PIECE = 2**27  # the same on an accelerator, whose products are fast where they are large
DEVICE_SHARE = 0.8  # of an accelerator's free memory, that gradients may take there
ROWS = 64  # rows of a triangular product computed at once; what is beyond the triangle is left out in such steps
DEVICE_ROWS = 256  # the same on an accelerator, of products with few rows and long sums
SUMMED = 4  # strips whose products are summed in the gradients' precision before they go to float64
SMALL_GAP = 1e-2  # least 1 - q of the diagonal's formula that is used; m / 0.99 columns of a block can have less
NUM_REFINEMENTS = 2  # the second matters for float32 gradients, and below damping 1e-6 ||F||

Gradients = Tensor | ChunkedGradients
Solve = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class _System:
    """``u I + G^T G`` of each of ``n`` blocks with columns ``[n, B]``.

    ``solve_small`` solves it where ``B <= m``, else ``u I + G G^T``. A ``u`` of shape ``[k]`` has one for each of the k
    columns of what is solved for.
    """

    gradients: Gradients
    columns: Tensor
    u: float | Tensor
    solve_small: Solve


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """``n`` blocks of one size: columns ``[n, B]``; factor ``(u I + G^T G)^-1`` where ``B <= m``, else ``L^-1``."""

    columns: Tensor
    factor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class InverseFisher:
    """``F^-1`` of ``F = damping I + G^T G / m``, block by block; made by ``inverse_fisher``.

    ``damping`` is the one in force: larger than asked for, by a power of ten, where Cholesky failed.
    """

    gradients: Gradients
    damping: float
    blocks: tuple[_Blocks, ...]

    def ihvp(self, x: Tensor) -> Tensor:
        """``F^-1 x``, in the wider dtype of ``x`` and the gradients.

        In float64 it is refined, and accurate also for ``x`` in the span of the gradients at small damping. In float32
        it is plain and fast, and off by ``1e-7 ||F|| / damping`` of the part of ``x`` in the span: pass a float64
        ``x`` where that matters, or the coefficients of what lies in the span to ``ihvp_span``.

        Args:
            x: ``[d]`` or ``[d, k]``.

        Raises:
            NumericsError: ``x`` is not finite.
        """
        m, d = self.gradients.shape
        _check_finite("x", x, d, dims=(1, 2))
        right = x.detach().to(torch.promote_types(x.dtype, self.gradients.dtype)).reshape(d, -1)
        solve = _plain_solve if right.dtype == torch.float32 else _solve
        result = torch.empty_like(right)
        for system, _ in self._systems(right.shape[1]):
            result[system.columns] = m * solve(system, right[system.columns])
        return result.reshape(x.shape)

    def ihvp_span(self, coefficients: Tensor) -> Tensor:
        """``F^-1 G^T c``: the product with a combination of gradients, without a subtraction.

        Args:
            coefficients: ``c``, of shape ``[m]`` or ``[m, k]``.

        Returns:
            ``[d]`` or ``[d, k]``, float64.

        Raises:
            NumericsError: A coefficient is not finite.
        """
        m, d = self.gradients.shape
        _check_finite("coefficients", coefficients, m, dims=(1, 2))
        targets = coefficients.detach().to(torch.float64).reshape(m, -1)
        result = targets.new_empty(d, targets.shape[1])
        for system, _ in self._systems(targets.shape[1]):
            right = _ridge_right(self.gradients, system.columns, targets.expand(len(system.columns), -1, -1))
            result[system.columns] = m * _ridge(system, right)
        return result.reshape(d, *coefficients.shape[1:])

    def diagonal(self) -> Tensor:
        """``diag(F^-1)``, ``[d]``, in the gradients' dtype; from ``1 / F_ii`` to ``1 / damping``."""
        m, d = self.gradients.shape
        result = torch.empty(d, dtype=self.gradients.dtype, device=self.gradients.device)
        for system, factor in self._systems():
            result[system.columns] = (m * _diagonal(system, factor)).to(result.dtype)
        return result

    def element(self, i: int, j: int) -> float:
        """``(F^-1)_ij``."""
        return float(self.submatrix([i], [j]))

    def submatrix(self, rows: Sequence[int] | Tensor, columns: Sequence[int] | Tensor) -> Tensor:
        """``F^-1`` at the given rows and columns, float64; zero between parameters of different blocks.

        Raises:
            IndexError: An index is not in ``0 .. d - 1``.
        """
        m, d = self.gradients.shape
        row, column = (torch.as_tensor(i, dtype=torch.int64, device=self.gradients.device) for i in (rows, columns))
        for index in torch.cat((row, column)).tolist():
            if not 0 <= index < d:
                raise IndexError(f"index {index} is not in 0 .. {d - 1}")
        result = torch.zeros(len(row), len(column), dtype=torch.float64, device=self.gradients.device)
        for group in self.blocks:
            (row_block, row_at), (column_block, column_at) = _locate(group.columns, row), _locate(group.columns, column)
            for block in sorted(set(row_block.tolist()) & set(column_block.tolist()) - {-1}):
                here, there = torch.nonzero(row_block == block)[:, 0], torch.nonzero(column_block == block)[:, 0]
                system, factor = self._system(group, slice(block, block + 1))
                result[here[:, None], there] = m * _entries(system, factor, row_at[here], column_at[there])
        return result

    def diagonal_blocks(self, units: Tensor) -> Tensor:
        """``(F^-1)_QQ`` of sets ``Q`` of parameters, ``[u, s, s]``, float64: symmetric, positive definite.

        Args:
            units: int64 ``[u, s]``, the parameters of each; -1 where a set has fewer, whose row and column are those of
                a parameter without gradients.
        """
        count, s = units.shape
        units, eye = units.to(self.gradients.device), torch.eye(s, dtype=torch.float64, device=self.gradients.device)
        result = (eye / self.damping).repeat(count, 1, 1)
        for group in self.blocks:
            block, at = _locate(group.columns, units)
            for part in _parts(group.columns, len(self.gradients)):
                here = (block >= part.start) & (block < part.stop)
                some = torch.nonzero(here.any(1))[:, 0]
                system, factor = self._system(group, part)
                for few in (some[step] for step in _parts(units[some], len(self.gradients))):
                    inside = torch.where(here[few], block[few] - part.start, -1)
                    found, is_own = _unit_blocks(system, factor, inside, at[few])
                    result[few] = torch.where(is_own, len(self.gradients) * found, result[few])
        return result

    def _systems(self, width: int = 1) -> Iterator[tuple[_System, Tensor]]:
        for group in self.blocks:
            for part in _parts(group.columns, len(self.gradients), width):
                yield self._system(group, part)

    def _system(self, group: _Blocks, part: slice) -> tuple[_System, Tensor]:
        factor, u = group.factor[part], len(self.gradients) * self.damping
        return _inverse_system(self.gradients, group.columns[part], factor, u), factor


def piece(device: torch.device) -> int:
    """Elements of the gradients that are worked on at once."""
    return PIECE if device.type == "cpu" else DEVICE_PIECE


def strip_width(m: int, device: torch.device, n: int = 1) -> int:
    """Columns of m gradients that are worked on at once, where each of n blocks has more than ``m``."""
    return max(m, piece(device) // (m * n))


def new_gradients(m: int, d: int, dtype: torch.dtype, *, memory: int, device: torch.device = CPU) -> Gradients:
    """Zeros ``[m, d]`` to be written to: in memory, or in a file where they take more than ``memory`` bytes.

    Both give the same bits: what is worked on at once are the same columns.

    Args:
        device: Where they are worked on. They lie in an accelerator's memory where there is room, else in the
            processor's or a file, and go there strip by strip.

    Raises:
        DiskError: There is no room for the file.
    """
    size = m * d * dtype.itemsize
    has_room = device.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    if size > memory and not has_room:
        return file_gradients(m, d, dtype, width=strip_width(m, device), device=device)
    if device.type == "cpu":
        return torch.zeros(m, d, dtype=dtype)
    return held_gradients(m, d, dtype, strip_width(m, device), device, is_there=has_room)


def gram_matrix(gradients: Gradients) -> Tensor:
    """``G G^T``, lower triangle, ``[m, m]``, float64: computed once for ``inverse_fisher`` and ``joint_update``.

    Raises:
        NumericsError: A gradient is not finite (names row and column), or products of gradients overflow.
    """
    _check_shape(gradients)
    everything = torch.arange(gradients.shape[1], device=gradients.device)
    return _gram(gradients.detach(), everything[None], is_dual=True)[0]


def squared_norms(gradients: Gradients) -> Tensor:
    """Of each gradient, ``[m]``, float64: the diagonal of ``gram_matrix``, in one pass.

    Raises:
        NumericsError: A gradient is not finite (names row and column).
    """
    _check_gradients(gradients)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in _all_strips(gradients.detach())]
    return torch.stack(norms).square().sum(0)


def inverse_fisher(
    gradients: Gradients,
    damping: float,
    *,
    blocks: int | Sequence[int] | None = None,
    gram: Tensor | None = None,
) -> InverseFisher:
    """Factorise ``F = damping I + G^T G / m`` for inverse products, the diagonal and elements.

    Args:
        gradients: ``G``, one gradient a row, ``[m, d]``, float32 or float64. Kept, not copied.
        damping: Above 0. Raised tenfold, in all blocks, until every Cholesky factorisation succeeds.
        blocks: None for the full matrix; ``B`` for consecutive blocks of B parameters, the last one what is left; or
            the sizes, whose sum is d.
        gram: ``gram_matrix(gradients)``, for the full matrix.

    Raises:
        NumericsError: ``damping`` is not a positive finite number; a gradient is not finite (names row and column), or
            so large that products overflow.

    Example:
        >>> inverse_fisher(torch.tensor([[3.0, 0.0]]), 1.0).diagonal()
        tensor([0.1000, 1.0000])
    """
    gradients = gradients.detach()
    _check_shape(gradients)
    check_damping(damping)
    everything = torch.ones(gradients.shape[1], dtype=torch.bool, device=gradients.device)
    groups = [columns for columns, _ in _groups(_block_sizes(blocks, gradients.shape[1]), everything)]
    while True:
        asked, result = damping, []
        for columns in groups:
            factor, damping = _factorise(gradients, columns, damping, gram)
            result.append(_Blocks(columns, factor))
        if damping == asked or (len(groups) == 1 and len(groups[0]) == 1):
            return InverseFisher(gradients, damping, tuple(result))


@dataclass(frozen=True, slots=True, eq=False)
class _JointBlocks:
    """``n`` blocks with as many kept columns, ``[n, B]``; the smaller Gram matrix and the right side of each."""

    columns: Tensor
    right: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class JointUpdate:
    """The exact update for the removal of many weights at once, at any damping; made by ``joint_update``."""

    gradients: Gradients
    weights: Tensor
    keep: Tensor
    blocks: tuple[_JointBlocks, ...]

    def solve(self, damping: float) -> Tensor:
        """The update at one damping, ``[d]``, in the weights' dtype; ``-weights`` where ``keep`` is False.

        Raises:
            NumericsError: ``damping`` is not a positive finite number.
        """
        return self.solve_each([damping])[0]

    def solve_each(self, dampings: Sequence[float], *, refinements: int = NUM_REFINEMENTS) -> Tensor:
        """The updates ``[k, d]`` at ``k`` dampings, which share the passes over the gradients.

        Args:
            refinements: 1 or more, two passes over the gradients each. One leaves float32's errors where the damping is
                far below ``||F||``: enough to choose among dampings, and for the weights of a network.

        Raises:
            NumericsError: A damping is not a positive finite number.
        """
        for damping in dampings:
            check_damping(damping)
        m, k = len(self.gradients), len(dampings)
        u = m * torch.tensor(dampings, dtype=torch.float64, device=self.gradients.device)
        delta = torch.where(self.keep, 0, -self.weights).repeat(k, 1)
        for group in self.blocks:
            for part in _parts(group.columns, m, k):
                values, vectors = group.eigenvalues[part], group.eigenvectors[part]
                system = _eigen_system(self.gradients, group.columns[part], values, vectors, u)
                update = _ridge(system, group.right[:, part].expand(-1, -1, -1, k), refinements)
                delta[:, system.columns] = update.movedim(-1, 0).to(delta.dtype)
        return delta


def joint_update(
    gradients: Gradients,
    weights: Tensor,
    keep: Tensor,
    *,
    residuals: Tensor | None = None,
    blocks: int | Sequence[int] | None = None,
    gram: Tensor | None = None,
) -> JointUpdate:
    """Prepare the Optimal Brain Surgeon update for removing all weights with ``keep`` False at once.

    In each block ``delta`` minimises ``|G delta + residuals|^2 / m + damping |delta|^2`` subject to
    ``delta = -weights`` where ``keep`` is False; without residuals that is ``delta^T F delta``. With
    ``t = G_pruned w_pruned - residuals``::

        delta_keep = G_keep^T (u I + G_keep G_keep^T)^-1 t = (u I + G_keep^T G_keep)^-1 G_keep^T t

    The smaller of the two Gram matrices is decomposed here; each damping then costs a few products with ``G_keep``.

    Args:
        gradients: ``G``, ``[m, d]``, float32 or float64. Kept, not copied.
        weights: ``[d]``.
        keep: ``[d]``, bool.
        residuals: ``[m]``, by default zeros. Every block fits all of them.
        blocks: As for ``inverse_fisher``.
        gram: ``gram_matrix(gradients)``, for the full matrix: only products of the pruned columns are then computed.

    Raises:
        NumericsError: A gradient (names row and column), weight or residual is not finite, or products of gradients
            overflow.
    """
    gradients, weights = gradients.detach(), weights.detach()
    _check_gradients(gradients)
    m, d = gradients.shape
    _check_finite("weights", weights, d)
    if keep.dtype != torch.bool or keep.shape != (d,):
        raise ValueError(f"keep must be [{d}] in bool, not {list(keep.shape)} in {keep.dtype}")
    wanted = weights.new_zeros(m) if residuals is None else -residuals.detach()
    _check_finite("residuals", wanted, m)
    result = []
    for kept, pruned in _groups(_block_sizes(blocks, d), keep):
        if not kept.shape[1] or (residuals is None and not pruned.shape[1]):
            continue  # nothing to update, or nothing to make up for
        parts = []
        for part in _parts(kept, m):
            targets = wanted.to(torch.float64).expand(len(kept[part]), -1)[..., None]
            if pruned.shape[1]:
                moved = weights[pruned[part]][..., None].to(torch.float64)
                targets = targets + _forward(gradients, pruned[part], moved)[0]
            values, vectors = torch.linalg.eigh(_kept_gram(gradients, kept[part], pruned[part], gram))
            parts.append((_ridge_right(gradients, kept[part], targets), values.clamp(min=0), vectors))
        right, values, vectors = zip(*parts, strict=True)
        result.append(_JointBlocks(kept, torch.cat(right, 1), torch.cat(values), torch.cat(vectors)))
    return JointUpdate(gradients, weights, keep, tuple(result))


def solve_beyond_span(gradients: Gradients, u: float, solve_small: Solve, x: Tensor) -> Tensor:
    """``(u I + G^T G)^-1 x`` from solves with ``u I + G G^T``; plain in float32, refined in float64.

    Args:
        solve_small: Takes and gives ``[..., m, k]``, float64.
        x: ``[d]`` or ``[d, k]``.

    Raises:
        NumericsError: ``x`` is not finite.
    """
    d = gradients.shape[1]
    _check_finite("x", x, d, dims=(1, 2))
    right = x.detach().to(torch.promote_types(x.dtype, gradients.dtype)).reshape(1, d, -1)
    system = _System(gradients, torch.arange(d, device=gradients.device)[None], u, solve_small)
    found = (
        _plain_dual(system, right) if right.dtype == torch.float32 else _solve_dual(system, right, right.new_zeros(()))
    )
    return found.reshape(x.shape)


def saliency(weights: Tensor, diagonal: Tensor) -> Tensor:
    """Loss increase ``w^2 / (2 (F^-1)_ii)`` of removing each weight with the optimal update of all others."""
    return weights.square() / (2 * diagonal)


def joint_saliency(inverse: InverseFisher, weights: Tensor, units: Tensor) -> Tensor:
    """Loss increase ``w_Q^T ((F^-1)_QQ)^-1 w_Q / 2`` of removing each unit ``Q`` with the optimal update of all others.

    Args:
        weights: ``[d]``.
        units: int64 ``[u, s]``, the parameters of each; -1 where a unit has fewer.

    Returns:
        ``[u]``, on the gradients' device; of single parameters in the weights' dtype, else float64.
    """
    if units.shape[1] == 1:
        return saliency(weights, inverse.diagonal().to(weights.device))[units[:, 0]]
    factor = torch.linalg.cholesky(inverse.diagonal_blocks(units))
    own = torch.where(units < 0, 0.0, weights[units].double()).to(factor.device)
    across: Tensor = torch.linalg.solve_triangular(factor, own[..., None], upper=False)
    return across.square().sum((1, 2)) / 2


# Blocks and their columns.


def _block_sizes(blocks: int | Sequence[int] | None, d: int) -> Tensor:
    if blocks is None:
        sizes = [d]
    elif isinstance(blocks, int):
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}; allowed are None, a size of 1 or more, or a list of sizes")
        sizes = [blocks] * (d // blocks) + [d % blocks] * (d % blocks > 0)
    else:
        sizes = list(blocks)
        if min(sizes, default=0) < 1 or sum(sizes) != d:
            raise ValueError(f"block sizes must be 1 or more and sum to {d}, as the parameters do, not {sum(sizes)}")
    return torch.tensor(sizes)


def _groups(sizes: Tensor, keep: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Kept ``[n, B]`` and pruned ``[n, P]`` columns of all blocks that have B and P of them, for each such pair."""
    sizes = sizes.to(keep.device)
    block = torch.repeat_interleave(torch.arange(len(sizes), device=keep.device), sizes)
    num_kept = torch.bincount(block[keep], minlength=len(sizes))
    keys, key = torch.unique(num_kept * (1 + int(sizes.max())) + sizes, return_inverse=True)
    by_key = torch.argsort(key[block], stable=True)
    for columns in torch.split(by_key, torch.bincount(key[block], minlength=len(keys)).tolist()):
        n = len(columns) // int(sizes[block[columns[0]]])
        inside = keep[columns]
        yield columns[inside].reshape(n, -1), columns[~inside].reshape(n, -1)


def _parts(columns: Tensor, m: int, width: int = 1) -> Iterator[slice]:
    """Blocks to work on at once, so that ``G`` on them and ``[n, m, width]`` each fit in a piece."""
    n, size = columns.shape
    step = max(1, piece(columns.device) // (m * max(size, width)))
    return (slice(start, start + step) for start in range(0, n, step))


def _strips(columns: Tensor, m: int) -> Iterator[slice]:
    """Columns inside the blocks to work on at once: all, unless one block alone is more than a piece, and ``B > m``."""
    step = strip_width(m, columns.device, len(columns))
    return (slice(start, start + step) for start in range(0, columns.shape[1], step))


def _all_strips(gradients: Gradients) -> Iterator[Tensor]:
    """All columns, some ``[m, k]`` at a time."""
    m, d = gradients.shape
    step = strip_width(m, gradients.device)
    return (_aligned(gradients.narrow(1, start, min(step, d - start))) for start in range(0, d, step))


def _aligned(part: Tensor) -> Tensor:
    """The same columns with rows that lie as they would from any source: at even places, or one right after another.

    The last bits of a CPU's matrix product follow from where the rows begin, which in a chunk isn't where it is in the
    whole. A copy costs one pass over memory, where a product has ``m`` operations for each element.
    """
    size = part.element_size()
    ends = (part.data_ptr(), part.stride(0) * size, part.shape[1] * size)
    return (
        part
        if part.device.type != "cpu" or not any(end % ALIGNMENT for end in ends)
        else part.clone(memory_format=torch.contiguous_format)
    )


def _gather(gradients: Gradients, columns: Tensor) -> Tensor:
    """``G`` of each block, ``[n, m, B]``; a view where the columns are consecutive."""
    first, last = int(columns[0, 0]), int(columns[-1, -1])
    if last - first + 1 == columns.numel():
        flat = _aligned(gradients.narrow(1, first, last - first + 1))
    elif isinstance(gradients, Tensor):
        # Several times faster than index_select where few columns are taken.
        flat = gradients.gather(1, columns.flatten().expand(len(gradients), -1))
    else:
        flat = gradients.index_select(1, columns.flatten())
    return flat.reshape(len(gradients), *columns.shape).movedim(1, 0)


def _locate(columns: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Block and position inside it of each column index; block -1 where it is in none of these."""
    block = (torch.searchsorted(columns[:, 0].contiguous(), index, right=True) - 1).clamp(min=0)
    position = index - columns[block, 0]
    inside = (position >= 0) & (position < columns.shape[1])
    return torch.where(inside, block, -1), position


# Factors.


def _kept_gram(gradients: Gradients, kept: Tensor, pruned: Tensor, gram: Tensor | None) -> Tensor:
    """The smaller Gram matrix of the kept columns; by difference where fewer are pruned."""
    is_dual = kept.shape[1] > len(gradients)
    if gram is None or not is_dual or pruned.shape[1] >= kept.shape[1]:
        return _gram(gradients, kept, is_dual=is_dual)
    if not pruned.shape[1]:
        return gram[None]
    return gram[None] - _gram(gradients, pruned, is_dual=True)


def _gram(gradients: Gradients, columns: Tensor, *, is_dual: bool) -> Tensor:
    """Lower triangle of ``G G^T`` if it ``is_dual``, else of ``G^T G``, of each block: ``[n, r, r]``, float64."""
    m, size = len(gradients), columns.shape[1]
    r = m if is_dual else size
    gram = torch.zeros(len(columns), r, r, dtype=torch.float64, device=gradients.device)
    sums = torch.zeros_like(gram, dtype=gradients.dtype) if is_dual else gram
    strips = list(_strips(columns, m))
    for number, strip in enumerate(strips, start=1):
        part = _gather(gradients, columns[:, strip])
        if not is_dual:
            part = part.to(torch.float64).mT
        _add_gram(sums, part)
        if is_dual and (number % SUMMED == 0 or number == len(strips)):
            gram += sums
            sums.zero_()
    if not math.isfinite(float(gram.sum())):  # as it is if a gradient isn't: its square is on the diagonal
        _check_gradients(gradients)
        peaks = torch.stack([part.abs().amax(1) for part in _all_strips(gradients)]).amax(0)
        raise NumericsError(
            f"products of gradients overflow: row {int(peaks.argmax())} of {m} reaches {float(peaks.max()):.3g}",
            hint="the loss is far from normal; check the checkpoint and the scale of the loss",
        )
    return gram


def _add_gram(sums: Tensor, part: Tensor) -> None:
    """Add the lower triangle of ``part part^T`` of each block ``[n, r, k]`` to ``sums`` ``[n, r, r]``."""
    is_alone = len(part) == 1
    if is_alone and blas.applies(part):
        blas.add_gram(sums[0], part[0])
        return
    for rows, others in _triangle(0, part.shape[1], ROWS if part.device.type == "cpu" else DEVICE_ROWS):
        if is_alone:
            sums[0, rows, others].addmm_(part[0, rows], part[0, others].mT)  # in place, which baddbmm_ isn't
        else:
            sums[:, rows, others] += part[:, rows] @ part[:, others].mT


def _triangle(start: int, stop: int, most: int) -> list[tuple[slice, slice]]:
    """Rectangles that cover the lower triangle, the largest as large as they can be: products are fastest there.

    Args:
        most: Rows of those on the diagonal.
    """
    if stop - start <= most:
        return [(slice(start, stop), slice(start, stop))]
    middle = start + -(-(stop - start) // 2)
    square = (slice(middle, stop), slice(start, middle))
    return [*_triangle(start, middle, most), *_triangle(middle, stop, most), square]


def _factorise(gradients: Gradients, columns: Tensor, damping: float, known: Tensor | None) -> tuple[Tensor, float]:
    """The factors of ``_Blocks``, and the damping at which Cholesky succeeded; earlier blocks have the one before."""
    m, (n, size) = len(gradients), columns.shape
    result = torch.empty(n, min(m, size), min(m, size), dtype=torch.float64, device=gradients.device)
    for part in _parts(columns, m):
        if known is not None and size > m:
            gram = known[None].clone()
        else:
            gram = _gram(gradients, columns[part], is_dual=size > m)
        gram.diagonal(dim1=1, dim2=2).add_(m * damping)
        lower, failed = torch.linalg.cholesky_ex(gram)
        while bool(failed.any()):
            gram.diagonal(dim1=1, dim2=2).add_(9 * m * damping)
            damping *= 10
            lower, failed = torch.linalg.cholesky_ex(gram)
        eye = torch.eye(gram.shape[1], dtype=torch.float64, device=gram.device)
        if size > m:
            result[part] = torch.linalg.solve_triangular(lower, eye, upper=False)
            continue
        inverse = torch.cholesky_inverse(lower)
        if gradients.dtype == torch.float64:
            # Adding u to the Gram matrix has rounded it off by eps ||G^T G||. Newton's step sees it apart.
            product = _backward(gradients, columns[part], _forward(gradients, columns[part], inverse)[0])[0]
            inverse = inverse + inverse @ (eye - m * damping * inverse - product)
        result[part] = inverse
    return result, damping


# Solves with (u I + G^T G), of each block.


def _inverse_system(gradients: Gradients, columns: Tensor, factor: Tensor, u: float) -> _System:
    if columns.shape[1] > len(gradients):
        return _System(gradients, columns, u, lambda x: factor.mT @ (factor @ x))
    return _System(gradients, columns, u, lambda x: factor @ x)


def _eigen_system(gradients: Gradients, columns: Tensor, values: Tensor, vectors: Tensor, u: Tensor) -> _System:
    return _System(gradients, columns, u, lambda x: vectors @ ((vectors.mT @ x) / (values[..., None] + u)))


def _plain_solve(system: _System, x: Tensor) -> Tensor:
    """``(u I + G^T G)^-1 x`` by the plain formulas; ``x`` is ``[n, B, k]``."""
    gradients, columns = system.gradients, system.columns
    if columns.shape[1] <= len(gradients):
        return system.solve_small(x.to(torch.float64)).to(x.dtype)
    return _plain_dual(system, x)


def _plain_dual(system: _System, x: Tensor) -> Tensor:
    gradients, columns = system.gradients, system.columns
    z = system.solve_small(_forward(gradients, columns, x)[0].to(torch.float64)).to(x.dtype)
    return (x - _backward(gradients, columns, z)[0]) / system.u


def _solve(system: _System, x: Tensor) -> Tensor:
    """``(u I + G^T G)^-1 x`` to rounding; ``x`` is ``[n, B, k]``, float64."""
    if system.columns.shape[1] <= len(system.gradients):
        return _solve_primal(system, x, torch.zeros_like(x))
    return _solve_dual(system, x, x.new_zeros(()))


def _ridge_right(gradients: Gradients, columns: Tensor, targets: Tensor) -> Tensor:
    """What ``_ridge`` needs of ``t``, ``[n, m, k]``: itself, as ``[1, n, m, k]``, or ``G^T t``, in two parts."""
    if columns.shape[1] > len(gradients):
        return targets[None]
    return torch.stack(_backward(gradients, columns, targets, _residual_product(gradients)))


def _ridge(system: _System, right: Tensor, refinements: int = NUM_REFINEMENTS) -> Tensor:
    """``(u I + G^T G)^-1 G^T t`` to rounding, ``[n, B, k]``: it minimises ``|G y - t|^2 + u |y|^2``."""
    if system.columns.shape[1] <= len(system.gradients):
        return _solve_primal(system, right[0], right[1], refinements)
    return _solve_dual(system, None, right[0], refinements)


def _solve_primal(system: _System, high: Tensor, low: Tensor, refinements: int = NUM_REFINEMENTS) -> Tensor:
    """``y`` of ``(u I + G^T G) y = high + low``."""
    gradients, columns, product = system.gradients, system.columns, _residual_product(system.gradients)
    y = system.solve_small(high)
    for _ in range(refinements if gradients.dtype == torch.float64 else 0):
        inner, inner_low = _forward(gradients, columns, y, product)
        outer, outer_low = _backward(gradients, columns, inner, product)
        rest = outer_low + _backward(gradients, columns, inner_low)[0]
        y = y + system.solve_small(((high - outer) - system.u * y) - (rest - low))
    return y


def _solve_dual(system: _System, x: Tensor | None, targets: Tensor, refinements: int = NUM_REFINEMENTS) -> Tensor:
    """``y`` of ``(u I + G^T G) y = x + G^T t``; None for ``x = 0``.

    As ``u y + G^T z = x`` and ``G y - z = t``: then ``(u I + G G^T) z = G x - u t``, and only ``x - G^T z`` cancels.
    The error of ``z``, unlike that of ``y``, isn't divided by ``u``: float32's ``G G^T`` is good enough to refine it.
    """
    gradients, columns, product = system.gradients, system.columns, _residual_product(system.gradients)
    start = 0 if x is None else _forward(gradients, columns, x)[0]
    correction = system.solve_small(start - system.u * targets)
    z = torch.zeros_like(correction)
    for _ in range(refinements):
        z = z + correction
        inner, inner_low = _backward(gradients, columns, z, product)
        y = ((0 if x is None else x) - inner - inner_low) / system.u
        outer = _forward(gradients, columns, y)[0]
        correction = system.u * system.solve_small((outer - targets) - z)
    # The last correction goes to y directly: in z, which can be far larger, it would be rounded off.
    return y - _backward(gradients, columns, correction)[0] / system.u


# Elements of (u I + G^T G)^-1.


def _diagonal(system: _System, factor: Tensor) -> Tensor:
    """Of each block, ``[n, B]``."""
    gradients, columns = system.gradients, system.columns
    m, size = len(gradients), columns.shape[1]
    if size <= m:
        return factor.diagonal(dim1=1, dim2=2)
    root = factor.to(gradients.dtype)
    # Made before the copies of strips: what stays and is made between them keeps malloc from using their place again.
    gap = torch.empty(columns.shape, dtype=torch.float64, device=gradients.device)
    for strip in _strips(columns, m):
        gap[:, strip] = 1 - _squared_norms(root, _gather(gradients, columns[:, strip])).to(torch.float64)
    result = gap.clamp(max=1) / system.u
    for block in torch.nonzero((gap < SMALL_GAP).any(1))[:, 0].tolist():
        one = _inverse_system(gradients, columns[block, None], factor[block, None], float(system.u))
        for at in torch.split(torch.nonzero(gap[block] < SMALL_GAP)[:, 0], max(1, piece(gradients.device) // size)):
            exact = _inverse_columns(one, at)[at, torch.arange(len(at), device=at.device)]
            # A bound of every element: float32's G G^T may be too inexact for the damping.
            norms_at = _gather(gradients, columns[block, at][None])[0].to(torch.float64).square().sum(0)
            result[block, at] = torch.maximum(exact, 1 / (system.u + norms_at)).clamp(max=1 / system.u)
    return result


def _unit_blocks(system: _System, factor: Tensor, block: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Of sets of parameters, ``[u, s, s]``: every eigenvalue is within its bounds; and which of it is of one block.

    Args:
        block: Of each parameter, ``[u, s]``; -1 where it isn't in these.
        at: Its position there.
    """
    gradients, (count, s), u = system.gradients, block.shape, float(system.u)
    is_real, block, at = block >= 0, block.clamp(min=0), torch.where(block >= 0, at, 0)
    both = is_real[:, :, None] & is_real[:, None] & (block[:, :, None] == block[:, None])
    eye = torch.eye(s, dtype=torch.float64, device=block.device)
    own = gradients.index_select(1, system.columns[block, at].flatten()).to(torch.float64)
    if system.columns.shape[1] <= len(gradients):
        scaled = torch.where(both, u * factor[block[:, :, None], at[:, :, None], at[:, None]], eye)
    else:
        root = torch.empty_like(own)
        for number in torch.unique(block).tolist():
            places = torch.nonzero(block.flatten() == number)[:, 0]
            root[:, places] = factor[number] @ own[:, places]
        root = root.T.reshape(count, s, -1)
        scaled = torch.where(both, eye - root @ root.mT, eye)
        for one in torch.nonzero(torch.linalg.eigvalsh(scaled)[:, 0] < SMALL_GAP)[:, 0].tolist():
            for number in torch.unique(block[one][is_real[one]]).tolist():
                places = torch.nonzero((block[one] == number) & is_real[one])[:, 0]
                alone = _inverse_system(gradients, system.columns[number, None], factor[number, None], u)
                exact = u * _inverse_columns(alone, at[one, places])[at[one, places]]
                scaled[one, places[:, None], places] = (exact + exact.mT) / 2
    values, vectors = torch.linalg.eigh(scaled)
    # (F^-1)_QQ >= (F_QQ)^-1: float32's G G^T may be too inexact for the damping.
    squares = own.square().sum(0).reshape(count, s) * is_real
    values = torch.maximum(values, u / (u + squares.sum(1, keepdim=True))).clamp(max=1)
    return (vectors * values[:, None]) @ vectors.mT / u, both


def _squared_norms(root: Tensor, part: Tensor) -> Tensor:
    """Squared column norms of ``root @ part``, ``[n, B]``; ``root`` is lower triangular."""
    if len(part) == 1 and blas.applies(part):
        return blas.triangular_product(root[0], part[0]).square_().sum(0)[None]
    result = torch.zeros_like(part[:, 0])
    for start in range(0, part.shape[1], ROWS):
        stop = start + ROWS
        result += (root[:, start:stop, :stop] @ part[:, :stop]).square_().sum(1)
    return result


def _inverse_columns(system: _System, at: Tensor) -> Tensor:
    """Columns ``at`` of the inverse of the one block, ``[B, k]``."""
    size, k = system.columns.shape[1], len(at)
    unit = torch.zeros(1, size, k, dtype=torch.float64, device=at.device)
    unit[0, at, torch.arange(k, device=at.device)] = 1
    return _solve(system, unit)[0]


def _entries(system: _System, factor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of the inverse of the one block, at positions inside it."""
    gradients = system.gradients
    if system.columns.shape[1] <= len(gradients):
        return factor[0, rows[:, None], columns]
    chosen = (gradients.index_select(1, system.columns[0, at]).to(torch.float64) for at in (rows, columns))
    left, right = (factor[0] @ part for part in chosen)
    result = ((rows[:, None] == columns).to(torch.float64) - left.mT @ right) / system.u
    small_rows, small_columns = (torch.nonzero(1 - a.square().sum(0) < SMALL_GAP)[:, 0] for a in (left, right))
    if len(small_rows):
        result[small_rows] = _inverse_columns(system, rows[small_rows])[columns].mT
    if len(small_columns):
        result[:, small_columns] = _inverse_columns(system, columns[small_columns])[rows]
    return result


# Products with G, in one or in two parts of a sum.


def _forward(gradients: Gradients, columns: Tensor, x: Tensor, product: Product | None = None) -> tuple[Tensor, Tensor]:
    """``G x`` of each block, ``[n, m, k]``, as a sum of two."""
    product = product or _plain_product
    high = x.new_zeros(len(x), len(gradients), x.shape[2])
    low = torch.zeros_like(high)
    for strip in _strips(columns, len(gradients)):
        more, more_low = product(_gather(gradients, columns[:, strip]), x[:, strip])
        high += more
        low += more_low
    return high, low


def _backward(
    gradients: Gradients, columns: Tensor, y: Tensor, product: Product | None = None
) -> tuple[Tensor, Tensor]:
    """``G^T y`` of each block, ``[n, B, k]``, as a sum of two."""
    product = product or _plain_product
    high = y.new_empty(*columns.shape, y.shape[2])  # made first, as the diagonal is
    low = torch.empty_like(high)
    for strip in _strips(columns, len(gradients)):
        # Converted before it is transposed: to change the order of memory at the same time takes thrice as long.
        high[:, strip], low[:, strip] = product(_gather(gradients, columns[:, strip]).to(y.dtype).mT, y)
    return high, low


def _residual_product(gradients: Gradients) -> Product:
    """Twice the gradients' precision: float64 is that already for float32 ones."""
    return _doubled_product if gradients.dtype == torch.float64 else _plain_product


def _plain_product(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    result = a.to(x.dtype) @ x
    return result, torch.zeros_like(result)


def _doubled_product(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``a @ x`` as a sum of two, in about twice float64's precision.

    Both are cut into parts of so few bits that sums of products of the leading parts are exact (Ozaki et al. 2012).
    """
    bits = (53 - math.ceil(math.log2(a.shape[-1]))) // 2
    a1, a2, a3 = _cut(a, bits, -1)
    x1, x2, x3 = _cut(x, bits, -2)
    return a1 @ x1, (a1 @ x2 + a2 @ x1) + (a1 @ x3 + a2 @ (x2 + x3) + a3 @ x)


def _cut(a: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three parts with sum ``a``: the first two have ``bits`` bits, on a scale shared along ``dim``."""
    peak = a.abs().amax(dim, keepdim=True)
    scale = torch.where(peak > 0, peak / torch.frexp(peak).mantissa, 1)  # the power of two above the peak
    # Adding 1.5 * 2**52 units rounds to whole units.
    first = 1.5 * 2.0 ** (52 - bits) * scale
    high = (a + first) - first
    second = 2.0**-bits * first
    middle = ((a - high) + second) - second
    return high, middle, (a - high) - middle


# Checks of what the caller passes.


def check_damping(damping: float) -> None:
    """Refuse what no ``F`` can be regularised with."""
    if not (damping > 0 and math.isfinite(damping) and math.isfinite(1 / damping)):
        raise NumericsError(f"damping is {damping}; it must be a positive number with a finite inverse")


def _check_shape(gradients: Gradients) -> None:
    if gradients.dim() != 2 or not gradients.numel() or gradients.dtype not in DTYPES:
        raise ValueError(
            f"gradients must be [m, d] in float32 or float64, not {list(gradients.shape)} in {gradients.dtype}"
        )


def _check_gradients(gradients: Gradients) -> None:
    _check_shape(gradients)
    # Sums are far cheaper than isfinite of every element; one that merely overflows is no error.
    start = 0
    for part in _all_strips(gradients):
        for row in torch.nonzero(~torch.isfinite(part.sum(1)))[:, 0].tolist():
            bad = torch.nonzero(~torch.isfinite(part[row]))
            if len(bad):
                value, column = float(part[row, bad[0]]), start + int(bad[0])
                raise NumericsError(
                    f"gradient row {row} of {len(gradients)} is {value} at column {column}",
                    hint="a loss that is not finite, or a broken weight; check the checkpoint and the data",
                )
        start += part.shape[1]


def _check_finite(name: str, vector: Tensor, length: int, *, dims: tuple[int, ...] = (1,)) -> None:
    if vector.dim() not in dims or len(vector) != length or vector.dtype not in DTYPES:
        raise ValueError(
            f"{name} must have {length} rows in float32 or float64, not shape {list(vector.shape)} in {vector.dtype}"
        )
    bad = torch.nonzero(~torch.isfinite(vector))
    if len(bad):
        raise NumericsError(f"{name} is {float(vector[tuple(bad[0])])} at index {bad[0].tolist()}")

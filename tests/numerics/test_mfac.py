"""M-FAC against dense inverses in extended precision, and against the published recursion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import NumericsError
from compress.numerics import mfac
from compress.numerics.mfac import (
    gram_matrix,
    inverse_fisher,
    joint_saliency,
    joint_update,
    saliency,
    squared_norms,
)

Array = NDArray[Any]
Blocks = int | Sequence[int] | None

WIDE = np.longdouble
TOLERANCE = 5e-11  # at damping 1e-6 ||F||; the truth itself is exact to about 1e-13
UNEVEN = "uneven"
KINDS = ("plain", "scaled columns", "scaled rows", "common mean", "low rank", "repeated and zero rows", "three spikes")
SHAPES = ((16, 20), (37, 38), (64, 90))
CASES: list[tuple[str, tuple[int, int], Any]] = [
    (kind, shape, blocks)
    for kind in KINDS
    for shape in SHAPES
    for blocks in (None, 1, 7, 64, UNEVEN)
    if not isinstance(blocks, int) or blocks < shape[1]
]
CASES += [("plain", (m, 310), 300) for m in (16, 37, 64)]
CASES += [("low rank", (260, 240), None)]
needs_wide = pytest.mark.skipif(bool(np.finfo(WIDE).eps > 1e-18), reason="long double is no wider than double here")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients_of(kind: str, m: int, d: int) -> Tensor:
    gradients = normal(m + d, m, d)
    if kind == "scaled columns":
        gradients *= torch.exp(2 * normal(1, 1, d))
    elif kind == "scaled rows":
        gradients *= torch.logspace(0, -4, m, dtype=torch.float64)[:, None]
    elif kind == "common mean":
        gradients += 3 * normal(2, 1, d)
    elif kind == "low rank":
        gradients = gradients[:, : min(8, d)] @ normal(3, min(8, d), d)
    elif kind == "repeated and zero rows":
        gradients[1], gradients[2] = gradients[0], 0
    elif kind == "three spikes":
        gradients[:, :3] *= 1e3
    return gradients


def norm_of(gradients: Tensor) -> float:
    """``||G^T G / m||``."""
    return float(torch.linalg.matrix_norm(gradients.double(), 2) ** 2 / len(gradients))


def sizes_of(blocks: Blocks, d: int) -> list[int]:
    if blocks is None:
        return [d]
    if isinstance(blocks, int):
        return [min(blocks, d - start) for start in range(0, d, blocks)]
    return list(blocks)


def uneven(blocks: Any, d: int) -> Any:
    return [3, 1, d - 11, 7] if blocks == UNEVEN else blocks


def dense_solve(matrix: Array, right: Array) -> Array:
    """Gaussian elimination by hand: numpy's own has no long double. ``matrix`` is positive definite."""
    left, y = matrix.copy(), right.copy()
    for j in range(len(left)):
        factor = left[j + 1 :, j] / left[j, j]
        left[j + 1 :, j:] -= np.outer(factor, left[j, j:])
        y[j + 1 :] -= np.outer(factor, y[j])
    for j in reversed(range(len(left))):
        y[j] /= left[j, j]
        y[:j] -= np.outer(left[:j, j], y[j])
    return y


def dense_fisher(gradients: Tensor, damping: float, sizes: list[int]) -> Array:
    wide = gradients.numpy().astype(WIDE)
    block = np.repeat(range(len(sizes)), sizes)
    fisher: Array = np.where(np.equal.outer(block, block), wide.T @ wide / len(wide), 0)
    fisher += damping * np.eye(len(block), dtype=WIDE)
    return fisher


def dense_update(
    gradients: Tensor, damping: float, sizes: list[int], weights: Tensor, keep: Tensor, residuals: Tensor
) -> Array:
    """The minimiser of each block's least squares for each column of residuals, from its normal equations."""
    wide, fisher = gradients.numpy().astype(WIDE), dense_fisher(gradients, damping, sizes)
    removed = np.where(keep.numpy(), 0, -weights.numpy()).astype(WIDE)
    delta = np.repeat(removed[:, None], residuals.shape[1], 1)
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        here = np.arange(stop - size, stop)
        kept = here[keep.numpy()[here]]
        left = residuals.numpy().astype(WIDE) + (wide[:, here] @ removed[here])[:, None]
        delta[kept] = dense_solve(fisher[np.ix_(kept, kept)], -wide[:, kept].T @ left / len(wide))
    return delta


def error(found: Tensor, expected: Array) -> float:
    """Relative, in the norm."""
    difference = (found.detach().numpy().astype(WIDE) - expected).astype(np.float64)
    return float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-300)


@needs_wide
@pytest.mark.parametrize(("kind", "shape", "blocks"), CASES)
def test_everything_equals_the_dense_inverse_at_small_damping(kind: str, shape: tuple[int, int], blocks: Any) -> None:
    m, d = shape
    gradients, blocks = gradients_of(kind, m, d), uneven(blocks, d)
    damping = 1e-6 * norm_of(gradients)
    inverse = dense_solve(dense_fisher(gradients, damping, sizes_of(blocks, d)), np.eye(d, dtype=WIDE))
    fisher = inverse_fisher(gradients, damping, blocks=blocks)
    assert fisher.damping == damping

    coefficients = normal(4, m, 2)
    top = torch.linalg.svd(gradients, full_matrices=False)[2][:1].T  # loses the most digits of all
    for x in (normal(5, d), gradients.T @ coefficients[:, 0], top, torch.cat((normal(6, d, 2), top), 1)):
        assert error(fisher.ihvp(x), inverse @ x.numpy().astype(WIDE)) < TOLERANCE
    spanned = inverse @ (gradients.numpy().astype(WIDE).T @ coefficients.numpy().astype(WIDE))
    assert error(fisher.ihvp_span(coefficients), spanned) < TOLERANCE
    assert error(fisher.ihvp_span(coefficients[:, 1]), spanned[:, 1]) < TOLERANCE

    diagonal = np.diag(inverse)
    assert np.max(np.abs(fisher.diagonal().numpy() - diagonal) / diagonal) < TOLERANCE
    rows, columns = [d - 1, 0, 1, 5, 2, 0], [0, d // 2, d - 2, 1]
    scale = np.sqrt(np.outer(diagonal[rows], diagonal[columns]))
    found = fisher.submatrix(rows, torch.tensor(columns)).numpy()
    assert np.max(np.abs(found - inverse[np.ix_(rows, columns)]) / scale) < TOLERANCE
    assert fisher.element(1, 0) == pytest.approx(found[2, 0], rel=1e-12)


@needs_wide
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(3, 24),
    d=st.integers(6, 30),
    size=st.integers(1, 30),
    exponent=st.floats(-6, 2),
    density=st.floats(0, 1),
)
def test_any_shape_and_damping(kind: str, m: int, d: int, size: int, exponent: float, density: float) -> None:
    gradients, blocks = gradients_of(kind, m, d), None if size >= d else size
    damping = 10**exponent * norm_of(gradients)
    fisher = inverse_fisher(gradients, damping, blocks=blocks)
    inverse = dense_solve(dense_fisher(gradients, damping, sizes_of(blocks, d)), np.eye(d, dtype=WIDE))
    diagonal, weights, coefficients = np.diag(inverse), normal(7, d), normal(4, m)
    keep = torch.from_numpy(np.random.default_rng(0).random(d) < density)
    assert error(fisher.ihvp(weights), inverse @ weights.numpy().astype(WIDE)) < 1e-10
    spanned = inverse @ (gradients.numpy().astype(WIDE).T @ coefficients.numpy().astype(WIDE))
    assert error(fisher.ihvp_span(coefficients), spanned) < 1e-10
    assert np.max(np.abs(fisher.diagonal().numpy() - diagonal) / diagonal) < 1e-10
    found = fisher.submatrix(range(d), range(d)).numpy()
    assert np.max(np.abs(found - inverse) / np.sqrt(np.outer(diagonal, diagonal))) < 1e-10
    none = torch.zeros(m, 1, dtype=torch.float64)
    expected = dense_update(gradients, damping, sizes_of(blocks, d), weights, keep, none)[:, 0]
    delta = joint_update(gradients, weights, keep, blocks=blocks).solve(damping)
    assert error(delta, expected) < 1e-10
    # The updates of single weights, added up and cut, are never nearer to the least of the quadratic loss.
    single = -(inverse[:, ~keep] / diagonal[~keep.numpy()]) @ weights.numpy().astype(WIDE)[~keep.numpy()]
    single[~keep.numpy()] = -weights.numpy()[~keep.numpy()]
    matrix = dense_fisher(gradients, damping, sizes_of(blocks, d))
    wide = delta.numpy().astype(WIDE)
    assert wide @ matrix @ wide <= (1 + 1e-12) * (single @ matrix @ single)


@needs_wide
@pytest.mark.parametrize(("kind", "shape", "blocks"), CASES)
@pytest.mark.parametrize("density", [0.2, 0.8])
def test_the_joint_update_is_the_minimiser(kind: str, shape: tuple[int, int], blocks: Any, density: float) -> None:
    m, d = shape
    gradients, blocks = gradients_of(kind, m, d), uneven(blocks, d)
    weights, residuals, keep = normal(7, d), normal(8, m), normal(9, d).argsort().argsort() < density * d
    both = torch.stack((residuals, 0 * residuals), 1)
    with_residuals = joint_update(gradients, weights, keep, residuals=residuals, blocks=blocks)
    without = joint_update(gradients, weights, keep, blocks=blocks)
    damping = 1e-6 * norm_of(gradients)
    expected = dense_update(gradients, damping, sizes_of(blocks, d), weights, keep, both)
    for update, column in ((with_residuals, 0), (without, 1)):
        delta = update.solve(damping)
        assert torch.equal(delta[~keep], -weights[~keep])
        assert error(delta[keep], expected[keep.numpy(), column]) < TOLERANCE


@needs_wide
@pytest.mark.parametrize("blocks", [None, 7])
def test_one_joint_update_serves_every_damping(blocks: Blocks) -> None:
    gradients, weights, keep = gradients_of("common mean", 16, 40), normal(7, 40), normal(9, 40) > 0
    update = joint_update(gradients, weights, keep, blocks=blocks)
    for damping in (1e-4, 1.0, 1e4):
        none = torch.zeros(16, 1, dtype=torch.float64)
        expected = dense_update(gradients, damping, sizes_of(blocks, 40), weights, keep, none)[:, 0]
        assert error(update.solve(damping), expected) < TOLERANCE


@pytest.mark.parametrize("blocks", [None, 64])
@pytest.mark.parametrize("damping", [1e-3, 1e-8, 1e-13])
def test_orthogonal_gradients_give_the_closed_form_at_any_damping(blocks: Blocks, damping: float) -> None:
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < 64:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    signs = torch.cat((signs[:16], signs[:16]), 1)
    size = blocks if isinstance(blocks, int) else 128
    lengths = 4.0 ** -torch.arange(16, dtype=torch.float64)
    gradients = signs * lengths.sqrt()[:, None]
    eigenvalues = damping + size * lengths / 16
    fisher = inverse_fisher(gradients, damping, blocks=blocks)
    torch.testing.assert_close(fisher.ihvp(signs.T), signs.T / eigenvalues, rtol=1e-14, atol=0)
    expected = (1 - 16 / size) / damping + (1 / eigenvalues).sum() / size
    torch.testing.assert_close(fisher.diagonal(), expected.expand(128), rtol=1e-13, atol=0)


def recursion(gradients: Tensor, damping: float) -> Tensor:
    """``F^-1`` by the published recursion: one Sherman-Morrison step a gradient."""
    inverse = torch.eye(gradients.shape[1], dtype=gradients.dtype) / damping
    for gradient in gradients:
        v = inverse @ gradient
        inverse = inverse - torch.outer(v, v) / (len(gradients) + gradient @ v)
    return inverse


@pytest.mark.parametrize(("m", "d"), [(16, 300), (64, 40)])
def test_it_equals_the_published_recursion(m: int, d: int) -> None:
    gradients, x = gradients_of("plain", m, d), normal(1, d)
    expected = recursion(gradients, 1e-3)
    fisher = inverse_fisher(gradients, 1e-3)
    torch.testing.assert_close(fisher.submatrix(range(d), range(d)), expected, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(fisher.diagonal(), expected.diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(fisher.ihvp(x), expected @ x, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("kind", ["plain", "scaled columns", "scaled rows", "common mean"])
@pytest.mark.parametrize("blocks", [None, 400, 64])
def test_float32_gradients_keep_float32_digits(kind: str, blocks: Blocks) -> None:
    m, d = 96, 2000
    gradients = gradients_of(kind, m, d).float()
    damping = 1e-5 * norm_of(gradients)
    exact, fisher = (inverse_fisher(g, damping, blocks=blocks) for g in (gradients.double(), gradients))
    assert fisher.damping == damping
    torch.testing.assert_close(fisher.diagonal().double(), exact.diagonal(), rtol=3e-4, atol=0)

    def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
        return bool((found - expected).norm() <= tolerance * expected.norm())

    x, coefficients = normal(2, d), normal(3, m)
    assert fisher.ihvp(x.float()).dtype == torch.float32
    assert close(fisher.ihvp(x.float()), exact.ihvp(x.float().double()), 1e-3)
    # In the span, where plain float32 has lost most digits: float64 products with the float32 gradients.
    spanned = gradients.double().T @ coefficients
    assert close(fisher.ihvp(spanned), exact.ihvp(spanned), 1e-8)
    assert close(fisher.ihvp_span(coefficients), exact.ihvp_span(coefficients), 1e-8)

    keep = normal(4, d) > 0
    found, expected = (joint_update(g, x.to(g.dtype), keep, blocks=blocks) for g in (gradients, gradients.double()))
    assert close(found.solve(damping), expected.solve(damping), 1e-6)


def test_removing_one_weight_is_the_optimal_brain_surgeon() -> None:
    gradients, weights, keep = normal(1, 20, 50), normal(2, 50), torch.arange(50) != 7
    fisher = inverse_fisher(gradients, 0.01)
    delta = joint_update(gradients, weights, keep).solve(0.01)
    column = fisher.submatrix(range(50), [7])[:, 0]
    torch.testing.assert_close(delta, -weights[7] / column[7] * column, rtol=1e-11, atol=1e-13)
    increase = delta @ (gradients.T @ (gradients @ delta) / 20 + 0.01 * delta) / 2
    torch.testing.assert_close(saliency(weights, fisher.diagonal())[7], increase, rtol=1e-11, atol=0)


UNITS = torch.tensor([[0, 5, 9, 2], [3, 7, 1, -1], [18, 19, -1, -1], [4, -1, -1, -1], [14, 13, 12, 11]])


@needs_wide
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [None, 6, 17, UNEVEN])
def test_the_saliency_of_units_is_that_of_the_dense_inverse(kind: str, shape: tuple[int, int], blocks: Any) -> None:
    gradients, weights = gradients_of(kind, *shape), normal(9, shape[1])
    damping, blocks = 1e-6 * norm_of(gradients), uneven(blocks, shape[1])
    found = joint_saliency(inverse_fisher(gradients, damping, blocks=blocks), weights, UNITS)
    fisher, expected = dense_fisher(gradients, damping, sizes_of(blocks, shape[1])), []
    for unit in UNITS.tolist():
        # What ([F^-1]_QQ)^-1 is without an inverse: F_QQ - F_QR F_RR^-1 F_RQ, R being all others.
        q = [i for i in unit if i >= 0]
        others = np.setdiff1d(np.arange(shape[1]), q)
        across = fisher[np.ix_(others, q)]
        schur = fisher[np.ix_(q, q)] - across.T @ dense_solve(fisher[np.ix_(others, others)], across)
        own = weights.numpy().astype(WIDE)[q]
        expected.append(own @ schur @ own / 2)
    assert error(found, np.array(expected)) < 1e-8


def test_removing_a_unit_is_the_optimal_brain_surgeon() -> None:
    """Its saliency is the least increase of all moves that zero it: that of the joint update."""
    for m in (20, 64):
        gradients, weights = normal(1, m, 50), normal(2, 50)
        found = joint_saliency(inverse_fisher(gradients, 0.01), weights, UNITS)
        for unit, increase in zip(UNITS.tolist(), found.tolist(), strict=True):
            keep = torch.ones(50, dtype=torch.bool)
            keep[[i for i in unit if i >= 0]] = False
            delta = joint_update(gradients, weights, keep).solve(0.01)
            least = delta @ (gradients.T @ (gradients @ delta) / m + 0.01 * delta) / 2
            assert increase == pytest.approx(float(least), rel=1e-9)


def test_units_of_one_weight_have_its_saliency() -> None:
    gradients, weights = normal(1, 20, 50), normal(2, 50)
    fisher, alone = inverse_fisher(gradients, 0.01), torch.tensor([[7], [31], [0]])
    single = joint_saliency(fisher, weights, alone)
    assert torch.equal(single, saliency(weights, fisher.diagonal())[[7, 31, 0]])
    padded = joint_saliency(fisher, weights, torch.cat([alone, torch.full_like(alone, -1)], 1))
    torch.testing.assert_close(padded, single, rtol=1e-11, atol=0)


def test_units_keep_their_bounds_where_float32_does_not_resolve_the_damping() -> None:
    gradients, weights = gradients_of("three spikes", 64, 90).float(), normal(2, 90).float()
    fisher = inverse_fisher(gradients, 1e-12 * norm_of(gradients))
    found = joint_saliency(fisher, weights, UNITS)
    own = torch.where(UNITS < 0, 0.0, weights[UNITS].double().square()).sum(1)
    squares = torch.where(UNITS < 0, 0.0, gradients.double().square().mean(0)[UNITS]).sum(1)
    assert bool((2 * found >= (1 - 1e-9) * fisher.damping * own).all())
    assert bool((2 * found <= (1 + 1e-9) * (fisher.damping + squares) * own).all())


@pytest.mark.parametrize("m", [8, 40])
def test_units_of_several_blocks_cost_what_their_parts_do(m: int) -> None:
    gradients, weights = normal(1, m, 50), normal(2, 50)
    fisher = inverse_fisher(gradients, 0.1, blocks=10)
    whole = joint_saliency(fisher, weights, torch.tensor([[3, 8, 11, 42], [20, 21, 22, 23]]))
    parts = joint_saliency(fisher, weights, torch.tensor([[3, 8], [11, -1], [42, -1]]))
    alone = joint_saliency(inverse_fisher(gradients[:, 20:30], 0.1), weights[20:30], torch.tensor([[0, 1, 2, 3]]))
    torch.testing.assert_close(whole, torch.cat([parts.sum()[None], alone]), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_norms_are_the_diagonal_of_the_gram_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfac, "PIECE", 100)
    gradients = normal(1, 8, 50).to(dtype)
    torch.testing.assert_close(squared_norms(gradients), mfac.gram_matrix(gradients).diagonal(), rtol=1e-6, atol=0)
    gradients[3, 40] = float("nan")
    with pytest.raises(NumericsError, match="gradient row 3 of 8 is nan at column 40"):
        squared_norms(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [None, 7, 64, (3, 100, 27)])
def test_results_do_not_depend_on_the_piece(
    dtype: torch.dtype, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, x, keep = gradients_of("scaled columns", 16, 130).to(dtype), normal(1, 130, 3), normal(2, 130) > 0
    damping = 1e-4 * norm_of(gradients)

    def results() -> list[Tensor]:
        fisher = inverse_fisher(gradients, damping, blocks=blocks)
        update = joint_update(gradients, x[:, 0], keep, blocks=blocks).solve(damping)
        return [fisher.diagonal().double(), fisher.ihvp(x), fisher.ihvp_span(normal(3, 16)), update]

    whole = results()
    monkeypatch.setattr(mfac, "PIECE", 100)
    monkeypatch.setattr(mfac, "ROWS", 5)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for found, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_block_of_many_pieces_is_refined_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = gradients_of("plain", 16, 2000)
    fisher = inverse_fisher(gradients, 1e-6 * norm_of(gradients))
    x = gradients.T @ normal(1, 16)
    whole = fisher.ihvp(x)
    monkeypatch.setattr(mfac, "PIECE", 1000)
    assert float((fisher.ihvp(x) - whole).norm() / whole.norm()) < 1e-14


@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 5), (5, 1)])
def test_one_gradient_or_one_parameter(m: int, d: int) -> None:
    gradients, weights = normal(1, m, d), normal(2, d)
    inverse = torch.linalg.inv(gradients.T @ gradients / m + 0.1 * torch.eye(d, dtype=torch.float64))
    fisher = inverse_fisher(gradients, 0.1)
    torch.testing.assert_close(fisher.ihvp(weights), inverse @ weights)
    torch.testing.assert_close(fisher.diagonal(), inverse.diagonal())
    torch.testing.assert_close(fisher.element(0, d - 1), float(inverse[0, d - 1]))
    assert torch.equal(joint_update(gradients, weights, torch.zeros(d, dtype=torch.bool)).solve(0.1), -weights)


@pytest.mark.parametrize("d", [3, 30])
def test_zero_gradients_leave_the_damping(d: int) -> None:
    gradients, weights, keep = torch.zeros(8, d), torch.ones(d), torch.arange(d) > 0
    fisher = inverse_fisher(gradients, 0.5)
    assert torch.equal(fisher.ihvp(weights), 2 * weights)
    assert torch.equal(fisher.diagonal(), 2 * weights)
    assert not fisher.ihvp_span(torch.ones(8)).any()
    assert torch.equal(joint_update(gradients, weights, keep).solve(0.5), -weights * ~keep)


def test_without_pruned_weights_only_residuals_move_the_others() -> None:
    gradients, weights, residuals = normal(1, 8, 30), normal(2, 30), normal(3, 8)
    everything = torch.ones(30, dtype=torch.bool)
    assert not joint_update(gradients, weights, everything).solve(0.1).any()
    delta = joint_update(gradients, weights, everything, residuals=residuals).solve(0.1)
    torch.testing.assert_close(delta, -inverse_fisher(gradients, 0.1).ihvp(gradients.T @ residuals) / 8)


def test_the_damping_in_force_is_raised_for_all_blocks() -> None:
    # Two equal gradients in the first block: adding 1e-20 to K changes nothing, so Cholesky meets an exact zero.
    gradients = torch.cat((torch.ones(2, 4), normal(1, 2, 3)), 1).double()
    fisher = inverse_fisher(gradients, 1e-20, blocks=(4, 3))
    assert 1e-18 < fisher.damping < 1e-14
    again = inverse_fisher(gradients, fisher.damping, blocks=(4, 3))
    assert again.damping == fisher.damping
    assert torch.equal(again.diagonal(), fisher.diagonal())


def test_the_diagonal_keeps_its_bounds_where_float32_does_not_resolve_the_damping() -> None:
    gradients = gradients_of("three spikes", 64, 65).float()
    fisher = inverse_fisher(gradients, 1e-12 * norm_of(gradients))
    norms = gradients.double().square().mean(0)
    diagonal = fisher.diagonal().double()
    assert bool((diagonal <= (1 + 1e-6) / fisher.damping).all())
    assert bool((diagonal >= (1 - 1e-6) / (fisher.damping + norms)).all())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    gradients = torch.ones(4, 6)
    gradients[2, 5] = float("nan")
    with pytest.raises(NumericsError, match="gradient row 2 of 4 is nan at column 5"):
        inverse_fisher(gradients, 1.0)
    with pytest.raises(NumericsError, match="gradient row 2 of 4 is nan at column 5"):
        joint_update(gradients, torch.ones(6), torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("d", [3, 6])
def test_gradients_whose_products_overflow_are_named(d: int) -> None:
    gradients = torch.ones(4, d, dtype=torch.float64)
    gradients[1, 2] = -1e200
    with pytest.raises(NumericsError, match="row 1 of 4 reaches 1e\\+200"):
        inverse_fisher(gradients, 1.0)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf"), 1e-320])
def test_a_damping_that_is_not_positive_and_finite_is_refused(damping: float) -> None:
    with pytest.raises(NumericsError, match="must be a positive number with a finite inverse"):
        inverse_fisher(torch.ones(2, 3), damping)
    with pytest.raises(NumericsError, match="must be a positive number with a finite inverse"):
        joint_update(torch.ones(2, 3), torch.ones(3), torch.arange(3) > 0).solve(damping)


def test_vectors_that_are_not_finite_are_named() -> None:
    gradients, bad, keep = torch.ones(2, 3), torch.tensor([1.0, float("inf"), 0.0]), torch.arange(3) > 0
    with pytest.raises(NumericsError, match=r"x is inf at index \[1\]"):
        inverse_fisher(gradients, 1.0).ihvp(bad)
    with pytest.raises(NumericsError, match=r"weights is inf at index \[1\]"):
        joint_update(gradients, bad, keep)
    with pytest.raises(NumericsError, match=r"residuals is -?inf at index \[0\]"):
        joint_update(gradients, torch.ones(3), keep, residuals=bad[1:])


@pytest.mark.parametrize("blocks", [0, (1, 1), (3, 0), (4,), ()])
def test_blocks_that_do_not_cover_the_parameters_are_refused(blocks: Blocks) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        inverse_fisher(torch.ones(2, 3), 1.0, blocks=blocks)


def test_shapes_that_do_not_fit_are_refused() -> None:
    gradients, weights = torch.ones(2, 3), torch.ones(3)
    fisher = inverse_fisher(gradients, 1.0)
    with pytest.raises(ValueError, match=r"x must have 3 rows"):
        fisher.ihvp(torch.ones(2))
    with pytest.raises(ValueError, match=r"gradients must be \[m, d\]"):
        inverse_fisher(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"keep must be \[3\] in bool"):
        joint_update(gradients, weights, torch.ones(3))
    with pytest.raises(IndexError, match=r"index -1 is not in 0 .. 2"):
        fisher.element(0, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gram_matrix_given_is_as_good_as_one_computed(kind: str) -> None:
    gradients, weights, keep = gradients_of(kind, 16, 90), normal(7, 90), normal(9, 90) > -0.5
    gram, damping = gram_matrix(gradients), 1e-6 * norm_of(gradients)
    found, expected = (inverse_fisher(gradients, damping, gram=g).diagonal() for g in (gram, None))
    assert torch.equal(found, expected)
    delta, expected = (joint_update(gradients, weights, keep, gram=g).solve(damping) for g in (gram, None))
    torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("blocks", [None, 9])
def test_many_dampings_at_once_are_as_one_by_one(blocks: Blocks) -> None:
    gradients, weights, keep = gradients_of("common mean", 16, 90), normal(7, 90), normal(9, 90) > 0
    update, dampings = joint_update(gradients, weights, keep, blocks=blocks), [1e-6, 1e-3, 1.0]
    for found, damping in zip(update.solve_each(dampings), dampings, strict=True):
        torch.testing.assert_close(found, update.solve(damping), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(90, 400), (90, 70)])
def test_with_several_threads_it_is_the_same_but_for_rounding(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = normal(3, *shape)
    inverse = inverse_fisher(gradients, 1e-3)
    monkeypatch.setattr(mfac.blas, "applies", lambda part: False)
    torch.testing.assert_close(inverse_fisher(gradients, 1e-3).diagonal(), inverse.diagonal(), rtol=1e-11, atol=0)

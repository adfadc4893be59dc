"""The window of M-FAC against the inverse of its gradients, whatever came and went."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import NumericsError
from compress.numerics.mfac import inverse_fisher
from compress.numerics.mfac_window import FisherWindow


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def worst(window: FisherWindow, rows: list[Tensor], damping: float) -> float:
    """The largest relative error of all queries, against the singular value decomposition of the gradients."""
    gradients = torch.stack(rows)
    n, d = gradients.shape
    assert torch.equal(window.gradients(), gradients)
    left, values, right = torch.linalg.svd(gradients)
    curvature = torch.cat((values.square() / n, values.new_zeros(d)))[:d] + damping
    inverse = right.T / curvature @ right
    x, coefficients = normal(5, d), normal(6, n)
    k = len(values)
    spanned = right[:k].T @ (values / curvature[:k] * (left.T @ coefficients)[:k])
    errors = [
        apart(window.ihvp(x), inverse @ x),
        apart(window.ihvp_span(coefficients), spanned),
        apart(window.static().diagonal(), inverse.diagonal()),
    ]
    scale = inverse.diagonal().sqrt()
    for i, j in ((0, 0), (0, d - 1), (d // 2, d // 2), (d - 1, 1)):
        errors.append(abs(window.element(i, j) - float(inverse[i, j])) / float(scale[i] * scale[j]))
    return max(errors)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_window_equals_the_dense_inverse(data: st.DataObject) -> None:
    capacity, d = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 30))
    damping = 10.0 ** data.draw(st.integers(-3, 2))
    window, rows = FisherWindow(capacity, d, damping, dtype=torch.float64), list[Tensor]()
    for seed in range(data.draw(st.integers(1, 4 * capacity))):
        action = data.draw(st.sampled_from(("add", "add", "add", "remove", "ask")))
        if action == "remove" and rows:
            position = data.draw(st.integers(0, len(rows) - 1))
            window.remove(position)
            del rows[position]
        elif action == "ask":
            window.element(0, d - 1)
        else:
            window.add(normal(seed, d))
            rows = [*rows, normal(seed, d)][-capacity:]
    assert len(window) == len(rows)
    if rows:
        assert worst(window, rows, damping) < 1e-10


@pytest.mark.parametrize(("capacity", "d"), [(16, 60), (37, 300)])
@pytest.mark.parametrize("asked_every", [1, 5, 1000])
def test_three_wraps_at_small_damping_equal_the_static_inverse(capacity: int, d: int, asked_every: int) -> None:
    stream = normal(0, 3 * capacity + 5, d) * torch.exp(normal(1, d))
    damping = 1e-6 * float(torch.linalg.matrix_norm(stream[:capacity], 2) ** 2 / capacity)
    window = FisherWindow(capacity, d, damping, dtype=torch.float64)
    for number, gradient in enumerate(stream):
        window.add(gradient)
        if number % asked_every == 0:
            window.element(1, 2)
    gradients = stream[-capacity:]
    fisher, coefficients, x = inverse_fisher(gradients, damping), normal(2, capacity), normal(3, d)
    assert apart(window.ihvp(x), fisher.ihvp(x)) < 1e-12
    assert apart(window.ihvp_span(coefficients), fisher.ihvp_span(coefficients)) < 1e-12
    rows = torch.arange(0, d, 7)
    found = torch.tensor([[window.element(i, j) for j in rows.tolist()] for i in rows.tolist()], dtype=torch.float64)
    diagonal = fisher.diagonal()[rows].sqrt()
    assert float(((found - fisher.submatrix(rows, rows)).abs() / torch.outer(diagonal, diagonal)).max()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [1000, 1100])
def test_large_windows_of_float32_gradients(capacity: int) -> None:
    d = 3000
    stream = normal(0, 3 * capacity, d).float()
    damping = 1e-3 * float(stream.square().sum(1).mean() / capacity)
    window = FisherWindow(capacity, d, damping)
    for number, gradient in enumerate(stream):
        window.add(gradient)
        if number == 2 * capacity + capacity // 2:
            restored = FisherWindow(capacity, d, 1.0)
            restored.load_state_dict(copy.deepcopy(window.state_dict()))
            window = restored
        if number % 100 == 0:
            window.ihvp_span(torch.ones(len(window)))
    coefficients = normal(1, capacity)
    expected = inverse_fisher(stream[-capacity:].double(), damping).ihvp_span(coefficients)
    assert apart(window.ihvp_span(coefficients), expected) < 1e-10


def test_a_window_restored_midway_goes_on_with_the_same_bits() -> None:
    stream = normal(0, 40, 50)
    window = FisherWindow(16, 50, 1e-2, dtype=torch.float64)
    for gradient in stream[:21]:
        window.add(gradient)
        window.ihvp(stream[0])
    window.remove(3)
    state: dict[str, Any] = copy.deepcopy(window.state_dict())
    restored = FisherWindow(16, 50, 9.0, dtype=torch.float64)
    restored.load_state_dict(state)
    for gradient in stream[21:]:
        for each in (window, restored):
            each.add(gradient)
        assert torch.equal(window.ihvp_span(torch.ones(len(window))), restored.ihvp_span(torch.ones(len(window))))
    assert torch.equal(window.gradients(), restored.gradients())
    with pytest.raises(ValueError, match=r"the state is of a window \[16, 50\], this one is \[8, 50\]"):
        FisherWindow(8, 50, 1.0).load_state_dict(state)


def test_an_empty_window_is_its_damping() -> None:
    window = FisherWindow(3, 4, 0.5)
    assert window.ihvp(torch.ones(4)).tolist() == [2.0] * 4
    assert (window.element(1, 1), window.element(1, 2)) == (2.0, 0.0)
    assert not window.ihvp_span(torch.zeros(0)).any()


def test_equal_gradients_come_and_go() -> None:
    # Every border but the first has s = u up to rounding, and each that leaves is in the span of the others.
    gradient = normal(0, 20)
    window = FisherWindow(4, 20, 1e-9 * float(gradient.square().sum()), dtype=torch.float64)
    for _ in range(9):
        window.add(gradient)
        window.element(0, 0)
    for left in (3, 2, 1):
        window.remove(0)
        assert len(window) == left
        expected = inverse_fisher(gradient.expand(left, -1), window.damping).ihvp_span(torch.ones(left))
        assert apart(window.ihvp_span(torch.ones(left)), expected) < 1e-10


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    window = FisherWindow(2, 3, 1.0)
    for value in (1.0, 2.0):
        window.add(torch.full((3,), value))
    before = window.ihvp(torch.ones(3))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericsError, match=r"a gradient for the window.*is not finite"):
            window.add(torch.tensor([1.0, bad, 0.0]))
    assert torch.equal(window.ihvp(torch.ones(3)), before)
    assert window.gradients()[:, 0].tolist() == [1.0, 2.0]


def test_what_does_not_fit_is_refused() -> None:
    window = FisherWindow(2, 3, 1.0)
    with pytest.raises(ValueError, match=r"a gradient must be \[3\], not \[4\]"):
        window.add(torch.ones(4))
    with pytest.raises(IndexError, match="position 0 is not in"):
        window.remove(0)
    with pytest.raises(IndexError, match=r"index 3 is not in 0 \.\. 2"):
        window.element(0, 3)
    with pytest.raises(ValueError, match="coefficients must have 0 rows"):
        window.ihvp_span(torch.ones(1))
    with pytest.raises(ValueError, match="a window of 0 gradients"):
        FisherWindow(0, 3, 1.0)
    with pytest.raises(NumericsError, match="damping is 0"):
        FisherWindow(2, 3, 0.0)

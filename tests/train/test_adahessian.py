"""AdaHessian: its diagonal against the exact Hessian's, its update against the formula, and that it trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.train.adahessian import AdaHessian, averaged, hutchinson_diagonal


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


X, Y = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2


def loss_of(module: nn.Module) -> Tensor:
    return F.cross_entropy(module(X), Y)


def exact_diagonal(module: nn.Module) -> list[Tensor]:
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss_of(module), parameters, create_graph=True)
    found = []
    for gradient, p in zip(gradients, parameters, strict=True):
        rows = [torch.autograd.grad(g, p, retain_graph=True)[0].flatten()[i] for i, g in enumerate(gradient.flatten())]
        found.append(torch.stack(rows).reshape(p.shape))
    return found


def test_the_diagonal_is_unbiased() -> None:
    module = small_network()
    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(0)
    sums = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    num_probes = 500
    for _ in range(num_probes):
        gradients = torch.autograd.grad(loss_of(module), parameters, create_graph=True)
        for total, square, found in zip(
            sums, squares, hutchinson_diagonal(gradients, parameters, generator=generator), strict=True
        ):
            total += found
            square += found**2
    for total, square, exact in zip(sums, squares, exact_diagonal(module), strict=True):
        mean = total / num_probes
        error = ((square / num_probes - mean**2) / num_probes).sqrt()
        assert bool(((mean - exact).abs() < 5 * error + 1e-12).all())


def test_a_diagonal_hessian_has_no_noise() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    gradients = torch.autograd.grad((0.5 * scale * p**2).sum(), [p], create_graph=True)
    (found,) = hutchinson_diagonal(gradients, [p], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, scale)


def test_kernels_and_blocks_share_a_value() -> None:
    kernel = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(averaged(kernel), kernel.abs().mean((2, 3), keepdim=True).expand_as(kernel))
    matrix = torch.tensor([[1.0, -3.0, 5.0, 5.0]])
    assert averaged(matrix, 2).tolist() == [[2.0, 2.0, 5.0, 5.0]]
    assert averaged(matrix, 3).tolist() == [[1.0, 3.0, 5.0, 5.0]]
    assert averaged(torch.tensor([-2.0, 1.0])).tolist() == [2.0, 1.0]


def test_the_first_step_of_a_quadratic_is_newtons() -> None:
    # With both bias corrections the first step is lr * g / |D|, and on a diagonal quadratic g / D is the way home.
    p = nn.Parameter(torch.tensor([4.0, -2.0], dtype=torch.float64))
    optimizer = AdaHessian([p], lr=1.0, eps=0.0)
    loss = 0.5 * (torch.tensor([3.0, 50.0]) * p**2).sum()
    torch.autograd.backward(loss, create_graph=True)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.zeros(2, dtype=torch.float64))


def steps(module: nn.Module, optimizer: AdaHessian, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(module)
        torch.autograd.backward(loss, create_graph=True)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.filterwarnings("ignore:Using backward")
def test_it_trains() -> None:
    module = small_network()
    losses = steps(module, AdaHessian(module.parameters(), lr=0.1), 60)
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_restored_state_goes_on_with_the_same_bytes() -> None:
    module = small_network()
    optimizer = AdaHessian(module.parameters(), lr=0.05)
    steps(module, optimizer, 3)
    other = copy.deepcopy(module)
    for p in other.parameters():
        p.grad = None
    restored = AdaHessian(other.parameters(), lr=9.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares what it can
    assert steps(module, optimizer, 3) == steps(other, restored, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_gradients_without_a_graph_are_refused() -> None:
    module = small_network()
    torch.autograd.backward(loss_of(module))
    with pytest.raises(RuntimeError, match="create_graph=True"):
        AdaHessian(module.parameters()).step()

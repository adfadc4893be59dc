"""AdaHessian: its diagonal against the exact Hessian's, its update against the formula, and that it trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress
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


def reference(
    module: nn.Module, count: int, *, lr: float, betas: tuple[float, float], eps: float, decay: float, power: float,
    block: int, delay: int, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Algorithm 1 written out in float64, with exact Hessian-vector products."""
    names = [name for name, _ in module.named_parameters()]
    w = {name: p.detach().clone() for name, p in module.named_parameters()}
    mean, square = ({name: torch.zeros_like(value) for name, value in w.items()} for _ in range(2))
    taken = 0

    def loss(*values: Tensor) -> Tensor:
        return F.cross_entropy(
            torch.func.functional_call(module, dict(zip(names, values, strict=True)), (IMAGES,)), LABELS
        )

    for step in range(count):
        values = tuple(w[name] for name in names)
        gradients = torch.autograd.functional.jacobian(loss, values)
        if step % delay == 0:
            taken += 1
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            signs = tuple(2 * torch.randint(2, v.shape, generator=generator).to(torch.float64) - 1 for v in values)
            _, products = torch.autograd.functional.hvp(loss, values, signs)
            for name, z, product in zip(names, signs, products, strict=True):
                diagonal = (z * product).abs()
                if diagonal.dim() == 4:  # one value for a kernel
                    diagonal = diagonal.mean((2, 3), keepdim=True).expand_as(diagonal)
                elif diagonal.dim() == 2 and block > 1:
                    rows, columns = diagonal.shape
                    diagonal = diagonal.view(rows, columns // block, block).mean(2).repeat_interleave(block, 1)
                square[name] = betas[1] * square[name] + (1 - betas[1]) * diagonal**2
        for name, gradient in zip(names, gradients, strict=True):
            mean[name] = betas[0] * mean[name] + (1 - betas[0]) * gradient
            root = (square[name] / (1 - betas[1] ** taken)) ** (power / 2)
            step_of = mean[name] / (1 - betas[0] ** (step + 1)) / (root + eps)
            w[name] = (1 - lr * decay) * w[name] - lr * step_of
    return w


IMAGES = torch.randn(12, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(12) % 3


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(("power", "block", "delay"), [(1.0, 1, 1), (0.5, 4, 1), (1.0, 4, 3), (0.0, 1, 2)])
def test_every_step_is_algorithm_1(power: float, block: int, delay: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
    expected = reference(module, 7, **settings, decay=0.02, power=power, block=block, delay=delay, seed=3)  # type: ignore[arg-type]
    optimizer = AdaHessian(
        module.parameters(), **settings, weight_decay=0.02, power=power, block_size=block, delay=delay, seed=3  # type: ignore[arg-type]
    )  # fmt: skip
    for number in range(7):
        assert optimizer.needs_graph == (number % delay == 0)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(module(IMAGES), LABELS), create_graph=optimizer.needs_graph)
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_groups_a_closure_and_parameters_without_gradients() -> None:
    module, unused = small_network(), nn.Parameter(torch.ones(2).double())
    first, *others = module.parameters()
    optimizer = AdaHessian([{"params": [first, unused], "lr": 0.0}, {"params": others}], lr=0.1, delay=2)
    before = first.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(module)
        torch.autograd.backward(loss, create_graph=optimizer.needs_graph)
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert torch.equal(first.detach(), before)
    assert unused.tolist() == [1.0, 1.0]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == 0.05


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_parameter_that_joins_waits_for_a_diagonal_of_its_own() -> None:
    module = small_network()
    *first, last = module.parameters()
    optimizer = AdaHessian(first, lr=0.1, delay=3)
    before = last.detach().clone()
    moved = []
    for number in range(5):
        if number == 1:
            optimizer.add_param_group({"params": [last]})
        module.zero_grad()
        torch.autograd.backward(loss_of(module), create_graph=optimizer.needs_graph)
        optimizer.step()
        moved.append(not torch.equal(last.detach(), before))
    assert moved == [False, False, False, True, True]


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("power", 2.0), ("delay", 0)])
def test_values_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} of AdaHessian is"):
        AdaHessian([nn.Parameter(torch.ones(1))], **{name: value})  # type: ignore[arg-type]


def test_the_package_offers_it() -> None:
    assert compress.AdaHessian is AdaHessian

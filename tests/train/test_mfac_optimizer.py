"""The M-FAC optimizer against dense algebra, and the manners of a torch optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.errors import NumericsError
from compress.train.mfac_optimizer import MFAC


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def backward(module: nn.Module, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    loss = F.cross_entropy(module(x), (x.sum(1) > 0).long())
    module.zero_grad()
    loss.backward()
    return float(loss.detach())


def flat(module: nn.Module, *, of_gradients: bool = False) -> Tensor:
    return torch.cat([(p.grad if of_gradients else p.detach()).flatten() for p in module.parameters()])  # type: ignore[union-attr]


def run(module: nn.Module, optimizer: MFAC, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        losses.append(backward(module, number))
        optimizer.step()
    return losses


@pytest.mark.parametrize("num_gradients", [1, 3, 5])
def test_every_step_is_the_dense_formula(num_gradients: int) -> None:
    module, lr, momentum, damping, decay = small_network(), 0.1, 0.8, 0.3, 0.01
    optimizer = MFAC(
        module.parameters(), lr, momentum=momentum, damping=damping, weight_decay=decay, num_gradients=num_gradients
    )
    rows: list[Tensor] = []
    for number in range(12):
        backward(module, number)
        rows = [*rows, flat(module, of_gradients=True)][-num_gradients:]
        gradients, before = torch.stack(rows), flat(module)
        optimizer.step()
        n, d = gradients.shape
        mean = gradients.square().sum(1).mean()
        fisher = gradients.T @ gradients / n + damping * mean / n * torch.eye(d, dtype=torch.float64)
        moving = sum((momentum ** (n - i) * g for i, g in enumerate(gradients)), rows[-1])
        step = (1 + 1 / damping) * damping * mean / n * torch.linalg.solve(fisher, moving)
        torch.testing.assert_close(flat(module), (1 - lr * decay) * before - lr * step, rtol=1e-10, atol=1e-12)


def test_much_damping_is_sgd() -> None:
    module = small_network()
    other = copy.deepcopy(module)
    optimizer = MFAC(module.parameters(), 0.1, momentum=0.5, damping=1e12, num_gradients=60)
    sgd = torch.optim.SGD(other.parameters(), 0.1, momentum=0.5, nesterov=True)
    run(module, optimizer, range(40))
    for number in range(40):
        backward(other, number)
        sgd.step()
    torch.testing.assert_close(flat(module), flat(other), rtol=1e-9, atol=1e-10)


def test_it_trains_with_a_scheduler() -> None:
    module = small_network()
    optimizer = MFAC(module.parameters(), 0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    losses = []
    for number in range(60):
        losses += run(module, optimizer, range(number, number + 1))
        scheduler.step()
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_restored_state_goes_on_with_the_same_bytes(dtype: torch.dtype, tmp_path: object) -> None:
    module = small_network().to(dtype)
    optimizer = MFAC(module.parameters(), 0.1, num_gradients=4)

    def step(net: nn.Module, opt: MFAC, number: int) -> None:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number)).to(dtype)
        net.zero_grad()
        net(x).square().mean().backward()
        opt.step()

    for number in range(6):
        step(module, optimizer, number)
    other = copy.deepcopy(module)
    path = f"{tmp_path}/state.pt"
    torch.save(optimizer.state_dict(), path)
    restored = MFAC(other.parameters(), 9.0, num_gradients=4)
    restored.load_state_dict(torch.load(path, weights_only=True))
    for number in range(6, 12):
        step(module, optimizer, number)
        step(other, restored, number)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_groups_have_rates_and_decays_of_their_own() -> None:
    module = small_network()
    first, second = list(module[0].parameters()), list(module[2].parameters())  # type: ignore[index]
    optimizer = MFAC([{"params": first, "lr": 0.0}, {"params": second, "momentum": 0.0}], 0.1)
    before = [p.detach().clone() for p in first]
    run(module, optimizer, range(3))
    assert all(torch.equal(p, old) for p, old in zip(first, before, strict=True))
    assert bool((second[0] != small_network()[2].weight).any())  # type: ignore[index]


def test_a_group_that_joins_counts_with_zeros_before() -> None:
    module = small_network()
    first, second = list(module[0].parameters()), list(module[2].parameters())  # type: ignore[index]
    optimizer = MFAC(first, 0.1, num_gradients=5)
    run(module, optimizer, range(3))
    optimizer.add_param_group({"params": second})
    run(module, optimizer, range(3, 5))
    rows = optimizer.state[second[0]]["gradients"]
    assert not rows[:3].any()
    assert rows[3:].abs().sum((1, 2)).min() > 0
    held = torch.cat([optimizer.state[p]["gradients"].flatten(1) for p in (*first, *second)], 1)
    torch.testing.assert_close(optimizer.state[first[0]]["window"]["gram"], held @ held.T)


def test_parameters_without_a_gradient_stay() -> None:
    module = small_network()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = MFAC([unused, *module.parameters()], 0.1, weight_decay=0.1)
    run(module, optimizer, range(4))
    assert unused.tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    before = flat(module)
    optimizer.step()
    assert torch.equal(flat(module), before)


def test_a_closure_gives_the_loss() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = MFAC([p], 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 5.0
    assert float(p.detach().square().sum()) < 5.0


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    module = small_network()
    optimizer = MFAC(module.parameters(), 0.1, num_gradients=3)
    run(module, optimizer, range(5))
    before, state = flat(module), copy.deepcopy(optimizer.state_dict())
    backward(module, 5)
    next(module.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NumericsError, match="is not finite"):
        optimizer.step()
    assert torch.equal(flat(module), before)
    assert torch.equal(state["state"][0]["gradients"], optimizer.state_dict()["state"][0]["gradients"])


def test_half_precision_parameters_have_float32_gradients() -> None:
    p, scalar = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(()))
    optimizer = MFAC([p, scalar], 0.1, num_gradients=2)
    for _ in range(3):
        optimizer.zero_grad()
        (p.sum() * scalar).backward()
        optimizer.step()
    assert optimizer.state[p]["gradients"].dtype == torch.float32
    restored = MFAC([p, scalar], 0.1, num_gradients=2)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.state[p]["gradients"].dtype == torch.float32
    assert restored.state[p]["window"]["gram"].dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("momentum", 1.0), ("weight_decay", -1.0), ("damping", 0.0), ("num_gradients", 0)]
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} of MFAC is {value}"):
        MFAC([nn.Parameter(torch.ones(1))], **{name: value})  # type: ignore[arg-type]


def test_the_package_offers_it() -> None:
    assert compress.MFAC is MFAC

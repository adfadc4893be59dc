"""The Hessian's diagonal against the dense matrix, and its averages by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.testing import assert_close

from compress.curvature.diagonal import Diagonal, hessian_diagonal, spatial_average
from compress.curvature.network import Network, open_network
from compress.data import Data
from compress.graph.trace import Layer, trace_graph
from compress.task import Classification


def layer(*shape: int, input_axis: int = 1) -> Layer:
    return Layer("w", "linear", "linear", shape, torch.Size(shape).numel(), 0, 0, input_axis)


def classifier() -> tuple[nn.Module, Network, Data]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    inputs = torch.randn(6, 2, 3, 3)
    network = open_network(trace_graph(module, (inputs,)), device=torch.device("cpu"))
    network.module.double()
    return module.double(), network, Data((inputs.double(),), torch.arange(6) % 3, "calib.npz")


def run(
    network: Network, data: Data, *, probes: int, rtol: float = 0.0, block_size: int = 1, seed: int = 0
) -> dict[str, Diagonal]:
    return hessian_diagonal(
        network,
        Classification(),
        data,
        num_probes=probes,
        rtol=rtol,
        block_size=block_size,
        generator=torch.Generator().manual_seed(seed),
        progress=lambda *_: None,
        batch=4,
    )


def dense_diagonals(module: nn.Module, data: Data) -> dict[str, Tensor]:
    found = {}
    for name in ("0.weight", "3.weight"):
        weight = module.requires_grad_(False).get_parameter(name)

        def loss(flat: Tensor, name: str = name, weight: Tensor = weight) -> Tensor:
            outputs = functional_call(module, {name: flat.reshape(weight.shape)}, data.inputs)
            assert data.targets is not None
            return F.cross_entropy(outputs, data.targets)

        found[name] = hessian(loss)(weight.flatten()).diagonal().reshape(weight.shape)
    return found


def test_the_diagonal_is_that_of_the_dense_hessian_in_the_mean() -> None:
    module, network, data = classifier()
    expected = dense_diagonals(module, data)
    conv = expected["0.weight"]
    expected["0.weight"] = conv.mean((2, 3), keepdim=True).expand_as(conv)
    runs = [run(network, data, probes=10, seed=seed) for seed in range(40)]
    for name, exact in expected.items():
        found = torch.stack([diagonals[name].entries for diagonals in runs])
        z = (found.mean(0) - exact) / (found.std(0) / 40**0.5)
        assert float(z.square().mean()) < 2
        # The entries are told apart: their noise is below their spread.
        assert float(torch.corrcoef(torch.stack([found.mean(0).flatten(), exact.flatten()]))[0, 1]) > 0.3


def test_standard_errors_of_the_mean_are_honest() -> None:
    module, network, data = classifier()
    exact = {name: float(values.mean()) for name, values in dense_diagonals(module, data).items()}
    covered = [
        abs(d.mean - exact[name]) <= 2.3 * d.stderr
        for seed in range(30)
        for name, d in run(network, data, probes=10, seed=seed).items()
    ]
    assert sum(covered) >= 0.85 * len(covered)


def test_averages_leave_the_mean_as_it_is() -> None:
    _, network, data = classifier()
    for diagonal in run(network, data, probes=2, block_size=5).values():
        assert_close(float(diagonal.entries.mean()), diagonal.mean)


def test_convolutions_are_averaged_over_their_kernels() -> None:
    diagonal = torch.arange(12.0).reshape(1, 2, 2, 3)
    found = spatial_average(diagonal, layer(1, 2, 2, 3), block_size=32)
    assert torch.equal(found, torch.tensor([2.5, 8.5]).reshape(1, 2, 1, 1).expand(1, 2, 2, 3))


def test_linear_layers_are_averaged_over_blocks_of_inputs() -> None:
    diagonal = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [0.0, 2.0, 0.0, 0.0, 4.0]])
    found = spatial_average(diagonal, layer(2, 5), block_size=2)
    assert torch.equal(found, torch.tensor([[2.0, 2.0, 6.0, 6.0, 9.0], [1.0, 1.0, 0.0, 0.0, 4.0]]))
    assert torch.equal(spatial_average(diagonal, layer(2, 5), block_size=1), diagonal)
    assert torch.equal(diagonal[0], torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]))


def test_one_probe_becomes_two_and_one_example_is_enough() -> None:
    _, network, data = classifier()
    found = run(network, data.first(1), probes=1)
    assert all(torch.isfinite(d.entries).all() and d.stderr > 0 for d in found.values())


def test_probes_are_drawn_until_every_layer_is_close_enough() -> None:
    _, network, data = classifier()
    found = run(network, data, probes=400, rtol=0.2)
    (made,) = {one.probes for one in found.values()}
    assert 8 <= made < 400
    assert all(one.stderr <= 0.2 * abs(one.mean) for one in found.values())
    first = run(network, data, probes=made)
    assert all(torch.equal(found[name].entries, first[name].entries) for name in found)
    assert {one.probes for one in run(network, data, probes=20).values()} == {20}

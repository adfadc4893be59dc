"""Traces against dense matrices from torch.func, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import named

from compress.curvature import traces
from compress.curvature.network import Network, open_network, outputs_of
from compress.curvature.traces import (
    CONTROLLED,
    ggn_traces,
    heaviest,
    hessian_product,
    hessian_products,
    hessian_traces,
)
from compress.data import Data
from compress.errors import NumericsError, UsageError
from compress.graph.trace import trace_graph
from compress.numerics.trace import ESTIMATORS, TraceEstimate
from compress.task import CausalLM, Classification, Regression, Task

CPU = torch.device("cpu")
FLOAT32_INSIDE = {"Recurrent"}  # its trace holds a dtype


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.stem(x))
        return self.a(y), self.b(y)


class Pair:
    """A user's loss of two outputs, convex in them."""

    name, unit, higher_is_better = "pair", "nats", False

    def prepare(self, data: Data) -> Data:
        return data

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        a, b = outputs
        return (F.cross_entropy(a, targets, reduction="none") + (b.sum(1) - a[:, 0]).pow(4)).mean()

    def score(self, outputs: Any, targets: Any) -> Tensor:
        return torch.zeros(len(targets))


def opened(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> Network:
    network = open_network(trace_graph(module, inputs), device=CPU)
    network.module.to(dtype)
    return network


def classifier(classes: int, *, scale: float = 1.0, count: int = 12) -> tuple[nn.Module, Network, Data]:
    """With ``scale`` the outputs of most examples become certain, as those of a trained network are."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).eval()
    module[2].weight.data *= scale
    inputs = torch.randn(count, 4)
    network = opened(module, (inputs[:2],))
    return module.double(), network, Data((inputs.double(),), torch.arange(count) % classes, "calib.npz")


def images() -> tuple[nn.Module, Network, Data]:
    zoo = named("plain_cnn")
    module, inputs = zoo.make(), zoo.inputs(5)
    network = opened(module, inputs)
    return module.double(), network, Data((inputs[0].double(),), torch.arange(5), "calib.npz")


def dense_ggn_traces(module: nn.Module, loss: Callable[[Tensor, int], Tensor], data: Data) -> dict[str, float]:
    """Mean over examples of tr(J^T S J), J and S of the concatenated outputs of one example."""
    frozen = module.requires_grad_(False)
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    totals = dict.fromkeys(weights, 0.0)
    for i in range(len(data)):

        def outputs(weights: dict[str, Tensor], i: int = i) -> Tensor:
            values = outputs_of(functional_call(frozen, weights, tuple(x[i : i + 1] for x in data.inputs)))
            return torch.cat([v.flatten() for v in values])

        s = hessian(lambda f, i=i: loss(f, i))(outputs(weights))
        for name, jacobian in jacrev(outputs)(weights).items():
            j = jacobian.flatten(1)
            totals[name] += (s * (j @ j.T)).sum().item() / len(data)
    return totals


def run(network: Network, task: Task, data: Data, *, seed: int = 0, rtol: float = 0.0, passes: int = 20) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return ggn_traces(network, task, data, rtol=rtol, max_passes=passes, generator=generator, progress=lambda *_: None)


def means(found: dict[str, TraceEstimate]) -> dict[str, float]:
    return {name: estimate.mean for name, estimate in found.items()}


def test_class_traces_are_exact_after_as_many_passes_as_classes() -> None:
    for module, network, data in (classifier(3), images()):
        found = run(network, Classification(), data)
        assert_close(means(found), dense_ggn_traces(module, lambda f, _: F.cross_entropy(f, f.argmax()), data))
        assert all(e.stderr == 0 and e.passes == found_classes(network, data) for e in found.values())


def found_classes(network: Network, data: Data) -> int:
    return int(network.module(*data.inputs).shape[1])


def test_traces_of_unequal_examples_are_exact_in_the_end() -> None:
    module, network, data = classifier(5, scale=30.0, count=40)
    found = run(network, Classification(), data)
    assert_close(means(found), dense_ggn_traces(module, lambda f, _: F.cross_entropy(f, f.argmax()), data))
    # Two passes over all, three more over the heavy ones, three more over the others.
    assert {e.passes for e in found.values()} == {8}


def test_regression_traces_are_exact_after_as_many_passes_as_outputs() -> None:
    module, network, data = classifier(3)
    data = Data(data.inputs, None, "calib.npz")
    found = run(network, Regression(), data)
    assert_close(means(found), dense_ggn_traces(module, lambda f, _: F.mse_loss(f, torch.zeros_like(f)), data))
    assert {e.passes for e in found.values()} == {3}


def test_one_output_needs_one_pass() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).eval()
    network = opened(module, (torch.randn(2, 4),))
    data = Data((torch.randn(6, 4).double(),), None, "calib.npz")
    found = run(network, Regression(), data)
    expected = dense_ggn_traces(module.double(), lambda f, _: f.square().mean(), data)
    assert_close(means(found), expected)
    assert {(e.passes, e.stderr) for e in found.values()} == {(1, 0.0)}


def test_a_users_loss_of_two_outputs_is_exact_after_as_many_passes_as_outputs() -> None:
    torch.manual_seed(0)
    module = TwoOutputs().eval()
    network = opened(module, (torch.randn(2, 4),))
    targets = torch.arange(7) % 3
    data = Data((torch.randn(7, 4).double(),), targets, "calib.npz")

    def loss(f: Tensor, i: int) -> Tensor:
        return Pair().loss((f[None, :3], f[None, 3:]), targets[i : i + 1])

    found = run(network, Pair(), data)
    assert_close(means(found), dense_ggn_traces(module.double(), loss, data), rtol=1e-6, atol=1e-7)
    assert {e.passes for e in found.values()} == {4}


def test_traces_of_a_language_model_are_right_within_their_errors() -> None:
    zoo = named("Gpt")
    module, inputs = zoo.make(), zoo.inputs(3)
    network = opened(module, inputs)
    data = Data(inputs, None, "calib.npz")
    found = run(network, CausalLM(), data, passes=40)

    def loss(f: Tensor, _: int) -> Tensor:
        rows = f.reshape(9, -1)
        return F.cross_entropy(rows, rows.argmax(1))

    expected = dense_ggn_traces(module.double(), loss, data)
    for name, estimate in found.items():
        assert abs(estimate.mean - expected[name]) < 4 * estimate.stderr
        assert estimate.stderr < 0.2 * estimate.mean


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_standard_errors_are_those_of_the_estimates(scale: float) -> None:
    _, network, data = classifier(10, scale=scale, count=40)
    exact = means(run(network, Classification(), data, passes=30))
    squares, covered = [], 0
    for seed in range(30):
        for name, e in run(network, Classification(), data, seed=seed, passes=4).items():
            z = (e.mean - exact[name]) / e.stderr
            squares.append(z * z)
            covered += abs(z) < 2
    assert 0.4 < sum(squares) / len(squares) < 2.5
    assert covered >= 0.85 * len(squares)


def test_passes_end_at_the_tolerance() -> None:
    _, network, data = classifier(10, count=40)
    loose, tight = (run(network, Classification(), data, rtol=rtol) for rtol in (0.2, 0.03))
    assert all(e.stderr <= 0.2 * e.mean for e in loose.values())
    assert all(e.stderr <= 0.03 * e.mean for e in tight.values())
    assert next(iter(loose.values())).passes < next(iter(tight.values())).passes < 10


def test_few_examples_take_more_passes_before_their_spread_is_believed() -> None:
    _, network, data = classifier(10)
    for seed in range(5):
        found = run(network, Classification(), data.first(1), seed=seed, rtol=10.0)
        assert {e.passes for e in found.values()} == {8}
        assert {e.passes for e in run(network, Classification(), data, seed=seed, rtol=10.0).values()} == {2}


def test_later_passes_cover_the_heavy_examples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, network, data = classifier(5, scale=30.0, count=40)
    sizes: list[int] = []

    def counted(*arguments: Any, **options: Any) -> None:
        sizes.append(len(arguments[2]))
        layer_rows(*arguments, **options)

    layer_rows = traces.layer_rows
    monkeypatch.setattr(traces, "layer_rows", counted)
    run(network, Classification(), data, passes=5)
    heavy = sizes[-1]
    assert sizes == [32, 8, 32, 8, heavy, heavy, heavy]
    assert heavy < 20


def test_the_heaviest_examples_are_the_fewest_with_99_percent_of_the_squares() -> None:
    curvature = torch.tensor([0.1, 3.0, 0.0, 4.0, 0.2], dtype=torch.float64)
    assert heaviest(curvature).tolist() == [1, 3]
    assert heaviest(torch.ones(50)).tolist() == list(range(50))
    assert heaviest(torch.tensor([9.9, 1.0, 0.5])).tolist() == [0, 1]
    assert heaviest(torch.zeros(3)).tolist() == [0]


def test_traces_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    _, network, data = classifier(5, scale=30.0, count=40)
    whole = run(network, Classification(), data, passes=4)
    monkeypatch.setattr(traces, "PASS_BATCH", 7)
    monkeypatch.setattr("compress.curvature.network.batches.__defaults__", (7,))
    assert_close(means(run(network, Classification(), data, passes=4)), means(whole))


def test_one_example_is_enough() -> None:
    module, network, data = classifier(3)
    data = data.first(1)
    found = run(network, Classification(), data)
    assert_close(means(found), dense_ggn_traces(module, lambda f, _: F.cross_entropy(f, f.argmax()), data))


def test_an_unused_layer_and_dead_channels_do_not_keep_the_passes_going() -> None:
    torch.manual_seed(0)
    module = TwoOutputs().eval()
    module.stem.weight.data[0] = 0
    network = opened(module, (torch.randn(2, 4),))
    data = Data((torch.randn(20, 4).double(),), None, "calib.npz")
    found = run(network, Classification(), data, rtol=0.9)
    assert (found["b.weight"].mean, found["b.weight"].stderr) == (0.0, 0.0)
    assert {e.passes for e in found.values()} == {2}


def test_a_gradient_that_is_not_finite_names_its_examples() -> None:
    _, network, data = classifier(3, count=40)
    inputs = data.inputs[0].clone()
    inputs[37] = float("nan")
    with pytest.raises(NumericsError, match=r"the output isn't finite on example 37 of calib.npz"):
        run(network, Classification(), Data((inputs,), None, "calib.npz"))


def test_a_users_loss_needs_targets() -> None:
    torch.manual_seed(0)
    network = opened(TwoOutputs().eval(), (torch.randn(2, 4),))
    with pytest.raises(UsageError, match="the loss of the metric pair needs targets"):
        run(network, Pair(), Data((torch.randn(3, 4).double(),), None, "calib.npz"))


# -- the exact Hessian -------------------------------------------------------------------------------------------------


def dense_hessian(module: nn.Module, task: Task, data: Data, name: str) -> Tensor:
    weight = dict(module.named_parameters())[name].detach()

    def loss(flat: Tensor) -> Tensor:
        return task.loss(functional_call(module, {name: flat.reshape(weight.shape)}, data.inputs), data.targets)

    return hessian(loss)(weight.flatten())


def run_hessian(network: Network, task: Task, data: Data, **changes: Any) -> dict[str, TraceEstimate]:
    generator = torch.Generator().manual_seed(changes.pop("seed", 0))
    settings: dict[str, Any] = {
        **{"estimator": "hutchinson", "rtol": 0.05, "max_probes": 30, "progress": lambda *_: None},
        **changes,
    }
    return hessian_traces(network, task, data, generator=generator, **settings)


def test_hessian_products_are_those_of_the_dense_matrix() -> None:
    module, network, data = classifier(3, scale=2.0)
    for name, weight in network.weights.items():
        vector = torch.randn(weight.shape, dtype=torch.float64)
        found = hessian_product(network, Classification(), data, {name: vector}, batch=5)
        assert_close(found[name].flatten(), dense_hessian(module, Classification(), data, name) @ vector.flatten())


@pytest.mark.parametrize(
    "name",
    ["padded_residual", "InplaceResidual", "same_padding", "transformer_encoder", "Gpt", "Dense", "Recurrent"],
)
def test_hessian_products_are_symmetric(name: str) -> None:
    """Through attention, recurrent layers and operators in place, all layers at once."""
    network = named(name)
    is_narrow = network.name in FLOAT32_INSIDE
    dtype = torch.float32 if is_narrow else torch.float64
    opened_network = opened(network.make(), network.inputs(3), dtype)
    data = Data(tuple(x.to(dtype) if x.is_floating_point() else x for x in network.inputs(3)), None, "data")
    data = Data(data.inputs, torch.zeros_like(outputs_of(opened_network.module(*data.inputs))[0]), "data")
    generator = torch.Generator().manual_seed(0)
    u, v = (
        {n: torch.randn(w.shape, generator=generator).to(dtype) for n, w in opened_network.weights.items()}
        for _ in range(2)
    )
    hu, hv = (hessian_product(opened_network, FirstOutput(), data, x) for x in (u, v))
    left, right = (sum((a[n] * b[n]).sum().item() for n in a) for a, b in ((hu, v), (hv, u)))
    assert left == pytest.approx(right, rel=1e-3 if is_narrow else 1e-8, abs=1e-9)


class FirstOutput(Regression):
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs_of(outputs)[0], targets)


def test_an_operator_without_a_second_derivative_is_named() -> None:
    zoo = named("SqueezeExcite")
    network = opened(zoo.make(), zoo.inputs(2), torch.float32)
    with pytest.raises(UsageError, match=r"torch lacks one \(derivative for aten::hardsigmoid_backward"):
        run_hessian(network, Classification(), Data(zoo.inputs(2), None, "calib.npz"))


def test_products_of_many_vectors_are_those_of_each_to_the_bit() -> None:
    _, network, data = images()
    vectors = {name: torch.randn(3, *weight.shape, dtype=torch.float64) for name, weight in network.weights.items()}
    together = hessian_products(network, Classification(), data, vectors, batch=2)
    for row in range(3):
        alone = hessian_product(network, Classification(), data, {n: v[row] for n, v in vectors.items()}, batch=2)
        assert all(torch.equal(together[name][row], alone[name]) for name in vectors)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_exact_on_a_layer_that_its_products_span(estimator: str) -> None:
    """18 outputs of 3 classes: fewer than 30 eigenvalues of the last layer aren't zero."""
    module, network, data = classifier(3, scale=2.0, count=3)
    exact = float(dense_hessian(module, Classification(), data, "2.weight").trace())
    found = run_hessian(network, Classification(), data, estimator=estimator, rtol=0.0, max_probes=40)["2.weight"]
    assert found.mean == pytest.approx(exact, rel=0.3 if estimator == "hutchinson" else 1e-10)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, CONTROLLED])
def test_a_layers_trace_depends_neither_on_batches_nor_on_other_layers(estimator: str) -> None:
    _, network, data = classifier(3, scale=2.0)
    given: dict[str, Any] = {"estimator": estimator, "rtol": 0.0, "max_probes": 12}
    whole = run_hessian(network, Classification(), data, **given)
    parts = run_hessian(network, Classification(), data, **given, batch=5)
    more = run_hessian(network, Classification(), data, **{**given, "rtol": 1e9})
    for name, estimate in whole.items():
        assert parts[name].mean == pytest.approx(estimate.mean, rel=1e-10)
    assert set(more) == set(whole)


def test_a_piecewise_linear_network_has_the_traces_of_its_gauss_newton_matrix() -> None:
    module, network, data = images()
    exact = run(network, Classification(), data)
    for name, estimate in exact.items():
        assert float(dense_hessian(module, Classification(), data, name).trace()) == pytest.approx(estimate.mean)


def test_with_a_control_a_piecewise_linear_network_has_exact_traces() -> None:
    module, network, data = images()
    found = run_hessian(network, Classification(), data, estimator=CONTROLLED, rtol=0.0, max_probes=3)
    for name, estimate in found.items():
        assert float(dense_hessian(module, Classification(), data, name).trace()) == pytest.approx(estimate.mean)
        assert estimate.stderr <= 1e-7 * estimate.mean


@pytest.mark.parametrize("task", [Classification(), Pair()], ids=["logits", "two outputs"])
def test_a_control_makes_smooth_networks_errors_smaller_and_leaves_them_honest(task: Task) -> None:
    module, network, data = classifier(3, scale=1.0)
    if isinstance(task, Pair):
        torch.manual_seed(1)
        module = TwoOutputs().double().eval()
        inputs = torch.randn(12, 4)
        network = opened(module.float(), (inputs,))
        module, data = module.double(), Data((inputs.double(),), torch.arange(12) % 3, "data")
    exact = {name: float(dense_hessian(module, task, data, name).trace()) for name in network.weights}
    plain, helped = (
        [run_hessian(network, task, data, estimator=e, seed=seed, rtol=0.0, max_probes=12) for seed in range(20)]
        for e in ("hutchinson", CONTROLLED)
    )
    covered = 0
    for name, value in exact.items():
        before, after = (sum((found[name].mean - value) ** 2 for found in runs) ** 0.5 for runs in (plain, helped))
        assert after <= 0.8 * before
        covered += sum(abs(found[name].mean - value) <= 2 * found[name].stderr + 1e-9 * value for found in helped)
    assert covered >= 0.8 * 20 * len(exact)


def test_hutch_plus_plus_looks_where_the_gauss_newton_matrix_is_large() -> None:
    module, network, data = classifier(3, scale=1.0)
    exact = {name: float(dense_hessian(module, Classification(), data, name).trace()) for name in network.weights}
    given: dict[str, Any] = {"estimator": "hutch++", "rtol": 0.0, "max_probes": 12}
    aided, alone = (
        [run_hessian(network, Classification(), data, seed=seed, is_aided=flag, **given) for seed in range(20)]
        for flag in (True, False)
    )
    for name, value in exact.items():
        errors = [sum((found[name].mean - value) ** 2 for found in runs) ** 0.5 for runs in (aided, alone)]
        assert errors[0] <= errors[1]
        assert all(found[name].passes <= 12 for found in aided)


def test_hessian_traces_are_right_within_their_errors() -> None:
    module, network, data = classifier(3, scale=2.0)
    exact = {name: float(dense_hessian(module, Classification(), data, name).trace()) for name in network.weights}
    covered = [
        abs(e.mean - exact[name]) <= 2 * e.stderr
        for seed in range(30)
        for name, e in run_hessian(network, Classification(), data, seed=seed, rtol=0.1).items()
    ]
    assert sum(covered) >= 0.8 * len(covered)
    many = run_hessian(network, Classification(), data, rtol=0.0, max_probes=500)
    for name, estimate in many.items():
        assert abs(estimate.mean - exact[name]) < 4 * estimate.stderr
        assert estimate.passes == 500


def test_hessian_probes_end_at_the_tolerance_or_the_limit() -> None:
    _, network, data = classifier(3)
    loose = run_hessian(network, Classification(), data, rtol=10.0)
    assert {e.passes for e in loose.values()} == {8}
    limited = run_hessian(network, Classification(), data, rtol=10.0, max_probes=3)
    assert {e.passes for e in limited.values()} == {3}


def test_the_hessian_without_labels_is_that_of_the_models_own() -> None:
    """A linear network has no second derivative in its weights: its Hessian is its Gauss-Newton matrix."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3)).eval()
    inputs = torch.randn(6, 4)
    network = opened(module, (inputs,))
    data = Data((inputs.double(),), None, "calib.npz")
    exact = run(network, Classification(), data)["0.weight"].mean
    found = run_hessian(network, Classification(), data, rtol=0.0, max_probes=300)["0.weight"]
    assert abs(found.mean - exact) < 4 * found.stderr


def test_a_hessian_of_a_layer_that_the_loss_ignores_is_zero() -> None:
    torch.manual_seed(0)
    network = opened(TwoOutputs().eval(), (torch.randn(2, 4),))
    data = Data((torch.randn(4, 4).double(),), None, "calib.npz")
    found = run_hessian(network, Classification(), data, rtol=1e9)
    assert (found["b.weight"].mean, found["b.weight"].stderr) == (0.0, 0.0)


def test_a_hessian_loss_that_is_not_finite_names_its_examples() -> None:
    _, network, data = classifier(3, count=40)
    data.inputs[0][37] = float("nan")
    with pytest.raises(NumericsError, match=r"the loss is nan on examples 32-39 of calib.npz"):
        run_hessian(network, Classification(), data)


def test_a_hessian_that_is_not_finite_names_its_layer() -> None:
    class Root(Pair):
        def loss(self, outputs: Any, targets: Any) -> Tensor:
            return (outputs - outputs.detach()).abs().sqrt().mean()

    _, network, data = classifier(3)
    with pytest.raises(NumericsError, match=r"the Hessian of 0.weight isn't finite on calib.npz"):
        run_hessian(network, Root(), data)

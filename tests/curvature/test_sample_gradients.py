"""Per-sample gradients against autograd, one example after the other, in float64."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import Network, named, randomise_norms

from compress.curvature import network as networks
from compress.curvature.loss_factor import Draw, cotangents
from compress.curvature.network import open_network, outputs_of
from compress.curvature.recording import Recorder, record
from compress.curvature.sample_gradients import gradient_rows, layer_rows, sample_gradients
from compress.data import Data
from compress.errors import NumericsError, UsageError
from compress.graph.trace import trace_graph
from compress.task import CausalLM, Classification, Regression, Task

CPU = torch.device("cpu")
FLOAT32_INSIDE = {"IntegerInputs", "Recurrent"}  # their traces hold a dtype
DRAW = Draw(5, range(100), 0, "data")
GROUPS = (2, 3, 5, 16)


def opened(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype = torch.float64,
    others: tuple[str, ...] = (),
) -> networks.Network:
    """The traced network, in float64 where its operators allow it."""
    network = open_network(trace_graph(module, inputs), others=others, device=CPU)
    network.module.to(dtype)
    return network


def rows_by_autograd(
    module: nn.Module, tensors: list[str], inputs: tuple[Tensor, ...], probe: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The module itself on one example at a time."""
    module = copy.deepcopy(module).to(probe[0].dtype)
    named_tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    weights = [named_tensors[name].requires_grad_(True) for name in tensors]
    rows: list[list[Tensor]] = []
    for i in range(len(inputs[0])):
        values = outputs_of(module(*(x[i : i + 1] for x in inputs)))
        total = torch.stack([(v * p[i : i + 1]).sum() for v, p in zip(values, probe, strict=True)]).sum()
        found = torch.autograd.grad(total, weights, allow_unused=True)
        rows.append([torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)])
    return {name: torch.stack(list(g)).flatten(1) for name, g in zip(tensors, zip(*rows, strict=True), strict=True)}


def compare(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    task: Task | None = None,
    *,
    reference: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
    others: tuple[str, ...] = (),
    groups: tuple[int, ...] = (1,),
) -> networks.Network:
    network = opened(module, inputs, dtype, others)
    task = Regression() if task is None else task
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    batch = Data(inputs, None, "data")
    draw = Draw(5, range(len(batch)), 0, "data")
    probe = cotangents(task, network.module(*inputs), None, draw, mode="ggn")
    expected = rows_by_autograd(reference or module, list(network.weights), inputs, probe)
    rtol, atol = (1e-10, 1e-12) if dtype is torch.float64 else (1e-4, 1e-5)
    for group in groups:
        found: dict[str, Tensor] = {}
        outputs, uses = record(network, inputs)
        layer_rows(network, task, batch, outputs, uses, draw, found.__setitem__, mode="ggn", group=group)
        assert set(found) == set(network.weights)
        for name, rows in found.items():
            sums = torch.stack([part.sum(0) for part in expected[name].split(group)])
            where = f"{name} in groups of {group}"
            assert_close(rows, sums, rtol=rtol, atol=atol, msg=lambda text, where=where: f"{where}: {text}")
    return network


def test_rows_are_the_gradients_of_single_examples(network: Network) -> None:
    if network.name == "unaffine_batch_norm":
        pytest.skip("statistics of the batch: examples have no gradients of their own")
    dtype = torch.float32 if network.name in FLOAT32_INSIDE else torch.float64
    compare(network.make(), network.inputs(3), dtype=dtype)


def test_rows_of_several_examples_are_their_sums(network: Network) -> None:
    if network.name == "unaffine_batch_norm":
        pytest.skip("statistics of the batch: examples have no gradients of their own")
    dtype = torch.float32 if network.name in FLOAT32_INSIDE else torch.float64
    compare(network.make(), network.inputs(5), dtype=dtype, groups=GROUPS)


class InPlace(nn.Module):
    """What was recorded is overwritten: a layer's output, also through a view, and a layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        y.view(-1, 2, 3).relu_()
        x += y
        return self.c(F.relu_(x))


class OutOfPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.relu(x + F.relu(self.b(x))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(torch.tanh(self.a(x))).mean((2, 3)))


class SequenceFirst(nn.Module):
    """A linear layer whose batch is its second dimension, one with the batch merged, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.query, self.out = nn.Parameter(torch.randn(1, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x.transpose(0, 1)))
        t, n, c = y.shape
        y = self.b(y.reshape(t * n, c)).view(t, n, c).mean(0)
        return self.out(torch.tanh(y * self.c(self.query)))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.stem(x))
        return self.a(y), self.b(y)


def all_parameters(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> networks.Network:
    """``compare`` on every parameter, at float32 and float64."""
    others = tuple(name for name, _ in module.named_parameters())
    compare(module, inputs, others=others, dtype=torch.float32, **options)
    return compare(module, inputs, others=others, **options)


class Scaled(nn.Module):
    """Parameters that no rule knows, one that is cast before it is used, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.scale, self.slope = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))
        self.start, self.mixed = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.prelu((self.layer(x) * self.scale).transpose(1, 2), self.slope).transpose(1, 2)
        x = torch.cat([self.start.expand(x.shape[0], -1).unsqueeze(1), y], 1)
        return self.norm(torch.matmul(x, self.mixed.t()))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 4, padding_idx=2), nn.Linear(5, 3)
        self.cell = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.embedding(x))[0])


def image_net(layer: nn.Module, channels: int, *, spatial: int = 2) -> nn.Module:
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[spatial]
    return nn.Sequential(layer, nn.Tanh(), pool(1), nn.Flatten(), nn.Linear(channels, 3)).eval()


def convolutions() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    conv1, conv2, conv3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
    return {
        "conv1d": (lambda: image_net(conv1(3, 4, 3, 2, 1), 4, spatial=1), (3, 9)),
        "conv3d": (lambda: image_net(conv3(2, 4, 2, dilation=2), 4, spatial=3), (2, 5, 5, 5)),
        "strided, dilated": (lambda: image_net(conv2(3, 4, (3, 2), (2, 1), (1, 2), (1, 2)), 4), (3, 9, 8)),
        "grouped": (lambda: image_net(conv2(4, 6, 3, groups=2), 6), (4, 7, 6)),
        "depthwise": (lambda: image_net(conv2(4, 8, 3, groups=4), 8), (4, 7, 6)),
        "same, even kernel": (lambda: image_net(conv2(3, 4, (4, 2), padding="same"), 4), (3, 7, 6)),
        "same, dilated, 1d": (lambda: image_net(conv1(3, 4, 4, padding="same", dilation=3), 4, spatial=1), (3, 11)),
        "valid": (lambda: image_net(conv2(3, 4, 3, padding="valid"), 4), (3, 7, 6)),
        "transposed": (lambda: image_net(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), 4), (3, 5, 4)),
        "transposed, grouped": (lambda: image_net(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2), 6), (4, 5, 4)),
        "transposed 1d": (lambda: image_net(nn.ConvTranspose1d(3, 4, 4, 3, output_padding=2), 4, spatial=1), (3, 5)),
        "transposed 3d": (lambda: image_net(nn.ConvTranspose3d(2, 3, 2, 2), 3, spatial=3), (2, 3, 3, 3)),
    }


@pytest.mark.parametrize("case", convolutions())
def test_every_kind_of_convolution_agrees(case: str) -> None:
    make, shape = convolutions()[case]
    torch.manual_seed(0)
    compare(make().eval(), (torch.randn(4, *shape),))


@pytest.mark.parametrize("case", convolutions())
def test_biases_of_convolutions_agree(case: str) -> None:
    make, shape = convolutions()[case]
    torch.manual_seed(0)
    network = all_parameters(make().eval(), (torch.randn(4, *shape),))
    assert not network.looped


@pytest.mark.parametrize("case", convolutions())
def test_sums_of_every_kind_of_convolution_agree(case: str) -> None:
    make, shape = convolutions()[case]
    torch.manual_seed(0)
    module = make().eval()
    compare(module, (torch.randn(19, *shape),), groups=GROUPS, others=tuple(n for n, _ in module.named_parameters()))


def folding() -> dict[str, nn.Module]:
    """Batch norms after convolutions, some of which may be folded."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y + self.norm(self.conv(self.norm(y)))

    plain, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    pointwise = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 3, 2, groups=2))
    return {
        "folded": nn.Sequential(plain, norm, nn.ReLU(), pointwise, nn.BatchNorm2d(2)),
        "read twice": Shared(),
        "one dimension": nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
        "transposed": nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
    }


@pytest.mark.parametrize("case", folding())
def test_a_batch_norm_in_the_weight_before_it_changes_no_row(case: str) -> None:
    torch.manual_seed(0)
    module = folding()[case]
    randomise_norms(module)
    inputs = (torch.randn(7, 3, 6) if case == "one dimension" else torch.randn(7, 3, 6, 6),)
    compare(module.eval(), inputs, groups=(1, 4))
    all_parameters(module.eval(), inputs)
    network = opened(module.eval(), inputs)
    folds = {"folded": 3, "read twice": 1, "one dimension": 1, "transposed": 0}
    assert len(Recorder(network).folded) == folds[case]


class Views(nn.Module):
    """Images that are cut, viewed and joined: their channels lie last, as no graph says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))[:, 1:5] + torch.relu(self.b(x))
        y = torch.cat([y[:, :2], y[:, 2:]], 1).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4)
        return self.out((y.reshape(y.shape[0], -1, 16) * x.view(x.shape[0], -1, 16).mean(1, keepdim=True)).sum(1))


def test_images_that_are_viewed_otherwise_agree() -> None:
    torch.manual_seed(0)
    compare(Views().eval(), (torch.randn(5, 3, 8, 8),), groups=(1, 2, 4))


def parameters() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    return {
        "batch norm": (lambda: image_net(nn.BatchNorm2d(4), 4), (4, 3, 2)),
        "batch norm 1d": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,)),
        "batch norm 3d": (lambda: image_net(nn.BatchNorm3d(2), 2, spatial=3), (2, 3, 2, 2)),
        "group norm": (lambda: image_net(nn.GroupNorm(2, 4), 4), (4, 3, 2)),
        "instance norm": (lambda: image_net(nn.InstanceNorm2d(4, affine=True), 4), (4, 3, 2)),
        "layer norm": (lambda: nn.Sequential(nn.LayerNorm((3, 5)), nn.Linear(5, 2)), (4, 3, 5)),
        "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (3, 5)),
        "rms norm": (lambda: nn.Sequential(nn.RMSNorm(5), nn.Linear(5, 2)), (3, 5)),
        "linear, two leading dims": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    }


@pytest.mark.parametrize("case", parameters())
def test_every_kind_of_parameter_agrees_by_a_rule(case: str) -> None:
    make, shape = parameters()[case]
    torch.manual_seed(0)
    module = make()
    randomise_norms(module)
    assert not all_parameters(module.eval(), (torch.randn(4, *shape),)).looped


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"padding_idx": -1}])
def test_embeddings_agree(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 4, **options), nn.Linear(4, 3)).eval()
    tokens = torch.tensor([[2, 2, 8, 0], [1, 1, 1, 8], [2, 2, 2, 2]])
    assert not all_parameters(module, (tokens,)).looped


def test_each_parameter_is_taken_the_best_way_that_it_allows() -> None:
    """Torch's own vectorisation for what no rule knows; a pass an example for the one that is transposed alone."""
    torch.manual_seed(0)
    network = all_parameters(Scaled().eval(), (torch.randn(4, 3, 6),))
    assert network.looped == {"mixed"}
    assert {site.tensor for sites in network.sites.values() for site in sites} == set(network.weights) - {"mixed"}


def test_a_recurrent_layer_sends_nothing_else_to_the_loop() -> None:
    torch.manual_seed(0)
    module, tokens = Recurrent().eval(), torch.randint(9, (3, 4))
    others = tuple(name for name, _ in module.named_parameters())
    network = compare(module, (tokens,), others=others, dtype=torch.float32)
    assert network.looped == {name for name in others if name.startswith("cell")}


@pytest.mark.parametrize("name", ["Gpt", "padded_residual", "TwoInputs", "TupleOutput", "DictOutput"])
def test_all_parameters_of_whole_networks_agree(name: str) -> None:
    network = named(name)
    compare(network.make(), network.inputs(3), others=tuple(n for n, _ in network.make().named_parameters()))


def test_recorded_tensors_outlive_operators_in_place() -> None:
    torch.manual_seed(0)
    module, reference = InPlace().eval(), OutOfPlace().eval()
    reference.load_state_dict(module.state_dict())
    compare(module, (torch.randn(4, 6),), reference=reference)


def test_a_weight_used_twice_sums_both_uses() -> None:
    torch.manual_seed(0)
    compare(Twice().eval(), (torch.randn(4, 3, 6, 6),))


def test_an_in_place_activation_is_recognised() -> None:
    network = opened(InPlace(), (torch.randn(3, 6),))
    assert network.is_in_place
    assert not opened(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).eval(), (torch.randn(3, 2),)
    ).is_in_place


def test_a_batch_elsewhere_is_found_or_looped_over() -> None:
    """With as many examples as time steps, a wrong dimension would go unnoticed."""
    torch.manual_seed(0)
    network = compare(SequenceFirst().eval(), (torch.randn(4, 4, 4),))
    assert network.looped == {"b.weight", "c.weight"}
    assert sorted(network.batch_dims[n] for n in network.uses if n in network.batch_dims) == [0, 1]


def test_a_weight_tied_with_an_embedding_sums_both_uses() -> None:
    network = named("Gpt")
    found = compare(network.make(), network.inputs(3), CausalLM())
    assert not found.looped


def test_dropout_and_batch_norm_are_those_of_evaluation() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))
    module(torch.randn(16, 5))
    compare(module.eval(), (torch.randn(4, 5),), Classification())


def test_one_example_and_one_weight() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2)).eval()
    network = opened(module, (torch.randn(2, 1),))
    rows = sample_gradients(network, Regression(), Data((torch.ones(1, 1).double(),), None, "data"), **settings())
    assert rows.shape == (1, 3)
    assert rows.abs().min() > 0


def test_a_network_without_layers_has_empty_rows() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    network = opened(Norm(), (torch.randn(3, 4),))
    assert sample_gradients(
        network, Regression(), Data((torch.randn(3, 4).double(),), None, "data"), **settings()
    ).shape == (3, 0)


def test_a_layer_that_the_loss_ignores_has_zero_rows() -> None:
    torch.manual_seed(0)
    network = opened(TwoOutputs(), (torch.randn(3, 6),))
    data = Data((torch.randn(3, 6).double(),), None, "data")
    rows = network.split(sample_gradients(network, Classification(), data, **settings()))
    assert not rows["b.weight"].any()
    assert rows["a.weight"].abs().sum() > 0


def settings(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"mode": "ggn", "generator": generator, "progress": lambda *_: None, **changes}


def classifier() -> tuple[networks.Network, Data]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    inputs = torch.randn(50, 4)
    network = opened(module, (inputs[:2],))
    return network, Data((inputs.double(),), torch.arange(50) % 3, "calib.npz")


@pytest.mark.parametrize("mode", ["ggn", "sampled"])
def test_rows_do_not_depend_on_batches_or_machines(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, data = classifier()
    whole = sample_gradients(network, Classification(), data, **settings(mode=mode, draws=2))
    monkeypatch.setattr("compress.curvature.sample_gradients.PASS_BATCH", 7)
    monkeypatch.setattr("compress.curvature.network.batches.__defaults__", (7,))
    again = sample_gradients(network, Classification(), data, **settings(mode=mode, draws=2))
    assert_close(whole, again, rtol=1e-12, atol=1e-15)
    tail = Data((data.inputs[0][30:],), None, "calib.npz")
    part = sample_gradients(network, Classification(), tail, **settings(mode=mode, draws=2, first=30))
    assert_close(whole[60:], part, rtol=1e-12, atol=1e-15)


def test_draws_of_an_example_follow_each_other() -> None:
    network, data = classifier()
    found = sample_gradients(network, Classification(), data, **settings(draws=3))
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(3)))

    def check(part: slice, draw: int, tensor: str, rows: Tensor) -> None:
        columns = network.split(found)[tensor].flatten(1)
        assert_close(columns.reshape(50, 3, -1)[part, draw], rows)

    options = {"numbers": range(50), "draws": range(3), "progress": lambda *_: None}
    gradient_rows(network, Classification(), data, check, mode="ggn", seed=seed, **options)


@pytest.mark.parametrize("group", [2, 3, 16, 40, 64])
@pytest.mark.parametrize("memory", [sys.maxsize, 0])
def test_rows_of_groups_are_sums_draw_by_draw(group: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, data = classifier()
    singles = sample_gradients(network, Classification(), data, **settings(draws=2)).reshape(50, 2, -1)
    expected = torch.stack([part.sum(0) for part in singles.split(group)]).flatten(0, 1)
    keep = torch.rand(network.num_weights, generator=torch.Generator().manual_seed(0)) < 0.3
    found = sample_gradients(
        network, Classification(), data, **settings(draws=2, group=group, keep=keep, memory=memory)
    )
    assert found.shape == (2 * -(-50 // group), int(keep.sum()))
    assert_close(found.narrow(1, 0, found.shape[1]), expected[:, keep], rtol=1e-10, atol=1e-12)


def test_kept_columns_are_those_of_all() -> None:
    network, data = classifier()
    keep = torch.rand(network.num_weights, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = sample_gradients(network, Classification(), data, **settings())
    assert torch.equal(sample_gradients(network, Classification(), data, **settings(keep=keep)), whole[:, keep])


def test_labels_give_the_gradients_of_each_examples_loss() -> None:
    network, data = classifier()
    rows = sample_gradients(network, Classification(), data, **settings(mode="labels"))
    weights = [w.requires_grad_(True) for w in (network.weights[layer.tensor] for layer in network.layers)]
    for i in (0, 17, 49):
        loss = F.cross_entropy(network.module(data.inputs[0][i : i + 1]), data.targets[i : i + 1])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        assert_close(rows[i], expected)


def test_the_empirical_fisher_without_labels_is_an_error() -> None:
    network, data = classifier()
    with pytest.raises(UsageError, match="the empirical Fisher needs labels, and --data has none"):
        sample_gradients(network, Classification(), Data(data.inputs, None, "x.npz"), **settings(mode="labels"))


@pytest.mark.parametrize("mode", ["ggn", "sampled", "labels"])
def test_an_output_that_is_not_finite_names_its_examples(mode: str) -> None:
    network, data = classifier()
    broken = data.inputs[0].clone()
    broken[41] = float("inf")
    with pytest.raises(NumericsError, match=r"the output isn't finite on example 41 of calib.npz"):
        sample_gradients(network, Classification(), Data((broken,), data.targets, data.name), **settings(mode=mode))


def test_a_gradient_that_is_not_finite_names_its_examples_and_layer() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    network = open_network(trace_graph(module, (torch.randn(2, 2),)), device=CPU)
    network.set_flat(torch.tensor([1e-20] * 4 + [1e3, 1e3, 0, 0]))
    inputs = torch.zeros(40, 2)
    inputs[[35, 37]] = 3e38
    with pytest.raises(NumericsError, match=r"the gradient of 0.weight isn't finite on examples 135, 137 of calib.npz"):
        sample_gradients(network, Regression(), Data((inputs,), None, "calib.npz"), **settings(first=100))


def test_a_sum_that_is_not_finite_names_its_examples() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    network = open_network(trace_graph(module, (torch.randn(2, 2),)), device=CPU)
    network.set_flat(torch.tensor([1e-20] * 4 + [1e3, 1e3, 0, 0]))
    inputs = torch.zeros(40, 2)
    inputs[37] = 3e38
    with pytest.raises(NumericsError, match=r"0.weight isn't finite on examples 132-139 of calib.npz"):
        sample_gradients(network, Regression(), Data((inputs,), None, "calib.npz"), **settings(first=100, group=16))


def test_progress_ends_at_all_examples() -> None:
    network, data = classifier()
    calls: list[tuple[str, int, int | None]] = []
    sample_gradients(network, Classification(), data, **settings(progress=lambda *call: calls.append(call)))
    assert calls[0] == ("per-sample gradients", 0, 50)
    assert calls[-1] == ("per-sample gradients", 50, 50)


def _twice(value: Tensor) -> Tensor:
    return value.view(value.shape[0], -1) * 2


def _once(value: Tensor) -> Tensor:
    return value.view(value.shape[0], -1) * 1


class Viewed(nn.Module):
    """A convolution's output as a later operator sees it that may look at strides."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.head = way, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        if self.way == "view_as":
            y = y.view_as(torch.cat([y.flatten(1)]))
        elif self.way == "unsafe view":
            y = torch.ops.aten._unsafe_view(y, (y.shape[0], 256))
        elif self.way == "alias":
            y = torch.ops.aten._reshape_alias(y, (y.shape[0], 256), (256, 1))
        else:
            y = torch.cond(y.sum() > 0, _twice, _once, (y,))
        return self.head(y)


@pytest.mark.parametrize("way", ["view_as", "unsafe view", "alias", "branches"])
def test_operators_that_look_at_strides_see_those_that_they_know(way: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 3, 8, 8)
    network = open_network(trace_graph(Viewed(way).eval(), (inputs[:2],)), device=torch.device("cpu"))
    with torch.no_grad():
        expected = network.module(inputs)
    assert_close(record(network, (inputs,))[0].detach(), expected)

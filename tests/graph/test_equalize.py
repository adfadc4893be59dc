"""Equalized channels: the same network to the bit, and the same form whatever the channels' scales were."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from zoo import Network, named

from compress.graph.equalize import Link, exponents, find_links, scaled
from compress.graph.rewrite import unlift
from compress.graph.trace import trace_graph


def links_of(module: nn.Module, *inputs: Tensor, exclude: tuple[str, ...] = ()) -> list[Link]:
    graph = trace_graph(module.eval(), inputs)
    return find_links(unlift(graph.program, graph.tied), module.state_dict().keys(), exclude)


def equalized(links: list[Link], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """What changes, and the largest factor between two channels of a link."""
    found = exponents(links, state)
    spread = max((float(torch.exp2(e.max() - e.min())) for e in found.values()), default=1.0)
    return scaled(links, state, found), spread


def with_state(module: nn.Module, changed: dict[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(module)
    made.load_state_dict({**module.state_dict(), **changed})
    return made.eval()


def rescaled(module: nn.Module, links: list[Link], seed: int, most: int = 6) -> nn.Module:
    """The same network, with a random power of two for each channel of each link."""
    generator, state = torch.Generator().manual_seed(seed), dict(module.state_dict())
    for link in links:
        factor = torch.exp2(torch.randint(-most, most + 1, (len(state[link.weight]),), generator=generator).float())
        for key in link.divided:
            state[key] = state[key] / factor.reshape(-1, *[1] * (state[key].dim() - 1))
        for key, dim in link.read_by:
            shape = [-1 if d == dim else 1 for d in range(state[key].dim())]
            state[key] = state[key] * factor.reshape(shape)
    return with_state(module, state)


def same_bits(a: nn.Module, b: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    with torch.no_grad():
        return all(torch.equal(x, y) for x, y in zip(tree_leaves(a(*inputs)), tree_leaves(b(*inputs)), strict=True))


def test_every_network_gives_the_same_bits(network: Network) -> None:
    module = network.make()
    links = links_of(module, *network.inputs(2))
    changed, _ = equalized(links, module.state_dict())
    assert same_bits(module, with_state(module, changed), network.inputs(3))
    assert same_bits(module, rescaled(module, links, 0), network.inputs(3)), "links scale what isn't homogeneous"


@pytest.mark.parametrize("name", ["plain_cnn", "padded_residual", "depthwise", "biased_conv_bn", "Conv1d"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_form_does_not_depend_on_the_scales_before(name: str, seed: int) -> None:
    network = named(name)
    module = network.make()
    links = links_of(module, *network.inputs(2))
    assert links
    other = rescaled(module, links, seed)
    wanted, spread = equalized(links, module.state_dict())
    found, wide = equalized(links, other.state_dict())
    state, again = ({**m.state_dict(), **c} for m, c in ((module, wanted), (other, found)))
    for link in links:
        for key in (*link.divided, *(key for key, _ in link.read_by)):
            ratio = (again[key] / state[key])[state[key] != 0].log2()
            # Chains of links settle within a factor of two.
            assert float(ratio.abs().max()) <= (0 if len(links) == 1 else 1)
    assert wide >= 2**8 > spread


def test_it_is_settled_after_one_run() -> None:
    network = named("depthwise")
    module = network.make()
    links = links_of(module, *network.inputs(2))
    changed, _ = equalized(links, rescaled(module, links, 3).state_dict())
    again, spread = equalized(links, {**module.state_dict(), **changed})
    assert again == {}
    assert spread == 1


def test_the_factor_is_the_power_of_two_nearest_to_the_geometric_mean() -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[16.0, 1.0], [1.0, 2.0], [0.0, 0.0]]))
        module[2].weight.copy_(torch.tensor([[1.0, 8.0, 1.0], [0.5, 1.0, 1.0]]))
    links = links_of(module, torch.randn(2, 2))
    changed, spread = equalized(links, module.state_dict())
    # sqrt(16 / 1) = 4, sqrt(2 / 8) = 1/2, and a channel of zeros stays.
    assert changed["0.weight"].tolist() == [[4.0, 0.25], [2.0, 4.0], [0.0, 0.0]]
    assert changed["2.weight"].tolist() == [[4.0, 4.0, 1.0], [2.0, 0.5, 1.0]]
    assert spread == 8


class Between(nn.Module):
    """Two layers, with something in between."""

    def __init__(self, between: nn.Module, channels: int = 4, *, twice: bool = False) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, channels, 3), between, nn.Conv2d(channels, 2, 3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.a(x))
        z: Tensor = self.b(y)
        return z + y[:, :2, 1:-1, 1:-1] if self.twice else z


@pytest.mark.parametrize(
    ("between", "linked"),
    [
        (nn.ReLU(), True),
        (nn.LeakyReLU(0.1), True),
        (nn.MaxPool2d(2), True),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout()), True),
        (nn.ZeroPad2d(1), True),
        (nn.ConstantPad2d(1, 0.5), False),
        (nn.ReLU6(), False),
        (nn.Sigmoid(), False),
        (nn.SiLU(), False),
        (nn.PReLU(4), False),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), False),
        (nn.GroupNorm(2, 4), False),
        (nn.ChannelShuffle(2), False),
    ],
)
def test_what_commutes_with_a_factor_links_layers(between: nn.Module, linked: bool) -> None:
    links = links_of(Between(between), torch.randn(2, 3, 12, 12))
    assert [link.read_by for link in links] == ([(("b.weight", 1),)] if linked else [])


def test_channels_that_something_else_reads_stay() -> None:
    assert links_of(Between(nn.ReLU(), twice=True), torch.randn(2, 3, 12, 12)) == []


def test_excluded_and_shared_weights_stay() -> None:
    x = torch.randn(2, 3, 12, 12)
    for name in ("a.weight", "b.weight"):
        assert links_of(Between(nn.ReLU()), x, exclude=(name,)) == []
    shared = Between(nn.ReLU(), channels=3)
    shared.b = shared.a
    assert links_of(shared, x) == []


class Blurred(nn.Module):
    """A kernel that isn't in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.register_buffer("blur", torch.rand(4, 1, 3, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        blurred = F.conv2d(torch.relu(self.a(x)), self.get_buffer("blur"), groups=4)
        found: Tensor = self.b(blurred)
        return found


def test_constants_beside_the_state_dict_stay() -> None:
    assert links_of(Blurred(), torch.randn(2, 3, 12, 12)) == []


class Applied(nn.Module):
    """A layer, a function, another layer."""

    def __init__(self, a: nn.Module, function: Callable[[Tensor], Tensor], b: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.function = a, b, function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(self.function(torch.relu(self.a(x))))
        return found


@pytest.mark.parametrize(
    ("a", "function", "b", "shape"),
    [
        (nn.Conv1d(3, 8, 1), lambda y: y.mean(1), nn.Linear(8, 2), (3, 8)),
        (nn.Linear(5, 8), lambda y: F.max_pool1d(y, 3, 1, 1), nn.Linear(8, 2), (5,)),
        (nn.Conv1d(3, 8, 1), lambda y: F.avg_pool2d(y, (3, 1), 1, (1, 0)), nn.Conv1d(8, 2, 1), (3, 6)),
        (nn.Conv2d(3, 8, 1), lambda y: F.pad(y, (0, 0, 0, 0, 1, -1)), nn.Conv2d(8, 2, 1), (3, 6, 6)),
        (nn.Conv2d(3, 8, 1), lambda y: F.pad(y, (0, 0, 0, 0, 4, 4)), nn.Conv2d(16, 2, 1), (3, 6, 6)),
        (nn.Conv2d(3, 8, 1), lambda y: F.max_pool3d(y, (2, 1, 1)), nn.Conv2d(4, 2, 1), (3, 6, 6)),
        (nn.Conv2d(3, 8, 1), lambda y: y.transpose(1, 2).contiguous(), nn.Conv2d(8, 2, 1), (3, 8, 8)),
        (nn.Conv2d(3, 8, 1), lambda y: y.flatten(1).reshape(-1, 8, 6, 6), nn.Conv2d(8, 2, 1), (3, 6, 6)),
    ],
)
def test_what_mixes_channels_is_no_link(
    a: nn.Module, function: Callable[[Tensor], Tensor], b: nn.Module, shape: tuple[int, ...]
) -> None:
    assert links_of(Applied(a, function, b), torch.randn(2, *shape)) == []


def test_a_mean_over_positions_links() -> None:
    network = Applied(nn.Conv2d(3, 8, 1), lambda y: y.mean((2, 3)), nn.Linear(8, 2))
    assert [link.read_by for link in links_of(network, torch.randn(2, 3, 6, 6))] == [(("b.weight", 1),)]


def test_flat_features_of_several_places_are_no_channels() -> None:
    def network(pool: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(4 * pool**2, 2))

    assert [link.read_by for link in links_of(network(1), torch.randn(2, 3, 8, 8))] == [(("3.weight", 1),)]
    assert links_of(network(2), torch.randn(2, 3, 8, 8)) == []

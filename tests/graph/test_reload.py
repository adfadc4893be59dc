"""A module with sliced tensors and patched attributes computes what the cut graph does, or runs it and says why."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_families
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from zoo import Network
from zoo_sequences import SEQUENCES
from zoo_traps import TRAPS, UNTRACEABLE

from compress.graph.cut import cut, kept_channels
from compress.graph.graph_forward import why_graph
from compress.graph.groups import Channels, find_channels
from compress.graph.reload import ReloadError, sliced
from compress.graph.sliced_attention import SlicedAttention
from compress.graph.trace import Graph, trace_graph

OTHERS = [*zoo.NETWORKS, *SEQUENCES, *(n for n in zoo_families.FAMILIES if {"timm", "transformers"} & n.traits)]
# By a graph: their code counts channels or heads, takes their mean, or halves what is cut unevenly.
LITERAL = {
    "cifar_resnet", "Res2Net", "Ghost", "SpaceToDepth", "Maxout", "TemporalShift", "SelectiveKernel", "NonLocal",
    "DiffusionBlock", "MeansOverChannels",
}  # fmt: skip


def drawn(channels: Channels, share: float = 0.5) -> Tensor:
    """A random share of the channels of each group, one of each at least."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in channels.groups:
        count = max(1, round(group.size * share))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()
    return kept_channels(channels, keep)


def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Graph, Channels]:
    graph = trace_graph(module.eval().requires_grad_(False), inputs)
    return graph, find_channels(graph)


def reloaded(module: nn.Module, *inputs: Tensor, share: float = 0.5) -> nn.Module:
    """The smaller module, after a look that it computes what the cut graph does in float32 too."""
    graph, channels = read(module, inputs)
    kept = drawn(channels, share)
    assert not kept.all()
    small = sliced(module, graph, channels, kept)
    assert_same(small, cut(channels, channels.module, kept), inputs)
    return small


def assert_same(found: nn.Module, expected: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        values = zip(tree_leaves(found(*inputs)), tree_leaves(expected(*inputs)), strict=True)
        for f, e in values:
            if isinstance(e, Tensor) and e.is_floating_point():
                assert float((f - e).abs().max()) <= 1e-4 * float(e.abs().max())


def assert_reloads(network: Network) -> str:
    """Why by a graph; empty where the class's own code computes it."""
    module, inputs = network.make(), network.inputs(2)
    graph, channels = read(module, inputs)
    kept = drawn(channels)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    small = sliced(module, graph, channels, kept)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert isinstance(small, type(module)) and list(small.state_dict()) == list(module.state_dict())
    assert_same(small, cut(channels, channels.module, kept), network.inputs(3))
    return why_graph(small)


@pytest.mark.parametrize("case", [n for n in TRAPS if UNTRACEABLE not in n.traits], ids=lambda n: n.name)
def test_the_users_class_computes_what_the_cut_graph_does(case: Network) -> None:
    assert bool(assert_reloads(case)) is (case.name in LITERAL)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda n: n.name)
def test_other_packages_classes_compute_what_the_cut_graph_does(case: Network) -> None:
    for package in ("timm", "transformers"):
        if package in case.traits:
            pytest.importorskip(package, reason="pip install '.[zoo]'", exc_type=ImportError)
    assert_reloads(case)


# -- layers of torch -------------------------------------------------------------------------------------------------


def test_layers_of_torch_say_their_new_widths() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(4, 8),
        nn.ConvTranspose2d(8, 6, 2), nn.InstanceNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    small: Any = reloaded(module, torch.randn(2, 3, 8, 8))
    conv, norm, prelu, depthwise, groups, transposed, instance, _, _, linear = small
    assert (conv.in_channels, conv.out_channels, norm.num_features, prelu.num_parameters) == (3, 4, 4, 4)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    assert (groups.num_channels, groups.num_groups) == (4, 2)
    assert (transposed.in_channels, transposed.out_channels, instance.num_features) == (4, 3, 3)
    assert (linear.in_features, linear.out_features) == (3, 5)


def test_a_residual_stream_is_one_width() -> None:
    small: Any = reloaded(zoo_families_named("Highway").make(), torch.randn(2, 3, 8, 8))
    assert {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)} == {4}


def zoo_families_named(name: str) -> Network:
    return next(network for network in zoo_families.FAMILIES if network.name == name)


def test_tied_weights_stay_tied() -> None:
    network = zoo.named("TiedEmbedding")
    small = reloaded(network.make(), *network.inputs(2))
    names = [name for name, _ in small.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(small.parameters())) + 1


def test_parametrizations_stay() -> None:
    module = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 4)),
        nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip
    small = reloaded(module, torch.randn(2, 6))
    shapes = {key: tuple(value.shape) for key, value in small.state_dict().items()}
    assert shapes["0.parametrizations.weight.original0"] == (4, 1)
    assert shapes["0.parametrizations.weight.original1"] == (4, 6)
    assert shapes["2.parametrizations.weight.0._v"] == (4,)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_no_obstacle() -> None:
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    inputs = (torch.randn(2, 6),)
    graph, channels = read(module, inputs)
    module.requires_grad_(True)(*inputs)
    assert not module[0].weight.is_leaf
    small = sliced(module, graph, channels, drawn(channels))
    assert_same(small, cut(channels, channels.module, drawn(channels)), inputs)
    assert small.state_dict()["0.weight_v"].shape == (4, 6)


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds a lock")


def test_a_module_that_can_not_be_copied_is_refused() -> None:
    with pytest.raises(ReloadError, match=r"^Sequential can't be copied \(it holds a lock\)"):
        reloaded(nn.Sequential(Uncopied(6, 8), nn.Linear(8, 3)), torch.randn(2, 6))


class Gates(nn.Module):
    """A buffer outside of the state dict, and a plain tensor, along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.offset = torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * self.scale) * self.offset)


def test_buffers_outside_of_the_state_dict_and_plain_tensors_are_sliced() -> None:
    small: Any = reloaded(Gates(), torch.randn(2, 6))
    assert (small.scale.shape, small.offset.shape) == ((4,), (4,))
    assert "scale" not in small.state_dict()


class Cached(nn.Module):
    """A table that is made once, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8))
        self.tables: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.tables:
            self.tables["table"] = self.table.exp() - 1
        return self.second(self.first(x) * self.tables["table"])


def test_tables_that_forward_keeps_are_made_again() -> None:
    module, inputs = Cached(), (torch.randn(2, 6),)
    graph, channels = read(module, inputs)
    module(*inputs)
    small: Any = sliced(module, graph, channels, drawn(channels))
    assert (module.tables.keys(), small.tables) == ({"table"}, {})
    assert_same(small, cut(channels, channels.module, drawn(channels)), inputs)


# -- the user's attributes -------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention whose heads and their width are attributes, maybe equal; another one only looks like them."""

    def __init__(self, width: int = 12, heads: int = 4, head_dim: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner, self.depth = heads, head_dim, heads * head_dim, heads
        self.scale = head_dim**-0.5
        self.qkv, self.out, self.fc = (
            nn.Linear(width, 3 * self.inner),
            nn.Linear(self.inner, width),
            nn.Linear(width, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            u.view(n, t, self.num_heads, self.head_dim).transpose(1, 2) for u in self.qkv(x).split(self.inner, -1)
        )
        y = ((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(n, t, self.inner)
        return self.fc(x + self.out(y))


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 4), (2, 8), (8, 2)])
def test_heads_or_their_width_are_found_by_what_the_module_computes(heads: int, head_dim: int) -> None:
    small: Any = reloaded(Heads(heads=heads, head_dim=head_dim), torch.randn(2, 7, 12))
    assert small.inner == heads * head_dim // 2
    assert small.num_heads * small.head_dim == small.inner
    assert small.scale == head_dim**-0.5
    assert small.depth == heads


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.heads = nn.Embedding(20, 12), Heads()

    def forward(self, ids: Tensor) -> Tensor:
        return self.heads(self.embedding(ids.view(-1, ids.shape[-1])))


def test_heads_are_found_where_every_example_is_the_same_token() -> None:
    graph, channels = read(module := Tokens(), (torch.zeros(2, 7, dtype=torch.int64),))
    kept = drawn(channels)
    ids = (torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0)),)
    assert_same(sliced(module, graph, channels, kept), cut(channels, channels.module, kept), ids)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sizes, self.out = nn.Linear(6, 16), (8, 4, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.stem(x).split(self.sizes, -1)
        return self.out(torch.cat([F.relu(a), b.sigmoid() - 0.5 * 0, c.tanh()], -1))


def test_split_sizes_in_a_tuple_follow() -> None:
    small: Any = reloaded(Parts(), torch.randn(2, 6))
    assert isinstance(small.sizes, tuple)
    assert sum(small.sizes) == small.out.in_features == 8


class Configured(nn.Module):
    """Two blocks that read their width from one configuration, nested in it, at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(mlp={"shape": [4, 3], "name": "mlp"}, layers=2)
        self.blocks = nn.ModuleList(Reshaped(self.config) for _ in range(2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x)


class Reshaped(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.up, self.down = config, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).view(-1, *self.config.mlp["shape"]).softmax(-1)
        return self.down(y.flatten(1))


def test_a_shared_configuration_is_copied_for_the_module_that_needs_another() -> None:
    module = Configured()
    graph, channels = read(module, (torch.randn(2, 6),))
    first, second = channels.groups
    kept = kept_channels(channels, {first.name: [0, 2], second.name: [0, 1, 3]})
    small: Any = sliced(module, graph, channels, kept)
    assert [block.config.mlp["shape"] for block in small.blocks] == [[2, 3], [3, 3]]
    assert small.config.mlp["shape"] == module.config.mlp["shape"] == [4, 3]
    assert small.blocks[0].config.mlp["name"] == "mlp"


class Halves(nn.Module):
    """A size that is a class's, and twice what the code needs."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).split(self.width // 2, -1)
        return self.out(a * b)


def test_a_size_that_the_code_divides_follows() -> None:
    small: Any = reloaded(Halves(), torch.randn(2, 6))
    assert (small.width, Halves.width) == (8, 16)


class Checked(nn.Module):
    """Code that checks what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.width, self.out = nn.Linear(6, 16), 16, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if y.shape[-1] != self.width:
            raise ValueError(f"{self.width} channels expected")
        return self.out(y)


def test_a_size_that_is_only_checked_follows() -> None:
    small: Any = reloaded(Checked(), torch.randn(2, 6))
    assert small.width == 8


# -- refusals --------------------------------------------------------------------------------------------------------


class Closed(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.shape, self.out = nn.Linear(6, 12), shape, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.shape(self.stem(x)).softmax(-1).flatten(1))


def closure(width: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.view(-1, width, 3)


@pytest.mark.parametrize(
    "shape", [closure(4), functools.partial(torch.reshape, shape=(-1, 4, 3))], ids=["lambda", "partial"]
)
def test_a_size_in_a_closure_takes_the_graph_and_says_why(shape: Callable[[Tensor], Tensor]) -> None:
    why = why_graph(reloaded(nn.Sequential(Closed(shape)), torch.randn(2, 6)))
    reason = r"0 \(Closed\): (view|reshape) at test_reload\.py:\d+ needs 2 where it has 4, and no attribute holds that;"
    assert re.search(reason, why) and "or write -1" in why


class Scaled(nn.Module):
    """Attention of one head, whose scale is taken from its width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None])
        return self.out(y[:, 0])


def test_a_scale_that_follows_the_width_takes_the_graph_and_says_why() -> None:
    why = why_graph(reloaded(Scaled(), torch.randn(2, 5, 6)))
    assert re.search(r"the network \(Scaled\): scaled_dot_product_attention at .*takes its scale from the width", why)
    assert "pass scale= in forward" in why


# -- a graph as forward ----------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A number of channels in its code; norms and dropouts that training switches; a constant beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.fc, self.wave = nn.Linear(8 * 16, 5), torch.linspace(0, 1, 16)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        y = F.max_pool2d(self.norm(self.conv(x)).relu(), 2).reshape(-1, 8, 16) * self.wave.to(x.device)
        y = y + torch.arange(16, device=x.device)
        return {"y": self.fc(self.dropout(y.reshape(-1, 8 * 16))) + shift}


def with_a_graph() -> tuple[Fixed, tuple[Tensor, Tensor]]:
    inputs = (torch.randn(4, 3, 8, 8), torch.randn(4, 5))
    small = reloaded(Fixed(), *inputs)
    assert isinstance(small, Fixed) and why_graph(small)
    return small, inputs


def test_a_graph_trains_as_code_does() -> None:
    small, inputs = with_a_graph()
    small.requires_grad_(True).train()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    torch.manual_seed(0)
    first, second = small(*inputs)["y"], small(*inputs)["y"]
    assert not torch.equal(first, second), "dropout drops"
    y = F.batch_norm(F.conv2d(inputs[0], small.conv.weight, small.conv.bias, padding=1), None, None, training=True)
    assert y.shape[1] == 4
    first.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in (small.conv.weight, small.norm.bias, small.fc.weight))
    assert not torch.equal(before["norm.running_var"], small.norm.running_var), "statistics move"
    small.eval()
    assert torch.equal(small(*inputs)["y"], small(*inputs)["y"])


def test_a_graph_takes_its_inputs_as_the_code_does_and_any_batch() -> None:
    small, (x, shift) = with_a_graph()
    expected = small(x, shift)["y"]
    assert torch.equal(small(shift=shift, x=x)["y"], expected)
    assert torch.allclose(small(x[:1], shift[:1])["y"], expected[:1], atol=1e-6)


def test_a_graph_follows_its_module() -> None:
    small, inputs = with_a_graph()
    copied = copy.deepcopy(small)
    with torch.no_grad():
        copied.fc.bias.add_(1.0)
    assert torch.allclose(copied(*inputs)["y"], small(*inputs)["y"] + 1, atol=1e-6)
    copied.load_state_dict(small.state_dict())
    assert torch.equal(copied(*inputs)["y"], small(*inputs)["y"])
    wide = copied.double()(*(x.double() for x in inputs))["y"]
    assert wide.dtype is torch.float64 and torch.allclose(wide.float(), small(*inputs)["y"], atol=1e-5)


def test_a_graph_runs_where_its_module_is() -> None:
    small, inputs = with_a_graph()
    far = copy.deepcopy(small).to("meta")(*(x.to("meta") for x in inputs))["y"]
    assert far.device.type == "meta" and far.shape == small(*inputs)["y"].shape


def test_a_module_with_a_graph_is_cut_again() -> None:
    small, inputs = with_a_graph()
    again: Any = reloaded(small, *inputs)
    assert isinstance(again, Fixed) and again.conv.out_channels == 2


class Unread(nn.Module):
    """Its code runs a layer whose output nothing reads, and which no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unread, self.fc = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        self.unread(y)
        return self.fc(y)


def test_a_layer_that_nothing_reads_is_no_obstacle() -> None:
    assert "unread (Linear)" in why_graph(reloaded(Unread(), torch.randn(2, 6)))


@dataclasses.dataclass(frozen=True)
class Options:
    width: int = 12


class Slots:
    __slots__ = ("width",)

    def __init__(self) -> None:
        self.width = 12


class Held(nn.Module):
    """Its width times the number of positions is what its code reshapes to."""

    def __init__(self, held: Any, read: Callable[[Any], int]) -> None:
        super().__init__()
        self.held, self.read, self.conv, self.fc = held, read, nn.Conv2d(3, 12, 3), nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(x.shape[0], self.read(self.held) * 16))


@pytest.mark.parametrize(
    ("held", "read"),
    [
        (Options(), lambda held: held.width),
        (Slots(), lambda held: held.width),
        (SimpleNamespace(width=12), lambda held: held.width),
        ({"model": {"width": 12}}, lambda held: held["model"]["width"]),
        (np.int64(12), lambda held: held),
    ],
    ids=["dataclass", "slots", "namespace", "dictionaries", "numpy"],
)
def test_a_part_of_a_size_is_found_where_configurations_hold_it(held: Any, read: Callable[[Any], int]) -> None:
    small: Any = reloaded(Held(held, read), torch.randn(2, 3, 6, 6))
    assert not why_graph(small) and small.read(small.held) == 6 and read(held) == 12


class TorchAttention(nn.Module):
    """All that torch's own attention can be given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.norm, self.out = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.inner(x)
        memory = memory[..., : self.attention.kdim]
        padding = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool)
        padding[:, -1] = True
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, _ = self.attention(x, memory, memory, key_padding_mask=padding, attn_mask=causal)
        z, _ = self.attention(x, memory, memory, need_weights=False, attn_mask=causal.float() * -3)
        return self.out(self.norm(x + y + z))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 7, "vdim": 7}],
    ids=str,
)
def test_torchs_own_attention_loses_heads_and_keeps_its_class(options: dict[str, Any]) -> None:
    module, x = TorchAttention(batch_first=True, **options), torch.randn(2, 7, 12)
    small = reloaded(module, x)
    attention: Any = small.attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.num_heads < 3
    assert dict(small.named_parameters()).keys() == dict(module.named_parameters()).keys()


def test_a_transformer_of_torchs_own_layers_is_cut_again_in_its_class() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
    x = torch.randn(2, 7, 12)
    small = reloaded(nn.TransformerEncoder(layer, 2), x)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with torch.no_grad():
        fast = small.eval()(x, src_key_padding_mask=padding)
        slow = small.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], slow[~padding])
    smaller: Any = reloaded(small.eval(), x)
    assert len(smaller.layers[0].self_attn.in_proj_weight) < len(small.layers[0].self_attn.in_proj_weight)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
def test_sliced_attention_is_torchs_where_nothing_was_cut(batch_first: bool, options: dict[str, bool]) -> None:
    whole = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options)
    other: Any = copy.deepcopy(whole)
    other.__class__, other.scale = SlicedAttention, 0.5
    for x in (torch.randn(5, 5, 12), torch.randn(5, 12)):
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:-1], dtype=torch.bool)
        padding[..., 4] = True
        for given in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            for masks in ({}, {"key_padding_mask": padding, "attn_mask": causal}):
                expected, found = (m(x, x, x, **given, **masks) for m in (whole, other))
                torch.testing.assert_close(expected, found)


def test_a_feed_forward_beside_torchs_own_attention_reloads() -> None:
    module, inputs = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), (torch.randn(2, 7, 12),)
    graph, channels = read(module, inputs)
    kept = kept_channels(channels, {"linear1.weight": list(range(0, 20, 2))})
    small: Any = sliced(module, graph, channels, kept)
    assert (small.linear1.out_features, small.linear2.in_features) == (10, 10)
    assert_same(small, cut(channels, channels.module, kept), inputs)


# -- the two modules -------------------------------------------------------------------------------------------------


def test_the_users_module_is_left_as_found() -> None:
    module = Heads()
    graph, channels = read(module, (torch.randn(2, 7, 12),))
    module.train().requires_grad_(True)
    module.register_forward_hook(lambda *_: None)
    before, state = dict(vars(module)), copy.deepcopy(module.state_dict())
    small = sliced(module, graph, channels, drawn(channels))
    assert vars(module) == before
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert small.training and all(p.requires_grad and p.dtype is torch.float32 for p in small.parameters())
    assert len(small._forward_hooks) == 1


def test_a_smaller_state_dict_loads_into_another_sliced_module() -> None:
    inputs = (torch.randn(2, 7, 12),)
    first, second = Heads(), Heads()
    small = reloaded(first, *inputs)
    other = reloaded(second, *inputs)
    other.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(small(*inputs), other(*inputs))


def test_nothing_cut_changes_nothing() -> None:
    module = Heads()
    graph, channels = read(module, (torch.randn(2, 7, 12),))
    same: Any = sliced(module, graph, channels, torch.ones(len(drawn(channels)), dtype=torch.bool))
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in module.state_dict().items())
    assert (same.num_heads, same.inner) == (4, 16)

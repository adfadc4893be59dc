"""Small networks over sequences, points, tokens and graphs that couple their channels, in the terms of zoo_traps.py.

``SEQUENCES`` lists them: recurrent and causal ones, encoders with decoders, and attention in the ways it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from zoo import TOKENS, VOCABULARY, Network, conv_bn, head
from zoo_traps import attend, mlp, registrar, split_heads

SEQUENCES: list[Network] = []
sequence = registrar(SEQUENCES)


# -- sequences of features -------------------------------------------------------------------------------------------


@sequence(num_folded=2, x=(3, 8, 16))
class ConvolutionalRecurrent(nn.Module):
    """Channels and rows are the features of a recurrent layer; its two directions' outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(3, 6, stride=2), conv_bn(6, 8, stride=(2, 1))
        self.gru, self.fc = nn.GRU(16, 7, batch_first=True, bidirectional=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        y, _ = self.gru(x.permute(0, 3, 1, 2).flatten(2))
        return self.fc(y[..., :7] + y[..., 7:])


@sequence("conv", x=(3, 2, 6, 6))
class ConvolutionalLstm(nn.Module):
    """A cell written by hand: four gates in one convolution, its output read again in the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gates, self.head = conv_bn(2, 6), nn.Conv2d(11, 20, 3, padding=1), head(5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 5, *x.shape[3:])
        for frame in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([self.stem(frame), hidden], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return self.head(hidden)


class FactorisedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(inputs, 10, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time, self.bn1 = nn.Conv3d(10, outputs, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(10)
        self.bn2, self.shortcut = nn.BatchNorm3d(outputs), nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.time(F.relu(self.bn1(self.space(x))))) + self.shortcut(x))


@sequence("conv", num_folded=4, input=(2, 4, 6, 6))
def video_resnet() -> nn.Module:
    return nn.Sequential(
        FactorisedBlock(2, 6), FactorisedBlock(6, 8), nn.AdaptiveAvgPool3d((2, 1, 1)), nn.Flatten(), nn.Linear(16, 4)
    )


class CausalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, 3, padding=2 * dilation, dilation=dilation)
        self.conv1, self.cut = parametrizations.weight_norm(conv), 2 * dilation
        self.conv2 = nn.Conv1d(outputs, outputs, 1)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)[:, :, : -self.cut]))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


@sequence("conv", input=(3, 20))
def temporal_convolutions() -> nn.Module:
    return nn.Sequential(
        CausalBlock(3, 8, 1), CausalBlock(8, 8, 2), nn.Dropout1d(0.2), CausalBlock(8, 6, 4), nn.Conv1d(6, 2, 1)
    )


@sequence("conv", x=(2, 32))
class WaveUNet(nn.Module):
    """Gated linear units over channels in the encoder and decoder; skips that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.encode1 = nn.Sequential(nn.Conv1d(2, 6, 4, 2, 1), nn.ReLU(), nn.Conv1d(6, 12, 1), nn.GLU(1))
        self.encode2 = nn.Sequential(nn.Conv1d(6, 8, 4, 2, 1), nn.ReLU(), nn.Conv1d(8, 16, 1), nn.GLU(1))
        self.decode2 = nn.Sequential(nn.Conv1d(8, 16, 3, 1, 1), nn.GLU(1), nn.ConvTranspose1d(8, 6, 4, 2, 1))
        self.decode1 = nn.Sequential(nn.Conv1d(6, 12, 3, 1, 1), nn.GLU(1), nn.ConvTranspose1d(6, 2, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.encode1(x)
        return self.decode1(F.relu(self.decode2(self.encode2(x1))) + x1)


@sequence("conv", num_folded=3, x=(3, 8, 8))
class VariationalAutoencoder(nn.Module):
    """Mean and logarithm of the variance in one layer; the decoder makes channels and pixels of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 6, stride=2), conv_bn(6, 8, stride=2), nn.Flatten(), nn.Linear(32, 12))
        self.decode, self.up = nn.Linear(6, 32), nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.bn, self.last = nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        y = F.relu(self.decode(code)).view(-1, 8, 2, 2)
        return self.last(F.relu(self.bn(self.up(y)))), mean, log_variance


@dataclass
class Detection:
    boxes: Tensor
    scores: Tensor


torch.export.register_dataclass(Detection, serialized_type_name="zoo.Detection")


@sequence("conv", num_folded=2, x=(3, 8, 8))
class Detector(nn.Module):
    """One layer makes each anchor's box, score and classes; a dataclass of the decoded parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neck, self.last = conv_bn(3, 8, stride=2), conv_bn(8, 12), nn.Conv2d(12, 3 * 8, 1)
        self.register_buffer("anchors", torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]).view(1, 3, 1, 1, 2))

    def forward(self, x: Tensor) -> Detection:
        n, _, h, w = (x := self.last(self.neck(self.stem(x)))).shape
        x = x.view(n, 3, 8, h, w).permute(0, 1, 3, 4, 2)
        sizes = x[..., 2:4].clamp(max=4).exp() * self.anchors
        boxes = torch.cat([x[..., :2].sigmoid(), sizes], -1).reshape(n, -1, 4)
        return Detection(boxes, (x[..., 4:5].sigmoid() * x[..., 5:].softmax(-1)).flatten(1, 3))


@sequence("conv", left=(3, 8, 8), right=(3, 8, 8))
class Siamese(nn.Module):
    """One encoder for two inputs, compared channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.fc = nn.Sequential(conv_bn(3, 6, stride=2), conv_bn(6, 8)), mlp(24, 10, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left).mean((2, 3)), self.encoder(right).mean((2, 3))
        return self.fc(torch.cat([a * b, (a - b).abs(), torch.max(a, b)], 1))


@sequence(num_folded=1, points=(3, 12))
class PointNet(nn.Module):
    """A global feature repeated beside each point's own, and a computed matrix that turns the points."""

    def __init__(self) -> None:
        super().__init__()
        self.turn1, self.turn2 = nn.Conv1d(3, 6, 1), nn.Linear(6, 9)
        self.conv1, self.bn1, self.conv2 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 10, 1)
        self.conv3, self.last = nn.Conv1d(18, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, points: Tensor) -> Tensor:
        turn = self.turn2(F.relu(self.turn1(points)).amax(2)).view(-1, 3, 3) + torch.eye(3)
        local = F.relu(self.bn1(self.conv1(torch.bmm(turn, points))))
        overall = self.conv2(local).amax(2, keepdim=True).repeat(1, 1, points.shape[2])
        return self.last(F.relu(self.conv3(torch.cat([local, overall], 1))))


@sequence(x=(6, 8), edges=(6, 6))
class GraphConvolution(nn.Module):
    """Features times a matrix of the input, twice, and a jump to both layers' features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 10), nn.Linear(10, 6, bias=False), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges.sigmoid() / edges.sigmoid().sum(-1, keepdim=True)
        first = F.relu(edges @ self.fc1(x))
        return self.fc3(torch.cat([first, F.relu(torch.bmm(edges, self.fc2(first)))], -1))


@sequence(TOKENS, ids=(4,))
class Recommender(nn.Module):
    """Embeddings of one width, multiplied by each other in pairs, of which a triangle is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, 6) for _ in range(4))
        self.bottom, self.top = mlp(24, 12, 6), mlp(16, 8, 1)
        self.register_buffer("pairs", torch.triu_indices(5, 5, 1))

    def forward(self, ids: Tensor) -> Tensor:
        fields = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        dense = self.bottom(torch.cat(fields, 1))
        x = torch.stack([dense, *fields], 1)
        products = torch.bmm(x, x.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], 1))


@sequence(TOKENS, "conv", ids=(12,))
class TextConvolutions(nn.Module):
    """Kernels of three sizes over embeddings, their maxima concatenated, between dropouts of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(VOCABULARY, 8), nn.Linear(12, 5)
        self.convs = nn.ModuleList(nn.Conv1d(8, 3 + i, 2 + i) for i in range(3))
        self.before, self.middle, self.after = nn.Dropout1d(0.2), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.before(self.embedding(ids)).transpose(1, 2)
        maxima = [F.selu(conv(x)).max(-1).values for conv in self.convs]
        return self.fc(F.dropout(self.after(self.middle(torch.cat(maxima, 1))), 0.5, self.training))


# -- attention -------------------------------------------------------------------------------------------------------


class HandmadeRmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """Rotary positions of ``[n, heads, t, c]``: a channel pairs with the one half a head later, or with the next."""
    angles = torch.arange(x.shape[2])[:, None] / 100 ** (torch.arange(x.shape[3] // 2) * 2 / x.shape[3])
    if is_interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        turned = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
        return torch.stack(turned, -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return x * angles.cos().repeat(1, 2) + torch.cat([-b, a], -1) * angles.sin().repeat(1, 2)


@sequence(TOKENS, ids=(7,))
class LlamaBlock(nn.Module):
    """RMS norms, rotary positions, two query heads for each key head by ``repeat_interleave``, SwiGLU, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm1, self.norm2 = nn.Embedding(VOCABULARY, 16), HandmadeRmsNorm(16), HandmadeRmsNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, w, bias=False) for w in (16, 8, 8, 16))
        self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in ((16, 20), (16, 20), (20, 16)))
        self.norm, self.output = HandmadeRmsNorm(16), nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.norm1(x)
        q, k, v = split_heads(self.q(y), 4), split_heads(self.k(y), 2), split_heads(self.v(y), 2)
        k, v = rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(*ids.shape, -1))
        y = self.norm2(x)
        return self.output(self.norm(x + self.down(F.silu(self.gate(y)) * self.up(y))))


@sequence(x=(7, 12))
class GroupedQueries(nn.Module):
    """Key heads repeated by ``expand`` and ``reshape``; queries and keys normalised in each head; rotary pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.q_norm, self.k_norm, self.fc = nn.RMSNorm(4), nn.LayerNorm(4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = rotate(self.q_norm(split_heads(self.q(x), 6)), is_interleaved=True)
        k, v = self.kv(x).view(n, t, 2, 3, 4).permute(2, 0, 3, 1, 4)
        k = rotate(self.k_norm(k), is_interleaved=True)
        k, v = (u[:, :, None].expand(-1, -1, 2, -1, -1).reshape(n, 6, t, 4) for u in (k, v))
        return self.fc(x + self.o(attend(q, k, v)))


@sequence(x=(7, 12))
class MultiQuery(nn.Module):
    """One key and value head for all queries, split off one layer by sizes; a parallel feed-forward in it too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fused, self.out = nn.LayerNorm(12), nn.Linear(12, 12 + 4 + 4 + 2 * 10), nn.Linear(22, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, up, gate = self.fused(self.norm(x)).split([12, 4, 4, 10, 10], -1)
        y = attend(split_heads(q, 3), k[:, None], v[:, None])
        return self.fc(x + self.out(torch.cat([y, up * F.gelu(gate)], -1)))


@sequence(x=(7, 12))
class BroadcastKeys(nn.Module):
    """Keys broadcast over their queries, or by an einsum over all; half a head is turned by a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.heads, self.width = 2, 6, 4
        self.q, self.kv, self.o = nn.Linear(12, 24), nn.Linear(12, 16), nn.Linear(24, 12)
        self.queries, self.keys, self.out = nn.Linear(12, 24), nn.Linear(12, 4), nn.Linear(24, 12)
        self.register_buffer("angles", torch.outer(torch.arange(16), torch.tensor([1.0, 0.3])))
        self.fc = nn.Linear(12, 5)

    def turned(self, x: Tensor) -> Tensor:
        angles = self.angles[: x.shape[-2], :1]
        a, b, rest = x.split([1, 1, 2], -1)
        c, d = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return torch.cat([torch.cat([a, b], -1) * c + torch.cat([-b, a], -1) * d, rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.groups, -1, self.width).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).view(n, t, 2, self.groups, self.width).permute(2, 0, 3, 1, 4).unsqueeze(3)
        y = (self.turned(q) @ self.turned(k).mT / 2).softmax(-1) @ v
        x = x + self.o(y.permute(0, 3, 1, 2, 4).flatten(2))
        q, k = self.queries(x).view(n, t, -1, self.width), self.turned(self.keys(x))
        weights = torch.einsum("nqhc,nkc->nhqk", q, k).softmax(-1)
        return self.fc(x + self.out(torch.einsum("nhqk,nkc->nqhc", weights, k).reshape(n, t, -1)))


@sequence(x=(7, 12))
class Retention(nn.Module):
    """Decays of each head to the power of a distance instead of a softmax; biases looked up in a table beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.qkv, self.o, self.fc = 4, nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 5)
        self.norm, self.table = nn.LayerNorm(4), nn.Parameter(torch.randn(13, 3))
        self.register_buffer("decay", (1 - 2.0 ** (-1 - torch.arange(3.0))).log())

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (u.view(n, t, -1, self.width).transpose(1, 2) for u in self.qkv(x).chunk(3, -1))
        distance = torch.arange(t)[:, None] - torch.arange(t)
        decays = torch.exp(self.decay[:, None, None] * distance).tril()
        bias = self.table.index_select(0, distance.flatten() + 6).view(t, t, -1).permute(2, 0, 1)
        y = self.norm(((q @ k.mT + bias) * decays) @ v).transpose(1, 2).flatten(2)
        return self.fc(x + self.o(y))


@sequence(x=(7, 12))
class InterleavedHeads(nn.Module):
    """Queries, keys and values side by side in each head (GPT-NeoX), in a layer over three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, c).transpose(1, 2).chunk(3, -1)
        return self.fc(x + self.proj(attend(q, k, v)))


@sequence(x=(7, 12))
class TalkingHeads(nn.Module):
    """Linear layers and a parameter over the heads, before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.before, self.after, self.fc = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x), 3) for layer in (self.q, self.k, self.v))
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(x + self.o((weights @ v).transpose(1, 2).flatten(2)))


@sequence(text=(5, 10), image=(4, 3, 3))
class CrossAttention(nn.Module):
    """Queries of one input, keys and values of another, by hand and by ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.q, self.kv, self.o = nn.Conv2d(4, 8, 1), nn.Linear(10, 6), nn.Linear(8, 12), nn.Linear(6, 10)
        self.attention = nn.MultiheadAttention(10, 2, kdim=8, vdim=8, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        memory = F.relu(self.conv(image)).flatten(2).mT
        k, v = (split_heads(u, 2) for u in self.kv(memory).chunk(2, -1))
        text = text + self.o(attend(split_heads(self.q(text), 2), k, v))
        text = text + self.attention(self.norm(text), memory, memory)[0]
        return self.fc(text.mean(1))


@sequence(x=(9, 8))
class Perceiver(nn.Module):
    """Queries that are parameters, and their outputs flattened together."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.k, self.v = nn.Parameter(torch.randn(3, 12)), nn.Linear(8, 12), nn.Linear(8, 12)
        self.o, self.norm, self.fc = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        y = attend(split_heads(latents, 3), split_heads(self.k(x), 3), split_heads(self.v(x), 3))
        return self.fc(self.norm(latents + self.o(y)).flatten(1))


@sequence(x=(8, 12))
class EinsumAttention(nn.Module):
    """Weights with an axis of heads, and every product an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(12, 3, 4) / 3) for _ in range(3))
        self.o, self.norm, self.fc = nn.Parameter(torch.randn(3, 4, 12) / 3), nn.LayerNorm(12), mlp(12, 20, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", self.norm(x), w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(2).softmax(-1)
        return self.fc(x + torch.einsum("bhqk,bhkd,hdc->bqc", weights, v, self.o))


@sequence(x=(9, 12))
class LinearAttention(nn.Module):
    """Keys times values first, with a positive feature for each channel and a sum over them below the line."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, w) for w in (9, 9, 15, 12))
        self.o, self.norm, self.fc = nn.Linear(15, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.elu(split_heads(layer(x), 3)) + 1 for layer in (self.q, self.k))
        y = q @ (k.mT @ split_heads(self.v(x), 3)) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return self.fc(self.norm(x + self.o(y.transpose(1, 2).flatten(2))))


@sequence(TOKENS, ids=(8,))
class MaskedAttention(nn.Module):
    """Padding is masked by ``masked_fill`` and ``torch.where``; the features are a mean over the tokens that remain."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(VOCABULARY, 12, padding_idx=0), nn.Linear(12, 5)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.feed = nn.LayerNorm(12), mlp(12, 24, 12)

    def forward(self, ids: Tensor) -> Tensor:
        is_padding, x = ids < 5, self.embedding(ids)
        q, k, v = (split_heads(u, 2) for u in self.qkv(x).split(12, -1))
        scores = torch.tril((q @ k.mT) / 6**0.5).masked_fill(is_padding[:, None, None], -1e9)
        x = self.norm(x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = torch.where(is_padding[..., None], torch.zeros(()), x + self.feed(x))
        return self.fc(x.sum(1) / (~is_padding).sum(1, keepdim=True).clamp(min=1))


@sequence(src=(5, 12), tgt=(4, 12))
def sequence_to_sequence() -> nn.Module:
    """torch's own encoder and decoder, norms after the sums."""
    return nn.Transformer(12, 3, 1, 1, 20, batch_first=True)


@sequence("conv", x=(3, 8, 8))
class MlpMixer(nn.Module):
    """Layers over tokens and over channels in turn: which axis counts depends on a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.tokens, self.channels = nn.Conv2d(3, 12, 2, 2), mlp(16, 10, 16), mlp(12, 24, 12)
        self.norm1, self.norm2, self.fc = nn.LayerNorm(12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.fc((x + self.channels(self.norm2(x))).mean(1))


@sequence("conv", x=(9, 12))
class SpatialGating(nn.Module):
    """gMLP: half of the channels, mixed over tokens, gates the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 32), nn.Linear(16, 12)
        self.inner, self.spatial, self.fc = nn.LayerNorm(16), nn.Conv1d(9, 9, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        return self.fc((x + self.down(u * self.spatial(self.inner(v)))).mean(1))


class ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(width, width, 5, padding=2, groups=width), nn.LayerNorm(width)
        self.mlp, self.scale = mlp(width, 3 * width, width), nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * self.mlp(self.norm(self.depth(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


@sequence("conv", input=(3, 8, 8))
def convnext_stages() -> nn.Module:
    """Channels last inside a block, with a scale that starts near zero; a norm and a convolution between stages."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), ConvNextBlock(8), nn.GroupNorm(1, 8), nn.Conv2d(8, 12, 2, 2), ConvNextBlock(12), head(12)
    )


@sequence(x=(3, 8, 8))
class ShiftedWindows(nn.Module):
    """Attention in windows of a rolled map, with a bias for each head and offset; patches merged four to one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm1, self.norm2 = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.LayerNorm(32)
        self.qkv, self.proj, self.merge, self.fc = (nn.Linear(*w) for w in ((8, 24), (8, 8), (32, 12), (12, 5)))
        self.table = nn.Parameter(0.1 * torch.randn(49, 2))
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None] + 3
        self.register_buffer("offsets", offset[0] * 7 + offset[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(self.norm1(x), (-2, -2), (1, 2))
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2 + self.table[self.offsets].permute(2, 0, 1)).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, i::2, j::2] for j in range(2) for i in range(2)], -1)
        return self.fc(self.merge(self.norm2(x)).mean((1, 2)))


@sequence(x=(9, 8))
class SoftExperts(nn.Module):
    """Experts of different widths, and experts in one parameter, weighted by a softmax of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(mlp(8, 6 + 2 * i, 8) for i in range(3)), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 10) / 3), nn.Parameter(torch.randn(3, 10, 8) / 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        x = x + sum(w.unsqueeze(-1) * e(x) for w, e in zip(weights.unbind(-1), self.experts, strict=True))
        y = F.relu(torch.einsum("ntc,ecd->nted", x, self.up))
        y = torch.einsum("nted,edc->ntec", y, self.down)
        return self.fc(x + torch.einsum("ntec,nte->ntc", y, weights))


@sequence(TOKENS, "conv", ids=(10,))
class GatedConvolution(nn.Module):
    """A state-space block: one layer for three parts, a causal depthwise convolution, a decaying sum; tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.inner = nn.Embedding(VOCABULARY, 8), HandmadeRmsNorm(8), nn.Linear(8, 36)
        self.conv, self.outer = nn.Conv1d(12, 12, 3, padding=2, groups=12), nn.Linear(12, 8, bias=False)
        self.decay, self.skip = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))
        self.output = nn.Linear(8, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y, step, gate = self.inner(self.norm(x)).chunk(3, -1)
        y = F.silu(self.conv(y.mT)[..., :-2].mT)
        state, states = torch.zeros_like(y[:, 0]), []
        for t in range(ids.shape[1]):
            state = state * torch.exp(-F.softplus(step[:, t]) * self.decay.exp()) + y[:, t]
            states.append(state)
        y = torch.stack(states, 1) + y * self.skip
        return self.output(x + self.outer(y * F.silu(gate)))

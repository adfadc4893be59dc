"""Small networks with random weights, one for each thing that real networks do.

``NETWORKS`` lists them; ``network.make()`` gives the module in evaluation mode, its normalisation statistics and
factors randomised, and ``network.inputs(n)`` examples for it. Everything follows from the network's name: two calls
agree.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

VOCABULARY = 23
TOKENS = "tokens"


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        shapes: Of one example of each input, by the name of forward's argument.
        traits: ``tokens`` (integer inputs), ``conv`` (every multiplication is a convolution or linear layer).
        num_folded: Batch norms that fold into the layer before them.
    """

    name: str
    factory: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    traits: frozenset[str] = field(default=frozenset())
    num_folded: int = 0

    def make(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            module = self.factory()
            randomise_norms(module)
        return module.eval().requires_grad_(False)

    def inputs(self, count: int) -> tuple[Tensor, ...]:
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)
        if TOKENS in self.traits:
            return tuple(torch.randint(VOCABULARY, (count, *s), generator=generator) for s in self.shapes.values())
        return tuple(torch.randn((count, *s), generator=generator) for s in self.shapes.values())


def randomise_norms(module: nn.Module) -> None:
    """Statistics and factors as training would leave them, some gammas negative."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)
    for layer in module.modules():
        if isinstance(layer, kinds):
            if layer.weight is not None:
                sign = torch.where(torch.rand_like(layer.weight) < 0.2, -1.0, 1.0)
                layer.weight.data = sign * (0.5 + torch.rand_like(layer.weight))
                if layer.bias is not None:
                    layer.bias.data = 0.3 * torch.randn_like(layer.bias)
            if getattr(layer, "running_mean", None) is not None:
                layer.running_mean.data = 0.3 * torch.randn_like(layer.running_mean)
                layer.running_var.data = 0.3 + torch.rand_like(layer.running_var)


NETWORKS: list[Network] = []


def network(*traits: str, num_folded: int = 0, **shapes: tuple[int, ...]) -> Callable[[Any], Any]:
    """Register a factory (a function or a module class without arguments) under its name."""

    def register(factory: Any) -> Any:
        NETWORKS.append(Network(factory.__name__, factory, shapes, frozenset(traits), num_folded))
        return factory

    return register


def named(name: str) -> Network:
    return next(n for n in NETWORKS if n.name == name)


def two_convolutions() -> nn.Module:
    """A convolution with a batch norm and one that reads it, for images [n, 3, 4, 4]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
    )


def conv_bn(inputs: int, outputs: int, kernel: int = 3, *, relu: bool = True, **options: Any) -> nn.Sequential:
    options = {"padding": kernel // 2, "bias": False, **options}
    layers = [nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# -- convolutions ----------------------------------------------------------------------------------------------------


@network("conv", num_folded=2, input=(3, 8, 8))
def plain_cnn() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), conv_bn(8, 12, stride=2), head(12))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.pad = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


@network("conv", num_folded=5, input=(3, 8, 8))
def padded_residual() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), Residual(8, 8), Residual(8, 16), head(16))


@network("conv", num_folded=3, input=(3, 8, 8))
def depthwise() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), conv_bn(8, 8, groups=8), conv_bn(8, 12, 1), head(12))


@network("conv", num_folded=2, input=(4, 8, 8))
def grouped() -> nn.Module:
    return nn.Sequential(conv_bn(4, 8, groups=2), conv_bn(8, 12, groups=4), head(12))


@network("conv", num_folded=2, input=(3, 9, 7))
def same_padding() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, 3, padding="same"), conv_bn(8, 8, 4, padding="same", dilation=2), nn.Flatten(), nn.Linear(504, 5)
    )


@network("conv", num_folded=2, input=(3, 12, 12))
def dilated() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8, dilation=2), conv_bn(8, 8, dilation=3, padding=3, stride=2), head(8))


@network("conv", num_folded=1, input=(3, 8, 8))
def reflected_padding() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, padding_mode="reflect"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), head(8)
    )


@network("conv", num_folded=2, x=(3, 32))
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 8, 3, groups=2), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean(2))


@network("conv", num_folded=1, input=(2, 6, 6, 6))
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(162, 4)
    )


@network("conv", num_folded=1, input=(4, 9))
def transposed_1d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(4, 6, 4, 2, 1), nn.BatchNorm1d(6), nn.ReLU(),
        nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), nn.BatchNorm1d(4),
    )  # fmt: skip


@network("conv", num_folded=1, input=(4, 5, 5))
def transposed_2d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip


@network("conv", num_folded=1, input=(4, 3, 3, 3))
def transposed_3d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose3d(4, 6, 2, 2), nn.BatchNorm3d(6), nn.ReLU(),
        nn.ConvTranspose3d(6, 4, 3, groups=2), nn.BatchNorm3d(4),
    )  # fmt: skip


@network("conv", num_folded=2, input=(3, 8, 8))
def biased_conv_bn() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8, bias=True), conv_bn(8, 8, bias=True, relu=False), head(8))


@network("conv", num_folded=1, x=(6, 8, 8))
class PreActivation(nn.Module):
    """Batch norm before a convolution, and after one whose output is used twice: neither folds."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        z = self.conv2(F.relu(self.bn2(y)))
        return self.head(y + self.bn3(z))


@network("conv", x=(4, 8, 8))
class SharedConvolution(nn.Module):
    """One convolution called twice, a batch norm after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        return self.head(F.relu(self.bn2(self.conv(x))))


@network("conv", num_folded=1, x=(4, 8, 8))
class TiedConvolutions(nn.Module):
    """Two modules with one weight, one with a batch norm of its own: folding it would change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.third, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.bn1(self.first(x)))))
        return self.head(self.bn3(self.third(x)))


@network("conv", num_folded=2, input=(3, 8, 8))
def double_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.ReLU(), head(8))


@network("conv", num_folded=1, input=(3, 8, 8))
def unaffine_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), head(8),
    )  # fmt: skip


@network("conv", num_folded=2, input=(3, 8, 8))
def spatial_flatten() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 12), nn.ReLU(),
        nn.Linear(12, 5),
    )  # fmt: skip


@network("conv", num_folded=1, input=(4, 8, 8))
def zero_channels() -> nn.Module:
    module = nn.Sequential(conv_bn(4, 8), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), head(8))
    for layer in (module[0][0], module[1]):
        layer.weight.data[:3] = 0
    module[3][2].weight.data[1] = 0
    return module


@network("conv", num_folded=1, input=(4, 8, 8))
def tiny_channels() -> nn.Module:
    """Weights so small beside the bias that an int32 bias would overflow."""
    module = nn.Sequential(conv_bn(4, 8, bias=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), head(8))
    module[0][0].weight.data[:2] *= 1e-12
    module[1].weight.data[:2] *= 1e-20
    module[1].weight.data[2] *= 1e-39  # denormal
    return module


# -- blocks ----------------------------------------------------------------------------------------------------------


@network("conv", num_folded=3, x=(3, 8, 8))
class SqueezeExcite(nn.Module):
    """An inverted residual as in MobileNetV3: depthwise, squeeze-excite with hard sigmoid, hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Hardswish())
        self.depth = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.reduce, self.restore = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = conv_bn(16, 8, 1, relu=False)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        y = y * F.hardsigmoid(self.restore(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return self.head(x + self.project(y))


@network("conv", num_folded=4, x=(3, 8, 8))
class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.expand = nn.Sequential(conv_bn(8, 16, 1, relu=False), nn.ReLU6())
        self.depth = nn.Sequential(conv_bn(16, 16, groups=16, relu=False), nn.ReLU6())
        self.project = conv_bn(16, 8, 1, relu=False)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.depth(self.expand(x))))


@network("conv", num_folded=1, x=(3, 8, 8))
class Dense(nn.Module):
    """DenseNet's concatenations, with batch norms that can't fold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(16), head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return self.head(F.relu(self.bn3(x)))


@network("conv", num_folded=4, x=(3, 8, 8))
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 4, 1), nn.Sequential(conv_bn(3, 4, 1), conv_bn(4, 6))
        self.c = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(3, 2, 1))
        self.d = nn.MaxPool2d(3, 1, 1)
        self.head = head(15)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1))


@network("conv", num_folded=2, x=(3, 8, 8))
class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(4, 4), nn.Conv2d(2, 3, 1)
        self.head = head(9)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.stem(x).chunk(2, 1)
        first, second = high.split([2, 2], 1)
        return self.head(torch.cat([self.a(low), self.b(first), second], 1))


@network("conv", num_folded=2, x=(3, 8, 8))
class ChannelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 8), conv_bn(8, 8, groups=2)
        self.shuffle, self.last = nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.conv(self.stem(x))).shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(self.shuffle(x)))


@network("conv", num_folded=1, input=(3, 6, 6))
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        nn.PixelUnshuffle(2), conv_bn(12, 16), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(3, 3, 1)
    )


@network("conv", num_folded=4, x=(3, 8, 8))
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = conv_bn(3, 8), conv_bn(8, 16)
        self.up, self.middle = conv_bn(24, 8), conv_bn(8, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        low = self.bottom(F.max_pool2d(skip, 2))
        y = self.up(torch.cat([F.interpolate(low, scale_factor=2), skip], 1))
        y = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(self.middle(y))


@network("conv", num_folded=2, input=(3, 12, 12))
def pooling() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.AvgPool2d(2),
        conv_bn(8, 6), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


@network("conv", input=(3, 8, 8))
def group_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True), nn.PReLU(8), nn.Conv2d(8, 4, 1), nn.LayerNorm([4, 8, 8]), head(4),
    )  # fmt: skip


@network("conv", num_folded=3, input=(3, 8, 8))
def smooth_activations() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, relu=False), nn.SiLU(), conv_bn(8, 8, relu=False), nn.GELU(), conv_bn(8, 8, relu=False),
        nn.ELU(), nn.Conv2d(8, 8, 1), nn.Mish(), nn.Conv2d(8, 8, 1), nn.Softplus(), nn.Conv2d(8, 8, 1), nn.Tanh(),
    head(8), )  # fmt: skip


@network("conv", num_folded=2, input=(3, 8, 8))
def inplace_activations() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.SiLU(inplace=True), nn.Dropout2d(), nn.Hardtanh(-2, 2, inplace=True), head(8),
    )  # fmt: skip


@network("conv", num_folded=1, x=(3, 8, 8))
class InplaceResidual(nn.Module):
    """``+=`` on a tensor that a branch has read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        y += x
        y.mul_(0.5).clamp_(min=-1.0)
        return self.head(y)


@network("conv", num_folded=1, x=(3, 8, 8))
class Concatenated(nn.Module):
    """A tensor with several readers, among them the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        z = torch.softmax(self.conv(y), 1)
        return y, torch.cat([z, y], 1)


# -- matrix products -------------------------------------------------------------------------------------------------


@network("conv", num_folded=2, input=(20,))
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(),
        nn.Linear(12, 4),
    )  # fmt: skip


@network("conv", x=(6, 10))
class SequenceBatchNorm(nn.Module):
    """Batch norm over time steps after a linear layer on [n, t, c]: it doesn't fold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.bn(self.fc1(x)))).mean(1)


@network(TOKENS, ids=(9,))
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12)
        self.output = nn.Linear(12, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(F.gelu(self.hidden(self.embedding(ids))))


@network(x=(7, 12))
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(12, 3, batch_first=True), nn.LayerNorm(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


@network(src=(7, 12))
def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@network(x=(3, 8, 8))
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm1, self.norm2 = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12), nn.LayerNorm(12)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc1, self.fc2, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


@network(TOKENS, ids=(9,))
class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 12), nn.Embedding(16, 12)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.output = nn.Linear(12, VOCABULARY, bias=False)
        self.output.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        n, t, c = x.shape
        q, k, v = (u.view(n, t, 3, 4).transpose(1, 2) for u in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c))
        return self.output(x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


@network(x=(6, 8))
class Recurrent(nn.Module):
    """Linear layers around an LSTM and a GRU, whose weights are blockers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm = nn.Linear(8, 10), nn.LSTM(10, 6, batch_first=True)
        self.gru, self.fc = nn.GRU(6, 5, batch_first=True, bidirectional=True), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(F.relu(self.inner(x)))
        return self.fc(self.gru(y)[0][:, -1])


@network("conv", num_folded=1, left=(3, 8, 8), right=(5,))
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = conv_bn(3, 8, bias=True), nn.Linear(5, 8), nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(left).mean((2, 3)), F.relu(self.fc(right))], 1))


@network("conv", num_folded=1, x=(3, 8, 8))
class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x).mean((2, 3))
        return {"logits": self.a(y), "aux": self.b(y)}


@network("conv", num_folded=1, x=(3, 8, 8))
class TupleOutput(DictOutput):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x).mean((2, 3))
        return self.a(y), [self.b(y), y]


@dataclass
class Prediction:
    logits: Tensor
    hidden: Tensor


torch.export.register_dataclass(Prediction, serialized_type_name="zoo.Prediction")


@network("conv", num_folded=1, x=(3, 8, 8))
class DataclassOutput(DictOutput):
    def forward(self, x: Tensor) -> Any:
        y = self.stem(x).mean((2, 3))
        return Prediction(self.a(y), y)


@network(x=(7, 10))
class RawParameters(nn.Module):
    """Weights used in matmul and einsum, which are blockers, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.randn(10, 8) / 3), nn.Parameter(torch.randn(2, 8, 5) / 3)
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x @ self.weight)
        return self.fc(torch.einsum("ntc,hcd->nthd", y, self.kernel).flatten(2)).mean(1)


@network("conv", num_folded=1, input=(3, 8, 8))
def weight_norm() -> nn.Module:
    """A weight that is computed in forward: a blocker."""
    return nn.Sequential(
        conv_bn(3, 8), parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), head(8),
    )  # fmt: skip


@network("conv", x=(4, 8, 8))
class FunctionalWeights(nn.Module):
    """A linear layer whose weight is transposed or scaled in forward, and one with a weight from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.register_buffer("projection", torch.randn(5, 6))
        self.last = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.conv.weight * 0.5, self.conv.bias)).mean((2, 3))
        return F.linear(F.relu(F.linear(y, self.projection)), self.last.t())


@network(TOKENS, "conv", ids=(9,))
class IntegerInputs(nn.Module):
    """Integers that are turned into floats in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(9, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(ids.float() / VOCABULARY)))

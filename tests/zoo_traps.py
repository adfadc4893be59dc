"""Small networks whose channels can't be pruned one layer at a time: each couples, reorders or counts them in its way.

``TRAPS`` lists them, in the terms of zoo.py; those without ``conv`` in their traits multiply activations by something
else than a layer's weight. ``untraceable``: forward branches on a value, so that torch.export refuses it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Network, conv_bn, head

UNTRACEABLE = "untraceable"


class Family(Network):
    """A network whose batch norms have the statistics of its inputs, so that a deep one still depends on its input.

    The same bits in every process with one thread, as conftest.py sets; with more, sums differ in their last digit.
    """

    def make(self) -> nn.Module:
        module = super().make()
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        norms = [m for m in module.modules() if isinstance(m, kinds) and m.running_mean is not None]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        if norms:
            with torch.no_grad():
                module(*self.inputs(8))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            norm.running_var.clamp_(min=0.01)  # of a channel that is dead
        return module


def randomise_constants(module: nn.Module) -> nn.Module:
    """Parameters as training leaves them: none that is one number (gammas, layer scales, gates, zero biases), and no
    weight so small that the input is lost.
    """
    for parameter in module.parameters():
        value = parameter.data.flatten()[0].item()
        if (parameter == value).all():
            if value == 0:
                parameter.data = 0.3 * torch.randn_like(parameter)
            else:  # A layer scale starts near zero, to grow.
                sign = torch.where(torch.rand_like(parameter) < 0.2, -1.0, 1.0)
                parameter.data = sign * (0.5 + torch.rand_like(parameter)) * (value if abs(value) > 0.1 else 1.0)
        elif parameter.dim() > 1:
            gain = parameter.data.std().item() * math.sqrt(parameter.numel() / parameter.shape[0])
            if gain < 0.3:
                parameter.data = parameter.data / gain
    return module


def registrar(networks: list[Network]) -> Callable[..., Callable[[Any], Any]]:
    """As ``zoo.network``, but into ``networks``, and with constant parameters randomised."""

    def network(*traits: str, num_folded: int = 0, **shapes: tuple[int, ...]) -> Callable[[Any], Any]:
        def register(factory: Any) -> Any:
            def make() -> nn.Module:
                return randomise_constants(factory())

            networks.append(Family(factory.__name__, make, shapes, frozenset(traits), num_folded))
            return factory

        return register

    return network


TRAPS: list[Network] = []
trap = registrar(TRAPS)


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of ``[n, heads, t, c]``, the heads joined again."""
    return (F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# -- residual networks -----------------------------------------------------------------------------------------------


class BottleneckBlock(nn.Module):
    """Three convolutions around which a shortcut runs; the last gamma starts at zero."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.reduce, self.conv = conv_bn(inputs, width, 1), conv_bn(width, width, stride=stride, groups=groups)
        self.expand = conv_bn(width, outputs, 1, relu=False)
        nn.init.zeros_(self.expand[1].weight)
        has_shortcut = stride > 1 or inputs != outputs
        self.shortcut = conv_bn(inputs, outputs, 1, stride=stride, relu=False) if has_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(self.conv(self.reduce(x))) + self.shortcut(x))


@trap("conv", num_folded=12, input=(3, 8, 8))
def bottlenecks() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), BottleneckBlock(8, 4, 16), BottleneckBlock(16, 4, 16), BottleneckBlock(16, 8, 24, 2), head(24)
    )


@trap("conv", num_folded=9, input=(3, 8, 8))
def resnext() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), BottleneckBlock(8, 8, 16, 1, 4), BottleneckBlock(16, 8, 16, 2, 2), head(16))


class PaddedBlock(nn.Module):
    """A shortcut without weights: every second pixel, zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, stride=stride), conv_bn(outputs, outputs, relu=False)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)))


@trap("conv", num_folded=13, input=(3, 12, 12))
def cifar_resnet() -> nn.Module:
    """Three stages, each width's channels inside those of the next."""
    widths = [(6, 6, 1), (6, 6, 1), (6, 12, 2), (12, 12, 1), (12, 24, 2), (24, 24, 1)]
    return nn.Sequential(conv_bn(3, 6), *(PaddedBlock(*w) for w in widths), head(24))


@trap("conv", num_folded=2, x=(3, 8, 8))
class RepVggBlock(nn.Module):
    """Three branches into one sum, the third a lone batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.large = nn.Conv2d(3, 8, 3, padding=1), conv_bn(8, 8, relu=False)
        self.small, self.identity, self.head = conv_bn(8, 8, 1, relu=False), nn.BatchNorm2d(8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.large(x) + self.small(x) + self.identity(x)))


@trap("conv", num_folded=5, x=(3, 8, 8))
class Res2Net(nn.Module):
    """Channels in four parts, each convolved with the sum of its own and the result before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 16), conv_bn(16, 16, 1, relu=False), head(16)
        self.convs = nn.ModuleList(conv_bn(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = list(x.split(4, 1))
        for i, conv in enumerate(self.convs):
            parts[i + 1] = conv(parts[i + 1] + parts[i] if i else parts[i + 1])
        return self.head(F.relu(self.last(torch.cat(parts, 1)) + x))


@trap("conv", num_folded=2, x=(3, 8, 8))
class Highway(nn.Module):
    """A gate mixes a layer's output with its input: three tensors of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.value, self.gate = conv_bn(3, 8), conv_bn(8, 8), nn.Conv2d(8, 8, 1)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.gate(x).sigmoid()
        return self.head(gate * self.value(x) + (1 - gate) * x)


@trap("conv", num_folded=4, x=(3, 8, 8))
class HighResolution(nn.Module):
    """HRNet's exchange: each resolution is the sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = conv_bn(3, 6), conv_bn(3, 10, stride=2)
        self.up, self.down = conv_bn(10, 6, 1, relu=False), conv_bn(6, 10, stride=2, relu=False)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.high(x), self.low(x)
        up = F.interpolate(self.up(low), size=high.shape[2:], mode="nearest")
        high, low = F.relu(high + up), F.relu(low + self.down(high))
        return self.last(torch.cat([high, F.interpolate(low, scale_factor=2.0, mode="bilinear")], 1))


# -- grouped and mobile ----------------------------------------------------------------------------------------------


@trap("conv", num_folded=3, input=(3, 8, 8))
def depth_multiplier() -> nn.Module:
    """A depthwise convolution with two outputs an input, and one with three."""
    return nn.Sequential(
        conv_bn(3, 6), conv_bn(6, 12, groups=6), conv_bn(12, 8, 1), nn.Conv2d(8, 24, 3, groups=8), nn.ReLU6(), head(24)
    )


class MBConv(nn.Module):
    """EfficientNet's block: expansion, depthwise, squeeze-excite of linear layers, stochastic depth."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = inputs * 3
        self.expand = conv_bn(inputs, width, 1, relu=False)
        self.depth = conv_bn(width, width, 5, stride=stride, groups=width, relu=False)
        self.squeeze, self.excite = nn.Linear(width, inputs // 2), nn.Linear(inputs // 2, width)
        self.project, self.is_residual = conv_bn(width, outputs, 1, relu=False), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.depth(F.silu(self.expand(x))))
        n, c = y.shape[:2]
        y = self.project(y * self.excite(F.silu(self.squeeze(y.mean((2, 3))))).sigmoid().view(n, c, 1, 1))
        if not self.is_residual:
            return y
        if self.training:
            y = y * (torch.rand(n, 1, 1, 1) < 0.8) / 0.8
        return x + y


@trap("conv", num_folded=11, input=(3, 8, 8))
def mobile_blocks() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), MBConv(8, 8, 1), MBConv(8, 12, 2), MBConv(12, 12, 1), conv_bn(12, 24, 1), head(24)
    )


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, width = outputs // 2, inputs if stride > 1 else inputs // 2
        depth = conv_bn(half, half, stride=stride, groups=half, relu=False)
        self.main = nn.Sequential(conv_bn(width, half, 1), depth, conv_bn(half, half, 1))
        side = [conv_bn(inputs, inputs, stride=stride, groups=inputs, relu=False), conv_bn(inputs, half, 1)]
        self.side = nn.Sequential(*side) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.side is None:
            left, right = x.chunk(2, 1)
            return shuffle(torch.cat([left, self.main(right)], 1), 2)
        return shuffle(torch.cat([self.side(x), self.main(x)], 1), 2)


@trap("conv", num_folded=13, input=(3, 8, 8))
def shufflenet_v2() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), ShuffleUnit(16, 16, 1), conv_bn(16, 20, 1),
        head(20),
    )  # fmt: skip


@trap("conv", num_folded=3, x=(3, 8, 8))
class Ghost(nn.Module):
    """Cheap depthwise copies of the channels beside them, then the first few of all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.primary, self.cheap = conv_bn(3, 6), conv_bn(6, 7, 1), conv_bn(7, 7, groups=7)
        self.head = head(11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(self.stem(x))
        return self.head(torch.cat([y, self.cheap(y)], 1)[:, :11])


# -- concatenations --------------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.bn1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.bn2(y)))


@trap("conv", num_folded=5, x=(3, 8, 8))
class DenseNet(nn.Module):
    """Two dense blocks with a transition: every layer reads a concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
        self.second = nn.ModuleList(DenseLayer(10 + 4 * i, 4) for i in range(2))
        self.norm, self.fc = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.first:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.second:
            features.append(layer(features))
        return self.fc(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class InceptionBlock(nn.Module):
    def __init__(self, inputs: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.branches = nn.ModuleList([
            conv_bn(inputs, a, 1), nn.Sequential(conv_bn(inputs, 3, 1), conv_bn(3, b)),
            nn.Sequential(conv_bn(inputs, 3, 1), nn.Conv2d(3, c, (1, 3), padding=(0, 1)), nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, d, 1)),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


@trap("conv", num_folded=10, x=(3, 8, 8))
class GoogLeNet(nn.Module):
    """Concatenations read by concatenations, and a second classifier in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = InceptionBlock(3, (4, 5, 3, 2)), InceptionBlock(14, (6, 4, 4, 2))
        self.head, self.auxiliary = head(16), head(14)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return self.head(self.second(F.max_pool2d(x, 2))), self.auxiliary(x)


@trap("conv", num_folded=5, x=(3, 10, 10))
class CroppedUNet(nn.Module):
    """Skips that are cropped and concatenated, with transposed convolutions, and one that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 6, padding=0), conv_bn(6, 8), conv_bn(8, 12)
        self.up2, self.up1 = nn.ConvTranspose2d(12, 8, 2, 2), nn.ConvTranspose2d(8, 6, 2, 2)
        self.merge2, self.merge1, self.last = conv_bn(16, 8, padding=0), conv_bn(6, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down1(x)
        x2 = self.down2(F.max_pool2d(x1, 2))
        y = self.up2(self.bottom(F.max_pool2d(x2, 2)))
        y = self.up1(self.merge2(torch.cat([x2, y], 1)))
        return self.last(self.merge1(y + x1[:, :, 2:6, 2:6]))


@trap("conv", num_folded=3, x=(3, 8, 8))
class FeaturePyramid(nn.Module):
    """Levels joined from the top down; one head for all; a dict of its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3, 6), conv_bn(6, 10, stride=2), conv_bn(10, 14, stride=2)])
        self.laterals = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (6, 10, 14))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        levels = []
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        towers = [self.tower(smooth(level)) for smooth, level in zip(self.smooth, levels, strict=True)]
        boxes = [self.boxes(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 4) for t in towers]
        return {"classes": [self.classes(t) for t in towers], "boxes": torch.cat(boxes, 1)}


@trap("conv", num_folded=2, x=(3, 8, 8))
class Coordinates(nn.Module):
    """Two channels of coordinates beside the computed ones, and the network's input beside them again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv_bn(3, 6), conv_bn(8, 6), head(9)
        line = torch.linspace(-1, 1, 8)
        self.register_buffer("grid", torch.stack(torch.meshgrid(line, line, indexing="ij")))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.grid.expand(x.shape[0], -1, -1, -1), self.stem(x)], 1)
        return self.head(torch.cat([self.conv(y), x], 1))


# -- channels moved --------------------------------------------------------------------------------------------------


@trap("conv", num_folded=2, x=(3, 8, 8))
class SpaceToDepth(nn.Module):
    """Pixels to channels and back by views, as YOLO's reorganisation and ESPCN's output do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = conv_bn(3, 6), conv_bn(24, 16), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.stem(x)).shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        y = self.middle(x)
        y = y.view(n, 2, 2, 4, h // 2, w // 2).permute(0, 3, 4, 1, 5, 2).reshape(n, 4, h, w)
        return self.last(y)


@trap("conv", num_folded=2, x=(3, 8, 8))
class PermutedFlatten(nn.Module):
    """The channel is the last and fastest of the flattened features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 8, stride=2), conv_bn(8, 6, stride=2)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.conv(self.stem(x)).permute(0, 2, 3, 1).flatten(1))))


@trap("conv", num_folded=2, x=(3, 8, 8))
class ChannelIndices(nn.Module):
    """Channels picked by a list (one twice), by a buffer, and by a step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 12), conv_bn(5, 6), nn.Conv2d(4, 6, 1)
        self.c, self.head = nn.Conv2d(6, 6, 1), head(6)
        self.register_buffer("order", torch.tensor([11, 0, 5, 7]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x[:, [0, 3, 3, 8, 10]]) + self.b(x.index_select(1, self.order))
        return self.head(y + self.c(x[:, ::2]))


@trap("conv", num_folded=3, x=(3, 8, 8))
class ChannelSlices(nn.Module):
    """The low channels pass one way, the high ones another; both are added turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.high = conv_bn(3, 16), conv_bn(8, 8), nn.Conv2d(8, 8, 1)
        self.mixed, self.head = conv_bn(16, 16, 1), head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.cat([self.high(x[:, 8:]), self.low(x[:, :8])], 1)
        return self.head(self.mixed(y + torch.flip(x, [1])) + torch.roll(y, 3, 1))


@trap("conv", num_folded=3, x=(3, 8, 8))
class ChannelStatistics(nn.Module):
    """Softmax, running sums and unit length over channels: each channel depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8, 1, relu=False)])
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x).softmax(1)
        x = self.convs[1](x).cumsum(1)
        return self.head(F.normalize(self.convs[2](x), dim=1))


@trap("conv", x=(3, 8, 8))
class Maxout(nn.Module):
    """The largest of each two neighbouring channels, then of each channel and the one four later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), head(4)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.conv1(x).view(n, 6, 2, h, w).amax(2)
        return self.head(torch.maximum(*self.conv2(x).chunk(2, 1)))


@trap("conv", num_folded=2, x=(5, 3, 8, 8))
class TemporalShift(nn.Module):
    """Frames in the batch; a quarter of the channels comes from the frame before, a quarter from the one after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = conv_bn(3, 8, stride=2), conv_bn(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        y = self.stem(x.reshape(n * t, *x.shape[2:]))
        z = y.view(n, t, *y.shape[1:])
        before, after = F.pad(z[:, :-1, :2], (0, 0, 0, 0, 0, 0, 1, 0)), F.pad(z[:, 1:, 2:4], (0, 0, 0, 0, 0, 0, 0, 1))
        shifted = torch.cat([before, after, z[:, :, 4:]], 2)
        y = y + self.conv(shifted.reshape(y.shape))
        return self.fc(y.mean((2, 3)).view(n, t, -1).mean(1))


@trap("conv", x=(3, 8, 8))
class LearnedGates(nn.Module):
    """Parameters that count the channels: gates, offsets, slopes, and a mask that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 6)))
        self.gate, self.offset, self.scale = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8, 1, 1)), 0.5
        self.slope, self.last = nn.PReLU(8), nn.Parameter(torch.ones(1, 6, 1, 1))
        self.register_buffer("mask", torch.tensor([1.0, 1, 0, 1, 1, 1]))
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.conv1(x) * self.gate.view(1, -1, 1, 1) + self.offset)
        x = torch.where(self.mask.bool()[:, None, None], self.conv3(F.relu(self.conv2(x) + x)), self.scale)
        return self.head(self.last * x)


# -- attention over channels and pixels ------------------------------------------------------------------------------


@trap("conv", num_folded=3, x=(3, 8, 8))
class SelectiveKernel(nn.Module):
    """A softmax over branches for each channel, by stack and sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.small, self.large = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8, dilation=2, padding=2)
        self.reduce, self.select, self.head = nn.Linear(8, 4), nn.Linear(4, 16), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.select(F.relu(self.reduce(branches.sum(1).mean((2, 3))))).view(-1, 2, 8, 1, 1).softmax(1)
        return self.head((branches * weights).sum(1) + x)


@trap("conv", num_folded=2, x=(3, 8, 8))
class SplitAttention(nn.Module):
    """ResNeSt: grouped branches side by side, summed for their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 8), conv_bn(8, 16, groups=4)
        self.fc1, self.fc2, self.head = nn.Conv2d(8, 6, 1, groups=2), nn.Conv2d(6, 16, 1, groups=2), head(8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.conv(self.stem(x))).shape
        parts = x.view(n, 2, c // 2, h, w)
        weights = self.fc2(F.relu(self.fc1(parts.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(n, 2, 2, c // 4).transpose(1, 2).softmax(1).reshape(n, 2, c // 2, 1, 1)
        return self.head((parts * weights).sum(1))


@trap("conv", num_folded=2, x=(3, 8, 8))
class Cbam(nn.Module):
    """Channel attention with one network for two pools, then spatial attention from the channels' mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mlp, self.spatial = conv_bn(3, 8), mlp(8, 4, 8), nn.Conv2d(2, 1, 3, padding=1)
        self.conv, self.head = conv_bn(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        x = x * (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()[:, :, None, None]
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.head(x * self.spatial(maps).sigmoid())


@trap("conv", num_folded=2, x=(3, 8, 8))
class EfficientChannelAttention(nn.Module):
    """A convolution along the channels, which gives neighbours a meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv_bn(3, 8), conv_bn(8, 12), head(12)
        self.along = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        weights = self.along(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.head(x * weights.transpose(1, 2).unsqueeze(-1))


@trap(num_folded=2, x=(3, 6, 6))
class NonLocal(nn.Module):
    """Attention between pixels by views and bmm; keys from a pooled map; a zero-initialised last batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key, self.value = conv_bn(3, 8), *(nn.Conv2d(8, 4, 1) for _ in range(3))
        self.out, self.head = conv_bn(4, 8, 1, relu=False), head(8)
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = (x := self.stem(x)).shape
        pooled = F.max_pool2d(x, 2)
        query = self.query(x).view(n, 4, -1).permute(0, 2, 1)
        weights = torch.bmm(query, self.key(pooled).view(n, 4, -1)).softmax(-1)
        y = torch.bmm(weights, self.value(pooled).view(n, 4, -1).transpose(1, 2))
        return self.head(x + self.out(y.permute(0, 2, 1).contiguous().view(n, 4, h, w)))


@trap(x=(3, 8, 8), time=(6,))
class DiffusionBlock(nn.Module):
    """GroupNorm, a scale and shift for each channel from a second input, and attention between pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 12, 1)
        self.norm2, self.conv2, self.time = nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 3, padding=1), nn.Linear(6, 24)
        self.shortcut, self.norm3, self.qkv = nn.Conv2d(8, 12, 1), nn.GroupNorm(2, 12), nn.Conv1d(12, 36, 1)
        self.last = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.stem(x)
        scale, shift = self.time(F.silu(time))[..., None, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        x = self.shortcut(x) + self.conv2(F.silu(y))
        q, k, v = (u.unsqueeze(1).mT for u in self.qkv(self.norm3(x).flatten(2)).split(12, 1))
        return self.last(x + attend(q, k, v).mT.reshape(x.shape))


@trap("conv", x=(3, 8, 8))
class StyleTransfer(nn.Module):
    """Instance norms with and without factors, reflected padding, upsampling before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3, 2), nn.InstanceNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True),
        )  # fmt: skip
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(8, 3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(x + self.block(x))


@trap(num_folded=1, x=(3, 8, 8))
class NetVlad(nn.Module):
    """Clusters with centres that have the features' width; unit length over it; flattened with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.assign, self.fc = conv_bn(3, 8), nn.Conv2d(8, 4, 1), nn.Linear(32, 5)
        self.centres = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.stem(x), dim=1)
        weights, x = self.assign(x).softmax(1).flatten(2), x.flatten(2)
        residual = (weights @ x.mT) - weights.sum(-1, keepdim=True) * self.centres
        return self.fc(F.normalize(F.normalize(residual, dim=2).flatten(1), dim=1))


@trap(num_folded=2, x=(3, 8, 8))
class BilinearPooling(nn.Module):
    """Products of every two channels, flattened, beside a layer of two inputs and a cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv_bn(3, 6), conv_bn(3, 4), nn.Linear(24, 8)
        self.bilinear, self.classes = nn.Bilinear(6, 4, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        products = self.fc((a @ b.mT).flatten(1) / a.shape[-1])
        features = F.relu(products) + self.bilinear(a.mean(-1), b.mean(-1))
        return F.normalize(features, dim=1) @ F.normalize(self.classes, dim=1).t()


@trap(num_folded=2, x=(3, 8, 8))
class Regions(nn.Module):
    """Attention in float32 whatever surrounds it, and statistics without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.fc = conv_bn(3, 8), conv_bn(8, 8), nn.Linear(8, 5)
        self.query, self.key, self.value = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast("cpu", enabled=False):
            q, k, v = (layer(x.float()).flatten(2) for layer in (self.query, self.key, self.value))
            y = (v @ F.softmax(0.3 * q.mT @ k, -1).mT).unflatten(-1, x.shape[2:])
            with torch.no_grad():
                peak = y.abs().amax((2, 3), keepdim=True)
        return self.fc(self.out(y * torch.sigmoid(peak)).mean((2, 3)))


@trap(x=(6, 16))
class ComplexRotary(nn.Module):
    """Queries and keys turned as complex numbers, by a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.turns = torch.polar(torch.ones(6, 2), torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1])))
        self.fc = nn.Linear(16, 5)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[2]]).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.fc((x + self.out(attend(self.turned(q), self.turned(k), v))).mean(1))


@trap(num_folded=1, x=(3, 8, 8))
class Frequencies(nn.Module):
    """A filter over an image's frequencies, for each channel, held as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.fc = conv_bn(3, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.filter = nn.Parameter(torch.randn(8, 8, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        waves = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        return self.fc(F.relu(self.out(torch.fft.irfft2(waves, s=(8, 8), norm="ortho"))).mean((2, 3)))


@trap(x=(5, 6))
class Cells(nn.Module):
    """Recurrent cells one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.lstm, self.fc = (
            nn.Linear(6, 8),
            nn.GRUCell(8, 10),
            nn.LSTMCell(10, 8),
            nn.Linear(8, 5),
        )
        self.width = 10

    def forward(self, x: Tensor) -> Tensor:
        a, states = x.new_zeros(x.shape[0], self.width), None
        for step in F.relu(self.first(x)).unbind(1):
            a = self.gru(step, a)
            states = self.lstm(a, states)
        return self.fc(states[0])


@trap(num_folded=1, x=(3, 8, 8))
class MeansOverChannels(nn.Module):
    """A gate by the mean over channels, and their lengths beside the mean length (ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = conv_bn(3, 8), nn.Conv2d(1, 1, 3, padding=1)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma, self.beta, self.fc = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.gate(x.mean(1, keepdim=True)))
        y = F.gelu(self.wide(x.permute(0, 2, 3, 1)))
        lengths = torch.norm(y, dim=(1, 2), keepdim=True)
        y = self.gamma * y * lengths / (lengths.mean(-1, keepdim=True) + 1e-6) + self.beta + y
        return self.fc(self.narrow(y).mean((1, 2)))


@trap(num_folded=2, x=(3, 8, 8))
class SharedKernels(nn.Module):
    """One learnt kernel for every channel; where the copies are divided by their length, there stay as many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.fc = conv_bn(3, 8), conv_bn(8, 10), nn.Linear(10, 5)
        self.taps, self.kernel = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(1, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        channels = x.shape[1]
        blur = torch.outer(self.taps, self.taps).expand(channels, 1, 3, 3)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), blur, stride=2, groups=channels)
        x = F.conv_transpose2d(x, self.kernel.repeat(channels, 1, 1, 1), stride=2, padding=1, groups=channels)
        x = self.middle(x)
        kernels = self.kernel[..., 1:, 1:].expand(x.shape[1], -1, -1, -1)
        return self.fc(F.relu(F.conv2d(x, kernels / kernels.norm(), groups=x.shape[1])).mean((2, 3)))


@trap(x=(12,))
class OuterProducts(nn.Module):
    """Weights that are, or are changed by, an outer product of a vector of outputs and one of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(12, 16), nn.Linear(16, 20), nn.Linear(20, 5)
        self.outputs, self.inputs, self.both = (nn.Parameter(torch.randn(w)) for w in (20, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + F.linear(x, torch.outer(self.both, self.both) / 16)
        weight = self.second.weight + torch.outer(self.outputs, self.inputs)
        return self.fc(F.relu(F.linear(x, weight, self.second.bias)))


@trap(UNTRACEABLE, "conv", x=(3, 8, 8))
class EarlyExit(nn.Module):
    """The second half runs only where the first is not sure of some example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.early, self.late = conv_bn(3, 8), conv_bn(8, 8), head(8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.early(x)
        if y.softmax(1).amax(1).min() > 0.9:
            return y
        return self.late(self.second(x))

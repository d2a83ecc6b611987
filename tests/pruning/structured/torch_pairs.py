"""The same networks in PyTorch and in Flax, as their users define them."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from flax import linen as nn


class Pair(NamedTuple):
    """Two of a kind: a PyTorch module, its last layer (kept as it is), and a Flax module.

    Attributes:
        attention: the linear layers of queries, keys and values of a module.
        heads: how many heads they have, which Torch-Pruning has to be told, and leaves alone.
    """

    torch: Callable[[], torch.nn.Module]
    last: str
    flax: nn.Module
    shape: tuple[int, ...]
    attention: Callable[[Any], list[Any]] = lambda module: []
    heads: int = 0


def torch_conv(fan_in, fan_out, size=3, strides=1, groups=1):
    return torch.nn.Sequential(
        torch.nn.Conv2d(fan_in, fan_out, size, strides, size // 2, groups=groups, bias=False),
        torch.nn.BatchNorm2d(fan_out),
    )


class Conv(nn.Module):
    """Without a bias, and with batch norm after it."""

    width: int
    size: int = 3
    strides: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            self.width,
            (self.size, self.size),
            self.strides,
            padding=self.size // 2,
            feature_group_count=self.groups,
            use_bias=False,
        )(x)
        return nn.BatchNorm(use_running_average=True)(x)


class TorchResNet(torch.nn.Module):
    """ResNet-18 as torchvision has it: 11,689,512 parameters."""

    class Block(torch.nn.Module):
        def __init__(self, fan_in, width, strides):
            super().__init__()
            self.conv1 = torch_conv(fan_in, width, 3, strides)
            self.conv2 = torch_conv(width, width)
            self.down = None
            if strides > 1 or fan_in != width:
                self.down = torch_conv(fan_in, width, 1, strides)

        def forward(self, x):
            y = self.conv2(F.relu(self.conv1(x)))
            return F.relu(y + (x if self.down is None else self.down(x)))

    def __init__(self):
        super().__init__()
        self.stem = torch_conv(3, 64, 7, 2)
        blocks, fan_in = [], 64
        for i, width in enumerate((64, 128, 256, 512)):
            blocks += [self.Block(fan_in, width, 1 + (i > 0)), self.Block(width, width, 1)]
            fan_in = width
        self.blocks = torch.nn.Sequential(*blocks)
        self.head = torch.nn.Linear(512, 1000)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv(64, 7, 2)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, width in enumerate((64, 128, 256, 512)):
            for strides in (1 + (i > 0), 1):
                y = Conv(width)(nn.relu(Conv(width, 3, strides)(x)))
                x = x if x.shape == y.shape else Conv(width, 1, strides)(x)
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


class TorchVGG(torch.nn.Module):
    WIDTHS = (16, 32, 64, 64)

    def __init__(self):
        super().__init__()
        sizes = itertools.pairwise((3, *self.WIDTHS))
        convs = [torch.nn.Conv2d(a, b, 3, padding=1) for a, b in sizes]
        self.convs = torch.nn.ModuleList(convs)
        self.fc = torch.nn.Linear(256, 128)
        self.head = torch.nn.Linear(128, 10)

    def forward(self, x):
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.head(F.relu(self.fc(torch.flatten(x, 1))))


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in TorchVGG.WIDTHS:
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class TorchDenseNet(torch.nn.Module):
    """Two dense blocks of three bottleneck layers, a transition between them."""

    def __init__(self, growth=8):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        width, layers, transitions = 16, [], []
        for _ in range(2):
            for _ in range(3):
                layers.append(
                    torch.nn.Sequential(
                        torch.nn.BatchNorm2d(width),
                        torch.nn.ReLU(),
                        torch.nn.Conv2d(width, 4 * growth, 1, bias=False),
                        torch.nn.BatchNorm2d(4 * growth),
                        torch.nn.ReLU(),
                        torch.nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
                    )
                )
                width += growth
            transitions.append(
                torch.nn.Sequential(
                    torch.nn.BatchNorm2d(width),
                    torch.nn.ReLU(),
                    torch.nn.Conv2d(width, width // 2, 1, bias=False),
                )
            )
            width //= 2
        self.layers = torch.nn.ModuleList(layers)
        self.transitions = torch.nn.ModuleList(transitions)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = torch.cat([x, layer(x)], 1)
            if i % 3 == 2:
                x = F.avg_pool2d(self.transitions[i // 3](x), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def conv(x, width, size):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Conv(width, (size, size), use_bias=False)(x)

        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for _ in range(2):
            for _ in range(3):
                x = jnp.concatenate([x, conv(conv(x, 32, 1), 8, 3)], -1)
            x = conv(x, x.shape[-1] // 2, 1)
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return nn.Dense(10)(x.mean((1, 2)))


# Inverted residuals: the width, the factor of expansion, the strides.
MOBILE = ((16, 1, 1), (24, 4, 2), (24, 4, 1), (32, 4, 2), (32, 4, 1))


class TorchMobileNet(torch.nn.Module):
    class Block(torch.nn.Module):
        def __init__(self, fan_in, width, factor, strides):
            super().__init__()
            hidden = fan_in * factor
            self.expand = torch_conv(fan_in, hidden, 1)
            self.depthwise = torch_conv(hidden, hidden, 3, strides, hidden)
            self.project = torch_conv(hidden, width, 1)
            self.residual = strides == 1 and fan_in == width

        def forward(self, x):
            y = F.relu6(self.depthwise(F.relu6(self.expand(x))))
            y = self.project(y)
            return x + y if self.residual else y

    def __init__(self):
        super().__init__()
        self.stem = torch_conv(3, 16, 3, 2)
        blocks, fan_in = [], 16
        for width, factor, strides in MOBILE:
            blocks.append(self.Block(fan_in, width, factor, strides))
            fan_in = width
        self.blocks = torch.nn.Sequential(*blocks)
        self.last = torch_conv(fan_in, 64, 1)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu6(self.last(self.blocks(F.relu6(self.stem(x)))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(Conv(16, 3, 2)(x))
        for width, factor, strides in MOBILE:
            hidden = x.shape[-1] * factor
            y = nn.relu6(Conv(hidden, 1)(x))
            y = nn.relu6(Conv(hidden, 3, strides, hidden)(y))
            y = Conv(width, 1)(y)
            x = x + y if x.shape == y.shape else y
        x = nn.relu6(Conv(64, 1)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class TorchEncoder(torch.nn.Module):
    """A vision transformer of patches, with one kernel for queries, keys and values."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
            self.qkv, self.out = torch.nn.Linear(32, 144), torch.nn.Linear(48, 32)
            self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, 8, 8)
        self.layers = torch.nn.Sequential(self.Layer(), self.Layer())
        self.norm = torch.nn.LayerNorm(32)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(x)).mean(1))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (8, 8), (8, 8))(x)
        b, t = x.shape[0], x.shape[1] * x.shape[2]
        x = x.reshape(b, t, -1)
        for _ in range(2):
            y = nn.Dense(144)(nn.LayerNorm()(x)).reshape(b, t, 3, 4, -1)
            y = nn.dot_product_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2]).reshape(b, t, -1)
            x = x + nn.Dense(32)(y)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def count(variables):
    """Trainable parameters, so not the statistics of batch norm."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(variables["params"]))


PAIRS = {
    "resnet18": Pair(TorchResNet, "head", ResNet(), (1, 64, 64, 3)),
    "vgg": Pair(TorchVGG, "head", VGG(), (1, 32, 32, 3)),
    "densenet": Pair(TorchDenseNet, "head", DenseNet(), (1, 16, 16, 3)),
    "mobilenet": Pair(TorchMobileNet, "head", MobileNet(), (1, 32, 32, 3)),
    "encoder": Pair(
        TorchEncoder,
        "head",
        Encoder(),
        (1, 32, 32, 3),
        lambda module: [layer.qkv for layer in module.layers],
        heads=4,
    ),
}

"""Residual networks (He, Zhang, Ren, Sun 2015, arXiv 1512.03385) up to their last features.

torchvision has them, but importing its models takes as long as importing torch. The weights have
torchvision's names, so that its files and our checkpoints fit either.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Conv(NamedTuple):
    """A convolution, padded so that only its stride changes H and W."""

    size: int
    channels: int
    stride: int = 1


class Residual(nn.Module):
    """Convolutions whose result is added to what they were given (figure 2 of the paper).

    Batch norm follows each of them, and ReLU, the last one after the sum. Where the result has
    another shape, what was given is brought to it by a 1x1 convolution (equation 2).
    """

    downsample: nn.Sequential | None

    def __init__(self, in_channels: int, convs: Sequence[Conv]) -> None:
        super().__init__()
        channels = in_channels
        for i, conv in enumerate(convs, start=1):
            self.add_module(f"conv{i}", _conv(channels, conv))
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.channels))
            channels = conv.channels
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        stride = math.prod(conv.stride for conv in convs)
        if stride > 1 or channels != in_channels:
            shortcut = _conv(in_channels, Conv(1, channels, stride))
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))
        self.num_convs = len(convs)

    def forward(self, x: Tensor) -> Tensor:
        """N in_channels H W → N channels H/stride W/stride, rounded up."""
        y = x
        for i in range(1, self.num_convs + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.num_convs:
                y = self.relu(y)
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


def resnet(num_blocks: Sequence[int], *, bottleneck: bool) -> nn.Sequential:
    """A row of table 1 of the paper, without the pooling and the classifier at its end.

    Args:
        num_blocks: residual blocks of each of the four layers.
        bottleneck: of three convolutions a block instead of two. The middle one has the stride, as
            in torchvision's weights; the paper gives it to the first.

    Returns:
        conv1, bn1, relu, maxpool and layer1 to layer4: from N 3 H W to 512 channels, or 2048 with
        bottlenecks, at 1/32 of H and W, rounded up.
    """
    network = nn.Sequential()
    network.add_module("conv1", _conv(3, Conv(7, 64, stride=2)))
    network.add_module("bn1", nn.BatchNorm2d(64))
    network.add_module("relu", nn.ReLU(inplace=True))
    network.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    channels = 64
    for layer, num in enumerate(num_blocks, start=1):
        width = 64 * 2 ** (layer - 1)
        blocks = nn.Sequential()
        for block in range(num):
            stride = 2 if layer > 1 and block == 0 else 1
            if bottleneck:
                convs = [Conv(1, width), Conv(3, width, stride), Conv(1, 4 * width)]
            else:
                convs = [Conv(3, width, stride), Conv(3, width)]
            blocks.append(Residual(channels, convs))
            channels = convs[-1].channels
        network.add_module(f"layer{layer}", blocks)
    return network


def _conv(in_channels: int, conv: Conv) -> nn.Conv2d:
    """Without a bias, which the batch norm behind it would subtract again."""
    return nn.Conv2d(
        in_channels, conv.channels, conv.size, conv.stride, padding=conv.size // 2, bias=False
    )

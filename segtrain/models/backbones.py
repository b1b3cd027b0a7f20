"""Classification networks up to their last features: ResNet, VGG, and AlexNet.

torchvision has them, too, but importing its models takes as long as importing torch. The
`state_dict` keys are torchvision's, so its weight files and our checkpoints fit both.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class ConvSpec(NamedTuple):
    """A convolution padded so that only its stride changes H and W."""

    size: int
    channels: int
    stride: int = 1


class ResidualBlock(nn.Module):
    """Convolutions with a shortcut connection (figure 2 of the ResNet paper).

    Batch norm follows each convolution. ReLU follows each batch norm, the last one after the
    addition. If the shape changes, the shortcut is a 1x1 convolution (equation 2).
    """

    downsample: nn.Sequential | None

    def __init__(self, in_channels: int, convs: Sequence[ConvSpec]) -> None:
        super().__init__()
        channels = in_channels
        for i, conv in enumerate(convs, start=1):
            self.add_module(f"conv{i}", _build_conv(channels, conv))
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.channels))
            channels = conv.channels
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        stride = math.prod(conv.stride for conv in convs)
        if stride > 1 or channels != in_channels:
            shortcut = _build_conv(in_channels, ConvSpec(1, channels, stride))
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
    """ResNet without pooling and classifier (He, Zhang, Ren, Sun 2015, arXiv 1512.03385, table 1).

    Args:
        num_blocks: residual blocks of each of the four layers.
        bottleneck: three convolutions per block instead of two. The second one has the stride, as
            in torchvision's weights; in the paper it is the first one.

    Returns:
        conv1, bn1, relu, maxpool, and layer1 to layer4: from N 3 H W to 512 channels, or 2048 with
        bottlenecks, at 1/32 of H and W, rounded up.
    """
    network = nn.Sequential()
    network.add_module("conv1", _build_conv(3, ConvSpec(7, 64, stride=2)))
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
                convs = [ConvSpec(1, width), ConvSpec(3, width, stride), ConvSpec(1, 4 * width)]
            else:
                convs = [ConvSpec(3, width, stride), ConvSpec(3, width)]
            blocks.append(ResidualBlock(channels, convs))
            channels = convs[-1].channels
        network.add_module(f"layer{layer}", blocks)
    return network


def _build_conv(in_channels: int, conv: ConvSpec) -> nn.Conv2d:
    """Convolution without a bias, which the batch norm after it would subtract."""
    return nn.Conv2d(
        in_channels, conv.channels, conv.size, conv.stride, padding=conv.size // 2, bias=False
    )


def vgg(num_convs: Sequence[int], *, norm: bool) -> nn.Sequential:
    """VGG without classifier (Simonyan, Zisserman 2014, arXiv 1409.1556, table 1).

    Args:
        num_convs: 3x3 convolutions before each of the five poolings.
        norm: batch norm before each ReLU; the paper has none.

    Returns:
        `features`: from N 3 H W to 512 channels at 1/32 of H and W, rounded down.
    """
    features = nn.Sequential()
    channels = 3
    for width, num in zip((64, 128, 256, 512, 512), num_convs, strict=True):
        for _ in range(num):
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            if norm:
                features.append(nn.BatchNorm2d(width))
            features.append(nn.ReLU(inplace=True))
            channels = width
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(OrderedDict(features=features))


def alexnet() -> nn.Sequential:
    """AlexNet with a single column (Krizhevsky 2014, arXiv 1404.5997, section 5).

    Returns:
        `features`: from N 3 H W to 256 channels; 6 x 6 for 224 x 224 pixels.
    """
    convs = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1),
    ]
    features = nn.Sequential()
    for i, conv in enumerate(convs):
        features.append(conv).append(nn.ReLU(inplace=True))
        if i in (0, 1, 4):
            features.append(nn.MaxPool2d(3, stride=2))
    return nn.Sequential(OrderedDict(features=features))

"""VGG (Simonyan, Zisserman 2014, arXiv 1409.1556) and AlexNet up to their last features.

The weights have torchvision's names, so that its files and our checkpoints fit either.
"""

from collections.abc import Sequence

from torch import nn


def vgg(num_convs: Sequence[int], *, norm: bool) -> nn.Sequential:
    """A column of table 1 of the paper: 3x3 convolutions, and a pooling after each level.

    Args:
        num_convs: convolutions of each of the five levels.
        norm: batch norm before every ReLU, which the paper does not have yet.

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
    return _named(features)


def alexnet() -> nn.Sequential:
    """AlexNet in a single column, as in section 5 of Krizhevsky 2014 (arXiv 1404.5997).

    Returns:
        `features`: from N 3 H W to 256 channels, 6 x 6 of 224 x 224 pixels.
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
    return _named(features)


def _named(features: nn.Sequential) -> nn.Sequential:
    network = nn.Sequential()
    network.add_module("features", features)
    return network

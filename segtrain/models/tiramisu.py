"""FC-DenseNet, the One Hundred Layers Tiramisu (Jégou et al. 2017, arXiv 1611.09326)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from segtrain.models.layers import Normalize, he_uniform_, pad_to_multiple


class DenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution, dropout (table 1 of the paper): C channels in, k new ones out.

    Plain dropout on single values as in the paper, not on whole channels.
    """

    def __init__(self, in_channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth_rate, 3, padding=1)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(torch.relu(self.norm(x))))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Layers that each see the block's input and all features made before (figure 2).

    Returns only the new features, num_layers * growth_rate channels; where the paper hands the
    input on as well, the network concatenates it.
    """

    def __init__(
        self, in_channels: int, num_layers: int, growth_rate: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(in_channels + i * growth_rate, growth_rate, drop_rate)
            for i in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features[1:], dim=1)


class TransitionDown(nn.Module):
    """BN, ReLU, 1x1 convolution, dropout, 2x2 max-pooling (table 1); the channels are kept."""

    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(drop_rate)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.conv(torch.relu(self.norm(x))))
        return self.pool(x)  # type: ignore[no-any-return]


class TransitionUp(nn.Module):
    """3x3 transposed convolution with stride 2 (table 1): H and W double, the channels are kept.

    It sees only the new features of the block below; there is no ReLU after it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class FCDenseNet(nn.Module):
    """The fully convolutional DenseNet of section 3; the defaults are FC-DenseNet103 (table 2).

    With 2 classes 103 has 9,319,778 parameters, 67 has 3,460,642 and 56 has 1,375,058.

    Args:
        num_classes: channels of the logits.
        growth_rate: k, new channels of each layer.
        down_blocks: layers of each dense block on the way down; each is followed by a halving.
        bottleneck: layers of the block between the two paths.
        up_blocks: layers of each dense block on the way up, as many blocks as `down_blocks`.
        stem_channels: channels of the first 3x3 convolution.
        drop_rate: probability of dropout after every convolution of a layer or transition down.
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        growth_rate: int = 16,
        down_blocks: Sequence[int] = (4, 5, 7, 10, 12),
        bottleneck: int = 15,
        up_blocks: Sequence[int] = (12, 10, 7, 5, 4),
        stem_channels: int = 48,
        drop_rate: float = 0.2,
    ) -> None:
        if len(down_blocks) != len(up_blocks) or not 1 <= len(down_blocks) <= 8:
            raise ValueError("down_blocks and up_blocks must be equally many, from 1 to 8")
        if min(growth_rate, bottleneck, stem_channels, *down_blocks, *up_blocks) < 1:
            raise ValueError("growth_rate, stem_channels and all layer counts must be at least 1")
        # A stranger's checkpoint names these numbers too, and every layer costs memory here.
        if sum((*down_blocks, bottleneck, *up_blocks)) > 1000:
            raise ValueError("more than 1000 layers are not supported")
        if not 0 <= drop_rate < 1:
            raise ValueError("drop_rate must be at least 0 and below 1")
        super().__init__()
        self.normalize = Normalize()
        self.stem = nn.Conv2d(3, stem_channels, 3, padding=1)

        channels = stem_channels
        skip_channels = []
        self.down_blocks = nn.ModuleList()
        self.downs = nn.ModuleList()
        for num_layers in down_blocks:
            self.down_blocks.append(DenseBlock(channels, num_layers, growth_rate, drop_rate))
            channels += num_layers * growth_rate
            skip_channels.append(channels)
            self.downs.append(TransitionDown(channels, drop_rate))

        self.bottleneck = DenseBlock(channels, bottleneck, growth_rate, drop_rate)

        new_channels = bottleneck * growth_rate
        self.ups = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for num_layers, skip in zip(up_blocks, reversed(skip_channels), strict=True):
            self.ups.append(TransitionUp(new_channels))
            channels = new_channels + skip
            self.up_blocks.append(DenseBlock(channels, num_layers, growth_rate, drop_rate))
            new_channels = num_layers * growth_rate

        self.head = nn.Conv2d(channels + new_channels, num_classes, 1)
        self.apply(he_uniform_)

    def forward(self, image: Tensor) -> Tensor:
        """N 3 H W RGB, uint8 or float in 0..255, any H and W → logits N num_classes H W."""
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2 ** len(self.downs))
        x = self.stem(x)
        skips = []
        for block, down in zip(self.down_blocks, self.downs, strict=True):
            x = torch.cat([x, block(x)], dim=1)
            skips.append(x)
            x = down(x)
        new = self.bottleneck(x)
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            x = torch.cat([up(new), skips.pop()], dim=1)
            new = block(x)
        # Only the last block hands its input on beside its new features.
        logits: Tensor = self.head(torch.cat([x, new], dim=1))
        return logits[..., :height, :width]


# The paper's three networks (table 3); any argument of FCDenseNet can still be given.
fc_densenet56 = partial(
    FCDenseNet,
    growth_rate=12,
    down_blocks=(4, 4, 4, 4, 4),
    bottleneck=4,
    up_blocks=(4, 4, 4, 4, 4),
)
fc_densenet67 = partial(
    FCDenseNet,
    growth_rate=16,
    down_blocks=(5, 5, 5, 5, 5),
    bottleneck=5,
    up_blocks=(5, 5, 5, 5, 5),
)
fc_densenet103 = partial(
    FCDenseNet,
    growth_rate=16,
    down_blocks=(4, 5, 7, 10, 12),
    bottleneck=15,
    up_blocks=(12, 10, 7, 5, 4),
)

"""U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models.layers import Dropout, Normalize, he_uniform_, pad_to_multiple

NormKind = Literal["batch", "group", "none"]
UpKind = Literal["transposed", "bilinear"]
Padding = Literal["same", "valid"]


def double_conv(
    in_channels: int, out_channels: int, *, norm: NormKind = "batch", padding: Padding = "same"
) -> nn.Sequential:
    """Two 3x3 convolutions with ReLU, one level of the paper; "valid" shrinks H and W by 4."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        # A bias before a norm has no effect: the norm subtracts it.
        pad = 1 if padding == "same" else 0
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=pad, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(out_channels))
        elif norm == "group":
            layers.append(nn.GroupNorm(_num_groups(out_channels), out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _num_groups(channels: int) -> int:
    """Number of groups: 32 as in Wu and He 2018 (arXiv 1803.08494), fewer for few channels.

    A group has at least two channels, because a single channel has no variance if H and W are 1.
    """
    num_groups = math.gcd(32, channels)
    return num_groups // 2 if num_groups == channels > 1 else num_groups


class BilinearUp(nn.Module):
    """Bilinear upsampling and a 1x1 convolution instead of the paper's transposed convolution.

    Args:
        valid: crop the outermost pixels, which depend on the edge of the tile.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, scale: int = 2, valid: bool = False
    ) -> None:
        super().__init__()
        self.scale, self.valid = scale, valid
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The 1x1 convolution comes first: the result is the same, and fewer pixels are cheaper.
        x = F.interpolate(self.conv(x), scale_factor=self.scale, mode="bilinear")
        return x[..., 1:-1, 1:-1] if self.valid else x


def upsampling(
    in_channels: int, out_channels: int, kind: UpKind, *, scale: int = 2, valid: bool = False
) -> nn.Module:
    """Upsampling layer: N in_channels H W → N out_channels scale*H scale*W.

    A valid bilinear layer returns 2 rows and columns fewer.
    """
    if kind == "bilinear":
        return BilinearUp(in_channels, out_channels, scale=scale, valid=valid)
    return nn.ConvTranspose2d(in_channels, out_channels, scale, stride=scale)


class UNet(nn.Module):
    """A contracting path, a bottleneck, and an expanding path with a skip connection per level.

    By default the levels have 64, 128, 256, 512, and 1024 channels as in figure 1 of the paper; the
    network has 31,037,698 parameters. The convolutions keep H and W. In the paper they do not; see
    `ValidUNet`.

    Args:
        num_classes: channels of the logits.
        norm: normalization after the 3x3 convolutions.
        up: upsampling layer that doubles H and W.
        base_channels: channels of the first level; each further level doubles them.
        depth: how often H and W are halved, 1 to 8.
        drop_rate: dropout probability at the end of the contracting path (section 3.1), after the
            last level and after the bottleneck.

    Raises:
        ValueError: an argument is out of range.
    """

    padding: Padding = "same"

    def __init__(
        self,
        num_classes: int = 2,
        *,
        norm: NormKind = "batch",
        up: UpKind = "transposed",
        base_channels: int = 64,
        depth: int = 4,
        drop_rate: float = 0.0,
    ) -> None:
        if base_channels < 1 or not 1 <= depth <= 8:
            raise ValueError("base_channels must be at least 1 and depth from 1 to 8")
        super().__init__()
        self.depth, self.up = depth, up
        valid = self.padding == "valid"
        channels = [base_channels * 2**level for level in range(depth + 1)]

        def convs(in_channels: int, out_channels: int) -> nn.Sequential:
            return double_conv(in_channels, out_channels, norm=norm, padding=self.padding)

        self.normalize = Normalize()
        self.encoders = nn.ModuleList(map(convs, [3, *channels[:-2]], channels[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.dropout = Dropout(drop_rate)
        self.bottleneck = convs(channels[-2], channels[-1])
        self.ups = nn.ModuleList(
            upsampling(2 * c, c, up, valid=valid) for c in reversed(channels[:-1])
        )
        self.decoders = nn.ModuleList(convs(2 * c, c) for c in reversed(channels[:-1]))
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        self.apply(he_uniform_)

    def forward(self, image: Tensor) -> Tensor:
        """N 3 H W RGB, uint8 or float in 0..255, any H and W → logits N num_classes H W."""
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2**self.depth)
        return self.forward_paths(x)[..., :height, :width]

    def forward_paths(self, x: Tensor) -> Tensor:
        """Contracting and expanding path: N 3 H W, normalized → logits."""
        skips = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x)
            if level == self.depth - 1:
                x = self.dropout(x)
            skips.append(x)
            x = self.pool(x)
        x = self.dropout(self.bottleneck(x))
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = up(x)
            # As in the paper, crop the skip, because valid convolutions shrink x. Else a no-op.
            x = decoder(torch.cat([_center_crop(skips.pop(), x.shape[-2:]), x], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


def _center_crop(x: Tensor, size: torch.Size) -> Tensor:
    """Crop N C H W to H and W of `size` around its center."""
    top, left = (x.shape[2] - size[0]) // 2, (x.shape[3] - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]]

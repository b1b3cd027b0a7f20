"""U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models.layers import Dropout, Normalize, he_uniform_, pad_to_multiple

NormKind = Literal["batch", "group", "none"]
UpKind = Literal["transposed", "bilinear"]
Padding = Literal["same", "valid"]

# Side of the paper's output tile (figure 1); larger pictures are put together from such tiles.
_TILE = 388


def double_conv(
    in_channels: int, out_channels: int, *, norm: NormKind = "batch", padding: Padding = "same"
) -> nn.Sequential:
    """The paper's two 3x3 convolutions a level, each with ReLU; valid ones shrink H and W by 4."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        # A norm subtracts any bias again, so the convolutions before one have none.
        pad = 1 if padding == "same" else 0
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=pad, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(out_channels))
        elif norm == "group":
            layers.append(nn.GroupNorm(_num_groups(out_channels), out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _num_groups(channels: int) -> int:
    """32 as in Wu and He 2018 (arXiv 1803.08494), fewer on a narrow level.

    At least two channels a group, for one alone has no variance where H and W are 1.
    """
    num_groups = math.gcd(32, channels)
    return num_groups // 2 if num_groups == channels > 1 else num_groups


class BilinearUp(nn.Module):
    """Bilinear enlargement and a 1x1 convolution, in place of the paper's transposed convolution.

    Args:
        valid: leave out the outermost pixels, which see the edge of the tile.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, scale: int = 2, valid: bool = False
    ) -> None:
        super().__init__()
        self.scale, self.valid = scale, valid
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The 1x1 convolution comes first: it gives the same and is cheaper before the enlargement.
        x = F.interpolate(self.conv(x), scale_factor=self.scale, mode="bilinear")
        return x[..., 1:-1, 1:-1] if self.valid else x


def upsampling(
    in_channels: int, out_channels: int, kind: UpKind, *, scale: int = 2, valid: bool = False
) -> nn.Module:
    """N in_channels H W → N out_channels scale*H scale*W (bilinear and valid: 2 less)."""
    if kind == "bilinear":
        return BilinearUp(in_channels, out_channels, scale=scale, valid=valid)
    return nn.ConvTranspose2d(in_channels, out_channels, scale, stride=scale)


class UNet(nn.Module):
    """A contracting path, a bottleneck and an expanding path with a skip at every level.

    With its defaults the channels run 64, 128, 256, 512, 1024 as in figure 1 of the paper, which is
    31,037,698 parameters. With padding="valid" and norm="none" it is the paper's own network:
    572 x 572 in, 388 x 388 out, 31,031,810 parameters at 2 classes. Valid convolutions shrink, so
    the picture is mirrored beyond its borders, and in evaluation a large one is put together from
    tiles (the paper's overlap-tile strategy, figure 2); tiles and whole give the same logits.

    Args:
        num_classes: channels of the logits.
        padding: of the 3x3 convolutions.
        norm: what follows them; group norm looks at all of a picture, so it cannot be tiled and
            does not go with valid padding.
        up: how H and W are doubled.
        base_channels: channels of the first level; every level doubles them.
        depth: number of halvings, at least 1.
        drop_rate: probability of dropout at the end of the contracting path (section 3.1): after
            the last level and after the bottleneck.
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        padding: Padding = "same",
        norm: NormKind = "batch",
        up: UpKind = "transposed",
        base_channels: int = 64,
        depth: int = 4,
        drop_rate: float = 0.0,
    ) -> None:
        if base_channels < 1 or not 1 <= depth <= 8:
            raise ValueError("base_channels must be at least 1 and depth from 1 to 8")
        if padding == "valid" and norm == "group":
            raise ValueError("padding=valid goes with norm=batch or norm=none, not with group")
        super().__init__()
        self.depth, self.padding, self.up = depth, padding, up
        valid = padding == "valid"
        channels = [base_channels * 2**level for level in range(depth + 1)]

        def convs(in_channels: int, out_channels: int) -> nn.Sequential:
            return double_conv(in_channels, out_channels, norm=norm, padding=padding)

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
        if self.padding == "same":
            x = pad_to_multiple(self.normalize(image), 2**self.depth)
            return self._paths(x)[..., :height, :width]
        # Statistics of the batch would differ from tile to tile.
        whole = any(module.training for module in self.modules())
        side = max(height, width) if whole else self._largest_tile()
        strips = [
            torch.cat([self._tile(image, rows, columns) for columns in _pieces(width, side)], dim=3)
            for rows in _pieces(height, side)
        ]
        return torch.cat(strips, dim=2)

    def _paths(self, x: Tensor) -> Tensor:
        """Down and up again."""
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
            skip = _center(skips.pop(), x.shape[-2:]) if self.padding == "valid" else skips.pop()
            x = decoder(torch.cat([skip, x], dim=1))
        return self.head(x)  # type: ignore[no-any-return]

    def _tile(self, image: Tensor, rows: slice, columns: slice) -> Tensor:
        """Logits of one rectangle of the picture, from what valid convolutions need around it."""
        height, width = image.shape[-2:]
        seen_rows, seen_columns = self._seen(rows), self._seen(columns)
        image = image[:, :, _mirrored(seen_rows, height, image.device)]
        image = image[:, :, :, _mirrored(seen_columns, width, image.device)]
        logits = self._paths(self.normalize(image))
        return logits[..., : rows.stop - rows.start, : columns.stop - columns.start]

    def _seen(self, wanted: slice) -> range:
        """The input pixels along one side for at least these output pixels; 572 for 388."""
        halvings = 2**self.depth
        # Of n pixels at the bottleneck the way up makes halvings * (n - 4) - lost.
        lost = (4 if self.up == "transposed" else 6) * (halvings - 1)
        bottleneck = math.ceil((wanted.stop - wanted.start + lost) / halvings) + 4
        num_out = halvings * (bottleneck - 4) - lost
        num_in = halvings * bottleneck + 4 * (halvings - 1)
        start = wanted.start - (num_in - num_out) // 2
        return range(start, start + num_in)

    def _largest_tile(self) -> int:
        """Side of a tile, a multiple of 2**depth so that all tiles halve at the same pixels."""
        halvings: int = 2**self.depth
        return max(_TILE // halvings, 1) * halvings


def _center(x: Tensor, size: torch.Size) -> Tensor:
    """The middle of N C H W, as the paper crops its skips."""
    top, left = (x.shape[2] - size[0]) // 2, (x.shape[3] - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]]


def _pieces(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _mirrored(indices: range, length: int, device: torch.device) -> Tensor:
    """Indices beyond a side of `length` pixels reflected into it, as often as it takes."""
    last = length - 1
    unfolded = torch.arange(indices.start, indices.stop, device=device)
    return last - (unfolded.remainder(max(2 * last, 1)) - last).abs()

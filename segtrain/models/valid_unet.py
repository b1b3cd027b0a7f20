"""The U-Net of the paper, with valid convolutions (arXiv 1505.04597)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from segtrain.models.unet import NormKind, Padding, UNet

# Side of the paper's output tile (figure 1). Larger images are assembled from tiles of this size.
_TILE = 388


class ValidUNet(UNet):
    """A U-Net whose 3x3 convolutions have no padding.

    With norm="none" it is the network of the paper: 572 x 572 input, 388 x 388 output, 31,031,810
    parameters for 2 classes. Valid convolutions shrink H and W, so the image is mirrored beyond its
    borders. In evaluation, a large image is assembled from tiles (the overlap-tile strategy, figure
    2). The logits are the same with and without tiles.

    Args:
        norm: "batch" or "none". Group norm depends on the whole image, which a tile does not have.
        kwargs: the other arguments of `UNet`.

    Raises:
        ValueError: an argument is out of range, or `norm` is "group".
    """

    padding: Padding = "valid"

    def __init__(self, num_classes: int = 2, *, norm: NormKind = "batch", **kwargs: Any) -> None:
        if norm == "group":
            raise ValueError("padding=valid works with norm=batch or norm=none, not with group")
        super().__init__(num_classes, norm=norm, **kwargs)

    def forward(self, image: Tensor) -> Tensor:
        """N 3 H W RGB, uint8 or float in 0..255, any H and W → logits N num_classes H W."""
        height, width = image.shape[-2:]
        # In training, batch statistics would differ between tiles.
        training = any(module.training for module in self.modules())
        side = max(height, width) if training else self._max_tile_side()
        strips = [
            torch.cat([self._tile_logits(image, rows, cols) for cols in _spans(width, side)], dim=3)
            for rows in _spans(height, side)
        ]
        return torch.cat(strips, dim=2)

    def _tile_logits(self, image: Tensor, rows: slice, columns: slice) -> Tensor:
        """Logits of one rectangle of the image, computed from the input that it depends on."""
        height, width = image.shape[-2:]
        image = image[:, :, _reflect(self._input_range(rows), height, image.device)]
        image = image[:, :, :, _reflect(self._input_range(columns), width, image.device)]
        logits = self.forward_paths(self.normalize(image))
        return logits[..., : rows.stop - rows.start, : columns.stop - columns.start]

    def _input_range(self, output: slice) -> range:
        """Input pixels along one side for at least these output pixels; 572 for 388."""
        stride = 2**self.depth
        # From n pixels at the bottleneck, the expanding path makes stride * (n - 4) - shrinkage.
        shrinkage = (4 if self.up == "transposed" else 6) * (stride - 1)
        bottleneck = math.ceil((output.stop - output.start + shrinkage) / stride) + 4
        num_out = stride * (bottleneck - 4) - shrinkage
        num_in = stride * bottleneck + 4 * (stride - 1)
        start = output.start - (num_in - num_out) // 2
        return range(start, start + num_in)

    def _max_tile_side(self) -> int:
        """The largest multiple of 2**depth up to `_TILE`, so that pooling aligns across tiles."""
        stride: int = 2**self.depth
        return max(_TILE // stride, 1) * stride


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _reflect(indices: range, length: int, device: torch.device) -> Tensor:
    """Reflect indices beyond a side of `length` pixels into it, repeatedly if necessary."""
    last = length - 1
    unfolded = torch.arange(indices.start, indices.stop, device=device)
    return last - (unfolded.remainder(max(2 * last, 1)) - last).abs()

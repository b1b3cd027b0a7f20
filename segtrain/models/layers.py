"""What every network here shares: normalisation, padding to a multiple, and the initialiser."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and standard deviation of ImageNet's RGB values, in the 0..255 of the bytes we take.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Normalize(nn.Module):
    """Bytes to numbers around zero, in the network: training, predict and export can't disagree.

    Takes N 3 H W uint8 or float in 0..255 (RGB) and returns float of the same shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (image.to(self.mean.dtype) - self.mean) / self.std


class Dropout(nn.Module):
    """Plain dropout of single values (Srivastava et al. 2014), not of whole channels.

    On a CPU torch's own draws a number for each value and takes as long as the convolution before
    it. Sixteen bits are enough there: the probability is `p` rounded to a multiple of 1/65536.

    Args:
        p: probability of a value to be dropped, 0 <= p < 1.

    Raises:
        ValueError: `p` is out of range.
    """

    def __init__(self, p: float) -> None:
        if not 0 <= p < 1:
            raise ValueError("drop_rate must be at least 0 and below 1")
        super().__init__()
        self.p = p
        self._threshold = min(round(p * 2**16), 2**16 - 1)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def draw(self, x: Tensor) -> Tensor | None:
        """Which values of `x`, N C H W, to keep: bool of its shape; None where all are kept."""
        if not self.training or self._threshold == 0:
            return None
        n, c, h, w = x.shape
        lots = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        lots.random_(-(2**63), None)
        keep = lots.view(torch.int16)[: x.numel()] >= self._threshold - 2**15
        return keep.view(n, h, w, c).permute(0, 3, 1, 2)

    def masked(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """`x` with what was drawn dropped and the rest scaled up; its gradient the same way."""
        return x if keep is None else x * keep * (2**16 / (2**16 - self._threshold))

    def forward(self, x: Tensor) -> Tensor:
        """N C H W of any float type → the same."""
        # A GPU draws in no time, and a compiler would stop at our draw.
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        return self.masked(x, self.draw(x))


def pad_to_multiple(x: Tensor, multiple: int, *, at_least: int = 1) -> Tensor:
    """Grow H and W of N C H W on the right and below to a multiple, repeating the edge.

    Repeating works from a single pixel on, where mirroring needs more than it pads, and shows the
    network no dark frame that it never saw in training.

    Args:
        at_least: smallest H and W to come out, a multiple as well.
    """
    height, width = (max(side + -side % multiple, at_least) for side in x.shape[-2:])
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")


def he_uniform_(module: nn.Module) -> None:
    """He-uniform weights, U(-b, b) with b = sqrt(6 / fan_in), and zero biases for a convolution.

    He et al. 2015 (arXiv 1502.01852). A transposed convolution's fan_in is out_channels * k * k, as
    in Keras. Meant for `nn.Module.apply`; other layers are left alone.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""Building blocks shared by the models: normalization, dropout, padding, and initialization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and standard deviation of ImageNet's RGB values in 0..255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Normalize(nn.Module):
    """Normalize RGB by ImageNet's mean and standard deviation.

    The layer is part of the model, so training, prediction, and export cannot disagree. It takes
    N 3 H W uint8 or float in 0..255 and returns float of the same shape.
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
    """Dropout of single values, not of whole channels (Srivastava et al. 2014).

    On a CPU, torch's dropout draws one random number per value and takes as long as the preceding
    convolution. Here 16 random bits per value are enough, which rounds `p` to a multiple of
    1/65536.

    Args:
        p: probability of dropping a value, 0 <= p < 1.

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

    def forward(self, x: Tensor) -> Tensor:
        """N C H W of any float type → the same shape and type."""
        # On a GPU, drawing takes no measurable time. A compiler cannot trace `draw_mask`.
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        return self.apply_mask(x, self.draw_mask(x))

    def draw_mask(self, x: Tensor) -> Tensor | None:
        """Draw the values of `x`, N C H W, to keep: bool of the same shape, or None for all."""
        if not self.training or self._threshold == 0:
            return None
        n, c, h, w = x.shape
        random_bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        random_bits.random_(-(2**63), None)
        keep = random_bits.view(torch.int16)[: x.numel()] >= self._threshold - 2**15
        return keep.view(n, h, w, c).permute(0, 3, 1, 2)

    def apply_mask(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Zero the dropped values and scale up the others. Gradients take the same operation."""
        return x if keep is None else x * keep * (2**16 / (2**16 - self._threshold))


def pad_to_multiple(x: Tensor, multiple: int, *, min_size: int = 1) -> Tensor:
    """Pad H and W of N C H W on the right and bottom to a multiple by repeating the edge.

    Unlike reflection, replication works for a side of one pixel. Unlike zeros, it adds no dark
    border, which the network never sees in training.

    Args:
        min_size: smallest H and W of the result; a multiple of `multiple`.
    """
    height, width = (max(side + -side % multiple, min_size) for side in x.shape[-2:])
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")


def he_uniform_(module: nn.Module) -> None:
    """Initialize a convolution: weights from U(-b, b) with b = sqrt(6 / fan_in), zero biases.

    He et al. 2015 (arXiv 1502.01852). The fan_in of a transposed convolution is
    out_channels * k * k, as in Keras. Meant for `nn.Module.apply`; other layers do not change.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

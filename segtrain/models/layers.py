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


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Grow H and W on the right and below to a multiple, repeating the edge.

    Repeating works from a single pixel on, where mirroring needs more than it pads, and shows the
    network no dark frame that it never saw in training.
    """
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def he_uniform_(module: nn.Module) -> None:
    """He-uniform weights, U(-b, b) with b = sqrt(6 / fan_in), and zero biases for a convolution.

    He et al. 2015 (arXiv 1502.01852). A transposed convolution's fan_in is out_channels * k * k, as
    in Keras. Meant for `nn.Module.apply`; other layers are left alone.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

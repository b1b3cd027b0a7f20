"""U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597), padded and with batch norm."""

import torch
from torch import Tensor, nn

from segtrain.models.layers import Normalize, he_uniform_, pad_to_multiple


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """The paper's two 3x3 convolutions a level, each with batch norm and ReLU; H and W are kept."""
    return nn.Sequential(
        # Batch norm subtracts any bias again, so the convolutions have none.
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """A contracting path, a bottleneck and an expanding path with a skip at every level.

    With its defaults the channels run 64, 128, 256, 512, 1024 as in figure 1 of the paper, which is
    31,037,698 parameters.

    Args:
        num_classes: channels of the logits.
        base_channels: channels of the first level; every level doubles them.
        depth: number of halvings, at least 1.
    """

    def __init__(self, num_classes: int = 2, *, base_channels: int = 64, depth: int = 4) -> None:
        if base_channels < 1 or not 1 <= depth <= 8:
            raise ValueError("base_channels must be at least 1 and depth from 1 to 8")
        super().__init__()
        channels = [base_channels * 2**level for level in range(depth + 1)]
        self.normalize = Normalize()
        self.encoders = nn.ModuleList(
            double_conv(c_in, c_out)
            for c_in, c_out in zip([3, *channels[:-2]], channels[:-1], strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = double_conv(channels[-2], channels[-1])
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in reversed(channels[:-1])
        )
        self.decoders = nn.ModuleList(double_conv(2 * c, c) for c in reversed(channels[:-1]))
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        self.apply(he_uniform_)

    def forward(self, image: Tensor) -> Tensor:
        """N 3 H W RGB, uint8 or float in 0..255, any H and W → logits N num_classes H W."""
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2 ** len(self.encoders))
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([skips.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits[..., :height, :width]

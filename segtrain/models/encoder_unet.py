"""U-Net with a classification network as its contracting path."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models.encoders import Encoder, EncoderName, read_pretrained
from segtrain.models.layers import Dropout, Normalize, he_uniform_, pad_to_multiple
from segtrain.models.unet import NormKind, UpKind, double_conv, upsampling


class EncoderUNet(nn.Module):
    """An encoder and a U-Net decoder with a skip connection per encoder feature.

    If the encoder has no feature at full resolution, the first skip is the normalized image.

    Args:
        num_classes: channels of the logits.
        encoder: one of `segtrain.models.encoders.ENCODERS`.
        pretrained: source for `read_pretrained`; the constructor reads and downloads nothing.
        norm: normalization after the decoder's 3x3 convolutions.
        up: upsampling layers of the decoder.
        base_channels: channels of the decoder at full resolution; each halving doubles them.
        drop_rate: dropout probability on the coarsest feature.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        encoder: EncoderName,
        pretrained: bool | str = False,
        norm: NormKind = "batch",
        up: UpKind = "transposed",
        base_channels: int = 16,
        drop_rate: float = 0.0,
    ) -> None:
        if base_channels < 1:
            raise ValueError("base_channels must be at least 1")
        super().__init__()
        self.encoder_name, self.pretrained = encoder, pretrained
        self.encoder_frozen = False
        self.normalize = Normalize()
        self.encoder = Encoder(encoder)
        self.dropout = Dropout(drop_rate)

        *skips, deepest = [(output.channels, output.level) for output in self.encoder.outputs]
        if skips[0][1] > 0:
            skips.insert(0, (3, 0))
        self.multiple = 2 ** deepest[1]
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        channels, level = deepest
        for skip_channels, skip_level in reversed(skips):
            width = base_channels * 2**skip_level
            scale = 2 ** (level - skip_level)
            self.ups.append(upsampling(channels, width, up, scale=scale))
            self.decoders.append(double_conv(width + skip_channels, width, norm=norm))
            channels, level = width, skip_level
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.apply(he_uniform_)

    def forward(self, image: Tensor) -> Tensor:
        """N 3 H W RGB, uint8 or float in 0..255, any H and W → logits N num_classes H W."""
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), self.multiple, min_size=self.encoder.min_size)
        *skips, deepest = self.encoder(x)
        if len(skips) < len(self.ups):
            skips.insert(0, x)
        x = self.dropout(deepest)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            skip = skips.pop()
            x = up(x)
            if x.shape[-2:] != skip.shape[-2:]:  # AlexNet's sizes are not exact halvings
                x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
            x = decoder(torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(x)
        return logits[..., :height, :width]

    def read_pretrained(self) -> dict[str, Tensor] | None:
        """Read the encoder weights given by `pretrained`; None if it is false.

        Raises:
            ResourceError, CheckpointError: see `segtrain.models.encoders.read_pretrained`.
        """
        if self.pretrained is False:
            return None
        return read_pretrained(self.encoder_name, self.pretrained)

    def freeze_encoder(self, frozen: bool) -> None:
        """Freeze the weights and running statistics of the encoder, or unfreeze them."""
        self.encoder_frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "EncoderUNet":
        """Set training mode as `nn.Module.train`; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

"""U-Net with an encoder as contracting path, and the choice between the two U-Nets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models.encoders import Encoder, EncoderName, read_pretrained
from segtrain.models.layers import Dropout, Normalize, he_uniform_, pad_to_multiple
from segtrain.models.unet import NormKind, Padding, UNet, UpKind, double_conv, upsampling


class EncoderUNet(nn.Module):
    """An encoder's features, from the coarsest up, each joined with the next finer ones.

    Where the encoder has no features at full resolution, the normalised picture takes their place.

    Args:
        num_classes: channels of the logits.
        encoder: one of `segtrain.models.encoders.ENCODERS`.
        pretrained: what `read_pretrained` reads; building alone reads and downloads nothing.
        norm: what follows the decoder's 3x3 convolutions.
        up: how H and W are enlarged.
        base_channels: of the decoder at full resolution; every halving doubles them.
        drop_rate: probability of dropout on the coarsest features.
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
        x = pad_to_multiple(self.normalize(image), self.multiple, at_least=self.encoder.min_size)
        *skips, deepest = self.encoder(x)
        if len(skips) < len(self.ups):
            skips.insert(0, x)
        x = self.dropout(deepest)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            skip = skips.pop()
            x = up(x)
            if x.shape[-2:] != skip.shape[-2:]:  # after an odd stride
                x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
            x = decoder(torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(x)
        return logits[..., :height, :width]

    def read_pretrained(self) -> dict[str, Tensor] | None:
        """The weights that `pretrained` names, checked against the encoder; None where it is false.

        Raises:
            ResourceError, CheckpointError: as `segtrain.models.encoders.read_pretrained`.
        """
        if self.pretrained is False:
            return None
        return read_pretrained(self.encoder_name, self.pretrained)

    def freeze_encoder(self, frozen: bool) -> None:
        """Keep the encoder's weights and running statistics as they are, or let them learn."""
        self.encoder_frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "EncoderUNet":
        """As everywhere in torch; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self


def unet(
    num_classes: int = 2,
    *,
    encoder: EncoderName | None = None,
    pretrained: bool | str = False,
    padding: Padding = "same",
    norm: NormKind = "batch",
    up: UpKind = "transposed",
    base_channels: int | None = None,
    depth: int | None = None,
    drop_rate: float = 0.0,
) -> nn.Module:
    """The U-Net of the paper's shape or, with `encoder`, on a classification network.

    `depth` (4) and `padding` belong to the former, `pretrained` to the latter; `base_channels` is
    64 without an encoder and 16 with one.

    Raises:
        ValueError: arguments that do not go together.
    """
    if encoder is None:
        if pretrained is not False:
            raise ValueError("pretrained needs an encoder, e.g. model.encoder=resnet34")
        return UNet(
            num_classes,
            padding=padding,
            norm=norm,
            up=up,
            base_channels=64 if base_channels is None else base_channels,
            depth=4 if depth is None else depth,
            drop_rate=drop_rate,
        )
    if depth is not None or padding != "same":
        raise ValueError("an encoder brings its own depth and padding; leave these two out")
    return EncoderUNet(
        num_classes,
        encoder=encoder,
        pretrained=pretrained,
        norm=norm,
        up=up,
        base_channels=16 if base_channels is None else base_channels,
        drop_rate=drop_rate,
    )

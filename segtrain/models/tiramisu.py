"""FC-DenseNet, the One Hundred Layers Tiramisu (Jégou et al. 2017, arXiv 1611.09326)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from segtrain.models.dense_block import DenseBlock
from segtrain.models.layers import Dropout, Normalize, he_uniform_, pad_to_multiple

# glibc gives memory up to this size from a heap that it keeps.
_REUSED_BYTES = 32 * 2**20


class TransitionDown(nn.Module):
    """BN, ReLU, 1x1 convolution, dropout, 2x2 max-pooling (table 1); the channels are kept."""

    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1)
        self.dropout = Dropout(drop_rate)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.conv(self.norm(x).relu_()))
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
        memory_efficient: in training, make the dense blocks' BN and ReLU again in the backward pass
            instead of keeping their results: the same gradients from a quarter of the memory.
            "auto" does so on a CPU, and on a GPU where that is faster or memory would run short.
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
        memory_efficient: bool | Literal["auto"] = "auto",
    ) -> None:
        if len(down_blocks) != len(up_blocks) or not 1 <= len(down_blocks) <= 8:
            raise ValueError("down_blocks and up_blocks must be equally many, from 1 to 8")
        if min(growth_rate, bottleneck, stem_channels, *down_blocks, *up_blocks) < 1:
            raise ValueError("growth_rate, stem_channels and all layer counts must be at least 1")
        # A stranger's checkpoint names these numbers too, and every layer costs memory here.
        if sum((*down_blocks, bottleneck, *up_blocks)) > 1000:
            raise ValueError("more than 1000 layers are not supported")
        super().__init__()
        self.memory_efficient = memory_efficient
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
        at_once = self._at_once(image)
        if at_once is None:
            return self._logits(image)
        return torch.cat([self._logits(part) for part in torch.split(image, at_once)])

    def _logits(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2 ** len(self.downs))
        x = self.stem(x)
        # A compiler keeps what it likes, and would stop at a look at the GPU's memory.
        if self.training and not torch.compiler.is_compiling():
            self._choose_what_to_keep(x)
        skips = []
        for block, down in zip(self.down_blocks, self.downs, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        new = self.bottleneck(x)[:, self.bottleneck.in_channels :]
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            features = block(up(new), skips.pop())
            new = features[:, block.in_channels :]
        # Only the last block hands on its input, too.
        logits: Tensor = self.head(features)
        return logits[..., :height, :width]

    def _at_once(self, image: Tensor) -> int | None:
        """How many images to take at a time: None, all of them, but for evaluation on a CPU.

        There the memory of small tensors is used again, while large ones are fresh from the system
        and have to be cleared; that costs more than a batch saves.
        """
        by_batch = self.bottleneck.layers[0].norm.training
        if torch.compiler.is_compiling() or by_batch or torch.is_grad_enabled():
            return None  # A compiler would fix the number of images for good.
        if image.device.type != "cpu":
            return None
        bytes_an_image = image.shape[2] * image.shape[3] * self.head.in_channels * 2
        return max(1, _REUSED_BYTES // bytes_an_image)

    def _choose_what_to_keep(self, x: Tensor) -> None:
        """Set the dense blocks' `memory_efficient`; `x` is what the first one gets."""
        choice = self.memory_efficient
        if choice == "auto" and x.device.type == "cuda":
            # Room for the rest of the network is left.
            choice = "auto" if self._bytes_to_keep(x) < _free_bytes(x.device) / 2 else True
        for block in self._blocks():
            block.memory_efficient = choice

    def _blocks(self) -> list[DenseBlock]:
        """From the largest images down and up again."""
        return [*self.down_blocks, self.bottleneck, *self.up_blocks]

    def _bytes_to_keep(self, x: Tensor) -> int:
        """What the dense blocks leave for the backward pass in the paper's form.

        Each layer keeps all features before it twice: concatenated, and after BN and ReLU.
        """
        depth = len(self.downs)
        values_a_pixel = 0.0
        for i, block in enumerate(self._blocks()):
            level = min(i, 2 * depth - i)
            values_a_pixel += sum(2 * old.stop for old, _ in block.channels()) / 4**level
        num_pixels = x.shape[0] * x.shape[2] * x.shape[3]
        return int(values_a_pixel * num_pixels * x.element_size())


def _free_bytes(device: torch.device) -> int:
    """What a GPU can still give: free for all, or held by this process and not in use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


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

"""FC-DenseNet, the One Hundred Layers Tiramisu (Jégou et al. 2017, arXiv 1611.09326)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from segtrain.models.dense_block import DenseBlock
from segtrain.models.layers import Dropout, Normalize, he_uniform_, pad_to_multiple

# Up to this size, glibc allocates from a heap that it keeps.
_REUSED_BYTES = 32 * 2**20


class TransitionDown(nn.Module):
    """BN, ReLU, 1x1 convolution, dropout, and 2x2 max pooling (table 1); C channels in and out."""

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
    """3x3 transposed convolution with stride 2 (table 1): H and W double; C channels in and out.

    Its input is only the new features of the preceding block. No ReLU follows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class FCDenseNet(nn.Module):
    """Fully convolutional DenseNet (section 3). The defaults give FC-DenseNet103 (table 2).

    For 2 classes, FC-DenseNet103 has 9,319,778 parameters, 67 has 3,460,642, and 56 has 1,375,058.

    Args:
        num_classes: channels of the logits.
        growth_rate: k, new channels per layer.
        down_blocks: layers of each dense block on the downsampling path; each block is followed by
            a transition down.
        bottleneck: layers of the dense block between the two paths.
        up_blocks: layers of each dense block on the upsampling path; as many blocks as
            `down_blocks`.
        stem_channels: channels of the first 3x3 convolution.
        drop_rate: dropout probability after each convolution of a dense layer or transition down.
        memory_efficient: in training, recompute the BN and ReLU of dense blocks in the backward
            pass instead of saving their results: the same gradients with a quarter of the memory.
            "auto" recomputes on a CPU, and on a GPU if that is faster or memory would run short.

    Raises:
        ValueError: an argument is out of range.
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
            raise ValueError("down_blocks and up_blocks must have the same length, from 1 to 8")
        if min(growth_rate, bottleneck, stem_channels, *down_blocks, *up_blocks) < 1:
            raise ValueError("growth_rate, stem_channels and all layer counts must be at least 1")
        # An untrusted checkpoint can contain these numbers, and each layer allocates memory here.
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
        chunk_size = self._chunk_size(image)
        if chunk_size is None:
            return self._logits(image)
        return torch.cat([self._logits(chunk) for chunk in torch.split(image, chunk_size)])

    def _logits(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2 ** len(self.downs))
        x = self.stem(x)
        # A compiler decides itself what to save, and querying GPU memory would break its graph.
        if self.training and not torch.compiler.is_compiling():
            self._set_memory_efficient(x)
        skips = []
        for block, down in zip(self.down_blocks, self.downs, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        new = self.bottleneck(x)[:, self.bottleneck.in_channels :]
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            features = block(up(new), skips.pop())
            new = features[:, block.in_channels :]
        # The head also gets the input of the last block.
        logits: Tensor = self.head(features)
        return logits[..., :height, :width]

    def _chunk_size(self, image: Tensor) -> int | None:
        """Images per forward pass; None, all of them, except for evaluation on a CPU.

        There, the memory of small tensors is reused, but large tensors get new pages from the
        system that must be cleared, which costs more than a larger batch saves.
        """
        uses_batch_stats = self.bottleneck.layers[0].norm.training
        if torch.compiler.is_compiling() or uses_batch_stats or torch.is_grad_enabled():
            return None  # A compiler would make the batch size a constant.
        if image.device.type != "cpu":
            return None
        bytes_per_image = image.shape[2] * image.shape[3] * self.head.in_channels * 2
        return max(1, _REUSED_BYTES // bytes_per_image)

    def _set_memory_efficient(self, x: Tensor) -> None:
        """Set `memory_efficient` of the dense blocks; `x` is the input of the first one."""
        value = self.memory_efficient
        if value == "auto" and x.device.type == "cuda":
            # Half of the memory is left for the rest of the network.
            value = "auto" if self._saved_bytes(x) < _available_bytes(x.device) / 2 else True
        for block in self._blocks():
            block.memory_efficient = value

    def _blocks(self) -> list[DenseBlock]:
        """The dense blocks in order of execution."""
        return [*self.down_blocks, self.bottleneck, *self.up_blocks]

    def _saved_bytes(self, x: Tensor) -> int:
        """Bytes that the plain form of the dense blocks saves for the backward pass.

        Each layer saves its input features twice: concatenated, and after BN and ReLU.
        """
        depth = len(self.downs)
        values_per_pixel = 0.0
        for i, block in enumerate(self._blocks()):
            level = min(i, 2 * depth - i)
            values_per_pixel += sum(2 * old.stop for old, _ in block.channels()) / 4**level
        num_pixels = x.shape[0] * x.shape[2] * x.shape[3]
        return int(values_per_pixel * num_pixels * x.element_size())


def _available_bytes(device: torch.device) -> int:
    """GPU memory that is free, or reserved by this process and unused."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


# The three networks of the paper (table 3). Callers can override any argument of FCDenseNet.
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

"""Dense blocks (Jégou et al. 2017, arXiv 1611.09326, figure 2 and table 1)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from segtrain.models.growth import Growth, Plan, join, new_features, running_norm
from segtrain.models.layers import Dropout


class DenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution, dropout: C channels in, k new ones out."""

    def __init__(self, in_channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth_rate, 3, padding=1)
        self.dropout = Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """The layer as the paper writes it."""
        return self.dropout(self.conv(torch.relu(self.norm(x))))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Layers that each see the block's input and all features made before.

    Attributes:
        recompute: the backward pass makes BN and ReLU anew instead of keeping their results; the
            convolutions are not computed twice. The gradients are the same.
    """

    layers: Sequence[DenseLayer]

    def __init__(
        self, in_channels: int, num_layers: int, growth_rate: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.in_channels, self.growth_rate = in_channels, growth_rate
        self.out_channels = in_channels + num_layers * growth_rate
        self.recompute = False
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            DenseLayer(in_channels + i * growth_rate, growth_rate, drop_rate)
            for i in range(num_layers)
        )

    def forward(self, *parts: Tensor) -> Tensor:
        """Parts of the input, N C H W with in_channels together → N out_channels H W.

        The input comes first, the new features of each layer behind it.
        """
        by_batch = self.layers[0].norm.training
        wants_grad = torch.is_grad_enabled()
        # A compiler fuses the textbook's form itself, and training by running statistics is too
        # rare a wish to be fast.
        if torch.compiler.is_compiling() or (not by_batch and (wants_grad or self.training)):
            return self._as_in_the_paper(*parts)
        device_type = parts[0].device.type
        dtype = parts[0].dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            grow = self._grow_by_batch if by_batch else self._grow
            return grow([part.to(dtype) for part in parts])

    def channels(self) -> Iterator[tuple[slice, slice]]:
        """For each layer the channels that it reads and those that it writes."""
        for end in range(self.in_channels, self.out_channels, self.growth_rate):
            yield slice(0, end), slice(end, end + self.growth_rate)

    def _as_in_the_paper(self, *parts: Tensor) -> Tensor:
        features = torch.cat(parts, dim=1)
        for layer in self.layers:
            features = torch.cat([features, layer(features)], dim=1)
        return features

    def _grow(self, parts: list[Tensor]) -> Tensor:
        """By running statistics, without dropout and gradients."""
        features = join(parts, self.out_channels)
        for layer, (old, new) in zip(self.layers, self.channels(), strict=True):
            y = new_features(features[:, old], running_norm(layer.norm), *layer.conv.parameters())
            features[:, new] = y
        return features

    def _grow_by_batch(self, parts: list[Tensor]) -> Tensor:
        """By statistics of the batch, with a way back for the gradients."""
        weights = [
            weight
            for layer in self.layers
            for weight in (layer.norm.weight, layer.norm.bias, layer.conv.weight, layer.conv.bias)
        ]
        plan = Plan(
            channels=list(self.channels()),
            eps=self.layers[0].norm.eps,
            dropouts=[layer.dropout for layer in self.layers],
            recompute=self.recompute or not torch.is_grad_enabled(),
        )
        features, mean, var = Growth.apply(plan, len(parts), *parts, *weights)
        num_values = features.numel() // self.out_channels
        unbiased = var * (num_values / max(num_values - 1, 1))
        for layer, (old, _) in zip(self.layers, self.channels(), strict=True):
            if layer.norm.track_running_stats:
                _update_running_statistics(layer.norm, mean[old], unbiased[old])
        return features  # type: ignore[no-any-return]


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """As torch's own batch norm does in training."""
    norm.num_batches_tracked += 1  # type: ignore[operator, assignment]
    share = norm.momentum
    if share is None:  # the mean over all batches so far
        share = 1 / int(norm.num_batches_tracked)  # type: ignore[arg-type]
    for running, now in ((norm.running_mean, mean), (norm.running_var, var)):
        running.lerp_(now.to(running.dtype), share)  # type: ignore[union-attr]

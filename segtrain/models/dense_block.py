"""Dense blocks (Jégou et al. 2017, arXiv 1611.09326, figure 2 and table 1)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from segtrain.models.growth import Growth, Norm, Plan, join, measure, measure_parts, new_features
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
        # A compiler fuses the textbook's form itself, and gradients through running statistics are
        # too rare a wish to be fast.
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not self.training):
            return self._as_in_the_paper(*parts)
        device_type = parts[0].device.type
        dtype = parts[0].dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            grow = self._grow_and_remember if self.training else self._grow
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
        """For evaluation: by running statistics or, where the norms are in training mode, by those
        of the batch.
        """
        features = join(parts, self.out_channels)
        by_batch = self.layers[0].norm.training
        if by_batch:
            mean, var = measure_parts(parts, self.out_channels)
        for layer, (old, new) in zip(self.layers, self.channels(), strict=True):
            norm, conv = layer.norm, layer.conv
            moments = (mean[old], var[old]) if by_batch else (norm.running_mean, norm.running_var)
            affine = Norm(norm.weight, norm.bias, *moments, norm.eps)  # type: ignore[arg-type]
            y = new_features(features[:, old], affine, conv.weight, conv.bias)  # type: ignore[arg-type]
            features[:, new] = y
            if by_batch:
                mean[new], var[new] = measure(y)
        if by_batch and self.layers[0].norm.track_running_stats:
            self._update_running_statistics(features, mean, var)
        return features

    def _grow_and_remember(self, parts: list[Tensor]) -> Tensor:
        """For training: with a way back for the gradients; updates the running statistics."""
        weights = [
            weight
            for layer in self.layers
            for weight in (layer.norm.weight, layer.norm.bias, layer.conv.weight, layer.conv.bias)
        ]
        plan = Plan(
            channels=list(self.channels()),
            eps=self.layers[0].norm.eps,
            dropouts=[layer.dropout for layer in self.layers],
            recompute=self.recompute,
        )
        features, mean, var = Growth.apply(plan, len(parts), *parts, *weights)
        self._update_running_statistics(features, mean, var)
        return features  # type: ignore[no-any-return]

    def _update_running_statistics(self, features: Tensor, mean: Tensor, var: Tensor) -> None:
        num_values = features.numel() // self.out_channels
        unbiased = var * (num_values / max(num_values - 1, 1))
        for layer, (old, _) in zip(self.layers, self.channels(), strict=True):
            _update(layer.norm, mean[old], unbiased[old])


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """Running statistics as torch's own batch norm updates them in training."""
    norm.num_batches_tracked += 1  # type: ignore[operator, assignment]
    share = norm.momentum
    if share is None:  # the mean over all batches so far
        share = 1 / int(norm.num_batches_tracked)  # type: ignore[arg-type]
    for running, now in ((norm.running_mean, mean), (norm.running_var, var)):
        running.lerp_(now.to(running.dtype), share)  # type: ignore[union-attr]

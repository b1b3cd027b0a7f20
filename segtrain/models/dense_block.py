"""Dense blocks (Jégou et al. 2017, arXiv 1611.09326, figure 2 and table 1)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from segtrain.models import dense_block_cuda, dense_layer_aten
from segtrain.models.dense_block_fused import (
    DenseBlockFunction,
    LayerOps,
    LayerPlan,
    Moments,
    autocast_dtype,
    join,
)
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
        return self.dropout(self.conv(self.norm(x).relu_()))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Layers that each see the block's input and all features made before.

    The block computes the same in two forms: as the paper writes it, and fused
    (`dense_block_fused`). A CPU always takes the fused form, but for training by running
    statistics. A GPU evaluates by the paper's form and trains by the faster one. A compiler gets
    the paper's form, which it fuses itself.

    Attributes:
        memory_efficient: in training, keep little for the backward pass and make BN and ReLU again
            there; the convolutions are not computed twice and the gradients are the same. "auto"
            does so on a CPU, and on a GPU where that is the faster form.
    """

    layers: Sequence[DenseLayer]

    def __init__(
        self, in_channels: int, num_layers: int, growth_rate: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.in_channels, self.growth_rate = in_channels, growth_rate
        self.out_channels = in_channels + num_layers * growth_rate
        self.memory_efficient: bool | Literal["auto"] = "auto"
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            DenseLayer(in_channels + i * growth_rate, growth_rate, drop_rate)
            for i in range(num_layers)
        )

    def forward(self, *parts: Tensor) -> Tensor:
        """Parts of the input, N C H W with in_channels together → N out_channels H W.

        The input comes first, the new features of each layer behind it.
        """
        ops = self._ops(parts)
        if ops is None:
            return self.as_in_the_paper(*parts)
        device_type, dtype = parts[0].device.type, autocast_dtype(parts[0])
        with torch.autocast(device_type, enabled=False):
            cast = [part.to(dtype) for part in parts]
            if not self.layers[0].norm.training:
                return self._evaluate(cast)
            features, moments = self.train_fused(ops, cast)
            self._update_running_stats(moments, features.numel() // self.out_channels)
            return features

    def _ops(self, parts: Sequence[Tensor]) -> LayerOps | None:
        """What the fused form is computed with; None: take the paper's form."""
        if torch.compiler.is_compiling():
            return None
        by_batch, wants_grad = self.layers[0].norm.training, torch.is_grad_enabled()
        if parts[0].device.type == "cuda":
            return dense_block_cuda.training_ops(self, parts) if by_batch and wants_grad else None
        if not by_batch and (wants_grad or self.training):
            return None
        return dense_layer_aten

    def channels(self) -> list[tuple[slice, slice]]:
        """For each layer the channels that it reads and those that it writes."""
        ends = range(self.in_channels, self.out_channels, self.growth_rate)
        return [(slice(0, end), slice(end, end + self.growth_rate)) for end in ends]

    def as_in_the_paper(self, *parts: Tensor) -> Tensor:
        """The plain form: every layer gets all features before it, concatenated."""
        features = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for layer in self.layers:
            features = torch.cat([features, layer(features)], dim=1)
        return features

    def train_fused(self, ops: LayerOps, parts: list[Tensor]) -> tuple[Tensor, Moments]:
        """Features and their moments by statistics of the batch, with gradients."""
        weights = [
            weight
            for layer in self.layers
            for weight in (layer.norm.weight, layer.norm.bias, layer.conv.weight, layer.conv.bias)
        ]
        plans = [
            LayerPlan(old, new, layer.norm.eps, layer.dropout)
            for layer, (old, new) in zip(self.layers, self.channels(), strict=True)
        ]
        recompute = bool(self.memory_efficient) or not torch.is_grad_enabled()
        features, mean, var = DenseBlockFunction.apply(
            ops, plans, recompute, len(parts), *parts, *weights
        )
        return features, Moments(mean, var)

    def _evaluate(self, parts: list[Tensor]) -> Tensor:
        """By running statistics, without dropout and gradients."""
        features = join(parts, self.out_channels)
        for layer, (old, new) in zip(self.layers, self.channels(), strict=True):
            norm = dense_layer_aten.running_norm(layer.norm)
            features[:, new] = dense_layer_aten.new_features(
                features[:, old], norm, *layer.conv.parameters()
            )
        return features

    @torch.no_grad()
    def _update_running_stats(self, moments: Moments, num_values: int) -> None:
        """As torch's own batch norm does in training, for all layers at once."""
        norms = [layer.norm for layer in self.layers]
        if not norms[0].track_running_stats:
            return
        unbiased = moments.var * (num_values / max(num_values - 1, 1))
        running, now, numbers = [], [], []
        for norm, (old, _) in zip(norms, self.channels(), strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            running += [norm.running_mean, norm.running_var]
            now += [m[old].to(norm.running_mean.dtype) for m in (moments.mean, unbiased)]
            numbers.append(norm.num_batches_tracked)
        torch._foreach_add_(numbers, 1)
        momentum = norms[0].momentum
        if momentum is not None:
            torch._foreach_lerp_(running, now, momentum)
            return
        # The mean over all batches so far; their number stays on the device.
        for i, (r, n) in enumerate(zip(running, now, strict=True)):
            r.lerp_(n, 1 / numbers[i // 2].to(r.dtype))

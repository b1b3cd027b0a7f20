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
    allocate_features,
    autocast_dtype,
)
from segtrain.models.layers import Dropout


class DenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution, and dropout: C channels in, k new channels out."""

    def __init__(self, in_channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth_rate, 3, padding=1)
        self.dropout = Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """The layer as in the paper."""
        return self.dropout(self.conv(self.norm(x).relu_()))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Dense layers; each reads the input of the block and the features of all preceding layers.

    There are two equivalent forms: the plain form of the paper and the fused form
    (`dense_block_fused`). A CPU uses the fused form, except in training or with gradients while BN
    uses running statistics. A GPU uses the plain form in evaluation and the faster form in
    training. A compiler gets the plain form and fuses it itself.

    Attributes:
        memory_efficient: in training, save little for the backward pass and recompute BN and ReLU
            there. Convolutions are not recomputed, and the gradients are the same. "auto"
            recomputes on a CPU, and on a GPU if that is the faster form.
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
        """Parts of the input, N C H W with in_channels in total → N out_channels H W.

        The output starts with the input, followed by the new features of each layer.
        """
        ops = self._choose_ops(parts)
        if ops is None:
            return self.forward_plain(*parts)
        device_type, dtype = parts[0].device.type, autocast_dtype(parts[0])
        with torch.autocast(device_type, enabled=False):
            cast = [part.to(dtype) for part in parts]
            if not self.layers[0].norm.training:
                return self._evaluate(cast)
            features, moments = self.train_fused(ops, cast)
            self._update_running_stats(moments, features.numel() // self.out_channels)
            return features

    def forward_plain(self, *parts: Tensor) -> Tensor:
        """The plain form: each layer reads the concatenation of all preceding features."""
        features = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for layer in self.layers:
            features = torch.cat([features, layer(features)], dim=1)
        return features

    def train_fused(self, ops: LayerOps, parts: list[Tensor]) -> tuple[Tensor, Moments]:
        """The fused form with batch statistics: features, with gradients, and their moments."""
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

    def channels(self) -> list[tuple[slice, slice]]:
        """For each layer, the channels that it reads and the channels that it writes."""
        ends = range(self.in_channels, self.out_channels, self.growth_rate)
        return [(slice(0, end), slice(end, end + self.growth_rate)) for end in ends]

    def _choose_ops(self, parts: Sequence[Tensor]) -> LayerOps | None:
        """Choose the implementation of the fused form; None means the plain form."""
        if torch.compiler.is_compiling():
            return None
        batch_stats, with_grad = self.layers[0].norm.training, torch.is_grad_enabled()
        if parts[0].device.type == "cuda":
            return dense_block_cuda.training_ops(self, parts) if batch_stats and with_grad else None
        if not batch_stats and (with_grad or self.training):
            return None
        return dense_layer_aten

    def _evaluate(self, parts: list[Tensor]) -> Tensor:
        """The fused form with running statistics, without dropout and gradients."""
        features = allocate_features(parts, self.out_channels)
        for layer, (old, new) in zip(self.layers, self.channels(), strict=True):
            norm = dense_layer_aten.running_norm(layer.norm)
            features[:, new] = dense_layer_aten.bn_relu_conv(
                features[:, old], norm, *layer.conv.parameters()
            )
        return features

    @torch.no_grad()
    def _update_running_stats(self, moments: Moments, num_values: int) -> None:
        """Update the running statistics of all layers at once, as torch's batch norm does."""
        norms = [layer.norm for layer in self.layers]
        if not norms[0].track_running_stats:
            return
        unbiased = moments.var * (num_values / max(num_values - 1, 1))
        running, current, counts = [], [], []
        for norm, (old, _) in zip(norms, self.channels(), strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            running += [norm.running_mean, norm.running_var]
            current += [m[old].to(norm.running_mean.dtype) for m in (moments.mean, unbiased)]
            counts.append(norm.num_batches_tracked)
        torch._foreach_add_(counts, 1)
        momentum = norms[0].momentum
        if momentum is not None:
            torch._foreach_lerp_(running, current, momentum)
            return
        # The mean over all batches so far. The counts stay on the device.
        for i, (r, c) in enumerate(zip(running, current, strict=True)):
            r.lerp_(c, 1 / counts[i // 2].to(r.dtype))

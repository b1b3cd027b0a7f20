"""Training of a dense block with a fraction of the memory traffic of the plain form.

In a dense block, each layer normalizes all preceding features. In the plain form, each layer copies
these features (concatenation) and computes their statistics again (batch norm). The fused form
keeps all features of a block in one tensor; each layer reads from it and writes its new features
into it. The mean and variance of a feature map are computed once, when the map is written, because
they are the same for all later layers.

Two modules implement the layers: `dense_layer_aten` calls torch's operators, on a CPU on strips of
the image that fit into its caches. `dense_layer_triton` has GPU kernels for both passes.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from segtrain.models.layers import Dropout

# Largest growth rate that the Triton kernels support: the width of a tensor core's matrix product.
MAX_GROWTH = 16


class LayerWeights(NamedTuple):
    """Weights of the batch norm and the convolution of one layer, or their gradients."""

    norm_weight: Tensor
    norm_bias: Tensor
    conv_weight: Tensor
    conv_bias: Tensor


class LayerPlan(NamedTuple):
    """One layer without its weights; it reads the channels `old` and writes the channels `new`."""

    old: slice
    new: slice
    eps: float
    dropout: Dropout


class Moments(NamedTuple):
    """Mean and biased variance of each channel of a block, or the gradients of both: float32."""

    mean: Tensor
    var: Tensor


class LayerOps(Protocol):
    """Forward and backward pass of one layer. Features are N C H W, channels_last."""

    def draw_dropout(self, layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
        """Draw the dropout of each layer: a mask or a seed for both passes, or None."""
        ...

    def forward_layer(
        self,
        layer: LayerPlan,
        features: Tensor,
        moments: Moments,
        weights: LayerWeights,
        dropout: Tensor | None,
        *,
        recompute: bool,
    ) -> list[Tensor]:
        """Write the new features and their moments; return extra tensors for the backward pass."""
        ...

    def backward_layer(
        self,
        layer: LayerPlan,
        features: Tensor,
        moments: Moments,
        weights: LayerWeights,
        dropout: Tensor | None,
        saved: list[Tensor],
        grad: Tensor,
        moment_grads: Moments,
    ) -> LayerWeights:
        """Add this layer's contribution to the gradients of the old features and their moments.

        Args:
            saved: what `forward_layer` returned.
            grad: gradient of the features. For the new features it does not yet include the
                contribution through their moments; this method adds that.

        Returns:
            The gradients of the weights.
        """
        ...

    def input_grads(
        self, features: Tensor, moments: Moments, grad: Tensor, moment_grads: Moments,
        part_channels: Sequence[int],
    ) -> list[Tensor]:  # fmt: skip
        """Gradients of the parts of the input, including the contribution through their moments."""
        ...


class DenseBlockFunction(torch.autograd.Function):
    """A dense block in training mode, forward and backward.

    The gradient of a feature map is a sum over the layers that read it. Each layer contributes in
    three ways: through the values, and through the mean and the variance, which all layers share.
    The contributions through mean and variance are summed per channel. They are added to the
    gradient of the feature map once, after all layers that read it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: LayerOps,
        layers: Sequence[LayerPlan],
        recompute: bool,
        num_parts: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Parts of the input and four weights per layer → features, their mean and variance."""
        parts, weights = tensors[:num_parts], tensors[num_parts:]
        num_channels = layers[-1].new.stop
        features = allocate_features(parts, num_channels)
        moments = _allocate_moments(parts, num_channels)
        dropouts = ops.draw_dropout(layers, features)
        saved = []
        for layer, own, dropout in zip(layers, _by_layer(weights), dropouts, strict=True):
            saved.append(
                ops.forward_layer(layer, features, moments, own, dropout, recompute=recompute)
            )
        ctx.ops, ctx.layers, ctx.part_channels = ops, layers, [part.shape[1] for part in parts]
        ctx.num_saved = [len(tensors) for tensors in saved]
        ctx.save_for_backward(features, *moments, *weights, *dropouts, *chain.from_iterable(saved))
        ctx.mark_non_differentiable(*moments)
        return features, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_features: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments of `forward`."""
        ops: LayerOps = ctx.ops
        n = len(ctx.layers)
        features, mean, var, *rest = ctx.saved_tensors
        moments = Moments(mean, var)
        weights, dropouts, saved = rest[: 4 * n], rest[4 * n : 5 * n], rest[5 * n :]
        # A copy, because the layers add their contributions in place.
        grad = grad_features.clone(memory_format=torch.channels_last)
        moment_grads = Moments(*torch.zeros(2, *mean.shape, dtype=mean.dtype, device=mean.device))

        weight_grads: list[Tensor] = []
        layers = zip(ctx.layers, _by_layer(weights), dropouts, ctx.num_saved, strict=True)
        for layer, own, dropout, num_saved in reversed(list(layers)):
            activations = [saved.pop() for _ in range(num_saved)][::-1]
            weight_grads[:0] = ops.backward_layer(
                layer, features, moments, own, dropout, activations, grad, moment_grads
            )
        part_grads = ops.input_grads(features, moments, grad, moment_grads, ctx.part_channels)
        return None, None, None, None, *part_grads, *weight_grads


def allocate_features(parts: Sequence[Tensor], num_channels: int) -> Tensor:
    """Allocate all features of a block, channels_last, and write its input at the front."""
    features = empty_channels_last(parts[0], num_channels)
    torch.cat(list(parts), dim=1, out=features[:, : sum(part.shape[1] for part in parts)])
    return features


def _allocate_moments(parts: Sequence[Tensor], num_channels: int) -> Moments:
    """Allocate the moments of all features of a block and write those of its input at the front."""
    moments = torch.cat([torch.stack(channel_moments(part)) for part in parts], dim=1)
    return Moments(*F.pad(moments, (0, num_channels - moments.shape[1])))


def _by_layer(weights: Sequence[Tensor]) -> list[LayerWeights]:
    return [LayerWeights(*weights[i : i + 4]) for i in range(0, len(weights), 4)]


def empty_channels_last(x: Tensor, num_channels: int) -> Tensor:
    """An uninitialized channels_last tensor like `x` but with `num_channels` channels."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, num_channels).permute(0, 3, 1, 2)


def channel_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, in float32 for the half precisions."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    # The arguments only set the dtype of the result; with momentum 0 they do not change.
    return Moments(*torch.batch_norm_update_stats(x, mean, var, momentum=0.0))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast computes convolutions of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype

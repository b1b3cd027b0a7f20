"""A dense block in training without most of the traffic and memory of its textbook form.

In a dense block every layer normalizes all features made before it. Written down plainly, each
layer copies them (concatenation) and measures them again (batch norm). Here a block's features live
in one tensor that every layer reads from and writes its share into, and a feature map is measured
once, when it is made: all later layers see the same map, so the same mean and variance.

What a layer computes is up to the device: `dense_layer_aten` calls torch's operators, on strips of
the image that fit a CPU's caches; `dense_layer_triton` has a kernel for each pass on a GPU.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from segtrain.models.layers import Dropout

# New channels of a layer that Triton's kernels can make, at most: the width of a tensor core's
# product.
MAX_GROWTH = 16


class LayerWeights(NamedTuple):
    """Batch norm's and the convolution's weights of one layer."""

    norm_weight: Tensor
    norm_bias: Tensor
    conv_weight: Tensor
    conv_bias: Tensor


class LayerPlan(NamedTuple):
    """What a layer is beside its weights: `old` channels are read, `new` ones are written."""

    old: slice
    new: slice
    eps: float
    dropout: Dropout


class Moments(NamedTuple):
    """Mean and biased variance of every channel of a block, or the gradients of both: float32."""

    mean: Tensor
    var: Tensor


class LayerOps(Protocol):
    """The two passes of a layer on some device. Features are N C H W, channels_last."""

    def draw_dropout(self, layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
        """What each layer's dropout is decided by, in both passes."""
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
        """Write the new features and their moments; return what the backward pass needs more."""
        ...

    def backward_layer(
        self,
        layer: LayerPlan,
        features: Tensor,
        moments: Moments,
        weights: LayerWeights,
        dropout: Tensor | None,
        kept: list[Tensor],
        grad: Tensor,
        moment_grads: Moments,
    ) -> LayerWeights:
        """Add the layer's share to the gradients of the old features and of their moments.

        Args:
            grad: of the features. The share of the new ones' moments is still to be added to it.

        Returns:
            The gradients of the weights.
        """
        ...

    def input_grads(
        self, features: Tensor, moments: Moments, grad: Tensor, moment_grads: Moments,
        part_channels: Sequence[int],
    ) -> list[Tensor]:  # fmt: skip
        """The gradients of a block's inputs, with what reaches them by their moments."""
        ...


class DenseBlockFunction(torch.autograd.Function):
    """A dense block in training mode, forward and backward.

    The gradient of a feature map is a sum over the layers that read it. It reaches them by three
    ways: its values, and the mean and the variance that all of them share. What comes by the latter
    two is summed up a channel and goes down once, when all readers are done.
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
        """Parts of the input, four weights a layer → features, their mean and biased variance."""
        parts, weights = tensors[:num_parts], tensors[num_parts:]
        num_channels = layers[-1].new.stop
        features = join(parts, num_channels)
        moments = measure_parts(parts, num_channels)
        drawn = ops.draw_dropout(layers, features)
        kept = []
        for layer, own, lots in zip(layers, _by_layer(weights), drawn, strict=True):
            kept.append(ops.forward_layer(layer, features, moments, own, lots, recompute=recompute))
        ctx.ops, ctx.layers, ctx.part_channels = ops, layers, [part.shape[1] for part in parts]
        ctx.num_kept = [len(tensors) for tensors in kept]
        ctx.save_for_backward(features, *moments, *weights, *drawn, *chain.from_iterable(kept))
        ctx.mark_non_differentiable(*moments)
        return features, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_features: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what `forward` took."""
        ops: LayerOps = ctx.ops
        n = len(ctx.layers)
        features, mean, var, *saved = ctx.saved_tensors
        moments = Moments(mean, var)
        weights, drawn, kept = saved[: 4 * n], saved[4 * n : 5 * n], saved[5 * n :]
        # What comes in belongs to others; this copy goes on to collect the readers' shares.
        grad = grad_features.clone(memory_format=torch.channels_last)
        moment_grads = Moments(*torch.zeros(2, *mean.shape, dtype=mean.dtype, device=mean.device))

        weight_grads: list[Tensor] = []
        passes = zip(ctx.layers, _by_layer(weights), drawn, ctx.num_kept, strict=True)
        for layer, own, lots, num_kept in reversed(list(passes)):
            activations = [kept.pop() for _ in range(num_kept)][::-1]
            weight_grads[:0] = ops.backward_layer(
                layer, features, moments, own, lots, activations, grad, moment_grads
            )
        part_grads = ops.input_grads(features, moments, grad, moment_grads, ctx.part_channels)
        return None, None, None, None, *part_grads, *weight_grads


def _by_layer(weights: Sequence[Tensor]) -> list[LayerWeights]:
    return [LayerWeights(*weights[i : i + 4]) for i in range(0, len(weights), 4)]


def join(parts: list[Tensor] | tuple[Tensor, ...], num_channels: int) -> Tensor:
    """Room for all features of a block, channels_last, with its input written at the front."""
    features = empty_channels_last(parts[0], num_channels)
    torch.cat(parts, dim=1, out=features[:, : sum(part.shape[1] for part in parts)])
    return features


def empty_channels_last(x: Tensor, num_channels: int) -> Tensor:
    """An uninitialized tensor like `x` but with this many channels, channels_last."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, num_channels).permute(0, 3, 1, 2)


def measure(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, in float32 for the half precisions."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    # Handed in only to say the precision; nothing is mixed into them.
    return Moments(*torch.batch_norm_update_stats(x, mean, var, momentum=0.0))


def measure_parts(parts: Sequence[Tensor], num_channels: int) -> Moments:
    """Moments of a block's input, with room behind them for those of the new features."""
    moments = torch.cat([torch.stack(measure(part)) for part in parts], dim=1)
    return Moments(*F.pad(moments, (0, num_channels - moments.shape[1])))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would compute convolutions of `x` in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype

"""One layer of a fused dense block with torch's operators, in chunks that fit a CPU's caches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models.dense_block_fused import (
    LayerPlan,
    LayerWeights,
    Moments,
    channel_moments,
    empty_channels_last,
)

# Bytes of features that consecutive operators process while they stay in a CPU's caches: strips of
# rows fit into the second-level cache, and chunks of whole images into the last-level cache.
_STRIP_BYTES = 5 * 2**19
_CHUNK_BYTES = 16 * 2**20

_aten = torch.ops.aten


class FoldedNorm(NamedTuple):
    """Batch norm with given moments; each tensor has one value per channel."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def rstd(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    @property
    def scale(self) -> Tensor:
        return self.weight * self.rstd

    def norm_relu(self, x: Tensor) -> Tensor:
        """Batch norm and ReLU of contiguous N C H W, computed in the precision of the moments."""
        a = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)
        return a.relu_()


def draw_dropout(layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
    """See `dense_block_fused.LayerOps`; returns a mask of the values that each layer keeps."""
    return [layer.dropout.draw_mask(features[:, layer.new]) for layer in layers]


def forward_layer(
    layer: LayerPlan,
    features: Tensor,
    moments: Moments,
    weights: LayerWeights,
    dropout: Tensor | None,
    *,
    recompute: bool,
) -> list[Tensor]:
    """See `dense_block_fused.LayerOps`; returns the output of BN and ReLU unless `recompute`."""
    saved: list[Tensor] = []
    y = bn_relu_conv(
        features[:, layer.old],
        _batch_norm(layer, weights, moments),
        weights.conv_weight,
        weights.conv_bias,
        saved=None if recompute else saved,
    )
    y = layer.dropout.apply_mask(y, dropout)
    features[:, layer.new] = y
    moments.mean[layer.new], moments.var[layer.new] = channel_moments(y)
    return saved


def backward_layer(
    layer: LayerPlan,
    features: Tensor,
    moments: Moments,
    weights: LayerWeights,
    dropout: Tensor | None,
    saved: list[Tensor],
    grad: Tensor,
    moment_grads: Moments,
) -> LayerWeights:
    """See `dense_block_fused.LayerOps`."""
    old, new = layer.old, layer.new
    norm = _batch_norm(layer, weights, moments)
    grad_y = _add_moment_grads(features, moments, grad, moment_grads, new)
    grad_y = layer.dropout.apply_mask(grad_y, dropout)
    grads = _bn_relu_conv_backward(
        grad_y, features[:, old], norm, weights.conv_weight, saved=saved, grad_x=grad[:, old]
    )
    moment_grads.mean[old] -= norm.scale * grads.norm_bias
    moment_grads.var[old] -= norm.scale * norm.rstd * grads.norm_weight / 2
    return grads


def input_grads(
    features: Tensor,
    moments: Moments,
    grad: Tensor,
    moment_grads: Moments,
    part_channels: Sequence[int],
) -> list[Tensor]:
    """See `dense_block_fused.LayerOps`."""
    first = slice(0, sum(part_channels))
    grad_x = _add_moment_grads(features, moments, grad, moment_grads, first)
    return list(torch.split(grad_x, list(part_channels), dim=1))


def running_norm(norm: nn.BatchNorm2d) -> FoldedNorm:
    """Batch norm with its running statistics, in their precision."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
    return FoldedNorm(weight, bias, mean, var, norm.eps)


def _batch_norm(layer: LayerPlan, weights: LayerWeights, moments: Moments) -> FoldedNorm:
    """Batch norm of the old features with batch statistics, in the precision of the moments."""
    mean, var = moments.mean[layer.old], moments.var[layer.old]
    weight, bias = weights.norm_weight.to(mean.dtype), weights.norm_bias.to(mean.dtype)
    return FoldedNorm(weight, bias, mean, var, layer.eps)


def bn_relu_conv(
    x: Tensor, norm: FoldedNorm, weight: Tensor, bias: Tensor, *, saved: list[Tensor] | None = None
) -> Tensor:
    """Batch norm, ReLU, and 3x3 convolution of N C H W, usually a slice of a block's features.

    Args:
        saved: the inputs of the convolution are appended to it, one per chunk.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = empty_channels_last(x, weight.shape[0])
    for images in _chunks(x, _STRIP_BYTES if saved is None else _CHUNK_BYTES):
        strips = _strips(x[images]) if saved is None else [slice(0, x.shape[2])]
        for rows in strips:
            # The convolution reads one more row on either side; the results there are cropped.
            first, last = max(rows.start - 1, 0), min(rows.stop + 1, x.shape[2])
            a = norm.norm_relu(_copy_channels_last(x[images, :, first:last]))
            strip = F.conv2d(a, weight, bias, padding=1)
            y[images, :, rows] = strip[:, :, rows.start - first : rows.stop - first]
            if saved is not None:
                saved.append(a)
    return y


def _bn_relu_conv_backward(
    grad_y: Tensor, x: Tensor, norm: FoldedNorm, weight: Tensor, *, saved: list[Tensor],
    grad_x: Tensor,
) -> LayerWeights:  # fmt: skip
    """Add the contribution through the values of x, not through its moments, to `grad_x`.

    Args:
        saved: the inputs of the convolution, one per chunk; recomputed if empty.

    Returns:
        The gradients of the weights.
    """
    totals: list[Tensor] = []
    for i, images in enumerate(_chunks(x, _CHUNK_BYTES)):
        x_chunk = _copy_channels_last(x[images])
        a = saved[i] if saved else norm.norm_relu(x_chunk)
        grad_a, *conv_grads = _conv_backward(grad_y[images], a, weight)
        _aten.threshold_backward.grad_input(grad_a, a, 0, grad_input=grad_a)
        # The sums over pixels of grad_a * (x - mean) * rstd and of grad_a. The CUDA kernel requires
        # tensors for the saved moments, although batch norm with given moments has none.
        no_moments = norm.mean.new_empty(0), norm.mean.new_empty(0)
        _, *norm_grads = _aten.native_batch_norm_backward(
            *(grad_a, x_chunk, norm.weight, norm.mean, norm.var, *no_moments),
            *(False, norm.eps, [False, True, True]),
        )
        grad_x[images].addcmul_(grad_a, _per_channel(norm.scale, grad_a))
        grads = [*norm_grads, *conv_grads]
        totals = [a + b for a, b in zip(totals, grads, strict=True)] if totals else grads
    return LayerWeights(*totals)


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, weight, and bias of the padded 3x3 convolution."""
    ones = [1, 1]
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        *(grad, x, weight.to(x.dtype), [weight.shape[0]], ones, ones, ones, False, [0, 0], 1),
        [True, True, True],
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_moment_grads(
    features: Tensor, moments: Moments, grad: Tensor, moment_grads: Moments, channels: slice
) -> Tensor:
    """The gradient of `channels`, including the contribution through their mean and variance."""
    x, mean = features[:, channels], moments.mean[channels]
    num_values = x.numel() // x.shape[1]
    # (grad_mean + 2 grad_var (x - mean)) / num_values has the form of a batch norm. Before torch
    # 2.13, F.batch_norm rejects an epsilon of 0, so call the inner function.
    slope = 2 / num_values * moment_grads.var[channels]
    offset = moment_grads.mean[channels] / num_values
    by_moments = torch.batch_norm(
        *(_copy_channels_last(x), slope, offset, mean, torch.ones_like(mean), False, 0.0, 0.0),
        torch.backends.cudnn.enabled,
    )
    return grad[:, channels] + by_moments


def _copy_channels_last(x: Tensor) -> Tensor:
    return empty_channels_last(x, x.shape[1]).copy_(x)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.dtype).view(1, -1, 1, 1)


def _chunks(x: Tensor, num_bytes: int) -> Iterator[slice]:
    """Slices of images: on a CPU, as many as fit into `num_bytes`, at least one; else all.

    The memory of small chunks is also reused, while large ones get new pages from the system.
    """
    num_images = x.shape[0]
    step = num_images
    if x.device.type == "cpu":
        step = max(1, int(num_bytes / _bytes_per_image(x)))
    return (slice(start, start + step) for start in range(0, num_images, step))


def _strips(x: Tensor) -> Iterator[slice]:
    """Slices of rows: on a CPU, strips of equal height that fit into the cache; else all rows."""
    height = x.shape[2]
    step = height
    if x.device.type == "cpu":
        num_strips = max(1, round(_bytes_per_image(x) / _STRIP_BYTES))
        step = -(-height // num_strips)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def _bytes_per_image(x: Tensor) -> int:
    return max(1, x[:1].numel() * x.element_size())

"""One layer of a fused dense block by torch's own operators, in pieces that fit a CPU's caches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.models.dense_block_fused import (
    LayerPlan,
    LayerWeights,
    Moments,
    empty_channels_last,
    measure,
)

# What a sweep over features should leave in a CPU's caches for the next: in the second level where
# only the rows around a pixel matter, in the last one where whole images do.
_STRIP_BYTES = 5 * 2**19
_PORTION_BYTES = 16 * 2**20

_aten = torch.ops.aten


class FoldedNorm(NamedTuple):
    """Batch norm over channels with these moments, a value a channel each."""

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

    def relu(self, x: Tensor) -> Tensor:
        """Batch norm and ReLU of contiguous N C H W, with the moments' precision inside."""
        a = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)
        return a.relu_()


def draw_dropout(layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
    """As `dense_block_fused.LayerOps`: which new features each layer keeps."""
    return [layer.dropout.draw(features[:, layer.new]) for layer in layers]


def forward_layer(
    layer: LayerPlan,
    features: Tensor,
    moments: Moments,
    weights: LayerWeights,
    dropout: Tensor | None,
    *,
    recompute: bool,
) -> list[Tensor]:
    """As `dense_block_fused.LayerOps`: returns what BN and ReLU made, unless it is recomputed."""
    kept: list[Tensor] = []
    y = new_features(
        features[:, layer.old],
        _folded_norm(layer, weights, moments),
        weights.conv_weight,
        weights.conv_bias,
        keep=None if recompute else kept,
    )
    y = layer.dropout.masked(y, dropout)
    features[:, layer.new] = y
    moments.mean[layer.new], moments.var[layer.new] = measure(y)
    return kept


def backward_layer(
    layer: LayerPlan,
    features: Tensor,
    moments: Moments,
    weights: LayerWeights,
    dropout: Tensor | None,
    kept: list[Tensor],
    grad: Tensor,
    moment_grads: Moments,
) -> LayerWeights:
    """As `dense_block_fused.LayerOps`."""
    old, new = layer.old, layer.new
    norm = _folded_norm(layer, weights, moments)
    grad_y = _add_moment_grads(features, moments, grad, moment_grads, new)
    grad_y = layer.dropout.masked(grad_y, dropout)
    grads = _backward_of_new_features(
        grad_y, features[:, old], norm, weights.conv_weight, kept=kept, grad_x=grad[:, old]
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
    """As `dense_block_fused.LayerOps`."""
    first = slice(0, sum(part_channels))
    grad_x = _add_moment_grads(features, moments, grad, moment_grads, first)
    return list(torch.split(grad_x, list(part_channels), dim=1))


def running_norm(norm: nn.BatchNorm2d) -> FoldedNorm:
    """Batch norm by its running statistics."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
    return FoldedNorm(weight, bias, mean, var, norm.eps)


def _folded_norm(layer: LayerPlan, weights: LayerWeights, moments: Moments) -> FoldedNorm:
    """Batch norm of the old features, in the precision of the moments."""
    mean, var = moments.mean[layer.old], moments.var[layer.old]
    weight, bias = weights.norm_weight.to(mean.dtype), weights.norm_bias.to(mean.dtype)
    return FoldedNorm(weight, bias, mean, var, layer.eps)


def new_features(
    x: Tensor, norm: FoldedNorm, weight: Tensor, bias: Tensor, *, keep: list[Tensor] | None = None
) -> Tensor:
    """Batch norm, ReLU and 3x3 convolution of N C H W, as a rule a slice of a block's features.

    Args:
        keep: takes what goes into the convolution, portion by portion.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = empty_channels_last(x, weight.shape[0])
    for images in _portions(x, _STRIP_BYTES if keep is None else _PORTION_BYTES):
        strips = _strips(x[images]) if keep is None else [slice(0, x.shape[2])]
        for rows in strips:
            # The strip needs a row of its neighbors on either side; their results are dropped.
            first, last = max(rows.start - 1, 0), min(rows.stop + 1, x.shape[2])
            a = norm.relu(_copy(x[images, :, first:last]))
            strip = F.conv2d(a, weight, bias, padding=1)
            y[images, :, rows] = strip[:, :, rows.start - first : rows.stop - first]
            if keep is not None:
                keep.append(a)
    return y


def _backward_of_new_features(
    grad_y: Tensor, x: Tensor, norm: FoldedNorm, weight: Tensor, *, kept: list[Tensor],
    grad_x: Tensor,
) -> LayerWeights:  # fmt: skip
    """Adds the share of x's values (not of its moments) to `grad_x`.

    Args:
        kept: what went into the convolution, portion by portion; made again where it is empty.

    Returns:
        The gradients of the weights.
    """
    totals: list[Tensor] = []
    for i, rows in enumerate(_portions(x, _PORTION_BYTES)):
        x_rows = _copy(x[rows])
        a = kept[i] if kept else norm.relu(x_rows)
        grad_a, *conv_grads = _conv_backward(grad_y[rows], a, weight)
        _aten.threshold_backward.grad_input(grad_a, a, 0, grad_input=grad_a)
        # The sums over pixels of grad_a * (x - mean) * rstd and of grad_a. CUDA's kernel insists
        # on tensors for the saved moments, which batch norm by given ones does not have.
        no_moments = norm.mean.new_empty(0), norm.mean.new_empty(0)
        _, *norm_grads = _aten.native_batch_norm_backward(
            *(grad_a, x_rows, norm.weight, norm.mean, norm.var, *no_moments),
            *(False, norm.eps, [False, True, True]),
        )
        grad_x[rows].addcmul_(grad_a, _per_channel(norm.scale, grad_a))
        grads = [*norm_grads, *conv_grads]
        totals = [a + b for a, b in zip(totals, grads, strict=True)] if totals else grads
    return LayerWeights(*totals)


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of the padded 3x3 convolution."""
    once = [1, 1]
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        *(grad, x, weight.to(x.dtype), [weight.shape[0]], once, once, once, False, [0, 0], 1),
        [True, True, True],
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_moment_grads(
    features: Tensor, moments: Moments, grad: Tensor, moment_grads: Moments, channels: slice
) -> Tensor:
    """The gradient of some feature maps, with what reaches them by their mean and variance."""
    x, mean = features[:, channels], moments.mean[channels]
    num_values = x.numel() // x.shape[1]
    # (grad_mean + 2 grad_var (x - mean)) / num_values: to torch that is a batch norm, too. Called
    # by its inner name, for the outer one refuses an epsilon of 0 before torch 2.13.
    slope = 2 / num_values * moment_grads.var[channels]
    offset = moment_grads.mean[channels] / num_values
    by_moments = torch.batch_norm(
        *(_copy(x), slope, offset, mean, torch.ones_like(mean), False, 0.0, 0.0),
        torch.backends.cudnn.enabled,
    )
    return grad[:, channels] + by_moments


def _copy(x: Tensor) -> Tensor:
    return empty_channels_last(x, x.shape[1]).copy_(x)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.dtype).view(1, -1, 1, 1)


def _portions(x: Tensor, num_bytes: int) -> Iterator[slice]:
    """On a CPU at least one image at a time, and no more than make so many bytes.

    Memory for smaller pieces is also used again, where large ones are fresh from the system.
    """
    num_images = x.shape[0]
    step = num_images
    if x.device.type == "cpu":
        step = max(1, int(num_bytes / _bytes_per_image(x)))
    return (slice(start, start + step) for start in range(0, num_images, step))


def _strips(x: Tensor) -> Iterator[slice]:
    """On a CPU the rows of large images, in equal parts that fit into the cache one by one."""
    height = x.shape[2]
    step = height
    if x.device.type == "cpu":
        num_strips = max(1, round(_bytes_per_image(x) / _STRIP_BYTES))
        step = -(-height // num_strips)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def _bytes_per_image(x: Tensor) -> int:
    return max(1, x[:1].numel() * x.element_size())

"""One layer of a fused dense block on an NVIDIA GPU, with Triton kernels."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from segtrain.models import dense_layer_kernels as kernels
from segtrain.models.dense_block_fused import (
    MAX_GROWTH,
    LayerPlan,
    LayerWeights,
    Moments,
    empty_channels_last,
)

# Rows of the partial sums of the weight gradients: one per tap and new channel, one for the weight
# of BN, and one for its bias.
_NUM_ROWS = 9 * MAX_GROWTH + 2

# A tile of the forward pass is a rectangle, whose pixels share most of their neighbors.
_TILE_HEIGHT, _MAX_TILE_WIDTH = 8, 16
_BLOCK_CHANNELS = 64
_BLOCK_PIXELS = 64
# For memory-bound kernels over few channels.
_SMALL_BLOCK_PIXELS = 256
_BLOCK_TILES = 1024

# Triton 3.10 has a different default. An explicit value avoids its warning.
_LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def draw_dropout(layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
    """See `dense_block_fused.LayerOps`; returns a seed that gives both passes the same masks."""
    seed = torch.randint(2**62, (1,), device=features.device)
    return [seed if _has_dropout(layer) else None for layer in layers]


def forward_layer(
    layer: LayerPlan,
    features: Tensor,
    moments: Moments,
    weights: LayerWeights,
    dropout: Tensor | None,
    *,
    recompute: bool,
) -> list[Tensor]:
    """See `dense_block_fused.LayerOps`; always recomputes, because that costs nothing here."""
    n, all_channels, height, width = features.shape
    num_old, growth = layer.old.stop, weights.conv_weight.shape[0]
    tile_width = min(_MAX_TILE_WIDTH, triton.next_power_of_2(width))
    tiles = triton.cdiv(height, _TILE_HEIGHT), triton.cdiv(width, tile_width)
    num_tiles = n * tiles[0] * tiles[1]
    partials = moments.mean.new_empty(2, growth, num_tiles)
    kernels.layer_forward[(num_tiles,)](
        *(features, *moments, *weights, dropout, partials),
        *(height, width, num_old, all_channels, *tiles, num_tiles),
        *(*weights.conv_weight.stride(), layer.eps, *_dropout_arguments(layer), num_old),
        GROWTH=growth,
        DROPOUT=dropout is not None,
        TILE_H=_TILE_HEIGHT,
        TILE_W=tile_width,
        BLOCK_C=_BLOCK_CHANNELS,
        num_warps=4,
        num_stages=3,
        **_LAUNCH_OPTIONS,
    )
    new_moments = (moment[layer.new] for moment in moments)
    kernels.merge_moments[(growth,)](
        *(partials, *new_moments, height, width, *tiles, num_tiles, n * height * width),
        GROWTH=growth,
        TILE_H=_TILE_HEIGHT,
        TILE_W=tile_width,
        BLOCK=_BLOCK_TILES,
        **_LAUNCH_OPTIONS,
    )
    return []


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
    n, all_channels, height, width = features.shape
    num_pixels, num_old, growth = n * height * width, layer.old.stop, weights.conv_weight.shape[0]
    strides = weights.conv_weight.stride()
    grad_y = features.new_empty(num_pixels, MAX_GROWTH)
    num_small_blocks = triton.cdiv(num_pixels, _SMALL_BLOCK_PIXELS)
    bias_partials = moments.mean.new_empty(num_small_blocks, MAX_GROWTH)
    kernels.grad_of_new[(num_small_blocks,)](
        *(grad, features, moments.mean, *moment_grads, dropout, grad_y, bias_partials),
        *(num_pixels, num_old, all_channels, *_dropout_arguments(layer), num_old),
        GROWTH=growth,
        DROPOUT=dropout is not None,
        BLOCK=_SMALL_BLOCK_PIXELS,
        **_LAUNCH_OPTIONS,
    )
    num_blocks = triton.cdiv(num_pixels, _BLOCK_PIXELS)
    channel_blocks = triton.cdiv(num_old, _BLOCK_CHANNELS)
    num_splits = _num_splits(features.device, num_blocks, channel_blocks)
    partials = moments.mean.new_empty(num_splits, _NUM_ROWS, num_old)
    norm_and_conv = weights.norm_weight, weights.norm_bias, weights.conv_weight
    kernels.layer_backward[(channel_blocks, num_splits)](
        *(grad_y, features, grad, *moments, *norm_and_conv, partials),
        *(height, width, num_pixels, num_old, all_channels, num_blocks, *strides, layer.eps),
        GROWTH=growth,
        BLOCK_P=_BLOCK_PIXELS,
        BLOCK_C=_BLOCK_CHANNELS,
        num_warps=8,
        num_stages=2,
        **_LAUNCH_OPTIONS,
    )
    grads = LayerWeights(*map(torch.empty_like, weights))
    kernels.sum_partials[(channel_blocks, 10)](
        *(partials, bias_partials, moments.var, weights.norm_weight, *moment_grads, *grads),
        *(num_old, num_splits, num_small_blocks, *grads.conv_weight.stride(), layer.eps),
        GROWTH=growth,
        BLOCK_C=_BLOCK_CHANNELS,
        BLOCK=_SMALL_BLOCK_PIXELS,
        **_LAUNCH_OPTIONS,
    )
    return grads


def input_grads(
    features: Tensor,
    moments: Moments,
    grad: Tensor,
    moment_grads: Moments,
    part_channels: Sequence[int],
) -> list[Tensor]:
    """See `dense_block_fused.LayerOps`."""
    n, all_channels, height, width = features.shape
    num_pixels, first, grads = n * height * width, 0, []
    for num_channels in part_channels:
        grads.append(empty_channels_last(features, num_channels))
        grid = triton.cdiv(num_pixels, _BLOCK_PIXELS), triton.cdiv(num_channels, _BLOCK_CHANNELS)
        kernels.grad_of_part[grid](
            *(grad, features, moments.mean, *moment_grads, grads[-1]),
            *(num_pixels, all_channels, first, num_channels),
            BLOCK_P=_BLOCK_PIXELS,
            BLOCK_C=_BLOCK_CHANNELS,
            **_LAUNCH_OPTIONS,
        )
        first += num_channels
    return grads


def _has_dropout(layer: LayerPlan) -> bool:
    return layer.dropout.training and layer.dropout.p > 0


def _dropout_arguments(layer: LayerPlan) -> tuple[int, float]:
    """Threshold of 32-bit random numbers below which values are dropped; factor of the others."""
    return round(layer.dropout.p * 2**32), 1 / (1 - layer.dropout.p)


def _num_splits(device: torch.device, num_blocks: int, channel_blocks: int) -> int:
    """Number of programs among which the pixels are divided, for each block of channels.

    There are two programs per multiprocessor of the GPU. Each sums several blocks of pixels;
    otherwise, for small images, the partial sums would take more memory than the features.
    """
    return max(1, min(num_blocks // 4, 2 * _num_multiprocessors(device) // channel_blocks))


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # in tests, which interpret the kernels
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

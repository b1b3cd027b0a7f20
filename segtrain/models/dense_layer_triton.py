"""One layer of a fused dense block on an NVIDIA GPU, by Triton kernels."""

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

# Rows of the partial sums of the weights' gradients: one for each tap and new channel, one for
# BN's weight and one for its bias.
_NUM_ROWS = 9 * MAX_GROWTH + 2

# Tiles of the forward pass are images' rectangles, whose pixels share most of their neighbors.
_TILE_HEIGHT, _MAX_TILE_WIDTH = 8, 16
_BLOCK_CHANNELS = 64
_BLOCK_PIXELS = 64
# Of memory-bound kernels over few channels.
_SMALL_BLOCK_PIXELS = 256
_BLOCK_TILES = 1024

# The default of Triton 3.10 is another; said here, none of them warns that nothing was said.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def draw_dropout(layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
    """As `dense_block_fused.LayerOps`: a seed, from which both passes draw the same lots."""
    seed = torch.randint(2**62, (1,), device=features.device)
    return [seed if _is_dropping(layer) else None for layer in layers]


def forward_layer(
    layer: LayerPlan,
    features: Tensor,
    moments: Moments,
    weights: LayerWeights,
    dropout: Tensor | None,
    *,
    recompute: bool,
) -> list[Tensor]:
    """As `dense_block_fused.LayerOps`. Recomputing costs nothing here, so it is always done."""
    n, all_channels, height, width = features.shape
    num_old, growth = layer.old.stop, weights.conv_weight.shape[0]
    tile_width = min(_MAX_TILE_WIDTH, triton.next_power_of_2(width))
    tiles = triton.cdiv(height, _TILE_HEIGHT), triton.cdiv(width, tile_width)
    num_tiles = n * tiles[0] * tiles[1]
    partials = moments.mean.new_empty(2, growth, num_tiles)
    kernels.layer_forward[(num_tiles,)](
        *(features, *moments, *weights, dropout, partials),
        *(height, width, num_old, all_channels, *tiles, num_tiles),
        *(*weights.conv_weight.stride(), layer.eps, *_lots(layer), num_old),
        GROWTH=growth,
        DROPOUT=dropout is not None,
        TILE_H=_TILE_HEIGHT,
        TILE_W=tile_width,
        BLOCK_C=_BLOCK_CHANNELS,
        num_warps=4,
        num_stages=3,
        **_OPTIONS,
    )
    new_moments = (moment[layer.new] for moment in moments)
    kernels.merge_moments[(growth,)](
        *(partials, *new_moments, height, width, *tiles, num_tiles, n * height * width),
        GROWTH=growth,
        TILE_H=_TILE_HEIGHT,
        TILE_W=tile_width,
        BLOCK=_BLOCK_TILES,
        **_OPTIONS,
    )
    return []


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
    n, all_channels, height, width = features.shape
    num_pixels, num_old, growth = n * height * width, layer.old.stop, weights.conv_weight.shape[0]
    strides = weights.conv_weight.stride()
    grad_y = features.new_empty(num_pixels, MAX_GROWTH)
    num_small_blocks = triton.cdiv(num_pixels, _SMALL_BLOCK_PIXELS)
    bias_partials = moments.mean.new_empty(num_small_blocks, MAX_GROWTH)
    kernels.grad_of_new[(num_small_blocks,)](
        *(grad, features, moments.mean, *moment_grads, dropout, grad_y, bias_partials),
        *(num_pixels, num_old, all_channels, *_lots(layer), num_old),
        GROWTH=growth,
        DROPOUT=dropout is not None,
        BLOCK=_SMALL_BLOCK_PIXELS,
        **_OPTIONS,
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
        **_OPTIONS,
    )
    grads = LayerWeights(*map(torch.empty_like, weights))
    kernels.sum_partials[(channel_blocks, 10)](
        *(partials, bias_partials, moments.var, weights.norm_weight, *moment_grads, *grads),
        *(num_old, num_splits, num_small_blocks, *grads.conv_weight.stride(), layer.eps),
        GROWTH=growth,
        BLOCK_C=_BLOCK_CHANNELS,
        BLOCK=_SMALL_BLOCK_PIXELS,
        **_OPTIONS,
    )
    return grads


def input_grads(
    features: Tensor,
    moments: Moments,
    grad: Tensor,
    moment_grads: Moments,
    part_channels: Sequence[int],
) -> list[Tensor]:
    """As `dense_block_fused.LayerOps`."""
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
            **_OPTIONS,
        )
        first += num_channels
    return grads


def _is_dropping(layer: LayerPlan) -> bool:
    return layer.dropout.training and layer.dropout.p > 0


def _lots(layer: LayerPlan) -> tuple[int, float]:
    """Below which of 2^32 numbers a value is dropped, and by what the others are multiplied."""
    return round(layer.dropout.p * 2**32), 1 / (1 - layer.dropout.p)


def _num_splits(device: torch.device, num_blocks: int, channel_blocks: int) -> int:
    """Over how many programs the pixels are spread, for each block of channels.

    Two for each of the GPU's processors; and each has some blocks of pixels to sum, or the partial
    sums would outweigh the features where images are small.
    """
    return max(1, min(num_blocks // 4, 2 * _num_processors(device) // channel_blocks))


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted, in tests
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

"""Triton kernels of one layer of a fused dense block; `dense_layer_triton` launches them.

One kernel computes BN, ReLU, the 3x3 convolution, and dropout. It reads the features once and
writes the few new channels behind them. The backward pass reads features and gradient once,
recomputes BN and ReLU, and writes the gradient once. Only the features are saved.

Features are N H W C in memory. A layer reads the first `old_channels` of the `all_channels` and
writes the channels after them.
"""

# Triton kernels have constants in upper case and no Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from segtrain.models.dense_block_fused import MAX_GROWTH

_WIDTH = tl.constexpr(MAX_GROWTH)

# Arguments that change between levels and batches. By default, Triton compiles extra kernels for
# special values such as multiples of 16, which gains nothing here.
_DO_NOT_SPECIALIZE = [
    "height", "width", "tiles_y", "tiles_x", "num_tiles", "num_values", "num_pixels", "num_blocks",
    "num_splits", "layer", "first", "part_channels", "eps", "keep_scale", "drop_threshold",
]  # fmt: skip


@triton.jit
def _keep_mask(seed, pixel, drop_threshold):
    """Draw which of 16 values of each pixel dropout keeps; the same for both passes."""
    group = tl.arange(0, 4)
    bits = tl.randint4x(seed, pixel[:, None] * 4 + group[None, :])
    joined = tl.join(tl.join(bits[0], bits[1]), tl.join(bits[2], bits[3]))
    value = tl.reshape(joined, (pixel.shape[0], 16)).to(tl.uint32, bitcast=True)
    return value >= drop_threshold


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def layer_forward(
    features, mean, var, norm_weight, norm_bias, weight, bias, seed, partials,
    height, width, old_channels, all_channels, tiles_y, tiles_x, num_tiles,
    stride_new, stride_old, stride_y, stride_x,
    eps, drop_threshold, keep_scale, layer,
    GROWTH: tl.constexpr, DROPOUT: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the new features of one tile, and their mean and sum of squares to `partials`."""
    tile = tl.program_id(0)
    image = tile // (tiles_x * tiles_y)
    image_features = features + tl.cast(image, tl.int64) * height * width * all_channels
    in_tile = tl.arange(0, TILE_H * TILE_W)
    y = tile // tiles_x % tiles_y * TILE_H + in_tile // TILE_W
    x = tile % tiles_x * TILE_W + in_tile % TILE_W
    inside = (y < height) & (x < width)
    new = tl.arange(0, _WIDTH)
    is_new = new < GROWTH

    acc = tl.zeros((TILE_H * TILE_W, _WIDTH), tl.float32)
    for step in range(tl.cdiv(old_channels, BLOCK_C) * 9):
        c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        is_old = c < old_channels
        rstd = tl.rsqrt(tl.load(var + c, mask=is_old, other=1.0) + eps)
        scale = tl.load(norm_weight + c, mask=is_old, other=0.0).to(tl.float32) * rstd
        shift = tl.load(norm_bias + c, mask=is_old, other=0.0).to(tl.float32)
        shift -= tl.load(mean + c, mask=is_old, other=0.0) * scale

        tap_y, tap_x = step % 9 // 3, step % 9 % 3
        in_y, in_x = y + tap_y - 1, x + tap_x - 1
        in_image = (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        pixel_in = in_y * width + in_x
        f = tl.load(
            image_features + (pixel_in[:, None] * all_channels + c[None, :]),
            mask=in_image[:, None] & is_old[None, :],
            other=0.0,
        )
        a = tl.maximum(f.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
        a = tl.where(in_image[:, None], a, 0.0).to(f.dtype)
        w = tl.load(
            weight + c[:, None] * stride_old + new[None, :] * stride_new
            + tap_y * stride_y + tap_x * stride_x,
            mask=is_old[:, None] & is_new[None, :],
            other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, w.to(f.dtype), acc)

    acc += tl.load(bias + new, mask=is_new, other=0.0).to(tl.float32)[None, :]
    pixel = y * width + x
    if DROPOUT:
        keep = _keep_mask(tl.load(seed) + layer, image * height * width + pixel, drop_threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    value = acc.to(features.dtype.element_ty)
    is_stored = inside[:, None] & is_new[None, :]
    tl.store(
        image_features + (pixel[:, None] * all_channels + old_channels + new[None, :]),
        value,
        mask=is_stored,
    )

    value = tl.where(inside[:, None], value.to(tl.float32), 0.0)
    tile_mean = tl.sum(value, 0) / tl.sum(inside.to(tl.float32), 0)
    deviation = tl.where(inside[:, None], value - tile_mean[None, :], 0.0)
    tl.store(partials + new * num_tiles + tile, tile_mean, mask=is_new)
    tl.store(
        partials + (GROWTH + new) * num_tiles + tile, tl.sum(deviation * deviation, 0), mask=is_new
    )


@triton.jit
def _tile_counts(tile, num_tiles, height, width, tiles_y, tiles_x, TILE_H, TILE_W):
    """Number of pixels of each tile that are inside the image."""
    rows = tl.minimum(height - tile // tiles_x % tiles_y * TILE_H, TILE_H)
    columns = tl.minimum(width - tile % tiles_x * TILE_W, TILE_W)
    return tl.where(tile < num_tiles, rows * columns, 0).to(tl.float32)


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def merge_moments(
    partials, mean, var, height, width, tiles_y, tiles_x, num_tiles, num_values,
    GROWTH: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the moments of tiles: mean and biased variance per channel (Chan et al. 1979)."""
    channel = tl.program_id(0)
    weighted_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = _tile_counts(tile, num_tiles, height, width, tiles_y, tiles_x, TILE_H, TILE_W)
        tile_mean = tl.load(partials + channel * num_tiles + tile, mask=tile < num_tiles, other=0.0)
        weighted_sum += count * tile_mean
    total_mean = tl.sum(weighted_sum, 0) / num_values
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        valid = tile < num_tiles
        count = _tile_counts(tile, num_tiles, height, width, tiles_y, tiles_x, TILE_H, TILE_W)
        tile_mean = tl.load(partials + channel * num_tiles + tile, mask=valid, other=0.0)
        squares += count * (tile_mean - total_mean) * (tile_mean - total_mean)
        squares += tl.load(partials + (GROWTH + channel) * num_tiles + tile, mask=valid, other=0.0)
    tl.store(mean + channel, total_mean)
    tl.store(var + channel, tl.sum(squares, 0) / num_values)


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def grad_of_new(
    grad, features, mean, grad_mean, grad_var, seed, grad_y, partials,
    num_pixels, old_channels, all_channels, drop_threshold, keep_scale, layer,
    GROWTH: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the convolution's output, and its sum over the pixels of a block."""
    block = tl.program_id(0)
    in_block = tl.arange(0, BLOCK)
    pixel = block * BLOCK + in_block
    new = tl.arange(0, _WIDTH)
    is_new = new < GROWTH
    c = old_channels + new
    valid = (pixel < num_pixels)[:, None] & is_new[None, :]
    start = tl.cast(block, tl.int64) * BLOCK * all_channels
    offsets = in_block[:, None] * all_channels + c[None, :]
    f = tl.load(features + start + offsets, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(grad + start + offsets, mask=valid, other=0.0).to(tl.float32)
    deviation = f - tl.load(mean + c, mask=is_new, other=0.0)[None, :]
    grad_mean_c = tl.load(grad_mean + c, mask=is_new, other=0.0)[None, :]
    grad_var_c = tl.load(grad_var + c, mask=is_new, other=0.0)[None, :]
    g += (grad_mean_c + 2.0 * grad_var_c * deviation) / num_pixels
    if DROPOUT:
        g = tl.where(_keep_mask(tl.load(seed) + layer, pixel, drop_threshold), g * keep_scale, 0.0)
    g = tl.where(valid, g, 0.0).to(grad_y.dtype.element_ty)
    tl.store(grad_y + pixel[:, None] * _WIDTH + new[None, :], g, mask=(pixel < num_pixels)[:, None])
    tl.store(partials + block * _WIDTH + new, tl.sum(g.to(tl.float32), 0))


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def layer_backward(
    grad_y, features, grad, mean, var, norm_weight, norm_bias, weight, partials,
    height, width, num_pixels, old_channels, all_channels, num_blocks,
    stride_new, stride_old, stride_y, stride_x, eps,
    GROWTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the contribution through the values to `grad`; partial sums of the weight gradients.

    Both gradients of a convolution are matrix products with the same matrix. Its row for a pixel
    holds the gradients of the new features at the nine neighbors. The products are split into eight
    taps and the last tap, because matrix sizes must be powers of two.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_old = c < old_channels
    mean_c = tl.load(mean + c, mask=is_old, other=0.0)
    rstd = tl.rsqrt(tl.load(var + c, mask=is_old, other=1.0) + eps)
    gamma = tl.load(norm_weight + c, mask=is_old, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + c, mask=is_old, other=0.0).to(tl.float32)

    first_taps = tl.arange(0, 8 * _WIDTH)
    tap, new = first_taps // _WIDTH, first_taps % _WIDTH
    last_tap = tl.arange(0, _WIDTH)
    w_first = tl.load(
        weight + c[None, :] * stride_old
        + (new * stride_new + tap // 3 * stride_y + tap % 3 * stride_x)[:, None],
        mask=is_old[None, :] & (new < GROWTH)[:, None],
        other=0.0,
    ).to(features.dtype.element_ty)  # fmt: skip
    w_last = tl.load(
        weight + c[None, :] * stride_old
        + (last_tap * stride_new + 2 * stride_y + 2 * stride_x)[:, None],
        mask=is_old[None, :] & (last_tap < GROWTH)[:, None],
        other=0.0,
    ).to(features.dtype.element_ty)  # fmt: skip

    grad_w_first = tl.zeros((8 * _WIDTH, BLOCK_C), tl.float32)
    grad_w_last = tl.zeros((_WIDTH, BLOCK_C), tl.float32)
    grad_gamma = tl.zeros((BLOCK_C,), tl.float32)
    grad_beta = tl.zeros((BLOCK_C,), tl.float32)
    in_block = tl.arange(0, BLOCK_P)
    offsets = in_block[:, None] * all_channels + c[None, :]
    for block in range(tl.program_id(1), num_blocks, tl.num_programs(1)):
        pixel = block * BLOCK_P + in_block
        valid = pixel < num_pixels
        x, y = pixel % width, pixel // width % height
        # The convolution reads feature (y, x) for the new features at (y, x) - tap + 1.
        out_y, out_x = y[:, None] + 1 - (tap // 3)[None, :], x[:, None] + 1 - (tap % 3)[None, :]
        out_in_image = (out_y >= 0) & (out_y < height) & (out_x >= 0) & (out_x < width)
        neighbor = pixel[:, None] + ((1 - tap // 3) * width + 1 - tap % 3)[None, :]
        g_first = tl.load(
            grad_y + neighbor * _WIDTH + new[None, :], mask=out_in_image & valid[:, None], other=0.0
        )
        last_in_image = valid & (y > 0) & (x > 0)
        g_last = tl.load(
            grad_y + (pixel - width - 1)[:, None] * _WIDTH + last_tap[None, :],
            mask=last_in_image[:, None],
            other=0.0,
        )
        start = tl.cast(block, tl.int64) * BLOCK_P * all_channels
        is_loaded = valid[:, None] & is_old[None, :]
        f = tl.load(features + start + offsets, mask=is_loaded, other=0.0)
        normed = (f.to(tl.float32) - mean_c[None, :]) * rstd[None, :]
        a = tl.maximum(normed * gamma[None, :] + beta[None, :], 0.0)
        a_low = a.to(f.dtype)
        g = tl.dot(g_first, w_first)
        g = tl.dot(g_last, w_last, g)
        grad_w_first = tl.dot(tl.trans(g_first), a_low, grad_w_first)
        grad_w_last = tl.dot(tl.trans(g_last), a_low, grad_w_last)
        g = tl.where(a > 0, g, 0.0)
        grad_gamma += tl.sum(g * normed, 0)
        grad_beta += tl.sum(g, 0)
        before = tl.load(grad + start + offsets, mask=is_loaded, other=0.0).to(tl.float32)
        after = before + g * (gamma * rstd)[None, :]
        tl.store(grad + start + offsets, after.to(f.dtype), mask=is_loaded)

    own_partials = partials + tl.program_id(1).to(tl.int64) * (9 * _WIDTH + 2) * old_channels + c
    tl.store(
        own_partials[None, :] + first_taps[:, None] * old_channels,
        grad_w_first,
        mask=is_old[None, :],
    )
    tl.store(
        own_partials[None, :] + (last_tap + 8 * _WIDTH)[:, None] * old_channels,
        grad_w_last,
        mask=is_old[None, :],
    )
    tl.store(own_partials + 9 * _WIDTH * old_channels, grad_gamma, mask=is_old)
    tl.store(own_partials + (9 * _WIDTH + 1) * old_channels, grad_beta, mask=is_old)


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def sum_partials(
    partials, bias_partials, var, norm_weight, grad_mean, grad_var,
    grad_norm_weight, grad_norm_bias, grad_weight, grad_bias,
    old_channels, num_splits, num_blocks, stride_new, stride_old, stride_y, stride_x, eps,
    GROWTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partial weight gradients; add the contribution to the gradients of the moments."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_old = c < old_channels
    tap = tl.program_id(1)
    new = tl.arange(0, _WIDTH)
    split_size = tl.cast(old_channels, tl.int64) * (9 * _WIDTH + 2)
    if tap < 9:
        total = tl.zeros((_WIDTH, BLOCK_C), tl.float32)
        rows = (tap * _WIDTH + new)[:, None] * old_channels + c[None, :]
        for split in range(num_splits):
            total += tl.load(partials + split * split_size + rows, mask=is_old[None, :], other=0.0)
        tl.store(
            grad_weight + new[:, None] * stride_new + c[None, :] * stride_old
            + tap // 3 * stride_y + tap % 3 * stride_x,
            total,
            mask=is_old[None, :] & (new < GROWTH)[:, None],
        )  # fmt: skip
    else:
        grad_gamma = tl.zeros((BLOCK_C,), tl.float32)
        grad_beta = tl.zeros((BLOCK_C,), tl.float32)
        for split in range(num_splits):
            row = partials + split * split_size + 9 * _WIDTH * old_channels + c
            grad_gamma += tl.load(row, mask=is_old, other=0.0)
            grad_beta += tl.load(row + old_channels, mask=is_old, other=0.0)
        tl.store(grad_norm_weight + c, grad_gamma, mask=is_old)
        tl.store(grad_norm_bias + c, grad_beta, mask=is_old)
        rstd = tl.rsqrt(tl.load(var + c, mask=is_old, other=1.0) + eps)
        scale = tl.load(norm_weight + c, mask=is_old, other=0.0).to(tl.float32) * rstd
        grad_mean_c = tl.load(grad_mean + c, mask=is_old, other=0.0)
        grad_var_c = tl.load(grad_var + c, mask=is_old, other=0.0)
        tl.store(grad_mean + c, grad_mean_c - scale * grad_beta, mask=is_old)
        tl.store(grad_var + c, grad_var_c - 0.5 * scale * rstd * grad_gamma, mask=is_old)
        if tl.program_id(0) == 0:
            total = tl.zeros((BLOCK, _WIDTH), tl.float32)
            for start in range(0, num_blocks, BLOCK):
                block = start + tl.arange(0, BLOCK)
                total += tl.load(
                    bias_partials + block[:, None] * _WIDTH + new[None, :],
                    mask=(block < num_blocks)[:, None],
                    other=0.0,
                )
            tl.store(grad_bias + new, tl.sum(total, 0), mask=new < GROWTH)


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def grad_of_part(
    grad, features, mean, grad_mean, grad_var, grad_part,
    num_pixels, all_channels, first, part_channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of a part of the block's input, including the contribution of its moments."""
    block = tl.program_id(0)
    in_block = tl.arange(0, BLOCK_P)
    in_part = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_part = in_part < part_channels
    c = first + in_part
    valid = (block * BLOCK_P + in_block < num_pixels)[:, None] & is_part[None, :]
    start = tl.cast(block, tl.int64) * BLOCK_P
    offsets = in_block[:, None] * all_channels + c[None, :]
    f = tl.load(features + start * all_channels + offsets, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(grad + start * all_channels + offsets, mask=valid, other=0.0).to(tl.float32)
    deviation = f - tl.load(mean + c, mask=is_part, other=0.0)[None, :]
    grad_mean_c = tl.load(grad_mean + c, mask=is_part, other=0.0)[None, :]
    grad_var_c = tl.load(grad_var + c, mask=is_part, other=0.0)[None, :]
    g += (grad_mean_c + 2.0 * grad_var_c * deviation) / num_pixels
    tl.store(
        grad_part + start * part_channels
        + (in_block[:, None] * part_channels + in_part[None, :]),
        g.to(grad_part.dtype.element_ty),
        mask=valid,
    )  # fmt: skip

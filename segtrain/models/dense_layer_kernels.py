"""Triton kernels of one layer of a fused dense block; `dense_layer_triton` launches them.

BN, ReLU, 3x3 convolution and dropout are one kernel that reads the features once and writes the few
new channels behind them. The backward pass reads features and gradient once, makes BN and ReLU
again on the way, and writes the gradient once. Nothing but the features is kept.

Features are N H W C in memory. `old_channels` of them are read, the new ones come right behind.
"""

# Triton's own spelling of constants, and its own types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from segtrain.models.dense_block_fused import MAX_GROWTH

_WIDTH = tl.constexpr(MAX_GROWTH)

# Numbers that change from level to level and batch to batch; a kernel for each kind of number would
# be compiled for no gain.
_ANY_NUMBER = [
    "height", "width", "tiles_y", "tiles_x", "num_tiles", "num_values", "num_pixels", "num_blocks",
    "num_splits", "layer", "first", "part_channels", "eps", "keep_scale", "drop_below",
]  # fmt: skip


@triton.jit
def _kept(seed, pixel, drop_below):
    """Which of 16 values of each pixel dropout keeps; the same in the forward and backward pass."""
    four = tl.arange(0, 4)
    lots = tl.randint4x(seed, pixel[:, None] * 4 + four[None, :])
    pairs = tl.join(tl.join(lots[0], lots[1]), tl.join(lots[2], lots[3]))
    lot = tl.reshape(pairs, (pixel.shape[0], 16)).to(tl.uint32, bitcast=True)
    return lot >= drop_below


@triton.jit(do_not_specialize=_ANY_NUMBER)
def layer_forward(
    features, mean, var, norm_weight, norm_bias, weight, bias, seed, partials,
    height, width, old_channels, all_channels, tiles_y, tiles_x, num_tiles,
    stride_new, stride_old, stride_y, stride_x,
    eps, drop_below, keep_scale, layer,
    GROWTH: tl.constexpr, DROPOUT: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    image = tile // (tiles_x * tiles_y)
    of_image = features + tl.cast(image, tl.int64) * height * width * all_channels
    in_tile = tl.arange(0, TILE_H * TILE_W)
    y = tile // tiles_x % tiles_y * TILE_H + in_tile // TILE_W
    x = tile % tiles_x * TILE_W + in_tile % TILE_W
    inside = (y < height) & (x < width)
    new = tl.arange(0, _WIDTH)
    is_new = new < GROWTH

    total = tl.zeros((TILE_H * TILE_W, _WIDTH), tl.float32)
    for step in range(tl.cdiv(old_channels, BLOCK_C) * 9):
        c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        is_old = c < old_channels
        rstd = tl.rsqrt(tl.load(var + c, mask=is_old, other=1.0) + eps)
        scale = tl.load(norm_weight + c, mask=is_old, other=0.0).to(tl.float32) * rstd
        shift = tl.load(norm_bias + c, mask=is_old, other=0.0).to(tl.float32)
        shift -= tl.load(mean + c, mask=is_old, other=0.0) * scale

        tap_y, tap_x = step % 9 // 3, step % 9 % 3
        from_y, from_x = y + tap_y - 1, x + tap_x - 1
        seen = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        pixel = from_y * width + from_x
        f = tl.load(
            of_image + (pixel[:, None] * all_channels + c[None, :]),
            mask=seen[:, None] & is_old[None, :],
            other=0.0,
        )
        a = tl.maximum(f.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
        a = tl.where(seen[:, None], a, 0.0).to(f.dtype)
        w = tl.load(
            weight + c[:, None] * stride_old + new[None, :] * stride_new
            + tap_y * stride_y + tap_x * stride_x,
            mask=is_old[:, None] & is_new[None, :],
            other=0.0,
        )  # fmt: skip
        total = tl.dot(a, w.to(f.dtype), total)

    total += tl.load(bias + new, mask=is_new, other=0.0).to(tl.float32)[None, :]
    here = y * width + x
    if DROPOUT:
        keep = _kept(tl.load(seed) + layer, image * height * width + here, drop_below)
        total = tl.where(keep, total * keep_scale, 0.0)
    made = total.to(features.dtype.element_ty)
    written = inside[:, None] & is_new[None, :]
    tl.store(
        of_image + (here[:, None] * all_channels + old_channels + new[None, :]), made, mask=written
    )

    made = tl.where(inside[:, None], made.to(tl.float32), 0.0)
    middle = tl.sum(made, 0) / tl.sum(inside.to(tl.float32), 0)
    off = tl.where(inside[:, None], made - middle[None, :], 0.0)
    tl.store(partials + new * num_tiles + tile, middle, mask=is_new)
    tl.store(partials + (GROWTH + new) * num_tiles + tile, tl.sum(off * off, 0), mask=is_new)


@triton.jit
def _tile_counts(tile, num_tiles, height, width, tiles_y, tiles_x, TILE_H, TILE_W):
    """Pixels of each tile that lie in the image."""
    rows = tl.minimum(height - tile // tiles_x % tiles_y * TILE_H, TILE_H)
    columns = tl.minimum(width - tile % tiles_x * TILE_W, TILE_W)
    return tl.where(tile < num_tiles, rows * columns, 0).to(tl.float32)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def merge_moments(
    partials, mean, var, height, width, tiles_y, tiles_x, num_tiles, num_values,
    GROWTH: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of a new channel from those of its tiles (Chan et al. 1979)."""
    channel = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = _tile_counts(tile, num_tiles, height, width, tiles_y, tiles_x, TILE_H, TILE_W)
        middle = tl.load(partials + channel * num_tiles + tile, mask=tile < num_tiles, other=0.0)
        total += count * middle
    middle_of_all = tl.sum(total, 0) / num_values
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        known = tile < num_tiles
        count = _tile_counts(tile, num_tiles, height, width, tiles_y, tiles_x, TILE_H, TILE_W)
        middle = tl.load(partials + channel * num_tiles + tile, mask=known, other=0.0)
        total += count * (middle - middle_of_all) * (middle - middle_of_all)
        total += tl.load(partials + (GROWTH + channel) * num_tiles + tile, mask=known, other=0.0)
    tl.store(mean + channel, middle_of_all)
    tl.store(var + channel, tl.sum(total, 0) / num_values)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def grad_of_new(
    grad, features, mean, grad_mean, grad_var, seed, grad_y, partials,
    num_pixels, old_channels, all_channels, drop_below, keep_scale, layer,
    GROWTH: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of what the convolution has made, and its sum over a block's pixels."""
    block = tl.program_id(0)
    in_block = tl.arange(0, BLOCK)
    pixel = block * BLOCK + in_block
    new = tl.arange(0, _WIDTH)
    is_new = new < GROWTH
    c = old_channels + new
    valid = (pixel < num_pixels)[:, None] & is_new[None, :]
    start = tl.cast(block, tl.int64) * BLOCK * all_channels
    where = in_block[:, None] * all_channels + c[None, :]
    f = tl.load(features + start + where, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(grad + start + where, mask=valid, other=0.0).to(tl.float32)
    off = f - tl.load(mean + c, mask=is_new, other=0.0)[None, :]
    by_mean = tl.load(grad_mean + c, mask=is_new, other=0.0)[None, :]
    by_var = tl.load(grad_var + c, mask=is_new, other=0.0)[None, :]
    g += (by_mean + 2.0 * by_var * off) / num_pixels
    if DROPOUT:
        g = tl.where(_kept(tl.load(seed) + layer, pixel, drop_below), g * keep_scale, 0.0)
    g = tl.where(valid, g, 0.0).to(grad_y.dtype.element_ty)
    tl.store(grad_y + pixel[:, None] * _WIDTH + new[None, :], g, mask=(pixel < num_pixels)[:, None])
    tl.store(partials + block * _WIDTH + new, tl.sum(g.to(tl.float32), 0))


@triton.jit(do_not_specialize=_ANY_NUMBER)
def layer_backward(
    grad_y, features, grad, mean, var, norm_weight, norm_bias, weight, partials,
    height, width, num_pixels, old_channels, all_channels, num_blocks,
    stride_new, stride_old, stride_y, stride_x, eps,
    GROWTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the share of the features' values to `grad`; partial sums of the weights' gradients.

    A convolution's gradients are two matrix products of the same matrix: each pixel's row holds the
    new features' gradients at its nine neighbours. Eight of them and the ninth, since sides of
    products are powers of two.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_old = c < old_channels
    middle = tl.load(mean + c, mask=is_old, other=0.0)
    rstd = tl.rsqrt(tl.load(var + c, mask=is_old, other=1.0) + eps)
    gamma = tl.load(norm_weight + c, mask=is_old, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + c, mask=is_old, other=0.0).to(tl.float32)

    eight = tl.arange(0, 8 * _WIDTH)
    tap, new = eight // _WIDTH, eight % _WIDTH
    last = tl.arange(0, _WIDTH)
    w_eight = tl.load(
        weight + c[None, :] * stride_old
        + (new * stride_new + tap // 3 * stride_y + tap % 3 * stride_x)[:, None],
        mask=is_old[None, :] & (new < GROWTH)[:, None],
        other=0.0,
    ).to(features.dtype.element_ty)  # fmt: skip
    w_last = tl.load(
        weight + c[None, :] * stride_old
        + (last * stride_new + 2 * stride_y + 2 * stride_x)[:, None],
        mask=is_old[None, :] & (last < GROWTH)[:, None],
        other=0.0,
    ).to(features.dtype.element_ty)  # fmt: skip

    grad_w_eight = tl.zeros((8 * _WIDTH, BLOCK_C), tl.float32)
    grad_w_last = tl.zeros((_WIDTH, BLOCK_C), tl.float32)
    grad_gamma = tl.zeros((BLOCK_C,), tl.float32)
    grad_beta = tl.zeros((BLOCK_C,), tl.float32)
    in_block = tl.arange(0, BLOCK_P)
    where = in_block[:, None] * all_channels + c[None, :]
    for block in range(tl.program_id(1), num_blocks, tl.num_programs(1)):
        pixel = block * BLOCK_P + in_block
        valid = pixel < num_pixels
        x, y = pixel % width, pixel // width % height
        # Feature (y, x) went into the new features at (y, x) - tap + 1.
        to_y, to_x = y[:, None] + 1 - (tap // 3)[None, :], x[:, None] + 1 - (tap % 3)[None, :]
        reached = (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
        neighbour = pixel[:, None] + ((1 - tap // 3) * width + 1 - tap % 3)[None, :]
        g_eight = tl.load(
            grad_y + neighbour * _WIDTH + new[None, :], mask=reached & valid[:, None], other=0.0
        )
        reached_last = valid & (y > 0) & (x > 0)
        g_last = tl.load(
            grad_y + (pixel - width - 1)[:, None] * _WIDTH + last[None, :],
            mask=reached_last[:, None],
            other=0.0,
        )
        start = tl.cast(block, tl.int64) * BLOCK_P * all_channels
        both = valid[:, None] & is_old[None, :]
        f = tl.load(features + start + where, mask=both, other=0.0)
        normed = (f.to(tl.float32) - middle[None, :]) * rstd[None, :]
        a = tl.maximum(normed * gamma[None, :] + beta[None, :], 0.0)
        a_low = a.to(f.dtype)
        g = tl.dot(g_eight, w_eight)
        g = tl.dot(g_last, w_last, g)
        grad_w_eight = tl.dot(tl.trans(g_eight), a_low, grad_w_eight)
        grad_w_last = tl.dot(tl.trans(g_last), a_low, grad_w_last)
        g = tl.where(a > 0, g, 0.0)
        grad_gamma += tl.sum(g * normed, 0)
        grad_beta += tl.sum(g, 0)
        before = tl.load(grad + start + where, mask=both, other=0.0).to(tl.float32)
        after = before + g * (gamma * rstd)[None, :]
        tl.store(grad + start + where, after.to(f.dtype), mask=both)

    own = partials + tl.program_id(1).to(tl.int64) * (9 * _WIDTH + 2) * old_channels + c
    tl.store(own[None, :] + eight[:, None] * old_channels, grad_w_eight, mask=is_old[None, :])
    tl.store(
        own[None, :] + (last + 8 * _WIDTH)[:, None] * old_channels,
        grad_w_last,
        mask=is_old[None, :],
    )
    tl.store(own + 9 * _WIDTH * old_channels, grad_gamma, mask=is_old)
    tl.store(own + (9 * _WIDTH + 1) * old_channels, grad_beta, mask=is_old)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def sum_partials(
    partials, bias_partials, var, norm_weight, grad_mean, grad_var,
    grad_norm_weight, grad_norm_bias, grad_weight, grad_bias,
    old_channels, num_splits, num_blocks, stride_new, stride_old, stride_y, stride_x, eps,
    GROWTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights' gradients from their partial sums, and what the moments get of them."""
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
        by_mean = tl.load(grad_mean + c, mask=is_old, other=0.0)
        by_var = tl.load(grad_var + c, mask=is_old, other=0.0)
        tl.store(grad_mean + c, by_mean - scale * grad_beta, mask=is_old)
        tl.store(grad_var + c, by_var - 0.5 * scale * rstd * grad_gamma, mask=is_old)
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


@triton.jit(do_not_specialize=_ANY_NUMBER)
def grad_of_part(
    grad, features, mean, grad_mean, grad_var, grad_part,
    num_pixels, all_channels, first, part_channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of the block's input, with what reaches it by its moments."""
    block = tl.program_id(0)
    in_block = tl.arange(0, BLOCK_P)
    in_part = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_part = in_part < part_channels
    c = first + in_part
    valid = (block * BLOCK_P + in_block < num_pixels)[:, None] & is_part[None, :]
    start = tl.cast(block, tl.int64) * BLOCK_P
    where = in_block[:, None] * all_channels + c[None, :]
    f = tl.load(features + start * all_channels + where, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(grad + start * all_channels + where, mask=valid, other=0.0).to(tl.float32)
    off = f - tl.load(mean + c, mask=is_part, other=0.0)[None, :]
    by_mean = tl.load(grad_mean + c, mask=is_part, other=0.0)[None, :]
    by_var = tl.load(grad_var + c, mask=is_part, other=0.0)[None, :]
    g += (by_mean + 2.0 * by_var * off) / num_pixels
    tl.store(
        grad_part + start * part_channels
        + (in_block[:, None] * part_channels + in_part[None, :]),
        g.to(grad_part.dtype.element_ty),
        mask=valid,
    )  # fmt: skip

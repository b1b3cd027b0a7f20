"""Positions and blend weights of the overlapping tiles of a large image.

`segtrain.inference.tiled` explains the weights. This module does not import torch.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from segtrain.errors import UsageError

STRIDE = 32
"""Tiles start at multiples of this, to which all networks here downsample unless their depth is
increased. So pooling windows cover the same pixels in a tile as in the whole image."""

_MIN_TILE_SIZE = 4 * STRIDE
_AUTO_TILE_SIZE = 512
_MAX_UNTILED_PIXELS = 2**20
# Weights are integer multiples of this, so that sums of products of two are exact in float32.
_WEIGHT_STEP = 2.0**-12


def check_tile_size(tile_size: int) -> None:
    """Reject an invalid tile size.

    Raises:
        UsageError: `tile_size` is too small or not a multiple of STRIDE.
    """
    if tile_size < _MIN_TILE_SIZE or tile_size % STRIDE:
        raise UsageError(
            f"invalid tile size of {tile_size} pixels",
            f"use a multiple of {STRIDE}, at least {_MIN_TILE_SIZE}",
        )


def auto_tile_size(height: int, width: int) -> int | None:
    """Return None (no tiles) up to a megapixel and 512 above.

    In float32, a tile needs less than a gigabyte in each network here, a megapixel four times as
    much.
    """
    return None if height * width <= _MAX_UNTILED_PIXELS else _AUTO_TILE_SIZE


def tile_spans(length: int, tile_size: int) -> list[slice]:
    """Return evenly spaced tiles along one side of an image.

    Neighbors overlap by at least half a tile. All tiles start at multiples of STRIDE and end within
    the image. The last one is up to STRIDE - 1 pixels shorter, so that the network pads it in the
    same way as the whole image. An image that is not longer than a tile has one tile.
    """
    if length <= tile_size:
        return [slice(0, length)]
    step = tile_size - _overlap(tile_size)
    last = -(-(length - tile_size) // STRIDE)
    num_steps = -(-last * STRIDE // step)
    starts = [last * index // num_steps * STRIDE for index in range(num_steps + 1)]
    return [slice(start, min(start + tile_size, length)) for start in starts]


def tile_weights(length: int, tile_size: int) -> list[npt.NDArray[np.float32]]:
    """Return the blend weights, in 0..1, of the pixels of each tile in `tile_spans`.

    A step function rises from 0 to 1 around the middle of each overlap. The weight of a tile is the
    step at its start minus the step at its end, so the weights sum to exactly one at every pixel.
    """
    spans = tile_spans(length, tile_size)
    centers = np.arange(length, dtype=np.float32) + 0.5
    steps = [np.ones(length, dtype=np.float32)]
    for span, next_span in pairwise(spans):
        middle = (next_span.start + span.stop) / 2
        t = np.clip((centers - middle) / _ramp(tile_size) + 0.5, 0, 1)
        steps.append(np.rint(t * t * (3 - 2 * t) / _WEIGHT_STEP) * _WEIGHT_STEP)
    steps.append(np.zeros(length, dtype=np.float32))
    return [(start - end)[span] for span, (start, end) in zip(spans, pairwise(steps), strict=True)]


def _overlap(tile_size: int) -> int:
    """Half a tile, as in nnU-Net (Isensee et al. 2018, arXiv 1809.10486), or slightly more.

    A quarter would halve the work. But networks with a large receptive field predict differently in
    different tiles, and then the blends are visible: patches that end before the person does.
    """
    return -(-tile_size // (2 * STRIDE)) * STRIDE


def _ramp(tile_size: int) -> int:
    """Length of the rise of the weights: the middle half of the overlap.

    The outer eighth of a tile on each side gets weight 0.
    """
    return _overlap(tile_size) // 2

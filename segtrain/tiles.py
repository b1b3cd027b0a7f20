"""Where the tiles of a large picture lie and how much each counts; whoever runs the network.

`segtrain.models.tiling` says why they are weighted so.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from segtrain.errors import UsageError

STRIDE = 32
"""Tiles begin at multiples of this: what all networks here halve to, unless they are deepened. So a
tile is pooled at the same pixels as the whole picture is."""

_SMALLEST = 4 * STRIDE
_AUTOMATIC = 512
_LARGEST_WHOLE = 2**20
# Weights are whole multiples of this: sums of products of two are exact in float32.
_GRAIN = 2.0**-12


def check_side(side: int) -> None:
    """Refuse sides that tiles cannot have.

    Raises:
        UsageError: `side` is too small or no multiple of STRIDE.
    """
    if side < _SMALLEST or side % STRIDE:
        raise UsageError(
            f"tiles cannot have a side of {side} pixels; take a multiple of {STRIDE} from "
            f"{_SMALLEST} on"
        )


def automatic_side(height: int, width: int) -> int | None:
    """None, for whole, up to a megapixel; else 512 pixels.

    A tile takes each network here less than a gigabyte in float32, a megapixel four times as much.
    """
    return None if height * width <= _LARGEST_WHOLE else _AUTOMATIC


def spans(length: int, side: int) -> list[slice]:
    """Where the tiles lie along one side of a picture, evenly spread.

    Neighbours overlap by at least half a tile. All begin at multiples of STRIDE and none reaches
    beyond the picture; the last one is up to STRIDE - 1 pixels shorter, so that the network
    pads it just as it pads the whole picture. A picture that is no longer than a tile has one.
    """
    if length <= side:
        return [slice(0, length)]
    step = side - _overlap(side)
    last = -(-(length - side) // STRIDE)
    num_steps = -(-last * STRIDE // step)
    starts = [last * number // num_steps * STRIDE for number in range(num_steps + 1)]
    return [slice(start, min(start + side, length)) for start in starts]


def weights(length: int, side: int) -> list[npt.NDArray[np.float32]]:
    """How much the pixels of each tile in `spans` count, in 0..1.

    Halfway through each overlap a step rises from 0 to 1, and a tile counts as much as the step at
    its beginning exceeds the one at its end. So at every pixel the weights sum to exactly one.
    """
    tiles = spans(length, side)
    middles = np.arange(length, dtype=np.float32) + 0.5
    steps = [np.ones(length, dtype=np.float32)]
    for tile, following in pairwise(tiles):
        centre = (following.start + tile.stop) / 2
        t = np.clip((middles - centre) / _ramp(side) + 0.5, 0, 1)
        steps.append(np.rint(t * t * (3 - 2 * t) / _GRAIN) * _GRAIN)
    steps.append(np.zeros(length, dtype=np.float32))
    return [(begin - end)[tile] for tile, (begin, end) in zip(tiles, pairwise(steps), strict=True)]


def _overlap(side: int) -> int:
    """Half a tile, as in nnU-Net (Isensee et al. 2018, arXiv 1809.10486), or a bit more.

    A quarter is half the work. But networks that look far say other things in other tiles, and then
    the blends can be seen: patches that end before the person does.
    """
    return -(-side // (2 * STRIDE)) * STRIDE


def _ramp(side: int) -> int:
    """The middle half of the overlap. Beside it, an eighth of a tile wide, an end is not heard."""
    return _overlap(side) // 2

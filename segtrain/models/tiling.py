"""Seeing a large picture through overlapping tiles, blended so that no seam shows.

What a network says near the inner edge of a tile lacks the picture beyond it. So nothing is taken
from a tile's outermost pixels, three eighths of the overlap, and over the quarter in the middle
one tile's answer turns into the next one's. Where a network sees no farther than that margin, tiles
give what the whole picture gives.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# A network that halves five times sees the same grid in a tile that starts at a multiple of this.
_GRID = 32
SMALLEST_TILE = 2 * _GRID


def through_tiles(see: Callable[[Tensor], Tensor], image: Tensor, tile: int) -> Tensor:
    """Put an answer together from tiles, seen one after the other.

    Besides picture and answer it takes the memory of one tile.

    Args:
        see: N 3 h w → N h w float32, of any h and w.
        image: N 3 H W.
        tile: longest side of what is seen at once, pixels; at least `SMALLEST_TILE`.

    Returns:
        N H W float32 on the picture's device.
    """
    height, width = image.shape[-2:]
    rows, columns = (_ramps(length, tile, image.device) for length in (height, width))
    answer = torch.zeros(len(image), height, width, device=image.device)
    for top, down in rows:
        for left, across in columns:
            place = (..., slice(top, top + len(down)), slice(left, left + len(across)))
            answer[place] += see(image[place]) * (down[:, None] * across)
    answer /= _total(rows, height, image.device)[:, None]
    answer /= _total(columns, width, image.device)
    return answer


def _ramps(length: int, tile: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """Along one side: where tiles start, and the weight of each of their pixels."""
    starts = tile_starts(length, tile)
    # Two tiles share at least so much: the margin twice and the ramp between.
    shared = tile - _step(tile)
    margin, ramp = 3 * shared / 8, shared / 4
    found = []
    for start in starts:
        size = min(tile, length - start)
        inside = torch.arange(size, device=device) + 0.5
        weight = torch.ones(size, device=device)
        if start > 0:
            weight = weight.minimum((inside - margin) / ramp)
        if start + size < length:
            weight = weight.minimum((size - inside - margin) / ramp)
        found.append((start, weight.clamp(min=0)))
    return found


def tile_starts(length: int, tile: int) -> list[int]:
    """Where the tiles along a side begin; the last one may be smaller by less than 32 pixels."""
    if length <= tile:
        return [0]
    last = -(-(length - tile) // _GRID) * _GRID
    return [*range(0, last, _step(tile)), last]


def _step(tile: int) -> int:
    """From one tile to the next: three quarters of it, so that a quarter overlaps."""
    return max(_GRID, 3 * tile // 4 // _GRID * _GRID)


def _total(ramps: list[tuple[int, Tensor]], length: int, device: torch.device) -> Tensor:
    total = torch.zeros(length, device=device)
    for start, weight in ramps:
        total[start : start + len(weight)] += weight
    return total

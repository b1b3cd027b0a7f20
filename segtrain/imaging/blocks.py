"""Process a full-size image in blocks, with memory for one block at a time.

Few blocks contain the person's edge. The others can often be decided from their bounds alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Region = tuple[slice, slice]
"""Rows and columns."""

# Smaller blocks process fewer pixels far from any edge. Below this size, the margins that the
# blocks read around themselves cost as much as that saves.
_SIDE = 256


@dataclass(frozen=True)
class Block:
    """One block: which pixels to read and which to write.

    Attributes:
        inner: rows and columns of the image that belong to this block alone.
        outer: `inner` and the margin read around it, clipped to the image.
        core: position of `inner` within `outer`.
    """

    inner: Region
    outer: Region
    core: Region


def blocks(size: tuple[int, int], reach: int) -> Iterator[Block]:
    """Cover an image of `size` (height, width) with blocks that read `reach` pixels around them."""
    for top in range(0, size[0], _SIDE):
        for left in range(0, size[1], _SIDE):
            rows = slice(top, min(top + _SIDE, size[0]))
            columns = slice(left, min(left + _SIDE, size[1]))
            yield block_at((rows, columns), size, reach)


def block_at(inner: Region, size: tuple[int, int], reach: int) -> Block:
    """Return the block with these inner rows and columns in an image of `size` (height, width)."""
    outer = [
        slice(max(0, span.start - reach), min(length, span.stop + reach))
        for span, length in zip(inner, size, strict=True)
    ]
    core = [
        slice(span.start - around.start, span.stop - around.start)
        for span, around in zip(inner, outer, strict=True)
    ]
    return Block(inner, (outer[0], outer[1]), (core[0], core[1]))

"""A picture by tiles: what is done at full size needs memory for one tile, and often for no tile.

The person's edge runs through few of them; the others are decided at a glance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Region = tuple[slice, slice]

# The smaller, the fewer pixels are worked on that are far from any edge; below this, the surplus of
# what tiles see around themselves is as large as what is saved.
_SIDE = 256


@dataclass(frozen=True)
class Tile:
    """Where to read and where to write.

    inner: rows and columns of the picture that belong to this tile alone.
    outer: these and the pixels around them that are looked at, as far as the picture goes.
    core: the inner ones within the outer ones.
    """

    inner: Region
    outer: Region
    core: Region


def tiles(size: tuple[int, int], reach: int) -> Iterator[Tile]:
    """Cover a picture of this height and width; each tile sees `reach` pixels around itself."""
    for top in range(0, size[0], _SIDE):
        for left in range(0, size[1], _SIDE):
            rows = slice(top, min(top + _SIDE, size[0]))
            columns = slice(left, min(left + _SIDE, size[1]))
            yield tile_at((rows, columns), size, reach)


def tile_at(inner: Region, size: tuple[int, int], reach: int) -> Tile:
    """The tile with these rows and columns of a picture of this height and width."""
    outer = [
        slice(max(0, side.start - reach), min(length, side.stop + reach))
        for side, length in zip(inner, size, strict=True)
    ]
    core = [
        slice(side.start - around.start, side.stop - around.start)
        for side, around in zip(inner, outer, strict=True)
    ]
    return Tile(inner, (outer[0], outer[1]), (core[0], core[1]))

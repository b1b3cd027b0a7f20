"""A picture by tiles: what is done at full size needs memory for one tile, and often for no tile.

The person's edge runs through few of them; the others are decided at a glance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Region = tuple[slice, slice]

_SIDE = 512


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
    for rows in _sides(size[0], reach):
        for columns in _sides(size[1], reach):
            inner, outer, core = zip(rows, columns, strict=True)
            yield Tile(inner, outer, core)


def _sides(length: int, reach: int) -> Iterator[tuple[slice, slice, slice]]:
    for start in range(0, length, _SIDE):
        stop = min(start + _SIDE, length)
        outer_start = max(0, start - reach)
        outer = slice(outer_start, min(length, stop + reach))
        yield slice(start, stop), outer, slice(start - outer_start, stop - outer_start)

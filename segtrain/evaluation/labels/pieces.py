"""Connected pieces of a region, without the small ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from segtrain.evaluation.labels.disagreement import Region, grown

LEAST_SHARE = 0.003
"""Of the frame: smaller pieces are not looked at. A square of 30 pixels at 640x480."""


class Box(NamedTuple):
    """Whole pixels: the left upper one, and how many there are."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """What it cuts out of an array H W."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )

    def widened(self, margin: int, size: tuple[int, int]) -> "Box":
        """With `margin` pixels more to each side, as far as the frame of `size` H, W has them."""
        left, top = max(0, self.left - margin), max(0, self.top - margin)
        right = min(size[1], self.left + self.width + margin)
        bottom = min(size[0], self.top + self.height + margin)
        return Box(left, top, right - left, bottom - top)


@dataclass(frozen=True)
class Piece:
    """h w bool in a box of h w, which it touches on all sides; `share` of the frame."""

    region: Region
    box: Box
    share: float


def large_pieces(region: Region) -> Iterator[Piece]:
    """Pieces of `region`, H W, whose pixels touch, also at corners."""
    if not region.any():
        return
    _, labels, stats, _ = cv2.connectedComponentsWithStats(region.view(np.uint8))
    for label in range(1, len(stats)):
        *corner_and_size, area = stats[label].tolist()
        if area >= LEAST_SHARE * region.size:
            box = Box(*corner_and_size)
            yield Piece(labels[box.slices] == label, box, area / region.size)


def box_with_surroundings(piece: Piece, region: Region, depth: int) -> Box:
    """Around the piece and what of `region`, H W, lies within `depth` pixels of it."""
    window = piece.box.widened(depth, region.shape)
    alone = np.zeros((window.height, window.width), dtype=np.bool_)
    top, left = piece.box.top - window.top, piece.box.left - window.left
    alone[top : top + piece.box.height, left : left + piece.box.width] = piece.region
    joined = grown(alone, depth) & region[window.slices]
    left, top, width, height = cv2.boundingRect((joined | alone).view(np.uint8))
    return Box(window.left + left, window.top + top, width, height)

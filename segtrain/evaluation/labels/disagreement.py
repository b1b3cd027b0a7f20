"""Where a network surely sees something else than the annotation says, and how far off that is.

An outline that is drawn a little wrong, and a person who is missing, both show as pixels of which
network and annotation disagree. They are told apart by a band, 2 % of the diagonal wide as that of
boundary IoU. Where the network sees a person and the annotation has one within the band, the two
mean the same person, and one of the outlines is off. Where the annotation has none as near, one is
missing. The same holds the other way round, with network and annotation exchanged.

An ignored pixel may be either. Nothing there is disagreed about, and what lies within the band of
it is taken to be near to a person.
"""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.evaluation.boundaries import boundary_depth
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels

SURE = 0.9
"""From this probability of its own answer on the network is sure."""

Region = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Pixels where one of the two sees a person and the other does not; the network is sure.

    All are H W.

    pixels: all of them.
    far: no person of the other's is within the band, and the piece is wider than half the band.
    near: neither far nor joined to it: outlines that are off.
    """

    pixels: Region
    far: Region
    near: Region


class Disagreement:
    """Network and annotation of one picture.

    Args:
        probs: H W float32 in 0..1, probability of person.
        mask: H W uint8 in {0, 1, 255}.
    """

    def __init__(self, probs: Probs, mask: Pixels) -> None:
        self.probs, self.mask = probs, mask
        self.depth = boundary_depth(*mask.shape)
        """Width of the band, pixels."""

    @cached_property
    def surely_background(self) -> Region:
        """Where the network is sure that nobody is."""
        return self.probs <= np.float32(1 - SURE)

    @cached_property
    def missing(self) -> Difference:
        """The network sees a person, the annotation has none."""
        pixels = (self.probs >= np.float32(SURE)) & (self.mask == BACKGROUND)
        return self._difference(pixels, others=self.mask == PERSON)

    @cached_property
    def phantom(self) -> Difference:
        """The annotation has a person, the network sees none."""
        pixels = self.surely_background & (self.mask == PERSON)
        return self._difference(pixels, others=self.probs >= np.float32(0.5))

    def _difference(self, pixels: Region, others: Region) -> Difference:
        """
        Args:
            others: the people whom the other one of the two sees.
        """
        if not pixels.any():
            return Difference(pixels=pixels, far=pixels, near=pixels)
        near_others = grown(others | (self.mask == IGNORE), self.depth)
        # A sliver just beyond the band is the rest of an outline that is off.
        far = opened(pixels & ~near_others, self.depth // 2 + 1)
        near = pixels & ~grown(far, self.depth)
        return Difference(pixels=pixels, far=far, near=near)


def grown(region: Region, depth: int) -> Region:
    """H W: all that has a pixel of `region` in the square of `depth` pixels to each side."""
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * depth + 1, 2 * depth + 1))
    return cv2.dilate(region.view(np.uint8), square).view(np.bool_)


def opened(region: Region, side: int) -> Region:
    """H W: the parts of `region` that hold a square with `side` pixels a side, inside the frame."""
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    # Anchors at opposite corners: OpenCV's own opening moves by a pixel where the side is even.
    corners = cv2.erode(
        region.view(np.uint8),
        square,
        anchor=(0, 0),
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return cv2.dilate(corners, square, anchor=(side - 1, side - 1)).view(np.bool_)

"""Crumbs and pinholes: small pieces of person that are none, small holes in a person."""

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels
from segtrain.prediction.probability import Values

_SHARE_OF_LARGEST, _SHARE_OF_FRAME = 0.01, 0.0001


def clean(
    probability: Values,
    *,
    share_of_largest: float = _SHARE_OF_LARGEST,
    share_of_frame: float = _SHARE_OF_FRAME,
) -> Values:
    """Take away small pieces of person and fill small holes.

    A piece is what hangs together, also over corners, of the pixels that are rather person than
    not. It is small if it covers less than a hundredth of the largest piece, or than a ten
    thousandth of the frame, which is seven pixels a side of what a network sees at 224. A hole is
    a piece of background that does not touch the frame, and small by the same two areas: the
    triangle between an arm on the hip and the body is a few hundredths of a person and stays.

    The soft edge around a small piece goes with it: all background that lies nearer to it than to
    any other piece becomes 0; and all person that lies nearest to a small hole becomes 1.

    Args:
        probability: H W float32 in 0..1, better refined before than after.
        share_of_largest: a smaller share of the largest piece's area is small.
        share_of_frame: a smaller share of the frame's area is small.

    Returns:
        H W float32, a new array.
    """
    person = (probability >= 0.5).view(np.uint8)
    nearest, areas = _pieces(person)
    largest, floor = areas.max(), share_of_frame * person.size
    small = (areas > 0) & (areas < max(share_of_largest * largest, floor))
    cleaned = np.where(small[nearest], np.float32(0), probability)

    background = (cleaned < 0.5).view(np.uint8)
    nearest, areas = _pieces(background)
    hole = (areas > 0) & (areas < max(share_of_largest * largest, floor))
    for border in (0, -1):
        hole[nearest[border][background[border] > 0]] = False
        hole[nearest[:, border][background[:, border] > 0]] = False
    return np.where(hole[nearest], np.float32(1), cleaned)


def _pieces(region: Pixels) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """For every pixel the number of the nearest piece of `region`, and each piece's area.

    Args:
        region: H W, 1 or 0.

    Returns:
        H W int32, 0 if there is no piece at all, and the areas by number, in pixels.
    """
    if not region.any():
        return np.zeros(region.shape, dtype=np.int32), np.zeros(1, dtype=np.int64)
    _, nearest = cv2.distanceTransformWithLabels(
        1 - region, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP
    )
    numbers = np.asarray(nearest, dtype=np.int32)
    return numbers, np.bincount(numbers[region > 0])

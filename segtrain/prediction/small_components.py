"""Removal of small components and small holes."""

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.types import Mask, Probs

_FRACTION_OF_LARGEST, _FRACTION_OF_IMAGE = 0.01, 0.0001


def remove_small_components(
    probs: Probs,
    *,
    fraction_of_largest: float = _FRACTION_OF_LARGEST,
    fraction_of_image: float = _FRACTION_OF_IMAGE,
) -> Probs:
    """Remove small person components and fill small holes.

    A component is 8-connected over pixels with p >= 0.5. It is small if its area is less than 1 %
    of the largest component, or less than 0.01 % of the image, which is a square of seven pixels
    of a network input of 224. A hole is a background component that does not touch the image
    border, and small by the same two areas: the triangle between an arm on the hip and the body is
    a few percent of a person and stays.

    The soft edge around a small component goes with it: all background that is nearer to it than
    to any other component becomes 0. All person pixels that are nearest to a small hole become 1.

    Args:
        probs: H W float32 in 0..1; refine before, not after.
        fraction_of_largest: components below this fraction of the largest one's area are small.
        fraction_of_image: components below this fraction of the image's area are small.

    Returns:
        H W float32, a new array.
    """
    person = (probs >= 0.5).view(np.uint8)
    nearest, areas = _nearest_components(person)
    min_area = max(fraction_of_largest * areas.max(), fraction_of_image * person.size)
    is_small = (areas > 0) & (areas < min_area)
    cleaned = np.where(is_small[nearest], np.float32(0), probs)

    background = (cleaned < 0.5).view(np.uint8)
    nearest, areas = _nearest_components(background)
    is_hole = (areas > 0) & (areas < min_area)
    for border in (0, -1):
        is_hole[nearest[border][background[border] > 0]] = False
        is_hole[nearest[:, border][background[:, border] > 0]] = False
    return np.where(is_hole[nearest], np.float32(1), cleaned)


def _nearest_components(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Label every pixel with the nearest component, and measure the components.

    Args:
        mask: H W, 1 or 0.

    Returns:
        The labels, H W int32, 0 without any component; and the area of each label, in pixels.
    """
    if not mask.any():
        return np.zeros(mask.shape, dtype=np.int32), np.zeros(1, dtype=np.int64)
    _, nearest = cv2.distanceTransformWithLabels(
        1 - mask, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP
    )
    labels = np.asarray(nearest, dtype=np.int32)
    return labels, np.bincount(labels[mask > 0])

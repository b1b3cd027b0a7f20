"""Border map of the U-Net paper: extra weight for background pixels between two close people."""

from functools import reduce

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.types import BACKGROUND, PERSON, Image, Mask


def border_map(mask: Mask, sigma: float) -> Image:
    """Compute how close each background pixel is to two people.

    The value is round(255 exp(-(d1 + d2)^2 / (2 sigma^2))), where d1 and d2 are the distances to
    the nearest and second nearest person (Ronneberger et al. 2015, arXiv 1505.04597, section 3,
    eq. 2, without w0). Distances are exact, Euclidean, in pixels, to the nearest pixel of the
    person. Persons are the 8-connected components of the person class: overlapping people count as
    one person, and a person cut in two counts as two.

    Args:
        mask: H W uint8 in {0, 1, 255}.
        sigma: pixels, above 0.

    Returns:
        H W uint8 in 0..255; 0 on people and ignored pixels, and 0 everywhere if the mask has fewer
        than two persons.
    """
    person = (mask == PERSON).view(np.uint8)
    num_labels, labels = cv2.connectedComponents(person, connectivity=8, ltype=cv2.CV_32S)
    if num_labels < 3:  # the background is one of the labels
        return np.zeros_like(mask)
    nearest, second = _two_nearest_distances(labels, num_labels - 1)
    weight = 255 * np.exp(-0.5 * np.square((nearest + second) / np.float32(sigma)))
    return np.where(mask == BACKGROUND, np.rint(weight), 0).astype(np.uint8)


def _two_nearest_distances(
    labels: npt.NDArray[np.int32], num_components: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Compute the distance of every pixel to the nearest and second nearest component.

    One distance transform per component would take hundreds for a mask with hundreds of specks.
    This takes two per binary digit of `num_components - 1`. Number the components from 0. Each
    digit splits them into two groups. The nearest component is in the nearer group, and the farther
    group contains only other components, so the farther distance is never below the distance to the
    second nearest. It equals that distance at a digit in which the numbers of the two nearest
    components differ. So the minimum of the farther distances over all digits is exact.

    Args:
        labels: H W, 0 for background and 1 to `num_components` for the components.
        num_components: 2 or more.
    """
    numbers = np.arange(-1, num_components)
    nearer, farther = [], []
    for digit in range((num_components - 1).bit_length()):
        group = numbers >> digit & 1
        group[0] = -1  # the background is in neither group
        # A distance transform measures the distance to the nearest zero.
        distances = [
            cv2.distanceTransform(
                (group != value).view(np.uint8)[labels], cv2.DIST_L2, cv2.DIST_MASK_PRECISE
            )
            for value in (0, 1)
        ]
        nearer.append(np.minimum(*distances))
        farther.append(np.maximum(*distances))
    return nearer[0], reduce(np.minimum, farther)

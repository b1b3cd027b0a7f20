"""Where two people nearly touch: the extra weight of the U-Net paper."""

from functools import reduce

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import BACKGROUND, PERSON
from segtrain.images import Pixels

_Distances = npt.NDArray[np.float32]


def border_map(mask: Pixels, sigma: float) -> Pixels:
    """How much each background pixel lies between two people.

    That is round(255 exp(-(d1 + d2)^2 / (2 sigma^2))) with the distances to the nearest and to the
    second nearest person (Ronneberger et al. 2015, arXiv 1505.04597, section 3, eq. 2, without
    w0): Euclidean, in pixels, to the person's nearest pixel, exact. Persons are the connected
    components of the mask's person class, over corners, too: people who overlap are one, and one
    whom something cuts in two is two.

    Args:
        mask: H W uint8 in {0, 1, 255}.
        sigma: pixels, above 0.

    Returns:
        H W uint8 in 0..255; 0 on people, on ignored pixels, and everywhere where there are fewer
        than two persons.
    """
    person = (mask == PERSON).view(np.uint8)
    num_labels, labels = cv2.connectedComponents(person, connectivity=8, ltype=cv2.CV_32S)
    if num_labels < 3:  # the background is one of them
        return np.zeros_like(mask)
    nearest, second = _two_nearest(labels, num_labels - 1)
    weight: _Distances = 255 * np.exp(-0.5 * np.square((nearest + second) / np.float32(sigma)))
    return np.where(mask == BACKGROUND, np.rint(weight), 0).astype(np.uint8)


def _two_nearest(labels: npt.NDArray[np.int32], count: int) -> tuple[_Distances, _Distances]:
    """Distance of every pixel to the nearest and to the second nearest of `count` components.

    A distance transform a component would be hundreds where a mask has hundreds of specks; this
    takes two for each binary digit of `count - 1`. Number the components from 0. A digit parts them
    in two groups: the nearest component is in the nearer one, all of the farther one are others, so
    the farther distance is never below that of the second nearest. And it is that at a digit in
    which the numbers of the two nearest differ. So the least of the farther ones is exact.

    Args:
        labels: H W, 0 where there is none and then 1 to `count`, which is 2 or more.
    """
    numbers = np.arange(-1, count)
    nearer, farther = [], []
    for digit in range((count - 1).bit_length()):
        group = numbers >> digit & 1
        group[0] = -1  # no component
        # A distance transform measures to the zeros.
        distances = [
            cv2.distanceTransform(
                (group != which).view(np.uint8)[labels], cv2.DIST_L2, cv2.DIST_MASK_PRECISE
            )
            for which in (0, 1)
        ]
        nearer.append(np.minimum(*distances))
        farther.append(np.maximum(*distances))
    return nearer[0], reduce(np.minimum, farther)

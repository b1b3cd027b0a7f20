"""From the probability of person to the person's opacity."""

import math

import cv2
import numpy as np

from segtrain.images import Pixels
from segtrain.prediction.probability import Probability, Values, bounds
from segtrain.prediction.regions import tiles

SURE_BACKGROUND, SURE_PERSON = 0.3, 0.7
"""Below and above, the person is fully transparent and fully opaque."""
STEEPNESS = 1 / (SURE_PERSON - SURE_BACKGROUND)
"""Of opacity over probability between them."""

# A network sees a small copy of a photo, and its edge, enlarged, is a fog of many pixels.
_WIDEST_EDGE, _WIDEST_EDGE_SHARE = 3.0, 0.005
# Of the slope, against division by zero: below it the probability is flat.
_FLAT = 1e-5


def make_mask(probability: Probability) -> Pixels:
    """H W float32 in 0..1 → H W uint8: 255 where person is at least as likely as not, else 0."""
    height, width = probability.shape
    mask = np.empty((height, width), dtype=np.uint8)
    for tile in tiles((height, width), reach=0):
        lowest, highest = bounds(probability, tile.inner)
        if lowest >= 0.5 or highest < 0.5:
            mask[tile.inner] = 255 if lowest >= 0.5 else 0
        else:
            mask[tile.inner] = np.where(probability[tile.inner] >= 0.5, np.uint8(255), np.uint8(0))
    return mask


def make_alpha(probability: Probability) -> Pixels:
    """Opacity of the person, 0..255: solid inside, soft for a few pixels at the edge.

    Opacity is one half where the probability is, and grows with it: as steeply as makes 0 and 1 of
    0.3 and 0.7, and more steeply where that would take more than 3 pixels or half a percent of the
    short side. So a network that is unsure of a whole region makes no half-transparent person
    there, and a fine edge, found by the network or by `segtrain.prediction.refine`, is kept.

    Args:
        probability: H W float32 in 0..1.

    Returns:
        H W uint8; at least 128 exactly where `make_mask` says person.
    """
    height, width = probability.shape
    alpha = np.empty((height, width), dtype=np.uint8)
    widest = max(_WIDEST_EDGE, _WIDEST_EDGE_SHARE * min(height, width))
    # One pixel more is for the slope of the outermost.
    for tile in tiles((height, width), reach=math.ceil(widest) + 1):
        lowest, highest = bounds(probability, tile.inner)
        if lowest >= SURE_PERSON:
            alpha[tile.inner] = 255
        elif highest <= SURE_BACKGROUND:
            alpha[tile.inner] = 0
        else:
            alpha[tile.inner] = _steepened(probability[tile.outer], widest)[tile.core]
    return alpha


def _steepened(probability: Values, widest: float) -> Pixels:
    """Opacity, H W uint8, whose edges are at most about `widest` pixels wide."""
    across = cv2.Sobel(probability, cv2.CV_32F, 1, 0, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    down = cv2.Sobel(probability, cv2.CV_32F, 0, 1, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    # The steepest slope nearby: on the ridge of a single hair the probability itself is flat.
    side = 2 * math.ceil(widest) + 1
    slope = cv2.dilate(cv2.magnitude(across, down), np.ones((side, side), dtype=np.uint8))
    steepness = np.maximum(STEEPNESS, 1 / np.maximum(widest * slope, _FLAT))
    alpha = (255 * (0.5 + (probability - 0.5) * steepness)).clip(0, 255)
    return np.asarray(np.rint(alpha), dtype=np.uint8)

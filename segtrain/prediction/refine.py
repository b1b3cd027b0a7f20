"""Edges drawn by the photo itself, at its full size."""

import math

import cv2
import numpy as np

from segtrain.images import Pixels
from segtrain.prediction.alpha import STEEPNESS, SURE_BACKGROUND, SURE_PERSON
from segtrain.prediction.guided_filter import Plane, apply_coefficients, guided_coefficients
from segtrain.prediction.probability import Values
from segtrain.prediction.regions import tiles

# The coefficients vary slowly: they are found in a copy of at most so many pixels.
_COEFFICIENT_PIXELS = 2**20
# Radii of the windows, pass by pass, as shares of the root of the picture's pixels: five, three and
# two pixels of a network that sees a short side of 224. The first pass finds an edge that the
# network put some pixels off; the others clear the haze that it leaves between the two.
_RADIUS_SHARES, _SMALLEST_RADIUS = (0.02, 0.012, 0.008), 2
_SMOOTHNESS = 1e-4
# The fit seldom reaches 0 and 1: between passes a quarter and three quarters count for them, at the
# end, where hair shall stay soft, a sixth and five sixths.
_STRETCH, _LAST_STRETCH = 2.0, 1.5


def refine(image: Pixels, probability: Values) -> Values:
    """Move the edges of a probability to the edges of the photo, down to single pixels.

    Three passes of a colour guided filter (`segtrain.prediction.guided_filter`) over the opacity.
    The coefficients come from a reduced copy and are applied at full size: He & Sun, "Fast guided
    filter" (2015), arXiv 1505.00996. Memory beyond input and output does not grow with the picture.

    Args:
        image: H W 3 uint8 RGB.
        probability: H W float32 in 0..1, as enlarged from the network's.

    Returns:
        H W float32 in 0..1: a new array, away from the edges with the same values.
    """
    height, width = probability.shape
    scale = min(1.0, math.sqrt(_COEFFICIENT_PIXELS / (height * width)))
    small_size = max(1, round(width * scale)), max(1, round(height * scale))
    small_image = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    small_probability = cv2.resize(probability, small_size, interpolation=cv2.INTER_AREA)
    guide = _unit(np.asarray(small_image, dtype=np.uint8))
    opacity = _steepened(np.asarray(small_probability, dtype=np.float32), STEEPNESS)
    root = math.sqrt(small_size[0] * small_size[1])
    radii = [max(_SMALLEST_RADIUS, round(share * root)) for share in _RADIUS_SHARES]
    for radius in radii:
        coefficients = guided_coefficients(guide, opacity, radius, _SMOOTHNESS)
        opacity = _steepened(apply_coefficients(guide, coefficients), _STRETCH)
    refined = probability.copy()
    across, down = small_size[0] / width, small_size[1] / height
    # A pixel's coefficients are means of windows around windows.
    reach = math.ceil((2 * sum(radii) + 2) / min(across, down))
    for tile in tiles((height, width), reach):
        around = probability[tile.outer]
        if around.min() >= SURE_PERSON or around.max() <= SURE_BACKGROUND:
            continue
        top, left = tile.inner[0].start, tile.inner[1].start
        inner = probability[tile.inner]
        # Pixel centres to pixel centres.
        to_small = np.array(
            [
                [across, 0, (left + 0.5) * across - 0.5],
                [0, down, (top + 0.5) * down - 0.5],
            ]
        )
        enlarged = cv2.warpAffine(
            coefficients,
            to_small,
            inner.shape[::-1],
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        told = apply_coefficients(_unit(image[tile.inner]), np.asarray(enlarged, dtype=np.float32))
        refined[tile.inner] = _with_opacity(inner, _steepened(told, _LAST_STRETCH))
    return refined


def _unit(image: Pixels) -> Plane:
    """0..255 → 0..1."""
    return image.astype(np.float32) / np.float32(255)


def _steepened(values: Plane, steepness: float) -> Plane:
    """Steeper about one half, within 0..1."""
    return (0.5 + np.float32(steepness) * (values - np.float32(0.5))).clip(0, 1)


def _with_opacity(probability: Values, opacity: Plane) -> Values:
    """The probability that means this opacity; where that is 0 or 1, as sure as it was."""
    between = 0.5 + (opacity - 0.5) / STEEPNESS
    surely_person = np.maximum(probability, SURE_PERSON)
    surely_background = np.minimum(probability, SURE_BACKGROUND)
    return np.where(
        opacity >= 1, surely_person, np.where(opacity <= 0, surely_background, between)
    ).astype(np.float32)

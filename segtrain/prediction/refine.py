"""Edges drawn by the photo itself, at its full size."""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels
from segtrain.prediction.alpha import STEEPNESS, SURE_BACKGROUND, SURE_PERSON, Probability
from segtrain.prediction.guided_filter import apply_coefficients, guided_coefficients
from segtrain.prediction.tiles import tiles

# The coefficients vary slowly: they are found in a copy of at most so many pixels.
_COEFFICIENT_PIXELS = 2**20
# Radius of the windows as a share of the root of the picture's pixels: four pixels of a network
# that sees a short side of 224.
_RADIUS_SHARE, _SMALLEST_RADIUS = 0.016, 2
_SMOOTHNESS = 1e-4
# The fit never quite reaches 0 and 1; this far from them it counts as reaching.
_SLACK = 0.25


def refine(image: Pixels, probability: Probability) -> Probability:
    """Move the edges of a probability to the edges of the photo, down to single pixels.

    A colour guided filter (`segtrain.prediction.guided_filter`) of the opacity. Its coefficients
    come from a reduced copy and are applied at full size: He & Sun, "Fast guided filter" (2015),
    arXiv 1505.00996. Memory beyond input and output does not grow with the picture.

    Args:
        image: H W 3 uint8 RGB.
        probability: H W float32 in 0..1, as enlarged from the network's.

    Returns:
        H W float32 in 0..1: the same array of values away from the edges.
    """
    height, width = probability.shape
    scale = min(1.0, math.sqrt(_COEFFICIENT_PIXELS / (height * width)))
    small_size = max(1, round(width * scale)), max(1, round(height * scale))
    small_image = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    small_probability = cv2.resize(probability, small_size, interpolation=cv2.INTER_AREA)
    radius = max(_SMALLEST_RADIUS, round(_RADIUS_SHARE * math.sqrt(small_size[0] * small_size[1])))
    coefficients = guided_coefficients(
        _unit(np.asarray(small_image, dtype=np.uint8)),
        _opacity(np.asarray(small_probability, dtype=np.float32)),
        radius,
        _SMOOTHNESS,
    )
    refined = probability.copy()
    across, down = small_size[0] / width, small_size[1] / height
    # A pixel's coefficients are means of windows around windows.
    reach = math.ceil((2 * radius + 2) / min(across, down))
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
        opacity = apply_coefficients(
            _unit(image[tile.inner]), np.asarray(enlarged, dtype=np.float32)
        )
        refined[tile.inner] = _with_opacity(inner, opacity)
    return refined


def _unit(image: Pixels) -> npt.NDArray[np.float32]:
    """0..255 → 0..1."""
    return image.astype(np.float32) / np.float32(255)


def _opacity(probability: Probability) -> Probability:
    return (0.5 + STEEPNESS * (probability - 0.5)).clip(0, 1)


def _with_opacity(probability: Probability, opacity: Probability) -> Probability:
    """The probability that means this opacity; where that is 0 or 1, as sure as it was."""
    opacity = 0.5 + (opacity - 0.5) / (1 - 2 * _SLACK)
    between = 0.5 + (opacity - 0.5) / STEEPNESS
    surely_person = np.maximum(probability, SURE_PERSON)
    surely_background = np.minimum(probability, SURE_BACKGROUND)
    return np.where(
        opacity >= 1, surely_person, np.where(opacity <= 0, surely_background, between)
    ).astype(np.float32)

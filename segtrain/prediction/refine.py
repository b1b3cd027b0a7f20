"""Align person edges with the photo at full resolution, by a color guided filter."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from segtrain.imaging.blocks import blocks
from segtrain.prediction.matting import ALPHA_GAIN, OPAQUE_PROB, TRANSPARENT_PROB, FloatArray
from segtrain.types import Image, Probs

# Filter coefficients vary slowly: they are computed on a copy with at most this many pixels.
_MAX_COEFFICIENT_PIXELS = 2**20
# Window radius of each pass, as a fraction of the square root of the number of pixels: five, three
# and two pixels of a network whose short side is 224. The first pass moves edges that the network
# placed some pixels off; the others remove the haze between the old and the new edge.
_RADIUS_FRACTIONS, _MIN_RADIUS = (0.02, 0.012, 0.008), 2
_EPSILON = 1e-4
# The fit seldom reaches 0 and 1. Between passes the range 0.25..0.75 is stretched to 0..1; at the
# end, where hair must stay soft, the range 1/6..5/6.
_GAIN, _LAST_GAIN = 2.0, 1.5


def refine_probs(image: Image, probs: Probs) -> Probs:
    """Move the edges of the probabilities to the edges of the photo, down to single pixels.

    Three passes of a color guided filter over alpha. Coefficients come from a reduced copy and are
    applied at full size: He & Sun, "Fast guided filter" (2015), arXiv 1505.00996. Memory beyond
    input and output does not grow with the image.

    Args:
        image: H W 3 uint8 RGB.
        probs: H W float32 in 0..1, as upsampled from the network's output.

    Returns:
        H W float32 in 0..1: a new array, with unchanged values away from the edges.
    """
    height, width = probs.shape
    scale = min(1.0, math.sqrt(_MAX_COEFFICIENT_PIXELS / (height * width)))
    small_size = max(1, round(width * scale)), max(1, round(height * scale))
    small_image = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    small_probs = cv2.resize(probs, small_size, interpolation=cv2.INTER_AREA)
    guide = _to_unit_range(np.asarray(small_image, dtype=np.uint8))
    alpha = _stretch(np.asarray(small_probs, dtype=np.float32), ALPHA_GAIN)
    root = math.sqrt(small_size[0] * small_size[1])
    radii = [max(_MIN_RADIUS, round(fraction * root)) for fraction in _RADIUS_FRACTIONS]
    for radius in radii:
        coefficients = guided_coefficients(guide, alpha, radius, _EPSILON)
        alpha = _stretch(apply_coefficients(guide, coefficients), _GAIN)
    refined = probs.copy()
    scale_x, scale_y = small_size[0] / width, small_size[1] / height
    # The coefficients of a pixel are means of windows around windows.
    reach = math.ceil((2 * sum(radii) + 2) / min(scale_x, scale_y))
    for block in blocks((height, width), reach):
        nearby = probs[block.outer]
        if nearby.min() >= OPAQUE_PROB or nearby.max() <= TRANSPARENT_PROB:
            continue
        top, left = block.inner[0].start, block.inner[1].start
        inner = probs[block.inner]
        # Maps pixel centers to pixel centers.
        to_small = np.array(
            [
                [scale_x, 0, (left + 0.5) * scale_x - 0.5],
                [0, scale_y, (top + 0.5) * scale_y - 0.5],
            ]
        )
        upsampled = cv2.warpAffine(
            coefficients,
            to_small,
            inner.shape[::-1],
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        fitted = apply_coefficients(
            _to_unit_range(image[block.inner]), np.asarray(upsampled, dtype=np.float32)
        )
        refined[block.inner] = _alpha_to_probs(_stretch(fitted, _LAST_GAIN), inner)
    return refined


def guided_coefficients(
    guide: FloatArray, plane: FloatArray, radius: int, epsilon: float
) -> FloatArray:
    """Compute the local linear model that predicts the plane from the colors of the guide.

    He, Sun & Tang, "Guided image filtering" (TPAMI 35(6), 2013), section 3.5: in every window, the
    plane is fitted by a linear function of the colors, a · I + b, with the ridge penalty `epsilon`
    on a. Each pixel gets the mean of a and b over the windows that contain it. Windows are cropped
    at the image border.

    Args:
        guide: H W 3 float32 in 0..1.
        plane: H W float32.
        radius: windows have 2 radius + 1 pixels a side.
        epsilon: above 0; color differences below its square root have little effect.

    Returns:
        H W 4 float32: a for the three colors, then b.
    """
    # Center the colors: differences of large products lose digits.
    center = guide.mean(axis=(0, 1))
    centered = guide - center
    coverage = np.float32(1) / _zero_padded_mean(np.ones_like(plane), radius)

    def window_mean(values: FloatArray) -> FloatArray:
        return _zero_padded_mean(values, radius) * coverage

    red, green, blue = (np.ascontiguousarray(centered[..., channel]) for channel in range(3))
    plane_mean = window_mean(plane)
    means = [window_mean(channel) for channel in (red, green, blue)]

    def covariance(first: int, second: int) -> FloatArray:
        channels = (red, green, blue)
        product = window_mean(channels[first] * channels[second])
        return product - means[first] * means[second]

    rr, rg, rb = (covariance(0, channel) for channel in range(3))
    gg, gb, bb = covariance(1, 1), covariance(1, 2), covariance(2, 2)
    plane_covariances = [
        window_mean(channel * plane) - mean * plane_mean
        for channel, mean in zip((red, green, blue), means, strict=True)
    ]
    for variance in (rr, gg, bb):
        variance += np.float32(epsilon)

    slopes = _solve((rr, rg, rb, gg, gb, bb), plane_covariances)
    offset = plane_mean
    coefficients = np.empty((*plane.shape, 4), dtype=np.float32)
    for channel, (slope, mean) in enumerate(zip(slopes, means, strict=True)):
        offset = offset - slope * mean
        coefficients[..., channel] = window_mean(slope)
    coefficients[..., 3] = window_mean(offset) - coefficients[..., :3] @ center
    return coefficients


def apply_coefficients(guide: FloatArray, coefficients: FloatArray) -> FloatArray:
    """Return a · I + b at every pixel: H W float32 from H W 3 and H W 4."""
    plane = coefficients[..., 3].copy()
    for channel in range(3):
        plane += guide[..., channel] * coefficients[..., channel]
    return plane


def _solve(matrix: Sequence[FloatArray], right: Sequence[FloatArray]) -> list[FloatArray]:
    """Solve M x = r at every pixel by M = L D Lᵀ.

    Cramer's rule would be as short, but it fails in single precision for gray images: with equal
    channels, cofactors are differences of nearly equal products.

    Args:
        matrix: symmetric and positive definite: rr, rg, rb, gg, gb, bb.
        right: r, g, b.
    """
    rr, rg, rb, gg, gb, bb = matrix
    lower_g, lower_b = rg / rr, rb / rr
    second = gg - lower_g * rg
    gb = gb - lower_g * rb
    lower_gb = gb / second
    third = bb - lower_b * rb - lower_gb * gb
    g = right[1] - lower_g * right[0]
    blue = (right[2] - lower_b * right[0] - lower_gb * g) / third
    green = g / second - lower_gb * blue
    red = right[0] / rr - lower_g * green - lower_b * blue
    return [np.asarray(slope, dtype=np.float32) for slope in (red, green, blue)]


def _zero_padded_mean(values: FloatArray, radius: int) -> FloatArray:
    """Return the mean over each window, with zeros outside the image."""
    side = 2 * radius + 1
    mean = cv2.boxFilter(values, cv2.CV_32F, (side, side), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(mean, dtype=np.float32)


def _to_unit_range(image: Image) -> FloatArray:
    return image.astype(np.float32) / np.float32(255)


def _stretch(values: FloatArray, gain: float) -> FloatArray:
    """Increase the contrast about 0.5, within 0..1."""
    return (0.5 + np.float32(gain) * (values - np.float32(0.5))).clip(0, 1)


def _alpha_to_probs(alpha: FloatArray, probs: Probs) -> Probs:
    """Return the probabilities that yield `alpha`.

    Where alpha is 0 or 1, they keep the confidence of `probs`.
    """
    soft = 0.5 + (alpha - 0.5) / ALPHA_GAIN
    opaque = np.maximum(probs, OPAQUE_PROB)
    transparent = np.minimum(probs, TRANSPARENT_PROB)
    return np.where(alpha >= 1, opaque, np.where(alpha <= 0, transparent, soft)).astype(np.float32)

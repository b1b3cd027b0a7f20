"""The guided filter: a plane redrawn so that its edges are those of a colour picture.

OpenCV has one too, but only in its contrib wheel, which owns the same folder as the headless one.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]


def guided_coefficients(guide: Plane, plane: Plane, radius: int, smoothness: float) -> Plane:
    """How, around each pixel, the plane is best told from the picture's colours.

    He, Sun & Tang, "Guided image filtering" (TPAMI 35(6), 2013), section 3.5: in every window the
    plane is fitted by a linear function of the colours, a · I + b, with the ridge penalty
    `smoothness` on a; each pixel gets the mean of a and b over the windows that hold it. Windows
    end where the picture ends.

    Args:
        guide: H W 3 float32 in 0..1.
        plane: H W float32.
        radius: windows are 2 radius + 1 pixels a side.
        smoothness: epsilon of the paper, above 0: differences of colour below its root count for
            little.

    Returns:
        H W 4 float32: a for the three colours, then b.
    """
    # Colours about their mean: differences of large products lose digits.
    centre = guide.mean(axis=(0, 1))
    centred = guide - centre
    share = np.float32(1) / _mean(np.ones_like(plane), radius)

    def window_mean(values: Plane) -> Plane:
        return _mean(values, radius) * share

    red, green, blue = (np.ascontiguousarray(centred[..., channel]) for channel in range(3))
    mean_plane = window_mean(plane)
    means = [window_mean(channel) for channel in (red, green, blue)]

    def covariance(first: int, second: int) -> Plane:
        channels = (red, green, blue)
        product = window_mean(channels[first] * channels[second])
        return product - means[first] * means[second]

    rr, rg, rb = (covariance(0, channel) for channel in range(3))
    gg, gb, bb = covariance(1, 1), covariance(1, 2), covariance(2, 2)
    with_plane = [
        window_mean(channel * plane) - mean * mean_plane
        for channel, mean in zip((red, green, blue), means, strict=True)
    ]
    for variance in (rr, gg, bb):
        variance += np.float32(smoothness)

    slopes = _solved((rr, rg, rb, gg, gb, bb), with_plane)
    offset = mean_plane
    coefficients = np.empty((*plane.shape, 4), dtype=np.float32)
    for channel, (slope, mean) in enumerate(zip(slopes, means, strict=True)):
        offset = offset - slope * mean
        coefficients[..., channel] = window_mean(slope)
    coefficients[..., 3] = window_mean(offset) - coefficients[..., :3] @ centre
    return coefficients


def _solved(matrix: Sequence[Plane], right: Sequence[Plane]) -> list[Plane]:
    """x of M x = r at every pixel, by M = L D Lᵀ.

    Cofactors would be as short, but of a gray picture, all of whose channels are alike, they are
    differences of nearly equal products, and single precision has nothing left of them.

    Args:
        matrix: symmetric and positive definite: rr, rg, rb, gg, gb, bb. right: r, g, b.
    """
    rr, rg, rb, gg, gb, bb = matrix
    below_g, below_b = rg / rr, rb / rr
    second = gg - below_g * rg
    gb = gb - below_g * rb
    below_gb = gb / second
    third = bb - below_b * rb - below_gb * gb
    g = right[1] - below_g * right[0]
    blue = (right[2] - below_b * right[0] - below_gb * g) / third
    green = g / second - below_gb * blue
    red = right[0] / rr - below_g * green - below_b * blue
    return [np.asarray(slope, dtype=np.float32) for slope in (red, green, blue)]


def apply_coefficients(guide: Plane, coefficients: Plane) -> Plane:
    """a · I + b at every pixel: H W float32 from H W 3 and H W 4."""
    told = coefficients[..., 3].copy()
    for channel in range(3):
        told += guide[..., channel] * coefficients[..., channel]
    return told


def _mean(values: Plane, radius: int) -> Plane:
    """Over the window, what lies outside the picture counted as zeros."""
    side = 2 * radius + 1
    mean = cv2.boxFilter(values, cv2.CV_32F, (side, side), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(mean, dtype=np.float32)

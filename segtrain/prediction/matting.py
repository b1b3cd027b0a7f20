"""From person probability to mask, alpha matte and cutout with clean foreground colors."""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.imaging.blocks import Region, block_at, blocks
from segtrain.inference.probability import ProbsLike, bounds
from segtrain.types import BoolMask, Image, Mask, Probs

FloatArray = npt.NDArray[np.float32]
"""float32 of any shape: float images H W 3, filter coefficients, single planes H W."""

TRANSPARENT_PROB, OPAQUE_PROB = 0.3, 0.7
"""Probabilities up to and from which alpha is 0 and 1."""
ALPHA_GAIN = 1 / (OPAQUE_PROB - TRANSPARENT_PROB)
"""Slope of alpha over probability in between."""

# The network sees a small copy of the photo, so an upsampled edge is many pixels wide. Alpha limits
# the width to this many pixels, or to this fraction of the short side if that is more.
_MAX_EDGE_WIDTH, _MAX_EDGE_FRACTION = 3.0, 0.005
# Lower bound of width times gradient, against division by zero where the probability is flat.
_MIN_GRADIENT = 1e-5

# Box sides of the two passes of blurred fusion, in pixels, from the paper.
_WIDE_BOX, _NARROW_BOX = 90, 6
_FUSION_REACH = _WIDE_BOX // 2 + _NARROW_BOX // 2
# Against division by zero; smaller than the smallest nonzero 8-bit alpha averaged over a box.
_EPSILON = np.float32(1e-8)


def make_mask(probs: ProbsLike) -> Mask:
    """Threshold H W float32 in 0..1 at 0.5: H W uint8, 255 person and 0 background."""
    height, width = probs.shape
    mask = np.empty((height, width), dtype=np.uint8)
    for block in blocks((height, width), reach=0):
        lowest, highest = bounds(probs, block.inner)
        if lowest >= 0.5 or highest < 0.5:
            mask[block.inner] = 255 if lowest >= 0.5 else 0
        else:
            mask[block.inner] = np.where(probs[block.inner] >= 0.5, np.uint8(255), np.uint8(0))
    return mask


def make_alpha(probs: ProbsLike) -> Mask:
    """Compute the opacity of the person, 0..255: solid inside, soft for a few pixels at the edge.

    Alpha is 0.5 where the probability is 0.5 and rises with it. The slope maps 0.3 to 0 and 0.7 to
    1; it is steeper where such an edge would be wider than 3 pixels or 0.5 % of the short side. So
    a region with uncertain probabilities does not become half transparent, and a fine edge, found
    by the network or by `segtrain.prediction.refine`, is preserved.

    Args:
        probs: H W float32 in 0..1.

    Returns:
        H W uint8; at least 128 exactly where `make_mask` returns 255.
    """
    height, width = probs.shape
    alpha = np.empty((height, width), dtype=np.uint8)
    max_width = max(_MAX_EDGE_WIDTH, _MAX_EDGE_FRACTION * min(height, width))
    # One more pixel for the gradient at the border of the dilation window.
    for block in blocks((height, width), reach=math.ceil(max_width) + 1):
        lowest, highest = bounds(probs, block.inner)
        if lowest >= OPAQUE_PROB:
            alpha[block.inner] = 255
        elif highest <= TRANSPARENT_PROB:
            alpha[block.inner] = 0
        else:
            alpha[block.inner] = _sharpen(probs[block.outer], max_width)[block.core]
    return alpha


def make_cutout(image: Image, alpha: Mask) -> Image:
    """Cut out the person, with the foreground colors estimated at the edge.

    An edge pixel of a photo is a mixture, I = alpha F + (1 - alpha) B. On a new background, B would
    show as a halo, so the cutout contains F instead of I.

    Args:
        image: H W 3 uint8 RGB.
        alpha: H W uint8, opacity of the person.

    Returns:
        H W 4 uint8 RGBA, colors and `alpha`. Colors are those of the photo where alpha is 255, F at
        the edge, and zero where alpha is zero, so that the file does not contain the old
        background.
    """
    size = image.shape[0], image.shape[1]
    cutout = np.empty((*size, 4), dtype=np.uint8)
    foreground = cutout[..., :3]
    for block in blocks(size, reach=0):
        cutout[(*block.inner, 3)] = alpha[block.inner]
        np.multiply(
            image[block.inner], (alpha[block.inner] > 0)[..., None], out=foreground[block.inner]
        )
        edge = _edge_region(alpha, block.inner)
        if edge is not None:
            window = block_at(edge, size, _FUSION_REACH)
            estimate = blurred_fusion(image[window.outer], alpha[window.outer])[window.core]
            np.copyto(foreground[edge], estimate, where=_is_soft(alpha[edge])[..., None])
    return cutout


def blurred_fusion(image: Image, alpha: Mask) -> Image:
    """Estimate F at every pixel, H W 3 uint8, by two passes of blurred fusion.

    Forte & Pitié, "Approximate Fast Foreground Colour Estimation" (ICIP 2021): F and B start as the
    means of their neighborhoods, weighted by alpha and 1 - alpha (a wide box, then a narrow one).
    The part of the image that their mixture does not explain is added to F.

    Args:
        image: H W 3 uint8.
        alpha: H W uint8.
    """
    colors = image.astype(np.float32)
    opacity = (alpha.astype(np.float32) / np.float32(255))[..., None]
    foreground, background = _fusion_pass(colors, colors, colors, opacity, _WIDE_BOX)
    foreground, _ = _fusion_pass(colors, foreground, background, opacity, _NARROW_BOX)
    return np.asarray(np.rint(foreground), dtype=np.uint8)


def _sharpen(probs: Probs, max_width: float) -> Mask:
    """Return alpha, H W uint8, with edges at most about `max_width` pixels wide."""
    dx = cv2.Sobel(probs, cv2.CV_32F, 1, 0, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    dy = cv2.Sobel(probs, cv2.CV_32F, 0, 1, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    # Take the largest gradient nearby: along the ridge of a single hair the probability is flat.
    side = 2 * math.ceil(max_width) + 1
    gradient = cv2.dilate(cv2.magnitude(dx, dy), np.ones((side, side), dtype=np.uint8))
    gain = np.maximum(ALPHA_GAIN, 1 / np.maximum(max_width * gradient, _MIN_GRADIENT))
    alpha = (255 * (0.5 + (probs - 0.5) * gain)).clip(0, 255)
    return np.asarray(np.rint(alpha), dtype=np.uint8)


def _edge_region(alpha: Mask, region: Region) -> Region | None:
    """Return the bounding box of the soft pixels of a region; None without any."""
    left, top, width, height = cv2.boundingRect(_is_soft(alpha[region]).view(np.uint8))
    if width == 0:
        return None
    top, left = top + region[0].start, left + region[1].start
    return slice(top, top + height), slice(left, left + width)


def _is_soft(alpha: Mask) -> BoolMask:
    return (alpha > 0) & (alpha < 255)


def _fusion_pass(
    image: FloatArray, foreground: FloatArray, background: FloatArray, opacity: FloatArray, box: int
) -> tuple[FloatArray, FloatArray]:
    """Update the estimates of foreground and background, each H W 3 in 0..255."""
    transparency = 1 - opacity
    foreground = _box_mean(foreground * opacity, box) / (_box_mean(opacity, box) + _EPSILON)
    background = _box_mean(background * transparency, box) / (
        _box_mean(transparency, box) + _EPSILON
    )
    residual = image - opacity * foreground - transparency * background
    return (foreground + opacity * residual).clip(0, 255), background


def _box_mean(plane: FloatArray, side: int) -> FloatArray:
    mean = cv2.blur(plane, (side, side), borderType=cv2.BORDER_REFLECT)
    return np.asarray(mean, dtype=np.float32).reshape(plane.shape)

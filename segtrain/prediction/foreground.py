"""The person's own colours, without the old background that shines through at the edge."""

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels
from segtrain.prediction.tiles import tiles

Colours = npt.NDArray[np.float32]

# Sides of the boxes of the two passes: section 3 of the paper below.
_WIDE, _NARROW = 90, 6
_REACH = _WIDE // 2 + _NARROW // 2
# Smaller than the opacity of any one byte, spread over a box.
_NOTHING = np.float32(1e-8)


def clean_foreground(image: Pixels, alpha: Pixels) -> Pixels:
    """The colours that the person has without the background: what a new one must be mixed with.

    An edge pixel of a photo is a mixture, I = alpha F + (1 - alpha) B. Laid over another background
    it would bring B along as a halo; F does not.

    Args:
        image: H W 3 uint8 RGB.
        alpha: H W uint8, opacity of the person.

    Returns:
        H W 3 uint8: the photo's own pixels where alpha is 255, zero where it is 0, F between.
    """
    foreground = image.copy()
    for tile in tiles((image.shape[0], image.shape[1]), _REACH):
        opacity = alpha[tile.inner]
        if opacity.min() == 255:
            continue
        foreground[tile.inner][opacity == 0] = 0
        soft = (opacity > 0) & (opacity < 255)
        if soft.any():
            estimated = blurred_fusion(image[tile.outer], alpha[tile.outer])[tile.core]
            np.copyto(foreground[tile.inner], estimated, where=soft[..., None])
    return foreground


def blurred_fusion(image: Pixels, alpha: Pixels) -> Pixels:
    """F of every pixel, H W 3 uint8, by two passes of blurred fusion.

    Forte & Pitié, "Approximate fast foreground colour estimation" (2021), arXiv 2006.14970: F and B
    are first taken for the means of their surroundings, weighted by alpha and 1 - alpha (a wide
    box, then a narrow one); what the mixture of these leaves unexplained is given to F.

    Args:
        image: H W 3 uint8. alpha: H W uint8.
    """
    colours = image.astype(np.float32)
    opacity = (alpha.astype(np.float32) / np.float32(255))[..., None]
    foreground, background = _fused(colours, colours, colours, opacity, _WIDE)
    foreground, _ = _fused(colours, foreground, background, opacity, _NARROW)
    return np.asarray(np.rint(foreground), dtype=np.uint8)


def _fused(
    image: Colours, foreground: Colours, background: Colours, opacity: Colours, side: int
) -> tuple[Colours, Colours]:
    """One pass: better foreground and background colours, H W 3 in 0..255, from former ones."""
    rest = 1 - opacity
    foreground = _mean(foreground * opacity, side) / (_mean(opacity, side) + _NOTHING)
    background = _mean(background * rest, side) / (_mean(rest, side) + _NOTHING)
    unexplained = image - opacity * foreground - rest * background
    return (foreground + opacity * unexplained).clip(0, 255), background


def _mean(plane: Colours, side: int) -> Colours:
    mean = cv2.blur(plane, (side, side), borderType=cv2.BORDER_REFLECT)
    return np.asarray(mean, dtype=np.float32).reshape(plane.shape)

"""The person's own colours, without the old background that shines through at the edge."""

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels
from segtrain.prediction.regions import Region, tile_at, tiles

Colours = npt.NDArray[np.float32]

# Sides of the boxes of the two passes, pixels: those of the paper below.
_WIDE, _NARROW = 90, 6
_REACH = _WIDE // 2 + _NARROW // 2
# Smaller than the opacity of any one byte, spread over a box.
_NOTHING = np.float32(1e-8)


def make_cutout(image: Pixels, alpha: Pixels) -> Pixels:
    """The person alone, in the colours that the person has without the background.

    An edge pixel of a photo is a mixture, I = alpha F + (1 - alpha) B. Laid over another background
    it would bring B along as a halo; F does not.

    Args:
        image: H W 3 uint8 RGB.
        alpha: H W uint8, opacity of the person.

    Returns:
        H W 4 uint8 RGBA, colours and `alpha`: the photo's own pixels where alpha is 255, F at the
        edge, and zero where alpha is, so that nothing of the old background hides in the file.
    """
    size = image.shape[0], image.shape[1]
    cutout = np.empty((*size, 4), dtype=np.uint8)
    foreground = cutout[..., :3]
    for tile in tiles(size, reach=0):
        cutout[(*tile.inner, 3)] = alpha[tile.inner]
        np.multiply(
            image[tile.inner], (alpha[tile.inner] > 0)[..., None], out=foreground[tile.inner]
        )
        edge = _soft_region(alpha, tile.inner)
        if edge is not None:
            seen = tile_at(edge, size, _REACH)
            estimated = blurred_fusion(image[seen.outer], alpha[seen.outer])[seen.core]
            np.copyto(foreground[edge], estimated, where=_is_soft(alpha[edge])[..., None])
    return cutout


def _soft_region(alpha: Pixels, within: Region) -> Region | None:
    """The smallest rows and columns that hold every soft pixel of a tile; None if it has none."""
    left, top, width, height = cv2.boundingRect(_is_soft(alpha[within]).view(np.uint8))
    if width == 0:
        return None
    top, left = top + within[0].start, left + within[1].start
    return slice(top, top + height), slice(left, left + width)


def _is_soft(alpha: Pixels) -> npt.NDArray[np.bool_]:
    return (alpha > 0) & (alpha < 255)


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

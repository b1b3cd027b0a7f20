"""Pictures made of a photo, the person's opacity and the person's colours."""

import cv2
import numpy as np

from segtrain.images import Pixels
from segtrain.prediction.regions import tiles
from segtrain.sheets import OUTLINE_COLOUR, draw_outline, tint

# The outline's width as a share of the short side: seen when the whole picture fills a screen.
_OUTLINE_SHARE = 1 / 400
_CHECKS_SHARE = 1 / 40
_CHECK_COLOURS = (255, 204)


def put_on_background(cutout: Pixels, background: Pixels) -> None:
    """Lay the person over another picture, in that picture itself.

    Args:
        cutout: H W 4 uint8 RGBA, as of `segtrain.prediction.foreground.make_cutout`.
        background: H W 3 uint8 RGB; on return with the person upon it.
    """
    for tile in tiles((background.shape[0], background.shape[1]), reach=0):
        alpha = cutout[(*tile.inner, 3)]
        if not alpha.any():
            continue
        opacity = alpha.astype(np.float32) / 255
        foreground = np.ascontiguousarray(cutout[tile.inner][..., :3])
        behind = background[tile.inner]
        background[tile.inner] = cv2.blendLinear(foreground, behind, opacity, 1 - opacity)


def make_overlay(image: Pixels, mask: Pixels) -> Pixels:
    """The photo with the person tinted and outlined, H W 3 uint8.

    Args:
        image: H W 3 uint8. mask: H W uint8, 255 person, 0 background.
    """
    overlay = image.copy()
    tint(overlay, mask > 0)
    thickness = max(1, round(_OUTLINE_SHARE * min(mask.shape)))
    draw_outline(overlay, mask > 0, OUTLINE_COLOUR, thickness)
    return overlay


def make_panel(image: Pixels, new_background: Pixels, mask: Pixels) -> Pixels:
    """original | new background | mask, side by side with a narrow gap: H 3W+2g 3 uint8."""
    gap = np.full((image.shape[0], max(4, image.shape[1] // 100), 3), 255, dtype=np.uint8)
    mask_rgb = np.repeat(mask[..., None], 3, axis=2)
    return np.concatenate([image, gap, new_background, gap, mask_rgb], axis=1)


def checkerboard(height: int, width: int) -> Pixels:
    """What stands for transparency where there is none, H W 3 uint8."""
    side = max(4, round(_CHECKS_SHARE * min(height, width)))
    rows, columns = np.arange(height) // side, np.arange(width) // side
    odd = (rows[:, None] + columns) % 2
    checks = np.array(_CHECK_COLOURS, dtype=np.uint8)[odd]
    return np.repeat(checks[..., None], 3, axis=2)

"""The output kinds of predict, and how a result becomes each of them.

A new kind is one method of `Composite` and one row of `OUTPUTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from segtrain.imaging.blocks import blocks
from segtrain.imaging.contact_sheet import OUTLINE_COLOR, draw_outline, tint
from segtrain.imaging.images import Uint16Image
from segtrain.inference.probability import ProbsLike
from segtrain.prediction.backgrounds import TRANSPARENT, BackgroundFn
from segtrain.prediction.matting import make_alpha, make_cutout, make_mask
from segtrain.types import Image, Mask, Probs

# Outline width as a fraction of the short side: visible when the whole image fills a screen.
_OUTLINE_FRACTION = 1 / 400
# Side of a checkerboard square as a fraction of the short side.
_CHECK_FRACTION = 1 / 40
_CHECK_COLORS = (255, 204)


@dataclass(frozen=True)
class Result:
    """The prediction for one image, and what all outputs derive from it.

    Attributes:
        image: H W 3 uint8 RGB, upright.
        probs: person probability at each pixel, after refining and cleaning.
    """

    image: Image
    probs: ProbsLike

    @cached_property
    def probability(self) -> Probs:
        """`probs` as an array, H W float32 in 0..1."""
        return np.asarray(self.probs, dtype=np.float32)

    @cached_property
    def mask(self) -> Mask:
        """H W uint8: 255 person, 0 background."""
        return make_mask(self.probs)

    @cached_property
    def alpha(self) -> Mask:
        """Opacity of the person, H W uint8: soft at the edge, solid inside."""
        return make_alpha(self.probs)

    @cached_property
    def _cutout(self) -> Image:
        return make_cutout(self.image, self.alpha)

    def cutout(self) -> Image:
        """Return the person alone, H W 4 uint8 RGBA; transparent pixels are zero."""
        return self._cutout


class Composite:
    """A result on its new background, which several outputs share."""

    def __init__(self, result: Result, make_background: BackgroundFn) -> None:
        self.result, self._make_background = result, make_background

    @cached_property
    def pixels(self) -> Image:
        """The person on the new background, H W 3 uint8 RGB; on none, the cutout, H W 4 RGBA."""
        background = self._make_background(self.result.image, self.result.alpha)
        if background is None:
            return self.result.cutout()
        paste_cutout(self.result.cutout(), background)
        return background

    def panel(self) -> Image:
        """Original | new background | mask. A checkerboard stands for a transparent background."""
        pixels, result = self.pixels, self.result
        if pixels.shape[2] == 4:
            pixels = checkerboard(*result.mask.shape)
            paste_cutout(result.cutout(), pixels)
        return make_panel(result.image, pixels, result.mask)

    def overlay(self) -> Image:
        """The photo with the person tinted and outlined, H W 3 uint8."""
        return make_overlay(self.result.image, self.result.mask)

    def probability(self) -> Uint16Image:
        """H W uint16: 0 is probability 0, 65535 is probability 1."""
        height, width = self.result.probs.shape
        levels = np.empty((height, width), dtype=np.uint16)
        for block in blocks((height, width), reach=0):
            levels[block.inner] = np.rint(self.result.probs[block.inner] * np.float32(65535))
        return levels


@dataclass(frozen=True)
class Output:
    """An output kind.

    Attributes:
        suffix: appended to the name of the image.
        make: returns the pixels.
    """

    suffix: str
    make: Callable[[Composite], Image | Uint16Image]


OUTPUTS: dict[str, Output] = {
    "mask": Output("_mask.png", lambda composite: composite.result.mask),
    "cutout": Output("_cutout.png", lambda composite: composite.result.cutout()),
    "background": Output("_background.jpg", lambda composite: composite.pixels),
    "overlay": Output("_overlay.jpg", Composite.overlay),
    "panel": Output("_panel.jpg", Composite.panel),
    "probability": Output("_probability.png", Composite.probability),
}


def output_suffix(kind: str, background: str) -> str:
    """Return the suffix that is appended to the name of the image.

    Args:
        kind: a key of `OUTPUTS`.
        background: value of `--background`. JPEG has no transparency, so with a transparent
            background the kind "background" is a PNG.
    """
    if kind == "background" and background == TRANSPARENT:
        return "_background.png"
    return OUTPUTS[kind].suffix


def paste_cutout(cutout: Image, background: Image) -> None:
    """Blend a cutout over a background, in place.

    Args:
        cutout: H W 4 uint8 RGBA, as from `segtrain.prediction.matting.make_cutout`.
        background: H W 3 uint8 RGB, modified.
    """
    for block in blocks((background.shape[0], background.shape[1]), reach=0):
        alpha = cutout[(*block.inner, 3)]
        if not alpha.any():
            continue
        opacity = alpha.astype(np.float32) / 255
        foreground = np.ascontiguousarray(cutout[block.inner][..., :3])
        behind = background[block.inner]
        background[block.inner] = cv2.blendLinear(foreground, behind, opacity, 1 - opacity)


def make_overlay(image: Image, mask: Mask) -> Image:
    """Tint and outline the person, H W 3 uint8.

    Args:
        image: H W 3 uint8.
        mask: H W uint8, 255 person, 0 background.
    """
    overlay = image.copy()
    tint(overlay, mask > 0)
    thickness = max(1, round(_OUTLINE_FRACTION * min(mask.shape)))
    draw_outline(overlay, mask > 0, OUTLINE_COLOR, thickness)
    return overlay


def make_panel(image: Image, new_background: Image, mask: Mask) -> Image:
    """Place original, new background and mask side by side with a gap g: H 3W+2g 3 uint8."""
    gap = np.full((image.shape[0], max(4, image.shape[1] // 100), 3), 255, dtype=np.uint8)
    mask_rgb = np.repeat(mask[..., None], 3, axis=2)
    return np.concatenate([image, gap, new_background, gap, mask_rgb], axis=1)


def checkerboard(height: int, width: int) -> Image:
    """Draw the pattern that stands for transparency, H W 3 uint8."""
    side = max(4, round(_CHECK_FRACTION * min(height, width)))
    rows, columns = np.arange(height) // side, np.arange(width) // side
    odd = (rows[:, None] + columns) % 2
    checks = np.array(_CHECK_COLORS, dtype=np.uint8)[odd]
    return np.repeat(checks[..., None], 3, axis=2)

"""The kinds of output of predict. A new one is one function in `compose.py` and one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from segtrain.images import DeepPixels, Pixels
from segtrain.prediction.alpha import make_alpha, make_mask
from segtrain.prediction.backgrounds import TRANSPARENT, MakeBackground
from segtrain.prediction.compose import (
    checkerboard,
    make_overlay,
    make_panel,
    put_on_background,
)
from segtrain.prediction.foreground import make_cutout
from segtrain.prediction.probability import Probability, Values
from segtrain.prediction.regions import tiles


@dataclass(frozen=True)
class Result:
    """What the network says about one picture, and what is the same for all outputs.

    image: H W 3 uint8 RGB, upright. answer: the probability of person at each of its pixels;
    refined and cleaned before, if it shall be.
    """

    image: Pixels
    answer: Probability

    @cached_property
    def probability(self) -> Values:
        """Of person, H W float32 in 0..1."""
        return np.asarray(self.answer, dtype=np.float32)

    @cached_property
    def mask(self) -> Pixels:
        """H W uint8: 255 person, 0 background."""
        return make_mask(self.answer)

    @cached_property
    def alpha(self) -> Pixels:
        """Opacity of the person, H W uint8: soft at the edge, solid inside."""
        return make_alpha(self.answer)

    @cached_property
    def _cutout(self) -> Pixels:
        return make_cutout(self.image, self.alpha)

    def cutout(self) -> Pixels:
        """The person alone, H W 4 uint8 RGBA with soft edges; transparent pixels are all zero."""
        return self._cutout


class Composition:
    """A result and the background it is put on, which several outputs share."""

    def __init__(self, result: Result, make_background: MakeBackground) -> None:
        self.result, self._make_background = result, make_background

    @cached_property
    def composed(self) -> Pixels:
        """The person on the new background, H W 3 uint8 RGB; on none, H W 4 RGBA, the cut-out."""
        background = self._make_background(self.result.image, self.result.alpha)
        if background is None:
            return self.result.cutout()
        put_on_background(self.result.cutout(), background)
        return background

    def panel(self) -> Pixels:
        """original | new background | mask; no background is shown as a checkerboard."""
        shown, result = self.composed, self.result
        if shown.shape[2] == 4:
            shown = checkerboard(*result.mask.shape)
            put_on_background(result.cutout(), shown)
        return make_panel(result.image, shown, result.mask)

    def overlay(self) -> Pixels:
        """The photo with the person tinted and outlined, H W 3 uint8."""
        return make_overlay(self.result.image, self.result.mask)

    def probability(self) -> DeepPixels:
        """H W uint16: 0 surely background, 65535 surely person."""
        height, width = self.result.answer.shape
        levels = np.empty((height, width), dtype=np.uint16)
        for tile in tiles((height, width), reach=0):
            levels[tile.inner] = np.rint(self.result.answer[tile.inner] * np.float32(65535))
        return levels


@dataclass(frozen=True)
class Output:
    """What is added to the picture's name, and how the pixels are made."""

    suffix: str
    make: Callable[[Composition], Pixels | DeepPixels]


OUTPUTS: dict[str, Output] = {
    "mask": Output("_mask.png", lambda composition: composition.result.mask),
    "cutout": Output("_cutout.png", lambda composition: composition.result.cutout()),
    "background": Output("_background.jpg", lambda composition: composition.composed),
    "overlay": Output("_overlay.jpg", Composition.overlay),
    "panel": Output("_panel.jpg", Composition.panel),
    "probability": Output("_probability.png", Composition.probability),
}


def suffix_of(kind: str, background: str) -> str:
    """What is added to the picture's name for a row of `OUTPUTS`.

    Args:
        background: as in `segtrain.prediction.backgrounds.background_maker`. JPEG knows no
            transparency: without a background, the picture upon it is a PNG.
    """
    if kind == "background" and background == TRANSPARENT:
        return "_background.png"
    return OUTPUTS[kind].suffix

"""The kinds of output of predict. A new one is one function in `compose.py` and one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from segtrain.images import DeepPixels, Pixels
from segtrain.prediction.alpha import Probability, make_alpha, make_mask
from segtrain.prediction.backgrounds import TRANSPARENT, MakeBackground
from segtrain.prediction.compose import (
    checkerboard,
    make_cutout,
    make_overlay,
    make_panel,
    put_on_background,
)
from segtrain.prediction.foreground import clean_foreground


@dataclass(frozen=True)
class Result:
    """What the network says about one picture, and what is the same for all outputs.

    image: H W 3 uint8 RGB, upright. probability: H W float32 in 0..1, of person; refined and
    cleaned before, if it shall be.
    """

    image: Pixels
    probability: Probability

    @cached_property
    def mask(self) -> Pixels:
        """H W uint8: 255 person, 0 background."""
        return make_mask(self.probability)

    @cached_property
    def alpha(self) -> Pixels:
        """Opacity of the person, H W uint8: soft at the edge, solid inside."""
        return make_alpha(self.probability)

    @cached_property
    def foreground(self) -> Pixels:
        """The person's own colours, H W 3 uint8; zero where nothing of the person is."""
        return clean_foreground(self.image, self.alpha)

    def cutout(self) -> Pixels:
        """H W 4 uint8 RGBA with soft edges."""
        return make_cutout(self.foreground, self.alpha)


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
        return put_on_background(self.result.foreground, self.result.alpha, background)

    def panel(self) -> Pixels:
        """original | new background | mask; no background is shown as a checkerboard."""
        shown, result = self.composed, self.result
        if shown.shape[2] == 4:
            checks = checkerboard(*result.mask.shape)
            shown = put_on_background(result.foreground, result.alpha, checks)
        return make_panel(result.image, shown, result.mask)

    def overlay(self) -> Pixels:
        """The photo with the person tinted and outlined, H W 3 uint8."""
        return make_overlay(self.result.image, self.result.mask)

    def probability(self) -> DeepPixels:
        """H W uint16: 0 surely background, 65535 surely person."""
        levels = np.rint(self.result.probability * np.float32(65535))
        return np.asarray(levels, dtype=np.uint16)


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

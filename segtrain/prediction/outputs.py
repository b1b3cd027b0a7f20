"""The kinds of output of predict. A new one is one function in `compose.py` and one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from segtrain.images import Pixels
from segtrain.prediction.compose import (
    MakeBackground,
    make_cutout,
    make_mask,
    make_panel,
    put_on_background,
)


@dataclass(frozen=True)
class Result:
    """What the network says about one picture.

    image: H W 3 uint8 RGB, upright. probability: H W float32 in 0..1, of person.
    """

    image: Pixels
    probability: npt.NDArray[np.float32]

    @property
    def mask(self) -> Pixels:
        """H W uint8: 255 person, 0 background."""
        return make_mask(self.probability)

    def cutout(self) -> Pixels:
        """H W 4 uint8 RGBA with soft edges."""
        return make_cutout(self.image, self.probability)


class Composition:
    """A result and the background it is put on, which several outputs share."""

    def __init__(self, result: Result, make_background: MakeBackground) -> None:
        self.result, self._make_background = result, make_background

    @cached_property
    def composed(self) -> Pixels:
        """The person on the new background, H W 3 uint8 RGB."""
        background = self._make_background(self.result.image)
        return put_on_background(self.result.image, self.result.probability, background)

    def panel(self) -> Pixels:
        """original | new background | mask."""
        return make_panel(self.result.image, self.composed, self.result.mask)


@dataclass(frozen=True)
class Output:
    """What is added to the picture's name, and how the pixels are made."""

    suffix: str
    make: Callable[[Composition], Pixels]


OUTPUTS: dict[str, Output] = {
    "mask": Output("_mask.png", lambda composition: composition.result.mask),
    "cutout": Output("_cutout.png", lambda composition: composition.result.cutout()),
    "background": Output("_background.jpg", lambda composition: composition.composed),
    "panel": Output("_panel.jpg", Composition.panel),
}

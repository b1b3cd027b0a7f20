"""Random crops and flips on bytes. The only place that imports albumentations."""

import os

# albumentations asks the network for its newest version when it is imported; nothing here does.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from collections.abc import Callable

import albumentations as A
import cv2
import numpy as np

from segtrain.classes import IGNORE
from segtrain.data.sample import Sample
from segtrain.images import Pixels

Backdrop = Callable[[int], Pixels | None]


class TrainTransform:
    """Square crop and horizontal flip, as the Tiramisu paper trains (section 4.1)."""

    def __init__(
        self, image_size: int, augment: str = "paper", scale: tuple[float, float] | None = None
    ) -> None:
        self.image_size = image_size
        self.scale = scale or (1.0, 1.5)
        self._compose = A.Compose(
            [
                A.PadIfNeeded(
                    image_size,
                    image_size,
                    border_mode=cv2.BORDER_CONSTANT,
                    fill=(124, 116, 104),
                    fill_mask=IGNORE,
                ),
                A.RandomCrop(image_size, image_size),
                A.HorizontalFlip(p=0.5),
            ]
        )

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        draw = np.random.default_rng([seed, epoch, index]).uniform(*self.scale)
        return round(draw * self.image_size)

    def __call__(
        self,
        sample: Sample,
        *,
        seed: int,
        epoch: int,
        index: int,
        backdrop: Backdrop | None = None,
    ) -> Sample:
        draw = np.random.SeedSequence([seed, epoch, index]).generate_state(1)
        self._compose.set_random_seed(int(draw[0]))
        moved = self._compose(image=sample.image, mask=sample.mask)
        return Sample(image=moved["image"], mask=moved["mask"], image_id=sample.image_id)

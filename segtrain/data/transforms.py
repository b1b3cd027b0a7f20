"""Random crops and flips on bytes. The only place that imports albumentations."""

import os

# albumentations asks the network for its newest version when it is imported; nothing here does.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import cv2
import numpy as np

from segtrain.data.sample import Sample


class TrainTransform:
    """Scale, square crop and horizontal flip, as the Tiramisu paper trains (section 4.1).

    Image and mask stay uint8; each draw depends on (seed, epoch, index) alone, so that worker
    processes and resumed runs see the same pictures.

    Args:
        image_size: side of the crop, pixels.
        scale: the short side becomes `image_size` times a factor from this range before the crop.
    """

    def __init__(self, image_size: int, scale: tuple[float, float]) -> None:
        smallest, largest = (round(image_size * factor) for factor in scale)
        self._compose = A.Compose(
            [
                A.SmallestMaxSize(
                    max_size=list(range(smallest, largest + 1)),
                    interpolation=cv2.INTER_LINEAR,
                    area_for_downscale="image",
                ),
                A.RandomCrop(image_size, image_size),
                A.HorizontalFlip(p=0.5),
            ]
        )

    def __call__(self, sample: Sample, *, seed: int, epoch: int, index: int) -> Sample:
        """H W of any size → image_size image_size, both uint8."""
        # Per sample, because albumentations' own seeding repeats itself in every worker and epoch.
        draw = np.random.SeedSequence([seed, epoch, index]).generate_state(1)
        self._compose.set_random_seed(int(draw[0]))
        moved = self._compose(image=sample.image, mask=sample.mask)
        return Sample(image=moved["image"], mask=moved["mask"], image_id=sample.image_id)

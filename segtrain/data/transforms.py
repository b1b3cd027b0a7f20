"""Random crops and flips on bytes. The only place that imports albumentations."""

import os

# albumentations asks the network for its newest version when it is imported; nothing here does.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import cv2
import numpy as np

from segtrain.data.sample import Sample

_LONGEST_STRIP = 8  # times as long as wide


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
        draw = np.random.SeedSequence([seed, epoch, index]).generate_state(2)
        self._compose.set_random_seed(int(draw[0]))
        window = _window(*sample.mask.shape, place=draw[1] / 2**32)
        moved = self._compose(image=sample.image[window], mask=sample.mask[window])
        return Sample(image=moved["image"], mask=moved["mask"], image_id=sample.image_id)


def _window(height: int, width: int, *, place: float) -> tuple[slice, slice]:
    """The part of a picture that is scaled: all of it, or a piece of a very long strip.

    Three rows of ninety thousand pixels, scaled until the short side fills the crop, would take
    gigabytes for a crop that shows a sliver of them.

    Args:
        place: in 0..1, which piece.
    """
    longest = _LONGEST_STRIP * min(height, width)
    top = int(place * max(0, height - longest))
    left = int(place * max(0, width - longest))
    return slice(top, top + longest), slice(left, left + longest)

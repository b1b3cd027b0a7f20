"""Random changes of training pictures, on bytes. The only place that imports albumentations.

Each draw depends on (seed, epoch, index) alone, so that worker processes and resumed runs see the
same pictures. The picture comes scaled already: a source that knows the scale decodes less.
"""

import os

# albumentations asks the network for its newest version when it is imported; nothing here does.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import albumentations as A
import cv2
import numpy as np

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.data.sample import Sample
from segtrain.images import Pixels, resize_image

Augment = Literal["paper", "standard", "strong"]
Backdrop = Callable[[int], Pixels | None]

# What lies beyond a picture: the mean of ImageNet, which the networks see as zero.
_FILL = (124.0, 116.0, 104.0)
_MARGIN = 1.2  # turned and bent pictures are cropped from larger ones, to show less beyond them


@dataclass(frozen=True)
class Preset:
    """What is done to a picture, in this order.

    scale: range of the short side before the crop, in crops.
    geometry: crops and moves image and mask together.
    paste: probability that the people are put on a picture without people.
    pixels: changes the image alone, but for holes, which the mask ignores.
    """

    scale: tuple[float, float]
    geometry: list[A.BasicTransform]
    paste: float = 0.0
    pixels: list[A.BasicTransform] = field(default_factory=list)


def paper(size: int) -> Preset:
    """Random crop and horizontal flip (Jégou et al. 2017, arXiv 1611.09326, section 4.1)."""
    return Preset(scale=(1.0, 1.5), geometry=[*_crop(size), A.HorizontalFlip(p=0.5)])


def standard(size: int) -> Preset:
    """Larger and smaller people, other light, and what cameras and the web do to photos."""
    return Preset(
        scale=(0.5, 2.0),
        geometry=[*_crop(size), A.HorizontalFlip(p=0.5)],
        pixels=_photography(),
    )


def strong(size: int) -> Preset:
    """`standard`, and turned, bent, grayed, with holes, and on other backgrounds.

    Elastic deformation on a coarse grid: Ronneberger et al. 2015 (arXiv 1505.04597, section 3.1).
    Holes: DeVries and Taylor 2017 (arXiv 1708.04552); here the mask ignores them, for nobody can
    see what they hide. People on other backgrounds: Ghiasi et al. 2021 (arXiv 2012.07177).
    """
    wide = round(size * _MARGIN)
    return Preset(
        scale=(0.5, 2.0),
        geometry=[
            *_crop(wide),
            A.Affine(
                rotate=(-20, 20),
                border_mode=cv2.BORDER_CONSTANT,
                fill=_FILL,
                fill_mask=IGNORE,
                p=0.5,
            ),
            A.GridElasticDeform(num_grid_xy=(4, 4), magnitude=max(1, wide // 24), p=0.3),
            A.CenterCrop(size, size),
            A.HorizontalFlip(p=0.5),
        ],
        paste=0.3,
        pixels=[
            *_photography(),
            A.ToGray(p=0.1),
            A.CoarseDropout(
                num_holes_range=(1, 4),
                hole_height_range=(0.05, 0.2),
                hole_width_range=(0.05, 0.2),
                fill=_FILL,
                fill_mask=IGNORE,
                p=0.3,
            ),
        ],
    )


PRESETS: dict[str, Callable[[int], Preset]] = {
    "paper": paper,
    "standard": standard,
    "strong": strong,
}


def _crop(size: int) -> list[A.BasicTransform]:
    """A random square; where the picture is smaller it lies anywhere in it."""
    return [
        A.RandomCrop(
            size,
            size,
            pad_if_needed=True,
            pad_position="random",
            border_mode=cv2.BORDER_CONSTANT,
            fill=_FILL,
            fill_mask=IGNORE,
        )
    ]


def _photography() -> list[A.BasicTransform]:
    return [
        A.ColorJitter(
            brightness=(0.7, 1.3),
            contrast=(0.7, 1.3),
            saturation=(0.6, 1.4),
            hue=(-0.05, 0.05),
            p=0.8,
        ),
        A.GaussianBlur(sigma_limit=(0.3, 1.5), p=0.15),
        A.ImageCompression(quality_range=(40, 95), p=0.2),
    ]


class TrainTransform:
    """A preset at one crop size.

    Args:
        image_size: side of the crop, pixels.
        augment: a key of PRESETS.
        scale: range of the short side before the crop, in crops; None takes the preset's own.
    """

    def __init__(
        self,
        image_size: int,
        augment: Augment = "paper",
        scale: tuple[float, float] | None = None,
    ) -> None:
        preset = PRESETS[augment](image_size)
        self.image_size = image_size
        self.scale = scale or preset.scale
        self.paste = preset.paste
        self._geometry = A.Compose(preset.geometry)
        self._pixels = A.Compose(preset.pixels) if preset.pixels else None

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        """The scale for this picture: its short side in pixels, before the call."""
        smallest, largest = self.scale
        lot = _lots(seed, epoch, index)[0] / 2**32
        return round(self.image_size * (smallest + (largest - smallest) * lot))

    def __call__(
        self,
        sample: Sample,
        *,
        seed: int,
        epoch: int,
        index: int,
        backdrop: Backdrop | None = None,
    ) -> Sample:
        """A scaled picture of any H W → image_size image_size, both uint8; `sample` stays as it is.

        Args:
            backdrop: gives a picture without people for any number, or None where there is none.
        """
        # Per sample, because albumentations' own seeding repeats itself in every worker and epoch.
        _, geometry_seed, pixel_seed, paste, place = _lots(seed, epoch, index)
        image, mask = _applied(self._geometry, geometry_seed, sample.image, sample.mask)
        if backdrop is not None and paste < self.paste * 2**32 and (mask == PERSON).any():
            behind = backdrop(place)
            if behind is not None:
                image, mask = _pasted(image, mask, _cover(behind, self.image_size, place))
        if self._pixels is not None:
            image, mask = _applied(self._pixels, pixel_seed, image, mask)
        return Sample(
            image=np.ascontiguousarray(image),
            mask=np.ascontiguousarray(mask),
            image_id=sample.image_id,
        )


def _lots(seed: int, epoch: int, index: int) -> list[int]:
    """Numbers in 0..2**32 for: scale, geometry, pixels, whether to paste, on what and where."""
    return np.random.SeedSequence([seed, epoch, index]).generate_state(5).tolist()  # type: ignore[no-any-return]


def _applied(compose: A.Compose, seed: int, image: Pixels, mask: Pixels) -> tuple[Pixels, Pixels]:
    compose.set_random_seed(seed)
    changed = compose(image=image, mask=mask)
    return changed["image"], changed["mask"]


def _cover(picture: Pixels, side: int, seed: int) -> Pixels:
    """A random square of a picture, which is enlarged where it is smaller."""
    draws = np.random.default_rng(seed)
    height, width = picture.shape[:2]
    factor = max(1.0, side / min(height, width))
    size = max(side, round(height * factor)), max(side, round(width * factor))
    picture = resize_image(picture, size)
    top, left = (int(draws.integers(length - side + 1)) for length in size)
    return picture[top : top + side, left : left + side]


def _pasted(image: Pixels, mask: Pixels, behind: Pixels) -> tuple[Pixels, Pixels]:
    """The people of `image` over another picture of the same size.

    The edge is blended over a pixel, or networks learn to find the seam. Ignored pixels stay as
    they are, for some of them are people, too.
    """
    kept = (mask != BACKGROUND).astype(np.float32)
    alpha = cv2.blur(kept, (3, 3))
    blended = cv2.blendLinear(image, np.ascontiguousarray(behind), alpha, 1 - alpha)
    return np.asarray(blended, dtype=np.uint8), mask

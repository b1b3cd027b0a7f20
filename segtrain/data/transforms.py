"""Random augmentation of training images, on bytes. The only module that imports albumentations.

Each draw depends only on (seed, epoch, index), so worker processes and resumed runs see the same
images. The input is already scaled: given the scale, a dataset decodes fewer pixels.
"""

import os
import random

from segtrain.types import Image, Mask

# albumentations checks online for a new version on import; segtrain makes no network request.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion

from segtrain.config.schema import DataConfig
from segtrain.data.sample import BackdropFn, Sample
from segtrain.imaging.images import resize_image
from segtrain.types import BACKGROUND, IGNORE, PERSON

Augment = Literal["paper", "standard", "strong", "elastic"]

# Fill color outside an image: the mean of ImageNet, which networks see as zero.
_FILL = (124.0, 116.0, 104.0)
# A square rotated by 20 degrees extends by a seventh of its side; elastic deformation adds to that.
_MARGIN = 0.15


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Augmentations of a scaled and cropped image, in this order.

    scale: range of the short side before the crop, relative to the crop.
    margin: pixels on each side of the crop that `geometry` receives and has to crop away.
    geometry: transforms of image and mask.
    paste: probability of pasting the people on an image without people.
    pixels: transforms of the image alone, except for holes, which the mask ignores.
    """

    scale: tuple[float, float]
    margin: int = 0
    geometry: list[A.BasicTransform]
    paste: float = 0.0
    pixels: list[A.BasicTransform] = field(default_factory=list)


def paper(size: int) -> Preset:
    """Random crop and horizontal flip (Jégou et al. 2017, arXiv 1611.09326, section 4.1)."""
    return Preset(scale=(1.0, 1.5), geometry=[A.HorizontalFlip(p=0.5)])


def standard(size: int) -> Preset:
    """Random scale and crop, horizontal flip, color jitter, blur, and JPEG compression."""
    return Preset(scale=(0.5, 2.0), geometry=[A.HorizontalFlip(p=0.5)], pixels=_photometric())


def strong(size: int) -> Preset:
    """`standard`, with rotation, elastic deformation, grayscale, holes, and other backgrounds.

    Elastic deformation: Ronneberger et al. 2015 (arXiv 1505.04597, section 3.1). Holes: DeVries and
    Taylor 2017 (arXiv 1708.04552); the mask ignores them here, because their content cannot be
    seen. People pasted on other backgrounds: Ghiasi et al. 2021 (arXiv 2012.07177).
    """
    return Preset(
        scale=(0.5, 2.0),
        margin=round(size * _MARGIN),
        geometry=[
            _rotate(),
            _ElasticDeform(size / 40, p=0.3),
            A.CenterCrop(size, size),
            A.HorizontalFlip(p=0.5),
        ],
        paste=0.3,
        pixels=[
            *_photometric(),
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


def elastic(size: int) -> Preset:
    """Rotation, elastic deformation, gray values (Ronneberger et al. 2015, section 3.1)."""
    return Preset(
        scale=(1.0, 1.5),
        margin=round(size * _MARGIN),
        geometry=[
            _rotate(),
            _ElasticDeform(size / 40, p=0.9),
            A.CenterCrop(size, size),
            A.HorizontalFlip(p=0.5),
        ],
        pixels=[A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), p=0.8)],
    )


PRESETS: dict[str, Callable[[int], Preset]] = {
    "paper": paper,
    "standard": standard,
    "strong": strong,
    "elastic": elastic,
}


def _rotate() -> A.BasicTransform:
    return A.Affine(
        rotate=(-20, 20), border_mode=cv2.BORDER_CONSTANT, fill=_FILL, fill_mask=IGNORE, p=0.5
    )


def _photometric() -> list[A.BasicTransform]:
    """Color jitter, and sometimes blur or JPEG compression."""
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


class _ElasticDeform(BaseDistortion):  # type: ignore[misc]  # albumentations has no types
    """Elastic deformation by a 3 x 3 grid of random shifts with bicubic interpolation.

    Ronneberger et al. 2015, section 3.1. The elastic transforms of albumentations draw a shift for
    every pixel or warp the whole image once per cell, which takes ten times as long.

    Args:
        sigma: standard deviation of the shifts, pixels.
        p: probability.
    """

    def __init__(self, sigma: float, p: float) -> None:
        super().__init__(
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            keypoint_remapping_method="mask",
            border_mode=cv2.BORDER_CONSTANT,
            fill=_FILL,
            fill_mask=IGNORE,
            p=p,
        )
        self.sigma = sigma

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Compute the source coordinates of each pixel for cv2.remap."""
        height, width = params["shape"][:2]
        grid = self.random_generator.normal(0, self.sigma, (3, 3, 2)).astype(np.float32)
        shifts = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        rows, columns = np.ogrid[:height, :width]
        return {"map_x": columns + shifts[..., 0], "map_y": rows + shifts[..., 1]}


class TrainTransform:
    """A preset at one crop size.

    Args:
        image_size: side of the crop, pixels.
        augment: a key of PRESETS.
        scale: range of the short side before the crop, relative to the crop; None uses the range of
            the preset.
        whole: do not crop; without `scale`, the short side is `image_size`. Not for strong and
            elastic, which need their crops.
    """

    def __init__(
        self,
        image_size: int,
        augment: Augment = "paper",
        scale: tuple[float, float] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.image_size, self.whole = image_size, whole
        self._preset = PRESETS[augment](image_size)
        self.scale = scale or ((1.0, 1.0) if whole else self._preset.scale)
        self._geometry = A.Compose(self._preset.geometry)
        self._pixels = A.Compose(self._preset.pixels) if self._preset.pixels else None

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        """Draw the short side in pixels to which this image is scaled before the call."""
        low, high = self.scale
        fraction = _draws(seed, epoch, index)[0] / 2**32
        return round(self.image_size * (low + (high - low) * fraction))

    def __call__(
        self,
        sample: Sample,
        *,
        seed: int,
        epoch: int,
        index: int,
        backdrop: BackdropFn | None = None,
    ) -> Sample:
        """Augment a scaled sample of any H W.

        Outside the image the result has one fill color and the mask is ignored. `sample` is not
        modified.

        Args:
            backdrop: loads an image without people to paste the people on.

        Returns:
            image_size image_size, or H W if `whole`, uint8, in newly allocated memory.
        """
        draws = _draws(seed, epoch, index)
        _, top, left, geometry_seed, paste_draw, backdrop_number, pixel_seed = draws
        image, mask = sample.image, sample.mask
        if not self.whole:
            image, mask = self._random_crop(sample, top, left)
        image, mask = _apply(self._geometry, geometry_seed, image, mask)
        should_paste = paste_draw < self._preset.paste * 2**32
        if backdrop is not None and should_paste and (mask == PERSON).any():
            behind = backdrop(backdrop_number)
            if behind is not None:
                behind = _backdrop_crop(behind, self.image_size, backdrop_number)
                image = _paste_people(image, mask, behind)
        if self._pixels is not None:
            image, mask = _apply(self._pixels, pixel_seed, image, mask)
        return Sample(image=image.copy(), mask=mask.copy(), image_id=sample.image_id)

    def _random_crop(self, sample: Sample, top_draw: int, left_draw: int) -> tuple[Image, Mask]:
        """Crop a random square with its margin.

        Not by albumentations, whose padding would hide the pixels beside the crop.
        """
        height, width = sample.mask.shape
        margin = self._preset.margin
        top = _crop_start(height, self.image_size, top_draw) - margin
        left = _crop_start(width, self.image_size, left_draw) - margin
        side = self.image_size + 2 * margin
        image = _padded_crop(sample.image, top, left, side, _FILL)
        return image, _padded_crop(sample.mask, top, left, side, (IGNORE,))


def train_transform(config: DataConfig) -> TrainTransform:
    """Build the configured transform of training images."""
    return TrainTransform(config.image_size, config.augment, config.scale, whole=config.whole)


def _draws(seed: int, epoch: int, index: int) -> list[int]:
    """Draw integers below 2**32: scale, top, left, geometry, pasting, backdrop, pixels."""
    return np.random.SeedSequence([seed, epoch, index]).generate_state(7).tolist()  # type: ignore[no-any-return]


def _crop_start(length: int, side: int, draw: int) -> int:
    """Scale a draw to the start of a crop inside the length, or around it if it is shorter."""
    spare = length - side
    return min(0, spare) + (draw * (abs(spare) + 1) >> 32)


def _padded_crop(image: Image, top: int, left: int, side: int, fill: tuple[float, ...]) -> Image:
    """Crop a square of H W or H W 3 that may extend beyond the image, padded with `fill`."""
    height, width = image.shape[:2]
    bottom, right = top + side, left + side
    inside = image[max(0, top) : bottom, max(0, left) : right]
    pad_top, pad_bottom = max(0, -top), max(0, bottom - height)
    pad_left, pad_right = max(0, -left), max(0, right - width)
    if not (pad_top or pad_bottom or pad_left or pad_right):
        return inside
    padded = cv2.copyMakeBorder(
        inside, pad_top, pad_bottom, pad_left, pad_right, cv2.BORDER_CONSTANT, value=fill
    )
    return np.asarray(padded, dtype=np.uint8)


def _apply(compose: A.Compose, seed: int, image: Image, mask: Mask) -> tuple[Image, Mask]:
    # Seed for every image, because the seeds of albumentations are equal in all workers and epochs.
    # set_random_seed would give each transform a generator with the same seed, so that a flipped
    # image would always be rotated, too; set_random_state shares one generator.
    compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
    changed = compose(image=image, mask=mask)
    return changed["image"], changed["mask"]


def _backdrop_crop(image: Image, side: int, seed: int) -> Image:
    """Crop a random square, upsampled if the image is smaller."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    # Crop before upsampling: a whole long strip would take hundreds of megabytes.
    window = min(side, height, width)
    top, left = (int(rng.integers(length - window + 1)) for length in (height, width))
    return resize_image(image[top : top + window, left : left + window], (side, side))


def _paste_people(image: Image, mask: Mask, backdrop: Image) -> Image:
    """Replace the background of `image` by another image of the same size.

    The edge is blended over a pixel; otherwise networks learn to find the seam. Ignored pixels
    stay, because some of them are people, too.
    """
    foreground = (mask != BACKGROUND).astype(np.float32)
    alpha = cv2.blur(foreground, (3, 3))
    blended = cv2.blendLinear(image, np.ascontiguousarray(backdrop), alpha, 1 - alpha)
    return np.asarray(blended, dtype=np.uint8)

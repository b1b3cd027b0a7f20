"""Random changes of training pictures, on bytes. The only place that imports albumentations.

Each draw depends on (seed, epoch, index) alone, so that worker processes and resumed runs see the
same pictures. The picture comes scaled already: a source that knows the scale decodes less.
"""

import os
import random

# albumentations asks the network for its newest version when it is imported; nothing here does.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.config import DataConfig
from segtrain.data.sample import Sample
from segtrain.images import Pixels, resize_image

Augment = Literal["paper", "standard", "strong", "elastic"]
Backdrop = Callable[[int], Pixels | None]

# What lies beyond a picture: the mean of ImageNet, which the networks see as zero.
_FILL = (124.0, 116.0, 104.0)
# A square turned by 20 degrees reaches a seventh of its side further; bending adds to that.
_MARGIN = 0.15


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is done to a picture after it was scaled and cropped, in this order.

    scale: range of the short side before the crop, in crops.
    margin: pixels that `geometry` gets on each side of the crop and has to take away again.
    geometry: moves image and mask together.
    paste: probability that the people are put on a picture without people.
    pixels: changes the image alone, but for holes, which the mask ignores.
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
    """Larger and smaller people, other light, and what cameras and the web do to photos."""
    return Preset(scale=(0.5, 2.0), geometry=[A.HorizontalFlip(p=0.5)], pixels=_photography())


def strong(size: int) -> Preset:
    """`standard`, and turned, bent, grayed, with holes, and on other backgrounds.

    Bent as in Ronneberger et al. 2015 (arXiv 1505.04597, section 3.1). Holes: DeVries and Taylor
    2017 (arXiv 1708.04552); here the mask ignores them, for nobody can see what they hide. People
    on other backgrounds: Ghiasi et al. 2021 (arXiv 2012.07177).
    """
    return Preset(
        scale=(0.5, 2.0),
        margin=round(size * _MARGIN),
        geometry=[
            _turn(),
            _Bend(size / 40, p=0.3),
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


def elastic(size: int) -> Preset:
    """Turned, bent and with other gray values (Ronneberger et al. 2015, section 3.1)."""
    return Preset(
        scale=(1.0, 1.5),
        margin=round(size * _MARGIN),
        geometry=[
            _turn(),
            _Bend(size / 40, p=0.9),
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


def _turn() -> A.BasicTransform:
    return A.Affine(
        rotate=(-20, 20), border_mode=cv2.BORDER_CONSTANT, fill=_FILL, fill_mask=IGNORE, p=0.5
    )


def _photography() -> list[A.BasicTransform]:
    """Light and colour, now and then out of focus or compressed."""
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


class _Bend(BaseDistortion):  # type: ignore[misc]  # albumentations carries no types
    """Elastic deformation: a 3 x 3 grid of random shifts, bicubic in between.

    Ronneberger et al. 2015, section 3.1. albumentations' own elastic transforms draw a shift for
    every pixel or warp the whole picture once a cell, which takes ten times as long.

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
        """Where each pixel comes from, as cv2.remap wants it."""
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
        scale: range of the short side before the crop, in crops; None takes the preset's own.
        whole: no crop; without a `scale` the short side is `image_size`. Not with strong
            and elastic, whose crops belong to them.
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
        """A scaled picture of any H W → image_size image_size, both uint8, in memory of their own.

        With `whole` it keeps its H W. Beyond the picture the image has one colour and the mask says
        ignore. `sample` stays as it is.

        Args:
            backdrop: gives a picture without people for any number, or None where there is none.
        """
        _, top, left, geometry_seed, paste, place, pixel_seed = _lots(seed, epoch, index)
        image, mask = sample.image, sample.mask
        if not self.whole:
            image, mask = self._cropped(sample, top, left)
        image, mask = _applied(self._geometry, geometry_seed, image, mask)
        if backdrop is not None and paste < self._preset.paste * 2**32 and (mask == PERSON).any():
            behind = backdrop(place)
            if behind is not None:
                image, mask = _pasted(image, mask, _cover(behind, self.image_size, place))
        if self._pixels is not None:
            image, mask = _applied(self._pixels, pixel_seed, image, mask)
        return Sample(image=image.copy(), mask=mask.copy(), image_id=sample.image_id)

    def _cropped(self, sample: Sample, top_lot: int, left_lot: int) -> tuple[Pixels, Pixels]:
        """A random square and the margin around it.

        By hand and not by albumentations, whose padding would hide what lies beside the crop.
        """
        height, width = sample.mask.shape
        margin = self._preset.margin
        top = _start(height, self.image_size, top_lot) - margin
        left = _start(width, self.image_size, left_lot) - margin
        side = self.image_size + 2 * margin
        image = _square(sample.image, top, left, side, _FILL)
        return image, _square(sample.mask, top, left, side, (IGNORE,))


def train_transform(config: DataConfig) -> TrainTransform:
    """The configured transform of training pictures."""
    return TrainTransform(config.image_size, config.augment, config.scale, whole=config.whole)


def _lots(seed: int, epoch: int, index: int) -> list[int]:
    """Numbers in 0..2**32 for: scale, top, left, geometry, whether to paste, on what, pixels."""
    return np.random.SeedSequence([seed, epoch, index]).generate_state(7).tolist()  # type: ignore[no-any-return]


def _start(length: int, side: int, lot: int) -> int:
    """Where a crop begins: all of it inside, or a length that is shorter anywhere in it."""
    spare = length - side
    return min(0, spare) + (lot * (abs(spare) + 1) >> 32)


def _square(picture: Pixels, top: int, left: int, side: int, fill: tuple[float, ...]) -> Pixels:
    """A window of H W or H W 3 that may reach beyond it on every side: there it is `fill`."""
    height, width = picture.shape[:2]
    bottom, right = top + side, left + side
    inside = picture[max(0, top) : bottom, max(0, left) : right]
    above, below = max(0, -top), max(0, bottom - height)
    before, behind = max(0, -left), max(0, right - width)
    if not (above or below or before or behind):
        return inside
    padded = cv2.copyMakeBorder(
        inside, above, below, before, behind, cv2.BORDER_CONSTANT, value=fill
    )
    return np.asarray(padded, dtype=np.uint8)


def _applied(compose: A.Compose, seed: int, image: Pixels, mask: Pixels) -> tuple[Pixels, Pixels]:
    # For every picture, since albumentations' own seeds are the same in every worker and epoch. And
    # by state: set_random_seed gives each transform a generator of the same seed, and whatever is
    # mirrored would be turned, too.
    compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
    changed = compose(image=image, mask=mask)
    return changed["image"], changed["mask"]


def _cover(picture: Pixels, side: int, seed: int) -> Pixels:
    """A random square of a picture, enlarged where the picture is smaller."""
    draws = np.random.default_rng(seed)
    height, width = picture.shape[:2]
    # Cropped before it is enlarged: all of a long strip would take hundreds of megabytes.
    window = min(side, height, width)
    top, left = (int(draws.integers(length - window + 1)) for length in (height, width))
    return resize_image(picture[top : top + window, left : left + window], (side, side))


def _pasted(image: Pixels, mask: Pixels, behind: Pixels) -> tuple[Pixels, Pixels]:
    """The people of `image` over another picture of the same size.

    The edge is blended over a pixel, or networks learn to find the seam. Ignored pixels stay as
    they are, for some of them are people, too.
    """
    kept = (mask != BACKGROUND).astype(np.float32)
    alpha = cv2.blur(kept, (3, 3))
    blended = cv2.blendLinear(image, np.ascontiguousarray(behind), alpha, 1 - alpha)
    return np.asarray(blended, dtype=np.uint8), mask

"""New backgrounds: an image, a solid color, the blurred photo, or none (transparent)."""

import re
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from segtrain.errors import UsageError
from segtrain.imaging.images import read_image
from segtrain.types import Image, Mask

TRANSPARENT = "transparent"

# The blur runs on a copy with this long side, in pixels; sigma is a fraction of that side.
_BLUR_LONG_SIDE = 400
_BLUR_SIGMA = 1 / 40


class BackgroundFn(Protocol):
    """Makes the new background of an image."""

    def __call__(self, image: Image, alpha: Mask | None = None) -> Image | None:
        """Return a background of the size of the image, which the caller may modify.

        Args:
            image: H W 3 uint8 RGB, the photo.
            alpha: H W uint8, opacity of the person. If given, a background made from the photo
                excludes the person, who would otherwise appear as a glow around the cutout.

        Returns:
            H W 3 uint8 RGB; None for a transparent background.
        """
        ...


def build_background_fn(description: str) -> BackgroundFn:
    """Build the background function for a value of `--background`.

    Args:
        description: "blur" for the blurred photo, "transparent" for no background, "#rrggbb" for
            a color, else the path of an image, which is scaled to cover and center-cropped.

    Raises:
        UsageError: not a keyword, a color or an existing file.
        DataError: the background image cannot be read.
    """
    if description == "blur":
        return _blur
    if description == TRANSPARENT:
        return lambda image, alpha=None: None
    if re.fullmatch(r"#[0-9a-fA-F]{6}", description):
        color = [int(description[i : i + 2], 16) for i in (1, 3, 5)]
        return lambda image, alpha=None: np.full_like(image, color)
    path = Path(description)
    if not path.is_file():
        raise UsageError(
            f"--background {description!r}: no such file",
            f"use an image, a color like #00ff00, `blur` or `{TRANSPARENT}`",
        )
    photo = read_image(path)
    return lambda image, alpha=None: _resize_to_cover(photo, image.shape[0], image.shape[1])


def _blur(image: Image, alpha: Mask | None = None) -> Image:
    # Blurring a small copy looks the same and costs the same for every image size.
    height, width = image.shape[:2]
    scale = min(1.0, _BLUR_LONG_SIDE / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    sigma = max(small_size) * _BLUR_SIGMA
    if alpha is None:
        blurred = cv2.GaussianBlur(small, (0, 0), sigmaX=sigma)
    else:
        blurred = _blur_background(np.asarray(small, dtype=np.uint8), alpha, sigma)
    return np.asarray(
        cv2.resize(blurred, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8
    )


def _blur_background(small: Image, alpha: Mask, sigma: float) -> Image:
    """Blur only the background and extend it behind the person (a normalized convolution).

    Args:
        small: h w 3 uint8.
        alpha: H W uint8, opacity of the person.
        sigma: of the Gaussian, in pixels of `small`.
    """
    size = small.shape[1::-1]
    weight = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    # The person keeps a small weight, so that pixels far from any background have a color.
    weight = (1 - weight / 255).clip(1e-3, 1)[..., None]
    colors = cv2.GaussianBlur(small * weight, (0, 0), sigmaX=sigma)
    weights = cv2.GaussianBlur(weight, (0, 0), sigmaX=sigma)
    blurred = colors / weights.reshape(weight.shape)
    return np.asarray(np.rint(blurred).clip(0, 255), dtype=np.uint8)


def _resize_to_cover(image: Image, height: int, width: int) -> Image:
    """Center-crop to the aspect ratio of the target, then resize.

    Cropping comes first: a long strip that is resized whole would fill the memory.
    """
    scale = max(height / image.shape[0], width / image.shape[1])
    rows = min(image.shape[0], max(1, round(height / scale)))
    columns = min(image.shape[1], max(1, round(width / scale)))
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    crop = image[top : top + rows, left : left + columns]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(
        cv2.resize(crop, (width, height), interpolation=interpolation), dtype=np.uint8
    )

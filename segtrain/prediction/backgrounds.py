"""What a person is put upon: a picture, a colour, the photo itself blurred, or nothing."""

import re
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from segtrain.errors import UsageError
from segtrain.images import Pixels, read_image

TRANSPARENT = "transparent"

_BLUR_SIDE = 400
_BLUR_SHARE = 1 / 40


class MakeBackground(Protocol):
    """Makes the background of a picture."""

    def __call__(self, image: Pixels, alpha: Pixels | None = None) -> Pixels | None:
        """A picture of the same size to put the person upon; whoever asks may paint on it.

        Args:
            image: H W 3 uint8 RGB, the photo.
            alpha: H W uint8, opacity of the person, if the person shall be left out of a
                background that is made of the photo; nobody stands before their own glow.

        Returns:
            H W 3 uint8 RGB; None for no background at all, a transparent one.
        """
        ...


def background_maker(description: str) -> MakeBackground:
    """From `--background` to a function that makes the background of a picture.

    Args:
        description: "blur" blurs the photo itself, "transparent" is no background, "#rrggbb" is a
            colour, anything else is the path of a picture, scaled to cover and cropped in the
            middle.

    Raises:
        UsageError: neither of these words, nor a colour, nor an existing file.
        DataError: the background picture cannot be read.
    """
    if description == "blur":
        return _blurred
    if description == TRANSPARENT:
        return lambda image, alpha=None: None
    if re.fullmatch(r"#[0-9a-fA-F]{6}", description):
        colour = [int(description[i : i + 2], 16) for i in (1, 3, 5)]
        return lambda image, alpha=None: np.full_like(image, colour)
    path = Path(description)
    if not path.is_file():
        raise UsageError(
            f"--background {description!r} is no file, no colour like #00ff00, and not `blur` or "
            f"`{TRANSPARENT}`"
        )
    picture = read_image(path)
    return lambda image, alpha=None: _cover(picture, image.shape[0], image.shape[1])


def _blurred(image: Pixels, alpha: Pixels | None = None) -> Pixels:
    # Blurring a small copy looks the same and costs the same for any size of picture.
    height, width = image.shape[:2]
    scale = min(1.0, _BLUR_SIDE / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    sigma = max(small_size) * _BLUR_SHARE
    if alpha is None:
        soft = cv2.GaussianBlur(small, (0, 0), sigmaX=sigma)
    else:
        soft = _blurred_without(np.asarray(small, dtype=np.uint8), alpha, sigma)
    return np.asarray(
        cv2.resize(soft, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8
    )


def _blurred_without(small: Pixels, alpha: Pixels, sigma: float) -> Pixels:
    """The blur of the background alone, which runs on behind the person.

    Args:
        small: h w 3 uint8. alpha: H W uint8, opacity of the person. sigma: of the blur, pixels.
    """
    size = small.shape[1::-1]
    weight = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    # A little of the person counts, so that there is a colour where no background is near.
    weight = (1 - weight / 255).clip(1e-3, 1)[..., None]
    colours = cv2.GaussianBlur(small * weight, (0, 0), sigmaX=sigma)
    weights = cv2.GaussianBlur(weight, (0, 0), sigmaX=sigma)
    soft = colours / weights.reshape(weight.shape)
    return np.asarray(np.rint(soft).clip(0, 255), dtype=np.uint8)


def _cover(picture: Pixels, height: int, width: int) -> Pixels:
    """Keep the middle of the right shape and scale that: a long strip scaled whole fills memory."""
    scale = max(height / picture.shape[0], width / picture.shape[1])
    rows = min(picture.shape[0], max(1, round(height / scale)))
    columns = min(picture.shape[1], max(1, round(width / scale)))
    top, left = (picture.shape[0] - rows) // 2, (picture.shape[1] - columns) // 2
    middle = picture[top : top + rows, left : left + columns]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(
        cv2.resize(middle, (width, height), interpolation=interpolation), dtype=np.uint8
    )

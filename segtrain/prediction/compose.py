"""What is made of a picture and its person probabilities: mask, cut-out, new background, panel."""

import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.errors import UsageError
from segtrain.images import Pixels, read_image

Probability = npt.NDArray[np.float32]
MakeBackground = Callable[[Pixels], Pixels]

# Alpha runs from 0 to 1 between these probabilities: soft at the edge, solid inside.
_ALPHA_FROM, _ALPHA_TO = 0.3, 0.7


def make_mask(probability: Probability) -> Pixels:
    """H W float32 in 0..1 → H W uint8: 255 where person is at least as likely as not, else 0."""
    return np.where(probability >= 0.5, 255, 0).astype(np.uint8)


def make_alpha(probability: Probability) -> Probability:
    """Opacity of the person, H W float32 in 0..1, with an edge as soft as the network is unsure."""
    alpha = (probability - _ALPHA_FROM) / (_ALPHA_TO - _ALPHA_FROM)
    return np.asarray(alpha.clip(0, 1), dtype=np.float32)


def make_cutout(image: Pixels, probability: Probability) -> Pixels:
    """The person alone: H W 4 uint8 RGBA, background transparent.

    Where nothing of the person is, the colour is wiped: a file that looks cut out should not carry
    the old background hidden under its alpha.
    """
    alpha = np.rint(make_alpha(probability) * 255).astype(np.uint8)
    cutout = np.dstack([image, alpha])
    cutout[alpha == 0] = 0
    return cutout


def put_on_background(image: Pixels, probability: Probability, background: Pixels) -> Pixels:
    """The person over another picture of the same H and W: H W 3 uint8."""
    alpha = make_alpha(probability)
    # cv2 blends bytes in place of the float copies numpy would make: 300 MB less at 12 Mpx.
    return np.asarray(cv2.blendLinear(image, background, alpha, 1 - alpha), dtype=np.uint8)


def make_panel(image: Pixels, new_background: Pixels, mask: Pixels) -> Pixels:
    """original | new background | mask, side by side with a narrow gap: H 3W+2g 3 uint8."""
    gap = np.full((image.shape[0], max(4, image.shape[1] // 100), 3), 255, dtype=np.uint8)
    mask_rgb = np.repeat(mask[..., None], 3, axis=2)
    return np.concatenate([image, gap, new_background, gap, mask_rgb], axis=1)


def background_maker(description: str) -> MakeBackground:
    """From `--background` to a function that makes the background of a picture.

    Args:
        description: "blur" blurs the picture itself, "#rrggbb" is a colour, anything else is the
            path of a picture, scaled to cover and cropped in the middle.

    Raises:
        UsageError: neither a colour nor an existing file.
        DataError: the background picture cannot be read.
    """
    if description == "blur":
        return _blurred
    if re.fullmatch(r"#[0-9a-fA-F]{6}", description):
        colour = [int(description[i : i + 2], 16) for i in (1, 3, 5)]
        return lambda image: np.full_like(image, colour)
    path = Path(description)
    if not path.is_file():
        raise UsageError(
            f"--background {description!r} is no file, no colour like #00ff00, and not `blur`"
        )
    picture = read_image(path)
    return lambda image: _cover(picture, image.shape[0], image.shape[1])


def _blurred(image: Pixels) -> Pixels:
    # Blurring a small copy looks the same and costs the same for any size of picture.
    height, width = image.shape[:2]
    scale = min(1.0, 400 / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small, (0, 0), sigmaX=max(small_size) / 40)
    return np.asarray(
        cv2.resize(soft, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8
    )


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

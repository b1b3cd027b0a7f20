"""A picture as upright RGB bytes, in little memory: one that Pillow has decoded, or a frame.

Pillow holds four bytes a pixel. What becomes of them is made in strips, for at 100 megapixels each
further copy of the whole picture would take 300 or 400 MB.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

Pixels = npt.NDArray[np.uint8]

_WHITE = (255, 255, 255, 255)
_PIXELS_AT_ONCE = 2**20
# EXIF 2.3, "Orientation": whether rows and columns change places, then how cv2.flip mirrors.
_UPSIDE_DOWN, _LEFT_RIGHT, _BOTH = 0, 1, -1
_TURNS: dict[int, tuple[bool, int | None]] = {
    2: (False, _LEFT_RIGHT),
    3: (False, _BOTH),
    4: (False, _UPSIDE_DOWN),
    5: (True, None),
    6: (True, _LEFT_RIGHT),
    7: (True, _BOTH),
    8: (True, _UPSIDE_DOWN),
}


def rgb_of(picture: Image.Image) -> Pixels:
    """The pixels as they are stored, H W 3 uint8.

    Transparent pixels are laid on white, 16-bit samples scaled to 8, CMYK, palettes and gray
    converted.
    """
    factor = _factor_to_8_bits(picture)
    pixels = np.empty((picture.height, picture.width, 3), dtype=np.uint8)
    for rows, strip in _strips(picture):
        pixels[rows] = _rgb(strip if factor is None else _to_8_bits(strip, factor))
    return pixels


def orientation_of(picture: Image.Image) -> int:
    """How the upright picture was laid down in the file, 1 (as it is) to 8.

    Ask after `load()`: Pillow turns a TIFF by itself, and a PNG may tell after its pixels.
    """
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return int(orientation) if orientation in _TURNS else 1


def is_on_its_side(orientation: int) -> bool:
    """Whether height and width change places when the picture is turned upright."""
    return orientation in _TURNS and _TURNS[orientation][0]


def turned_upright(pixels: Pixels, orientation: int) -> Pixels:
    """H W 3 as stored to upright; at a right angle it is a copy, else done in place."""
    if orientation not in _TURNS:
        return pixels
    transposed, mirrored = _TURNS[orientation]
    if transposed:
        pixels = np.asarray(cv2.transpose(pixels), dtype=np.uint8)
    if mirrored is not None:
        cv2.flip(pixels, mirrored, dst=pixels)
    return pixels


def _strips(picture: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    height = max(1, _PIXELS_AT_ONCE // picture.width)
    for top in range(0, picture.height, height):
        bottom = min(top + height, picture.height)
        yield slice(top, bottom), picture.crop((0, top, picture.width, bottom))


def _rgb(picture: Image.Image) -> Pixels:
    if picture.has_transparency_data:
        layered = Image.new("RGBA", picture.size, _WHITE)
        layered.alpha_composite(picture.convert("RGBA"))
        picture = layered
    if picture.mode != "RGB":  # convert() would copy even where there is nothing to do
        picture = picture.convert("RGB")
    return np.asarray(picture, dtype=np.uint8)


def _factor_to_8_bits(picture: Image.Image) -> float | None:
    """For gray of 16 or 32 bits or float: convert('RGB') would clip at 255 instead of scaling."""
    if picture.mode.startswith("I;16"):
        return 255.0 / 65535.0
    if picture.mode not in {"I", "F"}:
        return None
    largest = max(float(_samples(strip).max()) for _, strip in _strips(picture))
    if picture.mode == "F":
        return 255.0 if largest <= 1.0 else 1.0
    return 1.0 if largest <= 255.0 else 255.0 / 65535.0


def _to_8_bits(picture: Image.Image, factor: float) -> Image.Image:
    samples = _samples(picture)
    levels = np.clip(np.rint(samples * factor), 0, 255).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):  # PNG names one gray; it is laid on white, as all are
        levels[samples == transparent] = 255
    return Image.fromarray(levels)


def _samples(picture: Image.Image) -> npt.NDArray[np.float32]:
    samples = np.asarray(picture, dtype=np.float32)
    return np.nan_to_num(samples, posinf=0.0, neginf=0.0)

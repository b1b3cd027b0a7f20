"""Convert a decoded Pillow image or a video frame to upright RGB bytes, in little memory.

Pillow holds four bytes a pixel. The conversion works in strips: at 100 megapixels, each further
copy of the whole image would take 300 or 400 MB.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import ExifTags

from segtrain.types import Image

_WHITE = (255, 255, 255, 255)
_STRIP_PIXELS = 2**20
# Flip codes of cv2.flip.
_VERTICAL, _HORIZONTAL, _BOTH = 0, 1, -1
# EXIF 2.3, "Orientation": whether to transpose, and then how to flip.
_ROTATIONS: dict[int, tuple[bool, int | None]] = {
    2: (False, _HORIZONTAL),
    3: (False, _BOTH),
    4: (False, _VERTICAL),
    5: (True, None),
    6: (True, _HORIZONTAL),
    7: (True, _BOTH),
    8: (True, _VERTICAL),
}


def to_rgb(image: PIL.Image.Image) -> Image:
    """Convert to H W 3 uint8 RGB in the stored orientation.

    Transparent pixels are composited on white, 16-bit samples are scaled to 8 bits, and CMYK,
    palette and gray images are converted.
    """
    factor = _factor_to_8_bits(image)
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for rows, strip in _strips(image):
        pixels[rows] = _strip_to_rgb(strip if factor is None else _to_8_bits(strip, factor))
    return pixels


def exif_orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8.

    Call it after `load()`: Pillow rotates a TIFF while loading, and a PNG may hold its EXIF data
    after its pixels.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return int(orientation) if orientation in _ROTATIONS else 1


def swaps_axes(orientation: int) -> bool:
    """Whether `rotate_upright` swaps height and width."""
    return orientation in _ROTATIONS and _ROTATIONS[orientation][0]


def rotate_upright(pixels: Image, orientation: int) -> Image:
    """Undo an EXIF orientation of H W 3.

    Works in place, except for a rotation by 90 degrees, which returns a copy.
    """
    if orientation not in _ROTATIONS:
        return pixels
    transpose, flip = _ROTATIONS[orientation]
    if transpose:
        pixels = np.asarray(cv2.transpose(pixels), dtype=np.uint8)
    if flip is not None:
        cv2.flip(pixels, flip, dst=pixels)
    return pixels


def _strips(image: PIL.Image.Image) -> Iterator[tuple[slice, PIL.Image.Image]]:
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _strip_to_rgb(image: PIL.Image.Image) -> Image:
    if image.has_transparency_data:
        composite = PIL.Image.new("RGBA", image.size, _WHITE)
        composite.alpha_composite(image.convert("RGBA"))
        image = composite
    if image.mode != "RGB":  # convert() copies even an RGB image
        image = image.convert("RGB")
    return np.asarray(image, dtype=np.uint8)


def _factor_to_8_bits(image: PIL.Image.Image) -> float | None:
    """Scale factor for gray of 16 or 32 bits or float; convert("RGB") would clip it at 255."""
    if image.mode.startswith("I;16"):
        return 255.0 / 65535.0
    if image.mode not in {"I", "F"}:
        return None
    largest = max(float(_samples(strip).max()) for _, strip in _strips(image))
    if image.mode == "F":
        return 255.0 if largest <= 1.0 else 1.0
    return 1.0 if largest <= 255.0 else 255.0 / 65535.0


def _to_8_bits(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    samples = _samples(image)
    levels = np.clip(np.rint(samples * factor), 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a gray PNG marks one level as transparent: white, too
        levels[samples == transparent] = 255
    return PIL.Image.fromarray(levels)


def _samples(image: PIL.Image.Image) -> npt.NDArray[np.float32]:
    samples = np.asarray(image, dtype=np.float32)
    return np.nan_to_num(samples, posinf=0.0, neginf=0.0)

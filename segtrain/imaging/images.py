"""Read, write and resize image files.

Image files are untrusted input. Their format is detected from their content, not from their
extension. Their size is checked before memory is allocated. Every exception of a decoder becomes
one DataError that names the file.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import UnidentifiedImageError

from segtrain.errors import DataError
from segtrain.imaging.rgb import exif_orientation, rotate_upright, swaps_axes, to_rgb
from segtrain.runtime.files import write_bytes
from segtrain.types import Image

Uint16Image = npt.NDArray[np.uint16]
"""H W, gray."""

MAX_PIXELS = 100_000_000
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".mpo"}
)
# Pillow supports more formats, among them PostScript, for which it starts an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")

_JPEG_LONGEST_SIDE = 65_500
_JPEG_END, _JPEG_TAIL = b"\xff\xd9", 2**16
_REDUCED_FLAGS = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PILLOW = r"PIL\."
# The entry that `warnings.filterwarnings` adds to `warnings.filters`.
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(_PILLOW), 0)
_FILTERS_LOCK = threading.Lock()
# An MPO needs no note: its other images are previews, depth or gain maps of the first.
_FRAMES_NOTES = {
    "TIFF": "has several pages; the first is taken",
    **dict.fromkeys(("GIF", "WEBP", "PNG", "AVIF"), "is animated; its first frame is taken"),
}


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        pixels: H W 3 uint8 RGB.
        size: height and width of the whole image; `pixels` may be smaller.
        note: which part of the file is left out, as "is animated; ...", or None.
    """

    pixels: Image
    size: tuple[int, int]
    note: str | None


def read_image(path: Path, *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image file to H W 3 uint8 RGB.

    Transparent pixels are composited on white, and 16-bit samples are scaled to 8 bits. Of an
    animation, the first frame is decoded.

    Args:
        path: JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF, with any extension.
        upright: apply the EXIF orientation. The annotations of data sets such as COCO refer to the
            stored pixels and need False.
        max_pixels: reject larger images before decoding.

    Raises:
        DataError: the file is missing, not an image, damaged, truncated or too large.
    """
    return read_sized_image(path, upright=upright, max_pixels=max_pixels)[0]


def read_sized_image(
    path: Path,
    *,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
) -> tuple[Image, tuple[int, int]]:
    """Decode like `read_image`, a large JPEG at a reduced size in a fraction of the time.

    Args:
        short_side: the short side that is needed, in pixels. A JPEG that is at least two, four or
            eight times as large is decoded at a half, a quarter or an eighth.

    Returns:
        The pixels, and height and width of the whole image.
    """
    image = decode_image(path, upright=upright, max_pixels=max_pixels, short_side=short_side)
    return image.pixels, image.size


def decode_image(
    path: Path,
    *,
    content: bytes | None = None,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
) -> DecodedImage:
    """Decode like `read_sized_image`, with a note if the file holds more than one image.

    Memory beside the pixels, in bytes a pixel: 3 for most JPEGs, because OpenCV returns a copy, and
    up to 6 for a progressive one; 4 for every other format.

    Args:
        content: the bytes of an image that is not in a file; `path` is then only its name.
    """
    with map_decode_errors(path, max_pixels, in_memory=content is not None):
        pixels, size, orientation, note = _decode(path, content, max_pixels, short_side)
        if upright:
            pixels = rotate_upright(pixels, orientation)
            size = size[::-1] if swaps_axes(orientation) else size
        return DecodedImage(pixels, size, note)


def count_pixels(path: Path, max_pixels: int = MAX_PIXELS) -> int:
    """Read the number of pixels from the header; 0 if the file is not an image.

    Args:
        max_pixels: as in `read_image`. The count of an image far above it is 0, too: decoding
            rejects that image.
    """
    with (
        suppress(DataError),
        map_decode_errors(path, max_pixels),
        PIL.Image.open(path, formats=FORMATS) as image,
    ):
        return image.width * image.height
    return 0


def _decode(
    path: Path, content: bytes | None, max_pixels: int, short_side: int | None
) -> tuple[Image, tuple[int, int], int, str | None]:
    """Return the pixels as stored, their size in the file, the orientation and the frames note.

    On return, Pillow has freed its copy of the image.
    """
    file = path if content is None else io.BytesIO(content)
    with PIL.Image.open(file, formats=FORMATS) as image:
        _check_size(image, path, max_pixels)
        note = _frames_note(image)
        pixels = None
        if is_plain_jpeg(image, upright=False):
            size = image.height, image.width
            pixels = decode_plain_jpeg(path, size, short_side, content)
        if pixels is None:
            image.load()
            # Pillow rotates a TIFF upright while loading it.
            size = image.height, image.width
            pixels = to_rgb(image)
        return pixels, size, exif_orientation(image), note


def _check_size(image: PIL.Image.Image, path: Path, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{path} has {width * height / 1e6:.0f} megapixels, the limit is "
            f"{max_pixels / 1e6:.0f}",
            "shrink it or raise the limit",
        )


def _frames_note(image: PIL.Image.Image) -> str | None:
    """Return the note of `DecodedImage`; ignores errors in the second frame."""
    with suppress(Exception):
        if getattr(image, "is_animated", False):
            return _FRAMES_NOTES.get(image.format or "")
    return None


@contextmanager
def map_decode_errors(
    path: Path, max_pixels: int = MAX_PIXELS, *, in_memory: bool = False
) -> Iterator[None]:
    """Decode `path` with Pillow inside this context; every exception becomes a DataError.

    MemoryError passes through.

    Args:
        max_pixels: raises Pillow's own limit to this if it is lower.
        in_memory: `path` is the name of bytes that are not in a file.
    """
    try:
        if not in_memory and not path.is_file():
            problem = " is not a file" if path.exists() else ": no such file"
            raise DataError(f"{path}{problem}", "give the path of an image")
        _ignore_pillow_warnings()
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS or 0, max_pixels)
        yield
    except (DataError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError:
        raise DataError(
            f"{path} has far more than {max_pixels / 1e6:.0f} megapixels", "shrink it"
        ) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot decode {path}: {reason}", "replace the file") from error


def _ignore_pillow_warnings() -> None:
    """Ignore Pillow's warnings about odd metadata and large files for the rest of the process.

    All threads share Python's warning filters. `warnings.catch_warnings` would restore the filters
    of its own start: that removes this filter while another thread is still decoding, or restores
    it for good after all threads are done.
    """
    with _FILTERS_LOCK:
        if _PILLOW_FILTER not in warnings.filters[:1]:
            warnings.filterwarnings("ignore", module=_PILLOW)


def is_plain_jpeg(image: PIL.Image.Image, *, upright: bool) -> bool:
    """Whether `decode_plain_jpeg` can decode an opened image, as it can nearly all photos."""
    if image.format != "JPEG" or image.mode not in {"RGB", "L"}:
        return False
    return not upright or exif_orientation(image) == 1


def decode_plain_jpeg(
    path: Path, size: tuple[int, int], short_side: int | None, content: bytes | None = None
) -> Image | None:
    """Decode with OpenCV: a third faster than Pillow, at a reduced size if that is enough.

    OpenCV silently fills up a truncated JPEG. A file without an end marker is therefore left to
    Pillow, which raises an error.

    Args:
        size: expected height and width.
        short_side: as in `read_sized_image`.
        content: the bytes of an image that is not in a file.

    Returns:
        H W 3 uint8 RGB as stored, or None if the file cannot be read, has no end marker or has
        another size.
    """
    try:
        encoded = (
            np.fromfile(path, np.uint8) if content is None else np.frombuffer(content, np.uint8)
        )
    except OSError:
        return None
    if _JPEG_END not in encoded[-_JPEG_TAIL:].tobytes():
        return None
    factor = 1
    while short_side is not None and factor < 8 and min(size) >= 2 * factor * short_side:
        factor *= 2
    # The reduced sizes have no RGB flag.
    flag = _REDUCED_FLAGS.get(factor, cv2.IMREAD_COLOR_RGB)
    pixels = cv2.imdecode(encoded, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.shape[:2] != (-(-size[0] // factor), -(-size[1] // factor)):
        return None
    if factor > 1:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return np.asarray(pixels, dtype=np.uint8)


def write_image(path: Path, pixels: Image | Uint16Image, *, jpeg_quality: int = 92) -> None:
    """Encode with `encode_image` and write atomically.

    Raises:
        ResourceError: the folder cannot be created or written, or the disk is full.
        DataError: the image is too large for JPEG.
    """
    write_bytes(path, encode_image(pixels, path, jpeg_quality=jpeg_quality))


def encode_image(pixels: Image | Uint16Image, path: Path, *, jpeg_quality: int = 92) -> bytes:
    """Encode H W (gray), H W 3 (RGB) or H W 4 (RGBA) by the suffix of `path`: .png or .jpg.

    Args:
        pixels: uint8; a gray PNG also uint16.

    Raises:
        DataError: the image is too large for JPEG.
    """
    conversion = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    if pixels.ndim == 3:
        pixels = np.asarray(cv2.cvtColor(pixels, conversion[pixels.shape[2]]), dtype=np.uint8)
    height, width = pixels.shape[:2]
    suffix = path.suffix.lower()
    is_jpeg = suffix in {".jpg", ".jpeg"}
    if is_jpeg and max(height, width) > _JPEG_LONGEST_SIDE:
        raise DataError(
            f"{path}: JPEG allows at most {_JPEG_LONGEST_SIDE} pixels a side, not {width}x{height}",
            "shrink the image",
        )
    # The UP filter is a sixth smaller than OpenCV's default, and as fast.
    options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP, cv2.IMWRITE_PNG_COMPRESSION, 1]
    if is_jpeg:
        options = [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]
    elif pixels.ndim == 2 and pixels.dtype == np.uint8:
        # Masks are flat: without a filter they are no larger and decode four times as fast.
        options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
        options += [cv2.IMWRITE_PNG_COMPRESSION, 1]
    encoded, buffer = cv2.imencode(suffix, pixels, options)
    if not encoded:
        raise ValueError(f"cv2 cannot encode {path}")
    return buffer.tobytes()


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return height and width after scaling the shorter side to `short_side`, keeping the aspect.

    Very long strips are scaled down further: the result has at most eight times the pixels of the
    square, so that a panorama does not need more memory than planned for the network.
    """
    scale = short_side / min(height, width)
    scale = min(scale, (8 * short_side**2 / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_short_side(image: Image, short_side: int) -> Image:
    """Resize H W 3 to `scaled_size`, without aliasing."""
    height, width = scaled_size(image.shape[0], image.shape[1], short_side)
    if (height, width) == image.shape[:2]:
        return image
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return np.asarray(resized, dtype=np.uint8)


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Resize H W 3 to `size` (height, width), five times as fast as without any aliasing."""
    if size == image.shape[:2]:
        return image
    # Down to a half, linear interpolation still reads every pixel.
    interpolation = cv2.INTER_AREA if 2 * size[0] < image.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size[::-1], interpolation=interpolation), dtype=np.uint8)


def find_images(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder` with an image's extension, sorted, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path

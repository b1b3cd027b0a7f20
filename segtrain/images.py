"""The only place that reads or writes a user's picture.

Pictures come from strangers: they are decoded by content, not by extension, limited in size before
the memory is taken, and everything a decoder can raise becomes one DataError that names the file.
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
from PIL import Image, UnidentifiedImageError

from segtrain.errors import DataError
from segtrain.files import write_bytes
from segtrain.rgb import orientation_of, rgb_of, turned_upright

Pixels = npt.NDArray[np.uint8]
DeepPixels = npt.NDArray[np.uint16]

MAX_PIXELS = 100_000_000
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".mpo"}
)
# Pillow knows more, among them PostScript, for which it starts an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
_JPEG_LONGEST_SIDE = 65_500
_JPEG_END, _JPEG_TAIL = b"\xff\xd9", 2**16
_REDUCED = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PILLOW = r"PIL\."
# As it stands in Python's list of filters.
_PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(_PILLOW), 0)
_HIDING = threading.Lock()
# An MPO's other pictures are previews, depths or gain maps of the first: nobody misses them.
_SEVERAL = {
    "TIFF": "has several pages; the first is taken",
    **dict.fromkeys(("GIF", "WEBP", "PNG", "AVIF"), "is animated; its first frame is taken"),
}


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    pixels: H W 3 uint8 RGB. size: height and width of the whole picture, which may have been
    decoded smaller. note: what is left out of the file, as "is animated; ...", else None.
    """

    pixels: Pixels
    size: tuple[int, int]
    note: str | None


def read_image(path: Path, *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a picture to H W 3 uint8 RGB.

    Transparent pixels are laid on white, 16-bit samples scaled to 8, and of an animation the first
    frame is taken.

    Args:
        path: JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF, whatever its extension says.
        upright: turn the picture as its EXIF orientation says. Annotated data sets such as COCO
            mean the stored pixels and need False.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        DataError: the file is missing, no picture, damaged, cut short or too large.
    """
    return read_sized_image(path, upright=upright, max_pixels=max_pixels)[0]


def read_sized_image(
    path: Path,
    *,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
) -> tuple[Pixels, tuple[int, int]]:
    """As `read_image`; a large JPEG may come out smaller, at a fraction of the time.

    Args:
        short_side: what is needed; a JPEG at least two, four or eight times as large is decoded at
            a half, a quarter or an eighth.

    Returns:
        The pixels, and height and width of the whole picture.
    """
    picture = read_picture(path, upright=upright, max_pixels=max_pixels, short_side=short_side)
    return picture.pixels, picture.size


def read_picture(
    path: Path,
    *,
    content: bytes | None = None,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
) -> Picture:
    """As `read_sized_image`, and told where the file holds more than one picture.

    Memory beside the pixels, in bytes a pixel: 3 for a JPEG as most are, for OpenCV hands over a
    copy, up to 6 for a progressive one; 4 for every other format.

    Args:
        content: the bytes of a picture that is no file; `path` is then only its name.
    """
    with decoding(path, max_pixels, in_memory=content is not None):
        pixels, size, orientation, note = _decode(path, content, max_pixels, short_side)
        if upright:
            pixels = turned_upright(pixels, orientation)
            size = size[::-1] if orientation >= 5 else size
        return Picture(pixels, size, note)


def pixels_in(path: Path, max_pixels: int = MAX_PIXELS) -> int:
    """How many pixels a picture will have, by its first bytes; 0 where these are no picture's.

    Args:
        max_pixels: as in `read_image`; of a picture far above, which is refused, it is 0, too.
    """
    with (
        suppress(DataError),
        decoding(path, max_pixels),
        Image.open(path, formats=FORMATS) as picture,
    ):
        return picture.width * picture.height
    return 0


def _decode(
    path: Path, content: bytes | None, max_pixels: int, short_side: int | None
) -> tuple[Pixels, tuple[int, int], int, str | None]:
    """Pixels as stored, their size in the file, the orientation and the note of `Picture`.

    On return Pillow's copy of the picture is gone.
    """
    file = path if content is None else io.BytesIO(content)
    with Image.open(file, formats=FORMATS) as picture:
        _check_size(picture, path, max_pixels)
        note = _several(picture)
        pixels = None
        if is_plain_jpeg(picture, upright=False):
            size = picture.height, picture.width
            pixels = decode_plain_jpeg(path, size, short_side, content)
        if pixels is None:
            picture.load()
            # Pillow turns a TIFF while it loads.
            size = picture.height, picture.width
            pixels = rgb_of(picture)
        return pixels, size, orientation_of(picture), note


def _several(picture: Image.Image) -> str | None:
    """The note of `Picture`. A look at a damaged second frame must not cost the first one."""
    with suppress(Exception):
        if getattr(picture, "is_animated", False):
            return _SEVERAL.get(picture.format or "")
    return None


@contextmanager
def decoding(
    path: Path, max_pixels: int = MAX_PIXELS, *, in_memory: bool = False
) -> Iterator[None]:
    """Within, Pillow may open `path`; whatever it raises becomes a DataError with its name.

    Args:
        in_memory: `path` names bytes that are no file.
    """
    try:
        if not in_memory and not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; give the path of a picture")
        _hide_pillows_warnings()
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
        yield
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"{path} unpacks to far more than {max_pixels / 1e6:.0f} megapixels; shrink it"
        ) from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"cannot decode {path}: {reason}; replace the file") from error


def _hide_pillows_warnings() -> None:
    """Pillow warns about odd metadata and large files; both are dealt with here.

    They stay hidden in this process. Python's filters are common to all threads: one that puts back
    what it had found, as `warnings.catch_warnings` does, takes the filter away from another that is
    still decoding, or brings it back for everything when all are done.
    """
    with _HIDING:
        if _PILLOWS_WARNINGS not in warnings.filters[:1]:
            warnings.filterwarnings("ignore", module=_PILLOW)


def _check_size(picture: Image.Image, path: Path, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise DataError(
            f"{path} has {width * height / 1e6:.0f} megapixels, the limit is "
            f"{max_pixels / 1e6:.0f}; shrink it or raise the limit"
        )


def is_plain_jpeg(picture: Image.Image, *, upright: bool) -> bool:
    """Whether `decode_plain_jpeg` can take an opened picture: what nearly all photos are."""
    if picture.format != "JPEG" or picture.mode not in {"RGB", "L"}:
        return False
    return not upright or orientation_of(picture) == 1


def decode_plain_jpeg(
    path: Path, size: tuple[int, int], short_side: int | None, content: bytes | None = None
) -> Pixels | None:
    """Decode by OpenCV: a third faster, and smaller where that is enough.

    OpenCV fills up a JPEG that was cut short without a word, so one without its end marker is left
    to `read_image`, which tells.

    Args:
        size: height and width that the picture is known to have.
        short_side: as in `read_sized_image`.
        content: the bytes, where `path` is no file.

    Returns:
        H W 3 uint8 RGB as stored, or None where the file is not what it is said to be.
    """
    try:
        coded = np.fromfile(path, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    except OSError:
        return None
    if _JPEG_END not in coded[-_JPEG_TAIL:].tobytes():
        return None
    smaller = 1
    while short_side is not None and smaller < 8 and min(size) >= 2 * smaller * short_side:
        smaller *= 2
    # Half, a quarter and an eighth have no flag for RGB.
    reduced = _REDUCED.get(smaller, cv2.IMREAD_COLOR_RGB)
    pixels = cv2.imdecode(coded, reduced | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.shape[:2] != (-(-size[0] // smaller), -(-size[1] // smaller)):
        return None
    if smaller > 1:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return np.asarray(pixels, dtype=np.uint8)


def write_image(path: Path, pixels: Pixels | DeepPixels, *, jpeg_quality: int = 92) -> None:
    """Encode as `encode_image` does and write atomically.

    Raises:
        ResourceError: the folder cannot be made or written, or the disk is full.
        DataError: the picture is too long or wide for JPEG.
    """
    write_bytes(path, encode_image(pixels, path, jpeg_quality=jpeg_quality))


def encode_image(pixels: Pixels | DeepPixels, path: Path, *, jpeg_quality: int = 92) -> bytes:
    """Encode H W (gray), H W 3 (RGB) or H W 4 (RGBA) by the suffix of `path`: .png, .jpg.

    Args:
        pixels: uint8; gray as PNG also uint16.

    Raises:
        DataError: the picture is too long or wide for JPEG.
    """
    conversion = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    if pixels.ndim == 3:
        pixels = np.asarray(cv2.cvtColor(pixels, conversion[pixels.shape[2]]), dtype=np.uint8)
    height, width = pixels.shape[:2]
    suffix = path.suffix.lower()
    is_jpeg = suffix in {".jpg", ".jpeg"}
    if is_jpeg and max(height, width) > _JPEG_LONGEST_SIDE:
        raise DataError(
            f"{path} would be {width}x{height} and JPEG ends at {_JPEG_LONGEST_SIDE} a side; "
            "shrink the picture"
        )
    # Each row as what changed since the one above: a sixth smaller than cv2's own way, no slower.
    options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP, cv2.IMWRITE_PNG_COMPRESSION, 1]
    if is_jpeg:
        options = [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]
    elif pixels.ndim == 2 and pixels.dtype == np.uint8:
        # Masks are flat: unfiltered they are no larger and decode four times as fast.
        options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
        options += [cv2.IMWRITE_PNG_COMPRESSION, 1]
    encoded, buffer = cv2.imencode(suffix, pixels, options)
    if not encoded:
        raise ValueError(f"cv2 cannot encode {path}")
    return buffer.tobytes()


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of a picture whose shorter side becomes `short_side`, keeping the aspect.

    Very long strips are scaled less, so that the result has at most eight times the pixels of the
    square: a panorama must not take more memory than the network was planned for.
    """
    scale = short_side / min(height, width)
    scale = min(scale, (8 * short_side**2 / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_short_side(image: Pixels, short_side: int) -> Pixels:
    """Scale H W 3 as `scaled_size` says, without aliasing."""
    height, width = scaled_size(image.shape[0], image.shape[1], short_side)
    if (height, width) == image.shape[:2]:
        return image
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return np.asarray(resized, dtype=np.uint8)


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Scale H W 3 to `size` (height, width), five times as fast as without any aliasing."""
    if size == image.shape[:2]:
        return image
    # Down to a half, linear interpolation still looks at every pixel.
    interpolation = cv2.INTER_AREA if 2 * size[0] < image.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size[::-1], interpolation=interpolation), dtype=np.uint8)


def find_images(folder: Path) -> Iterator[Path]:
    """Every file below `folder` with a picture's extension, sorted; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path

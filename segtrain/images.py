"""The only place that reads or writes a user's picture.

Pictures come from strangers: they are decoded by content, not by extension, limited in size before
the memory is taken, and everything a decoder can raise becomes one DataError that names the file.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from segtrain.errors import DataError
from segtrain.files import write_bytes

Pixels = npt.NDArray[np.uint8]

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
_WHITE = (255, 255, 255, 255)


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
    with decoding(path, max_pixels):
        with Image.open(path, formats=FORMATS) as picture:
            _check_size(picture, path, max_pixels)
            size = picture.height, picture.width
            pixels = None
            if is_plain_jpeg(picture, upright=upright):
                pixels = decode_plain_jpeg(path, size, short_side)
            if pixels is None:
                picture.load()
                # Pillow's stubs type exif_transpose by what it was given: never None here.
                pixels = _to_rgb(ImageOps.exif_transpose(picture) if upright else picture)
                size = pixels.shape[0], pixels.shape[1]
        return pixels, size


@contextmanager
def decoding(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Within, Pillow may open `path`; whatever it raises becomes a DataError with its name."""
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; give the path of a picture")
        with warnings.catch_warnings():
            # Pillow warns about odd metadata and large files; both are dealt with here.
            warnings.simplefilter("ignore")
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
    return not upright or picture.getexif().get(ExifTags.Base.Orientation, 1) == 1


def decode_plain_jpeg(path: Path, size: tuple[int, int], short_side: int | None) -> Pixels | None:
    """Decode by OpenCV: a third faster, and smaller where that is enough.

    OpenCV fills up a JPEG that was cut short without a word, so one without its end marker is left
    to `read_image`, which tells.

    Args:
        size: height and width that the picture is known to have.
        short_side: as in `read_sized_image`.

    Returns:
        H W 3 uint8 RGB, or None where the file is not what it is said to be.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError:
        return None
    if _JPEG_END not in content[-_JPEG_TAIL:].tobytes():
        return None
    smaller = 1
    while short_side is not None and smaller < 8 and min(size) >= 2 * smaller * short_side:
        smaller *= 2
    # Half, a quarter and an eighth have no flag for RGB.
    reduced = _REDUCED.get(smaller, cv2.IMREAD_COLOR_RGB)
    pixels = cv2.imdecode(content, reduced | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.shape[:2] != (-(-size[0] // smaller), -(-size[1] // smaller)):
        return None
    if smaller > 1:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return np.asarray(pixels, dtype=np.uint8)


def write_image(path: Path, pixels: Pixels, *, jpeg_quality: int = 92) -> None:
    """Encode as `encode_image` does and write atomically.

    Raises:
        ResourceError: the folder cannot be made or written, or the disk is full.
        DataError: the picture is too long or wide for JPEG.
    """
    write_bytes(path, encode_image(pixels, path, jpeg_quality=jpeg_quality))


def encode_image(pixels: Pixels, path: Path, *, jpeg_quality: int = 92) -> bytes:
    """Encode H W (gray), H W 3 (RGB) or H W 4 (RGBA) uint8 by the suffix of `path`: .png or .jpg.

    Raises:
        DataError: the picture is too long or wide for JPEG.
    """
    conversion = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    if pixels.ndim == 3:
        pixels = np.asarray(cv2.cvtColor(pixels, conversion[pixels.shape[2]]), dtype=np.uint8)
    height, width = pixels.shape[:2]
    if path.suffix == ".jpg" and max(height, width) > _JPEG_LONGEST_SIDE:
        raise DataError(
            f"{path} would be {width}x{height} and JPEG ends at {_JPEG_LONGEST_SIDE} a side; "
            "shrink the picture"
        )
    options = []
    if path.suffix == ".jpg":
        options = [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]
    elif pixels.ndim == 2:
        # Masks are flat: unfiltered they are no larger and decode four times as fast.
        options = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
        options += [cv2.IMWRITE_PNG_COMPRESSION, 1]
    encoded, buffer = cv2.imencode(path.suffix, pixels, options)
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


def _to_rgb(picture: Image.Image) -> Pixels:
    if picture.mode in {"I", "F"} or picture.mode.startswith("I;16"):
        picture = _to_8_bit(picture)
    if picture.has_transparency_data:
        layered = Image.new("RGBA", picture.size, _WHITE)
        layered.alpha_composite(picture.convert("RGBA"))
        picture = layered
    if picture.mode != "RGB":  # convert() would copy even where there is nothing to do
        picture = picture.convert("RGB")
    return np.array(picture, dtype=np.uint8)


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or float: convert('RGB') would clip at 255 instead of scaling."""
    samples = np.nan_to_num(np.asarray(picture, dtype=np.float32), posinf=0.0, neginf=0.0)
    largest = float(samples.max(initial=0.0))
    if picture.mode == "F":
        factor = 255.0 if largest <= 1.0 else 1.0
    else:
        factor = 1.0 if largest <= 255.0 and picture.mode == "I" else 255.0 / 65535.0
    return Image.fromarray(np.clip(np.rint(samples * factor), 0, 255).astype(np.uint8))

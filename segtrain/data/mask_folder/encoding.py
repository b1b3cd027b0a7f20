"""Decode mask files of any kind, and detect what their values mean.

A person may be stored as 1 or 255, an instance number, a color, or an alpha channel, and 255 means
person in one dataset and ignore in another. A single file is ambiguous. So statistics are collected
from all files of a dataset first, and only then the values are interpreted.
"""

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from segtrain.data.sample import LabelRules
from segtrain.imaging.images import FORMATS, MAX_PIXELS, map_decode_errors
from segtrain.types import BACKGROUND, IGNORE, PERSON, Image, Mask

# Increase this when decoding or the statistics change, which invalidates cached results.
MASK_STATS_VERSION = 2

_PNG_START, _GRAY_8_BIT = b"\x89PNG\r\n\x1a\n", b"\x08\x00"
# Instance numbers are few and small; soft edges have many gray levels.
_MAX_INSTANCES = 32
_MAX_COLORS = 64
# Gray levels closer than this are edges or noise and not two people.
_MIN_LEVEL_DISTANCE = 16
# Gray saved as a color JPEG is not exactly gray.
_GRAY_TOLERANCE = 8
# Smaller components do not count as people; fraction of the image.
_MIN_PERSON_FRACTION = 0.001

Labels = npt.NDArray[np.int32]
"""H W: a positive number for each instance, 0 elsewhere."""


class MaskKind(IntEnum):
    """What a mask file contains; LOSSY is gray from a JPEG, whose levels are not exact."""

    GRAY = 0
    ALPHA = 1
    COLOR = 2
    PHOTO = 3
    LOSSY = 4


class MaskFile(NamedTuple):
    """A decoded mask file.

    levels: H W uint8; for a color mask, 0 where it is black and 255 elsewhere.
    colors: for a color mask, H W int32 with a number for each color, 0 for black; else None.
    """

    kind: MaskKind
    levels: Mask
    colors: Labels | None = None


def load_mask(path: Path) -> MaskFile:
    """Decode a mask of any bit depth.

    Raises:
        DataError: the file is missing, not an image, damaged, truncated or too large.
    """
    levels = _decode_gray_png(path)
    if levels is not None:
        return MaskFile(MaskKind.GRAY, levels)
    with map_decode_errors(path), PIL.Image.open(path, formats=FORMATS) as image:
        lossy = image.format == "JPEG"
        if image.format == "PNG" and not _is_intact_png(path.read_bytes()):
            raise ValueError("it is truncated or its checksums do not match")
        image.load()
        mask = _mask_from_image(image)
    return mask._replace(kind=MaskKind.LOSSY) if lossy and mask.kind == MaskKind.GRAY else mask


def _decode_gray_png(path: Path) -> Mask | None:
    """Decode the most common format by OpenCV, twice as fast; None if other or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG_START) or content[24:26] != _GRAY_8_BIT:
        return None
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    if width * height > MAX_PIXELS or not _is_intact_png(content):
        return None
    levels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
    return None if levels is None else np.asarray(levels, dtype=np.uint8)


def _is_intact_png(content: bytes) -> bool:
    """Whether all chunks are present and match their checksums.

    Pillow does not verify the checksums of the pixel data. It would silently return a mask with any
    number of wrong pixels.
    """
    at, kind = len(_PNG_START), b""
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        if end + 4 > len(content):
            return False
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return False
        at = end + 4
    return True


def _mask_from_image(image: PIL.Image.Image) -> MaskFile:
    if image.mode in {"LA", "RGBA", "PA"}:
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() != alpha.max():
            return MaskFile(MaskKind.ALPHA, alpha)
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    if image.mode == "P":
        return MaskFile(MaskKind.GRAY, _palette_levels(image))
    if image.mode in {"1", "L"}:
        return MaskFile(MaskKind.GRAY, np.asarray(image.convert("L")))
    if image.mode == "F" or image.mode.startswith("I"):
        return MaskFile(MaskKind.GRAY, _deep_levels(np.asarray(image, dtype=np.float64)))
    return _mask_from_colors(np.asarray(image.convert("RGB")))


def _palette_levels(image: PIL.Image.Image) -> Mask:
    """Return the indices as instance numbers, or the gray levels of an all-gray palette."""
    indices = np.asarray(image)
    palette = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    used = np.unique(indices)
    if len(palette) <= used.max() or np.ptp(palette[used].astype(int), axis=1).any():
        return indices
    grays = np.zeros(256, dtype=np.uint8)
    grays[: len(palette)] = palette[:, 0]
    if len(np.unique(grays[used])) < len(used):
        return indices  # the palette was never filled in
    return np.asarray(grays[indices])


def _deep_levels(values: npt.NDArray[np.float64]) -> Mask:
    """Reduce more than 8 bits: instance numbers are kept or renumbered; full range is scaled."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0).clip(0)
    largest = values.max(initial=0)
    if largest > 255 and largest != 65535:
        distinct = np.union1d(values, 0)
        if 2 < len(distinct) <= _MAX_INSTANCES:
            return np.searchsorted(distinct, values).astype(np.uint8)
    if largest > 255:
        values = values / 257 if largest <= 65535 else values * (255 / largest)
    elif largest <= 1 and (values % 1).any():
        values = values * 255
    return np.rint(values).astype(np.uint8)


def _mask_from_colors(rgb: Image) -> MaskFile:
    spread = rgb.max(axis=2).astype(np.int16) - rgb.min(axis=2)
    if spread.max(initial=0) <= _GRAY_TOLERANCE:
        return MaskFile(MaskKind.GRAY, rgb.max(axis=2))
    colors = rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    subset = colors.ravel()[:: max(1, colors.size // 10_000)]
    kind = MaskKind.PHOTO if len(np.unique(subset)) > _MAX_COLORS else MaskKind.COLOR
    return MaskFile(kind, np.where(colors > 0, 255, 0).astype(np.uint8), colors)


@dataclass(frozen=True)
class MaskStats:
    """Statistics of a mask whose values are not yet interpreted.

    present: 256 bool, the levels that occur.
    extremes: fraction of pixels that are black or white, or nearly so.
    border, middle: fraction of bright pixels along the frame and in its middle half.
    """

    kind: MaskKind
    present: npt.NDArray[np.bool_]
    extremes: float
    border: float
    middle: float


def mask_stats(mask: MaskFile) -> MaskStats:
    """Compute the statistics of a mask."""
    levels = mask.levels
    counts = np.bincount(levels.ravel(), minlength=256)
    height, width = levels.shape
    bright = levels > levels.max() / 2
    edges = (bright[0], bright[-1], bright[:, 0], bright[:, -1])
    inner = bright[height // 4 : height - height // 4, width // 4 : width - width // 4]
    num_extreme = counts[:_MIN_LEVEL_DISTANCE].sum() + counts[-_MIN_LEVEL_DISTANCE:].sum()
    return MaskStats(
        kind=mask.kind,
        present=counts > 0,
        extremes=float(num_extreme / levels.size),
        border=float(np.concatenate(edges).mean()),
        middle=float(inner.mean()) if inner.size else float(bright.mean()),
    )


class EncodingKind(IntEnum):
    """What the values of one mask file mean, as far as the file alone determines it."""

    EMPTY = 0
    ZERO_ONE = 1
    BLACK_WHITE = 2
    ONE_LEVEL = 3
    INSTANCES = 4
    INSTANCES_AND_VOID = 5
    SOFT = 6
    ALPHA = 7
    COLORS = 8


ENCODING_NAMES = {
    EncodingKind.EMPTY: "empty",
    EncodingKind.ZERO_ONE: "0/1",
    EncodingKind.BLACK_WHITE: "0/255",
    EncodingKind.ONE_LEVEL: "one level",
    EncodingKind.INSTANCES: "numbers",
    EncodingKind.INSTANCES_AND_VOID: "numbers with 255 ignored",
    EncodingKind.SOFT: "soft, person from 128",
    EncodingKind.ALPHA: "alpha, person from 128",
    EncodingKind.COLORS: "colors",
}
_NUMERIC = (
    EncodingKind.ZERO_ONE,
    EncodingKind.ONE_LEVEL,
    EncodingKind.INSTANCES,
    EncodingKind.INSTANCES_AND_VOID,
)


class MaskEncoding(NamedTuple):
    """How to interpret a mask file.

    ignores_255: 255 is ignored and not a person.
    has_instances: levels or colors distinguish people; otherwise connected components do.
    """

    kind: EncodingKind
    ignores_255: bool
    has_instances: bool


def encoding_kind(stats: MaskStats) -> EncodingKind:
    """Classify the values of a file; `detect_encodings` decides what 255 alone means."""
    values = np.flatnonzero(stats.present[1:]) + 1
    if stats.kind == MaskKind.ALPHA:
        return EncodingKind.ALPHA
    if not len(values):
        return EncodingKind.EMPTY
    if stats.kind in {MaskKind.COLOR, MaskKind.PHOTO}:
        return EncodingKind.COLORS
    if len(values) == 1 and values[0] == 1:
        return EncodingKind.ZERO_ONE
    if stats.kind == MaskKind.LOSSY:
        return EncodingKind.SOFT
    if len(values) == 1:
        return EncodingKind.BLACK_WHITE if values[0] == 255 else EncodingKind.ONE_LEVEL
    if values[-1] == 255 and values[-2] <= _MAX_INSTANCES:
        return EncodingKind.INSTANCES_AND_VOID
    return EncodingKind.INSTANCES if _are_instances(values, stats.extremes) else EncodingKind.SOFT


def _are_instances(values: npt.NDArray[np.intp], extremes: float) -> bool:
    """Whether two or more ascending levels are people rather than shades of one mask."""
    if values[-1] < 128 and (len(values) <= _MAX_INSTANCES or values[-1] == len(values)):
        return True  # as shades, all of them would be background
    if len(values) > _MAX_INSTANCES:
        return False
    has_thin_edges = values[-1] == 255 and extremes > 0.9
    return bool(np.diff(values, prepend=0).min() >= _MIN_LEVEL_DISTANCE) and not has_thin_edges


def detect_encodings(all_stats: list[MaskStats]) -> list[MaskEncoding]:
    """Determine the encoding of each file from the statistics of all files of a dataset."""
    kinds = [encoding_kind(stats) for stats in all_stats]
    counts = Counter(kinds)
    white_is_void = _is_white_void(counts)
    # If some files have several numbers, these are instances, also in files with a single number.
    num_several = counts[EncodingKind.INSTANCES] + sum(
        kind == EncodingKind.INSTANCES_AND_VOID and stats.present[1:255].sum() > 1
        for kind, stats in zip(kinds, all_stats, strict=True)
    )
    num_numeric = sum(counts[kind] for kind in _NUMERIC)
    numbers_are_instances = num_several > 0 and 100 * num_several >= num_numeric
    encodings = {
        kind: MaskEncoding(
            kind,
            ignores_255=kind == EncodingKind.INSTANCES_AND_VOID
            or (kind == EncodingKind.BLACK_WHITE and white_is_void),
            has_instances=kind == EncodingKind.COLORS
            or (kind in _NUMERIC and numbers_are_instances),
        )
        for kind in EncodingKind
    }
    return [encodings[kind] for kind in kinds]


def _is_white_void(counts: Counter[EncodingKind]) -> bool:
    """Whether 255 is void also in files that contain only 0 and 255.

    This is so in VOC, where most files with instance numbers have void. But a few stray files with
    void must not turn the people of all other files into void.
    """
    void, white = counts[EncodingKind.INSTANCES_AND_VOID], counts[EncodingKind.BLACK_WHITE]
    plain = (
        counts[EncodingKind.ZERO_ONE]
        + counts[EncodingKind.ONE_LEVEL]
        + counts[EncodingKind.INSTANCES]
    )
    return white <= void or (plain <= void and white <= 10 * void)


def are_mixed(encodings: Iterable[MaskEncoding]) -> bool:
    """Whether a person is a small number in some files and white in others."""
    kinds = {
        encoding.kind
        for encoding in encodings
        if not (encoding.kind == EncodingKind.BLACK_WHITE and encoding.ignores_255)
    }
    small = {EncodingKind.ZERO_ONE, EncodingKind.INSTANCES, EncodingKind.INSTANCES_AND_VOID}
    return bool(kinds & small) and bool(kinds & {EncodingKind.BLACK_WHITE, EncodingKind.SOFT})


def are_gray_photos(all_stats: list[MaskStats]) -> bool:
    """Whether most masks are gray photos: most of their pixels are neither black nor white."""
    gray = [
        encoding_kind(stats) == EncodingKind.SOFT and stats.extremes < 0.25 for stats in all_stats
    ]
    return 2 * sum(gray) > len(gray)


def lookup_table(encoding: MaskEncoding, *, invert: bool) -> Mask:
    """Map levels to BACKGROUND, PERSON or IGNORE: 256 uint8."""
    table = np.zeros(256, dtype=np.uint8)
    first = 128 if encoding.kind in {EncodingKind.SOFT, EncodingKind.ALPHA} else 1
    table[first:] = PERSON
    if encoding.ignores_255:
        table[255] = IGNORE
    return invert_table(table) if invert else table


def invert_table(table: Mask) -> Mask:
    """Swap person and background; ignore stays."""
    inverted = table.copy()
    inverted[table == PERSON], inverted[table == BACKGROUND] = BACKGROUND, PERSON
    return inverted


def label_instances(mask: MaskFile, table: Mask, *, has_instances: bool) -> Labels:
    """Label each person; some numbers may be unused.

    Levels and colors distinguish people if `has_instances`. Otherwise people are connected
    components, without specks unless there is nothing else.
    """
    is_person = np.asarray(cv2.LUT(mask.levels, table)) == PERSON
    if has_instances and mask.colors is not None:
        _, numbers = np.unique(mask.colors, return_inverse=True)
        return np.where(is_person, numbers.reshape(is_person.shape) + 1, 0).astype(np.int32)
    if has_instances:
        return np.where(is_person, mask.levels.astype(np.int32) + 1, 0)
    _, labels = cv2.connectedComponents(is_person.view(np.uint8))
    # OpenCV's own component statistics take three times as long.
    is_large = np.bincount(labels.ravel()) >= _MIN_PERSON_FRACTION * is_person.size
    if not is_large[1:].any():
        return np.asarray(labels > 0, dtype=np.int32)
    numbers = np.where(is_large, np.arange(len(is_large), dtype=np.int32), 0)
    return np.asarray(numbers.take(labels), dtype=np.int32)


def count_people(people: Labels) -> int:
    """Count the distinct people in the labels."""
    return int(np.count_nonzero(np.bincount(people.ravel())[1:]))


def apply_label_rules(mask: Mask, people: Labels, rules: LabelRules) -> Mask:
    """Mark the people that the rules exclude as ignored; `mask` is modified and returned."""
    areas = np.bincount(people.ravel())
    areas[0] = 0
    is_kept = areas >= rules.min_person_area * mask.size
    if rules.largest_only:
        is_kept &= np.arange(len(areas)) == areas.argmax()
    mask[(mask == PERSON) & ~is_kept.take(people)] = IGNORE
    return mask

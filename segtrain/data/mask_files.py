"""Mask files of all kinds, and what their values mean.

The same person may be drawn in 1 or 255, as a number, a colour or an alpha channel, and 255 means
person in one data set and ignore in another. A file alone cannot tell, so facts are gathered from
all files of a data set first, and only then a value gets its meaning.
"""

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.data.sample import LabelRules
from segtrain.images import FORMATS, MAX_PIXELS, decoding

Mask = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]

_PNG_START, _GRAY_OF_8_BITS = b"\x89PNG\r\n\x1a\n", b"\x08\x00"
# Numbers of people are few and small, soft edges run through many grays.
_MOST_NUMBERS = 32
_MOST_COLOURS = 64
# Gray saved as colour JPEG is not quite gray.
_GRAY_TOLERANCE = 8
# Specks do not count as people.
_SMALLEST_PERSON = 0.001


class Kind(IntEnum):
    """What a mask file holds."""

    GRAY = 0
    ALPHA = 1
    COLOUR = 2
    PHOTO = 3


class MaskFile(NamedTuple):
    """A decoded mask.

    levels: H W uint8; of a colour mask 0 where it is black and 255 elsewhere.
    colours: of a colour mask H W int32, a number for each colour, 0 black; else None.
    """

    kind: Kind
    levels: Mask
    colours: Labels | None = None


def load_mask(path: Path) -> MaskFile:
    """Decode a mask of any depth.

    Raises:
        DataError: the file is missing, no picture, damaged, cut short or too large.
    """
    levels = _decode_gray_png(path)
    if levels is not None:
        return MaskFile(Kind.GRAY, levels)
    with decoding(path), Image.open(path, formats=FORMATS) as picture:
        picture.load()
        return _understood(picture)


def _decode_gray_png(path: Path) -> Mask | None:
    """What most masks are, by OpenCV: twice as fast. None for anything else.

    OpenCV gives nothing at all for a PNG that is cut short or damaged; Pillow then says why.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError:
        return None
    header = content[:26].tobytes()
    if header[:8] != _PNG_START or header[24:] != _GRAY_OF_8_BITS:
        return None
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    if width * height > MAX_PIXELS:
        return None
    levels = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)
    return None if levels is None else np.asarray(levels, dtype=np.uint8)


def _understood(picture: Image.Image) -> MaskFile:
    if picture.mode in {"LA", "RGBA", "PA"}:
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() != alpha.max():
            return MaskFile(Kind.ALPHA, alpha)
        picture = picture.convert("RGB" if picture.mode == "RGBA" else "L")
    if picture.mode == "P":
        return MaskFile(Kind.GRAY, _palette_levels(picture))
    if picture.mode in {"1", "L"}:
        return MaskFile(Kind.GRAY, np.asarray(picture.convert("L")))
    if picture.mode == "F" or picture.mode.startswith("I"):
        return MaskFile(Kind.GRAY, _deep_levels(np.asarray(picture, dtype=np.float64)))
    return _of_colours(np.asarray(picture.convert("RGB")))


def _palette_levels(picture: Image.Image) -> Mask:
    """The index is the number of a person, unless the palette is but a list of grays."""
    indices = np.asarray(picture)
    palette = np.array(picture.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    used = np.unique(indices)
    if len(palette) <= used.max() or np.ptp(palette[used].astype(int), axis=1).any():
        return indices
    grays = np.zeros(256, dtype=np.uint8)
    grays[: len(palette)] = palette[:, 0]
    return np.asarray(grays[indices])


def _deep_levels(values: npt.NDArray[np.float64]) -> Mask:
    """Of more than 8 bits: numbers stay, full range is scaled down."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0).clip(0)
    largest = values.max(initial=0)
    if largest > 255:
        values = values / 257 if largest <= 65535 else values * (255 / largest)
    elif largest <= 1 and (values % 1).any():
        values = values * 255
    return np.rint(values).astype(np.uint8)


def _of_colours(rgb: Mask) -> MaskFile:
    spread = rgb.max(axis=2).astype(np.int16) - rgb.min(axis=2)
    if spread.max(initial=0) <= _GRAY_TOLERANCE:
        return MaskFile(Kind.GRAY, np.ascontiguousarray(rgb[..., 0]))
    colours = rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    some = colours.ravel()[:: max(1, colours.size // 10_000)]
    kind = Kind.PHOTO if len(np.unique(some)) > _MOST_COLOURS else Kind.COLOUR
    return MaskFile(kind, np.where(colours > 0, 255, 0).astype(np.uint8), colours)


@dataclass(frozen=True)
class Facts:
    """What is known of one mask before its values have a meaning.

    present: 256 bool, the levels that occur.
    extremes: share of pixels that are 0 or 255.
    border, middle: share of bright pixels around the frame and in its middle half.
    """

    kind: Kind
    present: npt.NDArray[np.bool_]
    extremes: float
    border: float
    middle: float


def facts_of(mask: MaskFile) -> Facts:
    """Look at a mask without deciding."""
    levels = mask.levels
    counts = np.bincount(levels.ravel(), minlength=256)
    height, width = levels.shape
    bright = levels > levels.max() / 2
    edges = (bright[0], bright[-1], bright[:, 0], bright[:, -1])
    inner = bright[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return Facts(
        kind=mask.kind,
        present=counts > 0,
        extremes=float(counts[[0, 255]].sum() / levels.size),
        border=float(np.concatenate(edges).mean()),
        middle=float(inner.mean()) if inner.size else float(bright.mean()),
    )


class Coding(IntEnum):
    """What the values of one mask file mean."""

    ZERO_ONE = 0
    TWO_LEVELS = 1
    NUMBERS = 2
    SOFT = 3


CODING_NAMES = {
    Coding.ZERO_ONE: "0/1",
    Coding.TWO_LEVELS: "0/255",
    Coding.NUMBERS: "numbers of people",
    Coding.SOFT: "soft, person from 128",
}


def coding_of(facts: Facts) -> Coding:
    """The meaning of a file's values as far as the file itself tells; 255 may still be ignore."""
    values = set(np.flatnonzero(facts.present).tolist()) - {0}
    if facts.kind == Kind.ALPHA:
        return Coding.SOFT
    if values <= {1}:
        return Coding.ZERO_ONE
    if len(values) == 1:
        return Coding.TWO_LEVELS
    if len(values) > _MOST_NUMBERS or (255 in values and _has_soft_edges(facts, values)):
        return Coding.SOFT
    return Coding.NUMBERS


def _has_soft_edges(facts: Facts, values: set[int]) -> bool:
    """Nearly all is black or white, and the grays between are more than 1, 2, 3 ..."""
    return facts.extremes > 0.9 and max(values - {255}) > _MOST_NUMBERS


def ignores_255(all_facts: list[Facts]) -> bool:
    """Whether some file has 255 beside the numbers of people: then it means ignore in all."""
    return any(
        coding_of(facts) == Coding.NUMBERS and facts.present[255] and facts.kind == Kind.GRAY
        for facts in all_facts
    )


def meaning(
    coding: Coding, present: npt.NDArray[np.bool_], *, ignore_255: bool, invert: bool
) -> Mask:
    """Table of 256 from a level to BACKGROUND, PERSON or IGNORE.

    Args:
        present: the levels that occur in the file.
    """
    table = np.zeros(256, dtype=np.uint8)
    if coding == Coding.SOFT:
        table[128:] = PERSON
    else:
        table[1:] = PERSON
        void_only = coding == Coding.TWO_LEVELS and present[255]
        if ignore_255 and (coding == Coding.NUMBERS or void_only):
            table[255] = IGNORE
    return inverted(table) if invert else table


def inverted(table: Mask) -> Mask:
    """Person and background exchanged, ignore left alone."""
    exchanged = table.copy()
    exchanged[table == PERSON], exchanged[table == BACKGROUND] = BACKGROUND, PERSON
    return exchanged


def people_in(mask: MaskFile, coding: Coding, table: Mask) -> Labels:
    """H W int32: a number for each person, 0 where there is none.

    Numbers and colours tell people apart; elsewhere what hangs together is one, and specks are
    left out unless there is nothing else.
    """
    meant = cv2.LUT(mask.levels, table)
    if mask.colours is not None or coding == Coding.NUMBERS:
        numbers = mask.levels if mask.colours is None else mask.colours
        _, labels = np.unique(np.where(meant == PERSON, numbers, 0), return_inverse=True)
        # Where no pixel is 0 everybody is one place too low.
        return (labels.reshape(meant.shape) + (0 if (meant != PERSON).any() else 1)).astype(
            np.int32
        )
    count, labels, stats, _ = cv2.connectedComponentsWithStats((meant == PERSON).astype(np.uint8))
    large = stats[:, cv2.CC_STAT_AREA] >= _SMALLEST_PERSON * meant.size
    large[0] = False
    if not large.any():
        return np.asarray(labels > 0, dtype=np.int32)
    new_numbers = np.where(large, np.cumsum(large), 0)
    del count
    return new_numbers[labels].astype(np.int32)


def obey(meant: Mask, people: Labels, rules: LabelRules) -> Mask:
    """The mask with the people that the rules leave out marked as ignored; `meant` is changed."""
    areas = np.bincount(people.ravel())
    areas[0] = 0
    wanted = areas >= rules.min_person_area * meant.size
    if rules.largest_only:
        wanted &= np.arange(len(areas)) == areas.argmax()
    is_person = meant == PERSON
    meant[is_person & ~wanted[people]] = IGNORE
    return meant

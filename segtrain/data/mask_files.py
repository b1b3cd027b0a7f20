"""Mask files of all kinds, and what their values mean.

The same person may be drawn in 1 or 255, as a number, a colour or an alpha channel, and 255 means
person in one data set and ignore in another. A file alone cannot tell, so facts are gathered from
all files of a data set first, and only then a value gets its meaning.
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
from PIL import Image

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.data.sample import LabelRules
from segtrain.images import FORMATS, MAX_PIXELS, decoding

Mask = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]

_PNG_START, _GRAY_OF_8_BITS = b"\x89PNG\r\n\x1a\n", b"\x08\x00"
# Rises whenever a file or the facts of it are understood otherwise than before.
FACTS_VERSION = 2
# Numbers of people are few and small, soft edges run through many grays.
_MOST_NUMBERS = 32
_MOST_COLOURS = 64
# Grays as close as this are edges or noise and no two people.
_NEAR = 16
# Gray saved as colour JPEG is not quite gray.
_GRAY_TOLERANCE = 8
# Specks do not count as people.
_SMALLEST_PERSON = 0.001


class Kind(IntEnum):
    """What a mask file holds; LOSSY is gray from a JPEG, whose levels are not quite exact."""

    GRAY = 0
    ALPHA = 1
    COLOUR = 2
    PHOTO = 3
    LOSSY = 4


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
        lossy = picture.format == "JPEG"
        if picture.format == "PNG" and not _is_whole_png(path.read_bytes()):
            raise ValueError("it is cut short or its checksums do not fit")
        picture.load()
        mask = _understood(picture)
    return mask._replace(kind=Kind.LOSSY) if lossy and mask.kind == Kind.GRAY else mask


def _decode_gray_png(path: Path) -> Mask | None:
    """What most masks are, by OpenCV: twice as fast. None for anything else, and if damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG_START) or content[24:26] != _GRAY_OF_8_BITS:
        return None
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    if width * height > MAX_PIXELS or not _is_whole_png(content):
        return None
    levels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
    return None if levels is None else np.asarray(levels, dtype=np.uint8)


def _is_whole_png(content: bytes) -> bool:
    """Whether all chunks are there and as they were written.

    Pillow does not look at the checksums of the pixels: it would give a mask that is wrong in any
    number of places without a word.
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
    if len(np.unique(grays[used])) < len(used):
        return indices  # a palette that nobody filled in
    return np.asarray(grays[indices])


def _deep_levels(values: npt.NDArray[np.float64]) -> Mask:
    """Of more than 8 bits: numbers stay, or become smaller ones; full range is scaled down."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0).clip(0)
    largest = values.max(initial=0)
    if largest > 255 and largest != 65535:
        different = np.union1d(values, 0)
        if 2 < len(different) <= _MOST_NUMBERS:
            return np.searchsorted(different, values).astype(np.uint8)
    if largest > 255:
        values = values / 257 if largest <= 65535 else values * (255 / largest)
    elif largest <= 1 and (values % 1).any():
        values = values * 255
    return np.rint(values).astype(np.uint8)


def _of_colours(rgb: Mask) -> MaskFile:
    spread = rgb.max(axis=2).astype(np.int16) - rgb.min(axis=2)
    if spread.max(initial=0) <= _GRAY_TOLERANCE:
        return MaskFile(Kind.GRAY, rgb.max(axis=2))
    colours = rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    some = colours.ravel()[:: max(1, colours.size // 10_000)]
    kind = Kind.PHOTO if len(np.unique(some)) > _MOST_COLOURS else Kind.COLOUR
    return MaskFile(kind, np.where(colours > 0, 255, 0).astype(np.uint8), colours)


@dataclass(frozen=True)
class Facts:
    """What is known of one mask before its values have a meaning.

    present: 256 bool, the levels that occur.
    extremes: share of pixels that are black or white, or nearly so.
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
        extremes=float((counts[:_NEAR].sum() + counts[-_NEAR:].sum()) / levels.size),
        border=float(np.concatenate(edges).mean()),
        middle=float(inner.mean()) if inner.size else float(bright.mean()),
    )


class Coding(IntEnum):
    """What the values of one mask file mean, as far as the file itself tells."""

    EMPTY = 0
    ZERO_ONE = 1
    BLACK_WHITE = 2
    ONE_LEVEL = 3
    NUMBERS = 4
    NUMBERS_AND_VOID = 5
    SOFT = 6
    ALPHA = 7
    COLOURS = 8


CODING_NAMES = {
    Coding.EMPTY: "empty",
    Coding.ZERO_ONE: "0/1",
    Coding.BLACK_WHITE: "0/255",
    Coding.ONE_LEVEL: "one level",
    Coding.NUMBERS: "numbers",
    Coding.NUMBERS_AND_VOID: "numbers with 255 ignored",
    Coding.SOFT: "soft, person from 128",
    Coding.ALPHA: "alpha, person from 128",
    Coding.COLOURS: "colours",
}
_BY_NUMBER = (Coding.ZERO_ONE, Coding.ONE_LEVEL, Coding.NUMBERS, Coding.NUMBERS_AND_VOID)


def coding_of(facts: Facts) -> Coding:
    """The meaning of a file's values; what 255 alone means, `read_values` decides."""
    values = np.flatnonzero(facts.present[1:]) + 1
    if facts.kind == Kind.ALPHA:
        return Coding.ALPHA
    if not len(values):
        return Coding.EMPTY
    if facts.kind in {Kind.COLOUR, Kind.PHOTO}:
        return Coding.COLOURS
    if len(values) == 1 and values[0] == 1:
        return Coding.ZERO_ONE
    if facts.kind == Kind.LOSSY:
        return Coding.SOFT
    if len(values) == 1:
        return Coding.BLACK_WHITE if values[0] == 255 else Coding.ONE_LEVEL
    if values[-1] == 255 and values[-2] <= _MOST_NUMBERS:
        return Coding.NUMBERS_AND_VOID
    return Coding.NUMBERS if _are_numbers(values, facts.extremes) else Coding.SOFT


def _are_numbers(values: npt.NDArray[np.intp], extremes: float) -> bool:
    """Whether two or more levels, in order, are people rather than shades of one."""
    if values[-1] < 128 and (len(values) <= _MOST_NUMBERS or values[-1] == len(values)):
        return True  # as shades they would all be background
    if len(values) > _MOST_NUMBERS:
        return False
    thin_edges = values[-1] == 255 and extremes > 0.9
    return bool(np.diff(values, prepend=0).min() >= _NEAR) and not thin_edges


class Reading(NamedTuple):
    """How one mask file is to be read.

    ignores_255: 255 is void and no person.
    numbered: its levels or colours tell people apart; else what hangs together is one.
    """

    coding: Coding
    ignores_255: bool
    numbered: bool


def read_values(all_facts: list[Facts]) -> list[Reading]:
    """The meaning of the values of each file, found out from all files of a data set."""
    codings = [coding_of(facts) for facts in all_facts]
    counts = Counter(codings)
    white_is_void = _white_is_void(counts)
    # Several numbers in a file tell people apart, and then the files with a single one do, too.
    several = counts[Coding.NUMBERS] + sum(
        coding == Coding.NUMBERS_AND_VOID and facts.present[1:255].sum() > 1
        for coding, facts in zip(codings, all_facts, strict=True)
    )
    by_number = several > 0 and 100 * several >= sum(counts[coding] for coding in _BY_NUMBER)
    of_coding = {
        coding: Reading(
            coding,
            ignores_255=coding == Coding.NUMBERS_AND_VOID
            or (coding == Coding.BLACK_WHITE and white_is_void),
            numbered=coding == Coding.COLOURS or (coding in _BY_NUMBER and by_number),
        )
        for coding in Coding
    }
    return [of_coding[coding] for coding in codings]


def are_mixed(readings: Iterable[Reading]) -> bool:
    """Whether a person is a small number in some files and white in others."""
    codings = {
        reading.coding
        for reading in readings
        if not (reading.coding == Coding.BLACK_WHITE and reading.ignores_255)
    }
    small = codings & {Coding.ZERO_ONE, Coding.NUMBERS, Coding.NUMBERS_AND_VOID}
    return bool(small) and bool(codings & {Coding.BLACK_WHITE, Coding.SOFT})


def _white_is_void(counts: Counter[Coding]) -> bool:
    """Whether 255 is void in files that hold nothing else, too.

    So it is in VOC, where most files with numbers have void; but a few stray files with void must
    not turn the people of all the others into it.
    """
    void, white = counts[Coding.NUMBERS_AND_VOID], counts[Coding.BLACK_WHITE]
    plain = counts[Coding.ZERO_ONE] + counts[Coding.ONE_LEVEL] + counts[Coding.NUMBERS]
    return white <= void or (plain <= void and white <= 10 * void)


def are_gray_photos(all_facts: list[Facts]) -> bool:
    """Whether most masks are neither black nor white: photos without colour, and no masks."""
    gray = [coding_of(facts) == Coding.SOFT and facts.extremes < 0.25 for facts in all_facts]
    return 2 * sum(gray) > len(gray)


def meaning(reading: Reading, *, invert: bool) -> Mask:
    """Table of 256 from a level to BACKGROUND, PERSON or IGNORE."""
    table = np.zeros(256, dtype=np.uint8)
    first = 128 if reading.coding in {Coding.SOFT, Coding.ALPHA} else 1
    table[first:] = PERSON
    if reading.ignores_255:
        table[255] = IGNORE
    return inverted(table) if invert else table


def inverted(table: Mask) -> Mask:
    """Person and background exchanged, ignore left alone."""
    exchanged = table.copy()
    exchanged[table == PERSON], exchanged[table == BACKGROUND] = BACKGROUND, PERSON
    return exchanged


def people_in(mask: MaskFile, table: Mask, *, numbered: bool) -> Labels:
    """H W int32: a number for each person, 0 where there is none; some may be left out.

    Numbers and colours tell people apart; elsewhere what hangs together is one, and specks are
    left out unless there is nothing else.
    """
    is_person = np.asarray(cv2.LUT(mask.levels, table)) == PERSON
    if numbered and mask.colours is not None:
        _, numbers = np.unique(mask.colours, return_inverse=True)
        return np.where(is_person, numbers.reshape(is_person.shape) + 1, 0).astype(np.int32)
    if numbered:
        return np.where(is_person, mask.levels.astype(np.int32) + 1, 0)
    _, labels = cv2.connectedComponents(is_person.view(np.uint8))
    # OpenCV's own statistics take three times as long.
    large = np.bincount(labels.ravel()) >= _SMALLEST_PERSON * is_person.size
    if not large[1:].any():
        return np.asarray(labels > 0, dtype=np.int32)
    numbers = np.where(large, np.arange(len(large), dtype=np.int32), 0)
    return np.asarray(numbers.take(labels), dtype=np.int32)


def count_people(people: Labels) -> int:
    """How many different people there are in what `people_in` has found."""
    return int(np.count_nonzero(np.bincount(people.ravel())[1:]))


def obey(meant: Mask, people: Labels, rules: LabelRules) -> Mask:
    """The mask with the people that the rules leave out marked as ignored; `meant` is changed."""
    areas = np.bincount(people.ravel())
    areas[0] = 0
    wanted = areas >= rules.min_person_area * meant.size
    if rules.largest_only:
        wanted &= np.arange(len(areas)) == areas.argmax()
    is_person = meant == PERSON
    meant[is_person & ~wanted.take(people)] = IGNORE
    return meant

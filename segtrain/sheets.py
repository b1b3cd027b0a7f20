"""Contact sheets: pictures with their masks upon them, in rows, each with a line beneath it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from segtrain.classes import IGNORE, PERSON
from segtrain.files import write_bytes
from segtrain.images import Pixels, encode_image

CELL = 256
"""The longest side of a picture on a sheet."""
OUTLINE_COLOUR = (255, 235, 0)
"""Of the people of a mask."""

_GAP = 8
_CAPTION, _NARROWEST_CAPTION = 22, 150
_HEADING = 40
_PAPER, _INK, _FAINT = (32, 32, 32), (235, 235, 235), (165, 165, 165)
_PERSON_COLOUR = np.array([255, 0, 140], dtype=np.float32)
_TINT = 0.4
_STRIPE = 6


@dataclass(frozen=True)
class Cell:
    """A picture, H W 3 uint8, of at most CELL a side, and the line beneath it.

    caption: at the left. note: at the right, paler.
    """

    picture: Pixels
    caption: str
    note: str = ""


def laid_over(image: Pixels, mask: Pixels) -> Pixels:
    """The picture scaled into a square of CELL with its mask upon it: h w 3 uint8.

    People are tinted and outlined, what is ignored is hatched.

    Args:
        image: H W 3 uint8 RGB.
        mask: H W uint8 in {0, 1, 255}.
    """
    size = fitted(*mask.shape)
    pixels = scaled(image, size)
    mask = scaled_mask(mask, size)
    person = mask == PERSON
    tint(pixels, person)
    hatch(pixels, mask == IGNORE)
    draw_outline(pixels, person, OUTLINE_COLOUR)
    return pixels


def fitted(height: int, width: int) -> tuple[int, int]:
    """Height and width of what has this size, scaled so that its longer side is CELL."""
    scale = CELL / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled(image: Pixels, size: tuple[int, int]) -> Pixels:
    """H W 3 → `size` (height, width), without aliasing."""
    smaller = max(size) < max(image.shape[:2])
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size[::-1], interpolation=interpolation), dtype=np.uint8)


def scaled_mask(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """H W → `size` (height, width); no value is there that was not before."""
    nearest = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(nearest, dtype=np.uint8)


def tint(pixels: Pixels, person: npt.NDArray[np.bool_]) -> None:
    """Colour H W 3 where `person`, H W, says so; what is below still shows."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    table = (1 - _TINT) * levels + _TINT * _PERSON_COLOUR
    tinted = cv2.LUT(pixels, table.round().astype(np.uint8)[None])
    np.copyto(pixels, tinted, where=person[..., None])


def hatch(pixels: Pixels, region: npt.NDArray[np.bool_]) -> None:
    """Draw grey stripes into H W 3 where `region`, H W, says so."""
    rows, columns = np.indices(region.shape)
    stripes = (rows + columns) // _STRIPE % 2 == 0
    pixels[region & stripes] = 128


def draw_outline(
    pixels: Pixels, region: npt.NDArray[np.bool_], colour: tuple[int, int, int], thickness: int = 1
) -> None:
    """Draw the outlines of `region`, H W, also of its holes, `thickness` wide, into H W 3."""
    outlines, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, outlines, -1, colour, thickness)


def block(heading: str, cells: Sequence[Cell], columns: int) -> Image.Image:
    """Cells row by row under a heading, each row as high as its highest picture."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.picture.shape[0] for cell in row) for row in rows]
    width = columns * (CELL + _GAP) + _GAP
    height = _HEADING + sum(heights) + len(rows) * (_CAPTION + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _HEADING // 2), heading, _INK, _font(18), anchor="lm")
    bottom = _HEADING
    for row, row_height in zip(rows, heights, strict=True):
        bottom += row_height
        for column, cell in enumerate(row):
            left = _GAP + column * (CELL + _GAP)
            # Close to its caption.
            sheet.paste(Image.fromarray(cell.picture), (left, bottom - cell.picture.shape[0]))
            _write_caption(draw, cell, left, bottom + _CAPTION // 2 + 1)
        bottom += _CAPTION + _GAP
    return sheet


def write_sheet(path: Path, blocks: Iterable[Image.Image]) -> None:
    """One block below the other, all of the same number of columns, as a PNG.

    Raises:
        ResourceError: it cannot be written.
    """
    pixels = np.concatenate([np.asarray(block) for block in blocks])
    write_bytes(path, encode_image(pixels, path))


def _write_caption(draw: ImageDraw.ImageDraw, cell: Cell, left: int, middle: int) -> None:
    """The note at the right; the caption at the left, its beginning cut off if it is too long."""
    font = _font(13)
    width = max(cell.picture.shape[1], _NARROWEST_CAPTION)
    room = width - draw.textlength(f"  {cell.note}", font)
    caption = cell.caption
    while draw.textlength(caption, font) > room and len(caption) > 1:
        caption = "…" + caption[2:]
    draw.text((left, middle), caption, _INK, font, anchor="lm")
    draw.text((left + width, middle), cell.note, _FAINT, font, anchor="rm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: it has the letters of most names."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
